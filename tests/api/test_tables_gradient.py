"""TableGradient: a tensor like any other where that is wanted, and cheap where it can be."""

import copy
import pickle

import pytest
import torch
from table_cases import integer_layer, random_input

from gpu_embed import TableBatchedEmbeddingBag, TableGradient, batch_bags, optim

SIZES = {"user": (7, 3), "item": (3, 12), "day": (2, 2), "shop": (5, 5)}
MODES = {"item": "mean", "shop": "max"}


def layers(**arguments):
    """One with a sparse gradient, and its dense twin."""
    return [
        integer_layer(SIZES, mode=MODES, sparse=sparse, **arguments) for sparse in (True, False)
    ]


@pytest.fixture
def pair():
    """The two gradients of one lookup."""
    sparse, dense = layers(padding_idx={"user": 0})
    ids, offsets = random_input(sparse, 3)
    for layer in (sparse, dense):
        layer(ids, offsets).sum().backward()
    assert isinstance(sparse.weight.grad, TableGradient)
    return sparse.weight.grad, dense.weight.grad


def test_it_is_the_dense_gradient(pair):
    grad, dense = pair
    assert (grad.shape, grad.dtype, grad.device) == (dense.shape, dense.dtype, dense.device)
    assert torch.equal(grad.to_dense(), dense)
    assert dense.any()
    entries = len(grad.entries.rows)
    assert repr(grad).startswith(f"TableGradient(entries={entries}, shape=({len(dense)},), dtype=")


KEPT = {
    "times": lambda grad: grad * 2,
    "number times": lambda grad: 2 * grad,
    "times a tensor": lambda grad: grad * torch.tensor(2.0),
    "over": lambda grad: grad / 4,
    "plus": lambda grad: grad + grad,
    "plus twice": lambda grad: torch.add(grad, grad, alpha=2),
    "plus scaled": lambda grad: 2 * grad + grad,
    "in place": lambda grad: grad.clone().mul_(2).div_(4).add_(grad),
    "double": lambda grad: grad.double(),
    "bfloat16": lambda grad: grad.bfloat16(),
    "clone": lambda grad: grad.clone(),
    "detach": lambda grad: grad.detach(),
}


@pytest.mark.parametrize("change", KEPT.values(), ids=KEPT)
def test_what_stays_sparse(pair, change):
    grad, dense = pair
    changed = change(grad)
    assert isinstance(changed, TableGradient)
    expected = change(dense)
    assert changed.dtype == expected.dtype
    assert torch.equal(changed.to_dense(), expected)
    assert torch.equal(grad.to_dense(), dense)


DENSE = {
    "sum": lambda grad: grad.sum(),
    "norm": lambda grad: grad.norm(),
    "indexing": lambda grad: grad[10:20],
    "plus one": lambda grad: grad + 1,
    "plus a tensor": lambda grad: torch.ones(grad.shape) + grad,
    "times a vector": lambda grad: grad * torch.arange(len(grad)),
    "into another": lambda grad: torch.ones(grad.shape).add_(grad, alpha=3),
    "copied into another": lambda grad: torch.ones(grad.shape).copy_(grad),
    "integers": lambda grad: grad.int(),
}


@pytest.mark.parametrize("change", DENSE.values(), ids=DENSE)
def test_every_other_operator_gets_the_dense_gradient(pair, change):
    grad, dense = pair
    changed = change(grad)
    assert not isinstance(changed, TableGradient)
    assert torch.equal(changed, change(dense))


WRITES = {
    "fill_": lambda grad: grad.fill_(1),
    "clamp_": lambda grad: grad.clamp_(0, 1),
    "add_": lambda grad: grad.add_(1),
    "add_ of a tensor": lambda grad: grad.add_(torch.ones(grad.shape)),
    "mul_ by a vector": lambda grad: grad.mul_(torch.ones(grad.shape)),
    "copy_": lambda grad: grad.copy_(torch.ones(grad.shape)),
    "a list": lambda grad: torch._foreach_mul_([grad], 2.0),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_what_cannot_be_written_is_refused(pair, write):
    """And nothing is lost in a dense copy of it."""
    grad, dense = pair
    with pytest.raises(
        RuntimeError, match=r"cannot be changed in this way.* call its to_dense\(\) first"
    ):
        write(grad)
    assert torch.equal(grad.to_dense(), dense)


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda grad: pickle.loads(pickle.dumps(grad))])
def test_copies(pair, twin):
    grad, dense = pair
    copied = twin(grad)
    grad.mul_(2)
    assert torch.equal(copied.to_dense(), dense)


