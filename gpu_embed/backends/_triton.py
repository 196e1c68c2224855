"""The Triton kernels behind the `Backend` protocol: launch settings and launches."""

import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from functools import cache, cached_property
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..bags import Bags
from ..bounds import BoundsRecord
from ..row_update import RowUpdate
from ..settings import GATHER_METHOD
from ..tables import TableBatch
from . import gather_method
from .kernel_backend import (
    MAX_EXTRA_BYTES,
    BagSources,
    Gather,
    Gradient,
    SortDigit,
    SortSource,
    SortTiles,
    cdiv,
    norm_name,
)
from .layout import VECTOR_BYTES, WordLayout, table_vector_width, vector_width, word_layout
from .table_kernels import TableKernels

# Triton compiles for these and newer cards only.
MIN_CAPABILITY = (8, 0)
# Bulk copies through tensor descriptors begin here.
DESCRIPTOR_CAPABILITY = (9, 0)
# Their coordinates are 32 bit.
MAX_COORDINATE = 2**31 - 1


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
class CountsLaunch(Launch):
    """digit_counts_kernel: BLOCK keys at a time, UNROLL loads in flight a thread."""

    BLOCK: int
    UNROLL: int
    num_warps: int


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
class GatherDescriptorLaunch(Launch):
    """gather_descriptor_kernel: ROWS rows of BLOCK_D words, STAGES - 1 of them in flight.

    One warp a program: a single thread gives the engine its orders.
    """

    ROWS: int
    BLOCK_D: int
    STAGES: int
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
    """table_bag_sum_kernel and table_scatter_add_kernel: BLOCK vectors of their tables' columns, one a lane."""

    BLOCK: int = 32
    UNROLL: int = 4
    num_warps: int = 1


@dataclass(frozen=True)
class ScatterDescriptorLaunch(Launch):
    """scatter_add_descriptor_kernel: ROWS rows of BLOCK_D columns, all in flight."""

    ROWS: int
    BLOCK_D: int
    num_warps: int = 1


@dataclass(frozen=True)
class OneHotLaunch(Launch):
    """one_hot_kernel: a table of up to BLOCK_V rows, BLOCK_N ids at a time, BLOCK_D columns."""

    BLOCK_V: int
    BLOCK_N: int
    BLOCK_D: int
    num_warps: int = 4


@dataclass(frozen=True)
class CombineLaunch(Launch):
    """bag_combine_kernel: BLOCK_S parts by BLOCK elements."""

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
COUNTS = FlatLaunch(512)
SORT_KEYS = FlatLaunch(1024)
# One warp needs no barrier; 128 keys are 16 bytes a lane, and as many as the counters in a byte take.
DIGIT_COUNTS = CountsLaunch(128, UNROLL=4, num_warps=1)
DIGIT_SCATTER = FlatLaunch(128, num_warps=1)
# 132 multiprocessors with 32 programs each make about as many; 252 blocks are what a byte counts.
SORT_TILES = SortTiles(STEP=512, TILES=4096, MAX_STEPS=63)
RENORM_ITEMS = 1024
# Words in flight of a program of gather_descriptor_kernel, but no more rows than four. Rows of so many words go
# alone, from one copy to the next without passing through registers.
DESCRIPTOR_WORDS = 1024
DESCRIPTOR_ROWS = 4
# By the power of two that holds the table's rows: 16 or 32 sums a thread.
ONE_HOT = {
    16: OneHotLaunch(16, 64, 128),
    32: OneHotLaunch(32, 64, 64),
    64: OneHotLaunch(64, 32, 64),
    128: OneHotLaunch(128, 32, 32),
    256: OneHotLaunch(256, 32, 64, num_warps=16),
}
# Ids a split of one_hot_kernel at the least, and for each row of the table, so that the splits' sums, which are
# written and read again, are few beside the gradients. One tile adds them all up.
MIN_SPLIT = 512
MIN_SPLIT_PER_ROW = 8
MAX_SPLITS = 64
SUM_SPLITS = FlatLaunch(64)
SELECT_ROWS = FlatLaunch(1024)
# Bytes of a row's sum that one program holds to see the row as a whole, and bytes a thread; longer rows take
# two steps.
MAX_HELD_ROW = 16384
HELD_BYTES = 32
ROWWISE_BLOCK = 1024
BAG_OF = FlatLaunch(1024)
BAG_COMBINE = CombineLaunch(BLOCK_S=32, BLOCK=32)
BAG_SAMPLE_WEIGHTS_VECTORS = 512
TABLE_BAGS = TableLaunch()
TABLE_GATHER = FlatLaunch(128, num_warps=1)
TABLE_KEYS = FlatLaunch(512)


