"""Launches of the lookup kernels."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...bounds import BoundsRecord
from ...settings import GATHER_METHOD
from ...shard import NO_SHARD, Shard
from .._plan.access import WordLayout, cdiv, word_layout
from .._plan.gather import Gather, GatherPlan
from .device import TritonDevice
from .known_launch import ALIGNMENT_MASK, prepare_launch
from .launch import NARROWEST_ROWS, WIDEST_ROWS, chunk_launch, next_power_of_2


class TritonGather(TritonDevice, GatherPlan):
    """Lookups: rows, or a flat range."""

    def _prepare_gather(self, weight: Tensor, shard: Shard | None) -> Gather:
        layout = word_layout(weight)
        word = self._words[layout.word_bytes]
        table = self._view(weight, word)
        device = weight.device
        table_rows = weight.shape[0], *(shard or NO_SHARD)
        adjacent = layout.row_stride == layout.row_words
        row_stride = None if adjacent else layout.row_stride // layout.vec
        kernel, grid, settings = self._gather_launch(layout, device)
        settings = {"D": layout.row_words, "VEC": layout.vec, **settings}
        launch = prepare_launch(self._launch, kernel, grid, device, settings)

        def gather(
            ids: Tensor,
            num_indices: int,
            output: Tensor,
            zero_idx: int,
            record: BoundsRecord | None,
        ) -> None:
            aligned = ids.data_ptr() & ALIGNMENT_MASK, output.data_ptr() & ALIGNMENT_MASK
            launch(
                # A record's tensors are whole allocations, so aligned.
                (ids.dtype, aligned, zero_idx, record is None),
                num_indices,
                (
                    table,
                    ids,
                    self._view(output, word),
                    # Not record_arguments: the call that every lookup makes is worth two lines.
                    None if record is None else record.words,
                    None if record is None else record.flag,
                    num_indices,
                    *table_rows,
                    zero_idx,
                    row_stride,
                    layout.col_stride,
                ),
            )

        return gather

    def _gather_launch(
        self, layout: WordLayout, device: torch.device
    ) -> tuple[Any, Callable[[int], tuple[int, ...]], dict[str, int]]:
        """Kernel, grid for a number of ids, and settings.

        gather_rows if row_words is a multiple of BLOCK_D (no masked tail), or nearly so, else gather_flat.
        """
        method = GATHER_METHOD.value
        launches = self._launches[device]
        width = max(min(next_power_of_2(layout.row_words), WIDEST_ROWS), NARROWEST_ROWS)
        rows = launches.gather_rows[width]
        blocks_d = cdiv(layout.row_words, rows.BLOCK_D)
        lanes = blocks_d * rows.BLOCK_D
        max_idle = self._methods[device].gather.max_idle_share * lanes
        if method == "rows" or (method == "auto" and lanes - layout.row_words <= max_idle):
            block_n = rows.BLOCK_N
            return (
                self._kernels.gather_rows,
                lambda num_indices: (cdiv(num_indices, block_n), blocks_d),
                rows.settings,
            )
        row_vectors = layout.row_words // layout.vec
        flat = chunk_launch(launches.gather_flat, row_vectors)
        return (
            self._kernels.gather_flat,
            lambda num_indices: (cdiv(num_indices * row_vectors, flat.BLOCK),),
            flat.settings,
        )
