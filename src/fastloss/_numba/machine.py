"""What Python has no words for: memory as the processor sees it, and its own instructions."""

import platform

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.codegen import get_host_cpu_features
from numba.core.errors import TypingError
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array

from fastloss._numba.types import EIGHT, INTEGERS, LANES, LINE, STEP

IEEE = np.uint32(0x1F80)  # to nearest, denormals kept: results do not depend on what somebody set

# Whether float16 is converted by the processor. Code cached for other features is not used.
_features = numba.config.CPU_FEATURES
_features = (get_host_cpu_features() if _features is None else _features).split(",")
HAS_F16C = {"+avx", "+f16c"} <= set(_features)

# What puts the numbers of a vector into any order, by their type and how many there are.
_PERMUTE = {
    (types.float32, 16): ("+avx512f", "llvm.x86.avx512.permvar.sf.512"),
    (types.float64, 8): ("+avx512f", "llvm.x86.avx512.permvar.df.512"),
    (types.float32, 8): ("+avx2", "llvm.x86.avx2.permps"),
}
_permute = {key: name for key, (feature, name) in _PERMUTE.items() if feature in _features}


def _place(context, builder, array_type, array, index, pointer_type):
    data = cgutils.create_struct_proxy(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), pointer_type.as_pointer())


@intrinsic
def borrow(typing_context, array):
    """The array without its owner: slices of it count no references, which costs an atomic each.

    And LLVM is told how many bytes a number has.
    """
    if array == types.none:
        return array(array), lambda context, builder, signature, arguments: arguments[0]

    def generate(context, builder, signature, arguments):
        borrowed = context.make_array(array)(context, builder, arguments[0])
        borrowed.meminfo = cgutils.get_null_value(borrowed.meminfo.type)
        borrowed.itemsize = context.get_constant(types.intp, array.dtype.bitwidth // 8)
        return borrowed._getvalue()

    return array(array), generate


@intrinsic
def as_input(typing_context, array):
    """The array as inputs are typed: read-only."""

    def generate(context, builder, signature, arguments):
        return arguments[0]

    return array.copy(readonly=True)(array), generate


@intrinsic
def unless_none(typing_context, tested, value):
    """The value, or None where what is tested is None."""
    if tested == types.none:
        return types.none(tested, value), lambda context, *_: context.get_dummy_value()
    return value(tested, value), lambda context, builder, signature, arguments: arguments[1]


def _on_stack(like, count):
    array_type = types.Array(like.dtype, 1, "C")

    def generate(context, builder, signature, arguments):
        scalar = context.get_data_type(like.dtype)
        size = context.get_abi_sizeof(scalar)
        vector = cgutils.alloca_once(builder, ir.ArrayType(scalar, count))
        vector.align = LINE
        array = context.make_array(array_type)(context, builder)
        length = context.get_constant(types.intp, count)
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
def lanes(typing_context, like):
    """LANES numbers on the stack of the caller, of the type of an array or of a NumPy type."""
    return _on_stack(like, LANES)


@intrinsic
def eight_lanes(typing_context, like):
    """The same, for a part of a sum each."""
    return _on_stack(like, EIGHT * LANES)


def _vector_at(context, builder, array_type, array, index, count=STEP):
    """Where the numbers of an array from an index on are."""
    scalar = context.get_data_type(array_type.dtype)
    vector = ir.VectorType(scalar, count)
    return _place(context, builder, array_type, array, index, vector), scalar, vector


def _splat(builder, value, count=STEP):
    vector = ir.VectorType(value.type, count)
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.IntType(32)(0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), count), [0] * count)
    return builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), zeros)


def _numbers(size, count=STEP):
    """0, 1, 2 ... in integers of so many bytes."""
    return ir.Constant(ir.VectorType(ir.IntType(8 * size), count), list(range(count)))


def _narrow(builder, number, size):
    return builder.trunc(number, ir.IntType(8 * size)) if size < 8 else number


@intrinsic
def sum_lanes(typing_context, lane):
    """The sum of LANES numbers in float64: half of them to the other half, and so on."""

    def generate(context, builder, signature, arguments):
        wide = ir.VectorType(ir.DoubleType(), LANES)
        zero = context.get_constant(types.intp, 0)
        place, scalar, _ = _vector_at(context, builder, lane, arguments[0], zero, LANES)
        numbers = builder.load(place, align=context.get_abi_sizeof(scalar))
        if scalar != wide.element:
            numbers = builder.fpext(numbers, wide)
        kind = ir.FunctionType(wide.element, [wide.element, wide])
        name = f"llvm.vector.reduce.fadd.v{LANES}f64"
        total = cgutils.get_or_insert_function(builder.module, kind, name)
        start = ir.Constant(wide.element, 0.0)
        return builder.call(total, [start, numbers], fastmath=("reassoc",))

    return types.float64(lane), generate


