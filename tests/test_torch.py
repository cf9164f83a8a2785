"""The PyTorch adapter against torch.nn.functional, and under autograd."""

import copy
import io
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
from conftest import need

import fastloss as fl

torch = need("torch")
ft = pytest.importorskip("fastloss.torch", exc_type=ImportError)
from fastloss.torch import _compute  # noqa: E402

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
    ignored = (-100, 0) if kind == "indices" and num_classes > 1 else (-100,)
    grid = itertools.product(REDUCTIONS, (None, weight), ignored, (0.0, 0.1, 1.0), ARRANGEMENTS)
    for reduction, w, ignore_index, smoothing, arrange in grid:
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
        if their_loss.isnan().any():  # every row is ignored: see the differences
            their_grad = torch.zeros_like(their_grad)
        assert_close(loss, their_loss)
        assert_close(grad, their_grad)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nll_loss(compiled, generator, shape, dtype):
    scores, target, num_classes = problem(generator, shape, dtype, "indices")
    theirs = theirs_of(F.nll_loss, dtype)
    weight = torch.rand(num_classes, generator=generator).add(0.1).to(dtype)
    for reduction, w, arrange in itertools.product(REDUCTIONS, (None, weight), ARRANGEMENTS):
        x = arrange(scores)
        options = {"weight": w, "reduction": reduction, "ignore_index": 2}
        loss, grad = loss_and_grad(ft.nll_loss, x, target, **options)
        their_loss, their_grad = loss_and_grad(theirs, x, target, **options)
        if their_loss.isnan().any():
            their_grad = torch.zeros_like(their_grad)
        assert_close(loss, their_loss)
        assert_close(grad, their_grad)


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
@pytest.mark.parametrize("shape", [(), *SHAPES, (3, 0)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_softmax(compiled, generator, name, shape, dtype):
    scores = torch.randn(shape, generator=generator).to(dtype)
    upstream = torch.randn(shape, generator=generator).to(dtype)
    ours, theirs = getattr(ft, name), getattr(F, name)
    for dim, arrange in itertools.product(range(-len(shape), max(len(shape), 1)), ARRANGEMENTS):
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
        # Gradients of half types come from rounded probabilities.
        scale = 8 if dtype in HALVES else 1
        largest = max(float(upstream.double().abs().max()), 1) if upstream.numel() else 1
        torch.testing.assert_close(
            leaf.grad, their_leaf.grad, rtol=0, atol=scale * TOLERANCE[dtype] * 4 * largest
        )
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
        for options in ({}, {"weight": torch.rand(5).to(dtype), "label_smoothing": 0.1}):
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
    expected, grad = fl.cross_entropy_with_grad(
        *arrays, axis=1, sample_weight=s.numpy(), **options
    )
    loss, our_grad = loss_and_grad(ft.cross_entropy, scores, target, sample_weight=s, **options)
    assert loss.item() == np.float32(expected)
    np.testing.assert_array_equal(our_grad.numpy(), grad)

    expected, grad = fl.nll_loss_with_grad(*arrays, axis=1, sample_weight=s.numpy(), normalizer=2)
    loss, our_grad = loss_and_grad(ft.nll_loss, scores, target, sample_weight=s, normalizer=2)
    assert loss.item() == np.float32(expected)
    np.testing.assert_array_equal(our_grad.numpy(), grad)


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


def of_many_halves(module, x):
    """4097 times the same loss."""
    rows = x.expand(4097, -1)
    return module.cross_entropy(rows, torch.zeros(4097, dtype=torch.long), reduction="sum")


def all_ignored(module, x):
    return module.cross_entropy(x, torch.full((len(x),), -100))


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


def scaled_half(module, x):
    """As under a gradient scaler: p * 2**-10 is too small for float16, 64 p is not."""
    return 2.0**16 * module.cross_entropy(x.expand(1024, -1), torch.zeros(1024, dtype=torch.long))


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
        "sums of half types", "losses are computed in float32, summed in float64, rounded once",
        loss_of(of_many_halves, [0.0, 0.0], dtype=torch.bfloat16),
        2832.0,  # 4097 ln 2 = 2839.8: the nearest bfloat16
        pytest.approx(2848, abs=8),
    ),
    Difference(
        "gradient where every row is ignored", "a mean over nothing changes nothing",
        grad_of(all_ignored, [1.0, 2.0]), [[0.0, 0.0]], [[pytest.approx(NAN, nan_ok=True)] * 2],
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
        "a negative weight", "no loss is meant by it",
        with_options(weight=torch.tensor([-1.0, 2.0]), reduction="sum"), ValueError, -1.3133,
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
