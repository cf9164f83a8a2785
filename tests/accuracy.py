"""Measures the largest errors in ulp, over the whole range of inputs, and writes them down.

    python tests/accuracy.py                  # all that runs here, some minutes
    python tests/accuracy.py --build numba    # only this build; the figures of the others stay

The figures go into ``bench/results/accuracy.json`` and, as a table, into ``bench/README.md``;
``tests/test_ulps.py`` measures with the functions below, and holds every build to the figures.
What is right is said by the longdouble oracles of the tests.
"""

import argparse
import contextlib
import functools
import itertools
import json
import math
import unittest.mock
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from support import cases
from support.cases import Case, Layout

import fastloss as fl
from fastloss import _backend, _cython
from fastloss._operations import VARIANTS
from fastloss._tools import check
from fastloss._tools.report import insert, markdown

ROOT = Path(__file__).resolve().parent.parent

JSON = ROOT / "bench/results/accuracy.json"
README = ROOT / "bench/README.md"
BEGIN, END = "<!-- accuracy:begin -->", "<!-- accuracy:end -->"

DTYPES = ("float32", "float64")
AIM = 3  # ulp; what exceeds it is printed, and is bold in the table

# ---------------------------------------------------------------------------------------------
# What is measured
# ---------------------------------------------------------------------------------------------


class Operation(NamedTuple):
    """A row of cases with one measure per result; losses are taken with and without gradient."""

    case: Case
    measures: dict[str, str]  # by the name in the table: what an ulp is that of


def _map(operation):
    """What an ulp is that of: differences may vanish, their terms do not."""
    measure = {"map": "value", "backward": "terms"}[operation.family]
    if operation.returns == "rows":
        measure = "maximum"
    case = Case(operation.name, getattr(fl, operation.name), operation.inputs)
    return Operation(case, {operation.name: measure})


def _loss(variant):
    name, operation = str(variant), variant.operation
    targets = {"loss": ("target",), "binary": ("target, answers",), "scores": ()}
    target = ("target, probabilities",) if variant.soft else targets[operation.family]
    options = {"reduction": "none", **variant.options}
    function = getattr(fl, f"{operation.name}_with_grad")
    case = Case(name, function, (operation.scores, *target), variant.arrays, options)
    gradient = "terms" if variant.soft or "label_smoothing" in options else "row"
    if operation.family == "binary":
        gradient = "sizes" if "label_smoothing" in options else "value"
    return Operation(case, {f"{name}: loss": "value", f"{name}: gradient": gradient})


# Of the losses; what these leave out is part of one of them.
TITLES = ("", "z_loss", "all", "soft")
OPERATIONS = {
    name: _loss(variant) if variant.operation.is_loss else _map(variant.operation)
    for name, variant in VARIANTS.items()
    if variant.title in TITLES
}

# Samples in the SIMD lanes and classes in them, one block and many, the class axis last and not.
LAYOUTS = [
    Layout(*shape)
    for shape in [
        (4000, 3), (1500, 10), (300, 100), (60, 1000), (12, 3000), (4, 40000), (2, 100, 40),
        (1, 3000, 12),
    ]
]  # fmt: skip


def builds():
    """The names of what runs here; each instruction set of Cython is a build."""
    compiled, _ = check.backends()
    return ["numpy", *(name.replace(" ", "-") for name in compiled)]


@contextlib.contextmanager
def chosen(build):
    """The name to pass as ``backend=`` while the build stands in for Cython's own choice."""
    name, _, isa = build.partition("-")
    with unittest.mock.patch.dict(_backend._loaded, {name: _cython.load(isa)} if isa else {}):
        yield name


# ---------------------------------------------------------------------------------------------
# Families of inputs: functions of rng, n, C and the limits of the dtype, to rows in longdouble
# ---------------------------------------------------------------------------------------------


def _confident(rng, n, c, limits):
    """One class leads by up to 100, or 1000 in float64: losses and gradients down to subnormals."""
    x = rng.normal(size=(n, c))
    lead = rng.uniform(10, 100 if limits.bits == 32 else 740, n)
    x[np.arange(n), rng.integers(0, c, n)] += lead
    return x


def _repeated(rng, n, c, limits):
    exponent = rng.uniform(-3, 3, (n, 1))
    return np.broadcast_to(rng.normal(size=(n, 1)) * 10**exponent, (n, c))


def _nearly_tied(rng, n, c, limits):
    """A value and its neighbours: they differ by a few units in the last place."""
    x = rng.normal(size=(n, 1)) * 10 ** rng.uniform(-2, 2, (n, 1))
    return x * (1 + rng.integers(-4, 5, (n, c)) * float(limits.eps))


def _huge(rng, n, c, limits):
    """A tenth of the exponents below the largest number, some classes tied at the top."""
    return rng.integers(-3, 4, (n, c)) * _power(limits, 0.8)


def _spanning(rng, n, c, limits):
    """From minus to plus the largest number: differences overflow, and no class is near another."""
    return rng.uniform(-1, 1, (n, c)) * np.longdouble(limits.max)


