# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# cython: initializedcheck=False, overflowcheck=False
"""The Cython kernels: entries, plan and drivers; the rest is included from ``_kernels/``.

The contract is in ``_contract``.  This one source is built once per instruction set (see
meson.build); ``_cython`` picks a build.  What to know before reading on:

Bits come from source order.  No flag lets the compiler reassociate or contract.  Sums run in
CHUNK or LANES explicit lanes, so that the compiler can vectorise them without changing what they
mean: a row gives the same bits alone or in a batch, at any alignment, on any number of threads.
fma is spelled out where the build has it, hence bits may differ between instruction sets.

Two layouts.  A *row* is a run of classes next to each other: classes lie in the SIMD lanes, and
short rows, several of which fill these, are one run.  Where other samples lie between the classes,
or rows are short and the operation asks for the maximum of each, a *tile* puts LANES samples in the
SIMD lanes, copied (transposed, converted) into scratch and back.  Either way a unit of rows is put
together in scratch that stays in cache and goes out in one run; a large result goes past the
caches, so that memory is not read only to be overwritten, and what the next unit needs is fetched
meanwhile. Where there are more threads than long rows, they share each row, block by block: a row
is added up in blocks, one after the other, whoever took them.

Two units for exponentials. Most rows need no maximum: theirs are 2**48 exp(x) (in float64 2**497),
which is exact as long as nothing overflows and what counts is no subnormal number, and so can be
taken in one run of many rows, wherever each ends. A row that is not so tame has units of its own, a
power of two near its maximum. Which of the two it is the row decides by itself, by its own scores
and weight (in_common_units), so that its bits do not depend on what is around it: what would
overflow is cut off, and shows in the sum. Only the way there depends on the rows before.
Where soft targets ask how far all scores are from the maximum, rows have their own units. Label
smoothing asks how far they are from the target, unless that counts for too little.

The sum leaves one class out (the target, or the maximum), which is what makes small losses exact.
Where units are common, others are related to the target itself: a loss is log1p(others / e_y). Of
log_softmax, partial sums leave out their largest term, which goes along with each: the largest of
all is the maximum's, whichever class that is.
0 * inf counts as 0.

The hot loops are those over CHUNK or LANES in largest, exp_run, exp_block, top_block, soft_block,
exp_tile, top_of_tile, write_tile and transpose, {sum,top}_eight, gap_run, and
{scale,spread,shift,smooth}_sixteen, and those of scale_row, terms_of_run, finish_run, plain_step and
cross_entropy_step.
In the assembly (objdump -d) they must be straight runs of packed instructions, zmm registers in the
v4 build and ymm in v3, without a call, a scalar instruction or a gather.  exp_run is bound by its
10 multiplications per vector, its minimum and maximum being one instruction each; all else must
hide behind them.
"""

cimport numpy as cnp
from cython.parallel cimport prange
from libc.stdint cimport (
    int8_t, int16_t, int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t,
)
from libc.math cimport INFINITY, exp as exp_any
from libc.string cimport memcpy, memset

import numpy as np

from fastloss import _temper
from fastloss._contract import TargetCheck

cnp.import_array()

cdef object new_tuple = tuple.__new__  # in a third of the time that a named one takes by name

include "_kernels/types.pxi"
include "_kernels/machine.pxi"
include "_kernels/arithmetic.pxi"
include "_kernels/memory.pxi"
include "_kernels/blocks.pxi"
include "_kernels/targets.pxi"
include "_kernels/losses.pxi"
include "_kernels/rows.pxi"
include "_kernels/tiles.pxi"
include "_kernels/backward.pxi"
include "_kernels/columns.pxi"
include "_kernels/shared.pxi"
include "_kernels/nll.pxi"
include "_kernels/binary.pxi"
include "_kernels/entropy.pxi"


for _i in range(TEMPER):
    untempered_f[_i] = _temper.temper(1.0, np.dtype(np.float32))[_i]
    untempered_d[_i] = _temper.temper(1.0, np.dtype(np.float64))[_i]


# ---------------------------------------------------------------------------------------------
# Drivers
# ---------------------------------------------------------------------------------------------

