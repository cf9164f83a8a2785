"""Large results are written past the caches, and no others.

No result shows that, and no clock shows it reliably. So a page of `out` is locked: the instruction
that first writes there is interrupted, looked at, and allowed to go on.
"""

import ctypes
import mmap
import platform
import re
import signal
import sys

import numpy as np
import pytest
from support.backends import COMPILED
from support.cases import Layout, by_name

pytestmark = [
    pytest.mark.skipif(
        sys.platform != "linux" or platform.machine() != "x86_64",
        reason="reads the registers as Linux on x86-64 saves them",
    ),
    pytest.mark.parametrize("backend", COMPILED, indirect=True),
]
PAGE = mmap.PAGESIZE
ADDRESS, INSTRUCTION = 16, 168  # where siginfo_t and ucontext_t have them
# vmovntps and vmovntdq, in each encoding that there is.
PAST_THE_CACHES = re.compile(rb"(\x62...|\xc4..|\xc5.|\x66?[\x40-\x4f]?\x0f)[\x2b\xe7]", re.DOTALL)
Handler = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)


class Action(ctypes.Structure):
    _fields_ = (
        ("handler", Handler), ("mask", ctypes.c_ubyte * 128), ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )  # fmt: skip


def first_write(address, write):
    """The instruction that first writes to a page, which `write` does."""
    libc = ctypes.CDLL(None)
    seen = []

    def on_fault(number, info, context):
        fault = ctypes.c_uint64.from_address(info + ADDRESS).value
        if seen or not address <= fault < address + PAGE:
            libc.signal(signal.SIGSEGV, None)  # not this one: it fails once more, for good
            return
        instruction = ctypes.c_uint64.from_address(context + INSTRUCTION).value
        seen.append(ctypes.string_at(instruction, 8))
        libc.mprotect(ctypes.c_void_p(address), PAGE, mmap.PROT_READ | mmap.PROT_WRITE)

    action, before = Action(Handler(on_fault), flags=4), Action()  # SA_SIGINFO
    libc.sigaction(signal.SIGSEGV, ctypes.byref(action), ctypes.byref(before))
    try:
        libc.mprotect(ctypes.c_void_p(address), PAGE, mmap.PROT_READ)
        write()
    finally:
        libc.mprotect(ctypes.c_void_p(address), PAGE, mmap.PROT_READ | mmap.PROT_WRITE)
        libc.sigaction(signal.SIGSEGV, ctypes.byref(before), None)
    (instruction,) = seen
    return instruction


def writes_past_the_caches(case, layout, dtype, backend, *, in_place=False, num_threads=1):
    """Whether the middle of a result is written so."""
    shape = (layout.n, layout.num_classes)
    rows = layout.arrange(np.zeros(shape, dtype))
    out = np.ndarray(rows.shape, dtype, mmap.mmap(-1, rows.nbytes))
    arrays = [out if in_place else rows, rows]
    if case.inputs[1:] == ("target",):
        arrays[1] = layout.arrange(np.zeros(layout.n, int))
    middle = out.ctypes.data + out.nbytes // 2 // PAGE * PAGE
    instruction = first_write(
        middle,
        lambda: case.pass_on(
            layout, arrays[: len(case.inputs)], out=out, backend=backend, num_threads=num_threads
        ),
    )
    return PAST_THE_CACHES.match(instruction) is not None


LAYOUTS = [
    Layout(*shape) for shape in [(1 << 17, 32), (4096, 1024), (1, 32, 1 << 17), (1, 1024, 4096)]
]
KINDS = ["in tiles", "in rows", "along an inner axis", "in columns"]
NAMES = [
    "softmax", "log_softmax", "softmax_backward", "log_softmax_backward", "cross_entropy grad",
    "cross_entropy soft grad",
]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS, ids=KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_large_results_are_written_past_the_caches(name, layout, backend):
    assert writes_past_the_caches(by_name[name], layout, np.float32, backend)


def test_so_are_rows_that_threads_share(backend):
    """A page is what one of them writes."""
    layout = Layout(1, 1 << 22)
    assert writes_past_the_caches(by_name["softmax"], layout, np.float32, backend, num_threads=2)


@pytest.mark.parametrize("layout", [*LAYOUTS, Layout(4, 1 << 20)], ids=[*KINDS, "in long rows"])
def test_others_are_not(layout, backend):
    """What is in the caches already, or soon wanted from there; and half of the bytes are few."""
    case = by_name["softmax"]
    assert not writes_past_the_caches(case, layout, np.float32, backend, in_place=True)
    assert not writes_past_the_caches(case, layout, np.float16, backend)
    twice = (
        layout._replace(inner=layout.inner * 2)
        if layout.inner > 1
        else layout._replace(outer=layout.outer * 2)
    )
    assert writes_past_the_caches(case, twice, np.float16, backend)
