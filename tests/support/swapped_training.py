"""One of two processes that train a model before and after the swap, under DDP and FSDP2 on the CPU.

    python swapped_training.py RANK FILE

`test_replace.py` runs it; FILE is where the processes find each other.
"""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import gpu_embed


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(8, 4)
        self.bags = nn.EmbeddingBag(8, 4, mode="sum")
        self.head = nn.Linear(4, 1, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.words(ids).sum(1) + self.bags(ids)).sum()


def train(model: nn.Module) -> list[float]:
    """The losses of some steps on ids of this rank's own."""
    ids = torch.tensor([[0, 3, 5], [7, 2, 1]]) if dist.get_rank() else torch.tensor([[6, 1, 4]] * 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(ids)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def sharded(model: nn.Module) -> nn.Module:
    fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (2,)))
    return model


def main() -> None:
    # Both processes are on this machine.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    rank, store = int(sys.argv[1]), sys.argv[2]
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    ids = torch.tensor([[6, 1, 4]])

    expected = train(DistributedDataParallel(Model()))
    model = DistributedDataParallel(Model())
    report = gpu_embed.replace_embeddings(model)
    assert [one.name for one in report.replaced] == ["module.words", "module.bags"]
    assert train(model) == expected
    assert report.verify(ids), report.verify(ids)

    # The swap after the sharding, and before.
    expected = train(sharded(Model()))
    model = sharded(Model())
    assert isinstance(model.words.weight, DTensor)
    report = gpu_embed.replace_embeddings(model)
    assert report.replaced[0].served_by == "torch"
    assert train(model) == expected
    # Within the forward the weights are whole, and plain tensors.
    assert report.verify(ids), report.verify(ids)

    model = Model()
    gpu_embed.replace_embeddings(model)
    assert train(sharded(model)) == expected

    # An embedding that is sharded by itself has a class of its own.
    model = Model()
    sharded(model.words)
    report = gpu_embed.replace_embeddings(model)
    reason = {one.name: one.reason for one in report.skipped}["words"]
    assert reason == "sharded by a fully_shard of its own: replace before that", reason
    model = Model()
    report = gpu_embed.replace_embeddings(model)
    sharded(model.words)
    sharded(model)
    assert report.verify(ids), report.verify(ids)
    assert train(model) == expected

    # The layer's own lookup in a table that stays a DTensor.
    layer = nn.Embedding(8, 4)
    whole = layer.weight.detach().clone()
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    shards = dist.tensor.distribute_tensor(whole, mesh, [dist.tensor.Shard(1)])
    layer.weight = nn.Parameter(shards)
    gpu_embed.replace_embeddings(layer)
    replicated = dist.tensor.distribute_tensor(ids, mesh, [dist.tensor.Replicate()])
    dist.broadcast(whole, 0)
    assert torch.equal(layer(replicated).full_tensor(), whole[ids])

    dist.destroy_process_group()
    print(f"rank {rank}: 5 checks passed")


if __name__ == "__main__":
    main()
