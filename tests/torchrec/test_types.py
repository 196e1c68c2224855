"""Types of tables, outputs, ids and states."""

import pytest
import torch
import torch.distributed as dist
from collections_of_tables import (
    assert_slices,
    bag_collection,
    batch,
    loss_of,
    outputs_of,
    shard,
)
from torch.distributed.tensor import DTensor
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder as TheirSharder
from torchrec.modules.embedding_configs import DataType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from gpu_embed.optim import SGD, RowWiseAdagrad
from gpu_embed.torchrec import EmbeddingBagCollectionSharder

OUTPUTS = {None: torch.float32, DataType.FP32: torch.float32, DataType.FP16: torch.float16}
CASES = [
    (table, output, mode)
    for table in (DataType.FP32, DataType.FP16)
    for output in OUTPUTS
    for mode in ("sum", "weighted")
]


def types_as_fbgemm(table, output, mode):
    """Where FBGEMM has a type; a table of bf16 is only ours on a CPU."""
    settings = {} if output is None else {"output_dtype": output}
    whole = bag_collection(weighted=mode == "weighted", data_type=table)
    ours = EmbeddingBagCollectionSharder(SGD, lr=0.5, fused_params=settings)
    theirs = TheirSharder(fused_params={"learning_rate": 0.5, **settings})
    models = [shard(whole, "row-wise", "fused", one) for one in (ours, theirs)]
    rank = dist.get_rank()
    for step in range(2):
        results = [outputs_of(model(batch(rank, mode == "weighted", step))) for model in models]
        for name, one in results[0].items():
            assert one.dtype == OUTPUTS[output]
            torch.testing.assert_close(one, results[1][name], rtol=0, atol=0)
        for outputs in results:
            loss_of(outputs, rank).backward()
    for name, weight in models[0].state_dict().items():
        for one, other in zip(
            weight.local_shards(), models[1].state_dict()[name].local_shards(), strict=True
        ):
            assert one.tensor.dtype == other.tensor.dtype
            torch.testing.assert_close(one.tensor, other.tensor, rtol=0, atol=0)


@pytest.mark.parametrize(("table", "output", "mode"), CASES)
def test_types_as_with_fbgemm(two, table, output, mode):
    two.run(types_as_fbgemm, table, output, mode)


def bfloat16_tables():
    whole = bag_collection(data_type=DataType.BF16)
    model = shard(whole, "column-wise", "dense", EmbeddingBagCollectionSharder())
    outputs, expected = outputs_of(model(batch(0))), outputs_of(whole(batch(0)))
    for name, one in outputs.items():
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, expected[name].float(), rtol=0, atol=0)
    loss_of(outputs, 0).backward()
    assert all(weight.grad.dtype == torch.bfloat16 for weight in model.parameters())


def test_bfloat16_tables(two):
    two.run(bfloat16_tables)


def states_as_dtensors():
    whole = bag_collection()
    sharder = EmbeddingBagCollectionSharder(RowWiseAdagrad, lr=0.5)
    kinds = {"many": "row-wise", "few": "table-wise", "more": "column-wise"}
    model = shard(whole, kinds, "fused", sharder, output_dtensor=True)
    for name, weight in model.state_dict().items():
        assert isinstance(weight, DTensor)
        assert_slices(weight, whole.state_dict()[name])
    loss_of(outputs_of(model(batch(0))), 0).backward()
    states = model.fused_optimizer.state_dict()
    assert {len(one) for one in states["state"].values()} == {1}
    for one in states["state"].values():
        assert all(isinstance(state, DTensor) for state in one.values())
    model.fused_optimizer.load_state_dict(states)


def test_states_as_dtensors(two):
    two.run(states_as_dtensors)


def int32_ids():
    whole = bag_collection()
    model = shard(whole, "row-wise", "fused", EmbeddingBagCollectionSharder(SGD))
    wide = batch(dist.get_rank())
    narrow = KeyedJaggedTensor(wide.keys(), wide.values().int(), lengths=wide.lengths().int())
    expected = outputs_of(whole(wide))
    for name, one in outputs_of(model(narrow)).items():
        torch.testing.assert_close(one, expected[name], rtol=0, atol=0)


def test_ids_of_32_bits(two):
    two.run(int32_ids)
