"""The Numba backend: number helpers, blocks, rows, tiles, then the functions of the contract.

The contract is in ``_reference``.  What to know before reading on:

Two layouts.  A *row* is a long run of classes next to each other: classes lie in the SIMD lanes,
and one online pass in blocks that fit the first cache level leaves exp(x - m) in the caller's
`out`, where a second pass, still in cache, finds it.  Where rows are short, or other samples lie
between the classes, a *tile* puts LANES samples in the SIMD lanes, copied (transposed, converted)
into scratch and back.

exp(x - m) is kept multiplied by a power of two, so that what will be a subnormal result is still a
normal number: the final product rounds it, once.  The sum leaves one class out (the target, or the
maximum), which is what makes small losses exact.  0 * inf counts as 0.

Flags are given function by function.  ``contract`` lets multiply and add fuse; ``reassoc`` is for
the sums alone, each a loop over one array that is all reads, so that which order the compiler
chose depends on the length of the row and on nothing else.  No other flag: NaN and inf mean
something here.  The maximum is taken over integers in the order of the floats, since the maximum
of floats does not vectorise.  Arrays reach the helpers as slices indexed from 0: LLVM then knows
that no index is negative, and vectorises.  The hot loops (``_exp_block``, ``_largest``, ``_sum``,
``_scale`` and the loops over lanes of the ``_tile_*`` functions) must be packed instructions in
the assembly, without a call, a gather or a scalar instruction.

Everything that jitted code calls is in this file: the on-disk cache does not notice edits in
another.  Only the functions that Python calls are cached; the rest is linked into them.
"""

import threading

import numba
import numpy as np
from numba import njit, prange, types
from numba.extending import overload

LANES = 64  # samples in a tile
BLOCK = 1024  # classes of a row that are worked on while they are in the first cache level
SHORT_ROW = 64  # rows of at most so many classes go into tiles
GROUP = 16384  # elements of the rows that make up one unit of work
RUN = 16  # float32 additions to one lane of a tile before the sum moves on to float64
CHECK_BLOCK = 4096  # targets that one unit of check_target reads

# How 16 bits are to be read.
FLOATS, FLOAT16, BFLOAT16 = 0, 1, 2

# The fields of a unit's rows, each LANES numbers in a float64 array.  In:
MAXIMUM, OTHERS, TARGET_LOGIT, TARGET_WEIGHT, ROW_WEIGHT, GAP, MASS, TOP_MASS, INDEX = range(
    0, 9 * LANES, LANES
)
# Out: g_c = factor * exp(x_c - maximum) - spread * w_c, except at the class left out.
LOSS, FACTOR, SPREAD, LEFT_OUT = range(9 * LANES, 13 * LANES, LANES)
FIELDS = 13 * LANES

_inline = njit(error_model="numpy", nogil=True)
_fused = njit(error_model="numpy", nogil=True, fastmath={"contract"})
_summing = njit(error_model="numpy", nogil=True, fastmath={"reassoc"})


def _entry(function=None, *, parallel=False):
    """A function that Python calls: cached on disk, where there is a place for it."""
    if function is None:
        return lambda function: _entry(function, parallel=parallel)
    options = {"error_model": "numpy", "nogil": True, "parallel": parallel}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # neither the package nor the user's cache directory can be written to
        return njit(**options)(function)


# ---------------------------------------------------------------------------------------------
# Numbers
# ---------------------------------------------------------------------------------------------


def _scale_of(number):
    """The power of two that exp is kept multiplied by."""
    raise NotImplementedError("for jitted code")


@overload(_scale_of)
def _overload_scale_of(number):
    scale = 2.0**24 if number == types.float32 else 2.0**53
    return lambda number: scale


def _tiny_of(number):
    """The smallest normal number."""
    raise NotImplementedError("for jitted code")


@overload(_tiny_of)
def _overload_tiny_of(number):
    tiny = float(np.finfo(np.float32 if number == types.float32 else np.float64).tiny)
    return lambda number: tiny


def _exp_scaled(x, m):
    """_scale_of * exp(x - m) for x <= m; 0 below half the smallest subnormal; NaN for NaN."""
    raise NotImplementedError("for jitted code")


@overload(_exp_scaled)
def _overload_exp_scaled(x, m):
    function = _exp_scaled_32 if x == types.float32 else _exp_scaled_64
    return lambda x, m: function(x, m)


@_fused
def _exp_scaled_32(x, m):
    d = x - m
    # What the subtraction lost (TwoSum); it goes into the reduced argument, free of charge.
    back = d - x
    lost = (x - (d - back)) - (m + back)
    # Adding 1.5 * 2**23 rounds to an integer and leaves it in the low bits.
    shifted = d * np.float32(1.44269504) + np.float32(12582912.0)
    n = shifted - np.float32(12582912.0)
    r = n * np.float32(-0.693145751953125) + d
    r = n * np.float32(-1.42860682e-6) + (r + lost)
    p = np.float32(0.00131687098951) * r + np.float32(0.00835358145597)
    p = p * r + np.float32(0.0416763574161)
    p = p * r + np.float32(0.166667094605)
    p = p * r + np.float32(0.499999918849)
    p = p * r + np.float32(1.0)
    p = p * r + np.float32(1.0)
    # A product, not a sum of exponents: NaN stays NaN.
    bits = np.uint32((np.float32(shifted).view(np.uint32) + np.uint32(127 + 24)) << np.uint32(23))
    p = p * np.uint32(bits).view(np.float32)
    return np.float32(0.0) if d < np.float32(-103.9721) else p


@_fused
def _exp_scaled_64(x, m):
    d = x - m
    back = d - x
    lost = (x - (d - back)) - (m + back)
    shifted = d * 1.4426950408889634 + 6755399441055744.0
    n = shifted - 6755399441055744.0
    r = n * -6.93147180369123816490e-01 + d
    r = n * -1.90821492927058770002e-10 + (r + lost)
    p = 2.5110047135431713555e-8 * r + 2.7632652169579558723e-7
    p = p * r + 2.7557242344003567523e-6
    p = p * r + 0.000024801487335535663603
    p = p * r + 0.00019841269886584525699
    p = p * r + 0.0013888888947812472924
    p = p * r + 0.0083333333333222094146
    p = p * r + 0.041666666666522018292
    p = p * r + 0.16666666666666674528
    p = p * r + 0.50000000000000102221
    p = p * r + 1.0
    p = p * r + 1.0
    bits = (np.float64(shifted).view(np.uint64) + np.uint64(1023 + 53)) << np.uint64(52)
    p = p * np.uint64(bits).view(np.float64)
    return 0.0 if d < -745.1332191019412 else p


@_inline
def _exp(d):
    """exp(d) for d <= 0, free of branches."""
    return _exp_scaled_64(d, 0.0) * 2.0**-53


@_fused
def _log1p(x):
    """log(1 + x) for x >= 0, free of branches so that it vectorises (after fdlibm's e_log.c)."""
    u = 1.0 + x
    back = u - 1.0
    lost = (1.0 - (u - back)) + (x - back)
    # u = 2**k * z with z in [sqrt(1/2), sqrt(2))
    bits = np.float64(u).view(np.uint64)
    k = np.uint64((bits - np.uint64(0x3FE6A09E667F3BCD)) >> np.uint64(52))
    f = np.uint64(bits - (k << np.uint64(52))).view(np.float64) - 1.0
    # An integer below 2**52 becomes a double through the mantissa of 2**52.
    e = np.uint64(k | np.uint64(0x4330000000000000)).view(np.float64) - 4503599627370496.0
    s = f / (2.0 + f)
    z = s * s
    w = z * z
    t1 = w * (
        w * (w * 1.531383769920937332e-01 + 2.222219843214978396e-01) + 3.999999999940941908e-01
    )
    t2 = z * (
        w
        * (w * (w * 1.479819860511658591e-01 + 1.818357216161805012e-01) + 2.857142874366239149e-01)
        + 6.666666666666735130e-01
    )
    half = 0.5 * f * f
    log_z = half - (s * (half + t1 + t2) + (e * 1.90821492927058770002e-10 + lost / u))
    result = e * 6.93147180369123816490e-01 - (log_z - f)
    return result if x <= 1.7976931348623157e308 else x  # inf and NaN pass through


