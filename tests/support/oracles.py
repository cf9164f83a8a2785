"""What the right answers are, worked out without the package.

Two independent ways. The functions on arrays use longdouble, whose 64 bits of mantissa leave
room below float64; the ones on a single row use mpmath and the textbook formulas, in so many
digits that no cancellation matters. Both take class indices and probabilities alike: an index
is a one-hot distribution, and smoothing replaces a distribution t by (1 - e) t + e / C.

Each array function returns `Bounded` values: next to what is right, the allowance, that is, the
number by which the unit of the promise (1e-6 for float32, 1e-14 for float64) is multiplied.
"""

from typing import NamedTuple

import mpmath
import numpy as np

LONG = np.longdouble
assert np.finfo(LONG).eps < 1e-18, "the oracles need a longdouble that is wider than a double"


class Bounded(NamedTuple):
    """A right answer, and what its error is measured by."""

    value: np.ndarray
    allowance: np.ndarray


# ---------------------------------------------------------------------------------------------
# Arrays of rows, (N, C), in longdouble
# ---------------------------------------------------------------------------------------------


class Rows:
    """What everything is made of: distances from the maximum, log-probabilities, probabilities."""

    def __init__(self, logits):
        x = logits.astype(LONG)
        rows = np.arange(len(x))
        top = x.argmax(axis=1)
        self.maximum = x[rows, top]
        with np.errstate(under="ignore"):
            e = np.exp(x - self.maximum[:, None])
        e_others = e.copy()
        e_others[rows, top] = 0
        others = e_others.sum(axis=1)
        self.distance = self.maximum[:, None] - x
        below = self.distance.copy()
        below[rows, top] = np.inf
        # How far the second largest is: what a loss of nearly 0 is made of.
        self.second = below.min(axis=1) if x.shape[1] > 1 else np.zeros(len(x), LONG)
        self.log_sum = np.log1p(others)
        self.minus_log_p = self.distance + self.log_sum[:, None]
        self.p = e / (1 + others)[:, None]
        self.one_minus_p = 1 - self.p
        self.one_minus_p[rows, top] = others / (1 + others)

    @property
    def lse(self):
        return self.maximum + self.log_sum

    @property
    def slack(self):
        """The promise for -log p: relative to it, 1 + |m - x_c| / 10 + |m - x_2| / 10."""
        return 1 + self.distance / 10 + self.second[:, None] / 10


def softmax(logits):
    rows = Rows(logits)
    return (Bounded(rows.p, rows.p * (1 + rows.distance / 10)),)


def log_softmax(logits):
    rows = Rows(logits)
    return (Bounded(-rows.minus_log_p, rows.minus_log_p * rows.slack),)


def logsumexp(logits):
    rows = Rows(logits)
    # The sum of a maximum and a logarithm: the errors of both, however they cancel.
    allowance = np.abs(rows.lse) + rows.log_sum * (1 + rows.second / 10)
    return (Bounded(rows.lse, allowance),)


def softmax_backward(grad_output, probs):
    g, p = grad_output.astype(LONG), probs.astype(LONG)
    dot = (g * p).sum(axis=1, keepdims=True)
    size = np.abs(g) + np.abs(g * p).sum(axis=1, keepdims=True)
    return (Bounded(p * (g - dot), np.abs(p) * size),)


def log_softmax_backward(grad_output, log_probs):
    g, p = grad_output.astype(LONG), np.exp(log_probs.astype(LONG))
    size = np.abs(g) + p * np.abs(g).sum(axis=1, keepdims=True)
    return (Bounded(g - p * g.sum(axis=1, keepdims=True), size),)


def cross_entropy(logits, target, **options):
    return cross_entropy_with_grad(logits, target, **options)[:1]


