"""What the kernels move: the ideal, the table and the command; and today's kernels against the committed table."""

import importlib.metadata
import re
import sys
from dataclasses import replace
from math import gcd
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
    FP32,
    CountedCase,
    Ideal,
    array_sectors,
    ideals,
    row_sectors,
)

TABLE = Path(__file__).resolve().parents[2] / "bench" / "traffic.csv"
# Of the default tier: little to compile, and each of the three kinds of access.
SLICE = ("counts-D64-float32", "embedding-D64-float32", "atomic-D50-float32")
needs_nvrtc = pytest.mark.skipif(count.no_nvrtc() is not None, reason="no NVRTC")

# What the kernels keep to in every row of the table, by what their names begin with.
# Sectors of all kinds against the ideal, in Triton; and never more than a rival in the same case. A request of 32 words
# of 2 or 4 bytes ends within a row and a sector, which the next request touches again, so there it may have one more.
MOST_OF_IDEAL = {"gather": 1.06, "scatter_add": 1.06}
CUT_WORDS = (2, 4)
# Of a sorted sum that is added to distinct rows. Where these have as few bytes as this one's, 100, what the join reads
# of the keys shows.
MOST_IN_PLACE = {"sorted-D50-bfloat16-into_bfloat16-distinct": 1.07}
IDEAL_STORES = ("gather", "take", "sort_keys", "bag_of", "table_gather", "table_bag", "table_keys")
# Instructions of a join with no bag to join, against the sum before it.
MOST_OF_SUM = 0.1


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
        # Added to rows of 20 bytes; rows of 10 bytes, in their order, lie in 1 + 2 + 1 + 1.
        ("atomic", {"dtype": BF16, "into": FP32}, {"scatter_add": Ideal(1 + 2, 0, 7, 40)}),
        (
            "sorted",
            {"dtype": BF16, "into": FP32},
            {"segment_sum": Ideal(1 + 1 + 5 + 5, 5, 0, 40), "sort_keys": Ideal(1, 1, 0, 32)},
        ),
        (
            "adam",
            {},
            {"row_update": Ideal(8 + 5 + 10, 5 + 10, 0, 80), "sort_keys": Ideal(1, 1, 0, 32)},
        ),
        (
            "rowwise_adagrad",
            {},
            {
                "row_update": Ideal(8 + 5 + 3, 5 + 3, 0, 80),
                "sort_keys": Ideal(1, 1, 0, 32),
                "segment_sum": Ideal(8, 0, 0, 80),
                "rowwise_adagrad": Ideal(5 + 3, 5 + 3, 0, 80),
            },
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


# Two tables of 300 rows, 5 and 9 fp32 columns, two bags each with one id: 0, 3 and 3, 1. The first table takes 1500
# elements, the next begins after 4 more, at a sector. Sectors of rows: 1 + 2 of 20 bytes, 2 + 2 of 36. Rows of the
# output have 56 bytes; bag 0's columns are bytes 0 to 20 and 20 to 56, bag 1's 56 to 76 and 76 to 112: 1 + 2 + 2 + 2
# sectors. Arrays: ids 1, offsets 2, fields 4, tables of columns 2, sorted keys 1, their order 1. Found by number, one
# each: the bags of four positions, and the three offsets at which a table's ids begin or end.
TABLES = {"num_bags": 2, "dims": (5, 9), "num_indices": 4, "num_embeddings": 300}


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        ("table_bag", {"table_bag": Ideal(1 + 2 + 4 + 2 + 7, 4, 0, 112)}),
        ("table_atomic", {"table_scatter_add": Ideal(1 + 2 + 4 + 2 + 4, 0, 7, 112)}),
        (
            "table_sorted",
            {
                "table_segment_sum": Ideal(1 + 1 + 4 + 7 + 4, 7, 0, 112),
                "table_keys": Ideal(1 + 3 + 4 + 2, 2, 0, 32),
            },
        ),
    ],
)
def test_the_ideal_of_tables_by_hand(operation, expected):
    assert ideals(SmallCase(operation, 9, **TABLES)) == expected


def test_the_ideal_of_rows_of_tables_by_hand():
    case = replace(SmallCase("table_rows", 5, **TABLES), dims=(5, 5))
    # Rows 0 and 3 of the first table, 1 + 2 sectors; rows 303 and 301 of the buffer, from bytes 6060 and 6020, 1 + 1.
    assert ideals(case) == {"table_gather": Ideal(1 + 3 + 4 + 5, 3, 0, 80)}


def test_half_of_the_ids_are_hot():
    ids = CountedCase("atomic", 8, hot=0.5).ids()
    assert 450 < int((ids == 0).sum()) < 574
    others = ids != 0
    assert torch.equal(ids[others], CountedCase("atomic", 8).ids()[others])


