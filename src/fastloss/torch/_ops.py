"""The operations as PyTorch sees them.

Over the same few functions on arrays there are two layers:

- `Loss` and `Probabilities`, which eager code runs: a call costs little, and the gradient of a
  reduced loss comes from the same pass as the loss;
- operators, loss and gradient apart, for ``torch.compile``, ``torch.func``, fake tensors and second
  derivatives, whose formulas are at the end of this file.
"""

import functools
import importlib
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import fastloss as fl

_HALVES = (torch.float16, torch.bfloat16)


class Options(NamedTuple):
    """What a loss takes beside its tensors, checked."""

    ignore_index: int
    label_smoothing: float
    z_loss: float
    reduction: str
    normalizer: float | None
    backend: str | None


def is_eager(*tensors: Tensor | None) -> bool:
    """Whether nothing but eager autograd is to see what happens to the tensors."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or _is_traced(*tensors)
    )


def _is_traced(*tensors: Any) -> bool:
    """Whether there is someone to note down operators."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch.jit.is_tracing()
        or any(
            isinstance(t, Tensor) and type(t).__torch_dispatch__ is not Tensor.__torch_dispatch__
            for t in tensors
        )
    )


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What losses are computed in: half types in float32."""
    return torch.float32 if dtype in _HALVES else dtype


def class_dim(scores: Tensor) -> int:
    """0 where there is no batch."""
    return min(1, scores.dim() - 1)


# ---------------------------------------------------------------------------------------------
# Between tensors and arrays: the same memory
# ---------------------------------------------------------------------------------------------


@functools.cache
def _ml_dtypes() -> ModuleType:
    try:
        return importlib.import_module("ml_dtypes")
    except ModuleNotFoundError as error:
        raise ImportError(
            "bfloat16 tensors need the type that NumPy lacks: run `pip install ml_dtypes`",
            name="ml_dtypes",
        ) from error


def _array(tensor: Tensor) -> np.ndarray:
    tensor = tensor.detach()
    if tensor.dtype is torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(_ml_dtypes().bfloat16)
    return tensor.resolve_neg().numpy()


def _maybe_array(tensor: Tensor | None) -> np.ndarray | None:
    return None if tensor is None else _array(tensor)


def _tensor(array: np.ndarray) -> Tensor:
    """A tensor on the memory of an array: NumPy's costs fewer page faults than PyTorch's own."""
    if array.dtype.name != "bfloat16":
        return torch.from_numpy(array)
    bits = torch.from_numpy(array.view(np.int16))
    empty = torch.empty(0, dtype=torch.bfloat16, device="cpu")
    # Not a view, which autograd would treat as one.
    return empty.set_(bits.untyped_storage(), 0, bits.shape, bits.stride())


def _threads() -> int:
    """As few as torch.set_num_threads and our own settings ask for."""
    return min(torch.get_num_threads(), fl.get_num_threads())


# ---------------------------------------------------------------------------------------------
# Losses and their gradients on arrays
# ---------------------------------------------------------------------------------------------


def _keywords(
    name: str,
    scores: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | np.ndarray | None,
    options: Options,
) -> dict[str, Any]:
    if isinstance(sample_weight, Tensor):
        sample_weight = _array(sample_weight)
    keywords = {
        "weight": _maybe_array(weight),
        "sample_weight": sample_weight,
        "axis": class_dim(scores),
        "num_threads": _threads(),
        **options._asdict(),
    }
    if name == "nll_loss":
        del keywords["label_smoothing"], keywords["z_loss"]
    return keywords


def _loss_tensor(loss: float | np.ndarray, scores: Tensor) -> Tensor:
    if isinstance(loss, np.ndarray):
        return torch.from_numpy(loss)
    return torch.tensor(loss, dtype=compute_dtype(scores.dtype), device="cpu")


def losses(
    name: str,
    scores: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    options: Options,
) -> Tensor:
    """The loss alone, in the dtype that it is computed in."""
    keywords = _keywords(name, scores, weight, sample_weight, options)
    loss = getattr(fl, name)(_array(scores), _array(target), **keywords)
    return _loss_tensor(loss, scores)


def _losses_with_gradient(
    name: str,
    scores: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | np.ndarray | None,
    options: Options,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    keywords = _keywords(name, scores, weight, sample_weight, options)
    array = None if out is None else _array(out)
    loss, grad = getattr(fl, f"{name}_with_grad")(
        _array(scores), _array(target), out=array, **keywords
    )
    return _loss_tensor(loss, scores), _tensor(grad) if out is None else out


def _gradient(
    name: str,
    upstream: Tensor,
    scores: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    options: Options,
    out: Tensor | None = None,
) -> Tensor:
    """The gradient times that with respect to the loss, rounded once.

    The kernels take it as a divisor or as weights of the rows, which are positive and finite: for
    any other value there is one more pass.
    """
    tensors = (scores, target, weight)
    if _is_uniform(upstream):
        value = _first(upstream)
        if options.reduction == "none":
            options = options._replace(reduction="sum")
        scaled, factor = _scaled(value, *tensors, sample_weight, options)
        _, grad = _losses_with_gradient(name, *tensors, sample_weight, scaled, out)
        return grad if factor == 1.0 else grad.mul_(factor)

    sizes = upstream.detach().to(torch.float64).abs()
    if sample_weight is not None:
        sizes = sizes * sample_weight.detach()
    signs = upstream.detach().sign()
    if not bool(torch.isfinite(sizes).all()):
        sizes, signs = None, upstream.detach()  # type: ignore[assignment]
    plain = options._replace(reduction="sum")
    rows = sample_weight if sizes is None else sizes
    _, grad = _losses_with_gradient(name, *tensors, rows, plain, out)
    if sizes is None or bool((signs < 0).any()):
        grad.mul_(signs.unsqueeze(class_dim(scores)).to(grad.dtype))
    return grad


def _is_uniform(tensor: Tensor) -> bool:
    """One number, perhaps expanded, as the gradient of a sum is."""
    return tensor.numel() == 1 or (tensor.numel() > 0 and not any(tensor.stride()))


def _first(tensor: Tensor) -> float:
    return float(tensor.detach()[(0,) * tensor.dim()])


def _scaled(
    value: float,
    scores: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    options: Options,
) -> tuple[Options, float]:
    """Options whose gradient is `value` times as large but for a factor: the factor, too."""
    if value == 1.0:
        return options, 1.0
    divisor = 1.0
    if options.reduction == "mean":
        divisor = options.normalizer or float(
            _counted(scores, target, weight, sample_weight, options.ignore_index).sum()
        )
    # Zero, infinite and NaN values and divisors are nothing to divide by.
    normalizer = divisor / abs(value) if value else math.inf
    if not 0.0 < normalizer < math.inf:
        return options, value
    scaled = options._replace(reduction="mean", normalizer=normalizer)
    return scaled, math.copysign(1.0, value)


def _counted(
    scores: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    ignore_index: int,
) -> Tensor:
    """What each row adds to the divisor of the mean, in float64."""
    if target.is_floating_point():
        counted = scores.select(class_dim(scores), 0).new_ones((), dtype=torch.float64)
        counted = counted.expand(_rows_shape(scores))
    else:
        index, kept = _kept(target, ignore_index)
        counted = kept.to(torch.float64)
        if weight is not None:
            counted = counted * weight.to(torch.float64)[index]
    return counted if sample_weight is None else counted * sample_weight.to(torch.float64)


def _kept(target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Indices to look up, 0 for ignored rows, and which rows are not ignored."""
    index = target.to(torch.int64)
    kept = index != ignore_index
    return torch.where(kept, index, 0), kept


