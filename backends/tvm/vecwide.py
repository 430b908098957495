"""Elementary functions of f32 that are computed in f64 and rounded once, vectorized by LLVM: right to the last place, for all inputs.

That is for functions that f32 would need two numbers a value for: f64 holds their digits, and a polynomial no longer than f32's will do.
Coefficients are minimax fits on the reduced ranges, those of sine and cosine from FreeBSD's msun. Everything here is branch-free: both
sides of a selection are computed. ``let`` names an intermediate result that is used more than once.
"""

from __future__ import annotations

import math
from typing import Any

from tvm import tirx

from graphopt.backends.tvm.vecmath import Let, const, fabs, intrinsic, isnan


def _f64(v: float) -> Any:
    return tirx.const(v, "float64")


def _i32(v: int) -> Any:
    return tirx.const(v, "int32")


_TWO_OVER_PI = (0.636619770899415, 1.4681663246252086e-09, 2.2760100671971816e-18, 5.8812147387730434e-27,
                1.0346868700836215e-35, 3.783256351091319e-45, 3.720474878517739e-53)  # in parts of 29 bits  # fmt: skip


def _quarter_turns(let: Let, x: Any) -> tuple[Any, Any]:
    """(n, a) in f64 with x = (4 k + n) pi / 2 + a, |a| <= pi / 4, for f32 of any size.

    A part of 2 / pi times x has no more bits than f64 holds, nor has what is left of it without whole turns; so the sum loses nothing but
    what lies far behind the first digits of the result. Reference: Payne and Hanek, "Radian reduction for trigonometric functions",
    SIGNUM Newsletter 18, 1983.
    """
    wide, turns = let(x.astype("float64")), []
    for part in _TWO_OVER_PI:
        t = let(wide * _f64(part))
        turns.append(let(t - _f64(4.0) * _nearest(t * _f64(0.25))))
    total = turns[0]
    for t in turns[1:]:
        total = total + t
    n = let(_nearest(total))
    rest = turns[0] - n
    for t in turns[1:]:
        rest = rest + t
    return n, let(rest * _f64(1.57079632679489662))


def _nearest(x: Any) -> Any:
    return intrinsic("llvm.nearbyint", "float64", x)


def _polynomial(x: Any, *coefficients: float) -> Any:
    """In f64, highest power first."""
    total = _f64(coefficients[0])
    for c in coefficients[1:]:
        total = intrinsic("llvm.fma", "float64", total, x, _f64(c))
    return total


def _sine_and_cosine(let: Let, a: Any) -> tuple[Any, Any]:
    """Both in f64, right to f32's digits, for |a| <= pi / 4."""
    z = let(a * a)
    s = _polynomial(z, 2.7183114939898219064e-6, -1.98393348360966317347e-4, 8.3333293858894632e-3, -1.6666666641626524e-1)
    c = _polynomial(z, 2.43904487962774090654e-5, -1.38867637746099294692e-3, 4.16666233237390631894e-2, -4.99999997251031003120e-1, 1.0)
    return let(intrinsic("llvm.fma", "float64", let(s * z), a, a)), let(c)


def _turned(let: Let, x: Any, turn: int) -> Any:
    """The sine of x and so many quarter turns."""
    n, a = _quarter_turns(let, x)
    s, c = _sine_and_cosine(let, a)
    quarter = let(tirx.bitwise_and(n.astype("int32") + _i32(turn + 8), _i32(3)))
    value = let(tirx.Select(tirx.EQ(tirx.bitwise_and(quarter, _i32(1)), _i32(1)), c, s).astype("float32"))
    return tirx.Select(quarter >= _i32(2), value * const(-1.0), value)


def sin(let: Let, x: Any) -> Any:
    """Sine, all inputs."""
    return tirx.Select(tirx.EQ(x, const(0.0)), x, _turned(let, x, 0))


def cos(let: Let, x: Any) -> Any:
    """Cosine, all inputs."""
    return _turned(let, x, 1)


def tan(let: Let, x: Any) -> Any:
    """Tangent, all inputs."""
    n, a = _quarter_turns(let, x)
    s, c = _sine_and_cosine(let, a)
    odd = tirx.EQ(tirx.bitwise_and(n.astype("int32"), _i32(1)), _i32(1))
    value = tirx.Select(odd, let(c * _f64(-1.0)), s) / tirx.Select(odd, s, c)
    return tirx.Select(tirx.EQ(x, const(0.0)), x, value.astype("float32"))


_LOG2 = (0.19235933878519512, 0.22195308321368667, 0.2623081892525388, 0.3205988979753252, 0.4121985831111324,
         0.5770780163555853, 0.9617966939259756, 2.8853900817779268)  # 2 / (ln 2 k), odd k from 15 to 1  # fmt: skip
_EXP2 = (1.0178086009239696e-07, 1.3215486790144305e-06, 1.5252733804059838e-05, 0.00015403530393381606, 0.0013333558146428441,
         0.009618129107628477, 0.055504108664821576, 0.2402265069591007, 0.6931471805599453, 1.0)  # ln 2 ** k / k!  # fmt: skip


def pow(let: Let, x: Any, y: Any) -> Any:
    """x**y as in C, all inputs: 2**(y log2 |x|), in f64, as what is before the point of that takes digits from what is behind it."""
    wide, inf = let(fabs(x).astype("float64")), _f64(float("inf"))
    bits = let(tirx.reinterpret("int64", wide))
    n = let(tirx.shift_right(bits - tirx.const(0x3FE6A09E667F3BCD, "int64"), tirx.const(52, "int64")))
    m = let(tirx.reinterpret("float64", bits - tirx.shift_left(n, tirx.const(52, "int64"))))
    f = let((m - _f64(1.0)) / (m + _f64(1.0)))  # log m = 2 artanh f
    log = let(n.astype("float64") + f * _polynomial(let(f * f), *_LOG2))
    log = tirx.Select(tirx.EQ(wide, _f64(0.0)), _f64(-math.inf), tirx.Select(tirx.EQ(wide, inf), inf, log))
    e = let(y.astype("float64") * let(log))
    bounded = let(tirx.min(tirx.max(e, _f64(-1000.0)), _f64(1000.0)))
    whole = let(_nearest(bounded))
    power = tirx.reinterpret("float64", tirx.shift_left(whole.astype("int64") + tirx.const(1023, "int64"), tirx.const(52, "int64")))
    fraction = _polynomial(let(bounded - whole), *_EXP2)
    size = let((fraction * power).astype("float32"))
    size = let(tirx.Select(isnan(e, "float64"), const(math.nan), size))
    integer = let(tirx.EQ(_truncated(y), y))
    half = let(y * const(0.5))
    odd = let(tirx.And(integer, tirx.Not(tirx.EQ(_truncated(half), half))))
    negative = let(tirx.reinterpret("int32", x) < _i32(0))
    value = tirx.Select(tirx.And(negative, odd), size * const(-1.0), size)
    value = tirx.Select(tirx.And(tirx.And(x < const(0.0), tirx.Not(integer)), x > const(-math.inf)), const(math.nan), value)
    value = tirx.Select(isnan(y), y, tirx.Select(isnan(x), x, value))
    one = tirx.Or(tirx.EQ(y, const(0.0)), tirx.EQ(x, const(1.0)))
    one = tirx.Or(one, tirx.And(tirx.EQ(x, const(-1.0)), tirx.EQ(fabs(y), const(math.inf))))
    return tirx.Select(one, const(1.0), value)


def _truncated(x: Any) -> Any:
    return intrinsic("llvm.trunc", "float32", x)
