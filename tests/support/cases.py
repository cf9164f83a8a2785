"""The table of operation x arguments x oracle, and the shapes and dtypes it is run over.

The cases come from the package's own table, ``_operations``: a loss that has a row there is in the
accuracy, layout, thread, in-place and gradient tests. The tolerance comes with the oracle, see
`oracles`.
"""

import functools
import zlib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import ml_dtypes
import numpy as np

import fastloss as fl
from fastloss._operations import OPERATIONS
from support import oracles

IGNORED = -7  # as ignore_index, where a case has one: not the default, and not a class

# ---------------------------------------------------------------------------------------------
# Ingredients: everything that can be passed, by name, for n rows of c classes
# ---------------------------------------------------------------------------------------------


def _logits(rng, n, c, dtype):
    """Rows of every temper: tame, wide, confident, nearly tied, far from 0."""
    x = rng.normal(size=(n, c))
    temper = np.arange(n) % 6
    x[temper == 1] *= 10
    x[temper == 2] *= 100
    x[temper == 3, rng.integers(c)] += 25
    x[temper == 4] *= 1e-3
    x[temper == 5] += 3000
    return x.astype(dtype)


def _target(rng, n, c, dtype):
    return rng.integers(0, c, n)


def _some_ignored(rng, n, c, dtype):
    return np.where(rng.random(n) < 0.2, IGNORED, rng.integers(0, c, n))


def _probabilities(rng, n, c, dtype):
    t = rng.gamma(0.5, size=(n, c)) + 1e-30
    return (t / t.sum(axis=1, keepdims=True)).astype(dtype)


def _answers(rng, n, c, dtype):
    return rng.random((n, c)) < 0.3


def _likely_answers(rng, n, c, dtype):
    """Some of them sure."""
    t = rng.random((n, c))
    return np.where(t < 0.2, 0, np.where(t > 0.9, 1, t)).astype(dtype)


def _pos_weight(rng, n, c, dtype):
    return rng.random(c) * 3


def _weight(rng, n, c, dtype):
    w = rng.random(c) * 2
    w[rng.integers(c)] = 0.0 if c > 2 else 0.5
    return w


def _sample_weight(rng, n, c, dtype):
    return np.where(rng.random(n) < 0.1, 0.0, rng.random(n) * 3)


def _signed(weights):
    """Of either sign, in a sum that does not cancel."""

    def signed(rng, n, c, dtype):
        values = weights(rng, n, c, dtype)
        return np.where(rng.random(len(values)) < 0.3, -values, values)

    return signed


def _log_probs(rng, n, c, dtype):
    x = rng.normal(size=(n, c)) * 4
    return (x - np.log(np.exp(x).sum(axis=1, keepdims=True))).astype(dtype)


INGREDIENTS: dict[str, Callable] = {
    "logits": _logits,
    "log_probs": _log_probs,
    "probs": _probabilities,
    "grad_output": lambda rng, n, c, dtype: rng.normal(size=(n, c)).astype(dtype),
    "target": _target,
    "target, some ignored": _some_ignored,
    "target, probabilities": _probabilities,
    "target, answers": _answers,
    "target, likely answers": _likely_answers,
    "pos_weight": _pos_weight,
    "pos_weight, signed": _pos_weight,
    "weight": _weight,
    "sample_weight": _sample_weight,
    "weight, signed": _signed(_weight),
    "sample_weight, signed": _signed(_sample_weight),
}

# ---------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------


class Case(NamedTuple):
    name: str
    function: Callable  # the public function; its namesake in oracles is what it must equal
    inputs: tuple[str, ...]  # ingredients, positional
    arrays: tuple[str, ...] = ()  # ingredients, by keyword, which their names begin with
    options: Mapping = MappingProxyType({})

    @property
    def oracle(self):
        return getattr(oracles, self.function.__name__)

    @property
    def operation(self):
        return OPERATIONS[self.function.__name__.removesuffix("_with_grad")]

    @property
    def is_loss(self):
        return self.operation.is_loss

    @property
    def returns(self):
        """The kinds of what it returns: an array like the logits, one like the rows, a float.

        Or losses of all elements.
        """
        if not self.is_loss:
            return (self.operation.returns,)
        each = "elements" if self.operation.family == "binary" else "rows"
        reduction = self.options.get("reduction", self.operation.reduction)
        reduced = each if reduction == "none" else "float"
        with_grad = self.function.__name__.endswith("_with_grad")
        return (reduced, "logits") if with_grad else (reduced,)

    @property
    def has_out(self):
        return "logits" in self.returns or not self.is_loss

    def problem(self, n, c, dtype):
        return _problem(self.inputs + self.arrays, n, c, np.dtype(dtype).name)

    def call(self, layout, problem, *, out=None, **options):
        """Run it on rows in a layout; give the results back as rows."""
        arrays = [layout.arrange(array) for array in problem]
        before = [array.tobytes() for array in arrays]
        if out is not None:
            options["out"] = out
        results = self.pass_on(layout, arrays, **options)
        if out is None:
            assert before == [array.tobytes() for array in arrays], "an input was modified"
        return results

    def keywords(self, arrays):
        """Those of its arrays that are passed by keyword."""
        names = (name.partition(",")[0] for name in self.arrays)
        return dict(zip(names, arrays[len(self.inputs) :], strict=True))

    def pass_on(self, layout, arrays, **options):
        """Run it on arrays that are arranged already; give the results back as rows."""
        results = self.function(
            *arrays[: len(self.inputs)], axis=layout.axis, **self.keywords(arrays), **self.options,
            **options,
        )  # fmt: skip
        if not isinstance(results, tuple):
            results = (results,)
        return tuple(
            layout.rows(result, kind) for result, kind in zip(results, self.returns, strict=True)
        )


