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


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
