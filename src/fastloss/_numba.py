"""The Numba backend: primitives, numbers, blocks, rows, tiles, then the functions of the contract.

The contract is in ``_reference``.  What to know before reading on:

Two layouts.  A *row* is a long run of classes next to each other: classes lie in the SIMD lanes.
Where rows are short, or other samples lie between the classes, a *tile* puts LANES samples in the
SIMD lanes, copied (transposed, converted) into scratch and back.  Either way a unit of rows is put
together in scratch that stays in cache and goes out in one run; a large result goes past the
caches, so that memory is not read only to be overwritten, and what the next unit needs is fetched
meanwhile.

Exponentials are kept relative to a power of two near the row's maximum, which costs and rounds
nothing, and high enough that what will be a subnormal result is still a normal number: the final
product rounds it, once.  The sum leaves one class out (the target, or the maximum), which is what
makes small losses exact.  0 * inf counts as 0.

Flags are given function by function.  ``contract`` lets multiply and add fuse; ``reassoc`` is for
sums alone, each a loop over one array that is all reads, so that which order the compiler chose
depends on the length and on nothing else.  No other flag: NaN and inf mean something here.  Arrays
reach the helpers as slices indexed from 0: LLVM then knows that no index is negative, and
vectorises.  Loops over lanes have a constant count and work on arrays on the stack: LLVM knows that
these overlap nothing and keeps them in registers.  In the assembly such a loop must be packed
instructions, without a call, a gather or a scalar instruction.

Everything that jitted code calls is in this file: the on-disk cache does not notice edits in
another.  Only the functions that Python calls are cached; the rest is linked into them.
"""

import contextlib
import ctypes
import functools
import hashlib
import math
import platform
import threading

import numba
import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.core.caching import FunctionCache, IndexDataCacheFile
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic, overload
from numba.np.arrayobj import populate_array

from fastloss import _threads
from fastloss._contract import Labels, Options, TargetCheck

if numba.config.DISABLE_JIT:
    raise ImportError("Numba compiles nothing, by NUMBA_DISABLE_JIT", name=__name__)

LANES = 64  # samples in a tile
CHUNK = 64  # classes of a row that are taken at a time: as many partial sums and maxima
BLOCK = 1024  # classes of a row whose sum stays in float32 before it moves on to float64
SHORT_ROW = 300  # rows of at most so many classes go into tiles
GROUP = 8192  # elements of the rows that are taken together, at most LANES of them
TURN = 16  # classes of columns that are turned into rows at a time
TURNED = 1 << 24  # elements of the columns that make up one unit of work, at most LANES of them
WIDE = 16384  # elements of the tiles that make up one unit of work, where runs may be long
MOST_TILES = 8  # of a unit
FEWEST_UNITS = 32  # that are to be left when tiles are put together
FAR = 65536  # the most elements that are fetched ahead of their use
RUN = 16  # float32 additions to one lane of a tile before the sum moves on to float64
CHECK_BLOCK = 4096  # targets that one unit of check_target reads
LINE = 64  # bytes of a cache line
STREAM_BYTES = 1 << 24  # results from this size on are written past the caches
IEEE = np.uint32(0x1F80)  # to nearest, denormals kept: results do not depend on what somebody set

# How 16 bits are to be read, and how the bytes of targets.
FLOATS, FLOAT16, BFLOAT16 = 0, 1, 2
INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")

# How the samples of a call are taken.
ROWS, TILES, COLUMNS = range(3)

# The fields of a unit's rows, each LANES numbers in a float64 array.  In:
MAXIMUM, OTHERS, TARGET_LOGIT, TARGET_WEIGHT, ROW_WEIGHT, GAP, MASS, TOP_MASS, INDEX = range(
    0, 9 * LANES, LANES
)
# On the way: the exponentials of the maximum and of the target.
TOP, TARGET_EXP = range(9 * LANES, 11 * LANES, LANES)
# Out: g_c = factor * 2**-shift * exponential_c - spread * w_c, except at the class left out.
LOSS, FACTOR, SPREAD, LEFT_OUT = range(11 * LANES, 15 * LANES, LANES)
FIELDS = 15 * LANES

FAR_UNIT = 2.0**-64  # what is scaled by it can be summed up

# Whether float16 is converted by the processor. Code cached for other features is not used.
_features = numba.config.CPU_FEATURES
_features = (get_host_cpu_features() if _features is None else _features).split(",")
_HAS_F16C = {"+avx", "+f16c"} <= set(_features)

# Helpers live inside what calls them: without wrappers for Python and C they compile faster.
_common = {"error_model": "numpy", "nogil": True, "no_cfunc_wrapper": True}
_options = {**_common, "forceinline": True, "no_cpython_wrapper": True}
_inline = njit(**_options)
# What only calls others becomes part of its caller before types are inferred: a function less.
_spliced = njit(inline="always", error_model="numpy")
_fused = njit(fastmath={"contract"}, **_options)
_summing = njit(fastmath={"reassoc"}, **_options)


def _typed(choose, **options):
    """A function for jitted code alone: choose, given the types, returns what is compiled."""

    @functools.wraps(choose)
    def stub(*arguments):
        raise NotImplementedError("for jitted code")

    overload(stub, jit_options={**_options, **options})(choose)
    return stub


_typed_fused = functools.partial(_typed, fastmath={"contract"})


def _entry(function=None, *, parallel=False):
    """A function that Python calls: cached on disk, where there is a place for it."""
    if function is None:
        return lambda function: _entry(function, parallel=parallel)
    dispatcher = njit(parallel=parallel, **_common)(function)
    with contextlib.suppress(RuntimeError):  # nowhere to write: not in the package, nor elsewhere
        dispatcher._cache = _Cache(function)
    return dispatcher


class _Cache(FunctionCache):
    """Numba's on-disk cache, with files for each signature, and without errors of its own.

    Numba has one index for all signatures of a function.  Two processes that compile one each, at
    the same time, would each give the same name to their code, and one would run the other's.
    """

    def load_overload(self, sig, target_context):
        self._choose_file(sig, target_context.codegen())
        try:
            return super().load_overload(sig, target_context)
        except Exception:  # unpickling a damaged file may raise anything
            with contextlib.suppress(OSError):
                self.flush()
            return None  # compile anew

    def save_overload(self, sig, data):
        self._choose_file(sig, data.codegen)
        with contextlib.suppress(OSError):  # the disk is full, or can no longer be written to
            super().save_overload(sig, data)

    def _choose_file(self, sig, codegen):
        key = hashlib.sha256(repr(self._index_key(sig, codegen)).encode()).hexdigest()
        self._cache_file = IndexDataCacheFile(
            self._cache_path,
            f"{self._impl.filename_base}.{key[:16]}",
            self._impl.locator.get_source_stamp(),
        )


# ---------------------------------------------------------------------------------------------
# Primitives: what Python has no words for
# ---------------------------------------------------------------------------------------------


def _place(context, builder, array_type, array, index, pointer_type):
    data = cgutils.create_struct_proxy(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), pointer_type.as_pointer())


@intrinsic
def _borrow(typing_context, array):
    """The array without its owner: slices of it count no references, which costs an atomic each."""

    def generate(context, builder, signature, arguments):
        borrowed = context.make_array(array)(context, builder, arguments[0])
        borrowed.meminfo = cgutils.get_null_value(borrowed.meminfo.type)
        return borrowed._getvalue()

    return array(array), generate


@intrinsic
def _as_input(typing_context, array):
    """The array as inputs are typed: read-only."""

    def generate(context, builder, signature, arguments):
        return arguments[0]

    return array.copy(readonly=True)(array), generate


@intrinsic
def _lanes(typing_context, like):
    """LANES numbers on the stack of the caller, of the type of an array or of a NumPy type."""
    array_type = types.Array(like.dtype, 1, "C")

    def generate(context, builder, signature, arguments):
        scalar = context.get_data_type(like.dtype)
        size = context.get_abi_sizeof(scalar)
        vector = cgutils.alloca_once(builder, ir.ArrayType(scalar, LANES))
        vector.align = LINE
        array = context.make_array(array_type)(context, builder)
        length = context.get_constant(types.intp, LANES)
        populate_array(
            array,
            data=builder.bitcast(vector, scalar.as_pointer()),
            shape=[length],
            strides=[context.get_constant(types.intp, size)],
            itemsize=size,
            meminfo=None,
        )
        return array._getvalue()

    return array_type(like), generate


@intrinsic
def _transpose(typing_context, source, source_start, source_step, to, to_start, to_step):
    """Eight runs of eight numbers: to[i][j] = source[j][i], the runs so many numbers apart."""

    def generate(context, builder, signature, arguments):
        source_value, source_start, source_step, to_value, to_start, to_step = arguments
        vector = ir.VectorType(context.get_data_type(source.dtype), 8)
        size = source.dtype.bitwidth // 8

        def run(array_type, array, start, step, i):
            index = builder.add(start, builder.mul(step, ir.Constant(step.type, i)))
            return _place(context, builder, array_type, array, index, vector)

        def shuffle(a, b, mask):
            mask = ir.Constant(ir.VectorType(ir.IntType(32), 8), mask)
            return builder.shuffle_vector(a, b, mask)

        a = [
            builder.load(run(source, source_value, source_start, source_step, i)) for i in range(8)
        ]
        for load in a:
            load.align = size
        b = []
        for i in range(0, 8, 2):
            b.append(shuffle(a[i], a[i + 1], [0, 8, 1, 9, 4, 12, 5, 13]))
            b.append(shuffle(a[i], a[i + 1], [2, 10, 3, 11, 6, 14, 7, 15]))
        a = []
        for i in (0, 1, 4, 5):
            a.append(shuffle(b[i], b[i + 2], [0, 1, 8, 9, 4, 5, 12, 13]))
            a.append(shuffle(b[i], b[i + 2], [2, 3, 10, 11, 6, 7, 14, 15]))
        low = [shuffle(a[i], a[i + 4], [0, 1, 2, 3, 8, 9, 10, 11]) for i in range(4)]
        high = [shuffle(a[i], a[i + 4], [4, 5, 6, 7, 12, 13, 14, 15]) for i in range(4)]
        for i, values in enumerate(low + high):
            builder.store(values, run(to, to_value, to_start, to_step, i)).align = size
        return context.get_dummy_value()

    index = types.intp
    return types.void(source, index, index, to, index, index), generate


@intrinsic
def _fetch_line(typing_context, array, index):
    """Ask for the cache line of array[index]; beyond the end of the array that does no harm."""

    def generate(context, builder, signature, arguments):
        byte, number = ir.IntType(8), ir.IntType(32)
        line = _place(context, builder, array, *arguments, byte)
        function_type = ir.FunctionType(ir.VoidType(), [line.type, number, number, number])
        prefetch = builder.module.declare_intrinsic("llvm.prefetch", [line.type], function_type)
        read, second_level, data = (ir.Constant(number, i) for i in (0, 2, 1))
        builder.call(prefetch, [line, read, second_level, data])
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


@intrinsic
def _stream_line(typing_context, to, to_index, source, source_index):
    """Copy one cache line past the caches; that of `to` starts at to[to_index]."""

    def generate(context, builder, signature, arguments):
        to_value, to_index, source_value, source_index = arguments
        line = ir.VectorType(ir.IntType(32), LINE // 4)
        values = builder.load(_place(context, builder, source, source_value, source_index, line))
        values.align = 1
        store = builder.store(values, _place(context, builder, to, to_value, to_index, line))
        store.align = LINE
        one = builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)])
        store.set_metadata("nontemporal", one)
        return context.get_dummy_value()

    return types.void(to, types.intp, source, types.intp), generate


