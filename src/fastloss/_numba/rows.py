"""Rows: classes in the SIMD lanes.

A unit is a group of rows, so that the scalar step has something to vectorise, and what is
written is a long run.  Each stage goes over all rows of the group before the next: rows overlap
in the processor, stages of one row cannot.  Rows begin `row_step` numbers apart.  Scratch: two
blocks, and the group's rows with room for a last chunk, twice: exponentials, and what is written.
"""

import math

import numpy as np

from fastloss._numba.arithmetic import (
    common_magic,
    highest_of,
    in_common_units,
    log1p,
    magic_of,
    pivot_of,
    power_of,
    temper_of,
    tiny_of,
)
from fastloss._numba.blocks import (
    exp_block,
    exp_run,
    find,
    gap_block,
    gap_run,
    holds_nan,
    largest,
    scale_kept,
    soft_block,
    sum_kept,
    top_block,
    wide_gap,
)
from fastloss._numba.jit import inline, spliced
from fastloss._numba.losses import add_exponentials, label_smoothing_of, least_rest_of
from fastloss._numba.machine import (
    as_input,
    can_permute,
    lanes,
    scale_sixteen,
    shift_sixteen,
    smooth_sixteen,
    spread_sixteen,
    sum_eight,
    top_eight,
)
from fastloss._numba.memory import copy, load_block, load_one, store
from fastloss._numba.types import (
    AHEAD,
    BLOCK,
    CACHED,
    CHUNK,
    COLUMNS,
    EIGHT,
    FACTOR,
    GAP,
    INDEX,
    LANES,
    LEFT_OUT,
    LOG_SOFTMAX,
    LOG_SUM,
    LOGSUMEXP,
    MASS,
    MAXIMUM,
    OTHERS,
    OWN,
    ROW_WEIGHT,
    RUN,
    SHORT_ROW,
    SPREAD,
    STEP,
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
    stream = plan.stream and plan.layout != COLUMNS  # columns have yet to be turned back
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
    temper = temper_of(plan, buffer)
    pivot, magic = pivot_of(m, temper), magic_of(m, temper)
    total = 0.0
    for c in range(0, plan.num_classes, BLOCK):
        n = min(BLOCK, plan.num_classes - c)
        block = load_block(x, start + c, n, buffer, plan.storage)
        e = kept[c:] if keep else line
        total += exp_block(block, skip - c, pivot, magic, e, temper, x, start + c + ahead)
    return total


@spliced
def exp_rows(x, kept, first, n, plan, buffer, ahead):
    """Exponentials in common units.  Memory is fetched as in exp_row."""
    # Rows that lie next to each other are one run.
    temper = temper_of(plan, buffer)
    runs, run = (1, n * plan.num_classes)
    if plan.row_step != plan.num_classes:
        runs, run = n, plan.num_classes
    for i in range(runs):
        start = (first + i) * plan.row_step
        for c in range(0, run, BLOCK):
            block = load_block(x, start + c, min(BLOCK, run - c), buffer, plan.storage)
            exp_run(block, kept[i * run + c :], temper, x, start + c + ahead)


@inline
def sum_row(e, num_classes):
    total = 0.0
    for c in range(0, num_classes, BLOCK):
        total += sum_kept(e[c:], min(BLOCK, num_classes - c))
    return total


@inline
def sum_rows(e, r, field, n, num_classes):
    """The sums of short rows are those of exp_tile, whichever axis the classes are."""
    sums = lanes(e)
    if num_classes > SHORT_ROW:
        for i in range(n):
            r[field + i] = sum_row(e[i * num_classes :], num_classes)
        return
    for i in range(LANES):
        r[field + i] = 0.0
    start, stop = 0, (num_classes - 1) % (RUN * EIGHT) + 1
    while stop <= num_classes:  # long sums in float64
        for i in range(0, n, EIGHT):
            sum_eight(e, i * num_classes + start, num_classes, stop - start, sums, i)
        for i in range(n):
            r[field + i] += np.float64(sums[i])
        start, stop = stop, stop + RUN * EIGHT


@inline
def find_untamed(r, n, scale, like, options):
    """The rows that common units are not for are to have their own; how many there are."""
    found, least_rest = 0, least_rest_of(options, like)
    for i in range(n):
        least = r[TARGET_EXP + i]
        weight = r[ROW_WEIGHT + i] * r[TARGET_WEIGHT + i] * scale
        total = r[OTHERS + i] + least
        tame = in_common_units(total, least, weight, like) & (r[OTHERS + i] >= least_rest * total)
        r[OWN + i] = 0.0 if tame | (r[ROW_WEIGHT + i] == 0.0) else 1.0
    for i in range(n):
        found += r[OWN + i] != 0.0
    return found


@inline
def all_apart(r, n):
    """No row is to be taken in common units."""
    for i in range(n):
        r[OTHERS + i] = 1.0
        r[TARGET_EXP + i] = 1.0
        r[OWN + i] = 0.0 if r[ROW_WEIGHT + i] == 0.0 else 1.0


@inline
def scale_row(e, f):
    for i in range(e.size):
        e[i] *= f


@inline
def narrow_factor(e, factor):
    """The factor in the compute type; where it is too small for that, on so much less of e."""
    real = e.dtype.type
    power = np.float64(power_of(e))
    narrow = factor * power
    if factor != 0.0 and abs(narrow) < tiny_of(e):
        scale_row(e, power_of(e))
        narrow = factor
        while abs(narrow) < tiny_of(e):
            scale_row(e, power_of(e))
            narrow /= power
    return real(narrow)


@inline
def narrow_factors_of_rows(kept, f, r, n, num_classes):
    """As narrow_factor, for every row."""
    power = np.float64(power_of(kept))
    small = 0
    for i in range(n):
        f[i] = r[FACTOR + i] * power
        small += (abs(r[FACTOR + i] * power) < tiny_of(kept)) & (r[FACTOR + i] != 0.0)
    if small:
        for i in range(n):
            start = i * num_classes
            f[i] = narrow_factor(kept[start : start + num_classes], r[FACTOR + i])


@inline
def share_of_row(num_classes):
    """What tells scale_sixteen and its like whose a number is."""
    return (1 << 24) // num_classes + 1


@inline
def scale_rows(kept, r, n, num_classes, scaled):
    """Times FACTOR."""
    f = lanes(kept)
    narrow_factors_of_rows(kept, f, r, n, num_classes)
    if can_permute(kept) and num_classes <= SHORT_ROW:
        share = share_of_row(num_classes)
        for i in range(0, n, STEP):
            scale_sixteen(kept, i * num_classes, num_classes, share, i, f, scaled)
        return
    for i in range(n):
        start = i * num_classes
        scale_kept(kept[start:], num_classes, f[i], scaled[start:])


@inline
def smooth_rows(kept, r, n, num_classes, weight, largest_weight, smoothed):
    """Short rows times FACTOR, less SPREAD times the weights."""
    f, spread = lanes(kept), lanes(kept)
    narrow_factors_of_rows(kept, f, r, n, num_classes)
    for i in range(n):
        spread[i] = r[SPREAD + i] * largest_weight
    if can_permute(kept):
        share = share_of_row(num_classes)
        for i in range(0, n, STEP):
            start = i * num_classes
            smooth_sixteen(kept, start, num_classes, share, i, f, spread, weight, smoothed)
        return
    for i in range(n):
        start = i * num_classes
        for c in range(num_classes):
            smoothed[start + c] = kept[start + c] * f[i] - weight[c] * spread[i]


@inline
def put_left_out(scaled, r, n, num_classes):
    """LEFT_OUT at INDEX: of all rows at once, for a number by itself holds up who reads vectors."""
    place = lanes(np.uintp)
    places_of(r, n, num_classes, place)
    for i in range(n):
        scaled[place[i]] = r[LEFT_OUT + i]


@inline
def softmax_rows(x, out, r, scratch, first, n, plan):
    buffer, line, kept = row_scratch(scratch)
    scaled = kept[plan.summed * plan.num_classes + CHUNK :]
    ahead = min(n * plan.row_step, AHEAD)
    if exp_rows_of_softmax(x, r, kept, first, n, plan, buffer, ahead):
        for i in range(n):
            if r[OWN + i] != 0.0:
                r[OTHERS + i] = exp_row(
                    x, (first + i) * plan.row_step, -1, largest_of_row(x, first + i, plan, buffer),
                    True, kept[i * plan.num_classes :], plan, buffer, line, ahead,
                )  # fmt: skip
    divide_rows(out, r, kept, scaled, first, n, plan)


@inline
def exp_rows_of_softmax(x, r, kept, first, n, plan, buffer, ahead):
    """Exponentials in common units and their sums; how many rows these are not for."""
    exp_rows(x, kept, first, n, plan, buffer, ahead)
    sum_rows(kept, r, OTHERS, n, plan.num_classes)
    for i in range(n):
        r[TARGET_EXP + i] = r[OTHERS + i]
        r[ROW_WEIGHT + i] = 1.0
        r[TARGET_WEIGHT + i] = 1.0
    return find_untamed(r, n, 1.0, kept, None)


@inline
def divide_rows(out, r, kept, scaled, first, n, plan):
    for i in range(n):
        r[FACTOR + i] = 1.0 / (r[OTHERS + i] * np.float64(power_of(kept)))
    scale_rows(kept, r, n, plan.num_classes, scaled)
    store_rows(out, first, scaled, n, plan)


@inline
def top_of_row(x, r, i, start, own, plan, buffer, ahead):
    """The maximum, its exponential, and the sum of the others; in common units, or, if own, in
    those of the maximum, which is known then."""
    temper = temper_of(plan, buffer)
    pivot, magic, highest = units_of_row(buffer.dtype.type(r[MAXIMUM + i]), own, buffer, temper)
    begin_top(r, i)
    for c in range(0, plan.num_classes, BLOCK):
        block = load_block(x, start + c, min(BLOCK, plan.num_classes - c), buffer, plan.storage)
        maximum, top, others = top_block(block, pivot, magic, highest, temper, x, start + c + ahead)
        join_top(r, i, maximum, top, others)


@inline
def units_of_row(m, own, like, temper):
    if own:
        return pivot_of(m, temper), magic_of(m, temper), like.dtype.type(np.inf)
    return like.dtype.type(0), common_magic(like), highest_of(like, temper)


@inline
def begin_top(r, i):
    r[OTHERS + i] = 0.0
    r[TOP + i] = 0.0
    r[MAXIMUM + i] = -np.inf


@inline
def join_top(r, i, maximum, top, others):
    """What top_of_row asks for, with one block more."""
    r[OTHERS + i] += others + min(r[TOP + i], np.float64(top))
    r[TOP + i] = max(r[TOP + i], np.float64(top))
    r[MAXIMUM + i] = max(r[MAXIMUM + i], np.float64(maximum))


@inline
def scores_of_run(x, start, n, buffer, plan):
    """The scores of short rows, where some before them may be read."""
    scores = as_input(load_block(x, start, n, buffer, plan.storage))
    if start > 0:
        return scores
    copy(buffer[:n], scores)
    return as_input(buffer[:n])


@inline
def top_of_rows(x, scores, r, kept, first, plan, buffer, ahead):
    """As top_of_row, in common units; of LANES short rows, some that stay in the nearest cache."""
    num_classes = plan.num_classes
    rows = LANES if LANES * num_classes <= CACHED else STEP
    maximum, others, top = lanes(kept), lanes(kept), lanes(kept)
    for i in range(LANES):
        begin_top(r, i)
    for part in range(0, LANES, rows):
        exp_rows(x, kept, first + part, rows, plan, buffer, ahead)
        start, stop = 0, (num_classes - 1) % (RUN * EIGHT) + 1
        while stop <= num_classes:  # long sums in float64
            for i in range(0, rows, EIGHT):
                top_eight(
                    scores, (part + i) * num_classes + start, kept, i * num_classes + start,
                    num_classes, stop - start, maximum, others, top, i,
                )  # fmt: skip
            for i in range(rows):
                join_top(r, part + i, maximum[i], top[i], np.float64(others[i]))
            start, stop = stop, stop + RUN * EIGHT


@inline
def find_untamed_by_top(r, n, like):
    for i in range(n):
        r[TARGET_EXP + i] = r[TOP + i]
        r[ROW_WEIGHT + i] = 1.0
        r[TARGET_WEIGHT + i] = 1.0
    return find_untamed(r, n, 1.0, like, None)


@inline
def log_softmax_rows(x, out, r, scratch, first, n, plan):
    """log_softmax; or only what logsumexp needs."""
    buffer, _, kept = row_scratch(scratch)
    real = scratch.dtype.type
    ahead = min(n * plan.row_step, AHEAD)
    for i in range(n):
        top_of_row(x, r, i, (first + i) * plan.row_step, False, plan, buffer, ahead)
    if find_untamed_by_top(r, n, buffer):
        for i in range(n):
            if r[OWN + i] != 0.0:
                top_of_row(x, r, i, (first + i) * plan.row_step, True, plan, buffer, ahead)
    log_softmax_step(x, r, first, n, plan, buffer)
    if plan.operation == LOGSUMEXP:
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
def log_softmax_run(x, out, r, kept, buffer, line, first, plan):
    """log_softmax_rows of LANES short rows.  False, and nothing done, if some are untamed."""
    num_classes = plan.num_classes
    start, size = first * num_classes, LANES * num_classes
    scores = scores_of_run(x, start, size, line, plan)
    top_of_rows(x, scores, r, kept, first, plan, buffer, size)
    if find_untamed_by_top(r, LANES, kept):
        return False
    log_softmax_step(x, r, first, LANES, plan, buffer)
    if plan.operation == LOG_SOFTMAX:
        shift_rows(scores, r, kept, num_classes)
        store(out, start, kept[:size], plan.storage, plan.stream)
    return True


@inline
def shift_rows(scores, r, to, num_classes):
    m, log_sum = lanes(to), lanes(to)
    for i in range(LANES):
        m[i] = r[MAXIMUM + i]
        log_sum[i] = r[LOG_SUM + i]
    if can_permute(to):
        share = share_of_row(num_classes)
        for i in range(0, LANES, STEP):
            shift_sixteen(scores, i * num_classes, num_classes, share, i, m, log_sum, to)
        return
    for i in range(LANES):
        start, stop = i * num_classes, (i + 1) * num_classes
        shift_block(scores[start:stop], m[i], log_sum[i], to[start:stop])


@inline
def log_softmax_step(x, r, first, n, plan, buffer):
    """The scalar step of log_softmax, and of logsumexp."""
    for i in range(n):
        r[LOG_SUM + i] = log1p(r[OTHERS + i] / r[TOP + i])
    if plan.operation == LOGSUMEXP:
        infinite = 0
        for i in range(n):
            infinite += r[MAXIMUM + i] - r[MAXIMUM + i] != 0.0
        for i in range(n if infinite else 0):
            # Nothing but -inf, or a +inf: the maximum is all there is to the sum.
            if not math.isfinite(r[MAXIMUM + i]) and not row_holds_nan(
                x, (first + i) * plan.row_step, plan, buffer
            ):
                r[LOG_SUM + i] = 0.0


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
    untamed = 1
    if target is not None:  # known before types are inferred
        untamed = exp_rows_from_target(x, r, kept, first, n, plan, buffer, ahead, options, scale)
    for i in range(n if untamed else 0):
        if soft is not None and r[ROW_WEIGHT + i] == 0.0:
            reduce_to_nothing(r, i)
        elif soft is not None or r[OWN + i] != 0.0:
            reduce_row(
                x, soft, r, i, kept[i * plan.num_classes :], first + i, plan, weight,
                largest_weight, options, buffer, line, ahead,
            )  # fmt: skip
    if target is not None and options is not None and label_smoothing_of(options) != 0.0:
        gaps_of_rows(x, r, first, n, plan, weight, largest_weight, buffer)


@inline
def reduce_to_nothing(r, i):
    """As reduce_row, for a row that counts for nothing."""
    for field in (OTHERS, TARGET_LOGIT, GAP, MASS, TOP_MASS, MAXIMUM):
        r[field + i] = 0.0
    r[TOP + i] = 1.0
    r[TARGET_EXP + i] = 1.0


@inline
def exp_rows_from_target(x, r, kept, first, n, plan, buffer, ahead, options, scale):
    """Exponentials in common units, and sums of them; how many rows these are not for."""
    untamed = n
    if scale == 0.0:
        all_apart(r, n)
    else:
        exp_rows(x, kept, first, n, plan, buffer, ahead)
        take_targets(kept, r, n, plan.num_classes)
        sum_rows(kept, r, OTHERS, n, plan.num_classes)
        untamed = find_untamed(r, n, scale, kept, options)
    relate_to_targets(x, r, first, n, plan, options)
    return untamed


@inline
def relate_to_targets(x, r, first, n, plan, options):
    """What the scalar step wants to know besides, where units are common."""
    for i in range(n):
        r[TARGET_LOGIT + i] = 0.0
        r[MAXIMUM + i] = 0.0
        r[GAP + i] = 0.0
        r[TOP + i] = r[TARGET_EXP + i]
    if options is not None:
        for i in range(n):
            start = (first + i) * plan.row_step
            r[TARGET_LOGIT + i] = load_one(x, start + int(r[INDEX + i]), plan.storage)
            r[MAXIMUM + i] = r[TARGET_LOGIT + i]


@inline
def places_of(r, n, num_classes, place):
    """Where the classes INDEX of rows are; unsigned, for no index counts from the end."""
    for i in range(n):
        place[i] = i * num_classes + int(r[INDEX + i])


@inline
def take_targets(kept, r, n, num_classes):
    """Take the targets out of the exponentials."""
    # Numbers put one by one are read as vectors: once, not field by field.
    target_exp, place = lanes(kept), lanes(np.uintp)
    places_of(r, n, num_classes, place)
    for i in range(n):
        target_exp[i] = kept[place[i]]
        kept[place[i]] = 0
    for i in range(n):
        r[TARGET_EXP + i] = target_exp[i]


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
    if soft is not None:
        r[INDEX + i] = find_in_row(x, start, m, plan, buffer)
    index = int(r[INDEX + i])
    if soft is not None:
        for c in range(0, plan.num_classes, BLOCK):
            gap, mass, top_mass = gaps_of_block(
                x, soft, start, c, index, m, plan, weight, largest_weight, options, buffer, line,
                ahead,
            )  # fmt: skip
            r[GAP + i] += gap
            r[MASS + i] += mass
            r[TOP_MASS + i] += top_mass
    r[TARGET_LOGIT + i] = load_one(x, start + index, plan.storage)
    r[OTHERS + i] = exp_row(x, start, index, m, True, kept, plan, buffer, line, ahead)
    add_exponentials(r[i:], 1, buffer, plan)


@inline
def gaps_of_block(
    x, soft, start, c, index, m, plan, weight, largest_weight, options, buffer, line, ahead
):
    """sum w t (m - x), the sum of w t without the maximum, and its own w t.

    All of the block that begins with class c.
    """
    n = min(BLOCK, plan.num_classes - c)
    block = load_block(x, start + c, n, buffer, plan.storage)
    target_share = buffer.dtype.type(1.0 - options.label_smoothing)
    uniform = buffer.dtype.type(options.label_smoothing / plan.num_classes)
    t = load_block(soft, start + c, n, line, plan.other_storage)
    gap, mass, top_mass = soft_block(
        block, t, weight[c : c + n], index - c, buffer.dtype.type(m), target_share, uniform,
        soft, start + c + ahead,
    )  # fmt: skip
    return largest_weight * gap, largest_weight * mass, largest_weight * top_mass


@inline
def gap_of_block(x, start, c, m, plan, weight, buffer):
    """sum of w_c (m - x_c), w_c relative."""
    n = min(BLOCK, plan.num_classes - c)
    block = load_block(x, start + c, n, buffer, plan.storage)
    return gap_block(block, weight[c : c + n], buffer.dtype.type(m))


@inline
def gaps_of_rows(x, r, first, n, plan, weight, largest_weight, buffer):
    """As gap_of_block, of whole rows, and the weights as they are."""
    for i in range(n):
        r[GAP + i] = 0.0
        for c in range(0, plan.num_classes, BLOCK):
            start = (first + i) * plan.row_step
            r[GAP + i] += gap_of_block(x, start, c, r[MAXIMUM + i], plan, weight, buffer)
        r[GAP + i] *= largest_weight


@inline
def gaps_of_short_rows(x, r, terms, first, n, plan, weight, largest_weight, buffer):
    """As gaps_of_rows; there are the weights of 16 rows."""
    num_classes = plan.num_classes
    m = lanes(terms)
    for i in range(n):
        m[i] = r[MAXIMUM + i]
    for i in range(0, n, STEP):
        start, size = i * num_classes, STEP * num_classes
        if can_permute(terms):
            share = share_of_row(num_classes)
            spread_sixteen(terms, start, num_classes, share, i, m)
        else:
            for k in range(STEP):
                for c in range(num_classes):
                    terms[start + k * num_classes + c] = m[i + k]
        for c in range(0, size, BLOCK):
            width = min(BLOCK, size - c)
            block = load_block(x, first * num_classes + start + c, width, buffer, plan.storage)
            gap_run(block, weight[c : c + width], terms[start + c : start + c + width])
    sum_rows(terms, r, GAP, n, num_classes)
    for i in range(n):
        if not math.isfinite(r[GAP + i]):
            start = (first + i) * num_classes
            row = load_block(x, start, num_classes, buffer, plan.storage)
            r[GAP + i] = wide_gap(row, 1, weight, num_classes, m[i])
        r[GAP + i] *= largest_weight


@inline
def write_rows(out, soft, r, scratch, first, n, plan, weight, largest_weight, options):
    """The last stage of cross-entropy: from the exponentials that were kept to the gradient."""
    buffer, _, kept = row_scratch(scratch)
    smooth = label_smoothing_of(options) != 0.0
    if soft is None and not smooth:
        scaled = kept[plan.summed * plan.num_classes + CHUNK :]
        write_run(out, r, kept, scaled, first, n, plan, weight, largest_weight, None)
    elif options is not None:
        for i in range(n):
            e = kept[i * plan.num_classes : (i + 1) * plan.num_classes]
            start = (first + i) * plan.row_step
            write_row(e, soft, start, r, i, plan, weight, largest_weight, options, buffer)
        store_rows(out, first, kept, n, plan)


@inline
def write_run(out, r, kept, scaled, first, n, plan, weight, largest_weight, options):
    """As write_rows, of targets that are indices, all rows at once."""
    dead = 0
    if options is not None and label_smoothing_of(options) != 0.0:
        smooth_rows(kept, r, n, plan.num_classes, weight, largest_weight, scaled)
    else:
        scale_rows(kept, r, n, plan.num_classes, scaled)
    put_left_out(scaled, r, n, plan.num_classes)
    for i in range(n):
        dead += r[ROW_WEIGHT + i] == 0.0
    if dead:
        for i in range(n):
            if r[ROW_WEIGHT + i] == 0.0:
                for c in range(i * plan.num_classes, (i + 1) * plan.num_classes):
                    scaled[c] = 0
    store_rows(out, first, scaled, n, plan)


@inline
def write_row(e, soft, start, r, i, plan, weight, largest_weight, options, buffer):
    if r[ROW_WEIGHT + i] == 0.0:
        for c in range(e.size):
            e[c] = 0
        return
    for c in range(0, e.size, BLOCK):
        block = e[c : min(c + BLOCK, e.size)]
        write_block(block, soft, start, c, r, i, plan, weight, largest_weight, options, buffer)
    e[int(r[INDEX + i])] = r[LEFT_OUT + i]


@inline
def write_block(e, soft, start, c, r, i, plan, weight, largest_weight, options, buffer):
    """From exponentials to the gradient: factor * e_c - spread * w_c t_c."""
    spread = r[SPREAD + i] * largest_weight
    f = narrow_factor(e, r[FACTOR + i])
    w = weight[c : c + e.size]
    if soft is not None:
        on_target = e.dtype.type(spread * (1.0 - options.label_smoothing))
        on_all = e.dtype.type(spread * (options.label_smoothing / plan.num_classes))
        t = load_block(soft, start + c, e.size, buffer, plan.other_storage)
        scale_and_subtract(e, f, on_target, on_all, w, t)
    elif spread != 0.0:
        scale_and_spread(e, f, e.dtype.type(spread), w)
    else:
        scale_row(e, f)


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
