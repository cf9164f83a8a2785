"""Blocks: runs of at most BLOCK elements, taken in chunks."""

import numpy as np
from numba import types

from fastloss._numba.arithmetic import (
    common_magic,
    exponential,
    highest_of,
    lowest_of,
    times,
)
from fastloss._numba.jit import inline, summing, typed
from fastloss._numba.machine import (
    add_step,
    fold_top,
    lanes,
    scale_eight,
    scale_four,
    scale_step,
    sum_lanes,
)
from fastloss._numba.memory import fetch
from fastloss._numba.types import CHUNK, EIGHT, LANES, STEP


@inline
def pad(x, skip, chunk):
    """The elements of x in a chunk, -inf behind them and at skip."""
    for j in range(CHUNK):
        chunk[j] = -np.inf
    for j in range(min(x.size, CHUNK)):
        chunk[j] = x[j]
    if 0 <= skip < CHUNK:
        chunk[skip] = -np.inf


@typed
def largest_lane(lane):
    """The maximum of a chunk without NaN."""
    # b ^ ((b >> 31) & 0x7fffffff) orders the bits of floats as integers, and is its own inverse:
    # the maximum of integers vectorises, that of floats does not.
    wide = lane.dtype == types.float64
    integer, real = (np.int64, np.float64) if wide else (np.int32, np.float32)
    shift = integer(63 if wide else 31)
    mask = integer(np.iinfo(integer).max)
    lowest = integer(np.iinfo(integer).min)

    def largest_lane(lane):
        bits = lane.view(integer)
        m = lowest
        for i in range(CHUNK):
            b = bits[i]
            m = max(m, b ^ ((b >> shift) & mask))
        return integer(m ^ ((m >> shift) & mask)).view(real)

    return largest_lane


@inline
def largest(x):
    """The maximum, NaN left aside."""
    lane = lanes(x)
    for j in range(CHUNK):
        lane[j] = -np.inf
    whole = x.size // CHUNK * CHUNK
    for i in range(0, whole, CHUNK):
        part = x[i : i + CHUNK]
        for j in range(CHUNK):
            lane[j] = part[j] if part[j] > lane[j] else lane[j]
    if whole < x.size:
        rest = lanes(x)
        pad(x[whole:], -1, rest)
        for j in range(CHUNK):
            lane[j] = rest[j] if rest[j] > lane[j] else lane[j]
    return largest_lane(lane)


@inline
def find(x, value):
    """The first position of value, or the size of x."""
    for start in range(0, x.size, LANES):
        part = x[start : min(start + LANES, x.size)]
        hits = False
        for j in range(part.size):
            hits |= part[j] == value
        if hits:
            for j in range(part.size):
                if part[j] == value:
                    return start + j
    return x.size


@inline
def holds_nan(x, step, n):
    count = 0
    for j in range(n):
        count += x[j * step] != x[j * step]
    return count > 0


@inline
def fold(lane):
    """The sum of a chunk, in float64."""
    return sum_lanes(lane)


@inline
def below(x, highest):
    return highest if highest < x else x


@inline
def above(x, least):
    return x if x > least else least


