"""Updates in the backward pass inside of real training loops."""

import copy
import gc
import io
import os
import pickle
import warnings
import weakref

import pytest
import torch
from cases import same_bits
from table_cases import integer_layer
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import gpu_embed
from gpu_embed import Embedding, optim
from gpu_embed.optim import in_backward

# Torch's own, and Triton's interpreter's, which computes what is masked too.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        "Sparse invariant checks are implicitly disabled",
        "divide by zero encountered in divide",
        "invalid value encountered in (divide|multiply|add|cast)",
        "overflow encountered in",
    )
]

OPTIMIZERS = {
    "SGD": optim.SGD,
    "Adagrad": optim.Adagrad,
    "RowWiseAdagrad": optim.RowWiseAdagrad,
    "Adam": optim.Adam,
}
every_optimizer = pytest.mark.parametrize("optimizer_class", OPTIMIZERS.values(), ids=OPTIMIZERS)
DTYPES = {
    "fp32": torch.float32,
    "fp64": torch.float64,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
# One that sees a row as a whole, and one that does not.
two_optimizers = pytest.mark.parametrize(
    "optimizer_class", [optim.RowWiseAdagrad, optim.Adam], ids=["RowWiseAdagrad", "Adam"]
)
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
# A sparse gradient of a table, of rows of a layer, and a TableGradient.
KINDS = {
    "table": None,
    "uniform": {"user": (7, 4), "item": (3, 4)},
    "mixed": {"user": (7, 3), "item": (3, 12)},
}
every_kind = pytest.mark.parametrize("kind", KINDS)
IDS = {"table": [1, 4, 4, 6], "uniform": [1, 4, 4, 0, 2, 2], "mixed": [1, 4, 4, 0, 2, 2]}


class Tables(torch.nn.Module):
    """A layer of small integers, whose output is multiplied by what the gradients are to be."""

    def __init__(self, kind, dtype=torch.float32, device="cpu"):
        super().__init__()
        if kind == "table":
            weight = torch.arange(28.0).remainder(5).view(7, 4)
            self.layer = Embedding.from_pretrained(weight, freeze=False, sparse=True)
        else:
            self.layer = integer_layer(KINDS[kind], sparse=True, mode="sum")
        self.layer.to(device, dtype)
        self.kind = kind

    @property
    def weight(self):
        return self.layer.weight

    def forward(self, factor=1.0):
        indices = torch.tensor(IDS[self.kind], device=self.weight.device)
        if self.kind == "table":
            output = self.layer(indices)
        else:
            output = self.layer(indices, torch.tensor([0, 2, 3, 4, 6], device=indices.device))
        columns = torch.arange(output.numel(), device=indices.device).view_as(output) % 3 - 1.0
        return (output * (columns * factor).to(output.dtype)).float().sum()


def twins(kind, dtype=torch.float32, device="cpu"):
    return Tables(kind, dtype, device), Tables(kind, dtype, device)


def gradient_of_all(tables, factors):
    """The sum of several backwards' gradients, with all their entries; torch's own + knows no fp16 on the CPU."""
    grads = [torch.autograd.grad(tables(factor), tables.weight)[0] for factor in factors]
    if not grads[0].is_sparse:
        return sum(grads[1:], grads[0])
    return torch.sparse_coo_tensor(
        torch.cat([grad._indices() for grad in grads], 1),
        torch.cat([grad._values() for grad in grads]),
        grads[0].shape,
    )


def one_table():
    return Embedding.from_pretrained(torch.zeros(3, 1), freeze=False, sparse=True)


def look_up(layer, *indices):
    return layer(torch.tensor(indices)).sum()


def cpu_scaler(scale=2.0**7, **arguments):
    return torch.amp.GradScaler("cpu", init_scale=scale, **arguments)


def state_of(optimizer):
    (state,) = optimizer.state.values()
    return state


def assert_same_state(actual, expected):
    actual, expected = state_of(actual), state_of(expected)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(torch.as_tensor(actual[name]), torch.as_tensor(value)), name


# Automatic mixed precision.


@every_kind
@two_optimizers
@every_dtype
def test_scaled_gradients_update_as_unscaled_ones_do(target, kind, optimizer_class, dtype):
    """The scale is a power of two, so that dividing by it is exact; it changes between two updates."""
    scaled, plain = twins(kind, dtype, target.device)
    scaler = torch.amp.GradScaler(target.device, init_scale=2.0**5, growth_interval=1)
    updates = optim.apply_in_backward(scaled, optimizer_class, lr=0.5, scaler=scaler)
    optimizer = optimizer_class(plain.parameters(), lr=0.5)
    for factor in (1.0, 2.0):
        scaler.scale(scaled(factor)).backward()
        assert scaled.weight.grad is None
        scaler.update()
        plain(factor).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert scaler.get_scale() == 2.0**7
    assert same_bits(scaled.weight, plain.weight)
    assert_same_state(updates.optimizer, optimizer)


@every_kind
@two_optimizers
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("factor", [float("inf"), float("nan"), 3e38], ids=["inf", "nan", "large"])
def test_gradients_that_are_not_finite_reach_no_table(target, kind, optimizer_class, dtype, factor):
    """3e38 is finite, but not once it is scaled, or in 16 bit. The next update is the first."""
    scaled, plain = twins(kind, dtype, target.device)
    scaler = torch.amp.GradScaler(target.device, init_scale=2.0**7)
    updates = optim.apply_in_backward(scaled, optimizer_class, lr=0.5, scaler=scaler)
    before = scaled.weight.detach().clone()
    scaler.scale(scaled(factor)).backward()
    scaler.update()
    assert scaler.get_scale() == 2.0**6
    assert same_bits(scaled.weight, before)
    state = updates.optimizer.state_dict()["state"][0]
    assert state["step"] == 0
    assert not any(value.any() for value in state.values() if isinstance(value, torch.Tensor))
    optimizer = optimizer_class(plain.parameters(), lr=0.5)
    scaler.scale(scaled()).backward()
    plain().backward()
    optimizer.step()
    assert same_bits(scaled.weight, plain.weight)
    assert_same_state(updates.optimizer, optimizer)


@every_kind
def test_sums_that_may_not_be_finite_reach_no_table(target, kind):
    """Each of the two entries of row 4 is finite, and so is each scaled one."""
    tables = Tables(kind, device=target.device)
    scaler = torch.amp.GradScaler(target.device, init_scale=1.0)
    optim.apply_in_backward(tables, optim.SGD, lr=1.0, scaler=scaler)
    before = tables.weight.detach().clone()
    scaler.scale(tables(3e38)).backward()
    assert same_bits(tables.weight, before)
    scaler.update()
    assert scaler.get_scale() == 0.5


def test_small_gradients_of_16_bit_tables_are_not_lost():
    """2**-30 is no number of fp16, and 2**-10, to which it was scaled, is one."""
    layer = one_table().to(torch.float16)
    scaler = cpu_scaler(2.0**20)
    optim.apply_in_backward(layer, optim.SGD, lr=2.0**30, scaler=scaler)
    scaler.scale(look_up(layer, 1).float() * 2.0**-30).backward()
    assert layer.weight[:, 0].tolist() == [0, -1, 0]


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.tables = torch.nn.ModuleList([one_table(), one_table()])
        self.dense = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.ones_(self.dense.weight)


@pytest.mark.parametrize("step_is_kept", [False, True])
def test_a_table_that_overflows_skips_no_other(step_is_kept):
    """As for two optimizers of torch. `scaler.step(updates.optimizer)` may stay in the loop."""
    model = Model()
    first, second = model.tables
    scaler = cpu_scaler()
    updates = optim.apply_in_backward(model, optim.SGD, lr=1.0, scaler=scaler)
    dense = torch.optim.SGD(model.dense.parameters(), lr=1.0)
    for number, factor in enumerate((1.0, float("inf"), 1.0), 1):
        loss = look_up(first, 0) + factor * look_up(second, 0) + model.dense(torch.ones(1)).sum()
        scaler.scale(loss).backward()
        scaler.step(dense)
        if step_is_kept:
            scaler.step(updates.optimizer)
        scaler.update()
        dense.zero_grad()
        assert model.dense.weight.item() == 1 - number
        assert first.weight[0].item() == -number
        assert second.weight[0].item() == (-1 if number < 3 else -2)
        assert scaler.get_scale() == (2.0**7 if number == 1 else 2.0**6)
    steps = [updates.optimizer.state[layer.weight]["step"] for layer in (first, second)]
    assert steps == [3, 2]


def test_a_dense_optimizer_that_overflows_is_skipped_as_ever():
    model = Model()
    scaler = cpu_scaler()
    optim.apply_in_backward(model, optim.SGD, lr=1.0, scaler=scaler)
    dense = torch.optim.SGD(model.dense.parameters(), lr=1.0)
    loss = look_up(model.tables[0], 0) + model.dense(torch.full((1,), float("inf"))).sum()
    scaler.scale(loss).backward()
    scaler.step(dense)
    scaler.update()
    assert model.dense.weight.item() == 1
    assert model.tables[0].weight[0].item() == -1
    assert scaler.get_scale() == 2.0**6


def test_an_overflow_is_remembered_until_the_scaler_is_updated():
    """Whatever comes between the two."""
    layer = one_table()
    scaler = cpu_scaler()
    updates = optim.apply_in_backward(layer, optim.SGD, lr=1.0, scaler=scaler)
    for factor in (float("nan"), 1.0):
        scaler.scale(factor * look_up(layer, 1)).backward()
    assert layer.weight[1].item() == -1
    assert state_of(updates.optimizer)["step"] == 1
    scaler.update()
    assert scaler.get_scale() == 2.0**6


class Arrival:
    """Stands for the CUDA event behind the copy of how an update went."""

    def __init__(self):
        self.waits = 0

    def synchronize(self):
        self.waits += 1


@pytest.mark.parametrize("asked_by", ["update", "state_dict", "load_state_dict", "remove"])
def test_how_an_update_went_is_asked_later_on_a_gpu(monkeypatch, asked_by):
    """Once, and before a step number is used, saved or replaced."""
    arrivals = []

    def outcome(finite):
        arrivals.append(Arrival())
        return in_backward._Outcome(finite, arrivals[-1])

    monkeypatch.setattr(in_backward, "_outcome", outcome)
    layer = one_table()
    scaler = cpu_scaler()
    updates = optim.apply_in_backward(layer, optim.Adam, lr=1.0, scaler=scaler)
    scaler.scale(float("inf") * look_up(layer, 1)).backward()
    assert arrivals[0].waits == 0
    expected = 0
    if asked_by == "update":
        scaler.scale(look_up(layer, 1)).backward()
        expected = 1
    elif asked_by == "state_dict":
        assert updates.optimizer.state_dict()["state"][0]["step"] == 0
    elif asked_by == "remove":
        updates.remove()
    else:
        saved = optim.Adam([layer.weight]).state_dict()
        saved["state"][0] = {
            "step": 7,
            "exp_avg": torch.zeros(3, 1),
            "exp_avg_sq": torch.zeros(3, 1),
        }
        updates.optimizer.load_state_dict(saved)
        expected = 7
    assert state_of(updates.optimizer)["step"] == expected
    assert arrivals[0].waits == 1
    updates.optimizer.state_dict()
    assert state_of(updates.optimizer)["step"] == expected
    assert arrivals[0].waits == 1


def test_a_scaler_that_is_not_enabled_changes_nothing():
    layer = one_table()
    scaler = cpu_scaler(enabled=False)
    optim.apply_in_backward(layer, optim.SGD, lr=1.0, scaler=scaler)
    scaler.scale(look_up(layer, 1)).backward()
    assert layer.weight[1].item() == -1
    scaler.update()


def test_a_loss_that_was_not_scaled_is_refused():
    layer = one_table()
    optim.apply_in_backward(layer, optim.SGD, lr=1.0, scaler=cpu_scaler())
    with pytest.raises(RuntimeError, match=r"not scaled by it; call scaler.scale\(loss\)"):
        look_up(layer, 1).backward()
    assert layer.weight.grad is None
    assert not layer.weight.any()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"scaler": 2.0**16}, TypeError, "scaler must be a torch.amp.GradScaler, got float"),
        ({"micro_steps": 0}, ValueError, "micro_steps must be 1 or more, got 0"),
        ({"micro_steps": 2.0}, TypeError, "micro_steps must be an int, got 2.0"),
        ({"micro_steps": True}, TypeError, "micro_steps must be an int, got True"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, message):
    layer = one_table()
    with pytest.raises(error, match=message):
        optim.apply_in_backward(layer, optim.SGD, **arguments)
    assert not layer.weight._backward_hooks
    assert not layer._forward_pre_hooks


