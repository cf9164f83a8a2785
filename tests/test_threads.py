"""Python threads that call at once, the GIL, what calls leave behind, and how many threads run."""

import hashlib
import importlib
import os
import shutil
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from support import calls
from support.backends import need

import fastloss as fl
from fastloss import _cython, _reference, _threads

pytestmark = pytest.mark.usefixtures("warm_cache")
linux = pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="no /proc to count in")
parallel_build = pytest.mark.skipif(_cython.most_threads() == 1, reason="built without OpenMP")


def usable_cpus():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


# ---------------------------------------------------------------------------------------------
# Concurrent calls
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "module"), [("omp", "omppool"), ("workqueue", "workqueue"), ("tbb", "tbbpool")]
)
def test_eight_threads_mix_everything(python, layer, module):
    """The workqueue layer aborts the process that uses it from two threads at once."""
    try:
        importlib.import_module(f"numba.np.ufunc.{module}")
    except ImportError:
        pytest.skip(f"this Numba has no {layer} layer")
    code = """
import numba
from support import calls
print(calls.wrong_of_many_threads(seconds=2), numba.threading_layer())
"""
    assert python(code, NUMBA_THREADING_LAYER=layer) == f"[] {layer}"


def test_concurrent_calls(backend):
    """The same on each instruction set, one call over and over."""
    expected = calls.bits("cross_entropy", backend, 1)
    wrong = []

    def work():
        for _ in range(10):
            wrong.append(calls.bits("cross_entropy", backend, 2) != expected)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == [False] * 80


# ---------------------------------------------------------------------------------------------
# The GIL
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def long_call(backend):
    """A call on one thread that takes tens of milliseconds, of which NumPy has no part."""
    if backend == "numpy":
        pytest.skip("NumPy releases the GIL as it pleases")
    x = np.zeros((5_000_000, 10), np.float32)  # never written: it takes no memory

    def call():
        fl.logsumexp(x, backend=backend, num_threads=1)

    call()
    return call


def test_the_gil_is_released(long_call):
    """Another thread gets many a turn during one call, however long the switch interval.

    One or two it may also get before and after the kernel.
    """
    turns = []
    stop = threading.Event()

    def take_turns():
        while not stop.wait(0.001):
            turns.append(time.perf_counter())

    interval = sys.getswitchinterval()
    other = threading.Thread(target=take_turns)
    during = []
    try:
        sys.setswitchinterval(30)
        other.start()
        for _ in range(10):
            before = len(turns)
            long_call()
            during.append(len(turns) - before)
    finally:
        sys.setswitchinterval(interval)
        stop.set()
        other.join()
    assert max(during) >= 5


def cpus_busy(function):
    """CPU time over time while two threads call the function: 2 at best, 1 under the GIL."""
    threads = [threading.Thread(target=lambda: [function() for _ in range(2)]) for _ in range(2)]
    wall, cpu = time.perf_counter(), time.process_time()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return (time.process_time() - cpu) / (time.perf_counter() - wall)


@pytest.mark.skipif(usable_cpus() < 2, reason="one CPU")
def test_two_threads_compute_at_once(long_call):
    data = bytes(10_000_000)
    rounds, free = 20, 0
    for _ in range(rounds):
        if cpus_busy(long_call) > 1.3:
            return
        free += cpus_busy(lambda: hashlib.sha256(data)) > 1.3
    if free < rounds / 2:
        pytest.skip("others keep all CPUs but one: no two threads compute at once")
    pytest.fail(f"never two CPUs busy, where hashing kept them busy {free} times of {rounds}")


# ---------------------------------------------------------------------------------------------
# What calls leave behind
# ---------------------------------------------------------------------------------------------


@linux
@pytest.mark.parametrize("backend", calls.COMPILED)
def test_memory_is_flat(python, backend):
    """Over 100,000 calls, of which three in five fail: less than 16 bytes from each of them."""
    growth = python(f"from support import calls; print(calls.growth_of_memory({backend!r}))")
    assert int(growth) < 1 << 20


