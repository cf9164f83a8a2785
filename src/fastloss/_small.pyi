"""What `_small.pyx` says to Python."""

from typing import Any

import numpy as np

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
