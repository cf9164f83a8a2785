# Numbers: the exponential, the logarithm, and the half types.
#
# exp(x) is 2**n exp(r), n the integer nearest to x / ln 2. What is kept of a class is the
# exponential 2**(n - N + SHIFT) exp(r) = 2**SHIFT exp(x) / 2**N, N being the n of the row's
# maximum: a power of two as the reference costs nothing and rounds nothing, where x - maximum
# would round. SHIFT keeps what may still come out as a subnormal result a normal number until the
# final product rounds it, once. Rows whose maximum is large use x - maximum, which is exact there
# for all classes that are not negligible.
#
# At a temperature T it is exp(x / T), 2**n exp(r / T) with n the nearest to x / (T ln 2), and costs
# as much: only the constants are others, those of `temper` (see _temper.py).

cdef inline real power_of(real unused) noexcept nogil:
    """What takes an exponential back to what it stands for: 2**-SHIFT."""
    return 2.3283064365386963e-10 if real is float else 5.421010862427522e-20


cdef inline double tiny_of(real unused) noexcept nogil:
    """The smallest normal number."""
    return 1.1754943508222875e-38 if real is float else 2.2250738585072014e-308


cdef inline double huge_of(real unused) noexcept nogil:
    """So far from the end of the range that it takes nothing above the largest number there."""
    return 1.2676506002282294e30 if real is float else 9.9792015476736e291  # 2**100, 2**970


cdef enum:  # where each number is, as in _temper.py
    LOG2E = 0
    MINUS_HIGH = 1
    MINUS_LOW = 2
    LN2 = 3
    TEMPERATURE = 4
    SERIES = 5
    TEMPER = 16  # how many there are


cdef float untempered_f[TEMPER]
cdef double untempered_d[TEMPER]


cdef inline const real* untempered(real unused) noexcept nogil:
    """What exponentials are computed with at a temperature of 1."""
    if real is float:
        return untempered_f
    else:
        return untempered_d


cdef inline const real* temper_of(const Job* job, real unused) noexcept nogil:
    return untempered(unused) if job.temper == NULL else <const real*>job.temper


cdef inline real pivot_of(real maximum, const real* temper) noexcept nogil:
    """What is taken off x: 0, or the maximum where that is large (or inf: then all is NaN)."""
    cdef real size = maximum if maximum > 0 else -maximum
    cdef real limit = (256.0 if real is float else 2048.0)
    return <real>0.0 if size < limit * temper[TEMPERATURE] else maximum


cdef inline real magic_of(real maximum, const real* temper) noexcept nogil:
    """A number to which x / ln 2 is added: that rounds it, and leaves n - N in the low bits."""
    cdef real shifted, x = maximum if pivot_of(maximum, temper) == 0 else <real>0.0
    if real is float:
        shifted = fl_fma_f(x, temper[LOG2E], 12582912.0)  # 1.5 * 2**23
        return <float>(12582912.0 + 127 + 32) - (shifted - <float>12582912.0)
    else:
        shifted = fl_fma_d(x, temper[LOG2E], 6755399441055744.0)  # 1.5 * 2**52
        return (6755399441055744.0 + 1023 + 64) - (shifted - 6755399441055744.0)


cdef inline real highest_of(const real* temper) noexcept nogil:
    """What common units take larger scores for: enough for a sum to be told by."""
    return temper[TEMPERATURE] * (<float>44.0 if real is float else 340.0)


cdef inline real common_magic(real unused) noexcept nogil:
    """As magic_of, for rows without a reference of their own: for 2**48 exp(x), or 2**497 exp(x).

    No sum overflows there, as no score is above the highest.
    """
    return 12582912.0 + 127 + 48 if real is float else 6755399441055744.0 + 1023 + 497


cdef inline bint in_common_units(
    double total, double least, double weight, real unused
) noexcept nogil:
    """Whether a row's exponentials are exact in common units: by their sum, and by one of them.

    No score was above the highest; what will be a subnormal result is a normal number, and so is
    the weight over the sum; `least`, the target's, is not so small that the ratio to it would
    overflow.
    """
    cdef double most = 2.596148429267414e33 if real is float else 1.307993905256674e297
    cdef double negligible = 7.888609052210118e-31 if real is float else 1.1830521861667747e-271
    cdef bint exact = (total * power_of(unused) >= 1.0) & (total < most)
    weight = weight if weight >= 0.0 else -weight
    return exact & (least >= negligible * total) & (weight >= tiny_of(unused) * total)


