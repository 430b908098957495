"""The templates of matrix products, and of convolutions that are products."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from graphopt.autotune.space import Constraint, Param, Schedule, SearchSpace, Workload
from graphopt.backends.forms.convform import ConvForm
from graphopt.backends.forms.shapes import product_of
from graphopt.backends.triton import conv, gemv, matmul
from graphopt.backends.triton.code import Code, Launch, power_of_two
from graphopt.backends.triton.prepare import prepared
from graphopt.backends.triton.template import LANES, READS, Template, divide, first, largest, pieces_of, readable
from graphopt.ir import dims, types
from graphopt.ir.graph import Value
from graphopt.target import Target

LEAST_DEPTH = 32  # bytes along the summed axis that the instructions multiply at once, and Triton asks for
LEAST_PART = 16  # columns of a tile that are written by descriptor: of one byte each, what a descriptor asks for
PIECE, ROW_PIECE = 1024, 8192  # bytes along the summed axis that a piece has at least by default: of tiles, of products of one row

# --- matmul ------------------------------------------------------------------------------------------------------------------


def _product_refuse(w: Workload) -> str | None:
    return product_of(prepared(w), integers=True) if w.kind == "matmul" else "not a matmul region"


def _matmul_refuse(w: Workload, t: Target) -> str | None:
    reason = _product_refuse(w)
    return matmul.UNSIGNED if reason is None and matmul.form_of(prepared(w)).dtype == types.u8 else reason


def _matmul_spaces(w: Workload, t: Target) -> tuple[SearchSpace, ...]:
    form = matmul.form_of(prepared(w))
    sizes = tuple(largest(n, 4096) for n in (dims.numel(form.rows), form.columns, form.depth))
    wide = form.dtype.itemsize >= 4 or len(form.nodes) > 1
    exact = form.dtype.itemsize >= 4 and matmul.precision(form.dtype, t) == "ieee"  # by multiply-adds: what is read stays in registers
    most = (64, 64, (64 if exact else 128) // form.dtype.itemsize) if wide else (128, 128, 128 // form.dtype.itemsize)
    batch = largest(dims.numel(form.batch), 8)
    tiled = _tiles("matmul", t, form.dtype.itemsize, len(form.nodes), sizes, batch, most, divided=form.depth)
    stores = (0, 1, 2, 4) if t.has("tma") and _lies_so(w, t, "out") else (0,)
    knobs = READS, Param("stores", stores), Param("specialized", (False, True))
    tiled = replace(tiled, params=(*tiled.params, *knobs), constraints=(*tiled.constraints, *_copies(w, t, form)))
    return tiled, _persistent(tiled, form, prepared(w).outputs, t)


@lru_cache(maxsize=1024)
def _described(w: Workload, t: Target) -> frozenset[str]:
    """The factors and results that lie so in memory that a descriptor tells their tiles."""
    code, _ = matmul.MatmulKernel(prepared(w), t, (16, 16, 16), 1, plan=matmul.Plan(descriptors=True, stores=1)).emit(4, 1)
    return frozenset(d.tensor for d in code.descriptors.values())


def _lies_so(w: Workload, t: Target, tensors: str) -> bool:
    return any(name.startswith(tensors) for name in _described(w, t))


def _copies(w: Workload, t: Target, form: matmul.Form) -> tuple[Constraint, ...]:
    """By what tiles may be read and written, and by whom."""
    exact = form.dtype.itemsize >= 4 and matmul.precision(form.dtype, t) == "ieee"
    apart = t.matrix_unit == "tcgen05" and not exact and len(form.nodes) == 1  # Triton refuses two products, and ignores other units

    def shared_out(s: Mapping[str, Any]) -> bool:
        return not s["specialized"] or (apart and s["reads"] == "descriptors" and s["m"] >= 64 and s["warps"] >= 4)

    def whole(s: Mapping[str, Any]) -> bool:
        return bool(s["pieces"] == 1 or s["stores"] == 0)

    def wide(s: Mapping[str, Any]) -> bool:
        return bool(s["n"] >= LEAST_PART * s["stores"])

    return (
        *readable(t, "factor lies", lambda: _lies_so(w, t, "in")),
        Constraint("what pieces of a depth give is not written by descriptor", whole),
        Constraint(f"a part of a tile has fewer than {LEAST_PART} columns", wide),
        Constraint("warps are specialized for one product of tcgen05, of tiles of 64 rows, read by descriptor, by 4 warps", shared_out),
    )


def _persistent(tiled: SearchSpace, form: matmul.Form, outputs: Sequence[Value], t: Target) -> SearchSpace:
    """The same tiles, by programs that take one after another; the factors of the next are on their way while one is finished."""
    size = max(v.dtype.itemsize for v in outputs)

    def fits(s: Mapping[str, Any]) -> bool:
        tile = (s["m"] + len(form.nodes) * s["n"]) * s["k"] * form.dtype.itemsize
        staged = t.matrix_unit == "wgmma" or s["stores"] > 0  # results go through the shared memory, beside the next factors
        result = s["m"] * s["n"] // max(1, s["stores"]) * size if staged else 0
        return bool(s["resident"] * (s["stages"] * tile + result) <= t.shared_memory)

    default: dict[str, Any] = dict(tiled.default().knobs) | {"pieces": 1, "resident": 1}
    default["reads"] = "descriptors" if all(c.holds({**default, "reads": "descriptors"}) for c in tiled.constraints) else "pointers"
    if len(next(p for p in tiled.params if p.name == "stores").choices) > 1:  # a tile is on its way to memory while the next is computed
        default["stores"] = 2 if default["n"] >= 128 else 1
    default["stages"] = next((n for n in range(default["stages"], 0, -1) if fits({**default, "stages": n})), 1)
    params = [replace(p, choices=tuple(dict.fromkeys((default[p.name], *p.choices)))) for p in tiled.params if p.name != "pieces"]
    params += [Param("pieces", (1,)), Param("resident", (1, 2, 3, 4))]
    limit = Constraint("the tiles of all stages, and of all programs of a processor, exceed its shared memory", fits)
    return replace(tiled, sketches=("persistent",), params=tuple(params), constraints=(*tiled.constraints, limit))


def _tiles(template: str, t: Target, itemsize: int, count: int, sizes: tuple[int, ...], batch: int,
           most: tuple[int, int, int], per_warp: int = 2048, divided: dims.Dim | None = None) -> SearchSpace:  # fmt: skip
    """Tiles of products: what is large, while every processor has one.

    Args:
        count: accumulators of a program.
        sizes: rows, columns, and the summed axis.
        batch: how many such products there are.
        most: sides of a tile by default, at most.
        per_warp: elements of a tile that a warp has, by default, at most.
        divided: the depth, if programs may share it.
    """
    m, n, k = (max(matmul.LEAST, min(limit, power_of_two(size))) for size, limit in zip(sizes, most, strict=True))
    depths = tuple(d for d in (16, 32, 64, 128) if d * itemsize >= LEAST_DEPTH)
    k = max(k, depths[0])
    least = 64 if itemsize <= 2 and t.matrix_unit in ("wgmma", "tcgen05") else matmul.LEAST  # rows that those instructions multiply
    shape, pieces = (m, n), 1
    if isinstance(divided, int):  # tiles that are worth their reads, if the depth gives each processor a piece
        m, n = _filling(shape, 4096, least, sizes, batch, t)
        pieces = pieces_of(batch * _count(m, n, sizes), divided * itemsize, PIECE, t)
    if pieces == 1:
        m, n = _filling(shape, 1024, least, sizes, batch, t)
    warps = 8 if m * n >= 8 * per_warp else 4 if m * n >= 1024 else 2
    params = [
        Param("m", first(max(m, matmul.LEAST), (16, 32, 64, 128, 256)), "tile"),
        Param("n", first(max(n, matmul.LEAST), (16, 32, 64, 128, 256)), "tile"),
        Param("k", first(k, depths), "tile"),
        Param("group", (8, 1, 4, 16)),
        Param("warps", first(warps, (2, 4, 8))),
        Param("stages", first(3 if t.kind == "cuda" else 2, (1, 2, 3, 4))),
    ]

    def fits(s: Mapping[str, Any]) -> bool:
        return bool((s["m"] + count * s["n"]) * s["k"] * itemsize * s["stages"] <= t.shared_memory)

    def held(s: Mapping[str, Any]) -> bool:
        return bool(count * s["m"] * s["n"] * max(4, itemsize) // 4 <= 128 * s["warps"] * t.warp)

    shared = Constraint("the tiles of all stages exceed the shared memory", fits)
    limits = [shared, Constraint("the accumulators exceed the registers", held)]
    if divided is not None:
        knob, full = divide(pieces, divided)
        params.append(knob)
        limits.append(full)
    return SearchSpace(template, ("tiled",), tuple(params), tuple(limits))


def _count(m: int, n: int, sizes: tuple[int, ...]) -> int:
    return -(-sizes[0] // m) * -(-sizes[1] // n)


def _filling(tile: tuple[int, int], floor: int, least: int, sizes: tuple[int, ...], batch: int, t: Target) -> tuple[int, int]:
    """Smaller tiles, of ``floor`` elements and ``least`` rows at least, while processors would be idle."""
    m, n = tile
    while m * n > floor and batch * _count(m, n, sizes) < t.cores:
        if m >= n and m > least:
            m //= 2
        elif n > matmul.LEAST:
            n //= 2
        else:
            break
    return m, n


def _write_matmul(w: Workload, s: Schedule, t: Target) -> tuple[Code, Launch]:
    programs = s["resident"] * t.cores if s.sketch == "persistent" else 0
    plan = matmul.Plan(programs, s["reads"] == "descriptors", s["specialized"], s["stores"])
    kernel = matmul.MatmulKernel(prepared(w), t, (s["m"], s["n"], s["k"]), s["group"], s["pieces"], plan)
    return kernel.emit(s["warps"], s["stages"])


def _gemv_refuse(w: Workload, t: Target) -> str | None:
    reason = _product_refuse(w)
    if reason is None and dims.numel(matmul.form_of(prepared(w)).rows) != 1:
        return "not a product of one row"
    return reason


def _gemv_spaces(w: Workload, t: Target) -> tuple[SearchSpace, ...]:
    """Some thousand elements of the matrix on their way at once, and two programs for each processor if there are columns for them."""
    form = matmul.form_of(prepared(w))
    width, batch = largest(form.columns, 4096), largest(dims.numel(form.batch), 8)
    n, depth = 16, largest(form.depth, 0)
    pieces = pieces_of(batch * -(-width // n), depth * form.dtype.itemsize, ROW_PIECE, t)
    while pieces == 1 and n > 4 and batch * -(-width // n) < 2 * t.cores:
        n //= 2
    n = min(n, power_of_two(width))
    most = 4096 // len(form.nodes)
    knob, full = divide(pieces, form.depth)
    k = max(16, min(512, power_of_two(largest(form.depth, 4096)), most // n))
    params = (
        Param("n", first(n, (1, 4, 8, 16, 32, 64, 128)), "tile"),
        Param("k", first(k, (32, 64, 128, 256, 512, 1024)), "tile"),
        knob,
        Param("warps", first(max(1, min(4, n * k // (LANES * t.warp))), (1, 2, 4, 8))),
    )

    def held(s: Mapping[str, Any]) -> bool:
        return bool(len(form.nodes) * s["n"] * s["k"] <= 64 * s["warps"] * t.warp)

    return (SearchSpace("gemv", ("lanes",), params, (Constraint("the sums exceed the registers", held), full)),)


def _write_gemv(w: Workload, s: Schedule, t: Target) -> tuple[Code, Launch]:
    return gemv.GemvKernel(prepared(w), s["n"], s["k"], s["pieces"]).emit(s["warps"])


# --- convolutions -------------------------------------------------------------------------------------------------------------


def _conv_refuse(w: Workload, t: Target) -> str | None:
    form = conv.form_of(w.graph) if w.kind == "conv" else "not a conv region"
    return form if isinstance(form, str) else None


def _conv_spaces(w: Workload, t: Target) -> tuple[SearchSpace, ...]:
    form = conv.form_of(w.graph)
    assert isinstance(form, ConvForm)
    depth = form.inner if form.inner >= matmul.LEAST else form.depth
    sizes = largest(form.pixels, 1 << 16), form.filters, depth
    itemsize = form.node.operands[0].dtype.itemsize
    most = (64, 64, 16) if itemsize >= 4 else (64, 128, 64)
    crowded = t.kind == "cuda" and (itemsize >= 4 or t.matrix_unit == "mma")  # sums and places in the image share the registers
    return (_tiles("conv", t, itemsize, 1, sizes, form.groups, most, 512 if crowded else 2048),)


def _write_conv(w: Workload, s: Schedule, t: Target) -> tuple[Code, Launch]:
    form = conv.form_of(w.graph)
    assert isinstance(form, ConvForm)
    return conv.ConvKernel(w.graph, form, t, (s["m"], s["n"], s["k"]), s["group"]).emit(s["warps"], s["stages"])


MATMUL = Template("matmul", _matmul_refuse, _matmul_spaces, _write_matmul)
GEMV = Template("gemv", _gemv_refuse, _gemv_spaces, _write_gemv)
CONV = Template("conv", _conv_refuse, _conv_spaces, _write_conv)
