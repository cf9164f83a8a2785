"""The linear head: against oracles, by chunks, over options, layouts and errors."""

import _thread
import ctypes
import functools
import importlib
import itertools
import json
import math
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
import types
from pathlib import Path

import numpy as np
import pytest
import threadpoolctl
from support import oracles
from support.backends import need

import fastloss as fl
from fastloss import _blas, _reference, linear

IGNORED = -7
DTYPES = [np.float32, np.float64]
# Rows, classes, features: many chunks, one of everything, nothing.
SHAPES = [(300, 37, 11), (64, 700, 20), (5, 1, 3), (7, 4, 1), (1, 10, 5), (1, 1, 1), (0, 3, 2)]
LIMIT = {np.float32: 1e-5, np.float64: 1e-13}


@pytest.fixture
def small_chunks(monkeypatch):
    """Little work is cut up like much: here into blocks of 8 rows or so, on two threads."""
    monkeypatch.setattr(linear, "_BLOCK_BYTES", 1 << 10)
    monkeypatch.setattr(linear, "_LEAST_ROWS", 8)
    monkeypatch.setattr(linear, "_PRODUCT_ELEMENTS", 100)
    monkeypatch.setattr(linear, "_KERNEL_ELEMENTS", 100)


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
            "temperature": 0.7,
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
        if "signed" in self.options:
            del self.options["signed"]
            for name in {"weight", "sample_weight"} & set(self.options):
                weights = self.options[name]
                self.options[name] = np.where(np.arange(len(weights)) % 4 == 0, -weights, weights)

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


@functools.cache
def exact(shape, dtype, options):
    return Problem(shape, dtype, options).exact()


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
    ("temperature",),
    ("probabilities",),
    ("linear_bias", "l2", "sum", "ignore_index", "weight", "sample_weight"),
    (
        "linear_bias",
        "l2",
        "weight",
        "sample_weight",
        "signed",
        "label_smoothing",
        "z_loss",
        "temperature",
        "ignore_index",
    ),
    (
        "linear_bias",
        "none",
        "weight",
        "sample_weight",
        "signed",
        "probabilities",
        "label_smoothing",
    ),
]


@pytest.mark.parametrize("options", OPTIONS, ids="+".join)
@pytest.mark.usefixtures("small_chunks")
def test_against_longdouble(options, backend):
    for shape, dtype in itertools.product(SHAPES, DTYPES):
        problem = Problem(shape, dtype, options)
        right_loss, right = exact(shape, dtype, options)
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
@pytest.mark.usefixtures("small_chunks")
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
    shapes = [
        *itertools.product((1, 5, 700), (1, 2, 10, 17), (1, 2, 65)),
        (70_000, 17, 65), (400_000, 3, 2), (600_000, 1, 2), (1500, 1001, 65),
    ]  # fmt: skip
    for n, c, d in shapes:
        if backend == "numpy" and n > 2000:
            continue
        problem = Problem((n, c, d), dtype, ("linear_bias", "ignore_index", "z_loss"))
        rows = problem.loss(reduction="none", backend=backend)
        total = problem.loss(backend=backend)
        for chunk_rows, threads in zip((1, 7, 64, 1000, n), (1, 2, 1, 2, 1), strict=True):
            more = {"chunk_rows": chunk_rows, "backend": backend, "num_threads": threads}
            np.testing.assert_array_equal(problem.loss(reduction="none", **more), rows)
            np.testing.assert_equal(problem.loss(**more), total)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 2100, 2000), (7, 1, 5_000_000), (4099, 1001, 65)], ids=str)
def test_equal_rows_have_equal_losses(shape, dtype):
    """The last block, too, which may have a row where others have two: a vector, for BLAS."""
    problem = Problem(shape, dtype, ("none",))
    problem.inputs[...] = problem.inputs[0]
    problem.target[...] = 0
    assert len(set(problem.loss())) == 1  # on any backend, for the products are the same


@pytest.mark.parametrize("options", [(), ("ignore_index",), ("probabilities",)], ids="+".join)
def test_gradients_over_many_rows(options, backend):
    """Sums of many float32 numbers, over chunks of any size."""
    shape = (8000, 20, 6)
    problem = Problem(shape, np.float32, ("linear_bias", *options))
    _, right = exact(shape, np.float32, ("linear_bias", *options))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "_BLOCK_BYTES", 1 << 10)
        patch.setattr(linear, "_LEAST_ROWS", 8)
        for chunk_rows in (1, 400, 8000):
            _, gradients = problem.loss_and_gradients(
                inputs_grad=True, chunk_rows=chunk_rows, backend=backend
            )
            for result, array in zip(gradients, right, strict=True):
                close(result, array, 1e-5, scale=0.0)


