"""What `distributed` compares: tables of fp32 whose rows are spread over the ranks, and their training steps.

All hold small integers or eighths of them, and get small integers as gradients: their sums are exact in any order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module

import gpu_embed
from gpu_embed.distributed import ShardedEmbedding

from . import ids as ids_module
from .distributed import BAG, DISTRIBUTION, TABLES, Shape

LR = 2.0**-3


class ShardedTable(ABC):
    """A layer whose rows are spread over the ranks, and its training step."""

    has_own_ids = True  # or the same on all ranks
    bag_size = 1  # ids that make one row of the output

    def __init__(self, shape: Shape, mesh: DeviceMesh) -> None:
        self.shape, self.mesh = shape, mesh
        rank = mesh.get_rank()
        self.optimizer = self.make()
        own = torch.Generator("cpu").manual_seed(rank)
        with torch.no_grad():
            for weight in self.rows():
                values = torch.randint(-8, 9, weight.shape, generator=own, device="cpu")
                weight.copy_(values.float() * LR)
        self.ids = self.draw(rank if self.has_own_ids else 0)
        size = shape.ids // self.bag_size, shape.dim
        seeded = torch.Generator("cpu").manual_seed(0)
        self.grad_output = torch.randint(-2, 3, size, generator=seeded, device="cpu").float()

    @abstractmethod
    def make(self) -> torch.optim.Optimizer | None:
        """The layer, without rows. Returns what updates it after the backward pass, or None."""

    @abstractmethod
    def lookup(self) -> Tensor:
        """The rows of the ids, or the bags': [-1, dim]."""

    @abstractmethod
    def rows(self) -> Iterable[Tensor]:
        """The rows that this rank has, of each table."""

    def draw(self, seed: int) -> Tensor:
        return ids_module.draw(DISTRIBUTION, self.shape.ids, self.shape.rows, seed)

    def backward(self) -> Tensor:
        """Forward and backward; returns the output."""
        if self.optimizer is not None:
            self.optimizer.zero_grad()
        output = self.lookup()
        output.backward(self.grad_output)
        return output.detach()

    def update(self) -> None:
        if self.optimizer is not None:
            self.optimizer.step()

    def step(self) -> None:
        self.backward()
        self.update()

    def gradient_bytes(self) -> int:
        """Of what this rank holds of the gradient after the backward pass."""
        if self.optimizer is None:
            return 0
        weights = (w for group in self.optimizer.param_groups for w in group["params"])
        parts = [part for w in weights if w.grad is not None for part in _parts(w.grad)]
        # A gradient may be cut from a larger one, and tables may share one.
        storages = {part.data_ptr(): part for part in (part.untyped_storage() for part in parts)}
        return sum(storage.nbytes() for storage in storages.values())


def _parts(gradient: Tensor) -> Iterable[Tensor]:
    if isinstance(gradient, DTensor):
        gradient = gradient.to_local()
    return (gradient._indices(), gradient._values()) if gradient.is_sparse else (gradient,)


class RowwiseTable(ShardedTable):
    """Under torch's RowwiseParallel."""

    has_own_ids = False
    kind: type[nn.Embedding]

    def make(self) -> torch.optim.Optimizer:
        rowwise = RowwiseParallel(input_layouts=Replicate())
        layer = self.kind(self.shape.rows, self.shape.dim, device="meta")
        self.layer = parallelize_module(layer, self.mesh, rowwise).to_empty(device="cpu")
        return torch.optim.SGD(self.layer.parameters(), lr=LR)

    def lookup(self) -> Tensor:
        output: Tensor = self.layer(self.ids)
        if isinstance(output, AsyncCollectiveTensor):
            # As what follows in a model does; what nobody waits for is kept for good.
            output.wait()
        return output

    def rows(self) -> Iterable[Tensor]:
        weight = self.layer.weight
        assert isinstance(weight, DTensor)
        return (weight.to_local(),)


class TorchRowwise(RowwiseTable):
    kind = nn.Embedding


class OurRowwise(RowwiseTable):
    kind = gpu_embed.Embedding


class ExchangedTable(ShardedTable):
    """ShardedEmbedding, with a sparse gradient of its own rows."""

    distinct = True

    def make(self) -> torch.optim.Optimizer:
        whole = gpu_embed.Embedding(self.shape.rows, self.shape.dim, device="meta")
        self.layer = ShardedEmbedding.from_module(whole, self.mesh, distinct=self.distinct)
        self.layer.to_empty(device="cpu")
        return gpu_embed.optim.SGD(self.layer.parameters(), lr=LR)

    def lookup(self) -> Tensor:
        output: Tensor = self.layer(self.ids)
        return output

    def rows(self) -> Iterable[Tensor]:
        return (self.layer.weight,)


class ExchangedAllIds(ExchangedTable):
    distinct = False


