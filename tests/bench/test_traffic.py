"""What the kernels move: the ideal, the table and the command; and today's kernels against the committed table."""

import importlib.metadata
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

pytest.importorskip("rich", reason="the benchmark's extra is not installed")
pytest.importorskip("triton")
import triton
import triton.language as tl

from gpu_embed.bench import cli
from gpu_embed.bench.ptx.counts import Accesses, LaunchCounts
from gpu_embed.bench.traffic import count
from gpu_embed.bench.traffic import table as traffic_table
from gpu_embed.bench.traffic.cases import (
    BF16,
    CASES,
    CountedCase,
    Ideal,
    array_sectors,
    ideals,
    row_sectors,
)

TABLE = Path(__file__).resolve().parents[2] / "bench" / "traffic.csv"
# Of the default tier: little to compile, and each of the three kinds of access.
SLICE = ("counts", "embedding-D64-float32", "atomic-D50-float32")


def test_sectors_of_rows_and_arrays():
    assert [array_sectors(numel, 4) for numel in (0, 1, 8, 9)] == [0, 1, 1, 2]
    # Rows of 20 bytes: bytes 0 to 20, 20 to 40, 40 to 60, 60 to 80.
    assert [row_sectors(torch.tensor([row]), 5, 4) for row in range(4)] == [1, 2, 1, 2]
    assert row_sectors(torch.tensor([1, 1, 0]), 5, 4) == 5


class SmallCase(CountedCase):
    """Ids 0, 3, 3, 1."""

    def ids(self):
        return torch.tensor([0, 3, 3, 1])


# Ids: 32 bytes. Rows 0, 3, 3 and 1 of 20 bytes: 1 + 2 + 2 + 2 sectors; of 10 bytes: 1 + 2 + 2 + 1.
# In the order of their ids positions 0, 3, 1, 2 have rows of 20 bytes in 1 + 2 + 2 + 1 sectors; the rows of the
# table that they are stored to, 0, 1 and 3, lie in 1 + 2 + 2. Two bags: rows 0, 0, 1, 1 in 1 + 1 + 2 + 2.
@pytest.mark.parametrize(
    ("operation", "fields", "expected"),
    [
        ("embedding", {}, {"gather": Ideal(1 + 7, 3, 0, 80)}),
        ("embedding", {"dtype": BF16}, {"gather": Ideal(1 + 6, 2, 0, 40)}),
        ("take", {"output_dtype": BF16}, {"take": Ideal(1 + 7, 2, 0, 80)}),
        ("atomic", {}, {"scatter_add": Ideal(1 + 3, 0, 7, 80)}),
        ("counts", {}, {"counts": Ideal(1, 0, 4, 32)}),
        (
            "sorted",
            {},
            {"segment_sum": Ideal(1 + 1 + 6, 5, 0, 80), "sort_keys": Ideal(1, 1, 0, 32)},
        ),
        (
            "adam",
            {},
            {"row_update": Ideal(8 + 5 + 10, 5 + 10, 0, 80), "sort_keys": Ideal(1, 1, 0, 32)},
        ),
        (
            "rowwise_adagrad",
            {},
            {"row_update": Ideal(8 + 5 + 3, 5 + 3, 0, 80), "sort_keys": Ideal(1, 1, 0, 32)},
        ),
        ("bag_sum", {"num_bags": 2}, {"bag_sum": Ideal(1 + 1 + 7, 2, 0, 80)}),
        (
            "bag_sum",
            {"num_bags": 2, "equal_lengths": True},
            {"bag_sum": Ideal(1 + 7, 2, 0, 80)},
        ),
        (
            "bag_atomic",
            {"num_bags": 2},
            {"scatter_add": Ideal(1 + 1 + 6, 0, 7, 80), "bag_of": Ideal(1, 1, 0, 16)},
        ),
    ],
    ids=str,
)
def test_the_ideal_by_hand(operation, fields, expected):
    case = SmallCase(operation, 5, num_indices=4, num_embeddings=300, **fields)
    found = ideals(case)
    # Row numbers and 300 fit into two bytes.
    assert found == expected


def test_cases_have_ids_of_their_tables_and_names_of_their_own():
    assert len({str(case) for case in CASES}) == len(CASES)
    for case in CASES:
        ids, bags = case.ids(), case.bags()
        assert torch.equal(ids, case.ids())
        assert (len(ids), bags.num_bags) == (case.num_indices, case.num_bags)
        assert ids.min() >= 0
        assert ids.max() < case.num_embeddings
        assert ideals(case)


