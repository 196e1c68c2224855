"""What the Triton and the CUDA C++ backend share: everything between the protocol and a single launch."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ...bags import Bags
from ...bounds import BoundsRecord
from ...dtypes import accumulation
from ...own_thread import on_own_thread
from ...row_update import RowUpdate
from .. import logger
from ..protocol import PreparedEmbedding
from .access import RowSteps, flat_ids, row_matrix, row_numbers, sort_key_dtype
from .gradient_method import choose

# Ids that one program walks in turn if no bag can be longer: to cut bags takes another launch.
MAX_WHOLE_BAG = 512
# Else it walks so many at the least and at the most, and between them such that there are so many chunks.
MIN_BAG_CHUNK = 64
MAX_BAG_CHUNK = 1024
BAG_CHUNKS = 4096
# Programs that keep a large card busy; long bags of batched tables are split until there are so many.
MIN_BAG_PROGRAMS = 2048
# Ids a part of a split bag, at the least and on average.
MIN_SPLIT_LENGTH = 64
MAX_BAG_SPLITS = 512
# Keys a chunk of the sorted gradient: few, for parallelism.
CHUNK = 32
# A backward may take 16 bytes an id and 64 MiB beyond the gradient. A quarter of the 64 MiB is left to the
# allocator, which rounds each of the few large blocks up, by 1 MiB at most; the rest is what is planned with.
BYTES_PER_ID = 16
MAX_EXTRA_BYTES = 48 * 2**20
# Up to here positions are int32.
MAX_INT32_IDS = 2**31 - 1
# Bits that a pass of the radix sort sorts by, as in kernels/radix_sort.
DIGIT_BITS = 4


class SortSource(NamedTuple):
    """What a pass of the radix sort reads."""

    ids: Tensor | None  # [num_indices]; None: no longer needed
    order: Tensor | None  # [num_keys]; None: first pass
    keys: Tensor | None  # [num_keys]; None: made of the ids


class SortDigit(NamedTuple):
    """The numbers that a pass of the radix sort is launched with, in the order of the kernels' arguments."""

    num_indices: int
    num_keys: int
    num_embeddings: int
    padding_idx: int
    tile_size: int
    num_tiles: int
    shift: int


@dataclass(frozen=True)
class SortTiles:
    """How the radix sort cuts its keys into tiles, each for one program or thread."""

    STEP: int  # keys; divides each tile and, since they are padded, all keys
    TILES: int  # as many as a large card runs at once, if the keys are that many steps
    MAX_STEPS: int  # a tile

    def size(self, num_keys: int) -> int:
        """Keys a tile."""
        return self.STEP * min(cdiv(num_keys, self.STEP * self.TILES), self.MAX_STEPS)


# grad_output [N, D], ids [N], grad_weight [V, D] (zero on entry), padding_idx.
Gradient = Callable[[Tensor, Tensor, Tensor, int], None]


# gather(ids, num_indices, output, zero_idx, record) from one table; ids are contiguous, of any shape.
Gather = Callable[[Tensor, int, Tensor, int, BoundsRecord | None], None]


class BagParts(NamedTuple):
    """What the parts of cut bags come to, two parts a chunk, in the order that kernels/bag.py gives them."""

    chunk_length: int
    values: Tensor  # [2 * num_chunks, D]
    sizes: Tensor | None  # int64 [2 * num_chunks]: for a mean, how many ids count


class BagSources(NamedTuple):
    """Where the gradient of each position of some bags comes from."""

    bag_of: Tensor  # [N]: its bag, which is the row of grad_output; -1: none
    per_sample_weights: Tensor | None  # [N]: multiplies that row
    sizes: Tensor | None  # int32 [B]: divides that row


# Every position's gradient is a row of its own.
NO_SOURCES = (None, None, None)


