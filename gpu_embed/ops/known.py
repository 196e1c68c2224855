"""What is kept of a lookup for the next one in the same table.

A lookup of a few ids takes the GPU less time than its arguments take Python to check. So a later call with the same
Parameter finds the checks, the backend and the launch settings of the first one in `known_tables`, as long as nothing
that they depend on has changed. On the CPU torch's own node may serve it.

An entry knows its table by address, shape, strides and dtype, and holds no reference to it: `torch.utils.swap_tensors`
refuses a Parameter that a weak reference points to. So it may serve a later table in the same memory, which is of the
same form.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from .. import backends, bounds, settings
from ..dtypes import FLOATS, IDS, TORCH_IDS
from . import in_place
from .autograd import SingleLevelFunction
from .lookup import embedding, embedding_adjoint
from .plain import PLAIN_MODES, included_keys, is_plain_call, profiler_enabled


class KnownTable:
    """A Parameter that was looked up before, and the arguments of that lookup; holds no tensor.

    Args:
        weight: the table, [V, D], not empty.
        padding_idx, scale_grad_by_freq, sparse: as the caller gave them.
        arguments: the same three, checked, padding_idx counted from the start (-1: none).
    """

    def __init__(
        self,
        weight: Parameter,
        padding_idx: int | None,
        scale_grad_by_freq: bool,
        sparse: bool,
        arguments: tuple[int, bool, bool],
    ) -> None:
        # Read the generation first: a concurrent settings change must invalidate this entry.
        self._generation = settings.generation
        self._address = weight.data_ptr()
        self.shape = weight.shape
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
        backend = backends.select(weight.device)
        self._prepared = backend.prepare_embedding(weight)
        self.arguments = arguments
        # Not every backend prepares it.
        prepare = getattr(backend, "prepare_embedding_dense_backward", None)
        self.prepared_backward = None
        if prepare is not None and weight.dtype in FLOATS and not (scale_grad_by_freq or sparse):
            self.prepared_backward = prepare(weight, arguments[0])
        # Where ours is torch's own gradient on the CPU, its node takes a third of the host time. It has no right second
        # derivative for the other two, ours adds up 16-bit numbers in fp32, and ours alone adds in place.
        self.by_torch = (
            backend.name == "torch"
            and weight.is_cpu
            and weight.dtype in (torch.float32, torch.float64)
            and not (scale_grad_by_freq or sparse or in_place.is_marked(weight))
        )

    def describes(self, weight: Tensor) -> bool:
        """Whether all that the prepared lookup depends on is as it was."""
        try:
            return (
                type(weight) is Parameter
                and weight.data_ptr() == self._address
                and weight.shape == self.shape
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
                and self.describes(weight)
            )
        except RuntimeError:
            return False

    def embedding(self, weight: Tensor, indices: Tensor) -> Tensor:
        """`embedding` in this table, on data."""
        record = self._record()
        output = self._prepared(weight, indices, -1, record)
        if record is not None and (record.on_cuda or record.flag_view[0]):
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


class KnownEmbedding(SingleLevelFunction):
    """`call_embedding` in a known table: the least that autograd lets a Function cost."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, indices: Tensor, table: KnownTable) -> Tensor:
        ctx.table = table
        # Saved, so that autograd notices ids that were changed in place.
        ctx.save_for_backward(indices)
        return table.embedding(weight, indices)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (indices,) = ctx.saved_tensors
        table = ctx.table
        inputs = grad, table.num_embeddings, indices, *table.arguments
        if in_place.in_force and in_place.is_of_marked(ctx):
            grad_weight = in_place.weight_gradient(ctx, table.shape, embedding_adjoint, *inputs)
            return grad_weight, None, None
        if table.prepared_backward and not torch.is_grad_enabled() and is_plain_call(grad, indices):
            bounds.raise_pending(grad.device)
            grad_weight = table.prepared_backward(grad, indices)
            if grad_weight is not None:
                return grad_weight, None, None
        return embedding_adjoint(*inputs), None, None


_apply_known = KnownEmbedding.apply  # type: ignore[attr-defined]


def call_known_embedding(table: KnownTable, weight: Tensor, indices: Tensor) -> Tensor:
    """`call_embedding` for a table and ids that it serves."""
    # The modes of `is_plain_call`, without the call.
    if (
        included_keys().raw_repr() not in PLAIN_MODES
        or forward_ad._current_level >= 0
        or profiler_enabled()
    ):
        return embedding(weight, indices, *table.arguments)
    # Of no ids its node has no second derivative either.
    if table.by_torch and indices.dtype in TORCH_IDS and indices.numel():
        try:
            return torch.embedding(weight, indices, *table.arguments)
        except IndexError:
            pass  # ours says which id, or leaves it out of the gradient, too
    if weight.requires_grad and torch.is_grad_enabled():
        output: Tensor = _apply_known(weight, indices, table)
        return output
    return table.embedding(weight, indices)
