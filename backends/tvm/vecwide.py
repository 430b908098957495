"""Elementary functions of f32 that are computed in f64 and rounded once, vectorized by LLVM: right to the last place, for all inputs.

That is for functions that f32 would need two numbers a value for: f64 holds their digits, and a polynomial no longer than f32's will do.
Coefficients are minimax fits on the reduced ranges, those of sine and cosine from FreeBSD's msun. Everything here is branch-free: both
sides of a selection are computed. ``let`` names an intermediate result that is used more than once.
"""

from __future__ import annotations

import math
from typing import Any

from tvm import tirx

from graphopt.backends.tvm.vecmath import Let, const, copysign, fabs, intrinsic, isnan


def _f64(v: float) -> Any:
    return tirx.const(v, "float64")


def _i32(v: int) -> Any:
    return tirx.const(v, "int32")


def _magnitude(let: Let, x: Any) -> Any:
    return let(fabs(x).astype("float64"))


def _signed(magnitude: Any, x: Any) -> Any:
    """A magnitude in f64 as f32, with the sign of x."""
    return copysign(magnitude.astype("float32"), x)


def _is_negative(let: Let, x: Any) -> Any:
    """Of -0 and of nan, too, by the sign."""
    return let(tirx.reinterpret("int32", x) < _i32(0))


def _nearest(x: Any) -> Any:
    return intrinsic("llvm.nearbyint", "float64", x)


def _root(x: Any) -> Any:
    return intrinsic("llvm.sqrt", "float64", x)


def _polynomial(x: Any, *coefficients: float) -> Any:
    """In f64, highest power first."""
    total = _f64(coefficients[0])
    for c in coefficients[1:]:
        total = _fma(total, x, _f64(c))
    return total


def _fma(a: Any, b: Any, c: Any) -> Any:
    return intrinsic("llvm.fma", "float64", a, b, c)


def _power_of_two(n: Any) -> Any:
    """2**n for a whole n in f64 within the normal exponents: a sum with so much has n and the exponent's bias in its low bits."""
    return tirx.reinterpret("float64", tirx.shift_left(tirx.reinterpret("int64", n + _f64(1.5 * 2.0**52 + 1023.0)), _i64(52)))


def _octave(let: Let, x: Any) -> tuple[Any, Any]:
    """(n, m) with x = 2**n m and sqrt(1/2) <= m < sqrt(2), both in f64, for positive normal x; by bits, as AVX2 casts no 64-bit integer."""
    bits = let(tirx.reinterpret("uint64", x))
    e = let(tirx.shift_right(bits + _u64(0x3FF0000000000000 - 0x3FE6A09E667F3BCD), _u64(52)))  # n + 1023
    n = tirx.reinterpret("float64", tirx.bitwise_or(e, _u64(0x4330000000000000))) - _f64(2.0**52 + 1023.0)
    return let(n), let(tirx.reinterpret("float64", bits - tirx.shift_left(e, _u64(52)) + _u64(0x3FF0000000000000)))


def _i64(v: int) -> Any:
    return tirx.const(v, "int64")


def _u64(v: int) -> Any:
    return tirx.const(v, "uint64")


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


def _sine_and_cosine(let: Let, a: Any) -> tuple[Any, Any]:
    """Both in f64, right to f32's digits, for |a| <= pi / 4."""
    z = let(a * a)
    s = _polynomial(z, 2.7183114939898219064e-6, -1.98393348360966317347e-4, 8.3333293858894632e-3, -1.6666666641626524e-1)
    c = _polynomial(z, 2.43904487962774090654e-5, -1.38867637746099294692e-3, 4.16666233237390631894e-2, -4.99999997251031003120e-1, 1.0)
    return let(_fma(let(s * z), a, a)), let(c)


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
    wide, inf = _magnitude(let, x), _f64(math.inf)
    n, m = _octave(let, wide)
    f = let((m - _f64(1.0)) / (m + _f64(1.0)))  # log m = 2 artanh f
    log = let(n + f * _polynomial(let(f * f), *_LOG2))
    log = tirx.Select(tirx.EQ(wide, _f64(0.0)), _f64(-math.inf), tirx.Select(tirx.EQ(wide, inf), inf, log))
    e = let(y.astype("float64") * let(log))
    bounded = let(tirx.min(tirx.max(e, _f64(-1000.0)), _f64(1000.0)))
    whole = let(_nearest(bounded))
    fraction = _polynomial(let(bounded - whole), *_EXP2)
    size = let((fraction * _power_of_two(whole)).astype("float32"))
    size = let(tirx.Select(isnan(e, "float64"), const(math.nan), size))
    integer = let(tirx.EQ(_truncated(y), y))
    half = let(y * const(0.5))
    odd = let(tirx.And(integer, tirx.Not(tirx.EQ(_truncated(half), half))))
    value = tirx.Select(tirx.And(_is_negative(let, x), odd), size * const(-1.0), size)
    value = tirx.Select(tirx.And(tirx.And(x < const(0.0), tirx.Not(integer)), x > const(-math.inf)), const(math.nan), value)
    value = tirx.Select(isnan(y), y, tirx.Select(isnan(x), x, value))
    one = tirx.Or(tirx.EQ(y, const(0.0)), tirx.EQ(x, const(1.0)))
    one = tirx.Or(one, tirx.And(tirx.EQ(x, const(-1.0)), tirx.EQ(fabs(y), const(math.inf))))
    return tirx.Select(one, const(1.0), value)


