"""Monte Carlo arithmetic: what a graph's results are when its roundings fall otherwise, and so which digits of them mean anything.

A rounding x -> x (1 + d) + e with |d| <= u, the unit roundoff of the value's dtype, and |e| half its least subnormal number, is
the standard model of floating-point arithmetic. Drawn at random, in f64, for what goes into every operation (a sum in another order
is the sum of terms that are a little off) and for what comes out, it gives results that the graph may as well have. Where draws
differ, it determines no more: near the pole of 1 / x, where a difference cancels, at the step of a comparison.

Reference: Parker, Pierce and Eggert, "Monte Carlo Arithmetic: How to Gamble with Floating Point and Win" (2000); Higham, "Accuracy
and Stability of Numerical Algorithms", section 2.2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from graphopt.ir import Graph, Node, Value
from graphopt.ir.interpreter import evaluate, evaluate_node
from graphopt.ir.ops import EvalContext, Trait

DRAWS = 16
"""Of two equal candidates for a largest element, all draws choose the same one once in 32768 times."""

_SELECTIONS = ("neg", "abs", "sign", "floor", "ceil", "trunc", "round", "relu", "maximum", "minimum", "where", "fmod", "max", "min",
               "cummax", "cummin", "argmax", "argmin", "argcummax", "argcummin", "take", "gather", "concat", "pad", "put", "max_pool",
               "argmax_pool", "adaptive_max_pool", "adaptive_argmax_pool")  # fmt: skip


def draw_results(graph: Graph, inputs: Sequence[torch.Tensor], bindings: Mapping[str, int], *, wide: bool,
                 seed: int = 0) -> list[list[torch.Tensor]]:  # fmt: skip
    """The outputs in f64 (c128, or their exact dtypes), :data:`DRAWS` times with other roundings.

    Args:
        bindings: values of the symbols.
        wide: round as f64 does; otherwise as the dtype of each value does.
        seed: of the roundings.
    """
    generator = torch.Generator().manual_seed(seed)
    varying = _varying(graph, [True] * len(graph.inputs))

    def rounded(v: Value, x: torch.Tensor) -> torch.Tensor:
        if not (v.dtype.is_float or v.dtype.is_complex):
            return x
        kind = torch.finfo(x.dtype if wide else v.dtype.torch)
        d, e = (torch.rand(x.shape, generator=generator, dtype=torch.float64) * kind.eps - kind.eps / 2 for _ in range(2))
        return torch.where(x == 0, x, x * (1 + d) + e * kind.smallest_normal)

    def each(node: Node, operands: Sequence[torch.Tensor], ctx: EvalContext) -> list[torch.Tensor]:
        if not (_rounds(node) and varying[node.results[0]]):
            return evaluate_node(node, operands, ctx)
        known = {v: rounded(v, x) for v, x in zip(node.operands, operands, strict=True)}  # x - x stays zero
        results = evaluate_node(node, [known[v] for v in node.operands], ctx)
        return [rounded(v, x) for v, x in zip(node.results, results, strict=True)]

    return [evaluate(graph, inputs, bindings=bindings, wide=True, each=each) for _ in range(DRAWS)]


def _rounds(node: Node) -> bool:
    """Whether a node computes with floats, and does not only choose or move them. Library calls keep their own order."""
    if node.op.has(Trait.VIEW, Trait.OPAQUE) or node.name in _SELECTIONS:
        return False
    return node.name != "cast" or node.operands[0].dtype.is_float


def _varying(graph: Graph, inputs: Sequence[bool]) -> dict[Value, bool]:
    """Whether a value depends on inputs. What does not, such as the positions that an image is resized by, is no matter of luck."""
    out = dict(zip(graph.inputs, inputs, strict=True))
    for node in graph:
        operands = [out[v] for v in node.operands]
        if node.body is not None:
            out |= _varying(node.body, operands)
        out |= dict.fromkeys(node.results, any(operands))
    return out


def nearer(x: torch.Tensor, reference: torch.Tensor, drawn: Sequence[torch.Tensor], factor: float) -> torch.Tensor:
    """x, moved toward the reference by as much as the draws lie away from it, element by element: what is left is an error.

    Args:
        x: the results to judge.
        reference: the same in f64 (c128, or an exact dtype).
        drawn: the same with other roundings (:func:`draw_results`).
        factor: on the distance of the draws.

    Returns:
        A tensor of x's dtype. It is the reference where that says nothing: draws differ in an exact dtype, are not of one kind (finite,
        infinite, NaN), or surround zero where x is not finite.
    """
    if not (reference.is_floating_point() or reference.is_complex()):
        return torch.where(torch.stack([d != reference for d in drawn]).any(0), reference.to(x.dtype), x)
    kind = torch.complex128 if reference.is_complex() else torch.float64
    new, ref = x.to(kind), reference.to(kind)
    other = torch.stack([(d.isnan() != ref.isnan()) | (d.isinf() != ref.isinf()) for d in drawn]).any(0)
    reach, gap = factor * torch.stack([(d - ref).abs() for d in drawn]).amax(0), (new - ref).abs()
    pole = ~new.isfinite() & (reach > ref.abs())
    moved = torch.where(new.isfinite() & ref.isfinite(), new + (ref - new) * (reach / gap), new)
    return torch.where(other | pole | (gap <= reach), ref, moved).to(x.dtype)
