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

from ..ops.bag import (
    at_elements,
    call_embedding_bag,
    call_embedding_bag_max,
    embedding_bag_shard_max,
)
from ..ops.lookup import call_embedding, embedding_renorm_
from ..shard import Shard as RowShard
from .checks import check_plain_offsets

Placements = tuple[Placement, ...]


class Layout(NamedTuple):
    """Where the tensors of one call lie, a placement for each dimension of the mesh."""

    table: Placements
    ids: Placements
    output: Placements
    grad_weight: Placements  # as each rank computes it

    @classmethod
    def of(
        cls, table: DTensor, ids: DTensor, column_dim: int, id_dims: tuple[int, ...]
    ) -> "Layout":
        """The layout of a lookup.

        Args:
            column_dim: the output's dimension of columns.
            id_dims: the dimensions on which ids may stay sharded beside a replicated table.
        """
        rules: list[Placements] = []
        for of_table, of_ids in zip(table.placements, ids.placements, strict=True):
            if type(of_table) is Shard:
                by_rows = of_table.dim == 0
                output = Partial() if by_rows else Shard(column_dim)
                rules.append((of_table, Replicate(), output, of_table))
            elif type(of_ids) is Shard and of_ids.dim in id_dims:
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
        A DTensor `[*input.shape, embedding_dim]`, placed as the module's docstring says.
    """
    ids, table = _dtensors("embedding", input=input, weight=weight)
    # The counts are those of the whole batch.
    id_dims = () if scale_grad_by_freq else tuple(range(ids.dim()))
    layout = Layout.of(table, ids, ids.dim(), id_dims)
    shape = (*ids.shape, table.shape[1])
    if table.device_mesh.get_coordinate() is None:
        return _of_outsider(table, layout, shape)
    shard = _shard(table, layout)
    if max_norm is not None:
        _renorm(table, ids, layout, shard, max_norm, norm_type)
    local_table = _local(table, layout.table, layout.grad_weight)
    local_ids = _local_ids(ids, layout.ids)
    output = call_embedding(local_table, local_ids, padding_idx, scale_grad_by_freq, False, shard)
    return _whole(output, table, layout, shape)


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
        A DTensor `[B, embedding_dim]`, placed as the module's docstring says.
    """
    ids, table, of_bags, scales = _dtensors(
        "embedding_bag",
        input=input,
        weight=weight,
        offsets=offsets,
        per_sample_weights=per_sample_weights,
    )
    id_dims = (0,) if offsets is None and not scale_grad_by_freq else ()
    layout = Layout.of(table, ids, 1, id_dims)
    num_bags = ids.shape[0] if offsets is None else offsets.shape[0] - include_last_offset
    shape = (num_bags, table.shape[1])
    if table.device_mesh.get_coordinate() is None:
        return _of_outsider(table, layout, shape)
    shard = _shard(table, layout)
    local_offsets = None if offsets is None else _local_ids(of_bags, _everywhere(table))
    local_weights = None
    if per_sample_weights is not None:
        # Each rank has the products with its own rows and columns.
        grad = tuple(
            Partial() if type(of_table) is Shard else of_ids
            for of_table, of_ids in zip(layout.table, layout.ids, strict=True)
        )
        local_weights = _local(scales, layout.ids, grad)
    if max_norm is not None:
        check_plain_offsets(local_offsets, ids)
        _renorm(table, ids, layout, shard, max_norm, norm_type)
    local_table = _local(table, layout.table, layout.grad_weight)
    local_ids = _local_ids(ids, layout.ids)
    bags = (local_ids, local_offsets, include_last_offset, padding_idx)
    if mode == "max" and shard is not None:
        output = _max_of_shards(local_table, table, layout, shard, *bags)
    elif mode == "max":
        output = call_embedding_bag_max(local_table, *bags)
    else:
        output = call_embedding_bag(
            local_table, local_weights, *bags, mode, scale_grad_by_freq, False, shard
        )
    return _whole(output, table, layout, shape)


def zero_row_(weight: DTensor, row: int) -> None:
    """Fill a row with zeros wherever it lies; `weight[row].fill_(0)` fills a copy where rows are sharded.

    A mask of a byte a row of the whole table says where, as that serves every placement.
    """
    is_row = torch.zeros(weight.shape[0], 1, dtype=torch.bool, device=weight.device)
    is_row[row] = True
    weight.masked_fill_(_replicated(is_row, weight.device_mesh), 0)


