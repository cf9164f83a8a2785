"""Binary losses: every element a score of its own, against a target of its own.

All comes from one exponential, that of -|x|, which cannot overflow: softplus and sigmoid of x and
of -x.  None of them is a difference, so that they are exact however confident an element is.
An element's bits do not depend on what lies around it: all is taken in CHUNK, of which the last are
filled up.  Scratch: parts of scores, targets, weights and losses, and a unit's gradients.
"""

import numpy as np

from fastloss._numba.arithmetic import (
    exponential,
    log1p,
    lowest_of,
    magic_of,
    power_of,
    times,
    untempered,
)
from fastloss._numba.blocks import fold
from fastloss._numba.jit import inline
from fastloss._numba.losses import raise_to
from fastloss._numba.machine import lanes, load_index
from fastloss._numba.memory import load_into, store
from fastloss._numba.types import CHUNK

PART = 1024  # elements: CHUNK so often as a sum stays in float32
PARTS = 4  # in a unit of work


@inline
def binary_numbers():
    """Of scratch."""
    return (5 + PARTS) * PART


@inline
def load_targets(target, soft, t, start, plan):
    """Targets of any type in the compute type: integers, unless they are None, or else numbers."""
    if target is not None:
        data, kind = target
        for i in range(t.size):
            t[i] = load_index(data, kind, start + i)
    if soft is not None:
        load_into(t, soft, start, plan.other_storage)


@inline
def weigh_elements(weight, sample_weight, positive, negative, start, plan):
    """The weights of elements: what counts for a target of 1, and what for 0.

    Elements next to each other are taken together where the weight of their class, or that of
    their row, is the same.
    """
    labels, inner, n = plan.num_classes, plan.inner, positive.size
    i = 0
    while i < n:
        row, place = divmod(start + i, labels * inner)
        c, j = divmod(place, inner)
        run = min(n - i, labels - c if inner == 1 else inner - j)
        class_step = 1 if inner == 1 else 0
        for k in range(run):
            positive[i + k] = weight[c + k * class_step] if weight.size else 1.0
            negative[i + k] = weight[labels + c + k * class_step] if weight.size else 1.0
        if sample_weight.size:
            for k in range(run):
                s = sample_weight[row * inner + j + k * (1 - class_step)]
                positive[i + k] = positive[i + k] * s
                negative[i + k] = negative[i + k] * s
        i += run


@inline
def sigmoid_chunk(x, large, small, log):
    """Of the two sigmoids, of x and of -x, the larger and the smaller, and log(1 + exp(-|x|)).

    The last two in units of 2**-shift, as exponentials are.
    """
    real = x.dtype.type
    zero, one, tiny = real(0), real(1), real(1e-17)
    temper = untempered(x)
    magic = magic_of(zero, temper)
    lowest, power = lowest_of(magic, temper), power_of(x)
    unit = one / power
    e = lanes(x)
    for j in range(CHUNK):
        e[j] = exponential(x[j] if x[j] < zero else -x[j], zero, magic, lowest, temper)
    for j in range(CHUNK):
        log[j] = log1p(power * e[j])
    for j in range(CHUNK):
        narrow = power * e[j]
        # Of a number so small the logarithm is no other number, and might be a subnormal one.
        log[j] = e[j] if narrow < tiny else unit * log[j]
        large[j] = one / (one + narrow)
        small[j] = e[j] * large[j]


@inline
def positive_part(x, zero):
    return x if x > zero else zero


@inline
def binary_cross_entropy_chunk(x, t, positive, negative, scale, loss, g):
    """Softplus of x is that of -|x|, and x where that is positive."""
    real = x.dtype.type
    zero, one, power = real(0), real(1), power_of(x)
    large, small, log = lanes(x), lanes(x), lanes(x)
    sigmoid_chunk(x, large, small, log)
    for j in range(CHUNK):
        yes, no = positive[j] * t[j], negative[j] * (one - t[j])
        rest = times(yes, positive_part(-x[j], zero)) + times(no, positive_part(x[j], zero))
        loss[j] = (times(yes, log[j]) + times(no, log[j])) * power + rest
        yes, no = -scale * yes, scale * no
        above, below = (no, yes) if x[j] > zero else (yes, no)
        g[j] = times(above, large[j]) + times(below, small[j]) * power