# Gradient accumulation.


@every_kind
@every_optimizer
@every_dtype
@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaled"])
def test_micro_steps_are_one_update(kind, optimizer_class, dtype, scaled):
    """The same as one step by what several backwards left in .grad; small integers, so that 16 bit hold the sums."""
    summed, plain = twins(kind, dtype)
    scaler = cpu_scaler(2.0**5, enabled=scaled)
    updates = optim.apply_in_backward(summed, optimizer_class, lr=0.5, micro_steps=3, scaler=scaler)
    optimizer = optimizer_class(plain.parameters(), lr=0.5)
    for _ in range(2):
        before = summed.weight.detach().clone()
        for factor in (1.0, 2.0, 3.0):
            assert same_bits(summed.weight, before)
            scaler.scale(summed(factor)).backward()
            assert summed.weight.grad is None
            # A loop may keep both.
            updates.optimizer.step()
            summed.zero_grad()
        plain.weight.grad = gradient_of_all(plain, (1.0, 2.0, 3.0))
        optimizer.step()
    assert same_bits(summed.weight, plain.weight)
    assert_same_state(updates.optimizer, optimizer)


def test_every_table_is_updated_by_the_last_micro_step():
    """Also one that only earlier ones reached; a backward that reaches none does not count."""
    first, second, third = model = torch.nn.ModuleList([one_table() for _ in range(3)])
    other = torch.nn.Linear(1, 1)
    updates = optim.apply_in_backward(model, optim.SGD, lr=1.0, micro_steps=2)
    look_up(first, 0).backward()
    other(torch.ones(1)).sum().backward()
    assert not first.weight.any()
    (look_up(second, 1) + look_up(second, 1)).backward()
    assert first.weight[:, 0].tolist() == [-1, 0, 0]
    assert second.weight[:, 0].tolist() == [0, -2, 0]
    assert third.weight not in updates.optimizer.state
    (look_up(first, 0) + look_up(third, 2)).backward()
    assert first.weight[0].item() == -1
    assert not third.weight.any()
    look_up(third, 2).backward()
    assert first.weight[0].item() == -2
    assert third.weight[2].item() == -2


