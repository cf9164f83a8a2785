"""Classes and samples divided among processes, which meet on the loopback interface."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.backends import need

torch = need("torch")
ft = pytest.importorskip("fastloss.torch", exc_type=ImportError)
if not torch.distributed.is_available():
    pytest.skip("this PyTorch has no torch.distributed", allow_module_level=True)

from support import ranks  # noqa: E402

pytestmark = [
    pytest.mark.timeout(240),
    # What matplotlib says of others is not on trial here.
    pytest.mark.filterwarnings("default::DeprecationWarning:matplotlib"),
]
HERE = Path(__file__).parent
EXAMPLE = HERE.parent / "examples" / "torch_language_model.py"
SIZES = (2, 3)
# Of the largest entry; half types are rounded in the end, and with label smoothing once before.
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-14, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def environment():
    return os.environ | {
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",  # as torchrun sets it: there are several processes
        "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]),
    }


@contextlib.contextmanager
def processes(*commands, **options):
    """Processes that are gone in the end, whatever happens."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    started = []
    try:
        for command in commands:
            started.append(
                subprocess.Popen(
                    command, env=environment(), start_new_session=True, **pipes, **options
                )
            )
        yield started
    finally:
        for process in started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 9)  # torchrun has children
            process.wait()
            process.stdout.close()


def run(scenario, size, directory, killed=()):
    """What each rank left; a rank that was to be killed left nothing."""
    commands = [
        [sys.executable, HERE / "support" / "ranks.py", scenario, directory, str(rank), str(size)]
        for rank in range(size)
    ]
    with processes(*commands) as started:
        said = [process.communicate(timeout=120)[0] for process in started]
    for rank, process in enumerate(started):
        assert process.returncode == (-9 if rank in killed else 0), said[rank]
    return [
        torch.load(directory / f"{rank}.pt", weights_only=False)
        for rank in range(size)
        if rank not in killed
    ]


@pytest.fixture(scope="module")
def agreement(tmp_path_factory):
    """The results of all cases, by the number of processes."""
    return {size: run("agreement", size, tmp_path_factory.mktemp("agreement")) for size in SIZES}


def assert_equal(actual, expected, of_largest):
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    finite = expected[expected.isfinite()].double().abs()
    largest = float(finite.max()) if finite.numel() else 0.0
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=0, atol=of_largest * largest, equal_nan=True
    )


def unsharded(scores, target, **options):
    """The classes last, wherever cross_entropy looks for them."""
    return ft.cross_entropy(scores.movedim(-1, min(1, scores.dim() - 1)), target, **options)


@pytest.mark.parametrize("dtype", ranks.DTYPES, ids=str)
@pytest.mark.parametrize("name", ranks.OPTIONS)
@pytest.mark.parametrize("size", SIZES)
def test_sharded_is_unsharded(agreement, size, name, dtype):
    scores, target, upstream, options = ranks.case(name, dtype)
    loss, grad = ranks.loss_and_gradient(unsharded, scores, target, upstream=upstream, **options)
    for sizes in ranks.SHARDS[size]:
        results = [result[sizes, name, dtype] for result in agreement[size]]
        for theirs, _ in results:
            assert_equal(theirs, loss, TOLERANCE[dtype])
            torch.testing.assert_close(theirs, results[0][0], rtol=0, atol=0, equal_nan=True)
        assert [part.shape[-1] for _, part in results] == list(sizes)
        assert_equal(torch.cat([part for _, part in results], -1), grad, TOLERANCE[dtype])


@pytest.mark.parametrize("options", ranks.EDGE_OPTIONS)
@pytest.mark.parametrize("name", ranks.EDGES)
@pytest.mark.parametrize("size", SIZES)
def test_edges(agreement, size, name, options):
    """As unsharded, and every entry by itself: losses and gradients may be small."""
    keywords = {"reduction": "none", **ranks.EDGE_OPTIONS[options]}
    loss, grad = ranks.loss_and_gradient(unsharded, *ranks.edge(name), **keywords)
    results = [result[name, options] for result in agreement[size]]
    # A share of the smoothing and p may cancel, which leaves the rounding of p.
    close = {"rtol": 1e-6, "atol": 1e-8 if options == "smoothing" else 1e-44, "equal_nan": True}
    for theirs, _ in results:
        torch.testing.assert_close(theirs, loss, **close)
    torch.testing.assert_close(torch.cat([part for _, part in results], -1), grad, **close)


