"""The benchmark's instrument: gate, clocks, byte formulas, rows."""

import csv
import dataclasses
import os

import pytest
import torch
import torch.nn.functional as F

import gpu_embed
from gpu_embed.bench import byte_floor, check, host_time, measure, providers, run, timing
from gpu_embed.bench.providers import PROVIDERS, Layer, Provider
from gpu_embed.bench.results import (
    COLUMNS,
    NotWrittenError,
    ResultsError,
    Row,
    RowWriter,
    read_header,
    read_rows,
    write_header,
)
from gpu_embed.bench.shapes import MODES, SETS, Cell, varied

CPU = torch.device("cpu")
QUICK = timing.Effort(seconds=0.002, min_samples=3, max_samples=4, host_seconds=0.002)
FACTS = {"device": "a CPU", "torch": "2", "triton": "3", "commit": "abc"}
CELL = Cell(50, 8, 40)
CELLS = (CELL, Cell(60, 8, 40))


@pytest.fixture
def bench(monkeypatch):
    # The cold samples have a test of their own.
    monkeypatch.setattr(timing, "flush", lambda device: None)
    return measure.Bench(CPU, 10.0, FACTS, 2**30, effort=QUICK)


def measured(bench, provider, cell=CELL, mode="forward"):
    row = bench.row("A", cell, mode, provider.name)
    return bench.measure(bench.problem(cell), provider, mode, row)


def fake(lookup, **options):
    """A provider whose lookup is lookup(weight, ids, padding_idx)."""

    def build(weight, cell, mode):
        return Layer(lambda ids: lookup(weight, ids, cell.padding_idx), weight)

    return Provider("fake", "a fake", build, cpu=True, **options)


def looked_up(weight, ids, padding_idx):
    return F.embedding(ids, weight, padding_idx)


# The gate.


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padding", [0, 0.3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("name", ["gpu_embed", "torch", "index_add_"])
def test_right_results_are_timed(bench, name, dtype, padding, mode):
    provider, cell = PROVIDERS[name], Cell(50, 8, 40, dtype, "int32", padding=padding)
    if mode not in provider.modes or not cell.has(mode):
        return
    row = measured(bench, provider, cell, mode)
    assert row.status == "ok", row
    assert 0 < row.ms_p20 <= row.ms_p50 <= row.ms_p80
    assert row.cold_ms_p50 > 0
    assert row.host_us > 0
    assert row.percent_of_copy == pytest.approx(row.gbps_dram * 10)
    assert row.match


@pytest.mark.parametrize("name", ["gpu_embed-sparse", "torch-sparse"])
def test_sparse_steps_are_timed(bench, name):
    row = measured(bench, PROVIDERS[name], mode="step")
    assert (row.status, row.note) == ("ok", "")


def nudged_forward(weight, ids, padding_idx):
    return looked_up(weight, ids, padding_idx) * (1 + 2**-20)


class NudgedGradient(torch.autograd.Function):
    """A lookup whose gradient lacks one part in a thousand."""

    @staticmethod
    def forward(ctx, weight, ids, padding_idx):
        ctx.save_for_backward(ids)
        ctx.rows = len(weight)
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx, grad):
        (ids,) = ctx.saved_tensors
        return grad.new_zeros(ctx.rows, grad.shape[1]).index_add_(0, ids, 0.999 * grad), None, None


WRONG = {
    "forward": (nudged_forward, "is not weight[ids]"),
    "backward": (NudgedGradient.apply, "of the summed magnitudes"),
    "full": (NudgedGradient.apply, "of the summed magnitudes"),
    "accumulate": (NudgedGradient.apply, "of the summed magnitudes"),
    "step": (NudgedGradient.apply, "times the bound"),
}


@pytest.mark.parametrize("mode", WRONG)
def test_wrong_results_have_no_time(bench, mode):
    lookup, message = WRONG[mode]
    row = measured(bench, fake(lookup), mode=mode)
    assert row.status == "wrong"
    assert message in row.match
    timed = ("ms_p20", "ms_p50", "ms_p80", "cold_ms_p50", "gbps_dram", "gbps_logical", "host_us")
    assert [getattr(row, name) for name in timed] == [None] * len(timed)


@pytest.mark.parametrize(
    ("dtype", "mode", "shown"),
    [
        ("bfloat16", "backward", (True, True)),
        ("float32", "full", (True, False)),
        ("bfloat16", "forward", (False, False)),
        ("float32", "step", (False, False)),
    ],
)
def test_zero_fill_and_cast_are_shown_apart(bench, dtype, mode, shown):
    row = measured(bench, PROVIDERS["torch"], dataclasses.replace(CELL, dtype=dtype), mode)
    assert row.status == "ok", row
    times = (row.zero_fill_ms, row.cast_ms)
    assert tuple(time is not None for time in times) == shown
    assert all(time > 0 for time in times if time is not None)


