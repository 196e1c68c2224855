"""What the Triton kernels compile to: access widths, atomics, barriers, spills. No GPU is needed."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from math import gcd
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from compiled import compiled_from_json
from filelock import FileLock

from gpu_embed.backends._plan.access import cdiv
from gpu_embed.backends._triton.launch import GATHER_ROWS
from gpu_embed.bench.candidates.launch import ONE_HOT
from gpu_embed.bench.codegen import table as codegen_table
from gpu_embed.bench.codegen.cases import CASES, FIRST_ROWS, Case
from gpu_embed.bench.codegen.compile import Compiled
from gpu_embed.bench.occupancy import TARGETS
from gpu_embed.row_update import STATE

pytestmark = [
    pytest.mark.skipif(find_spec(name) is None, reason=f"{name} is not installed")
    for name in ("triton", "rich")
]

TABLE = Path(__file__).resolve().parents[2] / "bench" / "codegen.csv"


class Launches(NamedTuple):
    """What the command printed for one architecture."""

    triton: str
    compiled: list[Compiled]
    failures: dict[str, str]  # by case


@pytest.fixture(scope="session", params=TARGETS, ids="sm_{}".format)
def architecture(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture(scope="session")
def launches(architecture: int, tmp_path_factory: pytest.TempPathFactory) -> Launches:
    """Every launch of every case, compiled.

    Of several workers the first to come compiles for all.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    file = folder / f"codegen-{architecture}.json"
    with FileLock(f"{file}.lock"):
        if not file.exists():
            file.write_text(json.dumps(compile_in_subprocess(architecture, folder / "triton")))
    printed, errors = json.loads(file.read_text())
    if not printed:
        errors = "\n".join(errors.splitlines()[-20:])
        pytest.fail(f"nothing was compiled:\n{errors}", pytrace=False)
    read = json.loads(printed)
    return Launches(
        read["triton"],
        [compiled_from_json(launch) for launch in read["launches"]],
        read["failures"],
    )


def compile_in_subprocess(architecture: int, cache: Path) -> tuple[str, str]:
    """This process may have triton's interpreter in place of its compiler."""
    env = {**os.environ, "TRITON_CACHE_DIR": str(cache)}
    env.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-m", "gpu_embed.bench", "codegen", "--json", "--arch", str(architecture)],
        env=env,
        capture_output=True,
        text=True,
        timeout=900,
    )
    return done.stdout, done.stderr


def each(condition: Callable[[Case], bool]) -> pytest.MarkDecorator:
    chosen = [case for case in CASES if condition(case)]
    assert chosen
    return pytest.mark.parametrize("case", chosen, ids=str)


def of_case(launches: Launches, case: Case) -> list[Compiled]:
    if str(case) in launches.failures:
        pytest.fail(f"did not compile: {launches.failures[str(case)]}", pytrace=False)
    return [launch for launch in launches.compiled if launch.case == str(case)]


def of_kernel(launches: Launches, kernel: str) -> list[Compiled]:
    return [launch for launch in launches.compiled if launch.kernel == kernel]


def gradient_of_case(launches: Launches, case: Case, kernel: str) -> list[Compiled]:
    """What a gradient launches, but for the sort of its ids."""
    found = [launch for launch in of_case(launches, case) if launch.kernel != "sort_keys_kernel"]
    assert {launch.kernel for launch in found} == {kernel}
    return found


def test_names_tell_the_cases_apart():
    assert len({str(case) for case in CASES}) == len(CASES)


def test_every_kernel_and_every_row_of_the_launch_tables_is_compiled(
    launches: Launches, architecture: int
):
    written = {
        name
        for package in ("gpu_embed.kernels", "gpu_embed.bench.candidates")
        for folder in find_spec(package).submodule_search_locations
        for file in Path(folder).glob("*.py")
        for name in re.findall(r"^def (\w+_kernel)\(", file.read_text(), re.M)
    }
    # Older cards have no bulk copy engine.
    missing = {name for name in written if "descriptor" in name and architecture < 90}
    assert {launch.kernel for launch in launches.compiled} == written - missing
    rows = {
        (launch.settings["BLOCK_N"], launch.settings["BLOCK_D"], launch.num_warps)
        for launch in launches.compiled
        if launch.kernel == "gather_rows_kernel"
    }
    assert rows == {(row.BLOCK_N, row.BLOCK_D, row.num_warps) for row in GATHER_ROWS.values()}
    one_hot = {launch.settings["BLOCK_V"] for launch in of_kernel(launches, "one_hot_kernel")}
    assert one_hot == set(ONE_HOT)


