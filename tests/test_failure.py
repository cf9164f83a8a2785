"""What the system refuses (memory, threads, a cache) and what an installation lacks."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numba import njit
from support import calls
from support.backends import COMPILED

import fastloss as fl
from fastloss import _cython
from fastloss._numba.machine import set_float_mode

pytestmark = pytest.mark.usefixtures("warm_cache")
posix = pytest.mark.skipif(os.name != "posix", reason="no resource limits on this system")


# ---------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------

X = np.random.default_rng(0).normal(size=(70, 400)).astype(np.float32)
Y = np.arange(70)
INTO = {
    "softmax": lambda out, how: fl.softmax(X, out=out, **how),
    "log_softmax": lambda out, how: fl.log_softmax(X, out=out, **how),
    "logsumexp": lambda out, how: fl.logsumexp(X, out=out[:, 0].copy(), **how),
    "softmax_backward": lambda out, how: fl.softmax_backward(X, X, out=out, **how),
    "log_softmax_backward": lambda out, how: fl.log_softmax_backward(X, X, out=out, **how),
    "nll_loss": lambda out, how: fl.nll_loss_with_grad(X, Y, out=out, **how),
    "cross_entropy": lambda out, how: fl.cross_entropy_with_grad(X, Y, out=out, **how),
    "of probabilities": lambda out, how: fl.cross_entropy_with_grad(X, X, out=out, **how),
    "row by row": lambda out, how: fl.cross_entropy_with_grad(
        X, Y, reduction="none", out=out, **how
    ),
}


@pytest.mark.parametrize("backend", COMPILED, indirect=True)
@pytest.mark.parametrize("name", INTO)
def test_memory_that_is_not_there(name, backend, monkeypatch):
    """Each array that a call asks for is refused in turn: MemoryError, and `out` is as it was."""
    empty = np.empty
    out = np.full_like(X, 7)
    how = {"backend": backend}
    INTO[name](out.copy(), how)

    def refuse(number):
        left = iter(range(number))

        def grudging(*arguments, **keywords):
            if next(left, None) is None:
                raise MemoryError
            return empty(*arguments, **keywords)

        monkeypatch.setattr(np, "empty", grudging)

    for number in range(20):
        refuse(number)
        try:
            INTO[name](out, how)
        except MemoryError:
            assert (out == 7).all()
        else:
            break
    else:
        raise AssertionError("more than 20 arrays")
    assert number >= 1


@posix
@pytest.mark.parametrize("backend", calls.COMPILED)
def test_a_limit_of_memory(python, backend):
    """16 rows made of columns take 64 MB; where these are not to be had, nothing is lost."""
    code = f"""
import resource
import numpy as np
import fastloss as fl
def call(x):
    y = np.zeros((len(x), 16), int)
    return fl.cross_entropy_with_grad(x, y, axis=1, out=x, backend={backend!r})[0]
call(np.zeros((1, 400, 16), np.float32))
x = np.ones((1, 1_000_000, 16), np.float32)
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
before = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (used + 40_000_000, before[1]))
try:
    call(x)
except MemoryError:
    print("refused", (x == 1).all())
resource.setrlimit(resource.RLIMIT_AS, before)
print(round(call(x), 4))
"""
    assert python(code) == f"refused True\n{np.log(1e6):.4f}"


# ---------------------------------------------------------------------------------------------
# Threads
# ---------------------------------------------------------------------------------------------

NO_MORE_THREADS = """
import resource
def allow_no_more_threads():
    resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
    if os.geteuid() == 0:  # whom no limit holds
        os.setuid(65534)
import os
from support import calls
from fastloss._backend import _describe_threads
"""


@posix
@pytest.mark.parametrize("backend", calls.COMPILED)
@pytest.mark.parametrize("layer", ["omp", "workqueue"])
def test_threads_that_the_system_refuses(python, backend, layer):
    """OpenMP would exit the process; one thread does the work, and show_config says so."""
    code = (
        NO_MORE_THREADS
        + f"""
import fastloss as fl
fl.set_backend({backend!r})
expected = calls.digest({backend!r}, 1)
allow_no_more_threads()
print(calls.digest({backend!r}, 2) == expected, _describe_threads())
"""
    )
    environment = {"FASTLOSS_NUM_THREADS": "2", "NUMBA_NUM_THREADS": "2"}
    assert python(code, NUMBA_THREADING_LAYER=layer, **environment) == "True 1 (2 asked for)"


@posix
def test_threads_that_the_system_refuses_later(python):
    """Those that are there are used; no larger team is tried, in no other thread either."""
    code = (
        NO_MORE_THREADS
        + """
