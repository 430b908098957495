"""Batch norms folded into the convolutions before them, as modules: what is rounded then is what is multiplied.

    batch_norm(conv(x, w) + b, mean, var, g, h)  =  conv(x, w * s) + ((b - mean) * s + h),   s = g / sqrt(var + eps)

Pairs are found in the captured graph, not by the names of modules: a norm that reads a convolution's result, which nothing else reads.

Reference: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", arXiv:1712.05877,
section 3.2.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from graphopt.calibration import Sample, inferring
from graphopt.capture.captured import TensorArgument
from graphopt.capture.export import exported_graph
from graphopt.capture.fx import capture_fx
from graphopt.errors import CaptureError
from graphopt.ir.graph import Graph, Node, Value
from graphopt.linears import replaced
from graphopt.passes.simplify.fold_batch_norm import producer


def without_norms(model: nn.Module, convolutions: Sequence[str], samples: Sequence[Sample]) -> nn.Module:
    """The model, with the batch norms behind some of its convolutions folded into those; as it is where it cannot be captured.

    Args:
        samples: calls of the model; the first is captured.
    """
    if not any(isinstance(m, _BatchNorm) for m in model.modules()) or not samples:
        return model
    args, kwargs = samples[0]
    try:
        with inferring(model):
            pairs = _pairs(model, args, kwargs)
    except CaptureError:
        return model
    modules, made = dict(model.named_modules()), dict[str, nn.Module]()
    for conv, norm in pairs.items():
        if conv in convolutions and isinstance(modules[norm], _BatchNorm):
            made |= {conv: _folded(modules[conv], modules[norm]), norm: nn.Identity()}
    return replaced(model, made) if made else model


def _pairs(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, str]:
    """Names of convolutions, and of the batch norms behind them."""
    exported = exported_graph(model, args, kwargs)
    captured = capture_fx(exported.gm, weights=exported.weights)
    names = {a.input: exported.weights[i] for i, a in enumerate(captured.arguments)
             if isinstance(a, TensorArgument) and i in exported.weights}  # fmt: skip
    owners = {v: names[v.index].rpartition(".")[0] for v in captured.graph.inputs if v.index in names}
    return _found(captured.graph, owners)


def _found(g: Graph, owners: Mapping[Value, str]) -> dict[str, str]:
    """Pairs of a graph, given the names of the modules that its weights belong to."""
    pairs = {}
    for norm in g.nodes():
        if norm.op.name != "batch_norm":
            continue
        conv, bias = producer(norm.operands[0])
        if conv is None or conv.op.name != "conv" or not _alone(conv, bias, norm):
            continue
        of_norm = {owners.get(v) for v in norm.operands[1:]}
        of_conv = {owners.get(v) for v in (conv.operands[1], *([] if bias is None else [_plain(bias)]))}
        if len(of_norm) == len(of_conv) == 1 and None not in of_norm | of_conv:
            pairs[str(*of_conv)] = str(*of_norm)
    return pairs


def _plain(bias: Value) -> Value:
    view = bias.defined_by("reshape")
    return bias if view is None else view.operands[0]


def _alone(conv: Node, bias: Value | None, norm: Node) -> bool:
    """Whether nothing else reads the convolution's result, or the parameters of either."""
    between = [conv.result, conv.operands[1], norm.operands[0], *norm.operands[1:], *([] if bias is None else [bias, _plain(bias)])]
    return all(len(v.users) == 1 for v in between)


def _folded(conv: nn.Module, norm: nn.Module) -> nn.Module:
    assert isinstance(norm, _BatchNorm) and norm.running_mean is not None and norm.running_var is not None
    weight, bias = conv._parameters["weight"], conv._parameters["bias"]
    assert weight is not None
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight.detach().double()
    shift = ((0.0 if bias is None else bias.detach().double()) - norm.running_mean.double()) * scale
    shift = shift if norm.bias is None else shift + norm.bias.detach().double()
    made = copy.copy(conv)
    scaled = weight.detach().double() * scale.reshape(-1, *[1] * (weight.dim() - 1))
    made._parameters = {name: nn.Parameter(v.to(weight.dtype), requires_grad=False) for name, v in (("weight", scaled), ("bias", shift))}
    return made
