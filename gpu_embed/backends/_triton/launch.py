"""Launch settings of the Triton kernels: one dataclass a kind of kernel, and one with all of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache, cached_property
from math import lcm
from typing import Any, ClassVar

from .._plan.access import VECTOR_BYTES
from .._plan.gradient_method import Methods

# The values that the fields of a launch may have on some device; what is not named is the same on all.
Choices = Mapping[str, tuple[Any, ...]]


@dataclass(frozen=True)
class Launch:
    """Settings of one kernel launch."""

    CHOICES: ClassVar[Choices] = {}

    @cached_property
    def settings(self) -> dict[str, int]:
        """The fields by name; kept, since making the dict costs more than the rest of the launch code."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class RowsLaunch(Launch):
    """gather_rows_kernel: BLOCK_N rows of BLOCK_D words."""

    CHOICES: ClassVar[Choices] = {
        "BLOCK_N": (1, 2, 4, 8),
        "num_warps": (1, 2, 4, 8),
    }

    BLOCK_N: int
    BLOCK_D: int
    num_warps: int = 1


@dataclass(frozen=True)
class ChunkLaunch(Launch):
    """A kernel over a flattened [N, D]: BLOCK vectors a program, and one warp, whose lanes share out the ids.

    `chunk_launch` takes some off, so that a program has whole rows.
    """

    CHOICES: ClassVar[Choices] = {"BLOCK": (64, 128, 256, 512, 1024, 2048)}

    BLOCK: int
    num_warps: int = 1


@dataclass(frozen=True)
class FlatLaunch(Launch):
    """A kernel over a flat range: BLOCK vectors, ids or keys a program."""

    CHOICES: ClassVar[Choices] = {
        "BLOCK": (64, 128, 256, 512, 1024, 2048),
        "num_warps": (1, 2, 4, 8),
    }

    BLOCK: int
    num_warps: int = 4


@dataclass(frozen=True, eq=False)  # Compared by identity, so that it is a key that costs no call.
class Walk:
    """A kernel whose tile rows each walk a chunk or a bag; `segment_launch` and `bag_launch` cut the tile.

    One warp a program needs no barrier, and every lane loads 16 bytes of a row.
    """

    CHOICES: ClassVar[Choices] = {
        "rows": (1, 2, 4),
        "UNROLL": (2, 4, 8),
        "num_warps": (1, 2, 4),
    }

    rows: int = 1  # tile rows where one is as wide as a warp; narrow ones have more
    UNROLL: int = 4
    num_warps: int = 1


@dataclass(frozen=True)
class SegmentLaunch(Launch):
    """segment_sum_kernel and the row updates: BLOCK_C chunks by BLOCK_D columns."""

    BLOCK_C: int
    BLOCK_D: int
    UNROLL: int = 4
    num_warps: int = 1


@dataclass(frozen=True)
class BagLaunch(Launch):
    """bag_sum_kernel and bag_max_kernel: BLOCK_B bags by BLOCK_D columns, BLOCK_L ids of each counted at once."""

    BLOCK_B: int
    BLOCK_D: int
    BLOCK_L: int
    UNROLL: int = 4
    num_warps: int = 1


@dataclass(frozen=True)
class TableLaunch(Launch):
    """table_bag_kernel and table_scatter_add_kernel: BLOCK vectors of their tables' columns, one a lane."""

    CHOICES: ClassVar[Choices] = {
        "BLOCK": (32, 64, 128),
        "UNROLL": (2, 4, 8),
        "num_warps": (1, 2, 4),
    }

    BLOCK: int = 32
    UNROLL: int = 4
    num_warps: int = 1


@dataclass(frozen=True)
class CombineLaunch(Launch):
    """bag_join_kernel and table_combine_kernel: BLOCK_S parts or splits by BLOCK elements."""

    BLOCK_S: int
    BLOCK: int
    num_warps: int = 4


# The settings below follow from the code that they compile to (16-byte accesses, no spills, four to eight loads
# in flight a thread); they are starting points until they are measured.

# By the words of a row, or of its parts where it is longer: 4 KiB a warp, so that it loads an id once.
GATHER_ROWS: Mapping[int, RowsLaunch] = {
    256: RowsLaunch(2, 256),
    512: RowsLaunch(1, 512),
}
NARROWEST_ROWS, WIDEST_ROWS = min(GATHER_ROWS), max(GATHER_ROWS)