@inline
def sigmoid_focal_chunk(x, t, positive, negative, scale, gamma, loss, g):
    """q**gamma times binary cross-entropy, q = 1 - p, p the probability that the target has."""
    real = x.dtype.type
    zero, one, power = real(0), real(1), power_of(x)
    exponent = real(gamma)
    large, small, log = lanes(x), lanes(x), lanes(x)
    p, q, factor = lanes(x), lanes(x), lanes(x)
    sigmoid_chunk(x, large, small, log)
    for j in range(CHUNK):
        yes, no = t[j], one - t[j]
        yes, no = (yes, no) if x[j] > zero else (no, yes)  # yes goes with the larger one
        p[j] = yes * large[j] + no * (power * small[j])
        q[j] = no * large[j] + yes * (power * small[j])
    raise_to(q, p, CHUNK, gamma, factor)
    for j in range(CHUNK):
        yes, no = t[j], one - t[j]
        weight = times(times(yes, positive[j]) + times(no, negative[j]), factor[j])
        rest = times(yes, positive_part(-x[j], zero)) + times(no, positive_part(x[j], zero))
        ratio = large[j] * (power * small[j]) / q[j] if q[j] > zero else zero
        further = times(exponent * (no - yes) * ratio, power * log[j] + rest)
        loss[j] = times(weight, log[j]) * power + times(weight, rest)
        weight = weight * scale
        yes, no = -weight * yes, weight * no
        above, below = (no, yes) if x[j] > zero else (yes, no)
        g[j] = times(above, large[j]) + times(below, small[j]) * power + times(weight, further)


@inline
def binary_unit(
    x, target, soft, weight, sample_weight, losses, out, scratch, first, n, plan, options, focal,
    scale,
):  # fmt: skip
    """The sum of the losses of a unit; of sigmoid focal loss, unless `focal` is None."""
    parts, g = scratch[: 5 * PART].reshape(5, PART), scratch[5 * PART :]
    total = 0.0
    for i in range(PART):  # unless there are others
        parts[2, i] = 1.0
        parts[3, i] = 1.0
    for start in range(0, n, PART):
        total += binary_part(
            x, target, soft, weight, sample_weight, losses, parts, g[start : start + PART],
            first + start, min(PART, n - start), plan, options, focal, scale,
        )  # fmt: skip
    if out.size:
        store(out, first, g[:n], plan.storage, plan.stream)
    return total


@inline
def binary_part(
    x, target, soft, weight, sample_weight, losses, parts, g, start, n, plan, options, focal, scale
):
    """The losses and gradients of at most PART elements; the sum of the losses."""
    own, t, positive, negative, loss = parts[0], parts[1], parts[2], parts[3], parts[4]
    real = g.dtype.type
    smoothing, factor = options.label_smoothing, real(scale)
    target_share, uniform = real(1.0 - smoothing), real(0.5 * smoothing)
    for i in range(n, PART):
        own[i] = 0.0
        t[i] = 0.0
    load_into(own[:n], x, start, plan.storage)
    load_targets(target, soft, t[:n], start, plan)
    if weight.size or sample_weight.size:
        weigh_elements(weight, sample_weight, positive[:n], negative[:n], start, plan)
    if smoothing != 0.0:
        for i in range(PART):
            t[i] = target_share * t[i] + uniform
    for i in range(0, n, CHUNK):
        if focal is None:
            binary_cross_entropy_chunk(
                own[i:], t[i:], positive[i:], negative[i:], factor, loss[i:], g[i:]
            )
        if focal is not None:
            sigmoid_focal_chunk(
                own[i:], t[i:], positive[i:], negative[i:], factor, options.gamma, loss[i:], g[i:]
            )
    for i in range(n, PART):
        loss[i] = 0.0
    for i in range(n if losses.size else 0):
        losses[start + i] = loss[i]
    return sum_part(loss)


@inline
def sum_part(loss):
    """In float64 where it leaves the range of the losses."""
    lane = lanes(loss)
    for j in range(CHUNK):
        lane[j] = 0.0
    for i in range(0, loss.size, CHUNK):
        for j in range(CHUNK):
            lane[j] += loss[i + j]
    total = fold(lane)
    if total - total != 0:
        total = 0.0
        for i in range(loss.size):
            total += np.float64(loss[i])
    return total
