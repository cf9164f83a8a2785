"""Binary losses, element by element: check, find the divisor of the mean, call the kernel."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fastloss import _arguments, _backend, _threads
from fastloss._calls import call_loss
from fastloss._contract import Loss


def binary_cross_entropy_with_logits(
    logits: ArrayLike,
    target: ArrayLike,
    *,
    pos_weight: ArrayLike | None = None,
    weight: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    normalizer: float | None = None,
    axis: int = -1,
    backend: str | None = None,
    num_threads: int | None = None,
) -> float | np.ndarray:
    r"""Cross-entropy of the sigmoid of every score against a target of its own.

    With :math:`\mathrm{softplus}(x) = \log(1 + e^x)`, the loss of a score x with target t,
    weight w of its class, positive weight v and sample weight s is

    .. math:: L = s \, w \, [v \, t \; \mathrm{softplus}(-x) + (1 - t) \; \mathrm{softplus}(x)]

    where smoothing e first replaces t by :math:`(1 - e) t + e / 2`.

    Parameters
    ----------
    logits : array_like of float32, float64, float16 or bfloat16, shape (..., C, ...)
        The scores x, with the classes (labels that do not exclude each other) along `axis`.  Half
        types are computed in float32, integers are taken as float64.
    target : array_like of bool, integers or floats, shape of `logits`
        1 where the class is there, 0 where it is not, or the probability that it is.  Targets are
        taken as they are: nothing checks that they lie between 0 and 1.
    pos_weight : float or array_like, shape (C,), optional
        What targets of 1 count, over those of 0; finite and of either sign.
    weight : float or array_like, shape (C,), optional
        A weight per class, finite and of either sign, or bool.
    sample_weight : array_like, shape of `logits` without `axis`, optional
        A weight per row, finite and of either sign, or bool: a mask.  What has a weight of 0
        counts for nothing, whatever it holds.
    label_smoothing : float
        The share e of the target that is spread over both answers, from 0 to 1.
    reduction : {"mean", "sum", "none"}
        The mean is that over the elements: it divides the sum by C times the number of rows, or
        C times the sum of their sample weights where there are any.  Class weights are no part of
        the divisor.  Where it is 0 the mean is NaN, and its gradient 0.
    normalizer : float, optional
        Replaces that divisor of the mean.
    axis : int
        The class axis.
    backend : {"auto", "cython", "numba", "numpy"}, optional
        See `set_backend`.
    num_threads : int, optional
        The most threads to use; small work runs on one.  See `set_num_threads`.

    Returns
    -------
    float or ndarray
        A float, summed in float64; with ``reduction="none"`` the losses, shaped like `logits`,
        float64 for float64 logits and float32 otherwise.

    Raises
    ------
    ValueError
        If a shape or an option is wrong.
    TypeError
        If a dtype is wrong.
    ImportError
        If the backend that was asked for is not there.

    Notes
    -----
    Both softplus come from the exponential of -|x| and the logarithm of 1 + that, as in [1]_, so
    that nothing overflows and the loss of a confident element is exact, however small.

    References
    ----------
    .. [1] M. Maechler, "Accurately computing log(1 - exp(-|a|))", 2012.

    Examples
    --------
    >>> import fastloss as fl
    >>> round(fl.binary_cross_entropy_with_logits([[5, -4]], [[1, 0]]), 4)
    0.0124
    """
    loss, _ = _binary_cross_entropy(
        logits, target, pos_weight, weight, sample_weight, label_smoothing, reduction, normalizer,
        axis, backend, num_threads, False, None,
    )  # fmt: skip
    return loss


def binary_cross_entropy_with_logits_with_grad(
    logits: ArrayLike,
    target: ArrayLike,
    *,
    pos_weight: ArrayLike | None = None,
    weight: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    normalizer: float | None = None,
    axis: int = -1,
    out: np.ndarray | None = None,
    backend: str | None = None,
    num_threads: int | None = None,
) -> tuple[float | np.ndarray, np.ndarray]:
    r"""`binary_cross_entropy_with_logits` and its gradient with respect to the scores.

    With the sigmoid :math:`\sigma(x)`,

    .. math:: dL/dx = s \, w \, [(1 - t) \, \sigma(x) - v \, t \, \sigma(-x)]

    over the normalizer where the reduction is ``"mean"``; with ``"none"`` it is the gradient of
    the sum.

    Parameters
    ----------
    out : ndarray, optional
        Where to write the gradient; shape and dtype of `logits`, and it may be `logits`.
        Nothing is written when an error is raised.
    logits, target, pos_weight, weight, sample_weight, label_smoothing, reduction, normalizer, \
