"""The benchmark's bags and whole steps: each optimizer by its own definition, bytes, peak memory."""

import dataclasses
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F

from gpu_embed.backends._plan import bag
from gpu_embed.bench import (
    byte_floor,
    check,
    ids,
    many_tables,
    measure,
    memory,
    optimizers,
    timing,
)
from gpu_embed.bench.optimizers import (
    ADAM,
    LAZY_ADAM,
    ROWWISE_ADAGRAD,
    SPARSE_ADAM,
    Update,
)
from gpu_embed.bench.providers import PROVIDERS, Layer, Provider
from gpu_embed.bench.shapes import HEADLINE, SETS, STEPS, Cell

CPU = torch.device("cpu")
FACTS = {"device": "a CPU", "torch": "2", "triton": "3", "commit": "abc"}
CELL = Cell(50, 8, 40)
BAGS = dataclasses.replace(CELL, operation="embedding_bag", hotness=5)
BY_OFFSETS = dataclasses.replace(BAGS, operation="embedding_bag_offsets")
NAMES = (
    "gpu_embed",
    "gpu_embed-sparse",
    "gpu_embed-in-backward",
    "torch",
    "torch-sparse",
    "fbgemm-gpu-cpu",
)


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.setattr(timing, "flush", lambda device: None)
    effort = timing.Effort(seconds=0.002, min_samples=3, max_samples=4, host_seconds=0.002)
    return measure.Bench(CPU, 10.0, FACTS, 2**30, effort=effort)


def measured(bench, provider, cell, mode):
    row = bench.row("S", cell, mode, provider.name)
    return bench.measure(bench.problem(cell), provider, mode, row)


def usable(name):
    """The provider, or the test is skipped."""
    provider = PROVIDERS[name]
    reason = provider.missing_reason(CPU)
    if reason is not None:
        pytest.skip(reason)
    return provider


@pytest.mark.parametrize("mode", STEPS)
@pytest.mark.parametrize("cell", [CELL, BAGS, BY_OFFSETS], ids=["rows", "bags", "by offsets"])
@pytest.mark.parametrize("name", NAMES)
def test_steps_are_checked_and_timed(bench, name, cell, mode):
    provider = usable(name)
    if mode not in provider.modes:
        return
    row = measured(bench, provider, cell, mode)
    assert (row.status, row.note) == ("ok", "")
    assert 0 < row.ms_p20 <= row.ms_p50 <= row.ms_p80
    assert row.host_us > 0
    assert row.step_peak_bytes > cell.vocab * cell.dim * 4
    assert row.peak_extra_bytes is None
    assert row.hotness == cell.hotness


@pytest.mark.parametrize("mode", ["forward", "backward", "full"])
@pytest.mark.parametrize("cell", [BAGS, BY_OFFSETS], ids=["bags", "by offsets"])
@pytest.mark.parametrize("name", ["gpu_embed", "torch", "fbgemm-gpu-cpu"])
def test_bags_are_checked_and_timed(bench, name, cell, mode):
    row = measured(bench, usable(name), cell, mode)
    assert row.status == "ok", row
    assert row.operation == cell.operation
    assert row.host_us > 0
    assert row.step_peak_bytes is None


@pytest.mark.parametrize("name", ["gpu_embed", "torch", "torch.compile"])
def test_bags_by_offsets_are_handed_over_flat(name, monkeypatch):
    """The same sums as of [B, L]; and lengths that only the offsets tell."""
    problem = measure.Problem(BY_OFFSETS, CPU, 0, 1)
    layer = usable(name).build(problem.weight, BY_OFFSETS, "forward")
    ids = problem.ids(0)
    assert torch.allclose(layer.lookup(ids), F.embedding_bag(ids, problem.weight, mode="sum"))
    offsets = torch.tensor([0, 4, 9, 9, 20, 25, 30, 35])
    monkeypatch.setattr(many_tables, "_offsets", lambda *_: offsets)
    expected = F.embedding_bag(ids.flatten(), problem.weight, offsets, mode="sum")
    assert torch.allclose(layer.lookup(ids), expected)


def test_sums_of_other_bags_have_no_time(bench, monkeypatch):
    monkeypatch.setattr(many_tables, "_offsets", lambda *_: torch.tensor([0, 4, *range(10, 40, 5)]))
    row = measured(bench, PROVIDERS["torch"], BY_OFFSETS, "forward")
    assert row.status == "wrong", row


@pytest.mark.parametrize("name", ["index_add_", "liger-kernel", "flag-gems"])
def test_who_has_no_bags_says_so(name):
    assert PROVIDERS[name].refuses(BAGS, "backward") == "it has no bags"


