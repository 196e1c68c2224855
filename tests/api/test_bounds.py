"""Out-of-range ids: each mode, forward and backward, and correct work afterwards."""

import threading

import pytest
import torch
from cases import table
from torch.utils._python_dispatch import TorchDispatchMode

import gpu_embed
from gpu_embed import bounds
from gpu_embed.backends._plan import bag as bag_plan
from gpu_embed.bags import make_bags
from gpu_embed.functional import embedding, embedding_bag

BAD_IDS = [5, 2**31, 2**40 + 1, -1, -(2**40)]


def expect_error(target, indices, weight, message, **arguments):
    """The IndexError of one bad lookup, wherever the mode lets it appear."""

    def look_up_and_check():
        embedding(indices, weight, **arguments)
        if target.device == "cuda":
            gpu_embed.check_bounds()

    with pytest.raises(IndexError, match=message):
        look_up_and_check()


@pytest.mark.parametrize("bad", BAD_IDS)
@pytest.mark.parametrize("mode", ["raise", "sync"])
def test_the_error_names_id_position_and_rows(target, mode, bad):
    """Bounds: torch's wording first, then the id, where it stands, and the table's rows."""
    weight = table(5, 3, torch.float32, target.device)
    indices = torch.tensor([0, 4, bad, 1], device=target.device)
    with gpu_embed.set_bounds_check(mode):
        message = f"index out of range in self: id {bad} at flat position 2 .* has 5 rows"
        expect_error(target, indices, weight, message)


def test_the_position_is_given_in_the_callers_shape(target):
    """Bounds: at the offending call the shape is known."""
    weight = table(5, 3, torch.float32, target.device)
    indices = torch.zeros(2, 3, 4, dtype=torch.int64, device=target.device)
    indices[1, 2, 1] = 77
    with (
        gpu_embed.set_bounds_check("sync"),
        pytest.raises(IndexError, match=r"id 77 at position \(1, 2, 1\) of the input"),
    ):
        embedding(indices, weight)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8], ids=str)
def test_narrow_ids_are_compared_unwrapped(target, dtype):
    """Bounds: id 200 is no row of a table of 128, whatever the ids' dtype makes of 128."""
    weight = table(128, 2, torch.float32, target.device)
    indices = torch.tensor([1, 200], device=target.device).to(dtype)
    expect_error(target, indices, weight, "id 200 at flat position 1")


@pytest.mark.parametrize("num_embeddings", [5, 0])
def test_off_reads_zeros(target, num_embeddings):
    """Bounds: unchecked is not undefined."""
    weight = table(num_embeddings, 3, torch.float32, target.device)
    indices = torch.tensor([[7, -1], [2**33, 5]], device=target.device)
    with gpu_embed.set_bounds_check("off"):
        output = embedding(indices, weight)
    assert torch.equal(output, torch.zeros_like(output))
    gpu_embed.check_bounds()


@pytest.mark.parametrize(
    ("sparse", "scale_grad_by_freq"), [(False, False), (False, True), (True, False)]
)
@pytest.mark.parametrize("padding_idx", [None, 2])
def test_bad_ids_have_no_gradient(target, sparse, scale_grad_by_freq, padding_idx):
    """Bounds: the gradient is that of the good ids alone."""
    weight = table(4, 2, torch.float32, target.device).requires_grad_()
    indices = torch.tensor([1, 9, 2, -3, 1, 4], device=target.device)
    with gpu_embed.set_bounds_check("off"):
        output = embedding(
            indices,
            weight,
            padding_idx=padding_idx,
            scale_grad_by_freq=scale_grad_by_freq,
            sparse=sparse,
        )
        output.backward(torch.ones_like(output))
    grad = weight.grad.to_dense() if sparse else weight.grad
    ones = 1.0 if scale_grad_by_freq else 2.0
    padded = 0.0 if padding_idx == 2 else 1.0
    assert grad[:, 0].tolist() == [0, ones, padded, 0]


@pytest.mark.parametrize("mode", ["raise", "sync"])
def test_work_goes_on_after_the_error(target, mode):
    """Bounds: the next correct call works; table and ids are as they were."""
    weight = table(5, 3, torch.float32, target.device).requires_grad_()
    before = weight.detach().clone()
    indices = torch.tensor([1, 5], device=target.device)
    with gpu_embed.set_bounds_check(mode):
        for _ in range(2):
            expect_error(target, indices, weight, "id 5 at flat position 1", max_norm=0.1)
        good = torch.tensor([4, 0], device=target.device)
        output = embedding(good, weight)
        output.sum().backward()
        gpu_embed.check_bounds()
    assert torch.equal(weight.detach(), before)
    assert indices.tolist() == [1, 5]
    assert torch.equal(output, before[good])
    assert weight.grad[:, 0].tolist() == [1, 0, 0, 0, 1]