COUNTS = LaunchCounts(
    kernel="gather_kernel",
    grid=(2,),
    num_warps=8,
    loads=Accesses(10, 20, 15),
    stores=Accesses(5, 40, 40),
    atomics=Accesses(1, 2, 2),
    hottest_sector=3,
    shared_requests=4,
    shared_wavefronts=6,
    barriers=8,
    instructions=1000,
    longest_warp=130,
    basic_blocks=30,
    divergent_blocks=1,
)
ROW = traffic_table.make_row("gpu_embed", "embedding-D64", [COUNTS, COUNTS], Ideal(36, 80, 4, 2560))


def test_launches_of_a_kernel_are_added_up():
    assert (ROW.launches, ROW.load_sectors, ROW.store_sectors, ROW.atomic_sectors) == (2, 40, 80, 4)
    assert (ROW.load_requests, ROW.store_requests, ROW.atomic_requests) == (20, 10, 2)
    assert (ROW.shared_requests, ROW.shared_wavefronts, ROW.barriers) == (8, 12, 16)
    assert (ROW.instructions, ROW.instructions_a_512_bytes, ROW.longest_path) == (2000, 400, 260)
    # One after another, so they never meet.
    assert ROW.hottest_sector == 3
    alone = traffic_table.make_row("gpu_embed", "bag_sum-D64", [COUNTS], None)
    assert (alone.ideal_load_sectors, alone.instructions_a_512_bytes) == (0, 0)


def test_a_table_is_read_as_it_was_written(tmp_path):
    rows = [replace(ROW, config="a"), ROW, replace(ROW, provider="liger-kernel 1")]
    traffic_table.write_table(tmp_path / "table.csv", reversed(rows))
    assert traffic_table.read_table(tmp_path / "table.csv") == rows
    assert traffic_table.rivals_of(tmp_path / "table.csv") == rows[2:]
    assert traffic_table.rivals_of(tmp_path / "none.csv") == []


@pytest.mark.parametrize("name", [*traffic_table.SECTORS, *traffic_table.COUNTED])
def test_more_is_worse_and_less_is_not(name):
    more = replace(ROW, **{name: getattr(ROW, name) + 1})
    (problem,) = traffic_table.worse([ROW], [more])
    assert problem.startswith("gather_kernel embedding-D64: ")
    assert name.replace("_", " ") in problem
    assert traffic_table.worse([more], [ROW]) == []
    # Another compiler, and another's kernel.
    other = replace(more, triton="3.6.0")
    assert len(traffic_table.worse([ROW], [other])) == (name in traffic_table.SECTORS)
    rival = {"provider": "liger-kernel 1"}
    assert traffic_table.worse([replace(ROW, **rival)], [replace(more, **rival)]) == []


def test_rows_that_one_side_lacks_are_named():
    assert traffic_table.worse([ROW], [replace(ROW, config="new")]) == [
        "gather_kernel new: the table lacks it",
        "gather_kernel embedding-D64: nothing launches it",
    ]


def committed():
    return traffic_table.read_table(TABLE)


def test_the_committed_table_is_whole_and_of_the_pinned_triton():
    """Another version's table would compare little in CI."""
    rows = committed()
    pins = (TABLE.parents[1] / "constraints.txt").read_text()
    assert {f"triton=={row.triton}" for row in rows} <= set(pins.split())
    assert {row.config for row in rows} == {str(case) for case in CASES}
    keys = [row.key for row in rows]
    assert keys == sorted(set(keys))
    rivals = {row.config for row in rows if row.provider != traffic_table.OWN}
    assert rivals == {str(c) for c in CASES if c.operation in count.LIGER_OPERATIONS}


def test_the_command_counts_a_slice_and_nothing_is_worse(capsys):
    assert cli.main(["traffic", "--config", *SLICE, "--check", str(TABLE)]) == 0
    printed = capsys.readouterr()
    assert "rows is worse" in printed.err
    for name in ("counts_kernel", "gather_rows_kernel", "scatter_add_kernel"):
        assert f"{name} (gpu_embed)" in printed.out
    assert "embedding-D64-float32-N1001" in printed.out


@pytest.mark.full
def test_no_kernel_moves_more_than_committed(capsys):
    assert cli.main(["traffic", "--check", str(TABLE)]) == 0, capsys.readouterr().err