def test_a_cast_that_does_not_fit_is_not_measured(bench):
    cell = dataclasses.replace(CELL, dtype="float16")
    bench.memory = measure.needed_bytes(cell, "backward")
    row = measured(bench, PROVIDERS["torch"], cell, "backward")
    assert row.zero_fill_ms > 0
    assert row.cast_ms is None


def test_padding_that_gets_a_gradient_is_wrong(bench):
    unpadded = fake(lambda weight, ids, padding_idx: F.embedding(ids, weight))
    row = measured(bench, unpadded, dataclasses.replace(CELL, padding=0.5), "backward")
    assert row.status == "wrong"
    assert "row 49 has a gradient" in row.match
    assert measured(bench, unpadded, CELL, "backward").status == "ok"


def test_nan_is_wrong(bench):
    nan = fake(lambda weight, ids, _: F.embedding(ids, weight) * torch.nan)
    assert measured(bench, nan).status == "wrong"
    gradient = torch.full((5, 2), torch.nan)
    ones, ids = torch.ones(3, 2), torch.tensor([0, 1, 2])
    assert not check.check_gradient(gradient, ones, ids, None, fp32=True).ok
    gradient[:3] = 1
    assert not check.check_gradient(gradient, ones, ids, None, fp32=True).ok


def test_sums_in_16_bit_are_accepted_from_rivals_alone():
    generator = torch.Generator().manual_seed(0)
    ids = torch.zeros(100, dtype=torch.int64)
    grad = torch.rand(100, 4, generator=generator).bfloat16()
    total = torch.zeros(3, 4, dtype=torch.bfloat16)
    for row in grad:
        total[0] += row
    rival = check.check_gradient(total, grad, ids, None, fp32=False)
    assert rival.ok
    assert "bf16 sum, loses" in rival.match
    assert not check.check_gradient(total, grad, ids, None, fp32=True).ok


def test_a_sum_that_stops_growing_is_wrong_for_everybody():
    ids, grad = torch.zeros(4096, dtype=torch.int64), torch.ones(4096, 1).bfloat16()
    total = torch.tensor([[256.0]]).bfloat16()
    assert not check.check_gradient(total, grad, ids, None, fp32=False).ok
    right = torch.tensor([[4096.0]]).bfloat16()
    assert check.check_gradient(right, grad, ids, None, fp32=True).ok


def test_the_gate_looks_at_every_piece(monkeypatch):
    monkeypatch.setattr(check, "PIECE", 16)
    problem = measure.Problem(CELL, CPU, 0, 1)
    weight, ids, grad = problem.weight.detach(), problem.ids(0), problem.grad_output
    output = weight[ids]
    gradient = torch.zeros_like(weight).index_add_(0, ids, grad)
    assert check.check_forward(output, weight, ids).ok
    assert check.check_gradient(gradient, grad, ids, None, fp32=True).ok
    output[-1, -1] += 1
    gradient[ids[-1], -1] += 1
    assert "position 39" in check.check_forward(output, weight, ids).match
    assert not check.check_gradient(gradient, grad, ids, None, fp32=True).ok


def test_a_step_may_change_no_other_row():
    before = torch.ones(4, 2)
    ids, grad = torch.tensor([1, 1]), torch.ones(2, 2)
    after = before.clone()
    after[1] -= 0.5 * 2
    assert check.check_step(before, after, grad, ids, None, 0.5).ok
    after[3, 0] = 7
    assert "row 3 changed" in check.check_step(before, after, grad, ids, None, 0.5).match


@pytest.mark.parametrize(
    ("after", "in_place", "said"),
    [
        # 1 + 257 in fp32; 257 in bf16 is 256.
        (258, True, None),
        (257, False, None),
        (257, True, "of the summed magnitudes"),
        (255, False, "of the summed magnitudes"),
        # Not added to what was there.
        (257 - 1, True, "of the summed magnitudes"),
    ],
)
def test_a_sum_that_is_added_may_be_rounded_before_only_where_it_is_a_gradient(
    after, in_place, said
):
    before, ids = torch.ones(3, 1), torch.zeros(2, dtype=torch.int64)
    grads = torch.tensor([[256.0], [1.0]]).bfloat16()
    gradient = before.clone()
    gradient[0] = after
    verdict = check.check_accumulation(before, gradient, grads, ids, None, True, in_place)
    assert verdict.ok == (said is None)
    assert said is None or said in verdict.match


def test_an_accumulation_may_change_no_other_row_and_no_dtype():
    before, ids, grads = torch.ones(3, 1), torch.tensor([1]), torch.ones(1, 1)
    after = before.clone().index_add_(0, torch.tensor([1, 2]), torch.ones(2, 1))
    verdict = check.check_accumulation(before, after, grads, ids, None, True, True)
    assert "row 2 of the gradient changed" in verdict.match
    narrow = torch.tensor([[1.0], [2.0], [1.0]]).bfloat16()
    verdict = check.check_accumulation(before, narrow, grads, ids, None, True, True)
    assert "the gradient is torch.bfloat16" in verdict.match


