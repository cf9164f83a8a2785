"""Rows: classes in the SIMD lanes.

A unit is a group of rows, so that the scalar step has something to vectorise, and what is
written is a long run.  Each stage goes over all rows of the group before the next: rows overlap
in the processor, stages of one row cannot.  Rows begin `row_step` numbers apart.  Scratch: two
blocks, and the group's rows with room for a last chunk, twice: exponentials, and what is written.
"""

import math

import numpy as np

from fastloss._numba.arithmetic import (
    in_common_units,
    log1p,
    magic_of,
    pivot_of,
    power_of,
    tame_of,
    tiny_of,
)
from fastloss._numba.blocks import (
    exp_block,
    exp_run,
    find,
    gap_block,
    holds_nan,
    largest,
    scale_kept,
    soft_gap,
    soft_mass,
    sum_kept,
)
from fastloss._numba.jit import inline, spliced
from fastloss._numba.losses import add_exponentials, asks_all_scores
from fastloss._numba.memory import load_block, load_one, store
from fastloss._numba.types import (
    AHEAD,
    BLOCK,
    CHUNK,
    FACTOR,
    GAP,
    INDEX,
    LEFT_OUT,
    LOG_SUM,
    LOGSUMEXP,
    MASS,
    MAXIMUM,
    OTHERS,
    ROW_WEIGHT,
    ROWS,
    SPREAD,
    TARGET_EXP,
    TARGET_LOGIT,
    TARGET_WEIGHT,
    TOP,
    TOP_MASS,
)


@inline
def row_numbers(num_classes, summed):
    """What a group of rows needs of scratch."""
    return 2 * BLOCK + 2 * (summed * num_classes + CHUNK)


@inline
def row_scratch(scratch):
    return scratch[:BLOCK], scratch[BLOCK : 2 * BLOCK], scratch[2 * BLOCK :]


@inline
def store_rows(out, first, kept, n, plan):
    num_classes = plan.num_classes
    stream = plan.stream and plan.layout == ROWS  # columns have yet to be turned back
    size = n * num_classes if plan.row_step == num_classes else num_classes
    for start in range(0, n * num_classes, size):
        row = first + start // num_classes
        store(out, row * plan.row_step, kept[start : start + size], plan.storage, stream)


@inline
def largest_of_row(x, row, plan, buffer):
    m = buffer.dtype.type(-np.inf)
    for c in range(0, plan.num_classes, BLOCK):
        n = min(BLOCK, plan.num_classes - c)
        block_m = largest(load_block(x, row * plan.row_step + c, n, buffer, plan.storage))
        m = block_m if block_m > m else m
    return m


@spliced
def largest_of_rows(x, first, n, plan, r, buffer):
    for i in range(n):
        r[MAXIMUM + i] = largest_of_row(x, first + i, plan, buffer)


@inline
def find_in_row(x, start, value, plan, buffer):
    """The first class whose score is value, or 0."""
    for c in range(0, plan.num_classes, BLOCK):
        n = min(BLOCK, plan.num_classes - c)
        i = find(load_block(x, start + c, n, buffer, plan.storage), value)
        if i < n:
            return c + i
    return 0


@inline
def row_holds_nan(x, start, plan, buffer):
    for c in range(0, plan.num_classes, BLOCK):
        n = min(BLOCK, plan.num_classes - c)
        if holds_nan(load_block(x, start + c, n, buffer, plan.storage), 1, n):
            return True
    return False


@spliced
def exp_row(x, start, skip, maximum, keep, kept, plan, buffer, line, ahead):
    """The sum of the exponentials without class `skip`; if keep, kept receives them all.

    Meanwhile what comes `ahead` elements later is fetched, so that memory is never idle.
    """
    m = buffer.dtype.type(maximum)
    pivot, magic = pivot_of(m), magic_of(m)
    total = 0.0
    for c in range(0, plan.num_classes, BLOCK):
        n = min(BLOCK, plan.num_classes - c)
        block = load_block(x, start + c, n, buffer, plan.storage)
        e = kept[c:] if keep else line
        total += exp_block(block, skip - c, pivot, magic, e, x, start + c + ahead)
    return total


