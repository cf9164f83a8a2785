# The declarations of machine.h, and what it has for either type under one name.

cdef extern from "machine.h":
    enum:
        FL_OPENMP
        FL_IEEE_MODE
        FL_ROWS
        FL_TOP_f
        FL_TOP_d
    int fl_max_threads() noexcept nogil
    int fl_thread_limit() noexcept nogil
    int fl_cpu_runs(int level) noexcept nogil
    unsigned int fl_set_float_mode(unsigned int mode) noexcept nogil

    int32_t fl_bits_f(float) noexcept nogil
    int64_t fl_bits_d(double) noexcept nogil
    float fl_from_bits_f(int32_t) noexcept nogil
    double fl_from_bits_d(int64_t) noexcept nogil
    float fl_fma_f(float, float, float) noexcept nogil
    double fl_fma_d(double, double, double) noexcept nogil
    float fl_subtract_product_f(float, float, float) noexcept nogil
    double fl_subtract_product_d(double, double, double) noexcept nogil
    float fl_larger_f(float, float) noexcept nogil
    double fl_larger_d(double, double) noexcept nogil
    float fl_smaller_f(float, float) noexcept nogil
    double fl_smaller_d(double, double) noexcept nogil
    float fl_bound_f(float) noexcept nogil
    double fl_bound_d(double) noexcept nogil
    float fl_no_dust_f(float) noexcept nogil
    double fl_no_dust_d(double) noexcept nogil

    void fl_prefetch(const char*) noexcept nogil
    void fl_stream(char*, const char*, size_t) noexcept nogil
    void fl_end_stream() noexcept nogil
    Py_ssize_t fl_halves_to_floats(const uint16_t*, float*, Py_ssize_t) noexcept nogil
    Py_ssize_t fl_floats_to_halves(const float*, uint16_t*, Py_ssize_t) noexcept nogil

    double fl_sum_f(const float*) noexcept nogil
    double fl_sum_d(const double*) noexcept nogil
    float fl_max_f(const float*) noexcept nogil
    double fl_max_d(const double*) noexcept nogil
    void fl_sum_rows_f(const float*, Py_ssize_t, float*) noexcept nogil
    void fl_sum_rows_d(const double*, Py_ssize_t, double*) noexcept nogil
    float fl_fold_top_f(const float*, const float*, float*) noexcept nogil
    double fl_fold_top_d(const double*, const double*, double*) noexcept nogil
    void fl_top_rows_f(const float*, const float*, Py_ssize_t, float*, float*, float*) noexcept nogil
    void fl_top_rows_d(
        const double*, const double*, Py_ssize_t, double*, double*, double*) noexcept nogil
    void fl_scale_rows_f(float*, Py_ssize_t, const float*, const int32_t*) noexcept nogil
    void fl_scale_rows_d(double*, Py_ssize_t, const double*, const int32_t*) noexcept nogil
    void fl_spread_rows_f(float*, Py_ssize_t, const float*, const int32_t*) noexcept nogil
    void fl_spread_rows_d(double*, Py_ssize_t, const double*, const int32_t*) noexcept nogil
    void fl_shift_rows_f(const float*, Py_ssize_t, const float*, const float*, const int32_t*,
                         float*) noexcept nogil
    void fl_shift_rows_d(const double*, Py_ssize_t, const double*, const double*, const int32_t*,
                         double*) noexcept nogil
    void fl_smooth_rows_f(
        float*, Py_ssize_t, const float*, const float*, const float*, const int32_t*) noexcept nogil
    void fl_smooth_rows_d(
        double*, Py_ssize_t, const double*, const double*, const double*, const int32_t*,
    ) noexcept nogil
    void fl_transpose_f(const float*, Py_ssize_t, float*, Py_ssize_t) noexcept nogil
    void fl_transpose_d(const double*, Py_ssize_t, double*, Py_ssize_t) noexcept nogil


cdef inline void transpose(
    const real* source, Py_ssize_t source_step, real* to, Py_ssize_t to_step
) noexcept nogil:
    """Eight runs of eight numbers: to[i][j] = source[j][i]."""
    if real is float:
        fl_transpose_f(source, source_step, to, to_step)
    else:
        fl_transpose_d(source, source_step, to, to_step)


cdef inline void sum_eight(const real* rows, Py_ssize_t n, real* to) noexcept nogil:
    """The sums of eight rows of n numbers, in the order of fold_parts."""
    if real is float:
        fl_sum_rows_f(rows, n, to)
    else:
        fl_sum_rows_d(rows, n, to)


cdef inline void top_eight(
    const real* x, const real* e, Py_ssize_t n, real* maximum, real* others, real* top
) noexcept nogil:
    """Of eight rows the maxima of x, and of e the sums without the largest, and that."""
    if real is float:
        fl_top_rows_f(x, e, n, maximum, others, top)
    else:
        fl_top_rows_d(x, e, n, maximum, others, top)


cdef inline void scale_sixteen(
    real* rows, Py_ssize_t n, const real* factor, const int32_t* owner
) noexcept nogil:
    """Sixteen rows of n numbers times a factor each."""
    if real is float:
        fl_scale_rows_f(rows, n, factor, owner)
    else:
        fl_scale_rows_d(rows, n, factor, owner)


cdef inline void spread_sixteen(
    real* rows, Py_ssize_t n, const real* factor, const int32_t* owner
) noexcept nogil:
    """Sixteen rows of n numbers, each its factor."""
    if real is float:
        fl_spread_rows_f(rows, n, factor, owner)
    else:
        fl_spread_rows_d(rows, n, factor, owner)


cdef inline void shift_sixteen(
    const real* rows, Py_ssize_t n, const real* m, const real* rest, const int32_t* owner, real* to
) noexcept nogil:
    """Sixteen rows of n numbers less two each."""
    if real is float:
        fl_shift_rows_f(rows, n, m, rest, owner, to)
    else:
        fl_shift_rows_d(rows, n, m, rest, owner, to)


cdef inline void smooth_sixteen(
    real* rows, Py_ssize_t n, const real* factor, const real* share, const real* weight,
    const int32_t* owner,
) noexcept nogil:
    """Sixteen rows of n numbers times a factor each, less a share each of the weights."""
    if real is float:
        fl_smooth_rows_f(rows, n, factor, share, weight, owner)
    else:
        fl_smooth_rows_d(rows, n, factor, share, weight, owner)
