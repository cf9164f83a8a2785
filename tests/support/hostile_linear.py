"""Calls that mean harm to the linear head; `hostile` says what these are and how they are judged.

What is right is not asked of another backend, for all share the head's own code: scores are made
with NumPy in float64, `cross_entropy_with_grad` gives their losses and gradient, and products the
gradients of the layer. With them comes what rounding may do, from the sizes of what is added up.
"""

import itertools
import math
from fractions import Fraction
from unittest import mock

import numpy as np

import fastloss as fl
from fastloss import linear
from fastloss._operations import OPERATIONS
from support import hostile

try:
    from scipy import sparse
except ImportError:  # it is optional, and inputs then dense
    sparse = None

FUNCTIONS = ("linear_cross_entropy", *3 * ("linear_cross_entropy_with_grad",))
ARRAYS = ("inputs", "linear_weight", "linear_bias", "target", "weight", "sample_weight")
OPTIONAL = ("linear_bias", "weight", "sample_weight")
DTYPES = hostile.FLOATS[:2]
# Little work is cut up like much: into blocks of few rows, and products of few classes.
SMALL = {"_BLOCK_BYTES": 1 << 8, "_LEAST_ROWS": 4, "_PRODUCT_ELEMENTS": 50, "_KERNEL_ELEMENTS": 50}

NUMBERS = {name: hostile.NUMBERS[name] for name in hostile.NUMBERS if name != "axis"} | {
    "l2": (
        [0.0, 0, 0.03, 1, np.float32(0.5), Fraction(1, 100), False, 1e39, 1e-42],
        [-1e-4, np.nan, np.inf, 10**400, "0", None, 0.5j, np.complex64(0.5), [1.0, 2.0], object()],
    ),
    "chunk_rows": (
        [None, 1, 2, 7, 64, 1000, 10**30, np.int8(3), np.array(5)],
        [0, -1, -(10**30), 1.0, np.nan, "3", b"3", [3], np.array([1, 2]), 3j, object()],
    ),
    "inputs_grad": ([True, True, False, np.True_], ["no", None, 0.5, [True], np.zeros(2, bool)]),
    "linear_weight_grad": ([True, False, np.False_], ["no", None, 0.5, [True], np.zeros(2, bool)]),
    "accumulate": ([True, True, False, np.True_], ["no", None, 0.5, [True], np.zeros(2, bool)]),
}  # fmt: skip
NOT_GRADIENTS = ["out", 1, {}, (), (None, None), [None, None, None], np.zeros(3), np.zeros((3, 3))]


# ---------------------------------------------------------------------------------------------
# Calls
# ---------------------------------------------------------------------------------------------


def draw(rnd):
    """A call of either function."""
    name = rnd.choice(FUNCTIONS)
    memories, wrong = [], set()
    lead, num_classes, num_features = _sizes(rnd)
    if num_classes == 0:
        wrong.add("linear_weight")
    labels = {}
    hostile.draw_loss(
        rnd, OPERATIONS["cross_entropy"], labels, wrong, (*lead, num_classes), lead, num_classes,
        memories,
    )  # fmt: skip
    dtype = rnd.choice(DTYPES)
    arguments = _draw_layer(rnd, lead, num_classes, num_features, dtype, labels, memories) | labels
    given = ["l2", "chunk_rows", "num_threads"]
    if name.endswith("grad"):
        given += ["inputs_grad", "linear_weight_grad", "accumulate"]
    for option in given:
        if rnd.random() < 0.4:
            arguments[option] = rnd.choice(NUMBERS[option][0])
    if arguments.get("l2") and arguments.get("reduction") == "none":
        wrong.add("l2")
    if arguments.get("inputs_grad") and _is_sparse(arguments["inputs"]):
        if rnd.random() < 0.1:
            wrong.add("inputs_grad")
        else:
            del arguments["inputs_grad"]
    shapes = {}
    if arguments.get("linear_weight_grad", True):
        shapes["linear_weight"] = num_classes, num_features
    if "linear_bias" in arguments:
        shapes["linear_bias"] = (num_classes,)
    if arguments.get("inputs_grad"):
        shapes["inputs"] = (*lead, num_features)
    out_bytes = []
    if name.endswith("grad") and rnd.random() < (0.95 if arguments.get("accumulate") else 0.6):
        out_bytes = _draw_out(rnd, arguments, wrong, shapes, dtype, memories)
    elif arguments.get("accumulate"):
        wrong.add("accumulate")
    if rnd.random() < 0.2:
        _spoil(rnd, arguments, wrong, (*lead, num_classes))
    return hostile.Call(name, arguments, frozenset(wrong), memories, out_bytes, rnd.random() < 0.1)


