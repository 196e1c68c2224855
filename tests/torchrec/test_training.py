"""Whole models under DistributedModelParallel, with TorchRec's planner and train pipeline."""

import copy
import dataclasses

import pytest
import torch
import torch.distributed as dist
from collections_of_tables import BAGS, CPU, bag_collection, batch, outputs_of, shard
from torch import nn
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder as TheirSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

import gpu_embed
from gpu_embed.torchrec import EmbeddingBagCollectionSharder

# TorchRec traces the model and cannot ask a batch for them.
OUTPUTS = ["a", "b@few", "b@more", "c", "d"]


@dataclasses.dataclass
class Batch(Pipelineable):
    features: KeyedJaggedTensor
    labels: torch.Tensor

    def to(self, device, non_blocking=False):
        return Batch(self.features.to(device), self.labels.to(device))

    def record_stream(self, stream):
        self.features.record_stream(stream)

    def pin_memory(self):
        return self


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.tables = bag_collection()
        self.head = nn.Linear(16 * 4 + 32, 1)
        for weight in self.parameters():
            nn.init.normal_(weight, std=0.1)

    def forward(self, data):
        pooled = self.tables(data.features).to_dict()
        logits = self.head(torch.cat([pooled[name] for name in OUTPUTS], 1)).squeeze(1)
        loss = nn.functional.binary_cross_entropy_with_logits(logits, data.labels)
        return loss, logits.detach()


def batches(rank, count):
    labels = torch.tensor([0.0, 1.0, 1.0])[:BAGS]
    return [Batch(batch(rank, step=number), labels) for number in range(count)]


def logits_of(sharder, fused_lr):
    """Of training by TorchRec's pipeline, on its planner's plan."""
    model = Model()
    whole = copy.deepcopy(model.state_dict())
    world = dist.get_world_size()
    # Data-parallel tables would be TorchRec's.
    constraints = {
        name: ParameterConstraints(sharding_types=["table_wise", "column_wise"])
        for name in model.tables.embedding_bags
    }
    topology = Topology(world_size=world, compute_device="cpu")
    planner = EmbeddingShardingPlanner(topology, constraints=constraints)
    plan = planner.collective_plan(model, [sharder], dist.group.WORLD)
    model = DistributedModelParallel(model, device=CPU, plan=plan, sharders=[sharder])
    model.load_state_dict(whole)
    dense = dict(in_backward_optimizer_filter(model.named_parameters()))
    assert set(dense) == {"head.weight", "head.bias"}
    optimizer = CombinedOptimizer(
        [model.fused_optimizer, KeyedOptimizerWrapper(dense, lambda p: torch.optim.SGD(p, lr=0.5))]
    )
    for group in model.fused_optimizer.param_groups:
        assert group["lr"] == fused_lr
    pipeline = TrainPipelineSparseDist(model, optimizer, CPU)
    steps, logits = iter(batches(dist.get_rank(), 6)), []
    while True:
        try:
            logits.append(pipeline.progress(steps))
        except StopIteration:
            return str(plan), logits


def pipelines_agree():
    ours = EmbeddingBagCollectionSharder(gpu_embed.optim.SGD, lr=0.5)
    theirs = TheirSharder(fused_params={"learning_rate": 0.5})
    (plan, logits), (their_plan, their_logits) = logits_of(ours, 0.5), logits_of(theirs, 0.5)
    assert plan == their_plan
    torch.testing.assert_close(logits, their_logits, rtol=1e-5, atol=1e-6)


def test_planner_and_pipeline_as_with_fbgemm(two):
    two.run(pipelines_agree)


def follows_the_learning_rate():
    model = shard(
        bag_collection(),
        "row-wise",
        "fused",
        EmbeddingBagCollectionSharder(gpu_embed.optim.SGD, lr=1.0),
    )
    before = copied(model)
    model.fused_optimizer.param_groups[0]["lr"] = 0.0
    model.fused_optimizer.zero_grad()
    sum(one.sum() for one in outputs_of(model(batch(0))).values()).backward()
    torch.testing.assert_close(copied(model), before, rtol=0, atol=0)
    model.fused_optimizer.param_groups[0]["lr"] = 1.0
    model.fused_optimizer.step()
    sum(one.sum() for one in outputs_of(model(batch(0))).values()).backward()
    assert any(not torch.equal(a, b) for a, b in zip(copied(model), before, strict=True))


def copied(model):
    weights = model.state_dict().values()
    return [one.tensor.clone() for weight in weights for one in weight.local_shards()]


def test_the_learning_rate_of_the_keyed_view_counts(two):
    two.run(follows_the_learning_rate)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_dense_gradients_are_cleared(two, set_to_none):
    two.run(clears, set_to_none)


def clears(set_to_none):
    model = shard(bag_collection(), "row-wise", "dense", EmbeddingBagCollectionSharder())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    # Before there is a gradient, as TorchRec sets one to make an optimizer's state.
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    optimizer.zero_grad(set_to_none)
    grads = []
    for _ in range(2):
        sum(one.sum() for one in outputs_of(model(batch(0))).values()).backward()
        grads.append([weight.grad.clone() for weight in model.parameters()])
        optimizer.zero_grad(set_to_none)
    torch.testing.assert_close(*grads, rtol=0, atol=0)
    assert any(grad.any() for grad in grads[0])