def test_an_epoch_may_end_between_two_updates():
    """What is there is applied, once, and the next epoch counts from one."""
    layer = one_table()
    updates = optim.apply_in_backward(layer, optim.SGD, lr=1.0, micro_steps=2)
    for expected in (0, -2, -2):
        look_up(layer, 1).backward()
        assert layer.weight[1].item() == expected
    for _ in range(2):
        updates.finish()
        assert layer.weight[1].item() == -3
    for expected in (-3, -5):
        look_up(layer, 1).backward()
        assert layer.weight[1].item() == expected
    assert state_of(updates.optimizer)["step"] == 3


def test_each_micro_step_is_divided_by_its_own_scale():
    layer = one_table()
    scaler = cpu_scaler()
    optim.apply_in_backward(layer, optim.SGD, lr=1.0, micro_steps=2, scaler=scaler)
    for scale in (2.0**3, 2.0**9):
        scaler.scale(look_up(layer, 1)).backward()
        scaler.update(scale)
    assert layer.weight[1].item() == -2


@pytest.mark.parametrize("overflow_at", [0, 1])
def test_one_micro_step_that_is_not_finite_drops_its_update(overflow_at):
    layer = one_table()
    scaler = cpu_scaler()
    updates = optim.apply_in_backward(layer, optim.Adam, lr=1.0, micro_steps=2, scaler=scaler)
    for number in range(2):
        factor = float("inf") if number == overflow_at else 1.0
        scaler.scale(factor * look_up(layer, 1)).backward()
    scaler.update()
    assert scaler.get_scale() == 2.0**6
    assert not layer.weight.any()
    assert state_of(updates.optimizer)["step"] == 0
    for _ in range(2):
        scaler.scale(look_up(layer, 1)).backward()
    assert layer.weight[1].item() == pytest.approx(-1)
    assert state_of(updates.optimizer)["step"] == 1


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaled"])
def test_what_is_left_when_updates_are_removed_is_in_grad(kind, dtype, scaled):
    summed, plain = twins(kind, dtype)
    scaler = cpu_scaler(2.0**5, enabled=scaled)
    updates = optim.apply_in_backward(summed, optim.SGD, lr=1.0, micro_steps=4, scaler=scaler)
    for factor in (1.0, 2.0):
        scaler.scale(summed(factor)).backward()
    updates.remove()
    expected = gradient_of_all(plain, (1.0, 2.0))
    assert type(summed.weight.grad) is type(expected)
    assert summed.weight.grad.dtype == dtype
    assert torch.equal(summed.weight.grad.to_dense(), expected.to_dense())
    updates.remove()
    assert torch.equal(summed.weight.grad.to_dense(), expected.to_dense())