cdef inline void run_unit(
    const Job* job, Operation operation, Py_ssize_t unit, real* scratch
) noexcept nogil:
    if operation == NLL:
        nll_unit(job, unit, scratch)
    elif operation == NLL_BACKWARD:
        nll_backward_unit(job, unit, scratch)
    elif is_binary(operation):
        binary_unit(job, operation, unit, scratch)
    elif job.layout == TILES:
        tile_unit(job, operation, unit, scratch)
    elif is_short(job):
        short_unit(job, operation, unit, scratch)
    elif job.layout == COLUMNS:
        column_unit(job, operation, unit, scratch)
    else:
        row_unit(job, operation, unit, scratch)


cdef inline void run_units(
    const Job* job, Operation operation, Py_ssize_t first, Py_ssize_t last, real* scratch
) noexcept nogil:
    cdef Py_ssize_t unit
    begin_carries(job, scratch)
    begin_rows(job, scratch)
    for unit in range(first, last):
        run_unit(job, operation, unit, scratch)
    flush_carries(job, scratch)


cdef void run_share(
    const Job* job, Operation operation, Py_ssize_t units, int thread, int num_threads,
    char* scratch, Py_ssize_t scratch_bytes,
) noexcept nogil:
    """One thread's contiguous share of the units."""
    cdef Py_ssize_t first = units * thread // num_threads
    cdef Py_ssize_t last = units * (thread + 1) // num_threads
    cdef unsigned int mode = fl_set_float_mode(FL_IEEE_MODE)
    scratch += thread * scratch_bytes
    if job.storage == FLOAT64:
        run_units(job, operation, first, last, <double*>scratch)
    else:
        run_units(job, operation, first, last, <float*>scratch)
    if job.stream:
        fl_end_stream()
    fl_set_float_mode(mode)


cdef void run_shares(
    const Job* job, Operation operation, Py_ssize_t units, int threads, char* scratch,
    Py_ssize_t scratch_bytes,
) noexcept:
    cdef int thread
    if threads == 1:  # no parallel region: a forked child must not enter one
        with nogil:
            run_share(job, operation, units, 0, 1, scratch, scratch_bytes)
        return
    for thread in prange(threads, nogil=True, schedule="static", chunksize=1, num_threads=threads):
        run_share(job, operation, units, thread, threads, scratch, scratch_bytes)


cdef void share_stage(Shared* shared, int thread, int num_threads) noexcept nogil:
    """One thread's contiguous share of the blocks."""
    cdef double scratch[3 * BLOCK]
    cdef Py_ssize_t blocks = shared.job.rows * shared.blocks
    cdef Py_ssize_t first = blocks * thread // num_threads
    cdef Py_ssize_t last = blocks * (thread + 1) // num_threads
    cdef unsigned int mode = fl_set_float_mode(FL_IEEE_MODE)
    if shared.job.storage == FLOAT64:
        take_blocks(shared, first, last, scratch)
    else:
        take_blocks(shared, first, last, <float*>scratch)
    if shared.job.stream:
        fl_end_stream()
    fl_set_float_mode(mode)


cdef void begin_stage(Shared* shared) noexcept nogil:
    """On one thread: put together the stage before."""
    cdef double scratch[3 * BLOCK]
    cdef unsigned int mode = fl_set_float_mode(FL_IEEE_MODE)
    if shared.job.storage == FLOAT64:
        shared.stage = next_stage(shared, scratch)
    else:
        shared.stage = next_stage(shared, <float*>scratch)
    fl_set_float_mode(mode)


cdef int run_shared(const Job* job, Operation operation, int threads) except -1:
    """The job's rows, each shared out among all threads."""
    cdef Shared shared
    cdef Py_ssize_t blocks = job.rows * blocks_in(job.num_classes)
    cdef cnp.ndarray kept, found = np.empty(blocks * <Py_ssize_t>sizeof(Block), np.uint8)
    cdef int thread
    shared.job, shared.operation, shared.stage, shared.kept = job, operation, FIRST, NULL
    shared.blocks = blocks_in(job.num_classes)
    shared.block = <Block*>cnp.PyArray_DATA(found)
    if operation == SOFTMAX or has_losses(operation) and job.out != NULL:
        kept = np.empty(blocks * BLOCK, np.float64 if job.storage == FLOAT64 else np.float32)
        shared.kept = cnp.PyArray_BYTES(kept)
    while True:
        begin_stage(&shared)
        if shared.stage == DONE:
            return 0
        for thread in prange(
            threads, nogil=True, schedule="static", chunksize=1, num_threads=threads
        ):
            share_stage(&shared, thread, threads)