class TorchRecTable(ShardedTable):
    """A module of TorchRec's, its tables by rows; where it is fused, its backward pass updates them."""

    kernel = "fused"
    num_tables = 1

    @abstractmethod
    def module_and_sharder(self) -> tuple[nn.Module, Any]: ...

    def make(self) -> torch.optim.Optimizer | None:
        from torchrec.distributed import DistributedModelParallel, comm_ops, sharding_plan, types

        # Else it takes the mean of the ranks' gradients.
        comm_ops.set_gradient_division(False)
        module, sharder = self.module_and_sharder()
        ranks = self.shape.ranks
        how = {name: sharding_plan.row_wise(compute_kernel=self.kernel) for name in self.names}
        plan = sharding_plan.construct_module_sharding_plan(
            module, how, sharder, local_size=ranks, world_size=ranks, device_type="cpu"
        )
        self.layer = DistributedModelParallel(
            module,
            types.ShardingEnv.from_process_group(dist.group.WORLD),
            torch.device("cpu"),
            types.ShardingPlan({"": plan}),
            [sharder],
        )
        lengths = self.shape.ids // self.bag_size
        self.lengths = torch.full((lengths,), self.bag_size, dtype=torch.int32, device="cpu")
        if self.kernel == "fused":
            return None
        return torch.optim.SGD(self.layer.parameters(), lr=LR)

    @property
    def names(self) -> list[str]:
        return [f"table{number}" for number in range(self.num_tables)]

    def tables(self, kind: Any) -> list[Any]:
        sizes = {"embedding_dim": self.shape.dim, "num_embeddings": self.rows_a_table}
        return [kind(name=name, feature_names=[name], **sizes) for name in self.names]

    @property
    def rows_a_table(self) -> int:
        return self.shape.rows // self.num_tables

    def batch(self) -> Any:
        from torchrec import KeyedJaggedTensor

        return KeyedJaggedTensor.from_lengths_sync(self.names, self.ids, self.lengths)

    def rows(self) -> Iterable[Tensor]:
        shards = (value.local_shards() for value in self.layer.state_dict().values())
        return [shard.tensor for own in shards for shard in own]


def _fbgemm_sgd() -> dict[str, Any]:
    from fbgemm_gpu.split_embedding_configs import EmbOptimType

    return {"optimizer": EmbOptimType.EXACT_SGD, "learning_rate": LR}


class TorchRecRows(TorchRecTable):
    """TorchRec's EmbeddingCollection, of one table."""

    def module_and_sharder(self) -> tuple[nn.Module, Any]:
        import torchrec
        from torchrec.distributed.embedding import EmbeddingCollectionSharder

        tables = self.tables(torchrec.EmbeddingConfig)
        module = torchrec.EmbeddingCollection(tables=tables, device=torch.device("meta"))
        return module, EmbeddingCollectionSharder(_fbgemm_sgd())

    def lookup(self) -> Tensor:
        output: Tensor = self.layer(self.batch())[self.names[0]].values()
        return output


class TorchRecBags(TorchRecTable):
    """TorchRec's EmbeddingBagCollection: bags of some ids in each of some tables."""

    num_tables = TABLES
    bag_size = BAG

    def module_and_sharder(self) -> tuple[nn.Module, Any]:
        import torchrec

        tables = self.tables(torchrec.EmbeddingBagConfig)
        module = torchrec.EmbeddingBagCollection(tables=tables, device=torch.device("meta"))
        return module, self.sharder()

    def sharder(self) -> Any:
        from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder

        return EmbeddingBagCollectionSharder(_fbgemm_sgd())

    def draw(self, seed: int) -> Tensor:
        ids = self.shape.ids // self.num_tables
        seeds = range(seed * self.num_tables, (seed + 1) * self.num_tables)
        drawn = [ids_module.draw(DISTRIBUTION, ids, self.rows_a_table, one) for one in seeds]
        return torch.cat(drawn)

    def lookup(self) -> Tensor:
        output = self.layer(self.batch())
        # [bags, tables * dim]: a row of the output for each bag, in any order of the columns.
        return torch.cat([output[name] for name in self.names])


class TorchRecDenseBags(TorchRecBags):
    kernel = "dense"


class OurBags(TorchRecBags):
    def sharder(self) -> Any:
        import gpu_embed.torchrec

        sgd = gpu_embed.optim.SGD
        return gpu_embed.torchrec.EmbeddingBagCollectionSharder(optimizer=sgd, lr=LR)


class OurDenseBags(OurBags):
    kernel = "dense"


Make = Callable[[Shape, DeviceMesh], ShardedTable]
# Theirs, and ours.
KINDS: dict[str, tuple[Make, Make]] = {
    "rowwise": (TorchRowwise, OurRowwise),
    "distinct": (ExchangedAllIds, ExchangedTable),
    "exchange": (TorchRecRows, ExchangedTable),
    "bags-dense": (TorchRecDenseBags, OurDenseBags),
    "bags-fused": (TorchRecBags, OurBags),
}
