"""Batch norms folded into the convolutions before them, as modules: what is rounded then is what is multiplied.

    batch_norm(conv(x, w) + b, mean, var, g, h)  =  conv(x, w * s) + ((b - mean) * s + h),   s = g / sqrt(var + eps)

Pairs are found in the captured graph, not by the names of modules: a norm that reads a convolution's result, which nothing else reads.
Both are modules of PyTorch's own that do nothing besides (no subclasses, no hooks) and are called once. What the model then gives is
compared on the samples; where it moved, nothing is folded.

Reference: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", arXiv:1712.05877,
section 3.2.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from graphopt.calibration import Sample, inferring, run_hooked
from graphopt.capture.captured import TensorArgument
from graphopt.capture.export import exported_graph
from graphopt.capture.fx import capture_fx
from graphopt.errors import CaptureError
from graphopt.ir.graph import Graph, Node, Value
from graphopt.linears import is_convolution, replaced
from graphopt.moves import EXACT, moves
from graphopt.passes.simplify.fold_batch_norm import producer

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def without_norms(model: nn.Module, convolutions: Sequence[str], samples: Sequence[Sample]) -> tuple[nn.Module, str]:
    """The model, with the batch norms behind some of its convolutions folded into those.

    Args:
        convolutions: names, as ``model.named_modules()`` gives them.
        samples: calls of the model; the first is captured, and all are compared.

    Returns:
        The folded model, or the model itself; and why nothing was folded, for people: empty if something was, or if there was nothing to.
    """
    if not any(_is_norm(m) for m in model.modules()) or not samples:
        return model, ""
    args, kwargs = samples[0]
    try:
        with inferring(model):
            pairs = _pairs(model, args, kwargs)
    except CaptureError as error:
        return model, f"batch norms were not folded into convolutions: {error}"
    names = {m: name for name, m in model.named_modules()}  # a module's first name, which is what others go by
    pairs = [(c, n) for c, n in pairs if names[c] in convolutions and all(map(_does_no_more, (c, n))) and is_convolution(c) and _is_norm(n)]
    called = _calls(model, args, kwargs, {m for pair in pairs for m in pair}) if pairs else Counter()
    made = dict[str, nn.Module]()
    for conv, norm in pairs:
        if called[conv] == called[norm] == 1:
            made |= {names[conv]: _folded(conv, norm), names[norm]: nn.Identity()}
    if not made:
        return model, ""
    folded = replaced(model, made)
    changed = _changed(model, folded, samples)
    return (model, f"batch norms were not folded into convolutions: {changed}") if changed else (folded, "")


def _is_norm(m: nn.Module) -> bool:
    """Whether a module is one of PyTorch's own batch norms: a subclass may do more."""
    return type(m) in _NORMS


def _does_no_more(m: nn.Module) -> bool:
    """Whether a module does what its class says: it has no hooks, and no ``forward`` of its own."""
    return not m._forward_hooks and not m._forward_pre_hooks and "forward" not in vars(m)


def _calls(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], among: Iterable[nn.Module]) -> Counter[nn.Module]:
    """How often modules are called: of one whose tensors a function reads that is no call."""
    called = Counter[nn.Module]()
    run_hooked(model, [(tuple(args), dict(kwargs))], [m.register_forward_pre_hook(lambda m, _: called.update([m])) for m in among])
    return called


def _changed(model: nn.Module, folded: nn.Module, samples: Sequence[Sample]) -> str:
    """What folding changed on the samples, in words; empty if nothing."""
    for args, kwargs in samples:
        try:
            most = max(moves(model, folded, args, kwargs), default=0.0)
        except Exception as error:  # of the model's own code, which looks into a norm that is gone
            return f"the model then raised {type(error).__name__}: {error}"
        if not most < EXACT:
            return f"an output then moved by {most:.3g} of its norm"
    return ""


def _pairs(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[tuple[nn.Module, nn.Module]]:
    """The modules that own the weights of convolutions, and the parameters of the batch norms behind them."""
    exported = exported_graph(model, args, kwargs)
    captured = capture_fx(exported.gm, weights=exported.weights)
    names = {a.input: exported.weights[i] for i, a in enumerate(captured.arguments)
             if isinstance(a, TensorArgument) and i in exported.weights}  # fmt: skip
    owners = {v: names[v.index].rpartition(".")[0] for v in captured.graph.inputs if v.index in names}
    modules = dict(model.named_modules(remove_duplicate=False))  # the export goes by any of a module's names
    return [(modules[c], modules[n]) for c, n in _found(captured.graph, owners).items() if c in modules and n in modules]


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
    assert isinstance(norm, _NORMS) and norm.running_mean is not None and norm.running_var is not None
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
