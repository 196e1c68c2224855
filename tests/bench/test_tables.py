"""The benchmark's cells of many tables: ids, gates, bytes, memory, labels, and who looks them up."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

import gpu_embed
from gpu_embed.bench import (
    byte_floor,
    cli,
    compare,
    ids,
    many_tables,
    measure,
    plots,
    shapes,
    timing,
)
from gpu_embed.bench.layer import APART, ONE_UNDER_ANOTHER, SIDE_BY_SIDE, Layer
from gpu_embed.bench.providers import PROVIDERS, Provider
from gpu_embed.bench.results import read_rows
from gpu_embed.bench.shapes import MODES, SETS, Cell

CPU = torch.device("cpu")
FACTS = {"device": "a CPU", "torch": "2", "triton": "3", "commit": "abc"}
ROWS = Cell(50, 8, 60, tables=3)
BAGS = Cell(50, 8, 60, operation="embedding_bag", hotness=5, tables=3)
MIXED = Cell(50, 8, 60, operation="embedding_bag_mixed", hotness=5, tables=3)
NAMES = ("gpu_embed", "gpu_embed-sparse", "gpu_embed-in-backward", "torch", "torch-together",
         "torch-sparse", "fbgemm-gpu-cpu")  # fmt: skip


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.setattr(timing, "flush", lambda device: None)
    effort = timing.Effort(seconds=0.002, min_samples=3, max_samples=3, host_seconds=0.001)
    return measure.Bench(CPU, 10.0, FACTS, 2**30, effort=effort)


def measured(bench, provider, cell, mode):
    row = bench.row("S", cell, mode, provider.name)
    return bench.measure(bench.problem(cell), provider, mode, row)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cell", [ROWS, BAGS, MIXED], ids=["rows", "bags", "mixed"])
@pytest.mark.parametrize("name", NAMES)
def test_right_results_are_timed(bench, name, cell, mode):
    provider = PROVIDERS[name]
    if (reason := provider.missing_reason(CPU)) is not None:
        pytest.skip(reason)
    if provider.refuses(cell, mode) or not (cell.is_uniform or cell.has(mode)):
        return
    row = measured(bench, provider, cell, mode)
    assert (row.status, row.note) == ("ok", ""), row.match
    assert row.tables == 3
    assert row.ms_p50 > 0
    assert row.host_us > 0
    assert (row.step_peak_bytes is not None) is mode.startswith("step")


def table_of_the_first(weight, cell, mode):
    """A loop that looks everything up in the first table."""
    first = torch.nn.Parameter(weight.detach()[: cell.vocab])
    parts = (first, *(torch.nn.Parameter(weight.detach()[:0]) for _ in range(cell.tables - 1)))
    return Layer(lambda all_ids: tuple(first[own] for own in all_ids), weight, None, parts, APART)


def swapped_bags(weight, cell, mode):
    layer = PROVIDERS["gpu_embed"].build(weight, cell, mode)
    return dataclasses.replace(layer, order=ONE_UNDER_ANOTHER)


class ToAnother(torch.autograd.Function):
    """Rows of one table, whose gradient goes to another."""

    @staticmethod
    def forward(ctx, other, own, rows):
        ctx.save_for_backward(own)
        ctx.shape = other.shape
        return rows[own]

    @staticmethod
    def backward(ctx, grad):
        return grad.new_zeros(ctx.shape).index_add_(0, ctx.saved_tensors[0], grad), None, None


def gradient_of_the_first(weight, cell, mode):
    """Right rows, but every table's gradient goes to the first."""
    parts = [torch.nn.Parameter(rows) for rows in weight.detach().split(cell.vocab)]

    def lookup(all_ids):
        found = [
            ToAnother.apply(parts[0], own, rows.detach())
            for own, rows in zip(all_ids, parts, strict=True)
        ]
        return (*found[:-1], found[-1] + 0 * sum(rows.sum() for rows in parts))

    return Layer(lookup, weight, None, tuple(parts), APART)


@pytest.mark.parametrize(
    ("build", "cell", "mode", "said"),
    [
        (table_of_the_first, ROWS, "forward", "the row at position 20 is not weight[ids]"),
        (swapped_bags, BAGS, "forward", "the output is torch.float32 [4, 24]"),
        (gradient_of_the_first, ROWS, "backward", "has a gradient, though no id asks for it"),
        (gradient_of_the_first, ROWS, "step", "changed without an id"),
    ],
)
def test_wrong_results_have_no_time(bench, build, cell, mode, said):
    # Rows 10 and on of each table are looked up by nobody.
    cell = dataclasses.replace(cell, distribution="spread:10" if mode == "forward" else "equal")
    row = measured(bench, Provider("fake", "a fake", build, cpu=True), cell, mode)
    assert row.status == "wrong", row
    assert said in row.match
    assert row.ms_p50 is None


