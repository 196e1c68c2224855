"""Out-of-range ids, seen from inside a kernel."""

import triton
import triton.language as tl


@triton.jit
def record_out_of_range(record_ptr, flag_ptr, out_of_range, position, index, num_embeddings):
    """Write one bad id to the device's record; the good path costs a predicate that is never true.

    record_ptr: int64 [7] on the device: claimed (0 or 1), position, id, rows of the table; the rest stays 0.
        Where ids also count from the end, the caller gives the rows negated.
    flag_ptr: int32 [1] in pinned host memory, which the host reads without a stall.
    out_of_range, position, index: one value per lane.
    """
    # Whoever swaps the 0 out owns the record until the host clears it, so its three values belong together.
    claimed = tl.atomic_xchg(record_ptr + position * 0, 1, mask=out_of_range, sem="relaxed")
    first = out_of_range & (claimed == 0)
    tl.store(record_ptr + 1 + position * 0, position, mask=first)
    tl.store(record_ptr + 2 + position * 0, index, mask=first)
    tl.store(record_ptr + 3 + position * 0, position * 0 + num_embeddings, mask=first)
    tl.store(flag_ptr + position * 0, 1, mask=first)


@triton.jit
def record_bag_out_of_range(
    record_ptr, flag_ptr, out_of_range, position, index, num_embeddings, bag_word, begin, table=None
):
    """The same for an id of a bag.

    bag_word: the bag's number from 1 on. -1: not an id but the offset `index` at place `position` is wrong, and
        num_embeddings is the number of ids.
    begin: the bag's first position.
    table: the number of its table's name, where there are several tables.
    """
    claimed = tl.atomic_xchg(record_ptr + position * 0, 1, mask=out_of_range, sem="relaxed")
    first = out_of_range & (claimed == 0)
    tl.store(record_ptr + 1 + position * 0, position, mask=first)
    tl.store(record_ptr + 2 + position * 0, index, mask=first)
    tl.store(record_ptr + 3 + position * 0, position * 0 + num_embeddings, mask=first)
    tl.store(record_ptr + 4 + position * 0, bag_word, mask=first)
    tl.store(record_ptr + 5 + position * 0, begin, mask=first)
    if table is not None:
        tl.store(record_ptr + 6 + position * 0, table, mask=first)
    tl.store(flag_ptr + position * 0, 1, mask=first)
