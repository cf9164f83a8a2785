"""The linear head under autograd: the scores of all rows never exist."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import fastloss as fl
from fastloss.torch import _compute, _ops
from fastloss.torch._compute import (
    Inputs,
    Options,
    loss_tensor,
    maybe_to_array,
    to_array,
    to_tensor,
)
from fastloss.torch._derivatives import counting, row_factors


class LinearInputs(NamedTuple):
    """The tensors of a linear layer and of the loss of its scores."""

    input: Tensor
    linear_weight: Tensor
    linear_bias: Tensor | None
    target: Tensor
    weight: Tensor | None
    sample_weight: Tensor | None

    def with_scores(self) -> Inputs:
        """The scores as PyTorch makes them; the dimensions of W between C and D go behind C."""
        w, b = self.linear_weight, self.linear_bias
        if w.dim() == 2:
            return Inputs(torch.nn.functional.linear(*self[:3]), *self[3:])
        b = None if b is None else b.flatten()
        scores = torch.nn.functional.linear(self.input, w.flatten(0, -2), b)
        return Inputs(scores.unflatten(1, w.shape[:-1]), *self[3:])


def check_shapes(inputs: LinearInputs) -> None:
    input, w, b = inputs[:3]
    if input.dim() not in (1, 2):
        raise ValueError(f"input has shape {tuple(input.shape)}, expected (D) or (N, D)")
    if w.dim() < 2 or w.shape[-1] != input.shape[-1]:
        raise ValueError(
            f"linear_weight has shape {tuple(w.shape)}, expected (C, ..., {input.shape[-1]}) for "
            f"input of shape {tuple(input.shape)}"
        )
    if w.dim() > 2 and input.dim() == 1:
        raise ValueError(f"linear_weight of shape {tuple(w.shape)} needs input of shape (N, D)")
    if b is not None and b.shape != w.shape[:-1]:
        raise ValueError(
            f"linear_bias has shape {tuple(b.shape)}, expected {tuple(w.shape[:-1])}, the shape of "
            "linear_weight without its last dimension"
        )


def is_fused(inputs: LinearInputs) -> bool:
    """Whether the package's own linear head takes them."""
    return (
        _ops.is_eager(*inputs)
        and not torch.is_autocast_enabled("cpu")
        and inputs.input.dtype in (torch.float32, torch.float64)
        and inputs.linear_weight.dim() == 2
        and not (inputs.target.requires_grad and torch.is_grad_enabled())
    )


class LinearLoss(torch.autograd.Function):
    """Cross-entropy of a linear layer, any of whose tensors needs a gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        linear_weight: Tensor,
        linear_bias: Tensor | None,
        target: Tensor,
        weight: Tensor | None,
        sample_weight: Tensor | None,
        options: Options,
        l2: float,
    ) -> Tensor:
        inputs = LinearInputs(input, linear_weight, linear_bias, target, weight, sample_weight)
        ctx.save_for_backward(*inputs)
        ctx.options, ctx.l2 = options, l2
        # As in _ops.Loss: for the first backward pass, and rows wait for theirs.
        ctx.gradients = []
        if options.reduction == "none":
            return losses(inputs, options, l2)
        loss, *gradients = _losses_and_gradients(inputs, options, l2, ctx.needs_input_grad)
        ctx.gradients.append(gradients)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        gradients = ctx.gradients.pop() if ctx.gradients else None
        alone = _ops.is_alone(upstream)
        if gradients is not None and alone:
            gradients = _times(gradients, upstream.item())
        else:
            compute = _gradients if alone else _differentiable_gradients
            inputs = LinearInputs(*ctx.saved_tensors)
            gradients = compute(upstream, inputs, ctx.options, ctx.l2, ctx.needs_input_grad)
        needed = zip(gradients, ctx.needs_input_grad[:3], strict=True)
        return *(grad if needs_it else None for grad, needs_it in needed), *[None] * 5


def losses(inputs: LinearInputs, options: Options, l2: float) -> Tensor:
    """The loss alone."""
    arrays, keywords = _arguments(inputs, options, l2)
    return loss_tensor(fl.linear_cross_entropy(*arrays, **keywords), inputs.input.dtype)


def _losses_and_gradients(
    inputs: LinearInputs, options: Options, l2: float, needed: Sequence[bool]
) -> list[Any]:
    """The loss and the gradients with respect to input, linear_weight and linear_bias."""
    arrays, keywords = _arguments(inputs, options, l2)
    loss, found = fl.linear_cross_entropy_with_grad(
        *arrays, inputs_grad=needed[0], linear_weight_grad=needed[1], **keywords
    )
    gradients = (found.inputs, found.linear_weight, found.linear_bias)
    total = loss_tensor(loss, inputs.input.dtype)
    return [total, *(g if g is None else to_tensor(g) for g in gradients)]


def _arguments(
    inputs: LinearInputs, options: Options, l2: float
) -> tuple[tuple[np.ndarray, ...], dict[str, Any]]:
    keywords = options._asdict()
    del keywords["name"]
    keywords |= {
        "linear_bias": maybe_to_array(inputs.linear_bias),
        "weight": maybe_to_array(inputs.weight),
        "sample_weight": maybe_to_array(inputs.sample_weight),
        "l2": l2,
        "num_threads": _compute.num_threads(),
    }
    arrays = to_array(inputs.input), to_array(inputs.linear_weight), to_array(inputs.target)
    return arrays, keywords


def _gradients(
    upstream: Tensor, inputs: LinearInputs, options: Options, l2: float, needed: Sequence[bool]
) -> list[Any]:
    """The gradients that are needed, given that with respect to the loss."""
    value = _compute.uniform(upstream)
    if value is not None:
        if options.reduction == "none":
            options = options._replace(reduction="sum")
        _, *gradients = _losses_and_gradients(inputs, options, l2, needed)
        return _times(gradients, value)

    rows = _compute.weighted_rows(upstream, inputs.sample_weight)
    if not bool(rows.isfinite().all()):
        return _differentiable_gradients(upstream, inputs, options, l2, needed)
    options = options._replace(reduction="sum")
    inputs = inputs._replace(sample_weight=rows)
    _, *gradients = _losses_and_gradients(inputs, options, l2, needed)
    return gradients


def _times(gradients: list[Any], value: float) -> list[Any]:
    return [g if g is None or value == 1.0 else g.mul_(value) for g in gradients]


def _differentiable_gradients(
    upstream: Tensor, inputs: LinearInputs, options: Options, l2: float, needed: Sequence[bool]
) -> list[Any]:
    """In terms of operations that have derivatives themselves."""
    factors = row_factors(1.0, Inputs(inputs.input, *inputs[3:]), options)  # its rows are theirs
    inputs = inputs._replace(input=counting(factors.unsqueeze(-1), inputs.input))
    with_scores = inputs.with_scores()
    g = _ops.loss_backward(upstream, *with_scores, *_ops.in_graph(options))
    rows = g.reshape(-1, g.shape[-1])
    grad_input = grad_weight = None
    if needed[0]:
        grad_input = g @ inputs.linear_weight
    if needed[1]:
        grad_weight = rows.T @ inputs.input.reshape(-1, inputs.input.shape[-1])
        if l2:
            grad_weight = grad_weight + 2 * l2 * upstream * inputs.linear_weight
    return [grad_input, grad_weight, rows.sum(0) if needed[2] else None]
