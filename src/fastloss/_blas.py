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
    """The context in which BLAS has no threads of its own, where it can be held.

    That goes for the whole process.  The first who enters sets it, and the last who leaves takes
    it back; threadpoolctl from version 3.8 on does it for one thread alone.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before: int | None = None

    def __enter__(self) -> None:
        blas = _openblas()
        with self._lock:
            if blas and not self._inside:
                self._before = blas.get_num_threads()
                blas.set_num_threads(1)
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self.restore()

    def restore(self) -> None:
        blas, before = _openblas(), self._before
        if blas and before is not None:
            blas.set_num_threads(before)
            self._before = None


one_thread = _OneThread()


def _after_fork_in_child() -> None:
    """Those inside are not in the child, and the lock may have been theirs."""
    global one_thread
    left, one_thread = one_thread, _OneThread()
    left.restore()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
