"""A row's bits depend on the row alone.

Not on threads, the batch, its position there, the alignment, strides or `out`: every operation of
the table is tried on the backend of the fixture, which is each instruction set in turn.
"""

import math

import numpy as np
import pytest
from support.cases import CASES, FLOATS, HALVES, SOME_LAYOUTS, Layout

import fastloss as fl

# Enough elements for more than one thread, in tiles, in groups of rows and in long rows.
THREADED = [
    Layout(*shape)
    for shape in [(9000, 5), (401, 100), (33, 1025), (2, 20000), (7, 70, 100), (2, 4, 9001)]
]
THREADS = [1, 3, 8]  # two are what all other tests run on
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def _row_by_row(case):
    """The case with losses and gradients that are no share of a mean over the batch."""
    if not case.is_loss or case.options.get("reduction") == "sum" or "normalizer" in case.options:
        return case
    return case._replace(options={**case.options, "reduction": "none"})


def _distinct(cases):
    key = lambda case: (case.function, case.inputs, case.arrays, sorted(case.options.items()))  # noqa: E731
    return list({repr(key(case)): case for case in cases}.values())


row_cases = pytest.mark.parametrize(
    "case", _distinct(_row_by_row(case) for case in CASES), ids=lambda case: case.name
)


def bits(results):
    """Bytes, so that NaN equals NaN and -0 does not equal +0."""
    return [np.ascontiguousarray(result).tobytes() for result in results]


@every_case
@pytest.mark.parametrize("dtype", [FLOATS[0], FLOATS[1], HALVES[0]], ids=str)
@pytest.mark.parametrize("layout", THREADED, ids=str)
def test_any_number_of_threads(case, layout, dtype, backend):
    problem = case.problem(layout.n, layout.num_classes, dtype)
    first, *others = (
        bits(case.call(layout, problem, backend=backend, num_threads=n)) for n in THREADS
    )
    assert all(other == first for other in others)


@row_cases
@pytest.mark.parametrize("dtype", [FLOATS[0], HALVES[1]], ids=str)
@pytest.mark.parametrize("num_classes", [1, 2, 10, 65, 1000, 2100])
def test_alone_or_in_any_batch(case, dtype, num_classes, backend):
    n = 150  # more than two tiles
    whole = case.problem(n, num_classes, dtype)
    batch = case.call(Layout(n, num_classes), whole, backend=backend)
    for start, stop in [
        (0, 1), (1, 2), (77, 78), (149, 150), (1, 150), (0, 63), (3, 67), (60, 130),
    ]:  # fmt: skip
        layout = Layout(stop - start, num_classes)
        check_part(case, layout, whole, slice(start, stop), batch, backend)


MIXED = [2, 3, 8, 10, 33, 47, 48, 100, 128, 129, 300, 301, 1000]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("num_classes", MIXED)
def test_beside_rows_of_any_kind(num_classes, dtype, backend):
    """In reversed order, in parts and alone, whichever axis the classes are."""
    scores, target = rows_of_all_kinds(num_classes, dtype)
    n = len(scores)
    whole = results_for(scores, target, 1, backend)
    parts = [slice(None, None, -1), *(slice(i, i + k) for k in (1, 7) for i in range(0, n, k))]
    for axis in [1] if backend == "numpy" else [0, 1]:  # NumPy adds up in an order by the layout
        for part in parts:
            results = results_for(scores[part], target[part], axis, backend)
            assert bits(results) == bits(result[part] for result in whole)