def _dtensors(function: str, **tensors: Tensor | None) -> list[Any]:
    """These tensors, all DTensors of one mesh; plain ones are taken for replicated where torch would.

    Raises:
        RuntimeError: one is a plain tensor, or lies on another mesh.
    """
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    sharded = [name for name, tensor in given.items() if isinstance(tensor, DTensor)]
    mesh = given[sharded[0]].device_mesh  # type: ignore[attr-defined]
    found: dict[str, DTensor] = {}
    for name, tensor in given.items():
        if not isinstance(tensor, DTensor):
            if not torch._C._get_dtensor_allow_implicit_replication():
                raise RuntimeError(_mixed(function, name, sharded))
            tensor = _replicated(tensor, mesh)
        if tensor.device_mesh != mesh:
            raise RuntimeError(
                f"{function}: {name} lies on {tensor.device_mesh}, and {sharded[0]} on {mesh}; "
                "distribute all of them on one mesh"
            )
        found[name] = tensor
    return [found.get(name) for name in tensors]


def _mixed(function: str, name: str, sharded: list[str]) -> str:
    remedy = (
        "distribute the table with torch.distributed.tensor.distribute_tensor"
        if name == "weight"
        else f"make one with DTensor.from_local({name}, {sharded[0]}.device_mesh, placements), which says whether "
        "every rank has the same, or let torch.distributed.tensor.parallel.parallelize_module shard the layer"
    )
    return (
        f"{function}: got mixed torch.Tensor and DTensor: {name} is a plain tensor, and {', '.join(sharded)} a "
        f"DTensor; {remedy}"
    )


def _everywhere(tensor: DTensor) -> Placements:
    """Replicated on every dimension of its mesh."""
    return (Replicate(),) * tensor.device_mesh.ndim


def _replicated(tensor: Tensor, mesh: DeviceMesh) -> DTensor:
    """What every rank has the same of."""
    return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)


def _shard(table: DTensor, layout: Layout) -> RowShard | None:
    """The rows of the table that this rank has; None: all of them."""
    first_row, num_rows, mesh = 0, table.shape[0], table.device_mesh
    by_rows = [d for d, p in enumerate(layout.table) if p == Shard(0)]
    for mesh_dim in by_rows:
        # As torch.chunk cuts them.
        chunk = -(-num_rows // mesh.size(mesh_dim))
        start = torch.sym_min(_place(mesh, mesh_dim) * chunk, num_rows)
        first_row += start
        num_rows = torch.sym_min(chunk, num_rows - start)
    return RowShard(first_row, table.shape[0]) if by_rows else None


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
    # With the placements that it has, it moves nothing, and reduces the gradient in backward.
    if tensor.placements != placements or grad_placements != placements:
        tensor = tensor.redistribute(placements=placements)
    return tensor.to_local(grad_placements=grad_placements)


def _local_ids(ids: DTensor, placements: Placements) -> Tensor:
    if ids.placements != placements:
        if ids.dtype == torch.int16:
            # Collectives do not take int16.
            ids = ids.to(torch.int32)  # type: ignore[assignment]
        ids = ids.redistribute(placements=placements)
    local = ids.to_local()
    # Plain, or the lookup is not a plain call.
    return local.wait() if isinstance(local, AsyncCollectiveTensor) else local


def _whole(output: Tensor, table: DTensor, layout: Layout, shape: tuple[int, ...]) -> Tensor:
    """The DTensor that the ranks' outputs are parts or terms of."""
    whole: Tensor = _FromLocal.apply(output, table.device_mesh, layout.output, shape)
    return whole


def _of_outsider(table: DTensor, layout: Layout, shape: tuple[int, ...]) -> Tensor:
    """The output on a rank that is not in the mesh, and has nothing of it."""
    return _whole(table.to_local(), table, layout, shape)


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
            stride=tuple(strides),
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
    shard: RowShard | None,
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
    all_ids = _local_ids(ids, _everywhere(table))
    # Detached before it is local, and without a gradient for a compiler, so that there is nothing for autograd to see.
    own: Any = table.detach()
    with torch.no_grad():
        embedding_renorm_(own.to_local(), all_ids, max_norm, norm_type, shard)


def _max_of_shards(
    local_table: Tensor,
    table: DTensor,
    layout: Layout,
    shard: RowShard,
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
            local_table, ids, offsets, include_last_offset, padding_idx, shard
        )
        found, num_ids = positions >= 0, ids.numel()
        keys = _ordered(values)
        keys = torch.where(found, keys, torch.iinfo(keys.dtype).min)
        found &= keys == _reduced(keys, "max", table, layout)
        places = positions.to(torch.int32 if num_ids < 2**31 else torch.int64)
        first = _reduced(torch.where(found, places, num_ids), "min", table, layout)
        found &= places == first
        columns = torch.arange(values.shape[1], device=ids.device)
        own = ids.reshape(-1)[positions.clamp(min=0)] if num_ids else positions
        elements = (own.to(torch.int64) - shard.first_row) * values.shape[1] + columns
        elements = torch.where(found, elements, -1)
    return at_elements(local_table, elements)


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
    return terms.redistribute(placements=_everywhere(table)).to_local()
