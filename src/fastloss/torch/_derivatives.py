"""Derivatives in terms of PyTorch's own operations, which have derivatives of any order."""

import torch
from torch import Tensor

from fastloss.torch._compute import Inputs, Options, compute_dtype, counted, indices


def row_factors(upstream: Tensor | float, inputs: Inputs, options: Options) -> Tensor:
    """What multiplies the derivatives of a row's loss: 0 for a row that is left out."""
    if inputs.soft:
        rows = torch.ones(inputs.rows_shape, dtype=torch.float64, device="cpu")
    else:
        rows = indices(inputs.target, options.ignore_index)[1].to(torch.float64)
    if inputs.sample_weight is not None:
        rows = rows * inputs.sample_weight
    if options.reduction == "mean":
        divisor = options.normalizer
        if divisor is None:
            divisor = counted(inputs, options.ignore_index).sum()
        rows = torch.where((rows == 0) | (divisor == 0), 0, rows / divisor)
    return (rows * upstream).to(compute_dtype(inputs.scores.dtype))


def counting(factors: Tensor, tensor: Tensor) -> Tensor:
    """Without what rows hold that are left out, which may be NaN."""
    return torch.where(factors == 0, 0, tensor)


def _class_weights(inputs: Inputs) -> Tensor:
    """In a shape that goes with the scores."""
    num_classes = inputs.scores.shape[inputs.dim]
    weight = inputs.weight
    if weight is None:
        weight = torch.ones(num_classes, device="cpu")
    shape = [1] * inputs.scores.dim()
    shape[inputs.dim] = num_classes
    return weight.to(compute_dtype(inputs.scores.dtype)).reshape(shape)


def target_gradient(upstream: Tensor, inputs: Inputs, options: Options) -> Tensor:
    """With respect to probabilities t: (1 - e) r w_c (lse - x_c), r the factor of the row."""
    dim = inputs.dim
    unit = row_factors(1.0, inputs, options).unsqueeze(dim)
    r = row_factors(upstream, inputs, options).unsqueeze(dim)
    log_p = torch.log_softmax(counting(unit, inputs.scores.to(r.dtype)), dim)
    grad = -(1 - options.label_smoothing) * r * _class_weights(inputs) * log_p
    return grad.to(inputs.target.dtype)


def second_derivatives(
    v: Tensor, upstream: Tensor, inputs: Inputs, options: Options
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Those of v . g, for the gradient of a row g_c = r (a p_c - w_c t_c).

    With respect to `upstream`, a factor of r, the scores and the target, where that is
    probabilities.  With index targets t is onehot, smoothed.  a is the sum of w_c t_c; the z-loss
    adds 2 z lse.  The derivatives of p are those of softmax: r (a p (v - p.v) + 2 z p (p.v)).
    """
    dim, (e, z) = inputs.dim, (options.label_smoothing, options.z_loss)
    unit = row_factors(1.0, inputs, options).unsqueeze(dim)
    r = row_factors(upstream, inputs, options).unsqueeze(dim)
    w, v = _class_weights(inputs), v.to(r.dtype)
    num_classes = inputs.scores.shape[dim]
    if inputs.soft:
        share = w * ((1 - e) * counting(unit, inputs.target.to(r.dtype)) + e / num_classes)
        a, vt = share.sum(dim, keepdim=True), (share * v).sum(dim, keepdim=True)
    else:
        y = indices(inputs.target, options.ignore_index)[0].unsqueeze(dim)
        b = (1 - e) * w.expand_as(v).gather(dim, y)
        a = b + e / num_classes * w.sum()
        vt = b * v.gather(dim, y) + e / num_classes * (w * v).sum(dim, keepdim=True)

    grad_scores = grad_target = None
    if options.name == "nll_loss":  # g does not depend on the scores
        grad_rows = -unit * vt
    else:
        x = counting(unit, inputs.scores.to(r.dtype))
        a = a + 2 * z * torch.logsumexp(x, dim, keepdim=True)
        p = torch.softmax(x, dim)
        pv = (p * v).sum(dim, keepdim=True)
        grad_rows = unit * (a * pv - vt)
        grad_scores = (r * (a * p * (v - pv) + 2 * z * p * pv)).to(inputs.scores.dtype)
        if inputs.soft:
            grad_target = ((1 - e) * r * w * (pv - v)).to(inputs.target.dtype)
    grad_upstream = grad_rows.squeeze(dim) if options.reduction == "none" else grad_rows.sum()
    return grad_upstream.to(upstream.dtype), grad_scores, grad_target


def probabilities_second_derivatives(
    v: Tensor, upstream: Tensor, result: Tensor, log: bool, dim: int
) -> tuple[Tensor, Tensor]:
    """Those of v . g, for the gradient g of softmax or log_softmax, by `upstream` and `result`."""

    def total(tensor: Tensor) -> Tensor:
        return tensor.sum(dim, keepdim=True)

    if log:
        p = result.exp()
        return v - total(v * p), -v * p * total(upstream)
    vp = total(v * result)
    return result * (v - vp), v * (upstream - total(upstream * result)) - upstream * vp
