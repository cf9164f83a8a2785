"""Nothing is read or written outside an array.

Every array that kernels get lies directly before or directly after a page that may not be
touched: one byte too far ends the process. Prefetching is no access, and does no harm there.
"""

import ctypes
import itertools
import mmap

import numpy as np
import pytest
from support.backends import COMPILED
from support.cases import CASES, FLOATS, HALVES, INTEGERS, Layout, by_name

from fastloss import _arguments

compiled = pytest.mark.parametrize("backend", COMPILED, indirect=True)
PAGE = mmap.PAGESIZE
ENDS = ["start", "end"]

# Rows and tiles, full ones and the last ones, that vectors and blocks do not divide.
LAYOUTS = [
    Layout(*shape)
    for shape in [
        (1, 1), (1, 3), (7, 5), (63, 1), (65, 2), (70, 17), (3, 299), (2, 300), (2, 301), (3, 1023),
        (1, 1025), (1, 9001), (1, 3, 7), (2, 5, 65), (3, 17, 63), (1, 301, 3), (2, 1, 64),
        (64, 5), (2, 304, 3),
    ]
]  # fmt: skip

# Results of 16 MiB and a bit, which are written past the caches, with a last unit that is not full.
LARGE = [
    (np.float32, Layout(140_003, 31)),
    (np.float32, Layout(4099, 1025)),
    (np.float32, Layout(3, 17, 84_747)),
    (np.float16, Layout(3, 33, 84_747)),
]


def forbid(address):
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(address), PAGE, 0):
        raise OSError(ctypes.get_errno(), "mprotect")


def guarded(array, end):
    """A copy that starts, or ends, at a page that may not be touched."""
    pages = -(-array.nbytes // PAGE) * PAGE
    memory = mmap.mmap(-1, pages + 2 * PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    forbid(address)
    forbid(address + PAGE + pages)
    offset = PAGE + (pages - array.nbytes if end == "end" else 0)
    copy = np.ndarray(array.shape, array.dtype, memory, offset)
    copy[...] = array
    return copy


@pytest.fixture(params=ENDS)
def end(request, monkeypatch):
    """At which end of arrays the guard is; what functions allocate as results has one, too."""
    output = _arguments.output

    def guarded_output(out, like, dtype, *inputs, **options):
        if out is None:
            shape = (like.array if isinstance(like, _arguments.Logits) else like).shape
            out = guarded(np.zeros(shape, dtype), request.param)
        return output(out, like, dtype, *inputs, **options)

    monkeypatch.setattr(_arguments, "output", guarded_output)
    return request.param


def call(case, layout, problem, end, **options):
    arrays = [guarded(layout.arrange(array), end) for array in problem]
    return case.pass_on(layout, arrays, **options)


def test_the_guard_ends_a_process(python):
    """On either side, for a read and for a write; else the tests below could not fail."""
    for end, step, access in itertools.product(ENDS, (-1, 1), ("p[0]", "p[0] = 1")):
        code = (
            f"import sys; sys.path[:0] = {[__file__.rpartition('/')[0]]}\n"
            f"import numpy as np; from test_memory import guarded\n"
            f"a = guarded(np.zeros({PAGE}, np.uint8), {end!r})\n"
            f"p = np.ctypeslib.as_array((np.ctypeslib.ctypes.c_char * 1).from_address("
            f"a.ctypes.data + ({PAGE} if {step} > 0 else -1)))\n"
            f"{access}"
        )
        with pytest.raises(AssertionError, match="exit -11"):
            python(code)


@compiled
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_within_bounds(case, end, backend):
    for layout, dtype in itertools.product(LAYOUTS, FLOATS + HALVES):
        problem = case.problem(layout.n, layout.num_classes, dtype)
        expected = case.call(layout, problem, backend=backend)
        for result, right in zip(
            call(case, layout, problem, end, backend=backend), expected, strict=True
        ):
            np.testing.assert_array_equal(result, right)


@compiled
@pytest.mark.parametrize(
    "name",
    [
        "cross_entropy none",
        "cross_entropy grad sample_weight",
        "nll_loss all none",
        "nll_loss grad all",
    ],
)
@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_targets_of_every_width(name, dtype, end, backend):
    case = by_name[name]
    for layout in (Layout(1, 2), Layout(4097, 10), Layout(3, 5, 21), Layout(1, 301, 70)):
        logits, target, *weights = case.problem(layout.n, layout.num_classes, np.float32)
        target = np.clip(target, 0, 127)  # what every width can hold
        expected = case.call(layout, (logits, target, *weights), backend=backend)
        problem = (logits, target.astype(dtype), *weights)
        for result, right in zip(
            call(case, layout, problem, end, backend=backend), expected, strict=True
        ):
            np.testing.assert_array_equal(result, right)


@compiled
@pytest.mark.parametrize(("dtype", "layout"), LARGE)
def test_large_results(dtype, layout, end, backend):
    n, c = layout.n, layout.num_classes
    rows, target = np.zeros((n, c), dtype), np.arange(n) % c
    problems = {
        "softmax": [rows],
        "softmax_backward": [rows, rows],
        "cross_entropy grad": [rows, target],
        "nll_loss grad none": [rows, target],
    }
    for name, problem in problems.items():
        call(by_name[name], layout, problem, end, backend=backend, num_threads=2)
