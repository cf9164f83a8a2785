"""The backward functions of softmax, p (g - sum g p), and of log_softmax, g - exp(log_p) sum g."""

import numpy as np

from fastloss._numba.arithmetic import (
    exponential,
    highest_of,
    huge_of,
    lowest_of,
    magic_of,
    pivot_of,
    power_of,
    subtract_product,
    tiny_of,
    untempered,
)
from fastloss._numba.blocks import dot_block, largest, sum_block
from fastloss._numba.jit import inline
from fastloss._numba.machine import can_permute, eight_lanes, lanes, spread_sixteen
from fastloss._numba.memory import copy, load_block, store
from fastloss._numba.rows import (
    largest_of_rows,
    row_scratch,
    share_of_row,
    store_rows,
    sum_rows,
)
from fastloss._numba.tiles import fold_eight, largest_in_lanes
from fastloss._numba.types import (
    BLOCK,
    CACHED,
    CHUNK,
    EIGHT,
    HUGE_UNIT,
    LANES,
    LOG_SOFTMAX_BACKWARD,
    MAXIMUM,
    OTHERS,
    RUN,
    STEP,
)


@inline
def backward_rows(g, p, out, r, scratch, first, n, plan):
    buffer, line, kept = row_scratch(scratch)
    num_classes = plan.num_classes
    if plan.operation == LOG_SOFTMAX_BACKWARD:
        largest_of_rows(p, first, n, plan, r, buffer)
    for i in range(n):
        start = (first + i) * plan.row_step
        total = 0.0
        for c in range(0, num_classes, BLOCK):
            total += terms_of_block(g, p, start, c, False, plan, buffer, line)
        huge = is_huge(total, scratch)
        if huge:
            total = 0.0
            for c in range(0, num_classes, BLOCK):
                total += terms_of_block(g, p, start, c, True, plan, buffer, line)
        for c in range(0, num_classes, BLOCK):
            to = kept[i * num_classes + c : i * num_classes + min(c + BLOCK, num_classes)]
            backward_block(g, p, start, c, huge, r[MAXIMUM + i], total, to, plan, buffer, line)
    store_rows(out, first, kept, n, plan)


@inline
def terms_of_block(g, p, start, c, huge, plan, buffer, line):
    """The sum that the result asks for, of the block that begins with class c."""
    n = min(BLOCK, plan.num_classes - c)
    log_probs = plan.operation == LOG_SOFTMAX_BACKWARD
    upstream = load_block(g, start + c, n, buffer, plan.storage)
    if log_probs and not huge:
        return sum_block(upstream)
    forward = load_block(p, start + c, n, line, plan.storage)
    return huge_sum(upstream, forward, 1, n, log_probs) if huge else dot_block(upstream, forward)


@inline
def backward_block(g, p, start, c, huge, maximum, total, to, plan, buffer, line):
    n, real = to.size, buffer.dtype.type
    log_probs = plan.operation == LOG_SOFTMAX_BACKWARD
    upstream = load_block(g, start + c, n, buffer, plan.storage)
    forward = load_block(p, start + c, n, line, plan.storage)
    m, temper = (
        reference_above(real(maximum if log_probs else 0.0), buffer), untempered(buffer)
    )  # fmt: skip
    pivot, magic = pivot_of(m, temper), magic_of(m, temper)
    lowest, unit = lowest_of(magic, temper), unit_of(m, temper)
    if huge:
        huge_difference(upstream, forward, to, 1, n, pivot, magic, lowest, unit, total, log_probs)
    elif log_probs:
        shrink = shrink_for(total, unit, buffer)
        f = total * (1 / shrink) * unit
        log_softmax_vjp(upstream, forward, pivot, magic, lowest, real(shrink), real(f), to)
    else:
        softmax_vjp(upstream, forward, real(total), to)


@inline
def softmax_vjp(g, p, total, to):
    for i in range(to.size):
        to[i] = p[i] * (g[i] - total)


