"""Launch settings of the Triton kernels: one dataclass a kind of kernel, one table a kernel."""

from dataclasses import dataclass, fields
from functools import cache, cached_property


@dataclass(frozen=True)
class Launch:
    """Settings of one kernel launch."""

    @cached_property
    def settings(self) -> dict[str, int]:
        """The fields by name; kept, since making the dict costs more than the rest of the launch code."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class RowsLaunch(Launch):
    """gather_rows_kernel: a tile of BLOCK_N rows by BLOCK_D words."""

    BLOCK_N: int
    BLOCK_D: int
    num_warps: int = 4


@dataclass(frozen=True)
class FlatLaunch(Launch):
    """A kernel over a flat range: BLOCK vectors, ids or keys a program."""

    BLOCK: int
    num_warps: int = 4


@dataclass(frozen=True)
class SegmentLaunch(Launch):
    """segment_sum_kernel: BLOCK_C chunks by BLOCK_D columns.

    One warp a program: it needs no barrier, and every lane loads 16 bytes of a row.
    """

    BLOCK_C: int
    BLOCK_D: int
    UNROLL: int = 4
    num_warps: int = 1


@dataclass(frozen=True)
class BagLaunch(Launch):
    """bag_sum_kernel and bag_max_kernel: BLOCK_B bags by BLOCK_D columns; one warp, as for segment_sum_kernel."""

    BLOCK_B: int
    BLOCK_D: int
    BLOCK_L: int
    UNROLL: int = 4
    num_warps: int = 1


@dataclass(frozen=True)
class TableLaunch(Launch):
    """table_bag_kernel and table_scatter_add_kernel: BLOCK vectors of their tables' columns, one a lane."""

    BLOCK: int = 32
    UNROLL: int = 4
    num_warps: int = 1


@dataclass(frozen=True)
class CombineLaunch(Launch):
    """bag_join_kernel and table_combine_kernel: BLOCK_S parts or splits by BLOCK elements."""

    BLOCK_S: int
    BLOCK: int
    num_warps: int = 4


# The settings below follow from the code that they compile to (16-byte accesses, no spills, four loads in
# flight a thread); they are starting points until they are measured.

# Rows of a power of two of words, by words a row: 8 KiB a program.
GATHER_ROWS = {
    1: RowsLaunch(512, 1),  # 1024 spills
    2: RowsLaunch(512, 2),
    4: RowsLaunch(256, 4),
    8: RowsLaunch(128, 8),
    16: RowsLaunch(64, 16),
    32: RowsLaunch(32, 32),
    64: RowsLaunch(16, 64),
    128: RowsLaunch(8, 128),
    256: RowsLaunch(4, 256),
    512: RowsLaunch(2, 512),
}
GATHER_FLAT = FlatLaunch(512)
SCATTER_ADD = FlatLaunch(256)
COUNTS = FlatLaunch(256)
SORT_KEYS = FlatLaunch(256)
RENORM_ITEMS = 1024
SELECT_ROWS = FlatLaunch(256)
# Largest accumulated row kept in registers, in bytes, and register bytes a thread; longer rows take two launches.
MAX_HELD_ROW = 16384
HELD_BYTES = 32
ROWWISE_BLOCK = 1024
BAG_OF = FlatLaunch(512)
BAG_JOIN = CombineLaunch(BLOCK_S=32, BLOCK=32)
BAG_SAMPLE_WEIGHTS_VECTORS = 512
TABLE_BAG = TableLaunch()
TABLE_COMBINE = CombineLaunch(BLOCK_S=32, BLOCK=32)
TABLE_GATHER = FlatLaunch(128, num_warps=1)
TABLE_KEYS = FlatLaunch(256)
TAKE_ROWS = FlatLaunch(256)
DEQUANTIZE_ROWS = FlatLaunch(256)


@cache
def segment_launch(embedding_dim: int, vec: int) -> SegmentLaunch:
    """One warp wide, `vec` columns a lane; narrow rows put several chunks side by side."""
    columns = 32 * vec
    block_d = min(next_power_of_2(embedding_dim), columns)
    return SegmentLaunch(BLOCK_C=columns // block_d, BLOCK_D=block_d)


@cache
def update_launch(embedding_dim: int, vec: int, held_bytes: int) -> SegmentLaunch:
    """`segment_launch`; wide enough for a whole row of that many bytes a column, unless they are 0."""
    launch = segment_launch(embedding_dim, vec)
    if held_bytes == 0 or embedding_dim <= launch.BLOCK_D:
        return launch
    block_d = next_power_of_2(embedding_dim)
    num_warps = max(block_d * held_bytes // (32 * HELD_BYTES), 1)
    return SegmentLaunch(BLOCK_C=1, BLOCK_D=block_d, UNROLL=2, num_warps=num_warps)


@cache
def bag_launch(embedding_dim: int, vec: int) -> BagLaunch:
    """One warp wide, `vec` columns a lane; narrow rows put several bags side by side."""
    columns = 32 * vec
    block_d = min(next_power_of_2(embedding_dim), columns)
    block_b = columns // block_d
    return BagLaunch(BLOCK_B=block_b, BLOCK_D=block_d, BLOCK_L=32 // block_b)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()