def test_a_dense_gradient_is_refused_in_its_own_micro_step():
    layer = one_table()
    optim.apply_in_backward(layer, optim.SGD, lr=1.0, micro_steps=4)
    with pytest.raises(RuntimeError, match="does not support dense gradients"):
        layer.weight.sum().backward()
    assert layer.weight.grad is None


# What is one update, and what is none.


@pytest.mark.parametrize("kind", ["table", "uniform", "mixed"])
def test_several_lookups_in_one_backward_are_one_update(kind):
    """Adam's first step by the sum differs from two of its steps."""
    updated, stepped = twins(kind)
    updates = optim.apply_in_backward(updated, optim.Adam, lr=0.5)
    optimizer = optim.Adam(stepped.parameters(), lr=0.5)
    for tables in (updated, stepped):
        (tables() + tables(2.0)).backward()
    optimizer.step()
    assert same_bits(updated.weight, stepped.weight)
    assert state_of(updates.optimizer)["step"] == 1


@pytest.mark.parametrize("kind", ["table", "uniform", "mixed"])
def test_two_backwards_of_one_graph_are_two_updates(kind):
    updated, stepped = twins(kind)
    updates = optim.apply_in_backward(updated, optim.Adagrad, lr=0.5)
    optimizer = optim.Adagrad(stepped.parameters(), lr=0.5)
    losses = updated(), stepped()
    for retain_graph in (True, False):
        for loss in losses:
            loss.backward(retain_graph=retain_graph)
        optimizer.step()
        optimizer.zero_grad()
    assert same_bits(updated.weight, stepped.weight)
    assert state_of(updates.optimizer)["step"] == 2


