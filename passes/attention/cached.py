"""attention(q, mul(cast(k), s), ...)  =>  attention(q, dequantize(k, s), ...), k of 8-bit integers

Why: a cache of keys and values as small integers, with a scale a token, is a fraction of what must be read to decode a token; the
attention's kernel makes floats of the integers in registers. Spelled as a product, they would be written as floats first.
When: the product is of integers of 8 bits and a scale that is the same for all elements of a row, and is read, through views, as keys
or values.
Numerics: bitwise.
Reference: Hooper et al., KVQuant, arXiv:2401.18079, on caches of quantized keys and values.
"""

from __future__ import annotations

from graphopt.ir import Value, types
from graphopt.passes.shared import NOT_THIS
from graphopt.rewrite import Match, Numerics, Reject, Rewriter, Rule, pat, value

integers, scale = value("integers"), value("scale")
_VIEWS = ("reshape", "transpose", "broadcast_to", "slice")


class CachedIntegers(Rule):
    """mul(cast(k), s) => dequantize(k, s)"""

    pattern = pat.mul(pat.cast(integers), scale)
    numerics = Numerics.BITWISE

    def check(self, m: Match) -> Reject | None:
        k, s, y = m[integers], m[scale], m.root.results[0]
        if k.dtype not in (types.i8, types.u8) or not s.dtype.is_float or s.dtype != y.dtype or not are_cached(y):
            return NOT_THIS
        return same_in_a_row(s)

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        out: Value = rw.create("dequantize", [m[integers], m[scale]])
        return out


def same_in_a_row(s: Value) -> Reject | None:
    """Whether scales are the same for all elements of a row."""
    return None if s.type.rank == 0 or s.shape[-1] == 1 else Reject("the scales of cached integers differ within a row", s)


def are_cached(v: Value) -> bool:
    """Whether a value is read as an attention's keys or values, through views."""
    todo: list[Value] = [v]
    while todo:
        for user, place in todo.pop().uses:
            if user.op.name == "attention" and place in (1, 2):
                return True
            if user.op.name in _VIEWS:
                todo += user.results
    return False
