"""Rounding up or down at random, in NumPy: the definition that the kernels are checked against.

The random bits are Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), a
function of a key and a counter, so every backend draws the same ones without sharing a state.
"""

import numpy as np
from numpy.typing import NDArray

Array = NDArray  # any dtype; shapes stand in the docstrings

MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
KEY_STEPS = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
LOW = np.uint64(0xFFFFFFFF)
HIGH = np.uint64(32)
ROUNDS = 10


def philox(counter: tuple[Array, ...], key: tuple[int, int]) -> tuple[Array, ...]:
    """Four random words for each counter.

    Args:
        counter: four arrays of words, uint64 below 2**32, that broadcast together.
        key: two words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = (np.uint64(word) for word in key)
    for _ in range(ROUNDS):
        product0, product1 = MULTIPLIERS[0] * c0, MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (product1 >> HIGH) ^ c1 ^ k0,
            product1 & LOW,
            (product0 >> HIGH) ^ c3 ^ k1,
            product0 & LOW,
        )
        k0, k1 = (k0 + KEY_STEPS[0]) & LOW, (k1 + KEY_STEPS[1]) & LOW
    return c0, c1, c2, c3


def random_words(rows: Array, num_columns: int, seed: int, step: int) -> Array:
    """The uint32 of each element of rows [U] of a table -> [U, num_columns].

    Column d of row r takes word d % 4 of the block with the counter (d // 4, r mod 2**32, r // 2**32, step).
    """
    rows = rows.astype(np.uint64)[:, None]
    blocks = np.arange(-(-num_columns // 4), dtype=np.uint64)[None, :]
    counter = (blocks, rows & LOW, rows >> HIGH, np.full((1, 1), step, np.uint64))
    words = philox(counter, (seed & 0xFFFFFFFF, seed >> 32))
    shape = np.broadcast_shapes(*(word.shape for word in words))
    stacked = np.stack([np.broadcast_to(word, shape) for word in words], axis=-1)
    return stacked.reshape(len(rows), -1)[:, :num_columns].astype(np.uint32)


def round_to_bfloat16(values: Array, random: Array) -> Array:
    """float32 values rounded to a neighbour in bf16, up with the probability of the part cut off.

    Args:
        values: float32, any shape. Infinities and NaN stay what they are.
        random: uint32, the same shape; its upper 16 bits are used.
    """
    bits = values.view(np.uint32)
    rounded = (bits + (random >> np.uint32(16))) & np.uint32(0xFFFF0000)
    return np.where(np.isfinite(values), rounded, bits).view(np.float32)


def round_to_float16(values: Array, random: Array) -> Array:
    """The same for fp16, by the upper 13 bits of random; 65536, the next after the last, is infinite there.

    Below 2**-14, where halves are 2**-24 apart, the value is a fixed point with 21 bits behind it, so there the
    probability is right to 2**-21, which is no less than it would be with 21 random bits.
    """
    magnitude = np.abs(values)
    bits = magnitude.view(np.uint32)
    floating = ((bits + (random >> np.uint32(19))) & np.uint32(0xFFFFE000)).view(np.float32)
    is_fixed = magnitude < 2.0**-14
    fixed = (np.where(is_fixed, magnitude, 0) * np.float32(2.0**45)).astype(np.uint32)
    steps = (fixed + (random >> np.uint32(11))) >> np.uint32(21)
    rounded = np.where(is_fixed, steps.astype(np.float32) * np.float32(2.0**-24), floating)
    return np.where(np.isfinite(values), np.copysign(rounded, values), values)
