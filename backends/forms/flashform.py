"""Recognizing an attention, and the schedules of its kernels. Looks at the IR only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from graphopt.autotune.space import Constraint, Knob, Param
from graphopt.backends.forms.support import MOVES, VIEWS
from graphopt.ir import dims, types
from graphopt.ir.dims import Dim
from graphopt.ir.graph import Graph, Node, Value
from graphopt.ir.ops import Trait
from graphopt.ir.opset.attention import Parts, groups, parts
from graphopt.ir.opset.attention_training import GIVEN
from graphopt.target import Target

DTYPES = (types.f32, types.bf16, types.f16)
LEAST = 48  # queries below which splitting keys and values costs more than tiles save
FEW = 8  # query rows that share keys, up to which the kernel for decoding takes them
_WIDTHS = {1: 1.25, 2: 1.05, 3: 1.0, 4: 1.0}  # cost of a query in a register tile of so many vectors: loads beside multiply-adds
_WIDE = {1: 1.25, 2: 1.0, 3: 1.02, 4: 1.05}  # where vectors have 16 elements: two leave the near cache room, and see fewer keys in vain


@dataclass(frozen=True)
class Form:
    """A region around one attention, or its gradient.

    Attributes:
        out: the attention's result; of a gradient, the operand that is the result.
        views: from the attention's result to the region's output, in order.
    """

    node: Node
    parts: Parts[Value]
    out: Value
    views: tuple[Node, ...]
    symbols: Mapping[str, Any]

    @property
    def keeps_lse(self) -> bool:
        """Whether the logarithm of each row's sum is a result, too."""
        return self.node.name == "attention_forward"

    @property
    def queries(self) -> Dim:
        return self.out.shape[-2]

    @property
    def keys(self) -> Dim:
        return self.parts.k.shape[-2]

    @property
    def depth(self) -> int:
        return int(self.parts.q.shape[-1])

    @property
    def width(self) -> int:
        return int(self.parts.v.shape[-1])

    @property
    def batch(self) -> tuple[Dim, ...]:
        """The axes before queries, heads last."""
        return self.out.shape[:-2]

    @property
    def is_local(self) -> bool:
        """Whether a query does not see all keys, whatever mask and bias say."""
        return bool(self.node.attrs["causal"]) or self.node.attrs["window"] is not None

    @property
    def reads_all(self) -> bool:
        """Whether a row that sees no key is the mean of all values: its scores are then all one number."""
        return self.node.attrs["empty"] == "mean" and not self.node.attrs["sinks"]

    @property
    def fill(self) -> float:
        """The score of a key that is not seen."""
        return -1e30 if self.reads_all else float("-inf")

    @property
    def share(self) -> int:
        """Heads of queries that read the same keys and values: by the op's meaning, or because views repeat them."""
        q, k, v = self.parts.q, self.parts.k, self.parts.v
        heads = self.batch[-1] if self.batch else 1
        if not isinstance(heads, int) or min(q.type.rank, k.type.rank, v.type.rank) < 3:
            return 1
        found = [groups(q.shape, x.shape) * repeats(x) for x in (k, v)]
        found = [heads if x.shape[-3] == 1 else n for n, x in zip(found, (k, v), strict=True)]
        return found[0] if found[0] == found[1] and heads % found[0] == 0 else 1


def repeats(v: Value) -> int:
    """How many times ``reshape(broadcast_to(reshape(x)))`` repeats each head of x, ``[..., G, N, D]``; 1 if it is not that."""
    for name in ("reshape", "broadcast_to"):
        if v.producer is None or v.producer.name != name:
            return 1
        wide, v = v, v.producer.operands[0]
        if name == "reshape":
            out = wide
    shape, many = v.shape, wide.shape
    if len(shape) < 4 or shape[-3] != 1 or not isinstance(many[-3], int) or len(out.shape) != len(many) - 1:
        return 1
    same = all(a == b for a, b in zip((*shape[:-3], *shape[-2:]), (*many[:-3], *many[-2:]), strict=True))
    return many[-3] if same and out.shape[-3] == dims.mul(many[-4], many[-3]) else 1


def joined_rows(v: Value) -> Node | None:
    """What joins keys or values ``[..., N, D]`` along their rows: a cache and what is new, say."""
    node = v.producer
    return node if node is not None and node.name == "concat" and node.attrs["axis"] % v.type.rank == v.type.rank - 2 else None


