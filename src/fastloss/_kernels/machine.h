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

/* The sum of 32 numbers, in float64 and in a fixed order. */
#if defined(FL_SHUFFLE)
#define FL_FOLD(SUM, REAL) \
    static inline double SUM(const REAL* lane) { \
        typedef REAL narrow __attribute__((vector_size(8 * sizeof(REAL)))); \
        typedef double wide __attribute__((vector_size(64))); \
        narrow a[4]; \
        memcpy(a, lane, sizeof a); \
        wide s = (__builtin_convertvector(a[0], wide) + __builtin_convertvector(a[1], wide)) + \
                 (__builtin_convertvector(a[2], wide) + __builtin_convertvector(a[3], wide)); \
        s += FL_SHUFFLE(s, s, 4, 5, 6, 7, 0, 1, 2, 3); \
        s += FL_SHUFFLE(s, s, 2, 3, 0, 1, 6, 7, 4, 5); \
        return s[0] + s[1]; \
    }
#else
#define FL_FOLD(SUM, REAL) \
    static inline double SUM(const REAL* lane) { \
        double s[8]; \
        for (int j = 0; j < 8; j++) \
            s[j] = ((double)lane[j] + lane[j + 8]) + ((double)lane[j + 16] + lane[j + 24]); \
        for (int half = 4; half > 0; half /= 2) \
            for (int j = 0; j < half; j++) s[j] += s[j + half]; \
        return s[0]; \
    }
#endif
FL_FOLD(fl_sum_f, float)
FL_FOLD(fl_sum_d, double)

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

/* Maxima (NaN left aside), and sums without their largest term, s, that go with this, t, as a pair:
   others are added by pairs, too. No term is negative; NaN gets into s. Of 32 numbers or pairs, and
   of eight rows as above, by halves. */
#define FL_HALVES(STEP, n) \
    for (int half = (n) / 2; half > 0; half /= 2) \
        for (int j = 0; j < half; j++) STEP
#define FL_RAISE(m, x) (m) = (x) > (m) ? (x) : (m)
#define FL_ADD_PAIR(s, t, other_s, other_t) \
    do { \
        (s) = ((s) + (other_s)) + ((t) < (other_t) ? (t) : (other_t)); \
        FL_RAISE(t, other_t); \
    } while (0)
#define FL_TOP_LOOPS(TYPE, REAL) \
    static inline REAL fl_max_##TYPE(const REAL* lane) { \
        REAL m[32]; \
        memcpy(m, lane, sizeof m); \
        FL_HALVES(FL_RAISE(m[j], m[j + half]), 32); \
        return m[0]; \
    } \
    static inline REAL fl_fold_top_##TYPE(const REAL* others, const REAL* tops, REAL* top) { \
        REAL s[32], t[32]; \
        memcpy(s, others, sizeof s); \
        memcpy(t, tops, sizeof t); \
        FL_HALVES(FL_ADD_PAIR(s[j], t[j], s[j + half], t[j + half]), 32); \
        *top = t[0]; \
        return s[0]; \
    } \
    static inline void fl_top_rows_##TYPE(const REAL* x, const REAL* e, ptrdiff_t n, \
                                          REAL* maximum, REAL* others, REAL* top) { \
        for (int i = 0; i < 8; i++, x += n, e += n) { \
            REAL m[8], s[8] = {0}, t[8] = {0}; \
            ptrdiff_t c = (n - 1) % 8 + 1; \
            for (int j = 0; j < 8; j++) m[j] = -(REAL)INFINITY; \
            for (ptrdiff_t j = 8 - c; j < 8; j++) { \
                FL_RAISE(m[j], x[j + c - 8]); \
                FL_ADD_PAIR(s[j], t[j], 0, e[j + c - 8]); \
            } \
            for (; c < n; c += 8) { \
                for (int j = 0; j < 8; j++) FL_RAISE(m[j], x[c + j]); \
                for (int j = 0; j < 8; j++) FL_ADD_PAIR(s[j], t[j], 0, e[c + j]); \
            } \
            FL_HALVES(FL_RAISE(m[j], m[j + half]), 8); \
            FL_HALVES(FL_ADD_PAIR(s[j], t[j], s[j + half], t[j + half]), 8); \
            maximum[i] = m[0]; \
            others[i] = s[0]; \
            top[i] = t[0]; \
        } \
    }
/* As these loops, where vectors of eight are registers. Of a NaN e, MIN(t, e) is that. */
#define FL_ADD_PAIRS(V, MIN, MAX, s, t, other_s, other_t) \
    do { \
        V added = (other_s), tried = (other_t); \
        (s) = ((s) + added) + MIN(t, tried); \
        (t) = MAX(tried, t); \
    } while (0)
#define FL_ADD_SHUFFLED(V, MIN, MAX, ...) \
    FL_ADD_PAIRS(V, MIN, MAX, s[0], t[0], FL_SHUFFLE(s[0], s[0], __VA_ARGS__), \
                 FL_SHUFFLE(t[0], t[0], __VA_ARGS__))