from concurrent.futures import ThreadPoolExecutor
pool = ThreadPoolExecutor(1)
expected = pool.submit(calls.digest, "cython", 1).result()
print(calls.digest("cython", 2) == expected, end=" ")
allow_no_more_threads()
print(calls.digest("cython", 8) == expected, end=" ")
print(pool.submit(calls.digest, "cython", 2).result() == expected)
"""
    )
    assert python(code) == "True True True"


# ---------------------------------------------------------------------------------------------
# Floating point of the caller
# ---------------------------------------------------------------------------------------------


@njit
def set_mode(mode):
    return set_float_mode(mode)


@pytest.mark.skipif(set_mode(np.uint32(0x1F80)) & 0x8040, reason="flushed all along")
@pytest.mark.parametrize("backend", COMPILED, indirect=True)
@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_flush_of_denormals_in_the_caller(backend, num_threads):
    """Set by a library that is linked with -ffast-math, as like as not."""
    x = np.zeros((20_000, 3), np.float32)
    x[:, 1] = np.linspace(-80, -110, len(x))
    x[:, 2] = 1e-40
    y = np.arange(len(x)) % 3
    how = {"backend": backend, "num_threads": num_threads}

    def results():
        loss, grad = fl.cross_entropy_with_grad(x, y, reduction="none", **how)
        return [loss, grad, fl.softmax(x, **how), fl.log_softmax(x, **how)]

    expected = results()
    assert ((expected[2] > 0) & (expected[2] < 1e-38)).any()
    before = set_mode(np.uint32(0x9FC0))  # results to 0, and inputs as if they were 0
    if set_mode(np.uint32(0x9FC0)) != 0x9FC0:
        pytest.skip("not a processor with this flag")
    try:
        flushed = results()
        after = set_mode(before)
    finally:
        set_mode(before)
    assert [a.tobytes() for a in flushed] == [a.tobytes() for a in expected]
    assert after & 0xFFC0 == 0x9FC0  # the low bits say what has happened


# ---------------------------------------------------------------------------------------------
# Numba's cache
# ---------------------------------------------------------------------------------------------

TWICE = """
from fastloss._numba.jit import entry
@entry
def twice(x):
    return x + x
"""


@pytest.fixture
def twice(tmp_path, python):
    """Call a function that is cached as the kernels are; return what came out and cache hits."""
    (tmp_path / "twice.py").write_text(TWICE)

    def run(code="", cache=tmp_path / "cache", command=()):
        code = f"""
from twice import twice
{code}
print(twice(3), twice(0.5), sum(twice.stats.cache_hits.values()))
"""
        return python(
            code, command=command, NUMBA_CACHE_DIR=str(cache), PYTHONPATH=str(tmp_path)
        )  # fmt: skip

    return run


def test_a_cache_that_works(twice, tmp_path):
    """In a directory that was missing. Signatures share no file: writers could swap their code."""
    assert twice() == "6 1.0 0"
    assert twice() == "6 1.0 2"
    assert len([*tmp_path.rglob("*.nbi")]) == len([*tmp_path.rglob("*.nbc")]) == 2


def test_an_edit_in_another_file(twice, tmp_path):
    """Functions are compiled from several files: with any of them their code is out of date."""
    package = tmp_path / "fastloss"
    shutil.copytree(Path(fl.__file__).parent, package)
    twice()
    for name in ("_numba/memory.py", "_contract.py"):
        with (package / name).open("a") as file:
            file.write("\n")
        assert twice() == "6 1.0 0"
    assert twice() == "6 1.0 2"


@pytest.mark.parametrize(("suffix", "kept"), [("nbi", 0), ("nbc", 0.5)])
def test_a_truncated_cache(twice, tmp_path, suffix, kept):
    """It is compiled anew, and mended."""
    twice()
    for path in tmp_path.rglob(f"*.{suffix}"):
        content = path.read_bytes()
        path.write_bytes(content[: int(kept * len(content))])
    assert twice() == "6 1.0 0"
    assert twice() == "6 1.0 2"


def test_nowhere_to_cache(twice, tmp_path):
    (tmp_path / "file").touch()
    assert twice(cache=tmp_path / "file" / "cache") == "6 1.0 0"


@posix
def test_a_read_only_cache(twice, tmp_path):
    """Before it holds anything, and after."""
    command = ()
    if os.geteuid() == 0:  # who may write anywhere
        if not shutil.which("setpriv"):
            pytest.skip("root cannot be kept from writing without setpriv")
        command = ("setpriv", "--bounding-set", "-dac_override,-dac_read_search")
    cache = tmp_path / "cache"
    cache.mkdir()
    cache.chmod(0o555)
    assert twice(command=command) == "6 1.0 0"
    cache.chmod(0o755)
    twice()
    for path in [*cache.rglob("*"), cache]:
        path.chmod(0o555)
    result = twice(command=command)
    for path in [cache, *cache.rglob("*")]:
        path.chmod(0o755)
    assert result in ("6 1.0 0", "6 1.0 2")


def test_a_cache_that_fails_later(twice, tmp_path):
    """The directory was there when the function was made, and is not when it is compiled."""
    code = f"""
import pathlib, shutil
shutil.rmtree({str(tmp_path / "cache")!r})
pathlib.Path({str(tmp_path / "cache")!r}).touch()
"""
    assert twice(code) == "6 1.0 0"


def test_four_processes_compile_at_once(tmp_path):
    """The same kernel into the same cold cache, which serves the fifth."""
    code = """
