# cython: language_level=3
"""Small calls as most are, recognised and checked in compiled code.

Where arrays are a few kilobytes a kernel takes less time than Python's checks of its arguments.
What is common is quickly told: plain arrays of float32 or float64 in C order, classes along the
last axis, no weights, one thread.  Such a call is answered here; of a linear head, only the checks.
Of any other, and of one with something wrong in it, the answer is None: `functional` and `linear`
then go the general way, which knows all the rules and all the errors.  This file has no rules of
its own, and tests/test_small.py holds both ways to the same results.
"""

cimport numpy as cnp
from libc.math cimport INFINITY
from libc.stdint cimport int32_t, int64_t

from fastloss._arguments import Linear, scores_of
from fastloss._backend import _loaded, resolve
from fastloss._contract import Labels, Options
from fastloss._threads import MOST_THREADS, PARALLEL_ELEMENTS

cnp.import_array()

cdef Py_ssize_t elements_of_many_threads = PARALLEL_ELEMENTS
cdef dict defaults = Options._field_defaults
cdef dict loaded = _loaded
cdef object no_options = Options()
cdef object SMALLEST = -(1 << 63), LARGEST = (1 << 63) - 1
cdef object new_tuple = tuple.__new__  # in a third of the time that a named one takes by name


def map(str name, bint by_row, logits, axis, out, backend, num_threads):
    """What `functional._map` answers to a small call; else None."""
    cdef cnp.ndarray result
    cdef int ndim
    if not is_small(logits, axis, num_threads):
        return None
    ndim = (<cnp.ndarray>logits).ndim - by_row
    if not may_write(out, logits, ndim):
        return None
    kernels = kernels_of(backend)
    result = empty(logits, ndim) if out is None else out
    getattr(kernels, name)(
        rows_of(logits), entries_of(result) if by_row else rows_of(result), 1
    )
    return result


def backward(str name, grad_output, forward, axis, out, backend, num_threads):
    """What `functional._map_backward` answers to a small call; else None."""
    cdef cnp.ndarray result
    cdef int ndim
    if not is_small(forward, axis, num_threads):
        return None
    ndim = (<cnp.ndarray>forward).ndim
    if not (
        is_like(grad_output, forward, ndim) and may_write(out, forward, ndim)
        and may_write(out, grad_output, ndim)
    ):
        return None
    kernels = kernels_of(backend)
    result = empty(forward, ndim) if out is None else out
    getattr(kernels, name)(rows_of(grad_output), rows_of(forward), rows_of(result), 1)
    return result


def loss(
    str name, scores, target, weight, sample_weight, dict options, reduction, normalizer, axis,
    backend, num_threads, bint with_grad, out,
):
    """What `functional._loss` answers to a small call; else None."""
    cdef cnp.ndarray x, grad = None
    cdef double total_weight, divisor
    chosen = plain_options(options)
    if not (
        weight is None and sample_weight is None and is_reduced(reduction, normalizer)
        and chosen is not None and is_small(scores, axis, num_threads)
        and is_target(target, scores) and may_write(out, scores, (<cnp.ndarray>scores).ndim)
        and (out is None or are_apart(out, target))
    ):
        return None
    kernels = kernels_of(backend)
    x = rows_of(scores)
    total_weight = count_of(target, x.shape[1], chosen[0])
    if total_weight <= 0.0:
        return None
    labels = new_tuple(Labels, (entries_of(target), None, None))
    if normalizer is not None:
        divisor = normalizer
    else:
        divisor = total_weight if reduction == "mean" else 1.0
    if with_grad:
        grad = empty(scores, scores.ndim) if out is None else out
    total = getattr(kernels, name)(
        x, labels, chosen, 1.0 / divisor, None, None if grad is None else rows_of(grad), 1
    )
    return total / divisor, grad


