"""Matrix products in their simplest form: a loop over the summed axis, neighbouring columns side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tvm import tirx

from graphopt.backends.tvm import scalar
from graphopt.backends.tvm.code import Index
from graphopt.backends.tvm.expr import Arguments, Expressions, Source
from graphopt.backends.tvm.loops import SMALL, Axis, Tuning, product, vector_loop
from graphopt.ir.graph import Node, Value


def operand_index(index: Sequence[Index], v: Value, row: Index, column: Index) -> list[Index]:
    """Index of a factor: its own leading axes of the batch index (broadcast), then row and column."""
    lead = index[len(index) - (v.type.rank - 2) :] if v.type.rank > 2 else []
    return [*(0 if d == 1 else i for i, d in zip(lead, v.shape[:-2], strict=True)), row, column]


def emit_product(args: Arguments, sources: Mapping[Value, Source], node: Node, tuning: Tuning,
                 sink: Callable[[Sequence[Index], Any], None]) -> None:  # fmt: skip
    """Write loops that compute a matmul node; integers wrap around, floats are summed in f64, one by one."""
    code, (a, b), dtype = args.code, node.operands, node.result.dtype
    *batch, rows, columns = [code.size(d) for d in node.result.shape]
    depth = code.size(a.shape[-1])
    name = "uint8" if dtype.is_bool else "float64" if dtype.is_float else scalar.COMPUTE[dtype]
    outer = [Axis([k], n) for k, n in enumerate([*batch, rows])]
    steps = product(code, [x.size for x in outer])
    total = product(code, [steps, columns, depth])
    small = isinstance(total, int) and total < SMALL
    with code.loop(steps, "serial" if small or not tuning.parallel else "parallel", "row") as step:
        *lead, i = code.unflatten(step, [x.size for x in outer])

        def column(j: Index) -> None:
            acc = code.alloc(1, name, "acc")
            code.store(acc, 0, tirx.const(0, name))
            with code.loop(depth, "serial", "k") as k:
                e = Expressions(args, dict(sources))
                x, y = e.at(a, operand_index(lead, a, i, k)), e.at(b, operand_index(lead, b, k, j))
                held = code.load(acc, 0)
                if dtype.is_bool:
                    code.store(acc, 0, tirx.max(held, tirx.And(x, y).astype("uint8")))
                elif dtype.is_float:
                    code.store(acc, 0, held + x.astype(name) * y.astype(name))
                else:
                    code.store(acc, 0, scalar.wrapping(False, held, scalar.wrapping(True, x, y, dtype), dtype))
            held = code.load(acc, 0)
            held = code.bind(held.astype(scalar.COMPUTE[dtype]) if dtype.is_float else held)
            sink([*lead, i, j], tirx.NE(held, tirx.const(0, "uint8")) if dtype.is_bool else scalar.rounded(held, dtype))

        vector_loop(code, 0, columns, 1, column)
