"""Launches of the lookup kernels."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ...bounds import BoundsRecord
from ...settings import GATHER_METHOD
from .._plan import gather as gather_method
from .._plan.access import WordLayout, word_layout
from .._plan.gradient import Gather, cdiv
from .descriptor import MAX_COORDINATE, DescriptorRules, too_many
from .launch import GATHER_FLAT, GATHER_ROWS, gather_descriptor_launch, next_power_of_2


class TritonGather(DescriptorRules):
    """Lookups: rows, a flat range, or bulk copies."""

    def _prepare_gather(self, weight: Tensor) -> Gather:
        method = gather_method.forced(lambda name: self._gather_refusal(name, weight))
        if method == "descriptor":
            return self._prepare_gather_descriptor(weight)
        layout = word_layout(weight)
        word = self._words[layout.word_bytes]
        table = self._view(weight, word)
        device = weight.device
        num_embeddings = weight.shape[0]
        row_stride = layout.row_stride // layout.vec
        kernel, grid, settings = self._gather_launch(layout, method)
        settings = {"D": layout.row_words, "VEC": layout.vec, **settings}

        def gather(
            ids: Tensor,
            num_indices: int,
            output: Tensor,
            zero_idx: int,
            record: BoundsRecord | None,
        ) -> None:
            self._launch(
                kernel,
                grid(num_indices),
                device,
                table,
                ids,
                self._view(output, word),
                None if record is None else record.words,
                None if record is None else record.flag,
                num_indices,
                num_embeddings,
                zero_idx,
                row_stride,
                layout.col_stride,
                **settings,
            )

        return gather

    def _prepare_gather_descriptor(self, weight: Tensor) -> Gather:
        layout = word_layout(weight)
        # Rows of a multiple of 16 bytes are whole words of 4, whatever their dtype.
        word = self._words[4]
        per_word = layout.word_bytes // 4
        row_words = layout.row_words * per_word
        launch = gather_descriptor_launch(row_words)
        block = [1, launch.BLOCK_D]
        blocks_d = cdiv(row_words, launch.BLOCK_D)
        device = weight.device
        num_embeddings = weight.shape[0]
        table = self._tensor_descriptor(
            self._view(weight, word),
            [num_embeddings, row_words],
            [layout.row_stride * per_word, 1],
            block,
        )

        def gather(
            ids: Tensor,
            num_indices: int,
            output: Tensor,
            zero_idx: int,
            record: BoundsRecord | None,
        ) -> None:
            if num_indices > MAX_COORDINATE:
                raise GATHER_METHOD.cannot_serve("gather method", too_many(num_indices, "ids"))
            self._launch(
                self._kernels.gather_descriptor,
                (cdiv(num_indices, launch.ROWS), blocks_d),
                device,
                table,
                ids,
                self._tensor_descriptor(
                    self._view(output, word), [num_indices, row_words], [row_words, 1], block
                ),
                None if record is None else record.words,
                None if record is None else record.flag,
                num_indices,
                num_embeddings,
                zero_idx,
                **launch.settings,
            )

        return gather

    def _gather_launch(
        self, layout: WordLayout, method: str
    ) -> tuple[Any, Callable[[int], tuple[int, ...]], dict[str, int]]:
        """Kernel, grid for a number of ids, and settings.

        Whole rows where a power of two of words makes full tiles of them, else a flat range.
        """
        widest = max(GATHER_ROWS)
        rows = GATHER_ROWS[min(next_power_of_2(layout.row_words), widest)]
        if method == "rows" or (method == "auto" and layout.row_words % rows.BLOCK_D == 0):
            blocks_d = cdiv(layout.row_words, rows.BLOCK_D)
            block_n = rows.BLOCK_N
            return (
                self._kernels.gather_rows,
                lambda num_indices: (cdiv(num_indices, block_n), blocks_d),
                rows.settings,
            )
        row_vectors = layout.row_words // layout.vec
        return (
            self._kernels.gather_flat,
            lambda num_indices: (cdiv(num_indices * row_vectors, GATHER_FLAT.BLOCK),),
            GATHER_FLAT.settings,
        )

    def _gather_refusal(self, method: str, weight: Tensor) -> str | None:
        """What of a table's lookups cannot be served with a method; None: nothing."""
        return self._descriptor_refusal(weight) if method == "descriptor" else None
