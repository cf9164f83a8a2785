"""What graphs of PyTorch hold of our operators: how results lie, and numbers that change."""

import numpy as np
import pytest
from support.backends import need

torch = need("torch")
import fastloss.torch as ft  # noqa: E402
from fastloss.torch import _ops  # noqa: E402
from fastloss.torch._compute import Options  # noqa: E402


def randn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


# ---------------------------------------------------------------------------------------------
# Layouts: results lie as the kernels put them, and graphs know beforehand
# ---------------------------------------------------------------------------------------------

LAYOUTS = {
    "contiguous": randn(4, 5, 3),
    "transposed": randn(4, 3, 5).mT,
    "sliced": randn(4, 5, 6)[..., ::2],
    "sliced and transposed": randn(4, 5, 5)[:, :-2].mT,
    "channels last": randn(2, 5, 3, 2).to(memory_format=torch.channels_last),
    "expanded": randn(1, 5, 1).expand(4, 5, 3),
    "empty": randn(3, 0, 5).permute(1, 2, 0),
}
MORE_LAYOUTS = {
    "one row": randn(5),
    "permuted": randn(3, 2, 4, 5).permute(1, 3, 2, 0),
    "lengths of 1": randn(3, 1, 5, 2)[::2, :, :, :1].transpose(1, 2)[:1],
    "one class": randn(4, 3, 1).mT,
    "bfloat16": randn(4, 3, 5).mT.bfloat16(),
    "empty bfloat16": randn(3, 0, 5).permute(1, 2, 0).bfloat16(),
}


def operations(scores):
    """Every operator and its arguments; what has the shape of the scores lies in another way."""
    dims = range(scores.dim())
    dim = min(1, dims[-1])
    other = randn(*reversed(scores.shape)).permute(*reversed(dims)).to(scores.dtype)
    target = torch.zeros(other.select(dim, 0).shape, dtype=torch.long)
    options = _ops.in_graph(Options(0.1, 0.2, None, "cross_entropy", -100, "none", None))
    arguments = (scores, target, None, None, *options)
    constant = scores.detach()
    operators = torch.ops.fastloss
    yield operators.loss.default, arguments
    yield operators.loss_backward.default, (other.select(dim, 0), constant, *arguments[1:])
    yield operators.probabilities.default, (scores, True, dim, None)
    yield operators.probabilities_backward.default, (other, constant, True, dim, None)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout):
    """Schema, fake kernels and autograd of every operator, with shapes that change, too."""
    for operator, arguments in operations(LAYOUTS[layout].detach().requires_grad_()):
        torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize("layout", LAYOUTS | MORE_LAYOUTS)
def test_fake_kernels_promise_the_strides_of_the_real_ones(layout):
    """All of them: those as well that no element depends on, which opcheck overlooks."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    for operator, arguments in operations((LAYOUTS | MORE_LAYOUTS)[layout]):
        real = operator(*arguments)
        with FakeTensorMode() as mode:
            fake = operator(*(
                mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments
            ))  # fmt: skip
        assert (fake.shape, fake.dtype) == (real.shape, real.dtype), operator
        assert fake.stride() == real.stride(), operator


def test_layouts_in_a_graph():
    """That of the next token's scores, for one."""
    head = torch.nn.Linear(8, 11)
    tokens = torch.arange(12).reshape(2, 6) % 11

    def losses(hidden, images):
        scores = head(hidden)[:, :-1].transpose(1, 2)
        yield ft.cross_entropy(scores, tokens[:, 1:])
        yield ft.cross_entropy(scores * 2, tokens[:, 1:], reduction="none").square().sum()
        yield ft.nll_loss(ft.log_softmax(scores, 1), tokens[:, 1:], reduction="none").cos().sum()
        wide = images.to(memory_format=torch.channels_last).exp()
        yield (ft.softmax(wide, 1) * images).sum()
        yield (ft.softmax(images[..., ::2], -1) * images[..., ::2].sin()).sum()
        yield ft.cross_entropy(hidden[0, 0].expand(4, 8), tokens[0, :4])
        yield ft.cross_entropy(hidden[:0].mT + 1, tokens[:0, :6], reduction="sum")

    def total(*tensors):
        return sum(losses(*tensors))

    found = []
    torch.compiler.reset()
    for function in (total, torch.compile(total, fullgraph=True, backend="aot_eager")):
        leaves = [randn(2, 6, 8).requires_grad_(), randn(2, 5, 4, 6).requires_grad_()]
        loss = function(*leaves)
        found.append([loss.detach(), *torch.autograd.grad(loss, [*leaves, *head.parameters()])])
    for eager, in_graph in zip(*found, strict=True):
        torch.testing.assert_close(in_graph, eager)


