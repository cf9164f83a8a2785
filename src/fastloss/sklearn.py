"""A softmax classifier for scikit-learn, trained by the fused loss and gradient of the linear head.

Two solvers, one objective: L-BFGS of SciPy over all samples, and mini-batch gradient descent with
momentum.
"""

import contextlib
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from fastloss import _blas
from fastloss.functional import log_softmax, softmax
from fastloss.linear import LinearGradients, linear_cross_entropy, linear_cross_entropy_with_grad
from fastloss.losses import cross_entropy_with_grad

try:
    from scipy.optimize import minimize
    from sklearn.base import BaseEstimator, ClassifierMixin
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.model_selection import train_test_split
    from sklearn.utils import check_random_state, gen_batches
    from sklearn.utils.class_weight import compute_class_weight
    from sklearn.utils.extmath import row_norms, safe_sparse_dot
    from sklearn.utils.metaestimators import available_if
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data
except ImportError as error:
    raise ImportError(
        f"fastloss.sklearn needs scikit-learn: run `pip install 'fastloss[sklearn]'` ({error})"
    ) from error

__all__ = ["SoftmaxClassifier"]

_FLOATS = [np.float64, np.float32]
_CHUNK_ELEMENTS = 1 << 22  # of what need not be in memory all at once
_FEW_PRODUCTS = 1 << 20  # of numbers: they take less than what a linear head has around them
_ROUNDING = 1e-12  # of a variance, relative to the mean square
_LARGEST = sys.float_info.max
_CORRECTIONS = 20  # pairs of vectors that L-BFGS remembers