@pytest.mark.parametrize("kind", ["table", "uniform", "mixed"])
@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaled"])
def test_autograd_grad_and_frozen_tables_update_nothing(kind, scaled):
    tables = Tables(kind)
    scaler = cpu_scaler(enabled=scaled)
    updates = optim.apply_in_backward(tables, optim.SGD, lr=1.0, scaler=scaler, micro_steps=2)
    before = tables.weight.detach().clone()
    for _ in range(2):
        (grad,) = torch.autograd.grad(scaler.scale(tables()), tables.weight)
        assert grad.to_dense().any()
    tables.weight.requires_grad_(False)
    for _ in range(2):
        scale = torch.ones((), requires_grad=True)
        (scaler.scale(tables()) * scale).backward()
    assert same_bits(tables.weight, before)
    assert not updates.optimizer.state
    tables.weight.requires_grad_()
    scaler.scale(tables()).backward()
    assert same_bits(tables.weight, before)
    scaler.scale(tables()).backward()
    assert not same_bits(tables.weight, before)


def test_autograd_grad_in_a_backward_is_no_nested_backward():
    """Only `backward()` is: it would have updated the table."""

    class Penalty(torch.autograd.Function):
        @staticmethod
        def forward(ctx, values, layer):
            ctx.layer = layer
            return values.clone()

        @staticmethod
        def backward(ctx, grad_output):
            with torch.enable_grad():
                torch.autograd.grad(look_up(ctx.layer, 1), ctx.layer.weight)
            return grad_output, None

    layer = one_table()
    optim.apply_in_backward(layer, optim.SGD, lr=1.0)
    Penalty.apply(layer(torch.tensor([1])), layer).sum().backward()
    assert layer.weight[:, 0].tolist() == [0, -1, 0]


@pytest.mark.parametrize("micro_steps", [1, 2])
def test_schedulers_see_the_updates(micro_steps):
    """Without an optimizer.step() in the loop, and without torch's warning that there was none."""
    layer = one_table()
    updates = optim.apply_in_backward(layer, optim.SGD, lr=1.0, micro_steps=micro_steps)
    schedule = torch.optim.lr_scheduler.StepLR(updates.optimizer, 1, gamma=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            for _ in range(micro_steps):
                look_up(layer, 1).backward()
            schedule.step()
    assert layer.weight[1].item() == -1.75 * micro_steps


def test_schedulers_before_the_first_update_are_still_warned_of():
    updates = optim.apply_in_backward(one_table(), optim.SGD, lr=1.0)
    schedule = torch.optim.lr_scheduler.StepLR(updates.optimizer, 1)
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        schedule.step()


# Reentrant checkpoints.


class Twice(torch.nn.Module):
    """Looks up in a table, and again in each of two checkpoints, which depend on what comes before."""

    def __init__(self, kind, use_reentrant, outside):
        super().__init__()
        self.tables = Tables(kind)
        self.use_reentrant = use_reentrant
        self.outside = outside

    def forward(self):
        value = torch.ones((), requires_grad=True)
        for _ in range(2):
            value = self.run(value)
        return value + self.tables() if self.outside else value

    def run(self, value):
        def segment(value):
            return value * (self.tables() + 1)

        if self.use_reentrant is None:
            return segment(value)
        return checkpoint(segment, value, use_reentrant=self.use_reentrant)


@pytest.mark.parametrize("kind", ["table", "uniform", "mixed"])
@pytest.mark.parametrize("outside", [False, True])
def test_reentrant_checkpoints_are_refused_before_a_table_moves(kind, outside):
    """Where the layer looks up, so that a lookup outside of the checkpoint has moved nothing either."""
    model = Twice(kind, True, outside)
    updates = optim.apply_in_backward(model, optim.SGD, lr=1.0)
    before = model.tables.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"lookup under.*use_reentrant=False"):
        model().backward()
    assert same_bits(model.tables.weight, before)
    assert not updates.optimizer.state
    # No gradient, no checkpoint: as in validation.
    with torch.no_grad():
        model.tables()
    updates.remove()
    model().backward()
    assert model.tables.weight.grad is not None


@pytest.mark.parametrize("kind", ["table", "uniform", "mixed"])
@pytest.mark.parametrize("micro_steps", [1, 2])
def test_nested_backwards_are_refused_before_a_table_moves(kind, micro_steps):
    """Tables that are given as parameters are looked up unseen."""
    model = Twice(kind, True, False)
    updates = optim.apply_in_backward(
        list(model.parameters()), optim.SGD, lr=1.0, micro_steps=micro_steps
    )
    before = model.tables.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"backward inside of another.*use_reentrant=False"):
        model().backward()
    assert same_bits(model.tables.weight, before)
    assert model.tables.weight.grad is None
    assert not updates.optimizer.state


