"""Choosing a backend, and what that must leave alone."""

import inspect
import platform

import numpy as np
import pytest
from support.backends import BACKENDS

import fastloss as fl
from fastloss import _cython, _numba, _reference
from fastloss._contract import Kernels

CONTRACT = [name for name in vars(Kernels) if name[0] != "_"]
X = np.zeros((3, 4), np.float32)


# ---------------------------------------------------------------------------------------------
# The contract
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONTRACT)
@pytest.mark.parametrize("module", [_numba, _cython], ids=lambda module: module.__name__)
def test_backends_offer_the_same_signatures(module, name):
    expected = list(inspect.signature(getattr(_reference, name)).parameters)
    assert list(inspect.signature(getattr(module, name)).parameters) == expected


def test_backends_offer_no_kernel_that_the_contract_does_not_name():
    functions = dict(inspect.getmembers(_reference, inspect.isfunction))
    assert {name for name in functions if name[0] != "_"} == set(CONTRACT)


def test_every_backend_is_here():
    """A build that lost one would otherwise pass by testing less."""
    assert fl.available_backends() == ["cython", "numba", "numpy"]
    isas = _cython.available_isas()
    assert isas[-1] == "baseline"
    if platform.machine() in ("x86_64", "AMD64"):
        kernels = _cython.load("baseline")
        levels = {"x86-64-v4": 4, "x86-64-v3": 3}
        expected = [isa for isa, level in levels.items() if kernels.cpu_runs(level)]
        assert isas == [*expected, "baseline"]
    assert len(BACKENDS) == 2 + len(isas)


def test_public_functions_share_options():
    for name in fl.__all__:
        function = getattr(fl, name)
        assert function.__doc__
        if function.__module__ in ("fastloss.functional", "fastloss.losses"):
            parameters = inspect.signature(function).parameters
            for option in ("backend", "num_threads"):
                assert parameters[option].kind is inspect.Parameter.KEYWORD_ONLY
                assert parameters[option].default is None


# ---------------------------------------------------------------------------------------------
# The flag
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def ran(monkeypatch):
    """The names of the backends whose softmax was called, in order."""
    calls = []
    for name, module in {"cython": _cython, "numba": _numba, "numpy": _reference}.items():
        monkeypatch.setattr(module, "softmax", lambda *_, name=name: calls.append(name))
    return calls


def test_order_of_the_flags(ran, monkeypatch):
    monkeypatch.delenv("FASTLOSS_BACKEND", raising=False)
    fl.set_backend(None)
    fl.softmax(X)  # auto
    monkeypatch.setenv("FASTLOSS_BACKEND", "numba")
    fl.set_backend(None)
    fl.softmax(X)  # the environment variable
    fl.set_backend("numpy")
    fl.softmax(X)  # set_backend
    fl.softmax(X, backend="cython")  # the keyword
    fl.softmax(X, backend="auto")
    fl.set_backend("auto")
    fl.softmax(X)
    fl.set_backend(None)
    fl.softmax(X)
    assert ran == ["cython", "numba", "numpy", "cython", "cython", "cython", "numba"]


@pytest.mark.parametrize("name", ["cython", "numba", "numpy"])
def test_get_backend_says_what_runs(ran, name):
    fl.set_backend(name)
    assert fl.get_backend() == name
    fl.softmax(X)
    assert ran == [name]


def test_the_environment_variable(python):
    code = "import fastloss as fl; print(fl.get_backend())"
    assert python(code) == "cython"
    assert python(code, FASTLOSS_BACKEND="") == "cython"
    for name in ("cython", "numba", "numpy"):
        assert python(code, FASTLOSS_BACKEND=name) == name
    code = """
import fastloss as fl
for call in (fl.get_backend, lambda: fl.softmax([1, 2])):
    try:
        call()
    except ValueError as error:
        print(error)
print(fl.softmax([1, 1], backend="numpy"))
"""
    error = "FASTLOSS_BACKEND = 'mkl' is not a backend; choose one of 'auto', 'cython', 'numba', "
    assert python(code, FASTLOSS_BACKEND="mkl") == f"{error}'numpy'\n{error}'numpy'\n[0.5 0.5]"


