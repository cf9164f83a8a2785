"""What a rank does in the tests of several processes: python ranks.py SCENARIO DIRECTORY RANK SIZE.

It leaves what it found in DIRECTORY; the tests judge.
"""

import importlib.util
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
IGNORED_BY_THE_EXAMPLE = -100
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
    "ignored by default": {"ignored": -100},
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
        target[3] = options.pop("ignored", IGNORED)
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
    """Loss and gradient of every case, and those of the example."""
    results = {"data parallel": data_parallel()}
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


def _refused():
    """Calls that are wrong on this rank or on another, by name: shard, target, start, options."""
    rank = dist.get_rank()
    scores, target = torch.ones(4, 6), torch.tensor([1, 2, 3, 4])
    start, odd = 6 * rank, rank == 1
    return {
        "target too large": (scores, torch.tensor([0, 11, 12, 13]), start, {}),
        "target negative": (scores.reshape(2, 2, 6), torch.tensor([[0, 1], [-1, 2]]), start, {}),
        "dtype on one rank": (scores.to(torch.int32 if odd else torch.float32), target, start, {}),
        "option on one rank": (scores, target, start, {"label_smoothing": 2.0 if odd else 0.0}),
        "backend on one rank": (scores, target, start, {"backend": "fast" if odd else None}),
        "start on one rank": (scores, target, "12" if odd else start, {}),
        "negative start": (scores, target, start - 1, {}),
        "shape of the target": (scores, target[:3], start, {}),
        "probabilities": (scores, torch.ones(4, 6), start, {}),
        "normalizer of a sum": (scores, target, start, {"normalizer": 2.0, "reduction": "sum"}),
        "ragged": (scores[: 4 - odd], target[: 4 - odd], start, {}),
        "dtypes": (scores.to(torch.float64 if odd else torch.float32), target, start, {}),
        "options": (scores, target, start, {"z_loss": 0.5 * odd}),
        "targets": (scores, target + odd, start, {}),
        "gap": (scores, target, 7 * rank, {}),
        "overlap": (scores, target, 5 * rank, {}),
        "no classes": (scores[:, :0], target, start, {}),
        "no dimension": (torch.ones(()), torch.tensor(0), start, {}),
    }


def refusals():
    """What every rank says to calls that are wrong on some, and that the group lives on."""
    results = {}
    for name, (scores, target, start, options) in _refused().items():
        try:
            ft.vocab_parallel_cross_entropy(scores, target, start, **options)
            results[name] = "no error"
        except Exception as error:
            results[name] = f"{type(error).__name__}: {error}"

    scores = torch.ones(4, 6, requires_grad=True)
    loss = ft.vocab_parallel_cross_entropy(scores, torch.tensor([0, 3, 6, 9]), 6 * dist.get_rank())
    results["afterwards"] = loss.item()
    try:
        torch.autograd.grad(loss, scores, create_graph=True)
    except RuntimeError as error:
        results["twice"] = str(error)
    others = dist.new_group([0])
    try:
        if dist.get_rank():
            ft.vocab_parallel_cross_entropy(scores, torch.tensor([0] * 4), 0, group=others)
        else:
            target = torch.tensor([0] * 4)
            results["alone"] = ft.vocab_parallel_cross_entropy(scores, target, 0, group=others)
    except ValueError as error:
        results["not in the group"] = str(error)
    return results


def loss_of_a_killed_rank():
    """The last rank dies between two losses, by the signal that nothing can catch."""
    scores, target = torch.ones(4, 5), torch.tensor([1, 2, 3, 4])
    start = 5 * dist.get_rank()
    before = ft.vocab_parallel_cross_entropy(scores, target, start).item()
    if dist.get_rank() == dist.get_world_size() - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        while True:
            ft.vocab_parallel_cross_entropy(scores, target, start)
    except RuntimeError as error:
        return before, str(error)


def example():
    """examples/torch_language_model.py"""
    path = Path(__file__).parents[2] / "examples" / "torch_language_model.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lines_of_the_example():
    """Lines of tokens, one of them all but empty and most of them shorter than the longest."""
    lines = torch.randint(50, (5, 9), generator=torch.Generator().manual_seed(1))
    for line, length in zip(lines, (9, 2, 5, 1, 7), strict=True):
        line[length:] = IGNORED_BY_THE_EXAMPLE
    return lines


def gradients_of_the_example(module, model, loss, lines):
    model.zero_grad()
    value, count = module.loss_of_batch(model, lines, loss)
    value.backward()
    grads = {k.removeprefix("module."): p.grad.clone() for k, p in model.named_parameters()}
    return value.item(), count, grads


def model_of_the_example(module):
    torch.manual_seed(2)
    return module.LanguageModel(vocabulary=50, width=6)


def data_parallel():
    module = example()
    model = torch.nn.parallel.DistributedDataParallel(model_of_the_example(module))
    mine = lines_of_the_example()[dist.get_rank() :: dist.get_world_size()]
    return {loss: gradients_of_the_example(module, model, loss, mine) for loss in module.LOSSES}


if __name__ == "__main__":
    scenario, directory, rank, size = sys.argv[1:]
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/store", rank=int(rank), world_size=int(size),
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    result = globals()[scenario]()
    torch.save(result, Path(directory) / f"{rank}.pt")
    dist.destroy_process_group()
