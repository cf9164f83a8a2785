"""The backends and instruction sets that the tests run on, and the modules that they may need."""

import importlib
import os

import pytest

from fastloss import _cython

COMPILED = ["numba", *(f"cython-{isa}" for isa in _cython.available_isas())]
BACKENDS = ["numpy", *COMPILED]


def need(name):
    """An optional module: without it the test is skipped, unless FASTLOSS_REQUIRE lists it."""
    if name in os.environ.get("FASTLOSS_REQUIRE", "").split():
        return importlib.import_module(name)
    return pytest.importorskip(name)
