"""The backends and instruction sets that the tests run on, and the modules that they may need."""

import functools
import importlib
import importlib.util
import os

import pytest

from fastloss import _cython

COMPILED = ["numba", *(f"cython-{isa}" for isa in _cython.available_isas())]
BACKENDS = ["numpy", *COMPILED]


@functools.cache
def cython_build(isa):
    """The Cython backend as it is imported where FASTLOSS_ISA forces an instruction set."""
    spec = importlib.util.spec_from_file_location(_cython.__name__, _cython.__file__)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTLOSS_ISA", isa)
        spec.loader.exec_module(module)
    return module


def need(name):
    """An optional module: without it the test is skipped, unless FASTLOSS_REQUIRE lists it."""
    if name in os.environ.get("FASTLOSS_REQUIRE", "").split():
        return importlib.import_module(name)
    return pytest.importorskip(name)
