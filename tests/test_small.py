"""Small calls are answered in compiled code, as the general way answers them, errors included."""

import random

import numpy as np
import pytest

import fastloss as fl
from fastloss import functional, linear
from fastloss._numba import entries
from fastloss._operations import BY_FUNCTION

FAMILIES = ("map", "backward", "loss")  # that have a short way
FUNCTIONS = [name for name, operation in BY_FUNCTION.items() if operation.family in FAMILIES]
SHAPES = [(32, 10), (200, 3), (5, 1), (1, 7), (2, 3, 4), (6,), (0, 3), (3, 0), (8192, 4)]  # large


class Sub(np.ndarray):
    """No plain array."""


def misaligned(array):
    memory = np.zeros(array.nbytes + 1, np.uint8)[1:].view(array.dtype).reshape(array.shape)
    memory[...] = array
    return memory


def read_only(array):
    array.flags.writeable = False
    return array


def same(array):
    return array


VIEWS = [
    lambda array: np.stack([array, array], axis=-1)[..., 0],  # with gaps
    lambda array: array.view(Sub),
    misaligned, read_only, np.asfortranarray, np.ndarray.tolist,
]  # fmt: skip


def draw(rnd):
    """A call whose arguments are mostly plain, each now and then something else."""

    def pick(usual, *others):
        return rnd.choice(others) if rnd.random() < 0.08 else usual

    operation = BY_FUNCTION[name := rnd.choice(FUNCTIONS)]
    shape = rnd.choice(SHAPES)
    rng = np.random.default_rng(rnd.randrange(1000))
    dtype = np.dtype(pick(rnd.choice("fd"), ">f4", "i4", "?"))
    memory = np.zeros(
        (3, *shape), dtype
    )  # scores and targets beside one another, and out over both
    x, out = memory[0], np.full(shape, 7, dtype)
    x[...] = rng.normal(size=shape) * rnd.choice([1, 30])
    outs = [
        x,
        memory.reshape(-1)[1 : 1 + x.size].reshape(shape),
        memory[1],
        out.astype("i4"),
        out.T,
    ]
    arguments = {
        operation.scores: pick(same, *VIEWS)(x),
        "axis": pick(-1, x.ndim - 1, 0, np.int64(-1), True, 3, 1.0),
        "num_threads": pick(None, 1, 2, np.int64(1), True, 0, "1", 1 << 70),
    }
    if operation.family == "loss":
        y = rng.integers(0, max(shape[-1], 1), pick(shape[:-1], shape, shape[1:], (3,)))
        if y.size and rnd.random() < 0.2:
            y.reshape(-1)[rnd.randrange(y.size)] = rnd.choice([-100, -1, shape[-1], 100])
        y = y.astype(pick(rnd.choice(["i4", "i8"]), "u8", "i1", ">i8", "f4", "?"))
        if rnd.random() < 0.5 and y.nbytes <= 2 * x.nbytes:
            beside = memory.reshape(-1).view(np.uint8)[x.nbytes : x.nbytes + y.nbytes]
            beside[:] = y.reshape(-1).view(np.uint8)
            y = beside.view(y.dtype).reshape(y.shape)
        arguments["target"] = pick(same, *VIEWS)(y)
        usual = rnd.choice(["mean", "sum"])
        arguments["reduction"] = pick(usual, "none", "mea", np.str_("mean"), None)
        options = {
            "weight": (np.ones(shape[-1]), [np.nan] * shape[-1]),
            "sample_weight": (np.ones(shape[:-1]), 1.0),
            "normalizer": (2.0, 0.0, 2, np.inf, np.nan, 1e-310, np.float32(3)),
            "ignore_index": (-1, 1, -100.0, np.int64(-100), 1 << 70),
        }
        numbers = (0, -0.0, "0", 7.0, -1.0, np.nan, np.inf, np.float64(0.5))
        for option, value in operation.options.items():
            arguments[option] = pick(rnd.choice([0.0, 0.0, value]), *numbers)
        chosen = {option: pick(None, *others) for option, others in options.items()}
        arguments |= {option: value for option, value in chosen.items() if value is not None}
    elif operation.family == "backward":
        others = [x[..., :-1], x.astype("f8"), memory.reshape(-1)[1 : 1 + x.size].reshape(shape)]
        g = pick(rnd.choice([memory[1], x]), *others)
        arguments["grad_output"] = pick(same, *VIEWS)(g)
    elif operation.returns == "rows" and shape != (3, 0):
        out, outs = out[..., 0].copy(), [a[..., 0] for a in outs[:-1]]
    if (operation.family != "loss" or name.endswith("_with_grad")) and rnd.random() < 0.7:
        arguments["out"] = pick(same, *VIEWS)(pick(rnd.choice([out, x]), *outs))
    return name, arguments


