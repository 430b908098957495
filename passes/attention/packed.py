"""attention(q, mul(sub(concat(and(k, 15), k >> 4), 8), s), ...)  =>  attention(q, dequantize(unpack_bits(k), s, 8), ...), k of bytes

Why: a cache of two integers a byte, with a scale a token, is an eighth of the f32 one; the attention's kernel takes the bytes apart in
registers. Spelled with shifts and a concatenation, floats would be written first.
When: both halves of the same bytes, the lower ones first, stand side by side (stacked behind the last axis and flattened) or one after
the other (concatenated along it); the same is done to both, casts and whole numbers that are added; nothing wraps around on the way;
and the scale is the same for all elements of a row.
Numerics: bitwise.
Reference: Liu et al., KIVI, arXiv:2402.02750, on caches of few bits.
"""

from __future__ import annotations

from dataclasses import dataclass

from graphopt.ir import Node, Value, dims, types
from graphopt.ir.opset.quantize import SMALL_INTEGERS, integer_range
from graphopt.passes.attention.cached import are_cached, same_in_a_row
from graphopt.passes.shared import NOT_THIS
from graphopt.rewrite import Match, Numerics, Reject, Rewriter, Rule, pat, scalar_of, value

numbers, scale = value("numbers"), value("scale")


@dataclass(frozen=True)
class Half:
    """One half of the bits of each byte: the lower or the upper four, as 0 .. 15 or, signed, -8 .. 7."""

    words: Value
    upper: bool
    signed: bool


@dataclass(frozen=True)
class Packed:
    """Integers of four bits, ``[..., D]``, less ``zero``, from bytes ``[..., D / 2]``.

    Attributes:
        side_by_side: whether the two of a byte are neighbours; else all lower halves stand before all upper ones.
    """

    words: Value
    signed: bool
    zero: int
    side_by_side: bool


class PackedCache(Rule):
    """mul(sub(concat(and(k, 15), k >> 4), 8), s) => dequantize(unpack_bits(k), s, 8)"""

    pattern = pat.mul(numbers, scale)
    numerics = Numerics.BITWISE

    def check(self, m: Match) -> Reject | None:
        y = m.root.results[0]
        if not y.dtype.is_float or m[scale].dtype != y.dtype or not are_cached(y):
            return NOT_THIS
        found = packed(m[numbers])
        return found if isinstance(found, Reject) else same_in_a_row(m[scale])

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        found = packed(m[numbers])
        assert not isinstance(found, Reject)
        words, dtype = found.words, types.i8 if found.signed else types.u8
        q = rw.create("unpack_bits", [words], {"bits": 4, "axis": words.type.rank - 1, "dtype": dtype})
        if not found.side_by_side:
            *lead, size = words.shape
            apart = rw.transpose(rw.reshape(q, shape=(*lead, size, 2)), perm=(*range(len(lead)), len(lead) + 1, len(lead)))
            q = rw.reshape(apart, shape=q.shape)
        zero = [rw.constant(found.zero, dtype)] if found.zero else []
        out: Value = rw.create("dequantize", [q, m[scale], *zero])
        return out


