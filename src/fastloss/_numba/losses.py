"""The scalar step: from what a row was reduced to, its loss and the coefficients of its gradient.

Loops over the fields of one array, whose distances LLVM knows: they vectorise.
"""

import numpy as np
from numba import types

from fastloss._contract import Options
from fastloss._numba.arithmetic import (
    exponential,
    log1p,
    lowest_of,
    magic_of,
    pivot_of,
    power_of,
    temper_of,
    times,
    untempered,
)
from fastloss._numba.jit import inline, typed
from fastloss._numba.machine import lanes, sum_lanes
from fastloss._numba.types import (
    FACTOR,
    GAP,
    LANES,
    LEFT_OUT,
    LOSS,
    MASS,
    MAXIMUM,
    OTHERS,
    ROW_WEIGHT,
    SPREAD,
    TARGET_EXP,
    TARGET_LOGIT,
    TARGET_WEIGHT,
    TOP,
    TOP_MASS,
)


def is_plain(options):
    return options[1:] == Options()[1:]


@inline
def is_of_probability(options):
    """Whether the loss is another function of the target's probability than -log p."""
    return options.gamma != 0.0 or options.epsilon != 0.0


# Of options that are None where they are plain.
@inline
def label_smoothing_of(options):
    return 0.0 if options is None else options.label_smoothing


@inline
def z_loss_of(options):
    return 0.0 if options is None else options.z_loss


@inline
def least_rest_of(options, like):
    """Of a row in common units, the least share of all classes but the target (find_untamed)."""
    if options is None:
        return 0.0
    return 2.0 ** (-300.0 / options.gamma) if options.gamma and like.itemsize == 8 else 0.0


@inline
def add_exponentials(r, n, like, plan):
    """The exponentials of the maximum and of the target, in the units of the sum."""
    real, temper = like.dtype.type, temper_of(plan, like)
    for i in range(n):
        m = real(r[MAXIMUM + i])
        pivot, magic = pivot_of(m, temper), magic_of(m, temper)
        lowest = lowest_of(magic, temper)
        r[TOP + i] = exponential(m, pivot, magic, lowest, temper)
        r[TARGET_EXP + i] = exponential(real(r[TARGET_LOGIT + i]), pivot, magic, lowest, temper)


@inline
def left_out_of(a, p, others, subtracted, rest):
    """a p - subtracted, or the same as rest - a (1 - p): the second unless it cancels more."""
    cancels = 2.0 * larger(a * p, subtracted) < larger(a * others, rest)
    return a * p - subtracted if cancels else rest - a * others


@inline
def larger(a, b):
    return abs(a) if abs(a) > abs(b) else abs(b)


@inline
def cross_entropy_step(r, n, num_classes, options, scale, weight_sum, like):
    power = np.float64(power_of(like))
    target_share = 1.0 - options.label_smoothing
    uniform = options.label_smoothing / num_classes
    spread, cooling = uniform * weight_sum, 1.0 / options.temperature
    for i in range(n):
        row_weight = r[ROW_WEIGHT + i]
        others = r[OTHERS + i]
        b = target_share * r[TARGET_WEIGHT + i]
        d = (r[TARGET_LOGIT + i] - r[MAXIMUM + i]) * cooling
        total = others + r[TARGET_EXP + i]
        inverse = 1.0 / total
        log_sum = log1p((others + (r[TARGET_EXP + i] - r[TOP + i])) / r[TOP + i])
        lse = r[MAXIMUM + i] * cooling + log_sum
        z_slope = 2.0 * options.z_loss * lse
        loss = times(b, log_sum - d) + spread * log_sum
        loss += uniform * (r[GAP + i] * cooling) + 0.5 * z_slope * lse
        r[LOSS + i] = times(row_weight, loss)

        a = b + spread + z_slope
        spread_y = uniform * r[TARGET_WEIGHT + i]
        left_out = left_out_of(
            a, r[TARGET_EXP + i] * inverse, others * inverse, b + spread_y,
            spread + z_slope - spread_y,
        )  # fmt: skip
        weight = row_weight * scale
        r[FACTOR + i] = times(weight, a * (inverse / power))
        r[SPREAD + i] = weight * uniform
        r[LEFT_OUT + i] = times(weight, left_out)


@inline
def plain_step(r, n, scale, like):
    """As cross_entropy_step, without smoothing and z-loss; the logarithm in the compute type."""
    unit = 1.0 / np.float64(power_of(like))  # a product takes less time than a quotient
    ratio, top = lanes(like), lanes(like)
    for i in range(n):
        ratio[i] = r[OTHERS + i] + (r[TARGET_EXP + i] - r[TOP + i])
        top[i] = r[TOP + i]
    # A loop of its own: as many numbers to a vector as there is room for.
    for i in range(n):
        ratio[i] = log1p(ratio[i] / top[i])
    for i in range(n):
        others = r[OTHERS + i]
        weight = r[ROW_WEIGHT + i] * r[TARGET_WEIGHT + i]
        log_sum = np.float64(ratio[i])
        r[LOSS + i] = times(weight, log_sum - (r[TARGET_LOGIT + i] - r[MAXIMUM + i]))
        weight *= scale
        inverse = 1.0 / (others + r[TARGET_EXP + i])
        r[FACTOR + i] = times(weight, inverse * unit)
        r[LEFT_OUT + i] = times(weight, 0.0 - others * inverse)


