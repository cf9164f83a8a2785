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
from torch._C import (
    _are_functorch_transforms_active,
    _get_tracing_state,
    _len_torch_dispatch_stack,
)
from torch._C._functorch import is_functorch_wrapped_tensor, is_legacy_batchedtensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.nn import Parameter
from torch.overrides import has_torch_function_variadic

from fastloss import _arguments
from fastloss.torch import _compute, _derivatives
from fastloss.torch._compute import HALVES, Inputs, Options

_STRIDED = torch.strided


def is_plain(*tensors: Any) -> bool:
    """Whether they are dense ones on the CPU, which nothing but eager autograd is to see.

    It answers for most calls what `functional.unsuited` and the like find out with more words.
    """
    if not is_eager(*tensors) or has_torch_function_variadic(*tensors):
        return False
    for tensor in tensors:
        if (
            (type(tensor) is not Tensor and type(tensor) is not Parameter)
            or not tensor.is_cpu
            or tensor.layout is not _STRIDED
            or tensor.is_nested
            or is_functorch_wrapped_tensor(tensor)  # one that has outlived its transform
        ):
            return False
    return True


def is_eager(*tensors: Any) -> bool:
    """Whether nothing but eager autograd is to see what happens to the tensors."""
    if (
        is_compiling()
        or _are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or _len_torch_dispatch_stack() > 0
        or _get_tracing_state() is not None
    ):
        return False
    for tensor in tensors:
        if isinstance(tensor, Tensor) and (
            is_legacy_batchedtensor(tensor)
            or type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__
        ):
            return False
    return True


def is_alone(upstream: Tensor) -> bool:
    """Whether nothing but the gradient is asked of a backward pass."""
    return not torch.is_grad_enabled() and is_eager(upstream)


def _is_batched(*tensors: Any) -> bool:
    """Whether one is a batch to ``is_grads_batched=True``, which is not of `torch.func`."""
    return any(isinstance(tensor, Tensor) and is_legacy_batchedtensor(tensor) for tensor in tensors)


