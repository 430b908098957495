"""Weights that no scheme takes, and why: entries of the ledger beside those of linear layers and convolutions.

Told are parameters of two axes or more, axes of one element not counted. Those of embeddings and normalizations, which nothing is
multiplied by as a matrix, are not.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from graphopt.ledger import Entry
from graphopt.linears import layers_of
from graphopt.quantized_conv import QuantizedConv
from graphopt.quantized_linear import QuantizedLinear
from graphopt.split import SplitLinear

_NOT_TOLD = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.RMSNorm)
_REASONS: dict[type[nn.Module] | tuple[type[nn.Module], ...], str] = {
    (nn.MultiheadAttention, NonDynamicallyQuantizableLinear): "nn.MultiheadAttention reads it without calling a layer",
    (nn.RNNBase, nn.RNNCellBase): "recurrent layers are not quantized",
    _ConvTransposeNd: "transposed convolutions are not quantized",
    nn.Bilinear: "bilinear layers are not quantized",
}


def unquantized(model: nn.Module) -> dict[str, list[Entry]]:
    """Entries by the name of the module that has the weights; none of a weight that a linear layer or a convolution has."""
    layers = layers_of(model)
    seen = {id(m._parameters["weight"]) for m in layers.values()}
    out: dict[str, list[Entry]] = {}
    told: list[str] = []  # prefixes of the names of what belongs to modules that were told as a whole
    for name, m in model.named_modules():
        if name in layers or isinstance(m, (*_NOT_TOLD, ParametrizationList)) or any(name.startswith(prefix) for prefix in told):
            continue
        if isinstance(m, QuantizedLinear | SplitLinear | QuantizedConv):
            told.append(f"{name}." if name else "")
            rows = m.weight.flatten(1)
            out[name] = [Entry(name, tuple(rows.shape), m.scheme, "left: it is quantized already", m.nbytes, m.nbytes)]
            continue
        for own, weight, why in _weights(m):
            if sum(n > 1 for n in weight.shape) > 1 and id(weight) not in seen:
                seen.add(id(weight))
                label = name if own == "weight" else f"{name}.{own}".removeprefix(".")
                out.setdefault(name, []).append(Entry(label, tuple(weight.shape), "", f"left: {why}", weight.nbytes, weight.nbytes))
    return out


def _weights(m: nn.Module) -> Iterator[tuple[str, torch.Tensor, str]]:
    """A module's own weights: names, tensors, and why they are left."""
    computed = [*m.parametrizations] if is_parametrized(m) else ["weight"] if isinstance(vars(m).get("weight"), torch.Tensor) else []  # type: ignore[misc]
    for name in computed:
        yield name, getattr(m, name), "it is computed at each call (a parametrization, weight_norm, pruning)"
    for name, p in m._parameters.items():
        if p is not None and not any(name.startswith(f"{whole}_") for whole in computed):  # weight_v, weight_orig
            yield name, p, _reason(m)


def _reason(m: nn.Module) -> str:
    kind = type(m).__name__
    for classes, why in _REASONS.items():
        if isinstance(m, classes):
            return why
    if isinstance(m, nn.Linear):
        return f"{kind} is more than the nn.Linear that it is derived from"
    if isinstance(m, _ConvNd):
        return f"{kind} is derived from a convolution"
    return f"it is a parameter of {kind}, of no linear layer or convolution"
