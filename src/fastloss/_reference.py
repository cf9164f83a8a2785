"""The NumPy backend: the specification that the compiled kernels are held against.

Every function takes what ``_contract`` says and computes, as plainly as NumPy allows, what its
namesakes in ``_numba`` and ``_cython`` must compute.  All arithmetic is float64; results are
rounded once on the way out.  Temporaries as large as the logits are fine here and nowhere else.
"""

import numpy as np

from fastloss._contract import TargetCheck

COMPUTE_DTYPE = {"float64": np.dtype(np.float64)}  # every other dtype computes in float32
FLOAT32 = np.dtype(np.float32)


def softmax(logits, out, num_threads):
    x, _, k = _shifted(logits)
    e = np.exp(x)
    total = 1.0 + _sum_others(e, k)
    _round_to(out, e / total)


def log_softmax(logits, out, num_threads):
    x, _, k = _shifted(logits)
    _round_to(out, x - np.log1p(_sum_others(np.exp(x), k)))


def logsumexp(logits, out, num_threads):
    x, m, k = _shifted(logits)
    log_s = np.log1p(_sum_others(np.exp(x), k))
    # Nothing but -inf, or a +inf: the maximum is all there is to the sum.
    log_s[np.isinf(m) & ~np.isnan(_float64(logits)).any(axis=1, keepdims=True)] = 0.0
    _round_to(out, (m + log_s)[:, 0, :])


def softmax_backward(grad_output, probs, out, num_threads):
    g, p = _float64(grad_output), _float64(probs)
    with np.errstate(all="ignore"):
        unit = _unit(_sum(g * p))
        _round_to(out, p * (unit * g - _sum(unit * g * p)) / unit)


def log_softmax_backward(grad_output, log_probs, out, num_threads):
    g, log_p = _float64(grad_output), _float64(log_probs)
    with np.errstate(all="ignore"):
        unit = _unit(_sum(g))
        _round_to(out, (unit * g - np.exp(log_p) * _sum(unit * g)) / unit)


def _unit(total):
    """A power of two by which a sum near the end of the range is brought away from it, else 1."""
    return np.where(np.abs(total) < 2.0**970, 1.0, 2.0**-64)


def check_target(labels, options, num_classes, num_threads):
    target, weight, sample_weight = labels
    used = target != options.ignore_index
    bad = used & ((target < 0) | (target >= num_classes))
    if bad.any():
        return TargetCheck(int(np.flatnonzero(bad)[0]), 0.0)
    row_weight = np.ones(target.shape) if sample_weight is None else sample_weight
    if weight is not None:
        row_weight = row_weight * weight[np.where(used, target, 0).astype(np.intp)]
    return TargetCheck(-1, float(row_weight[used].sum()))


def cross_entropy(logits, labels, options, scale, losses, grad, num_threads):
    loss = _cross_entropy_soft if labels.soft else _cross_entropy
    return loss(logits, labels, options, scale, losses, grad)


def _cross_entropy(logits, labels, options, scale, losses, grad):
    target, weight, sample_weight = labels
    label_smoothing, z_loss = options.label_smoothing, options.z_loss
    num_classes = logits.shape[1]
    used = target != options.ignore_index
    y = np.where(used, target, 0).astype(np.intp)[:, None, :]
    w = np.ones(num_classes) if weight is None else weight
    w_y = w[y]
    row_weight = _row_weight(used, sample_weight)
    if not z_loss and not (label_smoothing and w.any()):
        row_weight[w_y == 0] = 0
    w = w[None, :, None]
    u = label_smoothing / num_classes

    # 1. reduce: m, the sum of exponentials over the classes other than the target, x_y.
    scale = scale / options.temperature  # the gradient is that of x, and not of x / T
    x, m, _ = _shifted(_mute(logits, row_weight), options.temperature)
    e = np.exp(x)
    x_y, e_y = np.take_along_axis(x, y, 1), np.take_along_axis(e, y, 1)
    others = _sum_others(e, y)
    total = others + e_y

    # 2. the scalar step: the loss and the coefficients of the gradient.
    with np.errstate(all="ignore"):
        log_s = np.log1p(others + (e_y - 1))
        lse = m + log_s
        b = (1 - label_smoothing) * w_y
        spread = u * w.sum()
        z_slope = 2 * z_loss * lse if z_loss else 0.0
        loss = _times(b, log_s - x_y) + z_slope * lse / 2
        if u:
            loss = loss + spread * log_s + u * _sum(_times(w, -x))
        a = b + spread + z_slope
        if options.gamma or options.epsilon:
            phi, slope = _of_probability(e_y / total, others / total, log_s - x_y, options)
            loss, a, b = w_y * phi, w_y * slope, w_y * slope

        # 3. write: a p_c - u w_c, and at the target the same minus b.
        if grad is not None:
            g = a * (e / total) - u * w
            g_y = _left_out(a, e_y / total, others / total, b + u * w_y, spread + z_slope - u * w_y)
            np.put_along_axis(g, y, g_y, 1)
            _round_to(grad, np.where(row_weight * scale == 0, 0.0, g * (row_weight * scale)))
    return _deliver(loss, row_weight, losses, logits)


