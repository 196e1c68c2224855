"""Bags of rows of a table that is a DTensor, against the whole table in one process, by the same function."""

import copy

import pytest
import torch
import torch.distributed as dist
from ranks import mesh
from sharded_cases import (
    FORMS,
    MULTIPLE,
    assert_equal,
    assert_lies_as,
    bag_equals_whole,
    integers,
    part,
    some_ids,
)
from tiers import where
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import parallelize_module

import gpu_embed
from gpu_embed.distributed import ColwiseBagParallel, RowwiseBagParallel

every_placement = pytest.mark.parametrize("table", "r01")
every_mode = pytest.mark.parametrize("mode", ["sum", "mean", "max"])

every_form = pytest.mark.parametrize("form", FORMS)
OPTIONS = {
    "plain": {},
    "padding": {"padding_idx": -1},
    "by frequency": {"scale_grad_by_freq": True},
    "padding by frequency": {"padding_idx": 1, "scale_grad_by_freq": True},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def by_frequency_exists(mode, options):
    return mode != "max" or "scale_grad_by_freq" not in options


def lies_with_its_form(form, ids_lie):
    return form == "rows" or ids_lie != "1"


@where(by_frequency_exists)
@every_option
@every_mode
@every_form
@every_placement
def test_bags_on_one_mesh_dimension(ranks, table, form, mode, options):
    ranks.run(bag_equals_whole, (ranks.size,), (11, 6), table, "r", form, mode, options)


@pytest.mark.parametrize("shape", [(3, 6), (11, 2)], ids=["3 x 6", "11 x 2"])
@every_mode
@every_placement
def test_ranks_without_rows_or_columns(ranks, table, mode, shape):
    args = (ranks.size,), shape, table, "r", "rows", mode, OPTIONS["padding"]
    ranks.run(bag_equals_whole, *args)


@where(lies_with_its_form)
@pytest.mark.parametrize("ids_lie", "01")
@every_form
@every_mode
@every_placement
def test_sharded_ids(ranks, table, ids_lie, form, mode):
    args = (ranks.size,), (11, 6), table, ids_lie, form, mode, OPTIONS["padding"]
    ranks.run(bag_equals_whole, *args)


@every_form
@pytest.mark.parametrize("ids_lie", "r0")
@pytest.mark.parametrize("options", [{}, OPTIONS["padding by frequency"]], ids=["plain", "freq"])
@every_placement
def test_per_sample_weights(ranks, table, ids_lie, form, options):
    args = (ranks.size,), (11, 6), table, ids_lie, form, "sum", options, True
    ranks.run(bag_equals_whole, *args)


@pytest.mark.parametrize("ids_lie", ["rr", "0r", "00", "10"])
@pytest.mark.parametrize("table", ["00", "01", "10", "11", "r0", "0r", "1r", "r1", "rr"])
@every_mode
def test_bags_on_two_mesh_dimensions(four, table, ids_lie, mode):
    args = (2, 2), (11, 6), table, ids_lie, "rows", mode, OPTIONS["padding"]
    four.run(bag_equals_whole, *args)


nan, inf = float("nan"), float("inf")
# Rows of two columns; of 2 ranks the second has those from 2 on, of 4 ranks each has one.
MAXIMA = {
    "ties": [[1, 5], [1, 3], [1, 5], [0, 5]],
    "NaN first": [[nan, 1], [1, nan], [2, 2], [3, 3]],
    "NaN last": [[1, 2], [1, 2], [3, 1], [nan, nan]],
    "two NaN": [[1, nan], [nan, 1], [nan, 2], [1, nan]],
    "infinities": [[-inf, inf], [-inf, 1], [-inf, inf], [-inf, nan]],
    "zeros of both signs": [[-0.0, 0.0], [-0.0, -0.0], [0.0, 0.0], [-0.0, -0.0]],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", MAXIMA.values(), ids=MAXIMA)
@pytest.mark.parametrize("table", "01")
def test_maxima_over_ranks(ranks, table, rows, dtype):
    """Ties go to the first position, whatever rank has it."""
    weight = torch.tensor(rows, dtype=dtype)
    ids = torch.tensor([[3, 2, 1, 0, 1, 2], [0, 1, 2, 3, 3, 3], [1, 2, 1, 2, 1, 2], [2] * 6])
    args = (ranks.size,), None, table, "r", "rows", "max", {}, False, weight, ids
    ranks.run(bag_equals_whole, *args)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@every_mode
@every_placement
def test_tables_of_any_dtype(two, table, mode, dtype):
    weight = (integers(11, 6) * 8).to(dtype)
    # A bag has 4 ids, so a mean of sixteens is exact.
    ids = some_ids(11, 6, 4)
    args = (2,), None, table, "r", "rows", mode, {}, False, weight, ids
    two.run(bag_equals_whole, *args)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8], ids=str)
