"""The PyTorch adapter against torch.nn.functional, and under autograd."""

import copy
import io
import itertools
import math
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
from support.backends import need

import fastloss as fl

torch = need("torch")
from torch._dynamo.backends.common import aot_autograd  # noqa: E402
from torch._functorch.aot_autograd import make_boxed_func  # noqa: E402
from torch._subclasses import FakeTensor, FakeTensorMode  # noqa: E402
from torch.autograd import forward_ad  # noqa: E402
from torch.fx.experimental.proxy_tensor import make_fx  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import fastloss.torch as ft  # noqa: E402
from fastloss.torch import _compute, _ops, functional  # noqa: E402
from fastloss.torch._compute import Options  # noqa: E402

F = torch.nn.functional
NAN, INF = math.nan, math.inf
REDUCTIONS = ("mean", "sum", "none")
HALVES = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, torch.float64, *HALVES)
# Of the largest entry: some rounding in float32 or float64, and one to a half type.
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-14, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.fixture(params=["cython", "numba"])
def compiled(request):
    """A compiled backend, chosen for the whole test."""
    fl.set_backend(request.param)
    return request.param


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def rows_of(shape):
    dim = min(1, len(shape) - 1)
    return shape[:dim] + shape[dim + 1 :]


def assert_close(actual, expected, dtype=None):
    """Entries within the tolerance of the largest."""
    tolerance = TOLERANCE[dtype or expected.dtype]
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    if expected.numel():
        largest = expected.double().abs().nan_to_num().max()
        torch.testing.assert_close(
            actual.double(), expected.double(), rtol=0, atol=float(tolerance * largest),
            equal_nan=True,
        )  # fmt: skip


def loss_and_grad(function, scores, target, upstream=None, **options):
    leaf = scores.detach().requires_grad_()
    loss = function(leaf, target, **options)
    loss.backward(torch.ones_like(loss) if upstream is None else upstream)
    return loss.detach(), leaf.grad


# ---------------------------------------------------------------------------------------------
# The same as torch.nn.functional
# ---------------------------------------------------------------------------------------------


def transposed(x):
    return x.mT.contiguous().mT if x.dim() > 1 else x


def strided(x):
    return torch.stack([x, x], -1).flatten(-2)[..., ::2]


def classes_last(x):
    return x.movedim(min(1, x.dim() - 1), -1).contiguous().movedim(-1, min(1, x.dim() - 1))


def expanded(x):
    return x[:1].expand(x.shape) if x.dim() > 1 else x


ARRANGEMENTS = (torch.clone, transposed, strided, classes_last, expanded)
SHAPES = [(7,), (6, 7), (0, 7), (5, 1), (4, 7, 3), (2, 7, 3, 2)]


def problem(generator, shape, dtype, kind):
    scores = torch.randn(shape, generator=generator, dtype=torch.float64).mul(3).to(dtype)
    num_classes = shape[min(1, len(shape) - 1)]
    if kind == "probabilities":
        return scores, torch.rand(shape, generator=generator).to(dtype), num_classes
    return scores, torch.randint(num_classes, rows_of(shape), generator=generator), num_classes


def theirs_of(function, dtype):
    """PyTorch's function; for half types in float32, rounded once, as ours are."""
    if dtype not in HALVES:
        return function

    def wide(scores, target, weight=None, **options):
        weight = None if weight is None else weight.float()
        target = target.float() if target.is_floating_point() else target
        return function(scores.float(), target, weight=weight, **options).to(dtype)

    return wide