def _truncated(x: Any) -> Any:
    return intrinsic("llvm.trunc", "float32", x)


_ATAN = (0.0010911005682352943, -0.007199335630653731, 0.022274257451290077, -0.04435738515853225, 0.06716099871363738,
         -0.08798768700072329, 0.11054500317857302, -0.14279159498253702, 0.19999604627430995, -0.33333323935260606,
         0.999999999628349)  # fmt: skip
_ASIN = (0.03788560532813299, 0.014139475673055731, 0.031900807876251186, 0.044503086354984206, 0.07500604096835128,
         0.16666656945101202, 1.0000000002545844)  # fmt: skip


def _angle(let: Let, opposite: Any, adjacent: Any) -> Any:
    """The angle of a right triangle, in f64: the arc tangent of what is at most 1, or else the rest of a quarter turn."""
    t = let(tirx.min(opposite, adjacent) / tirx.max(opposite, adjacent))
    angle = let(t * _polynomial(let(t * t), *_ATAN))
    return let(tirx.Select(opposite > adjacent, _f64(math.pi / 2) - angle, angle))


def atan(let: Let, x: Any) -> Any:
    """Arc tangent, all inputs."""
    return tirx.Select(isnan(x), x, _signed(_angle(let, _magnitude(let, x), _f64(1.0)), x))


def atan2(let: Let, y: Any, x: Any) -> Any:
    """The angle of the point (x, y), as in C, all inputs: zeros and infinities are taken for numbers beyond those of f32."""
    least, most = _f64(2.0**-1000), _f64(2.0**1000)
    angle = _angle(let, let(tirx.min(_magnitude(let, y), most)), let(tirx.min(tirx.max(_magnitude(let, x), least), most)))
    value = tirx.Select(_is_negative(let, x), _f64(math.pi) - angle, angle)
    return tirx.Select(isnan(x), x, tirx.Select(isnan(y), y, _signed(let(value), y)))


def _arc(let: Let, x: Any) -> tuple[Any, Any]:
    """Whether |x| is above 1/2, and the arc sine of |x|, or else half its arc cosine, in f64; nan above 1."""
    a = _magnitude(let, x)
    outer = let(a > _f64(0.5))
    z = let(tirx.Select(outer, (_f64(1.0) - a) * _f64(0.5), a * a))
    return outer, let(tirx.Select(outer, _root(z), a) * _polynomial(z, *_ASIN))


def asin(let: Let, x: Any) -> Any:
    """Arc sine, all inputs."""
    outer, arc = _arc(let, x)
    return _signed(let(tirx.Select(outer, _f64(math.pi / 2) - (arc + arc), arc)), x)


def acos(let: Let, x: Any) -> Any:
    """Arc cosine, all inputs."""
    outer, arc = _arc(let, x)
    negative = _is_negative(let, x)
    above = tirx.Select(negative, _f64(math.pi) - (arc + arc), arc + arc)
    below = tirx.Select(negative, _f64(math.pi / 2) + arc, _f64(math.pi / 2) - arc)
    return tirx.Select(outer, let(above), let(below)).astype("float32")


_COSH = (0.0013948369227749042, 0.04166622209871423, 0.5000000106023249, 0.9999999999607005)
_SINH = (0.00019907497740604275, 0.008333283669627553, 0.16666666785710127, 0.9999999999955496)


def _octaves(let: Let, x: Any) -> tuple[Any, Any, Any]:
    """(n, cosh r, sinh r) with x = n ln2 + r, |r| <= ln2 / 2, all in f64: e**x is 2**n times their sum."""
    n = let(_nearest(x * _f64(1 / math.log(2))))
    r = let(_fma(n, _f64(-math.log(2)), x))
    z = let(r * r)
    return n, let(_polynomial(z, *_COSH)), let(r * _polynomial(z, *_SINH))


def _hyperbolic(let: Let, x: Any) -> tuple[Any, Any, Any, Any]:
    """(cosh n', sinh n', cosh r, sinh r) with |x| = n' + r, for n' a multiple of ln2; no digits are lost where they are multiplied."""
    n, c, s = _octaves(let, let(tirx.min(_magnitude(let, x), _f64(100.0))))
    up, down = let(_power_of_two(n - _f64(1.0))), let(_power_of_two(_f64(-1.0) - n))
    return let(up + down), let(up - down), c, s


