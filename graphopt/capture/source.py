"""The source line of an FX node: the deepest frame that is not PyTorch's own, be it the user's file or a model library's."""

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
    """Source line of a node from its ``meta``; None where the tracer left no trace."""
    frames = [f for f in _FRAME.findall(meta.get("stack_trace") or "") if not f[0].startswith((_TORCH, "<"))]
    if not frames:
        return None
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
    stack = meta.get("nn_module_stack") or meta.get("fwd_nn_module_stack") or {}
    if not stack:
        return ""
    path = list(stack.values())[-1][0]
    return clean_name(path)


def clean_name(name: str) -> str:
    """``L['self']._modules['fc']._parameters['weight']`` => ``fc.weight``."""
    name = re.sub(r"\._(?:modules|parameters|buffers)\['([^']+)'\]", r".\1", name)
    name = re.sub(r"^L\['(?:self|fn|mod|model)'\]\.?", "", name)
    name = re.sub(r"\[(?:'([^']*)'|\"([^\"]*)\"|(\d+))\]", lambda m: "." + (m.group(1) or m.group(2) or m.group(3) or ""), name)
    return re.sub(r"[^A-Za-z0-9_.]", "_", name).strip("._") or name
