"""Losses, softmax and their gradients on CPU tensors, without copies; nothing of autograd here."""

import functools
import importlib
import math
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import fastloss as fl
from fastloss._threads import PARALLEL_ELEMENTS

HALVES = (torch.float16, torch.bfloat16)


class Inputs(NamedTuple):
    """The tensors that a loss takes."""

    scores: Tensor  # classes along dimension 1, or 0 where there is no batch
    target: Tensor
    weight: Tensor | None = None
    sample_weight: Tensor | None = None

    @property
    def dim(self) -> int:
        return class_dim(self.scores)

    @property
    def rows_shape(self) -> tuple[int, ...]:
        shape = self.scores.shape
        return (*shape[: self.dim], *shape[self.dim + 1 :])

    @property
    def soft(self) -> bool:
        return self.target.is_floating_point()


class Options(NamedTuple):
    """What it takes beside them, and which loss it is.

    The numbers are tensors in a graph, which would hold others to be constant.
    """

    label_smoothing: Any  # float or Tensor
    z_loss: Any
    normalizer: Any  # or None
    name: str  # "cross_entropy" or "nll_loss"
    ignore_index: int
    reduction: str
    backend: str | None


def class_dim(scores: Tensor) -> int:
    return min(1, scores.dim() - 1)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What losses are computed in."""
    return torch.float32 if dtype in HALVES else dtype


# ---------------------------------------------------------------------------------------------
# Between tensors and arrays: the same memory
# ---------------------------------------------------------------------------------------------


@functools.cache
def _ml_dtypes() -> ModuleType:
    try:
        return importlib.import_module("ml_dtypes")
    except ModuleNotFoundError as error:
        raise ImportError(
            "bfloat16 tensors need a type that NumPy lacks: run `pip install ml_dtypes`",
            name="ml_dtypes",
        ) from error


def to_array(tensor: Tensor) -> np.ndarray:
    if tensor.dtype is torch.bfloat16:
        return tensor.view(torch.int16).numpy(force=True).view(_ml_dtypes().bfloat16)
    return tensor.numpy(force=True)  # whatever autograd thinks of it


def maybe_to_array(tensor: Tensor | None) -> np.ndarray | None:
    return None if tensor is None else to_array(tensor)


def to_tensor(array: np.ndarray) -> Tensor:
    """A tensor on the memory of an array: NumPy's costs fewer page faults than PyTorch's own."""
    is_bfloat16 = array.dtype.kind == "V"  # its name takes a microsecond to make up
    bits = torch.from_numpy(array.view(np.int16) if is_bfloat16 else array)
    if not array.size:  # NumPy has strides of its own for it
        bits = bits.new_empty(array.shape)
    if not is_bfloat16:
        return bits
    # Not bits.view(torch.bfloat16): autograd treats views in ways of their own.
    result = torch.empty(0, dtype=torch.bfloat16, device="cpu")
    return result.set_(bits.untyped_storage(), 0, bits.shape, bits.stride())  # type: ignore[call-overload]


def num_threads(elements: int = PARALLEL_ELEMENTS) -> int:
    """As few as torch.set_num_threads and our own settings ask for, with so many array elements."""
    if elements < PARALLEL_ELEMENTS:
        return 1
    return min(torch.get_num_threads(), fl.get_num_threads())


# ---------------------------------------------------------------------------------------------
# Losses
# ---------------------------------------------------------------------------------------------


def losses(inputs: Inputs, options: Options) -> Tensor:
    """The loss alone, in the dtype that it is computed in."""
    loss = _call(getattr(fl, options.name), inputs, options)
    return loss_tensor(loss, inputs.scores.dtype)


def losses_and_gradient(
    inputs: Inputs, options: Options, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Both from one pass; the gradient is that of the sum where the losses are not reduced."""
    function = getattr(fl, options.name + "_with_grad")
    if out is not None:
        function = functools.partial(function, out=to_array(out))
    loss, grad = _call(function, inputs, options)
    return loss_tensor(loss, inputs.scores.dtype), to_tensor(grad) if out is None else out


def _call(function: Any, inputs: Inputs, options: Options) -> Any:
    scores, target, weight, sample_weight = inputs
    label_smoothing, z_loss, normalizer, name, ignore_index, reduction, backend = options
    if name == "nll_loss":
        function = functools.partial(_without_smoothing, function)
    return function(
        to_array(scores),
        to_array(target),
        weight=maybe_to_array(weight),
        sample_weight=maybe_to_array(sample_weight),
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        reduction=reduction,
        normalizer=normalizer,
        axis=class_dim(scores),
        backend=backend,
        num_threads=num_threads(scores.numel()),
    )


def _without_smoothing(
    function: Any, *arrays: np.ndarray, label_smoothing: float, z_loss: float, **options: Any
) -> Any:
    return function(*arrays, **options)


