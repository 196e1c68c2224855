"""Launch settings of the CUDA C++ kernels: one dataclass a kind of kernel, one table a kernel."""

from dataclasses import dataclass

from .._plan.access import cdiv

# Columns per thread of a kernel that sums: more would cost registers and save nothing.
MAX_SEGMENT_VECTOR = 4
MAX_BLOCKS_Y = 65535

# Blocks and threads, (x, y) each.
Grid = tuple[tuple[int, int], tuple[int, int]]


@dataclass(frozen=True)
class RowsLaunch:
    """gather_rows_kernel: threads across a row, rows side by side in a block, and rows a thread."""

    threads: tuple[int, int]
    ROWS: int = 4

    def grid(self, num_rows: int, row_words: int) -> Grid:
        across, down = self.threads
        # Threads stride over the columns beyond this many blocks.
        blocks_across = min(cdiv(row_words, across), MAX_BLOCKS_Y)
        return (cdiv(num_rows, down * self.ROWS), blocks_across), self.threads


@dataclass(frozen=True)
class FlatLaunch:
    """A kernel over a flat range: threads a block, and words, vectors or ids a thread."""

    threads: int = 256
    UNROLL: int = 1

    def grid(self, items: int) -> Grid:
        return (cdiv(items, self.threads * self.UNROLL), 1), (self.threads, 1)


@dataclass(frozen=True)
class WalkLaunch:
    """A kernel in which each thread reduces its own chunk or bag, with no shared memory and no __syncthreads.

    threads: per block. UNROLL: loads in flight.
    """

    threads: int = 256
    UNROLL: int = 4

    def grid(self, items: int) -> Grid:
        return (cdiv(items, self.threads), 1), (self.threads, 1)


# The settings below keep four loads per thread in flight without spills; they are starting points until they
# are measured.

# By the largest power of two that divides the words of a row; rows of other lengths go to GATHER_FLAT, where no
# lane idles, but each thread divides.
GATHER_ROWS = {
    32: RowsLaunch((32, 8)),
    64: RowsLaunch((64, 4)),
    128: RowsLaunch((128, 2)),
}
GATHER_FLAT = FlatLaunch(UNROLL=4)
# Rows so long that the idle lanes at their end do not matter.
LONG_ROW_WORDS = 1024
LONG_ROW = RowsLaunch((128, 2))
SCATTER_ADD = FlatLaunch(UNROLL=4)
SEGMENT_SUM = WalkLaunch()
BAG = WalkLaunch(threads=128)
SORT_KEYS = FlatLaunch()
COUNTS = FlatLaunch()
SELECT_ROWS = FlatLaunch()
ROWWISE_ADAGRAD = FlatLaunch(threads=64)
RENORM = FlatLaunch(threads=64)
BAG_JOIN = FlatLaunch()
BAG_OF = FlatLaunch()
BAG_SAMPLE_WEIGHTS = FlatLaunch(threads=128)
TABLE_BAG = WalkLaunch(threads=128)
TABLE_COMBINE = FlatLaunch()
TABLE_GATHER = FlatLaunch()
TABLE_KEYS = FlatLaunch()
TABLE_SAMPLE_WEIGHTS = FlatLaunch(threads=128)
TAKE_ROWS = FlatLaunch()
DEQUANTIZE_ROWS = FlatLaunch()