@spliced
def exp_rows(x, kept, first, n, plan, buffer, ahead):
    """Exponentials in common units; the largest score.  Memory is fetched as in exp_row."""
    # Rows that lie next to each other are one run.
    runs, run = (1, n * plan.num_classes)
    if plan.row_step != plan.num_classes:
        runs, run = n, plan.num_classes
    top = buffer.dtype.type(-np.inf)
    for i in range(runs):
        start = (first + i) * plan.row_step
        for c in range(0, run, BLOCK):
            block = load_block(x, start + c, min(BLOCK, run - c), buffer, plan.storage)
            block_top = exp_run(block, kept[i * run + c :], x, start + c + ahead)
            top = block_top if block_top > top else top
    return top


@inline
def sum_row(e, num_classes):
    total = 0.0
    for c in range(0, num_classes, BLOCK):
        total += sum_kept(e[c:], min(BLOCK, num_classes - c))
    return total


@spliced
def is_tame(x, row, total, least, top, weight, plan, buffer):
    """Whether a row needs no reference of its own.  top is the largest score of it, or of more."""
    limit = tame_of(buffer)
    tame = in_common_units(total, least, min(top, limit), weight, buffer)
    if tame and top > limit:
        tame = largest_of_row(x, row, plan, buffer) <= limit
    return tame


@inline
def scale_row(e, f):
    for i in range(e.size):
        e[i] *= f


@inline
def narrow_factor(e, factor):
    """The factor on e in the compute type; where it is too small for that, on 2**-shift e."""
    real = e.dtype.type
    narrow = factor * np.float64(power_of(e))
    if factor != 0.0 and abs(narrow) < tiny_of(e):
        scale_row(e, power_of(e))
        narrow = factor
    return real(narrow)


@inline
def softmax_rows(x, out, r, scratch, first, n, plan):
    buffer, line, kept = row_scratch(scratch)
    scaled = kept[plan.summed * plan.num_classes + CHUNK :]
    ahead = min(n * plan.row_step, AHEAD)
    top = exp_rows(x, kept, first, n, plan, buffer, ahead)
    for i in range(n):
        r[OTHERS + i] = sum_row(kept[i * plan.num_classes :], plan.num_classes)
    for i in range(n):
        total = r[OTHERS + i]
        if not is_tame(x, first + i, 2.0 * total, total, top, 1.0, plan, buffer):
            r[OTHERS + i] = exp_row(
                x, (first + i) * plan.row_step, -1, largest_of_row(x, first + i, plan, buffer),
                True, kept[i * plan.num_classes :], plan, buffer, line, ahead,
            )  # fmt: skip
    for i in range(n):
        start = i * plan.num_classes
        e = kept[start : start + plan.num_classes]
        f = narrow_factor(e, 1.0 / (r[OTHERS + i] * np.float64(power_of(e))))
        scale_kept(kept[start:], plan.num_classes, f, scaled[start:])
    store_rows(out, first, scaled, n, plan)


@inline
def log_softmax_rows(x, out, r, scratch, first, n, plan):
    """log_softmax; or only what logsumexp needs."""
    buffer, line, kept = row_scratch(scratch)
    real = scratch.dtype.type
    ahead = min(n * plan.row_step, AHEAD)
    largest_of_rows(x, first, n, plan, r, buffer)
    for i in range(n):
        start = (first + i) * plan.row_step
        m = real(r[MAXIMUM + i])
        index = find_in_row(x, start, m, plan, buffer)
        r[TARGET_LOGIT + i] = m
        r[OTHERS + i] = exp_row(x, start, index, m, False, kept, plan, buffer, line, ahead)
    add_exponentials(r, n, scratch)
    for i in range(n):
        r[LOG_SUM + i] = log1p(r[OTHERS + i] / r[TOP + i])
    if plan.operation == LOGSUMEXP:
        for i in range(n):
            # Nothing but -inf, or a +inf: the maximum is all there is to the sum.
            if not math.isfinite(r[MAXIMUM + i]) and not row_holds_nan(
                x, (first + i) * plan.row_step, plan, buffer
            ):
                r[LOG_SUM + i] = 0.0
        return
    for i in range(n):
        m, log_sum = real(r[MAXIMUM + i]), real(r[LOG_SUM + i])
        for c in range(0, plan.num_classes, BLOCK):
            width = min(BLOCK, plan.num_classes - c)
            block = load_block(x, (first + i) * plan.row_step + c, width, buffer, plan.storage)
            start = i * plan.num_classes + c
            shift_block(block, m, log_sum, kept[start : start + width])
    store_rows(out, first, kept, n, plan)


