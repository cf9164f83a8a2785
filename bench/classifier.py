"""Times SoftmaxClassifier beside scikit-learn's LogisticRegression, to the same loss.

    python bench/classifier.py                       # all problems; leave the machine alone
    python bench/classifier.py --problem digits      # one; the figures of the others stay
    python bench/classifier.py --quick               # small problems: does it work?

Both train on the same features, with the same penalty, by L-BFGS. They are standardized, which
LogisticRegression wants, except for the pixels of "digits, unscaled". First the optimum is
computed. Then each gets tolerances from loose to strict, until the loss of what it returns,
computed anew in float64, is within 1e-3 of the optimum, relative. The time is that of the `fit`
with this tolerance, the best of those that begin within two seconds; loose ones cost nothing.
"""

import argparse
import datetime
import json
import time
import warnings
from importlib.metadata import version
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

import fastloss as fl
from fastloss import _backend
from fastloss._tools.report import format_time, heading, insert, markdown
from fastloss.sklearn import SoftmaxClassifier

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- classifier:begin -->", "<!-- classifier:end -->"
SYNTHETIC = {"100 classes": (200_000, 100, 100), "1000 classes": (50_000, 50, 1000)}
QUICK = {"100 classes": (2000, 20, 100), "1000 classes": (2000, 10, 1000)}
UNSCALED = "digits, unscaled"
TOLERANCES = [10 ** (-k / 2) for k in range(4, 13)]  # 1e-2 to 1e-6
NEAR = 1e-3
MAX_ITER = 2000
REPEAT_SECONDS = 2.0


def load(name, shapes):
    """Features, standardized but for one problem, and labels."""
    if name.startswith("digits"):
        X, y = load_digits(return_X_y=True)
    else:
        num_samples, num_features, num_classes = shapes[name]
        rng = np.random.default_rng(0)
        y = rng.permutation(np.arange(num_samples) % num_classes)
        X = 0.5 * rng.normal(size=(num_classes, num_features))[y]
        X += rng.normal(size=X.shape)
    return (X if name == UNSCALED else StandardScaler().fit_transform(X)), y


def ours(l2, num_samples, tol):
    return SoftmaxClassifier(l2=l2, tol=tol, max_iter=MAX_ITER)


def theirs(l2, num_samples, tol):
    return LogisticRegression(C=1 / (2 * l2 * num_samples), tol=tol, max_iter=MAX_ITER)


CONTENDERS = {"SoftmaxClassifier": ours, "LogisticRegression": theirs}


def loss(model, X, y, l2):
    return fl.linear_cross_entropy(
        X, model.coef_.astype(X.dtype), y, linear_bias=model.intercept_.astype(X.dtype), l2=l2
    )


def fit_to(goal, make, X, y, X_exact, l2, repeat_seconds):
    """The first tolerance that leads to the goal, and what it took."""

    def timed_fit(tol):
        model = make(l2, len(y), tol)
        start = time.perf_counter()
        model.fit(X, y)
        return model, time.perf_counter() - start

    for tol in TOLERANCES:
        model, seconds = timed_fit(tol)
        reached = loss(model, X_exact, y, l2)
        if reached <= goal:
            break
    end = time.perf_counter() + repeat_seconds
    while time.perf_counter() < end:
        seconds = min(seconds, timed_fit(tol)[1])
    return {
        "tol": tol, "iterations": int(np.max(model.n_iter_)), "seconds": seconds,
        "loss": reached, "reached": bool(reached <= goal),
    }  # fmt: skip


def fits_of(name, shapes, repeat_seconds):
    X, y = load(name, shapes)
    l2 = 1 / (2 * len(y))  # C = 1, LogisticRegression's default
    optimum = loss(ours(l2, len(y), 1e-5).fit(X, y), X, y, l2)
    result = {"shape": [*X.shape, int(y.max()) + 1], "optimum": optimum, "fits": []}
    for dtype in ("float32", "float64"):
        data = X.astype(dtype)
        for contender, make in CONTENDERS.items():
            fit = fit_to(optimum * (1 + NEAR), make, data, y, X, l2, repeat_seconds)
            result["fits"].append({"contender": contender, "dtype": dtype, **fit})
            print(name, contender, dtype, fit, flush=True)
    return result


def section(results):
    """What stands between the markers."""
    lines = []
    for name, result in results.items():
        samples, features, classes = result["shape"]
        fastest = min(
            f["seconds"] for f in result["fits"] if f["contender"] == "LogisticRegression"
        )
        rows = [
            [
                fit["contender"], fit["dtype"], f"{fit['tol']:.1e}", str(fit["iterations"]),
                format_time(fit["seconds"]),
                f"{fit['loss'] / result['optimum'] - 1:.1e}",
                f"{fastest / fit['seconds']:.1f}",
            ]
            for fit in result["fits"]
        ]  # fmt: skip
        header = ["estimator", "dtype", "tol", "iterations", "time", "above optimum", "speed-up"]
        title = f"{samples:,} samples, {features} features, {classes} classes"
        lines += [
            f"**{name}**: {title}. {heading(result)}.",
            "",
            *markdown(header, rows),
            "",
        ]
    return "\n".join(lines).rstrip()


def environment():
    """What a reader must know about where the numbers come from."""
    versions = {"fastloss": fl.__version__}
    versions |= {name: version(name) for name in ("numpy", "scipy", "scikit-learn")}
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cpu": _backend.config()["CPU"],
        "threads": fl.get_num_threads(),
        "versions": versions,
    }


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    problems = ["digits", UNSCALED, *SYNTHETIC]
    parser.add_argument("--problem", choices=problems, action="append", help="default: all")
    parser.add_argument("--quick", action="store_true", help="small problems")
    parser.add_argument("--json", type=Path, default=ROOT / "bench/results/classifier.json")
    parser.add_argument("--readme", type=Path, default=ROOT / "bench/README.md")
    options = parser.parse_args(arguments)
    effort = (QUICK, 0.0) if options.quick else (SYNTHETIC, REPEAT_SECONDS)
    results = json.loads(options.json.read_text()) if options.json.exists() else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for name in options.problem or problems:
            results[name] = fits_of(name, *effort)
            results[name] |= environment()
    results = {name: results[name] for name in problems if name in results}
    options.json.write_text(json.dumps(results, indent=1) + "\n")
    text = insert(options.readme.read_text(), section(results), BEGIN, END)
    options.readme.write_text(text)


if __name__ == "__main__":
    main()
