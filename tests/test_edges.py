"""The table of edges in the design, line by line, wherever a row can lie."""

import numpy as np
import pytest
from support.cases import FLOATS, HALVES

import fastloss as fl

NAN, INF = np.nan, np.inf
HUGE = float(np.finfo(np.float32).max)
E20, E87, E88 = np.exp([-20.0, -87.0, -88.0])
Q20 = E20 / (1 + 2 * E20)


def row(x, y, loss, grad, **options):
    return {"x": x, "y": y, "loss": loss, "grad": grad, "options": options}


# Rows of float32 that also mean the same in float64, unless their name says otherwise.
EDGES = {
    "NaN": row([0, NAN, 1], 0, NAN, [NAN, NAN, NAN]),
    "NaN at the target": row([NAN, 0, 1], 0, NAN, [NAN, NAN, NAN]),
    "+inf": row([0, INF, 1], 0, NAN, [NAN, NAN, NAN]),
    "+inf at the target": row([INF, 0, 1], 0, NAN, [NAN, NAN, NAN]),
    "+inf and NaN": row([INF, NAN, 1], 2, NAN, [NAN, NAN, NAN]),
    "all -inf": row([-INF, -INF, -INF], 1, NAN, [NAN, NAN, NAN]),
    "-inf at another class": row([0, -INF, 0], 0, np.log(2), [-0.5, 0, 0.5]),
    "-inf at all others": row([-INF, -3, -INF], 1, 0.0, [0, 0, 0]),
    "-inf at the target": row([-INF, 0, 0], 0, INF, [-1, 0.5, 0.5]),
    "-inf with smoothing": row(
        [0, -INF, 0], 0, INF, [0.5 - 0.7 - 0.1, -0.1, 0.5 - 0.1], label_smoothing=0.3
    ),
    "-inf with smoothing but no weight": row(
        [0, -INF, 0], 0, np.log(2) * 0.9, [0.45 - 0.8, 0, 0.35],
        label_smoothing=0.3, weight=[1, 0, 1],
    ),
    "-inf with a soft target of 0": row(
        [0, -INF, 0], [0.5, 0, 0.5], np.log(2), [0, 0, 0]
    ),
    "-inf with a soft target": row([0, -INF, 0], [0.5, 0.5, 0], INF, [0, -0.5, 0.5]),
    "NaN with a soft target of 0": row([0, NAN, 0], [0.5, 0, 0.5], NAN, [NAN, NAN, NAN]),
    "-inf with a class weight of 0": row(
        [-INF, 0, 0], 0, 0.0, [0, 0, 0], weight=[0, 1, 1]
    ),
    "a negative sample weight": row([0, 0, 0], 1, -2 * np.log(3), [-2 / 3, 4 / 3, -2 / 3],
        sample_weight=-2),
    "-inf at the target, a negative sample weight": row(
        [-INF, 0, 0], 0, -INF, [1, -0.5, -0.5], sample_weight=-1
    ),
    "a negative class weight": row([0, 0], 0, -3 * np.log(2), [1.5, -1.5], weight=[-3, 1]),
    "class weights that cancel, smoothed": row(
        [1, 3, 0], 2, 0.2, [-0.1, 0.1, 0], weight=[1, -1, 0], label_smoothing=0.3
    ),
    "class weights that cancel, a soft target": row(
        [1, 3, 0], [0.1, 0.1, 0.8], 0.2, [-0.1, 0.1, 0], weight=[1, -1, 0]
    ),
    "further apart than float32 reaches": row([3e38, -3e38, 0], 1, 6e38, [1, -1, 0]),
    "one class": row([12.5], 0, 0.0, [0]),
    "one class, smoothed": row([-3], 0, 0.0, [0], label_smoothing=0.5),
    "ignored": row([1, 2, 3], -100, 0.0, [0, 0, 0]),
    "ignored, NaN": row([NAN, INF, -INF], -100, 0.0, [0, 0, 0]),
    "ignored, NaN, z_loss": row([NAN, 1, 2], -100, 0.0, [0, 0, 0], z_loss=1.0),
    "no sample weight, NaN": row([NAN, INF, -INF], 0, 0.0, [0, 0, 0], sample_weight=0),
    "no sample weight, -inf": row([-INF, 0, 0], 0, 0.0, [0, 0, 0], sample_weight=0),
    "no sample weight, soft, NaN": row(
        [NAN, 0, 0], [1, 0, 0], 0.0, [0, 0, 0], sample_weight=0
    ),
    "subnormal": row([0, -87], 0, E87, [-E87, E87]),
    "far below": row([0, -88], 0, E88, [-E88, E88]),
    "largest finite": row([HUGE, HUGE, HUGE], 0, np.log(3), [-2 / 3, 1 / 3, 1 / 3]),
    "smallest finite": row([-HUGE, -HUGE, -HUGE], 2, np.log(3), [1 / 3, 1 / 3, -2 / 3]),
    "confident": row(
        [20, 0, 0], 0, np.log1p(2 * E20), [-2 * Q20, Q20, Q20]
    ),
    "confident and wrong": row([0, 20, 0], 0, 20 + np.log1p(2 * E20), [Q20 - 1, 1 - 2 * Q20, Q20]),
}  # fmt: skip
FLOAT32_OVERFLOWS = {"further apart than float32 reaches"}

