"""The numbers that exponentials are computed with, at any temperature T: those of exp(x / T).

exp(x / T) is 2**n exp(r / T), n the integer nearest to x / (T ln 2) and r = x - n T ln 2, where
T ln 2 is a number of few bits, so that its product with n is exact, and a rest.  exp(r / T) is a
series in r.  A temperature thus costs nothing, and rounds no score: these numbers depend on it.
"""

import functools
import math
from fractions import Fraction

import numpy as np

_LN2 = Fraction("0.693147180559945309417232121458176568075500134360255254120680")
_HIGH_BITS = {4: 15, 8: 32}  # by the size of the compute type
_SERIES = {  # 1 + the sum of s_k r**k, for |r| up to half of ln 2
    4: (1.0, 0.499999918849, 0.166667094605, 0.0416763574161, 0.00835358145597, 0.00131687098951),
    8: (
        1.0, 0.50000000000000102221, 0.16666666666666674528, 0.041666666666522018292,
        0.0083333333333222094146, 0.0013888888947812472924, 0.00019841269886584525699,
        0.000024801487335535663603, 2.7557242344003567523e-6, 2.7632652169579558723e-7,
        2.5110047135431713555e-8,
    ),
}  # fmt: skip

LOG2E, MINUS_HIGH, MINUS_LOW, LN2, TEMPERATURE, SERIES = range(6)  # where each number is
COUNT = 16


@functools.lru_cache
def temper(temperature: float, dtype: np.dtype) -> np.ndarray:
    """The numbers, in the compute type."""
    t = Fraction(temperature)
    ln2 = t * _LN2
    unit = Fraction(2) ** (math.frexp(float(ln2))[1] - _HIGH_BITS[dtype.itemsize])
    high = ln2 // unit * unit
    series = (Fraction(s) / t ** (k + 1) for k, s in enumerate(_SERIES[dtype.itemsize]))
    numbers = np.zeros(COUNT, dtype)
    for i, number in enumerate((1 / ln2, -high, high - ln2, ln2, t, *series)):
        numbers[i] = float(number)
    numbers.setflags(write=False)
    return numbers
