"""The PyTorch adapter against torch.nn.functional, and under autograd."""

import pytest
from conftest import need

torch = need("torch")
F = torch.nn.functional
ft = pytest.importorskip("fastloss.torch")

TARGETS = ("indices", "probabilities")


@pytest.fixture(params=["cython", "numba"])
def compiled(request):
    return request.param


def example(shape, dtype, target="indices", seed=0):
    """Scores with the classes along dimension 1 (0 where there is no batch) and a target."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(shape, generator=generator, dtype=torch.float64).mul(3).to(dtype)
    dim = min(1, len(shape) - 1)
    if target == "probabilities":
        return scores, torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype)
    rows = shape[:dim] + shape[dim + 1 :]
    return scores, torch.randint(shape[dim], rows, generator=generator)


def both(scores, target, ours, theirs, upstream=None):
    """Loss and gradient of either."""
    for function in (ours, theirs):
        leaf = scores.detach().clone().requires_grad_()
        loss = function(leaf, target)
        loss.backward(torch.ones_like(loss) if upstream is None else upstream)
        yield loss.detach(), leaf.grad


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(7,), (6, 7), (4, 7, 3), (2, 7, 3, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cross_entropy(compiled, shape, dtype, target, reduction):
    options = {"reduction": reduction, "label_smoothing": 0.1, "weight": torch.rand(7).to(dtype)}
    (loss, grad), (their_loss, their_grad) = both(
        *example(shape, dtype, target),
        lambda x, t: ft.cross_entropy(x, t, backend=compiled, **options),
        lambda x, t: F.cross_entropy(x, t, **options),
    )
    torch.testing.assert_close(loss, their_loss)
    torch.testing.assert_close(grad, their_grad)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_derivatives(compiled, reduction, target):
    scores, target = example((5, 4), torch.float64, target)
    sample_weight = torch.rand(5)
    differentiable = [t.requires_grad_() for t in (scores, target) if t.is_floating_point()]

    def loss(x, t=target):
        return ft.cross_entropy(
            x, t, torch.arange(4.0), reduction=reduction, label_smoothing=0.1, z_loss=0.2,
            sample_weight=sample_weight, backend=compiled,
        )  # fmt: skip

    assert torch.autograd.gradcheck(loss, differentiable)
    assert torch.autograd.gradgradcheck(loss, differentiable)
