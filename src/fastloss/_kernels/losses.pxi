# The scalar step: from what a row was reduced to, its loss and the coefficients of its gradient.

cdef inline void add_exponentials(
    Rows* r, Py_ssize_t first, Py_ssize_t n, real unused
) noexcept nogil:
    """The exponentials of the maximum and of the target, in the units of the sum."""
    cdef real m, pivot, magic
    cdef Py_ssize_t i
    for i in range(first, first + n):
        m = <real>r.maximum[i]
        pivot, magic = pivot_of(m), magic_of(m)
        r.top[i] = exponential(m, pivot, magic, lowest_of(magic))
        r.target_exp[i] = exponential(<real>r.target_logit[i], pivot, magic, lowest_of(magic))


cdef inline double power_of_job(const Job* job) noexcept nogil:
    return power_of(<double>0.0) if job.storage == FLOAT64 else power_of(<float>0.0)


cdef inline double larger(double a, double b) noexcept nogil:
    a = a if a >= 0.0 else -a
    b = b if b >= 0.0 else -b
    return a if a > b else b


cdef inline double left_out_of(
    double a, double p, double others, double subtracted, double rest
) noexcept nogil:
    """a p - subtracted, or the same as rest - a (1 - p): the second unless it cancels more."""
    cdef double plain = a * p - subtracted, complement = rest - a * others
    cdef double size = larger(a * p, subtracted)
    return plain if 2.0 * size < larger(a * others, rest) else complement


cdef inline void cross_entropy_step(const Job* job, Rows* r, Py_ssize_t n) noexcept nogil:
    cdef double uniform = job.options.label_smoothing / job.num_classes
    cdef double spread = uniform * job.weight_sum
    cdef double b, d, log_sum, lse, z_slope, total, inverse, a, loss, weight, spread_y, left_out
    cdef double power = power_of_job(job)
    cdef Py_ssize_t i
    for i in range(n):
        b = (1.0 - job.options.label_smoothing) * r.target_weight[i]
        d = r.target_logit[i] - r.maximum[i]
        total = r.others[i] + r.target_exp[i]
        inverse = 1.0 / total
        log_sum = log1p((r.others[i] + (r.target_exp[i] - r.top[i])) / r.top[i])
        lse = r.maximum[i] + log_sum
        z_slope = 2.0 * job.options.z_loss * lse
        loss = times(b, log_sum - d) + spread * log_sum + uniform * r.gap[i] + 0.5 * z_slope * lse
        r.loss[i] = times(r.row_weight[i], loss)

        a = b + spread + z_slope
        spread_y = uniform * r.target_weight[i]
        left_out = left_out_of(a, r.target_exp[i] * inverse, r.others[i] * inverse, b + spread_y,
                               spread + z_slope - spread_y)
        weight = r.row_weight[i] * job.scale
        r.factor[i] = 0.0 if weight == 0.0 else weight * a * (inverse / power)
        r.spread[i] = weight * uniform
        r.left_out[i] = times(weight, left_out)


cdef inline void plain_step(
    const Job* job, Rows* r, Py_ssize_t n, real unused
) noexcept nogil:
    """As cross_entropy_step, without smoothing and z-loss; the logarithm in the compute type."""
    cdef real log_sum
    cdef double inverse, weight, power = power_of(unused)
    cdef Py_ssize_t i
    for i in range(n):
        weight = r.row_weight[i] * r.target_weight[i]
        log_sum = log1p(<real>(r.others[i] + (r.target_exp[i] - r.top[i])) / <real>r.top[i])
        r.loss[i] = times(weight, <double>log_sum - (r.target_logit[i] - r.maximum[i]))
        weight *= job.scale
        inverse = 1.0 / (r.others[i] + r.target_exp[i])
        r.factor[i] = times(weight, inverse / power)
        r.left_out[i] = times(weight, 0.0 - r.others[i] * inverse)


cdef inline void cross_entropy_soft_step(const Job* job, Rows* r, Py_ssize_t n) noexcept nogil:
    cdef double log_sum, lse, z_slope, total, mass, a, loss, weight, left_out
    cdef double power = power_of_job(job)
    cdef Py_ssize_t i
    for i in range(n):
        mass = r.mass[i] + r.top_mass[i]
        log_sum = log1p(r.others[i] / r.top[i])
        lse = r.maximum[i] + log_sum
        z_slope = 2.0 * job.options.z_loss * lse
        loss = mass * log_sum + r.gap[i] + 0.5 * z_slope * lse
        r.loss[i] = times(r.row_weight[i], loss)

        total = r.others[i] + r.top[i]
        a = mass + z_slope
        left_out = left_out_of(a, r.top[i] / total, r.others[i] / total, r.top_mass[i],
                               r.mass[i] + z_slope)
        weight = r.row_weight[i] * job.scale
        r.factor[i] = 0.0 if weight == 0.0 else weight * a / (total * power)
        r.spread[i] = weight
        r.left_out[i] = times(weight, left_out)


cdef inline bint is_plain(const Job* job) noexcept nogil:
    return job.options.label_smoothing == 0.0 and job.options.z_loss == 0.0


cdef inline void scalar_step(
    const Job* job, Operation operation, Rows* r, Py_ssize_t n, real unused
) noexcept nogil:
    """Which loss it is: nothing else that rows and tiles go through depends on that."""
    if has_soft_target(operation):
        cross_entropy_soft_step(job, r, n)
    elif is_plain(job):
        plain_step(job, r, n, unused)
    else:
        cross_entropy_step(job, r, n)


cdef double deliver_losses(
    const Job* job, Py_ssize_t first, Py_ssize_t n, const double* loss
) noexcept nogil:
    """Round row losses to the compute dtype, hand them out, sum what was handed out."""
    cdef double rounded[LANES]
    cdef Py_ssize_t i
    for i in range(LANES):
        rounded[i] = 0.0
    if job.storage == FLOAT64:
        memcpy(rounded, loss, n * sizeof(double))
    else:
        for i in range(n):
            rounded[i] = <double><float>loss[i]
    if job.losses != NULL:
        for i in range(n):
            if job.storage == FLOAT64:
                (<double*>job.losses)[first + i] = rounded[i]
            else:
                (<float*>job.losses)[first + i] = <float>rounded[i]
    return fold_lanes(rounded)
