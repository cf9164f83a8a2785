"""The backend fixture: every test that asks for it runs on every backend and instruction set."""

import os

# Before OpenMP is loaded, which reads it once. Tests ask for more threads than there are CPUs: one
# that waits in a loop would take the CPU from those who work. Results do not depend on it.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import subprocess
import sys

import pytest
from hypothesis import HealthCheck, settings
from support import backends, calls, compiled

import fastloss as fl
from fastloss import _backend, _cython, _threads

# The same verdict every time; `--hypothesis-profile=explore` looks for new examples.
_SHARED = {
    "deadline": None,
    # The backend fixture changes nothing between two examples of a test.
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}
settings.register_profile("fixed", max_examples=60, derandomize=True, **_SHARED)
settings.register_profile("explore", max_examples=2000, **_SHARED)
settings.load_profile("fixed")


@pytest.fixture(params=backends.BACKENDS)
def backend(request, monkeypatch):
    """The name to pass as ``backend=``. A backend that is missing is an error, not a skip."""
    monkeypatch.setattr(_threads, "_PARALLEL_ELEMENTS_ON", {})  # as many are enough on each
    name, _, isa = request.param.partition("-")
    if isa:
        monkeypatch.setitem(_backend._loaded, name, _cython.load(isa))
    assert name in fl.available_backends()
    return name


def pytest_collection_modifyitems(items):
    """All backends of a test after one another: the answer of its oracle is then still cached."""
    first = {}

    def place(item):
        parameters = getattr(item, "callspec", None)
        name = parameters.params.get("backend", "") if parameters else ""
        return first.setdefault(item.nodeid.replace(f"[{name}", "["), len(first))

    items.sort(key=place)


def pytest_collection_finish(session):
    """What a run of everything compiles is compiled first, on all processors."""
    worker = hasattr(session.config, "workerinput")  # of pytest-xdist, that waits to be given tests
    if not worker and not session.config.option.collectonly:
        _compile_for([item.nodeid for item in session.items])


def pytest_xdist_node_collection_finished(ids):
    """The same, by the process that gives the tests to the workers, when the first has them all."""
    _compile_for(ids)


def _compile_for(ids):
    if sum("[numba" in name for name in ids) > 5000:
        compiled.compile_all()


@pytest.fixture(autouse=True)
def _choices_undone():
    """No test sees the backend or the threads that another one chose."""
    yield
    fl.set_backend(None)
    fl.set_num_threads(None)


@pytest.fixture(scope="session")
def warm_cache():
    """What calls.py calls is compiled here, once, and no subprocess spends its time on it."""
    for num_threads in (1, 2):
        calls.digest("numba", num_threads)


@pytest.fixture
def python():
    """Run code in a fresh interpreter and return what it printed; environment by keyword.

    Words of a command may go before the interpreter, and flags behind it.
    """

    def run(code, *, command=(), flags=(), **environment):
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("FASTLOSS", "OMP"))}
        environment = {"PYTHONPATH": os.path.dirname(__file__), **environment}  # for calls.py
        result = subprocess.run(
            [*command, sys.executable, "-W", "error", *flags, "-c", code],
            env=inherited | environment, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert result.returncode == 0, f"exit {result.returncode}\n{result.stderr}"
        return result.stdout.strip()

    return run


@pytest.fixture
def group():
    """torch.distributed in this process alone."""
    dist = backends.need("torch").distributed
    if not dist.is_available():
        pytest.skip("this PyTorch has no torch.distributed")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
