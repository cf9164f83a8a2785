"""The public functions: check, allocate, call the kernel, reduce."""

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fastloss import _arguments, _backend, _threads
from fastloss._contract import Backward, Loss, Map
from fastloss._operations import OPERATIONS

try:
    from fastloss import _small as _small
except ImportError:  # not built: the general way is the only one
    _small = None  # type: ignore[assignment]


def softmax(
    logits: ArrayLike,
    axis: int = -1,
    *,
    out: np.ndarray | None = None,
    backend: str | None = None,
    num_threads: int | None = None,
) -> np.ndarray:
    r"""Probabilities from scores.

    .. math:: p_c = \exp(x_c - m) / \sum_k \exp(x_k - m), \qquad m = \max_k x_k

    Parameters
    ----------
    logits : array_like of float32, float64, float16 or bfloat16, shape (..., C, ...)
        The scores x, with the classes along `axis`.  Integers are taken as float64.
    axis : int
        The class axis.
    out : ndarray, optional
        Where to write; shape and dtype of `logits`, and it may be `logits`.
    backend : {"auto", "cython", "numba", "numpy"}, optional
        See `set_backend`.
    num_threads : int, optional
        The most threads to use; small work runs on one.  See `set_num_threads`.

    Returns
    -------
    ndarray
        Shape and dtype of `logits`.  A row with a NaN, a +inf or nothing but -inf is NaN.

    Raises
    ------
    ValueError
        If a shape or an option is wrong, or there are no classes.
    TypeError
        If a dtype is wrong.
    ImportError
        If the backend that was asked for is not there.

    Notes
    -----
    The exponentials come from the range reduction of [1]_.  They are kept relative to the power
    of two nearest to that of the maximum: unlike x - m, that rounds nothing.

    References
    ----------
    .. [1] W. J. Cody, W. Waite, "Software Manual for the Elementary Functions", 1980, chapter 6.

    Examples
    --------
    >>> import fastloss as fl
    >>> fl.softmax([5, 4, 2]).round(2)
    array([0.71, 0.26, 0.04])
    """
    return _map("softmax", logits, axis, out, backend, num_threads)


def log_softmax(
    logits: ArrayLike,
    axis: int = -1,
    *,
    out: np.ndarray | None = None,
    backend: str | None = None,
    num_threads: int | None = None,
) -> np.ndarray:
    r"""Logarithms of the probabilities, exact where the probability rounds to 0 or 1.

    .. math:: l_c = (x_c - m) - \log \sum_k \exp(x_k - m), \qquad m = \max_k x_k

    Parameters, errors and method are those of `softmax`.

    Returns
    -------
    ndarray
        Shape and dtype of `logits`.

    Examples
    --------
    >>> import fastloss as fl
    >>> fl.log_softmax([5, 4, 2]).round(3)
    array([-0.349, -1.349, -3.349])
    """
    return _map("log_softmax", logits, axis, out, backend, num_threads)


def logsumexp(
    logits: ArrayLike,
    axis: int = -1,
    *,
    out: np.ndarray | None = None,
    backend: str | None = None,
    num_threads: int | None = None,
) -> np.ndarray:
    r"""The logarithm of the sum of exponentials along the class axis.

    .. math:: \mathrm{lse} = m + \log \sum_k \exp(x_k - m), \qquad m = \max_k x_k

    Parameters, errors and method are those of `softmax`, except that `out` has the shape of the
    result.

    Returns
    -------
    ndarray
        The shape of `logits` without `axis`, the dtype of `logits`.  A row of nothing but -inf is
        -inf, one with a +inf and no NaN is +inf.

    Examples
    --------
    >>> import fastloss as fl
    >>> fl.logsumexp([[5, 4, 2], [0, 0, 0]]).round(3)
    array([5.349, 1.099])
    """
    return _map("logsumexp", logits, axis, out, backend, num_threads)