def _rows_shape(scores: Tensor) -> tuple[int, ...]:
    dim = class_dim(scores)
    return (*scores.shape[:dim], *scores.shape[dim + 1 :])


# ---------------------------------------------------------------------------------------------
# Softmax on arrays
# ---------------------------------------------------------------------------------------------


def compute_probabilities(log: bool, scores: Tensor, dim: int, backend: str | None) -> Tensor:
    if scores.numel() == 0:
        return torch.empty_like(scores)
    function = fl.log_softmax if log else fl.softmax
    shape = scores.shape or (1,)
    result = function(_array(scores).reshape(shape), dim, backend=backend, num_threads=_threads())
    return _tensor(result.reshape(scores.shape))


def _compute_probabilities_backward(
    log: bool, upstream: Tensor, result: Tensor, dim: int, backend: str | None
) -> Tensor:
    if result.numel() == 0:
        return torch.empty_like(result)
    function = fl.log_softmax_backward if log else fl.softmax_backward
    shape = result.shape or (1,)
    grad = function(
        _array(upstream).reshape(shape), _array(result).reshape(shape), dim,
        backend=backend, num_threads=_threads(),
    )  # fmt: skip
    return _tensor(grad.reshape(result.shape))


# ---------------------------------------------------------------------------------------------
# Eager
# ---------------------------------------------------------------------------------------------


