"""Constants, and the one tuple and the one array in which the rest is handed around."""

from typing import NamedTuple

from fastloss._numba.jit import inline

LANES = 64  # samples in a tile
CHUNK = 64  # classes of a row that are taken at a time: as many partial sums and maxima
STEP = 16  # classes of a short row that are taken at a time
BLOCK = 1024  # classes of a row whose sum stays in float32 before it moves on to float64
EIGHT = 8  # rows of at most SHORT_ROW classes are added up in as many parts
RUN = 16  # float32 additions to one lane of a tile before the sum moves on to float64
SHORT_ROW = 300  # rows of at most so many classes go into tiles
GROUP = 8192  # elements of the rows that are taken together, at most LANES of them
CACHED = 3072  # elements of short rows that are gone through twice, in three arrays
TURN = 16  # classes of columns that are turned into rows at a time
TURNED = 1 << 24  # elements of the columns that make up one unit of work, at most LANES of them
PIECE = 32768  # classes of a long row that are worth a thread of their own
WIDE = 16384  # elements of the tiles that make up one unit of work, where runs may be long
MOST_TILES = 8  # of a unit
FEW = 64  # sums that are added up one by one: where there are more, NumPy is quicker
FEWEST_UNITS = 32  # that are to be left when tiles are put together
AHEAD = 65536  # the most elements that are fetched ahead of their use
CHECK_BLOCK = 4096  # targets that one unit of check_target reads
LINE = 64  # bytes of a cache line
STREAM_BYTES = 1 << 24  # results from this size on are written past the caches

HUGE_UNIT = 2.0**-64  # what is scaled by it can be summed up

# Storage: half types reach the kernels as 16 bits; and the types of targets, which do as bytes.
FLOAT32, FLOAT64, FLOAT16, BFLOAT16 = range(4)
INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")

# Layout: how the samples of a call are taken.
ROWS, TILES, COLUMNS = range(3)

(
    SOFTMAX, LOG_SOFTMAX, LOGSUMEXP, SOFTMAX_BACKWARD, LOG_SOFTMAX_BACKWARD, CROSS_ENTROPY,
    CROSS_ENTROPY_SOFT, NLL, BINARY, ENTROPY,
) = range(10)  # fmt: skip


@inline
def is_log(operation):
    """Whether rows are told by their maximum, and by the sum of the others over it."""
    return operation in (LOG_SOFTMAX, LOGSUMEXP)


# The stages of rows that threads share.
FIRST, COMMON_UNITS, MAXIMA, OWN_UNITS, GAPS, WRITE, DONE = range(7)


class Plan(NamedTuple):
    """One call, as its threads see it."""

    operation: int
    rows: int
    num_classes: int
    inner: int
    layout: int
    storage: int
    other_storage: int  # of grad_output, or of target probabilities
    stream: bool  # whether out is written past the caches
    summed: int  # rows that go through the kernels together, and whose losses are added up
    group: int  # rows in a unit of work
    row_step: int  # from a row to the next
    step: int  # from a class to the next in the tiles of a unit
    carries: int  # runs of output that may end within a cache line
    numbers: int  # that a thread needs of scratch
    temper: None = None  # or what exponentials are computed with, at some temperature


# The fields of a unit's rows, each LANES numbers in a float64 array.  In:
(
    MAXIMUM,
    OTHERS,  # sum of the exponentials of all classes but one
    TARGET_LOGIT,
    TARGET_WEIGHT,
    ROW_WEIGHT,  # sample weight; 0 for rows that count for nothing
    GAP,  # sum of w_c (maximum - x_c); of soft targets, of w_c t_c (maximum - x_c)
    MASS,  # of soft targets: sum of w_c t_c, all classes but the maximum's
    TOP_MASS,  # of soft targets: w_k t_k at the maximum's class k
    INDEX,  # the class left out
    OWN,  # whether exponentials are in units of the row's maximum
) = range(0, 10 * LANES, LANES)
# On the way: the exponentials of the maximum and of the target, and log sum exp(x - maximum).
TOP, TARGET_EXP, LOG_SUM = range(10 * LANES, 13 * LANES, LANES)
# Out: g_c = factor * 2**-shift * exponential_c - spread * w_c, except at the class left out.
LOSS, FACTOR, SPREAD, LEFT_OUT = range(13 * LANES, 17 * LANES, LANES)
FIELDS = 17 * LANES
