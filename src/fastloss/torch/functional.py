"""Functions with the names and the arguments of those in ``torch.nn.functional``."""

import sys
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from fastloss import _arguments
from fastloss.torch import _compute, _linear, _ops
from fastloss.torch._compute import Inputs, Options
from fastloss.torch._linear import LinearInputs

_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_UNROUNDED = (torch.float32, torch.float64)  # the losses have the dtype they are computed in
_INDICES = (torch.int64, torch.int32)
_OPTIONAL = ("weight", "sample_weight", "linear_bias")


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
        sparse, quantized or nested ones, DTensors.  Else they are a TypeError.

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
    plain = _ops.is_plain(input) and input.dtype in _FLOATS
    if not plain:
        theirs: dict[str, Any] = {"dim": dim, "dtype": dtype}
        result = _elsewhere(function, {"input": input}, theirs, {"backend": backend}, fallback)
        if result is not None:
            return result
    if dim is None:
        raise ValueError(f"dim is not given, and {function.__name__} does not guess it")
    if dtype is not None:
        input = input.to(dtype)
    check_float(input)
    dims = max(input.dim(), 1)
    if not -dims <= dim < dims:
        raise IndexError(f"dim = {dim} is out of range for input of shape {tuple(input.shape)}")
    arguments = (input, function is log_softmax, dim, backend)
    if not (plain or _ops.is_eager(input)):
        return _ops.probabilities(*arguments)
    if input.requires_grad and torch.is_grad_enabled():
        function = _ops.plain_probabilities if plain else _ops.Probabilities.apply
        return function(*arguments)
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
    normalizer: float | Tensor | None = None,
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
        probabilities of any float dtype, shaped like `input`.  These are taken as they are, as by
        PyTorch: nothing checks that none is negative and that they sum to 1.
    weight : Tensor, shape (C), optional
        A weight per class, finite and of either sign.
    size_average, reduce : None
        PyTorch's legacy arguments, refused: use `reduction`.
    ignore_index : int
        Rows with this target count for nothing, whatever they hold.
    reduction : {"mean", "sum", "none"}
        The mean divides by the sum of ``weight[target] * sample_weight`` over the rows not
        ignored; with probabilities, by the sum of the sample weights or the number of rows.
        Where that is 0 the mean is NaN, and its gradient 0.
    label_smoothing : float
        The share of the target that is spread over all classes, from 0 to 1.
    z_loss : float
        The weight of the square of the log of the sum of exponentials, at least 0.
    sample_weight : Tensor, shape of `input` without the class dimension, optional
        A weight per row, finite and of either sign, or bool: a mask.  With the advantages of the
        actions that are the targets, this is the loss of a policy gradient.
    normalizer : float or Tensor of one number, optional
        Replaces the divisor of the mean.  It may change from step to step under `torch.compile`, as
        may the other numbers, and a tensor need not be read for that with ``item()``.
    backend : {"auto", "cython", "numba", "numpy"}, optional
        See `fastloss.set_backend`.
    inplace : bool
        Write the gradient over the memory of `input`, which saves as much memory and the time of
        its page faults.  That gives up: the scores, for whoever looks at them afterwards; a
        second backward pass, also with ``retain_graph=True``; second derivatives; `torch.compile`
        and `torch.func`; `input` as a leaf of the graph; and with a half type, the single rounding
        where the upstream gradient is not 1.  Where `input` needs no gradient nothing is written.
        Whatever writes to that memory before the backward pass makes PyTorch raise an error there,
        and so does another in-place loss on a part of the same tensor.
    fallback : bool
        Whether PyTorch's own function computes what the kernels cannot: tensors on other devices,
        sparse, quantized or nested ones, DTensors.  Else they are a TypeError.

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
    tensor([[-0.2946,  0.2595,  0.0351]])
    """
    if (
        weight is sample_weight is normalizer is size_average is reduce is None
        and type(label_smoothing) is type(z_loss) is float
        and not inplace
    ):
        options = Options(
            label_smoothing, z_loss, None, "cross_entropy", ignore_index, reduction, backend
        )
        if (loss := _usual_loss(input, target, options)) is not None:
            return loss
    refuse_legacy(size_average, reduce)
    inputs = Inputs(input, target, weight, sample_weight)
    theirs: dict[str, Any] = {
        "ignore_index": ignore_index, "reduction": reduction, "label_smoothing": label_smoothing
    }  # fmt: skip
    own: dict[str, Any] = {
        "z_loss": z_loss,
        "normalizer": normalizer,
        "inplace": inplace,
        "backend": backend,
    }
    return _loss(cross_entropy, inputs, theirs, own, fallback)


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
    normalizer: float | Tensor | None = None,
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
    if weight is sample_weight is normalizer is size_average is reduce is None:
        options = Options(0.0, 0.0, None, "nll_loss", ignore_index, reduction, backend)
        if (loss := _usual_loss(input, target, options)) is not None:
            return loss
    refuse_legacy(size_average, reduce)
    inputs = Inputs(input, target, weight, sample_weight)
    theirs: dict[str, Any] = {"ignore_index": ignore_index, "reduction": reduction}
    own: dict[str, Any] = {"normalizer": normalizer, "backend": backend}
    return _loss(nll_loss, inputs, theirs, own, fallback)


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: None = None,
    l2: float = 0.0,
    z_loss: float = 0.0,
    sample_weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    backend: str | None = None,
    fallback: bool = False,
) -> Tensor:
    r"""`cross_entropy` of a linear layer, as `torch.nn.functional.linear_cross_entropy`.

    .. math:: L = \operatorname{cross\_entropy}(X W^T + b,\; y) + l_2 \sum_{c,d} W_{c,d}^2

    The scores of all rows are never in memory, as in `fastloss.linear_cross_entropy`, for float32
    and float64 in eager code.  Half types, autocast, a `linear_weight` of more than two dimensions,
    probabilities that require a gradient, `torch.compile` and `torch.func` take
    `torch.nn.functional.linear` and `cross_entropy` one after the other.

    Parameters
    ----------
    input : Tensor, shape (D) or (N, D)
        The features X, a row per sample.
    linear_weight : Tensor, shape (C, D) or (C, d1, ..., D), dtype of `input`
        The weights W, a row per class.
    target : Tensor
        Class indices of any integer dtype, shape (), (N) or (N, d1, ...); or probabilities, shape
        (C), (N, C) or (N, C, d1, ...).
    linear_bias : Tensor, shape of `linear_weight` without its last dimension, optional
        The bias b.
    ignore_index : int, optional
        As in `cross_entropy`; None is -100.
    options : None
        How PyTorch is to cut up the batch, which is done anyway: refused.
    l2 : float
        The factor on the sum of the squares of W, at least 0; not with ``reduction="none"``.
    weight, reduction, label_smoothing, z_loss, sample_weight, normalizer, backend, fallback
        As in `cross_entropy`.

    Returns
    -------
    Tensor
        As `cross_entropy`; differentiable with respect to `input`, `linear_weight` and
        `linear_bias`.

    Raises
    ------
    IndexError, ValueError, TypeError, ImportError
        As `cross_entropy`.

    Notes
    -----
    During the call NumPy's BLAS is held to one thread, for the whole process; chunks of rows are
    shared out among as many threads as PyTorch has.  Where `input` or `linear_weight` needs no
    gradient, as that of a frozen layer, none is computed.

    Examples
    --------
    >>> import torch
    >>> from fastloss.torch import linear_cross_entropy
    >>> linear_weight = torch.tensor([[1.0, 2.0], [2.0, 1.0], [0.0, 1.0]], requires_grad=True)
    >>> loss = linear_cross_entropy(torch.tensor([[1.0, 2.0]]), linear_weight, torch.tensor([0]))
    >>> loss
    tensor(0.3490, grad_fn=<LinearLossBackward>)
    >>> loss.backward()
    >>> linear_weight.grad
    tensor([[-0.2946, -0.5892],
            [ 0.2595,  0.5190],
            [ 0.0351,  0.0702]])
    """
    if options is not None:
        raise ValueError(f"options = {options!r}: chunks are not PyTorch's here; leave it out")
    inputs = LinearInputs(input, linear_weight, linear_bias, target, weight, sample_weight)
    theirs: dict[str, Any] = {
        "ignore_index": ignore_index, "reduction": reduction, "label_smoothing": label_smoothing
    }  # fmt: skip
    own: dict[str, Any] = {"z_loss": z_loss, "normalizer": normalizer, "backend": backend, "l2": l2}
    result = _elsewhere(linear_cross_entropy, inputs._asdict(), theirs, own, fallback)
    if result is not None:
        return result
    check_float(input)
    _check_no_gradient(weight=weight, sample_weight=sample_weight)
    _linear.check_shapes(inputs)
    if ignore_index is None:
        theirs["ignore_index"] = _arguments.DEFAULT_IGNORE_INDEX
    penalty: Any = _number(own.pop("l2"), "l2")
    if not isinstance(penalty, Tensor):  # else nobody knows yet what is in it
        penalty = _arguments.l2(penalty, reduction)
    loss_options = _options("cross_entropy", target.is_floating_point(), **theirs, **own)
    if not _linear.is_fused(inputs):
        loss = apply(inputs.with_scores(), loss_options)
        if isinstance(penalty, Tensor) or penalty:
            loss = loss + (penalty * linear_weight.square().sum()).to(loss.dtype)
        return loss
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        return _linear.LinearLoss.apply(*inputs, loss_options, penalty)
    return _linear.losses(inputs, loss_options, penalty)


def _loss(
    function: Any, inputs: Inputs, theirs: dict[str, Any], own: dict[str, Any], fallback: bool
) -> Tensor:
    """A loss with the options that PyTorch's function has, too, and those that are our own."""
    names = ("input", "target", "weight", "sample_weight")
    result = _elsewhere(function, dict(zip(names, inputs, strict=True)), theirs, own, fallback)
    if result is not None:
        return result
    check_float(inputs.scores)
    _check_no_gradient(weight=inputs.weight, sample_weight=inputs.sample_weight)
    inplace = own.pop("inplace", False)
    return apply(inputs, _options(function.__name__, inputs.soft, **theirs, **own), inplace)


