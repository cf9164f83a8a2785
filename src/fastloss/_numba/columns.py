"""Columns: many classes that do not lie next to each other.

A unit of columns is turned into rows, which the functions of rows.py take in place, and turned
back.  So the bits of a row do not depend on how it lies in memory.  `turned` has the type of what
is turned: room for TURN classes of a unit, then its rows, `row_step` numbers apart, with room for
what transposing writes beyond them.
"""

from numba import types

from fastloss._numba.jit import inline, typed
from fastloss._numba.machine import as_input, transpose
from fastloss._numba.memory import carry_of, copy, fetch, store_run
from fastloss._numba.types import COLUMNS, FIELDS, LANES, TURN


def turned_numbers(rows, row_step):
    """What a unit of columns needs of `turned`."""
    return TURN * LANES + (rows + 7) * row_step


@typed
def rows_of(array, turned, layout):
    """Where the rows lie that are to be read: in the array itself, or, of columns, in `turned`."""
    if turned == types.none or array == types.none:
        return lambda array, turned, layout: array
    return lambda array, turned, layout: (
        as_input(turned[TURN * LANES :]) if layout == COLUMNS else array
    )


@typed
def rows_to(array, turned, layout):
    if turned == types.none:
        return lambda array, turned, layout: array
    return lambda array, turned, layout: turned[TURN * LANES :] if layout == COLUMNS else array


@inline
def load_columns(x, turned, first, n, plan):
    num_classes, inner, row_step = plan.num_classes, plan.inner, plan.row_step
    staged, rows = turned[: TURN * LANES], turned[TURN * LANES :]
    row = 0
    while row < n:
        o, i = divmod(first + row, inner)
        width = min(n - row, inner - i)
        for c in range(0, num_classes, TURN):
            source, start, apart = x, (o * num_classes + c) * inner + i, inner
            for j in range(2 * TURN, 3 * TURN):
                fetch(x, start + j * inner, width)
            if start + (TURN - 1) * inner + width + 7 > x.size:
                for j in range(min(TURN, num_classes - c)):
                    place = start + j * inner
                    copy(staged[j * LANES : j * LANES + width], x[place : place + width])
                source, start, apart = as_input(staged), 0, LANES
            for lane in range(0, width, 8):
                for j in range(0, TURN, 8):
                    place = (row + lane) * row_step + c + j
                    transpose(source, start + j * apart + lane, apart, rows, place, row_step)
        row += width


@inline
def store_columns(out, turned, scratch, r, first, n, plan):
    num_classes, inner, row_step = plan.num_classes, plan.inner, plan.row_step
    staged, rows = turned[: TURN * LANES], turned[TURN * LANES :]
    row = 0
    while row < n:
        o, i = divmod(first + row, inner)
        width = min(n - row, inner - i)
        for c in range(0, num_classes, TURN):
            for lane in range(0, width, 8):
                for j in range(0, TURN, 8):
                    place = (row + lane) * row_step + c + j
                    transpose(rows, place, row_step, staged, j * LANES + lane, LANES)
            for j in range(min(TURN, num_classes - c)):
                start = (o * num_classes + c + j) * inner + i
                store_run(
                    out, start, staged[j * LANES : j * LANES + width], plan.storage, plan.stream,
                    carry_of(scratch, r, c + j), r, FIELDS + c + j,
                )  # fmt: skip
        row += width