# Loops over so few numbers are unrolled before they are vectorised, and then are not any more.
def _scale(e_type, to_type, count):
    """`count` numbers of e from start on, times f, to the same place of `to`."""

    def generate(context, builder, signature, arguments):
        e, start, f, to = arguments
        source, scalar, _ = _vector_at(context, builder, e_type, e, start, count)
        target, _, _ = _vector_at(context, builder, to_type, to, start, count)
        size = context.get_abi_sizeof(scalar)
        product = builder.fmul(builder.load(source, align=size), _splat(builder, f, count))
        builder.store(product, target, align=size)
        return context.get_dummy_value()

    return types.none(e_type, types.intp, e_type.dtype, to_type), generate


@intrinsic
def scale_step(typing_context, e, start, f, to):
    return _scale(e, to, STEP)


@intrinsic
def scale_four(typing_context, e, start, f, to):
    return _scale(e, to, 4)


@intrinsic
def scale_eight(typing_context, e, start, f, to):
    return _scale(e, to, EIGHT)


@intrinsic
def can_permute(typing_context, like):
    """Whether scale_sixteen is there for numbers of the type of an array."""
    able = any(dtype == like.dtype for dtype, _ in _permute)
    return types.boolean(like), lambda *_: ir.IntType(1)(able)


def _of_sixteen(context, builder, real, arguments, factors, finish):
    """16 rows of n numbers, at most SHORT_ROW, in one run from an index on.

    A vector of numbers takes what is theirs of each array of factors, one a row from `first` on,
    from a vector of rows: finish is called with the index of the numbers, that from the start of
    the run, and these.  Number i is of row i / n, which is i * share / 2**24, share being 2**24 / n
    rounded up.
    """
    start, n, share, first = arguments
    count = max((count for dtype, count in _permute if dtype == real), default=0)
    if not count:
        return context.get_dummy_value()
    size, vector = real.bitwidth // 8, ir.VectorType(context.get_data_type(real), count)
    numbers = _numbers(size, count)
    permute = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(vector, [vector, numbers.type]), _permute[real, count]
    )
    shift = _splat(builder, ir.Constant(numbers.type.element, 24), count)
    shares = _splat(builder, _narrow(builder, share, size), count)
    own = builder.mul(numbers, shares)
    step = builder.mul(shares, _splat(builder, numbers.type.element(count), count))

    def load(array_type, array, index):
        place, _, _ = _vector_at(context, builder, array_type, array, index, count)
        return builder.load(place, align=size)

    def store(vector, array_type, array, index):
        place, _, _ = _vector_at(context, builder, array_type, array, index, count)
        builder.store(vector, place, align=size)

    for group in range(0, STEP, count):
        group = ir.Constant(n.type, group)
        of_rows = [load(*factor, builder.add(first, group)) for factor in factors]
        begin = builder.add(start, builder.mul(group, n))
        owner = cgutils.alloca_once_value(builder, own)
        with cgutils.for_range(builder, n) as loop:
            i = builder.mul(loop.index, ir.Constant(n.type, count))
            owners = builder.load(owner)
            row = builder.lshr(owners, shift)
            each = [builder.call(permute, [factor, row]) for factor in of_rows]
            finish(load, store, builder.add(begin, i), i, *each)
            builder.store(builder.add(owners, step), owner)
    return context.get_dummy_value()


@intrinsic
def scale_sixteen(typing_context, e, start, n, share, first, f, to):
    """Sixteen rows of n numbers times a factor each, to the same place of `to`."""

    def generate(context, builder, signature, arguments):
        e, *places, f, to = zip(signature.args, arguments, strict=True)

        def finish(load, store, i, _, factor):
            store(builder.fmul(load(*e, i), factor), *to, i)

        return _of_sixteen(context, builder, e[0].dtype, [p[1] for p in places], [f], finish)

    index = types.intp
    return types.none(e, index, index, index, index, f, to), generate


@intrinsic
def spread_sixteen(typing_context, to, start, n, share, first, f):
    """Sixteen rows of n numbers, each its factor."""

    def generate(context, builder, signature, arguments):
        to, *places, f = zip(signature.args, arguments, strict=True)

        def finish(load, store, i, _, factor):
            store(factor, *to, i)

        return _of_sixteen(context, builder, to[0].dtype, [p[1] for p in places], [f], finish)

    index = types.intp
    return types.none(to, index, index, index, index, f), generate


