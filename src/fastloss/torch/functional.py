"""Functions with the names and the arguments of those in ``torch.nn.functional``."""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from fastloss import _arguments
from fastloss.torch import _compute, _ops
from fastloss.torch._compute import Inputs, Options

_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def softmax(
    input: Tensor,
    dim: int | None = None,
    _stacklevel: int = 3,
    dtype: torch.dtype | None = None,
    *,
    backend: str | None = None,
    fallback: bool = False,
) -> Tensor:
    r"""Probabilities from scores, as `torch.nn.functional.softmax`.

    .. math:: p_c = \exp(x_c - m) / \sum_k \exp(x_k - m), \qquad m = \max_k x_k

    Parameters
    ----------
    input : Tensor of float32, float64, float16 or bfloat16
        The scores x.  Half types are computed in float32 and rounded once.
    dim : int
        The class dimension, which must be given.
    dtype : torch.dtype, optional
        What `input` is converted to first, and the dtype of the result.
    backend : {"auto", "cython", "numba", "numpy"}, optional
        See `fastloss.set_backend`.
    fallback : bool
        Whether PyTorch's own function computes what the kernels cannot: tensors on other devices,
        sparse or quantized ones.  Else they are a TypeError.

    Returns
    -------
    Tensor
        Shape of `input`; differentiable, twice as well.

    Raises
    ------
    TypeError
        If a tensor is of a device, layout or dtype that the kernels do not take.
    ValueError
        If an option is wrong, or `dim` is not given.
    IndexError
        If `dim` is out of range.
    ImportError
        If the backend that was asked for is not there.

    Examples
    --------
    >>> import torch
    >>> from fastloss.torch import softmax
    >>> softmax(torch.tensor([5.0, 4.0, 2.0]), dim=0)
    tensor([0.7054, 0.2595, 0.0351])
    """
    return _map(softmax, input, dim, dtype, backend, fallback)


def log_softmax(
    input: Tensor,
    dim: int | None = None,
    _stacklevel: int = 3,
    dtype: torch.dtype | None = None,
    *,
    backend: str | None = None,
    fallback: bool = False,
) -> Tensor:
    r"""Logarithms of the probabilities, as `torch.nn.functional.log_softmax`.

    .. math:: l_c = (x_c - m) - \log \sum_k \exp(x_k - m), \qquad m = \max_k x_k

    Parameters and errors are those of `softmax`.

    Returns
    -------
    Tensor
        Shape of `input`; exact where the probability rounds to 0 or 1.

    Examples
    --------
    >>> import torch
    >>> from fastloss.torch import log_softmax
    >>> log_softmax(torch.tensor([5.0, 4.0, 2.0]), dim=0)
    tensor([-0.3490, -1.3490, -3.3490])
    """
    return _map(log_softmax, input, dim, dtype, backend, fallback)


