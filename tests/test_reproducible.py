"""A row's bits depend on the row alone: not on threads, batch, position, alignment or `out`."""

import numpy as np
import pytest
from cases import CASES, FLOATS, HALVES, SOME_LAYOUTS, Layout, by_name

import fastloss as fl

# Enough elements for more than one thread, in tiles, in groups of rows and in long rows.
THREADED = [
    Layout(*shape)
    for shape in [(9000, 5), (401, 100), (33, 1025), (2, 20000), (7, 70, 100), (2, 4, 9001)]
]
THREADS = [1, 2, 3, 8]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
row_cases = pytest.mark.parametrize(
    "case",
    [case for case in CASES if "float" not in case.returns or case.name == "grad sum"],
    ids=lambda case: case.name,
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
    per_row = [len(array) == n for array in whole]
    batch = case.call(Layout(n, num_classes), whole, backend=backend)
    for start, stop in [
        (0, 1),
        (1, 2),
        (77, 78),
        (149, 150),
        (1, 150),
        (0, 63),
        (3, 67),
        (60, 130),
    ]:
        part = [
            array[start:stop] if rows else array for array, rows in zip(whole, per_row, strict=True)
        ]
        results = case.call(Layout(stop - start, num_classes), part, backend=backend)
        for result, full, kind in zip(results, batch, case.returns, strict=True):
            if kind != "float":
                np.testing.assert_array_equal(result, full[start:stop])


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "logsumexp", "grad none", "soft grad"])
@pytest.mark.parametrize("num_classes", [3, 65, 2049])
def test_at_any_alignment(name, num_classes, backend):
    """At all 16 places of a float within a cache line, and all 4 of a byte within a float."""
    case, layout = by_name[name], Layout(20, num_classes)
    logits, *others = case.problem(layout.n, num_classes, np.float32)
    expected = bits(case.call(layout, (logits, *others), backend=backend))
    memory = np.empty(logits.nbytes + 128, np.uint8)
    aligned = -memory.__array_interface__["data"][0] % 64
    for offset in [*range(0, 64, 4), 1, 2, 3]:
        first = aligned + offset
        moved = memory[first : first + logits.nbytes].view(np.float32).reshape(logits.shape)
        moved[...] = logits
        assert bits(case.call(layout, (moved, *others), backend=backend)) == expected


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
            keywords = dict(zip(case.arrays, arrays[len(case.inputs) :], strict=True))
            case.function(
                *arrays[: len(case.inputs)], axis=layout.axis, out=arrays[position],
                backend=backend, **keywords, **case.options,
            )  # fmt: skip
            assert bits([layout.rows(arrays[position], "logits")]) == fresh[-1:]


@pytest.mark.parametrize("dtype", [*FLOATS, HALVES[0]], ids=str)
@pytest.mark.parametrize(
    "layout", [Layout(*shape) for shape in [(2, 21, 200001), (280001, 31), (9, 1000003)]], ids=str
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
    for offset in (0, 8, 16):
        first = aligned + offset
        out = memory[first : first + logits.nbytes].view(dtype).reshape(shape)
        memory[:] = 7
        fl.softmax(logits, layout.axis, out=out, backend=backend, num_threads=3)
        assert bits([out]) == bits([in_place])
        assert (memory[:first] == 7).all()
        assert (memory[first + logits.nbytes :] == 7).all()
