"""Out-of-range ids: kernels mask them and write a record; the host raises IndexError from it.

On CUDA the record lives on the device and a flag in pinned host memory, so looking for an error is a read
of host memory and never waits for the GPU. Only once the flag is up does the host wait and read the rest.

Modes (`set_bounds_check`, or `GPU_EMBED_BOUNDS_CHECK` in the environment):

* ``"raise"``: IndexError at the first later point that needs no stall: that call's backward, the next
  gpu_embed call on the device, or `check_bounds()`. On the CPU, at once.
* ``"sync"``: IndexError at the offending call; every call on CUDA then waits for the GPU.
* ``"off"``: nothing is recorded. An id out of range still reads as zeros and has no gradient.
"""

import threading
from collections.abc import Callable
from enum import IntEnum
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .bags import Bags
from .forkable_lock import forkable_lock
from .own_thread import on_own_thread
from .settings import BOUNDS_CHECK, Restore

# What stands for the bag in a record of something else than an id.
OFFSET = -1  # of a lookup, by the kernels
BATCH_OFFSET = -2
BATCH_LENGTH = -3


class BagIndexError(IndexError, RuntimeError):
    """An id of a bag is out of range: IndexError as in every lookup, RuntimeError as torch's embedding_bag has it."""


class Word(IntEnum):
    """The words of a record, as kernels write them.

    ==========  =====================================  ==============================================
    word        of an id                               of an offset or a length (BAG is OFFSET, ...)
    ==========  =====================================  ==============================================
    CLAIMED     0 or 1                                 the same
    POSITION    in the flattened ids                   its place, from FIRST on where there are tables
    VALUE       the id                                 the offset or length
    LIMIT       rows of the table, negated where ids   the largest that it may be
                count from the end, too
    BAG         from 1 on; 0: it is in no bag          OFFSET, BATCH_OFFSET or BATCH_LENGTH
    FIRST       the bag's first position               the feature's first place
    NAME        the table's `table_name_id`; 0: there  the feature's; 0: there is one table
                is one table
    ==========  =====================================  ==============================================
    """

    CLAIMED = 0
    POSITION = 1
    VALUE = 2
    LIMIT = 3
    BAG = 4
    FIRST = 5
    NAME = 6


