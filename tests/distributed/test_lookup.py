"""Lookups in a table that is a DTensor, and their gradients, against the whole table in one process."""

import itertools

import pytest
import torch
import torch.distributed as dist
from ranks import mesh
from sharded_cases import (
    MULTIPLE,
    assert_equal,
    assert_lies_as,
    distribute,
    integers,
    lookup_equals_whole,
    part,
    some_ids,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Shard

from gpu_embed.functional import embedding, embedding_bag

# 11 rows are cut unevenly. Of four ranks one has none of 3 rows, and two have none of 2 columns.
TABLES = {"11 x 6": (11, 6), "3 x 6": (3, 6), "11 x 2": (11, 2)}
every_table = pytest.mark.parametrize("shape", TABLES.values(), ids=TABLES)
OPTIONS = {
    "plain": {},
    "padding": {"padding_idx": 2},
    "padding from the end": {"padding_idx": -1},
    "by frequency": {"scale_grad_by_freq": True},
    "padding by frequency": {"padding_idx": -1, "scale_grad_by_freq": True},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
every_table_placement = pytest.mark.parametrize("table", "r01")
every_ids_placement = pytest.mark.parametrize("ids_lie", "r01")


@every_option
@every_table
@every_ids_placement
@every_table_placement
def test_tables_on_one_mesh_dimension(ranks, table, ids_lie, shape, options):
    ranks.run(lookup_equals_whole, (ranks.size,), shape, table, ids_lie, options)


PAIRS = ["".join(pair) for pair in itertools.product("r01", repeat=2)]


@pytest.mark.parametrize("options", [{}, OPTIONS["padding by frequency"]], ids=["plain", "freq"])
@pytest.mark.parametrize("ids_lie", PAIRS)
@pytest.mark.parametrize("table", PAIRS)
def test_tables_on_two_mesh_dimensions(four, table, ids_lie, options):
    four.run(lookup_equals_whole, (2, 2), (11, 6), table, ids_lie, options)


@pytest.mark.parametrize("grads_lie", "r012")
@every_ids_placement
@every_table_placement
def test_gradients_that_come_sharded(ranks, table, ids_lie, grads_lie):
    """Of an output whose own placement is another."""
    args = (ranks.size,), (11, 6), table, ids_lie, {}
    ranks.run(lookup_equals_whole, *args, None, torch.float32, grads_lie)


IDS = {
    "0-d": (some_ids(11), "r"),
    "1-d": (some_ids(11, 7), "r0"),
    "3-d": (some_ids(11, 2, 3, 4), "r012"),
    "fewer than ranks": (some_ids(11, 1, 3), "r01"),
    "none": (some_ids(11, 0), "r0"),
    "none in 2-d": (some_ids(11, 4, 0), "r01"),
}


@pytest.mark.parametrize(
    ("ids", "ids_lie"),
    [
        pytest.param(ids, lie, id=f"{name} {lie}")
        for name, (ids, lies) in IDS.items()
        for lie in lies
    ],
)
@every_table_placement
def test_ids_of_any_shape(ranks, table, ids, ids_lie):
    ranks.run(lookup_equals_whole, (ranks.size,), (11, 6), table, ids_lie, {}, ids)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8], ids=str)
