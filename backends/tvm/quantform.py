"""Recognizing a weight of packed integers, and the schedules of a product of few rows with it. Looks at the IR only."""

from __future__ import annotations

from dataclasses import dataclass

from graphopt.autotune.space import Param
from graphopt.backends.forms.prepare import expand_rows, flatten_rows
from graphopt.backends.forms.support import is_materialized, materialized
from graphopt.backends.tvm.pairform import packed_pairs
from graphopt.ir import dims, types
from graphopt.ir.graph import Graph, Value
from graphopt.ir.types import DType
from graphopt.target import Target

_AHEAD = 3072  # bytes: lines 4 KiB apart compete for a place in the first-level cache
_AHEAD_OF_DOTS = 10240  # with a third of the instructions, the processor itself looks as much further over them
MOST_ROWS = 8  # with more rows, floats are made of a panel once for all of them


@dataclass(frozen=True)
class Quantized:
    """The second factor ``[K, N]`` of a product as integers in panels, behind the views that the packing pass writes.

    Attributes:
        integers: ``[P, K, width]``; of fewer bits than 8, words of several rows, ``[P, K * bits / 32, width]``; of bf16,
            ``[P, K / 2, width, 2]``.
        scales: ``[P, groups, width]``, or None for bf16; ``zeros``: of the same shape, integers, or None.
        depth: rows that the packed form has, a multiple of what a word holds; those beyond K are to be multiplied by zero.
        group: rows of a group; of the only one, all of them.
        signed: whether the integers are.
        floats: their dtype, if they are floats of 8 or 16 bits instead.
    """

    integers: Value
    scales: Value | None
    zeros: Value | None
    bits: int
    signed: bool
    depth: int
    groups: int
    group: int
    floats: DType | None = None

    @property
    def width(self) -> int:
        return int(self.integers.shape[2])

    @property
    def panels(self) -> int:
        return int(self.integers.shape[0])

    @property
    def chains(self) -> int:
        """Sums that a row has under way: of an exact weight one for each element of a word."""
        return 2 if self.bits == 16 else 1

    @property
    def per_word(self) -> int:
        """Integers, of neighbouring rows, in an element."""
        return 1 if self.bits == 8 else 32 // self.bits


