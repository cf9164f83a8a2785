"""Every operation against the longdouble oracle, within the promised tolerance."""

import functools
import itertools
import math

import ml_dtypes
import mpmath
import numpy as np
import pytest
from support import cases, oracles
from support.cases import CASES, FLOATS, HALVES, LAYOUTS, SOME_LAYOUTS, Layout, assert_close

import fastloss as fl

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def check(case, layout, dtype, **options):
    results = case.call(layout, case.problem(layout.n, layout.num_classes, dtype), **options)
    for result, bounded in zip(results, cases.expected(case.name, layout, dtype.name), strict=True):
        assert_close(result, bounded, dtype)
    return results


@every_case
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_operation(case, layout, dtype, backend):
    for result in check(case, layout, dtype, backend=backend):
        assert isinstance(result, float) or result.dtype == dtype


@every_case
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("layout", SOME_LAYOUTS, ids=str)
def test_half_types_are_computed_in_float32_and_rounded_once(case, layout, dtype, backend):
    halves = case.problem(layout.n, layout.num_classes, dtype)
    results = check(case, layout, dtype, backend=backend)
    floats = [array.astype(np.float32) if array.dtype == dtype else array for array in halves]
    wide = case.call(layout, floats, backend=backend)
    for result, float32, kind in zip(results, wide, case.returns, strict=True):
        if isinstance(result, float):
            np.testing.assert_equal(result, float32)  # NaN, where no row counts
        elif case.is_loss and kind in ("rows", "elements"):
            assert result.dtype == np.float32
            np.testing.assert_array_equal(result, float32)
        else:
            assert result.dtype == dtype
            np.testing.assert_array_equal(result, float32.astype(dtype))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("layout", SOME_LAYOUTS[1:], ids=str)
def test_half_scores_next_to_probabilities_of_float32(layout, dtype, backend):
    """Each is read in its own type."""
    case = cases.by_name["cross_entropy soft grad all"]
    _, *others = case.problem(layout.n, layout.num_classes, np.float32)
    scores, *_ = case.problem(layout.n, layout.num_classes, dtype)
    loss, grad = case.call(layout, (scores, *others), backend=backend)
    expected = case.call(layout, (scores.astype(np.float32), *others), backend=backend)
    assert loss == expected[0]
    np.testing.assert_array_equal(grad, expected[1].astype(dtype))


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        *itertools.product(SOME_LAYOUTS, FLOATS + HALVES),
        *itertools.product([Layout(1, 128256)], FLOATS),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["grad none", "grad label_smoothing", "soft grad"])
def test_gradient_rows_sum_to_zero(name, layout, dtype, backend):
    case = cases.by_name[f"cross_entropy {name}"]
    problem = case.problem(layout.n, layout.num_classes, dtype)
    if name == "soft grad":  # probabilities that sum to 1, and not nearly: powers of 2
        target = np.zeros(problem[1].shape, dtype)
        target[:, 0], target[:, -1] = 0.25, 0.75
        problem = (problem[0], target)
    _, grad = case.call(layout, problem, backend=backend)
    grad = grad.astype(np.longdouble)
    # An entry is a product of a rounded exponential and a rounded factor, less a third number:
    # each step rounds by at most half an ulp, and a subnormal by half of the smallest.
    info = ml_dtypes.finfo(dtype)
    rounding = 2 * float(info.eps) * np.abs(grad).sum(axis=1)
    rounding += layout.num_classes * np.longdouble(info.smallest_subnormal)
    if name == "soft grad":
        rounding += float(info.eps)  # p - t may cancel, and leaves the rounding of p
    assert (np.abs(grad.sum(axis=1)) <= rounding).all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("num_classes", [5, 100, 1500])
