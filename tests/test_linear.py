"""The linear head: against oracles, by chunks, over options, layouts and errors."""

import itertools

import numpy as np
import oracles
import pytest
from conftest import need

import fastloss as fl

IGNORED = -7
DTYPES = [np.float32, np.float64]
# Rows, classes, features: some blocks and a bit, one of everything, nothing.
SHAPES = [(300, 37, 11), (1000, 1500, 40), (5, 1, 3), (7, 4, 1), (1, 10, 5), (1, 1, 1), (0, 3, 2)]
LIMIT = {np.float32: 1e-5, np.float64: 1e-13}


class Problem:
    """A linear layer, targets, and options by name."""

    def __init__(self, shape, dtype, options=(), seed=0):
        rng = np.random.default_rng(seed)
        n, c, d = shape
        self.inputs = rng.normal(size=(n, d)).astype(dtype)
        self.linear_weight = (2 * rng.normal(size=(c, d)) / np.sqrt(d)).astype(dtype)
        self.target = rng.integers(0, c, n)
        known = {
            "linear_bias": rng.normal(size=c).astype(dtype),
            "weight": np.where(np.arange(c) == 1, 0.0, rng.random(c) + 0.5),
            "sample_weight": np.where(rng.random(n) < 0.2, 0.0, rng.random(n) * 3),
            "ignore_index": IGNORED,
            "label_smoothing": 0.1,
            "z_loss": 0.01,
            "l2": 0.03,
            "normalizer": 17.0,
            "sum": "sum",
            "none": "none",
        }
        self.options = {}
        for name in options:
            key = "reduction" if name in ("sum", "none") else name
            self.options[key] = known.get(name)
        if "probabilities" in self.options:
            del self.options["probabilities"]
            t = rng.gamma(0.5, size=(n, c)) + 1e-30
            self.target = (t / t.sum(axis=1, keepdims=True)).astype(dtype)
        if "ignore_index" in self.options:
            self.target[rng.random(n) < 0.3] = IGNORED

    @property
    def arguments(self):
        return self.inputs, self.linear_weight, self.target

    def loss(self, **more):
        return fl.linear_cross_entropy(*self.arguments, **self.options, **more)

    def loss_and_gradients(self, **more):
        return fl.linear_cross_entropy_with_grad(*self.arguments, **self.options, **more)

    def exact(self):
        """Loss and gradients in longdouble: of the weight, the bias and the inputs."""
        options = dict(self.options)
        bias, l2 = options.pop("linear_bias", None), options.pop("l2", 0.0)
        x, w = (a.astype(np.longdouble) for a in self.arguments[:2])
        scores = x @ w.T + (0 if bias is None else bias)
        loss, g = oracles.cross_entropy_with_grad(scores, self.target, **options)
        g = g.value
        weight_grad = g.T @ x + 2 * np.longdouble(l2) * w
        return loss.value + l2 * (w**2).sum(), (weight_grad, g.sum(axis=0), g @ w)


def close(result, right, limit, scale=1.0):
    """Relative to the largest entry, or to `scale` where all is small."""
    right = np.asarray(right, np.longdouble)
    assert np.shape(result) == right.shape
    assert np.array_equal(np.isnan(result), np.isnan(right))
    error = np.abs(np.where(np.isnan(right), 0, result - right)).max(initial=0)
    assert error <= limit * max(np.abs(np.nan_to_num(right)).max(initial=0), scale)


OPTIONS = [
    (),
    ("linear_bias",),
    ("l2",),
    ("sum",),
    ("none",),
    ("normalizer",),
    ("ignore_index",),
    ("weight",),
    ("sample_weight",),
    ("label_smoothing",),
    ("z_loss",),
    ("probabilities",),
    ("linear_bias", "l2", "sum", "ignore_index", "weight", "sample_weight"),
    ("linear_bias", "l2", "weight", "sample_weight", "label_smoothing", "z_loss", "ignore_index"),
    ("linear_bias", "none", "weight", "sample_weight", "probabilities", "label_smoothing"),
]


