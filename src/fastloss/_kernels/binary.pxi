# Binary losses: every element a score of its own, against a target of its own.
#
# All comes from one exponential, that of -|x|, which cannot overflow: softplus and sigmoid of x and
# of -x. None of them is a difference, so that they are exact however confident an element is.
# An element's bits do not depend on what lies around it: all is taken in chunks, of which the last
# is filled up. Scratch: parts of scores, targets, weights, losses and gradients.

cdef enum:
    PART = 512  # elements: as many chunks as a sum stays in float32 for
    PARTS = 8  # in a unit of work


cdef inline Py_ssize_t binary_numbers() noexcept nogil:
    """Of scratch."""
    return (5 + PARTS) * PART


cdef inline void read_numbers(const integer* source, Py_ssize_t n, real* to) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        to[i] = <real>source[i]


cdef inline void load_targets(
    const Job* job, Py_ssize_t start, Py_ssize_t n, real* to
) noexcept nogil:
    """Targets of any type in the compute type."""
    cdef const real* block
    cdef const char* t = job.target
    if job.other != NULL:
        block = load_block(job.other_storage, job.other, start, n, to)
        if block != to:
            memcpy(to, block, n * sizeof(real))
    elif job.target_kind == 0:
        read_numbers((<const int8_t*>t) + start, n, to)
    elif job.target_kind == 1:
        read_numbers((<const int16_t*>t) + start, n, to)
    elif job.target_kind == 2:
        read_numbers((<const int32_t*>t) + start, n, to)
    elif job.target_kind == 3:
        read_numbers((<const int64_t*>t) + start, n, to)
    elif job.target_kind == 4:
        read_numbers((<const uint8_t*>t) + start, n, to)
    elif job.target_kind == 5:
        read_numbers((<const uint16_t*>t) + start, n, to)
    elif job.target_kind == 6:
        read_numbers((<const uint32_t*>t) + start, n, to)
    else:
        read_numbers((<const uint64_t*>t) + start, n, to)


cdef inline void weigh_elements(
    const Job* job, Py_ssize_t start, Py_ssize_t n, real* positive, real* negative
) noexcept nogil:
    """The weights of elements: what counts for a target of 1, and what for 0.

    Elements next to each other are taken together where the weight of their class, or that of
    their row, is the same.
    """
    cdef const real* weight = <const real*>job.relative_weight
    cdef Py_ssize_t labels = job.labels, inner = job.inner, i = 0, j, o, c, run
    cdef Py_ssize_t class_step = 1 if inner == 1 else 0, row_step = 1 - class_step
    cdef const double* s
    cdef double one = 1.0
    while i < n:
        o, c = (start + i) // (labels * inner), (start + i) // inner % labels
        j = (start + i) % inner
        run = min(n - i, labels - c if inner == 1 else inner - j)
        s = &one if job.sample_weight == NULL else job.sample_weight + o * inner + j
        for j in range(run):
            positive[i + j] = <real>1.0 if weight == NULL else weight[c + j * class_step]
            negative[i + j] = <real>1.0 if weight == NULL else weight[labels + c + j * class_step]
        for j in range(run if job.sample_weight != NULL else 0):
            positive[i + j] = <real>(positive[i + j] * s[j * row_step])
            negative[i + j] = <real>(negative[i + j] * s[j * row_step])
        i += run


cdef inline void sigmoid_chunk(
    const real* x, real* large, real* small, real* log
) noexcept nogil:
    """Of the two sigmoids, of x and of -x, the larger and the smaller, and log(1 + exp(-|x|)).

    The last two in units of 2**-SHIFT, as exponentials are.
    """
    cdef real own[TEMPER]
    cdef real e[CHUNK]
    cdef real magic = magic_of(<real>0.0, untempered(x[0]))
    cdef real lowest = bound(lowest_of(magic, untempered(x[0])))
    cdef real power = power_of(magic), unit = <real>1.0 / power, narrow
    cdef Py_ssize_t j
    memcpy(own, untempered(x[0]), sizeof(own))
    for j in range(CHUNK):
        e[j] = exponential(x[j] if x[j] < 0 else -x[j], <real>0.0, magic, lowest, own)
    for j in range(CHUNK):
        log[j] = log1p(power * e[j])
    for j in range(CHUNK):
        narrow = power * e[j]
        # Of a number so small the logarithm is no other number, and might be a subnormal one.
        log[j] = e[j] if narrow < <real>1e-17 else unit * log[j]
        large[j] = <real>1.0 / (<real>1.0 + narrow)
        small[j] = e[j] * large[j]


cdef inline real positive_part(real x) noexcept nogil:
    return x if x > 0 else <real>0.0


cdef inline void binary_cross_entropy_chunk(
    const real* x, const real* t, const real* positive, const real* negative, real scale,
    real* loss, real* g,
) noexcept nogil:
    """Softplus of x is that of -|x|, and x where that is positive."""
    cdef real large[CHUNK]
    cdef real small[CHUNK]
    cdef real log[CHUNK]
    cdef real power = power_of(scale), yes, no
    cdef Py_ssize_t j
    sigmoid_chunk(x, large, small, log)
    for j in range(CHUNK):
        yes, no = positive[j] * t[j], negative[j] * (<real>1.0 - t[j])
        loss[j] = (times(yes, log[j]) + times(no, log[j])) * power + (
            times(yes, positive_part(-x[j])) + times(no, positive_part(x[j])))
        yes, no = -scale * yes, scale * no
        g[j] = times(no if x[j] > 0 else yes, large[j]) + (
            times(yes if x[j] > 0 else no, small[j]) * power)


