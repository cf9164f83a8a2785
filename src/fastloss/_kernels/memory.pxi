# Memory: between arrays of any storage and scratch in the compute type.

cdef inline Py_ssize_t itemsize(Storage storage) noexcept nogil:
    return 4 if storage == FLOAT32 else 8 if storage == FLOAT64 else 2


cdef inline int32_t* untamed_of(const Job* job, real* scratch) noexcept nogil:
    """Whether the last unit had rows that common units are not for: the next may, too.

    Only the way to the bits depends on it.
    """
    return <int32_t*>(scratch + job.numbers) - 1


cdef inline void fetch(const char* data, Py_ssize_t size) noexcept nogil:
    """Ask for memory ahead of its use; beyond the end of an array that does no harm."""
    cdef Py_ssize_t i
    for i in range((size + LINE - 1) // LINE):
        fl_prefetch(data + i * LINE)


cdef inline Py_ssize_t blocks_in(Py_ssize_t n) noexcept nogil:
    return (n + BLOCK - 1) // BLOCK


cdef inline const real* load_block(
    Storage storage, const char* data, Py_ssize_t start, Py_ssize_t n, real* buffer
) noexcept nogil:
    """Elements start to start + n in the compute type: in place, or converted into buffer."""
    if itemsize(storage) != 2:
        return (<const real*>data) + start
    if real is float:
        widen_halves(storage, (<const uint16_t*>data) + start, n, buffer)
    return buffer


cdef inline void widen_halves(
    Storage storage, const uint16_t* halves, Py_ssize_t n, float* to
) noexcept nogil:
    cdef Py_ssize_t i
    if storage == FLOAT16:
        for i in range(fl_halves_to_floats(halves, to, n), n):
            to[i] = half_to_float(halves[i])
    else:
        for i in range(n):
            to[i] = bfloat_to_float(halves[i])


cdef inline void narrow_floats(
    Storage storage, const float* values, Py_ssize_t n, uint16_t* to
) noexcept nogil:
    cdef Py_ssize_t i
    if storage == FLOAT16:
        for i in range(fl_floats_to_halves(values, to, n), n):
            to[i] = float_to_half(values[i])
    else:
        for i in range(n):
            to[i] = float_to_bfloat(values[i])


cdef inline void copy_out(const Job* job, char* to, const void* values, size_t size) noexcept nogil:
    if job.stream:
        fl_stream(to, <const char*>values, size)
    else:
        memcpy(to, values, size)


cdef inline void store(
    const Job* job, Py_ssize_t start, Py_ssize_t n, const real* values
) noexcept nogil:
    """Write elements start to start + n of out."""
    cdef uint16_t halves[BLOCK]
    cdef char* to = job.out + start * itemsize(job.storage)
    cdef Py_ssize_t b, first, width
    if itemsize(job.storage) != 2:
        copy_out(job, to, values, n * sizeof(real))
        return
    for b in range(blocks_in(n)):
        first = b * BLOCK
        width = min(n - first, <Py_ssize_t>BLOCK)
        if real is float:
            narrow_floats(job.storage, values + first, width, halves)
        copy_out(job, to + first * 2, halves, width * 2)


cdef inline void flush(Carry* carry) noexcept nogil:
    cdef size_t filled = <uintptr_t>carry.end % LINE
    memcpy(carry.end - filled, carry.line, filled)
    carry.end = NULL


cdef inline void stream_run(
    Carry* carry, char* to, const char* values, Py_ssize_t size
) noexcept nogil:
    """Write past the caches in whole lines; half a line would first be read from memory."""
    cdef Py_ssize_t filled = <uintptr_t>to % LINE, head = min((LINE - filled) % LINE, size), whole
    if carry.end == to:
        memcpy(carry.line + filled, values, head)
        if filled + head < LINE and filled:
            carry.end = to + head
            return
        if filled:
            fl_stream(to - filled, carry.line, LINE)
    else:
        if carry.end != NULL:
            flush(carry)
        memcpy(to, values, head)
        if (filled + head) % LINE:
            return
    whole = (size - head) // LINE * LINE
    fl_stream(to + head, values + head, whole)
    memcpy(carry.line, values + head + whole, size - head - whole)
    carry.end = to + size


cdef inline void store_run(
    const Job* job, Carry* carry, Py_ssize_t start, Py_ssize_t n, const real* values
) noexcept nogil:
    """Write elements start to start + n of out, at most BLOCK, that a later run may go on from."""
    cdef uint16_t halves[BLOCK]
    cdef char* to = job.out + start * itemsize(job.storage)
    if not job.stream:
        store(job, start, n, values)
    elif itemsize(job.storage) != 2:
        stream_run(carry, to, <const char*>values, n * sizeof(real))
    else:
        if real is float:
            narrow_floats(job.storage, values, n, halves)
        stream_run(carry, to, <const char*>halves, n * 2)


cdef inline Carry* carry_of(const Job* job, real* scratch, Py_ssize_t c) noexcept nogil:
    """That of the runs of class c."""
    return <Carry*>(scratch + job.numbers) + c


cdef inline bint carries(const Job* job) noexcept nogil:
    return job.stream and job.inner > 1


cdef inline void begin_carries(const Job* job, real* scratch) noexcept nogil:
    if carries(job):
        memset(carry_of(job, scratch, 0), 0, job.num_classes * sizeof(Carry))


cdef inline void flush_carries(const Job* job, real* scratch) noexcept nogil:
    cdef Carry* carry
    cdef Py_ssize_t c
    if carries(job):
        for c in range(job.num_classes):
            carry = carry_of(job, scratch, c)
            if carry.end != NULL:
                flush(carry)
