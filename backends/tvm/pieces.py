"""Writing outputs; what is joined or padded piece by piece: each part by loops of its own, without a test an element."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from graphopt.backends.tvm import scalar
from graphopt.backends.tvm.code import Code, Index
from graphopt.backends.tvm.elementwise import Probe, parts_along, write_value
from graphopt.backends.tvm.expr import Arguments, Expressions, Source
from graphopt.backends.tvm.loops import SMALL, Axis, Tuning, product, run_space, vector_loop
from graphopt.ir.graph import Node, Value

FEW = 16  # parts that are loop nests wherever they lie
MOST = 64  # parts that are loop nests where that leaves the work divided among the cores
ROWS = 8  # rows that are enough to spread over the cores
Address = Callable[[Sequence[Index]], Index]


def write_output(args: Arguments, sources: Mapping[Value, Source], k: int, tuning: Tuning, value: Value | None = None) -> None:
    """Compute output k of the region, or another value of its shape, and store it in the caller's tensor."""
    strides = args.output_strides(k)

    def address(index: Sequence[Index]) -> Index:
        at: Index = 0
        for i, s in zip(index, strides, strict=True):
            at = at + i * s
        return args.code.simplify(at)

    order = list(range(len(strides)))
    if all(isinstance(s, int) for s in strides):
        order.sort(key=lambda axis: -strides[axis])  # stable: axes of one stride stay in place
    write_pieces(args, sources, args.graph.outputs[k] if value is None else value, tuning, address, args.outputs[k], order)


def in_pieces(value: Value, sources: Mapping[Value, Source]) -> bool:
    """Whether a value is a join or a padding that is computed in place."""
    node = value.producer
    return value not in sources and node is not None and (node.name == "pad" or (node.name == "concat" and _by_parts(node)))


def _by_parts(join: Node) -> bool:
    """Whether each part of a join is to be written by a loop of its own: parts of rows share a loop over rows, others have to be large
    enough to be divided among the cores, or all of them too small for that."""
    if len(join.operands) <= FEW:
        return True
    whole, parts = join.result.type, [x.type.numel for x in join.operands]
    rows = join.attrs["axis"] % whole.rank == whole.rank - 1
    divided = all(isinstance(n, int) and n >= SMALL for n in parts) or (isinstance(whole.numel, int) and whole.numel < SMALL)
    return len(join.operands) <= MOST and (rows or divided)


def write_pieces(args: Arguments, sources: Mapping[Value, Source], value: Value, tuning: Tuning, address: Address, buffer: Any,
                 order: Sequence[int]) -> None:  # fmt: skip
    """As :func:`~graphopt.backends.tvm.elementwise.write_value`, into an output; parts that are joins themselves are divided, too."""
    if not in_pieces(value, sources):
        return write_value(args, sources, value, tuning, address, buffer, order=order)
    node, code = value.producer, args.code
    assert node is not None
    last = order[-1] if order else 0
    rows = product(code, [code.size(value.shape[k]) for k in order[:-1]])
    together = not isinstance(rows, int) or rows >= ROWS  # of one row, all parts are written by one loop
    if node.name == "concat":
        axis, start = node.attrs["axis"] % value.type.rank, 0
        parts: list[tuple[Index, Value]] = []
        for x in node.operands:
            if x.shape[axis] != 0:
                parts.append((start, x))
            start = start + code.size(x.shape[axis])
        if axis == last and together:
            return _write_rows(args, sources, node, [(s, code.size(x.shape[axis]), x) for s, x in parts], tuning, address, buffer, order)
        for s, x in parts:
            low = [s if k == axis else 0 for k in range(value.type.rank)]
            write_pieces(args, sources, x, tuning, _shifted(code, address, low), buffer, order)
        return None
    x = node.operands[0]
    low, high = ([code.size(d) for d in node.attrs[side]] for side in ("low", "high"))
    inner, full = ([code.size(d) for d in v.shape] for v in (x, value))
    margins = [k for k in range(len(full)) if not (low[k] == 0 and high[k] == 0)]
    by_rows = together and margins[-1:] == [last] and all(d != 0 for d in x.shape)
    if by_rows:
        outside = _shifted(code, address, [0 if k == last else n for k, n in enumerate(low)])
        spans = [(0, low[last], None), (low[last], inner[last], x), (low[last] + inner[last], high[last], None)]
        _write_rows(args, sources, node, spans, tuning, outside, buffer, order)
    elif all(d != 0 for d in x.shape):
        write_pieces(args, sources, x, tuning, _shifted(code, address, low), buffer, order)
    for k in margins[:-1] if by_rows else margins:
        for start, length in ((0, low[k]), (low[k] + inner[k], high[k])):
            if not (isinstance(length, int) and length == 0):
                box = [*inner[:k], length, *full[k + 1 :]]
                shifted = _shifted(code, address, [*low[:k], start, *[0] * (len(full) - k - 1)])
                _fill(args, node, box, tuning, shifted, buffer, order)
    return None


