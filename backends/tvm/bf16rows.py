"""The first factor of a product as rows of bf16 in memory, for instructions that take neighbours along the summed axis at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import tirx

from graphopt.backends.forms.support import behind_views
from graphopt.backends.tvm import scalar
from graphopt.backends.tvm.code import Index, i64
from graphopt.backends.tvm.elementwise import Probe
from graphopt.backends.tvm.expr import Arguments, Expressions
from graphopt.backends.tvm.loops import SMALL, product, vector_loop
from graphopt.backends.tvm.product import operand_index
from graphopt.ir.graph import Value

_LANES = 16  # elements that are computed side by side


@dataclass
class Rows:
    """Element (row, k) lies at ``base + row * step + k``."""

    buffer: Any
    base: Index
    step: Index


def rows_of_bf16(args: Arguments, a: Value, depth: int, tile: int, parallel: bool) -> Rows:
    """The factor ``[..., M, K]`` where it lies, if its elements are those of an input in rows, else copied into scratch.

    All of its axes but the last are rows, counted in its own row-major order.

    Args:
        depth: terms of a row that are read: K, or more of them, which are zeros.
        tile: rows that are read at a time; scratch has whole tiles.
        parallel: whether the rows that are copied are shared among the cores.
    """
    sizes = [args.code.size(d) for d in a.shape[:-1]]
    return (_in_place(args, a, sizes) if depth == a.shape[-1] else None) or _copied(args, a, sizes, depth, tile, parallel)


def _in_place(args: Arguments, a: Value, sizes: Sequence[Index]) -> Rows | None:
    code, source = args.code, behind_views(a)
    if not source.is_input:
        return None
    row, k = tirx.Var(code.fresh("p"), "int64"), tirx.Var(code.fresh("p"), "int64")
    for var, size in ((row, product(code, sizes)), (k, a.shape[-1])):
        code.analyzer.bind(var, tvm.ir.Range.from_min_extent(i64(0), i64(size)))
    *lead, i = code.unflatten(row, sizes)
    probe = Expressions(args, {}, probe=True)
    probe.at(a, operand_index(lead, a, i, k))
    if len(probe.reads) != 1:
        return None
    address = probe.reads[0][1]
    found = list(tvm.sym.detect_linear_equation(address, [row, k])) if not isinstance(address, int) else []
    if len(found) != 3 or not code.equal(found[1], 1):
        return None
    return Rows(args.inputs[source], code.simplify(found[2]), code.simplify(found[0]))


def _copied(args: Arguments, a: Value, sizes: Sequence[Index], depth: int, tile: int, parallel: bool) -> Rows:
    """Zeros stand behind the last element of a row."""
    code, width, m = args.code, int(a.shape[-1]), product(args.code, sizes)
    buffer = code.alloc(code.simplify(code.ceildiv(m, tile) * tile * depth), "uint16", "left")
    probe = Probe(args, {}, a)
    probe([0] * a.type.rank)
    lanes = 1 if probe.scalar_only else _LANES
    work = product(code, [m, depth])
    small = isinstance(work, int) and work < SMALL
    with code.loop(m, "serial" if small or not parallel or m == 1 else "parallel", "r") as r:
        lead = [code.bind_index(i, "i", n) for i, n in zip(code.unflatten(r, sizes), sizes, strict=True)]
        start = code.bind_index(code.simplify(r * depth), "start")

        def element(k: Index) -> None:
            value = Expressions(args, {}).at(a, operand_index(lead[:-1], a, lead[-1], k))
            code.store(buffer, code.simplify(start + k), scalar.store(value, a.dtype))

        vector_loop(code, 0, width, lanes, element)
        with code.loop(depth - width, "serial", "k") as k:
            code.store(buffer, code.simplify(start + width + k), tirx.const(0, "uint16"))
    return Rows(buffer, 0, depth)