cdef void clear(char* data, Py_ssize_t size, int threads) noexcept:
    cdef Py_ssize_t first
    cdef int thread
    if threads == 1:
        memset(data, 0, size)
        return
    for thread in prange(threads, nogil=True, schedule="static", chunksize=1, num_threads=threads):
        first = size * thread // threads
        memset(data + first, 0, size * (thread + 1) // threads - first)


cdef inline Py_ssize_t round_up(Py_ssize_t n) noexcept:
    """To whole cache lines."""
    return (n + LINE - 1) // LINE * LINE


cdef Py_ssize_t plan(Job* job, Operation operation) noexcept:
    """Choose rows or tiles and the size of a unit; return the bytes of scratch a thread needs."""
    cdef Py_ssize_t C = job.num_classes, tiles, columns, size
    job.group = job.summed = job.step = LANES
    job.row_step = C
    job.layout = TILES if C <= SHORT_ROW else ROWS if job.inner == 1 else COLUMNS
    if job.inner == 1 and (is_flat(job, operation) or is_backward(operation)):
        job.layout = ROWS
    if is_nll(operation):
        job.numbers = 1
    elif is_binary(operation):
        job.group = job.summed = PART * PARTS
        job.numbers = binary_numbers()
    elif job.layout == TILES:
        tiles = min(WIDE // (C * LANES), job.rows // (LANES * FEWEST_UNITS))
        if job.inner > 1 and tiles > 1:
            job.group = LANES * min(tiles, <Py_ssize_t>MOST_TILES)
            job.step = job.group + LINE // 4  # else classes fall on the same sets of the cache
        job.numbers = tile_numbers(job)
    else:
        while job.summed > 1 and job.summed * C > GROUP:
            job.summed //= 2
        job.group = job.summed
        job.numbers = row_numbers(job)
        if is_short(job):
            job.numbers += job.summed * C + CHUNK  # scores of log_softmax_rows
            job.numbers = max(job.numbers, tile_numbers(job)) + (3 if is_smooth(job) else 1) * (
                FL_ROWS * C)
        if job.layout == COLUMNS:
            columns = <Py_ssize_t>TURNED // C // TURN * TURN
            job.group = min(max(columns, <Py_ssize_t>TURN), <Py_ssize_t>LANES)
            # Room for a last chunk, and an odd number of lines: else rows fall on the same sets.
            job.row_step = (C + CHUNK - 1) // CHUNK * CHUNK + TURN
            job.numbers += turned_numbers(job) * (1 if job.other == NULL else 2)
    job.numbers += LINE // 4  # untamed_of
    # In place, what is written is in the cache already.
    job.stream = (
        writes_rows(operation) and job.out != NULL and job.out != job.logits
        and job.rows * C * itemsize(job.storage) >= STREAM_BYTES
    )
    size = job.numbers * (8 if job.storage == FLOAT64 else 4)
    if carries(job):
        size += C * <Py_ssize_t>sizeof(Carry)
    return round_up(size)  # threads do not share a cache line


cdef double run_loss(Job* job, Operation operation, int num_threads) except? -1:
    """As run; where scale is 0, no row counts, not even one that holds a NaN."""
    cdef char* grad = job.out
    cdef double total
    if grad == NULL or job.scale != 0.0:
        return run(job, operation, num_threads)
    job.out = NULL
    total = run(job, operation, num_threads)
    clear(grad, job.rows * job.num_classes * itemsize(job.storage), num_threads)
    return total


cdef double run(Job* job, Operation operation, int num_threads) except? -1:
    """Run an operation on all its units; return the sum of the row losses, where it has any."""
    cdef Py_ssize_t scratch_bytes = plan(job, operation)
    cdef Py_ssize_t units = (job.rows + job.group - 1) // job.group
    cdef int threads = <int>min(<Py_ssize_t>num_threads, units)
    cdef int sharing = <int>min(<Py_ssize_t>num_threads, job.rows * job.num_classes // PIECE)
    cdef cnp.ndarray memory, partial
    cdef char* scratch
    cdef double total = 0.0
    cdef Py_ssize_t unit
    if units == 0:
        return 0.0
    # All memory is taken before anything is written: where there is none, MemoryError says so.
    partial = np.empty((job.rows + job.summed - 1) // job.summed)
    job.partial = <double*>cnp.PyArray_DATA(partial)
    if may_be_shared(job, operation) and threads < sharing:
        run_shared(job, operation, sharing)
    else:
        memory = np.empty(threads * scratch_bytes + LINE, np.uint8)
        scratch = <char*>round_up(<Py_ssize_t>cnp.PyArray_BYTES(memory))
        run_shares(job, operation, units, threads, scratch, scratch_bytes)
    if operation == NLL and job.out != NULL:  # which may be log_probs: not before these were read
        clear(job.out, job.rows * job.num_classes * itemsize(job.storage), num_threads)
        run_shares(job, NLL_BACKWARD, units, threads, scratch, scratch_bytes)
    if not has_losses(operation):
        return 0.0
    if cnp.PyArray_SIZE(partial) < FEW:
        for unit in range(cnp.PyArray_SIZE(partial)):
            total += job.partial[unit]
        return total
    # NumPy adds pairwise, in an order that depends on the number of units alone. Out is written: a
    # sum of losses that is infinite or NaN must not become an error now.
    with np.errstate(all="ignore"):
        return partial.sum()


# ---------------------------------------------------------------------------------------------
# Jobs: from arrays and options
# ---------------------------------------------------------------------------------------------

cdef Storage storage_of(cnp.ndarray array) except? FLOAT64:
    if array.descr.type_num == cnp.NPY_FLOAT:
        return FLOAT32
    if array.descr.type_num == cnp.NPY_DOUBLE:
        return FLOAT64
    name = array.dtype.name
    if name == "float16":
        return FLOAT16
    if name == "bfloat16":
        return BFLOAT16
    raise TypeError(f"no kernel for dtype {name}")


cdef Job job_of(cnp.ndarray array, cnp.ndarray out) except *:
    """The common part of a job, from an array (outer, C, inner)."""
    cdef Job job
    memset(&job, 0, sizeof(job))
    job.num_classes = array.shape[1]
    job.inner = array.shape[2]
    job.rows = array.shape[0] * job.inner
    job.storage = storage_of(array)
    job.logits = cnp.PyArray_BYTES(array)
    job.out = NULL if out is None else cnp.PyArray_BYTES(out)
    job.cooling = 1.0
    return job


cdef Job job_of_loss(
    cnp.ndarray scores, labels, options, double scale, cnp.ndarray losses, cnp.ndarray grad
) except *:
    cdef Job job = job_of(scores, grad)
    add_labels(&job, labels, options)
    job.scale = scale
    job.losses = NULL if losses is None else cnp.PyArray_BYTES(losses)
    return job


cdef Options options_of(options) except *:
    cdef Options result
    cdef double* number = <double*>&result  # every field has the size of one
    cdef tuple values = <tuple>options
    cdef Py_ssize_t i
    result.ignore_index = values[0]
    for i in range(1, len(values)):
        number[i] = values[i]
    return result


cdef void add_labels(Job* job, labels, options) except *:
    cdef cnp.ndarray target, weight, sample_weight
    target, weight, sample_weight = <tuple>labels
    job.options = options_of(options)
    if target is None:
        pass
    elif cnp.PyArray_ISINTEGER(target):
        job.target = cnp.PyArray_BYTES(target)
        job.target_kind = target_kind_of(target)
    else:
        job.other = cnp.PyArray_BYTES(target)
        job.other_storage = storage_of(target)
    job.weight_sum = job.num_classes
    if weight is not None:
        job.weight = <const double*>cnp.PyArray_DATA(weight)
        job.weight_sum = weight.sum()
    if sample_weight is not None:
        job.sample_weight = <const double*>cnp.PyArray_DATA(sample_weight)


cdef int target_kind_of(cnp.ndarray target) except -1:
    cdef Py_ssize_t size = target.itemsize
    cdef int kind = 0 if size == 1 else 1 if size == 2 else 2 if size == 4 else 3
    return kind if cnp.PyArray_ISSIGNED(target) else kind + 4


cdef cnp.ndarray add_temperature(Job* job):
    """Return what must stay alive as long as the job. Gradients are those of x, and not of x / T."""
    cdef cnp.ndarray temper
    if job.options.temperature == 1.0:
        return None
    temper = _temper.temper(
        job.options.temperature, np.dtype(np.float64 if job.storage == FLOAT64 else np.float32))
    job.temper = cnp.PyArray_DATA(temper)
    job.cooling = 1.0 / job.options.temperature
    job.scale *= job.cooling
    return temper


cdef cnp.ndarray add_relative_weight(Job* job, cnp.ndarray weight):
    """As add_temperature."""
    cdef cnp.ndarray relative
    cdef double smoothing = job.options.label_smoothing, least = 1.0, mean = 1.0
    job.largest_weight = 1.0
    if weight is not None and smoothing != 0.0:
        least, mean = np.abs(weight).min(), np.abs(weight).mean()
    # Of what is related to the target, only as much may cancel as its own loss comes to.
    job.tame_scale = job.scale if (1.0 - smoothing) * least >= smoothing * mean else 0.0
    if job.options.gamma != 0.0 and job.storage == FLOAT64:
        job.tame_scale *= 2.0**-300
        job.least_rest = 2.0 ** (-300.0 / job.options.gamma)
    if weight is None:
        return None
    job.largest_weight = np.abs(weight).max()
    relative = weight / (job.largest_weight or 1.0)
    if job.storage != FLOAT64:
        relative = relative.astype(np.float32)
    job.relative_weight = cnp.PyArray_DATA(relative)
    return relative


# ---------------------------------------------------------------------------------------------
# Entries
# ---------------------------------------------------------------------------------------------

def softmax(cnp.ndarray logits not None, cnp.ndarray out not None, int num_threads):
    cdef Job job = job_of(logits, out)
    run(&job, SOFTMAX, num_threads)


def log_softmax(cnp.ndarray logits not None, cnp.ndarray out not None, int num_threads):
    cdef Job job = job_of(logits, out)
    run(&job, LOG_SOFTMAX, num_threads)


def logsumexp(cnp.ndarray logits not None, cnp.ndarray out not None, int num_threads):
    cdef Job job = job_of(logits, out)
    run(&job, LOGSUMEXP, num_threads)


def softmax_backward(
    cnp.ndarray grad_output not None, cnp.ndarray probs not None, cnp.ndarray out not None,
    int num_threads,
):
    cdef Job job = job_of(probs, out)
    job.other = cnp.PyArray_BYTES(grad_output)
    job.other_storage = job.storage
    run(&job, SOFTMAX_BACKWARD, num_threads)


def log_softmax_backward(
    cnp.ndarray grad_output not None, cnp.ndarray log_probs not None, cnp.ndarray out not None,
    int num_threads,
):
    cdef Job job = job_of(log_probs, out)
    job.other = cnp.PyArray_BYTES(grad_output)
    job.other_storage = job.storage
    run(&job, LOG_SOFTMAX_BACKWARD, num_threads)


def cross_entropy(
    cnp.ndarray logits not None, labels not None, options not None, double scale,
    cnp.ndarray losses, cnp.ndarray grad, int num_threads,
):
    cdef Job job = job_of_loss(logits, labels, options, scale, losses, grad)
    alive = add_temperature(&job), add_relative_weight(&job, (<tuple>labels)[1])
    return run_loss(&job, CROSS_ENTROPY if job.other == NULL else CROSS_ENTROPY_SOFT, num_threads)


def nll_loss(
    cnp.ndarray log_probs not None, labels not None, options not None, double scale,
    cnp.ndarray losses, cnp.ndarray grad, int num_threads,
):
    cdef Job job = job_of_loss(log_probs, labels, options, scale, losses, grad)
    return run_loss(&job, NLL, num_threads)


def entropy(
    cnp.ndarray logits not None, labels not None, options not None, double scale,
    cnp.ndarray losses, cnp.ndarray grad, int num_threads,
):
    cdef Job job = job_of_loss(logits, labels, options, scale, losses, grad)
    alive = add_temperature(&job)
    return run_loss(&job, ENTROPY, num_threads)


def binary_cross_entropy_with_logits(
    cnp.ndarray logits not None, labels not None, options not None, double scale,
    cnp.ndarray losses, cnp.ndarray grad, int num_threads,
):
    return run_binary(
        logits, labels, options, scale, losses, grad, BINARY_CROSS_ENTROPY, num_threads)


def sigmoid_focal_loss(
    cnp.ndarray logits not None, labels not None, options not None, double scale,
    cnp.ndarray losses, cnp.ndarray grad, int num_threads,
):
    return run_binary(logits, labels, options, scale, losses, grad, SIGMOID_FOCAL, num_threads)


cdef double run_binary(
    cnp.ndarray logits, labels, options, double scale, cnp.ndarray losses, cnp.ndarray grad,
    Operation operation, int num_threads,
) except? -1:
    cdef Job job = job_of_loss(logits, labels, options, scale, losses, grad)
    alive = add_binary_weight(&job, (<tuple>labels)[1])
    job.labels, job.num_classes, job.rows = job.num_classes, 1, cnp.PyArray_SIZE(logits)
    job.inner = job.rows if job.labels == 1 else job.inner
    return run_loss(&job, operation, num_threads)


cdef cnp.ndarray add_binary_weight(Job* job, cnp.ndarray weight):
    """As add_relative_weight, of weights for targets of 1 and of 0, as they are."""
    if weight is None:
        return None
    weight = weight.astype(np.float64 if job.storage == FLOAT64 else np.float32)
    job.relative_weight = cnp.PyArray_DATA(weight)
    return weight


def check_target(labels not None, options not None, Py_ssize_t num_classes, int num_threads):
    cdef Job job
    cdef Py_ssize_t block, blocks, bad
    cdef cnp.ndarray partial, found
    cdef double* sums
    cdef Py_ssize_t* bads
    cdef double total = 0.0
    memset(&job, 0, sizeof(job))
    job.rows, job.num_classes = cnp.PyArray_SIZE((<tuple>labels)[0]), num_classes
    add_labels(&job, labels, options)
    blocks = (job.rows + CHECK_BLOCK - 1) // CHECK_BLOCK
    if blocks == 1:
        bad = check_block(&job, 0, &total)
        return new_tuple(TargetCheck, (bad, total))
    partial, found = np.empty(blocks), np.empty(blocks, np.intp)
    sums, bads = <double*>cnp.PyArray_DATA(partial), <Py_ssize_t*>cnp.PyArray_DATA(found)
    if num_threads == 1:
        with nogil:
            for block in range(blocks):
                bads[block] = check_block(&job, block, &sums[block])
    else:
        for block in prange(blocks, nogil=True, schedule="static", num_threads=num_threads):
            bads[block] = check_block(&job, block, &sums[block])
    for block in range(blocks):
        if bads[block] >= 0:
            return TargetCheck(bads[block], 0.0)
    return TargetCheck(-1, float(partial.sum()))


def openmp_max_threads():
    """How many threads OpenMP would use by itself, here and now; a serial build has no opinion."""
    return fl_max_threads()


def most_threads():
    """How many threads a call may have, however many it asks for."""
    return fl_thread_limit()


def warmup():
    """Nothing is left to compile."""


def describe():
    """The OpenMP standard's date, as the compiler states it."""
    return {"cython OpenMP": str(FL_OPENMP) if FL_OPENMP else "none: this build is serial"}


def cpu_runs(int level):
    """Whether this CPU and system run x86-64-v3 (level 3) or -v4 (level 4) code."""
    return bool(fl_cpu_runs(level))
