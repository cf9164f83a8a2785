# Entropy: what a row of scores says of itself, without a target.
#
# With d_c = (m - x_c) / T, m the maximum, the entropy is log sum exp(-d) + sum p d, and its gradient
# p_c (d_c - sum p d) / T. No term of either sum is negative, so that the entropy of a confident row
# is exact, however small. How far scores are from the maximum asks for units of each row's own.

cdef inline double distances_block(
    const real* x, Py_ssize_t n, Py_ssize_t skip, real m, real pivot, real magic, real* e,
    const real* temper, double* gap, const char* later, Py_ssize_t step,
) noexcept nogil:
    """As exp_block; gap receives the sum of e (m - x)."""
    cdef real lane[CHUNK]
    cdef real far[CHUNK]
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
        lane[j] = far[j] = 0
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
        for j in range(CHUNK):
            far[j] += times(value[j], m - source[j])
        if chunk < whole:
            for j in range(CHUNK):
                e[i + j] = value[j]
        else:
            memcpy(e + i, value, (n - i) * sizeof(real))
    gap[0] = fold(far)
    return fold(lane)


cdef inline void reduce_to_entropy(
    const Job* job, Py_ssize_t row, Py_ssize_t i, Rows* r, int64_t* index, real* kept,
    real* scratch,
) noexcept nogil:
    """What entropy_step wants to know of a row; kept receives the exponentials, but of `index`."""
    cdef const char* x = row_of(job, job.logits, job.storage, row)
    cdef const real* temper = temper_of(job, scratch[0])
    cdef real m = largest_of_row(job, x, scratch), pivot, magic
    cdef Py_ssize_t b, c, n, size = itemsize(job.storage)
    cdef const char* later = x + min(job.group * job.row_step, <Py_ssize_t>AHEAD) * size
    cdef double gap
    index[i] = find_in_row(job, x, m, scratch)
    pivot, magic = pivot_of(m, temper), magic_of(m, temper)
    r.maximum[i] = m
    r.others[i] = r.gap[i] = 0.0
    for b in range(blocks_in(job.num_classes)):
        c = b * BLOCK
        n = min(job.num_classes - c, <Py_ssize_t>BLOCK)
        r.others[i] += distances_block(
            load_block(job.storage, x, c, n, scratch), n, index[i] - c, m, pivot, magic, kept + c,
            temper, &gap, later + c * size, CHUNK * size)
        r.gap[i] += gap
    r.top[i] = exponential(m, pivot, magic, lowest_of(magic, temper), temper)


cdef inline void entropy_step(const Job* job, Rows* r, Py_ssize_t n, real unused) noexcept nogil:
    """The loss; and the gradient e_c (d_c - spread) * factor, that of the maximum apart."""
    cdef double total, weight, power = power_of(unused)
    cdef Py_ssize_t i
    for i in range(n):
        total = r.others[i] + r.top[i]
        r.spread[i] = r.gap[i] / total * job.cooling
        r.loss[i] = times(r.row_weight[i], log1p(r.others[i] / r.top[i]) + r.spread[i])
        weight = r.row_weight[i] * job.scale
        r.factor[i] = times(weight, 1.0 / (total * power))
        r.left_out[i] = times(weight, 0.0 - r.spread[i] * (r.top[i] / total))


cdef inline void write_entropy(
    const Job* job, Py_ssize_t row, Py_ssize_t i, const Rows* r, Py_ssize_t index, real* e,
    real* scratch,
) noexcept nogil:
    cdef const char* x = row_of(job, job.logits, job.storage, row)
    cdef real m = <real>r.maximum[i], mean = <real>r.spread[i], cooling = <real>job.cooling, f
    cdef const real* source
    cdef Py_ssize_t b, c, n, j
    if r.row_weight[i] == 0.0:
        memset(e, 0, job.num_classes * sizeof(real))
        return
    f = narrow_factor(e, job.num_classes, 1, r.factor[i])
    for b in range(blocks_in(job.num_classes)):
        c = b * BLOCK
        n = min(job.num_classes - c, <Py_ssize_t>BLOCK)
        source = load_block(job.storage, x, c, n, scratch)
        for j in range(n):
            e[c + j] = times(e[c + j], (m - source[j]) * cooling - mean) * f
    e[index] = <real>r.left_out[i]