def linear(inputs, linear_weight, bias, target, weight, sample_weight, options):
    """The layer and the labels of a linear head, and their weight; of what is not plain, None."""
    cdef cnp.ndarray x, w
    cdef double total_weight
    if not (
        weight is None and sample_weight is None
        and is_matrix(inputs) and is_matrix(linear_weight)
    ):
        return None
    x, w = inputs, linear_weight
    if not (
        x.shape[1] == w.shape[1] and x.descr.type_num == w.descr.type_num
        and (bias is None or is_like(bias, w, 1)) and is_target(target, x)
    ):
        return None
    total_weight = count_of(target, w.shape[0], options[0])
    if total_weight <= 0.0:
        return None
    scores = scores_of(target.shape, w.shape[0], x.dtype)
    layer = new_tuple(Linear, (x, w, bias, inputs.shape, scores))
    return layer, new_tuple(Labels, (entries_of(target), None, None)), total_weight


def gradients(out, layer, labels, tuple wanted):
    """Where those of such a layer go, if that is nowhere or plain arrays, all apart; else None."""
    cdef cnp.ndarray array
    cdef list taken = [x for x in (layer[0], layer[1], layer[2], labels[0]) if x is not None]
    cdef list results = [None, None, None]
    cdef tuple likes = (layer[1], layer[1], layer[0]), given = (None, None, None)
    cdef int i, ndim
    if out is not None:
        if not isinstance(out, tuple) or len(out) != 3:
            return None
        given = tuple(out)
    for i in range(3):
        ndim = 1 if i == 1 else 2
        if not wanted[i]:
            if given[i] is not None:
                return None
            continue
        if given[i] is None:
            results[i] = empty(likes[i], ndim)
            continue
        if not is_like(given[i], likes[i], ndim):
            return None
        array = results[i] = given[i]
        if not cnp.PyArray_ISCARRAY(array):
            return None
        for other in taken:
            if not are_apart(array, other):
                return None
        taken.append(array)
    return results


cdef object kernels_of(backend):
    """What `resolve` says, by a look where it would look in the end."""
    if type(backend) is str:
        kernels = loaded.get(backend)
        if kernels is not None:
            return kernels
    return resolve(backend)


cdef bint is_matrix(array):
    """Whether these are plain rows of float32 or float64."""
    cdef cnp.ndarray a
    if type(array) is not cnp.ndarray:
        return False
    a = array
    return (
        (a.descr.type_num == cnp.NPY_FLOAT or a.descr.type_num == cnp.NPY_DOUBLE)
        and cnp.PyArray_ISCARRAY_RO(a) and a.ndim == 2 and a.size > 0
    )


cdef bint is_like(array, cnp.ndarray like, int ndim):
    """Whether this is a plain array of the dtype and, as far as `ndim`, the shape of another."""
    cdef cnp.ndarray a
    if type(array) is not cnp.ndarray:
        return False
    a = array
    return (
        a.descr.type_num == like.descr.type_num and a.ndim == ndim
        and cnp.PyArray_CompareLists(a.shape, like.shape, ndim) and cnp.PyArray_ISCARRAY_RO(a)
    )


cdef bint is_small(array, axis, num_threads):
    """Whether scores are plain, and few enough for one thread."""
    cdef cnp.ndarray a
    if type(array) is not cnp.ndarray or type(axis) is not int:
        return False
    a = array
    return (
        (a.descr.type_num == cnp.NPY_FLOAT or a.descr.type_num == cnp.NPY_DOUBLE)
        and cnp.PyArray_ISCARRAY_RO(a)
        and a.ndim > 0
        and (axis == -1 or axis == a.ndim - 1)
        and 0 < a.size < elements_of_many_threads
        and (
            num_threads is None
            or type(num_threads) is int and 1 <= num_threads <= MOST_THREADS
        )
    )


cdef bint is_target(array, cnp.ndarray scores):
    """Whether these are plain indices, one for each row; nothing is said of their range."""
    cdef cnp.ndarray a
    if type(array) is not cnp.ndarray:
        return False
    a = array
    return (
        a.ndim == scores.ndim - 1 and cnp.PyArray_ISSIGNED(a) and cnp.PyArray_ISINTEGER(a)
        and a.itemsize >= 4 and cnp.PyArray_ISCARRAY_RO(a)
        and cnp.PyArray_CompareLists(a.shape, scores.shape, a.ndim)
    )


