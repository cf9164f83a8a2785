"""The linear head: scores X W^T + b, their cross-entropy and L2 regularization, fused.

Rows go through in chunks: the product of a chunk with W, the loss and its gradient over the scores
in place, and the products of that gradient with the chunk and with W.  The scores of all rows never
exist.  Two things are less plain than that:

- BLAS picks its code by the shape of a product, and may round a row differently among 100 rows than
  among 1000.  All products that make scores therefore have one and the same shape, that of a
  *block*; a chunk is a whole number of blocks.
- Between two products the threads of BLAS wait for work in a loop, and so would those of OpenMP
  between two kernels, each taking the processor from the other.  Here kernels run on Python
  threads, which sleep.
"""

import contextlib
import math
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from fastloss import _arguments, _backend, _threads
from fastloss.functional import check_labels

_BLOCK_BYTES = 2 << 20  # of scores: what caches hold,
_LEAST_ROWS = 512  # but no fewer rows, with which products are slow,
_MOST_BYTES = 24 << 20  # unless they take more than this
_PRODUCT_ELEMENTS = 1 << 18  # of a gradient of W, to be added while they are in cache
_POOL_COST = 32  # what starting Python threads takes, in wake-ups of OpenMP's


class LinearGradients(NamedTuple):
    """Gradients of a linear layer, or the arrays to write them to; None where there is none.

    Examples
    --------
    >>> import numpy as np
    >>> import fastloss as fl
    >>> out = fl.LinearGradients(np.zeros((3, 2)))  # three classes, two features, no bias
    >>> loss, gradients = fl.linear_cross_entropy_with_grad(
    ...     [[1.0, 2.0]], np.zeros((3, 2)), [0], out=out
    ... )
    >>> gradients.linear_weight is out.linear_weight
    True
    """

    linear_weight: Any
    linear_bias: Any = None
    inputs: Any = None


def linear_cross_entropy(
    inputs: Any,
    linear_weight: ArrayLike,
    target: ArrayLike,
    *,
    linear_bias: ArrayLike | None = None,
    l2: float = 0.0,
    weight: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    ignore_index: int = _arguments.DEFAULT_IGNORE_INDEX,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    normalizer: float | None = None,
    chunk_rows: int | None = None,
    backend: str | None = None,
    num_threads: int | None = None,
) -> float | np.ndarray:
    r"""`cross_entropy` of a linear layer's scores, which are never all in memory.

    .. math:: L = \operatorname{cross\_entropy}(X W^T + b,\; y) + l_2 \sum_{c,d} W_{c,d}^2

    Rows that count for nothing are not multiplied either.

    Parameters
    ----------
    inputs : array_like of float32 or float64, shape (..., D), or sparse (N, D)
        The features X, a row per sample.  Sparse matrices and arrays of SciPy are taken in the
        CSR format and converted to it from the others.
    linear_weight : array_like, shape (C, D), dtype of `inputs`
        The weights W, a row per class.
    target : array_like
        Class indices of any integer dtype, shaped like `inputs` without its last axis; or
        probabilities of any float dtype, shape (..., C).
    linear_bias : array_like, shape (C,), dtype of `inputs`, optional
        The bias b.
    l2 : float
        The factor on the sum of the squares of W, finite and at least 0; the bias is not
        penalised.  Not together with ``reduction="none"``, for it belongs to no single row.
    weight, sample_weight, ignore_index, label_smoothing, z_loss, reduction, normalizer
        As in `cross_entropy`.  The divisor of the mean is that of the data's part alone.
    chunk_rows : int, optional
        How many rows to take at a time, rounded up to a whole number of blocks; by default one.
        A block is 2 MiB of scores, but at least 512 rows where these are under 24 MiB.
    backend : {"auto", "cython", "numba", "numpy"}, optional
        See `set_backend`.  The products are those of NumPy, whatever it is.
    num_threads : int, optional
        The most threads to use between the products; small work runs on one.  See
        `set_num_threads`.  Products have the threads of NumPy's BLAS, which
        ``threadpoolctl.threadpool_limits`` sets.

    Returns
    -------
    float or ndarray
        A float, summed in float64; with ``reduction="none"`` the losses of the rows, shaped like
        `inputs` without its last axis, dtype of `inputs`.  NaN where the mean's divisor is 0.

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
    The loss of a row is the same to the bit whatever `chunk_rows` and `num_threads`.  It is not
    for another number of rows that count, or of BLAS threads: BLAS rounds by the shape of a
    product.

    Scores are rounded to the dtype of `inputs`, and so is the loss of each row.  Extra memory is
    about 26 MiB, whatever N, or a chunk of scores where that is larger.  Copies are made of a
    `linear_weight` where there is a bias, `inputs` are sparse or it is contiguous in neither
    order, of `inputs` whose leading axes do not merge into one, and of probabilities in another
    dtype.

    The method is that of [1]_.

    References
    ----------
    .. [1] E. Wijmans et al., "Cut your losses in large-vocabulary language models", 2025.

    Examples
    --------
    >>> import fastloss as fl
    >>> inputs, linear_weight = [[1.0, 2.0]], [[1.0, 2.0], [2.0, 1.0], [0.0, 1.0]]
    >>> round(fl.linear_cross_entropy(inputs, linear_weight, [0]), 3)  # scores 5, 4, 2
    0.349
    """
    plan = _plan(
        inputs, linear_weight, linear_bias, target, l2, weight, sample_weight, ignore_index,
        (label_smoothing, z_loss), reduction, normalizer, chunk_rows, backend, num_threads,
    )  # fmt: skip
    return _run(plan, None)


