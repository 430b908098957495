# mypy: disable-error-code="no-untyped-def"
"""Device functions that Triton's language lacks, for f32 and f64 tiles. Kernels import them by name.

The polynomial of ``tanh`` is that of Cephes; ``log1p`` and ``expm1`` correct the rounding of 1 + x and e**x (Kahan; Higham,
"Accuracy and Stability of Numerical Algorithms", 2nd ed., section 1.14). Parameters are tiles; an annotation would mean something to
Triton.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.jit
def log10(x):
    """Decimal logarithm."""
    return tl.log(x) * 0.4342944819032518


@triton.jit
def f8e4m3(bits):
    """f32 of the bits of a float of 4 bits of exponent and 3 of mantissa: there, its exponent is 120 too small."""
    wide = bits.to(tl.int32)
    size = ((wide & 0x7F) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36
    size = tl.where((wide & 0x7F) == 0x7F, float("nan"), size)
    return tl.where(wide >= 0x80, -size, size)


@triton.jit
def f8e5m2(bits):
    """f32 of the bits of a float of 5 bits of exponent and 2 of mantissa: the first half of an f16."""
    return (bits.to(tl.int16) << 8).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def to_f8e4m3(x):
    """Bits of the float of 8 bits that is nearest to an f32, ties to even: the largest for what lies beyond; nan stays nan.

    Where it is a normal number the significand is rounded in place. Below, numbers are multiples of the least: added to the power of two
    whose last digit that is, the sum is rounded so.
    """
    return _to_f8e4m3(x, 0x7E)


@triton.jit
def to_f8e4m3_or_nan(x):
    """The same, but nan for what lies beyond."""
    return _to_f8e4m3(x, 0x7F)


@triton.jit
def _to_f8e4m3(x, most):
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    large = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    small = (tl.abs(x) + 16384.0).to(tl.int32, bitcast=True) - (141 << 23)
    code = tl.where(size < (121 << 23), small, tl.where(size > 0x7F800000, 0x7F, tl.minimum(large, most)))
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def to_f8e5m2(x):
    """The same of one of 5 bits of exponent and 2 of mantissa, which has infinities for what lies beyond."""
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    large = ((size + 0xFFFFF + ((size >> 21) & 1)) >> 21) - (112 << 2)
    small = (tl.abs(x) + 128.0).to(tl.int32, bitcast=True) - (134 << 23)
    code = tl.where(size < (113 << 23), small, tl.where(size > 0x7F800000, 0x7F, tl.minimum(large, 0x7C)))
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def sigmoid(x):
    """1 / (1 + e**-x)."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def log1p(x):
    """log(1 + x)."""
    u = 1.0 + x
    near = tl.log(u) - ((u - 1.0) - x) / u
    near = tl.where(u == 1.0, x, near)  # -0.0 keeps its sign
    return tl.where(u == float("inf"), u, tl.where(u == 0.0, float("-inf"), near))


@triton.jit
def expm1(x):
    """e**x - 1."""
    u = tl.exp(x)
    d = u - 1.0
    near = d * (x / tl.log(tl.where(u == 1.0, 2.0, u)))
    return tl.where(u == 1.0, x, tl.where((d == -1.0) | (u == float("inf")), d, near))


@triton.jit
def tanh(x):
    """-d / (2 + d) for d = e**(-2 |x|) - 1; in f32 an odd polynomial near zero."""
    if x.dtype == tl.float64:
        d = expm1(-2.0 * tl.abs(x))
        size = -d / (2.0 + d)
    else:
        s = x * x
        p = (((-5.70498872745e-3 * s + 2.06390887954e-2) * s - 5.37397155531e-2) * s + 1.33314422036e-1) * s - 3.33332819422e-1
        t = tl.exp(-2.0 * tl.abs(x))
        size = tl.where(tl.abs(x) < 0.625, tl.abs(x + x * s * p), (1.0 - t) / (1.0 + t))
    return _signed(size, x)


@triton.jit
def sinh(x):
    """(d + d / (d + 1)) / 2 for d = e**|x| - 1, with the sign of x; where e**|x| is twice a number that still fits, from its root."""
    a = tl.abs(x)
    d = expm1(a)
    root = tl.exp(0.5 * a)
    size = tl.where(a > 80.0, (0.5 * root) * root, 0.5 * (d + d / (d + 1.0)))
    return _signed(size, x)


@triton.jit
def cosh(x):
    """(e**x + e**-x) / 2; where e**|x| is twice a number that still fits, from its root."""
    a = tl.abs(x)
    root = tl.exp(0.5 * a)
    return tl.where(a > 80.0, (0.5 * root) * root, 0.5 * (tl.exp(a) + tl.exp(-a)))


@triton.jit
def _signed(size, x):
    """size >= 0 with the sign of x, zero's included."""
    return tl.where(x < 0.0, -size, tl.where(x == 0.0, x, size))


# these are the vendor's
@triton.jit
def asin(x):
    """Angle whose sine is x."""
    return libdevice.asin(x)