def test_either_side_of_common_units(num_classes, dtype, backend):
    """Rows whose exponentials share their units, beside rows that have their own: by how large the
    maximum is, how small, and how far below it the target."""
    large, small, far = (36, -11.1, 69.3) if dtype == np.float32 else (300, -300.1, 623.8)
    around = np.array([-1, -0.05, 0, 0.05, 1])
    maxima = np.concatenate([around + large, around + small, [0, -3 * large, 3 * large]])
    gaps = np.concatenate([[0, 2], around + far, [1.3 * far]])
    rng = np.random.default_rng(0)
    x = (
        np.repeat(maxima, len(gaps))[:, None]
        - 2
        - rng.random((len(maxima) * len(gaps), num_classes))
    )
    x[:, 0] += 2
    x[:, 1] = x[:, 0] - np.tile(gaps, len(maxima))
    x, y = x.astype(dtype), np.ones(len(x), int)
    options = {"reduction": "none", "backend": backend}
    losses, grad = fl.cross_entropy_with_grad(x, y, **options)
    expected = oracles.cross_entropy_with_grad(x, y, reduction="none")
    assert_close(losses, expected[0], dtype)
    assert_close(grad, expected[1], dtype)
    p = fl.softmax(x, backend=backend)
    assert_close(p, oracles.softmax(x)[0], dtype)
    for i in range(len(x)):  # and it is the row that decides
        loss, row = fl.cross_entropy_with_grad(x[i], y[i], **options)
        assert (loss, row.tobytes()) == (losses[i], grad[i].tobytes())
        assert fl.softmax(x[i], backend=backend).tobytes() == p[i].tobytes()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("num_classes", [2, 7, 10, 40, 100, 128, 200])
def test_rows_that_are_all_tame(num_classes, dtype, backend):
    """None of them keeps the others from being taken in one run, to the last of an odd number."""
    rng = np.random.default_rng(num_classes)
    x = rng.normal(2, size=(64 + 37, num_classes)).astype(dtype)
    y = rng.integers(0, num_classes, len(x))
    weight = rng.uniform(0.1, 1, num_classes)
    weight[0] = 2.0 ** (-60 if dtype == np.float32 else -900)
    for options in ({}, {"weight": weight}, {"weight": weight, "z_loss": 0.01}):
        losses, grad = fl.cross_entropy_with_grad(
            x, y, reduction="none", **options, backend=backend
        )
        expected = oracles.cross_entropy_with_grad(x, y, reduction="none", **options)
        assert_close(losses, expected[0], dtype)
        assert_close(grad, expected[1], dtype)
        total = fl.cross_entropy(x, y, reduction="sum", **options, backend=backend)
        assert total == pytest.approx(math.fsum(losses.tolist()), rel=1e-14, abs=0)
    p, g = fl.softmax(x, backend=backend), rng.uniform(-1, 1, x.shape).astype(dtype)
    assert_close(p, oracles.softmax(x)[0], dtype)
    for name, forward in (("softmax", p), ("log_softmax", fl.log_softmax(x))):
        result = getattr(fl, f"{name}_backward")(g, forward, backend=backend)
        assert_close(result, getattr(oracles, f"{name}_backward")(g, forward)[0], dtype)


def test_a_million_rows_of_ten(backend):
    """In one call; the oracle, which is slow, looks at every 16th row."""
    if backend == "numpy":
        pytest.skip("the reference is for smaller arrays")
    case, layout = cases.by_name["cross_entropy grad none"], Layout(10**6, 10)
    x, y = case.problem(layout.n, layout.num_classes, np.float32)
    losses, grad = case.call(layout, (x, y), backend=backend)
    expected = oracles.cross_entropy_with_grad(x[::16], y[::16], reduction="none")
    assert_close(losses[::16], expected[0], x.dtype)
    assert_close(grad[::16], expected[1], x.dtype)


def test_the_mean_over_ten_million_rows(backend):
    if backend == "numpy":
        pytest.skip("the reference is for smaller arrays")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(10**7, 2)).astype(np.float32)
    y = rng.integers(0, 2, len(x), dtype=np.int64)
    mean = fl.cross_entropy(x, y, backend=backend)
    losses = fl.cross_entropy(x, y, backend=backend, reduction="none")
    assert losses.dtype == np.float32
    assert mean == pytest.approx(losses.mean(dtype=np.float64), rel=1e-9)
    sample = slice(None, None, 101)
    expected = oracles.cross_entropy(x[sample], y[sample], reduction="none")
    assert_close(losses[sample], expected[0], x.dtype)