@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cross_entropy(compiled, generator, shape, dtype, kind):
    scores, target, num_classes = problem(generator, shape, dtype, kind)
    theirs = theirs_of(F.cross_entropy, dtype)
    weight = torch.rand(num_classes, generator=generator).add(0.1).to(dtype)
    weight[::3] *= -1
    ignored = (-100, 0) if kind == "indices" and num_classes > 1 else (-100,)
    grid = itertools.product(REDUCTIONS, (None, weight), ignored, (0.0, 0.1, 1.0))
    arrangements = itertools.cycle(ARRANGEMENTS)  # five: each meets each option
    for (reduction, w, ignore_index, smoothing), arrange in zip(grid, arrangements, strict=False):
        x = arrange(scores)
        options = {
            "weight": w, "reduction": reduction, "ignore_index": ignore_index,
            "label_smoothing": smoothing,
        }  # fmt: skip
        upstream = None
        if reduction == "none":
            upstream = torch.randn(rows_of(shape), generator=generator).to(dtype)
        loss, grad = loss_and_grad(ft.cross_entropy, x, target, upstream, **options)
        their_loss, their_grad = loss_and_grad(theirs, x, target, upstream, **options)
        assert_close(loss, their_loss)
        assert_close(grad, their_grad)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nll_loss(compiled, generator, shape, dtype):
    scores, target, num_classes = problem(generator, shape, torch.float64, "indices")
    scores = F.log_softmax(scores, min(1, len(shape) - 1)).to(dtype)
    theirs = theirs_of(F.nll_loss, dtype)
    weight = torch.rand(num_classes, generator=generator).add(0.1).to(dtype)
    weight[::3] *= -1
    for reduction, w, arrange in itertools.product(REDUCTIONS, (None, weight), ARRANGEMENTS):
        x = arrange(scores)
        options = {"weight": w, "reduction": reduction, "ignore_index": 2}
        loss, grad = loss_and_grad(ft.nll_loss, x, target, **options)
        # PyTorch's own backward pass fails for four dimensions whose classes lie last.
        their_loss, their_grad = loss_and_grad(theirs, x.contiguous(), target, **options)
        assert_close(loss, their_loss)
        assert_close(grad, their_grad)


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
@pytest.mark.parametrize("shape", [(), *SHAPES, (3, 0)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_softmax(compiled, generator, name, shape, dtype):
    scores = torch.randn(shape, generator=generator).to(dtype)
    upstream = torch.randn(shape, generator=generator).to(dtype)
    ours, theirs = getattr(ft, name), getattr(F, name)
    dims = itertools.chain.from_iterable([range(-len(shape), max(len(shape), 1))] * 5)
    for dim, arrange in zip(dims, itertools.cycle(ARRANGEMENTS), strict=False):
        x = arrange(scores) if shape else scores
        results = []
        for function in (ours, theirs):
            leaf = x.detach().requires_grad_()
            wide = torch.float32 if function is theirs and dtype in HALVES else None
            result = function(leaf, dim, dtype=wide)
            results.append((result.detach().to(dtype), leaf))
            result.backward(upstream.to(result.dtype))
        (result, leaf), (their_result, their_leaf) = results
        assert_close(result, their_result)
        expected = their_leaf.grad
        if dtype in HALVES:  # a gradient comes from rounded probabilities, and PyTorch had better
            p, g = result.float(), upstream.float()
            if name == "softmax":
                expected = p * (g - (g * p).sum(dim, keepdim=True))
            else:
                expected = g - p.exp() * g.sum(dim, keepdim=True)
            expected = expected.to(dtype)
        largest = float(upstream.double().abs().sum()) if upstream.numel() else 1
        torch.testing.assert_close(leaf.grad, expected, rtol=0, atol=TOLERANCE[dtype] * largest)
    assert ours(scores, 0, dtype=torch.float64).dtype is torch.float64


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_cross_entropy(compiled, generator, dtype, kind, reduction):
    """With a weight of two dimensions and of more, with a batch and without."""
    for shape in [(6, 5), (5,), (6, 5, 2, 3)]:
        _, target, _ = problem(generator, shape, dtype, kind)
        tensors = [(*shape[: min(1, len(shape) - 1)], 4), (*shape[len(shape) > 1 :], 4)]
        tensors = [torch.randn(s, generator=generator).to(dtype) for s in tensors]
        tensors.append(tensors[1].select(-1, 0).clone())
        weight = torch.rand(5, generator=generator).sub(0.2).to(dtype)
        for options in ({}, {"weight": weight, "label_smoothing": 0.1}):
            found = []
            for function in (ft.linear_cross_entropy, F.linear_cross_entropy):
                x, w, b = leaves = [tensor.clone().requires_grad_() for tensor in tensors]
                loss = function(x, w, target, linear_bias=b, reduction=reduction, **options)
                loss.sum().backward()
                found.append([loss.detach(), *(leaf.grad for leaf in leaves)])
            for ours, theirs in zip(*found, strict=True):
                slack = 30 if dtype in HALVES else 1  # PyTorch's own losses are that far off
                largest = float(theirs.double().abs().max())
                atol = slack * 4 * TOLERANCE[dtype] * largest
                torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


def test_our_own_options(compiled, generator):
    """They are those of the package."""
    scores, target, _ = problem(generator, (4, 7, 3), torch.float32, "indices")
    s = torch.rand((4, 3), generator=generator)
    options = {"z_loss": 0.1, "label_smoothing": 0.2, "normalizer": 3.5, "ignore_index": 2}
    arrays = scores.numpy(), target.numpy()
    expected, grad = fl.cross_entropy_with_grad(*arrays, axis=1, sample_weight=s.numpy(), **options)
    loss, our_grad = loss_and_grad(ft.cross_entropy, scores, target, sample_weight=s, **options)
    assert loss.item() == np.float32(expected)
    np.testing.assert_array_equal(our_grad.numpy(), grad)

    expected, grad = fl.nll_loss_with_grad(*arrays, axis=1, sample_weight=s.numpy(), normalizer=2)
    loss, our_grad = loss_and_grad(ft.nll_loss, scores, target, sample_weight=s, normalizer=2)
    assert loss.item() == np.float32(expected)
    np.testing.assert_array_equal(our_grad.numpy(), grad)


@pytest.mark.parametrize(
    "normalizer",
    [
        3,
        3.0,
        torch.tensor(3),
        torch.tensor(3.0).bfloat16(),
        np.int32(3),
        np.float32(3),
        np.array(3),
    ],
    ids=repr,
)
def test_normalizers_of_every_kind(generator, normalizer):
    """In the adapter and below it; the other numbers likewise."""
    scores, target, _ = problem(generator, (4, 7), torch.float32, "indices")
    weight = torch.randn((7, 7), generator=generator)
    arrays = scores.numpy(), target.numpy()
    for ours, theirs in [
        (ft.cross_entropy(scores, target, normalizer=normalizer), fl.cross_entropy(*arrays)),
        (ft.nll_loss(scores, target, normalizer=normalizer), fl.nll_loss(*arrays)),
        (ft.CrossEntropyLoss(normalizer=normalizer)(scores, target), fl.cross_entropy(*arrays)),
        (
            ft.linear_cross_entropy(scores, weight, target, normalizer=normalizer),
            fl.linear_cross_entropy(scores, weight, target),
        ),
        (fl.cross_entropy(*arrays, normalizer=normalizer), fl.cross_entropy(*arrays)),
        (
            fl.linear_cross_entropy(scores, weight, target, normalizer=normalizer),
            fl.linear_cross_entropy(scores, weight, target),
        ),
    ]:
        assert float(ours) == pytest.approx(theirs * 4 / 3, rel=1e-6)
    for name in ("z_loss", "l2"):
        for function in (ft.linear_cross_entropy, fl.linear_cross_entropy):
            loss = function(scores, weight, target, **{name: normalizer})
            assert float(loss) == float(function(scores, weight, target, **{name: 3.0}))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_sample_weights_of_either_sign_and_masks(compiled, generator, reduction):
    scores, target, _ = problem(generator, (6, 7), torch.float32, "indices")
    for s in (torch.tensor([1.0, -2, 0, 3, -0.5, 1]), torch.tensor([1, 0, 1, 1, 0, 1]).bool()):
        loss, grad = loss_and_grad(
            ft.cross_entropy, scores, target, sample_weight=s, reduction=reduction
        )
        leaf = scores.clone().requires_grad_()
        expected = s * F.cross_entropy(leaf, target, reduction="none")
        if reduction != "none":
            expected = expected.sum() / (s.sum() if reduction == "mean" else 1)
        expected.sum().backward()
        assert_close(loss, expected.detach())
        assert_close(grad, leaf.grad)


def test_weights_that_cancel(compiled):
    """A mean over nothing: NaN, and no gradient of any order; alone and as one of a batch."""
    x, target, s = torch.randn(2, 3), torch.tensor([0, 1]), torch.tensor([1.0, -1.0])

    def mean(x, s=s):
        return ft.cross_entropy(x, target, sample_weight=s)

    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(mean(leaf), leaf, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), leaf)
    for found in (grad, second, torch.func.grad(mean)(x)):
        assert not found.any()
    batch = torch.stack([s, s.abs()])
    losses = torch.func.vmap(mean, in_dims=(None, 0))(x, batch)
    assert losses.isnan().tolist() == [True, False]


def test_backend_by_keyword(generator):
    scores, target, _ = problem(generator, (4, 7), torch.float32, "indices")
    exact = ft.cross_entropy(scores, target, backend="numpy")
    assert exact.item() == np.float32(fl.cross_entropy(scores, target, backend="numpy"))
    for call in (
        lambda: ft.cross_entropy(scores, target, backend="fast"),
        lambda: ft.softmax(scores, 1, backend="fast"),
        lambda: ft.linear_cross_entropy(scores, scores, target[:4] % 4, backend="fast"),
    ):
        with pytest.raises(ValueError, match=r"backend = 'fast' is not a backend; choose one of"):
            call()


# ---------------------------------------------------------------------------------------------
# The differences that are meant
# ---------------------------------------------------------------------------------------------


class Difference(NamedTuple):
    name: str
    reason: str
    check: Callable[[Any], Any]  # given a module of functions; what it returns or raises
    ours: Any  # a value, or the class of an error
    theirs: Any


def grad_of(call, *values, dtype=torch.float32):
    def run(module):
        leaf = torch.tensor(values, dtype=dtype).requires_grad_()
        call(module, leaf).backward()
        return leaf.grad.tolist()

    return run


def loss_of(call, *values, dtype=torch.float32):
    return lambda module: call(module, torch.tensor(values, dtype=dtype)).item()


def confident(module, x):
    return module.cross_entropy(x, torch.tensor([0]))


def of_many(module, x):
    """100000 times the same loss."""
    return module.cross_entropy(x.expand(100_000, -1), torch.zeros(100_000, dtype=torch.long))


def second_ignored(module, x):
    return module.cross_entropy(x, torch.tensor([0, -100]))


def of_weight_zero(module, x):
    return module.cross_entropy(x, torch.tensor([0, 1]), torch.tensor([1.0, 0.0]))


def masked(module, x):
    return module.cross_entropy(x, torch.tensor([[1.0, 0.0]]))


def with_options(x=((1.0, 2.0),), target=(0,), dtype=torch.long, **options):
    def run(module):
        return round(
            module.cross_entropy(
                torch.tensor(x), torch.tensor(target, dtype=dtype), **options
            ).item(), 4
        )  # fmt: skip

    return run


DIFFERENCES = [
    Difference(
        "loss of a sure row", "log1p of the other classes' share, where -log(1) is 0",
        loss_of(confident, [20.0, 0.0, 0.0]), pytest.approx(4.122307e-9, rel=1e-6), 0.0,
    ),
    Difference(
        "gradient of a sure row", "minus the sum of the other probabilities, where p - 1 is 0",
        grad_of(confident, [20.0, 0.0, 0.0]),
        [[pytest.approx(v, rel=1e-6) for v in (-4.122307e-9, 2.0611535e-9, 2.0611535e-9)]],
        [[0.0, pytest.approx(2.0611535e-9, rel=1e-5), pytest.approx(2.0611535e-9, rel=1e-5)]],
    ),
    Difference(
        "loss of a half type", "computed in float32 and rounded once: 0.160397",
        loss_of(of_many, [3.0, -5.5, 1.25], dtype=torch.bfloat16), 0.16015625, 0.1572265625,
    ),
    Difference(
        "mean over many rows of float16", "summed in float64; float16 ends before 100000",
        loss_of(of_many, [3.0, -5.5, 1.25], dtype=torch.float16), 0.160400390625, 0.0,
    ),
    Difference(
        "gradient of a half type", "the same: exact are -0.148195, 0.000173315 and 0.148022",
        grad_of(confident, [3.0, -5.5, 1.25], dtype=torch.bfloat16),
        [[-0.1484375, 0.0001735687255859375, 0.1484375]],
        [[-0.146484375, 0.00016880035400390625, 0.1484375]],
    ),
    Difference(
        "gradient of an ignored row that holds a NaN", "it counts for nothing, whatever it holds",
        grad_of(second_ignored, [0.0, 0.0], [NAN, 0.0]),
        [[-0.5, 0.5], [0.0, 0.0]],
        [[-0.5, 0.5], [pytest.approx(NAN, nan_ok=True)] * 2],
    ),
    Difference(
        "a target of weight 0 whose score is -inf", "it counts for nothing",
        loss_of(of_weight_zero, [0.0, 0.0], [0.0, -INF]), pytest.approx(0.6931472), NAN,
    ),
    Difference(
        "probability 0 where the score is -inf", "0 * inf counts as 0: a masked class",
        loss_of(masked, [0.0, -INF]), 0.0, NAN,
    ),
    Difference(
        "targets of any integer dtype", "they are read as they are",
        with_options(dtype=torch.int16), 1.3133, RuntimeError,
    ),
    Difference(
        "weight of another dtype than input", "it is a parameter, computed with in float64",
        with_options(weight=torch.tensor([1.0, 2.0], dtype=torch.float64)), 1.3133, RuntimeError,
    ),
    Difference(
        "errors of shape", "one class for what is wrong with a value, ValueError",
        with_options(weight=torch.ones(3)), ValueError, RuntimeError,
    ),
    Difference(
        "errors of options", "the same",
        with_options(label_smoothing=1.5), ValueError, RuntimeError,
    ),
    Difference(
        "legacy arguments", "they are deprecated in PyTorch",
        with_options(size_average=False), ValueError, 1.3133,
    ),
    Difference(
        "one class index in a list for scores without a batch", "its shape is another",
        with_options(x=(1.0, 2.0)), ValueError, 1.3133,
    ),
    Difference(
        "softmax without dim", "PyTorch guesses, and warns of it",
        lambda module: round(module.softmax(torch.tensor([0.0, 1.0]))[0].item(), 4),
        ValueError, 0.2689,
    ),
    Difference(
        "chunks of linear_cross_entropy", "the package cuts up the batch by itself",
        lambda module: round(
            module.linear_cross_entropy(
                torch.ones(1, 2), torch.eye(2), torch.tensor([0]),
                options=torch.nn.LinearCrossEntropyOptions(),
            ).item(), 4
        ),
        ValueError, 0.6931,
    ),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:size_average and reduce args:UserWarning")
@pytest.mark.filterwarnings("ignore:Implicit dimension choice for softmax:UserWarning")
@pytest.mark.parametrize("difference", DIFFERENCES, ids=lambda difference: difference.name)
def test_difference(compiled, difference):
    for module, expected in ((ft, difference.ours), (F, difference.theirs)):
        if isinstance(expected, type):
            with pytest.raises(expected):
                difference.check(module)
        elif isinstance(expected, float) and math.isnan(expected):
            assert math.isnan(difference.check(module))
        else:
            assert difference.check(module) == expected


# ---------------------------------------------------------------------------------------------
# Autograd
# ---------------------------------------------------------------------------------------------

ROWS, CLASSES = 5, 4


def differentiable_calls():
    """Name, function and the tensors to differentiate by: every function, every reduction."""
    generator = torch.Generator().manual_seed(1)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x, probabilities = randn(ROWS, CLASSES), randn(ROWS, CLASSES).softmax(1)
    w = randn(CLASSES).exp() * torch.tensor([1, -1, 1, 1])
    s = randn(ROWS).exp() * torch.tensor([1, 1, 1, 1, -1])
    target = torch.tensor([0, 3, -100, 1, 1])
    features, linear_weight, bias = randn(ROWS, 3), randn(CLASSES, 3), randn(CLASSES)
    for name in ("softmax", "log_softmax"):
        yield name, lambda x, name=name: getattr(ft, name)(x, 1), (x,)
    for reduction in REDUCTIONS:
        options = {"reduction": reduction, "sample_weight": s}
        smooth = {**options, "label_smoothing": 0.1, "z_loss": 0.2}

        def soft(x, t, smooth=smooth):
            return ft.cross_entropy(x, t, w, **smooth)

        def hard(x, smooth=smooth):
            return ft.cross_entropy(x, target, w, **smooth)

        def nll(x, options=options):
            return ft.nll_loss(x, target, w, **options)

        def linear(x, weight, bias, smooth=smooth):
            l2 = 0.3 if smooth["reduction"] != "none" else 0.0
            return ft.linear_cross_entropy(
                x, weight, target, linear_bias=bias, weight=w, l2=l2, **smooth
            )

        yield f"cross_entropy {reduction}", hard, (x,)
        yield f"cross_entropy probabilities {reduction}", soft, (x, probabilities)
        yield f"nll_loss {reduction}", nll, (x,)
        yield f"linear_cross_entropy {reduction}", linear, (features, linear_weight, bias)


CALLS = list(differentiable_calls())
every_call = pytest.mark.parametrize(
    ("call", "tensors"), [c[1:] for c in CALLS], ids=[c[0] for c in CALLS]
)


def leaves_of(tensors):
    return [tensor.clone().requires_grad_() for tensor in tensors]


@every_call
def test_first_and_second_derivatives(compiled, call, tensors):
    leaves = leaves_of(tensors)
    how = {"fast_mode": True, "check_batched_grad": True}
    assert torch.autograd.gradcheck(call, leaves, **how)
    assert torch.autograd.gradgradcheck(call, leaves, **how)


@every_call
def test_gradient_that_is_differentiated_again(compiled, call, tensors):
    """It is the one that is not, whatever the upstream gradient."""
    leaves = leaves_of(tensors)
    result = call(*leaves)
    for upstream in (torch.ones_like(result), torch.linspace(-2.5, 3, result.numel()).double()):
        u = upstream.reshape(result.shape)
        expected = torch.autograd.grad(call(*leaves), leaves, u)
        found = torch.autograd.grad(call(*leaves), leaves, u, create_graph=True)
        assert all(grad.requires_grad for grad in found)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)


@every_call
def test_batched_gradients(call, tensors):
    """One for each upstream gradient of a batch, also to be differentiated again."""
    leaves = leaves_of(tensors)
    result = call(*leaves)
    batch = torch.linspace(-2, 3, 3 * result.numel()).double().reshape(3, *result.shape)
    for create_graph in (False, True):
        how = {"retain_graph": True, "create_graph": create_graph}
        found = torch.autograd.grad(result, leaves, batch, is_grads_batched=True, **how)
        entries = [torch.autograd.grad(result, leaves, u, **how) for u in batch]
        for grad, expected in zip(found, zip(*entries, strict=True), strict=True):
            assert grad.requires_grad == create_graph
            torch.testing.assert_close(grad, torch.stack(expected), rtol=1e-12, atol=1e-15)
    jacobian = torch.autograd.functional.jacobian
    found, expected = (jacobian(call, tensors, vectorize=v) for v in (True, False))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("shape", [(5,), (0, 5), (3, 5, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("inplace", [False, True])
def test_batched_gradients_of_modules(generator, shape, dtype, inplace):
    scores, target, _ = problem(generator, shape, dtype, "indices")
    for reduction in REDUCTIONS:
        module = ft.CrossEntropyLoss(reduction=reduction, inplace=inplace)
        leaf = scores.clone().requires_grad_()
        loss = module(leaf * 1, target)
        batch = torch.randn((3, *loss.shape), generator=generator).to(dtype)
        (found,) = torch.autograd.grad(loss, leaf, batch, is_grads_batched=True)
        for grad, u in zip(found, batch, strict=True):
            assert_close(
                grad, loss_and_grad(ft.cross_entropy, scores, target, u, reduction=reduction)[1]
            )


@every_call
def test_any_upstream_gradient(compiled, call, tensors):
    """It multiplies the gradient, whatever its sign and size; and one per row does so by row."""
    leaves = leaves_of(tensors)
    result = call(*leaves)
    units = []
    for place in np.ndindex(result.shape):
        one = torch.zeros_like(result)
        one[place] = 1.0
        units.append(torch.autograd.grad(result, leaves, one, retain_graph=True))
    for value in (1.0, -2.5, 0.0, 1e300, "rows", "positive rows", INF):
        upstream = torch.ones_like(result)
        if isinstance(value, str):
            upstream = torch.linspace(-2, 3, max(result.numel(), 1)).reshape(result.shape).double()
            upstream = upstream.abs() if value == "positive rows" else upstream
        else:
            upstream = upstream * value
        found = torch.autograd.grad(call(*leaves), leaves, upstream)
        if value == INF:
            assert not all(grad.isfinite().all() for grad in found)
            continue
        for place, grad in enumerate(found):
            flat = upstream.flatten().tolist()
            expected = sum(u * unit[place] for u, unit in zip(flat, units, strict=True))
            torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-12 * max(map(abs, flat)))


def test_nan_in_a_row_that_does_not_count(compiled, generator):
    """It shows in no derivative, first or second, by scores, probabilities or a linear layer."""
    x = torch.randn((6, 5), generator=generator, dtype=torch.float64)
    w = torch.randn((4, 5), generator=generator, dtype=torch.float64)
    t, soft = torch.tensor([0, 1, -100, 3, 4, 0]), x.softmax(1)
    options = {"z_loss": 0.1, "label_smoothing": 0.2}
    weighted = {**options, "sample_weight": torch.tensor([1.0, 1, 0, 1, 1, 1])}
    for call, others in [
        (lambda x: ft.cross_entropy(x, t, **options), ()),
        (lambda x: ft.nll_loss(x, t), ()),
        (lambda x, soft: ft.cross_entropy(x, soft, **weighted), (soft,)),
        (lambda x, w: ft.linear_cross_entropy(x, w, t.clamp(max=3)), (w,)),
        (lambda x, w: ft.linear_cross_entropy(x, w, soft[:, :4], **weighted), (w,)),
    ]:
        found = []
        for value in (0.0, NAN):
            leaves = leaves_of([x, *others])
            with torch.no_grad():
                leaves[0][2] = value
            once = torch.autograd.grad(call(*leaves), leaves, create_graph=True)
            total = sum(grad.square().sum() for grad in once)
            again = torch.autograd.grad(total, leaves, materialize_grads=True)
            found.append([*once, *again])
        torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def test_nan_probabilities_of_a_row_that_does_not_count():
    """They do not show in second derivatives."""
    found = []
    for value in (0.0, NAN):
        x, soft = (torch.linspace(0, 1, 30).double().reshape(6, 5).requires_grad_() for _ in "xt")
        with torch.no_grad():
            soft[2] = value
        loss = ft.cross_entropy(x, soft, sample_weight=torch.tensor([1.0, 1, 0, 1, 1, 1]))
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        found.append(torch.autograd.grad(grad, (x, soft), x.detach().exp()))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


@every_call
@pytest.mark.parametrize("upstream", [1.0, 0.5])
def test_backward_again(compiled, call, tensors, upstream):
    """Each backward pass gives a gradient of its own: nobody's writing to one shows in another."""
    leaves = leaves_of(tensors)
    result = call(*leaves)
    u = torch.full_like(result, upstream)
    expected = torch.autograd.grad(call(*leaves), leaves, u)
    for _ in range(3):
        found = torch.autograd.grad(result, leaves, u, retain_graph=True)
        for grad, right in zip(found, expected, strict=True):
            torch.testing.assert_close(grad, right, rtol=1e-12, atol=1e-15)
            grad.fill_(NAN)
    torch.autograd.grad(result, leaves, u)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(result, leaves, u)


@every_call
def test_gradients_accumulate(compiled, call, tensors):
    leaves = leaves_of(tensors)
    first = call(*leaves)
    first.backward(torch.ones_like(first), retain_graph=True)
    once = [leaf.grad.clone() for leaf in leaves]
    for leaf in leaves:
        leaf.grad.mul_(3)  # as clipping does, in place
    first.backward(torch.ones_like(first))
    for leaf, grad in zip(leaves, once, strict=True):
        torch.testing.assert_close(leaf.grad, 4 * grad)


def test_gradient_is_not_copied(compiled):
    """What the kernel has written is what the leaf gets, where its upstream gradient is 1."""
    given = []
    leaf = torch.zeros(100, 10, requires_grad=True)
    loss = ft.cross_entropy(leaf, torch.zeros(100, dtype=torch.long))
    given += loss.grad_fn.gradients
    address = given.pop().data_ptr()
    loss.backward()
    assert leaf.grad.data_ptr() == address


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@every_call
def test_no_gradient_is_paid_for_where_none_is_needed(compiled, monkeypatch, call, tensors, mode):
    def refuse(*args, **kwargs):
        raise AssertionError("a gradient was computed")

    for name in ("cross_entropy", "nll_loss", "linear_cross_entropy"):
        monkeypatch.setattr(fl, f"{name}_with_grad", refuse)
    expected = call(*tensors)
    assert not expected.requires_grad
    with mode():
        result = call(*leaves_of(tensors))
    assert not result.requires_grad
    assert torch.equal(result, expected)


def test_only_the_gradients_that_are_needed(generator):
    scores, target, _ = problem(generator, (6, 5), torch.float64, "probabilities")
    ft.cross_entropy(scores, target.requires_grad_(), label_smoothing=0.1).backward()
    again = target.detach().clone().requires_grad_()
    F.cross_entropy(scores, again, label_smoothing=0.1).backward()
    torch.testing.assert_close(target.grad, again.grad)
    for argument in ("weight", "sample_weight"):
        w = torch.ones({"weight": 5, "sample_weight": 6}[argument]).requires_grad_()
        with pytest.raises(ValueError, match=f"^{argument} requires a gradient"):
            ft.cross_entropy(scores, target, **{argument: w})
        with torch.no_grad():
            ft.cross_entropy(scores, target, **{argument: w})


NEEDED = [needed for needed in itertools.product((False, True), repeat=3) if any(needed)]


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_frozen_layers(compiled, monkeypatch, reduction):
    """No gradient is computed that none asks for, and the others are the same to the bit."""
    right, found = fl.linear_cross_entropy_with_grad, []

    def watched(*arguments, **options):
        loss, gradients = right(*arguments, **options)
        found.append((gradients.inputs is not None, gradients.linear_weight is not None))
        return loss, gradients

    monkeypatch.setattr(fl, "linear_cross_entropy_with_grad", watched)
    name = f"linear_cross_entropy {reduction}"
    call, tensors = next(c[1:] for c in CALLS if c[0] == name)
    rows = torch.linspace(-2, 3, ROWS).double() if reduction == "none" else torch.tensor(0.7)
    products = 2 * ROWS * CLASSES * 3
    for upstream in (rows, torch.ones_like(rows)):
        every = torch.autograd.grad(call(*(leaves := leaves_of(tensors))), leaves, upstream)
        for needed in NEEDED:
            leaves = [t.clone().requires_grad_(n) for t, n in zip(tensors, needed, strict=True)]
            wanted = [leaf for leaf in leaves if leaf.requires_grad]
            found.clear()
            grads = torch.autograd.grad(call(*leaves), wanted, upstream)
            assert set(found) == {needed[:2]}
            expected = list(itertools.compress(every, needed))
            assert all(map(torch.equal, grads, expected))
            loss = call(*leaves)
            with FlopCounterMode(display=False) as counter:
                grads = torch.autograd.grad(loss, wanted, upstream, create_graph=True)
            assert counter.get_total_flops() == products * (1 + sum(needed[:2]))
            for grad, once in zip(grads, expected, strict=True):
                torch.testing.assert_close(grad, once, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("needed", [(False, True), (True, False), (True, True)], ids=str)
def test_frozen_layers_compiled(needed):
    """The graphs have no product that none asks for."""
    products = []

    def count(graph, inputs):
        every = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default)
        products.append(len(every))
        return make_boxed_func(graph.forward)

    generator = torch.Generator().manual_seed(0)
    x, w = (
        torch.randn(shape, generator=generator).requires_grad_(need)
        for shape, need in zip([(6, 3), (5, 3)], needed, strict=True)
    )
    target = torch.arange(6) % 5
    call = torch.compile(
        lambda: ft.linear_cross_entropy(x, w, target, l2=0.1), fullgraph=True,
        backend=aot_autograd(fw_compiler=count, bw_compiler=count),
    )  # fmt: skip
    call().backward()
    assert products == [1, sum(needed)]
    for leaf, needs_it in zip((x, w), needed, strict=True):
        assert (leaf.grad is not None) == needs_it


def test_scores_changed_after_the_call(generator):
    """The first backward pass does not need them; another one notices."""
    scores, target, _ = problem(generator, (6, 5), torch.float32, "indices")
    _, expected = loss_and_grad(ft.cross_entropy, scores, target)
    leaf = scores.clone().requires_grad_()
    x = leaf * 1
    loss = ft.cross_entropy(x, target)
    with torch.no_grad():
        x.zero_()
    loss.backward(retain_graph=True)
    torch.testing.assert_close(leaf.grad, expected)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_half_types_are_rounded_once(compiled, generator, dtype, reduction):
    """Also where the upstream gradient is large, as under a gradient scaler, or one per row."""
    scores, target, _ = problem(generator, (3000, 5), dtype, "indices")
    for size in (2.0**14, -1 / 3):
        upstream = torch.tensor(size)
        if reduction == "none":
            upstream = torch.randn(3000, generator=generator) * size
        upstream = upstream.to(dtype)
        _, grad = loss_and_grad(ft.cross_entropy, scores, target, upstream, reduction=reduction)
        _, exact = loss_and_grad(
            ft.cross_entropy, scores.double(), target, upstream.double(), reduction=reduction
        )
        np.testing.assert_array_max_ulp(
            *(g.to(dtype).float().numpy() for g in (grad, exact)), maxulp=2**16
        )  # neighbours in the half type; ties of the one rounding
        assert (grad == exact.to(dtype)).double().mean() > 0.99


@pytest.mark.parametrize("autocast", HALVES, ids=str)
def test_autocast(compiled, generator, autocast):
    """Dtypes of losses, probabilities and gradients are PyTorch's."""
    for dtype in DTYPES:
        scores, target, _ = problem(generator, (6, 5), dtype, "indices")
        for name, arguments in [
            ("cross_entropy", (target,)), ("nll_loss", (target,)),
            ("softmax", (1,)), ("log_softmax", (1,)),
        ]:  # fmt: skip
            dtypes = []
            for module in (ft, F):
                leaf = scores.clone().requires_grad_()
                with torch.autocast("cpu", autocast):
                    result = getattr(module, name)(leaf, *arguments)
                result.sum().backward()
                dtypes.append((result.dtype, leaf.grad.dtype))
            assert dtypes[0] == dtypes[1]
    layer = torch.nn.Linear(3, 5)
    features = torch.randn(6, 3, generator=generator)
    with torch.autocast("cpu", autocast):
        ours = ft.linear_cross_entropy(features, layer.weight, target, linear_bias=layer.bias)
        theirs = F.linear_cross_entropy(features, layer.weight, target, linear_bias=layer.bias)
    assert ours.dtype is theirs.dtype
    torch.testing.assert_close(ours, theirs)


# ---------------------------------------------------------------------------------------------
# In place
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("arrange", [torch.clone, transposed, strided])
def test_inplace(compiled, generator, reduction, arrange):
    """The gradient is where the scores were."""
    scores, target, _ = problem(generator, (6, 5), torch.float32, "indices")
    upstream = torch.rand(6 if reduction == "none" else (), generator=generator)
    _, expected = loss_and_grad(ft.cross_entropy, scores, target, upstream, reduction=reduction)
    leaf = scores.clone().requires_grad_()
    x = arrange(leaf) + 0 if arrange is not strided else strided(leaf)
    loss = ft.cross_entropy(x, target, reduction=reduction, inplace=True)
    loss.backward(upstream, retain_graph=True)
    torch.testing.assert_close(leaf.grad, expected)
    torch.testing.assert_close(x.detach(), expected)
    with pytest.raises(RuntimeError, match=r"go backward again through cross_entropy with inplace"):
        loss.backward(upstream)


def test_inplace_refuses_what_it_cannot_do(generator):
    scores, target, _ = problem(generator, (6, 5), torch.float32, "indices")
    leaf = scores.clone().requires_grad_()
    for x in (leaf, leaf.view(6, 5)):
        with pytest.raises(ValueError, match="input is a leaf of the graph"):
            ft.cross_entropy(x, target, inplace=True)
    assert torch.equal(leaf, scores)
    loss = ft.cross_entropy(leaf * 1, target, inplace=True)
    with pytest.raises(RuntimeError, match="differentiate twice through cross_entropy"):
        torch.autograd.grad(loss, leaf, create_graph=True)
    soft = scores.softmax(1).requires_grad_()
    with pytest.raises(ValueError, match="target requires a gradient, which needs the scores"):
        ft.cross_entropy(leaf * 1, soft, inplace=True)
    with pytest.raises(ValueError, match=r"^inplace=True: input of shape \(6, 5\) has strides"):
        ft.cross_entropy((leaf[:1] * 1).expand(6, 5), target, inplace=True)
    with pytest.raises(ValueError, match="input is negated as it is read"):
        ft.cross_entropy((torch.complex(leaf, leaf) * 1).conj().imag, target, inplace=True)
    with pytest.raises(RuntimeError, match="in eager code only"):
        torch.func.grad(lambda x: ft.cross_entropy(x * 1, target, inplace=True))(scores)
    saved = leaf.exp()  # which needs its result to go backward
    loss = ft.cross_entropy(saved, target, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    before = scores.clone()
    ft.cross_entropy(scores, target, inplace=True)
    assert torch.equal(scores, before)


CHANGES = {
    "masked_fill_": lambda x, target: x.masked_fill_(x > 0, 0.0),
    "clamp_": lambda x, target: x.clamp_(min=0.0),
    "zero_": lambda x, target: x.zero_(),
    "detached": lambda x, target: x.detach().zero_(),
    "a part": lambda x, target: x[0].fill_(1.0),
    "the whole": lambda x, target: x._base.zero_(),
    "another loss": lambda x, target: ft.cross_entropy(x, target, inplace=True),
    "a loss of a part": lambda x, target: ft.CrossEntropyLoss(inplace=True)(x[1:], target[1:]),
}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", CHANGES)
def test_changed_gradient_in_place(generator, name, reduction):
    """PyTorch's error, where it would be a wrong gradient."""
    scores, target, _ = problem(generator, (6, 5), torch.float32, "indices")
    x = (scores.requires_grad_() * 1)[:]
    loss = ft.cross_entropy(x, target, reduction=reduction, inplace=True).sum()
    CHANGES[name](x, target)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inplace_with_saved_tensors_elsewhere(generator):
    """As copies, or computed again: nothing that happens to the scores matters to them."""
    scores, target, _ = problem(generator, (6, 5), torch.float32, "indices")
    _, expected = loss_and_grad(ft.cross_entropy, scores, target)
    leaf = scores.requires_grad_()
    x = leaf * 1
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda saved: saved):
        loss = ft.cross_entropy(x, target, inplace=True)
    x.detach().zero_()
    torch.testing.assert_close(torch.autograd.grad(loss, leaf)[0], expected)

    def again(leaf):
        return ft.cross_entropy(leaf * 1, target, inplace=True)

    loss = torch.utils.checkpoint.checkpoint(again, leaf, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(loss, leaf)[0], expected)


# ---------------------------------------------------------------------------------------------
# torch.func and torch.compile: the same on every backend, so on the default one
# ---------------------------------------------------------------------------------------------


@every_call
def test_functional_transforms(call, tensors):
    """grad, grad of grad, vmap, and each of the other; against one call after another."""
    func = torch.func

    def scalar(*tensors):
        return call(*tensors).square().sum()

    leaves = leaves_of(tensors)
    expected = torch.autograd.grad(scalar(*leaves), leaves[0])[0]
    torch.testing.assert_close(func.grad(scalar)(*tensors), expected)

    batch = [torch.stack([t, 2 * t.flip(0), t - 1], 1) for t in tensors]
    if len(tensors) == 2:
        batch[1] = torch.stack([tensors[1]] * 3, 1)
    entries = list(zip(*(t.unbind(1) for t in batch), strict=True))
    second = func.jacrev(func.grad(scalar))
    for function in (call, func.grad(scalar), second):
        found = func.vmap(function, in_dims=1)(*batch)
        for entry, result in zip(entries, found, strict=True):
            torch.testing.assert_close(result, function(*entry))
    found = func.grad(lambda *ts: func.vmap(scalar, in_dims=1)(*ts).sum())(*batch)
    for entry, result in zip(entries, found.unbind(1), strict=True):
        torch.testing.assert_close(result, func.grad(scalar)(*entry))


def test_vmap_over_some_arguments(generator):
    """Scores and targets, scores alone, targets alone; without a batch dimension, too."""
    x = torch.randn((3, 6, 5), generator=generator, dtype=torch.float64)
    t = torch.randint(5, (3, 6), generator=generator)
    t[1] = -100
    s = torch.rand((3, 6), generator=generator)
    for reduction in REDUCTIONS:

        def loss(x, t, s, reduction=reduction):
            return ft.cross_entropy(x, t, reduction=reduction, sample_weight=s)

        for in_dims in [(0, 0, 0), (0, None, None), (None, 0, None), (None, None, 0)]:
            arguments = [a if dim == 0 else a[0] for a, dim in zip((x, t, s), in_dims, strict=True)]
            found = torch.vmap(loss, in_dims=in_dims)(*arguments)
            entries = [
                [a[i] if dim == 0 else a for a, dim in zip(arguments, in_dims, strict=True)]
                for i in range(3)
            ]
            expected = torch.stack([loss(*entry) for entry in entries])
            torch.testing.assert_close(found, expected, equal_nan=True)
        single = torch.vmap(lambda x, t: ft.cross_entropy(x, t, reduction=reduction))  # noqa: B023
        torch.testing.assert_close(
            single(x[0], t[0]), ft.cross_entropy(x[0], t[0], reduction="none")
        )
    n = torch.tensor([1.0, 2.0, 3.0])
    for loss in (ft.cross_entropy, torch.func.grad(ft.cross_entropy)):
        found = torch.vmap(lambda n: loss(x[0], t[0], normalizer=n))(n)  # noqa: B023
        expected = torch.stack([loss(x[0], t[0], normalizer=float(value)) for value in n])
        torch.testing.assert_close(found, expected)
    with pytest.raises(NotImplementedError, match="vmap over z_loss is not supported"):
        torch.vmap(lambda z: ft.cross_entropy(x[0], t[0], z_loss=z))(n)
    with pytest.raises(NotImplementedError, match="vmap over weight"):
        torch.vmap(lambda w: ft.cross_entropy(x[0], t[0], w))(torch.ones(3, 5))
    torch.testing.assert_close(
        torch.vmap(lambda x: ft.softmax(x, 0))(x[0, 0]), torch.ones(5).double()
    )


@pytest.mark.parametrize("function", [ft.cross_entropy, ft.nll_loss])
def test_vmap_where_an_entry_has_no_row_that_counts(generator, function):
    """Its gradient and its second derivatives are 0, as without vmap."""
    x = torch.randn((3, 6, 5), generator=generator, dtype=torch.float64)
    t = torch.randint(5, (3, 6), generator=generator)
    t[1] = -100
    func = torch.func
    gradient = func.grad(lambda x, t: function(x, t, sample_weight=torch.arange(6.0)))
    curvature = func.grad(lambda x, t: gradient(x, t).square().sum())
    for differentiate in (gradient, curvature):
        found = func.vmap(differentiate)(x, t)
        expected = [differentiate(*entry) for entry in zip(x, t, strict=True)]
        torch.testing.assert_close(found, torch.stack(expected))
        assert not found[1].any()


# PyTorch's first forward-mode derivative compiles something with its own old compiler.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@every_call
def test_forward_mode_is_refused(call, tensors):
    """Clearly, where PyTorch would otherwise overlook the tangent."""
    tangents = tuple(torch.ones_like(tensor) for tensor in tensors)
    for differentiate in (
        lambda: torch.func.jvp(call, tensors, tangents),
        lambda: torch.func.hessian(lambda *ts: call(*ts).sum())(*tensors),
        lambda: torch.autograd.functional.jacobian(
            call, tensors, vectorize=True, strategy="forward-mode"
        ),
    ):
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            differentiate()
    forward_ad = torch.autograd.forward_ad
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        call(*(forward_ad.make_dual(t, v) for t, v in zip(tensors, tangents, strict=True)))


@every_call
def test_compile(call, tensors):
    """One graph, no break; loss and gradients as in eager code."""
    torch.compiler.reset()
    found = []
    for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        leaves = leaves_of(tensors)
        result = function(*leaves)
        result.square().sum().backward()
        found.append([result.detach(), *(leaf.grad for leaf in leaves)])
    for eager, in_graph in zip(*found, strict=True):
        torch.testing.assert_close(in_graph, eager)


def test_compile_with_changing_shapes_and_errors():
    torch.compiler.reset()
    loss = torch.compile(ft.cross_entropy, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (3, 5, 17):
        x = torch.randn(n, 4, dtype=torch.bfloat16, requires_grad=True)
        result = loss(x, torch.zeros(n, dtype=torch.long), reduction="none")
        assert result.dtype is torch.bfloat16
        assert result.shape == (n,)
        result.sum().backward()
        assert x.grad.shape == (n, 4)
    with pytest.raises(IndexError, match=r"target\[1\] = 9 is out of range for 4 classes"):
        loss(torch.randn(2, 4), torch.tensor([0, 9]))


@every_call
def test_operators_are_registered_right(call, tensors):
    """Schema, fake kernels and autograd, as PyTorch's own checks of operators see them."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    graph = make_fx(lambda *ts: call(*ts))(*tensors)
    targets = {node.target for node in graph.graph.nodes if node.op == "call_function"}
    operators = [t for t in targets if str(t).startswith("fastloss.")]
    assert operators
    torch.testing.assert_close(graph(*tensors), call(*tensors))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = call(*(mode.from_tensor(t) for t in tensors))
    real = call(*tensors)
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


def test_opcheck(compiled, generator):
    x = torch.randn((6, 5), generator=generator, requires_grad=True)
    t = torch.randint(5, (6,), generator=generator)
    options = Options(0.1, 0.0, 3.0, "cross_entropy", -100, "mean", compiled)
    rest = _ops.in_graph(options)
    for name, arguments in [
        ("loss", (x, t, None, None, *rest)),
        ("loss_backward", (torch.ones(()), x, t, None, None, *rest)),
        ("probabilities", (x, True, 1, compiled)),
        ("probabilities_backward", (x, x.detach().softmax(1), False, 1, compiled)),
    ]:
        torch.library.opcheck(getattr(torch.ops.fastloss, name).default, arguments)


def test_export(generator):
    scores, target, _ = problem(generator, (6, 5), torch.float32, "indices")
    exported = torch.export.export(ft.CrossEntropyLoss(label_smoothing=0.1), (scores, target))
    expected = ft.cross_entropy(scores, target, label_smoothing=0.1)
    torch.testing.assert_close(exported.module()(scores, target), expected)


def test_deterministic_algorithms(generator):
    scores, target, _ = problem(generator, (300, 50), torch.float32, "indices")
    torch.use_deterministic_algorithms(True)
    try:
        results = [loss_and_grad(ft.cross_entropy, scores, target) for _ in range(3)]
        leaf = scores.double().requires_grad_()
        (grad,) = torch.autograd.grad(ft.cross_entropy(leaf, target), leaf, create_graph=True)
        grad.square().sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    for loss, grad in results:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(grad, results[0][1])


# ---------------------------------------------------------------------------------------------
# Threads
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def torch_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_fewer_threads(compiled, monkeypatch, torch_threads):
    """As few as either of the two settings asks for; the results are the same."""
    asked = []
    original = fl.cross_entropy

    def spy(*args, **kwargs):
        asked.append(kwargs["num_threads"])
        return original(*args, **kwargs)

    monkeypatch.setattr(fl, "cross_entropy", spy)
    x, t = torch.randn(1000, 100), torch.zeros(1000, dtype=torch.long)
    torch.set_num_threads(2)
    fl.set_num_threads(2)
    losses = [ft.cross_entropy(x, t)]
    fl.set_num_threads(1)
    losses.append(ft.cross_entropy(x, t))
    fl.set_num_threads(2)
    torch.set_num_threads(1)
    losses.append(ft.cross_entropy(x, t))
    assert asked == [2, 1, 1]
    assert len({loss.item() for loss in losses}) == 1


@pytest.mark.parametrize("order", ["torch, fastloss.torch", "fastloss, numba, fastloss.torch"])
def test_one_pool_of_threads(python, compiled, order):
    """Whichever is imported first, PyTorch and Cython's kernels share the threads of OpenMP."""
    code = f"""
import os
os.environ["OMP_NUM_THREADS"] = "3"
import {order}, torch
torch.set_num_threads(3)
import fastloss.torch as ft
import fastloss
fastloss.set_num_threads(3)
def threads():
    return len(os.listdir("/proc/self/task"))
x, t = torch.randn(4096, 1000), torch.zeros(4096, dtype=torch.long)
(x + 1).sum()
before = threads()
for _ in range(3):
    ft.cross_entropy(x.requires_grad_(), t, backend="cython").backward()
    (x.detach() + 1).sum()
between = threads()
torch.set_num_threads(1)
alone = threads()
ft.cross_entropy(x, t, backend={compiled!r}).backward()
print(before, between, threads() - alone <= (0 if {compiled!r} == "cython" else 8))
"""
    before, between, bounded = python(code, flags=["-W", "ignore"]).split()
    assert int(between) <= int(before) + 2  # autograd may have started a thread of its own
    assert bounded == "True"


# ---------------------------------------------------------------------------------------------
# Modules
# ---------------------------------------------------------------------------------------------

WEIGHT = torch.tensor([1.0, 2.0, 0.5])
MODULES = [
    (ft.CrossEntropyLoss(WEIGHT, ignore_index=1, label_smoothing=0.1), torch.nn.CrossEntropyLoss),
    (ft.CrossEntropyLoss(reduction="sum", z_loss=0.1, backend="numba"), torch.nn.CrossEntropyLoss),
    (ft.NLLLoss(WEIGHT, reduction="none", normalizer=None), torch.nn.NLLLoss),
    (ft.Softmax(dim=1, backend="numpy"), torch.nn.Softmax),
    (ft.LogSoftmax(1), torch.nn.LogSoftmax),
]
every_module = pytest.mark.parametrize(("module", "their_class"), MODULES, ids=str)


def call_module(module, scores):
    loss = isinstance(module, torch.nn.CrossEntropyLoss | torch.nn.NLLLoss)
    return module(scores, torch.tensor([0, 2])) if loss else module(scores)


@every_module
def test_modules(module, their_class, tmp_path):
    scores = torch.tensor([[5.0, 4.0, 2.0], [0.0, 1.0, -1.0]])
    result = call_module(module, scores)
    assert isinstance(module, their_class)
    if not getattr(module, "z_loss", 0):
        theirs = their_class.__new__(their_class)
        theirs.__dict__.update(copy.deepcopy(module.__dict__))
        torch.testing.assert_close(result, call_module(theirs, scores))

    state = module.state_dict()
    assert list(state) == list(theirs.state_dict() if "theirs" in locals() else state)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert repr(loaded) == repr(module)
    assert torch.equal(call_module(loaded, scores), result)
    torch.save(state, tmp_path / "state.pt")
    loaded.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(call_module(copy.deepcopy(loaded), scores), result)


def test_module_options_and_repr():
    assert repr(MODULES[0][0]) == "CrossEntropyLoss(ignore_index=1, label_smoothing=0.1)"
    assert repr(MODULES[1][0]) == "CrossEntropyLoss(reduction='sum', z_loss=0.1, backend='numba')"
    assert repr(ft.NLLLoss()) == "NLLLoss()"
    assert repr(MODULES[3][0]) == "Softmax(dim=1, backend='numpy')"
    assert repr(MODULES[4][0]) == "LogSoftmax(dim=1)"
    with pytest.raises(ValueError, match="size_average = True is a legacy argument"):
        ft.CrossEntropyLoss(size_average=True)
    with pytest.raises(ValueError, match="reduce = False is a legacy argument"):
        ft.NLLLoss(reduce=False)
    module = ft.CrossEntropyLoss(WEIGHT).double()  # weight is a buffer
    assert module.weight.dtype is torch.float64
    scores = torch.randn(2, 3, requires_grad=True)
    s = torch.tensor([0.5, 2.0])
    loss = ft.CrossEntropyLoss(z_loss=0.5)(scores, torch.tensor([0, 2]), s)
    expected = ft.cross_entropy(scores, torch.tensor([0, 2]), z_loss=0.5, sample_weight=s)
    assert torch.equal(loss, expected)
    with pytest.raises(ValueError, match="a leaf of the graph"):
        ft.CrossEntropyLoss(inplace=True)(scores, torch.tensor([0, 2]))


# ---------------------------------------------------------------------------------------------
# Errors, and what the kernels do not take
# ---------------------------------------------------------------------------------------------

X, T = torch.zeros(3, 4), torch.tensor([0, 1, 2])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ft.cross_entropy([[1.0]], T), TypeError, "input is a list, expected a torch.Ten"),
        (lambda: ft.cross_entropy(X, None), TypeError, "target is a NoneType, expected a torch.T"),
        (lambda: ft.cross_entropy(X, T, [1, 2]), TypeError, "weight is a list, expected a torch"),
        (lambda: ft.cross_entropy(X.long(), T), TypeError, "input has dtype torch.int64; expected"),
        (lambda: ft.softmax(X.to(torch.cfloat), 1), TypeError, "input has dtype torch.complex64"),
        (lambda: ft.cross_entropy(X, T.bool()), TypeError, "target has dtype bool"),
        (lambda: ft.cross_entropy(X, T + 2), IndexError, r"target\[2\] = 4 is out of range for 4"),
        (lambda: ft.cross_entropy(X, -T), IndexError, r"target\[1\] = -1 is out of range for 4"),
        (lambda: ft.cross_entropy(X, T[:2]), ValueError, r"target has shape \(2,\), expected \(3,"),
        (lambda: ft.cross_entropy(X, T, reduction="avg"), ValueError, "reduction = 'avg' is not"),
        (lambda: ft.cross_entropy(X, X, ignore_index=2), ValueError, "ignore_index = 2 is for cla"),
        (lambda: ft.cross_entropy(X, T, z_loss=-1), ValueError, "z_loss = -1.0 is not a finite"),
        (
            lambda: ft.cross_entropy(X, T, normalizer=torch.tensor(0)),
            ValueError, "normalizer = 0.0 is not a finite",
        ),
        (
            lambda: ft.cross_entropy(X, T, normalizer=torch.ones(2)),
            TypeError, r"normalizer = tensor\(\[1., 1.\]\) is not a real number",
        ),
        (lambda: ft.cross_entropy(X, T, normalizer="3"), TypeError, "normalizer = '3' is not"),
        (
            lambda: ft.cross_entropy(X, T, normalizer=torch.ones((), requires_grad=True)),
            ValueError, "normalizer requires a gradient, and there is none for it; detach it",
        ),
        (
            lambda: fl.cross_entropy(X, T, normalizer=torch.tensor(3j)),
            TypeError, r"normalizer = tensor\(0.\+3.j\) is not a real number",
        ),
        (lambda: ft.cross_entropy(X[:, :0], T), ValueError, "no classes along axis 1"),
        (lambda: ft.nll_loss(X, X), TypeError, "target has dtype float32; expected integers"),
        (lambda: ft.softmax(X), ValueError, "dim is not given, and softmax does not guess it"),
        (lambda: ft.softmax(X, 2), IndexError, r"dim = 2 is out of range for input of shape \(3, "),
        (lambda: ft.cross_entropy(X.to("meta"), T), TypeError, "input is on the device meta; the"),
        (lambda: ft.cross_entropy(X, T.to("meta")), TypeError, "target is on the device meta; th"),
        (lambda: ft.softmax(X.to_sparse(), 1), TypeError, "input has the layout torch.sparse_coo"),
        (lambda: ft.linear_cross_entropy(X, X[:, 1:], T), ValueError, "linear_weight has shape"),
        (
            lambda: ft.linear_cross_entropy(X, X, T, linear_bias=X[0]),
            ValueError, r"linear_bias has shape \(4,\), expected \(3,\)",
        ),
        (lambda: ft.linear_cross_entropy(X, X, T, l2=-1), ValueError, "l2 = -1.0 is not a finite"),
        (
            lambda: ft.linear_cross_entropy(X, X, T, l2=1, reduction="none"),
            ValueError, "l2",
        ),
    ],
)  # fmt: skip
def test_errors(call, error, message):
    with pytest.raises(error, match=f"^.*{message}"):
        call()


def test_every_error_is_that_of_the_gradient_too(compiled):
    leaf = X.clone().requires_grad_()
    with pytest.raises(IndexError, match=r"target\[2\] = 4 is out of range for 4 classes"):
        ft.cross_entropy(leaf, T + 2)
    assert leaf.grad is None


@pytest.mark.filterwarnings("ignore::UserWarning")  # quantized tensors are on their way out
def test_fallback():
    """PyTorch's function where the kernels cannot, and never for options that it lacks."""
    meta, target = X.to("meta"), T.to("meta")
    assert ft.cross_entropy(meta, target, fallback=True).device.type == "meta"
    assert ft.nll_loss(meta, target, fallback=True).device.type == "meta"
    assert ft.softmax(meta, 1, fallback=True).shape == (3, 4)
    assert ft.log_softmax(meta, 1, fallback=True).device.type == "meta"
    w = torch.zeros(5, 4, device="meta")
    assert ft.linear_cross_entropy(meta, w, target, fallback=True).device.type == "meta"
    assert ft.CrossEntropyLoss(fallback=True)(meta, target).device.type == "meta"
    for option in (
        {"z_loss": 0.1},
        {"normalizer": 2.0},
        {"inplace": True},
        {"sample_weight": X[0]},
    ):
        (name,) = option
        with pytest.raises(ValueError, match=f"^{name} is unknown to PyTorch's cross_entropy"):
            ft.cross_entropy(meta, target, fallback=True, **option)
    quantized = torch.quantize_per_tensor(X, 1.0, 0, torch.quint8)
    with pytest.raises(TypeError, match="input is quantized"):
        ft.softmax(quantized, 1)
    sparse = X.to_sparse()
    assert torch.equal(
        ft.softmax(sparse.to_dense(), 1, fallback=True), ft.softmax(X, 1)
    )  # what the kernels take does not fall back


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("kind", ["strided", "jagged", "DTensor"])
def test_nested_and_distributed_tensors(group, kind):
    """An error that says what they are, from every function; with fallback PyTorch's own result."""
    if kind == "DTensor":
        from torch.distributed.tensor import DeviceMesh, distribute_tensor

        x, t = (distribute_tensor(part, DeviceMesh("cpu", [0])) for part in (X, T))
        message = "is a DTensor; the kernels take plain ones"
    else:
        layout = getattr(torch, kind)
        x, t = (torch.nested.nested_tensor([part, part[:2]], layout=layout) for part in (X, T))
        message = "is a nested tensor; the kernels take dense ones"
    calls = {
        "softmax": lambda module, **how: module.softmax(x, -1, **how),
        "log_softmax": lambda module, **how: module.log_softmax(x, -1, **how),
        "cross_entropy": lambda module, **how: module.cross_entropy(x, t, **how),
        "nll_loss": lambda module, **how: module.nll_loss(x, t, **how),
        "linear": lambda module, **how: module.linear_cross_entropy(x, x, t, **how),
    }
    others = [
        ("target", lambda: ft.cross_entropy(X, t)),
        ("input", lambda: ft.CrossEntropyLoss()(x, t)),
        ("logits_shard", lambda: ft.vocab_parallel_cross_entropy(x, t, 0)),
    ]
    for name, call in [*(("input", lambda c=c: c(ft)) for c in calls.values()), *others]:
        with pytest.raises(TypeError, match=f"^{name} {message}"):
            call()
    theirs = {"strided": ["softmax"], "jagged": ["softmax", "log_softmax"], "DTensor": calls}
    for name in theirs[kind]:
        found, expected = calls[name](ft, fallback=True), calls[name](F)
        assert type(found) is type(expected)
        parts = zip(*((r.unbind() if r.is_nested else [r]) for r in (found, expected)), strict=True)
        assert all((part == their_part).all() for part, their_part in parts)


def test_subclasses_and_modes():
    """Tensor-like classes see our functions, as they see PyTorch's; default devices do not leak."""
    seen = []

    class Noting(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            seen.append(function)
            return super().__torch_function__(function, types, args, kwargs or {})

    x = X.as_subclass(Noting)
    assert ft.cross_entropy(x, T).item() == pytest.approx(math.log(4))
    assert ft.softmax(x, 1).sum().item() == pytest.approx(3)
    assert ft.linear_cross_entropy(x, X, T).item() == pytest.approx(math.log(3))
    assert {ft.cross_entropy, ft.softmax, ft.linear_cross_entropy} <= set(seen)
    parameter = torch.nn.Parameter(X.clone())
    with torch.device("meta"):
        ft.cross_entropy(parameter, X.softmax(1), label_smoothing=0.1).backward()
        loss = ft.cross_entropy(parameter, T, reduction="none")
        assert loss.device.type == "cpu"
        (grad,) = torch.autograd.grad(loss.sum(), parameter, create_graph=True)
        torch.autograd.grad(grad.square().sum(), parameter)
    assert parameter.grad.device.type == "cpu"


# ---------------------------------------------------------------------------------------------
# The short way of the usual call
# ---------------------------------------------------------------------------------------------

SEEN = []  # by the subclasses and modes below


class NotingFunctions(torch.Tensor):
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        SEEN.append(function)
        return super().__torch_function__(function, types, args, kwargs or {})


class NotingOperators(torch.Tensor):
    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        SEEN.append(operator)
        with torch._C._DisableTorchDispatch():
            return operator(*args, **(kwargs or {}))

    __torch_function__ = torch._C._disabled_torch_function_impl


class FunctionMode(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        SEEN.append(function)
        return function(*args, **(kwargs or {}))


class DispatchMode(TorchDispatchMode):
    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        SEEN.append(operator)
        return operator(*args, **(kwargs or {}))


def quantized(x):
    return torch.quantize_per_tensor(x.detach().float(), 0.1, 0, torch.qint32)


def nested(x):
    return torch.nested.nested_tensor([x[:3].detach(), x[3:].detach()])


def per_entry(call, x, y):
    return torch.func.vmap(call)(torch.stack([x, 2 * x]), torch.stack([y, y]))


def batched(call, x, y):
    """With a batch of ``is_grads_batched=True`` for scores."""
    square = x * x

    class Through(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, upstream):
            loss = call(upstream, y)
            return upstream * (loss.unsqueeze(-1) if 0 < loss.dim() < x.dim() else loss)

    upstreams = torch.stack([square, x]).detach()
    return torch.autograd.grad(Through.apply(x), x, upstreams, is_grads_batched=True)[0]


def traced(call, x, y):
    return torch.jit.trace(call, (x, y), check_trace=False)(x * 2, y)


def dual(call, x, y):
    with forward_ad.dual_level():
        return call(forward_ad.make_dual(x.detach(), x.detach()), y)


def within(context):
    def run(call, x, y):
        with context():
            return call(x, y)

    return run


SCORES = {
    "usual": torch.clone, "vector": lambda x: x[0], "no classes": lambda x: x[:, :0],
    "scalar": lambda x: x[0, 0], "no rows": lambda x: x[:0], "NaN": lambda x: x * NAN,
    "meta": lambda x: x.to("meta"), "sparse": torch.Tensor.to_sparse, "nested": nested,
    "quantized": quantized, "negated": torch._neg_view, "transposed": transposed,
    "strided": strided, "expanded": expanded, "list": torch.Tensor.tolist,
    "array": lambda x: x.detach().numpy(), "None": lambda x: None,
    "parameter": torch.nn.Parameter, "frozen": torch.Tensor.detach,
    "functions": lambda x: x.as_subclass(NotingFunctions),
    "operators": lambda x: x.as_subclass(NotingOperators),
    **{
        str(dtype): lambda x, dtype=dtype: x.to(dtype)
        for dtype in (*DTYPES, torch.long, torch.bool, torch.cfloat)
    },
}  # fmt: skip
TARGETS = {
    "meta": lambda y: y.to("meta"), "sparse": torch.Tensor.to_sparse, "short": lambda y: y[:3],
    "column": lambda y: y[:, None], "out of range": lambda y: y + 1, "negative": lambda y: y - 1,
    "list": torch.Tensor.tolist, "None": lambda y: None, "nested": nested, "quantized": quantized,
    "functions": lambda y: y.as_subclass(NotingFunctions),
    "operators": lambda y: y.as_subclass(NotingOperators),
    "probabilities": lambda y: torch.linspace(0, 1, 20).reshape(5, 4),
    "their gradient": lambda y: torch.linspace(0, 1, 20).reshape(5, 4).requires_grad_(),
    **{
        str(dtype): lambda y, dtype=dtype: y.to(dtype)
        for dtype in (torch.int32, torch.int8, torch.uint8, torch.bool, torch.float, torch.cfloat)
    },
}  # fmt: skip
AROUND = {
    "no_grad": within(torch.no_grad), "inference": within(torch.inference_mode),
    "autocast": within(lambda: torch.autocast("cpu", torch.bfloat16)),
    "function mode": within(FunctionMode), "dispatch mode": within(DispatchMode),
    "fake": within(lambda: FakeTensorMode(allow_non_fake_inputs=True)),
    "default device": within(lambda: torch.device("meta")),
    "grad": lambda call, x, y: torch.func.grad(lambda x: call(x, y).sum())(x),
    "vmap": per_entry, "batched": batched, "traced": traced, "dual": dual,
    "make_fx": lambda call, x, y: make_fx(call)(x, y)(x * 2, y),
}  # fmt: skip
OF_LOSSES = [
    *({"reduction": r} for r in ("sum", "none", "mea", None, np.str_("mean"))),
    *({"ignore_index": i} for i in (-1, 1, -100.0, np.int64(-100), "1", None, 1 << 70)),
    *({"normalizer": n} for n in (2.0, 0.0, torch.tensor(3.0), torch.ones(()).requires_grad_())),
    *({"weight": w} for w in (torch.ones(4), torch.ones(3), torch.ones(4).requires_grad_(), [1.0])),
    {"sample_weight": torch.ones(5)}, {"sample_weight": torch.ones(5, device="meta")},
    {"size_average": True}, {"reduce": False}, {"size_average": False, "weight": torch.ones(4)},
]  # fmt: skip
LEAF = torch.tensor(0.1, requires_grad=True)
OF_CROSS_ENTROPY = [
    *(
        {name: value}
        for name in ("label_smoothing", "z_loss")
        for value in (0, 0.1, -0.0, 2.0, -1.0, NAN, "0", None, True, torch.tensor(0.1), LEAF)
    ),
    {"inplace": True}, {"fallback": True},
]  # fmt: skip
OF_ALL = [{"backend": b} for b in ("numpy", "numb", 3)]
OF_MAPS = [{"dim": d} for d in (0, -1, 2, None, 1.0)] + [{"dtype": torch.double}]


def slightly_off():
    """Function, options, and what is done with scores, target and call."""
    same = torch.clone
    for name in ("cross_entropy", "nll_loss", "softmax", "log_softmax"):
        options = [*OF_ALL, *(OF_LOSSES if "ax" not in name else OF_MAPS)]
        options += OF_CROSS_ENTROPY if name == "cross_entropy" else []
        cases = {f"{option}": (option, same, same, None) for option in options}
        cases |= {f"scores {key}": ({}, change, same, None) for key, change in SCORES.items()}
        cases |= {f"around {key}": ({}, same, same, around) for key, around in AROUND.items()}
        if "ax" not in name:
            cases |= {f"target {key}": ({}, same, change, None) for key, change in TARGETS.items()}
        for key, case in cases.items():
            yield pytest.param(name, *case, id=f"{name} {key}")


def told(tensor):
    """All that is known of a tensor, to the bit."""
    about = [type(tensor), tensor.dtype, tensor.device, tensor.shape, tensor.stride()]
    about += [tensor.requires_grad, str(tensor.grad_fn).split(" ")[0]]
    if tensor.is_cpu and not isinstance(tensor, FakeTensor):
        about.append(tensor.detach().double().numpy(force=True).tobytes())
    return about


def outcome(name, options, of_scores, of_target, around):
    """What a call and its derivatives return, or raise; and what others saw of it."""
    SEEN.clear()
    results = []
    x = torch.arange(20.0).sin().mul(3).reshape(5, 4).requires_grad_()
    y = torch.tensor([0, 3, -100, 1, 1])

    def call(scores, target):
        if name.endswith("softmax"):
            return getattr(ft, name)(scores, **{"dim": 1, **options})
        return getattr(ft, name)(scores, target, **options)

    try:
        scores, target = of_scores(x), of_target(y)
        result = around(call, scores, target) if around else call(scores, target)
        results.append(result)
        if result.requires_grad and scores.requires_grad:
            for create_graph in (False, True):
                (grad,) = torch.autograd.grad(
                    2 * result.sum(), scores, create_graph=create_graph, retain_graph=True
                )
                results.append(grad)
            results += torch.autograd.grad(grad.square().sum(), scores)
    except Exception as error:  # whatever it is
        return [*map(told, results), type(error), str(error)], [*SEEN]
    return [*map(told, results)], [*SEEN]


@pytest.mark.filterwarnings("ignore")  # quantized tensors, named ones, traces
@pytest.mark.parametrize(("name", "options", "of_scores", "of_target", "around"), [*slightly_off()])
def test_both_ways(monkeypatch, name, options, of_scores, of_target, around):
    """Usual calls, and those that are nearly so, are answered as the general way answers them."""
    arguments = name, options, of_scores, of_target, around
    found = outcome(*arguments)
    monkeypatch.setattr(_ops, "is_plain", lambda *_: False)
    assert found == outcome(*arguments)


@pytest.mark.parametrize("make", [torch.clone, torch.Tensor.detach, torch.nn.Parameter])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_the_usual_call_takes_the_short_way(monkeypatch, make, dtype, index):
    x, t = make(X.to(dtype).requires_grad_()), T.to(index)
    monkeypatch.delattr(functional, "_elsewhere")
    for call in (ft.cross_entropy, ft.nll_loss, ft.CrossEntropyLoss(), ft.NLLLoss()):
        call(x, t)
    for call in (ft.softmax, ft.log_softmax):
        call(x, 1)


def test_without_pytorch(python):
    code = """
import sys
sys.modules["torch"] = None
import fastloss
try:
    from fastloss.torch import cross_entropy
except ImportError as error:
    print(error)
"""
    assert python(code) == "fastloss.torch needs PyTorch: run `pip install 'fastloss[torch]'`"


def test_bfloat16_without_ml_dtypes(monkeypatch):
    _compute._ml_dtypes.cache_clear()
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(ImportError, match="run `pip install ml_dtypes`"):
        ft.softmax(X.bfloat16(), 1)
    _compute._ml_dtypes.cache_clear()
