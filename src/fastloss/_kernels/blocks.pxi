# Blocks: runs of at most BLOCK elements, taken in chunks.

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


cdef inline real bound(real x) noexcept nogil:
    return fl_bound_f(x) if real is float else fl_bound_d(x)


cdef inline real below(real x, real highest) noexcept nogil:
    return fl_smaller_f(highest, x) if real is float else fl_smaller_d(highest, x)


cdef inline real above(real x, real least) noexcept nogil:
    return fl_larger_f(x, least) if real is float else fl_larger_d(x, least)


cdef inline void exp_run(
    const real* x, Py_ssize_t n, real* e, const real* temper, const char* later, Py_ssize_t step
) noexcept nogil:
    """The exponentials e in common units, wherever rows end.

    e has room for whole chunks. Meanwhile memory is fetched, as in exp_block.
    """
    cdef real value[CHUNK]
    cdef real rest[CHUNK]
    cdef real own[TEMPER]
    cdef real magic = common_magic(x[0]), lowest = bound(lowest_of(magic, temper))
    cdef real highest = bound(highest_of(temper))
    cdef const real* source
    cdef Py_ssize_t chunk, j, whole = n // CHUNK
    memcpy(own, temper, sizeof(own))  # which nothing that is written can be
    if whole * CHUNK < n:
        pad(x + whole * CHUNK, n - whole * CHUNK, -1, rest)
    for chunk in range((n + CHUNK - 1) // CHUNK):
        source = x + chunk * CHUNK
        if chunk == whole:
            source = rest
        fetch(later + chunk * step, CHUNK * sizeof(real))
        for j in range(CHUNK):
            value[j] = below(source[j], highest)
        for j in range(CHUNK):
            e[chunk * CHUNK + j] = exponential(value[j], <real>0.0, magic, lowest, own)


cdef inline double exp_block(
    const real* x, Py_ssize_t n, Py_ssize_t skip, real pivot, real magic, real* e,
    const real* temper, const char* later, Py_ssize_t step,
) noexcept nogil:
    """The sum of the exponentials e, that at `skip` being 0.

    Meanwhile memory from `later` on is fetched, `step` bytes a chunk.
    """
    cdef real lane[CHUNK]
    cdef real value[CHUNK]
    cdef real rest[CHUNK]
    cdef real holed[CHUNK]
    cdef real own[TEMPER]
    cdef real lowest = lowest_of(magic, temper)
    cdef const real* source
    cdef Py_ssize_t chunk, i, j, whole = n // CHUNK, hole = -1
    memcpy(own, temper, sizeof(own))
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
            value[j] = exponential(source[j], pivot, magic, lowest, own)
        for j in range(CHUNK):
            lane[j] += value[j]
        if chunk < whole:
            for j in range(CHUNK):
                e[i + j] = value[j]
        else:
            memcpy(e + i, value, (n - i) * sizeof(real))
    return fold(lane)


cdef inline void top_block(
    const real* x, Py_ssize_t n, real pivot, real magic, real highest, Block* found,
    const real* temper, const char* later, Py_ssize_t step,
) noexcept nogil:
    """The maximum; of the exponentials the largest, and the sum of the others.

    Meanwhile memory is fetched, as in exp_block.
    """
    cdef real lane[CHUNK]
    cdef real top[CHUNK]
    cdef real m[CHUNK]
    cdef real value[CHUNK]
    cdef real rest[CHUNK]
    cdef real own[TEMPER]
    cdef real lowest = bound(lowest_of(magic, temper)), total
    cdef const real* source
    cdef Py_ssize_t chunk, j, whole = n // CHUNK
    memcpy(own, temper, sizeof(own))
    pad(x + whole * CHUNK, n - whole * CHUNK, -1, rest)
    for j in range(CHUNK):
        lane[j] = top[j] = 0
        m[j] = <real>-INFINITY
    for chunk in range((n + CHUNK - 1) // CHUNK):
        source = x + chunk * CHUNK
        if chunk == whole:
            source = rest
        fetch(later + chunk * step, step)
        for j in range(CHUNK):
            m[j] = above(source[j], m[j])
        for j in range(CHUNK):
            value[j] = below(source[j], highest)
        for j in range(CHUNK):
            value[j] = exponential(value[j], pivot, magic, lowest, own)
        for j in range(CHUNK):
            lane[j] += below(value[j], top[j])
        for j in range(CHUNK):
            top[j] = above(value[j], top[j])
    if real is float:
        total = fl_fold_top_f(lane, top, rest)
        found.maximum = fl_max_f(m)
    else:
        total = fl_fold_top_d(lane, top, rest)
        found.maximum = fl_max_d(m)
    found.sum = total
    found.top = rest[0]


cdef inline double fold(const real* lane) noexcept nogil:
    """The sum of a chunk, in float64 and in a fixed order."""
    if real is float:
        return fl_sum_f(lane)
    else:
        return fl_sum_d(lane)


cdef inline double fold_lanes(const double* lane) noexcept nogil:
    return fold(lane) + fold(lane + CHUNK)


cdef inline double sum_kept(const real* e, Py_ssize_t n) noexcept nogil:
    """As sum_block, of numbers in scratch: whole chunks may be read."""
    cdef real lane[CHUNK]
    cdef Py_ssize_t chunk, j, whole = n // CHUNK
    cdef int width = <int>(n - whole * CHUNK)
    for j in range(CHUNK):
        lane[j] = 0
    for chunk in range(whole):
        for j in range(CHUNK):
            lane[j] += e[chunk * CHUNK + j]
    e += whole * CHUNK
    for j in range(CHUNK):
        lane[j] += e[j] if <int>j < width else <real>0.0
    return fold(lane)


cdef inline double sum_block(const real* g, Py_ssize_t n) noexcept nogil:
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


cdef inline double dot_block(const real* a, const real* b, Py_ssize_t n) noexcept nogil:
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


cdef inline double gap_block(
    const real* x, const real* weight, Py_ssize_t n, real m
) noexcept nogil:
    """sum of w_c (m - x_c), w_c relative; in float64 where it leaves the range of x."""
    cdef real lane[CHUNK]
    cdef double total
    cdef Py_ssize_t chunk, i, j
    for j in range(CHUNK):
        lane[j] = 0
    for chunk in range(n // CHUNK):
        i = chunk * CHUNK
        if weight == NULL:
            for j in range(CHUNK):
                lane[j] += m - x[i + j]
        else:
            for j in range(CHUNK):
                lane[j] += times(weight[i + j], m - x[i + j])
    for j in range(n - n % CHUNK, n):
        lane[j % CHUNK] += m - x[j] if weight == NULL else times(weight[j], m - x[j])
    total = fold(lane)
    return total if is_finite(total) else wide_gap(x, 1, weight, n, m)


cdef double wide_gap(
    const real* x, Py_ssize_t step, const real* weight, Py_ssize_t n, real m
) noexcept nogil:
    """As gap_block, in float64."""
    cdef double lane[CHUNK]
    cdef double w
    cdef Py_ssize_t j
    for j in range(CHUNK):
        lane[j] = 0.0
    for j in range(n):
        w = 1.0 if weight == NULL else weight[j]
        lane[j % CHUNK] += times(w, <double>m - <double>x[j * step])
    return fold(lane)


cdef inline void gap_run(
    const real* x, const real* weight, Py_ssize_t n, real* terms
) noexcept nogil:
    """w_c (m - x_c), in place of m."""
    cdef Py_ssize_t j
    for j in range(n):
        terms[j] = times(weight[j], terms[j] - x[j])


cdef inline void weigh(
    const Job* job, const real* t, const real* weight, Py_ssize_t n, real* wt
) noexcept nogil:
    """w_c t_c, w_c relative."""
    cdef real target_share = <real>(1.0 - job.options.label_smoothing)
    cdef real uniform = <real>(job.options.label_smoothing / job.num_classes)
    cdef Py_ssize_t j
    if weight == NULL:
        for j in range(n):
            wt[j] = target_share * t[j] + uniform
    else:
        for j in range(n):
            wt[j] = weight[j] * (target_share * t[j] + uniform)


cdef inline void soft_block(
    const Job* job, const real* x, const real* t, const real* weight, Py_ssize_t n, Py_ssize_t skip,
    real m, Block* block, const char* later, Py_ssize_t step,
) noexcept nogil:
    """The sum of w_c t_c (m - x_c), that of w_c t_c without `skip`, and w_c t_c there; w_c relative.

    Meanwhile memory is fetched, as in exp_block.
    """
    cdef real gap[CHUNK]
    cdef real mass[CHUNK]
    cdef real wt[CHUNK]
    cdef real rest[CHUNK]
    cdef const real* source
    cdef Py_ssize_t chunk, i, j, whole = n // CHUNK
    pad(x + whole * CHUNK, n - whole * CHUNK, -1, rest)
    block.top_mass = 0.0
    for j in range(CHUNK):
        gap[j] = mass[j] = 0
    for chunk in range((n + CHUNK - 1) // CHUNK):
        i = chunk * CHUNK
        source = x + i
        fetch(later + chunk * step, step)
        if chunk < whole:
            weigh(job, t + i, NULL if weight == NULL else weight + i, CHUNK, wt)
        else:
            source = rest
            memset(wt, 0, sizeof(wt))
            weigh(job, t + i, NULL if weight == NULL else weight + i, n - i, wt)
        for j in range(CHUNK):
            gap[j] += times(wt[j], m - source[j])
        if i <= skip < i + CHUNK and skip < n:
            block.top_mass = wt[skip - i]
            wt[skip - i] = 0
        for j in range(CHUNK):
            mass[j] += wt[j]
    block.mass = fold(mass)
    block.gap = fold(gap)
    if not is_finite(block.gap):
        block.gap = wide_soft_gap(job, x, t, weight, n, m)


cdef double wide_soft_gap(
    const Job* job, const real* x, const real* t, const real* weight, Py_ssize_t n, real m
) noexcept nogil:
    """The gap of soft_block in float64, where it leaves the range of x."""
    cdef double lane[CHUNK]
    cdef real wt
    cdef Py_ssize_t j
    for j in range(CHUNK):
        lane[j] = 0.0
    for j in range(n):
        weigh(job, t + j, NULL if weight == NULL else weight + j, 1, &wt)
        lane[j % CHUNK] += times(<double>wt, <double>m - <double>x[j])
    return fold(lane)