class BoundsRecord:
    """One device's record of the first id out of range since the last error.

    Attributes:
        words: int64 [7] on the device, as `Word` names them.
        flag: int32 [1] in host memory (pinned for CUDA): 1 once `words` is claimed.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.on_cuda = device.type == "cuda"
        # Whatever mode the first lookup runs in, every later one must be able to write here.
        with torch.inference_mode(False):
            self.words = torch.zeros(len(Word), dtype=torch.int64, device=device)
            self.flag = torch.zeros(1, dtype=torch.int32, device="cpu", pin_memory=self.on_cuda)
        # The same memory: a view of bytes reads in 20 ns where Tensor.item() takes microseconds.
        self.flag_view = self.flag.numpy().data
        self._lock = threading.Lock()
        # Once a device: the next kernel may run on another stream than the one that zeroed the words.
        self._wait()

    def write(self, indices: Tensor, num_embeddings: int) -> None:
        """Record the first of these ids that is out of range, with torch's operators.

        For lookups that no kernel of ours serves. Never waits for the GPU.

        Args:
            num_embeddings: the table's rows; negated where ids also count from the end.
        """
        if indices.numel() == 0:
            return
        flat = indices.reshape(-1).to(torch.int64)
        rows = torch.full_like(flat, num_embeddings)
        self.write_places(flat, ~in_table(flat, abs(num_embeddings)), rows[None])

    def write_bags(self, bags: Bags, num_embeddings: int) -> None:
        """`write` for the ids that are in a bag."""
        flat = bags.indices.to(torch.int64)
        bag = bags.bag_of()
        begin, _ = bags.ends()
        self.write_places(
            flat,
            ~in_table(flat, num_embeddings) & (bag >= 0),
            torch.stack([torch.full_like(flat, num_embeddings), bag + 1, begin[bag.clamp(min=0)]]),
        )

    def write_places(self, flat: Tensor, out_of_range: Tensor, words: Tensor) -> None:
        """Record the first of these ids [N] that is out of range; words: int64 [*, N], from `Word.LIMIT` on."""
        places = torch.arange(flat.numel(), device=self.device)
        position = torch.where(out_of_range, places, flat.numel() - 1).min()
        found = torch.zeros_like(self.words)
        found[Word.CLAIMED] = 1
        found[Word.POSITION] = position
        # Not flat[position], which would wait for the GPU.
        found[Word.VALUE] = flat.gather(0, position.view(1))[0]
        found[Word.LIMIT : Word.LIMIT + len(words)] = words.index_select(1, position.view(1))[:, 0]
        self.words.copy_(
            torch.where(out_of_range.any() & (self.words[Word.CLAIMED] == 0), found, self.words)
        )
        self.flag.copy_(self.words[:1], non_blocking=True)

    def write_numbers(
        self, kind: int, names: list[int], given: Tensor, within: Tensor, limits: Tensor
    ) -> None:
        """Record the first offset or length that had to be changed.

        Args:
            kind: BATCH_OFFSET or BATCH_LENGTH.
            names: the `table_name_id` of each feature.
            given, within: int64 [F, *]: each feature's numbers as they came, and as they are used.
            limits: int64 [F, *]: the largest that each may be.
        """
        feature = [torch.full_like(row, row.numel() * f) for f, row in enumerate(given)]
        name = [torch.full_like(row, one) for one, row in zip(names, given, strict=True)]
        words = (limits, torch.full_like(given, kind), torch.stack(feature), torch.stack(name))
        self.write_places(
            given.flatten(), (given != within).flatten(), torch.stack(words).flatten(1)
        )

    def finish_lookup(self, indices: Tensor) -> None:
        """Report a lookup's own ids before it returns: always on the CPU, in mode "sync" on CUDA."""
        if self.on_cuda:
            if BOUNDS_CHECK.value != "sync" or torch.cuda.is_current_stream_capturing():
                return
            torch.cuda.current_stream(self.device).synchronize()
        if self.flag_view[0]:
            self.raise_if_claimed(indices.shape)

    def ready(self) -> "BoundsRecord":
        """This record, once what an earlier call wrote to it has been raised; never waits."""
        if self.flag_view[0]:
            self.raise_if_claimed()
        return self

    def raise_if_claimed(self, shape: torch.Size | None = None) -> None:
        """Raise IndexError if an id out of range was recorded, and clear the record.

        Args:
            shape: the ids' shape where the caller knows which call is at fault.
        """
        if not self.flag_view[0]:
            return
        if self.on_cuda and torch.cuda.is_current_stream_capturing():
            return  # The record cannot be read during capture; the next call reports it.
        with self._lock:
            if not self.flag_view[0]:
                return
            self._wait()
            words = self.words.tolist()
            # In this order: while the words are claimed, no kernel can raise the flag in between.
            self.flag_view[0] = 0
            self.words[1:].zero_()
            # Last: a kernel on another stream may claim the record from here on, and write the other words.
            self.words[:1].zero_()
            self._wait()
        position, index, num_embeddings = words[Word.POSITION : Word.BAG]
        bag, begin, name = words[Word.BAG :]
        table = list(_table_ids)[name - 1] if name else None
        if bag == OFFSET:
            raise offset_error(index, position, num_embeddings)
        if bag == BATCH_OFFSET:
            raise offset_error(index, position - begin, num_embeddings, table)
        if bag == BATCH_LENGTH:
            raise length_error(index, position - begin, num_embeddings, table)
        if bag:
            raise bag_error(index, position, num_embeddings, bag - 1, position - begin, table)
        raise out_of_range_error(index, position, num_embeddings, shape)

    def _wait(self) -> None:
        if self.on_cuda:
            torch.cuda.synchronize(self.device)