def _map(
    name: str,
    logits: ArrayLike,
    axis: int,
    out: np.ndarray | None,
    backend: str | None,
    num_threads: int | None,
) -> np.ndarray:
    by_row = OPERATIONS[name].returns == "rows"
    if _small:
        answer = _small.map(name, by_row, logits, axis, out, backend, num_threads)
        if answer is not None:
            return answer
    kernels = _backend.resolve(backend)
    x = _arguments.logits(logits, axis)
    threads = _threads.threads_for(num_threads, x.array.size, kernels)
    if by_row:
        result = _arguments.output(out, x.rows, x.array.dtype, (x.normal,))
    else:
        result = _arguments.output(out, x, x.array.dtype, (), in_place=(x.normal,))
    kernel: Map = getattr(kernels, name)
    kernel(x.normal, result.normal, threads)
    return result.deliver()


def softmax_backward(
    grad_output: ArrayLike,
    probs: ArrayLike,
    axis: int = -1,
    *,
    out: np.ndarray | None = None,
    backend: str | None = None,
    num_threads: int | None = None,
) -> np.ndarray:
    r"""The vector-Jacobian product of `softmax`: from dL/dp to dL/dx.

    .. math:: dL/dx_c = p_c \, (g_c - \sum_k g_k p_k), \qquad g = dL/dp

    Parameters
    ----------
    grad_output : array_like, shape (..., C, ...)
        The gradient g with respect to the probabilities.
    probs : array_like, shape and dtype of `grad_output`
        What `softmax` returned.
    axis : int
        The class axis.
    out : ndarray, optional
        Where to write; shape and dtype of `grad_output`, and it may be either input.
    backend, num_threads : optional
        As in `softmax`.

    Returns
    -------
    ndarray
        Shape and dtype of `grad_output`.

    Raises
    ------
    ValueError, TypeError, ImportError
        As `softmax`.

    Examples
    --------
    >>> import fastloss as fl
    >>> p = fl.softmax([5, 4, 2])
    >>> fl.softmax_backward([1, 0, 0], p).round(3)
    array([ 0.208, -0.183, -0.025])
    """
    return _map_backward(
        "softmax_backward", grad_output, probs, "probs", axis, out, backend, num_threads
    )


def log_softmax_backward(
    grad_output: ArrayLike,
    log_probs: ArrayLike,
    axis: int = -1,
    *,
    out: np.ndarray | None = None,
    backend: str | None = None,
    num_threads: int | None = None,
) -> np.ndarray:
    r"""The vector-Jacobian product of `log_softmax`: from dL/dl to dL/dx.

    .. math:: dL/dx_c = g_c - \exp(l_c) \sum_k g_k, \qquad g = dL/dl

    Parameters
    ----------
    grad_output : array_like, shape (..., C, ...)
        The gradient g with respect to the log-probabilities.
    log_probs : array_like, shape and dtype of `grad_output`
        What `log_softmax` returned.
    axis, out, backend, num_threads : optional
        As in `softmax_backward`.

    Returns
    -------
    ndarray
        Shape and dtype of `grad_output`.

    Raises
    ------
    ValueError, TypeError, ImportError
        As `softmax`.

    Examples
    --------
    >>> import fastloss as fl
    >>> l = fl.log_softmax([5, 4, 2])
    >>> fl.log_softmax_backward([-1, 0, 0], l).round(2)
    array([-0.29,  0.26,  0.04])
    """
    return _map_backward(
        "log_softmax_backward", grad_output, log_probs, "log_probs", axis, out, backend, num_threads
    )


def _map_backward(
    name: str,
    grad_output: ArrayLike,
    forward: ArrayLike,
    forward_name: str,
    axis: int,
    out: np.ndarray | None,
    backend: str | None,
    num_threads: int | None,
) -> np.ndarray:
    if _small:
        answer = _small.backward(name, grad_output, forward, axis, out, backend, num_threads)
        if answer is not None:
            return answer
    kernels = _backend.resolve(backend)
    p = _arguments.logits(forward, axis, forward_name)
    g = _arguments.like_logits(grad_output, p, "grad_output", forward_name)
    threads = _threads.threads_for(num_threads, p.array.size, kernels)
    result = _arguments.output(out, p, p.array.dtype, (), in_place=(g, p.normal))
    kernel: Backward = getattr(kernels, name)
    kernel(g, p.normal, result.normal, threads)
    return result.deliver()


