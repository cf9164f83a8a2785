"""From checked arguments of a loss to its results: allocate, call the kernel, reduce."""

import math
from typing import Any

import numpy as np

from fastloss import _arguments
from fastloss._contract import Labels, Loss, Options


def call_loss(
    kernel: Loss,
    x: _arguments.Logits,
    labels: Labels,
    total_weight: float,
    options: Options,
    reduced: _arguments.Reduction,
    threads: int,
    *,
    each: _arguments.Logits | _arguments.Rows,
    with_grad: bool,
    out: np.ndarray | None,
) -> tuple[float | np.ndarray, Any]:
    """The loss and its gradient, if that is wanted; `each` is the shape of what has a loss."""
    divisor = reduced.divisor(total_weight)
    grad = losses = None
    if with_grad:
        grad = _arguments.output(out, x, x.array.dtype, labels, in_place=(x.normal,))
    if reduced.name == "none":
        losses = _arguments.output(None, each, x.compute_dtype, ())
    total = kernel(
        x.normal, labels, options, 1.0 / divisor if divisor else 0.0, losses and losses.normal,
        grad and grad.normal, threads,
    )  # fmt: skip
    loss: float | np.ndarray
    if losses is not None:
        loss = losses.deliver()
    else:
        loss = total / divisor if divisor else math.nan
    return loss, grad and grad.deliver()
