"""The compiled backends are written alike: a thought is one file, a function has one name."""

import re
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src/fastloss"
CYTHON, NUMBA = SOURCE / "_kernels", SOURCE / "_numba"
ENTRIES = {"entries", "__init__"}  # in Cython: _kernels.pyx
JIT = {"jit"}  # nothing that Cython needs
# Functions that one backend has without the other, by the reason.
ALONE = {
    "C has the function, or Cython a pointer, where Numba needs code of its own": {
        "borrow", "as_input", "lanes", "eight_lanes", "prefetch", "stream_line", "end_stream",
        "set_float_mode", "load_index", "convert_half", "call_share", "must_be_compiled",
        "unless_none", "load_one", "load_into", "copy", "largest_lane", "fold_top",
    },
    "arrays know their size and type, and slices where they begin; pointers do not": {
        "itemsize", "blocks_in", "row_of", "weight_of", "tile_of", "other_tile_of", "turned_of",
        "is_finite", "power_of_job", "widen", "read_numbers", "row_scratch",
        "tile_scratch", "rows_of", "rows_to", "rows_in_unit", "carries", "fold_lanes", "shared_of",
    },
    "a unit is taken through its stages in Numba's entries, share by share": {
        "row_unit", "tile_unit", "column_unit", "job_of_rows", "loss_rows", "loss_tile",
        "take_blocks", "is_taken",
    },
    "a loop of its own is what LLVM vectorises": {
        "softmax_vjp", "log_softmax_vjp", "fold_four", "scale_and_spread", "scale_and_subtract",
        "transpose_rows", "store_halves",
    },
    "Numba is told by None what is not given, and does not compile what asks for it": {
        "label_smoothing_of", "z_loss_of", "is_smooth", "is_apart", "least_rest_of",
    },
    "Numba is told the operation when it compiles: there is a share for each": {
        "is_backward", "is_nll", "is_binary", "has_losses", "has_soft_target", "writes_rows",
        "is_flat", "next_stage_of_backward", "take_block_of_backward",
    },
    "Cython adds up rows of 129 classes and more as long rows where they are, Numba from 301 on": {
        "adds_as_rows", "fold_parts",
    },
    "GCC makes one instruction of a bound only if it does not know it": {"bound"},
    "Cython looks for maxima first where the rows before needed them": {
        "hopeless_of", "is_hopeless", "are_hopeless", "find_hopeless", "untamed_of", "take_maxima",
        "exp_tile_untamed", "take_units", "all_apart",
    },
    "Cython keeps whose each number of sixteen short rows is and its weight, Numba computes it": {
        "begin_rows", "owners_of", "weights_of", "terms_of", "share_of_row",
    },
    "Numba must ask whether the processor has the permutes": {"can_permute"},
    "Cython begins scratch with a cache line where it takes it": {"from_line"},
    "targets of all rows at once, where Cython goes row by row": {"places_of", "put_left_out"},
    "short rows are a layout in Cython, and a way to take a tile in Numba": {
        "is_short", "short_unit", "exp_rows_of_softmax", "divide_rows", "write_run",
        "gaps_of_sixteen", "gaps_of_short_rows", "smooth_rows", "narrow_factors_of_rows",
        "log_softmax_run", "find_untamed_by_top",
    },
    "what blocks are reduced to lies field by field in Numba": {"sum_of_blocks"},
    "partial sums of a lane: Cython has chunks of them, or eight": {
        "parts_of", "part_of", "fold_row_parts",
    },
    "picked out one by one, where LLVM makes less of a mask": {"take_target_exps"},
    "LLVM unrolls short loops before it would vectorise them": {
        "add_step", "scale_step", "scale_four", "scale_eight", "scale_kept", "sum_lanes",
    },
}  # fmt: skip
FILES = sorted(path.stem for path in CYTHON.glob("*.pxi"))


def functions_of(path):
    """Those of a file for others to call."""
    names = re.findall(r"^(?:cdef [^\n=]*?|def )\b(\w+)\(", path.read_text(), re.MULTILINE)
    return {name for name in names if not name.startswith("_")}


def test_one_thought_is_one_file():
    assert {path.stem for path in NUMBA.glob("*.py")} == {*FILES, *ENTRIES, *JIT}


@pytest.mark.parametrize("file", FILES)
def test_one_function_has_one_name(file):
    different = functions_of(CYTHON / f"{file}.pxi") ^ functions_of(NUMBA / f"{file}.py")
    assert different <= set().union(*ALONE.values())


def test_what_stands_alone_does():
    """And is still there."""
    cython = set().union(*(functions_of(CYTHON / f"{file}.pxi") for file in FILES))
    numba = set().union(*(functions_of(NUMBA / f"{file}.py") for file in FILES))
    assert set().union(*ALONE.values()) <= cython ^ numba
