"""Tiles: samples in the SIMD lanes.

A tile is LANES samples that follow each other in (outer, inner) order, held in scratch as
[class][lane]; lanes without a sample hold zeros.  A unit is one tile, or, where samples lie next
to each other in memory, several side by side, `step` numbers from a class to the next, so that
runs of memory are longer.  Scratch: room for samples one after the other, as rows, then the
unit's tiles, twice; transposing moves eight by eight, and may go seven beyond either.  Then the
carries, for runs of output that begin and end within a cache line.
"""

import math

import numpy as np
from numba import types

from fastloss._numba.arithmetic import (
    exponential,
    log1p,
    lowest_of,
    magic_of,
    pivot_of,
    power_of,
    temper_of,
    times,
    tiny_of,
)
from fastloss._numba.blocks import above, below, holds_nan, wide_gap
from fastloss._numba.jit import inline, spliced, typed
from fastloss._numba.losses import (
    add_exponentials,
    label_smoothing_of,
)
from fastloss._numba.machine import eight_lanes, lanes, transpose
from fastloss._numba.memory import carry_of, copy, fetch, load_block, load_into, store, store_run
from fastloss._numba.rows import (
    all_apart,
    begin_top,
    find_untamed,
    find_untamed_by_top,
    join_top,
    narrow_factor,
    units_of_row,
)
from fastloss._numba.types import (
    EIGHT,
    FACTOR,
    FIELDS,
    GAP,
    INDEX,
    LANES,
    LEFT_OUT,
    LOG_SUM,
    LOGSUMEXP,
    MASS,
    MAXIMUM,
    OTHERS,
    OWN,
    ROW_WEIGHT,
    RUN,
    SPREAD,
    TARGET_EXP,
    TARGET_LOGIT,
    TARGET_WEIGHT,
    TOP,
    TOP_MASS,
)


@inline
def tile_numbers(num_classes, step):
    """What a unit of tiles needs of scratch."""
    return (num_classes + 1) * LANES + 2 * (num_classes + 8) * step


@typed
def tile_scratch(scratch, plan):
    if scratch == types.none:
        return lambda scratch, plan: (None, None, None)

    def tile_scratch(scratch, plan):
        rows = (plan.num_classes + 1) * LANES
        tile = (plan.num_classes + 8) * plan.step
        return scratch[:rows], scratch[rows : rows + tile], scratch[rows + tile : rows + 2 * tile]

    return tile_scratch


@inline
def load_tiles(x, tile, buffer, first, n, storage, plan):
    num_classes, inner, step = plan.num_classes, plan.inner, plan.step
    if inner == 1:
        start = first * num_classes
        size = LANES * num_classes
        if n == LANES and start + size + 8 <= x.size:
            rows = load_block(x, start, size + 8, buffer, storage)
            transpose_rows(rows, tile, num_classes)
        else:  # transposing must not read beyond the array
            rows = load_block(x, start, n * num_classes, buffer, storage)
            copy(buffer[: n * num_classes], rows)
            buffer[n * num_classes :] = 0
            transpose_rows(buffer, tile, num_classes)
        return
    if n % LANES:
        tile[: num_classes * step] = 0
    lane = 0
    while lane < n:
        o, i = divmod(first + lane, inner)
        width = min(n - lane, inner - i)
        for c in range(num_classes):
            start = (o * num_classes + c) * inner + i
            load_into(tile[c * step + lane : c * step + lane + width], x, start, storage)
        lane += width


@inline
def transpose_rows(rows, tile, num_classes):
    for lane in range(0, LANES, 8):
        for c in range(0, num_classes, 8):
            transpose(rows, lane * num_classes + c, num_classes, tile, c * LANES + lane, LANES)