def linear_cross_entropy_with_grad(
    inputs: Any,
    linear_weight: ArrayLike,
    target: ArrayLike,
    *,
    linear_bias: ArrayLike | None = None,
    l2: float = 0.0,
    weight: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    ignore_index: int = _arguments.DEFAULT_IGNORE_INDEX,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    normalizer: float | None = None,
    inputs_grad: bool = False,
    out: LinearGradients | None = None,
    accumulate: bool = False,
    chunk_rows: int | None = None,
    backend: str | None = None,
    num_threads: int | None = None,
) -> tuple[float | np.ndarray, LinearGradients]:
    r"""`linear_cross_entropy` and its gradients.

    With the gradient G of `cross_entropy` with respect to the scores, shape (N, C),

    .. math:: dL/dW = G^T X + 2 \, l_2 W, \qquad dL/db = \sum_n G_n, \qquad dL/dX = G W

    Parameters
    ----------
    inputs_grad : bool
        Whether the gradient with respect to `inputs` is wanted, too.  Not for sparse inputs.
    out : LinearGradients, optional
        Where to write: arrays of the shapes and the dtype of the arguments, None for new ones.
        Nothing is written when an error is raised.
    accumulate : bool
        Add to the arrays of `out` in place of writing over them.  With a common `normalizer`,
        calls for parts of a batch add up to the gradient of the whole; the penalty is part of each
        call that has an `l2`.
    inputs, linear_weight, target, linear_bias, l2, weight, sample_weight, ignore_index, \
label_smoothing, z_loss, reduction, normalizer, chunk_rows, backend, num_threads
        As in `linear_cross_entropy`.

    Returns
    -------
    loss : float or ndarray
        As `linear_cross_entropy`.
    gradients : LinearGradients
        The arrays `linear_weight`, `linear_bias` (None without a bias) and `inputs` (None unless
        asked for), shaped like the arguments of these names.  Rows that count for nothing have no
        share in them, whatever they hold.

    Raises
    ------
    IndexError, ValueError, TypeError, ImportError
        As `linear_cross_entropy`.

    Examples
    --------
    >>> import fastloss as fl
    >>> inputs, linear_weight = [[1.0, 2.0]], [[1.0, 2.0], [2.0, 1.0], [0.0, 1.0]]
    >>> loss, gradients = fl.linear_cross_entropy_with_grad(inputs, linear_weight, [0])
    >>> gradients.linear_weight.round(2)
    array([[-0.29, -0.59],
           [ 0.26,  0.52],
           [ 0.04,  0.07]])
    """
    plan = _plan(
        inputs, linear_weight, linear_bias, target, l2, weight, sample_weight, ignore_index,
        (label_smoothing, z_loss), reduction, normalizer, chunk_rows, backend, num_threads,
    )  # fmt: skip
    read = (plan.target, plan.class_weight, plan.sample_weight)
    outputs = _arguments.linear_outputs(out, plan.layer, inputs_grad, accumulate, read)
    loss = _run(plan, LinearGradients(*(o and o.normal for o in outputs)), accumulate)
    return loss, LinearGradients(*(o and o.deliver() for o in outputs))