@pytest.mark.parametrize("options", OPTIONS, ids="+".join)
def test_against_longdouble(options, backend):
    for shape, dtype in itertools.product(SHAPES, DTYPES):
        problem = Problem(shape, dtype, options)
        right_loss, right = problem.exact()
        loss, gradients = problem.loss_and_gradients(inputs_grad=True, backend=backend)
        assert isinstance(loss, np.ndarray if "none" in options else float)
        close(loss, right_loss, LIMIT[dtype])
        close(problem.loss(backend=backend), right_loss, LIMIT[dtype])
        for result, array, name in zip(gradients, right, gradients._fields, strict=True):
            if name == "linear_bias" and "linear_bias" not in options:
                assert result is None
            else:
                assert result.dtype == dtype
                close(result, array, LIMIT[dtype], scale=1 / max(shape[0], 1))


@pytest.mark.parametrize("options", OPTIONS, ids="+".join)
def test_against_finite_differences(options, backend):
    problem = Problem((13, 4, 3), np.float64, {*options, "linear_bias"})
    _, gradients = problem.loss_and_gradients(inputs_grad=True, backend=backend)
    arrays = problem.linear_weight, problem.options["linear_bias"], problem.inputs
    for array, gradient in zip(arrays, gradients, strict=True):
        for place in np.ndindex(array.shape):
            before, h = array[place], 1e-6
            array[place] = before + h
            above = np.sum(problem.loss(backend=backend))
            array[place] = before - h
            below = np.sum(problem.loss(backend=backend))
            array[place] = before
            assert gradient[place] == pytest.approx((above - below) / (2 * h), abs=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks_change_no_bit_of_a_loss(dtype, backend):
    # Small matrices, vectors, and classes that no vector width divides: BLAS has code for each.
    for c, d, n in itertools.product((1, 2, 3, 10, 17, 1001), (1, 2, 65), (1, 5, 700, 3000)):
        if backend == "numpy" and n * c > 1e6:
            continue
        problem = Problem((n, c, d), dtype, ("linear_bias", "ignore_index", "z_loss"))
        rows = problem.loss(reduction="none", backend=backend)
        total = problem.loss(backend=backend)
        for chunk_rows, threads in itertools.product((1, 7, 64, 1000, n), (1, 2)):
            more = {"chunk_rows": chunk_rows, "backend": backend, "num_threads": threads}
            np.testing.assert_array_equal(problem.loss(reduction="none", **more), rows)
            assert problem.loss(**more) == total


@pytest.mark.parametrize("options", [(), ("ignore_index",), ("probabilities",)], ids="+".join)
def test_gradients_by_chunks(options, backend):
    problem = Problem((1000, 1500, 40), np.float32, ("linear_bias", *options))
    _, right = problem.exact()
    for chunk_rows in (1, 400, 1000):
        _, gradients = problem.loss_and_gradients(
            inputs_grad=True, chunk_rows=chunk_rows, backend=backend
        )
        for result, array in zip(gradients, right, strict=True):
            close(result, array, 1e-5, scale=0.0)


def test_accumulation_is_one_large_batch(backend):
    problem = Problem((600, 20, 7), np.float32, ("linear_bias", "ignore_index", "sample_weight"))
    used = problem.target != IGNORED
    normalizer = float(problem.options["sample_weight"][used].sum())
    loss, whole = problem.loss_and_gradients(inputs_grad=True, l2=0.1, backend=backend)

    weights = problem.options.pop("sample_weight")
    out = fl.LinearGradients(*(np.full_like(a, 9) for a in whole[:2]), None)
    parts, input_parts = 0.0, []
    for first in range(0, 600, 150):
        part = slice(first, first + 150)
        inputs = np.zeros((150, 7), np.float32)
        part_loss, gradients = fl.linear_cross_entropy_with_grad(
            problem.inputs[part], problem.linear_weight, problem.target[part],
            sample_weight=weights[part], **problem.options, normalizer=normalizer,
            l2=0.1 * (first == 0), inputs_grad=True, out=out._replace(inputs=inputs),
            accumulate=first > 0, backend=backend,
        )  # fmt: skip
        assert gradients.linear_weight is out.linear_weight
        assert gradients.linear_bias is out.linear_bias
        parts += part_loss
        input_parts.append(inputs)
    assert parts == pytest.approx(loss, rel=1e-6)
    for result, right in zip((*out[:2], np.concatenate(input_parts)), whole, strict=True):
        close(result, right, 1e-6, scale=0.0)


def test_accumulate_adds_to_everything(backend):
    problem = Problem((50, 6, 4), np.float64, ("linear_bias", "ignore_index"))
    _, once = problem.loss_and_gradients(inputs_grad=True, backend=backend)
    out = fl.LinearGradients(*(a.copy() for a in once))
    _, twice = problem.loss_and_gradients(
        inputs_grad=True, out=out, accumulate=True, backend=backend
    )
    for result, array, right in zip(twice, out, once, strict=True):
        assert result is array
        np.testing.assert_allclose(result, 2 * right, rtol=1e-14)
    _, fresh = problem.loss_and_gradients(
        out=fl.LinearGradients(None), accumulate=True, backend=backend
    )
    np.testing.assert_array_equal(fresh.linear_weight, once.linear_weight)


def test_leading_dimensions(backend):
    problem = Problem((24, 5, 3), np.float32, ("linear_bias", "sample_weight", "none"))
    loss, gradients = problem.loss_and_gradients(inputs_grad=True, backend=backend)
    for lead in [(2, 3, 4), (24, 1), (4, 6)]:
        options = problem.options | {
            "sample_weight": problem.options["sample_weight"].reshape(lead)
        }
        again, grads = fl.linear_cross_entropy_with_grad(
            problem.inputs.reshape(*lead, 3), problem.linear_weight, problem.target.reshape(lead),
            **options, inputs_grad=True, backend=backend,
        )  # fmt: skip
        np.testing.assert_array_equal(again, loss.reshape(lead))
        np.testing.assert_array_equal(grads.linear_weight, gradients.linear_weight)
        np.testing.assert_array_equal(grads.inputs, gradients.inputs.reshape(*lead, 3))
    one = fl.linear_cross_entropy(problem.inputs[0], problem.linear_weight, problem.target[0])
    assert isinstance(one, float)


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(dtype, backend):
    """Whatever the strides, the byte order or the alignment."""
    problem = Problem((200, 9, 6), dtype, ("linear_bias", "ignore_index", "sample_weight"))
    right_loss, right = problem.loss_and_gradients(inputs_grad=True, backend=backend)

    def strided(a):
        large = np.full([2 * n + 1 for n in a.shape], 99).astype(a.dtype)
        view = large[tuple(slice(1, None, 2) for _ in a.shape)]
        view[...] = a
        return view

    def misaligned(a):
        memory = np.zeros(a.nbytes + 1, np.uint8)[1:]
        view = memory.view(a.dtype).reshape(a.shape)
        view[...] = a
        return view

    arrange = [
        np.asfortranarray, strided, misaligned, lambda a: a.astype(a.dtype.newbyteorder()),
        lambda a: np.flip(np.flip(a).copy()),
    ]  # fmt: skip
    for change in arrange:
        options = {
            key: change(value) if isinstance(value, np.ndarray) else value
            for key, value in problem.options.items()
        }
        outs = [strided(np.zeros_like(a)) for a in right], [np.zeros_like(a) for a in right]
        for out in (None, *(fl.LinearGradients(*o) for o in outs)):
            loss, gradients = fl.linear_cross_entropy_with_grad(
                *map(change, problem.arguments), **options, inputs_grad=True, out=out,
                backend=backend,
            )  # fmt: skip
            assert loss == pytest.approx(right_loss, rel=LIMIT[dtype])
            for result, array in zip(gradients, right, strict=True):
                close(result, array, LIMIT[dtype])


def test_rows_that_count_for_nothing_may_hold_anything(backend):
    problem = Problem((200, 9, 6), np.float32, ("linear_bias", "ignore_index", "sample_weight"))
    problem.options["weight"] = np.where(np.arange(9) == 3, 0.0, 1.0)
    idle = (problem.target == IGNORED) | (problem.options["sample_weight"] == 0)
    idle |= problem.target == 3
    right_loss, right = problem.loss_and_gradients(inputs_grad=True, backend=backend)
    problem.inputs[idle] = np.array([np.nan, np.inf, -np.inf, 1, 2, 3])
    loss, gradients = problem.loss_and_gradients(inputs_grad=True, backend=backend)
    assert loss == right_loss
    for result, array in zip(gradients, right, strict=True):
        np.testing.assert_array_equal(result, array)
    assert not gradients.inputs[idle].any()
    assert not np.signbit(gradients.inputs[idle]).any()
    losses = problem.loss(reduction="none", backend=backend)
    assert not losses[idle].any()


def test_no_row_counts(backend):
    x, w, y = np.full((4, 2), np.nan), np.ones((3, 2)), np.full(4, -100)
    loss, gradients = fl.linear_cross_entropy_with_grad(
        x, w, y, l2=0.5, inputs_grad=True, backend=backend
    )
    assert np.isnan(loss)
    np.testing.assert_array_equal(gradients.linear_weight, w)
    np.testing.assert_array_equal(gradients.inputs, 0 * w[:1, :].repeat(4, axis=0))
    for options in ({"reduction": "sum"}, {"normalizer": 3.0}):
        loss, gradients = fl.linear_cross_entropy_with_grad(x, w, y, backend=backend, **options)
        assert loss == 0.0
        assert not gradients.linear_weight.any()


def test_a_nan_row_poisons_what_it_must(backend):
    problem = Problem((50, 4, 3), np.float64, ("none",))
    problem.inputs[7] = np.nan
    loss, gradients = problem.loss_and_gradients(inputs_grad=True, backend=backend)
    assert np.flatnonzero(np.isnan(loss)).tolist() == [7]
    assert np.isnan(gradients.linear_weight).all()
    assert np.flatnonzero(np.isnan(gradients.inputs).any(axis=1)).tolist() == [7]


def test_confident_rows(backend):
    loss = fl.linear_cross_entropy(
        np.float32([[20.0]]), np.float32([[1], [0], [0]]), [0], backend=backend
    )
    assert f"{loss:.6e}" == "4.122307e-09"


@pytest.mark.parametrize("dtype", DTYPES)
def test_l2_penalty(dtype):
    w = np.random.default_rng(0).normal(size=(3000, 300)).astype(dtype)
    right = float(0.25 * (w.astype(np.longdouble) ** 2).sum())
    assert fl.l2_penalty(w, 0.25) == pytest.approx(right, rel=1e-14)
    assert fl.l2_penalty(w.T, 0.25) == pytest.approx(right, rel=1e-14)
    assert fl.l2_penalty(w, 0.0) == 0.0
    assert fl.l2_penalty(w[:0], 1.0) == 0.0
    assert fl.l2_penalty(np.full((1, 1), 1e30, np.float32), 1.0) == pytest.approx(1e60)


@pytest.mark.parametrize("form", ["csr_array", "csc_array", "coo_array", "csr_matrix"])
def test_sparse_inputs(form, backend):
    make = getattr(need("scipy.sparse"), form)
    for dtype, options in itertools.product(DTYPES, [(), ("ignore_index",), ("probabilities",)]):
        problem = Problem((400, 30, 60), dtype, ("linear_bias", "l2", *options))
        problem.inputs[np.random.default_rng(1).random((400, 60)) < 0.9] = 0
        right_loss, right = problem.exact()
        problem.inputs = make(problem.inputs)
        for chunk_rows in (None, 7):
            loss, gradients = problem.loss_and_gradients(backend=backend, chunk_rows=chunk_rows)
            close(loss, right_loss, LIMIT[dtype])
            close(gradients.linear_weight, right[0], LIMIT[dtype], scale=0.0)
            close(gradients.linear_bias, right[1], LIMIT[dtype], scale=0.0)
            assert gradients.inputs is None


X, W, Y = np.ones((4, 3), np.float32), np.ones((5, 3), np.float32), np.array([0, 1, 2, 4])
OUT = fl.LinearGradients(np.ones_like(W))
ERRORS = [
    ({"inputs": np.float32(1)}, ValueError, "inputs is a scalar; it needs an axis of features"),
    ({"inputs": X.astype(np.float16)}, TypeError, "inputs has dtype float16; expected float32 or"),
    ({"inputs": X.astype(int)}, TypeError, "inputs has dtype int64; expected one of"),
    ({"inputs": X[:, :2]}, ValueError, r"linear_weight has shape \(5, 3\), expected \(C, 2\)"),
    ({"linear_weight": W[0]}, ValueError, r"linear_weight has shape \(3,\), expected \(C, D\)"),
    ({"linear_weight": W[:0]}, ValueError, r"linear_weight of shape \(0, 3\) has no classes"),
    ({"linear_weight": W.astype(float)}, TypeError, "linear_weight has dtype float64, expected fl"),
    ({"linear_bias": W[0]}, ValueError, r"linear_bias has shape \(3,\), expected \(5,\)"),
    ({"linear_bias": np.ones(5)}, TypeError, "linear_bias has dtype float64, expected float32"),
    ({"target": Y[:3]}, ValueError, r"target has shape \(3,\), expected \(4,\)"),
    ({"target": Y + 1}, IndexError, r"target\[3\] = 5 is out of range for 5 classes"),
    ({"target": Y - 1}, IndexError, r"target\[0\] = -1 is out of range for 5 classes"),
    ({"target": X}, ValueError, r"target has shape \(4, 3\), expected \(4, 5\)"),
    ({"weight": Y}, ValueError, r"weight has shape \(4,\), expected \(5,\)"),
    ({"sample_weight": -Y}, ValueError, r"sample_weight\[1\] = -1.0 is not a finite number"),
    ({"l2": -1}, ValueError, "l2 = -1.0 is not a finite number of at least 0"),
    ({"l2": np.nan}, ValueError, "l2 = nan is not a finite number"),
    ({"l2": "1"}, TypeError, "l2 = '1' is not a real number"),
    ({"l2": 1, "reduction": "none"}, ValueError, "l2 = 1.0 belongs to no single row"),
    ({"reduction": "avg"}, ValueError, "reduction = 'avg' is not one of"),
    ({"normalizer": 0}, ValueError, "normalizer = 0.0 is not a finite number above 0"),
    ({"label_smoothing": 2}, ValueError, "label_smoothing = 2.0 is out of range"),
    ({"z_loss": -1}, ValueError, "z_loss = -1.0 is not a finite number"),
    ({"ignore_index": 0.5}, TypeError, "ignore_index = 0.5 is not an integer"),
    ({"chunk_rows": 0}, ValueError, "chunk_rows = 0 is less than 1"),
    ({"chunk_rows": 1.5}, TypeError, "chunk_rows = 1.5 is not an integer"),
    ({"num_threads": 0}, ValueError, "num_threads = 0 is out of range"),
    ({"backend": "nump"}, ValueError, "backend = 'nump' is not a backend"),
]
GRADIENT_ERRORS = [
    ({"accumulate": True, "out": None}, ValueError, "accumulate = True, but there is no out"),
    ({"out": W}, TypeError, "out is a ndarray, expected LinearGradients"),
    ({"out": OUT._replace(inputs=X)}, ValueError, "out.inputs is given, but inputs_grad = False"),
    ({"out": OUT._replace(linear_bias=W[0])}, ValueError, "out.linear_bias is given, but there is"),
    ({"out": OUT._replace(linear_weight=X)}, ValueError, "out.linear_weight has shape"),
    ({"out": OUT._replace(linear_weight=1.0)}, TypeError, "out.linear_weight is a float, expected"),
    (
        {"out": OUT._replace(linear_weight=W.astype(float))},
        TypeError,
        "out.linear_weight has dtype float64, expected float32",
    ),
    (
        {"out": OUT._replace(inputs=OUT.linear_weight[:4]), "inputs_grad": True},
        ValueError,
        "out.linear_weight and out.inputs share memory",
    ),
]


@pytest.mark.parametrize(("wrong", "error", "message"), ERRORS + GRADIENT_ERRORS)
def test_errors(wrong, error, message, backend):
    arguments = {"inputs": X, "linear_weight": W, "target": Y, "backend": backend} | wrong
    if not {"out", "accumulate"} & set(wrong):
        with pytest.raises(error, match=message):
            fl.linear_cross_entropy(**arguments)
    out = wrong.get("out", OUT)
    given = [a for a in (out or ()) if isinstance(a, np.ndarray)]
    before = [a.copy() for a in given]
    with pytest.raises(error, match=message):
        fl.linear_cross_entropy_with_grad(**{"out": out} | arguments)
    for array, old in zip(given, before, strict=True):
        np.testing.assert_array_equal(array, old)


def test_sparse_errors():
    sparse = need("scipy.sparse")
    x = sparse.csr_array(X)
    with pytest.raises(ValueError, match="the gradient of sparse inputs is dense"):
        fl.linear_cross_entropy_with_grad(x, W, Y, inputs_grad=True)
    with pytest.raises(TypeError, match="inputs has dtype int64; expected float32 or float64"):
        fl.linear_cross_entropy(sparse.csr_array(X.astype(int)), W, Y)
    with pytest.raises(ValueError, match=r"inputs has shape \(3,\), expected \(N, D\)"):
        fl.linear_cross_entropy(sparse.coo_array(X[0]), W, Y)


def test_l2_penalty_errors():
    with pytest.raises(ValueError, match=r"linear_weight has shape \(3,\), expected \(C, D\)"):
        fl.l2_penalty(W[0], 1.0)
    with pytest.raises(ValueError, match="l2 = -1 is not a finite number"):
        fl.l2_penalty(W, -1.0)