def _map(
    function: Any,
    input: Tensor,
    dim: int | None,
    dtype: torch.dtype | None,
    backend: str | None,
    fallback: bool,
) -> Tensor:
    name = function.__name__
    if has_torch_function_variadic(input):
        keywords = {"dtype": dtype, "backend": backend, "fallback": fallback}
        return handle_torch_function(function, (input,), input, dim=dim, **keywords)
    if dim is None:
        raise ValueError(f"dim is not given: {name} does not guess the class dimension")
    if problem := _unsuited(input=input):
        if fallback:
            return getattr(torch, name)(input, dim, dtype=dtype)
        raise TypeError(problem)
    if dtype is not None:
        input = input.to(dtype)
    _check_float("input", input)
    dims = max(input.dim(), 1)
    if not -dims <= dim < dims:
        raise IndexError(f"dim = {dim} is out of range for input of shape {tuple(input.shape)}")
    arguments = (input, name == "log_softmax", dim, backend)
    if not _ops.is_eager(input):
        return _ops.probabilities(*arguments)
    if input.requires_grad and torch.is_grad_enabled():
        return _ops.Probabilities.apply(*arguments)
    return _compute.probabilities(*arguments)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: None = None,
    ignore_index: int = _arguments.DEFAULT_IGNORE_INDEX,
    reduce: None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    sample_weight: Tensor | None = None,
    normalizer: float | None = None,
    backend: str | None = None,
    inplace: bool = False,
    fallback: bool = False,
) -> Tensor:
    r"""Cross-entropy of the softmax of the scores, as `torch.nn.functional.cross_entropy`.

    The formulas are those of `fastloss.cross_entropy`; without options the loss of a row of
    scores x with class index y is

    .. math:: L = \log \sum_k \exp x_k - x_y, \qquad dL/dx_c = p_c - [c = y]

    Parameters
    ----------
    input : Tensor of float32, float64, float16 or bfloat16, shape (C), (N, C) or (N, C, d1, ...)
        The scores x.  Half types are computed in float32.
    target : Tensor
        Class indices of any integer dtype, shaped like `input` without the class dimension; or
        probabilities of any float dtype, shaped like `input`.
    weight : Tensor, shape (C), optional
        A weight per class, finite and at least 0.
    size_average, reduce : None
        PyTorch's legacy arguments, refused: use `reduction`.
    ignore_index : int
        Rows with this target count for nothing, whatever they hold.
    reduction : {"mean", "sum", "none"}
        The mean divides by the sum of ``weight[target] * sample_weight`` over the rows not
        ignored; with probabilities, by the sum of the sample weights or the number of rows.
    label_smoothing : float
        The share of the target that is spread over all classes, from 0 to 1.
    z_loss : float
        The weight of the square of the log of the sum of exponentials, at least 0.
    sample_weight : Tensor, shape of `input` without the class dimension, optional
        A weight per row, finite and at least 0.
    normalizer : float, optional
        Replaces the divisor of the mean.
    backend : {"auto", "cython", "numba", "numpy"}, optional
        See `fastloss.set_backend`.
    inplace : bool
        Write the gradient over the memory of `input`, which saves as much memory and the time of
        its page faults.  That gives up: the scores, for whoever looks at them afterwards; a
        second backward pass, also with ``retain_graph=True``; second derivatives; `torch.compile`
        and `torch.func`; `input` as a leaf of the graph; and with a half type, the single rounding
        where the upstream gradient is not 1.  Where `input` needs no gradient nothing is written.
    fallback : bool
        Whether PyTorch's own function computes what the kernels cannot: tensors on other devices,
        sparse or quantized ones.  Else they are a TypeError.

    Returns
    -------
    Tensor
        In the dtype of `input`, under autocast float32 for half types.  It has one pass over the
        scores with their gradient behind it where they need one, and else one without.

    Raises
    ------
    IndexError
        If a target is out of range and not `ignore_index`.
    ValueError
        If a shape or an option is wrong.
    TypeError
        If a tensor is of a device, layout or dtype that the kernels do not take.
    ImportError
        If the backend that was asked for is not there.

    Examples
    --------
    >>> import torch
    >>> from fastloss.torch import cross_entropy
    >>> logits = torch.tensor([[5.0, 4.0, 2.0]], requires_grad=True)
    >>> loss = cross_entropy(logits, torch.tensor([0]))
    >>> loss
    tensor(0.3490, grad_fn=<LossBackward>)
    >>> loss.backward()
    >>> logits.grad
    tensor([[-0.2949,  0.2595,  0.0351]])
    """
    own: dict[str, Any] = {
        "z_loss": z_loss, "sample_weight": sample_weight, "normalizer": normalizer,
        "inplace": inplace,
    }  # fmt: skip
    return _loss(
        cross_entropy, input, target, weight, size_average, ignore_index, reduce, reduction,
        {"label_smoothing": label_smoothing}, own, backend, fallback,
    )  # fmt: skip


def nll_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: None = None,
    ignore_index: int = _arguments.DEFAULT_IGNORE_INDEX,
    reduce: None = None,
    reduction: str = "mean",
    *,
    sample_weight: Tensor | None = None,
    normalizer: float | None = None,
    backend: str | None = None,
    fallback: bool = False,
) -> Tensor:
    r"""Negative log-likelihood of the target classes, as `torch.nn.functional.nll_loss`.

    .. math:: L = -w_y s \, l_y

    with class weights w and sample weight s.

    Parameters
    ----------
    input : Tensor of float32, float64, float16 or bfloat16, shape (C), (N, C) or (N, C, d1, ...)
        Log-probabilities l, as `log_softmax` returns them.
    target : Tensor of any integer dtype
        The class indices, shaped like `input` without the class dimension.
    weight, size_average, ignore_index, reduce, reduction, sample_weight, normalizer, backend, \
fallback
        As in `cross_entropy`.

    Returns
    -------
    Tensor
        As `cross_entropy`.

    Raises
    ------
    IndexError, ValueError, TypeError, ImportError
        As `cross_entropy`.

    Examples
    --------
    >>> import torch
    >>> from fastloss.torch import log_softmax, nll_loss
    >>> nll_loss(log_softmax(torch.tensor([[5.0, 4.0, 2.0]]), dim=1), torch.tensor([0]))
    tensor(0.3490)
    """
    own: dict[str, Any] = {"sample_weight": sample_weight, "normalizer": normalizer}
    return _loss(
        nll_loss, input, target, weight, size_average, ignore_index, reduce, reduction,
        {}, own, backend, fallback,
    )  # fmt: skip


