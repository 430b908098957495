"""Writing a value whose operands lie along another axis than the result: squares of lanes by lanes, transposed in registers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import tirx

from graphopt.backends.tvm import scalar
from graphopt.backends.tvm.code import Code, Index, i64
from graphopt.backends.tvm.expr import Arguments, Expressions, Source
from graphopt.backends.tvm.loops import SMALL, Axis, product
from graphopt.ir.graph import Value


def transpose_square(code: Code, rows: Sequence[Any], lanes: int) -> list[Any]:
    """The columns of ``lanes`` vectors, by log2(lanes) rounds of interleaving each vector with the one half the way on."""
    low = [x for q in range(lanes // 2) for x in (q, q + lanes)]
    high = [x + lanes // 2 for x in low]
    out = list(rows)
    for _ in range(lanes.bit_length() - 1):
        pairs = [(out[q], out[q + lanes // 2]) for q in range(lanes // 2)]
        out = [code.bind(tirx.Shuffle([a, b], order), "mix") for a, b in pairs for order in (low, high)]
    return out


@dataclass
class Crossing:
    """Inputs that are contiguous along ``axis`` (a position among the loops) while the result is along the last loop.

    Attributes:
        reads: for each such input the coefficients of its address in the loop variables, and its constant part.
    """

    axis: int
    reads: dict[Value, tuple[list[Any], Any]]


def find_crossing(args: Arguments, sources: Mapping[Value, Source], value: Value, axes: Sequence[Axis],
                  index_of: Callable[[Sequence[Index]], list[Index]], lanes: int) -> Crossing | None:  # fmt: skip
    """What must be transposed to write the value along its last loop; None if nothing, or not by squares."""
    code, last = args.code, len(axes) - 1
    if lanes < 2 or lanes & (lanes - 1) or last < 1 or not _wide(axes[last], lanes):
        return None
    loops = [tirx.Var(code.fresh("p"), "int64") for _ in axes]
    for var, axis in zip(loops, axes, strict=True):
        code.analyzer.bind(var, tvm.ir.Range.from_min_extent(i64(0), i64(axis.size)))
    probe = Expressions(args, dict(sources), probe=True)
    probe.at(value, index_of(loops))
    names = {v.name for v in loops}
    crossing: Crossing | None = None
    for v, address in probe.reads:
        found = [] if isinstance(address, int) else list(tvm.sym.detect_linear_equation(address, loops))
        if not found or sum(u is v for u, _ in probe.reads) > 1:
            continue
        *steps, base = found
        nested = any(x.name in names for e in found for x in tirx.analysis.undefined_vars(e))
        if nested or code.equal(steps[last], 0) or code.equal(steps[last], 1):
            continue
        along = next((k for k in range(last) if code.equal(steps[k], 1) and _wide(axes[k], lanes)), None)
        if along is None:
            continue
        if crossing is None:
            crossing = Crossing(along, {})
        if crossing.axis == along:
            crossing.reads[v] = (steps, base)
    return crossing


def _wide(axis: Axis, lanes: int) -> bool:
    return isinstance(axis.size, int) and axis.size >= lanes


def write_squares(args: Arguments, sources: Mapping[Value, Source], axes: Sequence[Axis], crossing: Crossing, lanes: int,
                  parallel: bool, weight: int, element: Callable[[list[Index], dict[Value, Source]], None]) -> None:  # fmt: skip
    """Run ``element(at, sources)`` at every place of the loops, a square at a time; it reads the transposed inputs from scratch.

    The last square of an axis overlaps the one before it: elements are computed twice there.
    """
    code, a, b = args.code, crossing.axis, len(axes) - 1
    outer = [k for k in range(len(axes)) if k not in (a, b)]
    sizes = [*(axes[k].size for k in outer), code.ceildiv(axes[a].size, lanes)]
    total = product(code, [x.size for x in axes])
    launch = parallel and not (isinstance(total, int) and total * weight < SMALL)
    with code.loop(product(code, sizes), "parallel" if launch else "serial", "task") as task:
        *fixed, tile = [code.bind_index(i, "o", n) for i, n in zip(code.unflatten(task, sizes), sizes, strict=True)]
        scratch = {v: code.alloc(lanes * lanes, scalar.STORAGE[v.dtype], "square") for v in crossing.reads}
        at: list[Index] = [0] * len(axes)
        for k, i in zip(outer, fixed, strict=True):
            at[k] = i
        first = code.bind_index(_start(code, tile, axes[a].size, lanes), "a")
        with code.loop(code.ceildiv(axes[b].size, lanes), "serial", "t") as t:
            start = code.bind_index(_start(code, t, axes[b].size, lanes), "b")
            for v, (steps, base) in crossing.reads.items():
                at[a], rows = first, []
                for q in range(lanes):
                    at[b] = code.simplify(start + q)
                    place = base
                    for step, i in zip(steps, at, strict=True):
                        place = place + step * i
                    rows.append(code.bind(args.inputs[v][tirx.Ramp(i64(code.simplify(place)), i64(1), lanes)], "row"))
                for q, row in enumerate(transpose_square(code, rows, lanes)):
                    code.emit(tirx.BufferStore(scratch[v], row, [tirx.Ramp(i64(q * lanes), i64(1), lanes)]))
            with code.loop(lanes, "serial", "i") as i, code.loop(lanes, "vectorized", "v") as lane:
                near = {v: _from_square(code, scratch[v], v, code.simplify(i * lanes + lane)) for v in crossing.reads}
                at[a], at[b] = code.simplify(first + i), code.simplify(start + lane)
                element(at, {**sources, **near})


def _start(code: Code, tile: Index, size: Index, lanes: int) -> Index:
    start = code.simplify(tile * lanes)
    return start if isinstance(size, int) and size % lanes == 0 else code.least(start, size - lanes)


def _from_square(code: Code, square: Any, v: Value, place: Index) -> Source:
    return lambda index: scalar.load(code.load(square, place), v.dtype)
