"""Launch settings of the CUDA C++ kernels: one dataclass a kind of kernel, and one with all of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from .._plan.access import cdiv
from .._plan.gradient_method import Methods

# The values that the fields of a launch may have on some device; what is not named is the same on all.
Choices = Mapping[str, tuple[Any, ...]]

# Columns per thread of a kernel that sums: more would cost registers and save nothing.
MAX_SEGMENT_VECTOR = 4
MAX_BLOCKS_Y = 65535

# Blocks and threads, (x, y) each.
Grid = tuple[tuple[int, int], tuple[int, int]]


@dataclass(frozen=True)
class RowsLaunch:
    """gather_rows_kernel: threads across a row, rows side by side in a block, and rows a thread."""

    CHOICES: ClassVar[Choices] = {
        "threads": tuple((across, down) for across in (32, 64, 128) for down in (1, 2, 4, 8, 16)),
        "ROWS": (1, 2, 4, 8),
    }

    threads: tuple[int, int]
    ROWS: int = 4

    def grid(self, num_rows: int, row_words: int) -> Grid:
        across, down = self.threads
        # Threads stride over the columns beyond this many blocks.
        blocks_across = min(cdiv(row_words, across), MAX_BLOCKS_Y)
        return (cdiv(num_rows, down * self.ROWS), blocks_across), self.threads


@dataclass(frozen=True)
class FlatLaunch:
    """A kernel over a flat range, with one word, vector or id a thread: threads a block."""

    CHOICES: ClassVar[Choices] = {"threads": (64, 128, 256, 512)}

    threads: int = 256

    def grid(self, items: int) -> Grid:
        return (cdiv(items, self.threads), 1), (self.threads, 1)


@dataclass(frozen=True)
class UnrolledLaunch:
    """The same with UNROLL items a thread."""

    CHOICES: ClassVar[Choices] = {
        "threads": (64, 128, 256, 512),
        "UNROLL": (1, 2, 4, 8),
    }

    threads: int = 256
    UNROLL: int = 4

    def grid(self, items: int) -> Grid:
        return (cdiv(items, self.threads * self.UNROLL), 1), (self.threads, 1)


@dataclass(frozen=True)
class WalkLaunch:
    """A kernel in which each thread reduces its own chunk or bag, with no shared memory and no __syncthreads.

    threads: per block. UNROLL: loads in flight.
    """

    CHOICES: ClassVar[Choices] = {
        "threads": (64, 128, 256),
        "UNROLL": (2, 4, 8),
    }

    threads: int = 256
    UNROLL: int = 4

    def grid(self, items: int) -> Grid:
        return (cdiv(items, self.threads), 1), (self.threads, 1)


# The settings below keep four loads per thread in flight without spills; they are starting points until they
# are measured.

# By the largest power of two that divides the words of a row; rows of other lengths go to gather_flat, where no
# lane idles, but each thread divides.
GATHER_ROWS: Mapping[int, RowsLaunch] = {
    32: RowsLaunch((32, 8)),
    64: RowsLaunch((64, 4)),
    128: RowsLaunch((128, 2)),
}
WIDEST_ROWS = max(GATHER_ROWS)


@dataclass(frozen=True)
class CupyLaunches:
    """What a device may have of its own: no field changes a result's bits."""

    gather_rows: Mapping[int, RowsLaunch] = field(default_factory=lambda: GATHER_ROWS)
    gather_long_rows: RowsLaunch = RowsLaunch((128, 2))
    gather_flat: UnrolledLaunch = UnrolledLaunch()
    scatter_add: UnrolledLaunch = UnrolledLaunch()
    counts: FlatLaunch = FlatLaunch()
    sort_keys: FlatLaunch = FlatLaunch()
    segment_sum: WalkLaunch = WalkLaunch()
    select_rows: FlatLaunch = FlatLaunch()
    row_update: WalkLaunch = WalkLaunch()
    bag_sum: WalkLaunch = WalkLaunch(threads=128)
    bag_max: WalkLaunch = WalkLaunch(threads=128)
    bag_of: FlatLaunch = FlatLaunch()
    table_bag: WalkLaunch = WalkLaunch(threads=128)
    table_gather: FlatLaunch = FlatLaunch()
    table_keys: FlatLaunch = FlatLaunch()
    table_scatter_add: WalkLaunch = WalkLaunch(threads=128)
    table_segment_sum: WalkLaunch = WalkLaunch()
    table_row_update: WalkLaunch = WalkLaunch()
    take_rows: FlatLaunch = FlatLaunch()
    dequantize_rows: FlatLaunch = FlatLaunch()


@dataclass(frozen=True)
class GatherRule:
    """gather_rows_kernel copies rows that fill its blocks, and those so long that idle lanes do not matter."""

    long_row_words: int = 1024


@dataclass(frozen=True)
class CupyMethods(Methods):
    """Rules of method of this backend."""

    gather: GatherRule = GatherRule()


# The same on every device.
ROWWISE_ADAGRAD = FlatLaunch(threads=64)
RENORM = FlatLaunch(threads=64)
BAG_JOIN = FlatLaunch()
BAG_SAMPLE_WEIGHTS = FlatLaunch(threads=128)
TABLE_COMBINE = FlatLaunch()
TABLE_SAMPLE_WEIGHTS = FlatLaunch(threads=128)
