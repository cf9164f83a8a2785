"""Gradients against central differences of the losses, in float64."""

import numpy as np
import pytest
from support.cases import CASES, IGNORED, Layout

import fastloss as fl

STEP = 1e-5
GRADIENTS = [case for case in CASES if case.is_loss and "logits" in case.returns]


def central_differences(function, x):
    """d function / d x, entry by entry."""
    slope = np.empty_like(x)
    for place in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[place] += STEP
        down[place] -= STEP
        slope[place] = (function(up) - function(down)) / (2 * STEP)
    return slope


@pytest.mark.parametrize("case", GRADIENTS, ids=lambda case: case.name)
@pytest.mark.parametrize("layout", [Layout(7, 4), Layout(1, 70), Layout(2, 4, 3)], ids=str)
def test_gradient_of_a_loss(case, layout, backend):
    scores, *others = case.problem(layout.n, layout.num_classes, np.float64)
    target = others.pop(0) if "target" in case.operation.inputs else None
    if layout.n == 1 and target is not None:
        target = np.abs(target) if target.dtype.kind == "f" else np.zeros_like(target)
    given = case.keywords(case.problem(1, layout.num_classes, np.float64))
    if layout.n == 1 and "sample_weight" in given:
        others[-1] = np.ones(1)
    scores = np.where(np.abs(scores) > 50, 0.5, scores)  # where differences can see something
    others = others if target is None else (target, *others)
    total = lambda x: np.sum(case.call(layout, (x, *others), backend=backend)[0])  # noqa: E731
    _, grad = case.call(layout, (scores, *others), backend=backend)
    assert np.abs(grad).max() > 0.001
    np.testing.assert_allclose(grad, central_differences(total, scores), rtol=1e-6, atol=1e-8)
    if target is not None and IGNORED in target:
        assert not grad[target == IGNORED].any()


@pytest.mark.parametrize(
    ("forward", "backward"),
    [(fl.softmax, fl.softmax_backward), (fl.log_softmax, fl.log_softmax_backward)],
    ids=["softmax", "log_softmax"],
)
@pytest.mark.parametrize(("shape", "axis"), [((5, 4), -1), ((1, 70), 1), ((2, 4, 3), 1)])
def test_vector_jacobian_product(forward, backward, shape, axis, backend):
    rng = np.random.default_rng(2)
    x, g = rng.normal(size=shape) * 2, rng.normal(size=shape)
    product = backward(g, forward(x, axis, backend=backend), axis, backend=backend)
    slope = central_differences(lambda x: np.sum(g * forward(x, axis, backend=backend)), x)
    np.testing.assert_allclose(product, slope, rtol=1e-6, atol=1e-8)


def test_the_two_ways_to_a_gradient(backend):
    """Backward through nll_loss and log_softmax is what cross_entropy_with_grad says at once."""
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(40, 90)), rng.integers(0, 90, 40)
    log_p = fl.log_softmax(x, backend=backend)
    loss, grad = fl.nll_loss_with_grad(log_p, y, backend=backend)
    grad = fl.log_softmax_backward(grad, log_p, backend=backend)
    at_once = fl.cross_entropy_with_grad(x, y, backend=backend)
    assert loss == pytest.approx(at_once[0], rel=1e-14)
    np.testing.assert_allclose(grad, at_once[1], rtol=0, atol=1e-15)
