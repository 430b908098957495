"""Rows that a kernel computes when it reads them: elements, each part of a join by itself, and what a row is scaled by, once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tvm
from tvm import tirx

from graphopt.backends.forms.flashform import norms_of
from graphopt.backends.tvm import scalar, vecmath
from graphopt.backends.tvm.code import Index, i64
from graphopt.backends.tvm.elementwise import parts_along
from graphopt.backends.tvm.expr import Arguments, Expressions, Source
from graphopt.backends.tvm.loops import vector_loop
from graphopt.backends.tvm.monoid import Monoid, combine
from graphopt.errors import BuildError
from graphopt.ir import types
from graphopt.ir.graph import Node, Value

F32 = "float32"
_SUM = Monoid.of("sum", types.f32)


def write_row(args: Arguments, value: Value, index: Callable[[Index], Sequence[Index]], lanes: int,
              store: Callable[[Index, Any], None]) -> None:  # fmt: skip
    """Compute a row of queries, keys or values: what normalizes it once, then its elements, each part of a join by itself.

    Args:
        index: the value's index at a column.
        store: what becomes of a column's element.
    """
    norms = norms_of(value)
    known = _statistics(args, norms, value, index, lanes) if norms else {}
    parts = parts_along(args, unknown(norms), value, index, int(value.shape[-1]))
    for first, count in parts:
        vector_loop(args.code, first, count, lanes, lambda d: store(d, Expressions(args, dict(known)).at(value, index(d))))


def unknown(norms: Sequence[Node]) -> dict[Value, Source]:
    """Sources of normalized rows, for probes."""
    return {node.result: lambda _: tirx.const(0.0, F32) for node in norms}


def _statistics(args: Arguments, norms: Sequence[Node], value: Value, index: Callable[[Index], Sequence[Index]],
                lanes: int) -> dict[Value, Source]:  # fmt: skip
    """What a row is scaled by at each ``rms_norm`` on the way to it, computed here; how its elements are read then."""
    code, known = args.code, dict[Value, Source]()
    for n, node in enumerate(norms):
        x = node.operands[0]
        columns, seen, before = int(x.shape[-1]), list[Sequence[Index]](), dict(known)
        column = tirx.Var(code.fresh("d"), "int64")
        code.analyzer.bind(column, tvm.ir.Range.from_min_extent(i64(0), i64(columns)))

        def note(at: Sequence[Index], seen: list[Sequence[Index]] = seen) -> Any:
            seen.append(at)
            return tirx.const(0.0, F32)

        probe = Expressions(args, {**unknown(norms[:n]), node.result: note}, probe=True)
        for later in norms[n + 1 :]:
            probe.sources[later.result] = lambda at, x=later.operands[0], probe=probe: probe.at(x, at)  # type: ignore[misc]
        probe.at(value, index(column))
        row = list(seen[0][:-1])
        varies = any(not isinstance(i, int) and column.name in {v.name for v in tirx.analysis.undefined_vars(i)} for i in row)
        if varies or not all(code.equal(a, b) for at in seen for a, b in zip(row, at[:-1], strict=True)):
            raise BuildError("rows that are normalized are not those of the attention")
        step = lanes if columns % lanes == 0 else 1
        squares = code.alloc(step, F32, "squares")
        with code.loop(step, "vectorized", "v") as v:
            code.store(squares, v, tirx.const(0.0, F32))
        with code.loop(columns // step, "serial", "c") as c, code.loop(step, "vectorized", "v") as v:
            element = code.bind(Expressions(args, before).at(x, [*row, code.simplify(c * step + v)]))
            code.store(squares, v, code.load(squares, v) + element * element)
        mean = code.bind(combine(code, squares, step, step, _SUM) / tirx.const(float(columns), F32))
        root = vecmath.intrinsic("llvm.sqrt", F32, code.bind(mean + tirx.const(node.attrs["eps"], F32)))
        inverse = code.bind(tirx.const(1.0, F32) / root)

        def read(at: Sequence[Index], node: Node = node, inverse: Any = inverse, before: dict[Value, Source] = before) -> Any:
            e = Expressions(args, dict(before))
            y = code.bind(e.at(node.operands[0], at) * inverse)
            for w in node.operands[1:]:
                y = code.bind(y * e.at(w, [at[-1]]))
            return scalar.rounded(y, node.result.dtype)

        known[node.result] = read
    return known
