"""matmul(x[M, K], w[K, N])  =>  matmul(pad(x)[M, K'], pad(w)[K', N]),  matmul(x, slice(pad(w)[K, N'], N));  K', N' fill words

Why: the tiles of a product are read by words of 16 bytes if each row of a factor begins at one, and none is cut off within one. Rows of
an odd number of halves are read number by number, through registers, and no copy runs ahead of the matrix instructions. Zeros behind the
depth of both factors add nothing. A weight is padded once, when it is staged; the original is kept, too, unless the model owns it.

When: the target is a GPU; factors of f16, bf16, 8-bit integers, or of f32 where that is multiplied as tf32; the right one a staged
(weight-only) matrix, plain or transposed. The number of rows M may be any. Rows of ``x``, and of a weight that is read transposed, lie
along the depth: K is padded. Those of another weight lie along the columns: it is read through a slice, and neither the result nor what
follows knows of it. All products of one ``x`` share its padding, which is free where what computes ``x`` can grow: the columns of a
frozen weight before it, and the frozen operands of the pointwise ops between, if those make zero of zeros. Else a kernel copies it, or the
one of pointwise ops that computes it writes it so; a copy is what is charged.

What is saved is estimated by :mod:`~graphopt.passes.layout.wide_loads`. Declined, with a remark: what saves less than it costs, or less
than a share of the product's time, and a right factor that is no weight. After all that changes a weight's type, before ``fuse``.

Numerics: products of zeros are added, and sums may be in another order. Where a weight before it grew, a row of ``x`` that comes of an
infinite number or a nan may have a nan more.
Reference: NVIDIA, "Matrix Multiplication Background User's Guide", requirements of Tensor Cores; ``pad_mm`` of Inductor.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from graphopt.errors import counted
from graphopt.ir import Trait, dims, types
from graphopt.ir.graph import Graph, Node, Value
from graphopt.ir.interpreter import evaluate_node
from graphopt.ir.ops import EvalContext
from graphopt.ir.stage import Staged, staged_values
from graphopt.pass_manager import Pass
from graphopt.passes.fusion.cost import Price
from graphopt.passes.layout.wide_loads import WORD, Cycles, WideLoads
from graphopt.rewrite import Numerics, PassContext, Reject, Rewriter, erase_dead, scalar_of

NARROW = (types.f16, types.bf16, types.i8)


@dataclass(frozen=True)
class _Site:
    """A product with a staged weight: elements of a row of the weight in memory, and whether rows lie along the depth."""

    node: Node
    row: int
    deep: bool

    @property
    def columns(self) -> int:
        return int(self.node.result.shape[-1])


class PadProducts(Pass):
    """Pad the factors of products, so that rows are read by whole words. See the module's header.

    Args:
        least: share of a product's time that is to be saved.
        always: also where it saves nothing, and exact products of f32.
    """

    name = "pad-products"
    numerics = Numerics.REASSOCIATES
    least: float = 0.05
    always: bool = False

    def parts(self) -> Sequence[type]:
        return [type(self), WideLoads]

    def run(self, g: Graph, ctx: PassContext) -> bool:
        if ctx.target is None or not ctx.target.matrix_unit:
            return False
        loads, done, changed = WideLoads(ctx.target, g.symbols), dict[Value, None](), False
        staged = staged_values(g)
        dtypes = (*NARROW, types.f32) if self.always or ctx.target.has("tf32") else NARROW
        for node in g.nodes():
            if node.op.name != "matmul" or (x := node.operands[0]) in done or staged.node(node) or x.dtype not in dtypes:
                continue
            done[x] = None
            found = [_site(n, staged) for n in x.users if n.op.name == "matmul" and n.operands[0] is x]
            for reject in (r for r in found if isinstance(r, Reject) and r.reason):
                ctx.missed(self.name, f"the factors of a product are not padded: {reject.reason}", node)
            sites = [s for s in found if isinstance(s, _Site)]
            if sites and self._pad_depth(g, ctx, x, sites, staged, loads):
                staged, changed = staged_values(g), True
        for node in g.nodes():
            if node.op.name == "matmul" and not staged.node(node) and node.operands[0].dtype in dtypes:
                site = _site(node, staged)
                changed |= isinstance(site, _Site) and self._pad_columns(g, ctx, site, loads)
        return changed

    def _pad_depth(self, g: Graph, ctx: PassContext, x: Value, sites: Sequence[_Site], staged: Staged, loads: WideLoads) -> bool:
        k, first = int(x.shape[-1]), sites[0].node
        if (wide := _filled(k, x)) == k or not _lies_in_rows(x):
            return False
        before = _sum(loads.product(s.node, s.columns, k, k, s.row) for s in sites)
        after = _sum(loads.product(s.node, s.columns, wide, wide, wide if s.deep else s.row) for s in sites)
        grows = len(x.uses) == len(sites) and _grows(x, staged)
        price = Price((0.0, 0.0) if grows else loads.copy(x), _saved(before, after))
        what = f"{counted(len(sites), 'product')} of depth {k}"
        if (number := self._number(ctx, price, before, f"{what} stays so, not {wide}", first)) is None:
            return False
        how = "what computes the left factor grows" if grows else "the left factor is copied"
        ctx.passed(self.name, f"{what} becomes {wide}, of whole words: {how}; it {price.text}", first, number)
        rw = Rewriter(g, first)
        left = _grown(rw, x, staged, wide - k) if grows else _padded(rw, x, -1, wide - k)
        for s in sites:
            rw = Rewriter(g, s.node)
            g.replace(s.node.result, rw.create("matmul", [left, _padded(rw, s.node.operands[1], 0, wide - k)], dict(s.node.attrs)))
            erase_dead(g, s.node)
        return True

    def _pad_columns(self, g: Graph, ctx: PassContext, site: _Site, loads: WideLoads) -> bool:
        node, (x, w) = site.node, site.node.operands
        if site.deep or (wide := _filled(site.row, w)) == site.row:
            return False
        k = int(x.shape[-1])
        before, after = (loads.product(node, site.columns, k, k if _lies_in_rows(x) else WORD, row) for row in (site.row, wide))
        price = Price((0.0, 0.0), _saved(before, after))
        what = f"a weight's rows of {site.row} columns"
        if (number := self._number(ctx, price, before, f"{what} stay so, not {wide}", node)) is None:
            return False
        ctx.passed(self.name, f"{what} lie {wide} apart, in whole words: it {price.text}", node, number)
        rw = Rewriter(g, node)
        right = rw.slice(_padded(rw, w, 1, wide - site.row), axis=1, stop=site.columns)
        g.replace(node.result, rw.create("matmul", [x, right], dict(node.attrs)))
        erase_dead(g, node)
        return True

    def _number(self, ctx: PassContext, price: Price, before: Cycles, declined: str, node: Node) -> int | None:
        """The rewrite's number if it is to be made; else None, and a remark where it does not pay."""
        worth = price.pays and any(saved > self.least * whole for saved, whole in zip(price.saves, before, strict=True))
        if self.always or worth:
            return ctx.fuel.take()
        ctx.missed(self.name, f"{declined}: padding {price.text}", node)
        return None