# Where the classes of a row lie among others that are masked with -inf: this reaches the tiles,
# the rows, the blocks of rows, and blocks in which there is nothing.
PLACES = {
    "alone": lambda c: (c, np.arange(c)),
    "in 70": lambda c: (70, np.linspace(3, 69, c).astype(int)),
    "at the front of 2000": lambda c: (2000, np.arange(c)),
    "at the back of 2000": lambda c: (2000, np.arange(2000 - c, 2000)),
    "all over 2100": lambda c: (2100, np.linspace(0, 2099, c).astype(int)),
}
NEIGHBOURS = 5  # rows before and after
edges = pytest.mark.parametrize("edge", EDGES)
places = pytest.mark.parametrize("place", PLACES)


def spread(values, num_classes, where, fill, dtype):
    wide = np.full(num_classes, fill, dtype)
    wide[where] = values
    return wide


def embed(edge, place, dtype):
    """The arguments of a batch with the row in the middle, and what it must give."""
    spec = EDGES[edge]
    c = len(spec["x"])
    num_classes, where = PLACES[place](c)
    rng = np.random.default_rng(1)
    n = 2 * NEIGHBOURS + 1
    x = rng.normal(size=(n, num_classes)).astype(dtype)
    with np.errstate(over="ignore"):
        x[NEIGHBOURS] = spread(spec["x"], num_classes, where, -INF, dtype)
    options = dict(spec["options"])
    if isinstance(spec["y"], list):
        target = np.full((n, num_classes), 1 / num_classes, dtype)
        target[NEIGHBOURS] = spread(spec["y"], num_classes, where, 0, dtype)
    else:
        target = rng.integers(0, num_classes, n)
        target[NEIGHBOURS] = where[spec["y"]] if spec["y"] >= 0 else spec["y"]
    if "weight" in options:
        options["weight"] = spread(options["weight"], num_classes, where, 1, float)
    if "sample_weight" in options:
        options["sample_weight"] = np.ones(n)
        options["sample_weight"][NEIGHBOURS] = spec["options"]["sample_weight"]
    loss, grad = spec["loss"], np.array(spec["grad"], float)
    if edge in FLOAT32_OVERFLOWS and dtype == np.float32:
        loss = INF
    masked = NAN if np.isnan(grad).any() else 0
    return x, target, options, loss, spread(grad, num_classes, where, masked, float)


def needs_smoothing_over_masked_classes(edge, place):
    return place != "alone" and "label_smoothing" in EDGES[edge]["options"]


