"""Bad input of every kind: the error, its text, and nothing written."""

import re

import numpy as np
import pytest
from support.cases import BFLOAT16

import fastloss as fl
from fastloss._contract import INDEX_OPTIONS, Options
from fastloss._operations import BY_FUNCTION, OPERATIONS

N, C = 6, 10
F32 = np.dtype(np.float32)


def good(name):
    """Arguments of each function that are right; each case below makes one of them wrong."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(N, C)).astype(F32)
    arrays = {
        "logits": x,
        "grad_output": x,
        "probs": np.full_like(x, 0.1),
        "log_probs": np.full_like(x, -2.3),
        "target": rng.integers(0, C, N),
    }
    if BY_FUNCTION[name].family == "binary":
        arrays["target"] = x > 0
    return {argument: arrays[argument] for argument in BY_FUNCTION[name].inputs}


def replaced(array, index, value):
    array = np.array(array)
    array[index] = value
    return array


X = np.zeros((N, C), F32)
Y = np.arange(N)
EVERY = tuple(BY_FUNCTION)
SCORES = tuple(name for name in EVERY if BY_FUNCTION[name].scores == "logits")
NLL = tuple(name for name in EVERY if BY_FUNCTION[name].inputs == ("log_probs", "target"))
BACKWARD = tuple(name for name in EVERY if BY_FUNCTION[name].family == "backward")
LOSSES = tuple(name for name in EVERY if BY_FUNCTION[name].family == "loss")
FACTORS = [
    (operation.functions, option)
    for operation in OPERATIONS.values()
    for option in operation.options
    if option not in ("label_smoothing", "epsilon", "alpha", "temperature")
]
POLY = OPERATIONS["poly_loss"].functions
BINARY = tuple(name for name in EVERY if BY_FUNCTION[name].family == "binary")
REDUCED = LOSSES + BINARY
SIGMOID_FOCAL = OPERATIONS["sigmoid_focal_loss"].functions
SMOOTHED = tuple(name for name in REDUCED if "label_smoothing" in BY_FUNCTION[name].options)
CROSS_ENTROPY = tuple(name for name in LOSSES if BY_FUNCTION[name].soft)
WITH_OUT = tuple(
    name
    for name in EVERY
    if (BY_FUNCTION[name].returns == "logits" and not BY_FUNCTION[name].is_loss)
    or name.endswith("_with_grad")
)
MAPS = tuple(name for name in WITH_OUT if BY_FUNCTION[name].family == "map")
FLOATS = "expected integers or float32, float64, float16, bfloat16"
LARGE = 2**64 - 1

# functions, what is wrong, the error, its whole text (or a pattern)
ERRORS = [
    # the scores
    (SCORES, {"logits": X.astype(bool)}, TypeError, f"logits has dtype bool; {FLOATS}"),
    (SCORES, {"logits": X.astype(complex)}, TypeError, f"logits has dtype complex128; {FLOATS}"),
    (SCORES, {"logits": X.astype(object)}, TypeError, f"logits has dtype object; {FLOATS}"),
    (SCORES, {"logits": X.astype(np.longdouble)}, TypeError,
     f"logits has dtype {np.dtype(np.longdouble)}; {FLOATS}"),
    (SCORES, {"logits": X.astype("M8[s]")}, TypeError, f"logits has dtype datetime64[s]; {FLOATS}"),
    (SCORES, {"logits": "scores"}, TypeError, f"logits has dtype <U6; {FLOATS}"),
    (SCORES, {"logits": [["a", "b"]]}, TypeError, f"logits has dtype <U1; {FLOATS}"),
    (SCORES, {"logits": None}, TypeError, f"logits has dtype object; {FLOATS}"),
    (SCORES, {"logits": [True, False]}, TypeError, f"logits has dtype bool; {FLOATS}"),
    (SCORES, {"logits": np.ma.masked_array(X)}, TypeError,
     "logits is a masked array, whose mask would be lost; fill it first"),
    (SCORES, {"logits": [[1.0, 2.0], [3.0]]}, ValueError, "^logits cannot be read as an array: "),
    (SCORES, {"logits": F32.type(1)}, ValueError,
     "logits is a scalar; it needs an axis of classes"),
    (SCORES, {"logits": np.zeros((N, 0), F32)}, ValueError,
     "logits of shape (6, 0) has no classes along axis 1"),
    (SCORES, {"logits": np.zeros((0, 0), F32)}, ValueError,
     "logits of shape (0, 0) has no classes along axis 1"),
    (NLL, {"log_probs": X.astype(bool)}, TypeError, f"log_probs has dtype bool; {FLOATS}"),
    (NLL, {"log_probs": np.zeros((N, 0), F32)}, ValueError,
     "log_probs of shape (6, 0) has no classes along axis 1"),
    (EVERY, {"axis": 2}, ValueError, r"^axis = 2 is out of range for \w+ of shape \(6, 10\)$"),
    (EVERY, {"axis": -3}, ValueError, r"^axis = -3 is out of range for \w+ of shape \(6, 10\)$"),
    (EVERY, {"axis": 1.0}, TypeError, "axis = 1.0 is not an integer"),
    (EVERY, {"axis": None}, TypeError, "axis = None is not an integer"),
    # what only looks like a number or an array
    (SCORES, {"logits": [np.ma.masked_array([1.0, 2.0], [0, 1])] * 2}, TypeError,
     "logits is a masked array, whose mask would be lost; fill it first"),
    (SCORES, {"logits": [1.0, 10**400]}, TypeError, f"logits has dtype object; {FLOATS}"),
    # the backward pass
    (BACKWARD, {"grad_output": X[:5]}, ValueError,
     r"^grad_output has shape \(5, 10\), expected \(6, 10\), the shape of (log_)?probs$"),
    (BACKWARD, {"grad_output": X.astype(float)}, TypeError,
     "^grad_output has dtype float64, expected float32, the dtype of (log_)?probs$"),
    (BACKWARD, {"grad_output": X > 0}, TypeError, f"grad_output has dtype bool; {FLOATS}"),
    (BACKWARD, {"grad_output": np.ma.masked_array(X)}, TypeError,
     "grad_output is a masked array, whose mask would be lost; fill it first"),
    (BACKWARD[:1], {"probs": X.astype(bool)}, TypeError, f"probs has dtype bool; {FLOATS}"),
    (BACKWARD[1:], {"log_probs": X.astype(bool)}, TypeError, f"log_probs has dtype bool; {FLOATS}"),
    # targets out of range
    (LOSSES, {"target": replaced(Y, 0, 10)}, IndexError,
     "target[0] = 10 is out of range for 10 classes"),
    (LOSSES, {"target": replaced(Y, 3, -1)}, IndexError,
     "target[3] = -1 is out of range for 10 classes"),
    (LOSSES, {"target": replaced(Y, 5, 12)}, IndexError,
     "target[5] = 12 is out of range for 10 classes"),
    (LOSSES, {"target": replaced(Y, 5, -(2**63))}, IndexError,
     f"target[5] = {-(2**63)} is out of range for 10 classes"),
    (LOSSES, {"target": replaced(Y, 5, 2**63 - 1)}, IndexError,
     f"target[5] = {2**63 - 1} is out of range for 10 classes"),
    (LOSSES, {"target": replaced(Y.astype(np.uint64), 5, LARGE)}, IndexError,
     f"target[5] = {LARGE} is out of range for 10 classes"),
    (LOSSES, {"target": replaced(Y.astype(np.uint64), 5, LARGE), "ignore_index": -1}, IndexError,
     f"target[5] = {LARGE} is out of range for 10 classes"),
    (LOSSES, {"target": replaced(Y.astype(np.uint64), 5, LARGE), "ignore_index": 2**63 - 1},
     IndexError, f"target[5] = {LARGE} is out of range for 10 classes"),
    (LOSSES, {"target": replaced(Y.astype(np.uint64), 2, 2**64 - 100)}, IndexError,
     f"target[2] = {2**64 - 100} is out of range for 10 classes"),
    (LOSSES, {"target": replaced(Y.astype(np.int8), 1, -128)}, IndexError,
     "target[1] = -128 is out of range for 10 classes"),
    (LOSSES, {"target": replaced(Y.astype(np.uint8), 1, 156)}, IndexError,  # -100, as int8
     "target[1] = 156 is out of range for 10 classes"),
    (LOSSES, {"target": replaced(Y, slice(2, None), 99)}, IndexError,  # the first of many
     "target[2] = 99 is out of range for 10 classes"),
    (LOSSES, {"target": replaced(Y, 5, -100), "ignore_index": -1}, IndexError,
     "target[5] = -100 is out of range for 10 classes"),
    (LOSSES, {"target": replaced(Y, 5, 10), "sample_weight": [1, 1, 1, 1, 1, 0]}, IndexError,
     "target[5] = 10 is out of range for 10 classes"),
    # targets of the wrong kind
    (LOSSES, {"target": Y[:5]}, ValueError,
     "target has shape (5,), expected (6,) for logits of shape (6, 10) with the classes along "
     "axis 1"),
    (LOSSES, {"target": Y[:, None]}, ValueError,
     "target has shape (6, 1), expected (6,) for logits of shape (6, 10) with the classes along "
     "axis 1"),
    (LOSSES, {"target": 3}, ValueError,
     "target has shape (), expected (6,) for logits of shape (6, 10) with the classes along "
     "axis 1"),
    (CROSS_ENTROPY, {"target": X[:5]}, ValueError,
     "target has shape (5, 10), expected (6, 10), the shape of the logits, for probabilities; "
     "class indices are integers"),
    (CROSS_ENTROPY, {"target": Y.astype(float)}, ValueError,
     "target has shape (6,), expected (6, 10), the shape of the logits, for probabilities; "
     "class indices are integers"),
    (NLL, {"target": X}, TypeError,
     "target has dtype float32; expected integers, the class indices"),
    (CROSS_ENTROPY, {"target": Y.astype(bool)}, TypeError,
     "target has dtype bool; expected integers or probabilities"),
    (NLL, {"target": Y.astype(bool)}, TypeError, "target has dtype bool; expected integers"),
    (CROSS_ENTROPY, {"target": Y.astype(object)}, TypeError,
     "target has dtype object; expected integers or probabilities"),
    (CROSS_ENTROPY, {"target": X.astype(complex)}, TypeError,
     "target has dtype complex128; expected integers or probabilities"),
    (CROSS_ENTROPY, {"target": list("abcdef")}, TypeError,
     "target has dtype <U1; expected integers or probabilities"),
    (CROSS_ENTROPY, {"target": None}, TypeError,
     "target has dtype object; expected integers or probabilities"),
    (LOSSES, {"target": np.ma.masked_array(Y)}, TypeError,
     "target is a masked array, whose mask would be lost; fill it first"),
    (LOSSES, {"target": [[1], [2, 3]]}, ValueError, "^target cannot be read as an array: "),
    # targets of binary losses
    (BINARY, {"target": Y}, ValueError,
     "target has shape (6,), expected (6, 10), the shape of the logits"),
    (BINARY, {"target": X[:5]}, ValueError,
     "target has shape (5, 10), expected (6, 10), the shape of the logits"),
    (BINARY, {"target": X.astype(complex)}, TypeError,
     "target has dtype complex128; expected truth values, integers or real numbers"),
    (BINARY, {"target": X.astype(object)}, TypeError,
     "target has dtype object; expected truth values, integers or real numbers"),
    (BINARY, {"target": np.ma.masked_array(X)}, TypeError,
     "target is a masked array, whose mask would be lost; fill it first"),
    (BINARY[:2], {"pos_weight": np.ones(9)}, ValueError,
     "pos_weight has shape (9,), expected (10,) for 10 classes"),
    (BINARY[:2], {"pos_weight": replaced(np.ones(C), 3, np.inf)}, ValueError,
     "pos_weight[3] = inf is not a finite number"),
    (BINARY[:2], {"pos_weight": np.nan}, ValueError, "pos_weight = nan is not a finite number"),
    (BINARY, {"weight": np.inf}, ValueError, "weight = inf is not a finite number"),
    *[
        (SIGMOID_FOCAL, {"alpha": value}, ValueError,
         f"alpha = {value} is out of range; it must be from 0 to 1")
        for value in (-0.1, 1.5, np.nan)
    ],
    *[
        (CROSS_ENTROPY, {"temperature": value}, ValueError,
         f"temperature = {value} is out of range; it must be from 1e-4 to 1e4")
        for value in (0.0, -1.0, 1e-5, 1e5, np.nan, np.inf)
    ],
    (CROSS_ENTROPY, {"temperature": None}, TypeError, "temperature = None is not a real number"),
    (SIGMOID_FOCAL, {"alpha": "0.5"}, TypeError, "alpha = '0.5' is not a real number"),
    # weights
    (REDUCED, {"weight": np.ones(9)}, ValueError,
     "weight has shape (9,), expected (10,) for 10 classes"),
    (LOSSES, {"weight": 1.0}, ValueError, "weight has shape (), expected (10,) for 10 classes"),
    (REDUCED, {"weight": replaced(np.ones(C), 0, np.nan)}, ValueError,
     "weight[0] = nan is not a finite number"),
    (LOSSES, {"weight": replaced(np.ones(C), 9, -np.inf)}, ValueError,
     "weight[9] = -inf is not a finite number"),
    (LOSSES, {"weight": np.ones(C, complex)}, TypeError,
     "weight has dtype complex128; expected real numbers"),
    (REDUCED, {"weight": "heavy"}, TypeError, "weight has dtype <U5; expected real numbers"),
    (LOSSES, {"weight": np.ma.masked_array(np.ones(C))}, TypeError,
     "weight is a masked array, whose mask would be lost; fill it first"),
    (REDUCED, {"sample_weight": np.ones(5)}, ValueError,
     "sample_weight has shape (5,), expected (6,) the shape of the rows"),
    (LOSSES, {"sample_weight": np.ones((6, 1))}, ValueError,
     "sample_weight has shape (6, 1), expected (6,) the shape of the rows"),
    (REDUCED, {"sample_weight": replaced(np.ones(N), 2, np.nan)}, ValueError,
     "sample_weight[2] = nan is not a finite number"),
    (LOSSES, {"sample_weight": replaced(np.ones(N), 2, np.inf)}, ValueError,
     "sample_weight[2] = inf is not a finite number"),
    (REDUCED, {"sample_weight": np.ones(N, object)}, TypeError,
     "sample_weight has dtype object; expected real numbers"),
    # options
    (REDUCED, {"reduction": "average"}, ValueError,
     "reduction = 'average' is not one of 'mean', 'sum', 'none'"),
    (REDUCED, {"reduction": None}, ValueError,
     "reduction = None is not one of 'mean', 'sum', 'none'"),
    (REDUCED, {"reduction": ["mean"]}, ValueError,
     "reduction = ['mean'] is not one of 'mean', 'sum', 'none'"),
    (REDUCED, {"normalizer": 0}, ValueError, "normalizer = 0.0 is not a finite number above 0"),
    (REDUCED, {"normalizer": -2.0}, ValueError, "normalizer = -2.0 is not a finite number above 0"),
    (REDUCED, {"normalizer": np.nan}, ValueError,
     "normalizer = nan is not a finite number above 0"),
    (LOSSES, {"normalizer": np.inf}, ValueError, "normalizer = inf is not a finite number above 0"),
    (LOSSES, {"normalizer": "6"}, TypeError, "normalizer = '6' is not a real number"),
    (LOSSES, {"normalizer": 1j}, TypeError, "normalizer = 1j is not a real number"),
    (LOSSES, {"normalizer": 10**400}, ValueError,
     "normalizer = inf is not a finite number above 0"),
    (REDUCED, {"normalizer": 6, "reduction": "sum"}, ValueError,
     "normalizer replaces the divisor of the mean; reduction = 'sum'"),
    (REDUCED, {"normalizer": 6, "reduction": "none"}, ValueError,
     "normalizer replaces the divisor of the mean; reduction = 'none'"),
    (LOSSES, {"ignore_index": 1.0}, TypeError, "ignore_index = 1.0 is not an integer"),
    (LOSSES, {"ignore_index": None}, TypeError, "ignore_index = None is not an integer"),
    (LOSSES, {"ignore_index": 2**63}, ValueError,
     f"ignore_index = {2**63} does not fit a 64-bit integer"),
    *[
        (CROSS_ENTROPY, {"target": X, option: value}, ValueError,
         f"{option} = {value} is for class indices; target holds probabilities")
        for option in INDEX_OPTIONS
        for value in [type(Options._field_defaults[option])(3)]
    ],
    *[
        (SMOOTHED, {"label_smoothing": value}, ValueError,
         f"label_smoothing = {value} is out of range; it must be from 0 to 1")
        for value in (-0.1, 1.5, np.nan, np.inf, -np.inf)
    ],
    (SMOOTHED, {"label_smoothing": "0.1"}, TypeError,
     "label_smoothing = '0.1' is not a real number"),
    (CROSS_ENTROPY, {"label_smoothing": None}, TypeError,
     "label_smoothing = None is not a real number"),
    (CROSS_ENTROPY, {"label_smoothing": -(10**400)}, ValueError,
     "label_smoothing = -inf is out of range; it must be from 0 to 1"),
    *[
        (SMOOTHED, {"label_smoothing": value}, TypeError,
         f"label_smoothing = {value!r} is not a real number")
        for value in (np.complex64(0.5), np.array("0.5"), np.str_("0.5"), bytearray(b"0"),
                      np.timedelta64(0, "s"), np.ma.masked_array(0.5))
    ],
    *[
        (functions, {factor: value}, ValueError,
         f"{factor} = {value} is not a finite number of at least 0")
        for functions, factor in FACTORS
        for value in (-1e-4, np.nan, np.inf)
    ],
    *[
        (functions, {factor: [1.0, 2.0]}, TypeError, f"{factor} = [1.0, 2.0] is not a real number")
        for functions, factor in [*FACTORS, (POLY, "epsilon")]
    ],
    *[
        (POLY, {"epsilon": value}, ValueError, f"epsilon = {value} is not a finite number")
        for value in (np.nan, np.inf, -np.inf)
    ],
    (EVERY, {"num_threads": 0}, ValueError,
     "num_threads = 0 is out of range; it must be from 1 to 65536"),
    (EVERY, {"num_threads": 65537}, ValueError,
     "num_threads = 65537 is out of range; it must be from 1 to 65536"),
    (EVERY, {"num_threads": -1}, ValueError,
     "num_threads = -1 is out of range; it must be from 1 to 65536"),
    (EVERY, {"num_threads": 10**30}, ValueError,
     f"num_threads = {10**30} is out of range; it must be from 1 to 65536"),
    (EVERY, {"num_threads": 1.0}, TypeError, "num_threads = 1.0 is not an integer"),
    (EVERY, {"num_threads": True}, TypeError, "num_threads = True is not an integer"),
    (EVERY, {"num_threads": "2"}, TypeError, "num_threads = '2' is not an integer"),
    (EVERY, {"num_threads": np.array([1, 2])}, TypeError,
     "num_threads = array([1, 2]) is not an integer"),
    # out
    (WITH_OUT, {"out": np.empty((N, C))}, TypeError, "out has dtype float64, expected float32"),
    (WITH_OUT, {"out": np.empty((N, C), ">f4")}, TypeError, "out has dtype >f4, expected float32"),
    (WITH_OUT, {"out": np.empty((N, C), BFLOAT16)}, TypeError,
     "out has dtype bfloat16, expected float32"),
    (WITH_OUT, {"out": np.empty((C, N), F32)}, ValueError,
     "out has shape (10, 6), expected (6, 10)"),
    (WITH_OUT, {"out": np.empty(N * C, F32)}, ValueError, "out has shape (60,), expected (6, 10)"),
    (WITH_OUT, {"out": np.broadcast_to(F32.type(0), (N, C))}, ValueError, "out is read-only"),
    (WITH_OUT, {"out": np.ndarray((N, C), F32, bytearray(4 * C), strides=(0, 4))}, ValueError,
     "out of shape (6, 10) has strides (0, 4), by which elements may share memory"),
    (WITH_OUT, {"out": np.ndarray((N, C), F32, bytearray(4 * N * C), strides=(40, 2))}, ValueError,
     "out of shape (6, 10) has strides (40, 2), by which elements may share memory"),
    (WITH_OUT, {"out": [[0.0] * C] * N}, TypeError, "out is a list, expected a numpy.ndarray"),
    (WITH_OUT, {"out": np.ma.masked_array(X)}, TypeError,
     "out is a MaskedArray, expected a numpy.ndarray"),
    (("logsumexp",), {"out": np.empty((N, C), F32)}, ValueError,
     "out has shape (6, 10), expected (6,)"),
    (("logsumexp",), {"out": np.empty(N)}, TypeError, "out has dtype float64, expected float32"),
]  # fmt: skip


def identify(value):
    if isinstance(value, dict):
        return " ".join(value)
    return value.__name__ if isinstance(value, type) else None


@pytest.mark.parametrize(
    ("name", "wrong", "error", "text"),
    [(name, *rest) for names, *rest in ERRORS for name in names],
    ids=identify,
)
def test_error(name, wrong, error, text, backend):
    arguments = good(name) | wrong
    if "out" not in arguments and (name in WITH_OUT):
        first = next(iter(arguments.values()))
        shape, dtype = ((N, C), F32) if "logits" in wrong else (np.shape(first), F32)
        arguments["out"] = np.full(shape, 7, dtype)
    inputs = {k: v.tobytes() for k, v in arguments.items() if isinstance(v, np.ndarray)}
    pattern = text if text.startswith("^") else f"^{re.escape(text)}$"
    with pytest.raises(error, match=pattern):
        getattr(fl, name)(**arguments, backend=backend)
    assert inputs == {k: v.tobytes() for k, v in arguments.items() if isinstance(v, np.ndarray)}


@pytest.mark.parametrize("bad", [10, -1])
@pytest.mark.parametrize(
    ("shape", "axis", "place"),
    [
        ((4, C, 3, 5), 1, (2, 1, 4)),
        ((4, C, 3, 5), 1, (0, 0, 0)),
        ((4, C, 3, 5), 1, (3, 2, 4)),
        ((C, 7), 0, (6,)),
        ((4, 3, C), -1, (1, 2)),
        ((C,), 0, ()),
    ],
)
@pytest.mark.parametrize("order", ["C", "F"])
def test_place_of_a_bad_target(shape, axis, place, bad, order, backend):
    x = np.zeros(shape, np.float32, order=order)
    target = np.zeros(tuple(np.delete(shape, axis)), int)
    target[place] = bad
    subscript = f"[{', '.join(map(str, place))}]" if place else ""
    with pytest.raises(
        IndexError, match=f"^{re.escape(f'target{subscript} = {bad}')} is out of range"
    ):
        fl.cross_entropy_with_grad(x, target, axis=axis, backend=backend, out=x)
    assert not x.any()


@pytest.mark.parametrize("place", [0, 1, 4095, 4096, 50_000, 99_999])
def test_bad_target_among_many(place, backend):
    """Every block of the check, on more than one thread; the first of two is named."""
    x = np.full((100_000, 2), 5, np.float32)
    target = np.zeros(len(x), int)
    target[place], target[-1] = 2, 3
    named = 3 if place == len(x) - 1 else 2
    with pytest.raises(IndexError, match=rf"^target\[{place}\] = {named} is out of range"):
        fl.cross_entropy_with_grad(x, target, out=x, backend=backend)
    assert (x == 5).all()


@pytest.mark.parametrize("ignored", [-100, 10])
@pytest.mark.parametrize("place", [1, 70, 5000])
def test_an_ignored_target_is_no_bad_one(place, ignored, backend):
    """It is out of range, too, and stands before the one that the error is about."""
    target = np.full(6000, ignored)
    target[place] = 99
    with pytest.raises(IndexError, match=rf"^target\[{place}\] = 99 is out of range"):
        fl.nll_loss(np.zeros((len(target), 3)), target, ignore_index=ignored, backend=backend)


class Fickle:
    """Indices that are others each time one looks."""

    def __init__(self):
        self.answers = iter([np.array([0, 7]), np.array([[1, 2, 3]])])

    def __array__(self, dtype=None, copy=None):
        return next(self.answers)


def test_arguments_are_read_once(backend):
    with pytest.raises(IndexError, match=r"^target\[1\] = 7 is out of range for 3 classes$"):
        fl.cross_entropy(np.zeros((2, 3)), Fickle(), backend=backend)


def test_errors_of_the_flags():
    with pytest.raises(TypeError, match=r"num_threads = 1\.5 is not an integer"):
        fl.set_num_threads(1.5)
    with pytest.raises(ValueError, match="num_threads = 0 is out of range"):
        fl.set_num_threads(0)
    names = "choose one of 'auto', 'cython', 'numba', 'numpy'"
    with pytest.raises(ValueError, match=f"^name = 'torch' is not a backend; {names}$"):
        fl.set_backend("torch")
    with pytest.raises(ValueError, match=f"^backend = 'Numba' is not a backend; {names}$"):
        fl.softmax([1, 2], backend="Numba")
    with pytest.raises(ValueError, match=f"^backend = 3 is not a backend; {names}$"):
        fl.softmax([1, 2], backend=3)
    with pytest.raises(
        ValueError, match=r"^backend = array\(\['auto', 'numba'\], .* is not a backend"
    ):
        fl.softmax([1, 2], backend=np.array(["auto", "numba"]))
    with pytest.raises(ValueError, match=f"^backend = 'no' is not a backend; {names}$"):
        fl.warmup("no")
