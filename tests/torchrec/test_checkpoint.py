"""Tables and their optimizer, saved by torch.distributed.checkpoint on 2 ranks, read on 1 and 4."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from collections_of_tables import (
    bag_collection,
    batch,
    loss_of,
    outputs_of,
    row_collection,
    shard,
    shards_of,
)

import gpu_embed
from gpu_embed.torchrec import EmbeddingBagCollectionSharder, EmbeddingCollectionSharder

OPTIMIZERS = {
    "RowWiseAdagrad": (gpu_embed.optim.RowWiseAdagrad, {"lr": 0.5}),
    "Adam": (gpu_embed.optim.Adam, {"lr": 0.125}),
}
# The state of column shards has a sum for each row and shard, so it is read on as many shards as it was saved from.
KINDS = {
    "RowWiseAdagrad": {"many": "row-wise", "few": "row-wise", "more": "table-wise"},
    "Adam": {"many": "row-wise", "few": "table-wise", "more": "column-wise"},
}


def made(what, optimizer):
    cls, arguments = OPTIMIZERS[optimizer]
    if what == "rows":
        return shard(
            row_collection(),
            KINDS[optimizer],
            "fused",
            EmbeddingCollectionSharder(cls, **arguments),
        )
    sharder = EmbeddingBagCollectionSharder(cls, **arguments)
    return shard(bag_collection(), KINDS[optimizer], "fused", sharder)


def train(model, steps):
    """The same batch on each rank: the mean of its gradients does not depend on how many there are."""
    for step in steps:
        loss_of(outputs_of(model(batch(0, step=step))), 0).backward()


def state_of(model):
    return {"model": model.state_dict(), "optimizer": model.fused_optimizer.state_dict()}


def load(model, path):
    state = state_of(model)
    dcp.load(state, checkpoint_id=path)
    model.load_state_dict(state["model"])
    model.fused_optimizer.load_state_dict(state["optimizer"])


def values(model):
    """This rank's part of every weight and state."""
    state = state_of(model)
    found = {name: shards_of(weight) for name, weight in state["model"].items()}
    for states in state["optimizer"]["state"].values():
        for key, value in states.items():
            is_step = key.endswith(".step")
            found[key] = [(value.clone(), ())] if is_step else shards_of(value)
    return {name: [(one.clone(), at) for one, at in parts] for name, parts in found.items()}


def saves(what, optimizer, before, after):
    model = made(what, optimizer)
    train(model, range(2))
    dcp.save(state_of(model), checkpoint_id=before)
    train(model, [2])
    dcp.save(state_of(model), checkpoint_id=after)


def loads(what, optimizer, before, after):
    model, expected = made(what, optimizer), made(what, optimizer)
    train(model, [3])
    load(model, before)
    train(model, [2])
    load(expected, after)
    torch.testing.assert_close(values(model), values(expected), rtol=0, atol=0)
    dist.barrier()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("what", ["bags", "rows"])
def test_what_two_ranks_save_one_and_four_load(groups, tmp_path, what, optimizer):
    paths = str(tmp_path / "before"), str(tmp_path / "after")
    groups[2].run(saves, what, optimizer, *paths)
    for size in (1, 2, 4):
        groups[size].run(loads, what, optimizer, *paths)
