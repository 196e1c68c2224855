"""One table whose rows lie on several ranks, each of which looks up ids of its own.

A forward has three collectives: how many rows a rank wants of each other, which, and the rows. A backward has one. How
many bytes that is, docs/distributed.md says, "What a step sends".
"""

import zlib
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from .. import bounds
from ..functional.checks import PLAIN_TYPES, wrap_padding_idx, wrong_type
from ..functional.lookup import check_tensors
from ..functional.replicas import is_gathered
from ..ops.lookup import call_embedding, embedding_renorm_, sparse_gradient

# How a rank tells the others, in place of how many rows it wants, that it has an id out of range.
FAILED = -1


class ShardedEmbedding(torch.nn.Module):
    """A table whose rows are spread over the ranks of a mesh; `from_module` makes one.

    Each rank calls the layer with its own ids, of any number and shape, and gets their rows. An id that occurs several
    times is sent once; its gradients are added in fp32 (fp64 for fp64 tables), rounded once, and sent once. Every
    forward and every backward is a collective: a rank without ids takes part with an empty tensor.

    Input: ids `[*]` of the whole table, int64, int32, int16 or uint8, on the table's device. Output: `[*,
    embedding_dim]`, a plain tensor in the table's dtype.

    **Gradient.** The sum over all ranks, as if their losses were added. DistributedDataParallel and FSDP, which take
    the mean of other gradients, must leave this table out. The gradient is sparse and has this rank's rows: the
    optimizers of `gpu_embed.optim` and torch.optim.SparseAdam take it. `gpu_embed.optim.clip_grad_norm_` and
    `torch.distributed.fsdp.sharded_grad_scaler.ShardedGradScaler` see all ranks' rows, and torch's see this rank's.

    **State.** The state_dict holds the whole table as a DTensor, `Shard(0)` in the order of ids, for any `rows`. It
    loads such a DTensor, or a plain `[num_embeddings, embedding_dim]`. The state_dict of an optimizer of
    `gpu_embed.optim` holds DTensors too; torch.optim.SparseAdam saves each rank's rows alone. Every rank saves and
    loads: with `rows="round_robin"`, and for an optimizer with `rows=`, these are collectives.

    Attributes:
        weight: this rank's rows, `[own rows, embedding_dim]`.
        num_embeddings, embedding_dim: of the whole table.
        padding_idx, max_norm, norm_type: as in torch.nn.Embedding; each rank scales those of its rows that any rank
            looks up.
        distinct: whether ids are made distinct before they are sent.
        sharding: which rank has which rows.

    Example::

        table = ShardedEmbedding.from_module(torch.nn.Embedding(1_000_000, 64), mesh, rows="round_robin")
        optimizer = gpu_embed.optim.RowWiseAdagrad(table.parameters(), lr=0.05)
        rows = table(ids)  # each rank its own ids
    """

    sparse = True

    def __init__(
        self,
        weight: Tensor,
        sharding: "RowSharding",
        distinct: bool = True,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
    ) -> None:
        """Take this rank's rows, `[sharding.num_rows, embedding_dim]`; `from_module` cuts them from a whole table."""
        if not isinstance(sharding, RowSharding):
            raise TypeError(
                "ShardedEmbedding takes this rank's rows and a RowSharding: make it of a whole layer, by "
                "ShardedEmbedding.from_module(torch.nn.Embedding(...), mesh)"
            )
        super().__init__()
        self.sharding, self.distinct = sharding, distinct
        self.num_embeddings, self.embedding_dim = sharding.num_embeddings, weight.shape[1]
        self.padding_idx, self.max_norm, self.norm_type = padding_idx, max_norm, norm_type
        self.weight = torch.nn.Parameter(weight)

    @classmethod
    def from_module(
        cls,
        layer: torch.nn.Embedding,
        mesh: DeviceMesh,
        rows: Literal["blocks", "round_robin"] = "blocks",
        distinct: bool = True,
    ) -> "ShardedEmbedding":
        """Spread the table of a layer over a mesh; every rank gives the same layer.

        Args:
            layer: torch's or ours; each rank copies its rows to the mesh's device. On the meta device there is
                nothing to copy: call `to_empty`, and then load a state_dict or `reset_parameters`.
            mesh: of one dimension.
            rows: "blocks": as torch.chunk cuts them. "round_robin": rank i % ranks has row i; this spreads the frequent
                ids of a table that is sorted by frequency.
            distinct: make ids distinct before they are sent; False saves a sort where few occur twice.

        Raises:
            TypeError: the layer is no torch.nn.Embedding, or the mesh no DeviceMesh.
            ValueError: the mesh has several dimensions, or lacks this process; rows is another word; the layer has
                scale_grad_by_freq, or is sharded already.
        """
        where = f"{cls.__name__}.from_module"
        if not isinstance(layer, torch.nn.Embedding):
            hint = ""
            if isinstance(layer, torch.nn.EmbeddingBag):
                hint = "; look up rows of an Embedding, and take the sums or means of these"
            raise TypeError(f"{where} takes a torch.nn.Embedding, not {type(layer).__name__}{hint}")
        if not isinstance(mesh, DeviceMesh):
            raise TypeError(
                f"{where} takes a DeviceMesh, such as init_device_mesh({layer.weight.device.type!r}, "
                f"(dist.get_world_size(),)), not {type(mesh).__name__}"
            )
        if mesh.ndim != 1:
            raise ValueError(
                f"{where} spreads rows over one dimension of a mesh, and this one has {mesh.ndim}: pass a mesh of all "
                'ranks. One of its dimensions, as mesh["tp"], makes replicas, which nothing keeps equal'
            )
        if mesh.get_coordinate() is None:
            raise ValueError(
                f"{where}: this process is not in the mesh; make the layer in those that are"
            )
        ranks = mesh.mesh.tolist()
        if ranks != sorted(ranks):
            # What is saved goes by the mesh, and what is sent by the process group, whose ranks are sorted.
            raise ValueError(f"{where}: the mesh's ranks must be in ascending order, got {ranks}")
        if rows not in ("blocks", "round_robin"):
            raise ValueError(f'{where}: rows must be "blocks" or "round_robin", got {rows!r}')
        if isinstance(layer.weight, DTensor):
            raise ValueError(f"{where}: the table is sharded already, as {layer.weight.placements}")
        if layer.scale_grad_by_freq:
            raise ValueError(
                f"{where}: scale_grad_by_freq divides by counts over all ranks, which no rank has; leave it out, or "
                "shard the table with torch.distributed.tensor.parallel.RowwiseParallel"
            )
        sharding = RowSharding(mesh, layer.num_embeddings, rows == "round_robin")
        device = "meta" if layer.weight.is_meta else mesh.device_type
        weight = layer.weight.detach()[sharding.own_rows].to(
            device, copy=True, memory_format=torch.contiguous_format
        )
        options = layer.padding_idx, layer.max_norm, layer.norm_type
        made = cls(weight, sharding, distinct, *options)
        made.weight.requires_grad_(layer.weight.requires_grad)
        return made.train(layer.training)

    @property
    def _padding_row(self) -> int:
        """This rank's padding row, or -1."""
        return self.sharding.local_row(wrap_padding_idx(self.padding_idx, self.num_embeddings))

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "weight":
            self._mark()

    def reset_parameters(self) -> None:
        """Draw this rank's rows from the normal distribution, as torch.nn.Embedding does.

        They are other ones on each rank, also where all ranks have one seed.
        """
        seed = int(torch.randint(2**62, (), device="cpu")) + self.sharding.rank
        with torch.no_grad():
            if not self.weight.is_meta:
                drawn = torch.Generator(self.weight.device).manual_seed(seed)
                self.weight.normal_(generator=drawn)
            if self._padding_row >= 0:
                self.weight[self._padding_row].fill_(0)

    @torch.compiler.disable
    def forward(self, input: Tensor) -> Tensor:
        """The rows of these ids.

        Raises:
            IndexError: a rank has an id out of range, unless `set_bounds_check("off")`. Every rank raises in the same
                call; the message of the rank that has the id names it.
            RuntimeError: ids are not integers or on another device; or DistributedDataParallel or FSDP has the table.
        """
        self._check(input)
        sharding, ids = self.sharding, input.reshape(-1)
        route = _Route(ids, sharding, self.distinct)
        asked, wanted = self._agree(route, input)
        local_rows = route.local_rows[: sum(wanted)]
        asked_rows = local_rows.new_empty(sum(asked))
        dist.all_to_all_single(asked_rows, local_rows, asked, wanted, sharding.group)
        if self.max_norm is not None:
            embedding_renorm_(self.weight.detach(), asked_rows, self.max_norm, self.norm_type)
        rows = _OwnedRows.apply(
            self.weight, asked_rows, asked, wanted, self._padding_row, sharding.group
        )
        output = call_embedding(rows, route.inverse, -1, False, False)
        return output.view(*input.shape, self.embedding_dim)

    def _check(self, input: Tensor) -> None:
        if type(input) not in PLAIN_TYPES:
            raise wrong_type("ShardedEmbedding", "input", 1, "Tensor", input)
        check_tensors(input, self.weight)
        ddp: Any = DistributedDataParallel._active_ddp_module
        if ddp is not None and any(param is self.weight for param in ddp._module_parameters):
            raise RuntimeError(
                "ShardedEmbedding under DistributedDataParallel: it has overwritten the rows of each rank with those "
                "of rank 0, and would average their gradients. Make the model anew, and before it is wrapped name the "
                "table's weight in model._ddp_params_and_buffers_to_ignore; for TorchRec's DistributedModelParallel in "
                "data_parallel_wrapper=DefaultDataParallelWrapper(params_to_ignore=[...])"
            )
        if is_gathered(self.weight):
            raise RuntimeError(
                "ShardedEmbedding under FSDP: it takes each rank's rows for parts of the same. Make the model anew, "
                "and keep the table out, by fully_shard(..., ignored_params={table.weight})"
            )
        own = self.sharding.num_rows, self.embedding_dim
        if self.weight.shape != own:
            raise RuntimeError(
                f"ShardedEmbedding: its weight must be this rank's rows, {list(own)}, but is "
                f"{list(self.weight.shape)}; load_state_dict takes a whole table"
            )

    def _agree(self, route: "_Route", input: Tensor) -> tuple[list[int], list[int]]:
        """How many rows each rank gets from this one, and this one from each; the host waits for it.

        Raises RuntimeError if the ranks' tables differ, IndexError if a rank has an id out of range.
        """
        wanted, sharding = route.wanted, self.sharding
        if bounds.BOUNDS_CHECK.value != "off":
            wanted = torch.where(route.has_out_of_range, FAILED, wanted)
        table = self.num_embeddings, self.embedding_dim, sharding.round_robin, self.weight.dtype
        code = zlib.crc32(repr(table).encode())
        told = torch.stack([wanted, torch.full_like(wanted, code)], 1)
        heard = torch.empty_like(told)
        dist.all_to_all_single(heard, told, group=sharding.group)
        *counts, codes = torch.stack([heard[:, 0], wanted, heard[:, 1]]).tolist()
        if others := [rank for rank, other in enumerate(codes) if other != code]:
            raise RuntimeError(
                f"ShardedEmbedding: ranks {others} of the mesh have a table of another shape, dtype or rows= than this "
                f"rank, {sharding.rank}: every rank must give from_module the same"
            )
        if FAILED in counts[1]:
            ids = input.reshape(-1).to(torch.int64)
            position = int((~bounds.in_table(ids, self.num_embeddings)).nonzero()[0])
            index = int(ids[position])
            raise bounds.out_of_range_error(index, position, self.num_embeddings, input.shape)
        if FAILED in counts[0]:
            failed = [rank for rank, count in enumerate(counts[0]) if count == FAILED]
            raise IndexError(
                f"index out of range in self: ranks {failed} of the mesh have ids out of range, which their errors "
                "name. The table and the ids are unchanged."
            )
        return counts[0], counts[1]

    def _mark(self) -> None:
        """Tell the optimizers of `gpu_embed.optim` which rows these are."""
        self.weight.row_sharding = self.sharding  # type: ignore[attr-defined]

    def _apply(self, fn: Any, recurse: bool = True) -> "ShardedEmbedding":
        super()._apply(fn, recurse)
        # It may be another parameter now, as after to_empty.
        self._mark()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._mark()

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.sharding.whole(self.weight.detach())

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key, own = f"{prefix}weight", dict(state_dict)
        whole, shape = own.get(key), (self.num_embeddings, self.embedding_dim)
        if isinstance(whole, Tensor):
            if whole.shape != shape:
                error_msgs.append(
                    f"size mismatch for {key}: the shape from checkpoint is {list(whole.shape)}, that of the whole "
                    f"table is {list(shape)}."
                )
                return
            own[key] = self.sharding.own(whole)
        super()._load_from_state_dict(
            own, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def extra_repr(self) -> str:
        sharding = self.sharding
        rows = "round_robin" if sharding.round_robin else "blocks"
        options = "".join(
            f", {name}={value}"
            for name in ("padding_idx", "max_norm")
            if (value := getattr(self, name)) is not None
        )
        return (
            f"{self.num_embeddings}, {self.embedding_dim}{options}, rows={rows!r}, distinct={self.distinct}, "
            f"{sharding.num_rows} rows on rank {sharding.rank} of {sharding.ranks}"
        )


class RowSharding:
    """Which rank has which rows of a table.

    In blocks, rank r has the rows from r * chunk on, as torch.chunk cuts them. Round robin, it has rows r, r + ranks,
    r + 2 * ranks and so on.

    Attributes:
        chunk: the most rows that a rank has.
        own_rows: which rows of the whole table this rank has.
        num_rows: how many.
    """

    def __init__(self, mesh: DeviceMesh, num_embeddings: int, round_robin: bool) -> None:
        self.mesh, self.num_embeddings, self.round_robin = mesh, num_embeddings, round_robin
        self.ranks, self.rank = mesh.size(), mesh.get_local_rank()
        self.chunk = max(-(-num_embeddings // self.ranks), 1)
        if round_robin:
            self.own_rows = slice(self.rank, num_embeddings, self.ranks)
        else:
            first = self.rank * self.chunk
            self.own_rows = slice(first, first + self.chunk)
        self.num_rows = len(range(num_embeddings)[self.own_rows])

    @property
    def group(self) -> Any:
        return self.mesh.get_group()

    def places(self, ids: Any) -> Any:
        """owner * chunk + its row, of ids in the table: in the order of places, ids of one owner are together."""
        if not self.round_robin:
            return ids
        return ids % self.ranks * self.chunk + ids // self.ranks

    def local_row(self, index: int) -> int:
        """This rank's row of an id; -1: it has none."""
        rows = range(self.num_embeddings)[self.own_rows]
        return rows.index(index) if index in rows else -1

    def whole(self, local: Tensor) -> DTensor:
        """The DTensor of all ranks' rows [own rows, ...], in the order of ids; in blocks it shares their memory."""
        block = self._to_block(local) if self.round_robin else local
        shape = torch.Size((self.num_embeddings, *local.shape[1:]))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            block, self.mesh, [Shard(0)], run_check=False, shape=shape, stride=stride
        )

    def own(self, whole: Tensor) -> Tensor:
        """This rank's rows of a whole table [num_embeddings, ...], plain or a DTensor."""
        if not isinstance(whole, DTensor):
            return whole[self.own_rows]
        if (
            whole.device_mesh != self.mesh
            and whole.device_mesh.mesh.tolist() != self.mesh.mesh.tolist()
        ):
            raise ValueError(
                f"the table to be loaded lies on {whole.device_mesh}, and this one on {self.mesh}: load its "
                "full_tensor(), or by torch.distributed.checkpoint"
            )
        with torch.no_grad():
            block = whole.redistribute(self.mesh, [Shard(0)]).to_local()
        return self._from_block(block) if self.round_robin else block

    def _common(self, block: int, rank: int) -> range:
        """The places in a block of the rows that a rank has round robin."""
        first = block * self.chunk
        size = min(self.chunk, max(self.num_embeddings - first, 0))
        return range((rank - first) % self.ranks, size, self.ranks)

    def _sizes(self) -> tuple[list[int], list[int]]:
        """How many of this rank's rows are in each block, and of its block's are each rank's."""
        ranks = range(self.ranks)
        return (
            [len(self._common(block, self.rank)) for block in ranks],
            [len(self._common(self.rank, rank)) for rank in ranks],
        )

    def _to_block(self, local: Tensor) -> Tensor:
        in_blocks, of_ranks = self._sizes()
        received = local.new_empty((sum(of_ranks), *local.shape[1:]))
        dist.all_to_all_single(received, local.contiguous(), of_ranks, in_blocks, self.group)
        block = torch.empty_like(received)
        for rank, rows in enumerate(received.split(of_ranks)):
            block[self._common(self.rank, rank).start :: self.ranks] = rows
        return block

    def _from_block(self, block: Tensor) -> Tensor:
        in_blocks, of_ranks = self._sizes()
        ranks = range(self.ranks)
        parts = torch.cat([block[self._common(self.rank, r).start :: self.ranks] for r in ranks])
        local = block.new_empty((self.num_rows, *block.shape[1:]))
        dist.all_to_all_single(local, parts, in_blocks, of_ranks, self.group)
        return local


class _Route:
    """Which rows of which ranks a rank's ids [N] want; nothing waits for the GPU.

    Attributes:
        local_rows: [N], the owners' rows, in the order of owners; as many as are wanted count.
        wanted: int64 [ranks], how many of each.
        inverse: int64 [N], where the row of each id is among these; behind them for an id out of range.
        has_out_of_range: bool [], whether there is an id out of range.
    """

    def __init__(self, ids: Tensor, sharding: RowSharding, distinct: bool) -> None:
        chunk, ranks = sharding.chunk, sharding.ranks
        end, device, ids = ranks * chunk, ids.device, ids.to(torch.int64)
        places = sharding.places(ids)
        places = torch.where(bounds.in_table(ids, sharding.num_embeddings), places, end)
        # Half the bytes to sort; and of a local row, on the wire.
        places, order = _narrow(places, end).sort(stable=True)
        is_first = torch.ones(len(places), dtype=torch.bool, device=device)
        if distinct:
            torch.ne(places[1:], places[:-1], out=is_first[1:])
        # How many distinct ones there are among the first n.
        number = torch.zeros(len(places) + 1, dtype=torch.int64, device=device)
        torch.cumsum(is_first, 0, out=number[1:])
        edges = torch.arange(0, end + 1, chunk, dtype=places.dtype, device=device)
        ends = torch.searchsorted(places, edges)
        self.wanted = number[ends].diff()
        self.has_out_of_range = ends[-1] < len(places)
        number = number[1:] - 1
        self.inverse = torch.empty_like(number).scatter_(0, order, number)
        local_rows = _narrow(places % chunk, chunk)
        self.local_rows = torch.empty_like(local_rows).scatter_(0, number, local_rows)


def _narrow(numbers: Tensor, largest: int) -> Tensor:
    return numbers.to(torch.int32) if largest < 2**31 else numbers


class _OwnedRows(torch.autograd.Function):
    """This rank's rows to the ranks that want them; in backward their gradients to the rows' owners.

    `asked_rows` [n] are the numbers of the rows that each rank asks for, `asked` how many, and `wanted` how many rows
    come from each rank. Output: `[sum(wanted), D]`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        asked_rows: Tensor,
        asked: list[int],
        wanted: list[int],
        padding_row: int,
        group: Any,
    ) -> Tensor:
        ctx.num_rows, ctx.asked_rows, ctx.sizes = weight.shape[0], asked_rows, (asked, wanted)
        ctx.padding_row, ctx.group = padding_row, group
        rows = call_embedding(weight, asked_rows, -1, False, False)
        output = rows.new_empty(sum(wanted), weight.shape[1])
        dist.all_to_all_single(output, rows, wanted, asked, group)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        asked, wanted = ctx.sizes
        of_rows = grad.new_empty(sum(asked), grad.shape[1])
        dist.all_to_all_single(of_rows, grad.contiguous(), asked, wanted, ctx.group)
        gradient = sparse_gradient(
            of_rows, ctx.asked_rows, ctx.num_rows, ctx.padding_row, False, is_new=True
        )
        return gradient, None, None, None, None, None
