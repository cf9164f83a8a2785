"""The classifier: scikit-learn's own checks, LogisticRegression's optimum, and gradient descent."""

import contextlib
import importlib
import json
import pickle
import re
import sys

import numpy as np
import pytest
from support.backends import need

sklearn = need("sklearn")
sparse = need("scipy.sparse")

from sklearn.base import clone  # noqa: E402
from sklearn.datasets import load_digits, load_iris, make_classification  # noqa: E402
from sklearn.exceptions import ConvergenceWarning, NotFittedError  # noqa: E402
from sklearn.linear_model import LogisticRegression  # noqa: E402
from sklearn.utils.estimator_checks import parametrize_with_checks  # noqa: E402

import fastloss as fl  # noqa: E402
import fastloss.sklearn as sklearn_module  # noqa: E402
from fastloss.sklearn import SoftmaxClassifier  # noqa: E402

# What scikit-learn and SciPy say of others is not on trial here.
pytestmark = pytest.mark.filterwarnings(
    "default::DeprecationWarning", "default::PendingDeprecationWarning", "default::FutureWarning"
)
CLASS_WEIGHT = {0: 3.0, 1: 0.5, 2: 1.0}


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@parametrize_with_checks([SoftmaxClassifier(), SoftmaxClassifier(solver="sgd")])
def test_scikit_learn_compatible(estimator, check):
    check(estimator)


@pytest.fixture(scope="module")
def problem():
    """Three classes of badly scaled features, one of them constant, and weights."""
    X, y = make_classification(
        400, 8, n_informative=5, n_classes=3, class_sep=0.7, weights=[0.6, 0.3], random_state=0
    )
    X = X * np.logspace(-2, 2, 8) + np.linspace(-3, 50, 8)
    X[:, 3] = 7.0
    s = np.random.default_rng(0).integers(0, 4, len(y)).astype(float)
    return X, y, s


def tame(X):
    """Of one scale, which LogisticRegression needs to get to the optimum; the means are 1."""
    return (X - X.mean(axis=0)) / X.std(axis=0).clip(min=1e-6) + 1


def total_weight(y, sample_weight, class_weight):
    s = np.ones(len(y)) if sample_weight is None else sample_weight
    if class_weight == "balanced":
        return s.sum()
    return (s * np.vectorize(dict.get)(class_weight, y)).sum() if class_weight else s.sum()


def logistic_regression(X, y, C, s=None, **parameters):
    options = {"solver": "newton-cg", "tol": 1e-10, "max_iter": 10_000}
    return LogisticRegression(C=C, **options, **parameters).fit(X, y, s)


def agree(ours, theirs, X, tolerance=1e-4):
    np.testing.assert_allclose(ours.coef_, theirs.coef_, rtol=0, atol=tolerance)
    np.testing.assert_allclose(
        ours.predict_proba(X), theirs.predict_proba(X), rtol=0, atol=tolerance
    )


@pytest.mark.parametrize("solver", ["lbfgs", "sgd"])
def test_negative_class_weights(solver, backend):
    """Without an intercept, which could go to infinity, there is an optimum for them."""
    X, y = load_iris(return_X_y=True)
    X, weights = (X - X.mean(axis=0)) / X.std(axis=0), {0: 1.0, 1: 1.5, 2: -0.1}
    options = {"fit_intercept": False, "class_weight": weights}
    theirs = LogisticRegression(C=0.1, tol=1e-10, max_iter=5000, **options).fit(X, y)
    ours = SoftmaxClassifier(
        solver=solver, l2=1 / (2 * 0.1 * total_weight(y, None, weights)), tol=1e-8, max_iter=500,
        batch_size=150, schedule="constant", n_iter_no_change=500, backend=backend, **options,
    ).fit(X, y)  # fmt: skip
    agree(ours, theirs, X)


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "sample_weight"])
@pytest.mark.parametrize("class_weight", [None, "balanced", CLASS_WEIGHT], ids=["1", "b", "dict"])
@pytest.mark.parametrize("C", [0.01, 1.0, 100.0])
def test_the_optimum_is_that_of_logistic_regression(problem, C, class_weight, weighted):
    X, y, s = problem
    X, s = tame(X), s if weighted else None
    theirs = logistic_regression(X, y, C, s, class_weight=class_weight)
    ours = SoftmaxClassifier(
        l2=1 / (2 * C * total_weight(y, s, class_weight)), class_weight=class_weight,
        tol=1e-9, max_iter=5000,
    ).fit(X, y, s)  # fmt: skip
    agree(ours, theirs, X)
    assert abs(ours.coef_[:, 3]).max() < 1e-6  # the constant feature


