"""(x - mean x) / sqrt(var x + eps) * w + b  =>  layer_norm(x, w, b)

Why: one kernel that reads x once, instead of two or three reductions and six passes over memory.
When: mean and variance are over the same trailing axes; the variance is the biased one (var with correction 0, the mean of
the squared differences, or mean x^2 - (mean x)^2); eps is added to the variance, not to its root. Scale and shift are taken
in where they are vectors over the normalized axes. Casts around the norm stay where they are: a model that computes it in
f32 between f16 tensors keeps doing so.
Numerics: the same sums, perhaps in another order; mean x^2 - (mean x)^2, which cancels, becomes the more exact form.
Reference: Ba, Kiros, Hinton, Layer Normalization, arXiv:1607.06450.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from graphopt.ir import Value, dims
from graphopt.pass_manager import RewritePass
from graphopt.passes.recompose.spelling import (
    Product,
    as_row,
    axes_of,
    check_row,
    inverse_root_of,
    mean_of,
    number,
    plus_constant,
    product,
    reduction,
    root_of,
    square_of,
    trailing,
)  # fmt: skip
from graphopt.passes.shared import NOT_THIS
from graphopt.rewrite import Match, Numerics, Reject, Rewriter, Rule, op_in, pat, value


@dataclass(frozen=True)
class Norm:
    """What a spelling of a normalization was found to be of."""

    x: Value
    axes: int
    eps: float
    scale: Value | None


def split_root(read: Product) -> tuple[Value, list[Value]] | None:
    """(u, other factors) if a product has exactly one factor 1 / sqrt(u), or divisor sqrt(u), and no other divisor."""
    roots = [(f, u) for f in read.factors if (u := inverse_root_of(f)) is not None]
    under = [u for d in read.divisors if (u := root_of(d)) is not None]
    if len(roots) + len(under) != 1 or len(under) != len(read.divisors) or read.coefficient != 1:
        return None
    return (under[0] if under else roots[0][1]), [f for f in read.factors if not roots or f is not roots[0][0]]


def eps_outside(read: Product) -> bool:
    """Whether a divisor is sqrt(u) + eps."""
    return any((plus := plus_constant(d)) is not None and root_of(plus[0]) is not None for d in read.divisors)


def centred(v: Value) -> tuple[Value, tuple[int, ...]] | None:
    """(x, axes) if the value is x - mean(x)."""
    node = v.defined_by("sub")
    mean = mean_of(node.operands[1]) if node is not None else None
    return mean if node is not None and mean is not None and mean[0] is node.operands[0] else None


def variance_axes(v: Value, x: Value) -> tuple[int, ...] | Reject:
    """The axes if the value is the biased variance of x."""
    node = reduction(v, "var")
    if node is not None:
        of = centred(node.operands[0])
        if node.operands[0] is not x and (of is None or of[0] is not x):
            return Reject("the variance is of another tensor", node)
        if node.attrs["correction"] != 0:
            return Reject(f"the variance divides by n - {node.attrs['correction']}, a layer norm's by n", node)
        return axes_of(node)
    mean = mean_of(v)
    if mean is not None and (difference := square_of(mean[0])) is not None:
        of = centred(difference)
        if of is not None and of[0] is x:
            return mean[1] if of[1] == mean[1] else Reject("mean and variance are over different axes", v)
        return Reject("the squares are not of x - mean(x)", v)
    return _by_moments(v, x)


def _by_moments(v: Value, x: Value) -> tuple[int, ...] | Reject:
    """The axes if the value is mean(x^2) - mean(x)^2."""
    node = v.defined_by("sub")
    if node is None or (squares := mean_of(node.operands[0])) is None or (root := square_of(node.operands[1])) is None:
        return Reject("under the root is no variance", v)
    mean = mean_of(root)
    if square_of(squares[0]) is not x or mean is None or mean[0] is not x or mean[1] != squares[1]:
        return Reject("under the root is no variance of x", v)
    return mean[1]


class LayerNorm(Rule):
    """(x - mean x) / sqrt(var x + eps) [* w] => layer_norm(x[, w])"""

    pattern = op_in(("mul", "div"), value("a"), value("b"))
    numerics = Numerics.APPROXIMATE

    @staticmethod
    def find(m: Match) -> Norm | Reject:
        read = product(m.root.results[0])
        differences = [(f, of) for f in read.factors if (of := centred(f)) is not None]
        if len(differences) != 1:
            return NOT_THIS
        difference, (x, axes) = differences[0]
        if eps_outside(read):
            return Reject("eps is added to the standard deviation, not to the variance", m.root)
        split = split_root(read)
        if split is None:
            return NOT_THIS
        under, rest = split
        var, eps = plus_constant(under) or (under, 0.0)
        found = variance_axes(var, x)
        if isinstance(found, Reject):
            return found
        if found != axes:
            return Reject(f"the mean is over the axes {axes}, the variance over {found}", difference)
        return complete(m, x, axes, eps, [f for f in rest if f is not difference])

    def check(self, m: Match) -> Reject | None:
        found = self.find(m)
        return found if isinstance(found, Reject) else None

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        found = self.find(m)
        assert isinstance(found, Norm)
        scale = [as_row(rw, found.scale, found.axes)] if found.scale is not None else []
        return rw.layer_norm(found.x, *scale, axes=found.axes, eps=found.eps)  # type: ignore[no-any-return]


def complete(m: Match, x: Value, axes: tuple[int, ...], eps: float, rest: list[Value]) -> Norm | Reject:
    """A norm, with what is left of the product as its scale."""
    n = trailing(axes, x.type.rank)
    if not x.dtype.is_float:
        return NOT_THIS
    if n is None:
        return Reject(f"the axes {axes} are not the last ones", m.root)
    if not dims.same_shape(m.root.results[0].shape, x.shape, m.root.graph.symbols):
        return Reject("the product has another shape than x", m.root)
    if len(rest) > 1:
        return Reject("there are further factors", rest[1])
    declined = check_row(rest[0], x, n) if rest else None
    return declined or Norm(x, n, eps, rest[0] if rest else None)


class LayerNormScale(Rule):
    """layer_norm(x) * w => layer_norm(x, w)"""

    pattern = pat.mul(pat.layer_norm(value("x")).once().named("norm"), value("w"))
    numerics = Numerics.REASSOCIATES

    def check(self, m: Match) -> Reject | None:
        return NOT_THIS if number(m["w"]) is not None else check_row(m["w"], m["norm"], m["norm"].producer.attrs["axes"])

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        attrs = m["norm"].producer.attrs
        return rw.layer_norm(m["x"], as_row(rw, m["w"], attrs["axes"]), **attrs)  # type: ignore[no-any-return]


class LayerNormShift(Rule):
    """layer_norm(x, w) + b => layer_norm(x, w, b)"""

    pattern = pat.add(pat.layer_norm(value("x"), value("w")).once().named("norm"), value("b"))
    numerics = Numerics.REASSOCIATES

    def check(self, m: Match) -> Reject | None:
        return NOT_THIS if number(m["b"]) is not None else check_row(m["b"], m["norm"], m["norm"].producer.attrs["axes"])

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        attrs = m["norm"].producer.attrs
        return rw.layer_norm(m["x"], m["w"], as_row(rw, m["b"], attrs["axes"]), **attrs)  # type: ignore[no-any-return]


class RecomposeLayerNorm(RewritePass):
    """Find layer norms in their primitive spellings."""

    name = "recompose-layer-norm"

    def rules(self) -> Sequence[Rule]:
        return [LayerNorm(), LayerNormScale(), LayerNormShift()]
