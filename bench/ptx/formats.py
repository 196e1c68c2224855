"""Numbers as PTX has them: types, and the roundings that NumPy lacks."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .parse import UnsupportedError

Array = NDArray[Any]
KINDS = {"u": "u", "b": "u", "s": "i", "f": "f"}
# What NumPy has no number for is kept as bits.
BITS = {"pred": "?", "bf16": "u2", "bf16x2": "u4", "f16x2": "u4", "u16x2": "u4", "s16x2": "u4"}


def dtype_of(kind: str) -> np.dtype[Any]:
    """NumPy's dtype of a PTX type, as `s32`."""
    if kind in BITS:
        return np.dtype(BITS[kind])
    try:
        return np.dtype(f"{KINDS[kind[0]]}{int(kind[1:]) // 8}")
    except (KeyError, ValueError, TypeError):
        raise UnsupportedError(f"the type {kind}") from None


def unsigned(num_bytes: int) -> np.dtype[Any]:
    return np.dtype(f"u{num_bytes}")


def from_bf16(bits: Array) -> Array:
    """fp32 of the bits of bf16."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bf16(numbers: Array) -> Array:
    """Bits of bf16, rounded once to nearest even from fp32 or fp64; a NaN is 0x7FFF, as cvt makes it."""
    singles = numbers.astype(np.float32)
    odd = _to_odd(singles, numbers - singles.astype(numbers.dtype))
    bits = np.ascontiguousarray(odd).view(np.uint32).astype(np.uint64)
    rounded = bits + np.uint64(0x7FFF) + (bits >> np.uint64(16) & np.uint64(1)) >> np.uint64(16)
    return np.where(np.isnan(numbers), 0x7FFF, rounded).astype(np.uint16)


def fma_to_odd(a: Array, b: Array, c: Array) -> Array:
    """a * b + c in fp64, where a * b is exact, rounded to odd.

    A later rounding to fewer bits is then as if it were the only one.
    """
    product = a * b
    total = product + c
    added = total - product
    return _to_odd(total, (product - (total - added)) + (c - added))


def _to_odd(rounded: Array, rest: Array) -> Array:
    """The neighbour with an odd last bit, on the side of the rest, where there is a rest."""
    rounded = np.ascontiguousarray(rounded)
    bits = rounded.view(f"i{rounded.itemsize}")
    away = np.where((rest > 0) == (rounded > 0), 1, -1).astype(bits.dtype)
    even = bits & bits.dtype.type(1) == 0
    moves = np.isfinite(rounded) & np.isfinite(rest) & (rest != 0) & (rounded != 0) & even
    return np.where(moves, bits + away, bits).astype(bits.dtype).view(rounded.dtype)


def fma64(a: Array, b: Array, c: Array) -> Array:
    """a * b + c in fp64, rounded once."""
    plain = a * b + c
    exact = [
        float(Fraction(x) * Fraction(y) + Fraction(z)) if np.isfinite(p) else p
        for x, y, z, p in np.broadcast(a, b, c, plain)
    ]
    return np.where(np.array(exact) == 0, plain, np.array(exact, np.float64))