@pytest.fixture
def one_case(monkeypatch):
    """In place of the interpreter: what it would have counted."""
    found = SimpleNamespace(rows=[ROW])
    case = CountedCase("embedding", 64)
    monkeypatch.setattr("gpu_embed.bench.traffic.cases.CASES", (case,))
    monkeypatch.setattr(
        count, "own_rows", lambda case: [replace(row, config=str(case)) for row in found.rows]
    )
    return found


def test_a_check_says_what_is_worse_and_what_to_do(one_case, capsys, tmp_path):
    path = str(tmp_path / "table.csv")
    assert cli.main(["traffic", "--out", path]) == 0
    assert cli.main(["traffic", "--check", path]) == 0
    one_case.rows = [replace(ROW, store_sectors=81)]
    capsys.readouterr()
    assert cli.main(["traffic", "--check", path]) == 1
    said = capsys.readouterr().err
    assert "gather_kernel embedding-D64-float32: 81 store sectors, was 80, ideal 80" in said
    assert traffic_table.REGENERATE in said


def test_rivals_stay_in_a_table_that_is_written_without_them(one_case, tmp_path):
    path, rival = tmp_path / "table.csv", replace(ROW, provider="liger-kernel 1")
    traffic_table.write_table(path, [replace(ROW, config="old"), rival])
    assert cli.main(["traffic", "--out", str(path)]) == 0
    own = replace(ROW, config="embedding-D64-float32")
    assert traffic_table.read_table(path) == [rival, own]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--config bogus", "no case begins with bogus, as embedding-D64-float32 does"),
        ("--out x.csv --config embedding", "--out writes the whole table: leave out --config"),
        ("--rivals", "liger-kernel is not installed: leave out --rivals"),
        ("--check missing.csv", "missing.csv"),
        ("--check README", "the columns are not those of traffic"),
    ],
)
def test_what_the_command_cannot_do_is_said_in_a_sentence(
    one_case, capsys, monkeypatch, tmp_path, arguments, said
):
    monkeypatch.setattr(count, "has_liger", lambda: False)
    (tmp_path / "README").write_text("a,b\n")
    arguments = arguments.replace("README", str(tmp_path / "README"))
    assert cli.main(["traffic", *arguments.split()]) == 2
    printed = capsys.readouterr().err
    assert said in printed
    assert printed.count("\n") == 1


@triton.jit
def copy_kernel(weight_ptr, indices_ptr, output_ptr, D: tl.constexpr):
    n = tl.program_id(0)
    d = tl.arange(0, D)
    row = tl.load(indices_ptr + n)
    tl.store(output_ptr + n * D + d, tl.load(weight_ptr + row * D + d))


@triton.jit
def add_kernel(grad_output_ptr, indices_ptr, grad_weight_ptr, D: tl.constexpr):
    n = tl.program_id(0)
    d = tl.arange(0, D)
    row = tl.load(indices_ptr + n)
    tl.atomic_add(grad_weight_ptr + row * D + d, tl.load(grad_output_ptr + n * D + d))


class Lookup(torch.autograd.Function):
    """A rival, one program a row."""

    @staticmethod
    def forward(ctx, weight, ids):
        ctx.save_for_backward(weight, ids)
        output = weight.new_empty(len(ids), weight.shape[1])
        copy_kernel[(len(ids),)](weight, ids, output, D=weight.shape[1], num_warps=1)
        assert torch.equal(output, weight[ids])
        return output

    @staticmethod
    def backward(ctx, grad_output):
        weight, ids = ctx.saved_tensors
        grad_weight = torch.zeros_like(weight)
        add_kernel[(len(ids),)](grad_output, ids, grad_weight, D=weight.shape[1], num_warps=1)
        assert grad_weight.sum() == grad_output.sum()
        return grad_weight, None


def test_a_rivals_kernels_run_on_the_same_ids(monkeypatch):
    module = ModuleType(count.LIGER)
    module.LigerEmbeddingFunction = Lookup
    monkeypatch.setitem(sys.modules, count.LIGER, module)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "9.9")
    case = CountedCase("embedding", 64, num_indices=100)
    (row,) = count.liger_rows(case)
    assert (row.kernel, row.provider) == ("copy_kernel", "liger-kernel 9.9")
    assert (row.load_sectors, row.store_sectors) == (900, row.ideal_store_sectors)
    (row,) = count.liger_rows(replace(case, operation="atomic"))
    assert (row.kernel, row.launches) == ("add_kernel", 1)
    assert (row.load_sectors, row.atomic_sectors) == (900, row.ideal_atomic_sectors)
    assert list(count.liger_rows(replace(case, operation="counts"))) == []