def _of_probability(p, q, minus_log_p, options):
    """phi(log p) and -phi'(log p) of the target's probability p = 1 - q."""
    gamma, epsilon = options.gamma, options.epsilon
    if not gamma:
        return minus_log_p + epsilon * q, 1 + epsilon * p
    ratio = np.where(q == 0, 1.0, minus_log_p / q)  # which tends to 1
    return q**gamma * minus_log_p, q**gamma * (1 + gamma * _times(p, ratio))


def _cross_entropy_soft(logits, labels, options, scale, losses, grad):
    target, weight, sample_weight = labels
    label_smoothing, z_loss = options.label_smoothing, options.z_loss
    num_classes = logits.shape[1]
    row_weight = _row_weight(np.ones((logits.shape[0], logits.shape[2]), bool), sample_weight)
    w = np.ones(num_classes) if weight is None else weight
    t = (1 - label_smoothing) * _float64(target) + label_smoothing / num_classes
    wt = w[None, :, None] * t
    a = _sum(wt)

    scale = scale / options.temperature
    x, m, k = _shifted(_mute(logits, row_weight), options.temperature)
    e = np.exp(x)
    others = _sum_others(e, k)
    with np.errstate(all="ignore"):
        log_s = np.log1p(others)
        lse = m + log_s
        z_slope = 2 * z_loss * lse if z_loss else 0.0
        loss = a * log_s + _sum(_times(wt, -x)) + z_slope * lse / 2
        if grad is not None:
            g = (a + z_slope) * (e / (1 + others)) - wt
            p_k, wt_k = 1 / (1 + others), np.take_along_axis(wt, k, 1)
            rest = _sum_others(wt, k) + z_slope
            np.put_along_axis(g, k, _left_out(a + z_slope, p_k, others * p_k, wt_k, rest), 1)
            _round_to(grad, np.where(row_weight * scale == 0, 0.0, g * (row_weight * scale)))
    return _deliver(loss, row_weight, losses, logits)


def nll_loss(log_probs, labels, options, scale, losses, grad, num_threads):
    target, weight, sample_weight = labels
    used = target != options.ignore_index
    y = np.where(used, target, 0).astype(np.intp)[:, None, :]
    row_weight = _row_weight(used, sample_weight)
    if weight is not None:
        row_weight *= weight[y]
    with np.errstate(all="ignore"):
        loss = -_float64(np.take_along_axis(log_probs, y, 1))
    if grad is not None:
        grad[...] = 0
        g_y = 0.0 - scale * row_weight  # never -0
        np.put_along_axis(grad, y, g_y.astype(FLOAT32 if grad.itemsize == 2 else grad.dtype), 1)
    return _deliver(loss, row_weight, losses, log_probs)


def entropy(logits, labels, options, scale, losses, grad, num_threads):
    row_weight = _row_weight(
        np.ones((logits.shape[0], logits.shape[2]), bool), labels.sample_weight
    )
    scale = scale / options.temperature
    x, _, k = _shifted(_mute(logits, row_weight), options.temperature)
    with np.errstate(all="ignore"):
        e = np.exp(x)
        others = _sum_others(e, k)
        p = e / (1 + others)
        mean = _sum(_times(p, -x))
        if grad is not None:
            g = _times(p, -x - mean)
            _round_to(grad, np.where(row_weight * scale == 0, 0.0, g * (row_weight * scale)))
        return _deliver(np.log1p(others) + mean, row_weight, losses, logits)


def binary_cross_entropy_with_logits(logits, labels, options, scale, losses, grad, num_threads):
    x, t, positive, negative = _binary(logits, labels, options)
    with np.errstate(all="ignore"):
        above, below, up, down = _softplus(x)
        yes, no = positive * t, negative * (1 - t)
        loss = _times(yes, below) + _times(no, above)
        if grad is not None:
            _deliver_binary_grad(grad, _times(no, up) - _times(yes, down), scale)
    return _deliver_binary(loss, losses, logits)


