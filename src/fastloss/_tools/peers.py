"""What others offer for the same, each in a process of its own.

There its thread pool does not spin beside those of the others, its allocator can be set up (glibc
reads that when a process starts), and the thread count holds for it alone.
"""

import contextlib
import functools
import importlib
import importlib.util
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from fastloss._tools import measure

_KEEP = {"MALLOC_MMAP_THRESHOLD_": str(1 << 40), "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}


# The call that is timed, and what its answer means.
Bound = tuple[Callable[[], Any], Callable[[Any], measure.Result]]


class Peer(NamedTuple):
    module: str  # to import
    package: str  # to install
    bind: Callable[[measure.Case, measure.Data, int], Bound]
    supports: Callable[[measure.Case], bool]
    environment: Mapping[str, str] = {}


def _torch(case: measure.Case, data: measure.Data, threads: int) -> Bound:
    """A loss and backward, as in a training step: the gradient starts at None."""
    return _torch_loss("torch.nn.functional", case, data, threads)


def _adapter(case: measure.Case, data: measure.Data, threads: int) -> Bound:
    """The same with our own function in the place of PyTorch's."""
    return _torch_loss("fastloss.torch", case, data, threads)


# With the classes along dimension 1; what PyTorch does not have, as users write it.
_TORCH_LOSSES: dict[str, Callable[[Any, Any, Any], Any]] = {
    "cross_entropy_with_grad": lambda F, scores, target: F.cross_entropy(scores, target),
    "focal_loss_with_grad": lambda F, scores, target: _focal_by_hand(F, scores, target),
    "entropy_with_grad": lambda F, scores, target: _entropy_by_hand(F, scores),
    "binary_cross_entropy_with_logits_with_grad": lambda F, scores, target: (
        F.binary_cross_entropy_with_logits(scores, target)
    ),
}


def _focal_by_hand(F: Any, scores: Any, target: Any) -> Any:
    log_p = F.log_softmax(scores, 1).gather(1, target.unsqueeze(1))
    return -((1 - log_p.exp()) ** 2 * log_p).mean()


def _entropy_by_hand(F: Any, scores: Any) -> Any:
    log_p = F.log_softmax(scores, 1)
    return -(log_p.exp() * log_p).sum(1).mean()


def _torch_loss(module: str, case: measure.Case, data: measure.Data, threads: int) -> Bound:
    torch, functional = map(importlib.import_module, ("torch", module))
    torch.set_num_threads(threads)

    def tensor(array: np.ndarray) -> Any:
        if array.dtype.name == "bfloat16":  # which torch does not read from NumPy
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    logits = tensor(data.logits)
    if case.operation in _MAPS:
        function = getattr(torch, case.operation)
        return _map(functools.partial(function, logits, data.axis), data, torch.Tensor.double)
    logits.requires_grad_()
    # The classes are axis 1 there: a view, as a user of torch would have it.
    scores = logits if data.axis == 1 else logits.movedim(data.axis, 1)
    target = torch.from_numpy(data.target)
    if case.operation.startswith("binary"):
        answers = torch.from_numpy(data.answers).to(logits.dtype)
        target = answers if data.axis == 1 else answers.movedim(data.axis, 1)
    loss_of = _TORCH_LOSSES[case.operation]

    def call() -> Any:
        logits.grad = None
        loss = loss_of(functional, scores, target)
        loss.backward()
        return loss

    def result(loss: Any) -> measure.Result:
        return float(loss.detach()), logits.grad.to(torch.float64).numpy()

    return call, result


def _jax(case: measure.Case, data: measure.Data, threads: int) -> Bound:
    """Jitted value and gradient of the mean of lse - x_y."""
    jax = importlib.import_module("jax")
    jax.config.update("jax_enable_x64", data.dtype == np.float64)
    numpy, axis = jax.numpy, data.axis

    def mean_loss(logits: Any, target: Any) -> Any:
        target_logit = numpy.take_along_axis(logits, numpy.expand_dims(target, axis), axis)
        lse = jax.nn.logsumexp(logits, axis)
        return numpy.mean(lse - numpy.squeeze(target_logit, axis))

    logits, target = numpy.asarray(data.logits), numpy.asarray(data.target.astype(np.int32))
    if case.operation in _MAPS:
        jitted = jax.jit(functools.partial(getattr(jax.nn, case.operation), axis=axis))
        return _map(lambda: jax.block_until_ready(jitted(logits)), data)
    function = jax.jit(jax.value_and_grad(mean_loss))

    def call() -> Any:
        return jax.block_until_ready(function(logits, target))

    def result(value_and_grad: Any) -> measure.Result:
        loss, grad = value_and_grad
        return float(loss), np.asarray(grad)

    return call, result


def _scipy(case: measure.Case, data: measure.Data, threads: int) -> Bound:
    special = importlib.import_module("scipy.special")
    function = getattr(special, case.operation)
    return _map(functools.partial(function, data.logits, axis=data.axis), data)


def _sklearn(case: measure.Case, data: measure.Data, threads: int) -> Bound:
    """Losses and gradients of the rows, into the caller's arrays; their mean is not timed."""
    loss_module = importlib.import_module("sklearn._loss")
    function = loss_module.HalfMultinomialLoss(n_classes=data.shape[1])
    arrays = {
        "y_true": data.target.astype(data.dtype),
        "raw_prediction": data.logits,
        "loss_out": np.empty(data.shape[0], data.dtype),
        "gradient_out": data.out,
    }

    def call() -> Any:
        return function.loss_gradient(**arrays, n_threads=threads)

    def result(losses_and_gradients: Any) -> measure.Result:
        losses, gradients = losses_and_gradients
        return float(losses.mean(dtype=np.float64)), gradients / data.normalizer

    return call, result


def _map(
    call: Callable[[], Any], data: measure.Data, convert: Callable[[Any], Any] = np.asarray
) -> Bound:
    """What gives an array, with the classes' axis or without it."""

    def result(answer: Any) -> measure.Result:
        array = np.asarray(convert(answer), np.float64)
        return None, np.expand_dims(array, data.axis) if array.ndim < len(data.shape) else array

    return call, result


_MAPS = ("softmax", "log_softmax", "logsumexp")


def _plain(case: measure.Case) -> bool:
    return case.operation == "cross_entropy_with_grad"


def _torch_has(case: measure.Case) -> bool:
    return case.operation in _TORCH_LOSSES


def _torch_has_or_map(case: measure.Case) -> bool:
    return _torch_has(case) or case.operation in _MAPS


def _plain_or_map(case: measure.Case) -> bool:
    return _plain(case) or case.operation in _MAPS


def _numpy_map(case: measure.Case) -> bool:
    return case.operation in _MAPS and case.dtype in ("float32", "float64")


def _real_rows(case: measure.Case) -> bool:
    """float32 and float64, at least three classes, and those last: what scikit-learn takes."""
    last = len(case.shape) == 2 and case.axis == 1
    return _plain(case) and last and case.num_classes > 2 and case.dtype in ("float32", "float64")


PEERS = {
    "torch": Peer("torch", "torch", _torch, _torch_has_or_map),
    "torch-malloc": Peer("torch", "torch", _torch, _torch_has, _KEEP),
    "fastloss.torch": Peer("torch", "torch", _adapter, _plain),
    "jax": Peer("jax", "jax", _jax, _plain_or_map),
    "scipy": Peer("scipy", "scipy", _scipy, _numpy_map),
    "sklearn": Peer("sklearn", "scikit-learn", _sklearn, _real_rows),
}


def installed() -> list[str]:
    return [name for name, peer in PEERS.items() if importlib.util.find_spec(peer.module)]


def require(names: Iterable[str]) -> None:
    for name in names:
        if not importlib.util.find_spec(PEERS[name].module):
            package = PEERS[name].package
            raise ImportError(f"peer {name!r} is not installed; run `pip install {package}`")


def packages(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(PEERS[name].package for name in names))


class Workers:
    """A process for each peer, for as long as the `with` block lasts."""

    def __init__(self, names: Sequence[str], num_threads: int) -> None:
        self._names, self._num_threads = names, num_threads
        self._pools: dict[str, ProcessPoolExecutor] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Workers":
        context = multiprocessing.get_context("spawn")
        for name in self._names:
            pool = ProcessPoolExecutor(1, context, _start, (self._num_threads,))
            self._pools[name] = self._stack.enter_context(pool)
            with _environment(PEERS[name].environment):
                pool.submit(os.getpid).result()  # the process starts here
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def contenders(self, case: measure.Case) -> dict[str, measure.Contender]:
        names = [name for name in self._names if PEERS[name].supports(case)]
        return {name: _Remote(self._pools[name], name, case, self._num_threads) for name in names}


class _Remote:
    """A contender in another process."""

    def __init__(
        self, pool: ProcessPoolExecutor, name: str, case: measure.Case, num_threads: int
    ) -> None:
        self._pool = pool
        self._case = (name, case, num_threads)

    def visit(self, seconds: float) -> list[float]:
        return self._pool.submit(_visit, *self._case, seconds).result()

    def sample(self, rows: np.ndarray) -> measure.Result:
        return self._pool.submit(_sample, *self._case, rows).result()


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


# In the worker process:


def _start(num_threads: int) -> None:
    """JAX has no thread count: it takes the CPUs that it may run on."""
    if hasattr(os, "sched_setaffinity"):
        cpus = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cpus[:num_threads])


@functools.lru_cache(maxsize=1)
def _bound(name: str, case: measure.Case, threads: int) -> Bound:
    return PEERS[name].bind(case, measure.Data(case.shape, case.axis, case.dtype), threads)


def _visit(name: str, case: measure.Case, threads: int, seconds: float) -> list[float]:
    call, _ = _bound(name, case, threads)
    return measure.visit(call, seconds)


def _sample(name: str, case: measure.Case, threads: int, rows: np.ndarray) -> measure.Result:
    call, result = _bound(name, case, threads)
    loss, array = result(call())
    return loss, None if array is None else measure.pick(array, case.axis, rows)