#define FL_JOIN_MAXIMA(V, MIN, MAX, i, j, k, LOW, HIGH) \
    t[i] = MAX(FL_SHUFFLE(t[j], t[k], HIGH), FL_SHUFFLE(t[j], t[k], LOW))
#define FL_JOIN_PAIRS(V, MIN, MAX, i, j, k, LOW, HIGH) \
    do { \
        V low = FL_SHUFFLE(s[j], s[k], LOW), top_low = FL_SHUFFLE(t[j], t[k], LOW); \
        FL_ADD_PAIRS(V, MIN, MAX, low, top_low, FL_SHUFFLE(s[j], s[k], HIGH), \
                     FL_SHUFFLE(t[j], t[k], HIGH)); \
        s[i] = low; \
        t[i] = top_low; \
    } while (0)
#define FL_LOW_4 0, 1, 2, 3, 8, 9, 10, 11
#define FL_HIGH_4 4, 5, 6, 7, 12, 13, 14, 15
#define FL_LOW_2 0, 1, 8, 9, 4, 5, 12, 13
#define FL_HIGH_2 2, 3, 10, 11, 6, 7, 14, 15
#define FL_LOW_1 0, 2, 8, 10, 4, 6, 12, 14
#define FL_HIGH_1 1, 3, 9, 11, 5, 7, 13, 15
#define FL_EIGHT_ROWS(V, MIN, MAX, from, nothing, ADD, JOIN) \
    for (int i = 0; i < 8; i++) { \
        memcpy(&first, from + i * n + start - 8, sizeof first); \
        b = (V)((first & kept) | (~kept & (bits)nothing)); \
        s[i] = zero; \
        t[i] = nothing; \
        ADD; \
    } \
    for (ptrdiff_t c = start; c < n; c += 8) \
        for (int i = 0; i < 8; i++) { \
            memcpy(&b, from + i * n + c, sizeof b); \
            ADD; \
        } \
    for (int i = 0; i < 4; i++) JOIN(V, MIN, MAX, i, i, i + 4, FL_LOW_4, FL_HIGH_4); \
    for (int i = 0; i < 2; i++) JOIN(V, MIN, MAX, i, 2 * i, 2 * i + 1, FL_LOW_2, FL_HIGH_2); \
    JOIN(V, MIN, MAX, 0, 0, 1, FL_LOW_1, FL_HIGH_1)
#define FL_TOP_VECTORS(TYPE, REAL, INT, V, MIN, MAX) \
    static inline REAL fl_max_##TYPE(const REAL* lane) { \
        V a[4]; \
        memcpy(a, lane, sizeof a); \
        a[0] = MAX(MAX(a[0], a[2]), MAX(a[1], a[3])); \
        a[0] = MAX(a[0], FL_SHUFFLE(a[0], a[0], 4, 5, 6, 7, 0, 1, 2, 3)); \
        a[0] = MAX(a[0], FL_SHUFFLE(a[0], a[0], 2, 3, 0, 1, 6, 7, 4, 5)); \
        return a[0][0] > a[0][1] ? a[0][0] : a[0][1]; \
    } \
    static inline REAL fl_fold_top_##TYPE(const REAL* others, const REAL* tops, REAL* top) { \
        V s[4], t[4]; \
        memcpy(s, others, sizeof s); \
        memcpy(t, tops, sizeof t); \
        FL_ADD_PAIRS(V, MIN, MAX, s[0], t[0], s[2], t[2]); \
        FL_ADD_PAIRS(V, MIN, MAX, s[1], t[1], s[3], t[3]); \
        FL_ADD_PAIRS(V, MIN, MAX, s[0], t[0], s[1], t[1]); \
        FL_ADD_SHUFFLED(V, MIN, MAX, 4, 5, 6, 7, 0, 1, 2, 3); \
        FL_ADD_SHUFFLED(V, MIN, MAX, 2, 3, 0, 1, 6, 7, 4, 5); \
        FL_ADD_SHUFFLED(V, MIN, MAX, 1, 0, 3, 2, 5, 4, 7, 6); \
        *top = t[0][0]; \
        return s[0][0]; \
    } \
    static inline void fl_top_rows_##TYPE(const REAL* x, const REAL* e, ptrdiff_t n, \
                                          REAL* maximum, REAL* others, REAL* top) { \
        typedef INT bits __attribute__((vector_size(8 * sizeof(INT)))); \
        static const INT keep[16] = {0, 0, 0, 0, 0, 0, 0, 0, -1, -1, -1, -1, -1, -1, -1, -1}; \
        const V zero = {0}, lowest = zero - (REAL)INFINITY; \
        V s[8], t[8], b; \
        bits first, kept; \
        ptrdiff_t start = (n - 1) % 8 + 1; \
        memcpy(&kept, keep + start, sizeof kept); \
        FL_EIGHT_ROWS(V, MIN, MAX, x, lowest, t[i] = MAX(b, t[i]), FL_JOIN_MAXIMA); \
        memcpy(maximum, t, sizeof t[0]); \
        FL_EIGHT_ROWS(V, MIN, MAX, e, zero, (s[i] += MIN(t[i], b), t[i] = MAX(b, t[i])), \
                      FL_JOIN_PAIRS); \
        memcpy(others, s, sizeof s[0]); \
        memcpy(top, t, sizeof t[0]); \
    }