class Loss(torch.autograd.Function):
    """A loss whose scores, or probabilities as targets, need a gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        scores: Tensor,
        target: Tensor,
        weight: Tensor | None,
        sample_weight: Tensor | None,
        name: str,
        options: Options,
        inplace: bool,
    ) -> Tensor:
        tensors = (scores, target, weight, sample_weight)
        ctx.name, ctx.options, ctx.inplace = name, options, inplace
        # The gradient of this pass goes to the first backward pass, whose caller may keep it and
        # write to it.  Another backward pass computes another one.
        ctx.gradients = []
        if not inplace:
            ctx.save_for_backward(*tensors)
            # Rows wait for the gradients with respect to their losses.
            if not ctx.needs_input_grad[0] or options.reduction == "none":
                return losses(name, *tensors, options)
        out = scores.detach() if inplace else None
        loss, grad = _losses_with_gradient(name, *tensors, options, out)
        if inplace:  # who has saved the scores for a backward pass shall hear of it
            torch.autograd.graph.increment_version(scores)
        ctx.gradients.append(grad)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        grad = ctx.gradients.pop() if ctx.gradients else None
        differentiable = torch.is_grad_enabled()
        if ctx.inplace:
            if grad is None or differentiable:
                what = "differentiate twice" if differentiable else "go backward again"
                raise RuntimeError(
                    f"cannot {what} through {ctx.name} with inplace=True: "
                    "its gradient has replaced the scores"
                )
            return _times(grad, upstream), *[None] * 6

        if grad is not None and not differentiable and not ctx.needs_input_grad[1]:
            if grad.dtype not in _HALVES or _first(upstream) == 1.0:
                return _times(grad, upstream), *[None] * 6
            # A half type has been rounded once already: it is computed anew, in the same memory.
        tensors = ctx.saved_tensors
        arguments = (ctx.name, upstream, *tensors)
        if not ctx.needs_input_grad[0]:
            grad = None
        elif differentiable:
            grad = loss_backward(*arguments, *ctx.options)
        else:
            grad = _gradient(*arguments, ctx.options, grad)
        target_grad = None
        if ctx.needs_input_grad[1]:
            target_grad = _target_gradient(upstream, *tensors, ctx.options)
        return grad, target_grad, *[None] * 5


def _times(grad: Tensor, upstream: Tensor) -> Tensor:
    if _is_uniform(upstream):
        value = _first(upstream)
        return grad if value == 1.0 else grad.mul_(value)
    return grad.mul_(upstream.unsqueeze(class_dim(grad)))


class Probabilities(torch.autograd.Function):
    """softmax or log_softmax."""

    @staticmethod
    def forward(ctx: Any, log: bool, scores: Tensor, dim: int, backend: str | None) -> Tensor:
        result = compute_probabilities(log, scores, dim, backend)
        ctx.save_for_backward(result)
        ctx.options = log, dim, backend
        return result

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        log, dim, backend = ctx.options
        function = (
            probabilities_backward if torch.is_grad_enabled() else _compute_probabilities_backward
        )
        grad = function(log, upstream, *ctx.saved_tensors, dim, backend)
        return None, grad, None, None


# ---------------------------------------------------------------------------------------------
# Operators
# ---------------------------------------------------------------------------------------------


def _operator(
    name: str,
    compute: Callable[..., Tensor],
    fake: Callable[..., Tensor],
    save: Callable[..., None],
    differentiate: Callable[..., Any],
    batch: Callable[..., tuple[Tensor, int]],
) -> Callable[..., Tensor]:
    """An operation from its parts, for `torch.library` and for the transforms of `torch.func`.

    Those take an ``autograd.Function`` only, and what traces them sees the operator below it.
    """
    op = torch.library.custom_op(f"fastloss::{name}", compute, mutates_args=(), device_types="cpu")
    op.register_fake(fake)
    op.register_autograd(differentiate, setup_context=save)
    op.register_vmap(batch)

    def forward(*arguments: Any) -> Tensor:
        return op(*arguments) if _is_traced(*arguments) else compute(*arguments)

    parts = {"forward": forward, "setup_context": save, "backward": differentiate, "vmap": batch}
    methods = {key: staticmethod(part) for key, part in parts.items()}
    function = type(f"fastloss_{name}", (torch.autograd.Function,), methods)

    def call(*arguments: Any) -> Tensor:
        return (op if torch.compiler.is_compiling() else function.apply)(*arguments)

    return call


def _compute_loss(
    name: str,
    scores: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    reduction: str,
    normalizer: float | None,
    backend: str | None,
) -> Tensor:
    options = Options(ignore_index, label_smoothing, z_loss, reduction, normalizer, backend)
    return losses(name, scores, target, weight, sample_weight, options)


def _compute_loss_backward(
    name: str,
    upstream: Tensor,
    scores: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    reduction: str,
    normalizer: float | None,
    backend: str | None,
) -> Tensor:
    options = Options(ignore_index, label_smoothing, z_loss, reduction, normalizer, backend)
    return _gradient(name, upstream, scores, target, weight, sample_weight, options)


# What they return, without computing it.


def _fake_loss(name: str, scores: Tensor, *rest: Any) -> Tensor:
    options = Options(*rest[3:])
    shape = _rows_shape(scores) if options.reduction == "none" else ()
    return scores.new_empty(shape, dtype=compute_dtype(scores.dtype))


def _fake_loss_backward(name: str, upstream: Tensor, scores: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(scores)


def _fake_probabilities(log: bool, scores: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(scores)


def _fake_probabilities_backward(log: bool, upstream: Tensor, result: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(result)


# Their derivatives.


def _save_loss(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.name, *tensors = inputs[:5]
    ctx.save_for_backward(*tensors)
    ctx.options = Options(*inputs[5:])


def _differentiate_loss(ctx: Any, upstream: Tensor) -> Any:
    tensors = ctx.saved_tensors
    grad = target_grad = None
    if ctx.needs_input_grad[1]:
        grad = loss_backward(ctx.name, upstream, *tensors, *ctx.options)
    if ctx.needs_input_grad[2]:
        target_grad = _target_gradient(upstream, *tensors, ctx.options)
    return None, grad, target_grad, *[None] * 8


def _save_loss_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.name, *tensors = inputs[:6]
    ctx.save_for_backward(*tensors)
    ctx.options = Options(*inputs[6:])


def _differentiate_loss_backward(ctx: Any, v: Tensor) -> Any:
    grads = _second_derivatives(ctx.name, v, *ctx.saved_tensors, ctx.options)
    return None, *grads, *[None] * 8


def _save_probabilities(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    log, _, *rest = inputs
    ctx.save_for_backward(output)
    ctx.options = log, *rest


def _differentiate_probabilities(ctx: Any, upstream: Tensor) -> Any:
    log, *rest = ctx.options
    return None, probabilities_backward(log, upstream, *ctx.saved_tensors, *rest), None, None


def _save_probabilities_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    log, upstream, result, *rest = inputs
    ctx.save_for_backward(upstream, result)
    ctx.options = log, *rest


def _differentiate_probabilities_backward(ctx: Any, v: Tensor) -> Any:
    log, dim, _ = ctx.options
    g, result = ctx.saved_tensors
    if log:
        p = result.exp()
        grad_g = v - (v * p).sum(dim, keepdim=True)
        grad_result = -v * p * g.sum(dim, keepdim=True)
    else:
        vp = (v * result).sum(dim, keepdim=True)
        gp = (g * result).sum(dim, keepdim=True)
        grad_g = result * (v - vp)
        grad_result = v * (g - gp) - g * vp
    return None, grad_g, grad_result, None, None


# A batch of them: its entries are so many more rows.


def _batch_loss(info: Any, in_dims: Any, name: str, *rest: Any) -> tuple[Tensor, int]:
    *tensors, scores_shape = _merged(info, in_dims[1:5], *rest[:4])
    options = Options(*rest[4:])
    rows = loss(name, *tensors, *options._replace(reduction="none", normalizer=None))
    rows = rows.reshape(info.batch_size, *scores_shape)
    if options.reduction == "none":
        return rows, 0
    total = rows.to(torch.float64).flatten(1).sum(1) if rows.dim() > 1 else rows
    divisor = _divisors(info, options, *tensors)
    return (total / divisor).to(rows.dtype), 0


def _batch_loss_backward(
    info: Any, in_dims: Any, name: str, upstream: Tensor, *rest: Any
) -> tuple[Tensor, int]:
    *tensors, rows_shape = _merged(info, in_dims[2:6], *rest[:4])
    options = Options(*rest[4:])
    u = _batched(info, upstream, in_dims[1]).to(torch.float64)
    if options.reduction != "none":
        divisor = _divisors(info, options, *tensors)
        u = torch.where(divisor == 0, 0, u / divisor)
        u = u.reshape(-1, *[1] * len(rows_shape)).expand(-1, *rows_shape)
    u = u.reshape(_rows_shape(tensors[0])).to(compute_dtype(tensors[0].dtype))
    grad = loss_backward(name, u, *tensors, *options._replace(reduction="none", normalizer=None))
    dim = class_dim(_unbatched(rest[0], in_dims[2]))
    shape = list(rows_shape)
    shape.insert(dim, grad.shape[class_dim(grad)])
    return grad.reshape(info.batch_size, *shape), 0


def _batched(info: Any, tensor: Tensor, in_dim: int | None) -> Tensor:
    """The batch in front, made up where there is none."""
    if in_dim is None:
        return tensor.expand(info.batch_size, *tensor.shape)
    return tensor.movedim(in_dim, 0)


def _unbatched(tensor: Tensor, in_dim: int | None) -> Tensor:
    return tensor if in_dim is None else tensor.select(in_dim, 0)


def _merged(
    info: Any,
    in_dims: Any,
    scores: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
) -> tuple[Any, ...]:
    """The tensors with the batch as rows, and the shape of the rows of one entry."""
    if in_dims[2] is not None:
        raise NotImplementedError("vmap over weight, the weights of the classes, is not supported")
    rows_shape = _rows_shape(_unbatched(scores, in_dims[0]))

    def merge(tensor: Tensor, in_dim: int | None) -> Tensor:
        tensor = _batched(info, tensor, in_dim)
        return tensor.flatten(0, 1) if rows_shape else tensor

    if sample_weight is not None:
        sample_weight = merge(sample_weight, in_dims[3])
    merged = merge(scores, in_dims[0]), merge(target, in_dims[1]), weight, sample_weight
    return *merged, rows_shape


def _divisors(info: Any, options: Options, *tensors: Any) -> Tensor | float:
    """What the sum of each entry of the batch is divided by."""
    if options.reduction != "mean":
        return torch.ones((), dtype=torch.float64)
    if options.normalizer is not None:
        return torch.full((), options.normalizer, dtype=torch.float64)
    counted = _counted(*tensors, options.ignore_index)
    return counted.reshape(info.batch_size, -1).sum(1)


def _batch_probabilities(
    info: Any, in_dims: Any, log: bool, scores: Tensor, dim: int, backend: str | None
) -> tuple[Tensor, int]:
    (scores,), dim = _behind_batch(info, dim, (scores, in_dims[1]))
    return probabilities(log, scores, dim, backend), 0


def _batch_probabilities_backward(
    info: Any,
    in_dims: Any,
    log: bool,
    upstream: Tensor,
    result: Tensor,
    dim: int,
    backend: str | None,
) -> tuple[Tensor, int]:
    tensors, dim = _behind_batch(info, dim, (upstream, in_dims[1]), (result, in_dims[2]))
    return probabilities_backward(log, *tensors, dim, backend), 0


def _behind_batch(
    info: Any, dim: int, *pairs: tuple[Tensor, int | None]
) -> tuple[list[Tensor], int]:
    tensors = [_batched(info, tensor, in_dim) for tensor, in_dim in pairs]
    if tensors[0].dim() == 1:  # scalars: one class each
        raise NotImplementedError("vmap over softmax of scalars is not supported")
    return tensors, dim % (tensors[0].dim() - 1) + 1


loss = _operator("loss", _compute_loss, _fake_loss, _save_loss, _differentiate_loss, _batch_loss)
loss_backward = _operator(
    "loss_backward", _compute_loss_backward, _fake_loss_backward,
    _save_loss_backward, _differentiate_loss_backward, _batch_loss_backward,
)  # fmt: skip
probabilities = _operator(
    "probabilities", compute_probabilities, _fake_probabilities,
    _save_probabilities, _differentiate_probabilities, _batch_probabilities,
)  # fmt: skip
probabilities_backward = _operator(
    "probabilities_backward", _compute_probabilities_backward, _fake_probabilities_backward,
    _save_probabilities_backward, _differentiate_probabilities_backward,
    _batch_probabilities_backward,
)  # fmt: skip


# ---------------------------------------------------------------------------------------------
# Derivatives in terms of PyTorch's own operations, which have derivatives of any order
# ---------------------------------------------------------------------------------------------


def _row_factors(
    upstream: Tensor | float,
    scores: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    options: Options,
) -> Tensor:
    """What the derivatives of the row's loss count: 0 for rows that are left out."""
    if target.is_floating_point():
        rows = torch.ones(_rows_shape(scores), dtype=torch.float64, device="cpu")
    else:
        rows = _kept(target, options.ignore_index)[1].to(torch.float64)
    if sample_weight is not None:
        rows = rows * sample_weight
    if options.reduction == "mean":
        counted = (scores, target, weight, sample_weight, options.ignore_index)
        divisor = options.normalizer or _counted(*counted).sum()
        rows = torch.where(rows == 0, 0, rows / divisor)
    return (rows * upstream).to(compute_dtype(scores.dtype))


