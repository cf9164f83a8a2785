"""The only input checks: they turn what users pass into what kernels take.

Kernels take bare arrays in the normal form ``(outer, C, inner)``: C-contiguous, aligned, native
byte order, indices in range.  Whatever lies densely in memory reaches that form as a view, in
whichever order its axes lie; only gaps, overlaps and foreign byte orders cost a copy.
"""

import functools
import itertools
import math
import operator
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import ArrayLike

from fastloss._contract import INDEX_OPTIONS, Kernels, Labels, Options

DEFAULT_IGNORE_INDEX: int = Options._field_defaults["ignore_index"]

_FLOAT32, _FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)
_FLOAT_NAMES = ("float32", "float64", "float16", "bfloat16")
_REAL_KINDS = frozenset("biufV")  # V: bfloat16, for one
_REDUCTIONS = ("mean", "sum", "none")
_LARGEST_INT64 = (1 << 63) - 1


class Logits(NamedTuple):
    """An array of scores and the way to its normal form."""

    array: np.ndarray  # as the user sees it
    normal: np.ndarray  # (outer, C, inner)
    axis: int  # the class axis, not negative
    order: tuple[int, ...] | None  # the axes as they lie in memory; None: as the user sees them

    @property
    def compute_dtype(self) -> np.dtype:
        """What losses are computed in and handed out as."""
        return _FLOAT64 if self.array.dtype == _FLOAT64 else _FLOAT32

    @property
    def rows(self) -> "Rows":
        shape = self.array.shape[: self.axis] + self.array.shape[self.axis + 1 :]
        outer, _, inner = self.normal.shape
        return Rows(shape, (outer, inner), rows_order(self.order, self.axis))

    def normalize(self, array: np.ndarray) -> np.ndarray:
        """Another array of the same shape in the same normal form, copied if it must be."""
        return _normalize(array, self.order, self.normal.shape)


class Rows(NamedTuple):
    """The shape of what has one entry per row: targets, sample weights, losses."""

    shape: tuple[int, ...]  # as the user sees it
    normal_shape: tuple[int, ...]  # (outer, inner)
    order: tuple[int, ...] | None

    def normalize(self, array: np.ndarray) -> np.ndarray:
        return _normalize(array, self.order, self.normal_shape)

    def place(self, flat_index: int) -> str:
        """The subscript of an entry, given its position in the normal form."""
        if not self.shape:
            return ""
        order = self.order or tuple(range(len(self.shape)))
        position = np.unravel_index(flat_index, [self.shape[a] for a in order])
        subscript = sorted(zip(order, position, strict=True))
        return "[" + ", ".join(str(int(index)) for _, index in subscript) + "]"


def _normalize(
    array: np.ndarray, order: tuple[int, ...] | None, normal_shape: tuple[int, ...]
) -> np.ndarray:
    if order is not None:
        array = array.transpose(order)
    if not array.flags.c_contiguous:
        array = np.ascontiguousarray(array)
    return array.reshape(normal_shape)


def logits(value: ArrayLike, axis: Any, name: str = "logits") -> Logits:
    """Check an array of scores and bring it into the normal form."""
    array = float_array(value, name)
    ndim = array.ndim
    try:
        class_axis = operator.index(axis)
    except TypeError:
        raise TypeError(f"axis = {axis!r} is not an integer") from None
    if ndim == 0:
        raise ValueError(f"{name} is a scalar; it needs an axis of classes")
    if not -ndim <= class_axis < ndim:
        raise ValueError(f"axis = {class_axis} is out of range for {name} of shape {array.shape}")
    class_axis %= ndim
    shape = array.shape
    if shape[class_axis] == 0:
        raise ValueError(f"{name} of shape {shape} has no classes along axis {class_axis}")

    order = None
    position = class_axis
    if not array.flags.c_contiguous:
        order = memory_order(array.shape, array.strides, array.itemsize)
    if order is not None:
        shape = tuple(shape[a] for a in order)
        position = order.index(class_axis)
    outer, inner = math.prod(shape[:position]), math.prod(shape[position + 1 :])
    normal = _normalize(array, order, (outer, shape[position], inner))
    return Logits(array, normal, class_axis, order)