def packed(v: Value) -> Packed | Reject:
    """The bytes that numbers are taken from, or why they are not read as such."""
    joined, steps = _steps(v)
    if joined.defined_by("concat") is None:
        return NOT_THIS
    node = joined.producer
    assert node is not None
    pieces = [p for x in node.operands if (p := _piece(x)) is not None]
    if not pieces:
        return NOT_THIS
    if not len(pieces) == len(node.operands) == 2:
        return Reject("cached numbers are not joined of the two halves of bytes", joined)
    (low, before, offset), (high, before_high, offset_high) = pieces
    if low.words is not high.words:
        return Reject("cached numbers are joined of halves of different bytes", joined)
    if low.signed != high.signed:
        return Reject("one half of cached bytes has a sign, the other one has none", joined)
    if low.upper or not high.upper:
        return Reject("the upper halves of cached bytes stand before the lower ones", joined)
    if offset != offset_high:
        return Reject(f"the halves of cached bytes have different zero points, {-offset} and {-offset_high}", joined)
    words, axis = low.words, node.attrs["axis"] % joined.type.rank
    shapes = [n.result.shape for n in (*before, *before_high) if n.name == "reshape"]
    moves = [n.result.shape for n in steps if n.name == "reshape"]
    twice = (*words.shape[:-1], dims.mul(words.shape[-1], 2))
    stacked = shapes == [(*words.shape, 1)] * 2 and moves == [twice] and axis == words.type.rank
    if not stacked and (shapes or moves or axis != words.type.rank - 1):
        return Reject("the halves of cached bytes are not joined along the last axis", joined)
    first, last = integer_range(types.i8 if low.signed else types.u8, 4)
    total = _offset(steps, first + offset, last + offset)
    if total is None or any(_offset(s, first, last) is None for s in (before, before_high)):
        return Reject("what is added to the halves of cached bytes is no whole number, or wraps around", joined)
    zero = -(total + offset)
    if zero < 0 and not low.signed:
        return Reject(f"the zero point {zero} of cached integers is none of theirs", joined)
    return Packed(words, low.signed, zero, stacked)


def _steps(v: Value) -> tuple[Value, list[Node]]:
    """Up through casts, reshapes, and numbers that are added; the nodes on the way, the first one first."""
    steps: list[Node] = []
    while v.producer is not None:
        node = v.producer
        if node.name in ("cast", "reshape") or (node.name in ("add", "sub") and scalar_of(node.operands[1]) is not None):
            steps.append(node)
            v = node.operands[0]
        else:
            break
    return v, steps[::-1]


def _piece(v: Value) -> tuple[Half, list[Node], int] | None:
    """A half of bytes, what is done to it, and what is added in sum."""
    base, steps = _steps(v)
    half = _half(base)
    return None if half is None else (half, steps, sum(_added(n) or 0 for n in steps))


def _half(v: Value) -> Half | None:
    """x & 15, x >> 4, (x >> 4) & 15, and, of signed bytes, (x << 4) >> 4. A shift is a product with, or a floor division by, 16."""
    if (x := _by(v, "bitwise_and", 15)) is not None:
        words = _by(x, "floor_div", 16)
        found = Half(x, False, False) if words is None else Half(words, True, False)
    elif (x := _by(v, "floor_div", 16)) is not None:
        words = _by(x, "mul", 16)
        signed = x.dtype == types.i8
        found = Half(x, True, signed) if words is None else Half(words, False, True)
        if words is not None and not signed:
            return None
    else:
        return None
    return found if found.words.dtype in SMALL_INTEGERS and found.words.type.rank else None


def _by(v: Value, name: str, number: int) -> Value | None:
    """The other operand of an op with a number."""
    node = v.defined_by(name)
    return node.operands[0] if node is not None and scalar_of(node.operands[1]) == number else None


def _added(node: Node) -> int | None:
    """The whole number that a step adds; None if it adds a broken one."""
    if node.name not in ("add", "sub"):
        return 0
    number = scalar_of(node.operands[1])
    whole = isinstance(number, int | float) and float(number).is_integer()
    return (int(number) if node.name == "add" else -int(number)) if whole else None  # type: ignore[arg-type]


def _offset(steps: list[Node], first: int, last: int) -> int | None:
    """What steps add to each number of ``first .. last``; None if a result is none that its dtype holds."""
    total = 0
    for node in steps:
        step, dtype = _added(node), node.result.dtype
        if step is None:
            return None
        total += step
        low, high = integer_range(dtype, dtype.bits) if dtype.is_integer else (-128, 127)  # floats of 16 bits hold these
        held = dtype.is_integer or (dtype.is_float and dtype.bits >= 16)
        if not held or not low <= first + total <= last + total <= high:
            return None
    return total