@pytest.mark.parametrize("make", [np.asarray, "csr_array"], ids=["dense", "sparse"])
def test_reduced_losses_are_the_float64_sum_of_the_rows(make, backend):
    problem = Problem((150, 9, 4), np.float32, ("linear_bias", "ignore_index", "sample_weight"))
    if make == "csr_array":
        make = need("scipy.sparse").csr_array
    problem.inputs = make(problem.inputs)
    total = math.fsum(problem.loss(reduction="none", backend=backend))
    weights = math.fsum(problem.options["sample_weight"][problem.target != IGNORED])
    for reduction, right in (("sum", total), ("mean", total / weights)):
        for call in (problem.loss, lambda **how: problem.loss_and_gradients(**how)[0]):
            loss = call(reduction=reduction, backend=backend)
            assert loss == pytest.approx(right, rel=1e-14, abs=0)


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


@pytest.mark.usefixtures("small_chunks")
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


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("options", OPTIONS, ids="+".join)
def test_frozen_weights(options, backend):
    """All else is the same to the bit, the penalty in the loss, too."""
    for dtype in DTYPES:
        problem = Problem((300, 37, 11), dtype, options)
        for inputs_grad in (True, False):
            more = {"inputs_grad": inputs_grad, "backend": backend}
            loss, gradients = problem.loss_and_gradients(**more)
            frozen_loss, frozen = problem.loss_and_gradients(**more, linear_weight_grad=False)
            np.testing.assert_array_equal(frozen_loss, loss)
            assert frozen.linear_weight is None
            for result, right in zip(frozen[1:], gradients[1:], strict=True):
                np.testing.assert_array_equal(result, right)
    out = fl.LinearGradients(None, inputs=np.ones_like(problem.inputs))
    _, added = problem.loss_and_gradients(
        inputs_grad=True, linear_weight_grad=False, out=out, accumulate=True, backend=backend
    )
    assert added.linear_weight is None
    assert added.inputs is out.inputs
    close(added.inputs - 1, problem.exact()[1][2], 1e-13)


def test_frozen_weights_of_sparse_inputs(backend):
    problem = Problem((50, 6, 4), np.float64, ("linear_bias", "l2"))
    loss, gradients = problem.loss_and_gradients(backend=backend)
    problem.inputs = need("scipy.sparse").csr_array(problem.inputs)
    frozen_loss, frozen = problem.loss_and_gradients(linear_weight_grad=False, backend=backend)
    assert frozen_loss == pytest.approx(loss, rel=1e-13)
    assert (frozen.linear_weight, frozen.inputs) == (None, None)
    close(frozen.linear_bias, gradients.linear_bias, 1e-13)


def traced_peak(call):
    """The most memory that a call has of NumPy at a time, and what it returns."""
    call()
    tracemalloc.start()
    try:
        return call(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_frozen_weights_cost_no_product(backend):
    """Neither their gradient nor a part of it is anywhere in memory."""
    problem = Problem((16, 200, 20_000), np.float32)
    call = functools.partial(
        problem.loss_and_gradients, inputs_grad=True, num_threads=1, backend=backend
    )
    part = 4 * 25 * 20_000  # one of eight
    (_, gradients), peak = traced_peak(call)
    assert peak > gradients.linear_weight.nbytes + gradients.inputs.nbytes
    (_, gradients), peak = traced_peak(functools.partial(call, linear_weight_grad=False))
    assert gradients.inputs.nbytes < peak < gradients.inputs.nbytes + 2 * part


def test_no_gradient_at_all(monkeypatch):
    """The loss alone, then: kernels are not asked for a gradient of the scores."""
    right, asked = linear._score, []

    def score(plan, rows, scores, losses, with_grad):
        asked.append(with_grad)
        return right(plan, rows, scores, losses, with_grad)

    monkeypatch.setattr(linear, "_score", score)
    problem = Problem((64, 5, 3), np.float32, ("l2",))
    loss, gradients = problem.loss_and_gradients(linear_weight_grad=False)
    assert loss == problem.loss()
    assert gradients == (None, None, None)
    problem.loss_and_gradients(linear_weight_grad=False, inputs_grad=True)
    assert set(asked[:-1]) == {False}
    assert asked[-1]


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


@pytest.mark.usefixtures("small_chunks")
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


@pytest.mark.usefixtures("small_chunks")
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


@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.0, 0.0), (0.1, 0.0), (0.0, 0.1)])
def test_class_weights_of_zero(smoothing, z_loss, backend):
    """With smoothing a row counts for its other classes, unless these have no weight either; with
    z_loss for all of them."""
    x, w = np.float64([[1, 2], [np.nan, 1]]), np.float64([[1, 0], [0, 1], [1, 1]])
    options = {"reduction": "sum", "label_smoothing": smoothing, "z_loss": z_loss}
    call = functools.partial(
        fl.linear_cross_entropy_with_grad, x, w, [0, 1], backend=backend, **options
    )
    for weight, counts in ((np.zeros(3), z_loss), ([1.0, 0.0, 1.0], smoothing or z_loss)):
        loss, gradients = call(weight=weight)
        assert np.isnan(loss) == np.isnan(gradients.linear_weight).any() == bool(counts)
        if not np.any(weight) and not counts:
            assert loss == 0.0
            assert not gradients.linear_weight.any()


