"""The CUDA C++ kernels behind the `Backend` protocol: compiled by NVRTC, launched by CuPy on torch's stream.

CuPy's RawModule would do both, but it refuses to work without CUDA's headers, which these kernels do not need
and pip does not bring, and it compiles with -ftz=true, which turns subnormal gradients into zeros.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from importlib.util import find_spec
from math import gcd
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..bags import Bags
from ..bounds import BoundsRecord
from ..row_update import RowUpdate
from ..tables import TableBatch
from . import gather_method
from .kernel_backend import (
    BagSources,
    Gather,
    SortDigit,
    SortSource,
    SortTiles,
    cdiv,
    no_kernel,
    norm_name,
)
from .layout import table_vector_width, vector_width, word_layout
from .table_kernels import TableKernels

# 64-bit float atomics begin here.
MIN_CAPABILITY = (6, 0)
# One atomic instruction adds two or four neighbouring floats from here on.
VECTOR_ATOMICS_CAPABILITY = (9, 0)
# Columns a thread of a kernel that sums: more would cost registers and save nothing.
MAX_SEGMENT_VECTOR = 4
MAX_BLOCKS_Y = 65535
OPTIONS = ("-std=c++17",)
# row_update.cu rounds every product before it is added, as its formulas say.
UNFUSED = {"row_update": ("-fmad=false",)}

# Blocks and threads, (x, y) each.
Grid = tuple[tuple[int, int], tuple[int, int]]


class Kernel(NamedTuple):
    """One kernel of one file, as NVRTC names it."""

    stem: str  # of the file in gpu_embed/kernels
    expression: str  # its name in C++, with template arguments


class Compiled(NamedTuple):
    """What NVRTC made of some kernels of one file."""

    image: bytes  # cubin, or PTX for cards newer than NVRTC
    symbols: dict[str, str]  # the name of each expression in the image
    log: str


@dataclass(frozen=True)
class RowsLaunch:
    """gather_rows_kernel: threads across a row, rows side by side in a block, and rows a thread."""

    threads: tuple[int, int]
    ROWS: int = 4

    def grid(self, num_rows: int, row_words: int) -> Grid:
        across, down = self.threads
        # The threads stride over what so many blocks leave.
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
    """A kernel whose threads walk alone: threads a block, each with one chunk, bag or tile, and loads in flight."""

    threads: int = 256
    UNROLL: int = 4

    def grid(self, items: int) -> Grid:
        return (cdiv(items, self.threads), 1), (self.threads, 1)


# The settings below keep four loads in flight a thread without spills; they are starting points until they
# are measured.

# By the largest power of two that divides the words of a row; rows of other lengths go to GATHER_FLAT, which
# has no lanes to spare, but a division to pay.
GATHER_ROWS = {
    32: RowsLaunch((32, 8)),
    64: RowsLaunch((64, 4)),
    128: RowsLaunch((128, 2)),
}
GATHER_FLAT = FlatLaunch(UNROLL=4)
GATHER_METHODS = ("rows", "flat")
# Rows so long that the idle lanes at their end do not matter.
LONG_ROW_WORDS = 1024
LONG_ROW = RowsLaunch((128, 2))
SCATTER_ADD = FlatLaunch(UNROLL=4)
SEGMENT_SUM = WalkLaunch()
BAG = WalkLaunch(threads=128)
SORT_KEYS = FlatLaunch()
# Small blocks, so that a few tiles spread over all multiprocessors.
DIGIT = WalkLaunch(threads=64)
# 132 multiprocessors with 1024 threads each make about as many.
SORT_TILES = SortTiles(STEP=64, TILES=2**17, MAX_STEPS=2**20)
COUNTS = FlatLaunch()
SELECT_ROWS = FlatLaunch()
ROWWISE_ADAGRAD = FlatLaunch(threads=64)
RENORM = FlatLaunch(threads=64)
BAG_COMBINE = FlatLaunch()
BAG_OF = FlatLaunch()
BAG_SAMPLE_WEIGHTS = FlatLaunch(threads=128)
TABLE_BAG = WalkLaunch(threads=128)
TABLE_GATHER = FlatLaunch()
TABLE_KEYS = FlatLaunch()
TABLE_SAMPLE_WEIGHTS = FlatLaunch(threads=128)

FLOATS = {
    torch.float32: "float",
    torch.float64: "double",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}
INTEGERS = {
    torch.uint8: "uint8",
    torch.int16: "int16",
    torch.int32: "int32",
    torch.int64: "int64",
}
# In the order of the enum in renorm.cu.
NORMS = ("inf", "-inf", "0", "1", "2", "p")
# In the order of the enum in row_update.cu.
FORMULAS = ("sgd", "adagrad", "adam")


class CupyBackend(TableKernels):
    """`Backend` on the CUDA C++ kernels in gpu_embed.kernels."""

    name = "cupy"
    sort_tiles = SORT_TILES

    def __init__(self) -> None:
        self._functions: dict[tuple[int, Kernel], Any] = {}

    def unusable_reason(self, device: torch.device) -> str | None:
        if device.type != "cuda":
            return f"cupy kernels need a CUDA device, not {device.type}"
        if find_spec("cupy") is None:
            return "cupy is not installed (pip install 'gpu_embed[cupy12]' or 'gpu_embed[cupy13]')"
        if not torch.cuda.is_available():
            return "torch finds no CUDA device"
        if torch.version.hip is not None:
            return "only NVIDIA cards are supported"
        try:
            cupy = _cupy()
            cupy.cuda.runtime.getDeviceCount()
        except Exception as error:  # a wheel for another CUDA, a missing library, an old driver
            return f"cupy does not work here: {error}"
        try:
            archs = cupy.cuda.nvrtc.getSupportedArchs()
        except Exception as error:
            return f"cupy finds no NVRTC (pip install nvidia-cuda-nvrtc-cu12): {error}"
        major, minor = torch.cuda.get_device_capability(device)
        lowest = max(MIN_CAPABILITY, divmod(min(archs), 10))
        if (major, minor) < lowest:
            return (
                f"this NVRTC compiles for compute capability {lowest[0]}.{lowest[1]} and newer, "
                f"{torch.cuda.get_device_name(device)} has {major}.{minor}"
            )
        return None

    def _prepare_gather(self, weight: Tensor) -> Gather:
        layout = word_layout(weight)
        # Two words of 8 bytes that one access moves are a word of 16 here.
        word = f"word{layout.word_bytes * layout.vec}"
        row_words = layout.row_words // layout.vec
        rows = GATHER_ROWS.get(gcd(row_words, max(GATHER_ROWS)))
        if rows is None and row_words >= LONG_ROW_WORDS:
            rows = LONG_ROW
        method = gather_method.forced(self._gather_refusal)
        if method == "rows":
            rows = rows or LONG_ROW
        elif method == "flat":
            rows = None
        if rows is not None:
            kernel = Kernel("gather", f"gather_rows_kernel<{word}, {rows.ROWS}>")
        else:
            kernel = Kernel("gather", f"gather_flat_kernel<{word}, {GATHER_FLAT.UNROLL}>")
        # Not the table itself: what is prepared must not keep it alive.
        address = weight.data_ptr()
        device = weight.device
        num_embeddings = weight.shape[0]

        def gather(
            ids: Tensor,
            num_indices: int,
            output: Tensor,
            zero_idx: int,
            record: BoundsRecord | None,
        ) -> None:
            self._launch(
                kernel,
                *(
                    GATHER_FLAT.grid(num_indices * row_words)
                    if rows is None
                    else rows.grid(num_indices, row_words)
                ),
                device,
                address,
                ids,
                output,
                None if record is None else record.words,
                None if record is None else record.flag,
                num_indices,
                num_embeddings,
                zero_idx,
                layout.row_stride // layout.vec,
                layout.col_stride,
                row_words,
                ids.element_size(),
            )

        return gather

    def _gather_refusal(self, method: str) -> str | None:
        return None if method in GATHER_METHODS else no_kernel(self.name)

    def _scatter_add(
        self,
        grad_output: Tensor,
        ids: Tensor,
        sources: BagSources | None,
        grad_weight: Tensor,
        padding_idx: int,
    ) -> None:
        num_embeddings, embedding_dim = grad_weight.shape
        vec = 1
        # Without vector atomics, lanes that lie VEC apart would make more memory transactions of one add.
        if (
            grad_output.dtype == torch.float32
            and self._capability(ids.device) >= VECTOR_ATOMICS_CAPABILITY
        ):
            vec = vector_width(grad_output)
        arguments = f"{FLOATS[grad_output.dtype]}, {vec}, {SCATTER_ADD.UNROLL}{_with_bags(sources)}"
        self._launch(
            Kernel("scatter_add", f"scatter_add_kernel<{arguments}>"),
            *SCATTER_ADD.grid(ids.numel() * (embedding_dim // vec)),
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
            embedding_dim,
            ids.element_size(),
            _bag_bytes(sources),
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
            Kernel("radix_sort", "sort_keys_kernel"),
            *SORT_KEYS.grid(ids.numel()),
            ids.device,
            ids,
            order,
            keys,
            ids.numel(),
            num_embeddings,
            padding_idx,
            ids.element_size(),
            _itemsize(order),
            keys.element_size(),
        )

    def _digit_counts(self, source: SortSource, counters: Tensor, digit: SortDigit) -> None:
        self._launch(
            self._digit_kernel("digit_counts_kernel", source, counters, source.keys),
            *DIGIT.grid(digit.num_tiles),
            counters.device,
            *source,
            counters,
            *digit,
            _itemsize(source.ids),
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
            self._digit_kernel("digit_scatter_kernel", source, counters, sorted_keys),
            *DIGIT.grid(digit.num_tiles),
            counters.device,
            *source,
            counters,
            sorted_order,
            sorted_keys,
            *digit,
            _itemsize(source.ids),
        )

    def _digit_kernel(
        self, name: str, source: SortSource, counters: Tensor, keys: Tensor | None
    ) -> Kernel:
        """A kernel of the radix sort for keys of that dtype; None: for keys that are only looked at."""
        key = INTEGERS[torch.int64 if keys is None else keys.dtype]
        from_ids = str(source.keys is None).lower()
        arguments = (
            f"{key}, {INTEGERS[counters.dtype]}, {from_ids}, {SORT_TILES.STEP}, {DIGIT.UNROLL}"
        )
        return Kernel("radix_sort", f"{name}<{arguments}>")

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
        atomic_ends = partial_values is None
        # scale_grad_by_freq is rare: not worth a kernel for each width.
        vec = 1 if scale_grad_by_freq else min(vector_width(values), MAX_SEGMENT_VECTOR)
        arguments = (
            f"{FLOATS[values.dtype]}, {FLOATS[grad_weight.dtype]}, {vec}, "
            f"{_cpp(scale_grad_by_freq)}, {SEGMENT_SUM.UNROLL}, {_cpp(atomic_ends)}{_with_bags(sources)}"
        )
        num_chunks = cdiv(keys.numel(), chunk)
        self._launch(
            Kernel("segment_sum", f"segment_sum_kernel<{arguments}>"),
            *SEGMENT_SUM.grid(num_chunks * (embedding_dim // vec)),
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
            embedding_dim,
            chunk,
            _itemsize(order),
            keys.element_size(),
            _bag_bytes(sources),
        )

    def _select_rows(self, ids: Tensor, rows: Tensor, chosen: Tensor) -> None:
        self._launch(
            Kernel("row_update", "select_rows_kernel"),
            *SELECT_ROWS.grid(ids.numel()),
            ids.device,
            ids,
            rows,
            chosen,
            ids.numel(),
            rows.numel(),
        )

    def _holds_row(self, embedding_dim: int, acc_dtype: torch.dtype) -> bool:
        return False

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
        widths = (vector_width(matrix) for matrix in (values, weight, partial_values))
        vec = min(*widths, MAX_SEGMENT_VECTOR)
        arguments = f"{FLOATS[values.dtype]}, {FLOATS[weight.dtype]}, {vec}, {SEGMENT_SUM.UNROLL}"
        num_chunks = cdiv(keys.numel(), chunk)
        seed, step = update.stream or (0, 0)
        self._launch(
            Kernel("row_update", f"row_update_kernel<{arguments}>"),
            *SEGMENT_SUM.grid(num_chunks * (embedding_dim // vec)),
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
            weight.stride(0),
            weight.stride(1),
            float(update.step_size),
            float(update.decay),
            float(update.eps),
            float(update.avg_weight),
            float(update.sq_weight),
            float(update.grad_scale),
            seed,
            step,
            embedding_dim,
            FORMULAS.index(update.formula),
            int(update.rounds_at_random(weight.dtype)),
            chunk,
            _itemsize(order),
            keys.element_size(),
        )

    def _rowwise_adagrad(
        self, update: RowUpdate, total: Tensor, keys: Tensor, weight: Tensor, state: Tensor
    ) -> None:
        num_embeddings, embedding_dim = weight.shape
        seed, step = update.stream or (0, 0)
        self._launch(
            Kernel("row_update", f"rowwise_adagrad_kernel<{FLOATS[weight.dtype]}>"),
            *ROWWISE_ADAGRAD.grid(keys.numel()),
            keys.device,
            total,
            keys,
            weight,
            state,
            update.lr,
            num_embeddings,
            *weight.stride(),
            float(update.step_size),
            float(update.eps),
            float(update.grad_scale),
            seed,
            step,
            embedding_dim,
            int(update.rounds_at_random(weight.dtype)),
            keys.numel(),
        )

    def _renorm(self, weight: Tensor, keys: Tensor, max_norm: float, norm_type: float) -> None:
        num_embeddings, embedding_dim = weight.shape
        self._launch(
            Kernel("renorm", f"renorm_kernel<{FLOATS[weight.dtype]}>"),
            *RENORM.grid(keys.numel()),
            weight.device,
            weight,
            keys,
            keys.numel(),
            num_embeddings,
            weight.stride(0),
            weight.stride(1),
            max_norm,
            norm_type,
            embedding_dim,
            NORMS.index(norm_name(norm_type)),
            keys.element_size(),
        )

    def _counts(self, ids: Tensor, counts: Tensor) -> None:
        self._launch(
            Kernel("counts", "counts_kernel"),
            *COUNTS.grid(ids.numel()),
            ids.device,
            ids,
            counts,
            ids.numel(),
            counts.numel(),
            ids.element_size(),
        )

    def _bag_programs(self, weight: Tensor, num_bags: int) -> int:
        # Counted in warps, as for Triton.
        return cdiv(num_bags * (weight.shape[1] // _bag_vector(weight)), 32)

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
        vec = _bag_vector(weight)
        arguments = (
            f"{FLOATS[weight.dtype]}, {FLOATS[output.dtype]}, {vec}, "
            f"{_cpp(mean)}, {_cpp(splits > 1)}, {BAG.UNROLL}"
        )
        (blocks, _), threads = BAG.grid(bags.num_bags * (embedding_dim // vec))
        self._launch(
            Kernel("bag", f"bag_sum_kernel<{arguments}>"),
            (blocks, splits),
            threads,
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
            embedding_dim,
            bags.indices.element_size(),
            _offset_bytes(bags),
        )

    def _bag_combine(self, partial: Tensor, sizes: Tensor | None, output: Tensor) -> None:
        num_bags, embedding_dim = output.shape
        self._launch(
            Kernel("bag", f"bag_combine_kernel<{FLOATS[output.dtype]}>"),
            *BAG_COMBINE.grid(output.numel()),
            output.device,
            partial,
            sizes,
            output,
            len(partial),
            num_bags,
            embedding_dim,
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
        vec = _bag_vector(weight)
        self._launch(
            Kernel("bag", f"bag_max_kernel<{FLOATS[weight.dtype]}, {vec}, {BAG.UNROLL}>"),
            *BAG.grid(bags.num_bags * (embedding_dim // vec)),
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
            embedding_dim,
            bags.indices.element_size(),
            _offset_bytes(bags),
        )

    def _bag_of(self, bags: Bags, bag_of: Tensor, sizes: Tensor | None, padding_idx: int) -> None:
        self._launch(
            Kernel("bag", "bag_of_kernel"),
            *BAG_OF.grid(bag_of.numel()),
            bag_of.device,
            bags.indices,
            bags.offsets,
            bag_of,
            sizes,
            *bags.counts(),
            padding_idx,
            bags.indices.element_size(),
            _offset_bytes(bags),
            bag_of.element_size(),
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
        vec = min(_bag_vector(grad_output), _bag_vector(weight))
        self._launch(
            Kernel("bag", f"bag_sample_weights_kernel<{FLOATS[weight.dtype]}, {vec}>"),
            *BAG_SAMPLE_WEIGHTS.grid(ids.numel()),
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
            embedding_dim,
            ids.element_size(),
            bag_of.element_size(),
        )

    def _table_programs(self, matrix: Tensor, batch: TableBatch) -> int:
        num_vectors = batch.bags_per_table * (batch.width // _table_vector(matrix, batch))
        return cdiv(num_vectors, 32)

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
        vec = _table_vector(weight, batch)
        arguments = (
            f"{FLOATS[weight.dtype]}, {FLOATS[output.dtype]}, {vec}, "
            f"{_cpp(splits > 1)}, {TABLE_BAG.UNROLL}"
        )
        (blocks, _), threads = TABLE_BAG.grid(batch.bags_per_table * (batch.width // vec))
        self._launch(
            Kernel("table_batched", f"table_bag_sum_kernel<{arguments}>"),
            (blocks, splits),
            threads,
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
            batch.width,
            batch.indices.element_size(),
            batch.offsets.element_size(),
        )

    def _table_gather(
        self,
        weight: Tensor,
        batch: TableBatch,
        output: Tensor,
        zero_padding: bool,
        record: BoundsRecord | None,
    ) -> None:
        word_bytes = table_vector_width(weight, batch) * weight.element_size()
        row_words = weight.shape[1] * weight.element_size() // word_bytes
        self._launch(
            Kernel("table_batched", f"table_gather_kernel<word{word_bytes}>"),
            *TABLE_GATHER.grid(batch.indices.numel() * row_words),
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
            int(zero_padding),
            row_words,
            batch.indices.element_size(),
            batch.offsets.element_size(),
        )

    def _table_keys(
        self,
        batch: TableBatch,
        keys: Tensor | None,
        sources: Tensor | None,
        sizes: Tensor | None,
    ) -> None:
        self._launch(
            Kernel("table_batched", "table_keys_kernel"),
            *TABLE_KEYS.grid(batch.indices.numel()),
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
            batch.indices.element_size(),
            batch.offsets.element_size(),
            _itemsize(keys),
            _itemsize(sources),
        )

    def _table_scatter_add(
        self,
        grad_output: Tensor,
        per_sample_weights: Tensor | None,
        batch: TableBatch,
        grad_weight: Tensor,
        splits: int,
    ) -> None:
        vec = 1
        if (
            grad_output.dtype == torch.float32
            and self._capability(grad_output.device) >= VECTOR_ATOMICS_CAPABILITY
        ):
            vec = table_vector_width(grad_output, batch)
        arguments = f"{FLOATS[grad_output.dtype]}, {vec}, {TABLE_BAG.UNROLL}"
        (blocks, _), threads = TABLE_BAG.grid(batch.bags_per_table * (batch.width // vec))
        self._launch(
            Kernel("table_batched", f"table_scatter_add_kernel<{arguments}>"),
            (blocks, splits),
            threads,
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
            batch.width,
            batch.indices.element_size(),
            batch.offsets.element_size(),
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
        vec = _table_vector(values, batch)
        arguments = (
            f"{FLOATS[values.dtype]}, {FLOATS[grad_weight.dtype]}, {vec}, {SEGMENT_SUM.UNROLL}"
        )
        num_chunks = cdiv(keys.numel(), chunk)
        self._launch(
            Kernel("table_batched", f"table_segment_sum_kernel<{arguments}>"),
            *SEGMENT_SUM.grid(num_chunks * (widest // vec)),
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
            widest,
            chunk,
            _itemsize(order),
            keys.element_size(),
            _bag_bytes(sources),
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
        vec = min(_table_vector(grad_output, batch), _table_vector(weight, batch))
        self._launch(
            Kernel("table_batched", f"table_sample_weights_kernel<{FLOATS[weight.dtype]}, {vec}>"),
            *TABLE_SAMPLE_WEIGHTS.grid(keys.numel()),
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
            keys.element_size(),
            sources.element_size(),
        )

    def _launch(
        self,
        kernel: Kernel,
        blocks: tuple[int, int],
        threads: tuple[int, int],
        device: torch.device,
        *args: Tensor | int | float | None,
    ) -> None:
        """Run a kernel on torch's current stream; tensors go by address, int as int64, float as double."""
        if 0 in blocks:
            return
        cupy = _cupy()
        index = torch.cuda.current_device() if device.index is None else device.index
        # torch and CuPy may each carry a copy of the CUDA runtime, so each is told the device.
        with torch.cuda.device(index), cupy.cuda.Device(index):
            function = self._functions.get((index, kernel))
            if function is None:
                function = self._functions[index, kernel] = self._load(kernel, device)
            stream = _Stream(torch.cuda.current_stream(index).cuda_stream)
            function(blocks, threads, [_address(arg) for arg in args], stream=stream)

    def _load(self, kernel: Kernel, device: torch.device) -> Any:
        """The kernel, compiled for the current device and loaded there."""
        major, minor = self._capability(device)
        compiled = compile_kernels(kernel.stem, (kernel.expression,), 10 * major + minor)
        module = _cupy().cuda.Module()
        module.load(compiled.image)
        return module.get_function(compiled.symbols[kernel.expression])

    def _capability(self, device: torch.device) -> tuple[int, int]:
        return torch.cuda.get_device_capability(device)


