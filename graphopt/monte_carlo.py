"""Monte Carlo arithmetic: what a graph's results are when its roundings fall otherwise, and so which digits of them mean anything.

A rounding x -> x (1 + d) + e with |d| <= u, the unit roundoff of the value's dtype, and |e| half its least subnormal number, is
the standard model of floating-point arithmetic. Drawn at random, in f64, for what goes into every sum (one in another
order is the sum of terms that are a little off) and for what comes out of an operation, it gives results that the graph may as well
have. Where draws differ, it determines no more: near the pole of 1 / x, where a difference cancels, at the step of a comparison. What
is exact, such as sums and products of small integers, does not move: ties of those are the graph's meaning.

Reference: Parker, Pierce and Eggert, "Monte Carlo Arithmetic: How to Gamble with Floating Point and Win" (2000); Higham, "Accuracy
and Stability of Numerical Algorithms", section 2.2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from graphopt.ir import Graph, Node, Value
from graphopt.ir.interpreter import evaluate, evaluate_node
from graphopt.ir.ops import EvalContext, Trait

DRAWS = (16, 96)
"""How many to take at first, and if these do not explain it all: of twelve equal candidates for a largest element, 96 draws miss one
once in 4000 times."""

MOST_DRAWN = 1 << 26
"""Elements of outputs, in all draws, beyond which there are no more than the first: they are held at once."""

_WIDE_UNITS = 16
"""f64 itself tells no more than three numbers apart in one unit roundoff either way: equal candidates would stay equal, the first win."""

_SELECTIONS = ("neg", "abs", "sign", "floor", "ceil", "trunc", "round", "relu", "maximum", "minimum", "where", "fmod", "max", "min",
               "cummax", "cummin", "argmax", "argmin", "argcummax", "argcummin", "take", "gather", "concat", "pad", "put", "max_pool",
               "argmax_pool", "adaptive_max_pool", "adaptive_argmax_pool")  # fmt: skip


def draw_results(graph: Graph, inputs: Sequence[torch.Tensor], bindings: Mapping[str, int], *, wide: bool,
                 seed: int = 0, count: int = DRAWS[0]) -> list[list[torch.Tensor]]:  # fmt: skip
    """The outputs in f64 (c128, or their exact dtypes), ``count`` times with other roundings.

    Args:
        bindings: values of the symbols.
        wide: round as f64 does, but :data:`_WIDE_UNITS` times as far; otherwise as the dtype of each value does.
        seed: of the roundings.
    """
    generator = torch.Generator().manual_seed(seed)
    varying = _varying(graph, [True] * len(graph.inputs))

    def rounded(v: Value, x: torch.Tensor) -> torch.Tensor:
        if not (v.dtype.is_float or v.dtype.is_complex):
            return x
        kind = torch.finfo(x.dtype if wide else v.dtype.torch)
        unit = kind.eps * (_WIDE_UNITS if wide else 1)
        d, e = (torch.rand(x.shape, generator=generator, dtype=torch.float64) * unit - unit / 2 for _ in range(2))
        return torch.where(x == 0, x, x * (1 + d) + e * kind.smallest_normal)

    def exact(v: Value, x: torch.Tensor) -> torch.Tensor:
        """Where half the significand is enough: then products, and sums of no more than a few terms, are not rounded."""
        if not (v.dtype.is_float or v.dtype.is_complex):
            return torch.ones_like(x, dtype=torch.bool)
        bits = round(1 - math.log2(torch.finfo(x.dtype if wide else v.dtype.torch).eps)) // 2
        parts = torch.view_as_real(x.resolve_conj()) if x.is_complex() else x.unsqueeze(-1)
        mantissa = torch.frexp(parts).mantissa * 2.0**bits
        return (mantissa == mantissa.round()).all(-1)

    def each(node: Node, operands: Sequence[torch.Tensor], ctx: EvalContext) -> list[torch.Tensor]:
        results = evaluate_node(node, operands, ctx)
        if not (_rounds(node) and varying[node.results[0]]):
            return results
        masks = [exact(v, x) for v, x in zip((*node.operands, *node.results), (*operands, *results), strict=True)]
        pointwise = node.op.has(Trait.POINTWISE)
        kept = masks[0] if pointwise else masks[0].all()
        for mask in masks[1:]:
            kept = kept & (mask if pointwise else mask.all())
        if bool(kept.all()):
            return results
        if not pointwise or node.name in ("add", "sub"):
            known = {v: rounded(v, x) for v, x in zip(node.operands, operands, strict=True)}  # x - x stays zero
            moved = evaluate_node(node, [known[v] for v in node.operands], ctx)
        else:
            moved = results
        return [torch.where(kept, x, rounded(v, y)) for v, x, y in zip(node.results, results, moved, strict=True)]

    return [evaluate(graph, inputs, bindings=bindings, wide=True, each=each) for _ in range(count)]


def _rounds(node: Node) -> bool:
    """Whether a node computes with floats, and does not only choose or move them. Library calls keep their own order."""
    if node.op.has(Trait.VIEW, Trait.OPAQUE, Trait.BOOLEAN) or node.name in _SELECTIONS:
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


def pardon(results: Sequence[torch.Tensor], reference: Sequence[torch.Tensor], draws: Sequence[Sequence[torch.Tensor]], *, factor: float,
           scale: float, steps: bool) -> list[tuple[torch.Tensor, int]]:  # fmt: skip
    """Each output without the errors that its draws explain (:func:`nearer`), and how many elements had some.

    Outputs of another shape stay as they are.
    """
    out = []
    for x, ref, drawn in zip(results, reference, zip(*draws, strict=True), strict=True):
        if x.shape != ref.shape:
            out.append((x, 0))
            continue
        y = nearer(x, ref, drawn, factor, scale=scale, steps=steps)
        a, b = x.to(torch.complex128), y.to(torch.complex128)  # holds any dtype's
        out.append((y, int(((a != b) & ~(a.isnan() & b.isnan())).sum())))
    return out


def nearer(x: torch.Tensor, reference: torch.Tensor, drawn: Sequence[torch.Tensor], factor: float, *, scale: float = 1.0,
           steps: bool = False) -> torch.Tensor:  # fmt: skip
    """x, moved toward the reference by as much as the draws lie away from it, element by element: what is left is an error.

    Args:
        x: the results to judge.
        reference: the same in f64 (c128, or an exact dtype).
        drawn: the same with other roundings (:func:`draw_results`).
        factor: on the distance of the draws, as far as it is no jump.
        scale: the magnitude of the inputs. x may be infinite or NaN where a draw is, or is larger than that by 1 / sqrt(eps) of x's
            dtype and as far from the reference as zero is: beside a pole.
        steps: whether the graph has some: the widest gap between draws is then a jump, beyond which nothing is explained.

    Returns:
        A tensor of x's dtype. Of an exact dtype, it is the reference where x is one of the draws.
    """
    if x.is_complex():
        parts = [torch.view_as_real(t.to(torch.complex128).resolve_conj()) for t in (x, reference, *drawn)]
        return torch.view_as_complex(nearer(parts[0], parts[1], parts[2:], factor, scale=scale, steps=steps)).to(x.dtype)
    if not reference.is_floating_point():
        return torch.where(torch.stack([d == x for d in drawn]).any(0), reference.to(x.dtype), x)
    new, ref = x.to(torch.float64), reference.to(torch.float64)
    known = torch.stack([ref, *(d.to(torch.float64) for d in drawn)])
    finite = known.isfinite()
    middle = torch.where(ref.isfinite(), ref, torch.where(finite, known, math.inf).amin(0))  # infinite: no draw is finite
    near = torch.where(finite, known, middle)
    reach = torch.where(middle.isfinite(), (near - middle).abs().amax(0), 0.0)
    jump = near.sort(0).values.diff(dim=0).amax(0) if steps else torch.zeros_like(reach)
    smooth = factor * (reach - jump).clamp(min=0.0).nan_to_num()
    low, high = torch.minimum(near.amin(0), middle - smooth), torch.maximum(near.amax(0), middle + smooth)
    low, high = torch.where((known == -math.inf).any(0), -math.inf, low), torch.where((known == math.inf).any(0), math.inf, high)
    huge = (near.abs() > scale / math.sqrt(torch.finfo(x.dtype).eps)).any(0) & (factor * reach > ref.abs())
    same = ((known == ref) | (known.isnan() & ref.isnan())).all(0)
    odd = ~new.isfinite() & ~finite.all(0) & ~same
    inside = (low <= new) & (new <= high) & finite.any(0)
    off = torch.where(new > high, new - high, new - low)
    moved = torch.where(new.isfinite() & ref.isfinite(), ref + off, new)
    return torch.where(inside | odd | (~new.isfinite() & huge), ref, moved).to(x.dtype)