@pytest.mark.parametrize("dtype", ["int8", "uint8", "uint64", "int16", ">i4"])
def test_targets_of_every_width(dtype, backend):
    x, w = np.float64([[1, 2], [3, 1], [1, 1]]), np.float64([[1, 0], [0, 1], [1, 1]])
    right = fl.linear_cross_entropy(x, w, [0, 2, -100], reduction="none", backend=backend)
    ignored = 100 if dtype.startswith("u") else -100
    target = np.array([0, 2, ignored]).astype(dtype)
    loss = fl.linear_cross_entropy(
        x, w, target, ignore_index=ignored, reduction="none", backend=backend
    )
    np.testing.assert_array_equal(loss, right)
    largest = np.array([0, 2, (1 << 64) - 1], np.uint64)
    with pytest.raises(IndexError, match=r"target\[2\] = 18446744073709551615 is out of range"):
        fl.linear_cross_entropy(x, w, largest, ignore_index=(1 << 63) - 1, backend=backend)


def test_arrays_with_gaps_and_arguments_are_added_to_and_written(backend):
    """Where kernels cannot write: in between, and over what is still to be read."""
    problem = Problem((50, 6, 4), np.float64, ("linear_bias", "ignore_index", "l2"))
    _, right = problem.loss_and_gradients(inputs_grad=True, backend=backend)
    gaps = fl.LinearGradients(*(np.ones([2 * n for n in a.shape]) for a in right))
    out = fl.LinearGradients(*(a[tuple(slice(None, None, 2) for _ in a.shape)] for a in gaps))
    problem.loss_and_gradients(inputs_grad=True, out=out, accumulate=True, backend=backend)
    for memory, array, gradient in zip(gaps, out, right, strict=True):
        np.testing.assert_allclose(array, 1 + gradient, rtol=1e-13)
        array[...] = 1
        assert (memory == 1).all()

    own = fl.LinearGradients(problem.linear_weight, problem.options["linear_bias"], problem.inputs)
    problem.loss_and_gradients(inputs_grad=True, out=own, backend=backend)
    for array, gradient in zip(own, right, strict=True):
        np.testing.assert_array_equal(array, gradient)


@pytest.mark.parametrize(
    "name", ["inputs", "linear_weight", "linear_bias", "target", "weight", "sample_weight"]
)
@pytest.mark.parametrize("rows", [5, 50])  # with few of them the bias is no column of a copy
def test_gradients_may_go_over_any_argument(name, rows, backend):
    problem = Problem((rows, 6, 4), np.float64, ("linear_bias", "weight", "sample_weight"))
    _, right = problem.loss_and_gradients(backend=backend)
    names = ("inputs", "linear_weight", "target")
    arguments = dict(zip(names, problem.arguments, strict=True)) | problem.options
    array = arguments[name]
    memory = np.zeros(1600, np.uint8)
    arguments[name] = memory[: array.nbytes].view(array.dtype).reshape(array.shape)
    arguments[name][...] = array
    out = fl.LinearGradients(memory[:192].view(np.float64).reshape(6, 4))
    _, gradients = fl.linear_cross_entropy_with_grad(**arguments, out=out, backend=backend)
    assert gradients.linear_weight is out.linear_weight
    for result, expected in zip(gradients[:2], right[:2], strict=True):
        np.testing.assert_array_equal(result, expected)


def test_gradients_may_go_over_sparse_inputs(backend):
    sparse = need("scipy.sparse")
    problem = Problem((50, 6, 4), np.float64, ("linear_bias", "l2"))
    _, right = problem.loss_and_gradients(backend=backend)
    for part in ("data", "indices", "indptr"):
        memory = np.zeros(1600, np.uint8)
        inputs = sparse.csr_array(problem.inputs)
        array = getattr(inputs, part)
        moved = memory[: array.nbytes].view(array.dtype)
        moved[...] = array
        setattr(inputs, part, moved)
        out = fl.LinearGradients(memory[:192].view(np.float64).reshape(6, 4))
        _, gradients = fl.linear_cross_entropy_with_grad(
            inputs, *problem.arguments[1:], **problem.options, out=out, backend=backend
        )
        assert gradients.linear_weight is out.linear_weight
        for result, array in zip(gradients[:2], right[:2], strict=True):
            close(result, array, 1e-13)


