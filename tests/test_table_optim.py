"""Row-wise optimizers on batched tables: the whole buffer at once, and tables with hyperparameters of their own."""

import copy

import pytest
import torch
from table_cases import integer_layer, integers, random_input

import gpu_embed
from gpu_embed import optim
from gpu_embed.row_parameter import RowParameter

SIZES = {"user": (7, 4), "item": (3, 4), "shop": (5, 4)}
OPTIMIZERS = {
    "SGD": lambda params, **arguments: optim.SGD(params, **{"lr": 0.5, **arguments}),
    "Adagrad": lambda params, **arguments: optim.Adagrad(params, **{"lr": 0.5, **arguments}),
    "RowWiseAdagrad": lambda params, **arguments: optim.RowWiseAdagrad(
        params, **{"lr": 0.5, **arguments}
    ),
    "Adam": lambda params, **arguments: optim.Adam(params, **{"lr": 0.5, **arguments}),
    "AdamW": lambda params, **arguments: optim.AdamW(params, **{"lr": 0.5, **arguments}),
}
every_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


def sparse_layer(target=None, **arguments):
    device = "cpu" if target is None else target.device
    return integer_layer(SIZES, device, sparse=True, mode={"item": "mean"}, **arguments)


def one_by_one(layer):
    """A layer for each table, and what makes of their outputs that of the batched one."""
    modules = layer.to_modules()

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


@every_optimizer
def test_one_update_of_the_buffer_is_one_of_each_table(target, make):
    """Bit for bit, over two steps: a row's update depends on the row alone."""
    layer = sparse_layer(target, padding_idx=0)
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


@every_optimizer
def test_param_groups_by_table(target, make):
    """Each group its own hyperparameters; a table in no group stays as it is."""
    layer = sparse_layer(target)
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


def test_neighbours_are_one_parameter():
    layer = sparse_layer()
    (both,) = layer.parameters_of("item", "user")
    assert torch.equal(both, layer.weight[:10])
    assert both.data_ptr() == layer.weight.data_ptr()
    assert [len(rows) for rows in layer.parameters_of("shop", "user")] == [7, 5]
    assert layer.parameters_of() == []
    with pytest.raises(KeyError, match="nobody"):
        layer.parameters_of("nobody")
    with pytest.raises(ValueError, match="sparse=True"):
        integer_layer(SIZES).parameters_of("user")


def test_schedulers_and_state_dicts_know_the_tables():
    layer, other = sparse_layer(), sparse_layer()
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


def test_rows_in_two_parameters_are_refused():
    layer = sparse_layer()
    optimizer = optim.SGD(layer.parameters_of("user"), lr=1.0)
    for params in (layer.parameters_of("user"), list(layer.parameters())):
        with pytest.raises(ValueError, match="some rows appear in more than one parameter"):
            optimizer.add_param_group({"params": params})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": layer.parameters_of("item")})


def test_the_gradient_of_some_rows():
    """Read by other code than ours, it is the whole's part."""
    layer = sparse_layer()
    (item,) = layer.parameters_of("item")
    assert item.grad is None
    ids, offsets = torch.tensor([6, 2, 0, 2]), torch.tensor([0, 1, 3, 4])
    layer(ids, offsets).sum().backward()
    assert item.grad.is_sparse
    assert torch.equal(item.grad.to_dense(), layer.weight.grad.to_dense()[7:10])
    assert item.grad._nnz() == 2
    layer.weight.grad = layer.weight.grad.to_dense()
    assert torch.equal(item.grad, layer.weight.grad[7:10])
    with pytest.raises(ValueError, match="part of the whole"):
        item.grad = torch.zeros(3, 4)
    item.grad = None
    assert layer.weight.grad is None


def test_a_copied_optimizer_updates_its_own_tables():
    layer = sparse_layer()
    (item,) = layer.parameters_of("item")
    copied, item_copy = copy.deepcopy((layer, item))
    assert isinstance(item_copy, RowParameter)
    assert item_copy.whole is copied.weight
    assert item_copy.data_ptr() == copied["item"].data_ptr()


def test_dense_gradients_are_refused():
    layer = integer_layer(SIZES)
    layer(*random_input(layer, 2)).sum().backward()
    optimizer = optim.SGD(layer.parameters(), lr=1.0)
    with pytest.raises(RuntimeError, match="does not support dense gradients"):
        optimizer.step()


# In the backward pass.


@every_optimizer
@pytest.mark.parametrize("by_table", [False, True], ids=["whole", "by table"])
def test_updates_in_backward(make, by_table):
    """The same as a step after it, and no gradient is kept."""
    layer, stepped = sparse_layer(), sparse_layer()
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
        [sparse_layer(), integer_layer(SIZES), gpu_embed.Embedding(2, 3, sparse=True)]
    )
    model.append(gpu_embed.TableBatchedEmbedding([(2, 3)], sparse=True))
    updates = optim.apply_in_backward(model, optim.SGD, lr=1.0)
    (group,) = updates.optimizer.param_groups
    assert [id(param) for param in group["params"]] == [id(model[i].weight) for i in (0, 2, 3)]
