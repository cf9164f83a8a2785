"""Entropy at the edges: confident, masked and infinite scores, and rows that count for nothing."""

import math

import numpy as np
import pytest

import fastloss as fl

INF, NAN = np.inf, np.nan

# scores of float32, their entropy, its gradient
EDGES = {
    "even": ([1, 1, 1], math.log(3), [0, 0, 0]),
    "confident": ([20, 0, 0], 8.6568452e-08, [-8.2446144e-08, 4.1223073e-08, 4.1223073e-08]),
    "hardly anything left": ([100, 0, 0], 7.5144e-42, [-7.44e-42, 3.72e-42, 3.72e-42]),
    "far from 0": ([3000, 2995], 0.0401, [-0.0332, 0.0332]),
    "one class": ([5], 0, [0]),
    "a masked class": ([0, -INF, 0], math.log(2), [0, 0, 0]),
    "all but one masked": ([-INF, 3, -INF], 0, [0, 0, 0]),
    "far apart": ([3e38, -3e38], 0, [0, 0]),
    "nothing but masked": ([-INF, -INF], NAN, [NAN, NAN]),
    "infinite": ([0, INF], NAN, [NAN, NAN]),
    "NaN": ([0, NAN, 1], NAN, [NAN, NAN, NAN]),
}


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("long", [False, True], ids=["short", "long"])
def test_edge(edge, long, backend):
    """As it stands, and with many masked classes more."""
    row, right, slope = EDGES[edge]
    c = len(row)
    more = 400 if long else 0
    scores = np.full((5, c + more), -INF, np.float32)
    scores[:, 0] = 1
    scores[2] = -INF
    scores[2, :c] = row
    values, grad = fl.entropy_with_grad(scores, backend=backend)
    relative = 2e-2 if "anything" in edge else 1e-2 if "far from" in edge else 2e-6
    np.testing.assert_allclose(values[2], right, rtol=relative, atol=3e-45)
    np.testing.assert_allclose(grad[2, :c], slope, rtol=relative, atol=1e-7 if right else 0)
    assert np.isnan(grad[2, c:]).all() if math.isnan(right) else not grad[2, c:].any()
    np.testing.assert_array_equal(np.delete(values, 2), 0)
    assert not np.delete(grad, 2, 0).any()


@pytest.mark.parametrize("shape", [(6, 3), (6, 900), (2, 5, 3)])
def test_rows_without_weight(shape, backend):
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape)
    rows = shape[:1] + shape[2:]
    weight = np.where(rng.random(rows) < 0.5, 0.0, -2.0)
    masked = np.where(np.expand_dims(weight == 0, 1), NAN, x)
    values, grad = fl.entropy_with_grad(masked, 1, sample_weight=weight, backend=backend)
    plain, slope = fl.entropy_with_grad(x, 1, backend=backend)
    np.testing.assert_allclose(values, weight * plain, rtol=1e-14)
    np.testing.assert_allclose(grad, np.expand_dims(weight, 1) * slope, rtol=1e-13, atol=1e-17)
    assert not np.signbit(grad[np.broadcast_to(np.expand_dims(weight == 0, 1), shape)]).any()


def test_reductions(backend):
    x, s = np.arange(12.0).reshape(4, 3) % 5, np.array([1.0, 0, 2, 5])
    each, slope = fl.entropy_with_grad(x, backend=backend)
    assert fl.entropy(x, reduction="sum", backend=backend) == pytest.approx(each.sum())
    mean, grad = fl.entropy_with_grad(x, reduction="mean", backend=backend)
    assert mean == pytest.approx(each.mean())
    np.testing.assert_allclose(grad, slope / 4, rtol=1e-14)
    mean, grad = fl.entropy_with_grad(x, sample_weight=s, reduction="mean", backend=backend)
    assert mean == pytest.approx((s * each).sum() / 8)
    np.testing.assert_allclose(grad, s[:, None] * slope / 8, rtol=1e-14)
    assert math.isnan(fl.entropy(x[:0], reduction="mean", backend=backend))


def test_it_is_the_cross_entropy_with_itself(backend):
    rng = np.random.default_rng(1)
    for shape in ((50, 7), (20, 1000)):
        x = rng.normal(size=shape) * 3
        p = fl.softmax(x, backend=backend)
        expected = fl.cross_entropy(x, p, reduction="none", backend=backend)
        np.testing.assert_allclose(fl.entropy(x, backend=backend), expected, rtol=1e-13)