@linux
@pytest.mark.parametrize("backend", calls.COMPILED)
def test_no_threads_are_left_behind(python, backend):
    assert (
        python(f"from support import calls; print(calls.threads_left_behind({backend!r}))") == "0"
    )


def test_numba_keeps_its_own_thread_count(python):
    code = """
import numba
from support import calls
numba.set_num_threads(1)
calls.digest("numba", 2)
print(numba.get_num_threads())
"""
    assert python(code) == "1"


@parallel_build
def test_openmp_keeps_its_own_thread_count(python):
    """Numba's OpenMP layer sets it when it starts; so would a kernel that knows no better."""
    code = """
from support import calls
from fastloss import _cython
calls.digest("cython", 3)
calls.digest("numba", 2)
print(_cython.openmp_max_threads())
"""
    environment = {"NUMBA_THREADING_LAYER": "omp", "NUMBA_NUM_THREADS": "2"}
    assert python(code, OMP_NUM_THREADS="5", **environment) == "5"


@pytest.mark.parametrize(
    ("first", "threads"), [("torch", 1), ("torch", 3), ("fastloss._cython", 3)]
)
def test_pytorch_keeps_its_own_thread_count(python, first, threads):
    """Imported first it brings an OpenMP of its own, beside the system's; last, it has that one."""
    need("torch")
    code = f"""
import {first}
import torch
from support import calls
torch.set_num_threads({threads})
calls.bits("softmax", "numba", 2)
print(torch.get_num_threads())
"""
    environment = {"NUMBA_THREADING_LAYER": "omp", "NUMBA_NUM_THREADS": "4"}
    assert python(code, **environment) == str(threads)


# ---------------------------------------------------------------------------------------------
# How many threads
# ---------------------------------------------------------------------------------------------


def test_set_num_threads():
    usable = fl.get_num_threads()
    assert usable >= 1
    fl.set_num_threads(5)
    assert fl.get_num_threads() == 5
    fl.set_num_threads(np.int64(1))
    assert fl.get_num_threads() == 1
    fl.set_num_threads(65536)  # the most
    assert fl.get_num_threads() == 65536
    with pytest.raises(ValueError, match="num_threads = 65537 is out of range"):
        fl.set_num_threads(65537)
    assert fl.get_num_threads() == 65536
    fl.set_num_threads(None)
    assert fl.get_num_threads() == usable


def test_num_threads_reach_the_kernel(monkeypatch):
    seen = []
    monkeypatch.setattr(_reference, "softmax", lambda *arguments: seen.append(arguments[-1]))
    monkeypatch.setattr(_reference, "most_threads", lambda: 9)
    fl.set_num_threads(3)
    fl.softmax(calls.X, backend="numpy")
    fl.softmax(calls.X, backend="numpy", num_threads=7)
    fl.softmax(calls.X, backend="numpy", num_threads=70)
    fl.softmax(calls.X[:10], backend="numpy", num_threads=7)  # too little work for two
    assert seen == [3, 7, 9, 1]


@pytest.mark.parametrize(("name", "least"), [("_kernels_v4", 1 << 15), ("_numba", 1 << 16)])
def test_little_work_runs_on_one_thread(name, least):
    kernels = types.SimpleNamespace(__name__=f"fastloss.{name}", most_threads=lambda: 2)
    assert [_threads.threads_for(2, n, kernels) for n in (least - 1, least)] == [1, 2]


def test_more_threads_than_there_are_are_tried_first(monkeypatch):
    """Anew when the team has shrunk meanwhile, and when it was refused; others change nothing."""
    tried, granted = [], True
    monkeypatch.setattr(_threads, "_teams", threading.local())
    monkeypatch.setattr(_threads, "can_start", lambda count: tried.append(count) or granted)
    one, other = (
        types.SimpleNamespace(__name__=name, most_threads=lambda: 100) for name in ("one", "other")
    )

    def used(num_threads, kernels=one):
        tried.clear()
        return _threads.threads_for(num_threads, kernels=kernels), *tried

    assert used(1) == (1,)
    assert used(8) == (8, 7)
    assert used(8) == (8,)  # they are there
    assert used(1) == (1,)
    assert used(8) == (8,)  # still
    assert used(8, other) == (8, 7)  # of another backend
    assert used(2) == (2,)
    assert used(3) == (3, 2)  # OpenMP has sent the others away
    assert used(8) == (8, 7)
    granted = False
    assert used(9) == (1, 8)
    assert used(9) == (1, 8)
    assert used(8) == (8,)
    granted = True
    assert used(9) == (9, 8)
    assert used(9) == (9,)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(used, 9).result() == (9, 8)  # each thread has a team of its own


