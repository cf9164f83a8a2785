"""Choosing a backend, its threads, and what that must leave alone."""

import inspect
import os
import platform
import sys
import threading
import time
import warnings

import numpy as np
import pytest
from conftest import BACKENDS

import fastloss as fl
from fastloss import _cython, _numba, _reference

CONTRACT = [
    name for name, _ in inspect.getmembers(_reference, inspect.isfunction) if name[0] != "_"
]
X = np.random.default_rng(0).normal(size=(3000, 20)).astype(np.float32)  # enough for two threads
Y = np.arange(len(X)) % 20

# Put before an import, these make a module impossible to import.
HIDE = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.startswith({names!r}):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hide())
import fastloss as fl
"""
NO_NUMBA = HIDE.format(names="numba")
NO_EXTENSION = HIDE.format(names="fastloss._kernels")
NEITHER = HIDE.format(names=("numba", "fastloss._kernels"))


# ---------------------------------------------------------------------------------------------
# The contract
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONTRACT)
@pytest.mark.parametrize("module", [_numba, _cython], ids=lambda module: module.__name__)
def test_backends_offer_the_same_signatures(module, name):
    expected = list(inspect.signature(getattr(_reference, name)).parameters)
    assert list(inspect.signature(getattr(module, name)).parameters) == expected


def test_the_contract_is_what_the_public_functions_need():
    assert {"softmax", "check_target", "cross_entropy", "cross_entropy_soft"} < set(CONTRACT)
    assert len(CONTRACT) >= 9


def test_every_backend_is_here():
    """A build that lost one would otherwise pass by testing less."""
    assert fl.available_backends() == ["cython", "numba", "numpy"]
    isas = _cython.available_isas()
    assert isas[-1] == "baseline"
    if platform.machine() in ("x86_64", "AMD64"):
        from fastloss import _kernels_baseline as kernels

        levels = {"x86-64-v4": 4, "x86-64-v3": 3}
        expected = [isa for isa, level in levels.items() if kernels.cpu_runs(level)]
        assert isas == [*expected, "baseline"]
    assert len(BACKENDS) == 2 + len(isas)


def test_public_functions_share_options():
    for name in fl.__all__:
        function = getattr(fl, name)
        assert function.__doc__
        if function.__module__ == "fastloss.functional":
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


def test_without_numba(python):
    code = """
print(fl.available_backends(), fl.get_backend(), fl.softmax([1, 1]))
for call in (
    lambda: fl.set_backend("numba"),
    lambda: fl.softmax([1, 1], backend="numba"),
    lambda: fl.warmup("numba"),
):
    try:
        call()
    except ImportError as error:
        print(error)
print(fl.get_backend())
fl.show_config()
"""
    available, *errors, backend, config = python(NO_NUMBA + code).split("\n", 5)
    assert available == "['cython', 'numpy'] cython [0.5 0.5]"
    text = "backend 'numba' is not available: run `pip install numba` (No module named 'numba')"
    assert errors == [text] * 3
    assert backend == "cython"
    assert text in config


def test_without_the_extension(python):
    code = """
print(fl.available_backends(), fl.get_backend(), fl.softmax([1, 1]))
try:
    fl.softmax([1, 1], backend="cython")
except ImportError as error:
    print(error)
"""
    available, error = python(NO_EXTENSION + code).split("\n")
    assert available == "['numba', 'numpy'] numba [0.5 0.5]"
    assert error.startswith("backend 'cython' is not available: its compiled extension is not ")
    assert "pip install --force-reinstall --no-binary fastloss fastloss" in error


def test_without_either(python):
    """Auto never falls to the slow reference; who asks for that by name gets it."""
    code = """
try:
    fl.softmax([1, 1])
except ImportError as error:
    print(error)
print(fl.softmax([1, 1], backend="numpy"))
"""
    error, result = python(NEITHER + code).split("\n")
    assert "pip install numba" in error
    assert "--no-binary fastloss" in error
    assert result == "[0.5 0.5]"


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
# show_config, warmup, threads
# ---------------------------------------------------------------------------------------------


def test_show_config(capsys):
    fl.set_backend("numba")
    fl.set_num_threads(3)
    assert fl.show_config() is None
    lines = capsys.readouterr().out.splitlines()
    config = dict(line.split(maxsplit=1) for line in lines if not line.startswith(("b", "c", "n")))
    assert config["fastloss"] == fl.__version__
    assert config["python"] == platform.python_version()
    assert config["threads"] == "3"
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


def test_warmup(python):
    code = "import sys, fastloss as fl; fl.warmup({}); print('numba' in sys.modules)"
    assert python(code.format("'cython'")) == "False"
    assert python(code.format("")) == "False"
    assert python(code.format("'numba'")) == "True"


def test_set_num_threads():
    usable = fl.get_num_threads()
    assert usable >= 1
    fl.set_num_threads(5)
    assert fl.get_num_threads() == 5
    fl.set_num_threads(np.int64(1))
    assert fl.get_num_threads() == 1
    fl.set_num_threads(None)
    assert fl.get_num_threads() == usable


def test_num_threads_reach_the_kernel(monkeypatch):
    seen = []
    monkeypatch.setattr(_reference, "softmax", lambda *arguments: seen.append(arguments[-1]))
    fl.set_num_threads(3)
    fl.softmax(X, backend="numpy")
    fl.softmax(X, backend="numpy", num_threads=7)
    fl.softmax(X[:10], backend="numpy", num_threads=7)  # too little work for two
    assert seen == [3, 7, 1]


def test_thread_counts_of_the_environment(python):
    code = "import fastloss as fl; print(fl.get_num_threads())"
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert 1 <= int(python(code)) <= usable
    assert python(code, OMP_NUM_THREADS="3") == "3"
    assert python(code, OMP_NUM_THREADS="4,2") == "4"
    assert python(code, FASTLOSS_NUM_THREADS="5", OMP_NUM_THREADS="3") == "5"
    for variable in ("FASTLOSS_NUM_THREADS", "OMP_NUM_THREADS"):
        wrong = """
