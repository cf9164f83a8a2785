"""Everything that may be passed, in every form it may come in."""

import functools

import numpy as np
import pytest
from support import oracles
from support.backends import need
from support.cases import BFLOAT16, CASES, INTEGERS, Layout, assert_close

import fastloss as fl

F32 = np.dtype(np.float32)
rng = np.random.default_rng(5)
X = rng.normal(size=(30, 70)).astype(F32)  # few enough rows and classes for an int8
Y = rng.integers(0, 70, 30)
EVERY_OTHER = {1: np.s_[::4], 2: np.s_[::2, ::2]}
FORMS = {
    "Fortran order": np.asfortranarray,
    "reversed": lambda a: a[::-1].copy()[::-1],
    "reversed classes": lambda a: a[..., ::-1].copy()[..., ::-1],
    "every other": lambda a: np.repeat(np.repeat(a, 2, 0), 2, -1)[EVERY_OTHER[a.ndim]],
    "sliced": lambda a: np.pad(a, 3)[3:-3, 3:-3] if a.ndim == 2 else np.pad(a, 3)[3:-3],
    "byte-swapped": lambda a: a.astype(a.dtype.newbyteorder()),
    "misaligned": lambda a: np.frombuffer(
        b"x" + np.ascontiguousarray(a).tobytes(), a.dtype, offset=1
    ).reshape(a.shape),
    "read-only": lambda a: np.frombuffer(a.tobytes(), a.dtype).reshape(a.shape),
    "subclass": lambda a: a.view(type("Sub", (np.ndarray,), {})),
}  # fmt: skip


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_targets_of_every_integer_dtype(dtype, backend):
    expected = fl.cross_entropy_with_grad(X, Y, backend=backend)
    loss, grad = fl.cross_entropy_with_grad(X, Y.astype(dtype), backend=backend)
    assert loss == expected[0]
    np.testing.assert_array_equal(grad, expected[1])
    # -100 and -1 are ignored where the dtype has them, and mean nothing where it has not.
    for ignored in (-100, -1, 60):
        target = np.where(Y < 20, ignored, Y)
        if dtype.kind == "u" and ignored < 0:
            target = np.where(Y < 20, 20, Y)
        expected = fl.nll_loss_with_grad(X, target, ignore_index=ignored, backend=backend)
        results = fl.nll_loss_with_grad(
            X, target.astype(dtype), ignore_index=ignored, backend=backend
        )
        assert results[0] == expected[0]
        np.testing.assert_array_equal(results[1], expected[1])


def test_unsigned_targets_are_not_ignored_by_wrapping(backend):
    """255 as uint8 is a class, and not the -1 to be ignored."""
    x = rng.normal(size=(3, 256)).astype(F32)
    target = np.array([255, 0, 255], np.uint8)
    expected = oracles.cross_entropy(x, target.astype(int), reduction="none")[0]
    losses = fl.cross_entropy(x, target, ignore_index=-1, reduction="none", backend=backend)
    assert_close(losses, expected, F32)


@pytest.mark.parametrize("form", FORMS)
def test_form_of_the_arrays(form, backend):
    """The memory an array lies in makes no difference.

    Bit for bit, except that Fortran order is the other kernel, for a class axis that is not last.
    """
    reform = FORMS[form]
    tolerance = 1e-6 if form == "Fortran order" else 0
    same = functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=2 * tolerance)
    soft = rng.random(X.shape).astype(F32)
    w, s = rng.random(70), rng.random(30)
    calls = {
        fl.softmax: (X,),
        fl.log_softmax: (X,),
        fl.logsumexp: (X,),
        fl.softmax_backward: (X, soft),
        fl.log_softmax_backward: (X, -soft),
    }
    for function, arrays in calls.items():
        expected = function(*arrays, backend=backend)
        result = function(*map(reform, arrays), backend=backend)
        assert type(result) is np.ndarray
        assert result.dtype == F32
        same(result, expected)
    for function, target in [
        (fl.cross_entropy_with_grad, Y),
        (fl.cross_entropy_with_grad, soft),
        (fl.nll_loss_with_grad, Y),
    ]:
        expected = function(X, target, weight=w, sample_weight=s, backend=backend)
        arrays = [reform(array) for array in (X, target, w, s)]
        before = [array.tobytes() for array in arrays]
        loss, grad = function(
            *arrays[:2], weight=arrays[2], sample_weight=arrays[3], backend=backend
        )
        # One argument alone in another form: the other forms must match it.
        mixed, _ = function(arrays[0], target, weight=w, sample_weight=s, backend=backend)
        same([loss, mixed], expected[0])
        same(grad, expected[1])
        assert before == [array.tobytes() for array in arrays]