def cross_entropy_with_grad(
    logits, target, *, weight=None, sample_weight=None, ignore_index=-100, label_smoothing=0.0,
    z_loss=0.0, temperature=1.0, reduction="mean", normalizer=None,
):  # fmt: skip
    logits, heat = logits.astype(LONG) / LONG(temperature), LONG(temperature)
    num_classes = logits.shape[1]
    s, t, divisor = shares(target, num_classes, weight, sample_weight, ignore_index)
    t = (1 - LONG(label_smoothing)) * t + LONG(label_smoothing) / num_classes
    wt = t if weight is None else t * weight.astype(LONG)
    rows = Rows(np.where(s[:, None] == 0, 0, logits))

    terms = wt * rows.minus_log_p
    lse, z = rows.lse, LONG(z_loss)
    lse_error = np.abs(rows.maximum) + rows.log_sum * (1 + rows.second / 10)
    loss = s * (terms.sum(axis=1) + z * lse**2)
    size = np.abs(s)
    allowance = size * ((abs(terms) * rows.slack).sum(axis=1) + 2 * z * np.abs(lse) * lse_error)

    # A p_c - wt_c, with A = sum(wt) + 2 z lse, put so that nothing cancels where p_c is near 1.
    others, slope = wt.sum(axis=1, keepdims=True) - wt, (2 * z * lse)[:, None]
    grad = others * rows.p - wt * rows.one_minus_p + slope * rows.p
    # Held against the largest entry, with the rounding of x - m that its probability carries.
    share = np.abs(wt)
    others = share.sum(axis=1, keepdims=True) - share
    slack = 1 + rows.distance / 10
    complement_slack = np.where(rows.distance == 0, 1 + rows.second[:, None] / 10, 1)
    entry = (others + np.abs(slope)) * rows.p * slack + share * rows.one_minus_p * complement_slack
    entry = 2 * entry.max(axis=1, initial=0)
    if label_smoothing or z_loss or target.dtype.kind not in "iu":
        # A p_c and wt_c may cancel where p is near t, which then leaves their rounding.
        entry = entry + (share * rows.p).max(axis=1, initial=0) / 8
    grad_allowance = np.broadcast_to(size[:, None] * entry[:, None], grad.shape)
    return _reduce(
        loss, allowance, s[:, None] * grad / heat, grad_allowance / heat, divisor, reduction,
        normalizer,
    )  # fmt: skip


def focal_loss(logits, target, **options):
    return focal_loss_with_grad(logits, target, **options)[:1]


def focal_loss_with_grad(logits, target, *, gamma=2.0, **options):
    def phi(p, q, minus_log_p):
        power = q ** LONG(gamma)
        ratio = np.where(q == 0, 1, minus_log_p / np.where(q == 0, 1, q))
        return power * minus_log_p, power * (1 + gamma * p * ratio), 1 + gamma

    return _of_probability(phi, logits, target, **options)


def poly_loss(logits, target, **options):
    return poly_loss_with_grad(logits, target, **options)[:1]


def poly_loss_with_grad(logits, target, *, epsilon=2.0, **options):
    def phi(p, q, minus_log_p):
        loss, slope = minus_log_p + epsilon * q, 1 + epsilon * p
        size = minus_log_p + abs(epsilon) * q, 1 + abs(epsilon) * p
        # The two terms may cancel.
        return loss, slope, np.maximum(size[0] / _not_zero(loss), size[1] / _not_zero(slope))

    return _of_probability(phi, logits, target, **options)


def _not_zero(values):
    return np.where(values == 0, np.finfo(float).tiny, np.abs(values))


def _of_probability(
    phi, logits, target, *, weight=None, sample_weight=None, ignore_index=-100, reduction="mean",
    normalizer=None,
):  # fmt: skip
    """A loss of the target's p, q = 1 - p and -log p: phi, its slope, and how ill-conditioned."""
    s, t, divisor = shares(target, logits.shape[1], weight, sample_weight, ignore_index)
    s = s * (t if weight is None else t * weight.astype(LONG)).sum(axis=1)
    rows, everyone, y = Rows(np.where(s[:, None] == 0, 0, logits)), np.arange(len(t)), t.argmax(1)
    p, q = rows.p[everyone, y], rows.one_minus_p[everyone, y]
    loss, slope, condition = phi(p, q, rows.minus_log_p[everyone, y])
    slack = rows.slack[everyone, y] * condition
    grad = (s * slope)[:, None] * np.where(t == 1, -rows.one_minus_p, rows.p)
    largest = (rows.p * (1 + rows.distance / 10) * (t == 0)).max(axis=1, initial=0) + q
    allowance = np.broadcast_to((np.abs(s * slope) * largest * slack)[:, None], grad.shape)
    return _reduce(
        s * loss, np.abs(s * loss) * slack, grad, 2 * allowance, divisor, reduction, normalizer
    )


