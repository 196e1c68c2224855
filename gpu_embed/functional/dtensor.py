"""Lookups in tables that torch.distributed.tensor places on several ranks.

torch's DTensor moves ids and results; each rank looks up in its own rows and columns. On each dimension of the mesh:

==========================  ==============  =========================  ===========================
table                       ids             output                     the table's gradient
==========================  ==============  =========================  ===========================
replicated                  replicated      replicated                 the same on every rank
replicated                  sharded         sharded as the ids         summed over the ranks
by rows, `Shard(0)`         gathered        a term of a sum            each rank's own rows
by columns, `Shard(1)`      gathered        sharded by columns         each rank's own columns
==========================  ==============  =========================  ===========================

A rank hands all ids to the kernel with the number of its first row. Those of other ranks read as zeros, so the terms
add up to the output; those out of the whole table's range are errors wherever they are seen, without a collective.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from .. import shard
from ..ops.bag import call_embedding_bag, call_embedding_bag_max, embedding_bag_shard_max
from ..ops.lookup import (
    call_embedding,
    call_embedding_dense_double_backward,
    embedding_renorm_,
)

Placements = tuple[Placement, ...]


class Layout(NamedTuple):
    """Where the tensors of one call lie, a placement for each dimension of the mesh."""

    table: Placements
    ids: Placements
    output: Placements
    grad_weight: Placements  # as each rank computes it

    @classmethod
    def of(
        cls, table: DTensor, ids: DTensor, columns: int, sharded_ids: tuple[int, ...]
    ) -> "Layout":
        """The layout of a lookup.

        Args:
            columns: the dimension of the output that the table's columns are.
            sharded_ids: dimensions on which ids may stay sharded beside a replicated table.
        """
        rules: list[Placements] = []
        for of_table, of_ids in zip(table.placements, ids.placements, strict=True):
            if type(of_table) is Shard:
                by_rows = of_table.dim == 0
                output = Partial() if by_rows else Shard(columns)
                rules.append((of_table, Replicate(), output, of_table))
            elif type(of_ids) is Shard and of_ids.dim in sharded_ids:
                rules.append((Replicate(), of_ids, of_ids, Partial()))
            else:
                rules.append((Replicate(),) * 4)
        return cls(*zip(*rules, strict=True))


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int,
    max_norm: float | None,
    norm_type: float,
    scale_grad_by_freq: bool,
) -> Tensor:
    """`functional.embedding` of checked arguments, padding_idx counted from the start (-1: none).

    Returns:
        A DTensor `[*input.shape, embedding_dim]`, with the placements of the table above.
    """
    ids, table = _dtensors("embedding", input=input, weight=weight)
    # The counts are those of the whole batch.
    sharded_ids = () if scale_grad_by_freq else tuple(range(ids.dim()))
    layout = Layout.of(table, ids, ids.dim(), sharded_ids)
    rows = _shard(table, layout)
    if max_norm is not None:
        _renorm(table, ids, layout, rows, max_norm, norm_type)
    local_table = _local(table, layout.table, layout.grad_weight)
    local_ids = _local_ids(ids, layout.ids)
    output = call_embedding(local_table, local_ids, padding_idx, scale_grad_by_freq, False, rows)
    return _whole(output, table, layout, (*ids.shape, table.shape[1]))


def embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None,
    max_norm: float | None,
    norm_type: float,
    scale_grad_by_freq: bool,
    mode: str,
    per_sample_weights: Tensor | None,
    include_last_offset: bool,
    padding_idx: int,
) -> Tensor:
    """`functional.embedding_bag` of checked arguments, padding_idx counted from the start (-1: none).

    A mean is divided on each rank by how many ids the whole bag has, before it is rounded and added to the others'.

    Returns:
        A DTensor `[B, embedding_dim]`, with the placements of the table above.
    """
    ids, table = _dtensors("embedding_bag", input=input, weight=weight)
    sharded_ids = (0,) if offsets is None and not scale_grad_by_freq else ()
    layout = Layout.of(table, ids, 1, sharded_ids)
    rows = _shard(table, layout)
    everywhere = (Replicate(),) * len(layout.ids)
    local_offsets = None
    if offsets is not None:
        of_bags, _ = _dtensors("embedding_bag", offsets=offsets, weight=weight)
        local_offsets = _local_ids(of_bags, everywhere)
    local_weights = None
    if per_sample_weights is not None:
        scales, _ = _dtensors("embedding_bag", per_sample_weights=per_sample_weights, weight=weight)
        # Each rank has the products with its own rows and columns.
        grad = tuple(
            Partial() if type(of_table) is Shard else of_ids
            for of_table, of_ids in zip(layout.table, layout.ids, strict=True)
        )
        local_weights = _local(scales, layout.ids, grad)
    if max_norm is not None:
        _renorm(table, ids, layout, rows, max_norm, norm_type)
    local_table = _local(table, layout.table, layout.grad_weight)
    local_ids = _local_ids(ids, layout.ids)
    bags = (local_ids, local_offsets, include_last_offset, padding_idx)
    if mode == "max" and rows is not None:
        output = _max_of_shards(local_table, table, layout, rows, *bags)
    elif mode == "max":
        output = call_embedding_bag_max(local_table, *bags)
    else:
        output = call_embedding_bag(
            local_table, local_weights, *bags, mode, scale_grad_by_freq, False, rows
        )
    num_bags = ids.shape[0] if offsets is None else offsets.shape[0] - include_last_offset
    return _whole(output, table, layout, (num_bags, table.shape[1]))


def zero_row_(weight: DTensor, row: int) -> None:
    """Fill a row with zeros wherever it lies; `weight[row].fill_(0)` fills a copy where rows are sharded."""
    is_row = torch.arange(weight.shape[0], device=weight.device)[:, None] == row
    mesh = weight.device_mesh
    everywhere = DTensor.from_local(is_row, mesh, [Replicate()] * mesh.ndim, run_check=False)
    weight.masked_fill_(everywhere, 0)


def _dtensors(function: str, **tensors: Tensor) -> list[Any]:
    """These tensors, all DTensors of one mesh; plain ones are taken for replicated where torch would.

    Raises:
        RuntimeError: one is a plain tensor, or lies on another mesh.
    """
    mesh = next(tensor for tensor in tensors.values() if isinstance(tensor, DTensor)).device_mesh
    found: list[DTensor] = []
    for name, tensor in tensors.items():
        if not isinstance(tensor, DTensor):
            if not torch._C._get_dtensor_allow_implicit_replication():
                raise RuntimeError(_mixed(function, name, tensors))
            tensor = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
        if tensor.device_mesh != mesh:
            raise RuntimeError(
                f"{function}: {name} lies on {tensor.device_mesh}, and another tensor on {mesh}; "
                "distribute all of them on one mesh"
            )
        found.append(tensor)
    return found


def _mixed(function: str, name: str, tensors: dict[str, Tensor]) -> str:
    remedy = (
        "distribute the table with torch.distributed.tensor.distribute_tensor"
        if name == "weight"
        else f"make one with DTensor.from_local({name}, weight.device_mesh, placements), which says whether every "
        "rank has the same, or let torch.distributed.tensor.parallel.parallelize_module shard the layer"
    )
    others = ", ".join(other for other in tensors if other != name)
    return f"{function}: got mixed torch.Tensor and DTensor: {name} is a plain tensor, and {others} a DTensor; {remedy}"


def _shard(table: DTensor, layout: Layout) -> shard.Shard | None:
    """The rows of the table that this rank has; None: all of them."""
    first_row, num_rows, mesh = 0, table.shape[0], table.device_mesh
    by_rows = [d for d, p in enumerate(layout.table) if p == Shard(0)]
    for mesh_dim in by_rows:
        # As torch.chunk cuts them.
        chunk = -(-num_rows // mesh.size(mesh_dim))
        start = torch.sym_min(_place(mesh, mesh_dim) * chunk, num_rows)
        first_row += start
        num_rows = torch.sym_min(chunk, num_rows - start)
    return shard.Shard(first_row, table.shape[0]) if by_rows else None


def _place(mesh: DeviceMesh, mesh_dim: int) -> int:
    """This rank's place in a dimension of the mesh; a symbol in a graph that one rank compiles for all."""
    config = getattr(torch.distributed, "config", None)
    if is_compiling() and getattr(config, "compile_on_one_rank", False):
        # Registers the operator.
        from torch.distributed._ops import device_mesh  # noqa: F401

        place = torch.ops.device_mesh._runtime_compute_coordinate_on_dim
        return place(mesh.mesh[None], mesh_dim)
    return mesh.get_local_rank(mesh_dim)


