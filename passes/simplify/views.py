"""transpose(transpose(x, p), q)  =>  transpose(x, p[q]), and likewise for every op that only moves elements

Why: a full read and write of x less for each; what is left is often no movement at all.
When: the sizes are proven to fit; a size that is not known leaves the node as it is. Views sink below pointwise ops of one
tensor, towards other views, with which they cancel; only if nothing else uses the view.
Numerics: bitwise.
Reference: MLIR, "Operation Canonicalization" and the tensor dialect's folding of chained shape ops.
"""

from __future__ import annotations

from collections.abc import Sequence

from graphopt.ir import Node, Value, dims
from graphopt.pass_manager import RewritePass
from graphopt.passes.shared import NOT_THIS, POINTWISE, same_shape
from graphopt.passes.simplify.pieces import ConcatOfConcat, ConcatOne, JoinSlices, SliceAll, SliceOfConcat, SliceOfSlice, TakeRange
from graphopt.rewrite import Match, Numerics, Reject, Rewriter, Rule, attr, op_in, pat, value

x, p, q = value("x"), attr("p"), attr("q")


class IdentityView(Rule):
    """reshape(x, shape of x) => x; likewise transpose, broadcast_to, flip and pad that move nothing"""

    pattern = op_in(("reshape", "transpose", "broadcast_to", "flip", "pad"), x)
    numerics = Numerics.BITWISE

    def check(self, m: Match) -> Reject | None:
        attrs, shape = m.root.attrs, m[x].shape
        match m.root.name:
            case "transpose":
                idle = tuple(attrs["perm"]) == tuple(range(len(shape)))
            case "flip":
                idle = not shape or all(shape[a] == 1 for a in attrs["axes"])
            case "pad":
                idle = all(n == 0 for n in (*attrs["low"], *attrs["high"]))
            case _:
                idle = same_shape(m[x], m.root.results[0], m)
        return None if idle else NOT_THIS

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        return m[x]  # type: ignore[no-any-return]


class MergeReshapes(Rule):
    """reshape(reshape(x)) => reshape(x)"""

    pattern = pat.reshape(pat.reshape(x))
    numerics = Numerics.BITWISE

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        return rw.create("reshape", [m[x]], {"shape": m.root.attrs["shape"]})  # type: ignore[no-any-return]


class MergeTransposes(Rule):
    """transpose(transpose(x, p), q) => transpose(x, p[q])"""

    pattern = pat.transpose(pat.transpose(x, perm=p), perm=q)
    numerics = Numerics.BITWISE

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        return rw.transpose(m[x], perm=tuple(m[p][i] for i in m[q]))


class MergeBroadcasts(Rule):
    """broadcast_to(broadcast_to(x)) => broadcast_to(x)"""

    pattern = pat.broadcast_to(pat.broadcast_to(x))
    numerics = Numerics.BITWISE

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        return rw.broadcast_to(m[x], shape=m.root.attrs["shape"])


class BroadcastByReshape(Rule):
    """broadcast_to(x) => reshape(x), where it only prepends axes of size 1"""

    pattern = pat.broadcast_to(x)
    numerics = Numerics.BITWISE

    def check(self, m: Match) -> Reject | None:
        shape = m.root.attrs["shape"]
        extra = len(shape) - m[x].type.rank
        fits = extra > 0 and dims.same_shape(shape, (*[1] * extra, *m[x].shape), m.root.graph.symbols)
        return None if fits else NOT_THIS

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        return rw.reshape(m[x], shape=m.root.attrs["shape"])


class TransposeOfOnes(Rule):
    """transpose(x, p) => reshape(x), where only axes of size 1 change places"""

    pattern = pat.transpose(x, perm=p)
    numerics = Numerics.BITWISE

    def check(self, m: Match) -> Reject | None:
        moved = [a for a in m[p] if m[x].shape[a] != 1]
        return None if moved == sorted(moved) and m[p] != tuple(range(len(m[p]))) else NOT_THIS

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        return rw.reshape(m[x], shape=m.root.results[0].shape)


class FlipTwice(Rule):
    """flip(flip(x, a), a) => x"""

    pattern = pat.flip(pat.flip(x, axes=p), axes=q)
    numerics = Numerics.BITWISE

    def check(self, m: Match) -> Reject | None:
        rank = max(m[x].type.rank, 1)
        same = sorted(a % rank for a in m[p]) == sorted(a % rank for a in m[q])
        return None if same else Reject(f"the axes {m[p]} and {m[q]} differ", m.root)

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        return m[x]  # type: ignore[no-any-return]


# --- views and reductions ----------------------------------------------------------------------------------------------

KEEPING = ("sum", "prod", "max", "min", "any", "all", "mean", "var", "argmax", "argmin")


