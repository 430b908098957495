"""Whether an attention stays whole, as one tiled kernel, or is expanded into two products and a softmax.

The kernel reads queries, keys and values once and keeps no scores; it computes what the positions leave to be seen, but fills its
lanes with queries: where there are few of them, lanes stay empty. The expansion writes the scores, and goes over them three times
more. Both are estimated in cycles, and the less wrong choice at the worse end of symbolic sizes is taken.
"""

from __future__ import annotations

from dataclasses import dataclass

from graphopt.ir import dims, types
from graphopt.ir.graph import Node
from graphopt.ir.opset.attention import groups, parts, seen_pairs
from graphopt.ir.opset.attention_training import GIVEN
from graphopt.passes.fusion.cost import CLOCK, LAUNCH, CostModel
from graphopt.rewrite import scalar_of
from graphopt.target import Target

FEW = 8  # query rows that share keys, up to which a kernel reads the keys once, without filling lanes with queries
_EXP = 22.0  # vector instructions for a weight: exponential, maximum, sum
_LANES_SUM = 12.0  # instructions to add the lanes of a vector, where a score is a product of two rows
_LANES_SUMS = 4.0  # the same, where those of many vectors are added at once
_REACH = 0.65  # share of the peak that both forms' products reach
FLOATS = (types.f32, types.bf16, types.f16)


@dataclass(frozen=True)
class Choice:
    """Whether an attention stays whole, and why."""

    whole: bool
    why: str


def choose(node: Node, costs: CostModel) -> Choice:
    """Decide for one attention."""
    if (reason := unfit(node)) is not None:
        return Choice(False, reason)
    if node.result.dtype != types.f32:
        return Choice(True, f"scores stay f32 in one kernel, and are rounded to {node.result.dtype} between two products")
    kernel, apart = _whole(node, costs), _expanded(node, costs)
    lost = [k - a for k, a in zip(kernel, apart, strict=True)]
    whole = max(lost) <= max(-x for x in lost)
    k, a = max(zip(kernel, apart, strict=True), key=lambda p: abs(p[0] - p[1]))
    return Choice(whole, f"one kernel takes about {_time(k)}, two products and a softmax {_time(a)}")


def unfit(node: Node) -> str | None:
    """Why no kernel takes an attention whole, whatever it costs; None if one does."""
    if node.result.dtype not in FLOATS:
        return f"no kernel takes an attention of {node.result.dtype}"
    if node.attrs["dropout"]:
        return "dropout is in the kernels for training alone"
    p = parts(node.operands, node.attrs)
    if not all(isinstance(v.shape[-1], int) for v in (p.q, p.v)):
        return "no kernel takes heads of unknown size"
    if any(d == 0 for v in (*node.operands, node.result) for d in v.shape):
        return "it has no elements"
    return None


def untrainable(node: Node, target: Target | None) -> str | None:
    """Why no kernel of the target takes an attention for training whole; None if one does."""
    p = parts(node.operands[GIVEN:] if node.name == "attention_backward" else node.operands, node.attrs)
    if not all(isinstance(v.shape[-1], int) for v in (p.q, p.v)):
        return "no kernel takes heads of unknown size"
    if any(d == 0 for v in (*node.operands, *node.results) for d in v.shape):
        return "it has no elements"
    if node.attrs.get("bias_gradient") and p.bias is not None:
        if p.bias.shape[-1] == 1:
            return "no kernel gives the gradient of a bias that is the same for all keys"
        if p.bias.dtype != types.f32 and (target is None or not target.is_gpu):
            return "no kernel of a CPU gives the gradient of a bias that is of halves"
    return None


