"""No error has grown: tests/accuracy.py measures again, and is held against its own table."""

import json

import accuracy
import pytest
from support import backends

from fastloss import _cython
from fastloss._tools.report import insert

SHARE = 6  # of the rows that made the table, each sixth part; so no figure can be larger by chance
MORE = 0.5  # ulp, by which a figure may exceed the one in the table
TABLE = json.loads(accuracy.JSON.read_text())


@pytest.mark.parametrize("operation", accuracy.OPERATIONS)
@pytest.mark.parametrize("dtype", accuracy.DTYPES)
def test_no_error_has_grown(operation, dtype, backend, request):
    build = request.node.callspec.params["backend"]
    grown = []
    for family in accuracy.FAMILIES:
        found = accuracy.measure(operation, family, dtype, backend, SHARE)
        for row, ulps in found.items():
            most = TABLE[dtype][row][family][build]
            if not ulps <= most + MORE:
                grown.append(f"{row}, {family}: {ulps:.2f} ulp instead of {most:.2f}")
    assert not grown, "\n".join(grown)


def test_the_table_has_all_that_is_measured_and_no_more():
    rows = {row for operation in accuracy.OPERATIONS.values() for row in operation.measures}
    assert set(TABLE) == set(accuracy.DTYPES)
    for dtype in TABLE.values():
        assert set(dtype) == rows
        for families in dtype.values():
            assert set(families) == set(accuracy.FAMILIES)
            for builds in families.values():
                missing_here = {f"cython-{isa}" for isa in _cython._BUILDS}
                assert set(backends.BACKENDS) <= set(builds)
                assert set(builds) <= set(backends.BACKENDS) | missing_here


def test_what_is_measured_is_what_there_is():
    """Every public operation, and the builds that the other tests run on."""
    assert set(accuracy.builds()) == set(backends.BACKENDS)
    measured = {operation.case.function for operation in accuracy.OPERATIONS.values()}
    assert measured >= {case.function for case in accuracy.cases.CASES if not_a_part(case)}


def not_a_part(case):
    """A loss without its gradient is measured along with that gradient."""
    return not case.is_loss or case.function.__name__.endswith("_with_grad")


def test_the_readme_shows_the_table():
    text = accuracy.README.read_text()
    assert insert(text, accuracy.section(TABLE), accuracy.BEGIN, accuracy.END) == text