def _is_traced(*tensors: Any) -> bool:
    """Whether there is someone to note down operators."""
    if _len_torch_dispatch_stack() > 0 or _get_tracing_state() is not None:
        return True
    return any(
        isinstance(tensor, Tensor)
        and type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__
        for tensor in tensors
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
        ctx.options = options
        if inplace:
            ctx.gradients, ctx.spent = None, False
            loss, _ = _compute.losses_and_gradient(inputs, options, scores.detach())
            # Whoever has saved the scores shall hear of it, and we of whoever changes the gradient.
            torch.autograd.graph.increment_version(scores)
            ctx.save_for_backward(scores)
            return loss
        # The gradient of this pass goes to the first backward pass, whose caller may keep it and
        # write to it.  Another backward pass computes another one.
        ctx.gradients = []
        bare = weight is None and sample_weight is None
        ctx.save_for_backward(*(inputs[:2] if bare else inputs))
        # Rows wait for the gradients with respect to their losses.
        if not ctx.needs_input_grad[0] or options.reduction == "none":
            return _compute.losses(inputs, options)
        loss, grad = _compute.losses_and_gradient(inputs, options)
        ctx.gradients.append(grad)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        if ctx.gradients is None:
            return _gradient_in_place(ctx, upstream), *[None] * 5
        grad = ctx.gradients.pop() if ctx.gradients else None
        alone = is_alone(upstream)
        target_needs_it = ctx.needs_input_grad[1]
        if grad is not None and alone and not target_needs_it:
            value = upstream.item()
            # Of a half type it has been rounded: unless it is right as it is, compute it anew.
            if value == 1.0 or grad.dtype not in HALVES:
                return _compute.times(grad, value), *[None] * 5
        inputs, options = Inputs(*ctx.saved_tensors), ctx.options
        if not ctx.needs_input_grad[0]:
            grad = None
        elif alone:
            grad = _compute.gradient(upstream, inputs, options, grad)
        else:
            grad = loss_backward(upstream, *inputs, *in_graph(options))
        target_grad = None
        if target_needs_it:
            target_grad = _derivatives.target_gradient(upstream, inputs, options)
        return grad, target_grad, *[None] * 4


def _gradient_in_place(ctx: Any, upstream: Tensor) -> Tensor:
    if ctx.spent or torch.is_grad_enabled():
        what = "differentiate twice" if torch.is_grad_enabled() else "go backward again"
        raise RuntimeError(
            f"cannot {what} through {ctx.options.name} with inplace=True: "
            "the gradient has replaced the scores"
        )
    grad = ctx.saved_tensors[0].detach()  # or PyTorch's error: it has been changed
    ctx.spent = True
    if not is_alone(upstream):
        return _compute.times_each(grad, upstream, _compute.class_dim(grad))
    value = _compute.uniform(upstream)
    return _compute.times(grad, upstream if value is None else value)


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
        alone = is_alone(upstream)
        function = _compute.probabilities_backward if alone else probabilities_backward
        return function(upstream, *ctx.saved_tensors, *ctx.options), None, None, None


# `apply` looks for what has to do with `torch.func` first, which takes as long as a small loss; of
# plain tensors it has been found out.
plain_loss = super(torch.autograd.Function, Loss).apply
plain_probabilities = super(torch.autograd.Function, Probabilities).apply


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

    The latter take an ``autograd.Function`` only; who traces them sees the operator below it.  Of a
    batch for ``is_grads_batched=True`` PyTorch gives the operator one entry after another.
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
        if is_compiling() or _is_batched(*arguments):
            return op(*arguments)
        return function.apply(*arguments)

    return call


def in_graph(options: Options) -> Options:
    """The options as operators take them, with tensors for the numbers.

    A graph keeps a number as it is, and may change from step to step what is in a tensor.
    """
    label_smoothing, z_loss, normalizer = map(_to_tensor, options[:3])
    return options._replace(label_smoothing=label_smoothing, z_loss=z_loss, normalizer=normalizer)


def _to_tensor(number: Any) -> Tensor | None:
    if number is None:
        return None
    if isinstance(number, Tensor):
        number = number.detach().cpu()
    # A product: torch.compile takes `number` in torch.tensor(number) for constant.
    return torch.ones((), dtype=torch.float64, device="cpu") * number


def _floats(
    label_smoothing: Tensor, z_loss: Tensor, normalizer: Tensor | None
) -> tuple[float, float, float | None]:
    divisor = None if normalizer is None else float(normalizer)
    return float(label_smoothing), float(z_loss), divisor


# What a kernel returns, without its contents: with the strides that it gives it.


def _fake_like(scores: Tensor) -> Tensor:
    return _fake(scores, scores.shape, _memory_order(scores))


def _memory_order(scores: Tensor) -> tuple[int, ...] | None:
    if scores.is_contiguous():
        return None
    return _arguments.memory_order(scores.shape, scores.stride())


def _fake(
    scores: Tensor, shape: tuple[int, ...], order: tuple[int, ...] | None, **options: Any
) -> Tensor:
    if order is None:
        return scores.new_empty(shape, **options)
    in_memory = scores.new_empty([shape[d] for d in order], **options)
    return in_memory.permute([order.index(d) for d in range(len(order))])


# The loss: Inputs and Options, spelled out for its schema.


def _compute_loss(
    scores: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    label_smoothing: Tensor,
    z_loss: Tensor,
    normalizer: Tensor | None,
    name: str,
    ignore_index: int,
    reduction: str,
    backend: str | None,
) -> Tensor:
    numbers = _floats(label_smoothing, z_loss, normalizer)
    options = Options(*numbers, name, ignore_index, reduction, backend)
    return _compute.losses(Inputs(scores, target, weight, sample_weight), options)


def _fake_loss(*arguments: Any) -> Tensor:
    inputs, options = Inputs(*arguments[:4]), Options(*arguments[4:])
    shape: tuple[int, ...] = ()
    order = None
    if options.reduction == "none":
        shape = inputs.rows_shape
        order = _arguments.rows_order(_memory_order(inputs.scores), inputs.dim)
    dtype = _compute.compute_dtype(inputs.scores.dtype)
    return _fake(inputs.scores, shape, order, dtype=dtype)


def _save_loss(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.options = inputs[7:]


def _differentiate_loss(ctx: Any, upstream: Tensor) -> Any:
    tensors = ctx.saved_tensors
    inputs, options = Inputs(*tensors[:4]), Options(*tensors[4:], *ctx.options)
    grad = target_grad = None
    if ctx.needs_input_grad[0]:
        grad = loss_backward(upstream, *inputs, *options)
    if ctx.needs_input_grad[1]:
        target_grad = _derivatives.target_gradient(upstream, inputs, options)
    return grad, target_grad, *[None] * 9


def _batch_loss(info: Any, in_dims: Any, *arguments: Any) -> tuple[Tensor, int]:
    """The entries of a batch are so many more rows."""
    options = Options(*arguments[4:])
    merged, rows_shape = _merged(info, in_dims[:6], *arguments[:6])
    rows = loss(*merged, *options._replace(reduction="none", normalizer=None))
    rows = rows.reshape(info.batch_size, *rows_shape)
    if options.reduction == "none":
        return rows, 0
    total = rows.to(torch.float64).reshape(info.batch_size, -1).sum(1)
    divisors = _divisors(info, in_dims[6], merged, options)
    return torch.where(divisors == 0, math.nan, total / divisors).to(rows.dtype), 0


loss = _operator("loss", _compute_loss, _fake_loss, _save_loss, _differentiate_loss, _batch_loss)


# Its gradient.


def _compute_loss_backward(
    upstream: Tensor,
    scores: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    label_smoothing: Tensor,
    z_loss: Tensor,
    normalizer: Tensor | None,
    name: str,
    ignore_index: int,
    reduction: str,
    backend: str | None,
) -> Tensor:
    numbers = _floats(label_smoothing, z_loss, normalizer)
    options = Options(*numbers, name, ignore_index, reduction, backend)
    return _compute.gradient(upstream, Inputs(scores, target, weight, sample_weight), options)


def _fake_loss_backward(upstream: Tensor, scores: Tensor, *rest: Any) -> Tensor:
    return _fake_like(scores)


def _save_loss_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:8])
    ctx.options = inputs[8:]