def test_a_loop_is_one_leaf_a_table_in_the_given_memory():
    problem = measure.Problem(ROWS, CPU, 0, 2)
    layer = PROVIDERS["torch"].build(problem.weight, ROWS, "step")
    assert [leaf.shape for leaf in layer.leaves] == [(50, 8)] * 3
    assert layer.leaves[0].data_ptr() == problem.weight.data_ptr()
    outputs = layer.outputs(problem.ids(0))
    assert len(outputs) == 3
    for table, output in enumerate(outputs):
        rows = problem.weight.detach()[50 * table : 50 * (table + 1)]
        assert torch.equal(output, rows[problem.ids(0)[table]])


def test_ours_are_the_batched_layers_in_the_given_memory():
    for cell, kind in (
        (ROWS, gpu_embed.TableBatchedEmbedding),
        (BAGS, gpu_embed.TableBatchedEmbeddingBag),
    ):
        problem = measure.Problem(cell, CPU, 0, 1)
        layer = PROVIDERS["gpu_embed"].build(problem.weight, cell, "full")
        (leaf,) = layer.leaves
        assert leaf.data_ptr() == problem.weight.data_ptr()
        modules = (c.cell_contents for c in layer.lookup.__closure__)
        assert any(isinstance(module, kind) for module in modules)
        pairs = zip(problem.ids(0), problem.weight.detach().split(50), strict=True)
        expected = [
            F.embedding_bag(own, rows, mode="sum") if cell.pooled else rows[own]
            for own, rows in pairs
        ]
        (output,) = layer.outputs(problem.ids(0))
        assert torch.allclose(output, torch.cat(expected, dim=1 if cell.pooled else 0))


@pytest.mark.parametrize("order", [ONE_UNDER_ANOTHER, APART, SIDE_BY_SIDE])
def test_orders_are_there_and_back(order):
    rows = torch.arange(24.0).view(6, 4)
    assert torch.equal(order.gathered(order.handed_out(rows, 3), 3), rows)


def test_side_by_side_is_what_torch_cat_makes_of_tables():
    apart = [torch.rand(2, 4) for _ in range(3)]
    (together,) = SIDE_BY_SIDE.handed_out(torch.cat(apart), 3)
    assert torch.equal(together, torch.cat(apart, dim=1))


def test_each_table_draws_ids_of_its_own():
    cell = Cell(1000, 4, 300, tables=3)
    first = measure.draw_ids(cell, seed=7)
    assert first.shape == (3, 100)
    assert len({tuple(table.tolist()) for table in first}) == 3
    assert not torch.equal(first, measure.draw_ids(cell, seed=8))
    # One table's are as they always were.
    alone = measure.draw_ids(Cell(1000, 4, 300), seed=7)
    assert torch.equal(alone, ids.draw("uniform", 300, 1000, seed=7))


def test_places_are_rows_of_all_tables():
    drawn = torch.tensor([[[1, 2]], [[3, 0]]], dtype=torch.uint8)
    cell = Cell(200, 4, 4, id_dtype="uint8", operation="embedding_bag", hotness=2, tables=2)
    assert measure.places(cell, drawn).tolist() == [[1, 2], [203, 200]]
    assert measure.places(Cell(200, 4, 3), torch.tensor([5, 1, 1])).tolist() == [5, 1, 1]


@pytest.mark.parametrize(
    ("cell", "said"),
    [
        (Cell(9, 4, 10, tables=3), "10 ids do not make whole bags of 1 for 3 tables"),
        (dataclasses.replace(BAGS, num_ids=65), "65 ids do not make whole bags of 5 for 3 tables"),
        (dataclasses.replace(ROWS, padding=0.5), "padding is measured in one table alone"),
    ],
)
def test_ids_that_fit_no_tables(cell, said):
    with pytest.raises(ids.IdsError, match=said):
        measure.draw_ids(cell, 0)


def test_bytes_by_hand():
    # 3 rows read and 6 written of 10 x 4 bytes, 6 ids of 8; a gradient of 2 x 100 rows.
    cell, counts = Cell(100, 10, 6, tables=2), byte_floor.Counts(3, 6, 3)
    assert byte_floor.bytes_moved(cell, "forward", counts).dram == (3 + 6) * 40 + 48
    assert byte_floor.bytes_moved(cell, "backward", counts).dram == (6 + 200) * 40 + 48
    assert byte_floor.bytes_moved(cell, "backward", counts).logical == (12 + 200) * 40 + 48
    assert byte_floor.bytes_moved(cell, "step", counts).dram == (3 + 6 + 6 + 2 * 3) * 40 + 96