@pytest.mark.parametrize("kind", ["table", "uniform", "mixed"])
@pytest.mark.parametrize("by_module", [False, True])
def test_checkpoints_that_are_not_reentrant_change_nothing(kind, by_module):
    model, plain = Twice(kind, False, True), Twice(kind, None, True)
    for one in (model, plain):
        optim.apply_in_backward(one if by_module else list(one.parameters()), optim.SGD, lr=0.5)
        one().backward()
    assert same_bits(model.tables.weight, plain.tables.weight)


def test_a_checkpoint_behind_the_tables_is_none_of_theirs():
    """The usual transformer: reentrant blocks, with the table before them."""
    layer = one_table()
    optim.apply_in_backward(layer, optim.SGD, lr=1.0)
    rows = layer(torch.tensor([1, 1]))
    for _ in range(2):
        rows = checkpoint(lambda rows: 3 * rows, rows, use_reentrant=True)
    rows.sum().backward()
    assert layer.weight[1].item() == -18


def test_copies_of_a_layer_are_not_updated_and_not_refused():
    """A module's hooks are copied and saved with it, and those of its parameters are not."""
    layer = one_table()
    optim.apply_in_backward(layer, optim.SGD, lr=1.0)
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    for copied in (copy.deepcopy(layer), torch.load(stream, weights_only=False)):
        value = torch.ones((), requires_grad=True)
        result = checkpoint(
            lambda value, one=copied: value * look_up(one, 1), value, use_reentrant=True
        )
        result.backward()
        assert copied.weight.grad is not None
        assert not copied.weight.any()


# DistributedDataParallel.


