"""Bags in torch's operators: its own on the CPU, where they do what ours promise."""

import torch
from torch import Tensor

from ...bags import Bags
from ...bounds import BoundsRecord, in_table
from ...dtypes import accumulation
from ...shard import Shard, table_rows
from .lookup import TorchLookup, add_rows, torch_ids


class TorchBags(TorchLookup):
    """Sums, means and maxima of bags of one table's rows."""

    def embedding_bag(
        self,
        weight: Tensor,
        per_sample_weights: Tensor | None,
        bags: Bags,
        padding_idx: int,
        mode: str,
        record: BoundsRecord | None,
        shard: Shard | None = None,
    ) -> Tensor:
        wide, num_rows = accumulation(weight.dtype), weight.shape[0]
        # torch's CUDA kernels trust the ids.
        if not weight.is_cuda and shard is None:
            output = _cpu_bags(weight, per_sample_weights, bags, padding_idx, mode)
            if output is not None:
                return output[0]
        if record is not None:
            record.write_bags(bags, table_rows(num_rows, shard))
        if shard is not None:
            bags, padding_idx = shard.local_bags(bags, num_rows, padding_idx), num_rows
        bag = bags.bag_of()
        rows = self.embedding(weight, bags.indices, padding_idx, None).to(wide)
        if per_sample_weights is not None:
            read = in_table(bags.indices, num_rows) & (bags.indices != padding_idx)
            rows = torch.where(read[:, None], rows * per_sample_weights[:, None], 0)
        # Positions in no bag go to an extra one.
        total = rows.new_zeros(bags.num_bags + 1, weight.shape[1])
        total.index_add_(0, torch.where(bag < 0, bags.num_bags, bag), rows)
        total = total[:-1]
        if mode == "mean":
            total /= bags.sizes(padding_idx).clamp(min=1)[:, None]
        return total.to(weight.dtype)

    def embedding_bag_max(
        self,
        weight: Tensor,
        bags: Bags,
        padding_idx: int,
        with_argmax: bool,
        record: BoundsRecord | None,
        shard: Shard | None = None,
    ) -> tuple[Tensor, Tensor]:
        num_rows = weight.shape[0]
        if not weight.is_cuda and shard is None:
            found = _cpu_bags(weight, None, bags, padding_idx, "max")
            if found is not None:
                return found[0], _elements(found[1]) if with_argmax else found[1].new_empty(0)
        if record is not None:
            record.write_bags(bags, table_rows(num_rows, shard))
        if shard is not None:
            bags, padding_idx = shard.local_bags(bags, num_rows, padding_idx), num_rows
        return _max_by_scatter(weight, bags, padding_idx, with_argmax, shard is not None)

    def embedding_bag_dense_backward(
        self,
        grad_output: Tensor,
        per_sample_weights: Tensor | None,
        bags: Bags,
        num_embeddings: int,
        padding_idx: int,
        mode: str,
        scale_grad_by_freq: bool,
        into: Tensor | None = None,
        shard: Shard | None = None,
    ) -> Tensor:
        if shard is not None:
            bags, padding_idx = shard.local_bags(bags, num_embeddings, padding_idx), num_embeddings
        if into is not None:
            return _add_to_rows(
                into, grad_output, per_sample_weights, bags, padding_idx, mode, scale_grad_by_freq
            )
        bag = bags.bag_of()
        wide = accumulation(grad_output.dtype)
        grad_output_wide = grad_output.to(wide)
        if mode == "mean":
            grad_output_wide = grad_output_wide / bags.sizes(padding_idx).clamp(min=1)[:, None]
        rows = grad_output_wide[bag.clamp(min=0)]
        if per_sample_weights is not None:
            rows = rows * per_sample_weights[:, None]
        ids = torch.where(bag >= 0, bags.indices.to(torch.int64), -1)
        return self.embedding_dense_backward(
            rows, ids, num_embeddings, padding_idx, scale_grad_by_freq
        ).to(grad_output.dtype)

    def embedding_bag_sample_weights_backward(
        self,
        grad_output: Tensor,
        weight: Tensor,
        bags: Bags,
        padding_idx: int,
        shard: Shard | None = None,
    ) -> Tensor:
        wide, num_rows = accumulation(weight.dtype), weight.shape[0]
        if shard is not None:
            bags, padding_idx = shard.local_bags(bags, num_rows, padding_idx), num_rows
        bag = bags.bag_of()
        read = (bag >= 0) & in_table(bags.indices, num_rows) & (bags.indices != padding_idx)
        rows = self.embedding(weight, bags.indices, -1, None).to(wide)
        products = rows * grad_output[bag.clamp(min=0)].to(wide)
        return torch.where(read, products.sum(1), 0).to(grad_output.dtype)


def sums_16_bits_as_torch(dtype: torch.dtype, mode: str) -> bool:
    """Whether torch's CPU bags of a 16-bit table are summed in fp32 and rounded once, ties to even.

    It rounds a mean twice, and a tie of a sum in bf16 upwards.
    """
    return mode == "max" or (mode == "sum" and dtype == torch.float16)


def _add_to_rows(
    into: Tensor,
    grad_output: Tensor,
    per_sample_weights: Tensor | None,
    bags: Bags,
    padding_idx: int,
    mode: str,
    scale_grad_by_freq: bool,
) -> Tensor:
    """`embedding_bag_dense_backward` into a gradient that exists."""
    wide = accumulation(grad_output.dtype)
    bag, ids = bags.bag_of(), torch_ids(bags.indices)
    kept = (bag >= 0) & in_table(ids, len(into)) & (ids != padding_idx)
    bag = bag.clamp(min=0)
    sizes = bags.sizes(padding_idx).clamp(min=1) if mode == "mean" else None

    def read(positions: Tensor | slice) -> Tensor:
        of = bag[positions]
        rows = grad_output.index_select(0, of).to(wide)
        if sizes is not None:
            rows /= sizes[of, None]
        if per_sample_weights is not None:
            rows *= per_sample_weights[positions, None]
        return rows

    return add_rows(into, ids, kept, read, scale_grad_by_freq)


