"""The losses of classes: check, find the divisor of the mean, call the kernel."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fastloss import _arguments, _backend, _threads, functional
from fastloss._calls import call_loss
from fastloss._contract import Loss
from fastloss._operations import OPERATIONS


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
    temperature: float = 1.0,
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
    temperature : float
        What all scores are divided by beforehand, from 1e-4 to 1e4.  That takes no time, and rounds
        no score.
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
        "temperature": temperature,
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
    temperature: float = 1.0,
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

    over the normalizer where the reduction is ``"mean"``, and over the temperature; with ``"none"``
    it is the gradient of the sum.  For probabilities t' as targets, with
    :math:`A = \sum_k w_k t'_k + 2 z\,\mathrm{lse}`, it is :math:`s \, (A \, p_c - w_c t'_c)`.

    Parameters
    ----------
    out : ndarray, optional
        Where to write the gradient; shape and dtype of `logits`, and it may be `logits`.
        Nothing is written when an error is raised.
    logits, target, weight, sample_weight, ignore_index, label_smoothing, z_loss, temperature, \
reduction, normalizer, axis, backend, num_threads
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
        "temperature": temperature,
    }  # fmt: skip
    return _loss(
        "cross_entropy", logits, target, weight, sample_weight, options, reduction, normalizer,
        axis, backend, num_threads, with_grad=True, out=out,
    )  # fmt: skip


def focal_loss(
    logits: ArrayLike,
    target: ArrayLike,
    *,
    gamma: float = 2.0,
    weight: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    ignore_index: int = _arguments.DEFAULT_IGNORE_INDEX,
    reduction: str = "mean",
    normalizer: float | None = None,
    axis: int = -1,
    backend: str | None = None,
    num_threads: int | None = None,
) -> float | np.ndarray:
    r"""Cross-entropy that makes little of what is classified well already.

    With the target's probability p, class weights w and sample weight s, the loss of a row is

    .. math:: L = -s \, w_y \, (1 - p)^\gamma \log p

    Parameters
    ----------
    logits : array_like of float32, float64, float16 or bfloat16, shape (..., C, ...)
        The scores, with the classes along `axis`.
    target : array_like of any integer dtype
        The class indices y, shaped like `logits` without `axis`.
    gamma : float
        How much less a confident row counts, at least 0, where it is `cross_entropy`.
    weight, sample_weight, ignore_index, reduction, normalizer, axis, backend, num_threads
        As in `cross_entropy`: the divisor of the mean does not depend on `gamma`.

    Returns
    -------
    float or ndarray
        As `cross_entropy`.

    Raises
    ------
    IndexError, ValueError, TypeError, ImportError
        As `cross_entropy`.

    Notes
    -----
    The loss is that of [1]_, over all classes.  1 - p is summed from the other classes, and so
    does not vanish where the row is confident.

    References
    ----------
    .. [1] T.-Y. Lin et al., "Focal loss for dense object detection", 2017.

    Examples
    --------
    >>> import fastloss as fl
    >>> round(fl.focal_loss([[5, 4, 2]], [0]), 3)
    0.03
    """
    loss, _ = _loss(
        "focal_loss", logits, target, weight, sample_weight,
        {"ignore_index": ignore_index, "gamma": gamma},
        reduction, normalizer, axis, backend, num_threads, with_grad=False,
    )  # fmt: skip
    return loss


def focal_loss_with_grad(
    logits: ArrayLike,
    target: ArrayLike,
    *,
    gamma: float = 2.0,
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
    r"""`focal_loss` and its gradient with respect to the scores, in one pass.

    With the probabilities p of the classes and q = 1 - p_y,

    .. math:: dL/dx_c = s \, w_y \, a \, (p_c - [c = y]), \quad
              a = q^\gamma - \gamma \, p_y \, q^{\gamma - 1} \log p_y

    over the normalizer where the reduction is ``"mean"``.

    Parameters
    ----------
    out : ndarray, optional
        Where to write the gradient; shape and dtype of `logits`, and it may be `logits`.
    logits, target, gamma, weight, sample_weight, ignore_index, reduction, normalizer, axis, \
