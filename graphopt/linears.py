"""The linear layers of a model: which there are, which scheme each is given, which stay in float and why; and others in their place."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from graphopt.errors import UsageError
from graphopt.passes.quantization.quantize_products import MOST_TERMS
from graphopt.passes.quantization.scheme import Scheme
from graphopt.smoothing import Smoothed

FLOAT = "float"  # in the place of a scheme


def linears_of(model: nn.Module) -> dict[str, nn.Module]:
    """By name: ``nn.Linear`` itself, smoothed, and transformers' ``Conv1D``."""
    return {name: m for name, m in model.named_modules() if _weight(m) is not None}


def _weight(m: nn.Module) -> nn.Parameter | None:
    """The matrix of a module that is a linear layer, if it is one."""
    plain = type(m) in (nn.Linear, Smoothed) or (type(m).__name__ == "Conv1D" and hasattr(m, "nf"))
    return m.weight if plain and isinstance(m.weight, nn.Parameter) else None


def weight_of(m: nn.Module) -> torch.Tensor:
    """The weight ``[out, in]``."""
    weight = _weight(m)
    assert weight is not None
    return weight if type(m) in (nn.Linear, Smoothed) else weight.t()


def smooth_of(m: nn.Module) -> torch.Tensor | None:
    """What a layer multiplies its inputs by first."""
    return m.smooth if isinstance(m, Smoothed) else None


def schemes_of(scheme: str | Mapping[str, str], names: Sequence[str]) -> dict[str, Scheme]:
    """The scheme of each layer that has one.

    Args:
        scheme: one for all, or one by pattern: the first that fits a name counts; ``float`` for none.

    Raises:
        UsageError: there is no such scheme, or a pattern fits no layer.
    """
    if isinstance(scheme, str):
        return dict.fromkeys(names, Scheme.parse(scheme))
    parsed = {pattern: None if s == FLOAT else Scheme.parse(s) for pattern, s in scheme.items()}
    for pattern in parsed:
        fits_some(f"scheme={{{pattern!r}: ...}}", pattern, names)
    first = {name: next((s for pattern, s in parsed.items() if fnmatchcase(name, pattern)), None) for name in names}
    return {name: s for name, s in first.items() if s is not None}


def fits_some(said: str, pattern: str, names: Sequence[str]) -> None:
    """Raises UsageError for a pattern that fits no layer."""
    if not any(fnmatchcase(name, pattern) for name in names):
        raise UsageError(f"{said} fits none of the linear layers: {', '.join(names) or 'there is none'}")


def left_in_float(model: nn.Module, schemes: Mapping[str, Scheme], keep: Sequence[str], least: int) -> dict[str, str]:
    """The layers that stay in float, and why.

    Args:
        keep: patterns of names.
        least: elements of the smallest weight that is quantized.

    Raises:
        UsageError: a pattern fits no layer.
    """
    linears = linears_of(model)
    for pattern in keep:
        fits_some(f"keep={pattern!r}", pattern, list(linears))
    holders: dict[int, list[str]] = {}
    for name, m in model.named_modules():
        for p in m.parameters(recurse=False):
            holders.setdefault(id(p), []).append(name)
    out = {}
    for name, m in linears.items():
        weight = weight_of(m)
        others = [n for n in holders[id(_weight(m))] if n not in linears]
        if name not in schemes or any(fnmatchcase(name, pattern) for pattern in keep):
            out[name] = "as asked"
        elif weight.dtype != torch.float32:
            out[name] = f"its weight is {weight.dtype}".replace("torch.", "")
        elif schemes[name].activations and weight.shape[1] > MOST_TERMS:
            out[name] = f"sums of {weight.shape[1]} products may exceed 32 bits"
        elif weight.numel() < least:
            out[name] = f"{weight.numel()} elements are too few"
        elif others:
            out[name] = f"its weight is that of {others[0]}, too"
    return out


def replaced(model: nn.Module, made: Mapping[str, nn.Module]) -> nn.Module:
    """A copy of the model's modules with some in the place of others; tensors are shared."""
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    memo |= {id(m): made[name] for name, m in model.named_modules() if name in made}
    return copy.deepcopy(model, memo)