@pytest.mark.parametrize(
    ("dtype", "mode", "tables"),
    [
        ("float32", "accumulate", 1),
        # One of the table's dtype, and its cast.
        ("bfloat16", "accumulate_fp32", 3),
        ("bfloat16", "accumulate", 1),
    ],
)
def test_the_peak_of_an_accumulation_is_beyond_the_gradient(bench, dtype, mode, tables):
    cell = Cell(5000, 8, 4, dtype)
    row = measured(bench, PROVIDERS["torch"], cell, mode)
    size = 5000 * 8 * (2 if dtype == "bfloat16" else 4)
    assert tables * size <= row.peak_extra_bytes < tables * size + 4096


@pytest.mark.parametrize("tables", [1, 3])
@pytest.mark.parametrize("hotness", [1, 2])
@pytest.mark.parametrize(
    ("dtype", "mode"),
    [
        ("float32", "accumulate"),
        ("bfloat16", "accumulate"),
        ("bfloat16", "accumulate_fp32"),
    ],
)
def test_in_place_is_right_and_takes_no_second_gradient(bench, dtype, mode, hotness, tables):
    operation = "embedding" if hotness == 1 else "embedding_bag"
    cell = Cell(20_000, 8, 12, dtype, operation=operation, hotness=hotness, tables=tables)
    row = measured(bench, PROVIDERS["gpu_embed-in-place"], cell, mode)
    assert row.status == "ok", row
    assert row.match.endswith("of the fp32 bound")
    assert row.peak_extra_bytes < 20_000


def test_fp32_gradients_are_for_tables_of_16_bits():
    jobs = run.plan(run.Choice(["L"], ["torch"]), CPU)
    modes = {job.cell.dtype: set() for job in jobs}
    for job in jobs:
        modes[job.cell.dtype].add(job.mode)
    assert modes == {"float32": {"accumulate"}, "bfloat16": {"accumulate", "accumulate_fp32"}}


def test_errors_become_rows(bench):
    def raising(weight, cell, mode):
        raise RuntimeError("first line\nsecond line")

    row = measured(bench, Provider("fake", "", raising, cpu=True))
    assert (row.status, row.note) == ("error", "RuntimeError: first line")

    def too_large(weight, cell, mode):
        raise torch.OutOfMemoryError("no")

    assert measured(bench, Provider("fake", "", too_large, cpu=True)).status == "oom"


def test_a_setting_holds_while_its_provider_runs(bench):
    seen = []

    def lookup(weight, ids, padding_idx):
        seen.append(gpu_embed.settings.GRADIENT_METHOD.value)
        return F.embedding(ids, weight)

    sorted_one = fake(lookup, setting=PROVIDERS["gpu_embed-sorted"].setting)
    assert measured(bench, sorted_one).status == "ok"
    assert set(seen) == {"sorted"}
    assert gpu_embed.settings.GRADIENT_METHOD.value != "sorted"


def test_gradients_are_cleared_and_nothing_is_zero(bench):
    problem = bench.problem(CELL)
    assert problem.weight.all()
    assert problem.grad_output.all()
    assert len({tuple(ids.tolist()) for ids in problem.id_sets}) == measure.NUM_ID_SETS
    layer = PROVIDERS["torch"].build(problem.weight, CELL, "full")
    call = measure._call(layer, problem, "full")
    for i in range(3):
        call.run(i)
    expected = torch.zeros_like(problem.weight).index_add_(0, problem.ids(2), problem.grad_output)
    assert torch.allclose(problem.weight.grad, expected)


def test_together_in_turns(bench):
    problem = bench.problem(CELL)
    both = [PROVIDERS["gpu_embed"], fake(nudged_forward), PROVIDERS["torch"]]
    blank = [bench.row("", CELL, "forward", provider.name) for provider in both]
    rows = bench.measure_together(problem, both, "forward", blank)
    assert [row.status for row in rows] == ["ok", "wrong", "ok"]
    assert [row.provider for row in rows] == ["gpu_embed", "fake", "torch"]
    assert rows[1].ms_p50 is None
    assert rows[0].ms_p50 > 0
    assert rows[2].ms_p50 > 0


# Bytes and percentiles, by hand.


def test_percentiles():
    assert timing.percentiles([3, 1, 2]) == pytest.approx((1.4, 2, 2.6))
    assert timing.percentiles([5]) == (5, 5, 5)
    assert timing.percentiles(range(101)) == (20, 50, 80)


def test_counts():
    ids = torch.tensor([4, 4, 2, 7, 7, 7])
    assert byte_floor.count(ids, None) == byte_floor.Counts(unique=3, kept=6, unique_kept=3)
    assert byte_floor.count(ids, 7) == byte_floor.Counts(unique=3, kept=3, unique_kept=2)
    assert byte_floor.count(ids, 9) == byte_floor.Counts(unique=3, kept=6, unique_kept=3)


