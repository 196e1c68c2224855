"""One optimizer step of one table on every backend: the same bits as the NumPy reference's."""

import math

import numpy as np
import pytest
import torch
from cases import (
    FAR_ROWS,
    INT16_KEYS,
    ids,
    ids_around_the_middle,
    integer_gradient,
    mapped,
    needs_mapping,
    same_bits,
    table,
)
from targets import takes_mapped_memory
from tiers import where

from gpu_embed import backends
from gpu_embed.dtypes import accumulation
from gpu_embed.reference.rounding import philox, random_words, round_to_bfloat16
from gpu_embed.row_update import STATE, RowUpdate, Stream

# Numbers that no dtype holds exactly, so that an operation left out, added or fused shows.
UPDATES = {
    "sgd": RowUpdate("sgd", step_size=0.37),
    "sgd, decay": RowUpdate("sgd", step_size=0.37, weight_decay=0.3, grad_scale=-1.0),
    "momentum": RowUpdate("momentum", step_size=0.37, avg_weight=0.7, momentum=0.9),
    "nesterov": RowUpdate("nesterov", step_size=0.37, avg_weight=1.0, momentum=0.9, grad_scale=-1.0),
    "momentum, decay": RowUpdate(
        "momentum", step_size=0.37, avg_weight=1.0, momentum=0.9, weight_decay=0.3, grad_scale=-1.0
    ),
    "nesterov, decay": RowUpdate(
        "nesterov", step_size=0.37, avg_weight=1.0, momentum=0.9, weight_decay=0.3
    ),
    "adagrad": RowUpdate("adagrad", step_size=0.37, eps=1e-3, grad_scale=-1.0),
    "adagrad, decay": RowUpdate("adagrad", step_size=0.37, eps=1e-3, weight_decay=0.3),
    "rowwise_adagrad": RowUpdate("rowwise_adagrad", step_size=0.37, eps=1e-3, grad_scale=-1.0),
    "adam": RowUpdate("adam", step_size=0.37, eps=1e-3, avg_weight=0.1, sq_weight=0.001),
    "adamw": RowUpdate(
        "adam", step_size=0.37, eps=1e-3, decay=0.03, avg_weight=0.1, sq_weight=0.001, grad_scale=-1.0
    ),
}  # fmt: skip
every_update = pytest.mark.parametrize("update", UPDATES.values(), ids=UPDATES)


def initial_state(update, weight):
    """State of small integers, as if there had been steps before."""
    found = []
    for layout in STATE[update.formula]:
        shape = weight.shape[:1] if layout.per_row else weight.shape
        count = torch.arange(math.prod(shape)).view(shape) % 7 + 1
        found.append(count.to(weight.device, accumulation(weight.dtype)))
    return tuple(found)


def run(update, weight, indices, values, rows=None, state=None):
    """Weight and state after the update, on the chosen backend and on the reference, each as one list."""
    results = []
    state = initial_state(update, weight) if state is None else state
    for backend in (backends.select(weight.device), backends.load("reference")):
        copies = [tensor.clone() for tensor in (weight, *state)]
        backend.row_update_(update, copies[0], tuple(copies[1:]), indices, values, rows)
        results.append(copies)
    return results


def check(update, weight, indices, values, rows=None):
    """The backend's bits are the reference's: small integers sum exactly, and the rest is IEEE's."""
    actual, expected = run(update, weight, indices, values, rows)
    assert all(map(same_bits, actual, expected))
    return actual


@pytest.mark.parametrize(
    ("update", "num_embeddings", "embedding_dim", "num_indices", "kind"),
    [
        *((name, 9, 4, 34, "zipf") for name in UPDATES),
        *((name, 40, 130, 5, "uniform") for name in UPDATES),
        ("adam", 3, 33, 40, "alternating"),
        ("adam", 300, 2, 150, "sorted"),
        ("rowwise_adagrad", 3, 9, 70, "alternating"),
        ("rowwise_adagrad", 5, 1, 33, "equal"),
        ("adagrad", 1, 8, 1, "uniform"),
    ],
)
def test_rows_are_updated_as_the_reference_says(
    target, update, num_embeddings, embedding_dim, num_indices, kind
):
    """Runs inside a chunk, across chunks, and over several; rows narrower and wider than a block."""
    update = UPDATES[update]
    weight = table(num_embeddings, embedding_dim, torch.float32, target.device)
    indices = ids(kind, num_indices, num_embeddings, target.device)
    values = integer_gradient((num_indices, embedding_dim), torch.float32, target.device)
    check(update, weight, indices, values)


