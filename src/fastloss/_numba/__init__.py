"""The Numba backend, a file a thought, with the names of the Cython kernels' files.

The contract is in ``_contract``; ``entries`` begins what it asks for.  What to know before
reading on:

Two layouts.  A *row* is a long run of classes next to each other: classes lie in the SIMD lanes.
Where rows are short, or other samples lie between the classes, a *tile* puts LANES samples in the
SIMD lanes, copied (transposed, converted) into scratch and back.  Either way a unit of rows is put
together in scratch that stays in cache and goes out in one run; a large result goes past the
caches, so that memory is not read only to be overwritten, and what the next unit needs is fetched
meanwhile.  Where there are more threads than long rows, they share each row, block by block: a row
is added up in blocks, one after the other, whoever took them.

Exponentials are kept relative to a power of two, which costs and rounds nothing, and high enough
that what will be a subnormal result is still a normal number: the final product rounds it, once.
Most rows need no maximum for that: the power is the same for all, and exponentials can be taken in
one run of many rows, wherever each ends; short rows are then no tile, if a unit has all its rows
and all are such.  A row that is not so tame has a power near its maximum.  Which of the two it is
the row decides by itself, by its own scores and weight (in_common_units: what would overflow is cut
off, and shows in the sum), so that its bits do not depend on what is around it; where soft targets
ask how far all scores are from the maximum, rows have their own.

The sum leaves one class out (the target, or the maximum), which is what makes small losses exact.
Where the power is common, others are related to the target itself: a loss is log1p(others / e_y).
Of log_softmax, partial sums leave out their largest term, which goes along with each: the largest
of all is the maximum's, whichever class that is.
0 * inf counts as 0.

Flags are given function by function.  ``contract`` lets multiply and add fuse; ``reassoc`` is for
sums alone, each a loop over one array that is all reads, so that which order the compiler chose
depends on the length and on nothing else.  No other flag: NaN and inf mean something here.  Arrays
reach the helpers as slices indexed from 0: LLVM then knows that no index is negative, and
vectorises.  Loops over lanes have a constant count and work on arrays on the stack, made where the
loop is: LLVM knows that these overlap nothing and keeps them in registers.  The count is 64 and
CHUNK no less: loops over 32 are unrolled before they would be vectorised, and then are not any
more.  In the assembly such a loop must be packed instructions, without a call, a gather or a scalar
instruction.

Only the functions that Python calls are cached on disk; the rest is linked into them.  The cache
notices an edit in any file of this package, and in no file elsewhere: what jitted code calls is
here.
"""

from fastloss._numba.entries import (
    binary_cross_entropy_with_logits,
    check_target,
    cross_entropy,
    describe,
    entropy,
    log_softmax,
    log_softmax_backward,
    logsumexp,
    most_threads,
    nll_loss,
    sigmoid_focal_loss,
    softmax,
    softmax_backward,
    warmup,
)

__all__ = [
    "binary_cross_entropy_with_logits",
    "check_target",
    "cross_entropy",
    "describe",
    "entropy",
    "log_softmax",
    "log_softmax_backward",
    "logsumexp",
    "most_threads",
    "nll_loss",
    "sigmoid_focal_loss",
    "softmax",
    "softmax_backward",
    "warmup",
]
