"""Predict the next token of Python code: 20,000 classes, and scores that are never all in memory.

The text is the source of the standard library, which comes with every Python. The tokens before
are looked up in a table of vectors, these are put side by side, and a linear layer makes a score
per token of the vocabulary of them. Table and layer are trained together, by Adagrad on
mini-batches, with the fused loss and gradients of ``linear_cross_entropy_with_grad``.

``--unfused`` trains in the usual way, with an array of scores and one of their gradient, to compare
the speed. The memory that both ways take is measured in processes of their own.
"""

import argparse
import collections
import concurrent.futures
import multiprocessing
import sysconfig
import time
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from tqdm import tqdm

import fastloss as fl

matplotlib.use("Agg")  # a picture in a file needs no screen
from matplotlib import pyplot as plt

UNKNOWN = 0  # the class of all tokens that are not in the vocabulary
NAMELESS = {tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
LEFT_OUT = {tokenize.COMMENT, tokenize.NL, tokenize.ENCODING}


def read_tokens(limit: int, seed: int) -> list[str]:
    """Tokens of the standard library's modules in random order, so many at most."""
    library = Path(sysconfig.get_path("stdlib"))
    paths = sorted(path for path in library.rglob("*.py") if "site-packages" not in path.parts)
    np.random.default_rng(seed).shuffle(paths)
    tokens: list[str] = []
    with tqdm(total=limit, desc="read", unit="token", unit_scale=True) as progress:
        for path in paths:
            if len(tokens) >= limit:
                break
            found = list(tokens_of(path))[: limit - len(tokens)]
            tokens += found
            progress.update(len(found))
    return tokens


def tokens_of(path: Path) -> Iterator[str]:
    """Of what does not parse, the beginning: the library's tests have such files."""
    try:
        with open(path, "rb") as file:
            for token in tokenize.tokenize(file.readline):
                if token.type not in LEFT_OUT:
                    name = tokenize.tok_name[token.type]
                    yield name if token.type in NAMELESS else token.string
    except (SyntaxError, tokenize.TokenError, UnicodeDecodeError):
        pass


def encode(tokens: Sequence[str], size: int) -> tuple[np.ndarray, int]:
    """Tokens as numbers, the frequent ones of their own; and how many numbers there are."""
    frequent = collections.Counter(tokens).most_common(size - 1)
    numbers = {token: number for number, (token, _) in enumerate(frequent, UNKNOWN + 1)}
    codes = np.array([numbers.get(token, UNKNOWN) for token in tokens], np.int32)
    return codes, len(numbers) + 1


def with_contexts(codes: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Every token that has enough others before it: those, and it."""
    windows = np.lib.stride_tricks.sliding_window_view(codes, length + 1)
    return windows[:, :-1], windows[:, -1]


class Model:
    """A vector per token, and a linear layer over those of the context."""

    def __init__(self, vocabulary: int, options: argparse.Namespace) -> None:
        rng = np.random.default_rng(options.seed)
        self.vectors = rng.normal(size=(vocabulary, options.dimension)).astype(np.float32)
        self.vectors *= 0.1
        width = options.context * options.dimension
        self.linear_weight = np.zeros((vocabulary, width), np.float32)
        self.linear_bias = np.zeros(vocabulary, np.float32)
        parameters = (self.vectors, self.linear_weight, self.linear_bias)
        self.squares = [np.full_like(parameter, 1e-8) for parameter in parameters]
        self.unfused = options.unfused
        self.rate = options.learning_rate

    def inputs(self, contexts: np.ndarray) -> np.ndarray:
        return self.vectors[contexts].reshape(len(contexts), -1)

    def loss(self, contexts: np.ndarray, targets: np.ndarray) -> float:
        return fl.linear_cross_entropy(
            self.inputs(contexts), self.linear_weight, targets, linear_bias=self.linear_bias
        )

    def step(self, contexts: np.ndarray, targets: np.ndarray) -> float:
        """One step of Adagrad; the loss before it."""
        loss_and_gradients = unfused if self.unfused else fused
        inputs = self.inputs(contexts)
        loss, gradients = loss_and_gradients(inputs, self.linear_weight, self.linear_bias, targets)
        of_vectors, of_weight, of_bias = self.squares
        adagrad(self.linear_weight, of_weight, gradients.linear_weight, self.rate)
        adagrad(self.linear_bias, of_bias, gradients.linear_bias, self.rate)

        used, places = np.unique(contexts, return_inverse=True)  # the others have gradient 0
        gradient = np.zeros((len(used), self.vectors.shape[1]), np.float32)
        np.add.at(gradient, places.ravel(), gradients.inputs.reshape(-1, gradient.shape[1]))
        vectors, squares = self.vectors[used], of_vectors[used]
        adagrad(vectors, squares, gradient, self.rate)
        self.vectors[used], of_vectors[used] = vectors, squares
        return loss


def fused(
    inputs: np.ndarray, weight: np.ndarray, bias: np.ndarray, targets: np.ndarray
) -> tuple[float, fl.LinearGradients]:
    return fl.linear_cross_entropy_with_grad(
        inputs, weight, targets, linear_bias=bias, inputs_grad=True
    )


def unfused(
    inputs: np.ndarray, weight: np.ndarray, bias: np.ndarray, targets: np.ndarray
) -> tuple[float, fl.LinearGradients]:
    """The same in steps, for which all scores of the mini-batch and their gradient are there."""
    scores = inputs @ weight.T
    scores += bias
    loss, gradient = fl.cross_entropy_with_grad(scores, targets)
    return loss, fl.LinearGradients(gradient.T @ inputs, gradient.sum(axis=0), gradient @ weight)


def adagrad(parameter: np.ndarray, squares: np.ndarray, gradient: np.ndarray, rate: float) -> None:
    """Every entry has a rate of its own, that falls with the gradients it has seen."""
    squares += np.square(gradient)
    gradient /= np.sqrt(squares)
    gradient *= rate
    parameter -= gradient


def train(
    model: Model, contexts: np.ndarray, targets: np.ndarray, options: argparse.Namespace
) -> tuple[list[float], float]:
    """Mini-batches in random order, none twice: the loss of each, and tokens per second."""
    order = np.random.default_rng(options.seed).permutation(len(targets))
    order = order[: options.steps * options.batch_size]
    batches = np.split(order, range(options.batch_size, len(order), options.batch_size))
    losses = []
    start = time.perf_counter()
    with tqdm(total=len(order), desc="train", unit="token", unit_scale=True) as progress:
        for batch in batches:
            losses.append(model.step(contexts[batch], targets[batch]))
            progress.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
            progress.update(len(batch))
    return losses, len(order) / (time.perf_counter() - start)


def compare_memory(vocabulary: int, options: argparse.Namespace) -> dict[str, float]:
    """Megabytes that the two ways need for a step, each in a fresh process."""
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
        1, mp_context=spawn, max_tasks_per_child=1
    ) as processes:
        ways = {"fused": False, "unfused": True}
        return {
            name: processes.submit(memory_of_a_step, vocabulary, options, way).result()
            for name, way in ways.items()
        }


def memory_of_a_step(vocabulary: int, options: argparse.Namespace, unfused: bool) -> float:
    options.unfused = unfused
    model = Model(vocabulary, options)
    tokens = np.random.default_rng(0).integers(0, vocabulary, options.batch_size + options.context)
    contexts, targets = with_contexts(tokens, options.context)
    before = peak_megabytes()
    model.step(contexts, targets)
    return peak_megabytes() - before


def peak_megabytes() -> float:
    """The most memory this process has had so far, as Linux counts it."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def plot(losses: Sequence[float], batch_size: int, path: str) -> None:
    """The loss of every step, and a running mean."""
    tokens = np.arange(1, len(losses) + 1) * batch_size
    width = max(len(losses) // 20, 1)
    means = np.convolve(losses, np.full(width, 1 / width), "valid")
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(tokens, losses, linewidth=0.5, color="tab:blue", alpha=0.5, label="mini-batch")
    axes.plot(tokens[width - 1 :], means, color="tab:blue", label=f"mean of {width}")
    axes.set(xlabel="tokens", ylabel="loss", title="Next token of Python code")
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
        description="Predict the next token of the standard library's source.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--backend", choices=["cython", "numba", "numpy"], help="what computes the loss")
    add("--unfused", action="store_true", help="train with all scores of a mini-batch in memory")
    add("--tokens", type=positive_integer, default=1_000_000, help="how many to read")
    add("--steps", type=positive_integer, default=150, help="mini-batches, at most all of the text")
    add("--vocabulary", type=positive_integer, default=20_000, help="tokens known, at most")
    add("--context", type=positive_integer, default=4, help="tokens to predict the next one from")
    add("--dimension", type=positive_integer, default=24, help="of the vector of a token")
    add("--batch-size", type=positive_integer, default=2048, help="tokens per step")
    add("--learning-rate", type=float, default=0.1, help="of Adagrad")
    add("--seed", type=int, default=0, help="fixes the text, the start and the order of the steps")
    add("--plot", default="next_token.png", help="where to save the loss curve")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> list[float]:
    """Run it all; return the loss of every step."""
    options = parse(arguments)
    fl.set_backend(options.backend)
    codes, vocabulary = encode(read_tokens(options.tokens, options.seed), options.vocabulary)
    contexts, targets = with_contexts(codes, options.context)
    held_out = min(len(targets) // 10, 10_000)
    model = Model(vocabulary, options)
    test = contexts[-held_out:], targets[-held_out:]

    before = model.loss(*test)
    losses, speed = train(model, contexts[:-held_out], targets[:-held_out], options)
    memory = compare_memory(vocabulary, options)

    way = "unfused" if options.unfused else "fused"
    print(f"vocabulary     {vocabulary:,} tokens, {np.mean(codes == UNKNOWN):.1%} unknown")
    print(f"held-out loss  {before:.3f} untrained, {model.loss(*test):.3f} trained")
    print(f"speed          {speed:,.0f} tokens per second, {way}, on {fl.get_backend()}")
    print(f"memory         {memory['fused']:.0f} MB fused, {memory['unfused']:.0f} MB unfused")
    plot(losses, options.batch_size, options.plot)
    print(f"loss curve     {options.plot}")
    return losses


if __name__ == "__main__":
    main()
