"""What is measured: sets of cells, each with the place where its shapes come from.

To add a set: an entry in SETS.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

# forward: a lookup into a table that is being trained. backward: its dense gradient. full: both.
# accumulate: backward into a gradient that exists, of the table's dtype or, beside a table of 16 bits, in fp32.
# step: both, and the table updated by an optimizer.
ACCUMULATE = ("accumulate", "accumulate_fp32")
STEPS = {"step": "SGD", "step_adam": "Adam", "step_rowwise_adagrad": "row-wise Adagrad"}
MODES = ("forward", "backward", "full", *ACCUMULATE, *STEPS)
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
ID_DTYPES = {"int64": torch.int64, "int32": torch.int32, "int16": torch.int16, "uint8": torch.uint8}
# Of `Cell.operation`, those that sum; of these, the two that say the same.
EQUAL_BAGS = ("embedding_bag", "embedding_bag_offsets")
BAGS = (*EQUAL_BAGS, "embedding_bag_mixed")


@dataclass(frozen=True)
class Cell:
    """One shape: num_ids rows of tables [vocab, dim], in bags if they are summed."""

    vocab: int
    dim: int
    num_ids: int
    dtype: str = "float32"
    id_dtype: str = "int64"
    distribution: str = "uniform"
    padding: float = 0.0  # share of the ids that are padding_idx
    # "embedding"; "embedding_bag": the rows of each bag are summed; "embedding_bag_offsets": the same bags, but offsets
    # say where they begin, so that their lengths show on the device alone; "embedding_bag_mixed": bags of tables
    # whose widths are dim, a half, a quarter and an eighth of it by turns; "embedding_graph": forward and
    # backward of an embedding captured in a CUDA graph.
    operation: str = "embedding"
    hotness: int = 1  # ids in a bag
    tables: int = 1  # looked up in one call, each with its share of the ids

    @property
    def rows(self) -> int:
        """Rows of all tables."""
        return self.tables * self.vocab

    @property
    def padding_idx(self) -> int | None:
        return self.vocab - 1 if self.padding else None

    def gradient_dtype(self, mode: str) -> torch.dtype:
        """Of the gradient that a mode makes or adds to."""
        return torch.float32 if mode == "accumulate_fp32" else DTYPES[self.dtype]

    def has(self, mode: str) -> bool:
        """Whether the mode is one of this cell's: fp32 gradients are for tables of 16 bits, updates for one width."""
        if not (self.is_uniform or mode in ("forward", "backward", "full")):
            return False
        return mode != "accumulate_fp32" or DTYPES[self.dtype].itemsize == 2

    @property
    def widths(self) -> tuple[int, ...]:
        """Columns of each table."""
        shares = (1, 2, 4, 8) if self.operation == "embedding_bag_mixed" else (1,)
        return tuple(self.dim // shares[table % len(shares)] for table in range(self.tables))

    @property
    def is_uniform(self) -> bool:
        """Whether all tables have the same width."""
        return set(self.widths) == {self.dim}

    @property
    def pooled(self) -> bool:
        return self.operation in BAGS

    @property
    def by_offsets(self) -> bool:
        return self.operation == "embedding_bag_offsets"

    @property
    def num_outputs(self) -> int:
        """Rows of the output: one for each id, or for each bag."""
        return self.num_ids // self.hotness

    def __str__(self) -> str:
        padded = f", {self.padding:.0%} padding" if self.padding else ""
        bags = f" in bags of {self.hotness}" if self.pooled else ""
        bags += " by offsets" if self.by_offsets else ""
        tables = f"{self.tables} tables of " if self.tables > 1 else ""
        dim = f"{self.dim:,}" if self.is_uniform else f"{min(self.widths):,} to {self.dim:,}"
        return (
            f"{tables}{self.vocab:,} x {dim} {self.dtype}, {self.num_ids:,} ids{bags} "
            f"({self.distribution}{padded})"
        )


@dataclass(frozen=True)
class ShapeSet:
    """Cells with a common purpose."""

    name: str
    description: str
    origin: str
    modes: tuple[str, ...]
    cells: tuple[Cell, ...]


def grid(**axes: Sequence[Any]) -> tuple[Cell, ...]:
    """A cell for each combination; the last axis changes fastest."""
    return tuple(
        Cell(**dict(zip(axes, values, strict=True))) for values in itertools.product(*axes.values())
    )


MICRO_STEPS = (
    *grid(vocab=(128_256,), dim=(512,), num_ids=(8, 512, 2048)),
    *grid(vocab=(32_000,), dim=(4096,), num_ids=(2048, 4096), dtype=("bfloat16",)),
)
BAGS_OF_20: dict[str, Any] = {"operation": "embedding_bag", "hotness": 20}
SETS = {
    shape_set.name: shape_set
    for shape_set in (
        ShapeSet(
            "A",
            "language model, small: 16,384 tokens, vocabulary 2^10 to 2^17",
            "Liger-Kernel, tritonbench",
            ("forward", "backward", "full"),
            tuple(
                Cell(2**k, dim, 16384, dtype)
                for dtype in ("float32", "bfloat16")
                for dim in (768, 4096)
                for k in range(10, 18)
            ),
        ),
        ShapeSet(
            "B",
            "power law: one id a sample, and summed bags of 16 and 64",
            "cuEmbed's sweep",
            ("forward", "backward"),
            tuple(
                replace(
                    cell,
                    num_ids=hotness * cell.num_ids,
                    hotness=hotness,
                    operation="embedding" if hotness == 1 else "embedding_bag",
                )
                for cell in grid(
                    distribution=("zipf:0", "zipf:1.05", "zipf:1.15"),
                    vocab=(1_000_000, 10_000_000),
                    dim=(32, 128),
                    num_ids=(1024, 32768, 131072),
                    id_dtype=("int32",),
                )
                for hotness in (1, 16, 64)
            ),
        ),
        ShapeSet(
            "C",
            "32 tables in one call, with and without sums",
            "FBGEMM's default, batch 512 x 20 ids",
            ("forward", "backward", *STEPS),
            tuple(
                Cell(100_000, 128, 32 * 512 * 20, distribution=distribution, tables=32, **bags)
                for distribution in ("uniform", "zipf:1.05")
                for bags in ({}, BAGS_OF_20)
            ),
        ),
        ShapeSet(
            "D",
            "large vocabulary, no pooling: one table, and ten in one call",
            "dynamicemb; a recommender's 10M rows",
            ("forward", "backward", *STEPS),
            (
                Cell(1_677_721, 128, 1_048_570, distribution="zipf:1.05"),
                Cell(1_677_721, 128, 1_048_570, distribution="zipf:1.05", tables=10),
                Cell(10_000_000, 128, 65_536, distribution="zipf:1.05"),
            ),
        ),
        ShapeSet(
            "E",
            "vocabularies of today's language models, 2k to 32k tokens",
            "model configurations",
            ("forward", "backward"),
            tuple(
                Cell(vocab, dim, num_ids, "bfloat16", distribution=distribution, padding=padding)
                for vocab, dim in ((128_256, 4096), (151_936, 2560), (129_280, 7168))
                for num_ids in (2048, 8192, 32768)
                for distribution, padding in (
                    ("uniform", 0.0),
                    ("zipf:1.05", 0.0),
                    ("uniform", 0.3),
                )
            ),
        ),
        ShapeSet(
            "F",
            "contention: many ids meet on few rows; the share on one row from 0 to 1",
            "pytorch#137425, #20655, #182675; BERT's token types",
            ("forward", "backward"),
            (
                Cell(2000, 384, 713_268, "bfloat16", distribution="equal"),
                Cell(100, 100, 10_000),
                *(
                    Cell(1_720_000, dim, 7_770_000, distribution="hot:0.5")
                    for dim in (128, 256, 512, 1024)
                ),
                Cell(2, 768, 16_384),
                Cell(2, 768, 16_384, "bfloat16"),
                *(
                    Cell(100_000, 128, 262_144, distribution=f"hot:{share:g}")
                    for share in (0, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 1)
                ),
            ),
        ),
        ShapeSet(
            "G",
            "past 2^31 elements, in the table and in the output",
            "TransformerEngine#2918",
            ("forward", "backward"),
            (Cell(19_345_706, 128, 65_536), Cell(32_000, 4096, 524_289)),
        ),
        ShapeSet(
            "H",
            "forward and backward as one CUDA graph",
            "pytorch#82886",
            ("full",),
            tuple(Cell(100_000, 128, n, operation="embedding_graph") for n in (3073, 1_048_576)),
        ),
        ShapeSet(
            "I",
            "ids of real text in reading order, and drawn by English word frequencies",
            "Python's documentation; wordfreq, wordsegment",
            ("forward", "backward"),
            (
                *grid(distribution=("text",), vocab=(8192,), dim=(128, 768), num_ids=(65_536,)),
                *(
                    Cell(262_144, dim, 65_536, distribution=words)
                    for words in ("wordfreq", "wordsegment")
                    for dim in (128, 768)
                ),
            ),
        ),
        ShapeSet(
            "J",
            "growth: 65,536 ids against tables of 10,000 to 50,000,000 rows, by a power law, and always of 8192 rows; "
            "4096 to 262,144 ids of these against 1,000,000 rows",
            "the cost of a vocabulary",
            ("forward", "backward", *STEPS),
            (
                *grid(
                    distribution=("zipf:1.05", "spread:8192"),
                    vocab=(10_000, 100_000, 1_000_000, 10_000_000, 50_000_000),
                    dim=(32,),
                    num_ids=(65_536,),
                ),
                *grid(
                    distribution=("spread:8192",),
                    vocab=(1_000_000,),
                    dim=(32,),
                    num_ids=(4096, 16_384, 262_144),
                ),
            ),
        ),
        ShapeSet(
            "K",
            "the same summed bags as [B, L] and by offsets: what it costs not to know their lengths",
            "recommenders' bags of about 20, and longer ones",
            ("forward", "backward"),
            tuple(
                Cell(100_000, dim, bags * hotness, operation=operation, hotness=hotness)
                for bags in (512, 4096)
                for hotness in (20, 64)
                for dim in (32, 128)
                for operation in EQUAL_BAGS
            ),
        ),
        ShapeSet(
            "L",
            "gradient accumulation: language models' tables, and 2048 ids against tables of 2^10 to 2^20 rows",
            "micro-steps of a model's training",
            ACCUMULATE,
            (
                *MICRO_STEPS,
                *grid(vocab=tuple(2**k for k in range(10, 21)), dim=(256,), num_ids=(2048,)),
            ),
        ),
        ShapeSet(
            "M",
            "many small tables: bags of 8 and of one id, of one width and of four",
            "recommenders on a CPU",
            ("forward", "full"),
            (
                *(
                    Cell(1000, dim, tables * num_ids, operation=operation, tables=tables, hotness=n)
                    for tables, dim, num_ids, operation in (
                        (32, 32, 256, "embedding_bag"),
                        (200, 32, 64, "embedding_bag"),
                        (200, 64, 64, "embedding_bag_mixed"),
                    )
                    for n in (8, 1)
                ),
                Cell(1000, 32, 32 * 8192, operation="embedding_bag", tables=32, hotness=8),
            ),
        ),
    )
}

# A few cells of A, E, F and K: what the summary shows on a GPU, or predicts for one.
HEADLINE = (
    ("A", Cell(32_768, 768, 16_384, "float32")),
    ("A", Cell(131_072, 4096, 16_384, "bfloat16")),
    ("E", Cell(128_256, 4096, 8192, "bfloat16")),
    ("E", Cell(151_936, 2560, 8192, "bfloat16", distribution="zipf:1.05")),
    ("F", Cell(2000, 384, 713_268, "bfloat16", distribution="equal")),
    ("F", Cell(2, 768, 16_384, "bfloat16")),
    *(
        ("K", Cell(100_000, 128, 81_920, operation=operation, hotness=20))
        for operation in EQUAL_BAGS
    ),
)
# Tables that a CPU looks up in no time, in some time, and in long enough to be bound by memory.
CPU_CELLS = (Cell(1000, 64, 256), Cell(30_000, 128, 4096), Cell(100_000, 256, 16_384))


def varied(cells: Iterable[Cell], **axes: Sequence[Any] | None) -> Iterator[Cell]:
    """The cells with some of their fields replaced by each of the given values, each cell once."""
    given = {name: values for name, values in axes.items() if values}
    seen = set()
    for cell in cells:
        for values in itertools.product(*given.values()):
            new = replace(cell, **dict(zip(given, values, strict=True)))
            if new not in seen:
                seen.add(new)
                yield new