@pytest.mark.parametrize(
    ("mode", "dram", "logical"),
    [
        # 3 rows read and 6 written of 10 x 4 bytes; 6 ids of 8.
        ("forward", (3 + 6) * 40 + 48, 12 * 40 + 48),
        # 6 rows read, 100 written; logically each of the 6 is read and added, and 100 are filled.
        ("backward", (6 + 100) * 40 + 48, (12 + 100) * 40 + 48),
        ("full", (3 + 6 + 6 + 100) * 40 + 96, (12 + 12 + 100) * 40 + 96),
        # 6 rows read, 3 of the gradient read and written; logically each of the 6 is read and added.
        ("accumulate", (6 + 3 + 3) * 40 + 48, (6 + 12) * 40 + 48),
        # The lookup; then 6 gradients are read, 3 rows read and written.
        ("step", (3 + 6 + 6 + 3 + 3) * 40 + 96, (12 + 6 + 12) * 40 + 96),
    ],
)
def test_bytes_by_hand(mode, dram, logical):
    moved = byte_floor.bytes_moved(Cell(100, 10, 6), mode, byte_floor.Counts(3, 6, 3))
    assert (moved.dram, moved.logical) == (dram, logical)


def test_bytes_of_padding_and_narrow_types():
    cell = Cell(100, 10, 6, "bfloat16", "int32", padding=0.5)
    counts = byte_floor.Counts(unique=3, kept=3, unique_kept=2)
    assert byte_floor.bytes_moved(cell, "forward", counts).dram == (3 + 6) * 20 + 24
    assert byte_floor.bytes_moved(cell, "backward", counts).dram == (3 + 100) * 20 + 24
    # Of a gradient in fp32.
    accumulated = byte_floor.bytes_moved(cell, "accumulate_fp32", counts).dram
    assert accumulated == 3 * 20 + 2 * 2 * 40 + 24
    assert byte_floor.bytes_moved(cell, "step", counts).dram == (3 + 6 + 3 + 2 * 2) * 20 + 48


def test_a_prediction_is_the_floor_over_the_bandwidth():
    card = byte_floor.Card("card", 1000)
    assert byte_floor.predicted_ms(card, 9 * 10**8) == pytest.approx(1.0)


def test_memory_is_estimated_before_it_is_taken(bench):
    cell = Cell(10**6, 100, 10**5)
    assert measure.needed_bytes(cell, "forward", 1) == 4 * 10**8 + 4 * 10**7 + 8 * 10**5
    assert bench.does_not_fit(cell, "forward") is None
    said = bench.does_not_fit(cell, "step")
    assert said == "needs 1.2 GiB, 1.0 GiB may be used"


# Clocks.


def test_a_flush_writes_more_than_the_last_cache():
    buffer = timing._flush_buffer(CPU)
    assert buffer.nbytes > timing.last_cache_bytes() >= 2**20
    before = int(buffer[-1])
    timing.flush(CPU)
    assert int(buffer[-1]) == before + 1


def test_cold_samples_flush_before_each_call(monkeypatch):
    seen = []
    monkeypatch.setattr(timing, "flush", lambda device: seen.append("flush"))
    timing.time_calls([timing.Call(lambda i: seen.append("call"))], CPU, QUICK, cold=True)
    assert seen[-6:] == ["flush", "call"] * 3


def test_the_host_clock_counts_calls():
    calls = []
    (us,) = timing.host_us([timing.Call(calls.append)], CPU, seconds=0.01)
    assert len(calls) > 100
    assert 0 < us < 100


def test_samples_take_turns_and_start_apart():
    seen = []
    calls = [timing.Call(lambda i, k=k: seen.append((k, i))) for k in (0, 1)]
    timing.time_calls(calls, CPU, timing.Effort(0, 4, 4), cold=True)
    # Two calls each to estimate, then there and back; the second call is two inputs ahead.
    assert seen[-8:] == [(1, 2), (0, 0), (0, 1), (1, 3), (1, 4), (0, 2), (0, 3), (1, 5)]


def test_copy_bandwidth_is_positive():
    assert timing.copy_gbps(CPU, 2**22) > 0.01


def test_host_time_of_every_lookup():
    times = host_time.measure_host_time(seconds=0.005)
    assert {entry.mode for entry in times} == set(host_time.MODES)
    assert times[0].who == "torch"
    assert all(entry.us > 0 for entry in times)
    # The stub is gone.
    assert gpu_embed.backends.select(CPU).name == "torch"


# Sets and providers.


def test_every_set_can_be_counted_and_has_known_modes():
    assert list(SETS) == list("ABCDEFGHIJKLM")
    for shape_set in SETS.values():
        assert shape_set.cells
        assert set(shape_set.modes) <= set(MODES)
        assert len(set(shape_set.cells)) == len(shape_set.cells)


def test_varied_cells_come_once():
    cells = list(varied(SETS["A"].cells, vocab=[5, 6], dim=None))
    assert len(cells) == 2 * 2 * 2
    assert {cell.vocab for cell in cells} == {5, 6}