def nll_loss(log_probs, target, **options):
    return nll_loss_with_grad(log_probs, target, **options)[:1]


def nll_loss_with_grad(
    log_probs, target, *, weight=None, sample_weight=None, ignore_index=-100, reduction="mean",
    normalizer=None,
):  # fmt: skip
    s, t, divisor = shares(target, log_probs.shape[1], weight, sample_weight, ignore_index)
    wt = s[:, None] * (t if weight is None else t * weight.astype(LONG))
    loss = -np.where(wt == 0, 0, wt * log_probs.astype(LONG)).sum(axis=1)
    return _reduce(loss, np.abs(loss), -wt, np.abs(wt), divisor, reduction, normalizer)


def entropy(logits, **options):
    return entropy_with_grad(logits, **options)[:1]


def entropy_with_grad(
    logits, *, temperature=1.0, sample_weight=None, reduction="none", normalizer=None
):
    s = np.ones(len(logits), LONG) if sample_weight is None else sample_weight.astype(LONG)
    heat = LONG(temperature)
    rows = Rows(np.where(s[:, None] == 0, 0, logits.astype(LONG)) / heat)
    far = rows.p * rows.distance
    mean = far.sum(axis=1)
    slack = 1 + rows.distance / 10 + rows.second[:, None] / 10
    allowance = (far * slack).sum(axis=1) + rows.log_sum * (1 + rows.second / 10)
    grad = rows.p * (rows.distance - mean[:, None]) / heat
    size = (rows.p * (rows.distance + mean[:, None]) * slack / heat).max(axis=1, initial=0)
    grad_allowance = 2 * np.broadcast_to((np.abs(s) * size)[:, None], grad.shape)
    return _reduce(
        s * (rows.log_sum + mean), np.abs(s) * allowance, s[:, None] * grad, grad_allowance,
        s.sum(), reduction, normalizer,
    )  # fmt: skip


class Elements:
    """What binary losses are made of: softplus and sigmoid of every score, and of minus it."""

    def __init__(self, logits, target, label_smoothing=0.0):
        x, e = logits.astype(LONG), LONG(label_smoothing)
        self.t = (1 - e) * target.astype(LONG) + e / 2
        with np.errstate(under="ignore"):
            small = np.exp(-abs(x))
            log = np.log1p(small)
        self.above, self.below = log + np.maximum(x, 0), log + np.maximum(-x, 0)
        small /= 1 + small
        self.up, self.down = np.where(x > 0, 1 - small, small), np.where(x > 0, small, 1 - small)
        self.slack = 1 + abs(x) / 10

    def reduce(self, yes, no, factor, slope, weight, sample_weight, options):
        """A loss with the slopes yes and no of its two parts, times a factor; and its gradient."""
        weight = LONG(1) if weight is None else weight.astype(LONG)
        s = np.ones(len(self.t), LONG) if sample_weight is None else sample_weight.astype(LONG)
        w = s[:, None] * weight * factor
        loss = w * (yes * self.below + no * self.above)
        size = abs(w) * (abs(yes) * self.below + abs(no) * self.above)
        grad = w * (no * self.up - yes * self.down) + s[:, None] * weight * slope
        grad_size = abs(w) * (abs(no) * self.up + abs(yes) * self.down)
        grad_size = grad_size + abs(s[:, None] * weight * slope)
        divisor = s.sum() * self.t.shape[1]
        return _reduce(
            loss, size * self.slack, grad, 2 * grad_size * self.slack, divisor,
            options.get("reduction", "mean"), options.get("normalizer"),
        )  # fmt: skip


def binary_cross_entropy_with_logits(logits, target, **options):
    return binary_cross_entropy_with_logits_with_grad(logits, target, **options)[:1]


