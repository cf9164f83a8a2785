"""Children of a process that has used threads: the same bits, none hangs, none is killed."""

import os
import time
import warnings

import pytest
from support import calls
from support.backends import need

pytestmark = [
    pytest.mark.usefixtures("warm_cache"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system"),
]


def in_a_fork(function, seconds=60):
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


def test_a_forked_child_works(backend):
    """And its own child, after the parent has used its threads."""
    expected = calls.bits("cross_entropy", backend, 2)

    def agrees():
        return calls.bits("cross_entropy", backend, 2) == expected

    def grandchild():
        return agrees() and in_a_fork(agrees)

    assert in_a_fork(grandchild)
    assert agrees()


@pytest.mark.parametrize(
    ("method", "layer"),
    [("fork", "omp"), ("fork", "workqueue"), ("spawn", "workqueue"), ("forkserver", "omp")],
)
def test_multiprocessing(python, method, layer):
    """After both backends have used two threads here, on either threading layer of Numba."""
    code = f"from support import calls; print(calls.children_agree({method!r}))"
    # 3.12 warns of what is to work here; where children start anew, no flag of this test reaches.
    flags = ["-W", "ignore::DeprecationWarning"]
    assert python(code, flags=flags, NUMBA_THREADING_LAYER=layer) == "True"


CHILDREN = """
import os, sys
def child_agrees(fork):
    child = fork()
    if child == 0:
        os._exit([calls.digest(backend) for backend in calls.COMPILED] != expected)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
from support import calls
expected = [calls.digest(backend) for backend in calls.COMPILED]
"""


@pytest.mark.parametrize("layer", ["omp", "workqueue"])
def test_a_fork_that_python_does_not_see(python, layer):
    """As in a server written in C that has Python in it: no hook of Python runs."""
    code = CHILDREN + "import ctypes; print(child_agrees(ctypes.PyDLL(None).fork))"
    assert python(code, NUMBA_THREADING_LAYER=layer) == "True"


@pytest.mark.parametrize("layer", ["omp", "workqueue"])
def test_forks_while_threads_call(python, layer):
    """A lock that another thread holds at that moment stays locked in the child for ever."""
    code = (
        CHILDREN
        + """
import threading
over = threading.Event()
def work():
    while not over.is_set():
        calls.bits("softmax", "numba", 2)
        calls.bits("softmax", "cython", 2)
threads = [threading.Thread(target=work) for _ in range(3)]
for thread in threads:
    thread.start()
print([child_agrees(os.fork) for _ in range(5)])
over.set()
"""
    )
    flags = ["-W", "ignore::DeprecationWarning"]
    assert python(code, flags=flags, NUMBA_THREADING_LAYER=layer) == str([True] * 5)


def test_show_config_of_a_child(python):
    code = """
import os
import fastloss as fl
fl.set_num_threads(5)
if os.fork() == 0:
    print(fl.get_num_threads(), fl._backend.config()["threads"], flush=True)
    os._exit(0)
os.wait()
"""
    assert python(code) == "1 1"


def test_workers_of_a_torch_data_loader(python):
    need("torch")
    code = """
from support import calls
from torch.utils.data import DataLoader

class Digests:
    def __len__(self):
        return 4
    def __getitem__(self, index):
        return calls.digest(calls.COMPILED[index % 2])

expected = [calls.digest(backend) for backend in calls.COMPILED * 2]
loader = DataLoader(Digests(), batch_size=None, num_workers=2, timeout=60)
print(list(loader) == expected)
"""
    assert python(code, flags=["-W", "ignore::DeprecationWarning"]) == "True"