def test_what_shares_its_memory_is_changed_with_it(pair):
    grad, dense = pair
    grad.detach().mul_(2)
    assert torch.equal(grad.to_dense(), 2 * dense)


def test_the_gradient_of_the_output_is_left_as_it_is():
    """It may be the caller's own tensor."""
    layer, _ = layers()
    ids, offsets = random_input(layer, 3)
    output = layer(ids, offsets)
    grad_output = torch.ones_like(output)
    output.backward(grad_output)
    layer.weight.grad.mul_(3)
    optim.clip_grad_norm_(layer.parameters(), 0.1)
    assert torch.equal(grad_output, torch.ones_like(output))


def test_the_gradient_of_the_output_may_not_change_before_the_step():
    """It is not copied, so what is written to it would be applied."""
    layer, _ = layers()
    ids, offsets = random_input(layer, 3)
    output = layer(ids, offsets)
    grad_output = torch.ones_like(output)
    output.backward(grad_output)
    ids.zero_()  # of these there is a copy
    optimizer = optim.SGD(layer.parameters(), lr=1.0)
    before = layer.weight.detach().clone()
    grad_output.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        optimizer.step()
    assert torch.equal(layer.weight, before)


def test_several_backwards_and_several_lookups_add_up():
    sparse, dense = layers()
    for layer in (sparse, dense):
        for num_bags in (3, 1):
            ids, offsets = random_input(layer, num_bags)
            (layer(ids, offsets).sum() + 2 * layer(ids.flip(0) % 2, offsets).sum()).backward()
    assert torch.equal(sparse.weight.grad.to_dense(), dense.weight.grad)


def test_gradients_of_tables_that_lie_otherwise_add_up():
    grads = []
    for sizes in ({"user": (8, 2), "item": (8, 6)}, {"user": (8, 6), "item": (8, 2)}):
        layer = integer_layer(sizes, sparse=True)
        layer(*random_input(layer, 3)).sum().backward()
        grads.append(layer.weight.grad)
    expected = grads[0].to_dense() + grads[1].to_dense()
    assert torch.equal(grads[0] + grads[1], expected)
    with pytest.raises(RuntimeError, match="cannot be changed in this way"):
        grads[0].add_(grads[1])


def test_gradients_from_before_and_after_a_move_add_up():
    sparse, dense = layers()
    for layer in (sparse, dense):
        inputs = random_input(layer, 3)
        layer(*inputs).sum().backward()
        layer.double()
        layer(*inputs).sum().backward()
    assert isinstance(sparse.weight.grad, TableGradient)
    assert torch.equal(sparse.weight.grad.to_dense(), dense.weight.grad)


def test_beside_a_dense_gradient_it_becomes_one():
    sparse, dense = layers()
    ids, offsets = random_input(sparse, 3)
    for layer in (sparse, dense):
        (layer(ids, offsets).sum() + layer["item"].sum()).backward()
        layer(ids, offsets).sum().backward()
    assert not isinstance(sparse.weight.grad, TableGradient)
    assert torch.equal(sparse.weight.grad, dense.weight.grad)


def test_gradients_are_reset():
    layer, _ = layers()
    ids, offsets = random_input(layer, 3)
    layer(ids, offsets).sum().backward()
    before = layer.weight.detach().clone()
    optimizer = optim.Adam(layer.parameters())
    optimizer.zero_grad(set_to_none=False)
    assert len(layer.weight.grad.entries.rows) == 0
    optimizer.step()
    assert torch.equal(layer.weight, before)
    optimizer.zero_grad()
    assert layer.weight.grad is None


NOTHING = {"no ids": ([], [0] * 5), "no bags": ([], [0]), "ids in no bag": ([1, 1], [0])}


@pytest.mark.parametrize(("ids", "offsets"), NOTHING.values(), ids=NOTHING)
@pytest.mark.parametrize("uniform", [True, False], ids=["uniform", "mixed"])
def test_batches_without_entries(ids, offsets, uniform):
    sizes = [(2, 4)] * 4 if uniform else SIZES
    layer = integer_layer(sizes, sparse=True, mode=["sum", "mean", "max", "mean"])
    layer(torch.tensor(ids, dtype=torch.int64), torch.tensor(offsets)).sum().backward()
    assert not layer.weight.grad.to_dense().any()