def test_a_provider_that_is_not_installed_says_how():
    absent = Provider("absent", "", looked_up, "no_such_module.part", "no-such-package", cpu=True)
    assert absent.missing_reason(CPU) == "not installed (pip install no-such-package)"
    assert absent.version() == ""
    assert PROVIDERS["fbgemm-gpu"].missing_reason(CPU) == "needs a CUDA device"


def test_a_broken_import_is_a_reason_and_says_nothing_itself(tmp_path, monkeypatch, capfd, caplog):
    monkeypatch.syspath_prepend(tmp_path)
    reasons = {
        "raise OSError('no such thing')": "cannot be imported: OSError: no such thing",
        # torch names the library alone; the loader's own error stands behind it.
        "raise OSError('Could not load') from OSError('/a/b/x.so: undefined symbol: _ZN5torch8')": (
            f"built for another torch than {torch.__version__} (x.so)"
        ),
    }
    for number, (code, reason) in enumerate(reasons.items()):
        code = f"import logging\nprint('loud')\nlogging.warning('louder')\n{code}\n"
        (tmp_path / f"broken_{number}.py").write_text(code)
        broken = Provider("broken", "", looked_up, f"broken_{number}", "broken", cpu=True)
        assert broken.missing_reason(CPU) == f"installed, but {reason}"
    said = capfd.readouterr()
    assert said.out + said.err + caplog.text == ""


@pytest.mark.parametrize(
    ("name", "cell", "reason"),
    [
        ("flag-gems", Cell(2**24, 128, 10), "its addresses are 32 bit"),
        ("liger-kernel", Cell(100, 4096, 2**19 + 1), "its addresses are 32 bit"),
        ("gpu_embed-atomic", Cell(10, 4, 4, "bfloat16"), "no atomics on bfloat16 tables"),
        ("gpu_embed-sorted-atomic", Cell(10, 4, 4, "float16"), "no atomics on float16 tables"),
        ("gpu_embed-sorted-atomic", Cell(10, 3, 4, "float64"), None),
        ("gpu_embed-descriptor", Cell(10, 4, 4, "float64"), "no bulk additions to float64 tables"),
        ("gpu_embed-descriptor", Cell(10, 6, 4), "its rows are a multiple of 16 bytes"),
        ("gpu_embed-descriptor", Cell(10, 8, 4), None),
        ("gpu_embed-one-hot", Cell(10, 8, 4), "its tables are not float32"),
        ("gpu_embed-one-hot", Cell(257, 8, 4, "bfloat16"), "its tables have 256 rows at most"),
        ("gpu_embed-one-hot", Cell(256, 3, 4, "float16"), None),
        (
            "gpu_embed-one-hot",
            Cell(9, 3, 4, "float16", operation="embedding_bag"),
            "it has no bags",
        ),
        ("fbgemm-gpu", Cell(10, 50, 4), "its rows are a multiple of 4 numbers"),
        ("torch", Cell(10, 4, 4, id_dtype="uint8"), "takes no uint8 ids"),
        ("gpu_embed", Cell(10, 4, 4, "bfloat16", "uint8"), None),
    ],
)
def test_what_a_provider_refuses(name, cell, reason):
    assert PROVIDERS[name].refuses(cell, "backward") == reason


@pytest.mark.parametrize(
    ("dtype", "dim", "reason"),
    [
        ("float32", 4, None),
        ("bfloat16", 4, "its rows are a multiple of 16 bytes"),
        ("bfloat16", 8, None),
        ("float64", 3, "its rows are a multiple of 16 bytes"),
    ],
)
def test_what_lookups_by_descriptors_refuse(dtype, dim, reason):
    provider = PROVIDERS["gpu_embed-gather-descriptor"]
    assert provider.refuses(Cell(10, dim, 4, dtype), "forward") == reason
    other_mode = provider.refuses(Cell(10, dim, 4, dtype), "backward")
    assert other_mode == "measured in forward alone"


CANDIDATES = [
    provider
    for provider in PROVIDERS.values()
    if provider.candidate and provider.module == "gpu_embed"
]


OF_BENCH = {"gpu_embed-descriptor", "gpu_embed-one-hot", "gpu_embed-gather-descriptor"}


def test_there_is_a_provider_for_every_kernel():
    """Each forces the kernel of its name; the candidates of the benchmark force none."""
    settings = gpu_embed.settings
    found = set()
    for provider in (*CANDIDATES, PROVIDERS["gpu_embed-atomic"], PROVIDERS["gpu_embed-sorted"]):
        with provider.setting():
            forced = settings.GATHER_METHOD.value, settings.GRADIENT_METHOD.value
        if provider.name in OF_BENCH:
            assert forced == ("auto", "auto")
            continue
        kind = "gather-" if provider.modes == ("forward",) else ""
        (name,) = set(forced) - {"auto"}
        assert provider.name == f"gpu_embed-{kind}{name.replace('_', '-')}"
        found.add((kind, name))
    gathers = {("gather-", name) for name in settings.GATHER_METHOD.choices[1:]}
    assert found == gathers | {("", name) for name in settings.GRADIENT_METHOD.choices[1:]}