def _write_rows(args: Arguments, sources: Mapping[Value, Source], node: Node, spans: Sequence[tuple[Index, Index, Value | None]],
                tuning: Tuning, address: Address, buffer: Any, order: Sequence[int]) -> None:  # fmt: skip
    """All spans (start, length, value, or None for a padding's number) of each row, along the innermost loop."""
    code, dtype = args.code, node.result.dtype
    held = next(x for _, _, x in spans if x is not None)
    shape = [code.size(held.shape[k]) for k in order[:-1]]
    work = product(code, [*shape, code.size(node.result.shape[order[-1]])])
    kind = "parallel" if tuning.parallel and not (isinstance(work, int) and work < SMALL) else "serial"
    with code.loop(product(code, shape), kind, "row") as row:
        at = [code.bind_index(i, "o", n) for i, n in zip(code.unflatten(row, shape), shape, strict=True)]
        for start, length, value in spans:
            if isinstance(length, int) and length == 0:
                continue

            def index_of(i: Index) -> list[Index]:
                index: list[Index] = [0] * len(order)
                for axis, place in zip(order, [*at, i], strict=True):
                    index[axis] = place
                return index

            def element(i: Index, start: Index = start, value: Value | None = value) -> None:
                index = index_of(i)
                if value is None:
                    result = scalar.constant(node.attrs["value"], dtype)
                else:
                    result = Expressions(args, dict(sources)).at(value, index)
                there = [code.simplify(i + start) if k == order[-1] else place for k, place in enumerate(index)]
                code.store(buffer, address(there), scalar.store(result, dtype))

            lanes, stretches = tuning.lanes, [(0, length)]
            if value is not None:
                probe = Probe(args, sources, value)
                probe([0] * len(order))
                lanes = 1 if probe.scalar_only else lanes
                stretches = parts_along(args, sources, value, index_of, length) or stretches
            for first, count in stretches:
                vector_loop(code, first, count, lanes, element)


def _shifted(code: Code, address: Address, low: Sequence[Index]) -> Address:
    return lambda index: address([code.simplify(i + s) for i, s in zip(index, low, strict=True)])


def _fill(args: Arguments, node: Node, box: Sequence[Index], tuning: Tuning, address: Address, buffer: Any, order: Sequence[int]) -> None:
    """Write a padding's number into a box."""
    code, dtype = args.code, node.result.dtype
    fill = scalar.store(scalar.constant(node.attrs["value"], dtype), dtype)

    def piece(outer: list[Index], begin: Index, count: Index) -> None:
        def store(i: Index) -> None:
            index: list[Index] = [0] * len(box)
            for axis, at in zip(order, [*outer, i], strict=True):
                index[axis] = at
            code.store(buffer, address(index), fill)

        vector_loop(code, begin, count, tuning.lanes, store)

    run_space(code, [Axis([axis], box[axis]) for axis in order], tuning, 1, piece)