@pytest.mark.parametrize("fit_intercept", [False, True])
@pytest.mark.parametrize("container", ["csr_array", "csr_matrix", "csc_array"])
def test_the_optimum_for_sparse_features(problem, container, fit_intercept):
    X, y, _ = problem
    X = X / abs(X).max(axis=0)
    X[np.random.default_rng(1).random(X.shape) < 0.5] = 0
    theirs = logistic_regression(X, y, 10.0, fit_intercept=fit_intercept)
    l2 = 1 / (2 * 10.0 * len(y))
    parameters = {"l2": l2, "tol": 1e-8, "max_iter": 2000, "fit_intercept": fit_intercept}
    dense = SoftmaxClassifier(**parameters).fit(X, y)
    ours = SoftmaxClassifier(**parameters).fit(getattr(sparse, container)(X), y)
    agree(dense, theirs, X)
    agree(ours, theirs, X)
    for method in ("predict", "predict_proba", "predict_log_proba", "decision_function"):
        from_sparse = getattr(ours, method)(sparse.csr_array(X))
        np.testing.assert_allclose(from_sparse, getattr(ours, method)(X), rtol=1e-10)
    if not fit_intercept:
        assert not ours.intercept_.any()


def test_two_classes(problem):
    """One row of coefficients there is two here, and half as much is penalised."""
    X, y, _ = problem
    X, y = X / abs(X).max(axis=0), np.where(y == 0, "no", "yes")
    theirs = logistic_regression(X, y, 5.0)
    ours = SoftmaxClassifier(l2=1 / (5.0 * len(y)), tol=1e-8, max_iter=1000).fit(X, y)
    np.testing.assert_allclose(ours.coef_[1:] - ours.coef_[:1], theirs.coef_, atol=1e-4)
    np.testing.assert_allclose(np.diff(ours.intercept_), theirs.intercept_, atol=1e-4)
    np.testing.assert_allclose(ours.decision_function(X), theirs.decision_function(X), atol=1e-4)
    np.testing.assert_array_equal(ours.predict(X), theirs.predict(X))


def test_float32_stays_float32(problem):
    X, y, _ = problem
    theirs = logistic_regression(tame(X), y, 1.0)
    X32 = tame(X).astype(np.float32)
    for solver in ("lbfgs", "sgd"):
        ours = SoftmaxClassifier(solver=solver, l2=1 / (2 * len(y)), tol=1e-6).fit(X32, y)
        assert ours.coef_.dtype == ours.intercept_.dtype == np.float32
        assert ours.predict_proba(X32).dtype == np.float32
        if solver == "lbfgs":
            right = theirs.predict_proba(X32)
            np.testing.assert_allclose(ours.predict_proba(X32), right, rtol=0, atol=1e-3)
            assert objective(ours, X32, y) == pytest.approx(objective(theirs, X32, y, ours.l2))


def test_badly_scaled_features_need_no_scaling(problem):
    X, y, _ = problem
    few = SoftmaxClassifier(l2=0, max_iter=60, tol=1e-6).fit(X, y)
    scaled = SoftmaxClassifier(l2=0, max_iter=60, tol=1e-6).fit((X - X.mean(axis=0)), y)
    assert few.n_iter_ < 60
    np.testing.assert_allclose(
        few.predict_proba(X), scaled.predict_proba(X - X.mean(axis=0)), atol=1e-4
    )