@pytest.mark.parametrize("provider", CANDIDATES, ids=lambda provider: provider.name)
def test_candidates_are_rows_only_where_they_can_serve(provider):
    served = Cell(16, 8, 4, "bfloat16" if "one-hot" in provider.name else "float32")
    (mode, *_) = provider.modes
    assert provider.is_planned(served, mode)
    assert not any(provider.is_planned(served, other) for other in set(MODES) - {*provider.modes})
    refused = Cell(257, 3, 4, "bfloat16")
    assert provider.is_planned(refused, mode) == (provider.refusal(refused) is None)


def test_a_rival_that_refuses_a_cell_is_a_row_all_the_same():
    assert PROVIDERS["fbgemm-gpu"].is_planned(Cell(10, 50, 4), "forward")
    assert not PROVIDERS["torch-sparse"].is_planned(Cell(10, 50, 4), "forward")


# Rows and files.


ROW = Row(
    set="A",
    operation="embedding",
    mode="forward",
    dtype="float32",
    id_dtype="int64",
    tables=1,
    vocab=10,
    dim=4,
    num_ids=3,
    hotness=1,
    distribution="zipf:1.05",
    unique_ids=2,
    padding=0.3,
    provider="torch",
    status="ok",
    ms_p20=0.125,
    ms_p50=0.25,
    ms_p80=0.5,
    match="exact",
    device='NVIDIA "H200", 141 GB',
)


def test_columns_are_fixed():
    assert ",".join(COLUMNS) == (
        "set,operation,mode,dtype,id_dtype,tables,vocab,dim,num_ids,hotness,distribution,unique_ids,padding,"
        "provider,status,ms_p20,ms_p50,ms_p80,cold_ms_p50,zero_fill_ms,cast_ms,gbps_dram,gbps_logical,"
        "percent_of_copy,host_us,match,peak_extra_bytes,step_peak_bytes,load,device,torch,triton,commit,note"
    )


def test_rows_survive_the_file(tmp_path):
    odd = dataclasses.replace(ROW, status="error", vocab=11, note='a, "b"\nc', ms_p50=None)
    with RowWriter(tmp_path) as writer:
        for row in (ROW, odd):
            writer.write(row)
            # On disk at once, not at the end.
            assert read_rows(tmp_path)[-1].key == row.key
    assert read_rows(tmp_path / "results.csv") == [ROW, dataclasses.replace(odd, note='a, "b" c')]


def test_results_are_not_overwritten(tmp_path):
    with RowWriter(tmp_path):
        pass
    # A file without rows is no loss.
    with RowWriter(tmp_path) as writer:
        writer.write(ROW)
    with pytest.raises(ResultsError, match="use --resume"):
        RowWriter(tmp_path)
    with RowWriter(tmp_path, resume=True) as writer:
        assert writer.done == {ROW.key}
        writer.write(dataclasses.replace(ROW, vocab=11))
    assert [row.vocab for row in read_rows(tmp_path)] == [10, 11]


def test_a_half_written_line_is_cut_off(tmp_path):
    with RowWriter(tmp_path) as writer:
        writer.write(ROW)
    with (tmp_path / "results.csv").open("a") as file:
        file.write('A,embedding,"forw')
    # Whoever only looks, or may not go on, leaves the file as it is.
    assert [row.vocab for row in read_rows(tmp_path)] == [10]
    with pytest.raises(ResultsError, match="use --resume"):
        RowWriter(tmp_path)
    assert (tmp_path / "results.csv").read_text().endswith("forw")
    with RowWriter(tmp_path, resume=True) as writer:
        writer.write(dataclasses.replace(ROW, vocab=11))
    assert [row.vocab for row in read_rows(tmp_path)] == [10, 11]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace(",10,", ",ten,"), "line 2: vocab is 'ten'"),
        (lambda text: text.replace(",ok,", ",fine,"), "line 2: status is 'fine'"),
        (lambda text: text + "A,B\n", "line 3: 2 fields where 34 are expected"),
        (lambda text: "a,b\n", "does not name the benchmark's columns"),
        (lambda text: "", "does not name the benchmark's columns"),
        (lambda text: text.replace(",num_ids,", ",weather,"), "lacks column 'num_ids'"),
        (lambda text: text.replace(",note", ",colour"), "has an unknown column 'colour'"),
        (lambda text: text.replace(",note", ",match"), "repeats column 'match'"),
        (lambda text: text.replace(",10,", ",,"), "line 2: vocab is ''"),
        (lambda text: text.replace(",10,", ",0,"), "line 2: vocab is '0'"),
        (lambda text: text.replace("0.25", "nan"), "line 2: ms_p50 is 'nan'"),
        (lambda text: text.replace("0.25", "inf"), "line 2: ms_p50 is 'inf'"),
        (lambda text: text.replace("0.25", "-1"), "line 2: ms_p50 is '-1'"),
    ],
)
def test_a_broken_file_is_said_in_one_sentence(tmp_path, change, message):
    with RowWriter(tmp_path) as writer:
        writer.write(ROW)
    path = tmp_path / "results.csv"
    path.write_text(change(path.read_text()))
    with pytest.raises(ResultsError, match=message):
        read_rows(tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="limits the size of files")
