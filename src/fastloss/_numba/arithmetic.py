"""Numbers: exponentials, logarithms, half types.

exp(x) is 2**n exp(r), n the integer nearest to x / ln 2.  What is kept of a class is the
exponential 2**(n - N + shift) exp(r) = 2**shift exp(x) / 2**N, N being the n of the row's
maximum: a power of two as the reference costs nothing and rounds nothing, where x - maximum
would round.  The shift, 32 or 64, keeps what may still come out as a subnormal result a normal
number.  Rows whose maximum is large use x - maximum, which is exact there for all classes that
are not negligible.

At a temperature T it is exp(x / T), 2**n exp(r / T) with n the nearest to x / (T ln 2), and costs
as much: only the numbers of `temper` are others, see ``_temper``.
"""

import numpy as np
from numba import types

from fastloss import _temper
from fastloss._numba.jit import fused, inline, typed, typed_fused
from fastloss._numba.machine import HAS_F16C, convert_half

_LOG2E, _MINUS_HIGH, _MINUS_LOW = _temper.LOG2E, _temper.MINUS_HIGH, _temper.MINUS_LOW
_LN2, _TEMPERATURE, _SERIES = _temper.LN2, _temper.TEMPERATURE, _temper.SERIES
_UNTEMPERED_32 = tuple(_temper.temper(1.0, np.dtype(np.float32)))
_UNTEMPERED_64 = tuple(_temper.temper(1.0, np.dtype(np.float64)))


@typed
def untempered(like):
    """What exponentials are computed with at a temperature of 1, in the type of an array."""
    if like.dtype == types.float32:
        return lambda like: _UNTEMPERED_32
    return lambda like: _UNTEMPERED_64


@typed
def temper_of(plan, like):
    if plan.types[-1] == types.none:
        return lambda plan, like: untempered(like)
    return lambda plan, like: plan.temper


@inline
def tiny_of(numbers):
    """The smallest normal number of an array's type."""
    return 1.1754943508222875e-38 if numbers.itemsize == 4 else 2.2250738585072014e-308


@inline
def huge_of(numbers):
    """So far from the end of the range that it takes nothing above the largest number there."""
    return 2.0**100 if numbers.itemsize == 4 else 2.0**970


@inline
def power_of(numbers):
    """What takes an exponential back to what it stands for: 2**-shift."""
    return numbers.dtype.type(2.0**-32 if numbers.itemsize == 4 else 2.0**-64)


@typed
def pivot_of(maximum, temper):
    """What is taken off x: 0, or the maximum where that is large (or inf: then all is NaN)."""
    limit, zero = (np.float32(256), np.float32(0)) if maximum == types.float32 else (2048.0, 0.0)
    return lambda maximum, temper: zero if abs(maximum) < limit * temper[_TEMPERATURE] else maximum


@typed
def magic_of(maximum, temper):
    """A number to which x / (T ln 2) is added: that rounds it, and leaves n - N in the low bits.

    Not fused: whatever the compiler makes of the caller, all callers must come to the same N.
    """

    def magic_of_32(maximum, temper):
        x = maximum if pivot_of(maximum, temper) == np.float32(0) else np.float32(0)
        # Adding 1.5 * 2**23 rounds to an integer.
        shifted = x * temper[_LOG2E] + np.float32(12582912.0)
        return np.float32(12582912.0 + 127 + 32) - (shifted - np.float32(12582912.0))

    def magic_of_64(maximum, temper):
        x = maximum if pivot_of(maximum, temper) == 0.0 else 0.0
        shifted = x * temper[_LOG2E] + 6755399441055744.0  # 1.5 * 2**52
        return (6755399441055744.0 + 1023 + 64) - (shifted - 6755399441055744.0)

    return magic_of_32 if maximum == types.float32 else magic_of_64


@inline
def highest_of(numbers, temper):
    """What common units take larger scores for: enough for a sum to be told by."""
    return numbers.dtype.type(44.0 if numbers.itemsize == 4 else 340.0) * temper[_TEMPERATURE]


@inline
def common_magic(numbers):
    """As magic_of, for rows without a reference of their own: for 2**48 exp(x), or 2**497 exp(x).

    No sum overflows there, as no score is above the highest.
    """
    wide, narrow = 6755399441055744.0 + 1023 + 497, 12582912.0 + 127 + 48
    return numbers.dtype.type(narrow if numbers.itemsize == 4 else wide)


