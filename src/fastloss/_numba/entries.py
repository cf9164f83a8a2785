"""What Python calls: the functions of the contract, and the share of the work of one thread."""

import contextlib
import ctypes
import functools
import threading

import numba
import numpy as np
from numba import prange, types

from fastloss import _temper, _threads
from fastloss._contract import Labels, Options, TargetCheck
from fastloss._numba.backward import backward_rows, backward_run, backward_tile
from fastloss._numba.binary import PART, PARTS, binary_numbers, binary_unit
from fastloss._numba.columns import load_columns, rows_of, rows_to, store_columns, turned_numbers
from fastloss._numba.entropy import entropy_rows, entropy_tile
from fastloss._numba.jit import entry, inline, spliced, typed
from fastloss._numba.losses import (
    deliver_losses,
    is_plain,
    label_smoothing_of,
    scalar_step,
)
from fastloss._numba.machine import (
    IEEE,
    borrow,
    call_share,
    end_stream,
    must_be_compiled,
    set_float_mode,
    unless_none,
)
from fastloss._numba.memory import begin_carries, flush_carries, from_line, store
from fastloss._numba.nll import nll_backward_unit, nll_unit
from fastloss._numba.rows import (
    divide_rows,
    exp_rows_from_target,
    exp_rows_of_softmax,
    gaps_of_short_rows,
    log_softmax_rows,
    log_softmax_run,
    reduce_rows,
    row_numbers,
    softmax_rows,
    write_rows,
    write_run,
)
from fastloss._numba.shared import (
    FOUND,
    is_taken,
    may_be_shared,
    next_stage,
    next_stage_of_backward,
    shared_of,
    take_block,
    take_block_of_backward,
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
    BINARY,
    BLOCK,
    CHECK_BLOCK,
    COLUMNS,
    CROSS_ENTROPY,
    CROSS_ENTROPY_SOFT,
    DONE,
    ENTROPY,
    FEW,
    FEWEST_UNITS,
    FIELDS,
    FIRST,
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
    PIECE,
    ROW_WEIGHT,
    ROWS,
    SHORT_ROW,
    SOFTMAX,
    SOFTMAX_BACKWARD,
    STEP,
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


@entry(parallel=True)
def in_stages(share, arguments, blocks, threads):
    """The stage is the first of the arguments; a share of no blocks finds out the next."""
    while True:
        call_share(share, arguments, 0, 0, 1)
        if arguments[0][0] == DONE:
            return
        for thread in prange(threads):
            call_share(share, arguments, blocks, thread, threads)


@entry
def small_loss(share, x, target, kind, out, plan, ignore_index, scale):
    """A loss of few units, without weights and options.

    To hand over two dozen arguments from Python takes several times as long as such a loss: those
    that say nothing here are put together in compiled code.
    """
    named = Plan(*plan)
    units = -(-named.rows // named.group)
    absent, partial = np.empty(0), np.empty(units)
    weights = (absent, absent, x[:0], 1.0, np.float64(named.num_classes))
    tiles = np.empty((1, named.numbers + LINE // 4), x.dtype)
    fields = np.empty((1, FIELDS + LINE // 8))
    given = (x, target.view(np.uint8), kind, None)
    options = (ignore_index, None, scale, scale)
    room = (tiles, None, None, None, fields, partial)
    arguments = given + weights + plan + options + (x[:0], out) + room
    must_be_compiled(cross_entropy_share, arguments)
    call_share(share, arguments, units, 0, 1)
    total = 0.0
    for unit in range(units):
        total += partial[unit]
    return total


_OPTIONS = len(Options._fields)


@inline
def share_of(units, thread, threads):
    return range(units * thread // threads, units * (thread + 1) // threads)


@typed
def own_of(arrays, thread):
    """What is a thread's own of an array for all, or None."""
    if arrays == types.none:
        return lambda arrays, thread: None
    return lambda arrays, thread: borrow(arrays[thread])


@typed
def scratch_of(tiles, rows, thread):
    if rows == types.none:
        return lambda tiles, rows, thread: borrow(tiles[thread])
    return lambda tiles, rows, thread: borrow(rows[thread])


@typed
def options_of(options):
    """Options by name again."""
    if options == types.none:
        return lambda options: None
    return lambda options: Options(*options[:_OPTIONS])


@typed
def plan_of_share(plan, options):
    """The plan by name, with what exponentials are computed with, which comes with the options."""
    if options == types.none:
        return lambda plan, options: Plan(*plan)
    return lambda plan, options: Plan(*plan[:-1], options[_OPTIONS:])


@spliced
def load_unit(x, tiles, turned, tile, buffer, own_turned, first, n, storage, plan):
    if tiles is not None:
        load_tiles(x, tile, buffer, first, n, storage, plan)
    if turned is not None and plan.layout == COLUMNS:
        load_columns(x, own_turned, first, n, plan)


@spliced
def store_unit(out, tiles, turned, tile, own_turned, scratch, r, first, n, plan):
    if tiles is not None:
        store_tiles(out, tile, scratch, r, first, n, plan)
    if turned is not None and plan.layout == COLUMNS:
        store_columns(out, own_turned, scratch, r, first, n, plan)


@entry
def softmax_share(x, out, plan, tiles, rows, turned, fields, units, thread, threads):
    mode = set_float_mode(IEEE)
    plan = Plan(*plan)
    x, out = borrow(x), borrow(out)
    r = from_line(own_of(fields, thread), FIELDS + plan.carries)
    scratch = from_line(scratch_of(tiles, rows, thread), plan.numbers)
    own_turned = own_of(turned, thread)
    buffer, tile, other = tile_scratch(unless_none(tiles, scratch), plan)
    x_rows, out_rows = rows_of(x, own_turned, plan.layout), rows_to(out, own_turned, plan.layout)
    begin_carries(r)
    untamed = 0  # rows of the last unit that common units were not for
    for unit in share_of(units, thread, threads):
        first = unit * plan.group
        last = min(first + plan.group, plan.rows)
        if tiles is not None:
            short = plan.inner == 1 and last - first == LANES and not untamed
            kept, ahead = tile[STEP:], plan.group * plan.num_classes
            if short:
                untamed = exp_rows_of_softmax(x, r, kept, first, LANES, plan, buffer, ahead)
            if short and not untamed:
                divide_rows(out, r, kept, other, first, LANES, plan)
                continue
        load_unit(
            x, tiles, turned, tile, buffer, own_turned, first, last - first, plan.storage, plan
        )
        for start in range(first, last, plan.summed):
            n = min(plan.summed, last - start)
            lane = start - first
            if tiles is not None:
                untamed = softmax_tile(tile[lane:], other[lane:], r, x, start + plan.group, plan)
            if rows is not None:
                row = lane if plan.layout == COLUMNS else start
                softmax_rows(x_rows, out_rows, r, scratch, row, n, plan)
        store_unit(out, tiles, turned, tile, own_turned, scratch, r, first, last - first, plan)
    flush_carries(out, r, scratch)
    end_stream()
    set_float_mode(mode)


@inline
def store_sums(out, r, scratch, start, n, plan):
    """The results of logsumexp."""
    for i in range(n):
        scratch[i] = r[MAXIMUM + i] + r[LOG_SUM + i]
    store(out, start, scratch[:n], plan.storage, False)


@entry
def log_softmax_share(x, out, plan, tiles, rows, turned, fields, units, thread, threads):
    """log_softmax and logsumexp."""
    mode = set_float_mode(IEEE)
    plan = Plan(*plan)
    x, out = borrow(x), borrow(out)
    r = from_line(own_of(fields, thread), FIELDS + plan.carries)
    scratch = from_line(scratch_of(tiles, rows, thread), plan.numbers)
    own_turned = own_of(turned, thread)
    buffer, tile, other = tile_scratch(unless_none(tiles, scratch), plan)
    x_rows, out_rows = rows_of(x, own_turned, plan.layout), rows_to(out, own_turned, plan.layout)
    begin_carries(r)
    untamed = 0  # rows of the last unit that common units were not for
    for unit in share_of(units, thread, threads):
        first = unit * plan.group
        last = min(first + plan.group, plan.rows)
        if tiles is not None:
            done = False
            if plan.inner == 1 and last - first == LANES and not untamed:
                kept, line = tile[STEP:], other[STEP:]
                done = log_softmax_run(x, out, r, kept, buffer, line, first, plan)
            if done:
                if plan.operation == LOGSUMEXP:
                    store_sums(out, r, scratch, first, LANES, plan)
                continue
        load_unit(
            x, tiles, turned, tile, buffer, own_turned, first, last - first, plan.storage, plan
        )
        for start in range(first, last, plan.summed):
            n = min(plan.summed, last - start)
            if tiles is not None:
                lane = start - first
                untamed = log_softmax_tile(tile[lane:], r, x, start + plan.group, plan)
            if rows is not None:
                row = start - first if plan.layout == COLUMNS else start
                log_softmax_rows(x_rows, out_rows, r, scratch, row, n, plan)
            if plan.operation == LOGSUMEXP:
                store_sums(out, r, scratch, start, n, plan)
        if plan.operation == LOG_SOFTMAX:
            store_unit(out, tiles, turned, tile, own_turned, scratch, r, first, last - first, plan)
    flush_carries(out, r, scratch)
    end_stream()
    set_float_mode(mode)


@entry
def backward_share(g, p, out, plan, tiles, rows, turned, turned_g, fields, units, thread, threads):
    mode = set_float_mode(IEEE)
    plan = Plan(*plan)
    g, p, out = borrow(g), borrow(p), borrow(out)
    r = from_line(own_of(fields, thread), FIELDS + plan.carries)
    scratch = from_line(scratch_of(tiles, rows, thread), plan.numbers)
    own_turned, own_turned_g = own_of(turned, thread), own_of(turned_g, thread)
    buffer, tile, upstreams = tile_scratch(unless_none(tiles, scratch), plan)
    p_rows, out_rows = rows_of(p, own_turned, plan.layout), rows_to(out, own_turned, plan.layout)
    g_rows = rows_of(g, own_turned_g, plan.layout)
    begin_carries(r)
    for unit in share_of(units, thread, threads):
        first = unit * plan.group
        last = min(first + plan.group, plan.rows)
        if tiles is not None:
            kept = tile[STEP:]
            if plan.inner == 1 and backward_run(
                g, p, out, r, kept, buffer, upstreams, first, last - first, plan
            ):
                continue
        load_unit(
            p, tiles, turned, tile, buffer, own_turned, first, last - first, plan.storage, plan
        )
        load_unit(
            g, tiles, turned, upstreams, buffer, own_turned_g, first, last - first,
            plan.other_storage, plan,
        )  # fmt: skip
        for start in range(first, last, plan.summed):
            n = min(plan.summed, last - start)
            lane = start - first
            if tiles is not None:
                backward_tile(tile[lane:], upstreams[lane:], r, plan)
            if rows is not None:
                row = lane if plan.layout == COLUMNS else start
                backward_rows(g_rows, p_rows, out_rows, r, scratch, row, n, plan)
        store_unit(out, tiles, turned, tile, own_turned, scratch, r, first, last - first, plan)
    flush_carries(out, r, scratch)
    end_stream()
    set_float_mode(mode)


@entry
def cross_entropy_share(
    x, target, soft, weight, sample_weight, relative_weight, largest_weight, weight_sum, plan,
    ignore_index, options, scale, tame_scale, losses, out, tiles, rows, turned, turned_soft, fields,
    partial, units, thread, threads,
):  # fmt: skip
    """Of indices, or of soft targets: the other is None; so are options where they are plain."""
    mode = set_float_mode(IEEE)
    plan = plan_of_share(plan, options)
    given = options_of(options)
    x, out, soft_scores = borrow(x), borrow(out), borrow(soft)
    r = from_line(own_of(fields, thread), FIELDS + plan.carries)
    scratch = from_line(scratch_of(tiles, rows, thread), plan.numbers)
    own_turned, own_turned_soft = own_of(turned, thread), own_of(turned_soft, thread)
    buffer, tile, other = tile_scratch(unless_none(tiles, scratch), plan)
    x_rows, out_rows = rows_of(x, own_turned, plan.layout), rows_to(out, own_turned, plan.layout)
    soft_rows = rows_of(soft_scores, own_turned_soft, plan.layout)
    begin_carries(r)
    untamed = 0  # rows of the last unit that common units were not for
    for unit in share_of(units, thread, threads):
        first = unit * plan.group
        last = min(first + plan.group, plan.rows)
        if tiles is not None:
            # Of LANES rows: how often loops go round is known where they are compiled.
            whole = plan.inner == 1 and last - first == LANES
            short = whole and not untamed
            if target is not None:
                kept, ahead = tile[STEP:], plan.group * plan.num_classes
                if short:
                    read_targets(
                        r, target, weight, sample_weight, first, LANES, plan.num_classes,
                        ignore_index, given, largest_weight,
                    )  # fmt: skip
                    untamed = exp_rows_from_target(
                        x, r, kept, first, LANES, plan, buffer, ahead, given, tame_scale
                    )
                if short and not untamed:
                    if given is not None and label_smoothing_of(given) != 0.0:
                        gaps_of_short_rows(
                            x, r, other[STEP:], first, LANES, plan, relative_weight,
                            largest_weight, buffer,
                        )  # fmt: skip
                    scalar_step(soft, r, LANES, plan, given, scale, weight_sum, kept)
                    partial[unit] = deliver_losses(r, LANES, losses, first, kept)
                    if out.size:
                        write_run(
                            out, r, kept, other, first, LANES, plan, relative_weight,
                            largest_weight, given,
                        )  # fmt: skip
                    continue
        load_unit(
            x, tiles, turned, tile, buffer, own_turned, first, last - first, plan.storage, plan
        )
        if soft is not None:
            load_unit(
                soft_scores, tiles, turned, other, buffer, own_turned_soft, first, last - first,
                plan.other_storage, plan,
            )  # fmt: skip
        for start in range(first, last, plan.summed):
            n = min(plan.summed, last - start)
            if target is not None:
                read_targets(
                    r, target, weight, sample_weight, start, n, plan.num_classes, ignore_index,
                    given, largest_weight,
                )  # fmt: skip
            if soft is not None:
                read_sample_weights(r, sample_weight, start, n)
            if tiles is not None:
                own_tile, own_other = tile[start - first :], other[start - first :]
                own_soft = unless_none(soft, own_other)
                untamed = reduce_tile(
                    own_tile, own_other, target, own_soft, r, n, x, start + plan.group, plan,
                    relative_weight, largest_weight, given, tame_scale,
                )  # fmt: skip
            if rows is not None:
                row = start - first if plan.layout == COLUMNS else start
                reduce_rows(
                    x_rows, target, soft_rows, r, scratch, row, n, plan, relative_weight,
                    largest_weight, given, tame_scale,
                )  # fmt: skip
            count = LANES if plan.layout == TILES else n
            scalar_step(soft, r, count, plan, given, scale, weight_sum, scratch)
            partial[start // plan.summed] = deliver_losses(r, n, losses, start, scratch)
            if out.size and tiles is not None:
                write_tile(
                    own_other, own_tile, own_soft, r, plan, relative_weight, largest_weight, given
                )
            if out.size and rows is not None:
                write_rows(
                    out_rows, soft_rows, r, scratch, row, n, plan, relative_weight,
                    largest_weight, given,
                )  # fmt: skip
        if out.size:
            store_unit(out, tiles, turned, tile, own_turned, scratch, r, first, last - first, plan)
    flush_carries(out, r, scratch)
    end_stream()
    set_float_mode(mode)


@entry
def shared_share(
    stage, x, target, soft, weight, sample_weight, relative_weight, largest_weight, weight_sum,
    plan, ignore_index, options, scale, tame_scale, losses, out, scratch, kept, found, fields,
    partial, blocks, thread, threads,
):  # fmt: skip
    """All but the backward functions: target and soft are None where there are no losses."""
    mode = set_float_mode(IEEE)
    given = options_of(options)
    shared = shared_of(
        x, out, fields, found, kept, plan_of_share(plan, options), relative_weight, largest_weight,
        scale, tame_scale, scratch, thread,
    )  # fmt: skip
    soft_scores = borrow(soft)
    if not blocks:
        stage[0] = next_stage(
            stage[0], shared, target, soft_scores, weight, sample_weight, ignore_index, given,
            losses, partial, weight_sum,
        )  # fmt: skip
    for place in share_of(blocks, thread, threads):
        if is_taken(stage[0], shared, place):
            take_block(stage[0], shared, soft_scores, given, losses, place)
    end_stream()
    set_float_mode(mode)


@entry
def shared_backward_share(
    stage, g, p, out, plan, scratch, kept, found, fields, blocks, thread, threads
):
    mode = set_float_mode(IEEE)
    shared = shared_of(
        p, out, fields, found, kept, Plan(*plan), None, 1.0, 1.0, 1.0, scratch, thread
    )
    upstream = borrow(g)
    if not blocks:
        stage[0] = next_stage_of_backward(stage[0], shared)
    for place in share_of(blocks, thread, threads):
        if is_taken(stage[0], shared, place):
            take_block_of_backward(stage[0], shared, upstream, place)
    end_stream()
    set_float_mode(mode)


@entry
def nll_share(
    log_probs, target, weight, sample_weight, plan, ignore_index, losses, scratch, fields, partial,
    units, thread, threads,
):  # fmt: skip
    mode = set_float_mode(IEEE)
    plan = Plan(*plan)
    r = fields[thread]
    for unit in share_of(units, thread, threads):
        start = unit * LANES
        n = min(LANES, plan.rows - start)
        read_targets(
            r, target, weight, sample_weight, start, n, plan.num_classes, ignore_index, None, 0.0
        )
        nll_unit(log_probs, r, start, n, plan)
        partial[unit] = deliver_losses(r, n, losses, start, scratch[thread])
    set_float_mode(mode)


@entry
def nll_backward_share(
    target, weight, sample_weight, plan, ignore_index, scale, out, scratch, fields, units, thread,
    threads,
):  # fmt: skip
    mode = set_float_mode(IEEE)
    plan = Plan(*plan)
    r = fields[thread]
    for unit in share_of(units, thread, threads):
        start = unit * LANES
        n = min(LANES, plan.rows - start)
        read_targets(
            r, target, weight, sample_weight, start, n, plan.num_classes, ignore_index, None, 0.0
        )
        nll_backward_unit(out, r, scratch[thread], start, n, scale, plan)
    set_float_mode(mode)


@entry
def entropy_share(
    x, sample_weight, plan, options, scale, losses, out, tiles, rows, turned, fields, partial,
    units, thread, threads,
):  # fmt: skip
    mode = set_float_mode(IEEE)
    plan = plan_of_share(plan, options)
    x, out = borrow(x), borrow(out)
    cooling, wanted = 1.0 / options_of(options).temperature, out.size > 0
    r = from_line(own_of(fields, thread), FIELDS + plan.carries)
    scratch = from_line(scratch_of(tiles, rows, thread), plan.numbers)
    own_turned = own_of(turned, thread)
    buffer, tile, other = tile_scratch(unless_none(tiles, scratch), plan)
    x_rows, out_rows = rows_of(x, own_turned, plan.layout), rows_to(out, own_turned, plan.layout)
    begin_carries(r)
    for unit in share_of(units, thread, threads):
        first = unit * plan.group
        last = min(first + plan.group, plan.rows)
        load_unit(
            x, tiles, turned, tile, buffer, own_turned, first, last - first, plan.storage, plan
        )
        for start in range(first, last, plan.summed):
            n = min(plan.summed, last - start)
            for i in range(LANES):
                r[ROW_WEIGHT + i] = 0.0
            read_sample_weights(r, sample_weight, start, n)
            lane = start - first
            if tiles is not None:
                entropy_tile(tile[lane:], other[lane:], r, plan, scale, cooling, wanted)
            if rows is not None:
                row = lane if plan.layout == COLUMNS else start
                entropy_rows(x_rows, out_rows, r, scratch, row, n, plan, scale, cooling, wanted)
            partial[start // plan.summed] = deliver_losses(r, n, losses, start, scratch)
        if wanted:
            store_unit(out, tiles, turned, tile, own_turned, scratch, r, first, last - first, plan)
    flush_carries(out, r, scratch)
    end_stream()
    set_float_mode(mode)


@entry
def binary_share(
    x, target, soft, weight, sample_weight, plan, options, focal, scale, losses, out, scratch,
    partial, units, thread, threads,
):  # fmt: skip
    """Of integers, or of numbers: the other is None; so is `focal` where the loss is another."""
    mode = set_float_mode(IEEE)
    plan = Plan(*plan)
    given = options_of(options)
    x, out, numbers = borrow(x), borrow(out), borrow(soft)
    own = from_line(borrow(scratch[thread]), binary_numbers())
    size = plan.rows * plan.num_classes
    for unit in share_of(units, thread, threads):
        first = unit * PART * PARTS
        partial[unit] = binary_unit(
            x, target, numbers, weight, sample_weight, losses, out, own, first,
            min(PART * PARTS, size - first), plan, given, focal, scale,
        )  # fmt: skip
    end_stream()
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

_NOTHING = {dtype: np.empty(0, dtype) for dtype in (np.float32, np.float64)}  # to write to
_ABSENT = {dtype: np.empty(0, dtype) for dtype in _NOTHING}  # to read
for _absent in _ABSENT.values():
    _absent.setflags(write=False)  # as _read_only
_KINDS = {np.dtype(name): kind for kind, name in enumerate(INTEGERS)}
_SMALL = (np.dtype(np.int32), np.dtype(np.int64))  # targets that small calls mostly have
_addresses = {}  # of compiled shares, by the kinds of their arguments
_launch_lock = threading.Lock()
_layer_started = False


def softmax(logits, out, num_threads):
    plan, units, threads = plan_of(SOFTMAX, logits, out, num_threads)
    if sharing := _sharing(plan, units, num_threads):
        _map_shared(logits, out, plan, sharing)
        return
    x = _flat(logits)
    arguments = (x, _flat_out(out), tuple(plan), *_scratch(logits, plan, threads),
                 _turned(x, plan, threads), _fields(plan, threads))  # fmt: skip
    _run(softmax_share, arguments, units, threads)


def log_softmax(logits, out, num_threads):
    _log_softmax(LOG_SOFTMAX, logits, out, num_threads)


def logsumexp(logits, out, num_threads):
    _log_softmax(LOGSUMEXP, logits, out, num_threads)


def _log_softmax(operation, logits, out, num_threads):
    plan, units, threads = plan_of(operation, logits, out, num_threads)
    if sharing := _sharing(plan, units, num_threads):
        _map_shared(logits, out, plan, sharing)
        return
    x = _flat(logits)
    arguments = (x, _flat_out(out), tuple(plan), *_scratch(logits, plan, threads),
                 _turned(x, plan, threads), _fields(plan, threads))  # fmt: skip
    _run(log_softmax_share, arguments, units, threads)


def softmax_backward(grad_output, probs, out, num_threads):
    _backward(SOFTMAX_BACKWARD, grad_output, probs, out, num_threads)


def log_softmax_backward(grad_output, log_probs, out, num_threads):
    _backward(LOG_SOFTMAX_BACKWARD, grad_output, log_probs, out, num_threads)


def _backward(operation, grad_output, forward, out, num_threads):
    plan, units, threads = plan_of(operation, forward, out, num_threads, grad_output)
    g, p = _flat(grad_output), _flat(forward)
    if sharing := _sharing(plan, units, num_threads):
        arguments = (g, p, _flat_out(out), tuple(plan), *_shared_scratch(forward, plan, sharing))
        _run_shared(shared_backward_share, arguments, plan, sharing)
        return
    arguments = (g, p, _flat_out(out), tuple(plan), *_scratch(forward, plan, threads),
                 _turned(p, plan, threads), _turned(g, plan, threads),
                 _fields(plan, threads))  # fmt: skip
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
    if scale == 0.0 and grad is not None:
        return _without_rows(cross_entropy, logits, labels, options, losses, grad, num_threads)
    small = None if num_threads > 1 else _small_plan(logits, labels, options, losses)
    if small and (address := _addresses.get((cross_entropy_share, logits.dtype))):
        target, out = labels.target, _NOTHING[logits.dtype.type] if grad is None else grad
        return small_loss(
            address, _read_only(logits), _read_only(target), _KINDS[target.dtype], out.reshape(-1),
            small, options.ignore_index, scale,
        )  # fmt: skip
    if labels.soft:
        target, soft = None, _flat(labels.target)
        plan, units, threads = plan_of(CROSS_ENTROPY_SOFT, logits, grad, num_threads, labels.target)
    else:
        target, soft = _integers(labels.target), None
        plan, units, threads = plan_of(CROSS_ENTROPY, logits, grad, num_threads)
    x = _flat(logits)
    given = None
    if labels.soft or not is_plain(options):
        real = np.dtype(_compute_dtype(logits))
        given = (*options, *_temper.temper(options.temperature, real))
    scale /= options.temperature  # gradients are those of x, and not of x / T
    weight_sum = float(plan.num_classes if labels.weight is None else labels.weight.sum())
    partial = np.empty(-(-plan.rows // plan.summed))
    arguments = (
        x, target, soft, *_weights(labels), *_relative(labels, options, logits), weight_sum,
        tuple(plan), options.ignore_index, given, scale,
        _tame_scale(labels, options, scale, logits),
        *_outputs(logits, losses, grad),
    )  # fmt: skip
    if sharing := _sharing(plan, units, num_threads):
        scratch = _shared_scratch(logits, plan, sharing, grad is not None)
        _run_shared(shared_share, (*arguments, *scratch, partial), plan, sharing)
        return _total(partial)
    turned_soft = None if soft is None else _turned(soft, plan, threads)
    arguments = (
        *arguments, *_scratch(logits, plan, threads), _turned(x, plan, threads), turned_soft,
        _fields(plan, threads), partial,
    )  # fmt: skip
    if small:
        _addresses[cross_entropy_share, logits.dtype] = _address(cross_entropy_share, arguments)
        return cross_entropy(logits, labels, options, scale, losses, grad, num_threads)
    _run(cross_entropy_share, arguments, units, threads)
    return _total(partial)


def _without_rows(loss, logits, labels, options, losses, grad, num_threads):
    """Where the scale is 0, no row counts, not even one that holds a NaN."""
    total = loss(logits, labels, options, 0.0, losses, None, num_threads)
    grad.fill(0)
    return total


def _small_plan(logits, labels, options, losses):
    """The plan of a call of few units without weights and options, as a tuple; else None."""
    target, weight, sample_weight = labels
    if (
        weight is None and sample_weight is None and losses is None and is_plain(options)
        and target.dtype in _SMALL and target.size < FEW * LANES and logits.itemsize != 2
    ):  # fmt: skip
        return _plan_of_few(logits.shape, storage_of(logits))
    return None


@functools.lru_cache
def _plan_of_few(shape, storage):
    plan = _plan_of(CROSS_ENTROPY, shape, storage, storage, False)
    return tuple(plan) if plan.layout == TILES and plan.rows else None


def nll_loss(log_probs, labels, options, scale, losses, grad, num_threads):
    plan, _, _ = plan_of(NLL, log_probs, None, num_threads)
    units = -(-plan.rows // LANES)
    threads = min(num_threads, units)
    partial = np.empty(units)
    scratch = np.empty((max(threads, 1), 1), _compute_dtype(log_probs))
    fields = np.empty((max(threads, 1), FIELDS))
    rows = (_integers(labels.target), *_weights(labels), tuple(plan), options.ignore_index)
    losses, out = _outputs(log_probs, losses, grad)
    _run(nll_share, (_flat(log_probs), *rows, losses, scratch, fields, partial), units, threads)
    if grad is not None:  # which may be log_probs: not before these were read
        out.fill(0)
        _run(nll_backward_share, (*rows, scale, out, scratch, fields), units, threads)
    return _total(partial)


def entropy(logits, labels, options, scale, losses, grad, num_threads):
    if scale == 0.0 and grad is not None:
        return _without_rows(entropy, logits, labels, options, losses, grad, num_threads)
    plan, units, threads = plan_of(ENTROPY, logits, grad, num_threads)
    x, partial = _flat(logits), np.empty(-(-plan.rows // plan.summed))
    real = np.dtype(_compute_dtype(logits))
    arguments = (
        x, _or_absent(labels.sample_weight), tuple(plan),
        (*options, *_temper.temper(options.temperature, real)), scale / options.temperature,
        *_outputs(logits, losses, grad), *_scratch(logits, plan, threads),
        _turned(x, plan, threads), _fields(plan, threads), partial,
    )  # fmt: skip
    _run(entropy_share, arguments, units, threads)
    return _total(partial)


def binary_cross_entropy_with_logits(logits, labels, options, scale, losses, grad, num_threads):
    if scale == 0.0 and grad is not None:
        return _without_rows(
            binary_cross_entropy_with_logits, logits, labels, options, losses, grad, num_threads
        )
    return _binary(logits, labels, options, None, scale, losses, grad, num_threads)


def sigmoid_focal_loss(logits, labels, options, scale, losses, grad, num_threads):
    if scale == 0.0 and grad is not None:
        return _without_rows(sigmoid_focal_loss, logits, labels, options, losses, grad, num_threads)
    return _binary(logits, labels, options, True, scale, losses, grad, num_threads)


def _binary(logits, labels, options, focal, scale, losses, grad, num_threads):
    target, soft = (None, _flat(labels.target)) if labels.soft else (_integers(labels.target), None)
    plan, _, _ = plan_of(BINARY, logits, grad, num_threads, labels.target if labels.soft else None)
    if plan.num_classes == 1:
        plan = plan._replace(inner=plan.rows)  # the longer the runs of elements of one class
    units = -(-logits.size // (PART * PARTS))
    threads = min(num_threads, units)
    real = _compute_dtype(logits)
    weight = _ABSENT[real] if labels.weight is None else _read_only(labels.weight.astype(real))
    scratch = np.empty((max(threads, 1), binary_numbers.py_func() + LINE // 4), real)
    partial = np.empty(units)
    arguments = (
        _flat(logits), target, soft, weight, _or_absent(labels.sample_weight), tuple(plan),
        tuple(options), focal, scale, *_outputs(logits, losses, grad), scratch, partial,
    )  # fmt: skip
    _run(binary_share, arguments, units, threads)
    return _total(partial)


def _total(partial):
    """The sum of the row losses from those of rows summed together; small calls have few."""
    if partial.size < FEW:  # as small_loss; sum() adds more exactly from Python 3.12 on
        total = 0.0
        for part in partial.tolist():
            total += part
        return total
    # Out is written: a sum of losses that is infinite or NaN must not become an error now.
    with np.errstate(all="ignore"):
        return float(partial.sum())


def _read_only(array):
    """The array in one dimension; read-only, as some inputs are: one type for all is compiled."""
    flat = array.reshape(-1)
    flat.setflags(write=False)
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
    return _read_only(target).view(np.uint8), _KINDS[target.dtype]


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


def _relative(labels, options, logits):
    """Class weights over the largest in magnitude, in the compute type; and that.

    With label smoothing, of short rows, those of sixteen rows.
    """
    weight, num_classes, real = labels.weight, logits.shape[1], _compute_dtype(logits)
    repeated = STEP if options.label_smoothing and num_classes <= SHORT_ROW else 1
    if weight is None:
        ones = _ABSENT[real] if repeated == 1 else np.ones(repeated * num_classes, real)
        return _read_only(ones), 1.0
    largest_weight = float(np.abs(weight).max())
    relative = (weight / (largest_weight or 1.0)).astype(real)
    return _read_only(np.tile(relative, repeated)), largest_weight


def _tame_scale(labels, options, scale, logits):
    """The scale, less if factors may be smaller than weights, 0 if no row is to be taken in common
    units (find_untamed)."""
    # Of what is related to the target, only as much may cancel as its own loss comes to.
    smoothing, least, mean = options.label_smoothing, 1.0, 1.0
    if smoothing and labels.weight is not None:
        size = np.abs(labels.weight)
        least, mean = size.min(), size.mean()
    if options.gamma and logits.itemsize == 8:
        return scale * 2.0**-300
    return scale if (1.0 - smoothing) * least >= smoothing * mean else 0.0


def _outputs(logits, losses, grad):
    """Arrays of the types that the kernels expect, empty where nothing is to be written."""
    losses = _NOTHING[_compute_dtype(logits)] if losses is None else losses.reshape(-1)
    return losses, _flat_out(np.empty(0, logits.dtype) if grad is None else grad)


def plan_of(operation, array, out, num_threads, other=None):
    """The plan, how many units of work it makes, and how many threads they are for."""
    # In place, what is written is in the cache already.
    stream = (
        operation != LOGSUMEXP
        and out is not None
        and out.nbytes >= STREAM_BYTES
        and not np.may_share_memory(array, out)
    )
    storage = storage_of(array)
    other_storage = storage if other is None else storage_of(other)
    plan = _plan_of(operation, array.shape, storage, other_storage, stream)
    units = -(-plan.rows // plan.group)
    return plan, units, min(num_threads, units)


@functools.lru_cache  # small calls come again and again
def _plan_of(operation, shape, storage, other_storage, stream):
    outer, num_classes, inner = shape
    rows = outer * inner
    group = summed = step = LANES
    row_step = num_classes
    if num_classes <= SHORT_ROW:
        layout = TILES
        tiles = min(WIDE // (num_classes * LANES), rows // (LANES * FEWEST_UNITS), MOST_TILES)
        if inner > 1 and tiles > 1:
            group = LANES * tiles
            step = group + LINE // 4  # else classes fall on the same sets of the cache
        numbers = tile_numbers.py_func(num_classes, step)
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
        numbers = row_numbers.py_func(num_classes, summed)
    carries = num_classes if stream and inner > 1 and storage in (FLOAT32, FLOAT64) else 0
    numbers += carries * (LINE // (8 if storage == FLOAT64 else 4))
    numbers += -numbers % 16  # threads do not share a cache line
    return Plan(operation, rows, num_classes, inner, layout, storage, other_storage, stream,
                summed, group, row_step, step, carries, numbers)  # fmt: skip


def _scratch(array, plan, threads):
    """Scratch for each thread, as one that is not None: for tiles, or else for rows.

    Taken here, so that want of memory is an error and no crash.
    """
    scratch = np.empty((max(threads, 1), plan.numbers + LINE // 4), _compute_dtype(array))
    return (scratch, None) if plan.layout == TILES else (None, scratch)


def _fields(plan, threads):
    return np.empty((max(threads, 1), FIELDS + plan.carries + LINE // 8))


def _turned(flat, plan, threads):
    """Room for a unit of columns as rows, for each thread; nothing for rows, None for tiles."""
    if plan.layout == TILES:
        return None
    size = 0
    if plan.layout == COLUMNS:
        size = turned_numbers(min(plan.group, plan.rows), plan.row_step)
    return np.empty((max(threads, 1), size), flat.dtype)


def _sharing(plan, units, num_threads):
    """How many threads share each row; 0 where rows are short, or more than threads."""
    threads = min(num_threads, plan.rows * plan.num_classes // PIECE)
    return threads if may_be_shared(plan) and units < threads and _start_layer() else 0


def _shared_scratch(array, plan, threads, keeps=False):
    """Scratch for each thread, exponentials if they are kept, what blocks and rows come to."""
    real, blocks = _compute_dtype(array), plan.rows * -(-plan.num_classes // BLOCK)
    return (
        np.empty((threads, 3 * BLOCK), real), np.empty(blocks * BLOCK * keeps, real),
        np.zeros((FOUND, blocks)), np.empty((1, FIELDS)),
    )  # fmt: skip


def _map_shared(logits, out, plan, threads):
    real = _compute_dtype(logits)
    absent = (_ABSENT[np.float64], _ABSENT[np.float64], _ABSENT[real])
    arguments = (
        _flat(logits), None, None, *absent, 1.0, 0.0, tuple(plan), 0, None, 1.0, 1.0, None,
        _flat_out(out), *_shared_scratch(logits, plan, threads, plan.operation == SOFTMAX), None,
    )  # fmt: skip
    _run_shared(shared_share, arguments, plan, threads)


def _run_shared(share, arguments, plan, threads):
    blocks = plan.rows * -(-plan.num_classes // BLOCK)
    _run(share, (np.full(1, FIRST), *arguments), blocks, threads, in_stages)


def _run(share, arguments, units, threads, launch=on_threads):
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
            launch(address, arguments, units, threads)
        finally:
            numba.set_num_threads(before)


def _address(share, arguments):
    """Where the share that was compiled for such arguments lies; it is compiled on first use."""
    # Not by Numba's types, which take 100 us to find out: in one place only this differs.
    kinds = (share, *[a.dtype if isinstance(a, np.ndarray) else type(a) for a in arguments])
    if kinds not in _addresses:
        signature = (*map(share.typeof_pyval, arguments), *3 * (types.intp,))
        if signature not in share.overloads:
            share.compile(signature)
        compiled = share.overloads[signature]
        _addresses[kinds] = compiled.library.get_pointer_to_function(compiled.fndesc.llvm_func_name)
    return _addresses[kinds]


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
        one, target = logits[:1], Labels(labels.target[:1], None, None)
        cross_entropy(one, target, options, 1.0, None, np.empty_like(one), 1)


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