def test_a_row_that_does_not_fit_on_the_disk_leaves_no_part(tmp_path):
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with RowWriter(tmp_path) as writer:
        writer.write(ROW)
        size = (tmp_path / "results.csv").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, hard))
        try:
            with pytest.raises(NotWrittenError, match=r"results.csv: File too large"):
                writer.write(dataclasses.replace(ROW, vocab=11))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert (tmp_path / "results.csv").stat().st_size == size
        writer.write(dataclasses.replace(ROW, vocab=12))
    assert [row.vocab for row in read_rows(tmp_path)] == [10, 12]


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.replace(b"\r\n", b"\n"),
        lambda data: b"\xef\xbb\xbf" + data,
        lambda data: data.rstrip(),
        lambda data: data + b"\r\n",
    ],
    ids=["unix", "byte order mark", "no last end", "empty line"],
)
def test_files_that_passed_through_other_programs(tmp_path, change):
    with RowWriter(tmp_path) as writer:
        writer.write(ROW)
    path = tmp_path / "results.csv"
    path.write_bytes(change(path.read_bytes()))
    assert read_rows(tmp_path) == [ROW]


def test_a_file_of_fewer_columns_can_be_compared_but_not_continued(tmp_path):
    with RowWriter(tmp_path) as writer:
        writer.write(ROW)
    path = tmp_path / "results.csv"
    with path.open(newline="") as file:
        (row,) = csv.DictReader(file)
    del row["zero_fill_ms"], row["note"]
    with path.open("w", newline="") as file:
        rewritten = csv.DictWriter(file, row)
        rewritten.writeheader()
        rewritten.writerow(row)
    assert read_rows(tmp_path) == [ROW]
    with pytest.raises(ResultsError, match="has the columns of another version"):
        RowWriter(tmp_path, resume=True)


@pytest.mark.parametrize("left", ["", "set,operation,mo"])
def test_a_run_that_ended_before_its_first_row_left_nothing(tmp_path, left):
    (tmp_path / "results.csv").write_text(left)
    with RowWriter(tmp_path) as writer:
        writer.write(ROW)
    assert read_rows(tmp_path) == [ROW]


def test_headers(tmp_path):
    write_header(tmp_path, {"device": "x"})
    assert read_header(tmp_path) == read_header(tmp_path / "results.csv") == {"device": "x"}
    (tmp_path / "header.json").write_text("{")
    with pytest.raises(ResultsError, match="no JSON file"):
        read_header(tmp_path)


# Runs.


def jobs_for(*chosen, cells=CELLS, modes=("forward",)):
    return [
        run.Job("A", cell, mode, provider)
        for cell in cells
        for mode in modes
        for provider in chosen
    ]


def test_a_run_goes_on_after_a_failure_and_resumes(bench, tmp_path):
    def raising(weight, cell, mode):
        raise RuntimeError("no")

    failing = Provider("failing", "", raising, cpu=True)
    jobs = jobs_for(failing, PROVIDERS["torch"])
    with RowWriter(tmp_path) as writer:
        rows = run.execute(bench, jobs, writer)
    assert [row.status for row in rows] == ["error", "ok", "error", "ok"]
    skipped = []
    longer = jobs_for(failing, PROVIDERS["torch"], modes=("forward", "backward"))
    with RowWriter(tmp_path, resume=True) as writer:
        rows = run.execute(bench, longer, writer, on_skip=skipped.append)
    assert len(skipped) == 4
    assert {row.mode for row in rows} == {"backward"}
    assert len(read_rows(tmp_path)) == 8


def test_in_turns_are_measured_together_whoever_needs_no_setting(bench, tmp_path, monkeypatch):
    def raising(weight, cell, mode):
        raise RuntimeError("no")

    together = []
    time_calls = measure.time_calls

    def noted(calls, *arguments, **options):
        together.append(len(calls))
        return time_calls(calls, *arguments, **options)

    monkeypatch.setattr(measure, "time_calls", noted)
    failing = Provider("failing", "", raising, cpu=True)
    alone = fake(looked_up, setting=PROVIDERS["gpu_embed-sorted"].setting)
    names = ("gpu_embed", "torch", "fbgemm-gpu")
    jobs = jobs_for(failing, alone, *map(PROVIDERS.get, names), modes=("full",), cells=(CELL,))
    with RowWriter(tmp_path) as writer:
        rows = run.execute(bench, jobs, writer, in_turns=True)
    found = {row.provider: row.status for row in rows}
    statuses = ("error", "ok", "ok", "ok", "missing")
    assert found == dict(zip(("failing", "fake", *names), statuses, strict=True))
    assert all(row.host_us > 0 for row in rows if row.status == "ok")
    # Warm and cold, of the one alone and of the two; the zero-fill by itself.
    assert sorted(together) == [1, 1, 1, 2, 2]
    with RowWriter(tmp_path, resume=True) as writer:
        assert run.execute(bench, jobs, writer, in_turns=True) == []


