"""Sort keys of ids, and a radix sort of them within 16 bytes an id, where torch.sort takes about 36.

Four bits of the key a pass, the lowest first. A pass cuts the keys into tiles, counts how often each of the 16
digits occurs in each tile, turns the counts into the places where a tile's digits begin (a cumulative sum, by
torch), and moves every key and its position to its place. Keys with the same digit stay in order, so after the
last pass the keys are sorted, and equal ones stand as they stood before.

With keys and positions of 4 bytes each, a pass reads the keys to count them, reads both, and writes both: 20
bytes an id is its floor. The first pass makes the keys of the caller's ids, so there is no array of unsorted
ones. Wider keys or positions would take more than 16 bytes: then positions travel alone, and each pass reads
the ids through them.

A byte counts a digit: 16 counters are two words, which one cumulative sum each turns into ranks.
"""

import triton
import triton.language as tl

DIGITS = tl.constexpr(16)


@triton.jit
def sort_key(index, num_embeddings, padding_idx):
    """The id itself; num_embeddings, which sorts behind all rows, for an id without a gradient."""
    kept = (index >= 0) & (index < num_embeddings) & (index != padding_idx)
    return tl.where(kept, index, num_embeddings)


# Program i owns places [i * BLOCK, ...) of keys.
@triton.jit
def sort_keys_kernel(
    indices_ptr,  # any integer dtype, [num_indices], contiguous
    order_ptr,  # int32 or int64 [num_indices]: the position of each key's id; None: the key's own
    keys_ptr,  # the narrowest integer dtype that holds num_embeddings, [num_indices]
    num_indices,
    num_embeddings,
    padding_idx,  # -1: none
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    position = n
    if order_ptr is not None:
        position = tl.load(order_ptr + n, mask=n < num_indices, other=0)
    index = tl.load(indices_ptr + position, mask=n < num_indices, other=0).to(tl.int64)
    key = sort_key(index, num_embeddings, padding_idx)
    tl.store(keys_ptr + n, key.to(keys_ptr.dtype.element_ty), mask=n < num_indices)


@triton.jit
def load_position(order_ptr, n):
    """The position that came to place n in the pass before; in the first pass n itself."""
    if order_ptr is None:
        return n
    else:
        return tl.load(order_ptr + n)


@triton.jit
def load_digit(
    indices_ptr, order_ptr, keys_ptr, n, num_indices, num_embeddings, padding_idx, shift
):
    """The key at place n, as the pass before left it or made of its id, and its digit -> [BLOCK] each."""
    if keys_ptr is None:
        position = load_position(order_ptr, n)
        index = tl.load(indices_ptr + position, mask=position < num_indices, other=0).to(tl.int64)
        # Past the last id all bits are set: these keys stay behind all others.
        key = tl.where(
            position < num_indices, sort_key(index, num_embeddings, padding_idx), -1
        )  # [BLOCK]
    else:
        key = tl.load(keys_ptr + n)
    return key, ((key >> shift) & (DIGITS - 1)).to(tl.int32)


@triton.jit
def byte_counters(digit):
    """1 in the byte that counts the digit, 0 in all others: digits 0 to 7, digits 8 to 15."""
    one = tl.full(digit.shape, 1, tl.int64) << (digit % 8 * 8).to(tl.int64)
    return tl.where(digit < 8, one, 0), tl.where(digit < 8, 0, one)


@triton.jit
def counter(low, high, digit):
    """The byte that counts the digit -> int32, shape of digit."""
    word = tl.where(digit < 8, low, high)
    return ((word >> (digit % 8 * 8).to(tl.int64)) & 255).to(tl.int32)


# Program i owns tile i: places [i * tile_size, ...) of keys. BLOCK * UNROLL divides tile_size and num_keys, and
# a tile has at most 255 blocks, which is as far as a byte counts.
@triton.jit(do_not_specialize=["shift"])
def digit_counts_kernel(
    indices_ptr,  # any integer dtype, [num_indices], contiguous; None where keys_ptr is given
    order_ptr,  # int32 or int64 [num_keys]: the position of each key's id; None: the key's own
    keys_ptr,  # [num_keys], as the pass before left them; None: to be made of the ids
    counters_ptr,  # int32 or int64 [1 + 16 * num_tiles]: 0, then the counts, digit by digit
    num_indices,
    num_keys,
    num_embeddings,
    padding_idx,  # -1: none
    tile_size,
    num_tiles,
    shift,  # of the digit, in bits
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,  # loads in flight a thread
):
    tile = tl.program_id(0)
    start = tile.to(tl.int64) * tile_size
    lane = tl.arange(0, BLOCK)  # [BLOCK]
    low = tl.zeros([BLOCK], tl.int64)
    high = tl.zeros([BLOCK], tl.int64)
    for first in range(start, tl.minimum(start + tile_size, num_keys), BLOCK * UNROLL):
        # All loads of a step are issued before the first count needs one.
        digits = ()
        for u in tl.static_range(UNROLL):
            _, digit = load_digit(
                indices_ptr,
                order_ptr,
                keys_ptr,
                first + u * BLOCK + lane,
                num_indices,
                num_embeddings,
                padding_idx,
                shift,
            )
            digits += (digit,)
        for u in tl.static_range(UNROLL):
            one_low, one_high = byte_counters(digits[u])
            low += one_low
            high += one_high
    for digit in tl.static_range(DIGITS):
        count = tl.sum(counter(low, high, tl.full([BLOCK], digit, tl.int32)))
        tl.store(counters_ptr + 1 + digit * num_tiles + tile, count)
    tl.store(counters_ptr, 0, mask=tile == 0)


# Program i owns tile i, as above, and walks it block by block.
@triton.jit(do_not_specialize=["shift"])
def digit_scatter_kernel(
    indices_ptr,  # as above
    order_ptr,  # as above
    keys_ptr,  # as above
    counters_ptr,  # int32 or int64 [1 + 16 * num_tiles]: where each tile's digits begin, digit by digit
    sorted_order_ptr,  # int32 or int64 [num_keys]
    sorted_keys_ptr,  # [num_keys]; None: positions travel alone
    num_indices,
    num_keys,
    num_embeddings,
    padding_idx,  # -1: none
    tile_size,
    num_tiles,
    shift,  # of the digit, in bits
    BLOCK: tl.constexpr,  # at most 128, or a byte could not count it
):
    tile = tl.program_id(0)
    start = tile.to(tl.int64) * tile_size
    lane = tl.arange(0, BLOCK)  # [BLOCK]
    digits = tl.arange(0, DIGITS)  # [DIGITS]
    last_lane = tl.full([DIGITS], BLOCK - 1, tl.int32)
    # Where the tile's next key of each digit goes.
    begin = tl.load(counters_ptr + digits * num_tiles + tile)  # [DIGITS]
    for first in range(start, tl.minimum(start + tile_size, num_keys), BLOCK):
        n = first + lane
        key, digit = load_digit(
            indices_ptr, order_ptr, keys_ptr, n, num_indices, num_embeddings, padding_idx, shift
        )
        position = load_position(order_ptr, n)
        low, high = byte_counters(digit)
        low_through = tl.cumsum(low)
        high_through = tl.cumsum(high)
        rank = counter(low_through - low, high_through - high, digit)
        place = tl.gather(begin, digit, 0) + rank
        tl.store(sorted_order_ptr + place, position.to(sorted_order_ptr.dtype.element_ty))
        if sorted_keys_ptr is not None:
            tl.store(sorted_keys_ptr + place, key.to(sorted_keys_ptr.dtype.element_ty))
        begin += counter(
            tl.gather(low_through, last_lane, 0), tl.gather(high_through, last_lane, 0), digits
        )