backend, num_threads
        As in `focal_loss`.

    Returns
    -------
    loss : float or ndarray
    grad : ndarray
        Shape and dtype of `logits`.

    Raises
    ------
    IndexError, ValueError, TypeError, ImportError
        As `cross_entropy`.

    Examples
    --------
    >>> import fastloss as fl
    >>> loss, grad = fl.focal_loss_with_grad([[5, 4, 2]], [0])
    >>> grad.round(3)
    array([[-0.068,  0.06 ,  0.008]])
    """
    return _loss(
        "focal_loss", logits, target, weight, sample_weight,
        {"ignore_index": ignore_index, "gamma": gamma},
        reduction, normalizer, axis, backend, num_threads, with_grad=True, out=out,
    )  # fmt: skip


def poly_loss(
    logits: ArrayLike,
    target: ArrayLike,
    *,
    epsilon: float = 2.0,
    weight: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    ignore_index: int = _arguments.DEFAULT_IGNORE_INDEX,
    reduction: str = "mean",
    normalizer: float | None = None,
    axis: int = -1,
    backend: str | None = None,
    num_threads: int | None = None,
) -> float | np.ndarray:
    r"""Cross-entropy with another weight on the first term of its series in 1 - p: Poly-1.

    With the target's probability p, class weights w and sample weight s, the loss of a row is

    .. math:: L = s \, w_y \, [-\log p + \epsilon \, (1 - p)]

    Parameters
    ----------
    logits : array_like of float32, float64, float16 or bfloat16, shape (..., C, ...)
        The scores, with the classes along `axis`.
    target : array_like of any integer dtype
        The class indices y, shaped like `logits` without `axis`.
    epsilon : float
        Finite and of either sign; at 0 it is `cross_entropy`.
    weight, sample_weight, ignore_index, reduction, normalizer, axis, backend, num_threads
        As in `cross_entropy`: the divisor of the mean does not depend on `epsilon`.

    Returns
    -------
    float or ndarray
        As `cross_entropy`.

    Raises
    ------
    IndexError, ValueError, TypeError, ImportError
        As `cross_entropy`.

    Notes
    -----
    The loss is Poly-1 of [1]_.  1 - p is summed from the other classes.

    References
    ----------
    .. [1] Z. Leng et al., "PolyLoss: a polynomial expansion perspective of classification loss
       functions", 2022.

    Examples
    --------
    >>> import fastloss as fl
    >>> round(fl.poly_loss([[5, 4, 2]], [0]), 3)
    0.938
    """
    loss, _ = _loss(
        "poly_loss", logits, target, weight, sample_weight,
        {"ignore_index": ignore_index, "epsilon": epsilon},
        reduction, normalizer, axis, backend, num_threads, with_grad=False,
    )  # fmt: skip
    return loss


def poly_loss_with_grad(
    logits: ArrayLike,
    target: ArrayLike,
    *,
    epsilon: float = 2.0,
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
    r"""`poly_loss` and its gradient with respect to the scores, in one pass.

    .. math:: dL/dx_c = s \, w_y \, (1 + \epsilon \, p_y) \, (p_c - [c = y])

    over the normalizer where the reduction is ``"mean"``.

    Parameters
    ----------
    out : ndarray, optional
        Where to write the gradient; shape and dtype of `logits`, and it may be `logits`.
    logits, target, epsilon, weight, sample_weight, ignore_index, reduction, normalizer, axis, \
backend, num_threads
        As in `poly_loss`.

    Returns
    -------
    loss : float or ndarray
    grad : ndarray
        Shape and dtype of `logits`.

    Raises
    ------
    IndexError, ValueError, TypeError, ImportError
        As `cross_entropy`.

    Examples
    --------
    >>> import fastloss as fl
    >>> loss, grad = fl.poly_loss_with_grad([[5, 4, 2]], [0])
    >>> grad.round(2)
    array([[-0.71,  0.63,  0.08]])
    """
    return _loss(
        "poly_loss", logits, target, weight, sample_weight,
        {"ignore_index": ignore_index, "epsilon": epsilon},
        reduction, normalizer, axis, backend, num_threads, with_grad=True, out=out,
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
    """What the losses share: check, find the divisor of the mean, call the kernel."""
    operation = OPERATIONS[name]
    if functional._small:
        answer = functional._small.loss(
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
    return call_loss(
        kernel, x, labels, total_weight, checked, reduced, threads, each=x.rows,
        with_grad=with_grad, out=out,
    )  # fmt: skip
