"""Row-wise optimizers on batched tables: the whole buffer at once, and tables with hyperparameters of their own."""

import copy
import pickle

import pytest
import torch
from cases import same_bits
from table_cases import integer_layer, integers, random_input
from tiers import where

import gpu_embed
from gpu_embed import backends, optim
from gpu_embed.backends._triton import row_update as triton_row_update
from gpu_embed.backends._triton import tables as triton_tables
from gpu_embed.tables.parameter import TableSlice

SIZES = {"user": (7, 4), "item": (3, 4), "shop": (5, 4)}
# Rows of an odd number of elements, and what lies between tables that are no multiple of 8 of them.
MIXED = {"user": (7, 3), "item": (3, 12), "shop": (5, 5)}
MODES = {"item": "mean", "shop": "max"}
every_size = pytest.mark.parametrize("sizes", [SIZES, MIXED], ids=["uniform", "mixed"])
OPTIMIZERS = {
    "SGD": lambda params, **arguments: optim.SGD(params, **{"lr": 0.5, **arguments}),
    "SGD, momentum": lambda params, **arguments: optim.SGD(
        params,
        **{"lr": 0.5, "momentum": 0.9, "dampening": 0.3, "decay_touched_rows": 0.1, **arguments},
    ),
    "SGD, nesterov": lambda params, **arguments: optim.SGD(
        params, **{"lr": 0.5, "momentum": 0.9, "nesterov": True, **arguments}
    ),
    "Adagrad": lambda params, **arguments: optim.Adagrad(params, **{"lr": 0.5, **arguments}),
    "RowWiseAdagrad": lambda params, **arguments: optim.RowWiseAdagrad(
        params, **{"lr": 0.5, **arguments}
    ),
    "Adam": lambda params, **arguments: optim.Adam(params, **{"lr": 0.5, **arguments}),
    "AdamW": lambda params, **arguments: optim.AdamW(params, **{"lr": 0.5, **arguments}),
}
every_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
# One that sees a row as a whole, and one that does not.
two_optimizers = pytest.mark.parametrize(
    "make", [OPTIMIZERS["RowWiseAdagrad"], OPTIMIZERS["Adam"]], ids=["RowWiseAdagrad", "Adam"]
)


def sparse_layer(target=None, sizes=SIZES, **arguments):
    device = "cpu" if target is None else target.device
    return integer_layer(sizes, device, sparse=True, mode=MODES, **arguments)


class Largest(torch.nn.Module):
    """One table of mode "max", which EmbeddingBag has no sparse gradient for."""

    def __init__(self, module):
        super().__init__()
        self.table = gpu_embed.TableBatchedEmbeddingBag.from_modules([module])

    @property
    def weight(self):
        return self.table.weight

    def forward(self, ids, offsets):
        return self.table(ids, torch.cat([offsets, offsets.new_full((1,), len(ids))]))


def one_by_one(layer):
    """A layer for each table, and what makes of their outputs that of the batched one."""
    modules = layer.to_modules()
    for name, module in modules.items():
        if module.mode == "max":
            modules[name] = Largest(module)

    def look_up(ids, offsets):
        num_bags = (len(offsets) - 1) // len(modules)
        outputs = []
        for number, module in enumerate(modules.values()):
            begins = offsets[number * num_bags : (number + 1) * num_bags + 1]
            outputs.append(module(ids[begins[0] : begins[-1]], begins[:-1] - begins[0]))
        return torch.cat(outputs, 1)

    return modules, look_up


def train(optimizers, look_up, batches):
    """One step a batch."""
    for number, (ids, offsets) in enumerate(batches):
        for optimizer in optimizers:
            optimizer.zero_grad()
        output = look_up(ids, offsets)
        output.backward(integers(*output.shape, seed=number).to(output))
        for optimizer in optimizers:
            optimizer.step()


def batches_of(layer):
    return [random_input(layer, num_bags) for num_bags in (3, 1)]


