"""What `_small.pyx` says to Python."""

from typing import Any

import numpy as np

from fastloss._arguments import Linear
from fastloss._contract import Labels, Options

def map(
    name: str,
    by_row: bool,
    logits: Any,
    axis: Any,
    out: Any,
    backend: Any,
    num_threads: Any,
    /,
) -> np.ndarray | None: ...
def backward(
    name: str,
    grad_output: Any,
    forward: Any,
    axis: Any,
    out: Any,
    backend: Any,
    num_threads: Any,
    /,
) -> np.ndarray | None: ...
def loss(
    name: str,
    scores: Any,
    target: Any,
    weight: Any,
    sample_weight: Any,
    options: dict[str, Any],
    reduction: Any,
    normalizer: Any,
    axis: Any,
    backend: Any,
    num_threads: Any,
    with_grad: bool,
    out: Any,
    /,
) -> tuple[float, np.ndarray | None] | None: ...
def linear(
    inputs: Any,
    linear_weight: Any,
    bias: Any,
    target: Any,
    weight: Any,
    sample_weight: Any,
    options: Options,
    /,
) -> tuple[Linear, Labels, float] | None: ...
def gradients(
    out: Any, layer: Linear, labels: Labels, wanted: tuple[bool, bool, bool], /
) -> list[np.ndarray | None] | None: ...