def _log_uniform(rng, n, c, limits):
    exponents = np.log10(
        np.array([limits.smallest_subnormal, limits.max]).astype(np.longdouble)
    ).astype(float)
    magnitude = np.longdouble(10) ** rng.uniform(*exponents, (n, c))
    return magnitude * rng.choice([-1, 1], (n, c))


def _between_powers_of_two(rng, n, c, limits):
    """The maximum at an odd multiple of ln(2) / 2, where exp's range reduction changes its mind."""
    x = rng.normal(size=(n, c)) * 5
    top = (2 * rng.integers(-150, 150, n) + 1) * (math.log(2) / 2)
    x += (top - x.max(axis=1))[:, None]
    x[np.arange(n), x.argmax(axis=1)] = top
    return x


def _power(limits, share):
    """A power of ten, in exponent the share of the largest: 1e30 is 0.8 of the way to 1e38."""
    return np.longdouble(10) ** round(share * math.log10(float(limits.max)))


def _normal(sigma, shift=0.0):
    return lambda rng, n, c, limits: rng.normal(size=(n, c)) * sigma + shift


FAMILIES: dict[str, Callable] = {
    "normal, sigma 1": _normal(1),
    "normal, sigma 10": _normal(10),
    "normal, sigma 100": _normal(100),
    "shifted by 3000": _normal(1, 3000),
    "around -256": _normal(3, -256),  # kernels may treat larger maxima in another way
    "confident": _confident,
    "one repeated value": _repeated,
    "nearly tied": _nearly_tied,
    "subnormal": lambda rng, n, c, limits: rng.normal(size=(n, c)) * limits.tiny / 100,
    "huge": _huge,
    "spanning the range": _spanning,
    "log-uniform": _log_uniform,
    "between powers of 2": _between_powers_of_two,
}


def problem(case, family, layout, dtype, kept):
    """The arrays of a case; of its rows those kept, which are the same however many they are."""
    limits = np.finfo(dtype)
    n, c = layout.n, layout.num_classes
    rng = np.random.default_rng([n, c, zlib.crc32(f"{family} {dtype}".encode())])
    with np.errstate(over="ignore", under="ignore"):
        logits = FAMILIES[family](rng, n, c, limits).astype(dtype)
    logits = np.nan_to_num(logits, posinf=limits.max, neginf=limits.min)

    def target():
        """Half of the targets are the maxima: that is where losses are small."""
        y = rng.integers(0, c, n)
        y[::2] = logits[::2].argmax(axis=1)
        return y

    def grad_output():
        """Of the family's size; not constant, which would cancel to nothing but rounding."""
        size = {"subnormal": limits.tiny / 100, "huge": _power(limits, 0.8)}.get(family, 1)
        return (rng.normal(size=(n, c)) * size).astype(dtype)

    def forward(name):
        (bounded,) = getattr(cases.oracles, name)(logits[:kept])
        with np.errstate(over="ignore", under="ignore"):
            return bounded.value.astype(dtype)

    made = {
        "logits": lambda: logits,
        "target": target,
        "grad_output": grad_output,
        "probs": lambda: forward("softmax"),
        "log_probs": lambda: forward("log_softmax"),
    }
    arrays = {
        name: made[name]() if name in made else cases.INGREDIENTS[name](rng, n, c, dtype)
        for name in case.inputs + case.arrays
    }
    of_classes = ("weight", "pos_weight")
    return tuple(a if name in of_classes else a[:kept] for name, a in arrays.items())


# ---------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=2 * len(FAMILIES) * len(LAYOUTS))
def exact(operation_name, family, dtype, layout, kept):
    """The arrays, and for each result what it should be and what an ulp of it is."""
    operation = OPERATIONS[operation_name]
    case = operation.case
    arrays = problem(case, family, layout, np.dtype(dtype), kept)
    keywords = dict(zip(case.arrays, arrays[len(case.inputs) :], strict=True))
    with np.errstate(over="ignore", invalid="ignore"):
        answers = case.oracle(*arrays[: len(case.inputs)], **keywords, **case.options)
    units = [
        unit(answer, measure, case, arrays, np.dtype(dtype))
        for answer, measure in zip(answers, operation.measures.values(), strict=True)
    ]
    return arrays, [answer.value for answer in answers], units


def unit(answer, measure, case, arrays, dtype):
    """An ulp of what the measure names."""
    size = np.abs(answer.value)
    if measure == "maximum":
        size = np.maximum(size, np.abs(arrays[0].max(axis=1)))
    elif measure == "sizes":
        size = answer.allowance / 2
    elif measure == "row":
        size = size.max(axis=1, keepdims=True)
    elif measure == "terms":
        size = answer.allowance if not case.is_loss else size + subtracted(case, arrays)
        size = size.max(axis=1, keepdims=True)
    return cases.ulp(np.minimum(size, np.finfo(dtype).max), dtype)