def nll_loss(
    log_probs: ArrayLike,
    target: ArrayLike,
    *,
    weight: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    ignore_index: int = _arguments.DEFAULT_IGNORE_INDEX,
    reduction: str = "mean",
    normalizer: float | None = None,
    axis: int = -1,
    backend: str | None = None,
    num_threads: int | None = None,
) -> float | np.ndarray:
    r"""Negative log-likelihood of the target classes, given log-probabilities.

    .. math:: L_i = -w_{y_i} s_i \, l_{i, y_i}

    with class weights w and sample weights s.

    Parameters
    ----------
    log_probs : array_like of float32, float64, float16 or bfloat16, shape (..., C, ...)
        What `log_softmax` returns.
    target : array_like of any integer dtype
        The class indices y, shaped like `log_probs` without `axis`.
    weight, sample_weight, ignore_index, reduction, normalizer, axis, backend, num_threads
        As in `cross_entropy`.

    Returns
    -------
    float or ndarray
        As `cross_entropy`.

    Raises
    ------
    IndexError, ValueError, TypeError, ImportError
        As `cross_entropy`.

    Examples
    --------
    >>> import fastloss as fl
    >>> round(fl.nll_loss(fl.log_softmax([[5, 4, 2]]), [0]), 3)
    0.349
    """
    loss, _ = _loss(
        "nll_loss", log_probs, target, weight, sample_weight, {"ignore_index": ignore_index},
        reduction, normalizer, axis, backend, num_threads, with_grad=False,
    )  # fmt: skip
    return loss


def nll_loss_with_grad(
    log_probs: ArrayLike,
    target: ArrayLike,
    *,
    weight: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    ignore_index: int = _arguments.DEFAULT_IGNORE_INDEX,
    reduction: str = "mean",
    normalizer: float | None = None,
    axis: int = -1,
    out: np.ndarray | None = None,
    backend: str | None = None,
    num_threads: int | None = None,
) -> tuple[float | np.ndarray, np.ndarray]:
    r"""`nll_loss` and its gradient with respect to the log-probabilities.

    .. math:: dL_i/dl_{i,c} = -w_{y_i} s_i \, [c = y_i]

    over the normalizer where the reduction is ``"mean"``.

    Parameters
    ----------
    out : ndarray, optional
        Where to write the gradient; shape and dtype of `log_probs`, and it may be `log_probs`.
    log_probs, target, weight, sample_weight, ignore_index, reduction, normalizer, axis, backend, \
num_threads
        As in `nll_loss`.

    Returns
    -------
    loss : float or ndarray
    grad : ndarray
        Shape and dtype of `log_probs`.

    Raises
    ------
    IndexError, ValueError, TypeError, ImportError
        As `cross_entropy`.

    Examples
    --------
    >>> import fastloss as fl
    >>> loss, grad = fl.nll_loss_with_grad(fl.log_softmax([[5, 4, 2]]), [0])
    >>> grad
    array([[-1.,  0.,  0.]])
    """
    return _loss(
        "nll_loss", log_probs, target, weight, sample_weight, {"ignore_index": ignore_index},
        reduction, normalizer, axis, backend, num_threads, with_grad=True, out=out,
    )  # fmt: skip