@spliced
def store_tiles(out, tile, scratch, r, first, n, plan):
    num_classes, inner, step = plan.num_classes, plan.inner, plan.step
    buffer = scratch[: (num_classes + 1) * LANES]
    if inner == 1:
        # From the last classes to the first: what goes beyond a row is written over by the next.
        for lane in range(0, LANES, 8):
            for c in range((num_classes - 1) // 8 * 8, -1, -8):
                place = lane * num_classes + c
                transpose(tile, c * LANES + lane, LANES, buffer, place, num_classes)
        store(out, first * num_classes, buffer[: n * num_classes], plan.storage, plan.stream)
        return
    lane = 0
    while lane < n:
        o, i = divmod(first + lane, inner)
        width = min(n - lane, inner - i)
        for c in range(num_classes):
            column = c * step + lane
            start = (o * num_classes + c) * inner + i
            store_run(
                out, start, tile[column : column + width], plan.storage, plan.stream,
                carry_of(scratch, r, c), r, FIELDS + c,
            )  # fmt: skip
        lane += width


@inline
def clear_dead_lanes(tile, r, plan):
    """Nothing of a row that counts for nothing, a NaN least of all, gets through."""
    dead = 0
    for lane in range(LANES):
        dead += r[ROW_WEIGHT + lane] == 0.0
    if not dead:
        return
    for lane in range(LANES):
        if r[ROW_WEIGHT + lane] == 0.0:
            column = tile[lane:]
            for c in range(plan.num_classes):
                column[c * plan.step] = 0


@inline
def largest_in_lanes(tile, r, plan):
    m = lanes(tile)
    for j in range(LANES):
        m[j] = -np.inf
    for c in range(plan.num_classes):
        row = tile[c * plan.step : c * plan.step + LANES]
        for j in range(LANES):
            m[j] = row[j] if row[j] > m[j] else m[j]
    for j in range(LANES):
        r[MAXIMUM + j] = m[j]


@inline
def find_in_lanes(tile, r, plan):
    """The first class whose score is the maximum, or 0."""
    real = tile.dtype.type
    m, k = lanes(tile), lanes(tile)
    for j in range(LANES):
        m[j] = r[MAXIMUM + j]
        k[j] = 0
    for c in range(plan.num_classes - 1, -1, -1):
        row = tile[c * plan.step : c * plan.step + LANES]
        number = real(c)
        for j in range(LANES):
            k[j] = number if row[j] == m[j] else k[j]
    for j in range(LANES):
        r[INDEX + j] = k[j]


@inline
def take_units(r, own):
    for j in range(LANES):
        r[OWN + j] = own


@inline
def exp_tile(tile, skip, e, keep, r, x, later, plan, wide):
    """The exponentials, if keep in e, in units of MAXIMUM or, by OWN, common ones; and their sums.

    If skip, the sums are without class INDEX.  They are those of sum_rows, or, if wide, more exact.
    e may be the tile.
    Meanwhile the scores of the tile from row `later` on are fetched, so that memory is never idle.
    """
    pivot, magic = lanes(tile), lanes(tile)
    num_classes, inner, step = plan.num_classes, plan.inner, plan.step
    real, temper = tile.dtype.type, temper_of(plan, tile)
    lowest, highest, value, index = lanes(tile), lanes(tile), lanes(tile), lanes(tile)
    parts = eight_lanes(tile)
    total = lanes(r)
    apart = LANES if inner == 1 else inner
    o, i = divmod(later, inner)
    start = o * num_classes * inner + i
    for j in range(LANES):
        m, own = real(r[MAXIMUM + j]), r[OWN + j] != 0.0
        pivot[j], magic[j], highest[j] = units_of_row(m, own, tile, temper)
        lowest[j] = lowest_of(magic[j], temper)
        total[j] = 0.0
    for j in range(LANES):
        index[j] = r[INDEX + j] if skip else -1.0
    for j in range(EIGHT * LANES):
        parts[j] = 0
    for c in range(num_classes):
        row = tile[c * step : c * step + LANES]
        number = real(c)
        fetch(x, start + c * apart, LANES)
        part = parts[((c - num_classes) & (EIGHT - 1)) * LANES :][:LANES]
        for j in range(LANES):
            value[j] = below(row[j], highest[j])
        for j in range(LANES):
            value[j] = exponential(value[j], pivot[j], magic[j], lowest[j], temper)
        for j in range(LANES):
            part[j] += real(0) if index[j] == number else value[j]
        if keep:
            to = e[c * step : c * step + LANES]
            for j in range(LANES):
                to[j] = value[j]
        if (num_classes - 1 - c) % (RUN * EIGHT) == 0:  # long sums in float64
            if wide:
                for j in range(LANES):
                    total[j] += fold_eight(parts, j, np.float64)
            else:
                for j in range(LANES):
                    total[j] += np.float64(fold_eight(parts, j, real))
            for j in range(EIGHT * LANES):
                parts[j] = 0
    for j in range(LANES):
        r[OTHERS + j] = total[j]


@inline
def fold_eight(parts, j, real):
    """As sum_eight, of the parts of a lane."""
    even = fold_four(parts[j:], real)
    return even + fold_four(parts[j + LANES :], real)


@inline
def fold_four(parts, real):
    low = real(parts[0]) + real(parts[4 * LANES])
    return low + (real(parts[2 * LANES]) + real(parts[6 * LANES]))


@inline
def narrow_factors(tile, f, r, plan):
    """As narrow_factor, for every lane."""
    power = np.float64(power_of(tile))
    small = 0
    for j in range(LANES):
        f[j] = r[FACTOR + j] * power
        small += (abs(r[FACTOR + j] * power) < tiny_of(tile)) & (r[FACTOR + j] != 0.0)
    if not small:
        return
    for j in range(LANES):
        if abs(r[FACTOR + j] * power) < tiny_of(tile):
            f[j] = narrow_factor(tile[j : plan.num_classes * plan.step : plan.step], r[FACTOR + j])


@inline
def softmax_tile(tile, e, r, x, later, plan):
    f = lanes(tile)
    take_units(r, 0.0)
    exp_tile(tile, False, e, True, r, x, later, plan, False)
    for j in range(LANES):
        r[TARGET_EXP + j] = r[OTHERS + j]
        r[ROW_WEIGHT + j] = 1.0
        r[TARGET_WEIGHT + j] = 1.0
    untamed = find_untamed(r, LANES, 1.0, tile, None)
    if untamed:
        largest_in_lanes(tile, r, plan)
        exp_tile(tile, False, e, True, r, x, later, plan, False)
    for j in range(LANES):
        f[j] = 1.0 / r[OTHERS + j]
    for c in range(plan.num_classes):
        row = tile[c * plan.step : c * plan.step + LANES]
        exponentials = e[c * plan.step : c * plan.step + LANES]
        for j in range(LANES):
            row[j] = exponentials[j] * f[j]
    return untamed


@inline
def top_of_tile(tile, r, x, later, plan):
    """As top_of_row, of lanes, each by OWN in its own units, and in the order of rows.

    Meanwhile memory is fetched, as in exp_tile.
    """
    num_classes, inner, step = plan.num_classes, plan.inner, plan.step
    real, temper = tile.dtype.type, temper_of(plan, tile)
    pivot, magic, lowest, highest = lanes(tile), lanes(tile), lanes(tile), lanes(tile)
    value, m = lanes(tile), lanes(tile)
    others, top = eight_lanes(tile), eight_lanes(tile)
    apart = LANES if inner == 1 else inner
    o, i = divmod(later, inner)
    start = o * num_classes * inner + i
    for j in range(LANES):
        own = r[OWN + j] != 0.0
        pivot[j], magic[j], highest[j] = units_of_row(real(r[MAXIMUM + j]), own, tile, temper)
        lowest[j] = lowest_of(magic[j], temper)
        m[j] = -np.inf
        begin_top(r, j)
    for j in range(EIGHT * LANES):
        others[j] = 0
        top[j] = 0
    for c in range(num_classes):
        row = tile[c * step : c * step + LANES]
        fetch(x, start + c * apart, LANES)
        place = ((c - num_classes) & (EIGHT - 1)) * LANES
        part, part_top = others[place : place + LANES], top[place : place + LANES]
        for j in range(LANES):
            m[j] = above(row[j], m[j])
        for j in range(LANES):
            value[j] = below(row[j], highest[j])
        for j in range(LANES):
            value[j] = exponential(value[j], pivot[j], magic[j], lowest[j], temper)
        for j in range(LANES):
            part[j] += below(value[j], part_top[j])
        for j in range(LANES):
            part_top[j] = above(value[j], part_top[j])
        if (num_classes - 1 - c) % (RUN * EIGHT) == 0:  # long sums in float64
            for n in (4 * LANES, 2 * LANES, LANES):
                for j in range(n):
                    others[j] = (others[j] + others[n + j]) + below(top[n + j], top[j])
                    top[j] = above(top[n + j], top[j])
            for j in range(LANES):
                join_top(r, j, m[j], top[j], np.float64(others[j]))
            for j in range(EIGHT * LANES):
                others[j] = 0
                top[j] = 0


@inline
def log_softmax_tile(tile, r, x, later, plan):
    """As log_softmax_rows."""
    m, log_sum = lanes(tile), lanes(tile)
    take_units(r, 0.0)
    top_of_tile(tile, r, x, later, plan)
    untamed = find_untamed_by_top(r, LANES, tile)
    if untamed:
        top_of_tile(tile, r, x, later, plan)
    for j in range(LANES):
        r[LOG_SUM + j] = log1p(r[OTHERS + j] / r[TOP + j])
    if plan.operation == LOGSUMEXP:
        for j in range(LANES):
            if not math.isfinite(r[MAXIMUM + j]) and not holds_nan(
                tile[j:], plan.step, plan.num_classes
            ):
                r[LOG_SUM + j] = 0.0
        return untamed
    for j in range(LANES):
        m[j] = r[MAXIMUM + j]
        log_sum[j] = r[LOG_SUM + j]
    for c in range(plan.num_classes):
        row = tile[c * plan.step : c * plan.step + LANES]
        for j in range(LANES):
            row[j] = (row[j] - m[j]) - log_sum[j]
    return untamed


@inline
def reduce_tile(
    tile, other, target, soft, r, n, x, later, plan, weight, largest_weight, options, scale
):
    """The first stage of cross-entropy: of soft targets unless they are None, else of indices.

    Exponentials go into `other`, or take the place of the scores where it holds soft targets.
    """
    for j in range(n, LANES):
        r[INDEX + j] = 0.0
        r[ROW_WEIGHT + j] = 0.0
        r[TARGET_WEIGHT + j] = 0.0
    clear_dead_lanes(tile, r, plan)
    untamed = 0
    if target is not None:
        untamed = exp_tile_from_target(tile, other, r, x, later, plan, options, scale)
    if soft is not None:
        largest_in_lanes(tile, r, plan)
        soft_gaps_of_tile(tile, soft, r, plan, weight, largest_weight, options)
        take_target_logits(tile, r, plan)
        exp_tile_from_maximum(tile, True, tile, True, r, x, later, plan)
    if target is not None and options is not None and label_smoothing_of(options) != 0.0:
        gaps_of_tile(tile, r, plan, weight, largest_weight)
    return untamed


@inline
def take_target_logits(tile, r, plan):
    for j in range(LANES):
        r[TARGET_LOGIT + j] = tile[int(r[INDEX + j]) * plan.step + j]


@inline
def exp_tile_from_maximum(tile, skip, e, keep, r, x, later, plan):
    """exp_tile in units of each row, and what add_exponentials says."""
    take_units(r, 1.0)
    exp_tile(tile, skip, e, keep, r, x, later, plan, True)
    add_exponentials(r, LANES, tile, plan)


@inline
def exp_tile_from_target(tile, e, r, x, later, plan, options, scale):
    """exp_tile in common units, with the target as what others are related to, where that does."""
    untamed = LANES
    if scale == 0.0:
        all_apart(r, LANES)
    else:
        take_units(r, 0.0)
        exp_tile(tile, True, e, True, r, x, later, plan, False)
        take_target_exps(e, r, plan)
        untamed = find_untamed(r, LANES, scale, tile, options)
    if untamed:
        largest_in_lanes(tile, r, plan)
        exp_tile(tile, True, e, True, r, x, later, plan, False)
        take_target_exps(e, r, plan)
    if untamed or options is not None:
        take_target_logits(tile, r, plan)
    else:
        for j in range(LANES):
            r[TARGET_LOGIT + j] = 0.0
    for j in range(LANES):
        r[GAP + j] = 0.0
        own = r[OWN + j] != 0.0
        r[MAXIMUM + j] = r[MAXIMUM + j] if own else r[TARGET_LOGIT + j]
        r[TOP + j] = r[TARGET_EXP + j]
    if untamed:
        take_tops(r, tile, plan)
    return untamed


@inline
def take_target_exps(e, r, plan):
    for j in range(LANES):
        r[TARGET_EXP + j] = np.float64(e[int(r[INDEX + j]) * plan.step + j])


@inline
def take_tops(r, like, plan):
    """The exponentials of the maxima, of lanes with units of their own."""
    temper = temper_of(plan, like)
    for j in range(LANES):
        if r[OWN + j] != 0.0:
            m = like.dtype.type(r[MAXIMUM + j])
            pivot, magic = pivot_of(m, temper), magic_of(m, temper)
            r[TOP + j] = exponential(m, pivot, magic, lowest_of(magic, temper), temper)


@inline
def gaps_of_tile(tile, r, plan, weight, largest_weight):
    """As gaps_of_rows, added up as in exp_tile."""
    num_classes, step, real = plan.num_classes, plan.step, tile.dtype.type
    m, parts = lanes(tile), eight_lanes(tile)
    for j in range(LANES):
        m[j] = r[MAXIMUM + j]
        r[GAP + j] = 0.0
    for j in range(EIGHT * LANES):
        parts[j] = 0
    for c in range(num_classes):
        row = tile[c * step : c * step + LANES]
        w = weight[c]
        part = parts[((c - num_classes) & (EIGHT - 1)) * LANES :][:LANES]
        for j in range(LANES):
            part[j] += times(w, m[j] - row[j])
        if (num_classes - 1 - c) % (RUN * EIGHT) == 0:
            for j in range(LANES):
                r[GAP + j] += np.float64(fold_eight(parts, j, real))
            for j in range(EIGHT * LANES):
                parts[j] = 0
    for j in range(LANES):
        if not math.isfinite(r[GAP + j]):
            r[GAP + j] = wide_gap(tile[j:], step, weight, num_classes, m[j])
        r[GAP + j] *= largest_weight


@inline
def soft_gaps_of_tile(tile, soft, r, plan, weight, largest_weight, options):
    """As gaps_of_block, for every lane."""
    num_classes, step = plan.num_classes, plan.step
    real = tile.dtype.type
    target_share, uniform = 1.0 - options.label_smoothing, options.label_smoothing / num_classes
    m, index, gap, mass = lanes(tile), lanes(tile), lanes(tile), lanes(tile)
    bad = 0
    for j in range(LANES):
        r[GAP + j] = 0.0
    clear_dead_lanes(soft, r, plan)
    find_in_lanes(tile, r, plan)
    target_share, uniform = real(target_share), real(uniform)
    for j in range(LANES):
        m[j] = r[MAXIMUM + j]
        index[j] = r[INDEX + j]
        gap[j] = 0.0
        mass[j] = 0.0
        r[MASS + j] = 0.0
    for c in range(num_classes):
        row = tile[c * step : c * step + LANES]
        w = weight[c] if weight.size else real(1)
        t = soft[c * step : c * step + LANES]
        number = real(c)
        for j in range(LANES):
            wt = w * (target_share * t[j] + uniform)
            gap[j] += times(wt, m[j] - row[j])
            mass[j] += real(0) if index[j] == number else wt
        if c % RUN == RUN - 1 or c == num_classes - 1:
            for j in range(LANES):
                r[GAP + j] += np.float64(gap[j])
                r[MASS + j] += np.float64(mass[j])
                gap[j] = 0.0
                mass[j] = 0.0
    for j in range(LANES):
        bad += r[GAP + j] - r[GAP + j] != 0.0
    for j in range(LANES if bad else 0):  # in float64 where it leaves the range of x
        if r[GAP + j] - r[GAP + j] == 0.0:
            continue
        r[GAP + j] = 0.0
        for c in range(num_classes):
            wt = np.float64(weight[c]) if weight.size else 1.0
            wt *= np.float64(target_share * soft[c * step + j] + uniform)
            r[GAP + j] += times(wt, np.float64(m[j]) - np.float64(tile[c * step + j]))
    for j in range(LANES):
        r[GAP + j] *= largest_weight
        r[MASS + j] *= largest_weight
        k = int(index[j])
        w = weight[k] if weight.size else real(1)
        wt_k = w * (target_share * soft[k * step + j] + uniform)
        r[TOP_MASS + j] = largest_weight * np.float64(wt_k)


@inline
def write_tile(e, tile, soft, r, plan, weight, largest_weight, options):
    """The last stage of cross-entropy: factor * e_c - spread * w_c t_c, left_out at INDEX.

    Of soft targets, exponentials are in the tile.
    """
    num_classes, step = plan.num_classes, plan.step
    smoothing = label_smoothing_of(options)
    uniform = smoothing / num_classes
    real = tile.dtype.type
    f, left_out, index = lanes(tile), lanes(tile), lanes(tile)
    on_target, on_all = lanes(tile), lanes(tile)
    narrow_factors(e if soft is None else tile, f, r, plan)
    for j in range(LANES):
        spread = r[SPREAD + j] * largest_weight
        on_target[j] = spread * (1.0 - smoothing)
        on_all[j] = spread if soft is None else spread * uniform
        left_out[j] = r[LEFT_OUT + j]
        index[j] = r[INDEX + j]
    # left_out in passing: numbers put one by one would hold up who then reads the tile as vectors.
    for c in range(num_classes):
        row = tile[c * step : c * step + LANES]
        exponentials = e[c * step : c * step + LANES]
        w = weight[c] if weight.size else real(1)
        number = real(c)
        if soft is not None:
            t = soft[c * step : c * step + LANES]
            for j in range(LANES):
                g = row[j] * f[j] - w * (on_target[j] * t[j] + on_all[j])
                row[j] = left_out[j] if index[j] == number else g
        elif uniform != 0.0:
            for j in range(LANES):
                g = exponentials[j] * f[j] - w * on_all[j]
                row[j] = left_out[j] if index[j] == number else g
        else:
            for j in range(LANES):
                g = exponentials[j] * f[j]
                row[j] = left_out[j] if index[j] == number else g