def test_it_moves_with_its_layer(pair):
    """Module._apply converts gradients too; some of its functions ask for a tensor's memory."""
    layer, _ = layers()
    ids, offsets = random_input(layer, 3)
    layer(ids, offsets).sum().backward()
    dense = layer.weight.grad.to_dense()
    layer.share_memory().double()
    assert layer.weight.grad.dtype == torch.float64
    assert torch.equal(layer.weight.grad.to_dense(), dense.double())
    optimizer = optim.SGD(layer.parameters(), lr=1.0)
    before = layer.weight.detach().clone()
    optimizer.step()
    assert torch.equal(before - layer.weight, dense.double())


def test_torchs_optimizers_and_clipping_see_a_dense_gradient(pair):
    sparse, dense = layers()
    ids, offsets = random_input(sparse, 3)
    for layer in (sparse, dense):
        optimizer = torch.optim.Adagrad(layer.parameters(), lr=0.5)
        layer(ids, offsets).sum().backward()
        torch.nn.utils.clip_grad_norm_(layer.parameters(), 2.0)
        optimizer.step()
    torch.testing.assert_close(sparse.weight, dense.weight)


def test_create_graph_is_refused():
    layer, _ = layers()
    output = layer(*random_input(layer, 3)).pow(2).sum()
    with pytest.raises(
        RuntimeError, match="not differentiable, so create_graph=True needs sparse=F"
    ):
        torch.autograd.grad(output, layer.weight, create_graph=True)


def test_torch_func_takes_batch_sizes_and_batches():
    """Offsets within a transform have no data that could be read."""
    layer = TableBatchedEmbeddingBag({"user": (9, 4), "item": (7, 4)})
    ids, offsets = torch.arange(6), torch.tensor([0, 1, 3, 5, 6])

    def with_sizes(weight):
        named = {"weight": weight}, (ids, offsets), {"batch_sizes": [1, 3]}
        return torch.func.functional_call(layer, *named).sum()

    def with_bags(weight):
        bags = batch_bags({"user": (ids, offsets[:1]), "item": (ids, offsets[:3])})
        return torch.func.functional_call(layer, {"weight": weight}, tuple(bags)).sum()

    weight = layer.weight.detach()
    for compute, count in ((with_sizes, 6), (with_bags, 12)):
        assert torch.func.grad(compute)(weight).sum() == 4 * count


def test_torch_func_gets_a_dense_gradient(pair):
    layer, twin = layers()
    ids, offsets = random_input(layer, 3)
    grads = [
        torch.func.grad(
            lambda w, one=one: torch.func.functional_call(one, {"weight": w}, (ids, offsets)).sum()
        )(one.weight.detach())
        for one in (layer, twin)
    ]
    assert torch.equal(*grads)


def test_under_torch_compile_the_layer_runs_in_eager_mode():
    torch._dynamo.reset()
    layer, dense = layers()
    ids, offsets = random_input(layer, 3)
    model = torch.nn.Sequential()
    model.tables = layer
    compiled = torch.compile(lambda: 2 * layer(ids, offsets), backend="aot_eager")
    compiled().sum().backward()
    (2 * dense(ids, offsets)).sum().backward()
    assert isinstance(layer.weight.grad, TableGradient)
    assert torch.equal(layer.weight.grad.to_dense(), dense.weight.grad)
    torch._dynamo.reset()


def test_a_thousand_tables():
    """In one launch, one sort and one update, like two."""
    sizes = [(3, 1 + number % 7) for number in range(1000)]
    layers = [
        integer_layer(sizes, sparse=sparse, mode=["sum", "max"] * 500) for sparse in (True, False)
    ]
    ids = torch.arange(2000) % 3
    for layer in layers:
        layer(ids, torch.arange(0, 2001, 2)).sum().backward()
    sparse, dense = layers
    assert torch.equal(sparse.weight.grad.to_dense(), dense.weight.grad)
    optim.SGD(sparse.parameters(), lr=1.0).step()
    assert torch.equal(dense.weight - sparse.weight, dense.weight.grad)