def _sizes(rnd):
    while True:
        lead = tuple(rnd.choice(hostile.SIDES) for _ in range(rnd.choice([0, 1, 1, 1, 1, 2, 3])))
        num_classes, num_features = rnd.choice(hostile.SIDES), rnd.choice(hostile.SIDES)
        sides = math.prod(max(n, 1) for n in lead), num_classes, num_features
        if max(a * b for a, b in itertools.combinations(sides, 2)) <= 2000:
            return lead, num_classes, num_features


def _draw_layer(rnd, lead, num_classes, num_features, dtype, labels, memories):
    """Inputs, weight and bias; rows that count for nothing may hold anything."""
    is_sparse = rnd.random() < 0.4 and len(lead) == 1 and sparse is not None
    tame = is_sparse or rnd.random() < 0.7  # zeros that are not there times NaN are not NaN
    inputs = hostile.draw_scores(rnd, (*lead, num_features), dtype, tame)
    if num_classes and rnd.random() < 0.5:
        shares, _ = _shares(_plain(labels), lead)
        inputs[(shares == 0).reshape(lead)] = rnd.choice(hostile.EXTREMES)
    weight = hostile.draw_scores(rnd, (num_classes, num_features), dtype, tame)
    make = _sparse if is_sparse else _array
    layer = {
        "inputs": make(rnd, inputs, memories),
        "linear_weight": _array(rnd, weight, memories),
    }
    if rnd.random() < 0.5:
        bias = hostile.draw_scores(rnd, (num_classes,), dtype, tame)
        layer["linear_bias"] = _array(rnd, bias, memories)
    return layer


def _array(rnd, values, memories):
    """Of any layout and type that reads as it should."""
    array = hostile.arrange(rnd, values, memories)
    wrapped = hostile.wrap(rnd, array)
    plain = hostile.read(wrapped)
    return wrapped if (plain.shape, plain.dtype) == (values.shape, values.dtype) else array


def _sparse(rnd, values, memories):
    """Of any format; the arrays of a CSR matrix lie in memory that is watched."""
    rng = np.random.default_rng(rnd.getrandbits(32))
    some = sparse.csr_array(np.where(rng.random(values.shape) < 0.4, values, 0))
    arrays = some.data, some.indices, some.indptr
    parts, start = [], rnd.choice([0, 256])
    memory = np.zeros(sum(array.nbytes for array in arrays) + 2 * start, np.uint8)
    memories.append(memory)
    for array in arrays:
        parts.append(np.ndarray(array.shape, array.dtype, memory, start))
        parts[-1][...] = array
        start += array.nbytes
    made = rnd.choice([sparse.csr_array, sparse.csr_matrix])(some)
    made.data, made.indices, made.indptr = parts  # its constructor would copy them
    return made.asformat(rnd.choice(["csr", "csr", "csr", "csc", "coo", "lil", "dok"]))


def _is_sparse(value):
    return sparse is not None and sparse.issparse(value)


def _draw_out(rnd, arguments, wrong, shapes, dtype, memories):
    """An array for each gradient, or None; returns the bytes that they cover."""
    if rnd.random() < 0.03:
        arguments["out"] = rnd.choice(NOT_GRADIENTS)
        wrong.add("out")
        return []
    arrays, covered = dict.fromkeys(fl.LinearGradients._fields), {}
    for name in arrays:
        if name not in shapes:
            if rnd.random() < 0.03:
                arrays[name] = np.zeros((2, 3), dtype)
                wrong.add(f"out.{name}")
            continue
        if rnd.random() < 0.2:
            continue
        around, bad, known = dict(arguments), set(), len(memories)
        cover = hostile.draw_out(rnd, around, bad, shapes[name], dtype, memories)
        arrays[name] = around["out"]
        if bad:
            wrong.add(f"out.{name}")
        elif cover:
            covered[name] = cover
            if len(memories) > known:  # its own: something to add to
                arrays[name][...] = hostile.draw_scores(rnd, shapes[name], dtype, True)
    for (a, (memory, some)), (b, (other, others)) in itertools.combinations(covered.items(), 2):
        if memory == other and (some & others).any():
            wrong.update((f"out.{a}", f"out.{b}"))
    arguments["out"] = rnd.choice([fl.LinearGradients._make, tuple])(arrays.values())
    return list(covered.values())


