"""matmul(x, w[K, N])  =>  matmul(x, unpack(pack(w))),  pack(w)[j, k, i] = w[k, j * nr + i],  w padded to a multiple of nr

Why: a matmul kernel reads ``nr`` columns of w for one k at a time. Packed, that is one straight stream, without the strides of a
transposed weight, and no tile needs a copy of its own. ``pack`` depends on the weight alone: it is computed once, at the first
call, and again when the weight changes.

When: after ``fuse``, for each product of a region of kind ``matmul`` whose second operand is a staged (weight-only) f32 matrix,
plain or transposed; or bf16, for products summed in f32 or a region of one product, where the target has instructions that multiply it
(:mod:`~graphopt.passes.layout.pairs` is its form then); or i8, for products summed in i32
(:mod:`~graphopt.passes.layout.fours`). An operand that is no weight is left in silence; declined with a remark
are batches of matrices, other dtypes, weights behind other views, and N of less than one vector register. ``nr`` is as many
registers as the target's register tile is wide (``Target.tile``): three of 32, two of 16; one less where the compiled model owns its
weights, and 1% of N more would be padded (512 columns in panels of 48 or of 32, measured on Zen 5 with 128 rows: 481 and 491 GFLOP/s,
with 1000 rows 492 and 469). It is 32 columns, two AMX tiles, where the target sums products of f32 from thirds (``Target.f32_thirds``)
and K is a multiple of 32; for few rows, too, so that programs for many and for few share one packed weight.

The packing stands outside of the region; the region's body unpacks, so that its meaning stays in the IR and the kernel
reads the packed form wherever it knows it::

    wp = transpose(reshape(pad(w), [K, ceil(N / nr), nr]), (1, 0, 2))
    w  = slice(reshape(transpose(wp, (1, 0, 2)), [K, ceil(N / nr) * nr]), axis=1, stop=N)

Numerics: bitwise.
Reference: Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication", ACM TOMS 34(3), 2008.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import ModuleType

from graphopt.errors import UsageError
from graphopt.ir import Builder, Graph, types
from graphopt.ir.dims import Dim
from graphopt.ir.graph import Node, Value
from graphopt.ir.stage import Staged, staged_values
from graphopt.pass_manager import Pass
from graphopt.passes.layout import fours, pairs, weights_in_place
from graphopt.passes.shared import Make, input_behind_views, matmuls, reread
from graphopt.rewrite import PassContext, Reject, Rewriter


@dataclass(frozen=True)
class Site:
    """A matmul whose second operand can be packed."""

    matmul: Node  # in the body
    input: int  # which operand of the fusion holds the weight
    transposed: bool  # the body reads it transposed
    columns: int = 0  # of a panel
    form: ModuleType | None = None  # of neighbours along the summed axis side by side, which instructions want: pairs, or fours


_LESS = 0.01  # of the columns: padding that is worth a narrower panel
COLUMNS, DEPTH = 32, 32  # of thirds: columns of a panel, and what the summed axis is a multiple of


class PackWeights(Pass):
    """Pack the weights of matmul regions. See the module's header.

    Args:
        lanes: f32 elements of a vector register; None asks the target.
    """

    name = "pack-weights"
    lanes: int | None = None

    def run(self, g: Graph, ctx: PassContext) -> bool:
        if self.lanes is not None and self.lanes < 1:
            raise UsageError(f"pack-weights: lanes must be positive, got {self.lanes}")
        lanes = self._lanes(ctx)
        regions = [n for n in g.nodes() if n.op.name == "fusion" and n.attrs["kind"] == "matmul"]
        if lanes is None or not regions:
            return False
        registers, in_pairs = (ctx.target.tile[1], bool(ctx.target.bf16_products)) if ctx.target is not None else (3, False)
        in_thirds = self.lanes is None and ctx.target is not None and ctx.target.f32_thirds
        staged, packed, changed = staged_values(g), dict[tuple[Value, bool, int], Value](), False
        for region in regions:
            count = len(matmuls(region))
            for place in range(count):
                in_tiles = in_thirds and _suits_thirds(region, place)
                width = COLUMNS if in_tiles else _width(matmuls(region)[place].result.shape[-1], registers, lanes, ctx.owns_weights)
                site = _site(region, place, staged, lanes, width, in_pairs, count == 1, ctx)
                if isinstance(site, Reject):
                    if site.reason:
                        ctx.missed(self.name, f"the weight is not packed: {site.reason}", region)
                    continue
                number = ctx.fuel.take()
                if number is None:
                    continue
                w, nr = region.operands[site.input], site.columns
                key = (w, site.transposed, nr)
                if key not in packed:
                    rw = Rewriter(g, region)
                    packed[key] = site.form.pack(rw, w, site.transposed) if site.form else pack(rw, w, site.transposed, nr)
                how = f"in {_name(site.form)}, by {site.form.COLUMNS}" if site.form else f"by {nr}"
                how += " columns, for AMX tiles" if in_thirds and nr == COLUMNS and not site.form else " columns"
                ctx.passed(self.name, f"weight {w!r} packed {how}: {packed[key].type}", region, number)
                region = reread(g, region, site.matmul.operands[1], [packed[key]], _unpacker(site), by=site.matmul)
                changed = True
        return changed

    def _lanes(self, ctx: PassContext) -> int | None:
        if self.lanes is not None:
            return self.lanes
        if ctx.target is None or ctx.target.kind != "cpu":
            ctx.analysis(self.name, "weights stay as they are: the target is no CPU" if ctx.target else "no target is given")
            return None
        return int(ctx.target.lanes(types.f32.itemsize))


def pack(b: Builder, w: Value, transposed: bool, nr: int) -> Value:
    """``[K, N]`` (``[N, K]`` if transposed) to ``[ceil(N / nr), K, nr]``, zeros behind the last column."""
    if transposed:
        w = b.transpose(w, perm=(1, 0))
    k, n = (int(d) for d in w.shape)
    blocks = -(-n // nr)
    if blocks * nr != n:
        w = b.pad(w, low=(0, 0), high=(0, blocks * nr - n), value=0.0)
    return b.transpose(b.reshape(w, shape=(k, blocks, nr)), perm=(1, 0, 2))


def unpack(b: Builder, wp: Value, n: int) -> Value:
    """The inverse of :func:`pack`: ``[blocks, K, nr]`` to ``[K, N]``."""
    blocks, k, nr = (int(d) for d in wp.shape)
    wide = b.reshape(b.transpose(wp, perm=(1, 0, 2)), shape=(k, blocks * nr))
    return b.create("slice", [wide], {"axis": 1, "stop": n})  # type: ignore[no-any-return]


def _width(n: Dim, registers: int, lanes: int, owned: bool) -> int:
    """Columns of a panel for ``n``: those of the register tile, or a register less where memory counts and that pads much less."""
    whole, less = registers * lanes, (registers - 1) * lanes
    if not owned or registers < 3 or not isinstance(n, int):
        return whole
    return less if (-n % whole) - (-n % less) >= _LESS * n else whole


def _suits_thirds(fusion: Node, place: int) -> bool:
    """Whether a region's product has the form for AMX tiles. Not by its rows: programs for other numbers of rows share the weight."""
    node = matmuls(fusion)[place]
    k, n = node.operands[0].shape[-1], node.result.shape[-1]
    return isinstance(k, int) and k % DEPTH == 0 and isinstance(n, int) and n >= COLUMNS


