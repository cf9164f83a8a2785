"""Softmax, negative log-likelihood, cross-entropy and their gradients at the speed of memory."""

from typing import Any

from fastloss._backend import (
    available_backends,
    get_backend,
    set_backend,
    show_config,
    warmup,
)
from fastloss._threads import get_num_threads, set_num_threads
from fastloss.binary import (
    binary_cross_entropy_with_logits,
    binary_cross_entropy_with_logits_with_grad,
    sigmoid_focal_loss,
    sigmoid_focal_loss_with_grad,
)
from fastloss.distributions import entropy, entropy_with_grad
from fastloss.functional import (
    log_softmax,
    log_softmax_backward,
    logsumexp,
    softmax,
    softmax_backward,
)
from fastloss.linear import (
    LinearGradients,
    l2_penalty,
    linear_cross_entropy,
    linear_cross_entropy_with_grad,
)
from fastloss.losses import (
    cross_entropy,
    cross_entropy_with_grad,
    focal_loss,
    focal_loss_with_grad,
    nll_loss,
    nll_loss_with_grad,
    poly_loss,
    poly_loss_with_grad,
)

__all__ = [
    "LinearGradients",
    "available_backends",
    "binary_cross_entropy_with_logits",
    "binary_cross_entropy_with_logits_with_grad",
    "cross_entropy",
    "cross_entropy_with_grad",
    "entropy",
    "entropy_with_grad",
    "focal_loss",
    "focal_loss_with_grad",
    "get_backend",
    "get_num_threads",
    "l2_penalty",
    "linear_cross_entropy",
    "linear_cross_entropy_with_grad",
    "log_softmax",
    "log_softmax_backward",
    "logsumexp",
    "nll_loss",
    "nll_loss_with_grad",
    "poly_loss",
    "poly_loss_with_grad",
    "set_backend",
    "set_num_threads",
    "show_config",
    "sigmoid_focal_loss",
    "sigmoid_focal_loss_with_grad",
    "softmax",
    "softmax_backward",
    "warmup",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":  # set in meson.build; to look it up takes a while
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("fastloss")
        except PackageNotFoundError:  # a copy that nobody installed
            return "unknown"
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
