"""Numbers near the ends of their range: what overflows or is rounded away on the way must not be.

An upstream gradient or a weight scales every entry of a result. As long as the result can be
represented, it has its digits, however large the sum of the upstream gradients is and however
small the weights are.
"""

import numpy as np
import pytest
from support import oracles
from support.cases import FLOATS, Layout, assert_close, ulp

import fastloss as fl

LAYOUTS = [Layout(6, 5), Layout(6, 700), Layout(2, 5, 3), Layout(2, 700, 3)]
LONG = np.longdouble
UPSTREAM = {
    "positive": lambda rng, shape: rng.uniform(0.5, 1, shape),
    "of both signs": lambda rng, shape: rng.uniform(-1, 1, shape),
    "equal": lambda rng, shape: np.ones(shape),
}


@pytest.mark.parametrize("kind", UPSTREAM)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_upstream_gradients_as_large_as_can_be(dtype, layout, kind, backend):
    """Their sum overflows, and the result does not, or only where it must."""
    rng = np.random.default_rng(0)
    shape = (layout.n, layout.num_classes)
    largest = np.finfo(dtype).max
    log_probs = fl.log_softmax(rng.normal(size=shape).astype(dtype) * 3, backend="numpy")
    shares = UPSTREAM[kind](rng, shape)
    for name, forward in ("log_softmax", log_probs), ("softmax", np.exp(log_probs)):
        for size in (largest, largest / 4):
            g = (shares * LONG(size)).astype(dtype)
            (right,) = getattr(oracles, f"{name}_backward")(g, forward)
            backward = getattr(fl, f"{name}_backward")
            arrays = [layout.arrange(array) for array in (g, forward)]
            result = backward(*arrays, axis=layout.axis, backend=backend)
            assert_close_or_too_large(layout.rows(result, "logits"), right, dtype)


