"""Calls that mean harm, for the fuzzers: any memory, any type, any value, `out` lying anywhere.

`draw` makes a call of a public function and knows what is wrong with it; `complaint` makes the
call and judges. A call with nothing wrong must give what the reference gives on plain copies; one
with something wrong must raise an error that names what is wrong. Either way no byte changes that
`out` does not cover, and none at all where an error is raised.

All chance comes from the `random.Random` that is passed in, so that hypothesis can shrink a call,
and a seed and a number are enough to repeat one.
"""

import contextlib
import itertools
import math
import re
from fractions import Fraction
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

import fastloss as fl
from fastloss._contract import INDEX_OPTIONS, Options
from fastloss._operations import BY_FUNCTION, OPERATIONS

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOATS = [np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.float16), BFLOAT16]
INTEGERS = [np.dtype(f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)]
REALS = [*FLOATS, *INTEGERS, np.dtype(np.longdouble)]
FOREIGN = [
    np.dtype(name)
    for name in ("?", "c8", "c16", "O", "S3", "U3", "M8[s]", "m8[s]", "V4", "f4,i4", "g")
] + [np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.int4), np.dtypes.StringDType()]
EXTREMES = [0.0, -0.0, 1.0, np.inf, -np.inf, np.nan, 3e38, -3e38, 1e-45, 87.5, -88.0, 1e5, -65504]
SIDES = [0, 1, 1, 2, 2, 3, 4, 5, 7, 8, 9, 16, 17, 31, 33, 63, 64, 65, 127, 130, 299, 301, 1025]
FUNCTIONS = tuple(BY_FUNCTION)
FAMILY = {name: operation.family for name, operation in BY_FUNCTION.items()}
WITH_OUT = [
    name for name in FUNCTIONS if not BY_FUNCTION[name].is_loss or name.endswith("_with_grad")
]
ARRAYS = tuple(
    dict.fromkeys(
        name for operation in OPERATIONS.values() for name in operation.inputs + operation.arrays
    )
)
SCORES = tuple({operation.scores for operation in OPERATIONS.values()})


class Call(NamedTuple):
    name: str
    arguments: dict[str, Any]
    wrong: frozenset[str]  # the arguments that are wrong: the error must name one of them
    memories: list[np.ndarray]  # the bytes that arrays lie in, gaps and surroundings included
    out_bytes: list[tuple[int, np.ndarray]]  # the memories that `out` lies in, and where
    raising: bool  # whether NumPy is told to raise floating-point errors


# ---------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """Where an array lies in some bytes."""

    shape: tuple[int, ...]
    offset: int
    strides: tuple[int, ...]

    def array(self, memory, dtype):
        return np.ndarray(self.shape, dtype, memory, self.offset, self.strides)


