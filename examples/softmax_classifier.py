"""Train a softmax classifier on handwritten digits: scores, loss, gradient, gradient descent.

Run it with ``--help`` to see what can be changed, and with ``--backend`` to see that nothing
changes: the loss curve is the same with every backend.
"""

import argparse
import time
from collections.abc import Sequence

import matplotlib
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import fastloss as fl
from fastloss.sklearn import SoftmaxClassifier

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


def make_classifier(options: argparse.Namespace) -> SoftmaxClassifier:
    return SoftmaxClassifier(
        l2=options.l2,
        solver=options.solver,
        max_iter=options.epochs,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        schedule="cosine",
        tol=0 if options.solver == "sgd" else 1e-4,  # all epochs, or to the optimum
        n_iter_no_change=options.epochs,
        random_state=options.seed,
        verbose=True,
    )


def plot(losses: Sequence[float], unit: str, title: str, path: str) -> None:
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(np.arange(1, len(losses) + 1), losses, color="tab:blue")
    axes.set(xlabel=unit, ylabel="data loss + regularization loss", yscale="log", title=title)
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
    add("--solver", choices=["sgd", "lbfgs"], default="sgd", help="gradient descent, or L-BFGS")
    add("--epochs", type=positive_integer, default=40, help="or iterations of L-BFGS, at most")
    add("--l2", type=float, default=1e-4, help="strength of the regularization l2 * sum(W**2)")
    add("--batch-size", type=positive_integer, default=32, help="samples per step")
    add("--learning-rate", type=float, default=0.5, help="length of a step over the gradient")
    add("--seed", type=int, default=0, help="fixes the split and the order of the samples")
    add("--plot", default="softmax_classifier.png", help="where to save the loss curve")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> list[float]:
    """Run it all; return the loss of every epoch."""
    options = parse(arguments)
    fl.set_backend(options.backend)
    show_running_example()

    X_train, X_test, y_train, y_test = load_data(options.seed)
    start = time.perf_counter()
    classifier = make_classifier(options).fit(X_train, y_train)
    samples = classifier.n_iter_ * len(y_train)
    samples_per_second = samples / (time.perf_counter() - start)

    losses = classifier.loss_curve_
    print(f"loss           {losses[0]:.3f} at first, {losses[-1]:.3f} at last")
    print(f"test accuracy  {classifier.score(X_test, y_test):.4f}")
    print(f"speed          {samples_per_second:,.0f} samples per second on {fl.get_backend()}")
    unit = "epoch" if options.solver == "sgd" else "iteration"
    plot(losses, unit, "Softmax classifier on handwritten digits", options.plot)
    print(f"loss curve     {options.plot}")
    return losses


if __name__ == "__main__":
    main()