@inline
def exp_run(x, e, temper, later, start):
    """The exponentials e in common units, wherever rows end.

    e has room for whole chunks.  Meanwhile memory is fetched, as in exp_block.
    """
    magic = common_magic(e)
    lowest, highest, zero = lowest_of(magic, temper), highest_of(e, temper), e.dtype.type(0)
    value = lanes(e)
    rest = lanes(e)
    whole = x.size // CHUNK
    if whole * CHUNK < x.size:
        pad(x[whole * CHUNK :], -1, rest)
    for chunk in range((x.size + CHUNK - 1) // CHUNK):
        i = chunk * CHUNK
        fetch(later, start + i, CHUNK)
        if chunk == whole:
            for j in range(CHUNK):
                value[j] = below(rest[j], highest)
        else:
            source = x[i : i + CHUNK]
            for j in range(CHUNK):
                value[j] = below(source[j], highest)
        to = e[i : i + CHUNK]
        for j in range(CHUNK):
            to[j] = exponential(value[j], zero, magic, lowest, temper)


@inline
def exp_block(x, skip, pivot, magic, e, temper, later, start):
    """The sum of the exponentials e, that at skip being 0.

    Meanwhile the array `later` is fetched from index start on.
    """
    lowest = lowest_of(magic, temper)
    lane, value = lanes(e), lanes(e)
    whole, hole = x.size // CHUNK, skip // CHUNK
    for j in range(CHUNK):
        lane[j] = 0
    for chunk in range((x.size + CHUNK - 1) // CHUNK):
        i = chunk * CHUNK
        fetch(later, start + i, CHUNK)
        if chunk < whole and chunk != hole:  # at once to where they go: copies become scalars
            source, to = x[i : i + CHUNK], e[i : i + CHUNK]
            for j in range(CHUNK):
                to[j] = exponential(source[j], pivot, magic, lowest, temper)
            for j in range(CHUNK):
                lane[j] += to[j]
        else:
            pad(x[i:], skip - i, value)
            for j in range(CHUNK):
                value[j] = exponential(value[j], pivot, magic, lowest, temper)
            for j in range(CHUNK):
                lane[j] += value[j]
            for j in range(min(CHUNK, x.size - i)):
                e[i + j] = value[j]
    return fold(lane)


@inline
def top_block(x, pivot, magic, highest, temper, later, start):
    """The maximum; of the exponentials the largest, and the sum of the others.

    Meanwhile memory is fetched, as in exp_block.
    """
    lowest = lowest_of(magic, temper)
    lane, top, m, value, rest = lanes(x), lanes(x), lanes(x), lanes(x), lanes(x)
    whole = x.size // CHUNK
    pad(x[whole * CHUNK :], -1, rest)
    for j in range(CHUNK):
        lane[j] = 0
        top[j] = 0
        m[j] = -np.inf
    for chunk in range((x.size + CHUNK - 1) // CHUNK):
        i = chunk * CHUNK
        fetch(later, start + i, CHUNK)
        if chunk == whole:
            for j in range(CHUNK):
                value[j] = rest[j]
        else:
            source = x[i : i + CHUNK]
            for j in range(CHUNK):
                value[j] = source[j]
        for j in range(CHUNK):
            m[j] = above(value[j], m[j])
        for j in range(CHUNK):
            value[j] = exponential(below(value[j], highest), pivot, magic, lowest, temper)
        for j in range(CHUNK):
            lane[j] += below(value[j], top[j])
        for j in range(CHUNK):
            top[j] = above(value[j], top[j])
    fold_top(lane, top)
    return largest_lane(m), top[0], np.float64(lane[0])


@inline
def sum_kept(e, n):
    """As sum_block, of n numbers in scratch: whole steps may be read."""
    lane = lanes(e)
    whole = n // CHUNK * CHUNK
    for j in range(CHUNK):
        lane[j] = 0
    for i in range(0, whole, CHUNK):
        part = e[i : i + CHUNK]
        for j in range(CHUNK):
            lane[j] += part[j]
    for i in range(whole, n, STEP):
        add_step(lane, i - whole, e, i, n - i)
    return fold(lane)


@inline
def scale_kept(e, n, f, to):
    """n products of f, in whole steps; the next row writes over the rest."""
    if n <= 4:  # the less is written beyond, the sooner it can be read
        scale_four(e, 0, f, to)
    elif n <= EIGHT:
        scale_eight(e, 0, f, to)
    else:
        for i in range(0, n, STEP):
            scale_step(e, i, f, to)


@summing
def sum_block(e):
    total = e.dtype.type(0)
    for i in range(e.size):
        total += e[i]
    return np.float64(total)


@summing
def dot_block(a, b):
    total = a.dtype.type(0)
    for i in range(a.size):
        total += a[i] * b[i]
    return np.float64(total)


@summing
def gap_block(x, weight, m):
    """sum of w_c (m - x_c), w_c relative; in float64 where it leaves the range of x."""
    narrow = x.dtype.type(0)
    if weight.size:
        for i in range(x.size):
            narrow += times(weight[i], m - x[i])
    else:
        for i in range(x.size):
            narrow += m - x[i]
    return np.float64(narrow) if narrow - narrow == 0 else wide_gap(x, 1, weight, x.size, m)


@inline
def wide_gap(x, step, weight, n, m):
    """As gap_block, in float64."""
    total = 0.0
    for i in range(n):
        w = np.float64(weight[i]) if weight.size else 1.0
        total += times(w, np.float64(m) - np.float64(x[i * step]))
    return total


@inline
def gap_run(x, weight, terms):
    """w_c (m - x_c), in place of m."""
    for i in range(x.size):
        terms[i] = times(weight[i], terms[i] - x[i])


@inline
def weigh(t, weight, target_share, uniform, wt):
    """w_c t_c, w_c relative."""
    if weight.size:
        for j in range(t.size):
            wt[j] = weight[j] * (target_share * t[j] + uniform)
    else:
        for j in range(t.size):
            wt[j] = target_share * t[j] + uniform


@inline
def soft_block(x, t, weight, skip, m, target_share, uniform, later, start):
    """The sum of w_c t_c (m - x_c), that of w_c t_c without skip, and w_c t_c there; w_c relative.

    Meanwhile memory is fetched, as in exp_block.
    """
    gap, mass, wt, value = lanes(x), lanes(x), lanes(x), lanes(x)
    whole = x.size // CHUNK
    top_mass = 0.0
    for j in range(CHUNK):
        gap[j] = 0
        mass[j] = 0
    for chunk in range((x.size + CHUNK - 1) // CHUNK):
        i = chunk * CHUNK
        fetch(later, start + i, CHUNK)
        if chunk < whole:
            source, target = x[i : i + CHUNK], t[i : i + CHUNK]
            if weight.size:
                relative = weight[i : i + CHUNK]
                for j in range(CHUNK):
                    wt[j] = relative[j] * (target_share * target[j] + uniform)
            else:
                for j in range(CHUNK):
                    wt[j] = target_share * target[j] + uniform
            for j in range(CHUNK):
                value[j] = m - source[j]
        else:
            for j in range(CHUNK):
                wt[j] = 0
            weigh(t[i:], weight[i:], target_share, uniform, wt)
            pad(x[i:], -1, value)
            for j in range(CHUNK):
                value[j] = m - value[j]
        for j in range(CHUNK):
            gap[j] += times(wt[j], value[j])
        if i <= skip < min(i + CHUNK, x.size):
            top_mass = np.float64(wt[skip - i])
            wt[skip - i] = 0
        for j in range(CHUNK):
            mass[j] += wt[j]
    total = fold(gap)
    if total - total != 0:
        total = wide_soft_gap(x, t, weight, m, target_share, uniform)
    return total, fold(mass), top_mass


@inline
def wide_soft_gap(x, t, weight, m, target_share, uniform):
    """The gap of soft_block in float64, where it leaves the range of x."""
    total = 0.0
    for i in range(x.size):
        wt = np.float64(target_share * t[i] + uniform) * (weight[i] if weight.size else 1.0)
        total += times(wt, np.float64(m) - np.float64(x[i]))
    return total
