"""Forward and backward under PyTorch's autograd: fastloss.torch beside PyTorch's own function.

    python bench/torch_adapter.py                          # everything, some minutes
    python bench/torch_adapter.py --shape 32x10            # the figures of other shapes stay
    python bench/torch_adapter.py --alternate              # calls in turn with PyTorch's only

Every contender has a process of its own, the same scores and a gradient that starts at None, so
that each step needs a fresh one.  `torch-malloc` is PyTorch where glibc keeps freed memory.
Writes bench/results/torch.json, and the tables between the `torch` markers in bench/README.md.
"""

import argparse
import functools
import json
import multiprocessing
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from fastloss._tools import measure, peers
from fastloss._tools.report import format_time, heading, insert, markdown

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench/results/torch.json"
BEGIN, END = "<!-- torch:begin -->", "<!-- torch:end -->"
SHAPES = ("1024x32000", "32768x1000", "262144x100", "1048576x10", "8x21x512x512", "32x10")
OURS = ("cython", "numba")
CONTENDERS = {name: {} for name in OURS} | {
    "torch": {},
    "torch-malloc": peers.PEERS["torch-malloc"].environment,
}
TARGETS = {"torch": 4.0, "torch-malloc": 1.5}  # times as fast
ORDERS = ("torch, fastloss.torch", "fastloss, fastloss._cython, torch")
MOST_IN_TURN = 1.3


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", action="append", choices=SHAPES)
    parser.add_argument("--alternate", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)

    report = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    report |= measure.environment(options.threads, ["torch"])
    del report["config"]
    for shape in options.shape or ([] if options.alternate else SHAPES):
        report.setdefault("shapes", {})[shape] = step_times(shape, options.threads)
    if options.alternate or not options.shape:
        report["in turn"] = {
            f"{order}; {backend}": in_turn(order, backend, options.threads)
            for order in ORDERS
            for backend in OURS
        }
    RESULTS.write_text(json.dumps(report, indent=1) + "\n")
    readme = ROOT / "bench/README.md"
    readme.write_text(insert(readme.read_text(), section(report), BEGIN, END))
    print(section(report))


# ---------------------------------------------------------------------------------------------
# Forward and backward
# ---------------------------------------------------------------------------------------------


def step_times(shape, threads, repeats=5, seconds=0.3):
    """The best times by contender, visited in turn, and the loss that each one found."""
    with ExitStack() as stack:
        pools = {}
        for name, environment in CONTENDERS.items():
            pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
            pools[name] = stack.enter_context(pool)
            with peers._environment(environment):
                pool.submit(bind, name, shape, threads, False).result()
        times = {name: [] for name in pools}
        for _ in range(repeats):
            for name, pool in pools.items():
                times[name] += pool.submit(visit, name, shape, threads, seconds).result()
        losses = {
            name: pool.submit(loss_of, name, shape, threads).result()
            for name, pool in pools.items()
        }
    reference = losses["torch"]
    for name, loss in losses.items():
        assert abs(loss - reference) < 1e-4 * reference, f"{name}: {loss}, not {reference}"
    return {name: {"best": min(t), "calls": len(t)} for name, t in times.items()}


def bind(name, shape, threads, wanted=True):
    step = _bound(name, shape, threads)
    step()
    return step if wanted else None


@functools.lru_cache(maxsize=1)
def _bound(name, shape, threads):
    import torch

    import fastloss.torch

    torch.set_num_threads(threads)
    data = measure.Data(
        *measure.parse_shape(shape if shape.count("x") < 2 else shape + "@1"), "float32"
    )
    logits, target = torch.from_numpy(data.logits).requires_grad_(), torch.from_numpy(data.target)
    if name in OURS:
        function = functools.partial(fastloss.torch.cross_entropy, backend=name)
    else:
        function = torch.nn.functional.cross_entropy

    def step():
        logits.grad = None
        loss = function(logits, target)
        loss.backward()
        return loss

    return step


def visit(name, shape, threads, seconds):
    return measure.visit(bind(name, shape, threads), seconds)


def loss_of(name, shape, threads):
    return float(bind(name, shape, threads)().detach())


# ---------------------------------------------------------------------------------------------
# In turn with PyTorch's own operations, in one process
# ---------------------------------------------------------------------------------------------

_IN_TURN = """
import time
import {order}
import torch, fastloss.torch
torch.set_num_threads({threads})
x = torch.randn(512, 1000)
target = torch.zeros(512, dtype=torch.long)
out = torch.empty_like(x)
def theirs():
    torch.add(x, 1, out=out)
def ours():
    fastloss.torch.cross_entropy(x, target, backend={backend!r})
def both():
    theirs()
    ours()
def best(call, calls=200):
    call()
    found = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        found.append((time.perf_counter() - start) / calls)
    return min(found)
print(best(theirs), best(ours), best(both))
"""


def in_turn(order, backend, threads):
    """Seconds of a call of theirs, of ours, and of the two after one another."""
    code = _IN_TURN.format(order=order, threads=threads, backend=backend)
    result = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True, timeout=100
    )
    theirs, ours, both = map(float, result.stdout.split())
    return {"theirs": theirs, "ours": ours, "both": both, "ratio": both / (theirs + ours)}


# ---------------------------------------------------------------------------------------------
# The tables
# ---------------------------------------------------------------------------------------------


def section(report):
    lines = [f"Measured on {heading(report)}.", ""]
    rows = []
    for shape in [shape for shape in SHAPES if shape in report.get("shapes", {})]:
        found = report["shapes"][shape]
        cells = [format_time(found[name]["best"]) for name in CONTENDERS]
        for theirs in TARGETS:
            cells.append(
                " / ".join(f"{found[theirs]['best'] / found[o]['best']:.1f}" for o in OURS)
            )
        rows.append([shape, *cells])
    header = [
        "shape",
        *CONTENDERS,
        *(f"times as fast as {name}: cython / numba" for name in TARGETS),
    ]
    lines += [*markdown(header, rows), ""]
    if "in turn" in report:
        rows = []
        for case, found in report["in turn"].items():
            times = (format_time(found[key]) for key in ("theirs", "ours", "both"))
            rows.append([case, *times, f"{found['ratio']:.2f}"])
        header = ["imports; backend", "PyTorch's call", "ours", "both in turn", "over the sum"]
        lines += [*markdown(header, rows), ""]
    missed = list(where_we_lose(report))
    lines += (
        ["Targets missed:", "", *(f"- {m}" for m in missed)] if missed else ["No target is missed."]
    )
    return "\n".join(lines)


def where_we_lose(report):
    for shape, found in report.get("shapes", {}).items():
        for ours in OURS:
            for theirs, target in TARGETS.items():
                ratio = found[theirs]["best"] / found[ours]["best"]
                if ratio < target and shape != "32x10":
                    what = f"{ratio:.2f} times as fast as {theirs}"
                    yield f"{ours}, {shape}: {what} (target {target})"
    for case, found in report.get("in turn", {}).items():
        if found["ratio"] > MOST_IN_TURN:
            yield f"in turn, {case}: {found['ratio']:.2f} (target {MOST_IN_TURN})"


if __name__ == "__main__":
    main()