def memory_order(
    shape: Sequence[int], strides: Sequence[int], itemsize: int = 1
) -> tuple[int, ...] | None:
    """The order of axes in which an array is C-contiguous, or None if there is none.

    Results lie in memory in the same order, or where there is none as the user sees them.
    """
    order = sorted(range(len(shape)), key=lambda a: -strides[a])
    for a in reversed(order):
        if shape[a] != 1 and strides[a] != itemsize:
            return None
        itemsize *= shape[a]
    return tuple(order)


def rows_order(order: tuple[int, ...] | None, axis: int) -> tuple[int, ...] | None:
    """That of what has one entry per row."""
    return order and tuple(a - (a > axis) for a in order if a != axis)


def like_logits(value: ArrayLike, like: Logits, name: str, like_name: str) -> np.ndarray:
    """An array of the same shape and dtype as another, in its normal form."""
    array = float_array(value, name)
    if array.shape != like.array.shape:
        raise ValueError(
            f"{name} has shape {array.shape}, expected {like.array.shape}, the shape of {like_name}"
        )
    if array.dtype != like.array.dtype:
        raise TypeError(
            f"{name} has dtype {array.dtype}, expected {like.array.dtype}, the dtype of {like_name}"
        )
    return like.normalize(array)


def float_array(value: ArrayLike, name: str) -> np.ndarray:
    """A plain, aligned, native array of one of the four float types; integers are float64."""
    array = _plain_array(value, name)
    dtype = array.dtype
    # The two common types first: a dtype's name takes a microsecond to make up.
    if dtype is not _FLOAT32 and dtype is not _FLOAT64 and dtype.name not in _FLOAT_NAMES:
        if dtype.kind in "iu":
            return array.astype(_FLOAT64)
        # Truth values are masks, passed by mistake: SciPy has no softmax of them either.
        raise _wrong_dtype(value, array, name, f"integers or {', '.join(_FLOAT_NAMES)}")
    return _behaved(array)


def _wrong_dtype(value: Any, array: np.ndarray, name: str, expected: str) -> TypeError:
    hint = "; a data frame has .to_numpy(dtype=...)" if hasattr(value, "to_numpy") else ""
    return TypeError(f"{name} has dtype {array.dtype}; expected {expected}{hint}")


def _plain_array(value: ArrayLike, name: str) -> np.ndarray:
    if type(value) is np.ndarray:
        return value
    parts = value if isinstance(value, (list, tuple)) else (value,)
    if any(isinstance(part, np.ma.MaskedArray) for part in parts):
        raise TypeError(f"{name} is a masked array, whose mask would be lost; fill it first")
    try:
        return np.asarray(value)
    except (ValueError, TypeError) as error:  # ragged lists, for one
        raise ValueError(f"{name} cannot be read as an array: {error}") from error


def _behaved(array: np.ndarray) -> np.ndarray:
    """Aligned and in native byte order."""
    if not array.dtype.isnative:
        return array.astype(array.dtype.newbyteorder("="))
    return array if array.flags.aligned else array.copy()


def labels(
    kernels: Kernels,
    x: Logits,
    target: ArrayLike,
    weight: ArrayLike | None,
    sample_weight: ArrayLike | None,
    options: Options,
    threads: int,
    *,
    probabilities: bool = True,
) -> tuple[Labels, float]:
    """Check targets and weights against the scores; find the divisor of the mean, too."""
    rows = x.rows
    w = _class_weight(weight, x)
    s = _sample_weight(sample_weight, rows)
    checked = Labels(_target(target, x, rows, probabilities), w, s)
    if checked.soft:
        for name in INDEX_OPTIONS:
            value = getattr(options, name)
            if value != Options._field_defaults[name]:
                raise ValueError(
                    f"{name} = {value} is for class indices; target holds probabilities"
                )
        return checked, float(math.prod(rows.shape) if s is None else s.sum())
    indices = checked.target
    if options.ignore_index == _LARGEST_INT64 and indices.dtype == np.uint64:
        # Kernels read all that an int64 does not hold as its largest.
        checked = checked._replace(target=indices.view(np.int64))
    num_classes = x.normal.shape[1]
    bad, total_weight = kernels.check_target(checked, options, num_classes, threads)
    if bad >= 0:
        raise_target_out_of_range(indices, rows, num_classes, bad)
    return checked, total_weight


