"""Positions of a flat range, spread over a block's lanes."""

import triton
import triton.language as tl


@triton.jit
def block_positions(BLOCK: tl.constexpr):
    """The program's positions [i * BLOCK, ...), int64; adjacent lanes have adjacent ones.

    Triton would give each thread several adjacent ones. If their number is no multiple of 16, it loads and stores them
    one by one, and the lanes of each instruction lie apart: 4 to 8 times the sectors.
    """
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    return tl.max_contiguous(n, 1)
