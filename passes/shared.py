"""What several passes need: keeping a result's shape, numbers as a dtype holds them, and regions that read other operands."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from graphopt.ir import OPS, Builder, DType, Graph, Trait, Value, dims
from graphopt.ir.graph import Node, copy_nodes, is_view
from graphopt.ir.ops import op
from graphopt.rewrite import Match, Reject, Rewriter, erase_dead, scalar_of

NOT_THIS = Reject("")  # the match is not what the rule is about: nothing to tell

POINTWISE = tuple(name for name, op in OPS.items() if op.has(Trait.POINTWISE))
UNARY = tuple(name for name in POINTWISE if OPS[name].arity == (1, 1))


def shaped(rw: Rewriter, v: Value, m: Match) -> Value:
    """The value, broadcast to the shape of the match's root; the same value if it has that shape."""
    shape = m.root.results[0].shape
    return v if dims.same_shape(v.shape, shape, m.root.graph.symbols) else rw.broadcast_to(v, shape=shape)  # type: ignore[no-any-return]


def same_shape(a: Value, b: Value, m: Match) -> bool:
    """Whether two values are proven to have one shape."""
    return dims.same_shape(a.shape, b.shape, m.root.graph.symbols)


def is_scalar(v: Value) -> bool:
    """Whether a value is a numeric scalar constant (also one that is broadcast)."""
    return scalar_of(v) is not None


def rounded(number: float, dtype: DType) -> float:
    """A number as the dtype holds it; integers wrap around."""
    if dtype.is_integer:
        low = 0 if dtype.kind == "u" else -(1 << (dtype.bits - 1))
        return (int(number) - low) % (1 << dtype.bits) + low
    return torch.tensor(number, dtype=dtype.torch).item()


def is_power_of_two(number: float, dtype: DType) -> bool:
    """Whether multiplying by the number's reciprocal is the same, bit by bit, as dividing by the number."""
    if not dtype.is_float or number == 0 or not math.isfinite(number):
        return False
    limits = torch.finfo(dtype.torch)
    return abs(math.frexp(number)[0]) == 0.5 and limits.tiny <= abs(number) <= 1 / limits.tiny and abs(number) <= limits.max


def is_negative_zero(number: float | complex) -> bool:
    return isinstance(number, float) and number == 0 and math.copysign(1.0, number) < 0


def input_behind_views(v: Value) -> Value | None:
    """The input of a region's body that a value is a view of, or None."""
    while v.producer is not None:
        if not is_view(v.producer):
            return None
        v = v.producer.operands[0]
    return v


def matmuls(fusion: Node) -> list[Node]:
    """The products of a region, in order: one, or two that meet."""
    assert fusion.body is not None
    return [n for n in fusion.body.nodes() if n.op.name == "matmul"]


Make = Callable[[Builder, Sequence[Value]], Value]
"""Builds a value of a region's body from inputs of the body."""


def reread(g: Graph, region: Node, old: Value, operands: Sequence[Value], make: Make, by: Node | None = None) -> Node:
    """Put in a region's place the same one that makes a value of its body from other operands; what no output needs goes.

    Args:
        old: the value, an input of the body or computed there. For an input, all inputs of the same operand if all nodes read anew.
        operands: values of ``g``; those that the region reads already are not given twice. New ones stand where the first input was
            that goes, or behind all.
        make: builds the value from them, in the new body.
        by: the node of the body that reads the new value, while others go on with the old one; None: all.

    Returns:
        The new region.
    """
    body = region.body
    assert body is not None
    olds = _inputs_like(region, old) if by is None else [old]
    live = _live(body, olds, by)
    inputs: list[tuple[Value, Value | None]] = [(x, v) for v, x in zip(body.inputs, region.operands, strict=True) if v in live]
    kept = [x for x, _ in inputs]
    place = next((i for i, v in enumerate(body.inputs) if v not in live), len(inputs))
    inputs[place:place] = [(x, None) for x in dict.fromkeys(operands) if x not in kept]
    hint = body.inputs[place].hint if place < len(body.inputs) else ""
    new, mapping, given = Graph("body", body.symbols), dict[Value, Value](), dict[Value, Value]()
    for x, v in inputs:
        given[x] = new.add_input(v.type, v.hint) if v is not None else new.add_input(x.type.logical, x.hint or hint)
        if v is not None:
            mapping[v] = given[x]
    made = dict.fromkeys(olds, make(Builder(new), [given[x] for x in operands]))
    for node in body.nodes():
        if any(r in live for r in node.results):
            seen = mapping | made if by in (None, node) else mapping
            copy_nodes([node], seen, new)
            mapping |= {r: seen[r] for r in node.results}
    new.set_outputs([(mapping | made if by is None else mapping)[v] for v in body.outputs])
    result = g.create(op("fusion"), [x for x, _ in inputs], region.attrs, before=region, loc=region.loc, body=new)
    for was, now in zip(region.results, result.results, strict=True):
        g.replace(was, now)
    erase_dead(g, region)
    return result


def _inputs_like(region: Node, v: Value) -> list[Value]:
    """The inputs of a region's body that are the same operand as one of them; a value that is computed there, alone."""
    assert region.body is not None
    operands = dict(zip(region.body.inputs, region.operands, strict=True))
    return [x for x, operand in operands.items() if operand is operands[v]] if v in operands else [v]


def _live(body: Graph, olds: Sequence[Value], by: Node | None) -> dict[Value, None]:
    """The values that the outputs depend on, if the old ones are not read."""
    live = dict.fromkeys(body.outputs)
    for node in reversed(list(body.nodes())):
        if any(r in live for r in node.results):
            live |= dict.fromkeys(v for v in node.operands if v not in olds or by not in (None, node))
    return live
