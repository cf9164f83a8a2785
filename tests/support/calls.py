"""Calls whose bits threads and processes compare; children import it, so it needs no test tool."""

import hashlib
import os
import random
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np

import fastloss as fl
from fastloss._operations import OPERATIONS

_rng = np.random.default_rng(0)
X = _rng.normal(size=(3500, 20)).astype(np.float32)  # each of these is enough for two threads
LONG = _rng.normal(size=(70, 1025)).astype(np.float32)
IMAGES = _rng.normal(size=(2, 21, 40, 45)).astype(np.float32)
P = fl.softmax(X, backend="numpy")
Y = _rng.integers(0, 20, len(X))
CLASSES = _rng.integers(0, 21, (2, 40, 45))
SOFT = _rng.dirichlet(np.ones(20), len(X)).astype(np.float32)
W = _rng.normal(size=(300, 20)).astype(np.float32)

ARRAYS = {"logits": X, "grad_output": X, "probs": P, "log_probs": np.log(P), "target": Y}


def _call(operation):
    function = getattr(fl, operation.functions[-1])
    own = {"target": X > 1} if operation.family == "binary" else {}
    arrays = [(ARRAYS | own)[name] for name in operation.inputs]
    return lambda how: function(*arrays, **operation.options, **how)


CALLS = {operation.name: _call(operation) for operation in OPERATIONS.values()} | {
    "softmax of long rows": lambda how: fl.softmax(LONG, **how),
    "log_softmax in float64": lambda how: fl.log_softmax(X.astype(np.float64), **how),
    "logsumexp of images": lambda how: fl.logsumexp(IMAGES, 1, **how),
    "cross_entropy of images": lambda how: fl.cross_entropy_with_grad(
        IMAGES, CLASSES, axis=1, **how
    ),
    "cross_entropy of probabilities": lambda how: fl.cross_entropy_with_grad(X, SOFT, **how),
    "linear_cross_entropy": lambda how: _flat(
        fl.linear_cross_entropy_with_grad(
            X, W, Y, linear_bias=W[:, 0], inputs_grad=True, l2=0.1, **how
        )
    ),
}
COMPILED = ["cython", "numba"]


def _flat(result):
    loss, gradients = result
    return loss, *gradients


def bits(name, backend, num_threads):
    result = CALLS[name]({"backend": backend, "num_threads": num_threads})
    results = result if isinstance(result, tuple) else (result,)
    return b"".join(np.ascontiguousarray(array).tobytes() for array in results)


def digest(backend, num_threads=2):
    """One word for the bits of all calls."""
    every = b"".join(bits(name, backend, num_threads) for name in CALLS)
    return hashlib.sha256(every).hexdigest()


def wrong_of_many_threads(seconds, threads=8):
    """Mixed operations on mixed backends, all threads at once: what came out other than alone."""
    jobs = [(name, backend) for name in CALLS for backend in COMPILED]
    expected = {job: bits(*job, 1) for job in jobs}
    wrong, done = [], []
    end = time.monotonic() + seconds

    def work(seed):
        choice = random.Random(seed)
        while time.monotonic() < end:
            job, num_threads = choice.choice(jobs), choice.choice((1, 2, 3))
            if bits(*job, num_threads) != expected[job]:
                wrong.append((*job, num_threads))
            done.append(job)

    workers = [threading.Thread(target=work, args=[seed]) for seed in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(set(done)) == len(jobs)
    return wrong


def children_agree(method):
    """Whether children that multiprocessing starts in this way compute the bits of this process."""
    here = [digest(backend) for backend in COMPILED]
    with ProcessPoolExecutor(2, mp_context=get_context(method)) as pool:
        return [*pool.map(digest, COMPILED * 2, timeout=60)] == here * 2


def growth_of_memory(backend, calls=100_000):
    """How many bytes of resident memory so many calls leave behind, errors included."""
    _some_calls(backend, calls // 5)
    before = _resident()
    _some_calls(backend, calls)
    return _resident() - before


def _some_calls(backend, count):
    x, y, out = X[:8], Y[:8].copy(), np.empty_like(X[:8])
    bad = y.copy()
    bad[3] = 99
    how = {"backend": backend, "num_threads": 2}
    for i in range(count // 5):
        fl.softmax(x, **how)
        fl.cross_entropy_with_grad(x, y, out=out, **how)
        _fails(fl.cross_entropy_with_grad, x, bad, out=out, **how)
        _fails(fl.nll_loss, x, y[1:], **how)
        _fails(fl.softmax, x, out=P, **how)
        if i % 50 == 0:
            fl.cross_entropy_with_grad(X, Y, **how)


def _fails(function, *arguments, **keywords):
    try:
        function(*arguments, **keywords)
    except (IndexError, ValueError):
        return
    raise AssertionError("no error")


def _resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def threads_of_process():
    return len(os.listdir("/proc/self/task"))


def threads_left_behind(backend, callers=200):
    """How many threads of the system are there afterwards, when many of Python have called."""
    digest(backend)
    time.sleep(0.1)  # the threads of the linear head may not be quite gone
    before = threads_of_process()
    for _ in range(callers):
        caller = threading.Thread(target=bits, args=["softmax", backend, 2])
        caller.start()
        caller.join()
    end = time.monotonic() + 10
    while threads_of_process() > before and time.monotonic() < end:
        time.sleep(0.01)
    return threads_of_process() - before


def threads_of_a_call(backend):
    """How many threads show_config announces, and how many are there after a large call."""
    from fastloss._backend import config

    fl.set_backend(backend)
    fl.softmax(X, num_threads=1)  # Numba and the libraries that it loads start some of their own
    time.sleep(0.1)
    before = threads_of_process()
    fl.softmax(X)
    time.sleep(0.1)  # OpenMP keeps its threads; others come to an end
    used = threads_of_process() - before + 1  # before config() starts Numba's, to name its layer
    return int(config()["threads"].split()[0]), used
