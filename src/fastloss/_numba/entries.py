"""What Python calls: the functions of the contract, and the share of the work of one thread."""

import contextlib
import ctypes
import threading

import numba
import numpy as np
from numba import prange, types

from fastloss import _threads
from fastloss._contract import Labels, Options, TargetCheck
from fastloss._numba.backward import backward_rows, backward_tile
from fastloss._numba.columns import load_columns, rows_of, rows_to, store_columns, turned_numbers
from fastloss._numba.jit import entry, inline
from fastloss._numba.losses import deliver_losses, scalar_step
from fastloss._numba.machine import (
    IEEE,
    borrow,
    call_share,
    end_stream,
    set_float_mode,
    unless_none,
)
from fastloss._numba.memory import begin_carries, flush_carries, store
from fastloss._numba.nll import nll_backward_unit, nll_unit
from fastloss._numba.rows import (
    log_softmax_rows,
    reduce_rows,
    row_numbers,
    softmax_rows,
    write_rows,
)
from fastloss._numba.targets import check_block, read_sample_weights, read_targets
from fastloss._numba.tiles import (
    load_tiles,
    log_softmax_tile,
    reduce_tile,
    softmax_tile,
    store_tiles,
    tile_numbers,
    tile_scratch,
    write_tile,
)
from fastloss._numba.types import (
    BFLOAT16,
    CHECK_BLOCK,
    COLUMNS,
    CROSS_ENTROPY,
    CROSS_ENTROPY_SOFT,
    FEWEST_UNITS,
    FIELDS,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    GROUP,
    INTEGERS,
    LANES,
    LINE,
    LOG_SOFTMAX,
    LOG_SOFTMAX_BACKWARD,
    LOG_SUM,
    LOGSUMEXP,
    MAXIMUM,
    MOST_TILES,
    NLL,
    ROWS,
    SHORT_ROW,
    SOFTMAX,
    SOFTMAX_BACKWARD,
    STREAM_BYTES,
    TILES,
    TURN,
    TURNED,
    WIDE,
    Plan,
)

# ---------------------------------------------------------------------------------------------
# Shares: what one thread does
# ---------------------------------------------------------------------------------------------
# They are handed plan and options as plain tuples: to recognise a named one takes a call 1 us.


@entry(parallel=True)
def on_threads(share, arguments, units, threads):
    for thread in prange(threads):
        call_share(share, arguments, units, thread, threads)


