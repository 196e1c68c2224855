"""The row of an id; the record of one out of range: claimed and written by a kernel, read by gpu_embed/bounds.py.

record_ptr, int64 [7] on the device:
    0  claimed: 0 or 1
    1  position of the id
    2  the id
    3  rows of the table; negated where negative ids are wrapped
    4  bag + 1; 0: no bag; -1: words 1 to 3 hold the place of a wrong offset, that offset, and the number of ids
    5  first position of the bag
    6  number of the table's name; 0: one table
flag_ptr, int32 [1] in pinned host memory: 1 once the record is claimed. The host reads it without a sync.
"""

import triton
import triton.language as tl


@triton.jit
def local_row(index, first_row):
    """The row that each id, int64, has in the table in hand; another shard's has none there.

    first_row: of the shard, in the whole table, which the ids are of; None: the table in hand is whole.
    """
    row = index
    if first_row is not None:
        row = index - first_row
    return row


@triton.jit
def record_out_of_range(record_ptr, flag_ptr, out_of_range, position, index, num_embeddings):
    """Record one of the elements' ids, if any is out of range; otherwise the cost is a predicate.

    out_of_range, position, index: one value per element.
    """
    # The element that exchanges the 0 owns the record until the host clears it: its words stem from one id.
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
    """The same for an id in a bag, or a wrong offset; bag_word, begin and table are words 4 to 6."""
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
