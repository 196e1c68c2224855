"""The calls that are counted, and the sectors that each has to move."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gpu_embed.backends._plan.access import cdiv, sort_key_dtype
from gpu_embed.bags import Bags
from gpu_embed.dtypes import accumulation
from gpu_embed.row_update import STATE

from ..codegen.cases import Case
from ..ptx.counts import SECTOR_BYTES

CPU = torch.device("cpu")
# Whole programs for every width; and ids of which no grid, vector or sector is full.
N, UNEVEN = 1024, 1001


@dataclass(frozen=True)
class CountedCase(Case):
    """A case on tensors with data: ids are drawn, and bags have nearly equal lengths."""

    num_indices: int = N
    num_embeddings: int = 4096

    def ids(self) -> Tensor:
        generator = torch.Generator(CPU).manual_seed(0)
        shape = (self.num_indices,)
        drawn = torch.randint(self.num_embeddings, shape, generator=generator, device=CPU)
        return drawn.to(self.index_dtype)

    def matrix(self, rows: int) -> Tensor:
        return torch.ones(rows, self.embedding_dim, dtype=self.dtype, device=CPU)

    def bags(self) -> Bags:
        starts = torch.arange(self.num_bags, device=CPU) * self.num_indices // self.num_bags
        return Bags(self.ids(), None if self.equal_lengths else starts, self.num_bags)

    def state(self, formula: str, num_rows: int, weight: Tensor) -> tuple[Tensor, ...]:
        dtype = accumulation(self.dtype)
        return tuple(
            torch.ones(state.shape(weight, num_rows), dtype=dtype, device=CPU)
            for state in STATE[formula]
        )


@dataclass(frozen=True)
class Ideal:
    """Sectors that a kernel has to touch."""

    loads: int = 0
    stores: int = 0
    atomics: int = 0
    # Of the rows, or of the ids where it has none: what goes through it.
    moved_bytes: int = 0


def ideals(case: Case) -> dict[str, Ideal]:
    """Those of a case's kernels, by what their names begin with; any other kernel has nothing to move."""
    return IDEALS[case.operation](case)


def array_sectors(numel: int, itemsize: int) -> int:
    """Of an array from start to end."""
    return cdiv(numel * itemsize, SECTOR_BYTES)