class KernelBackend(ABC):
    """A `Backend` but for its name, `unusable_reason`, and one launch a kernel.

    The launches take ids flat and contiguous, and allocate nothing.
    """

    name: str
    sort_tiles: SortTiles

    def _launch_failure(self, device: torch.device) -> str | None:
        """Why no kernel runs on this CUDA device, though all that it needs is there; None: one has run.

        A C compiler, the driver's library or a folder for the cache may be missing, or the compiler too old for the
        card: only a launch tells. Asked once a device, by the smallest lookup.
        """
        index = torch.cuda.current_device() if device.index is None else device.index
        if index not in self._launch_failures:
            if torch.cuda.is_current_stream_capturing():
                return None  # A graph would capture it; ask again later.
            try:
                on_own_thread(self._try_launch, torch.device("cuda", index))
                reason = None
            except torch.OutOfMemoryError:
                return (
                    None  # The card is full, which is not for good; the lookup itself will say so.
                )
            except Exception as error:
                reason = f"{self.name} cannot launch a kernel here: {_first_line(error)}"
                logger.warning("gpu_embed: %s", reason)
            self._launch_failures[index] = reason
        return self._launch_failures[index]

    @cached_property
    def _launch_failures(self) -> dict[int, str | None]:
        """By the device's index."""
        return {}

    def _try_launch(self, device: torch.device) -> None:
        with torch.cuda.device(device):
            weight = torch.ones(1, 4, device=device)
            rows = self.embedding(
                weight, torch.zeros(1, dtype=torch.int64, device=device), -1, None
            )
            if not torch.equal(rows, weight):
                raise RuntimeError("the kernel ran and gave other numbers than the table's")

    def embedding(
        self, weight: Tensor, indices: Tensor, zero_idx: int, record: BoundsRecord | None
    ) -> Tensor:
        return self.prepare_embedding(weight)(weight, indices, zero_idx, record)

    def prepare_embedding(self, weight: Tensor) -> PreparedEmbedding:
        if weight.element_size() == 16 and weight.stride(1) != 1:
            return self._embedding_of_copy
        embedding_dim = weight.shape[1]
        gather = self._prepare_gather(weight)

        def embedding(
            weight: Tensor, indices: Tensor, zero_idx: int, record: BoundsRecord | None
        ) -> Tensor:
            output = weight.new_empty(*indices.shape, embedding_dim)
            num_indices = indices.numel()
            if num_indices:
                gather(indices.contiguous(), num_indices, output, zero_idx, record)
            return output

        return embedding

    def _embedding_of_copy(
        self, weight: Tensor, indices: Tensor, zero_idx: int, record: BoundsRecord | None
    ) -> Tensor:
        """For items of 16 bytes whose columns are apart: no word holds one, so its two must be adjacent."""
        return self.embedding(weight.contiguous(), indices, zero_idx, record)

    def embedding_dense_backward(
        self,
        grad_output: Tensor,
        indices: Tensor,
        num_embeddings: int,
        padding_idx: int,
        scale_grad_by_freq: bool,
    ) -> Tensor:
        matrix, steps = row_matrix(grad_output)
        return self._dense_backward(
            matrix, steps, indices, None, num_embeddings, padding_idx, scale_grad_by_freq
        )

    def _dense_backward(
        self,
        grad_output: Tensor,
        steps: list[RowSteps],
        indices: Tensor,
        bag_sources: Callable[[], BagSources] | None,
        num_embeddings: int,
        padding_idx: int,
        scale_grad_by_freq: bool,
    ) -> Tensor:
        """Rows of grad_output [*, D], one a position unless there are bags, summed over each id's positions.

        `steps` lead from one position's row to the next, as `row_matrix` says.
        """
        num_indices, embedding_dim = indices.numel(), grad_output.shape[1]
        grad_weight = grad_output.new_zeros((num_embeddings, embedding_dim))
        method = choose(
            num_indices,
            num_embeddings,
            embedding_dim,
            grad_output.dtype,
            torch.are_deterministic_algorithms_enabled(),
            scale_grad_by_freq,
            lambda method: (
                self._gradient_refusal(method, num_indices, grad_weight)
                if bag_sources is None or method not in self._gradients
                else "bags"
            ),
        )
        if method in ("sorted", "sorted_atomic"):
            keys, order = self._sorted_keys(indices, num_embeddings, padding_idx)
            # Not made before the sort has freed its memory.
            sources = bag_sources() if bag_sources else None
            rows = row_numbers(steps, indices.device)
            if rows is not None:
                order = rows.index_select(0, order)
                del rows
            if method == "sorted":
                self._sum_runs(grad_output, order, keys, sources, grad_weight, scale_grad_by_freq)
            else:
                # One level: atomics add what runs leave at the ends of chunks.
                self._segment_sum(
                    grad_output,
                    order,
                    keys,
                    None,
                    sources,
                    grad_weight,
                    None,
                    None,
                    None,
                    False,
                    CHUNK,
                )
            return grad_weight
        ids = flat_ids(indices)
        sources = bag_sources() if bag_sources else None
        rows = row_numbers(steps, indices.device)
        if method == "atomic":
            if rows is not None:
                sources = BagSources(rows, None, None)
            self._scatter_add(grad_output, ids, sources, grad_weight, padding_idx)
        else:
            # These read row after row: a gradient that takes more than one step is copied.
            matrix = grad_output if rows is None else grad_output.index_select(0, rows)
            self._gradients[method](matrix, ids, grad_weight, padding_idx)
        return grad_weight

    def embedding_bag(
        self,
        weight: Tensor,
        per_sample_weights: Tensor | None,
        bags: Bags,
        padding_idx: int,
        mode: str,
        record: BoundsRecord | None,
    ) -> Tensor:
        embedding_dim = weight.shape[1]
        output = weight.new_empty((bags.num_bags, embedding_dim))
        mean = mode == "mean"
        parts = None
        chunk_length = bag_chunk_length(bags)
        if chunk_length:
            num_parts = 2 * cdiv(bags.indices.numel(), chunk_length)
            acc_dtype = accumulation(weight.dtype)
            parts = BagParts(
                chunk_length,
                output.new_empty((num_parts, embedding_dim), dtype=acc_dtype),
                output.new_empty(num_parts, dtype=torch.int64) if mean else None,
            )
        self._bag_sum(weight, per_sample_weights, bags, output, parts, padding_idx, mean, record)
        if parts is not None:
            self._bag_join(parts, bags, output)
        return output

    def embedding_bag_max(
        self,
        weight: Tensor,
        bags: Bags,
        padding_idx: int,
        with_winner: bool,
        record: BoundsRecord | None,
    ) -> tuple[Tensor, Tensor]:
        output = weight.new_empty((bags.num_bags, weight.shape[1]))
        winner = output.new_empty(output.shape if with_winner else (0,), dtype=torch.int64)
        self._bag_max(weight, bags, output, winner if with_winner else None, padding_idx, record)
        return output, winner

    def embedding_bag_dense_backward(
        self,
        grad_output: Tensor,
        per_sample_weights: Tensor | None,
        bags: Bags,
        num_embeddings: int,
        padding_idx: int,
        mode: str,
        scale_grad_by_freq: bool,
    ) -> Tensor:
        def sources() -> BagSources:
            sizes = None
            if mode == "mean":
                sizes = bags.indices.new_zeros(bags.num_bags, dtype=torch.int32)
            bag_of = self._bag_of_positions(bags, sizes, padding_idx)
            return BagSources(bag_of, per_sample_weights, sizes)

        return self._dense_backward(
            grad_output, [], bags.indices, sources, num_embeddings, padding_idx, scale_grad_by_freq
        )

    def embedding_bag_sample_weights_backward(
        self, grad_output: Tensor, weight: Tensor, bags: Bags, padding_idx: int
    ) -> Tensor:
        bag_of = self._bag_of_positions(bags, None, padding_idx)
        grad = grad_output.new_empty(bags.indices.numel())
        self._bag_sample_weights(grad_output, weight, bags.indices, bag_of, grad, padding_idx)
        return grad

    def _bag_of_positions(self, bags: Bags, sizes: Tensor | None, padding_idx: int) -> Tensor:
        """The bag of each position -> [N], -1: none; counts ids other than padding into sizes, zero on entry."""
        dtype = torch.int32 if bags.num_bags < 2**31 else torch.int64
        bag_of = bags.indices.new_empty(bags.indices.numel(), dtype=dtype)
        self._bag_of(bags, bag_of, sizes, padding_idx)
        return bag_of

    def embedding_renorm_(
        self, weight: Tensor, indices: Tensor, max_norm: float, norm_type: float
    ) -> None:
        keys, _ = self._sorted_keys(indices, weight.shape[0], padding_idx=-1)
        self._renorm(weight, keys, float(max_norm), float(norm_type))

    def embedding_counts(self, indices: Tensor, num_embeddings: int) -> Tensor:
        counts = torch.zeros(num_embeddings, dtype=torch.int32, device=indices.device)
        self._counts(flat_ids(indices), counts)
        return counts

    def row_update_(
        self,
        update: RowUpdate,
        weight: Tensor,
        state: tuple[Tensor, ...],
        indices: Tensor,
        values: Tensor,
        rows: Tensor | None,
    ) -> None:
        ids = flat_ids(indices)
        if rows is not None:
            chosen = torch.empty_like(ids)
            self._select_rows(ids, rows.view(torch.uint8), chosen)
            ids = chosen
        keys, order = self._sorted_keys(ids, weight.shape[0], padding_idx=-1)
        if update.formula == "rowwise_adagrad" and not self._holds_row(
            weight.shape[1], accumulation(weight.dtype)
        ):
            total, run_keys = self._sums_of_runs(values, order, keys, weight.shape[0])
            self._rowwise_adagrad(update, total, run_keys, weight, state[0])
        else:
            self._update_runs(update, weight, state, values, order, keys)

    def _update_runs(
        self,
        update: RowUpdate,
        weight: Tensor,
        state: tuple[Tensor, ...],
        values: Tensor,
        order: Tensor,
        keys: Tensor,
    ) -> None:
        """`_sum_runs`, but each complete sum updates its row instead of being stored."""
        embedding_dim = weight.shape[1]
        acc_dtype = accumulation(weight.dtype)
        chunk = chunk_size(keys.numel(), embedding_dim, acc_dtype.itemsize)
        level_order: Tensor | None = order
        while True:
            num_chunks = cdiv(keys.numel(), chunk)
            partial_values = values.new_empty((2 * num_chunks, embedding_dim), dtype=acc_dtype)
            partial_keys = order.new_empty(2 * num_chunks, dtype=torch.int64)
            self._row_update(
                update,
                values,
                level_order,
                keys,
                weight,
                state,
                partial_values,
                partial_keys,
                chunk,
            )
            if num_chunks <= 1:
                return
            values, keys, level_order = partial_values, partial_keys, None

    def _sums_of_runs(
        self, values: Tensor, order: Tensor, keys: Tensor, num_embeddings: int
    ) -> tuple[Tensor, Tensor]:
        """The sums of values [N, D] of each run, one after another, and the row of each; for row-wise Adagrad.

        There are as many of both as there are keys; behind the last run rows are num_embeddings.
        """
        runs = torch.zeros_like(keys, dtype=torch.int64)
        torch.cumsum(keys[1:] != keys[:-1], 0, out=runs[1:])
        run_keys = torch.full_like(runs, num_embeddings)
        run_keys.scatter_(0, runs, keys.to(torch.int64))
        total = torch.zeros(
            (keys.numel(), values.shape[1]),
            dtype=accumulation(values.dtype),
            device=values.device,
        )
        self._sum_runs(values, order, runs, None, total, scale_grad_by_freq=False)
        return total, run_keys

    @cached_property
    def _gradients(self) -> dict[str, Gradient]:
        """The gradient methods that this backend has beside "atomic", "sorted" and "sorted_atomic"."""
        return {}

    def _gradient_refusal(self, method: str, num_indices: int, grad_weight: Tensor) -> str | None:
        """What of a call this backend cannot serve with a gradient method; None: nothing."""
        if method in ("atomic", "sorted", "sorted_atomic") or method in self._gradients:
            return None
        return no_kernel(self.name)

    def _sorted_keys(
        self, indices: Tensor, num_embeddings: int, padding_idx: int
    ) -> tuple[Tensor, Tensor]:
        """The ids [N] in ascending order, and the position (int32 or int64) that each came from.

        Stable, or the order of the additions would change from run to run. Ids out of range and padding
        become num_embeddings, so they come last.
        """
        key_dtype = sort_key_dtype(num_embeddings)
        if indices.numel() <= max_torch_sort_ids(key_dtype.itemsize):
            ids = flat_ids(indices)
            keys = ids.new_empty(ids.numel(), dtype=key_dtype)
            self._sort_keys(ids, None, keys, num_embeddings, padding_idx)
            # Where the ids are a copy, they make room.
            del ids
            keys, order = torch.sort(keys, stable=True)
            return keys, order
        return self._radix_sort(lambda: flat_ids(indices), num_embeddings, padding_idx)

    def _radix_sort(
        self, make_ids: Callable[[], Tensor], num_embeddings: int, padding_idx: int
    ) -> tuple[Tensor, Tensor]:
        """`_sorted_keys` in 16 bytes an id: two arrays of keys and two of positions, of 4 bytes at most.

        Where a key or a position takes 8 bytes, positions travel alone, and the keys are made in the end; only
        there a copy of ids that are not adjacent in memory comes on top.

        Args:
            make_ids: the ids [N], adjacent in memory; a function, so that nobody else holds what it makes.
        """
        ids = make_ids()
        num_ids = ids.numel()
        num_keys = cdiv(num_ids, self.sort_tiles.STEP) * self.sort_tiles.STEP
        tile_size = self.sort_tiles.size(num_keys)
        num_tiles = cdiv(num_keys, tile_size)
        key_dtype = sort_key_dtype(num_embeddings)
        order_dtype = torch.int32 if num_keys <= MAX_INT32_IDS else torch.int64
        keys_travel = max(key_dtype.itemsize, order_dtype.itemsize) <= 4
        counters = ids.new_empty(1 + 2**DIGIT_BITS * num_tiles, dtype=order_dtype)
        source = SortSource(ids, None, None)
        del ids
        for shift in range(0, num_embeddings.bit_length(), DIGIT_BITS):
            digit = SortDigit(
                num_ids, num_keys, num_embeddings, padding_idx, tile_size, num_tiles, shift
            )
            self._digit_counts(source, counters, digit)
            # The first counter is 0, so each becomes the sum of those before it.
            counters.cumsum_(0)
            order = counters.new_empty(num_keys)
            keys = counters.new_empty(num_keys, dtype=key_dtype) if keys_travel else None
            self._digit_scatter(source, counters, order, keys, digit)
            # The keys once made, the ids are done with: where they are a copy, they make room.
            source = SortSource(None if keys_travel else source.ids, order, keys)
        order = order[:num_ids]
        if keys is None:
            keys = order.new_empty(num_ids, dtype=key_dtype)
            assert source.ids is not None
            self._sort_keys(source.ids, order, keys, num_embeddings, padding_idx)
        return keys[:num_ids], order

    def _sum_runs(
        self,
        grad_output: Tensor,
        order: Tensor,
        keys: Tensor,
        sources: BagSources | None,
        grad_weight: Tensor,
        scale_grad_by_freq: bool,
    ) -> None:
        """Sum the runs of each chunk, then, level by level, the partial sums that runs left at its ends."""
        embedding_dim = grad_weight.shape[1]
        acc_dtype = accumulation(grad_weight.dtype)
        chunk = chunk_size(keys.numel(), embedding_dim, acc_dtype.itemsize)
        values = grad_output
        level_order: Tensor | None = order
        counts: Tensor | None = None
        while True:
            num_chunks = cdiv(keys.numel(), chunk)
            partial_values = values.new_empty((2 * num_chunks, embedding_dim), dtype=acc_dtype)
            partial_keys = order.new_empty(2 * num_chunks, dtype=torch.int64)
            partial_counts = order.new_empty(2 * num_chunks, dtype=torch.int32)
            self._segment_sum(
                values,
                level_order,
                keys,
                counts,
                sources,
                grad_weight,
                partial_values,
                partial_keys,
                partial_counts,
                scale_grad_by_freq,
                chunk,
            )
            if num_chunks <= 1:
                return
            values, keys, level_order = partial_values, partial_keys, None
            counts = partial_counts if scale_grad_by_freq else None
            sources = None

    @abstractmethod
    def _prepare_gather(self, weight: Tensor) -> Gather: ...

    @abstractmethod
    def _scatter_add(
        self,
        grad_output: Tensor,
        ids: Tensor,
        sources: BagSources | None,
        grad_weight: Tensor,
        padding_idx: int,
    ) -> None: ...

    @abstractmethod
    def _sort_keys(
        self,
        ids: Tensor,
        order: Tensor | None,
        keys: Tensor,
        num_embeddings: int,
        padding_idx: int,
    ) -> None: ...

    @abstractmethod
    def _digit_counts(self, source: SortSource, counters: Tensor, digit: SortDigit) -> None: ...

    @abstractmethod
    def _digit_scatter(
        self,
        source: SortSource,
        counters: Tensor,
        sorted_order: Tensor,
        sorted_keys: Tensor | None,
        digit: SortDigit,
    ) -> None: ...

    @abstractmethod
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
    ) -> None: ...

    @abstractmethod
    def _select_rows(self, ids: Tensor, rows: Tensor, chosen: Tensor) -> None: ...

    @abstractmethod
    def _holds_row(self, embedding_dim: int, acc_dtype: torch.dtype) -> bool:
        """Whether a program of `_row_update` sees a row as a whole."""

    @abstractmethod
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
    ) -> None: ...

    @abstractmethod
    def _rowwise_adagrad(
        self, update: RowUpdate, total: Tensor, keys: Tensor, weight: Tensor, state: Tensor
    ) -> None: ...

    @abstractmethod
    def _renorm(self, weight: Tensor, keys: Tensor, max_norm: float, norm_type: float) -> None: ...

    @abstractmethod
    def _counts(self, ids: Tensor, counts: Tensor) -> None: ...

    @abstractmethod
    def _bag_sum(
        self,
        weight: Tensor,
        per_sample_weights: Tensor | None,
        bags: Bags,
        output: Tensor,
        parts: BagParts | None,
        padding_idx: int,
        mean: bool,
        record: BoundsRecord | None,
    ) -> None: ...

    @abstractmethod
    def _bag_join(self, parts: BagParts, bags: Bags, output: Tensor) -> None: ...

    @abstractmethod
    def _bag_combine(self, partial: Tensor, sizes: Tensor | None, output: Tensor) -> None: ...

    @abstractmethod
    def _bag_max(
        self,
        weight: Tensor,
        bags: Bags,
        output: Tensor,
        winner: Tensor | None,
        padding_idx: int,
        record: BoundsRecord | None,
    ) -> None: ...

    @abstractmethod
    def _bag_of(
        self, bags: Bags, bag_of: Tensor, sizes: Tensor | None, padding_idx: int
    ) -> None: ...

    @abstractmethod
    def _bag_sample_weights(
        self,
        grad_output: Tensor,
        weight: Tensor,
        ids: Tensor,
        bag_of: Tensor,
        grad: Tensor,
        padding_idx: int,
    ) -> None: ...


