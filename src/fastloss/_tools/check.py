"""Does every backend, on every instruction set that works here, agree with the reference?

Kernels are called as ``functional`` calls them and with the same arrays as the reference: over
shapes that reach every layout, on one thread and on two, in place and not, with each option.
"""

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fastloss import _backend, _reference
from fastloss._contract import Kernels, Labels, Loss, Options
from fastloss._operations import VARIANTS, Operation, Variant
from fastloss._tools.measure import as_dtype, ulp

CLASSES = (1, 2, 3, 17, 64, 65, 1000, 3000)
_IGNORED = -100
_SCALE = 0.37  # the factor on the gradients: any number that is not a power of two
_MAX_GAP = 200.0  # a probability so far below the maximum is 0 in float32

CHECKED = (*VARIANTS, "check_target")

Arrays = dict[str, np.ndarray]


class Outcome(NamedTuple):
    """All comparisons of one operation in one dtype: by backend, the worst and its place."""

    operation: str
    dtype: str
    worst: Mapping[str, float]  # the largest error as a share of what is allowed
    where: Mapping[str, str]

    @property
    def disagreeing(self) -> list[str]:
        return [backend for backend, share in self.worst.items() if not share <= 1]


def backends() -> tuple[dict[str, Kernels], dict[str, str]]:
    """The kernels to check by name, Cython's once for each instruction set; and what is missing."""
    found: dict[str, Kernels] = {}
    missing: dict[str, str] = {}
    for name in ("cython", "numba"):
        try:
            module = _backend.resolve(name)
        except ImportError as error:
            missing[name] = str(error)
            continue
        if name == "cython":
            from fastloss import _cython

            for isa in _cython.available_isas():
                found[f"cython {isa}"] = _cython.load(isa)
        else:
            found[name] = module
    return found, missing


def dtypes() -> list[str]:
    names = ["float32", "float64", "float16"]
    return names + ["bfloat16"] * (importlib.util.find_spec("ml_dtypes") is not None)


def run(kernels: Mapping[str, Kernels], classes: Sequence[int] = CLASSES) -> Iterator[Outcome]:
    for dtype in dtypes():
        problems = [
            Problem(shape, dtype, threads, edges)
            for num_classes in classes
            for shape, threads, edges in _layouts(num_classes)
        ]
        for operation in CHECKED:
            worst, where = dict.fromkeys(kernels, 0.0), dict.fromkeys(kernels, "")
            for problem in problems:
                expected = problem.call(_reference, operation)
                allowed = problem.allowed(operation, expected)
                for name, module in kernels.items():
                    for output, got in problem.call(module, operation).items():
                        share = _share(got, expected[output], allowed[output])
                        if not share <= worst[name]:
                            worst[name], where[name] = share, f"{output} of {problem}"
            yield Outcome(operation, dtype, worst, where)


def _layouts(num_classes: int) -> Iterator[tuple[tuple[int, int, int], int, bool]]:
    """(outer, C, inner), threads, edges: classes last and inner, more rows than fill a tile."""
    small = num_classes < 1000
    yield (150 if small else 19, num_classes, 1), 2, False
    yield (2, num_classes, 70 if small else 5), 2, False
    yield (5, num_classes, 1), 1, True


def _share(got: np.ndarray, expected: np.ndarray, allowed: np.ndarray) -> float:
    """The largest error over what is allowed; infinite where only one of the two is finite."""
    got, expected = got.astype(np.float64), expected.astype(np.float64)
    special = ~np.isfinite(expected)
    if not np.array_equal(got[special], expected[special], equal_nan=True):
        return np.inf
    error = np.abs(got[~special] - expected[~special])
    return float((error / allowed[~special]).max(initial=0.0))