def _differentiate_loss_backward(ctx: Any, v: Tensor) -> Any:
    upstream, *tensors = ctx.saved_tensors
    inputs, options = Inputs(*tensors[:4]), Options(*tensors[4:], *ctx.options)
    grads = _derivatives.second_derivatives(v, upstream, inputs, options)
    return *grads, *[None] * 9


def _batch_loss_backward(info: Any, in_dims: Any, *arguments: Any) -> tuple[Tensor, int]:
    options = Options(*arguments[5:])
    merged, rows_shape = _merged(info, in_dims[1:7], *arguments[1:7])
    upstream = _in_front(info, arguments[0], in_dims[0])
    if options.reduction != "none":
        divisors = _divisors(info, in_dims[7], merged, options)
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
    scores, target, weight, sample_weight = tensors[:4]
    if in_dims[2] is not None:
        raise NotImplementedError("vmap over weight, the weights of the classes, is not supported")
    for name, in_dim in zip(Options._fields, in_dims[4:], strict=False):
        if in_dim is not None:
            raise NotImplementedError(f"vmap over {name} is not supported")
    scores = _in_front(info, scores, in_dims[0])
    rows_shape = Inputs(scores[0], *tensors[1:4]).rows_shape
    target = _in_front(info, target, in_dims[1])
    if sample_weight is not None:
        sample_weight = _in_front(info, sample_weight, in_dims[3])
    if rows_shape:
        scores, target = scores.flatten(0, 1), target.flatten(0, 1)
        sample_weight = None if sample_weight is None else sample_weight.flatten(0, 1)
    return Inputs(scores, target, weight, sample_weight), rows_shape


def _divisors(info: Any, in_dim: int | None, merged: Inputs, options: Options) -> Tensor:
    """What the sum of each entry is divided by."""
    if options.reduction == "mean" and options.normalizer is None:
        counted = _compute.counted(merged, options.ignore_index)
        return counted.reshape(info.batch_size, -1).sum(1)
    if options.normalizer is None:
        return torch.ones(info.batch_size, dtype=torch.float64, device="cpu")
    return _in_front(info, options.normalizer, in_dim)


# softmax and log_softmax.


def _compute_probabilities(scores: Tensor, log: bool, dim: int, backend: str | None) -> Tensor:
    return _compute.probabilities(scores, log, dim, backend)


def _fake_probabilities(scores: Tensor, *options: Any) -> Tensor:
    return _fake_like(scores)


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
    return _fake_like(result)


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