cdef inline real hopeless_of(Py_ssize_t num_classes, const real* temper) noexcept nogil:
    """Below this maximum, a row's sum is too small for common units (in_common_units)."""
    cdef real least = 11.2 if real is float else 300.3
    return -(least + log1p(<real>num_classes)) * temper[TEMPERATURE]


cdef inline bint is_hopeless(real maximum, real hopeless, const real* temper) noexcept nogil:
    """Whether the maximum alone says that common units are not for a row."""
    return (maximum > highest_of(temper)) | (maximum < hopeless)


cdef inline real lowest_of(real magic, const real* temper) noexcept nogil:
    """The x whose n - N is the exponent of 0."""
    if real is float:
        return (<float>12582912.0 - magic) * temper[LN2]
    else:
        return (6755399441055744.0 - magic) * temper[LN2]


cdef inline real exponential(
    real x, real pivot, real magic, real lowest, const real* temper
) noexcept nogil:
    """2**(SHIFT - N) * exp((x - pivot) / T); 0 where that is negligible; NaN for NaN."""
    cdef real d, n, r, p, shifted
    d = (fl_no_dust_f(x) if real is float else fl_no_dust_d(x)) - pivot
    d = fl_larger_f(lowest, d) if real is float else fl_larger_d(lowest, d)
    if real is float:
        shifted = fl_fma_f(d, temper[LOG2E], magic)
        n = shifted - magic
        r = fl_fma_f(n, temper[MINUS_HIGH], d)
        r = fl_fma_f(n, temper[MINUS_LOW], r)
        p = fl_fma_f(temper[SERIES + 5], r, temper[SERIES + 4])
        p = fl_fma_f(p, r, temper[SERIES + 3])
        p = fl_fma_f(p, r, temper[SERIES + 2])
        p = fl_fma_f(p, r, temper[SERIES + 1])
        p = fl_fma_f(p, r, temper[SERIES])
        p = fl_fma_f(p, r, 1.0)
        # A product, not a sum of exponents: NaN stays NaN.
        return p * fl_from_bits_f(<int32_t>(<uint32_t>fl_bits_f(shifted) << 23))
    else:
        shifted = fl_fma_d(d, temper[LOG2E], magic)
        n = shifted - magic
        r = fl_fma_d(n, temper[MINUS_HIGH], d)
        r = fl_fma_d(n, temper[MINUS_LOW], r)
        p = fl_fma_d(temper[SERIES + 10], r, temper[SERIES + 9])
        p = fl_fma_d(p, r, temper[SERIES + 8])
        p = fl_fma_d(p, r, temper[SERIES + 7])
        p = fl_fma_d(p, r, temper[SERIES + 6])
        p = fl_fma_d(p, r, temper[SERIES + 5])
        p = fl_fma_d(p, r, temper[SERIES + 4])
        p = fl_fma_d(p, r, temper[SERIES + 3])
        p = fl_fma_d(p, r, temper[SERIES + 2])
        p = fl_fma_d(p, r, temper[SERIES + 1])
        p = fl_fma_d(p, r, temper[SERIES])
        p = fl_fma_d(p, r, 1.0)
        return p * fl_from_bits_d(<int64_t>(<uint64_t>fl_bits_d(shifted) << 52))