def cross_entropy(
    logits: ArrayLike,
    target: ArrayLike,
    *,
    weight: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    ignore_index: int = _arguments.DEFAULT_IGNORE_INDEX,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    normalizer: float | None = None,
    axis: int = -1,
    backend: str | None = None,
    num_threads: int | None = None,
) -> float | np.ndarray:
    r"""Cross-entropy of the softmax of the scores against the targets.

    With :math:`\mathrm{lse} = \log \sum_k \exp x_k`, the loss of a row of scores x with class
    index y, class weights w, sample weight s, smoothing e and z-loss z is

    .. math:: L = s \, [(1 - e) \, w_y (\mathrm{lse} - x_y)
              + (e / C) \sum_c w_c (\mathrm{lse} - x_c) + z \, \mathrm{lse}^2]

    and with probabilities t as targets, smoothed to :math:`t' = (1 - e) t + e / C`,

    .. math:: L = s \, [\sum_c w_c t'_c (\mathrm{lse} - x_c) + z \, \mathrm{lse}^2]

    Parameters
    ----------
    logits : array_like of float32, float64, float16 or bfloat16, shape (..., C, ...)
        The scores x, with the classes along `axis`.  Half types are computed in float32, integers
        are taken as float64.
    target : array_like
        Class indices of any integer dtype, shaped like `logits` without `axis`; or probabilities
        of any float dtype, shaped like `logits`.  These are taken as they are: nothing checks that
        none is negative and that they sum to 1.
    weight : array_like, shape (C,), optional
        A weight per class, finite and of either sign, or bool.
    sample_weight : array_like, shape of `logits` without `axis`, optional
        A weight per row, finite and of either sign, or bool: a mask.  With the advantages of the
        actions that are the targets, this is the loss of a policy gradient.  A row of weight 0
        counts for nothing, whatever it holds.
    ignore_index : int
        Rows with this target count for nothing, whatever they hold.  For class indices only.
    label_smoothing : float
        The share e of the target that is spread over all classes, from 0 to 1.
    z_loss : float
        The weight z of the square of lse, at least 0.
    reduction : {"mean", "sum", "none"}
        The mean divides the sum by the sum of ``weight[target] * sample_weight`` over the rows
        not ignored; with probabilities, by the sum of the sample weights, 1 each where none is
        given.  Where that sum is 0 the mean is NaN, and its gradient 0.
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
        A float, summed in float64; with ``reduction="none"`` the losses, shaped like `logits`
        without `axis`, float64 for float64 logits and float32 otherwise.

    Raises
    ------
    IndexError
        If a target is out of range and not `ignore_index`.
    ValueError
        If a shape or an option is wrong.
    TypeError
        If a dtype is wrong.
    ImportError
        If the backend that was asked for is not there.

    Notes
    -----
    The sum of exponentials leaves the target out and the logarithm is that of 1 + sum, so that
    the loss of a confident row is exact where ``-log(p)`` would be 0.  For smoothing see [1]_,
    for the z-loss [2]_.

    References
    ----------
    .. [1] C. Szegedy et al., "Rethinking the Inception architecture for computer vision", 2016.
    .. [2] A. Chowdhery et al., "PaLM: scaling language modeling with pathways", 2022.

    Examples
    --------
    >>> import fastloss as fl
    >>> round(fl.cross_entropy([[5, 4, 2]], [0]), 3)
    0.349
    """
    options = {
        "ignore_index": ignore_index, "label_smoothing": label_smoothing, "z_loss": z_loss,
    }  # fmt: skip
    loss, _ = _loss(
        "cross_entropy", logits, target, weight, sample_weight, options, reduction, normalizer,
        axis, backend, num_threads, with_grad=False,
    )  # fmt: skip
    return loss


