"""Elementary functions in f32 that LLVM vectorizes: polynomials after range reduction, at most 2 ulp off; for others see :mod:`vecwide`.

Coefficients are minimax fits on the reduced ranges; sources: Cephes (exp, tanh, log), Giles and Bradbury style rational splits for erf.
Everything here is branch-free: both sides of a selection are computed. ``let`` names an intermediate result that is used more than once.
"""

from __future__ import annotations

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