def test_tables_without_columns_are_checked_too(target):
    """Bounds: there is nothing to read, but the id is wrong all the same."""
    weight = torch.empty(3, 0, device=target.device)
    expect_error(target, torch.tensor([3], device=target.device), weight, "id 3")


def test_no_thread_raises_anothers_error():
    """Bounds, CPU: each thread sees its own ids."""
    weight = table(5, 3, torch.float32, "cpu")
    errors = []

    def work(index):
        for _ in range(200):
            try:
                embedding(torch.tensor([index]), weight)
            except IndexError:
                errors.append(index)

    with gpu_embed.use_backend("reference"):
        threads = [threading.Thread(target=work, args=(index,)) for index in (3, 9, 4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert errors == [9] * 200


def test_an_unknown_mode_changes_nothing():
    with pytest.raises(ValueError, match=r"set_bounds_check: expected one of .*got 'loud'"):
        gpu_embed.set_bounds_check("loud")
    with pytest.raises(IndexError):
        embedding(torch.tensor([9]), torch.zeros(2, 2))


def test_modes_nest_and_undo_themselves():
    weight, bad = torch.zeros(2, 2), torch.tensor([9])
    with gpu_embed.set_bounds_check("off"):
        with gpu_embed.set_bounds_check("sync"), pytest.raises(IndexError):
            embedding(bad, weight)
        assert embedding(bad, weight).eq(0).all()
    with pytest.raises(IndexError):
        embedding(bad, weight)


FIRST_LOOKUPS = {
    "inference mode": torch.inference_mode,
    "default device": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("mode", FIRST_LOOKUPS.values(), ids=FIRST_LOOKUPS)
def test_errors_are_reported_whatever_the_first_lookup_ran_in(target, mode, monkeypatch):
    """Bounds: the record outlives the mode it was made in."""
    if target.device == "cpu":
        monkeypatch.setattr(bounds, "_cpu_records", threading.local())
    else:
        monkeypatch.setattr(bounds, "_cuda_records", {})
    weight = table(5, 3, torch.float32, target.device)
    good = torch.tensor([1], device=target.device)
    bad = torch.tensor([9], device=target.device)
    with mode():
        embedding(good, weight)
    for _ in range(2):
        expect_error(target, bad, weight, "id 9 at flat position 0")
        assert torch.equal(embedding(good, weight), weight[good])


class Waits(TorchDispatchMode):
    """Fails on the operator that fetches a number from the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_recording_with_torchs_operators_never_waits():
    """No host sync: what CUDA's last resort does has no host sync."""
    record = bounds.BoundsRecord(torch.device("cpu"))
    with Waits():
        record.write(torch.tensor([[1, 2], [7, 9]]), 5)
    assert record.words.tolist() == [1, 2, 7, 5, 0, 0, 0]
    assert record.flag.item() == 1


def test_an_error_while_another_is_cleared_is_not_lost(monkeypatch):
    """Bounds: a kernel may meet a bad id at any moment of the host's clearing."""
    record = bounds.BoundsRecord(torch.device("cpu"))

    def claim():
        if record.words[0] == 0:
            record.words[:4] = torch.tensor([1, 0, 99, 5])
            record.flag.fill_(1)

    record.write(torch.tensor([7]), 5)
    monkeypatch.setattr(record, "_wait", claim)
    for expected in ("id 7", "id 99"):
        with pytest.raises(IndexError, match=expected):
            record.raise_if_claimed()


def test_check_bounds_has_nothing_to_say_without_cuda_lookups(monkeypatch):
    monkeypatch.setattr(bounds, "_cuda_records", {})
    for device in (None, 0, "cuda", "cpu"):
        gpu_embed.check_bounds(device)


# Bags.

MODES = ("sum", "mean", "max")
each_mode = pytest.mark.parametrize("reduction", MODES)
# Ids with one that is bad at flat position 5, offsets, and where it stands: bag, and place in it.
BAD_BAGS = {
    "2-D": (lambda bad: [[0, 4, 1], [2, 1, bad]], None, 1, 2),
    "offsets": (lambda bad: [0, 4, 1, 2, 1, bad, 0], [0, 0, 4, 5], 3, 0),
}


@pytest.mark.parametrize("bad", BAD_IDS)
@pytest.mark.parametrize("form", BAD_BAGS)
@each_mode
def test_the_error_names_the_bag(target, reduction, form, bad):
    """Bounds: torch's wording and type first, then the id's bag and its place there, and the rows."""
    make, offsets, bag, place = BAD_BAGS[form]
    weight = table(5, 3, torch.float32, target.device)
    indices = torch.tensor(make(bad), device=target.device)
    if offsets is not None:
        offsets = torch.tensor(offsets, device=target.device)
    message = (
        "embedding_bag: Expected idx >= 0 && idx < num_embeddings but found idx to be "
        rf"{bad}, at position {place} of bag {bag} \(flat position 5 of the input\); the table has 5 rows"
    )
    for error in (IndexError, RuntimeError):
        with gpu_embed.set_bounds_check("sync"), pytest.raises(error, match=message):
            embedding_bag(indices, weight, offsets, mode=reduction)


@each_mode
@pytest.mark.parametrize("position", [5, 11, 28])
def test_the_error_names_a_bag_that_is_cut(target, reduction, position, monkeypatch):
    """Bounds: an id in the head of the last bag, at the head's end, and behind it."""
    for name in ("MAX_WHOLE_BAG", "MIN_BAG_CHUNK", "MAX_BAG_CHUNK"):
        monkeypatch.setattr(bag_plan, name, 8)
    monkeypatch.setattr(bag_plan, "MAX_WHOLE_MEAN", 1)
    weight = table(5, 3, torch.float32, target.device)
    indices = torch.ones(30, dtype=torch.int64, device=target.device)
    indices[position] = 9
    offsets = torch.tensor([0, 4], device=target.device)
    message = rf"to be 9, at position {position - 4} of bag 1 \(flat position {position} of"
    with gpu_embed.set_bounds_check("sync"), pytest.raises(IndexError, match=message):
        embedding_bag(indices, weight, offsets, mode=reduction)


@each_mode
def test_an_error_of_a_lookup_names_no_bag(target, reduction):
    """Bounds: what a bag's error wrote to the record is gone with it."""
    weight = table(5, 3, torch.float32, target.device)
    bad = torch.tensor([[0, 9]], device=target.device)
    with gpu_embed.set_bounds_check("sync"):
        with pytest.raises(IndexError, match="position 1 of bag 0"):
            embedding_bag(bad, weight, mode=reduction)
        with pytest.raises(IndexError, match=r"id 9 at position \(0, 1\) of the input"):
            embedding(bad, weight)


@each_mode
def test_ids_in_no_bag_are_not_looked_at(target, reduction):
    weight = table(5, 3, torch.float32, target.device)
    indices = torch.tensor([1, 99], device=target.device)
    offsets = torch.tensor([0, 1], device=target.device)
    output = embedding_bag(indices, weight, offsets, mode=reduction, include_last_offset=True)
    if target.device == "cuda":
        gpu_embed.check_bounds()
    assert torch.equal(output, weight[1:2])


@pytest.mark.parametrize("padding_idx", [None, 2])
@each_mode
def test_bad_ids_of_bags_add_nothing(target, reduction, padding_idx):
    """Bounds: a mean counts such an id, as it counts a row of zeros; a maximum does not see it."""
    weight = -1 - torch.arange(8.0, device=target.device).view(4, 2)
    ours = weight.clone().requires_grad_()
    indices = torch.tensor([[1, 9, -1, 3], [-3, 2**40, -1, 4]], device=target.device)
    with gpu_embed.set_bounds_check("off"):
        output = embedding_bag(indices, ours, mode=reduction, padding_idx=padding_idx)
        output.sum().backward()
    rows = weight[[1, 3]]
    expected = {"sum": rows.sum(0), "mean": rows.sum(0) / 4, "max": rows[0]}[reduction]
    assert torch.equal(output, torch.stack([expected, torch.zeros_like(expected)]))
    share = {"sum": [1, 1], "mean": [0.25, 0.25], "max": [1, 0]}[reduction]
    assert ours.grad[:, 0].tolist() == [0, share[0], 0, share[1]]


def test_bad_ids_give_their_sample_weights_no_gradient(target):
    weight = table(4, 2, torch.float32, target.device)
    indices = torch.tensor([[1, 9, -1]], device=target.device)
    weights = torch.full((1, 3), float("nan"), device=target.device)
    weights[0, 0] = 2
    weights.requires_grad_()
    with gpu_embed.set_bounds_check("off"):
        output = embedding_bag(indices, weight, mode="sum", per_sample_weights=weights)
        output.sum().backward()
    assert torch.equal(output, 2 * weight[1:2])
    assert torch.equal(weights.grad, torch.stack([weight[1].sum(), *weight.new_zeros(2)])[None])


@each_mode
def test_bags_without_columns_are_checked_too(target, reduction):
    weight = torch.empty(3, 0, device=target.device)
    indices = torch.tensor([[0, 3]], device=target.device)
    with (
        gpu_embed.set_bounds_check("sync"),
        pytest.raises(IndexError, match="found idx to be 3, at position 1 of bag 0"),
    ):
        embedding_bag(indices, weight, mode=reduction)


def test_recording_bags_with_torchs_operators_never_waits():
    """No host sync: what CUDA's last resort does has no host sync."""
    record = bounds.BoundsRecord(torch.device("cpu"))
    bags = make_bags(torch.tensor([1, 2, 4, 9, 9]), torch.tensor([0, 0, 2, 4]), False)
    with Waits():
        record.write_bags(bags, 5)
    assert record.words.tolist() == [1, 3, 9, 5, 3, 2, 0]
    assert record.flag.item() == 1