def in_table(ids: Tensor, num_embeddings: int) -> Tensor:
    """Which ids name a row; for ids of 32 or 64 bits, as a narrower dtype would wrap num_embeddings."""
    return (ids >= 0) & (ids < num_embeddings)


def all_in_table(ids: Tensor, num_embeddings: int) -> bool:
    """Whether each of one or more ids names a row; the host waits for the answer."""
    smallest, largest = ids.aminmax()
    return int(smallest) >= 0 and int(largest) < num_embeddings


def out_of_range_error(
    index: int, position: int, num_embeddings: int, shape: torch.Size | None = None
) -> IndexError:
    """The error for one id out of range, torch's wording first; the arguments as in a record."""
    where = f"flat position {position}"
    if shape is not None and len(shape) > 1:
        where = f"position {tuple(int(place) for place in np.unravel_index(position, shape))}"
    return IndexError(
        f"index out of range in self: id {index} at {where} of the input; "
        f"{_rule(num_embeddings) if num_embeddings >= 0 else _wrapped_rule(-num_embeddings, index)}"
    )


def bag_error(
    index: int, position: int, num_embeddings: int, bag: int, place: int, table: str | None = None
) -> BagIndexError:
    """The error for one id out of range in a bag, torch's wording first.

    Args:
        place: the id's place in the bag, from 0 on.
        table: what the bag's table or feature is called, where there are several.
    """
    of_table = "" if table is None else f" of {table}"
    return BagIndexError(
        "embedding_bag: Expected idx >= 0 && idx < num_embeddings but found idx to be "
        f"{index}, at position {place} of bag {bag}{of_table} (flat position {position} of the input); "
        f"{_rule(num_embeddings)}"
    )


def offset_error(
    offset: int, place: int, num_indices: int, table: str | None = None
) -> BagIndexError:
    """The error for an offset that does not cut the ids into bags; `table` as in `bag_error`."""
    where = "embedding_bag" if table is None else f"batch_bags: {table}"
    return BagIndexError(
        f"{where}: offsets[{place}] is {offset}; offsets begin at 0, do not decrease, and do not "
        f"exceed the input's length {num_indices}. Ids that are then in no bag were left out."
    )


def length_error(length: int, place: int, row_length: int, table: str | None) -> BagIndexError:
    """The error for a length that a row of padded ids does not have."""
    return BagIndexError(
        f"batch_padded: {table}: lengths[{place}] is {length}, but a row has {row_length} ids, so lengths go from 0 to "
        f"{row_length}. It was read as the nearest of these."
    )


def _rule(num_embeddings: int) -> str:
    rows = (
        f"the table has {num_embeddings} rows, so ids go from 0 to {num_embeddings - 1}"
        if num_embeddings
        else "the table has 0 rows"
    )
    return f"{rows}. The table and the ids are unchanged."


def _wrapped_rule(num_embeddings: int, index: int) -> str:
    """The rule where -1 is the last row, and ids may be floats."""
    int64 = np.iinfo(np.int64)
    no_integer = " NaN, and what int64 does not hold, is read as this id."
    return (
        f"the table has {num_embeddings} rows, so ids go from {-num_embeddings} to {num_embeddings - 1}, where "
        f"negative ones count from the end.{no_integer if index in (int64.min, int64.max) else ''} "
        "The table and the ids are unchanged."
    )


def table_name_id(name: str) -> int:
    """A number, the same for the life of the process, by which a kernel names a table or feature; never 0."""
    with _creation_lock:
        return _table_ids.setdefault(name, len(_table_ids) + 1)


def set_bounds_check(mode: str) -> Restore:
    """Set what happens when an id is out of range: ``"raise"`` (default), ``"sync"`` or ``"off"``.

    A plain call sets the mode for the process; in a `with` statement it holds until the block ends.
    Raises ValueError for any other mode.

    Example::

        gpu_embed.set_bounds_check("sync")  # from here on
        with gpu_embed.set_bounds_check("off"):  # inside the block
            ...
    """
    return BOUNDS_CHECK.set(mode, "set_bounds_check")