#if defined(FL_SHUFFLE) && defined(__AVX__)
#define FL_TOP_f 1 /* whether fl_top_rows_f is quick */
FL_TOP_VECTORS(f, float, int32_t, __m256, _mm256_min_ps, _mm256_max_ps)
#else
#define FL_TOP_f 0
FL_TOP_LOOPS(f, float)
#endif
#if defined(FL_SHUFFLE) && defined(__AVX512F__)
#define FL_TOP_d 1
FL_TOP_VECTORS(d, double, int64_t, __m512d, _mm512_min_pd, _mm512_max_pd)
#else
#define FL_TOP_d 0
FL_TOP_LOOPS(d, double)
#endif

/* Rows of n numbers that follow each other, in one run: times a factor each, all replaced by it, less
   two such, or times a factor and less a share of the weights; owner says whose each number of
   FL_ROWS rows is, and there are as many weights. */
#define FL_ROWS 16
#define FL_EACH_ROW(ROWS, STEP) \
    for (int i = 0; i < FL_ROWS; i += ROWS) \
        for (ptrdiff_t c = i * n; c < (i + ROWS) * n; c += ROWS) STEP;
#define FL_OF_ROWS(TYPE, REAL, ROWS, LOAD, MULTIPLY, SUBTRACT, STORE, OF) \
    static inline void fl_scale_rows_##TYPE(REAL* rows, ptrdiff_t n, const REAL* factor, \
                                            const int32_t* owner) { \
        FL_EACH_ROW(ROWS, STORE(rows + c, MULTIPLY(LOAD(rows + c), OF(factor)))) \
    } \
    static inline void fl_spread_rows_##TYPE(REAL* rows, ptrdiff_t n, const REAL* factor, \
                                             const int32_t* owner) { \
        FL_EACH_ROW(ROWS, STORE(rows + c, OF(factor))) \
    } \
    static inline void fl_shift_rows_##TYPE(const REAL* rows, ptrdiff_t n, const REAL* m, \
                                            const REAL* rest, const int32_t* owner, REAL* to) { \
        FL_EACH_ROW(ROWS, STORE(to + c, SUBTRACT(SUBTRACT(LOAD(rows + c), OF(m)), OF(rest)))) \
    } \
    static inline void fl_smooth_rows_##TYPE(REAL* rows, ptrdiff_t n, const REAL* factor, \
                                             const REAL* share, const REAL* weight, \
                                             const int32_t* owner) { \
        FL_EACH_ROW(ROWS, STORE(rows + c, SUBTRACT(MULTIPLY(LOAD(rows + c), OF(factor)), \
                                                   MULTIPLY(LOAD(weight + c), OF(share))))) \
    }
#if defined(__AVX512F__)
#define FL_OF_16(p) _mm512_permutexvar_ps(_mm512_loadu_si512(owner + c), _mm512_loadu_ps(p))
#define FL_OF_8(p) \
    _mm512_permutexvar_pd( \
        _mm512_cvtepi32_epi64(_mm256_loadu_si256((const __m256i*)(owner + c - i * n))), \
        _mm512_loadu_pd((p) + i))
FL_OF_ROWS(f, float, 16, _mm512_loadu_ps, _mm512_mul_ps, _mm512_sub_ps, _mm512_storeu_ps, FL_OF_16)
FL_OF_ROWS(d, double, 8, _mm512_loadu_pd, _mm512_mul_pd, _mm512_sub_pd, _mm512_storeu_pd, FL_OF_8)
#else
#define FL_TIMES(a, b) ((a) * (b))
#define FL_LESS(a, b) ((a) - (b))
#define FL_SET(p, a) *(p) = (a)
#define FL_OF_1(p) (p)[i]
#if defined(__AVX2__)
#define FL_OF_8(p) \
    _mm256_permutevar8x32_ps(_mm256_loadu_ps((p) + i), \
                             _mm256_loadu_si256((const __m256i*)(owner + c - i * n)))
FL_OF_ROWS(f, float, 8, _mm256_loadu_ps, _mm256_mul_ps, _mm256_sub_ps, _mm256_storeu_ps, FL_OF_8)
#else
FL_OF_ROWS(f, float, 1, *, FL_TIMES, FL_LESS, FL_SET, FL_OF_1)
#endif
FL_OF_ROWS(d, double, 1, *, FL_TIMES, FL_LESS, FL_SET, FL_OF_1)
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