@pytest.mark.parametrize("form", ["Fortran order", "reversed", "every other", "sliced"])
def test_form_of_out(form, backend):
    for x in (X, np.asfortranarray(X), FORMS["every other"](X)):
        out = FORMS[form](np.zeros_like(X))
        assert fl.softmax(x, out=out, backend=backend) is out
        np.testing.assert_array_equal(out, fl.softmax(x, backend=backend))
        fl.cross_entropy_with_grad(x, Y, out=out, backend=backend)
        expected = fl.cross_entropy_with_grad(x, Y, backend=backend)
        np.testing.assert_array_equal(out, expected[1])
    x = FORMS[form](X.copy())
    expected = fl.softmax(x, backend=backend)
    assert fl.softmax(x, out=x, backend=backend) is x
    np.testing.assert_array_equal(x, expected)


def test_out_may_hold_other_inputs(backend):
    """Weights and targets that lie in `out` are read before it is written."""
    soft = rng.random(X.shape).astype(F32)
    expected = fl.cross_entropy_with_grad(X, soft, backend=backend)
    out = soft.copy()
    loss, _ = fl.cross_entropy_with_grad(X, out, out=out, backend=backend)
    assert loss == expected[0]
    np.testing.assert_array_equal(out, expected[1])

    x, y, w = rng.normal(size=(40, 4)), rng.integers(0, 4, 40), rng.random(4)
    expected = fl.cross_entropy_with_grad(x, y, weight=w, backend=backend)
    out = np.zeros_like(x)
    out[7] = w
    loss, _ = fl.cross_entropy_with_grad(x, y, weight=out[7], out=out, backend=backend)
    assert loss == expected[0]
    np.testing.assert_array_equal(out, expected[1])


@pytest.mark.parametrize("shift", [-71, -70, -1, 1, 3, 70, 500])
def test_out_overlapping_the_logits(shift, backend):
    memory = np.zeros(X.size + 1200, F32)
    x = memory[600 : 600 + X.size].reshape(X.shape)
    out = memory[600 + shift : 600 + shift + X.size].reshape(X.shape)
    for function in (fl.softmax, fl.log_softmax):
        expected = function(X, backend=backend)
        x[...] = X
        function(x, out=out, backend=backend)
        np.testing.assert_array_equal(out, expected)
    loss, expected = fl.cross_entropy_with_grad(X, Y, backend=backend)
    x[...] = X
    assert fl.cross_entropy_with_grad(x, Y, out=out, backend=backend)[0] == loss
    np.testing.assert_array_equal(out, expected)
    expected = fl.logsumexp(X, backend=backend)
    x[...] = X
    out = x.reshape(-1)[35 : 35 + len(X)]
    fl.logsumexp(x, out=out, backend=backend)
    np.testing.assert_array_equal(out, expected)


def overlapping(array, out_shape, dtype, shift):
    """A copy of the array, and an `out` that begins `shift` bytes after it, in one memory."""
    size = array.nbytes + int(np.prod(out_shape)) * dtype.itemsize
    memory = np.zeros(3 * size, np.uint8)
    copy = np.ndarray(array.shape, array.dtype, memory, size)
    copy[...] = array
    return copy, np.ndarray(out_shape, dtype, memory, size + shift), memory