def assert_equal(layer, modules):
    for name, rows in layer.items():
        assert torch.equal(rows, modules[name].weight), name


@every_size
@every_optimizer
def test_one_update_of_the_buffer_is_one_of_each_table(target, make, sizes):
    """Bit for bit, over two steps: a row's update depends on the row alone."""
    layer = sparse_layer(target, sizes, padding_idx=0)
    modules, look_up = one_by_one(layer)
    batches = batches_of(layer)
    before = layer.weight.detach().clone()
    train([make(layer.parameters())], layer, batches)
    train([make(modules.parameters())], look_up, batches)
    assert not torch.equal(layer.weight, before)
    assert_equal(layer, modules)


def test_torchs_own_sparse_optimizer_takes_the_gradient():
    layer = sparse_layer()
    modules, look_up = one_by_one(layer)
    batches = batches_of(layer)
    train([torch.optim.SparseAdam(layer.parameters(), lr=0.5)], layer, batches)
    train([torch.optim.SparseAdam(modules.parameters(), lr=0.5)], look_up, batches)
    assert_equal(layer, modules)


# Tables with hyperparameters of their own.


@pytest.mark.full
@every_size
@every_optimizer
def test_param_groups_by_table(target, make, sizes):
    """Each group its own hyperparameters; a table in no group stays as it is."""
    layer = sparse_layer(target, sizes)
    modules, look_up = one_by_one(layer)
    batches = batches_of(layer)
    groups = [
        {"params": layer.parameters_of("shop"), "lr": 0.25},
        {"params": layer.parameters_of("user"), "lr": 2.0},
    ]
    train([make(groups)], layer, batches)
    groups = [
        {"params": modules["shop"].parameters(), "lr": 0.25},
        {"params": modules["user"].parameters(), "lr": 2.0},
    ]
    modules["item"].requires_grad_(False)
    train([make(groups)], look_up, batches)
    assert_equal(layer, modules)


def test_an_optimizer_for_each_table():
    """A table may have another formula than the next."""
    layer = sparse_layer()
    modules, look_up = one_by_one(layer)
    batches = batches_of(layer)
    kinds = list(zip(("user", "item", "shop"), (optim.Adam, optim.SGD, optim.Adagrad), strict=True))
    train([kind(layer.parameters_of(name), lr=0.5) for name, kind in kinds], layer, batches)
    train([kind(modules[name].parameters(), lr=0.5) for name, kind in kinds], look_up, batches)
    assert_equal(layer, modules)


def test_neighbours_of_different_widths_are_one_parameter():
    layer = sparse_layer(sizes=MIXED)
    (both,) = layer.parameters_of("shop", "item")
    assert both.data_ptr() == layer["item"].data_ptr()
    assert both.numel() == 3 * 12 + 4 + 5 * 5 + 7
    first, last = layer.parameters_of("shop", "user")
    assert torch.equal(first, layer["user"])
    assert torch.equal(last, layer["shop"])


def test_neighbours_are_one_parameter():
    layer = sparse_layer()
    (both,) = layer.parameters_of("item", "user")
    assert torch.equal(both, layer.weight[:10])
    assert both.data_ptr() == layer.weight.data_ptr()
    assert [len(rows) for rows in layer.parameters_of("shop", "user")] == [7, 5]
    with pytest.raises(ValueError, match="name at least one table"):
        layer.parameters_of()
    with pytest.raises(KeyError, match="nobody"):
        layer.parameters_of("nobody")
    with pytest.raises(ValueError, match="sparse=True"):
        integer_layer(SIZES).parameters_of("user")


@every_size
def test_schedulers_and_state_dicts_know_the_tables(sizes):
    layer, other = sparse_layer(sizes=sizes), sparse_layer(sizes=sizes)
    batches = batches_of(layer)

    def make(layer):
        return optim.Adam(
            [
                {"params": layer.parameters_of("user", "item"), "lr": 0.5},
                {"params": layer.parameters_of("shop"), "lr": 0.25},
            ]
        )

    optimizer, restored = make(layer), make(other)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    train([optimizer], layer, batches)
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.125]
    other.load_state_dict(layer.state_dict())
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train([optimizer], layer, batches)
    train([restored], other, batches)
    assert torch.equal(layer.weight, other.weight)


