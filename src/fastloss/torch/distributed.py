"""Cross-entropy whose classes are divided among the processes of a ``torch.distributed`` group.

Everything a rank can do alone comes first, so that whatever goes wrong there is known to all before
any of them waits for the rest: a header of a few integers per rank carries it.  Then two
reductions, a number and three numbers per row, give every rank the loss of every row.  The backward
pass needs no word from the others.
"""

import math
import operator
import zlib
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist
from torch._compile import _disable_dynamo

from fastloss import _arguments, _backend
from fastloss.torch import _compute, _ops
from fastloss.torch import functional as F
from fastloss.torch._compute import Inputs, Options, compute_dtype

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def vocab_parallel_cross_entropy(
    logits_shard: Tensor,
    target: Tensor,
    vocab_start: int,
    *,
    group: "ProcessGroup | None" = None,
    ignore_index: int = _arguments.DEFAULT_IGNORE_INDEX,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Cross-entropy of scores of which each rank of a group holds some of the classes.

    Loss and gradient are those of `cross_entropy` on the shards put together.  With
    :math:`\mathrm{lse} = \log \sum_k \exp x_k` over the classes of all ranks, label smoothing e,
    z-loss z and C classes in all, a row of scores x with class index y has the loss

    .. math:: L = (1 - e) (\mathrm{lse} - x_y) + (e / C) \sum_c (\mathrm{lse} - x_c)
              + z \, \mathrm{lse}^2

    Every rank of the group must call this, with the same target and options.

    Parameters
    ----------
    logits_shard : Tensor of float32, float64, float16 or bfloat16, shape (..., C_local)
        The scores of the classes from `vocab_start` to ``vocab_start + C_local - 1``; the classes
        are the last dimension.  Ranks may hold different numbers of classes, and none.
    target : Tensor of any integer dtype, shape (...)
        The class indices y, counted over the classes of all ranks; the same on every rank.
    vocab_start : int
        The index of the first class in `logits_shard`.
    group : torch.distributed.ProcessGroup, optional
        The ranks among which the classes are divided, over a backend that takes CPU tensors, such
        as gloo; by default all.
    ignore_index, label_smoothing, z_loss, reduction, backend
        As in `cross_entropy`.
    normalizer : float or Tensor of one number, optional
        What the mean divides by; by default the number of rows that are not ignored.

    Returns
    -------
    Tensor
        The same on every rank, in the dtype of `logits_shard`, under autocast float32 for half
        types; differentiable once.

    Raises
    ------
    IndexError
        If a target is out of range for the classes of all ranks, and not `ignore_index`.
    ValueError
        If a shape or an option is wrong, the ranks disagree, or the shards overlap or leave a gap.
    TypeError
        If a tensor is of a device, layout or dtype that the kernels do not take.
    ImportError
        If the backend that was asked for is not there.
    RuntimeError
        If another rank was refused its arguments, has died, or does not answer within the time-out
        of the group; or on the way to a second derivative.

    Notes
    -----
    Divided as in [1]_.  As in `cross_entropy` the sum of exponentials leaves the target out, on
    whichever rank it is, so that the loss of a confident row is exact.

    References
    ----------
    .. [1] M. Shoeybi et al., "Megatron-LM: training multi-billion parameter language models using
       model parallelism", 2019.

    Examples
    --------
    A group of one process, which holds all classes:

    >>> import torch
    >>> from torch import distributed as dist
    >>> from fastloss.torch import vocab_parallel_cross_entropy
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> logits = torch.tensor([[5.0, 4.0, 2.0]], requires_grad=True)
    >>> loss = vocab_parallel_cross_entropy(logits, torch.tensor([0]), vocab_start=0)
    >>> loss.backward()
    >>> loss
    tensor(0.3490, grad_fn=<_LossBackward>)
    >>> logits.grad
    tensor([[-0.2946,  0.2595,  0.0351]])
    >>> dist.destroy_process_group()
    """
    arguments = (logits_shard, target, vocab_start, ignore_index, label_smoothing, z_loss)
    apply = _apply_outside_graphs if torch.compiler.is_compiling() else _Loss.apply
    loss = apply(group, *arguments, reduction, normalizer, backend)
    if loss.dtype is not logits_shard.dtype and not torch.is_autocast_enabled("cpu"):
        loss = loss.to(logits_shard.dtype)
    return loss  # type: ignore[no-any-return]


class _Shard(NamedTuple):
    """The classes of one rank, and what the other ranks must find to be the same."""

    scores: Tensor  # (rows, classes)
    target: Tensor  # (rows,), int64
    start: int
    shape: tuple[int, ...]  # of the rows
    options: Options

    def description(self) -> dict[str, Any]:
        return {
            "the shape of the rows": self.shape,
            "the dtype of logits_shard": str(self.scores.dtype),
            # Each may compute by a backend of its own.
            **self.options._replace(backend=None)._asdict(),
            "target": zlib.crc32(self.target.numpy().tobytes()),
        }


class _Rows(NamedTuple):
    """What a rank can tell of each row by itself; float64, relative to the shard's largest score.

    A shard without classes, or with nothing but -inf, has nothing to say: its sums are 0.
    """

    kept: Tensor  # not ignored
    owned: Tensor  # the target is one of the shard's classes
    y: Tensor  # its place in the shard, 0 where not owned
    top: Tensor  # the place of the largest score
    m: Tensor  # the largest score
    total: Tensor  # the sum of exponentials
    others: Tensor  # the same without the target's
    x_y: Tensor  # the target's score, 0 where not owned
    distance: Tensor  # the sum of m - x over the classes; 0 without label smoothing


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: Any, *arguments: Any) -> Tensor:
        shard, rows, num_classes = _prepare(group, *arguments)
        options, u = shard.options, shard.options.label_smoothing / num_classes
        M, others, x_y, distance = _combine(shard, rows, group)

        e_y = torch.exp(x_y - M)
        log_s = torch.log1p(others + (e_y - 1))
        lse = M + log_s
        loss = torch.zeros_like(M)
        if options.label_smoothing < 1:
            loss += (1 - options.label_smoothing) * (log_s + (M - x_y))
        if u:
            loss += u * (distance + num_classes * log_s)
        if options.z_loss:
            loss += options.z_loss * lse**2
        loss = torch.where(rows.kept, loss, 0)

        ctx.options, ctx.num_classes = options, num_classes
        ctx.divisor = _divisor(options, rows.kept)
        kept = (rows.kept, rows.owned, rows.y, rows.top, rows.total, torch.exp(rows.m - M))
        ctx.save_for_backward(arguments[0], *kept, others, e_y, lse)
        if options.reduction == "none":
            loss = loss.reshape(shard.shape)
        else:
            loss = loss.sum() / ctx.divisor
        return loss.to(compute_dtype(shard.scores.dtype))

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError("vocab_parallel_cross_entropy cannot be differentiated twice")
        if _ops.is_eager(upstream):
            grad = _gradient(ctx, upstream)
        else:
            unit = _gradient(ctx, torch.ones((), device="cpu"))
            grad = _compute.times_each(unit, upstream, -1)
        return None, grad, *[None] * 8


def _gradient(ctx: Any, upstream: Tensor) -> Tensor:
    """With respect to the shard."""
    logits_shard, kept, owned, y, top, total, f, others, e_y, lse = ctx.saved_tensors
    options, e = ctx.options, ctx.options.label_smoothing
    u = e / ctx.num_classes
    z_slope = 2 * options.z_loss * lse if options.z_loss else torch.zeros_like(lse)
    a = 1 + z_slope
    r = torch.where(kept, upstream.to(torch.float64).reshape(-1) / ctx.divisor, 0)
    s = others + e_y

    scores = _matrix(logits_shard, kept.numel())
    grad = torch.empty(0, dtype=scores.dtype, device="cpu")
    if scores.numel():
        # The shard's own probabilities, but at `top`, times what they count among all.
        inputs = _inputs(scores, top, kept & (total != 0))
        grad = _compute.gradient(r * a * (total * f / s), inputs, _own(options.backend))
        if u:
            grad.sub_((r * u).to(compute_dtype(grad.dtype)).unsqueeze(1))
        # The kernel had the largest score for a target, and the target for just any class.
        _put(grad, top, r * (a * (f / s) - u), kept)
        _put(grad, y, r * _at_target(a, e_y / s, others / s, 1 - e + u, e - u + z_slope), owned)
    return grad.reshape(logits_shard.shape)


@_disable_dynamo
def _apply_outside_graphs(*arguments: Any) -> Tensor:
    """As one piece, where torch.compile would make many, and again with the numbers that change."""
    return _Loss.apply(*arguments)  # type: ignore[no-any-return,no-untyped-call]


# ---------------------------------------------------------------------------------------------
# Arguments, and whether the ranks agree on them
# ---------------------------------------------------------------------------------------------


def _prepare(group: Any, *arguments: Any) -> tuple[_Shard, _Rows, int]:
    """The rows of this shard, and the number of classes of all: an error on one is one on all."""
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            "torch.distributed is not initialized; call torch.distributed.init_process_group first"
        )
    if dist.get_rank(group) < 0:
        raise ValueError("this process is not in the group")
    problem = None
    description: dict[str, Any] = {}
    header = [0, 0, 0, 0]
    try:
        shard = _check(*arguments)
        rows = _reduce(shard)
        description = shard.description()
        checksum = zlib.crc32(repr(description).encode())
        header = [0, checksum, shard.start, shard.scores.shape[1]]
    except Exception as error:
        problem = error
        header[0] = 1

    gathered = list(torch.empty(dist.get_world_size(group), 4, dtype=torch.int64, device="cpu"))
    dist.all_gather(gathered, torch.tensor(header, device="cpu"), group=group)
    headers = torch.stack(gathered)
    if headers[:, 0].any() or (headers[:, 1] != header[1]).any():
        _raise_disagreement(problem, description, group)
    num_classes = _check_layout(headers[:, 2].tolist(), headers[:, 3].tolist())
    _check_range(shard, rows.kept, num_classes)
    return shard, rows, num_classes


def _check(
    logits_shard: Any,
    target: Any,
    vocab_start: Any,
    ignore_index: Any,
    label_smoothing: Any,
    z_loss: Any,
    reduction: Any,
    normalizer: Any,
    backend: Any,
) -> _Shard:
    if problem := F.unsuited({"logits_shard": logits_shard, "target": target}):
        raise TypeError(problem)
    F.check_float(logits_shard, "logits_shard")
    if target.is_floating_point() or target.is_complex() or target.dtype is torch.bool:
        raise TypeError(f"target has dtype {target.dtype}; expected integers, the class indices")
    if not logits_shard.dim():
        raise ValueError("logits_shard is a scalar; it needs a dimension of classes")
    shape = tuple(logits_shard.shape[:-1])
    if tuple(target.shape) != shape:
        raise ValueError(
            f"target has shape {tuple(target.shape)}, expected {shape}, that of logits_shard, "
            f"{tuple(logits_shard.shape)}, without the classes in its last dimension"
        )
    try:
        start = operator.index(vocab_start)
    except TypeError:
        raise TypeError(f"vocab_start = {vocab_start!r} is not an integer") from None
    if not 0 <= start < 1 << 62:
        raise ValueError(f"vocab_start = {start} is out of range; it must be at least 0")
    numbers = _arguments.options(ignore_index, label_smoothing, z_loss=z_loss)
    divisor = _arguments.reduction(reduction, normalizer).normalizer
    options = Options(
        numbers.label_smoothing, numbers.z_loss, divisor, "cross_entropy", numbers.ignore_index,
        reduction, backend,
    )  # fmt: skip
    _backend.resolve(backend)
    scores = _matrix(logits_shard.detach(), target.numel())
    return _Shard(scores, target.to(torch.int64).reshape(-1), start, shape, options)


def _matrix(logits_shard: Tensor, num_rows: int) -> Tensor:
    return logits_shard.reshape(num_rows, logits_shard.shape[-1])


def _raise_disagreement(problem: Exception | None, description: dict[str, Any], group: Any) -> None:
    """Tell the others what is wrong here, and raise what is wrong with any."""
    mine = description if problem is None else f"{type(problem).__name__}: {problem}"
    said: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(said, mine, group=group)
    if problem is not None:
        raise problem
    for rank, theirs in enumerate(said):
        if isinstance(theirs, str):
            raise RuntimeError(f"rank {rank} of the group was refused its arguments: {theirs}")
    for name, value in said[0].items():
        for rank, theirs in enumerate(said):
            if theirs[name] != value:
                values = "" if name == "target" else f": {value!r} and {theirs[name]!r}"
                raise ValueError(f"{name} differs between ranks 0 and {rank} of the group{values}")


def _check_layout(starts: list[int], sizes: list[int]) -> int:
    """The number of classes of all ranks."""
    end = 0
    for start, size in sorted((start, size) for start, size in zip(starts, sizes, strict=True)):
        if size and start != end:
            shards = ", ".join(
                f"{begin} to {begin + number - 1} on rank {rank}"
                for rank, (begin, number) in enumerate(zip(starts, sizes, strict=True))
                if number
            )
            what = "overlap" if start < end else "leave a gap"
            raise ValueError(
                f"the classes of the ranks {what} at class {min(start, end)}: {shards}"
            )
        end += size
    if not end:
        raise ValueError("logits_shard has no classes on any rank of the group")
    return end


def _check_range(shard: _Shard, kept: Tensor, num_classes: int) -> None:
    bad = kept & ((shard.target < 0) | (shard.target >= num_classes))
    if bad.any():
        place = int(bad.nonzero()[0])
        rows = _arguments.Rows(shard.shape, (shard.target.numel(), 1), None)
        _arguments.raise_target_out_of_range(shard.target.numpy(), rows, num_classes, place)


def _divisor(options: Options, kept: Tensor) -> float:
    if options.reduction != "mean":
        return 1.0
    return float(kept.sum()) if options.normalizer is None else options.normalizer


# ---------------------------------------------------------------------------------------------
# The rows of one rank
# ---------------------------------------------------------------------------------------------


def _reduce(shard: _Shard) -> _Rows:
    """Reduce each row of the shard to a few numbers."""
    scores, num_classes = shard.scores, shard.scores.shape[1]
    kept = shard.target != shard.options.ignore_index
    y = shard.target - shard.start
    owned = kept & (y >= 0) & (y < num_classes)
    y = torch.where(owned, y, 0)
    zeros = torch.zeros(y.numel(), dtype=torch.float64, device="cpu")
    if not scores.numel():
        return _Rows(kept, owned, y, y, zeros - math.inf, zeros, zeros, zeros, zeros)

    top = _argmax(scores)
    # From the loss with the largest score for a target: exact where that score is all there is.
    inputs, backend = _inputs(scores, top, kept), shard.options.backend
    log_total = _compute.losses(inputs, _own(backend)).to(torch.float64)
    beside_top = torch.expm1(log_total)
    m = torch.where(kept, _take(scores, top), 0)
    x_y = _take(scores, y)
    e_y = torch.where(owned, torch.exp(x_y - m), 0)
    others = torch.where(owned & (y == top), beside_top, 1 + (beside_top - e_y))
    distance = zeros
    if shard.options.label_smoothing:
        mean = _compute.losses(inputs, _own(backend, label_smoothing=1.0)).to(torch.float64)
        distance = num_classes * (mean - log_total)

    mute = m == -math.inf
    total, others, distance = (
        torch.where(mute, 0, value) for value in (1 + beside_top, others, distance)
    )
    # What a reduction makes of NaN is anybody's guess; the sums hold one, too.
    m = torch.where(m.isnan(), math.inf, m)
    return _Rows(kept, owned, y, top, m, total, others, torch.where(owned, x_y, 0), distance)


def _argmax(scores: Tensor) -> Tensor:
    """The place of the largest score of each row; NumPy's is four times as fast as PyTorch's."""
    if scores.dtype.itemsize > 2:
        return torch.from_numpy(scores.numpy().argmax(1))
    # The bits of half types: integers in the order of the numbers, of negative ones in the reverse.
    bits = scores.view(torch.int16).numpy()
    top = bits.argmax(1)
    negative = bits[np.arange(len(top)), top] < 0
    top[negative] = bits[negative].argmin(1)
    return torch.from_numpy(top)


def _take(scores: Tensor, place: Tensor) -> Tensor:
    return scores.gather(1, place.unsqueeze(1)).squeeze(1).to(torch.float64)


def _inputs(scores: Tensor, top: Tensor, kept: Tensor) -> Inputs:
    """The shard by itself, with the largest score of each row for its target."""
    return Inputs(scores, torch.where(kept, top, _arguments.DEFAULT_IGNORE_INDEX), None, None)


def _own(backend: str | None, label_smoothing: float = 0.0) -> Options:
    ignore_index = _arguments.DEFAULT_IGNORE_INDEX
    return Options(label_smoothing, 0.0, None, "cross_entropy", ignore_index, "none", backend)


# ---------------------------------------------------------------------------------------------
# All ranks together
# ---------------------------------------------------------------------------------------------


def _combine(shard: _Shard, rows: _Rows, group: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The largest score of all, and relative to it others, x_y and distance of all classes."""
    M = rows.m.clone()
    dist.all_reduce(M, dist.ReduceOp.MAX, group=group)
    num_classes = shard.scores.shape[1]
    distance = rows.distance
    if shard.options.label_smoothing and num_classes:
        distance = distance + num_classes * (M - rows.m)
    sums = torch.stack([rows.others * torch.exp(rows.m - M), rows.x_y, distance])
    dist.all_reduce(sums, dist.ReduceOp.SUM, group=group)
    others, x_y, distance = sums
    return M, others, x_y, distance


def _at_target(a: Tensor, p: Tensor, others: Tensor, subtracted: float, rest: Tensor) -> Tensor:
    """a p - subtracted, or the same as rest - a (1 - p): the second unless it cancels more."""
    size = torch.maximum((a * p).abs(), torch.full_like(p, abs(subtracted)))
    cancels = 2 * size < torch.maximum((a * others).abs(), rest.abs())
    return torch.where(cancels, a * p - subtracted, rest - a * others)


def _put(grad: Tensor, place: Tensor, values: Tensor, where: Tensor) -> None:
    row = where.nonzero().squeeze(1)
    dtype = compute_dtype(grad.dtype)
    grad[row, place[row]] = values[row].to(dtype).to(grad.dtype)
