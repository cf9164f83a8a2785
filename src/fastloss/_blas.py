"""NumPy's BLAS, held to one thread, so that several of ours make products of their own."""

import ctypes
import functools
import importlib
import itertools
import os
import threading
from collections.abc import Callable
from typing import NamedTuple

_PTHREADS = 1  # what openblas_get_parallel says of a build with a pool for the whole process


class _OpenBlas(NamedTuple):
    get_num_threads: Callable[[], int]
    set_num_threads: Callable[[int], None]


@functools.cache
def _openblas() -> _OpenBlas | None:
    """The OpenBLAS that NumPy multiplies with.

    None where it is another library, or has a pool for each thread that calls it (OpenMP's).
    """
    try:
        # A symbol is looked up in an extension and in what it is linked with.
        numpy = ctypes.CDLL(importlib.import_module("numpy._core._multiarray_umath").__file__)
    except (ImportError, OSError):
        return None
    for prefix, suffix in itertools.product(("scipy_", ""), ("64_", "_64", "")):
        name = f"{prefix}openblas_%s{suffix}"
        if hasattr(numpy, name % "get_parallel"):
            if numpy[name % "get_parallel"]() != _PTHREADS:
                return None
            return _OpenBlas(numpy[name % "get_num_threads"], numpy[name % "set_num_threads"])
    return None


def can_be_held() -> bool:
    """Whether it is known how; where not, products are left to BLAS, one at a time."""
    return _openblas() is not None


class _OneThread:
    """While anybody holds it, BLAS has no threads of its own, as far as that can be had.

    That goes for the whole process.  The first who takes hold sets it, and the last who lets go
    takes it back.  (threadpoolctl, from version 3.8 on, obeys one thread and ignores the others.)
    An interrupt may keep a thread from letting go: its next call then does.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._holders: set[int] = set()
        self._before: int | None = None

    def hold(self) -> None:
        blas = _openblas()
        with self._lock:
            self._holders.add(threading.get_ident())
            if blas:
                if self._before is None:
                    self._before = blas.get_num_threads()
                blas.set_num_threads(1)

    def release(self) -> None:
        with self._lock:
            self._holders.discard(threading.get_ident())
            if not self._holders:
                self.restore()

    def restore(self) -> None:
        if self._before is None or not (blas := _openblas()):
            return
        if blas.get_num_threads() == 1:  # else somebody has set it in the meantime
            blas.set_num_threads(self._before)
        self._before = None


one_thread = _OneThread()


def _after_fork_in_child() -> None:
    """The holders are not in the child, and the lock may have been theirs."""
    global one_thread
    left, one_thread = one_thread, _OneThread()
    left.restore()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