def binary_cross_entropy_with_logits_with_grad(
    logits, target, *, pos_weight=None, weight=None, sample_weight=None, label_smoothing=0.0,
    **options,
):  # fmt: skip
    of = Elements(logits, target, label_smoothing)
    yes = of.t if pos_weight is None else of.t * pos_weight.astype(LONG)
    return of.reduce(yes, 1 - of.t, LONG(1), LONG(0), weight, sample_weight, options)


def sigmoid_focal_loss(logits, target, **options):
    return sigmoid_focal_loss_with_grad(logits, target, **options)[:1]


def sigmoid_focal_loss_with_grad(
    logits, target, *, alpha=None, gamma=2.0, weight=None, sample_weight=None, **options
):
    of = Elements(logits, target)
    yes, no = of.t, 1 - of.t
    q = yes * of.down + no * of.up
    balance = LONG(1) if alpha is None else yes * LONG(alpha) + no * (1 - LONG(alpha))
    with np.errstate(under="ignore"):
        factor = balance * q ** LONG(gamma)
        plain = yes * of.below + no * of.above
        slope = factor * gamma * (no - yes) * of.up * of.down / np.where(q == 0, 1, q) * plain
    of.slack = of.slack * (1 + gamma)
    return of.reduce(yes, no, factor, slope, weight, sample_weight, options)


def shares(target, num_classes, weight, sample_weight, ignore_index):
    """The weight of each row, its distribution over classes, and the divisor of the mean."""
    s = np.ones(len(target), LONG) if sample_weight is None else sample_weight.astype(LONG)
    if target.dtype.kind not in "iu":
        return s, target.astype(LONG), s.sum()
    used = target != ignore_index
    y = np.where(used, target, 0).astype(int)
    s = np.where(used, s, 0)
    w_y = LONG(1) if weight is None else weight.astype(LONG)[y]
    t = np.zeros((len(y), num_classes), LONG)
    t[np.arange(len(y)), y] = 1
    return s, t, (s * w_y).sum()


def _reduce(loss, allowance, grad, grad_allowance, divisor, reduction, normalizer):
    if reduction == "mean":
        divisor = divisor if normalizer is None else LONG(normalizer)
        if not divisor:
            return Bounded(LONG(np.nan), LONG(0)), Bounded(0 * grad, 0 * grad)
        grad, grad_allowance = grad / divisor, grad_allowance / abs(divisor)
        loss, allowance = loss.sum() / divisor, allowance.sum() / abs(divisor)
    elif reduction == "sum":
        loss, allowance = loss.sum(), allowance.sum()
    return Bounded(loss, allowance), Bounded(grad, grad_allowance)


# ---------------------------------------------------------------------------------------------
# One row, in mpmath
# ---------------------------------------------------------------------------------------------

_PRECISION = 3000  # bits: enough to see exp(-1800) next to 1


def exact_softmax(row):
    with mpmath.workprec(_PRECISION):
        e = [mpmath.exp(mpmath.mpf(float(x))) for x in row]
        total = mpmath.fsum(e)
        return [x / total for x in e]


def exact_log_softmax(row):
    with mpmath.workprec(_PRECISION):
        lse = exact_logsumexp(row)
        return [mpmath.mpf(float(x)) - lse for x in row]


def exact_logsumexp(row):
    with mpmath.workprec(_PRECISION):
        return mpmath.log(mpmath.fsum(mpmath.exp(mpmath.mpf(float(x))) for x in row))


def exact_cross_entropy(row, y, smoothing, z_loss):
    """The loss -sum(t log p) + z lse**2 and its gradient (1 + 2 z lse) p - t, t the target."""
    with mpmath.workprec(_PRECISION):
        t = [mpmath.mpf(smoothing) / len(row) for _ in row]
        t[y] += 1 - mpmath.mpf(smoothing)
        z, lse = mpmath.mpf(z_loss), exact_logsumexp(row)
        p, log_p = exact_softmax(row), exact_log_softmax(row)
        loss = -mpmath.fsum(a * b for a, b in zip(t, log_p, strict=True)) + z * lse**2
        return loss, [(1 + 2 * z * lse) * a - b for a, b in zip(p, t, strict=True)]
