"""The layers of a model that can be quantized, linear ones and convolutions: which scheme each is given, which stay in float and why; and
others in their place."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import is_lazy

from graphopt.errors import UsageError
from graphopt.passes.quantization.quantize_products import MOST_TERMS
from graphopt.passes.quantization.scheme import Scheme
from graphopt.quantized_conv import padding_of
from graphopt.smoothing import Smoothed

FLOAT = "float"  # in the place of a scheme
SMALL = 1 << 20  # bytes of the largest tensor that is copied, not shared
USES = 64  # pixels, at least, that an element of a convolution's weight is taken to be multiplied with


def linears_of(model: nn.Module) -> dict[str, nn.Module]:
    """By name: ``nn.Linear``, what is derived from it and does no more, smoothed layers, and transformers' ``Conv1D``."""
    return {name: m for name, m in model.named_modules() if _weight(m) is not None}


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """Linear layers and convolutions by name, in the model's order."""
    return {name: m for name, m in model.named_modules() if _weight(m) is not None or is_convolution(m)}


def is_convolution(m: nn.Module) -> bool:
    """Whether a module is one of PyTorch's own convolutions, not transposed."""
    return type(m) in (nn.Conv1d, nn.Conv2d, nn.Conv3d) and isinstance(m._parameters.get("weight"), nn.Parameter)


def _weight(m: nn.Module) -> nn.Parameter | None:
    """The matrix of a module that is a linear layer, if it is one."""
    plain = isinstance(m, Smoothed) or _is_linear(m) or (type(m).__name__ == "Conv1D" and hasattr(m, "nf"))
    return m.weight if plain and isinstance(m.weight, nn.Parameter) else None


def _is_linear(m: nn.Module) -> bool:
    """Whether a module is ``nn.Linear``, or is derived from it and has nothing of its own that the quantized layer would lack."""
    kind = type(m)
    if not isinstance(m, nn.Linear) or "bias" not in m._parameters:  # whose bias is computed, or pruned
        return False
    if kind is nn.Linear:
        return True
    inherits = kind.forward is nn.Linear.forward and kind.__call__ is nn.Module.__call__ and "forward" not in vars(m)
    hooked = bool(m._forward_hooks) or bool(m._forward_pre_hooks)
    own = set(m._parameters) != {"weight", "bias"} or bool(m._modules) or bool(m._buffers) or hooked
    return inherits and not own and kind is not NonDynamicallyQuantizableLinear  # of nn.MultiheadAttention, which never calls it


def weight_of(m: nn.Module) -> torch.Tensor:
    """The weight ``[out, in]``; of a convolution, ``in`` are its channels and taps."""
    if is_convolution(m):
        assert isinstance(m.weight, nn.Parameter)
        return m.weight.flatten(1)
    weight = _weight(m)
    assert weight is not None
    return weight if isinstance(m, nn.Linear | Smoothed) else weight.t()


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
    if not isinstance(scheme, Mapping):
        return dict.fromkeys(names, Scheme.parse(scheme))
    parsed = {pattern: None if s == FLOAT else Scheme.parse(s) for pattern, s in scheme.items()}
    for pattern in parsed:
        fits_some(f"scheme={{{pattern!r}: ...}}", pattern, names)
    first = {name: next((s for pattern, s in parsed.items() if fnmatchcase(name, pattern)), None) for name in names}
    return {name: s for name, s in first.items() if s is not None}


def fits_some(said: str, pattern: str, names: Sequence[str]) -> None:
    """Raises UsageError for a pattern that fits no layer."""
    if not any(fnmatchcase(name, pattern) for name in names):
        raise UsageError(f"{said} fits none of the layers: {', '.join(names) or 'there is none'}")


def left_in_float(model: nn.Module, schemes: Mapping[str, Scheme], keep: Sequence[str], least: int) -> dict[str, str]:
    """The layers that stay in float, and why.

    Args:
        keep: patterns of names.
        least: elements of the smallest weight that is quantized; a convolution's count ``USES`` times.

    Raises:
        UsageError: a pattern fits no layer, or a lazy layer has no shape yet.
    """
    layers = layers_of(model)
    for pattern in keep:
        fits_some(f"keep={pattern!r}", pattern, list(layers))
    holders: dict[int, list[str]] = {}
    for name, m in model.named_modules():
        for p in m.parameters(recurse=False):
            if is_lazy(p):
                raise UsageError(f"the weights of {name} have no shape yet ({type(m).__name__}): call the model once before")
            holders.setdefault(id(p), []).append(name)
    out = {}
    for name, m in layers.items():
        weight, convolution = weight_of(m), is_convolution(m)
        others = [n for n in holders[id(m._parameters["weight"])] if n not in layers]
        if name not in schemes or any(fnmatchcase(name, pattern) for pattern in keep):
            out[name] = "as asked"
        elif weight.dtype != torch.float32:
            out[name] = f"its weight is {weight.dtype}".replace("torch.", "")
        elif convolution and (not schemes[name].activations or schemes[name].storage):
            out[name] = "convolutions are quantized with their images alone, by int8-dynamic or int8-static"
        elif convolution and m.groups != 1:
            out[name] = f"it has {m.groups} groups"
        elif convolution and padding_of(m) is None:
            out[name] = f"its padding is {m.padding_mode!r} or uneven"
        elif schemes[name].activations and not schemes[name].storage and weight.shape[1] > MOST_TERMS:
            out[name] = f"sums of {weight.shape[1]} products may exceed 32 bits"
        elif weight.numel() * (USES if convolution else 1) < least:
            out[name] = f"{weight.numel()} elements are too few"
        elif others:
            out[name] = f"its weight is that of {others[0]}, too"
    return out


def replaced(model: nn.Module, made: Mapping[str, nn.Module]) -> nn.Module:
    """A copy of the model's modules with some in the place of others; tensors are shared."""
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())} | _computed(model)
    memo |= {id(m): made[name] for name, m in model.named_modules() if name in made}
    return copy.deepcopy(model, memo)


def separate(model: nn.Module) -> nn.Module:
    """A copy of the model whose parameters and buffers are its own: those of up to ``SMALL`` bytes lie elsewhere, larger ones of PyTorch's
    own classes are others over the same memory."""
    large = [t for t in (*model.parameters(), *model.buffers()) if t.nbytes > SMALL]
    memo: dict[int, Any] = {id(t): nn.Parameter(t.detach(), t.requires_grad) for t in large if type(t) is nn.Parameter}
    memo |= {id(t): t.detach() for t in large if type(t) is torch.Tensor} | _computed(model)
    return copy.deepcopy(model, memo)


def _computed(model: nn.Module) -> dict[int, Any]:
    """Tensors that modules compute at each call (weight_norm, pruning), for ``copy.deepcopy``, which does not take them: as they are."""
    return {id(t): t for m in model.modules() for t in vars(m).values() if isinstance(t, torch.Tensor)}
