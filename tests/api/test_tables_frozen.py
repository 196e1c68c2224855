"""One table frozen: no gradient reaches it, on any backend and under any optimizer, and the others train as ever."""

import copy
import functools
import io
import pickle

import pytest
import torch
from cases import same_bits
from table_cases import TABLES, by_layer, integer_layer, integers, random_input
from targets import has_method
from tiers import where
from torch import nn

import gpu_embed
from gpu_embed import TableBatchedEmbedding, TableBatchedEmbeddingBag, optim
from gpu_embed.ops.lookup import _zeroed

pytestmark = where(has_method)

UNIFORM = {"user": (7, 4), "item": (3, 4), "shop": (5, 4)}
MIXED = {"user": (7, 3), "item": (3, 12), "shop": (5, 5)}
every_size = pytest.mark.parametrize("sizes", [UNIFORM, MIXED], ids=["uniform", "mixed"])
two_kinds = pytest.mark.parametrize("kind", ["uniform", "mixed"])
# A lookup of all tables, each with rows that occur twice.
IDS = torch.tensor([0, 6, 6, 1, 1, 2, 4, 0, 4])
OFFSETS = torch.tensor([0, 3, 6, 9])


@pytest.fixture(params=("atomic", "sorted"))
def method(request, target):
    """Forces one gradient kernel where the backend has two; the others run once."""
    with gpu_embed.use_gradient_method(request.param):
        yield request.param


def frozen_of(layer, *names):
    for name in names:
        layer[name].requires_grad_(False)
    return layer


# Gradients.


@two_kinds
@pytest.mark.parametrize("modes", [["sum", "mean", "max"], ["max", "sum", "mean"], "sum"])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("frozen", ["0", "1", "2"])
def test_no_gradient_reaches_it_and_others_are_as_ever(target, method, kind, modes, sparse, frozen):
    layer = integer_layer(
        TABLES[kind], target.device, mode=modes, sparse=sparse, padding_idx=[None, 0, 1]
    )
    batch = random_input(layer, 3)
    expected = by_layer(layer, *batch)
    actual = by_layer(frozen_of(layer, frozen), *batch)
    assert torch.equal(actual.output, expected.output)
    for name, ours, other in zip(layer, actual.tables, expected.tables, strict=True):
        assert other.any()
        assert torch.equal(ours, torch.zeros_like(other) if name == frozen else other)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("ordered", [True, False])
def test_rows_without_pooling(target, method, sparse, ordered):
    features = {"a": "user", "b": "item", "c": "user"}
    layer = TableBatchedEmbedding(
        {"user": (4, 4), "item": (3, 4)}, sparse=sparse, device=target.device, features=features
    )
    frozen_of(layer, "user")
    names = list(features) if ordered else ["b", "c", "a"]
    ids = {name: torch.tensor([[2, 1]], device=target.device) for name in names}
    layer(*gpu_embed.batch_padded(ids)).sum().backward()
    grad = layer.weight.grad.to_dense() if sparse else layer.weight.grad
    assert grad.tolist() == [[0.0] * 4] * 4 + [[0.0] * 4, [1.0] * 4, [1.0] * 4]


@two_kinds
def test_weights_of_samples_keep_their_gradient(target, method, kind):
    layer = integer_layer(TABLES[kind], target.device)
    batch = random_input(layer, 3)
    weights = integers(len(batch[0]), seed=1).float().to(target.device)
    expected = by_layer(layer, *batch, per_sample_weights=weights)
    actual = by_layer(frozen_of(layer, "1"), *batch, per_sample_weights=weights)
    assert torch.equal(actual.per_sample_weights, expected.per_sample_weights)
    assert torch.equal(actual.tables[0], expected.tables[0])
    assert not actual.tables[1].any()