def l2_penalty(linear_weight: ArrayLike, l2: float) -> float:
    r"""The regularization part of the loss of `linear_cross_entropy`.

    .. math:: l_2 \sum_{c,d} W_{c,d}^2

    Parameters
    ----------
    linear_weight : array_like, shape (C, D)
        The weights W, of any of the four float dtypes.
    l2 : float
        The factor, finite and at least 0.

    Returns
    -------
    float
        Summed in float64.

    Raises
    ------
    ValueError
        If `linear_weight` does not have two axes, or `l2` is negative or not finite.
    TypeError
        If a dtype is wrong.

    Examples
    --------
    >>> import fastloss as fl
    >>> fl.l2_penalty([[1, 2], [2, 1]], 0.5)
    5.0
    """
    factor = _arguments.l2(l2)
    return _l2_penalty(_arguments.linear_weight(linear_weight), factor)


def _l2_penalty(linear_weight: np.ndarray, l2: float) -> float:
    if not l2:
        return 0.0
    total = 0.0
    with np.errstate(all="ignore"):
        for classes in _parts(*linear_weight.shape):
            total += float(np.square(linear_weight[classes], dtype=np.float64).sum())
    return l2 * total


class _Plan(NamedTuple):
    """A checked call: what it reads, and the way it goes about it."""

    layer: _arguments.Linear
    kernel: Callable[..., float]
    target: np.ndarray
    class_weight: np.ndarray | None
    sample_weight: np.ndarray | None
    options: tuple[Any, ...]
    l2: float
    reduction: str
    divisor: float
    kept: np.ndarray | None  # the rows that count; None: all
    num_rows: int  # how many these are
    block: int  # rows of a product
    chunk: int  # rows of a chunk, a multiple of block
    threads: int

    @property
    def scale(self) -> float:
        return 1.0 / self.divisor if self.divisor else 0.0

    def rows(self, array: Any, start: int, stop: int) -> Any:
        """A part of the rows that count."""
        return array[start:stop] if self.kept is None else array[self.kept[start:stop]]


def _plan(
    inputs: Any,
    linear_weight: ArrayLike,
    linear_bias: ArrayLike | None,
    target: ArrayLike,
    l2: float,
    weight: ArrayLike | None,
    sample_weight: ArrayLike | None,
    ignore_index: int,
    options: tuple[float, float],
    reduction: str,
    normalizer: float | None,
    chunk_rows: int | None,
    backend: str | None,
    num_threads: int | None,
) -> _Plan:
    """Check everything, find the rows that count, and cut them up."""
    kernels = _backend.resolve(backend)
    layer = _arguments.linear(inputs, linear_weight, linear_bias)
    scores = layer.scores
    divisor = _arguments.reduction(reduction, normalizer)
    penalty = _arguments.l2(l2, reduction)
    asked = _arguments.chunk_rows(chunk_rows)
    options = (_arguments.label_smoothing(options[0]), _arguments.z_loss(options[1]))
    ignored = _arguments.ignore_index(ignore_index)
    threads = _threads_for(num_threads, scores.array.size, kernels)
    (t, w, s, *rest), total_weight, soft = check_labels(
        kernels, scores, target, weight, sample_weight, ignored, options, True, 1
    )
    if divisor is None:
        divisor = total_weight if reduction == "mean" else 1.0
    if divisor:
        kept = _kept(t, w, s, None if soft else rest[0], options)
    else:
        kept = np.empty(0, np.intp)  # no row counts, not even one that holds a NaN
    count = len(t) if kept is None else len(kept)
    block, chunk = _sizes(count, scores.array.shape[-1] * scores.array.itemsize, asked)
    kernel = kernels.cross_entropy_soft if soft else kernels.cross_entropy
    return _Plan(
        layer, kernel, t, w, s, tuple(rest), penalty, reduction, divisor, kept, count, block,
        chunk, threads,
    )  # fmt: skip