def _cpu_bags(
    weight: Tensor,
    per_sample_weights: Tensor | None,
    bags: Bags,
    padding_idx: int,
    mode: str,
) -> tuple[Tensor, Tensor] | None:
    """torch's bags on the CPU -> [B, D], and for "max" the ids of the largest, -1 in an empty bag.

    None where torch meets an id out of range, which it looks for itself.
    """
    ids, offsets = torch_ids(bags.indices), bags.offsets
    if offsets is None:
        offsets = torch.arange(0, ids.numel(), bags.bag_length, dtype=ids.dtype, device=ids.device)
    elif offsets.numel() > bags.num_bags:
        # torch takes ids behind the last offset into the last bag in some cases, and not in others.
        last = int(offsets[-1])
        ids, offsets = ids[:last], offsets[:-1]
        if per_sample_weights is not None:
            per_sample_weights = per_sample_weights[:last]
    # Of a parameter torch notes each id's bag, even where no gradient is recorded.
    weight, dtype, wide = weight.detach(), weight.dtype, accumulation(weight.dtype)
    try:
        if dtype != wide and not sums_16_bits_as_torch(dtype, mode):
            weight, ids, padding_idx = _rows_in(wide, weight, ids, padding_idx)
            per_sample_weights = None if per_sample_weights is None else per_sample_weights.to(wide)
        output, _, sizes, max_ids = torch.embedding_bag(
            weight,
            ids,
            offsets,
            False,
            ("sum", "mean", "max").index(mode),
            False,
            per_sample_weights,
            False,
            padding_idx if padding_idx >= 0 else None,
        )
    except (IndexError, RuntimeError):
        return None
    if mode == "max":
        max_ids = torch.where(sizes[:, None] > 0, max_ids, -1)
    return output.to(dtype), max_ids


def _rows_in(
    dtype: torch.dtype, weight: Tensor, ids: Tensor, padding_idx: int
) -> tuple[Tensor, Tensor, int]:
    """A table with the row of each id, in this dtype; ids of these rows, and which of them is padding, -1: none.

    Raises IndexError for an id out of range.
    """
    places = torch.arange(len(ids), dtype=ids.dtype, device=ids.device)
    is_padding = ids == padding_idx
    found = is_padding.nonzero()
    first = int(found[0]) if len(found) else -1
    # All padding is one row.
    places[is_padding] = first
    return weight.index_select(0, ids).to(dtype), places, first


def _elements(max_ids: Tensor) -> Tensor:
    """Where in a table [V, D] the elements of rows `max_ids` [B, D] lie."""
    embedding_dim = max_ids.shape[1]
    columns = torch.arange(embedding_dim, device=max_ids.device)
    return torch.where(max_ids >= 0, max_ids.to(torch.int64) * embedding_dim + columns, -1)


def _max_by_scatter(
    weight: Tensor, bags: Bags, padding_idx: int, with_argmax: bool, of_shard: bool
) -> tuple[Tensor, Tensor]:
    """The maxima with operators that take any ids, and wait for nothing; of a shard, with their positions."""
    num_indices, embedding_dim = bags.indices.numel(), weight.shape[1]
    bag = bags.bag_of()
    kept = (bag >= 0) & in_table(bags.indices, weight.shape[0]) & (bags.indices != padding_idx)
    if weight.shape[0] == 0:
        output = weight.new_zeros(bags.num_bags, embedding_dim)
        max_elements = torch.full_like(output, -1, dtype=torch.int64)
        return output, max_elements if with_argmax else max_elements.new_empty(0)
    ids = torch.where(kept, bags.indices.to(torch.int64), 0)
    # What takes no part goes to an extra bag. An id of another shard's comes before later ones, too.
    counted = kept | ((bag >= 0) & (bags.indices == -1)) if of_shard else kept
    counted_bag, bag = (
        torch.where(of, bag, bags.num_bags)[:, None].expand(-1, embedding_dim)
        for of in (counted, kept)
    )
    rows = torch.embedding(weight, ids)
    places = torch.arange(num_indices, device=ids.device)[:, None].expand(-1, embedding_dim)

    def lowest_place(candidate: Tensor, bag: Tensor = bag) -> Tensor:
        """The first place of each bag where it holds; num_indices: nowhere."""
        found = places.new_full((bags.num_bags + 1, embedding_dim), num_indices)
        return found.scatter_reduce_(0, bag, torch.where(candidate, places, num_indices), "amin")

    # NaN is the largest where it comes first; elsewhere nothing is larger than what was there.
    first = lowest_place(torch.ones_like(rows, dtype=torch.bool), counted_bag)
    is_nan = rows.isnan()
    floor = rows.new_full((bags.num_bags + 1, embedding_dim), -torch.inf)
    largest = floor.scatter_reduce(0, bag, torch.where(is_nan, -torch.inf, rows), "amax")
    place = lowest_place((rows == largest.gather(0, bag)) & ~is_nan)
    nan_place = lowest_place(is_nan)
    place = torch.where((nan_place == first) & (first < num_indices), first, place)[:-1]
    nowhere = place == num_indices
    place = place.clamp(max=num_indices - 1)
    output = torch.where(nowhere, 0, rows.gather(0, place))
    if not with_argmax:
        return output, place.new_empty(0)
    if of_shard:
        return output, torch.where(nowhere, -1, place)
    return output, torch.where(nowhere, -1, _elements(ids[place]))
