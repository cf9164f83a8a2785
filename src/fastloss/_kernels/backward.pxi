# The backward functions, of rows, of short ones as a run, and of tiles. softmax_backward:
# p (g - sum g p); log_softmax_backward: g - exp(l) sum g. A sum too large for the compute type is
# taken anew, in float64 and in units of 1 / HUGE_UNIT.

cdef inline real reference_above(real maximum) noexcept nogil:
    """Log-probabilities are at most 0, but the formulas hold for any: a reference for all."""
    return maximum if maximum > highest_of(untempered(maximum)) else <real>0.0


cdef inline double unit_of(real m) noexcept nogil:
    """What an exponential with reference m is multiplied by to give exp(x)."""
    cdef const real* temper = untempered(m)
    cdef real magic = magic_of(m, temper), pivot = pivot_of(m, temper)
    cdef double e = 1.0 if m == 0 else exp_any(m)  # 0, mostly: reference_above
    return e / <double>exponential(m, pivot, magic, lowest_of(magic, temper), temper)


cdef inline real shrink_for(double factor, real unused) noexcept nogil:
    """A power of two for exponentials, so that factor over it is a normal number; mostly 1."""
    cdef double tiny = tiny_of(unused)
    return power_of(unused) if -tiny < factor < tiny else <real>1.0


cdef inline bint is_huge(double total, real unused) noexcept nogil:
    """Whether a sum of upstream gradients is out of range, or near enough to its end."""
    return not -huge_of(unused) < total < huge_of(unused)


cdef inline double huge_sum(
    Operation operation, const real* g, const real* p, Py_ssize_t step, Py_ssize_t n
) noexcept nogil:
    """HUGE_UNIT times the sum of g, or, for softmax_backward, of g p: what overflows elsewhere."""
    cdef double lane[CHUNK]
    cdef double term
    cdef Py_ssize_t j
    for j in range(CHUNK):
        lane[j] = 0.0
    for j in range(n):
        term = HUGE_UNIT * g[j * step]
        lane[j % CHUNK] += term * p[j * step] if operation == SOFTMAX_BACKWARD else term
    return fold(lane)


cdef void huge_difference(
    Operation operation, const real* g, const real* forward, real* result, Py_ssize_t step,
    Py_ssize_t n, real m, double total,
) noexcept nogil:
    """The result, the sum being total / HUGE_UNIT, in float64 and without overflow."""
    cdef const real* temper = untempered(m)
    cdef real pivot = pivot_of(m, temper), magic = magic_of(m, temper)
    cdef real lowest = lowest_of(magic, temper)
    cdef double unit, value
    cdef Py_ssize_t j
    unit = unit_of(m) if operation == LOG_SOFTMAX_BACKWARD else 1.0
    for j in range(n):
        value = HUGE_UNIT * g[j * step]
        if operation == SOFTMAX_BACKWARD:
            value = forward[j * step] * (value - total)
        else:
            value -= unit * exponential(
                forward[j * step], pivot, magic, lowest, temper) * total
        result[j * step] = <real>(value / HUGE_UNIT)


cdef void backward_rows(
    const Job* job, Operation operation, Py_ssize_t unit, real* scratch
) noexcept nogil:
    cdef real* kept = scratch + 2 * BLOCK
    cdef real m
    cdef double total
    cdef bint huge
    cdef Py_ssize_t i, b, blocks = blocks_in(job.num_classes)
    cdef Py_ssize_t first = unit * job.group, n = rows_in_unit(job, unit)
    for i in range(n):
        total = m = 0
        for b in range(blocks):
            total += terms_of_block(job, operation, first + i, b, False, scratch)
        huge = is_huge(total, m)
        if huge:
            total = 0.0
            for b in range(blocks):
                total += terms_of_block(job, operation, first + i, b, True, scratch)
        if operation == LOG_SOFTMAX_BACKWARD:
            m = largest_of_row(job, row_of(job, job.logits, job.storage, first + i), scratch)
        for b in range(blocks):
            backward_block(job, operation, first + i, b, huge, m, total,
                           kept + i * job.num_classes + b * BLOCK, scratch)
    store_rows(job, first, n, kept)