def _spoil(rnd, arguments, wrong, scores_shape):
    """Make one argument wrong."""
    name = rnd.choice([name for name in arguments if name != "out"])
    if name in NUMBERS:
        arguments[name] = rnd.choice(NUMBERS[name][1])
        wrong.add(name)
        return
    array = _plain(arguments)[name]
    how = rnd.choice(["garbage", "dtype", "shape", "masked", "value"])
    if how == "garbage":
        garbage = hostile.GARBAGE[1:] if name in OPTIONAL else hostile.GARBAGE  # None comes first
        arguments[name] = rnd.choice(garbage)
    elif how == "dtype":
        _spoil_dtype(rnd, arguments, name, array)
    elif how == "shape":
        shapes = [(*array.shape, 2), (1, *array.shape)]
        if name == "inputs":
            shapes += [(), (*array.shape[:-1], array.shape[-1] + 1)]
        if name == "linear_weight":
            shapes += [(0, array.shape[1]), (array.shape[0], array.shape[1] + 1), (array.size,)]
        arguments[name] = np.zeros(rnd.choice(shapes), array.dtype)
    elif how == "masked":
        arguments[name] = np.ma.masked_array(array, rnd.choice([False, True]))
    else:
        hostile.spoil_value(rnd, arguments, wrong, scores_shape)
        return
    wrong.add(name)
    if name == "inputs":  # what does not fit them is named
        wrong.update(ARRAYS)


def _spoil_dtype(rnd, arguments, name, array):
    dtypes = hostile.FOREIGN
    if name in ("inputs", "linear_weight", "linear_bias"):
        # Integers are read as float64.
        others = (dtype for dtype in hostile.REALS if dtype.kind not in "iu" or array.itemsize < 8)
        dtypes = [*dtypes, *(dtype for dtype in others if dtype != array.dtype)]
    else:
        dtypes = [dtype for dtype in dtypes if not hostile.is_read(dtype, name)]
    spoiled = np.zeros(array.shape, rnd.choice(dtypes))
    if _is_sparse(arguments[name]) and spoiled.dtype.kind in "iu":
        spoiled = sparse.csr_array(spoiled)
    arguments[name] = spoiled


# ---------------------------------------------------------------------------------------------
# The verdict
# ---------------------------------------------------------------------------------------------


def complaint(call, backend):
    """What is wrong with how the call went, or None."""
    plain = None if call.wrong else _plain(call.arguments)
    with mock.patch.multiple(linear, **SMALL):
        results, report = hostile.outcome(call, backend)
    if report or call.wrong:
        return report
    if call.name == "linear_cross_entropy":
        results = results, ()
    loss, gradients = results
    given = call.arguments.get("out") or [None] * len(gradients)
    for name, result, out in zip(fl.LinearGradients._fields, gradients, given, strict=False):
        if out is not None and result is not out:
            return f"did not return out.{name}"
    with np.errstate(all="ignore"):
        right = _right(plain)
    named = dict(zip(("loss", *fl.LinearGradients._fields), (loss, *gradients), strict=False))
    reports = (_difference(name, value, right.get(name), plain) for name, value in named.items())
    return next(filter(None, reports), None)


def _plain(arguments):
    """Plain copies of all arrays."""
    plain = dict(arguments, is_sparse=_is_sparse(arguments.get("inputs")))
    for name in set(ARRAYS) & set(plain):
        value = plain[name]
        plain[name] = value.toarray() if _is_sparse(value) else hostile.read(value)
    if isinstance(plain.get("out"), tuple):
        plain["out"] = [None if a is None else np.array(a) for a in plain["out"]]
    return plain


def _labels(plain, lead):
    """Per row the target, or probabilities; the weights of the rows and of the classes, or None."""
    num_rows = math.prod(lead)
    target = np.asarray(plain["target"])
    target = target.reshape(num_rows, *target.shape[len(lead) :])
    weights = plain.get("sample_weight", np.ones(lead)).astype(float).reshape(num_rows)
    classes = plain.get("weight")
    return target, weights, None if classes is None else classes.astype(float)


def _shares(plain, lead):
    """The weights of the rows by the divisor, 0 where they count for nothing; and the divisor."""
    target, weights, classes = _labels(plain, lead)
    divisor = weights.sum()
    if target.ndim == 1:
        used = target != int(plain.get("ignore_index", -100))
        weights = np.where(used, weights, 0)
        of_class = np.ones(len(target))
        if classes is not None:
            of_class = classes[np.where(used, target, 0).astype(int)]
        divisor = (weights * of_class).sum()
        others = float(plain.get("label_smoothing", 0)) and (classes is None or classes.any())
        if not others and not plain.get("z_loss"):
            weights = np.where(of_class == 0, 0, weights)
    if plain.get("reduction", "mean") != "mean":
        divisor = 1.0
    elif plain.get("normalizer") is not None:
        divisor = float(plain["normalizer"])
    return (weights / divisor if divisor else 0 * weights), divisor


