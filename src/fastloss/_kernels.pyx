# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# cython: initializedcheck=False, overflowcheck=False
"""The Cython kernels: row arithmetic, tile arithmetic, then the drivers.

The contract is in ``_reference``.  This one source is built once per instruction set (see
meson.build); ``_cython`` picks a build.  What to know before reading on:

Bits come from source order.  No flag lets the compiler reassociate or contract.  Sums run in
LANES explicit lanes, so that the compiler can vectorise them without changing what they mean: a
row gives the same bits alone or in a batch, at any alignment, on any number of threads.  fma is
spelled out where the build has it, hence bits may differ between instruction sets.

Two layouts.  A *row* is a long run of classes next to each other: classes lie in the SIMD lanes,
and one online pass in blocks that fit the first cache level leaves exp(x - m) in the caller's
`out`, where a second pass, still in cache, finds it.  Where rows are short, or other samples lie
between the classes, a *tile* puts LANES samples in the SIMD lanes, copied (transposed, converted)
into scratch and back.

exp(x - m) is kept multiplied by SCALE, a power of two, so that what will be a subnormal result is
still a normal number: the final product rounds it, once.  The sum leaves one class out (the
target, or the maximum), which is what makes small losses exact.  0 * inf counts as 0.

The hot loops are the ones of exp_block, largest, sum_lanes and the tile_* functions: in the
assembly they must be straight runs of packed instructions (zmm registers in the v4 build, ymm in
v3), 64 elements around, without a call, a scalar instruction or a gather.
"""

cimport cython
cimport numpy as cnp
from cython.parallel cimport prange
from libc.stdint cimport (
    int8_t, int16_t, int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t,
)
from libc.math cimport exp as exp_any
from libc.string cimport memcpy, memset

import numpy as np

cnp.import_array()


cdef extern from *:
    """
    #include <math.h>
    #include <stdint.h>
    #include <string.h>
    #ifdef _OPENMP
    #define FL_OPENMP _OPENMP
    #else
    #define FL_OPENMP 0
    #endif

    static inline int32_t fl_bits_f(float x) { int32_t b; memcpy(&b, &x, 4); return b; }
    static inline float fl_from_bits_f(int32_t b) { float x; memcpy(&x, &b, 4); return x; }
    static inline int64_t fl_bits_d(double x) { int64_t b; memcpy(&b, &x, 8); return b; }
    static inline double fl_from_bits_d(int64_t b) { double x; memcpy(&x, &b, 8); return x; }

    /* Where fma is an instruction; elsewhere it would be a slow call. */
    #if defined(__FMA__) || defined(__FP_FAST_FMA)
    static inline float fl_fma_f(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
    static inline double fl_fma_d(double a, double b, double c) { return __builtin_fma(a, b, c); }
    #else
    static inline float fl_fma_f(float a, float b, float c) { return a * b + c; }
    static inline double fl_fma_d(double a, double b, double c) { return a * b + c; }
    #endif

    /* Results do not depend on a flush of denormals, or a rounding mode, that somebody set. */
    #if defined(__SSE2__)
    #include <xmmintrin.h>
    static inline unsigned fl_enter_ieee_mode(void) {
        unsigned mode = _mm_getcsr();
        _mm_setcsr(0x1f80);
        return mode;
    }
    static inline void fl_leave_ieee_mode(unsigned mode) { _mm_setcsr(mode); }
    #else
    static inline unsigned fl_enter_ieee_mode(void) { return 0; }
    static inline void fl_leave_ieee_mode(unsigned mode) { (void)mode; }
    #endif

    static int fl_cpu_runs(int level) {
    #if (defined(__x86_64__) || defined(__amd64__)) && defined(__GNUC__)
        __builtin_cpu_init();
        int v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")
              && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
        int v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")
              && __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq")
              && __builtin_cpu_supports("avx512vl");
        return level == 3 ? v3 : v4;
    #else
        (void)level;
        return 0;
    #endif
    }
    """
    enum:
        FL_OPENMP
    int32_t fl_bits_f(float) noexcept nogil
    float fl_from_bits_f(int32_t) noexcept nogil
    int64_t fl_bits_d(double) noexcept nogil
    double fl_from_bits_d(int64_t) noexcept nogil
    float fl_fma_f(float, float, float) noexcept nogil
    double fl_fma_d(double, double, double) noexcept nogil
    unsigned int fl_enter_ieee_mode() noexcept nogil
    void fl_leave_ieee_mode(unsigned int) noexcept nogil
    int fl_cpu_runs(int) noexcept nogil
    const double INFINITY
    const double NAN


ctypedef fused real:
    float
    double


cdef enum:
    LANES = 64  # samples in a tile; independent partial sums in a row
    HALF_LANES = 32
    RUN = 16  # float32 additions to one lane before the sum moves on to float64
    BLOCK = 1024  # classes of a row that are worked on while they are in the first cache level
    SHORT_ROW = 64  # rows of at most so many classes go into tiles, samples in the SIMD lanes
    GROUP = 16384  # elements of the rows that make up one unit of work
    CHECK_BLOCK = 4096  # targets that one unit of check_target reads
    CACHE_LINE = 64

cdef enum Storage:
    FLOAT32
    FLOAT64
    FLOAT16
    BFLOAT16


cdef struct Job:
    # One call, as its threads see it.
    Py_ssize_t rows, num_classes, inner
    Storage storage
    const char* logits  # or log_probs, or probs
    const char* other  # grad_output, or target probabilities
    Storage other_storage
    char* out  # or grad; NULL where only the loss is wanted
    const char* target
    int target_kind  # 0 to 3: signed, of 1 << kind bytes; 4 to 7: unsigned
    int64_t ignore_index
    const double* weight
    double weight_sum
    const double* sample_weight
    double smoothing, z_loss, scale
    char* losses
    double* partial  # the sum of the losses of each unit
    Py_ssize_t group  # rows in a unit of work
    Py_ssize_t blocks  # BLOCKs in a row


cdef struct Rows:
    # The scalar step, for as many rows as there are lanes. In:
    double maximum[LANES]
    double others[LANES]  # sum of exp(x - maximum) over all classes but one
    double target_logit[LANES]
    double target_weight[LANES]
    double row_weight[LANES]  # sample weight; 0 for rows that count for nothing
    double gap[LANES]  # sum of w_c (maximum - x_c)
    double mass[LANES]  # of soft targets: sum of w_c t_c, all classes but the maximum's
    double top_mass[LANES]  # of soft targets: w_k t_k at the maximum's class k
    # Out: g_c = factor * exp(x_c - maximum) - spread * w_c, except at the class left out.
    double loss[LANES]
    double factor[LANES]
    double spread[LANES]
    double left_out[LANES]


cdef struct Reduced:
    double maximum
    double others
    Py_ssize_t index  # of the maximum


cdef enum Operation:
    SOFTMAX
    LOG_SOFTMAX
    LOGSUMEXP
    SOFTMAX_BACKWARD
    LOG_SOFTMAX_BACKWARD
    CROSS_ENTROPY
    CROSS_ENTROPY_SOFT
    NLL
    NLL_BACKWARD


# ---------------------------------------------------------------------------------------------
# Numbers
# ---------------------------------------------------------------------------------------------

cdef inline double scale_of(real unused) noexcept nogil:
    if real is float:
        return 16777216.0  # 2**24
    else:
        return 9007199254740992.0  # 2**53


cdef inline double tiny_of(real unused) noexcept nogil:
    """The smallest normal number."""
    if real is float:
        return 1.1754943508222875e-38
    else:
        return 2.2250738585072014e-308