def _place(rnd, shape, itemsize, room=None):
    """Axes in any order and direction, with gaps; and the bytes that this takes, or None.

    With `room`, somewhere in so many bytes.
    """
    order = list(range(len(shape)))
    plain = rnd.random() < 0.5
    if not plain:
        rnd.shuffle(order)
    strides, step = [0] * len(shape), itemsize
    offset = 0
    for axis in reversed(order):
        if not plain and rnd.random() < 0.2:
            step *= rnd.choice([2, 3])
        strides[axis] = step
        step *= max(shape[axis], 1)
        if not plain and rnd.random() < 0.2:
            offset += max(shape[axis] - 1, 0) * strides[axis]
            strides[axis] = -strides[axis]
    if 0 in shape:
        offset = 0
    if room is not None and step > room:
        return None
    shift = rnd.randint(0, (room - step) // itemsize) if room is not None else rnd.choice([0, 1, 3])
    odd = 0
    if rnd.random() < 0.1 and (room is None or (shift + 1) * itemsize + step <= room):
        odd = rnd.randrange(itemsize)
    offset += shift * itemsize + odd
    size = shift * itemsize + odd + step + rnd.choice([0, 0, itemsize, 64, step])
    return Place(tuple(shape), offset, tuple(strides)), size


def arrange(rnd, values, memories, *, writeable=False):
    """The values in an array of any layout, in the midst of bytes that are none of its own."""
    dtype = values.dtype
    if not writeable and dtype != BFLOAT16 and rnd.random() < 0.1:
        dtype = dtype.newbyteorder()
    place, size = _place(rnd, values.shape, dtype.itemsize)
    memory = np.full(size, rnd.choice([0, 1, 0x7F, 0xFF]), np.uint8)
    memories.append(memory)
    array = place.array(memory, dtype)
    array[...] = values
    if not writeable:
        if rnd.random() < 0.1:
            array = _repeating(rnd, array)
        if rnd.random() < 0.1:
            array.flags.writeable = False
    return array


def _repeating(rnd, array):
    """A view whose elements share memory: all the same along some axes, or sliding windows."""
    if array.ndim == 0 or array.size == 0:
        return array
    axis = rnd.randrange(array.ndim)
    if rnd.random() < 0.7 or array.ndim < 2:
        one = array[(slice(None),) * axis + (slice(0, 1),)]
        return np.broadcast_to(one, array.shape)
    line = array.reshape(-1)  # mostly a copy, which is as good
    strides = line.strides * array.ndim
    return np.lib.stride_tricks.as_strided(line, array.shape, strides, writeable=False)


class Box:
    """An array-like that is no array."""

    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        return self.array


class Interface:
    def __init__(self, array):
        self.array = array
        self.__array_interface__ = array.__array_interface__


class Sub(np.ndarray):
    pass


class Awkward:
    """An array-like that has none."""

    def __array__(self, dtype=None, copy=None):
        return "no array"


def wrap(rnd, array):
    """The same values as something else than a plain ndarray, now and then."""
    if rnd.random() < 0.75:
        return array
    kind = rnd.choice(["list", "tuple", "box", "interface", "buffer", "subclass", "matrix"])
    standard = array.dtype in REALS and array.dtype != BFLOAT16
    if kind in ("list", "tuple") and array.size < 200 and standard and array.dtype.char != "g":
        return tuple(array.tolist()) if kind == "tuple" and array.ndim else array.tolist()
    if kind == "box":
        return Box(array)
    if kind == "interface" and standard:
        return Interface(array)
    if kind == "buffer" and standard and array.ndim and array.dtype.isnative and array.size:
        return memoryview(array)
    if kind == "subclass":
        return array.view(rnd.choice([Sub, np.recarray]))
    if kind == "matrix" and array.ndim == 2:
        return array.view(np.matrix)
    return array


def read(value):
    """A plain copy of what is passed, as the oracle reads it; masks stay what they are."""
    if isinstance(value, np.ma.MaskedArray):
        return value.copy()
    array = np.array(np.asarray(value))
    return array.astype(array.dtype.newbyteorder("=")) if not array.dtype.isnative else array


# ---------------------------------------------------------------------------------------------
# Values
# ---------------------------------------------------------------------------------------------


def _shape(rnd):
    while True:
        shape = [rnd.choice(SIDES) for _ in range(rnd.choice([1, 2, 2, 2, 3, 3, 4]))]
        size = math.prod(max(n, 1) for n in shape)
        if size <= 2000 or (rnd.random() < 0.002 and size <= 200_000):
            return tuple(shape)


def draw_scores(rnd, shape, dtype, tame):
    rng = np.random.default_rng(rnd.getrandbits(32))
    kind = "tame" if tame else rnd.choice(["tame", "tame", "wide", "extreme"])
    x = rng.standard_normal(shape) * (100 if kind == "wide" else 3)
    if kind == "extreme":
        x = np.where(rng.random(shape) < 0.3, rng.choice(EXTREMES, shape), x)
    with np.errstate(all="ignore"):
        return np.asarray(x).astype(dtype)


def _indices(rnd, shape, num_classes, ignored):
    dtype = rnd.choice(INTEGERS)
    limit = min(num_classes, np.iinfo(dtype).max + 1)
    rng = np.random.default_rng(rnd.getrandbits(32))
    indices = rng.integers(0, max(limit, 1), shape)
    if np.iinfo(dtype).min <= ignored <= np.iinfo(dtype).max and rnd.random() < 0.5:
        indices = np.where(rng.random(shape) < 0.3, ignored, indices)
    return np.asarray(indices).astype(dtype)


def _probabilities(rnd, shape):
    rng = np.random.default_rng(rnd.getrandbits(32))
    t = rng.random(shape)
    return np.asarray(np.where(t < 0.3, 0, t)).astype(rnd.choice([*FLOATS, np.longdouble]))


def _answers(rnd, shape):
    rng = np.random.default_rng(rnd.getrandbits(32))
    t = np.asarray(rng.random(shape))
    dtype = rnd.choice([*REALS, np.dtype(bool)])
    return (t if dtype.kind == "f" and rnd.random() < 0.5 else t < 0.3).astype(dtype)


def _weights(rnd, shape):
    rng = np.random.default_rng(rnd.getrandbits(32))
    dtype = rnd.choice([*REALS, np.dtype(bool)])
    return np.asarray(rng.integers(0 if dtype.kind == "u" else -3, 4, shape)).astype(dtype)


# What may be passed instead of a number, and whether it is wrong.
_FACTOR = (
    [0.0, 0, 0.01, np.float32(0.5), Fraction(1, 100)],
    [-1e-4, np.nan, np.inf, 10**400, "0", None, 0.5j, np.complex64(0.5), [1.0, 2.0], object()],
)
NUMBERS = {
    **{option: _FACTOR for operation in OPERATIONS.values() for option in operation.options},
    "axis": (
        [0, -1, np.int64(-1), np.array(0), False],
        [99, -99, 0.0, None, "0", [0], (0, 1), 1 << 70, np.array([0, 1]), 1j, np.float32(0)],
    ),
    "num_threads": (
        [None, 1, 2, 3, 5, np.uint8(2), np.array(2)],
        [0, -1, 1 << 40, 10**30, 2.0, "2", True, np.True_, np.array([1, 2]), [2], np.nan],
    ),
    "label_smoothing": (
        [0.0, 0, 0.1, 1, np.float16(0.5), np.array(0.25), Fraction(1, 3), False,
         BFLOAT16.type(0.5)],
        [-0.1, 1.5, np.nan, np.inf, 10**400, "0.1", b"0", bytearray(b"0"), memoryview(b"0"), None,
         0.5j, np.complex64(0.5), np.array(0.5j), np.array("0.5"), np.str_("0.5"), [0.1, 0.2],
         np.zeros(2), np.timedelta64(0, "s"), np.array(0, "m8[s]"), np.ma.masked],
    ),
    "alpha": (
        [None, 0, 0.25, 1, np.float32(0.5), Fraction(1, 3)],
        [-0.1, 1.5, np.nan, 10**400, "1", 1j, [0.5], object()],
    ),
    "temperature": (
        [1.0, 1, 0.5, 7, np.float32(0.01), Fraction(1, 3), 1e4],
        [0, -1, 1e-5, 1e5, np.nan, np.inf, 10**400, "1", None, 1j, [1.0], object()],
    ),
    "epsilon": (
        [0.0, -1, -0.5, 2.5, np.float32(-3), Fraction(1, 3)],
        [np.nan, np.inf, -(10**400), "1", None, 1j, [1.0], object()],
    ),
    "normalizer": (
        [None, 1, 12.5, np.int8(3), Fraction(7, 2)],
        [0, -1, np.nan, np.inf, 10**400, "6", 6j, np.complex128(6), np.zeros(3), bytearray(b"6")],
    ),
    "ignore_index": (
        [-100, -1, 0, 2, np.int8(-1), np.uint64(7), (1 << 63) - 1, -(1 << 63)],
        [1 << 63, -(1 << 63) - 1, 10**400, np.uint64(1 << 63), 1.0, None, "1", [1],
         np.zeros(2, int)],
    ),
    "reduction": (["mean", "sum", "none", np.str_("sum")], ["", "Mean", None, 1, b"sum", ["sum"]]),
}  # fmt: skip
GARBAGE = [
    None, "scores", b"x", {}, set(), object(), slice(3), float, [[1.0, 2.0], [3.0]], [[], [1.0]],
    [None, 1.0], [1.0, 10**400], ["a"], [object()], Awkward(), [1j], range, lambda: 0, Ellipsis,
    np.ma.masked, [np.ma.masked_array([1.0, 2.0], [0, 1])], iter([1.0]),
]  # fmt: skip


# ---------------------------------------------------------------------------------------------
# Calls
# ---------------------------------------------------------------------------------------------


def draw(rnd):
    """A call of any function."""
    # Most of all what has most to it.
    name = rnd.choice((*FUNCTIONS, "cross_entropy_with_grad", "cross_entropy_with_grad"))
    operation = BY_FUNCTION[name]
    memories = []
    wrong = set()
    shape = _shape(rnd)
    axis = rnd.randrange(-len(shape), len(shape))
    dtype = rnd.choice(FLOATS)
    scores_name, backward = operation.scores, operation.family == "backward"
    values = draw_scores(rnd, shape, dtype, tame=backward)
    if backward:
        values = -np.abs(values)  # of log-probabilities the exponentials are at most 1
    scores = wrap(rnd, arrange(rnd, values, memories))
    dtype = read(scores).dtype  # lists have their own
    if dtype.kind in "iu":
        dtype = np.dtype(float)
    shape = np.shape(read(scores))  # of lists of no rows
    arguments = {scores_name: scores}
    if shape != values.shape:
        axis = -1
        wrong.update(() if len(shape) == 1 and shape[0] else (scores_name,))
    if shape[axis] == 0:
        wrong.add(scores_name)
    rows = shape[:axis] + shape[axis:][1:] if axis != -1 else shape[:-1]
    if backward:
        g = draw_scores(rnd, shape, dtype, tame=True)
        arguments["grad_output"] = arrange(rnd, g, memories)
    if operation.is_loss:
        draw_loss(rnd, operation, arguments, wrong, shape, rows, shape[axis], memories)
    arguments["axis"] = axis
    if rnd.random() < 0.3:
        arguments["num_threads"] = rnd.choice(NUMBERS["num_threads"][0])
    if rnd.random() < 0.25:
        _spoil(rnd, arguments, wrong, shape, operation.family == "binary")
    out_bytes = []
    if name in WITH_OUT and rnd.random() < 0.7:
        per_row = operation.family == "map" and operation.returns == "rows"
        out_shape = rows if per_row else shape
        covered = draw_out(rnd, arguments, wrong, out_shape, dtype, memories)
        out_bytes = [covered] if covered else []
    return Call(name, arguments, frozenset(wrong), memories, out_bytes, rnd.random() < 0.1)


def draw_loss(rnd, operation, arguments, wrong, shape, rows, num_classes, memories):
    ignored, binary = -100, operation.family == "binary"
    if operation.family == "loss" and rnd.random() < 0.3:
        ignored = arguments["ignore_index"] = rnd.choice(NUMBERS["ignore_index"][0])
    if operation.family == "scores":
        target = None
    elif binary:
        target = _answers(rnd, shape)
    elif operation.soft and rnd.random() < 0.3:
        target = _probabilities(rnd, shape)
    else:
        target = _indices(rnd, rows, num_classes, int(ignored))
    if target is not None:
        wrapped = wrap(rnd, arrange(rnd, target, memories))
        # A list of nothing does not say what it is a list of.
        arguments["target"] = wrapped if target.size else target
    for weights in operation.arrays:
        weights_shape = rows if weights == "sample_weight" else (num_classes,)
        if rnd.random() < 0.3:
            values = _weights(rnd, weights_shape)
            wrapped = wrap(rnd, arrange(rnd, values, memories))
            arguments[weights] = values if np.shape(read(wrapped)) != values.shape else wrapped
    for option in (*operation.options, "reduction", "normalizer"):
        if rnd.random() < 0.3:
            arguments[option] = rnd.choice(NUMBERS[option][0])
    if operation.family == "loss" and target.dtype.kind not in "iu":
        defaults = Options._field_defaults
        wrong.update(o for o in INDEX_OPTIONS if arguments.get(o, defaults[o]) != defaults[o])
    reduction = arguments.get("reduction", operation.reduction)
    if arguments.get("normalizer") is not None and reduction != "mean":
        wrong.add("normalizer")


def _spoil(rnd, arguments, wrong, shape, binary):
    """Make one argument wrong."""
    name = rnd.choice(list(arguments))
    if name in NUMBERS:
        arguments[name] = rnd.choice(NUMBERS[name][1])
        wrong.add(name)
        return
    array = read(arguments[name])
    how = rnd.choice(["garbage", "dtype", "shape", "masked", "value"])
    if how == "garbage" and "weight" not in name:
        arguments[name] = rnd.choice(GARBAGE)
    elif how == "dtype":
        dtype = rnd.choice(FOREIGN)
        if is_read(dtype, name, binary):
            return
        arguments[name] = np.zeros(array.shape, dtype)
    elif how == "shape" and name in SCORES:
        arguments[name] = array.reshape(-1)[:0]
    elif how == "shape":
        arguments[name] = rnd.choice([array[None], np.zeros((*array.shape, 2), array.dtype)])
    elif how == "value" and "target" in arguments:
        spoil_value(rnd, arguments, wrong, shape, binary)
        return
    else:
        arguments[name] = np.ma.masked_array(array, rnd.choice([False, True]))
    wrong.add(name)


def is_read(dtype, name, binary=False):
    """Whether one of the foreign types is none there."""
    weights = dict.fromkeys(("weight", "sample_weight", "pos_weight"), "g?")
    return dtype.char in {"target": "g?" if binary else "g", **weights}.get(name, "")


def spoil_value(rnd, arguments, wrong, shape, binary=False):
    """A target out of range, or a weight that is none."""
    names = ("target", "weight", "sample_weight", "pos_weight")
    name = rnd.choice([name for name in names if name in arguments])
    array = read(arguments[name])
    if array.size == 0 or (name == "target" and (binary or array.dtype.kind not in "iu")):
        return
    if name == "target":
        array = array.astype(rnd.choice(INTEGERS[1:4] + INTEGERS[5:]))
        info = np.iinfo(array.dtype)
        ignored = int(arguments.get("ignore_index", -100))
        bad = rnd.choice([info.max, info.max - 1, info.min or info.max, 2000])
        if bad == ignored:
            return
    else:
        array, bad = array.astype(float), rnd.choice([np.nan, np.inf, -np.inf])
    array.flat[rnd.randrange(array.size)] = bad
    arguments[name] = array
    wrong.add(name)


def draw_out(rnd, arguments, wrong, shape, dtype, memories):
    """`out` of its own, or an input, or anywhere in the memory of one; returns what it covers."""
    kind = rnd.choice(["own", "own", "input", "near", "near", "near", "wrong"])
    if kind == "wrong":
        _draw_wrong_out(rnd, arguments, wrong, shape, dtype, memories)
        return None
    if kind == "input":
        for name in (*ARRAYS, "inputs", "linear_weight", "linear_bias"):
            array = arguments.get(name)
            fits = isinstance(array, np.ndarray) and not isinstance(array, np.ma.MaskedArray)
            # What was made wrong, or is empty, may lie in memory that nobody watches.
            fits = fits and any(np.may_share_memory(array, memory) for memory in memories)
            if fits and array.shape == shape and array.dtype == dtype and array.flags.writeable:
                arguments["out"] = array
                return _cover(array, memories)
    if kind == "near" and memories:
        memory = rnd.choice(memories)
        found = _place(rnd, shape, dtype.itemsize, memory.size)
        if found:
            arguments["out"] = found[0].array(memory, dtype)
            return _cover(arguments["out"], memories)
    out = arrange(rnd, np.zeros(shape, dtype), memories, writeable=True)
    if rnd.random() < 0.2:
        out = out.view(rnd.choice([Sub, np.matrix] if out.ndim == 2 else [Sub]))
    arguments["out"] = out
    return _cover(out, memories)


def _draw_wrong_out(rnd, arguments, wrong, shape, dtype, memories):
    values = np.zeros(shape, dtype)
    kinds = ["dtype", "shape", "read-only", "list", "masked", "nothing", "swapped"]
    if values.size > 1:
        kinds += ["overlapping", "overlapping"]
    kind = rnd.choice(kinds)
    if kind == "dtype":
        out = values.astype(rnd.choice([d for d in [*REALS, np.dtype("O")] if d != dtype]))
    elif kind == "swapped" and dtype != BFLOAT16:
        out = values.astype(dtype.newbyteorder())
    elif kind == "shape":
        out = np.zeros(rnd.choice([(*shape, 1), (1, *shape), (*shape, 2)]), dtype)
    elif kind == "list":
        out = values.tolist()
    elif kind == "masked":
        out = np.ma.masked_array(values)
    elif kind == "nothing":
        out = rnd.choice(["out", 0, (), object(), memoryview(b"ab"), dtype.type(0)])
    elif kind == "overlapping":
        long = [axis for axis, n in enumerate(shape) if n > 1]
        strides = list(values.strides)
        strides[rnd.choice(long)] = rnd.choice([0, dtype.itemsize // 2])
        memories.append(np.zeros(2 * values.nbytes, np.uint8))
        out = np.ndarray(shape, dtype, memories[-1], 0, strides)
    else:
        out = values
        out.flags.writeable = False
    arguments["out"] = out
    wrong.add("out")


def _cover(out, memories):
    """The number of the memory that `out` lies in, and which bytes of it are its own."""
    if out.size == 0:
        return None
    low, high = np.lib.array_utils.byte_bounds(out)
    for number, memory in enumerate(memories):
        start, end = np.lib.array_utils.byte_bounds(memory)
        if start <= low and high <= end:
            covered = np.zeros(memory.size, bool)
            offset = out.__array_interface__["data"][0] - start
            place = Place((*out.shape, out.itemsize), offset, (*out.strides, 1))
            place.array(covered, np.dtype(bool))[...] = True
            return number, covered
    raise AssertionError("out lies in no memory that is watched")


def mutate(rnd, call):
    """Other values in the same arrays: nothing may be remembered from the call before."""
    target = call.arguments.get("target")
    if call.out_bytes:  # which may have gone over the other arguments
        return None
    if call.wrong or not isinstance(target, np.ndarray) or not target.flags.writeable:
        return None
    if target.size < 2:
        return None
    flat = target.reshape(-1)
    target[...] = np.roll(flat, rnd.randrange(1, flat.size)).reshape(target.shape)
    return call


# ---------------------------------------------------------------------------------------------
# The verdict
# ---------------------------------------------------------------------------------------------


def complaint(call, backend):
    """What is wrong with how the call went, or None."""
    plain = {
        name: read(value) if name in ARRAYS else value
        for name, value in call.arguments.items()
        if name != "out" and not (name in call.wrong and name in ARRAYS)
    }
    results, report = outcome(call, backend)
    if report or call.wrong:
        return report
    with np.errstate(all="ignore"):
        expected = getattr(fl, call.name)(**plain, backend="numpy")
    if not isinstance(results, tuple):
        results, expected = (results,), (expected,)
    out = call.arguments.get("out")
    if out is not None and results[-1] is not out:
        return "did not return out"
    return next(filter(None, map(_difference, results, expected, itertools.repeat(plain))), None)


def outcome(call, backend):
    """Make the call: what it gives, and what is wrong with its errors and with memory, or None."""
    before = [memory.copy() for memory in call.memories]
    function = getattr(fl, call.name)
    raising = call.raising and backend != "numpy"  # whose temporaries may underflow
    try:
        with np.errstate(all="raise") if raising else contextlib.nullcontext():
            results = function(**call.arguments, backend=backend)
    except (ValueError, TypeError, IndexError) as error:
        if any((a != b).any() for a, b in zip(before, call.memories, strict=True)):
            return None, f"changed memory and raised {error!r}"
        if not call.wrong:
            return None, f"raised {error!r}"
        if not any(re.search(rf"\b{name}\b", str(error)) for name in call.wrong):
            return None, f"raised {error!r}, which does not name {' or '.join(call.wrong)}"
        return None, None
    if call.wrong:
        return None, f"accepted a wrong {' and '.join(call.wrong)}"
    for number, (a, b) in enumerate(zip(before, call.memories, strict=True)):
        changed = a != b
        for memory, covered in call.out_bytes:
            if memory == number:
                changed &= ~covered
        if changed.any():
            return None, f"changed {changed.sum()} bytes that are not out's"
    return results, None


UNITS = {"float64": 1e-11, "float32": 1e-5, "float16": 2e-3, "bfloat16": 1.6e-2}


def _difference(result, expected, plain):
    """How a result differs from the reference by more than rounding."""
    if type(result) is not float and not isinstance(result, np.ndarray):
        return f"returned a {type(result).__name__}"
    if np.shape(result) != np.shape(expected):
        return f"returned the shape {np.shape(result)} instead of {np.shape(expected)}"
    if np.asarray(result).dtype != np.asarray(expected).dtype:
        return f"returned {np.asarray(result).dtype} instead of {np.asarray(expected).dtype}"
    dtype = next(plain[name] for name in ARRAYS if name in plain).dtype
    unit = UNITS.get(dtype.name, UNITS["float64"])
    got, right = np.asarray(result, np.longdouble), np.asarray(expected, np.longdouble)
    with np.errstate(all="ignore"):
        tolerance = unit * (np.abs(right) + _scale(plain))
        close = np.abs(got - right) <= tolerance
        # At the border of what the dtype holds one may round to infinity and the other not.
        limit = 0.99 * float(ml_dtypes.finfo(np.asarray(result).dtype).max)
        limit = (
            min(limit, 0.99 * float(ml_dtypes.finfo(dtype).max)) if dtype.kind in "fV" else limit
        )
        close |= (
            (np.abs(got) >= limit) & (np.abs(right) >= limit) & (np.sign(got) == np.sign(right))
        )
        close |= (got == right) | (np.isnan(got) & np.isnan(right))
    if close.all():
        return None
    place = tuple(map(int, np.argwhere(~close)[0]))
    return f"returned {got[place]} instead of {right[place]} at {place}, and {(~close).sum()} such"


def _scale(plain):
    """The size of the terms that results are sums of."""
    sizes = {
        name: float(np.abs(np.where(np.isfinite(a), a, 0)).max(initial=0))
        for name in ARRAYS
        if name in plain and (a := np.asarray(plain[name], np.longdouble)) is not None
    }
    heat = float(plain.get("temperature", 1))
    x = max(sizes.get(name, 0) for name in ("logits", "probs", "log_probs")) / heat + 1
    target = plain.get("target")
    t = sizes["target"] if target is not None and np.asarray(target).dtype.kind in "fV" else 1
    z = float(plain.get("z_loss", 0))
    weights = math.prod(
        max(sizes.get(name, 1), 1) for name in ("weight", "sample_weight", "pos_weight")
    )
    g = sizes.get("grad_output", 1) + 1
    return 4 * x * (1 + z * x) * (1 + t) * weights * g / min(heat, 1)


def describe(call):
    """The call in words, for a report."""
    lines = [f"{call.name}(", *(f"    {k} = {_show(v)}," for k, v in call.arguments.items()), ")"]
    lines.append(f"wrong: {', '.join(call.wrong) or 'nothing'}; raising: {call.raising}")
    return "\n".join(lines)


def _show(value: Any) -> str:
    if isinstance(value, tuple) and any(isinstance(part, np.ndarray) for part in value):
        return "\n        ".join(map(_show, value))
    array = value.array if isinstance(value, (Box, Interface)) else value
    if not isinstance(array, np.ndarray):
        return repr(value)[:200]
    return (
        f"{type(value).__name__} of {array.dtype}, shape {array.shape}, strides {array.strides}, "
        f"{'writeable' if array.flags.writeable else 'read-only'}: {array.reshape(-1)[:8]}"
    )
