"""The table of operations: what each is called, takes and returns.  One list for everyone.

The self-check and the benchmark (``_tools``), the figures of accuracy and the tests make their
cases from it; what an operation computes is said by ``_reference`` for the kernels and by the
tests' own oracles for both.

CONTRIBUTING.md ("Add a loss", "Add an option") says what a new row or option needs beside it.
"""

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple

from fastloss._contract import INDEX_OPTIONS

_NOTHING: Mapping[str, float] = MappingProxyType({})


class Operation(NamedTuple):
    """A public function, and the kernel that computes it."""

    name: str
    # A loss of rows and their targets, of scores and theirs, or of the scores of rows alone.
    family: Literal["map", "backward", "loss", "binary", "scores"]
    inputs: tuple[str, ...]  # arrays, positional; the last but for a target are the scores
    returns: Literal["logits", "rows"]  # one number for every score, or row, unless reduced
    arrays: tuple[str, ...] = ()  # more of them, optional
    options: Mapping[str, float] = _NOTHING  # numbers, optional, and a value of each to try it with
    soft: bool = False  # whether the target may hold probabilities
    by: str | None = None  # the kernel it is an option of; None: the one of the same name
    reduction: str = "mean"  # unless another is asked for

    @property
    def kernel(self) -> str:
        """The name in `Kernels`."""
        return self.by or self.name

    @property
    def is_loss(self) -> bool:
        """Whether it is reduced, and comes with NAME_with_grad."""
        return self.family in ("loss", "binary", "scores")

    @property
    def scores(self) -> str:
        """What the input is called that `out` may lie in, and that decides the dtype."""
        return self.inputs[0] if self.is_loss else self.inputs[-1]

    @property
    def functions(self) -> tuple[str, ...]:
        """Its public names."""
        return (self.name, f"{self.name}_with_grad") if self.is_loss else (self.name,)

    @property
    def soft_options(self) -> Mapping[str, float]:
        """Those of its options that go with probabilities."""
        return {name: v for name, v in self.options.items() if name not in INDEX_OPTIONS}

    @property
    def variants(self) -> "Iterator[Variant]":
        """With nothing optional, with all arrays, with each number, with everything."""
        yield Variant(self, "")
        if self.options:
            yield Variant(self, "weights", self.arrays)
        for option, value in self.options.items():
            yield Variant(self, option, (), {option: value})
        if self.arrays:
            yield Variant(self, "all", self.arrays, self.options)
        if self.soft:
            yield Variant(self, "soft", soft=True)
            yield Variant(self, "soft all", self.arrays, self.soft_options, soft=True)


class Variant(NamedTuple):
    """A way to call an operation."""

    operation: Operation
    title: str
    arrays: tuple[str, ...] = ()
    options: Mapping[str, float] = _NOTHING
    soft: bool = False

    def __str__(self) -> str:
        return f"{self.operation.name} {self.title}".rstrip()


_WEIGHTS = ("weight", "sample_weight")
OPERATIONS = {
    operation.name: operation
    for operation in [
        Operation("softmax", "map", ("logits",), "logits"),
        Operation("log_softmax", "map", ("logits",), "logits"),
        Operation("logsumexp", "map", ("logits",), "rows"),
        Operation("softmax_backward", "backward", ("grad_output", "probs"), "logits"),
        Operation("log_softmax_backward", "backward", ("grad_output", "log_probs"), "logits"),
        Operation(
            "cross_entropy", "loss", ("logits", "target"), "rows", _WEIGHTS,
            {"label_smoothing": 0.1, "z_loss": 0.01, "temperature": 0.7}, soft=True,
        ),
        Operation(
            "focal_loss", "loss", ("logits", "target"), "rows", _WEIGHTS, {"gamma": 1.5},
            by="cross_entropy",
        ),
        Operation(
            "poly_loss", "loss", ("logits", "target"), "rows", _WEIGHTS, {"epsilon": 1.5},
            by="cross_entropy",
        ),
        Operation("nll_loss", "loss", ("log_probs", "target"), "rows", _WEIGHTS),
        Operation(
            "entropy", "scores", ("logits",), "rows", ("sample_weight",), {"temperature": 0.7},
            reduction="none",
        ),
        Operation(
            "binary_cross_entropy_with_logits", "binary", ("logits", "target"), "logits",
            ("pos_weight", *_WEIGHTS), {"label_smoothing": 0.1},
        ),
        Operation(
            "sigmoid_focal_loss", "binary", ("logits", "target"), "logits", _WEIGHTS,
            {"gamma": 1.5, "alpha": 0.25},
        ),
    ]
}  # fmt: skip


BY_FUNCTION = {name: operation for operation in OPERATIONS.values() for name in operation.functions}
VARIANTS = {
    str(variant): variant for operation in OPERATIONS.values() for variant in operation.variants
}