def cross_entropy_with_grad(
    logits: ArrayLike,
    target: ArrayLike,
    *,
    weight: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    ignore_index: int = _arguments.DEFAULT_IGNORE_INDEX,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    normalizer: float | None = None,
    axis: int = -1,
    out: np.ndarray | None = None,
    backend: str | None = None,
    num_threads: int | None = None,
) -> tuple[float | np.ndarray, np.ndarray]:
    r"""`cross_entropy` and its gradient with respect to the scores, in one pass.

    For a row of scores with probabilities p,

    .. math:: dL/dx_c = p_c - [c = y]

    and with the options of `cross_entropy`

    .. math:: dL/dx_c = s \, (a \, p_c - b \, [c = y] - (e / C) \, w_c), \quad
              b = (1 - e) \, w_y, \quad a = b + (e / C) \sum_k w_k + 2 z \, \mathrm{lse}

    over the normalizer where the reduction is ``"mean"``; with ``"none"`` it is the gradient of
    the sum.  For probabilities t' as targets, with :math:`A = \sum_k w_k t'_k + 2 z\,\mathrm{lse}`,
    it is :math:`s \, (A \, p_c - w_c t'_c)`.

    Parameters
    ----------
    out : ndarray, optional
        Where to write the gradient; shape and dtype of `logits`, and it may be `logits`.
        Nothing is written when an error is raised.
    logits, target, weight, sample_weight, ignore_index, label_smoothing, z_loss, reduction, \
normalizer, axis, backend, num_threads
        As in `cross_entropy`.

    Returns
    -------
    loss : float or ndarray
        As `cross_entropy`.
    grad : ndarray
        Shape and dtype of `logits`.  At the target it is minus the sum of the other
        probabilities, never p - 1, and so does not vanish where the row is confident.

    Raises
    ------
    IndexError, ValueError, TypeError, ImportError
        As `cross_entropy`.

    Examples
    --------
    >>> import fastloss as fl
    >>> loss, grad = fl.cross_entropy_with_grad([[5, 4, 2]], [0])
    >>> round(loss, 3), grad.round(2)
    (0.349, array([[-0.29,  0.26,  0.04]]))
    """
    options = {
        "ignore_index": ignore_index, "label_smoothing": label_smoothing, "z_loss": z_loss,
    }  # fmt: skip
    return _loss(
        "cross_entropy", logits, target, weight, sample_weight, options, reduction, normalizer,
        axis, backend, num_threads, with_grad=True, out=out,
    )  # fmt: skip


def _loss(
    name: str,
    scores: ArrayLike,
    target: ArrayLike,
    weight: ArrayLike | None,
    sample_weight: ArrayLike | None,
    options: dict[str, Any],
    reduction: str,
    normalizer: float | None,
    axis: int,
    backend: str | None,
    num_threads: int | None,
    *,
    with_grad: bool,
    out: np.ndarray | None = None,
) -> tuple[float | np.ndarray, Any]:
    """What the losses share: check, find the divisor, allocate, call the kernel, reduce."""
    operation = OPERATIONS[name]
    if _small:
        answer = _small.loss(
            operation.kernel, scores, target, weight, sample_weight, options, reduction,
            normalizer, axis, backend, num_threads, with_grad, out,
        )  # fmt: skip
        if answer is not None:
            return answer
    checked = _arguments.options(**options)
    kernels = _backend.resolve(backend)
    kernel: Loss = getattr(kernels, operation.kernel)
    x = _arguments.logits(scores, axis, operation.scores)
    threads = _threads.threads_for(num_threads, x.array.size, kernels)
    reduced = _arguments.reduction(reduction, normalizer)
    labels, total_weight = _arguments.labels(
        kernels, x, target, weight, sample_weight, checked, threads, probabilities=operation.soft
    )
    divisor = reduced.divisor(total_weight)
    grad = losses = None
    if with_grad:
        grad = _arguments.output(out, x, x.array.dtype, labels, in_place=(x.normal,))
    if reduction == "none":
        losses = _arguments.output(None, x.rows, x.compute_dtype, ())
    total = kernel(
        x.normal, labels, checked, 1.0 / divisor if divisor else 0.0, losses and losses.normal,
        grad and grad.normal, threads,
    )  # fmt: skip
    loss: float | np.ndarray
    if losses is not None:
        loss = losses.deliver()
    else:
        loss = total / divisor if divisor else math.nan
    return loss, grad and grad.deliver()