@every_size
def test_rows_in_two_parameters_are_refused(sizes):
    layer = sparse_layer(sizes=sizes)
    optimizer = optim.SGD(layer.parameters_of("user"), lr=1.0)
    for params in (layer.parameters_of("user"), list(layer.parameters())):
        with pytest.raises(ValueError, match="some rows appear in more than one parameter"):
            optimizer.add_param_group({"params": params})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": layer.parameters_of("item")})


@every_size
def test_the_gradient_of_some_rows(sizes):
    """Read by other code than ours, it is the whole's part."""
    layer = sparse_layer(sizes=sizes)
    (item,) = layer.parameters_of("item")
    assert item.grad is None
    ids, offsets = torch.tensor([6, 2, 0, 2]), torch.tensor([0, 1, 3, 4])
    layer(ids, offsets).sum().backward()
    dense = layer.weight.grad.to_dense()
    assert item.grad.shape == item.shape
    assert torch.equal(item.grad.to_dense(), layer.layout.view(dense, 1))
    assert item.grad.to_dense().any(1).tolist() == [True, False, True]
    layer.weight.grad = dense
    assert torch.equal(item.grad, layer.layout.view(dense, 1))
    for refused in (torch.ones_like(item), torch.zeros(2, 2), torch.zeros_like(item).to_sparse()):
        with pytest.raises(ValueError, match="part of the whole"):
            item.grad = refused
    item.grad = None
    assert layer.weight.grad is None


@every_size
def test_dense_zeros_are_the_gradient_of_some_rows_alone(sizes):
    """As a table's own gradient they would be refused at the step, and the whole's is still there."""
    layer = sparse_layer(sizes=sizes)
    item, user = *layer.parameters_of("item"), *layer.parameters_of("user")
    layer(*random_input(layer, 3)).sum().backward()
    grad = layer.weight.grad
    zeros = item.grad = torch.zeros_like(item)
    assert item.grad is zeros
    assert layer.weight.grad is grad
    before = layer.weight.detach().clone()
    with pytest.raises(RuntimeError, match="does not support dense gradients"):
        optim.SGD([item], lr=1.0).step()
    optimizer = optim.Adagrad([item], lr=0.0)
    optimizer.step()
    assert torch.equal(layer.weight, before)
    assert optimizer.state[item]["step"] == 0
    optim.SGD([user], lr=1.0).step()
    assert torch.equal(layer["item"], layer.layout.view(before, 1))
    assert not torch.equal(layer["user"], layer.layout.view(before, 0))
    optimizer.zero_grad()
    assert item.grad is None
    assert layer.weight.grad is None


def test_a_copied_optimizer_updates_its_own_tables():
    layer = sparse_layer(sizes=MIXED)
    (item,) = layer.parameters_of("item")
    for copied, item_copy in (
        copy.deepcopy((layer, item)),
        pickle.loads(pickle.dumps((layer, item))),
    ):
        assert isinstance(item_copy, TableSlice)
        assert item_copy.parent is copied.weight
        assert item_copy.data_ptr() == copied["item"].data_ptr()
    batches = batches_of(layer)
    for whole in (True, False):
        layer = sparse_layer(sizes=MIXED)
        params = layer.parameters() if whole else layer.parameters_of("item", "shop")
        optimizer = optim.Adagrad(params, lr=0.5)
        train([optimizer], layer, batches[:1])
        twins = copy.deepcopy((layer, optimizer)), pickle.loads(pickle.dumps((layer, optimizer)))
        train([optimizer], layer, batches[1:])
        for copied, copied_optimizer in twins:
            train([copied_optimizer], copied, batches[1:])
            assert torch.equal(copied.weight, layer.weight)