cdef inline real log1p(real x) noexcept nogil:
    """log(1 + x) for x >= 0, free of branches so that it vectorises.

    After fdlibm's e_logf.c and e_log.c.
    """
    cdef real one = 1.0, two = 2.0
    cdef real u = one + x
    cdef real back = u - one
    cdef real lost = (one - (u - back)) + (x - back)
    cdef real f, e, s, z, w, t1, t2, half, rest, log_z, result
    cdef uint32_t bits, k
    cdef uint64_t long_bits, long_k
    # u = 2**k * z with z in [sqrt(1/2), sqrt(2)), f = z - 1; rest: what 1 + x rounded off, over u
    if real is float:
        bits = <uint32_t>fl_bits_f(u)
        k = (bits - 0x3f3504f3) >> 23
        f = fl_from_bits_f(<int32_t>(bits - (k << 23))) - one
        e = <float><int32_t>k
        rest = (lost - lost * f) * fl_from_bits_f(<int32_t>((127 - k) << 23))
        s = f / (two + f)
        z = s * s
        w = z * z
        t1 = w * fl_fma_f(w, 0.24279078841, 0.40000972152)
        t2 = z * fl_fma_f(w, 0.28498786688, 0.66666662693)
        half = <float>0.5 * f * f
        log_z = half - (s * (half + t1 + t2) + (e * <float>9.0580006145e-06 + rest))
        result = e * <float>0.69313812256 - (log_z - f)
        return result if x <= <float>3.4028234664e38 else x  # inf and NaN pass through
    else:
        long_bits = <uint64_t>fl_bits_d(u)
        long_k = (long_bits - 0x3fe6a09e667f3bcdULL) >> 52
        f = fl_from_bits_d(<int64_t>(long_bits - (long_k << 52))) - one
        # An integer below 2**52 becomes a double through the mantissa of 2**52.
        e = fl_from_bits_d(<int64_t>(long_k | 0x4330000000000000ULL)) - 4503599627370496.0
        s = f / (two + f)
        z = s * s
        w = z * z
        t1 = w * fl_fma_d(w, fl_fma_d(w, 1.531383769920937332e-01, 2.222219843214978396e-01),
                          3.999999999940941908e-01)
        t2 = z * fl_fma_d(w, fl_fma_d(w, fl_fma_d(
            w, 1.479819860511658591e-01, 1.818357216161805012e-01), 2.857142874366239149e-01),
            6.666666666666735130e-01)
        half = 0.5 * f * f
        # What 1 + x rounded off, over u; it matters where u is near 1.
        rest = lost - lost * f if u < 1.4 else 0.0
        log_z = half - (s * (half + t1 + t2) + (e * 1.90821492927058770002e-10 + rest))
        result = e * 6.93147180369123816490e-01 - (log_z - f)
        return result if x <= 1.7976931348623157e308 else x  # inf and NaN pass through


cdef inline real times(real weight, real value) noexcept nogil:
    """weight * value, where 0 * inf counts as 0."""
    return <real>0.0 if weight == 0 else weight * value


cdef inline real subtract_product(real a, real b, real c) noexcept nogil:
    """c - a b"""
    if real is float:
        return fl_subtract_product_f(a, b, c)
    else:
        return fl_subtract_product_d(a, b, c)


cdef inline bint is_finite(double x) noexcept nogil:
    return x - x == 0.0


cdef inline float half_to_float(uint16_t h) noexcept nogil:
    cdef uint32_t sign = (<uint32_t>h & 0x8000) << 16
    cdef uint32_t magnitude = <uint32_t>h & 0x7fff
    cdef uint32_t normal = (magnitude << 13) + (<uint32_t>(127 - 15) << 23)
    cdef uint32_t special = (magnitude << 13) | 0x7f800000
    # By way of an integer, so that a flush of denormals in the caller does not matter.
    cdef uint32_t subnormal = <uint32_t>fl_bits_f(
        <float><int32_t>magnitude * <float>5.9604644775390625e-08)
    cdef uint32_t bits = subnormal if magnitude < 0x0400 else normal
    bits = special if magnitude >= 0x7c00 else bits
    return fl_from_bits_f(<int32_t>(bits | sign))


cdef inline uint16_t float_to_half(float x) noexcept nogil:
    """To nearest, ties to even."""
    cdef uint32_t bits = <uint32_t>fl_bits_f(x)
    cdef uint32_t sign = (bits >> 16) & 0x8000
    cdef uint32_t magnitude = bits & 0x7fffffff
    cdef uint32_t normal = (magnitude + <uint32_t>0xc8000fff + ((magnitude >> 13) & 1)) >> 13
    # Adding 0.5 moves the last bit of a half subnormal to the last bit of the float.
    cdef uint32_t subnormal = <uint32_t>fl_bits_f(
        fl_from_bits_f(<int32_t>magnitude) + <float>0.5) - 0x3f000000
    cdef uint32_t special = 0x7e00 if magnitude > 0x7f800000 else 0x7c00
    cdef uint32_t result = subnormal if magnitude < 0x38800000 else normal
    result = special if magnitude >= 0x477ff000 else result
    return <uint16_t>(result | sign)


cdef inline float bfloat_to_float(uint16_t b) noexcept nogil:
    return fl_from_bits_f(<int32_t>(<uint32_t>b << 16))


cdef inline uint16_t float_to_bfloat(float x) noexcept nogil:
    """To nearest, ties to even."""
    cdef uint32_t bits = <uint32_t>fl_bits_f(x)
    cdef uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16
    cdef uint32_t nan = (bits >> 16) | 0x40
    return <uint16_t>(nan if (bits & 0x7fffffff) > 0x7f800000 else rounded)