def test_gradients_may_lie_between_one_another(backend):
    """The bias may be one more column of the weight."""
    problem = Problem((50, 6, 4), np.float32, ("linear_bias",))
    _, right = problem.loss_and_gradients(backend=backend)
    both = np.zeros((6, 5), np.float32)
    problem.loss_and_gradients(out=fl.LinearGradients(both[:, :4], both[:, 4]), backend=backend)
    np.testing.assert_array_equal(both, np.column_stack(right[:2]))
    with pytest.raises(ValueError, match=r"out.linear_weight and out.linear_bias share memory"):
        problem.loss_and_gradients(out=fl.LinearGradients(both[:, :4], both[:, 3]), backend=backend)


def test_penalties_beyond_float32(backend):
    problem = Problem((5, 3, 2), np.float32)
    problem.linear_weight[0] = 0
    _, gradients = problem.loss_and_gradients(l2=1e39, backend=backend)
    assert np.isfinite(gradients.linear_weight[0]).all()
    assert np.isinf(gradients.linear_weight[1:]).all()
    problem.linear_weight[...] = 3e35
    problem.inputs[...] = 0
    _, gradients = problem.loss_and_gradients(l2=1e-42, backend=backend)
    np.testing.assert_allclose(gradients.linear_weight, 6e-7, rtol=1e-6)


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


@pytest.mark.usefixtures("small_chunks")
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


@pytest.mark.usefixtures("small_chunks")
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
    ({"inputs": X.astype(bool)}, TypeError, "inputs has dtype bool; expected integers or float32"),
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
    ({"sample_weight": Y * np.nan}, ValueError, r"sample_weight\[0\] = nan is not a finite number"),
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
    ({"accumulate": "no"}, TypeError, "accumulate = 'no' is not True or False"),
    ({"inputs_grad": [True]}, TypeError, r"inputs_grad = \[True\] is not True or False"),
    ({"linear_weight_grad": 0}, TypeError, "linear_weight_grad = 0 is not True or False"),
    (
        {"linear_weight_grad": False},
        ValueError,
        "out.linear_weight is given, but linear_weight_grad = False",
    ),
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
    if not {"out", "accumulate", "inputs_grad", "linear_weight_grad"} & set(wrong):
        with pytest.raises(error, match=message):
            fl.linear_cross_entropy(**arguments)
    out = wrong.get("out", OUT)
    given = [a for a in out if isinstance(a, np.ndarray)] if isinstance(out, tuple) else []
    before = [a.copy() for a in given]
    with pytest.raises(error, match=message):
        fl.linear_cross_entropy_with_grad(**{"out": out} | arguments)
    for array, old in zip(given, before, strict=True):
        np.testing.assert_array_equal(array, old)


@pytest.mark.parametrize("dtype", [np.int64, np.uint8])
def test_integers_are_taken_as_float64(dtype, backend):
    """Counts of words, for one, which scikit-learn hands out as a sparse matrix of integers."""
    counts = np.random.default_rng(0).integers(0, 9, (30, 4)).astype(dtype)
    w, b = counts[:3], counts[3, :3]
    target, options = np.arange(30) % 3, {"backend": backend, "l2": 0.5}
    layers = [(counts, w, b), (counts.tolist(), w.tolist(), b.tolist())]
    sparse = need("scipy.sparse")
    layers += [(sparse.csr_array(counts), w, b), (sparse.coo_matrix(counts), w, b)]
    loss, grad = fl.linear_cross_entropy_with_grad(
        counts.astype(float), w.astype(float), target, linear_bias=b.astype(float), **options
    )
    for x, weight, bias in layers:
        result, gradients = fl.linear_cross_entropy_with_grad(
            x, weight, target, linear_bias=bias, **options
        )
        assert result == pytest.approx(loss, rel=1e-14)
        for array, expected in zip(gradients[:2], grad[:2], strict=True):
            assert array.dtype == np.float64
            np.testing.assert_allclose(array, expected, rtol=1e-12, atol=1e-13)
    assert fl.l2_penalty(w, 0.5) == 0.5 * float((w.astype(float) ** 2).sum())


def test_sparse_errors():
    sparse = need("scipy.sparse")
    x = sparse.csr_array(X)
    with pytest.raises(ValueError, match="the gradient of sparse inputs is dense"):
        fl.linear_cross_entropy_with_grad(x, W, Y, inputs_grad=True)
    with pytest.raises(TypeError, match="inputs has dtype bool; expected float32 or float64"):
        fl.linear_cross_entropy(sparse.csr_array(X.astype(bool)), W, Y)
    with pytest.raises(ValueError, match=r"inputs has shape \(3,\), expected \(N, D\)"):
        fl.linear_cross_entropy(sparse.coo_array(X[0]), W, Y)