def _threads_for(num_threads: int | None, elements: int, kernels: ModuleType) -> int:
    """On how many Python threads kernels run."""
    threads = min(_threads.threads_for(num_threads, elements // _POOL_COST), kernels.most_threads())
    return threads if threads == 1 or _threads.can_start(threads) else 1


def _kept(
    target: np.ndarray,
    class_weight: np.ndarray | None,
    sample_weight: np.ndarray | None,
    ignored: int | None,
    options: tuple[float, float],
) -> np.ndarray | None:
    """The rows that count for something; None for all of them."""
    counts = np.ones(len(target), bool)
    if sample_weight is not None:
        counts &= sample_weight[:, 0] != 0
    if ignored is not None:
        used = target[:, 0] != ignored
        counts &= used
        smoothing, z_loss = options  # by which a row counts whatever its target's weight
        if class_weight is not None and smoothing * class_weight.sum() == z_loss == 0:
            counts &= class_weight[np.where(used, target[:, 0], 0).astype(np.intp)] != 0
    return None if counts.all() else np.flatnonzero(counts)


def _sizes(count: int, row_bytes: int, asked: int | None) -> tuple[int, int]:
    """The rows of a block and of a chunk."""
    most = max(_BLOCK_BYTES // row_bytes, min(_LEAST_ROWS, _MOST_BYTES // row_bytes), 1)
    blocks = max(-(-count // most), 1)
    block = max(-(-count // blocks), 1)
    return block, block * min(-(-(asked or 1) // block), blocks)


def _run(
    plan: _Plan, gradients: LinearGradients | None, accumulate: bool = False
) -> float | np.ndarray:
    """The loss, and its gradients into where they go."""
    losses = np.empty((plan.num_rows, 1), plan.layer.weight.dtype)
    with np.errstate(all="ignore"), _row_kernel(plan, losses, gradients is not None) as kernel:
        if gradients is not None and not accumulate:
            _clear(plan, gradients)
        for start, x, scores in _sparse_chunks(plan) if plan.layer.sparse else _chunks(plan):
            kernel(start, scores)
            if gradients is None:
                continue
            _add_to_weight(gradients, scores, x)
            if gradients.inputs is not None:
                _add_to_inputs(plan, gradients.inputs, start, scores, accumulate)
        if gradients is not None and plan.l2:
            _add_penalty(gradients.linear_weight, plan.layer.weight, plan.l2)
    return _reduce(plan, losses)


def _chunks(plan: _Plan) -> Iterator[tuple[int, Any, np.ndarray]]:
    """Every chunk: where it starts, its inputs with a column of ones for the bias, its scores."""
    weight, inputs = _with_bias(plan.layer), plan.layer.inputs
    size = min(plan.chunk, -(-plan.num_rows // plan.block) * plan.block)
    scores = np.empty((size, len(weight)), weight.dtype)
    room = np.zeros((size, weight.shape[1]), weight.dtype)
    room[:, inputs.shape[1] :] = 1
    direct = plan.kept is None and plan.layer.bias is None and inputs.flags.c_contiguous
    for start in range(0, plan.num_rows, plan.chunk):
        num_rows = min(plan.chunk, plan.num_rows - start)
        x = plan.rows(inputs, start, start + num_rows)
        if not direct or num_rows % plan.block:
            room[:num_rows, : x.shape[1]] = x
            x = room
        for first in range(0, num_rows, plan.block):
            rows = slice(first, first + plan.block)
            np.matmul(x[rows], weight.T, out=scores[rows])
        yield start, x[:num_rows], scores[:num_rows]


def _sparse_chunks(plan: _Plan) -> Iterator[tuple[int, Any, np.ndarray]]:
    """The same for sparse inputs, a row of whose scores does not depend on others."""
    transposed = np.ascontiguousarray(_with_bias(plan.layer).T)
    for start in range(0, plan.num_rows, plan.chunk):
        x = plan.rows(plan.layer.inputs, start, min(start + plan.chunk, plan.num_rows))
        if plan.layer.bias is not None:
            ones = np.ones((x.shape[0], 1), x.dtype)
            x = sys.modules["scipy.sparse"].hstack([x, ones], format="csr")
        yield start, x, x @ transposed


def _with_bias(layer: _arguments.Linear) -> np.ndarray:
    """The weights, and the bias as one of them: a pass over the scores takes longer."""
    if layer.bias is None:
        return layer.weight
    return np.hstack([layer.weight, layer.bias[:, None]])


@contextlib.contextmanager
def _row_kernel(
    plan: _Plan, losses: np.ndarray, with_grad: bool
) -> Iterator[Callable[[int, np.ndarray], None]]:
    """What puts the losses of scores aside, and turns these into gradients."""

    def on_rows(start: int, scores: np.ndarray) -> None:
        stop = start + len(scores)
        x = scores[:, :, None]
        target = plan.rows(plan.target, start, stop)
        s = None if plan.sample_weight is None else plan.rows(plan.sample_weight, start, stop)
        plan.kernel(
            x, target, plan.class_weight, s, *plan.options, plan.scale, losses[start:stop],
            x if with_grad else None, 1,
        )  # fmt: skip

    if plan.threads == 1:
        yield on_rows
        return
    from concurrent.futures import ThreadPoolExecutor  # slow to import

    # For this call alone: a pool does not survive a fork.
    with ThreadPoolExecutor(plan.threads - 1) as pool:

        def on_threads(start: int, scores: np.ndarray) -> None:
            share = -(-len(scores) // plan.threads)
            others = [
                pool.submit(on_rows, start + first, scores[first : first + share])
                for first in range(share, len(scores), share)
            ]
            on_rows(start, scores[:share])
            for other in others:
                other.result()

        yield on_threads


def _clear(plan: _Plan, gradients: LinearGradients) -> None:
    """Zeros to add to, and where nothing will be written."""
    gradients.linear_weight.fill(0)
    if gradients.linear_bias is not None:
        gradients.linear_bias.fill(0)
    if gradients.inputs is not None and plan.kept is not None:
        gradients.inputs.fill(0)


def _add_to_weight(gradients: LinearGradients, g: np.ndarray, x: Any) -> None:
    """The share of a chunk in the gradients of weight and bias, g that of its scores."""
    total, bias = gradients.linear_weight, gradients.linear_bias
    for classes in _parts(*total.shape):
        # Of a part of the classes, which is still in cache when it is added.
        product = g[:, classes].T @ x
        total[classes] += product[:, : total.shape[1]]
        if bias is not None:
            bias[classes] += product[:, -1]


def _add_to_inputs(
    plan: _Plan, gradient: np.ndarray, start: int, g: np.ndarray, accumulate: bool
) -> None:
    """The share of a chunk in the gradient of the inputs."""
    rows = slice(start, start + len(g))
    if plan.kept is not None:
        gradient[plan.kept[rows]] += g @ plan.layer.weight
    elif accumulate:
        gradient[rows] += g @ plan.layer.weight
    else:
        np.matmul(g, plan.layer.weight, out=gradient[rows])


def _add_penalty(total: np.ndarray, linear_weight: np.ndarray, l2: float) -> None:
    for classes in _parts(*total.shape):
        total[classes] += 2 * l2 * linear_weight[classes]


def _parts(num_classes: int, num_features: int) -> Iterator[slice]:
    """Classes by and by, so that a temporary stays small and in cache."""
    step = max(_PRODUCT_ELEMENTS // max(num_features, 1), 16)
    for first in range(0, num_classes, step):
        yield slice(first, first + step)


def _reduce(plan: _Plan, losses: np.ndarray) -> float | np.ndarray:
    if plan.reduction == "none":
        result = np.zeros(len(plan.target), losses.dtype)
        result[... if plan.kept is None else plan.kept] = losses[:, 0]
        return result.reshape(plan.layer.inputs_shape[:-1])
    if not plan.divisor:
        return math.nan
    # The losses of rows, rounded like those of the kernels' own sums, in one fixed order.
    total = float(losses.sum(dtype=np.float64))
    return total / plan.divisor + _l2_penalty(plan.layer.weight, plan.l2)