@inline
def log_softmax_vjp(g, log_p, pivot, magic, lowest, shrink, total, to):
    temper = untempered(to)
    for i in range(to.size):
        e = exponential(log_p[i], pivot, magic, lowest, temper)
        to[i] = subtract_product(e * shrink, total, g[i])


@inline
def backward_run(g, p, out, r, kept, buffer, line, first, n, plan):
    """Short rows as one run.  False, and nothing done, if one asks for a scale of its own: by its
    sum or, of log-probabilities, by a large one."""
    num_classes = plan.num_classes
    rows = LANES if LANES * num_classes <= CACHED else STEP
    for i in range(0, n, rows):
        to = kept[i * num_classes :]
        if not backward_part(g, p, r, to, buffer, line, first + i, min(n - i, rows), plan):
            return False
    store(out, first * num_classes, kept[: n * num_classes], plan.storage, plan.stream)
    return True


@inline
def backward_part(g, p, r, kept, buffer, line, first, n, plan):
    """backward_run of rows that stay in the nearest cache, into kept."""
    num_classes, real = plan.num_classes, kept.dtype.type
    log_probs = plan.operation == LOG_SOFTMAX_BACKWARD
    start, size = first * num_classes, n * num_classes
    upstream = load_block(g, start, size, buffer, plan.storage)
    forward = load_block(p, start, size, line, plan.storage)
    if not terms_of_run(upstream, forward, kept[:size], log_probs):
        return False
    sum_rows(kept, r, OTHERS, n, num_classes)
    f = lanes(kept)
    unit = unit_of(real(0), untempered(kept)) if log_probs else 1.0
    odd = 0
    for i in range(n):
        total = r[OTHERS + i]
        odd += is_huge(total, kept) | ((abs(total * unit) < tiny_of(kept)) & (total != 0.0))
        f[i] = total * unit
    if odd:
        return False
    if can_permute(kept):
        for i in range(0, n, STEP):
            spread_sixteen(kept, i * num_classes, num_classes, share_of_row(num_classes), i, f)
    else:
        for i in range(n):
            for c in range(i * num_classes, (i + 1) * num_classes):
                kept[c] = f[i]
    finish_run(upstream, forward, kept[:size], log_probs)
    return True


@inline
def terms_of_run(g, p, terms, log_probs):
    """What is summed up; False if a log-probability asks for a reference."""
    if log_probs:
        if reference_above(largest(p), terms) != 0:
            return False
        copy(terms, g)
    else:
        for i in range(terms.size):
            terms[i] = g[i] * p[i]
    return True


@inline
def finish_run(g, p, f, log_probs):
    """The result, in place of the factor of each row."""
    if log_probs:
        zero = f.dtype.type(0)
        temper = untempered(f)
        magic = magic_of(zero, temper)
        lowest = lowest_of(magic, temper)
        for i in range(f.size):
            f[i] = subtract_product(exponential(p[i], zero, magic, lowest, temper), f[i], g[i])
    else:
        for i in range(f.size):
            f[i] = p[i] * (g[i] - f[i])