class SoftmaxClassifier(ClassifierMixin, BaseEstimator):
    r"""Multinomial logistic regression with an L2 penalty.

    With the scores :math:`x_n = W f_n + b` of a sample of features :math:`f_n`, minimises

    .. math:: \frac{\sum_n s_n w_{y_n} \operatorname{cross\_entropy}(x_n, y_n)}
              {\sum_n s_n w_{y_n}} + l_2 \sum_{c,d} W_{c,d}^2

    over W and b, where s are sample weights and w class weights.

    Parameters
    ----------
    l2 : float
        The factor on the sum of the squares of W, at least 0; the intercept is not penalised.
    fit_intercept : bool
        Whether to have b.
    class_weight : dict, "balanced" or None
        A finite weight per label, 1 where the dict has none.  "balanced" weighs classes by the
        inverse of their share in `y` (and in `sample_weight`; without one they count for nothing).
        Below 0 it leads away from a class; there is an optimum then with an `l2` and without an
        intercept only.
    solver : {"lbfgs", "sgd"}
        ``"lbfgs"`` uses all samples for every step and goes on to the optimum.  ``"sgd"`` is
        mini-batch gradient descent with momentum, in an order shuffled anew for every epoch.
    max_iter : int
        The most iterations of L-BFGS, or epochs of gradient descent.
    tol : float
        L-BFGS ends where no entry of the gradient, in the standardized coordinates of the notes,
        is larger.  Gradient descent ends where the loss of an epoch was not lower than
        the least before by more than `tol`, `n_iter_no_change` times in a row.
    batch_size : int
        Samples per step of gradient descent.
    learning_rate : float or "auto"
        The length of the first step over the gradient.  "auto" is
        :math:`2 / (1 + \operatorname{mean} \lVert f_n \rVert^2)`, one over a bound of the second
        derivatives of the loss.  Features of mean 0 and variance 1 often allow for more, and
        always for faster training.
    schedule : {"sqrt", "constant", "cosine"}
        What the learning rate is multiplied with after t epochs: 1 / sqrt(1 + t), 1, or
        (1 + cos(pi t / max_iter)) / 2, which is 0 after `max_iter` epochs.  For this last one make
        `n_iter_no_change` large: training is to end at the end.
    momentum : float
        The share of the last step that is part of the next, from 0 to below 1.
    early_stopping : bool
        `fit` by gradient descent only: set a part of the samples aside, measure the loss on them,
        not on the others, to decide when to end, and keep the parameters where it was least.
    validation_fraction : float
        How much is set aside, between 0 and 1: as much of every class, and of each some.
    n_iter_no_change : int
        See `tol`.
    warm_start : bool
        Start from the parameters of the last `fit`.  L-BFGS begins anew from there; gradient
        descent keeps its velocity, its random numbers and its place in the schedule, too.
    random_state : int, RandomState or None
        Shuffles and splits of gradient descent.
    verbose : bool or int
        Show a progress bar (of tqdm).
    backend, num_threads : optional
        As in `linear_cross_entropy`.

    Attributes
    ----------
    classes_ : ndarray, shape (C,)
        The labels.
    coef_ : ndarray, shape (C, D)
        W; two rows for two classes.  float32 for float32 features, else float64.
    intercept_ : ndarray, shape (C,)
        b; zeros without an intercept.
    n_iter_ : int
        Iterations or epochs of the last `fit`, or epochs so far with `partial_fit`.
    loss_curve_ : list of float
        L-BFGS: the loss at the start and after every iteration.  Gradient descent: the mean loss
        of the steps of every epoch.
    validation_curve_ : list of float
        With `early_stopping`, the data loss on what was set aside after every epoch.
    n_features_in_ : int
    feature_names_in_ : ndarray of str
        Only where the features have names.

    Raises
    ------
    ImportError
        At ``import fastloss.sklearn``, where scikit-learn is not installed.
    ValueError, TypeError
        From `fit`, if a parameter or an array is wrong.

    Notes
    -----
    `sklearn.linear_model.LogisticRegression` minimises
    :math:`C \sum_n s_n L_n + \frac12 \sum W^2`.  That has the same optimum for

    .. math:: l_2 = \frac{1}{2 \, C \sum_n s_n w_{y_n}}

    or ``1 / (2 * C * len(y))`` without weights.  For two classes it has one row of coefficients,
    the difference of the two here, :math:`w = W_1 - W_0` with :math:`W_1 = -W_0`, and half as
    much is penalised: there ``l2 = 1 / (C * len(y))``.

    L-BFGS does not see W and b but standardized coordinates, those of features of mean 0 (with an
    intercept) and of a scale that makes the diagonal of the Hessian at W = 0 all ones:

    .. math:: V_{c,d} = W_{c,d} \sqrt{\pi_c (1 - \pi_c) \operatorname{var}_d + 2 l_2}

    with the shares :math:`\pi` of the classes.  Features need not be scaled for it, and are not
    copied.  Products of float32 features are in float32; L-BFGS then ends at the latest where no
    lower loss shows in them.

    The methods are those of [1]_ and [2]_.

    References
    ----------
    .. [1] D. C. Liu, J. Nocedal, "On the limited memory BFGS method for large scale optimization",
       Mathematical Programming 45, 1989.
    .. [2] B. T. Polyak, "Some methods of speeding up the convergence of iteration methods", 1964.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from fastloss.sklearn import SoftmaxClassifier
    >>> X, y = load_iris(return_X_y=True)
    >>> classifier = SoftmaxClassifier(l2=1e-3).fit(X, y)
    >>> classifier.predict(X[:3])
    array([0, 0, 0])
    >>> round(classifier.score(X, y), 2)
    0.99
    """

    def __init__(
        self,
        *,
        l2: float = 1e-4,
        fit_intercept: bool = True,
        class_weight: Any = None,
        solver: str = "lbfgs",
        max_iter: int = 200,
        tol: float = 1e-4,
        batch_size: int = 128,
        learning_rate: float | str = "auto",
        schedule: str = "sqrt",
        momentum: float = 0.9,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        n_iter_no_change: int = 5,
        warm_start: bool = False,
        random_state: Any = None,
        verbose: bool = False,
        backend: str | None = None,
        num_threads: int | None = None,
    ) -> None:
        self.l2 = l2
        self.fit_intercept = fit_intercept
        self.class_weight = class_weight
        self.solver = solver
        self.max_iter = max_iter
        self.tol = tol
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.schedule = schedule
        self.momentum = momentum
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.n_iter_no_change = n_iter_no_change
        self.warm_start = warm_start
        self.random_state = random_state
        self.verbose = verbose
        self.backend = backend
        self.num_threads = num_threads

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> "SoftmaxClassifier":
        """Train on all samples until the solver ends.

        Parameters
        ----------
        X : array_like or CSR matrix, shape (N, D)
            The features.  float32 stays float32; other types become float64, other sparse formats
            CSR.
        y : array_like, shape (N,)
            Labels of at least two classes.
        sample_weight : array_like, shape (N,), optional
            How much each sample counts, at least 0.

        Returns
        -------
        SoftmaxClassifier
            Itself.

        Warns
        -----
        ConvergenceWarning
            If L-BFGS ends before `tol` is reached.
        """
        _check_parameters(self)
        X, y = self._validated(X, y, reset=True)
        classes, target = np.unique(y, return_inverse=True)
        if len(classes) < 2:
            raise ValueError(f"y has one class, {classes[0]}; at least 2 classes are needed")
        problem = self._problem(X, y, classes, target, sample_weight)
        if not (self.warm_start and hasattr(self, "coef_")):
            self._start(classes, X)
        elif not np.array_equal(classes, self.classes_) or self.coef_.shape[1] != X.shape[1]:
            raise ValueError(
                f"warm_start = True, but X and y have {X.shape[1]} features and the classes "
                f"{classes}, and the last fit had {self.coef_.shape[1]} and {self.classes_}"
            )
        self.loss_curve_: list[float] = []
        if self.solver == "lbfgs":
            self._fit_lbfgs(problem)
        else:
            self._fit_sgd(problem)
        return self

    @available_if(lambda self: self.solver == "sgd")
    def partial_fit(
        self, X: Any, y: Any, classes: Any = None, sample_weight: Any = None
    ) -> "SoftmaxClassifier":
        """Train for one epoch on these samples; with ``solver="sgd"`` only.

        Calls with all samples make the same steps as the epochs of `fit`.

        Parameters
        ----------
        X, y, sample_weight
            As in `fit`.
        classes : array_like, shape (C,)
            All labels there will be; needed in the first call, and the same in later ones.

        Returns
        -------
        SoftmaxClassifier
            Itself.
        """
        _check_parameters(self)
        if self.class_weight == "balanced":
            raise ValueError(
                "class_weight = 'balanced' needs all samples; give partial_fit a dict of weights"
            )
        if self.early_stopping:
            raise ValueError(
                "early_stopping = True needs all samples; partial_fit does not set any aside"
            )
        first = not hasattr(self, "coef_")
        X, y = self._validated(X, y, reset=first)
        classes = self._known_classes(classes, first)
        target = np.searchsorted(classes, y).clip(max=len(classes) - 1)
        if not np.array_equal(classes[target], y):
            unknown = np.setdiff1d(y, classes)
            raise ValueError(f"y has {unknown[0]}, which is not one of the classes {classes}")
        problem = self._problem(X, y, classes, target, sample_weight)
        if first:
            self._start(classes, X)
            self.loss_curve_ = []
        descent = self._descent_for(problem)
        with _progress(self, len(target), "sample") as advance:
            loss = descent.epoch(problem, self.coef_, self._bias(), self, advance)
        self.loss_curve_.append(loss)
        self.n_iter_ = descent.epochs
        return self

    def _known_classes(self, classes: Any, first: bool) -> np.ndarray:
        if first:
            if classes is None:
                raise ValueError("classes = None, but the first partial_fit has to know them all")
            return np.unique(classes)
        if classes is not None and not np.array_equal(np.unique(classes), self.classes_):
            raise ValueError(
                f"classes = {classes} are not those of the first call, {self.classes_}"
            )
        return self.classes_

    def _validated(self, X: Any, y: Any, reset: bool) -> tuple[Any, np.ndarray]:
        X, y = validate_data(self, X, y, accept_sparse="csr", dtype=_FLOATS, order="C", reset=reset)
        check_classification_targets(y)
        return X, y

    def _problem(
        self, X: Any, y: np.ndarray, classes: np.ndarray, target: np.ndarray, sample_weight: Any
    ) -> "_Problem":
        problem = _Problem(X, target, None, self.l2, (self.backend, self.num_threads))
        if sample_weight is None and self.class_weight is None:
            return problem
        weight = _check_sample_weight(
            sample_weight, X, dtype=np.float64, copy=True, ensure_non_negative=True
        )
        if self.class_weight == "balanced":
            of_class = np.bincount(target, weight)[target]
            np.divide(weight, of_class, out=weight, where=of_class > 0)
        elif self.class_weight is not None:
            weight *= compute_class_weight(self.class_weight, classes=classes, y=y)[target]
        if not weight.any():
            raise ValueError("sample_weight and class_weight leave no sample that counts")
        problem = problem._replace(weight=weight)
        problem.check_weights()
        return problem if weight.all() else problem.rows(np.flatnonzero(weight))

    def _start(self, classes: np.ndarray, X: Any) -> None:
        self.classes_ = classes
        self.coef_ = np.zeros((len(classes), X.shape[1]), X.dtype)
        self.intercept_ = np.zeros(len(classes), X.dtype)
        self._descent: _Descent | None = None

    def _bias(self) -> np.ndarray | None:
        return self.intercept_ if self.fit_intercept else None

    def _fit_lbfgs(self, problem: "_Problem") -> None:
        space = _Standardized.of(problem, len(self.classes_), self.fit_intercept)
        with _progress(self, self.max_iter, "iteration") as advance:

            def objective(vector: np.ndarray) -> tuple[float, np.ndarray]:
                layer = space.unpack(vector)
                loss, gradients = problem.loss_and_gradients(*layer)
                if not self.loss_curve_:
                    self.loss_curve_.append(loss)
                return loss, space.pull_back(gradients)

            def after_iteration(intermediate_result: Any) -> None:
                self.loss_curve_.append(float(intermediate_result.fun))
                advance(1, self.loss_curve_[-1])

            result = minimize(
                objective,
                space.pack(self.coef_, self._bias()),
                jac=True,
                method="L-BFGS-B",
                callback=after_iteration,
                options={
                    "maxiter": self.max_iter, "maxfun": 100 * self.max_iter, "gtol": self.tol,
                    "ftol": 0.0, "maxls": 50, "maxcor": _CORRECTIONS,
                },
            )  # fmt: skip
        coef, intercept = space.unpack(result.x)
        self.coef_ = coef.astype(problem.X.dtype)
        if intercept is not None:
            self.intercept_ = intercept.astype(problem.X.dtype)
        self.n_iter_ = int(result.nit)
        self._descent = None
        _warn_unless_converged(result, problem.X.dtype, self.tol)

    def _fit_sgd(self, problem: "_Problem") -> None:
        held_out = None
        random = check_random_state(self.random_state)
        if self.early_stopping:
            problem, held_out = self._split(problem, random)
            self.validation_curve_: list[float] = []
        descent = self._descent_for(problem, random)
        best, best_layer, patience = math.inf, None, self.n_iter_no_change
        start = descent.epochs
        samples = len(problem.target)
        with _progress(self, self.max_iter * samples, "sample") as advance:
            for _ in range(self.max_iter):
                loss = descent.epoch(problem, self.coef_, self._bias(), self, advance)
                self.loss_curve_.append(loss)
                if held_out is not None:
                    loss = held_out.loss(self.coef_, self._bias())
                    self.validation_curve_.append(loss)
                if loss < best - self.tol:
                    patience = self.n_iter_no_change
                else:
                    patience -= 1
                if held_out is not None and loss < best:
                    best_layer = self.coef_.copy(), self.intercept_.copy()
                best = min(best, loss)
                if not patience:
                    break
        if best_layer is not None:
            self.coef_, self.intercept_ = best_layer
        self.n_iter_ = descent.epochs - start

    def _split(self, problem: "_Problem", random: Any) -> list["_Problem"]:
        """The samples to train on, and those that are set aside, as many of each class."""
        samples = len(problem.target)
        counts = np.bincount(problem.target, minlength=len(self.classes_))
        if 1 in counts:
            raise ValueError(
                f"early_stopping = True, but only one sample of class "
                f"{self.classes_[counts == 1][0]} counts: there is none to set aside"
            )
        aside = math.ceil(self.validation_fraction * samples)
        if min(aside, samples - aside) < np.count_nonzero(counts):
            raise ValueError(
                f"validation_fraction = {self.validation_fraction} sets {aside} of {samples} "
                f"samples aside; both parts need one of each of {np.count_nonzero(counts)} classes"
            )
        rows = train_test_split(
            np.arange(samples), test_size=aside, stratify=problem.target, random_state=random
        )
        parts = [problem.rows(part) for part in rows]
        for part in parts:
            part.check_weights()
        return parts

    def _descent_for(self, problem: "_Problem", random: Any = None) -> "_Descent":
        """What is left of earlier epochs, or a beginning."""
        if self._descent is None:
            if random is None:
                random = check_random_state(self.random_state)
            rate: Any = self.learning_rate
            if rate == "auto":
                rate = problem.safe_rate()
            self._descent = _Descent.start(self.coef_, self.intercept_, rate, random)
        return self._descent

    def decision_function(self, X: Any) -> np.ndarray:
        """The scores, shape (N, C); for two classes their difference, shape (N,).

        Parameters
        ----------
        X : array_like or CSR matrix, shape (N, D)

        Returns
        -------
        ndarray
            For two classes above 0 where the second one is more likely.
        """
        scores = self._scores(self._validated_features(X))
        return scores[:, 1] - scores[:, 0] if len(self.classes_) == 2 else scores

    def predict(self, X: Any) -> np.ndarray:
        """The likeliest label of every sample, shape (N,); scores are never all in memory.

        Parameters
        ----------
        X : array_like or CSR matrix, shape (N, D)
        """
        X = self._validated_features(X)
        best = np.empty(X.shape[0], np.intp)
        for rows in gen_batches(len(best), max(_CHUNK_ELEMENTS // len(self.classes_), 1)):
            self._scores(X[rows]).argmax(axis=1, out=best[rows])
        return self.classes_[best]

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities, shape (N, C), in the order of `classes_`.

        Parameters
        ----------
        X : array_like or CSR matrix, shape (N, D)
        """
        return self._rowwise(softmax, X)

    def predict_log_proba(self, X: Any) -> np.ndarray:
        """Logarithms of the probabilities, exact where these round to 0 or 1, shape (N, C).

        Parameters
        ----------
        X : array_like or CSR matrix, shape (N, D)
        """
        return self._rowwise(log_softmax, X)

    def _rowwise(self, function: Callable[..., np.ndarray], X: Any) -> np.ndarray:
        scores = self._scores(self._validated_features(X))
        return function(scores, out=scores, backend=self.backend, num_threads=self.num_threads)

    def _validated_features(self, X: Any) -> Any:
        check_is_fitted(self)
        return validate_data(self, X, accept_sparse="csr", dtype=_FLOATS, reset=False)

    def _scores(self, X: Any) -> np.ndarray:
        scores: np.ndarray = safe_sparse_dot(X, self.coef_.T)
        scores += self.intercept_
        return scores


class _Problem(NamedTuple):
    """Samples, and what is minimised over them."""

    X: Any  # (N, D), dense or CSR
    target: np.ndarray  # class indices
    weight: np.ndarray | None  # of the samples, that of their classes included; may be negative
    l2: float
    computing: tuple[str | None, int | None]  # backend, num_threads

    @property
    def total_weight(self) -> float:
        return len(self.target) if self.weight is None else float(self.weight.sum())

    def check_weights(self) -> None:
        if not 0 < self.total_weight < math.inf:
            raise ValueError(
                f"sample_weight, times class_weight, sums to {self.total_weight} over "
                f"{len(self.target)} samples; a mean needs a finite sum above 0"
            )

    @property
    def sizes(self) -> np.ndarray:
        """Of the weights, whatever their signs."""
        return np.ones(len(self.target)) if self.weight is None else np.abs(self.weight)

    @property
    def options(self) -> dict[str, Any]:
        backend, num_threads = self.computing
        return {"sample_weight": self.weight, "backend": backend, "num_threads": num_threads}

    def safe_rate(self) -> float:
        """One over a bound of the second derivatives of the data loss."""
        squares = row_norms(self.X, squared=True)
        signed = self.total_weight / float(self.sizes.sum())
        return 2 / (1 + float(np.average(squares, weights=self.sizes))) * signed

    def rows(self, rows: np.ndarray) -> "_Problem":
        weight = None if self.weight is None else self.weight[rows]
        return self._replace(X=self.X[rows], target=self.target[rows], weight=weight)

    def loss(self, coef: np.ndarray, intercept: np.ndarray | None) -> float:
        """The data loss."""
        return float(
            linear_cross_entropy(self.X, coef, self.target, linear_bias=intercept, **self.options)
        )

    def loss_and_gradients(
        self,
        coef: np.ndarray,
        intercept: np.ndarray | None,
        normalizer: float | None = None,
        out: LinearGradients | None = None,
    ) -> tuple[float, LinearGradients]:
        dtype = self.X.dtype
        coef = coef.astype(dtype, copy=False)
        intercept = None if intercept is None else intercept.astype(dtype, copy=False)
        if isinstance(self.X, np.ndarray) and self.X.size * len(coef) <= _FEW_PRODUCTS:
            return self._by_bare_products(coef, intercept, normalizer, out)
        loss, gradients = linear_cross_entropy_with_grad(
            self.X, coef, self.target, linear_bias=intercept, l2=self.l2, normalizer=normalizer,
            out=out, **self.options,
        )  # fmt: skip
        return float(loss), gradients

    def _by_bare_products(
        self,
        coef: np.ndarray,
        intercept: np.ndarray | None,
        normalizer: float | None,
        out: LinearGradients | None,
    ) -> tuple[float, LinearGradients]:
        """The same of few samples, for which a linear head takes longer than its products."""
        coef_grad = np.empty_like(coef) if out is None else out.linear_weight
        intercept_grad = None
        try:
            _blas.one_thread.hold()
            with np.errstate(all="ignore"):
                scores = self.X @ coef.T
                if intercept is not None:
                    scores += intercept
                loss, g = cross_entropy_with_grad(
                    scores, self.target, normalizer=normalizer, out=scores, **self.options
                )
                np.matmul(g.T, self.X, out=coef_grad)
                if intercept is not None:
                    intercept_grad = np.ones(len(g), g.dtype) @ g
                if self.l2:
                    # In float64, for 2 l2 may be more, or less, than a float32 holds.
                    exact = coef.astype(np.float64)
                    loss += self.l2 * float(np.vdot(exact, exact))
                    exact *= 2 * self.l2
                    coef_grad += exact
        finally:
            _blas.one_thread.release()
        return float(loss), LinearGradients(coef_grad, intercept_grad)


class _Standardized(NamedTuple):
    """Coordinates for L-BFGS: W and b as they would be for standardized features.

    The scores are the same: x W^T + b = ((x - mean) W^T) + (b + W mean), and W = V * scale.
    """

    mean: np.ndarray | None  # (D,); None without an intercept, which could not make up for it
    scale: np.ndarray  # (C, D)
    intercept_scale: np.ndarray  # (C, 1)

    @classmethod
    def of(cls, problem: _Problem, num_classes: int, fit_intercept: bool) -> "_Standardized":
        mean, variance = _mean_and_variance(problem.X, problem.sizes)
        share = np.bincount(problem.target, problem.sizes, num_classes) / problem.sizes.sum()
        # Of a class without weight only the penalty knows: the size of its scale does not matter.
        least = 1 / len(problem.target)
        curvature = (share * (1 - share)).clip(min=least * (1 - least))[:, None]
        spread = variance if fit_intercept else variance + mean**2
        scale = 1 / np.sqrt(curvature * spread + 2 * problem.l2)
        return cls(mean if fit_intercept else None, scale, 1 / np.sqrt(curvature))

    def pack(self, coef: np.ndarray, intercept: np.ndarray | None) -> np.ndarray:
        parts = [coef / self.scale]
        if self.mean is not None and intercept is not None:
            parts.append((intercept + coef @ self.mean)[:, None] / self.intercept_scale)
        return np.hstack(parts).ravel()

    def unpack(self, vector: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        num_features = self.scale.shape[1]
        table = vector.reshape(len(self.scale), -1)
        coef = table[:, :num_features] * self.scale
        if self.mean is None:
            return coef, None
        return coef, table[:, -1] * self.intercept_scale[:, 0] - coef @ self.mean

    def pull_back(self, gradients: LinearGradients) -> np.ndarray:
        """The gradient in these coordinates, by the chain rule."""
        coef = gradients.linear_weight.astype(np.float64)
        if self.mean is None:
            return (coef * self.scale).ravel()  # type: ignore[no-any-return]
        intercept = gradients.linear_bias.astype(np.float64)[:, None]
        coef -= intercept * self.mean
        return np.hstack([coef * self.scale, intercept * self.intercept_scale]).ravel()


def _mean_and_variance(X: Any, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each column, in float64; the variance of a constant one is said to be 1."""
    dense = isinstance(X, np.ndarray)
    shift = X[0].astype(np.float64) if dense else np.zeros(X.shape[1])
    share = weight / weight.sum()
    mean, square = np.zeros((2, X.shape[1]))
    for rows in gen_batches(len(share), max(_CHUNK_ELEMENTS // X.shape[1], 1)):
        x = X[rows] - shift if dense else X[rows].astype(np.float64)
        mean += share[rows] @ x
        square += share[rows] @ (x * x if dense else x.multiply(x))
    variance = square - mean**2
    return shift + mean, np.where(variance > _ROUNDING * square, variance, 1.0)


class _Descent:
    """Gradient descent with momentum, and what it remembers from epoch to epoch."""

    def __init__(self, velocity: LinearGradients, rate: float, random: Any) -> None:
        self.velocity = velocity
        self.rate = rate
        self.random = random
        self.epochs = 0

    @classmethod
    def start(cls, coef: np.ndarray, intercept: np.ndarray, rate: float, random: Any) -> "_Descent":
        return cls(LinearGradients(np.zeros_like(coef), np.zeros_like(intercept)), rate, random)

    def epoch(
        self,
        problem: _Problem,
        coef: np.ndarray,
        intercept: np.ndarray | None,
        options: SoftmaxClassifier,
        advance: Callable[[int, float], None],
    ) -> float:
        """One pass over the samples, in random order; the mean loss of its steps."""
        num_samples = len(problem.target)
        mean_weight = problem.total_weight / num_samples
        layer = [(coef, self.velocity[0])]
        if intercept is not None:
            layer.append((intercept, self.velocity[1]))
        out = LinearGradients(*(np.empty_like(parameter) for parameter, _ in layer))
        order = self.random.permutation(num_samples)
        total = 0.0
        for rows in gen_batches(num_samples, options.batch_size):
            batch = problem.rows(order[rows])
            size = len(batch.target)
            normalizer = None if problem.weight is None else size * mean_weight
            loss, gradients = batch.loss_and_gradients(coef, intercept, normalizer, out)
            rate = self.rate * _factor(options, self.epochs + rows.start / num_samples)
            for (parameter, velocity), gradient in zip(layer, gradients, strict=False):
                velocity *= options.momentum
                gradient *= rate
                velocity -= gradient
                parameter += velocity
            if not math.isfinite(loss):
                raise ValueError(
                    f"the loss is {loss} in epoch {self.epochs + 1}: learning_rate = {self.rate} "
                    f"is too large for these features, or they for their dtype"
                )
            total += loss * size
            advance(size, loss)
        self.epochs += 1
        return total / num_samples


def _factor(options: SoftmaxClassifier, epochs: float) -> float:
    """Of the learning rate, after so many epochs."""
    if options.schedule == "constant":
        return 1.0
    if options.schedule == "sqrt":
        return 1 / math.sqrt(1 + epochs)
    return (1 + math.cos(math.pi * min(epochs / options.max_iter, 1))) / 2


@contextlib.contextmanager
def _progress(
    options: SoftmaxClassifier, total: int, unit: str
) -> Iterator[Callable[[int, float], None]]:
    """What to call with how much was done, and the loss."""
    if not options.verbose:
        yield lambda done, loss: None
        return
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError(
            f"verbose = {options.verbose!r} needs tqdm: run `pip install 'fastloss[sklearn]'` "
            f"({error})"
        ) from error
    with tqdm(total=total, unit=unit, unit_scale=unit == "sample", desc="fit") as bar:

        def advance(done: int, loss: float) -> None:
            bar.set_postfix(loss=f"{loss:.4g}", refresh=False)
            bar.update(done)

        yield advance


def _warn_unless_converged(result: Any, dtype: np.dtype, tol: float) -> None:
    if result.status == 0:
        return
    warnings.warn(
        f"L-BFGS ended after {result.nit} iterations with a gradient of "
        f"{np.abs(result.jac).max():.2g}, above tol = {tol:g}: {result.message}",
        ConvergenceWarning,
        stacklevel=4,
    )


_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "l2": (lambda v: _is_real(v) and 0 <= v < math.inf, "a finite number of at least 0"),
    "fit_intercept": (lambda v: _is_flag(v), "True or False"),
    "class_weight": (
        lambda v: v is None or isinstance(v, dict) or _is_one_of(v, "balanced"),
        "a dict, 'balanced' or None",
    ),
    "solver": (lambda v: _is_one_of(v, "lbfgs", "sgd"), "'lbfgs' or 'sgd'"),
    "max_iter": (lambda v: _is_count(v), "an integer of at least 1"),
    "tol": (lambda v: _is_real(v) and v >= 0, "a number of at least 0"),
    "batch_size": (lambda v: _is_count(v), "an integer of at least 1"),
    "learning_rate": (
        lambda v: _is_one_of(v, "auto") or (_is_real(v) and 0 < v < math.inf),
        "'auto' or a finite number above 0",
    ),
    "schedule": (
        lambda v: _is_one_of(v, "sqrt", "constant", "cosine"),
        "'sqrt', 'constant' or 'cosine'",
    ),
    "momentum": (lambda v: _is_real(v) and 0 <= v < 1, "a number from 0 to below 1"),
    "early_stopping": (lambda v: _is_flag(v), "True or False"),
    "validation_fraction": (lambda v: _is_real(v) and 0 < v < 1, "a number between 0 and 1"),
    "n_iter_no_change": (lambda v: _is_count(v), "an integer of at least 1"),
    "warm_start": (lambda v: _is_flag(v), "True or False"),
    "random_state": (
        lambda v: _is_seed(v),
        "an integer from 0 to 2**32 - 1, a RandomState or None",
    ),
    "verbose": (
        lambda v: _is_flag(v) or _is_count(v, least=0),
        "True, False or an integer of at least 0",
    ),
}  # backend and num_threads: the loss checks them


def _is_real(value: Any) -> bool:
    if isinstance(value, (int, np.integer)):  # but none that a float cannot hold
        return not isinstance(value, bool) and bool(-_LARGEST <= value <= _LARGEST)
    return isinstance(value, (float, np.floating))


def _is_count(value: Any, least: int = 1) -> bool:
    return _is_real(value) and isinstance(value, (int, np.integer)) and bool(value >= least)


def _is_flag(value: Any) -> bool:
    return isinstance(value, (bool, np.bool_))


def _is_one_of(value: Any, *names: str) -> bool:
    return isinstance(value, str) and value in names


def _is_seed(value: Any) -> bool:
    """Whether `check_random_state` takes it, which would make a generator to find that out."""
    if value is None or value is np.random or isinstance(value, np.random.RandomState):
        return True
    return _is_count(value, least=0) and bool(value < 1 << 32)


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except (TypeError, ValueError, OverflowError):
        return False


def _check_parameters(estimator: SoftmaxClassifier) -> None:
    for name, (is_right, expected) in _CHECKS.items():
        value = getattr(estimator, name)
        if not is_right(value):
            raise ValueError(f"{name} = {value!r} is not {expected}")
    if isinstance(estimator.class_weight, dict):
        for label, weight in estimator.class_weight.items():
            if not _is_finite(weight):
                raise ValueError(f"class_weight[{label!r}] = {weight!r} is not a finite number")
