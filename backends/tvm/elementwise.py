"""Writing values element by element: a loop nest a value, vectorized along the innermost loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import tvm
from tvm import tirx

from graphopt.backends.tvm import scalar
from graphopt.backends.tvm.code import Code, Index, i64
from graphopt.backends.tvm.expr import Arguments, Expressions, Source
from graphopt.backends.tvm.loops import Axis, Tuning, linear_index, merge_axes, run_space, vector_loop
from graphopt.backends.tvm.squares import find_crossing, write_squares
from graphopt.ir import dims
from graphopt.ir.graph import Value

MOST_PARTS = 8  # stretches of an innermost loop; each is a loop of its own
HEAVY = {
    "exp": 4,
    "expm1": 4,
    "elu": 5,
    "tanh": 8,
    "erf": 8,
    "gelu": 8,
    "sigmoid": 6,
    "silu": 6,
    "log": 6,
    "log1p": 8,
    "log2": 6,
    "log10": 6,
    "softplus": 12,
    "mish": 16,
    "pow": 16,
    "sin": 16,
    "cos": 16,
    "tan": 16,
    "asin": 8,
    "acos": 8,
    "atan": 8,
    "atan2": 10,
    "sinh": 8,
    "cosh": 8,
    "asinh": 12,
    "acosh": 12,
    "atanh": 12,
    "erfc": 12,
    "fmod": 10,
    "remainder": 10,
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


def parts_along(args: Arguments, sources: Mapping[Value, Source], value: Value, index_of: Callable[[Index], Sequence[Index]],
                size: Index) -> list[tuple[int, int]]:  # fmt: skip
    """(start, length) of the stretches of an axis within which no join or padding passes from one of its parts to another.

    In a loop over one stretch there is nothing to compare, and elements that lie side by side are read as vectors.

    Args:
        index_of: the value's index at a place of the axis.

    Returns:
        The whole axis as one where it falls into more than ``MOST_PARTS``; nothing where its size is not known.
    """
    code: Code = args.code
    if not isinstance(size, int):
        return []
    place = tirx.Var(code.fresh("p"), "int64")
    code.analyzer.bind(place, tvm.ir.Range.from_min_extent(i64(0), i64(size)))
    probe = Expressions(args, dict(sources), probe=True)
    probe.at(value, index_of(place))
    ends = {0, size}
    for i, end in probe.ends:
        shift = 0 if isinstance(i, int) else code.simplify(_unclamped(i) - place)
        if not isinstance(i, int) and isinstance(shift, int) and isinstance(end, int) and 0 < end - shift < size:
            ends.add(end - shift)
    found = sorted(ends)
    found = found if len(found) <= MOST_PARTS + 1 else [0, size]
    return [(a, b - a) for a, b in pairwise(found)]


def _unclamped(i: Any) -> Any:
    """An index without its bounds, which hold it in one part of a join where another one is read."""
    match i:
        case tirx.Max(a=a, b=tirx.IntImm()) | tirx.Min(a=a, b=tirx.IntImm()):
            return _unclamped(a)
        case tirx.Add(a=a, b=b):
            return _unclamped(a) + _unclamped(b)
        case tirx.Sub(a=a, b=b):
            return _unclamped(a) - _unclamped(b)
    return i


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

    parts = _parts(args, sources, value, axes, index_of, tuning)

    def piece(outer: list[Index], start: Index, length: Index) -> None:
        for first, count in parts or [(start, length)]:
            vector_loop(code, first, count, lanes, lambda i: element([*outer, i][: len(axes)], sources))

    crossing = find_crossing(args, sources, value, axes, index_of, lanes)
    if crossing is not None:
        write_squares(args, sources, axes, crossing, lanes, tuning.parallel, weight_of(value), element)
    else:
        run_space(code, axes, tuning, weight_of(value), piece)


def _parts(args: Arguments, sources: Mapping[Value, Source], value: Value, axes: Sequence[Axis],
           index_of: Callable[[Sequence[Index]], list[Index]], tuning: Tuning) -> list[tuple[int, int]]:  # fmt: skip
    """The stretches of the innermost loop, where a task has all of it; else none."""
    if not axes or not isinstance(axes[-1].size, int) or axes[-1].size > 2 * tuning.chunk:
        return []
    code = args.code
    outer = [tirx.Var(code.fresh("p"), "int64") for _ in axes[:-1]]
    for var, axis in zip(outer, axes, strict=False):
        code.analyzer.bind(var, tvm.ir.Range.from_min_extent(i64(0), i64(axis.size)))
    return parts_along(args, sources, value, lambda i: index_of([*outer, i]), axes[-1].size)


def scratch(args: Arguments, value: Value, dtype: str) -> tuple[Any, Callable[[Sequence[Index]], Index]]:
    """A row-major scratch buffer for a value, and the address of an index in it."""
    code = args.code
    shape = [code.size(d) for d in value.shape]
    buffer = code.alloc(code.size(dims.numel(value.shape)), dtype, "tmp", scope="global")
    return buffer, lambda index: code.flatten(index, shape)