@inline
def backward_tile(tile, upstreams, r, plan):
    num_classes, step = plan.num_classes, plan.step
    log_probs = plan.operation == LOG_SOFTMAX_BACKWARD
    pivot, magic, lowest = lanes(tile), lanes(tile), lanes(tile)
    parts, f, shrink = eight_lanes(tile), lanes(tile), lanes(tile)
    real, temper = tile.dtype.type, untempered(tile)
    for j in range(LANES):
        r[OTHERS + j] = 0.0
    for j in range(EIGHT * LANES):
        parts[j] = 0
    for c in range(num_classes):
        forward = tile[c * step : c * step + LANES]
        upstream = upstreams[c * step : c * step + LANES]
        part = parts[((c - num_classes) & (EIGHT - 1)) * LANES :][:LANES]
        for j in range(LANES):
            part[j] += upstream[j] if log_probs else upstream[j] * forward[j]
        if (num_classes - 1 - c) % (RUN * EIGHT) == 0:
            for j in range(LANES):
                r[OTHERS + j] += np.float64(fold_eight(parts, j, real))
            for j in range(EIGHT * LANES):
                parts[j] = 0
    if log_probs:
        largest_in_lanes(tile, r, plan)
    for j in range(LANES):
        m = reference_above(real(r[MAXIMUM + j] if log_probs else 0.0), tile)
        pivot[j], magic[j] = pivot_of(m, temper), magic_of(m, temper)
        lowest[j], unit = lowest_of(magic[j], temper), unit_of(m, temper)
        total = r[OTHERS + j]
        if is_huge(total, tile):
            # The result takes the place of g, and what follows leaves that alone.
            g, forward = upstreams[j:], tile[j:]
            total = huge_sum(g, forward, step, num_classes, log_probs)
            huge_difference(
                g, forward, g, step, num_classes, pivot[j], magic[j], lowest[j], unit, total,
                log_probs,
            )  # fmt: skip
            for c in range(num_classes):
                forward[c * step] = 1
            total, unit = 0.0, 1.0
        factor = shrink_for(total, unit, tile) if log_probs else 1.0
        shrink[j] = factor
        f[j] = total * (1 / factor) * unit if log_probs else total
    for c in range(num_classes):
        forward = tile[c * step : c * step + LANES]
        upstream = upstreams[c * step : c * step + LANES]
        if log_probs:
            for j in range(LANES):
                e = exponential(forward[j], pivot[j], magic[j], lowest[j], temper)
                forward[j] = subtract_product(e * shrink[j], f[j], upstream[j])
        else:
            for j in range(LANES):
                forward[j] = forward[j] * (upstream[j] - f[j])


@inline
def reference_above(maximum, like):
    """Log-probabilities are at most 0, but the formulas hold for any: a reference for all."""
    return maximum if maximum > highest_of(like, untempered(like)) else like.dtype.type(0)


@inline
def unit_of(m, temper):
    """What an exponential with reference m is multiplied by to give exp(x)."""
    pivot, magic = pivot_of(m, temper), magic_of(m, temper)
    e = exponential(m, pivot, magic, lowest_of(magic, temper), temper)
    return np.exp(np.float64(m)) / np.float64(e)


@inline
def shrink_for(total, unit, numbers):
    """A power of two for exponentials, so that total * unit over it is normal; mostly 1."""
    # That product may be subnormal, and is slow then; so is a quotient of a subnormal number.
    small = abs(total) < tiny_of(numbers) / unit
    return np.float64(power_of(numbers) if small else 1)


@inline
def is_huge(total, numbers):
    """Whether a sum of upstream gradients is out of range, or near enough to its end."""
    return not abs(total) < huge_of(numbers)


@inline
def huge_sum(g, p, step, n, log_probs):
    """HUGE_UNIT times the sum of g, or without log_probs of g p: what overflows elsewhere."""
    total = 0.0
    for start in range(0, n, CHUNK):
        part = 0.0
        for i in range(start, min(start + CHUNK, n)):
            factor = 1.0 if log_probs else np.float64(p[i * step])
            part += HUGE_UNIT * np.float64(g[i * step]) * factor
        total += part
    return total


@inline
def huge_difference(g, forward, to, step, n, pivot, magic, lowest, unit, total, log_probs):
    """What the backward functions say, the sum being total / HUGE_UNIT, without overflow."""
    for i in range(n):
        value = HUGE_UNIT * np.float64(g[i * step])
        if log_probs:
            e = exponential(forward[i * step], pivot, magic, lowest, untempered(to))
            value -= unit * np.float64(e) * total
        else:
            value = np.float64(forward[i * step]) * (value - total)
        to[i * step] = value / HUGE_UNIT
