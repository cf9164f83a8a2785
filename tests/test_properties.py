"""Whatever hypothesis thinks of: the compiled backends say what the reference says."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from support import oracles
from support.backends import COMPILED

import fastloss as fl

compiled = pytest.mark.parametrize("backend", COMPILED, indirect=True)
DTYPES = [np.dtype(np.float32), np.dtype(np.float64)]
KINDS = ["plain", "transposed", "reversed", "gaps", "swapped", "misaligned"]
EXTREMES = [0.0, -0.0, 1.0, np.inf, -np.inf, np.nan, 3.4e38, -3.4e38, 1e-45, 87.5, -88.0, 103.9]


@st.composite
def logits(draw):
    """An array of any shape, in any memory: strides, byte order, alignment, values."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(hnp.array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=70))
    ordinary = st.floats(-20, 20, width=32)
    any_float = st.floats(width=dtype.itemsize * 8, allow_subnormal=True)
    elements = draw(st.sampled_from([ordinary, any_float, st.sampled_from(EXTREMES)]))
    values = draw(hnp.arrays(np.float64, min(int(np.prod(shape)), 40), elements=elements))
    with np.errstate(over="ignore"):
        x = np.resize(values, shape).astype(dtype)  # repeats, which is what ties are made of
    return draw(memory(x))


@st.composite
def memory(draw, array):
    kind = draw(
        st.sampled_from(["plain", "transposed", "reversed", "gaps", "swapped", "misaligned"])
    )
    if kind == "transposed":
        order = draw(st.permutations(range(array.ndim)))
        return np.ascontiguousarray(array.transpose(order)).transpose(np.argsort(order))
    if kind == "reversed":
        flip = tuple(slice(None, None, draw(st.sampled_from([1, -1]))) for _ in array.shape)
        return array[flip].copy()[flip]
    if kind == "gaps":
        gaps = [draw(st.integers(1, 3)) for _ in array.shape]
        wide = np.zeros([n * gap for n, gap in zip(array.shape, gaps, strict=True)], array.dtype)
        view = wide[tuple(slice(None, None, gap) for gap in gaps)]
        view[...] = array
        return view
    if kind == "swapped":
        return array.astype(array.dtype.newbyteorder())
    if kind == "misaligned":
        raw = np.frombuffer(b"?" + array.tobytes(), np.uint8)[1:]
        return raw.view(array.dtype).reshape(array.shape)
    return array


@st.composite
def losses(draw):
    """Logits, an axis, targets and options."""
    x = draw(logits())
    axis = draw(st.integers(-x.ndim, x.ndim - 1))
    rows = tuple(np.delete(x.shape, axis))
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    options = {
        "axis": axis,
        "reduction": draw(st.sampled_from(["none", "sum", "mean"])),
        "label_smoothing": draw(st.sampled_from([0.0, 0.0, 0.1, 1.0])),
        "z_loss": draw(st.sampled_from([0.0, 0.0, 0.01])),
        "weight": draw(st.sampled_from([None, rng.integers(0, 3, x.shape[axis]) / 2])),
        "sample_weight": draw(st.sampled_from([None, rng.integers(0, 3, rows) / 2])),
    }
    if draw(st.booleans()):
        target = rng.random(x.shape).astype(x.dtype.newbyteorder("="))
        target[target < 0.3] = 0
    else:
        target = rng.integers(0, x.shape[axis], rows)
        if draw(st.booleans()):
            target = np.where(rng.random(rows) < 0.3, -100, target)
    return x, target, options


def assert_agree(result, reference, dtype, reach):
    """Equal to within the promise; `reach` is how far apart the finite logits are."""
    result, reference = np.asarray(result, np.longdouble), np.asarray(reference, np.longdouble)
    assert result.shape == reference.shape
    unit = 1e-6 if dtype.itemsize == 4 else 1e-14
    limits = np.finfo(dtype.newbyteorder("="))
    finite = np.isfinite(reference)
    same = (result == reference) | (np.isnan(result) & np.isnan(reference))
    with np.errstate(invalid="ignore"):
        scale = np.abs(reference) * (1 + reach / 5) + reach * limits.tiny
        close = np.abs(result - reference) <= 2 * unit * scale + 2 * limits.smallest_subnormal
    # At the border of what the dtype holds, one may round to infinity and the other not.
    border = np.abs(np.where(finite, reference, result)) >= limits.max * (1 - 1e-5)
    wrong = ~(same | (finite & close) | border)
    assert not wrong.any(), f"{result[wrong][:3]} instead of {reference[wrong][:3]}"


def reach_of(x, axis):
    """The distance between the largest and the smallest finite logit of each row.

    No further than it matters: exp(-750) is 0.
    """
    x = x.astype(np.longdouble)
    finite = np.isfinite(x)
    largest = np.where(finite, x, -np.inf).max(axis, keepdims=True)
    smallest = np.where(finite, x, np.inf).min(axis, keepdims=True)
    return np.where(np.isfinite(largest), np.minimum(largest - smallest, 750), 0)


