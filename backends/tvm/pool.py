"""Reductions over sliding windows: a loop over the outputs, neighbouring ones side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product as combinations
from math import prod
from typing import Any

from tvm import tirx

from graphopt.backends.tvm import scalar
from graphopt.backends.tvm.code import Code, Index, i64
from graphopt.backends.tvm.expr import Arguments, Expressions, Source
from graphopt.backends.tvm.loops import SMALL, Tuning, product, vector_loop
from graphopt.ir.graph import Node, Value

UNROLLED = 32  # taps of a window that are written out; larger windows are looped over


def emit_pool(args: Arguments, sources: Mapping[Value, Source], node: Node, tuning: Tuning,
              sink: Callable[[Sequence[Index], Any], None]) -> None:  # fmt: skip
    """Write loops that compute a max_pool node."""
    code, x, dtype = args.code, node.operands[0], node.result.dtype
    name = scalar.COMPUTE[dtype]
    shape = [code.size(d) for d in node.result.shape]
    first = 1 if node.attrs["channels_last"] else 2  # of the spatial axes
    kernel: tuple[int, ...] = node.attrs["kernel"]
    space = [code.size(d) for d in x.shape[first : first + len(kernel)]]
    lowest = tirx.const(float("-inf"), name)
    steps = product(code, shape[:-1])
    total = product(code, [*shape, prod(kernel)])
    serial = not tuning.parallel or (isinstance(total, int) and total < SMALL)

    def taken(index: Sequence[Index], tap: Sequence[Index]) -> Any:
        at, inside = list(index), []
        for k, (t, n) in enumerate(zip(tap, space, strict=True)):
            stride, padding, dilation = (node.attrs[a][k] for a in ("stride", "padding", "dilation"))
            i = code.simplify(index[first + k] * stride - padding + t * dilation)
            at[first + k] = _clamped(code, i, n) if padding else i
            if padding and dilation > 1:  # else the element clamped to is one of the window's own
                inside += [i64(i) >= i64(0), i64(i) < i64(n)]
        value = Expressions(args, dict(sources)).at(x, at)
        for condition in inside:
            value = tirx.Select(condition, value, lowest)
        return value

    def best(index: Sequence[Index]) -> Any:
        if prod(kernel) <= UNROLLED:
            value = None
            for tap in combinations(*map(range, kernel)):
                new = code.bind(taken(index, tap))
                value = new if value is None else code.bind(scalar.extreme(value, new, node.result.dtype, True))
            return value
        acc = code.alloc(1, name, "acc")
        code.store(acc, 0, lowest)
        with code.loop(prod(kernel), "serial", "tap") as step:
            new = code.bind(taken(index, code.unflatten(step, kernel)))
            code.store(acc, 0, scalar.extreme(code.load(acc, 0), new, node.result.dtype, True))
        return code.bind(code.load(acc, 0))

    with code.loop(steps, "serial" if serial else "parallel", "line") as step:
        lead = [code.bind_index(i, "p", n) for i, n in zip(code.unflatten(step, shape[:-1]), shape[:-1], strict=True)]
        lanes = tuning.lanes if prod(kernel) <= UNROLLED and node.attrs["channels_last"] else 1
        vector_loop(code, 0, shape[-1], lanes, lambda j: sink([*lead, j], best([*lead, j])))


def _clamped(code: Code, i: Index, size: Index) -> Index:
    return code.greatest(code.least(i, size - 1), 0)