@INT16_KEYS
@pytest.mark.parametrize("update", ["sgd", "rowwise_adagrad"])
@pytest.mark.parametrize("long", [False, True], ids=["in a program", "too long"])
def test_rows_that_int16_holds_as_negative_keys(target, num_embeddings, update, long, monkeypatch):
    """And the sentinel of ids out of range, which comes last."""
    if long and target.backend == "triton":
        from gpu_embed.backends._triton import row_update

        monkeypatch.setattr(row_update, "MAX_HELD_ROW", 4)
    weight = table(num_embeddings, 2, torch.float32, target.device)
    indices = ids_around_the_middle(num_embeddings, target.device)
    indices[7], indices[50] = -1, num_embeddings
    values = integer_gradient((100, 2), torch.float32, target.device)
    check(UPDATES[update], weight, indices, values)


@every_update
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes(target, update, dtype):
    """fp32 arithmetic and one rounding for 16-bit tables, fp64 for fp64."""
    weight = table(9, 8, dtype, target.device)
    values = integer_gradient((40, 8), dtype, target.device)
    check(update, weight, ids("zipf", 40, 9, target.device), values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_too_long_for_a_program(target, dtype, monkeypatch):
    """Row-wise Adagrad in two steps: sums in memory, and then rows block by block."""
    if target.backend == "triton":
        from gpu_embed.backends._triton import row_update

        monkeypatch.setattr(row_update, "MAX_HELD_ROW", 4)
        monkeypatch.setattr(row_update, "ROWWISE_BLOCK", 4)
    weight = table(5, 9, dtype, target.device)
    indices = ids("zipf", 40, 5, target.device)
    values = integer_gradient((40, 9), dtype, target.device)
    update = UPDATES["rowwise_adagrad"]._replace(stream=Stream(3, 5))
    check(update, weight, indices, values)


@pytest.mark.parametrize("long", [False, True], ids=["in a program", "too long"])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
def test_rowwise_adagrad_with_decay(target, dtype, long, monkeypatch):
    """A row's squares sum exactly in any order: weights are integers, and so is each one times 4."""
    if long and target.backend == "triton":
        from gpu_embed.backends._triton import row_update

        monkeypatch.setattr(row_update, "MAX_HELD_ROW", 4)
        monkeypatch.setattr(row_update, "ROWWISE_BLOCK", 4)
    weight = integer_gradient((5, 9), dtype, target.device)
    indices = ids("zipf", 40, 5, target.device)
    values = integer_gradient((40, 9), dtype, target.device)
    update = UPDATES["rowwise_adagrad"]._replace(weight_decay=4.0, stream=Stream(3, 5))
    decayed, _ = check(update, weight, indices, values)
    plain, _ = check(update._replace(weight_decay=0.0), weight, indices, values)
    assert not torch.equal(decayed, plain)


@every_update
def test_without_decay_an_infinite_weight_is_no_nan(target, update):
    """0 * inf would be one."""
    weight = torch.full((3, 4), math.inf, device=target.device)
    indices = torch.tensor([0, 2], device=target.device)
    values = integer_gradient((2, 4), torch.float32, target.device)
    new, *_ = run(update._replace(weight_decay=0.0), weight, indices, values)[0]
    assert new.isposinf().all()


def test_a_run_over_many_chunks_is_applied_once(target):
    """1029 entries of one row and one of another: the partial sums of 33 chunks end in one update."""
    weight = torch.zeros(3, 2, device=target.device)
    indices = torch.ones(1030, dtype=torch.int64, device=target.device)
    indices[17] = 2
    values = torch.ones(1030, 2, device=target.device)
    sum_of_squares, rows = check(
        RowUpdate("adagrad", step_size=1.0, eps=1.0), weight, indices, values
    )[::-1]
    assert rows[:, 0].tolist()[0] == 0
    assert sum_of_squares[1].tolist() == [3 + 1029.0**2, 4 + 1029.0**2]


@every_update
def test_untouched_rows_keep_every_bit(target, update):
    weight = table(6, 5, torch.float32, target.device)
    weight[[0, 5]] = math.nan
    indices = torch.tensor([1, 3, 1], device=target.device)
    values = integer_gradient((3, 5), torch.float32, target.device)
    untouched = [0, 2, 4, 5]
    before = (weight, *initial_state(update, weight))
    for old, new in zip(before, check(update, weight, indices, values), strict=True):
        assert same_bits(new[untouched], old[untouched])
        assert not torch.equal(new[[1, 3]], old[[1, 3]])


@every_update
def test_ids_out_of_range_take_no_part(target, update):
    """Bounds: no gradient of ours holds one, but a handmade one may."""
    weight = table(4, 3, torch.float32, target.device)
    indices = torch.tensor([7, 2, -1, 2, 4, 2**40], device=target.device)
    values = integer_gradient((6, 3), torch.float32, target.device)
    new, *_ = check(update, weight, indices, values)
    assert same_bits(new[[0, 1, 3]], weight[[0, 1, 3]])


@every_update
def test_only_the_chosen_rows_change(target, update):
    weight = table(6, 4, torch.float32, target.device)
    rows = torch.tensor([True, False, True, False, False, True], device=target.device)
    indices = torch.tensor([0, 1, 1, 2, 3, 5, 0, 9], device=target.device)
    values = integer_gradient((8, 4), torch.float32, target.device)
    actual = check(update, weight, indices, values, rows)
    for old, new in zip((weight, *initial_state(update, weight)), actual, strict=True):
        assert same_bits(new[[1, 3, 4]], old[[1, 3, 4]])
        assert not torch.equal(new[rows], old[rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_learning_rate_on_the_device_multiplies_step_and_decay(target, dtype):
    weight = table(6, 4, dtype, target.device)
    indices = torch.tensor([0, 4, 4], device=target.device)
    values = integer_gradient((3, 4), dtype, target.device)
    numbers = {"eps": 1e-3, "avg_weight": 0.1, "sq_weight": 0.001}
    lr = torch.tensor([0.3], dtype=torch.float64, device=target.device)
    by_tensor = RowUpdate("adam", step_size=0.7, decay=0.03, lr=lr, **numbers)
    by_float = RowUpdate("adam", step_size=0.7 * 0.3, decay=0.03 * 0.3, **numbers)
    actual = check(by_tensor, weight, indices, values)
    expected = check(by_float, weight, indices, values)
    assert all(map(same_bits, actual, expected))


VIEWS = {
    "transposed": lambda matrix: matrix.t().contiguous().t(),
    "every second column": lambda matrix: matrix.repeat_interleave(2, 1)[:, ::2],
    "first columns": lambda matrix: torch.cat([matrix, matrix], 1)[:, : matrix.shape[1]],
    "one item off": lambda matrix: torch.cat([matrix.new_zeros(1), matrix.flatten()])[1:].view_as(
        matrix
    ),
}


@pytest.mark.parametrize(
    "update", [UPDATES["adam"], UPDATES["rowwise_adagrad"]], ids=["adam", "rowwise"]
)
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_any_strides(target, update, view):
    weight = table(7, 8, torch.float32, target.device)
    indices = ids("uniform", 20, 7, target.device)
    values = integer_gradient((20, 8), torch.float32, target.device)
    expected = run(update, weight, indices, values)[1]
    state = initial_state(update, weight)
    for viewed, spread in ((view(weight.clone()), values), (weight.clone(), view(values))):
        actual = [tensor.clone() for tensor in state]
        backend = backends.select(weight.device)
        backend.row_update_(update, viewed, tuple(actual), indices, spread, None)
        assert all(map(same_bits, (viewed, *actual), expected))


def test_an_expanded_gradient(target):
    """What `.sum().backward()` hands on has strides of 0."""
    weight = torch.zeros(3, 4, device=target.device)
    values = torch.ones(1, 1, device=target.device).expand(3, 4)
    indices = torch.tensor([0, 2, 2], device=target.device)
    new, _ = run(RowUpdate("sgd", step_size=0.5), weight, indices, values)
    assert new[0][:, 3].tolist() == [-0.5, 0, -1]


@needs_mapping
@where(takes_mapped_memory)
@pytest.mark.parametrize("formula", ["adam", "rowwise_adagrad"])
def test_rows_past_2_to_the_31_elements(target, formula):
    """64-bit addresses: addresses of rows and state in 64 bits. The tables cost an address range alone."""
    weight = mapped(FAR_ROWS, 8, torch.float32)
    state = tuple(
        mapped(FAR_ROWS, 1 if layout.per_row else 8, torch.float32).view(
            layout.shape(weight, FAR_ROWS)
        )
        for layout in STATE[formula]
    )
    rows = mapped(FAR_ROWS, 1, torch.bool).view(-1)
    rows[-1], rows[3] = True, True
    update = RowUpdate(formula, 2.0, avg_weight=0.5, sq_weight=0.25, eps=2.0**-60)
    indices = torch.tensor([FAR_ROWS - 1, 3, FAR_ROWS - 2, FAR_ROWS - 1])
    # Of four entries two are for the last row, in which they are 3 in every column.
    values = torch.tensor([[1.0], [4.0], [5.0], [2.0]]).expand(4, 8)
    backends.select(weight.device).row_update_(update, weight, state, indices, values, rows)
    assert weight[-1].eq(-2).all()
    assert weight[3].eq(-2).all()
    assert not weight[-2].any()
    assert state[-1][-1].eq(9.0 if formula == "rowwise_adagrad" else 9.0 / 4).all()
    assert formula != "adam" or state[0][-1].eq(1.5).all()


@needs_mapping
@where(takes_mapped_memory)
def test_rows_past_2_to_the_32_have_random_words_of_their_own(target):
    """Row 2**32 + 1 is not row 1: its number's upper half is part of the counter."""
    weight = mapped(2**32 + 16, 1, torch.bfloat16)
    rows = torch.arange(2**32, 2**32 + 16)
    update = RowUpdate("sgd", step_size=-1.0, stream=Stream(seed=3, step=1))
    values = torch.full((16, 1), 1 + 2.0**-8)
    backends.select(weight.device).row_update_(update, weight, (), rows, values, None)
    words = random_words(rows.numpy(), 1, 3, 1)
    expected = torch.from_numpy(round_to_bfloat16(values.numpy(), words)).bfloat16()
    assert torch.equal(weight[-16:], expected)


def test_random_gradients_are_summed_within_the_bound(target):
    """A sum of n fp32 numbers in any order errs by at most (n - 1) * eps32 * their absolute sum.

    SGD with a step of 1 on a table of zeros hands that sum on as it is.
    """
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(100, 5, generator=generator).to(target.device)
    indices = ids("zipf", 100, 10, target.device)
    weight = torch.zeros(10, 5, device=target.device)
    actual = run(RowUpdate("sgd", step_size=1.0), weight, indices, values)[0][0]
    exact = torch.zeros(10, 5, dtype=torch.float64, device=target.device)
    size = exact.index_add(0, indices, values.double().abs())
    exact.index_add_(0, indices, values.double())
    count = torch.bincount(indices, minlength=10)[:, None]
    assert ((actual + exact).abs() <= (count - 1).clamp(min=0) * 2.0**-23 * size).all()


def test_updates_repeat_bit_for_bit(target):
    """Determinism: no atomics, so the order of the additions is fixed."""
    generator = torch.Generator().manual_seed(4)
    values = torch.randn(70, 3, generator=generator).to(target.device)
    indices = ids("zipf", 70, 9, target.device)
    weight = table(9, 3, torch.float32, target.device)
    first, second = (run(UPDATES["adam"], weight, indices, values)[0] for _ in range(2))
    assert all(map(same_bits, first, second))


# Stochastic rounding.


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000",
         "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
         "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
         "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)  # fmt: skip
def test_philox_gives_the_published_words(counter, key, expected):
    """The known answers that Random123 ships for philox4x32-10."""
    words = [np.array([int(word, 16)], np.uint64) for word in counter.split()]
    found = philox(tuple(words), tuple(int(word, 16) for word in key.split()))
    assert [f"{int(word[0]):08x}" for word in found] == expected.split()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("embedding_dim", [1, 6, 8])
def test_stochastic_rounding_is_the_same_everywhere(target, dtype, embedding_dim):
    """The bits depend on seed, step, row and column alone; halves below 2**-14 are spaced otherwise."""
    weight = table(20, embedding_dim, dtype, target.device)
    weight[10:] *= 2.0**-17
    weight[3, 0] = math.inf
    indices = torch.arange(20, device=target.device)
    values = integer_gradient((20, embedding_dim), dtype, target.device)
    stream = Stream(seed=2**40 + 12345, step=7)
    update = RowUpdate("sgd", step_size=0.0123 * 2.0**-10, stream=stream)
    new, *_ = check(update, weight, indices, values)
    for other in (None, Stream(stream.seed, 8), Stream(stream.seed + 2**32, 7)):
        reference = backends.load("reference")
        changed = weight.clone()
        reference.row_update_(
            RowUpdate("sgd", update.step_size, stream=other), changed, (), indices, values, None
        )
        assert not same_bits(new, changed)


def test_wide_tables_are_not_rounded_at_random(target):
    weight = table(5, 4, torch.float32, target.device)
    indices = torch.arange(5, device=target.device)
    values = integer_gradient((5, 4), torch.float32, target.device)
    plain = check(RowUpdate("sgd", 0.37), weight, indices, values)
    streamed = check(RowUpdate("sgd", 0.37, stream=Stream(1, 1)), weight, indices, values)
    assert all(map(same_bits, plain, streamed))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_stochastic_rounding_is_right_on_average(dtype):
    """Each rounding errs by less than one step of the dtype, so by Hoeffding's inequality the mean over n of
    them is off by more than 5 / sqrt(2 n) steps with a probability under 2 * exp(-25), whatever the value."""
    rows, columns = 1000, 16
    n = rows * columns
    # The third is below 2**-14, where halves are spaced evenly, and the last below the first of them.
    for value in (1.3, -100.3, 3e-5, 2e-8):
        weight = torch.zeros(rows, columns, dtype=dtype)
        # From 0, a step of 1 takes the gradient's place, in fp32 as it is.
        values = torch.full((rows, columns), value, dtype=torch.float32)
        update = RowUpdate("sgd", step_size=-1.0, stream=Stream(5, 1))
        backends.load("reference").row_update_(update, weight, (), torch.arange(rows), values, None)
        low, high = weight.unique()
        assert abs(int(high.view(torch.int16)) - int(low.view(torch.int16))) == 1
        error = weight.double().mean() - float(values[0, 0])
        assert abs(error) < 5 / math.sqrt(2 * n) * float(high - low)


@pytest.mark.full
def test_nearest_rounding_stalls_where_stochastic_rounding_moves(target):
    """Below 1 a bf16 step is 2**-8, so 2**-10 at a time is lost each time by rounding to nearest. The mean of
    1024 elements after 8 times is 1 - 2**-7, within Hoeffding's bound for roundings by less than 2**-8 each:
    2**-8 * 5 * sqrt(8 / (2 * 1024))."""
    indices = torch.arange(1, device=target.device)
    values = torch.ones(1, 1024, dtype=torch.bfloat16, device=target.device)
    nearest = torch.ones_like(values)
    stochastic = torch.ones_like(values)
    backend = backends.select(values.device)
    for step in range(1, 9):
        backend.row_update_(RowUpdate("sgd", 2.0**-10), nearest, (), indices, values, None)
        update = RowUpdate("sgd", 2.0**-10, stream=Stream(9, step))
        backend.row_update_(update, stochastic, (), indices, values, None)
    assert (nearest == 1).all()
    error = stochastic.double().mean() - (1 - 2.0**-7)
    assert abs(error) < 2.0**-8 * 5 * math.sqrt(8 / 2048)