class KeepReducedAxes(Rule):
    """reshape(sum(x, axes), with 1 at the axes) => sum(x, axes, keepdims); and the other way round"""

    pattern = pat.reshape(op_in(KEEPING, x).once())
    numerics = Numerics.BITWISE

    @staticmethod
    def shape(node: Node, keepdims: bool) -> dims.Shape:
        full = node.operands[0].shape
        gone = [a % len(full) for a in node.attrs.get("axes", (node.attrs.get("axis", 0),))] if full else []
        return tuple(1 if i in gone else n for i, n in enumerate(full) if keepdims or i not in gone)

    def check(self, m: Match) -> Reject | None:
        inner = m.nodes[1]
        wanted = self.shape(inner, not inner.attrs["keepdims"])
        return None if dims.same_shape(wanted, m.root.attrs["shape"], m.root.graph.symbols) else NOT_THIS

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        inner = m.nodes[1]
        return rw.create(inner.name, [m[x]], {**inner.attrs, "keepdims": not inner.attrs["keepdims"]})  # type: ignore[no-any-return]


class ReduceOnes(Rule):
    """sum(x, axes of size 1) => reshape(x); likewise prod, max, min, mean"""

    pattern = op_in(("sum", "prod", "max", "min", "mean"), x)
    numerics = Numerics.BITWISE

    def check(self, m: Match) -> Reject | None:
        return None if not m[x].shape or all(m[x].shape[a] == 1 for a in m.root.attrs["axes"]) else NOT_THIS

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        return rw.reshape(m[x], shape=m.root.results[0].shape)


# --- views and pointwise ops -------------------------------------------------------------------------------------------


class SinkView(Rule):
    """f(view(x)) => view(f(x)), for a pointwise f of one tensor (and scalars), and a reshape or transpose"""

    pattern = op_in(POINTWISE)
    numerics = Numerics.BITWISE

    def check(self, m: Match) -> Reject | None:
        view = _only_view(m.root)
        if view is None:
            return NOT_THIS
        if not all(user is m.root for user in view.results[0].users):
            return NOT_THIS
        if not same_shape(view.results[0], m.root.results[0], m):
            return NOT_THIS
        return None

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        view = _only_view(m.root)
        assert view is not None
        inner = view.operands[0]
        operands = [inner if v is view.results[0] else v for v in m.root.operands]
        return rw.create(view.name, [rw.create(m.root.name, operands, dict(m.root.attrs))], dict(view.attrs))  # type: ignore[no-any-return]


class CancelViews(Rule):
    """view'(f(view(x), view(y))) => f(x, y), where view' undoes view"""

    pattern = op_in(("reshape", "transpose"), op_in(POINTWISE).once().named("f"))
    numerics = Numerics.BITWISE
    near = 3  # a view of any pointwise result is no near miss

    def check(self, m: Match) -> Reject | None:
        f = m["f"].producer
        if m.root.name == "reshape" and not same_shape(m["f"], _first_tensor(f), m):
            return NOT_THIS
        operands = [_undone(m.root, v, m) for v in f.operands]
        return NOT_THIS if any(v is None for v in operands) or all(v.type.rank == 0 for v in f.operands) else None

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        f = m["f"].producer
        return rw.create(f.name, [_undone(m.root, v, m) for v in f.operands], dict(f.attrs))  # type: ignore[no-any-return]


def _only_view(node: Node) -> Node | None:
    """The reshape or transpose that makes the only operand that is not a scalar."""
    tensors = list(dict.fromkeys(v for v in node.operands if v.type.rank > 0))
    if len(tensors) != 1:
        return None
    view = tensors[0].defined_by("reshape", "transpose")
    return view if view is not None and view.operands[0].type.rank > 0 else None


def _first_tensor(node: Node) -> Value:
    return next((v for v in node.operands if v.type.rank > 0), node.operands[0])


def _undone(view: Node, v: Value, m: Match) -> Value | None:
    """The operand that a view, moved above the pointwise op, leaves: a scalar, or what an inverse view was made of."""
    if v.type.rank == 0:
        return v
    inverse = v.defined_by(view.name)
    if inverse is None:
        return None
    before = inverse.operands[0]
    if view.name == "transpose":
        p, q = inverse.attrs["perm"], view.attrs["perm"]
        return before if tuple(p[i] for i in q) == tuple(range(len(q))) else None
    return before if same_shape(before, view.results[0], m) and same_shape(v, view.operands[0], m) else None


class Views(RewritePass):
    """Merge, cancel and sink what only moves elements."""

    name = "views"

    def rules(self) -> Sequence[Rule]:
        return [
            IdentityView(), MergeReshapes(), MergeTransposes(), MergeBroadcasts(), BroadcastByReshape(), TransposeOfOnes(),
            FlipTwice(), KeepReducedAxes(), ReduceOnes(), SliceAll(), SliceOfSlice(), SliceOfConcat(), ConcatOne(),
            ConcatOfConcat(), JoinSlices(), TakeRange(), CancelViews(), SinkView(),
        ]  # fmt: skip