def _site(node: Node, staged: Staged) -> _Site | Reject:
    x, w = node.operands
    if not isinstance(x.shape[-1], int):
        return Reject("")
    if w not in staged or w.type.rank != 2:
        odd = [d for d in (x.shape[-1], w.shape[-1]) if isinstance(d, int) and _filled(d, w) != d]
        return Reject(f"rows of {odd[0]} {w.dtype} fill no words of {WORD} bytes, but the right factor is no weight" if odd else "", w)
    if (view := w.defined_by("transpose")) is not None:
        return _Site(node, int(view.operands[0].shape[1]), deep=True)
    part = w.defined_by("slice")
    if part is not None and (part.attrs["axis"] % 2, part.attrs["start"], part.attrs["step"]) == (1, 0, 1):
        w = part.operands[0]  # the first columns of what is read by whole rows
    return _Site(node, int(w.shape[1]), deep=False)


def _filled(n: int, v: Value) -> int:
    """So many elements, and as many more as fill a word."""
    unit = WORD // v.dtype.itemsize
    return -(-n // unit) * unit


def _lies_in_rows(x: Value) -> bool:
    """Whether neighbours along the last axis are neighbours in memory."""
    view = x.defined_by("transpose")
    return (view is None or view.attrs["perm"][-1] == x.type.rank - 1) and (x.type.strides is None or x.type.strides[-1] == 1)


def _grows(v: Value, staged: Staged) -> bool:
    """Whether what computes a value can compute zeros behind its last axis as well, and nothing else has to be padded for it."""
    if v in staged:
        return True
    node = v.producer
    if node is None:
        return False
    if node.op.name == "matmul":
        return node.operands[1] in staged and node.operands[1].type.rank == 2
    if node.op.name != "reshape" and not (node.op.has(Trait.POINTWISE) and _makes_zero_of_zeros(node)):
        return False
    inner = [o for o in node.operands if not _is_number(o)]
    return all(o.shape[-1:] == v.shape[-1:] and (o in staged or o.has_one_use) and _grows(o, staged) for o in inner)


def _grown(rw: Rewriter, v: Value, staged: Staged, by: int) -> Value:
    """The value with zeros behind its last axis, computed so."""
    node = v.producer
    if v in staged or node is None:
        return _padded(rw, v, -1, by)
    here = Rewriter(node.graph, node)
    if node.op.name == "matmul":
        x, w = node.operands
        return here.create("matmul", [x, _padded(here, w, 1, by)], dict(node.attrs))
    operands = [o if _is_number(o) else _grown(here, o, staged, by) for o in node.operands]
    attrs = {"shape": (*v.shape[:-1], dims.add(v.shape[-1], by))} if node.op.name == "reshape" else dict(node.attrs)
    return here.create(node.op.name, operands, attrs)


def _padded(rw: Rewriter, v: Value, axis: int, by: int) -> Value:
    """The value with zeros behind an axis; memory in the same order."""
    axis, view = axis % v.type.rank, v.defined_by("transpose")
    if view is not None:
        return rw.transpose(_padded(rw, view.operands[0], view.attrs["perm"][axis], by), perm=view.attrs["perm"])
    return rw.pad(v, low=(0,) * v.type.rank, high=tuple(by if a == axis else 0 for a in range(v.type.rank)))


def _is_number(v: Value) -> bool:
    """Whether a value is one constant number, the same for every column."""
    return scalar_of(v) is not None and (not v.shape or v.shape[-1] == 1)


def _makes_zero_of_zeros(node: Node) -> bool:
    ctx = EvalContext({}, wide=True)
    zeros = [torch.tensor(scalar_of(v) if _is_number(v) else 0, dtype=ctx.dtype(v.dtype)) for v in node.operands]
    try:
        (result,) = evaluate_node(node, zeros, ctx)
    except (RuntimeError, ZeroDivisionError, KeyError):
        return False
    return bool(result == 0)


def _sum(times: Iterable[Cycles]) -> Cycles:
    low, high = map(sum, zip(*times, strict=True))
    return low, high


def _saved(before: Cycles, after: Cycles) -> Cycles:
    return max(0.0, before[0] - after[0]), max(0.0, before[1] - after[1])