@two_kinds
def test_second_derivatives_are_those_of_a_constant(target, kind):
    """The reference: the same tables, the frozen one given as a tensor without a gradient."""
    layer = integer_layer(TABLES[kind], target.device, torch.float64)
    ids, offsets = random_input(layer, 2)
    weights = torch.linspace(1, 2, len(ids), dtype=torch.float64, device=target.device)

    def second(call):
        p = weights.clone().requires_grad_()
        output = call(p)
        grad_output = integers(*output.shape, seed=3).to(output).requires_grad_()
        grads = torch.autograd.grad(output, (layer.weight, p), grad_output, create_graph=True)
        loss = sum((grad * integers(*grad.shape, seed=4).to(grad)).sum() for grad in grads)
        seconds = torch.autograd.grad(loss, (layer.weight, p, grad_output))
        return [*grads, *seconds]

    constant = {"1.weight": layer["1"].detach().clone()}
    expected = second(lambda p: torch.func.functional_call(layer, constant, (ids, offsets, p)))
    frozen_of(layer, "1")
    actual = second(lambda p: layer(ids, offsets, p))
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


@two_kinds
def test_gradients_added_in_place_leave_it_out(target, method, kind):
    layer = frozen_of(integer_layer(TABLES[kind], target.device), "0")
    other = copy.deepcopy(layer)
    with gpu_embed.accumulate_in_place(layer):
        for seed in range(3):
            batch = random_input(layer, 2 + seed)
            for one in (layer, other):
                one(*batch).sum().backward()
    assert torch.equal(layer.weight.grad, other.weight.grad)
    assert not layer.layout.view(layer.weight.grad, 0).any()


def test_entries_that_are_left_out_name_no_frozen_row():
    """As on CUDA, where how many are kept is not known: the row that they name belongs to another table."""
    ids, values = torch.tensor([-1, -1]), torch.ones(2, 3)
    for kept, expected in (([False, True], 4), ([False, False], 2)):
        kept = torch.tensor(kept)
        named, zeros = _zeroed(torch.where(kept, 4, ids), values, kept, torch.tensor(2))
        assert named.tolist() == [expected] * 2
        assert torch.equal(zeros, values * kept[:, None])


# Optimizers.

OURS = {
    "SGD": functools.partial(optim.SGD, lr=0.5, momentum=0.9, decay_touched_rows=0.1),
    "Adagrad": functools.partial(optim.Adagrad, lr=0.5, decay_touched_rows=0.1),
    "RowWiseAdagrad": functools.partial(optim.RowWiseAdagrad, lr=0.5, decay_touched_rows=0.1),
    "Adam": functools.partial(optim.Adam, lr=0.5),
    "AdamW": functools.partial(optim.AdamW, lr=0.5, weight_decay=0.1),
}
TORCHS = {
    "SGD": (functools.partial(torch.optim.SGD, lr=0.5), False),
    "Adam": (functools.partial(torch.optim.Adam, lr=0.5), False),
    "AdamW": (functools.partial(torch.optim.AdamW, lr=0.5, weight_decay=0.0), False),
    "Adagrad": (functools.partial(torch.optim.Adagrad, lr=0.5), True),
    "SparseAdam": (functools.partial(torch.optim.SparseAdam, lr=0.5), True),
}


def train(layer, optimizer):
    for _ in range(2):
        layer(IDS, OFFSETS).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def check(layer, plain, before):
    """`layer` with "item" frozen, and one with nothing frozen, after the same steps."""
    for name, rows in layer.items():
        if name == "item":
            assert same_bits(rows, before[name])
            assert not same_bits(plain[name], before[name])
        else:
            assert same_bits(rows, plain[name])


@every_size
@pytest.mark.parametrize("make", OURS.values(), ids=OURS)
@pytest.mark.parametrize("rounding", [False, True])
@pytest.mark.parametrize("way", ["step", "by table", "in backward"])
def test_it_stays_under_our_optimizers(sizes, make, rounding, way):
    dtype = torch.bfloat16 if rounding else torch.float32
    plain = integer_layer(sizes, dtype=dtype, sparse=True)
    layer = copy.deepcopy(plain)
    before = {name: rows.detach().clone() for name, rows in layer.items()}
    layer.item.requires_grad_(False)
    for one in (layer, plain):
        params = list(one.parameters())
        if way == "by table":
            params = [*one.parameters_of("user", "item"), *one.parameters_of("shop")]
        arguments = {"stochastic_rounding": rounding, "seed": 1}
        if way == "in backward":
            optimizer = optim.apply_in_backward(one, make, **arguments).optimizer
        else:
            optimizer = make(params, **arguments)
        train(one, optimizer)
    check(layer, plain, before)