@edges
@places
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("inner", [False, True], ids=["last", "first"])
def test_edge(edge, place, dtype, inner, backend):
    if needs_smoothing_over_masked_classes(edge, place):
        place = "alone"  # smoothing spreads over masked classes, too: another row altogether
    x, target, options, loss, grad = embed(edge, place, dtype)
    axis = 0 if inner else -1
    if inner:
        x = np.ascontiguousarray(x.T)
        target = np.ascontiguousarray(target.T)
    options |= {"axis": axis, "backend": backend}

    losses, grads = fl.cross_entropy_with_grad(x, target, reduction="none", **options)
    grads = np.moveaxis(grads, axis, -1)
    tolerance = {"rtol": 1e-6 if dtype == np.float32 else 1e-14, "atol": 0}
    np.testing.assert_allclose(losses[NEIGHBOURS], loss, **tolerance)
    # Relative to the largest entry of the row, however small that is.
    atol = 2 * tolerance["rtol"] * np.abs(np.nan_to_num(grad)).max()
    np.testing.assert_allclose(grads[NEIGHBOURS], grad, **tolerance | {"atol": atol})
    if loss == 0.0:
        assert not np.signbit(losses[NEIGHBOURS])
    if np.all(grad == 0) and EDGES[edge]["y"] == -100:
        assert not np.signbit(grads[NEIGHBOURS]).any()

    alone = fl.cross_entropy(x, target, reduction="none", **options)
    np.testing.assert_array_equal(np.isnan(alone), np.isnan(losses))
    np.testing.assert_allclose(alone, losses, **tolerance)

    # In place, bit for bit.
    out = x.copy()
    again, same = fl.cross_entropy_with_grad(out, target, reduction="none", out=out, **options)
    assert same is out
    np.testing.assert_array_equal(np.moveaxis(out, axis, -1), grads)
    np.testing.assert_array_equal(again, losses)

    # The other rows are what they are next to a tame row, bit for bit.
    tame = x.copy()
    np.moveaxis(tame, axis, -1)[NEIGHBOURS] = 0.0
    losses_tame, grads_tame = fl.cross_entropy_with_grad(tame, target, reduction="none", **options)
    others = np.arange(2 * NEIGHBOURS + 1) != NEIGHBOURS
    np.testing.assert_array_equal(losses[others], losses_tame[others])
    np.testing.assert_array_equal(grads[others], np.moveaxis(grads_tame, axis, -1)[others])


SCORES = {  # row: softmax, log_softmax, logsumexp
    "NaN": ([0, NAN, 1], [NAN] * 3, [NAN] * 3, NAN),
    "+inf": ([0, INF, 1], [NAN] * 3, [NAN] * 3, INF),
    "+inf twice": ([INF, 0, INF], [NAN] * 3, [NAN] * 3, INF),
    "+inf and NaN": ([INF, NAN, 1], [NAN] * 3, [NAN] * 3, NAN),
    "NaN and +inf": ([NAN, INF, INF], [NAN] * 3, [NAN] * 3, NAN),
    "all -inf": ([-INF] * 3, [NAN] * 3, [NAN] * 3, -INF),
    "-inf and NaN": ([-INF, -INF, NAN], [NAN] * 3, [NAN] * 3, NAN),
    "-inf": ([0, -INF, 0], [0.5, 0, 0.5], [-np.log(2), -INF, -np.log(2)], np.log(2)),
    "one finite": ([-INF, 7, -INF], [0, 1, 0], [-INF, 0, -INF], 7),
    "one class": ([-5], [1], [0], -5),
    "largest": ([HUGE] * 3, [1 / 3] * 3, [-np.log(3)] * 3, HUGE),
    "confident": ([20, 0], [1, E20], [-E20, -20], 20),
    "subnormal": ([0, -88], [1, E88], [-E88, -88], E88),
}  # fmt: skip