def raise_target_out_of_range(
    target: np.ndarray, rows: Rows, num_classes: int, flat_index: int
) -> NoReturn:
    raise IndexError(
        f"target{rows.place(flat_index)} = {target.flat[flat_index]} is out of range for "
        f"{num_classes} classes"
    )


def _target(value: ArrayLike, x: Logits, rows: Rows, probabilities: bool) -> np.ndarray:
    """Class indices in the form ``(outer, inner)``, or probabilities in the form of the logits.

    Whether the indices are in range is for the kernel ``check_target`` to find out.
    """
    array = _plain_array(value, "target")
    kind = array.dtype.kind
    if kind in "iu":
        if array.shape != rows.shape:
            raise ValueError(
                f"target has shape {array.shape}, expected {rows.shape} for logits of shape "
                f"{x.array.shape} with the classes along axis {x.axis}"
            )
        return rows.normalize(_behaved(array))
    if array.size == 0 and array.shape == rows.shape and not hasattr(value, "dtype"):
        return np.empty(rows.normal_shape, np.int64)  # [] has no dtype to speak of
    if kind != "f" and array.dtype.name != "bfloat16":
        expected = "integers" + " or probabilities" * probabilities
        raise _wrong_dtype(value, array, "target", expected)
    if not probabilities:
        raise TypeError(f"target has dtype {array.dtype}; expected integers, the class indices")
    if array.shape != x.array.shape:
        raise ValueError(
            f"target has shape {array.shape}, expected {x.array.shape}, the shape of the logits, "
            f"for probabilities; class indices are integers"
        )
    return _of_logits(array, x)


def row_labels(x: Logits, sample_weight: ArrayLike | None) -> tuple[Labels, float]:
    """The same where there is no target."""
    rows = x.rows
    s = _sample_weight(sample_weight, rows)
    return Labels(None, None, s), float(math.prod(rows.shape) if s is None else s.sum())


def binary_labels(
    x: Logits,
    target: ArrayLike,
    balance: tuple[Any, Any],
    weight: ArrayLike | None,
    sample_weight: ArrayLike | None,
) -> tuple[Labels, float]:
    """The same of binary losses; `balance` is what targets of 1 and of 0 count, None for 1."""
    rows, num_classes = x.rows, x.normal.shape[1]
    s = _sample_weight(sample_weight, rows)
    w = None
    if weight is not None or any(value is not None for value in balance):
        w = np.empty((2, num_classes))
        w[...] = _weight_of_classes(weight, x, "weight")
        for part, value, name in zip(w, balance, ("pos_weight", ""), strict=True):
            part *= _weight_of_classes(value, x, name)
    count = math.prod(rows.shape) if s is None else float(s.sum())
    return Labels(_binary_target(target, x), w, s), float(count * num_classes)


def _weight_of_classes(value: ArrayLike | None, x: Logits, name: str) -> Any:
    """As _class_weight, or one number for all classes."""
    if value is None:
        return 1.0
    if np.ndim(_plain_array(value, name)) == 0:
        return _weights(value, (), name, "")
    return _class_weight(value, x, name)


def _binary_target(value: ArrayLike, x: Logits) -> np.ndarray:
    """Truth values and integers as they are, floats as probabilities are."""
    array = _plain_array(value, "target")
    if array.dtype.kind not in "fiub" and array.dtype.name != "bfloat16":
        raise _wrong_dtype(value, array, "target", "truth values, integers or real numbers")
    if array.shape != x.array.shape:
        raise ValueError(
            f"target has shape {array.shape}, expected {x.array.shape}, the shape of the logits"
        )
    if array.dtype.kind == "b":
        array = array.view(np.uint8)
    return _of_logits(array, x)


def _of_logits(array: np.ndarray, x: Logits) -> np.ndarray:
    """In the normal form of the logits; unless it is integers, in a dtype that kernels read."""
    array = _behaved(array)
    if array.dtype.kind not in "iu" and array.dtype != x.array.dtype:
        array = array.astype(x.compute_dtype, copy=False)
    return x.normalize(array)