def check_bounds(device: torch.device | str | int | None = None) -> None:
    """Wait for the GPU and raise IndexError if any lookup so far met an id out of range.

    Args:
        device: the CUDA device to check; None: every device that was used.

    The place for this call is where a program waits anyway: before a checkpoint, after the last step.
    """
    if not _cuda_records:
        return
    if device is None:
        records = list(_cuda_records.values())
    else:
        device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        record = _cuda_records.get(_cuda_index(device)) if device.type == "cuda" else None
        records = [] if record is None else [record]
    for record in records:
        torch.cuda.synchronize(record.device)
        record.raise_if_claimed()


def raise_pending(device: torch.device) -> None:
    """Raise IndexError if an earlier call on this CUDA device met an id out of range; never waits."""
    if _cuda_records and device.type == "cuda":
        record = _cuda_records.get(_cuda_index(device))
        if record is not None:
            record.ready()


def looked_up(
    device: torch.device, indices: Tensor, compute: Callable[[BoundsRecord | None], Any]
) -> Any:
    """What `compute` makes of a record, which it writes ids out of range to: None in mode "off".

    An earlier call's error is raised before, and this one's after it, both where that needs no stall.
    """
    if BOUNDS_CHECK.value == "off":
        raise_pending(device)
        return compute(None)
    if device.type == "cuda":
        record = _cuda_record(_cuda_index(device)).ready()
    else:
        record = getattr(_cpu_records, "record", None) or _cpu_record()
    output = compute(record)
    if record.on_cuda or record.flag_view[0]:
        record.finish_lookup(indices)
    return output


def record_for(device: torch.device) -> BoundsRecord | None:
    """The record that a lookup on this device writes to; None in mode "off"."""
    if BOUNDS_CHECK.value == "off":
        return None
    return _cpu_record() if device.type != "cuda" else _cuda_record(_cuda_index(device))


def prepare(device: torch.device) -> None:
    """Make the record of a CUDA device while a lookup is traced, as its first run may be a graph's warm-up."""
    # Fake tensors alone must not start CUDA, nor can they in a forked process, and their device may not exist.
    if device.type != "cuda" or BOUNDS_CHECK.value == "off" or not torch.cuda.is_initialized():
        return
    index = _cuda_index(device)
    if index in _cuda_records or index >= torch.cuda.device_count():
        return
    if not torch.cuda.is_current_stream_capturing():
        _cuda_record(index)


def record_source(device: torch.device) -> Callable[[], BoundsRecord | None]:
    """`raise_pending` and `record_for` in one, for a device and the mode that is in force."""
    if BOUNDS_CHECK.value == "off":
        return partial(raise_pending, device)
    return _cpu_record if device.type != "cuda" else _cuda_record(_cuda_index(device)).ready


def _cpu_record() -> BoundsRecord:
    # One a thread, so that no thread raises another's error.
    try:
        record: BoundsRecord = _cpu_records.record
    except AttributeError:
        record = _cpu_records.record = BoundsRecord(torch.device("cpu"))
    return record


def _cuda_record(index: int) -> BoundsRecord:
    if index not in _cuda_records:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "gpu_embed: the first lookup on a device allocates the record of out-of-range ids, "
                "which a CUDA graph cannot capture; run the code once before capturing it"
            )
        with _creation_lock:
            if index not in _cuda_records:
                # It outlives every call, so no CUDA graph may have it in its pool.
                _cuda_records[index] = on_own_thread(BoundsRecord, torch.device("cuda", index))
    return _cuda_records[index]


def _cuda_index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


_cuda_records: dict[int, BoundsRecord] = {}
_cpu_records = threading.local()
_table_ids: dict[str, int] = {}
_creation_lock = forkable_lock()


def record_arguments(record: BoundsRecord | None) -> tuple[Tensor | None, Tensor | None]:
    """What every kernel that looks rows up is passed of a record."""
    return (None, None) if record is None else (record.words, record.flag)