def test_what_fits_alone_and_not_in_turns_is_no_time(bench, tmp_path):
    providers = [PROVIDERS["gpu_embed"], PROVIDERS["torch"]]
    bench.memory = measure.needed_bytes(CELL, "step")
    jobs = jobs_for(*providers, cells=(CELL,), modes=("step",))
    with RowWriter(tmp_path) as writer:
        rows = run.execute(bench, jobs, writer, in_turns=True)
    assert [row.status for row in rows] == ["oom", "oom"]
    assert rows[0].note.startswith("in turns needs ")


def test_cells_that_do_not_fit_are_rows(bench, tmp_path):
    bench.memory = measure.needed_bytes(CELL, "forward")
    jobs = jobs_for(PROVIDERS["torch"], cells=(CELL,), modes=("forward", "backward"))
    with RowWriter(tmp_path) as writer:
        fits, does_not = run.execute(bench, jobs, writer)
    assert fits.status == "ok"
    assert does_not.status == "oom"
    assert does_not.note.startswith("needs ")
    assert does_not.ms_p50 is None


def test_refusals_missing_words_and_graphs_are_rows(bench, tmp_path, monkeypatch):
    def missing(*arguments):
        raise measure.ids_module.IdsError("needs the package")

    monkeypatch.setitem(measure.ids_module.KINDS, "wordfreq", missing)
    monkeypatch.setattr(measure.ids_module.importlib.util, "find_spec", lambda name: True)
    jobs = [
        *jobs_for(PROVIDERS["fbgemm-gpu"], cells=(CELL,)),
        *jobs_for(PROVIDERS["torch"], cells=(Cell(10, 4, 4, id_dtype="uint8"),)),
        *jobs_for(PROVIDERS["torch"], cells=(Cell(10, 4, 4, operation="embedding_graph"),)),
        *jobs_for(PROVIDERS["torch"], cells=(Cell(10, 4, 4, distribution="wordfreq"),)),
    ]
    with RowWriter(tmp_path) as writer:
        rows = run.execute(bench, jobs, writer)
    assert [(row.status, row.note) for row in rows] == [
        ("missing", "needs a CUDA device"),
        ("missing", "takes no uint8 ids"),
        ("missing", "CUDA graphs need a CUDA device"),
        ("missing", "needs the package"),
    ]


def test_only_who_was_asked_for_has_a_row_in_a_mode_that_it_does_not_measure(bench, tmp_path):
    everyone = run.plan(run.Choice(["A"], modes=["forward"], limit=1), CPU)
    assert "torch-sparse" not in {job.provider.name for job in everyone}
    assert all(job.mode in job.provider.modes for job in everyone)
    named = run.Choice(["A"], ["torch-sparse"], ["forward"], limit=1)
    with RowWriter(tmp_path) as writer:
        (row,) = run.execute(bench, run.plan(named, CPU), writer)
    assert (row.status, row.note) == (
        "missing",
        "measured in step, step_adam, step_rowwise_adagrad alone",
    )


def test_liger_and_gems_are_wired_as_they_ask(monkeypatch):
    """Their packages need a GPU; modules of the same shape show that the wiring is right."""

    class Gems:
        @staticmethod
        def embedding(weight, indices, padding_idx=-1):
            return F.embedding(indices, weight)

        @staticmethod
        def embedding_backward(grad_outputs, indices, num_weights, padding_idx=-1):
            return torch.ops.aten.embedding_dense_backward(
                grad_outputs, indices, num_weights, padding_idx, False
            )

    class Liger:
        LigerEmbeddingFunction = NudgedGradient

        class LigerEmbedding(torch.nn.Module):
            def __init__(self, num_embeddings, embedding_dim, padding_idx=None):
                super().__init__()
                self.padding_idx = padding_idx
                self.weight = torch.nn.Parameter(torch.randn(num_embeddings, embedding_dim))

            def forward(self, indices):
                rows = F.embedding(indices, self.weight).clone()
                rows[indices == self.padding_idx] = 0
                return rows

    monkeypatch.setattr(
        providers.importlib, "import_module", lambda name: Gems if "gems" in name else Liger
    )
    bench = measure.Bench(CPU, 10.0, FACTS, 2**30, effort=QUICK)
    padded = dataclasses.replace(CELL, padding=0.3)
    for cell in (CELL, padded):
        assert measured(bench, PROVIDERS["flag-gems"], cell, "full").status == "ok"
    # It zeroes the padding row of the output, where torch returns what is stored.
    assert measured(bench, PROVIDERS["liger-kernel"], padded, "full").status == "wrong"