cdef inline double terms_of_block(
    const Job* job, Operation operation, Py_ssize_t row, Py_ssize_t b, bint huge, real* scratch
) noexcept nogil:
    """The sum that the result asks for."""
    cdef Py_ssize_t start = row * job.row_step + b * BLOCK
    cdef Py_ssize_t n = min(job.num_classes - b * BLOCK, <Py_ssize_t>BLOCK)
    cdef const real* g = load_block(job.storage, job.other, start, n, scratch)
    cdef const real* p
    if operation == LOG_SOFTMAX_BACKWARD and not huge:
        return sum_block(g, n)
    p = load_block(job.storage, job.logits, start, n, scratch + BLOCK)
    return huge_sum(operation, g, p, 1, n) if huge else dot_block(g, p, n)


cdef inline void backward_block(
    const Job* job, Operation operation, Py_ssize_t row, Py_ssize_t b, bint huge, real maximum,
    double total, real* result, real* scratch,
) noexcept nogil:
    cdef Py_ssize_t start = row * job.row_step + b * BLOCK, j
    cdef Py_ssize_t n = min(job.num_classes - b * BLOCK, <Py_ssize_t>BLOCK)
    cdef const real* g = load_block(job.storage, job.other, start, n, scratch)
    cdef const real* p = load_block(job.storage, job.logits, start, n, scratch + BLOCK)
    cdef real own[TEMPER]
    cdef real m = reference_above(maximum), pivot, magic, lowest, f = <real>total, shrink
    cdef double unit_m
    memcpy(own, untempered(m), sizeof(own))
    pivot, magic = pivot_of(m, own), magic_of(m, own)
    lowest = lowest_of(magic, own)
    if huge:
        huge_difference(operation, g, p, result, 1, n, m, total)
    elif operation == SOFTMAX_BACKWARD:
        for j in range(n):
            result[j] = p[j] * (g[j] - f)
    else:
        unit_m = unit_of(m)
        shrink = shrink_for(total * unit_m, m)
        f = <real>(total / shrink * unit_m)
        for j in range(n):
            result[j] = subtract_product(
                exponential(p[j], pivot, magic, lowest, own) * shrink, f, g[j])


