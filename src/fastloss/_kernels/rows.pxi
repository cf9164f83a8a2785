# Rows: classes in the SIMD lanes.
#
# A unit is a group of rows, so that the scalar step has something to vectorise, and what is
# written is a long run. Scratch: two blocks, and the group's rows with room for a last chunk.

cdef inline const char* row_of(
    const Job* job, const char* data, Storage storage, Py_ssize_t row
) noexcept nogil:
    return data + row * job.row_step * itemsize(storage)


cdef inline Py_ssize_t row_numbers(const Job* job) noexcept nogil:
    return 2 * BLOCK + job.summed * job.num_classes + CHUNK


cdef inline bint is_short(const Job* job) noexcept nogil:
    """Whether rows are one run, and several are added up at a time."""
    return job.layout == ROWS and not adds_as_rows(job)


cdef inline int32_t* owners_of(const Job* job, real* scratch) noexcept nogil:
    """Of short rows: to which of FL_ROWS each number belongs."""
    return <int32_t*>(scratch + job.numbers - LINE // 4 - FL_ROWS * job.num_classes)


cdef inline real weight_of(const Job* job, Py_ssize_t c, real unused) noexcept nogil:
    """The weight of a class, relative to the largest in magnitude."""
    return <real>1.0 if job.weight == NULL else (<const real*>job.relative_weight)[c]


cdef inline real* terms_of(const Job* job, real* scratch) noexcept nogil:
    """Of short rows with label smoothing: what is added up of FL_ROWS."""
    return <real*>owners_of(job, scratch) - FL_ROWS * job.num_classes


cdef inline real* weights_of(const Job* job, real* scratch) noexcept nogil:
    """Of short rows with label smoothing: the relative weight of each of these terms."""
    return terms_of(job, scratch) - FL_ROWS * job.num_classes


cdef inline void begin_rows(const Job* job, real* scratch) noexcept nogil:
    cdef int32_t* owner = owners_of(job, scratch)
    cdef real* weight = weights_of(job, scratch)
    cdef Py_ssize_t i, c
    untamed_of(job, scratch)[0] = False
    for i in range(FL_ROWS if is_short(job) else 0):
        for c in range(job.num_classes):
            owner[i * job.num_classes + c] = <int32_t>i
            if is_smooth(job):
                weight[i * job.num_classes + c] = weight_of(job, c, scratch[0])


cdef inline void store_rows(
    const Job* job, Py_ssize_t first, Py_ssize_t n, const real* kept
) noexcept nogil:
    cdef Py_ssize_t C = job.num_classes, i
    if job.row_step == C:
        store(job, first * C, n * C, kept)
        return
    for i in range(n):
        store(job, (first + i) * job.row_step, C, kept + i * C)


cdef inline real largest_of_row(const Job* job, const char* x, real* buffer) noexcept nogil:
    cdef real m = <real>-INFINITY, block_m
    cdef Py_ssize_t b, c, n
    for b in range(blocks_in(job.num_classes)):
        c = b * BLOCK
        n = min(job.num_classes - c, <Py_ssize_t>BLOCK)
        block_m = largest(load_block(job.storage, x, c, n, buffer), n)
        m = block_m if block_m > m else m
    return m


cdef inline void largest_of_rows(
    const Job* job, Py_ssize_t first, Py_ssize_t n, Rows* r, real* scratch
) noexcept nogil:
    # A loop of its own, like each stage: rows overlap in the processor, stages of one row cannot.
    cdef Py_ssize_t i
    for i in range(n):
        r.maximum[i] = largest_of_row(
            job, row_of(job, job.logits, job.storage, first + i), scratch)


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
    cdef const real* temper = temper_of(job, m)
    cdef real pivot = pivot_of(m, temper), magic = magic_of(m, temper)
    cdef real* e
    cdef const real* block
    cdef Py_ssize_t size = itemsize(job.storage)
    cdef const char* later = x + min(job.group * job.row_step, <Py_ssize_t>AHEAD) * size
    cdef double total = 0.0
    cdef Py_ssize_t b, c, n
    for b in range(blocks_in(job.num_classes)):
        c = b * BLOCK
        n = min(job.num_classes - c, <Py_ssize_t>BLOCK)
        block = load_block(job.storage, x, c, n, scratch)
        e = scratch + BLOCK if kept == NULL else kept + c
        total += exp_block(block, n, skip - c, pivot, magic, e, temper,
                           later + c * size, CHUNK * size)
    return total


cdef inline void exp_rows(
    const Job* job, Py_ssize_t first, Py_ssize_t n, real* kept, real* scratch
) noexcept nogil:
    """Exponentials in common units. Memory is fetched as in exp_row."""
    cdef Py_ssize_t C = job.num_classes, size = itemsize(job.storage)
    cdef bint together = job.row_step == C  # the rows are one run
    cdef Py_ssize_t runs = 1 if together else n, run = n * C if together else C
    cdef Py_ssize_t ahead = min(job.group * job.row_step, <Py_ssize_t>AHEAD), i, b, width
    cdef const char* x
    for i in range(runs):
        x = row_of(job, job.logits, job.storage, first + i)
        for b in range(blocks_in(run)):
            width = min(run - b * BLOCK, <Py_ssize_t>BLOCK)
            exp_run(load_block(job.storage, x, b * BLOCK, width, scratch), width,
                    kept + i * C + b * BLOCK, temper_of(job, scratch[0]),
                    x + (b * BLOCK + ahead) * size, CHUNK * size)


cdef inline double sum_row(const Job* job, const real* e) noexcept nogil:
    cdef double total = 0.0
    cdef Py_ssize_t b
    for b in range(blocks_in(job.num_classes)):
        total += sum_kept(e + b * BLOCK, min(job.num_classes - b * BLOCK, <Py_ssize_t>BLOCK))
    return total


cdef inline void sum_rows(
    const Job* job, Py_ssize_t n, const real* e, double* total
) noexcept nogil:
    cdef real sums[LANES]
    cdef Py_ssize_t C = job.num_classes, i
    if adds_as_rows(job):
        for i in range(n):
            total[i] = sum_row(job, e + i * C)
        return
    for i in range(0, n, 8):
        sum_eight(e + i * C, C, sums + i)
    for i in range(n):
        total[i] = sums[i]


cdef inline bint find_untamed(
    const Job* job, Rows* r, Py_ssize_t n, double scale, real unused
) noexcept nogil:
    """The rows that common units are not for are to have their own; whether there are any."""
    cdef double weight, total
    cdef int32_t own, found = 0
    cdef Py_ssize_t i
    for i in range(n):
        weight = r.row_weight[i] * r.target_weight[i] * scale
        total = r.others[i] + r.target_exp[i]
        own = (r.row_weight[i] != 0.0) & (not (
            in_common_units(total, r.target_exp[i], weight, unused)
            & (r.others[i] >= job.least_rest * total)))
        r.own[i] = own
        found |= own
    return found


cdef inline void scale_row(real* e, Py_ssize_t n, double factor) noexcept nogil:
    cdef Py_ssize_t j
    cdef real f = narrow_factor(e, n, 1, factor)
    for j in range(n):
        e[j] *= f


cdef inline real narrow_factor(
    real* e, Py_ssize_t n, Py_ssize_t step, double factor
) noexcept nogil:
    """The factor in the compute type; where it is too small for that, on so much less of e."""
    cdef real power = power_of(e[0]), tiny = tiny_of(power)
    cdef Py_ssize_t j
    if factor == 0.0 or not -tiny < factor * power < tiny:
        return <real>(factor * power)
    while True:
        for j in range(n):
            e[j * step] *= power
        if not -tiny < factor < tiny:
            return <real>factor
        factor /= power


cdef inline void scale_rows(
    const Job* job, Py_ssize_t n, real* e, const Rows* r, real* scratch
) noexcept nogil:
    """factor * e_c, and with label smoothing, of short rows, less spread * w_c."""
    cdef real f[LANES]
    cdef real spread[LANES]
    cdef real power = power_of(e[0]), tiny = tiny_of(e[0])
    cdef double narrow
    cdef int small = 0
    cdef Py_ssize_t C = job.num_classes, i
    if adds_as_rows(job):
        for i in range(n):
            scale_row(e + i * C, C, r.factor[i])
        return
    for i in range(n):
        narrow = r.factor[i] * power
        f[i] = <real>narrow
        small |= (-tiny < narrow) & (narrow < tiny) & (r.factor[i] != 0.0)
    if small:
        for i in range(n):
            f[i] = narrow_factor(e + i * C, C, 1, r.factor[i])
    if not is_smooth(job):
        for i in range(0, n, 16):
            scale_sixteen(e + i * C, C, f + i, owners_of(job, scratch))
        return
    for i in range(n):
        spread[i] = <real>(r.spread[i] * job.largest_weight)
    for i in range(0, n, 16):
        smooth_sixteen(e + i * C, C, f + i, spread + i, weights_of(job, scratch),
                       owners_of(job, scratch))


cdef inline bint are_hopeless(
    const Job* job, Py_ssize_t first, Py_ssize_t n, Rows* r, real* scratch
) noexcept nogil:
    """Whether all rows that count need units of their own, by their maxima; asked on suspicion."""
    cdef const real* temper
    cdef real hopeless
    cdef bint result = True
    cdef Py_ssize_t i
    if not untamed_of(job, scratch)[0] and not is_apart(job):
        return False
    temper = temper_of(job, scratch[0])
    hopeless = <real>INFINITY if is_apart(job) else hopeless_of(job.num_classes, temper)
    largest_of_rows(job, first, n, r, scratch)
    for i in range(n):
        r.own[i] = r.row_weight[i] != 0.0
        result &= (not r.own[i]) | is_hopeless(<real>r.maximum[i], hopeless, temper)
    return result


cdef bint softmax_rows(const Job* job, Py_ssize_t unit, real* scratch) noexcept nogil:
    """False, and nothing done, if short rows need units of their own."""
    cdef real* kept = scratch + 2 * BLOCK
    cdef Rows r
    cdef const char* x
    cdef bint untamed
    cdef Py_ssize_t i, first = unit * job.group, n = rows_in_unit(job, unit)
    for i in range(n):
        r.row_weight[i] = r.target_weight[i] = 1.0
    untamed = are_hopeless(job, first, n, &r, scratch)
    if not untamed:
        exp_rows(job, first, n, kept, scratch)
        sum_rows(job, n, kept, r.others)
        for i in range(n):
            r.target_exp[i] = r.others[i]
        untamed = find_untamed(job, &r, n, 1.0, kept[0])
    untamed_of(job, scratch)[0] = untamed
    if untamed and is_short(job):
        return False
    if untamed:
        for i in range(n):
            if r.own[i]:
                x = row_of(job, job.logits, job.storage, first + i)
                r.others[i] = exp_row(job, x, -1, largest_of_row(job, x, scratch),
                                      kept + i * job.num_classes, scratch)
    for i in range(n):
        r.factor[i] = 1.0 / (r.others[i] * power_of(scratch[0]))
    scale_rows(job, n, kept, &r, scratch)
    store_rows(job, first, n, kept)
    return True


cdef inline void top_of_row(
    const Job* job, Py_ssize_t row, Py_ssize_t i, bint own, Rows* r, real* scratch
) noexcept nogil:
    """The maximum, its exponential, and the sum of the others; in common units, or, if own, in
    those of the maximum, which is known then."""
    cdef const char* x = row_of(job, job.logits, job.storage, row)
    cdef Py_ssize_t b, c, n, size = itemsize(job.storage)
    cdef const char* later = x + min(job.group * job.row_step, <Py_ssize_t>AHEAD) * size
    cdef const real* temper = temper_of(job, scratch[0])
    cdef real pivot, magic, highest
    cdef Block found
    units_of_row(<real>r.maximum[i], own, temper, &pivot, &magic, &highest)
    begin_top(r, i)
    for b in range(blocks_in(job.num_classes)):
        c = b * BLOCK
        n = min(job.num_classes - c, <Py_ssize_t>BLOCK)
        top_block(load_block(job.storage, x, c, n, scratch), n, pivot, magic, highest, &found,
                  temper, later + c * size, CHUNK * size)
        join_top(r, i, &found)


cdef inline void units_of_row(
    real m, bint own, const real* temper, real* pivot, real* magic, real* highest
) noexcept nogil:
    pivot[0] = pivot_of(m, temper) if own else <real>0.0
    magic[0] = magic_of(m, temper) if own else common_magic(m)
    highest[0] = <real>INFINITY if own else highest_of(temper)


cdef inline void begin_top(Rows* r, Py_ssize_t i) noexcept nogil:
    r.others[i] = r.top[i] = 0.0
    r.maximum[i] = -INFINITY


cdef inline void join_top(Rows* r, Py_ssize_t i, const Block* block) noexcept nogil:
    """What top_of_row asks for, with one block more."""
    r.others[i] += block.sum + min(r.top[i], block.top)
    r.top[i] = max(r.top[i], block.top)
    r.maximum[i] = max(r.maximum[i], block.maximum)


cdef inline const real* scores_of_run(
    const Job* job, Py_ssize_t first, Py_ssize_t n, real* buffer
) noexcept nogil:
    """The scores of short rows, where some before them and LANES rows may be read."""
    cdef Py_ssize_t C = job.num_classes
    cdef const real* x = load_block(job.storage, job.logits, first * C, n * C, buffer)
    if x == buffer or (n == LANES and first > 0):
        return x
    memcpy(buffer, x, n * C * sizeof(real))
    return buffer


cdef inline void top_of_rows(
    const Job* job, Py_ssize_t first, Py_ssize_t n, const real* scores, Rows* r, real* kept,
    real* scratch,
) noexcept nogil:
    """As top_of_row, in common units; of short rows, some that stay in the nearest cache."""
    cdef real maximum[LANES]
    cdef real others[LANES]
    cdef real top[LANES]
    cdef Py_ssize_t C = job.num_classes, rows = LANES if LANES * C <= CACHED else 16, i, j
    if adds_as_rows(job):
        for i in range(n):
            top_of_row(job, first + i, i, False, r, scratch)
    else:
        for i in range((n + rows - 1) // rows):
            exp_rows(job, first + i * rows, min(n - i * rows, rows), kept, scratch)
            for j in range(0, rows, 8):
                top_eight(scores + (i * rows + j) * C, kept + j * C, C, maximum + i * rows + j,
                          others + i * rows + j, top + i * rows + j)
        for i in range(n):
            r.maximum[i], r.others[i], r.top[i] = maximum[i], others[i], top[i]
    for i in range(n):
        r.target_exp[i] = r.top[i]


cdef bint log_softmax_rows(
    const Job* job, Operation operation, Py_ssize_t unit, real* scratch
) noexcept nogil:
    """log_softmax, or, without its second pass, logsumexp. False as of softmax_rows."""
    cdef real* kept = scratch + 2 * BLOCK
    cdef const real* scores = NULL
    cdef Rows r
    cdef bint untamed
    cdef Py_ssize_t i, first = unit * job.group, n = rows_in_unit(job, unit)
    for i in range(n):
        r.row_weight[i] = r.target_weight[i] = 1.0
    untamed = are_hopeless(job, first, n, &r, scratch)
    if not untamed:
        if is_short(job):
            scores = scores_of_run(job, first, n, kept + LANES * job.num_classes + CHUNK)
        top_of_rows(job, first, n, scores, &r, kept, scratch)
        untamed = find_untamed(job, &r, n, 1.0, kept[0])
    untamed_of(job, scratch)[0] = untamed
    if untamed and is_short(job):
        return False
    if untamed:
        for i in range(n):
            if r.own[i]:
                top_of_row(job, first + i, i, True, &r, scratch)
    log_softmax_step(job, operation, first, n, &r, scratch)
    if operation == LOG_SOFTMAX:
        shift_rows(job, first, n, scores, &r, kept, scratch)
    return True


cdef inline void shift_rows(
    const Job* job, Py_ssize_t first, Py_ssize_t n, const real* scores, const Rows* r, real* kept,
    real* scratch,
) noexcept nogil:
    cdef real m[LANES]
    cdef real log_sum[LANES]
    cdef const char* x
    cdef Py_ssize_t C = job.num_classes, i, b, c, width
    for i in range(n):
        m[i], log_sum[i] = <real>r.maximum[i], <real>r.log_sum[i]
    if not adds_as_rows(job):
        for i in range(0, n, 16):
            shift_sixteen(scores + i * C, C, m + i, log_sum + i, owners_of(job, scratch),
                          kept + i * C)
        store_rows(job, first, n, kept)
        return
    for i in range(n):
        x = row_of(job, job.logits, job.storage, first + i)
        for b in range(blocks_in(C)):
            c = b * BLOCK
            width = min(C - c, <Py_ssize_t>BLOCK)
            shift_block(load_block(job.storage, x, c, width, scratch), width, m[i], log_sum[i],
                        kept + i * C + c)
    store_rows(job, first, n, kept)


cdef inline void log_softmax_step(
    const Job* job, Operation operation, Py_ssize_t first, Py_ssize_t n, Rows* r, real* scratch
) noexcept nogil:
    """The scalar step of log_softmax; of logsumexp, all that is left to do."""
    cdef real result[LANES]
    cdef const char* x
    cdef int infinite = 0
    cdef Py_ssize_t i
    for i in range(n):
        r.log_sum[i] = log1p(r.others[i] / r.top[i])
    if operation == LOG_SOFTMAX:
        return
    for i in range(n):
        infinite |= not is_finite(r.maximum[i])
    for i in range(n if infinite else 0):
        x = row_of(job, job.logits, job.storage, first + i)
        # Nothing but -inf, or a +inf: the maximum is all there is to the sum.
        if not is_finite(r.maximum[i]) and not row_holds_nan(job, x, scratch):
            r.log_sum[i] = 0.0
    for i in range(n):
        result[i] = <real>(r.maximum[i] + r.log_sum[i])
    store(job, first, n, result)


cdef inline void shift_block(
    const real* x, Py_ssize_t n, real m, real log_sum, real* to
) noexcept nogil:
    cdef Py_ssize_t j
    for j in range(n):
        to[j] = (x[j] - m) - log_sum


cdef bint loss_rows(
    const Job* job, Operation operation, Py_ssize_t unit, real* scratch
) noexcept nogil:
    """As softmax_rows."""
    cdef real* kept = scratch + 2 * BLOCK
    cdef Rows r
    cdef int64_t index[LANES]
    cdef Py_ssize_t first = unit * job.group, n = rows_in_unit(job, unit)
    if not reduce_rows(job, operation, first, n, &r, index, kept, scratch):
        return False
    scalar_step(job, operation, &r, n, kept[0])
    job.partial[unit] = deliver_losses(job, first, n, r.loss)
    if job.out != NULL:
        write_rows(job, first, n, &r, index, kept, scratch)
    return True


cdef inline bint reduce_rows(
    const Job* job, Operation operation, Py_ssize_t first, Py_ssize_t n, Rows* r, int64_t* index,
    real* kept, real* scratch,
) noexcept nogil:
    """What the scalar step wants to know; kept receives exponentials.

    The sum leaves out class `index`: the target, or, of soft targets, the maximum. False as of
    softmax_rows.
    """
    cdef Py_ssize_t i
    cdef bint soft = has_soft_target(operation), untamed = True
    if soft:
        read_sample_weights(job, first, n, r)
    else:
        read_targets(job, first, n, index, r)
        untamed = exp_rows_from_target(job, first, n, r, index, kept, scratch)
        untamed_of(job, scratch)[0] = untamed
        if untamed and is_short(job):
            return False
    for i in range(n if untamed else 0):
        if soft and r.row_weight[i] == 0.0:
            reduce_to_nothing(i, r)
        elif soft or r.own[i]:
            reduce_row(job, operation, first + i, i, r, index, kept + i * job.num_classes, scratch)
    if is_smooth(job):
        gaps_of_rows(job, first, n, r, scratch)
    return True


cdef inline void reduce_to_nothing(Py_ssize_t i, Rows* r) noexcept nogil:
    """As reduce_row, for a row that counts for nothing."""
    r.others[i] = r.target_logit[i] = r.gap[i] = r.mass[i] = r.top_mass[i] = r.maximum[i] = 0.0
    r.top[i] = r.target_exp[i] = 1.0


cdef inline bint exp_rows_from_target(
    const Job* job, Py_ssize_t first, Py_ssize_t n, Rows* r, const int64_t* index, real* kept,
    real* scratch,
) noexcept nogil:
    """Exponentials in common units, and sums of them; whether there are rows they are not for."""
    cdef Py_ssize_t i
    cdef bint untamed = are_hopeless(job, first, n, r, scratch)
    if untamed:
        for i in range(n):
            r.others[i] = r.target_exp[i] = 1.0
    else:
        exp_rows(job, first, n, kept, scratch)
        take_targets(job, n, r, index, kept)
        sum_rows(job, n, kept, r.others)
        untamed = find_untamed(job, r, n, job.tame_scale, kept[0])
    relate_to_targets(job, first, n, r, index, scratch)
    return untamed


cdef inline void relate_to_targets(
    const Job* job, Py_ssize_t first, Py_ssize_t n, Rows* r, const int64_t* index, real* scratch
) noexcept nogil:
    """What the scalar step wants to know besides, where units are common."""
    cdef Py_ssize_t i
    cdef const char* x
    for i in range(n):
        r.maximum[i] = r.target_logit[i] = r.gap[i] = 0.0
        r.top[i] = r.target_exp[i]
    if job.options.label_smoothing != 0.0 or job.options.z_loss != 0.0:
        for i in range(n):
            x = row_of(job, job.logits, job.storage, first + i)
            r.maximum[i] = r.target_logit[i] = load_block(job.storage, x, index[i], 1, scratch)[0]


cdef inline void take_targets(
    const Job* job, Py_ssize_t n, Rows* r, const int64_t* index, real* kept
) noexcept nogil:
    """Take the targets out of the exponentials."""
    cdef real target_exp[LANES]
    cdef real* e
    cdef Py_ssize_t i
    for i in range(n):
        e = kept + i * job.num_classes + index[i]
        target_exp[i] = e[0]
        e[0] = 0
    for i in range(n):
        r.target_exp[i] = target_exp[i]


cdef void reduce_row(
    const Job* job, Operation operation, Py_ssize_t row, Py_ssize_t i, Rows* r, int64_t* index,
    real* kept, real* scratch,
) noexcept nogil:
    """As reduce_rows, for a row with a reference of its own."""
    cdef const char* x = row_of(job, job.logits, job.storage, row)
    cdef real m = largest_of_row(job, x, scratch)
    cdef Block block
    cdef Py_ssize_t b
    r.maximum[i] = m
    r.gap[i] = r.mass[i] = r.top_mass[i] = 0.0
    if has_soft_target(operation):
        index[i] = find_in_row(job, x, m, scratch)
        for b in range(blocks_in(job.num_classes)):
            gaps_of_block(job, row, b, m, index[i], &block, scratch)
            r.gap[i] += block.gap
            r.mass[i] += block.mass
            r.top_mass[i] += block.top_mass
    r.target_logit[i] = load_block(job.storage, x, index[i], 1, scratch)[0]
    r.others[i] = exp_row(job, x, index[i], m, kept, scratch)
    add_exponentials(job, r, i, 1, m)


cdef void gaps_of_block(
    const Job* job, Py_ssize_t row, Py_ssize_t b, real m, Py_ssize_t index, Block* block,
    real* scratch,
) noexcept nogil:
    """sum w_c t_c (m - x_c), the sum of w_c t_c without the maximum, and its w_k t_k."""
    cdef Py_ssize_t c = b * BLOCK, n = min(job.num_classes - c, <Py_ssize_t>BLOCK)
    cdef Py_ssize_t size = itemsize(job.other_storage)
    cdef const real* x = load_block(
        job.storage, row_of(job, job.logits, job.storage, row), c, n, scratch)
    cdef const char* targets = row_of(job, job.other, job.other_storage, row)
    cdef const char* later = targets + (c + min(job.group * job.row_step, <Py_ssize_t>AHEAD)) * size
    cdef const real* t = load_block(job.other_storage, targets, c, n, scratch + BLOCK)
    cdef const real* weight = NULL if job.weight == NULL else <const real*>job.relative_weight + c
    soft_block(job, x, t, weight, n, index - c, m, block, later, CHUNK * size)
    block.gap *= job.largest_weight
    block.mass *= job.largest_weight
    block.top_mass *= job.largest_weight


cdef inline double gap_of_block(
    const Job* job, const char* x, Py_ssize_t b, real m, real* scratch
) noexcept nogil:
    """sum of w_c (m - x_c), w_c relative."""
    cdef Py_ssize_t c = b * BLOCK, n = min(job.num_classes - c, <Py_ssize_t>BLOCK)
    cdef const real* weight = NULL if job.weight == NULL else <const real*>job.relative_weight + c
    return gap_block(load_block(job.storage, x, c, n, scratch), weight, n, m)


cdef inline void gaps_of_rows(
    const Job* job, Py_ssize_t first, Py_ssize_t n, Rows* r, real* scratch
) noexcept nogil:
    """As gap_of_block, of whole rows, and the weights as they are."""
    cdef real m[LANES]
    cdef real sums[LANES]
    cdef const real* weight = <const real*>job.relative_weight
    cdef const char* x
    cdef Py_ssize_t C = job.num_classes, i, b
    for i in range(n):
        m[i] = <real>r.maximum[i]
        r.gap[i] = 0.0
    for i in range(n if adds_as_rows(job) else 0):
        x = row_of(job, job.logits, job.storage, first + i)
        for b in range(blocks_in(C)):
            r.gap[i] += gap_of_block(job, x, b, m[i], scratch)
    for i in range(0, 0 if adds_as_rows(job) else n, 16):
        gaps_of_sixteen(job, first + i, min(n - i, <Py_ssize_t>16), m + i, sums + i,
                        scratch)
    for i in range(n):
        if not adds_as_rows(job):
            r.gap[i] = sums[i]
            if not is_finite(sums[i]):
                x = row_of(job, job.logits, job.storage, first + i)
                r.gap[i] = wide_gap(load_block(job.storage, x, 0, C, scratch), 1, weight, C,
                                    m[i])
        r.gap[i] *= job.largest_weight


cdef inline void gaps_of_sixteen(
    const Job* job, Py_ssize_t first, Py_ssize_t n, const real* m, real* sums,
    real* scratch,
) noexcept nogil:
    """Of n short rows, 16 at most."""
    cdef real* terms = terms_of(job, scratch)
    cdef Py_ssize_t C = job.num_classes, c, width, b
    spread_sixteen(terms, C, m, owners_of(job, scratch))
    for b in range(blocks_in(n * C)):
        c = b * BLOCK
        width = min(n * C - c, <Py_ssize_t>BLOCK)
        gap_run(load_block(job.storage, job.logits, first * C + c, width, scratch),
                weights_of(job, scratch) + c, width, terms + c)
    sum_eight(terms, C, sums)
    sum_eight(terms + 8 * C, C, sums + 8)


cdef inline void write_rows(
    const Job* job, Py_ssize_t first, Py_ssize_t n, const Rows* r, const int64_t* index, real* kept,
    real* scratch,
) noexcept nogil:
    cdef real left_out[LANES]
    cdef Py_ssize_t C = job.num_classes, i
    cdef int dead = 0
    if job.other != NULL or (is_smooth(job) and adds_as_rows(job)):
        for i in range(n):
            write_row(job, first + i, i, r, index[i], kept + i * C, scratch)
    else:
        for i in range(n):
            dead |= r.row_weight[i] == 0.0
        if dead:
            for i in range(n):
                if r.row_weight[i] == 0.0:
                    memset(kept + i * C, 0, C * sizeof(real))
        scale_rows(job, n, kept, r, scratch)
        for i in range(n):
            left_out[i] = <real>r.left_out[i]
        for i in range(n):
            kept[i * C + index[i]] = left_out[i]
    store_rows(job, first, n, kept)


cdef inline void write_row(
    const Job* job, Py_ssize_t row, Py_ssize_t i, const Rows* r, Py_ssize_t index, real* e,
    real* scratch,
) noexcept nogil:
    cdef Py_ssize_t b
    if r.row_weight[i] == 0.0:
        memset(e, 0, job.num_classes * sizeof(real))
        return
    for b in range(blocks_in(job.num_classes)):
        write_block(job, row, b, i, r, e + b * BLOCK, scratch)
    e[index] = <real>r.left_out[i]


cdef inline void write_block(
    const Job* job, Py_ssize_t row, Py_ssize_t b, Py_ssize_t i, const Rows* r, real* e,
    real* scratch,
) noexcept nogil:
    """From exponentials to the gradient: factor * e_c - spread * w_c t_c."""
    cdef Py_ssize_t c = b * BLOCK, n = min(job.num_classes - c, <Py_ssize_t>BLOCK), j
    cdef const real* t
    cdef const real* w = <const real*>job.relative_weight + c
    cdef double spread = r.spread[i] * job.largest_weight
    cdef real f = narrow_factor(e, n, 1, r.factor[i]), on_target, on_all = <real>spread
    if job.other == NULL and job.weight == NULL:
        for j in range(n):
            e[j] = e[j] * f - on_all
    elif job.other == NULL:
        for j in range(n):
            e[j] = e[j] * f - on_all * w[j]
    else:
        on_target = <real>(spread * (1.0 - job.options.label_smoothing))
        on_all = <real>(spread * job.options.label_smoothing / job.num_classes)
        t = load_block(job.other_storage, row_of(job, job.other, job.other_storage, row), c, n,
                       scratch)
        if job.weight == NULL:
            for j in range(n):
                e[j] = e[j] * f - (on_target * t[j] + on_all)
        else:
            for j in range(n):
                e[j] = e[j] * f - w[j] * (on_target * t[j] + on_all)


cdef inline void row_unit(
    const Job* job, Operation operation, Py_ssize_t unit, real* scratch
) noexcept nogil:
    if operation == SOFTMAX:
        softmax_rows(job, unit, scratch)
    elif operation == LOG_SOFTMAX or operation == LOGSUMEXP:
        log_softmax_rows(job, operation, unit, scratch)
    elif is_backward(operation):
        backward_rows(job, operation, unit, scratch)
    elif operation == ENTROPY:
        entropy_rows(job, unit, scratch)
    else:
        loss_rows(job, operation, unit, scratch)