def sinh(let: Let, x: Any) -> Any:
    """Hyperbolic sine, all inputs."""
    cosh_n, sinh_n, c, s = _hyperbolic(let, x)
    return tirx.Select(isnan(x), x, _signed(let(_fma(cosh_n, s, sinh_n * c)), x))


def cosh(let: Let, x: Any) -> Any:
    """Hyperbolic cosine, all inputs."""
    cosh_n, sinh_n, c, s = _hyperbolic(let, x)
    return tirx.Select(isnan(x), x, _fma(cosh_n, c, sinh_n * s).astype("float32"))


_LOG = (0.06915408189420297, -0.11789811631398966, 0.11872959418980948, -0.12384346386936267, 0.14218660370316513,
        -0.16669251147486755, 0.2000222650894873, -0.24999986582547637, 0.33333310440818226, -0.5000000000017926)  # fmt: skip


_SMALL = 2.0**-12  # below, two terms of a series give f32's digits, and a logarithm would not


def _log(let: Let, x: Any) -> Any:
    """Natural logarithm in f64, to f32's digits; nothing but positive normal numbers."""
    n, m = _octave(let, x)
    f = let(m - _f64(1.0))
    return _fma(n, _f64(math.log(2)), _fma(let(f * f), _polynomial(f, *_LOG), f))


def asinh(let: Let, x: Any) -> Any:
    """Inverse hyperbolic sine, all inputs."""
    a = _magnitude(let, x)
    value = _log(let, let(a + _root(_fma(a, a, _f64(1.0)))))
    value = tirx.Select(a < _f64(_SMALL), _fma(a * a, a * _f64(-1 / 6), a), let(value))
    return tirx.Select(fabs(x) < const(math.inf), _signed(let(value), x), x)


def acosh(let: Let, x: Any) -> Any:
    """Inverse hyperbolic cosine, all inputs."""
    wide = let(x.astype("float64"))
    value = _log(let, let(wide + _root(_fma(wide, wide, _f64(-1.0))))).astype("float32")
    return tirx.Select(x < const(1.0), const(math.nan), tirx.Select(x < const(math.inf), let(value), x))


def atanh(let: Let, x: Any) -> Any:
    """Inverse hyperbolic tangent, all inputs."""
    a = _magnitude(let, x)
    value = _log(let, let((_f64(1.0) + a) / (_f64(1.0) - a))) * _f64(0.5)
    value = let(tirx.Select(a < _f64(_SMALL), _fma(a * a, a * _f64(1 / 3), a), let(value)))
    ends = tirx.Select(tirx.EQ(a, _f64(1.0)), _f64(math.inf), _f64(math.nan))
    return _signed(let(tirx.Select(a < _f64(1.0), value, ends)), x)


_ERFC = (5.586319623001818e-05, 2.8756713789531042e-05, -0.0005946260755873264, 0.0007157873688351396, 0.00426891927052474,
         -0.024394238418114493, 0.07166585584820728, -0.15011578165330594, 0.24560379806321664, -0.32623356382654,
         0.1790011512602368)  # e**(x**2) erfc(x), by (x - 3) / (x + 3)  # fmt: skip


def erfc(let: Let, x: Any) -> Any:
    """1 - erf(x), all inputs; no digits are lost where that is small."""
    a = let(tirx.min(_magnitude(let, x), _f64(10.5)))  # 0 from there
    n, c, s = _octaves(let, a * a * _f64(-1.0))
    tail = let((c + s) * _power_of_two(n) * _polynomial(let((a - _f64(3.0)) / (a + _f64(3.0))), *_ERFC))
    return tirx.Select(isnan(x), x, tirx.Select(x < const(0.0), _f64(2.0) - tail, tail).astype("float32"))


def fmod(let: Let, x: Any, y: Any, divisor: float | None = None) -> Any:
    """The rest of x / y with the sign of x, as in C: exact, all inputs.

    A quotient in f64 has at most 53 bits, and what is left of x without so many times y has no more bits than f64 holds; so each
    step divides by 2**51, and the greatest quotient of f32 takes six.

    Args:
        divisor: y where it is known: fewer steps will do.
    """
    a, b = _magnitude(let, x), let(tirx.min(_magnitude(let, y), _f64(2.0**200)))  # no infinity: x is the rest
    size = math.log2(abs(divisor)) if divisor and math.isfinite(divisor) else -149.0
    rest, inverse = a, let(_f64(1.0) / b)
    for _ in range(max(1, math.ceil((128 - size + 1) / 51))):
        rest = let(_fma(_nearest(rest * inverse) * _f64(-1.0), b, rest))
    value = _signed(tirx.Select(rest < _f64(0.0), rest + b, rest), x)
    return tirx.Select(isnan(y), y, value)
