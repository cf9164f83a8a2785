# The scalar step: from what a row was reduced to, its loss and the coefficients of its gradient.

cdef inline void add_exponentials(
    const Job* job, Rows* r, Py_ssize_t first, Py_ssize_t n, real unused
) noexcept nogil:
    """The exponentials of the maximum and of the target, in the units of the sum."""
    cdef const real* temper = temper_of(job, unused)
    cdef real m, pivot, magic, lowest
    cdef Py_ssize_t i
    for i in range(first, first + n):
        m = <real>r.maximum[i]
        pivot, magic = pivot_of(m, temper), magic_of(m, temper)
        lowest = lowest_of(magic, temper)
        r.top[i] = exponential(m, pivot, magic, lowest, temper)
        r.target_exp[i] = exponential(<real>r.target_logit[i], pivot, magic, lowest, temper)


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
        d = (r.target_logit[i] - r.maximum[i]) * job.cooling
        total = r.others[i] + r.target_exp[i]
        inverse = 1.0 / total
        log_sum = log1p((r.others[i] + (r.target_exp[i] - r.top[i])) / r.top[i])
        lse = r.maximum[i] * job.cooling + log_sum
        z_slope = 2.0 * job.options.z_loss * lse
        loss = times(b, log_sum - d) + spread * log_sum
        loss += uniform * (r.gap[i] * job.cooling) + 0.5 * z_slope * lse
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
        r.loss[i] = times(
            weight, <double>log_sum - (r.target_logit[i] - r.maximum[i]) * job.cooling)
        weight *= job.scale
        inverse = 1.0 / (r.others[i] + r.target_exp[i])
        r.factor[i] = times(weight, inverse / power)
        r.left_out[i] = times(weight, 0.0 - r.others[i] * inverse)


cdef inline void probability_step(
    const Job* job, Rows* r, Py_ssize_t n, real unused
) noexcept nogil:
    """A loss phi(log p) of the target's probability p: the gradient is -phi' times plain_step's."""
    cdef double p[LANES]
    cdef double q[LANES]
    cdef double minus_log_p[LANES]
    cdef double phi[LANES]
    cdef double slope[LANES]
    cdef double inverse, weight, power = power_of(unused), sure = 1e-8 if real is float else 1e-16
    cdef real log_sum
    cdef Py_ssize_t i
    for i in range(n):
        inverse = 1.0 / (r.others[i] + r.target_exp[i])
        p[i] = r.target_exp[i] * inverse
        q[i] = r.others[i] * inverse
        r.factor[i] = inverse / power
        log_sum = log1p(<real>(r.others[i] + (r.target_exp[i] - r.top[i])) / <real>r.top[i])
        minus_log_p[i] = <double>log_sum - (
            r.target_logit[i] - r.maximum[i]) * job.cooling
        # Of a q so small the logarithm is no other number, and might be a subnormal one.
        minus_log_p[i] = q[i] if q[i] < sure else minus_log_p[i]
    if job.options.gamma != 0.0:
        focal_step(p, q, minus_log_p, n, job.options.gamma, phi, slope)
    else:
        poly_step(p, q, minus_log_p, n, job.options.epsilon, phi, slope)
    for i in range(n):
        weight = r.row_weight[i] * r.target_weight[i]
        r.loss[i] = times(weight, phi[i])
        weight *= job.scale
        r.factor[i] = times(weight, slope[i] * r.factor[i])
        r.left_out[i] = times(weight, 0.0 - slope[i] * q[i])


cdef inline void focal_step(
    const double* p, const double* q, const double* minus_log_p, Py_ssize_t n, double gamma,
    double* phi, double* slope,
) noexcept nogil:
    """q**gamma times -log p, q = 1 - p."""
    cdef double ratio
    cdef Py_ssize_t i
    raise_to(q, p, n, gamma, phi)
    for i in range(n):
        ratio = minus_log_p[i] / q[i] if q[i] > 0.0 else 1.0  # to which it tends
        slope[i] = phi[i] * (1.0 + gamma * times(p[i], ratio))
        phi[i] *= minus_log_p[i]


cdef inline void poly_step(
    const double* p, const double* q, const double* minus_log_p, Py_ssize_t n, double epsilon,
    double* phi, double* slope,
) noexcept nogil:
    """-log p + epsilon q, q = 1 - p."""
    cdef Py_ssize_t i
    for i in range(n):
        phi[i] = minus_log_p[i] + epsilon * q[i]
        slope[i] = 1.0 + epsilon * p[i]


cdef inline void raise_to(
    const real* q, const real* p, Py_ssize_t n, double gamma, real* power
) noexcept nogil:
    """q**gamma of probabilities q = 1 - p, by products if there are few."""
    cdef real own[TEMPER]
    cdef real magic, log_q, exponent = <real>gamma, most = 1e38 if real is float else 1e308
    cdef int whole = <int>gamma if gamma <= 8.0 else 0, j
    cdef Py_ssize_t i
    if whole == gamma:
        for i in range(n):
            power[i] = 1
        for j in range(whole):
            for i in range(n):
                power[i] *= q[i]
        return
    memcpy(own, untempered(q[0]), sizeof(own))
    magic = magic_of(<real>0.0, own)
    for i in range(n):
        log_q = -log1p(below(p[i] / q[i], most))
        power[i] = exponential(
            exponent * log_q, <real>0.0, magic, lowest_of(magic, own), own)
        power[i] *= power_of(magic)


cdef inline void cross_entropy_soft_step(const Job* job, Rows* r, Py_ssize_t n) noexcept nogil:
    cdef double log_sum, lse, z_slope, total, mass, a, loss, weight, left_out
    cdef double power = power_of_job(job)
    cdef Py_ssize_t i
    for i in range(n):
        mass = r.mass[i] + r.top_mass[i]
        log_sum = log1p(r.others[i] / r.top[i])
        lse = r.maximum[i] * job.cooling + log_sum
        z_slope = 2.0 * job.options.z_loss * lse
        loss = mass * log_sum + r.gap[i] * job.cooling + 0.5 * z_slope * lse
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
    return (
        job.options.label_smoothing == 0.0 and job.options.z_loss == 0.0
        and not is_of_probability(job)
    )


cdef inline bint is_of_probability(const Job* job) noexcept nogil:
    """Whether the loss is another function of the target's probability than -log p."""
    return job.options.gamma != 0.0 or job.options.epsilon != 0.0


cdef inline void scalar_step(
    const Job* job, Operation operation, Rows* r, Py_ssize_t n, real unused
) noexcept nogil:
    """Which loss it is: nothing else that rows and tiles go through depends on that."""
    if has_soft_target(operation):
        cross_entropy_soft_step(job, r, n)
    elif is_plain(job):
        plain_step(job, r, n, unused)
    elif is_of_probability(job):
        probability_step(job, r, n, unused)
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