cdef inline real exp_scaled(real x, real m) noexcept nogil:
    """SCALE * exp(x - m) for x <= m; 0 below half the smallest subnormal; NaN for NaN."""
    cdef real d = x - m
    # What the subtraction lost (TwoSum); it goes into the reduced argument, free of charge.
    cdef real back = d - x
    cdef real lost = (x - (d - back)) - (m + back)
    cdef real n, r, p, shifted
    if real is float:
        # Adding 1.5 * 2**23 rounds to an integer and leaves it in the low bits.
        shifted = fl_fma_f(d, 1.44269504, 12582912.0)
        n = shifted - <float>12582912.0
        r = fl_fma_f(n, -0.693145751953125, d)
        r = fl_fma_f(n, -1.42860682e-6, r + lost)
        p = fl_fma_f(0.00131687098951, r, 0.00835358145597)
        p = fl_fma_f(p, r, 0.0416763574161)
        p = fl_fma_f(p, r, 0.166667094605)
        p = fl_fma_f(p, r, 0.499999918849)
        p = fl_fma_f(p, r, 1.0)
        p = fl_fma_f(p, r, 1.0)
        # A product, not a sum of exponents: NaN stays NaN.
        p = p * fl_from_bits_f(<int32_t>(<uint32_t>(fl_bits_f(shifted) + 127 + 24) << 23))
        return <float>0.0 if d < <float>-103.9721 else p
    else:
        shifted = fl_fma_d(d, 1.4426950408889634, 6755399441055744.0)
        n = shifted - 6755399441055744.0
        r = fl_fma_d(n, -6.93147180369123816490e-01, d)
        r = fl_fma_d(n, -1.90821492927058770002e-10, r + lost)
        p = fl_fma_d(2.5110047135431713555e-8, r, 2.7632652169579558723e-7)
        p = fl_fma_d(p, r, 2.7557242344003567523e-6)
        p = fl_fma_d(p, r, 0.000024801487335535663603)
        p = fl_fma_d(p, r, 0.00019841269886584525699)
        p = fl_fma_d(p, r, 0.0013888888947812472924)
        p = fl_fma_d(p, r, 0.0083333333333222094146)
        p = fl_fma_d(p, r, 0.041666666666522018292)
        p = fl_fma_d(p, r, 0.16666666666666674528)
        p = fl_fma_d(p, r, 0.50000000000000102221)
        p = fl_fma_d(p, r, 1.0)
        p = fl_fma_d(p, r, 1.0)
        p = p * fl_from_bits_d(<int64_t>(<uint64_t>(fl_bits_d(shifted) + 1023 + 53) << 52))
        return 0.0 if d < -745.1332191019412 else p


cdef inline double exp_of(double d) noexcept nogil:
    """exp(d) for d <= 0."""
    return exp_scaled[double](d, 0.0) * 1.1102230246251565e-16


cdef inline double log1p_of(double x) noexcept nogil:
    """log(1 + x) for x >= 0, free of branches so that it vectorises (after fdlibm's e_log.c)."""
    cdef double u = 1.0 + x
    cdef double back = u - 1.0
    cdef double lost = (1.0 - (u - back)) + (x - back)
    # u = 2**k * z with z in [sqrt(1/2), sqrt(2))
    cdef uint64_t bits = <uint64_t>fl_bits_d(u)
    cdef uint64_t k = (bits - 0x3fe6a09e667f3bcdULL) >> 52
    cdef double f = fl_from_bits_d(<int64_t>(bits - (k << 52))) - 1.0
    # An integer below 2**52 becomes a double through the mantissa of 2**52.
    cdef double e = fl_from_bits_d(<int64_t>(k | 0x4330000000000000ULL)) - 4503599627370496.0
    cdef double s = f / (2.0 + f)
    cdef double z = s * s
    cdef double w = z * z
    cdef double t1 = w * fl_fma_d(w, fl_fma_d(w, 1.531383769920937332e-01,
                                              2.222219843214978396e-01), 3.999999999940941908e-01)
    cdef double t2 = z * fl_fma_d(w, fl_fma_d(w, fl_fma_d(
        w, 1.479819860511658591e-01, 1.818357216161805012e-01), 2.857142874366239149e-01),
        6.666666666666735130e-01)
    cdef double half = 0.5 * f * f
    cdef double log_z = half - (s * (half + t1 + t2) + (
        e * 1.90821492927058770002e-10 + lost / u))
    cdef double result = e * 6.93147180369123816490e-01 - (log_z - f)
    return result if x <= 1.7976931348623157e308 else x  # inf and NaN pass through


cdef inline float half_to_float(uint16_t h) noexcept nogil:
    cdef uint32_t sign = (<uint32_t>h & 0x8000) << 16
    cdef uint32_t magnitude = <uint32_t>h & 0x7fff
    cdef uint32_t normal = (magnitude << 13) + (<uint32_t>(127 - 15) << 23)
    cdef uint32_t special = (magnitude << 13) | 0x7f800000
    # By way of an integer, so that a flush of denormals in the caller does not matter.
    cdef uint32_t subnormal = <uint32_t>fl_bits_f(<float><int32_t>magnitude * <float>5.9604644775390625e-08)
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


# ---------------------------------------------------------------------------------------------
# Blocks: runs of at most BLOCK elements
# ---------------------------------------------------------------------------------------------

cdef inline Py_ssize_t itemsize(Storage storage) noexcept nogil:
    return 4 if storage == FLOAT32 else 8 if storage == FLOAT64 else 2


cdef inline const real* load_block(
    Storage storage, const char* data, Py_ssize_t start, Py_ssize_t n, real* buffer
) noexcept nogil:
    """Elements start to start + n in the compute type: in place, or converted into buffer."""
    cdef const uint16_t* halves = (<const uint16_t*>data) + start
    cdef Py_ssize_t i
    if storage == FLOAT16:
        for i in range(n):
            buffer[i] = half_to_float(halves[i])
        return buffer
    if storage == BFLOAT16:
        for i in range(n):
            buffer[i] = bfloat_to_float(halves[i])
        return buffer
    return (<const real*>data) + start


cdef inline void store_block(
    Storage storage, char* data, Py_ssize_t start, Py_ssize_t n, const real* values
) noexcept nogil:
    cdef uint16_t* halves = (<uint16_t*>data) + start
    cdef real* floats = (<real*>data) + start
    cdef Py_ssize_t i
    if storage == FLOAT16:
        for i in range(n):
            halves[i] = float_to_half(<float>values[i])
    elif storage == BFLOAT16:
        for i in range(n):
            halves[i] = float_to_bfloat(<float>values[i])
    elif floats != values:
        memcpy(floats, values, n * sizeof(real))


