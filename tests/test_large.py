"""More than 2**31 elements: what is counted in 32 bits goes wrong here.

Takes minutes and gigabytes, hence deselected: `pytest -m slow` runs it.
"""

import numpy as np
import pytest

import fastloss as fl

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.parametrize("backend", ["cython", "numba"]),
]
LIMIT = 1 << 31
PEAKS = (0, 1, LIMIT - 1, LIMIT, LIMIT + 1)  # flat positions of what is not 0; and the last

# shape, class axis
ARRANGEMENTS = [
    ((LIMIT + 5, 1), 1),
    ((LIMIT // 4 + 3, 4), 1),
    ((LIMIT // 1000 + 1, 1000), 1),
    ((3, LIMIT // 3 + 5), 0),
    ((1025, 4, 1 << 19), 1),
]


@pytest.fixture
def gigabytes():
    """Skip where there is less memory; overcommitted, it would end the process."""

    def need(count):
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":", 1) for line in file)
        available = int(fields["MemAvailable"].split()[0]) / (1 << 20)
        if available < count:
            pytest.skip(f"needs {count} GiB of memory; {available:.1f} are available")

    return need


def rows_of(shape, axis):
    """The index of each row that has a peak, and of those next to them."""
    size = int(np.prod(shape))
    flat = [*PEAKS, LIMIT - 2, LIMIT + 2, size - 2, size - 1]
    places = {
        np.delete(place, axis).tobytes(): place
        for place in zip(*np.unravel_index(flat, shape), strict=True)
    }
    index = [list(map(int, along)) for along in zip(*places.values(), strict=True)]
    del index[axis]
    return tuple(index)


def with_peaks(x):
    """Something to compute at both sides of the limit, and at both ends."""
    flat = x.reshape(-1)
    flat[list(PEAKS)] = np.arange(1, 6)
    flat[-1] = 7
    return x


@pytest.mark.parametrize(("shape", "axis"), ARRANGEMENTS, ids=str)
def test_every_arrangement(shape, axis, backend, gigabytes):
    gigabytes(8)
    num_classes = shape[axis]
    x = with_peaks(np.zeros(shape, np.float16))
    target = np.zeros(np.delete(shape, axis), np.min_scalar_type(-num_classes))
    index = rows_of(shape, axis)
    rows = np.moveaxis(x, axis, -1)  # views: what is written to x shows here
    some = rows[index].copy()
    n, few = target.size, len(some)
    total = fl.cross_entropy(some, [0] * few, reduction="sum", backend="numpy")
    total += (n - few) * float(np.float32(np.log(num_classes)))
    options = {"axis": axis, "reduction": "sum", "backend": backend}

    assert fl.cross_entropy(x, target, **options) == pytest.approx(total, rel=1e-6)
    loss, grad = fl.cross_entropy_with_grad(x, target, out=x, **options)
    assert loss == pytest.approx(total, rel=1e-6)
    assert grad is x
    _, expected = fl.cross_entropy_with_grad(some, [0] * few, reduction="sum", backend="numpy")
    np.testing.assert_allclose(rows[index], expected, atol=1e-3)
    p = np.float16(1 / num_classes)
    elsewhere = x.reshape(-1)[777::65_537]
    assert (np.minimum(np.abs(elsewhere - p), np.abs(elsewhere - (p - 1))) < 1e-3).all()

    x.fill(0)
    assert fl.softmax(with_peaks(x), axis, out=x, backend=backend) is x
    np.testing.assert_allclose(rows[index], fl.softmax(some, backend="numpy"), atol=1e-3)
    np.testing.assert_allclose(elsewhere, p, rtol=0.02)

    target[tuple(along[-1] for along in index)] = num_classes
    place = ", ".join(str(along[-1]) for along in index)
    with pytest.raises(IndexError, match=rf"^target\[{place}\] = {num_classes} is out of range"):
        fl.nll_loss(x, target, **options)


@pytest.mark.parametrize("axis", [0, 1])
def test_one_row(axis, backend, gigabytes):
    """A row of more classes than an int can count: either memory order."""
    gigabytes(16)
    num_classes = LIMIT + 5
    x = np.zeros((1, num_classes) if axis else (num_classes, 1), np.float16)
    flat = x.reshape(-1)
    peaks = [*PEAKS, num_classes - 1]
    heights = np.array([20, 19, 18, 20, 21, 22], np.float16)
    flat[peaks] = heights
    exponentials = np.exp(heights.astype(float))
    s = exponentials.sum() + num_classes - len(peaks)
    p = exponentials / s

    lse = fl.logsumexp(x, axis, backend=backend)
    assert lse.item() == pytest.approx(np.log(s), rel=1e-3)
    y = [LIMIT]
    loss, grad = fl.cross_entropy_with_grad(x, y, axis=axis, out=x, backend=backend)
    assert loss == pytest.approx(-np.log(p[3]), rel=1e-6)
    np.testing.assert_allclose(flat[peaks], p - [0, 0, 0, 1, 0, 0], rtol=1e-3)
    assert grad is x

    x.fill(0)
    flat[peaks] = heights
    fl.softmax(x, axis, out=x, backend=backend)
    np.testing.assert_allclose(flat[peaks], p, rtol=1e-3)
    assert not flat[777::65_537].any()
    with pytest.raises(IndexError, match=rf"^target\[0\] = {num_classes} is out of range"):
        fl.nll_loss(x, [num_classes], axis=axis, backend=backend)
