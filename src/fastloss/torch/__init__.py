"""The kernels under PyTorch's autograd, on CPU tensors and without copies.

Functions and modules have the names, arguments and meaning of those of ``torch.nn.functional`` and
``torch.nn``, so that a training script changes by an import.  ``tests/test_torch.py`` has the table
of the differences that are meant.

Examples
--------
>>> import torch
>>> from fastloss.torch import cross_entropy
>>> logits = torch.tensor([[5.0, 4.0, 2.0]], requires_grad=True)
>>> loss = cross_entropy(logits, torch.tensor([0]))
>>> loss.backward()
>>> logits.grad
tensor([[-0.2946,  0.2595,  0.0351]])
"""

try:
    import torch as _torch  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError(
        "fastloss.torch needs PyTorch: run `pip install 'fastloss[torch]'`", name="torch"
    ) from error

from fastloss.torch.distributed import vocab_parallel_cross_entropy
from fastloss.torch.functional import (
    cross_entropy,
    linear_cross_entropy,
    log_softmax,
    nll_loss,
    softmax,
)
from fastloss.torch.modules import CrossEntropyLoss, LogSoftmax, NLLLoss, Softmax

__all__ = [
    "CrossEntropyLoss",
    "LogSoftmax",
    "NLLLoss",
    "Softmax",
    "cross_entropy",
    "linear_cross_entropy",
    "log_softmax",
    "nll_loss",
    "softmax",
    "vocab_parallel_cross_entropy",
]
