"""Products of few rows by dot products of rows: which regions are for them, and their schedules. Looks at the IR only."""

from __future__ import annotations

import math

from graphopt.autotune.space import Param
from graphopt.backends.forms.prepare import flatten_rows
from graphopt.backends.forms.support import materialized
from graphopt.backends.tvm.tileform import AHEAD
from graphopt.ir import dims, types
from graphopt.ir.dims import Shape
from graphopt.ir.graph import Graph, Value
from graphopt.ir.ops import Trait
from graphopt.target import Target

SUMS = 16  # vectors of partial sums that stay in registers beside their operands
_CHAINS = 4  # vectors of one sum: as many multiplications as are under way at once
_TERMS = 4  # vectors of terms at least, or what is summed across a vector's lanes is the larger part
_COLUMNS = 64  # of a task
_PIECE = 512  # terms of a piece at least
_WORTH = 1 << 15  # elements of the second factor, which are read, that are worth a task


def parts(factor: Value) -> list[Value]:
    """What a factor ``[..., K, N]`` is joined of, side by side; itself where it is no join."""
    join = factor.defined_by("concat")
    return list(join.operands) if join is not None and join.attrs["axis"] % factor.type.rank == factor.type.rank - 1 else [factor]


def sums_of(rows: int, columns: int) -> int:
    """Vectors of one sum, where so many rows and columns are summed side by side."""
    return max(1, min(_CHAINS, SUMS // (rows * columns)))


def lies_by_rows(v: Value, computed: bool = True) -> bool:
    """Whether neighbours along a factor's second last axis, the summed one, are neighbours in an input's memory.

    It is followed through views; where it may be ``computed``, also through what is made element by element of one value, as a cast.
    """
    axis = v.type.rank - 2
    while v.producer is not None and v.producer.operands:
        node, x = v.producer, v.producer.operands[0]
        if node.name == "transpose":
            axis = node.attrs["perm"][axis]
        elif node.name == "broadcast_to":
            axis -= v.type.rank - x.type.rank
            if axis < 0 or x.shape[axis] == 1:
                return False
        elif node.name == "reshape":
            found = _axis_below(x, v, axis)
            if found is None:
                return False
            axis = found
        elif node.name == "slice":
            if node.attrs["axis"] % v.type.rank == axis and node.attrs["step"] != 1:
                return False
        elif computed and node.op.has(Trait.POINTWISE):
            read = [y for y in node.operands if y.type.numel != 1]
            if len(read) != 1 or not dims.same_shape(read[0].shape, v.shape):
                return False
            x = read[0]
        else:
            return False
        v = x
    return v.is_input and (v.type.strides or dims.contiguous_strides(v.shape))[axis] == 1


def _axis_below(x: Value, v: Value, axis: int) -> int | None:
    """The axis of a reshaped value whose step, within it, is that of an axis of the result; None if there is none."""
    size, step = v.shape[axis], dims.numel(v.shape[axis + 1 :])
    for k, d in enumerate(x.shape):
        whole = dims.same(d, size) or (isinstance(d, int) and isinstance(size, int) and size > 0 and d % size == 0)
        if whole and dims.same(dims.numel(x.shape[k + 1 :]), step):
            return k
    return None


def refusal(graph: Graph, t: Target) -> str | None:
    """Why the products of a region of products are not for dot products of rows, or None."""
    flat = flatten_rows(graph)
    nodes = materialized(flat)
    shape, depth = nodes[0].result.shape, nodes[0].operands[0].shape[-1]
    if not isinstance(shape[-2], int) or shape[-2] > t.tile[0]:
        return f"more rows than a tile of {t.tile[0]}, or an unknown number of them"
    if not isinstance(depth, int) or depth < _TERMS * _lanes(flat, t):
        return "too few terms, or an unknown number of them"
    factors = [parts(n.operands[1]) for n in nodes]
    if any(len(f) != 1 for f in factors) and (len(nodes) > 1 or not all(isinstance(v.shape[-1], int) for v in factors[0])):
        return "several products with second factors that are joins, or parts of unknown size"
    if not all(lies_by_rows(v) for f in factors for v in f):
        return "the second factor's rows are not contiguous along the summed axis"
    return None


def params(graph: Graph, t: Target) -> tuple[Param, ...]:
    """The knobs of :class:`~graphopt.backends.tvm.dots.DotsKernel`."""
    flat = flatten_rows(graph)
    node = materialized(flat)[0]
    rows, columns, lanes = int(node.result.shape[-2]), node.result.shape[-1], _lanes(flat, t)
    depth = int(node.operands[0].shape[-1])
    few = isinstance(columns, int) and columns < 4 * t.cores * _COLUMNS
    factor = node.operands[1].type.nbytes()
    near = isinstance(factor, int) and factor <= t.cache[1] * t.cores // 2
    side = max(1, 8 // rows) if near else 1 if rows in (2, 3) else 2  # from memory, few columns are few streams to follow
    width = lanes if few else _COLUMNS
    pieces = _pieces(node.result.shape, depth, width, t)
    return (
        Param("lanes", (lanes,)),
        Param("columns", tuple(dict.fromkeys((width, 8, 16, 32, 64, 128, 256))), "tasks"),
        Param("side", tuple(dict.fromkeys((side, *(s for s in (1, 2, 4, 8) if s * rows <= SUMS)))), "tile"),
        Param("pieces", tuple(dict.fromkeys((pieces, *(p for p in (1, 2, 4, 8, 16) if p == 1 or depth // p >= _PIECE)))), "tasks"),
        Param("ahead", tuple(dict.fromkeys((0 if near else AHEAD, AHEAD, 0, 1024, 2048)))),
        Param("parallel", (True, False), "tasks"),
        *([Param("pairs", (True, False))] if _in_pairs(flat, t) else []),
    )


def _in_pairs(flat: Graph, t: Target) -> bool:
    """Whether there is an instruction for the products: both factors are bf16, and the second one is read as it lies."""
    factors = [v for n in materialized(flat) for v in n.operands]
    seconds = [v for n in materialized(flat) for v in parts(n.operands[1])]
    return t.has("avx512_bf16") and all(v.dtype == types.bf16 for v in factors) and all(lies_by_rows(v, computed=False) for v in seconds)


def _pieces(shape: Shape, depth: int, width: int, t: Target) -> int:
    """Pieces of the depth of a product of such a shape, so that there are two tasks a core, where each is worth its launch."""
    if not all(isinstance(d, int) for d in shape):
        return 1
    *batch, _, columns = (int(d) for d in shape)  # type: ignore[arg-type]
    tasks = math.prod(batch) * -(-columns // width)
    return max(1, min(-(-2 * t.cores // tasks), depth // _PIECE, math.prod(batch) * columns * depth // _WORTH))


def _lanes(flat: Graph, t: Target) -> int:
    return max(1, t.lanes(8 if materialized(flat)[0].result.dtype.bits == 64 else 4))
