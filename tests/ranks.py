"""What a rank does in the tests of several processes: python ranks.py SCENARIO DIRECTORY RANK SIZE.

It leaves what it found in DIRECTORY; the tests judge.
"""

import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed as dist

import fastloss.torch as ft

CLASSES = 13
SHARDS = {2: [(5, 8), (13, 0)], 3: [(3, 4, 6), (9, 0, 4)]}  # classes per rank
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
IGNORED = 7  # a class, too: what is ignored is no error, whatever it is
OPTIONS = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "smoothing": {"label_smoothing": 0.1},
    "all smoothing": {"label_smoothing": 1.0},
    "z-loss": {"z_loss": 0.3},
    "negative slope": {"z_loss": 30.0, "shift": -40.0},
    "ignored": {"ignore_index": IGNORED},
    "all ignored": {"ignore_index": IGNORED, "target": IGNORED},
    "normalizer": {"normalizer": 3.5, "ignore_index": IGNORED},
    "everything": {
        "label_smoothing": 0.2, "z_loss": 0.01, "ignore_index": IGNORED, "reduction": "none",
    },
    "far from 0": {"label_smoothing": 0.1, "shift": 1000.0},
    "upstream": {"upstream": -2.5},
    "upstream per row": {"reduction": "none", "upstream": "rows", "label_smoothing": 0.1},
    "a row without a batch": {"rows": ()},
    "rows in two dimensions": {"rows": (2, 3), "reduction": "none"},
    "no rows": {"rows": (0,)},
    "no rows, summed": {"rows": (0,), "reduction": "sum", "label_smoothing": 0.1},
    "reference": {"backend": "numpy", "z_loss": 0.1},
}  # fmt: skip

_INF, _NAN = float("inf"), float("nan")
EDGES = {  # three scores and the target
    "NaN": ([1, _NAN, 2], 0),
    "+inf": ([1, 2, _INF], 0),
    "+inf at the target": ([_INF, 2, 1], 0),
    "NaN and +inf": ([_NAN, 1, _INF], 1),
    "nothing but -inf": ([-_INF, -_INF, -_INF], 1),
    "masked class": ([1, -_INF, 2], 0),
    "masked shard": ([1, 2, -_INF], 1),
    "-inf at the target": ([1, 2, -_INF], 2),
    "no overflow": ([3e38, -3e38, 0], 1),
    "largest float": ([3.4028235e38] * 3, 2),
    "confident": ([20, 0, 0], 0),
    "confident, elsewhere": ([0, 0, 20], 2),
    "small": ([0, -87, -_INF], 0),
    "subnormal": ([0, -_INF, -88], 0),
    "equal": ([5, 5, 5], 1),
    "equal, elsewhere": ([5, 5, 4], 1),
    "wrong by far": ([50, 0, 1], 2),
}
EDGE_OPTIONS = {"plain": {}, "smoothing": {"label_smoothing": 0.1}, "z-loss": {"z_loss": 0.1}}


def case(name, dtype):
    """Scores, target, upstream gradient or None, options of the loss."""
    options = dict(OPTIONS[name])
    rows = options.pop("rows", (11,))
    generator = torch.Generator().manual_seed(len(name))
    scores = torch.randn(*rows, CLASSES, generator=generator, dtype=torch.float64) * 4
    scores = (scores + options.pop("shift", 0.0)).to(dtype)
    target = torch.randint(CLASSES, rows, generator=generator)
    if target.dim() == 1 and target.numel():
        target[3] = IGNORED
        target[4] = scores[4].argmax()
    target = torch.full_like(target, options.pop("target", 0)) if "target" in options else target
    upstream = options.pop("upstream", None)
    if upstream == "rows":
        upstream = torch.randn(*rows, generator=generator, dtype=torch.float64)
    return scores, target, upstream, options


def edge(name):
    scores, target = EDGES[name]
    return torch.tensor([scores, [5, 4, 2]], dtype=torch.float32), torch.tensor([target, 0])


def loss_and_gradient(function, scores, *arguments, upstream=None, **options):
    leaf = scores.detach().clone().requires_grad_()
    loss = function(leaf, *arguments, **options)
    if upstream is None:
        upstream = torch.ones(())
    loss.backward(torch.as_tensor(upstream).to(loss.dtype).expand(loss.shape).contiguous())
    return loss.detach(), leaf.grad


def shard(scores, sizes):
    """This rank's scores and its first class."""
    rank = dist.get_rank()
    start = sum(sizes[:rank])
    return scores[..., start : start + sizes[rank]], start


def agreement():
    """Loss and gradient of every case."""
    results = {}
    for sizes in SHARDS[dist.get_world_size()]:
        for name in OPTIONS:
            for dtype in DTYPES:
                scores, target, upstream, options = case(name, dtype)
                mine, start = shard(scores, sizes)
                results[sizes, name, dtype] = loss_and_gradient(
                    ft.vocab_parallel_cross_entropy, mine, target, start,
                    upstream=upstream, **options,
                )  # fmt: skip
    sizes = {2: (2, 1), 3: (1, 1, 1)}[dist.get_world_size()]
    for name in EDGES:
        for options in EDGE_OPTIONS:
            scores, target = edge(name)
            mine, start = shard(scores, sizes)
            results[name, options] = loss_and_gradient(
                ft.vocab_parallel_cross_entropy, mine, target, start,
                reduction="none", **EDGE_OPTIONS[options],
            )  # fmt: skip
    return results


if __name__ == "__main__":
    scenario, directory, rank, size = sys.argv[1:]
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/store", rank=int(rank), world_size=int(size),
        timeout=timedelta(seconds=30),
    )  # fmt: skip
    result = globals()[scenario]()
    torch.save(result, Path(directory) / f"{rank}.pt")
    dist.destroy_process_group()
