"""Sharded lookups and bags in one graph of torch.compile, which every rank shares."""

import copy

import pytest
import torch
import torch.distributed as dist
from ranks import mesh
from sharded_cases import MULTIPLE, assert_equal, assert_lies_as, distribute, integers, some_ids
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import gpu_embed
from gpu_embed.distributed import ColwiseBagParallel, RowwiseBagParallel
from gpu_embed.functional import embedding

STYLES = {
    "row-wise": (gpu_embed.Embedding, RowwiseParallel),
    "column-wise": (gpu_embed.Embedding, ColwiseParallel),
    "row-wise bag": (gpu_embed.EmbeddingBag, RowwiseBagParallel),
    "column-wise bag": (gpu_embed.EmbeddingBag, ColwiseBagParallel),
}


def compiled(model, backend):
    torch._dynamo.reset()
    return torch.compile(model, backend=backend, fullgraph=True)


def styles_equal_whole(style, backend, options):
    over = mesh(dist.get_world_size())
    layer, parallel = STYLES[style]
    model = nn.Sequential(layer(11, 6, **options))
    model[0].weight.data = integers(11, 6, multiple=MULTIPLE)
    expected = copy.deepcopy(model)
    layouts = {"input_layouts": Replicate(), "output_layouts": Replicate()}
    parallelize_module(model, over, {"0": parallel(**layouts)})
    run = compiled(model, backend)
    # A second batch, and one of another size: no rank's own number is in the graph.
    for shape in ((4, 6), (4, 6), (5, 3)):
        ids = some_ids(11, *shape)
        output, whole = run(ids), expected(ids)
        assert torch.equal(output, whole)
        output.sum().backward()
        whole.sum().backward()
    weight = model[0].weight
    assert_lies_as(weight.grad, weight)
    assert_equal(weight.grad, expected[0].weight.grad)


@pytest.mark.parametrize("style", STYLES)
def test_fullgraph(ranks, style):
    ranks.run(styles_equal_whole, style, "aot_eager", {})


@pytest.mark.parametrize("style", STYLES)
def test_fullgraph_with_options(two, style):
    options = {"padding_idx": 2, "scale_grad_by_freq": True}
    two.run(styles_equal_whole, style, "aot_eager", options)


def max_norm_equals_whole(style):
    layer, parallel = STYLES[style]
    model = nn.Sequential(layer(11, 6, max_norm=4.0))
    model[0].weight.data = integers(11, 6)
    expected = copy.deepcopy(model)
    layouts = {"input_layouts": Replicate(), "output_layouts": Replicate()}
    parallelize_module(model, mesh(dist.get_world_size()), {"0": parallel(**layouts)})
    ids = some_ids(11, 4, 6)
    output, whole = compiled(model, "aot_eager")(ids), expected(ids)
    torch.testing.assert_close(output, whole)
    output.sum().backward()
    whole.sum().backward()
    torch.testing.assert_close(model[0].weight.full_tensor(), expected[0].weight.data)
    torch.testing.assert_close(model[0].weight.grad.full_tensor(), expected[0].weight.grad)


@pytest.mark.parametrize("style", ["row-wise", "row-wise bag"])
def test_max_norm_fullgraph(two, style):
    two.run(max_norm_equals_whole, style)


@pytest.mark.parametrize("mode", ["sum", "max"])
@pytest.mark.parametrize("style", ["row-wise bag", "column-wise bag"])
def test_bags_fullgraph(two, style, mode):
    two.run(styles_equal_whole, style, "aot_eager", {"mode": mode})


@pytest.mark.parametrize("style", ["row-wise", "column-wise"])
def test_inductor(two, style):
    two.run(styles_equal_whole, style, "inductor", {}, limit=150)


def dtensors_in_and_out(mesh_shape, table, ids_lie):
    over, ids = mesh(*mesh_shape), some_ids(11, 4, 6)
    weight = distribute(integers(11, 6), over, table).requires_grad_()
    output = compiled(embedding, "aot_eager")(distribute(ids, over, ids_lie), weight)
    assert_equal(output.detach(), integers(11, 6)[ids])
    output.backward(distribute(torch.ones(4, 6, 6), over, "r" * len(mesh_shape)))
    assert_lies_as(weight.grad, weight)
    counts = ids.flatten().bincount(minlength=11).float()
    assert_equal(weight.grad, counts[:, None].expand(11, 6))


@pytest.mark.parametrize("ids_lie", "r0")
@pytest.mark.parametrize("table", "r01")
def test_functional(ranks, table, ids_lie):
    ranks.run(dtensors_in_and_out, (ranks.size,), table, ids_lie)


@pytest.mark.parametrize("table", ["00", "01", "10", "r0"])
def test_functional_on_two_mesh_dimensions(four, table):
    four.run(dtensors_in_and_out, (2, 2), table, "0r")


def graphs_of(style):
    """The code of forward and backward; every rank has as many rows and columns."""
    layer, parallel = STYLES[style]
    model, found = nn.Sequential(layer(12, 8)), []
    layouts = {"input_layouts": Replicate(), "output_layouts": Replicate()}
    parallelize_module(model, mesh(dist.get_world_size()), {"0": parallel(**layouts)})

    def keep(graph, _):
        found.append(graph.code)
        return make_boxed_func(graph)

    ids, expected = some_ids(12, 4, 6), layer(12, 8, _weight=model[0].weight.full_tensor())
    with torch.distributed.config.patch(compile_on_one_rank=True):
        output = compiled(model, aot_autograd(fw_compiler=keep))(ids)
        output.sum().backward()
    torch.testing.assert_close(output, expected(ids))
    assert len(found) == 2
    return found


@pytest.mark.parametrize("style", STYLES)
def test_every_rank_has_the_same_graph(ranks, style):
    """So what one rank has compiled serves the others."""
    graphs = ranks.run(graphs_of, style)
    assert all(graph == graphs[0] for graph in graphs), graphs


def an_id_out_of_range():
    over = mesh(dist.get_world_size())
    model = nn.Sequential(gpu_embed.Embedding(11, 6))
    plan = {"0": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(0))}
    parallelize_module(model, over, plan)
    run = compiled(model, "aot_eager")
    run(some_ids(11, 4, 6))
    with pytest.raises(IndexError, match=r"id 11 .* 11 rows"):
        run(torch.full((4, 6), 11))
    run(some_ids(11, 4, 6)).sum().backward()
    dist.barrier()


def test_an_id_out_of_range_in_a_graph(ranks):
    ranks.run(an_id_out_of_range)


def under_fsdp():
    ids, ranks = some_ids(11, 4, 6), dist.get_world_size()
    model = nn.Sequential(gpu_embed.Embedding(11, 6, padding_idx=2), nn.Linear(6, 4, bias=False))
    for seed, weight in enumerate(model.parameters()):
        weight.data = integers(*weight.shape, seed=seed)
    expected = copy.deepcopy(model)
    over = mesh(2, ranks // 2)
    plan = {"0": RowwiseParallel(input_layouts=Replicate())}
    parallelize_module(model, over["tp"], plan)
    fully_shard(model, mesh=over["dp"])
    model.compile(backend="aot_eager")
    torch._dynamo.reset()
    for _ in range(2):
        assert torch.equal(model(ids), expected(ids))
        model(ids).sum().backward()
        expected(ids).sum().backward()
    for weight, one in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(weight.grad.full_tensor(), one.grad)


def test_under_fsdp(four):
    four.run(under_fsdp)