@pytest.mark.parametrize("name", SCORES)
@places
@pytest.mark.parametrize("inner", [False, True], ids=["last", "first"])
def test_edge_of_softmax(name, place, inner, backend):
    values, p, log_p, lse = SCORES[name]
    num_classes, where = PLACES[place](len(values))
    x = np.zeros((2 * NEIGHBOURS + 1, num_classes), np.float32)
    x[NEIGHBOURS] = spread(values, num_classes, where, -INF, np.float32)
    masked = (NAN, NAN) if np.isnan(p).any() else (0, -INF)
    axis = 0 if inner else -1
    if inner:
        x = np.ascontiguousarray(x.T)
    for function, answer, fill in [(fl.softmax, p, masked[0]), (fl.log_softmax, log_p, masked[1])]:
        answer = spread(answer, num_classes, where, fill, float)
        result = np.moveaxis(function(x, axis, backend=backend), axis, -1)
        np.testing.assert_allclose(result[NEIGHBOURS], answer, rtol=1e-6)
        assert np.isfinite(result[:NEIGHBOURS]).all()
        assert np.isfinite(result[NEIGHBOURS + 1 :]).all()
        out = x.copy()
        function(out, axis, out=out, backend=backend)
        np.testing.assert_array_equal(np.moveaxis(out, axis, -1), result)
    result = fl.logsumexp(x, axis, backend=backend)
    np.testing.assert_allclose(result[NEIGHBOURS], lse, rtol=1e-6)
    assert np.isfinite(np.delete(result, NEIGHBOURS)).all()


