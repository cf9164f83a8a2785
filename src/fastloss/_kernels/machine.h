/* What only C can say: threads, bits, fma, the float mode, memory past the caches, shuffles. */

#ifndef FASTLOSS_MACHINE_H
#define FASTLOSS_MACHINE_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

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

static inline int32_t fl_bits_f(float x) {
    int32_t b;
    memcpy(&b, &x, 4);
    return b;
}
static inline float fl_from_bits_f(int32_t b) {
    float x;
    memcpy(&x, &b, 4);
    return x;
}
static inline int64_t fl_bits_d(double x) {
    int64_t b;
    memcpy(&b, &x, 8);
    return b;
}
static inline double fl_from_bits_d(int64_t b) {
    double x;
    memcpy(&x, &b, 8);
    return x;
}

/* Where fma is an instruction; elsewhere it would be a slow call. */
#if defined(__FMA__) || defined(__FP_FAST_FMA)
static inline float fl_fma_f(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
static inline double fl_fma_d(double a, double b, double c) { return __builtin_fma(a, b, c); }

/* c - a b without a subnormal a b on the way, which would be slow. */
static inline float fl_subtract_product_f(float a, float b, float c) { return fl_fma_f(-a, b, c); }

/* What exp takes for 0, where products of such numbers are computed and would be slow. */
static inline float fl_no_dust_f(float x) { return x; }
static inline double fl_no_dust_d(double x) { return x; }
#else
static inline float fl_fma_f(float a, float b, float c) { return a * b + c; }
static inline double fl_fma_d(double a, double b, double c) { return a * b + c; }

static inline float fl_subtract_product_f(float a, float b, float c) { return c - (double)a * b; }

static inline float fl_no_dust_f(float x) { /* in integers, which are never slow */
    int32_t b = fl_bits_f(x);
    return fl_from_bits_f((b & 0x7fffffff) < 0x0da24260 ? 0 : b); /* 1e-30 */
}
static inline double fl_no_dust_d(double x) {
    int64_t b = fl_bits_d(x); /* in 32-bit halves: older processors compare no more at a time */
    return fl_from_bits_d((int32_t)((uint64_t)b >> 32 & 0x7fffffff) < 0x03d00000 ? 0 : b);
}
#endif
static inline double fl_subtract_product_d(double a, double b, double c) {
    return fl_fma_d(-a, b, c);
}

/* The larger and the smaller of two numbers, NaN where b is: one instruction. */
static inline float fl_larger_f(float a, float b) { return a > b ? a : b; }
static inline double fl_larger_d(double a, double b) { return a > b ? a : b; }
static inline float fl_smaller_f(float a, float b) { return a < b ? a : b; }
static inline double fl_smaller_d(double a, double b) { return a < b ? a : b; }

/* A constant that GCC takes for a variable: of one it would not know that both are the same number,
   and compare and blend. */
#if defined(__GNUC__) && defined(__SSE2__)
static inline float fl_bound_f(float x) { __asm__("" : "+x"(x)); return x; }
static inline double fl_bound_d(double x) { __asm__("" : "+x"(x)); return x; }
#else
static inline float fl_bound_f(float x) { return x; }
static inline double fl_bound_d(double x) { return x; }
#endif

/* Results do not depend on a flush of denormals, or a rounding mode, that somebody set: the mode in
   which to compute, set in place of the caller's, which is returned. */
#define FL_IEEE_MODE 0x1f80
static inline unsigned fl_set_float_mode(unsigned mode) {
#if defined(__SSE2__)
    unsigned before = _mm_getcsr();
    _mm_setcsr(mode);
    return before;
#else
    return mode;
#endif
}

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
    (void)from;
    (void)to;
    (void)n;
    return 0;
}
static inline ptrdiff_t fl_floats_to_halves(const float* from, uint16_t* to, ptrdiff_t n) {
    (void)from;
    (void)to;
    (void)n;
    return 0;
}
#endif

/* A copy that goes past the caches: a large result is not read into them first. By itself: among
   much else the loop would want for registers. */