@intrinsic
def smooth_sixteen(typing_context, e, start, n, share, first, f, s, weight, to):
    """As scale_sixteen, less a share each of the weights."""

    def generate(context, builder, signature, arguments):
        e, *places, f, s, weight, to = zip(signature.args, arguments, strict=True)

        def finish(load, store, i, k, factor, share):
            product = builder.fmul(load(*weight, k), share)
            store(builder.fsub(builder.fmul(load(*e, i), factor), product), *to, i)

        return _of_sixteen(context, builder, e[0].dtype, [p[1] for p in places], [f, s], finish)

    index = types.intp
    return types.none(e, index, index, index, index, f, s, weight, to), generate


@intrinsic
def shift_sixteen(typing_context, x, start, n, share, first, m, rest, to):
    """Sixteen rows of n numbers less two for each row, to the same place of `to`."""

    def generate(context, builder, signature, arguments):
        x, *places, m, rest, to = zip(signature.args, arguments, strict=True)

        def finish(load, store, i, _, m, rest):
            store(builder.fsub(builder.fsub(load(*x, i), m), rest), *to, i)

        return _of_sixteen(context, builder, to[0].dtype, [p[1] for p in places], [m, rest], finish)

    index = types.intp
    return types.none(x, index, index, index, index, m, rest, to), generate


@intrinsic
def add_step(typing_context, lane, place, e, start, width):
    """Add to STEP lanes from place on the numbers of e from start on, but no more than width."""

    def generate(context, builder, signature, arguments):
        lane_type, _, e_type, _, _ = signature.args
        lane, place, e, start, width = arguments
        sums, scalar, vector = _vector_at(context, builder, lane_type, lane, place)
        source, _, _ = _vector_at(context, builder, e_type, e, start)
        size = context.get_abi_sizeof(scalar)
        inside = builder.icmp_signed(
            "<", _numbers(size), _splat(builder, _narrow(builder, width, size))
        )
        values = builder.load(source, align=size)
        values = builder.select(inside, values, ir.Constant(vector, [0.0] * STEP))
        builder.store(builder.fadd(builder.load(sums, align=size), values), sums, align=size)
        return context.get_dummy_value()

    return types.none(lane, types.intp, e, types.intp, types.intp), generate


def _smaller(builder, a, b):
    return builder.select(builder.fcmp_ordered("<", a, b), a, b)


def _larger(builder, a, b):
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


# A sum without its largest term, and that term, go as a pair: others are added by pairs, too. No
# term is negative; NaN gets into the sum.
def _add_to_pair(builder, pair, value):
    s, t = pair
    return builder.fadd(s, _smaller(builder, t, value)), _larger(builder, value, t)


def _add_pairs(builder, pair, other):
    s, t = pair
    return _add_to_pair(builder, (builder.fadd(s, other[0]), t), other[1])


def _shuffle(builder, a, b, mask):
    mask = ir.Constant(ir.VectorType(ir.IntType(32), len(mask)), mask)
    return builder.shuffle_vector(a, b, mask)