@pytest.mark.parametrize("isa", _cython.available_isas())
def test_forced_instruction_set(python, isa):
    config = python("import fastloss as fl; fl.show_config()", FASTLOSS_ISA=isa)
    assert f"cython instruction set   {isa} (" in config


def test_wrong_instruction_set(python):
    code = """
import fastloss as fl
try:
    fl.softmax([1, 1], backend="cython")
except ValueError as error:
    print(error)
"""
    error = python(code, FASTLOSS_ISA="avx9")
    assert error.startswith("FASTLOSS_ISA = 'avx9' is not an instruction set; choose one of ")
    assert "'baseline'" in error


# ---------------------------------------------------------------------------------------------
# Importing
# ---------------------------------------------------------------------------------------------


def test_import_imports_nothing_else(python):
    heavy = ("numba", "llvmlite", "scipy", "sklearn", "torch", "jax", "matplotlib")
    code = f"import sys, fastloss; print([m for m in {heavy} if m in sys.modules])"
    assert python(code) == "[]"
    code = f"""
import sys
import fastloss as fl
fl.softmax([1, 2])
fl.cross_entropy([[1, 2]], [0], backend="numpy")
print([m for m in {heavy} if m in sys.modules])
"""
    assert python(code) == "[]"


def test_nothing_of_the_process_is_changed(python):
    """Signal handlers, the environment, random state, and the flush of denormals."""
    code = """
import os, random, signal
import numpy as np
def state():
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    denormal = np.float32(1e-40) * np.float32(1)
    numpy_state = np.random.get_state()
    return handlers, dict(os.environ), random.getstate(), str(numpy_state), denormal
before = state()
import fastloss as fl
x = np.ones((50_000, 3), np.float32)
for backend in ("cython", "numba", "numpy"):
    fl.cross_entropy(x, np.zeros(len(x), int), backend=backend)
after = state()
names = ("signal handlers", "environment", "random", "numpy random", "denormals")
print([name for name, a, b in zip(names, before, after) if a != b])
"""
    assert python(code) == "[]"


# ---------------------------------------------------------------------------------------------
# show_config, warmup
# ---------------------------------------------------------------------------------------------


def test_show_config(capsys):
    fl.set_backend("numba")
    fl.set_num_threads(1)
    assert fl.show_config() is None
    lines = capsys.readouterr().out.splitlines()
    config = dict(line.split(maxsplit=1) for line in lines if not line.startswith(("b", "c", "n")))
    assert config["fastloss"] == fl.__version__
    assert config["python"] == platform.python_version()
    assert config["threads"] == "1"
    text = "\n".join(lines)
    assert f"numpy                    {np.__version__}" in text
    assert "backend                  numba" in text
    for backend in ("cython", "numba", "numpy"):
        assert f"backend {backend}".ljust(25) + "available" in text
    for word in (
        "CPU ",
        "CPUs usable",
        "cython instruction set",
        "OpenMP",
        "numba threading layer",
    ):
        assert word in text


@pytest.mark.parametrize("layer", ["omp", "workqueue", "tbb"])
def test_show_config_warns_of_the_layer(python, layer):
    """The one that calls will run on, and of the one that is not for two at a time."""
    code = "from fastloss import _numba; print(_numba.describe()['numba threading layer'])"
    text = python(code, NUMBA_THREADING_LAYER=layer)
    assert text.startswith((layer, "none: No threading layer could be loaded"))
    assert ("ends the process" in text) == (layer == "workqueue")


def test_warmup(python):
    code = "import sys, fastloss as fl; fl.warmup({}); print('numba' in sys.modules)"
    assert python(code.format("'cython'")) == "False"
    assert python(code.format("")) == "False"
    assert python(code.format("'numba'")) == "True"