def subtracted(case, arrays):
    """What a gradient is short of a multiple of p: weights times the smoothed targets."""
    named = dict(zip(case.inputs + case.arrays, arrays, strict=True))
    n, c = arrays[0].shape
    t = named.get("target, probabilities", np.zeros((n, c)))
    if "target" in named:
        t[np.arange(n), named["target"]] = 1
    smoothing = case.options.get("label_smoothing", 0)
    t = (1 - smoothing) * t + smoothing / c
    return t * named.get("weight", np.ones(c)) * named.get("sample_weight", np.ones(n))[:, None]


def error(result, value, ulp):
    """The largest error in ulp; what is too large for the dtype must be infinite."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        rounded = value.astype(result.dtype)
        wrong = np.abs(result.astype(np.longdouble) - value) / ulp
        wrong = np.where(np.isinf(rounded) | np.isinf(result), result != rounded, wrong)
    return float(np.where(np.isnan(result), np.inf, wrong).max(initial=0))


def measure(operation_name, family, dtype, backend, share=1):
    """By name in the table, the largest error of each result; of the first of share of the rows."""
    operation = OPERATIONS[operation_name]
    largest = dict.fromkeys(operation.measures, 0.0)
    for layout in LAYOUTS:
        part = _first(layout, share)
        arrays, values, units = exact(operation_name, family, dtype, layout, part.n)
        with np.errstate(over="ignore"):  # the sum of the losses, which is not looked at
            results = operation.case.call(part, arrays, backend=backend)
        errors = [error(*of) for of in zip(results, values, units, strict=True)]
        if operation.case.is_loss:
            without = getattr(fl, operation.case.function.__name__.removesuffix("_with_grad"))
            case = operation.case._replace(function=without)
            with np.errstate(over="ignore"):
                (loss,) = case.call(part, arrays, backend=backend)
            errors[0] = max(errors[0], error(loss, values[0], units[0]))
        for name, found in zip(largest, errors, strict=True):
            largest[name] = max(largest[name], found)
    return largest


def _first(layout, share):
    """A layout of a share of the rows; none of those with the most classes."""
    if layout.inner > 1 and share > 1:
        return Layout(1, layout.num_classes, layout.n // share)
    return layout._replace(outer=layout.outer // share)


# ---------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------


def figures(names, progress=lambda text: None):
    """By dtype, row of the table, family and build, the largest error."""
    found = {}
    for dtype, operation, family in itertools.product(DTYPES, OPERATIONS, FAMILIES):
        progress(f"{dtype} {operation}: {family}")
        for build in names:
            with chosen(build) as backend:
                largest = measure(operation, family, dtype, backend)
            for row, ulps in largest.items():
                by_family = found.setdefault(dtype, {}).setdefault(row, {})
                by_family.setdefault(family, {})[build] = round(ulps, 2)
        exact.cache_clear()
    return found


def merged(old, new, larger=()):
    """The new figures, and the old ones of builds that were not measured, or if larger."""
    if not any(isinstance(value, dict) for value in new.values()):
        stays = {build: max(old.get(build, 0), new[build]) for build in larger if build in new}
        return old | new | stays
    return {key: merged(old.get(key, {}), value, larger) for key, value in new.items()}


def section(table):
    """What stands between the markers: for each dtype the rows by build, and by family."""
    lines = []
    for dtype, rows in table.items():
        names = list(next(iter(next(iter(rows.values())).values())))
        by_build = [
            [row] + [_format(max(of[build] for of in families.values())) for build in names]
            for row, families in rows.items()
        ]
        by_family = [
            [family] + [_format(max(families[family].values())) for families in rows.values()]
            for family in FAMILIES
        ]
        header = ["family", *(row.replace("cross_entropy", "CE") for row in rows)]
        lines += [f"**{dtype}**, by build, over all families:", ""]
        lines += [*markdown(["", *names], by_build), ""]
        lines += [f"**{dtype}**, by family, over all builds:", ""]
        lines += [*markdown(header, by_family), ""]
    return "\n".join(lines)


def _format(ulps):
    return f"**{ulps:.2f}**" if ulps > AIM else f"{ulps:.2f}"


def above_the_aim(table):
    for dtype, rows in table.items():
        for row, families in rows.items():
            for family, ulps in families.items():
                worst = max(ulps, key=ulps.get)
                if ulps[worst] > AIM:
                    yield f"{dtype} {row}, {family}: {ulps[worst]:.2f} ({worst})"


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--build", action="append", choices=builds(), help="may be repeated")
    parser.add_argument(
        "--other-processor", action="store_true",
        help="than the last one: Numba makes other code, and of its figures the larger stay",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    old = json.loads(JSON.read_text()) if JSON.exists() else {}
    new = figures(options.build or builds(), functools.partial(print, flush=True))
    table = merged(old, new, larger=["numba"] if options.other_processor else [])
    JSON.write_text(json.dumps(table, indent=1) + "\n")
    README.write_text(insert(README.read_text(), section(table), BEGIN, END))
    print(f"Above {AIM} ulp:", *above_the_aim(table), sep="\n")


if __name__ == "__main__":
    main()
