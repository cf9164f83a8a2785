# Long rows, fewer of them than threads: shared out among these, block by block.
#
# In each stage every thread takes its share of the blocks, by the functions that rows.pxi and
# backward.pxi take whole rows with. In between, one thread puts together what was found, in the
# order of the blocks: the bits are those of rows that are not shared.

cdef inline bint may_be_shared(const Job* job, Operation operation) noexcept nogil:
    return (
        job.layout == ROWS and job.group == 1 and job.rows <= LANES
        and not is_nll(operation) and operation != ENTROPY
    )


cdef inline Stage first_stage(Shared* shared, real* scratch) noexcept nogil:
    cdef const Job* job = shared.job
    cdef Rows* r = &shared.r
    cdef Py_ssize_t i
    for i in range(job.rows):
        shared.index[i] = -1
        r.row_weight[i] = r.target_weight[i] = 1.0
    if job.target != NULL:
        read_targets(job, 0, job.rows, shared.index, r)
    elif has_losses(shared.operation):
        read_sample_weights(job, 0, job.rows, r)
    for i in range(job.rows):
        r.own[i] = r.row_weight[i] != 0.0
        reduce_to_nothing(i, r)
    if is_backward(shared.operation) or is_flat(shared.job, shared.operation):
        return COMMON_UNITS
    return MAXIMA


cdef inline Stage next_stage(Shared* shared, real* scratch) noexcept nogil:
    """What is left to do after a stage, which is put together here."""
    cdef const Job* job = shared.job
    cdef bint known  # the maxima
    if shared.stage == FIRST:
        return first_stage(shared, scratch)
    if shared.stage == WRITE:
        return DONE
    if shared.stage == MAXIMA:
        join_maxima(shared, scratch)
        return OWN_UNITS
    if shared.stage == COMMON_UNITS:
        if join_in_common_units(shared, scratch):
            known = is_backward(shared.operation) or is_log(shared.operation)
            return OWN_UNITS if known else MAXIMA
    elif shared.stage == OWN_UNITS:
        join_in_own_units(shared, scratch)
    else:
        join_gaps(shared)
    if is_smooth(job) and shared.stage != GAPS:
        return GAPS
    finish_rows(shared, scratch)
    return WRITE if job.out != NULL and shared.operation != LOGSUMEXP else DONE


cdef inline void sum_up(Shared* shared, Py_ssize_t i) noexcept nogil:
    """The sum of a row, and, where that leaves out the maximum, what top_of_row says."""
    cdef Rows* r = &shared.r
    cdef const Block* block = shared.block + i * shared.blocks
    cdef Py_ssize_t b
    r.others[i] = 0.0
    if is_log(shared.operation):
        begin_top(r, i)
    for b in range(shared.blocks):
        if is_log(shared.operation):
            join_top(r, i, block + b)
        else:
            r.others[i] += block[b].sum


cdef inline bint join_in_common_units(Shared* shared, real* scratch) noexcept nogil:
    """Whether there are rows that common units are not for."""
    cdef const Job* job = shared.job
    cdef Rows* r = &shared.r
    cdef bint found = False
    cdef Py_ssize_t i, n = job.rows
    for i in range(n):
        sum_up(shared, i)
    if is_backward(shared.operation):
        if shared.operation == LOG_SOFTMAX_BACKWARD:
            join_maxima(shared, scratch)
        for i in range(n):
            r.own[i] = is_huge(r.others[i], scratch[0])
            found |= r.own[i]
        return found
    if not has_losses(shared.operation):
        for i in range(n):
            r.target_exp[i] = r.others[i] if shared.operation == SOFTMAX else r.top[i]
        return find_untamed(job, r, n, 1.0, scratch[0])
    found = find_untamed(job, r, n, job.tame_scale, scratch[0])
    relate_to_targets(job, 0, n, r, shared.index, scratch)
    return found


cdef inline void join_maxima(Shared* shared, real* scratch) noexcept nogil:
    """The maxima, and where in its row each is, if it is what the sum leaves out."""
    cdef const Job* job = shared.job
    cdef const Block* block
    cdef double m
    cdef Py_ssize_t i, b, n, k
    for i in range(job.rows):
        if not shared.r.own[i]:
            continue
        block = shared.block + i * shared.blocks
        m = -INFINITY
        for b in range(shared.blocks):
            m = block[b].maximum if block[b].maximum > m else m
        shared.r.maximum[i] = m
        if not has_soft_target(shared.operation):
            continue
        shared.index[i] = 0
        for b in range(shared.blocks):
            n = min(job.num_classes - b * BLOCK, <Py_ssize_t>BLOCK)
            k = n
            if block[b].maximum == m:
                k = find(load_block(job.storage, row_of(job, job.logits, job.storage, i), b * BLOCK,
                                    n, scratch), n, <real>m)
            if k < n:
                shared.index[i] = b * BLOCK + k
                break


cdef inline void join_in_own_units(Shared* shared, real* scratch) noexcept nogil:
    cdef const Job* job = shared.job
    cdef Rows* r = &shared.r
    cdef const Block* block
    cdef Py_ssize_t i, b
    for i in range(job.rows):
        if not r.own[i]:
            continue
        sum_up(shared, i)
        if not has_losses(shared.operation):
            continue
        r.gap[i] = r.mass[i] = r.top_mass[i] = 0.0
        for b in range(shared.blocks):
            block = shared.block + i * shared.blocks + b
            r.gap[i] += block.gap
            r.mass[i] += block.mass
            r.top_mass[i] += block.top_mass
        r.target_logit[i] = load_block(
            job.storage, row_of(job, job.logits, job.storage, i), shared.index[i], 1, scratch)[0]
        add_exponentials(job, r, i, 1, scratch[0])


