"""The operations as PyTorch sees them, in two layers.

`Loss` and `Probabilities` are what eager code runs: a call costs little, and the gradient of a
reduced loss comes from the same pass as the loss.  Below are operators, loss and gradient apart,
for ``torch.compile``, ``torch.func``, fake tensors and second derivatives.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastloss.torch import _compute, _derivatives
from fastloss.torch._compute import HALVES, Inputs, Options


def is_eager(*tensors: Tensor | None) -> bool:
    """Whether nothing but eager autograd is to see what happens to the tensors."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
        or _is_traced(*tensors)
    )


def _is_traced(*tensors: Any) -> bool:
    """Whether there is someone to note down operators."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or any(
            isinstance(t, Tensor) and type(t).__torch_dispatch__ is not Tensor.__torch_dispatch__
            for t in tensors
        )
    )


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
        options: Options,
        inplace: bool,
    ) -> Tensor:
        inputs = Inputs(scores, target, weight, sample_weight)
        ctx.options, ctx.inplace = options, inplace
        # The gradient of this pass goes to the first backward pass, whose caller may keep it and
        # write to it.  Another backward pass computes another one.
        ctx.gradients = []
        if not inplace:
            ctx.save_for_backward(*inputs)
            # Rows wait for the gradients with respect to their losses.
            if not ctx.needs_input_grad[0] or options.reduction == "none":
                return _compute.losses(inputs, options)
        out = scores.detach() if inplace else None
        loss, grad = _compute.losses_and_gradient(inputs, options, out)
        if inplace:  # whoever has saved the scores for a backward pass shall hear of it
            torch.autograd.graph.increment_version(scores)
        ctx.gradients.append(grad)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        options, differentiable = ctx.options, torch.is_grad_enabled()
        grad = ctx.gradients.pop() if ctx.gradients else None
        if ctx.inplace:
            if grad is None or differentiable:
                what = "differentiate twice" if differentiable else "go backward again"
                raise RuntimeError(
                    f"cannot {what} through {options.name} with inplace=True: "
                    "the gradient has replaced the scores"
                )
            value = _compute.uniform(upstream)
            return _compute.times(grad, upstream if value is None else value), *[None] * 5

        target_needs_it = ctx.needs_input_grad[1]
        if grad is not None and not differentiable and not target_needs_it:
            value = upstream.item()
            # Of a half type it has been rounded: unless it is right as it is, compute it anew.
            if value == 1.0 or grad.dtype not in HALVES:
                return _compute.times(grad, value), *[None] * 5
        inputs = Inputs(*ctx.saved_tensors)
        if not ctx.needs_input_grad[0]:
            grad = None
        elif differentiable:
            grad = loss_backward(upstream, *inputs, *options)
        else:
            grad = _compute.gradient(upstream, inputs, options, grad)
        target_grad = None
        if target_needs_it:
            target_grad = _derivatives.target_gradient(upstream, inputs, options)
        return grad, target_grad, *[None] * 4


class Probabilities(torch.autograd.Function):
    """softmax or log_softmax."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, log: bool, dim: int, backend: str | None) -> Tensor:
        result = _compute.probabilities(scores, log, dim, backend)
        ctx.save_for_backward(result)
        ctx.options = log, dim, backend
        return result

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        differentiable = torch.is_grad_enabled()
        function = probabilities_backward if differentiable else _compute.probabilities_backward
        return function(upstream, *ctx.saved_tensors, *ctx.options), None, None, None


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

    The latter take an ``autograd.Function`` only; who traces them sees the operator below it.
    """
    op = torch.library.custom_op(f"fastloss::{name}", compute, mutates_args=(), device_types="cpu")
    op.register_fake(fake)
    op.register_autograd(differentiate, setup_context=save)
    op.register_vmap(batch)

    def forward(*arguments: Any) -> Tensor:
        return op(*arguments) if _is_traced(*arguments) else compute(*arguments)

    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(
            f"fastloss.torch has no forward-mode derivative of its {name}; use reverse mode, as in "
            "torch.func.grad, jacrev and vjp"
        )

    parts: dict[str, Any] = {
        "forward": forward, "setup_context": save, "backward": differentiate, "vmap": batch,
        "jvp": jvp,
    }  # fmt: skip
    methods = {key: staticmethod(part) for key, part in parts.items()}
    function: Any = type(f"fastloss_{name}", (torch.autograd.Function,), methods)

    def call(*arguments: Any) -> Any:
        return op(*arguments) if torch.compiler.is_compiling() else function.apply(*arguments)

    return call


# The loss: Inputs and Options, spelled out for its schema.


def _compute_loss(
    scores: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    name: str,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    reduction: str,
    normalizer: float | None,
    backend: str | None,
) -> Tensor:
    options = Options(name, ignore_index, label_smoothing, z_loss, reduction, normalizer, backend)
    return _compute.losses(Inputs(scores, target, weight, sample_weight), options)


def _fake_loss(*arguments: Any) -> Tensor:
    inputs, options = Inputs(*arguments[:4]), Options(*arguments[4:])
    shape = inputs.rows_shape if options.reduction == "none" else ()
    return inputs.scores.new_empty(shape, dtype=_compute.compute_dtype(inputs.scores.dtype))


def _save_loss(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.options = Options(*inputs[4:])


def _differentiate_loss(ctx: Any, upstream: Tensor) -> Any:
    inputs = Inputs(*ctx.saved_tensors)
    grad = target_grad = None
    if ctx.needs_input_grad[0]:
        grad = loss_backward(upstream, *inputs, *ctx.options)
    if ctx.needs_input_grad[1]:
        target_grad = _derivatives.target_gradient(upstream, inputs, ctx.options)
    return grad, target_grad, *[None] * 9


def _batch_loss(info: Any, in_dims: Any, *arguments: Any) -> tuple[Tensor, int]:
    """The entries of a batch are so many more rows."""
    options = Options(*arguments[4:])
    merged, rows_shape = _merged(info, in_dims[:4], *arguments[:4])
    rows = loss(*merged, *options._replace(reduction="none", normalizer=None))
    rows = rows.reshape(info.batch_size, *rows_shape)
    if options.reduction == "none":
        return rows, 0
    total = rows.to(torch.float64).reshape(info.batch_size, -1).sum(1)
    divisors = _divisors(info, merged, options)
    return torch.where(divisors == 0, math.nan, total / divisors).to(rows.dtype), 0


loss = _operator("loss", _compute_loss, _fake_loss, _save_loss, _differentiate_loss, _batch_loss)


# Its gradient.


def _compute_loss_backward(
    upstream: Tensor,
    scores: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    name: str,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    reduction: str,
    normalizer: float | None,
    backend: str | None,
) -> Tensor:
    options = Options(name, ignore_index, label_smoothing, z_loss, reduction, normalizer, backend)
    return _compute.gradient(upstream, Inputs(scores, target, weight, sample_weight), options)


def _fake_loss_backward(upstream: Tensor, scores: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(scores)


def _save_loss_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.options = Options(*inputs[5:])


def _differentiate_loss_backward(ctx: Any, v: Tensor) -> Any:
    upstream, *tensors = ctx.saved_tensors
    grads = _derivatives.second_derivatives(v, upstream, Inputs(*tensors), ctx.options)
    return *grads, *[None] * 9


def _batch_loss_backward(info: Any, in_dims: Any, *arguments: Any) -> tuple[Tensor, int]:
    options = Options(*arguments[5:])
    merged, rows_shape = _merged(info, in_dims[1:5], *arguments[1:5])
    upstream = _in_front(info, arguments[0], in_dims[0])
    if options.reduction != "none":
        divisors = _divisors(info, merged, options)
        upstream = torch.where(divisors == 0, 0, upstream / divisors)
        upstream = upstream.reshape(-1, *[1] * len(rows_shape)).expand(-1, *rows_shape)
    upstream = upstream.reshape(merged.rows_shape)
    grad = loss_backward(upstream, *merged, *options._replace(reduction="none", normalizer=None))
    if rows_shape:
        grad = grad.unflatten(0, (info.batch_size, rows_shape[0]))
    return grad, 0


loss_backward = _operator(
    "loss_backward",
    _compute_loss_backward,
    _fake_loss_backward,
    _save_loss_backward,
    _differentiate_loss_backward,
    _batch_loss_backward,
)


def _in_front(info: Any, tensor: Tensor, in_dim: int | None) -> Tensor:
    """With the batch as the first dimension, made up where there is none."""
    if in_dim is None:
        return tensor.expand(info.batch_size, *tensor.shape)
    return tensor.movedim(in_dim, 0)


def _merged(info: Any, in_dims: Any, *tensors: Any) -> tuple[Inputs, tuple[int, ...]]:
    """Inputs whose rows are those of all entries, and the shape of the rows of one entry."""
    scores, target, weight, sample_weight = tensors
    if in_dims[2] is not None:
        raise NotImplementedError("vmap over weight, the weights of the classes, is not supported")
    scores = _in_front(info, scores, in_dims[0])
    rows_shape = Inputs(scores[0], *tensors[1:]).rows_shape
    target = _in_front(info, target, in_dims[1])
    if sample_weight is not None:
        sample_weight = _in_front(info, sample_weight, in_dims[3])
    if rows_shape:
        scores, target = scores.flatten(0, 1), target.flatten(0, 1)
        sample_weight = None if sample_weight is None else sample_weight.flatten(0, 1)
    return Inputs(scores, target, weight, sample_weight), rows_shape


def _divisors(info: Any, merged: Inputs, options: Options) -> Tensor:
    """What the sum of each entry is divided by."""
    if options.reduction == "mean" and options.normalizer is None:
        counted = _compute.counted(merged, options.ignore_index)
        return counted.reshape(info.batch_size, -1).sum(1)
    divisor = 1.0 if options.normalizer is None else options.normalizer
    return torch.full((info.batch_size,), divisor, dtype=torch.float64, device="cpu")


# softmax and log_softmax.


def _compute_probabilities(scores: Tensor, log: bool, dim: int, backend: str | None) -> Tensor:
    return _compute.probabilities(scores, log, dim, backend)


def _fake_probabilities(scores: Tensor, *options: Any) -> Tensor:
    return torch.empty_like(scores)


def _save_probabilities(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(output)
    ctx.options = inputs[1:]


def _differentiate_probabilities(ctx: Any, upstream: Tensor) -> Any:
    return probabilities_backward(upstream, *ctx.saved_tensors, *ctx.options), None, None, None


def _batch_probabilities(
    info: Any, in_dims: Any, scores: Tensor, log: bool, dim: int, backend: str | None
) -> tuple[Tensor, int]:
    scores = _in_front(info, scores, in_dims[0])
    return _behind_batch(probabilities, (scores,), log, dim, backend), 0


def _behind_batch(
    function: Any, tensors: tuple[Tensor, ...], log: bool, dim: int, backend: str | None
) -> Any:
    dims = tensors[0].dim() - 1
    if dims == 0:  # scalars are one class each
        columns = [tensor.unsqueeze(1) for tensor in tensors]
        return function(*columns, log, 1, backend).squeeze(1)
    return function(*tensors, log, dim % dims + 1, backend)


probabilities = _operator(
    "probabilities",
    _compute_probabilities,
    _fake_probabilities,
    _save_probabilities,
    _differentiate_probabilities,
    _batch_probabilities,
)


# Their gradient.


def _compute_probabilities_backward(
    upstream: Tensor, result: Tensor, log: bool, dim: int, backend: str | None
) -> Tensor:
    return _compute.probabilities_backward(upstream, result, log, dim, backend)


def _fake_probabilities_backward(upstream: Tensor, result: Tensor, *options: Any) -> Tensor:
    return torch.empty_like(result)


def _save_probabilities_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.options = inputs[2:4]


def _differentiate_probabilities_backward(ctx: Any, v: Tensor) -> Any:
    grads = _derivatives.probabilities_second_derivatives(v, *ctx.saved_tensors, *ctx.options)
    return *grads, None, None, None


def _batch_probabilities_backward(
    info: Any,
    in_dims: Any,
    upstream: Tensor,
    result: Tensor,
    log: bool,
    dim: int,
    backend: str | None,
) -> tuple[Tensor, int]:
    tensors = _in_front(info, upstream, in_dims[0]), _in_front(info, result, in_dims[1])
    return _behind_batch(probabilities_backward, tensors, log, dim, backend), 0


probabilities_backward = _operator(
    "probabilities_backward",
    _compute_probabilities_backward,
    _fake_probabilities_backward,
    _save_probabilities_backward,
    _differentiate_probabilities_backward,
    _batch_probabilities_backward,
)
