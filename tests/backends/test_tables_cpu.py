"""Batched tables on the CPU: torch's bags, and what serves the calls that these leave."""

import dataclasses
import itertools
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import gpu_embed
from gpu_embed import bounds
from gpu_embed.backends._torch import tables, tables_cpu
from gpu_embed.dtypes import accumulation
from gpu_embed.tables.batch import TableBatch
from gpu_embed.tables.layout import TableLayout, make_layout

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ID_DTYPES = (torch.int64, torch.int32, torch.int16, torch.uint8)
# (features, tables' widths, modes, whether sums are taken)
LAYOUTS = {
    "one width": ((4, 4, 4), ("sum",), True),
    "two of three widths": ((4, 16, 4, 16, 16), ("sum",), True),
    "odd widths": ((1, 3, 12, 3), ("sum",), True),
    "means": ((4, 4, 8), ("mean",), True),
    "all modes": ((4, 4, 4, 8, 8), ("sum", "mean", "max"), True),
    "maxima": ((8, 3), ("max",), True),
    "rows": ((4, 4), ("sum",), False),
    "one table": ((5,), ("sum",), True),
}


class Case(NamedTuple):
    layout: TableLayout
    batch: TableBatch
    weight: Tensor
    per_sample_weights: Tensor | None
    grad_output: Tensor


def integers(generator, low, high, *shape):
    return torch.randint(low, high, shape, generator=generator)


def make_case(name: str, number: int, dtype: torch.dtype) -> Case:
    """A batch of small integers; features that share tables, padding and weights in some."""
    dims, modes, pooled = LAYOUTS[name]
    draw = torch.Generator().manual_seed(number)
    rows = integers(draw, 1, 9, len(dims)).tolist()
    padding = [None if number % 2 else rows[table] - 1 for table in range(len(dims))]
    names = [f"t{table}" for table in range(len(dims))]
    shared = {f"f{table}": names[table] for table in range(len(dims))} | {"again": names[0]}
    layout = make_layout(
        dict(zip(names, zip(rows, dims, strict=True), strict=True)),
        dict(zip(names, itertools.cycle(modes))),
        dict(zip(names, padding, strict=True)),
        shared,
    )
    num_bags = 3
    lengths = torch.tensor([0, 1, 2, 4])[integers(draw, 0, 4, layout.num_features * num_bags)]
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    of_features = lengths.view(-1, num_bags).sum(1).tolist()
    ids = [
        integers(draw, 0, rows[table], count)
        for table, count in zip(layout.feature_tables, of_features, strict=True)
    ]
    # Some ids stand behind the last offset, in no bag.
    ids = torch.cat([*ids, integers(draw, -9, 9, number % 3)])
    constants = layout.fields(CPU), layout.table_of_column(CPU), layout.shape(pooled)
    id_dtype = ID_DTYPES[number % len(ID_DTYPES)]
    batch = TableBatch(ids.to(id_dtype), offsets.to(id_dtype), *constants)
    weight = integers(draw, -4, 5, *layout.buffer_shape).to(dtype)
    weights = None
    if pooled and set(layout.modes) == {"sum"} and number % 3 == 0:
        weights = integers(draw, -2, 3, len(ids)).to(dtype)
    shape = (num_bags, batch.width) if pooled else (len(ids), dims[0])
    # Means of up to four are whole.
    grad_output = 12 * integers(draw, -2, 3, *shape).to(dtype)
    if number % 4 == 1:
        grad_output = grad_output[:1].expand_as(grad_output)
    elif number % 4 == 2:
        grad_output = grad_output.T.contiguous().T
    return Case(layout, batch, weight, weights, grad_output)


@pytest.mark.parametrize("alone", [1, 3, 4096])
@pytest.mark.parametrize("name", LAYOUTS)
def test_groups_give_what_rows_one_by_one_give(monkeypatch, name, alone):
    """**Accumulation.** Both are exact on integers, so their bits are the same."""
    monkeypatch.setattr(tables_cpu, "ALONE", alone)
    for number, dtype in enumerate(DTYPES * 2):
        layout, batch, weight, weights, grad_output = make_case(name, number, dtype)
        places = batch.places()
        if "max" in layout.modes:
            expected, positions = tables.embedding_max(weight, batch, True, places)
            output, found = tables_cpu.embedding_max(weight, batch, True)
            assert torch.equal(output, expected)
            feature_modes = [layout.modes[table] for table in layout.feature_tables]
            is_max = torch.tensor([feature_modes[f] == "max" for f in batch.table_of_column])
            assert torch.equal(found[:, is_max], positions[:, is_max])
            assert found.dtype == batch.position_dtype
            batch = dataclasses.replace(batch, max_positions=positions)
        for zero_padding in (False, True):
            arguments = weight, weights, batch, zero_padding
            output = tables_cpu.embedding(*arguments)
            assert torch.equal(output, tables.embedding(*arguments, places))
        arguments = grad_output, weights, batch, layout.buffer_shape
        expected = tables.dense_backward(*arguments, None)
        assert torch.equal(tables_cpu.dense_backward(*arguments, None), expected)
        if weights is not None:
            arguments = grad_output, weight, batch
            expected = tables.sample_weights_backward(*arguments)
            assert torch.equal(tables_cpu.sample_weights_backward(*arguments), expected)


