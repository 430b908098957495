"""matmul(x, dequantize(q, s, z))  =>  the same of q, s and z in panels of nr columns, q with as many integers in a word as it holds

Why: a kernel reads ``nr`` columns of all rows, then the next ones. In panels that is one straight stream of full cache lines, and the
integers of 8 (4 bits) or 16 (2 bits) neighbouring rows stand in one 32-bit word: a vector of words is loaded once, and gives a
vector of floats for each of these rows by a shift and a table in a register. The packing depends on weights alone: it is done once.

When: after ``fuse``, for each product of a region of kind ``matmul`` whose second operand is dequantized from staged (weight-only)
integers, with a scale an element, a column, or a column of a group of rows. Declined with a remark: scales along the summed axis,
batches of matrices, and N of less than one vector register.

The packing stands outside of the region; the region's body unpacks, so that its meaning stays in the IR::

    qp = pack_bits(transpose(reshape(pad(q), [K, P, nr]), (1, 0, 2)), axis=1)         P = ceil(N / nr)
    q  = slice(reshape(transpose(unpack_bits(qp, axis=1), (1, 0, 2)), [K, P * nr]), axis=1, stop=N)

and the same, without bits, for scales and zero points ``[G, N]``, G groups of rows.

Numerics: bitwise.
Reference: Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication", ACM TOMS 34(3), 2008; words of several
integers as in Frantar et al., "MARLIN", arXiv:2408.11743.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from graphopt.ir import Builder, Graph, types
from graphopt.ir.graph import Node, Value, is_view
from graphopt.ir.opset.quantize import LARGEST, SMALL_INTEGERS
from graphopt.ir.stage import Staged, staged_values
from graphopt.ir.types import DType
from graphopt.pass_manager import Pass
from graphopt.passes.shared import input_behind_views, matmuls, reread
from graphopt.rewrite import PassContext, Reject, Rewriter

REGISTERS = 4  # vectors of a panel: 64 columns of 16, a cache line of 8-bit integers


@dataclass(frozen=True)
class _Site:
    """A matmul whose second operand can be packed.

    Attributes:
        dequantize: in the body.
        transposed: whether the matmul reads what it gives with the axes exchanged.
        groups: of rows; 0 if the rows stand under one axis.
        bits: of an integer.
    """

    matmul: Node
    dequantize: Node
    transposed: bool
    groups: int
    bits: int

    @property
    def summed(self) -> int:
        """The axis of the integers along which a scale does not change: the rows, or those of a group."""
        return (2 if self.groups else 1) if self.transposed else (1 if self.groups else 0)


class PackQuantized(Pass):
    """Pack the integers of quantized matmul weights for the kernel. See the module's header.

    Args:
        lanes: f32 elements of a vector register; 0 asks the target.
    """

    name = "pack-quantized"
    lanes: int = 0

    def run(self, g: Graph, ctx: PassContext) -> bool:
        lanes = self.lanes or (int(ctx.target.lanes(types.f32.itemsize)) if ctx.target is not None and ctx.target.kind == "cpu" else 0)
        regions = [n for n in g.nodes() if n.op.name == "fusion" and n.attrs["kind"] == "matmul"]
        if not lanes or not regions:
            return False
        staged, changed, nr = staged_values(g), False, lanes * REGISTERS
        for region in regions:
            for place in range(len(matmuls(region))):
                site = _site(region, place, staged, lanes)
                if isinstance(site, Reject):
                    if site.reason:
                        ctx.missed(self.name, f"the quantized weight is not packed: {site.reason}", region)
                    continue
                number = ctx.fuel.take()
                if number is None:
                    continue
                packed = _pack(Rewriter(g, region), region, site, nr)
                ctx.passed(self.name, f"integers of {site.bits} bits packed by {nr} columns: {packed[0].type}", region, number)
                weight, integers = site.matmul.operands[1], site.dequantize.operands[0].dtype
                k, n = (int(d) for d in weight.shape)
                make = partial(unpacked, dtype=integers, bits=site.bits, k=k, n=n)
                region = reread(g, region, weight, packed, make, by=site.matmul)
                changed = True
        return changed


# --- finding -------------------------------------------------------------------------------------------------------------


def _site(fusion: Node, place: int, staged: Staged, lanes: int) -> _Site | Reject:
    matmul = matmuls(fusion)[place]
    w = v = matmul.operands[1]
    view = v.defined_by("transpose")
    transposed = view is not None and view.attrs["perm"] == (1, 0)
    if view is not None and transposed:
        v = view.operands[0]
    cut = v.defined_by("slice")
    if cut is not None and (cut.attrs["axis"], cut.attrs["start"], cut.attrs["step"]) == (1 if transposed else 0, 0, 1):
        v = cut.operands[0]
    merged = v.defined_by("reshape")
    node = (merged.operands[0] if merged is not None else v).defined_by("dequantize")
    if node is None:
        return Reject("")
    roots = [input_behind_views(x) for x in node.operands]
    if any(r is None or fusion.operands[r.index] not in staged for r in roots) or any(map(_is_unpacked, node.operands)):
        return Reject("")
    q, result = node.operands[0], node.result
    if not all(x.type.is_static for x in (w, *node.operands)) or w.type.rank != 2 or q.type.rank != (2 if merged is None else 3):
        return Reject(f"{q.type} is no matrix of known size", w)
    if q.dtype not in (*SMALL_INTEGERS, *LARGEST) or result.dtype != types.f32 or q.shape != result.shape:
        return Reject(f"integers {q.type} with results {result.type}", q)
    if int(w.shape[1]) < lanes:
        return Reject(f"{w.shape[1]} columns do not fill a vector register of {lanes}", w)
    groups = int(q.shape[1 if transposed else 0]) if merged is not None else 0
    columns, rows = (q.shape[0], q.shape[-1]) if transposed else (q.shape[-1], q.shape[1])
    if merged is not None and merged.result.shape != ((columns, groups * rows) if transposed else (groups * rows, columns)):
        return Reject("its groups are not of rows", q)
    assert roots[0] is not None
    site = _Site(matmul, node, transposed, groups, _bits(fusion.operands[roots[0].index]))
    for x in node.operands[1:]:
        axis = site.summed - (q.type.rank - x.type.rank)
        if axis >= 0 and x.shape[axis] != 1:
            return Reject("its scales differ from row to row", x)
    return site


def _is_unpacked(v: Value) -> bool:
    """Whether a value is read from panels already."""
    while v.producer is not None and v.producer.op.name in ("reshape", "slice"):
        v = v.producer.operands[0]
    panels = v.defined_by("transpose")
    return panels is not None and panels.attrs["perm"] == (1, 0, 2)


def _bits(v: Value) -> int:
    """How many bits hold the integers of a staged value, as far as the nodes that make it tell."""
    while v.producer is not None and (is_view(v.producer) or v.producer.op.name == "pad"):
        v = v.producer.operands[0]
    node = v.producer
    bits = int(node.attrs["bits"]) if node is not None and node.op.name in ("quantize", "unpack_bits") else 8
    return bits if bits in (2, 4) else 8


# --- packing -------------------------------------------------------------------------------------------------------------


def _pack(rw: Rewriter, region: Node, site: _Site, nr: int) -> list[Value]:
    """The packed integers ``[P, K, nr]`` (of fewer bits, ``[P, K * bits / 32, nr]``) and, ``[P, G, nr]``, scales and zero points."""
    q, *others = (_outside(rw, region, v) for v in site.dequantize.operands)
    once = tuple(1 if k == site.summed else d for k, d in enumerate(q.shape))
    count = types.i32.bits // site.bits if site.bits < 8 else 1
    panels = _panels(rw, _matrix(rw, q, site), nr, count)
    if count > 1:
        panels = rw.create("pack_bits", [panels], {"bits": site.bits, "axis": 1, "dtype": types.i32})
    return [panels, *(_panels(rw, _matrix(rw, rw.broadcast_to(x, once), site), nr, 1) for x in others)]


def _outside(rw: Rewriter, region: Node, v: Value) -> Value:
    """A view of an input of the region's body, outside of the region."""
    assert region.body is not None
    views: list[Node] = []
    while v.producer is not None:
        views.append(v.producer)
        v = v.producer.operands[0]
    out = region.operands[v.index]
    for node in reversed(views):
        out = rw.create(node.op.name, [out], dict(node.attrs))
    return out


