"""EmbeddingBag on several ranks, by rows or by columns of its table."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle
from torch.distributed.tensor.placement_types import Placement

from ..nn import EmbeddingBag
from ..nn.tables import BatchedTables

# What to do about a module that is no bag of ours.
HINTS = {
    torch.nn.EmbeddingBag: "; call gpu_embed.replace_embeddings(model) before",
    torch.nn.Embedding: "; for an Embedding take torch's RowwiseParallel or ColwiseParallel",
    BatchedTables: "; batched tables are sharded by FSDP2, or by gpu_embed.torchrec",
}


class _BagParallel(ParallelStyle):
    """A table sharded on one dimension; ids, offsets and per-sample weights to DTensors, the output back."""

    table_dim: int
    default_output: Placement = Replicate()

    def __init__(
        self,
        *,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
    ) -> None:
        super().__init__()
        self.input_layouts = input_layouts or Replicate()
        self.output_layouts = output_layouts or self.default_output
        self.use_local_output = use_local_output
        if not isinstance(self.output_layouts, Placement):
            raise TypeError(
                f"{type(self).__name__}: output_layouts must be a placement, such as Replicate() or Shard(0), not "
                f"{self.output_layouts!r}"
            )
        if self.input_layouts not in (Replicate(), Shard(0)):
            raise ValueError(
                f"{type(self).__name__}: input_layouts must be Replicate(), the same bags on every rank, or Shard(0), "
                f"each rank's own rows of ids [B, L]; got {self.input_layouts}"
            )

    def _apply(self, module: torch.nn.Module, device_mesh: DeviceMesh) -> torch.nn.Module:
        style = type(self).__name__
        if not isinstance(module, EmbeddingBag):
            hint = next((hint for kind, hint in HINTS.items() if isinstance(module, kind)), "")
            raise NotImplementedError(
                f"{style} is for gpu_embed.EmbeddingBag, not {type(module).__name__}{hint}"
            )
        if device_mesh.ndim != 1:
            raise ValueError(
                f"{style} shards over one dimension of a mesh, and this one has {device_mesh.ndim}: pass one of them, "
                'as in mesh["tp"]'
            )
        weight = module.weight
        if isinstance(weight, DTensor):
            raise ValueError(f"{style}: the table is sharded already, as {weight.placements}")
        table = distribute_tensor(
            weight, device_mesh, [Shard(self.table_dim)], src_data_rank=self.src_data_rank
        )
        module.weight = torch.nn.Parameter(table, weight.requires_grad)

        def prepare(_: torch.nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
            return (
                tuple(self._distributed(i, value, device_mesh) for i, value in enumerate(args)),
                {name: self._distributed(name, x, device_mesh) for name, x in kwargs.items()},
            )

        def finish(_: torch.nn.Module, args: Any, output: DTensor) -> Tensor:
            output = output.redistribute(placements=[self.output_layouts])
            return output.to_local() if self.use_local_output else output

        module.register_forward_pre_hook(prepare, with_kwargs=True)
        module.register_forward_hook(finish)
        return module

    def _distributed(self, argument: int | str, value: Any, mesh: DeviceMesh) -> Any:
        if not isinstance(value, Tensor) or isinstance(value, DTensor):
            return value
        if self.input_layouts == Shard(0) and (argument in (1, "offsets") or value.dim() == 1):
            raise NotImplementedError(
                f"{type(self).__name__}: input_layouts=Shard(0) is for ids [B, L]; offsets cut the ids of one rank, so "
                "pad the bags with padding_idx, or gather ids and offsets and use Replicate()"
            )
        return DTensor.from_local(value, mesh, [self.input_layouts], run_check=False)


class RowwiseBagParallel(_BagParallel):
    """A `gpu_embed.EmbeddingBag` with its table sharded by rows.

    Each rank reduces the rows that it has, of all bags; the ranks' terms are then added up, or for maxima compared.

    Args:
        input_layouts: Replicate() (default): every rank has the same bags. Shard(0): each has its own rows of ids
            [B, L], as many as the others; they are gathered.
        output_layouts: Replicate() (default), or Shard(0) or Shard(1) for a part on each rank.
        use_local_output: whether the output is a plain tensor (default), or a DTensor.

    Raises:
        NotImplementedError: the module is no `gpu_embed.EmbeddingBag`; offsets with Shard(0) are refused by the
            forward.
        ValueError: the mesh has several dimensions, or the table is sharded already.

    Example::

        styles = {"bags": gpu_embed.distributed.RowwiseBagParallel()}
        torch.distributed.tensor.parallel.parallelize_module(model, mesh, styles)
    """

    table_dim = 0


class ColwiseBagParallel(_BagParallel):
    """A `gpu_embed.EmbeddingBag` with its table sharded by columns: each rank has some columns of every bag.

    Args:
        input_layouts, use_local_output: as for `RowwiseBagParallel`.
        output_layouts: Shard(1) (default): each rank keeps its columns. Replicate(): all of them.

    Raises:
        NotImplementedError: the module is no `gpu_embed.EmbeddingBag`; offsets with Shard(0), and max_norm, which
            needs whole rows, are refused by the forward.
    """

    table_dim = 1
    default_output = Shard(1)
