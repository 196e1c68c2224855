"""Memory that a kernel may touch: the ranges of its tensors, and its blocks' shared memory.

An access is checked before it is made: it lies in one tensor, it is aligned to its own size, and what it reads was
written. What nobody has written is full of garbage, so that a result which depends on it is seen.
"""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .formats import Array, unsigned

GARBAGE = 0xA5


class FaultError(Exception):
    """An access that a card would not have survived, or whose result it would not have known."""


@dataclass(frozen=True)
class Region:
    """A range of this process's memory, by the name of the pointer that the kernel has for it."""

    name: str
    address: int
    num_bytes: int
    # bool, a byte each: what may be read, for it was written; it is kept up to date. None: all of it.
    written: Array | None = None


class Space(ABC):
    """Bytes with addresses."""

    data: Array  # uint8

    @abstractmethod
    def offsets(self, addresses: Array, blocks: Array, num_bytes: int, reads: bool) -> Array:
        """Where each access begins in `data`.

        Args:
            addresses: int64 [lanes].
            blocks: the block of each lane.
            num_bytes: that each lane moves.
            reads: whether what lies there is read; else it is overwritten.

        Raises:
            FaultError: an address out of range, misaligned, or not written.
        """

    def words(self, itemsize: int) -> Array:
        """`data` as unsigned numbers of this many bytes."""
        return self.data.view(unsigned(itemsize))


class GlobalMemory(Space):
    """Tensors on the CPU as the one address space of a card."""

    def __init__(self, regions: Sequence[Region]) -> None:
        self.regions = sorted((r for r in regions if r.num_bytes), key=lambda r: r.address)
        ends: list[int] = []
        starts: list[int] = []
        for region in self.regions:
            end = region.address + region.num_bytes
            if ends and region.address < ends[-1]:
                ends[-1] = max(ends[-1], end)
            else:
                starts.append(region.address)
                ends.append(end)
        self._starts, self._ends = np.array(starts, np.int64), np.array(ends, np.int64)
        # Only what lies in a region is ever touched.
        self._base = starts[0] & ~15 if starts else 0
        size = (ends[-1] - self._base + 15) & ~15 if ends else 0
        self.data = np.frombuffer(
            memoryview((ctypes.c_uint8 * size).from_address(self._base)), np.uint8
        )
        # Of this launch, by the number of the range: which bytes were written, and which a load took for constant.
        self._changed: dict[int, Array] = {}
        self._constant: dict[int, Array] = {}

    def note(self, addresses: Array, num_bytes: int, constant: bool) -> None:
        """An access that `offsets` has checked: a load that takes what it reads for constant, or a write.

        Raises:
            FaultError: both in one launch. A card may have kept a copy from before.
        """
        noted, other = self._constant, self._changed
        if not constant:
            noted, other = other, noted
        within = np.searchsorted(self._starts, addresses, "right") - 1
        for number in np.unique(within):
            here = addresses[within == number]
            start, end = self._starts[number], self._ends[number]
            bytes_of = (here - start)[:, None] + np.arange(num_bytes)  # [lanes, bytes]
            if number in other and (both := other[number][bytes_of].any(1)).any():
                what = "was written by this launch, and" if constant else "is written, and"
                self._fail(here[both], num_bytes, f"{what} read as constant")
            if number not in noted:
                noted[number] = np.zeros(end - start, bool)
            noted[number][bytes_of] = True

    def offsets(self, addresses: Array, blocks: Array, num_bytes: int, reads: bool) -> Array:
        if not len(self._starts):
            raise FaultError(f"address {int(addresses[0]):#x}: the kernel has no tensors")
        nearest = np.searchsorted(self._starts, addresses, "right") - 1
        outside = (nearest < 0) | (addresses + num_bytes > self._ends[nearest])
        if outside.any():
            self._fail(addresses[outside], num_bytes, "is out of range")
        misaligned = addresses % num_bytes != 0
        if misaligned.any():
            self._fail(addresses[misaligned], num_bytes, "is misaligned")
        for region in self.regions:
            if region.written is None:
                continue
            within = addresses - region.address
            within = within[(within >= 0) & (within < region.num_bytes)]
            bytes_of = within[:, None] + np.arange(num_bytes)  # [lanes, bytes]
            if reads and not (known := region.written[bytes_of].all(1)).all():
                bad = within[~known] + region.address
                self._fail(bad, num_bytes, "was read before it was written")
            region.written[bytes_of] = True
        return addresses - self._base

    def _fail(self, addresses: Array, num_bytes: int, what: str) -> None:
        first = int(addresses[0])
        near = min(
            self.regions,
            key=lambda r: max(r.address - first, first + num_bytes - r.address - r.num_bytes),
        )
        where = f"{near.name} of {near.num_bytes} bytes, at {first - near.address}"
        raise FaultError(
            f"address {first:#x} ({where}) of {num_bytes} bytes {what}, in {len(addresses)} lanes"
        )


class SharedMemory(Space):
    """Each block's own bytes, from address 0 on."""

    def __init__(self, num_blocks: int, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self._stride = max(16, (num_bytes + 15) & ~15)
        self.data = np.full(num_blocks * self._stride, GARBAGE, np.uint8)
        self._written = np.zeros(len(self.data), bool)

    def offsets(self, addresses: Array, blocks: Array, num_bytes: int, reads: bool) -> Array:
        outside = (addresses < 0) | (addresses + num_bytes > self.num_bytes)
        for bad, what in (
            (outside, "is out of range"),
            (addresses % num_bytes != 0, "is misaligned"),
        ):
            if bad.any():
                self._fail(addresses[bad], num_bytes, what)
        offsets = addresses + blocks * self._stride
        for byte in range(num_bytes):
            written = self._written[offsets + byte]
            if reads and not written.all():
                self._fail(addresses[~written], num_bytes, "was read before it was written")
            self._written[offsets + byte] = True
        return offsets

    def _fail(self, addresses: Array, num_bytes: int, what: str) -> None:
        raise FaultError(
            f"address {int(addresses[0])} of {self.num_bytes} shared bytes, {num_bytes} bytes, "
            f"{what}, in {len(addresses)} lanes"
        )