# Every position's gradient is a row of its own.
NO_SOURCES = (None, None, None)


def _with_bags(sources: BagSources | None) -> str:
    """The template argument that makes a gradient kernel look up bags."""
    return ", true" if sources else ""


def _bag_bytes(sources: BagSources | None) -> int:
    return sources.bag_of.element_size() if sources else 0


def _offset_bytes(bags: Bags) -> int:
    return 0 if bags.offsets is None else bags.offsets.element_size()


def _bag_vector(matrix: Tensor) -> int:
    return min(vector_width(matrix), MAX_SEGMENT_VECTOR)


def _table_vector(values: Tensor, batch: TableBatch) -> int:
    return min(table_vector_width(values, batch), MAX_SEGMENT_VECTOR)


def _cpp(flag: bool) -> str:
    return "true" if flag else "false"


def compile_kernels(
    stem: str, expressions: Sequence[str], arch: int, options: tuple[str, ...] = ()
) -> Compiled:
    """Compile kernels of gpu_embed/kernels/<stem>.cu; needs no GPU and no CUDA headers.

    Args:
        arch: ten times the compute capability. One that NVRTC does not know gets PTX for the newest older
            one, which the driver compiles.
        options: further options of NVRTC.

    Raises RuntimeError with NVRTC's log if the code does not compile.
    """
    nvrtc = _cupy().cuda.nvrtc
    known = nvrtc.getSupportedArchs()
    real = arch in known
    target = f"sm_{arch}" if real else f"compute_{max(a for a in known if a <= arch)}"
    program = nvrtc.createProgram(source(stem), f"{stem}.cu", [], [])
    try:
        for expression in expressions:
            nvrtc.addNameExpression(program, expression)
        try:
            nvrtc.compileProgram(
                program, (f"-arch={target}", *OPTIONS, *UNFUSED.get(stem, ()), *options)
            )
        except nvrtc.NVRTCError as error:
            log = nvrtc.getProgramLog(program)
            raise RuntimeError(
                f"gpu_embed: NVRTC cannot compile {stem}.cu for {target}\n{log}"
            ) from error
        # CuPy cuts off the image's last byte, taking it for the end of a string.
        image = nvrtc.getCUBIN(program) + b"\0" if real else nvrtc.getPTX(program)
        symbols = {name: nvrtc.getLoweredName(program, name) for name in expressions}
        return Compiled(image, symbols, nvrtc.getProgramLog(program))
    finally:
        nvrtc.destroyProgram(program)


@cache
def source(stem: str) -> str:
    """A kernel file with what it includes put in its place, once, so that NVRTC looks for no file."""
    folder = resources.files("gpu_embed.kernels")
    included: set[str] = set()

    def expanded(name: str) -> str:
        return re.sub(
            r'#include "(\w+\.cuh)"\n', lambda found: once(found[1]), (folder / name).read_text()
        )

    def once(name: str) -> str:
        if name in included:
            return ""
        included.add(name)
        return expanded(name).replace("#pragma once\n", "")

    return expanded(f"{stem}.cu")


class _Stream(NamedTuple):
    """What CuPy asks of a stream. Its own class for foreign streams has changed between versions."""

    ptr: int


@cache
def _cupy() -> Any:
    import cupy

    return cupy


def _address(arg: Tensor | int | float | None) -> int | float:
    if isinstance(arg, Tensor):
        return arg.data_ptr()
    return 0 if arg is None else arg


def _itemsize(tensor: Tensor | None) -> int:
    """Bytes an item; 0 for a tensor that the kernel does without."""
    return 0 if tensor is None else tensor.element_size()
