"""Binary losses at the edges: confident, infinite and masked elements, targets of every type."""

import math

import numpy as np
import pytest
from support.cases import BFLOAT16, FLOATS, HALVES, INTEGERS

import fastloss as fl

BCE = fl.binary_cross_entropy_with_logits_with_grad
FOCAL = fl.sigmoid_focal_loss_with_grad
INF, NAN = np.inf, np.nan

# a score of float32, its target, the loss, its slope; then the same of focal loss with gamma = 1
EDGES = {
    "sure and right": (20, 1, 2.0611537e-9, -2.0611537e-9, 4.2483544e-18, -8.4967087e-18),
    "sure that it is not": (-20, 0, 2.0611537e-9, 2.0611537e-9, 4.2483544e-18, 8.4967087e-18),
    "a subnormal loss": (-100, 0, 3.783506e-44, 3.783506e-44, 0, 0),
    "undecided": (0, 1, math.log(2), -0.5, math.log(2) / 2, -0.25 - math.log(2) / 4),
    "sure and wrong": (-100, 1, 100, -1, 100, -1),
    "far away": (3e38, 0, 3e38, 1, 3e38, 1),
    "infinite and right": (INF, 1, 0, 0, 0, 0),
    "infinite and wrong": (INF, 0, INF, 1, INF, 1),
    "minus infinity, right": (-INF, 0, 0, 0, 0, 0),
    "minus infinity, wrong": (-INF, 1, INF, -1, INF, -1),
    "NaN": (NAN, 0, NAN, NAN, NAN, NAN),
    "a target of NaN": (1, NAN, NAN, NAN, NAN, NAN),
}


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("n", [1, 70, 5000])
def test_edge(edge, n, backend):
    """Alone and among others, whose results it does not touch."""
    x, t, *expected = EDGES[edge]
    scores, target = np.ones((n, 1), np.float32), np.ones((n, 1), np.float32)
    scores[n // 2], target[n // 2] = x, t
    results = BCE(scores, target, reduction="none", backend=backend)
    results += FOCAL(scores, target, gamma=1.0, reduction="none", backend=backend)
    for result, right in zip(results, expected, strict=True):
        np.testing.assert_allclose(result[n // 2], np.float32(right), rtol=1e-6, atol=1.5e-45)
        others = np.delete(result, n // 2)
        assert np.unique(others).size == min(len(others), 1)
        assert np.isfinite(others).all()


@pytest.mark.parametrize("function", [BCE, FOCAL])
@pytest.mark.parametrize("shape", [(300, 3), (4, 3, 90), (700, 1)])
@pytest.mark.parametrize("weights", ["weight", "sample_weight", "both"])
def test_what_has_no_weight_counts_for_nothing(function, shape, weights, backend):
    rng = np.random.default_rng(0)
    axis = 1
    x = rng.normal(size=shape).astype(np.float32)
    rows = shape[:1] + shape[2:]
    dead = np.zeros(shape, bool)
    options = {}
    if weights != "sample_weight":
        options["weight"] = np.where(np.arange(shape[1]) == 0, 0.0, 2.0)
        dead[:, 0] = True
    if weights != "weight":
        options["sample_weight"] = np.where(rng.random(rows) < 0.3, 0.0, -1.5)
        dead |= np.expand_dims(options["sample_weight"] == 0, axis)
    target = rng.random(shape) < 0.5
    masked = np.where(dead, NAN, x)
    loss, grad = function(masked, target, axis=axis, reduction="none", backend=backend, **options)
    same = function(x, target, axis=axis, reduction="none", backend=backend, **options)
    assert not loss[dead].any()
    assert not np.signbit(loss[dead]).any()
    assert not grad[dead].any()
    np.testing.assert_array_equal(loss, same[0])
    np.testing.assert_array_equal(grad, same[1])


@pytest.mark.parametrize("function", [BCE, FOCAL])
@pytest.mark.parametrize("dtype", FLOATS + HALVES, ids=str)
def test_targets_of_every_type(function, dtype, backend):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(41, 29)).astype(dtype)
    target = rng.random(x.shape) < 0.4
    expected = function(x, target, reduction="none", backend=backend)
    for kind in [*INTEGERS, *FLOATS, *HALVES, np.dtype(np.longdouble), np.dtype(">i4")]:
        results = function(x, target.astype(kind), reduction="none", backend=backend)
        for result, right in zip(results, expected, strict=True):
            np.testing.assert_array_equal(result, right)


def test_the_mean_is_that_of_elements(backend):
    x, t = np.linspace(-2, 2, 12).reshape(3, 4), np.eye(3, 4)
    w, s = np.array([1.0, 2, 3, 4]), np.array([1.0, 0, 3])
    losses = fl.binary_cross_entropy_with_logits(x, t, reduction="none", backend=backend)
    mean = fl.binary_cross_entropy_with_logits(x, t, backend=backend)
    assert mean == pytest.approx(losses.mean())
    mean = fl.binary_cross_entropy_with_logits(x, t, weight=w, sample_weight=s, backend=backend)
    assert mean == pytest.approx((losses * w * s[:, None]).sum() / (4 * s.sum()))


def test_weights_that_cancel_hide_no_nan(backend):
    """They do where a target is undecided and pos_weight is -1."""
    x, t = np.array([[NAN, 1.0, -2.0]]), np.full((1, 3), 0.5)
    loss, grad = BCE(x, t, pos_weight=-1.0, reduction="none", backend=backend)
    assert np.isnan([loss[0, 0], grad[0, 0]]).all()
    np.testing.assert_allclose(loss[0, 1:], [0.5, -1.0])  # x / 2
    np.testing.assert_allclose(grad[0, 1:], [0.5, 0.5])


@pytest.mark.parametrize("n", [3, 1500])
def test_a_sum_beyond_the_range_of_its_terms(n, backend):
    x, t = np.full(n, 3e38, np.float32), np.zeros(n, bool)
    for reduction, right in (("mean", 3e38), ("sum", 3e38 * n)):
        loss, _ = BCE(x, t, reduction=reduction, backend=backend)
        assert loss == pytest.approx(right, rel=1e-6)


@pytest.mark.parametrize("function", [BCE, FOCAL])
def test_nothing_to_count(function, backend):
    empty = np.zeros((0, 3), np.float32)
    loss, grad = function(empty, empty, backend=backend)
    assert math.isnan(loss)
    assert grad.shape == (0, 3)
    assert function(empty, empty, reduction="sum", backend=backend)[0] == 0.0
    assert function(empty, empty, normalizer=2.0, backend=backend)[0] == 0.0
    x = np.full((2, 3), NAN)
    loss, grad = function(x, x, sample_weight=[0.0, 0.0], backend=backend)
    assert math.isnan(loss)
    assert not grad.any()


def test_a_weight_is_a_number_or_one_for_each_class(backend):
    x, t = np.linspace(-2, 2, 12).reshape(3, 4), np.eye(3, 4)
    for name in ("pos_weight", "weight"):
        one, many = ({name: 2.5}, {name: np.full(4, 2.5)})
        results = [BCE(x, t, reduction="none", backend=backend, **given) for given in (one, many)]
        np.testing.assert_array_equal(*(result[1] for result in results))
        plain, _ = BCE(x, t, reduction="none", backend=backend)
        assert results[0][0][0, 0] == pytest.approx(2.5 * plain[0, 0])


def test_focal_loss_without_focus_is_cross_entropy(backend):
    rng = np.random.default_rng(2)
    x, t = rng.normal(size=(2, 50, 7)) * 5
    t = rng.random(x.shape)
    results = FOCAL(x, t, gamma=0.0, reduction="none", backend=backend)
    for result, right in zip(results, BCE(x, t, reduction="none", backend=backend), strict=True):
        np.testing.assert_allclose(result, right, rtol=1e-14)


def test_in_place(backend):
    rng = np.random.default_rng(3)
    for dtype in (np.float32, np.float64, np.float16, BFLOAT16):
        x = rng.normal(size=(700, 9)).astype(dtype)
        loss, grad = BCE(x, x > 0, backend=backend)
        same, result = BCE(x, x > 0, out=x, backend=backend)
        assert result is x
        assert same == loss
        np.testing.assert_array_equal(x, grad)
