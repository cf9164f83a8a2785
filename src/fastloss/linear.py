"""The linear head: scores X W^T + b, their cross-entropy and L2 regularization, fused.

Rows go through in chunks: the product of a chunk with W, the loss and its gradient over the scores
in place, and the products of that gradient with W and with the chunk.  The scores of all rows never
exist.  Three things are less plain than that:

- A chunk is the work of one thread, its products included, and threads take chunks until none is
  left; then, or where scores would take too much memory, they help with parts of others' chunks.
  BLAS would put its own threads on each product; they wait for the next in a loop, and what lies
  between two products would have one processor less.  So BLAS is held to one thread.
- Every row of the gradient of W is a sum over the chunks.  They are added in their order, whoever
  is done first, so that its bits do not depend on the threads.
- BLAS picks its code by the shape of a product, and may round a row differently among 100 rows than
  among 1000.  All products that make scores therefore have one and the same shape, that of a
  *block*; a chunk is a whole number of blocks.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from fastloss import _arguments, _backend, _blas, _threads, functional
from fastloss._contract import Labels, Loss, Options
from fastloss._crew import Crew, on_threads

_BLOCK_BYTES = 4 << 20  # of scores: what caches hold,
_BLOCK_PRODUCTS = 1 << 23  # of numbers: what is worth a thread,
_LEAST_ROWS = 1024  # but no fewer rows, with which products are slow,
_LEAST_BLOCKS = 4  # unless there would be too little to share out
_THREAD_BYTES = 32 << 20  # or they would take more than this for each thread;
_MOST_BYTES = 64 << 20  # but where that is few rows two threads share as many,
_WORTH_ROWS = 512  # for each block reads all of W, and adds to its gradient
_PRODUCT_ELEMENTS = 1 << 20  # of W in a product, which adds to its gradient while that is in cache
_SCORE_PARTS = 8  # into which scores are shared out: each reads all inputs
_KERNEL_ELEMENTS = 1 << 20  # of scores in one call of a kernel
_COPY_COST = 8  # of a weight, in passes over a score


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


_NO_GRADIENTS = LinearGradients(None)


def _any(gradients: LinearGradients) -> bool:
    return any(array is not None for array in gradients)


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
    temperature: float = 1.0,
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
        The features X, a row per sample.  Integers are taken as float64, sparse matrices and arrays
        of SciPy in the CSR format; from the others they are converted to it.
    linear_weight : array_like, shape (C, D), dtype of `inputs`
        The weights W, a row per class.
    target : array_like
        Class indices of any integer dtype, shaped like `inputs` without its last axis; or
        probabilities of any float dtype, shape (..., C), taken as they are.
    linear_bias : array_like, shape (C,), dtype of `inputs`, optional
        The bias b.
    l2 : float
        The factor on the sum of the squares of W, finite and at least 0; the bias is not
        penalised.  Not together with ``reduction="none"``, for it belongs to no single row.
    weight, sample_weight, ignore_index, label_smoothing, z_loss, temperature, reduction, normalizer
        As in `cross_entropy`.  The divisor of the mean is that of the data's part alone.
    chunk_rows : int, optional
        How many rows to take at a time, rounded up to a whole number of blocks; by default one.
        A block is up to 4 MiB of scores, or 1024 rows where these are under 32 MiB.
    backend : {"auto", "cython", "numba", "numpy"}, optional
        See `set_backend`.  The products are those of NumPy, whatever it is.
    num_threads : int, optional
        The most threads to use, one for each chunk, of which few rows make four at the most.  See
        `set_num_threads`.  During the call NumPy's BLAS is held to one thread, for the whole
        process.  Where it is not OpenBLAS with POSIX threads, as NumPy brings it along, one thread
        takes the chunks, and BLAS has its own.

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
    The loss of a row is the same to the bit whatever `chunk_rows` and `num_threads`, and gradients
    whatever `num_threads`.  They are not for another number of rows that count: BLAS rounds by the
    shape of a product.

    Scores are rounded to the dtype of `inputs`, and so is the loss of each row.  Extra memory is
    about 36 MiB for each thread, whatever N, or a chunk of scores where that is larger, and up to
    three times as much where there are more features than classes.  Copies are made of a
    `linear_weight` where there is a bias, more classes than features and far more rows, where
    `inputs` are sparse or where it is contiguous in neither order, of `inputs` whose leading axes
    do not merge into one, and of probabilities in another dtype.

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
        inputs, linear_weight, linear_bias, target, l2, weight, sample_weight,
        _arguments.options(
            ignore_index, label_smoothing, z_loss=z_loss, temperature=temperature
        ),
        reduction, normalizer, chunk_rows, backend, num_threads,
    )  # fmt: skip
    return _run(plan, _NO_GRADIENTS)


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
    temperature: float = 1.0,
    reduction: str = "mean",
    normalizer: float | None = None,
    inputs_grad: bool = False,
    linear_weight_grad: bool = True,
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
    linear_weight_grad : bool
        Whether that with respect to `linear_weight` is.  Without it there is a product less, and
        no memory is taken for it: for weights that are frozen.
    out : LinearGradients, optional
        Where to write: arrays of the shapes and the dtype of the arguments, None for new ones.
        Nothing is written when an error is raised.
    accumulate : bool
        Add to the arrays of `out` in place of writing over them.  With a common `normalizer`,
        calls for parts of a batch add up to the gradient of the whole; the penalty is part of each
        call that has an `l2`.
    inputs, linear_weight, target, linear_bias, l2, weight, sample_weight, ignore_index, \
label_smoothing, z_loss, temperature, reduction, normalizer, chunk_rows, backend, num_threads
        As in `linear_cross_entropy`.

    Returns
    -------
    loss : float or ndarray
        As `linear_cross_entropy`.
    gradients : LinearGradients
        The arrays `linear_weight`, `linear_bias` and `inputs`, shaped like the arguments of these
        names; None where there is no bias, and where they are not asked for.  Rows that count for
        nothing have no share in them, whatever they hold.

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
        inputs, linear_weight, linear_bias, target, l2, weight, sample_weight,
        _arguments.options(
            ignore_index, label_smoothing, z_loss=z_loss, temperature=temperature
        ),
        reduction, normalizer, chunk_rows, backend, num_threads,
    )  # fmt: skip
    inputs_grad = _arguments.flag(inputs_grad, "inputs_grad")
    weight_grad = _arguments.flag(linear_weight_grad, "linear_weight_grad")
    accumulate = _arguments.flag(accumulate, "accumulate")
    if plan.plain and not accumulate:
        wanted = (weight_grad, linear_bias is not None, inputs_grad)
        if arrays := functional._small.gradients(out, plan.layer, plan.labels, wanted):
            gradients = LinearGradients(*arrays)
            return _run(plan, gradients), gradients
    outputs = _arguments.linear_outputs(
        out, plan.layer, weight_grad, inputs_grad, accumulate, plan.labels
    )
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
    kernel: Loss
    labels: Labels
    options: Options
    l2: float
    reduction: str
    divisor: float
    kept: np.ndarray | None  # the rows that count; None: all
    num_rows: int  # how many these are
    block: int  # rows of a product
    chunk: int  # rows of a chunk, a multiple of block
    parts: list[slice]  # of the classes, which go into gradients one by one
    wide_parts: list[slice]  # whose scores are one product
    threads: int
    plain: bool  # whether arrays are, and were checked in compiled code

    @property
    def owners(self) -> int:
        """How many threads have scores of their own."""
        chunk_bytes = self.chunk * len(self.layer.weight) * self.layer.weight.itemsize
        return max(min(self.threads, self.threads * _THREAD_BYTES // chunk_bytes), 1)

    @property
    def scale(self) -> float:
        return 1.0 / self.divisor if self.divisor else 0.0

    @property
    def widens(self) -> bool:
        """Whether a bias is one more weight, of an input of 1.

        That saves a pass over the scores for one over the inputs.
        """
        num_classes: int = self.layer.weight.shape[0]
        num_features: int = self.layer.weight.shape[1]
        return num_classes > num_features and self.num_rows > _COPY_COST * num_features

    @property
    def is_one_block(self) -> bool:
        """Whether there is nothing to share out, and nothing to put together."""
        one = self.block == self.num_rows and len(self.parts) == 1
        return one and not self.layer.sparse and (self.layer.bias is None or not self.widens)

    def rows(self, array: Any, rows: slice) -> Any:
        """A part of the rows that count."""
        return array[rows] if self.kept is None else array[self.kept[rows]]


def _plan(
    inputs: Any,
    linear_weight: ArrayLike,
    linear_bias: ArrayLike | None,
    target: ArrayLike,
    l2: float,
    weight: ArrayLike | None,
    sample_weight: ArrayLike | None,
    options: Options,
    reduction: str,
    normalizer: float | None,
    chunk_rows: int | None,
    backend: str | None,
    num_threads: int | None,
) -> _Plan:
    """Check everything, find the rows that count, and cut them up."""
    kernels = _backend.resolve(backend)
    known = None
    if functional._small:
        known = functional._small.linear(
            inputs, linear_weight, linear_bias, target, weight, sample_weight, options
        )
    layer = known[0] if known else _arguments.linear(inputs, linear_weight, linear_bias)
    reduced = _arguments.reduction(reduction, normalizer)
    penalty = _arguments.l2(l2, reduction)
    asked = _arguments.chunk_rows(chunk_rows)
    threads = _threads.threads_for(num_threads)
    if not _blas.can_be_held():
        threads = 1
    labels, total_weight = (
        known[1:]
        if known
        else _arguments.labels(kernels, layer.scores, target, weight, sample_weight, options, 1)
    )
    divisor = reduced.divisor(total_weight)
    if divisor:
        kept = _kept(labels, options, total_weight)
    else:
        kept = np.empty(0, np.intp)  # no row counts, not even one that holds a NaN
    count = len(labels.target) if kept is None else len(kept)
    num_classes, num_features = layer.weight.shape
    parts = list(_parts(num_classes, num_features))
    wide_parts = list(_parts(num_classes, num_features, _SCORE_PARTS)) if parts[1:] else parts
    block, chunk = _sizes(count, layer, len(parts), asked)
    return _Plan(
        layer, kernels.cross_entropy, labels, options, penalty, reduction, divisor, kept, count,
        block, chunk, parts, wide_parts, min(threads, -(-count // chunk) * len(parts)),
        known is not None,
    )  # fmt: skip


def _kept(labels: Labels, options: Options, total_weight: float) -> np.ndarray | None:
    """The rows that count for something; None for all of them."""
    target, class_weight, sample_weight = labels
    if class_weight is None and sample_weight is None and total_weight == len(target):
        return None
    counts = np.ones(len(target), bool)
    if sample_weight is not None:
        counts &= sample_weight[:, 0] != 0
    if not labels.soft:
        used = target[:, 0] != options.ignore_index
        counts &= used
        smooth = options.label_smoothing and class_weight is not None and class_weight.any()
        # By either of these a row counts whatever its target's weight.
        if class_weight is not None and not options.z_loss and not smooth:
            classes = np.where(used, target[:, 0], 0).astype(np.intp)
            # Another thread may have changed the target since it was checked.
            counts &= class_weight.take(classes, mode="clip") != 0
    return None if counts.all() else np.flatnonzero(counts)


def _sizes(count: int, layer: _arguments.Linear, parts: int, asked: int | None) -> tuple[int, int]:
    """The rows of a block and of a chunk."""
    num_classes, num_features = layer.weight.shape
    itemsize = layer.weight.itemsize
    row_bytes = max(num_classes, num_features) * itemsize
    largest = min(max(_THREAD_BYTES // row_bytes, _WORTH_ROWS), _MOST_BYTES // row_bytes)
    most = _BLOCK_BYTES // (num_classes * itemsize)
    if layer.sparse:
        # Each chunk makes a dense gradient, which takes as long as so many rows.
        most = min(max(most, num_features // 4), _THREAD_BYTES // (num_classes * itemsize))
    else:
        most = min(most, _BLOCK_PRODUCTS // (num_classes * max(num_features, 1)))
    least_blocks = -(-_LEAST_BLOCKS // parts)
    most = max(most, min(_LEAST_ROWS, -(-count // least_blocks), largest), 1)
    blocks = max(-(-count // most), 1)
    if blocks > 1:
        blocks += blocks % 2  # for two threads to have as many
    block = max(-(-count // blocks), 1)
    return block, block * min(-(-(asked or 1) // block), blocks)


_Losses = tuple[float, np.ndarray | None]  # their sum, in float64, and those of the rows if wanted


def _run(plan: _Plan, gradients: LinearGradients, accumulate: bool = False) -> float | np.ndarray:
    """The loss, and its gradients into where they go."""
    if not accumulate:
        _clear(plan, gradients)
    run = _run_block if plan.is_one_block else _run_chunks
    with np.errstate(all="ignore"):
        try:
            _blas.one_thread.hold()
            losses = run(plan, gradients, accumulate)
        finally:
            _blas.one_thread.release()
        if gradients.linear_weight is not None and plan.l2:
            _add_penalty(gradients.linear_weight, plan.layer.weight, plan.l2)
        return _reduce(plan, *losses)


def _run_block(plan: _Plan, gradients: LinearGradients, accumulate: bool) -> _Losses:
    """All rows at once: for so few, to hand them out would take as long as the products."""
    rows, weight, bias = slice(0, plan.num_rows), plan.layer.weight, plan.layer.bias
    x = np.ascontiguousarray(plan.rows(plan.layer.inputs, rows))
    losses = np.empty((len(x), 1), x.dtype) if plan.reduction == "none" else None
    scores = np.matmul(x, weight.T)
    if bias is not None:
        scores += bias
    sum_of_losses = _score(plan, rows, scores, losses, _any(gradients))
    if gradients.linear_weight is not None:
        _put_product(gradients.linear_weight, scores.T, x, accumulate)
    if gradients.linear_bias is not None:
        _put_product(gradients.linear_bias, np.ones(len(x), x.dtype), scores, accumulate)
    if gradients.inputs is not None and plan.kept is None:
        _put_product(gradients.inputs, scores, weight, accumulate)
    elif gradients.inputs is not None:
        gradients.inputs[plan.kept] += scores @ weight
    return sum_of_losses, losses


def _put_product(total: np.ndarray, left: np.ndarray, right: np.ndarray, onto: bool) -> None:
    if onto:
        total += left @ right
    else:
        np.matmul(left, right, out=total)


def _run_chunks(plan: _Plan, gradients: LinearGradients, accumulate: bool) -> _Losses:
    losses = np.empty((plan.num_rows, 1), plan.layer.weight.dtype)
    with_grad = _any(gradients)
    crew = Crew(plan.num_rows, plan.chunk, plan.owners, plan.threads <= 1)
    chunks = _sparse_chunks(plan) if plan.layer.sparse else _dense_chunks(plan)

    def work() -> None:
        with np.errstate(all="ignore"):
            for rows, x, scores in chunks(crew):
                _score_by_parts(plan, rows, scores, losses, with_grad, crew)
                if with_grad:
                    _add_gradients(plan, gradients, rows, x, scores, crew, accumulate)
            crew.help()

    on_threads(plan.threads, work, crew)
    # In one fixed order, whatever the chunks, and rounded like those of the kernels' own sums.
    return float(np.add.reduce(losses[:, 0], dtype=np.float64)), losses


_Chunk = tuple[slice, Any, np.ndarray]  # rows, inputs, scores


def _dense_chunks(plan: _Plan) -> Callable[[Crew], Iterator[_Chunk]]:
    """What makes the scores of chunk by chunk, each with its rows and inputs."""
    weight, bias, inputs = plan.layer.weight, plan.layer.bias, plan.layer.inputs
    num_classes, num_features = weight.shape
    direct = inputs.flags.c_contiguous
    if bias is not None and plan.widens:
        weight, bias, direct = np.hstack([weight, bias[:, None]]), None, False
    padded = plan.num_rows % plan.block > 0

    def multiply(x: np.ndarray, scores: np.ndarray, classes: slice) -> None:
        for first in range(0, len(x), plan.block):
            block = slice(first, first + plan.block)
            np.matmul(x[block], weight[classes].T, out=scores[block, classes])
            if bias is not None:
                scores[block, classes] += bias[classes]

    def chunks(crew: Crew) -> Iterator[_Chunk]:
        scores = room = None
        for rows in crew.chunks():
            if scores is None:  # with rows there is an owner, who needs some
                scores = np.empty((plan.chunk, num_classes), weight.dtype)
                if padded or not direct:
                    room = np.zeros((plan.chunk, weight.shape[1]), weight.dtype)
                    room[:, num_features:] = 1
            num_rows = rows.stop - rows.start
            x = plan.rows(inputs, rows)
            if room is not None and (not direct or num_rows % plan.block):
                room[:num_rows, :num_features] = x
                x = room[: -(-num_rows // plan.block) * plan.block]
            crew.share(functools.partial(multiply, x, scores, part) for part in plan.wide_parts)
            yield rows, x[:num_rows, :num_features], scores[:num_rows]

    return chunks


def _sparse_chunks(plan: _Plan) -> Callable[[Crew], Iterator[_Chunk]]:
    """The same for sparse inputs, a row of whose scores does not depend on others."""
    transposed = np.ascontiguousarray(plan.layer.weight.T)

    def chunks(crew: Crew) -> Iterator[_Chunk]:
        for rows in crew.chunks():
            x = plan.rows(plan.layer.inputs, rows)
            scores = x @ transposed
            if plan.layer.bias is not None:
                scores += plan.layer.bias
            yield rows, x, scores

    return chunks


def _score(
    plan: _Plan, rows: slice, scores: np.ndarray, losses: np.ndarray | None, with_grad: bool
) -> float:
    """The losses of scores and their sum; their gradient takes the place of the scores."""
    target, weight, s = plan.labels
    x, out = scores[:, :, None], None if losses is None else losses[rows]
    own = Labels(plan.rows(target, rows), weight, None if s is None else plan.rows(s, rows))
    return plan.kernel(x, own, plan.options, plan.scale, out, x if with_grad else None, 1)


def _score_by_parts(
    plan: _Plan, rows: slice, scores: np.ndarray, losses: np.ndarray, with_grad: bool, crew: Crew
) -> None:
    step = max(_KERNEL_ELEMENTS // scores.shape[1], 1)
    parts = (slice(i, min(i + step, len(scores))) for i in range(0, len(scores), step))
    crew.share(
        functools.partial(
            _score, plan, slice(rows.start + part.start, rows.start + part.stop), scores[part],
            losses, with_grad,
        )
        for part in parts
    )  # fmt: skip


def _clear(plan: _Plan, gradients: LinearGradients) -> None:
    """Zeros where nothing will be written."""
    for total in gradients[:2]:
        if total is not None and not plan.num_rows:
            total.fill(0)
    if gradients.inputs is not None and plan.kept is not None:
        gradients.inputs.fill(0)


def _add_gradients(
    plan: _Plan,
    gradients: LinearGradients,
    rows: slice,
    x: Any,
    g: np.ndarray,
    crew: Crew,
    accumulate: bool,
) -> None:
    """The share of a chunk in the gradients, g that of its scores.

    A part of the classes goes into all of them, so that it is read once.
    """
    inputs = gradients.inputs
    indirect = inputs is not None and (accumulate or plan.kept is not None)
    if inputs is not None:
        inputs = np.empty(x.shape, inputs.dtype) if indirect else inputs[rows]

    def add(classes: slice) -> None:
        part = g[:, classes]
        if gradients.linear_weight is not None:
            total = gradients.linear_weight[classes]
            crew.add_product(total, part.T, x, ("weight", classes.start), rows, accumulate)
        if gradients.linear_bias is not None:
            total, ones = gradients.linear_bias[classes], np.ones(len(g), g.dtype)
            crew.add_product(total, ones, part, ("bias", classes.start), rows, accumulate)
        if inputs is not None:
            weight = plan.layer.weight[classes]
            crew.add_product(inputs, part, weight, ("inputs", rows.start), classes, False)

    crew.share(functools.partial(add, part) for part in plan.parts)
    if indirect:
        gradients.inputs[rows if plan.kept is None else plan.kept[rows]] += inputs


def _add_penalty(total: np.ndarray, linear_weight: np.ndarray, l2: float) -> None:
    for classes in _parts(*total.shape):
        # In float64, for 2 l2 may be more, or less, than a float32 holds.
        total[classes] += 2 * l2 * linear_weight[classes].astype(np.float64)


def _parts(num_classes: int, num_features: int, most: int | None = None) -> Iterator[slice]:
    """Classes by and by, so that a temporary stays small and in cache; as many for all threads."""
    count = -(-num_classes * num_features // _PRODUCT_ELEMENTS)
    if count > 1:
        count += -count % 8
    step = max(-(-num_classes // max(min(count, most or count), 1)), 16)
    for first in range(0, num_classes, step):
        yield slice(first, first + step)


def _reduce(plan: _Plan, total: float, losses: np.ndarray | None) -> float | np.ndarray:
    if losses is not None and plan.reduction == "none":
        result = np.zeros(len(plan.labels.target), losses.dtype)
        result[... if plan.kept is None else plan.kept] = losses[:, 0]
        return result.reshape(plan.layer.inputs_shape[:-1])
    if not plan.divisor:
        return math.nan
    return total / plan.divisor + _l2_penalty(plan.layer.weight, plan.l2)
