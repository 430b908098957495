"""The source line of an FX node: the deepest frame that is not PyTorch's own, be it the user's file or a model library's.

Within PyTorch's own modules (``nn.Sequential``) there is no such line: the module's path and class stand in its place.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from graphopt.ir.graph import Loc

_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)')
_TORCH = str(Path(torch.__file__).parent)
_SITE = str(Path(torch.__file__).parent.parent)


def location(meta: dict[str, Any]) -> Loc | None:
    """Source line of a node from its ``meta``, or its module; None where the tracer left no trace."""
    frames = [f for f in _FRAME.findall(meta.get("stack_trace") or "") if not f[0].startswith((_TORCH, "<"))]
    if not frames:
        return _module(meta)
    file, line, function = frames[-1]
    return Loc(short_path(file), int(line), module_path(meta) or function)


def short_path(file: str) -> str:
    """Relative to the library folder or the working directory; else the bare name. Without blanks."""
    for root in (_SITE, str(Path.cwd())):
        if file.startswith(root + "/"):
            return file[len(root) + 1 :].replace(" ", "_")
    return Path(file).name.replace(" ", "_")


def module_path(meta: dict[str, Any]) -> str:
    """The dotted path of the innermost module, e.g. ``encoder.layer.0.attention``; empty when there is none."""
    stack = _stack(meta)
    return clean_name(stack[-1][0]) if stack else ""


def _module(meta: dict[str, Any]) -> Loc | None:
    """The innermost module, e.g. ``1 (BatchNorm1d)``."""
    stack = _stack(meta)
    return Loc("", 0, f"{module_path(meta)} ({class_name(stack[-1][1])})".strip()) if stack else None


def _stack(meta: dict[str, Any]) -> list[tuple[str, Any]]:
    """Path and class of the modules around a node, the innermost last."""
    return list((meta.get("nn_module_stack") or meta.get("fwd_nn_module_stack") or {}).values())


def class_name(kind: Any) -> str:
    """The bare name of a module's class, which tracers give as a class or by its full name."""
    return kind.__name__ if isinstance(kind, type) else str(kind).rsplit(".", 1)[-1]


def clean_name(name: str) -> str:
    """``L['self']._modules['fc']._parameters['weight']`` => ``fc.weight``."""
    name = re.sub(r"\._(?:modules|parameters|buffers)\['([^']+)'\]", r".\1", name)
    name = re.sub(r"^L\['(?:self|fn|mod|model)'\]\.?", "", name)
    name = re.sub(r"\[(?:'([^']*)'|\"([^\"]*)\"|(\d+))\]", lambda m: "." + (m.group(1) or m.group(2) or m.group(3) or ""), name)
    return re.sub(r"[^A-Za-z0-9_.]", "_", name).strip("._") or name