@inline
def share_of(units, thread, threads):
    return range(units * thread // threads, units * (thread + 1) // threads)


@inline
def load_unit(x, tile, buffer, turned, first, n, storage, plan):
    if plan.layout == TILES:
        load_tiles(x, tile, buffer, first, n, storage, plan)
    elif plan.layout == COLUMNS:
        load_columns(x, turned, first, n, plan)


@inline
def store_unit(out, tile, turned, scratch, r, first, n, plan):
    if plan.layout == TILES:
        store_tiles(out, tile, scratch, r, first, n, plan)
    elif plan.layout == COLUMNS:
        store_columns(out, turned, scratch, r, first, n, plan)


@entry
def softmax_share(x, out, plan, scratch, fields, turned, units, thread, threads):
    mode = set_float_mode(IEEE)
    plan = Plan(*plan)
    x, out, turned = borrow(x), borrow(out), borrow(turned[thread])
    x_rows, out_rows = rows_of(x, turned, plan.layout), rows_to(out, turned, plan.layout)
    r, own = borrow(fields[thread]), borrow(scratch[thread])
    buffer, tile, other = tile_scratch(own, plan)
    begin_carries(r)
    for unit in share_of(units, thread, threads):
        first = unit * plan.group
        last = min(first + plan.group, plan.rows)
        load_unit(x, tile, buffer, turned, first, last - first, plan.storage, plan)
        for start in range(first, last, plan.summed):
            n = min(plan.summed, last - start)
            lane = start - first
            row = lane if plan.layout == COLUMNS else start
            if plan.layout == TILES:
                softmax_tile(tile[lane:], other[lane:], r, x, start + plan.group, plan)
            else:
                softmax_rows(x_rows, out_rows, r, own, row, n, plan)
        store_unit(out, tile, turned, own, r, first, last - first, plan)
    flush_carries(out, r, own)
    end_stream()
    set_float_mode(mode)


@entry
def log_softmax_share(x, out, plan, scratch, fields, turned, units, thread, threads):
    """log_softmax and logsumexp."""
    mode = set_float_mode(IEEE)
    plan = Plan(*plan)
    x, out, turned = borrow(x), borrow(out), borrow(turned[thread])
    x_rows, out_rows = rows_of(x, turned, plan.layout), rows_to(out, turned, plan.layout)
    r, own = borrow(fields[thread]), borrow(scratch[thread])
    buffer, tile, _ = tile_scratch(own, plan)
    begin_carries(r)
    for unit in share_of(units, thread, threads):
        first = unit * plan.group
        last = min(first + plan.group, plan.rows)
        load_unit(x, tile, buffer, turned, first, last - first, plan.storage, plan)
        for start in range(first, last, plan.summed):
            n = min(plan.summed, last - start)
            row = start - first if plan.layout == COLUMNS else start
            if plan.layout == TILES:
                log_softmax_tile(tile[start - first :], r, x, start + plan.group, plan)
            else:
                log_softmax_rows(x_rows, out_rows, r, own, row, n, plan)
            if plan.operation == LOGSUMEXP:
                for i in range(n):
                    buffer[i] = r[MAXIMUM + i] + r[LOG_SUM + i]
                store(out, start, buffer[:n], plan.storage, False)
        if plan.operation == LOG_SOFTMAX:
            store_unit(out, tile, turned, own, r, first, last - first, plan)
    flush_carries(out, r, own)
    end_stream()
    set_float_mode(mode)


@entry
def backward_share(g, p, out, plan, scratch, fields, turned, turned_g, units, thread, threads):
    mode = set_float_mode(IEEE)
    plan = Plan(*plan)
    g, p, out = borrow(g), borrow(p), borrow(out)
    turned, turned_g = borrow(turned[thread]), borrow(turned_g[thread])
    p_rows, out_rows = rows_of(p, turned, plan.layout), rows_to(out, turned, plan.layout)
    g_rows = rows_of(g, turned_g, plan.layout)
    r, own = borrow(fields[thread]), borrow(scratch[thread])
    buffer, tile, upstreams = tile_scratch(own, plan)
    begin_carries(r)
    for unit in share_of(units, thread, threads):
        first = unit * plan.group
        last = min(first + plan.group, plan.rows)
        load_unit(p, tile, buffer, turned, first, last - first, plan.storage, plan)
        load_unit(g, upstreams, buffer, turned_g, first, last - first, plan.other_storage, plan)
        for start in range(first, last, plan.summed):
            n = min(plan.summed, last - start)
            lane = start - first
            row = lane if plan.layout == COLUMNS else start
            if plan.layout == TILES:
                backward_tile(tile[lane:], upstreams[lane:], r, plan)
            else:
                backward_rows(g_rows, p_rows, out_rows, r, own, row, n, plan)
        store_unit(out, tile, turned, own, r, first, last - first, plan)
    flush_carries(out, r, own)
    end_stream()
    set_float_mode(mode)


@entry
def cross_entropy_share(
    x, target, soft, weight, sample_weight, relative_weight, largest_weight, weight_sum, plan,
    options, scale, losses, out, scratch, fields, turned, turned_soft, partial, units, thread,
    threads,
):  # fmt: skip
    """Of indices, or of soft targets: the other is None, which is known before types are."""
    mode = set_float_mode(IEEE)
    plan, options = Plan(*plan), Options(*options)
    x, out, turned = borrow(x), borrow(out), borrow(turned[thread])
    x_rows, out_rows = rows_of(x, turned, plan.layout), rows_to(out, turned, plan.layout)
    turned_soft = borrow(turned_soft[thread])
    soft_rows = rows_of(borrow(soft), turned_soft, plan.layout)
    r, own = borrow(fields[thread]), borrow(scratch[thread])
    buffer, tile, other = tile_scratch(own, plan)
    tiled = plan.layout == TILES
    in_place = soft is not None or options.label_smoothing != 0.0
    begin_carries(r)
    for unit in share_of(units, thread, threads):
        first = unit * plan.group
        last = min(first + plan.group, plan.rows)
        load_unit(x, tile, buffer, turned, first, last - first, plan.storage, plan)
        if soft is not None:
            load_unit(
                borrow(soft), other, buffer, turned_soft, first, last - first,
                plan.other_storage, plan,
            )  # fmt: skip
        for start in range(first, last, plan.summed):
            n = min(plan.summed, last - start)
            row = start - first if plan.layout == COLUMNS else start
            own_tile, own_other = tile[start - first :], other[start - first :]
            own_soft = unless_none(soft, own_other)
            if target is not None:
                read_targets(
                    r, target, weight, sample_weight, start, n, plan.num_classes, options,
                    largest_weight,
                )  # fmt: skip
            if soft is not None:
                read_sample_weights(r, sample_weight, start, n)
            if tiled:
                reduce_tile(
                    own_tile, own_other, own_soft, r, n, x, start + plan.group, plan,
                    relative_weight, largest_weight, options, scale,
                )  # fmt: skip
            else:
                reduce_rows(
                    x_rows, soft_rows, r, own, row, n, plan, relative_weight, largest_weight,
                    options, scale,
                )  # fmt: skip
            scalar_step(
                target, soft, r, LANES if tiled else n, plan, options, scale, weight_sum, own
            )
            partial[start // plan.summed] = deliver_losses(r, n, losses, start, own)
            if out.size and tiled:
                write_tile(
                    own_tile if in_place else own_other, own_tile, own_soft, r, plan,
                    relative_weight, largest_weight, options,
                )  # fmt: skip
            elif out.size:
                write_rows(
                    out_rows, soft_rows, r, own, row, n, plan, relative_weight, largest_weight,
                    options,
                )  # fmt: skip
        if out.size:
            store_unit(out, tile, turned, own, r, first, last - first, plan)
    flush_carries(out, r, own)
    end_stream()
    set_float_mode(mode)


@entry
def nll_share(
    log_probs, target, weight, sample_weight, plan, options, losses, scratch, fields, partial,
    units, thread, threads,
):  # fmt: skip
    mode = set_float_mode(IEEE)
    plan, options = Plan(*plan), Options(*options)
    r = fields[thread]
    for unit in share_of(units, thread, threads):
        start = unit * LANES
        n = min(LANES, plan.rows - start)
        read_targets(r, target, weight, sample_weight, start, n, plan.num_classes, options, 0.0)
        nll_unit(log_probs, r, start, n, plan)
        partial[unit] = deliver_losses(r, n, losses, start, scratch[thread])
    set_float_mode(mode)


@entry
def nll_backward_share(
    target, weight, sample_weight, plan, options, scale, out, scratch, fields, units, thread,
    threads,
):  # fmt: skip
    mode = set_float_mode(IEEE)
    plan, options = Plan(*plan), Options(*options)
    r = fields[thread]
    for unit in share_of(units, thread, threads):
        start = unit * LANES
        n = min(LANES, plan.rows - start)
        read_targets(r, target, weight, sample_weight, start, n, plan.num_classes, options, 0.0)
        nll_backward_unit(out, r, scratch[thread], start, n, scale, plan)
    set_float_mode(mode)


@entry
def check_share(
    target, weight, sample_weight, size, num_classes, ignore_index, found, units, thread, threads
):
    mode = set_float_mode(IEEE)
    for block in share_of(units, thread, threads):
        found[0, block], found[1, block] = check_block(
            target, weight, sample_weight, size, block, num_classes, ignore_index
        )
    set_float_mode(mode)


# ---------------------------------------------------------------------------------------------
# The functions of the contract
# ---------------------------------------------------------------------------------------------

_ABSENT = {np.float32: np.empty(0, np.float32), np.float64: np.empty(0)}
for _absent in _ABSENT.values():
    _absent.flags.writeable = False  # as _read_only
_launch_lock = threading.Lock()
_layer_started = False


def softmax(logits, out, num_threads):
    plan, units, threads = plan_of(SOFTMAX, logits, out, num_threads)
    x = _flat(logits)
    arguments = (x, _flat_out(out), tuple(plan), *_scratch(logits, plan, threads),
                 _turned(x, plan, threads))  # fmt: skip
    _run(softmax_share, arguments, units, threads)


def log_softmax(logits, out, num_threads):
    _log_softmax(LOG_SOFTMAX, logits, out, num_threads)


def logsumexp(logits, out, num_threads):
    _log_softmax(LOGSUMEXP, logits, out, num_threads)


def _log_softmax(operation, logits, out, num_threads):
    plan, units, threads = plan_of(operation, logits, out, num_threads)
    x = _flat(logits)
    arguments = (x, _flat_out(out), tuple(plan), *_scratch(logits, plan, threads),
                 _turned(x, plan, threads))  # fmt: skip
    _run(log_softmax_share, arguments, units, threads)


def softmax_backward(grad_output, probs, out, num_threads):
    _backward(SOFTMAX_BACKWARD, grad_output, probs, out, num_threads)


def log_softmax_backward(grad_output, log_probs, out, num_threads):
    _backward(LOG_SOFTMAX_BACKWARD, grad_output, log_probs, out, num_threads)


def _backward(operation, grad_output, forward, out, num_threads):
    plan, units, threads = plan_of(operation, forward, out, num_threads, grad_output)
    g, p = _flat(grad_output), _flat(forward)
    arguments = (g, p, _flat_out(out), tuple(plan), *_scratch(forward, plan, threads),
                 _turned(p, plan, threads), _turned(g, plan, threads))  # fmt: skip
    _run(backward_share, arguments, units, threads)


def check_target(labels, options, num_classes, num_threads):
    size = labels.target.size
    units = -(-size // CHECK_BLOCK)
    found = np.empty((2, units))
    arguments = (
        _integers(labels.target), *_weights(labels), size, num_classes, options.ignore_index, found,
    )  # fmt: skip
    _run(check_share, arguments, units, min(num_threads, units))
    if units == 1 and not found.item(1):
        return TargetCheck(-1, found.item(0))
    sums, bads = found
    if bads.any():
        start = int(bads.argmax()) * CHECK_BLOCK
        block = labels.target.reshape(-1)[start : start + CHECK_BLOCK]
        bad = (block != options.ignore_index) & ((block < 0) | (block >= num_classes))
        return TargetCheck(start + int(bad.argmax()), 0.0)
    return TargetCheck(-1, float(sums.sum()))


def cross_entropy(logits, labels, options, scale, losses, grad, num_threads):
    if scale == 0.0 and grad is not None:  # no row counts, not even one that holds a NaN
        total = cross_entropy(logits, labels, options, scale, losses, None, num_threads)
        grad.fill(0)
        return total
    if labels.soft:
        target, soft = None, _flat(labels.target)
        plan, units, threads = plan_of(CROSS_ENTROPY_SOFT, logits, grad, num_threads, labels.target)
    else:
        target, soft = _integers(labels.target), None
        plan, units, threads = plan_of(CROSS_ENTROPY, logits, grad, num_threads)
    x = _flat(logits)
    turned = _turned(x, plan, threads)
    turned_soft = turned if soft is None else _turned(soft, plan, threads)
    weight_sum = float(plan.num_classes if labels.weight is None else labels.weight.sum())
    partial = np.empty(-(-plan.rows // plan.summed))
    arguments = (
        x, target, soft, *_weights(labels), *_relative(labels.weight, logits), weight_sum,
        tuple(plan), tuple(options), scale, *_outputs(logits, losses, grad),
        *_scratch(logits, plan, threads), turned, turned_soft, partial,
    )  # fmt: skip
    _run(cross_entropy_share, arguments, units, threads)
    return _total(partial)


def nll_loss(log_probs, labels, options, scale, losses, grad, num_threads):
    plan, _, _ = plan_of(NLL, log_probs, None, num_threads)
    units = -(-plan.rows // LANES)
    threads = min(num_threads, units)
    partial = np.empty(units)
    scratch = np.empty((max(threads, 1), 1), _compute_dtype(log_probs))
    fields = np.empty((max(threads, 1), FIELDS))
    rows = (_integers(labels.target), *_weights(labels), tuple(plan), tuple(options))
    losses, out = _outputs(log_probs, losses, grad)
    _run(nll_share, (_flat(log_probs), *rows, losses, scratch, fields, partial), units, threads)
    if grad is not None:  # which may be log_probs: not before these were read
        out.fill(0)
        _run(nll_backward_share, (*rows, scale, out, scratch, fields), units, threads)
    return _total(partial)


def _total(partial):
    """The sum of the row losses from those of rows summed together; small calls have one."""
    if partial.size == 1:
        return partial.item()
    # Out is written: a sum of losses that is infinite or NaN must not become an error now.
    with np.errstate(all="ignore"):
        return float(partial.sum())


def _read_only(array):
    """The array in one dimension; read-only, as some inputs are: one type for all is compiled."""
    flat = array.reshape(-1)
    flat.flags.writeable = False
    return flat


def _bits(flat):
    """Half types as their bits."""
    return flat.view(np.uint16) if flat.itemsize == 2 else flat


def _flat(array):
    """An input as kernels read it."""
    return _bits(_read_only(array))


def _flat_out(array):
    return _bits(array.reshape(-1))


def _integers(target):
    """Targets as their bytes, and how to read those."""
    return _read_only(target).view(np.uint8), INTEGERS.index(target.dtype.name)


def _weights(labels):
    return _or_absent(labels.weight), _or_absent(labels.sample_weight)


def storage_of(array):
    if array.itemsize == 2:
        return FLOAT16 if array.dtype == np.float16 else BFLOAT16
    return FLOAT64 if array.itemsize == 8 else FLOAT32


def _compute_dtype(array):
    return np.float64 if array.itemsize == 8 else np.float32


def _or_absent(array):
    return _ABSENT[np.float64] if array is None else _read_only(array)


def _relative(weight, logits):
    """Class weights over the largest in magnitude, in the compute type; and that."""
    if weight is None:
        return _ABSENT[_compute_dtype(logits)], 1.0
    largest_weight = float(np.abs(weight).max())
    relative = (weight / (largest_weight or 1.0)).astype(_compute_dtype(logits))
    return _read_only(relative), largest_weight


def _outputs(logits, losses, grad):
    """Arrays of the types that the kernels expect, empty where nothing is to be written."""
    if losses is None:
        losses = np.empty(0, _compute_dtype(logits))
    if grad is None:
        grad = np.empty(0, logits.dtype)
    return losses.reshape(-1), _flat_out(grad)


def plan_of(operation, array, out, num_threads, other=None):
    """The plan, how many units of work it makes, and how many threads they are for."""
    outer, num_classes, inner = array.shape
    rows = outer * inner
    group = summed = step = LANES
    row_step = num_classes
    if num_classes <= SHORT_ROW:
        layout = TILES
        tiles = min(WIDE // (num_classes * LANES), rows // (LANES * FEWEST_UNITS), MOST_TILES)
        if inner > 1 and tiles > 1:
            group = LANES * tiles
            step = group + LINE // 4  # else classes fall on the same sets of the cache
    else:
        layout = ROWS
        while summed > 1 and summed * num_classes > GROUP:
            summed //= 2
        group = summed
        if inner > 1:
            layout = COLUMNS
            group = min(max(TURNED // num_classes // TURN * TURN, TURN), LANES)
            # An odd number of lines: else rows fall on the same sets.
            row_step = -(-num_classes // (2 * TURN)) * 2 * TURN + TURN
    # In place, what is written is in the cache already.
    stream = (
        operation != LOGSUMEXP
        and out is not None
        and out.nbytes >= STREAM_BYTES
        and not np.may_share_memory(array, out)
    )
    storage = storage_of(array)
    other_storage = storage if other is None else storage_of(other)
    plan = Plan(operation, rows, num_classes, inner, layout, storage, other_storage, stream,
                summed, group, row_step, step)  # fmt: skip
    units = -(-rows // group)
    return plan, units, min(num_threads, units)


def _scratch(array, plan, threads):
    """Scratch for each thread: taken here, so that want of memory is an error and no crash."""
    if plan.layout == TILES:
        size = tile_numbers.py_func(plan.num_classes, plan.step)
    else:
        size = row_numbers.py_func(plan.num_classes, plan.summed)
    carries = plan.num_classes if plan.stream and plan.inner > 1 and array.itemsize != 2 else 0
    size += carries * (LINE // array.itemsize)
    size += -size % 16  # threads do not share a cache line
    threads = max(threads, 1)
    return np.empty((threads, size), _compute_dtype(array)), np.empty((threads, FIELDS + carries))


def _turned(flat, plan, threads):
    """Room for a unit of columns as rows, for each thread; for other layouts an empty array."""
    size = (
        turned_numbers(min(plan.group, plan.rows), plan.row_step) if plan.layout == COLUMNS else 0
    )
    return np.empty((max(threads, 1), size), flat.dtype)


def _run(share, arguments, units, threads):
    """On one thread without Numba's thread pool, which a forked child must not touch."""
    if threads <= 1 or not _start_layer():
        if units:
            share(*arguments, units, 0, 1)
        return
    address, arguments = _address(share, arguments), tuple(_apart(arguments))
    with _launch_lock:  # the workqueue layer aborts the process that uses it from two threads
        before = numba.get_num_threads()
        numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
        try:
            on_threads(address, arguments, units, threads)
        finally:
            numba.set_num_threads(before)


def _address(share, arguments):
    """Where the share that was compiled for such arguments lies; it is compiled on first use."""
    signature = (*map(share.typeof_pyval, arguments), *3 * (types.intp,))
    if signature not in share.overloads:
        share.compile(signature)
    compiled = share.overloads[signature]
    return compiled.library.get_pointer_to_function(compiled.fndesc.llvm_func_name)


def _apart(arguments):
    """The arguments, and in place of tuples among them their elements."""
    for argument in arguments:
        yield from argument if isinstance(argument, tuple) else (argument,)


def _start_layer():
    """Start Numba's threads, or say that the system refuses them."""
    global _layer_started
    with _launch_lock:
        if not _layer_started and _threads.can_start(most_threads()):
            with _openmp_left_alone():
                numba.get_num_threads()
            _layer_started = True
    return _layer_started


@contextlib.contextmanager
def _openmp_left_alone():
    """Numba's OpenMP layer, when it starts, sets these for everybody who uses that OpenMP.

    There may be two of them in the process, such as PyTorch's and the system's.  The layer calls
    the one that the whole process sees, or else its own: whichever it is, both are as they were.
    """
    before = []
    with contextlib.suppress(ImportError):  # no OpenMP on this system
        from numba.np.ufunc import omppool

        for path in (None, omppool.__file__):
            with contextlib.suppress(OSError, AttributeError):
                openmp = ctypes.CDLL(path)
                threads, levels = openmp.omp_get_max_threads(), openmp.omp_get_max_active_levels()
                before.append((openmp, threads, levels))
    yield
    for openmp, threads, levels in before:
        openmp.omp_set_num_threads(threads)
        openmp.omp_set_max_active_levels(levels)


def most_threads():
    """How many threads a call may have, however many it asks for."""
    return numba.config.NUMBA_NUM_THREADS


def warmup():
    """Compile the common operations for float32 and float64, for one thread and for many."""
    labels = Labels(np.zeros((2 * LANES, 1), np.int64), None, None)
    options = Options(-100)
    for dtype in (np.float32, np.float64):
        logits = np.zeros((2 * LANES, 2, 1), dtype)
        for threads in (1, 2):
            softmax(logits, np.empty_like(logits), threads)
            log_softmax(logits, np.empty_like(logits), threads)
            check_target(labels, options, 2, threads)
            cross_entropy(logits, labels, options, 1.0, None, np.empty_like(logits), threads)


def describe():
    """What show_config says of this backend."""
    return {
        "numba": numba.__version__,
        "numba threading layer": _describe_layer(),
        "numba threads": str(numba.config.NUMBA_NUM_THREADS),
    }


def _describe_layer():
    """The layer that calls run on, started to find out, and what to beware of there."""
    try:
        _start_layer()
        layer = numba.threading_layer()
    except ValueError as error:  # the one that was asked for is not here, or threads are refused
        return f"none: {error}".splitlines()[0]
    if layer == "workqueue":
        layer += " (a parallel function of your own beside a call of ours ends the process)"
    return layer
