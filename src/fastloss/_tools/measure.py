"""Measuring: the cases, the physical limit, interleaved timing and the error beside the speed.

A call that reads the logits once and writes as much is held against a parallel copy of the same
arrays on as many threads, one that only reads against a parallel read; what moves more, against the
sum of such passes.  The limit is the better of two implementations, measured in turn with
everything else: only ratios within a run mean something.
"""

import datetime
import functools
import importlib.metadata
import importlib.util
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import numba
import numpy as np

import fastloss as fl
from fastloss import _backend, _operations, _threads
from fastloss._operations import Operation, Variant

BACKENDS = ("cython", "numba")
CHOICES = (*BACKENDS, "numpy")
DTYPES = ("float32", "float64", "float16", "bfloat16")
SHAPES = (
    "1024x32000", "32768x1000", "262144x100", "524288x64", "1048576x10", "4194304x2",
    "8x21x512x512@1", "32x10",
)  # fmt: skip
SMALL_SHAPES = ("1x10", "32x10", "256x10", "32x1000", "1x32000")
QUICK_SHAPES = ("64x1000", "1024x10", "2x21x16x16@1", "32x10")

_SETTLE = 0.005  # OpenMP threads spin on for a few milliseconds after their work: let them stop
_REFERENCE_ELEMENTS = 1 << 24  # the NumPy reference takes seconds above
_SAMPLE_ELEMENTS = 1 << 18  # of the result, compared with float64
_CHUNK_ELEMENTS = 1 << 20  # converted to float64 at a time

Result = tuple[float | None, np.ndarray | None]  # of one call: the loss, the array
Call = Callable[[], Any]


class Effort(NamedTuple):
    """How often everything is visited in turn, and for how long each time."""

    repeats: int
    seconds: float


FULL, QUICK = Effort(7, 0.05), Effort(2, 0.002)


class Case(NamedTuple):
    operation: str
    shape: tuple[int, ...]
    axis: int  # of the classes
    dtype: str
    series: str = "shapes"  # or the sweep that it is a point of: "classes", "rows"

    @property
    def num_classes(self) -> int:
        return self.shape[self.axis]

    @property
    def rows(self) -> int:
        return math.prod(self.shape) // self.num_classes

    def __str__(self) -> str:
        return f"{self.operation} {format_shape(self.shape, self.axis)} {self.dtype}"


def parse_shape(text: str) -> tuple[tuple[int, ...], int]:
    """``8x21x512x512@1`` is a shape and the axis of its classes, by default the last."""
    lengths, _, axis_text = text.partition("@")
    try:
        shape = tuple(int(length) for length in lengths.split("x"))
        axis = int(axis_text or -1) % len(shape)
    except ValueError:
        raise ValueError(f"{text!r} is not a shape such as 1024x32000 or 8x21x512x512@1") from None
    if min(shape) < 1 or int(axis_text or -1) not in (axis, axis - len(shape)):
        raise ValueError(f"{text!r}: lengths are at least 1 and the axis is one of the shape's")
    return shape, axis


def format_shape(shape: Iterable[int], axis: int) -> str:
    lengths = list(shape)
    return "x".join(map(str, lengths)) + (f"@{axis}" if axis != len(lengths) - 1 else "")