def test_all_ranks_share_a_binary(launches: Launches):
    cases = [case for case in CASES if case.embedding_dim == 128 and case.first_row in FIRST_ROWS]
    lookups = [case for case in cases if case.operation == "embedding"]
    assert [case.first_row for case in lookups] == list(FIRST_ROWS)
    assert len({of_case(launches, case)[0].binary for case in lookups}) == 1


@each(lambda case: case.first_row is not None and replace(case, first_row=None) in CASES)
def test_a_shard_moves_what_a_whole_table_moves(launches: Launches, case: Case):
    of_whole = of_case(launches, replace(case, first_row=None))
    for shard, whole in zip(of_case(launches, case), of_whole, strict=True):
        assert (shard.kernel, shard.settings) == (whole.kernel, whole.settings)
        assert accesses(shard) == accesses(whole)


def accesses(launch: Compiled) -> set[tuple[str, str, int]]:
    return {(i.operation, i.pointer, i.num_bytes) for i in launch.instructions}


# On sm_80 the assembler gives this one 80 registers, and keeps 8 bytes on the stack.
STACKED_IN_LOOP = {(80, "rowwise_adagrad-D768-bfloat16-lr_on_device")}


@each(lambda case: True)
def test_registers_hold_everything(launches: Launches, case: Case):
    for launch in of_case(launches, case):
        # A few masks that the walk needs again after its loop may wait on the stack meanwhile.
        walks = (
            "segment_sum_kernel",
            "row_update_kernel",
            "table_segment_sum_kernel",
            "table_row_update_kernel",
        )
        allowed = 16 if launch.kernel in walks else 0
        assert launch.spilled_bytes <= allowed, launch
        stacked = [i for i in launch.machine.instructions if i.operation == "local"]
        in_loop = any(i.in_loop for i in stacked)
        assert not in_loop or (launch.architecture, launch.case) in STACKED_IN_LOOP, launch


def test_machine_code_accesses_memory_as_ptx_says(launches: Launches):
    """The tests below read PTX, which knows the names of pointers."""
    for launch in launches.compiled:
        kinds = {i for i in launch.machine.instructions if i.operation != "local"}
        written = {i._replace(pointer="") for i in launch.instructions}
        # The assembler joins neighbouring accesses, reads the half of a number that is needed, takes steps out of a
        # loop, and drops a barrier of one warp, a shuffle of what all threads hold alike, or the key behind a single
        # one.
        changed = {access.operation for access in kinds - written}
        assert changed <= {access.operation for access in written}, launch
        dropped = {"shuffle", "barrier", *(["load"] if "-N1-" in launch.case else [])}
        assert {i.operation for i in written - kinds} <= dropped | changed, launch


def test_no_kernel_is_worse_than_the_committed_table(launches: Launches, architecture: int):
    committed = [row for row in codegen_table.read_table(TABLE) if row.sm == architecture]
    rows = codegen_table.table_rows(launches.compiled, launches.triton)
    if problems := codegen_table.worse(committed, rows):
        verdict = codegen_table.verdict(committed, rows, problems)
        pytest.fail("\n".join(verdict), pytrace=False)


@each(lambda case: case.operation == "embedding")
def test_gather_moves_the_widest_words_that_rows_allow(launches: Launches, case: Case):
    (launch,) = of_case(launches, case)
    width = case.access_bytes(case.dtype.itemsize)
    assert launch.widths("load", "weight_ptr") == {width}
    if case.transposed:
        # The output's rows are contiguous all the same.
        assert min(launch.widths("store", "output_ptr")) >= width
    else:
        assert launch.widths("store", "output_ptr") == {width}


@each(lambda case: case.operation == "embedding")
def test_nothing_loads_the_record(launches: Launches, case: Case):
    """Bounds: a lookup of good ids costs no access to the record that the GPU would wait for."""
    (launch,) = of_case(launches, case)
    operations = {
        i.operation for i in launch.instructions if i.pointer in ("record_ptr", "flag_ptr")
    }
    assert operations == ({"exchange", "store"} if case.record else set())


@each(lambda case: case.operation == "atomic")
def test_atomics_are_vectors_where_the_card_has_them(
    launches: Launches, architecture: int, case: Case
):
    (launch,) = gradient_of_case(launches, case, "scatter_add_kernel")
    items, itemsize = case.gradient_vector, case.gradient_itemsize
    assert launch.widths("load", "grad_output_ptr") == {items * case.dtype.itemsize}
    added = launch.widths("add", "grad_weight_ptr")
    # fp32 only, and from sm_90 on.
    if case.dtype == torch.float64 or architecture < 90:
        assert added == {itemsize}
    elif case.transposed:
        assert min(added) >= itemsize
    else:
        assert added == {items * itemsize}


