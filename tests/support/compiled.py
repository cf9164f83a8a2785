"""Numba's kernels, compiled by all processors: by one that takes a quarter of the tests' time."""

import functools
import itertools
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np

from fastloss._threads import usable_cpus
from support import cases
from support.cases import Layout

# Of tiles, of rows and of a shared row, enough for two threads.
_TILES, _ROWS, _SHARED = _LAYOUTS = [Layout(30_000, 3), Layout(70, 1025), Layout(1, 70_001)]
_KINDS = [
    *itertools.product(["float32", "float64"], _LAYOUTS),
    *itertools.product(["float16"], [_TILES, _ROWS]),  # whose kernels read bfloat16, too
]


@functools.cache
def compile_all():
    """In every way that cases call them: into Numba's cache, where tests and children find them."""
    functions = {case.function.__name__.removesuffix("_with_grad") for case in cases.CASES}
    jobs = itertools.product(sorted(functions), _KINDS)  # the longest come first
    with ProcessPoolExecutor(usable_cpus(), mp_context=get_context("spawn")) as pool:
        list(pool.map(_compile, *zip(*jobs, strict=True)))


def _compile(function, kind):
    dtype, layout = kind
    for case in cases.CASES:
        if case.function.__name__.removesuffix("_with_grad") == function:
            problem = case.problem(layout.n, layout.num_classes, np.dtype(dtype))
            case.call(layout, problem, backend="numba", num_threads=2)
            if dtype == "float16" and case.name == "cross_entropy soft grad all":
                _, *wide = case.problem(layout.n, layout.num_classes, np.float32)
                case.call(layout, (problem[0], *wide), backend="numba", num_threads=2)