@pytest.mark.parametrize(
    ("environment", "threads"),
    [
        ({}, usable_cpus()),
        ({"OMP_NUM_THREADS": "3"}, 3),
        ({"OMP_NUM_THREADS": "4,2"}, 4),
        ({"FASTLOSS_NUM_THREADS": "5", "OMP_NUM_THREADS": "3"}, 5),
        ({"FASTLOSS_NUM_THREADS": "2", "OMP_NUM_THREADS": "1"}, 2),
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", calls.COMPILED)
@linux
def test_as_many_threads_as_show_config_says(python, backend, environment, threads):
    """Counted as the system sees them. Numba has no more than it started with."""
    code = f"from support import calls; print(*calls.threads_of_a_call({backend!r}))"
    environment = {"NUMBA_NUM_THREADS": "4", "NUMBA_THREADING_LAYER": "omp", **environment}
    most = 4 if backend == "numba" else _cython.most_threads()
    assert python(code, **environment) == f"{min(threads, most)} {min(threads, most)}"


@pytest.mark.parametrize("variable", ["FASTLOSS_NUM_THREADS", "OMP_NUM_THREADS"])
@pytest.mark.parametrize("value", ["many", "0", "-1"])
def test_wrong_thread_counts_of_the_environment(python, variable, value):
    code = """
import fastloss as fl
try:
    fl.get_num_threads()
except ValueError as error:
    print(error)
"""
    text = f"the environment variable {variable} = '{value}' is not a number of threads"
    assert python(code, **{variable: value}) == text


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no CPU affinity on this system")
def test_affinity_is_respected_in_mid_run(python):
    code = """
import os
import fastloss as fl
fl.get_num_threads()
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
print(fl.get_num_threads())
"""
    assert python(code) == "1"


@linux
@pytest.mark.skipif(not shutil.which("taskset"), reason="no taskset")
@pytest.mark.parametrize("backend", calls.COMPILED)
def test_taskset(python, backend):
    cpu = str(min(os.sched_getaffinity(0)))
    code = f"from support import calls; print(*calls.threads_of_a_call({backend!r}))"
    assert python(code, command=["taskset", "-c", cpu]) == "1 1"


@parallel_build
def test_limits_of_threadpoolctl(python):
    """They reach the default, in the thread that they are set in, and give it back."""
    code = """
from concurrent.futures import ThreadPoolExecutor
from threadpoolctl import threadpool_limits
import fastloss as fl
print(fl.get_num_threads(), end=" ")
with threadpool_limits(limits=1):
    print(fl.get_num_threads(), end=" ")
    fl.set_num_threads(4)
    print(fl.get_num_threads(), end=" ")
    fl.set_num_threads(None)
print(fl.get_num_threads())
"""
    assert python(code, OMP_NUM_THREADS="3") == "3 1 4 3"
    assert python(code, FASTLOSS_NUM_THREADS="3") == "3 3 4 3"


# Control groups, as files under the root and lines of /proc/self/cgroup.
GROUPS = {
    "none": ({}, "", None),
    "version 2": ({"cpu.max": "150000 100000"}, "0::/", 2),
    "no quota": ({"cpu.max": "max 100000", "a/cpu.max": "max 100000"}, "0::/a", None),
    "less than one": ({"cpu.max": "1000 100000"}, "0::/", 1),
    "nested": ({"a/cpu.max": "300000 100000", "a/b/cpu.max": "max 100000"}, "0::/a/b", 3),
    "around": ({"a/cpu.max": "200000 100000", "a/b/cpu.max": "400000 100000"}, "0::/a/b", 2),
    "of another": ({"a/cpu.max": "100000 100000"}, "0::/b", None),
    "path of the host": ({"cpu.max": "200000 100000"}, "0::/docker/0123", 2),
    "damaged": ({"cpu.max": "?"}, "0::/", None),
    "version 1": (
        {"cpu,cpuacct/a/cpu.cfs_quota_us": "250000", "cpu,cpuacct/a/cpu.cfs_period_us": "100000"},
        "5:memory:/a\n4:cpu,cpuacct:/a\n0::/",
        3,
    ),
    "version 1, no quota": (
        {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"},
        "1:cpu:/",
        None,
    ),
    "of another controller": (
        {"cpuset/cpu.cfs_quota_us": "100000", "cpuset/cpu.cfs_period_us": "100000"},
        "1:cpuset:/",
        None,
    ),
}


@pytest.mark.parametrize("name", GROUPS)
def test_quota_of_control_groups(name, tmp_path, monkeypatch):
    files, membership, cpus = GROUPS[name]
    for path, content in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(f"{content}\n")
    (tmp_path / "membership").write_text(membership)
    monkeypatch.setattr(_threads, "_GROUPS", str(tmp_path))
    monkeypatch.setattr(_threads, "_MEMBERSHIP", str(tmp_path / "membership"))
    assert _threads._control_group_cpus.__wrapped__() == cpus


@pytest.fixture
def control_group():
    """A control group of the system that this process may set the quota of."""
    for parent in (Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup")):
        group = parent / f"fastloss-test-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            if any((group / name).exists() for name in ("cpu.max", "cpu.cfs_quota_us")):
                yield group
                return
        finally:
            group.rmdir()
    pytest.skip("this process may not make a control group with a quota")


@pytest.mark.skipif(usable_cpus() < 2, reason="one CPU")
def test_a_real_control_group(control_group, python):
    if (control_group / "cpu.max").exists():
        (control_group / "cpu.max").write_text("50000 100000")
    else:
        (control_group / "cpu.cfs_quota_us").write_text("50000")
    code = f"""
import os
with open({str(control_group / "cgroup.procs")!r}, "w") as file:
    file.write(str(os.getpid()))
from support import calls
print(*calls.threads_of_a_call("cython"))
"""
    assert python(code) == "1 1"


# ---------------------------------------------------------------------------------------------
# Beside other libraries
# ---------------------------------------------------------------------------------------------

OTHERS = {  # something that they do on their threads
    "numba": "numba.njit(parallel=True)(lambda x: x + x)(np.zeros(9999))",
    "sklearn.cluster": "sklearn.cluster.KMeans(2, n_init=1).fit(np.eye(99))",
    "torch": "torch.zeros(99, 999) + 1",
}


@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
@pytest.mark.parametrize("other", OTHERS)
def test_orders_of_import(python, other, first):
    """Another library with threads, before and after: the same bits, and no OpenMP of our own.

    A copy of it in the package would be a second pool of threads, which spins against the first.
    Numba and PyTorch use the system's, or we use theirs; the wheels of scikit-learn have their own.
    """
    need(other.partition(".")[0])
    imports = [f"import {other}", "from support import calls"]
    code = (
        "\n".join(imports if first else imports[::-1])
        + f"""
import numpy as np
expected = calls.digest("cython", 1)
for _ in range(2):
    {OTHERS[other]}
    assert calls.digest("cython") == expected
with open("/proc/self/maps") as file:
    paths = {{line.split()[-1] for line in file}}
print(*sorted(path for path in paths if "gomp" in path))
"""
    )
    code = code if os.path.exists("/proc/self/maps") else code.partition("with open")[0]
    libraries = python(code, NUMBA_THREADING_LAYER="omp").split()
    assert not [path for path in libraries if "fastloss" in path]
    assert len(libraries) <= (2 if other == "sklearn.cluster" else 1)