axis, backend, num_threads
        As in `binary_cross_entropy_with_logits`.

    Returns
    -------
    loss : float or ndarray
        As `binary_cross_entropy_with_logits`.
    grad : ndarray
        Shape and dtype of `logits`.

    Raises
    ------
    ValueError, TypeError, ImportError
        As `binary_cross_entropy_with_logits`.

    Examples
    --------
    >>> import fastloss as fl
    >>> loss, grad = fl.binary_cross_entropy_with_logits_with_grad([[5, -4]], [[1, 0]])
    >>> grad.round(4)
    array([[-0.0033,  0.009 ]])
    """
    return _binary_cross_entropy(
        logits, target, pos_weight, weight, sample_weight, label_smoothing, reduction, normalizer,
        axis, backend, num_threads, True, out,
    )  # fmt: skip


def sigmoid_focal_loss(
    logits: ArrayLike,
    target: ArrayLike,
    *,
    alpha: float | None = None,
    gamma: float = 2.0,
    weight: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    reduction: str = "mean",
    normalizer: float | None = None,
    axis: int = -1,
    backend: str | None = None,
    num_threads: int | None = None,
) -> float | np.ndarray:
    r"""Binary cross-entropy that makes little of what is classified well already.

    With binary cross-entropy :math:`B = t \, \mathrm{softplus}(-x) + (1 - t) \,
    \mathrm{softplus}(x)` and the probability :math:`q = t \, \sigma(-x) + (1 - t) \, \sigma(x)`
    that the target does not have, the loss of a score x with target t is

    .. math:: L = s \, w \, [t \, \alpha + (1 - t) (1 - \alpha)] \, q^\gamma B

    Parameters
    ----------
    alpha : float, optional
        What targets of 1 count, from 0 to 1, of which those of 0 have the rest; by default both
        count 1.
    gamma : float
        How much less a confident element counts, at least 0, where it does not.
    logits, target, weight, sample_weight, reduction, normalizer, axis, backend, num_threads
        As in `binary_cross_entropy_with_logits`.

    Returns
    -------
    float or ndarray
        As `binary_cross_entropy_with_logits`.

    Raises
    ------
    ValueError, TypeError, ImportError
        As `binary_cross_entropy_with_logits`.

    Notes
    -----
    The loss is that of [1]_; for targets between 0 and 1 it is what torchvision makes of them.

    References
    ----------
    .. [1] T.-Y. Lin et al., "Focal loss for dense object detection", 2017.

    Examples
    --------
    >>> import fastloss as fl
    >>> round(fl.sigmoid_focal_loss([[1, -4]], [[1, 0]], alpha=0.25), 5)
    0.00283
    """
    loss, _ = _sigmoid_focal(
        logits, target, alpha, gamma, weight, sample_weight, reduction, normalizer, axis, backend,
        num_threads, False, None,
    )  # fmt: skip
    return loss


def sigmoid_focal_loss_with_grad(
    logits: ArrayLike,
    target: ArrayLike,
    *,
    alpha: float | None = None,
    gamma: float = 2.0,
    weight: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    reduction: str = "mean",
    normalizer: float | None = None,
    axis: int = -1,
    out: np.ndarray | None = None,
    backend: str | None = None,
    num_threads: int | None = None,
) -> tuple[float | np.ndarray, np.ndarray]:
    r"""`sigmoid_focal_loss` and its gradient with respect to the scores.

    With B, q and the factors before them as there,

    .. math:: dL/dx = s \, w \, [t \, \alpha + (1 - t) (1 - \alpha)] \, q^\gamma
              \left[\sigma(x) - t + \gamma (1 - 2 t) \, \sigma(x) \, \sigma(-x) \, B / q \right]

    over the normalizer where the reduction is ``"mean"``.

    Parameters
    ----------
    out : ndarray, optional
        Where to write the gradient; shape and dtype of `logits`, and it may be `logits`.
    logits, target, alpha, gamma, weight, sample_weight, reduction, normalizer, axis, backend, \