def test_every_backend_trains_alike(backend):
    X, y = load_iris(return_X_y=True)
    for solver in ("lbfgs", "sgd"):
        parameters = {"solver": solver, "max_iter": 15, "tol": 0.0, "random_state": 0}
        with pytest.warns(ConvergenceWarning) if solver == "lbfgs" else contextlib.nullcontext():
            ours = SoftmaxClassifier(**parameters, backend=backend).fit(X, y)
            reference = SoftmaxClassifier(**parameters, backend="numpy").fit(X, y)
        np.testing.assert_allclose(ours.loss_curve_, reference.loss_curve_, rtol=1e-6)
        np.testing.assert_allclose(ours.coef_, reference.coef_, atol=1e-6)
        np.testing.assert_allclose(ours.predict_proba(X), reference.predict_proba(X), atol=1e-6)


def test_the_keyword_backend_is_used():
    X, y = load_iris(return_X_y=True)
    with pytest.raises(ValueError, match="backend = 'nump' is not a backend"):
        SoftmaxClassifier(backend="nump").fit(X, y)
    fl.set_backend("numpy")
    model = SoftmaxClassifier(backend="cython").fit(X, y)
    model.backend = "nump"
    with pytest.raises(ValueError, match="backend = 'nump' is not a backend"):
        model.predict_proba(X)


def test_outputs_fit_together():
    X, y = load_digits(return_X_y=True)
    labels = np.array([f"digit {i}" for i in range(10)])[::-1][y]
    model = SoftmaxClassifier().fit(X, labels)
    scores = model.decision_function(X)
    assert model.coef_.shape == (10, 64)
    np.testing.assert_allclose(scores, X @ model.coef_.T + model.intercept_, atol=1e-10)
    np.testing.assert_allclose(model.predict_proba(X), fl.softmax(scores), atol=1e-12)
    np.testing.assert_allclose(np.exp(model.predict_log_proba(X)), fl.softmax(scores), atol=1e-12)
    np.testing.assert_array_equal(model.predict(X), model.classes_[scores.argmax(axis=1)])
    assert model.score(X, labels) == np.mean(model.predict(X) == labels) > 0.99
    assert len(model.loss_curve_) == model.n_iter_ + 1
    assert model.loss_curve_[0] == pytest.approx(np.log(10))
    assert model.loss_curve_ == sorted(model.loss_curve_, reverse=True)
    loss = fl.cross_entropy(scores, np.searchsorted(model.classes_, labels))
    assert model.loss_curve_[-1] == pytest.approx(loss + fl.l2_penalty(model.coef_, 1e-4))


def test_predict_by_chunks(monkeypatch):
    X, y = load_digits(return_X_y=True)
    model = SoftmaxClassifier().fit(X, y)
    whole = model.predict(X)
    monkeypatch.setattr("fastloss.sklearn._CHUNK_ELEMENTS", 700)
    np.testing.assert_array_equal(model.predict(X), whole)
    np.testing.assert_allclose(SoftmaxClassifier().fit(X, y).coef_, model.coef_, atol=1e-4)


def test_lbfgs_says_when_it_is_not_there_yet():
    X, y = load_digits(return_X_y=True)
    with pytest.warns(ConvergenceWarning, match="ended after 3 iterations with a gradient of 0"):
        model = SoftmaxClassifier(max_iter=3).fit(X, y)
    assert model.n_iter_ == 3


# Gradient descent


@pytest.fixture(scope="module")
def digits():
    X, y = load_digits(return_X_y=True)
    X = (X / 16).astype(np.float32)
    optimum = SoftmaxClassifier(tol=1e-7, max_iter=2000).fit(X.astype(np.float64), y)
    return X, y, optimum.loss_curve_[-1]


def sgd(**parameters):
    return SoftmaxClassifier(**{"solver": "sgd", "random_state": 0} | parameters)


def objective(model, X, y, l2=None):
    coef, intercept = model.coef_.astype(X.dtype), model.intercept_.astype(X.dtype)
    l2 = model.l2 if l2 is None else l2
    return fl.linear_cross_entropy(X, coef, y, linear_bias=intercept, l2=l2)