def _usual_loss(input: Tensor, target: Tensor, options: Options) -> Tensor | None:
    """That of scores and indices as most calls have them, None of any other.

    A small step takes longer to check than to compute.  What is left out here has nothing to say
    about these tensors; what is in the options, and in the tensors, the kernels check.
    """
    if not (
        _ops.is_plain(input, target) and input.dtype in _UNROUNDED and target.dtype in _INDICES
    ):
        return None
    if input.requires_grad and torch.is_grad_enabled():
        return _ops.plain_loss(input, target, None, None, options, False)
    return _compute.losses(Inputs(input, target), options)


def _options(
    name: str,
    soft: bool,
    *,
    ignore_index: int,
    reduction: str,
    normalizer: float | Tensor | None,
    backend: str | None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Options:
    if soft and isinstance(ignore_index, int) and ignore_index < 0:
        ignore_index = _arguments.DEFAULT_IGNORE_INDEX  # as PyTorch, which overlooks any such
    numbers = (
        _number(label_smoothing, "label_smoothing"),
        _number(z_loss, "z_loss"),
        None if normalizer is None else _number(normalizer, "normalizer"),
    )
    return Options(*numbers, name, ignore_index, reduction, backend)


def _number(value: float | Tensor, name: str) -> float | Tensor:
    """A float; or a tensor on the way into a graph, which knows not yet what is in it."""
    if type(value) in (float, int):
        return float(value)
    if isinstance(value, Tensor):
        _check_no_gradient(**{name: value})
    return _arguments.real(value, name) if _ops.is_eager(value) else torch.as_tensor(value)


def apply(inputs: Inputs, options: Options, inplace: bool = False) -> Tensor:
    """The loss of checked inputs, in the dtype that PyTorch gives it."""
    scores, target = inputs.scores, inputs.target
    eager = _ops.is_eager(*inputs)
    differentiable = torch.is_grad_enabled() and (scores.requires_grad or target.requires_grad)
    if inplace:
        _check_inplace(inputs, eager, differentiable)
    if not eager:
        loss = _ops.loss(*inputs, *_ops.in_graph(options))
    elif differentiable:
        loss = _ops.Loss.apply(*inputs, options, inplace and scores.requires_grad)
    else:
        loss = _compute.losses(inputs, options)
    # It comes in the dtype that it is computed in, which is what autocast asks for.
    is_wider = loss.dtype is not scores.dtype
    return loss.to(scores.dtype) if is_wider and not torch.is_autocast_enabled("cpu") else loss


def _check_inplace(inputs: Inputs, eager: bool, differentiable: bool) -> None:
    if not eager:
        raise RuntimeError("inplace=True works in eager code only")
    scores = inputs.scores
    if not differentiable or not scores.requires_grad:
        return
    if inputs.target.requires_grad:
        raise ValueError("inplace=True: target requires a gradient, which needs the scores")
    whole = scores if scores._base is None else scores._base
    if whole.is_leaf and whole.requires_grad:
        raise ValueError("inplace=True: input is a leaf of the graph, and must not be overwritten")
    if scores.is_neg():
        raise ValueError("inplace=True: input is negated as it is read; resolve_neg() it first")
    if _arguments.may_overlap_itself(_compute.to_array(scores)):
        raise ValueError(
            f"inplace=True: input of shape {tuple(scores.shape)} has strides {scores.stride()}, "
            "by which elements may share memory; clone it first"
        )


def check_float(scores: Tensor, name: str = "input") -> None:
    if scores.dtype not in _FLOATS:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in _FLOATS)
        raise TypeError(f"{name} has dtype {scores.dtype}; expected one of {names}")