class Problem:
    """Inputs of one shape and dtype in the normal form of the kernels."""

    def __init__(self, shape: tuple[int, int, int], dtype: str, threads: int, edges: bool) -> None:
        self.shape, self.rows = shape, (shape[0], shape[2])
        self.dtype, self.threads, self.edges = as_dtype(dtype), threads, edges
        self.real = np.dtype(np.float64 if self.dtype == np.float64 else np.float32)
        rng = np.random.default_rng(shape)
        self.logits = self._floats(rng.normal(0, 3, shape))
        self.grad_output = self._floats(rng.normal(0, 1, shape))
        self.probs, self.log_probs = np.empty((2, *shape), self.dtype)
        reference: Any = _reference
        reference.softmax(self.logits, self.probs, 1)
        reference.log_softmax(self.logits, self.log_probs, 1)
        self.soft_target = self._floats(rng.dirichlet(np.ones(shape[1]), self.rows)).swapaxes(1, 2)
        self.soft_target = np.ascontiguousarray(self.soft_target)
        self.target = rng.integers(0, shape[1], self.rows)
        self.target[-1, -1] = _IGNORED
        self.answers = self._floats(rng.random(shape) < 0.3)
        self.weight = rng.uniform(0, 2, shape[1])
        self.sample_weight = rng.uniform(0, 2, self.rows)
        self.sample_weight[0, -1] = 0
        if edges:
            self._put_edges()

    def _floats(self, values: np.ndarray) -> np.ndarray:
        return values.astype(self.dtype)

    def _put_edges(self) -> None:
        """A row each of NaN, +inf, nothing but -inf, one -inf; the last row is ignored."""
        x = self.logits
        x[0, 0], x[1, -1], x[2], x[3, 0], x[4, 0] = np.nan, np.inf, -np.inf, -np.inf, np.nan

    def __str__(self) -> str:
        return f"(outer, C, inner) = {self.shape}{' with NaN and inf' * self.edges}"

    def call(self, kernels: Kernels, operation: str) -> Arrays:
        """The outputs of one variant, or of check_target, by name."""
        if operation == "check_target":
            return self._check_target(kernels)
        variant = VARIANTS[operation]
        kernel = getattr(kernels, variant.operation.kernel)
        if variant.operation.is_loss:
            return self._loss(kernel, variant)
        return self._map(kernel, variant.operation)

    def _check_target(self, kernels: Kernels) -> Arrays:
        bad = self.target.copy()
        bad[-1, 0] = self.shape[1]
        weighted = Labels(self.target, self.weight, self.sample_weight)
        checks = [
            kernels.check_target(labels, Options(_IGNORED), self.shape[1], self.threads)
            for labels in (Labels(self.target, None, None), weighted, Labels(bad, None, None))
        ]
        return {
            "count": np.array(checks[0], np.float64),
            "sum of weights": np.array(checks[1], np.float64),
            "out of range": np.array(checks[2].bad, np.float64),
        }

    def _map(self, kernel: Any, operation: Operation) -> Arrays:
        inputs = [getattr(self, name) for name in operation.inputs]
        if operation.returns == "rows":
            out = np.empty(self.rows, self.dtype)
            kernel(*inputs, out, self.threads)
            return {"result": out}
        out, same = np.empty(self.shape, self.dtype), inputs[-1].copy()
        kernel(*inputs, out, self.threads)
        kernel(*inputs[:-1], same, same, self.threads)
        return {"result": out, "result in place": same}

    def _loss(self, kernel: Loss, variant: Variant) -> Arrays:
        family = variant.operation.family
        targets = {"loss": self.target, "binary": self.answers, "scores": None}
        binary = family == "binary"
        labels = Labels(
            self.soft_target if variant.soft else targets[family],
            *(
                getattr(self, name) if name in variant.arrays else None
                for name in Labels._fields[1:]
            ),
        )
        if binary and labels.weight is not None:
            labels = labels._replace(weight=np.stack([labels.weight[::-1], labels.weight]))
        options = {name: v for name, v in variant.options.items() if name in Options._fields}
        common = labels, Options(_IGNORED, **options)
        scores = getattr(self, variant.operation.scores)

        losses, alone = np.empty((2, *(self.shape if binary else self.rows)), self.real)
        grad, same = np.empty(self.shape, self.dtype), scores.copy()
        total = kernel(scores, *common, _SCALE, losses, grad, self.threads)
        kernel(same, *common, _SCALE, None, same, self.threads)
        kernel(scores, *common, 1.0, alone, None, self.threads)
        return {
            "losses": losses, "losses without gradient": alone, "sum": np.array([total]),
            "gradient": grad, "gradient in place": same,
        }  # fmt: skip

    def allowed(self, operation: str, expected: Arrays) -> Arrays:
        """The largest error of each output: that of the arithmetic, and the rounding at the end."""
        with np.errstate(all="ignore"):
            return {
                output: self._arithmetic(operation, output, value.astype(np.float64))
                + self._rounding(value)
                for output, value in expected.items()
            }

    def _arithmetic(self, operation: str, output: str, expected: np.ndarray) -> Any:
        unit = 1e-14 if self.real == np.float64 else 1e-6
        size = np.abs(expected)
        x = self.logits.astype(np.float64)
        m = x.max(axis=1, keepdims=True)
        gap = np.nan_to_num(m - x, nan=_MAX_GAP, posinf=_MAX_GAP).clip(0, _MAX_GAP)
        if operation in ("softmax", "log_softmax"):
            return unit * (1 + gap / 10) * size
        if operation == "logsumexp":  # m + log(s) may cancel
            return unit * np.maximum(size, np.abs(m[:, 0]))
        if operation.endswith("_backward"):  # so may the difference there
            g, p = np.abs(self.grad_output.astype(np.float64)), self.probs.astype(np.float64)
            if operation == "softmax_backward":
                bound = p * (g + (g * p).sum(axis=1, keepdims=True))
            else:
                bound = g + p * g.sum(axis=1, keepdims=True)
            return unit * np.broadcast_to(bound.max(axis=1, keepdims=True), size.shape)
        if operation in VARIANTS and VARIANTS[operation].operation.family == "binary":
            # Of weights up to 4; where targets are smoothed two terms may cancel.
            if output.startswith("gradient"):
                return unit * np.full(size.shape, 4 * _SCALE)
            return 4 * unit * (1 + (np.abs(x) if size.ndim == 3 else 0)) * size
        if output.startswith("gradient"):
            if "soft" in operation:  # and here, where p is near the target, of weight up to 4
                size = size + 4 * _SCALE * self.soft_target.astype(np.float64)
            return 2 * unit * np.broadcast_to(size.max(axis=1, keepdims=True), size.shape)
        if output.startswith("losses"):
            return unit * (1 + gap.max(axis=1) / 10) * size
        return unit * (1 + gap.max() / 10) * size  # sums and counts

    def _rounding(self, value: np.ndarray) -> Any:
        """One ulp in the half types, which are rounded from float32; else a subnormal's."""
        finite = np.nan_to_num(value.astype(np.float64), posinf=0, neginf=0)
        return ulp(finite if value.dtype.itemsize == 2 else np.zeros(value.shape), value.dtype)
