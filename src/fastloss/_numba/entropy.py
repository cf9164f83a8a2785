"""Entropy: what a row of scores says of itself, without a target.

With d_c = (m - x_c) / T, m the maximum, the entropy is log sum exp(-d) + sum p d, and its gradient
p_c (d_c - sum p d) / T.  No term of either sum is negative, so that the entropy of a confident row
is exact, however small.  How far scores are from the maximum asks for units of each row's own.
"""

import numpy as np

from fastloss._numba.arithmetic import (
    exponential,
    log1p,
    lowest_of,
    magic_of,
    pivot_of,
    power_of,
    temper_of,
    times,
)
from fastloss._numba.blocks import fold, pad
from fastloss._numba.jit import inline
from fastloss._numba.machine import lanes
from fastloss._numba.memory import fetch, load_block
from fastloss._numba.rows import (
    find_in_row,
    largest_of_row,
    narrow_factor,
    row_scratch,
    store_rows,
)
from fastloss._numba.tiles import (
    clear_dead_lanes,
    find_in_lanes,
    largest_in_lanes,
    narrow_factors,
)
from fastloss._numba.types import (
    AHEAD,
    BLOCK,
    CHUNK,
    FACTOR,
    GAP,
    INDEX,
    LANES,
    LEFT_OUT,
    LOSS,
    MAXIMUM,
    OTHERS,
    ROW_WEIGHT,
    RUN,
    SPREAD,
    TOP,
)


