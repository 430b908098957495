"""The kernel templates: which regions each takes, its search space, and the emitter behind it. Needs no tvm until ``emit``."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from graphopt.autotune.space import Param, Schedule, SearchSpace, Workload
from graphopt.backends.base import KernelSource
from graphopt.errors import BuildError
from graphopt.ir import dims
from graphopt.ir.dims import Dim
from graphopt.ir.graph import Graph, Value
from graphopt.target import Target

_FEW_ROWS = 8  # rows of the highest tile


def entry_name(w: Workload, s: Schedule) -> str:
    """Entry point of a kernel: a C identifier, unique by workload and schedule."""
    digest = hashlib.sha256(f"{w.kind}\n{w.text}\n{s.to_json()}".encode()).hexdigest()[:16]
    kind = "".join(c if c.isalnum() else "_" for c in w.kind)
    return f"{kind}_{digest}"


def lanes_of(graph: Graph, t: Target) -> int:
    """Elements a vector: by the widest float, or the widest result."""
    values = [*graph.inputs, *(r for n in graph.nodes() for r in n.results)]
    wide = any(v.dtype.is_float and v.dtype.bits == 64 for v in values) or any(v.dtype.bits == 64 for v in graph.outputs)
    return max(1, t.lanes(8 if wide else 4))


@dataclass(frozen=True)
class Template:
    """A kernel family of the backend.

    Attributes:
        name: as in ``Schedule.template``.
        takes: why a region is not for this template, or None if it is. Looks at the IR only.
        params: the knobs for a workload.
        write: (workload, schedule, target) -> the emitted :class:`~graphopt.backends.tvm.code.Code`; imports tvm.
    """

    name: str
    takes: Callable[[Workload, Target], str | None]
    params: Callable[[Workload, Target], tuple[Param, ...]]
    write: Callable[[Workload, Schedule, Target], Any]

    def space(self, w: Workload, t: Target) -> SearchSpace:
        """All schedules; the default needs no tuning."""
        return SearchSpace(self.name, params=self.params(w, t))

    def emit(self, w: Workload, s: Schedule, t: Target) -> KernelSource:
        """The kernel as a TensorIR function; its text is TVMScript."""
        name = entry_name(w, s)
        function = self.write(w, s, t).function(name)
        return KernelSource(name, "tvmscript", function.script(), function)


# --- nest --------------------------------------------------------------------------------------------------------------


def _nest_params(w: Workload, t: Target) -> tuple[Param, ...]:
    lanes = lanes_of(w.graph, t)
    return (
        Param("lanes", tuple(dict.fromkeys((lanes, max(1, lanes // 2))))),
        Param("unroll", (4, 2, 8)),
        Param("chunk", (4096, 1024, 16384)),
        Param("parallel", (True, False)),
    )


def _write_nest(w: Workload, s: Schedule, t: Target) -> Any:
    from graphopt.backends.tvm.loops import Tuning
    from graphopt.backends.tvm.nest import emit_nest
    from graphopt.backends.tvm.prepare import expand_rows

    return emit_nest(expand_rows(w.graph), Tuning(s["lanes"], s["unroll"], s["chunk"], s["parallel"]), in_place=w.kind == "update")


# --- rows --------------------------------------------------------------------------------------------------------------


def _rows_refuse(w: Workload, t: Target) -> str | None:
    from graphopt.backends.tvm.prepare import expand_rows
    from graphopt.backends.tvm.shapes import row_shape

    if w.kind not in ("rowwise", "reduction"):
        return "not a region over rows"
    shape = row_shape(expand_rows(w.graph))
    if isinstance(shape, str):
        return shape
    if w.kind == "reduction" and isinstance(shape[0], int) and shape[0] < 64:
        return "few rows"
    return None


def _rows_params(w: Workload, t: Target) -> tuple[Param, ...]:
    from graphopt.backends.tvm.prepare import expand_rows
    from graphopt.backends.tvm.shapes import row_shape

    shape = row_shape(expand_rows(w.graph))
    columns = shape[1] if not isinstance(shape, str) and isinstance(shape[1], int) else 1024
    step = max(1, min(16, 2048 // max(1, columns)))
    lanes = lanes_of(w.graph, t)
    return (
        Param("lanes", (lanes,)),
        Param("unroll", (4, 2, 8)),
        Param("rows", tuple(dict.fromkeys((step, 1, 4, 16)))),
        Param("parallel", (True, False)),
    )


def _write_rows(w: Workload, s: Schedule, t: Target) -> Any:
    from graphopt.backends.tvm.loops import Tuning
    from graphopt.backends.tvm.nest import emit_nest
    from graphopt.backends.tvm.prepare import expand_rows
    from graphopt.backends.tvm.rows import RowKernel

    graph, tuning = expand_rows(w.graph), Tuning(s["lanes"], s["unroll"], parallel=s["parallel"])
    try:
        return RowKernel(graph, tuning, s["rows"]).emit()
    except BuildError:  # a use across rows that shapes alone do not show
        return emit_nest(graph, tuning)


# --- matmul ------------------------------------------------------------------------------------------------------------


def _tile_refuse(w: Workload, t: Target) -> str | None:
    from graphopt.backends.tvm.prepare import expand_rows
    from graphopt.backends.tvm.shapes import product_of

    return product_of(expand_rows(w.graph)) if w.kind == "matmul" else "not a matmul region"


def _tile_params(w: Workload, t: Target) -> tuple[Param, ...]:
    from graphopt.backends.tvm.prepare import flatten_rows

    products = [n for n in flatten_rows(w.graph).nodes() if n.name == "matmul"]
    node, packed = products[0], any(_is_packed(n.operands[1]) for n in products)
    lanes = max(1, t.lanes(8 if node.result.dtype.bits == 64 else 4))
    rows, columns = (_fixed(d, w.graph) for d in node.result.shape[-2:])
    mr, most = t.tile
    vectors = most
    if isinstance(rows, int) and rows < mr:
        mr, vectors = rows, (4 if rows == 1 else 3 if rows < 4 else most)
    elif isinstance(rows, int):
        mr = -(-rows // -(-rows // mr))  # the same number of tiles, filled evenly
    if (
        isinstance(columns, int)
        and columns % (3 * lanes)
        and columns % (2 * lanes) == 0
        and vectors == 3
        and not packed
    ):
        vectors = 2
    nr = lanes * vectors
    while isinstance(columns, int) and nr > lanes and columns <= nr - lanes:
        nr -= lanes
    if isinstance(columns, int) and columns < lanes:
        nr = columns
    if packed:
        nr = most * lanes
    several = not isinstance(rows, int) or rows > mr  # what is read once is a stream, which the hardware fetches better itself
    return (
        Param("lanes", (lanes,)),
        Param("mr", tuple(dict.fromkeys((mr, *(r for r in (4, 6, 8) if not isinstance(rows, int) or r <= rows))))),
        Param("nr", tuple(dict.fromkeys((nr, lanes, 2 * lanes, 3 * lanes)))),
        Param("unroll", tuple(dict.fromkeys((_unroll(t), 4, 1, 2, 8)))),
        Param("group", tuple(dict.fromkeys((_row_group(node.result, w.graph, mr, nr, t), 1, 4, 16, 64)))),
        Param("prefetch", (several, not several)),
        Param("parallel", (True, False)),
    )


def _unroll(t: Target) -> int:
    """Steps of the summed axis at a time: on Arm, LLVM gathers the elements of more steps into registers that it has not."""
    return 4 if t.arch != "aarch64" else 1 if t.sve_bits > 128 else 2


def _row_group(result: Value, graph: Graph, mr: int, nr: int, t: Target) -> int:
    """Row tiles that share a copied panel: as many as leave each core a few steps, a power of two."""
    *batch, rows, columns = [_typical(d, graph) for d in result.shape]
    tiles = -(-rows // mr)
    others = math.prod(batch) * -(-columns // nr)
    group = 64
    while group > 4 and (group >= 2 * tiles or others * -(-tiles // group) < 4 * t.cores):
        group //= 2
    return group


def _fixed(d: Dim, graph: Graph) -> Dim:
    """A size that schedules may count on: of a symbolic one that cannot fill a tile of any kernel, its largest value."""
    least, most = dims.bounds(d, graph.symbols)
    return d if most is None or most > _FEW_ROWS or least is None or least < 0 else max(1, most)


def _typical(d: Dim, graph: Graph) -> int:
    """What a size may be like, where any guess is right: a symbolic one is taken for 16, or for the most it can be."""
    if isinstance(d, int):
        return d
    most = dims.bounds(d, graph.symbols)[1]
    return 16 if most is None else max(1, min(16, most))


def _is_packed(v: Value) -> bool:
    """Whether a factor is written as columns packed in panels: slice(reshape(transpose(wp)))."""
    node = v.producer
    return node is not None and node.name == "slice" and node.operands[0].defined_by("reshape") is not None


def _write_tile(w: Workload, s: Schedule, t: Target) -> Any:
    from graphopt.backends.tvm.prepare import expand_rows, flatten_rows
    from graphopt.backends.tvm.tile import TileKernel

    graph = flatten_rows(expand_rows(w.graph))
    return TileKernel(graph, s["lanes"], s["mr"], s["nr"], s["unroll"], s["group"], s["prefetch"], s["parallel"]).emit()


# --- products of bf16 in pairs -----------------------------------------------------------------------------------------


def _pairs_refuse(w: Workload, t: Target) -> str | None:
    from graphopt.backends.tvm.pairform import refusal

    return _tile_refuse(w, t) or refusal(w.graph, t)


def _pairs_params(w: Workload, t: Target) -> tuple[Param, ...]:
    from graphopt.backends.tvm.pairform import params

    return params(w.graph, t)


def _write_pairs(w: Workload, s: Schedule, t: Target) -> Any:
    from graphopt.backends.tvm.pairs import PairKernel
    from graphopt.backends.tvm.prepare import expand_rows

    return PairKernel(expand_rows(w.graph), s["engine"], s["rows"], s["group"], s["parallel"]).emit()


# --- convolution -------------------------------------------------------------------------------------------------------


def _conv_refuse(w: Workload, t: Target) -> str | None:
    from graphopt.backends.tvm.convform import conv_of

    form = conv_of(w.graph) if w.kind == "conv" else "not a convolution region"
    return form if isinstance(form, str) else None


def _depthwise_refuse(w: Workload, t: Target) -> str | None:
    from graphopt.backends.tvm.convform import conv_of

    form = conv_of(w.graph) if w.kind == "conv" else "not a convolution region"
    return form if isinstance(form, str) else None if form.depthwise else "not one channel a group"


def _depthwise_params(w: Workload, t: Target) -> tuple[Param, ...]:
    from graphopt.backends.tvm.convform import ConvForm, conv_of

    form = conv_of(w.graph)
    assert isinstance(form, ConvForm)
    lanes = max(1, t.lanes(max(4, form.node.result.dtype.itemsize)))
    while lanes > form.groups:
        lanes //= 2
    pixels = (8, 4, 6, 12) if t.vector_registers == 32 else (4, 6, 2)
    return (Param("lanes", (lanes,)), Param("pixels", pixels), Param("parallel", (True, False)))


def _write_depthwise(w: Workload, s: Schedule, t: Target) -> Any:
    from graphopt.backends.tvm.convform import ConvForm, conv_of
    from graphopt.backends.tvm.depthwise import DepthwiseKernel

    form = conv_of(w.graph)
    assert isinstance(form, ConvForm)
    return DepthwiseKernel(w.graph, form, s["lanes"], s["pixels"], s["parallel"]).emit()


def _winograd_refuse(w: Workload, t: Target) -> str | None:
    from graphopt.backends.tvm.convform import conv_of

    form = conv_of(w.graph) if w.kind == "conv" else "not a convolution region"
    return form if isinstance(form, str) else None if form.transformed is not None else "its weight is not transformed"


def _winograd_params(w: Workload, t: Target) -> tuple[Param, ...]:
    from graphopt.backends.tvm.convform import ConvForm, conv_of, winograd_shares

    form = conv_of(w.graph)
    assert isinstance(form, ConvForm)
    shares = winograd_shares(form, t)
    return (
        Param("lanes", (max(1, t.lanes(4)),)),
        Param("share", shares),
        Param("unroll", (4, 2, 8)),
        Param("parallel", (True, False)),
    )


def _write_winograd(w: Workload, s: Schedule, t: Target) -> Any:
    from graphopt.backends.tvm.convform import ConvForm, conv_of
    from graphopt.backends.tvm.winograd import WinogradKernel

    form = conv_of(w.graph)
    assert isinstance(form, ConvForm)
    rows, lines, groups = s["share"]
    return WinogradKernel(w.graph, form, s["lanes"], rows, lines, groups, s["unroll"], s["parallel"]).emit()


def _conv_params(w: Workload, t: Target) -> tuple[Param, ...]:
    from graphopt.backends.tvm.convform import ConvForm, conv_of, tile_rows

    form = conv_of(w.graph)
    assert isinstance(form, ConvForm)
    itemsize = max(4, form.node.result.dtype.itemsize)
    lanes = max(1, t.lanes(itemsize))
    columns = int(form.packed.shape[-1]) if form.packed is not None else t.panel_width(form.filters, itemsize)
    rows = tile_rows(form, max(1, columns // lanes), t)
    written, read, weights = (dims.numel(v.shape) for v in (form.node.result, form.x, form.w))
    far = isinstance(written, int) and written * itemsize > t.cache[1]  # what it writes does not stay in the cache
    # a thread that takes the same pixels in every layer finds them in its own cache: worth it where they are more than the weights
    deep = isinstance(written, int) and isinstance(read, int) and written + read < weights
    block = 512 if t.cache[1] >= 1 << 20 else 256  # of a panel: an eighth of the cache that it is read from again and again
    return (
        Param("lanes", (lanes if columns % lanes == 0 else columns,)),
        Param("rows", rows),
        Param("columns", (columns,)),
        Param("unroll", (4, 2, 8)),
        Param("tiles", (12, 4, 6, 24, 48)),
        Param("block", (block, 128, 256 if block == 512 else 512)),
        Param("fetch", (far, not far)),
        Param("split", ("panels", "pixels") if deep else ("pixels", "panels")),
        Param("parallel", (True, False)),
    )


def _write_conv(w: Workload, s: Schedule, t: Target) -> Any:
    from graphopt.backends.tvm.conv import ConvKernel
    from graphopt.backends.tvm.convform import ConvForm, conv_of

    form = conv_of(w.graph)
    assert isinstance(form, ConvForm)
    return ConvKernel(w.graph, form, s["lanes"], s["rows"], s["columns"], s["unroll"], s["tiles"], s["block"], s["fetch"],
                      s["split"], s["parallel"]).emit()  # fmt: skip


DEPTHWISE = Template("depthwise", _depthwise_refuse, _depthwise_params, _write_depthwise)
WINOGRAD = Template("winograd", _winograd_refuse, _winograd_params, _write_winograd)
CONV = Template("conv", _conv_refuse, _conv_params, _write_conv)
PAIRS = Template("pairs", _pairs_refuse, _pairs_params, _write_pairs)
TILE = Template("tile", _tile_refuse, _tile_params, _write_tile)
ROWS = Template("rows", _rows_refuse, _rows_params, _write_rows)
NEST = Template("nest", lambda w, t: "a convolution" if w.kind == "conv" else None, _nest_params, _write_nest)
TEMPLATES: tuple[Template, ...] = (DEPTHWISE, WINOGRAD, CONV, PAIRS, TILE, ROWS, NEST)
