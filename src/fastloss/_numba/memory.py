"""Memory: between arrays of any storage and scratch in the compute type."""

from numba import types

from fastloss._numba.arithmetic import (
    bfloat_to_float,
    float_to_bfloat,
    float_to_half,
    half_to_float,
)
from fastloss._numba.jit import inline, typed
from fastloss._numba.machine import lanes, prefetch, stream_line
from fastloss._numba.types import FIELDS, FLOAT16, LANES, LINE


@typed
def load_block(x, start, n, buffer, storage):
    """Elements start to start + n in the compute type: as they lie, or converted into buffer."""
    if x.dtype == types.uint16:
        return lambda x, start, n, buffer, storage: widen_halves(
            x[start : start + n], buffer[:n], storage
        )
    return lambda x, start, n, buffer, storage: x[start : start + n]


@inline
def widen_halves(x, buffer, storage):
    if storage == FLOAT16:
        for i in range(buffer.size):
            buffer[i] = half_to_float(x[i])
    else:
        for i in range(buffer.size):
            buffer[i] = bfloat_to_float(x[i])
    return buffer


@inline
def narrow_floats(values, halves, storage):
    if storage == FLOAT16:
        for i in range(values.size):
            halves[i] = float_to_half(values[i])
    else:
        for i in range(values.size):
            halves[i] = float_to_bfloat(values[i])


@typed
def load_one(x, index, storage):
    if x.dtype != types.uint16:
        return lambda x, index, storage: x[index]

    def load_half(x, index, storage):
        h = x[index]
        return half_to_float(h) if storage == FLOAT16 else bfloat_to_float(h)

    return load_half


@typed
def load_into(to, x, start, storage):
    """Copy elements of x from start on, converted."""
    if x.dtype == types.uint16:
        return lambda to, x, start, storage: widen_halves(x[start : start + to.size], to, storage)
    return lambda to, x, start, storage: copy(to, x[start : start + to.size])


@inline
def fetch(x, start, n):
    """Ask for elements start to start + n, ahead of their use."""
    for i in range(start, start + n, LINE // x.itemsize):
        prefetch(x, i)


@inline
def from_line(numbers, size):
    """So many of the numbers, the first at the start of a cache line: no vector lies across two."""
    start = -(numbers.ctypes.data // numbers.itemsize) % (LINE // numbers.itemsize)
    return numbers[start : start + size]


@inline
def copy(to, values):
    for i in range(to.size):
        to[i] = values[i]


@typed
def store(out, start, values, storage, stream):
    """Write out[start : start + values.size]."""
    if out.dtype == types.uint16:
        return store_halves
    return lambda out, start, values, storage, stream: copy_out(out, start, values, stream)


@inline
def copy_out(out, start, values, stream):
    n = values.size
    line = LINE // out.itemsize
    if stream and n >= 2 * line:
        head = -((out.ctypes.data // out.itemsize) + start) % line
        copy(out[start : start + head], values[:head])
        lines = (n - head) // line
        for i in range(lines):
            stream_line(out, start + head + i * line, values, head + i * line)
        done = head + lines * line
        copy(out[start + done : start + n], values[done:])
    else:
        copy(out[start : start + n], values)


def store_halves(out, start, values, storage, stream):
    halves = lanes(out)
    # To the next cache line, then whole lines: others would be read before they are written.
    to_line = -(out.ctypes.data // out.itemsize + start) % (LINE // out.itemsize)
    n = min(to_line if to_line else LANES, values.size)
    first = 0
    while first < values.size:
        narrow_floats(values[first : first + n], halves, storage)
        copy_out(out, start + first, halves[:n], stream)
        first += n
        n = min(LANES, values.size - first)


@typed
def store_run(out, start, values, storage, stream, carry, r, slot):
    """As store, of at most LANES numbers that a later run may go on from.

    With stream in whole cache lines, since half a line would first be read from memory: the end of
    a run that does not fill its line waits in `carry` for the next, which begins at r[slot].
    """
    if values.dtype == types.uint16:
        return lambda out, start, values, storage, stream, carry, r, slot: copy_out(
            out, start, values, stream
        )
    if out.dtype == types.uint16:
        return lambda out, start, values, storage, stream, carry, r, slot: store(
            out, start, values, storage, stream
        )
    return lambda out, start, values, storage, stream, carry, r, slot: (
        stream_run(out, start, values, carry, r, slot)
        if stream
        else copy(out[start : start + values.size], values)
    )


@inline
def stream_run(out, start, values, carry, r, slot):
    n = values.size
    line = LINE // out.itemsize
    filled = (out.ctypes.data // out.itemsize + start) % line
    head = min(-filled % line, n)
    if r[slot] == start:
        if filled:
            copy(carry[filled : filled + head], values[:head])
            if filled + head < line:
                r[slot] = start + head
                return
            stream_line(out, start - filled, carry, 0)
    else:
        flush(out, carry, r, slot)
        copy(out[start : start + head], values[:head])
        if (filled + head) % line:
            return
    done = head
    while n - done >= line:
        stream_line(out, start + done, values, done)
        done += line
    copy(carry[: n - done], values[done:])
    r[slot] = start + n


@inline
def flush(out, carry, r, slot):
    if r[slot] >= 0:
        end = int(r[slot])
        filled = (out.ctypes.data // out.itemsize + end) % (LINE // out.itemsize)
        copy(out[end - filled : end], carry[:filled])
        r[slot] = -1.0


@inline
def carry_of(scratch, r, c):
    """Half a cache line or less of class c; r[FIELDS + c] says where it is to go, or -1."""
    line = LINE // scratch.itemsize
    start = scratch.size - (r.size - FIELDS - c) * line
    return scratch[start : start + line]


@inline
def begin_carries(r):
    for c in range(FIELDS, r.size):
        r[c] = -1.0


@inline
def flush_carries(out, r, scratch):
    for c in range(r.size - FIELDS):
        flush(out, carry_of(scratch, r, c), r, FIELDS + c)