_NONE = {"reduction": "none"}


def _cases(operation):
    """With and without a gradient: nothing optional, everything together; each number by itself.

    Where there are none, nor anything between the scores and the losses that they would change,
    one array by itself shows no more than all do.
    """
    name, function = operation.name, getattr(fl, operation.name)
    if not operation.is_loss:
        yield Case(name, function, operation.inputs)
        return
    if operation.family == "binary":
        yield from _binary_cases(operation, function)
        return
    if operation.family == "scores":
        yield from _cases_of_scores(operation, function)
        return
    with_grad = getattr(fl, f"{name}_with_grad")
    hard, signed = operation.inputs, tuple(f"{array}, signed" for array in operation.arrays)
    ignored = operation.scores, "target, some ignored"
    everything = {"ignore_index": IGNORED, **operation.options}
    if operation.by:  # a step of another kernel, whose cases reach the rest
        yield Case(f"{name} grad none", with_grad, hard, (), _NONE)
        yield Case(f"{name} grad all", with_grad, ignored, signed, everything)
        return
    yield Case(name, function, hard)
    yield Case(f"{name} all none", function, ignored, signed, {**everything, **_NONE})
    yield Case(f"{name} grad none", with_grad, hard, (), _NONE)
    yield Case(f"{name} grad all", with_grad, ignored, signed, everything)
    if not operation.options:
        return
    yield Case(f"{name} none", function, hard, (), _NONE)
    yield Case(f"{name} grad", with_grad, hard)
    for array in operation.arrays:
        options = {"ignore_index": IGNORED} if array == "sample_weight" else {}
        yield Case(
            f"{name} grad {array}", with_grad, ignored if options else hard, (array,), options
        )
    for option, value in operation.options.items():
        yield Case(f"{name} grad {option}", with_grad, hard, (), {option: value, **_NONE})
    if operation.soft:
        soft = operation.scores, "target, probabilities"
        yield Case(f"{name} soft none", function, soft, (), _NONE)
        yield Case(f"{name} soft grad", with_grad, soft)
        yield Case(f"{name} soft grad all", with_grad, soft, signed, operation.soft_options)


def _cases_of_scores(operation, function):
    """The same, without targets."""
    name, with_grad = operation.name, getattr(fl, f"{operation.name}_with_grad")
    signed = tuple(f"{array}, signed" for array in operation.arrays)
    yield Case(f"{name} grad", with_grad, operation.inputs)
    everything = {"reduction": "mean", **operation.options}
    yield Case(f"{name} grad all", with_grad, operation.inputs, signed, everything)


def _binary_cases(operation, function):
    """The same, of targets of 0 and 1 and of those between them."""
    name, with_grad = operation.name, getattr(fl, f"{operation.name}_with_grad")
    signed = tuple(f"{array}, signed" for array in operation.arrays)
    everything = {**operation.options, **_NONE}
    likely = ("logits", "target, likely answers")
    yield Case(f"{name} all none", function, likely, signed, everything)
    yield Case(f"{name} grad", with_grad, ("logits", "target, answers"))


_CE_GRAD, _HARD = fl.cross_entropy_with_grad, ("logits", "target")
CASES = [case for operation in OPERATIONS.values() for case in _cases(operation)] + [
    # What all losses share, on one of them, and the end of a range.
    Case("cross_entropy grad sum", _CE_GRAD, _HARD, (), {"reduction": "sum"}),
    Case("cross_entropy grad normalizer", _CE_GRAD, _HARD, (), {"normalizer": 12.5}),
    Case("cross_entropy grad smoothing 1", _CE_GRAD, _HARD, ("weight",), {"label_smoothing": 1.0}),
]

by_name = {case.name: case for case in CASES}

# ---------------------------------------------------------------------------------------------
# Where the class axis lies, and how many of everything
# ---------------------------------------------------------------------------------------------


