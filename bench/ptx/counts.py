"""Counts what each launch moves and executes; a launch that nobody counts pays nothing.

    with counting() as launches:
        embedding(ids, weight)  # whatever a PtxBackend serves, or Program.run
    for launch in launches:
        print(launch.kernel, launch.loads.sectors, launch.stores.sectors, launch.instructions)
    print(longest_path(launches))

A request is one access to memory that a warp executes for at least one of its lanes. The instructions are PTX's, also
where the predicate holds for no lane. Left out is what ptxas folds into other instructions: loads of parameters, and
moves of constants.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod

import numpy as np

from .formats import Array
from .parse import Instruction, Kernel, inner
from .warp import WARP

SECTOR_BYTES = 32
# Shared memory: what one wavefront moves, a word from each bank.
WORD_BYTES, BANKS = 4, 32
KINDS = ("load", "store", "atomic")


@dataclass(frozen=True)
class Accesses:
    """To global memory, of one kind."""

    requests: int
    sectors: int  # different ones of each request, summed over the requests
    distinct_sectors: int  # different ones of the whole launch


@dataclass(frozen=True)
class LaunchCounts:
    """What one launch has done."""

    kernel: str
    grid: tuple[int, ...]
    num_warps: int  # of the whole grid
    loads: Accesses
    stores: Accesses
    atomics: Accesses
    # Atomic operations on the sector that has most of them: one for each request, and one more for each further lane
    # of it at the same address.
    hottest_sector: int
    shared_requests: int
    # A request takes as many as the fullest bank has different words; lanes of 8 and 16 bytes go in groups of 128.
    shared_wavefronts: int
    barriers: int  # waits of a warp for its block
    instructions: int  # of all warps
    longest_warp: int  # instructions of the warp that executes most
    basic_blocks: int  # that warps have executed
    divergent_blocks: int  # of these, with less than a whole warp


@contextmanager
def counting() -> Iterator[list[LaunchCounts]]:
    """Counts the launches of the block, in their order."""
    launches: list[LaunchCounts] = []
    _listeners.append(launches)
    try:
        yield launches
    finally:
        _listeners.pop()


_listeners: list[list[LaunchCounts]] = []


def longest_path(launches: Sequence[LaunchCounts]) -> int:
    """Instructions one after another, where each launch waits for the one before."""
    return sum(launch.longest_warp for launch in launches)


class Counter:
    """Adds up one launch while it runs."""

    def __init__(self, kernel: Kernel, grid: tuple[int, ...], threads: int) -> None:
        self._kernel, self._grid, self._threads = kernel, grid, threads
        self._warps_of_block = -(-threads // WARP)
        self._instructions = np.zeros(prod(grid) * self._warps_of_block, np.int64)
        self._requests = dict.fromkeys(KINDS, 0)
        # Of each access: sectors, each once a request; and atomic operations on them.
        self._sectors: dict[str, list[Array]] = {kind: [] for kind in KINDS}
        self._operations: list[Array] = []
        self._shared_requests = self._shared_wavefronts = 0
        self._barriers = self._basic_blocks = self._divergent_blocks = 0

    def basic_block(self, warps: Array, instructions: Sequence[Instruction], waits: bool) -> None:
        """Lanes of these warps execute it: one entry a lane, in order.

        Args:
            waits: whether it ends with a barrier.
        """
        numbers, lanes = np.unique(warps, return_counts=True)
        self._instructions[numbers] += sum(not is_folded(i, self._kernel) for i in instructions)
        self._basic_blocks += len(numbers)
        # The last warp of a block may have fewer threads.
        last = numbers % self._warps_of_block == self._warps_of_block - 1
        whole = np.where(last, self._threads - WARP * (self._warps_of_block - 1), WARP)
        self._divergent_blocks += int((lanes < whole).sum())
        self._barriers += len(numbers) if waits else 0

    def access(self, space: str, kind: str, lanes: Array, addresses: Array, num_bytes: int) -> None:
        """One instruction of some lanes, each with this many bytes, aligned to their size.

        Args:
            space: "global" or "shared".
            kind: of KINDS.
            lanes: numbers in the launch, by which 32 neighbours are a warp.
        """
        warps = lanes // WARP
        if space == "shared":
            self._shared_requests += len(np.unique(warps))
            self._shared_wavefronts += wavefronts(lanes, addresses, num_bytes)
            return
        self._requests[kind] += len(np.unique(warps))
        words, word_of = np.unique(addresses, return_inverse=True)
        pairs, meeting = np.unique(warps * len(words) + word_of, return_counts=True)
        sectors = words[pairs % len(words)] // SECTOR_BYTES
        # Of one request neighbours in this order: a sector's addresses.
        request = pairs // len(words)
        first = np.flatnonzero(np.r_[True, (np.diff(request) != 0) | (np.diff(sectors) != 0)])
        self._sectors[kind].append(sectors[first])
        if kind == "atomic":
            self._operations.append(np.maximum.reduceat(meeting, first))

    def finish(self) -> LaunchCounts:
        none = np.empty(0, np.int64)
        of = {kind: np.concatenate([none, *self._sectors[kind]]) for kind in KINDS}
        loads, stores, atomics = (
            Accesses(self._requests[kind], len(of[kind]), len(np.unique(of[kind])))
            for kind in KINDS
        )
        hottest = 0
        if atomics.sectors:
            _, numbers = np.unique(of["atomic"], return_inverse=True)
            hottest = int(np.bincount(numbers, np.concatenate(self._operations)).max())
        return LaunchCounts(
            self._kernel.name,
            self._grid,
            len(self._instructions),
            loads,
            stores,
            atomics,
            hottest,
            self._shared_requests,
            self._shared_wavefronts,
            self._barriers,
            int(self._instructions.sum()),
            int(self._instructions.max(initial=0)),
            self._basic_blocks,
            self._divergent_blocks,
        )


def start(kernel: Kernel, grid: tuple[int, ...], threads: int) -> Counter | None:
    """A counter where somebody counts."""
    return Counter(kernel, grid, threads) if _listeners else None


def finish(counter: Counter) -> None:
    """Tell those who count."""
    counted = counter.finish()
    for launches in _listeners:
        launches.append(counted)


def is_folded(instruction: Instruction, kernel: Kernel) -> bool:
    """Whether ptxas makes it an operand of another one."""
    if instruction.operation == "ld":
        return "param" in instruction.parts
    if instruction.operation != "mov":
        return False
    sources = inner(instruction.operands[1])
    return not any(name[0] == "%" or name in kernel.register_types for name in sources)


def wavefronts(lanes: Array, addresses: Array, num_bytes: int) -> int:
    """Of one access to shared memory."""
    at_once = min(WARP, BANKS * WORD_BYTES // num_bytes)
    groups = lanes // at_once
    steps = np.arange(-(-num_bytes // WORD_BYTES))
    words = (addresses // WORD_BYTES)[:, None] + steps
    # Each word of a group once.
    span = int(words.max()) + 1
    pairs = np.unique(groups[:, None] * span + words)
    banks, taken = np.unique(pairs // span * BANKS + pairs % span % BANKS, return_counts=True)
    first = np.flatnonzero(np.r_[True, np.diff(banks // BANKS) != 0])
    return int(np.maximum.reduceat(taken, first).sum())