@pytest.mark.parametrize(
    "parameters",
    [
        {"schedule": "cosine", "learning_rate": 0.5},
        {"schedule": "sqrt", "learning_rate": 0.5},
        {"schedule": "constant", "learning_rate": 0.1},
        {"schedule": "constant", "learning_rate": 0.5, "momentum": 0.0},
        {"schedule": "constant"},
    ],
    ids=str,
)
def test_sgd_comes_near_the_optimum(digits, parameters):
    X, y, optimum = digits
    model = sgd(batch_size=32, max_iter=60, tol=0.0, n_iter_no_change=60, **parameters).fit(X, y)
    assert optimum < objective(model, X, y) < 1.15 * optimum


def test_sgd_of_whole_batches_reaches_the_optimum():
    X, y = load_iris(return_X_y=True)
    X = (X - X.mean(axis=0)) / X.std(axis=0)
    exact = SoftmaxClassifier(l2=0.01, tol=1e-9).fit(X, y)
    for container in (np.asarray, sparse.csr_array):
        model = sgd(
            l2=0.01, batch_size=150, schedule="constant", tol=0, max_iter=3000, n_iter_no_change=99
        ).fit(container(X), y)
        np.testing.assert_allclose(model.coef_, exact.coef_, atol=1e-4)
        # Only differences of intercepts have a meaning; both sum to 0.
        np.testing.assert_allclose(model.intercept_, exact.intercept_, atol=1e-4)


