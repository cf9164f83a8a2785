"""Options, parameters and the summary of the benchmarks."""

import pytest

import fastloss as fl
from fastloss._tools import measure

SUMMARY = pytest.StashKey()
COLUMNS = ("x limit", "GB/s", "best", "limit", "benchmark")


def pytest_addoption(parser):
    group = parser.getgroup("fastloss")
    group.addoption(
        "--backend",
        action="append",
        choices=(*measure.CHOICES, "all"),
        help="measure this backend; may be repeated (default: all, which is cython and numba)",
    )
    group.addoption(
        "--quick", action="store_true", help="small shapes and few calls: to try the suite out"
    )


def pytest_configure(config):
    config.stash[SUMMARY] = []


def pytest_generate_tests(metafunc):
    config = metafunc.config
    backends = config.getoption("--backend") or ["all"]
    if "all" in backends:
        backends = measure.BACKENDS
    shapes = measure.QUICK_SHAPES if config.getoption("--quick") else measure.SHAPES
    metafunc.parametrize("dtype", measure.DTYPES, scope="module")
    metafunc.parametrize("shape", shapes, scope="module")
    metafunc.parametrize("operation", measure.OPERATIONS)
    metafunc.parametrize("backend", dict.fromkeys(backends))


@pytest.fixture(scope="module")
def data(shape, dtype):
    """The arrays of one shape and dtype: made once for all operations and backends."""
    return measure.Data(*measure.parse_shape(shape), dtype)


@pytest.fixture(scope="session")
def num_threads():
    return fl.get_num_threads()


@pytest.fixture
def summarize(request):
    """Adds a line to the table at the end."""
    return request.config.stash[SUMMARY].append


def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash[SUMMARY]
    if not rows:
        return
    terminalreporter.section("time over the limit, measured just before and after")
    for row in (COLUMNS, *rows):
        terminalreporter.write_line("{:>8} {:>8} {:>10} {:>24}  {}".format(*row))