cdef inline void sigmoid_focal_chunk(
    const real* x, const real* t, const real* positive, const real* negative, real scale,
    double gamma, real* loss, real* g,
) noexcept nogil:
    """q**gamma times binary cross-entropy, q = 1 - p, p the probability that the target has."""
    cdef real large[CHUNK]
    cdef real small[CHUNK]
    cdef real log[CHUNK]
    cdef real p[CHUNK]
    cdef real q[CHUNK]
    cdef real factor[CHUNK]
    cdef real power = power_of(scale), yes, no, weight, rest, ratio, further
    cdef Py_ssize_t j
    sigmoid_chunk(x, large, small, log)
    for j in range(CHUNK):
        yes, no = t[j], <real>1.0 - t[j]
        yes, no = yes if x[j] > 0 else no, no if x[j] > 0 else yes  # yes goes with the larger one
        p[j] = yes * large[j] + no * (power * small[j])
        q[j] = no * large[j] + yes * (power * small[j])
    raise_to(q, p, CHUNK, gamma, factor)
    for j in range(CHUNK):
        yes, no = t[j], <real>1.0 - t[j]
        weight = times(times(yes, positive[j]) + times(no, negative[j]), factor[j])
        rest = times(yes, positive_part(-x[j])) + times(no, positive_part(x[j]))
        ratio = large[j] * (power * small[j]) / q[j] if q[j] > 0 else <real>0.0
        further = times(<real>gamma * (no - yes) * ratio, power * log[j] + rest)
        loss[j] = times(weight, log[j]) * power + times(weight, rest)
        weight *= scale
        yes, no = -weight * yes, weight * no
        g[j] = times(no if x[j] > 0 else yes, large[j]) + (
            times(yes if x[j] > 0 else no, small[j]) * power) + times(weight, further)


cdef inline double binary_part(
    const Job* job, Operation operation, Py_ssize_t start, Py_ssize_t n, real* g, real* scratch
) noexcept nogil:
    """The losses and gradients of at most PART elements; the sum of the losses."""
    cdef real* x = scratch
    cdef real* t = x + PART
    cdef real* positive = t + PART
    cdef real* negative = positive + PART
    cdef real* loss = negative + PART
    cdef real target_share = <real>(1.0 - job.options.label_smoothing)
    cdef real uniform = <real>(0.5 * job.options.label_smoothing)
    cdef const real* block = load_block(job.storage, job.logits, start, n, x)
    cdef Py_ssize_t i, j, chunks = (n + CHUNK - 1) // CHUNK
    load_targets(job, start, n, t)
    if n < PART:
        memcpy(loss, block, n * sizeof(real))
        memcpy(x, loss, n * sizeof(real))
        memset(x + n, 0, (PART - n) * sizeof(real))
        memset(t + n, 0, (PART - n) * sizeof(real))
        block = x
    if job.relative_weight != NULL or job.sample_weight != NULL:
        weigh_elements(job, start, n, positive, negative)
    for j in range(PART if job.options.label_smoothing != 0.0 else 0):
        t[j] = target_share * t[j] + uniform
    for i in range(chunks):
        j = i * CHUNK
        if operation == BINARY_CROSS_ENTROPY:
            binary_cross_entropy_chunk(
                block + j, t + j, positive + j, negative + j, <real>job.scale, loss + j, g + j)
        else:
            sigmoid_focal_chunk(
                block + j, t + j, positive + j, negative + j, <real>job.scale, job.options.gamma,
                loss + j, g + j)
    for j in range(n, PART):
        loss[j] = 0
    if job.losses != NULL:
        memcpy(job.losses + start * sizeof(real), loss, n * sizeof(real))
    return sum_part(loss)


cdef inline double sum_part(const real* loss) noexcept nogil:
    """In float64 where it leaves the range of the losses."""
    cdef real lane[CHUNK]
    cdef double total
    cdef Py_ssize_t i, j
    for j in range(CHUNK):
        lane[j] = 0
    for i in range(PART // CHUNK):
        for j in range(CHUNK):
            lane[j] += loss[i * CHUNK + j]
    total = fold(lane)
    if not is_finite(total):
        total = 0.0
        for i in range(PART):
            total += loss[i]
    return total


cdef void binary_unit(
    const Job* job, Operation operation, Py_ssize_t unit, real* scratch
) noexcept nogil:
    cdef real* g = scratch + 5 * PART
    cdef Py_ssize_t i, part, first = unit * job.group, n = rows_in_unit(job, unit)
    cdef double total = 0.0
    for i in range(2 * PART):  # weights, unless there are others
        scratch[2 * PART + i] = 1
    for part in range((n + PART - 1) // PART):
        i = part * PART
        total += binary_part(
            job, operation, first + i, min(n - i, <Py_ssize_t>PART), g + i, scratch)
    job.partial[unit] = total
    if job.out != NULL:
        store(job, first, n, g)