cdef inline void join_gaps(Shared* shared) noexcept nogil:
    cdef Py_ssize_t i, b
    for i in range(shared.job.rows):
        shared.r.gap[i] = 0.0
        for b in range(shared.blocks):
            shared.r.gap[i] += shared.block[i * shared.blocks + b].gap
        shared.r.gap[i] *= shared.job.largest_weight


cdef inline void finish_rows(Shared* shared, real* scratch) noexcept nogil:
    """The scalar step."""
    cdef const Job* job = shared.job
    cdef Rows* r = &shared.r
    cdef Py_ssize_t i, n = job.rows
    if shared.operation == SOFTMAX:
        for i in range(n):
            r.factor[i] = 1.0 / (r.others[i] * power_of(scratch[0]))
    elif has_losses(shared.operation):
        scalar_step(job, shared.operation, r, n, scratch[0])
        for i in range(n):
            job.partial[i] = deliver_losses(job, i, 1, r.loss + i)
    elif not is_backward(shared.operation):
        log_softmax_step(job, shared.operation, 0, n, r, scratch)


cdef void take_block(Shared* shared, Py_ssize_t i, Py_ssize_t b, real* scratch) noexcept nogil:
    """The stage, of block b of row i."""
    cdef const Job* job = shared.job
    cdef Operation operation = shared.operation
    cdef Py_ssize_t place = i * shared.blocks + b, size = itemsize(job.storage)
    cdef Py_ssize_t c = b * BLOCK, n = min(job.num_classes - c, <Py_ssize_t>BLOCK)
    cdef const char* row = row_of(job, job.logits, job.storage, i)
    cdef const char* later = row + (c + BLOCK) * size
    cdef const real* x = load_block(job.storage, row, c, n, scratch)
    cdef real* e = scratch + 2 * BLOCK
    cdef const real* temper = temper_of(job, scratch[0])
    cdef real m = <real>shared.r.maximum[i], pivot, magic, highest
    cdef Block* block = shared.block + place
    if shared.kept != NULL:
        e = <real*>shared.kept + place * BLOCK
    if shared.stage == WRITE:
        write_shared_block(shared, i, b, x, e, scratch)
    elif shared.stage == MAXIMA:
        block.maximum = largest(x, n)
    elif shared.stage == GAPS:
        block.gap = gap_of_block(job, row, b, <real>shared.r.maximum[i], scratch)
    elif is_backward(operation):
        block.sum = terms_of_block(job, operation, i, b, shared.stage == OWN_UNITS, scratch)
        if operation == LOG_SOFTMAX_BACKWARD and shared.stage == COMMON_UNITS:
            block.maximum = largest(load_block(job.storage, row, c, n, scratch), n)
    elif is_log(operation):
        units_of_row(m, shared.stage == OWN_UNITS, temper, &pivot, &magic, &highest)
        top_block(x, n, pivot, magic, highest, block, temper, later, CHUNK * size)
    elif shared.stage == COMMON_UNITS:
        exp_run(x, n, e, temper, later, CHUNK * size)
        if c <= shared.index[i] < c + n:
            shared.r.target_exp[i] = e[shared.index[i] - c]
            e[shared.index[i] - c] = 0
        block.sum = sum_kept(e, n)
    else:
        block.gap = block.mass = block.top_mass = 0.0
        if has_soft_target(operation):
            gaps_of_block(job, i, b, m, shared.index[i], block, scratch)
        block.sum = exp_block(
            x, n, shared.index[i] - c, pivot_of(m, temper), magic_of(m, temper), e, temper, later,
            CHUNK * size)


cdef inline void write_shared_block(
    Shared* shared, Py_ssize_t i, Py_ssize_t b, const real* x, real* e, real* scratch
) noexcept nogil:
    cdef const Job* job = shared.job
    cdef const Rows* r = &shared.r
    cdef Operation operation = shared.operation
    cdef Py_ssize_t c = b * BLOCK, n = min(job.num_classes - c, <Py_ssize_t>BLOCK)
    if operation == LOG_SOFTMAX:
        shift_block(x, n, <real>r.maximum[i], <real>r.log_sum[i], e)
    elif is_backward(operation):
        backward_block(job, operation, i, b, r.own[i], <real>r.maximum[i], r.others[i], e, scratch)
    elif r.row_weight[i] == 0.0:
        memset(e, 0, n * sizeof(real))
    else:
        if job.other != NULL or is_smooth(job):
            write_block(job, i, b, i, r, e, scratch)
        else:
            scale_row(e, n, r.factor[i])
        if c <= shared.index[i] < c + n:
            e[shared.index[i] - c] = <real>r.left_out[i]
    store(job, i * job.num_classes + c, n, e)


cdef inline void take_blocks(
    Shared* shared, Py_ssize_t first, Py_ssize_t last, real* scratch
) noexcept nogil:
    cdef Py_ssize_t place, i
    for place in range(first, last):
        i = place // shared.blocks
        if shared.r.own[i] or shared.stage in (COMMON_UNITS, GAPS, WRITE):
            take_block(shared, i, place % shared.blocks, scratch)
