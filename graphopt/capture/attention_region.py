"""What is called in the place of an attention of a Dynamo graph in training."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import sympy
import torch

from graphopt.ir import dims
from graphopt.ir.dims import Dim
from graphopt.ir.graph import Graph, Node
from graphopt.ir.interpreter import evaluate_node
from graphopt.ir.ops import EvalContext
from graphopt.ir.opset.attention import parts
from graphopt.trained_attention import ATTRS


class AttentionRegion(torch.nn.Module):
    """Computes a graph of views, scales and one attention, by torch operators that autograd can trace.

    Args:
        graph: its inputs are the call's arguments; one output.
        order: the output's axes by their strides, the largest first: what follows may make views that need them.
    """

    def __init__(self, graph: Graph, order: Sequence[int]) -> None:
        super().__init__()
        self.graph, self.order = graph, list(order)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        env = dict(zip(self.graph.inputs, inputs, strict=True))
        ctx = _TracedSizes(self.graph, inputs)
        for node in self.graph.nodes():
            operands = [env[v] for v in node.operands]
            results = [_call(node, operands, ctx)] if node.name == "attention" else evaluate_node(node, operands, ctx)
            env.update(zip(node.results, results, strict=True))
        places = [self.order.index(i) for i in range(len(self.order))]
        return env[self.graph.outputs[0]].permute(self.order).contiguous().permute(places)


class _TracedSizes(EvalContext):
    """Sizes bound to those of tensors that are traced, which may be symbolic to PyTorch, too."""

    def __init__(self, graph: Graph, inputs: Sequence[torch.Tensor]) -> None:
        sizes = [(d, n) for v, x in zip(graph.inputs, inputs, strict=True) for d, n in zip(v.shape, x.shape, strict=True)]
        super().__init__({d.name: n for d, n in sizes if isinstance(d, sympy.Symbol)}, device=inputs[0].device)

    def dim(self, d: Dim) -> int:
        if isinstance(d, int):
            return d
        names = dims.free_symbols([d])
        compute: Callable[..., int] = sympy.lambdify(names, d, modules=[{"FloorDiv": lambda a, b: a // b}, "math"])
        return compute(*(self.bindings[n] for n in names))


def _call(node: Node, operands: Sequence[torch.Tensor], ctx: EvalContext) -> torch.Tensor:
    """The operator, of queries with all batches and heads, and of keys and values with all batches."""
    p = parts(operands, node.attrs, [v.dtype for v in node.operands])
    lead = ctx.shape(node.result.shape[:-2])
    q = p.q.expand(*lead, *p.q.shape[-2:])
    own = dims.same(node.operands[1].shape[-3], node.operands[2].shape[-3])
    k, v = (x.expand(*lead[:-1], x.shape[-3] if own else lead[-1], *x.shape[-2:]) for x in (p.k, p.v))
    attrs = {n: node.attrs[n] for n in ATTRS}
    attrs |= {"offset": ctx.dim(attrs["offset"]), "window": None if attrs["window"] is None else ctx.dim(attrs["window"])}
    attrs["empty"] = "zero" if attrs["empty"] == "mean" else attrs["empty"]  # a mean only where every row is proven to see a key
    out, _ = torch.ops.graphopt.attention_forward(q, k, v, p.bias, p.mask, p.slopes, p.sinks, p.seed, *attrs.values())
    return out