def quantized(v: Value) -> Quantized | None:
    """The packed form of a factor ``[K, N]``, or None if it has none."""
    if v.type.rank != 2 or not dims.is_static(v.shape):
        return None
    k, n = (int(d) for d in v.shape)
    cut = v.defined_by("slice")
    if cut is not None and (cut.attrs["axis"], cut.attrs["start"], cut.attrs["step"]) == (0, 0, 1):
        v = cut.operands[0]
    merged = v.defined_by("reshape")
    node = (merged.operands[0] if merged is not None else v).defined_by("dequantize")
    if node is None or node.result.dtype != types.f32:
        return None
    parts = [_panels(x, n) for x in node.operands]
    if any(p is None for p in parts):
        return None
    values = [p for p in parts if p is not None]
    q = node.operands[0]
    unpack = values[0].defined_by("unpack_bits")
    integers = unpack.operands[0] if unpack is not None else values[0]
    depth, groups = int(values[0].shape[1]), int(values[1].shape[1])
    group = int(q.shape[1]) if merged is not None else depth
    shaped = q.shape == ((groups, group, n) if merged is not None else (depth, n)) and (merged is None or groups > 1)
    plain = all(x.is_input and x.type.strides is None for x in (integers, *values[1:]))
    word = types.i32 if unpack is not None else q.dtype
    if not shaped or not plain or integers.dtype != word or groups * group > depth or k > groups * group:
        return None
    if any(x.shape != (integers.shape[0], groups, integers.shape[2]) for x in values[1:]) or values[1].dtype != types.f32:
        return None
    if unpack is not None and (unpack.attrs["axis"] != 1 or group % (32 // unpack.attrs["bits"])):
        return None
    zeros = values[2] if len(values) == 3 else None
    if zeros is not None and zeros.dtype not in (types.i8, types.u8):
        return None
    bits = unpack.attrs["bits"] if unpack is not None else 8
    floats = q.dtype if q.dtype.is_float else None
    return Quantized(integers, values[1], zeros, bits, q.dtype.kind == "i", depth, groups, group, floats)


def stored(v: Value) -> Quantized | None:
    """A factor ``[K, N]`` that a kernel of few rows makes f32 of in registers: packed integers, or bf16 in pairs; None if it is neither."""
    pairs = packed_pairs(v)
    if pairs is None or pairs.dtype != types.bf16:
        return quantized(v)
    depth = 2 * int(pairs.shape[1])
    return Quantized(pairs, None, None, 16, True, depth, 1, depth, types.bf16)


def _panels(v: Value, n: int) -> Value | None:
    """The panels ``[P, rows, width]`` that a value's rows of ``n`` columns are read from: slice(reshape(transpose(panels)))."""
    while v.producer is not None and v.producer.name in ("reshape", "slice"):
        node, v = v.producer, v.producer.operands[0]
        if node.name == "slice" and (node.attrs["start"] != 0 or node.attrs["step"] != 1):
            return None
        if node.name == "reshape" and v.defined_by("transpose") is None and node.result.shape[-1] != n:
            return None
    view = v.defined_by("transpose")
    if view is None or view.attrs["perm"] != (1, 0, 2) or view.result.type.rank != 3 or not dims.is_static(view.result.shape):
        return None
    panels = view.operands[0]
    return panels if (int(panels.shape[0]) - 1) * int(panels.shape[2]) < n <= int(panels.shape[0]) * int(panels.shape[2]) else None


def panel_width(graph: Graph) -> int:
    """Columns of the panels of the first product's quantized factor; 0 if it has none."""
    for node in graph.nodes():
        if node.name == "matmul":
            form = quantized(node.operands[1])
            return form.width if form is not None else 0
    return 0


def refusal(graph: Graph, t: Target) -> str | None:
    """Why a region of products is not for the kernel that makes floats in registers, or None."""
    flat = flatten_rows(expand_rows(graph))
    for node in flat.nodes():
        if not is_materialized(node):
            continue
        form = stored(node.operands[1])
        if form is None or node.operands[0].dtype != types.f32:
            return "the second factor is not of packed integers, or the first not of f32"
        *batch, rows, _ = node.result.shape
        if any(d != 1 for d in batch) or not isinstance(rows, int) or rows > MOST_ROWS:
            return f"more than {MOST_ROWS} rows, or unknown ones"
        if node.result.dtype != types.f32 or form.width % t.lanes(4):
            return f"a product of {node.result.dtype}, or panels of {form.width} columns"
    return None


def params(graph: Graph, t: Target) -> tuple[Param, ...]:
    """The knobs: vectors of a panel that are summed at once, rows of 8-bit integers at a time, bytes that are fetched ahead.

    ``dots``: whether one row's products are summed by dot instructions of bytes; ``unroll`` and ``table`` do not count then.
    """
    flat = flatten_rows(expand_rows(graph))
    node = next(n for n in flat.nodes() if n.name == "matmul")
    form = stored(node.operands[1])
    assert form is not None
    lanes, rows = t.lanes(4), int(node.result.shape[-2])
    vectors = [v for v in (4, 2, 1) if form.width % (v * lanes) == 0]
    fits = [v for v in vectors if rows * form.chains * v + v + 2 <= t.vector_registers] or [1]
    return (
        Param("lanes", (lanes,)),
        Param("vectors", tuple(dict.fromkeys((fits[0], *fits)))),
        Param("unroll", (4, 8, 2, 16)),
        Param("table", (lanes == 16 and t.has("avx512f"), False)),
        Param("ahead", tuple(dict.fromkeys((_AHEAD_OF_DOTS if dots(graph, t) else _AHEAD, 0, 1024, 2048, _AHEAD, 6144, _AHEAD_OF_DOTS)))),
        Param("parallel", (True, False)),
        *([Param("dots", (True, False))] if dots(graph, t) else []),
    )


def dots(graph: Graph, t: Target) -> bool:
    """Whether a row's products may be summed by dot instructions of bytes."""
    nodes = [n for n in flatten_rows(expand_rows(graph)).nodes() if n.name == "matmul"]
    if not (t.has("avx512_vnni") and t.has("avx512f") and t.has("avx512bw")) or any(n.result.shape[-2] != 1 for n in nodes):
        return False
    forms = [quantized(n.operands[1]) for n in nodes]
    return all(f is not None and f.bits < 8 and (f.groups == 1 or f.group % 16 == 0) for f in forms)  # spans of whole vectors


# --- many rows, on tiles -------------------------------------------------------------------------------------------------

_DEEPEST = 1 << 16  # elements of a sum of products of bytes that i32 holds
_STEP = 64  # of the summed axis, of one tile product
_TILE = 16  # rows


def tiles_refusal(graph: Graph, t: Target) -> str | None:
    """Why a region of products is not for tiles of integers, or None."""
    if t.int8_products != "amx":
        return "the target has no AMX tiles of integers"
    nodes = materialized(graph)
    for node in nodes:
        form = quantized(node.operands[1])
        if form is None or form.bits != 8 or form.floats is not None or form.groups != 1 or form.zeros is not None or not form.signed:
            return "the second factor is not of 8-bit integers with a scale a column"
        if node.result.dtype != types.f32 or node.operands[0].dtype != types.f32 or form.width != 64:
            return f"a product of {node.result.dtype}, or panels of {form.width} columns"
        if form.depth % _STEP or form.depth > _DEEPEST or node.operands[0].shape[-1] != form.depth:
            return f"a summed axis that is no multiple of {_STEP}, or one of more than {_DEEPEST}"
    least = dims.bounds(dims.numel(nodes[0].result.shape[:-1]), graph.symbols)[0]
    return None if least is not None and least > MOST_ROWS else f"it may have {MOST_ROWS} rows or fewer"


def tiles_params(graph: Graph, t: Target) -> tuple[Param, ...]:
    """The knobs: row tiles, and panels, of a task."""
    node = next(n for n in graph.nodes() if is_materialized(n))
    form, rows = quantized(node.operands[1]), dims.numel(node.result.shape[:-1])
    assert form is not None
    tiles = -(-rows // _TILE) if isinstance(rows, int) else 8
    group = -(-tiles // -(-tiles // 8))
    share = -(-form.panels // max(1, 2 * t.cores // -(-tiles // group)))
    return (
        Param("group", tuple(dict.fromkeys((group, 4, 8, 16, 2))), "tasks"),
        Param("panels", tuple(dict.fromkeys((share, 1, 2, 4, 8))), "tasks"),
        Param("parallel", (True, False), "tasks"),
    )
