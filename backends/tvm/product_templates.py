"""Templates of matrix products. Needs no tvm until ``emit``."""

from __future__ import annotations

from typing import Any

from graphopt.autotune.space import Param, Schedule, SearchSpace, Workload
from graphopt.backends.tvm.template import Template
from graphopt.target import Target

# --- matmul ------------------------------------------------------------------------------------------------------------


def _tile_refuse(w: Workload, t: Target) -> str | None:
    from graphopt.backends.forms.prepare import expand_rows
    from graphopt.backends.forms.shapes import product_of

    return product_of(expand_rows(w.graph)) if w.kind == "matmul" else "not a matmul region"


def _tile_params(w: Workload, t: Target) -> tuple[Param, ...]:
    from graphopt.backends.tvm.tileform import params

    return params(w.graph, t)


def _tile_variants(w: Workload, t: Target) -> tuple[SearchSpace, ...]:
    from graphopt.backends.tvm.tileform import variants

    return variants(w.graph, t)


def _write_tile(w: Workload, s: Schedule, t: Target) -> Any:
    from graphopt.backends.forms.prepare import expand_rows, flatten_rows
    from graphopt.backends.tvm.splitdepth import SplitDepthKernel
    from graphopt.backends.tvm.tile import TileKernel
    from graphopt.backends.tvm.tileform import BLOCK, BLOCKED, SPLIT

    graph, block = flatten_rows(expand_rows(w.graph)), s["block"] if s.sketch in BLOCKED else BLOCK
    known = dict(s.knobs)
    copied = bool(known.get("copy", False))
    if s.sketch == SPLIT:
        return SplitDepthKernel(graph, s["lanes"], s["mr"], s["nr"], s["unroll"], s["group"], s["block"], s["pieces"], copied).emit()
    ahead = s["ahead"] if "ahead" in known else 0
    return TileKernel(graph, s["lanes"], s["mr"], s["nr"], s["unroll"], s["group"], s["prefetch"], s["parallel"], block,
                      s.sketch in BLOCKED, s.sketch.endswith("rows-first"), ahead, copied).emit()  # fmt: skip


# --- products of few rows with a factor that lies by rows ----------------------------------------------------------------


def _dots_refuse(w: Workload, t: Target) -> str | None:
    from graphopt.backends.forms.prepare import expand_rows
    from graphopt.backends.tvm.dotsform import refusal

    return _tile_refuse(w, t) or refusal(expand_rows(w.graph), t)


def _dots_params(w: Workload, t: Target) -> tuple[Param, ...]:
    from graphopt.backends.forms.prepare import expand_rows
    from graphopt.backends.tvm.dotsform import params

    return params(expand_rows(w.graph), t)


def _write_dots(w: Workload, s: Schedule, t: Target) -> Any:
    from graphopt.backends.forms.prepare import expand_rows, flatten_rows
    from graphopt.backends.tvm.dots import DotsKernel

    names = ("lanes", "columns", "side", "pieces", "ahead", "parallel")
    return DotsKernel(flatten_rows(expand_rows(w.graph)), **{n: s[n] for n in names}, pairs=bool(dict(s.knobs).get("pairs"))).emit()


# --- products of few rows with small integers ---------------------------------------------------------------------------


def _quantized_refuse(w: Workload, t: Target) -> str | None:
    from graphopt.backends.tvm.quantform import refusal

    return _tile_refuse(w, t) or refusal(w.graph, t)


def _quantized_params(w: Workload, t: Target) -> tuple[Param, ...]:
    from graphopt.backends.tvm.quantform import params

    return params(w.graph, t)


def _write_quantized(w: Workload, s: Schedule, t: Target) -> Any:
    from graphopt.backends.forms.prepare import expand_rows, flatten_rows
    from graphopt.backends.tvm.quantdots import QuantizedDotsKernel
    from graphopt.backends.tvm.quantized import QuantizedKernel

    graph = flatten_rows(expand_rows(w.graph))
    if dict(s.knobs).get("dots"):
        return QuantizedDotsKernel(graph, s["vectors"], s["ahead"], s["parallel"]).emit()
    rows = next(int(n.result.shape[-2]) for n in graph.nodes() if n.name == "matmul")
    return QuantizedKernel(graph, s["lanes"], rows, s["vectors"], s["unroll"], s["table"], s["ahead"], s["parallel"]).emit()


def _quantized_tiles_refuse(w: Workload, t: Target) -> str | None:
    from graphopt.backends.forms.prepare import expand_rows
    from graphopt.backends.tvm.quantform import tiles_refusal

    return _tile_refuse(w, t) or tiles_refusal(expand_rows(w.graph), t)


def _quantized_tiles_params(w: Workload, t: Target) -> tuple[Param, ...]:
    from graphopt.backends.forms.prepare import expand_rows
    from graphopt.backends.tvm.quantform import tiles_params

    return tiles_params(expand_rows(w.graph), t)