def _matrix(rw: Rewriter, v: Value, site: _Site) -> Value:
    """Rows, or groups of them, by columns: groups and their rows under one axis, columns last."""
    if site.groups:
        v = rw.reshape(v, shape=(v.shape[0], v.shape[1] * v.shape[2]) if site.transposed else (v.shape[0] * v.shape[1], v.shape[2]))
    return rw.transpose(v, perm=(1, 0)) if site.transposed else v


def _panels(rw: Rewriter, v: Value, nr: int, multiple: int) -> Value:
    """``[rows, N]`` to ``[P, rows, nr]``, zeros behind the last row, up to a multiple, and the last column."""
    rows, n = (int(d) for d in v.shape)
    full, panels = -(-rows // multiple) * multiple, -(-n // nr)
    if (full, panels * nr) != (rows, n):
        v = rw.pad(v, low=(0, 0), high=(full - rows, panels * nr - n), value=0.0)
    return rw.transpose(rw.reshape(v, shape=(full, panels, nr)), perm=(1, 0, 2))


def unpacked(b: Builder, packed: Sequence[Value], dtype: DType, bits: int, k: int, n: int) -> Value:
    """The second factor ``[K, N]`` from its packed integers (of a dtype, i8 or u8), scales and zero points."""
    panels = packed[0] if bits == 8 else b.create("unpack_bits", [packed[0]], {"bits": bits, "axis": 1, "dtype": dtype})
    rows, groups = int(panels.shape[1]), int(packed[1].shape[1])
    q, *others = (_wide(b, v, n) for v in (panels, *packed[1:]))
    if groups > 1:
        rows = rows // groups * groups
        q = b.create("slice", [q], {"axis": 0, "stop": rows}) if rows != int(q.shape[0]) else q
        q = b.reshape(q, shape=(groups, rows // groups, n))
        others = [b.reshape(v, shape=(groups, 1, n)) for v in others]
    w: Value = b.create("dequantize", [q, *others])
    w = b.reshape(w, shape=(rows, n)) if groups > 1 else w
    return b.create("slice", [w], {"axis": 0, "stop": k}) if k != rows else w


def _wide(b: Builder, v: Value, n: int) -> Value:
    panels, rows, nr = (int(d) for d in v.shape)
    wide = b.reshape(b.transpose(v, perm=(1, 0, 2)), shape=(rows, panels * nr))
    return b.create("slice", [wide], {"axis": 1, "stop": n})  # type: ignore[no-any-return]
