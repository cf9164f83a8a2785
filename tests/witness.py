"""Digests of the results of every operation: did a change that should not change any, change one?

    python tests/witness.py FILE                    # what this build of the package computes
    python tests/witness.py FILE --against BEFORE   # and what differs from an earlier FILE

Every row of the table of cases is called with every dtype, over layouts that reach every kind of
kernel, on each backend and instruction set that runs here, on one thread and on three, in place
and not; with rows of extremes, targets of every integer type, and results that are large enough to
be streamed.  A digest is that of all bytes, except that one NaN is as good as another.
"""

import argparse
import hashlib
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from support import cases
from support.cases import CASES, FLOATS, HALVES, INTEGERS, LAYOUTS, SOME_LAYOUTS, Layout

import fastloss as fl
from fastloss import _cython

THREADS = (1, 3)
EXTREMES = (0.0, -0.0, np.inf, -np.inf, np.nan, 3e38, -3e38, 1e-45, 1e-39, 87.5, -88.0, 2e3, -3e4)
# Larger than what goes past the caches, in every layout and storage.
STREAMED = [
    Layout(*shape) for shape in [(90_000, 100), (9_000, 1000), (3, 40, 80_000), (2, 400, 11_000)]
]
LINEAR = {
    "plain": {},
    "all": {"l2": 0.1, "label_smoothing": 0.1, "z_loss": 1e-3, "inputs_grad": True},
    "rows": {"reduction": "none"},
}


def backends():
    """By name, the environment in which a process computes on it."""
    builds = {f"cython-{isa}": {"FASTLOSS_ISA": isa} for isa in _cython.available_isas()}
    chosen = {
        name: {"FASTLOSS_BACKEND": "cython", **environment} for name, environment in builds.items()
    }
    return {"numba": {"FASTLOSS_BACKEND": "numba"}, **chosen}


def digest(results):
    sha = hashlib.sha256()
    for result in results:
        array = np.array(result)  # a copy
        array[np.isnan(array)] = np.nan
        sha.update(array.tobytes())
    return sha.hexdigest()[:16]


def digests():
    """Name by name, those of the backend that the environment says."""
    yield from itertools.chain(_table(), _extremes(), _targets(), _streamed(), _linear())


def _table():
    for case, dtype in itertools.product(CASES, FLOATS + HALVES):
        for layout in LAYOUTS if dtype in FLOATS else SOME_LAYOUTS:
            problem = case.problem(layout.n, layout.num_classes, dtype)
            yield from _call(f"{case.name}, {dtype}, {layout}", case, layout, problem)


def _extremes():
    rng = np.random.default_rng(0)
    for case, dtype in itertools.product(CASES, FLOATS + HALVES):
        for layout in SOME_LAYOUTS:
            with np.errstate(over="ignore"):
                problem = [
                    np.where(rng.random(a.shape) < 0.02, rng.choice(EXTREMES, a.shape), a).astype(
                        dtype
                    )
                    if a.dtype == dtype and a.ndim == 2
                    else a
                    for a in case.problem(layout.n, layout.num_classes, dtype)
                ]
            yield from _call(f"{case.name}, {dtype}, {layout}, extremes", case, layout, problem)


def _targets():
    for name, integer, layout in itertools.product(
        ("cross_entropy grad none", "nll_loss grad none"), INTEGERS, SOME_LAYOUTS
    ):
        case = cases.by_name[name]
        scores, target = case.problem(layout.n, layout.num_classes, FLOATS[0])
        problem = scores, (target % 100).astype(integer)
        yield from _call(f"{name}, {integer}, {layout}", case, layout, problem)


def _streamed():
    names = (
        "softmax",
        "log_softmax",
        "softmax_backward",
        "log_softmax_backward",
        "cross_entropy grad",
        "cross_entropy grad all",
        "cross_entropy soft grad all",
        "nll_loss grad none",
    )
    for name, layout, dtype in itertools.product(names, STREAMED, FLOATS + HALVES[:1]):
        case = cases.by_name[name]
        problem = case.problem(layout.n, layout.num_classes, dtype)
        yield (
            f"{name}, {dtype}, {layout}, streamed",
            digest(case.call(layout, problem, num_threads=2)),
        )


def _call(name, case, layout, problem):
    """On any number of threads, and in place where that is possible."""
    for threads in THREADS:
        with np.errstate(all="ignore"):
            yield (
                f"{name}, {threads} threads",
                digest(case.call(layout, problem, num_threads=threads)),
            )
    if "logits" in case.returns:
        arrays = [layout.arrange(array.copy()) for array in problem]
        scores = next(
            array
            for array, kind in zip(arrays, case.inputs, strict=False)
            if kind in ("logits", "log_probs", "probs")
        )
        with np.errstate(all="ignore"):
            yield f"{name}, in place", digest(case.pass_on(layout, arrays, out=scores))


def _linear():
    rng = np.random.default_rng(0)
    for (rows, features, classes), dtype in itertools.product(
        [(1, 3, 2), (300, 20, 10), (3000, 40, 700)], FLOATS
    ):
        x, w = (
            rng.normal(size=(rows, features)).astype(dtype),
            rng.normal(size=(classes, features)).astype(dtype),
        )
        y = rng.integers(0, classes, rows)
        for (name, options), threads in itertools.product(LINEAR.items(), THREADS):
            loss, gradients = fl.linear_cross_entropy_with_grad(
                x, w, y, linear_bias=w[:, 0].copy(), num_threads=threads, **options
            )
            found = [loss, *(g for g in gradients if g is not None)]
            yield (
                f"linear {name}, {dtype}, {rows}x{features}x{classes}, {threads} threads",
                digest(found),
            )


def record(path):
    found = {}
    for name, environment in backends().items():
        command = [sys.executable, __file__, "--child"]
        output = subprocess.run(
            command, env=os.environ | environment, stdout=subprocess.PIPE, check=True
        ).stdout
        found[name] = json.loads(output)
        print(f"{name}: {len(found[name])} digests", flush=True)
    path.write_text(json.dumps(found, indent=0) + "\n")
    return found


def differences(before, after):
    for backend in before.keys() | after.keys():
        old, new = before.get(backend, {}), after.get(backend, {})
        for name in sorted(old.keys() | new.keys()):
            if old.get(name) != new.get(name):
                yield f"{backend}: {name}"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, nargs="?")
    parser.add_argument("--against", type=Path, metavar="BEFORE")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        json.dump(dict(digests()), sys.stdout)
        return 0
    found = record(options.file)
    if not options.against:
        return 0
    changed = list(differences(json.loads(options.against.read_text()), found))
    print(*changed[:50], f"{len(changed)} differ", sep="\n")
    return bool(changed)


if __name__ == "__main__":
    sys.exit(main())
