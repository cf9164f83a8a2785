"""Long rows, fewer of them than threads: shared out among these, block by block.

In each stage every thread takes its share of the blocks, by the functions that rows.py and
backward.py take whole rows with.  In between, one thread puts together what was found, in the
order of the blocks: the bits are those of rows that are not shared.
"""

from typing import NamedTuple

import numpy as np
from numba import types

from fastloss._numba.arithmetic import magic_of, pivot_of, power_of, temper_of
from fastloss._numba.backward import backward_block, is_huge, terms_of_block
from fastloss._numba.blocks import (
    exp_block,
    exp_run,
    find,
    largest,
    scale_kept,
    sum_kept,
    top_block,
)
from fastloss._numba.jit import inline
from fastloss._numba.losses import (
    add_exponentials,
    deliver_losses,
    label_smoothing_of,
    scalar_step,
)
from fastloss._numba.machine import borrow
from fastloss._numba.memory import load_block, load_one, store
from fastloss._numba.rows import (
    begin_top,
    find_untamed,
    gap_of_block,
    gaps_of_block,
    join_top,
    log_softmax_step,
    narrow_factor,
    reduce_to_nothing,
    relate_to_targets,
    row_scratch,
    shift_block,
    units_of_row,
    write_block,
)
from fastloss._numba.targets import read_sample_weights, read_targets
from fastloss._numba.types import (
    BLOCK,
    COMMON_UNITS,
    DONE,
    FACTOR,
    FIRST,
    GAP,
    GAPS,
    INDEX,
    LANES,
    LEFT_OUT,
    LOG_SOFTMAX_BACKWARD,
    LOG_SUM,
    LOGSUMEXP,
    LOSS,
    MASS,
    MAXIMA,
    MAXIMUM,
    OTHERS,
    OWN,
    OWN_UNITS,
    ROW_WEIGHT,
    ROWS,
    SOFTMAX,
    TARGET_EXP,
    TARGET_LOGIT,
    TARGET_WEIGHT,
    TOP,
    TOP_MASS,
    WRITE,
    Plan,
    is_log,
)

# What a block was reduced to.
HIGHEST, SUM, TOPS, GAP_SUM, MASS_SUM, TOP_MASS_SUM = range(6)
FOUND = 6


class Shared(NamedTuple):
    """Rows that threads share."""

    x: types.Array
    out: types.Array
    r: types.Array
    found: types.Array  # FOUND numbers for each block
    kept: types.Array  # exponentials, of whole blocks; empty where they are not asked for again
    plan: Plan
    blocks: int  # of a row
    weight: types.Array  # relative
    largest_weight: float
    scale: float
    tame_scale: float
    buffer: types.Array
    line: types.Array
    rest: types.Array


def may_be_shared(plan):
    return plan.layout == ROWS and plan.group == 1 and plan.rows <= LANES