def loss_tensor(loss: float | np.ndarray, dtype: torch.dtype) -> Tensor:
    """A loss of scores of a dtype, in the one that it is computed in."""
    if not isinstance(loss, np.ndarray):
        loss = np.array(loss, np.float64 if dtype is torch.float64 else np.float32)
    return to_tensor(loss)


def gradient(
    upstream: Tensor, inputs: Inputs, options: Options, out: Tensor | None = None
) -> Tensor:
    """The gradient with respect to the scores, given that with respect to the loss.

    It is rounded once: the kernels take `upstream` as their divisor, which is positive, or as
    weights of the rows.  Both are finite; what is not costs another pass.
    """
    value = uniform(upstream)
    if value is not None:
        if options.reduction == "none":
            options = options._replace(reduction="sum")
        options, factor = _divided(value, inputs, options)
        _, grad = losses_and_gradient(inputs, options, out)
        return times(grad, factor)

    options = options._replace(reduction="sum")
    rows = weighted_rows(upstream, inputs.sample_weight)
    if not bool(rows.isfinite().all()):
        _, grad = losses_and_gradient(inputs, options, out)
        return times(grad, upstream)
    _, grad = losses_and_gradient(inputs._replace(sample_weight=rows), options, out)
    return grad


def weighted_rows(upstream: Tensor, sample_weight: Tensor | None) -> Tensor:
    """Gradients with respect to the losses of the rows, as weights of these."""
    rows = upstream.detach().to(torch.float64)
    return rows if sample_weight is None else rows * sample_weight.detach()


def uniform(tensor: Tensor) -> float | None:
    """The one number that a tensor holds, expanded perhaps, as the gradient of a sum is."""
    if tensor.numel() == 1 or (tensor.numel() and not any(tensor.stride())):
        return float(tensor.detach()[(0,) * tensor.dim()])
    return None


def times(grad: Tensor, factor: Tensor | float) -> Tensor:
    """Multiply a gradient in place, by a number or by one per row."""
    if isinstance(factor, Tensor):
        return grad.mul_(factor.unsqueeze(class_dim(grad)))
    return grad if factor == 1.0 else grad.mul_(factor)


def times_each(grad: Tensor, upstream: Tensor, dim: int) -> Tensor:
    """A gradient for each upstream of a batch, of which `grad` has the memory of one only."""
    return grad * (upstream.unsqueeze(dim) if upstream.dim() else upstream)


def _divided(value: float, inputs: Inputs, options: Options) -> tuple[Options, float]:
    """Options that make the gradient `value` times as large, but for a factor: that, too."""
    if value == 1.0:
        return options, 1.0
    divisor = 1.0
    if options.reduction == "mean":
        divisor = options.normalizer or float(counted(inputs, options.ignore_index).sum())
    normalizer = divisor / value if value else math.inf
    if not 0.0 < abs(normalizer) < math.inf:  # NaN, infinite, 0; or no row counts
        return options, value
    divided = options._replace(reduction="mean", normalizer=abs(normalizer))
    return divided, math.copysign(1.0, normalizer)


def counted(inputs: Inputs, ignore_index: int) -> Tensor:
    """What each row adds to the divisor of the mean, in float64."""
    if inputs.soft:
        result = torch.ones(inputs.rows_shape, dtype=torch.float64, device="cpu")
    else:
        index, kept = indices(inputs.target, ignore_index)
        result = kept.to(torch.float64)
        if inputs.weight is not None:
            result = result * inputs.weight.to(torch.float64)[index]
    return result if inputs.sample_weight is None else result * inputs.sample_weight


def indices(target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Indices to look up, 0 for ignored rows, and which rows are not ignored."""
    index = target.to(torch.int64)
    kept = index != ignore_index
    return torch.where(kept, index, 0), kept


# ---------------------------------------------------------------------------------------------
# Softmax
# ---------------------------------------------------------------------------------------------


def probabilities(scores: Tensor, log: bool, dim: int, backend: str | None) -> Tensor:
    function = fl.log_softmax if log else fl.softmax
    return _mapped(function, (scores,), dim, backend)


def probabilities_backward(
    upstream: Tensor, result: Tensor, log: bool, dim: int, backend: str | None
) -> Tensor:
    function = fl.log_softmax_backward if log else fl.softmax_backward
    return _mapped(function, (upstream, result), dim, backend)


def _mapped(function: Any, tensors: tuple[Tensor, ...], dim: int, backend: str | None) -> Tensor:
    shape = tensors[0].shape
    if 0 in shape:
        return tensors[0].new_empty(shape)
    arrays = [to_array(tensor) for tensor in tensors]
    if not shape:  # a scalar is one class
        arrays = [array.reshape(1) for array in arrays]
    threads = num_threads(tensors[0].numel())
    result = function(*arrays, dim, backend=backend, num_threads=threads)
    return to_tensor(result if shape else result.reshape(()))