def _class_weight(value: ArrayLike | None, x: Logits, name: str = "weight") -> np.ndarray | None:
    """float64 weights of the classes."""
    if value is None:
        return None
    shape = (x.normal.shape[1],)
    array = _weights(value, shape, name, f"for {shape[0]} classes")
    return np.ascontiguousarray(array)


def _sample_weight(value: ArrayLike | None, rows: Rows) -> np.ndarray | None:
    """float64 weights of the rows in the form ``(outer, inner)``."""
    if value is None:
        return None
    return rows.normalize(_weights(value, rows.shape, "sample_weight", "the shape of the rows"))


def _weights(value: ArrayLike, shape: tuple[int, ...], name: str, reason: str) -> np.ndarray:
    array = _plain_array(value, name)
    if array.dtype.kind not in "fiub" and array.dtype.name != "bfloat16":
        raise _wrong_dtype(value, array, name, "real numbers")
    if array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape}, expected {shape} {reason}")
    array = _behaved(array).astype(_FLOAT64, copy=False)
    finite = np.isfinite(array)
    if not finite.all():
        place = np.argwhere(~finite)[0]
        subscript = f"[{', '.join(map(str, place))}]" if shape else ""
        raise ValueError(f"{name}{subscript} = {array[tuple(place)]} is not a finite number")
    return array


def options(
    ignore_index: Any,
    label_smoothing: Any = 0.0,
    epsilon: Any = 0.0,
    temperature: Any = 1.0,
    **factors: Any,
) -> Options:
    """Check what a loss takes beside its arrays; its factors are finite and at least 0."""
    smoothing = share(label_smoothing, "label_smoothing")
    numbers = {name: _not_negative(value, name) for name, value in factors.items()}
    numbers["epsilon"] = _finite(epsilon, "epsilon")
    numbers["temperature"] = _temperature(temperature)
    return Options(_ignore_index(ignore_index), smoothing, **numbers)


def _ignore_index(value: Any) -> int:
    try:
        index = operator.index(value)
    except TypeError:
        raise TypeError(f"ignore_index = {value!r} is not an integer") from None
    if not -(1 << 63) <= index < 1 << 63:
        raise ValueError(f"ignore_index = {index} does not fit a 64-bit integer")
    return index


class Reduction(NamedTuple):
    """What becomes of the losses of the rows."""

    name: str
    normalizer: float | None  # replaces the divisor of the mean

    def divisor(self, total_weight: float) -> float:
        """Of the sum of the losses; 0 where no row counts."""
        if self.normalizer is not None:
            return self.normalizer
        return total_weight if self.name == "mean" else 1.0


def reduction(value: Any, normalizer: Any) -> Reduction:
    if not isinstance(value, str) or value not in _REDUCTIONS:
        raise ValueError(f"reduction = {value!r} is not one of {', '.join(map(repr, _REDUCTIONS))}")
    if normalizer is None:
        return Reduction(value, None)
    if value != "mean":
        raise ValueError(f"normalizer replaces the divisor of the mean; reduction = {value!r}")
    number = real(normalizer, "normalizer")
    if not 0.0 < number < math.inf:
        raise ValueError(f"normalizer = {number} is not a finite number above 0")
    return Reduction(value, number)


def share(value: Any, name: str) -> float:
    number = real(value, name)
    if not 0.0 <= number <= 1.0:
        raise ValueError(f"{name} = {number} is out of range; it must be from 0 to 1")
    return number


def l2(value: Any, reduction: str = "mean") -> float:
    number = _not_negative(value, "l2")
    if number and reduction == "none":
        raise ValueError(f"l2 = {number} belongs to no single row; reduction = 'none'")
    return number


def chunk_rows(value: Any) -> int | None:
    if value is None:
        return None
    try:
        count = operator.index(value)
    except TypeError:
        raise TypeError(f"chunk_rows = {value!r} is not an integer") from None
    if count < 1:
        raise ValueError(f"chunk_rows = {count} is less than 1")
    return count


def flag(value: Any, name: str) -> bool:
    if not isinstance(value, (bool, np.bool_)):  # "no" and arrays may be true, too, or neither
        raise TypeError(f"{name} = {value!r} is not True or False")
    return bool(value)


def _not_negative(value: Any, name: str) -> float:
    number = real(value, name)
    if not 0.0 <= number < math.inf:
        raise ValueError(f"{name} = {number} is not a finite number of at least 0")
    return number


