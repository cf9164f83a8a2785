"""Modules with the names, the arguments and the state of those in ``torch.nn``."""

from typing import Any

import torch
from torch import Tensor

from fastloss import _arguments
from fastloss.torch import functional as F


class Softmax(torch.nn.Softmax):
    """`softmax` as a module.

    Parameters
    ----------
    dim : int
        The class dimension.
    backend, fallback : optional
        As in `softmax`.

    Examples
    --------
    >>> import torch
    >>> from fastloss.torch import Softmax
    >>> Softmax(dim=0)(torch.tensor([5.0, 4.0, 2.0]))
    tensor([0.7054, 0.2595, 0.0351])
    """

    def __init__(
        self, dim: int | None = None, *, backend: str | None = None, fallback: bool = False
    ) -> None:
        super().__init__(dim)
        self.backend, self.fallback = backend, fallback

    def forward(self, input: Tensor) -> Tensor:
        return F.softmax(input, self.dim, backend=self.backend, fallback=self.fallback)

    def extra_repr(self) -> str:
        return super().extra_repr() + _shown(backend=self.backend, fallback=self.fallback)


class LogSoftmax(torch.nn.LogSoftmax):
    """`log_softmax` as a module.

    Parameters
    ----------
    dim : int
        The class dimension.
    backend, fallback : optional
        As in `log_softmax`.

    Examples
    --------
    >>> import torch
    >>> from fastloss.torch import LogSoftmax
    >>> LogSoftmax(dim=0)(torch.tensor([5.0, 4.0, 2.0]))
    tensor([-0.3490, -1.3490, -3.3490])
    """

    def __init__(
        self, dim: int | None = None, *, backend: str | None = None, fallback: bool = False
    ) -> None:
        super().__init__(dim)
        self.backend, self.fallback = backend, fallback

    def forward(self, input: Tensor) -> Tensor:
        return F.log_softmax(input, self.dim, backend=self.backend, fallback=self.fallback)

    def extra_repr(self) -> str:
        return super().extra_repr() + _shown(backend=self.backend, fallback=self.fallback)


class NLLLoss(torch.nn.NLLLoss):
    """`nll_loss` as a module; `weight` is a buffer, as in PyTorch.

    Parameters
    ----------
    weight, size_average, ignore_index, reduce, reduction, normalizer, backend, fallback
        As in `nll_loss`.

    Examples
    --------
    >>> import torch
    >>> from fastloss.torch import LogSoftmax, NLLLoss
    >>> log_probs = LogSoftmax(dim=1)(torch.tensor([[5.0, 4.0, 2.0]]))
    >>> NLLLoss()(log_probs, torch.tensor([0]))
    tensor(0.3490)
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: None = None,
        ignore_index: int = _arguments.DEFAULT_IGNORE_INDEX,
        reduce: None = None,
        reduction: str = "mean",
        *,
        normalizer: float | Tensor | None = None,
        backend: str | None = None,
        fallback: bool = False,
    ) -> None:
        F.refuse_legacy(size_average, reduce)
        super().__init__(weight, ignore_index=ignore_index, reduction=reduction)
        self.normalizer, self.backend, self.fallback = normalizer, backend, fallback

    def forward(self, input: Tensor, target: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        return F.nll_loss(
            input, target, self.weight, ignore_index=self.ignore_index, reduction=self.reduction,
            sample_weight=sample_weight, normalizer=self.normalizer, backend=self.backend,
            fallback=self.fallback,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return _shown(
            ignore_index=self.ignore_index, reduction=self.reduction, normalizer=self.normalizer,
            backend=self.backend, fallback=self.fallback,
        ).removeprefix(", ")  # fmt: skip


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """`cross_entropy` as a module; `weight` is a buffer, as in PyTorch.

    Parameters
    ----------
    weight, size_average, ignore_index, reduce, reduction, label_smoothing, z_loss, normalizer, \
backend, inplace, fallback
        As in `cross_entropy`.

    Examples
    --------
    >>> import torch
    >>> from fastloss.torch import CrossEntropyLoss
    >>> criterion = CrossEntropyLoss(label_smoothing=0.1)
    >>> criterion(torch.tensor([[5.0, 4.0, 2.0]]), torch.tensor([0]))
    tensor(0.4823)
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: None = None,
        ignore_index: int = _arguments.DEFAULT_IGNORE_INDEX,
        reduce: None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        z_loss: float = 0.0,
        normalizer: float | Tensor | None = None,
        backend: str | None = None,
        inplace: bool = False,
        fallback: bool = False,
    ) -> None:
        F.refuse_legacy(size_average, reduce)
        super().__init__(
            weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
        )
        self.z_loss, self.normalizer = z_loss, normalizer
        self.backend, self.inplace, self.fallback = backend, inplace, fallback

    def forward(self, input: Tensor, target: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        return F.cross_entropy(
            input, target, self.weight, ignore_index=self.ignore_index, reduction=self.reduction,
            label_smoothing=self.label_smoothing, z_loss=self.z_loss, sample_weight=sample_weight,
            normalizer=self.normalizer, backend=self.backend, inplace=self.inplace,
            fallback=self.fallback,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return _shown(
            ignore_index=self.ignore_index, reduction=self.reduction,
            label_smoothing=self.label_smoothing, z_loss=self.z_loss, normalizer=self.normalizer,
            backend=self.backend, inplace=self.inplace, fallback=self.fallback,
        ).removeprefix(", ")  # fmt: skip


_DEFAULTS = {"ignore_index": _arguments.DEFAULT_IGNORE_INDEX, "reduction": "mean"}


def _shown(**options: Any) -> str:
    """The options that are not the default."""
    changed = {k: v for k, v in options.items() if v and v != _DEFAULTS.get(k)}
    return "".join(f", {name}={value!r}" for name, value in changed.items())