def test_optimizers_are_not_checked_in_16_bit():
    for dtype, refused in (("bfloat16", True), ("float64", False)):
        cell = dataclasses.replace(CELL, dtype=dtype)
        for mode in ("step_adam", "step_rowwise_adagrad"):
            assert (PROVIDERS["torch"].refuses(cell, mode) is not None) is refused
        assert PROVIDERS["torch"].refuses(cell, "step") is None


def test_the_same_package_on_the_cpu_alone():
    assert PROVIDERS["fbgemm-gpu-cpu"].missing_reason(torch.device("cuda")) == (
        "runs on the CPU alone"
    )


# The gate.


def steps_of(name, mode, cell=CELL):
    """Before, after, integer gradient and id sets of the two steps that the gate takes."""
    problem = measure.Problem(cell, CPU, seed=0, num_id_sets=2)
    layer = PROVIDERS[name].build(problem.weight, cell, mode)
    before = problem.weight.detach().clone()
    step, grad_output = measure._stepper(layer), problem.integer_grad_output()
    for drawn in problem.id_sets:
        step(drawn, grad_output)
    return before, problem.weight.detach(), grad_output, problem.id_sets, problem.padding_idx


OPTIMIZERS = {
    ("torch", "step_adam"): ADAM,
    ("gpu_embed", "step_adam"): ADAM,
    ("torch-sparse", "step_adam"): SPARSE_ADAM,
    ("gpu_embed-sparse", "step_adam"): SPARSE_ADAM,
    ("gpu_embed-in-backward", "step_adam"): SPARSE_ADAM,
    ("torch", "step_rowwise_adagrad"): ROWWISE_ADAGRAD,
    ("torch-sparse", "step_rowwise_adagrad"): ROWWISE_ADAGRAD,
    ("gpu_embed-sparse", "step_rowwise_adagrad"): ROWWISE_ADAGRAD,
    ("gpu_embed-in-backward", "step_rowwise_adagrad"): ROWWISE_ADAGRAD,
}


