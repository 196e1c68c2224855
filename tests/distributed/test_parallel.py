"""Whole models under torch's parallel styles and FSDP2, by the plans that torchtitan makes."""

import copy

import pytest
import torch
import torch.distributed as dist
from ranks import mesh
from sharded_cases import assert_equal, assert_lies_as, distribute, integers, part, some_ids
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import gpu_embed

STYLES = {"row-wise": RowwiseParallel, "column-wise": ColwiseParallel}
every_style = pytest.mark.parametrize("style", STYLES)


class Model(nn.Module):
    """A table and its head, of small integers: outputs and gradients are exact."""

    def __init__(self, tied=False, rows=11, width=6, padding_idx=2, layer=gpu_embed.Embedding):
        super().__init__()
        self.embed = layer(rows, width, padding_idx=padding_idx)
        self.head = nn.Linear(width, rows, bias=False)
        for seed, weight in enumerate(self.parameters()):
            weight.data = integers(*weight.shape, seed=seed, dtype=weight.dtype)
        if tied:
            self.tie()

    def tie(self):
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.embed(ids))


# What the output of one layer is in each style.
OUTPUTS = {"replicated": Replicate(), "batch": Shard(0), "sequence": Shard(1), "columns": Shard(-1)}


def layer_equals_whole(style, input_layout, output_layout):
    over = mesh(dist.get_world_size())
    ids, grad = some_ids(11, 4, 8), integers(4, 8, 12, seed=1)
    model = nn.Sequential(gpu_embed.Embedding(11, 12, padding_idx=-1))
    model[0].weight.data = integers(11, 12)
    expected = copy.deepcopy(model)
    expected(ids).backward(grad)
    layouts = {"input_layouts": input_layout, "output_layouts": output_layout}
    parallelize_module(model, over, {"0": STYLES[style](**layouts)})
    own = ids if input_layout == Replicate() else part(ids, input_layout.dim)
    own_grad = grad if output_layout == Replicate() else part(grad, output_layout.dim)
    output = model(own)
    assert not isinstance(output, DTensor)
    whole = expected(ids)
    assert torch.equal(
        output, whole if output_layout == Replicate() else part(whole, output_layout.dim)
    )
    output.backward(own_grad)
    weight = model[0].weight
    assert weight.placements == (Shard(0 if style == "row-wise" else 1),)
    assert_lies_as(weight.grad, weight)
    assert_equal(weight.grad, expected[0].weight.grad)


@pytest.mark.parametrize("output_layout", OUTPUTS.values(), ids=OUTPUTS)
@pytest.mark.parametrize("input_layout", [Replicate(), Shard(0), Shard(1)], ids=str)
@every_style
def test_layouts_of_the_styles(ranks, style, input_layout, output_layout):
    ranks.run(layer_equals_whole, style, input_layout, output_layout)


def counts_collectives(style, by_frequency):
    over, ids = mesh(dist.get_world_size()), some_ids(11, 4, 6)
    counted = []
    for layer in (nn.Embedding, gpu_embed.Embedding):
        model = nn.Sequential(layer(11, 6, scale_grad_by_freq=by_frequency))
        plan = {"0": STYLES[style](input_layouts=Replicate(), output_layouts=Replicate())}
        parallelize_module(model, over, plan)
        with CommDebugMode() as debug:
            model(ids).sum().backward()
        counted.append({str(name): count for name, count in debug.get_comm_counts().items()})
    theirs, ours = counted
    assert sum(theirs.values()) > 0
    assert all(count <= theirs.get(name, 0) for name, count in ours.items()), counted


@pytest.mark.parametrize("by_frequency", [False, True], ids=["plain", "by frequency"])
@every_style
def test_no_collective_is_added(ranks, style, by_frequency):
    """Bounds: the check needs none."""
    ranks.run(counts_collectives, style, by_frequency)


