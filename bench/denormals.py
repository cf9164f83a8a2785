"""Times subnormal inputs and results beside tame ones of the same shape: at most 2 x as long.

    python bench/denormals.py --backend numba

On one thread and within the caches, so that memory hides nothing. "again" is tame inputs a second
time: how far to believe the others. The exit status is 1 where a ratio is above 2. Leave the
machine alone meanwhile.
"""

import argparse

import numpy as np

import fastloss as fl
from fastloss._tools import measure

SHAPES = [(64, 1000), (1000, 64), (6000, 10)]
MOST = 2.0
EFFORT = measure.Effort(10, 0.004)


def scores(kind, rng, n, c, dtype):
    """Logits by their kind: 'deep' has most classes where probabilities are subnormal."""
    limits = np.finfo(dtype)
    x = rng.normal(size=(n, c))
    if kind == "subnormal":
        x *= limits.smallest_normal / 100
    elif kind == "deep":
        deepest, highest = np.log(limits.smallest_subnormal), np.log(limits.smallest_normal)
        x = rng.uniform(deepest, highest, (n, c))
        x[np.arange(n), rng.integers(0, c, n)] = 0
    return x.astype(dtype)


def calls(kind, shape, dtype, backend, out):
    """By name the calls to time on inputs of a kind."""
    n, c = shape
    rng = np.random.default_rng(0)
    x = scores(kind, rng, n, c, dtype)
    y = rng.integers(0, c, n)
    upstream = rng.normal(size=shape).astype(dtype)
    probs = fl.softmax(x)
    weight = np.ones(n)
    if kind == "weights":  # makes every entry of a gradient subnormal
        weight *= float(np.finfo(dtype).smallest_normal) / 10
    elif kind == "upstream":
        upstream *= np.finfo(dtype).smallest_normal / 10
    log_probs, soft = fl.log_softmax(x), fl.softmax(x[::-1].copy())
    row = np.empty(n, dtype)
    common = {"backend": backend, "num_threads": 1}
    full = common | {"out": out}
    return {
        "softmax": lambda: fl.softmax(x, **full),
        "log_softmax": lambda: fl.log_softmax(x, **full),
        "logsumexp": lambda: fl.logsumexp(x, out=row, **common),
        "softmax_backward": lambda: fl.softmax_backward(upstream, probs, **full),
        "log_softmax_backward": lambda: fl.log_softmax_backward(upstream, log_probs, **full),
        "nll_loss_with_grad": lambda: fl.nll_loss_with_grad(
            log_probs, y, sample_weight=weight, reduction="sum", **full
        ),
        "cross_entropy": lambda: fl.cross_entropy(x, y, sample_weight=weight, **common),
        "cross_entropy_with_grad": lambda: fl.cross_entropy_with_grad(
            x, y, sample_weight=weight, reduction="sum", **full
        ),
        "cross_entropy_with_grad, smoothing": lambda: fl.cross_entropy_with_grad(
            x, y, sample_weight=weight, label_smoothing=0.1, reduction="sum", **full
        ),
        "cross_entropy_with_grad, soft": lambda: fl.cross_entropy_with_grad(
            x, soft, sample_weight=weight, reduction="sum", **full
        ),
    }


def ratios(shape, dtype, backend):
    """By name and kind, the best time over that of tame inputs."""
    kinds = ("tame", "again", "subnormal", "deep", "weights", "upstream")
    out = np.empty(shape, dtype)
    by_kind = {kind: calls(kind, shape, dtype, backend, out) for kind in kinds}
    for name in by_kind["tame"]:
        contenders = {kind: measure.Local(by_kind[kind][name], 0) for kind in kinds}
        times, errors = measure.interleave(contenders, EFFORT)
        if errors:
            raise RuntimeError(f"{name}: {errors}")
        best = {kind: min(times[kind]) for kind in kinds}
        yield name, {kind: best[kind] / best["tame"] for kind in kinds[1:]}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--backend", choices=measure.BACKENDS, action="append")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    options = parser.parse_args(arguments)
    worst = 0.0
    for backend in options.backend or measure.BACKENDS:
        for shape in SHAPES:
            print(f"{backend}, {shape[0]}x{shape[1]} {options.dtype}", flush=True)
            for name, found in ratios(shape, np.dtype(options.dtype), backend):
                text = "  ".join(f"{kind} {ratio:5.2f}" for kind, ratio in found.items())
                print(f"  {name:36}{text}", flush=True)
                worst = max(worst, *found.values())
    print(f"The largest ratio is {worst:.2f} (at most {MOST:.2f})")
    return 1 if worst > MOST else 0


if __name__ == "__main__":
    raise SystemExit(main())