#if defined(__GNUC__)
__attribute__((noinline))
#endif
static void fl_stream(char* to, const char* from, size_t size) {
#if defined(__SSE2__)
    size_t head = (size_t)(-(uintptr_t)to & 63);
    if (size >= head + 64) {
        memcpy(to, from, head);
        to += head;
        from += head;
        size -= head;
        for (; size >= 64; to += 64, from += 64, size -= 64) {
#if defined(__AVX512F__)
            _mm512_stream_si512((__m512i*)to, _mm512_loadu_si512(from));
#elif defined(__AVX__)
            for (int i = 0; i < 64; i += 32)
                _mm256_stream_si256((__m256i*)(to + i),
                                    _mm256_loadu_si256((const __m256i*)(from + i)));
#else
            for (int i = 0; i < 64; i += 16)
                _mm_stream_si128((__m128i*)(to + i), _mm_loadu_si128((const __m128i*)(from + i)));
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

/* Vectors that the compiler knows by itself, where it knows how to shuffle them. */
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
        wide s = (__builtin_convertvector(a[0], wide) + __builtin_convertvector(a[1], wide)) + \
                 (__builtin_convertvector(a[2], wide) + __builtin_convertvector(a[3], wide)); \
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

/* Eight runs of eight numbers, transposed: to[i][j] = from[j][i]. */
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

/* The sums of eight rows of n numbers that follow each other: of each the numbers at distance 8,
   the last of which goes to the eighth sum, then these eight, by halves. Reads up to seven numbers
   before the rows. */
#if defined(FL_SHUFFLE)
#define FL_SUM_ROWS(NAME, REAL, INT) \
    typedef REAL NAME##_v __attribute__((vector_size(8 * sizeof(REAL)))); \
    typedef INT NAME##_i __attribute__((vector_size(8 * sizeof(REAL)))); \
    static inline void NAME(const REAL* from, ptrdiff_t n, REAL* to) { \
        static const INT keep[16] = {0, 0, 0, 0, 0, 0, 0, 0, -1, -1, -1, -1, -1, -1, -1, -1}; \
        NAME##_v a[8], b; \
        NAME##_i first, kept; \
        ptrdiff_t c = (n - 1) % 8 + 1; \
        memcpy(&kept, keep + c, sizeof kept); \
        for (int i = 0; i < 8; i++) { \
            memcpy(&first, from + i * n + c - 8, sizeof first); \
            a[i] = (NAME##_v){0} + (NAME##_v)(first & kept); /* never -0 */ \
        } \
        for (; c < n; c += 8) \
            for (int i = 0; i < 8; i++) { \
                memcpy(&b, from + i * n + c, sizeof b); \
                a[i] += b; \
            } \
        for (int i = 0; i < 4; i++) \
            a[i] = FL_SHUFFLE(a[i], a[i + 4], 0, 1, 2, 3, 8, 9, 10, 11) + \
                   FL_SHUFFLE(a[i], a[i + 4], 4, 5, 6, 7, 12, 13, 14, 15); \
        for (int i = 0; i < 2; i++) \
            a[i] = FL_SHUFFLE(a[2 * i], a[2 * i + 1], 0, 1, 8, 9, 4, 5, 12, 13) + \
                   FL_SHUFFLE(a[2 * i], a[2 * i + 1], 2, 3, 10, 11, 6, 7, 14, 15); \
        a[0] = FL_SHUFFLE(a[0], a[1], 0, 2, 8, 10, 4, 6, 12, 14) + \
               FL_SHUFFLE(a[0], a[1], 1, 3, 9, 11, 5, 7, 13, 15); \
        memcpy(to, a, sizeof a[0]); \
    }
#else
#define FL_SUM_ROWS(NAME, REAL, INT) \
    static inline void NAME(const REAL* from, ptrdiff_t n, REAL* to) { \
        for (int i = 0; i < 8; i++) { \
            REAL s[8] = {0}; \
            for (ptrdiff_t c = 0; c < n; c++) s[(size_t)(c - n) % 8] += from[i * n + c]; \
            for (int half = 4; half > 0; half /= 2) \
                for (int j = 0; j < half; j++) s[j] += s[j + half]; \
            to[i] = s[0]; \
        } \
    }
#endif
FL_SUM_ROWS(fl_sum_rows_f, float, int32_t)
FL_SUM_ROWS(fl_sum_rows_d, double, int64_t)

/* Rows of n numbers that follow each other, in one run: times a factor each, or all replaced by it,
   or times a factor, less a shift times weights; owner says whose each number of FL_ROWS rows is,
   and there are as many weights. */
#define FL_ROWS 16
#define FL_EACH_ROW(NAME, REAL, ROWS, STEP) \
    static inline void NAME(REAL* rows, ptrdiff_t n, const REAL* factor, const int32_t* owner) { \
        for (int i = 0; i < FL_ROWS; i += ROWS, rows += ROWS * n, factor += ROWS) \
            for (ptrdiff_t c = 0; c < n; c++) { STEP; } \
    }
#define FL_SHIFT_ROWS(NAME, REAL, ROWS, STEP) \
    static inline void NAME(REAL* rows, ptrdiff_t n, const REAL* factor, const REAL* shift, \
                            const REAL* weight, const int32_t* owner) { \
        for (int i = 0; i < FL_ROWS; i += ROWS, rows += ROWS * n, factor += ROWS, shift += ROWS) \
            for (ptrdiff_t c = 0; c < n; c++) { STEP; } \
    }
#define FL_OF_ROWS(TYPE, REAL, ROWS, LOAD, MULTIPLY, SUBTRACT, STORE, FACTOR) \
    FL_EACH_ROW(fl_scale_rows_##TYPE, REAL, ROWS, \
                STORE(rows + c * ROWS, MULTIPLY(LOAD(rows + c * ROWS), FACTOR(factor)))) \
    FL_EACH_ROW(fl_spread_rows_##TYPE, REAL, ROWS, STORE(rows + c * ROWS, FACTOR(factor))) \
    FL_SHIFT_ROWS(fl_shift_rows_##TYPE, REAL, ROWS, \
                  STORE(rows + c * ROWS, \
                        SUBTRACT(MULTIPLY(LOAD(rows + c * ROWS), FACTOR(factor)), \
                                 MULTIPLY(LOAD(weight + c * ROWS), FACTOR(shift)))))
#define FL_ONE_ROW(TYPE, REAL) \
    FL_EACH_ROW(fl_scale_rows_##TYPE, REAL, 1, rows[c] *= factor[0]) \
    FL_EACH_ROW(fl_spread_rows_##TYPE, REAL, 1, rows[c] = factor[0]) \
    FL_SHIFT_ROWS(fl_shift_rows_##TYPE, REAL, 1, \
                  rows[c] = rows[c] * factor[0] - weight[c] * shift[0])
#if defined(__AVX512F__)
#define FL_OWN_F(F) \
    _mm512_permutexvar_ps(_mm512_loadu_si512(owner + c * 16), _mm512_loadu_ps(F))
#define FL_OWN_D(F) \
    _mm512_permutexvar_pd( \
        _mm512_cvtepi32_epi64(_mm256_loadu_si256((const __m256i*)(owner + c * 8))), \
        _mm512_loadu_pd(F))
FL_OF_ROWS(f, float, 16, _mm512_loadu_ps, _mm512_mul_ps, _mm512_sub_ps, _mm512_storeu_ps, FL_OWN_F)
FL_OF_ROWS(d, double, 8, _mm512_loadu_pd, _mm512_mul_pd, _mm512_sub_pd, _mm512_storeu_pd, FL_OWN_D)
#else
#if defined(__AVX2__)
#define FL_OWN_F(F) \
    _mm256_permutevar8x32_ps(_mm256_loadu_ps(F), \
                             _mm256_loadu_si256((const __m256i*)(owner + c * 8)))
FL_OF_ROWS(f, float, 8, _mm256_loadu_ps, _mm256_mul_ps, _mm256_sub_ps, _mm256_storeu_ps, FL_OWN_F)
#else
FL_ONE_ROW(f, float)
#endif
FL_ONE_ROW(d, double)
#endif

static int fl_cpu_runs(int level) {
#if (defined(__x86_64__) || defined(__amd64__)) && defined(__GNUC__)
    __builtin_cpu_init();
    int v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi") &&
             __builtin_cpu_supports("bmi2");
    int v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512vl");
    return level == 3 ? v3 : v4;
#else
    (void)level;
    return 0;
#endif
}

#endif