def test_outputs_of_which_it_is_hard_to_tell_whether_they_overlap():
    """They count as if they did: numpy.shares_memory would work on such strides for ages."""
    memory = bytearray(1 << 18)
    w = np.ndarray((28, 51), np.float32, memory, 0, (5033, 52))
    x = np.ndarray((37, 51), np.float32, memory, 197, (2451, 26))
    with pytest.raises(np.exceptions.TooHardError):
        np.shares_memory(w, x, max_work=10_000)
    with pytest.raises(ValueError, match=r"out.linear_weight and out.inputs share memory"):
        fl.linear_cross_entropy_with_grad(
            np.zeros((37, 51), np.float32), np.zeros((28, 51), np.float32), np.zeros(37, int),
            inputs_grad=True, out=fl.LinearGradients(w, None, x),
        )  # fmt: skip
    assert not any(memory)


@pytest.mark.parametrize("form", ["csr", "csc", "bsr", "coo", "lil", "dok"])
@pytest.mark.parametrize("index", [-1, 4, 10**6])
def test_sparse_inputs_whose_indices_lie(form, index, backend):
    matrix = need("scipy.sparse").coo_array(X).asformat(form)
    arguments = (W, Y)
    if form == "lil":
        matrix.rows[0][0] = index
    elif form == "dok":
        matrix._dict[0, index] = 1.0  # past its checks
    elif form == "coo":
        matrix.col[0] = index
    else:
        matrix.indices[0] = index
    with pytest.raises(ValueError, match=r"inputs is not a valid sparse matrix: .*ind"):
        fl.linear_cross_entropy(matrix, *arguments, backend=backend)


def test_sparse_inputs_whose_lengths_lie(backend):
    sparse = need("scipy.sparse")
    longer, shorter, dia = sparse.lil_array(X), sparse.lil_array(X), sparse.dia_array(X)
    longer.data[0] = [1.0] * 100_000
    shorter.rows[0] = [0] * 100_000
    dia.offsets = np.append(dia.offsets, dia.offsets)
    for matrix in (longer, shorter, dia):
        with pytest.raises(ValueError, match=r"inputs is not a valid sparse matrix: .*index"):
            fl.linear_cross_entropy(matrix, W, Y, backend=backend)


def test_sparse_inputs_whose_rows_lie(backend):
    matrix = need("scipy.sparse").csr_array(X)
    matrix.indptr[-1] = 10**6
    with pytest.raises(ValueError, match="inputs is not a valid sparse matrix"):
        fl.linear_cross_entropy(matrix, W, Y, backend=backend)


def test_a_check_leaves_sparse_inputs_alone(backend):
    """SciPy's own would cut off what lies behind the last entry."""
    matrix = need("scipy.sparse").csr_array(X)
    data, indices = (np.append(a, a[:1]) for a in (matrix.data, matrix.indices))
    matrix.data, matrix.indices = data, indices
    right = fl.linear_cross_entropy(X, W, Y, backend=backend)
    assert fl.linear_cross_entropy(matrix, W, Y, backend=backend) == pytest.approx(right)
    assert matrix.data is data
    assert matrix.indices is indices


def test_l2_penalty_errors():
    with pytest.raises(ValueError, match=r"linear_weight has shape \(3,\), expected \(C, D\)"):
        fl.l2_penalty(W[0], 1.0)
    with pytest.raises(ValueError, match=r"l2 = -1.0 is not a finite number"):
        fl.l2_penalty(W, -1.0)


