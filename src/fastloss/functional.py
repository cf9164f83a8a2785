"""Softmax and its relatives: check, allocate, call the kernel."""

import numpy as np
from numpy.typing import ArrayLike

from fastloss import _arguments, _backend, _threads
from fastloss._contract import Backward, Map
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