ctypedef fused integer:
    int32_t
    int64_t


cdef Py_ssize_t count(
    const integer* target, Py_ssize_t n, Py_ssize_t num_classes, int64_t ignored
) noexcept:
    """The targets that are not ignored; -1 if one is out of range."""
    cdef Py_ssize_t i, used = 0
    for i in range(n):
        if target[i] == ignored:
            continue
        if not 0 <= target[i] < num_classes:
            return -1
        used += 1
    return used


cdef Py_ssize_t count_of(cnp.ndarray target, Py_ssize_t num_classes, int64_t ignored) noexcept:
    cdef const void* data = cnp.PyArray_DATA(target)
    if target.itemsize == 4:
        return count(<const int32_t*>data, target.size, num_classes, ignored)
    return count(<const int64_t*>data, target.size, num_classes, ignored)


cdef bint may_write(out, cnp.ndarray like, int ndim):
    """Whether out is None, or such an array in quite another place; or in the same, if it is as big.

    It is to have the shape of `like`, as far as `ndim`.
    """
    cdef cnp.ndarray a
    if out is None:
        return True
    if not is_like(out, like, ndim):
        return False
    a = out
    return cnp.PyArray_ISCARRAY(a) and (
        cnp.PyArray_BYTES(a) == cnp.PyArray_BYTES(like) and ndim == like.ndim or are_apart(a, like)
    )


cdef bint are_apart(cnp.ndarray a, cnp.ndarray b):
    return (
        cnp.PyArray_BYTES(a) + cnp.PyArray_NBYTES(a) <= cnp.PyArray_BYTES(b)
        or cnp.PyArray_BYTES(b) + cnp.PyArray_NBYTES(b) <= cnp.PyArray_BYTES(a)
    )


cdef bint is_reduced(reduction, normalizer):
    """Whether it is to a sum, or to a mean with a divisor of its own or a right one."""
    if type(reduction) is not str:
        return False
    if normalizer is None:
        return <str>reduction == "mean" or <str>reduction == "sum"
    return (
        <str>reduction == "mean" and type(normalizer) is float
        and 0.0 < <double>normalizer < INFINITY
    )


cdef object plain_options(dict options):
    """The options, if they are plain numbers in their range; else None."""
    cdef bint usual = True
    for name, value in options.items():
        default = defaults[name]
        if type(value) is not type(default):
            return None
        if value == default:
            continue
        usual = False
        if name == "temperature":  # which has a range of its own
            return None
        if type(value) is int and not SMALLEST <= value <= LARGEST:
            return None
        if type(value) is float and not (
            0.0 <= <double>value < INFINITY and (name != "label_smoothing" or <double>value <= 1.0)
        ):
            return None
    return no_options if usual else Options(**options)


cdef cnp.ndarray empty(cnp.ndarray like, int ndim):
    return cnp.PyArray_EMPTY(ndim, like.shape, like.descr.type_num, False)


cdef cnp.ndarray rows_of(cnp.ndarray array):
    """The array in the normal form."""
    cdef Py_ssize_t num_classes = array.shape[array.ndim - 1]
    return view_of(array, 3, [array.size // num_classes, num_classes, 1])


cdef cnp.ndarray entries_of(cnp.ndarray array):
    """What has one entry for each row, in the normal form."""
    return view_of(array, 2, [array.size, 1, 1])


cdef cnp.ndarray view_of(cnp.ndarray array, int ndim, cnp.npy_intp[3] shape):
    cdef cnp.ndarray view = cnp.PyArray_SimpleNewFromData(
        ndim, shape, array.descr.type_num, cnp.PyArray_DATA(array)
    )
    cnp.set_array_base(view, array)
    return view