class Recommender(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = one_table()
        self.dense = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.ones_(self.dense.weight)

    def forward(self, indices):
        return self.dense(self.table(indices)).sum() + self.table(indices).sum()


def ddp_given_a_wrapped_module(rank, world_size):
    model = Recommender()
    wrapped = DistributedDataParallel(model)
    for given in (wrapped, model, [model.table.weight]):
        with pytest.raises(RuntimeError, match="DistributedDataParallel averages"):
            optim.apply_in_backward(given, optim.SGD, lr=1.0)
        assert not model.table.weight._backward_hooks


def ddp_wrapped_afterwards(rank, world_size):
    model = Recommender()
    updates = optim.apply_in_backward(model, optim.SGD, lr=1.0)
    wrapped = DistributedDataParallel(model)
    with pytest.raises(RuntimeError, match="_ddp_params_and_buffers_to_ignore"):
        wrapped(torch.tensor([rank])).backward()
    assert not model.table.weight.any()
    assert not updates.optimizer.state


def ddp_without_the_table(rank, world_size):
    model = Recommender()
    model._ddp_params_and_buffers_to_ignore = ["table.weight"]
    optim.apply_in_backward(model, optim.SGD, lr=1.0)
    wrapped = DistributedDataParallel(model)
    wrapped(torch.tensor([rank])).backward()
    assert model.table.weight[:, 0].tolist() == [-2.0 * (row == rank) for row in range(3)]


def ddp_and_steps(rank, world_size):
    model = Recommender()
    wrapped = DistributedDataParallel(model)
    optimizer = optim.SGD([model.table.weight], lr=1.0)
    wrapped(torch.tensor([rank])).backward()
    optimizer.step()
    expected = [-2.0 / world_size if row < world_size else 0.0 for row in range(3)]
    assert model.table.weight[:, 0].tolist() == expected


def in_ddp(rank, world_size, store):
    """One process, whose ids are others than the other's."""
    torch.distributed.init_process_group(
        "gloo",
        store=torch.distributed.FileStore(store, world_size),
        rank=rank,
        world_size=world_size,
    )
    ddp_given_a_wrapped_module(rank, world_size)
    ddp_wrapped_afterwards(rank, world_size)
    ddp_without_the_table(rank, world_size)
    ddp_and_steps(rank, world_size)
    torch.distributed.barrier()
    # A backward that raised leaves gloo's threads at work, and now and then they abort an ordinary exit.
    os._exit(0)


@pytest.mark.full
@pytest.mark.parametrize("world_size", [1, 2])
def test_no_replica_under_ddp_moves_alone(tmp_path, world_size):
    """Nor under what the message says to do instead."""
    torch.multiprocessing.spawn(in_ddp, (world_size, str(tmp_path / "store")), nprocs=world_size)


@pytest.mark.full
@pytest.mark.parametrize("result_is_kept", [False, True])
def test_tables_and_what_they_hold_are_freed(result_is_kept):
    """Also what a scaler and micro steps keep: nobody but the table holds its updates."""
    layer = one_table()
    scaler = cpu_scaler()
    updates = optim.apply_in_backward(layer, optim.SGD, lr=1.0, micro_steps=2, scaler=scaler)
    if not result_is_kept:
        del updates
    scaler.scale(look_up(layer, 1)).backward()
    gc.collect()
    scaler.scale(look_up(layer, 1)).backward()
    assert layer.weight[1].item() == -2
    weight = weakref.ref(layer.weight)
    updates = None
    del layer
    gc.collect()
    assert weight() is None


def test_updates_compile_as_before():
    """Without a break in the graph of the forward pass."""
    layer = one_table()
    optim.apply_in_backward(layer, optim.SGD, lr=1.0)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    compiled(torch.tensor([1])).sum().backward()
    assert layer.weight[:, 0].tolist() == [0, -1, 0]
    with torch.no_grad():
        compiled(torch.tensor([1]))


def test_batched_layers_take_one_scaler_for_all_their_tables():
    layer = gpu_embed.TableBatchedEmbedding({"user": (2, 3), "item": (2, 3)}, sparse=True)
    before = layer.weight.detach().clone()
    scaler = cpu_scaler()
    groups = [{"params": layer.parameters_of(name), "lr": 1.0} for name in ("user", "item")]
    updates = optim.apply_in_backward(groups, optim.SGD, scaler=scaler)
    output = layer(torch.tensor([0, 1]), torch.tensor([0, 1, 2]))
    scaler.scale(float("nan") * output.sum()).backward()
    assert same_bits(layer.weight, before)
    assert [state["step"] for state in updates.optimizer.state.values()] == [0, 0]


# What came up in use.


@pytest.mark.parametrize("how", ["in backward", "scaler.step"])
@pytest.mark.parametrize("unread", ["an empty bag", "padding alone"])
def test_values_that_no_row_reads_do_not_stop_a_scaled_loop(how, unread):
    """The square root's gradient at the zeros of an empty bag is infinite, and no row's."""
    sizes = {"a": (5, 2), "b": (5, 3)}
    padding = 4 if unread == "padding alone" else None
    layer = gpu_embed.TableBatchedEmbeddingBag(sizes, padding_idx=padding, sparse=True)
    with torch.no_grad():
        layer.weight.fill_(4.0)
    before = layer.weight.detach().clone()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    if how == "in backward":
        optim.apply_in_backward(layer, optim.SGD, lr=0.1, scaler=scaler)
    else:
        optimizer = optim.SGD(layer.parameters(), lr=0.1)
    ids, offsets = torch.tensor([0, 1, 4]), torch.tensor([0, 2, 2, 2, 3])
    if unread == "an empty bag":
        ids, offsets = torch.tensor([0, 1, 2]), torch.tensor([0, 2, 2, 3, 3])
    scaler.scale(layer(ids, offsets).sqrt().sum()).backward()
    if how == "scaler.step":
        scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 8.0
    assert layer.weight.isfinite().all()
    assert not torch.equal(layer.weight, before)


def test_a_first_step_that_is_dropped_is_not_the_one_without_dampening():
    weight = torch.randn(3, 2)
    table = gpu_embed.Embedding(3, 2, sparse=True, _weight=weight.clone())
    dense = torch.nn.Embedding(3, 2, _weight=weight.clone())
    arguments = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    theirs = torch.amp.GradScaler("cpu", init_scale=4.0)
    optim.apply_in_backward(table, optim.SGD, scaler=scaler, **arguments)
    optimizer = torch.optim.SGD(dense.parameters(), **arguments)
    ids = torch.arange(3)
    for factor in (float("inf"), 1.0, 2.0, float("inf"), 3.0):
        scaler.scale((table(ids) * factor).sum()).backward()
        scaler.update()
        theirs.scale((dense(ids) * factor).sum()).backward()
        theirs.step(optimizer)
        theirs.update()
        optimizer.zero_grad()
        torch.testing.assert_close(table.weight, dense.weight, rtol=1e-6, atol=1e-6)


def test_what_a_failed_backward_left_is_discarded():
    """Of two backwards an update, one fails: the next two are an update again, and of their own gradients."""
    table = gpu_embed.Embedding(3, 2, sparse=True)
    updates = optim.apply_in_backward(table, optim.SGD, lr=1.0, micro_steps=2)
    before = table.weight.detach().clone()
    ids = torch.arange(3)
    (100 * table(ids)).sum().backward()
    updates.discard()
    table(ids).sum().backward()
    assert torch.equal(table.weight, before)
    table(ids).sum().backward()
    torch.testing.assert_close(table.weight.detach(), before - 2)


def test_a_copy_of_the_updates_updates_nothing():
    """A model may keep them as an attribute, and be copied or pickled."""
    table = gpu_embed.Embedding(3, 2, sparse=True)
    table.updates = optim.apply_in_backward(table, optim.SGD, lr=1.0)
    for copied in (copy.deepcopy(table), pickle.loads(pickle.dumps(table))):
        before = copied.weight.detach().clone()
        assert copied.updates.optimizer.param_groups[0]["params"][0] is copied.weight
        copied(torch.arange(3)).sum().backward()
        assert torch.equal(copied.weight, before)
        copied.updates.remove()
    before = table.weight.detach().clone()
    table(torch.arange(3)).sum().backward()
    assert not torch.equal(table.weight, before)


# Whose memory a sparse gradient reads.


def lookup_of(kind):
    """A table of zeros [5, 4], and its lookup of rows 1, 4, 4."""
    if kind == "batched":
        layer = gpu_embed.TableBatchedEmbedding({"only": (5, 4)}, sparse=True)
        offsets = (torch.arange(4),)
    else:
        layer, offsets = Embedding(5, 4, sparse=True), ()
    torch.nn.init.zeros_(layer.weight)
    ids = torch.tensor([1, 4, 4])
    return layer, ids, lambda: layer(ids, *offsets)


def spy_on_updates(monkeypatch):
    """The ids and values that the backend is given, in a list that fills."""
    backend = gpu_embed.backends.select(torch.device("cpu"))
    given, update = [], backend.row_update_

    def row_update_(settings, weight, state, indices, values, rows):
        given.append((indices, values))
        update(settings, weight, state, indices, values, rows)

    monkeypatch.setattr(backend, "row_update_", row_update_)
    return given


def test_an_update_in_backward_copies_no_gradient(monkeypatch):
    layer, ids, look_up = lookup_of("embedding")
    given = spy_on_updates(monkeypatch)
    optim.apply_in_backward(layer, optim.SGD, lr=1.0)
    grad_output = torch.arange(12.0).view(3, 4)
    look_up().backward(grad_output)
    ((indices, values),) = given
    assert indices.data_ptr() == ids.data_ptr()
    assert values.data_ptr() == grad_output.data_ptr()
    expected = torch.zeros(5, 4).index_add_(0, ids, grad_output)
    assert torch.equal(layer.weight, -expected)


KEEPERS = ("grad", "micro_steps", "removed", "autograd.grad", "a hook")


@pytest.mark.parametrize("keeper", KEEPERS)
@pytest.mark.parametrize("kind", ["embedding", "batched"])
def test_a_gradient_that_stays_has_memory_of_its_own(kind, keeper):
    """What a caller writes into ids and output gradients after a backward changes no gradient, as it does in torch."""
    layer, ids, look_up = lookup_of(kind)
    weight, kept = layer.weight, []
    if keeper != "grad":
        micro_steps = 2 if keeper == "micro_steps" else 1
        updates = optim.apply_in_backward(layer, optim.SGD, lr=1.0, micro_steps=micro_steps)
    if keeper == "removed":
        updates.remove()
    if keeper == "a hook":
        weight.register_hook(kept.append)
    output = look_up()
    grad_output = torch.arange(12.0).view(3, 4)
    expected = torch.zeros(5, 4).index_add_(0, ids, grad_output)
    if keeper == "autograd.grad":
        kept += torch.autograd.grad(output, weight, grad_output)
    else:
        output.backward(grad_output)
    grad_output.fill_(9)
    ids.zero_()
    if keeper == "micro_steps":
        updates.finish()
        assert torch.equal(weight, -expected)
    else:
        grad = kept[0] if kept else weight.grad
        assert torch.equal(grad.to_dense(), expected)


def test_tables_whose_outputs_are_added_are_unscaled_once():
    """Both have the same gradient, and a scaler divides the entries of each where they lie."""
    layers = [Embedding(5, 4, sparse=True) for _ in range(2)]
    ids = torch.tensor([1, 4, 4])
    scaler = cpu_scaler(4.0)
    scaler.scale((layers[0](ids) + layers[1](ids)).sum()).backward()
    scaler.unscale_(torch.optim.SGD([layer.weight for layer in layers], lr=1.0))
    for layer in layers:
        assert torch.equal(layer.weight.grad._values(), torch.ones(3, 4))


def test_a_gradient_with_one_element_for_all_is_applied():
    """`.sum()` hands out an expanded one."""
    layer, ids, look_up = lookup_of("embedding")
    optim.apply_in_backward(layer, optim.SGD, lr=1.0)
    look_up().sum().backward()
    assert torch.equal(layer.weight, -torch.bincount(ids, minlength=5)[:, None].expand(5, 4))