def test_a_step_is_what_it_should_be(digits):
    """One batch of all samples: the first steps by hand, of gradients in float64."""
    X, y, _ = digits
    X, s = X.astype(np.float64), np.random.default_rng(0).random(len(y))
    model = sgd(batch_size=len(y), learning_rate=0.3, momentum=0.5, schedule="sqrt", max_iter=3)
    model.fit(X, y, s)
    layer = [np.zeros((10, 64)), np.zeros(10)]
    velocity = [0.0, 0.0]
    for epoch in range(3):
        loss, gradients = fl.linear_cross_entropy_with_grad(
            X, layer[0], y, linear_bias=layer[1], sample_weight=s, l2=1e-4
        )
        assert loss == pytest.approx(model.loss_curve_[epoch])
        for i in range(2):
            velocity[i] = 0.5 * velocity[i] - 0.3 / np.sqrt(1 + epoch) * gradients[i]
            layer[i] = layer[i] + velocity[i]
    np.testing.assert_allclose(model.coef_, layer[0], atol=1e-12)
    np.testing.assert_allclose(model.intercept_, layer[1], atol=1e-12)


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_small_batches_are_those_of_the_linear_head(
    digits, monkeypatch, dtype, weighted, intercept
):
    X, y, _ = digits
    X, s = X.astype(dtype), np.random.default_rng(0).integers(0, 3, len(y)) * weighted + 1.0
    parameters = {"l2": 0.01, "batch_size": 50, "max_iter": 2, "fit_intercept": intercept}
    small = sgd(**parameters).fit(X, y, s)
    monkeypatch.setattr(sklearn_module, "_FEW_PRODUCTS", 0)
    large = sgd(**parameters).fit(X, y, s)
    tolerance = 1e-4 if dtype == np.float32 else 1e-12
    assert small.loss_curve_ == pytest.approx(large.loss_curve_, rel=tolerance)
    np.testing.assert_allclose(small.coef_, large.coef_, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(small.intercept_, large.intercept_, rtol=tolerance, atol=tolerance)


def test_seeds(digits):
    X, y, _ = digits
    first, again, other = (sgd(max_iter=3, random_state=seed).fit(X, y) for seed in (0, 0, 1))
    assert first.loss_curve_ == again.loss_curve_
    np.testing.assert_array_equal(first.coef_, again.coef_)
    assert first.loss_curve_ != other.loss_curve_


def test_weights_of_samples_and_classes_are_the_same_thing(digits):
    X, y, _ = digits
    by_class = sgd(max_iter=3, class_weight={3: 5.0}).fit(X, y)
    by_sample = sgd(max_iter=3).fit(X, y, np.where(y == 3, 5.0, 1.0))
    np.testing.assert_array_equal(by_class.coef_, by_sample.coef_)
    plain = sgd(max_iter=3).fit(X, y)
    assert np.mean(by_class.predict(X) == 3) > np.mean(plain.predict(X) == 3)


def test_samples_of_weight_0_may_as_well_be_away(digits):
    X, y, _ = digits
    s = np.random.default_rng(0).random(len(y)) < 0.5
    for solver in ("lbfgs", "sgd"):
        weighted = sgd(solver=solver).fit(X, y, s)
        shorter = sgd(solver=solver).fit(X[s], y[s])
        np.testing.assert_allclose(weighted.coef_, shorter.coef_, atol=1e-5)


@pytest.mark.parametrize("solver", ["lbfgs", "sgd"])
def test_balanced_classes_of_any_weight(solver):
    """What its samples weigh does not matter, unless that is 0: a class then counts for nothing."""
    X, y = load_iris(return_X_y=True)
    balanced = sgd(solver=solver, class_weight="balanced", l2=0.01, tol=1e-6)
    even = balanced.fit(X, y).coef_
    for size in (5.0, 1e-310):
        found = clone(balanced).fit(X, y, np.where(y == 1, size, 1.0)).coef_
        np.testing.assert_allclose(found, even, atol=1e-6)
    s = np.where(y == 2, 0.0, y + 1.0)
    found = clone(balanced).fit(X, y, s)
    by_hand = clone(balanced).set_params(class_weight={0: 1.0, 1: 0.5}).fit(X, y, s)
    assert found.classes_.tolist() == [0, 1, 2]
    np.testing.assert_allclose(found.coef_, by_hand.coef_, atol=1e-6)


def test_sgd_ends_when_nothing_changes(digits):
    X, y, _ = digits
    model = sgd(tol=0.05, n_iter_no_change=3).fit(X, y)
    assert model.n_iter_ == len(model.loss_curve_) < 40
    *before, a, b, c = model.loss_curve_
    assert min(a, b, c) >= min(before) - 3 * 0.05
    assert before[-1] < min(before[:-1]) - 0.05


def test_early_stopping(digits):
    X, y, _ = digits
    X, y = X[:300], y[:300]
    model = sgd(
        early_stopping=True, validation_fraction=0.3, l2=0, learning_rate=2.0, schedule="constant",
        tol=0.0, max_iter=300,
    ).fit(X, y)  # fmt: skip
    assert model.n_iter_ == len(model.loss_curve_) == len(model.validation_curve_) < 300
    best = int(np.argmin(model.validation_curve_))
    assert best == model.n_iter_ - 1 - model.n_iter_no_change
    shorter = clone(model).set_params(max_iter=best + 1).fit(X, y)
    np.testing.assert_array_equal(model.coef_, shorter.coef_)  # those of the best epoch


@pytest.mark.parametrize("fraction", [0.2, 0.5])
def test_as_much_of_every_class_is_set_aside(monkeypatch, fraction):
    right, seen = fl.linear_cross_entropy, []

    def watched(X, coef, target, **options):
        seen.append(np.bincount(target).tolist())
        return right(X, coef, target, **options)

    monkeypatch.setattr("fastloss.sklearn.linear_cross_entropy", watched)
    counts = np.array([80, 20, 10])
    y = np.repeat(range(3), counts)
    for seed in range(3):
        sgd(
            early_stopping=True, validation_fraction=fraction, max_iter=1, random_state=seed
        ).fit(y[:, None], y)  # fmt: skip
    assert seen == 3 * [(fraction * counts).tolist()]


def test_early_stopping_keeps_the_best_however_little_better(digits):
    X, y, _ = digits
    model = sgd(early_stopping=True, tol=1.0, learning_rate=1e-3, momentum=0.0).fit(X, y)
    assert model.n_iter_ == 1 + model.n_iter_no_change
    assert np.all(np.diff(model.validation_curve_) < 0)  # the last is the best, by less than tol
    longer = clone(model).set_params(tol=0.0, max_iter=model.n_iter_).fit(X, y)
    np.testing.assert_array_equal(model.coef_, longer.coef_)


def test_warm_start(digits):
    X, y, _ = digits
    model = SoftmaxClassifier(warm_start=True).fit(X, y)
    needed = model.n_iter_
    assert needed > 10 > model.fit(X, y).n_iter_
    assert clone(model).fit(X, y).n_iter_ == needed
    one = sgd(max_iter=6, tol=0.0).fit(X, y)
    three = sgd(max_iter=2, tol=0.0, warm_start=True)
    losses = []
    for _ in range(3):
        losses += three.fit(X, y).loss_curve_
        assert three.n_iter_ == len(three.loss_curve_) == 2
    assert losses == one.loss_curve_
    np.testing.assert_array_equal(three.coef_, one.coef_)
    for wrong in ((X[:, :9], y), (X[y > 0], y[y > 0])):
        with pytest.raises(ValueError, match="warm_start = True, but X and y have"):
            three.fit(*wrong)


def test_after_lbfgs_gradient_descent_begins_anew(digits):
    """The velocity that it had before would lead away from where L-BFGS ended."""
    X, y, _ = digits
    before, never = sgd(max_iter=2, warm_start=True).fit(X, y), sgd(max_iter=2, warm_start=True)
    for model in (before, never):
        model.set_params(solver="lbfgs", max_iter=200).fit(X, y)
    never.coef_, never.intercept_ = before.coef_.copy(), before.intercept_.copy()
    for model in (before, never):
        model.set_params(solver="sgd", max_iter=2).fit(X, y)
    assert before.loss_curve_ == never.loss_curve_
    np.testing.assert_array_equal(before.coef_, never.coef_)


def test_the_cosine_schedule_ends_at_0(digits):
    """And stays there, however often partial_fit is called."""
    X, y, _ = digits
    model = sgd(max_iter=2, schedule="cosine", momentum=0.0)
    for _ in range(2):
        model.partial_fit(X, y, classes=range(10))
    end = model.coef_.copy()
    assert end.any()
    for _ in range(2):
        np.testing.assert_array_equal(model.partial_fit(X, y).coef_, end)


def test_partial_fit_is_an_epoch(digits):
    X, y, _ = digits
    s = np.random.default_rng(0).random(len(y))
    for data in (X, sparse.csr_array(X)):
        whole = sgd(max_iter=4, tol=0.0).fit(data, y, s)
        model = sgd(max_iter=4)
        for _ in range(4):
            model.partial_fit(data, y, classes=np.arange(10), sample_weight=s)
        assert model.loss_curve_ == whole.loss_curve_
        assert model.n_iter_ == 4
        np.testing.assert_array_equal(model.coef_, whole.coef_)
    whole.partial_fit(data, y, sample_weight=s)  # goes on where fit ended
    assert whole.loss_curve_[:4] == model.loss_curve_
    assert whole.n_iter_ == len(whole.loss_curve_) == 5


def test_partial_fit_of_a_stream(digits):
    X, y, _ = digits
    order = np.argsort(y, kind="stable")  # the first parts do not have all classes
    model = sgd(learning_rate=0.1, momentum=0.0, schedule="constant")
    for _ in range(20):
        for part in np.array_split(order, 30)[::-7] + np.array_split(order, 30):
            model.partial_fit(X[part], y[part], classes=range(10))
    assert model.score(X, y) > 0.8


def test_partial_fit_is_for_gradient_descent():
    assert hasattr(SoftmaxClassifier(solver="sgd"), "partial_fit")
    assert not hasattr(SoftmaxClassifier(), "partial_fit")


def test_pickles(digits):
    X, y, _ = digits
    for model in (SoftmaxClassifier().fit(X, y), sgd(max_iter=2).fit(X, y)):
        copy = pickle.loads(pickle.dumps(model))
        np.testing.assert_array_equal(copy.predict_proba(X), model.predict_proba(X))
    np.testing.assert_array_equal(  # with its velocity and random numbers
        copy.partial_fit(X, y).coef_, model.partial_fit(X, y).coef_
    )


def test_progress_bar(digits, capsys):
    X, y, _ = digits
    SoftmaxClassifier(verbose=True).fit(X, y)
    assert re.search(r"fit: .*/200 .*iteration.*loss=0\.\d+", capsys.readouterr().err)
    model = sgd(verbose=True, max_iter=2).fit(X, y)
    assert re.search(r"fit: 100%.*3\.59k/3\.59k .*sample.*loss=[\d.]+", capsys.readouterr().err)
    model.verbose = False
    model.partial_fit(X, y)
    assert capsys.readouterr() == ("", "")


def test_tqdm_is_only_needed_for_the_bar(digits, monkeypatch):
    X, y, _ = digits
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    sgd(max_iter=1).fit(X, y)
    with pytest.raises(ImportError, match=r"needs tqdm: run `pip install 'fastloss\[sklearn\]'`"):
        sgd(max_iter=1, verbose=True).fit(X, y)


def test_without_scikit_learn(python):
    printed = python(
        "import sys; sys.modules['sklearn'] = sys.modules['sklearn.base'] = None\n"
        "try:\n    import fastloss.sklearn\n"
        "except ImportError as error:\n    print(error)"
    )
    assert printed.startswith("fastloss.sklearn needs scikit-learn: run `pip install 'fastloss[sk")


X, Y = np.random.default_rng(0).normal(size=(20, 3)), np.arange(20) % 4
ERRORS = [
    ({"class_weight": {0: 0, 1: 0, 2: 0, 3: 0}}, "leave no sample that counts"),
    ({"class_weight": {1: np.nan}}, r"class_weight\[1\] = nan is not a finite number"),
    ({"class_weight": {0: 1, 2: -np.inf}}, r"class_weight\[2\] = -inf is not a finite number"),
    ({"class_weight": {1: "2"}}, r"class_weight\[1\] = '2' is not a finite number"),
    ({"class_weight": {1: 10**400}}, r"class_weight\[1\] = 10{400} is not a finite number"),
    ({"class_weight": {5: 1.0}}, r"The classes, \[0, 1, 2, 3\], are not in class_weight"),
    (
        {"class_weight": {0: 1e308}, "sample_weight": Y + 1e308},
        "sample_weight, times class_weight, sums to inf over 20 samples",
    ),
    ({"class_weight": {0: -3}}, "sample_weight, times class_weight, sums to 0.0 over 20 samples"),
    (
        {"early_stopping": True, "solver": "sgd"},
        "validation_fraction = 0.1 sets 2 of 20 samples aside; both .* one of each of 4 classes",
    ),
    (
        {"early_stopping": True, "solver": "sgd", "validation_fraction": 0.9},
        "validation_fraction = 0.9 sets 18 of 20 samples aside",
    ),
    (
        {"early_stopping": True, "solver": "sgd", "y": np.where(np.arange(20) == 7, "a", "b")},
        "early_stopping = True, but only one sample of class a counts",
    ),
    ({"learning_rate": 1e308, "solver": "sgd"}, "the loss is .* in epoch .*: learning_rate = 1e"),
    ({"y": Y * 0}, "y has one class, 0; at least 2 classes are needed"),
    ({"y": Y + 0.5}, "Unknown label type"),
    ({"sample_weight": -Y}, "Negative values"),
    ({"sample_weight": Y[:3]}, r"sample_weight.shape == \(3,\)"),
    ({"sample_weight": 0 * Y}, "at least one non-zero number"),
]


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning", "ignore:invalid:RuntimeWarning")
@pytest.mark.parametrize(("wrong", "message"), ERRORS)
def test_errors(wrong, message):
    parameters = dict(wrong)
    y, s = parameters.pop("y", Y), parameters.pop("sample_weight", None)
    with pytest.raises(ValueError, match=message):
        SoftmaxClassifier(**parameters).fit(X, y, s)


WRONG = {
    "l2": ("a finite number of at least 0", [-1, np.nan, np.inf, 10**400, "1", None, True]),
    "fit_intercept": ("True or False", ["no", 1, None, np.ones(2)]),
    "class_weight": ("a dict, 'balanced' or None", ["equal", [1.0, 2.0], 2.0, np.ones(4)]),
    "solver": ("'lbfgs' or 'sgd'", ["saga", None, np.array(["sgd", "lbfgs"])]),
    "max_iter": ("an integer of at least 1", [0, 2.5, "9", True, None, 10**400]),
    "tol": ("a number of at least 0", [-1e-9, np.nan, "0", None, False]),
    "batch_size": ("an integer of at least 1", [0, 128.0, True, None, "auto"]),
    "learning_rate": (
        "'auto' or a finite number above 0", [0, -1.0, np.nan, np.inf, "fast", None, np.ones(2)]
    ),
    "schedule": ("'sqrt', 'constant' or 'cosine'", ["linear", None, 1.0]),
    "momentum": ("a number from 0 to below 1", [1, -0.1, np.nan, "0.9", None]),
    "early_stopping": ("True or False", ["no", 1, None]),
    "validation_fraction": ("a number between 0 and 1", [0.0, 1.0, 5, np.nan, "0.1", None]),
    "n_iter_no_change": ("an integer of at least 1", [-1, 0, 5.0, None, True]),
    "warm_start": ("True or False", ["yes", 0, None]),
    "random_state": (
        "an integer from 0 to 2**32 - 1, a RandomState or None",
        [-1, 2**32, 0.5, "seed", np.random.default_rng(0)],
    ),
    "verbose": ("True, False or an integer of at least 0", ["no", -1, 0.5, None]),
    "backend": ("a backend", ["nump", 1]),
    "num_threads": ("an integer", [1.5, "2"]),
}  # fmt: skip


@pytest.mark.parametrize("name", SoftmaxClassifier().get_params())
def test_every_parameter_is_checked(name):
    """By whichever solver is to use it, and whether it does or not."""
    expected, values = WRONG[name]
    for value in values:
        message = "^" + re.escape(f"{name} = {value!r} is not {expected}")
        for solver in ("lbfgs", "sgd"):
            model = SoftmaxClassifier(**{"solver": solver, name: value})
            with pytest.raises((ValueError, TypeError), match=message):
                model.fit(X, Y)
        if name != "solver":
            with pytest.raises((ValueError, TypeError), match=message):
                model.partial_fit(X, Y, classes=range(4))


@pytest.mark.parametrize(
    ("parameters", "arguments", "message"),
    [
        ({}, {}, "classes = None, but the first partial_fit has to know them all"),
        ({}, {"classes": [0, 1, 3]}, "y has 2, which is not one of the classes"),
        ({"class_weight": "balanced"}, {"classes": range(4)}, "'balanced' needs all samples"),
        ({"early_stopping": True}, {"classes": range(4)}, "early_stopping = True needs all sampl"),
    ],
)
def test_partial_fit_errors(parameters, arguments, message):
    with pytest.raises(ValueError, match=message):
        sgd(**parameters).partial_fit(X, Y, **arguments)


def test_later_classes_must_be_the_first_ones():
    model = sgd().partial_fit(X, Y, classes=range(4))
    with pytest.raises(ValueError, match="are not those of the first call"):
        model.partial_fit(X, Y, classes=range(5))
    with pytest.raises(ValueError, match="y has 4, which is not one of the classes"):
        model.partial_fit(X, Y + 1)


def test_not_fitted():
    with pytest.raises(NotFittedError):
        SoftmaxClassifier().predict(X)


def test_benchmark(tmp_path, monkeypatch):
    """bench/classifier.py on tiny problems: a table between the markers, and it stays one."""
    benchmark = importlib.import_module("classifier")
    tiny = {"100 classes": (200, 5, 10), "1000 classes": (200, 5, 20)}
    monkeypatch.setattr(benchmark, "QUICK", tiny)
    readme, figures = tmp_path / "README.md", tmp_path / "classifier.json"
    readme.write_text("before\n<!-- classifier:begin -->\n<!-- classifier:end -->\nafter\n")
    for problem in reversed(tiny):
        files = ["--json", str(figures), "--readme", str(readme)]
        benchmark.main(["--quick", "--problem", problem, *files])
    text = readme.read_text()
    assert text.startswith("before\n<!-- classifier:begin -->\n**100 classes**: 200 samples, 5 ")
    assert text.endswith("|\n<!-- classifier:end -->\nafter\n")
    results = json.loads(figures.read_text())
    assert list(results) == list(tiny)
    for result in results.values():
        assert len(result["fits"]) == 4
        for fit in result["fits"]:
            assert fit["reached"]
            assert 0 < fit["loss"] <= result["optimum"] * 1.001
            row = rf"\| {fit['contender']} \| {fit['dtype']} \| .* \| {fit['iterations']} \|"
            assert re.search(row, text)
