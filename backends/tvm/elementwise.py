"""Writing values element by element: a loop nest a value, vectorized along the innermost loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from graphopt.backends.tvm import scalar
from graphopt.backends.tvm.code import Code, Index
from graphopt.backends.tvm.expr import Arguments, Expressions, Source
from graphopt.backends.tvm.loops import Tuning, linear_index, merge_axes, run_space, vector_loop
from graphopt.backends.tvm.squares import find_crossing, write_squares
from graphopt.ir import dims
from graphopt.ir.graph import Value

HEAVY = {
    "exp": 4,
    "tanh": 8,
    "erf": 8,
    "gelu": 8,
    "sigmoid": 6,
    "silu": 6,
    "log": 6,
    "pow": 16,
    "sin": 16,
    "cos": 16,
    "fmod": 16,
    "remainder": 16,
}


def weight_of(value: Value) -> int:
    """Units of work an element: cheap ops count for little, transcendental ones for more."""
    seen: dict[Value, None] = {}
    stack, total = [value], 4
    while stack:
        v = stack.pop()
        if v in seen or v.producer is None:
            continue
        seen[v] = None
        total += HEAVY.get(v.producer.name, 1)
        stack += v.producer.operands
    return max(1, total // 4)


class Probe:
    """What evaluating a value at an index touches, without emitting it."""

    def __init__(self, args: Arguments, sources: Mapping[Value, Source], value: Value) -> None:
        self.args, self.sources, self.value = args, dict(sources), value
        self.scalar_only = False

    def __call__(self, index: Sequence[Index]) -> list[Any]:
        expressions = Expressions(self.args, self.sources, probe=True)
        expressions.at(self.value, index)
        self.scalar_only = expressions.scalar_only
        return expressions.addresses


def write_value(args: Arguments, sources: Mapping[Value, Source], value: Value, tuning: Tuning, address: Callable[[Sequence[Index]], Index],
                buffer: Any, stored: bool = True, order: Sequence[int] | None = None) -> None:  # fmt: skip
    """Compute a value everywhere and store it.

    Args:
        address: where in the buffer an index of the value lies.
        stored: whether the buffer holds the storage type (an output) or the type of expressions (scratch).
        order: the value's axes, outermost loop first; in memory order, neighbouring lanes write neighbouring places.
    """
    code: Code = args.code
    order = range(value.type.rank) if order is None else order
    shape = [code.size(value.shape[k]) for k in order]
    probe = Probe(args, sources, value)

    def placed(index: Sequence[Index]) -> list[Index]:
        """The value's index from an index in loop order."""
        out: list[Index] = [0] * len(shape)
        for k, i in zip(order, index, strict=True):
            out[k] = i
        return out

    def touched(index: Sequence[Index]) -> list[Any]:
        return [*probe(placed(index)), address(placed(index))]

    axes = merge_axes(code, shape, touched, [0] * len(shape))
    if not axes:
        touched([0] * len(shape))
    lanes = 1 if probe.scalar_only else tuning.lanes

    def index_of(at: Sequence[Index]) -> list[Index]:
        return placed(linear_index(axes, at, len(shape)))

    def element(at: Sequence[Index], known: Mapping[Value, Source]) -> None:
        index = index_of(at)
        result = Expressions(args, dict(known)).at(value, index)
        code.store(buffer, address(index), scalar.store(result, value.dtype) if stored else result)

    def piece(outer: list[Index], start: Index, length: Index) -> None:
        vector_loop(code, start, length, lanes, lambda i: element([*outer, i][: len(axes)], sources))

    crossing = find_crossing(args, sources, value, axes, index_of, lanes)
    if crossing is not None:
        write_squares(args, sources, axes, crossing, lanes, tuning.parallel, weight_of(value), element)
    else:
        run_space(code, axes, tuning, weight_of(value), piece)


def scratch(args: Arguments, value: Value, dtype: str) -> tuple[Any, Callable[[Sequence[Index]], Index]]:
    """A row-major scratch buffer for a value, and the address of an index in it."""
    code = args.code
    shape = [code.size(d) for d in value.shape]
    buffer = code.alloc(code.size(dims.numel(value.shape)), dtype, "tmp", scope="global")
    return buffer, lambda index: code.flatten(index, shape)