def seen_span(code: Any, form: Form, first: Any, last: Any) -> tuple[Any, Any]:
    """The keys that query rows ``first .. last`` may see by position: from, and up to but not with; sizes by ``code``."""
    attrs, low, high = form.node.attrs, 0, code.size(form.keys)
    if form.reads_all or not form.is_local:
        return low, high
    offset, window = code.size(attrs["offset"]), attrs["window"]
    if attrs["causal"]:
        high = code.least(high, last + offset + 1)
    if window is not None:
        low = code.greatest(first + offset - code.size(window) + 1, 0)
        if not attrs["causal"]:
            high = code.least(high, last + offset + code.size(window))
    return low, code.greatest(high, 0)


def is_norm_of_rows(node: Node) -> bool:
    """Whether a node scales rows by themselves, which a kernel does when it reads them."""
    return node.name == "rms_norm" and node.attrs["axes"] == 1 and isinstance(node.result.shape[-1], int)


def norms_of(value: Value) -> list[Node]:
    """What normalizes the rows that a value is made of, first things first."""
    seen: dict[Value, None] = {}
    found: list[Node] = []

    def visit(v: Value) -> None:
        if v in seen or v.producer is None:
            return
        seen[v] = None
        for x in v.producer.operands:
            visit(x)
        if is_norm_of_rows(v.producer):
            found.append(v.producer)

    visit(value)
    return found


def form_of(graph: Graph) -> Form | str:
    """The form of a region, or why it has none."""
    nodes = [n for n in graph.nodes() if n.name in ("attention", "attention_forward")]
    if len(nodes) != 1 or len(graph.outputs) != len(nodes[0].results):
        return "not one attention with its results"
    (node,) = nodes
    out = node.results[0]
    if out.dtype not in DTYPES:
        return f"an attention of {out.dtype}"
    if node.name == "attention" and node.attrs["dropout"]:
        return "dropout of an attention that is not for training"
    p = parts(node.operands, node.attrs)
    if not all(isinstance(v.shape[-1], int) for v in (p.q, p.v)):
        return "heads of unknown size"
    if any(d == 0 for v in (*node.operands, *node.results) for d in v.shape):
        return "an attention without elements"
    views: list[Node] = []
    v = graph.outputs[0]
    while v.producer is not None and v.producer is not node:
        if v.producer.name not in ("transpose", "reshape"):
            return f"{v.producer.name} after the attention"
        views.append(v.producer)
        v = v.producer.operands[0]
    if v is not out or any(v is not r for v, r in zip(graph.outputs[1:], node.results[1:], strict=True)):
        return "the attention is not the result"
    for n in graph.nodes():
        if n is not node and n not in views and not (n.op.has(Trait.POINTWISE) or n.name in MOVES or is_norm_of_rows(n)):
            return f"{n.name} before the attention"
    return Form(node, p, out, tuple(reversed(views)), graph.symbols)


def gradient_of(graph: Graph) -> Form | str:
    """The form of a region that is the gradient of an attention, or why it is none."""
    nodes = [n for n in graph.nodes() if n.name == "attention_backward"]
    if len(nodes) != 1 or graph.outputs != nodes[0].results:
        return "not one gradient of an attention"
    (node,) = nodes
    p = parts(node.operands[GIVEN:], node.attrs)
    if not all(isinstance(v.shape[-1], int) for v in (p.q, p.v)):
        return "heads of unknown size"
    if any(d == 0 for v in node.operands for d in v.shape):
        return "an attention without elements"
    if any(n is not node and not (n.op.has(Trait.POINTWISE) or n.name in MOVES) for n in graph.nodes()):
        return "a computation before the gradient"
    if node.attrs["bias_gradient"] and p.bias is not None and p.bias.shape[-1] == 1:
        return "the gradient of a bias that is the same for all keys"
    return Form(node, p, node.operands[1], (), graph.symbols)


# --- schedules -----------------------------------------------------------------------------------------------------------


