"""What scores say of themselves, and of one another: check, call the kernel, reduce."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fastloss import _arguments, _backend, _threads
from fastloss._calls import call_loss
from fastloss._contract import Loss


def entropy(
    logits: ArrayLike,
    axis: int = -1,
    *,
    temperature: float = 1.0,
    sample_weight: ArrayLike | None = None,
    reduction: str = "none",
    normalizer: float | None = None,
    backend: str | None = None,
    num_threads: int | None = None,
) -> float | np.ndarray:
    r"""The entropy of the softmax of the scores, in nats.

    With the probabilities p of a row and its sample weight s,

    .. math:: H = -s \sum_c p_c \log p_c

    Parameters
    ----------
    logits : array_like of float32, float64, float16 or bfloat16, shape (..., C, ...)
        The scores, with the classes along `axis`.
    axis : int
        The class axis.
    temperature : float
        What all scores are divided by beforehand, from 1e-4 to 1e4.
    sample_weight : array_like, shape of `logits` without `axis`, optional
        A weight per row, finite and of either sign, or bool: a mask.  A row of weight 0 counts for
        nothing, whatever it holds.
    reduction : {"none", "mean", "sum"}
        The mean divides the sum by the number of rows, or the sum of their sample weights.  Where
        that is 0 the mean is NaN, and its gradient 0.
    normalizer : float, optional
        Replaces that divisor of the mean.
    backend : {"auto", "cython", "numba", "numpy"}, optional
        See `set_backend`.
    num_threads : int, optional
        The most threads to use; small work runs on one.  See `set_num_threads`.

    Returns
    -------
    ndarray or float
        The entropies, shaped like `logits` without `axis`, float64 for float64 logits and float32
        otherwise; unless ``reduction="none"``, a float, summed in float64.

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
    It is the logarithm of the sum of exponentials relative to the maximum, and the mean distance
    from the maximum: neither has a negative term, so that the entropy of a confident row is exact,
    however small.  For its use see [1]_.

    References
    ----------
    .. [1] V. Mnih et al., "Asynchronous methods for deep reinforcement learning", 2016.

    Examples
    --------
    >>> import fastloss as fl
    >>> fl.entropy([[5, 4, 2], [0, 0, 0]]).round(3)
    array([0.714, 1.099])
    """
    losses, _ = _entropy(
        logits, axis, temperature, sample_weight, reduction, normalizer, backend, num_threads,
        with_grad=False, out=None,
    )  # fmt: skip
    return losses


def entropy_with_grad(
    logits: ArrayLike,
    axis: int = -1,
    *,
    temperature: float = 1.0,
    sample_weight: ArrayLike | None = None,
    reduction: str = "none",
    normalizer: float | None = None,
    out: np.ndarray | None = None,
    backend: str | None = None,
    num_threads: int | None = None,
) -> tuple[float | np.ndarray, np.ndarray]:
    r"""`entropy` and its gradient with respect to the scores, in one pass.

    .. math:: dH/dx_c = -s \, p_c \, (\log p_c - \sum_k p_k \log p_k) \, / \, T

    over the normalizer where the reduction is ``"mean"``; with ``"none"`` it is the gradient of
    the sum.

    Parameters
    ----------
    out : ndarray, optional
        Where to write the gradient; shape and dtype of `logits`, and it may be `logits`.
    logits, axis, temperature, sample_weight, reduction, normalizer, backend, num_threads
        As in `entropy`.

    Returns
    -------
    entropies : ndarray or float
        As `entropy`.
    grad : ndarray
        Shape and dtype of `logits`.

    Raises
    ------
    ValueError, TypeError, ImportError
        As `entropy`.

    Examples
    --------
    >>> import fastloss as fl
    >>> entropies, grad = fl.entropy_with_grad([[5, 4, 2]])
    >>> grad.round(3)
    array([[-0.257,  0.165,  0.093]])
    """
    return _entropy(
        logits, axis, temperature, sample_weight, reduction, normalizer, backend, num_threads,
        with_grad=True, out=out,
    )  # fmt: skip


def _entropy(
    logits: ArrayLike,
    axis: int,
    temperature: float,
    sample_weight: ArrayLike | None,
    reduction: str,
    normalizer: float | None,
    backend: str | None,
    num_threads: int | None,
    *,
    with_grad: bool,
    out: np.ndarray | None,
) -> tuple[float | np.ndarray, Any]:
    options = _arguments.options(_arguments.DEFAULT_IGNORE_INDEX, temperature=temperature)
    kernels = _backend.resolve(backend)
    kernel: Loss = kernels.entropy
    x = _arguments.logits(logits, axis)
    threads = _threads.threads_for(num_threads, x.array.size, kernels)
    reduced = _arguments.reduction(reduction, normalizer)
    labels, total_weight = _arguments.row_labels(x, sample_weight)
    return call_loss(
        kernel, x, labels, total_weight, options, reduced, threads, each=x.rows,
        with_grad=with_grad, out=out,
    )  # fmt: skip
