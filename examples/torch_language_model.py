"""Train a small language model on the source of Python's standard library, by PyTorch.

The model reads a line of tokens and says at every place which of 16,384 comes next.  ``--loss``
chooses whose cross-entropy it learns from; with ``both``, the default, each runs in a process of
its own, from the same seed, and the two are compared.

On two processes, to the same loss curve::

    torchrun --nproc-per-node 2 examples/torch_language_model.py --loss fastloss
"""

import argparse
import collections
import json
import os
import resource
import subprocess
import sys
import sysconfig
import tempfile
import time
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import fastloss.torch

matplotlib.use("Agg")  # a picture in a file needs no screen
from matplotlib import pyplot as plt

UNKNOWN = 0  # the class of all tokens that are too rare to have one
IGNORED = -100  # the target where a line has ended
LOSSES = ("torch", "fastloss")
_UNSEEN = {tokenize.COMMENT, tokenize.NL, tokenize.ENDMARKER}
_LAYOUT = {tokenize.INDENT, tokenize.DEDENT, tokenize.NEWLINE}


class Result(NamedTuple):
    loss: str
    curve: list[float]  # the loss of every step
    tokens_per_second: float
    peak_memory: float  # of this process, in MB
    processes: int


# ---------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------


def read_tokens(path: Path) -> list[str]:
    """Names, operators and literals of a file, and where its lines and blocks begin and end."""
    with tokenize.open(path) as file:
        return [
            tokenize.tok_name[token.type] if token.type in _LAYOUT else token.string
            for token in tokenize.generate_tokens(file.readline)
            if token.type not in _UNSEEN
        ]


def read_files(max_tokens: int) -> list[list[str]]:
    """The tokens of each file of the standard library, until there are enough."""
    files: list[list[str]] = []
    with tqdm(total=max_tokens, desc="read", unit=" tokens", unit_scale=True) as progress:
        for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
            files.append(read_tokens(path)[: max_tokens - progress.n])
            progress.update(len(files[-1]))
            if progress.n == max_tokens:
                break
    return files


def encode(files: Sequence[Sequence[str]], vocabulary: int, length: int) -> Tensor:
    """Lines of ``length + 1`` classes: frequent tokens have their own, and a file's end is padded.

    No line goes on in another file, so that some are shorter than others.
    """
    counts = collections.Counter(token for file in files for token in file)
    frequent = sorted(counts, key=lambda token: (-counts[token], token))[: vocabulary - 1]
    if len(frequent) < vocabulary - 1:
        raise SystemExit(
            f"{len(frequent)} different tokens are too few for --vocabulary {vocabulary}"
        )
    classes = {token: number for number, token in enumerate(frequent, UNKNOWN + 1)}
    lines = []
    for file in files:
        numbers = [classes.get(token, UNKNOWN) for token in file]
        for start in range(0, len(numbers) - 1, length):
            line = torch.full((length + 1,), IGNORED)
            piece = numbers[start : start + length + 1]
            line[: len(piece)] = torch.tensor(piece)
            lines.append(line)
    return torch.stack(lines)


