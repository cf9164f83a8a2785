"""Times the linear head beside the bare matrix products that it cannot do without.

    python bench/linear.py                   # some minutes; leave the machine alone meanwhile
    python bench/linear.py --quick           # small shapes: does it work?

Loss and gradients take three products: scores, gradient of the weight, gradient of the inputs. The
loss alone takes one product and a pass over the scores. Both limits are timed in the same rounds,
whole and in blocks of rows, NumPy's products and PyTorch's, of which the fastest counts. Peak
memory is that of a call in a process of its own beyond its arguments and gradients. Writes
bench/results/linear.json, and the tables into bench/README.md.
"""

import argparse
import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

import fastloss as fl
from fastloss._tools import measure
from fastloss._tools.report import format_time, heading, insert, markdown

ROOT = Path(__file__).resolve().parent.parent
JSON, README = ROOT / "bench/results/linear.json", ROOT / "bench/README.md"
BEGIN, END = "<!-- linear:begin -->", "<!-- linear:end -->"
SHAPES = [  # rows, features, classes
    (16384, 512, 10000), (65536, 64, 1000), (1024, 768, 50000), (2048, 1024, 32000),
    (4096, 128, 16384), (1797, 64, 10),
]  # fmt: skip
MEMORY_SHAPE = (65536, 64, 50000)
QUICK_SHAPES, QUICK_MEMORY_SHAPE = [(256, 16, 100)], (512, 8, 2000)
BLOCKS = (512, 1024)
SECONDS = 0.5  # each time that it is a contender's turn
MOST = 1.15  # times the products
MOST_MIB = 96


class Data:
    """A linear layer and a batch, with memory for the gradients."""

    def __init__(self, shape):
        n, d, c = shape
        rng = np.random.default_rng(0)
        self.x = rng.standard_normal((n, d), dtype=np.float32)
        self.w = rng.standard_normal((c, d), dtype=np.float32) / np.float32(np.sqrt(d))
        self.b = np.zeros(c, np.float32)
        self.y = rng.integers(0, c, n)
        self.out = fl.LinearGradients(*map(np.zeros_like, (self.w, self.b, self.x)))

    def fused(self, backend, with_grad):
        arguments = (self.x, self.w, self.y)
        options = {"linear_bias": self.b, "backend": backend}
        if with_grad:
            fl.linear_cross_entropy_with_grad(*arguments, inputs_grad=True, out=self.out, **options)
        else:
            fl.linear_cross_entropy(*arguments, **options)

    def products(self, scores, with_grad):
        """The bare products, in blocks of as many rows as `scores` has."""
        for first in range(0, len(self.x), len(scores)):
            rows = slice(first, first + len(scores))
            x = self.x[rows]
            g = np.matmul(x, self.w.T, out=scores[: len(x)])
            if with_grad:
                np.matmul(g.T, x, out=self.out.linear_weight)
                np.matmul(g, self.w, out=self.out.inputs[rows])


def torch_calls(data, with_grad, threads):
    """PyTorch's linear layer and loss, and its function for both, where it is installed."""
    try:
        import torch
    except ImportError:
        return {}
    torch.set_num_threads(threads)
    functional = torch.nn.functional
    x, w, b = (torch.from_numpy(a).requires_grad_(with_grad) for a in (data.x, data.w, data.b))
    y = torch.from_numpy(data.y)

    def layer_and_loss():
        return functional.cross_entropy(functional.linear(x, w, b), y)

    def step(loss):
        for leaf in (x, w, b):
            leaf.grad = None
        value = loss()
        if with_grad:
            value.backward()

    calls = {"torch": functools.partial(step, layer_and_loss)}
    if hasattr(functional, "linear_cross_entropy"):
        fused = functools.partial(
            functional.linear_cross_entropy, x, w, y, linear_bias=b,
            options=torch.nn.LinearCrossEntropyOptions(),
        )  # fmt: skip
        calls["torch fused"] = functools.partial(step, fused)
    return calls


def torch_products(data, scores, with_grad):
    """The bare products as PyTorch makes them."""
    torch = sys.modules["torch"]
    x, w, g = map(torch.from_numpy, (data.x, data.w, scores))
    torch.matmul(x, w.T, out=g)
    if with_grad:
        torch.matmul(g.T, x, out=torch.from_numpy(data.out.linear_weight))
        torch.matmul(g, w, out=torch.from_numpy(data.out.inputs))