def _check_no_gradient(**tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} requires a gradient, and there is none for it; detach it")


def refuse_legacy(size_average: Any, reduce: Any) -> None:
    for name, value in (("size_average", size_average), ("reduce", reduce)):
        if value is not None:
            raise ValueError(
                f"{name} = {value!r} is a legacy argument of PyTorch; "
                "use reduction = 'mean', 'sum' or 'none'"
            )


# ---------------------------------------------------------------------------------------------
# What the kernels do not take
# ---------------------------------------------------------------------------------------------


def _elsewhere(
    function: Any,
    tensors: dict[str, Any],
    theirs: dict[str, Any],
    own: dict[str, Any],
    fallback: bool,
) -> Tensor | None:
    """What a tensor-like class or PyTorch's own function makes of it; None if it is for us."""
    if has_torch_function_variadic(*tensors.values()):
        keywords = {**tensors, **theirs, **own, "fallback": fallback}
        return handle_torch_function(function, tuple(tensors.values()), **keywords)
    problem = unsuited(tensors)
    if problem is None:
        return None
    if not fallback:
        raise TypeError(problem)
    own = {**own, "sample_weight": tensors.pop("sample_weight", None)}
    for name, value in own.items():
        if name != "backend" and (isinstance(value, Tensor) or value):
            raise ValueError(f"{name} is unknown to PyTorch's {function.__name__}, and {problem}")
    return getattr(torch.nn.functional, function.__name__)(**tensors, **theirs)


def unsuited(tensors: dict[str, Any]) -> str | None:
    """Why the kernels cannot take one of the tensors, or None."""
    for name, tensor in tensors.items():
        if tensor is None and name in _OPTIONAL:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}, expected a torch.Tensor")
        if tensor.is_nested:
            return f"{name} is a nested tensor; the kernels take dense ones"
        if _is_dtensor(tensor):
            return f"{name} is a DTensor; the kernels take plain ones, such as its to_local()"
        if not tensor.is_cpu:
            return f"{name} is on the device {tensor.device}; the kernels run on the CPU"
        if tensor.layout is not torch.strided:
            return f"{name} has the layout {tensor.layout}; the kernels take torch.strided"
        if tensor.is_quantized:
            return f"{name} is quantized ({tensor.dtype}); dequantize it first"
    return None


def _is_dtensor(tensor: Tensor) -> bool:
    """Without the import of their module: whoever has one has done that."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)
