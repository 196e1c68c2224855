"""Rounding up or down at random: gpu_embed/reference/rounding.py, bit for bit."""

import triton
import triton.language as tl


@triton.jit
def random_words(seed, step, row, d):
    """The uint32 of the elements in columns d [1, BLOCK_D] of rows, int64 [BLOCK_C, 1] or one."""
    none = row.to(tl.int32) * 0 + d.to(tl.int32) * 0  # [BLOCK_C, BLOCK_D]
    # Four neighbours share a block of words. Where a lane holds them, the compiler makes it once.
    block = none + (d // 4).to(tl.int32)
    low = none + (row & 0xFFFFFFFF).to(tl.uint32).to(tl.int32, bitcast=True)
    high = none + (row >> 32).to(tl.int32)
    counter = (none + step).to(tl.int32)
    w0, w1, w2, w3 = tl.philox(seed, block, low, high, counter)
    word = none + (d % 4).to(tl.int32)
    return tl.where(word < 2, tl.where(word == 0, w0, w1), tl.where(word == 2, w2, w3))


@triton.jit
def round_at_random(value, random, dtype: tl.constexpr):
    """fp32 values as bf16 or fp16, up or down as the random words say."""
    bits = value.to(tl.uint32, bitcast=True)
    if dtype == tl.bfloat16:
        rounded = (bits + (random >> 16)) & 0xFFFF0000
    else:
        magnitude = bits & 0x7FFFFFFF
        # Below 2**-14 halves are 2**-24 apart: a fixed point, with 21 bits behind it.
        is_fixed = magnitude < 0x38800000
        fixed = (tl.where(is_fixed, tl.abs(value), 0.0) * 35184372088832.0).to(tl.uint32)
        total = tl.where(is_fixed, fixed, magnitude) + (random >> tl.where(is_fixed, 11, 19))
        from_fixed = (total >> 21).to(tl.float32) * 5.9604644775390625e-08
        rounded = tl.where(is_fixed, from_fixed.to(tl.uint32, bitcast=True), total & 0xFFFFE000)
        rounded = rounded | (bits & 0x80000000)
    is_finite = (bits & 0x7F800000) != 0x7F800000
    return tl.where(is_finite, rounded, bits).to(tl.float32, bitcast=True).to(dtype)
