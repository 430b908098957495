"""The templates of kernels whose lanes are elements: pointwise work, rows, scans, and windows."""

from __future__ import annotations

from graphopt.autotune.space import Param, Schedule, SearchSpace, Workload
from graphopt.backends.triton import elementwise, rows, scan, window
from graphopt.backends.triton.code import Code, Launch, power_of_two
from graphopt.backends.triton.prepare import prepared
from graphopt.backends.triton.template import LANES, Template, first, lanes_fit, largest
from graphopt.ir import dims
from graphopt.ir.opset.window import WINDOWS
from graphopt.target import Target

# --- pointwise ---------------------------------------------------------------------------------------------------------------


def _pointwise_refuse(w: Workload, t: Target) -> str | None:
    return elementwise.refusal(prepared(w)) if w.kind == "pointwise" else "not a pointwise region"


def _pointwise_spaces(w: Workload, t: Target) -> tuple[SearchSpace, ...]:
    graph = prepared(w)
    space = elementwise.space_of(graph)
    numel = largest(dims.numel(space.sizes), 1 << 24)
    block = min(1024, max(128, power_of_two(-(-numel // (2 * t.cores)))))
    warps = Param("warps", first(max(1, min(4, block // (LANES * t.warp))), (1, 2, 4, 8)))
    flat = SearchSpace("pointwise", ("flat",), (Param("block", first(block, (128, 256, 512, 1024, 2048, 4096))), warps))
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
    count, columns = largest(split.rows, 1 << 16), largest(split.columns, LOOPED)
    lanes = power_of_two(columns)
    together = max(1, min(power_of_two(-(-count // t.cores)), 1024 // lanes))  # short rows share a program, while there are programs enough
    choices = tuple(n for n in (1, 2, 4, 8, 16, 32) if n * min(lanes, LOOPED) <= 1 << 14)
    warps = Param("warps", first(max(1, min(8, together * min(lanes, LOOPED) // (LANES * t.warp))), (1, 2, 4, 8, 16)))
    block = Param("columns", first(min(lanes, LOOPED), tuple(n for n in (256, 512, 1024, 2048, 4096) if n <= max(lanes, 256))))
    looped = SearchSpace("rows", ("looped",), (Param("rows", first(together, choices)), block, warps), (lanes_fit(t),))
    if not isinstance(split.columns, int) or lanes > PERSISTENT:
        return (looped,)
    persistent = SearchSpace("rows", ("persistent",), (Param("rows", first(together, choices)), Param("columns", (lanes,)), warps),
                             (lanes_fit(t),))  # fmt: skip
    return (persistent, looped) if lanes <= 4 * LOOPED else (looped, persistent)


def _write_rows(w: Workload, s: Schedule, t: Target) -> tuple[Code, Launch]:
    return rows.emit(prepared(w), s["rows"], s["columns"], s.sketch == "looped", s["warps"])


# --- depthwise convolutions and pooling ----------------------------------------------------------------------------------------


def _window_refuse(w: Workload, t: Target) -> str | None:
    if w.kind not in ("conv", *WINDOWS):
        return "not a region around a window"
    form = window.form_of(w.graph)
    return form if isinstance(form, str) else None


def _window_spaces(w: Workload, t: Target) -> tuple[SearchSpace, ...]:
    height, width = (largest(n, 4096) for n in window.size_of(w.graph))
    columns = min(128, power_of_two(width))
    most = max(1, 1024 // columns)
    while most > 1 and -(-height // most) * -(-width // columns) < t.cores:
        most //= 2
    params = (
        Param("rows", first(min(most, power_of_two(height)), (1, 2, 4, 8, 16, 32)), "tile"),
        Param("columns", first(columns, tuple(n for n in (16, 32, 64, 128, 256) if n <= max(16, power_of_two(width)))), "tile"),
        Param("warps", first(4 if most * columns >= 1024 else 2, (1, 2, 4, 8))),
    )
    return (SearchSpace("window", ("lanes",), params, (lanes_fit(t),)),)


def _write_window(w: Workload, s: Schedule, t: Target) -> tuple[Code, Launch]:
    return window.WindowKernel(w.graph, s["rows"], s["columns"]).emit(s["warps"])


# --- scans -------------------------------------------------------------------------------------------------------------------


def _scan_refuse(w: Workload, t: Target) -> str | None:
    return scan.refusal(prepared(w)) if w.kind == "scan" else "not a scan region"


def _scan_spaces(w: Workload, t: Target) -> tuple[SearchSpace, ...]:
    kernel = scan.ScanKernel(prepared(w), 1, 16)
    count, columns = largest(dims.numel(kernel.others), 1 << 16), largest(kernel.x.shape[kernel.axis], LOOPED)
    innermost = kernel.axis == kernel.x.type.rank - 1
    size = max(4, kernel.kind.itemsize)
    block = max(16, min(power_of_two(columns), (LOOPED if innermost else 64) * 4 // size))
    together = min(power_of_two(-(-count // t.cores)), max(1, 1024 // block), 1024) if innermost else min(power_of_two(count), 32)
    warps = max(1, min(8, together * block * size // (4 * LANES * t.warp)))
    params = (
        Param("rows", first(together, (1, 2, 4, 8, 16, 32, 64))),
        Param("columns", first(block, (64, 128, 256, 512, 1024, 2048))),
        Param("warps", first(warps, (1, 2, 4, 8))),
    )
    return (SearchSpace("scan", ("blocks",), params, (lanes_fit(t),)),)


def _write_scan(w: Workload, s: Schedule, t: Target) -> tuple[Code, Launch]:
    return scan.ScanKernel(prepared(w), s["rows"], s["columns"]).emit(s["warps"])


POINTWISE = Template("pointwise", _pointwise_refuse, _pointwise_spaces, _write_pointwise)
ROWS = Template("rows", _rows_refuse, _rows_spaces, _write_rows)
SCAN = Template("scan", _scan_refuse, _scan_spaces, _write_scan)
WINDOW = Template("window", _window_refuse, _window_spaces, _write_window)
