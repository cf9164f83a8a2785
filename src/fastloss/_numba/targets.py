"""Targets: read them and the weights of their rows, and check them."""

import numpy as np

from fastloss._numba.blocks import fold
from fastloss._numba.jit import inline
from fastloss._numba.losses import label_smoothing_of, z_loss_of
from fastloss._numba.machine import lanes, load_index
from fastloss._numba.types import CHECK_BLOCK, INDEX, LANES, ROW_WEIGHT, TARGET_WEIGHT


@inline
def read_indices(target, first, n, y):
    """Targets first to first + n as int64, whatever they are: one type of argument for all."""
    data, kind = target
    for i in range(n):
        y[i] = load_index(data, kind, first + i)


@inline
def read_targets(
    r, target, weight, sample_weight, first, n, num_classes, ignore_index, options, largest_weight
):
    """Targets, and the weights of their rows: 0 where a row counts for nothing."""
    smoothing = label_smoothing_of(options)
    smooth = z_loss_of(options) != 0.0 or (smoothing != 0.0 and largest_weight != 0.0)
    y = lanes(np.int64)
    read_indices(target, first, n, y)
    for i in range(n):
        # Targets were checked, but another thread may have changed them since.
        used = (y[i] != ignore_index) & (y[i] >= 0) & (y[i] < num_classes)
        r[INDEX + i] = y[i] if used else 0
        r[ROW_WEIGHT + i] = 1.0 if used else 0.0
        r[TARGET_WEIGHT + i] = 1.0
    if sample_weight.size:
        for i in range(n):
            r[ROW_WEIGHT + i] *= sample_weight[first + i]
    if weight.size:
        for i in range(n):
            r[TARGET_WEIGHT + i] = weight[int(r[INDEX + i])]
    if not smooth:
        for i in range(n):
            if (1.0 - smoothing) * r[TARGET_WEIGHT + i] == 0.0:
                r[ROW_WEIGHT + i] = 0.0


@inline
def read_sample_weights(r, sample_weight, first, n):
    for i in range(n):
        r[ROW_WEIGHT + i] = sample_weight[first + i] if sample_weight.size else 1.0


@inline
def check_block(target, weight, sample_weight, size, block, num_classes, ignore_index):
    """The sum of the weights of a block, and whether a target is out of range."""
    y, lane = lanes(np.int64), lanes(np.float64)
    weighted = weight.size > 0 or sample_weight.size > 0
    last = min((block + 1) * CHECK_BLOCK, size)
    used = bad = 0
    for i in range(LANES):
        lane[i] = 0.0
    for start in range(block * CHECK_BLOCK, last, LANES):
        n = min(LANES, last - start)
        read_indices(target, start, n, y)
        for i in range(n):
            counts = y[i] != ignore_index
            used += counts
            bad += counts & ((y[i] < 0) | (y[i] >= num_classes))
        if weighted:
            for i in range(n):
                if y[i] != ignore_index and 0 <= y[i] < num_classes:
                    row_weight = sample_weight[start + i] if sample_weight.size else 1.0
                    lane[i] += row_weight * (weight[y[i]] if weight.size else 1.0)
    return fold(lane) if weighted else np.float64(used), bad > 0