@needs_nvrtc
def test_every_kernel_of_both_backends_has_an_ideal():
    """All but the join."""
    small = {"num_indices": 32, "num_embeddings": 64, "num_bags": 2}
    by_operation = {case.operation: case for case in CASES}
    for operation in ("rowwise_adagrad", "table_sorted", "bag_atomic"):
        rows = list(count.own_rows(replace(by_operation[operation], **small)))
        assert {row.provider for row in rows} == set(traffic_table.OWN)
        assert all(row.ideal_load_sectors > 0 for row in rows), rows
        assert {row.compiler.split()[0] for row in rows} == {"triton", "nvrtc"}


def test_kernels_are_named_as_in_their_source():
    assert (
        count.kernel_name("_Z18gather_flat_kernelI6VectorIjLi4EELi4EEvPKT_") == "gather_flat_kernel"
    )
    assert count.kernel_name("counts_kernel") == "counts_kernel"


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
ROW = traffic_table.make_row(
    "gather_kernel",
    traffic_table.TRITON,
    "embedding-D64",
    [COUNTS, COUNTS],
    Ideal(36, 80, 4, 2560),
    "triton 3.7.1",
)


def test_launches_of_a_kernel_are_added_up():
    assert (ROW.launches, ROW.load_sectors, ROW.store_sectors, ROW.atomic_sectors) == (2, 40, 80, 4)
    assert (ROW.load_requests, ROW.store_requests, ROW.atomic_requests) == (20, 10, 2)
    assert (ROW.shared_requests, ROW.shared_wavefronts, ROW.barriers) == (8, 12, 16)
    assert (ROW.instructions, ROW.instructions_a_512_bytes, ROW.longest_path) == (2000, 400, 260)
    # One after another, so they never meet.
    assert ROW.hottest_sector == 3
    alone = traffic_table.make_row(
        "bag_join_kernel", "gpu_embed", "bag_sum-D64", [COUNTS], None, ""
    )
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
    assert problem.startswith("gather_kernel (gpu_embed) embedding-D64: ")
    assert name.replace("_", " ") in problem
    assert traffic_table.worse([more], [ROW]) == []
    # Another compiler, and another's kernel.
    other = replace(more, compiler="triton 3.6.0")
    assert len(traffic_table.worse([ROW], [other])) == (name in traffic_table.SECTORS)
    rival = {"provider": "liger-kernel 1"}
    assert traffic_table.worse([replace(ROW, **rival)], [replace(more, **rival)]) == []


def test_rows_that_one_side_lacks_are_named():
    assert traffic_table.worse([ROW], [replace(ROW, config="new")]) == [
        "gather_kernel (gpu_embed) new: the table lacks it",
        "gather_kernel (gpu_embed) embedding-D64: nothing launches it",
    ]


def committed():
    return traffic_table.read_table(TABLE)


def test_the_committed_table_is_whole_and_of_the_pinned_compilers():
    """Another version's table would compare little in CI."""
    rows = committed()
    pins = (TABLE.parents[1] / "constraints.txt").read_text()
    for compiler in {row.compiler for row in rows}:
        name, version = compiler.split()
        package = {"triton": "triton", "nvrtc": "nvidia-cuda-nvrtc-cu12"}[name]
        assert f"\n{package}=={version}" in pins
    keys = [row.key for row in rows]
    assert keys == sorted(set(keys))
    for provider in traffic_table.OWN:
        assert {row.config for row in rows if row.provider == provider} == {str(c) for c in CASES}
    rivals = {row.config for row in rows if row.provider not in traffic_table.OWN}
    assert rivals == {str(case) for case in CASES if count.liger_has(case)}


def of_kernel(stem, *providers):
    return [row for row in committed() if row.kernel.startswith(stem) and row.provider in providers]


def total(row):
    return sum(getattr(row, name) for name in traffic_table.SECTORS)


def cut_sectors(row):
    """What the cuts of rows between requests add at most."""
    dim, dtype = re.search(r"-D(\d+)-(\w+)", row.config).groups()
    word = gcd(16, int(dim) * getattr(torch, dtype).itemsize)
    # A request of 32 words writes `word` sectors.
    written = row.ideal_store_sectors + row.ideal_atomic_sectors
    return written // word if word in CUT_WORDS else 0


@pytest.mark.parametrize(("stem", "most"), MOST_OF_IDEAL.items())
def test_rows_move_hardly_more_than_the_ideal_and_no_more_than_a_rivals(stem, most):
    rivals = {row.config: row for row in committed() if row.provider not in traffic_table.OWN}
    rows = of_kernel(stem, traffic_table.TRITON)
    problems = []
    for row in rows:
        ideal = sum(getattr(row, f"ideal_{name}") for name in traffic_table.SECTORS)
        if total(row) > most * ideal + cut_sectors(row):
            problems.append(f"{row.key}: {total(row) / ideal:.3f} of the ideal")
        rival = rivals.get(row.config)
        if rival is not None and total(row) > total(rival):
            problems.append(f"{row.key}: {total(row)} sectors, {rival.provider} {total(rival)}")
    assert rows
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("stem", IDEAL_STORES)
def test_each_sector_is_stored_once(stem):
    rows = of_kernel(stem, *traffic_table.OWN)
    problems = [
        f"{row.key}: {row.store_sectors} sectors stored, ideal {row.ideal_store_sectors}"
        for row in rows
        if row.store_sectors != row.ideal_store_sectors
    ]
    assert rows
    assert not problems, "\n".join(problems)


