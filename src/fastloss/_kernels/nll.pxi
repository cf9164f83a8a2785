# Negative log-likelihood: nothing to compute, only to gather and to scatter.

cdef inline Py_ssize_t place_of(const Job* job, Py_ssize_t row, Py_ssize_t c) noexcept nogil:
    """The index of an element in the array."""
    return (row // job.inner * job.num_classes + c) * job.inner + row % job.inner


cdef void nll_unit(const Job* job, Py_ssize_t unit, real* scratch) noexcept nogil:
    cdef Rows r
    cdef int64_t y[LANES]
    cdef Py_ssize_t i, first = unit * job.group, n = rows_in_unit(job, unit)
    cdef double log_p
    read_targets(job, first, n, y, &r)
    for i in range(n):
        log_p = load_block(job.storage, job.logits, place_of(job, first + i, y[i]), 1, scratch)[0]
        r.loss[i] = times(r.row_weight[i], -log_p * r.target_weight[i])
    job.partial[unit] = deliver_losses(job, first, n, r.loss)


cdef void nll_backward_unit(const Job* job, Py_ssize_t unit, real* scratch) noexcept nogil:
    """The gradient at the targets: `out` was cleared in between."""
    cdef Rows r
    cdef int64_t y[LANES]
    cdef Py_ssize_t i, first = unit * job.group, n = rows_in_unit(job, unit)
    read_targets(job, first, n, y, &r)
    for i in range(n):
        # Adding 0 makes +0 of -0.
        scratch[0] = <real>(0.0 - job.scale * r.target_weight[i] * r.row_weight[i])
        store(job, place_of(job, first + i, y[i]), 1, scratch)