num_threads
        As in `sigmoid_focal_loss`.

    Returns
    -------
    loss : float or ndarray
    grad : ndarray
        Shape and dtype of `logits`.

    Raises
    ------
    ValueError, TypeError, ImportError
        As `binary_cross_entropy_with_logits`.

    Examples
    --------
    >>> import fastloss as fl
    >>> loss, grad = fl.sigmoid_focal_loss_with_grad([[1, -4]], [[1, 0]], alpha=0.25)
    >>> grad.round(4)
    array([[-0.0066,  0.    ]])
    """
    return _sigmoid_focal(
        logits, target, alpha, gamma, weight, sample_weight, reduction, normalizer, axis, backend,
        num_threads, True, out,
    )  # fmt: skip


def _binary_cross_entropy(
    logits: ArrayLike,
    target: ArrayLike,
    pos_weight: ArrayLike | None,
    weight: ArrayLike | None,
    sample_weight: ArrayLike | None,
    label_smoothing: float,
    *call: Any,
) -> tuple[float | np.ndarray, Any]:
    options = {"label_smoothing": label_smoothing}
    return _loss(
        "binary_cross_entropy_with_logits", logits, target, (pos_weight, None), weight,
        sample_weight, options, *call,
    )  # fmt: skip


def _sigmoid_focal(
    logits: ArrayLike,
    target: ArrayLike,
    alpha: float | None,
    gamma: float,
    weight: ArrayLike | None,
    sample_weight: ArrayLike | None,
    *call: Any,
) -> tuple[float | np.ndarray, Any]:
    balance: tuple[Any, Any] = (None, None)
    if alpha is not None:
        share = _arguments.share(alpha, "alpha")
        balance = share, 1.0 - share
    options = {"gamma": gamma}
    return _loss(
        "sigmoid_focal_loss", logits, target, balance, weight, sample_weight, options, *call
    )


def _loss(
    name: str,
    logits: ArrayLike,
    target: ArrayLike,
    balance: tuple[Any, Any],
    weight: ArrayLike | None,
    sample_weight: ArrayLike | None,
    options: dict[str, Any],
    reduction: str,
    normalizer: float | None,
    axis: int,
    backend: str | None,
    num_threads: int | None,
    with_grad: bool,
    out: np.ndarray | None,
) -> tuple[float | np.ndarray, Any]:
    """What they share; `balance` is what targets of 1 and of 0 count."""
    checked = _arguments.options(_arguments.DEFAULT_IGNORE_INDEX, **options)
    kernels = _backend.resolve(backend)
    kernel: Loss = getattr(kernels, name)
    x = _arguments.logits(logits, axis)
    threads = _threads.threads_for(num_threads, x.array.size, kernels)
    reduced = _arguments.reduction(reduction, normalizer)
    labels, count = _arguments.binary_labels(x, target, balance, weight, sample_weight)
    return call_loss(
        kernel, x, labels, count, checked, reduced, threads, each=x, with_grad=with_grad, out=out
    )