def _temperature(value: Any) -> float:
    number = real(value, "temperature")
    if not 1e-4 <= number <= 1e4:
        raise ValueError(f"temperature = {number} is out of range; it must be from 1e-4 to 1e4")
    return number


def _finite(value: Any, name: str) -> float:
    number = real(value, name)
    if not math.isfinite(number):
        raise ValueError(f"{name} = {number} is not a finite number")
    return number


def real(value: Any, name: str) -> float:
    if type(value) is float:
        return value
    # float() would read text, too, and drop imaginary parts, units of time and masks.
    number = _item(value)
    kind = getattr(getattr(number, "dtype", _FLOAT64), "kind", "")
    is_number = hasattr(number, "__float__") or hasattr(number, "__index__")
    if is_number and kind in _REAL_KINDS and not isinstance(number, np.ma.MaskedArray):
        try:
            return float(number)
        except OverflowError:  # a very large integer: whoever asks refuses what is not finite
            return math.inf if number > 0 else -math.inf
        except (TypeError, ValueError):
            pass
    raise TypeError(f"{name} = {value!r} is not a real number")


def _item(value: Any) -> Any:
    """The number in a tensor of some library, whose dtypes are not NumPy's; else the value."""
    if hasattr(getattr(value, "dtype", _FLOAT64), "kind"):
        return value
    try:
        return value.item()
    except (AttributeError, RuntimeError, TypeError, ValueError):  # none, or more than one
        return value


class Output(NamedTuple):
    """Where a kernel writes, and what the user gets."""

    array: np.ndarray  # as the user sees it
    normal: np.ndarray  # as the kernel writes it
    detour: bool  # the kernel's array is not the user's memory: copy when done
    order: tuple[int, ...] | None

    def deliver(self) -> np.ndarray:
        if self.detour:
            self.array[...] = _as_user(self.normal, self.array.shape, self.order)
        return self.array


def _as_user(
    normal: np.ndarray, shape: tuple[int, ...], order: tuple[int, ...] | None
) -> np.ndarray:
    if order is None:
        return normal.reshape(shape)
    return normal.reshape([shape[a] for a in order]).transpose(np.argsort(order))


def output(
    out: np.ndarray | None,
    like: Logits | Rows,
    dtype: np.dtype,
    inputs: Iterable[np.ndarray | None],
    in_place: Iterable[np.ndarray] = (),
    name: str = "out",
) -> Output:
    """The array to write, new or the user's own.

    Kernels may write over the arrays `in_place` if it is exactly they, and over no other input:
    where `out` overlaps any in another way the kernel writes elsewhere and the result is copied.
    """
    if isinstance(like, Logits):
        shape, normal_shape, order = like.array.shape, like.normal.shape, like.order
    else:
        shape, normal_shape, order = like
    if out is None:
        normal = np.empty(normal_shape, dtype)
        return Output(_as_user(normal, shape, order), normal, False, order)

    if type(out) is not np.ndarray and (
        not isinstance(out, np.ndarray) or isinstance(out, np.ma.MaskedArray)
    ):
        raise TypeError(f"{name} is a {type(out).__name__}, expected a numpy.ndarray")
    if out.dtype != dtype:
        raise TypeError(f"{name} has dtype {out.dtype}, expected {dtype}")
    if out.shape != shape:
        raise ValueError(f"{name} has shape {out.shape}, expected {shape}")
    flags = out.flags
    if not flags.writeable:
        raise ValueError(f"{name} is read-only")
    if not flags.c_contiguous and may_overlap_itself(out):
        raise ValueError(
            f"{name} of shape {shape} has strides {out.strides}, by which elements may share memory"
        )
    in_memory = out if order is None else out.transpose(order)
    if in_memory.flags.c_contiguous and flags.aligned and out.dtype.isnative:
        if type(out) is not np.ndarray:
            in_memory = in_memory.view(np.ndarray)
        normal = in_memory.reshape(normal_shape)
        clear = all(array is None or not np.may_share_memory(out, array) for array in inputs)
        if clear and all(_same_or_apart(normal, array) for array in in_place):
            return Output(out, normal, False, order)
    return Output(out, np.empty(normal_shape, dtype), True, order)