cdef void entropy_rows(const Job* job, Py_ssize_t unit, real* scratch) noexcept nogil:
    cdef real* kept = scratch + 2 * BLOCK
    cdef Rows r
    cdef int64_t index[LANES]
    cdef Py_ssize_t C = job.num_classes, i, first = unit * job.group, n = rows_in_unit(job, unit)
    read_sample_weights(job, first, n, &r)
    for i in range(n):
        if r.row_weight[i] == 0.0:
            r.others[i] = r.gap[i] = r.maximum[i] = 0.0
            r.top[i] = 1.0
            index[i] = 0
        else:
            reduce_to_entropy(job, first + i, i, &r, index, kept + i * C, scratch)
    entropy_step(job, &r, n, kept[0])
    job.partial[unit] = deliver_losses(job, first, n, r.loss)
    if job.out == NULL:
        return
    for i in range(n):
        write_entropy(job, first + i, i, &r, index[i], kept + i * C, scratch)
    store_rows(job, first, n, kept)


cdef inline void reduce_tile_to_entropy(
    const Job* job, Py_ssize_t first, const real* tile, const int32_t* index, real* e, Rows* r
) noexcept nogil:
    """As reduce_to_entropy, of lanes, whose maxima are known."""
    cdef real pivot[LANES]
    cdef real magic[LANES]
    cdef real lowest[LANES]
    cdef real m[LANES]
    cdef real line[LANES]
    cdef real lane[LANES]
    cdef real far[LANES]
    cdef real top[LANES]
    cdef real own[TEMPER]
    cdef double total[LANES]
    cdef double gap[LANES]
    cdef int32_t hole[LANES]
    cdef int32_t c
    cdef Py_ssize_t step = job.step, j
    memcpy(own, temper_of(job, tile[0]), sizeof(own))
    for j in range(LANES):
        m[j] = <real>r.maximum[j]
        pivot[j], magic[j] = pivot_of(m[j], own), magic_of(m[j], own)
        lowest[j] = lowest_of(magic[j], own)
        hole[j] = index[j]
        lane[j] = far[j] = top[j] = 0
        total[j] = gap[j] = 0.0
    for c in range(<int32_t>job.num_classes):
        for j in range(LANES):
            line[j] = exponential(tile[c * step + j], pivot[j], magic[j], lowest[j], own)
        for j in range(LANES):
            top[j] = line[j] if hole[j] == c else top[j]
            line[j] = <real>0 if hole[j] == c else line[j]
        for j in range(LANES):
            lane[j] += line[j]
            far[j] += times(line[j], m[j] - tile[c * step + j])
            e[c * step + j] = line[j]
        if c % RUN == RUN - 1:
            for j in range(LANES):
                total[j] += lane[j]
                gap[j] += far[j]
                lane[j] = far[j] = 0
    for j in range(LANES):
        r.others[j] = total[j] + lane[j]
        r.gap[j] = gap[j] + far[j]
        r.top[j] = top[j]


cdef void entropy_tile(
    const Job* job, Py_ssize_t first, real* tile, real* e
) noexcept nogil:
    cdef Rows r
    cdef real maximum[LANES]
    cdef real f[LANES]
    cdef real mean[LANES]
    cdef real left_out[LANES]
    cdef int32_t index[LANES]
    cdef real cooling = <real>job.cooling
    cdef int32_t c
    cdef Py_ssize_t step = job.step, j, n = min(job.rows - first, <Py_ssize_t>LANES)
    for j in range(LANES):
        r.row_weight[j] = 0.0
    read_sample_weights(job, first, n, &r)
    clear_dead_lanes(job, &r, tile)
    largest_in_lanes(job, tile, maximum)
    find_in_lanes(job, tile, maximum, index)
    for j in range(LANES):
        r.maximum[j] = maximum[j]
    reduce_tile_to_entropy(job, first, tile, index, e, &r)
    entropy_step(job, &r, LANES, tile[0])
    job.partial[first // job.summed] = deliver_losses(job, first, n, r.loss)
    if job.out == NULL:
        return
    narrow_factors(job, e, &r, f)
    for j in range(LANES):
        mean[j], left_out[j] = <real>r.spread[j], <real>r.left_out[j]
    for c in range(<int32_t>job.num_classes):
        for j in range(LANES):
            tile[c * step + j] = f[j] * times(
                e[c * step + j], (maximum[j] - tile[c * step + j]) * cooling - mean[j])
        for j in range(LANES):
            tile[c * step + j] = left_out[j] if index[j] == c else tile[c * step + j]
