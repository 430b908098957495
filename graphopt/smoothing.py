"""Moving scales from the inputs of linear layers into their weights, exactly: SmoothQuant, and AWQ's scaling.

A normalization with a learned scale may be followed by anything that is linear in its channels::

    norm(x) * g + b  and  y = (norm(x) * g + b) W^T    =    norm(x) * (g / s) + (b / s)  and  y = (...) (W * s)^T

A group is a normalization and *all* that reads it, when that is linear layers alone. Groups are found in the captured graph, not by
the names of modules. Any other linear layer (behind a norm that a residual reads, too, or behind an activation) multiplies its inputs
by ``1 / s`` itself, which costs an instruction an element where its kernel rounds them. :mod:`graphopt.scales` chooses s.

Reference: Xiao et al., "SmoothQuant", arXiv:2211.10438; Lin et al., "AWQ: Activation-aware Weight Quantization", arXiv:2306.00978.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from graphopt.calibration import Sample, watch
from graphopt.capture.captured import TensorArgument
from graphopt.capture.export import exported_graph
from graphopt.capture.fx import capture_fx
from graphopt.ir.graph import Graph, Node, Value, is_view
from graphopt.pass_manager import PassContext, make_pass, run_passes
from graphopt.passes.pipelines import LEVELS
from graphopt.passes.quantization.scheme import Scheme
from graphopt.quantized_linear import called
from graphopt.scales import Inputs, scales

_NORMS = {"layer_norm": 3, "rms_norm": 2}  # operands with a learned scale


@dataclass(frozen=True)
class Group:
    """Names of a normalization's module, and of the linear layers that read it."""

    norm: str
    linears: tuple[str, ...]


def groups_of(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Group]:
    """The groups of a model, in order.

    Raises:
        CaptureError: the model cannot be exported.
    """
    exported = exported_graph(model, args, kwargs)
    captured = capture_fx(exported.gm, weights=exported.weights)
    names = {a.input: exported.weights[i] for i, a in enumerate(captured.arguments)
             if isinstance(a, TensorArgument) and i in exported.weights}  # fmt: skip
    pipeline = LEVELS[2][: LEVELS[2].index("recognise-attention")]
    run_passes(captured.graph, [make_pass(name) for name in pipeline], PassContext())
    return list(_groups(captured.graph, {v: names[v.index] for v in captured.graph.inputs if v.index in names}))


def _groups(g: Graph, names: Mapping[Value, str]) -> Iterable[Group]:
    """Groups of a graph, given the names of its weights."""
    for node in g.nodes():
        if len(node.operands) != _NORMS.get(node.op.name):
            continue
        learned = [names.get(v, "") for v in node.operands[1:]]
        owners = {name.rpartition(".")[0] for name in learned}
        alone = all(len(v.users) == 1 for v in node.operands[1:])
        linears = _linears(node, names)
        if all(learned) and len(owners) == 1 and alone and linears:
            yield Group(owners.pop(), tuple(dict.fromkeys(linears)))


def _linears(node: Node, names: Mapping[Value, str]) -> list[str]:
    """The linear layers that read a value along its last axis, if nothing else does."""
    out: list[str] = []
    for user in node.results[0].users:
        if is_view(user) and user.op.name == "reshape" and user.results[0].shape[-1:] == node.results[0].shape[-1:]:
            found = _linears(user, names)
        else:
            found = [_linear(user, node.results[0], names)]
        if not found or not all(found):
            return []
        out += found
    return out


def _linear(user: Node, x: Value, names: Mapping[Value, str]) -> str:
    """The module whose weight a node multiplies ``x`` by; empty if it does something else, or the weight has other readers."""
    if user.op.name != "matmul" or user.operands[0] is not x or user.operands[1] is x:
        return ""
    weight = user.operands[1]
    view = weight.defined_by("transpose")
    source = view.operands[0] if view is not None else weight
    name = names.get(source, "")
    return name.rpartition(".")[0] if name.endswith(".weight") and len(source.users) == 1 and len(weight.users) == 1 else ""


# --- moving ---------------------------------------------------------------------------------------------------------------


def smoothed(model: nn.Module, groups: Sequence[Group], alone: Sequence[str], samples: Sequence[Sample], schemes: Mapping[str, Scheme],
             method: str, weight_of: Callable[[nn.Module], torch.Tensor]) -> dict[str, nn.Module]:  # fmt: skip
    """Modules to put in the place of a model's, by name: normalizations and linear layers with scales moved; none where
    nothing is gained by that.

    Args:
        alone: linear layers of no group: their inputs' channels are multiplied when the layer is called.
        schemes: of all these linear layers.
        method: ``smoothquant`` or ``awq``.
        weight_of: a linear module's weight as ``[N, K]``.
    """
    modules, seen = dict(model.named_modules()), dict[str, Inputs]()

    def look(name: str, x: torch.Tensor) -> None:
        seen.setdefault(name, Inputs(x.shape[1], len(samples))).see(x)

    groups = [*groups, *(Group("", (name,)) for name in alone)]
    watch(model, [g.linears[0] for g in groups], samples, look)
    out: dict[str, nn.Module] = {}
    for g in groups:
        first = g.linears[0]
        if first not in seen or not len(seen[first].rows):
            continue
        weights = [weight_of(modules[n]).detach().float() for n in g.linears]
        s = scales(method, seen[first], weights, [schemes[n] for n in g.linears])
        if bool((s == 1).all()):
            continue
        if not g.norm:
            out[first] = Smoothed(weights[0] * s, modules[first]._parameters["bias"], s.reciprocal())
            continue
        out[g.norm] = _divided(modules[g.norm], s)
        for n in g.linears:
            out[n] = _multiplied(modules[n], s, weight_of)
    return out


class Smoothed(nn.Module):
    """A linear layer with a weight ``[N, K]``, of inputs that are multiplied by ``smooth`` ``[K]`` first."""

    bias: nn.Parameter | None
    smooth: torch.Tensor

    def __init__(self, weight: torch.Tensor, bias: nn.Parameter | None, smooth: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.register_parameter("bias", bias)  # an attribute that is None would be none of the module's parameters
        self.register_buffer("smooth", smooth)
        self.register_forward_pre_hook(called)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(input * self.smooth, self.weight, self.bias)


def _divided(norm: nn.Module, s: torch.Tensor) -> nn.Module:
    made = copy.copy(norm)
    made._parameters = {n: None if p is None else nn.Parameter(p.detach() / s.to(p.dtype), p.requires_grad)
                        for n, p in norm._parameters.items()}  # fmt: skip
    return made


def _multiplied(linear: nn.Module, s: torch.Tensor, weight_of: Callable[[nn.Module], torch.Tensor]) -> nn.Module:
    made = copy.copy(linear)
    weight = linear._parameters["weight"]
    assert weight is not None
    plain = weight_of(linear).shape == weight.shape and isinstance(linear, nn.Linear)
    scaled = weight.detach() * (s if plain else s.unsqueeze(1)).to(weight.dtype)
    made._parameters = {**linear._parameters, "weight": nn.Parameter(scaled, weight.requires_grad)}
    return made