def _whole(node: Node, costs: CostModel) -> tuple[float, float]:
    """Cycles of the tiled kernel, where sizes are least and largest."""
    p, t = parts(node.operands, node.attrs), costs.target
    queries, keys = node.result.shape[-2], p.k.shape[-2]
    heads, seen = costs.amount(dims.numel(node.result.shape[:-2])), _seen(node, costs)
    size, lanes = int(p.q.shape[-1]) + int(p.v.shape[-1]), t.lanes(4)
    share = groups(p.q.shape, p.k.shape)
    read = costs.traffic((p.q, p.k, p.v, node.result)).time
    out = []
    for m, n, h, s, r in zip(costs.amount(queries), costs.amount(keys), heads, seen, read, strict=True):
        few = m * share <= FEW and size % (2 * lanes) == 0
        filled = 1.0 if few else max(1.0, -(-m // lanes) * lanes / max(m, 1.0)) * (1.2 if m <= lanes else 1.0)
        scores = h * m * n * s * filled
        multiply = 2 * scores * size / (t.flops_per_cycle * _REACH)
        if few:  # vectors run along the size of a head: a sum over lanes for each score
            multiply += scores * _LANES_SUMS / t.pipes
        out.append(max((multiply + scores * _EXP / (lanes * t.pipes)) / t.cores, r) + LAUNCH)
    return out[0], out[1]


def _expanded(node: Node, costs: CostModel) -> tuple[float, float]:
    """Cycles of two products, and of a softmax between them."""
    p, t = parts(node.operands, node.attrs), costs.target
    shape = (*node.result.shape[:-1], p.k.shape[-2])
    size, count = int(p.q.shape[-1]) + int(p.v.shape[-1]), costs.amount(dims.numel(shape))
    passes = costs.moved(dims.mul(dims.numel(shape), node.result.dtype.itemsize))
    read = costs.traffic((p.q, p.k, p.v, node.result)).time
    rows = node.result.shape[-2]
    few = isinstance(rows, int) and rows <= FEW
    out = []
    for n, moved, r in zip(count, passes, read, strict=True):
        multiply = 2 * n * size / (t.flops_per_cycle * _REACH * t.cores)
        if few:
            multiply += n * _LANES_SUM / (t.pipes * t.cores)
        work = n * _EXP / (t.lanes(4) * t.pipes * t.cores)
        out.append(max(multiply + work + 4 * moved, r) + 3 * LAUNCH)
    return out[0], out[1]


def _seen(node: Node, costs: CostModel) -> tuple[float, float]:
    """The share of all scores that the positions leave."""
    queries, keys = node.result.shape[-2], parts(node.operands, node.attrs).k.shape[-2]
    if not (isinstance(queries, int) and isinstance(keys, int)):
        half = 0.5 if node.attrs["causal"] else 1.0
        return half, half
    share = costs.amount(seen_pairs(node.attrs, queries, keys))
    total = max(1, queries * keys)
    return min(1.0, share[0] / total), min(1.0, share[1] / total)


def _time(cycles: float) -> str:
    s = cycles / CLOCK
    return f"{s * 1e3:.2g} ms" if s >= 1e-4 else f"{s * 1e6:.2g} us"


def view_of_attention(node: Node) -> bool:
    """Whether a view is the last of those that an attention's result goes through on its own: the kernel writes what it shows."""
    if node.op.name not in ("transpose", "reshape"):
        return False
    users = node.results[0].users
    if len(users) == 1 and users[0].op.name in ("transpose", "reshape") and node.results[0].has_one_use:
        return False
    source = node.operands[0]
    while source.has_one_use and source.producer is not None and source.producer.op.name in ("transpose", "reshape"):
        source = source.producer.operands[0]
    return source.has_one_use and source.producer is not None and source.producer.op.name == "attention"


def reads_rows(node: Node) -> bool:
    """Whether the kernel reads an attention's keys or values through a node: integers with a scale a row, several of them in a word, or
    pages by a table."""
    users = [node]
    while users:
        user = users.pop()
        for reader, place in user.results[0].uses:
            if (reader.op.name == "attention" and place not in (1, 2)) or reader.op.name == "concat":  # joined rows are read as they are
                return False
            users += [reader] if reader.op.name in ("reshape", "transpose", "broadcast_to", "slice", "dequantize", "unpack_bits") else []
    if node.op.name in ("take", "unpack_bits"):
        whole = node.attrs["axis"] % node.operands[0].type.rank == node.operands[0].type.rank - 1
        return whole == (node.op.name == "unpack_bits")
    if node.op.name != "dequantize" or any(scalar_of(zero) is None for zero in node.operands[2:]):
        return False
    scale = node.operands[1]
    return scale.type.rank == 0 or scale.shape[-1] == 1
