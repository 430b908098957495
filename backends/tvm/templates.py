"""The kernel templates: which regions each takes, its search space, and the emitter behind it. Needs no tvm until ``emit``."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from graphopt.autotune.space import Constraint, LoopNest, Param, Schedule, SearchSpace, Workload
from graphopt.backends.base import KernelSource
from graphopt.backends.tvm.rules import RULES
from graphopt.errors import BuildError
from graphopt.ir import dims
from graphopt.ir.graph import Graph
from graphopt.target import Target


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
        spaces_of: (workload, target) -> the spaces of a template with several sketches; that of the default first.
        nest: (workload, target) -> the loops of a schedule, for a cost model.
    """

    name: str
    takes: Callable[[Workload, Target], str | None]
    params: Callable[[Workload, Target], tuple[Param, ...]]
    write: Callable[[Workload, Schedule, Target], Any]
    spaces_of: Callable[[Workload, Target], tuple[SearchSpace, ...]] | None = None
    nest: Callable[[Workload, Target], Callable[[Schedule], LoopNest]] | None = None

    def space(self, w: Workload, t: Target) -> SearchSpace:
        """The space whose default needs no tuning."""
        return self.spaces(w, t)[0]

    def spaces(self, w: Workload, t: Target) -> tuple[SearchSpace, ...]:
        """All schedules, the space of the default first."""
        if self.spaces_of is not None:
            found = self.spaces_of(w, t)
        else:
            found = (SearchSpace(self.name, params=self.params(w, t), nest=self.nest and self.nest(w, t)),)
        return tuple(replace(space, rules={name: RULES.get((self.name, name), ()) for name in space.sketches}) for space in found)

    def emit(self, w: Workload, s: Schedule, t: Target) -> KernelSource:
        """The kernel as a TensorIR function; its text is TVMScript."""
        name = entry_name(w, s)
        function = self.write(w, s, t).function(name)
        return KernelSource(name, "tvmscript", function.script(), function)


# --- nest --------------------------------------------------------------------------------------------------------------