def test_from_several_python_threads_at_once(backend):
    problem = Problem((3000, 400, 20), np.float32, ("linear_bias",))
    call = functools.partial(
        problem.loss_and_gradients, inputs_grad=True, backend=backend, num_threads=2
    )
    right_loss, right = call()
    results = []
    threads = [threading.Thread(target=lambda: results.append(call())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    for loss, gradients in results:
        assert loss == pytest.approx(right_loss, rel=1e-6)
        for result, array in zip(gradients, right, strict=True):
            close(result, array, 1e-5, scale=0.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(300, 37, 11), (5, 700, 20)], ids=str)
def test_threads_change_no_bit(shape, dtype, small_chunks, backend):
    """Of many chunks, and of one whose classes are shared out."""
    problem = Problem(shape, dtype, ("linear_bias", "sample_weight"))
    results = [
        problem.loss_and_gradients(inputs_grad=True, backend=backend, num_threads=threads)
        for threads in (1, 2, 3, 50)
    ]
    (loss, gradients), *others = results
    assert loss == problem.loss(backend=backend, num_threads=3)
    for other_loss, other_gradients in others:
        assert other_loss == loss
        for result, right in zip(other_gradients, gradients, strict=True):
            np.testing.assert_array_equal(result, right)


@pytest.fixture
def threads_in_kernels(monkeypatch):
    """Those that call the kernel, each of which waits until so many others have."""
    seen = types.SimpleNamespace(threads=set(), everybody=None)

    def kernel(scores, *arguments):
        if threading.get_ident() not in seen.threads:
            seen.threads.add(threading.get_ident())
            seen.everybody.wait()
        return 0.0

    monkeypatch.setattr(_reference, "cross_entropy", kernel)
    return seen


@pytest.mark.parametrize(
    ("shape", "most"),
    [((16, 37, 11), 6), ((3, 1000, 11), 3), ((40, 3, 2), 1)],
    ids=["two chunks, three parts of each", "three rows", "one chunk, one part"],
)
def test_as_many_threads_as_there_is_to_do(shape, most, small_chunks, threads_in_kernels):
    """Whoever has no chunk of its own helps with the rows of another's."""
    problem = Problem(shape, np.float32)
    for asked in (1, 2, most, 20):
        used = min(asked, most)
        threads_in_kernels.threads.clear()
        threads_in_kernels.everybody = threading.Barrier(used, timeout=60)
        problem.loss(backend="numpy", num_threads=asked)
        assert len(threads_in_kernels.threads) == used


@pytest.mark.parametrize(("threads", "owners"), [(1, 1), (2, 1), (3, 2), (7, 5)])
def test_scores_have_so_much_room(threads, owners, small_chunks, monkeypatch, backend):
    """There is more for more threads; those beyond it have none of their own, and help."""
    monkeypatch.setattr(linear, "_MOST_BYTES", 1 << 13)
    monkeypatch.setattr(linear, "_THREAD_BYTES", 1 << 12)
    problem = Problem((64, 700, 20), np.float32)  # chunks of two rows, 5600 bytes
    right, seen = linear._score_by_parts, []

    def score(*arguments):
        time.sleep(0.002)  # for others to begin a chunk, too
        seen.append((threading.get_ident(), arguments[2].nbytes))
        right(*arguments)

    loss = problem.loss(backend=backend, num_threads=1)
    monkeypatch.setattr(linear, "_score_by_parts", score)
    assert problem.loss(backend=backend, num_threads=threads) == loss
    ids, sizes = zip(*seen, strict=True)
    assert set(sizes) == {5600}
    assert len(set(ids)) == owners


def watch_chunks(monkeypatch, at_the_fifth):
    """The rows of each chunk that the reference sees; something happens at the fifth."""
    right, rows = _reference.cross_entropy, []

    def kernel(scores, *arguments):
        rows.append(len(scores))
        if len(rows) == 5:
            at_the_fifth()
        time.sleep(0.001)
        return right(scores, *arguments)

    monkeypatch.setattr(_reference, "cross_entropy", kernel)
    return rows


def test_an_error_in_one_thread(small_chunks, monkeypatch):
    """The others leave their chunks and wait for nobody."""

    def fail():
        time.sleep(0.2)  # by then the others wait to add their chunks
        raise MemoryError("no scratch")

    rows = watch_chunks(monkeypatch, fail)
    problem = Problem((3000, 37, 11), np.float32)
    for threads in (1, 3):
        rows.clear()
        with pytest.raises(MemoryError, match="no scratch"):
            problem.loss_and_gradients(backend="numpy", num_threads=threads)
        assert sum(rows) < 1000


def raise_interrupt(*arguments):
    raise KeyboardInterrupt


signals = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers on this system")


@pytest.fixture
def interruptible():
    """Whoever starts the tests in the background of a shell has Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@signals
@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_ends_a_call(small_chunks, monkeypatch):
    main = threading.main_thread().ident
    rows = watch_chunks(monkeypatch, lambda: signal.pthread_kill(main, signal.SIGINT))
    problem = Problem((3000, 37, 11), np.float32)
    for threads in (1, 3):
        rows.clear()
        with pytest.raises(KeyboardInterrupt):
            problem.loss_and_gradients(backend="numpy", num_threads=threads)
        count = len(rows)
        time.sleep(0.05)
        assert len(rows) == count < 100


@signals
def test_interrupts(python):
    """Ctrl-C at any moment: the call ends, and the next one is right."""
    python(
        "import signal, numpy as np, fastloss as fl\n"
        "from fastloss import linear\n"
        "def interrupt(*_): raise KeyboardInterrupt\n"
        "signal.signal(signal.SIGALRM, interrupt)\n"
        "linear._LEAST_ROWS = linear._BLOCK_PRODUCTS = 8\n"
        "x, w, y = np.ones((100, 3)), np.ones((4, 3)), np.zeros(100, int)\n"
        "def call(): return fl.linear_cross_entropy_with_grad(x, w, y, num_threads=3)[0]\n"
        "right, interrupted = call(), 0\n"
        "rng = np.random.default_rng(0)\n"
        "for _ in range(3000):\n"
        "    try:\n"
        "        signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-6, 1e-3))\n"
        "        call()\n"
        "        signal.setitimer(signal.ITIMER_REAL, 0)\n"
        "    except KeyboardInterrupt:\n"
        "        interrupted += 1\n"
        "signal.setitimer(signal.ITIMER_REAL, 0)\n"
        "assert interrupted > 300 and call() == right, interrupted\n"
    )


def test_threads_that_the_system_refuses(small_chunks, monkeypatch, backend):
    """Those that there are do the work, and no error is raised."""
    problem = Problem((2000, 60, 5), np.float32)
    right = problem.loss(backend=backend, num_threads=1)
    start, started = _thread.start_new_thread, []

    def refuse(*arguments):
        if len(started) == most:
            raise RuntimeError("can't start new thread")
        started.append(start(*arguments))

    monkeypatch.setattr(_thread, "start_new_thread", refuse)
    for most in (0, 1):
        started.clear()
        assert problem.loss(backend=backend, num_threads=4) == right
        assert len(started) == most


def blas_threads():
    """Of NumPy's BLAS; others, that of SciPy for one, are left alone."""
    (found,) = {
        pool["num_threads"]
        for pool in threadpoolctl.threadpool_info()
        if pool["user_api"] == "blas" and "numpy" in pool["filepath"]
    }
    return found


own_blas = pytest.mark.skipif(not _blas.can_be_held(), reason="NumPy has another BLAS")


def test_the_blas_of_numpy_is_known():
    """That of its wheels is, at least."""
    if np.show_config(mode="dicts")["Build Dependencies"]["blas"]["name"] == "scipy-openblas":
        assert _blas.can_be_held()


@own_blas
def test_blas_has_one_thread_during_a_call(small_chunks, monkeypatch, backend):
    right, seen = linear._score, []

    def score(*arguments):
        seen.append(blas_threads())
        right(*arguments)

    monkeypatch.setattr(linear, "_score", score)
    problem = Problem((100, 37, 11), np.float32)
    with threadpoolctl.threadpool_limits(3, user_api="blas"):
        problem.loss_and_gradients(backend=backend, num_threads=2)
        assert blas_threads() == 3
        monkeypatch.setattr(linear, "_score", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            problem.loss(backend=backend, num_threads=2)
        assert blas_threads() == 3
    assert len(seen) > 10
    assert set(seen) == {1}


@pytest.mark.parametrize("reason", ["another library", "no library"])
def test_a_blas_that_cannot_be_held(reason, small_chunks, monkeypatch):
    """It keeps its threads, and one thread takes the chunks."""

    def load(path):
        if reason == "no library":
            raise OSError(path)
        return types.SimpleNamespace()

    monkeypatch.setattr(ctypes, "CDLL", load)
    monkeypatch.setattr(_blas, "_openblas", _blas._openblas.__wrapped__)
    assert not _blas.can_be_held()
    problem, threads = Problem((100, 37, 11), np.float32), set()
    right = linear._score

    def score(*arguments):
        threads.add(threading.get_ident())
        right(*arguments)

    monkeypatch.setattr(linear, "_score", score)
    loss, gradients = problem.loss_and_gradients(num_threads=4)
    assert threads == {threading.get_ident()}
    exact_loss, (weight_grad, *_) = problem.exact()
    assert loss == pytest.approx(float(exact_loss), rel=1e-5)
    close(gradients.linear_weight, weight_grad, 1e-5)


@own_blas
def test_blas_is_set_free_by_the_last_who_lets_go():
    holds, may_go = threading.Event(), threading.Event()

    def other():
        _blas.one_thread.hold()
        holds.set()
        may_go.wait()
        _blas.one_thread.release()

    with threadpoolctl.threadpool_limits(2, user_api="blas"):
        _blas.one_thread.hold()
        thread = threading.Thread(target=other)
        thread.start()
        holds.wait()
        _blas.one_thread.release()
        assert blas_threads() == 1
        may_go.set()
        thread.join()
        assert blas_threads() == 2


@own_blas
def test_what_others_set_meanwhile_stays():
    with threadpoolctl.threadpool_limits(2, user_api="blas"):
        _blas.one_thread.hold()
        _blas._openblas().set_num_threads(3)
        _blas.one_thread.release()
        assert blas_threads() == 3


@own_blas
def test_an_interrupt_while_blas_is_held(monkeypatch):
    """It is not held for good."""
    with threadpoolctl.threadpool_limits(2, user_api="blas"):
        problem = Problem((10, 3, 2), np.float32)
        release = _blas.one_thread.release
        monkeypatch.setattr(_blas.one_thread, "release", raise_interrupt)
        with pytest.raises(KeyboardInterrupt):
            problem.loss()
        monkeypatch.setattr(_blas.one_thread, "release", release)
        assert blas_threads() == 1
        problem.loss()
        assert blas_threads() == 2


@own_blas
def test_a_fork_during_a_call(python):
    """The child gets the threads of BLAS back, and is not shut out by who is not there."""
    python(
        "import os, threading, fastloss as fl\n"
        "from fastloss import _blas\n"
        "blas = _blas._openblas()\n"
        "blas.set_num_threads(2)\n"
        "inside, leave = threading.Event(), threading.Event()\n"
        "def call():\n"
        "    _blas.one_thread.hold()\n"
        "    with _blas.one_thread._lock:\n"
        "        inside.set(); leave.wait()\n"
        "    _blas.one_thread.release()\n"
        "thread = threading.Thread(target=call); thread.start(); inside.wait()\n"
        "pid = os.fork()\n"
        "if not pid:\n"
        "    right = blas.get_num_threads() == 2\n"
        "    fl.linear_cross_entropy([[1.0]], [[1.0], [1.0]], [0])\n"
        "    os._exit(not right or blas.get_num_threads() != 2)\n"
        "during = blas.get_num_threads()\n"
        "leave.set(); thread.join()\n"
        "assert os.waitpid(pid, 0)[1] == 0\n"
        "assert during == 1 and blas.get_num_threads() == 2\n"
    )


def test_after_a_fork(python):
    """A child has none of the parent's threads, and needs none."""
    python(
        "import os, numpy as np, fastloss as fl\n"
        "x, w = np.ones((3000, 4)), np.ones((500, 4))\n"
        "y = np.zeros(3000, int)\n"
        "right = fl.linear_cross_entropy(x, w, y, num_threads=2)\n"
        "pid = os.fork()\n"
        "if not pid:\n"
        "    os._exit(fl.linear_cross_entropy(x, w, y, num_threads=2) != right)\n"
        "assert os.waitpid(pid, 0)[1] == 0\n"
    )


def test_nothing_is_imported_for_it(python):
    loaded = python(
        "import sys, fastloss as fl\n"
        "fl.linear_cross_entropy([[1.0]], [[1.0], [2.0]], [0], backend='cython')\n"
        "print({'scipy', 'numba', 'concurrent.futures'} & set(sys.modules))"
    )
    assert loaded == "set()"


BENCHMARK = Path(__file__).parents[1] / "bench/linear.py"


def peak_mib(backend, shape):
    """Resident memory beyond arguments and gradients, in a process of its own."""
    command = [sys.executable, BENCHMARK, "--peak", backend, *map(str, shape)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(result.stdout)


# Before the last rows come, all memory has long been taken; the scores alone: 200 MB and 13 GB.
@pytest.mark.parametrize("backend", ["cython", "numba"])
@pytest.mark.parametrize(
    "rows", [1024, pytest.param(65536, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])]
)
def test_peak_memory(rows, backend):
    need("rich")
    peak = peak_mib(backend, (rows, 64, 50000))
    assert 10 < peak < 96  # the scores of each of two threads take 32, and a product 4


def test_benchmark(tmp_path, monkeypatch):
    """It runs, and its tables go between the markers; memory and PyTorch are not measured here."""
    need("rich")
    benchmark = importlib.import_module(BENCHMARK.stem)
    monkeypatch.setattr(benchmark, "peak_memory", lambda shape, backend: 12.3)
    monkeypatch.setattr(benchmark, "torch_calls", lambda *_: {})
    table, readme = tmp_path / "linear.json", tmp_path / "README.md"
    readme.write_text("before\n<!-- linear:begin -->\nold\n<!-- linear:end -->\nafter\n")
    files = ["--json", str(table), "--readme", str(readme)]
    benchmark.main(["--quick", "--rounds", "1", *files])
    results = json.loads(table.read_text())
    assert {(r["shape"], r["with_grad"]) for r in results["times"]} == {
        ("256x16x100", True),
        ("256x16x100", False),
    }
    for result in results["times"]:
        assert {"limit", "products", "cython", "numba"} <= set(result["best"])
        assert all(seconds > 0 for seconds in result["best"].values())
    text = readme.read_text()
    assert text.startswith("before\n<!-- linear:begin -->\nMeasured on ")
    assert text.endswith("<!-- linear:end -->\nafter\n")
    assert "| 256x16x100 | loss and gradients |" in text
    assert "| 512x8x2000 | 12.3 MiB | 12.3 MiB |" in text
    assert "old" not in text
