# Targets and weights: read as they come, and checked.

cdef inline void widen(const integer* source, Py_ssize_t n, int64_t* to) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        if integer is uint64_t:  # what does not fit is out of range, and stays so
            to[i] = <int64_t>min(source[i], <uint64_t>0x7fffffffffffffff)
        else:
            to[i] = <int64_t>source[i]


cdef void read_indices(const Job* job, Py_ssize_t first, Py_ssize_t n, int64_t* to) noexcept nogil:
    cdef const char* t = job.target
    if job.target_kind == 0:
        widen((<const int8_t*>t) + first, n, to)
    elif job.target_kind == 1:
        widen((<const int16_t*>t) + first, n, to)
    elif job.target_kind == 2:
        widen((<const int32_t*>t) + first, n, to)
    elif job.target_kind == 3:
        widen((<const int64_t*>t) + first, n, to)
    elif job.target_kind == 4:
        widen((<const uint8_t*>t) + first, n, to)
    elif job.target_kind == 5:
        widen((<const uint16_t*>t) + first, n, to)
    elif job.target_kind == 6:
        widen((<const uint32_t*>t) + first, n, to)
    else:
        widen((<const uint64_t*>t) + first, n, to)


cdef void read_targets(
    const Job* job, Py_ssize_t first, Py_ssize_t n, int64_t* y, Rows* r
) noexcept nogil:
    """Targets, and the weights of their rows: 0 where a row counts for nothing."""
    cdef double smoothing = job.options.label_smoothing
    cdef bint smooth = job.options.z_loss != 0.0 or (smoothing != 0.0 and job.largest_weight != 0.0)
    cdef double target_share = 1.0 - smoothing
    cdef Py_ssize_t i
    cdef bint used
    read_indices(job, first, n, y)
    for i in range(n):
        # Targets were checked, but another thread may have changed them since.
        used = (y[i] != job.options.ignore_index) & (<uint64_t>y[i] < <uint64_t>job.num_classes)
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
            r.row_weight[i] = 0.0 if target_share * r.target_weight[i] == 0.0 else r.row_weight[i]


cdef void read_sample_weights(
    const Job* job, Py_ssize_t first, Py_ssize_t n, Rows* r
) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        r.row_weight[i] = 1.0 if job.sample_weight == NULL else job.sample_weight[first + i]


cdef Py_ssize_t check_block(const Job* job, Py_ssize_t block, double* total) noexcept nogil:
    """The first bad target of a block, or -1; then total receives the sum of the weights."""
    cdef int64_t target[LANES]
    cdef double lane[LANES]
    cdef double weight
    cdef Py_ssize_t chunk, row, i, n, first = block * CHECK_BLOCK
    cdef Py_ssize_t last = min(job.rows, first + CHECK_BLOCK)
    cdef int bad
    for i in range(LANES):
        lane[i] = 0.0
    for chunk in range((last - first + LANES - 1) // LANES):
        row = first + chunk * LANES
        n = min(last - row, <Py_ssize_t>LANES)
        read_indices(job, row, n, target)
        bad = 0
        for i in range(n):
            bad |= (target[i] != job.options.ignore_index) & (
                <uint64_t>target[i] >= <uint64_t>job.num_classes)
        if bad:
            for i in range(n):
                if target[i] != job.options.ignore_index and not 0 <= target[i] < job.num_classes:
                    return row + i
        if job.weight == NULL and job.sample_weight == NULL:
            for i in range(n):
                lane[i] += 1.0 if target[i] != job.options.ignore_index else 0.0
            continue
        for i in range(n):
            if target[i] != job.options.ignore_index:
                weight = 1.0 if job.sample_weight == NULL else job.sample_weight[row + i]
                lane[i] += weight if job.weight == NULL else weight * job.weight[target[i]]
    total[0] = fold_lanes(lane)
    return -1
