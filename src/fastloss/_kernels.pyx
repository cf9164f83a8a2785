# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# cython: initializedcheck=False, overflowcheck=False
"""The Cython kernels: numbers, memory, blocks, the scalar step, rows, tiles, then the drivers.

The contract is in ``_reference``.  This one source is built once per instruction set (see
meson.build); ``_cython`` picks a build.  What to know before reading on:

Bits come from source order.  No flag lets the compiler reassociate or contract.  Sums run in
CHUNK or LANES explicit lanes, so that the compiler can vectorise them without changing what they
mean: a row gives the same bits alone or in a batch, at any alignment, on any number of threads.
fma is spelled out where the build has it, hence bits may differ between instruction sets.

Two layouts.  A *row* is a long run of classes next to each other: classes lie in the SIMD lanes.
Where rows are short, or other samples lie between the classes, a *tile* puts LANES samples in the
SIMD lanes, copied (transposed, converted) into scratch and back.  Either way a unit of rows is put
together in scratch that stays in cache and goes out in one run; a large result goes past the
caches, so that memory is not read only to be overwritten, and what the next unit needs is fetched
meanwhile.

The sum leaves one class out (the target, or the maximum), which is what makes small losses exact.
0 * inf counts as 0.

The hot loops are those over CHUNK or LANES in largest, exp_block, exp_tile, scale_tile and
transpose, and those of scale_row and cross_entropy_step.  In the assembly (objdump -d) they must
be straight runs of packed instructions, zmm registers in the v4 build and ymm in v3, without a
call, a scalar instruction or a gather.  exp_block is bound by its 11 multiplications and
comparisons per vector; all else must hide behind them.
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

from fastloss._contract import TargetCheck

cnp.import_array()


cdef extern from *:
    """
    #include <math.h>
    #include <stdint.h>
    #include <string.h>
    #ifdef _OPENMP
    #include <omp.h>
    #define FL_OPENMP _OPENMP
    static int fl_max_threads(void) { return omp_get_max_threads(); }
    static int fl_thread_limit(void) { return omp_get_thread_limit(); }
    #else
    #include <limits.h>
    #define FL_OPENMP 0
    static int fl_max_threads(void) { return INT_MAX; }
    static int fl_thread_limit(void) { return 1; }
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

    /* c - a b without a subnormal a b on the way, which would be slow. */
    #if defined(__FMA__) || defined(__FP_FAST_FMA)
    static inline float fl_less_f(float a, float b, float c) { return __builtin_fmaf(-a, b, c); }
    #else
    static inline float fl_less_f(float a, float b, float c) { return c - (double)a * b; }
    #endif
    static inline double fl_less_d(double a, double b, double c) { return fl_fma_d(-a, b, c); }

    /* What exp takes for 0, where products of such numbers are computed and would be slow. */
    #if defined(__FMA__) || defined(__FP_FAST_FMA)
    static inline float fl_no_dust_f(float x) { return x; }
    static inline double fl_no_dust_d(double x) { return x; }
    #else
    static inline float fl_no_dust_f(float x) {  /* in integers, which are never slow */
        int32_t b = fl_bits_f(x);
        return fl_from_bits_f((b & 0x7fffffff) < 0x0da24260 ? 0 : b);  /* 1e-30 */
    }
    static inline double fl_no_dust_d(double x) {
        int64_t b = fl_bits_d(x);  /* in 32-bit halves: older processors compare no more at a time */
        return fl_from_bits_d((int32_t)((uint64_t)b >> 32 & 0x7fffffff) < 0x03d00000 ? 0 : b);
    }
    #endif

    /* Results do not depend on a flush of denormals, or a rounding mode, that somebody set. */
    #if defined(__SSE2__)
    #include <immintrin.h>
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

    #if defined(__GNUC__)
    static inline void fl_prefetch(const char* p) { __builtin_prefetch(p, 0, 2); }
    #else
    static inline void fl_prefetch(const char* p) { (void)p; }
    #endif

    /* float16 where the processor converts it; both return how many they did: all, or none. */
    #if defined(__F16C__)
    static inline ptrdiff_t fl_halves_to_floats(const uint16_t* from, float* to, ptrdiff_t n) {
        uint16_t rest[8] = {0};
        float last[8];
        ptrdiff_t i = 0;
        for (; i + 8 <= n; i += 8)
            _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(from + i))));
        memcpy(rest, from + i, (n - i) * sizeof *from);
        _mm256_storeu_ps(last, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)rest)));
        memcpy(to + i, last, (n - i) * sizeof *to);
        return n;
    }
    static inline ptrdiff_t fl_floats_to_halves(const float* from, uint16_t* to, ptrdiff_t n) {
        float rest[8] = {0};
        uint16_t last[8];
        ptrdiff_t i = 0;
        for (; i + 8 <= n; i += 8)
            _mm_storeu_si128((__m128i*)(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), 0));
        memcpy(rest, from + i, (n - i) * sizeof *from);
        _mm_storeu_si128((__m128i*)last, _mm256_cvtps_ph(_mm256_loadu_ps(rest), 0));
        memcpy(to + i, last, (n - i) * sizeof *to);
        return n;
    }
    #else
    static inline ptrdiff_t fl_halves_to_floats(const uint16_t* from, float* to, ptrdiff_t n) {
        (void)from; (void)to; (void)n;
        return 0;
    }
    static inline ptrdiff_t fl_floats_to_halves(const float* from, uint16_t* to, ptrdiff_t n) {
        (void)from; (void)to; (void)n;
        return 0;
    }
    #endif

    /* A copy that goes past the caches: a large result is not read into them first. */
    static inline void fl_stream(char* to, const char* from, size_t size) {
    #if defined(__SSE2__)
        size_t head = (size_t)(-(uintptr_t)to & 63);
        if (size >= head + 64) {
            memcpy(to, from, head);
            to += head; from += head; size -= head;
            for (; size >= 64; to += 64, from += 64, size -= 64) {
            #if defined(__AVX512F__)
                _mm512_stream_si512((__m512i*)to, _mm512_loadu_si512(from));
            #elif defined(__AVX__)
                for (int i = 0; i < 64; i += 32)
                    _mm256_stream_si256((__m256i*)(to + i),
                                        _mm256_loadu_si256((const __m256i*)(from + i)));
            #else
                for (int i = 0; i < 64; i += 16)
                    _mm_stream_si128((__m128i*)(to + i),
                                     _mm_loadu_si128((const __m128i*)(from + i)));
            #endif
            }
        }
    #endif
        memcpy(to, from, size);
    }

    /* What was streamed is there for other threads to see. */
    static inline void fl_end_stream(void) {
    #if defined(__SSE2__)
        _mm_sfence();
    #endif
    }

    /* Eight runs of eight numbers, transposed: to[i][j] = from[j][i]. */
    #if defined(__has_builtin)
    #if __has_builtin(__builtin_shufflevector)
    #define FL_SHUFFLE __builtin_shufflevector
    #endif
    #endif
    /* The sum, in float64, and the maximum (NaN left aside) of 32 numbers, in a fixed order. */
    #if defined(FL_SHUFFLE)
    #define FL_RAISE(SUM, a, b) \
        (a) = (SUM##_v)((((b) > (a)) & (SUM##_i)(b)) | (~((b) > (a)) & (SUM##_i)(a)))
    #define FL_FOLD(SUM, MAX, REAL, INT) \
    typedef REAL SUM##_v __attribute__((vector_size(8 * sizeof(REAL)))); \
    typedef INT SUM##_i __attribute__((vector_size(8 * sizeof(REAL)))); \
    static inline double SUM(const REAL* lane) { \
        typedef double wide __attribute__((vector_size(64))); \
        SUM##_v a[4]; \
        memcpy(a, lane, sizeof a); \
        wide s = (__builtin_convertvector(a[0], wide) + __builtin_convertvector(a[1], wide)) \
               + (__builtin_convertvector(a[2], wide) + __builtin_convertvector(a[3], wide)); \
        s += FL_SHUFFLE(s, s, 4, 5, 6, 7, 0, 1, 2, 3); \
        s += FL_SHUFFLE(s, s, 2, 3, 0, 1, 6, 7, 4, 5); \
        return s[0] + s[1]; \
    } \
    static inline REAL MAX(const REAL* lane) { \
        SUM##_v a[4], b; \
        memcpy(a, lane, sizeof a); \
        FL_RAISE(SUM, a[0], a[1]); \
        FL_RAISE(SUM, a[2], a[3]); \
        FL_RAISE(SUM, a[0], a[2]); \
        b = FL_SHUFFLE(a[0], a[0], 4, 5, 6, 7, 0, 1, 2, 3); \
        FL_RAISE(SUM, a[0], b); \
        b = FL_SHUFFLE(a[0], a[0], 2, 3, 0, 1, 6, 7, 4, 5); \
        FL_RAISE(SUM, a[0], b); \
        return a[0][0] > a[0][1] ? a[0][0] : a[0][1]; \
    }
    #else
    #define FL_FOLD(SUM, MAX, REAL, INT) \
    static inline double SUM(const REAL* lane) { \
        double s[8]; \
        for (int j = 0; j < 8; j++) \
            s[j] = ((double)lane[j] + lane[j + 8]) + ((double)lane[j + 16] + lane[j + 24]); \
        for (int half = 4; half > 0; half /= 2) \
            for (int j = 0; j < half; j++) s[j] += s[j + half]; \
        return s[0]; \
    } \
    static inline REAL MAX(const REAL* lane) { \
        REAL m = lane[0]; \
        for (int j = 1; j < 32; j++) m = lane[j] > m ? lane[j] : m; \
        return m; \
    }
    #endif
    FL_FOLD(fl_sum_f, fl_max_f, float, int32_t)
    FL_FOLD(fl_sum_d, fl_max_d, double, int64_t)

    #if defined(FL_SHUFFLE)
    #define FL_TRANSPOSE(NAME, REAL) \
    typedef REAL NAME##_v __attribute__((vector_size(8 * sizeof(REAL)))); \
    static inline void NAME(const REAL* from, ptrdiff_t from_step, REAL* to, ptrdiff_t to_step) { \
        NAME##_v a[8], b[8]; \
        for (int i = 0; i < 8; i++) memcpy(&a[i], from + i * from_step, sizeof a[i]); \
        for (int i = 0; i < 8; i += 2) { \
            b[i] = FL_SHUFFLE(a[i], a[i + 1], 0, 8, 1, 9, 4, 12, 5, 13); \
            b[i + 1] = FL_SHUFFLE(a[i], a[i + 1], 2, 10, 3, 11, 6, 14, 7, 15); \
        } \
        for (int i = 0; i < 8; i += 4) { \
            a[i] = FL_SHUFFLE(b[i], b[i + 2], 0, 1, 8, 9, 4, 5, 12, 13); \
            a[i + 1] = FL_SHUFFLE(b[i], b[i + 2], 2, 3, 10, 11, 6, 7, 14, 15); \
            a[i + 2] = FL_SHUFFLE(b[i + 1], b[i + 3], 0, 1, 8, 9, 4, 5, 12, 13); \
            a[i + 3] = FL_SHUFFLE(b[i + 1], b[i + 3], 2, 3, 10, 11, 6, 7, 14, 15); \
        } \
        for (int i = 0; i < 4; i++) { \
            b[i] = FL_SHUFFLE(a[i], a[i + 4], 0, 1, 2, 3, 8, 9, 10, 11); \
            b[i + 4] = FL_SHUFFLE(a[i], a[i + 4], 4, 5, 6, 7, 12, 13, 14, 15); \
        } \
        for (int i = 0; i < 8; i++) memcpy(to + i * to_step, &b[i], sizeof b[i]); \
    }
    #else
    #define FL_TRANSPOSE(NAME, REAL) \
    static inline void NAME(const REAL* from, ptrdiff_t from_step, REAL* to, ptrdiff_t to_step) { \
        for (int i = 0; i < 8; i++) \
            for (int j = 0; j < 8; j++) to[i * to_step + j] = from[j * from_step + i]; \
    }
    #endif
    FL_TRANSPOSE(fl_transpose_f, float)
    FL_TRANSPOSE(fl_transpose_d, double)

    static int fl_cpu_runs(int level) {
    #if (defined(__x86_64__) || defined(__amd64__)) && defined(__GNUC__)
        __builtin_cpu_init();
        int v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")
              && __builtin_cpu_supports("f16c")
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
    int fl_max_threads() noexcept nogil
    int fl_thread_limit() noexcept nogil
    int32_t fl_bits_f(float) noexcept nogil
    float fl_from_bits_f(int32_t) noexcept nogil
    int64_t fl_bits_d(double) noexcept nogil
    double fl_from_bits_d(int64_t) noexcept nogil
    float fl_fma_f(float, float, float) noexcept nogil
    float fl_less_f(float, float, float) noexcept nogil
    double fl_less_d(double, double, double) noexcept nogil
    float fl_no_dust_f(float) noexcept nogil
    double fl_no_dust_d(double) noexcept nogil
    double fl_fma_d(double, double, double) noexcept nogil
    unsigned int fl_enter_ieee_mode() noexcept nogil
    void fl_leave_ieee_mode(unsigned int) noexcept nogil
    int fl_cpu_runs(int) noexcept nogil
    void fl_prefetch(const char*) noexcept nogil
    Py_ssize_t fl_halves_to_floats(const uint16_t*, float*, Py_ssize_t) noexcept nogil
    Py_ssize_t fl_floats_to_halves(const float*, uint16_t*, Py_ssize_t) noexcept nogil
    void fl_stream(char*, const char*, size_t) noexcept nogil
    void fl_end_stream() noexcept nogil
    double fl_sum_f(const float*) noexcept nogil
    double fl_sum_d(const double*) noexcept nogil
    float fl_max_f(const float*) noexcept nogil
    double fl_max_d(const double*) noexcept nogil
    void fl_transpose_f(const float*, Py_ssize_t, float*, Py_ssize_t) noexcept nogil
    void fl_transpose_d(const double*, Py_ssize_t, double*, Py_ssize_t) noexcept nogil
    const double INFINITY
    const double NAN


ctypedef fused real:
    float
    double


cdef double FAR_UNIT = 5.421010862427522e-20  # 2**-64: what is scaled by it can be summed up


cdef enum:
    LANES = 64  # samples in a tile
    CHUNK = 32  # classes of a row that are taken at a time: as many partial sums and maxima
    BLOCK = 1024  # classes of a row whose sum stays in float32 before it moves on to float64
    RUN = 16  # float32 additions to one lane of a tile before the sum moves on to float64
    SHORT_ROW = 300  # rows of at most so many classes go into tiles, samples in the SIMD lanes
    GROUP = 8192  # elements of the rows that are taken together, at most LANES of them
    TURN = 16  # classes of columns that are turned into rows at a time
    TURNED = 16777216  # elements of the columns that make up one unit of work, at most LANES of them
    WIDE = 16384  # elements of the tiles that make up one unit of work, where runs may be long
    MOST_TILES = 8  # of a unit
    FEWEST_UNITS = 32  # that are to be left when tiles are put together
    FAR = 65536  # the most elements that are fetched ahead of their use
    CHECK_BLOCK = 4096  # targets that one unit of check_target reads
    LINE = 64  # bytes of a cache line
    STREAM_BYTES = 16777216  # results from this size on are written past the caches

cdef enum Storage:
    FLOAT32
    FLOAT64
    FLOAT16
    BFLOAT16


cdef enum Layout:
    ROWS
    TILES
    COLUMNS


cdef struct Job:
    # One call, as its threads see it.
    Py_ssize_t rows, num_classes, inner
    Layout layout
    Storage storage
    const char* logits  # or log_probs, or probs
    const char* other  # grad_output, or target probabilities
    Storage other_storage
    char* out  # or grad; NULL where only the loss is wanted
    bint stream  # whether out is written past the caches
    const char* target
    int target_kind  # 0 to 3: signed, of 1 << kind bytes; 4 to 7: unsigned
    int64_t ignore_index
    const double* weight
    const void* relative_weight  # weight / largest_weight, in the compute type
    double largest_weight  # in magnitude; 1 without weights
    double weight_sum
    const double* sample_weight
    double smoothing, z_loss, scale
    char* losses
    Py_ssize_t summed  # rows whose losses are added up together
    double* partial  # these sums
    Py_ssize_t group  # rows in a unit of work
    Py_ssize_t row_step  # from a row to the next
    Py_ssize_t step  # from a class to the next in the tiles of a unit
    Py_ssize_t numbers  # of scratch; the carries, one a class, lie behind them


cdef struct Carry:
    # The end of a run of output that did not fill its cache line: it waits for the next run.
    char* end
    char line[LINE]


cdef struct Rows:
    # The scalar step, for as many rows as there are lanes. In:
    double maximum[LANES]
    double others[LANES]  # sum of the exponentials of all classes but one
    double target_logit[LANES]
    double target_weight[LANES]
    double row_weight[LANES]  # sample weight; 0 for rows that count for nothing
    double gap[LANES]  # sum of w_c (maximum - x_c)
    double mass[LANES]  # of soft targets: sum of w_c t_c, all classes but the maximum's
    double top_mass[LANES]  # of soft targets: w_k t_k at the maximum's class k
    # On the way: the exponentials of the maximum and of the target.
    double top[LANES]
    double target_exp[LANES]
    # Out: g_c = factor * 2**-SHIFT * exponential_c - spread * w_c, except at the class left out.
    double loss[LANES]
    double factor[LANES]
    double spread[LANES]
    double left_out[LANES]


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
# exp(x) is 2**n exp(r), n the integer nearest to x / ln 2. What is kept of a class is the
# exponential 2**(n - N + SHIFT) exp(r) = 2**SHIFT exp(x) / 2**N, N being the n of the row's
# maximum: a power of two as the reference costs nothing and rounds nothing, where x - maximum
# would round. SHIFT keeps what may still come out as a subnormal result a normal number until the
# final product rounds it, once. Rows whose maximum is large use x - maximum, which is exact there
# for all classes that are not negligible.

cdef inline real power_of(real unused) noexcept nogil:
    """What takes an exponential back to what it stands for: 2**-SHIFT."""
    return 2.3283064365386963e-10 if real is float else 5.421010862427522e-20


cdef inline double tiny_of(real unused) noexcept nogil:
    """The smallest normal number."""
    return 1.1754943508222875e-38 if real is float else 2.2250738585072014e-308


cdef inline double huge_of(real unused) noexcept nogil:
    """So far from the end of the range that it takes nothing above the largest number there."""
    return 1.2676506002282294e30 if real is float else 9.9792015476736e291  # 2**100, 2**970


cdef inline real pivot_of(real maximum) noexcept nogil:
    """What is taken off x: 0, or the maximum where that is large (or inf: then all is NaN)."""
    cdef real size = maximum if maximum > 0 else -maximum
    cdef real limit = 256.0 if real is float else 2048.0
    return <real>0.0 if size < limit else maximum


cdef inline real magic_of(real maximum) noexcept nogil:
    """A number to which x / ln 2 is added: that rounds it, and leaves n - N in the low bits."""
    cdef real shifted, x = maximum if pivot_of(maximum) == 0 else <real>0.0
    if real is float:
        shifted = fl_fma_f(x, 1.44269504, 12582912.0)  # 1.5 * 2**23
        return <float>(12582912.0 + 127 + 32) - (shifted - <float>12582912.0)
    else:
        shifted = fl_fma_d(x, 1.4426950408889634, 6755399441055744.0)  # 1.5 * 2**52
        return (6755399441055744.0 + 1023 + 64) - (shifted - 6755399441055744.0)


cdef inline real lowest_of(real magic) noexcept nogil:
    """The x whose n - N is the exponent of 0."""
    if real is float:
        return (<float>12582912.0 - magic) * <float>0.693147181
    else:
        return (6755399441055744.0 - magic) * 0.69314718055994531


cdef inline real exponential(real x, real pivot, real magic, real lowest) noexcept nogil:
    """2**(SHIFT - N) * exp(x - pivot); 0 where that is negligible; NaN for NaN."""
    cdef real d, n, r, p, shifted
    d = (fl_no_dust_f(x) if real is float else fl_no_dust_d(x)) - pivot
    d = lowest if d < lowest else d
    if real is float:
        shifted = fl_fma_f(d, 1.44269504, magic)
        n = shifted - magic
        r = fl_fma_f(n, -0.693145751953125, d)
        r = fl_fma_f(n, -1.42860682e-6, r)
        p = fl_fma_f(0.00131687098951, r, 0.00835358145597)
        p = fl_fma_f(p, r, 0.0416763574161)
        p = fl_fma_f(p, r, 0.166667094605)
        p = fl_fma_f(p, r, 0.499999918849)
        p = fl_fma_f(p, r, 1.0)
        p = fl_fma_f(p, r, 1.0)
        # A product, not a sum of exponents: NaN stays NaN.
        return p * fl_from_bits_f(<int32_t>(<uint32_t>fl_bits_f(shifted) << 23))
    else:
        shifted = fl_fma_d(d, 1.4426950408889634, magic)
        n = shifted - magic
        r = fl_fma_d(n, -6.93147180369123816490e-01, d)
        r = fl_fma_d(n, -1.90821492927058770002e-10, r)
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
        return p * fl_from_bits_d(<int64_t>(<uint64_t>fl_bits_d(shifted) << 52))


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
    # What 1 + x rounded off, over u; it matters where u is near 1.
    cdef double rest = lost - lost * f if u < 1.4 else 0.0
    cdef double log_z = half - (s * (half + t1 + t2) + (e * 1.90821492927058770002e-10 + rest))
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
# Memory: between arrays of any storage and scratch in the compute type
# ---------------------------------------------------------------------------------------------

cdef inline Py_ssize_t itemsize(Storage storage) noexcept nogil:
    return 4 if storage == FLOAT32 else 8 if storage == FLOAT64 else 2


cdef inline void fetch(const char* data, Py_ssize_t size) noexcept nogil:
    """Ask for memory ahead of its use; beyond the end of an array that does no harm."""
    cdef Py_ssize_t i
    for i in range((size + LINE - 1) // LINE):
        fl_prefetch(data + i * LINE)


cdef inline Py_ssize_t blocks_in(Py_ssize_t n) noexcept nogil:
    return (n + BLOCK - 1) // BLOCK


cdef inline const real* load_block(
    Storage storage, const char* data, Py_ssize_t start, Py_ssize_t n, real* buffer
) noexcept nogil:
    """Elements start to start + n in the compute type: in place, or converted into buffer."""
    if itemsize(storage) != 2:
        return (<const real*>data) + start
    if real is float:
        widen_halves(storage, (<const uint16_t*>data) + start, n, buffer)
    return buffer


cdef inline void widen_halves(
    Storage storage, const uint16_t* halves, Py_ssize_t n, float* to
) noexcept nogil:
    cdef Py_ssize_t i
    if storage == FLOAT16:
        for i in range(fl_halves_to_floats(halves, to, n), n):
            to[i] = half_to_float(halves[i])
    else:
        for i in range(n):
            to[i] = bfloat_to_float(halves[i])


cdef inline void narrow_floats(
    Storage storage, const float* values, Py_ssize_t n, uint16_t* to
) noexcept nogil:
    cdef Py_ssize_t i
    if storage == FLOAT16:
        for i in range(fl_floats_to_halves(values, to, n), n):
            to[i] = float_to_half(values[i])
    else:
        for i in range(n):
            to[i] = float_to_bfloat(values[i])


cdef inline void copy_out(const Job* job, char* to, const void* values, size_t size) noexcept nogil:
    if job.stream:
        fl_stream(to, <const char*>values, size)
    else:
        memcpy(to, values, size)


cdef inline void store(
    const Job* job, Py_ssize_t start, Py_ssize_t n, const real* values
) noexcept nogil:
    """Write elements start to start + n of out."""
    cdef uint16_t halves[BLOCK]
    cdef char* to = job.out + start * itemsize(job.storage)
    cdef Py_ssize_t b, first, width
    if itemsize(job.storage) != 2:
        copy_out(job, to, values, n * sizeof(real))
        return
    for b in range(blocks_in(n)):
        first = b * BLOCK
        width = min(n - first, <Py_ssize_t>BLOCK)
        if real is float:
            narrow_floats(job.storage, values + first, width, halves)
        copy_out(job, to + first * 2, halves, width * 2)


cdef inline void flush(Carry* carry) noexcept nogil:
    cdef size_t filled = <uintptr_t>carry.end % LINE
    memcpy(carry.end - filled, carry.line, filled)
    carry.end = NULL


cdef inline void stream_run(
    Carry* carry, char* to, const char* values, Py_ssize_t size
) noexcept nogil:
    """Write past the caches in whole lines; half a line would first be read from memory."""
    cdef Py_ssize_t filled = <uintptr_t>to % LINE, head = min((LINE - filled) % LINE, size), whole
    if carry.end == to:
        memcpy(carry.line + filled, values, head)
        if filled + head < LINE and filled:
            carry.end = to + head
            return
        if filled:
            fl_stream(to - filled, carry.line, LINE)
    else:
        if carry.end != NULL:
            flush(carry)
        memcpy(to, values, head)
        if (filled + head) % LINE:
            return
    whole = (size - head) // LINE * LINE
    fl_stream(to + head, values + head, whole)
    memcpy(carry.line, values + head + whole, size - head - whole)
    carry.end = to + size


cdef inline void store_run(
    const Job* job, Carry* carry, Py_ssize_t start, Py_ssize_t n, const real* values
) noexcept nogil:
    """Write elements start to start + n of out, at most BLOCK, that a later run may go on from."""
    cdef uint16_t halves[BLOCK]
    cdef char* to = job.out + start * itemsize(job.storage)
    if not job.stream:
        store(job, start, n, values)
    elif itemsize(job.storage) != 2:
        stream_run(carry, to, <const char*>values, n * sizeof(real))
    else:
        if real is float:
            narrow_floats(job.storage, values, n, halves)
        stream_run(carry, to, <const char*>halves, n * 2)


# ---------------------------------------------------------------------------------------------
# Blocks: runs of at most BLOCK elements, taken in chunks
# ---------------------------------------------------------------------------------------------

cdef inline void pad(const real* x, Py_ssize_t n, Py_ssize_t skip, real* chunk) noexcept nogil:
    """The first elements of x, at most n; -inf fills the chunk, and stands at skip."""
    cdef int j, width = <int>min(n, <Py_ssize_t>CHUNK), hole = <int>skip
    for j in range(CHUNK):
        chunk[j] = x[j] if (j < width) & (j != hole) else <real>-INFINITY


cdef inline real largest(const real* x, Py_ssize_t n) noexcept nogil:
    """The maximum, NaN left aside."""
    cdef real lane[CHUNK]
    cdef real rest[CHUNK]
    cdef Py_ssize_t chunk, j, whole = n - n % CHUNK
    for j in range(CHUNK):
        lane[j] = <real>-INFINITY
    for chunk in range(n // CHUNK):
        for j in range(CHUNK):
            lane[j] = x[chunk * CHUNK + j] if x[chunk * CHUNK + j] > lane[j] else lane[j]
    if whole < n:
        pad(x + whole, n - whole, -1, rest)
        for j in range(CHUNK):
            lane[j] = rest[j] if rest[j] > lane[j] else lane[j]
    if real is float:
        return fl_max_f(lane)
    else:
        return fl_max_d(lane)


cdef inline Py_ssize_t find(const real* x, Py_ssize_t n, real value) noexcept nogil:
    """The first position of value, or n."""
    cdef Py_ssize_t chunk, i, j
    cdef int hits
    for chunk in range(n // CHUNK):
        i = chunk * CHUNK
        hits = 0
        for j in range(CHUNK):
            hits |= x[i + j] == value
        if hits:
            for j in range(CHUNK):
                if x[i + j] == value:
                    return i + j
    for j in range(n - n % CHUNK, n):
        if x[j] == value:
            return j
    return n


cdef inline bint holds_nan(const real* x, Py_ssize_t step, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t j, count = 0
    for j in range(n):
        count += x[j * step] != x[j * step]
    return count > 0


cdef inline double exp_block(
    const real* x, Py_ssize_t n, Py_ssize_t skip, real pivot, real magic, real* e,
    const char* later, Py_ssize_t step,
) noexcept nogil:
    """The sum of the exponentials e, that at `skip` being 0; e has room for whole chunks.

    Meanwhile memory from `later` on is fetched, `step` bytes a chunk.
    """
    cdef real lane[CHUNK]
    cdef real value[CHUNK]
    cdef real rest[CHUNK]
    cdef real holed[CHUNK]
    cdef real lowest = lowest_of(magic)
    cdef const real* source
    cdef Py_ssize_t chunk, i, j, whole = n // CHUNK, hole = -1
    pad(x + whole * CHUNK, n - whole * CHUNK, -1, rest)
    if 0 <= skip < n:
        hole = skip // CHUNK
        pad(x + hole * CHUNK, n - hole * CHUNK, skip % CHUNK, holed)
    for j in range(CHUNK):
        lane[j] = 0
    for chunk in range((n + CHUNK - 1) // CHUNK):
        i = chunk * CHUNK
        source = x + i
        if chunk == whole:
            source = rest
        if chunk == hole:
            source = holed
        fetch(later + chunk * step, step)
        for j in range(CHUNK):
            value[j] = exponential(source[j], pivot, magic, lowest)
        for j in range(CHUNK):
            lane[j] += value[j]
        for j in range(CHUNK):
            e[i + j] = value[j]
    return fold(lane)


cdef inline double fold(const real* lane) noexcept nogil:
    """The sum of a chunk, in float64 and in a fixed order."""
    if real is float:
        return fl_sum_f(lane)
    else:
        return fl_sum_d(lane)


cdef inline double fold_lanes(const double* lane) noexcept nogil:
    return fold(lane) + fold(lane + CHUNK)


cdef inline double sum_lanes(const real* g, Py_ssize_t n) noexcept nogil:
    cdef real lane[CHUNK]
    cdef Py_ssize_t chunk, i, j, whole = n - n % CHUNK
    for j in range(CHUNK):
        lane[j] = 0
    for chunk in range(n // CHUNK):
        i = chunk * CHUNK
        for j in range(CHUNK):
            lane[j] += g[i + j]
    for j in range(n - whole):
        lane[j] += g[whole + j]
    return fold(lane)


cdef inline double dot_lanes(const real* a, const real* b, Py_ssize_t n) noexcept nogil:
    cdef real lane[CHUNK]
    cdef Py_ssize_t chunk, i, j, whole = n - n % CHUNK
    for j in range(CHUNK):
        lane[j] = 0
    for chunk in range(n // CHUNK):
        i = chunk * CHUNK
        for j in range(CHUNK):
            lane[j] += a[i + j] * b[i + j]
    for j in range(n - whole):
        lane[j] += a[whole + j] * b[whole + j]
    return fold(lane)


cdef inline double far_sum(
    Operation operation, const real* g, const real* p, Py_ssize_t step, Py_ssize_t n
) noexcept nogil:
    """FAR_UNIT times the sum of g, or, for softmax_backward, of g p: what overflows elsewhere."""
    cdef double lane[CHUNK]
    cdef double term
    cdef Py_ssize_t j
    for j in range(CHUNK):
        lane[j] = 0.0
    for j in range(n):
        term = FAR_UNIT * g[j * step]
        lane[j % CHUNK] += term * p[j * step] if operation == SOFTMAX_BACKWARD else term
    return fold(lane)


cdef inline real gap_term(real weight, real m, real x) noexcept nogil:
    """weight * (m - x), where 0 * inf counts as 0."""
    return <real>0.0 if weight == 0 else weight * (m - x)


cdef inline bint is_finite(double x) noexcept nogil:
    return x - x == 0.0


cdef inline double gap_block(
    const real* x, const real* weight, Py_ssize_t n, real m
) noexcept nogil:
    """sum of w_c (m - x_c), w_c relative; in float64 where it leaves the range of x."""
    cdef double wide[CHUNK]
    cdef real lane[CHUNK]
    cdef double total
    cdef Py_ssize_t chunk, i, j, width
    for j in range(CHUNK):
        lane[j] = 0
        wide[j] = 0.0
    for chunk in range(n // CHUNK):
        i = chunk * CHUNK
        if weight == NULL:
            for j in range(CHUNK):
                lane[j] += m - x[i + j]
        else:
            for j in range(CHUNK):
                lane[j] += gap_term(weight[i + j], m, x[i + j])
    for j in range(n - n % CHUNK, n):
        lane[j % CHUNK] += m - x[j] if weight == NULL else gap_term(weight[j], m, x[j])
    total = fold(lane)
    if is_finite(total):
        return total
    for chunk in range((n + CHUNK - 1) // CHUNK):
        i = chunk * CHUNK
        width = min(n - i, <Py_ssize_t>CHUNK)
        for j in range(width):
            wide[j] += gap_term(<double>1.0 if weight == NULL else <double>weight[i + j],
                                <double>m, <double>x[i + j])
    return fold(wide)


cdef inline void soft_block(
    const Job* job, const real* x, const real* t, Py_ssize_t start, Py_ssize_t n, real m,
    double* gap, double* mass,
) noexcept nogil:
    """Add the sums of w_c t_c (m - x_c) and of w_c t_c, classes start to start + n, w_c relative."""
    cdef double wide[CHUNK]
    cdef real gap_lane[CHUNK]
    cdef real mass_lane[CHUNK]
    cdef const real* weight = <const real*>job.relative_weight + start
    cdef real keep = <real>(1.0 - job.smoothing), uniform = <real>(job.smoothing / job.num_classes)
    cdef real wt
    cdef double total
    cdef Py_ssize_t chunk, i, j, width
    for j in range(CHUNK):
        gap_lane[j] = mass_lane[j] = 0
        wide[j] = 0.0
    for chunk in range((n + CHUNK - 1) // CHUNK):
        i = chunk * CHUNK
        width = min(n - i, <Py_ssize_t>CHUNK)
        if job.weight == NULL:
            for j in range(width):
                wt = keep * t[i + j] + uniform
                mass_lane[j] += wt
                gap_lane[j] += gap_term(wt, m, x[i + j])
        else:
            for j in range(width):
                wt = weight[i + j] * (keep * t[i + j] + uniform)
                mass_lane[j] += wt
                gap_lane[j] += gap_term(wt, m, x[i + j])
    mass[0] += fold(mass_lane)
    total = fold(gap_lane)
    if not is_finite(total):  # in float64 where it leaves the range of x
        for j in range(n):
            wt = keep * t[j] + uniform
            if job.weight != NULL:
                wt *= weight[j]
            wide[j % CHUNK] += gap_term(<double>wt, <double>m, <double>x[j])
        total = fold(wide)
    gap[0] += total


# ---------------------------------------------------------------------------------------------
# The scalar step: from what a row was reduced to, its loss and the coefficients of its gradient
# ---------------------------------------------------------------------------------------------

cdef inline void add_exponentials(Rows* r, Py_ssize_t n, real unused) noexcept nogil:
    """The exponentials of the maximum and of the target, in the units of the sum."""
    cdef real m, pivot, magic
    cdef Py_ssize_t i
    for i in range(n):
        m = <real>r.maximum[i]
        pivot, magic = pivot_of(m), magic_of(m)
        r.top[i] = exponential(m, pivot, magic, lowest_of(magic))
        r.target_exp[i] = exponential(<real>r.target_logit[i], pivot, magic, lowest_of(magic))


cdef inline double power_of_job(const Job* job) noexcept nogil:
    return power_of(<double>0.0) if job.storage == FLOAT64 else power_of(<float>0.0)


cdef inline double larger(double a, double b) noexcept nogil:
    a = a if a >= 0.0 else -a
    b = b if b >= 0.0 else -b
    return a if a > b else b


cdef inline double left_out_of(
    double a, double p, double others, double subtracted, double rest
) noexcept nogil:
    """a p - subtracted, or the same as rest - a (1 - p): the second unless it cancels more."""
    cdef double plain = a * p - subtracted, complement = rest - a * others
    cdef double size = larger(a * p, subtracted)
    return plain if 2.0 * size < larger(a * others, rest) else complement


cdef inline void cross_entropy_step(const Job* job, Rows* r, Py_ssize_t n) noexcept nogil:
    cdef double uniform = job.smoothing / job.num_classes
    cdef double spread = uniform * job.weight_sum
    cdef double b, d, log_s, lse, z_slope, total, inverse, a, loss, weight, spread_y, left_out
    cdef double power = power_of_job(job)
    cdef Py_ssize_t i
    for i in range(n):
        b = (1.0 - job.smoothing) * r.target_weight[i]
        d = r.target_logit[i] - r.maximum[i]
        total = r.others[i] + r.target_exp[i]
        inverse = 1.0 / total
        log_s = log1p_of((r.others[i] + (r.target_exp[i] - r.top[i])) / r.top[i])
        lse = r.maximum[i] + log_s
        z_slope = 2.0 * job.z_loss * lse
        loss = gap_term(b, log_s, d) + spread * log_s + uniform * r.gap[i] + 0.5 * z_slope * lse
        r.loss[i] = 0.0 if r.row_weight[i] == 0.0 else loss * r.row_weight[i]

        a = b + spread + z_slope
        spread_y = uniform * r.target_weight[i]
        left_out = left_out_of(a, r.target_exp[i] * inverse, r.others[i] * inverse, b + spread_y,
                               spread + z_slope - spread_y)
        weight = r.row_weight[i] * job.scale
        r.factor[i] = 0.0 if weight == 0.0 else weight * a * (inverse / power)
        r.spread[i] = weight * uniform
        r.left_out[i] = 0.0 if weight == 0.0 else weight * left_out


cdef inline void cross_entropy_soft_step(const Job* job, Rows* r, Py_ssize_t n) noexcept nogil:
    cdef double log_s, lse, z_slope, total, mass, a, loss, weight, left_out
    cdef double power = power_of_job(job)
    cdef Py_ssize_t i
    for i in range(n):
        mass = r.mass[i] + r.top_mass[i]
        log_s = log1p_of(r.others[i] / r.top[i])
        lse = r.maximum[i] + log_s
        z_slope = 2.0 * job.z_loss * lse
        loss = mass * log_s + r.gap[i] + 0.5 * z_slope * lse
        r.loss[i] = 0.0 if r.row_weight[i] == 0.0 else loss * r.row_weight[i]

        total = r.others[i] + r.top[i]
        a = mass + z_slope
        left_out = left_out_of(a, r.top[i] / total, r.others[i] / total, r.top_mass[i],
                               r.mass[i] + z_slope)
        weight = r.row_weight[i] * job.scale
        r.factor[i] = 0.0 if weight == 0.0 else weight * a / (total * power)
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
    cdef bint smooth = job.z_loss != 0.0 or (job.smoothing != 0.0 and job.largest_weight != 0.0)
    cdef double kept = 1.0 - job.smoothing
    cdef Py_ssize_t i
    cdef bint used
    read_indices(job, first, n, y)
    for i in range(n):
        # Targets were checked, but another thread may have changed them since.
        used = (y[i] != job.ignore_index) & (<uint64_t>y[i] < <uint64_t>job.num_classes)
        y[i] = y[i] if used else 0
        r.row_weight[i] = 1.0 if used else 0.0
        r.target_weight[i] = 1.0
    if job.sample_weight != NULL:
        for i in range(n):
            r.row_weight[i] *= job.sample_weight[first + i]
    if job.weight != NULL:
        for i in range(n):
            r.target_weight[i] = job.weight[y[i]]
    if not smooth:
        for i in range(n):
            r.row_weight[i] = 0.0 if kept * r.target_weight[i] == 0.0 else r.row_weight[i]


cdef void read_sample_weights(
    const Job* job, Py_ssize_t first, Py_ssize_t n, Rows* r
) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        r.row_weight[i] = 1.0 if job.sample_weight == NULL else job.sample_weight[first + i]


cdef double deliver_losses(
    const Job* job, Py_ssize_t first, Py_ssize_t n, const double* loss
) noexcept nogil:
    """Round row losses to the compute dtype, hand them out, sum what was handed out."""
    cdef double rounded[LANES]
    cdef Py_ssize_t i
    for i in range(LANES):
        rounded[i] = 0.0
    if job.storage == FLOAT64:
        memcpy(rounded, loss, n * sizeof(double))
    else:
        for i in range(n):
            rounded[i] = <double><float>loss[i]
    if job.losses != NULL:
        for i in range(n):
            if job.storage == FLOAT64:
                (<double*>job.losses)[first + i] = rounded[i]
            else:
                (<float*>job.losses)[first + i] = <float>rounded[i]
    return fold_lanes(rounded)


# ---------------------------------------------------------------------------------------------
# Rows: classes in the SIMD lanes
# ---------------------------------------------------------------------------------------------
# A unit is a group of rows, so that the scalar step has something to vectorise, and what is
# written is a long run. Scratch: two blocks, and the group's rows with room for a last chunk.

cdef inline Py_ssize_t rows_in_unit(const Job* job, Py_ssize_t unit) noexcept nogil:
    return min(job.group, job.rows - unit * job.group)


cdef inline const char* row_of(
    const Job* job, const char* data, Storage storage, Py_ssize_t row
) noexcept nogil:
    return data + row * job.row_step * itemsize(storage)


cdef inline Py_ssize_t row_numbers(const Job* job) noexcept nogil:
    return 2 * BLOCK + job.summed * job.num_classes + CHUNK


cdef inline real* kept_rows(const Job* job, Py_ssize_t unit, real* scratch) noexcept nogil:
    """Where the rows of a group are put together: in scratch, or, of columns, where they are."""
    if job.layout == ROWS:
        return scratch + 2 * BLOCK
    return <real*>job.out + unit * job.group * job.row_step


cdef inline void store_rows(
    const Job* job, Py_ssize_t first, Py_ssize_t n, const real* kept
) noexcept nogil:
    if job.layout == ROWS:
        store(job, first * job.num_classes, n * job.num_classes, kept)


cdef inline real largest_of_row(const Job* job, const char* x, real* buffer) noexcept nogil:
    cdef real m = <real>-INFINITY, block_m
    cdef Py_ssize_t b, c, n
    for b in range(blocks_in(job.num_classes)):
        c = b * BLOCK
        n = min(job.num_classes - c, <Py_ssize_t>BLOCK)
        block_m = largest(load_block(job.storage, x, c, n, buffer), n)
        m = block_m if block_m > m else m
    return m


cdef inline Py_ssize_t find_in_row(
    const Job* job, const char* x, real value, real* buffer
) noexcept nogil:
    """The first class whose score is value, or 0."""
    cdef Py_ssize_t b, c, n, i
    for b in range(blocks_in(job.num_classes)):
        c = b * BLOCK
        n = min(job.num_classes - c, <Py_ssize_t>BLOCK)
        i = find(load_block(job.storage, x, c, n, buffer), n, value)
        if i < n:
            return c + i
    return 0


cdef inline bint row_holds_nan(const Job* job, const char* x, real* buffer) noexcept nogil:
    cdef Py_ssize_t b, c, n
    for b in range(blocks_in(job.num_classes)):
        c = b * BLOCK
        n = min(job.num_classes - c, <Py_ssize_t>BLOCK)
        if holds_nan(load_block(job.storage, x, c, n, buffer), 1, n):
            return True
    return False


cdef inline double exp_row(
    const Job* job, const char* x, Py_ssize_t skip, real m, real* kept, real* scratch
) noexcept nogil:
    """The sum of the exponentials without class `skip`; unless NULL, kept receives them all.

    Meanwhile the rows that come one unit later are fetched, so that memory is never idle.
    """
    cdef real pivot = pivot_of(m), magic = magic_of(m)
    cdef real* e
    cdef const real* block
    cdef const char* later = x + min(job.group * job.row_step, <Py_ssize_t>FAR) * itemsize(job.storage)
    cdef double total = 0.0
    cdef Py_ssize_t b, c, n
    for b in range(blocks_in(job.num_classes)):
        c = b * BLOCK
        n = min(job.num_classes - c, <Py_ssize_t>BLOCK)
        block = load_block(job.storage, x, c, n, scratch)
        e = scratch + BLOCK if kept == NULL else kept + c
        total += exp_block(block, n, skip - c, pivot, magic, e,
                           later + c * itemsize(job.storage), CHUNK * itemsize(job.storage))
    return total


cdef inline void scale_row(real* e, Py_ssize_t n, double factor) noexcept nogil:
    cdef Py_ssize_t j
    cdef real f = narrow_factor(e, n, factor)
    for j in range(n):
        e[j] *= f


cdef inline real narrow_factor(real* e, Py_ssize_t n, double factor) noexcept nogil:
    """The factor on e in the compute type; where it is too small for that, on 2**-SHIFT e."""
    cdef real power = power_of(e[0])
    cdef double narrow = factor * power
    cdef Py_ssize_t j
    if -tiny_of(power) < narrow < tiny_of(power) and factor != 0.0:
        narrow = factor
        for j in range(n):
            e[j] *= power
    return <real>narrow


cdef inline real shrink_for(double factor, real unused) noexcept nogil:
    """A power of two for exponentials, so that factor over it is a normal number; mostly 1."""
    cdef double tiny = tiny_of(unused)
    return power_of(unused) if -tiny < factor < tiny else <real>1.0


cdef inline void write_row(
    const Job* job, Py_ssize_t row, Py_ssize_t i, const Rows* r, Py_ssize_t index, real* e,
    real* scratch,
) noexcept nogil:
    """From exponentials to the gradient: factor * e_c - spread * w_c t_c, and left_out at index."""
    cdef const real* t
    cdef const real* w = <const real*>job.relative_weight
    cdef double spread = r.spread[i] * job.largest_weight
    cdef real f, on_target, on_all
    cdef Py_ssize_t b, c, j, n, num_classes = job.num_classes
    if r.row_weight[i] == 0.0:
        memset(e, 0, num_classes * sizeof(real))
        return
    if job.other == NULL and spread == 0.0:
        scale_row(e, num_classes, r.factor[i])
        e[index] = <real>r.left_out[i]
        return
    f = narrow_factor(e, num_classes, r.factor[i])
    if job.other == NULL and job.weight == NULL:
        on_all = <real>spread
        for j in range(num_classes):
            e[j] = e[j] * f - on_all
    elif job.other == NULL:
        on_all = <real>spread
        for j in range(num_classes):
            e[j] = e[j] * f - on_all * w[j]
    else:
        on_target = <real>(spread * (1.0 - job.smoothing))
        on_all = <real>(spread * job.smoothing / job.num_classes)
        for b in range(blocks_in(num_classes)):
            c = b * BLOCK
            n = min(num_classes - c, <Py_ssize_t>BLOCK)
            t = load_block(job.other_storage, row_of(job, job.other, job.other_storage, row), c, n,
                           scratch)
            if job.weight == NULL:
                for j in range(n):
                    e[c + j] = e[c + j] * f - (on_target * t[j] + on_all)
            else:
                for j in range(n):
                    e[c + j] = e[c + j] * f - w[c + j] * (on_target * t[j] + on_all)
    e[index] = <real>r.left_out[i]


cdef inline void largest_of_rows(
    const Job* job, Py_ssize_t first, Py_ssize_t n, Rows* r, real* scratch
) noexcept nogil:
    # A loop of its own, like each stage: rows overlap in the processor, stages of one row cannot.
    cdef Py_ssize_t i
    for i in range(n):
        r.maximum[i] = largest_of_row(
            job, row_of(job, job.logits, job.storage, first + i), scratch)


cdef void softmax_rows(const Job* job, Py_ssize_t unit, real* scratch) noexcept nogil:
    cdef real* kept = kept_rows(job, unit, scratch)
    cdef Rows r
    cdef Py_ssize_t i, first = unit * job.group, n = rows_in_unit(job, unit)
    largest_of_rows(job, first, n, &r, scratch)
    for i in range(n):
        r.others[i] = exp_row(job, row_of(job, job.logits, job.storage, first + i), -1,
                              <real>r.maximum[i], kept + i * job.row_step, scratch)
    for i in range(n):
        scale_row(kept + i * job.row_step, job.num_classes,
                  1.0 / (r.others[i] * power_of(scratch[0])))
    store_rows(job, first, n, kept)


cdef void log_softmax_rows(
    const Job* job, Operation operation, Py_ssize_t unit, real* scratch
) noexcept nogil:
    """log_softmax, or, without its second pass, logsumexp."""
    cdef real* kept = kept_rows(job, unit, scratch)
    cdef Rows r
    cdef const char* x
    cdef const real* block
    cdef real* result
    cdef real m, log_s
    cdef Py_ssize_t i, b, c, j, width, first = unit * job.group, n = rows_in_unit(job, unit)
    largest_of_rows(job, first, n, &r, scratch)
    for i in range(n):
        x = row_of(job, job.logits, job.storage, first + i)
        m = <real>r.maximum[i]
        r.target_logit[i] = m
        r.others[i] = exp_row(job, x, find_in_row(job, x, m, scratch), m, <real*>NULL, scratch)
    add_exponentials(&r, n, scratch[0])
    for i in range(n):
        r.loss[i] = log1p_of(r.others[i] / r.top[i])
    result = kept
    if operation == LOGSUMEXP:
        for i in range(n):
            x = row_of(job, job.logits, job.storage, first + i)
            # Nothing but -inf, or a +inf: the maximum is all there is to the sum.
            if not is_finite(r.maximum[i]) and not row_holds_nan(job, x, scratch):
                r.loss[i] = 0.0
        for i in range(n):
            result[i] = <real>(r.maximum[i] + r.loss[i])
        store(job, first, n, result)
        return
    for i in range(n):
        x = row_of(job, job.logits, job.storage, first + i)
        m, log_s = <real>r.maximum[i], <real>r.loss[i]
        result = kept + i * job.row_step
        for b in range(blocks_in(job.num_classes)):
            c = b * BLOCK
            width = min(job.num_classes - c, <Py_ssize_t>BLOCK)
            block = load_block(job.storage, x, c, width, scratch)
            for j in range(width):
                result[c + j] = (block[j] - m) - log_s
    store_rows(job, first, n, kept)


cdef void cross_entropy_rows(
    const Job* job, Operation operation, Py_ssize_t unit, real* scratch
) noexcept nogil:
    cdef real* kept = kept_rows(job, unit, scratch)
    cdef Rows r
    cdef int64_t y[LANES]
    cdef const char* x
    cdef real* e = NULL
    cdef real m
    cdef Py_ssize_t i, first = unit * job.group, n = rows_in_unit(job, unit)
    if operation == CROSS_ENTROPY:
        read_targets(job, first, n, y, &r)
    else:
        read_sample_weights(job, first, n, &r)
    largest_of_rows(job, first, n, &r, scratch)
    for i in range(n):
        r.others[i] = r.target_logit[i] = r.gap[i] = r.mass[i] = r.top_mass[i] = 0.0
        if r.row_weight[i] == 0.0:
            r.maximum[i] = 0.0
            continue
        x = row_of(job, job.logits, job.storage, first + i)
        m = <real>r.maximum[i]
        if operation == CROSS_ENTROPY_SOFT:
            y[i] = find_in_row(job, x, m, scratch)
            soft_sums(job, first + i, i, &r, m, y[i], scratch)
        elif job.smoothing != 0.0:
            r.gap[i] = job.largest_weight * gap_of_row(job, x, m, scratch)
        if job.out != NULL:
            e = kept + i * job.row_step
        r.target_logit[i] = load_block(job.storage, x, y[i], 1, scratch)[0]
        r.others[i] = exp_row(job, x, y[i], m, e, scratch)
    add_exponentials(&r, n, scratch[0])
    if operation == CROSS_ENTROPY:
        cross_entropy_step(job, &r, n)
    else:
        cross_entropy_soft_step(job, &r, n)
    job.partial[unit] = deliver_losses(job, first, n, r.loss)
    if job.out == NULL:
        return
    for i in range(n):
        write_row(job, first + i, i, &r, y[i], kept + i * job.row_step, scratch)
    store_rows(job, first, n, kept)


cdef double gap_of_row(const Job* job, const char* x, real m, real* scratch) noexcept nogil:
    cdef const real* weight = NULL
    cdef double gap = 0.0
    cdef Py_ssize_t b, c, n
    for b in range(blocks_in(job.num_classes)):
        c = b * BLOCK
        n = min(job.num_classes - c, <Py_ssize_t>BLOCK)
        if job.weight != NULL:
            weight = <const real*>job.relative_weight + c
        gap += gap_block(load_block(job.storage, x, c, n, scratch), weight, n, m)
    return gap


cdef void soft_sums(
    const Job* job, Py_ssize_t row, Py_ssize_t i, Rows* r, real m, Py_ssize_t index, real* scratch
) noexcept nogil:
    """What the scalar step wants to know of soft targets."""
    cdef const char* x = row_of(job, job.logits, job.storage, row)
    cdef const char* targets = row_of(job, job.other, job.other_storage, row)
    cdef const real* block
    cdef const real* t
    cdef Py_ssize_t b, c, n, k
    for b in range(blocks_in(job.num_classes)):
        c = b * BLOCK
        n = min(job.num_classes - c, <Py_ssize_t>BLOCK)
        block = load_block(job.storage, x, c, n, scratch)
        t = load_block(job.other_storage, targets, c, n, scratch + BLOCK)
        k = min(max(index - c, <Py_ssize_t>0), n)
        soft_block(job, block, t, c, k, m, &r.gap[i], &r.mass[i])
        if k < n and c + k == index:
            soft_block(job, block + k, t + k, index, 1, m, &r.gap[i], &r.top_mass[i])
            k += 1
        soft_block(job, block + k, t + k, c + k, n - k, m, &r.gap[i], &r.mass[i])
    r.gap[i] *= job.largest_weight
    r.mass[i] *= job.largest_weight
    r.top_mass[i] *= job.largest_weight


cdef void backward_rows(
    const Job* job, Operation operation, Py_ssize_t unit, real* scratch
) noexcept nogil:
    """softmax_backward: p (g - sum g p); log_softmax_backward: g - exp(l) sum g."""
    cdef real* kept = kept_rows(job, unit, scratch)
    cdef const char* forward
    cdef const char* upstream
    cdef const real* p
    cdef const real* g
    cdef real* result
    cdef real f, shrink, pivot, magic, lowest, m
    cdef double total, unit_m
    cdef bint far
    cdef Py_ssize_t i, b, c, j, width, first = unit * job.group, n = rows_in_unit(job, unit)
    for i in range(n):
        forward = row_of(job, job.logits, job.storage, first + i)
        upstream = row_of(job, job.other, job.storage, first + i)
        total = 0.0
        for b in range(blocks_in(job.num_classes)):
            c = b * BLOCK
            width = min(job.num_classes - c, <Py_ssize_t>BLOCK)
            g = load_block(job.storage, upstream, c, width, scratch)
            if operation == SOFTMAX_BACKWARD:
                p = load_block(job.storage, forward, c, width, scratch + BLOCK)
                total += dot_lanes(g, p, width)
            else:
                total += sum_lanes(g, width)
        f = <real>total
        m = pivot = magic = lowest = shrink = 0
        far = is_far(total, m)
        if far:
            total = 0.0
            for b in range(blocks_in(job.num_classes)):
                c = b * BLOCK
                width = min(job.num_classes - c, <Py_ssize_t>BLOCK)
                g = load_block(job.storage, upstream, c, width, scratch)
                p = load_block(job.storage, forward, c, width, scratch + BLOCK)
                total += far_sum(operation, g, p, 1, width)
        if operation == LOG_SOFTMAX_BACKWARD:
            m = reference_above(largest_of_row(job, forward, scratch))
            unit_m = unit_of(m)
            shrink = shrink_for(total * unit_m, m)
            f = <real>(total / shrink * unit_m)
            pivot, magic = pivot_of(m), magic_of(m)
            lowest = lowest_of(magic)
        for b in range(blocks_in(job.num_classes)):
            c = b * BLOCK
            width = min(job.num_classes - c, <Py_ssize_t>BLOCK)
            g = load_block(job.storage, upstream, c, width, scratch)
            p = load_block(job.storage, forward, c, width, scratch + BLOCK)
            result = kept + i * job.row_step + c
            if far:
                far_difference(operation, g, p, result, 1, width, m, total)
            elif operation == SOFTMAX_BACKWARD:
                for j in range(width):
                    result[j] = p[j] * (g[j] - f)
            else:
                for j in range(width):
                    result[j] = less(exponential(p[j], pivot, magic, lowest) * shrink, f, g[j])
    store_rows(job, first, n, kept)


cdef inline void row_unit(
    const Job* job, Operation operation, Py_ssize_t unit, real* scratch
) noexcept nogil:
    if operation == SOFTMAX:
        softmax_rows(job, unit, scratch)
    elif operation <= LOGSUMEXP:
        log_softmax_rows(job, operation, unit, scratch)
    elif operation <= LOG_SOFTMAX_BACKWARD:
        backward_rows(job, operation, unit, scratch)
    else:
        cross_entropy_rows(job, operation, unit, scratch)


cdef inline real reference_above(real maximum) noexcept nogil:
    """Log-probabilities are at most 0, but the formulas hold for any: a reference for both."""
    return maximum if maximum > 0 else <real>0.0


cdef inline double unit_of(real m) noexcept nogil:
    """What an exponential with reference m is multiplied by to give exp(x)."""
    cdef real magic = magic_of(m), pivot = pivot_of(m)
    cdef double e = 1.0 if m == 0 else exp_any(m)  # 0, mostly: reference_above
    return e / <double>exponential(m, pivot, magic, lowest_of(magic))


cdef inline real less(real a, real b, real c) noexcept nogil:
    if real is float:
        return fl_less_f(a, b, c)
    else:
        return fl_less_d(a, b, c)


cdef inline bint is_far(double total, real unused) noexcept nogil:
    """Whether a sum of upstream gradients is out of range, or near enough to its end."""
    return not -huge_of(unused) < total < huge_of(unused)


cdef void far_difference(
    Operation operation, const real* g, const real* forward, real* result, Py_ssize_t step,
    Py_ssize_t n, real m, double total,
) noexcept nogil:
    """What backward_rows says, the sum being total / FAR_UNIT, in float64 and without overflow."""
    cdef real pivot = pivot_of(m), magic = magic_of(m), lowest = lowest_of(magic)
    cdef double unit, value
    cdef Py_ssize_t j
    unit = unit_of(m) if operation == LOG_SOFTMAX_BACKWARD else 1.0
    for j in range(n):
        value = FAR_UNIT * g[j * step]
        if operation == SOFTMAX_BACKWARD:
            value = forward[j * step] * (value - total)
        else:
            value -= unit * exponential(forward[j * step], pivot, magic, lowest) * total
        result[j * step] = <real>(value / FAR_UNIT)


# ---------------------------------------------------------------------------------------------
# Tiles: samples in the SIMD lanes
# ---------------------------------------------------------------------------------------------
# A tile is LANES samples that follow each other in (outer, inner) order, held in scratch as
# [class][lane]; lanes without a sample hold zeros. A unit is one tile, or, where samples lie next
# to each other in memory, several side by side, so that runs of memory are longer. Scratch: room
# for samples one after the other, as rows, then the unit's tiles, twice; transposing moves eight by
# eight, and may go seven beyond either. Then the carries, for runs of output that begin and end
# within a cache line.

cdef inline void transpose(
    const real* source, Py_ssize_t source_step, real* to, Py_ssize_t to_step
) noexcept nogil:
    if real is float:
        fl_transpose_f(source, source_step, to, to_step)
    else:
        fl_transpose_d(source, source_step, to, to_step)


cdef inline real* tile_of(const Job* job, real* scratch) noexcept nogil:
    return scratch + (job.num_classes + 1) * LANES


cdef inline real* other_tile_of(const Job* job, real* scratch) noexcept nogil:
    return tile_of(job, scratch) + (job.num_classes + 8) * job.step


cdef inline Py_ssize_t tile_numbers(const Job* job) noexcept nogil:
    return (job.num_classes + 1) * LANES + 2 * (job.num_classes + 8) * job.step


cdef inline void load_tiles(
    const Job* job, Storage storage, const char* data, Py_ssize_t unit, real* tile, real* buffer
) noexcept nogil:
    cdef Py_ssize_t C = job.num_classes, inner = job.inner, step = job.step
    cdef Py_ssize_t first = unit * job.group, n = rows_in_unit(job, unit)
    cdef Py_ssize_t lane = 0, width, c, o, i
    cdef const real* line
    cdef real* to
    if inner == 1:
        line = load_block(storage, data, first * C, n * C, buffer)
        if line != buffer and (first + LANES) * C + 8 > job.rows * C:
            # Transposing must not read beyond the array.
            memset(buffer, 0, LANES * C * sizeof(real))
            memcpy(buffer, line, n * C * sizeof(real))
            line = buffer
        elif n < LANES:
            memset(buffer + n * C, 0, (LANES - n) * C * sizeof(real))
        for lane in range(0, LANES, 8):
            for c in range(0, C, 8):
                transpose(line + lane * C + c, C, tile + c * step + lane, step)
        return
    if n < job.group:
        memset(tile, 0, C * step * sizeof(real))
    while lane < n:
        o, i = (first + lane) // inner, (first + lane) % inner
        width = min(n - lane, inner - i)
        for c in range(C):
            to = tile + c * step + lane
            line = load_block(storage, data, (o * C + c) * inner + i, width, to)
            if line != to:
                memcpy(to, line, width * sizeof(real))
        lane += width


cdef inline void store_tiles(
    const Job* job, Py_ssize_t unit, const real* tile, real* buffer
) noexcept nogil:
    cdef Py_ssize_t C = job.num_classes, inner = job.inner, step = job.step
    cdef Py_ssize_t first = unit * job.group, n = rows_in_unit(job, unit)
    cdef Py_ssize_t lane = 0, width, c, o, i
    if inner == 1:
        # From the last classes to the first: what goes beyond a row is written over by the next.
        for lane in range(0, LANES, 8):
            for c in range((C - 1) // 8 * 8, -1, -8):
                transpose(tile + c * step + lane, step, buffer + lane * C + c, C)
        store(job, first * C, n * C, buffer)
        return
    while lane < n:
        o, i = (first + lane) // inner, (first + lane) % inner
        width = min(n - lane, inner - i)
        for c in range(C):
            store_run(job, carries_of(job, buffer) + c, (o * C + c) * inner + i, width,
                      tile + c * step + lane)
        lane += width


cdef inline void clear_dead_lanes(const Job* job, const Rows* r, real* tile) noexcept nogil:
    """Nothing of a row that counts for nothing, a NaN least of all, gets through."""
    cdef Py_ssize_t step = job.step, c, lane
    cdef int dead = 0
    for lane in range(LANES):
        dead |= r.row_weight[lane] == 0.0
    if not dead:
        return
    for lane in range(LANES):
        if r.row_weight[lane] == 0.0:
            for c in range(job.num_classes):
                tile[c * step + lane] = 0


cdef inline void largest_in_lanes(const Job* job, const real* tile, real* maximum) noexcept nogil:
    cdef real m[LANES]
    cdef Py_ssize_t step = job.step, c, j
    for j in range(LANES):
        m[j] = <real>-INFINITY
    for c in range(job.num_classes):
        for j in range(LANES):
            m[j] = tile[c * step + j] if tile[c * step + j] > m[j] else m[j]
    for j in range(LANES):
        maximum[j] = m[j]


cdef inline void find_in_lanes(
    const Job* job, const real* tile, const real* maximum, int32_t* index
) noexcept nogil:
    """The first class whose score is the maximum, or 0."""
    cdef real m[LANES]
    cdef int32_t k[LANES]
    cdef int32_t c
    cdef Py_ssize_t step = job.step, j
    for j in range(LANES):
        m[j] = maximum[j]
        k[j] = 0
    for c in range(<int32_t>job.num_classes - 1, -1, -1):
        for j in range(LANES):
            k[j] = c if tile[c * step + j] == m[j] else k[j]
    for j in range(LANES):
        index[j] = k[j]


cdef inline void exp_tile(
    const Job* job, Py_ssize_t first, real* tile, const real* maximum, const int32_t* index,
    bint keep, Rows* r,
) noexcept nogil:
    """Sums of exponentials without class index; if keep, they take the place of the scores.

    Meanwhile the scores of the unit after that of row `first` are fetched, so that memory is
    never idle.
    """
    cdef real pivot[LANES]
    cdef real magic[LANES]
    cdef real lowest[LANES]
    cdef real line[LANES]
    cdef real lane[LANES]
    cdef double total[LANES]
    cdef int32_t hole[LANES]
    cdef Py_ssize_t size = itemsize(job.storage), step = job.step, next = first + job.group
    cdef Py_ssize_t later_step = (LANES if job.inner == 1 else job.inner) * size
    cdef const char* later = job.logits + size * (
        next // job.inner * job.num_classes * job.inner + next % job.inner)
    cdef int32_t c
    cdef Py_ssize_t j
    for j in range(LANES):
        pivot[j] = pivot_of(maximum[j])
        magic[j] = magic_of(maximum[j])
        lowest[j] = lowest_of(magic[j])
        hole[j] = index[j]
        lane[j] = 0
        total[j] = 0.0
    for c in range(<int32_t>job.num_classes):
        fetch(later + c * later_step, LANES * size)
        for j in range(LANES):
            line[j] = exponential(tile[c * step + j], pivot[j], magic[j], lowest[j])
        for j in range(LANES):
            lane[j] += <real>0 if hole[j] == c else line[j]
        if keep:
            for j in range(LANES):
                tile[c * step + j] = line[j]
        if c % RUN == RUN - 1:
            for j in range(LANES):
                total[j] += lane[j]
                lane[j] = 0
    for j in range(LANES):
        r.maximum[j] = maximum[j]
        r.others[j] = total[j] + lane[j]


cdef inline void narrow_factors(const Job* job, real* tile, const Rows* r, real* f) noexcept nogil:
    """As narrow_factor, for every lane."""
    cdef real power = power_of(tile[0]), tiny = tiny_of(tile[0])
    cdef double narrow[LANES]
    cdef bint small = False
    cdef Py_ssize_t step = job.step, c, j
    for j in range(LANES):
        narrow[j] = r.factor[j] * power
        f[j] = <real>narrow[j]
        small |= (-tiny < narrow[j]) & (narrow[j] < tiny) & (r.factor[j] != 0)
    if not small:
        return
    for j in range(LANES):
        if -tiny < narrow[j] < tiny:
            f[j] = <real>r.factor[j]
            for c in range(job.num_classes):
                tile[c * step + j] *= power


cdef inline real weight_of(const Job* job, Py_ssize_t c, real unused) noexcept nogil:
    """The weight of a class, relative to the largest in magnitude."""
    return <real>1.0 if job.weight == NULL else (<const real*>job.relative_weight)[c]


cdef inline void scale_tile(
    const Job* job, real* tile, const real* targets, const Rows* r, const int32_t* index
) noexcept nogil:
    """From exponentials to the gradient: factor * e_c - spread * w_c t_c, and left_out at index."""
    cdef real f[LANES]
    cdef real left_out[LANES]
    cdef real on_target[LANES]
    cdef real on_all[LANES]
    cdef int32_t hole[LANES]
    cdef double keep = 1.0 - job.smoothing, uniform = job.smoothing / job.num_classes, spread
    cdef real w
    cdef int32_t c
    cdef Py_ssize_t step = job.step, j
    narrow_factors(job, tile, r, f)
    for j in range(LANES):
        spread = r.spread[j] * job.largest_weight
        on_target[j] = <real>(spread * keep)
        on_all[j] = <real>(spread if targets == NULL else spread * uniform)
        left_out[j] = <real>r.left_out[j]
        hole[j] = index[j]
    for c in range(<int32_t>job.num_classes):
        w = weight_of(job, c, left_out[0])
        if targets != NULL:
            for j in range(LANES):
                tile[c * step + j] = tile[c * step + j] * f[j] - w * (
                    on_target[j] * targets[c * step + j] + on_all[j])
        elif job.smoothing != 0.0:
            for j in range(LANES):
                tile[c * step + j] = tile[c * step + j] * f[j] - w * on_all[j]
        else:
            for j in range(LANES):
                tile[c * step + j] *= f[j]
        # In passing: numbers put one by one into the tile would hold up who then reads vectors.
        for j in range(LANES):
            tile[c * step + j] = left_out[j] if hole[j] == c else tile[c * step + j]


cdef void softmax_tile(
    const Job* job, Operation operation, Py_ssize_t first, real* tile, real* buffer
) noexcept nogil:
    """softmax, log_softmax and logsumexp."""
    cdef Rows r
    cdef real maximum[LANES]
    cdef real log_s[LANES]
    cdef int32_t index[LANES]
    cdef Py_ssize_t c, j, step = job.step
    largest_in_lanes(job, tile, maximum)
    if operation == SOFTMAX:
        for j in range(LANES):
            index[j] = -1
        exp_tile(job, first, tile, maximum, index, True, &r)
        for j in range(LANES):
            log_s[j] = <real>(1.0 / r.others[j])
        for c in range(job.num_classes):
            for j in range(LANES):
                tile[c * step + j] *= log_s[j]
        return
    find_in_lanes(job, tile, maximum, index)
    exp_tile(job, first, tile, maximum, index, False, &r)
    for j in range(LANES):
        r.target_logit[j] = r.maximum[j]
    add_exponentials(&r, LANES, tile[0])
    for j in range(LANES):
        r.loss[j] = log1p_of(r.others[j] / r.top[j])
    if operation == LOGSUMEXP:
        for j in range(LANES):
            if not is_finite(r.maximum[j]) and not holds_nan(tile + j, step, job.num_classes):
                r.loss[j] = 0.0
        for j in range(LANES):
            buffer[j] = <real>(r.maximum[j] + r.loss[j])
        store(job, first, min(job.rows - first, <Py_ssize_t>LANES), buffer)
        return
    for j in range(LANES):
        log_s[j] = <real>r.loss[j]
    for c in range(job.num_classes):
        for j in range(LANES):
            tile[c * step + j] = (tile[c * step + j] - maximum[j]) - log_s[j]


cdef double cross_entropy_tile(
    const Job* job, Operation operation, Py_ssize_t first, real* tile, real* targets
) noexcept nogil:
    """From the scores to the gradient, if it is wanted; the sum of the losses."""
    cdef Rows r
    cdef int64_t y[LANES]
    cdef int32_t index[LANES]
    cdef real maximum[LANES]
    cdef Py_ssize_t j, n = min(job.rows - first, <Py_ssize_t>LANES)
    for j in range(n, LANES):
        y[j] = 0
        r.row_weight[j] = r.target_weight[j] = 0.0
    if operation == CROSS_ENTROPY:
        read_targets(job, first, n, y, &r)
        for j in range(LANES):
            index[j] = <int32_t>y[j]
    else:
        read_sample_weights(job, first, n, &r)
    clear_dead_lanes(job, &r, tile)
    largest_in_lanes(job, tile, maximum)
    if operation == CROSS_ENTROPY_SOFT:
        clear_dead_lanes(job, &r, targets)
        find_in_lanes(job, tile, maximum, index)
    for j in range(LANES):
        r.target_logit[j] = tile[index[j] * job.step + j]
        r.gap[j] = 0.0
    if operation == CROSS_ENTROPY_SOFT or job.smoothing != 0.0:
        gaps_of_tile(job, tile, targets, maximum, index, &r)
    exp_tile(job, first, tile, maximum, index, job.out != NULL, &r)
    add_exponentials(&r, LANES, tile[0])
    if operation == CROSS_ENTROPY:
        cross_entropy_step(job, &r, LANES)
    else:
        cross_entropy_soft_step(job, &r, LANES)
    if job.out != NULL:
        scale_tile(job, tile, targets, &r, index)
    return deliver_losses(job, first, n, r.loss)


cdef inline void gaps_of_tile(
    const Job* job, const real* tile, const real* targets, const real* maximum,
    const int32_t* index, Rows* r,
) noexcept nogil:
    """sum w_c t_c (m - x_c), the sum of w_c t_c without the maximum, and its w_k t_k."""
    cdef real gap[LANES]
    cdef real mass[LANES]
    cdef real m[LANES]
    cdef double total_gap[LANES]
    cdef double total_mass[LANES]
    cdef int32_t hole[LANES]
    cdef real keep = <real>(1.0 - job.smoothing), uniform = <real>(job.smoothing / job.num_classes)
    cdef real w, wt
    cdef int32_t c
    cdef int bad = 0
    cdef Py_ssize_t step = job.step, j
    for j in range(LANES):
        gap[j] = mass[j] = 0
        total_gap[j] = total_mass[j] = 0.0
        m[j] = maximum[j]
        hole[j] = index[j]
    for c in range(<int32_t>job.num_classes):
        w = weight_of(job, c, maximum[0])
        if targets == NULL:
            for j in range(LANES):
                gap[j] += gap_term(w, m[j], tile[c * step + j])
        else:
            for j in range(LANES):
                wt = w * (keep * targets[c * step + j] + uniform)
                gap[j] += gap_term(wt, m[j], tile[c * step + j])
                mass[j] += <real>0.0 if hole[j] == c else wt
        if c % RUN == RUN - 1:
            for j in range(LANES):
                total_gap[j] += gap[j]
                total_mass[j] += mass[j]
                gap[j] = mass[j] = 0
    for j in range(LANES):
        total_gap[j] += gap[j]
        total_mass[j] += mass[j]
        bad |= not is_finite(total_gap[j])
    if bad:  # in float64 where it leaves the range of x
        for j in range(LANES):
            if is_finite(total_gap[j]):
                continue
            total_gap[j] = 0.0
            for c in range(<int32_t>job.num_classes):
                wt = weight_of(job, c, maximum[0])
                if targets != NULL:
                    wt *= keep * targets[c * step + j] + uniform
                total_gap[j] += gap_term(<double>wt, <double>m[j], <double>tile[c * step + j])
    for j in range(LANES):
        r.gap[j] = job.largest_weight * total_gap[j]
        if targets != NULL:
            wt = weight_of(job, index[j], maximum[0]) * (
                keep * targets[index[j] * step + j] + uniform)
            r.top_mass[j] = job.largest_weight * wt
            r.mass[j] = job.largest_weight * total_mass[j]


cdef void backward_tile(const Job* job, Operation operation, real* p, real* g) noexcept nogil:
    cdef real maximum[LANES]
    cdef real pivot[LANES]
    cdef real magic[LANES]
    cdef real lowest[LANES]
    cdef real f[LANES]
    cdef real shrink[LANES]
    cdef real lane[LANES]
    cdef double total[LANES]
    cdef double unit_m
    cdef Py_ssize_t c, j, step = job.step
    for j in range(LANES):
        lane[j] = 0
        total[j] = 0.0
    for c in range(job.num_classes):
        if operation == SOFTMAX_BACKWARD:
            for j in range(LANES):
                lane[j] += g[c * step + j] * p[c * step + j]
        else:
            for j in range(LANES):
                lane[j] += g[c * step + j]
        if c % RUN == RUN - 1:
            for j in range(LANES):
                total[j] += lane[j]
                lane[j] = 0
    for j in range(LANES):
        total[j] += lane[j]
        maximum[j] = 0
    if operation == LOG_SOFTMAX_BACKWARD:
        largest_in_lanes(job, p, maximum)
        for j in range(LANES):
            maximum[j] = reference_above(maximum[j])
    for j in range(LANES):
        if is_far(total[j], lane[j]):
            # The result takes the place of g, and what follows leaves that alone.
            total[j] = far_sum(operation, g + j, p + j, step, job.num_classes)
            far_difference(operation, g + j, p + j, g + j, step, job.num_classes, maximum[j],
                           total[j])
            if operation == SOFTMAX_BACKWARD:
                for c in range(job.num_classes):
                    p[c * step + j] = 1
            total[j] = 0.0
        f[j] = <real>total[j]
    if operation == LOG_SOFTMAX_BACKWARD:
        for j in range(LANES):
            unit_m = unit_of(maximum[j])
            shrink[j] = shrink_for(total[j] * unit_m, maximum[j])
            f[j] = <real>(total[j] / shrink[j] * unit_m)
            pivot[j] = pivot_of(maximum[j])
            magic[j] = magic_of(maximum[j])
            lowest[j] = lowest_of(magic[j])
    for c in range(job.num_classes):
        if operation == SOFTMAX_BACKWARD:
            for j in range(LANES):
                p[c * step + j] *= g[c * step + j] - f[j]
        else:
            for j in range(LANES):
                p[c * step + j] = less(
                    exponential(p[c * step + j], pivot[j], magic[j], lowest[j]) * shrink[j],
                    f[j], g[c * step + j])


cdef void tile_unit(
    const Job* job, Operation operation, Py_ssize_t unit, real* scratch
) noexcept nogil:
    cdef real* tile = tile_of(job, scratch)
    cdef real* other = NULL
    cdef Py_ssize_t i, lane, first = unit * job.group
    cdef double loss
    load_tiles(job, job.storage, job.logits, unit, tile, scratch)
    if job.other != NULL:
        other = other_tile_of(job, scratch)
        load_tiles(job, job.other_storage, job.other, unit, other, scratch)
    for i in range((rows_in_unit(job, unit) + LANES - 1) // LANES):
        lane = i * LANES
        if operation <= LOGSUMEXP:
            softmax_tile(job, operation, first + lane, tile + lane, scratch)
        elif operation <= LOG_SOFTMAX_BACKWARD:
            backward_tile(job, operation, tile + lane, other + lane)
        else:
            loss = cross_entropy_tile(job, operation, first + lane, tile + lane,
                                      other + lane if other != NULL else NULL)
            job.partial[(first + lane) // LANES] = loss
    if job.out != NULL and operation != LOGSUMEXP:
        store_tiles(job, unit, tile, scratch)


# ---------------------------------------------------------------------------------------------
# Columns: many classes that do not lie next to each other
# ---------------------------------------------------------------------------------------------
# A unit of columns is turned into rows, which the functions above take in place, and back. So the
# bits of a row do not depend on how it lies in memory. Scratch: that of rows, then the unit's rows,
# twice, with room for what transposing writes beyond them.

cdef inline real* turned_of(const Job* job, real* scratch) noexcept nogil:
    return scratch + row_numbers(job)


cdef inline Py_ssize_t turned_numbers(const Job* job) noexcept nogil:
    return (min(job.group, job.rows) + 7) * job.row_step


cdef void load_columns(
    const Job* job, Storage storage, const char* data, Py_ssize_t unit, real* rows
) noexcept nogil:
    cdef real staged[TURN * LANES]
    cdef Py_ssize_t C = job.num_classes, inner = job.inner, step = job.row_step
    cdef Py_ssize_t turns = (C + TURN - 1) // TURN
    cdef Py_ssize_t first = unit * job.group, n = rows_in_unit(job, unit)
    cdef Py_ssize_t row = 0, width, turn, c, j, o, i, lane, start, apart, size = itemsize(storage)
    cdef const real* source
    cdef const real* line
    while row < n:
        o, i = (first + row) // inner, (first + row) % inner
        width = min(n - row, inner - i)
        for turn in range(turns):
            c = turn * TURN
            start = (o * C + c) * inner + i
            for j in range(TURN):
                fetch(data + (start + (j + 2 * TURN) * inner) * size, width * size)
            source, apart = (<const real*>data) + start, inner
            if size == 2 or start + (TURN - 1) * inner + width + 7 > job.rows * C:
                source, apart = staged, LANES
                for j in range(min(C - c, <Py_ssize_t>TURN)):
                    line = load_block(storage, data, start + j * inner, width, staged + j * LANES)
                    if line != staged + j * LANES:
                        memcpy(staged + j * LANES, line, width * sizeof(real))
            for lane in range(0, width, 8):
                for j in range(0, TURN, 8):
                    transpose(source + j * apart + lane, apart,
                              rows + (row + lane) * step + c + j, step)
        row += width


cdef void store_columns(
    const Job* job, Py_ssize_t unit, const real* rows, Carry* carry
) noexcept nogil:
    cdef real staged[TURN * LANES]
    cdef Py_ssize_t C = job.num_classes, inner = job.inner, step = job.row_step
    cdef Py_ssize_t turns = (C + TURN - 1) // TURN
    cdef Py_ssize_t first = unit * job.group, n = rows_in_unit(job, unit)
    cdef Py_ssize_t row = 0, width, turn, c, j, o, i, lane
    while row < n:
        o, i = (first + row) // inner, (first + row) % inner
        width = min(n - row, inner - i)
        for turn in range(turns):
            c = turn * TURN
            for lane in range(0, width, 8):
                for j in range(0, TURN, 8):
                    transpose(rows + (row + lane) * step + c + j, step,
                              staged + j * LANES + lane, LANES)
            for j in range(min(C - c, <Py_ssize_t>TURN)):
                store_run(job, carry + c + j, (o * C + c + j) * inner + i, width,
                          staged + j * LANES)
        row += width


cdef Job job_of_rows(const Job* job, Py_ssize_t unit, real* rows, real* other) noexcept nogil:
    """The job of the rows that a unit of columns was turned into."""
    cdef Job part = job[0]
    cdef Py_ssize_t first = unit * job.group
    part.rows, part.inner = rows_in_unit(job, unit), 1
    part.group, part.stream = job.summed, False
    part.storage = part.other_storage = FLOAT32 if real is float else FLOAT64
    part.logits = <const char*>rows
    if job.out != NULL:
        part.out = <char*>rows
    if job.other != NULL:
        part.other = <const char*>other
    if job.target != NULL:
        part.target += first << (job.target_kind & 3)
    if job.sample_weight != NULL:
        part.sample_weight += first
    if job.losses != NULL:
        part.losses += first * <Py_ssize_t>sizeof(real)
    part.partial += first // job.summed
    return part


cdef void column_unit(
    const Job* job, Operation operation, Py_ssize_t unit, real* scratch
) noexcept nogil:
    cdef real* rows = turned_of(job, scratch)
    cdef real* other = rows + turned_numbers(job)
    cdef Job part = job_of_rows(job, unit, rows, other)
    cdef Py_ssize_t i
    load_columns(job, job.storage, job.logits, unit, rows)
    if job.other != NULL:
        load_columns(job, job.other_storage, job.other, unit, other)
    for i in range((part.rows + part.group - 1) // part.group):
        row_unit(&part, operation, i, scratch)
    if operation == LOGSUMEXP:
        store(job, unit * job.group, part.rows, rows)
    elif job.out != NULL:
        store_columns(job, unit, rows, carries_of(job, scratch))


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
            store(job, place, 1, scratch)
    if operation == NLL:
        job.partial[unit] = deliver_losses(job, unit * job.group, n, r.loss)


# ---------------------------------------------------------------------------------------------
# Drivers
# ---------------------------------------------------------------------------------------------

cdef inline void run_unit(
    const Job* job, Operation operation, Py_ssize_t unit, real* scratch
) noexcept nogil:
    if operation == NLL or operation == NLL_BACKWARD:
        nll_unit(job, operation, unit, scratch)
    elif job.layout == TILES:
        tile_unit(job, operation, unit, scratch)
    elif job.layout == COLUMNS:
        column_unit(job, operation, unit, scratch)
    else:
        row_unit(job, operation, unit, scratch)


cdef inline Carry* carries_of(const Job* job, real* scratch) noexcept nogil:
    return <Carry*>(scratch + job.numbers)


cdef inline bint carries(const Job* job) noexcept nogil:
    return job.stream and job.inner > 1


cdef inline void begin_carries(const Job* job, real* scratch) noexcept nogil:
    if carries(job):
        memset(carries_of(job, scratch), 0, job.num_classes * sizeof(Carry))


cdef inline void flush_carries(const Job* job, real* scratch) noexcept nogil:
    cdef Carry* carry
    cdef Py_ssize_t c
    if carries(job):
        for c in range(job.num_classes):
            carry = carries_of(job, scratch) + c
            if carry.end != NULL:
                flush(carry)


cdef inline void run_units(
    const Job* job, Operation operation, Py_ssize_t first, Py_ssize_t last, real* scratch
) noexcept nogil:
    cdef Py_ssize_t unit
    begin_carries(job, scratch)
    for unit in range(first, last):
        run_unit(job, operation, unit, scratch)
    flush_carries(job, scratch)


cdef void run_share(
    const Job* job, Operation operation, Py_ssize_t units, int thread, int num_threads,
    char* scratch, Py_ssize_t scratch_bytes,
) noexcept nogil:
    """One thread's contiguous share of the units."""
    cdef Py_ssize_t first = units * thread // num_threads
    cdef Py_ssize_t last = units * (thread + 1) // num_threads
    cdef unsigned int mode = fl_enter_ieee_mode()
    scratch += thread * scratch_bytes
    if job.storage == FLOAT64:
        run_units(job, operation, first, last, <double*>scratch)
    else:
        run_units(job, operation, first, last, <float*>scratch)
    if job.stream:
        fl_end_stream()
    fl_leave_ieee_mode(mode)


cdef void run_shares(
    const Job* job, Operation operation, Py_ssize_t units, int threads, char* scratch,
    Py_ssize_t scratch_bytes,
) noexcept:
    cdef int thread
    if threads == 1:  # no parallel region: a forked child must not enter one
        with nogil:
            run_share(job, operation, units, 0, 1, scratch, scratch_bytes)
        return
    for thread in prange(threads, nogil=True, schedule="static", chunksize=1, num_threads=threads):
        run_share(job, operation, units, thread, threads, scratch, scratch_bytes)


cdef inline Py_ssize_t round_up(Py_ssize_t n) noexcept:
    """To whole cache lines."""
    return (n + LINE - 1) // LINE * LINE


cdef Py_ssize_t plan(Job* job, Operation operation) noexcept:
    """Choose rows or tiles and the size of a unit; return the bytes of scratch a thread needs."""
    cdef Py_ssize_t C = job.num_classes, tiles, columns, size
    job.group = job.summed = job.step = LANES
    job.row_step = C
    job.layout = TILES if C <= SHORT_ROW else ROWS if job.inner == 1 else COLUMNS
    if operation == NLL or operation == NLL_BACKWARD:
        job.numbers = 1
    elif job.layout == TILES:
        tiles = min(WIDE // (C * LANES), job.rows // (LANES * FEWEST_UNITS))
        if job.inner > 1 and tiles > 1:
            job.group = LANES * min(tiles, <Py_ssize_t>MOST_TILES)
            job.step = job.group + LINE // 4  # else classes fall on the same sets of the cache
        job.numbers = tile_numbers(job)
    else:
        while job.summed > 1 and job.summed * C > GROUP:
            job.summed //= 2
        job.group = job.summed
        job.numbers = row_numbers(job)
        if job.layout == COLUMNS:
            columns = <Py_ssize_t>TURNED // C // TURN * TURN
            job.group = min(max(columns, <Py_ssize_t>TURN), <Py_ssize_t>LANES)
            # Room for a last chunk, and an odd number of lines: else rows fall on the same sets.
            job.row_step = (C + CHUNK - 1) // CHUNK * CHUNK + TURN
            job.numbers += turned_numbers(job) * (1 if job.other == NULL else 2)
    # In place, what is written is in the cache already.
    job.stream = (
        operation < NLL and operation != LOGSUMEXP and job.out != NULL and job.out != job.logits
        and job.rows * C * itemsize(job.storage) >= STREAM_BYTES
    )
    size = job.numbers * (8 if job.storage == FLOAT64 else 4)
    if carries(job):
        size += C * <Py_ssize_t>sizeof(Carry)
    return round_up(size)  # threads do not share a cache line


cdef double run(Job* job, Operation operation, int num_threads) except? -1:
    """Run an operation on all its units; return the sum of the row losses, where it has any."""
    cdef Py_ssize_t scratch_bytes = plan(job, operation)
    cdef Py_ssize_t units = (job.rows + job.group - 1) // job.group
    cdef int threads = <int>min(<Py_ssize_t>num_threads, units)
    cdef cnp.ndarray memory, partial
    cdef char* scratch
    cdef char* grad
    cdef double total
    if units == 0:
        return 0.0
    if operation >= CROSS_ENTROPY and job.scale == 0.0 and job.out != NULL:
        # No row counts, not even one that holds a NaN.
        grad, job.out = job.out, NULL
        total = run(job, operation, num_threads)
        clear(grad, job.rows * job.num_classes * itemsize(job.storage), num_threads)
        return total
    # All memory is taken before anything is written: where there is none, MemoryError says so.
    memory = np.empty(threads * scratch_bytes + LINE, np.uint8)
    partial = np.empty((job.rows + job.summed - 1) // job.summed)
    scratch = <char*>round_up(<Py_ssize_t>cnp.PyArray_BYTES(memory))
    job.partial = <double*>cnp.PyArray_DATA(partial)
    run_shares(job, operation, units, threads, scratch, scratch_bytes)
    if operation == NLL and job.out != NULL:  # which may be log_probs: not before these were read
        clear(job.out, job.rows * job.num_classes * itemsize(job.storage), num_threads)
        run_shares(job, NLL_BACKWARD, units, threads, scratch, scratch_bytes)
    if operation < CROSS_ENTROPY:
        return 0.0
    if partial.size == 1:
        return job.partial[0]
    # NumPy adds pairwise, in an order that depends on the number of units alone. Out is written: a
    # sum of losses that is infinite or NaN must not become an error now.
    with np.errstate(all="ignore"):
        return partial.sum()


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


cdef void add_target(Job* job, cnp.ndarray target) except *:
    cdef Py_ssize_t size = target.itemsize
    cdef int kind = 0 if size == 1 else 1 if size == 2 else 2 if size == 4 else 3
    job.target = cnp.PyArray_BYTES(target)
    job.target_kind = kind if cnp.PyArray_ISSIGNED(target) else kind + 4


cdef void add_labels(Job* job, labels, options) except *:
    cdef cnp.ndarray target, weight, sample_weight
    target, weight, sample_weight = labels
    job.ignore_index, job.smoothing, job.z_loss = options
    if cnp.PyArray_ISINTEGER(target):
        add_target(job, target)
    else:
        job.other = cnp.PyArray_BYTES(target)
        job.other_storage = storage_of(target)
    job.weight_sum = job.num_classes
    if weight is not None:
        job.weight = <const double*>cnp.PyArray_DATA(weight)
        job.weight_sum = weight.sum()
    if sample_weight is not None:
        job.sample_weight = <const double*>cnp.PyArray_DATA(sample_weight)


cdef cnp.ndarray add_relative_weight(Job* job, cnp.ndarray weight):
    """Return what must stay alive as long as the job."""
    cdef cnp.ndarray relative
    job.largest_weight = 1.0
    if weight is None:
        return None
    job.largest_weight = np.abs(weight).max()
    relative = weight / (job.largest_weight or 1.0)
    if job.storage != FLOAT64:
        relative = relative.astype(np.float32)
    job.relative_weight = cnp.PyArray_DATA(relative)
    return relative


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
    job.other_storage = job.storage
    run(&job, SOFTMAX_BACKWARD, num_threads)


def log_softmax_backward(
    cnp.ndarray grad_output not None, cnp.ndarray log_probs not None, cnp.ndarray out not None,
    int num_threads,
):
    cdef Job job = job_of(log_probs, out)
    job.other = cnp.PyArray_BYTES(grad_output)
    job.other_storage = job.storage
    run(&job, LOG_SOFTMAX_BACKWARD, num_threads)


def cross_entropy(
    cnp.ndarray logits not None, labels not None, options not None, double scale,
    cnp.ndarray losses, cnp.ndarray grad, int num_threads,
):
    cdef Job job = job_of(logits, grad)
    add_labels(&job, labels, options)
    alive = add_relative_weight(&job, labels[1])
    job.scale = scale
    job.losses = NULL if losses is None else cnp.PyArray_BYTES(losses)
    return run(&job, CROSS_ENTROPY if job.other == NULL else CROSS_ENTROPY_SOFT, num_threads)


def nll_loss(
    cnp.ndarray log_probs not None, labels not None, options not None, double scale,
    cnp.ndarray losses, cnp.ndarray grad, int num_threads,
):
    cdef Job job = job_of(log_probs, grad)
    add_labels(&job, labels, options)
    job.scale = scale
    job.losses = NULL if losses is None else cnp.PyArray_BYTES(losses)
    return run(&job, NLL, num_threads)


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
    labels not None, options not None, Py_ssize_t num_classes, int num_threads
):
    cdef Job job
    cdef Py_ssize_t block, blocks, bad
    cdef cnp.ndarray partial, found
    cdef double* sums
    cdef Py_ssize_t* bads
    memset(&job, 0, sizeof(job))
    job.rows, job.num_classes = labels[0].size, num_classes
    add_labels(&job, labels, options)
    blocks = (job.rows + CHECK_BLOCK - 1) // CHECK_BLOCK
    if blocks == 1:
        bad = check_block(&job, 0, &job.scale)
        return TargetCheck(bad, job.scale)
    partial, found = np.empty(blocks), np.empty(blocks, np.intp)
    sums, bads = <double*>cnp.PyArray_DATA(partial), <Py_ssize_t*>cnp.PyArray_DATA(found)
    if num_threads == 1:
        with nogil:
            for block in range(blocks):
                bads[block] = check_block(&job, block, &sums[block])
    else:
        for block in prange(blocks, nogil=True, schedule="static", num_threads=num_threads):
            bads[block] = check_block(&job, block, &sums[block])
    for block in range(blocks):
        if bads[block] >= 0:
            return TargetCheck(bads[block], 0.0)
    return TargetCheck(-1, float(partial.sum()))


cdef Py_ssize_t check_block(const Job* job, Py_ssize_t block, double* total) noexcept nogil:
    """The first bad target of a block, or -1; then total receives the sum of the weights."""
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
    total[0] = fold_lanes(lane)
    return -1


def openmp_version():
    """The OpenMP standard's date, as the compiler states it; 0 in a serial build."""
    return FL_OPENMP


def openmp_max_threads():
    """How many threads OpenMP would use by itself, here and now; a serial build has no opinion."""
    return fl_max_threads()


def most_threads():
    """How many threads a call may have, however many it asks for."""
    return fl_thread_limit()


def cpu_runs(int level):
    """Whether this CPU and system run x86-64-v3 (level 3) or -v4 (level 4) code."""
    return bool(fl_cpu_runs(level))