@every_mode
@every_placement
def test_ids_of_any_dtype(two, table, mode, dtype):
    ids = some_ids(11, 4, 6, dtype=dtype)
    args = (2,), (11, 6), table, "r", "rows", mode, {}, False, None, ids
    two.run(bag_equals_whole, *args)


# The styles.

STYLES = {"row-wise": RowwiseBagParallel, "column-wise": ColwiseBagParallel}
LAYOUTS = {"replicated": Replicate(), "bags": Shard(0), "columns": Shard(1)}


def style_equals_whole(style, input_layout, output_layout, mode, form, weighted):
    over = mesh(dist.get_world_size())
    ids = some_ids(11, 4, 6)
    arguments = {**FORMS[form]}
    last = arguments.pop("include_last_offset", False)
    if form != "rows":
        ids = ids.view(-1)
    layer = gpu_embed.EmbeddingBag(11, 4, mode=mode, padding_idx=3, include_last_offset=last)
    layer.weight.data = integers(11, 4, multiple=MULTIPLE)
    model, expected = nn.Sequential(layer), copy.deepcopy(layer)
    parallelize_module(
        model, over, {"0": STYLES[style](input_layouts=input_layout, output_layouts=output_layout)}
    )
    scales = integers(*ids.shape, seed=3) if weighted else None

    def own(tensor, layout):
        return tensor if tensor is None or layout == Replicate() else part(tensor, layout.dim)

    # None: each style's own.
    output_layout = output_layout or (Replicate() if style == "row-wise" else Shard(1))
    whole = expected(ids, per_sample_weights=scales, **arguments)
    grad = integers(*whole.shape, seed=1, multiple=MULTIPLE)
    whole.backward(grad)
    output = layer(
        own(ids, input_layout), per_sample_weights=own(scales, input_layout), **arguments
    )
    assert not isinstance(output, DTensor)
    assert torch.equal(output, own(whole, output_layout))
    output.backward(own(grad, output_layout))
    assert layer.weight.placements == (Shard(0 if style == "row-wise" else 1),)
    assert_lies_as(layer.weight.grad, layer.weight)
    assert_equal(layer.weight.grad, expected.weight.grad)


def offsets_are_of_all(form, input_layout):
    return form == "rows" or input_layout == Replicate()


@where(offsets_are_of_all)
@pytest.mark.parametrize("form", ["rows", "last offset"])
@every_mode
@pytest.mark.parametrize("output_layout", [None, *LAYOUTS.values()], ids=["default", *LAYOUTS])
@pytest.mark.parametrize("input_layout", [Replicate(), Shard(0)], ids=str)
@pytest.mark.parametrize("style", STYLES)
def test_layouts_of_the_styles(ranks, style, input_layout, output_layout, mode, form):
    ranks.run(style_equals_whole, style, input_layout, output_layout, mode, form, False)


@pytest.mark.parametrize("input_layout", [Replicate(), Shard(0)], ids=str)
@pytest.mark.parametrize("style", STYLES)
def test_per_sample_weights_under_the_styles(ranks, style, input_layout):
    ranks.run(style_equals_whole, style, input_layout, None, "sum", "rows", True)