def _sse(builder, name, arguments=()):
    """Call one of the instructions that only x86 has; elsewhere do nothing."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        function_type = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
        name = f"llvm.x86.sse.{name}"
        function = cgutils.get_or_insert_function(builder.module, function_type, name)
        builder.call(function, arguments)


@intrinsic
def _load_index(typing_context, data, kind, index):
    """Integer number index of bytes whose type is INTEGERS[kind]; what int64 lacks, as its last."""

    def generate(context, builder, signature, arguments):
        data_value, kind, index = arguments
        wide = ir.IntType(64)
        done = builder.append_basic_block()
        loads = []
        for name in INTEGERS:
            dtype = np.dtype(name)
            block = builder.append_basic_block()
            with builder.goto_block(block):
                narrow = ir.IntType(8 * dtype.itemsize)
                offset = builder.mul(index, ir.Constant(wide, dtype.itemsize))
                value = builder.load(_place(context, builder, data, data_value, offset, narrow))
                if dtype.itemsize < 8:
                    value = (builder.sext if dtype.kind == "i" else builder.zext)(value, wide)
                elif dtype.kind == "u":
                    last = ir.Constant(wide, np.iinfo(np.int64).max)
                    fits = builder.icmp_signed(">=", value, ir.Constant(wide, 0))
                    value = builder.select(fits, value, last)
                builder.branch(done)
            loads.append((value, block))
        switch = builder.switch(kind, loads[-1][1])
        for number, (_, block) in enumerate(loads[:-1]):
            switch.add_case(ir.Constant(kind.type, number), block)
        builder.position_at_end(done)
        result = builder.phi(wide)
        for value, block in loads:
            result.add_incoming(value, block)
        return result

    return types.int64(data, types.intp, types.intp), generate


@intrinsic
def _call(typing_context, address, arguments, units, thread, threads):
    """Call a compiled share. By its address: linked in, it would be compiled three more times.

    Numba passes a tuple as its elements, so that it may be taken apart before, as prange wants it.
    """

    def generate(context, builder, signature, values):
        address, packed, units, thread, threads = values
        unpacked = cgutils.unpack_tuple(builder, packed)
        share_types = (*arguments.types, types.intp, types.intp, types.intp)
        share_type = context.call_conv.get_function_type(types.none, share_types)
        share = builder.inttoptr(address, share_type.as_pointer())
        context.call_conv.call_function(
            builder, share, types.none, share_types, [*unpacked, units, thread, threads]
        )
        return context.get_dummy_value()

    signature = types.void(types.intp, arguments, types.intp, types.intp, types.intp)
    return signature, generate


@intrinsic
def _convert_half(typing_context, number):
    """From the bits of a float16 to float32, or back: one instruction where _HAS_F16C."""
    to_float = isinstance(number, types.Integer)

    def generate(context, builder, signature, arguments):
        (value,) = arguments
        half, real = ir.HalfType(), ir.FloatType()
        if to_float:
            return builder.fpext(builder.bitcast(value, half), real)
        return builder.bitcast(builder.fptrunc(value, half), ir.IntType(16))

    return types.float32(types.uint16) if to_float else types.uint16(types.float32), generate


@intrinsic
def _end_stream(typing_context):
    """What was streamed is there for other threads to see."""

    def generate(context, builder, signature, arguments):
        _sse(builder, "sfence")
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def _set_float_mode(typing_context, mode):
    """Set how this thread rounds and whether it flushes denormals; return how it was."""

    def generate(context, builder, signature, arguments):
        before = cgutils.alloca_once_value(builder, arguments[0])
        after = cgutils.alloca_once_value(builder, arguments[0])
        byte = ir.IntType(8).as_pointer()
        _sse(builder, "stmxcsr", [builder.bitcast(before, byte)])
        _sse(builder, "ldmxcsr", [builder.bitcast(after, byte)])
        return builder.load(before)

    return types.uint32(types.uint32), generate


# ---------------------------------------------------------------------------------------------
# Numbers
# ---------------------------------------------------------------------------------------------
# exp(x) is 2**n exp(r), n the integer nearest to x / ln 2.  What is kept of a class is the
# exponential 2**(n - N + shift) exp(r) = 2**shift exp(x) / 2**N, N being the n of the row's
# maximum: a power of two as the reference costs nothing and rounds nothing, where x - maximum
# would round.  The shift, 32 or 64, keeps what may still come out as a subnormal result a normal
# number.  Rows whose maximum is large use x - maximum, which is exact there for all classes that
# are not negligible.


@_inline
def _tiny_of(numbers):
    """The smallest normal number of an array's type."""
    return 1.1754943508222875e-38 if numbers.itemsize == 4 else 2.2250738585072014e-308


@_inline
def _huge_of(numbers):
    """So far from the end of the range that it takes nothing above the largest number there."""
    return 2.0**100 if numbers.itemsize == 4 else 2.0**970


@_inline
def _power_of(numbers):
    """What takes an exponential back to what it stands for: 2**-shift."""
    return numbers.dtype.type(2.0**-32 if numbers.itemsize == 4 else 2.0**-64)


@_typed
def _pivot_of(maximum):
    """What is taken off x: 0, or the maximum where that is large (or inf: then all is NaN)."""
    limit, zero = (np.float32(256), np.float32(0)) if maximum == types.float32 else (2048.0, 0.0)
    return lambda maximum: zero if abs(maximum) < limit else maximum


@_typed
def _magic_of(maximum):
    """A number to which x / ln 2 is added: that rounds it, and leaves n - N in the low bits.

    Not fused: whatever the compiler makes of the caller, all callers must come to the same N.
    """

    def magic_of_32(maximum):
        x = maximum if _pivot_of(maximum) == np.float32(0) else np.float32(0)
        # Adding 1.5 * 2**23 rounds to an integer.
        shifted = x * np.float32(1.44269504) + np.float32(12582912.0)
        return np.float32(12582912.0 + 127 + 32) - (shifted - np.float32(12582912.0))

    def magic_of_64(maximum):
        x = maximum if _pivot_of(maximum) == 0.0 else 0.0
        shifted = x * 1.4426950408889634 + 6755399441055744.0  # 1.5 * 2**52
        return (6755399441055744.0 + 1023 + 64) - (shifted - 6755399441055744.0)

    return magic_of_32 if maximum == types.float32 else magic_of_64


@_typed
def _lowest_of(magic):
    """The x whose n - N is the exponent of 0."""
    if magic == types.float32:
        return lambda magic: (np.float32(12582912.0) - magic) * np.float32(0.693147181)
    return lambda magic: (6755399441055744.0 - magic) * 0.69314718055994531


@_typed_fused
def _exponential(x, pivot, magic, lowest):
    """2**(shift - N) * exp(x - pivot); 0 where that is negligible; NaN for NaN."""
    return _exponential_32 if x == types.float32 else _exponential_64


def _exponential_32(x, pivot, magic, lowest):
    d = x - pivot
    d = lowest if d < lowest else d
    shifted = d * np.float32(1.44269504) + magic
    n = shifted - magic
    r = n * np.float32(-0.693145751953125) + d
    r = n * np.float32(-1.42860682e-6) + r
    p = np.float32(0.00131687098951) * r + np.float32(0.00835358145597)
    p = p * r + np.float32(0.0416763574161)
    p = p * r + np.float32(0.166667094605)
    p = p * r + np.float32(0.499999918849)
    p = p * r + np.float32(1.0)
    p = p * r + np.float32(1.0)
    # A product, not a sum of exponents: NaN stays NaN.
    return p * np.uint32(np.float32(shifted).view(np.uint32) << np.uint32(23)).view(np.float32)


def _exponential_64(x, pivot, magic, lowest):
    d = x - pivot
    d = lowest if d < lowest else d
    shifted = d * 1.4426950408889634 + magic
    n = shifted - magic
    r = n * -6.93147180369123816490e-01 + d
    r = n * -1.90821492927058770002e-10 + r
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
    return p * np.uint64(np.float64(shifted).view(np.uint64) << np.uint64(52)).view(np.float64)


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
    # What 1 + x rounded off, over u; it matters where u is near 1.
    rest = lost - lost * f if u < 1.4 else 0.0
    log_z = half - (s * (half + t1 + t2) + (e * 1.90821492927058770002e-10 + rest))
    result = e * 6.93147180369123816490e-01 - (log_z - f)
    return result if x <= 1.7976931348623157e308 else x  # inf and NaN pass through


@_inline
def _half_to_float(h):
    if _HAS_F16C:
        return _convert_half(h)
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
    if _HAS_F16C:
        return _convert_half(x)
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
# Memory: between arrays of any storage and scratch in the compute type
# ---------------------------------------------------------------------------------------------


@_typed
def _load(x, start, n, buffer, storage):
    """Elements start to start + n in the compute type: as they lie, or converted into buffer."""
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


@_typed
def _load_one(x, index, storage):
    if x.dtype != types.uint16:
        return lambda x, index, storage: x[index]

    def load_half(x, index, storage):
        h = x[index]
        return _half_to_float(h) if storage == FLOAT16 else _bfloat_to_float(h)

    return load_half


@_typed
def _load_into(to, x, start, storage):
    """Copy elements of x from start on, converted."""
    if x.dtype == types.uint16:
        return lambda to, x, start, storage: _load_halves(x[start : start + to.size], to, storage)
    return lambda to, x, start, storage: _copy(to, x[start : start + to.size])