def may_overlap_itself(array: np.ndarray) -> bool:
    """Whether some element may begin before another one ends."""
    reach = array.itemsize
    for stride, n in sorted(zip(map(abs, array.strides), array.shape, strict=True)):
        if n > 1 and stride < reach:
            return array.size > 0
        reach += stride * (n - 1)
    return False


def _same_or_apart(a: np.ndarray, b: np.ndarray) -> bool:
    if not np.may_share_memory(a, b):
        return True
    address = a.__array_interface__["data"][0]
    return a.nbytes == b.nbytes and address == b.__array_interface__["data"][0]


class Linear(NamedTuple):
    """A linear layer: its arrays, and stand-ins for what has the shape of its scores."""

    inputs: Any  # (N, D), or a CSR matrix
    weight: np.ndarray  # (C, D)
    bias: np.ndarray | None
    inputs_shape: tuple[int, ...]  # as the user sees it
    scores: Logits  # (..., C), without memory

    @property
    def sparse(self) -> bool:
        return not isinstance(self.inputs, np.ndarray)


def linear(inputs: Any, weight: ArrayLike, bias: ArrayLike | None) -> Linear:
    """Check the three arrays of a linear layer against one another."""
    x = _csr(inputs)
    if x is None:
        x = float_array(inputs, "inputs")
    if x.dtype not in (_FLOAT32, _FLOAT64):
        raise TypeError(f"inputs has dtype {x.dtype}; expected float32 or float64")
    if x.ndim == 0:
        raise ValueError("inputs is a scalar; it needs an axis of features")
    w = linear_weight(weight)
    shape = x.shape
    if w.shape[1] != shape[-1]:
        raise ValueError(
            f"linear_weight has shape {w.shape}, expected (C, {shape[-1]}) for inputs of "
            f"shape {shape}"
        )
    if w.shape[0] == 0:
        raise ValueError(f"linear_weight of shape {w.shape} has no classes")
    b = None if bias is None else linear_bias(bias, w)
    for array, name in ((w, "linear_weight"), (b, "linear_bias")):
        if array is not None and array.dtype != x.dtype:
            raise TypeError(
                f"{name} has dtype {array.dtype}, expected {x.dtype}, the dtype of inputs"
            )
    if not w.flags.c_contiguous and not w.flags.f_contiguous:
        w = np.ascontiguousarray(w)  # which BLAS would else do for every chunk
    rows = math.prod(shape[:-1])
    if isinstance(x, np.ndarray):
        x = x.reshape(rows, shape[-1])
    return Linear(x, w, b, shape, scores_of(shape[:-1], w.shape[0], x.dtype))


def linear_weight(value: ArrayLike) -> np.ndarray:
    weight = float_array(value, "linear_weight")
    if weight.ndim != 2:
        raise ValueError(f"linear_weight has shape {weight.shape}, expected (C, D)")
    return weight


def linear_bias(value: ArrayLike, weight: np.ndarray) -> np.ndarray:
    bias = float_array(value, "linear_bias")
    if bias.shape != weight.shape[:1]:
        raise ValueError(
            f"linear_bias has shape {bias.shape}, expected {weight.shape[:1]} for "
            f"linear_weight of shape {weight.shape}"
        )
    return np.ascontiguousarray(bias)


def _csr(value: Any) -> Any:
    """A sparse matrix or array of SciPy in its row format; None for anything else."""
    sparse = sys.modules.get("scipy.sparse")  # without it, nobody has made a sparse matrix
    if sparse is None or not sparse.issparse(value):
        return None
    if value.ndim != 2:
        raise ValueError(f"inputs has shape {value.shape}, expected (N, D) of a sparse matrix")
    try:
        _check_entries(value)
        rows = value.tocsr()
        if rows is not value:
            _check_entries(rows)
    except ValueError as error:
        raise ValueError(f"inputs is not a valid sparse matrix: {error}") from None
    return rows.astype(_FLOAT64) if rows.dtype.kind in "iu" else rows