def batches(lines: Tensor, size: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Lines in random order, again and again."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(order) < size:
            order = torch.cat([order, torch.randperm(len(lines), generator=generator)])
        batch, order = order[:size], order[size:]
        yield lines[batch]


# ---------------------------------------------------------------------------------------------
# Model and loss
# ---------------------------------------------------------------------------------------------


class LanguageModel(nn.Module):
    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.recurrent = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """Scores, a row per token."""
        states, _ = self.recurrent(self.embedding(tokens))
        return self.head(states.flatten(0, 1))


def cross_entropy(loss: str, scores: Tensor, target: Tensor, normalizer: float) -> Tensor:
    if loss == "torch":
        total = nn.functional.cross_entropy(scores, target, ignore_index=IGNORED, reduction="sum")
        return total / normalizer
    # The scores have done their work when the loss is known: their gradient may replace them.
    return fastloss.torch.cross_entropy(
        scores, target, ignore_index=IGNORED, normalizer=normalizer, inplace=True
    )


def process_count() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def over_processes(value: float) -> float:
    """The sum over all processes."""
    total = torch.tensor(value, dtype=torch.float64)
    if distributed.is_initialized():
        distributed.all_reduce(total)
    return total.item()


def loss_of_batch(model: nn.Module, lines: Tensor, loss: str) -> tuple[Tensor, int]:
    """This process's part of the loss of the batch, and the tokens that count in the batch.

    `lines` are those of this process.  The loss is a mean over the tokens of all: each process
    divides by their number, not by its own.  DistributedDataParallel then takes the mean of the
    gradients over processes where the sum is meant, so their number cancels.
    """
    inputs, target = lines[:, :-1].clamp(min=0), lines[:, 1:].flatten()
    count = int(over_processes(float((target != IGNORED).sum())))
    return cross_entropy(loss, model(inputs), target, count / process_count()), count


def train(lines: Tensor, options: argparse.Namespace) -> Result:
    rank = distributed.get_rank() if distributed.is_initialized() else 0
    torch.manual_seed(options.seed)
    model: nn.Module = LanguageModel(options.vocabulary, options.width)
    if distributed.is_initialized():
        model = DistributedDataParallel(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=options.learning_rate)
    curve, tokens = [], 0
    start = time.perf_counter()
    steps = batches(lines, options.batch_size, options.steps, options.seed)
    with tqdm(total=options.steps, desc=options.loss, unit=" steps", disable=rank > 0) as progress:
        for batch in steps:
            loss, count = loss_of_batch(model, batch[rank :: process_count()], options.loss)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(over_processes(loss.item()) / process_count())
            tokens += count
            progress.set_postfix(loss=f"{curve[-1]:.3f}", refresh=False)
            progress.update()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return Result(options.loss, curve, tokens / seconds, peak, process_count())


# ---------------------------------------------------------------------------------------------
# Report
# ---------------------------------------------------------------------------------------------


def report(results: Sequence[Result], path: str) -> None:
    for result in results:
        share = " each" if result.processes > 1 else ""
        print(
            f"{result.loss:<10} loss {result.curve[0]:.4f} untrained, {result.curve[-1]:.4f} "
            f"trained; {result.tokens_per_second:,.0f} tokens per second; "
            f"peak memory {result.peak_memory:,.0f} MB{share}"
        )
    if len(results) == 2:
        curves = [result.curve for result in results]
        difference = max(abs(a - b) for a, b in zip(*curves, strict=True))
        print(f"largest difference of the loss curves: {difference:.1e}")
    plot(results, path)
    print(f"loss curve: {path}")


def plot(results: Sequence[Result], path: str) -> None:
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for result, style in zip(results, ("-", ":"), strict=False):
        label = f"{result.loss}: {result.tokens_per_second:,.0f} tokens per second"
        axes.plot(range(1, len(result.curve) + 1), result.curve, style, label=label)
    axes.set(xlabel="step", ylabel="cross-entropy", title="Language model of Python's source")
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def positive_integer(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a language model on the source of Python's standard library.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--loss", choices=[*LOSSES, "both"], default="both", help="whose cross-entropy")
    add("--steps", type=positive_integer, default=80, help="batches to learn from")
    add("--batch-size", type=positive_integer, default=16, help="lines per batch")
    add("--length", type=positive_integer, default=64, help="tokens per line")
    add("--tokens", type=positive_integer, default=400_000, help="tokens to read")
    add("--vocabulary", type=positive_integer, default=16_384, help="classes")
    add("--width", type=positive_integer, default=128, help="size of embedding and state")
    add("--learning-rate", type=float, default=3e-3, help="of Adam")
    add("--seed", type=int, default=0, help="of weights and batches")
    add("--plot", default="torch_language_model.png", help="where to save the loss curve")
    add("--json", metavar="PATH", help="where to save the numbers, if anywhere")
    options = parser.parse_args(arguments)
    if options.loss == "both" and "RANK" in os.environ:
        parser.error("--loss both starts processes of its own; under torchrun choose one loss")
    return options


def run_apart(arguments: Sequence[str], directory: str) -> list[Result]:
    """Each loss in a process of its own: the peak of one would else hide that of the other."""
    results = []
    for loss in LOSSES:
        name = os.path.join(directory, loss)
        own = ["--loss", loss, "--json", f"{name}.json", "--plot", f"{name}.png"]
        command = [sys.executable, __file__, *arguments, *own]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        with open(f"{name}.json") as file:
            results += [Result(**values) for values in json.load(file)]
    return results


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    if "RANK" in os.environ:  # torchrun has started this process, and others
        distributed.init_process_group("gloo")
    first = not distributed.is_initialized() or distributed.get_rank() == 0
    if options.loss == "both":
        with tempfile.TemporaryDirectory() as directory:
            results = run_apart(sys.argv[1:] if arguments is None else arguments, directory)
    else:
        lines = encode(read_files(options.tokens), options.vocabulary, options.length)
        results = [train(lines, options)]
    if first:
        report(results, options.plot)
        if options.json:
            with open(options.json, "w") as file:
                json.dump([result._asdict() for result in results], file)
    if distributed.is_initialized():
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