@pytest.mark.parametrize("module", [tables, tables_cpu], ids=["any device", "CPU"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_gradient_that_exists_is_added_to(name, module):
    """**Accumulation.** Rows that ids name are summed and rounded once; all others keep their bits."""
    for number, dtype in enumerate(DTYPES * 2):
        layout, batch, weight, weights, grad_output = make_case(name, number, dtype)
        if "max" in layout.modes:
            _, positions = tables.embedding_max(weight, batch, True, batch.places())
            batch = dataclasses.replace(batch, max_positions=positions)
        arguments = grad_output.double(), None, batch, layout.buffer_shape
        if weights is not None:
            arguments = (grad_output.double(), weights.double(), *arguments[2:])
        exact = tables.dense_backward(*arguments, None)
        # Of rows whose sums cancel each other too it shows who is named.
        ones = tables.dense_backward(torch.ones_like(arguments[0]), None, *arguments[2:], None)
        for into_dtype in {dtype, accumulation(dtype)}:
            before = torch.where(ones == 0, torch.nan, exact.sign() + 1).to(into_dtype)
            into = before.clone()
            result = module.dense_backward(grad_output, weights, batch, layout.buffer_shape, into)
            assert result is into
            wide = accumulation(dtype)
            expected = (before.to(wide) + exact.to(wide)).to(into_dtype)
            assert torch.allclose(into, expected, 0, 0, equal_nan=True)


@pytest.mark.parametrize("module", [tables, tables_cpu], ids=["any device", "CPU"])
def test_a_16_bit_gradient_gets_sums_of_fp32(module):
    """**Accumulation.** 4096 ones and what was there are one sum, where bf16 would stop at 256."""
    layout = make_layout([(3, 4), (2, 4)], "sum", None)
    constants = layout.fields(CPU), layout.table_of_column(CPU), layout.shape(True)
    batch = TableBatch(torch.zeros(8192, dtype=torch.int64), torch.arange(8193), *constants)
    grad_output = torch.ones(4096, 8, dtype=torch.bfloat16)
    into = torch.full(layout.buffer_shape, 32.0, dtype=torch.bfloat16)
    module.dense_backward(grad_output, None, batch, layout.buffer_shape, into)
    assert into[:, 0].tolist() == [4128, 32, 32, 4128, 32]


@pytest.mark.parametrize("num_rows", [100, 20_000, 40_000])
def test_many_ids_of_several_groups(num_rows):
    """Groups stay in their order, whatever the dtype of the keys that are sorted."""
    layout = make_layout([(num_rows, 4), (num_rows, 8)], "sum", None)
    constants = layout.fields(CPU), layout.table_of_column(CPU), layout.shape(True)
    ids = integers(torch.Generator().manual_seed(0), 0, num_rows, 40_000)
    batch = TableBatch(ids, torch.arange(0, 40_001, 8), *constants)
    grad_output = integers(torch.Generator().manual_seed(1), -2, 3, 2500, 12).float()
    expected = [
        torch.zeros(num_rows, dim).index_add_(0, own, grad.repeat_interleave(8, 0))
        for own, dim, grad in zip(ids.chunk(2), (4, 8), grad_output.split([4, 8], 1), strict=True)
    ]
    gradient = tables_cpu.dense_backward(grad_output, None, batch, layout.buffer_shape, None)
    for table, rows in enumerate(expected):
        assert torch.equal(layout.view(gradient, table), rows)


@pytest.mark.parametrize("alone", [1, 4096])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_an_id_out_of_range_is_left_to_the_other(monkeypatch, mode, alone):
    """**Bounds.** It is named, and the table is unchanged; the other tables' rows are not read for it."""
    monkeypatch.setattr(tables_cpu, "ALONE", alone)
    for wrong, dtype in itertools.product((-1, 3, 2**40), (torch.float32, torch.bfloat16)):
        layer = gpu_embed.TableBatchedEmbeddingBag([(3, 4), (9, 4)], mode, dtype=dtype)
        ids, offsets = torch.tensor([0, wrong, 2, 1, 1]), torch.tensor([0, 2, 3, 4, 5])
        with pytest.raises(IndexError, match=rf"idx to be {wrong}, at position 1 of bag 0"):
            layer(ids, offsets)
        with bounds.set_bounds_check("off"):
            output = layer(ids, offsets)
        output.sum().backward()
        assert layer.weight.grad.shape == layer.weight.shape


@pytest.mark.full
def test_the_gradient_of_any_device_waits_for_nothing():
    """**No host sync.** Fake tensors have no numbers to wait for."""
    case = make_case("all modes", 0, torch.bfloat16)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {
            field.name: mode.from_tensor(value)
            for field in dataclasses.fields(case.batch)
            if field.init and isinstance(value := getattr(case.batch, field.name), Tensor)
        }
        batch = dataclasses.replace(case.batch, **fake)
        grad_output = mode.from_tensor(case.grad_output)
        into = grad_output.new_zeros(case.layout.buffer_shape)
        result = tables.dense_backward(grad_output, None, batch, case.layout.buffer_shape, into)
    assert result is into