@pytest.mark.parametrize(
    "name", ["cross_entropy grad all", "cross_entropy soft grad all", "nll_loss grad all"]
)
@pytest.mark.parametrize("dtype", [*FLOATS, HALVES[0]], ids=str)
@pytest.mark.parametrize(
    "layout", [Layout(*shape) for shape in [(100, 7), (100, 350), (2, 7, 50), (1, 350, 100)]],
    ids=str,
)  # fmt: skip
def test_a_reduced_loss_is_the_sum_of_the_losses_as_handed_out(name, layout, dtype, backend):
    """Of so few rows no rounding averages away."""
    case = cases.by_name[name]
    problem = case.problem(layout.n, layout.num_classes, dtype)
    losses, total = (
        case._replace(options={**case.options, "reduction": reduction}).call(
            layout, problem, backend=backend
        )[0]
        for reduction in ("none", "sum")
    )
    assert total == pytest.approx(math.fsum(losses.tolist()), rel=1e-14, abs=0)


@functools.cache
def equal_terms(operation, num_classes):
    """Arguments of rows whose sums over the classes have equal terms, and what is right."""
    rows = 64 if num_classes <= 300 else 8
    steps = (np.arange(1, rows + 1, dtype=np.float32) / np.float32(rows + 1))[:, None]
    equal = np.ones((1, num_classes), np.float32)
    first = np.zeros_like(equal)
    first[0, 0] = 1
    weight = np.where(first[0], 1, 0.7)
    arguments, options = {
        # The exponentials.
        "softmax": ((steps * equal,), {}),
        "softmax, high": (((50 + steps) * equal,), {}),  # in units of each row
        "cross_entropy_with_grad": ((steps * equal, np.zeros(rows, int)), {"reduction": "none"}),
        # The distances from a maximum that leaves nothing to the others.
        "smoothed": (
            ((50 + steps) * first, np.zeros(rows, int)),
            {"reduction": "none", "label_smoothing": 1.0},
        ),
        "smoothed, weighted": (
            ((50 + steps) * first, np.zeros(rows, int)),
            {"reduction": "none", "label_smoothing": 1.0, "weight": weight},
        ),
        # These times probabilities, and, in the gradient at the maximum, the probabilities.
        "soft": (((50 + steps) * first, steps / 7 * (equal - first)), {"reduction": "none"}),
        "soft, weighted": (
            ((50 + steps) * first, steps / 7 * (equal - first)),
            {"reduction": "none", "weight": weight},
        ),
        # The exponentials of rows whose maxima are asked for.
        "soft, equal": ((steps * equal, first + 0 * steps), {"reduction": "none"}),
        "softmax_backward": ((steps * equal, (1 + steps) * equal / num_classes * 3), {}),
        "log_softmax_backward": ((steps * equal, 1 + steps - np.log(num_classes * equal)), {}),
    }[operation]
    function = operation.partition(",")[0]
    function = function if hasattr(oracles, function) else "cross_entropy_with_grad"
    expected = getattr(oracles, function)(*arguments, **options)
    return getattr(fl, function), arguments, options, [bounded.value for bounded in expected]


