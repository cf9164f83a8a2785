"""Hostile calls: a right answer or a clear error, never a crash, never an input changed.

What is hostile, and what the verdict is, stands in `hostile`; `fuzz.py` makes a million of them.
"""

import random

import numpy as np
import pytest
from fuzz import trial
from hypothesis import given
from hypothesis import strategies as st
from support import hostile, hostile_linear
from support.backends import COMPILED

import fastloss as fl
from fastloss import _backend, linear

KINDS = pytest.mark.parametrize("kind", [hostile, hostile_linear], ids=lambda kind: kind.__name__)


@KINDS
@given(rnd=st.randoms(use_true_random=False))
def test_hostile_call(backend, kind, rnd):
    call = kind.draw(rnd)
    complaint = kind.complaint(call, backend)
    assert not complaint, f"{hostile.describe(call)}\n{complaint}"


@KINDS
def test_thousands_of_hostile_calls(backend, kind):
    """More than hypothesis has the time for: the first calls of `fuzz.py`."""
    for number in range(2000 if kind is hostile else 800):  # a linear call takes longer
        report = trial(0, number, backend, kind)
        assert not report, f"call {number}: {report}"


def overlaps(call):
    """Whether an array to write lies in the memory of one to read, or around it."""
    out = call.arguments.get("out")
    read = [a for name, a in call.arguments.items() if name != "out" and isinstance(a, np.ndarray)]
    return any(
        np.may_share_memory(array, other)
        for array in (out if isinstance(out, tuple) else [out])
        for other in read
        if array is not None
    )


@KINDS
def test_calls_are_of_every_kind(kind):
    """A generator that only makes errors, or none, would test nothing."""
    calls = [kind.draw(random.Random(f"0 {number}")) for number in range(1000)]
    assert {call.name for call in calls} == set(kind.FUNCTIONS)
    wrong = [call for call in calls if call.wrong]
    assert 200 < len(wrong) < 500
    arguments = set().union(*(call.arguments for call in calls))
    assert {name.partition(".")[0] for call in wrong for name in call.wrong} == arguments
    assert sum(overlaps(call) for call in calls if not call.wrong) > 50


def test_a_complaint_about_what_is_wrong(monkeypatch):
    """A function that does each of the things it must not do is found out."""
    softmax = fl.softmax
    x = np.zeros((4, 3), np.float32)
    call = hostile.Call(
        "softmax", {"logits": x}, frozenset(), [x.view(np.uint8).reshape(-1)], [], False
    )

    def complaint(function, call=call):
        monkeypatch.setattr(
            fl, "softmax", lambda logits, backend, **options:
            (softmax if backend == "numpy" else function)(logits, **options)
        )  # fmt: skip
        return hostile.complaint(call, "cython")

    def changes(logits):
        result = softmax(logits)
        logits[0, 0] = 1
        return result

    def raises(logits, axis=-1):
        raise ValueError("no")

    assert complaint(softmax) is None
    assert "changed 2 bytes" in complaint(changes)
    assert "returned" in complaint(lambda logits: softmax(logits) * np.float32(1.001))
    assert "float64 instead of float32" in complaint(lambda logits: softmax(logits).astype(float))
    assert "shape" in complaint(lambda logits: softmax(logits)[:2])
    assert "raised" in complaint(raises)
    wrong = call._replace(arguments={"logits": x, "axis": 7}, wrong=frozenset(["axis"]))
    assert complaint(softmax, wrong) is None
    assert "does not name axis" in complaint(raises, wrong)
    assert "accepted a wrong axis" in complaint(lambda logits, axis: softmax(logits), wrong)


def all_but_inputs(crew, total, a, b, key, *others, add_product=linear.Crew.add_product):
    if key[0] != "inputs":
        add_product(crew, total, a, b, key, *others)


@pytest.mark.parametrize(
    ("name", "broken", "report"),
    [
        ("_l2_penalty", lambda *_: 0.0, "for loss"),
        ("_add_penalty", lambda *_: None, "for linear_weight"),
        ("_clear", lambda *_: None, "for inputs"),
        ("_add_gradients", lambda *_: None, "for linear_weight"),
        ("_kept", lambda *_: None, "returned nan"),
        ("_put_product", lambda *_: None, "for linear_weight"),
        ("Crew.add_product", all_but_inputs, "for inputs"),
    ],
)
def test_a_complaint_about_the_linear_head(name, broken, report, monkeypatch):
    """Each step that is left out is found out."""
    x, w = np.ones((4, 2), np.float32), np.float32([[1, 2], [2, 3], [0, 1]])
    x[3] = np.nan
    arguments = {
        "inputs": x, "linear_weight": w, "target": np.array([0, 1, 2, -100]), "l2": 0.5,
        "inputs_grad": True, "out": fl.LinearGradients(np.ones_like(w), None, np.ones_like(x)),
    }  # fmt: skip
    function = "linear_cross_entropy_with_grad"
    call = hostile.Call(function, arguments, frozenset(), [], [], False)
    assert hostile_linear.complaint(call, "cython") is None
    arguments["out"].linear_weight.fill(7)
    arguments["out"].inputs.fill(7)
    monkeypatch.setattr(f"fastloss.linear.{name}", broken)
    if name in ("_add_gradients", "Crew.add_product"):  # where rows go by chunks
        monkeypatch.setattr(linear._Plan, "is_one_block", False)
    assert report in hostile_linear.complaint(call, "cython")


@pytest.mark.parametrize("backend", COMPILED, indirect=True)
@pytest.mark.parametrize("dtype", [np.int64, np.uint64, np.int8])
@pytest.mark.parametrize("shape", [(70, 2), (70, 1000), (3, 10, 70)], ids=str)
def test_targets_changed_between_check_and_use(shape, dtype, backend, monkeypatch):
    """Another thread may do so: what has become of the target counts for nothing."""
    kernels = _backend.resolve(backend)
    info = np.iinfo(dtype)
    garbage = [info.min or info.max - 1, info.max if info.max > 1000 else -1]
    check = kernels.check_target

    def check_and_change(labels, *arguments):
        answer = check(labels, *arguments)
        target = labels.target
        target.flat[::2] = np.resize(np.array(garbage, dtype), target.flat[::2].size)
        return answer

    monkeypatch.setattr(kernels, "check_target", check_and_change)
    target = np.ones(shape[0], dtype)
    losses, gradients = fl.linear_cross_entropy_with_grad(
        np.ones((shape[0], 3)), np.eye(shape[1], 3), target, weight=np.ones(shape[1]),
        reduction="none", inputs_grad=True, backend=backend,
    )  # fmt: skip
    assert not losses[target != 1].any()
    assert losses[target == 1].all()
    assert not gradients.inputs[target != 1].any()
    rows = (shape[0], *shape[2:])
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    for function in (fl.cross_entropy_with_grad, fl.nll_loss_with_grad):
        target = np.ones(rows, dtype)
        losses, grad = function(
            x, target, axis=1, weight=np.ones(shape[1]), reduction="none", backend=backend
        )
        changed = target != 1
        assert changed.any()
        assert not losses[changed].any()
        assert losses[~changed].all()
        assert not np.moveaxis(grad, 1, -1)[changed].any()