def test_a_gradient_in_place_reads_and_writes_its_rows_once():
    """Values are read, rows of the gradient read and written; a store elsewhere would show in the number of sectors."""
    rows = [
        row
        for row in of_kernel("segment_sum", traffic_table.TRITON)
        if "-into_" in row.config and "-distinct" in row.config
    ]
    problems = []
    for row in rows:
        ideal = row.ideal_load_sectors + row.ideal_store_sectors
        if total(row) > MOST_IN_PLACE.get(row.config, 1.06) * ideal:
            problems.append(f"{row.key}: {total(row) / ideal:.3f} of the ideal")
        if row.store_sectors != row.ideal_store_sectors:
            problems.append(f"{row.key}: {row.store_sectors} stored of {row.ideal_store_sectors}")
    assert rows
    assert not problems, "\n".join(problems)


def test_a_sum_in_place_reads_the_rows_that_it_writes_and_no_more():
    """Against the same sum into a new gradient, wherever its requests cut rows."""
    sums = {(row.provider, row.config): row for row in of_kernel("segment_sum", *traffic_table.OWN)}
    problems, seen = [], set()
    for (provider, config), row in sums.items():
        found = re.fullmatch(r"(.*-D\d+-(\w+)(-dims\w+)?)-into_\2", config)
        if found is None:
            continue
        seen.add(provider)
        new = sums[provider, found[1]]
        if row.load_sectors > new.load_sectors + new.store_sectors:
            problems.append(f"{row.key}: {row.load_sectors - new.load_sectors} more loaded")
        if row.store_sectors != new.store_sectors:
            problems.append(f"{row.key}: {row.store_sectors} stored, was {new.store_sectors}")
    assert seen == set(traffic_table.OWN)
    assert not problems, "\n".join(problems)


def test_a_join_with_nothing_to_join_is_short():
    sums = of_kernel("bag_sum", *traffic_table.OWN)
    most = {(row.config, row.provider): MOST_OF_SUM * row.instructions for row in sums}
    joins = of_kernel("bag_join", *traffic_table.OWN)
    problems = [
        f"{row.key}: {row.instructions} instructions"
        for row in joins
        if not row.store_sectors and row.instructions > most[row.config, row.provider]
    ]
    assert {bool(row.store_sectors) for row in joins} == {True, False}
    assert not problems, "\n".join(problems)


@needs_nvrtc
def test_the_command_counts_a_slice_and_nothing_is_worse(capsys):
    assert cli.main(["traffic", "--config", *SLICE, "--check", str(TABLE)]) == 0
    printed = capsys.readouterr()
    assert "rows is worse" in printed.err
    for name in ("counts_kernel", "scatter_add_kernel"):
        for provider in traffic_table.OWN:
            assert f"{name} ({provider})" in printed.out
    assert "embedding-D64-float32-N1001" in printed.out


@needs_nvrtc
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
    monkeypatch.setattr(count, "no_nvrtc", lambda: None)
    return found


def test_a_check_says_what_is_worse_and_what_to_do(one_case, capsys, tmp_path):
    path = str(tmp_path / "table.csv")
    assert cli.main(["traffic", "--out", path]) == 0
    assert cli.main(["traffic", "--check", path]) == 0
    one_case.rows = [replace(ROW, store_sectors=81)]
    capsys.readouterr()
    assert cli.main(["traffic", "--check", path]) == 1
    said = capsys.readouterr().err
    row = "gather_kernel (gpu_embed) embedding-D64-float32"
    assert f"{row}: 81 store sectors, was 80, ideal 80" in said
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
        ("--check BINARY", "can't decode"),
        ("--out FOLDER", "is a folder: name a file"),
        ("--out README", "the columns are not those of traffic"),
    ],
)
def test_what_the_command_cannot_do_is_said_in_a_sentence(
    one_case, capsys, monkeypatch, tmp_path, arguments, said
):
    monkeypatch.setattr(count, "has_liger", lambda: False)
    monkeypatch.setattr(count, "own_rows", lambda case: pytest.fail("it counts before it says so"))
    (tmp_path / "README").write_text("a,b\n")
    (tmp_path / "BINARY").write_bytes(b"\xed\x00\n")
    (tmp_path / "FOLDER").mkdir()
    arguments = re.sub("[A-Z]{6}", lambda name: str(tmp_path / name[0]), arguments)
    assert cli.main(["traffic", *arguments.split()]) == 2
    printed = capsys.readouterr().err
    assert said in printed
    assert printed.count("\n") == 1


def test_without_nvrtc_the_command_says_so(one_case, capsys, monkeypatch):
    monkeypatch.setattr(count, "no_nvrtc", lambda: "cupy is not installed")
    assert cli.main(["traffic"]) == 2
    assert "traffic compiles CUDA C++ kernels: cupy is not installed" in capsys.readouterr().err


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
