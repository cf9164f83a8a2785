"""A temperature is what dividing the scores beforehand in float64 would be, whichever way."""

import numpy as np
import pytest

import fastloss as fl

# Short rows and long ones, classes last and not, a row that threads share.
SHAPES = [((200, 2), 1), ((200, 10), 1), ((70, 200), 1), ((40, 1000), 1), ((1, 140_000), 1),
          ((3, 21, 300), 1), ((2, 1030, 5), 1)]  # fmt: skip
TEMPERATURES = [1e-4, 0.01, 0.3, 1.0, 1.7, 25.0, 1e4]
OPTIONS = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1},
    "z_loss": {"z_loss": 1e-3},
    "all": {"label_smoothing": 0.7, "z_loss": 1e-3, "weight": True},
}


def scores_of(shape, temperature, seed):
    """Rows for which a temperature of 1 would be tame, and others far from 0."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape) * 3 * temperature
    x[..., 0] += 60 * temperature * (rng.random(x[..., 0].shape) < 0.3)
    x[:1] += 500 * temperature
    return x.astype(np.float32)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
def test_as_if_divided_beforehand(shape, axis, temperature, options, soft, backend):
    x = scores_of(shape, temperature, 1)
    rng = np.random.default_rng(2)
    rows = shape[:axis] + shape[axis + 1 :]
    target = rng.integers(0, shape[axis], rows)
    if soft:
        target = np.moveaxis(rng.dirichlet(np.ones(shape[axis]), rows), -1, axis)
        target = target.astype(np.float32)
    given = dict(OPTIONS[options])
    if "weight" in given:
        given["weight"] = rng.uniform(0.5, 2, shape[axis])
    given |= {"axis": axis, "reduction": "none"}
    divided = x.astype(np.float64) / temperature
    loss, grad = fl.cross_entropy_with_grad(
        x, target, temperature=temperature, backend=backend, num_threads=2, **given
    )
    right, right_grad = fl.cross_entropy_with_grad(divided, target, backend="numpy", **given)
    np.testing.assert_allclose(loss, right, rtol=1e-5, atol=1e-37)
    right_grad /= temperature
    largest = np.abs(right_grad).max(axis=axis, keepdims=True)
    size = largest + (options != "plain" or soft) / temperature
    assert (np.abs(grad - right_grad) <= 2e-6 * size + 1e-44).all()
    alone = fl.cross_entropy(
        x, target, temperature=temperature, backend=backend, num_threads=1, **given
    )
    np.testing.assert_array_equal(alone, loss)


def test_of_a_linear_layer(backend):
    rng = np.random.default_rng(3)
    inputs, weight, bias = rng.normal(size=(300, 8)), rng.normal(size=(11, 8)), rng.normal(size=11)
    target = rng.integers(0, 11, 300)
    loss, found = fl.linear_cross_entropy_with_grad(
        inputs, weight, target, linear_bias=bias, temperature=0.4, inputs_grad=True, backend=backend
    )
    right, expected = fl.linear_cross_entropy_with_grad(
        inputs, weight / 0.4, target, linear_bias=bias / 0.4, inputs_grad=True, backend="numpy"
    )
    assert loss == pytest.approx(right, rel=1e-13)
    np.testing.assert_allclose(found.linear_weight, expected.linear_weight / 0.4, rtol=1e-10)
    np.testing.assert_allclose(found.linear_bias, expected.linear_bias / 0.4, rtol=1e-10)
    np.testing.assert_allclose(found.inputs, expected.inputs, rtol=1e-10)


def test_extreme_scores(backend):
    x = np.array([[3e38, -3e38, 0.0], [-np.inf, 1.0, 0.0], [1e-40, 0.0, -1e-40]], np.float32)
    for temperature in (1e-4, 0.5, 1e4):
        loss, grad = fl.cross_entropy_with_grad(
            x, [0, 1, 2], temperature=temperature, reduction="none", backend=backend
        )
        right, right_grad = fl.cross_entropy_with_grad(
            x.astype(float) / temperature, [0, 1, 2], reduction="none", backend="numpy"
        )
        np.testing.assert_allclose(loss, right, rtol=1e-6)
        np.testing.assert_allclose(grad * np.float32(temperature), right_grad, rtol=1e-6, atol=1e-7)