def test_an_optimizer_copied_without_its_layer_says_so():
    layer = sparse_layer(sizes=MIXED)
    optimizer = copy.deepcopy(optim.SGD(layer.parameters(), lr=1.0))
    layer(*random_input(layer, 2)).sum().backward()
    copied = optimizer.param_groups[0]["params"][0]
    copied.grad = layer.weight.grad
    with pytest.raises(RuntimeError, match="was copied without its layer"):
        optimizer.step()
    # No step was counted.
    assert not optimizer.state[copied]


@every_size
def test_tables_are_found_where_their_layer_has_moved(sizes):
    """`layer.to(...)` gives the parameter other memory, in which its tables still are."""
    layer, expected = sparse_layer(sizes=sizes), sparse_layer(sizes=sizes).double()
    optimizer = optim.Adagrad(layer.parameters_of("item", "shop"), lr=0.5)
    layer.double()
    batches = batches_of(layer)
    train([optimizer], layer, batches)
    train([optim.Adagrad(expected.parameters_of("item", "shop"), lr=0.5)], expected, batches)
    assert torch.equal(layer.weight, expected.weight)


@every_size
def test_state_is_loaded_in_the_dtype_that_the_layer_has_by_then(sizes):
    saved_layer = sparse_layer(sizes=sizes).double()
    saved = optim.Adam(saved_layer.parameters_of("item", "shop"), lr=0.3)
    train([saved], saved_layer, batches_of(saved_layer))
    layer = sparse_layer(sizes=sizes)
    tables = layer.parameters_of("item", "shop")
    optimizer = optim.Adam(tables)
    layer.double()
    optimizer.load_state_dict(saved.state_dict())
    for param, of_saved in zip(tables, saved.param_groups[0]["params"], strict=True):
        assert same_bits(optimizer.state[param]["exp_avg"], saved.state[of_saved]["exp_avg"])


def test_loaded_state_lies_anywhere_in_memory(target):
    """As what is cut out of a larger checkpoint does."""
    sizes = {"user": (7, 4), "item": (3, 12)}
    layers = [integer_layer(sizes, target.device, sparse=True) for _ in range(2)]
    optimizer, shifted = (optim.Adam(layer.parameters(), lr=0.1) for layer in layers)
    batches = batches_of(layers[0])
    for layer, one in zip(layers, (optimizer, shifted), strict=True):
        train([one], layer, batches)
    saved = copy.deepcopy(optimizer.state_dict())
    for name in sizes:
        for kind in ("exp_avg", "exp_avg_sq"):
            value = saved["state"][0][f"{kind}.{name}"]
            far = torch.cat([value.new_zeros(1), value.view(-1)])[1:]
            saved["state"][0][f"{kind}.{name}"] = far.view_as(value)
    shifted.load_state_dict(saved)
    for layer, one in zip(layers, (optimizer, shifted), strict=True):
        train([one], layer, batches)
    assert torch.equal(layers[0].weight, layers[1].weight)


@every_size
def test_a_batch_of_padding_alone_moves_no_row(sizes):
    """Adam would move one that has a gradient of zeros, and AdamW make it smaller."""
    layer = sparse_layer(sizes=sizes, padding_idx=2)
    optimizer = optim.AdamW(layer.parameters(), lr=0.5)
    train([optimizer], layer, batches_of(layer))
    before = layer.weight.detach().clone()
    train([optimizer], layer, [(torch.full((6,), 2), torch.arange(7))])
    assert torch.equal(layer.weight, before)
    assert optimizer.state[layer.weight]["step"] == 3