@every_ids_placement
@every_table_placement
def test_ids_of_any_dtype(two, table, ids_lie, dtype):
    ids = some_ids(11, 4, 6, dtype=dtype)
    two.run(
        lookup_equals_whole, (2,), (11, 6), table, ids_lie, OPTIONS["padding by frequency"], ids
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@every_ids_placement
@every_table_placement
def test_tables_of_any_dtype(two, table, ids_lie, dtype):
    two.run(lookup_equals_whole, (2,), (11, 6), table, ids_lie, {"padding_idx": 3}, None, dtype)


def sums_ones(table, ids_lie, dtype):
    over = mesh(dist.get_world_size())
    ids = torch.full((4096,), 9)
    weight = distribute(torch.zeros(11, 6, dtype=dtype), over, table).requires_grad_()
    embedding(distribute(ids, over, ids_lie), weight).full_tensor().sum().backward()
    expected = torch.zeros(11, 6, dtype=dtype)
    expected[9] = 4096
    assert_equal(weight.grad, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("ids_lie", "r0")
@every_table_placement
def test_4096_ones_in_16_bits(ranks, table, ids_lie, dtype):
    """Accumulation: in fp32, and not in 16 bits, on each rank."""
    ranks.run(sums_ones, table, ids_lie, dtype)


def differentiates_twice(mesh_shape, table, ids_lie, options):
    """d/dgrad of the weight's gradient is a lookup: of `direction`, without padding, over the counts."""
    over, ids, by_frequency = mesh(*mesh_shape), some_ids(11, 4, 6), "scale_grad_by_freq" in options
    direction = integers(11, 6, seed=2, multiple=MULTIPLE)
    expected = direction / (ids.flatten().bincount(minlength=11)[:, None] if by_frequency else 1)
    if "padding_idx" in options:
        expected[options["padding_idx"]] = 0

    weight = distribute(integers(11, 6), over, table).requires_grad_()
    grad = integers(4, 6, 6, seed=1, multiple=MULTIPLE)
    grad = distribute(grad, over, "r" * len(mesh_shape)).requires_grad_()
    output = embedding(distribute(ids, over, ids_lie), weight, **options)
    (grad_weight,) = torch.autograd.grad(output, weight, grad, create_graph=True)
    direction = distribute(direction, over, table)
    (grad_grad,) = torch.autograd.grad(grad_weight, grad, direction)
    assert_equal(grad_grad, expected[ids])


@every_option
@every_ids_placement
@every_table_placement
def test_double_backward(ranks, table, ids_lie, options):
    ranks.run(differentiates_twice, (ranks.size,), table, ids_lie, options)


@pytest.mark.parametrize("table", ["00", "01", "10", "r0", "1r"])
def test_double_backward_on_two_mesh_dimensions(four, table):
    four.run(differentiates_twice, (2, 2), table, "0r", OPTIONS["padding by frequency"])


def repeats_bits(table):
    """Twice the same bits of fractions, whose sums depend on their order."""
    over, ids = mesh(dist.get_world_size()), some_ids(11, 512)
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(512, 6, generator=generator)
    results = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            weight = distribute(integers(11, 6), over, table).requires_grad_()
            embedding(distribute(ids, over, "r"), weight).full_tensor().backward(grad)
            results.append(weight.grad.to_local())
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(*results)
    whole_weight = integers(11, 6).requires_grad_()
    torch.nn.functional.embedding(ids, whole_weight).backward(grad)
    torch.testing.assert_close(weight.grad.full_tensor(), whole_weight.grad)


@every_table_placement
def test_deterministic_mode(ranks, table):
    """Determinism: on each rank."""
    ranks.run(repeats_bits, table)


def adds_up(table):
    """Two lookups in one table, and two backwards, add to one gradient."""
    over = mesh(dist.get_world_size())
    ids, others = some_ids(11, 4, 6), some_ids(11, 5)
    weight, expected = integers(11, 6), integers(11, 6).requires_grad_()
    sharded = distribute(weight, over, table).requires_grad_()
    for _ in range(2):
        torch.nn.functional.embedding(ids, expected).sum().backward()
        torch.nn.functional.embedding(others, expected).sum().backward()
        total = embedding(distribute(ids, over, "0"), sharded).sum()
        total = total + embedding(distribute(others, over, "r"), sharded).sum()
        total.full_tensor().backward()
    assert_lies_as(sharded.grad, sharded)
    assert_equal(sharded.grad, expected.grad)


@every_table_placement
def test_gradients_add_up(two, table):
    two.run(adds_up, table)


def without_gradient(table):
    over, ids, weight = mesh(dist.get_world_size()), some_ids(11, 4, 6), integers(11, 6)
    sharded = distribute(weight, over, table)
    frozen = embedding(distribute(ids, over, "r"), sharded)
    assert not frozen.requires_grad
    assert_equal(frozen, weight[ids])
    with torch.no_grad():
        assert not embedding(distribute(ids, over, "r"), sharded.requires_grad_()).requires_grad


@every_table_placement
def test_a_frozen_table(two, table):
    two.run(without_gradient, table)


def within_transforms():
    over, ids, weight = mesh(dist.get_world_size()), some_ids(11, 4, 6), integers(11, 6)
    table, placed = distribute(weight, over, "0"), distribute(ids, over, "r")
    rows = torch.func.vmap(lambda row: embedding(row, table))(placed)
    assert_equal(rows, weight[ids])
    grad = torch.func.grad(lambda weight: embedding(placed, weight).sum())(table)
    counts = ids.flatten().bincount(minlength=11).float()
    assert_equal(grad, counts[:, None].expand(11, 6))


def test_within_transforms(two):
    """Drop-in: torch.func hides what is sharded, and its lookup is torch's."""
    two.run(within_transforms)


def on_some_of_the_ranks(table, lookup):
    some = DeviceMesh("cpu", [1, 3])
    weight, ids = integers(11, 6, multiple=MULTIPLE), some_ids(11, 4, 6)
    of_rank = distribute(weight, some, table).requires_grad_()
    output = lookup(distribute(ids, some, "r"), of_rank)
    if some.get_coordinate() is None:
        assert output.to_local().shape == (0,)
    else:
        expected = lookup(ids, weight.requires_grad_())
        assert_equal(output.detach(), expected.detach())
        output.sum().full_tensor().backward()
        expected.sum().backward()
        assert_equal(of_rank.grad, weight.grad)


@pytest.mark.parametrize("lookup", [embedding, embedding_bag])
@pytest.mark.parametrize("table", "r01")
def test_ranks_outside_of_the_mesh(four, table, lookup):
    four.run(on_some_of_the_ranks, table, lookup)


def of_more_placements():
    """A table that is a sum over ranks, and ids whose dimension is counted from the end."""
    over, ids, weight = mesh(dist.get_world_size()), some_ids(11, 4, 6), integers(11, 6)
    table = DTensor.from_local(weight, over, [Partial()], run_check=False).requires_grad_()
    placed = DTensor.from_local(part(ids, 1), over, [Shard(-1)], run_check=False)
    output = embedding(placed, table)
    assert_equal(output.detach(), weight[ids] * over.size())
    output.sum().full_tensor().backward()
    counts = ids.flatten().bincount(minlength=11).float()
    assert_equal(table.grad, counts[:, None].expand(11, 6))


def test_more_placements(two):
    two.run(of_more_placements)
