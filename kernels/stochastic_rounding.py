"""Stochastic rounding, bit-equal to gpu_embed/reference/rounding.py."""

import triton
import triton.language as tl


@triton.jit
def random_words(seed, step, row, d):
    """One random uint32 per element -> [BLOCK_C, BLOCK_D]. d: [1, BLOCK_D]; row: int64 [BLOCK_C, 1] or scalar."""
    zeros = row.to(tl.int32) * 0 + d.to(tl.int32) * 0  # [BLOCK_C, BLOCK_D]
    # Four adjacent columns share one Philox block. The compiler computes it once if one thread holds all four.
    block = zeros + (d // 4).to(tl.int32)
    row_low = zeros + (row & 0xFFFFFFFF).to(tl.uint32).to(tl.int32, bitcast=True)
    row_high = zeros + (row >> 32).to(tl.int32)
    counter = (zeros + step).to(tl.int32)
    w0, w1, w2, w3 = tl.philox(seed, block, row_low, row_high, counter)
    word = zeros + (d % 4).to(tl.int32)
    return tl.where(word < 2, tl.where(word == 0, w0, w1), tl.where(word == 2, w2, w3))


@triton.jit
def round_at_random(value, random, dtype: tl.constexpr):
    """fp32 values rounded to bf16 or fp16, up or down by the random words."""
    bits = value.to(tl.uint32, bitcast=True)
    if dtype == tl.bfloat16:
        rounded = (bits + (random >> 16)) & 0xFFFF0000
    else:
        magnitude = bits & 0x7FFFFFFF
        # Subnormal halves are 2**-24 apart: fixed point, with 21 fraction bits to round.
        is_fixed = magnitude < 0x38800000
        fixed = (tl.where(is_fixed, tl.abs(value), 0.0) * 35184372088832.0).to(tl.uint32)
        total = tl.where(is_fixed, fixed, magnitude) + (random >> tl.where(is_fixed, 11, 19))
        from_fixed = (total >> 21).to(tl.float32) * 5.9604644775390625e-08
        rounded = tl.where(is_fixed, from_fixed.to(tl.uint32, bitcast=True), total & 0xFFFFE000)
        rounded = rounded | (bits & 0x80000000)
    is_finite = (bits & 0x7F800000) != 0x7F800000
    return tl.where(is_finite, rounded, bits).to(tl.float32, bitcast=True).to(dtype)