@inline
def shift_block(x, m, log_sum, to):
    for i in range(to.size):
        to[i] = (x[i] - m) - log_sum


@inline
def reduce_rows(
    x, target, soft, r, scratch, first, n, plan, weight, largest_weight, options, scale
):
    """The first stage of cross-entropy: of soft targets unless they are None, else of indices."""
    buffer, line, kept = row_scratch(scratch)
    ahead = min(n * plan.row_step, AHEAD)
    apart = asks_all_scores(soft, options)
    top = buffer.dtype.type(0)
    if target is not None and not apart:
        top = exp_rows(x, kept, first, n, plan, buffer, ahead)
        take_targets(x, r, kept, first, n, plan)
    for i in range(n):
        if r[ROW_WEIGHT + i] == 0.0:
            for field in (OTHERS, TARGET_LOGIT, GAP, MASS, TOP_MASS, MAXIMUM, INDEX):
                r[field + i] = 0.0
            r[TOP + i] = 1.0
            r[TARGET_EXP + i] = 1.0
            continue
        least, w = r[TARGET_EXP + i], r[ROW_WEIGHT + i] * r[TARGET_WEIGHT + i] * scale
        if apart or not is_tame(x, first + i, r[OTHERS + i] + least, least, top, w, plan, buffer):
            reduce_row(
                x, soft, r, i, kept[i * plan.num_classes :], first + i, plan, weight,
                largest_weight, options, buffer, line, ahead,
            )  # fmt: skip


@inline
def take_targets(x, r, kept, first, n, plan):
    """Take the targets out of the exponentials, and be their reference; sum up the rest."""
    for i in range(n):
        index = int(r[INDEX + i])
        target_logit = np.float64(load_one(x, (first + i) * plan.row_step + index, plan.storage))
        r[TARGET_LOGIT + i] = target_logit
        r[MAXIMUM + i] = target_logit
        target_exp = np.float64(kept[i * plan.num_classes + index])
        r[TARGET_EXP + i] = target_exp
        r[TOP + i] = target_exp
        r[GAP + i] = 0.0
        kept[i * plan.num_classes + index] = 0
    for i in range(n):
        r[OTHERS + i] = sum_row(kept[i * plan.num_classes :], plan.num_classes)


@inline
def reduce_row(
    x, soft, r, i, kept, row, plan, weight, largest_weight, options, buffer, line, ahead
):
    """As reduce_rows, for a row with a reference of its own."""
    start = row * plan.row_step
    m = largest_of_row(x, row, plan, buffer)
    r[MAXIMUM + i] = m
    r[GAP + i] = 0.0
    r[MASS + i] = 0.0
    r[TOP_MASS + i] = 0.0
    if options is not None:
        gaps_of_row(x, soft, start, m, r, i, plan, weight, largest_weight, options, buffer, line)
    index = int(r[INDEX + i])
    r[TARGET_LOGIT + i] = load_one(x, start + index, plan.storage)
    r[OTHERS + i] = exp_row(x, start, index, m, True, kept, plan, buffer, line, ahead)
    add_exponentials(r[i:], 1, buffer)


