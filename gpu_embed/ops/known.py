"""One lookup on data: bounds record, backend, output; and what is kept of it for the next one.

A lookup of a few ids takes the GPU less time than its arguments take Python to check. So the second call with
a Parameter finds the checks, the backend and the launch settings of the first one in `known_tables`, as long
as nothing that they depend on has changed. That is the table's address and form, and not which object holds it:
what is kept of a table that is gone, or whose Parameter has other content (`torch.utils.swap_tensors`, which
refuses a Parameter that a weak reference points to), serves no table but one just like it.
"""

from torch import Tensor
from torch.nn import Parameter

from .. import backends, bounds, settings
from ..dtypes import IDS


def look_up(weight: Tensor, indices: Tensor) -> Tensor:
    """weight[indices], ids out of range recorded and, where that needs no stall, reported."""
    device = weight.device
    bounds.raise_pending(device)
    record = bounds.record_for(device)
    if weight.shape[1] == 0 or indices.numel() == 0:
        output = weight.new_empty(*indices.shape, weight.shape[1])
        if record is not None:
            record.write(indices, weight.shape[0])
    else:
        output = backends.select(device).embedding(weight, indices, -1, record)
    if record is not None:
        record.finish_lookup(indices)
    return output


class KnownTable:
    """A Parameter that was looked up before, and the arguments of that lookup; holds no tensor.

    Args:
        weight: the table, [V, D], not empty.
        padding_idx, scale_grad_by_freq, sparse: as the caller gave them.
        arguments: the same three, checked, padding_idx counted from the start (-1: none).
    """

    __slots__ = (
        "_address",
        "_device_index",
        "_dtype",
        "_generation",
        "_may_be_lazy",
        "_padding_idx",
        "_prepared",
        "_record",
        "_scale_grad_by_freq",
        "_shape",
        "_sparse",
        "_stride",
        "arguments",
        "num_embeddings",
    )

    def __init__(
        self,
        weight: Parameter,
        padding_idx: int | None,
        scale_grad_by_freq: bool,
        sparse: bool,
        arguments: tuple[int, bool, bool],
    ) -> None:
        # First: a setting that changes from here on makes the rest out of date.
        self._generation = settings.generation
        self._address = weight.data_ptr()
        self._shape = weight.shape
        self._stride = weight.stride()
        self._dtype = weight.dtype
        # A conjugate, or the imaginary part of one, is the same memory read another way.
        self._may_be_lazy = weight.is_complex() or weight.stride(1) != 1
        self.num_embeddings = weight.shape[0]
        self._record = bounds.record_source(weight.device)
        self._device_index = weight.get_device()
        self._padding_idx = padding_idx
        self._scale_grad_by_freq = scale_grad_by_freq
        self._sparse = sparse
        self._prepared = backends.select(weight.device).prepare_embedding(weight)
        self.arguments = arguments

    def describes(self, weight: Tensor) -> bool:
        """Whether all that the prepared lookup depends on is as it was."""
        try:
            return (
                type(weight) is Parameter
                and weight.data_ptr() == self._address
                and weight.shape == self._shape
                and weight.stride() == self._stride
                and weight.dtype is self._dtype
                and weight.get_device() == self._device_index
                and not (self._may_be_lazy and (weight.is_neg() or weight.is_conj()))
                and self._generation == settings.generation
            )
        except RuntimeError:
            # Sparse tensors have no address, nested ones no shape.
            return False

    def serves(
        self,
        input: Tensor,
        weight: Tensor,
        padding_idx: int | None,
        scale_grad_by_freq: bool,
        sparse: bool,
    ) -> bool:
        """Whether a call means this table with the same arguments, and ids that it can take."""
        try:
            return (
                # `is` alone tells True from 1, which torch refuses.
                padding_idx is self._padding_idx
                and scale_grad_by_freq is self._scale_grad_by_freq
                and sparse is self._sparse
                and type(input) is Tensor
                and input.dtype in IDS
                and input.get_device() == self._device_index
                and not input.is_neg()
                # `describes`, without the call; an address in use is on one device.
                and type(weight) is Parameter
                and weight.data_ptr() == self._address
                and weight.shape == self._shape
                and weight.stride() == self._stride
                and weight.dtype is self._dtype
                and not (self._may_be_lazy and (weight.is_neg() or weight.is_conj()))
                and self._generation == settings.generation
            )
        except RuntimeError:
            return False

    def embedding(self, weight: Tensor, indices: Tensor) -> Tensor:
        """`look_up` in this table."""
        record = self._record()
        output = self._prepared(weight, indices, -1, record)
        if record is not None:
            record.finish_lookup(indices)
        return output


class KnownTables(dict[int, KnownTable]):
    """By id(weight). Entries stay when their table goes, so all of them go where there are MAX_TABLES."""

    MAX_TABLES = 4096

    def __setitem__(self, key: int, table: KnownTable) -> None:
        if len(self) >= self.MAX_TABLES:
            self.clear()
        super().__setitem__(key, table)


known_tables = KnownTables()