def walk_and_joins(found: list[Compiled]) -> tuple[Compiled, list[Compiled]]:
    """A sum's first launch, and its second one unless the keys are one chunk."""
    walk, *joins = found
    assert [launch.settings["JOIN"] for launch in found] == [False, *[True] * len(joins)]
    assert len(joins) <= 1
    return walk, joins


@each(lambda case: case.operation == "sorted")
def test_segment_sum_loads_and_stores_whole_vectors(launches: Launches, case: Case):
    items, itemsize = case.gradient_vector, case.gradient_itemsize
    acc_itemsize = max(itemsize, 4)
    walk, joins = walk_and_joins(gradient_of_case(launches, case, "segment_sum_kernel"))
    assert walk.widths("load", "values_ptr") == {items * case.dtype.itemsize}
    assert walk.widths("load", "grad_weight_ptr") == ({items * itemsize} if case.into else set())
    assert walk.widths("store", "grad_weight_ptr") == {items * itemsize}
    assert walk.widths("store", "carry_in_ptr") == {min(16, items * acc_itemsize)}
    for join in joins:
        carries = {gcd(16, case.embedding_dim * acc_itemsize)}
        assert join.widths("load", "carry_in_ptr") == carries
        assert join.widths("load", "carry_out_ptr") == carries