cdef bint backward_run(
    const Job* job, Operation operation, Py_ssize_t unit, real* scratch
) noexcept nogil:
    """Short rows as one run. False, and nothing done, if one asks for a scale of its own: by its
    sum or, of log-probabilities, by a large one."""
    cdef real* kept = scratch + 2 * BLOCK
    cdef Py_ssize_t C = job.num_classes, i, first = unit * job.group, n = rows_in_unit(job, unit)
    cdef Py_ssize_t rows = LANES if LANES * C <= CACHED else 16
    for i in range((n + rows - 1) // rows):
        if not backward_part(job, operation, first + i * rows, min(n - i * rows, rows),
                             kept + i * rows * C, scratch):
            return False
    store(job, first * C, n * C, kept)
    return True


cdef bint backward_part(
    const Job* job, Operation operation, Py_ssize_t first, Py_ssize_t n, real* kept, real* scratch
) noexcept nogil:
    """backward_run of rows that stay in the nearest cache, into kept."""
    cdef double total[LANES]
    cdef real f[LANES]
    cdef double tiny = tiny_of(kept[0])
    cdef double unit_0 = unit_of(<real>0.0) if operation == LOG_SOFTMAX_BACKWARD else 1.0, factor
    cdef int odd = 0
    cdef Py_ssize_t C = job.num_classes, i
    if not terms_of_run(job, operation, first * C, n * C, kept, scratch):
        return False
    sum_rows(job, n, kept, total)
    for i in range(n):
        factor = total[i] * unit_0
        odd |= is_huge(total[i], kept[0])
        odd |= (-tiny < factor) & (factor < tiny) & (total[i] != 0.0)
        f[i] = <real>factor
    if odd:
        return False
    for i in range(0, n, 16):
        spread_sixteen(kept + i * C, C, f + i, owners_of(job, scratch))
    finish_run(job, operation, first * C, n * C, kept, scratch)
    return True


cdef inline bint terms_of_run(
    const Job* job, Operation operation, Py_ssize_t start, Py_ssize_t n, real* terms, real* scratch
) noexcept nogil:
    """What is summed up; False if a log-probability asks for a reference."""
    cdef const real* p
    cdef const real* g
    cdef Py_ssize_t b, c, j, width
    for b in range(blocks_in(n)):
        c = b * BLOCK
        width = min(n - c, <Py_ssize_t>BLOCK)
        p = load_block(job.storage, job.logits, start + c, width, scratch + BLOCK)
        g = load_block(job.storage, job.other, start + c, width, scratch)
        if operation == SOFTMAX_BACKWARD:
            for j in range(width):
                terms[c + j] = g[j] * p[j]
        elif reference_above(largest(p, width)) != 0:
            return False
        else:
            memcpy(terms + c, g, width * sizeof(real))
    return True


cdef inline void finish_run(
    const Job* job, Operation operation, Py_ssize_t start, Py_ssize_t n, real* f, real* scratch
) noexcept nogil:
    """The result, in place of the factor of each row."""
    cdef const real* p
    cdef const real* g
    cdef real own[TEMPER]
    cdef real magic = magic_of(<real>0.0, untempered(scratch[0]))
    cdef real lowest = bound(lowest_of(magic, untempered(scratch[0])))
    cdef real* result
    cdef Py_ssize_t b, c, j, width
    memcpy(own, untempered(scratch[0]), sizeof(own))
    for b in range(blocks_in(n)):
        c = b * BLOCK
        width = min(n - c, <Py_ssize_t>BLOCK)
        p = load_block(job.storage, job.logits, start + c, width, scratch + BLOCK)
        g = load_block(job.storage, job.other, start + c, width, scratch)
        result = f + c
        if operation == SOFTMAX_BACKWARD:
            for j in range(width):
                result[j] = p[j] * (g[j] - result[j])
        else:
            for j in range(width):
                result[j] = subtract_product(
                    exponential(p[j], <real>0.0, magic, lowest, own), result[j], g[j])


cdef void backward_tile(const Job* job, Operation operation, real* p, real* g) noexcept nogil:
    cdef real maximum[LANES]
    cdef real pivot[LANES]
    cdef real magic[LANES]
    cdef real lowest[LANES]
    cdef real f[LANES]
    cdef real shrink[LANES]
    cdef real own[TEMPER]
    cdef real parts[CHUNK * LANES]
    cdef double total[LANES]
    cdef double unit_m[LANES]
    cdef int huge = 0, above = 0
    cdef int32_t c, part, among = parts_of(job)
    cdef Py_ssize_t j, step = job.step
    memcpy(own, untempered(p[0]), sizeof(own))
    memset(parts, 0, among * LANES * sizeof(real))
    for c in range(<int32_t>job.num_classes):
        part = part_of(job, c, among) * LANES
        if operation == SOFTMAX_BACKWARD:
            for j in range(LANES):
                parts[part + j] += g[c * step + j] * p[c * step + j]
        else:
            for j in range(LANES):
                parts[part + j] += g[c * step + j]
    fold_row_parts(job, parts, among, total)
    for j in range(LANES):
        maximum[j] = 0
    if operation == LOG_SOFTMAX_BACKWARD:
        largest_in_lanes(job, p, maximum)
        for j in range(LANES):
            maximum[j] = reference_above(maximum[j])
    for j in range(LANES):
        huge |= is_huge(total[j], f[j])
        above |= maximum[j] != 0
    for j in range(LANES if huge else 0):
        if is_huge(total[j], f[j]):
            # The result takes the place of g, and what follows leaves that alone.
            total[j] = huge_sum(operation, g + j, p + j, step, job.num_classes)
            huge_difference(operation, g + j, p + j, g + j, step, job.num_classes, maximum[j],
                           total[j])
            for c in range(job.num_classes):
                p[c * step + j] = 1
            total[j] = 0.0
            maximum[j] = 0
    for j in range(LANES):
        f[j] = <real>total[j]
        unit_m[j] = unit_of(<real>0.0)
    for j in range(LANES if above else 0):
        unit_m[j] = unit_of(maximum[j])
    if operation == LOG_SOFTMAX_BACKWARD:
        for j in range(LANES):
            shrink[j] = shrink_for(total[j] * unit_m[j], maximum[j])
            f[j] = <real>(total[j] / shrink[j] * unit_m[j])
            pivot[j] = pivot_of(maximum[j], own)
            magic[j] = magic_of(maximum[j], own)
            lowest[j] = lowest_of(magic[j], own)
    for c in range(job.num_classes):
        if operation == SOFTMAX_BACKWARD:
            for j in range(LANES):
                p[c * step + j] *= g[c * step + j] - f[j]
        else:
            for j in range(LANES):
                p[c * step + j] = subtract_product(
                    exponential(p[c * step + j], pivot[j], magic[j], lowest[j], own) * shrink[j],
                    f[j], g[c * step + j])