import numpy as np
from fastloss._contract import Labels, Options
from fastloss._numba import entries
y = np.arange(12).reshape(12, 1)
print(*entries.check_target(Labels(y, None, None), Options(-100), 10, 1), end=" ")
print(sum(entries.check_share.stats.cache_hits.values()))
"""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-W", "error", "-c", code]

    def start():
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)

    processes = [start() for _ in range(4)]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [output.split(" ")[:2] for output in outputs] == [["10", "0.0"]] * 4
    assert start().communicate(timeout=60)[0] == "10 0.0 1\n"


# ---------------------------------------------------------------------------------------------
# Installations that lack something
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def installation(tmp_path, python):
    """Run code where only NumPy, Numba (or not) and a copy of this package are installed."""
    package = Path(fl.__file__).parent
    copy = tmp_path / "fastloss"

    def run(code, *, numba=True, spoil=lambda copy: None):
        shutil.copytree(package, copy)
        spoil(copy)
        names = ["numpy", "numpy.libs", *["numba", "llvmlite", "llvmlite.libs"] * numba]
        for path in (Path(np.__file__).parents[1] / name for name in names):
            if path.exists():
                (tmp_path / path.name).symlink_to(path)
        return python(code, flags=["-S"], PYTHONPATH=str(tmp_path))  # -S: nothing else installed

    return run


def delete_extension(copy):
    for path in copy.glob("_kernels_*.so"):
        path.unlink()


def break_extension(copy):
    for path in copy.glob("_kernels_*.so"):
        path.write_bytes(b"not a library")


def test_without_numba(installation):
    code = """
import fastloss as fl
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
print(fl._backend._failure("numba"))
"""
    available, *errors, backend, config = installation(code, numba=False).split("\n")
    assert available == "['cython', 'numpy'] cython [0.5 0.5]"
    text = "backend 'numba' is not available: run `pip install numba` (No module named 'numba')"
    assert errors == [text] * 3
    assert backend == "cython"
    assert config == text


def test_where_numba_must_not_compile(python):
    code = """
import fastloss as fl
print(fl.available_backends(), fl.get_backend(), fl.softmax([1, 1]))
try:
    fl.softmax([1, 1], backend="numba")
except ImportError as error:
    print(error)
fl.show_config()
"""
    available, error, *config = python(code, NUMBA_DISABLE_JIT="1").split("\n")
    assert available == "['cython', 'numpy'] cython [0.5 0.5]"
    assert error == "backend 'numba' is not available: Numba compiles nothing, by NUMBA_DISABLE_JIT"
    assert f"backend numba            {error}" in config


@pytest.mark.parametrize("spoil", [delete_extension, break_extension])
def test_without_the_extension(installation, spoil):
    code = """
import numpy as np
import fastloss as fl
# The loss that compiles fastest, on one thread and then on many, as many as OpenMP would use.
scores = np.full((9999, 9), -0.5, np.float32)
losses = [fl.nll_loss(scores[:n], np.zeros(n, int)) for n in (1, 9999)]
print(fl.available_backends(), fl.get_backend(), *losses)
try:
    fl.softmax([1, 1], backend="cython")
except ImportError as error:
    print(error)
"""
    available, error = installation(code, spoil=spoil).split("\n")
    assert available == "['numba', 'numpy'] numba 0.5 0.5"
    assert error.startswith("backend 'cython' is not available: its compiled extension ")
    assert "pip install --force-reinstall --no-binary fastloss fastloss" in error


@pytest.mark.skipif(_cython.available_isas()[0] == "baseline", reason="one build only")
def test_one_broken_build(installation):
    """The next best runs, and whoever forces the broken one hears why not."""
    best, second, *_ = _cython.available_isas()
    code = f"""
import fastloss as fl
print(fl._backend.config()["cython instruction set"].split()[0])
fl.softmax([1, 1])
try:
    fl._cython.load({best!r})
except ValueError as error:
    print(error)
"""

    def spoil(copy):
        [path] = copy.glob(f"{_cython._BUILDS[best][0].rpartition('.')[2]}.*")
        path.write_bytes(b"not a library")

    used, error = installation(code, numba=False, spoil=spoil).split("\n")
    assert used == second
    assert error.startswith(f"FASTLOSS_ISA = {best!r} cannot be used: it ")


def test_without_either(installation):
    """Auto never falls to the slow reference; who asks for that by name gets it."""
    code = """
import fastloss as fl
try:
    fl.softmax([1, 1])
except ImportError as error:
    print(error)
print(fl.softmax([1, 1], backend="numpy"))
"""
    error, result = installation(code, numba=False, spoil=delete_extension).split("\n")
    assert "pip install numba" in error
    assert "--no-binary fastloss" in error
    assert result == "[0.5 0.5]"


@pytest.mark.skipif(_cython.most_threads() > 1, reason="built with OpenMP; .ci/serial is without")
def test_without_openmp(python):
    """One thread, whatever was asked for, and show_config says so."""
    code = """
from support import calls
from fastloss._backend import config
print(calls.digest("cython", 1) == calls.digest("cython", 5))
print(config()["threads"], config()["cython OpenMP"])
"""
    text = "True\n1 (3 asked for) none: this build is serial"
    assert python(code, FASTLOSS_NUM_THREADS="3") == text
