# Constants, and what a call and its rows look like to the kernels.

ctypedef fused real:
    float
    double


ctypedef fused integer:
    int8_t
    int16_t
    int32_t
    int64_t
    uint8_t
    uint16_t
    uint32_t
    uint64_t


cdef double HUGE_UNIT = 5.421010862427522e-20  # 2**-64: what is scaled by it can be summed up


cdef enum:
    LANES = 64  # samples in a tile
    # Classes of a row that are taken at a time: as many partial sums and maxima, which the compiler
    # keeps in two zmm or four ymm registers.
    CHUNK = 32
    EIGHT = 8  # partial sums of a short row
    BLOCK = 1024  # classes of a row whose sum stays in float32 before it moves on to float64
    RUN = 16  # float32 additions to one lane of a tile before the sum moves on to float64
    SHORT_ROW = 300  # rows of at most so many classes go into tiles, unless they are a run
    SHORT_FLAT_ROW = 128  # rows of so many are added up in eights, several at a time
    GROUP = 8192  # elements of the rows that are taken together, at most LANES of them
    CACHED = 3072  # elements of short rows that are gone through twice, in three arrays
    TURN = 16  # classes of columns that are turned into rows at a time
    TURNED = 16777216  # elements of the columns in a unit of work, at most LANES of them
    PIECE = 16384  # classes of a long row that are worth a thread of their own
    WIDE = 16384  # elements of the tiles in a unit of work, where runs may be long
    MOST_TILES = 8  # of a unit
    FEW = 64  # sums that are added up one by one: where there are more, NumPy is quicker
    FEWEST_UNITS = 32  # that are to be left when tiles are put together
    AHEAD = 65536  # the most elements that are fetched ahead of their use
    CHECK_BLOCK = 4096  # targets that one unit of check_target reads
    LINE = 64  # bytes of a cache line
    STREAM_BYTES = 16777216  # results from this size on are written past the caches


cdef enum Storage:
    FLOAT32
    FLOAT64
    FLOAT16
    BFLOAT16


cdef enum Layout:
    ROWS
    TILES
    COLUMNS


cdef enum Operation:
    SOFTMAX
    LOG_SOFTMAX
    LOGSUMEXP
    SOFTMAX_BACKWARD
    LOG_SOFTMAX_BACKWARD
    CROSS_ENTROPY
    CROSS_ENTROPY_SOFT
    NLL
    NLL_BACKWARD
    BINARY_CROSS_ENTROPY
    SIGMOID_FOCAL
    ENTROPY


cdef inline bint is_backward(Operation operation) noexcept nogil:
    return operation == SOFTMAX_BACKWARD or operation == LOG_SOFTMAX_BACKWARD


cdef inline bint is_log(Operation operation) noexcept nogil:
    """Whether rows are told by their maximum, and by the sum of the others over it."""
    return operation == LOG_SOFTMAX or operation == LOGSUMEXP


cdef inline bint is_nll(Operation operation) noexcept nogil:
    """Whether rows are not gone through, but an element of each picked out."""
    return operation == NLL or operation == NLL_BACKWARD


cdef inline bint is_binary(Operation operation) noexcept nogil:
    """Whether each element has a loss, and is what rows are elsewhere."""
    return operation == BINARY_CROSS_ENTROPY or operation == SIGMOID_FOCAL


cdef inline bint has_losses(Operation operation) noexcept nogil:
    return (
        operation == CROSS_ENTROPY or operation == CROSS_ENTROPY_SOFT or operation == NLL
        or is_binary(operation) or operation == ENTROPY
    )


cdef inline bint has_soft_target(Operation operation) noexcept nogil:
    """Whether the target is probabilities."""
    return operation == CROSS_ENTROPY_SOFT


cdef inline bint writes_rows(Operation operation) noexcept nogil:
    """Whether out, where there is one, is like the scores, and written row by row."""
    return operation != LOGSUMEXP and not is_nll(operation)


cdef struct Options:
    # Fields as in _contract.Options, in the same order: an integer, then doubles.
    int64_t ignore_index
    double label_smoothing
    double z_loss
    double gamma
    double epsilon
    double temperature


