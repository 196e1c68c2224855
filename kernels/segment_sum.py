"""Segment sum of sorted keys: a deterministic gradient; each row of grad_weight is written and rounded once.

As cub::DeviceReduce::ReduceByKey, in a fixed order and in two launches, or one where one chunk holds all keys.
The sorted keys (ids) are cut into chunks. The first launch, the walk, sums each run of equal keys within one chunk in
registers and stores it. A run that crosses a chunk's edge leaves partial sums: slot 2c holds the carry-in of chunk c,
the sum of its first run if that began earlier; slot 2c + 1 the carry-out, the sum of its last run if that goes on.

    keys     3   3   5   5 | 5   5   5   5 | 5   7   9   9     chunk_size 4
    stored   [ 3 ]                              [7]  [ 9 ]
    slots            [ 1 ]   [     2     ]  [4]

The second launch, the join, adds a run's carry-out and the carry-ins behind it, from left to right. The cuts depend on
the number of keys, the width of a row and the dtype of the sums alone, so the order of the additions is deterministic.
"""

import triton
import triton.language as tl

from .segment_walk import add_sum, load_sum, sum_runs


# grid:  (cdiv(num_chunks, BLOCK_C), cdiv(D, BLOCK_D))
# tile:  UNROLL keys by BLOCK_C chunks by BLOCK_D columns; num_warps 1
# owner: program (i, j): chunks [i * BLOCK_C, ...); columns [j * BLOCK_D, ...). JOIN: of the runs that cross an edge,
#        those that begin in its chunks
# why:   a lane has all rows of its columns, so a sum stays in it; keys and places come by one coalesced load a warp
# An alignment beyond VEC elements would make Triton load a row in wider vectors than the rest.
@triton.jit(do_not_specialize=["grad_weight_row_stride"])
def segment_sum_kernel(
    values_ptr,  # [*, D], any strides: grad_output
    order_ptr,  # int32 or int64 [num_keys]: each key's position before the sort
    keys_ptr,  # [num_keys], sorted; keys outside [0, num_embeddings) are skipped
    bag_of_ptr,  # [num_indices]: each position's bag, -1: in no bag; None: no bags, position n reads row n
    per_sample_weights_ptr,  # weight's dtype, [num_indices]; None: all 1
    sizes_ptr,  # int32 [num_bags]: the divisors of means; None: all 1. Not with per_sample_weights
    grad_weight_ptr,  # [num_embeddings, D]; IN_PLACE: any strides; else contiguous, zero on entry
    # Accumulation dtype, [2 * num_chunks, D], by slot; SCALE_GRAD_BY_FREQ: behind that the ids of each slot,
    # [2 * num_chunks]. None: atomics add the carries to grad_weight, which then has the accumulation dtype.
    partial_ptr,
    num_keys,
    num_embeddings,
    chunk_size,
    value_row_stride,  # in units of VEC elements, so that the compiler sees the alignment
    value_col_stride,  # in elements
    grad_weight_row_stride,  # in units of VEC elements; None unless IN_PLACE
    grad_weight_col_stride,  # in elements; None unless IN_PLACE
    D: tl.constexpr,
    VEC: tl.constexpr,  # elements a thread loads with one instruction
    SCALE_GRAD_BY_FREQ: tl.constexpr,
    JOIN: tl.constexpr,
    IN_PLACE: tl.constexpr,  # the sums are added to the rows of grad_weight; else they are stored
    UNROLL: tl.constexpr,  # rows in flight per thread
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    strides = (D, 1)
    if IN_PLACE:
        strides = (grad_weight_row_stride * VEC, grad_weight_col_stride)
    sum_runs(
        values_ptr,
        order_ptr,
        keys_ptr,
        bag_of_ptr,
        per_sample_weights_ptr,
        sizes_ptr,
        None,
        None,
        grad_weight_ptr,
        partial_ptr,
        num_keys,
        num_embeddings,
        None,
        chunk_size,
        value_row_stride,
        value_col_stride,
        None,
        D=D,
        VEC=VEC,
        SCALE_GRAD_BY_FREQ=SCALE_GRAD_BY_FREQ,
        JOIN=JOIN,
        UNROLL=UNROLL,
        BLOCK_C=BLOCK_C,
        BLOCK_D=BLOCK_D,
        LOAD_ROW=load_sum if IN_PLACE else None,
        STORE_ROW=add_sum if IN_PLACE else None,
        row_args=(grad_weight_ptr, strides, False),
    )