def _local(tensor: DTensor, placements: Placements, grad_placements: Placements) -> Tensor:
    """This rank's part; the gradient that it gets becomes one with the tensor's own placements."""
    if tensor.placements != placements or grad_placements != placements:
        tensor = tensor.redistribute(placements=placements)
    return tensor.to_local(grad_placements=grad_placements)


def _local_ids(ids: DTensor, placements: Placements) -> Tensor:
    if ids.placements != placements:
        if ids.dtype == torch.int16:
            # Collectives do not take it.
            ids = ids.to(torch.int32)  # type: ignore[assignment]
        ids = ids.redistribute(placements=placements)
    local = ids.to_local()
    return local.wait() if isinstance(local, AsyncCollectiveTensor) else local


def _whole(output: Tensor, table: DTensor, layout: Layout, shape: tuple[int, ...]) -> Tensor:
    """The DTensor that the ranks' outputs are parts or terms of."""
    whole: Tensor = _FromLocal.apply(output, table.device_mesh, layout.output, shape)
    return whole


class _FromLocal(torch.autograd.Function):
    """DTensor.from_local, whose gradient is differentiable too where the output is a term of a sum."""

    @staticmethod
    def forward(
        ctx: Any, local: Tensor, mesh: Any, placements: Placements, shape: tuple[int, ...]
    ) -> DTensor:
        ctx.placements = placements
        strides = [1]
        for size in shape[:0:-1]:
            strides.insert(0, strides[0] * max(size, 1))
        return DTensor.from_local(
            local,
            mesh,
            placements,
            run_check=False,
            shape=torch.Size(shape),
            stride=tuple(strides[-len(shape) :]),
        )

    @staticmethod
    def backward(ctx: Any, grad: DTensor) -> tuple[Tensor | None, ...]:
        own = tuple(Replicate() if p.is_partial() else p for p in ctx.placements)
        if grad.placements != own:
            grad = grad.redistribute(placements=own)
        return grad.to_local(grad_placements=ctx.placements), None, None, None


