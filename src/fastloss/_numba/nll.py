"""The negative log-likelihood of log-probabilities: what is gathered, and scattered into zeros."""

import numpy as np

from fastloss._numba.arithmetic import times
from fastloss._numba.jit import inline
from fastloss._numba.memory import load_one, store
from fastloss._numba.types import INDEX, LOSS, ROW_WEIGHT, TARGET_WEIGHT


@inline
def nll_unit(log_probs, r, start, n, plan):
    for i in range(n):
        log_p = np.float64(load_one(log_probs, place_of(r, start, i, plan), plan.storage))
        r[LOSS + i] = times(r[ROW_WEIGHT + i], -log_p * r[TARGET_WEIGHT + i])


@inline
def nll_backward_unit(out, r, scratch, start, n, scale, plan):
    """The gradient at the targets, into `out` that holds zeros."""
    for i in range(n):
        # Subtracting from 0 makes +0 of a product that is 0.
        scratch[0] = 0.0 - scale * r[TARGET_WEIGHT + i] * r[ROW_WEIGHT + i]
        store(out, place_of(r, start, i, plan), scratch[:1], plan.storage, False)


@inline
def place_of(r, start, i, plan):
    """Where the target's entry of a row lies."""
    o, j = divmod(start + i, plan.inner)
    return (o * plan.num_classes + int(r[INDEX + i])) * plan.inner + j