class Layout(NamedTuple):
    """outer x C x inner: the class axis is last where inner is 1, first where outer is 1."""

    outer: int
    num_classes: int
    inner: int = 1

    def __str__(self):
        return "x".join(map(str, self))

    @property
    def n(self):
        return self.outer * self.inner

    @property
    def axis(self):
        return {1: -1}.get(self.inner, 0 if self.outer == 1 else 1)

    def arrange(self, rows):
        """From (N, C), (N,) or (C,) to what the user has."""
        if rows.ndim == 2:
            shaped = rows.reshape(self.outer, self.inner, self.num_classes)
            return self._without_ones(np.ascontiguousarray(shaped.swapaxes(1, 2)), (0, 2))
        if len(rows) == self.n != self.num_classes:
            return self._without_ones(rows.reshape(self.outer, self.inner), (0, 1))
        return rows

    def _without_ones(self, array, axes):
        outer, inner = axes
        if self.inner == 1:
            return array.squeeze(inner)
        return array.squeeze(outer) if self.outer == 1 else array

    def rows(self, result, kind):
        """Back from the shape of a result, which is checked."""
        if kind == "float":
            assert type(result) is float
            return result
        assert type(result) is np.ndarray
        shape = self.arrange(np.empty((self.n, self.num_classes), np.int8)).shape
        if kind == "rows":
            assert result.shape == tuple(np.delete(shape, self.axis))
            return result.reshape(self.n)
        assert result.shape == shape
        return (
            result.reshape(self.outer, self.num_classes, self.inner)
            .swapaxes(1, 2)
            .reshape(self.n, self.num_classes)
        )


# Around every edge there is in the kernels: one row, tiles, blocks, groups, units, threads.
LAYOUTS = [
    Layout(*shape)
    for shape in [
        (0, 3), (1, 1), (200, 1), (1, 2), (1000, 2), (1, 3), (63, 3), (129, 10), (4000, 10),
        (513, 17), (300, 63), (300, 64), (300, 65), (1, 100), (257, 100), (17, 1000), (40, 1000),
        (33, 1023), (33, 1024), (33, 1025), (1, 2049), (3, 32000), (1, 128256),
        (0, 3, 4), (1, 10, 300), (1, 2, 64), (5, 10, 64), (7, 100, 3), (11, 3, 100), (70, 2, 3),
        (3, 64, 65), (2, 1000, 33), (1, 1025, 40), (1, 32000, 3), (3, 5, 3001), (1, 70, 6500),
    ]
]  # fmt: skip

# Few, for what is costly to run everywhere: short and long rows, tiles, more than one thread.
SOME_LAYOUTS = [
    Layout(*shape) for shape in [(1, 3), (129, 10), (300, 65), (3, 3000), (5, 10, 64), (2, 1030, 3)]
]

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOATS = [np.dtype(np.float32), np.dtype(np.float64)]
HALVES = [np.dtype(np.float16), BFLOAT16]
UNIT = {np.dtype(np.float32): 1e-6, np.dtype(np.float64): 1e-14}
INTEGERS = [np.dtype(f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)]


@functools.lru_cache(maxsize=8)
def _problem(ingredients, n, c, dtype):
    dtype = BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype)
    rng = np.random.default_rng([n, c, zlib.crc32(dtype.name.encode())])
    return tuple(INGREDIENTS[name](rng, n, c, dtype) for name in ingredients)


@functools.lru_cache(maxsize=8)
def expected(case_name, layout, dtype_name):
    """What the oracle says; cached, since every backend asks for it in turn."""
    case = by_name[case_name]
    arrays = _problem(case.inputs + case.arrays, layout.n, layout.num_classes, dtype_name)
    return case.oracle(*arrays[: len(case.inputs)], **case.keywords(arrays), **case.options)


# ---------------------------------------------------------------------------------------------
# Comparing
# ---------------------------------------------------------------------------------------------


def ulp(value, dtype):
    """The distance between neighbours of a dtype at a value."""
    info = ml_dtypes.finfo(dtype)
    smallest = float(info.smallest_subnormal)
    _, exponent = np.frexp(np.abs(np.asarray(value, float)))
    return np.maximum(np.ldexp(1.0, exponent - info.nmant - 1), smallest)


def assert_close(actual, bounded, dtype):
    """Hold a result of logits of a dtype against the promise for it."""
    value = np.asarray(bounded.value)
    actual_dtype = actual.dtype if isinstance(actual, np.ndarray) else np.dtype(np.float64)
    unit = UNIT.get(dtype, 1e-6)
    # A subnormal result is rounded to a multiple of the smallest one.
    smallest = np.finfo(np.float32 if unit == 1e-6 else np.float64).smallest_subnormal
    tolerance = unit * np.asarray(bounded.allowance) + np.longdouble(smallest)
    if actual_dtype in HALVES:
        tolerance = tolerance + ulp(value, actual_dtype) / 2  # rounded once more
    error = np.abs(np.asarray(actual).astype(np.longdouble) - value)
    with np.errstate(invalid="ignore"):
        wrong = ~((error <= tolerance) | (np.isnan(actual) & np.isnan(value)))
    if wrong.any():
        ratio = np.where(wrong, error / tolerance, 0)
        place = np.unravel_index(np.nanargmax(ratio), wrong.shape)
        raise AssertionError(
            f"{wrong.sum()} of {wrong.size} wrong; at {tuple(map(int, place))}: "
            f"{np.asarray(actual)[place]!s} instead of {value[place]!s}, "
            f"{float(ratio[place]):.3g} times the tolerance"
        )