@pytest.mark.parametrize(("make", "sparse"), TORCHS.values(), ids=TORCHS)
def test_it_stays_under_torchs_optimizers(make, sparse):
    plain = integer_layer(UNIFORM, sparse=sparse)
    layer = copy.deepcopy(plain)
    before = {name: rows.detach().clone() for name, rows in layer.items()}
    layer.item.requires_grad_(False)
    for one in (layer, plain):
        train(one, make(one.parameters()))
    check(layer, plain, before)


# How it is said.

WAYS = {
    "rows": lambda layer: layer["item"].requires_grad_,
    "place": lambda layer: layer.item.requires_grad_,
    "weight": lambda layer: layer.item.weight.requires_grad_,
}
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


@every_way
@every_size
def test_freezing_and_training_again(way, sizes):
    layer = integer_layer(sizes)
    way(layer)(True)
    way(layer)(False)
    assert layer.weight.requires_grad
    assert not layer["item"].requires_grad
    assert not layer.item.weight.requires_grad
    assert layer["user"].requires_grad
    assert "frozen=(item)" in repr(layer)
    (layer["item"].sum() + layer["user"].sum()).backward()
    assert layer.weight.grad.sum() == layer["user"].numel()
    with torch.no_grad():
        layer["item"].fill_(3)
    assert (layer["item"] == 3).all()
    way(layer)()
    assert layer["item"].requires_grad
    assert "frozen" not in repr(layer)
    layer.weight.grad = None
    layer(IDS, OFFSETS).sum().backward()
    assert layer.layout.view(layer.weight.grad, 1).any()


@every_way
def test_all_frozen_is_a_frozen_parameter_and_one_trains_alone(way):
    layer = integer_layer(UNIFORM)
    frozen_of(layer, "user", "shop")
    way(layer)(False)
    assert not layer.weight.requires_grad
    assert not layer(IDS, OFFSETS).requires_grad
    way(layer)(True)
    assert layer.weight.requires_grad
    assert [rows.requires_grad for _, rows in layer.items()] == [False, True, False]


def test_a_models_requires_grad_means_all_tables():
    """As torch: the last word holds."""
    model = nn.Sequential(integer_layer(UNIFORM), nn.Linear(12, 1))
    layer = model[0]
    for owner in (lambda: model, lambda: layer, lambda: layer.weight):
        model.requires_grad_(False)
        layer["item"].requires_grad_(True)
        assert [rows.requires_grad for _, rows in layer.items()] == [False, True, False]
        owner().requires_grad_(True)
        assert all(rows.requires_grad for _, rows in layer.items())
        layer.zero_grad()
        layer(IDS, OFFSETS).sum().backward()
        assert all(layer.layout.view(layer.weight.grad, n).any() for n in range(3))


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "to": lambda layer: layer.double().float(),
    "to_modules": lambda layer: TableBatchedEmbeddingBag.from_modules(layer.to_modules()),
    "grow": lambda layer: layer.grow({"user": 2, "item": 1}) or layer,
    "assign": lambda layer: layer.load_state_dict(layer.state_dict(), assign=True) and layer,
    "meta": lambda layer: layer.to("meta").to_empty(device="cpu"),
}


@every_size
@pytest.mark.parametrize("way", COPIES.values(), ids=COPIES)
def test_copies_keep_it(sizes, way):
    layer = way(frozen_of(integer_layer(sizes), "item"))
    assert [rows.requires_grad for _, rows in layer.items()] == [True, False, True]
    layer.reset_parameters()
    layer(IDS, OFFSETS).sum().backward()
    assert [layer.layout.view(layer.weight.grad, n).any().item() for n in range(3)] == [1, 0, 1]
    layer.requires_grad_(True)
    assert layer["item"].requires_grad
    assert not layer._frozen