@compiled
@given(x=logits(), data=st.data())
def test_softmax(backend, x, data):
    axis = data.draw(st.integers(-x.ndim, x.ndim - 1))
    reach = reach_of(x, axis)
    for function in (fl.softmax, fl.log_softmax):
        before = x.tobytes()
        result = function(x, axis, backend=backend)
        assert x.tobytes() == before
        reference = function(x, axis, backend="numpy")
        assert_agree(result, reference, x.dtype, reach)
    # Relative to the larger of what lse is the sum of, which may cancel.
    lse = fl.logsumexp(x, axis, backend=backend)
    reference = fl.logsumexp(x, axis, backend="numpy")
    top = np.nan_to_num(np.abs(x.astype(float)).max(axis), posinf=0)
    np.testing.assert_array_equal(np.isnan(lse), np.isnan(reference))
    tolerance = (1e-6 if x.dtype.itemsize == 4 else 1e-14) * (top + 5)
    with np.errstate(invalid="ignore"):
        assert ((np.abs(lse - reference) <= tolerance) | np.isnan(lse) | (lse == reference)).all()


@compiled
@example(problem=(np.zeros((3, 1), np.float32), np.zeros(3, int), {}))
@given(problem=losses())
def test_cross_entropy(backend, problem):
    x, target, options = problem
    before = x.tobytes(), target.tobytes()
    loss, grad = fl.cross_entropy_with_grad(x, target, backend=backend, **options)
    assert (x.tobytes(), target.tobytes()) == before
    reference_loss, reference_grad = fl.cross_entropy_with_grad(
        x, target, backend="numpy", **options
    )
    for result, reference in [(loss, reference_loss), (grad, reference_grad)]:
        np.testing.assert_array_equal(np.isnan(result), np.isnan(reference))
    axis, z_loss = options.get("axis", -1), options.get("z_loss", 0)
    if z_loss and np.abs(np.nan_to_num(x.astype(float))).max() > 1e3:
        return  # lse may be near 0 next to large logits, and its square has their rounding
    reach = reach_of(x, axis)
    if not z_loss:
        rows = reach.squeeze(axis)
        per_row = rows if np.shape(loss) == rows.shape else rows.max(initial=0)
        assert_agree(loss, reference_loss, x.dtype, per_row)
    terms = 0 if is_hard(target, options) else largest_terms(x, target, options)
    assert_gradients_agree(grad, reference_grad, axis, reach, terms)


def is_hard(target, options):
    """Whether a gradient is p - onehot, and not a difference of two terms that may cancel."""
    return target.dtype.kind != "f" and not (
        options.get("label_smoothing") or options.get("z_loss")
    )


def largest_terms(x, target, options):
    """The largest terms of each row, A p_c and w_c t_c, of which a gradient is the difference."""
    axis, weight, s = (options.get(name) for name in ("axis", "weight", "sample_weight"))
    x = np.moveaxis(x.astype(float), axis, -1)
    rows, num_classes = x.shape[:-1], x.shape[-1]
    x = x.reshape(-1, num_classes)
    if target.dtype.kind == "f":
        target = np.moveaxis(target, axis, -1).reshape(x.shape)
    else:
        target = target.reshape(-1)
    s = None if s is None else s.reshape(-1)
    s, t, divisor = oracles.shares(target, num_classes, weight, s, ignore_index=-100)
    smoothing, z_loss = options["label_smoothing"], options["z_loss"]
    wt = ((1 - smoothing) * t + smoothing / num_classes) * (1 if weight is None else weight)
    lse = np.abs(x).max(axis=1) + np.abs(fl.logsumexp(x, backend="numpy"))  # a sum that may cancel
    with np.errstate(invalid="ignore"):  # of infinite scores, whose gradients are NaN
        factor = np.abs(wt).sum(axis=1) + 2 * z_loss * lse
        terms = factor[:, None] * fl.softmax(x, backend="numpy") + np.abs(wt)
        terms = np.abs(s) * terms.max(axis=1)
    if options["reduction"] == "mean":
        terms = terms / abs(divisor or 1)
    return np.expand_dims(np.nan_to_num(terms).astype(float).reshape(rows), axis)


def assert_gradients_agree(grad, reference, axis, reach, terms):
    unit = (2e-6 if reference.dtype.itemsize == 4 else 2e-14) * (1 + reach / 10)
    largest = np.abs(np.nan_to_num(reference)).max(axis, keepdims=True, initial=0)
    tolerance = unit * (largest + terms) + 2 * np.finfo(reference.dtype).smallest_subnormal
    error = np.abs(np.nan_to_num(grad) - np.nan_to_num(reference))
    assert (error <= tolerance).all()


@compiled
@given(data=st.data())
def test_overlapping_out(backend, data):
    """Input and `out` anywhere in the same memory."""
    n, c = data.draw(st.integers(1, 20)), data.draw(st.sampled_from([1, 2, 3, 17, 64, 65, 200]))
    size = n * c
    start = data.draw(st.integers(0, 2 * size))
    other = data.draw(st.integers(0, 2 * size))
    step = data.draw(st.sampled_from([1, -1]))
    values = np.random.default_rng(size).normal(size=(n, c)).astype(np.float32)
    base = np.zeros(3 * size, np.float32)
    x = base[start : start + size].reshape(n, c)[::step]
    out = base[other : other + size].reshape(n, c)
    for function in (fl.softmax, fl.log_softmax):
        x[...] = values
        function(x, out=out, backend=backend)
        np.testing.assert_array_equal(out, function(values, backend=backend))
    x[...] = values
    y = np.arange(n) % c
    expected = fl.cross_entropy_with_grad(values, y, backend=backend)
    loss, _ = fl.cross_entropy_with_grad(x, y, out=out, backend=backend)
    assert loss == expected[0]
    np.testing.assert_array_equal(out, expected[1])