def _right(plain):
    """What is right, of what dtype and how exactly, by name: None where there is no gradient."""
    inputs, dtype = plain["inputs"], plain["inputs"].dtype
    target, _, classes = _labels(plain, inputs.shape[:-1])
    shares, divisor = _shares(plain, inputs.shape[:-1])
    idle = shares == 0
    x = inputs.reshape(len(idle), inputs.shape[-1]).astype(float)
    x[idle] = 0
    features = sparse.csr_array(x) if plain["is_sparse"] else x  # NaN times no entry is nothing
    w = plain["linear_weight"].astype(float)
    b = plain.get("linear_bias", np.zeros(len(w))).astype(float)
    l2, z_loss = (float(plain.get(k, 0)) for k in ("l2", "z_loss"))
    options = {k: float(plain[k]) for k in OPERATIONS["cross_entropy"].options if k in plain}
    losses, g = fl.cross_entropy_with_grad(
        x @ w.T + b, target, weight=classes, sample_weight=shares, **options,
        ignore_index=plain.get("ignore_index", -100), reduction="none", backend="numpy",
    )  # fmt: skip

    # Scores are off by a part of the sizes that they are sums of, and what follows accordingly.
    info = np.finfo(dtype)
    unit = float(info.eps) * (32 + max(*x.shape, *w.shape))
    heat = options.get("temperature", 1.0)
    sizes = np.max(_size(x) @ _size(w).T + _size(b), axis=1) / heat + np.log(len(w)) + 1
    weights = np.abs(shares) * max(1.0, 0.0 if classes is None else np.abs(classes).max())
    steep = (1.0 if target.ndim == 1 else 1 + _size(target).sum(axis=1)) + 2 * z_loss * sizes
    g_error = weights * (steep * np.minimum(8 * unit * sizes, 1) + 2 * z_loss * unit * sizes) / heat
    loss_error = weights * steep * 2 * unit * sizes
    far = ~(sizes * max(heat, 1) * (1 + weights * steep * max(abs(divisor), 1)) < info.max / 10)
    g_error, loss_error = (
        np.where(idle, 0, np.where(far, np.inf, error)) for error in (g_error, loss_error)
    )

    penalty, shrink = (l2 * np.square(w).sum(), 2 * l2 * w) if l2 else (0.0, np.zeros(w.shape))
    found = {"loss": (losses.sum() + penalty, loss_error.sum() + unit * penalty)}
    if plain.get("reduction") == "none":
        found["loss"] = losses, loss_error
    elif not divisor:
        found["loss"] = np.nan, 0.0
    if plain.get("linear_weight_grad", True):
        error = g_error @ _size(x) + unit * _size(shrink)
        found["linear_weight"] = g.T @ features + shrink, error
    if "linear_bias" in plain:
        found["linear_bias"] = g.sum(axis=0), g_error.sum()
    if plain.get("inputs_grad"):
        error = g_error[:, None] * _size(w).sum(axis=0)
        found["inputs"] = (np.where(idle[:, None], 0, array) for array in (g @ w, error))
    for name, before in zip(fl.LinearGradients._fields, plain.get("out") or (), strict=False):
        if before is not None and plain.get("accumulate"):
            value, error = found[name]
            before = before.reshape(value.shape).astype(float)
            found[name] = value + before, error + unit * _size(before)
    # No tolerance is enough where sums come near to what the dtype holds.
    return {
        name: (value, np.where(error < unit * info.max / 10, error + info.tiny, np.inf))
        for name, (value, error) in found.items()
    }


def _size(array):
    """What roundings are a part of; those of NaN are no matter, for its sums are NaN."""
    return np.where(np.isnan(array), 0, np.abs(array))


def _difference(name, result, right, plain):
    """How a result differs from what is right by more than rounding."""
    if right is None or result is None:
        return None if right is result else f"returned {result} for {name}"
    dtype, shape = plain["inputs"].dtype, np.shape(plain.get(name))
    if name == "loss":
        shape = plain["inputs"].shape[:-1]
    if name == "loss" and plain.get("reduction") != "none":
        shape = ()
        if type(result) is not float:
            return f"returned a {type(result).__name__} for the loss"
    elif not isinstance(result, np.ndarray) or (result.dtype, result.shape) != (dtype, shape):
        return f"returned {result!r} for {name}, expected {dtype} of shape {shape}"
    value, tolerance = (np.broadcast_to(a, np.shape(right[0])).reshape(shape) for a in right)
    result = np.asarray(result)
    with np.errstate(all="ignore"):
        close = (np.abs(result - value) <= tolerance) | (tolerance == np.inf) | (result == value)
        close |= (np.isnan(result) & np.isnan(value)) | (np.abs(value) >= np.finfo(dtype).max / 10)
    if close.all():
        return None
    place = tuple(map(int, np.argwhere(~close)[0]))
    return (
        f"returned {result[place]} instead of {value[place]} for {name} at {place}, where the "
        f"tolerance is {tolerance[place]:.1g}, and {(~close).sum()} such"
    )
