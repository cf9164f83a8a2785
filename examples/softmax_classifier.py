"""Train a softmax classifier on handwritten digits: scores, loss, gradient, gradient descent.

Run it with ``--help`` to see what can be changed, and with ``--backend`` to see that nothing
changes: the loss curve is the same with every backend.
"""

import argparse
from collections.abc import Iterator, Sequence

import matplotlib
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import fastloss as fl

matplotlib.use("Agg")  # a picture in a file needs no screen
from matplotlib import pyplot as plt


def show_running_example() -> None:
    """Three scores, of which the first is the right class's: probabilities, loss and gradient."""
    scores, target = np.array([[5, 4, 2]], np.float32), np.array([0])
    probs = fl.softmax(scores)
    loss, grad = fl.cross_entropy_with_grad(scores, target)
    with np.printoptions(precision=2, suppress=True):
        print(f"scores    {scores[0]}, right class {target[0]}")
        print(f"softmax   {probs[0]}")
        print(f"loss      {loss:.3f}")
        print(f"gradient  {grad[0]}\n")


def load_data(seed: int) -> list[np.ndarray]:
    """X_train, X_test, y_train, y_test: 8 x 8 pixels from 0 to 1, and which digit they show."""
    X, y = load_digits(return_X_y=True)
    X = (X / 16).astype(np.float32)
    return train_test_split(X, y, test_size=0.2, stratify=y, random_state=seed)


def loss_and_gradients(
    W: np.ndarray, b: np.ndarray, X: np.ndarray, y: np.ndarray, l2: float
) -> tuple[float, np.ndarray, np.ndarray]:
    """The loss of the classifier, and its gradients with respect to W and b."""
    scores = X @ W.T + b
    data_loss, grad_scores = fl.cross_entropy_with_grad(scores, y, out=scores)  # in place
    regularization_loss = l2 * float(np.sum(W**2))
    grad_W = grad_scores.T @ X + 2 * l2 * W
    grad_b = grad_scores.sum(axis=0)
    return data_loss + regularization_loss, grad_W, grad_b


def accuracy(W: np.ndarray, b: np.ndarray, X: np.ndarray, y: np.ndarray) -> float:
    return float(np.mean(np.argmax(X @ W.T + b, axis=1) == y))


def mini_batches(
    X: np.ndarray, y: np.ndarray, batch_size: int, rng: np.random.Generator
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All samples once, in random order."""
    order = rng.permutation(len(y))
    for start in range(0, len(y), batch_size):
        batch = order[start : start + batch_size]
        yield X[batch], y[batch]


def train(
    X: np.ndarray, y: np.ndarray, options: argparse.Namespace
) -> tuple[np.ndarray, np.ndarray, list[float], float]:
    """Mini-batch gradient descent: W, b, the loss of every step, samples per second."""
    rng = np.random.default_rng(options.seed)
    W = np.zeros((y.max() + 1, X.shape[1]), X.dtype)
    b = np.zeros(len(W), X.dtype)
    losses = []
    with tqdm(total=options.epochs * len(y), unit=" samples", unit_scale=True) as progress:
        for _ in range(options.epochs):
            for X_batch, y_batch in mini_batches(X, y, options.batch_size, rng):
                loss, grad_W, grad_b = loss_and_gradients(W, b, X_batch, y_batch, options.l2)
                W -= options.learning_rate * grad_W
                b -= options.learning_rate * grad_b
                losses.append(loss)
                progress.update(len(y_batch))
            progress.set_postfix(
                loss=f"{loss:.3f}", accuracy=f"{accuracy(W, b, X, y):.3f}", refresh=False
            )
        samples_per_second = progress.n / progress.format_dict["elapsed"]
    return W, b, losses, samples_per_second


def plot(losses: Sequence[float], epochs: int, title: str, path: str) -> None:
    """The loss of every step, and its mean over every epoch."""
    steps = np.arange(1, len(losses) + 1) * epochs / len(losses)
    means = np.reshape(losses, (epochs, -1)).mean(axis=1)
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(steps, losses, linewidth=0.5, color="tab:blue", alpha=0.5, label="mini-batch")
    axes.plot(np.arange(epochs) + 0.5, means, color="tab:blue", label="mean of the epoch")
    axes.set(xlabel="epoch", ylabel="data loss + regularization loss", yscale="log", title=title)
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
        description="Train a softmax classifier on handwritten digits.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--backend", choices=["cython", "numba", "numpy"], help="what computes the loss")
    add("--epochs", type=positive_integer, default=40, help="passes over the training samples")
    add("--l2", type=float, default=1e-4, help="strength of the regularization l2 * sum(W**2)")
    add("--batch-size", type=positive_integer, default=32, help="samples per step")
    add("--learning-rate", type=float, default=0.5, help="length of a step over the gradient")
    add("--seed", type=int, default=0, help="fixes the split and the order of the samples")
    add("--plot", default="softmax_classifier.png", help="where to save the loss curve")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> list[float]:
    """Run it all; return the loss of every step."""
    options = parse(arguments)
    fl.set_backend(options.backend)
    show_running_example()

    X_train, X_test, y_train, y_test = load_data(options.seed)
    W, b, losses, samples_per_second = train(X_train, y_train, options)

    trained_loss, _, _ = loss_and_gradients(W, b, X_train, y_train, options.l2)
    print(f"loss           {losses[0]:.3f} untrained, {trained_loss:.3f} trained")
    print(f"test accuracy  {accuracy(W, b, X_test, y_test):.4f}")
    print(f"speed          {samples_per_second:,.0f} samples per second on {fl.get_backend()}")
    plot(losses, options.epochs, "Softmax classifier on handwritten digits", options.plot)
    print(f"loss curve     {options.plot}")
    return losses


if __name__ == "__main__":
    main()