@inline
def gaps_of_row(x, soft, start, m, r, i, plan, weight, largest_weight, options, buffer, line):
    """Of soft targets sum w t (m - x), the sum of w t without the maximum, and its own w t.

    Of indices, with label smoothing, sum w (m - x).
    """
    target_share = 1.0 - options.label_smoothing
    uniform = options.label_smoothing / plan.num_classes
    if soft is not None:
        gap = mass = top = 0.0
        target_share, uniform = buffer.dtype.type(target_share), buffer.dtype.type(uniform)
        index = find_in_row(x, start, m, plan, buffer)
        r[INDEX + i] = index
        for c in range(0, plan.num_classes, BLOCK):
            n = min(BLOCK, plan.num_classes - c)
            block = load_block(x, start + c, n, buffer, plan.storage)
            t = load_block(soft, start + c, n, line, plan.other_storage)
            w = weight[c : c + n]
            gap += soft_gap(block, t, w, target_share, uniform, m)
            k = min(max(index - c, 0), n)
            mass += soft_mass(t[:k], w[:k], target_share, uniform)
            if k < n and c + k == index:
                top = soft_mass(t[k : k + 1], w[k : k + 1], target_share, uniform)
                k += 1
            mass += soft_mass(t[k:], w[k:], target_share, uniform)
        r[GAP + i] = largest_weight * gap
        r[MASS + i] = largest_weight * mass
        r[TOP_MASS + i] = largest_weight * top
    elif uniform != 0.0:
        for c in range(0, plan.num_classes, BLOCK):
            n = min(BLOCK, plan.num_classes - c)
            block = load_block(x, start + c, n, buffer, plan.storage)
            r[GAP + i] += largest_weight * gap_block(block, weight[c : c + n], m)


@inline
def write_rows(out, soft, r, scratch, first, n, plan, weight, largest_weight, options):
    """The last stage of cross-entropy: from the exponentials that were kept to the gradient."""
    buffer, _, kept = row_scratch(scratch)
    scaled = kept[plan.summed * plan.num_classes + CHUNK :]
    if not asks_all_scores(soft, options):
        for i in range(n):
            start = i * plan.num_classes
            f = narrow_factor(kept[start : start + plan.num_classes], r[FACTOR + i])
            scale_kept(kept[start:], plan.num_classes, f, scaled[start:])
        for i in range(n):
            start = i * plan.num_classes
            if r[ROW_WEIGHT + i] == 0.0:
                for c in range(plan.num_classes):
                    scaled[start + c] = 0
            else:
                scaled[start + int(r[INDEX + i])] = r[LEFT_OUT + i]
        store_rows(out, first, scaled, n, plan)
    elif options is not None:
        for i in range(n):
            e = kept[i * plan.num_classes : (i + 1) * plan.num_classes]
            start = (first + i) * plan.row_step
            write_row(e, soft, start, r, i, plan, weight, largest_weight, options, buffer)
        store_rows(out, first, kept, n, plan)


@inline
def write_row(e, soft, start, r, i, plan, weight, largest_weight, options, buffer):
    """factor * e_c - spread * w_c t_c, and left_out at the class that was left out."""
    if r[ROW_WEIGHT + i] == 0.0:
        for c in range(e.size):
            e[c] = 0
        return
    spread = r[SPREAD + i] * largest_weight
    f = narrow_factor(e, r[FACTOR + i])
    if soft is not None:
        on_target = e.dtype.type(spread * (1.0 - options.label_smoothing))
        on_all = e.dtype.type(spread * (options.label_smoothing / plan.num_classes))
        for c in range(0, e.size, BLOCK):
            n = min(BLOCK, e.size - c)
            t = load_block(soft, start + c, n, buffer, plan.other_storage)
            scale_and_subtract(e[c : c + n], f, on_target, on_all, weight[c : c + n], t)
    elif spread != 0.0:
        scale_and_spread(e, f, e.dtype.type(spread), weight)
    else:
        scale_row(e, f)
    e[int(r[INDEX + i])] = r[LEFT_OUT + i]


@inline
def scale_and_spread(e, f, spread, weight):
    if weight.size:
        for i in range(e.size):
            e[i] = e[i] * f - spread * weight[i]
    else:
        for i in range(e.size):
            e[i] = e[i] * f - spread


@inline
def scale_and_subtract(e, f, on_target, on_all, weight, t):
    if weight.size:
        for i in range(e.size):
            e[i] = e[i] * f - weight[i] * (on_target * t[i] + on_all)
    else:
        for i in range(e.size):
            e[i] = e[i] * f - (on_target * t[i] + on_all)