@inline
def probability_step(r, n, options, scale, like):
    """A loss phi(log p) of the target's probability p: the gradient is -phi' times plain_step's."""
    unit = 1.0 / np.float64(power_of(like))
    ratio, top = lanes(like), lanes(like)
    sure, cooling = 1e-8 if like.itemsize == 4 else 1e-16, 1.0 / options.temperature
    p, q, minus_log_p = lanes(r), lanes(r), lanes(r)
    phi, slope = lanes(r), lanes(r)
    for i in range(n):
        ratio[i] = r[OTHERS + i] + (r[TARGET_EXP + i] - r[TOP + i])
        top[i] = r[TOP + i]
    for i in range(n):
        ratio[i] = log1p(ratio[i] / top[i])
    for i in range(n):
        inverse = 1.0 / (r[OTHERS + i] + r[TARGET_EXP + i])
        p[i] = r[TARGET_EXP + i] * inverse
        q[i] = r[OTHERS + i] * inverse
        r[FACTOR + i] = inverse * unit
        log_p = (r[TARGET_LOGIT + i] - r[MAXIMUM + i]) * cooling - np.float64(ratio[i])
        # Of a q so small the logarithm is no other number, and might be a subnormal one.
        minus_log_p[i] = q[i] if q[i] < sure else -log_p
    if options.gamma != 0.0:
        focal_step(p, q, minus_log_p, n, options.gamma, phi, slope)
    else:
        poly_step(p, q, minus_log_p, n, options.epsilon, phi, slope)
    for i in range(n):
        weight = r[ROW_WEIGHT + i] * r[TARGET_WEIGHT + i]
        r[LOSS + i] = times(weight, phi[i])
        weight *= scale
        r[FACTOR + i] = times(weight, slope[i] * r[FACTOR + i])
        r[LEFT_OUT + i] = times(weight, 0.0 - slope[i] * q[i])


@inline
def focal_step(p, q, minus_log_p, n, gamma, phi, slope):
    """q**gamma times -log p, q = 1 - p."""
    raise_to(q, p, n, gamma, phi)
    for i in range(n):
        ratio = minus_log_p[i] / q[i] if q[i] > 0.0 else 1.0  # to which it tends
        slope[i] = phi[i] * (1.0 + gamma * times(p[i], ratio))
        phi[i] *= minus_log_p[i]


@inline
def poly_step(p, q, minus_log_p, n, epsilon, phi, slope):
    """-log p + epsilon q, q = 1 - p."""
    for i in range(n):
        phi[i] = minus_log_p[i] + epsilon * q[i]
        slope[i] = 1.0 + epsilon * p[i]


@inline
def raise_to(q, p, n, gamma, power):
    """q**gamma of probabilities q = 1 - p, by products if there are few."""
    real = q.dtype.type
    zero, exponent, most = real(0), real(gamma), real(1e38 if q.itemsize == 4 else 1e308)
    whole = int(gamma) if gamma <= 8.0 else 0
    if whole == gamma:
        for i in range(n):
            power[i] = 1.0
        for _ in range(whole):
            for i in range(n):
                power[i] *= q[i]
        return
    temper = untempered(q)
    magic = magic_of(zero, temper)
    lowest = lowest_of(magic, temper)
    for i in range(n):
        ratio = p[i] / q[i]
        log_q = -log1p(most if ratio > most else ratio)
        power[i] = exponential(exponent * log_q, zero, magic, lowest, temper) * power_of(q)


@inline
def cross_entropy_soft_step(r, n, options, scale, like):
    power, cooling = np.float64(power_of(like)), 1.0 / options.temperature
    for i in range(n):
        row_weight = r[ROW_WEIGHT + i]
        others = r[OTHERS + i]
        mass = r[MASS + i] + r[TOP_MASS + i]
        log_sum = log1p(others / r[TOP + i])
        lse = r[MAXIMUM + i] * cooling + log_sum
        z_slope = 2.0 * options.z_loss * lse
        loss = mass * log_sum + r[GAP + i] * cooling + 0.5 * z_slope * lse
        r[LOSS + i] = times(row_weight, loss)

        inverse = 1.0 / (others + r[TOP + i])
        a = mass + z_slope
        left_out = left_out_of(
            a, r[TOP + i] * inverse, others * inverse, r[TOP_MASS + i], r[MASS + i] + z_slope
        )
        weight = row_weight * scale
        r[FACTOR + i] = times(weight, a * (inverse / power))
        r[SPREAD + i] = weight
        r[LEFT_OUT + i] = times(weight, left_out)


@typed
def scalar_step(soft, r, n, plan, options, scale, weight_sum, like):
    """Which loss: of soft targets unless they are None, else of indices."""
    if soft != types.none:
        return lambda soft, r, n, plan, options, scale, weight_sum, like: cross_entropy_soft_step(
            r, n, options, scale, like
        )
    if options == types.none:
        return lambda soft, r, n, plan, options, scale, weight_sum, like: plain_step(
            r, n, scale, like
        )
    return _step_of_options


def _step_of_options(soft, r, n, plan, options, scale, weight_sum, like):
    if is_of_probability(options):
        probability_step(r, n, options, scale, like)
    else:
        cross_entropy_step(r, n, plan.num_classes, options, scale, weight_sum, like)


@inline
def deliver_losses(r, n, losses, first, like):
    """Round row losses to the compute type, hand them out; return the sum of what was."""
    real = like.dtype.type
    for i in range(n):
        r[LOSS + i] = np.float64(real(r[LOSS + i]))
    for i in range(n, LANES):
        r[LOSS + i] = 0.0
    if losses.size:
        for i in range(n):
            losses[first + i] = r[LOSS + i]
    return sum_lanes(r[LOSS : LOSS + LANES])