def sweep(elements: int = 1 << 25) -> Iterator[tuple[tuple[int, int], str]]:
    """Shapes of (almost) as many elements each over C; then over N with C fixed; and their series.

    The steps in C are small enough that a cliff shows as one.
    """
    classes = {1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 17, 24, 32, 33, 48, 63, 64, 65, 96, 100, 1000}
    classes |= {round(125 * 2 ** (i / 2)) for i in range(21)} | {32000, 128256, 200_000}
    for num_classes in sorted(classes):
        if num_classes <= elements:
            yield (elements // num_classes, num_classes), "classes"
    for num_classes in (10, 1000):
        for power in range(23):
            if num_classes << power <= 2 * elements:
                yield (1 << power, num_classes), "rows"


# ---------------------------------------------------------------------------------------------
# Data and operations
# ---------------------------------------------------------------------------------------------


class Data:
    """The arrays that an operation works on, made when first asked for and the same every time."""

    def __init__(
        self, shape: tuple[int, ...], axis: int, dtype: Any, rows: int | None = None
    ) -> None:
        self.shape, self.axis, self.dtype = shape, axis % len(shape), as_dtype(dtype)
        # The divisor of the mean; a sample of the rows has that of the whole.
        self.normalizer = float(rows or math.prod(shape) // shape[axis])

    def _normal(self, seed: int, scale: float) -> np.ndarray:
        numbers = np.random.default_rng(seed).standard_normal(self.shape, np.float32)
        numbers *= scale
        return numbers.astype(self.dtype, copy=False)

    @functools.cached_property
    def logits(self) -> np.ndarray:
        return self._normal(0, 3.0)

    @functools.cached_property
    def target(self) -> np.ndarray:
        shape = self.shape[: self.axis] + self.shape[self.axis + 1 :]
        return np.random.default_rng(1).integers(0, self.shape[self.axis], shape)

    @functools.cached_property
    def out(self) -> np.ndarray:
        out = np.empty(self.shape, self.dtype)
        out.fill(0)  # written once: no page faults when measured
        return out

    @functools.cached_property
    def answers(self) -> np.ndarray:
        return np.random.default_rng(6).random(self.shape, np.float32) < 0.1

    @functools.cached_property
    def pos_weight(self) -> np.ndarray:
        return np.random.default_rng(7).uniform(0.5, 2.0, self.shape[self.axis])

    @functools.cached_property
    def weight(self) -> np.ndarray:
        return np.random.default_rng(2).uniform(0.5, 2.0, self.shape[self.axis])

    @functools.cached_property
    def sample_weight(self) -> np.ndarray:
        return np.random.default_rng(5).uniform(0.5, 2.0, self.target.shape)

    @functools.cached_property
    def rows_out(self) -> np.ndarray:
        return np.zeros(self.target.shape, self.dtype)

    @functools.cached_property
    def probabilities(self) -> np.ndarray:
        return fl.softmax(self._normal(3, 1.0), self.axis)

    @functools.cached_property
    def grad_output(self) -> np.ndarray:
        return self._normal(4, 1.0)

    @functools.cached_property
    def probs(self) -> np.ndarray:
        return fl.softmax(self.logits, self.axis)

    @functools.cached_property
    def log_probs(self) -> np.ndarray:
        return fl.log_softmax(self.logits, self.axis)

    def sample(self, rows: np.ndarray) -> "Data":
        """Some of the rows, in float64 and with the classes last."""
        return _Sample(self, rows)


class _Sample(Data):
    def __init__(self, whole: Data, rows: np.ndarray) -> None:
        shape = (len(rows), whole.shape[whole.axis])
        super().__init__(shape, 1, np.float64, int(whole.normalizer))
        self._whole, self._rows = whole, rows

    def _picked(self, name: str) -> np.ndarray:
        return pick(getattr(self._whole, name), self._whole.axis, self._rows)

    logits = functools.cached_property(lambda self: self._picked("logits"))
    probabilities = functools.cached_property(lambda self: self._picked("probabilities"))
    grad_output = functools.cached_property(lambda self: self._picked("grad_output"))
    probs = functools.cached_property(lambda self: self._picked("probs"))
    log_probs = functools.cached_property(lambda self: self._picked("log_probs"))
    target = functools.cached_property(lambda self: self._whole.target.reshape(-1)[self._rows])
    answers = functools.cached_property(lambda self: self._picked("answers"))
    pos_weight = functools.cached_property(lambda self: self._whole.pos_weight)
    weight = functools.cached_property(lambda self: self._whole.weight)
    sample_weight = functools.cached_property(
        lambda self: self._whole.sample_weight.reshape(-1)[self._rows]
    )


def pick(array: np.ndarray, axis: int, rows: np.ndarray) -> np.ndarray:
    """Some rows, counted over all axes but that of the classes, in float64: (len(rows), C)."""
    rows_first = np.moveaxis(array, axis, -1)
    return rows_first[np.unravel_index(rows, rows_first.shape[:-1])].astype(np.float64)


def as_dtype(dtype: Any) -> np.dtype[Any]:
    result: np.dtype[Any] = np.dtype(need("ml_dtypes").bfloat16 if dtype == "bfloat16" else dtype)
    return result


def need(module: str) -> Any:
    """A module of the extra `bench`."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{module.split('.')[0]} is not installed; run `pip install 'fastloss[bench]'`",
            name=module,
        ) from error


class Measured(NamedTuple):
    """A public function on `Data`, and the least that it must move in passes over the logits."""

    copies: int
    reads: int
    run: Callable[..., Result]  # (data, backend=, num_threads=)
    # Where the result is a difference that may vanish: the terms, by which errors are judged.
    terms: Callable[[Data], np.ndarray] | None = None

    def limit(self, copy: float, read: float) -> float:
        return self.copies * copy + self.reads * read

    def bytes_moved(self, nbytes: int) -> int:
        return (2 * self.copies + self.reads) * nbytes


def _measured(operation: Operation) -> Iterator[tuple[str, Measured]]:
    """An operation by the names that `--operation` takes."""
    name = operation.name
    if operation.family == "map":
        copies, reads = (1, 0) if operation.returns == "logits" else (0, 1)
        yield name, Measured(copies, reads, _map(operation))
    elif operation.family == "backward":
        yield name, Measured(1, 1, _map(operation), _upstream_terms(operation))
    elif operation.scores == "logits":  # log-probabilities are only looked up: that has no limit
        yield name, Measured(0, 1, _loss(next(iter(operation.variants))))
        for variant in operation.variants:
            title = "+" * bool(variant.title) + variant.title.replace(" ", "+")
            reads = 1 if variant.soft else 0
            run, terms = _with_grad(variant), _target_terms(variant)
            yield f"{name}_with_grad{title}", Measured(1, reads, run, terms)


def _map(operation: Operation) -> Callable[..., Result]:
    function = getattr(fl, operation.name)

    def run(data: Data, **how: Any) -> Result:
        inputs = [getattr(data, name) for name in operation.inputs]
        if operation.returns == "logits":
            return None, function(*inputs, data.axis, out=data.out, **how)
        rows = function(*inputs, data.axis, out=data.rows_out, **how)
        return None, np.expand_dims(rows, data.axis)

    return run


def _loss(variant: Variant) -> Callable[..., Result]:
    function = getattr(fl, variant.operation.name)

    def run(data: Data, **how: Any) -> Result:
        return float(function(*_arrays(data, variant), **_keywords(data, variant), **how)), None

    return run


def _with_grad(variant: Variant) -> Callable[..., Result]:
    function = getattr(fl, f"{variant.operation.name}_with_grad")

    def run(data: Data, **how: Any) -> Result:
        loss, grad = function(
            *_arrays(data, variant), out=data.out, **_keywords(data, variant), **how
        )
        return float(loss), grad

    return run


def _arrays(data: Data, variant: Variant) -> list[np.ndarray]:
    arrays = [getattr(data, variant.operation.scores)]
    if variant.operation.family == "binary":
        arrays.append(data.answers)
    elif variant.operation.family == "loss":
        arrays.append(data.probabilities if variant.soft else data.target)
    return arrays


def _keywords(data: Data, variant: Variant) -> dict[str, Any]:
    arrays = {name: getattr(data, name) for name in variant.arrays}
    # The mean over a sample is to be divided by as much as that over the whole.
    each = data.shape[data.axis] if variant.operation.family == "binary" else 1
    how = {"axis": data.axis, "reduction": "mean", "normalizer": data.normalizer * each}
    return {**how, **arrays, **variant.options}


def _upstream_terms(operation: Operation) -> Callable[[Data], np.ndarray]:
    if operation.name == "softmax_backward":
        return lambda data: data.grad_output * data.probs
    return lambda data: data.grad_output


def _target_terms(variant: Variant) -> Callable[[Data], np.ndarray] | None:
    """What is spread over all classes and taken off a multiple of p."""
    smoothing = variant.options.get("label_smoothing", 0.0)
    if not variant.soft and not smoothing:
        return None

    def terms(data: Data) -> np.ndarray:
        answers = 2 if variant.operation.family == "binary" else data.shape[data.axis]
        uniform = smoothing / answers
        t = (1 - smoothing) * data.probabilities + uniform if variant.soft else uniform
        weights = [data.weight, data.sample_weight[:, None]] if variant.arrays else [1.0, 1.0]
        result: np.ndarray = t * weights[0] * weights[1] / data.normalizer * np.ones(data.shape)
        return result

    return terms


OPERATIONS = {
    name: measured
    for operation in _operations.OPERATIONS.values()
    for name, measured in _measured(operation)
}
DEFAULT_OPERATIONS = ("cross_entropy_with_grad", "cross_entropy", "softmax", "log_softmax")
SMALL_OPERATIONS = (*DEFAULT_OPERATIONS, "logsumexp")


# ---------------------------------------------------------------------------------------------
# The limit
# ---------------------------------------------------------------------------------------------


def _copy_shares(source, destination, threads):  # type: ignore[no-untyped-def]
    for thread in numba.prange(threads):
        start, stop = source.size * thread // threads, source.size * (thread + 1) // threads
        # Slices, so that no index can be negative: that is what lets LLVM vectorise.
        share, copy = source[start:stop], destination[start:stop]
        for i in range(share.size):
            copy[i] = share[i]


def _read_shares(source, threads):  # type: ignore[no-untyped-def]
    folded = np.zeros(threads, np.uint64)
    for thread in numba.prange(threads):
        start, stop = source.size * thread // threads, source.size * (thread + 1) // threads
        share = source[start:stop]
        total = np.uint64(0)
        for i in range(share.size):
            total ^= share[i]
        folded[thread] = total
    return folded


_copy_parallel = numba.njit(parallel=True, nogil=True)(_copy_shares)
_read_parallel = numba.njit(parallel=True, nogil=True)(_read_shares)


class Limits:
    """Copies and reads of whole 8-byte words by both means: Numba's loops and NumPy's."""

    def __init__(self, source: np.ndarray, destination: np.ndarray, threads: int) -> None:
        self._source, self._destination = _words(source), _words(destination)
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads)
        size = self._source.size
        self._shares = [
            slice(size * i // threads, size * (i + 1) // threads) for i in range(threads)
        ]

    def calls(self) -> dict[str, Call]:
        return {
            "copy numba": lambda: self._on_numba(_copy_parallel, self._source, self._destination),
            "copy numpy": lambda: self._on_pool(
                lambda share: np.copyto(self._destination[share], self._source[share])
            ),
            "read numba": lambda: self._on_numba(_read_parallel, self._source),
            "read numpy": lambda: self._on_pool(
                lambda share: np.bitwise_or.reduce(self._source[share])
            ),
        }

    def _on_numba(self, function: Callable[..., Any], *arrays: np.ndarray) -> None:
        config: Any = numba.config
        before = numba.get_num_threads()
        numba.set_num_threads(min(self._threads, config.NUMBA_NUM_THREADS))
        try:
            function(*arrays, self._threads)
        finally:
            numba.set_num_threads(before)

    def _on_pool(self, function: Callable[[slice], Any]) -> None:
        if self._threads == 1:
            function(self._shares[0])
        else:
            list(self._pool.map(function, self._shares))

    def __enter__(self) -> "Limits":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()


def _words(array: np.ndarray) -> np.ndarray:
    flat = array.reshape(-1).view(np.uint8)
    return flat[: flat.size // 8 * 8].view(np.uint64)


def best_limits(times: Mapping[str, list[float]]) -> dict[str, dict[str, Any]]:
    """For copy and read the better of the two means."""
    limits = {}
    for kind in ("copy", "read"):
        name = min((name for name in times if name.startswith(kind)), key=lambda n: min(times[n]))
        limits[kind] = {"by": name.split()[1], **summary(times[name])}
    return limits


# ---------------------------------------------------------------------------------------------
# Time
# ---------------------------------------------------------------------------------------------


class Contender(Protocol):
    def visit(self, seconds: float) -> list[float]:
        """Times of consecutive calls."""

    def sample(self, rows: np.ndarray) -> Result:
        """The loss and some rows of the array, as `pick` hands them out."""


class Local:
    """A contender in this process."""

    def __init__(self, call: Call, axis: int) -> None:
        self._call, self._axis = call, axis

    def visit(self, seconds: float) -> list[float]:
        return visit(self._call, seconds)

    def sample(self, rows: np.ndarray) -> Result:
        loss, array = self._call()
        return loss, None if array is None else pick(array, self._axis, rows)


def visit(call: Call, seconds: float) -> list[float]:
    call()  # brings back the threads and the caches that the others took: not counted
    times: list[float] = []
    end = time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times


def interleave(
    contenders: Mapping[str, Contender], effort: Effort
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Times by name, visited A B C A B C ...; and what those said that failed."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    errors: dict[str, str] = {}
    for _ in range(effort.repeats):
        for name, contender in contenders.items():
            if name in errors:
                continue
            time.sleep(_SETTLE)
            try:
                times[name] += contender.visit(effort.seconds)
            except Exception as error:  # a peer without this dtype, or too little memory: go on
                errors[name] = _describe(error)
    return {name: t for name, t in times.items() if name not in errors}, errors


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def summary(times: list[float]) -> dict[str, Any]:
    return {"best": min(times), "median": statistics.median(times), "calls": len(times)}


# ---------------------------------------------------------------------------------------------
# Error
# ---------------------------------------------------------------------------------------------


def sample_rows(case: Case) -> np.ndarray:
    count = max(1, min(case.rows, _SAMPLE_ELEMENTS // case.num_classes))
    return np.linspace(0, case.rows - 1, count).astype(np.intp)


class Expected(NamedTuple):
    """What the reference makes of the same inputs in float64."""

    loss: float | None  # of all rows
    array: np.ndarray | None  # some rows
    size: np.ndarray | None  # of each of these, the largest entry or term


def exact(case: Case, data: Data, rows: np.ndarray) -> Expected:
    operation = OPERATIONS[case.operation]
    run = functools.partial(operation.run, backend="numpy", num_threads=1)
    sample = data.sample(rows)
    loss, array = run(sample)
    size = None
    if array is not None:
        size = np.abs(array).max(axis=1)
        if operation.terms:
            size = np.maximum(size, np.abs(operation.terms(sample)).max(axis=1))
    if loss is not None:
        step = max(1, _CHUNK_ELEMENTS // case.num_classes)
        chunks = (np.arange(i, min(i + step, case.rows)) for i in range(0, case.rows, step))
        loss = math.fsum(run(data.sample(chunk))[0] or 0.0 for chunk in chunks)
    return Expected(loss, array, size)


def errors_in_ulp(got: Result, expected: Expected, dtype: np.dtype) -> dict[str, float | None]:
    """Of the loss; and of the array, each row's largest error in ulp of its size.

    A loss is a Python float, whatever the dtype: it is judged by that of the logits, float32 for
    the half types.
    """
    loss = array = None
    if got[0] is not None and expected.loss is not None:
        real = np.dtype(np.float64 if dtype == np.float64 else np.float32)
        loss = float(abs(got[0] - expected.loss) / ulp(np.asarray(expected.loss), real))
    if got[1] is not None and expected.array is not None and expected.size is not None:
        error = np.abs(got[1] - expected.array).max(axis=1)
        array = float((error / ulp(expected.size, dtype)).max())
    return {"loss_ulp": loss, "array_ulp": array}


def ulp(value: np.ndarray, dtype: np.dtype) -> Any:
    """The distance between neighbouring numbers of the dtype at a value."""
    finfo: Any = np.finfo if dtype.kind == "f" else need("ml_dtypes").finfo
    limits = finfo(dtype)
    normal = np.maximum(np.abs(value.astype(np.float64)), float(limits.smallest_normal))
    return np.ldexp(1.0, np.frexp(normal)[1] - 1 - limits.nmant)


# ---------------------------------------------------------------------------------------------
# All together
# ---------------------------------------------------------------------------------------------


def measure(
    case: Case,
    backends: Iterable[str],
    peers: Callable[[Case], Mapping[str, Contender]],
    num_threads: int,
    effort: Effort,
) -> dict[str, Any]:
    """One case with all contenders, as it goes into the JSON file."""
    operation = OPERATIONS[case.operation]
    data = Data(case.shape, case.axis, case.dtype)
    threads = _threads.threads_for(num_threads, data.logits.size)
    contenders: dict[str, Contender] = {}
    for name in backends:
        if name != "numpy" or data.logits.size <= _REFERENCE_ELEMENTS:
            call = functools.partial(operation.run, data, backend=name, num_threads=num_threads)
            contenders[name] = Local(call, data.axis)
    contenders.update(peers(case))

    with Limits(data.logits, data.out, threads) as limits:
        calls = limits.calls()
        runners = {name: Local(call, 0) for name, call in calls.items()}
        times, errors = interleave({**runners, **contenders}, effort)
    floor = best_limits({name: times[name] for name in calls})
    limit = operation.limit(floor["copy"]["best"], floor["read"]["best"])

    rows = sample_rows(case)
    expected = exact(case, data, rows)

    def entry(name: str) -> dict[str, Any]:
        if name in errors:
            return {"error": errors[name]}
        try:
            got = contenders[name].sample(rows)
        except Exception as error:  # as in interleave
            return {"error": _describe(error)}
        best = min(times[name])
        return {
            **summary(times[name]),
            "ratio": best / limit,
            "gb_per_s": operation.bytes_moved(data.logits.nbytes) / best / 1e9,
            **errors_in_ulp(got, expected, data.dtype),
        }

    return {
        **case._asdict(),
        "shape": list(case.shape),
        "axis": data.axis,
        "threads": threads,
        **floor,
        "limit": {"copies": operation.copies, "reads": operation.reads, "seconds": limit},
        "contenders": {name: entry(name) for name in contenders},
    }


def environment(num_threads: int, peer_packages: Iterable[str]) -> dict[str, Any]:
    """What a reader must know about where the numbers come from."""
    packages = ("fastloss", "numpy", "numba", *peer_packages)
    versions = {"python": platform.python_version()}
    versions |= {name: importlib.metadata.version(name) for name in packages}
    config = _backend.config()
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cpu": config["CPU"],
        "cpus": os.cpu_count(),
        "threads": num_threads,
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions,
        "config": config,
    }