def outcome(name, arguments, backend):
    """What it returns, to the bit, or raises; and what is then in all arrays."""
    try:
        results = getattr(fl, name)(**arguments, backend=backend)
    except (ValueError, TypeError, IndexError) as error:
        told = [type(error), str(error)]
    else:
        results = results if isinstance(results, tuple) else (results,)
        told = [(type(r), np.shape(r), r is arguments.get("out"), describe(r)) for r in results]
    return told, [describe(value) for value in arguments.values()]


def describe(value):
    array = np.asarray(value)
    return array.dtype, array.shape, array.tobytes()


@pytest.fixture
def answered(monkeypatch):
    """Whether each call so far was answered in compiled code."""
    seen = []

    class Watched:
        def __getattr__(self, name):
            def call(*arguments):
                answer = getattr(small, name)(*arguments)
                seen.append(answer is not None)
                return answer

            return call

    small = functional._small
    monkeypatch.setattr(functional, "_small", Watched())
    return seen


def test_both_ways(backend, answered, monkeypatch):
    short = failures = 0
    for seed in range(800):
        name, arguments = draw(random.Random(seed))
        result = outcome(name, arguments, backend)
        short += answered[-1]
        with monkeypatch.context() as patch:
            patch.setattr(functional, "_small", None)
            patch.setattr(entries, "_small_plan", lambda *arguments: None)  # Numba's own short way
            assert result == outcome(*draw(random.Random(seed)), backend), (seed, name, arguments)
        failures += len(result[0]) == 2 and isinstance(result[0][1], str)
    assert short > 200
    assert failures > 120


def draw_linear(rnd):
    """A call of the linear head, likewise."""

    def pick(usual, *others):
        return rnd.choice(others) if rnd.random() < 0.06 else usual

    n, c, d = pick((5, 4, 3), (0, 4, 3), (5, 1, 3), (5, 4, 0))
    rng = np.random.default_rng(rnd.randrange(1000))
    dtype = np.dtype(pick(rnd.choice("fd"), ">f4", "i4"))
    memory = np.zeros(200, dtype)  # arrays lie in it one behind the other, or one on the other
    x, w, b = (rng.normal(size=size).astype(dtype) for size in [(n, d), (c, d), (c,)])
    y = rng.integers(0, c, pick((n,), (n, 1), (3,)))
    if y.size and rnd.random() < 0.2:
        y.reshape(-1)[rnd.randrange(y.size)] = rnd.choice([-100, -1, c])
    y = y.astype(pick(rnd.choice(["i4", "i8"]), "u8", "f4"))
    arguments = {
        "inputs": pick(same, *VIEWS)(x),
        "linear_weight": pick(same, *VIEWS, lambda w: w[:, :-1], lambda w: w.astype("f8"))(w),
        "target": pick(same, *VIEWS)(y),
        "linear_bias": pick(rnd.choice([None, b]), b[:-1], b.astype("f8"), [0.0] * c, b[:, None]),
        "inputs_grad": rnd.random() < 0.5,
        "linear_weight_grad": rnd.random() < 0.8,
        "accumulate": pick(False, True),
        "l2": pick(rnd.choice([0.0, 0.1]), -1.0),
        "reduction": pick(rnd.choice(["mean", "sum", "none"]), "mea"),
        "ignore_index": pick(-100, 1),
        "label_smoothing": pick(0.0, 0.1),
        "weight": pick(None, np.ones(c)),
        "sample_weight": pick(None, np.ones(n)),
        "num_threads": pick(None, 1, 0),
        "chunk_rows": pick(None, 2, 0),
    }
    if rnd.random() < 0.6:
        start, outs = 0, []
        for array, wanted in [(w, "linear_weight_grad"), (b, "linear_bias"), (x, "inputs_grad")]:
            place = memory[start : start + array.size].reshape(array.shape)
            usual = None if arguments[wanted] is False or arguments[wanted] is None else place
            others = [None, array, place[:1], place.astype("i2"), y, pick(same, *VIEWS)(place)]
            outs.append(pick(usual, place, *others))
            start += pick(array.size, 0)
        arguments["out"] = pick(fl.LinearGradients(*outs), tuple(outs), outs, tuple(outs[:2]))
    return arguments