# ---------------------------------------------------------------------------------------------
# Numbers that change from step to step: two graphs at most, one before PyTorch knows that they do
# ---------------------------------------------------------------------------------------------

TARGET = torch.tensor([0, 3, -100, 1, 1])
LINEAR_WEIGHT = randn(6, 4)


class Module(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.criterion = ft.CrossEntropyLoss()

    def forward(self, x, n):
        self.criterion.normalizer = n
        return self.criterion(x, TARGET)


def linear(x, n):
    options = {"normalizer": n / 2, "z_loss": n / 9, "label_smoothing": 1 / n, "l2": n / 3}
    return ft.linear_cross_entropy(x, LINEAR_WEIGHT, TARGET, **options)


CALLS = {
    "normalizer": lambda x, n: ft.cross_entropy(x, TARGET, normalizer=n),
    "computed normalizer": lambda x, n: ft.cross_entropy(x, TARGET, normalizer=n / 2) * n,
    "normalizer of nll_loss": lambda x, n: ft.nll_loss(x, TARGET, normalizer=n / 2) * n,
    "normalizer of probabilities": lambda x, n: ft.cross_entropy(x, x.exp(), normalizer=n),
    "normalizer of a module": Module(),
    "z_loss": lambda x, n: ft.cross_entropy(x, TARGET, z_loss=n),
    "label_smoothing": lambda x, n: ft.cross_entropy(x, TARGET, label_smoothing=1 / n),
    "linear_cross_entropy": linear,
    "l2": lambda x, n: ft.linear_cross_entropy(x, LINEAR_WEIGHT * x[0], TARGET, l2=n),
    "ignore_index": lambda x, n: ft.cross_entropy(x, TARGET.clamp(min=0), ignore_index=int(n)),
}
NUMBERS = {
    "float": lambda i: 1.5 + i,
    "int": lambda i: 2 + i,
    "tensor": lambda i: torch.tensor(1.5 + i),
    "int tensor": lambda i: torch.tensor(2 + i),
    "NumPy": lambda i: np.float64(1.5 + i),
}


def assert_few_graphs(call, number, backend, graphs=2, steps=20):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.compiler.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    for i in range(steps):
        found = []
        for function in (compiled, call):
            x = randn(5, 4).requires_grad_()
            loss = function(x, number(i))
            found.append((loss.detach(), *torch.autograd.grad(loss, x)))
        for in_graph, eager in zip(*found, strict=True):
            torch.testing.assert_close(in_graph, eager)
    assert counter.frame_count <= graphs


@pytest.mark.parametrize("name", CALLS)
def test_a_float_that_changes(name):
    number = NUMBERS["int" if name == "ignore_index" else "float"]
    assert_few_graphs(CALLS[name], number, "aot_eager")


@pytest.mark.parametrize("kind", NUMBERS)
def test_normalizers_of_every_kind(kind):
    graphs = 1 if "tensor" in kind else 2
    assert_few_graphs(CALLS["linear_cross_entropy"], NUMBERS[kind], "aot_eager", graphs, steps=4)


def test_classes_divided_among_processes():
    """These stay outside of graphs, and make no more of them."""
    from torch import distributed as dist
    from torch._dynamo.testing import CompileCounterWithBackend

    def call(x, n):
        return ft.vocab_parallel_cross_entropy(x, TARGET, 0, normalizer=n) * 2

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for kind in ("float", "int tensor"):
            torch.compiler.reset()
            counter = CompileCounterWithBackend("aot_eager")
            compiled = torch.compile(call, backend=counter)
            for i in range(20):
                x, n = randn(5, 4), NUMBERS[kind](i)
                expected = ft.cross_entropy(x, TARGET, normalizer=n) * 2
                for function in (call, compiled):
                    torch.testing.assert_close(function(x, n), expected)
            assert counter.frame_count <= 3  # two before the call, one behind it
    finally:
        dist.destroy_process_group()


# What PyTorch says of itself when its compiler is loaded.
@pytest.mark.filterwarnings("ignore:.torch.jit.* is deprecated:DeprecationWarning")
def test_inductor():
    """Layouts and numbers in one, as its compilations take long."""

    def call(x, n):
        scores = torch.stack([x, x.sin()])[:, :-1].transpose(1, 2)  # with gaps
        target = TARGET[:-1].expand(2, 4)
        rows = ft.cross_entropy(scores, target, reduction="none", z_loss=n / 9)
        return linear(x, n) + rows.cos().sum() + ft.softmax(scores, 1).cos().sum()

    assert_few_graphs(call, NUMBERS["float"], "inductor")
