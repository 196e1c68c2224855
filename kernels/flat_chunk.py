"""A flattened [N, D] in chunks across row boundaries, one a program of one warp: an id is loaded once a chunk.

Program i has the BLOCK vectors from i * BLOCK on, 32 in a step. What belongs to a row is loaded by one lane: lane l of
window w has row 32 * w + l of the chunk. A shuffle hands it to the row's vectors:

    vectors of rows a, b, c, d    a a a b b b b b c c c c c d
    window 0                      a b c d
"""

import triton
import triton.language as tl


@triton.jit
def quotient(x, DIVISOR: tl.constexpr, MAX: tl.constexpr):
    """x // DIVISOR, int32, for 0 <= x < MAX: one multiplication, where Triton's division takes three or more."""
    # 2**32 // DIVISOR + 1 exceeds 2**32 / DIVISOR by 1 at most. So the product, over 2**32, exceeds x / DIVISOR by less
    # than MAX / 2**32 <= 1 / DIVISOR: too little to reach the next integer.
    if DIVISOR & (DIVISOR - 1) == 0 or DIVISOR * MAX > 2**32:
        result = x // DIVISOR
    else:
        result = (x.to(tl.uint64) * (2**32 // DIVISOR + 1) >> 32).to(tl.int32)
    return result


@triton.jit
def chunk_start(VECTORS: tl.constexpr, BLOCK: tl.constexpr):
    """Where a chunk begins, for rows of VECTORS vectors: row `group` * BLOCK + `n`, vector `vector` of it."""
    # VECTORS programs have BLOCK whole rows: no division in 64 bits.
    group = tl.program_id(0) // VECTORS
    part = tl.program_id(0) % VECTORS
    if VECTORS * BLOCK >= 2**31:
        part = part.to(tl.int64)
    n = quotient(part * BLOCK, VECTORS, VECTORS * BLOCK)
    vector = part * BLOCK - n * VECTORS
    if BLOCK % VECTORS == 0:
        n = part * (BLOCK // VECTORS)
        vector = part * 0
    return group, n, vector


@triton.jit
def window_rows(vector, window: tl.constexpr, VECTORS: tl.constexpr, BLOCK: tl.constexpr):
    """The rows of a window, counted from the chunk's first, and which of them the chunk has: [32]."""
    k = (32 * window + tl.arange(0, 32)).to(vector.dtype)
    return k, k * VECTORS < vector + BLOCK


@triton.jit
def step_vectors(vector, step: tl.constexpr, VECTORS: tl.constexpr, BLOCK: tl.constexpr):
    """The lanes' vectors: their rows, counted from the chunk's first, and their places in these rows: [32]."""
    place = vector + 32 * step + tl.arange(0, 32)
    k = quotient(place, VECTORS, VECTORS + BLOCK)
    return k, place - k * VECTORS


@triton.jit
def of_rows(windows, k, step: tl.constexpr, VECTORS: tl.constexpr, BLOCK: tl.constexpr):
    """What the windows have for each of the rows k of this step."""
    # So far into its row a chunk begins at most: at a multiple of the largest power of two in VECTORS.
    LATEST: tl.constexpr = 0 if BLOCK % VECTORS == 0 else VECTORS - (VECTORS & -VECTORS)
    FIRST: tl.constexpr = 32 * step // VECTORS // 32
    LAST: tl.constexpr = (LATEST + 32 * step + 31) // VECTORS // 32
    value = tl.gather(windows[FIRST], k % 32, 0)
    for window in tl.static_range(FIRST + 1, LAST + 1):
        value = tl.where(k < 32 * window, value, tl.gather(windows[window], k % 32, 0))
    return value