@_inline
def _half_to_float(h):
    sign = (np.uint32(h) & np.uint32(0x8000)) << np.uint32(16)
    magnitude = np.uint32(h) & np.uint32(0x7FFF)
    normal = np.uint32((magnitude << np.uint32(13)) + np.uint32((127 - 15) << 23))
    special = np.uint32((magnitude << np.uint32(13)) | np.uint32(0x7F800000))
    # By way of an integer, so that a flush of denormals in the caller does not matter.
    subnormal = np.float32(np.float32(np.int32(magnitude)) * np.float32(2.0**-24)).view(np.uint32)
    bits = subnormal if magnitude < np.uint32(0x0400) else normal
    bits = special if magnitude >= np.uint32(0x7C00) else bits
    return np.uint32(bits | sign).view(np.float32)


@_inline
def _float_to_half(x):
    """To nearest, ties to even."""
    bits = np.float32(x).view(np.uint32)
    sign = np.uint32((bits >> np.uint32(16)) & np.uint32(0x8000))
    magnitude = np.uint32(bits & np.uint32(0x7FFFFFFF))
    odd = (magnitude >> np.uint32(13)) & np.uint32(1)
    normal = np.uint32(np.uint32(magnitude + np.uint32(0xC8000FFF) + odd) >> np.uint32(13))
    # Adding 0.5 moves the last bit of a half subnormal to the last bit of the float.
    moved = np.float32(np.uint32(magnitude).view(np.float32) + np.float32(0.5))
    subnormal = np.uint32(moved.view(np.uint32) - np.uint32(0x3F000000))
    special = np.uint32(0x7E00) if magnitude > np.uint32(0x7F800000) else np.uint32(0x7C00)
    result = subnormal if magnitude < np.uint32(0x38800000) else normal
    result = special if magnitude >= np.uint32(0x477FF000) else result
    return np.uint16(result | sign)


@_inline
def _bfloat_to_float(b):
    return np.uint32(np.uint32(b) << np.uint32(16)).view(np.float32)