def _class_weights(scores: Tensor, weight: Tensor | None) -> Tensor:
    """In a shape that goes with the scores."""
    dim, num_classes = class_dim(scores), scores.shape[class_dim(scores)]
    if weight is None:
        weight = torch.ones(num_classes, device="cpu")
    shape = [1] * scores.dim()
    shape[dim] = num_classes
    return weight.to(compute_dtype(scores.dtype)).reshape(shape)


def _target_gradient(
    upstream: Tensor,
    scores: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    options: Options,
) -> Tensor:
    r"""With respect to probabilities t: (1 - e) r w_c (lse - x_c), r the factor of the row."""
    dim = class_dim(scores)
    r = _row_factors(upstream, scores, target, weight, sample_weight, options).unsqueeze(dim)
    log_p = torch.log_softmax(scores.to(r.dtype), dim)
    grad = -(1 - options.label_smoothing) * r * _class_weights(scores, weight) * log_p
    return grad.to(target.dtype)


def _second_derivatives(
    name: str,
    v: Tensor,
    upstream: Tensor,
    scores: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    r"""The derivatives of v . g, for the gradient g = r (a p - b [c = y] - (e / C) w_c).

    With respect to upstream, scores and, where they are probabilities, targets.  With :math:`p
    \cdot v` the mean of v, they are those of a softmax: r (a p (v - p.v) + 2 z p (p.v)).
    """
    dim = class_dim(scores)
    row = (scores, target, weight, sample_weight, options)
    unit, r = _row_factors(1.0, *row).unsqueeze(dim), _row_factors(upstream, *row).unsqueeze(dim)
    dtype, e, num_classes = r.dtype, options.label_smoothing, scores.shape[dim]
    w, v = _class_weights(scores, weight), v.to(dtype)
    soft = target.is_floating_point()
    if soft:
        share = w * ((1 - e) * target.to(dtype) + e / num_classes)
        a, pulled = share.sum(dim, keepdim=True), (share * v).sum(dim, keepdim=True)
    else:
        y = _kept(target, options.ignore_index)[0].unsqueeze(dim)
        b = (1 - e) * w.expand_as(scores).gather(dim, y)
        a = b + e / num_classes * w.sum()
        pulled = b * v.gather(dim, y) + e / num_classes * (w * v).sum(dim, keepdim=True)

    grad_scores = grad_target = None
    if name == "nll_loss":
        grad_upstream = -unit * pulled
    else:
        x = torch.where(unit == 0, 0, scores.to(dtype))  # a row that is left out may hold a NaN
        z_part = 2 * options.z_loss * torch.logsumexp(x, dim, keepdim=True)
        p = torch.softmax(x, dim)
        pv = (p * v).sum(dim, keepdim=True)
        grad_upstream = unit * ((a + z_part) * pv - pulled)
        curvature = (a + z_part) * p * (v - pv) + 2 * options.z_loss * p * pv
        grad_scores = (r * curvature).to(scores.dtype)
        if soft:
            grad_target = ((1 - e) * r * w * (pv - v)).to(target.dtype)
    grad_upstream = grad_upstream.squeeze(dim)
    if options.reduction != "none":
        grad_upstream = grad_upstream.sum()
    return grad_upstream.to(upstream.dtype), grad_scores, grad_target