@pytest.mark.parametrize("dtype", [*FLOATS, *HALVES], ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("c", [3, 2000], ids=["in tiles", "in rows"])
def test_logsumexp_of_infinite_rows(c, dtype, backend):
    x = np.full((5, c), -INF)
    x[1, -1], x[2, -1], x[3, 1:], x[4, ::2] = NAN, INF, [INF] + [NAN] * (c - 2), INF
    for layout in (x, x[:, ::-1]):
        for scores, axis in ((layout, 1), (layout.T, 0)):
            result = fl.logsumexp(np.array(scores, dtype), axis, backend=backend)
            np.testing.assert_array_equal(result.astype(float), [-INF, NAN, INF, NAN, INF])


OF_NO_ACCOUNT = {
    "ignored": (fl.cross_entropy_with_grad, "target"),
    "no sample weight": (fl.cross_entropy_with_grad, "sample_weight"),
    "no sample weight, soft": (fl.cross_entropy_with_grad, "soft"),
    "ignored in nll": (fl.nll_loss_with_grad, "target"),
    "no sample weight in nll": (fl.nll_loss_with_grad, "sample_weight"),
}


@pytest.mark.parametrize("further", [{}, {"label_smoothing": 0.1}, {"z_loss": 1e-3}], ids=str)
@pytest.mark.parametrize("shape", [(90, 3), (9, 400), (2, 3, 45), (2, 400, 5)], ids=str)
@pytest.mark.parametrize("name", OF_NO_ACCOUNT)
def test_rows_of_no_account_among_others(name, shape, further, backend):
    """The gradient of such a row is +0, and never -0, whatever the row and its targets hold."""
    function, by = OF_NO_ACCOUNT[name]
    rng = np.random.default_rng(0)
    x = -rng.random(shape, np.float32)
    rows = (*shape[:1], *shape[2:])
    dead = np.arange(np.prod(rows)).reshape(rows) % 3 > 0
    unlike = np.arange(np.prod(rows)).reshape(rows) % 3 == 2
    by_row = np.moveaxis(x, 1, -1)
    by_row[unlike] = rng.choice([NAN, INF, -INF, -HUGE], by_row[unlike].shape)
    options = {"axis": 1, "backend": backend, "weight": rng.random(shape[1]) + 0.5}
    if function is fl.cross_entropy_with_grad:
        options |= further
    target = rng.integers(0, shape[1], rows)
    if by == "target":
        target[dead] = -100
    else:
        options["sample_weight"] = np.where(dead, 0.0, 2.0)
    if by == "soft":
        target = rng.random(shape, np.float32)
        np.moveaxis(target, 1, -1)[unlike] = NAN
    loss, grad = function(x, target, **options)
    assert np.isfinite(loss)
    grad = np.ascontiguousarray(np.moveaxis(grad, 1, -1))
    assert (grad[dead].view(np.int32) == 0).all()
    assert grad[~dead].any(axis=-1).all()


# ---------------------------------------------------------------------------------------------
# Nothing to average
# ---------------------------------------------------------------------------------------------

NOTHING = {
    "no rows": (np.zeros((0, 3), np.float32), np.zeros(0, int), {}),
    "no rows, soft": (np.zeros((0, 3), np.float32), np.zeros((0, 3), np.float32), {}),
    "all ignored": (np.full((4, 3), NAN, np.float32), np.full(4, -100), {}),
    "all sample weights 0": (
        np.full((4, 3), NAN, np.float32), np.zeros(4, int), {"sample_weight": np.zeros(4)},
    ),
    "all sample weights 0, soft": (
        np.full((4, 3), INF, np.float32), np.ones((4, 3), np.float32),
        {"sample_weight": np.zeros(4)},
    ),
    "all class weights 0": (
        np.ones((4, 3), np.float32), np.zeros(4, int), {"weight": np.zeros(3)},
    ),
    "all class weights 0, whatever the smoothing": (
        np.full((4, 3), NAN, np.float32), np.zeros(4, int),
        {"weight": np.zeros(3), "label_smoothing": 0.1},
    ),
    "the targets' weights 0, smoothed": (
        np.ones((4, 3), np.float32), np.zeros(4, int),
        {"weight": [0, 1, 1], "label_smoothing": 0.1},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NOTHING)
def test_nothing_to_average(name, backend):
    x, target, options = NOTHING[name]
    options = options | {"backend": backend}
    loss, grad = fl.cross_entropy_with_grad(x, target, **options)
    assert np.isnan(loss)
    assert np.isnan(fl.cross_entropy(x, target, **options))
    np.testing.assert_array_equal(grad, np.zeros_like(x))
    assert not np.signbit(grad).any()
    if name.endswith("smoothed"):
        return  # these rows do have a loss, only no divisor
    for more in ({"reduction": "sum"}, {"normalizer": 3.0}):
        loss, grad = fl.cross_entropy_with_grad(x, target, **options, **more)
        assert loss == 0.0
        np.testing.assert_array_equal(grad, np.zeros_like(x))
    losses, grad = fl.cross_entropy_with_grad(x, target, reduction="none", **options)
    np.testing.assert_array_equal(losses, np.zeros(len(x)))
    np.testing.assert_array_equal(grad, np.zeros_like(x))


@pytest.mark.parametrize("name", ["no rows", "all ignored", "all sample weights 0"])
def test_nothing_to_average_in_nll(name, backend):
    x, target, options = NOTHING[name]
    options = options | {"backend": backend}
    assert np.isnan(fl.nll_loss(x, target, **options))
    # Where the divisor is 0 so is the factor on the gradient; under the others kernels show theirs.
    for more in ({}, {"reduction": "sum"}, {"normalizer": 2.0}, {"reduction": "none"}):
        out = np.full_like(x, 7)
        loss, grad = fl.nll_loss_with_grad(x, target, out=out, **options, **more)
        assert np.isnan(loss) if not more else not np.any(loss)
        assert not np.signbit(loss).any()
        np.testing.assert_array_equal(grad, np.zeros_like(x))
        assert not np.signbit(grad).any()


CANCELLING = {  # target, weights whose sum over the rows is 0
    "sample weights": ([0, 1, 2, 0], {"sample_weight": [1, -1, 2, -2]}),
    "class weights": ([0, 1, 1, 0], {"weight": [1.5, -1.5, 4]}),
    "both": ([0, 1, 2, -100], {"weight": [2, 1, -3], "sample_weight": [-1, 5, 1, 9]}),
    "sample weights, soft": (np.eye(4, 3), {"sample_weight": [1, -1, 2, -2], "weight": [1, 2, 3]}),
}


@pytest.mark.parametrize("name", CANCELLING)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("c", [3, 400], ids=["in tiles", "in rows"])
def test_weights_that_cancel(name, smoothing, c, backend):
    """A mean over nothing: a loss of NaN, a gradient of 0, not of infinities."""
    target, options = CANCELLING[name]
    options = {key: np.array(value, float) for key, value in options.items()}
    x = np.random.default_rng(1).normal(size=(4, c)).astype(np.float32)
    x[1, 1] = NAN
    if "weight" in options:
        options["weight"] = np.pad(options["weight"], (0, c - 3))
    target = np.array(target)
    if target.ndim == 2:
        target = np.pad(target, ((0, 0), (0, c - 3))).astype(np.float32)
    calls = [(fl.cross_entropy_with_grad, {"label_smoothing": smoothing})]
    if target.ndim == 1 and not smoothing:
        calls.append((fl.nll_loss_with_grad, {}))
    for function, more in calls:
        loss, grad = function(x, target, **options, **more, backend=backend)
        assert np.isnan(loss)
        assert (grad.view(np.int32) == 0).all()
        x[1, 1] = 0
        loss, grad = function(x, target, reduction="sum", **options, **more, backend=backend)
        assert np.isfinite(loss)
        assert grad.any()


@pytest.mark.parametrize("kind", ["indices", "smoothed", "probabilities", "nll"])
@pytest.mark.parametrize("c", [3, 400], ids=["in tiles", "in rows"])
def test_rows_that_count_for_nothing_among_negative_weights(c, kind, backend):
    """They are +0 to the bit, whatever they hold, also where the divisor is negative."""
    x = np.random.default_rng(1).normal(size=(6, c)).astype(np.float32)
    idle = np.array([False, True, False, True, True, False])
    x[idle] = NAN
    weights = {"sample_weight": [-1, -2, -0.5, 0.0, -0.0, -3], "weight": -np.ones(c)}
    target = np.array([0, -100, 2, 1, 1, 0])
    function = fl.nll_loss_with_grad if kind == "nll" else fl.cross_entropy_with_grad
    options = {"label_smoothing": 0.1} if kind == "smoothed" else {}
    if kind == "probabilities":
        target = np.full_like(x, 1 / c)
        weights["sample_weight"][1] = -0.0
    for signs in (1, -1):
        options |= {name: signs * np.array(values) for name, values in weights.items()}
        losses, _ = function(x, target, reduction="none", **options, backend=backend)
        loss, grad = function(x, target, **options, backend=backend)
        assert np.isfinite(loss)
        assert (losses[idle].view(np.int32) == 0).all()
        assert (grad[idle].view(np.int32) == 0).all()
        assert grad[~idle].any(axis=1).all()


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("shape", [(0, 3, 2), (2, 3, 0), (4, 5, 0)])
def test_no_rows_along_any_axis(shape, axis, backend):
    x = np.zeros(shape, np.float32)
    if shape[axis] == 0:
        with pytest.raises(ValueError, match="has no classes"):
            fl.softmax(x, axis, backend=backend)
        return
    assert fl.softmax(x, axis, backend=backend).shape == shape
    assert fl.log_softmax(x, axis, backend=backend).shape == shape
    rows = tuple(np.delete(shape, axis))
    assert fl.logsumexp(x, axis, backend=backend).shape == rows
    loss, grad = fl.cross_entropy_with_grad(
        x, np.zeros(rows, int), axis=axis, reduction="none", backend=backend
    )
    assert (loss.shape, grad.shape) == (rows, shape)


def test_the_running_example(backend):
    x, y = [5, 4, 2], 0
    np.testing.assert_allclose(fl.softmax(x, backend=backend), [0.71, 0.26, 0.04], atol=0.006)
    loss, grad = fl.cross_entropy_with_grad(x, y, backend=backend)
    assert loss == pytest.approx(0.349, abs=5e-4)
    np.testing.assert_allclose(grad, [-0.29, 0.26, 0.04], atol=0.006)


@pytest.mark.parametrize(
    ("x", "loss"),
    [([20, 0, 0], "4.1223074e-09"), ([0, -87], "1.6458115e-38"), ([HUGE] * 3, "1.0986123")],
)
def test_the_digits_of_the_design(x, loss, backend):
    x = np.array([x], np.float32)
    losses, grad = fl.cross_entropy_with_grad(x, [0], reduction="none", backend=backend)
    assert str(losses[0]) == loss
    assert abs(grad.astype(float).sum()) <= 1e-7 * np.abs(grad).max()


@pytest.mark.parametrize("num_classes", [3, 400], ids=["in tiles", "in rows"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_maxima_halfway_between_two_powers_of_two(dtype, num_classes, backend):
    """Where x / ln 2 rounds either way, all stages of a kernel must round it the same way."""
    halfway = (np.arange(-200, 200) + 0.5) * np.log(2)
    maxima = halfway.astype(dtype)
    maxima = np.concatenate(
        [np.nextafter(maxima, dtype(-1e3)), maxima, np.nextafter(maxima, dtype(1e3))]
    )
    logits = np.repeat(maxima[:, None] - dtype(40), num_classes, axis=1)
    logits[:, 0] = maxima
    logits[:, 1] = maxima - dtype(1)
    target = np.ones(len(maxima), int)
    losses, grad = fl.cross_entropy_with_grad(logits, target, reduction="none", backend=backend)
    expected = 1 + np.log1p(np.exp(-1.0))
    np.testing.assert_allclose(losses, expected, rtol=2e-5)
    np.testing.assert_allclose(grad[:, 0], 1 / (1 + np.exp(-1.0)), rtol=2e-5)
    lse = fl.logsumexp(logits, backend=backend)
    np.testing.assert_allclose(lse - maxima, np.log1p(np.exp(-1.0)), atol=5e-5)


@pytest.mark.parametrize("num_classes", [65, 321, 2113], ids=["in tiles", "in rows", "in blocks"])
def test_a_maximum_anywhere(num_classes, backend):
    """So far above the others that nothing but it can be taken off: one class behind the last
    whole chunk, too.
    """
    x = np.full((num_classes, num_classes), -100, np.float32)
    np.fill_diagonal(x, 100)
    p = fl.softmax(x, backend=backend)
    np.testing.assert_allclose(p, np.eye(num_classes), rtol=1e-6, atol=0)
    np.testing.assert_allclose(fl.logsumexp(x, backend=backend), 100, rtol=1e-6)
    target = np.arange(num_classes)
    losses = fl.cross_entropy(x, target[::-1], reduction="none", backend=backend)
    expected = np.where(target == target[::-1], 0, 200)
    np.testing.assert_allclose(losses, expected, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("c", [3, 1000])
def test_a_gradient_of_nothing_is_0_even_next_to_a_nan(c, reduction, backend):
    """The classes that occur have no weight, but smoothing gives the others some."""
    x = np.zeros((5, c), np.float32)
    x[2, 1] = np.nan
    w = np.ones(c)
    w[0] = 0
    loss, grad = fl.cross_entropy_with_grad(
        x, [0] * 5, weight=w, label_smoothing=0.5, reduction=reduction, backend=backend
    )
    assert np.isnan(loss)
    np.testing.assert_array_equal(
        np.isnan(grad).any(1), [False, False, reduction == "sum", *[False] * 2]
    )
    if reduction == "mean":
        assert (grad.view(np.int32) == 0).all()


def test_infinite_losses_are_no_floating_point_error(backend):
    """Even where the user has told NumPy to raise those, and `out` is written already."""
    log_probs = np.zeros((200, 3), np.float32)
    log_probs[0], log_probs[-1] = np.inf, -np.inf
    out = np.empty_like(log_probs)
    with np.errstate(all="raise"):
        loss, _ = fl.nll_loss_with_grad(log_probs, np.zeros(200, int), out=out, backend=backend)
    assert np.isnan(loss)
    assert (out[:, 0] < 0).all()
