"""Collections of TorchRec's, sharded by our sharders and whole with torch's layers, on the same batches."""

import copy
from typing import Any

import torch
import torch.distributed as dist
from sharded_cases import integers
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.tensor import DTensor
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.sharding_plan import (
    column_wise,
    construct_module_sharding_plan,
    data_parallel,
    grid_shard,
    row_wise,
    table_row_wise,
    table_wise,
)
from torchrec.distributed.types import LazyAwaitable, ShardingEnv, ShardingPlan
from torchrec.modules.embedding_configs import (
    DataType,
    EmbeddingBagConfig,
    EmbeddingConfig,
    PoolingType,
)
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

CPU = torch.device("cpu")
# Rows, columns and features of each table. On four ranks by rows the last one has none of "few"; feature "b" looks up
# in two tables, and two features look up in "many".
TABLES = {"many": (11, 16, ["a", "c"]), "few": (3, 32, ["b"]), "more": (6, 16, ["b", "d"])}
FEATURES = ["a", "b", "c", "d"]
BAGS = 3


def bag_collection(
    mode: str = "sum",
    weighted: bool = False,
    tables: dict[str, Any] = TABLES,
    data_type: DataType = DataType.FP32,
) -> EmbeddingBagCollection:
    configs = [
        EmbeddingBagConfig(
            name=name,
            num_embeddings=rows,
            embedding_dim=dim,
            feature_names=features,
            data_type=data_type,
            pooling=PoolingType.MEAN if mode == "mean" else PoolingType.SUM,
        )
        for name, (rows, dim, features) in tables.items()
    ]
    return _filled(EmbeddingBagCollection(configs, is_weighted=weighted, device=CPU))


def row_collection() -> EmbeddingCollection:
    configs = [
        EmbeddingConfig(name=name, num_embeddings=rows, embedding_dim=8, feature_names=features)
        for name, (rows, _, features) in TABLES.items()
    ]
    return _filled(EmbeddingCollection(configs, device=CPU))


def _filled(collection: Any) -> Any:
    for seed, weight in enumerate(collection.parameters()):
        weight.data = integers(*weight.shape, seed=seed, dtype=weight.dtype)
    return collection


