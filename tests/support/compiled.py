"""Numba's kernels, compiled by all processors: by one that takes a quarter of the tests' time."""

import itertools
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np

from fastloss._threads import usable_cpus
from support import cases
from support.cases import Layout

_LAYOUTS = [Layout(30_000, 3), Layout(70, 1025)]  # of tiles and of rows, enough for two threads
_DTYPES = ["float32", "float64", "float16"]  # bfloat16 is read by the kernels of float16


def compile_all():
    """In every way that cases call them: into Numba's cache, where tests and children find them."""
    functions = {case.function.__name__.removesuffix("_with_grad") for case in cases.CASES}
    jobs = itertools.product(sorted(functions), _DTYPES, _LAYOUTS)  # the longest come first
    with ProcessPoolExecutor(usable_cpus(), mp_context=get_context("spawn")) as pool:
        list(pool.map(_compile, *zip(*jobs, strict=True)))


def _compile(function, dtype, layout):
    for case in cases.CASES:
        if case.function.__name__.removesuffix("_with_grad") == function:
            problem = case.problem(layout.n, layout.num_classes, np.dtype(dtype))
            case.call(layout, problem, backend="numba", num_threads=2)