@pytest.mark.parametrize("layout", [*LAYOUTS, Layout(6, 200), Layout(2, 200, 3)], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_neither_the_sum_nor_an_exponential_is_in_range(dtype, layout, backend):
    """These are no log-probabilities, but that the product is too large is sure."""
    shape = (layout.n, layout.num_classes)
    g = np.full(shape, np.finfo(dtype).max, dtype)
    log_probs = 1e4 + np.random.default_rng(0).normal(size=shape).astype(dtype)
    arrays = [layout.arrange(array) for array in (g, log_probs)]
    result = fl.log_softmax_backward(*arrays, axis=layout.axis, backend=backend)
    assert (result == -np.inf).all()


def assert_close_or_too_large(result, right, dtype):
    """What the dtype cannot hold is infinite."""
    too_large = np.abs(right.value) > np.finfo(dtype).max
    assert (result[too_large] == np.sign(right.value[too_large]) * np.inf).all()
    right = oracles.Bounded(*(np.where(too_large, 0, part) for part in right))
    assert_close(np.where(too_large, dtype.type(0), result), right, dtype)


@pytest.mark.parametrize("layout", [Layout(1, 3), *LAYOUTS], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_log_probabilities_above_0(dtype, layout, backend):
    """There are none, but what is passed for one has its exponential all the same."""
    rng = np.random.default_rng(3)
    shape = (layout.n, layout.num_classes)
    for top in (1, 85, 100) if dtype == np.float32 else (1, 85, 700):
        log_probs = rng.normal(size=shape).astype(dtype)
        log_probs[:, 0] = top
        g = rng.uniform(-1, 1, shape).astype(dtype)
        g[:, 0] += 3
        (right,) = oracles.log_softmax_backward(g, log_probs)
        result = fl.log_softmax_backward(
            *map(layout.arrange, (g, log_probs)), axis=layout.axis, backend=backend
        )
        assert_close_or_too_large(layout.rows(result, "logits"), right, dtype)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_tiny_upstream_gradients_lose_no_digits(dtype, layout, backend):
    """Nor when on the way they are multiplied by what is smaller still."""
    rng = np.random.default_rng(5)
    shape = (layout.n, layout.num_classes)
    log_probs = fl.log_softmax(rng.normal(size=shape).astype(dtype), backend="numpy")
    g = rng.uniform(0.5, 1, shape).astype(dtype)
    tiny = dtype.type(2.0 ** (int(np.log2(np.finfo(dtype).smallest_normal)) + 16))
    for name, forward in ("log_softmax", log_probs), ("softmax", np.exp(log_probs)):
        backward = getattr(fl, f"{name}_backward")
        ordinary, small = (
            layout.rows(
                backward(
                    *map(layout.arrange, (upstream, forward)), axis=layout.axis, backend=backend
                ),
                "logits",
            ).astype(LONG)
            for upstream in (g, g * tiny)
        )
        error = np.abs(small - ordinary * LONG(tiny))
        assert (error <= 2 * ulp(np.abs(ordinary).max() * LONG(tiny), dtype)).all()


@pytest.mark.parametrize("target", ["indices", "probabilities"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("layout", [*LAYOUTS, Layout(3, 2100)], ids=str)
def test_distances_that_only_float64_holds(layout, smoothing, target, backend):
    """Of scores at both ends of the range, weighted by classes; the loss is within the range."""
    rng = np.random.default_rng(4)
    n, c = layout.n, layout.num_classes
    x = rng.normal(size=(n, c)).astype(np.float32)
    x[::2, ::2] = rng.choice([3e38, -3e38], x[::2, ::2].shape)
    x[0, -2:] = 3e38, -3e38
    y = np.argmax(x, axis=1)
    if target == "probabilities":
        y = rng.dirichlet(np.ones(c), n).astype(np.float32)
    losses, expected = (
        fl.cross_entropy(
            layout.arrange(x), layout.arrange(y), axis=layout.axis, label_smoothing=smoothing,
            weight=np.linspace(0.05, 0.3, c), reduction="none", backend=name,
        )
        for name in (backend, "numpy")
    )  # fmt: skip
    assert np.isfinite(expected).all()
    assert expected.max() > 1e36 or (y.ndim == 1 and not smoothing)
    np.testing.assert_allclose(losses, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layout", [*LAYOUTS, Layout(3, 2000)], ids=str)
def test_a_row_of_large_upstream_gradients_leaves_the_others_alone(layout, backend):
    rng = np.random.default_rng(1)
    shape = (layout.n, layout.num_classes)
    log_probs = fl.log_softmax(rng.normal(size=shape))
    g = rng.normal(size=shape)
    before, after = (
        layout.rows(
            fl.log_softmax_backward(
                *map(layout.arrange, (upstream, log_probs)), axis=layout.axis, backend=backend
            ),
            "logits",
        )
        for upstream in (g, np.where(np.arange(layout.n)[:, None] == 1, 1e308, g))
    )
    others = np.arange(layout.n) != 1
    assert before[others].tobytes() == after[others].tobytes()
    assert not np.isnan(after[1]).any()


@pytest.mark.parametrize("target", ["indices", "probabilities"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_tiny_weights_lose_no_digits(dtype, layout, smoothing, target, backend):
    """A gradient is the ordinary one, times the weight: rounded once more at the most."""
    rng = np.random.default_rng(2)
    n, c = layout.n, layout.num_classes
    x = rng.normal(size=(n, c)).astype(dtype) * 3
    y = rng.integers(0, c, n)
    if target == "probabilities":
        y = fl.softmax(x[::-1].copy())
    info = np.finfo(dtype)

    def gradient(**weights):
        _, grad = fl.cross_entropy_with_grad(
            layout.arrange(x), layout.arrange(y), axis=layout.axis, label_smoothing=smoothing,
            reduction="sum", backend=backend, **weights,
        )  # fmt: skip
        return layout.rows(grad, "logits")

    ordinary = gradient()
    for power in (-40, int(np.log2(info.smallest_normal)) + 4):
        tiny = 2.0**power
        expected = ordinary.astype(LONG) * LONG(tiny)
        for weights in (
            {"sample_weight": layout.arrange(np.full(n, tiny))}, {"weight": np.full(c, tiny)}
        ):  # fmt: skip
            error = np.abs(gradient(**weights).astype(LONG) - expected)
            assert (error <= ulp(expected, dtype) + ulp(ordinary.max() * tiny, dtype) / 2).all()