cdef inline real largest(const real* x, Py_ssize_t n) noexcept nogil:
    """The maximum, NaN left aside."""
    cdef real lane[LANES]
    cdef Py_ssize_t chunk, i, j, whole = n - n % LANES
    for j in range(LANES):
        lane[j] = <real>-INFINITY
    for chunk in range(n // LANES):
        i = chunk * LANES
        for j in range(LANES):
            lane[j] = x[i + j] if x[i + j] > lane[j] else lane[j]
    for j in range(n - whole):
        lane[j] = x[whole + j] if x[whole + j] > lane[j] else lane[j]
    halve_largest(lane, 32)
    halve_largest(lane, 16)
    halve_largest(lane, 8)
    halve_largest(lane, 4)
    halve_largest(lane, 2)
    halve_largest(lane, 1)
    return lane[0]


cdef inline void halve_largest(real* lane, Py_ssize_t half) noexcept nogil:
    cdef Py_ssize_t j
    for j in range(half):
        lane[j] = lane[j + half] if lane[j + half] > lane[j] else lane[j]


cdef inline Py_ssize_t find(const real* x, Py_ssize_t n, real value) noexcept nogil:
    """The first position of value, or 0."""
    cdef Py_ssize_t chunk, i, j, whole = n - n % LANES
    cdef int hits
    for chunk in range(n // LANES):
        i = chunk * LANES
        hits = 0
        for j in range(LANES):
            hits |= x[i + j] == value
        if hits:
            for j in range(LANES):
                if x[i + j] == value:
                    return i + j
    for j in range(whole, n):
        if x[j] == value:
            return j
    return 0


cdef inline void exp_block(const real* x, Py_ssize_t n, real m, real* e) noexcept nogil:
    cdef Py_ssize_t i
    if e == x:  # said aloud, lest the compiler's test for overlap send us down a scalar loop
        for i in range(n):
            e[i] = exp_scaled(e[i], m)
    else:
        for i in range(n):
            e[i] = exp_scaled(x[i], m)


cdef inline double fold(const real* lane) noexcept nogil:
    """The sum of the lanes, in float64 and in a fixed order."""
    cdef double total[HALF_LANES]
    cdef Py_ssize_t j
    for j in range(HALF_LANES):
        total[j] = <double>lane[j] + <double>lane[j + HALF_LANES]
    halve_sum(total, 16)
    halve_sum(total, 8)
    halve_sum(total, 4)
    return (total[0] + total[2]) + (total[1] + total[3])


cdef inline void halve_sum(double* total, Py_ssize_t half) noexcept nogil:
    cdef Py_ssize_t j
    for j in range(half):
        total[j] += total[j + half]


cdef inline double sum_lanes(const real* e, Py_ssize_t n) noexcept nogil:
    cdef real lane[LANES]
    cdef Py_ssize_t chunk, i, j, whole = n - n % LANES
    for j in range(LANES):
        lane[j] = 0
    for chunk in range(n // LANES):
        i = chunk * LANES
        for j in range(LANES):
            lane[j] += e[i + j]
    for j in range(n - whole):
        lane[j] += e[whole + j]
    return fold(lane)


cdef inline double dot_lanes(const real* a, const real* b, Py_ssize_t n) noexcept nogil:
    cdef real lane[LANES]
    cdef Py_ssize_t chunk, i, j, whole = n - n % LANES
    for j in range(LANES):
        lane[j] = 0
    for chunk in range(n // LANES):
        i = chunk * LANES
        for j in range(LANES):
            lane[j] += a[i + j] * b[i + j]
    for j in range(n - whole):
        lane[j] += a[whole + j] * b[whole + j]
    return fold(lane)


cdef inline double gap_term(double weight, double m, double x) noexcept nogil:
    """weight * (m - x), where 0 * inf counts as 0."""
    return 0.0 if weight == 0.0 else weight * (m - x)


cdef inline double soft_target(double t, double smoothing, double uniform) noexcept nogil:
    return fl_fma_d(1.0 - smoothing, t, uniform)


cdef inline double gap_lanes(
    const real* x, const double* weight, Py_ssize_t n, double m
) noexcept nogil:
    """sum of w_c (m - x_c), in float64: it may exceed the float32 range on its way."""
    cdef double lane[LANES]
    cdef Py_ssize_t chunk, i, j, width
    for j in range(LANES):
        lane[j] = 0.0
    for chunk in range((n + LANES - 1) // LANES):
        i = chunk * LANES
        width = min(n - i, <Py_ssize_t>LANES)
        if weight == NULL:
            for j in range(width):
                lane[j] += m - <double>x[i + j]
        else:
            for j in range(width):
                lane[j] += gap_term(weight[i + j], m, x[i + j])
    return fold(lane)


cdef inline void soft_lanes(
    const Job* job, const real* x, const real* t, Py_ssize_t start, Py_ssize_t n, double m,
    double* gap, double* mass,
) noexcept nogil:
    """Add the sums of w_c t_c (m - x_c) and of w_c t_c over classes start to start + n."""
    cdef double gap_lane[LANES]
    cdef double mass_lane[LANES]
    cdef double wt
    cdef const double* weight = job.weight + start
    cdef double kept = 1.0 - job.smoothing, uniform = job.smoothing / job.num_classes
    cdef Py_ssize_t chunk, i, j, width
    for j in range(LANES):
        gap_lane[j] = mass_lane[j] = 0.0
    for chunk in range((n + LANES - 1) // LANES):
        i = chunk * LANES
        width = min(n - i, <Py_ssize_t>LANES)
        if job.weight == NULL:
            for j in range(width):
                wt = kept * t[i + j] + uniform
                mass_lane[j] += wt
                gap_lane[j] += gap_term(wt, m, x[i + j])
        else:
            for j in range(width):
                wt = weight[i + j] * (kept * t[i + j] + uniform)
                mass_lane[j] += wt
                gap_lane[j] += gap_term(wt, m, x[i + j])
    gap[0] += fold(gap_lane)
    mass[0] += fold(mass_lane)


# ---------------------------------------------------------------------------------------------
# The scalar step: from what a row was reduced to, its loss and the coefficients of its gradient
# ---------------------------------------------------------------------------------------------

cdef void softmax_step(Rows* r, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        r.factor[i] = 1.0 / (1.0 + r.others[i])
        r.spread[i] = 0.0
        r.left_out[i] = r.factor[i]


cdef void cross_entropy_step(const Job* job, Rows* r, Py_ssize_t n) noexcept nogil:
    cdef double uniform = job.smoothing / job.num_classes
    cdef double spread = uniform * job.weight_sum
    cdef double b, d, e_y, log_s, lse, z_slope, total, a, loss, weight, left_out
    cdef Py_ssize_t i
    for i in range(n):
        b = (1.0 - job.smoothing) * r.target_weight[i]
        d = r.target_logit[i] - r.maximum[i]
        e_y = exp_of(d)
        log_s = log1p_of(r.others[i] + (e_y - 1.0))
        lse = r.maximum[i] + log_s
        z_slope = 2.0 * job.z_loss * lse
        loss = gap_term(b, log_s, d) + spread * log_s + uniform * r.gap[i] + 0.5 * z_slope * lse
        r.loss[i] = 0.0 if r.row_weight[i] == 0.0 else loss * r.row_weight[i]

        total = r.others[i] + e_y
        a = b + spread + z_slope
        left_out = spread + z_slope - uniform * r.target_weight[i] - a * (r.others[i] / total)
        weight = r.row_weight[i] * job.scale
        r.factor[i] = 0.0 if weight == 0.0 else weight * a / total
        r.spread[i] = weight * uniform
        r.left_out[i] = 0.0 if weight == 0.0 else weight * left_out


cdef void cross_entropy_soft_step(const Job* job, Rows* r, Py_ssize_t n) noexcept nogil:
    cdef double log_s, lse, z_slope, total, mass, a, loss, weight, left_out
    cdef Py_ssize_t i
    for i in range(n):
        mass = r.mass[i] + r.top_mass[i]
        log_s = log1p_of(r.others[i])
        lse = r.maximum[i] + log_s
        z_slope = 2.0 * job.z_loss * lse
        loss = mass * log_s + r.gap[i] + 0.5 * z_slope * lse
        r.loss[i] = 0.0 if r.row_weight[i] == 0.0 else loss * r.row_weight[i]

        total = 1.0 + r.others[i]
        a = mass + z_slope
        # mass without the maximum's share: subtracted before, not after, p is rounded to 1.
        left_out = r.mass[i] + z_slope - a * (r.others[i] / total)
        weight = r.row_weight[i] * job.scale
        r.factor[i] = 0.0 if weight == 0.0 else weight * a / total
        r.spread[i] = weight
        r.left_out[i] = 0.0 if weight == 0.0 else weight * left_out


ctypedef fused integer:
    int8_t
    int16_t
    int32_t
    int64_t
    uint8_t
    uint16_t
    uint32_t
    uint64_t


cdef inline void widen(const integer* source, Py_ssize_t n, int64_t* target) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        if integer is uint64_t:  # what does not fit is out of range, and stays so
            target[i] = <int64_t>min(source[i], <uint64_t>0x7fffffffffffffff)
        else:
            target[i] = <int64_t>source[i]


cdef void read_indices(
    const Job* job, Py_ssize_t first, Py_ssize_t n, int64_t* target
) noexcept nogil:
    cdef const char* t = job.target
    if job.target_kind == 0:
        widen((<const int8_t*>t) + first, n, target)
    elif job.target_kind == 1:
        widen((<const int16_t*>t) + first, n, target)
    elif job.target_kind == 2:
        widen((<const int32_t*>t) + first, n, target)
    elif job.target_kind == 3:
        widen((<const int64_t*>t) + first, n, target)
    elif job.target_kind == 4:
        widen((<const uint8_t*>t) + first, n, target)
    elif job.target_kind == 5:
        widen((<const uint16_t*>t) + first, n, target)
    elif job.target_kind == 6:
        widen((<const uint32_t*>t) + first, n, target)
    else:
        widen((<const uint64_t*>t) + first, n, target)


cdef void read_targets(
    const Job* job, Py_ssize_t first, Py_ssize_t n, int64_t* y, Rows* r
) noexcept nogil:
    """Targets, and the weights of their rows: 0 where a row counts for nothing."""
    cdef bint smooth = job.smoothing * job.weight_sum != 0.0 or job.z_loss != 0.0
    cdef Py_ssize_t i
    cdef int64_t target
    cdef double weight
    read_indices(job, first, n, y)
    for i in range(n):
        target = y[i]
        weight = 1.0 if job.sample_weight == NULL else job.sample_weight[first + i]
        # Targets were checked, but another thread may have changed them since.
        if target == job.ignore_index or <uint64_t>target >= <uint64_t>job.num_classes:
            target = 0
            weight = 0.0
        y[i] = target
        r.target_weight[i] = 1.0 if job.weight == NULL else job.weight[target]
        if not smooth and (1.0 - job.smoothing) * r.target_weight[i] == 0.0:
            weight = 0.0
        r.row_weight[i] = weight


cdef void read_sample_weights(
    const Job* job, Py_ssize_t first, Py_ssize_t n, Rows* r
) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        r.row_weight[i] = 1.0 if job.sample_weight == NULL else job.sample_weight[first + i]


cdef void deliver_losses(
    const Job* job, Py_ssize_t unit, Py_ssize_t n, const double* loss
) noexcept nogil:
    """Round row losses to the compute dtype, hand them out, sum what was handed out."""
    cdef Py_ssize_t i, first = unit * job.group
    cdef double total = 0.0
    cdef float rounded
    for i in range(n):
        if job.storage == FLOAT64:
            total += loss[i]
            if job.losses != NULL:
                (<double*>job.losses)[first + i] = loss[i]
        else:
            rounded = <float>loss[i]
            total += rounded
            if job.losses != NULL:
                (<float*>job.losses)[first + i] = rounded
    job.partial[unit] = total


# ---------------------------------------------------------------------------------------------
# Rows: classes in the SIMD lanes
# ---------------------------------------------------------------------------------------------
# A unit is a group of rows, so that the scalar step has something to vectorise. Scratch: two
# blocks, the reference point of every block of the group, and, for half types, the group's rows.

cdef inline Py_ssize_t rows_in_unit(const Job* job, Py_ssize_t unit) noexcept nogil:
    return min(job.group, job.rows - unit * job.group)


cdef inline real* references_of(const Job* job, real* scratch, Py_ssize_t g) noexcept nogil:
    return scratch + 2 * BLOCK + g * job.blocks


cdef inline real* kept_row(
    const Job* job, Py_ssize_t row, Py_ssize_t g, real* scratch
) noexcept nogil:
    """Where exp(x - m) stays until it is written: in `out` itself unless that is of a half type.

    So the memory traffic of `out` overlaps the arithmetic; NULL where there is no `out`.
    """
    if job.out == NULL:
        return NULL
    if itemsize(job.storage) == 2:
        return scratch + 2 * BLOCK + job.group * job.blocks + g * job.num_classes
    return (<real*>job.out) + row * job.num_classes


cdef inline const char* row_of(
    const Job* job, const char* data, Storage storage, Py_ssize_t row
) noexcept nogil:
    return data + row * job.num_classes * itemsize(storage)


cdef Reduced largest_of_row(const Job* job, const char* x, real* buffer) noexcept nogil:
    cdef Reduced r
    cdef const real* block
    cdef real m = <real>-INFINITY, block_m
    cdef Py_ssize_t b, c, n
    r.index = 0
    r.others = 0.0
    for b in range(job.blocks):
        c = b * BLOCK
        n = min(job.num_classes - c, <Py_ssize_t>BLOCK)
        block = load_block(job.storage, x, c, n, buffer)
        block_m = largest(block, n)
        if block_m > m:
            m = block_m
            r.index = c + find(block, n, m)
    r.maximum = m
    return r


cdef Reduced reduce_row(
    const Job* job, const char* x, Py_ssize_t skip, real m, real* kept, real* references,
    real* scratch,
) noexcept nogil:
    """The maximum and the sum of exponentials without class `skip`, or, at -1, without the maximum.

    `m` is where the running maximum starts. kept, unless NULL, receives SCALE * exp(x - reference),
    the reference of a block being the running maximum at its time, and 0 at the class left out.
    """
    cdef Reduced r
    cdef const real* block
    cdef real* e
    cdef real block_m, reference
    cdef double others = 0.0, scale = scale_of(m)
    cdef Py_ssize_t b, c, n, left_out, index = -1
    for b in range(job.blocks):
        c = b * BLOCK
        n = min(job.num_classes - c, <Py_ssize_t>BLOCK)
        block = load_block(job.storage, x, c, n, scratch)
        block_m = largest(block, n)
        if block_m > m or (index < 0 and block_m == m) or c == 0:
            if block_m > m and c > 0:
                if skip < 0 and index >= 0:
                    others += 1.0
                    if kept != NULL:
                        kept[index] = <real>scale
                others *= exp_of(<double>m - <double>block_m)
            m = block_m if block_m > m else m
            if skip < 0 and block_m == m:
                index = c + find(block, n, m)
        # Before the first finite class any finite reference will do: exp(-inf - 0) is 0.
        reference = m if m > <real>-INFINITY else <real>0.0
        e = scratch + BLOCK if kept == NULL else kept + c
        exp_block(block, n, reference, e)
        left_out = (index if skip < 0 else skip) - c
        if 0 <= left_out < n:
            e[left_out] = 0
        others += sum_lanes(e, n) / scale
        references[b] = m
    r.maximum = m
    r.others = others + (<double>m - <double>m)  # NaN where there is no finite maximum
    r.index = max(index, <Py_ssize_t>0)
    return r


cdef void write_row(
    const Job* job, Py_ssize_t row, Py_ssize_t i, const Rows* r, Py_ssize_t index, real* kept,
    const real* references, real* scratch,
) noexcept nogil:
    """From SCALE * exp(x - reference) to the result, in place, then on to a half type."""
    cdef char* out = <char*>row_of(job, job.out, job.storage, row)
    cdef const real* t
    cdef real* e
    cdef real f, one = 0
    cdef double factor, spread = r.spread[i], scale = scale_of(one)
    cdef double keep = 1.0 - job.smoothing, uniform = job.smoothing / job.num_classes
    cdef const double* w
    cdef Py_ssize_t b, c, j, n
    if r.row_weight[i] == 0.0:
        memset(out, 0, job.num_classes * itemsize(job.storage))
        return
    for b in range(job.blocks):
        c = b * BLOCK
        n = min(job.num_classes - c, <Py_ssize_t>BLOCK)
        e = kept + c
        factor = r.factor[i]
        if references[b] != r.maximum[i]:
            factor *= exp_of(references[b] - r.maximum[i])
        if -tiny_of(one) < factor / scale < tiny_of(one):
            # The factor would lose its low bits as a subnormal: take SCALE off first.
            for j in range(n):
                e[j] *= <real>(1.0 / scale)
            f = <real>factor
        else:
            f = <real>(factor / scale)
        w = job.weight + c
        if job.other != NULL:
            t = load_block(job.other_storage, row_of(job, job.other, job.other_storage, row), c, n,
                           scratch)
            if job.weight == NULL:
                for j in range(n):
                    e[j] = e[j] * f - <real>(spread * (keep * t[j] + uniform))
            else:
                for j in range(n):
                    e[j] = e[j] * f - <real>(spread * w[j] * (keep * t[j] + uniform))
        elif spread == 0.0:
            for j in range(n):
                e[j] *= f
        elif job.weight == NULL:
            for j in range(n):
                e[j] = e[j] * f - <real>spread
        else:
            for j in range(n):
                e[j] = e[j] * f - <real>(spread * w[j])
        if c <= index < c + n:
            e[index - c] = <real>r.left_out[i]
        store_block(job.storage, out, c, n, e)


cdef void softmax_rows(const Job* job, Py_ssize_t unit, real* scratch) noexcept nogil:
    cdef Rows r
    cdef Reduced reduced
    cdef Py_ssize_t index[LANES]
    cdef Py_ssize_t i, row, n = rows_in_unit(job, unit)
    for i in range(n):
        row = unit * job.group + i
        reduced = reduce_row(
            job, row_of(job, job.logits, job.storage, row), -1, <real>-INFINITY,
            kept_row(job, row, i, scratch), references_of(job, scratch, i), scratch,
        )
        r.maximum[i], r.others[i], index[i] = reduced.maximum, reduced.others, reduced.index
        r.row_weight[i] = 1.0
    softmax_step(&r, n)
    for i in range(n):
        row = unit * job.group + i
        write_row(job, row, i, &r, index[i], kept_row(job, row, i, scratch),
                  references_of(job, scratch, i), scratch)


cdef void log_softmax_rows(
    const Job* job, Operation operation, Py_ssize_t unit, real* scratch
) noexcept nogil:
    """log_softmax, or, without its second pass, logsumexp."""
    cdef Reduced reduced
    cdef const char* x
    cdef const real* block
    cdef real* result = scratch + BLOCK
    cdef real m, log_s
    cdef Py_ssize_t i, row, b, c, j, n
    for i in range(rows_in_unit(job, unit)):
        row = unit * job.group + i
        x = row_of(job, job.logits, job.storage, row)
        reduced = reduce_row(job, x, -1, <real>-INFINITY, <real*>NULL,
                             references_of(job, scratch, i), scratch)
        m, log_s = <real>reduced.maximum, <real>log1p_of(reduced.others)
        if operation == LOGSUMEXP:
            result[0] = <real>(reduced.maximum + log1p_of(reduced.others))
            store_block(job.storage, job.out, row, 1, result)
            continue
        for b in range(job.blocks):
            c = b * BLOCK
            n = min(job.num_classes - c, <Py_ssize_t>BLOCK)
            block = load_block(job.storage, x, c, n, scratch)
            for j in range(n):
                result[j] = (block[j] - m) - log_s
            store_block(job.storage, <char*>row_of(job, job.out, job.storage, row), c, n, result)


cdef void cross_entropy_rows(
    const Job* job, Operation operation, Py_ssize_t unit, real* scratch
) noexcept nogil:
    cdef Rows r
    cdef Reduced reduced
    cdef int64_t y[LANES]
    cdef const char* x
    cdef Py_ssize_t i, row, n = rows_in_unit(job, unit)
    if operation == CROSS_ENTROPY:
        read_targets(job, unit * job.group, n, y, &r)
    else:
        read_sample_weights(job, unit * job.group, n, &r)
    for i in range(n):
        r.maximum[i] = r.others[i] = r.target_logit[i] = r.gap[i] = 0.0
        r.mass[i] = r.top_mass[i] = 0.0
        if r.row_weight[i] == 0.0:
            continue
        row = unit * job.group + i
        x = row_of(job, job.logits, job.storage, row)
        reduced.maximum = -INFINITY
        if operation == CROSS_ENTROPY_SOFT:
            reduced = largest_of_row(job, x, scratch)
            y[i] = reduced.index
            soft_sums(job, row, i, &r, reduced, scratch)
        else:
            r.target_logit[i] = load_block(job.storage, x, y[i], 1, scratch)[0]
            if job.smoothing != 0.0:
                reduced = largest_of_row(job, x, scratch)
                r.gap[i] = gap_of_row(job, x, reduced.maximum, scratch)
        reduced = reduce_row(
            job, x, y[i], <real>reduced.maximum, kept_row(job, row, i, scratch),
            references_of(job, scratch, i), scratch,
        )
        r.maximum[i], r.others[i] = reduced.maximum, reduced.others
    if operation == CROSS_ENTROPY:
        cross_entropy_step(job, &r, n)
    else:
        cross_entropy_soft_step(job, &r, n)
    deliver_losses(job, unit, n, r.loss)
    if job.out == NULL:
        return
    for i in range(n):
        row = unit * job.group + i
        write_row(job, row, i, &r, y[i], kept_row(job, row, i, scratch),
                  references_of(job, scratch, i), scratch)


cdef double gap_of_row(
    const Job* job, const char* x, double maximum, real* scratch
) noexcept nogil:
    cdef const double* weight = NULL
    cdef double gap = 0.0
    cdef Py_ssize_t b, c, n
    for b in range(job.blocks):
        c = b * BLOCK
        n = min(job.num_classes - c, <Py_ssize_t>BLOCK)
        if job.weight != NULL:
            weight = job.weight + c
        gap += gap_lanes(load_block(job.storage, x, c, n, scratch), weight, n, maximum)
    return gap


cdef void soft_sums(
    const Job* job, Py_ssize_t row, Py_ssize_t i, Rows* r, Reduced top, real* scratch
) noexcept nogil:
    """What the scalar step wants to know of soft targets."""
    cdef const char* x = row_of(job, job.logits, job.storage, row)
    cdef const char* targets = row_of(job, job.other, job.other_storage, row)
    cdef const real* block
    cdef const real* t
    cdef Py_ssize_t b, c, n, k
    for b in range(job.blocks):
        c = b * BLOCK
        n = min(job.num_classes - c, <Py_ssize_t>BLOCK)
        block = load_block(job.storage, x, c, n, scratch)
        t = load_block(job.other_storage, targets, c, n, scratch + BLOCK)
        k = min(max(top.index - c, <Py_ssize_t>0), n)
        soft_lanes(job, block, t, c, k, top.maximum, &r.gap[i], &r.mass[i])
        if k < n and c + k == top.index:
            soft_lanes(job, block + k, t + k, top.index, 1, top.maximum, &r.gap[i], &r.top_mass[i])
            k += 1
        soft_lanes(job, block + k, t + k, c + k, n - k, top.maximum, &r.gap[i], &r.mass[i])


cdef void backward_rows(
    const Job* job, Operation operation, Py_ssize_t unit, real* scratch
) noexcept nogil:
    """softmax_backward: p (g - sum g p); log_softmax_backward: g - exp(l) sum g."""
    cdef const char* forward
    cdef const char* upstream
    cdef const real* p
    cdef const real* g
    cdef real* result = scratch + BLOCK
    cdef real m = 0, f, one = 0
    cdef double total
    cdef Py_ssize_t i, row, b, c, j, n
    for i in range(rows_in_unit(job, unit)):
        row = unit * job.group + i
        forward = row_of(job, job.logits, job.storage, row)
        upstream = row_of(job, job.other, job.storage, row)
        total = 0.0
        for b in range(job.blocks):
            c = b * BLOCK
            n = min(job.num_classes - c, <Py_ssize_t>BLOCK)
            g = load_block(job.storage, upstream, c, n, scratch)
            if operation == SOFTMAX_BACKWARD:
                p = load_block(job.storage, forward, c, n, result)
                total += dot_lanes(g, p, n)
            else:
                total += sum_lanes(g, n)
        f = <real>total
        if operation == LOG_SOFTMAX_BACKWARD:
            # Log-probabilities are at most 0, but the formula holds for any l.
            m = <real>max(largest_of_row(job, forward, scratch).maximum, 0.0)
            f = <real>(total * exp_any(m) / scale_of(one))
        for b in range(job.blocks):
            c = b * BLOCK
            n = min(job.num_classes - c, <Py_ssize_t>BLOCK)
            g = load_block(job.storage, upstream, c, n, scratch)
            p = load_block(job.storage, forward, c, n, result)
            if operation == SOFTMAX_BACKWARD:
                for j in range(n):
                    result[j] = p[j] * (g[j] - f)
            else:
                for j in range(n):
                    result[j] = g[j] - exp_scaled(p[j], m) * f
            store_block(job.storage, <char*>row_of(job, job.out, job.storage, row), c, n, result)


# ---------------------------------------------------------------------------------------------
# Tiles: samples in the SIMD lanes
# ---------------------------------------------------------------------------------------------
# A unit is LANES samples that follow each other in (outer, inner) order, held in scratch as
# [class][lane]; lanes without a sample hold zeros. Scratch: two tiles and a line.

cdef inline void load_tile(
    const Job* job, Storage storage, const char* data, Py_ssize_t unit, real* tile, real* buffer
) noexcept nogil:
    cdef Py_ssize_t C = job.num_classes, inner = job.inner
    cdef Py_ssize_t first = unit * LANES
    cdef Py_ssize_t n = min(job.rows - first, <Py_ssize_t>LANES)
    cdef Py_ssize_t lane = 0, width, c, j, o, i
    cdef const real* line
    if n < LANES:
        memset(tile, 0, C * LANES * sizeof(real))
    if inner == 1:
        for lane in range(n):
            line = load_block(storage, data, (first + lane) * C, C, buffer)
            for c in range(C):
                tile[c * LANES + lane] = line[c]
        return
    while lane < n:
        o, i = (first + lane) // inner, (first + lane) % inner
        width = min(n - lane, inner - i)
        for c in range(C):
            line = load_block(storage, data, (o * C + c) * inner + i, width, buffer)
            memcpy(tile + c * LANES + lane, line, width * sizeof(real))
        lane += width


cdef inline void store_tile(
    const Job* job, Py_ssize_t unit, const real* tile, real* buffer
) noexcept nogil:
    cdef Py_ssize_t C = job.num_classes, inner = job.inner
    cdef Py_ssize_t first = unit * LANES
    cdef Py_ssize_t n = min(job.rows - first, <Py_ssize_t>LANES)
    cdef Py_ssize_t lane = 0, width, c, o, i
    if inner == 1:
        for lane in range(n):
            for c in range(C):
                buffer[c] = tile[c * LANES + lane]
            store_block(job.storage, job.out, (first + lane) * C, C, buffer)
        return
    while lane < n:
        o, i = (first + lane) // inner, (first + lane) % inner
        width = min(n - lane, inner - i)
        for c in range(C):
            store_block(job.storage, job.out, (o * C + c) * inner + i, width,
                        tile + c * LANES + lane)
        lane += width


cdef void clear_dead_lanes(const Job* job, const Rows* r, real* tile) noexcept nogil:
    """Nothing of a row that counts for nothing, a NaN least of all, gets through."""
    cdef Py_ssize_t c, lane
    for lane in range(LANES):
        if r.row_weight[lane] == 0.0:
            for c in range(job.num_classes):
                tile[c * LANES + lane] = 0


cdef void largest_in_lanes(
    const Job* job, const real* tile, real* maximum, real* index
) noexcept nogil:
    cdef real m[LANES]
    cdef real k[LANES]
    cdef real x
    cdef Py_ssize_t c, j
    for j in range(LANES):
        m[j] = <real>-INFINITY
        k[j] = 0
    for c in range(job.num_classes):
        for j in range(LANES):
            x = tile[c * LANES + j]
            k[j] = <real>c if x > m[j] else k[j]
            m[j] = x if x > m[j] else m[j]
    for j in range(LANES):
        maximum[j] = m[j]
        index[j] = k[j]


cdef void reduce_tile(
    const Job* job, real* tile, const real* maximum, const real* skip, bint keep, Rows* r
) noexcept nogil:
    """Sums of exponentials without class skip; the tile then holds SCALE * exp(x - maximum)."""
    cdef real m[LANES]
    cdef real left_out[LANES]
    cdef real line[LANES]
    cdef real lane[LANES]
    cdef double total[LANES]
    cdef double scale
    cdef real one = 0
    cdef Py_ssize_t c, j
    scale = scale_of(one)
    for j in range(LANES):
        m[j] = maximum[j]
        left_out[j] = skip[j]
        lane[j] = 0
        total[j] = 0.0
    for c in range(job.num_classes):
        memcpy(line, tile + c * LANES, sizeof(line))
        for j in range(LANES):
            line[j] = exp_scaled(line[j], m[j])
            lane[j] += <real>0 if left_out[j] == <real>c else line[j]
        if keep:
            memcpy(tile + c * LANES, line, sizeof(line))
        if c % RUN == RUN - 1:
            for j in range(LANES):
                total[j] += lane[j]
                lane[j] = 0
    for j in range(LANES):
        r.maximum[j] = m[j]
        # NaN where there is no finite maximum
        r.others[j] = (total[j] + lane[j]) / scale + (r.maximum[j] - r.maximum[j])


cdef void scale_tile(
    const Job* job, real* tile, const real* targets, const Rows* r, const real* skip
) noexcept nogil:
    """From SCALE * exp(x - maximum) to the result."""
    cdef real f[LANES]
    cdef double spread[LANES]
    cdef double keep = 1.0 - job.smoothing, uniform = job.smoothing / job.num_classes, w
    cdef real one = 0
    cdef double scale = scale_of(one)
    cdef bint spreads = False
    cdef Py_ssize_t c, j
    for j in range(LANES):
        f[j] = <real>(r.factor[j] / scale)
        spread[j] = r.spread[j]
        spreads |= spread[j] != 0.0
    for c in range(job.num_classes):
        w = 1.0 if job.weight == NULL else job.weight[c]
        if targets != NULL:
            for j in range(LANES):
                tile[c * LANES + j] = tile[c * LANES + j] * f[j] - <real>(
                    spread[j] * w * (keep * targets[c * LANES + j] + uniform))
        elif spreads:
            for j in range(LANES):
                tile[c * LANES + j] = tile[c * LANES + j] * f[j] - <real>(spread[j] * w)
        else:
            for j in range(LANES):
                tile[c * LANES + j] *= f[j]
    for j in range(LANES):
        tile[<Py_ssize_t>skip[j] * LANES + j] = <real>r.left_out[j]


cdef void softmax_tile(
    const Job* job, Operation operation, Py_ssize_t unit, real* scratch
) noexcept nogil:
    """softmax, log_softmax and logsumexp."""
    cdef Rows r
    cdef real maximum[LANES]
    cdef real index[LANES]
    cdef real log_s[LANES]
    cdef real* buffer = scratch
    cdef real* tile = buffer + max(job.num_classes, <Py_ssize_t>LANES)
    cdef Py_ssize_t c, j, n
    load_tile(job, job.storage, job.logits, unit, tile, buffer)
    largest_in_lanes(job, tile, maximum, index)
    reduce_tile(job, tile, maximum, index, operation == SOFTMAX, &r)
    if operation == SOFTMAX:
        softmax_step(&r, LANES)
        scale_tile(job, tile, <const real*>NULL, &r, index)
    elif operation == LOG_SOFTMAX:
        for j in range(LANES):
            log_s[j] = <real>log1p_of(r.others[j])
        for c in range(job.num_classes):
            for j in range(LANES):
                tile[c * LANES + j] = (tile[c * LANES + j] - maximum[j]) - log_s[j]
    else:
        n = min(job.rows - unit * LANES, <Py_ssize_t>LANES)
        for j in range(LANES):
            buffer[j] = <real>(r.maximum[j] + log1p_of(r.others[j]))
        store_block(job.storage, job.out, unit * LANES, n, buffer)
        return
    store_tile(job, unit, tile, buffer)


cdef void cross_entropy_tile(
    const Job* job, Operation operation, Py_ssize_t unit, real* scratch
) noexcept nogil:
    cdef Rows r
    cdef int64_t y[LANES]
    cdef real maximum[LANES]
    cdef real index[LANES]
    cdef real* buffer = scratch
    cdef real* tile = buffer + max(job.num_classes, <Py_ssize_t>LANES)
    cdef real* targets = NULL
    cdef Py_ssize_t j, n = min(job.rows - unit * LANES, <Py_ssize_t>LANES)
    memset(&r, 0, sizeof(r))
    load_tile(job, job.storage, job.logits, unit, tile, buffer)
    if operation == CROSS_ENTROPY:
        memset(y, 0, sizeof(y))
        read_targets(job, unit * LANES, n, y, &r)
    else:
        read_sample_weights(job, unit * LANES, n, &r)
        targets = tile + job.num_classes * LANES
        load_tile(job, job.other_storage, job.other, unit, targets, buffer)
    clear_dead_lanes(job, &r, tile)
    largest_in_lanes(job, tile, maximum, index)
    if operation == CROSS_ENTROPY:
        for j in range(LANES):
            r.target_logit[j] = tile[y[j] * LANES + j]
            index[j] = <real>y[j]
    if operation == CROSS_ENTROPY_SOFT or job.smoothing != 0.0:
        gaps_of_tile(job, tile, targets, maximum, index, &r)
    reduce_tile(job, tile, maximum, index, job.out != NULL, &r)
    if operation == CROSS_ENTROPY:
        cross_entropy_step(job, &r, LANES)
    else:
        cross_entropy_soft_step(job, &r, LANES)
    deliver_losses(job, unit, n, r.loss)
    if job.out != NULL:
        scale_tile(job, tile, targets, &r, index)
        store_tile(job, unit, tile, buffer)


cdef void gaps_of_tile(
    const Job* job, const real* tile, const real* targets, const real* maximum, const real* index,
    Rows* r,
) noexcept nogil:
    """sum w_c t_c (m - x_c), the sum of w_c t_c without the maximum, and its w_k t_k."""
    cdef double gap[LANES]
    cdef double mass[LANES]
    cdef double top[LANES]
    cdef double m[LANES]
    cdef double keep = 1.0 - job.smoothing, uniform = job.smoothing / job.num_classes, w, wt
    cdef Py_ssize_t c, j
    for j in range(LANES):
        gap[j] = mass[j] = top[j] = 0.0
        m[j] = maximum[j]
    for c in range(job.num_classes):
        w = 1.0 if job.weight == NULL else job.weight[c]
        if targets == NULL:
            for j in range(LANES):
                gap[j] += gap_term(w, m[j], tile[c * LANES + j])
        else:
            for j in range(LANES):
                wt = w * (keep * targets[c * LANES + j] + uniform)
                gap[j] += gap_term(wt, m[j], tile[c * LANES + j])
                mass[j] += 0.0 if index[j] == <real>c else wt
                top[j] = wt if index[j] == <real>c else top[j]
    for j in range(LANES):
        r.gap[j] = gap[j]
        r.mass[j] = mass[j]
        r.top_mass[j] = top[j]


cdef void backward_tile(
    const Job* job, Operation operation, Py_ssize_t unit, real* scratch
) noexcept nogil:
    cdef real maximum[LANES]
    cdef real index[LANES]
    cdef real f[LANES]
    cdef real lane[LANES]
    cdef double total[LANES]
    cdef real one = 0
    cdef real* buffer = scratch
    cdef real* p = buffer + max(job.num_classes, <Py_ssize_t>LANES)
    cdef real* g = p + job.num_classes * LANES
    cdef Py_ssize_t c, j
    load_tile(job, job.storage, job.logits, unit, p, buffer)
    load_tile(job, job.storage, job.other, unit, g, buffer)
    for j in range(LANES):
        lane[j] = 0
        total[j] = 0.0
    for c in range(job.num_classes):
        if operation == SOFTMAX_BACKWARD:
            for j in range(LANES):
                lane[j] += g[c * LANES + j] * p[c * LANES + j]
        else:
            for j in range(LANES):
                lane[j] += g[c * LANES + j]
        if c % RUN == RUN - 1:
            for j in range(LANES):
                total[j] += lane[j]
                lane[j] = 0
    for j in range(LANES):
        total[j] += lane[j]
        f[j] = <real>total[j]
    if operation == LOG_SOFTMAX_BACKWARD:
        largest_in_lanes(job, p, maximum, index)
        for j in range(LANES):
            maximum[j] = maximum[j] if maximum[j] > 0 else <real>0
            f[j] = <real>(total[j] * exp_any(maximum[j]) / scale_of(one))
    for c in range(job.num_classes):
        if operation == SOFTMAX_BACKWARD:
            for j in range(LANES):
                p[c * LANES + j] *= g[c * LANES + j] - f[j]
        else:
            for j in range(LANES):
                p[c * LANES + j] = (
                    g[c * LANES + j] - exp_scaled(p[c * LANES + j], maximum[j]) * f[j])
    store_tile(job, unit, p, buffer)


# ---------------------------------------------------------------------------------------------
# Negative log-likelihood: nothing to compute, only to gather and to scatter
# ---------------------------------------------------------------------------------------------

cdef void nll_unit(
    const Job* job, Operation operation, Py_ssize_t unit, real* scratch
) noexcept nogil:
    """The losses, or, into `out` that was cleared in between, the gradient at the targets."""
    cdef Rows r
    cdef int64_t y[LANES]
    cdef Py_ssize_t i, row, place, n = rows_in_unit(job, unit)
    cdef double log_p
    read_targets(job, unit * job.group, n, y, &r)
    for i in range(n):
        row = unit * job.group + i
        place = (row // job.inner * job.num_classes + y[i]) * job.inner + row % job.inner
        if operation == NLL:
            log_p = load_block(job.storage, job.logits, place, 1, scratch)[0]
            r.loss[i] = -log_p * r.target_weight[i] * r.row_weight[i]
            if r.row_weight[i] == 0.0:
                r.loss[i] = 0.0
        else:
            # Adding 0 makes +0 of -0.
            scratch[0] = <real>(0.0 - job.scale * r.target_weight[i] * r.row_weight[i])
            store_block(job.storage, job.out, place, 1, scratch)
    if operation == NLL:
        deliver_losses(job, unit, n, r.loss)


# ---------------------------------------------------------------------------------------------
# Drivers
# ---------------------------------------------------------------------------------------------

cdef inline void run_unit(
    const Job* job, Operation operation, Py_ssize_t unit, real* scratch
) noexcept nogil:
    if operation == NLL or operation == NLL_BACKWARD:
        nll_unit(job, operation, unit, scratch)
    elif job.blocks == 0:  # tiles
        if operation <= LOGSUMEXP:
            softmax_tile(job, operation, unit, scratch)
        elif operation <= LOG_SOFTMAX_BACKWARD:
            backward_tile(job, operation, unit, scratch)
        else:
            cross_entropy_tile(job, operation, unit, scratch)
    elif operation == SOFTMAX:
        softmax_rows(job, unit, scratch)
    elif operation <= LOGSUMEXP:
        log_softmax_rows(job, operation, unit, scratch)
    elif operation <= LOG_SOFTMAX_BACKWARD:
        backward_rows(job, operation, unit, scratch)
    else:
        cross_entropy_rows(job, operation, unit, scratch)


cdef void run_share(
    const Job* job, Operation operation, Py_ssize_t units, int thread, int num_threads,
    char* scratch, Py_ssize_t scratch_bytes,
) noexcept nogil:
    """One thread's contiguous share of the units."""
    cdef Py_ssize_t unit, first = units * thread // num_threads
    cdef Py_ssize_t last = units * (thread + 1) // num_threads
    cdef unsigned int mode = fl_enter_ieee_mode()
    scratch += thread * scratch_bytes
    for unit in range(first, last):
        if job.storage == FLOAT64:
            run_unit(job, operation, unit, <double*>scratch)
        else:
            run_unit(job, operation, unit, <float*>scratch)
    fl_leave_ieee_mode(mode)


cdef inline Py_ssize_t round_up(Py_ssize_t n) noexcept:
    """To whole cache lines."""
    return (n + CACHE_LINE - 1) // CACHE_LINE * CACHE_LINE


cdef Py_ssize_t plan(Job* job, Operation operation) noexcept:
    """Choose rows or tiles and the size of a unit; return the bytes of scratch a thread needs."""
    cdef Py_ssize_t C = job.num_classes, numbers
    if operation == NLL or operation == NLL_BACKWARD:
        job.group, job.blocks = LANES, 0
        numbers = 1
    elif job.inner == 1 and C > SHORT_ROW:
        job.group = min(max(<Py_ssize_t>GROUP // C, <Py_ssize_t>1), <Py_ssize_t>LANES)
        job.blocks = (C + BLOCK - 1) // BLOCK
        numbers = 2 * BLOCK + job.group * job.blocks
        if itemsize(job.storage) == 2:
            numbers += job.group * C
    else:
        job.group, job.blocks = LANES, 0
        numbers = max(C, <Py_ssize_t>LANES) + 2 * C * LANES
    numbers *= 8 if job.storage == FLOAT64 else 4
    return round_up(numbers)  # threads do not share a cache line


cdef double run(Job* job, Operation operation, int num_threads) except? -1:
    """Run an operation on all its units; return the sum of the row losses, where it has any."""
    cdef Py_ssize_t scratch_bytes = plan(job, operation)
    cdef Py_ssize_t units = (job.rows + job.group - 1) // job.group
    cdef int thread, threads = <int>min(<Py_ssize_t>num_threads, units)
    cdef cnp.ndarray memory, partial
    cdef char* scratch
    if units == 0:
        return 0.0
    # All memory is taken before anything is written: where there is none, MemoryError says so.
    memory = np.empty(threads * scratch_bytes + CACHE_LINE, np.uint8)
    partial = np.empty(units)
    scratch = <char*>round_up(<Py_ssize_t>cnp.PyArray_BYTES(memory))
    job.partial = <double*>cnp.PyArray_DATA(partial)
    if threads == 1:  # no parallel region: a forked child must not enter one
        with nogil:
            run_share(job, operation, units, 0, 1, scratch, scratch_bytes)
    else:
        for thread in prange(
            threads, nogil=True, schedule="static", chunksize=1, num_threads=threads
        ):
            run_share(job, operation, units, thread, threads, scratch, scratch_bytes)
    # NumPy adds pairwise, in an order that depends on the number of units alone.
    return partial.sum() if operation >= CROSS_ENTROPY else 0.0


cdef Storage storage_of(cnp.ndarray array) except? FLOAT64:
    if array.descr.type_num == cnp.NPY_FLOAT:
        return FLOAT32
    if array.descr.type_num == cnp.NPY_DOUBLE:
        return FLOAT64
    name = array.dtype.name
    if name == "float16":
        return FLOAT16
    if name == "bfloat16":
        return BFLOAT16
    raise TypeError(f"no kernel for dtype {name}")


cdef Job job_of(cnp.ndarray array, cnp.ndarray out) except *:
    """The common part of a job, from an array (outer, C, inner)."""
    cdef Job job
    memset(&job, 0, sizeof(job))
    job.num_classes = array.shape[1]
    job.inner = array.shape[2]
    job.rows = array.shape[0] * job.inner
    job.storage = storage_of(array)
    job.logits = cnp.PyArray_BYTES(array)
    job.out = NULL if out is None else cnp.PyArray_BYTES(out)
    return job


cdef void add_target(Job* job, cnp.ndarray target, int64_t ignore_index) except *:
    cdef int kind = {1: 0, 2: 1, 4: 2, 8: 3}[target.itemsize]
    job.target = cnp.PyArray_BYTES(target)
    job.target_kind = kind if target.dtype.kind == "i" else kind + 4
    job.ignore_index = ignore_index


cdef void add_weights(Job* job, cnp.ndarray weight, cnp.ndarray sample_weight) except *:
    job.weight_sum = job.num_classes
    if weight is not None:
        job.weight = <const double*>cnp.PyArray_DATA(weight)
        job.weight_sum = weight.sum()
    if sample_weight is not None:
        job.sample_weight = <const double*>cnp.PyArray_DATA(sample_weight)


def softmax(cnp.ndarray logits not None, cnp.ndarray out not None, int num_threads):
    cdef Job job = job_of(logits, out)
    run(&job, SOFTMAX, num_threads)


def log_softmax(cnp.ndarray logits not None, cnp.ndarray out not None, int num_threads):
    cdef Job job = job_of(logits, out)
    run(&job, LOG_SOFTMAX, num_threads)


def logsumexp(cnp.ndarray logits not None, cnp.ndarray out not None, int num_threads):
    cdef Job job = job_of(logits, out)
    run(&job, LOGSUMEXP, num_threads)


def softmax_backward(
    cnp.ndarray grad_output not None, cnp.ndarray probs not None, cnp.ndarray out not None,
    int num_threads,
):
    cdef Job job = job_of(probs, out)
    job.other = cnp.PyArray_BYTES(grad_output)
    run(&job, SOFTMAX_BACKWARD, num_threads)


def log_softmax_backward(
    cnp.ndarray grad_output not None, cnp.ndarray log_probs not None, cnp.ndarray out not None,
    int num_threads,
):
    cdef Job job = job_of(log_probs, out)
    job.other = cnp.PyArray_BYTES(grad_output)
    run(&job, LOG_SOFTMAX_BACKWARD, num_threads)


def cross_entropy(
    cnp.ndarray logits not None, cnp.ndarray target not None, cnp.ndarray weight,
    cnp.ndarray sample_weight, int64_t ignore_index, double label_smoothing, double z_loss,
    double scale, cnp.ndarray losses, cnp.ndarray grad, int num_threads,
):
    cdef Job job = job_of(logits, grad)
    add_target(&job, target, ignore_index)
    add_weights(&job, weight, sample_weight)
    job.smoothing, job.z_loss, job.scale = label_smoothing, z_loss, scale
    job.losses = NULL if losses is None else cnp.PyArray_BYTES(losses)
    return run(&job, CROSS_ENTROPY, num_threads)


def cross_entropy_soft(
    cnp.ndarray logits not None, cnp.ndarray target not None, cnp.ndarray weight,
    cnp.ndarray sample_weight, double label_smoothing, double z_loss, double scale,
    cnp.ndarray losses, cnp.ndarray grad, int num_threads,
):
    cdef Job job = job_of(logits, grad)
    job.other = cnp.PyArray_BYTES(target)
    job.other_storage = storage_of(target)
    add_weights(&job, weight, sample_weight)
    job.smoothing, job.z_loss, job.scale = label_smoothing, z_loss, scale
    job.losses = NULL if losses is None else cnp.PyArray_BYTES(losses)
    return run(&job, CROSS_ENTROPY_SOFT, num_threads)


def nll_loss(
    cnp.ndarray log_probs not None, cnp.ndarray target not None, cnp.ndarray weight,
    cnp.ndarray sample_weight, int64_t ignore_index, double scale, cnp.ndarray losses,
    cnp.ndarray grad, int num_threads,
):
    cdef Job job = job_of(log_probs, grad)
    cdef double total
    add_target(&job, target, ignore_index)
    add_weights(&job, weight, sample_weight)
    job.scale = scale
    job.losses = NULL if losses is None else cnp.PyArray_BYTES(losses)
    total = run(&job, NLL, num_threads)
    if grad is not None:  # which may be log_probs: not before these were read
        clear(job.out, cnp.PyArray_NBYTES(grad), num_threads)
        run(&job, NLL_BACKWARD, num_threads)
    return total


cdef void clear(char* data, Py_ssize_t size, int threads) noexcept:
    cdef Py_ssize_t first
    cdef int thread
    if threads == 1:
        memset(data, 0, size)
        return
    for thread in prange(threads, nogil=True, schedule="static", chunksize=1, num_threads=threads):
        first = size * thread // threads
        memset(data + first, 0, size * (thread + 1) // threads - first)


def check_target(
    cnp.ndarray target not None, cnp.ndarray weight, cnp.ndarray sample_weight,
    Py_ssize_t num_classes, int64_t ignore_index, int num_threads,
):
    """Flat index of the first target out of range, or -1; and the divisor of the mean."""
    cdef Job job
    cdef Py_ssize_t block, blocks, bad = -1
    cdef cnp.ndarray partial
    cdef double* sums
    memset(&job, 0, sizeof(job))
    job.rows, job.num_classes = cnp.PyArray_SIZE(target), num_classes
    add_target(&job, target, ignore_index)
    add_weights(&job, weight, sample_weight)
    blocks = (job.rows + CHECK_BLOCK - 1) // CHECK_BLOCK
    if blocks == 1:
        bad = check_block(&job, 0, &job.scale)
        return bad, job.scale
    partial = np.empty(blocks)
    sums = <double*>cnp.PyArray_DATA(partial)
    if num_threads == 1:
        with nogil:
            for block in range(blocks):
                check_block(&job, block, &sums[block])
    else:
        for block in prange(blocks, nogil=True, schedule="static", num_threads=num_threads):
            check_block(&job, block, &sums[block])
    for block in range(blocks):
        if sums[block] < 0.0:
            return check_block(&job, block, &sums[block]), 0.0
    return -1, float(partial.sum())


cdef Py_ssize_t check_block(const Job* job, Py_ssize_t block, double* total) noexcept nogil:
    """The first bad target of a block, or -1; total receives the sum of the weights, or -1."""
    cdef int64_t target[LANES]
    cdef double lane[LANES]
    cdef double weight
    cdef Py_ssize_t chunk, row, i, n, last = min(job.rows, (block + 1) * CHECK_BLOCK)
    cdef int bad
    for i in range(LANES):
        lane[i] = 0.0
    for chunk in range(CHECK_BLOCK // LANES):
        row = block * CHECK_BLOCK + chunk * LANES
        n = min(last - row, <Py_ssize_t>LANES)
        read_indices(job, row, n, target)
        bad = 0
        for i in range(n):
            bad |= (target[i] != job.ignore_index) & (
                <uint64_t>target[i] >= <uint64_t>job.num_classes)
        if bad:
            total[0] = -1.0
            for i in range(n):
                if target[i] != job.ignore_index and not 0 <= target[i] < job.num_classes:
                    return row + i
        if job.weight == NULL and job.sample_weight == NULL:
            for i in range(n):
                lane[i] += 1.0 if target[i] != job.ignore_index else 0.0
            continue
        for i in range(n):
            if target[i] != job.ignore_index:
                weight = 1.0 if job.sample_weight == NULL else job.sample_weight[row + i]
                lane[i] += weight if job.weight == NULL else weight * job.weight[target[i]]
    total[0] = fold(lane)
    return -1


def openmp_version():
    """The OpenMP standard's date, as the compiler states it; 0 in a serial build."""
    return FL_OPENMP


def cpu_runs(int level):
    """Whether this CPU and system run x86-64-v3 (level 3) or -v4 (level 4) code."""
    return bool(fl_cpu_runs(level))