def _write_quantized_tiles(w: Workload, s: Schedule, t: Target) -> Any:
    from graphopt.backends.forms.prepare import expand_rows
    from graphopt.backends.tvm.quanttiles import QuantizedTilesKernel

    return QuantizedTilesKernel(expand_rows(w.graph), s["group"], s["panels"], s["parallel"]).emit()


# --- products of 8-bit integers -----------------------------------------------------------------------------------------


def _int8_refuse(w: Workload, t: Target) -> str | None:
    from graphopt.backends.forms.prepare import expand_rows
    from graphopt.backends.tvm.int8form import refusal

    return refusal(expand_rows(w.graph), t) if w.kind == "matmul" else "not a matmul region"


def _int8_params(w: Workload, t: Target) -> tuple[Param, ...]:
    from graphopt.backends.tvm.int8form import params

    return params(w.graph, t)


def _write_int8(w: Workload, s: Schedule, t: Target) -> Any:
    from graphopt.backends.forms.prepare import expand_rows
    from graphopt.backends.tvm.int8 import Int8Kernel

    names = ("engine", "lanes", "rows", "group", "panels", "block", "ahead", "beside", "parallel")
    return Int8Kernel(expand_rows(w.graph), **{n: s[n] for n in names}).emit()


# --- products of bf16 in pairs -----------------------------------------------------------------------------------------


def _pairs_refuse(w: Workload, t: Target) -> str | None:
    from graphopt.backends.tvm.pairform import refusal

    return _tile_refuse(w, t) or refusal(w.graph, t)


def _pairs_params(w: Workload, t: Target) -> tuple[Param, ...]:
    from graphopt.backends.tvm.pairform import params

    return params(w.graph, t)


def _write_pairs(w: Workload, s: Schedule, t: Target) -> Any:
    from graphopt.backends.forms.prepare import expand_rows
    from graphopt.backends.tvm.pairs import PairKernel

    return PairKernel(expand_rows(w.graph), s["rows"], s["group"], s["parallel"]).emit()


# --- products with a weight of bf16, on tiles ---------------------------------------------------------------------------


def _bf16_refuse(w: Workload, t: Target) -> str | None:
    from graphopt.backends.forms.prepare import expand_rows
    from graphopt.backends.tvm.bf16form import refusal

    return refusal(expand_rows(w.graph), t) if w.kind == "matmul" else "not a matmul region"


def _bf16_params(w: Workload, t: Target) -> tuple[Param, ...]:
    from graphopt.backends.forms.prepare import expand_rows
    from graphopt.backends.tvm.bf16form import params

    return params(expand_rows(w.graph), t)


def _write_bf16(w: Workload, s: Schedule, t: Target) -> Any:
    from graphopt.backends.forms.prepare import expand_rows
    from graphopt.backends.tvm.bf16 import Bf16Kernel

    return Bf16Kernel(expand_rows(w.graph), **dict(s.knobs)).emit()


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
    from graphopt.backends.forms.prepare import expand_rows
    from graphopt.backends.tvm.thirds import ThirdsKernel

    graph = expand_rows(w.graph)
    return ThirdsKernel(graph, s["block"], s["rows"], s["group"], s["chunk"], s["panels"], s["ahead"], s["parallel"]).emit()


# --- products of f32 from halves ---------------------------------------------------------------------------------------


def _halves_refuse(w: Workload, t: Target) -> str | None:
    from graphopt.backends.tvm.halfform import refusal

    return _tile_refuse(w, t) or refusal(w.graph, t)


def _halves_space(w: Workload, t: Target) -> tuple[SearchSpace, ...]:
    from graphopt.backends.tvm.halfform import space

    return (space(w.graph, t),)


def _halves_params(w: Workload, t: Target) -> tuple[Param, ...]:
    return _halves_space(w, t)[0].params


def _write_halves(w: Workload, s: Schedule, t: Target) -> Any:
    from graphopt.backends.forms.prepare import expand_rows
    from graphopt.backends.tvm.halves import HalvesKernel

    names = ("block", "rows", "tiles", "group", "chunk", "panels", "ahead", "parallel")
    return HalvesKernel(expand_rows(w.graph), **{n: s[n] for n in names}).emit()


BF16 = Template("bf16", _bf16_refuse, _bf16_params, _write_bf16)
DOTS = Template("dots", _dots_refuse, _dots_params, _write_dots)
PAIRS = Template("pairs", _pairs_refuse, _pairs_params, _write_pairs)
INT8 = Template("int8", _int8_refuse, _int8_params, _write_int8)
QUANTIZED_TILES = Template("quantized-tiles", _quantized_tiles_refuse, _quantized_tiles_params, _write_quantized_tiles)
QUANTIZED = Template("quantized", _quantized_refuse, _quantized_params, _write_quantized)
HALVES = Template("halves", _halves_refuse, _halves_params, _write_halves, _halves_space)
THIRDS = Template("thirds", _thirds_refuse, _thirds_params, _write_thirds, _thirds_space)
TILE = Template("tile", _tile_refuse, _tile_params, _write_tile, _tile_variants)