def _loss(
    function: Any,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    size_average: Any,
    ignore_index: int,
    reduce: Any,
    reduction: str,
    smoothing: dict[str, float],
    own: dict[str, Any],
    backend: str | None,
    fallback: bool,
) -> Tensor:
    """What the losses share; `own` are the options that PyTorch's function does not have."""
    name, sample_weight = function.__name__, own["sample_weight"]
    refuse_legacy(size_average, reduce)
    if has_torch_function_variadic(input, target, weight, sample_weight):
        tensors = (input, target, weight, sample_weight)
        keywords = {"ignore_index": ignore_index, "reduction": reduction, **smoothing, **own}
        return handle_torch_function(
            function, tensors, input, target, weight, **keywords, backend=backend, fallback=fallback
        )
    problem = _unsuited(input=input, target=target, weight=weight, sample_weight=sample_weight)
    if problem and fallback:
        refuse_own(own, problem)
        return getattr(torch.nn.functional, name)(
            input, target, weight, ignore_index=ignore_index, reduction=reduction, **smoothing
        )
    if problem:
        raise TypeError(problem)
    _check_float("input", input)
    if target.is_floating_point() and ignore_index < 0:
        ignore_index = _arguments.DEFAULT_IGNORE_INDEX  # as PyTorch, which ignores negative ones
    normalizer = own["normalizer"]
    options = Options(
        name,
        ignore_index,
        float(smoothing.get("label_smoothing", 0.0)),
        float(own.get("z_loss", 0.0)),
        reduction,
        None if normalizer is None else float(normalizer),
        backend,
    )
    inputs = Inputs(input, target, weight, sample_weight)
    loss = _dispatch(inputs, options, own.get("inplace", False))
    half = loss.dtype is not input.dtype and not torch.is_autocast_enabled("cpu")
    return loss.to(input.dtype) if half else loss


def _dispatch(inputs: Inputs, options: Options, inplace: bool) -> Tensor:
    scores, target, *weights = inputs
    differentiable = torch.is_grad_enabled() and (scores.requires_grad or target.requires_grad)
    for argument, tensor in zip(("weight", "sample_weight"), weights, strict=True):
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{argument} requires a gradient, which {options.name} does not give")
    eager = _ops.is_eager(*inputs)
    if inplace:
        _check_inplace(scores, target, eager, differentiable)
    if not eager:
        return _ops.loss(*inputs, *options)
    if differentiable:
        return _ops.Loss.apply(*inputs, options, inplace and scores.requires_grad)
    return _compute.losses(inputs, options)


def _check_inplace(scores: Tensor, target: Tensor, eager: bool, differentiable: bool) -> None:
    if not eager:
        raise RuntimeError("inplace=True works in eager code only")
    if not differentiable:
        return
    if target.requires_grad:
        raise ValueError("inplace=True: target requires a gradient, which needs the scores")
    whole = scores if scores._base is None else scores._base
    if scores.requires_grad and whole.is_leaf and whole.requires_grad:
        raise ValueError("inplace=True: input is a leaf of the graph, and must not be overwritten")


def refuse_legacy(size_average: Any, reduce: Any) -> None:
    for name, value in (("size_average", size_average), ("reduce", reduce)):
        if value is not None:
            raise ValueError(
                f"{name} = {value!r} is a legacy argument of PyTorch; use reduction = "
                "'mean', 'sum' or 'none'"
            )


def refuse_own(own: dict[str, Any], reason: str) -> None:
    """Refuse options that PyTorch's function does not have, where it is to be called."""
    for name, value in own.items():
        if value is not None and value is not False and not isinstance(value, float | int):
            raise ValueError(f"{name} has no fallback in PyTorch, and {reason}")
        if value:
            raise ValueError(f"{name} = {value!r} has no fallback in PyTorch, and {reason}")


def _unsuited(**tensors: Tensor | None) -> str | None:
    """Why the kernels cannot take one of the tensors, or None."""
    for name, tensor in tensors.items():
        if tensor is None and name not in ("input", "target"):
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}, expected a torch.Tensor")
        if tensor.device.type != "cpu":
            return f"{name} is on the device {tensor.device}; the kernels run on the CPU"
        if tensor.layout is not torch.strided:
            return f"{name} has the layout {tensor.layout}; the kernels take torch.strided"
        if tensor.is_quantized:
            return f"{name} is quantized ({tensor.dtype}); dequantize it first"
    return None


def _check_float(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in _FLOATS:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in _FLOATS)
        raise TypeError(f"{name} has dtype {tensor.dtype}; expected one of {names}")