@inline
def in_common_units(total, least, weight, numbers):
    """Whether a row's exponentials are exact in common units: by their sum, and by one of them.

    No score was above the highest; what will be a subnormal result is a normal number, and so is
    the weight over the sum; `least`, the target's, is not so small that the ratio to it would
    overflow.
    """
    most = 2.0**111 if numbers.itemsize == 4 else 2.0**987
    negligible = 2.0**-100 if numbers.itemsize == 4 else 2.0**-900
    exact = (total * np.float64(power_of(numbers)) >= 1.0) & (total < most)
    return exact & (least >= negligible * total) & (abs(weight) >= tiny_of(numbers) * total)


@typed
def lowest_of(magic, temper):
    """The x whose n - N is the exponent of 0."""
    if magic == types.float32:
        return lambda magic, temper: (np.float32(12582912.0) - magic) * temper[_LN2]
    return lambda magic, temper: (6755399441055744.0 - magic) * temper[_LN2]


@typed_fused
def exponential(x, pivot, magic, lowest, temper):
    """2**(shift - N) * exp((x - pivot) / T); 0 where that is negligible; NaN for NaN."""
    return _exponential_32 if x == types.float32 else _exponential_64


def _exponential_32(x, pivot, magic, lowest, temper):
    d = x - pivot
    d = lowest if d < lowest else d
    shifted = d * temper[_LOG2E] + magic
    n = shifted - magic
    r = n * temper[_MINUS_HIGH] + d
    r = n * temper[_MINUS_LOW] + r
    p = temper[_SERIES + 5] * r + temper[_SERIES + 4]
    p = p * r + temper[_SERIES + 3]
    p = p * r + temper[_SERIES + 2]
    p = p * r + temper[_SERIES + 1]
    p = p * r + temper[_SERIES]
    p = p * r + np.float32(1.0)
    # A product, not a sum of exponents: NaN stays NaN.
    return p * np.uint32(np.float32(shifted).view(np.uint32) << np.uint32(23)).view(np.float32)


def _exponential_64(x, pivot, magic, lowest, temper):
    d = x - pivot
    d = lowest if d < lowest else d
    shifted = d * temper[_LOG2E] + magic
    n = shifted - magic
    r = n * temper[_MINUS_HIGH] + d
    r = n * temper[_MINUS_LOW] + r
    p = temper[_SERIES + 10] * r + temper[_SERIES + 9]
    p = p * r + temper[_SERIES + 8]
    p = p * r + temper[_SERIES + 7]
    p = p * r + temper[_SERIES + 6]
    p = p * r + temper[_SERIES + 5]
    p = p * r + temper[_SERIES + 4]
    p = p * r + temper[_SERIES + 3]
    p = p * r + temper[_SERIES + 2]
    p = p * r + temper[_SERIES + 1]
    p = p * r + temper[_SERIES]
    p = p * r + 1.0
    return p * np.uint64(np.float64(shifted).view(np.uint64) << np.uint64(52)).view(np.float64)


@typed_fused
def log1p(x):
    """log(1 + x) for x >= 0, free of branches so that it vectorises.

    After fdlibm's e_logf.c and e_log.c.
    """
    return _log1p_32 if x == types.float32 else _log1p_64


def _log1p_32(x):
    one, two = np.float32(1), np.float32(2)
    u = one + x
    back = u - one
    lost = (one - (u - back)) + (x - back)
    # u = 2**k * z with z in [sqrt(1/2), sqrt(2))
    bits = np.float32(u).view(np.uint32)
    k = np.uint32(np.uint32(bits - np.uint32(0x3F3504F3)) >> np.uint32(23))
    f = np.uint32(bits - np.uint32(k << np.uint32(23))).view(np.float32) - one
    e = np.float32(np.int32(k))
    # What 1 + x rounded off, over u.
    shrink = np.uint32((np.uint32(127) - k) << np.uint32(23)).view(np.float32)
    rest = (lost - lost * f) * shrink
    s = f / (two + f)
    z = s * s
    w = z * z
    t1 = w * (w * np.float32(0.24279078841) + np.float32(0.40000972152))
    t2 = z * (w * np.float32(0.28498786688) + np.float32(0.66666662693))
    half = np.float32(0.5) * f * f
    log_z = half - (s * (half + t1 + t2) + (e * np.float32(9.0580006145e-06) + rest))
    result = e * np.float32(0.69313812256) - (log_z - f)
    return result if x <= np.float32(3.4028234664e38) else x  # inf and NaN pass through


