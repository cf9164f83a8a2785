# Columns: many classes that do not lie next to each other.
#
# A unit of columns is turned into rows, which the functions of rows.pxi take in place, and back. So
# the bits of a row do not depend on how it lies in memory. Scratch: that of rows, then the unit's
# rows, twice, with room for what transposing writes beyond them.

cdef inline real* turned_of(const Job* job, real* scratch) noexcept nogil:
    return scratch + row_numbers(job)


cdef inline Py_ssize_t turned_numbers(const Job* job) noexcept nogil:
    return (min(job.group, job.rows) + 7) * job.row_step


cdef void load_columns(
    const Job* job, Storage storage, const char* data, Py_ssize_t unit, real* rows
) noexcept nogil:
    cdef real staged[TURN * LANES]
    cdef Py_ssize_t C = job.num_classes, inner = job.inner, step = job.row_step
    cdef Py_ssize_t turns = (C + TURN - 1) // TURN
    cdef Py_ssize_t first = unit * job.group, n = rows_in_unit(job, unit)
    cdef Py_ssize_t row = 0, width, turn, c, j, o, i, lane, start, apart, size = itemsize(storage)
    cdef const real* source
    cdef const real* line
    while row < n:
        o, i = (first + row) // inner, (first + row) % inner
        width = min(n - row, inner - i)
        for turn in range(turns):
            c = turn * TURN
            start = (o * C + c) * inner + i
            for j in range(TURN):
                fetch(data + (start + (j + 2 * TURN) * inner) * size, width * size)
            source, apart = (<const real*>data) + start, inner
            if size == 2 or start + (TURN - 1) * inner + width + 7 > job.rows * C:
                source, apart = staged, LANES
                for j in range(min(C - c, <Py_ssize_t>TURN)):
                    line = load_block(storage, data, start + j * inner, width, staged + j * LANES)
                    if line != staged + j * LANES:
                        memcpy(staged + j * LANES, line, width * sizeof(real))
            for lane in range(0, width, 8):
                for j in range(0, TURN, 8):
                    transpose(source + j * apart + lane, apart,
                              rows + (row + lane) * step + c + j, step)
        row += width


cdef void store_columns(
    const Job* job, Py_ssize_t unit, const real* rows, real* scratch
) noexcept nogil:
    cdef real staged[TURN * LANES]
    cdef Py_ssize_t C = job.num_classes, inner = job.inner, step = job.row_step
    cdef Py_ssize_t turns = (C + TURN - 1) // TURN
    cdef Py_ssize_t first = unit * job.group, n = rows_in_unit(job, unit)
    cdef Py_ssize_t row = 0, width, turn, c, j, o, i, lane
    while row < n:
        o, i = (first + row) // inner, (first + row) % inner
        width = min(n - row, inner - i)
        for turn in range(turns):
            c = turn * TURN
            for lane in range(0, width, 8):
                for j in range(0, TURN, 8):
                    transpose(rows + (row + lane) * step + c + j, step,
                              staged + j * LANES + lane, LANES)
            for j in range(min(C - c, <Py_ssize_t>TURN)):
                store_run(job, carry_of(job, scratch, c + j), (o * C + c + j) * inner + i, width,
                          staged + j * LANES)
        row += width


cdef Job job_of_rows(const Job* job, Py_ssize_t unit, real* rows, real* other) noexcept nogil:
    """The job of the rows that a unit of columns was turned into."""
    cdef Job part = job[0]
    cdef Py_ssize_t first = unit * job.group
    part.rows, part.inner = rows_in_unit(job, unit), 1
    part.group, part.stream = job.summed, False
    part.storage = part.other_storage = FLOAT32 if real is float else FLOAT64
    part.logits = <const char*>rows
    if job.out != NULL:
        part.out = <char*>rows
    if job.other != NULL:
        part.other = <const char*>other
    if job.target != NULL:
        part.target += first << (job.target_kind & 3)
    if job.sample_weight != NULL:
        part.sample_weight += first
    if job.losses != NULL:
        part.losses += first * <Py_ssize_t>sizeof(real)
    part.partial += first // job.summed
    return part


cdef void column_unit(
    const Job* job, Operation operation, Py_ssize_t unit, real* scratch
) noexcept nogil:
    cdef real* rows = turned_of(job, scratch)
    cdef real* other = rows + turned_numbers(job)
    cdef Job part = job_of_rows(job, unit, rows, other)
    cdef Py_ssize_t i
    load_columns(job, job.storage, job.logits, unit, rows)
    if job.other != NULL:
        load_columns(job, job.other_storage, job.other, unit, other)
    for i in range((part.rows + part.group - 1) // part.group):
        row_unit(&part, operation, i, scratch)
    if operation == LOGSUMEXP:
        store(job, unit * job.group, part.rows, rows)
    elif job.out != NULL:
        store_columns(job, unit, rows, scratch)