@inline
def shared_of(
    x, out, fields, found, kept, plan, weight, largest_weight, scale, tame_scale, scratch, thread
):
    blocks = -(-plan.num_classes // BLOCK)
    buffer, line, rest = row_scratch(borrow(scratch[thread]))
    return Shared(
        borrow(x), borrow(out), borrow(fields[0]), borrow(found), borrow(kept), plan, blocks,
        weight, largest_weight, scale, tame_scale, buffer, line, rest,
    )  # fmt: skip


@inline
def first_stage(shared, target, soft, weight, sample_weight, ignore_index, options):
    r, plan = shared.r, shared.plan
    for i in range(plan.rows):
        r[INDEX + i] = -1.0
        r[ROW_WEIGHT + i] = 1.0
        r[TARGET_WEIGHT + i] = 1.0
    if target is not None:
        read_targets(
            r, target, weight, sample_weight, 0, plan.rows, plan.num_classes, ignore_index,
            options, shared.largest_weight,
        )  # fmt: skip
    if soft is not None:
        read_sample_weights(r, sample_weight, 0, plan.rows)
    for i in range(plan.rows):
        r[OWN + i] = 0.0 if r[ROW_WEIGHT + i] == 0.0 else 1.0
        reduce_to_nothing(r, i)
    return COMMON_UNITS if soft is None else MAXIMA


@inline
def next_stage(
    stage, shared, target, soft, weight, sample_weight, ignore_index, options, losses, partial,
    weight_sum,
):  # fmt: skip
    """What is left to do after a stage, which is put together here."""
    plan = shared.plan
    if stage == FIRST:
        return first_stage(shared, target, soft, weight, sample_weight, ignore_index, options)
    if stage == WRITE:
        return DONE
    if stage == MAXIMA:
        join_maxima(shared, target, False)
        return OWN_UNITS
    if stage == COMMON_UNITS:
        if join_in_common_units(shared, target, options):
            return OWN_UNITS if is_log(plan.operation) else MAXIMA
    elif stage == OWN_UNITS:
        join_in_own_units(shared)
    else:
        join_gaps(shared)
    if soft is None and label_smoothing_of(options) != 0.0 and stage != GAPS:
        return GAPS
    finish_rows(shared, soft, options, losses, partial, weight_sum)
    return WRITE if shared.out.size and plan.operation != LOGSUMEXP else DONE


@inline
def sum_up(shared, i):
    """The sum of a row, and, where that leaves out the maximum, what top_of_row says."""
    r, found = shared.r, shared.found
    if not is_log(shared.plan.operation):
        r[OTHERS + i] = sum_of_blocks(shared, SUM, i)
        return
    begin_top(r, i)
    for place in range(i * shared.blocks, (i + 1) * shared.blocks):
        join_top(r, i, found[HIGHEST, place], found[TOPS, place], found[SUM, place])


@inline
def sum_of_blocks(shared, field, i):
    total = 0.0
    for place in range(i * shared.blocks, (i + 1) * shared.blocks):
        total += shared.found[field, place]
    return total


@inline
def join_in_common_units(shared, target, options):
    """How many rows there are that common units are not for."""
    r, plan = shared.r, shared.plan
    for i in range(plan.rows):
        sum_up(shared, i)
        if target is None:
            r[TARGET_EXP + i] = r[TOP + i] if is_log(plan.operation) else r[OTHERS + i]
    untamed = find_untamed(r, plan.rows, shared.tame_scale, shared.buffer, options)
    if target is not None:
        relate_to_targets(shared.x, r, 0, plan.rows, plan, options)
    return untamed


@inline
def join_maxima(shared, target, is_backward):
    """The maxima, and where in its row each is, if it is what the sum leaves out."""
    r, plan, real = shared.r, shared.plan, shared.buffer.dtype.type
    for i in range(plan.rows):
        if r[OWN + i] == 0.0:
            continue
        m = -np.inf
        for b in range(shared.blocks):
            m = max(m, shared.found[HIGHEST, i * shared.blocks + b])
        r[MAXIMUM + i] = m
        if target is not None or plan.operation == SOFTMAX or is_backward:
            continue
        r[INDEX + i] = 0.0
        for b in range(shared.blocks):
            c = b * BLOCK
            n = min(BLOCK, plan.num_classes - c)
            k = n
            if shared.found[HIGHEST, i * shared.blocks + b] == m:
                start = i * plan.num_classes + c
                k = find(load_block(shared.x, start, n, shared.buffer, plan.storage), real(m))
            if k < n:
                r[INDEX + i] = c + k
                break


@inline
def join_in_own_units(shared):
    r, plan = shared.r, shared.plan
    for i in range(plan.rows):
        if r[OWN + i] == 0.0:
            continue
        sum_up(shared, i)
        if plan.operation == SOFTMAX or is_log(plan.operation):
            continue
        r[GAP + i] = sum_of_blocks(shared, GAP_SUM, i)
        r[MASS + i] = sum_of_blocks(shared, MASS_SUM, i)
        r[TOP_MASS + i] = sum_of_blocks(shared, TOP_MASS_SUM, i)
        place = i * plan.num_classes + int(r[INDEX + i])
        r[TARGET_LOGIT + i] = load_one(shared.x, place, plan.storage)
        add_exponentials(r[i:], 1, shared.buffer, plan)


@inline
def join_gaps(shared):
    for i in range(shared.plan.rows):
        shared.r[GAP + i] = sum_of_blocks(shared, GAP_SUM, i) * shared.largest_weight


@inline
def finish_rows(shared, soft, options, losses, partial, weight_sum):
    """The scalar step."""
    r, plan, buffer = shared.r, shared.plan, shared.buffer
    n = plan.rows
    if losses is not None:
        scalar_step(soft, r, n, plan, options, shared.scale, weight_sum, buffer)
        deliver_losses(r, n, losses, 0, buffer)
        for i in range(n):
            partial[i] = 0.0 + r[LOSS + i]
    elif plan.operation == SOFTMAX:
        for i in range(n):
            r[FACTOR + i] = 1.0 / (r[OTHERS + i] * np.float64(power_of(buffer)))
    else:
        log_softmax_step(shared.x, r, 0, n, plan, buffer)
        if plan.operation == LOGSUMEXP:
            for i in range(n):
                buffer[i] = r[MAXIMUM + i] + r[LOG_SUM + i]
            store(shared.out, 0, buffer[:n], plan.storage, False)


@inline
def take_block(stage, shared, soft, options, losses, place):
    """The stage, of one block."""
    r, plan, buffer, found = shared.r, shared.plan, shared.buffer, shared.found
    i, b = divmod(place, shared.blocks)
    c, start = b * BLOCK, i * plan.num_classes
    n = min(BLOCK, plan.num_classes - c)
    index = int(r[INDEX + i]) - c
    e = shared.rest
    if shared.kept.size:
        e = shared.kept[place * BLOCK : (place + 1) * BLOCK]
    x = load_block(shared.x, start + c, n, buffer, plan.storage)
    temper = temper_of(plan, buffer)
    if stage == WRITE:
        write_shared_block(shared, soft, options, losses, i, c, x, e[:n])
    elif stage == MAXIMA:
        found[HIGHEST, place] = largest(x)
    elif stage == GAPS:
        found[GAP_SUM, place] = gap_of_block(
            shared.x, start, c, r[MAXIMUM + i], plan, shared.weight, buffer
        )
    elif is_log(plan.operation):
        m = buffer.dtype.type(r[MAXIMUM + i])
        units = units_of_row(m, stage == OWN_UNITS, buffer, temper)
        found[HIGHEST, place], found[TOPS, place], found[SUM, place] = top_block(
            x, *units, temper, shared.x, start + c + BLOCK
        )
    elif stage == COMMON_UNITS:
        exp_run(x, e, temper, shared.x, start + c + BLOCK)
        if 0 <= index < n:
            r[TARGET_EXP + i] = e[index]
            e[index] = 0
        found[SUM, place] = sum_kept(e, n)
    else:
        m = buffer.dtype.type(r[MAXIMUM + i])
        if soft is not None:
            gap, mass, top_mass = gaps_of_block(
                shared.x, soft, start, c, index + c, m, plan, shared.weight,
                shared.largest_weight, options, buffer, shared.line, BLOCK,
            )  # fmt: skip
            found[GAP_SUM, place], found[MASS_SUM, place] = gap, mass
            found[TOP_MASS_SUM, place] = top_mass
        found[SUM, place] = exp_block(
            x,
            index,
            pivot_of(m, temper),
            magic_of(m, temper),
            e,
            temper,
            shared.x,
            start + c + BLOCK,
        )


@inline
def write_shared_block(shared, soft, options, losses, i, c, x, e):
    r, plan, to = shared.r, shared.plan, shared.line[: e.size]
    start = i * plan.num_classes + c
    index = int(r[INDEX + i]) - c
    left_out = e.dtype.type(r[LEFT_OUT + i])
    if losses is not None and r[ROW_WEIGHT + i] == 0.0:
        for j in range(e.size):
            to[j] = 0
    elif soft is not None or label_smoothing_of(options) != 0.0:
        write_block(
            e, soft, start - c, c, r, i, plan, shared.weight, shared.largest_weight, options,
            shared.buffer,
        )  # fmt: skip
        if 0 <= index < e.size:
            e[index] = left_out
        to = e
    elif losses is None and plan.operation != SOFTMAX:
        m, log_sum = e.dtype.type(r[MAXIMUM + i]), e.dtype.type(r[LOG_SUM + i])
        shift_block(x, m, log_sum, to)
    else:
        scale_kept(e, e.size, narrow_factor(e, r[FACTOR + i]), to)
        if 0 <= index < e.size:
            to[index] = left_out
    store(shared.out, start, to, plan.storage, plan.stream)


@inline
def is_taken(stage, shared, place):
    """Whether the stage is for this block's row."""
    own = shared.r[OWN + place // shared.blocks] != 0.0
    return own or stage in (COMMON_UNITS, GAPS, WRITE)


@inline
def next_stage_of_backward(stage, shared):
    r, plan = shared.r, shared.plan
    untamed = False
    if stage == FIRST:
        for i in range(plan.rows):
            r[OWN + i] = 1.0
        return COMMON_UNITS
    if stage == WRITE:
        return DONE
    for i in range(plan.rows):
        if r[OWN + i] != 0.0:
            r[OTHERS + i] = sum_of_blocks(shared, SUM, i)
    if stage == COMMON_UNITS:
        join_maxima(shared, None, True)
        for i in range(plan.rows):
            huge = is_huge(r[OTHERS + i], shared.buffer)
            r[OWN + i] = 1.0 if huge else 0.0
            untamed |= huge
    return OWN_UNITS if untamed else WRITE


@inline
def take_block_of_backward(stage, shared, g, place):
    r, plan, p = shared.r, shared.plan, shared.x
    buffer, line = shared.buffer, shared.line
    i, b = divmod(place, shared.blocks)
    c, start = b * BLOCK, i * plan.num_classes
    n = min(BLOCK, plan.num_classes - c)
    if stage == WRITE:
        to = shared.rest[:n]
        backward_block(
            g, p, start, c, r[OWN + i] != 0.0, r[MAXIMUM + i], r[OTHERS + i], to, plan, buffer, line
        )
        store(shared.out, start + c, to, plan.storage, plan.stream)
        return
    huge = stage == OWN_UNITS
    shared.found[SUM, place] = terms_of_block(g, p, start, c, huge, plan, buffer, line)
    if plan.operation == LOG_SOFTMAX_BACKWARD and not huge:
        shared.found[HIGHEST, place] = largest(load_block(p, start + c, n, line, plan.storage))