def times_of(shape, with_grad, threads, effort):
    """Best times by name; "limit" is that of the products, and of the pass where it counts."""
    data = Data(shape)
    scores = np.zeros((shape[0], shape[2]), np.float32)
    calls = {
        f"products in blocks of {block}": functools.partial(
            data.products, scores[:block], with_grad
        )
        for block in BLOCKS
    }
    calls["products"] = functools.partial(data.products, scores, with_grad)
    if not with_grad:
        # After the products: these leave the scores that it reads.
        calls["pass"] = lambda: fl.cross_entropy(scores, data.y)
    for backend in measure.BACKENDS:
        calls[backend] = functools.partial(data.fused, backend, with_grad)
    if peers := torch_calls(data, with_grad, threads):
        calls |= peers
        calls["products of torch"] = functools.partial(torch_products, data, scores, with_grad)
    contenders = {name: measure.Local(call, 0) for name, call in calls.items()}
    times, errors = measure.interleave(contenders, effort)
    if errors:
        raise RuntimeError(f"{shape}: {errors}")
    best = {name: min(found) for name, found in times.items()}
    limit = min(time for name, time in best.items() if name.startswith("products"))
    return best | {"limit": limit + best.get("pass", 0.0)}


def peak_memory(shape, backend):
    """MiB that a call takes beyond its arguments and gradients, in a fresh process."""
    command = [sys.executable, __file__, "--peak", backend, *map(str, shape)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(result.stdout)


def print_peak(backend, *shape):
    data = Data((2000, 8, 3000))
    data.fused(backend, True)  # loads, compiles and starts what is there once and for all
    data = Data(tuple(map(int, shape)))
    for array in data.out:
        array.fill(1)  # is memory only when written to
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = resident("VmRSS")
    data.fused(backend, True)
    print(resident("VmHWM") - before)


def resident(field):
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{field}:")[2].split()[0]) / 1024


def tables(results):
    """Header, rows and title: of the times, and of peak memory."""
    names = list(dict.fromkeys(name for r in results["times"] for name in r["best"]))
    names = [name for name in names if name in (*measure.BACKENDS, "torch", "torch fused")]
    rows = [
        [r["shape"], "loss and gradients" if r["with_grad"] else "loss"]
        + [format_time(r["best"]["limit"])]
        + [
            f"{format_time(r['best'][name])} ({r['best'][name] / r['best']['limit']:.2f})"
            if name in r["best"]
            else "-"
            for name in names
        ]
        for r in results["times"]
    ]
    yield (
        "The best time and, in brackets, that over the products (and the pass, for the loss).",
        ["rows x features x classes", "of what", "limit", *names],
        rows,
    )
    yield (
        f"Peak memory beyond arguments and gradients (at most {MOST_MIB} MiB).",
        ["rows x features x classes", *results["memory"]["MiB"]],
        [
            [
                results["memory"]["shape"],
                *(f"{m:.1f} MiB" for m in results["memory"]["MiB"].values()),
            ]
        ],
    )


def show(results):
    for title, header, rows in tables(results):
        table = Table(title=title)
        for number, name in enumerate(header):
            table.add_column(name, justify="right" if number else "left")
        for row in rows:
            table.add_row(*row)
        Console().print(table)


def section(results):
    lines = [f"Measured on {heading(results)}; {results['blas']}.", ""]
    for title, header, rows in tables(results):
        lines += [title, "", *markdown(header, rows), ""]
    return "\n".join(lines)


def blas(threads):
    """What does the products; on as many threads as the kernels, else the times say nothing."""
    import threadpoolctl

    pools = [pool for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"]
    assert {pool["num_threads"] for pool in pools} <= {threads}, pools
    return ", ".join(
        f"{pool['internal_api']} {pool['version']} for {pool.get('architecture')}, "
        f"{pool['num_threads']} threads"
        for pool in pools
    )


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small shapes: does it work?")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, default=JSON)
    parser.add_argument("--readme", type=Path, default=README)
    parser.add_argument("--peak", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.peak:
        return print_peak(*options.peak)

    threads = fl.get_num_threads()
    peers = ["torch"] if importlib.util.find_spec("torch") else []
    results = measure.environment(threads, peers) | {"blas": blas(threads), "times": []}
    effort = measure.Effort(options.rounds, 0.0 if options.quick else SECONDS)
    for shape in QUICK_SHAPES if options.quick else SHAPES:
        for with_grad in (True, False):
            best = times_of(shape, with_grad, threads, effort)
            name = "x".join(map(str, shape))
            results["times"].append({"shape": name, "with_grad": with_grad, "best": best})
    shape = QUICK_MEMORY_SHAPE if options.quick else MEMORY_SHAPE
    peaks = {backend: peak_memory(shape, backend) for backend in measure.BACKENDS}
    results["memory"] = {"shape": "x".join(map(str, shape)), "MiB": peaks}

    readme = insert(options.readme.read_text(), section(results), BEGIN, END)
    os.makedirs(options.json.parent, exist_ok=True)
    options.json.write_text(json.dumps(results, indent=1) + "\n")
    options.readme.write_text(readme)
    show(results)
    return None


if __name__ == "__main__":
    main()