@pytest.mark.parametrize("num_classes", [300, 40_000], ids=["in tiles", "in rows"])
@pytest.mark.parametrize(
    "operation",
    [
        "softmax", "softmax, high", "cross_entropy_with_grad", "smoothed", "smoothed, weighted",
        "soft", "soft, weighted", "soft, equal", "softmax_backward", "log_softmax_backward",
    ],
)  # fmt: skip
def test_long_sums_leave_float32_in_time(operation, num_classes, backend):
    """Of equal terms each addition may round the same way: the errors add up, too."""
    function, arguments, options, expected = equal_terms(operation, num_classes)
    results = function(*arguments, **options, backend=backend)
    results = results if isinstance(results, tuple) else (results,)
    # 300 exponentials in eight sums that never leave float32 would be off by 6e-7, and 40 sums of
    # blocks that do not by 6.3e-7.
    exponentials = ("softmax", "softmax, high", "cross_entropy_with_grad")
    rtol = 4e-7 if num_classes == 300 and operation in exponentials else 6e-7
    for result, right in zip(results, expected, strict=True):
        np.testing.assert_allclose(result, right.astype(float), rtol=rtol, atol=1e-14)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_types_sum_in_float64(dtype, backend):
    """The sum of 100,000 losses of 11 passes the largest float16, 65504."""
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(100_000, 10)) * 10).astype(dtype)
    y = rng.integers(0, 10, len(x))
    loss, grad = fl.cross_entropy_with_grad(x, y, reduction="sum", backend=backend)
    expected_loss, expected_grad = oracles.cross_entropy_with_grad(x, y, reduction="sum")
    assert loss > 65504
    assert_close(loss, expected_loss, dtype)
    assert_close(grad, expected_grad, dtype)
    mean, grad = fl.cross_entropy_with_grad(x, y, backend=backend)
    assert mean == pytest.approx(loss / len(x), rel=1e-12)
    assert_close(grad, oracles.cross_entropy_with_grad(x, y)[1], dtype)


# ---------------------------------------------------------------------------------------------
# Small and hard, against mpmath: this holds the oracle itself, and the reference, to account
# ---------------------------------------------------------------------------------------------

HARD_ROWS = {
    "confident": [20.0, 0.0, 0.0],
    "very confident": [60.0, 1.0, 0.0],
    "subnormal": [0.0, -87.0],
    "below float32": [0.0, -200.0, -700.0],
    "wide": [-900.0, 900.0, 0.5],
    "tied": [3.0, 3.0, 3.0, 3.0],
    "nearly tied": [1.0, 1.0 + 2.0**-20, 1.0 - 2.0**-20],
    "shifted": [30000.0, 29999.0, 29990.0],
    "tiny": [1e-30, -1e-30, 1e-38],
    "lse near 0": [-0.6931471805599453, -0.6931471805599453],
    "one class": [-4.0],
}
hard_rows = pytest.mark.parametrize("row", HARD_ROWS.values(), ids=HARD_ROWS)


def mpmath_answers(row, y, smoothing, z_loss):
    loss, grad = oracles.exact_cross_entropy(row, y, smoothing, z_loss)
    to_long = lambda numbers: np.array([np.longdouble(mpmath.nstr(n, 30)) for n in numbers])  # noqa: E731
    return (
        to_long(oracles.exact_softmax(row)),
        to_long(oracles.exact_log_softmax(row)),
        to_long([oracles.exact_logsumexp(row)]),
        to_long([loss]),
        to_long(grad),
    )


@hard_rows
@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.0, 0.0), (0.25, 0.0), (0.0, 0.5)])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_hard_rows(row, smoothing, z_loss, dtype, backend):
    x = np.array([row], dtype)
    options = {"label_smoothing": smoothing, "z_loss": z_loss, "reduction": "none"}
    for y in range(len(row)):
        target = np.array([y])
        exact = mpmath_answers(x[0], y, smoothing, z_loss)
        loss, grad = fl.cross_entropy_with_grad(x, target, backend=backend, **options)
        bounds = [
            *oracles.softmax(x),
            *oracles.log_softmax(x),
            *oracles.logsumexp(x),
            *oracles.cross_entropy_with_grad(x, target, **options),
        ]
        results = [
            fl.softmax(x, backend=backend)[0],
            fl.log_softmax(x, backend=backend)[0],
            fl.logsumexp(x, backend=backend),
            loss,
            grad[0],
        ]
        for result, value, bound in zip(results, exact, bounds, strict=True):
            # The oracle agrees with mpmath, and the result is held to mpmath's own value.
            allowance = np.asarray(bound.allowance).reshape(value.shape)
            oracle = np.asarray(bound.value).reshape(value.shape)
            assert (np.abs(oracle - value) <= 1e-17 * allowance + np.longdouble("1e-4000")).all()
            assert_close(result, oracles.Bounded(value, allowance), dtype)