@every_size
@pytest.mark.parametrize("factor", [1.0, torch.inf])
def test_a_grad_scaler_unscales_the_gradients_of_tables(sizes, factor):
    """Each once, whatever the groups, and a step with a number that is not finite is left out."""
    layer, plain = sparse_layer(sizes=sizes), sparse_layer(sizes=sizes)
    ids, offsets = random_input(layer, 3)
    optimizer = optim.SGD(
        [
            {"params": layer.parameters_of("user"), "lr": 1.0},
            {"params": layer.parameters_of("item", "shop"), "lr": 2.0},
        ]
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    scaler.scale(factor * layer(ids, offsets).sum()).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    if factor == 1:
        groups = [
            {"params": plain.parameters_of("user"), "lr": 1.0},
            {"params": plain.parameters_of("item", "shop"), "lr": 2.0},
        ]
        plain(ids, offsets).sum().backward()
        optim.SGD(groups).step()
    assert torch.equal(layer.weight, plain.weight)


@every_size
def test_gradients_of_tables_are_clipped(target, sizes):
    """Whole or by table: the norm, and what is left, are those of the dense gradient."""
    dense = integer_layer(sizes, target.device, mode=MODES)
    ids, offsets = random_input(dense, 3)
    dense(ids, offsets).sum().backward()
    norm = torch.nn.utils.clip_grad_norm_(dense.parameters(), 1.0)
    for by_table in (False, True):
        layer = sparse_layer(target, sizes)
        layer(ids, offsets).sum().backward()
        params = [*layer.parameters_of("user"), *layer.parameters_of("item", "shop")]
        found = optim.clip_grad_norm_(params if by_table else layer.parameters(), 1.0)
        # Fewer than 2**8 squares and products, each rounded.
        assert abs(found - norm) <= 2**8 * 2.0**-23 * norm
        difference = layer.weight.grad.to_dense() - dense.weight.grad
        assert difference.abs().max() <= 2**9 * 2.0**-23


@every_optimizer
def test_rows_of_all_tables_are_chosen(target, make):
    """rows= counts through the tables of a parameter; or within one table's own."""
    layer, free = sparse_layer(target, MIXED), sparse_layer(target, MIXED)
    batches = batches_of(layer)[:1]
    start = layer.weight.detach().clone()
    train([make(free.parameters())], free, batches)
    train([make(layer.parameters(), rows=[1, 3, 7, 9, 12, 14])], layer, batches)
    chosen = {"user": [1, 3], "item": [0, 2], "shop": [2, 4]}
    for number, (name, rows) in enumerate(layer.items()):
        before = layer.layout.view(start, number)
        others = [row for row in range(len(rows)) if row not in chosen[name]]
        assert torch.equal(rows[chosen[name]], free[name][chosen[name]])
        assert torch.equal(rows[others], before[others])
    (group,) = make(layer.parameters_of("shop"), rows=[4]).param_groups
    assert group["rows"].tolist() == [False] * 4 + [True]


@two_optimizers
def test_hot_rows_are_summed_across_chunks(target, make):
    """Runs that cross chunks, of rows of different widths, side by side; and positions with weights."""
    layer = integer_layer(MIXED, target.device, sparse=True)
    modules, look_up = one_by_one(layer)
    ids = torch.zeros(108, dtype=torch.int64, device=target.device)
    ids[50:70] = 1
    offsets = torch.arange(0, 109, 36, device=target.device)
    train([make(layer.parameters())], layer, [(ids, offsets)])
    train([make(modules.parameters())], look_up, [(ids, offsets)])
    assert_equal(layer, modules)


@two_optimizers
@pytest.mark.parametrize("long", [False, True], ids=["in a program", "too long"])
def test_rows_that_int16_holds_as_negative_keys(target, make, long, monkeypatch):
    """As many rows as int16 keys serve."""
    if long and target.backend == "triton":
        monkeypatch.setattr(triton_row_update, "MAX_HELD_ROW", 4)
    sizes = {"user": (40_000, 1), "item": (25_535, 2)}
    layer = integer_layer(sizes, target.device, sparse=True)
    modules, look_up = one_by_one(layer)
    ids = torch.tensor([39_999, 2**15, 2**15 - 1, 0] * 10 + [25_534, 0] * 10).to(target.device)
    offsets = torch.tensor([0, 40, 60], device=target.device)
    train([make(layer.parameters())], layer, [(ids, offsets)])
    train([make(modules.parameters())], look_up, [(ids, offsets)])
    assert_equal(layer, modules)


@pytest.mark.full
@two_optimizers
def test_weighted_entries(target, make):
    """per_sample_weights, in two lookups under one backward and two backwards before a step."""
    layer = integer_layer(MIXED, target.device, sparse=True)
    twin = integer_layer(MIXED, target.device)
    ids, offsets = random_input(layer, 3)
    weights = integers(len(ids), low=1).float().to(target.device)
    optimizer = make(layer.parameters())
    for _ in range(2):
        for one in (layer, twin):
            output = one(ids, offsets, weights) + 2 * one(ids.flip(0) % 3, offsets)
            output.backward(integers(*output.shape).to(output))
    assert torch.equal(layer.weight.grad.to_dense(), twin.weight.grad)
    optimizer.step()
    # The same gradient, with one entry a row.
    modules = layer.to_modules()
    for number, (name, rows) in enumerate(twin.items()):
        table = modules[name].weight
        table.data.copy_(rows)
        grad = layer.layout.view(twin.weight.grad, number)
        table.grad = grad.to_sparse(1)
    make(modules.parameters()).step()
    used = [layer.layout.view(twin.weight.grad, number).any(1) for number in range(3)]
    for mask, (name, rows) in zip(used, layer.items(), strict=True):
        assert torch.equal(rows[mask], modules[name].weight[mask])


@two_optimizers
def test_long_rows_and_short_ones(target, make, monkeypatch):
    """Also where no program holds a row, so that row-wise Adagrad takes two steps."""
    sizes = {"user": (3, 130), "item": (2, 1), "shop": (2, 33)}
    if target.backend == "triton":
        monkeypatch.setattr(triton_row_update, "MAX_HELD_ROW", 256)
    layer = integer_layer(sizes, target.device, sparse=True)
    modules, look_up = one_by_one(layer)
    batches = batches_of(layer)[1:]
    train([make(layer.parameters())], layer, batches)
    train([make(modules.parameters())], look_up, batches)
    for name, rows in layer.items():
        # Sums of up to 130 squares, in another order where one of them takes two steps.
        torch.testing.assert_close(rows, modules[name].weight, rtol=130 * 2**-23, atol=0)


@pytest.mark.full
@pytest.mark.parametrize("long", [False, True], ids=["in a program", "too long"])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
def test_rowwise_adagrad_with_decay(target, dtype, long, monkeypatch):
    """Bit for bit in one step: a row's squares are of quarters of integers, and sum exactly in any order."""
    if long and target.backend == "triton":
        monkeypatch.setattr(triton_row_update, "MAX_HELD_ROW", 4)
        for module in (triton_row_update, triton_tables):
            monkeypatch.setattr(module, "ROWWISE_BLOCK", 4)
    layer, plain = (sparse_layer(target, MIXED).to(dtype) for _ in range(2))
    modules, look_up = one_by_one(layer)
    batches = batches_of(layer)[:1]
    optimizers = [
        optim.RowWiseAdagrad(of.parameters(), lr=0.5, decay_touched_rows=4.0)
        for of in (layer, modules)
    ]
    train(optimizers[:1], layer, batches)
    train(optimizers[1:], look_up, batches)
    assert_equal(layer, modules)
    train([optim.RowWiseAdagrad(plain.parameters(), lr=0.5)], plain, batches)
    assert not torch.equal(layer.weight, plain.weight)


@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("formula", ["SGD", "SGD, momentum", "RowWiseAdagrad"])
def test_tables_are_rounded_at_random_alike_on_every_backend(target, dtype, formula):
    """By the row's number among all, and the column: the words of `stochastic_rounding`."""
    layers = []
    for backend in (target.backend, "reference"):
        layer = sparse_layer(target, MIXED).to(dtype)
        with gpu_embed.use_backend(backend):
            optimizer = OPTIMIZERS[formula](
                layer.parameters(), lr=0.01, stochastic_rounding=True, seed=5
            )
            train([optimizer], layer, batches_of(layer)[:1])
        layers.append(layer)
    assert same_bits(layers[0].weight.detach(), layers[1].weight.detach())
    nearest = sparse_layer(target, MIXED).to(dtype)
    train([OPTIMIZERS[formula](nearest.parameters(), lr=0.01)], nearest, batches_of(nearest)[:1])
    assert not same_bits(layers[0].weight.detach(), nearest.weight.detach())


def test_a_learning_rate_on_the_device(target):
    """No host sync: read by the kernel."""
    layers = [sparse_layer(target, MIXED) for _ in range(2)]
    for layer, lr in zip(layers, (0.125, torch.tensor(0.125, device=target.device)), strict=True):
        train([optim.Adagrad(layer.parameters(), lr=lr)], layer, batches_of(layer)[:1])
    assert torch.equal(layers[0].weight, layers[1].weight)


@where(lambda target: target.backend == "triton")
def test_a_step_is_one_sort_and_one_launch(target, monkeypatch):
    """Whatever the number of tables and their height, and with nothing that grows with that."""
    backend = backends.select(torch.device(target.device))
    launch, names = backend._launch, []

    def recording(kernel, *args, **settings):
        names.append(kernel.__name__)
        launch(kernel, *args, **settings)

    monkeypatch.setattr(backend, "_launch", recording)
    for num_tables, height in ((2, 3), (9, 1000)):
        layer = integer_layer(
            [(height, 4 + table % 2) for table in range(num_tables)], target.device, sparse=True
        )
        optimizer = optim.Adam(layer.parameters())
        ids = torch.zeros(num_tables, dtype=torch.int64, device=target.device)
        layer(ids, torch.arange(num_tables + 1, device=target.device)).sum().backward()
        names.clear()
        optimizer.step()
        assert names == ["sort_keys_kernel", "table_row_update_kernel"]


def test_dense_gradients_are_refused():
    layer = integer_layer(SIZES)
    layer(*random_input(layer, 2)).sum().backward()
    optimizer = optim.SGD(layer.parameters(), lr=1.0)
    with pytest.raises(RuntimeError, match="does not support dense gradients"):
        optimizer.step()


# In the backward pass.


@every_optimizer
@every_size
@pytest.mark.parametrize("by_table", [False, True], ids=["whole", "by table"])
def test_updates_in_backward(make, by_table, sizes):
    """The same as a step after it, and no gradient is kept."""
    layer, stepped = sparse_layer(sizes=sizes), sparse_layer(sizes=sizes)
    batches = batches_of(layer)

    def params(layer):
        if not by_table:
            return list(layer.parameters())
        return [
            {"params": layer.parameters_of("user", "shop"), "lr": 0.25},
            {"params": layer.parameters_of("item"), "lr": 2.0},
        ]

    train([make(params(stepped))], stepped, batches)
    updates = optim.apply_in_backward(params(layer), make)
    train([updates.optimizer], layer, batches)
    assert layer.weight.grad is None
    assert torch.equal(layer.weight, stepped.weight)
    updates.remove()
    layer(*batches[0]).sum().backward()
    assert layer.weight.grad is not None


def test_a_model_with_batched_tables_is_updated_in_backward():
    model = torch.nn.ModuleList(
        [sparse_layer(sizes=MIXED), integer_layer(SIZES), gpu_embed.Embedding(2, 3, sparse=True)]
    )
    model.append(gpu_embed.TableBatchedEmbedding([(2, 3)], sparse=True))
    updates = optim.apply_in_backward(model, optim.SGD, lr=1.0)
    (group,) = updates.optimizer.param_groups
    assert [id(param) for param in group["params"]] == [id(model[i].weight) for i in (0, 2, 3)]