@pytest.mark.parametrize("dtype", [*FLOATS, HALVES[0]], ids=str)
def test_long_rows_on_any_number_of_threads(dtype, backend):
    """Threads share a row, or take one each: tame, too high to be, with NaN and with +inf."""
    if backend == "numba" and dtype == HALVES[0]:
        pytest.skip("every type is seconds of compilation")
    few = backend == "numba" and dtype == FLOATS[1]
    results = gradients_for_long if few else results_for_long
    num_classes = 70001
    scores = 3 * np.random.default_rng(0).standard_normal((4, num_classes))
    scores[0, ::3] = -np.inf
    scores[1] += 400 if dtype.itemsize == 8 else 44
    scores[2, 5000] = np.nan
    scores[3, 60000] = np.inf
    scores, target = scores.astype(dtype), np.array([0, 40000, 5000, num_classes - 1])
    for part in [slice(0, 4), *(slice(i, i + 1) for i in range(4))]:
        first, *others = (
            bits(results(scores[part], target[part], backend=backend, num_threads=n))
            for n in THREADS
        )
        assert all(other == first for other in others)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_shared_rows_to_their_last_blocks(dtype, backend):
    """There are targets and maxima in both ends, and a row of NaN that counts for nothing."""
    if backend == "numba" and dtype != FLOATS[0]:
        pytest.skip("every type is seconds of compilation")
    rng = np.random.default_rng(1)
    scores = rng.standard_normal((4, 33000))
    scores[0, -1] = 9
    scores[2, 7::500] = np.nan
    scores[3] += 400 if dtype.itemsize == 8 else 44
    scores[3, [5, -2]] = scores[3].max() + 30
    scores, target = scores.astype(dtype), np.array([32999, 19997, 3, 32998])
    soft = rng.random(scores.shape).astype(dtype) / 20000
    weights = {"sample_weight": [1.5, 0.5, 0, 3], "weight": 1 + np.arange(scores.shape[1]) % 7 / 10}
    log_probs = np.nan_to_num(scores) / 8
    log_probs[:2] -= 9
    log_probs[1, -3] = 2

    def results(n):
        how = {"backend": backend, "num_threads": n}
        plain = {"ignore_index": 3, "weight": weights["weight"], **how}
        losses, grad = fl.cross_entropy_with_grad(scores, target, reduction="none", **plain)
        total = fl.cross_entropy(scores, target, reduction="sum", **plain)
        assert total == pytest.approx(math.fsum(losses.tolist()), rel=1e-14, abs=0)
        assert not grad[2].any()
        return [
            losses,
            grad,
            fl.softmax(scores, **how),
            fl.log_softmax_backward(soft, log_probs, **how),
            *fl.cross_entropy_with_grad(
                scores, target, reduction="none", z_loss=1e-3, **weights, **how
            ),
            *(
                result
                for y in (target, soft)
                for result in fl.cross_entropy_with_grad(
                    scores, y, reduction="none", label_smoothing=0.1, **weights, **how
                )
            ),
        ]

    assert bits(results(8)) == bits(results(1))


def gradients_for_long(scores, target, **how):
    """Of what is compiled for other tests, too. Sums of float64 show their order."""
    _, grad = fl.cross_entropy_with_grad(scores, target, reduction="none", **how)
    return [np.where(np.isnan(grad), np.nan, grad)]


def results_for_long(scores, target, **how):
    """What all operations return, in place where there is a choice, NaN being NaN."""
    soft, out = scores == np.nanmax(scores, axis=1, keepdims=True), scores.copy()
    smooth = {"label_smoothing": 0.1, "weight": np.arange(scores.shape[1]) % 7}
    upstream, log_probs = np.sin(np.nan_to_num(scores)), -np.abs(scores)
    positive = np.minimum(scores, 50)
    mirrored = scores.shape[1] - 1 - target  # targets in a last block, and in a first
    huge = upstream * np.finfo(scores.dtype).max
    results = [
        fl.softmax(out, out=out, **how),
        fl.log_softmax(scores, **how),
        fl.logsumexp(scores, **how),
        fl.cross_entropy(scores, target, reduction="none", **how),
        *fl.cross_entropy_with_grad(scores, target, reduction="sum", z_loss=1e-3, **how),
        *fl.cross_entropy_with_grad(scores, target, reduction="none", **smooth, **how),
        *fl.cross_entropy_with_grad(scores, soft.astype(scores.dtype), reduction="none", **how),
        *fl.cross_entropy_with_grad(
            scores, mirrored, ignore_index=scores.shape[1] - 1 - 40000, out=scores.copy(), **how
        ),
    ]
    for gradient in (upstream, huge):
        results += [fl.softmax_backward(gradient, np.exp(log_probs), **how)]
        results += [fl.log_softmax_backward(gradient, positive, **how)]
    return [np.where(np.isnan(a), np.nan, a) for a in results]


