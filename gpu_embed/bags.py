"""Which positions of the ids belong to which bag."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .exporting import is_exporting


class Bags(NamedTuple):
    """N ids cut into B bags.

    Bag b holds the positions from offsets[b], and bag 0 those from 0, up to the next offset, or to N where there is
    none. Offsets may be wrong: whoever reads them keeps them within [0, N].
    """

    indices: Tensor  # [N], adjacent in memory
    offsets: (
        Tensor | None
    )  # [B], or [B + 1] where the last bag's end is given; None: all bags are equally long
    num_bags: int

    @property
    def bag_length(self) -> int:
        """Ids a bag where there are no offsets."""
        return self.indices.numel() // max(self.num_bags, 1)

    def counts(self) -> tuple[int, int, int, int]:
        """Ids, bags, offsets, and ids a bag: what every kernel asks for."""
        if self.offsets is None:
            return self.indices.numel(), self.num_bags, 0, self.bag_length
        return self.indices.numel(), self.num_bags, self.offsets.numel(), 0

    def ends(self) -> tuple[Tensor, Tensor]:
        """Where each bag begins, and where it ends -> int64 [B] each, with torch's operators."""
        num_indices, device = self.indices.numel(), self.indices.device
        if self.offsets is None:
            begin = torch.arange(self.num_bags, device=device) * self.bag_length
            return begin, begin + self.bag_length
        offsets = self.offsets.to(torch.int64).clamp(0, num_indices)
        if is_compiling() and is_exporting():
            # By index: a slice would keep the graph from serving one bag, and none.
            places = torch.cat([offsets, offsets.new_full((1,), num_indices)])
            bag = torch.arange(self.num_bags, device=device)
            return places[bag], places[bag + 1]
        begin = torch.cat([offsets.new_zeros(1), offsets[1 : self.num_bags]])[: self.num_bags]
        end = torch.cat([offsets[1:], offsets.new_full((1,), num_indices)])[: self.num_bags]
        return begin, end

    def bag_of(self) -> Tensor:
        """The bag of each position -> int64 [N], -1: none; with torch's operators, differentiating nothing."""
        num_indices = self.indices.numel()
        positions = torch.arange(num_indices, device=self.indices.device)
        if is_compiling() and is_exporting():
            if self.offsets is None:
                return positions // max(self.bag_length, 1)
            # Without searchsorted, which ONNX lacks: a position's bag is the last that begins at or before it.
            begin = self.offsets.to(torch.int64).clamp(0, num_indices)
            begun = positions.new_zeros(num_indices + 1)
            bag = begun.index_add(0, begin, torch.ones_like(begin)).cumsum(0)[positions] - 1
            return torch.where(bag < self.num_bags, bag, -1)
        if self.num_bags == 0:
            return torch.full_like(positions, -1)
        begin, end = self.ends()
        bag = torch.searchsorted(begin, positions, right=True) - 1
        return torch.where(positions < end[-1], bag, -1)

    def sizes(self, padding_idx: int) -> Tensor:
        """Ids a bag, padding not counted -> int64 [B], with torch's operators."""
        begin, end = self.ends()
        if padding_idx < 0:
            return end - begin
        counted = (self.indices != padding_idx).to(torch.int64)
        before = torch.cat([counted.new_zeros(1), counted.cumsum(0)])
        return before[end] - before[begin]


def make_bags(indices: Tensor, offsets: Tensor | None, include_last_offset: bool) -> Bags:
    """Bags of ids [N] at offsets, or of ids [B, L], one a row."""
    ids = indices.contiguous().view(-1)
    if offsets is None:
        return Bags(ids, None, indices.shape[0])
    return Bags(ids, offsets.contiguous(), offsets.shape[0] - include_last_offset)


def count_bags(indices: Tensor, offsets: Tensor | None, include_last_offset: bool) -> int:
    """How many bags there are: shapes alone tell."""
    return indices.shape[0] if offsets is None else offsets.shape[0] - include_last_offset


def first_maxima(rows: Tensor, bag: Tensor, num_bags: int) -> Tensor:
    """The position of each bag's maximum in every column -> int64 [num_bags + 1, D]; N: the bag is empty.

    The first of equal maxima; NaN is the largest where it comes first, and elsewhere nothing is larger than it.

    Args:
        rows: [N, D].
        bag: [N]; `num_bags` where a position is in none: this counts as a bag more.
    """
    num_rows = rows.shape[0]
    bag = bag[:, None].expand_as(rows)
    position = torch.arange(num_rows, device=rows.device)[:, None].expand_as(rows)

    def first_position(candidate: Tensor) -> Tensor:
        """The first of each bag where it holds; num_rows: nowhere."""
        found = position.new_full((num_bags + 1, rows.shape[1]), num_rows)
        return found.scatter_reduce_(0, bag, torch.where(candidate, position, num_rows), "amin")

    is_nan = rows.isnan()
    floor = rows.new_full((num_bags + 1, rows.shape[1]), -torch.inf)
    largest = floor.scatter_reduce(0, bag, torch.where(is_nan, -torch.inf, rows), "amax")
    maxima = first_position((rows == largest.gather(0, bag)) & ~is_nan)
    first = first_position(torch.ones_like(is_nan))
    return torch.where(first_position(is_nan) == first, first, maxima)


def check_offsets(offsets: Tensor, indices: Tensor) -> None:
    """Raise torch's RuntimeError for offsets on the CPU that do not cut these ids into bags.

    Where torch reads outside of the ids, a decreasing offset, it is an error too.
    """
    if offsets.numel() == 0:
        return
    # A view that NumPy reads in a tenth of the time.
    places = offsets.numpy()
    first, last = int(places[0]), int(places[-1])
    if first != 0:
        name = offsets.to(torch.promote_types(offsets.dtype, indices.dtype)).type()
        raise RuntimeError(
            "offsets[0] has to be 0, i.e., the first sequence in the mini-batch has to start from "
            f"position 0. However, got {first}\n[ {name}{{}} ]"
        )
    if last > indices.numel():
        raise RuntimeError(
            f"offsets[-1] can not be greater than input's length {indices.numel()} "
            f"but got offsets[-1] of {last}"
        )
    # Not a difference, which wraps around in uint8.
    decreasing = places[1:] < places[:-1]
    if decreasing.any():
        place = int(decreasing.argmax())
        raise RuntimeError(
            f"offsets must not decrease, but offsets[{place}] is {places[place]} "
            f"and offsets[{place + 1}] is {places[place + 1]}"
        )