def test_modules_of_which_some_are_frozen():
    modules = nn.ModuleDict({name: nn.EmbeddingBag(*size) for name, size in UNIFORM.items()})
    modules["item"].requires_grad_(False)
    layer = TableBatchedEmbeddingBag.from_modules(modules)
    assert layer.weight.requires_grad
    assert [rows.requires_grad for _, rows in layer.items()] == [True, False, True]
    parts = layer.to_modules()
    assert [part.weight.requires_grad for part in parts.values()] == [True, False, True]
    modules.requires_grad_(False)
    assert not TableBatchedEmbeddingBag.from_modules(modules).weight.requires_grad


def test_a_state_dict_says_nothing_of_it():
    """As torch."""
    layer = frozen_of(integer_layer(MIXED), "item")
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = TableBatchedEmbeddingBag(MIXED)
    other.load_state_dict(torch.load(file))
    assert other["item"].requires_grad
    layer.load_state_dict(other.state_dict())
    assert not layer["item"].requires_grad


def test_a_table_that_was_given_other_rows_trains_them():
    """As torch: a tensor given to functional_call says itself whether it has a gradient."""
    layer = frozen_of(integer_layer(UNIFORM), "item")
    rows = torch.zeros(3, 4, requires_grad=True)
    output = torch.func.functional_call(layer, {"item.weight": rows}, (IDS, OFFSETS))
    output.sum().backward()
    assert rows.grad.any()
    assert layer.layout.view(layer.weight.grad, 0).any()


def test_rows_of_a_layer_that_is_gone():
    rows = integer_layer(UNIFORM)["item"]
    with pytest.raises(RuntimeError, match="the layer of this table is gone"):
        rows.requires_grad_(False)


# Graphs.


@every_size
def test_a_compiled_layer_follows(sizes):
    torch._dynamo.reset()
    layer = integer_layer(sizes)
    compiled = torch.compile(layer, backend="aot_eager")
    for frozen in ([], ["item"], ["item", "user"], []):
        layer.requires_grad_(True)
        frozen_of(layer, *frozen)
        grads = []
        for one in (compiled, layer):
            one(IDS, OFFSETS).square().sum().backward()
            grads.append(layer.weight.grad)
            layer.weight.grad = None
        assert torch.equal(*grads)
        for number, name in enumerate(layer):
            assert layer.layout.view(grads[0], number).any().item() == (name not in frozen)
    torch._dynamo.reset()


@every_size
def test_an_exported_layer_trains_the_others(sizes):
    layer = frozen_of(integer_layer(sizes), "item")
    program = torch.export.export(layer, (IDS, OFFSETS))
    exported = program.module()
    assert torch.equal(exported(IDS, OFFSETS), layer(IDS, OFFSETS))
    params = dict(exported.named_parameters())
    exported(IDS, OFFSETS).sum().backward()
    layer(IDS, OFFSETS).sum().backward()
    (weight,) = params.values()
    assert torch.equal(weight.grad, layer.weight.grad)


@every_size
def test_opcheck(sizes):
    """Drop-in: torch.library's own checks."""
    from gpu_embed.ops import tables as table_ops

    layer = frozen_of(integer_layer(sizes), "item")
    _, fields, table_of_column, trained = layer.tables
    shape = layer.layout.shape(True)
    batch = (IDS, OFFSETS, None, fields, table_of_column, trained, *shape)
    grad_output = torch.ones(1, len(table_of_column), requires_grad=True)
    arguments = (grad_output, None, *batch, layer.weight.shape[0])
    torch.library.opcheck(table_ops.table_batched_embedding_dense_backward, arguments)
    arguments = (layer.weight, None, *batch, False, False)
    torch.library.opcheck(table_ops.table_batched_embedding, arguments)


def test_copied_rows_are_no_table():
    layer = TableBatchedEmbeddingBag({"user": (3, 4), "item": (2, 4)}, sparse=True)
    layer["user"].requires_grad_(False)
    rows = copy.deepcopy(layer["user"]).requires_grad_(True)
    assert rows.requires_grad
    assert not layer["user"].requires_grad


def test_rows_as_a_parameter_say_how_to_freeze_them():
    layer = TableBatchedEmbeddingBag({"user": (3, 4), "item": (2, 4)}, sparse=True)
    with pytest.raises(RuntimeError, match=r"layer\[name\].requires_grad_\(False\)"):
        layer.parameters_of("user")[0].requires_grad_(False)
