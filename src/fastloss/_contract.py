"""What a backend is: a module with the functions of `Kernels`, which get what is checked already.

Arrays are bare, C-contiguous, aligned and in native byte order:

logits, log_probs, probs, grad_output, out, grad
    ``(outer, C, inner)``; float32, float64, float16 or bfloat16.  ``out`` and ``grad`` have the
    dtype of the input and either are the input or do not overlap it.  ``out`` of logsumexp is
    ``(outer, inner)``.
labels
    See `Labels`.
losses
    ``(outer, inner)``, the compute dtype (float64 for float64 logits, otherwise float32), or None.
    Of binary losses, which every element has, ``(outer, C, inner)``.
scale
    The factor on the gradient: 1 / normalizer, or 1, or 0 where the normalizer is 0, and every
    gradient is +0 then.  Losses are never scaled.
num_threads
    At least 1.

A loss returns the float64 sum of its row losses, each first rounded to the compute dtype.  After a
MemoryError of the NumPy backend the arrays to write are undefined; the compiled ones take all their
memory before they write.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np


class Options(NamedTuple):
    """What a loss takes beside its arrays."""

    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    gamma: float = 0.0  # of focal loss
    epsilon: float = 0.0  # of Poly-1
    temperature: float = 1.0  # by which scores are divided beforehand


INDEX_OPTIONS = ("ignore_index",)  # those that say nothing to probabilities


class Labels(NamedTuple):
    """What scores are held against."""

    # (outer, inner), any integer dtype; or probabilities shaped like the scores.  Of binary losses,
    # shaped like the scores, of any dtype.  None where a loss asks for no target.
    target: Any
    weight: np.ndarray | None  # (C,), float64; of binary losses (2, C): for targets of 1, and of 0
    sample_weight: np.ndarray | None  # (outer, inner), float64

    @property
    def soft(self) -> bool:
        """Whether the target holds probabilities: of the dtype of the scores or float32/64."""
        return bool(self.target.dtype.kind not in "iu")


class TargetCheck(NamedTuple):
    bad: int  # the flat index of the first target that is out of range, or -1
    total_weight: float  # the divisor of the mean


class Map(Protocol):
    def __call__(self, logits: np.ndarray, out: np.ndarray, num_threads: int, /) -> None: ...


class Backward(Protocol):
    def __call__(
        self, grad_output: np.ndarray, forward: np.ndarray, out: np.ndarray, num_threads: int, /
    ) -> None: ...


class Loss(Protocol):
    def __call__(
        self,
        scores: np.ndarray,
        labels: Labels,
        options: Options,
        scale: float,
        losses: np.ndarray | None,
        grad: np.ndarray | None,
        num_threads: int,
        /,
    ) -> float: ...


class CheckTarget(Protocol):
    def __call__(
        self, labels: Labels, options: Options, num_classes: int, num_threads: int, /
    ) -> TargetCheck: ...


class Kernels(Protocol):
    """A backend.  ``_reference`` says in NumPy what each function computes."""

    __name__: str

    @property
    def softmax(self) -> Map: ...
    @property
    def log_softmax(self) -> Map: ...
    @property
    def logsumexp(self) -> Map: ...
    @property
    def softmax_backward(self) -> Backward: ...
    @property
    def log_softmax_backward(self) -> Backward: ...
    @property
    def check_target(self) -> CheckTarget: ...
    @property
    def cross_entropy(self) -> Loss: ...
    @property
    def nll_loss(self) -> Loss: ...
    @property
    def entropy(self) -> Loss: ...
    @property
    def binary_cross_entropy_with_logits(self) -> Loss: ...
    @property
    def sigmoid_focal_loss(self) -> Loss: ...

    def most_threads(self) -> int:
        """How many threads a call may have, however many it asks for."""

    def warmup(self) -> None:
        """Compile ahead what is compiled in the first calls."""

    def describe(self) -> Mapping[str, str]:
        """What show_config says of this backend."""