@triton.jit
def acos(x):
    """Angle whose cosine is x."""
    return libdevice.acos(x)


@triton.jit
def atan(x):
    """Angle whose tangent is x."""
    return libdevice.atan(x)


@triton.jit
def asinh(x):
    """Inverse of sinh."""
    return libdevice.asinh(x)


@triton.jit
def acosh(x):
    """Inverse of cosh."""
    return libdevice.acosh(x)


@triton.jit
def atanh(x):
    """Inverse of tanh."""
    return libdevice.atanh(x)


@triton.jit
def erfc(x):
    """1 - erf(x)."""
    return libdevice.erfc(x)


@triton.jit
def atan2(y, x):
    """Angle of the point (x, y)."""
    return libdevice.atan2(y, x)


@triton.jit
def trunc(x):
    """Toward zero."""
    return tl.where(x < 0.0, tl.ceil(x), tl.floor(x))


@triton.jit
def round_even(x):
    """To the nearest integer, halves to even."""
    f = tl.floor(x)
    d = x - f
    odd = f - 2.0 * tl.floor(f * 0.5)
    near = tl.where(d > 0.5, f + 1.0, tl.where(d < 0.5, f, f + odd))
    near = tl.where(near == 0.0, 0.0 * x, near)  # the sign of x
    return tl.where(tl.abs(x) == float("inf"), x, near)


@triton.jit
def float_remainder(a, b):
    """a - b * floor(a / b): the sign of b."""
    r = a % b
    return tl.where((r != 0.0) & ((b < 0.0) != (r < 0.0)), r + b, r)


@triton.jit
def float_floor_div(a, b):
    """floor(a / b), of the exact quotient."""
    r = a % b
    q = (a - r) / b
    q = tl.where((r != 0.0) & ((b < 0.0) != (r < 0.0)), q - 1.0, q)
    whole = tl.floor(q)
    whole = tl.where(q - whole > 0.5, whole + 1.0, whole)
    whole = tl.where(whole == 0.0, 0.0 * (a / b), whole)  # zero has the sign of the quotient
    return tl.where(b == 0.0, a / b, whole)


@triton.jit
def int_remainder(a, b):
    """a - b * floor(a / b): the sign of b."""
    r = a % b
    return tl.where((r != 0) & ((b < 0) != (r < 0)), r + b, r)


@triton.jit
def int_floor_div(a, b):
    """floor(a / b)."""
    r = a % b
    q = a // b
    return tl.where((r != 0) & ((b < 0) != (r < 0)), q - 1, q)


@triton.jit
def power(a, b):
    """a ** b, computed in f64; of a negative base by a whole exponent."""
    x, y = a.to(tl.float64), b.to(tl.float64)
    size = tl.exp(y * tl.log(tl.abs(x)))
    whole = tl.floor(y) == y
    odd = whole & (y - 2.0 * tl.floor(y * 0.5) == 1.0)
    signed = tl.where(odd, -size, size)
    defined = whole | (tl.abs(x) == float("inf"))
    result = tl.where(x < 0.0, tl.where(defined, signed, float("nan")), size)
    result = tl.where((x == 0.0) & (y == 0.0), 1.0, result)
    return tl.where((y == 0.0) | (x == 1.0), 1.0, result).to(a.dtype)


@triton.jit
def greatest(x):
    """The greatest of each row, [R, C] -> [R, 1]; nan if the row holds one."""
    nan = tl.max((x != x).to(tl.int32), axis=1, keep_dims=True)
    return tl.where(nan > 0, float("nan"), tl.max(x, axis=1, keep_dims=True))


@triton.jit
def least(x):
    """The least of each row, [R, C] -> [R, 1]; nan if the row holds one."""
    nan = tl.max((x != x).to(tl.int32), axis=1, keep_dims=True)
    return tl.where(nan > 0, float("nan"), tl.min(x, axis=1, keep_dims=True))


@triton.jit
def _times(a, b):
    return a * b


@triton.jit
def product(x):
    """The product of each row, [R, C] -> [R, 1]."""
    return tl.reduce(x, 1, _times, keep_dims=True)


# what scans join by: the first operand stands before the second
@triton.jit
def larger(a, b):
    """The larger; nan if one is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def smaller(a, b):
    """The smaller; nan if one is."""
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def last_largest(a, i, b, j):
    """The larger and its place, of equal ones the second; nan counts as the largest."""
    second = (b != b) | ((b >= a) & (a == a))
    return tl.where(second, b, a), tl.where(second, j, i)


@triton.jit
def last_smallest(a, i, b, j):
    """The smaller and its place, of equal ones the second; nan counts as the smallest."""
    second = (b != b) | ((b <= a) & (a == a))
    return tl.where(second, b, a), tl.where(second, j, i)


@triton.jit
def log_add(a, b):
    """log(e**a + e**b)."""
    high = larger(a, b)
    same = (a == b) & (tl.abs(a) == float("inf"))
    return tl.where(same, a, high + log1p(tl.exp(smaller(a, b) - high)))