@pytest.mark.parametrize("dtype", [F32, np.dtype(np.float64), BFLOAT16], ids=str)
@pytest.mark.parametrize("layout", [Layout(150, 6), Layout(30, 400), Layout(3, 6, 50)], ids=str)
@pytest.mark.parametrize("case", [c for c in CASES if c.has_out], ids=lambda case: case.name)
def test_out_overlapping_any_one_input(case, layout, dtype, backend):
    """Every input of every operation, from its first byte to its last, is read before it goes."""
    problem = case.problem(layout.n, layout.num_classes, dtype)
    expected = case.call(layout, problem, backend=backend)
    arrays = [layout.arrange(array) for array in problem]
    out_shape = arrays[0].shape
    if case.returns == ("rows",):
        out_shape = tuple(np.delete(out_shape, layout.axis))
    out_bytes = int(np.prod(out_shape)) * dtype.itemsize
    for number, array in enumerate(arrays):
        step = max(array.itemsize, dtype.itemsize)
        last = (array.nbytes - 1) // step * step
        middle = array.nbytes // 2 // step * step
        before = (out_bytes - 1) // step * step
        for shift in {0, step, middle, last, -step, -before // 2 // step * step, -before}:
            given = list(arrays)
            given[number], out, memory = overlapping(array, out_shape, dtype, shift)
            untouched = memory.copy()
            results = case.pass_on(layout, given, out=out, backend=backend)
            for result, right in zip(results, expected, strict=True):
                np.testing.assert_array_equal(result, right)
            start = out.ctypes.data - memory.ctypes.data
            memory[start : start + out_bytes] = untouched[start : start + out_bytes] = 0
            np.testing.assert_array_equal(memory, untouched)


@pytest.mark.parametrize("function", [fl.softmax_backward, fl.log_softmax_backward])
@pytest.mark.parametrize("shape", [(150, 6), (30, 400)], ids=str)
def test_out_overlapping_both_inputs(function, shape, backend):
    """In every order, in whole rows and in halves of them; twice the same input, too."""
    g, p = rng.normal(size=shape), rng.random(shape)
    size = g.size
    expected = function(g, p, backend=backend)
    for g_at, p_at, out_at in [
        (0, size, size // 2), (size, 0, size // 2), (0, size, 1), (size, 0, 2 * size - 1),
        (0, size, 0), (0, size, size),
    ]:  # fmt: skip
        memory = np.zeros(3 * size)
        views = [memory[at : at + size].reshape(shape) for at in (g_at, p_at, out_at)]
        views[0][...], views[1][...] = g, p
        assert function(*views[:2], out=views[2], backend=backend) is views[2]
        np.testing.assert_array_equal(views[2], expected)
    expected = function(p, p, backend=backend)
    np.testing.assert_array_equal(function(p, p, out=p, backend=backend), expected)


def test_lists_and_scalars(backend):
    assert fl.softmax([5, 4, 2], backend=backend).dtype == np.float64
    p = fl.softmax([[5.0, 4, 2], [0, 0, 0]], backend=backend)
    assert p.shape == (2, 3)
    loss = fl.cross_entropy([[5, 4, 2]], [0], weight=[1, 2, 3], sample_weight=[2], backend=backend)
    assert loss == fl.cross_entropy([5, 4, 2], 0, backend=backend)
    losses, grad = fl.cross_entropy_with_grad(
        np.array([5, 4, 2], F32), np.int8(0), reduction="none", backend=backend
    )
    assert (losses.shape, losses.dtype, grad.shape) == ((), F32, (3,))
    out = np.empty((), F32)
    assert fl.logsumexp(np.array([5, 4, 2], F32), out=out, backend=backend) is out
    assert out == pytest.approx(5.349, abs=1e-3)
    assert fl.cross_entropy([[1, 2]], [[0.5, 0.5]], backend=backend) == pytest.approx(0.8132617)
    assert np.isnan(fl.cross_entropy(np.zeros((0, 3)), [], backend=backend))


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_integers_are_taken_as_float64(dtype, backend):
    """As scores of all functions, whether in an array or in lists."""
    x = rng.integers(0, 9, (4, 5)).astype(dtype)
    exact, lists = x.astype(float), x.tolist()
    for function in (fl.softmax, fl.log_softmax, fl.logsumexp):
        expected = function(exact, backend=backend)
        for form in (x, lists, x.astype(x.dtype.newbyteorder()), np.asfortranarray(x)):
            result = function(form, backend=backend)
            assert result.dtype == np.float64
            np.testing.assert_allclose(result, expected, rtol=1e-14)
    for function in (fl.softmax_backward, fl.log_softmax_backward):
        expected = function(exact, exact, backend=backend)
        for grad_output, forward in ((x, x), (exact, x), (x, exact), (lists, x)):
            result = function(grad_output, forward, backend=backend)
            np.testing.assert_array_equal(result, expected)
    for function in (fl.cross_entropy_with_grad, fl.nll_loss_with_grad):
        expected = function(exact, [0, 1, 2, 3], backend=backend)
        for form in (x, lists):
            loss, grad = function(form, [0, 1, 2, 3], backend=backend)
            assert loss == expected[0]
            np.testing.assert_array_equal(grad, expected[1])
    with pytest.raises(TypeError, match=f"out has dtype {dtype}, expected float64"):
        fl.softmax(x, out=x, backend=backend)


class Array:
    """What is no array, but can be read as one."""

    def __init__(self, array, dtype=None):
        self.array, self.dtype = array, dtype

    def __array__(self, dtype=None, copy=None):
        return self.array


class Interface:
    def __init__(self, array):
        self.array, self.__array_interface__ = array, array.__array_interface__


@pytest.mark.parametrize("dtype", [np.float32, np.int64])
@pytest.mark.parametrize("wrap", [Array, Interface, memoryview])
def test_what_can_be_read_as_an_array(wrap, dtype, backend):
    x, w, s = (array.astype(dtype) for array in (10 * X, np.arange(70), np.arange(30)))
    expected = fl.cross_entropy_with_grad(x, Y, weight=w, sample_weight=s, backend=backend)
    loss, grad = fl.cross_entropy_with_grad(
        wrap(x), wrap(Y), weight=wrap(w), sample_weight=wrap(s), backend=backend
    )
    assert loss == expected[0]
    np.testing.assert_array_equal(grad, expected[1])


def test_what_has_a_dtype_means_it(backend):
    """Only a bare [] is taken for no targets at all."""
    x = Array(np.array([[5, 4, 2]]), np.dtype(np.int64))
    assert fl.softmax(x, backend=backend).dtype == np.float64
    nothing = np.empty((0, 3))
    assert np.isnan(fl.cross_entropy(nothing, [], backend=backend))
    for target in (np.empty(0), Array(np.empty(0), np.dtype(float))):
        with pytest.raises(ValueError, match="target has shape"):
            fl.cross_entropy(nothing, target, backend=backend)
        with pytest.raises(TypeError, match="target has dtype float64; expected integers"):
            fl.nll_loss(nothing, target, backend=backend)


def test_data_frames(backend):
    """Those of one dtype are arrays; those of nullable columns are not, and the error says so."""
    pandas = need("pandas")
    frame = pandas.DataFrame({"a": [5.0, 1], "b": [4, 2]})
    target = pandas.Series([0, 1], index=[7, 3])
    loss, grad = fl.cross_entropy_with_grad(
        frame, target, weight=target + 1, sample_weight=target + 2, backend=backend
    )
    expected = fl.cross_entropy_with_grad(
        [[5, 4], [1, 2]], [0, 1], weight=[1, 2], sample_weight=[2, 3], backend=backend
    )
    assert loss == expected[0]
    assert type(grad) is np.ndarray
    np.testing.assert_array_equal(grad, expected[1])
    nullable = frame.astype({"a": "Float64", "b": "Int64"})
    expected = "has dtype object; .*; a data frame has .to_numpy"
    for function, arguments, name in [
        (fl.softmax, (nullable,), "logits"),
        (fl.cross_entropy, (frame, nullable), "target"),
        (functools.partial(fl.cross_entropy, weight=nullable), (frame, target), "weight"),
        (fl.linear_cross_entropy, (nullable, frame, target), "inputs"),
    ]:
        with pytest.raises(TypeError, match=f"^{name} {expected}"):
            function(*arguments, backend=backend)
    np.testing.assert_array_equal(
        fl.softmax(nullable.to_numpy(dtype=float), backend=backend),
        fl.softmax(frame, backend=backend),
    )


def test_probabilities_are_taken_as_they_are(backend):
    """Below 0, above 1, of any sum: nothing looks at them but the formula."""
    t = np.array([[-0.5, 2.0, 0.25], [0.0, 0.0, 0.0], [3.0, 4.0, 5.0]])
    x = rng.normal(size=(3, 3))
    losses, grad = fl.cross_entropy_with_grad(x, t, reduction="none", backend=backend)
    log_p = fl.log_softmax(x, backend="numpy")
    np.testing.assert_allclose(losses, -(t * log_p).sum(1), rtol=1e-13)
    expected = t.sum(1, keepdims=True) * np.exp(log_p) - t
    np.testing.assert_allclose(grad, expected, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("dtype", [np.float16, BFLOAT16, np.float32, np.float64])
def test_probabilities_of_every_float_dtype(dtype, backend):
    soft = rng.random(X.shape).astype(dtype)
    for x in (X, X.astype(float), X.astype(np.float16)):
        result = fl.cross_entropy_with_grad(x, soft, reduction="none", backend=backend)
        computed = np.float64 if x.dtype == np.float64 else np.float32
        bounds = oracles.cross_entropy_with_grad(x, soft.astype(computed), reduction="none")
        for value, bound in zip(result, bounds, strict=True):
            assert_close(value, bound, x.dtype)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.int64, np.uint8, BFLOAT16, bool])
def test_weights_of_every_real_dtype(dtype, backend):
    w, s = np.arange(70) % 5, np.arange(30) % 3
    if dtype is bool:
        w, s = w % 2, s % 2
    expected = fl.cross_entropy_with_grad(
        X, Y, weight=w.astype(float), sample_weight=s.astype(float), backend=backend
    )
    loss, grad = fl.cross_entropy_with_grad(
        X, Y, weight=w.astype(dtype), sample_weight=s.astype(dtype), backend=backend
    )
    assert loss == expected[0]
    np.testing.assert_array_equal(grad, expected[1])


def test_negative_sums_of_weights_are_no_bad_targets(backend):
    """Nor the other way round, in the first block of targets and in a later one."""
    x, y, s = np.zeros((20_000, 2)), np.zeros(20_000, int), np.full(20_000, -1.0)
    for n in (3, 20_000):
        options = {"sample_weight": s[:n], "backend": backend}
        assert fl.cross_entropy(x[:n], y[:n], **options) == pytest.approx(np.log(2))
        bad = np.where(np.arange(n) >= n - 2, 2, 0)
        with pytest.raises(IndexError, match=rf"^target\[{n - 2}\] = 2 is out of range for 2"):
            fl.cross_entropy(x[:n], bad, **options)


def test_the_mean_divides_by_the_weights_that_count(backend):
    x = rng.normal(size=(5, 3))
    y = np.array([0, 1, 2, -100, 1])
    w, s = np.array([1.0, 2.0, 4.0]), np.array([1.0, 3.0, 0.0, 9.0, 0.5])
    options = {"weight": w, "sample_weight": s, "backend": backend}
    for function, rows in [(fl.cross_entropy, x), (fl.nll_loss, fl.log_softmax(x))]:
        losses = function(rows, y, reduction="none", **options)
        total = function(rows, y, reduction="sum", **options)
        assert total == pytest.approx(losses.sum(), rel=1e-15)
        divisor = 1 * 1 + 2 * 3 + 2 * 0.5
        assert function(rows, y, **options) == pytest.approx(total / divisor, rel=1e-15)
        assert function(rows, y, normalizer=5, **options) == pytest.approx(total / 5, rel=1e-15)
    soft = rng.random((5, 3))
    total = fl.cross_entropy(x, soft, reduction="sum", **options)
    mean = fl.cross_entropy(x, soft, **options)
    assert mean == pytest.approx(total / s.sum(), rel=1e-15)
    mean = fl.cross_entropy(x, soft, weight=w, backend=backend)
    total = fl.cross_entropy(x, soft, weight=w, reduction="sum", backend=backend)
    assert mean == pytest.approx(total / 5, rel=1e-15)


def test_probabilities_that_are_one_hot_are_indices(backend):
    options = {"weight": rng.random(70), "label_smoothing": 0.1, "reduction": "sum"}
    hard = fl.cross_entropy_with_grad(X, Y, backend=backend, **options)
    soft = fl.cross_entropy_with_grad(X, np.eye(70, dtype=F32)[Y], backend=backend, **options)
    assert soft[0] == pytest.approx(hard[0], rel=1e-6)
    np.testing.assert_allclose(soft[1], hard[1], atol=1e-6)


def test_nll_of_log_softmax_is_cross_entropy(backend):
    options = {"weight": rng.random(70), "reduction": "none", "backend": backend}
    log_p = fl.log_softmax(X, backend=backend)
    np.testing.assert_allclose(
        fl.nll_loss(log_p, Y, **options), fl.cross_entropy(X, Y, **options), rtol=1e-6
    )


@pytest.mark.parametrize("axis", range(-4, 4))
def test_every_axis_of_four(axis, backend):
    x = rng.normal(size=(3, 4, 5, 6))
    last = np.ascontiguousarray(np.moveaxis(x, axis, -1))
    result = np.moveaxis(fl.softmax(x, axis, backend=backend), axis, -1)
    expected = oracles.softmax(last.reshape(-1, last.shape[-1]))[0]
    assert_close(result.reshape(expected.value.shape), expected, x.dtype)
    y = rng.integers(0, 3, last.shape[:-1])
    loss, grad = fl.cross_entropy_with_grad(x, y, axis=axis, backend=backend)
    expected = oracles.cross_entropy_with_grad(last.reshape(-1, last.shape[-1]), y.reshape(-1))
    assert_close(loss, expected[0], x.dtype)
    assert_close(np.moveaxis(grad, axis, -1).reshape(expected[1].value.shape), expected[1], x.dtype)


def test_broadcast_logits(backend):
    """All rows are the same memory."""
    x = np.broadcast_to(X[:1], (200, 70))
    result = fl.softmax(x, backend=backend)
    np.testing.assert_array_equal(result, np.repeat(fl.softmax(X[:1], backend=backend), 200, 0))
