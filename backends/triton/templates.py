"""The kernel templates: which regions each takes, its search space, and the emitter behind it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from graphopt.autotune.space import Constraint, Param, Schedule, SearchSpace, Workload
from graphopt.backends.base import KernelSource
from graphopt.backends.forms.convform import ConvForm, conv_of
from graphopt.backends.forms.flashform import Form, form_of
from graphopt.backends.forms.shapes import product_of
from graphopt.backends.triton import attention, conv, elementwise, gemv, matmul, rows, window
from graphopt.backends.triton.code import Code, Launch, power_of_two
from graphopt.backends.triton.prepare import prepared
from graphopt.ir import dims
from graphopt.target import Target

LEAST_DEPTH = 32  # bytes along the summed axis that the instructions multiply at once, and Triton asks for
LANES = 8  # elements that one thread holds of a tile, at most, by default
PIECES = (1, 2, 4, 8, 16, 32)  # of a product's depth
PIECE, ROW_PIECE = 1024, 8192  # bytes along the summed axis that a piece has at least by default: of tiles, of products of one row
KEYS_PIECE = 32768  # bytes of keys and values


@dataclass(frozen=True)
class Template:
    """A kernel family of the backend.

    Attributes:
        name: as in ``Schedule.template``.
        takes: why a region is not for this template, or None if it is.
        spaces_of: the schedules by structure; that of the default first.
        write: (workload, schedule, target) -> the lines of the kernel, and its launch.
    """

    name: str
    takes: Callable[[Workload, Target], str | None]
    spaces_of: Callable[[Workload, Target], tuple[SearchSpace, ...]]
    write: Callable[[Workload, Schedule, Target], tuple[Code, Launch]]

    def space(self, w: Workload, t: Target) -> SearchSpace:
        """The space whose default needs no tuning."""
        return self.spaces(w, t)[0]

    def spaces(self, w: Workload, t: Target) -> tuple[SearchSpace, ...]:
        """All schedules, the space of the default first."""
        return self.spaces_of(w, t)

    def emit(self, w: Workload, s: Schedule, t: Target) -> KernelSource:
        """The kernel as a file of Python. Pure: needs neither a device nor triton."""
        code, launch = self.write(w, s, t)
        return code.source(entry_name(w, s, t), w, s, t, launch)


def entry_name(w: Workload, s: Schedule, t: Target) -> str:
    """Name of a kernel, unique by workload, schedule and target."""
    digest = hashlib.sha256(f"{w.kind}\n{w.text}\n{s.to_json()}\n{t.fingerprint}".encode()).hexdigest()[:16]
    return f"{w.kind}_{digest}"


def _first(default: int, choices: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(dict.fromkeys((default, *choices)))


def _largest(n: dims.Dim, otherwise: int) -> int:
    return n if isinstance(n, int) else otherwise


# --- pointwise ---------------------------------------------------------------------------------------------------------------


def _pointwise_refuse(w: Workload, t: Target) -> str | None:
    return elementwise.refusal(prepared(w)) if w.kind == "pointwise" else "not a pointwise region"


def _pointwise_spaces(w: Workload, t: Target) -> tuple[SearchSpace, ...]:
    graph = prepared(w)
    space = elementwise.space_of(graph)
    numel = _largest(dims.numel(space.sizes), 1 << 24)
    block = min(1024, max(128, power_of_two(-(-numel // (2 * t.cores)))))
    warps = Param("warps", _first(max(1, min(4, block // (LANES * t.warp))), (1, 2, 4, 8)))
    flat = SearchSpace("pointwise", ("flat",), (Param("block", _first(block, (128, 256, 512, 1024, 2048, 4096))), warps))
    if space.across is None:
        return (flat,)
    sides = Param("rows", (32, 16, 64, 128)), Param("columns", (32, 16, 64, 128))
    return SearchSpace("pointwise", ("tiled",), (*sides, Param("warps", (4, 1, 2, 8)))), flat


def _write_pointwise(w: Workload, s: Schedule, t: Target) -> tuple[Code, Launch]:
    if s.sketch == "tiled":
        return elementwise.emit_tiled(prepared(w), s["rows"], s["columns"], s["warps"])
    return elementwise.emit_flat(prepared(w), s["block"], s["warps"])


# --- rows --------------------------------------------------------------------------------------------------------------------

PERSISTENT = 1 << 14  # columns of a row that lanes hold at once, at most
LOOPED = 1 << 11  # columns of a block by default


def _rows_refuse(w: Workload, t: Target) -> str | None:
    return rows.refusal(prepared(w)) if w.kind in ("rowwise", "reduction") else "not a region over rows"


def _rows_spaces(w: Workload, t: Target) -> tuple[SearchSpace, ...]:
    split = rows.Split(rows.reductions(prepared(w)))
    count, columns = _largest(split.rows, 1 << 16), _largest(split.columns, LOOPED)
    lanes = power_of_two(columns)
    together = max(1, min(power_of_two(-(-count // t.cores)), 1024 // lanes))  # short rows share a program, while there are programs enough
    choices = tuple(n for n in (1, 2, 4, 8, 16, 32) if n * min(lanes, LOOPED) <= 1 << 14)
    warps = Param("warps", _first(max(1, min(8, together * min(lanes, LOOPED) // (LANES * t.warp))), (1, 2, 4, 8, 16)))
    block = Param("columns", _first(min(lanes, LOOPED), tuple(n for n in (256, 512, 1024, 2048, 4096) if n <= max(lanes, 256))))
    looped = SearchSpace("rows", ("looped",), (Param("rows", _first(together, choices)), block, warps), (_lanes_fit(t),))
    if not isinstance(split.columns, int) or lanes > PERSISTENT:
        return (looped,)
    persistent = SearchSpace("rows", ("persistent",), (Param("rows", _first(together, choices)), Param("columns", (lanes,)), warps),
                             (_lanes_fit(t),))  # fmt: skip
    return (persistent, looped) if lanes <= 4 * LOOPED else (looped, persistent)


def _lanes_fit(t: Target) -> Constraint:
    most = 64  # registers of a thread that one value may take

    def holds(k: Mapping[str, Any]) -> bool:
        return bool(k["rows"] * k["columns"] <= most * t.warp * k["warps"])

    return Constraint(f"more than {most} elements a thread", holds)


def _write_rows(w: Workload, s: Schedule, t: Target) -> tuple[Code, Launch]:
    return rows.emit(prepared(w), s["rows"], s["columns"], s.sketch == "looped", s["warps"])


# --- matmul ------------------------------------------------------------------------------------------------------------------


def _matmul_refuse(w: Workload, t: Target) -> str | None:
    return product_of(prepared(w), integers=True) if w.kind == "matmul" else "not a matmul region"


def _matmul_spaces(w: Workload, t: Target) -> tuple[SearchSpace, ...]:
    form = matmul.form_of(prepared(w))
    sizes = tuple(_largest(n, 4096) for n in (dims.numel(form.rows), form.columns, form.depth))
    wide = form.dtype.itemsize >= 4 or len(form.nodes) > 1
    exact = form.dtype.itemsize >= 4 and matmul.precision(form.dtype, t) == "ieee"  # by multiply-adds: what is read stays in registers
    most = (64, 64, (64 if exact else 128) // form.dtype.itemsize) if wide else (128, 128, 128 // form.dtype.itemsize)
    batch = _largest(dims.numel(form.batch), 8)
    return (_tiles("matmul", t, form.dtype.itemsize, len(form.nodes), sizes, batch, most, divided=form.depth),)


def _pieces(programs: int, nbytes: int, piece: int, t: Target) -> int:
    """Pieces of a depth of so many bytes by default: as many as give each processor a program, where half of them or more have none.

    A depth of eight pieces is taken to be long enough for a second kernel to pay.
    """
    if 2 * programs > t.cores or nbytes < 8 * piece:
        return 1
    return max(n for n in PIECES if n * programs <= t.cores and n * piece <= nbytes)


def _divide(default: int, depth: dims.Dim, block: str = "k") -> tuple[Param, Constraint]:
    """The knob that divides a depth, or keys, in blocks of a size that is the knob ``block``; and that no piece is empty."""
    size = _largest(depth, 1 << 30)

    def full(s: Mapping[str, Any]) -> bool:
        return bool((s["pieces"] - 1) * s[block] < size)

    choices = tuple(n for n in PIECES if (n - 1) * matmul.LEAST < size)
    return Param("pieces", _first(default, choices), "tile"), Constraint("a piece would be empty", full)


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
        pieces = _pieces(batch * _count(m, n, sizes), divided * itemsize, PIECE, t)
    if pieces == 1:
        m, n = _filling(shape, 1024, least, sizes, batch, t)
    warps = 8 if m * n >= 8 * per_warp else 4 if m * n >= 1024 else 2
    params = [
        Param("m", _first(max(m, matmul.LEAST), (16, 32, 64, 128, 256)), "tile"),
        Param("n", _first(max(n, matmul.LEAST), (16, 32, 64, 128, 256)), "tile"),
        Param("k", _first(k, depths), "tile"),
        Param("group", (8, 1, 4, 16)),
        Param("warps", _first(warps, (2, 4, 8))),
        Param("stages", _first(3 if t.kind == "cuda" else 2, (1, 2, 3, 4))),
    ]

    def fits(s: Mapping[str, Any]) -> bool:
        return bool((s["m"] + count * s["n"]) * s["k"] * itemsize * s["stages"] <= t.shared_memory)

    def held(s: Mapping[str, Any]) -> bool:
        return bool(count * s["m"] * s["n"] * max(4, itemsize) // 4 <= 128 * s["warps"] * t.warp)

    shared = Constraint("the tiles of all stages exceed the shared memory", fits)
    limits = [shared, Constraint("the accumulators exceed the registers", held)]
    if divided is not None:
        knob, full = _divide(pieces, divided)
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
    kernel = matmul.MatmulKernel(prepared(w), t, (s["m"], s["n"], s["k"]), s["group"], s["pieces"])
    return kernel.emit(s["warps"], s["stages"])


def _gemv_refuse(w: Workload, t: Target) -> str | None:
    reason = _matmul_refuse(w, t)
    if reason is None and dims.numel(matmul.form_of(prepared(w)).rows) != 1:
        return "not a product of one row"
    return reason


def _gemv_spaces(w: Workload, t: Target) -> tuple[SearchSpace, ...]:
    """Some thousand elements of the matrix on their way at once, and two programs for each processor if there are columns for them."""
    form = matmul.form_of(prepared(w))
    width, batch = _largest(form.columns, 4096), _largest(dims.numel(form.batch), 8)
    n, depth = 16, _largest(form.depth, 0)
    pieces = _pieces(batch * -(-width // n), depth * form.dtype.itemsize, ROW_PIECE, t)
    while pieces == 1 and n > 4 and batch * -(-width // n) < 2 * t.cores:
        n //= 2
    n = min(n, power_of_two(width))
    most = 4096 // len(form.nodes)
    knob, full = _divide(pieces, form.depth)
    k = max(16, min(512, power_of_two(_largest(form.depth, 4096)), most // n))
    params = (
        Param("n", _first(n, (1, 4, 8, 16, 32, 64, 128)), "tile"),
        Param("k", _first(k, (32, 64, 128, 256, 512, 1024)), "tile"),
        knob,
        Param("warps", _first(max(1, min(4, n * k // (LANES * t.warp))), (1, 2, 4, 8))),
    )

    def held(s: Mapping[str, Any]) -> bool:
        return bool(len(form.nodes) * s["n"] * s["k"] <= 64 * s["warps"] * t.warp)

    return (SearchSpace("gemv", ("lanes",), params, (Constraint("the sums exceed the registers", held), full)),)


def _write_gemv(w: Workload, s: Schedule, t: Target) -> tuple[Code, Launch]:
    return gemv.GemvKernel(prepared(w), s["n"], s["k"], s["pieces"]).emit(s["warps"])


# --- attention ---------------------------------------------------------------------------------------------------------------


def _attention_form(w: Workload) -> Form | str:
    return form_of(w.graph) if w.kind == "attention" else "not an attention region"


def _attention_refuse(w: Workload, t: Target) -> str | None:
    form = _attention_form(w)
    return form if isinstance(form, str) else None


def _attention_spaces(w: Workload, t: Target) -> tuple[SearchSpace, ...]:
    form = _attention_form(w)
    assert isinstance(form, Form)
    itemsize = form.node.result.dtype.itemsize
    d, e = attention.side(form.depth), attention.side(form.width)
    wide = max(d, e) > (128 if t.kind == "cuda" else 64)  # sums that leave few registers
    m = max(matmul.LEAST, min(32 if itemsize >= 4 else 64 if wide else 128, power_of_two(_largest(form.queries, 4096))))
    n = max(matmul.LEAST, min(32 if itemsize >= 4 or wide else 64, power_of_two(_largest(form.keys, 4096))))
    programs = _largest(dims.numel(form.batch), 8) * -(-_largest(form.queries, 4096) // m)
    seen = min([dims.bounds(form.keys, form.symbols)[1] or 4096, *(w for w in [form.node.attrs["window"]] if isinstance(w, int))])
    key = (form.depth + form.width) * itemsize
    knob, full = _divide(_pieces(programs, seen * key, max(KEYS_PIECE, n * key), t), form.keys, "n")
    params = (
        knob,
        Param("m", _first(m, (16, 32, 64, 128)), "tile"),
        Param("n", _first(n, (16, 32, 64, 128)), "tile"),
        Param("warps", _first(8 if m >= 128 and t.kind == "cuda" else 4 if m >= 32 else 2, (2, 4, 8))),
        Param("stages", _first(2 if t.kind == "cuda" else 1, (1, 2, 3))),
    )

    def fits(s: Mapping[str, Any]) -> bool:
        return bool((s["m"] * d + s["n"] * (d + e) * s["stages"] + s["m"] * s["n"]) * itemsize <= t.shared_memory)

    def held(s: Mapping[str, Any]) -> bool:
        return bool(s["m"] * (e + s["n"]) <= 128 * s["warps"] * t.warp)

    limits = Constraint("queries, keys and values exceed the shared memory", fits), Constraint("the sums exceed the registers", held)
    return (SearchSpace("attention", ("flash",), params, (*limits, full)),)


def _write_attention(w: Workload, s: Schedule, t: Target) -> tuple[Code, Launch]:
    form = _attention_form(w)
    assert isinstance(form, Form)
    return attention.FlashKernel(w.graph, form, t, s["m"], s["n"], s["pieces"]).emit(s["warps"], s["stages"])


# --- convolutions and pooling --------------------------------------------------------------------------------------------------


def _window_refuse(w: Workload, t: Target) -> str | None:
    if w.kind not in ("conv", *window.POOLS):
        return "not a region around a window"
    form = window.form_of(w.graph)
    return form if isinstance(form, str) else None


def _window_spaces(w: Workload, t: Target) -> tuple[SearchSpace, ...]:
    height, width = (_largest(n, 4096) for n in window.size_of(w.graph))
    columns = min(128, power_of_two(width))
    most = max(1, 1024 // columns)
    while most > 1 and -(-height // most) * -(-width // columns) < t.cores:
        most //= 2
    params = (
        Param("rows", _first(min(most, power_of_two(height)), (1, 2, 4, 8, 16, 32)), "tile"),
        Param("columns", _first(columns, tuple(n for n in (16, 32, 64, 128, 256) if n <= max(16, power_of_two(width)))), "tile"),
        Param("warps", _first(4 if most * columns >= 1024 else 2, (1, 2, 4, 8))),
    )
    return (SearchSpace("window", ("lanes",), params, (_lanes_fit(t),)),)


def _write_window(w: Workload, s: Schedule, t: Target) -> tuple[Code, Launch]:
    return window.WindowKernel(w.graph, s["rows"], s["columns"]).emit(s["warps"])


def _conv_refuse(w: Workload, t: Target) -> str | None:
    form = conv_of(w.graph) if w.kind == "conv" else "not a conv region"
    return form if isinstance(form, str) else None


def _conv_spaces(w: Workload, t: Target) -> tuple[SearchSpace, ...]:
    form = conv_of(w.graph)
    assert isinstance(form, ConvForm)
    depth = form.inner if form.inner >= matmul.LEAST else form.depth
    sizes = _largest(form.pixels, 1 << 16), form.filters, depth
    itemsize = form.node.result.dtype.itemsize
    most = (64, 64, 16) if itemsize >= 4 else (64, 128, 64)
    crowded = t.kind == "cuda" and (itemsize >= 4 or t.matrix_unit == "mma")  # sums and places in the image share the registers
    return (_tiles("conv", t, itemsize, 1, sizes, form.groups, most, 512 if crowded else 2048),)


def _write_conv(w: Workload, s: Schedule, t: Target) -> tuple[Code, Launch]:
    form = conv_of(w.graph)
    assert isinstance(form, ConvForm)
    return conv.ConvKernel(w.graph, form, t, (s["m"], s["n"], s["k"]), s["group"]).emit(s["warps"], s["stages"])


WINDOW = Template("window", _window_refuse, _window_spaces, _write_window)
CONV = Template("conv", _conv_refuse, _conv_spaces, _write_conv)
ATTENTION = Template("attention", _attention_refuse, _attention_spaces, _write_attention)
GEMV = Template("gemv", _gemv_refuse, _gemv_spaces, _write_gemv)
MATMUL = Template("matmul", _matmul_refuse, _matmul_spaces, _write_matmul)
ROWS = Template("rows", _rows_refuse, _rows_spaces, _write_rows)
POINTWISE = Template("pointwise", _pointwise_refuse, _pointwise_spaces, _write_pointwise)
TEMPLATES: tuple[Template, ...] = (ATTENTION, WINDOW, CONV, GEMV, MATMUL, ROWS, POINTWISE)
