"""What the documentation shows is what happens, and the types are right."""

import doctest
import importlib
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.backends import need

import fastloss as fl

ROOT = Path(__file__).parents[1]
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
# Their doctests need what may not be installed.
ADAPTERS = {"torch": "torch", "sklearn": "sklearn", "boosting": "xgboost"}
MODULES = {module.name for module in pkgutil.iter_modules(fl.__path__)}
DOCUMENTED = sorted(
    name for name in MODULES - ADAPTERS.keys() if not name.startswith(("_kernels", "__main__"))
)


def run_examples(name):
    module = importlib.import_module(name)
    finder = doctest.DocTestFinder()
    runner = doctest.DocTestRunner(optionflags=OPTIONS)
    for test in finder.find(module, name):
        runner.run(test)
    assert runner.failures == 0
    return runner.tries


@pytest.mark.parametrize("name", DOCUMENTED)
def test_docstrings(name):
    run_examples(f"fastloss.{name}")


@pytest.mark.parametrize("name", sorted(ADAPTERS.keys() & MODULES))
def test_docstrings_of_adapters(name):
    """Every public function has an example; those of a package are in its modules."""
    need(ADAPTERS[name])
    adapter = importlib.import_module(f"fastloss.{name}")
    modules = [f"fastloss.{name}"]
    modules += [
        f"{modules[0]}.{m.name}" for m in pkgutil.iter_modules(getattr(adapter, "__path__", []))
    ]
    assert sum(map(run_examples, modules)) > 0
    tests = doctest.DocTestFinder()
    for public in adapter.__all__:
        found = tests.find(getattr(adapter, public), public)
        assert any(test.examples for test in found), f"{public} has none"


def test_every_public_function_has_an_example():
    tests = doctest.DocTestFinder()
    for name in fl.__all__:
        function = getattr(fl, name)
        assert any(test.examples for test in tests.find(function, name)), f"{name} has none"


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def sessions(page):
    fences = re.findall(
        r"^```(?:python|pycon)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE
    )
    return [fence for fence in fences if ">>>" in fence]


@pytest.mark.parametrize("page", [p for p in PAGES if sessions(p)], ids=lambda page: page.name)
def test_pages(page):
    """The sessions of a page are one, from top to bottom, and print what they say they print."""
    names = {}
    runner = doctest.DocTestRunner(optionflags=OPTIONS)
    for number, session in enumerate(sessions(page), 1):
        test = doctest.DocTestParser().get_doctest(session, names, f"{page.name} {number}", None, 0)
        test.globs = names
        runner.run(test, clear_globs=False)
    assert runner.failures == 0


def test_what_the_readme_says_of_itself():
    readme, measured = (ROOT / "README.md").read_text(), (ROOT / "bench/README.md").read_text()
    assert len(readme.splitlines()) < 200
    (places,) = re.findall(r"<summary>Where we lose in this run: (\d+)</summary>", measured)
    assert f"the {places} places where we lose" in " ".join(readme.split())
    for page in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "bench/README.md"]:
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"


def mypy(*arguments, **environment):
    result = subprocess.run(
        [sys.executable, "-m", "mypy", *arguments],
        cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return result.stdout + result.stderr


def test_types_that_users_see(tmp_path):
    """They let a right use pass, and find a wrong one."""
    program = tmp_path / "program.py"
    program.write_text(
        "import fastloss as fl\n"
        "import numpy as np\n"
        "p: np.ndarray = fl.softmax([1.0, 2.0], backend='numpy')\n"
        "loss, grad = fl.cross_entropy_with_grad([[1.0, 2.0]], [0])\n"
        "fl.softmax([1.0], axs=0)\n"
    )
    # An editable install is behind an import hook that mypy does not follow.
    found = mypy(str(program), MYPYPATH=str(ROOT / "src")).splitlines()
    (error,) = [line for line in found if "program.py" in line and "error:" in line]
    assert 'program.py:5: error: Unexpected keyword argument "axs"' in error