def _renorm(
    table: DTensor,
    ids: DTensor,
    layout: Layout,
    rows: shard.Shard | None,
    max_norm: float,
    norm_type: float,
) -> None:
    """Scale the rows of this rank that any rank looks up."""
    if any(type(p) is Shard and p.dim == 1 for p in layout.table):
        raise NotImplementedError(
            "max_norm: a row's norm needs all of its columns, and this table is sharded by columns; shard it by rows "
            "(torch.distributed.tensor.parallel.RowwiseParallel), or leave max_norm out"
        )
    if table.placements != layout.table:
        raise NotImplementedError(
            f"max_norm: a table with placements {table.placements} cannot be scaled in place; shard it by rows, "
            "or leave max_norm out"
        )
    all_ids = _local_ids(ids, (Replicate(),) * len(layout.ids))
    # Detached before it is local, so that there is nothing for autograd to see.
    own: Any = table.detach()
    embedding_renorm_(own.to_local(), all_ids, max_norm, norm_type, rows)


def _max_of_shards(
    local_table: Tensor,
    table: DTensor,
    layout: Layout,
    rows: shard.Shard,
    ids: Tensor,
    offsets: Tensor | None,
    include_last_offset: bool,
    padding_idx: int,
) -> Tensor:
    """This rank's elements of the maxima, zeros where they are another's.

    The ranks agree on the largest values, and then on the first position of each.
    """
    with torch.no_grad():
        values, positions = embedding_bag_shard_max(
            local_table, ids, offsets, include_last_offset, padding_idx, rows
        )
        found = positions >= 0
        keys = _ordered(values)
        keys = torch.where(found, keys, torch.iinfo(keys.dtype).min)
        found = found & (keys == _reduced(keys, "max", table, layout))
        nowhere = ids.numel()
        first = _reduced(torch.where(found, positions, nowhere), "min", table, layout)
        found = found & (positions == first)
        columns = torch.arange(values.shape[1], device=ids.device)
        own = ids.reshape(-1)[positions.clamp(min=0)] if nowhere else positions
        elements = (own.to(torch.int64) - rows.first_row) * values.shape[1] + columns
        elements = torch.where(found, elements, -1)
    flat = call_embedding_dense_double_backward(
        local_table.reshape(-1, 1), elements.view(-1), -1, False, None
    )
    return flat.view(values.shape)


def _ordered(values: Tensor) -> Tensor:
    """Integers in the order of these floats, where -0.0 is 0.0 and NaN is the largest."""
    wide = values.to(torch.promote_types(values.dtype, torch.float32)) + 0.0
    bits = wide.view(torch.int32 if wide.dtype == torch.float32 else torch.int64)
    largest = torch.iinfo(bits.dtype).max
    return torch.where(wide.isnan(), largest, torch.where(bits < 0, bits ^ largest, bits))


def _reduced(x: Tensor, op: str, table: DTensor, layout: Layout) -> Tensor:
    """x over the ranks that have the other rows."""
    mesh = table.device_mesh
    of_ranks = [Partial(op) if p == Shard(0) else Replicate() for p in layout.table]
    terms: Any = DTensor.from_local(x, mesh, of_ranks, run_check=False)
    return terms.redistribute(placements=[Replicate()] * mesh.ndim).to_local()
