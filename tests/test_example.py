"""The training examples: one loss curve whatever the backend, and they learn."""

import importlib.util
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fastloss as fl

# What matplotlib or scikit-learn say of others, and others of them, is not on trial here.
pytestmark = pytest.mark.filterwarnings(
    "default::DeprecationWarning", "default::PendingDeprecationWarning", "default::FutureWarning"
)
SCRIPT = Path(__file__).parents[1] / "examples" / "softmax_classifier.py"


def load(script):
    spec = importlib.util.spec_from_file_location(script.stem, script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def example():
    return load(SCRIPT)


@pytest.fixture
def run(example, tmp_path):
    """Run main, and give back the choice of a backend afterwards."""
    yield lambda *options: example.main([*options, "--plot", str(tmp_path / "curve.png")])
    fl.set_backend(None)


def test_every_backend_gives_the_same_curve(run, capsys):
    curves = {
        backend: run("--backend", backend, "--epochs", "3", "--batch-size", "100")
        for backend in ("cython", "numba", "numpy")
    }
    assert re.findall(r"samples per second on (\w+)", capsys.readouterr().out) == list(curves)
    reference = curves["numpy"]
    assert len(reference) == 3
    assert reference[-1] < reference[0] < math.log(10)  # that of ten equal scores
    for backend in ("cython", "numba"):
        np.testing.assert_allclose(curves[backend], reference, rtol=0, atol=1e-5, err_msg=backend)


def test_options_change_the_training(run):
    options = ["--epochs", "2", "--batch-size", "200"]
    plain = run(*options)
    assert plain == run(*options)  # a seed fixes everything
    assert plain != run(*options, "--seed", "1")
    assert plain[-1] < run(*options, "--learning-rate", "0.01")[-1]
    assert plain[-1] < run(*options, "--l2", "0.1")[-1]
    assert plain[-1] > run("--solver", "lbfgs", "--epochs", "200")[-1]


def test_script_with_its_defaults(tmp_path):
    """As in the README: the running example first, then a classifier that is right 96 in 100."""
    result = subprocess.run(
        [sys.executable, SCRIPT], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert result.stdout.startswith(
        "scores    [5. 4. 2.], right class 0\n"
        "softmax   [0.71 0.26 0.04]\n"
        "loss      0.349\n"
        "gradient  [-0.29  0.26  0.04]\n"
    )
    assert float(re.search(r"test accuracy +([\d.]+)", result.stdout)[1]) >= 0.96
    assert int(re.search(r"speed +([\d,]+) samples", result.stdout)[1].replace(",", "")) > 0
    assert re.search(r"100%.*loss=0\.", result.stderr)  # the progress bar
    assert (tmp_path / "softmax_classifier.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("options", [["--epochs", "0"], ["--backend", "torch"]])
def test_bad_options_are_refused(run, options, capsys):
    with pytest.raises(SystemExit) as exit_:
        run(*options)
    assert exit_.value.code == 2
    assert f"argument {options[0]}: " in capsys.readouterr().err


# The next token of Python code

NEXT_TOKEN = SCRIPT.with_name("next_token.py")


@pytest.fixture(scope="module")
def next_token():
    return load(NEXT_TOKEN)


def small(next_token, *more):
    options = ["--vocabulary=500", "--dimension=4", "--batch-size=200", "--tokens=6000"]
    return next_token.parse([*options, *more])


def test_tokens_of_a_file(next_token, tmp_path):
    path = tmp_path / "module.py"
    path.write_text("def f(x):  # a comment\n\n    return x + 'text'\n")
    text = "def f ( x ) : NEWLINE INDENT return x + 'text' NEWLINE DEDENT ENDMARKER"
    words = text.split(" ")
    assert list(next_token.tokens_of(path)) == words
    path.write_text("if broken\n")  # lexically fine
    assert list(next_token.tokens_of(path))[:2] == ["if", "broken"]
    path.write_text("a = (\n")
    assert list(next_token.tokens_of(path))[:3] == ["a", "=", "("]
    codes, size = next_token.encode(words, 4)
    assert size == 4
    assert [words[i] for i in np.flatnonzero(codes == 1)] == ["x", "x"]  # the first of the pairs
    assert np.sum(codes == next_token.UNKNOWN) == len(words) - 5
    contexts, targets = next_token.with_contexts(np.arange(5), 3)
    assert contexts.tolist() == [[0, 1, 2], [1, 2, 3]]
    assert targets.tolist() == [3, 4]


def test_the_standard_library_fills_the_vocabulary(next_token):
    options = next_token.parse([])
    codes, vocabulary = next_token.encode(
        next_token.read_tokens(options.tokens, options.seed), options.vocabulary
    )
    assert len(codes) == options.tokens
    assert vocabulary == options.vocabulary >= 20_000
    assert np.mean(codes == next_token.UNKNOWN) < 0.1


@pytest.mark.parametrize("backend", ["cython", "numba"])
def test_fused_and_unfused_train_alike(next_token, backend):
    fl.set_backend(backend)
    tokens = next_token.read_tokens(6000, 0)
    curves = []
    for more in ([], ["--unfused"]):
        options = small(next_token, *more)
        codes, vocabulary = next_token.encode(tokens, options.vocabulary)
        contexts, targets = next_token.with_contexts(codes, options.context)
        model = next_token.Model(vocabulary, options)
        start = model.loss(contexts, targets)
        losses, speed = next_token.train(model, contexts, targets, options)
        assert start == pytest.approx(math.log(vocabulary), abs=1e-3)
        assert model.loss(contexts, targets) < 0.8 * start
        assert speed > 0
        curves.append(losses)
    np.testing.assert_allclose(*curves, rtol=1e-3)


def test_steps_of_vectors_follow_the_gradient(next_token):
    """Against finite differences: a small step lowers the loss by as much as the gradient says."""
    options = small(next_token)
    rng = np.random.default_rng(0)
    contexts, targets = rng.integers(0, 50, (200, 4)), rng.integers(0, 50, 200)
    model = next_token.Model(50, options)
    for _ in range(30):  # away from the start, where the linear layer is 0
        model.step(contexts, targets)
    model.squares[1][...] = model.squares[2][...] = np.inf  # only vectors move
    model.squares[0][...] = 1.0
    model.rate = 0.01
    before = model.loss(contexts, targets)
    vectors = model.vectors.copy()
    model.step(contexts, targets)
    step = model.vectors - vectors
    expected = -np.sum(step**2) / model.rate  # squares stay about 1
    assert model.loss(contexts, targets) - before == pytest.approx(expected, rel=0.1)


def test_next_token_script(tmp_path):
    options = ["--tokens=8000", "--vocabulary=4000", "--batch-size=1000", "--dimension=4"]
    result = subprocess.run(
        [sys.executable, NEXT_TOKEN, *options], cwd=tmp_path, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert re.search(r"vocabulary +[\d,]+ tokens, \d+\.\d% unknown", result.stdout)
    before, after = re.search(r"loss +([\d.]+) untrained, ([\d.]+) trained", result.stdout).groups()
    assert float(after) < float(before)
    assert re.search(r"speed +[\d,]+ tokens per second, fused, on \w+", result.stdout)
    fused, unfused = re.search(r"memory +(\d+) MB fused, (\d+) MB unfused", result.stdout).groups()
    assert int(fused) >= 0
    assert int(unfused) > 0
    assert "train: 100%" in result.stderr
    assert (tmp_path / "next_token.png").read_bytes().startswith(b"\x89PNG")