def plan(tied):
    """torchtitan's: the table by rows, the sequence cut, the head by its rows, which are the same."""
    return {
        "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }


def made_on_meta(tied):
    over = mesh(dist.get_world_size())
    with torch.device("meta"):
        model = nn.Module()
        model.embed = gpu_embed.Embedding(11, 6, padding_idx=7)
        model.head = nn.Linear(6, 11, bias=False)
    parallelize_module(model, over, plan(tied))
    if tied:
        model.head.weight = model.embed.weight
    assert model.embed.weight.is_meta
    model.to_empty(device="cpu")
    for weight in model.parameters():
        nn.init.constant_(weight, float("nan"))
    torch.manual_seed(0)
    if not tied:
        model.head.reset_parameters()
    model.embed.reset_parameters()
    assert len(list(model.parameters())) == (1 if tied else 2)
    whole = model.embed.weight.full_tensor()
    assert model.embed.weight.placements == (Shard(0),)
    assert torch.equal(whole[7], torch.zeros(6))
    others = torch.cat([whole[:7], whole[8:]])
    assert (others != 0).all()
    assert not others.isnan().any()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_made_on_meta_and_filled(ranks, tied):
    ranks.run(made_on_meta, tied)


def losses_of(model, ids, steps=3, max_norm=None):
    """Of some steps of SGD; each rank's weights end alike."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.125)
    targets = integers(*ids.shape, 11, seed=9)
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(ids) * targets).sum() / 1024
        loss.backward()
        if max_norm is not None:
            norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            found.append((norm.full_tensor() if isinstance(norm, DTensor) else norm).item())
        optimizer.step()
        found.append(loss.item())
    return found


def trains_as_whole(tied, max_norm):
    over, ids = mesh(dist.get_world_size()), some_ids(11, 3, 8)
    expected = Model(tied)
    model = copy.deepcopy(expected)
    parallelize_module(model, over, plan(tied))
    if tied:
        model.tie()
    losses = losses_of(expected, ids, max_norm=max_norm)
    found = losses_of(model, ids, max_norm=max_norm)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(losses))
    for weight, one in zip(model.parameters(), expected.parameters(), strict=True):
        assert weight.placements == (Shard(0),)
        assert_lies_as(weight.grad, weight)
        torch.testing.assert_close(weight.grad.full_tensor(), one.grad)
        torch.testing.assert_close(weight.full_tensor(), one.detach())


@pytest.mark.parametrize("max_norm", [None, 0.5], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_training_with_a_head(ranks, tied, max_norm):
    ranks.run(trains_as_whole, tied, max_norm)


def tied_before():
    """A head that was tied before the plan: torch makes two parameters of one, and ours is as theirs."""
    over = mesh(dist.get_world_size())
    for layer in (nn.Embedding, gpu_embed.Embedding):
        model = parallelize_module(Model(True, layer=layer), over, plan(True))
        assert model.head.weight.full_tensor().equal(model.embed.weight.full_tensor())
        losses_of(model, some_ids(11, 3, 8))


def test_a_head_that_was_tied_before(two):
    two.run(tied_before)


def local_ids(over):
    """Own ids for each rank of the dimension, and those of all."""
    every = some_ids(11, 2 * over.size(), 4)
    return part(every, 0, over), every


def under_fsdp(policy, tied, layers, tensor_parallel):
    """The gradient is the mean over the ranks of each rank's own batch."""
    ranks = dist.get_world_size()
    over = mesh(2, ranks // 2)["dp"] if tensor_parallel else mesh(ranks)
    own, every = local_ids(over)
    expected = Model(tied, width=8)
    model = copy.deepcopy(expected)
    if tensor_parallel:
        parallelize_module(model, mesh(2, ranks // 2)["tp"], plan(tied))
        if tied:
            model.tie()
    options = {"mesh": over, "mp_policy": policy}
    if layers:
        fully_shard(model.embed, **options)
        fully_shard(model.head, **options)
    fully_shard(model, **options)
    low = policy.param_dtype is not None
    # Integers, which bf16 holds.
    targets = integers(*every.shape, 11, seed=9).sign()
    output = model(own)
    assert output.dtype == (torch.bfloat16 if low else torch.float32)
    (output * part(targets, 0, over)).sum().backward()
    one = expected.bfloat16()(every).to(torch.float32) if low else expected(every)
    assert torch.equal(output, part(one, 0, over).to(output.dtype))

    reference = Model(tied, width=8)
    (reference(every) * targets).sum().backward()
    for weight, whole in zip(model.parameters(), reference.parameters(), strict=True):
        assert weight.grad.dtype == torch.float32
        assert weight.grad.placements == weight.placements
        assert weight.grad.to_local().shape == weight.to_local().shape
        tolerance = {"rtol": 2**-8, "atol": 2**-4} if low else {"rtol": 0, "atol": 0}
        grad = weight.grad.full_tensor()
        torch.testing.assert_close(grad * over.size(), whole.grad, **tolerance)


POLICIES = {
    "fp32": MixedPrecisionPolicy(),
    "bf16": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
}
every_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)


@pytest.mark.parametrize("layers", [False, True], ids=["model", "layers"])
@every_policy
def test_fsdp(ranks, policy, layers):
    ranks.run(under_fsdp, policy, False, layers, False)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@every_policy
def test_fsdp_over_tensor_parallel(four, policy, tied):
    four.run(under_fsdp, policy, tied, False, True)


@every_policy
def test_fsdp_of_a_tied_model(ranks, policy):
    ranks.run(under_fsdp, policy, True, False, False)


def swapped(style, before):
    """torch's layer in the model; ours takes its place before or after the sharding, and gives it back."""
    over, ids = mesh(dist.get_world_size()), some_ids(11, 3, 8)
    layouts = {"input_layouts": Replicate(), "output_layouts": Replicate()}
    expected = Model(layer=nn.Embedding)
    model = copy.deepcopy(expected)
    if before:
        gpu_embed.replace_embeddings(model)
    parallelize_module(model, over, {"embed": STYLES[style](**layouts)})
    if not before:
        gpu_embed.replace_embeddings(model)
    assert isinstance(model.embed, gpu_embed.Embedding)
    output = model(ids)
    assert torch.equal(output, expected(ids))
    output.sum().backward()
    expected(ids).sum().backward()
    assert_lies_as(model.embed.weight.grad, model.embed.weight)
    assert_equal(model.embed.weight.grad, expected.embed.weight.grad)
    assert gpu_embed.restore_embeddings(model) == ["embed"]
    assert type(model.embed) is nn.Embedding
    assert torch.equal(model(ids), expected(ids))


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@every_style
def test_swap_before_and_after_the_plan(ranks, style, before):
    ranks.run(swapped, style, before)


def recomputed(style):
    over, ids = mesh(dist.get_world_size()), some_ids(11, 3, 8)
    expected, model = Model(), Model()
    layouts = {"input_layouts": Replicate(), "output_layouts": Replicate()}
    parallelize_module(model, over, {"embed": STYLES[style](**layouts)})
    torch.utils.checkpoint.checkpoint(model, ids, use_reentrant=False).sum().backward()
    expected(ids).sum().backward()
    assert_equal(model.embed.weight.grad, expected.embed.weight.grad)


@every_style
def test_recomputed_in_backward(two, style):
    two.run(recomputed, style)


def under_autocast():
    over, ids = mesh(dist.get_world_size()), some_ids(11, 3, 8)
    model, expected = Model(), Model()
    parallelize_module(model, over, {"embed": RowwiseParallel(input_layouts=Replicate())})
    with torch.autocast("cpu", torch.bfloat16):
        output, whole = model(ids), expected(ids)
    assert output.dtype == whole.dtype == torch.bfloat16
    assert torch.equal(output, whole)


def test_autocast(two):
    two.run(under_autocast)


def in_place(style):
    over, ids = mesh(dist.get_world_size()), some_ids(11, 3, 8)
    model, expected = Model(), Model()
    layouts = {"input_layouts": Replicate(), "output_layouts": Replicate()}
    parallelize_module(model, over, {"embed": STYLES[style](**layouts)})
    gpu_embed.accumulate_in_place(model)
    for _ in range(3):
        model(ids).sum().backward()
        expected(ids).sum().backward()
    assert_lies_as(model.embed.weight.grad, model.embed.weight)
    assert_equal(model.embed.weight.grad, expected.embed.weight.grad)


@every_style
def test_a_marked_table(two, style):
    """Gradients are returned, and autograd adds them up."""
    two.run(in_place, style)


def sharded_twice():
    """Between forwards FSDP2 leaves rows cut by both dimensions of the mesh, those of one in strides."""
    over, ids = mesh(2, 2), some_ids(11, 3, 8)
    model = Model()
    parallelize_module(model, over["tp"], {"embed": RowwiseParallel(input_layouts=Replicate())})
    fully_shard(model, mesh=over["dp"])
    weight = model.embed.weight
    placed = distribute(ids, over, "rr")
    output = gpu_embed.functional.embedding(placed, weight)
    assert_equal(output.detach(), integers(11, 6)[ids])
    output.sum().full_tensor().backward()
    assert weight.grad.placements == weight.placements
    counts = ids.flatten().bincount(minlength=11).float()
    assert_equal(weight.grad, counts[:, None].expand(11, 6))


def test_a_table_that_is_sharded_twice(four):
    four.run(sharded_twice)


def hybrid():
    """Replicated on one dimension of the mesh, sharded on the other."""
    ids, expected = some_ids(11, 3, 8), Model()
    model = fully_shard(copy.deepcopy(expected), mesh=mesh(2, 2))
    assert torch.equal(model(ids), expected(ids))
    model(ids).sum().backward()
    expected(ids).sum().backward()
    for weight, one in zip(model.parameters(), expected.parameters(), strict=True):
        assert weight.grad.placements == (Replicate(), Shard(0))
        assert_equal(weight.grad, one.grad)


def test_hybrid_sharding(four):
    four.run(hybrid)


def keeps_dtensors(style, placement):
    over, ids = mesh(dist.get_world_size()), some_ids(11, 3, 8)
    model, expected = Model(), Model()
    one = STYLES[style](input_layouts=Replicate(), use_local_output=False)
    parallelize_module(model, over, {"embed": one})
    output = model.embed(ids)
    assert output.placements == (placement,)
    assert_equal(output.detach(), expected.embed(ids).detach())


@pytest.mark.parametrize(
    ("style", "placement"), [("row-wise", Replicate()), ("column-wise", Shard(2))]
)
def test_outputs_that_stay_dtensors(ranks, style, placement):
    ranks.run(keeps_dtensors, style, placement)