def bag_chunk_length(bags: Bags) -> int:
    """How many ids one program walks where a bag may be too long for it, a power of two; 0: no bag may be.

    Shapes alone decide, so that nothing waits for the offsets. With offsets any bag may hold all ids.
    """
    num_indices = bags.indices.numel()
    longest = num_indices if bags.offsets is not None else bags.bag_length
    if longest <= MAX_WHOLE_BAG:
        return 0
    # As many chunks as keep a card busy. One bag of all ids has as many parts, which one program joins.
    length = 1 << (num_indices // BAG_CHUNKS).bit_length()
    return min(max(length, MIN_BAG_CHUNK), MAX_BAG_CHUNK)


def bag_splits(programs: int, num_indices: int, num_bags: int) -> int:
    """Into how many parts to cut each bag where `programs` of them take whole bags; a power of two."""
    wanted = min(
        cdiv(MIN_BAG_PROGRAMS, max(programs, 1)),
        num_indices // (num_bags * MIN_SPLIT_LENGTH),
        MAX_BAG_SPLITS,
    )
    return 1 << max(wanted.bit_length() - 1, 0)


def max_torch_sort_ids(key_bytes: int) -> int:
    """How many ids torch.sort may sort within the memory of a backward; it takes the fewest launches."""
    # Keys in, keys out and one array of keys inside; order out, and the same inside before and while it is
    # sorted: 8 bytes each. Its counters take less than one byte more.
    bytes_per_id = 3 * key_bytes + 3 * 8 + 1
    return MAX_EXTRA_BYTES // (bytes_per_id - BYTES_PER_ID)


def chunk_size(num_keys: int, embedding_dim: int, acc_bytes: int) -> int:
    """Keys a chunk: short for parallelism, longer where the partial sums would take too much memory.

    Those of all levels above the first together take a fifteenth of the first's.
    """
    partial_bytes = embedding_dim * acc_bytes + 8 + 4  # sum, key, count
    chunk = CHUNK
    while chunk < num_keys and 2 * cdiv(num_keys, chunk) * partial_bytes > MAX_EXTRA_BYTES:
        chunk *= 2
    return chunk


def no_cuda_device() -> str:
    """Why torch finds no CUDA device, as far as it says."""
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    try:
        torch.cuda.init()
    except Exception as error:
        return f"torch finds no CUDA device: {_first_line(error)}"
    return "torch finds no CUDA device"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def no_kernel(backend: str) -> str:
    """Why a backend refuses a forced method that it does not have."""
    return f"the backend {backend!r}, which has no such kernel"


def norm_name(norm_type: float) -> str:
    """Which of renorm_kernel's formulas computes this norm."""
    special = {float("inf"): "inf", float("-inf"): "-inf", 0.0: "0", 1.0: "1", 2.0: "2"}
    return special.get(norm_type, "p")


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)