@each(lambda case: case.operation in ("sorted", "sorted_atomic"))
def test_keys_and_places_are_loaded_once_a_warp(launches: Launches, case: Case):
    """In the loop over the keys: a key, the next one and the place; rows then come without a load of their own."""
    walk, _ = walk_and_joins(gradient_of_case(launches, case, "segment_sum_kernel"))
    loads = [i.pointer for i in walk.instructions if i.operation == "load" and i.in_loop]
    keys_a_lane = max(walk.settings["UNROLL"] * walk.settings["BLOCK_C"] // 32, 1)
    assert 0 < loads.count("keys_ptr") <= 2 * keys_a_lane
    assert loads.count("order_ptr") <= keys_a_lane


@each(lambda case: case.operation in ("sorted", "sorted_atomic"))
def test_lanes_of_segment_sum_exchange_keys_alone(launches: Launches, case: Case):
    """Of the tile itself each lane has all rows of its columns."""
    for launch in gradient_of_case(launches, case, "segment_sum_kernel"):
        assert launch.num_warps == 1
        if launch.settings["BLOCK_C"] == 1 and not case.scale_grad_by_freq:
            assert launch.shared_bytes <= 8 * 2 * launch.settings["UNROLL"]


def formula_of(case: Case) -> str:
    """Of an update, of one table or of many; other operations have other names."""
    return case.operation.removeprefix("table_")


def updates_of_case(launches: Launches, case: Case) -> list[Compiled]:
    kernel = "table_row_update_kernel" if case.dims else "row_update_kernel"
    return [launch for launch in of_case(launches, case) if launch.kernel == kernel]


@each(lambda case: formula_of(case) in STATE and case.embedding_dim < 5000)
def test_updates_move_whole_vectors(launches: Launches, case: Case):
    """Of 16 bytes, or as few as the narrower of weight and gradient, and the rows' alignment, allow."""
    acc_itemsize = max(case.dtype.itemsize, 4)
    # The state's and the partial sums' rows are contiguous, but an access has as many columns of each.
    items = min(case.access_bytes(case.dtype.itemsize) // case.dtype.itemsize, 16 // acc_itemsize)
    items = gcd(items, case.embedding_dim)
    walk, joins = walk_and_joins(updates_of_case(launches, case))
    for launch in (walk, *joins):
        expected = {
            ("load", "values_ptr"): items * case.dtype.itemsize,
            ("load", "weight_ptr"): items * case.dtype.itemsize,
            ("store", "weight_ptr"): items * case.dtype.itemsize,
        }
        for layout, pointer in zip(
            STATE[formula_of(case)], ("state_ptr", "second_state_ptr"), strict=False
        ):
            width = acc_itemsize if layout.per_row else items * acc_itemsize
            expected |= {("load", pointer): width, ("store", pointer): width}
        for access, width in expected.items():
            # A row over several warps may move in wider vectors yet.
            wider = launch.num_warps > 1 or launch.settings["JOIN"]
            assert launch.widths(*access) <= {width, 16 if wider else width}, access


@each(lambda case: formula_of(case) in STATE and formula_of(case) != "rowwise_adagrad")
def test_updates_exchange_keys_alone(launches: Launches, case: Case):
    """Four neighbours of a row share a block of random words, so they must lie in one thread."""
    for launch in updates_of_case(launches, case):
        if launch.settings["BLOCK_C"] == 1:
            assert launch.shared_bytes <= 8 * 2 * launch.settings["UNROLL"]


@each(
    lambda case: case.operation == "renorm" and case.embedding_dim % 16 == 0 and not case.transposed
)
def test_renorm_moves_whole_vectors(launches: Launches, case: Case):
    _, launch = of_case(launches, case)
    assert launch.widths("load", "row_ptr") == {16}
    assert launch.widths("store", "row_ptr") == {16}


def table_launch(launches: Launches, case: Case, kernel: str) -> Compiled:
    """The launch of a kernel, the first if there are several."""
    return next(launch for launch in of_case(launches, case) if launch.kernel == kernel)


@each(lambda case: case.operation in ("table_bag", "table_max", "table_rows"))
def test_batched_tables_are_read_in_the_widest_vectors_that_all_allow(
    launches: Launches, case: Case
):
    """One launch for all tables; the threads of bags exchange nothing in their loop, and wait at no barrier."""
    found = of_case(launches, case)
    pooled = case.operation != "table_rows"
    kernel = "table_bag_kernel" if pooled else "table_gather_kernel"
    launch = table_launch(launches, case, kernel)
    is_split = launch.settings.get("SPLIT", False)
    assert len(found) == 1 + is_split
    itemsize = case.dtype.itemsize
    width = case.access_bytes(itemsize)
    assert launch.widths("load", "weight_ptr") == {width}
    items = width // itemsize
    stored = items * (max(itemsize, 4) if is_split else itemsize)
    assert launch.widths("store", "output_ptr") == {min(16, stored)}
    if pooled:
        exchanges = [
            i for i in launch.instructions if i.operation in ("barrier", "shared", "shuffle")
        ]
        assert not any(i.in_loop or i.operation == "barrier" for i in exchanges)


@each(lambda case: case.operation in ("table_bag", "table_max", "table_rows"))
def test_batched_tables_load_no_record(launches: Launches, case: Case):
    """Bounds: a lookup of good ids costs no access to the record that the GPU would wait for."""
    launch = of_case(launches, case)[0]
    operations = {
        i.operation for i in launch.instructions if i.pointer in ("record_ptr", "flag_ptr")
    }
    assert operations == ({"exchange", "store"} if case.record else set())


@each(lambda case: case.operation == "table_atomic")
def test_gradients_of_batched_tables_are_added_as_vectors(
    launches: Launches, architecture: int, case: Case
):
    (launch,) = of_case(launches, case)
    items, itemsize = case.gradient_vector, case.gradient_itemsize
    assert launch.widths("load", "grad_output_ptr") == {items * case.dtype.itemsize}
    # Of a maximum a thread adds those of its elements that have won.
    vectors = itemsize == 4 and architecture >= 90 and not case.max
    assert launch.widths("add", "grad_weight_ptr") == {items * itemsize if vectors else itemsize}
    assert launch.shared_bytes == 0


@each(lambda case: case.operation == "table_sorted" and len(set(case.dims)) > 1)
def test_runs_of_tables_of_different_widths_move_as_whole_vectors(launches: Launches, case: Case):
    kernel = "table_segment_sum_kernel"
    walk, _ = walk_and_joins([one for one in of_case(launches, case) if one.kernel == kernel])
    # Of a maximum's columns a lane has as many as it holds positions.
    items = min(case.gradient_vector, 4) if case.max else case.gradient_vector
    width = items * case.gradient_itemsize
    assert walk.widths("load", "values_ptr") == {items * case.dtype.itemsize}
    assert walk.widths("load", "grad_weight_ptr") == ({width} if case.into else set())
    assert walk.widths("store", "grad_weight_ptr") == {width}


# A bulk copy takes so many words at once.
MAX_COPY = 256


def copies(launch: Compiled, operation: str, in_loop: bool = False) -> int:
    return sum((i.operation, i.in_loop) == (operation, in_loop) for i in launch.instructions)


@each(lambda case: case.operation == "embedding_descriptor")
def test_rows_are_copied_in_bulk_and_several_are_in_flight(launches: Launches, case: Case):
    for launch in of_case(launches, case):
        assert launch.widths("load", "weight_desc") == set()
        assert launch.widths("store", "output_desc") == set()
        a_row = cdiv(launch.settings["BLOCK_D"], MAX_COPY)
        if launch.settings["ROWS"] == 1:
            assert copies(launch, "bulk load") == copies(launch, "bulk store") == a_row
            continue
        # As many as are in flight are loaded before the loop, and in it one for each that is stored.
        assert copies(launch, "bulk load") == (launch.settings["STAGES"] - 1) * a_row
        assert copies(launch, "bulk load", in_loop=True) == a_row
        assert copies(launch, "bulk store", in_loop=True) == a_row


@each(lambda case: case.operation == "descriptor")
def test_rows_are_added_in_bulk(launches: Launches, case: Case):
    for launch in of_case(launches, case):
        assert copies(launch, "bulk add") == launch.settings["ROWS"]
        assert not any(i.operation == "add" or i.in_loop for i in launch.instructions)
        rows = min(case.access_bytes(4), max(4, 4 * launch.settings["BLOCK_D"] // 32))
        assert launch.widths("load", "grad_output_ptr") == {rows}


@each(lambda case: case.operation == "sorted_atomic")
def test_ends_of_chunks_are_added_and_the_rest_is_stored(
    launches: Launches, architecture: int, case: Case
):
    (launch,) = gradient_of_case(launches, case, "segment_sum_kernel")
    width = case.access_bytes(case.dtype.itemsize)
    assert launch.widths("load", "values_ptr") == {width}
    assert launch.widths("store", "grad_weight_ptr") == {width}
    vectors = case.dtype == torch.float32 and architecture >= 90
    assert launch.widths("add", "grad_weight_ptr") == {width if vectors else case.dtype.itemsize}
    assert not any(i.in_loop for i in launch.instructions if i.operation == "add")


@each(lambda case: case.operation == "one_hot")
def test_one_hot_products_store_once_for_each_split(launches: Launches, case: Case):
    product, total = of_case(launches, case)
    assert (product.kernel, total.kernel) == ("one_hot_kernel", "sum_splits_kernel")
    stores = [i for i in product.instructions if i.operation == "store"]
    assert {i.pointer for i in stores} == {"partial_ptr"}
    assert not any(i.in_loop for i in stores)
    assert any(i.in_loop for i in product.instructions if i.pointer == "grad_output_ptr")
    assert not any(i.in_loop for i in total.instructions)


WALKS_BAGS = ("bag_sum", "bag_mean", "bag_max")


@each(lambda case: case.operation in WALKS_BAGS)
def test_bags_are_read_in_whole_vectors(launches: Launches, case: Case):
    walk, *rest = of_case(launches, case)
    assert walk.kernel == ("bag_max_kernel" if case.operation == "bag_max" else "bag_sum_kernel")
    assert walk.widths("load", "weight_ptr") == {case.access_bytes(case.dtype.itemsize)}
    if rest:
        # The parts' sums are fp32; a thread stores what it has loaded in as few accesses as there can be.
        assert [launch.kernel for launch in rest] == ["bag_join_kernel"]
        item = max(case.dtype.itemsize, 4)
        assert walk.widths("store", "partial_ptr") == {case.access_bytes(item)}
    if not case.transposed:
        assert walk.widths("store", "output_ptr") == {case.access_bytes(case.dtype.itemsize)}


@each(lambda case: case.operation in WALKS_BAGS)
def test_bags_are_walked_alone_and_each_id_is_loaded_once(launches: Launches, case: Case):
    walk = of_case(launches, case)[0]
    assert walk.num_warps == 1
    in_loop = [i for i in walk.instructions if i.in_loop or case.num_indices == 1]
    assert not [i for i in in_loop if i.operation in ("barrier", "shared", "shuffle")]
    rows = [i for i in in_loop if (i.operation, i.pointer) == ("load", "weight_ptr")]
    ids = [i for i in in_loop if (i.operation, i.pointer) == ("load", "indices_ptr")]
    assert len(rows) == walk.settings["UNROLL"]
    # One more, side by side, where ids are counted or checked before.
    assert len(ids) == len(rows) + (case.record or case.operation == "bag_mean")


@each(lambda case: case.operation in WALKS_BAGS)
def test_nothing_loads_the_record_of_bags(launches: Launches, case: Case):
    """Bounds: bags of good ids cost no access to the record that the GPU would wait for."""
    operations = {
        i.operation
        for i in of_case(launches, case)[0].instructions
        if i.pointer in ("record_ptr", "flag_ptr")
    }
    assert operations == ({"exchange", "store"} if case.record else set())


@each(lambda case: case.operation in ("bag_atomic", "bag_sorted"))
def test_gradients_of_bags_move_what_those_of_lookups_move(launches: Launches, case: Case):
    found = [launch for launch in of_case(launches, case) if launch.kernel != "sort_keys_kernel"]
    kernel, pointer = {
        "bag_atomic": ("scatter_add_kernel", "grad_output_ptr"),
        "bag_sorted": ("segment_sum_kernel", "values_ptr"),
    }[case.operation]
    assert [launch.kernel for launch in found[:2]] == ["bag_of_kernel", kernel]
    assert {launch.kernel for launch in found[2:]} <= {kernel}
    assert found[1].widths("load", pointer) == {case.gradient_vector * case.dtype.itemsize}
    assert found[1].widths("load", "bag_of_ptr") == {4}
    assert bool(found[1].widths("load", "sizes_ptr")) == case.mean
    assert bool(found[1].widths("load", "per_sample_weights_ptr")) == case.per_sample_weights


@each(lambda case: case.operation == "take" and not case.transposed)
def test_taken_rows_move_in_whole_vectors(launches: Launches, case: Case):
    """One launch; the narrower of the table and the output says how many items an access moves."""
    (launch,) = of_case(launches, case)
    itemsize, output_itemsize = case.dtype.itemsize, (case.output_dtype or case.dtype).itemsize
    items = min(case.access_bytes(itemsize) // itemsize, 16 // output_itemsize)
    assert launch.widths("load", "weight_ptr") == {items * itemsize}
    assert launch.widths("store", "output_ptr") == {items * output_itemsize}
    # Ids in their own dtype; those of neighbouring lanes may be joined.
    assert min(launch.widths("load", "indices_ptr")) >= case.index_dtype.itemsize


@each(lambda case: case.operation.startswith("dequantize"))
def test_quantized_rows_are_loaded_as_bytes_and_stored_as_vectors(launches: Launches, case: Case):
    (launch,) = of_case(launches, case)
    bits = 4 if case.operation.endswith("int4") else 8
    itemsize = (case.output_dtype or case.dtype).itemsize
    items = gcd(16 // itemsize, case.embedding_dim, case.group_size or case.embedding_dim)
    loaded = launch.widths("load", "values_ptr")
    # Neighbouring lanes' vectors may be joined, and never cut.
    assert min(loaded) >= max(items * bits // 8, 1)
    assert launch.widths("store", "output_ptr") == {items * itemsize}
    assert launch.widths("load", "scale_ptr") == {case.dtype.itemsize}
    assert launch.widths("load", "zero_ptr") == ({1} if case.group_size else set())


@each(lambda case: case.operation.startswith("fused"))
def test_fused_rows_are_loaded_as_bytes_and_stored_as_vectors(launches: Launches, case: Case):
    (launch,) = of_case(launches, case)
    bits = 4 if case.operation.endswith("int4") else 8
    itemsize = (case.output_dtype or case.dtype).itemsize
    # Whole groups lie side by side, and rows of them.
    items = gcd(16 // itemsize, case.embedding_dim, case.group_size or case.embedding_dim)
    assert min(launch.widths("load", "values_ptr")) >= max(items * bits // 8, 1)
    assert launch.widths("store", "output_ptr") == {items * itemsize}
    # The scale, and behind it the offset.
    assert launch.widths("load", "scale_ptr") == {case.dtype.itemsize}
    assert launch.widths("load", "zero_ptr") == set()


@each(lambda case: case.operation == "take" or case.operation.startswith(("dequantize", "fused")))
def test_taken_rows_load_no_record(launches: Launches, case: Case):
    """Bounds: a lookup of good ids costs no access to the record that the GPU would wait for."""
    (launch,) = of_case(launches, case)
    operations = {
        i.operation for i in launch.instructions if i.pointer in ("record_ptr", "flag_ptr")
    }
    assert operations == ({"exchange", "store"} if case.record else set())


@each(lambda case: case.operation == "bag_sample_weights")
def test_gradients_of_sample_weights_read_whole_vectors(launches: Launches, case: Case):
    _, launch = of_case(launches, case)
    width = case.access_bytes(case.dtype.itemsize)
    assert launch.widths("load", "weight_ptr") == {width}
    assert launch.widths("load", "grad_output_ptr") == {width}