class TritonBackend(TableKernels):
    """`Backend` on the kernels in gpu_embed.kernels.

    With TRITON_INTERPRET=1 in the environment before Triton is imported, the kernels run in its
    interpreter and take CPU tensors too.
    """

    name = "triton"
    sort_tiles = SORT_TILES

    def unusable_reason(self, device: torch.device) -> str | None:
        if find_spec("triton") is None:
            return "triton is not installed (pip install triton; Linux only)"
        try:
            interpreted = self._interpreted
        except Exception as error:  # a broken install, or a version without what the kernels use
            return f"triton does not work here: {error}"
        if interpreted:
            return None
        if device.type != "cuda":
            return (
                f"triton kernels need a CUDA device, not {device.type} "
                "(or TRITON_INTERPRET=1 in the environment)"
            )
        if not torch.cuda.is_available():
            return "torch finds no CUDA device"
        if torch.version.hip is not None:
            return "only NVIDIA cards are supported"
        capability = torch.cuda.get_device_capability(device)
        if capability < MIN_CAPABILITY:
            return (
                f"triton needs compute capability {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]}, "
                f"{torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}"
            )
        return None

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

    def _scatter_add(
        self,
        grad_output: Tensor,
        ids: Tensor,
        sources: BagSources | None,
        grad_weight: Tensor,
        padding_idx: int,
    ) -> None:
        num_embeddings, embedding_dim = grad_weight.shape
        vec = vector_width(grad_output)
        num_vectors = ids.numel() * embedding_dim // vec
        self._launch(
            self._kernels.scatter_add,
            (cdiv(num_vectors, SCATTER_ADD.BLOCK),),
            ids.device,
            grad_output,
            ids,
            *(sources or NO_SOURCES),
            grad_weight,
            ids.numel(),
            num_embeddings,
            padding_idx,
            grad_output.stride(0) // vec,
            grad_output.stride(1),
            D=embedding_dim,
            VEC=vec,
            **SCATTER_ADD.settings,
        )

    def _scatter_add_descriptor(
        self, grad_output: Tensor, ids: Tensor, grad_weight: Tensor, padding_idx: int
    ) -> None:
        num_embeddings, embedding_dim = grad_weight.shape
        vec = vector_width(grad_output)
        launch = scatter_descriptor_launch(embedding_dim)
        self._launch(
            self._kernels.scatter_add_descriptor,
            (cdiv(ids.numel(), launch.ROWS), cdiv(embedding_dim, launch.BLOCK_D)),
            ids.device,
            grad_output,
            ids,
            self._tensor_descriptor(
                grad_weight,
                [num_embeddings, embedding_dim],
                [embedding_dim, 1],
                [1, launch.BLOCK_D],
            ),
            ids.numel(),
            num_embeddings,
            padding_idx,
            grad_output.stride(0) // vec,
            grad_output.stride(1),
            D=embedding_dim,
            VEC=vec,
            **launch.settings,
        )

    def _one_hot(
        self, grad_output: Tensor, ids: Tensor, grad_weight: Tensor, padding_idx: int
    ) -> None:
        num_embeddings, embedding_dim = grad_weight.shape
        vec = vector_width(grad_output)
        launch = one_hot_launch(num_embeddings, embedding_dim)
        split_size = one_hot_split(ids.numel(), num_embeddings, embedding_dim, launch.BLOCK_N)
        num_splits = cdiv(ids.numel(), split_size)
        partial = grad_output.new_empty(
            (num_splits, num_embeddings, embedding_dim), dtype=torch.float32
        )
        self._launch(
            self._kernels.one_hot,
            (num_splits, cdiv(embedding_dim, launch.BLOCK_D)),
            ids.device,
            grad_output,
            ids,
            partial,
            ids.numel(),
            num_embeddings,
            padding_idx,
            split_size,
            grad_output.stride(0) // vec,
            grad_output.stride(1),
            D=embedding_dim,
            VEC=vec,
            **launch.settings,
        )
        self._launch(
            self._kernels.sum_splits,
            (cdiv(grad_weight.numel(), SUM_SPLITS.BLOCK),),
            ids.device,
            partial,
            grad_weight,
            num_splits,
            grad_weight.numel(),
            SPLITS=MAX_SPLITS,
            **SUM_SPLITS.settings,
        )

    def _sort_keys(
        self,
        ids: Tensor,
        order: Tensor | None,
        keys: Tensor,
        num_embeddings: int,
        padding_idx: int,
    ) -> None:
        self._launch(
            self._kernels.sort_keys,
            (cdiv(ids.numel(), SORT_KEYS.BLOCK),),
            ids.device,
            ids,
            order,
            keys,
            ids.numel(),
            num_embeddings,
            padding_idx,
            **SORT_KEYS.settings,
        )

    def _digit_counts(self, source: SortSource, counters: Tensor, digit: SortDigit) -> None:
        self._launch(
            self._kernels.digit_counts,
            (digit.num_tiles,),
            counters.device,
            *source,
            counters,
            *digit,
            **DIGIT_COUNTS.settings,
        )

    def _digit_scatter(
        self,
        source: SortSource,
        counters: Tensor,
        sorted_order: Tensor,
        sorted_keys: Tensor | None,
        digit: SortDigit,
    ) -> None:
        self._launch(
            self._kernels.digit_scatter,
            (digit.num_tiles,),
            counters.device,
            *source,
            counters,
            sorted_order,
            sorted_keys,
            *digit,
            **DIGIT_SCATTER.settings,
        )

    def _segment_sum(
        self,
        values: Tensor,
        order: Tensor | None,
        keys: Tensor,
        counts: Tensor | None,
        sources: BagSources | None,
        grad_weight: Tensor,
        partial_values: Tensor | None,
        partial_keys: Tensor | None,
        partial_counts: Tensor | None,
        scale_grad_by_freq: bool,
        chunk: int,
    ) -> None:
        num_embeddings, embedding_dim = grad_weight.shape
        vec = vector_width(values)
        launch = segment_launch(embedding_dim, vec)
        num_chunks = cdiv(keys.numel(), chunk)
        self._launch(
            self._kernels.segment_sum,
            (cdiv(num_chunks, launch.BLOCK_C), cdiv(embedding_dim, launch.BLOCK_D)),
            keys.device,
            values,
            order,
            keys,
            counts,
            *(sources or NO_SOURCES),
            grad_weight,
            partial_values,
            partial_keys,
            partial_counts,
            keys.numel(),
            num_embeddings,
            values.stride(0) // vec,
            values.stride(1),
            D=embedding_dim,
            VEC=vec,
            SCALE_GRAD_BY_FREQ=scale_grad_by_freq,
            CHUNK=chunk,
            **launch.settings,
        )

    def _select_rows(self, ids: Tensor, rows: Tensor, chosen: Tensor) -> None:
        self._launch(
            self._kernels.select_rows,
            (cdiv(ids.numel(), SELECT_ROWS.BLOCK),),
            ids.device,
            ids,
            rows,
            chosen,
            ids.numel(),
            rows.numel(),
            **SELECT_ROWS.settings,
        )

    def _holds_row(self, embedding_dim: int, acc_dtype: torch.dtype) -> bool:
        return embedding_dim * acc_dtype.itemsize <= MAX_HELD_ROW

    def _row_update(
        self,
        update: RowUpdate,
        values: Tensor,
        order: Tensor | None,
        keys: Tensor,
        weight: Tensor,
        state: tuple[Tensor, ...],
        partial_values: Tensor,
        partial_keys: Tensor,
        chunk: int,
    ) -> None:
        num_embeddings, embedding_dim = weight.shape
        # State is as wide as the partial sums, and is to be read in one access too.
        widths = (vector_width(matrix) for matrix in (values, weight, partial_values))
        vec = min(widths)
        held_bytes = partial_values.element_size() if update.formula == "rowwise_adagrad" else 0
        launch = update_launch(embedding_dim, vec, held_bytes)
        num_chunks = cdiv(keys.numel(), chunk)
        seed, step = update.stream or (0, 0)
        self._launch(
            self._kernels.row_update,
            (cdiv(num_chunks, launch.BLOCK_C), cdiv(embedding_dim, launch.BLOCK_D)),
            keys.device,
            values,
            order,
            keys,
            weight,
            state[0] if state else None,
            state[1] if len(state) > 1 else None,
            partial_values,
            partial_keys,
            update.lr,
            keys.numel(),
            num_embeddings,
            values.stride(0) // vec,
            values.stride(1),
            weight.stride(0) // vec,
            weight.stride(1),
            update.step_size,
            update.decay,
            update.eps,
            update.avg_weight,
            update.sq_weight,
            update.grad_scale,
            seed,
            step,
            D=embedding_dim,
            VEC=vec,
            FORMULA=update.formula,
            STOCHASTIC_ROUNDING=update.rounds_at_random(weight.dtype),
            CHUNK=chunk,
            **launch.settings,
            **self._unfused,
        )

    def _rowwise_adagrad(
        self, update: RowUpdate, total: Tensor, keys: Tensor, weight: Tensor, state: Tensor
    ) -> None:
        num_embeddings, embedding_dim = weight.shape
        seed, step = update.stream or (0, 0)
        self._launch(
            self._kernels.rowwise_adagrad,
            (keys.numel(),),
            keys.device,
            total,
            keys,
            weight,
            state,
            update.lr,
            num_embeddings,
            *weight.stride(),
            update.step_size,
            update.eps,
            update.grad_scale,
            seed,
            step,
            D=embedding_dim,
            STOCHASTIC_ROUNDING=update.rounds_at_random(weight.dtype),
            BLOCK_D=min(_next_power_of_2(embedding_dim), ROWWISE_BLOCK),
            **self._unfused,
        )

    def _renorm(self, weight: Tensor, keys: Tensor, max_norm: float, norm_type: float) -> None:
        num_embeddings, embedding_dim = weight.shape
        block_d = min(_next_power_of_2(embedding_dim), RENORM_ITEMS)
        block_n = RENORM_ITEMS // block_d
        self._launch(
            self._kernels.renorm,
            (cdiv(keys.numel(), block_n),),
            weight.device,
            weight,
            keys,
            keys.numel(),
            num_embeddings,
            *weight.stride(),
            max_norm=max_norm,
            norm_type=norm_type,
            D=embedding_dim,
            NORM=norm_name(norm_type),
            BLOCK_N=block_n,
            BLOCK_D=block_d,
        )

    def _counts(self, ids: Tensor, counts: Tensor) -> None:
        self._launch(
            self._kernels.counts,
            (cdiv(ids.numel(), COUNTS.BLOCK),),
            ids.device,
            ids,
            counts,
            ids.numel(),
            counts.numel(),
            **COUNTS.settings,
        )

    def _bag_programs(self, weight: Tensor, num_bags: int) -> int:
        launch = bag_launch(weight.shape[1], vector_width(weight))
        return cdiv(num_bags, launch.BLOCK_B) * cdiv(weight.shape[1], launch.BLOCK_D)

    def _bag_sum(
        self,
        weight: Tensor,
        per_sample_weights: Tensor | None,
        bags: Bags,
        output: Tensor,
        sizes: Tensor | None,
        padding_idx: int,
        mean: bool,
        splits: int,
        record: BoundsRecord | None,
    ) -> None:
        embedding_dim = weight.shape[1]
        vec = vector_width(weight)
        launch = bag_launch(embedding_dim, vec)
        self._launch(
            self._kernels.bag_sum,
            (
                cdiv(bags.num_bags, launch.BLOCK_B),
                cdiv(embedding_dim, launch.BLOCK_D),
                splits,
            ),
            weight.device,
            weight,
            bags.indices,
            bags.offsets,
            per_sample_weights,
            output,
            sizes,
            None if record is None else record.words,
            None if record is None else record.flag,
            *bags.counts(),
            weight.shape[0],
            padding_idx,
            weight.stride(0) // vec,
            weight.stride(1),
            D=embedding_dim,
            VEC=vec,
            MEAN=mean,
            SPLIT=splits > 1,
            **launch.settings,
        )

    def _bag_combine(self, partial: Tensor, sizes: Tensor | None, output: Tensor) -> None:
        num_bags, embedding_dim = output.shape
        self._launch(
            self._kernels.bag_combine,
            (cdiv(output.numel(), BAG_COMBINE.BLOCK),),
            output.device,
            partial,
            sizes,
            output,
            len(partial),
            num_bags,
            D=embedding_dim,
            **BAG_COMBINE.settings,
        )

    def _bag_max(
        self,
        weight: Tensor,
        bags: Bags,
        output: Tensor,
        winner: Tensor | None,
        padding_idx: int,
        record: BoundsRecord | None,
    ) -> None:
        embedding_dim = weight.shape[1]
        vec = vector_width(weight)
        launch = bag_launch(embedding_dim, vec)
        self._launch(
            self._kernels.bag_max,
            (cdiv(bags.num_bags, launch.BLOCK_B), cdiv(embedding_dim, launch.BLOCK_D)),
            weight.device,
            weight,
            bags.indices,
            bags.offsets,
            output,
            winner,
            None if record is None else record.words,
            None if record is None else record.flag,
            *bags.counts(),
            weight.shape[0],
            padding_idx,
            weight.stride(0) // vec,
            weight.stride(1),
            D=embedding_dim,
            VEC=vec,
            **launch.settings,
        )

    def _bag_of(self, bags: Bags, bag_of: Tensor, sizes: Tensor | None, padding_idx: int) -> None:
        self._launch(
            self._kernels.bag_of,
            (cdiv(bag_of.numel(), BAG_OF.BLOCK),),
            bag_of.device,
            bags.indices,
            bags.offsets,
            bag_of,
            sizes,
            *bags.counts(),
            padding_idx,
            bags.num_bags.bit_length(),
            **BAG_OF.settings,
        )

    def _bag_sample_weights(
        self,
        grad_output: Tensor,
        weight: Tensor,
        ids: Tensor,
        bag_of: Tensor,
        grad: Tensor,
        padding_idx: int,
    ) -> None:
        num_embeddings, embedding_dim = weight.shape
        vec = min(vector_width(grad_output), vector_width(weight))
        block_d = min(_next_power_of_2(embedding_dim), 32 * vec)
        block_n = BAG_SAMPLE_WEIGHTS_VECTORS * vec // block_d
        self._launch(
            self._kernels.bag_sample_weights,
            (cdiv(ids.numel(), block_n),),
            ids.device,
            grad_output,
            weight,
            ids,
            bag_of,
            grad,
            ids.numel(),
            num_embeddings,
            padding_idx,
            grad_output.stride(0) // vec,
            grad_output.stride(1),
            weight.stride(0) // vec,
            weight.stride(1),
            D=embedding_dim,
            VEC=vec,
            BLOCK_N=block_n,
            BLOCK_D=block_d,
        )

    def _table_programs(self, matrix: Tensor, batch: TableBatch) -> int:
        num_elements = batch.bags_per_table * batch.width
        return cdiv(num_elements // table_vector_width(matrix, batch), TABLE_BAGS.BLOCK)

    def _table_bag_sum(
        self,
        weight: Tensor,
        per_sample_weights: Tensor | None,
        batch: TableBatch,
        output: Tensor,
        sizes: Tensor | None,
        splits: int,
        record: BoundsRecord | None,
    ) -> None:
        self._launch(
            self._kernels.table_bag_sum,
            (self._table_programs(weight, batch), splits),
            weight.device,
            weight,
            batch.indices,
            batch.offsets,
            per_sample_weights,
            batch.fields,
            batch.table_of_column,
            output,
            sizes,
            None if record is None else record.words,
            None if record is None else record.flag,
            batch.indices.numel(),
            batch.bags_per_table,
            batch.bags.num_bags,
            D=batch.width,
            VEC=table_vector_width(weight, batch),
            MEAN=batch.shape.mean,
            SPLIT=splits > 1,
            **TABLE_BAGS.settings,
        )

    def _table_gather(
        self,
        weight: Tensor,
        batch: TableBatch,
        output: Tensor,
        zero_padding: bool,
        record: BoundsRecord | None,
    ) -> None:
        vec = table_vector_width(weight, batch)
        self._launch(
            self._kernels.table_gather,
            (cdiv(output.numel() // vec, TABLE_GATHER.BLOCK),),
            weight.device,
            weight,
            batch.indices,
            batch.offsets,
            batch.fields,
            output,
            None if record is None else record.words,
            None if record is None else record.flag,
            batch.indices.numel(),
            batch.bags_per_table,
            batch.bags.num_bags,
            batch.num_tables,
            batch.num_tables.bit_length(),
            batch.bags.num_bags.bit_length(),
            D=batch.shape.widest,
            VEC=vec,
            ZERO_PADDING=zero_padding,
            **TABLE_GATHER.settings,
        )

    def _table_keys(
        self,
        batch: TableBatch,
        keys: Tensor | None,
        sources: Tensor | None,
        sizes: Tensor | None,
    ) -> None:
        num_ranges = batch.num_tables if sources is None else batch.bags.num_bags
        self._launch(
            self._kernels.table_keys,
            (cdiv(batch.indices.numel(), TABLE_KEYS.BLOCK),),
            batch.indices.device,
            batch.indices,
            batch.offsets,
            batch.fields,
            keys,
            sources,
            sizes,
            batch.indices.numel(),
            batch.bags_per_table,
            batch.bags.num_bags,
            batch.num_tables,
            batch.shape.num_rows,
            num_ranges.bit_length(),
            **TABLE_KEYS.settings,
        )

    def _table_scatter_add(
        self,
        grad_output: Tensor,
        per_sample_weights: Tensor | None,
        batch: TableBatch,
        grad_weight: Tensor,
        splits: int,
    ) -> None:
        vec = table_vector_width(grad_output, batch)
        self._launch(
            self._kernels.table_scatter_add,
            (self._table_programs(grad_output, batch), splits),
            grad_output.device,
            grad_output,
            batch.indices,
            batch.offsets,
            per_sample_weights,
            batch.fields,
            batch.table_of_column,
            grad_weight,
            batch.indices.numel(),
            batch.bags_per_table,
            batch.bags.num_bags,
            grad_output.stride(0) // vec,
            grad_output.stride(1),
            D=batch.width,
            VEC=vec,
            MEAN=batch.shape.mean,
            SPLIT=splits > 1,
            **TABLE_BAGS.settings,
        )

    def _table_segment_sum(
        self,
        values: Tensor,
        keys: Tensor,
        order: Tensor | None,
        key_tables: Tensor | None,
        sources: BagSources | None,
        batch: TableBatch,
        grad_weight: Tensor,
        partial_values: Tensor,
        partial_keys: Tensor,
        partial_tables: Tensor,
        chunk: int,
    ) -> None:
        widest = batch.shape.widest
        vec = table_vector_width(values, batch)
        launch = segment_launch(widest, vec)
        num_chunks = cdiv(keys.numel(), chunk)
        self._launch(
            self._kernels.table_segment_sum,
            (cdiv(num_chunks, launch.BLOCK_C), cdiv(widest, launch.BLOCK_D)),
            keys.device,
            values,
            order,
            keys,
            key_tables,
            *(sources or NO_SOURCES),
            batch.fields,
            grad_weight,
            partial_values,
            partial_keys,
            partial_tables,
            keys.numel(),
            batch.shape.num_rows,
            batch.num_tables,
            values.stride(0) // vec,
            values.stride(1),
            D=widest,
            VEC=vec,
            CHUNK=chunk,
            **launch.settings,
        )

    def _table_sample_weights(
        self,
        grad_output: Tensor,
        weight: Tensor,
        keys: Tensor,
        sources: Tensor,
        batch: TableBatch,
        grad: Tensor,
    ) -> None:
        widest = batch.shape.widest
        vec = min(table_vector_width(grad_output, batch), table_vector_width(weight, batch))
        block_d = min(_next_power_of_2(widest), 32 * vec)
        block_n = BAG_SAMPLE_WEIGHTS_VECTORS * vec // block_d
        self._launch(
            self._kernels.table_sample_weights,
            (cdiv(keys.numel(), block_n),),
            keys.device,
            grad_output,
            weight,
            keys,
            sources,
            batch.fields,
            grad,
            keys.numel(),
            batch.shape.num_rows,
            batch.num_tables,
            grad_output.stride(0) // vec,
            grad_output.stride(1),
            D=widest,
            VEC=vec,
            BLOCK_N=block_n,
            BLOCK_D=block_d,
        )

    def _gather_launch(
        self, layout: WordLayout, method: str
    ) -> tuple[Any, Callable[[int], tuple[int, ...]], dict[str, int]]:
        """Kernel, grid for a number of ids, and settings.

        Whole rows where a power of two of words makes full tiles of them, else a flat range.
        """
        widest = max(GATHER_ROWS)
        rows = GATHER_ROWS[min(_next_power_of_2(layout.row_words), widest)]
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

    @cached_property
    def _gradients(self) -> dict[str, Gradient]:
        return {
            "descriptor": self._scatter_add_descriptor,
            "one_hot": self._one_hot,
        }

    def _gradient_refusal(self, method: str, num_indices: int, grad_weight: Tensor) -> str | None:
        if method != "descriptor":
            return None
        if num_indices > MAX_COORDINATE:
            return too_many(num_indices, "ids")
        return self._descriptor_refusal(grad_weight)

    def _descriptor_refusal(self, table: Tensor) -> str | None:
        """What keeps the bulk copy engine from a table's rows; None: nothing."""
        capability = self._capability(table.device)
        if capability < DESCRIPTOR_CAPABILITY:
            return "compute capability {}.{}; it needs {}.{}".format(
                *capability, *DESCRIPTOR_CAPABILITY
            )
        layout = word_layout(table)
        if layout.word_bytes * layout.vec < VECTOR_BYTES or layout.row_stride < layout.row_words:
            return (
                f"rows of {table.shape[1]} x {table.dtype} at strides {table.stride()}; it needs rows "
                f"side by side, at multiples of {VECTOR_BYTES} bytes, and so many bytes long"
            )
        if table.shape[0] > MAX_COORDINATE:
            return too_many(table.shape[0], "rows")
        return None

    def _capability(self, device: torch.device) -> tuple[int, int]:
        if self._interpreted:
            return DESCRIPTOR_CAPABILITY
        return torch.cuda.get_device_capability(device)

    def _launch(
        self, kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, **settings: Any
    ) -> None:
        with self._guard(device):
            kernel[grid](*args, **settings)

    def _guard(self, device: torch.device) -> Any:
        """Triton launches on the current device; its interpreter runs one kernel at a time."""
        if self._interpreted:
            return _interpreter_lock
        if device.index is None or device.index == torch.cuda.current_device():
            return nullcontext()
        return torch.cuda.device(device)

    @cached_property
    def _unfused(self) -> dict[str, bool]:
        """Rounds every product before it is added, as the formulas say; the interpreter does anyhow."""
        return {} if self._interpreted else {"enable_fp_fusion": False}

    @cached_property
    def _interpreted(self) -> bool:
        return not isinstance(self._kernels.gather_rows, self._triton.JITFunction)

    @cached_property
    def _triton(self) -> Any:
        import triton

        return triton

    @cached_property
    def _view(self) -> Callable[[Tensor, Any], Any]:
        """A tensor as words of another dtype, without keeping it alive."""
        if not self._interpreted:
            return WordsOf
        # The interpreter reads more of a tensor than its address.
        return lambda tensor, dtype: self._triton.reinterpret(tensor.detach(), dtype)

    @cached_property
    def _tensor_descriptor(self) -> Any:
        from triton.tools.tensor_descriptor import TensorDescriptor

        return TensorDescriptor

    @cached_property
    def _words(self) -> dict[int, Any]:
        """Triton's integer of so many bytes."""
        from triton import language as tl

        return {1: tl.int8, 2: tl.int16, 4: tl.int32, 8: tl.int64}

    @cached_property
    def _kernels(self) -> SimpleNamespace:
        if self._triton.knobs.runtime.interpret:
            from ._triton_interpreter import complete

            complete()
        from ..kernels import (
            bag,
            counts,
            descriptor,
            gather,
            one_hot,
            radix_sort,
            renorm,
            row_update,
            scatter_add,
            segment_sum,
            table_batched,
        )

        return SimpleNamespace(
            gather_rows=gather.gather_rows_kernel,
            gather_flat=gather.gather_flat_kernel,
            gather_descriptor=descriptor.gather_descriptor_kernel,
            scatter_add=scatter_add.scatter_add_kernel,
            scatter_add_descriptor=descriptor.scatter_add_descriptor_kernel,
            one_hot=one_hot.one_hot_kernel,
            sum_splits=one_hot.sum_splits_kernel,
            sort_keys=radix_sort.sort_keys_kernel,
            digit_counts=radix_sort.digit_counts_kernel,
            digit_scatter=radix_sort.digit_scatter_kernel,
            segment_sum=segment_sum.segment_sum_kernel,
            renorm=renorm.renorm_kernel,
            counts=counts.counts_kernel,
            select_rows=row_update.select_rows_kernel,
            row_update=row_update.row_update_kernel,
            rowwise_adagrad=row_update.rowwise_adagrad_kernel,
            bag_sum=bag.bag_sum_kernel,
            bag_combine=bag.bag_combine_kernel,
            bag_max=bag.bag_max_kernel,
            bag_of=bag.bag_of_kernel,
            bag_sample_weights=bag.bag_sample_weights_kernel,
            table_bag_sum=table_batched.table_bag_sum_kernel,
            table_gather=table_batched.table_gather_kernel,
            table_keys=table_batched.table_keys_kernel,
            table_scatter_add=table_batched.table_scatter_add_kernel,
            table_segment_sum=table_batched.table_segment_sum_kernel,
            table_sample_weights=table_batched.table_sample_weights_kernel,
        )


class WordsOf:
    """A tensor's memory under another dtype, all that a launch asks for: triton.reinterpret takes five
    times as long, and keeps the tensor alive.
    """

    __slots__ = ("_address", "dtype")

    def __init__(self, tensor: Tensor, dtype: Any) -> None:
        self._address = tensor.data_ptr()
        self.dtype = dtype

    def data_ptr(self) -> int:
        return self._address


@cache
def segment_launch(embedding_dim: int, vec: int) -> SegmentLaunch:
    """One warp wide, `vec` columns a lane; narrow rows put several chunks side by side."""
    columns = 32 * vec
    block_d = min(_next_power_of_2(embedding_dim), columns)
    return SegmentLaunch(BLOCK_C=columns // block_d, BLOCK_D=block_d)


@cache
def update_launch(embedding_dim: int, vec: int, held_bytes: int) -> SegmentLaunch:
    """`segment_launch`; wide enough for a whole row of that many bytes a column, unless they are 0."""
    launch = segment_launch(embedding_dim, vec)
    if held_bytes == 0 or embedding_dim <= launch.BLOCK_D:
        return launch
    block_d = _next_power_of_2(embedding_dim)
    num_warps = max(block_d * held_bytes // (32 * HELD_BYTES), 1)
    return SegmentLaunch(BLOCK_C=1, BLOCK_D=block_d, UNROLL=2, num_warps=num_warps)


def _is_stochastic(update: RowUpdate, weight: Tensor) -> bool:
    return update.stream is not None and weight.element_size() == 2


def too_many(number: int, what: str) -> str:
    """Why tensor descriptors refuse so many rows or ids."""
    return f"{number} {what}; it takes {MAX_COORDINATE}"


@cache
def gather_descriptor_launch(row_words: int) -> GatherDescriptorLaunch:
    """Long rows alone in a program, short ones after one another."""
    block_d = min(_next_power_of_2(row_words), DESCRIPTOR_WORDS)
    if block_d == DESCRIPTOR_WORDS:
        return GatherDescriptorLaunch(ROWS=1, BLOCK_D=block_d, STAGES=1)
    in_flight = min(DESCRIPTOR_WORDS // block_d, DESCRIPTOR_ROWS)
    return GatherDescriptorLaunch(ROWS=16, BLOCK_D=block_d, STAGES=in_flight + 1)


@cache
def scatter_descriptor_launch(embedding_dim: int) -> ScatterDescriptorLaunch:
    """512 columns in flight, 16 a thread, in at most 8 rows."""
    block_d = min(_next_power_of_2(embedding_dim), 256)
    return ScatterDescriptorLaunch(ROWS=min(512 // block_d, 8), BLOCK_D=block_d)


@cache
def one_hot_launch(num_embeddings: int, embedding_dim: int) -> OneHotLaunch:
    """The table's entry, no wider than the rows are; a matrix unit takes 16 columns at the least."""
    launch = ONE_HOT[max(_next_power_of_2(num_embeddings), min(ONE_HOT))]
    block_d = min(launch.BLOCK_D, max(_next_power_of_2(embedding_dim), 16))
    return replace(launch, BLOCK_D=block_d)


def one_hot_split(num_indices: int, num_embeddings: int, embedding_dim: int, block_n: int) -> int:
    """Ids a split of one_hot_kernel, a multiple of block_n.

    It follows from the shapes alone, so the order of the additions is the same on every card.
    """
    splits = min(MAX_SPLITS, MAX_EXTRA_BYTES // (4 * num_embeddings * embedding_dim))
    size = max(MIN_SPLIT, MIN_SPLIT_PER_ROW * num_embeddings, cdiv(num_indices, max(splits, 1)))
    return cdiv(size, block_n) * block_n


@cache
def bag_launch(embedding_dim: int, vec: int) -> BagLaunch:
    """One warp wide, `vec` columns a lane; narrow rows put several bags side by side."""
    columns = 32 * vec
    block_d = min(_next_power_of_2(embedding_dim), columns)
    block_b = columns // block_d
    return BagLaunch(BLOCK_B=block_b, BLOCK_D=block_d, BLOCK_L=32 // block_b)


def _next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


# Every position's gradient is a row of its own.
NO_SOURCES = (None, None, None)
_interpreter_lock = threading.RLock()