@intrinsic
def fold_top(typing_context, others, top):
    """Of LANES pairs of a sum and what it leaves out one, in the first lanes; by halves."""

    def generate(context, builder, signature, arguments):
        zero = context.get_constant(types.intp, 0)
        places = [
            _vector_at(context, builder, array, value, zero, LANES)[0]
            for array, value in zip(signature.args, arguments, strict=True)
        ]
        size = others.dtype.bitwidth // 8
        pair, count = [builder.load(place, align=size) for place in places], LANES
        while count > 1:
            low, high = range(count // 2), range(count // 2, count)
            pair = _add_pairs(
                builder, *([_shuffle(builder, v, v, list(half)) for v in pair]
                           for half in (low, high))
            )  # fmt: skip
            count //= 2
        for place, value in zip(places, pair, strict=True):
            scalar = builder.bitcast(place, value.type.element.as_pointer())
            builder.store(builder.extract_element(value, ir.IntType(32)(0)), scalar)
        return context.get_dummy_value()

    return types.none(others, top), generate


def _fold_eight(context, builder, array_type, array, start, step, n, nothing, add, join):
    """Of eight rows of n numbers, `step` apart, the first from array[start] on: in each lane what
    a row comes to, starting from nothing, as add takes numbers and join two such parts.

    Of each row the numbers at distance 8, the last of which goes to the eighth part, then these
    eight, by halves.  Reads up to seven numbers before the rows.
    """
    scalar = context.get_data_type(array_type.dtype)
    size = context.get_abi_sizeof(scalar)
    begins = [start]
    for _ in range(EIGHT - 1):  # products of the step would be more than there are registers
        begins.append(builder.add(begins[-1], step))

    def constant(number):
        return ir.Constant(n.type, number)

    def load(row, c):
        index = builder.add(begins[row], c)
        source, _, _ = _vector_at(context, builder, array_type, array, index, EIGHT)
        return builder.load(source, align=size)

    def join_halves(a, b, *masks):
        return join(builder, *([_shuffle(builder, x, y, mask) for x, y in zip(a, b, strict=True)]
                               for mask in masks))  # fmt: skip

    # The first vector begins before the row, so that the last one ends with it.
    width = builder.add(builder.and_(builder.sub(n, constant(1)), constant(7)), constant(1))
    before = builder.sub(width, constant(EIGHT))
    numbers = ir.Constant(ir.VectorType(n.type, EIGHT), list(range(-EIGHT, 0)))
    inside = builder.icmp_signed(">=", builder.add(_splat(builder, width, EIGHT), numbers),
                                 ir.Constant(numbers.type, [0] * EIGHT))  # fmt: skip
    empty = [ir.Constant(ir.VectorType(scalar, EIGHT), [number] * EIGHT) for number in nothing]
    parts = [
        [cgutils.alloca_once_value(builder, value) for value in
         add(builder, empty, builder.select(inside, load(row, before), empty[-1]))]
        for row in range(EIGHT)
    ]  # fmt: skip
    rest = builder.lshr(builder.sub(n, width), constant(3))
    with cgutils.for_range(builder, rest) as loop:
        c = builder.add(width, builder.mul(loop.index, constant(EIGHT)))
        for row, part in enumerate(parts):
            values = add(builder, [builder.load(p) for p in part], load(row, c))
            for value, place in zip(values, part, strict=True):
                builder.store(value, place)
    a = [[builder.load(p) for p in part] for part in parts]
    a = [
        join_halves(a[i], a[i + 4], [0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15])
        for i in range(4)
    ]
    a = [
        join_halves(a[i], a[i + 1], [0, 1, 8, 9, 4, 5, 12, 13], [2, 3, 10, 11, 6, 7, 14, 15])
        for i in (0, 2)
    ]
    return join_halves(*a, [0, 2, 8, 10, 4, 6, 12, 14], [1, 3, 9, 11, 5, 7, 13, 15])


@intrinsic
def sum_eight(typing_context, e, start, step, n, to, to_start):
    """The sums of n numbers in each of eight rows, as _fold_eight adds them up."""

    def generate(context, builder, signature, arguments):
        e_type, _, _, _, to_type, _ = signature.args
        e, start, step, n, to, to_start = arguments
        (total,) = _fold_eight(
            context, builder, e_type, e, start, step, n, [0.0],
            lambda builder, a, value: [builder.fadd(a[0], value)],
            lambda builder, a, b: [builder.fadd(a[0], b[0])],
        )  # fmt: skip
        place, _, _ = _vector_at(context, builder, to_type, to, to_start, EIGHT)
        builder.store(total, place, align=to_type.dtype.bitwidth // 8)
        return context.get_dummy_value()

    index = types.intp
    return types.none(e, index, index, index, to, index), generate


@intrinsic
def top_eight(typing_context, x, x_start, e, start, step, n, maximum, others, top, to_start):
    """Of eight rows the maxima of x, and of e the sums without the largest, and that."""

    def generate(context, builder, signature, arguments):
        x, x_start, e, start, step, n, maximum, others, top, to_start = arguments
        x_type, _, e_type, *_ = signature.args
        results = [
            *_fold_eight(
                context, builder, x_type, x, x_start, step, n, [float("-inf")],
                lambda builder, a, value: [_larger(builder, value, a[0])],
                lambda builder, a, b: [_larger(builder, b[0], a[0])],
            ),
            *_fold_eight(
                context, builder, e_type, e, start, step, n, [0.0, 0.0], _add_to_pair, _add_pairs
            ),
        ]  # fmt: skip
        arrays = [(signature.args[6], maximum), (signature.args[7], others),
                  (signature.args[8], top)]  # fmt: skip
        for value, (array_type, array) in zip(results, arrays, strict=True):
            place, _, _ = _vector_at(context, builder, array_type, array, to_start, EIGHT)
            builder.store(value, place, align=array_type.dtype.bitwidth // 8)
        return context.get_dummy_value()

    index = types.intp
    return types.none(x, index, e, index, index, index, maximum, others, top, index), generate


@intrinsic
def transpose(typing_context, source, source_start, source_step, to, to_start, to_step):
    """Eight runs of eight numbers: to[i][j] = source[j][i], the runs so many numbers apart."""

    def generate(context, builder, signature, arguments):
        source_value, source_start, source_step, to_value, to_start, to_step = arguments
        vector = ir.VectorType(context.get_data_type(source.dtype), 8)
        size = source.dtype.bitwidth // 8

        def run(array_type, array, start, step, i):
            index = builder.add(start, builder.mul(step, ir.Constant(step.type, i)))
            return _place(context, builder, array_type, array, index, vector)

        a = [
            builder.load(run(source, source_value, source_start, source_step, i)) for i in range(8)
        ]
        for load in a:
            load.align = size
        b = []
        for i in range(0, 8, 2):
            b.append(_shuffle(builder, a[i], a[i + 1], [0, 8, 1, 9, 4, 12, 5, 13]))
            b.append(_shuffle(builder, a[i], a[i + 1], [2, 10, 3, 11, 6, 14, 7, 15]))
        a = []
        for i in (0, 1, 4, 5):
            a.append(_shuffle(builder, b[i], b[i + 2], [0, 1, 8, 9, 4, 5, 12, 13]))
            a.append(_shuffle(builder, b[i], b[i + 2], [2, 3, 10, 11, 6, 7, 14, 15]))
        low = [_shuffle(builder, a[i], a[i + 4], [0, 1, 2, 3, 8, 9, 10, 11]) for i in range(4)]
        high = [_shuffle(builder, a[i], a[i + 4], [4, 5, 6, 7, 12, 13, 14, 15]) for i in range(4)]
        for i, values in enumerate(low + high):
            builder.store(values, run(to, to_value, to_start, to_step, i)).align = size
        return context.get_dummy_value()

    index = types.intp
    return types.void(source, index, index, to, index, index), generate


@intrinsic
def prefetch(typing_context, array, index):
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
def stream_line(typing_context, to, to_index, source, source_index):
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


@intrinsic
def end_stream(typing_context):
    """What was streamed is there for other threads to see."""

    def generate(context, builder, signature, arguments):
        _sse(builder, "sfence")
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def set_float_mode(typing_context, mode):
    """Set how this thread rounds and whether it flushes denormals; return how it was."""

    def generate(context, builder, signature, arguments):
        before = cgutils.alloca_once_value(builder, arguments[0])
        after = cgutils.alloca_once_value(builder, arguments[0])
        byte = ir.IntType(8).as_pointer()
        _sse(builder, "stmxcsr", [builder.bitcast(before, byte)])
        _sse(builder, "ldmxcsr", [builder.bitcast(after, byte)])
        return builder.load(before)

    return types.uint32(types.uint32), generate


@intrinsic
def convert_half(typing_context, number):
    """From the bits of a float16 to float32, or back: one instruction where HAS_F16C."""
    to_float = isinstance(number, types.Integer)

    def generate(context, builder, signature, arguments):
        (value,) = arguments
        half, real = ir.HalfType(), ir.FloatType()
        if to_float:
            return builder.fpext(builder.bitcast(value, half), real)
        return builder.bitcast(builder.fptrunc(value, half), ir.IntType(16))

    return types.float32(types.uint16) if to_float else types.uint16(types.float32), generate


@intrinsic
def load_index(typing_context, data, kind, index):
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
def call_share(typing_context, address, arguments, units, thread, threads):
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
def must_be_compiled(typing_context, share, arguments):
    """Fail where no such share was compiled: one called by its address asks for no types."""

    def flat(kinds):
        for kind in kinds:
            if isinstance(kind, types.BaseTuple):
                yield from flat(kind.types)
            else:
                yield kind.copy(readonly=False) if isinstance(kind, types.Array) else kind

    wanted = [*flat(arguments.types), types.intp, types.intp, types.intp]
    if wanted not in [[*flat(kinds)] for kinds in share.dispatcher.overloads]:
        raise TypingError(f"no {share} was compiled for {wanted}")
    return types.void(share, arguments), lambda context, *_: context.get_dummy_value()


def _sse(builder, name, arguments=()):
    """Call one of the instructions that only x86 has; elsewhere do nothing."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        function_type = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
        name = f"llvm.x86.sse.{name}"
        function = cgutils.get_or_insert_function(builder.module, function_type, name)
        builder.call(function, arguments)