def sigmoid_focal_loss(logits, labels, options, scale, losses, grad, num_threads):
    x, t, positive, negative = _binary(logits, labels, options)
    gamma = options.gamma
    with np.errstate(all="ignore"):
        above, below, up, down = _softplus(x)
        q = t * down + (1 - t) * up  # 1 - p, p the probability that the target has
        weight = _times(t, positive) + _times(1 - t, negative)
        loss = _times(t, below) + _times(1 - t, above)
        if grad is not None:
            ratio = np.where(q > 0, up * down / q, 0.0)
            slope = (1 - t) * up - t * down + _times(gamma * (1 - 2 * t) * ratio, loss)
            _deliver_binary_grad(grad, _times(weight, q**gamma * slope), scale)
        loss = _times(_times(weight, q**gamma), loss)
    return _deliver_binary(loss, losses, logits)


def _binary(logits, labels, options):
    """Scores, smoothed targets, and the weights of targets of 1 and of 0."""
    target, weight, sample_weight = labels
    t = (1 - options.label_smoothing) * _float64(target) + options.label_smoothing / 2
    positive, negative = (np.ones(1), np.ones(1)) if weight is None else weight
    s = np.ones((1, 1, 1)) if sample_weight is None else sample_weight[:, None, :]
    return _float64(logits), t, s * positive[:, None], s * negative[:, None]


def _softplus(x):
    """Softplus and sigmoid of x, and of -x: above, below; up, down."""
    e = np.exp(-np.abs(x))
    log, large, small = np.log1p(e), 1 / (1 + e), e / (1 + e)
    up, down = np.where(x > 0, large, small), np.where(x > 0, small, large)
    return log + np.where(x > 0, x, 0), log + np.where(x > 0, 0, -x), up, down


def _deliver_binary_grad(grad, g, scale):
    _round_to(grad, np.zeros(grad.shape) if scale == 0 else g * scale)


def _deliver_binary(loss, losses, logits):
    """As _deliver, of every element."""
    with np.errstate(all="ignore"):
        loss = loss.astype(COMPUTE_DTYPE.get(logits.dtype.name, FLOAT32))
        total = float(loss.sum(dtype=np.float64))
    if losses is not None:
        losses[...] = loss
    return total


def most_threads():
    return 1


def warmup():
    """Nothing to compile."""


def describe():
    return {}


def _shifted(logits, temperature=1.0):
    """x - m, the maximum m and its index, per row; x - m is NaN without a finite maximum.

    x and m are divided by the temperature.
    """
    x = _float64(logits)
    k = np.where(np.isnan(x), np.inf, x).argmax(axis=1, keepdims=True)
    m = np.take_along_axis(x, k, 1)
    with np.errstate(all="ignore"):
        return (x - m) / temperature, m / temperature, k


def _sum_others(e, index):
    """The sum along the classes without the entry at `index`, which would swamp the others."""
    rest = e.copy()
    np.put_along_axis(rest, index, 0.0, 1)
    # NaN belongs to the whole row, even where the entry left out is the only one to hold it.
    return _sum(rest) + 0.0 * np.take_along_axis(e, index, 1)


def _left_out(a, p, others, subtracted, rest):
    """a p - subtracted, or the same as rest - a (1 - p): the second unless it cancels more."""
    size = np.maximum(np.abs(a * p), np.abs(subtracted))
    cancels = 2 * size < np.maximum(np.abs(a * others), np.abs(rest))
    return np.where(cancels, a * p - subtracted, rest - a * others)


def _sum(values):
    """The sum over the classes, in extended precision where the platform has it."""
    return values.sum(axis=1, keepdims=True, dtype=np.longdouble).astype(np.float64)


def _row_weight(used, sample_weight):
    weight = used.astype(np.float64) if sample_weight is None else np.where(used, sample_weight, 0)
    return weight[:, None, :]


def _mute(logits, row_weight):
    """Rows of weight 0 count for nothing, whatever they hold."""
    return np.where(row_weight == 0, 0.0, _float64(logits))


def _times(weight, value):
    """weight * value, where 0 * inf counts as 0: a class without weight has no say."""
    return np.where(weight == 0, 0.0, weight * value)


def _deliver(loss, row_weight, losses, logits):
    """Round the row losses to the compute dtype, hand them out, and sum what was handed out."""
    with np.errstate(all="ignore"):
        loss = np.where(row_weight == 0, 0.0, loss * row_weight)[:, 0, :]
        loss = loss.astype(COMPUTE_DTYPE.get(logits.dtype.name, FLOAT32))
        total = float(loss.sum(dtype=np.float64))
    if losses is not None:
        losses[...] = loss
    return total


def _float64(array):
    return array.astype(np.float64)


def _round_to(out, value):
    """Half types are rounded by way of float32, as the kernels do."""
    with np.errstate(all="ignore"):
        out[...] = value.astype(FLOAT32) if out.itemsize == 2 else value