cdef struct Job:
    # One call, as its threads see it.
    Py_ssize_t rows, num_classes, inner
    Py_ssize_t labels  # of binary losses: classes of the array, whose elements are the rows
    Layout layout
    Storage storage
    const char* logits  # or log_probs, or probs
    const char* other  # grad_output, or target probabilities
    Storage other_storage
    char* out  # or grad; NULL where only the loss is wanted
    bint stream  # whether out is written past the caches
    const char* target
    int target_kind  # 0 to 3: signed, of 1 << kind bytes; 4 to 7: unsigned
    const double* weight
    const void* relative_weight  # weight / largest_weight, in the compute type
    double largest_weight  # in magnitude; 1 without weights
    double weight_sum
    const double* sample_weight
    const void* temper  # what exponentials are computed with; NULL at a temperature of 1
    double cooling  # 1 / temperature
    Options options
    double scale
    # What decides, with its exponentials, whether a row is taken in common units (find_untamed):
    double tame_scale  # as scale; less if factors may be smaller than weights, 0 if no row is
    double least_rest  # the least share of all classes but the target
    char* losses
    Py_ssize_t summed  # rows whose losses are added up together
    double* partial  # these sums
    Py_ssize_t group  # rows in a unit of work
    Py_ssize_t row_step  # from a row to the next
    Py_ssize_t step  # from a class to the next in the tiles of a unit
    Py_ssize_t numbers  # of scratch; the carries, one a class, lie behind them


cdef inline bint is_flat(const Job* job, Operation operation) noexcept nogil:
    """Whether exponentials are taken in common units, wherever a row ends."""
    if is_log(operation) and not adds_as_rows(job):
        return FL_TOP_d if job.storage == FLOAT64 else FL_TOP_f
    return operation == SOFTMAX or operation == CROSS_ENTROPY or is_log(operation)


cdef inline bint is_smooth(const Job* job) noexcept nogil:
    """Whether targets are indices, and the loss asks for all scores."""
    return job.other == NULL and job.options.label_smoothing != 0.0


cdef inline bint is_apart(const Job* job) noexcept nogil:
    """Whether label smoothing asks that all rows have their own units."""
    return is_smooth(job) and job.tame_scale == 0.0


cdef inline bint adds_as_rows(const Job* job) noexcept nogil:
    """Whether a row is added up in chunks, and not in eights."""
    return job.num_classes > SHORT_FLAT_ROW


cdef inline Py_ssize_t rows_in_unit(const Job* job, Py_ssize_t unit) noexcept nogil:
    return min(job.group, job.rows - unit * job.group)


cdef struct Carry:
    # The end of a run of output that did not fill its cache line: it waits for the next run.
    char* end
    char line[LINE]


cdef struct Rows:
    # The scalar step, for as many rows as there are lanes. In:
    double maximum[LANES]
    double others[LANES]  # sum of the exponentials of all classes but one
    double target_logit[LANES]
    double target_weight[LANES]
    double row_weight[LANES]  # sample weight; 0 for rows that count for nothing
    double gap[LANES]  # sum of w_c (maximum - x_c); of soft targets, of w_c t_c (maximum - x_c)
    double mass[LANES]  # of soft targets: sum of w_c t_c, all classes but the maximum's
    double top_mass[LANES]  # of soft targets: w_k t_k at the maximum's class k
    int32_t own[LANES]  # whether exponentials are in units of the row's maximum
    # On the way: the exponentials of the maximum and of the target, and log sum exp(x - maximum).
    double top[LANES]
    double target_exp[LANES]
    double log_sum[LANES]
    # Out: g_c = factor * 2**-SHIFT * exponential_c - spread * w_c, except at the class left out.
    double loss[LANES]
    double factor[LANES]
    double spread[LANES]
    double left_out[LANES]


cdef struct Block:
    # What a block of a row was reduced to.
    double maximum
    double top  # its exponential, where the sum is that of the others
    double sum
    double gap
    double mass
    double top_mass


cdef enum Stage:
    FIRST
    COMMON_UNITS
    MAXIMA
    OWN_UNITS
    GAPS
    WRITE
    DONE


cdef struct Shared:
    # Rows that threads share.
    const Job* job
    Operation operation
    Stage stage
    Rows r
    int64_t index[LANES]  # of the class left out of a row's sum, or -1
    Py_ssize_t blocks  # of a row
    Block* block
    char* kept  # exponentials, of whole blocks; NULL where they are not asked for again