def row_sectors(rows: Tensor, dim: int, itemsize: int) -> int:
    """Of each of these rows, by number, of a matrix with so many columns."""
    first = rows.long() * dim * itemsize
    last = first + dim * itemsize - 1
    return int((last // SECTOR_BYTES - first // SECTOR_BYTES + 1).sum())


def _gather(case: Case) -> dict[str, Ideal]:
    ids, dim = case.ids(), case.embedding_dim
    output_itemsize = (case.output_dtype or case.dtype).itemsize
    gather = Ideal(
        loads=_ids_sectors(case) + row_sectors(ids, dim, case.dtype.itemsize),
        stores=array_sectors(len(ids) * dim, output_itemsize),
        moved_bytes=len(ids) * dim * case.dtype.itemsize,
    )
    return {"take" if case.operation == "take" else "gather": gather}


def _scatter_add(case: Case) -> dict[str, Ideal]:
    ids, dim, itemsize = case.ids(), case.embedding_dim, case.dtype.itemsize
    scatter_add = Ideal(
        loads=_ids_sectors(case) + array_sectors(len(ids) * dim, itemsize),
        atomics=row_sectors(ids, dim, itemsize),
        moved_bytes=len(ids) * dim * itemsize,
    )
    return {"scatter_add": scatter_add}


def _bag_scatter_add(case: Case) -> dict[str, Ideal]:
    ids, dim, itemsize = case.ids(), case.embedding_dim, case.dtype.itemsize
    bag_of = case.bags().bag_of()
    numbers = array_sectors(len(ids), 4)
    scatter_add = Ideal(
        loads=_ids_sectors(case) + numbers + row_sectors(bag_of, dim, itemsize),
        atomics=row_sectors(ids, dim, itemsize),
        moved_bytes=len(ids) * dim * itemsize,
    )
    offsets = 0 if case.equal_lengths else array_sectors(case.num_bags, 8)
    return {
        "scatter_add": scatter_add,
        "bag_of": Ideal(loads=offsets, stores=numbers, moved_bytes=4 * len(ids)),
    }


def _sorted(case: Case) -> dict[str, Ideal]:
    ids, dim, itemsize = case.ids(), case.embedding_dim, case.dtype.itemsize
    keys = array_sectors(len(ids), sort_key_dtype(case.num_embeddings).itemsize)
    order = ids.sort(stable=True)[1]
    segment_sum = Ideal(
        loads=keys + array_sectors(len(ids), 8) + row_sectors(order, dim, itemsize),
        stores=row_sectors(ids.unique(), dim, itemsize),
        moved_bytes=len(ids) * dim * itemsize,
    )
    sort_keys = Ideal(loads=_ids_sectors(case), stores=keys, moved_bytes=_ids_bytes(case))
    return {"segment_sum": segment_sum, "sort_keys": sort_keys}


def _row_update(case: Case) -> dict[str, Ideal]:
    """As `_sorted`, and the used rows of the table and of the state are loaded and stored."""
    kernels = _sorted(case)
    sums, rows = kernels["segment_sum"], case.ids().unique()
    itemsize = accumulation(case.dtype).itemsize
    state = sum(
        row_sectors(rows, 1 if kept.per_row else case.embedding_dim, itemsize)
        for kept in STATE[case.operation]
    )
    update = Ideal(
        loads=sums.loads + sums.stores + state,
        stores=sums.stores + state,
        moved_bytes=sums.moved_bytes,
    )
    return {"row_update": update, "sort_keys": kernels["sort_keys"]}


def _counts(case: Case) -> dict[str, Ideal]:
    atomics = case.num_indices
    return {"counts": Ideal(_ids_sectors(case), 0, atomics, _ids_bytes(case))}


def _bag_sum(case: Case) -> dict[str, Ideal]:
    ids, dim, itemsize = case.ids(), case.embedding_dim, case.dtype.itemsize
    offsets = 0 if case.equal_lengths else array_sectors(case.num_bags, 8)
    bag_sum = Ideal(
        loads=_ids_sectors(case) + offsets + row_sectors(ids, dim, itemsize),
        stores=array_sectors(case.num_bags * dim, itemsize),
        moved_bytes=len(ids) * dim * itemsize,
    )
    return {"bag_sum": bag_sum}


def _ids_bytes(case: Case) -> int:
    return case.num_indices * case.index_dtype.itemsize


def _ids_sectors(case: Case) -> int:
    return cdiv(_ids_bytes(case), SECTOR_BYTES)


IDEALS: dict[str, Callable[[Case], dict[str, Ideal]]] = {
    "embedding": _gather,
    "take": _gather,
    "atomic": _scatter_add,
    "sorted": _sorted,
    "counts": _counts,
    "bag_sum": _bag_sum,
    "bag_atomic": _bag_scatter_add,
    **dict.fromkeys(STATE, _row_update),
}

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
WIDTHS = (1, 3, 4, 5, 8, 16, 32, 33, 50, 64, 96, 100, 128, 256, 300, 768, 1024)
HALF_WIDTHS = (33, 50, 64, 300, 768)


def _case(operation: str, dim: int = 64, dtype: torch.dtype = FP32, **fields: Any) -> CountedCase:
    return CountedCase(operation, dim, dtype, **fields)


CASES = (
    *(_case("embedding", dim) for dim in WIDTHS),
    *(_case("embedding", dim, dtype) for dtype in (BF16, FP16) for dim in HALF_WIDTHS),
    *(_case("embedding", dim, num_indices=UNEVEN) for dim in (50, 64)),
    *(_case("atomic", dim) for dim in WIDTHS),
    *(_case("atomic", dim, num_indices=UNEVEN) for dim in (50, 64)),
    # Few ids and many, the same width.
    *(
        _case("sorted", 128, dtype, num_indices=n)
        for dtype in (FP32, BF16)
        for n in (512, N, 4 * N)
    ),
    *(_case("sorted", dim) for dim in (1, 5, 8, 33, 50, 64, 300, 768)),
    *(_case("sorted", dim, BF16) for dim in HALF_WIDTHS),
    *(_case(operation, num_indices=UNEVEN) for operation in ("sorted", "counts", "bag_atomic")),
    *(_case(operation) for operation in ("counts", "bag_atomic")),
    # Bags of 32 ids, which no chunk's edge cuts; long ones, which many cut; and bags of equal lengths.
    *(
        _case("bag_sum", dim, num_indices=4 * N, num_bags=128)
        for dim in (1, 8, 33, 50, 64, 128, 300)
    ),
    *(_case("bag_sum", dim, BF16, num_indices=4 * N, num_bags=128) for dim in (50, 64)),
    *(_case("bag_sum", dim, num_indices=4 * N, num_bags=3) for dim in (50, 64)),
    *(_case("bag_sum", dim, num_bags=32, equal_lengths=True) for dim in (50, 64)),
    _case("bag_sum", num_indices=UNEVEN, num_bags=31),
    *(_case("take", dim) for dim in (5, 33, 50, 64, 300)),
    *(_case("take", dim, BF16) for dim in (50, 64)),
    *(_case("take", dim, output_dtype=BF16) for dim in (50, 64)),
    *(_case(formula, 64) for formula in STATE),
    *(_case("sgd", dim, BF16) for dim in (50, 64, 300)),
)