@dataclass(frozen=True)
class TritonLaunches:
    """What a device may have of its own: no field changes a result's bits."""

    gather_rows: Mapping[int, RowsLaunch] = field(default_factory=lambda: GATHER_ROWS)
    gather_flat: ChunkLaunch = ChunkLaunch(256)
    scatter_add: ChunkLaunch = ChunkLaunch(256)
    counts: FlatLaunch = FlatLaunch(256)
    sort_keys: FlatLaunch = FlatLaunch(256)
    segment_sum: Walk = Walk(UNROLL=8)
    select_rows: FlatLaunch = FlatLaunch(256)
    row_update: Walk = Walk()
    bag_sum: Walk = Walk()
    bag_max: Walk = Walk()
    bag_of: FlatLaunch = FlatLaunch(512)
    table_bag: TableLaunch = TableLaunch()
    table_gather: ChunkLaunch = ChunkLaunch(128)
    table_keys: FlatLaunch = FlatLaunch(256)
    table_scatter_add: TableLaunch = TableLaunch()
    table_segment_sum: Walk = Walk()
    table_row_update: Walk = Walk()
    take_rows: FlatLaunch = FlatLaunch(256)
    dequantize_rows: FlatLaunch = FlatLaunch(256)


@dataclass(frozen=True)
class GatherRule:
    """gather_rows_kernel copies rows where no larger share of its lanes idles at their end."""

    max_idle_share: float = 0.0


@dataclass(frozen=True)
class TritonMethods(Methods):
    """Rules of method of this backend."""

    gather: GatherRule = GatherRule()


# The same on every device: these fix the order of additions, and so the bits.
RENORM_ITEMS = 1024
# Largest accumulated row kept in registers, in bytes, and register bytes a thread; longer rows take two launches.
MAX_HELD_ROW = 16384
HELD_BYTES = 32
ROWWISE_BLOCK = 1024
HELD_WALK = Walk()
BAG_JOIN = CombineLaunch(BLOCK_S=32, BLOCK=32)
BAG_SAMPLE_WEIGHTS_VECTORS = 512
TABLE_COMBINE = CombineLaunch(BLOCK_S=32, BLOCK=32)
# Columns a lane of a sum of maxima: the position of each takes 8 bytes.
MAX_POSITION_VECTOR = 4
# Vectors a program, where bags are counted to decide into how many splits they are cut.
SPLIT_VECTORS = 32


def carry_vector(vec: int, acc_bytes: int) -> int:
    """Columns a lane of the join has: 16 bytes of partial sums, or the walk's columns if those are more.

    With fewer Triton would spread the rows of a column over several lanes.
    """
    return max(vec, VECTOR_BYTES // acc_bytes)


@cache
def chunk_launch(launch: ChunkLaunch, row_vectors: int) -> ChunkLaunch:
    """Whole rows a program, where they fill its steps of 32 vectors: no other program loads their ids."""
    unit = lcm(32, row_vectors)
    return replace(launch, BLOCK=launch.BLOCK // unit * unit or launch.BLOCK)


@cache
def segment_launch(walk: Walk, embedding_dim: int, vec: int) -> SegmentLaunch:
    """One warp wide, `vec` columns a lane; narrow rows put several chunks side by side."""
    block_d = min(next_power_of_2(embedding_dim), 32 * vec)
    return SegmentLaunch(walk.rows * 32 * vec // block_d, block_d, walk.UNROLL, walk.num_warps)


@cache
def update_launch(walk: Walk, embedding_dim: int, vec: int, held_bytes: int) -> SegmentLaunch:
    """`segment_launch`; wide enough for a whole row of that many bytes a column, unless they are 0."""
    if held_bytes == 0:
        return segment_launch(walk, embedding_dim, vec)
    launch = segment_launch(HELD_WALK, embedding_dim, vec)
    if embedding_dim <= launch.BLOCK_D:
        return launch
    block_d = next_power_of_2(embedding_dim)
    num_warps = max(block_d * held_bytes // (32 * HELD_BYTES), 1)
    return SegmentLaunch(BLOCK_C=1, BLOCK_D=block_d, UNROLL=1, num_warps=num_warps)


@cache
def bag_launch(walk: Walk, embedding_dim: int, vec: int) -> BagLaunch:
    """One warp wide, `vec` columns a lane; narrow rows put several bags side by side."""
    block_d = min(next_power_of_2(embedding_dim), 32 * vec)
    block_b = walk.rows * 32 * vec // block_d
    return BagLaunch(block_b, block_d, max(32 // block_b, 1), walk.UNROLL, walk.num_warps)


def join_chunks(embedding_dim: int) -> int:
    """Chunks that a program of bag_join_kernel looks at: more where rows are narrow, as few programs sum these."""
    return max(min(64 // next_power_of_2(embedding_dim), 32), 1)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()