@_inline
def _fetch(x, start, n):
    """Ask for elements start to start + n, ahead of their use."""
    for i in range(start, start + n, LINE // x.itemsize):
        _fetch_line(x, i)


@_typed
def _store(out, start, values, storage, stream):
    """Write out[start : start + values.size]."""
    if out.dtype == types.uint16:
        return _store_halves
    return lambda out, start, values, storage, stream: _copy_out(out, start, values, stream)


@_inline
def _copy_out(out, start, values, stream):
    n = values.size
    line = LINE // out.itemsize
    if stream and n >= 2 * line:
        head = -((out.ctypes.data // out.itemsize) + start) % line
        _copy(out[start : start + head], values[:head])
        lines = (n - head) // line
        for i in range(lines):
            _stream_line(out, start + head + i * line, values, head + i * line)
        done = head + lines * line
        _copy(out[start + done : start + n], values[done:])
    else:
        _copy(out[start : start + n], values)


@_typed
def _store_run(out, start, values, storage, stream, carry, r, slot):
    """As _store, of at most LANES numbers that a later run may go on from.

    With stream in whole cache lines, since half a line would first be read from memory: the end of
    a run that does not fill its line waits in `carry` for the next, which begins at r[slot].
    """
    if values.dtype == types.uint16:
        return lambda out, start, values, storage, stream, carry, r, slot: _copy_out(
            out, start, values, stream
        )
    if out.dtype == types.uint16:
        return lambda out, start, values, storage, stream, carry, r, slot: _store(
            out, start, values, storage, stream
        )
    return lambda out, start, values, storage, stream, carry, r, slot: (
        _stream_run(out, start, values, carry, r, slot)
        if stream
        else _copy(out[start : start + values.size], values)
    )


@_inline
def _stream_run(out, start, values, carry, r, slot):
    n = values.size
    line = LINE // out.itemsize
    filled = (out.ctypes.data // out.itemsize + start) % line
    head = min(-filled % line, n)
    if r[slot] == start:
        if filled:
            _copy(carry[filled : filled + head], values[:head])
            if filled + head < line:
                r[slot] = start + head
                return
            _stream_line(out, start - filled, carry, 0)
    else:
        _flush(out, carry, r, slot)
        _copy(out[start : start + head], values[:head])
        if (filled + head) % line:
            return
    done = head
    while n - done >= line:
        _stream_line(out, start + done, values, done)
        done += line
    _copy(carry[: n - done], values[done:])
    r[slot] = start + n


@_inline
def _flush(out, carry, r, slot):
    if r[slot] >= 0:
        end = int(r[slot])
        filled = (out.ctypes.data // out.itemsize + end) % (LINE // out.itemsize)
        _copy(out[end - filled : end], carry[:filled])
        r[slot] = -1.0


@_inline
def _copy(to, values):
    for i in range(to.size):
        to[i] = values[i]


def _store_halves(out, start, values, storage, stream):
    halves = _lanes(out)
    # To the next cache line, then whole lines: others would be read before they are written.
    to_line = -(out.ctypes.data // out.itemsize + start) % (LINE // out.itemsize)
    n = min(to_line if to_line else LANES, values.size)
    first = 0
    while first < values.size:
        part = values[first : first + n]
        if storage == FLOAT16:
            for i in range(n):
                halves[i] = _float_to_half(part[i])
        else:
            for i in range(n):
                halves[i] = _float_to_bfloat(part[i])
        _copy_out(out, start + first, halves[:n], stream)
        first += n
        n = min(LANES, values.size - first)


# ---------------------------------------------------------------------------------------------
# Blocks: runs of at most BLOCK elements, taken in chunks
# ---------------------------------------------------------------------------------------------


@_inline
def _pad(x, skip, chunk):
    """The elements of x in a chunk, -inf behind them and at skip."""
    for j in range(CHUNK):
        chunk[j] = -np.inf
    for j in range(min(x.size, CHUNK)):
        chunk[j] = x[j]
    if 0 <= skip < CHUNK:
        chunk[skip] = -np.inf


@_typed
def _largest_lane(lane):
    """The maximum of a chunk without NaN."""
    # b ^ ((b >> 31) & 0x7fffffff) orders the bits of floats as integers, and is its own inverse:
    # the maximum of integers vectorises, that of floats does not.
    wide = lane.dtype == types.float64
    integer, real = (np.int64, np.float64) if wide else (np.int32, np.float32)
    shift = integer(63 if wide else 31)
    mask = integer(np.iinfo(integer).max)
    lowest = integer(np.iinfo(integer).min)

    def largest_lane(lane):
        bits = lane.view(integer)
        m = lowest
        for i in range(CHUNK):
            b = bits[i]
            m = max(m, b ^ ((b >> shift) & mask))
        return integer(m ^ ((m >> shift) & mask)).view(real)

    return largest_lane


@_inline
def _largest(x):
    """The maximum, NaN left aside."""
    lane = _lanes(x)
    for j in range(CHUNK):
        lane[j] = -np.inf
    whole = x.size // CHUNK * CHUNK
    for i in range(0, whole, CHUNK):
        part = x[i : i + CHUNK]
        for j in range(CHUNK):
            lane[j] = part[j] if part[j] > lane[j] else lane[j]
    if whole < x.size:
        rest = _lanes(x)
        _pad(x[whole:], -1, rest)
        for j in range(CHUNK):
            lane[j] = rest[j] if rest[j] > lane[j] else lane[j]
    return _largest_lane(lane)


@_inline
def _find(x, value):
    """The first position of value, or the size of x."""
    for start in range(0, x.size, LANES):
        part = x[start : min(start + LANES, x.size)]
        hits = 0
        for j in range(part.size):
            hits += part[j] == value
        if hits:
            for j in range(part.size):
                if part[j] == value:
                    return start + j
    return x.size


@_inline
def _holds_nan(x, step, n):
    count = 0
    for j in range(n):
        count += x[j * step] != x[j * step]
    return count > 0


@_summing
def _fold(lane):
    """The sum of a chunk, in float64."""
    total = 0.0
    for j in range(CHUNK):
        total += np.float64(lane[j])
    return total


@_inline
def _exp_block(x, skip, pivot, magic, e, later, start):
    """The sum of the exponentials e, that at skip being 0; e has room for whole chunks.

    Meanwhile the array `later` is fetched from index start on.
    """
    lowest = _lowest_of(magic)
    lane = _lanes(e)
    value = _lanes(e)
    rest = _lanes(e)
    holed = _lanes(e)
    whole = x.size // CHUNK
    hole = -1
    if whole * CHUNK < x.size:
        _pad(x[whole * CHUNK :], -1, rest)
    if 0 <= skip < x.size:
        hole = skip // CHUNK
        _pad(x[hole * CHUNK :], skip % CHUNK, holed)
    for j in range(CHUNK):
        lane[j] = 0
    for chunk in range((x.size + CHUNK - 1) // CHUNK):
        i = chunk * CHUNK
        _fetch(later, start + i, CHUNK)
        if chunk == hole:
            for j in range(CHUNK):
                value[j] = _exponential(holed[j], pivot, magic, lowest)
        elif chunk == whole:
            for j in range(CHUNK):
                value[j] = _exponential(rest[j], pivot, magic, lowest)
        else:
            source = x[i : i + CHUNK]
            for j in range(CHUNK):
                value[j] = _exponential(source[j], pivot, magic, lowest)
        target = e[i : i + CHUNK]
        for j in range(CHUNK):
            lane[j] += value[j]
        for j in range(CHUNK):
            target[j] = value[j]
    return _fold(lane)


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
def _far_sum(g, p, step, n, log_probs):
    """FAR_UNIT times the sum of g, or without log_probs of g p: what overflows elsewhere."""
    total = 0.0
    for start in range(0, n, CHUNK):
        part = 0.0
        for i in range(start, min(start + CHUNK, n)):
            factor = 1.0 if log_probs else np.float64(p[i * step])
            part += FAR_UNIT * np.float64(g[i * step]) * factor
        total += part
    return total


@_inline
def _times(weight, value):
    """weight * value, where 0 * inf counts as 0, and -0 as +0."""
    return abs(weight) if weight == 0 else weight * value


@_summing
def _gap(x, weight, m):
    """sum of w_c (m - x_c), w_c relative; in float64 where it leaves the range of x."""
    narrow = x.dtype.type(0)
    if weight.size:
        for i in range(x.size):
            narrow += _times(weight[i], m - x[i])
    else:
        for i in range(x.size):
            narrow += m - x[i]
    if narrow - narrow == 0:
        return np.float64(narrow)
    total = 0.0
    for i in range(x.size):
        w = np.float64(weight[i]) if weight.size else 1.0
        total += _times(w, np.float64(m) - np.float64(x[i]))
    return total


@_summing
def _soft_mass(t, weight, keep, uniform):
    """sum of w_c t_c, w_c relative"""
    total = t.dtype.type(0)
    if weight.size:
        for i in range(t.size):
            total += weight[i] * (keep * t[i] + uniform)
    else:
        for i in range(t.size):
            total += keep * t[i] + uniform
    return np.float64(total)


@_summing
def _soft_gap(x, t, weight, keep, uniform, m):
    """sum of w_c t_c (m - x_c), w_c relative; in float64 where it leaves the range of x"""
    narrow = x.dtype.type(0)
    if weight.size:
        for i in range(x.size):
            narrow += _times(weight[i] * (keep * t[i] + uniform), m - x[i])
    else:
        for i in range(x.size):
            narrow += _times(keep * t[i] + uniform, m - x[i])
    if narrow - narrow == 0:
        return np.float64(narrow)
    total = 0.0
    for i in range(x.size):
        wt = np.float64(keep * t[i] + uniform) * (weight[i] if weight.size else 1.0)
        total += _times(wt, np.float64(m) - np.float64(x[i]))
    return total


@_inline
def _scale(e, f):
    for i in range(e.size):
        e[i] *= f


@_inline
def _narrow_factor(e, factor):
    """The factor on e in the compute type; where it is too small for that, on 2**-shift e."""
    real = e.dtype.type
    narrow = factor * np.float64(_power_of(e))
    if factor != 0.0 and abs(narrow) < _tiny_of(e):
        _scale(e, _power_of(e))
        narrow = factor
    return real(narrow)


@_inline
def _shrink_for(total, unit, numbers):
    """A power of two for exponentials, so that total * unit over it is normal; mostly 1."""
    # That product may be subnormal, and is slow then; so is a quotient of a subnormal number.
    small = abs(total) < _tiny_of(numbers) / unit
    return np.float64(_power_of(numbers) if small else 1)


@_inline
def _scale_and_spread(e, f, spread, weight):
    u = e.dtype.type(spread)
    if weight.size:
        for i in range(e.size):
            e[i] = e[i] * f - u * weight[i]
    else:
        for i in range(e.size):
            e[i] = e[i] * f - u


@_inline
def _scale_and_subtract(e, f, spread, weight, t, keep, uniform):
    on_target, on_all = e.dtype.type(spread * keep), e.dtype.type(spread * uniform)
    if weight.size:
        for i in range(e.size):
            e[i] = e[i] * f - weight[i] * (on_target * t[i] + on_all)
    else:
        for i in range(e.size):
            e[i] = e[i] * f - (on_target * t[i] + on_all)


# ---------------------------------------------------------------------------------------------
# The scalar step: from what a row was reduced to, its loss and the coefficients of its gradient
# ---------------------------------------------------------------------------------------------
# Loops over the fields of one array, whose distances LLVM knows: they vectorise.


@_inline
def _add_exponentials(r, n, like):
    """The exponentials of the maximum and of the target, in the units of the sum."""
    real = like.dtype.type
    for i in range(n):
        m = real(r[MAXIMUM + i])
        pivot, magic = _pivot_of(m), _magic_of(m)
        r[TOP + i] = _exponential(m, pivot, magic, _lowest_of(magic))
        r[TARGET_EXP + i] = _exponential(real(r[TARGET_LOGIT + i]), pivot, magic, _lowest_of(magic))


@_inline
def _cross_entropy_step(r, n, num_classes, smoothing, z_loss, scale, weight_sum, like):
    power = np.float64(_power_of(like))
    uniform = smoothing / num_classes
    spread = uniform * weight_sum
    for i in range(n):
        row_weight = r[ROW_WEIGHT + i]
        others = r[OTHERS + i]
        b = (1.0 - smoothing) * r[TARGET_WEIGHT + i]
        d = r[TARGET_LOGIT + i] - r[MAXIMUM + i]
        total = others + r[TARGET_EXP + i]
        inverse = 1.0 / total
        log_s = _log1p((others + (r[TARGET_EXP + i] - r[TOP + i])) / r[TOP + i])
        lse = r[MAXIMUM + i] + log_s
        z_slope = 2.0 * z_loss * lse
        loss = _times(b, log_s - d) + spread * log_s + uniform * r[GAP + i] + 0.5 * z_slope * lse
        r[LOSS + i] = _times(row_weight, loss)

        a = b + spread + z_slope
        spread_y = uniform * r[TARGET_WEIGHT + i]
        left_out = _left_out(
            a, r[TARGET_EXP + i] * inverse, others * inverse, b + spread_y,
            spread + z_slope - spread_y,
        )  # fmt: skip
        weight = row_weight * scale
        r[FACTOR + i] = _times(weight, a * (inverse / power))
        r[SPREAD + i] = weight * uniform
        r[LEFT_OUT + i] = _times(weight, left_out)


@_inline
def _left_out(a, p, others, subtracted, rest):
    """a p - subtracted, or the same as rest - a (1 - p): the second unless it cancels more."""
    cancels = 2.0 * _larger(a * p, subtracted) < _larger(a * others, rest)
    return a * p - subtracted if cancels else rest - a * others


@_inline
def _larger(a, b):
    return abs(a) if abs(a) > abs(b) else abs(b)


@_inline
def _cross_entropy_soft_step(r, n, z_loss, scale, like):
    power = np.float64(_power_of(like))
    for i in range(n):
        row_weight = r[ROW_WEIGHT + i]
        others = r[OTHERS + i]
        mass = r[MASS + i] + r[TOP_MASS + i]
        log_s = _log1p(others / r[TOP + i])
        lse = r[MAXIMUM + i] + log_s
        z_slope = 2.0 * z_loss * lse
        loss = mass * log_s + r[GAP + i] + 0.5 * z_slope * lse
        r[LOSS + i] = _times(row_weight, loss)

        inverse = 1.0 / (others + r[TOP + i])
        a = mass + z_slope
        left_out = _left_out(
            a, r[TOP + i] * inverse, others * inverse, r[TOP_MASS + i], r[MASS + i] + z_slope
        )
        weight = row_weight * scale
        r[FACTOR + i] = _times(weight, a * (inverse / power))
        r[SPREAD + i] = weight
        r[LEFT_OUT + i] = _times(weight, left_out)


@_inline
def _read_indices(target, first, n, y):
    """Targets first to first + n as int64, whatever they are: one type of argument for all."""
    data, kind = target
    for i in range(n):
        y[i] = _load_index(data, kind, first + i)


@_inline
def _read_targets(
    r, target, weight, sample_weight, first, n, num_classes, ignore_index, smoothing, z_loss,
    largest,
):  # fmt: skip
    """Targets, and the weights of their rows: 0 where a row counts for nothing."""
    smooth = z_loss != 0.0 or (smoothing != 0.0 and largest != 0.0)
    y = _lanes(np.int64)
    _read_indices(target, first, n, y)
    for i in range(n):
        # Targets were checked, but another thread may have changed them since.
        used = (y[i] != ignore_index) & (y[i] >= 0) & (y[i] < num_classes)
        r[INDEX + i] = y[i] if used else 0
        r[ROW_WEIGHT + i] = 1.0 if used else 0.0
        r[TARGET_WEIGHT + i] = 1.0
    if sample_weight.size:
        for i in range(n):
            r[ROW_WEIGHT + i] *= sample_weight[first + i]
    if weight.size:
        for i in range(n):
            r[TARGET_WEIGHT + i] = weight[int(r[INDEX + i])]
    if not smooth:
        for i in range(n):
            if (1.0 - smoothing) * r[TARGET_WEIGHT + i] == 0.0:
                r[ROW_WEIGHT + i] = 0.0


@_inline
def _read_sample_weights(r, sample_weight, n):
    for i in range(n):
        r[ROW_WEIGHT + i] = sample_weight[i] if sample_weight.size else 1.0


@_summing
def _deliver_losses(r, n, losses, first, like):
    """Round row losses to the compute type, hand them out; return the sum of what was."""
    real = like.dtype.type
    for i in range(n):
        r[LOSS + i] = np.float64(real(r[LOSS + i]))
    for i in range(n, LANES):
        r[LOSS + i] = 0.0
    if losses.size:
        for i in range(n):
            losses[first + i] = r[LOSS + i]
    total = 0.0
    for i in range(LANES):
        total += r[LOSS + i]
    return total


# ---------------------------------------------------------------------------------------------
# Rows: classes in the SIMD lanes
# ---------------------------------------------------------------------------------------------
# A unit is a group of rows, so that the scalar step has something to vectorise, and what is
# written is a long run.  Each stage goes over all rows of the group before the next: rows overlap
# in the processor, stages of one row cannot.  Rows begin `step` numbers apart.  Scratch: two
# blocks, and the group's rows with room for a last chunk.


@_inline
def _row_scratch(scratch):
    return scratch[:BLOCK], scratch[BLOCK : 2 * BLOCK], scratch[2 * BLOCK :]


@_inline
def _store_rows(out, first, kept, n, num_classes, step, storage, stream):
    size = n * num_classes if step == num_classes else num_classes
    for start in range(0, n * num_classes, size):
        row = first + start // num_classes
        _store(out, row * step, kept[start : start + size], storage, stream)


@_spliced
def _largest_of_rows(x, first, n, num_classes, step, r, buffer, storage):
    for i in range(n):
        start = (first + i) * step
        m = buffer.dtype.type(-np.inf)
        for c in range(0, num_classes, BLOCK):
            block = _load(x, start + c, min(BLOCK, num_classes - c), buffer, storage)
            block_m = _largest(block)
            m = block_m if block_m > m else m
        r[MAXIMUM + i] = m


@_inline
def _find_in_row(x, start, num_classes, value, buffer, storage):
    """The first class whose score is value, or 0."""
    for c in range(0, num_classes, BLOCK):
        n = min(BLOCK, num_classes - c)
        i = _find(_load(x, start + c, n, buffer, storage), value)
        if i < n:
            return c + i
    return 0


@_inline
def _row_holds_nan(x, start, num_classes, buffer, storage):
    for c in range(0, num_classes, BLOCK):
        n = min(BLOCK, num_classes - c)
        if _holds_nan(_load(x, start + c, n, buffer, storage), 1, n):
            return True
    return False


@_spliced
def _exp_row(x, start, num_classes, skip, maximum, keep, kept, buffer, line, ahead, storage):
    """The sum of the exponentials without class `skip`; if keep, kept receives them all.

    Meanwhile what comes `ahead` elements later is fetched, so that memory is never idle.
    """
    m = buffer.dtype.type(maximum)
    pivot, magic = _pivot_of(m), _magic_of(m)
    total = 0.0
    for c in range(0, num_classes, BLOCK):
        n = min(BLOCK, num_classes - c)
        block = _load(x, start + c, n, buffer, storage)
        e = kept[c:] if keep else line
        total += _exp_block(block, skip - c, pivot, magic, e, x, start + c + ahead)
    return total


@_spliced
def _write_row(e, r, i, index, weight, largest, soft, start, keep, uniform, buffer, soft_storage):
    """From exponentials to the gradient: factor * e_c - spread * w_c t_c, left_out at index."""
    if r[ROW_WEIGHT + i] == 0.0:
        for c in range(e.size):
            e[c] = 0
        return
    spread = r[SPREAD + i] * largest
    f = _narrow_factor(e, r[FACTOR + i])
    if soft is not None:
        for c in range(0, e.size, BLOCK):
            n = min(BLOCK, e.size - c)
            t = _load(soft, start + c, n, buffer, soft_storage)
            _scale_and_subtract(e[c : c + n], f, spread, weight[c : c + n], t, keep, uniform)
    elif spread != 0.0:
        _scale_and_spread(e, f, spread, weight)
    else:
        _scale(e, f)
    e[index] = r[LEFT_OUT + i]


@_inline
def _softmax_rows(x, out, r, scratch, first, n, num_classes, step, storage, stream):
    buffer, line, kept = _row_scratch(scratch)
    ahead = min(n * step, FAR)
    _largest_of_rows(x, first, n, num_classes, step, r, buffer, storage)
    for i in range(n):
        r[OTHERS + i] = _exp_row(
            x, (first + i) * step, num_classes, -1, r[MAXIMUM + i], True,
            kept[i * num_classes :], buffer, line, ahead, storage,
        )  # fmt: skip
    for i in range(n):
        e = kept[i * num_classes : (i + 1) * num_classes]
        _scale(e, _narrow_factor(e, 1.0 / (r[OTHERS + i] * np.float64(_power_of(e)))))
    _store_rows(out, first, kept, n, num_classes, step, storage, stream)


@_inline
def _log_softmax_rows(x, out, r, scratch, first, n, num_classes, step, storage, stream, log_probs):
    """log_softmax; without log_probs only what logsumexp needs."""
    buffer, line, kept = _row_scratch(scratch)
    real = scratch.dtype.type
    ahead = min(n * step, FAR)
    _largest_of_rows(x, first, n, num_classes, step, r, buffer, storage)
    for i in range(n):
        start = (first + i) * step
        m = real(r[MAXIMUM + i])
        index = _find_in_row(x, start, num_classes, m, buffer, storage)
        r[TARGET_LOGIT + i] = m
        r[OTHERS + i] = _exp_row(
            x, start, num_classes, index, m, False, kept, buffer, line, ahead, storage
        )
    _add_exponentials(r, n, scratch)
    for i in range(n):
        r[LOSS + i] = _log1p(r[OTHERS + i] / r[TOP + i])
    if not log_probs:
        for i in range(n):
            # Nothing but -inf, or a +inf: the maximum is all there is to the sum.
            if not math.isfinite(r[MAXIMUM + i]) and not _row_holds_nan(
                x, (first + i) * step, num_classes, buffer, storage
            ):
                r[LOSS + i] = 0.0
        return
    for i in range(n):
        m, log_s = real(r[MAXIMUM + i]), real(r[LOSS + i])
        for c in range(0, num_classes, BLOCK):
            width = min(BLOCK, num_classes - c)
            block = _load(x, (first + i) * step + c, width, buffer, storage)
            start = i * num_classes + c
            _shift(block, m, log_s, kept[start : start + width])
    _store_rows(out, first, kept, n, num_classes, step, storage, stream)


@_inline
def _shift(x, m, log_s, result):
    for i in range(result.size):
        result[i] = (x[i] - m) - log_s


@_spliced
def _reduce_rows(
    x, r, scratch, first, n, num_classes, step, weight, largest, soft, keep, uniform,
    keep_exponentials, storage, soft_storage,
):  # fmt: skip
    """The first stage of cross-entropy: of soft targets unless they are None, else of indices."""
    buffer, line, kept = _row_scratch(scratch)
    ahead = min(n * step, FAR)
    _largest_of_rows(x, first, n, num_classes, step, r, buffer, storage)
    for i in range(n):
        start = (first + i) * step
        r[GAP + i] = 0.0
        r[TARGET_LOGIT + i] = 0.0
        r[OTHERS + i] = 0.0
        r[MASS + i] = 0.0
        r[TOP_MASS + i] = 0.0
        if r[ROW_WEIGHT + i] == 0.0:
            r[MAXIMUM + i] = 0.0
            r[INDEX + i] = 0.0
            continue
        m = buffer.dtype.type(r[MAXIMUM + i])
        if soft is not None:
            index = _find_in_row(x, start, num_classes, m, buffer, storage)
            r[INDEX + i] = index
            r[GAP + i], r[MASS + i], r[TOP_MASS + i] = _soft_sums(
                x, start, soft, num_classes, weight, largest, keep, uniform, m, index, buffer, line,
                storage, soft_storage,
            )  # fmt: skip
        elif uniform != 0.0:
            for c in range(0, num_classes, BLOCK):
                width = min(BLOCK, num_classes - c)
                block = _load(x, start + c, width, buffer, storage)
                r[GAP + i] += largest * _gap(block, weight[c : c + width], m)
        index = int(r[INDEX + i])
        r[TARGET_LOGIT + i] = _load_one(x, start + index, storage)
        r[OTHERS + i] = _exp_row(
            x, start, num_classes, index, m, keep_exponentials, kept[i * num_classes :], buffer,
            line, ahead, storage,
        )  # fmt: skip
    _add_exponentials(r, n, scratch)


@_inline
def _soft_sums(
    x, start, soft, num_classes, weight, largest, keep, uniform, maximum, index, buffer, line,
    storage, soft_storage,
):  # fmt: skip
    """sum of w t (m - x); sum of w t without the maximum's class; w t of that class."""
    gap = mass = top = 0.0
    keep, uniform = buffer.dtype.type(keep), buffer.dtype.type(uniform)
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
    return largest * gap, largest * mass, largest * top


@_spliced
def _write_rows(
    out, r, scratch, first, n, num_classes, step, weight, largest, soft, keep, uniform, storage,
    soft_storage, stream,
):  # fmt: skip
    buffer, _, kept = _row_scratch(scratch)
    for i in range(n):
        _write_row(
            kept[i * num_classes : (i + 1) * num_classes], r, i, int(r[INDEX + i]), weight, largest,
            soft, (first + i) * step, keep, uniform, buffer, soft_storage,
        )  # fmt: skip
    _store_rows(out, first, kept, n, num_classes, step, storage, stream)


# ---------------------------------------------------------------------------------------------
# Tiles: samples in the SIMD lanes
# ---------------------------------------------------------------------------------------------
# A tile is LANES samples that follow each other in (outer, inner) order, held in scratch as
# [class][lane]; lanes without a sample hold zeros.  A unit is one tile, or, where samples lie next
# to each other in memory, several side by side, `step` numbers from a class to the next, so that
# runs of memory are longer.  Scratch: room for samples one after the other, as rows, then the
# unit's tiles, twice; transposing moves eight by eight, and may go seven beyond either.  Then the
# carries, for runs of output that begin and end within a cache line.


@_inline
def _tile_scratch(scratch, num_classes, step):
    rows = (num_classes + 1) * LANES
    tile = (num_classes + 8) * step
    return scratch[:rows], scratch[rows : rows + tile], scratch[rows + tile : rows + 2 * tile]


@_inline
def _tile_numbers(num_classes, step):
    """What a unit of tiles needs of scratch."""
    return (num_classes + 1) * LANES + 2 * (num_classes + 8) * step


@_inline
def _transpose_rows(rows, tile, num_classes):
    for lane in range(0, LANES, 8):
        for c in range(0, num_classes, 8):
            _transpose(rows, lane * num_classes + c, num_classes, tile, c * LANES + lane, LANES)


@_inline
def _load_tiles(x, tile, buffer, first, n, num_classes, inner, step, storage):
    if inner == 1:
        start = first * num_classes
        size = LANES * num_classes
        if n == LANES and start + size + 8 <= x.size:
            rows = _load(x, start, size + 8, buffer, storage)
            _transpose_rows(rows, tile, num_classes)
        else:  # transposing must not read beyond the array
            _copy(buffer[: n * num_classes], _load(x, start, n * num_classes, buffer, storage))
            buffer[n * num_classes :] = 0
            _transpose_rows(buffer, tile, num_classes)
        return
    if n % LANES:
        tile[: num_classes * step] = 0
    lane = 0
    while lane < n:
        o, i = divmod(first + lane, inner)
        width = min(n - lane, inner - i)
        for c in range(num_classes):
            start = (o * num_classes + c) * inner + i
            _load_into(tile[c * step + lane : c * step + lane + width], x, start, storage)
        lane += width


@_spliced
def _store_tiles(out, tile, scratch, r, first, n, num_classes, inner, step, storage, stream):
    buffer = scratch[: (num_classes + 1) * LANES]
    if inner == 1:
        # From the last classes to the first: what goes beyond a row is written over by the next.
        for lane in range(0, LANES, 8):
            for c in range((num_classes - 1) // 8 * 8, -1, -8):
                place = lane * num_classes + c
                _transpose(tile, c * LANES + lane, LANES, buffer, place, num_classes)
        _store(out, first * num_classes, buffer[: n * num_classes], storage, stream)
        return
    lane = 0
    while lane < n:
        o, i = divmod(first + lane, inner)
        width = min(n - lane, inner - i)
        for c in range(num_classes):
            column = c * step + lane
            start = (o * num_classes + c) * inner + i
            _store_run(
                out, start, tile[column : column + width], storage, stream,
                _carry(scratch, r, c), r, FIELDS + c,
            )  # fmt: skip
        lane += width


@_inline
def _clear_dead_lanes(tile, num_classes, step, r):
    """Nothing of a row that counts for nothing, a NaN least of all, gets through."""
    dead = 0
    for lane in range(LANES):
        dead += r[ROW_WEIGHT + lane] == 0.0
    if not dead:
        return
    for lane in range(LANES):
        if r[ROW_WEIGHT + lane] == 0.0:
            column = tile[lane:]
            for c in range(num_classes):
                column[c * step] = 0


@_inline
def _tile_largest(tile, num_classes, step, r):
    m = _lanes(tile)
    for j in range(LANES):
        m[j] = -np.inf
    for c in range(num_classes):
        row = tile[c * step : c * step + LANES]
        for j in range(LANES):
            m[j] = row[j] if row[j] > m[j] else m[j]
    for j in range(LANES):
        r[MAXIMUM + j] = m[j]


@_inline
def _tile_find(tile, num_classes, step, r):
    """The first class whose score is the maximum, or 0."""
    real = tile.dtype.type
    m, k = _lanes(tile), _lanes(tile)
    for j in range(LANES):
        m[j] = r[MAXIMUM + j]
        k[j] = 0
    for c in range(num_classes - 1, -1, -1):
        row = tile[c * step : c * step + LANES]
        number = real(c)
        for j in range(LANES):
            k[j] = number if row[j] == m[j] else k[j]
    for j in range(LANES):
        r[INDEX + j] = k[j]


@_inline
def _tile_exponentials(tile, num_classes, step, skip, keep, r, x, later, inner):
    """Sums of exponentials, if skip without INDEX; if keep, they take the place of the scores.

    Meanwhile the scores of the tile from row `later` on are fetched, so that memory is never idle.
    """
    real = tile.dtype.type
    pivot, magic, lowest = _lanes(tile), _lanes(tile), _lanes(tile)
    value, lane, index = _lanes(tile), _lanes(tile), _lanes(tile)
    total = _lanes(r)
    apart = LANES if inner == 1 else inner
    o, i = divmod(later, inner)
    start = o * num_classes * inner + i
    for j in range(LANES):
        m = real(r[MAXIMUM + j])
        pivot[j] = _pivot_of(m)
        magic[j] = _magic_of(m)
        lowest[j] = _lowest_of(magic[j])
        lane[j] = 0
        total[j] = 0.0
    for j in range(LANES):
        index[j] = r[INDEX + j] if skip else -1.0
    for c in range(num_classes):
        row = tile[c * step : c * step + LANES]
        number = real(c)
        _fetch(x, start + c * apart, LANES)
        for j in range(LANES):
            value[j] = _exponential(row[j], pivot[j], magic[j], lowest[j])
        for j in range(LANES):
            lane[j] += real(0) if index[j] == number else value[j]
        if keep:
            for j in range(LANES):
                row[j] = value[j]
        if c % RUN == RUN - 1 or c == num_classes - 1:  # long sums in float64
            for j in range(LANES):
                total[j] += np.float64(lane[j])
                lane[j] = 0
    for j in range(LANES):
        r[OTHERS + j] = total[j]


@_inline
def _tile_factors(tile, num_classes, step, f, r):
    """As _narrow_factor, for every lane."""
    power = np.float64(_power_of(tile))
    small = 0
    for j in range(LANES):
        f[j] = r[FACTOR + j] * power
        small += (abs(r[FACTOR + j] * power) < _tiny_of(tile)) & (r[FACTOR + j] != 0.0)
    if not small:
        return
    for j in range(LANES):
        if abs(r[FACTOR + j] * power) < _tiny_of(tile):
            f[j] = r[FACTOR + j]
            column = tile[j:]
            for c in range(num_classes):
                column[c * step] *= _power_of(tile)


@_inline
def _tile_scale(tile, num_classes, step, soft, weight, largest, keep, uniform, r):
    """From exponentials to the gradient: factor * e_c - spread * w_c t_c, left_out at INDEX."""
    real = tile.dtype.type
    f, left_out, index = _lanes(tile), _lanes(tile), _lanes(tile)
    on_target, on_all = _lanes(tile), _lanes(tile)
    _tile_factors(tile, num_classes, step, f, r)
    for j in range(LANES):
        spread = r[SPREAD + j] * largest
        on_target[j] = spread * keep
        on_all[j] = spread if soft is None else spread * uniform
        left_out[j] = r[LEFT_OUT + j]
        index[j] = r[INDEX + j]
    # left_out in passing: numbers put one by one would hold up who then reads the tile as vectors.
    for c in range(num_classes):
        row = tile[c * step : c * step + LANES]
        w = weight[c] if weight.size else real(1)
        number = real(c)
        if soft is not None:
            t = soft[c * step : c * step + LANES]
            for j in range(LANES):
                g = row[j] * f[j] - w * (on_target[j] * t[j] + on_all[j])
                row[j] = left_out[j] if index[j] == number else g
        elif uniform != 0.0:
            for j in range(LANES):
                g = row[j] * f[j] - w * on_all[j]
                row[j] = left_out[j] if index[j] == number else g
        else:
            for j in range(LANES):
                g = row[j] * f[j]
                row[j] = left_out[j] if index[j] == number else g


@_inline
def _tile_gaps(tile, num_classes, step, soft, weight, largest, keep, uniform, r):
    """sum w t (m - x), the sum of w t without the maximum, and its own w t."""
    real = tile.dtype.type
    keep, uniform = real(keep), real(uniform)
    m, index, gap, mass = _lanes(tile), _lanes(tile), _lanes(tile), _lanes(tile)
    bad = 0
    for j in range(LANES):
        m[j] = r[MAXIMUM + j]
        index[j] = r[INDEX + j]
        gap[j] = 0.0
        mass[j] = 0.0
        r[GAP + j] = 0.0
        r[MASS + j] = 0.0
    for c in range(num_classes):
        row = tile[c * step : c * step + LANES]
        w = weight[c] if weight.size else real(1)
        if soft is not None:
            t = soft[c * step : c * step + LANES]
            number = real(c)
            for j in range(LANES):
                wt = w * (keep * t[j] + uniform)
                gap[j] += _times(wt, m[j] - row[j])
                mass[j] += real(0) if index[j] == number else wt
        else:
            for j in range(LANES):
                gap[j] += _times(w, m[j] - row[j])
        if c % RUN == RUN - 1 or c == num_classes - 1:
            for j in range(LANES):
                r[GAP + j] += np.float64(gap[j])
                r[MASS + j] += np.float64(mass[j])
                gap[j] = 0.0
                mass[j] = 0.0
    for j in range(LANES):
        bad += r[GAP + j] - r[GAP + j] != 0.0
    for j in range(LANES if bad else 0):  # in float64 where it leaves the range of x
        if r[GAP + j] - r[GAP + j] == 0.0:
            continue
        r[GAP + j] = 0.0
        for c in range(num_classes):
            wt = np.float64(weight[c]) if weight.size else 1.0
            if soft is not None:
                wt *= np.float64(keep * soft[c * step + j] + uniform)
            r[GAP + j] += _times(wt, np.float64(m[j]) - np.float64(tile[c * step + j]))
    for j in range(LANES):
        r[GAP + j] *= largest
        r[MASS + j] *= largest
        if soft is not None:
            k = int(index[j])
            w = weight[k] if weight.size else real(1)
            r[TOP_MASS + j] = largest * np.float64(w * (keep * soft[k * step + j] + uniform))


@_inline
def _softmax_tile(tile, r, num_classes, step, x, later, inner):
    f = _lanes(tile)
    _tile_largest(tile, num_classes, step, r)
    _tile_exponentials(tile, num_classes, step, False, True, r, x, later, inner)
    for j in range(LANES):
        f[j] = 1.0 / r[OTHERS + j]
    for c in range(num_classes):
        row = tile[c * step : c * step + LANES]
        for j in range(LANES):
            row[j] *= f[j]


@_inline
def _log_softmax_tile(tile, r, num_classes, step, x, later, inner, log_probs):
    """log_softmax; without log_probs only what logsumexp needs."""
    m, log_s = _lanes(tile), _lanes(tile)
    _tile_largest(tile, num_classes, step, r)
    _tile_find(tile, num_classes, step, r)
    _tile_exponentials(tile, num_classes, step, True, False, r, x, later, inner)
    for j in range(LANES):
        r[TARGET_LOGIT + j] = r[MAXIMUM + j]
    _add_exponentials(r, LANES, tile)
    for j in range(LANES):
        r[LOSS + j] = _log1p(r[OTHERS + j] / r[TOP + j])
    if not log_probs:
        for j in range(LANES):
            if not math.isfinite(r[MAXIMUM + j]) and not _holds_nan(tile[j:], step, num_classes):
                r[LOSS + j] = 0.0
        return
    for j in range(LANES):
        m[j] = r[MAXIMUM + j]
        log_s[j] = r[LOSS + j]
    for c in range(num_classes):
        row = tile[c * step : c * step + LANES]
        for j in range(LANES):
            row[j] = (row[j] - m[j]) - log_s[j]


@_spliced
def _reduce_tile(
    tile, targets, r, n, num_classes, step, weight, largest, keep, uniform, keep_exponentials, x,
    later, inner,
):  # fmt: skip
    """The first stage of cross-entropy: of soft targets unless they are None, else of indices."""
    for j in range(n, LANES):
        r[INDEX + j] = 0.0
        r[ROW_WEIGHT + j] = 0.0
        r[TARGET_WEIGHT + j] = 0.0
    _clear_dead_lanes(tile, num_classes, step, r)
    _tile_largest(tile, num_classes, step, r)
    if targets is not None:
        _clear_dead_lanes(targets, num_classes, step, r)
        _tile_find(tile, num_classes, step, r)
    for j in range(LANES):
        r[TARGET_LOGIT + j] = tile[int(r[INDEX + j]) * step + j]
        r[GAP + j] = 0.0
    if targets is not None:
        _tile_gaps(tile, num_classes, step, targets, weight, largest, keep, uniform, r)
    elif uniform != 0.0:
        _tile_gaps(tile, num_classes, step, None, weight, largest, keep, uniform, r)
    _tile_exponentials(tile, num_classes, step, True, keep_exponentials, r, x, later, inner)
    _add_exponentials(r, LANES, tile)


# ---------------------------------------------------------------------------------------------
# Columns: many classes that do not lie next to each other
# ---------------------------------------------------------------------------------------------
# A unit of columns is turned into rows, which the functions above take in place, and turned back.
# So the bits of a row do not depend on how it lies in memory.  `turned` has the type of what is
# turned: room for TURN classes of a unit, then its rows, `step` numbers apart, with room for what
# transposing writes beyond them.


@_inline
def _load_columns(x, turned, first, n, num_classes, inner, step):
    staged, rows = turned[: TURN * LANES], turned[TURN * LANES :]
    row = 0
    while row < n:
        o, i = divmod(first + row, inner)
        width = min(n - row, inner - i)
        for c in range(0, num_classes, TURN):
            source, start, apart = x, (o * num_classes + c) * inner + i, inner
            for j in range(2 * TURN, 3 * TURN):
                _fetch(x, start + j * inner, width)
            if start + (TURN - 1) * inner + width + 7 > x.size:
                for j in range(min(TURN, num_classes - c)):
                    place = start + j * inner
                    _copy(staged[j * LANES : j * LANES + width], x[place : place + width])
                source, start, apart = _as_input(staged), 0, LANES
            for lane in range(0, width, 8):
                for j in range(0, TURN, 8):
                    place = (row + lane) * step + c + j
                    _transpose(source, start + j * apart + lane, apart, rows, place, step)
        row += width


@_inline
def _store_columns(out, turned, scratch, r, first, n, num_classes, inner, step, storage, stream):
    staged, rows = turned[: TURN * LANES], turned[TURN * LANES :]
    row = 0
    while row < n:
        o, i = divmod(first + row, inner)
        width = min(n - row, inner - i)
        for c in range(0, num_classes, TURN):
            for lane in range(0, width, 8):
                for j in range(0, TURN, 8):
                    place = (row + lane) * step + c + j
                    _transpose(rows, place, step, staged, j * LANES + lane, LANES)
            for j in range(min(TURN, num_classes - c)):
                start = (o * num_classes + c + j) * inner + i
                _store_run(
                    out, start, staged[j * LANES : j * LANES + width], storage, stream,
                    _carry(scratch, r, c + j), r, FIELDS + c + j,
                )  # fmt: skip
        row += width


# ---------------------------------------------------------------------------------------------
# Shares: what one thread does
# ---------------------------------------------------------------------------------------------
# `shape` is (rows, num_classes, inner, layout, group, summed, step, stream): group rows make up a
# unit, as many as summed go through the functions above together; step as there.


@_entry(parallel=True)
def _on_threads(share, arguments, units, threads):
    for thread in prange(threads):
        _call(share, arguments, units, thread, threads)


@_inline
def _carry(scratch, r, c):
    """Half a cache line or less of class c; r[FIELDS + c] says where it is to go, or -1."""
    line = LINE // scratch.itemsize
    start = scratch.size - (r.size - FIELDS - c) * line
    return scratch[start : start + line]


@_inline
def _begin_carries(r):
    for c in range(FIELDS, r.size):
        r[c] = -1.0


@_inline
def _flush_carries(out, r, scratch):
    for c in range(r.size - FIELDS):
        _flush(out, _carry(scratch, r, c), r, FIELDS + c)


@_inline
def _load_unit(x, tile, buffer, turned, first, n, num_classes, inner, layout, step, storage):
    if layout == TILES:
        _load_tiles(x, tile, buffer, first, n, num_classes, inner, step, storage)
    elif layout == COLUMNS:
        _load_columns(x, turned, first, n, num_classes, inner, step)


@_inline
def _store_unit(
    out, tile, turned, scratch, r, first, n, num_classes, inner, layout, step, storage, stream
):
    if layout == TILES:
        _store_tiles(out, tile, scratch, r, first, n, num_classes, inner, step, storage, stream)
    elif layout == COLUMNS:
        _store_columns(out, turned, scratch, r, first, n, num_classes, inner, step, storage, stream)


@_inline
def _rows_of(array, turned, layout):
    """Where the rows lie that are to be read: in the array itself, or, of columns, in `turned`."""
    return _as_input(turned[TURN * LANES :]) if layout == COLUMNS else array


@_inline
def _rows_to(array, turned, layout):
    return turned[TURN * LANES :] if layout == COLUMNS else array


@_inline
def _share(units, thread, threads):
    return range(units * thread // threads, units * (thread + 1) // threads)


@_entry
def _softmax_share(x, out, shape, storage, scratch, fields, turned, units, thread, threads):
    mode = _set_float_mode(IEEE)
    rows, num_classes, inner, layout, group, summed, step, stream = shape
    x, out, turned = _borrow(x), _borrow(out), _borrow(turned[thread])
    x_rows, out_rows = _rows_of(x, turned, layout), _rows_to(out, turned, layout)
    r, own = _borrow(fields[thread]), _borrow(scratch[thread])
    buffer, tile, _ = _tile_scratch(own, num_classes, step)
    _begin_carries(r)
    for unit in _share(units, thread, threads):
        first = unit * group
        last = min(first + group, rows)
        _load_unit(
            x, tile, buffer, turned, first, last - first, num_classes, inner, layout, step, storage
        )
        for start in range(first, last, summed):
            row = start - first if layout == COLUMNS else start
            if layout == TILES:
                _softmax_tile(tile[start - first :], r, num_classes, step, x, start + group, inner)
            else:
                _softmax_rows(
                    x_rows, out_rows, r, own, row, min(summed, last - start), num_classes, step,
                    storage, stream and layout == ROWS,
                )  # fmt: skip
        _store_unit(
            out, tile, turned, own, r, first, last - first, num_classes, inner, layout, step,
            storage, stream,
        )  # fmt: skip
    _flush_carries(out, r, own)
    _end_stream()
    _set_float_mode(mode)


@_entry
def _log_softmax_share(
    x, out, shape, storage, log_probs, scratch, fields, turned, units, thread, threads
):
    """log_softmax, or, without log_probs, logsumexp."""
    mode = _set_float_mode(IEEE)
    rows, num_classes, inner, layout, group, summed, step, stream = shape
    x, out, turned = _borrow(x), _borrow(out), _borrow(turned[thread])
    x_rows, out_rows = _rows_of(x, turned, layout), _rows_to(out, turned, layout)
    r, own = _borrow(fields[thread]), _borrow(scratch[thread])
    buffer, tile, _ = _tile_scratch(own, num_classes, step)
    _begin_carries(r)
    for unit in _share(units, thread, threads):
        first = unit * group
        last = min(first + group, rows)
        _load_unit(
            x, tile, buffer, turned, first, last - first, num_classes, inner, layout, step, storage
        )
        for start in range(first, last, summed):
            n = min(summed, last - start)
            row = start - first if layout == COLUMNS else start
            if layout == TILES:
                _log_softmax_tile(
                    tile[start - first :], r, num_classes, step, x, start + group, inner, log_probs
                )
            else:
                _log_softmax_rows(
                    x_rows, out_rows, r, own, row, n, num_classes, step, storage,
                    stream and layout == ROWS, log_probs,
                )  # fmt: skip
            if not log_probs:
                for i in range(n):
                    buffer[i] = r[MAXIMUM + i] + r[LOSS + i]
                _store(out, start, buffer[:n], storage, False)
        if log_probs:
            _store_unit(
                out, tile, turned, own, r, first, last - first, num_classes, inner, layout, step,
                storage, stream,
            )  # fmt: skip
    _flush_carries(out, r, own)
    _end_stream()
    _set_float_mode(mode)


@_entry
def _cross_entropy_share(
    x, target, weight, relative_weight, sample_weight, shape, storage, ignore_index, options,
    losses, out, scratch, fields, turned, partial, units, thread, threads,
):  # fmt: skip
    mode = _set_float_mode(IEEE)
    rows, num_classes, inner, layout, group, summed, step, stream = shape
    smoothing, z_loss, scale, weight_sum, largest = options
    uniform = smoothing / num_classes
    x, out, turned = _borrow(x), _borrow(out), _borrow(turned[thread])
    x_rows, out_rows = _rows_of(x, turned, layout), _rows_to(out, turned, layout)
    r, own = _borrow(fields[thread]), _borrow(scratch[thread])
    buffer, tile, _ = _tile_scratch(own, num_classes, step)
    tiled = layout == TILES
    _begin_carries(r)
    for unit in _share(units, thread, threads):
        first = unit * group
        last = min(first + group, rows)
        _load_unit(
            x, tile, buffer, turned, first, last - first, num_classes, inner, layout, step, storage
        )
        for start in range(first, last, summed):
            n = min(summed, last - start)
            row = start - first if layout == COLUMNS else start
            own_tile = tile[start - first :]
            _read_targets(
                r, target, weight, sample_weight, start, n, num_classes, ignore_index,
                smoothing, z_loss, largest,
            )  # fmt: skip
            if tiled:
                _reduce_tile(
                    own_tile, None, r, n, num_classes, step, relative_weight, largest, 1.0,
                    uniform, out.size > 0, x, start + group, inner,
                )  # fmt: skip
            else:
                _reduce_rows(
                    x_rows, r, own, row, n, num_classes, step, relative_weight, largest, None, 1.0,
                    uniform, out.size > 0, storage, FLOATS,
                )  # fmt: skip
            _cross_entropy_step(
                r, LANES if tiled else n, num_classes, smoothing, z_loss, scale, weight_sum, own
            )
            partial[start // summed] = _deliver_losses(r, n, losses, start, own)
            if out.size and tiled:
                _tile_scale(
                    own_tile, num_classes, step, None, relative_weight, largest, 1.0, uniform, r
                )
            elif out.size:
                _write_rows(
                    out_rows, r, own, row, n, num_classes, step, relative_weight, largest, None,
                    1.0, uniform, storage, FLOATS, stream and layout == ROWS,
                )  # fmt: skip
        if out.size:
            _store_unit(
                out, tile, turned, own, r, first, last - first, num_classes, inner, layout, step,
                storage, stream,
            )  # fmt: skip
    _flush_carries(out, r, own)
    _end_stream()
    _set_float_mode(mode)


@_entry
def _cross_entropy_soft_share(
    x, soft, relative_weight, sample_weight, shape, storage, soft_storage, options, losses, out,
    scratch, fields, turned, turned_soft, partial, units, thread, threads,
):  # fmt: skip
    mode = _set_float_mode(IEEE)
    rows, num_classes, inner, layout, group, summed, step, stream = shape
    smoothing, z_loss, scale, largest = options
    keep, uniform = 1.0 - smoothing, smoothing / num_classes
    x, soft, out = _borrow(x), _borrow(soft), _borrow(out)
    turned, turned_soft = _borrow(turned[thread]), _borrow(turned_soft[thread])
    x_rows, out_rows = _rows_of(x, turned, layout), _rows_to(out, turned, layout)
    soft_rows = _rows_of(soft, turned_soft, layout)
    tiled = layout == TILES
    r, own = _borrow(fields[thread]), _borrow(scratch[thread])
    buffer, tile, targets = _tile_scratch(own, num_classes, step)
    _begin_carries(r)
    for unit in _share(units, thread, threads):
        first = unit * group
        last = min(first + group, rows)
        _load_unit(
            x, tile, buffer, turned, first, last - first, num_classes, inner, layout, step, storage
        )
        _load_unit(
            soft, targets, buffer, turned_soft, first, last - first, num_classes, inner, layout,
            step, soft_storage,
        )  # fmt: skip
        for start in range(first, last, summed):
            n = min(summed, last - start)
            row = start - first if layout == COLUMNS else start
            own_tile, own_targets = tile[start - first :], targets[start - first :]
            _read_sample_weights(r, sample_weight[start : start + n], n)
            if tiled:
                _reduce_tile(
                    own_tile, own_targets, r, n, num_classes, step, relative_weight, largest, keep,
                    uniform, out.size > 0, x, start + group, inner,
                )  # fmt: skip
            else:
                _reduce_rows(
                    x_rows, r, own, row, n, num_classes, step, relative_weight, largest, soft_rows,
                    keep, uniform, out.size > 0, storage, soft_storage,
                )  # fmt: skip
            _cross_entropy_soft_step(r, LANES if tiled else n, z_loss, scale, own)
            partial[start // summed] = _deliver_losses(r, n, losses, start, own)
            if out.size and tiled:
                _tile_scale(
                    own_tile, num_classes, step, own_targets, relative_weight, largest, keep,
                    uniform, r,
                )  # fmt: skip
            elif out.size:
                _write_rows(
                    out_rows, r, own, row, n, num_classes, step, relative_weight, largest,
                    soft_rows, keep, uniform, storage, soft_storage, stream and layout == ROWS,
                )  # fmt: skip
        if out.size:
            _store_unit(
                out, tile, turned, own, r, first, last - first, num_classes, inner, layout, step,
                storage, stream,
            )  # fmt: skip
    _flush_carries(out, r, own)
    _end_stream()
    _set_float_mode(mode)


@_inline
def _softmax_vjp(g, p, total, result):
    for i in range(result.size):
        result[i] = p[i] * (g[i] - total)


@_inline
def _log_softmax_vjp(g, log_p, pivot, magic, lowest, shrink, total, result):
    for i in range(result.size):
        e = _exponential(log_p[i], pivot, magic, lowest)
        result[i] = _less(e * shrink, total, g[i])


@_fused
def _less(a, b, c):
    """c - a b without a subnormal a b on the way, which would be slow."""
    return c - a * b


@_inline
def _is_far(total, numbers):
    """Whether a sum of upstream gradients is out of range, or near enough to its end."""
    return not abs(total) < _huge_of(numbers)


@_inline
def _far_difference(
    g, forward, result, step, n, pivot, magic, lowest, unit, total, log_probs
):  # fmt: skip
    """What _backward_share says, the sum being total / FAR_UNIT, in float64, without overflow."""
    for i in range(n):
        value = FAR_UNIT * np.float64(g[i * step])
        if log_probs:
            e = _exponential(forward[i * step], pivot, magic, lowest)
            value -= unit * np.float64(e) * total
        else:
            value = np.float64(forward[i * step]) * (value - total)
        result[i * step] = value / FAR_UNIT


@_inline
def _reference(maximum):
    """A reference for log-probabilities: they are at most 0, but the formula holds for any."""
    m = max(maximum, type(maximum)(0))
    pivot, magic = _pivot_of(m), _magic_of(m)
    lowest = _lowest_of(magic)
    # What an exponential is multiplied by to give exp(x).
    unit = np.exp(np.float64(m)) / np.float64(_exponential(m, pivot, magic, lowest))
    return pivot, magic, lowest, unit


@_inline
def _backward_rows(g, p, out, r, scratch, first, n, num_classes, step, storage, stream, log_probs):
    buffer, line, kept = _row_scratch(scratch)
    real = scratch.dtype.type
    if log_probs:
        _largest_of_rows(p, first, n, num_classes, step, r, buffer, storage)
    for i in range(n):
        start = (first + i) * step
        total = 0.0
        for c in range(0, num_classes, BLOCK):
            width = min(BLOCK, num_classes - c)
            upstream = _load(g, start + c, width, buffer, storage)
            if log_probs:
                total += _sum(upstream)
            else:
                total += _dot(upstream, _load(p, start + c, width, line, storage))
        far = _is_far(total, scratch)
        if far:
            total = 0.0
            for c in range(0, num_classes, BLOCK):
                width = min(BLOCK, num_classes - c)
                upstream = _load(g, start + c, width, buffer, storage)
                forward = _load(p, start + c, width, line, storage)
                total += _far_sum(upstream, forward, 1, width, log_probs)
        pivot, magic, lowest, unit = _reference(real(r[MAXIMUM + i] if log_probs else 0.0))
        shrink = _shrink_for(total, unit, scratch) if log_probs else 1.0
        f = real(total * (1 / shrink) * unit if log_probs else total)
        for c in range(0, num_classes, BLOCK):
            width = min(BLOCK, num_classes - c)
            upstream = _load(g, start + c, width, buffer, storage)
            forward = _load(p, start + c, width, line, storage)
            result = kept[i * num_classes + c : i * num_classes + c + width]
            if far:
                _far_difference(
                    upstream, forward, result, 1, width, pivot, magic, lowest, unit, total,
                    log_probs,
                )  # fmt: skip
            elif log_probs:
                _log_softmax_vjp(upstream, forward, pivot, magic, lowest, real(shrink), f, result)
            else:
                _softmax_vjp(upstream, forward, f, result)
    _store_rows(out, first, kept, n, num_classes, step, storage, stream)


@_inline
def _backward_tile(tile, upstreams, r, num_classes, step, log_probs):
    pivot, magic, lowest = _lanes(tile), _lanes(tile), _lanes(tile)
    lane, f, shrink = _lanes(tile), _lanes(tile), _lanes(tile)
    real = tile.dtype.type
    for j in range(LANES):
        lane[j] = 0
        r[OTHERS + j] = 0.0
    for c in range(num_classes):
        forward = tile[c * step : c * step + LANES]
        upstream = upstreams[c * step : c * step + LANES]
        for j in range(LANES):
            lane[j] += upstream[j] if log_probs else upstream[j] * forward[j]
        if c % RUN == RUN - 1 or c == num_classes - 1:
            for j in range(LANES):
                r[OTHERS + j] += np.float64(lane[j])
                lane[j] = 0
    if log_probs:
        _tile_largest(tile, num_classes, step, r)
    for j in range(LANES):
        pivot[j], magic[j], lowest[j], unit = _reference(real(r[MAXIMUM + j] if log_probs else 0.0))
        total = r[OTHERS + j]
        if _is_far(total, tile):
            # The result takes the place of g, and what follows leaves that alone.
            g, forward = upstreams[j:], tile[j:]
            total = _far_sum(g, forward, step, num_classes, log_probs)
            _far_difference(
                g, forward, g, step, num_classes, pivot[j], magic[j], lowest[j], unit, total,
                log_probs,
            )  # fmt: skip
            for c in range(0 if log_probs else num_classes):
                forward[c * step] = 1
            total = 0.0
        factor = _shrink_for(total, unit, tile) if log_probs else 1.0
        shrink[j] = factor
        f[j] = total * (1 / factor) * unit if log_probs else total
    for c in range(num_classes):
        forward = tile[c * step : c * step + LANES]
        upstream = upstreams[c * step : c * step + LANES]
        if log_probs:
            for j in range(LANES):
                e = _exponential(forward[j], pivot[j], magic[j], lowest[j])
                forward[j] = _less(e * shrink[j], f[j], upstream[j])
        else:
            for j in range(LANES):
                forward[j] = forward[j] * (upstream[j] - f[j])


@_entry
def _backward_share(
    g, p, out, shape, storage, log_probs, scratch, fields, turned, turned_g, units, thread, threads
):
    """softmax_backward: p (g - sum g p); with log_probs: g - exp(p) sum g."""
    mode = _set_float_mode(IEEE)
    rows, num_classes, inner, layout, group, summed, step, stream = shape
    g, p, out = _borrow(g), _borrow(p), _borrow(out)
    turned, turned_g = _borrow(turned[thread]), _borrow(turned_g[thread])
    p_rows, out_rows = _rows_of(p, turned, layout), _rows_to(out, turned, layout)
    g_rows = _rows_of(g, turned_g, layout)
    r, own = _borrow(fields[thread]), _borrow(scratch[thread])
    buffer, tile, upstreams = _tile_scratch(own, num_classes, step)
    _begin_carries(r)
    for unit in _share(units, thread, threads):
        first = unit * group
        last = min(first + group, rows)
        _load_unit(
            p, tile, buffer, turned, first, last - first, num_classes, inner, layout, step, storage
        )
        _load_unit(
            g, upstreams, buffer, turned_g, first, last - first, num_classes, inner, layout, step,
            storage,
        )  # fmt: skip
        for start in range(first, last, summed):
            row = start - first if layout == COLUMNS else start
            lane = start - first
            if layout == TILES:
                _backward_tile(tile[lane:], upstreams[lane:], r, num_classes, step, log_probs)
            else:
                _backward_rows(
                    g_rows, p_rows, out_rows, r, own, row, min(summed, last - start), num_classes,
                    step, storage, stream and layout == ROWS, log_probs,
                )  # fmt: skip
        _store_unit(
            out, tile, turned, own, r, first, last - first, num_classes, inner, layout, step,
            storage, stream,
        )  # fmt: skip
    _flush_carries(out, r, own)
    _end_stream()
    _set_float_mode(mode)


@_entry
def _nll_share(
    log_probs, target, weight, sample_weight, shape, storage, ignore_index, losses, scratch,
    fields, partial, units, thread, threads,
):  # fmt: skip
    mode = _set_float_mode(IEEE)
    rows, num_classes, inner, _, _, _, _, _ = shape
    r = fields[thread]
    scratch = scratch[thread]
    for unit in _share(units, thread, threads):
        start = unit * LANES
        n = min(LANES, rows - start)
        _read_targets(
            r, target, weight, sample_weight, start, n, num_classes, ignore_index,
            0.0, 0.0, 0.0,
        )  # fmt: skip
        for i in range(n):
            o, j = divmod(start + i, inner)
            place = (o * num_classes + int(r[INDEX + i])) * inner + j
            log_p = np.float64(_load_one(log_probs, place, storage))
            r[LOSS + i] = _times(r[ROW_WEIGHT + i], -log_p * r[TARGET_WEIGHT + i])
        partial[unit] = _deliver_losses(r, n, losses, start, scratch)
    _set_float_mode(mode)


@_entry
def _nll_backward_share(
    target, weight, sample_weight, shape, storage, ignore_index, scale, out, scratch, fields,
    units, thread, threads,
):  # fmt: skip
    """The gradient at the targets, into `out` that holds zeros."""
    mode = _set_float_mode(IEEE)
    rows, num_classes, inner, _, _, _, _, _ = shape
    r = fields[thread]
    scratch = scratch[thread]
    for unit in _share(units, thread, threads):
        start = unit * LANES
        n = min(LANES, rows - start)
        _read_targets(
            r, target, weight, sample_weight, start, n, num_classes, ignore_index,
            0.0, 0.0, 0.0,
        )  # fmt: skip
        for i in range(n):
            o, j = divmod(start + i, inner)
            place = (o * num_classes + int(r[INDEX + i])) * inner + j
            # Subtracting from 0 makes +0 of a product that is 0.
            scratch[0] = 0.0 - scale * r[TARGET_WEIGHT + i] * r[ROW_WEIGHT + i]
            _store(out, place, scratch[:1], storage, False)
    _set_float_mode(mode)


@_entry
def _check_share(
    target, weight, sample_weight, size, num_classes, ignore_index, found, units, thread, threads
):
    """Of each block the sum of the weights, and whether a target is out of range."""
    mode = _set_float_mode(IEEE)
    y = _lanes(np.int64)
    lane = _lanes(np.float64)
    for block in _share(units, thread, threads):
        last = min((block + 1) * CHECK_BLOCK, size)
        used = bad = 0
        for i in range(LANES):
            lane[i] = 0.0
        for start in range(block * CHECK_BLOCK, last, LANES):
            n = min(LANES, last - start)
            _read_indices(target, start, n, y)
            for i in range(n):
                counts = y[i] != ignore_index
                used += counts
                bad += counts & ((y[i] < 0) | (y[i] >= num_classes))
            if weight.size or sample_weight.size:
                for i in range(n):
                    if y[i] != ignore_index and 0 <= y[i] < num_classes:
                        row_weight = sample_weight[start + i] if sample_weight.size else 1.0
                        lane[i] += row_weight * (weight[y[i]] if weight.size else 1.0)
        weighted = weight.size or sample_weight.size
        found[0, block] = _fold(lane) if weighted else np.float64(used)
        found[1, block] = bad != 0
    _set_float_mode(mode)


# ---------------------------------------------------------------------------------------------
# The functions of the contract
# ---------------------------------------------------------------------------------------------

_ABSENT = np.empty(0)
_ABSENT.flags.writeable = False
_launch_lock = threading.Lock()
_layer_started = False


def softmax(logits, out, num_threads):
    x, storage = _flat(logits)
    shape, units, threads = _plan(logits, out, num_threads)
    arguments = (x, _flat_out(out), shape, storage, *_scratch(logits, shape, threads),
                 _turned(x, shape, threads))  # fmt: skip
    _run(_softmax_share, arguments, units, threads)


def log_softmax(logits, out, num_threads):
    _log_softmax(logits, out, True, num_threads)


def logsumexp(logits, out, num_threads):
    _log_softmax(logits, out, False, num_threads)


def _log_softmax(logits, out, log_probs, num_threads):
    x, storage = _flat(logits)
    shape, units, threads = _plan(logits, out if log_probs else None, num_threads)
    arguments = (x, _flat_out(out), shape, storage, log_probs, *_scratch(logits, shape, threads),
                 _turned(x, shape, threads))  # fmt: skip
    _run(_log_softmax_share, arguments, units, threads)


def softmax_backward(grad_output, probs, out, num_threads):
    _backward(grad_output, probs, out, False, num_threads)


def log_softmax_backward(grad_output, log_probs, out, num_threads):
    _backward(grad_output, log_probs, out, True, num_threads)


def _backward(grad_output, forward, out, log_probs, num_threads):
    g, storage = _flat(grad_output)
    p, _ = _flat(forward)
    shape, units, threads = _plan(forward, out, num_threads)
    arguments = (g, p, _flat_out(out), shape, storage, log_probs,
                 *_scratch(forward, shape, threads), _turned(p, shape, threads),
                 _turned(g, shape, threads))  # fmt: skip
    _run(_backward_share, arguments, units, threads)


def check_target(labels, options, num_classes, num_threads):
    target, weight, sample_weight = labels
    ignore_index = options.ignore_index
    size = target.size
    units = -(-size // CHECK_BLOCK)
    found = np.empty((2, units))
    arguments = (
        _integers(target), _or_absent(weight), _or_absent(sample_weight), size, num_classes,
        ignore_index, found,
    )  # fmt: skip
    _run(_check_share, arguments, units, min(num_threads, units))
    if units == 1 and not found.item(1):
        return TargetCheck(-1, found.item(0))
    sums, bads = found
    if bads.any():
        start = int(bads.argmax()) * CHECK_BLOCK
        block = target.reshape(-1)[start : start + CHECK_BLOCK]
        bad = (block != ignore_index) & ((block < 0) | (block >= num_classes))
        return TargetCheck(start + int(bad.argmax()), 0.0)
    return TargetCheck(-1, float(sums.sum()))


def cross_entropy(logits, labels, options, scale, losses, grad, num_threads):
    if scale == 0.0 and grad is not None:  # no row counts, not even one that holds a NaN
        total = cross_entropy(logits, labels, options, scale, losses, None, num_threads)
        grad.fill(0)
        return total
    loss = _cross_entropy_soft if labels.soft else _cross_entropy
    return loss(logits, *labels, *options, scale, losses, grad, num_threads)


def _cross_entropy(
    logits, target, weight, sample_weight, ignore_index, label_smoothing, z_loss, scale,
    losses, grad, num_threads,
):  # fmt: skip
    x, storage = _flat(logits)
    shape, units, threads = _plan(logits, grad, num_threads)
    weight_sum = float(logits.shape[1] if weight is None else weight.sum())
    relative, largest = _relative(weight, logits)
    partial = _partial(shape)
    arguments = (
        x, _integers(target), _or_absent(weight), relative, _or_absent(sample_weight), shape,
        storage, ignore_index, (label_smoothing, z_loss, scale, weight_sum, largest),
        *_outputs(logits, losses, grad), *_scratch(logits, shape, threads),
        _turned(x, shape, threads), partial,
    )  # fmt: skip
    _run(_cross_entropy_share, arguments, units, threads)
    return _total(partial)


def _cross_entropy_soft(
    logits, target, weight, sample_weight, _, label_smoothing, z_loss, scale, losses, grad,
    num_threads,
):  # fmt: skip
    x, storage = _flat(logits)
    soft, soft_storage = _flat(target)
    shape, units, threads = _plan(logits, grad, num_threads)
    relative, largest = _relative(weight, logits)
    partial = _partial(shape)
    arguments = (
        x, soft, relative, _or_absent(sample_weight), shape, storage, soft_storage,
        (label_smoothing, z_loss, scale, largest), *_outputs(logits, losses, grad),
        *_scratch(logits, shape, threads), _turned(x, shape, threads),
        _turned(soft, shape, threads), partial,
    )  # fmt: skip
    _run(_cross_entropy_soft_share, arguments, units, threads)
    return _total(partial)


def nll_loss(log_probs, labels, options, scale, losses, grad, num_threads):
    target, weight, sample_weight = labels
    ignore_index = options.ignore_index
    x, storage = _flat(log_probs)
    shape, _, _ = _plan(log_probs, None, num_threads)
    units = -(-shape[0] // LANES)
    threads = min(num_threads, units)
    partial = np.empty(units)
    scratch = np.empty((max(threads, 1), 1), _compute_dtype(log_probs))
    fields = np.empty((max(threads, 1), FIELDS))
    rows = (_integers(target), _or_absent(weight), _or_absent(sample_weight), shape, storage)
    handed_out, out = _outputs(log_probs, losses, grad)
    _run(
        _nll_share,
        (x, *rows, ignore_index, handed_out, scratch, fields, partial), units, threads,
    )  # fmt: skip
    if grad is not None:  # which may be log_probs: not before these were read
        out.fill(0)
        _run(
            _nll_backward_share,
            (*rows, ignore_index, scale, out, scratch, fields), units, threads,
        )  # fmt: skip
    return _total(partial)


def _partial(shape):
    """Room for the sums of the losses of rows that are summed together."""
    rows, _, _, _, _, summed, _, _ = shape
    return np.empty(-(-rows // summed))


def _total(partial):
    """The sum of the row losses from such sums; small calls have one."""
    if partial.size == 1:
        return partial.item()
    # Out is written: a sum of losses that is infinite or NaN must not become an error now.
    with np.errstate(all="ignore"):
        return float(partial.sum())


def _read_only(array):
    """The array in one dimension; read-only, as some inputs are: one type for all is compiled."""
    flat = array.reshape(-1)[:]
    flat.flags.writeable = False
    return flat


def _bits(flat):
    """Half types as their bits."""
    return flat.view(np.uint16) if flat.itemsize == 2 else flat


def _flat(array):
    """An input as kernels read it, and how they are to read 16 bits."""
    if array.itemsize != 2:
        return _read_only(array), FLOATS
    return _bits(_read_only(array)), FLOAT16 if array.dtype == np.float16 else BFLOAT16


def _integers(target):
    """Targets as their bytes, and how to read those."""
    return _read_only(target).view(np.uint8), INTEGERS.index(target.dtype.name)


def _flat_out(array):
    return _bits(array.reshape(-1))


def _compute_dtype(array):
    return np.float64 if array.itemsize == 8 else np.float32


def _or_absent(array):
    return _ABSENT if array is None else _read_only(array)


def _relative(weight, logits):
    """Class weights over the largest in magnitude, in the compute type; and that."""
    if weight is None:
        return _read_only(np.empty(0, _compute_dtype(logits))), 1.0
    largest = float(np.abs(weight).max())
    return _read_only((weight / (largest or 1.0)).astype(_compute_dtype(logits))), largest


def _outputs(logits, losses, grad):
    """Arrays of the types that the kernels expect, empty where nothing is to be written."""
    if losses is None:
        losses = np.empty(0, _compute_dtype(logits))
    if grad is None:
        grad = np.empty(0, logits.dtype)
    return losses.reshape(-1), _flat_out(grad)


def _plan(array, out, num_threads):
    """The shape that shares take, the units, and how many threads they are for."""
    outer, num_classes, inner = array.shape
    rows = outer * inner
    group = summed = step = LANES
    if num_classes <= SHORT_ROW:
        layout = TILES
        tiles = min(WIDE // (num_classes * LANES), rows // (LANES * FEWEST_UNITS), MOST_TILES)
        if inner > 1 and tiles > 1:
            group = LANES * tiles
            step = group + LINE // 4  # else classes fall on the same sets of the cache
    else:
        layout = ROWS
        while summed > 1 and summed * num_classes > GROUP:
            summed //= 2
        group, step = summed, num_classes
        if inner > 1:
            layout = COLUMNS
            group = min(max(TURNED // num_classes // TURN * TURN, TURN), LANES)
            # An odd number of lines: else rows fall on the same sets.
            step = -(-num_classes // (2 * TURN)) * 2 * TURN + TURN
    units = -(-rows // group)
    # In place, what is written is in the cache already.
    stream = out is not None and out.nbytes >= STREAM_BYTES and not np.may_share_memory(array, out)
    shape = (rows, num_classes, inner, layout, group, summed, step, stream)
    return shape, units, min(num_threads, units)


def _scratch(array, shape, threads):
    """Scratch for each thread: taken here, so that want of memory is an error and no crash."""
    _, num_classes, inner, layout, _, summed, step, stream = shape
    if layout == TILES:
        size = _tile_numbers.py_func(num_classes, step)
    else:
        size = 2 * BLOCK + summed * num_classes + CHUNK
    carries = num_classes if stream and inner > 1 and array.itemsize != 2 else 0
    size += carries * (LINE // array.itemsize)
    size += -size % 16  # threads do not share a cache line
    threads = max(threads, 1)
    return np.empty((threads, size), _compute_dtype(array)), np.empty((threads, FIELDS + carries))


def _turned(flat, shape, threads):
    """Room for a unit of columns as rows, for each thread; for other layouts an empty array."""
    rows, _, _, layout, group, _, step, _ = shape
    size = TURN * LANES + (min(group, rows) + 7) * step if layout == COLUMNS else 0
    return np.empty((max(threads, 1), size), flat.dtype)


def _run(share, arguments, units, threads):
    """On one thread without Numba's thread pool, which a forked child must not touch."""
    if threads <= 1 or not _start_layer():
        if units:
            share(*arguments, units, 0, 1)
        return
    address, arguments = _address(share, arguments), tuple(_apart(arguments))
    with _launch_lock:  # the workqueue layer aborts the process that uses it from two threads
        before = numba.get_num_threads()
        numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
        try:
            _on_threads(address, arguments, units, threads)
        finally:
            numba.set_num_threads(before)


def _address(share, arguments):
    """Where the share that was compiled for such arguments lies; it is compiled on first use."""
    signature = (*map(share.typeof_pyval, arguments), *3 * (types.intp,))
    if signature not in share.overloads:
        share.compile(signature)
    compiled = share.overloads[signature]
    return compiled.library.get_pointer_to_function(compiled.fndesc.llvm_func_name)


def _apart(arguments):
    """The arguments, and in place of tuples among them their elements."""
    for argument in arguments:
        yield from argument if isinstance(argument, tuple) else (argument,)


def _start_layer():
    """Start Numba's threads, or say that the system refuses them."""
    global _layer_started
    with _launch_lock:
        if not _layer_started and _threads.can_start(most_threads()):
            with _openmp_left_alone():
                numba.get_num_threads()
            _layer_started = True
    return _layer_started


@contextlib.contextmanager
def _openmp_left_alone():
    """Numba's OpenMP layer, when it starts, sets these for everybody who uses that OpenMP.

    There may be two of them in the process, such as PyTorch's and the system's.  The layer calls
    the one that the whole process sees, or else its own: whichever it is, both are as they were.
    """
    before = []
    with contextlib.suppress(ImportError):  # no OpenMP on this system
        from numba.np.ufunc import omppool

        for path in (None, omppool.__file__):
            with contextlib.suppress(OSError, AttributeError):
                openmp = ctypes.CDLL(path)
                threads, levels = openmp.omp_get_max_threads(), openmp.omp_get_max_active_levels()
                before.append((openmp, threads, levels))
    yield
    for openmp, threads, levels in before:
        openmp.omp_set_num_threads(threads)
        openmp.omp_set_max_active_levels(levels)


def most_threads():
    """How many threads a call may have, however many it asks for."""
    return numba.config.NUMBA_NUM_THREADS


def warmup():
    """Compile the common operations for float32 and float64, for one thread and for many."""
    labels = Labels(np.zeros((2 * LANES, 1), np.int64), None, None)
    options = Options(-100)
    for dtype in (np.float32, np.float64):
        logits = np.zeros((2 * LANES, 2, 1), dtype)
        for threads in (1, 2):
            softmax(logits, np.empty_like(logits), threads)
            log_softmax(logits, np.empty_like(logits), threads)
            check_target(labels, options, 2, threads)
            cross_entropy(logits, labels, options, 1.0, None, np.empty_like(logits), threads)


def describe():
    """What show_config says of this backend."""
    return {
        "numba": numba.__version__,
        "numba threading layer": _describe_layer(),
        "numba threads": str(numba.config.NUMBA_NUM_THREADS),
    }


def _describe_layer():
    """The layer that calls run on, started to find out, and what to beware of there."""
    try:
        _start_layer()
        layer = numba.threading_layer()
    except ValueError as error:  # the one that was asked for is not here, or threads are refused
        return f"none: {error}".splitlines()[0]
    if layer == "workqueue":
        layer += " (a parallel function of your own beside a call of ours ends the process)"
    return layer