def site_of(fusion: Node, place: int, staged: Staged) -> Site | Reject:
    """A product of a region and its second factor, if that is a staged matrix, plain or transposed, which is not packed yet."""
    matmul = matmuls(fusion)[place]
    weight = matmul.operands[1]
    if weight.defined_by("slice") and _is_unpack(weight):
        return Reject("")
    view = weight.defined_by("transpose")
    transposed = view is not None and view.attrs["perm"] == (1, 0)
    source = view.operands[0] if view is not None and transposed else weight
    origin = input_behind_views(weight)
    if origin is None or fusion.operands[origin.index] not in staged:
        return Reject("")
    if weight.type.rank != 2:
        return Reject(f"it is a batch of matrices, {weight.type}", weight)
    if not source.is_input:
        return Reject("it is read through more views than a transpose", weight)
    return Site(matmul, source.index, transposed)


def _site(fusion: Node, place: int, staged: Staged, lanes: int, columns: int, in_pairs: bool, alone: bool,
          ctx: PassContext) -> Site | Reject:  # fmt: skip
    site = site_of(fusion, place, staged)
    if isinstance(site, Reject):
        return site
    matmul, weight = site.matmul, site.matmul.operands[1]
    if weights_in_place.suits(matmul, ctx):
        return Reject("the few rows of its left operand read it as fast where it lies", weight)
    k, n = (int(d) for d in weight.shape)
    paired = in_pairs and weight.dtype == types.bf16 and (alone or matmul.attrs["acc"] == types.f32)
    if weight.dtype == types.i8 and matmul.attrs["acc"] is not None:
        if min(k, n) < fours.LEAST:
            return Reject(f"{k} rows by {n} columns do not fill a panel of fours", weight)
        return replace(site, columns=fours.COLUMNS, form=fours)
    if weight.dtype != types.f32 and not paired:
        return Reject(f"weights of dtype {weight.dtype} are not packed for this target, only f32", weight)
    if paired and (n < pairs.COLUMNS // 2 or k < pairs.DEPTH):
        return Reject(f"{k} rows by {n} columns do not fill a panel of pairs", weight)
    if n < lanes or k == 0:
        return Reject(f"{n} columns do not fill a vector register of {lanes}", weight)
    return replace(site, columns=columns, form=pairs if paired else None)


def _name(form: ModuleType) -> str:
    return form.__name__.rpartition(".")[2]


def _is_unpack(weight: Value) -> bool:
    node = weight.producer
    while node is not None and node.op.name == "slice":
        node = node.operands[0].producer
    for name in ("reshape", "transpose"):
        if node is None or node.op.name != name:
            return False
        node = node.operands[0].producer
    return node is None


def _unpacker(site: Site) -> Make:
    """How a region's body makes the weight ``[K, N]`` of the packed one."""
    k, n = (int(d) for d in site.matmul.operands[1].shape)
    form = site.form
    return (lambda b, given: form.unpack(b, given[0], k, n)) if form else (lambda b, given: unpack(b, given[0], n))
