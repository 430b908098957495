"""Elementary functions in f32 that LLVM vectorizes: polynomials after range reduction, at most 2 ulp off.

Coefficients are minimax fits on the reduced ranges; sources: Cephes (exp, tanh, log), Giles and Bradbury style rational splits for erf,
FreeBSD's msun (sine and cosine, which are summed in f64). Everything here is branch-free: both sides of a selection are computed.
``let`` names an intermediate result that is used more than once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from tvm import tirx

Let = Callable[[Any], Any]

LEAST_SHIFTED = -80.0  # e**-80 over the sum of a long row is still a normal number


def const(value: float, dtype: str = "float32") -> Any:
    return tirx.const(value, dtype)


def intrinsic(name: str, dtype: str, *args: Any) -> Any:
    """A pure LLVM intrinsic of one overload type."""
    return tirx.call_llvm_pure_intrin(dtype, name, *args)


def fma(a: Any, b: Any, c: Any) -> Any:
    return intrinsic("llvm.fma", "float32", a, b, c)


def fence(x: Any, dtype: str) -> Any:
    """Keep LLVM from contracting a product with a following sum: each op rounds by itself, as in eager."""
    return intrinsic("llvm.arithmetic.fence", dtype, x)


def isnan(x: Any, dtype: str = "float32") -> Any:
    """Whether x is nan; the fence hides the operand from TVM, which takes x != x for false."""
    return tirx.Not(tirx.EQ(fence(x, str(x.ty.dtype)), x))


def horner(x: Any, *coefficients: float) -> Any:
    """Polynomial, highest power first."""
    total = const(coefficients[0])
    for c in coefficients[1:]:
        total = fma(total, x, const(c))
    return total


def _i32(v: int) -> Any:
    return tirx.const(v, "int32")


def fabs(x: Any) -> Any:
    return intrinsic("llvm.fabs", "float32", x)


def copysign(magnitude: Any, sign: Any) -> Any:
    return intrinsic("llvm.copysign", "float32", magnitude, sign)


def _power_of_two(n: Any) -> Any:
    """2**n for integer n within the normal exponents."""
    return tirx.reinterpret("float32", tirx.shift_left(n + _i32(127), _i32(23)))


def _scale(let: Let, p: Any, n: Any) -> Any:
    """p * 2**n, in two steps so that denormal results round once."""
    half = let(tirx.shift_right(n, _i32(1)))
    return p * _power_of_two(half) * _power_of_two(n - half)


def _expm1_reduced(r: Any) -> Any:
    """exp - 1 on [-ln2/2, ln2/2]."""
    p = horner(r, 1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
    return fma(p, r * r, r)


def _exp_reduced(r: Any) -> Any:
    """exp on [-ln2/2, ln2/2]."""
    return _expm1_reduced(r) + const(1.0)


def _reduce(let: Let, y: Any) -> tuple[Any, Any]:
    """(n, r) with y = n ln2 + r, |r| <= ln2 / 2."""
    n = let(intrinsic("llvm.nearbyint", "float32", y * const(1.44269504088896341)))
    r = fma(n, const(-0.693359375), y)
    return n, let(fma(n, const(2.12194440e-4), r))


def exp(let: Let, x: Any) -> Any:
    """e**x, all inputs."""
    y = let(tirx.min(tirx.max(x, const(-104.0)), const(89.0)))
    n, r = _reduce(let, y)
    return tirx.Select(isnan(x), x, _scale(let, let(_exp_reduced(r)), let(n.astype("int32"))))


def expm1(let: Let, x: Any) -> Any:
    """e**x - 1, all inputs: ``2**n (e**r - 1) + (2**n - 1)``, by halves, as 2**128 is no number."""
    n, r = _reduce(let, let(tirx.min(tirx.max(x, const(-20.0)), const(89.0))))
    half = let(_power_of_two(n.astype("int32") - _i32(1)))
    y = let(fma(_expm1_reduced(r), half, half - const(0.5)))
    return tirx.Select(tirx.Or(isnan(x), fabs(x) < const(1e-8)), x, y + y)


def exp_nonpositive(let: Let, x: Any) -> Any:
    """e**x for -87 <= x <= 0 (less is taken for -87); nothing else is right."""
    n, r = _reduce(let, let(tirx.max(x, const(-87.0))))
    return _exp_reduced(r) * _power_of_two(n.astype("int32"))


def exp_shifted(let: Let, x: Any) -> Any:
    """e**x for x <= 0 and nan; zero below ``LEAST_SHIFTED``, where a softmax has no digits, and no denormal ever comes out."""
    n = let(intrinsic("llvm.nearbyint", "float32", tirx.max(x, const(LEAST_SHIFTED)) * const(1.44269504088896341)))
    r = let(fma(n, const(2.12194440e-4), fma(n, const(-0.693359375), x)))
    return tirx.Select(x < const(LEAST_SHIFTED), const(0.0), let(_exp_reduced(r) * _power_of_two(n.astype("int32"))))


def exp2(let: Let, x: Any) -> Any:
    """2**x, all inputs."""
    y = let(tirx.min(tirx.max(x, const(-151.0)), const(129.0)))
    n = let(intrinsic("llvm.nearbyint", "float32", y))
    r = let(y - n)  # exact; |r| <= 1/2
    p = horner(r, 1.535336188319500e-4, 1.339887440266574e-3, 9.618437357674640e-3, 5.550332471162809e-2,
               2.402264791363012e-1, 6.931472028550421e-1)  # fmt: skip
    return tirx.Select(isnan(x), x, _scale(let, let(fma(p, r, const(1.0))), let(n.astype("int32"))))


def exp2_shifted(let: Let, x: Any) -> Any:
    """2**x for x <= 0 and nan; zero below ``LEAST_SHIFTED`` in base 2, see :func:`exp_shifted`."""
    least, magic = const(-115.0), const(1.5 * 2.0**23 + 127.0)  # a sum with so much has its ones, and the exponent's bias, in its low bits
    t = let(fence(tirx.max(x, least) + magic, "float32"))
    r = let(x - (t - magic))
    p = horner(r, 1.535336188319500e-4, 1.339887440266574e-3, 9.618437357674640e-3, 5.550332471162809e-2,
               2.402264791363012e-1, 6.931472028550421e-1)  # fmt: skip
    power = tirx.reinterpret("float32", tirx.shift_left(tirx.reinterpret("int32", t), _i32(23)))
    return tirx.Select(x < least, const(0.0), let(let(fma(p, r, const(1.0))) * power))


def sigmoid(let: Let, x: Any) -> Any:
    """1 / (1 + e**-x)."""
    return const(1.0) / (const(1.0) + let(exp(let, let(x * const(-1.0)))))


def tanh(let: Let, x: Any) -> Any:
    """Odd polynomial below 0.625, else by exp(2|x|)."""
    a, s = let(fabs(x)), let(x * x)
    p = horner(s, -5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1)
    small = let(fma(p * s, x, x))
    big = const(1.0) - const(2.0) / (let(exp(let, let(a + a))) + const(1.0))
    return tirx.Select(a < const(0.625), small, copysign(big, x))


def erf(let: Let, x: Any) -> Any:
    """Odd polynomial below 0.928, else 1 - exp of a polynomial."""
    t, s = let(fabs(x)), let(x * x)
    r = fma(const(-1.72853470e-5), t, const(3.83197126e-4))
    u = fma(const(-3.88396438e-3), t, const(2.42546219e-2))
    r = fma(r, s, u)
    for k in (-1.06777877e-1, -6.34846687e-1, -1.28717512e-1):
        r = fma(r, t, const(k))
    r = fma(r, t, t * const(-1.0))
    r = const(1.0) - exp_nonpositive(let, let(r))
    big = copysign(let(r), x)
    q = horner(s, -5.96761703e-4, 4.99119423e-3, -2.67681349e-2, 1.12819925e-1, -3.76125336e-1, 1.28379166e-1)
    near = fma(let(q), x, x)
    return tirx.Select(t > const(0.927734375), big, near)


def _odd_step(let: Let, x: Any, end: float, p: tuple[float, ...], q: tuple[float, ...]) -> Any:
    """1/2 + x P(x**2) / Q(x**2) up to ``end``, where the fraction is slightly above 1/2; 0 and 1 beyond."""
    y = let(tirx.min(tirx.max(x, const(-end)), const(end)))
    s = let(y * y)
    half = let(y * horner(s, *p) / horner(s, *q))
    return const(0.5) + tirx.min(tirx.max(half, const(-0.5)), const(0.5))


def normal_cdf(let: Let, x: Any) -> Any:
    """The share of a standard normal distribution that is below x, at most 1.2e-7 off; 0 and 1 beyond 5.3. Not for nan.

    Fitted to erf(x / sqrt 2) / 2. Where only the sum with 1/2 counts, as in a GELU, it has half the operations of :func:`erf`, and
    half as many that wait for each other.
    """
    p = (1.22371599e-10, -2.23620856e-8, 2.92474625e-6, 1.38635864e-4, 4.30568261e-3, 3.27995680e-2, 3.98942292e-1)
    return _odd_step(let, x, 5.3, p, (5.20086101e-5, 1.64588424e-3, 2.72745656e-2, 2.48882473e-1, 1.0))


def logistic(let: Let, x: Any) -> Any:
    """1 / (1 + e**(-2 x)) = (1 + tanh x) / 2, at most 1.2e-7 off; 0 and 1 beyond 9. Not for nan. See :func:`normal_cdf`."""
    p = (-6.12267051e-12, 1.53205981e-8, 1.40153597e-5, 1.93473883e-3, 6.84041604e-2, 0.5)
    return _odd_step(let, x, 9.0, p, (1.28899500e-6, 3.94066068e-4, 2.72500440e-2, 4.70141649e-1, 1.0))


def _log_parts(let: Let, x: Any) -> tuple[Any, Any, Any, Any]:
    """(n, f, f**2, t): x is 2**n (1 + f), sqrt(1/2) <= 1 + f < sqrt(2), and log(1 + f) is f - f**2 / 2 + t."""
    tiny = x < const(1.17549435e-38)
    y = let(tirx.Select(tiny, x * const(8388608.0), x))  # denormals by 2**23
    bits = let(tirx.reinterpret("int32", y))
    e = let(tirx.shift_right(bits - _i32(0x3F3504F3), _i32(23)))
    m = tirx.reinterpret("float32", bits - tirx.shift_left(e, _i32(23)))
    n = let(e.astype("float32") + tirx.Select(tiny, const(-23.0), const(0.0)))
    f = let(m - const(1.0))
    z = let(f * f)
    p = horner(f, 7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1, -1.6668057665e-1,
               2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1)  # fmt: skip
    return n, f, z, p * f * z


def _log_ends(x: Any, value: Any) -> Any:
    """A logarithm of x, where that is no positive number, too."""
    r = tirx.Select(x < const(float("inf")), value, x)  # inf and nan stay
    r = tirx.Select(tirx.EQ(x, const(0.0)), const(float("-inf")), r)
    return tirx.Select(x < const(0.0), const(float("nan")), r)


def log(let: Let, x: Any) -> Any:
    """Natural logarithm, all inputs."""
    n, f, z, cubes = _log_parts(let, x)
    t = fma(n, const(-2.12194440e-4), cubes)
    t = fma(z, const(-0.5), t)
    return _log_ends(x, fma(n, const(0.693359375), f + t))


def log2(let: Let, x: Any) -> Any:
    """Logarithm to base 2, all inputs; what log2(e) is above 1 is multiplied apart, so powers of two come out exact."""
    n, f, z, cubes = _log_parts(let, x)
    y, more = let(fma(z, const(-0.5), cubes)), const(0.44269504088896341)
    return _log_ends(x, n + (f + (y + fma(f, more, y * more))))


def log10(let: Let, x: Any) -> Any:
    """Logarithm to base 10, all inputs; factors are in two parts, the first of which multiplies without rounding."""
    n, f, z, cubes = _log_parts(let, x)
    y = let(fma(z, const(-0.5), cubes))
    t = fma(n, const(2.48745663981195213739e-4), (f + y) * const(7.00731903251827651129e-4))
    return _log_ends(x, fma(n, const(3.0078125e-1), fma(f, const(4.3359375e-1), fma(y, const(4.3359375e-1), t))))


def log1p(let: Let, x: Any) -> Any:
    """log(1 + x), all inputs: with u the rounded sum, log(u) + (x - (u - 1)) / u.

    Reference: Goldberg, "What every computer scientist should know about floating-point arithmetic", theorem 4.
    """
    u = let(fence(x + const(1.0), "float32"))
    lost = let(fence(x - let(fence(u - const(1.0), "float32")), "float32"))
    r = let(log(let, u))
    inside = tirx.And(u > const(0.0), u < const(float("inf")))
    return tirx.Select(tirx.EQ(u, const(1.0)), x, tirx.Select(inside, r + lost / u, r))


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
        t = let(wide * const(part, "float64"))
        turns.append(let(t - const(4.0, "float64") * _nearest(t * const(0.25, "float64"))))
    total = turns[0]
    for t in turns[1:]:
        total = total + t
    n = let(_nearest(total))
    rest = turns[0] - n
    for t in turns[1:]:
        rest = rest + t
    return n, let(rest * const(1.57079632679489662, "float64"))


def _nearest(x: Any) -> Any:
    return intrinsic("llvm.nearbyint", "float64", x)


def _polynomial(x: Any, *coefficients: float) -> Any:
    """In f64, highest power first."""
    total = const(coefficients[0], "float64")
    for c in coefficients[1:]:
        total = intrinsic("llvm.fma", "float64", total, x, const(c, "float64"))
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
    value = tirx.Select(odd, let(c * const(-1.0, "float64")), s) / tirx.Select(odd, s, c)
    return tirx.Select(tirx.EQ(x, const(0.0)), x, value.astype("float32"))


_LOG2 = (0.19235933878519512, 0.22195308321368667, 0.2623081892525388, 0.3205988979753252, 0.4121985831111324,
         0.5770780163555853, 0.9617966939259756, 2.8853900817779268)  # 2 / (ln 2 k), odd k from 15 to 1  # fmt: skip
_EXP2 = (1.0178086009239696e-07, 1.3215486790144305e-06, 1.5252733804059838e-05, 0.00015403530393381606, 0.0013333558146428441,
         0.009618129107628477, 0.055504108664821576, 0.2402265069591007, 0.6931471805599453, 1.0)  # ln 2 ** k / k!  # fmt: skip


def pow(let: Let, x: Any, y: Any) -> Any:
    """x**y as in C, all inputs: 2**(y log2 |x|), in f64, as what is before the point of that takes digits from what is behind it."""
    wide, inf = let(fabs(x).astype("float64")), const(float("inf"), "float64")
    bits = let(tirx.reinterpret("int64", wide))
    n = let(tirx.shift_right(bits - tirx.const(0x3FE6A09E667F3BCD, "int64"), tirx.const(52, "int64")))
    m = let(tirx.reinterpret("float64", bits - tirx.shift_left(n, tirx.const(52, "int64"))))
    f = let((m - const(1.0, "float64")) / (m + const(1.0, "float64")))  # log m = 2 artanh f
    log = let(n.astype("float64") + f * _polynomial(let(f * f), *_LOG2))
    log = tirx.Select(tirx.EQ(wide, const(0.0, "float64")), const(-math.inf, "float64"), tirx.Select(tirx.EQ(wide, inf), inf, log))
    e = let(y.astype("float64") * let(log))
    bounded = let(tirx.min(tirx.max(e, const(-1000.0, "float64")), const(1000.0, "float64")))
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