def flash_params(form: Form, t: Target) -> tuple[Param, ...]:
    """The knobs of the tiled kernel: a register tile of keys (or values) by queries, what stays in the cache, and tasks."""
    lanes = max(1, t.lanes(4))
    wide = t.vector_registers >= 32
    vectors = _vectors(form.queries, lanes, wide)
    rows = _rows(vectors, t)
    queries = lanes * vectors
    block = _block(form, queries, rows, t)
    blocks = tuple(dict.fromkeys(max(1, n // rows) * rows for n in (block, 32, 64, 96, 128, 192, 256)))
    return (
        Param("lanes", (lanes,)),
        Param("vectors", tuple(dict.fromkeys((vectors, *((1, 2, 3, 4) if wide else (1, 2))))), "tile"),
        Param("rows", tuple(dict.fromkeys((rows, 4, 6, 8, 12, 14))), "tile"),
        Param("block", blocks, "tile"),
        Param("groups", tuple(dict.fromkeys((_groups(form, queries, t), 1, 2, 4, 8))), "tasks"),
        Param("unroll", (4, 1, 2, 8)),
        Param("stage", (_stages(form), not _stages(form))),
        Param("parallel", (True, False), "tasks"),
    )


def flash_constraints(t: Target) -> tuple[Constraint, ...]:
    registers = t.vector_registers

    def fits(k: Mapping[str, Knob]) -> bool:
        rows, vectors = int(str(k["rows"])), int(str(k["vectors"]))
        return rows * vectors + vectors + 1 <= registers

    def whole(k: Mapping[str, Knob]) -> bool:
        return int(str(k["block"])) % int(str(k["rows"])) == 0

    return (
        Constraint(f"sums, a row of queries and an element need more than {registers} registers", fits),
        Constraint("a block of keys that is not made of whole tiles", whole),
    )


def _vectors(queries: Dim, lanes: int, wide: bool) -> int:
    """Vectors of queries of a register tile: as wide as wastes least."""
    costs = _WIDE if lanes >= 16 else _WIDTHS
    choices = sorted((4, 3, 2, 1) if wide else (2, 1), key=lambda v: (costs[v], -v))
    if not isinstance(queries, int):
        return choices[0]
    return min(choices, key=lambda v: -(-queries // (v * lanes)) * v * costs[v])


def _rows(vectors: int, t: Target) -> int:
    """Rows of a register tile: as many as fit, and no more than hide the time of a multiply-add; each may have a pointer of its own."""
    return min(12 if vectors == 1 else 8, (t.vector_registers - vectors - 1) // vectors // 2 * 2)


def _block(form: Form, queries: int, rows: int, t: Target) -> int:
    """Keys of a block: its scores share the first-level cache with the queries and the values' sums. A mask hides whole blocks: small
    ones, of the size that masks of blocks mostly have."""
    held = t.cache[0] // 2 // (4 * queries)
    if form.parts.mask is not None and not form.reads_all:
        held = min(held, 64)
    keys = form.keys
    if isinstance(keys, int):
        held = min(held, keys)
        held = -(-keys // -(-keys // max(1, held)))  # blocks of the same length
    return max(rows, -(-held // rows) * rows)


def _groups(form: Form, queries: int, t: Target) -> int:
    """Groups of queries that a task takes: they share what is read of keys and values; each core has a few tasks."""
    if not isinstance(form.queries, int):
        return 2
    heads = dims.numel(form.batch)
    count = heads if isinstance(heads, int) else 1
    groups = 4
    while groups > 1 and (groups > form.queries // queries or count * -(-form.queries // (groups * queries)) < 4 * t.cores):
        groups //= 2
    return groups


def _stages(form: Form) -> bool:
    """Whether a block of keys and values is copied first: narrow floats, which are widened once for all queries of a task."""
    return form.out.dtype != types.f32


# --- gradients -----------------------------------------------------------------------------------------------------------


def gradient_params(form: Form, t: Target) -> tuple[Param, ...]:
    """The knobs of the gradient's kernel: as of the tiled kernel, but that two products share the cache."""
    lanes = max(1, t.lanes(4))
    wide = t.vector_registers >= 32
    vectors = _vectors(form.queries, lanes, wide)
    rows = _rows(vectors, t)
    block = max(rows, min(_block(form, lanes * vectors, rows, t), 64 // rows * rows))
    blocks = tuple(dict.fromkeys(max(1, n // rows) * rows for n in (block, 32, 64, 96, 128)))
    return (
        Param("lanes", (lanes,)),
        Param("vectors", tuple(dict.fromkeys((vectors, *((1, 2, 3, 4) if wide else (1, 2))))), "tile"),
        Param("rows", tuple(dict.fromkeys((rows, 4, 6, 8, 12, 14))), "tile"),
        Param("block", blocks, "tile"),
        Param("unroll", (4, 1, 2, 8)),
        Param("parallel", (True, False), "tasks"),
    )


# --- on tiles ------------------------------------------------------------------------------------------------------------


def tiles_refusal(form: Form, t: Target) -> str | None:
    """Why an attention is not for AMX tiles, or None."""
    if not t.f32_thirds:
        return "the target has no AMX tiles"
    if form.out.dtype not in (types.f32, types.bf16):
        return f"an attention of {form.out.dtype}"
    if form.depth % 32 or form.width % 32:
        return "heads that are no multiples of 32"
    least = dims.bounds(form.queries, form.symbols)[0]
    return None if least is not None and least >= LEAST else f"it may have fewer than {LEAST} queries"


def tiles_params(form: Form, t: Target) -> tuple[Param, ...]:
    """The knobs: keys of a block, and groups of 32 queries of a task: many, as keys and values are split for each task."""
    size, queries = form.depth + form.width, form.queries
    groups = max(1, t.cache[1] // 2 // (32 * size * 5))
    if isinstance(queries, int):
        heads = dims.numel(form.batch)
        groups = min(groups, -(-queries // 32))
        least = -(-4 * t.cores // heads) if isinstance(heads, int) else 1  # tasks of a head
        groups = max(min(groups, -(-queries // (32 * least))), min(groups, 4))
    groups = 1 << (groups.bit_length() - 1)
    return (
        Param("block", (128, 64, 96, 192, 256), "tile"),
        Param("groups", tuple(dict.fromkeys((groups, *(n for n in (2, 4, 8, 16, 32))))), "tasks"),
        Param("parallel", (True, False), "tasks"),
    )


# --- few queries ---------------------------------------------------------------------------------------------------------


def decode_refusal(form: Form, t: Target) -> str | None:
    """Why an attention is not for the kernel of few queries, or None."""
    if form.keeps_lse:
        return "it keeps the logarithms of its sums"
    if not isinstance(form.queries, int) or form.queries * form.share > FEW:
        return "more than a few queries"
    if norms_of(form.parts.k) or norms_of(form.parts.v):
        return "keys or values that are normalized on the way"
    return None if _decode_lanes(form, t) >= min(4, t.lanes(4)) else "heads of a size that fills no vectors"


def decode_params(form: Form, t: Target) -> tuple[Param, ...]:
    """The knobs: sums in registers, keys of a block, and parts of the keys that are read in parallel."""
    lanes = _decode_lanes(form, t)
    heads = dims.numel(form.batch)
    own = form.batch[-1] // form.share if form.batch and isinstance(form.batch[-1], int) else 1  # heads of keys
    abreast = own > 1 and positions_first(form.parts.k) and positions_first(form.parts.v)
    tasks = heads // form.share // (own if abreast else 1) if isinstance(heads, int) else 4 * t.cores
    splits = 1 if tasks % t.cores == 0 or tasks >= 4 * t.cores else min(16, -(-4 * t.cores // tasks))
    while isinstance(form.keys, int) and splits > 1 and form.keys < 128 * splits:
        splits //= 2
    integers = _of_integers(form.parts.k)  # less memory to wait for, and more to do
    fit = 16 if integers and t.vector_registers >= 32 else 8  # sums in registers
    keys = max(1, min(lanes, fit // (form.share * int(form.queries))))  # type: ignore[call-overload]
    block = 32 if abreast or integers else 256  # abreast, it is of all heads
    return (
        Param("lanes", (lanes,)),
        Param("sums", (16, 8, 4) if t.vector_registers >= 32 else (8, 4)),
        Param("keys", tuple(dict.fromkeys((1 << (keys.bit_length() - 1), *(n for n in (8, 4, 2, 1, 16) if n <= lanes)))), "tile"),
        Param("block", tuple(dict.fromkeys((block, 32, 64, 128, 256))), "tile"),
        Param("ahead", (3072, 0, 1024, 2048, 4096, 8192)),
        Param("splits", tuple(dict.fromkeys((splits, 1, 2, 4, 8, 16))), "tasks"),
        Param("parallel", (True, False), "tasks"),
        *([Param("abreast", (True, False), "tasks")] if abreast else []),
    )


def _of_integers(v: Value) -> bool:
    """Whether keys or values are integers in memory."""
    while v.producer is not None and v.producer.name in VIEWS:
        v = v.producer.operands[0]
    return v.producer is not None and v.producer.name == "dequantize"


def positions_first(v: Value) -> bool:
    """Whether keys or values ``[..., G, N, D]`` lie in memory with the heads of a position side by side, as far as views tell."""
    if v.type.rank < 3:
        return False
    head, row = v.type.rank - 3, v.type.rank - 2
    while v.producer is not None and v.producer.name in ("transpose", "slice", "dequantize", "unpack_bits"):
        if v.producer.name == "transpose":
            head, row = (v.producer.attrs["perm"][axis] for axis in (head, row))
        elif v.producer.operands[0].type.rank != v.type.rank:
            return False
        v = v.producer.operands[0]
    strides = v.type.strides
    if strides is not None and isinstance(strides[head], int) and isinstance(strides[row], int):
        return strides[head] < strides[row]
    return row < head


def _decode_lanes(form: Form, t: Target) -> int:
    lanes = max(1, t.lanes(4))
    while lanes > 1 and (form.depth % lanes or form.width % lanes):
        lanes //= 2
    return lanes