import fastloss as fl
try:
    fl.get_num_threads()
except ValueError as error:
    print(error)
"""
        for value in ("many", "0", "-1"):
            text = f"the environment variable {variable} = '{value}' is not a number of threads"
            assert python(wrong, **{variable: value}) == text


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no CPU affinity on this system")
def test_affinity_is_respected(python):
    code = """
import os
import fastloss as fl
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
print(fl.get_num_threads())
"""
    assert python(code) == "1"


def test_numba_keeps_its_own_thread_count(python):
    code = """
import numba, numpy as np
import fastloss as fl
numba.set_num_threads(1)
x = np.zeros((50_000, 3), np.float32)
fl.softmax(x, backend="numba", num_threads=2)
print(numba.get_num_threads())
"""
    assert python(code) == "1"


# ---------------------------------------------------------------------------------------------
# Threads and forks
# ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_works(backend):
    """And its own child, after the parent has used its threads."""
    expected = fl.cross_entropy_with_grad(X, Y, backend=backend, num_threads=2)

    def agrees():
        loss, grad = fl.cross_entropy_with_grad(X, Y, backend=backend, num_threads=2)
        return loss == expected[0] and np.array_equal(grad, expected[1])

    def grandchild():
        return agrees() and _in_a_fork(agrees)

    assert _in_a_fork(grandchild)
    assert agrees()


def _in_a_fork(function, seconds=30):
    """Whether the function returns True in a forked child, in time."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # 3.12: fork of a process with threads
        child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if function() else 2
        finally:
            os._exit(code)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.01)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return False


def test_concurrent_calls(backend):
    """Python threads, each with calls of several threads."""
    expected = fl.cross_entropy_with_grad(X, Y, backend=backend)
    wrong = []

    def work():
        for _ in range(10):
            loss, grad = fl.cross_entropy_with_grad(X, Y, backend=backend, num_threads=2)
            if loss != expected[0] or not np.array_equal(grad, expected[1]):
                wrong.append(loss)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert not wrong


@pytest.mark.parametrize("layer", ["omp", "workqueue"])
def test_concurrent_calls_on_a_layer_of_numba(python, layer):
    """The workqueue layer aborts the process that uses it from two threads at once."""
    code = """
from concurrent.futures import ThreadPoolExecutor
import numba, numpy as np
import fastloss as fl
x = np.random.default_rng(0).normal(size=(3000, 20)).astype(np.float32)
y = np.arange(3000) % 20
call = lambda _: fl.cross_entropy_with_grad(x, y, backend="numba", num_threads=2)
expected = call(0)
with ThreadPoolExecutor(8) as pool:
    results = list(pool.map(call, range(60)))
print(numba.threading_layer(), all(
    loss == expected[0] and np.array_equal(grad, expected[1]) for loss, grad in results
))
"""
    assert python(code, NUMBA_THREADING_LAYER=layer, NUMBA_NUM_THREADS="2") == f"{layer} True"


def test_the_gil_is_released(backend):
    """Another thread gets its turn while a kernel runs, however long the switch interval."""
    if backend == "numpy":
        return  # NumPy releases it as it pleases
    x = np.zeros((2_000_000, 10), np.float32)
    y = np.zeros(len(x), np.int64)
    out = np.empty_like(x)
    fl.cross_entropy_with_grad(x, y, out=out, backend=backend, num_threads=1)
    ticks = []
    stop = threading.Event()

    def tick():
        while not stop.wait(0.001):
            ticks.append(time.perf_counter())

    interval = sys.getswitchinterval()
    ticker = threading.Thread(target=tick)
    try:
        sys.setswitchinterval(30)
        ticker.start()
        started = time.perf_counter()
        fl.cross_entropy_with_grad(x, y, out=out, backend=backend, num_threads=1)
        ended = time.perf_counter()
    finally:
        sys.setswitchinterval(interval)
        stop.set()
        ticker.join()
    assert sum(started < moment < ended for moment in ticks) >= 2