def rows_of_all_kinds(num_classes, dtype, n=84):
    """Runs of alike rows with others among them: tame, too high or low to be, NaN and -inf."""
    rng = np.random.default_rng(num_classes)
    high, low = (44, -14) if dtype.itemsize == 4 else (340, -300)
    level = np.repeat(rng.choice([0, high, low, 1e4, -np.inf, np.nan], n // 7), 7)
    level = np.where(rng.random(n) < 0.2, rng.choice([0, high, low, -1e4], n), level)
    scores = 3 * rng.standard_normal((n, num_classes)) + level[:, None]
    scores[0] = -0.0
    return scores.astype(dtype), rng.integers(0, num_classes, n)


def results_for(scores, target, axis, backend):
    """Rows of what softmax, cross_entropy_with_grad and the backward functions return, NaN being
    NaN. The scores pass for log-probabilities, and powers of them for upstream gradients.
    """
    scores = np.ascontiguousarray(scores.T if axis == 0 else scores)
    probs = fl.softmax(scores, axis, backend=backend)
    losses, grad = fl.cross_entropy_with_grad(
        scores, target, axis=axis, reduction="none", backend=backend
    )
    _, summed = fl.cross_entropy_with_grad(
        scores, target, axis=axis, reduction="sum", backend=backend
    )
    upstream = scores ** (9 if scores.dtype.itemsize == 4 else 75)  # of 1e4: a sum out of range
    back = fl.softmax_backward(upstream, probs, axis, backend=backend)
    log_back = fl.log_softmax_backward(upstream, scores, axis, backend=backend)
    gradients = (probs, grad, summed, back, log_back)
    results = [losses, *(a.T if axis == 0 else a for a in gradients)]
    return [np.where(np.isnan(a), np.nan, a) for a in results]


# Along inner axes: one tile and a bit; with more rows two to four tiles beside each other.
INNER = [(3, 8200, FLOATS[0]), (65, 4100, FLOATS[0]), (400, 70, FLOATS[0]), (2049, 66, FLOATS[0])]
INNER += [(3, 150, dtype) for dtype in [FLOATS[1], *HALVES]] + [(400, 66, FLOATS[1])]


@row_cases
@pytest.mark.parametrize(("num_classes", "n", "dtype"), INNER, ids=str)
def test_at_any_place_along_inner_axes(case, num_classes, n, dtype, backend):
    """The class axis is the first or in the middle, and runs of samples end anywhere in a tile."""
    whole = case.problem(n, num_classes, dtype)
    batch = case.call(Layout(1, num_classes, n), whole, backend=backend)
    layout = Layout(n // 2, num_classes, 2)
    check_part(case, layout, whole, slice(0, n), batch, backend)
    for outer, start, stop in [(1, 0, 2), (1, n - 3, n), (2, 1, n - 1)]:
        layout = Layout(outer, num_classes, (stop - start) // outer)
        check_part(case, layout, whole, slice(start, stop), batch, backend)


def check_part(case, layout, whole, part, batch, backend):
    """The rows of a part, in a layout, give the bits that they gave in the batch."""
    n = len(whole[0])
    arrays = [
        array if name.startswith(("weight", "pos_weight")) else array[part]
        for name, array in zip(case.inputs + case.arrays, whole, strict=True)
    ]
    assert {len(whole[i]) for i in range(len(case.inputs))} == {n}
    results = case.call(layout, arrays, backend=backend)
    for result, full, kind in zip(results, batch, case.returns, strict=True):
        if kind != "float":
            assert bits([result]) == bits([full[part]])


# Few rows, tails of every kind: no vector is full; more than one; rows longer than a block; tiles.
SMALL = [Layout(*shape) for shape in [(5, 3), (5, 65), (3, 400), (2, 2049), (2, 65, 37)]]


def call(case, arrays, layout, **options):
    """The results for arrays as they lie."""
    results = case.function(
        *arrays[: len(case.inputs)], axis=layout.axis, **case.keywords(arrays), **case.options,
        **options,
    )  # fmt: skip
    return results if isinstance(results, tuple) else (results,)


def with_and_without_out(case, problem, layout, place, backend):
    """Holds arrays in their new places, and `out` in one, against contiguous arrays."""
    arrays = [layout.arrange(array) for array in problem]
    expected = call(case, arrays, layout, backend=backend)
    placed = [place(number, array) for number, array in enumerate(arrays)]
    assert bits(call(case, placed, layout, backend=backend)) == bits(expected)
    if "out" in case.function.__kwdefaults__:
        out = place(len(arrays), np.full_like(expected[-1], 7))
        results = call(case, placed, layout, out=out, backend=backend)
        assert results[-1] is out
        assert bits(results) == bits(expected)


@row_cases
@pytest.mark.parametrize("dtype", [*FLOATS, *HALVES], ids=str)
@pytest.mark.parametrize("layout", SMALL, ids=str)
def test_at_any_alignment(case, dtype, layout, backend):
    """All places of a number within a cache line, for the inputs and `out` in turn; of halves
    some. And one place between two numbers, which is no place for `out`.
    """
    problem = case.problem(layout.n, layout.num_classes, dtype)
    places = range(64 // dtype.itemsize) if dtype in FLOATS else (1, 3, 8, 31)
    for shift in places:
        # Inputs and `out` not alike: 5 and 16 have no divisor in common.
        place = lambda number, array: at(array, (shift + 5 * number) * dtype.itemsize)  # noqa: E731, B023
        with_and_without_out(case, problem, layout, place, backend)
    arrays = [layout.arrange(array) for array in problem]
    between = [at(array, 1) for array in arrays]
    expected = bits(call(case, arrays, layout, backend=backend))
    assert bits(call(case, between, layout, backend=backend)) == expected


def at(array, offset):
    """A copy that begins so many bytes after the beginning of a cache line."""
    memory = np.empty(array.nbytes + 128, np.uint8)
    first = -memory.__array_interface__["data"][0] % 64 + offset % 64
    moved = memory[first : first + array.nbytes].view(array.dtype).reshape(array.shape)
    moved[...] = array
    return moved


def _every_second(number, array):
    return _window(array, [2 * length for length in array.shape], (slice(None, None, 2),))


def _sliced(number, array):
    return _window(array, [length + 3 for length in array.shape], (slice(1, -2),))


def _backwards(number, array):
    return _window(array, array.shape, (slice(None, None, -1),))


def _last_axis_backwards(number, array):
    return _window(array, array.shape, (..., slice(None, None, -1)))


def _window(array, shape, index):
    """A view of a larger or turned array, with the numbers of `array`."""
    memory = np.ones(shape, array.dtype)
    view = memory[index if ... in index else index * array.ndim]
    view[...] = array
    return view


def _transposed(number, array):
    return array.T.copy().T


VIEWS = [_every_second, _sliced, _backwards, _last_axis_backwards]


@row_cases
@pytest.mark.parametrize("dtype", [FLOATS[0], HALVES[0]], ids=str)
@pytest.mark.parametrize("layout", SMALL, ids=str)
def test_through_any_view(case, dtype, layout, backend):
    """The bits of the contiguous copy; `out` may be a view, too."""
    problem = case.problem(layout.n, layout.num_classes, dtype)
    for view in VIEWS:
        with_and_without_out(case, problem, layout, view, backend)


@row_cases
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layout", SMALL, ids=str)
def test_through_a_transposed_view(case, dtype, layout, backend):
    """Which is dense, so that nothing is copied: classes lie in it as along a first axis.

    What is summed over the samples is left aside, since these come in another order.
    """
    problem = case.problem(layout.n, layout.num_classes, dtype)
    arrays = [layout.arrange(array) for array in problem]
    views = [_transposed(number, array) for number, array in enumerate(arrays)]
    results = call(case, views, layout, backend=backend)
    expected = call(case, arrays, layout, backend=backend)
    for result, same, kind in zip(results, expected, case.returns, strict=True):
        if kind != "float":
            assert bits([result]) == bits([same])


@pytest.mark.parametrize(
    "case", [c for c in CASES if "out" in c.function.__kwdefaults__], ids=lambda case: case.name
)
@pytest.mark.parametrize("dtype", [*FLOATS, *HALVES], ids=str)
@pytest.mark.parametrize("layout", SOME_LAYOUTS, ids=str)
def test_out_and_in_place(case, layout, dtype, backend):
    """The bits of a fresh result; `out` itself is returned; in place over any input like it."""
    problem = case.problem(layout.n, layout.num_classes, dtype)
    fresh = bits(case.call(layout, problem, backend=backend))
    kind = case.returns[-1]
    like = layout.arrange(problem[0] if kind == "logits" else np.empty(layout.n, dtype))
    out = np.full_like(like, 7, shape=np.shape(like))
    results = case.call(layout, problem, out=out, backend=backend)
    assert bits(results) == fresh
    assert bits([layout.rows(out, kind)]) == fresh[-1:]
    if kind == "rows":
        return
    for position, name in enumerate(case.inputs):
        if name in ("logits", "log_probs", "probs", "grad_output"):
            arrays = [np.array(layout.arrange(array)) for array in problem]
            keywords = case.keywords(arrays)
            case.function(
                *arrays[: len(case.inputs)], axis=layout.axis, out=arrays[position],
                backend=backend, **keywords, **case.options,
            )  # fmt: skip
            assert bits([layout.rows(arrays[position], "logits")]) == fresh[-1:]


@pytest.mark.parametrize("dtype", [*FLOATS, HALVES[0]], ids=str)
@pytest.mark.parametrize(
    "layout",
    [Layout(*shape) for shape in [(2, 21, 200001), (280001, 31), (9, 1000003), (140001, 20, 3)]],
    ids=str,
)
def test_large_results_that_go_past_the_caches(layout, dtype, backend):
    """The bits of a result in place, which does not, at any place of `out` in its cache lines."""
    if backend == "numpy":
        pytest.skip("the reference writes as NumPy does")
    shape = layout.arrange(np.empty((layout.n, layout.num_classes), np.int8)).shape
    logits = np.random.default_rng(0).random(shape, np.float32).astype(dtype)
    memory = np.empty(logits.nbytes + 128, np.uint8)
    assert logits.nbytes >= 1 << 24
    aligned = -memory.__array_interface__["data"][0] % 64
    in_place = logits.copy()
    fl.softmax(in_place, layout.axis, out=in_place, backend=backend)
    for offset in (0, 8):
        first = aligned + offset
        out = memory[first : first + logits.nbytes].view(dtype).reshape(shape)
        memory[:] = 7
        fl.softmax(logits, layout.axis, out=out, backend=backend, num_threads=3)
        assert bits([out]) == bits([in_place])
        assert (memory[:first] == 7).all()
        assert (memory[first + logits.nbytes :] == 7).all()