@inline
def distances_block(x, skip, m, pivot, magic, e, temper, later, start):
    """As exp_block, and the sum of e (m - x)."""
    lowest = lowest_of(magic, temper)
    lane, far, value, source = lanes(e), lanes(e), lanes(e), lanes(e)
    whole, hole = x.size // CHUNK, skip // CHUNK
    for j in range(CHUNK):
        lane[j] = 0
        far[j] = 0
    for chunk in range((x.size + CHUNK - 1) // CHUNK):
        i = chunk * CHUNK
        fetch(later, start + i, CHUNK)
        if chunk < whole and chunk != hole:
            own = x[i : i + CHUNK]
            for j in range(CHUNK):
                source[j] = own[j]
        else:
            pad(x[i:], skip - i, source)
        for j in range(CHUNK):
            value[j] = exponential(source[j], pivot, magic, lowest, temper)
        for j in range(CHUNK):
            lane[j] += value[j]
        for j in range(CHUNK):
            far[j] += times(value[j], m - source[j])
        for j in range(min(CHUNK, x.size - i)):
            e[i + j] = value[j]
    return fold(lane), fold(far)


@inline
def reduce_to_entropy(x, r, i, row, kept, plan, buffer, ahead):
    """What entropy_step wants to know of a row; kept receives the exponentials, but of INDEX."""
    temper, start = temper_of(plan, buffer), row * plan.row_step
    m = buffer.dtype.type(largest_of_row(x, row, plan, buffer))
    index = find_in_row(x, start, m, plan, buffer)
    pivot, magic = pivot_of(m, temper), magic_of(m, temper)
    r[INDEX + i] = index
    r[MAXIMUM + i] = m
    r[OTHERS + i] = 0.0
    r[GAP + i] = 0.0
    for c in range(0, plan.num_classes, BLOCK):
        block = load_block(x, start + c, min(BLOCK, plan.num_classes - c), buffer, plan.storage)
        others, gap = distances_block(
            block, index - c, m, pivot, magic, kept[c:], temper, x, start + c + ahead
        )
        r[OTHERS + i] += others
        r[GAP + i] += gap
    r[TOP + i] = exponential(m, pivot, magic, lowest_of(magic, temper), temper)


@inline
def entropy_step(r, n, scale, cooling, like):
    """The loss; and the gradient e_c (d_c - SPREAD) * FACTOR, that of the maximum apart."""
    power = np.float64(power_of(like))
    for i in range(n):
        total = r[OTHERS + i] + r[TOP + i]
        mean = r[GAP + i] / total * cooling
        r[SPREAD + i] = mean
        r[LOSS + i] = times(r[ROW_WEIGHT + i], log1p(r[OTHERS + i] / r[TOP + i]) + mean)
        weight = r[ROW_WEIGHT + i] * scale
        r[FACTOR + i] = times(weight, 1.0 / (total * power))
        r[LEFT_OUT + i] = times(weight, 0.0 - mean * (r[TOP + i] / total))


@inline
def write_entropy(x, r, i, start, e, plan, cooling, buffer):
    real = e.dtype.type
    m, mean, cool = real(r[MAXIMUM + i]), real(r[SPREAD + i]), real(cooling)
    if r[ROW_WEIGHT + i] == 0.0:
        for j in range(e.size):
            e[j] = 0
        return
    f = narrow_factor(e, r[FACTOR + i])
    for c in range(0, plan.num_classes, BLOCK):
        n = min(BLOCK, plan.num_classes - c)
        source, to = load_block(x, start + c, n, buffer, plan.storage), e[c : c + n]
        for j in range(n):
            to[j] = times(to[j], (m - source[j]) * cool - mean) * f
    e[int(r[INDEX + i])] = r[LEFT_OUT + i]


@inline
def entropy_rows(x, out, r, scratch, first, n, plan, scale, cooling, wanted):
    """The first two stages of rows; and the third, if the gradient is wanted."""
    buffer, _, kept = row_scratch(scratch)
    num_classes = plan.num_classes
    ahead = min(plan.group * plan.row_step, AHEAD)
    for i in range(n):
        if r[ROW_WEIGHT + i] == 0.0:
            r[OTHERS + i] = 0.0
            r[GAP + i] = 0.0
            r[MAXIMUM + i] = 0.0
            r[TOP + i] = 1.0
            r[INDEX + i] = 0.0
        else:
            to = kept[i * num_classes :]
            reduce_to_entropy(x, r, i, first + i, to, plan, buffer, ahead)
    entropy_step(r, n, scale, cooling, buffer)
    if wanted:
        for i in range(n):
            e = kept[i * num_classes : (i + 1) * num_classes]
            write_entropy(x, r, i, (first + i) * plan.row_step, e, plan, cooling, buffer)
        store_rows(out, first, kept, n, plan)


@inline
def reduce_tile_to_entropy(tile, e, r, plan):
    """As reduce_to_entropy, of lanes, whose maxima are known."""
    num_classes, step = plan.num_classes, plan.step
    real, temper = tile.dtype.type, temper_of(plan, tile)
    pivot, magic, lowest, m = lanes(tile), lanes(tile), lanes(tile), lanes(tile)
    value, lane, far, top, index = lanes(tile), lanes(tile), lanes(tile), lanes(tile), lanes(tile)
    for j in range(LANES):
        m[j] = r[MAXIMUM + j]
        pivot[j], magic[j] = pivot_of(m[j], temper), magic_of(m[j], temper)
        lowest[j] = lowest_of(magic[j], temper)
        index[j] = r[INDEX + j]
        lane[j] = 0
        far[j] = 0
        top[j] = 0
        r[OTHERS + j] = 0.0
        r[GAP + j] = 0.0
    for c in range(num_classes):
        row, to = tile[c * step : c * step + LANES], e[c * step : c * step + LANES]
        number = real(c)
        for j in range(LANES):
            value[j] = exponential(row[j], pivot[j], magic[j], lowest[j], temper)
        for j in range(LANES):
            top[j] = value[j] if index[j] == number else top[j]
        for j in range(LANES):
            value[j] = real(0) if index[j] == number else value[j]
        for j in range(LANES):
            lane[j] += value[j]
        for j in range(LANES):
            far[j] += times(value[j], m[j] - row[j])
        for j in range(LANES):
            to[j] = value[j]
        if c % RUN == RUN - 1 or c == num_classes - 1:
            for j in range(LANES):
                r[OTHERS + j] += lane[j]
                r[GAP + j] += far[j]
                lane[j] = 0
                far[j] = 0
    for j in range(LANES):
        r[TOP + j] = top[j]


@inline
def entropy_tile(tile, e, r, plan, scale, cooling, wanted):
    """As entropy_rows; the gradient takes the place of the scores."""
    real, step = tile.dtype.type, plan.step
    f, m, mean, left_out = lanes(tile), lanes(tile), lanes(tile), lanes(tile)
    index, cool = lanes(tile), real(cooling)
    clear_dead_lanes(tile, r, plan)
    largest_in_lanes(tile, r, plan)
    find_in_lanes(tile, r, plan)
    reduce_tile_to_entropy(tile, e, r, plan)
    entropy_step(r, LANES, scale, cooling, tile)
    if not wanted:
        return
    narrow_factors(e, f, r, plan)
    for j in range(LANES):
        m[j] = r[MAXIMUM + j]
        mean[j] = r[SPREAD + j]
        left_out[j] = r[LEFT_OUT + j]
        index[j] = r[INDEX + j]
    for c in range(plan.num_classes):
        row, exponentials = tile[c * step : c * step + LANES], e[c * step : c * step + LANES]
        number = real(c)
        for j in range(LANES):
            row[j] = f[j] * times(exponentials[j], (m[j] - row[j]) * cool - mean[j])
        for j in range(LANES):
            row[j] = left_out[j] if index[j] == number else row[j]