def test_different_rows_are_counted_over_all_tables(bench):
    equal = dataclasses.replace(ROWS, distribution="equal")
    assert bench.problem(equal).counts == byte_floor.Counts(3, 60, 3)


def test_needed_memory_counts_every_table_and_every_copy():
    cell = Cell(1000, 100, 10, tables=5)
    # The outputs and the gradients of a loop are put together to be checked.
    tables, rest = 5 * 400_000, 3 * 4000 + 80
    assert measure.needed_bytes(cell, "forward", 1) == tables + rest - 4000
    assert measure.needed_bytes(cell, "backward", 1) == 3 * tables + rest
    assert measure.needed_bytes(cell, "backward", 1, copies=True) == 4 * tables + rest
    assert measure.needed_bytes(cell, "step_adam", 1) == 5 * tables + rest


@pytest.mark.parametrize("name", ["index_add_", "liger-kernel", "flag-gems", "torch.compile"])
def test_who_knows_one_table_says_so(name):
    assert PROVIDERS[name].refuses(ROWS, "backward") == "one table at a time"


@pytest.mark.parametrize("method", ["gather-rows", "gather-flat", "gather-descriptor"])
def test_the_kernels_of_one_table_are_no_candidates(method):
    provider = PROVIDERS[f"gpu_embed-{method}"]
    assert "several tables" in provider.refuses(ROWS, "forward")
    assert not provider.is_planned(ROWS, "forward")


def test_sets_c_and_d_are_what_fbgemm_and_dynamicemb_measure():
    for cell in SETS["C"].cells:
        assert (cell.tables, cell.vocab, cell.dim, cell.num_ids) == (32, 100_000, 128, 327_680)
    assert {(cell.pooled, cell.hotness) for cell in SETS["C"].cells} == {(False, 1), (True, 20)}
    large = [cell for cell in SETS["D"].cells if cell.vocab == 1_677_721]
    assert {cell.tables for cell in large} == {1, 10}
    assert {cell.num_ids for cell in large} == {1_048_570}
    for name in "CD":
        for cell in SETS[name].cells:
            assert cell.num_ids % (cell.tables * cell.hotness) == 0
            assert set(shapes.STEPS) <= set(SETS[name].modes)
    assert str(ROWS) == "3 tables of 50 x 8 float32, 60 ids (uniform)"


def test_the_number_of_tables_is_an_option_and_part_of_a_row(tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "copy_gbps", lambda *arguments: 10.0)
    command = ["run", "--device", "cpu", "--set", "C", "--out", str(tmp_path), "--vocab", "40"]
    command += ["--dim", "4", "--ids", "80", "--distribution", "uniform", "--mode", "forward"]
    command += ["--seconds", "0.001", "--providers", "gpu_embed", "torch", "--tables"]
    assert cli.main([*command, "1", "4"]) == 0
    rows = read_rows(tmp_path)
    assert {(row.operation, row.tables, row.status) for row in rows} == {
        (operation, tables, "ok")
        for operation in ("embedding", "embedding_bag")
        for tables in (1, 4)
    }
    # What one run measured of 1 and 4 tables, the next lacks of 2 alone.
    assert cli.main([*command, "1", "2", "4", "--resume"]) == 0
    assert [row.tables for row in read_rows(tmp_path)[len(rows) :]] == [2] * 4


def test_the_number_of_tables_is_in_every_label(bench):
    row = bench.row("C", ROWS, "forward", "torch")
    other = dataclasses.replace(row, tables=4)
    assert len(compare.compare([row], [other]).pairs) == 0
    assert "C forward float32 3 tables V=50" in compare.describe(row.key)
    assert plots._shape_title(row.key, "set", "mode").startswith("3 tables, V = 50")
    assert plots._shape_title(row.key._replace(tables=1), "set", "mode").startswith("V = 50")
    times = {
        (tables, name): dataclasses.replace(
            row, tables=tables, provider=name, ms_p50=1.0 + tables, status="ok"
        )
        for tables in (1, 3)
        for name in ("gpu_embed", "torch")
    }
    styles = plots.choose_styles(["gpu_embed", "torch"])
    titles = [
        item.title
        for item in plots.ratio_pictures([*times.values()], styles, "")
        if isinstance(item, plots.Picture)
    ]
    assert len(titles) == 2
    assert sum("many tables" in title for title in titles) == 1


def test_offsets_are_table_major():
    assert many_tables._offsets(61, 5, torch.int32, CPU).tolist() == list(range(0, 61, 5))
