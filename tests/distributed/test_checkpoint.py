"""Sharded tables and their optimizers, saved by torch.distributed.checkpoint on 2 ranks, read on 1, 3 and 4."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import mesh
from sharded_cases import integers, some_ids
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import gpu_embed
from gpu_embed.distributed import ColwiseBagParallel, RowwiseBagParallel

OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.5, momentum=0.5),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.125),
}


class Model(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        self.words = gpu_embed.Embedding(11, 6, padding_idx=3)
        self.columns = gpu_embed.Embedding(11, 6)
        self.bags = gpu_embed.EmbeddingBag(7, 6, mode="sum")
        self.bag_columns = gpu_embed.EmbeddingBag(7, 6, mode="max")
        for number, weight in enumerate(self.parameters()):
            weight.data = integers(*weight.shape, seed=10 * seed + number)

    def forward(self, ids):
        bags = self.bags(ids % 7) + self.bag_columns(ids % 7)
        return (self.words(ids) + self.columns(ids)).sum(1) * bags


def sharded(model):
    layouts = {"input_layouts": Replicate(), "output_layouts": Replicate()}
    plan = {
        "words": RowwiseParallel(**layouts),
        "columns": ColwiseParallel(**layouts),
        "bags": RowwiseBagParallel(**layouts),
        "bag_columns": ColwiseBagParallel(**layouts),
    }
    return parallelize_module(model, mesh(dist.get_world_size()), plan)


def train(model, optimizer, seeds):
    for seed in seeds:
        optimizer.zero_grad()
        (model(some_ids(11, 4, 5 + seed)) / 64).square().sum().backward()
        optimizer.step()


def values(model, optimizer):
    """Every weight and every state of it, whole."""
    found = {}
    for name, weight in model.named_parameters():
        found[name] = weight.detach()
        for key, state in optimizer.state[weight].items():
            found[f"{name} {key}"] = state
    return {
        name: value.full_tensor() if isinstance(value, DTensor) else value
        for name, value in found.items()
    }


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name], value, msg=lambda text, name=name: f"{name}: {text}"
        )


def save(folder, optimizer_name):
    model = sharded(Model())
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    train(model, optimizer, (0, 1))
    state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": state, "optimizer": optimizer_state}, checkpoint_id=folder)


def load(folder, optimizer_name, shard):
    """What was saved, and one more step: as one process that made all steps."""
    expected = Model()
    whole = OPTIMIZERS[optimizer_name](expected.parameters())
    train(expected, whole, (0, 1))
    model = Model(seed=1)
    model = sharded(model) if shard else model
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": state, "optimizer": optimizer_state}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )
    assert_same(values(model, optimizer), values(expected, whole))
    train(model, optimizer, (2,))
    train(expected, whole, (2,))
    assert_same(values(model, optimizer), values(expected, whole))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_saved_on_two_and_read_on_others(groups, tmp_path, optimizer):
    groups[2].run(save, str(tmp_path), optimizer)
    for size in (1, 2, 3, 4):
        groups[size].run(load, str(tmp_path), optimizer, True)
    groups[1].run(load, str(tmp_path), optimizer, False)