def _nest_params(w: Workload, t: Target) -> tuple[Param, ...]:
    lanes = lanes_of(w.graph, t)
    return (
        Param("lanes", tuple(dict.fromkeys((lanes, max(1, lanes // 2), 2 * lanes, 4 * lanes)))),
        Param("unroll", (4, 1, 2, 8)),
        Param("chunk", (4096, 512, 1024, 2048, 8192, 16384, 32768, 65536), "tasks"),
        Param("parallel", (True, False), "tasks"),
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
        Param("lanes", tuple(dict.fromkeys((lanes, max(1, lanes // 2), 2 * lanes)))),
        Param("unroll", (4, 1, 2, 8)),
        Param("rows", tuple(dict.fromkeys((step, 1, 2, 4, 8, 16, 32, 64))), "tasks"),
        Param("parallel", (True, False), "tasks"),
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
    from graphopt.backends.tvm.tileform import params

    return params(w.graph, t)


def _tile_variants(w: Workload, t: Target) -> tuple[SearchSpace, ...]:
    from graphopt.backends.tvm.tileform import variants

    return variants(w.graph, t)


def _write_tile(w: Workload, s: Schedule, t: Target) -> Any:
    from graphopt.backends.tvm.prepare import expand_rows, flatten_rows
    from graphopt.backends.tvm.tile import TileKernel
    from graphopt.backends.tvm.tileform import BLOCK, BLOCKED

    graph, block = flatten_rows(expand_rows(w.graph)), s["block"] if s.sketch in BLOCKED else BLOCK
    return TileKernel(graph, s["lanes"], s["mr"], s["nr"], s["unroll"], s["group"], s["prefetch"], s["parallel"], block,
                      s.sketch in BLOCKED, s.sketch.endswith("rows-first")).emit()  # fmt: skip


# --- products of few rows with small integers ---------------------------------------------------------------------------


def _quantized_refuse(w: Workload, t: Target) -> str | None:
    from graphopt.backends.tvm.quantform import refusal

    return _tile_refuse(w, t) or refusal(w.graph, t)


def _quantized_params(w: Workload, t: Target) -> tuple[Param, ...]:
    from graphopt.backends.tvm.quantform import params

    return params(w.graph, t)


def _write_quantized(w: Workload, s: Schedule, t: Target) -> Any:
    from graphopt.backends.tvm.prepare import expand_rows, flatten_rows
    from graphopt.backends.tvm.quantized import QuantizedKernel

    graph = flatten_rows(expand_rows(w.graph))
    rows = next(int(n.result.shape[-2]) for n in graph.nodes() if n.name == "matmul")
    return QuantizedKernel(graph, s["lanes"], rows, s["vectors"], s["unroll"], s["table"], s["ahead"], s["parallel"]).emit()


# --- products of 8-bit integers -----------------------------------------------------------------------------------------


def _int8_refuse(w: Workload, t: Target) -> str | None:
    from graphopt.backends.tvm.int8form import refusal
    from graphopt.backends.tvm.prepare import expand_rows

    return refusal(expand_rows(w.graph), t) if w.kind == "matmul" else "not a matmul region"


def _int8_params(w: Workload, t: Target) -> tuple[Param, ...]:
    from graphopt.backends.tvm.int8form import params

    return params(w.graph, t)


def _write_int8(w: Workload, s: Schedule, t: Target) -> Any:
    from graphopt.backends.tvm.int8 import Int8Kernel
    from graphopt.backends.tvm.prepare import expand_rows

    names = ("engine", "lanes", "rows", "group", "panels", "block", "ahead", "parallel")
    return Int8Kernel(expand_rows(w.graph), **{n: s[n] for n in names}).emit()


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


# --- products of f32 from thirds ---------------------------------------------------------------------------------------


def _thirds_refuse(w: Workload, t: Target) -> str | None:
    from graphopt.backends.tvm.thirdform import refusal

    return _tile_refuse(w, t) or refusal(w.graph, t)


def _thirds_params(w: Workload, t: Target) -> tuple[Param, ...]:
    from graphopt.backends.tvm.thirdform import params

    return params(w.graph, t)


def _thirds_space(w: Workload, t: Target) -> tuple[SearchSpace, ...]:
    from graphopt.backends.tvm.thirdform import space

    return (space(w.graph, t),)


def _write_thirds(w: Workload, s: Schedule, t: Target) -> Any:
    from graphopt.backends.tvm.prepare import expand_rows
    from graphopt.backends.tvm.thirds import ThirdsKernel

    graph = expand_rows(w.graph)
    return ThirdsKernel(graph, s["block"], s["rows"], s["group"], s["chunk"], s["panels"], s["ahead"], s["parallel"]).emit()


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
    pixels = (8, 4, 6, 12, 2, 3, 5, 7, 10, 14) if t.vector_registers == 32 else (4, 6, 2, 3, 5)
    return (Param("lanes", (lanes,)), Param("pixels", pixels, "tile"), Param("parallel", (True, False)))


def _depthwise_variants(w: Workload, t: Target) -> tuple[SearchSpace, ...]:
    """Tasks of the size that suits most, and of any."""
    from graphopt.backends.tvm.loopnests import depthwise_loops

    own, loops = _depthwise_params(w, t), depthwise_loops(w.graph, t)
    lanes = own[0].choices[0]
    assert isinstance(lanes, int)
    pieces = (
        Param("lanes", tuple(dict.fromkeys((lanes, max(1, lanes // 2), 2 * lanes))), "tile"), *own[1:],
        Param("lines", (8, 1, 2, 4, 14, 28, 56), "tasks"), Param("tasks", (32, 1, 4, 8, 16, 64, 128), "tasks"),
    )  # fmt: skip
    groups = _conv_form(w).groups
    whole = Constraint("vectors wider than there are channels", lambda k: k["lanes"] == lanes or int(str(k["lanes"])) <= groups)
    return SearchSpace("depthwise", params=own, nest=loops), SearchSpace("depthwise", ("pieces",), pieces, (whole,), loops)


def _conv_form(w: Workload) -> Any:
    from graphopt.backends.tvm.convform import conv_of

    return conv_of(w.graph)


def _write_depthwise(w: Workload, s: Schedule, t: Target) -> Any:
    from graphopt.backends.tvm.convform import ConvForm, conv_of
    from graphopt.backends.tvm.depthwise import LINES, TASKS, DepthwiseKernel

    form = conv_of(w.graph)
    assert isinstance(form, ConvForm)
    lines, tasks = (s["lines"], s["tasks"]) if s.sketch == "pieces" else (LINES, TASKS)
    return DepthwiseKernel(w.graph, form, s["lanes"], s["pixels"], s["parallel"], lines, tasks).emit()


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
    from graphopt.backends.tvm.convform import USUAL_TILES, ConvForm, conv_of, even_tiles, tile_rows

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
    split, tasks = "panels" if deep else "pixels", 4 * t.cores
    tiles = USUAL_TILES
    if isinstance(form.pixels, int):
        tiles = even_tiles(-(-form.pixels // rows[0]), form.groups * -(-form.filters // columns), tasks, split, t.cores)
    return (
        Param("lanes", (lanes if columns % lanes == 0 else columns,)),
        Param("rows", rows, "tile"),
        Param("columns", (columns,), "tile"),
        Param("unroll", (4, 2, 8)),
        Param("tiles", tuple(dict.fromkeys((tiles, 12, 8, 16, 6, 4, 24, 2, 48))), "tasks"),
        Param("block", tuple(dict.fromkeys((block, 64, 128, 256, 384, 512))), "tasks"),
        Param("fetch", (far, not far)),
        Param("split", (split, "pixels" if deep else "panels"), "tasks"),
        Param("ahead", (True, False)),
        Param("tasks", (tasks, t.cores, 32 * t.cores), "tasks"),
        Param("parallel", (True, False), "tasks"),
    )


def _write_conv(w: Workload, s: Schedule, t: Target) -> Any:
    from graphopt.backends.tvm.conv import ConvKernel
    from graphopt.backends.tvm.convform import ConvForm, conv_of

    form = conv_of(w.graph)
    assert isinstance(form, ConvForm)
    return ConvKernel(w.graph, form, s["lanes"], s["rows"], s["columns"], s["unroll"], s["tiles"], s["block"], s["fetch"],
                      s["split"], s["ahead"], s["tasks"], s["parallel"]).emit()  # fmt: skip


# --- attention ---------------------------------------------------------------------------------------------------------


def _attention_form(w: Workload) -> Any:
    from graphopt.backends.tvm.flashform import form_of

    return form_of(w.graph) if w.kind == "attention" else "not an attention region"


def _flash_refuse(w: Workload, t: Target) -> str | None:
    form = _attention_form(w)
    return form if isinstance(form, str) else None


def _flash_params(w: Workload, t: Target) -> tuple[Param, ...]:
    from graphopt.backends.tvm.flashform import flash_params

    return flash_params(_attention_form(w), t)


def _flash_spaces(w: Workload, t: Target) -> tuple[SearchSpace, ...]:
    from graphopt.backends.tvm.flashform import flash_constraints

    return (SearchSpace("flash", params=_flash_params(w, t), constraints=flash_constraints(t)),)


def _write_flash(w: Workload, s: Schedule, t: Target) -> Any:
    from graphopt.backends.tvm.flash import FlashKernel

    names = ("lanes", "vectors", "rows", "block", "groups", "unroll", "stage", "parallel")
    return FlashKernel(w.graph, _attention_form(w), **{n: s[n] for n in names}).emit()


def _flash_tiles_refuse(w: Workload, t: Target) -> str | None:
    from graphopt.backends.tvm.flashform import tiles_refusal

    return _flash_refuse(w, t) or tiles_refusal(_attention_form(w), t)


def _flash_tiles_params(w: Workload, t: Target) -> tuple[Param, ...]:
    from graphopt.backends.tvm.flashform import tiles_params

    return tiles_params(_attention_form(w), t)


def _write_flash_tiles(w: Workload, s: Schedule, t: Target) -> Any:
    from graphopt.backends.tvm.flashtiles import FlashTilesKernel

    return FlashTilesKernel(w.graph, _attention_form(w), s["block"], s["groups"], s["parallel"]).emit()


def _decode_refuse(w: Workload, t: Target) -> str | None:
    from graphopt.backends.tvm.flashform import decode_refusal

    return _flash_refuse(w, t) or decode_refusal(_attention_form(w), t)


def _decode_params(w: Workload, t: Target) -> tuple[Param, ...]:
    from graphopt.backends.tvm.flashform import decode_params

    return decode_params(_attention_form(w), t)


def _write_decode(w: Workload, s: Schedule, t: Target) -> Any:
    from graphopt.backends.tvm.decode import DecodeKernel

    names = ("lanes", "sums", "keys", "block", "ahead", "splits", "parallel")
    return DecodeKernel(w.graph, _attention_form(w), **{n: s[n] for n in names}).emit()


def _loops(name: str) -> Callable[[Workload, Target], Callable[[Schedule], LoopNest]]:
    """The loops of a template, by the name of the function that tells them."""

    def of(w: Workload, t: Target) -> Callable[[Schedule], LoopNest]:
        from graphopt.backends.tvm import loopnests

        return getattr(loopnests, name)(w.graph, t)

    return of


DEPTHWISE = Template("depthwise", _depthwise_refuse, _depthwise_params, _write_depthwise, _depthwise_variants)
WINOGRAD = Template("winograd", _winograd_refuse, _winograd_params, _write_winograd)
CONV = Template("conv", _conv_refuse, _conv_params, _write_conv, nest=_loops("conv_loops"))
DECODE = Template("decode", _decode_refuse, _decode_params, _write_decode)
FLASH_TILES = Template("flash-tiles", _flash_tiles_refuse, _flash_tiles_params, _write_flash_tiles)
FLASH = Template("flash", _flash_refuse, _flash_params, _write_flash, _flash_spaces)
PAIRS = Template("pairs", _pairs_refuse, _pairs_params, _write_pairs)
THIRDS = Template("thirds", _thirds_refuse, _thirds_params, _write_thirds, _thirds_space)
QUANTIZED = Template("quantized", _quantized_refuse, _quantized_params, _write_quantized)
INT8 = Template("int8", _int8_refuse, _int8_params, _write_int8)
TILE = Template("tile", _tile_refuse, _tile_params, _write_tile, _tile_variants)
ROWS = Template("rows", _rows_refuse, _rows_params, _write_rows, nest=_loops("row_loops"))
NEST = Template("nest", lambda w, t: f"a region of kind {w.kind}" if w.kind in ("conv", "attention") else None, _nest_params, _write_nest,
                nest=_loops("element_loops"))  # fmt: skip
TEMPLATES: tuple[Template, ...] = (
    DECODE, FLASH_TILES, FLASH, DEPTHWISE, WINOGRAD, CONV, PAIRS, INT8, QUANTIZED, THIRDS, TILE, ROWS, NEST,
)  # fmt: skip