def batch(rank: int, weighted: bool = False, step: int = 0) -> KeyedJaggedTensor:
    """Bags of 0, 1, 2 or 4 ids, by which a mean of gradients is exact."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    sizes = torch.tensor([0, 1, 2, 4])
    lengths = sizes[torch.randint(0, 4, (len(FEATURES) * BAGS,), generator=generator)]
    of_features = lengths.view(len(FEATURES), BAGS).sum(1).tolist()
    # "b" must fit both of its tables.
    rows = {"a": 11, "b": 3, "c": 11, "d": 6}
    ids = [
        torch.randint(0, rows[feature], (count,), generator=generator)
        for feature, count in zip(FEATURES, of_features, strict=True)
    ]
    values = torch.cat(ids)
    weights = integers(len(values), seed=rank) if weighted else None
    return KeyedJaggedTensor(FEATURES, values, weights, lengths=lengths)


def variable_batch(
    rank: int, step: int, uneven: bool
) -> tuple[KeyedJaggedTensor, KeyedJaggedTensor]:
    """A batch that holds equal bags once, with a number of bags for each feature; and the same batch in full.

    uneven: the numbers are other ones on each rank, which gloo does not exchange for rows on several ranks.
    """
    full = batch(rank, step=step)
    generator = torch.Generator().manual_seed(100 * step + rank)
    bags, inverse, strides = [], [], []
    for number, feature in enumerate(FEATURES):
        jagged = full[feature].to_dense()
        count = 1 + (number + rank * uneven) % BAGS
        kept = torch.randint(0, BAGS, (count,), generator=generator).tolist()
        places = torch.randint(0, count, (BAGS,), generator=generator)
        bags += [jagged[place] for place in kept]
        inverse.append(places)
        strides.append([count])
    reduced = KeyedJaggedTensor(
        FEATURES,
        torch.cat(bags),
        lengths=torch.tensor([len(one) for one in bags]),
        stride_per_key_per_rank=strides,
        inverse_indices=(FEATURES, torch.stack(inverse)),
    )
    firsts = [sum(count for (count,) in strides[:number]) for number in range(len(FEATURES))]
    spread = [
        bags[first + place]
        for first, places in zip(firsts, inverse, strict=True)
        for place in places.tolist()
    ]
    lengths = torch.tensor([len(one) for one in spread])
    return reduced, KeyedJaggedTensor(FEATURES, torch.cat(spread), lengths=lengths)


def shard(
    whole: nn.Module, kinds: Any, kernel: str, sharder: Any, output_dtensor: bool = False
) -> DistributedModelParallel:
    """By one kind of sharding, or by table."""
    world = dist.get_world_size()
    generators = {
        "row-wise": row_wise(),
        "column-wise": column_wise(ranks=list(range(world))),
        "columns on one rank": column_wise(ranks=[world - 1, world - 1]),
        "table-wise": table_wise(rank=world - 1),
        "table-row-wise": table_row_wise(host_index=0),
        "grid": grid_shard(host_indexes=[0]),
        "data-parallel": data_parallel(),
    }
    names = [config.name for config in configs_of(whole)]
    kinds = kinds if isinstance(kinds, dict) else dict.fromkeys(names, kinds)
    plan = construct_module_sharding_plan(
        whole,
        {name: generators[kinds[name]] for name in names},
        sharder=sharder,
        local_size=world,
        world_size=world,
        device_type="cpu",
    )
    for name, one in plan.items():
        if kinds[name] != "data-parallel":
            one.compute_kernel = kernel
    model = DistributedModelParallel(
        copy.deepcopy(whole),
        env=ShardingEnv(world, dist.get_rank(), dist.group.WORLD, output_dtensor),
        device=CPU,
        plan=ShardingPlan({"": plan}),
        sharders=[sharder],
    )
    model.load_state_dict(whole.state_dict())
    return model


def configs_of(whole: Any) -> Any:
    is_bags = isinstance(whole, EmbeddingBagCollection)
    return whole.embedding_bag_configs() if is_bags else whole.embedding_configs()


def layers_of(whole: Any) -> nn.ModuleDict:
    return whole.embedding_bags if isinstance(whole, EmbeddingBagCollection) else whole.embeddings


def outputs_of(output: Any) -> dict[str, torch.Tensor]:
    """Of bags a matrix a feature, of rows those of all ids."""
    if isinstance(output, LazyAwaitable):
        output = output.wait()
    if isinstance(output, dict):
        return {name: jagged.values() for name, jagged in output.items()}
    return output.to_dict()


def loss_of(outputs: dict[str, torch.Tensor], rank: int) -> torch.Tensor:
    """Linear in the outputs: gradients are multiples of a power of two, whatever the weights are."""
    losses = [
        (outputs[name] * integers(*outputs[name].shape, seed=rank, multiple=4)).sum()
        for name in sorted(outputs)
    ]
    return sum(losses, torch.zeros(()))


def assert_slices(actual: Any, whole: torch.Tensor, tolerance: float = 0) -> None:
    """This rank's shards are those parts of the whole."""
    if type(actual) is torch.Tensor:  # of a data-parallel table
        torch.testing.assert_close(actual, whole, rtol=tolerance, atol=tolerance)
        return
    assert actual.size() == whole.shape
    for tensor, offsets in shards_of(actual):
        region = [slice(at, at + size) for at, size in zip(offsets, tensor.shape, strict=True)]
        torch.testing.assert_close(tensor, whole[tuple(region)], rtol=tolerance, atol=tolerance)


def shards_of(sharded: Any) -> list[tuple[torch.Tensor, Any]]:
    """This rank's shards, and where each begins in the whole."""
    if isinstance(sharded, DTensor):
        local = sharded.to_local()
        # One without shards has an offset all the same.
        return list(zip(local.local_shards(), local.local_offsets(), strict=False))
    return [(one.tensor, one.metadata.shard_offsets) for one in sharded.local_shards()]


def columns_of(weight: Any) -> list[tuple[int, int]]:
    """The column ranges that a sharded table is cut into."""
    if isinstance(weight, ShardedTensor):
        shards = weight.metadata().shards_metadata
        return sorted({(s.shard_offsets[1], s.shard_offsets[1] + s.shard_sizes[1]) for s in shards})
    return [(0, weight.shape[1])]