def arrays_in(arguments):
    """Those of `out`, too."""
    out = arguments.get("out") or ()
    return [value for key, value in arguments.items() if key != "out"] + list(out)


def linear_outcome(arguments, backend):
    try:
        loss, gradients = fl.linear_cross_entropy_with_grad(**arguments, backend=backend)
    except (ValueError, TypeError, IndexError) as error:
        told = [type(error), str(error)]
    else:
        given = arguments.get("out") or (None,) * 3
        told = [type(loss), describe(loss), type(gradients)]
        told += [
            (g is o, g if g is None else describe(g)) for g, o in zip(gradients, given, strict=True)
        ]
    return told, [describe(value) for value in arrays_in(arguments)]


def test_both_ways_of_the_linear_head(backend, monkeypatch):
    plain, right = [], linear._plan

    def plan(*arguments):
        made = right(*arguments)
        plain.append(made.plain)
        return made

    monkeypatch.setattr(linear, "_plan", plan)
    failures = short = 0
    for seed in range(600):
        plain.clear()
        arguments = draw_linear(random.Random(seed))
        result = linear_outcome(arguments, backend)
        short += any(plain)
        failures += len(result[0]) == 2
        with monkeypatch.context() as patch:
            patch.setattr(functional, "_small", None)
            assert result == linear_outcome(draw_linear(random.Random(seed)), backend), seed
    assert short > 150
    assert failures > 100


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("index", [np.int32, np.int64])
def test_the_common_call_is_a_small_one(backend, answered, dtype, index):
    """Of every function that has a short way, with out and without."""
    x, y = np.zeros((32, 10), dtype), np.zeros(32, index)
    for name in FUNCTIONS:
        arguments = {"loss": (x, y), "backward": (x, x), "map": (x,)}[BY_FUNCTION[name].family]
        getattr(fl, name)(*arguments, backend=backend)
    fl.softmax(x, 1, out=x, num_threads=2, backend=backend)
    fl.cross_entropy_with_grad(x, y, out=x, num_threads=2, backend=backend)
    fl.cross_entropy(x, y, reduction="sum", backend=backend)
    fl.cross_entropy(x, y, normalizer=64.0, backend=backend)
    fl.cross_entropy(x, y, label_smoothing=0.1, z_loss=0.1, ignore_index=1, backend=backend)
    assert answered == [True] * (len(FUNCTIONS) + 5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_few_arguments_from_python(monkeypatch, dtype):
    """A small loss hands Numba no more than it has."""
    x, y = np.zeros((32, 10), dtype), np.zeros(32, int)
    monkeypatch.setattr(entries, "_run", None)
    assert fl.cross_entropy(x, y, backend="numba") == pytest.approx(np.log(10))
    assert fl.cross_entropy_with_grad(x, y, backend="numba")[1][0, 0] == pytest.approx(-0.9 / 32)


@pytest.mark.parametrize("function", [fl.softmax, fl.cross_entropy])
def test_without_the_extension(monkeypatch, function):
    monkeypatch.setattr(functional, "_small", None)
    arguments = ([[1.0, 2.0]], [0])[: 1 + (function is fl.cross_entropy)]
    assert np.sum(function(*arguments)) == pytest.approx(1 if function is fl.softmax else 1.3132617)