def _check_entries(matrix: Any) -> None:
    """SciPy itself does not look where indices go when it converts and multiplies."""
    if matrix.format == "coo":
        for indices, size in zip((matrix.row, matrix.col), matrix.shape, strict=True):
            if indices.size and not 0 <= indices.min() <= indices.max() < size:
                raise ValueError(f"indices must be at least 0 and less than {size}")
    elif matrix.format in ("csr", "csc", "bsr"):
        # Of a copy that shares memory: the check may shorten arrays.
        entries = (matrix.data, matrix.indices, matrix.indptr)
        type(matrix)(entries, shape=matrix.shape, copy=False).check_format(full_check=True)
    elif matrix.format == "dia":
        if matrix.data.ndim != 2 or matrix.offsets.shape != matrix.data.shape[:1]:
            raise ValueError("there must be an index of offset for each diagonal")
    elif matrix.format == "lil":
        lengths = [[len(entries) for entries in part] for part in (matrix.rows, matrix.data)]
        if lengths[0] != lengths[1] or len(lengths[0]) != matrix.shape[0]:
            raise ValueError("each entry must have an index")


@functools.lru_cache  # shapes come again and again
def scores_of(shape: tuple[int, ...], num_classes: int, dtype: np.dtype) -> Logits:
    """Scores that never exist: for the checks, which look at shapes and dtypes alone."""
    sizes, normal_sizes = (*shape, num_classes), (math.prod(shape), num_classes, 1)
    array, normal = (
        np.ndarray(n, dtype, buffer=np.zeros((), dtype), strides=(0,) * len(n))
        for n in (sizes, normal_sizes)
    )
    return Logits(array, normal, len(shape), None)


def linear_outputs(
    out: Any,
    layer: Linear,
    weight_grad: bool,
    inputs_grad: bool,
    accumulate: bool,
    inputs: tuple[np.ndarray | None, ...],
) -> list[Output | None]:
    """Where the gradients of a linear layer go: weight, bias and inputs, as far as asked for."""
    if inputs_grad and layer.sparse:
        raise ValueError("inputs_grad = True, but the gradient of sparse inputs is dense")
    if accumulate and out is None:
        raise ValueError("accumulate = True, but there is no out to add to")
    given = (None, None, None) if out is None else out
    if not isinstance(given, tuple) or len(given) != 3:
        raise TypeError(f"out is a {type(out).__name__}, expected LinearGradients")

    x = layer.inputs
    entries = (x.data, x.indices, x.indptr) if layer.sparse else (x,)
    read = (*inputs, layer.weight, layer.bias, *entries)
    shape = layer.weight.shape
    parts = (
        ("out.linear_weight", shape, shape, not weight_grad and "linear_weight_grad = False"),
        ("out.linear_bias", shape[:1], shape[:1], layer.bias is None and "there is no linear_bias"),
        (
            "out.inputs",
            layer.inputs_shape,
            layer.inputs.shape,
            not inputs_grad and "inputs_grad = False",
        ),
    )
    outputs: list[Output | None] = []
    for array, (name, shape, flat, reason) in zip(given, parts, strict=True):
        if reason:
            if array is not None:
                raise ValueError(f"{name} is given, but {reason}")
            outputs.append(None)
            continue
        rows = Rows(shape, flat, None)
        outputs.append(output(array, rows, layer.weight.dtype, read, name=name))
    _refuse_shared_memory({part[0]: array for part, array in zip(parts, given, strict=True)})
    if accumulate:
        for array, taken in zip(given, outputs, strict=True):
            if taken is not None:
                _take_over(array, taken)
    return outputs


def _refuse_shared_memory(arrays: dict[str, np.ndarray | None]) -> None:
    for (a, first), (b, second) in itertools.combinations(arrays.items(), 2):
        if first is not None and second is not None and _share_memory(first, second):
            raise ValueError(f"{a} and {b} share memory")


def _share_memory(first: np.ndarray, second: np.ndarray) -> bool:
    """They may well be columns of one array."""
    effort: Any = 10_000  # before NumPy 2.5 its types knew of none between 0 and all of it
    try:
        return np.shares_memory(first, second, max_work=effort)
    except np.exceptions.TooHardError:  # but not of strides for which this is hard to tell
        return True


def _take_over(array: np.ndarray | None, output: Output) -> None:
    """What is to be added to: zeros where there is nothing yet."""
    if array is None:
        output.normal.fill(0)
    elif output.detour:
        output.normal[...] = array.reshape(output.normal.shape)
