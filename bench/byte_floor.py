"""How many bytes a lookup has to move, and how long a card needs for them.

With V the rows of all tables, D, N as everywhere, s bytes an element, i bytes an id, U different rows among the ids,
and U', N' the same without padding, whose gradient nobody asks for. O rows are put out, O' of them with a gradient: N
and N', or in bags the number of bags. A gradient that exists has g bytes an element. An optimizer keeps S bytes for
each row: none for SGD, 2 D s for Adam, s for row-wise Adagrad (its s is at least 4). An offset of a bag counts as an
id more.

    mode        DRAM: each row from memory once           logical: each id on its own
    forward     U D s + O D s + N i                       N D s + O D s + N i
    backward    O' D s + V D s + N i                      2 N' D s + V D s + N i
    full        forward + backward                        forward + backward
    accumulate  O' D s + 2 U' D g + N i                   N' D s + 2 N' D g + N i
    step        forward + O' D s + 2 U' (D s + S) + N i   forward + N' D s + 2 N' (D s + S) + N i

forward reads rows and writes the output. backward reads the output's gradient and writes the table's, zeros
included; logically each id reads its gradient and adds to its row. accumulate reads and writes the used rows of the
gradient that is there. step never needs the table's gradient: it reads and writes the used rows and what the optimizer
keeps for them. DRAM bytes are the floor: what any program has to move when nothing is in the caches.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .shapes import ACCUMULATE, DTYPES, ID_DTYPES, STEPS, Cell

# What a large copy reaches of the data sheet's bandwidth, by the one figure that PREDICTION names.
COPY_SHARE = 0.9
PREDICTION = (
    "predicted, not measured: DRAM bytes at {share:.0%} of the data sheet's {bandwidth:g} GB/s"
)
# A kernel cannot take less than about this, whatever it moves.
LAUNCH_MS = 0.01


@dataclass(frozen=True)
class Card:
    """A GPU by its data sheet."""

    name: str
    bandwidth: float  # GB/s


CARDS = {
    "a10": Card("A10", 600),
    "a100": Card("A100 80GB SXM", 2039),
    "a100-40": Card("A100 40GB", 1555),
    "b200": Card("B200", 8000),
    "h100": Card("H100 SXM", 3350),
    "h100-pcie": Card("H100 PCIe", 2000),
    "h200": Card("H200 SXM", 4800),
    "l4": Card("L4", 300),
    "l40s": Card("L40S", 864),
    "rtx3090": Card("GeForce RTX 3090", 936),
    "rtx4090": Card("GeForce RTX 4090", 1008),
    "rtx5090": Card("GeForce RTX 5090", 1792),
    "t4": Card("T4", 320),
    "v100": Card("V100 SXM2", 900),
}


@dataclass(frozen=True)
class Counts:
    """The ids of one cell, counted."""

    unique: int  # U
    kept: int  # N'
    unique_kept: int  # U'


@dataclass(frozen=True)
class BytesMoved:
    """Bytes of one call."""

    dram: int
    logical: int


def count(ids: Tensor, padding_idx: int | None) -> Counts:
    """Count what the formulas need."""
    unique = ids.unique()
    if padding_idx is None:
        return Counts(len(unique), ids.numel(), len(unique))
    padding = int((ids == padding_idx).sum())
    return Counts(len(unique), ids.numel() - padding, len(unique) - (padding > 0))


def bytes_moved(cell: Cell, mode: str, counts: Counts) -> BytesMoved:
    """The bytes of one call in a mode, by the formulas above."""
    # Of tables of several widths the mean.
    row = sum(cell.widths) * DTYPES[cell.dtype].itemsize // cell.tables
    offsets = cell.num_outputs if cell.by_offsets else 0
    ids = (cell.num_ids + offsets) * ID_DTYPES[cell.id_dtype].itemsize
    forward = BytesMoved(
        (counts.unique + cell.num_outputs) * row + ids,
        (cell.num_ids + cell.num_outputs) * row + ids,
    )
    if mode == "forward":
        return forward
    # Neither bags nor several tables have padding here.
    kept_outputs = cell.num_outputs if cell.pooled else counts.kept
    if mode in ACCUMULATE:
        added = 2 * cell.dim * cell.gradient_dtype(mode).itemsize
        return BytesMoved(
            kept_outputs * row + counts.unique_kept * added + ids, counts.kept * (row + added) + ids
        )
    if mode in STEPS:
        updated = row + state_bytes(cell, mode)
        return BytesMoved(
            forward.dram + kept_outputs * row + 2 * counts.unique_kept * updated + ids,
            forward.logical + counts.kept * (row + 2 * updated) + ids,
        )
    backward = BytesMoved(
        (kept_outputs + cell.rows) * row + ids, (2 * counts.kept + cell.rows) * row + ids
    )
    if mode == "backward":
        return backward
    return BytesMoved(forward.dram + backward.dram, forward.logical + backward.logical)


def state_bytes(cell: Cell, mode: str) -> int:
    """What the optimizer of a step keeps for a row."""
    itemsize = max(4, DTYPES[cell.dtype].itemsize)
    numbers = {"step": 0, "step_adam": 2 * cell.dim, "step_rowwise_adagrad": 1}[mode]
    return numbers * itemsize


def predicted_ms(card: Card, dram_bytes: int) -> float:
    """How long the card would take if it moved the floor and nothing else, as fast as it copies."""
    return dram_bytes / (card.bandwidth * COPY_SHARE * 1e6)