def test_confident_rows_keep_their_digits(agreement):
    """In the words of the README, not only as unsharded."""
    for size in SIZES:
        results = [result["confident", "plain"] for result in agreement[size]]
        assert results[0][0][0].item() == pytest.approx(4.122307e-9, rel=1e-6)
        assert results[0][1][0, 0].item() == pytest.approx(-4.122307e-9, rel=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_batched_gradients(group, reduction):
    scores, target, _, _ = ranks.case("ignored by default", torch.float64)
    scores.requires_grad_()
    options = {"reduction": reduction, "label_smoothing": 0.1, "z_loss": 0.2}
    loss = ft.vocab_parallel_cross_entropy(scores, target, 0, **options)
    batch = torch.linspace(-2, 3, 3 * loss.numel()).double().reshape(3, *loss.shape)
    (found,) = torch.autograd.grad(loss, scores, batch, is_grads_batched=True, retain_graph=True)
    entries = [torch.autograd.grad(loss, scores, u, retain_graph=True)[0] for u in batch]
    assert_equal(found, torch.stack(entries), 1e-15)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_types(group, dtype):
    """Under autocast the loss is a float32; and of negative scores, too, the largest one counts."""
    scores, target = torch.tensor([[-1.0, -60000, -3], [5, 4, 2]]).to(dtype), torch.tensor([2, 0])
    for enabled, loss_dtype in ((False, dtype), (True, torch.float32)):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = ft.vocab_parallel_cross_entropy(scores, target, 0, reduction="none")
            assert loss.dtype is loss_dtype
            assert_equal(loss, unsharded(scores, target, reduction="none"), TOLERANCE[loss_dtype])


REFUSALS = {  # what rank 0 says, and rank 1 where that is another thing
    "target too large": ["IndexError: target[2] = 12 is out of range for 12 classes"],
    "target negative": ["IndexError: target[1, 0] = -1 is out of range for 12 classes"],
    "dtype on one rank": [
        "RuntimeError: rank 1 of the group was refused its arguments: "
        "TypeError: logits_shard has dtype torch.int32; ",
        "TypeError: logits_shard has dtype torch.int32; expected one of float32",
    ],
    "option on one rank": [
        "RuntimeError: rank 1 of the group was refused its arguments: ValueError: label_smoothing",
        "ValueError: label_smoothing = 2.0 is out of range",
    ],
    "backend on one rank": [
        "RuntimeError: rank 1 of the group was refused its arguments: ValueError: backend",
        "ValueError: backend = 'fast' is not a backend",
    ],
    "start on one rank": [
        "RuntimeError: rank 1 of the group was refused its arguments: TypeError: vocab_start",
        "TypeError: vocab_start = '12' is not an integer",
    ],
    "negative start": [
        "ValueError: vocab_start = -1 is out of range",
        "RuntimeError: rank 0 of the group was refused its arguments: ValueError: vocab_start = -1",
    ],
    "shape of the target": [
        "ValueError: target has shape (3,), expected (4,), that of logits_shard, (4, 6), without"
    ],
    "probabilities": ["TypeError: target has dtype torch.float32; expected integers"],
    "normalizer of a sum": ["ValueError: normalizer replaces the divisor of the mean"],
    "ragged": [
        "ValueError: the shape of the rows differs between ranks 0 and 1 of the group: "
        "(4,) and (3,)"
    ],
    "dtypes": [
        "ValueError: the dtype of logits_shard differs between ranks 0 and 1 of the group: "
        "'torch.float32' and 'torch.float64'"
    ],
    "options": ["ValueError: z_loss differs between ranks 0 and 1 of the group: 0.0 and 0.5"],
    "targets": ["ValueError: target differs between ranks 0 and 1 of the group"],
    "gap": [
        "ValueError: the classes of the ranks leave a gap at class 6: "
        "0 to 5 on rank 0, 7 to 12 on rank 1"
    ],
    "overlap": [
        "ValueError: the classes of the ranks overlap at class 5: "
        "0 to 5 on rank 0, 5 to 10 on rank 1"
    ],
    "no classes": ["ValueError: logits_shard has no classes on any rank of the group"],
    "no dimension": ["ValueError: logits_shard is a scalar; it needs a dimension of classes"],
}


def test_what_is_wrong_on_one_rank_is_an_error_on_all(tmp_path):
    results = run("refusals", 2, tmp_path)
    for name, texts in REFUSALS.items():
        for result, text in zip(results, (texts[0], texts[-1]), strict=True):
            assert result.pop(name).startswith(text)
    for result in results:
        assert result.pop("afterwards") == pytest.approx(2.4849066)  # log 12
        assert result.pop("twice") == "vocab_parallel_cross_entropy cannot be differentiated twice"
    assert results[0].pop("alone").item() == pytest.approx(1.7917595)  # log 6
    assert results[1].pop("not in the group") == "this process is not in the group"
    assert results == [{}, {}]


def test_without_a_group():
    with pytest.raises(RuntimeError, match=r"call torch\.distributed\.init_process_group first"):
        ft.vocab_parallel_cross_entropy(torch.ones(2, 3), torch.tensor([0, 1]), 0)


@pytest.mark.parametrize("size", SIZES)
def test_a_killed_rank_is_an_error_and_no_hang(size, tmp_path):
    results = run("loss_of_a_killed_rank", size, tmp_path, killed=[size - 1])
    assert len(results) == size - 1
    for loss, error in results:
        assert loss == pytest.approx(torch.tensor(5.0 * size).log().item())
        assert error


@pytest.mark.parametrize("size", SIZES)
def test_data_parallel_gradients_are_those_of_one_process(agreement, size):
    """Though the tokens that count are unevenly divided, and the third rank may have none."""
    module = ranks.example()
    lines = ranks.lines_of_the_example()
    results = [result["data parallel"] for result in agreement[size]]
    for loss in module.LOSSES:
        model = ranks.model_of_the_example(module)
        value, count, grads = ranks.gradients_of_the_example(module, model, loss, lines)
        assert count == 19
        assert sum(result[loss][0] for result in results) / size == pytest.approx(value, rel=1e-6)
        for _, theirs, parts in (result[loss] for result in results):
            assert theirs == count
            for name, grad in grads.items():
                assert_equal(parts[name], grad, 1e-6)


SMALL = [
    "--tokens", "6000", "--vocabulary", "400", "--width", "8", "--length", "16",
    "--batch-size", "6", "--steps", "6",
]  # fmt: skip


def example(directory, *options, start=()):
    command = [sys.executable, *start, EXAMPLE, *SMALL, *options]
    with processes([*command, "--json", "numbers.json"], cwd=directory) as (process,):
        said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert (directory / "torch_language_model.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((directory / "numbers.json").read_text()), said


def test_example_learns_the_same_with_either_loss_and_on_two_processes(tmp_path):
    (theirs, ours), said = example(tmp_path)
    assert (theirs["loss"], ours["loss"]) == ("torch", "fastloss")
    assert ours["curve"] == pytest.approx(theirs["curve"], abs=1e-4)
    assert len(ours["curve"]) == 6
    assert ours["curve"][0] == pytest.approx(torch.tensor(400.0).log().item(), abs=0.2)
    assert ours["curve"][-1] < ours["curve"][0] - 0.01
    for word in ("tokens per second", "peak memory", "largest difference of the loss curves"):
        assert word in said
    for result in (theirs, ours):
        assert result["tokens_per_second"] > 0
        assert result["peak_memory"] > 50
        assert result["processes"] == 1

    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    torchrun += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]  # any free port
    (divided,), _ = example(tmp_path, "--loss", "fastloss", start=torchrun)
    assert divided["processes"] == 2
    assert divided["curve"] == pytest.approx(ours["curve"], abs=1e-4)


@pytest.mark.parametrize("options", [["--loss", "numpy"], ["--steps", "0"]])
def test_bad_options_of_the_example_are_refused(options, capsys):
    with pytest.raises(SystemExit):
        ranks.example().main(options)
    assert f"argument {options[0]}: " in capsys.readouterr().err


def test_example_refuses_both_losses_under_torchrun(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit):
        ranks.example().main([])
    assert "under torchrun choose one loss" in capsys.readouterr().err


def test_example_refuses_too_few_tokens():
    with pytest.raises(SystemExit, match="2 different tokens are too few for --vocabulary 4"):
        ranks.example().encode([["a", "b"], ["a"]], 4, 8)