@pytest.mark.parametrize(("name", "mode"), OPTIMIZERS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_an_optimizer_meets_its_own_definition_and_no_other(name, mode, dtype):
    padded = dataclasses.replace(CELL, dtype=dtype, padding=0.2)
    taken = steps_of(name, mode, padded)
    for definition in (ADAM, LAZY_ADAM, SPARSE_ADAM, ROWWISE_ADAGRAD):
        verdict = check.check_steps(definition, *taken)
        assert verdict.ok is (definition is OPTIMIZERS[name, mode]), verdict.match
        assert definition.name in verdict.match or "changed without an id" in verdict.match


def test_definitions_are_torchs_own_in_fp64():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    grads = [torch.randn(6, 4, generator=generator, dtype=torch.float64) for _ in range(3)]
    used = [torch.rand(6, 1, generator=generator) < 0.6 for _ in grads]
    grads = [grad * row for grad, row in zip(grads, used, strict=True)]
    squares = [grad.square().mean(1, keepdim=True) for grad in grads]
    settings = (optimizers.LEARNING_RATE, optimizers.BETAS, optimizers.EPS)
    for definition, kind in ((ADAM, torch.optim.Adam), (SPARSE_ADAM, torch.optim.SparseAdam)):
        table = torch.nn.Parameter(weight.clone())
        optimizer = kind([table], *settings)
        for grad, row in zip(grads, used, strict=True):
            rows = row.nonzero()[:, :1].T
            sparse = torch.sparse_coo_tensor(
                rows, grad[row[:, 0]], grad.shape, check_invariants=True
            )
            table.grad = sparse if definition is SPARSE_ADAM else grad
            optimizer.step()
        expected, change = definition.apply(optimizers.Steps(weight, grads, used, squares))
        assert torch.allclose(table, expected, rtol=1e-14, atol=1e-15)
        assert (change >= (expected - weight).abs() * (1 - 1e-12)).all()


def test_the_gate_looks_at_every_piece_of_a_step(monkeypatch):
    taken = steps_of("torch", "step_adam")
    monkeypatch.setattr(check, "PIECE", 16)
    assert check.check_steps(ADAM, *taken).ok
    before, after, grad_output, id_sets, _ = taken
    wrong = after.clone()
    wrong[id_sets[1][-1], -1] *= 1 + 2**-15
    assert not check.check_steps(ADAM, before, wrong, grad_output, id_sets, None).ok
    untouched = sorted(set(range(50)) - set(torch.cat(id_sets).tolist()))[-1]
    wrong = after.clone()
    wrong[untouched, 0] += 1
    said = check.check_steps(ADAM, before, wrong, grad_output, id_sets, None).match
    assert said == f"row {untouched} changed without an id"


def test_a_wrong_optimizer_has_no_time(bench):
    def build(weight, cell, mode):
        adam = torch.optim.Adam(
            [weight], 1.001 * optimizers.LEARNING_RATE, optimizers.BETAS, optimizers.EPS
        )
        return Layer(lambda ids: F.embedding(ids, weight), weight, Update(adam.step, ADAM))

    provider = Provider("fake", "a fake", build, modes=("step_adam",), cpu=True)
    row = measured(bench, provider, CELL, "step_adam")
    assert row.status == "wrong"
    assert row.match.startswith("not Adam of all rows: off by")
    assert row.ms_p50 is row.step_peak_bytes is None


def test_wrong_bags_have_no_time(bench):
    def build(weight, cell, mode):
        mean = 0.999 * cell.hotness
        return Layer(lambda ids: mean * F.embedding_bag(ids, weight, mode="mean"), weight)

    row = measured(bench, Provider("fake", "a fake", build, cpu=True), BAGS, "forward")
    assert row.status == "wrong"
    assert "the sum of a bag loses" in row.match


def test_bags_are_compared_piece_by_piece(monkeypatch):
    monkeypatch.setattr(check, "PIECE", 16)
    problem = measure.Problem(BAGS, CPU, 0, 1)
    weight, drawn = problem.weight.detach(), problem.ids(0)
    output = weight[drawn].sum(1)
    assert check.check_bags(output, weight, drawn, fp32=True).ok
    output[-1, -1] += 1e-3
    assert not check.check_bags(output, weight, drawn, fp32=True).ok
    assert not check.check_bags(output[:-1], weight, drawn, fp32=True).ok


def test_integers_stay_exact_however_many_ids_there_are():
    few = measure.Problem(CELL, CPU, 0, 1).integer_grad_output()
    assert int(few.abs().max()) == measure.LARGEST_INTEGER
    many = dataclasses.replace(CELL, dim=1, num_ids=3 * 2**21)
    largest = int(measure.Problem(many, CPU, 0, 1).integer_grad_output().abs().max())
    assert 1 <= largest * many.num_ids <= 2**24


def test_hooks_end_with_their_provider(bench):
    problem = bench.problem(CELL)
    for name in ("gpu_embed-in-backward", "torch"):
        row = bench.row("S", CELL, "step_adam", name)
        assert bench.measure(problem, PROVIDERS[name], "step_adam", row).status == "ok"
    F.embedding(problem.ids(0), problem.weight).sum().backward()
    assert problem.weight.grad is not None


@pytest.mark.full
@pytest.mark.parametrize(
    "name", ["gpu_embed-in-backward", "gpu_embed-sparse", "torch", "torch-sparse"]
)
def test_the_state_of_a_provider_ends_with_it(name):
    """Of a large table it is as large as that, and the next provider needs the memory."""
    problem = measure.Problem(CELL, CPU, 0, 2)
    layer = PROVIDERS[name].build(problem.weight, CELL, "step_adam")
    step = measure._stepper(layer)
    step(problem.ids(0), [problem.grad_output])
    held = [weakref.ref(o) for o in gc.get_objects() if type(o).__name__ in ("Adam", "SparseAdam")]
    assert held
    del layer, step
    gc.collect()
    assert [reference() for reference in held] == [None] * len(held)


def test_ids_make_whole_bags(bench):
    with pytest.raises(ids.IdsError, match="40 ids do not make whole bags of 3"):
        bench.problem(dataclasses.replace(BAGS, hotness=3))


# Bytes.


@pytest.mark.parametrize(
    ("mode", "dram", "logical"),
    [
        # 3 rows read and 2 sums written of 10 x 4 bytes; 6 ids of 8.
        ("forward", (3 + 2) * 40 + 48, (6 + 2) * 40 + 48),
        ("backward", (2 + 100) * 40 + 48, (12 + 100) * 40 + 48),
        ("step", (3 + 2 + 2 + 2 * 3) * 40 + 96, (6 + 2 + 6 + 12) * 40 + 96),
        # Two moments a number are read and written too.
        ("step_adam", (3 + 2 + 2 + 6 * 3) * 40 + 96, (6 + 2 + 6 + 36) * 40 + 96),
        # One number a row.
        (
            "step_rowwise_adagrad",
            (3 + 2 + 2 + 2 * 3) * 40 + 2 * 3 * 4 + 96,
            (6 + 2 + 6 + 12) * 40 + 2 * 6 * 4 + 96,
        ),
    ],
)
def test_bytes_of_bags_by_hand(mode, dram, logical):
    cell = Cell(100, 10, 6, operation="embedding_bag", hotness=3)
    moved = byte_floor.bytes_moved(cell, mode, byte_floor.Counts(3, 6, 3))
    assert (moved.dram, moved.logical) == (dram, logical)


def test_needed_memory_counts_state_and_gradient():
    cell = Cell(1000, 100, 10)
    table, rest = 400_000, 2 * 4000 + 80
    assert measure.needed_bytes(cell, "step", 1) == 3 * table + rest
    assert measure.needed_bytes(cell, "step_adam", 1) == 5 * table + rest
    assert measure.needed_bytes(cell, "step_adam", 1, tables_beside=0) == 4 * table + rest
    sparse = measure.needed_bytes(cell, "step_rowwise_adagrad", 1, tables_beside=0)
    assert sparse == 2 * table + 4000 + rest


@pytest.mark.parametrize(
    ("name", "mode", "tables"),
    [
        ("torch", "step", 2),
        ("torch", "step_adam", 4),
        ("torch-sparse", "step", 1),
        ("torch-sparse", "step_adam", 3),
        ("gpu_embed-sparse", "step_adam", 3),
        ("gpu_embed-in-backward", "step_adam", 3),
        ("gpu_embed-in-backward", "step_rowwise_adagrad", 1),
    ],
)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_peak_of_a_step_in_tables(device, name, mode, tables):
    """Table, gradient and state; what depends on the few ids alone is below a tenth of a table."""
    # Sorting on a GPU takes memory of its own, however few the ids.
    cell = Cell(20_000 if device == "cpu" else 2_000_000, 64, 16)
    problem = measure.Problem(cell, torch.device(device), 0, 1)
    peak = measure._step_peak_bytes(PROVIDERS[name], problem, mode)
    table = problem.weight.nbytes
    assert tables * table < peak < (tables + 0.1) * table
    assert problem.weight.grad is None


def test_a_copy_of_the_table_counts_once():
    def build(weight, cell, mode):
        own = torch.nn.Parameter(weight.detach().clone())
        return Layer(lambda ids: F.embedding(ids, own, sparse=True), own)

    problem = measure.Problem(Cell(20_000, 64, 16), CPU, 0, 1)
    peak = measure._step_peak_bytes(Provider("copy", "", build, cpu=True), problem, "step")
    assert 1 < peak / problem.weight.nbytes < 1.1


def test_peak_memory_is_that_of_the_second_step(capfd):
    kept = []

    def build():
        kept.append(torch.zeros(1000, dtype=torch.uint8))

        def step():
            # Freed at once, then kept: 3,000 bytes are the peak, of which 2,000 stay.
            torch.ones(2000, dtype=torch.uint8)
            kept.append(torch.zeros(1000, dtype=torch.uint8))

        return step

    assert memory.peak_of_step(build, CPU) == 2000 + 2000
    assert capfd.readouterr().err == ""


# Sets.


def test_sets_with_bags_and_steps():
    assert {cell.hotness for cell in SETS["B"].cells} == {1, 16, 64}
    assert {cell.num_outputs for cell in SETS["B"].cells} == {1024, 32768, 131072}
    assert all(cell.pooled == (cell.hotness > 1) for name in "BC" for cell in SETS[name].cells)
    assert all(set(STEPS) <= set(SETS[name].modes) for name in "CDJ")
    assert str(BAGS) == "50 x 8 float32, 40 ids in bags of 5 (uniform)"
    assert str(BY_OFFSETS) == "50 x 8 float32, 40 ids in bags of 5 by offsets (uniform)"


def test_bags_by_offsets_stand_beside_the_same_ones_without():
    """Some of them short enough for a single launch whatever the offsets say, and some not."""
    cells = SETS["K"].cells
    given = [cell for cell in cells if cell.by_offsets]
    assert {dataclasses.replace(cell, operation="embedding_bag") for cell in given} == {
        cell for cell in cells if not cell.by_offsets
    }
    assert {cell.hotness <= bag.MAX_WHOLE_MEAN for cell in given} == {False, True}
    assert {cell.by_offsets for name, cell in HEADLINE if name == "K"} == {False, True}


def test_offsets_count_as_ids():
    counts = byte_floor.Counts(8, 40, 8)
    for mode in ("forward", "backward"):
        plain, given = (byte_floor.bytes_moved(cell, mode, counts) for cell in (BAGS, BY_OFFSETS))
        assert given.dram - plain.dram == given.logical - plain.logical == 8 * 8