@_inline
def _float_to_bfloat(x):
    """To nearest, ties to even."""
    bits = np.float32(x).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = np.uint32(np.uint32(bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))
    nan = np.uint32((bits >> np.uint32(16)) | np.uint32(0x40))
    is_nan = np.uint32(bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.uint16(nan if is_nan else rounded)


# ---------------------------------------------------------------------------------------------
# Blocks
# ---------------------------------------------------------------------------------------------


def _load(x, start, n, buffer, storage):
    """Elements start to start + n in the compute type: as they lie, or converted into buffer."""
    raise NotImplementedError("for jitted code")


@overload(_load)
def _overload_load(x, start, n, buffer, storage):
    if x.dtype == types.uint16:
        return lambda x, start, n, buffer, storage: _load_halves(
            x[start : start + n], buffer[:n], storage
        )
    return lambda x, start, n, buffer, storage: x[start : start + n]


@_inline
def _load_halves(x, buffer, storage):
    if storage == FLOAT16:
        for i in range(buffer.size):
            buffer[i] = _half_to_float(x[i])
    else:
        for i in range(buffer.size):
            buffer[i] = _bfloat_to_float(x[i])
    return buffer


def _store(out, values, storage):
    raise NotImplementedError("for jitted code")


@overload(_store)
def _overload_store(out, values, storage):
    if out.dtype == types.uint16:
        return lambda out, values, storage: _store_halves(out, values, storage)
    return lambda out, values, storage: _copy(out, values)


@_inline
def _copy(out, values):
    for i in range(out.size):
        out[i] = values[i]


@_inline
def _store_halves(out, values, storage):
    if storage == FLOAT16:
        for i in range(out.size):
            out[i] = _float_to_half(values[i])
    else:
        for i in range(out.size):
            out[i] = _float_to_bfloat(values[i])


def _kept(out, rows, start, place, n):
    """Where exp(x - m) stays until it is written: in `out` itself unless that is of a half type.

    So the memory traffic of `out` overlaps the arithmetic.
    """
    raise NotImplementedError("for jitted code")


@overload(_kept)
def _overload_kept(out, rows, start, place, n):
    if out.dtype == types.uint16:
        return lambda out, rows, start, place, n: rows[place : place + n]
    return lambda out, rows, start, place, n: out[start : start + n]


def _largest(x):
    """The maximum; NaN if there is a positive NaN (the sums find the others)."""
    raise NotImplementedError("for jitted code")


@overload(_largest)
def _overload_largest(x):
    # b ^ ((b >> 31) & 0x7fffffff) orders the bits of floats as integers, and is its own inverse.
    wide = x.dtype == types.float64
    integer, real = (np.int64, np.float64) if wide else (np.int32, np.float32)
    shift = integer(63 if wide else 31)
    mask = integer(np.iinfo(integer).max)
    lowest = integer(np.iinfo(integer).min)

    def largest(x):
        bits = x.view(integer)
        m = lowest
        for i in range(bits.size):
            b = bits[i]
            m = max(m, b ^ ((b >> shift) & mask))
        return integer(m ^ ((m >> shift) & mask)).view(real)

    return largest


@_inline
def _find(x, value):
    """The first position of value, or 0."""
    for chunk in range(0, x.size, LANES):
        part = x[chunk : min(chunk + LANES, x.size)]
        hits = 0
        for j in range(part.size):
            hits += part[j] == value
        if hits:
            for j in range(part.size):
                if part[j] == value:
                    return chunk + j
    return 0


@_inline
def _exp_block(x, m, e):
    for i in range(e.size):
        e[i] = _exp_scaled(x[i], m)


@_inline
def _exp_in_place(e, m):
    # Its own loop: in the other the test for overlap would choose scalar code.
    for i in range(e.size):
        e[i] = _exp_scaled(e[i], m)


@_summing
def _sum(e):
    total = e.dtype.type(0)
    for i in range(e.size):
        total += e[i]
    return np.float64(total)


@_summing
def _dot(a, b):
    total = a.dtype.type(0)
    for i in range(a.size):
        total += a[i] * b[i]
    return np.float64(total)


@_inline
def _times(weight, value):
    """weight * value, where 0 * inf counts as 0."""
    return 0.0 if weight == 0.0 else weight * value


@_summing
def _gap(x, weight, m):
    """sum of w_c (m - x_c), in float64: it may exceed the float32 range on its way."""
    total = 0.0
    if weight.size:
        for i in range(x.size):
            total += _times(weight[i], m - np.float64(x[i]))
    else:
        for i in range(x.size):
            total += m - np.float64(x[i])
    return total


@_summing
def _soft_mass(t, weight, keep, uniform):
    """sum of w_c t_c"""
    total = 0.0
    if weight.size:
        for i in range(t.size):
            total += weight[i] * (keep * t[i] + uniform)
    else:
        for i in range(t.size):
            total += keep * t[i] + uniform
    return total


@_summing
def _soft_gap(x, t, weight, keep, uniform, m):
    """sum of w_c t_c (m - x_c)"""
    total = 0.0
    if weight.size:
        for i in range(x.size):
            total += _times(weight[i] * (keep * t[i] + uniform), m - np.float64(x[i]))
    else:
        for i in range(x.size):
            total += _times(keep * t[i] + uniform, m - np.float64(x[i]))
    return total


@_inline
def _scale(e, f):
    for i in range(e.size):
        e[i] *= f


@_inline
def _scale_and_spread(e, f, spread, weight):
    if weight.size:
        for i in range(e.size):
            e[i] = e[i] * f - e.dtype.type(spread * weight[i])
    else:
        u = e.dtype.type(spread)
        for i in range(e.size):
            e[i] = e[i] * f - u


@_inline
def _scale_and_subtract(e, f, spread, weight, t, keep, uniform):
    if weight.size:
        for i in range(e.size):
            e[i] = e[i] * f - e.dtype.type(spread * weight[i] * (keep * t[i] + uniform))
    else:
        for i in range(e.size):
            e[i] = e[i] * f - e.dtype.type(spread * (keep * t[i] + uniform))


# ---------------------------------------------------------------------------------------------
# The scalar step: from what a row was reduced to, its loss and the coefficients of its gradient
# ---------------------------------------------------------------------------------------------
# Loops over the fields of one array, whose distances LLVM knows: they vectorise.


@_inline
def _softmax_step(r, n):
    for i in range(n):
        p = 1.0 / (1.0 + r[OTHERS + i])
        r[FACTOR + i] = p
        r[LEFT_OUT + i] = p
        r[SPREAD + i] = 0.0
        r[ROW_WEIGHT + i] = 1.0


@_inline
def _cross_entropy_step(r, n, num_classes, smoothing, z_loss, scale, weight_sum):
    uniform = smoothing / num_classes
    spread = uniform * weight_sum
    for i in range(n):
        row_weight = r[ROW_WEIGHT + i]
        others = r[OTHERS + i]
        b = (1.0 - smoothing) * r[TARGET_WEIGHT + i]
        d = r[TARGET_LOGIT + i] - r[MAXIMUM + i]
        e_y = _exp(d)
        log_s = _log1p(others + (e_y - 1.0))
        lse = r[MAXIMUM + i] + log_s
        z_slope = 2.0 * z_loss * lse
        loss = _times(b, log_s - d) + spread * log_s + uniform * r[GAP + i] + 0.5 * z_slope * lse
        r[LOSS + i] = _times(row_weight, loss)

        total = others + e_y
        a = b + spread + z_slope
        left_out = spread + z_slope - uniform * r[TARGET_WEIGHT + i] - a * (others / total)
        weight = row_weight * scale
        r[FACTOR + i] = _times(weight, a / total)
        r[SPREAD + i] = weight * uniform
        r[LEFT_OUT + i] = _times(weight, left_out)


@_inline
def _cross_entropy_soft_step(r, n, z_loss, scale):
    for i in range(n):
        row_weight = r[ROW_WEIGHT + i]
        others = r[OTHERS + i]
        mass = r[MASS + i] + r[TOP_MASS + i]
        log_s = _log1p(others)
        lse = r[MAXIMUM + i] + log_s
        z_slope = 2.0 * z_loss * lse
        loss = mass * log_s + r[GAP + i] + 0.5 * z_slope * lse
        r[LOSS + i] = _times(row_weight, loss)

        total = 1.0 + others
        a = mass + z_slope
        # mass without the maximum's share: subtracted before, not after, p is rounded to 1.
        left_out = r[MASS + i] + z_slope - a * (others / total)
        weight = row_weight * scale
        r[FACTOR + i] = _times(weight, a / total)
        r[SPREAD + i] = weight
        r[LEFT_OUT + i] = _times(weight, left_out)


def _widen(target):
    """A target as int64; what does not fit is out of range, and stays so."""
    raise NotImplementedError("for jitted code")


@overload(_widen)
def _overload_widen(target):
    largest = np.uint64(np.iinfo(np.int64).max)
    if target == types.uint64:
        return lambda target: np.int64(min(target, largest))
    return lambda target: np.int64(target)


@_inline
def _read_targets(
    r, target, weight, sample_weight, num_classes, ignore_index, smoothing, z_loss, weight_sum
):
    """Targets, and the weights of their rows: 0 where a row counts for nothing."""
    smooth = smoothing * weight_sum != 0.0 or z_loss != 0.0
    for i in range(target.size):
        y = _widen(target[i])
        row_weight = sample_weight[i] if sample_weight.size else 1.0
        # Targets were checked, but another thread may have changed them since.
        if y == ignore_index or y < 0 or y >= num_classes:
            y = 0
            row_weight = 0.0
        target_weight = weight[y] if weight.size else 1.0
        if not smooth and (1.0 - smoothing) * target_weight == 0.0:
            row_weight = 0.0
        r[INDEX + i] = y
        r[TARGET_WEIGHT + i] = target_weight
        r[ROW_WEIGHT + i] = row_weight


@_inline
def _read_sample_weights(r, sample_weight, n):
    for i in range(n):
        r[ROW_WEIGHT + i] = sample_weight[i] if sample_weight.size else 1.0


@_inline
def _deliver_losses(r, n, losses, first, real):
    """Round row losses to the compute type, hand them out; return the sum of what was."""
    total = 0.0
    for i in range(n):
        rounded = real.dtype.type(r[LOSS + i])
        total += np.float64(rounded)
        if losses.size:
            losses[first + i] = rounded
    return total


# ---------------------------------------------------------------------------------------------
# Rows: classes in the SIMD lanes
# ---------------------------------------------------------------------------------------------
# A unit is a group of rows.  Scratch: two blocks, the reference point of every block of the
# group, and, for half types, the group's rows.


@_inline
def _largest_of_row(x, start, num_classes, buffer, storage):
    """The maximum of a row and its index."""
    m = buffer.dtype.type(-np.inf)
    index = 0
    for c in range(0, num_classes, BLOCK):
        block = _load(x, start + c, min(BLOCK, num_classes - c), buffer, storage)
        block_m = _largest(block)
        if not block_m <= m:
            m = block_m
            index = c + _find(block, m)
    return m, index


@_inline
def _reduce_row(
    x, start, num_classes, skip, m, keep, in_place, kept, references, buffer, line, storage
):
    """The maximum, the sum of exponentials without class `skip`, and the index left out.

    At skip = -1 that is the maximum's.  `m` is where the running maximum starts.  If keep, kept
    receives the scaled exp(x - reference), the reference of a block being the running maximum at
    its time, and 0 at the class left out.
    """
    scale = _scale_of(m)
    lowest = buffer.dtype.type(-np.inf)
    others = 0.0
    index = -1
    for c in range(0, num_classes, BLOCK):
        n = min(BLOCK, num_classes - c)
        block = _load(x, start + c, n, buffer, storage)
        block_m = _largest(block)
        rises = not block_m <= m  # true for NaN, too
        if rises and c > 0:
            if skip < 0 and index >= 0:
                others += 1.0
                if keep:
                    kept[index] = scale
            others *= _exp(np.float64(m) - np.float64(block_m))
        if rises:
            m = block_m
        if skip < 0 and (rises or (index < 0 and block_m == m)):
            index = c + _find(block, m)
        # Before the first finite class any finite reference will do: exp(-inf - 0) is 0.
        reference = m if m != lowest else buffer.dtype.type(0)
        e = kept[c : c + n] if keep else line[:n]
        if keep and in_place:
            _exp_in_place(e, reference)
        else:
            _exp_block(block, reference, e)
        left_out = (index if skip < 0 else skip) - c
        if 0 <= left_out < n:
            e[left_out] = 0
        others += _sum(e) / scale
        references[c // BLOCK] = m
    maximum = np.float64(m)
    # NaN where there is no finite maximum
    return maximum, others + (maximum - maximum), max(index, 0)


@_inline
def _write_row(
    out, start, kept, references, r, i, index, weight, soft, soft_start, keep, uniform, buffer,
    storage, soft_storage,
):  # fmt: skip
    """From scaled exp(x - reference) to the result, in place, then on to a half type."""
    num_classes = kept.size
    one = kept.dtype.type(1)
    scale = _scale_of(one)
    spread = r[SPREAD + i]
    if r[ROW_WEIGHT + i] == 0.0:
        row = out[start : start + num_classes]
        for c in range(num_classes):
            row[c] = 0
        return
    for c in range(0, num_classes, BLOCK):
        n = min(BLOCK, num_classes - c)
        e = kept[c : c + n]
        factor = r[FACTOR + i]
        reference = np.float64(references[c // BLOCK])
        if reference != r[MAXIMUM + i]:
            factor *= _exp(reference - r[MAXIMUM + i])
        if abs(factor) / scale < _tiny_of(one):
            # The factor would lose its low bits as a subnormal: take the scale off first.
            _scale(e, e.dtype.type(1.0 / scale))
            f = e.dtype.type(factor)
        else:
            f = e.dtype.type(factor / scale)
        w = weight[c : c + n]
        if soft.size:
            t = _load(soft, soft_start + c, n, buffer, soft_storage)
            _scale_and_subtract(e, f, spread, w, t, keep, uniform)
        elif spread != 0.0:
            _scale_and_spread(e, f, spread, w)
        else:
            _scale(e, f)
        if c <= index < c + n:
            e[index - c] = r[LEFT_OUT + i]
        if storage != FLOATS:
            _store(out[start + c : start + c + n], e, storage)


@_inline
def _softmax_rows(x, out, r, scratch, first, n, num_classes, storage, in_place):
    buffer, line, references, rows = _row_scratch(scratch, num_classes, n)
    blocks = references.size // n
    for i in range(n):
        start = (first + i) * num_classes
        kept = _kept(out, rows, start, i * num_classes, num_classes)
        m, others, index = _reduce_row(
            x, start, num_classes, -1, buffer.dtype.type(-np.inf), True, in_place, kept,
            references[i * blocks : (i + 1) * blocks], buffer, line, storage,
        )  # fmt: skip
        r[MAXIMUM + i] = m
        r[OTHERS + i] = others
        r[INDEX + i] = index
    _softmax_step(r, n)
    none = r[:0]
    for i in range(n):
        start = (first + i) * num_classes
        _write_row(
            out, start, _kept(out, rows, start, i * num_classes, num_classes),
            references[i * blocks : (i + 1) * blocks], r, i, int(r[INDEX + i]), none,
            x[:0], 0, 1.0, 0.0, buffer, storage, storage,
        )  # fmt: skip


@_inline
def _row_scratch(scratch, num_classes, n):
    blocks = (num_classes + BLOCK - 1) // BLOCK
    start = 2 * BLOCK + n * blocks
    return (
        scratch[:BLOCK],
        scratch[BLOCK : 2 * BLOCK],
        scratch[2 * BLOCK : start],
        scratch[start:],
    )


@_inline
def _log_softmax_row(x, out, scratch, row, num_classes, storage, log_probs):
    """log_softmax, or, without its second pass, logsumexp."""
    buffer, line, references, _ = _row_scratch(scratch, num_classes, 1)
    start = row * num_classes
    maximum, others, _ = _reduce_row(
        x, start, num_classes, -1, buffer.dtype.type(-np.inf), False, False, line, references,
        buffer, line, storage,
    )  # fmt: skip
    log_s = _log1p(others)
    if not log_probs:
        line[0] = maximum + log_s
        _store(out[row : row + 1], line[:1], storage)
        return
    m = buffer.dtype.type(maximum)
    shift = buffer.dtype.type(log_s)
    for c in range(0, num_classes, BLOCK):
        n = min(BLOCK, num_classes - c)
        result = line[:n]
        _shift(_load(x, start + c, n, buffer, storage), m, shift, result)
        _store(out[start + c : start + c + n], result, storage)


@_inline
def _shift(x, m, log_s, result):
    for i in range(result.size):
        result[i] = (x[i] - m) - log_s


@_inline
def _gap_of_row(x, start, num_classes, weight, maximum, buffer, storage):
    gap = 0.0
    for c in range(0, num_classes, BLOCK):
        n = min(BLOCK, num_classes - c)
        gap += _gap(_load(x, start + c, n, buffer, storage), weight[c : c + n], maximum)
    return gap


@_inline
def _soft_sums(
    x, start, soft, num_classes, weight, keep, uniform, maximum, index, buffer, line, storage,
    soft_storage,
):  # fmt: skip
    """sum of w t (m - x); sum of w t without the maximum's class; w t of that class."""
    gap = mass = top = 0.0
    for c in range(0, num_classes, BLOCK):
        n = min(BLOCK, num_classes - c)
        block = _load(x, start + c, n, buffer, storage)
        t = _load(soft, start + c, n, line, soft_storage)
        w = weight[c : c + n]
        gap += _soft_gap(block, t, w, keep, uniform, maximum)
        k = min(max(index - c, 0), n)
        mass += _soft_mass(t[:k], w[:k], keep, uniform)
        if k < n and c + k == index:
            top = _soft_mass(t[k : k + 1], w[k : k + 1], keep, uniform)
            k += 1
        mass += _soft_mass(t[k:], w[k:], keep, uniform)
    return gap, mass, top


# ---------------------------------------------------------------------------------------------
# Tiles: samples in the SIMD lanes
# ---------------------------------------------------------------------------------------------
# A unit is LANES samples that follow each other in (outer, inner) order, held in scratch as
# [class][lane]; lanes without a sample hold zeros.  Scratch: a line, five rows of lanes, two tiles.


@_inline
def _tile_scratch(scratch, num_classes):
    start = max(num_classes, LANES)
    lanes = scratch[start : start + 5 * LANES]
    start += 5 * LANES
    size = num_classes * LANES
    return (
        scratch[: max(num_classes, LANES)],
        lanes,
        scratch[start : start + size],
        scratch[start + size : start + 2 * size],
    )


@_inline
def _load_tile(x, tile, buffer, first, n, num_classes, inner, storage):
    if n < LANES:
        for i in range(tile.size):
            tile[i] = 0
    if inner == 1:
        for lane in range(n):
            row = _load(x, (first + lane) * num_classes, num_classes, buffer, storage)
            column = tile[lane:]
            for c in range(num_classes):
                column[c * LANES] = row[c]
        return
    lane = 0
    while lane < n:
        o, i = divmod(first + lane, inner)
        width = min(n - lane, inner - i)
        for c in range(num_classes):
            values = _load(x, (o * num_classes + c) * inner + i, width, buffer, storage)
            _copy(tile[c * LANES + lane : c * LANES + lane + width], values)
        lane += width


@_inline
def _store_tile(out, tile, buffer, first, n, num_classes, inner, storage):
    if inner == 1:
        for lane in range(n):
            row = buffer[:num_classes]
            column = tile[lane:]
            for c in range(num_classes):
                row[c] = column[c * LANES]
            start = (first + lane) * num_classes
            _store(out[start : start + num_classes], row, storage)
        return
    lane = 0
    while lane < n:
        o, i = divmod(first + lane, inner)
        width = min(n - lane, inner - i)
        for c in range(num_classes):
            start = (o * num_classes + c) * inner + i
            _store(
                out[start : start + width],
                tile[c * LANES + lane : c * LANES + lane + width],
                storage,
            )
        lane += width


@_inline
def _clear_dead_lanes(tile, r):
    """Nothing of a row that counts for nothing, a NaN least of all, gets through."""
    for lane in range(LANES):
        if r[ROW_WEIGHT + lane] == 0.0:
            column = tile[lane:]
            for c in range(tile.size // LANES):
                column[c * LANES] = 0


@_inline
def _tile_largest(tile, m, k):
    real = tile.dtype.type
    for j in range(LANES):
        m[j] = -np.inf
        k[j] = 0
    for c in range(tile.size // LANES):
        row = tile[c * LANES : (c + 1) * LANES]
        number = real(c)
        for j in range(LANES):
            rises = row[j] > m[j]
            k[j] = number if rises else k[j]
            m[j] = row[j] if rises else m[j]


@_inline
def _tile_reduce(tile, m, skip, line, lane, keep, r):
    """Sums of exponentials without class skip; the tile then holds the scaled exp(x - maximum)."""
    real = tile.dtype.type
    num_classes = tile.size // LANES
    scale = _scale_of(real(0))
    for j in range(LANES):
        lane[j] = 0
        r[OTHERS + j] = 0.0
    for c in range(num_classes):
        row = tile[c * LANES : (c + 1) * LANES]
        target = row if keep else line
        number = real(c)
        if keep:
            for j in range(LANES):
                row[j] = _exp_scaled(row[j], m[j])
        else:
            for j in range(LANES):
                line[j] = _exp_scaled(row[j], m[j])
        for j in range(LANES):
            lane[j] += real(0) if skip[j] == number else target[j]
        if c % RUN == RUN - 1 or c == num_classes - 1:  # long sums in float64
            for j in range(LANES):
                r[OTHERS + j] += np.float64(lane[j])
            for j in range(LANES):
                lane[j] = 0
    for j in range(LANES):
        maximum = np.float64(m[j])
        r[MAXIMUM + j] = maximum
        # NaN where there is no finite maximum
        r[OTHERS + j] = r[OTHERS + j] / scale + (maximum - maximum)


@_inline
def _tile_scale(tile, soft, skip, f, weight, keep, uniform, r):
    """From scaled exp(x - maximum) to the result."""
    scale = _scale_of(tile.dtype.type(0))
    spreads = False
    for j in range(LANES):
        f[j] = r[FACTOR + j] / scale
        spreads |= r[SPREAD + j] != 0.0
    for c in range(tile.size // LANES):
        row = tile[c * LANES : (c + 1) * LANES]
        w = weight[c] if weight.size else 1.0
        if soft.size:
            t = soft[c * LANES : (c + 1) * LANES]
            for j in range(LANES):
                row[j] = row[j] * f[j] - tile.dtype.type(
                    r[SPREAD + j] * w * (keep * t[j] + uniform)
                )
        elif spreads:
            for j in range(LANES):
                row[j] = row[j] * f[j] - tile.dtype.type(r[SPREAD + j] * w)
        else:
            for j in range(LANES):
                row[j] *= f[j]
    for j in range(LANES):
        tile[int(skip[j]) * LANES + j] = r[LEFT_OUT + j]


@_inline
def _tile_gaps(tile, soft, m, index, weight, keep, uniform, r):
    """sum w t (m - x), the sum of w t without the maximum, and its own w t."""
    for j in range(LANES):
        r[GAP + j] = 0.0
        r[MASS + j] = 0.0
        r[TOP_MASS + j] = 0.0
    for c in range(tile.size // LANES):
        row = tile[c * LANES : (c + 1) * LANES]
        w = weight[c] if weight.size else 1.0
        if soft.size:
            t = soft[c * LANES : (c + 1) * LANES]
            number = tile.dtype.type(c)
            for j in range(LANES):
                wt = w * (keep * t[j] + uniform)
                top = index[j] == number
                r[GAP + j] += _times(wt, np.float64(m[j]) - np.float64(row[j]))
                r[MASS + j] += 0.0 if top else wt
                r[TOP_MASS + j] = wt if top else r[TOP_MASS + j]
        else:
            for j in range(LANES):
                r[GAP + j] += _times(w, np.float64(m[j]) - np.float64(row[j]))


# ---------------------------------------------------------------------------------------------
# Shares: what one thread does
# ---------------------------------------------------------------------------------------------
# `shape` is (rows, num_classes, inner, group); group, the rows of a unit, is 0 for tiles.  Each
# operation has its share, and a parallel function that hands one share to each thread.


@_inline
def _share(units, thread, threads):
    return range(units * thread // threads, units * (thread + 1) // threads)


@_entry
def _softmax_share(x, out, shape, storage, in_place, scratch, fields, units, thread, threads):
    rows, num_classes, inner, group = shape
    r = fields[thread]
    scratch = scratch[thread]
    for unit in _share(units, thread, threads):
        if group:
            start = unit * group
            n = min(group, rows - start)
            _softmax_rows(x, out, r, scratch, start, n, num_classes, storage, in_place)
            continue
        start = unit * LANES
        n = min(LANES, rows - start)
        buffer, lanes, tile, _ = _tile_scratch(scratch, num_classes)
        m, k, lane = lanes[:LANES], lanes[LANES : 2 * LANES], lanes[2 * LANES : 3 * LANES]
        _load_tile(x, tile, buffer, start, n, num_classes, inner, storage)
        _tile_largest(tile, m, k)
        _tile_reduce(tile, m, k, buffer[:LANES], lane, True, r)
        _softmax_step(r, LANES)
        _tile_scale(tile, tile[:0], k, lane, r[:0], 1.0, 0.0, r)
        _store_tile(out, tile, buffer, start, n, num_classes, inner, storage)


@_entry(parallel=True)
def _softmax_parallel(x, out, shape, storage, in_place, scratch, fields, units, threads):
    for thread in prange(threads):
        _softmax_share(x, out, shape, storage, in_place, scratch, fields, units, thread, threads)


@_entry
def _log_softmax_share(x, out, shape, storage, log_probs, scratch, fields, units, thread, threads):
    """log_softmax, or, without log_probs, logsumexp."""
    rows, num_classes, inner, group = shape
    r = fields[thread]
    scratch = scratch[thread]
    for unit in _share(units, thread, threads):
        if group:
            for row in range(unit * group, min((unit + 1) * group, rows)):
                _log_softmax_row(x, out, scratch, row, num_classes, storage, log_probs)
            continue
        start = unit * LANES
        n = min(LANES, rows - start)
        buffer, lanes, tile, _ = _tile_scratch(scratch, num_classes)
        m, k, lane = lanes[:LANES], lanes[LANES : 2 * LANES], lanes[2 * LANES : 3 * LANES]
        _load_tile(x, tile, buffer, start, n, num_classes, inner, storage)
        _tile_largest(tile, m, k)
        _tile_reduce(tile, m, k, buffer[:LANES], lane, False, r)
        if not log_probs:
            for j in range(n):
                lane[j] = r[MAXIMUM + j] + _log1p(r[OTHERS + j])
            _store(out[start : start + n], lane[:n], storage)
            continue
        for j in range(LANES):
            lane[j] = _log1p(r[OTHERS + j])
        for c in range(num_classes):
            row = tile[c * LANES : (c + 1) * LANES]
            for j in range(LANES):
                row[j] = (row[j] - m[j]) - lane[j]
        _store_tile(out, tile, buffer, start, n, num_classes, inner, storage)


@_entry(parallel=True)
def _log_softmax_parallel(x, out, shape, storage, log_probs, scratch, fields, units, threads):
    for thread in prange(threads):
        _log_softmax_share(
            x, out, shape, storage, log_probs, scratch, fields, units, thread, threads
        )


@_entry
def _cross_entropy_share(
    x, target, weight, sample_weight, shape, storage, in_place, ignore_index, options, losses,
    out, scratch, fields, partial, units, thread, threads,
):  # fmt: skip
    rows, num_classes, inner, group = shape
    smoothing, z_loss, scale, weight_sum = options
    uniform = smoothing / num_classes
    r = fields[thread]
    scratch = scratch[thread]
    size = group if group else LANES
    keep = out.size > 0
    for unit in _share(units, thread, threads):
        start = unit * size
        n = min(size, rows - start)
        for i in range(FIELDS):
            r[i] = 0.0
        _read_targets(
            r, target[start : start + n], weight, sample_weight[start : start + n], num_classes,
            ignore_index, smoothing, z_loss, weight_sum,
        )  # fmt: skip
        if group:
            buffer, line, references, kept_rows = _row_scratch(scratch, num_classes, n)
            blocks = references.size // n
            for i in range(n):
                if r[ROW_WEIGHT + i] == 0.0:
                    continue
                at = (start + i) * num_classes
                y = int(r[INDEX + i])
                r[TARGET_LOGIT + i] = _load(x, at + y, 1, buffer, storage)[0]
                m = buffer.dtype.type(-np.inf)
                if smoothing != 0.0:
                    m, _ = _largest_of_row(x, at, num_classes, buffer, storage)
                    r[GAP + i] = _gap_of_row(
                        x, at, num_classes, weight, np.float64(m), buffer, storage
                    )
                kept = _kept(out, kept_rows, at, i * num_classes, num_classes)
                r[MAXIMUM + i], r[OTHERS + i], _ = _reduce_row(
                    x, at, num_classes, y, m, keep, in_place, kept,
                    references[i * blocks : (i + 1) * blocks], buffer, line, storage,
                )  # fmt: skip
            _cross_entropy_step(r, n, num_classes, smoothing, z_loss, scale, weight_sum)
            partial[unit] = _deliver_losses(r, n, losses, start, scratch)
            if keep:
                for i in range(n):
                    at = (start + i) * num_classes
                    _write_row(
                        out, at, _kept(out, kept_rows, at, i * num_classes, num_classes),
                        references[i * blocks : (i + 1) * blocks], r, i, int(r[INDEX + i]), weight,
                        x[:0], 0, 1.0, 0.0, buffer, storage, storage,
                    )  # fmt: skip
            continue
        buffer, lanes, tile, _ = _tile_scratch(scratch, num_classes)
        m, k, lane, y = (
            lanes[:LANES], lanes[LANES : 2 * LANES], lanes[2 * LANES : 3 * LANES],
            lanes[3 * LANES : 4 * LANES],
        )  # fmt: skip
        _load_tile(x, tile, buffer, start, n, num_classes, inner, storage)
        _clear_dead_lanes(tile, r)
        _tile_largest(tile, m, k)
        for j in range(LANES):
            y[j] = r[INDEX + j]
            r[TARGET_LOGIT + j] = tile[int(r[INDEX + j]) * LANES + j]
        if smoothing != 0.0:
            _tile_gaps(tile, tile[:0], m, y, weight, 1.0, uniform, r)
        _tile_reduce(tile, m, y, buffer[:LANES], lane, keep, r)
        _cross_entropy_step(r, LANES, num_classes, smoothing, z_loss, scale, weight_sum)
        partial[unit] = _deliver_losses(r, n, losses, start, scratch)
        if keep:
            _tile_scale(tile, tile[:0], y, lane, weight, 1.0, 0.0, r)
            _store_tile(out, tile, buffer, start, n, num_classes, inner, storage)


@_entry(parallel=True)
def _cross_entropy_parallel(
    x, target, weight, sample_weight, shape, storage, in_place, ignore_index, options, losses,
    out, scratch, fields, partial, units, threads,
):  # fmt: skip
    for thread in prange(threads):
        _cross_entropy_share(
            x, target, weight, sample_weight, shape, storage, in_place, ignore_index, options,
            losses, out, scratch, fields, partial, units, thread, threads,
        )  # fmt: skip


@_entry
def _cross_entropy_soft_share(
    x, soft, weight, sample_weight, shape, storage, soft_storage, in_place, options, losses,
    out, scratch, fields, partial, units, thread, threads,
):  # fmt: skip
    rows, num_classes, inner, group = shape
    smoothing, z_loss, scale = options
    spare, uniform = 1.0 - smoothing, smoothing / num_classes
    r = fields[thread]
    scratch = scratch[thread]
    size = group if group else LANES
    keep = out.size > 0
    for unit in _share(units, thread, threads):
        start = unit * size
        n = min(size, rows - start)
        for i in range(FIELDS):
            r[i] = 0.0
        _read_sample_weights(r, sample_weight[start : start + n], n)
        if group:
            buffer, line, references, kept_rows = _row_scratch(scratch, num_classes, n)
            blocks = references.size // n
            for i in range(n):
                if r[ROW_WEIGHT + i] == 0.0:
                    continue
                at = (start + i) * num_classes
                m, index = _largest_of_row(x, at, num_classes, buffer, storage)
                r[INDEX + i] = index
                r[GAP + i], r[MASS + i], r[TOP_MASS + i] = _soft_sums(
                    x, at, soft, num_classes, weight, spare, uniform, np.float64(m), index, buffer,
                    line, storage, soft_storage,
                )  # fmt: skip
                kept = _kept(out, kept_rows, at, i * num_classes, num_classes)
                r[MAXIMUM + i], r[OTHERS + i], _ = _reduce_row(
                    x, at, num_classes, index, m, keep, in_place, kept,
                    references[i * blocks : (i + 1) * blocks], buffer, line, storage,
                )  # fmt: skip
            _cross_entropy_soft_step(r, n, z_loss, scale)
            partial[unit] = _deliver_losses(r, n, losses, start, scratch)
            if keep:
                for i in range(n):
                    at = (start + i) * num_classes
                    _write_row(
                        out, at, _kept(out, kept_rows, at, i * num_classes, num_classes),
                        references[i * blocks : (i + 1) * blocks], r, i, int(r[INDEX + i]), weight,
                        soft, at, spare, uniform, buffer, storage, soft_storage,
                    )  # fmt: skip
            continue
        buffer, lanes, tile, targets = _tile_scratch(scratch, num_classes)
        m, k, lane = lanes[:LANES], lanes[LANES : 2 * LANES], lanes[2 * LANES : 3 * LANES]
        _load_tile(x, tile, buffer, start, n, num_classes, inner, storage)
        _load_tile(soft, targets, buffer, start, n, num_classes, inner, soft_storage)
        _clear_dead_lanes(tile, r)
        _tile_largest(tile, m, k)
        _tile_gaps(tile, targets, m, k, weight, spare, uniform, r)
        _tile_reduce(tile, m, k, buffer[:LANES], lane, keep, r)
        _cross_entropy_soft_step(r, LANES, z_loss, scale)
        partial[unit] = _deliver_losses(r, n, losses, start, scratch)
        if keep:
            _tile_scale(tile, targets, k, lane, weight, spare, uniform, r)
            _store_tile(out, tile, buffer, start, n, num_classes, inner, storage)


@_entry(parallel=True)
def _cross_entropy_soft_parallel(
    x, soft, weight, sample_weight, shape, storage, soft_storage, in_place, options, losses,
    out, scratch, fields, partial, units, threads,
):  # fmt: skip
    for thread in prange(threads):
        _cross_entropy_soft_share(
            x, soft, weight, sample_weight, shape, storage, soft_storage, in_place, options,
            losses, out, scratch, fields, partial, units, thread, threads,
        )  # fmt: skip


@_entry
def _backward_share(g, p, out, shape, storage, log_probs, scratch, units, thread, threads):
    """softmax_backward: p (g - sum g p); with log_probs: g - exp(p) sum g."""
    rows, num_classes, inner, group = shape
    scratch = scratch[thread]
    real = scratch.dtype.type
    scale = _scale_of(real(0))
    for unit in _share(units, thread, threads):
        if group:
            buffer, line, _, _ = _row_scratch(scratch, num_classes, 1)
            for row in range(unit * group, min((unit + 1) * group, rows)):
                start = row * num_classes
                total = 0.0
                for c in range(0, num_classes, BLOCK):
                    n = min(BLOCK, num_classes - c)
                    upstream = _load(g, start + c, n, buffer, storage)
                    if log_probs:
                        total += _sum(upstream)
                    else:
                        total += _dot(upstream, _load(p, start + c, n, line, storage))
                m = real(0)
                if log_probs:
                    # Log-probabilities are at most 0, but the formula holds for any.
                    m = max(m, _largest_of_row(p, start, num_classes, buffer, storage)[0])
                    total = total * np.exp(np.float64(m)) / scale
                for c in range(0, num_classes, BLOCK):
                    n = min(BLOCK, num_classes - c)
                    upstream = _load(g, start + c, n, buffer, storage)
                    forward = _load(p, start + c, n, line, storage)
                    result = line[:n]
                    if log_probs:
                        _log_softmax_vjp(upstream, forward, m, real(total), result)
                    else:
                        _softmax_vjp(upstream, forward, real(total), result)
                    _store(out[start + c : start + c + n], result, storage)
            continue
        start = unit * LANES
        n = min(LANES, rows - start)
        buffer, lanes, tile, upstreams = _tile_scratch(scratch, num_classes)
        m, k, lane, f = (
            lanes[:LANES], lanes[LANES : 2 * LANES], lanes[2 * LANES : 3 * LANES],
            lanes[3 * LANES : 4 * LANES],
        )  # fmt: skip
        _load_tile(p, tile, buffer, start, n, num_classes, inner, storage)
        _load_tile(g, upstreams, buffer, start, n, num_classes, inner, storage)
        _tile_vjp(tile, upstreams, m, k, lane, f, log_probs)
        _store_tile(out, tile, buffer, start, n, num_classes, inner, storage)


@_inline
def _softmax_vjp(g, p, total, result):
    for i in range(result.size):
        result[i] = p[i] * (g[i] - total)


@_inline
def _log_softmax_vjp(g, log_p, m, total, result):
    for i in range(result.size):
        result[i] = g[i] - _exp_scaled(log_p[i], m) * total


@_inline
def _tile_vjp(tile, upstreams, m, k, lane, f, log_probs):
    """As the rows: the sum over the classes, then the result in the place of the tile."""
    num_classes = tile.size // LANES
    real = tile.dtype.type
    totals = k
    for j in range(LANES):
        lane[j] = 0
        totals[j] = 0
    for c in range(num_classes):
        p = tile[c * LANES : (c + 1) * LANES]
        g = upstreams[c * LANES : (c + 1) * LANES]
        for j in range(LANES):
            lane[j] += g[j] if log_probs else g[j] * p[j]
        if c % RUN == RUN - 1 or c == num_classes - 1:
            for j in range(LANES):
                totals[j] += lane[j]
            for j in range(LANES):
                lane[j] = 0
    if log_probs:
        _tile_largest(tile, m, lane)
        for j in range(LANES):
            m[j] = max(m[j], real(0))
            f[j] = np.float64(totals[j]) * np.exp(np.float64(m[j])) / _scale_of(real(0))
    for c in range(num_classes):
        p = tile[c * LANES : (c + 1) * LANES]
        g = upstreams[c * LANES : (c + 1) * LANES]
        if log_probs:
            for j in range(LANES):
                p[j] = g[j] - _exp_scaled(p[j], m[j]) * f[j]
        else:
            for j in range(LANES):
                p[j] = p[j] * (g[j] - totals[j])


@_entry(parallel=True)
def _backward_parallel(g, p, out, shape, storage, log_probs, scratch, units, threads):
    for thread in prange(threads):
        _backward_share(g, p, out, shape, storage, log_probs, scratch, units, thread, threads)


@_entry
def _nll_share(
    log_probs, target, weight, sample_weight, shape, storage, ignore_index, losses, scratch,
    fields, partial, units, thread, threads,
):  # fmt: skip
    rows, num_classes, inner, _ = shape
    r = fields[thread]
    scratch = scratch[thread]
    for unit in _share(units, thread, threads):
        start = unit * LANES
        n = min(LANES, rows - start)
        _read_targets(
            r, target[start : start + n], weight, sample_weight[start : start + n], num_classes,
            ignore_index, 0.0, 0.0, 0.0,
        )  # fmt: skip
        for i in range(n):
            o, j = divmod(start + i, inner)
            place = (o * num_classes + int(r[INDEX + i])) * inner + j
            log_p = np.float64(_load(log_probs, place, 1, scratch, storage)[0])
            r[LOSS + i] = _times(r[ROW_WEIGHT + i], -log_p * r[TARGET_WEIGHT + i])
        partial[unit] = _deliver_losses(r, n, losses, start, scratch)


@_entry(parallel=True)
def _nll_parallel(
    log_probs, target, weight, sample_weight, shape, storage, ignore_index, losses, scratch,
    fields, partial, units, threads,
):  # fmt: skip
    for thread in prange(threads):
        _nll_share(
            log_probs, target, weight, sample_weight, shape, storage, ignore_index, losses,
            scratch, fields, partial, units, thread, threads,
        )  # fmt: skip


@_entry
def _nll_backward_share(
    target, weight, sample_weight, shape, storage, ignore_index, scale, out, scratch, fields,
    units, thread, threads,
):  # fmt: skip
    """The gradient at the targets, into `out` that holds zeros."""
    rows, num_classes, inner, _ = shape
    r = fields[thread]
    scratch = scratch[thread]
    for unit in _share(units, thread, threads):
        start = unit * LANES
        n = min(LANES, rows - start)
        _read_targets(
            r, target[start : start + n], weight, sample_weight[start : start + n], num_classes,
            ignore_index, 0.0, 0.0, 0.0,
        )  # fmt: skip
        for i in range(n):
            o, j = divmod(start + i, inner)
            place = (o * num_classes + int(r[INDEX + i])) * inner + j
            # Subtracting from 0 makes +0 of a product that is 0.
            scratch[0] = 0.0 - scale * r[TARGET_WEIGHT + i] * r[ROW_WEIGHT + i]
            _store(out[place : place + 1], scratch[:1], storage)


@_entry(parallel=True)
def _nll_backward_parallel(
    target, weight, sample_weight, shape, storage, ignore_index, scale, out, scratch, fields,
    units, threads,
):  # fmt: skip
    for thread in prange(threads):
        _nll_backward_share(
            target, weight, sample_weight, shape, storage, ignore_index, scale, out,
            scratch, fields, units, thread, threads,
        )  # fmt: skip


@_entry
def _check_share(
    target, weight, sample_weight, num_classes, ignore_index, sums, units, thread, threads
):
    """The sum of the weights of each block, or -1 where a target is out of range."""
    for block in _share(units, thread, threads):
        start = block * CHECK_BLOCK
        t = target[start : start + CHECK_BLOCK]
        s = sample_weight[start : start + CHECK_BLOCK]
        bad = 0
        used = 0
        for i in range(t.size):
            y = _widen(t[i])
            counts = y != ignore_index
            used += counts
            bad += counts & ((y < 0) | (y >= num_classes))
        total = np.float64(used)
        if bad:
            total = -1.0
        elif weight.size or s.size:
            total = 0.0
            for i in range(t.size):
                y = _widen(t[i])
                if y != ignore_index and 0 <= y < num_classes:
                    total += (s[i] if s.size else 1.0) * (weight[y] if weight.size else 1.0)
        sums[block] = total


@_entry(parallel=True)
def _check_parallel(target, weight, sample_weight, num_classes, ignore_index, sums, units, threads):
    for thread in prange(threads):
        _check_share(
            target, weight, sample_weight, num_classes, ignore_index, sums, units, thread, threads
        )


# ---------------------------------------------------------------------------------------------
# The functions of the contract
# ---------------------------------------------------------------------------------------------

_ABSENT = np.empty(0)
_launch_lock = threading.Lock()


def softmax(logits, out, num_threads):
    x, storage = _flat(logits)
    shape, units, threads = _plan(logits, num_threads)
    arguments = (x, _flat(out)[0], shape, storage, _same(logits, out))
    _run(_softmax_share, _softmax_parallel, (*arguments, *_scratch(logits, shape, threads)),
         units, threads)  # fmt: skip


def log_softmax(logits, out, num_threads):
    _log_softmax(logits, out, True, num_threads)


def logsumexp(logits, out, num_threads):
    _log_softmax(logits, out, False, num_threads)


def _log_softmax(logits, out, log_probs, num_threads):
    x, storage = _flat(logits)
    shape, units, threads = _plan(logits, num_threads)
    arguments = (x, _flat(out)[0], shape, storage, log_probs)
    _run(_log_softmax_share, _log_softmax_parallel, (*arguments, *_scratch(logits, shape, threads)),
         units, threads)  # fmt: skip


def softmax_backward(grad_output, probs, out, num_threads):
    _backward(grad_output, probs, out, False, num_threads)


def log_softmax_backward(grad_output, log_probs, out, num_threads):
    _backward(grad_output, log_probs, out, True, num_threads)


def _backward(grad_output, forward, out, log_probs, num_threads):
    g, storage = _flat(grad_output)
    shape, units, threads = _plan(forward, num_threads)
    scratch, _ = _scratch(forward, shape, threads)
    arguments = (g, _flat(forward)[0], _flat(out)[0], shape, storage, log_probs, scratch)
    _run(_backward_share, _backward_parallel, arguments, units, threads)


def check_target(target, weight, sample_weight, num_classes, ignore_index, num_threads):
    """Flat index of the first target out of range, or -1; and the divisor of the mean."""
    t = target.reshape(-1)
    units = -(-t.size // CHECK_BLOCK)
    sums = np.empty(units)
    arguments = (t, _or_absent(weight), _or_absent(sample_weight), num_classes, ignore_index, sums)
    _run(_check_share, _check_parallel, arguments, units, min(num_threads, units))
    if units and sums.min() < 0:
        start = int(sums.argmin()) * CHECK_BLOCK
        block = t[start : start + CHECK_BLOCK]
        bad = (block != ignore_index) & ((block < 0) | (block >= num_classes))
        return start + int(bad.argmax()), 0.0
    return -1, float(sums.sum())


def cross_entropy(
    logits, target, weight, sample_weight, ignore_index, label_smoothing, z_loss, scale,
    losses, grad, num_threads,
):  # fmt: skip
    x, storage = _flat(logits)
    shape, units, threads = _plan(logits, num_threads)
    weight_sum = float(logits.shape[1] if weight is None else weight.sum())
    partial = np.empty(units)
    arguments = (
        x, target.reshape(-1), _or_absent(weight), _or_absent(sample_weight), shape, storage,
        _same(logits, grad), ignore_index, (label_smoothing, z_loss, scale, weight_sum),
        *_outputs(x, losses, grad, logits), *_scratch(logits, shape, threads), partial,
    )  # fmt: skip
    _run(_cross_entropy_share, _cross_entropy_parallel, arguments, units, threads)
    return float(partial.sum())


def cross_entropy_soft(
    logits, target, weight, sample_weight, label_smoothing, z_loss, scale, losses, grad, num_threads
):
    x, storage = _flat(logits)
    soft, soft_storage = _flat(target)
    shape, units, threads = _plan(logits, num_threads)
    partial = np.empty(units)
    arguments = (
        x, soft, _or_absent(weight), _or_absent(sample_weight), shape, storage, soft_storage,
        _same(logits, grad), (label_smoothing, z_loss, scale),
        *_outputs(x, losses, grad, logits), *_scratch(logits, shape, threads), partial,
    )  # fmt: skip
    _run(_cross_entropy_soft_share, _cross_entropy_soft_parallel, arguments, units, threads)
    return float(partial.sum())


def nll_loss(
    log_probs, target, weight, sample_weight, ignore_index, scale, losses, grad, num_threads
):
    x, storage = _flat(log_probs)
    shape, _, _ = _plan(log_probs, num_threads)
    units = -(-shape[0] // LANES)
    threads = min(num_threads, units)
    partial = np.empty(units)
    scratch = np.empty((max(threads, 1), 1), _compute_dtype(log_probs))
    fields = np.empty((max(threads, 1), FIELDS))
    rows = (target.reshape(-1), _or_absent(weight), _or_absent(sample_weight), shape, storage)
    handed_out, out = _outputs(x, losses, grad, log_probs)
    _run(
        _nll_share, _nll_parallel,
        (x, *rows, ignore_index, handed_out, scratch, fields, partial), units, threads,
    )  # fmt: skip
    if grad is not None:  # which may be log_probs: not before these were read
        out.fill(0)
        _run(
            _nll_backward_share, _nll_backward_parallel,
            (*rows, ignore_index, scale, out, scratch, fields), units, threads,
        )  # fmt: skip
    return float(partial.sum())


def _flat(array):
    """The array in one dimension, half types as their bits, and how to read those."""
    flat = array.reshape(-1)
    if array.itemsize != 2:
        return flat, FLOATS
    return flat.view(np.uint16), FLOAT16 if array.dtype == np.float16 else BFLOAT16


def _compute_dtype(array):
    return np.float64 if array.itemsize == 8 else np.float32


def _or_absent(array):
    return _ABSENT if array is None else array.reshape(-1)


def _outputs(x, losses, grad, logits):
    """Arrays of the types that the kernels expect, empty where nothing is to be written."""
    if losses is None:
        losses = np.empty(0, _compute_dtype(logits))
    return losses.reshape(-1), np.empty(0, x.dtype) if grad is None else _flat(grad)[0]


def _same(logits, out):
    """Whether out is the logits; if not, it does not overlap them."""
    return out is not None and np.may_share_memory(logits, out)


def _plan(array, num_threads):
    """(rows, num_classes, inner, group), the number of units, and how many threads they are for."""
    outer, num_classes, inner = array.shape
    rows = outer * inner
    group = 0
    if inner == 1 and num_classes > SHORT_ROW:
        group = min(max(GROUP // num_classes, 1), LANES)
    units = -(-rows // (group or LANES))
    return (rows, num_classes, inner, group), units, min(num_threads, units)


def _scratch(array, shape, threads):
    """Scratch for each thread: taken here, so that want of memory is an error and no crash."""
    _, num_classes, _, group = shape
    if group:
        size = 2 * BLOCK + group * -(-num_classes // BLOCK)
        if array.itemsize == 2:
            size += group * num_classes
    else:
        size = max(num_classes, LANES) + 5 * LANES + 2 * num_classes * LANES
    size += -size % 16  # threads do not share a cache line
    threads = max(threads, 1)
    return np.empty((threads, size), _compute_dtype(array)), np.empty((threads, FIELDS))


def _run(share, parallel, arguments, units, threads):
    """On one thread without Numba's thread pool, which a forked child must not touch."""
    if threads <= 1:
        if units:
            share(*arguments, units, 0, 1)
        return
    with _launch_lock:
        before = numba.get_num_threads()
        numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
        try:
            parallel(*arguments, units, threads)
        finally:
            numba.set_num_threads(before)


def warmup():
    """Compile the common operations for float32 and float64, for one thread and for many."""
    target = np.zeros((2 * LANES, 1), np.int64)
    for dtype in (np.float32, np.float64):
        logits = np.zeros((2 * LANES, 2, 1), dtype)
        for threads in (1, 2):
            softmax(logits, np.empty_like(logits), threads)
            log_softmax(logits, np.empty_like(logits), threads)
            check_target(target, None, None, 2, -100, threads)
            cross_entropy(
                logits,
                target,
                None,
                None,
                -100,
                0.0,
                0.0,
                1.0,
                None,
                np.empty_like(logits),
                threads,
            )


def describe():
    """What show_config says of this backend."""
    try:
        layer = numba.threading_layer()
    except ValueError:
        layer = "not started"
    return {
        "numba": numba.__version__,
        "numba threading layer": layer,
        "numba threads": str(numba.config.NUMBA_NUM_THREADS),
    }