def _log1p_64(x):
    u = 1.0 + x
    back = u - 1.0
    lost = (1.0 - (u - back)) + (x - back)
    # u = 2**k * z with z in [sqrt(1/2), sqrt(2))
    bits = np.float64(u).view(np.uint64)
    k = np.uint64((bits - np.uint64(0x3FE6A09E667F3BCD)) >> np.uint64(52))
    f = np.uint64(bits - (k << np.uint64(52))).view(np.float64) - 1.0
    # An integer below 2**52 becomes a double through the mantissa of 2**52.
    e = np.uint64(k | np.uint64(0x4330000000000000)).view(np.float64) - 4503599627370496.0
    s = f / (2.0 + f)
    z = s * s
    w = z * z
    t1 = w * (
        w * (w * 1.531383769920937332e-01 + 2.222219843214978396e-01) + 3.999999999940941908e-01
    )
    t2 = z * (
        w
        * (w * (w * 1.479819860511658591e-01 + 1.818357216161805012e-01) + 2.857142874366239149e-01)
        + 6.666666666666735130e-01
    )
    half = 0.5 * f * f
    # What 1 + x rounded off, over u; it matters where u is near 1.
    rest = lost - lost * f if u < 1.4 else 0.0
    log_z = half - (s * (half + t1 + t2) + (e * 1.90821492927058770002e-10 + rest))
    result = e * 6.93147180369123816490e-01 - (log_z - f)
    return result if x <= 1.7976931348623157e308 else x  # inf and NaN pass through


@inline
def times(weight, value):
    """weight * value, where 0 * inf counts as 0, and -0 as +0."""
    return abs(weight) if weight == 0 else weight * value


@fused
def subtract_product(a, b, c):
    """c - a b without a subnormal a b on the way, which would be slow."""
    return c - a * b


@inline
def half_to_float(h):
    if HAS_F16C:
        return convert_half(h)
    sign = (np.uint32(h) & np.uint32(0x8000)) << np.uint32(16)
    magnitude = np.uint32(h) & np.uint32(0x7FFF)
    normal = np.uint32((magnitude << np.uint32(13)) + np.uint32((127 - 15) << 23))
    special = np.uint32((magnitude << np.uint32(13)) | np.uint32(0x7F800000))
    # By way of an integer, so that a flush of denormals in the caller does not matter.
    subnormal = np.float32(np.float32(np.int32(magnitude)) * np.float32(2.0**-24)).view(np.uint32)
    bits = subnormal if magnitude < np.uint32(0x0400) else normal
    bits = special if magnitude >= np.uint32(0x7C00) else bits
    return np.uint32(bits | sign).view(np.float32)


@inline
def float_to_half(x):
    """To nearest, ties to even."""
    if HAS_F16C:
        return convert_half(x)
    bits = np.float32(x).view(np.uint32)
    sign = np.uint32((bits >> np.uint32(16)) & np.uint32(0x8000))
    magnitude = np.uint32(bits & np.uint32(0x7FFFFFFF))
    odd = (magnitude >> np.uint32(13)) & np.uint32(1)
    normal = np.uint32(np.uint32(magnitude + np.uint32(0xC8000FFF) + odd) >> np.uint32(13))
    # Adding 0.5 moves the last bit of a half subnormal to the last bit of the float.
    moved = np.float32(np.uint32(magnitude).view(np.float32) + np.float32(0.5))
    subnormal = np.uint32(moved.view(np.uint32) - np.uint32(0x3F000000))
    special = np.uint32(0x7E00) if magnitude > np.uint32(0x7F800000) else np.uint32(0x7C00)
    result = subnormal if magnitude < np.uint32(0x38800000) else normal
    result = special if magnitude >= np.uint32(0x477FF000) else result
    return np.uint16(result | sign)


@inline
def bfloat_to_float(b):
    return np.uint32(np.uint32(b) << np.uint32(16)).view(np.float32)


@inline
def float_to_bfloat(x):
    """To nearest, ties to even."""
    bits = np.float32(x).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = np.uint32(np.uint32(bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))
    nan = np.uint32((bits >> np.uint32(16)) | np.uint32(0x40))
    is_nan = np.uint32(bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.uint16(nan if is_nan else rounded)
