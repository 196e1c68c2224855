"""Tables over time: an initializer for each, rows added to some, and what an optimizer has of them."""

import copy
import functools
import gc
import io
import operator
import pickle
import subprocess
import sys

import pytest
import torch
from cases import same_bits
from table_cases import TABLES, assert_same, by_layer, integer_layer, integers, random_input
from targets import has_method
from tiers import where
from torch import nn

import gpu_embed
from gpu_embed import TableBatchedEmbedding, TableBatchedEmbeddingBag, optim
from gpu_embed.nn import growing

UNIFORM = {"user": (7, 4), "item": (3, 4), "shop": (5, 4)}
# Rows of an odd number of elements, and what lies between tables that are no multiple of 8 of them.
MIXED = {"user": (7, 3), "item": (3, 12), "shop": (5, 5)}
every_size = pytest.mark.parametrize("sizes", [UNIFORM, MIXED], ids=["uniform", "mixed"])
# What the tables grow by, one growth after the other.
GROWTHS = [{"user": 2}, {"item": 4, "shop": 1}, {"user": 1, "shop": 0}]

OURS = {
    "SGD": functools.partial(optim.SGD, lr=0.5),
    "SGD, momentum": functools.partial(optim.SGD, lr=0.5, momentum=0.9, decay_touched_rows=0.1),
    "Adagrad": functools.partial(optim.Adagrad, lr=0.5, initial_accumulator_value=0.25),
    "RowWiseAdagrad": functools.partial(
        optim.RowWiseAdagrad, lr=0.5, initial_accumulator_value=0.25
    ),
    "Adam": functools.partial(optim.Adam, lr=0.5),
    "AdamW": functools.partial(optim.AdamW, lr=0.5),
}
DENSE = {
    "SGD": functools.partial(torch.optim.SGD, lr=0.5),
    "SGD, momentum": functools.partial(torch.optim.SGD, lr=0.5, momentum=0.9),
    "Adagrad": functools.partial(torch.optim.Adagrad, lr=0.5, initial_accumulator_value=0.25),
    "Adam": functools.partial(torch.optim.Adam, lr=0.5),
    "Adam, amsgrad": functools.partial(torch.optim.Adam, lr=0.5, amsgrad=True),
    "RMSprop": functools.partial(torch.optim.RMSprop, lr=0.5, momentum=0.5, centered=True),
    "Rprop": functools.partial(torch.optim.Rprop, lr=0.5),
    "NAdam": functools.partial(torch.optim.NAdam, lr=0.5),
}
SPARSE = {
    "SGD": functools.partial(torch.optim.SGD, lr=0.5),
    "SGD, momentum": functools.partial(torch.optim.SGD, lr=0.5, momentum=0.9),
    "Adagrad": functools.partial(torch.optim.Adagrad, lr=0.5, initial_accumulator_value=0.25),
    "SparseAdam": functools.partial(torch.optim.SparseAdam, lr=0.5),
}
every_optimizer_of_ours = pytest.mark.parametrize("make", OURS.values(), ids=OURS)


@pytest.fixture(scope="module", autouse=True)
def few_objects():
    """Those of other tests need not be searched for optimizers at each growth."""
    objects = growing._objects
    gc.collect()
    gc.freeze()
    growing._objects = gc.get_objects
    yield
    growing._objects = objects
    gc.unfreeze()


def first_rows(rows):
    """Numbers that depend on nothing but a row's place in its table: the last rows are those of the table's end."""
    rows.copy_(0.25 * torch.arange(rows.shape[1], dtype=rows.dtype).expand_as(rows))


def make_layer(sizes, sparse, **arguments):
    layer = TableBatchedEmbeddingBag(sizes, sparse=sparse, init=first_rows, **arguments)
    with torch.no_grad():
        for number, rows in enumerate(sizes_of_first(sizes)):
            name = list(layer)[number]
            layer[name][:rows] += integers(rows, layer[name].shape[1], seed=number)
    return layer


def sizes_of_first(sizes):
    """The heights that tables begin with, of those of a grown layer too."""
    return [UNIFORM[name][0] for name in sizes]


def grown(sizes, growths):
    return {
        name: (rows + sum(growth.get(name, 0) for growth in growths), dim)
        for name, (rows, dim) in sizes.items()
    }


def step(layer, optimizer, heights, seed):
    """One step on rows below these heights, each batch with ids that occur more than once."""
    ids = torch.cat([integers(6, seed=seed + n, low=0, high=h) for n, h in enumerate(heights)])
    offsets = torch.arange(0, len(ids) + 1, 2)
    output = layer(ids, offsets)
    optimizer.zero_grad()
    (output * integers(*output.shape, seed=seed)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def train(layer, optimizer, sizes, grow):
    """Steps before, between and after all growths, which the layer goes through or not."""
    for number in range(len(GROWTHS) + 1):
        now = grown(sizes, GROWTHS[:number])
        for seed in range(2):
            step(layer, optimizer, [rows for rows, _ in now.values()], 10 * number + seed)
        if grow and number < len(GROWTHS):
            layer.grow(GROWTHS[number])


def assert_equal(layer, optimizer, other, others):
    assert layer.layout == other.layout
    same = same_tensors(layer.weight, other.weight)
    assert same
    states = [one.state_dict()["state"] for one in (optimizer, others)]
    assert states[0].keys() == states[1].keys()
    for key, state in states[0].items():
        for name, value in state.items():
            expected = states[1][key][name]
            is_same = same_tensors if isinstance(value, torch.Tensor) else operator.eq
            assert is_same(value, expected), name


def same_tensors(one, other):
    """Bit for bit, sparse ones and those of one number too."""
    one, other = (x.to_dense() if x.is_sparse else x for x in (one, other))
    return one.shape == other.shape and same_bits(one.reshape(-1), other.reshape(-1))


def check(make, sizes, sparse, params=lambda layer: list(layer.parameters())):
    layer, large = make_layer(sizes, sparse), make_layer(grown(sizes, GROWTHS), sparse)
    optimizers = [make(params(layer)), make(params(large))]
    weight = layer.weight
    train(layer, optimizers[0], sizes, grow=True)
    train(large, optimizers[1], sizes, grow=False)
    assert layer.weight is weight
    assert_equal(layer, optimizers[0], large, optimizers[1])


# Training with growth is training of tables that were large from the start.


@where(has_method)
@pytest.mark.parametrize("kind", ["uniform", "mixed"])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("method", ["atomic", "sorted"])
def test_every_backend_looks_up_in_grown_tables(target, method, kind, sparse):
    """What it had prepared for the smaller ones is no more of use."""
    layer = integer_layer(TABLES[kind], target.device, sparse=sparse, mode=["sum", "mean", "max"])
    with gpu_embed.use_gradient_method(method):
        by_layer(layer, *random_input(layer, 3))
        layer.weight.grad = None
        layer.grow({"0": 9, "2": 3})
        other = TableBatchedEmbeddingBag.from_modules(layer.to_modules())
        ids, offsets = random_input(layer, 3)
        assert (ids > 6).any()
        assert_same(by_layer(layer, ids, offsets), by_layer(other, ids, offsets))


@every_optimizer_of_ours
@every_size
def test_growing_is_as_if_the_tables_had_been_large(make, sizes):
    check(make, sizes, sparse=True)


@every_optimizer_of_ours
@every_size
def test_tables_of_some_groups_grow(make, sizes):
    def params(layer):
        return [
            {"params": layer.parameters_of("user"), "lr": 0.25},
            {"params": layer.parameters_of("shop", "item")},
        ]

    check(make, sizes, sparse=True, params=params)


@pytest.mark.parametrize("make", DENSE.values(), ids=DENSE)
@every_size
def test_torchs_optimizers_of_dense_gradients(make, sizes):
    check(make, sizes, sparse=False)


@pytest.mark.parametrize("make", SPARSE.values(), ids=SPARSE)
def test_torchs_optimizers_of_sparse_gradients(make):
    check(make, UNIFORM, sparse=True)


@every_optimizer_of_ours
@every_size
@pytest.mark.parametrize("by_table", [False, True])
def test_updates_in_backward_follow(make, sizes, by_table):
    layer, large = make_layer(sizes, True), make_layer(grown(sizes, GROWTHS), True)
    updates = []
    for one in (layer, large):
        params = [*one.parameters_of("user"), *one.parameters_of("item", "shop")]
        updates.append(optim.apply_in_backward(params if by_table else one, make))
    train(layer, updates[0].optimizer, sizes, grow=True)
    train(large, updates[1].optimizer, sizes, grow=False)
    assert_equal(layer, updates[0].optimizer, large, updates[1].optimizer)


def test_gradients_are_added_in_place_after_a_growth():
    layer, plain = make_layer(UNIFORM, False), make_layer(UNIFORM, False)
    handle = gpu_embed.accumulate_in_place(layer)
    for one in (layer, plain):
        one.grow("item", 2)
        for seed in range(3):
            ids = integers(9, seed=seed, low=0, high=5)
            one(ids, torch.arange(10)).square().sum().backward()
    assert torch.equal(layer.weight.grad, plain.weight.grad)
    handle.remove()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@every_size
def test_every_dtype_keeps_its_bits(dtype, sizes):
    layer = make_layer(sizes, True, dtype=dtype, padding_idx={"user": -1})
    before = {name: rows.detach().clone() for name, rows in layer.items()}
    layer.requires_grad_(False).grow({"user": 3, "item": 1})
    assert not layer.weight.requires_grad
    assert layer.weight.dtype == dtype
    assert layer.layout.padding_idx == (6, -1, -1)
    for name, rows in before.items():
        assert same_bits(layer[name][: len(rows)], rows)
    assert layer.weight.count_nonzero() == sum(rows.count_nonzero() for _, rows in layer.items())


def test_rows_without_pooling_grow_too():
    layer = TableBatchedEmbedding(UNIFORM, padding_idx=1)
    layer.grow("user", 2)
    ids, offsets = torch.tensor([8, 1, 0]), torch.tensor([0, 1, 2, 3])
    assert torch.equal(layer(ids, offsets)[0], layer["user"][8])
    with pytest.raises(IndexError, match="9"):
        layer(torch.tensor([9, 1, 0]), offsets)


def test_a_table_without_rows_grows_and_none_is_no_growth():
    layer = TableBatchedEmbeddingBag({"user": (0, 4), "item": (2, 4)}, sparse=True)
    optimizer = optim.AdamW(layer.parameters())
    memory = layer.weight.data_ptr()
    layer.weight.grad = torch.zeros_like(layer.weight)
    layer.grow("user", 0)
    layer.grow({})
    assert layer.weight.data_ptr() == memory
    layer.weight.grad = None
    layer.grow("user", 3)
    layer(torch.tensor([2, 0]), torch.tensor([0, 1, 2])).sum().backward()
    optimizer.step()
    assert optimizer.state[layer.weight]["exp_avg"].any(1).tolist() == [
        False,
        False,
        True,
        True,
        False,
    ]


def test_chosen_rows_stay_and_new_ones_may_change():
    layer = make_layer(UNIFORM, True)
    chosen = {"params": layer.parameters_of("user"), "rows": [0, 2]}
    optimizer = optim.SGD([chosen, {"params": layer.parameters_of("item")}], lr=1.0)
    layer.grow("user", 1)
    before = layer["user"].detach().clone()
    layer(torch.tensor([0, 1, 2, 7, 0, 0]), torch.tensor([0, 4, 5, 6])).sum().backward()
    optimizer.step()
    changed = (layer["user"] != before).any(1)
    assert changed.nonzero().flatten().tolist() == [0, 2, 7]


def test_schedulers_and_scalers_go_on():
    layer = make_layer(UNIFORM, True)
    optimizer = optim.RowWiseAdagrad(layer.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    scaler = torch.amp.GradScaler("cpu")
    for growth in (1, 1, 1):
        output = layer(torch.arange(3), torch.arange(4))
        scaler.scale(output.sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        optimizer.zero_grad()
        layer.grow("item", growth)
    assert optimizer.param_groups[0]["lr"] == 0.125
    assert optimizer.state[layer.weight]["step"] == 3


def test_ties_and_names_hold():
    layer = TableBatchedEmbedding({"words": (5, 4)})
    head = nn.Linear(4, 5, bias=False)
    head.weight = layer.weight
    layer.grow("words", 2)
    assert head(torch.ones(1, 4)).shape == (1, 7)
    assert [name for name, _ in layer.named_parameters()] == ["weight"]
    assert list(layer.state_dict()) == ["words.weight"]


def test_a_compiled_layer_is_compiled_anew():
    torch._dynamo.reset()
    layer = make_layer(MIXED, False)
    compiled = torch.compile(layer, backend="aot_eager")
    ids, offsets = torch.tensor([6, 2, 4]), torch.arange(4)
    for _ in range(2):
        layer.zero_grad()
        output = compiled(ids, offsets)
        output.sum().backward()
        assert torch.equal(output, layer(ids, offsets))
        assert layer.weight.grad.shape == layer.weight.shape
        layer.zero_grad()
        layer.grow({"user": 3, "item": 1})
        ids = torch.tensor([9, 3, 4])


def test_meta_tables_grow_and_are_drawn_later():
    layer = TableBatchedEmbeddingBag(MIXED, init=nn.init.ones_, device="meta", padding_idx=0)
    layer.grow("user", 2)
    layer.to_empty(device="cpu").reset_parameters()
    assert layer["user"].shape == (9, 3)
    assert (layer["user"][1:] == 1).all()
    assert not layer["user"][0].any()


@pytest.mark.parametrize(("made", "grown_in"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("sparse", [False, True])
def test_inference_mode_when_made_or_grown(made, grown_in, sparse):
    with torch.inference_mode(made):
        layer = TableBatchedEmbeddingBag(UNIFORM, sparse=sparse)
    make = optim.AdamW if sparse else torch.optim.AdamW
    optimizer = make(layer.parameters())
    if not made or sparse:
        step(layer, optimizer, [7, 3, 5], 0)
    with torch.inference_mode(grown_in):
        layer.grow("user", 2)
    before = layer.weight.detach().clone()
    layer(torch.tensor([8, 2, 4]), torch.arange(4)).sum().backward()
    if not made or sparse:
        # torch's own cannot write to a parameter of inference mode.
        optimizer.step()
        assert (layer.weight != before)[8].all()


def test_a_table_of_one_row_grows_with_its_state():
    sizes = {"user": (1, 4), "item": (3, 4)}
    layers = [TableBatchedEmbeddingBag(dict(sizes, user=(rows, 4)), sparse=True) for rows in (1, 4)]
    optimizers = []
    for layer in layers:
        with torch.no_grad():
            layer.weight.fill_(0.5)
        groups = [{"params": layer.parameters_of(name)} for name in sizes]
        optimizers.append(optim.RowWiseAdagrad(groups, lr=0.5, initial_accumulator_value=0.25))
        step(layer, optimizers[-1], [1, 3], 0)
    layers[0]._init = (functools.partial(nn.init.constant_, val=0.5), None)
    layers[0].grow("user", 3)
    for layer, optimizer in zip(layers, optimizers, strict=True):
        step(layer, optimizer, [4, 3], 1)
    assert_equal(layers[0], optimizers[0], layers[1], optimizers[1])


# What else has the parameter, and what is left of before.


def test_a_graph_of_before_cannot_update_rows_of_now():
    # 8 rows of 3 take no more elements than 7.
    for sizes, sparse in ((UNIFORM, False), (UNIFORM, True), (MIXED, True)):
        layer = make_layer(sizes, sparse)
        kind = optim.SGD if sparse else torch.optim.SGD
        optimizer = kind(layer.parameters(), lr=1.0)
        loss = layer(torch.tensor([6, 2, 4]), torch.arange(4)).sum()
        layer.grow("user", 1)
        before = layer.weight.detach().clone()
        with pytest.raises(RuntimeError, match=r"computed before the tables have grown|size"):  # noqa: PT012
            loss.backward()
            optimizer.step()
        assert torch.equal(layer.weight, before)


def test_a_graph_of_before_that_reads_the_rows_raises():
    layer = make_layer(UNIFORM, False)
    weights = torch.ones(3, requires_grad=True)
    loss = layer(torch.tensor([6, 2, 4]), torch.arange(4), weights).sum()
    layer.grow("user", 2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@every_size
def test_a_backward_that_runs_while_the_tables_grow_raises(sizes, sparse):
    layer = make_layer(sizes, sparse)
    output = layer(torch.tensor([6, 2, 4]), torch.arange(4))
    output.register_hook(lambda _: layer.grow("user", 1))
    with pytest.raises(RuntimeError, match="computed before the tables have grown; look up anew"):
        output.sum().backward()
    assert layer.weight.grad is None
    layer(torch.tensor([7, 2, 4]), torch.arange(4)).sum().backward()
    assert layer.weight.grad.shape == layer.weight.shape


# Growth that is interrupted.


def everything(layer, optimizer):
    """What a growth changes, copied."""
    groups = optimizer.param_groups
    return copy.deepcopy(
        {
            "layout": layer.layout,
            "rows": layer.weight.row_range,
            "weight": layer.weight.detach(),
            "fields": tuple(layer.tables[1:]),
            "state": optimizer.state_dict()["state"],
            "params": [param.detach() for group in groups for param in group["params"]],
            "masks": [group["rows"] for group in groups],
        }
    )


def assert_same_tree(one, other):
    ones, spec = torch.utils._pytree.tree_flatten(one)
    others, others_spec = torch.utils._pytree.tree_flatten(other)
    assert spec == others_spec
    for value, expected in zip(ones, others, strict=True):
        if isinstance(expected, torch.Tensor):
            assert torch.equal(value, expected)
        else:
            assert value == expected


@every_size
def test_growth_that_is_interrupted_is_undone(sizes, monkeypatch):
    """At each line from where the first thing changes."""
    optimizer = None
    monkeypatch.setattr(growing, "_objects", lambda: [optimizer])
    lines = {"_put", "_refuse_graphs", "_take_layout", "_prepare", "_set_frozen", "rebind"}

    def grow_interrupted(layer, at):
        """Whether it came to that line."""
        left = at

        def trace(frame, event, _):
            nonlocal left
            if frame.f_code.co_name not in lines:
                return None
            if event == "line":
                left -= 1
                if left < 0:
                    sys.settrace(None)
                    raise KeyboardInterrupt
            return trace

        former = sys.gettrace()
        sys.settrace(trace)
        try:
            layer.grow({"user": 2, "shop": 1})
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(former)
        return False

    at = 0
    while True:
        layer = make_layer(sizes, True)
        layer["item"].requires_grad_(False)
        groups = [
            {"params": layer.parameters_of("user"), "rows": torch.ones(7, dtype=torch.bool)},
            {"params": layer.parameters_of("shop", "item")},
        ]
        optimizer = optim.Adam(groups, lr=0.5)
        step(layer, optimizer, [7, 3, 5], 0)
        before = everything(layer, optimizer)
        loss = layer(torch.tensor([6, 2, 4]), torch.arange(4)).sum()
        if not grow_interrupted(layer, at):
            break
        assert_same_tree(everything(layer, optimizer), before)
        # Graphs of before are of now again.
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        layer.grow({"user": 2, "shop": 1})
        step(layer, optimizer, [9, 3, 6], 1)
        at += 1
    assert at > 20


def test_an_optimizer_that_nobody_uses_is_no_hindrance():
    layer = make_layer(UNIFORM, False)
    optimizer = with_rows_of_its_own(layer)
    optimizer.itself = optimizer
    with pytest.raises(RuntimeError, match="keeps a state z"):
        layer.grow("user", 1)
    del optimizer
    layer.grow("user", 1)


class Wrapper(torch.optim.Optimizer):
    """One that keeps nothing itself, and has what it wraps later, or no more."""

    def __init__(self):
        self.wrapped = None

    def __getattr__(self, name):
        if self.wrapped is None:
            raise ReferenceError(name)
        return getattr(self.wrapped, name)


def test_wrappers_of_optimizers_are_seen_through():
    layer = make_layer(UNIFORM, False)
    wrapper, empty = Wrapper(), Wrapper()
    half = torch.optim.Adam.__new__(torch.optim.Adam)
    half.param_groups = [{}]
    wrapper.wrapped = torch.optim.Adam(layer.parameters())
    step(layer, wrapper.wrapped, [7, 3, 5], 0)
    layer.grow("user", 1)
    assert wrapper.state[layer.weight]["exp_avg"].shape == (16, 4)
    assert empty.wrapped is None


def test_a_compiled_function_may_grow_tables():
    layer = make_layer(UNIFORM, False)

    @torch.compile(backend="eager")
    def grow():
        layer.grow("user", 1)
        return layer(torch.tensor([7, 2, 4]), torch.arange(4))

    assert torch.equal(grow()[0, :4], layer["user"][7])


OWN_NAMES = ["training", "weight", "sparse", "grow", "_frozen", "_tables_on", "_is_applying"]


@pytest.mark.parametrize("name", OWN_NAMES)
def test_tables_named_as_what_a_layer_has(name):
    layer = TableBatchedEmbeddingBag({name: (3, 4), "other": (2, 4)}, sparse=True)
    layer.eval().train().double()
    layer[name].requires_grad_(False)
    layer.grow(name, 2)
    layer[name].requires_grad_(True)
    modules = {one: nn.EmbeddingBag(*rows.shape, sparse=True) for one, rows in layer.items()}
    other = TableBatchedEmbeddingBag.from_modules(modules)
    other.load_state_dict(copy.deepcopy(layer.state_dict()), assign=True)
    assert torch.equal(other[name], layer[name])
    assert layer[name].shape == (5, 4)


def test_hooks_and_new_graphs_go_on():
    layer = make_layer(UNIFORM, True)
    seen = []
    layer.weight.register_hook(lambda grad: seen.append(grad.shape))
    layer.weight.register_post_accumulate_grad_hook(lambda one: seen.append(one.grad.shape))
    output = layer(torch.tensor([6, 2, 4]), torch.arange(4))
    layer.grow("user", 2)
    # The node of before is still there.
    assert output.grad_fn is not None
    layer(torch.tensor([8, 2, 4]), torch.arange(4)).sum().backward()
    assert seen == [(17, 4), (17, 4)]


def tied(layer):
    other = TableBatchedEmbeddingBag(UNIFORM)
    other.weight = layer.weight
    return other


def with_gradient(layer):
    layer(torch.tensor([6, 2, 4]), torch.arange(4)).sum().backward()


def with_held_gradients(layer):
    updates = optim.apply_in_backward(layer, optim.SGD, lr=1.0, micro_steps=2)
    with_gradient(layer)
    return updates


def with_factors(layer):
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    optimizer.state[layer.weight]["row_var"] = torch.zeros(15, 1)
    return optimizer


def with_rows_of_its_own(layer):
    """As optimizers without a schedule keep a second copy of the rows."""
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    optimizer.state[layer.weight]["z"] = layer.weight.detach().clone()
    return optimizer


def with_a_list(layer):
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    optimizer.state[layer.weight]["history"] = [torch.zeros(15, 4)]
    return optimizer


def with_lbfgs(layer):
    linear = nn.Linear(3, 1)
    optimizer = torch.optim.LBFGS([*linear.parameters(), layer.weight])
    optimizer.state[linear.weight]["d"] = torch.zeros(64)
    return optimizer


def with_hooks_of_torch(layer):
    from torch.distributed.optim import _apply_optimizer_in_backward

    _apply_optimizer_in_backward(torch.optim.SGD, layer.parameters(), {"lr": 1.0})
    return layer


def with_group_of_two(layer):
    other = make_layer(UNIFORM, True)
    return optim.SGD([layer.weight, other.weight], lr=1.0, rows=torch.ones(15, dtype=torch.bool))


CANNOT = {
    "a gradient": (with_gradient, r"zero_grad\(set_to_none=True\) first"),
    "micro_steps": (with_held_gradients, r"call finish\(\) or discard\(\)"),
    "another layer": (tied, "another batched layer has the same parameter"),
    "shared memory": (lambda layer: layer.share_memory(), r"before share_memory\(\)"),
    "a state of factors": (with_factors, r"SGD keeps a state row_var of shape \[15, 1\]"),
    "a state that begins somehow": (with_rows_of_its_own, "SGD keeps a state z of shape"),
    "a list of states": (with_a_list, "SGD keeps a state history of shape"),
    "LBFGS": (with_lbfgs, "LBFGS keeps vectors through all of its parameters"),
    "a node that is replaced": (with_hooks_of_torch, "torch's _apply_optimizer_in_backward"),
    "rows of two tables": (with_group_of_two, "rows= for 2 parameters"),
    "computed": (
        lambda layer: nn.utils.parametrize.register_parametrization(layer, "weight", nn.Identity()),
        "no parameter but computed",
    ),
    "an initializer that raises": (
        lambda layer: layer.__dict__.update(_init=(lambda rows: 1 / 0, None, None)),
        "division",
    ),
    "memory": (lambda layer: None, "memory|allocate|size"),
}


@pytest.mark.parametrize(("spoil", "message"), CANNOT.values(), ids=CANNOT)
def test_what_cannot_grow_is_left_as_it_was(spoil, message):
    layer = make_layer(UNIFORM, True)
    optimizer = optim.AdamW(layer.parameters())
    step(layer, optimizer, [7, 3, 5], 0)
    # Kept until the end of the test.
    kept = spoil(layer)
    before = copy.deepcopy(optimizer.state_dict()), layer.weight.detach().clone()
    many = 2**50 if "memory" in message and kept is None and "zero_grad" not in message else 2
    with pytest.raises((RuntimeError, ZeroDivisionError), match=message):
        layer.grow({"user": many})
    assert layer.layout.num_embeddings == (7, 3, 5)
    assert torch.equal(layer.weight, before[1])
    for name, value in optimizer.state_dict()["state"][0].items():
        assert (
            value == before[0]["state"][0][name]
            if name == "step"
            else same_bits(value, before[0]["state"][0][name])
        )


def test_tables_of_ranks_do_not_grow_under_them():
    """Without the wrapper they do."""
    code = """
import pytest, torch, gpu_embed
torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
layer = gpu_embed.TableBatchedEmbedding({"user": (3, 4)})
ddp = torch.nn.parallel.DistributedDataParallel(layer)
with pytest.raises(RuntimeError, match="delete the wrapper, grow the tables alike on every rank"):
    layer.grow("user", 2)
del ddp
layer.grow("user", 2)
ddp = torch.nn.parallel.DistributedDataParallel(layer)
ddp(torch.tensor([4]), torch.tensor([0, 1])).sum().backward()
assert layer.weight.grad.sum() == 4
model = torch.nn.Sequential(gpu_embed.TableBatchedEmbedding({"user": (3, 4)}))
torch.distributed.fsdp.fully_shard(model)
with pytest.raises(RuntimeError, match="grow the tables before fully_shard"):
    model[0].grow("user", 2)
torch.distributed.destroy_process_group()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_lookup_in_other_rows_is_no_time_to_grow():
    layer = make_layer(UNIFORM, False)

    class Grows(nn.Module):
        def __init__(self):
            super().__init__()
            self.tables = layer

        def forward(self):
            self.tables.grow("user", 1)

    with pytest.raises(RuntimeError, match="some tables look up in other rows"):
        torch.func.functional_call(Grows(), {"tables.user.weight": torch.zeros(7, 4)}, ())
    layer.grow("user", 1)


WRONG = {
    "negative": (("user", -1), ValueError, "'user' cannot grow by -1 rows"),
    "a bool": (("user", True), TypeError, "rows of table 'user' must be an int, got True"),
    "a float": (("user", 1.5), TypeError, "rows of table 'user' must be an int"),
    "none": (("user",), TypeError, "rows of table 'user' must be an int, got None"),
    "no table": (("nobody", 1), KeyError, "no table is named 'nobody'"),
    "no table of several": (({"user": 1, "x": 1},), KeyError, "no table is named 'x'"),
    "a list": ((["user"], 1), TypeError, r"the name of a table and its rows.* got \['user'\]"),
    "both": (({"user": 1}, 2), TypeError, "a name and its rows, or a mapping alone"),
}


@pytest.mark.parametrize(("arguments", "error", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments_change_nothing(arguments, error, message):
    layer = make_layer(UNIFORM, True)
    with pytest.raises(error, match=message):
        layer.grow(*arguments)
    assert layer.layout.num_embeddings == (7, 3, 5)


HIDDEN = {
    "AdamW": (optim.AdamW, True, r"layer.grow\(\) brings along"),
    "rows": (
        functools.partial(optim.SGD, rows=torch.ones(15).bool()),
        True,
        "among 15, but the table has 16",
    ),
    "torch's Adam": (torch.optim.Adam, False, "size"),
    "torch's Adagrad": (torch.optim.Adagrad, False, "size"),
    "torch's SGD": (DENSE["SGD, momentum"], False, "size"),
    "torch's SparseAdam": (torch.optim.SparseAdam, True, "size"),
}


@pytest.mark.parametrize(("make", "sparse", "message"), HIDDEN.values(), ids=HIDDEN)
def test_an_optimizer_that_is_not_found_raises_at_its_step(make, sparse, message, monkeypatch):
    layer = make_layer(UNIFORM, sparse)
    optimizer = make(layer.parameters())
    step(layer, optimizer, [7, 3, 5], 0)
    monkeypatch.setattr(growing, "_objects", list)
    layer.grow("user", 1)
    before = layer.weight.detach().clone()
    with pytest.raises(RuntimeError, match=message):
        step(layer, optimizer, [7, 3, 5], 1)
    assert torch.equal(layer.weight, before)


def test_optimizers_are_found_where_the_garbage_collector_was_told_to_leave_them():
    code = """
import gc, torch, gpu_embed
layer = gpu_embed.TableBatchedEmbedding({"user": (3, 4)})
optimizer = torch.optim.Adam(layer.parameters(), fused=True)
layer(torch.tensor([2]), torch.tensor([0, 1])).sum().backward()
optimizer.step()
optimizer.zero_grad()
gc.freeze()
layer.grow("user", 2)
assert gc.get_freeze_count() > 0
assert optimizer.state[layer.weight]["exp_avg"].shape == (5, 4)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# Saved and loaded.


@every_optimizer_of_ours
@every_size
@pytest.mark.parametrize("by_table", [False, True])
def test_loading_and_growing_is_growing(make, sizes, by_table):
    """A layer of the old size that loads what was saved and grows, and one of the new size."""

    def params(layer):
        if not by_table:
            return list(layer.parameters())
        return [*layer.parameters_of("user"), *layer.parameters_of("item", "shop")]

    layer = make_layer(sizes, True)
    optimizer = make(params(layer))
    step(layer, optimizer, [7, 3, 5], 0)
    file = io.BytesIO()
    torch.save((layer.state_dict(), optimizer.state_dict()), file)
    large_sizes = grown(sizes, [{"user": 3, "item": 1}])
    loaded = []
    for first, growth in ((sizes, {"user": 3, "item": 1}), (large_sizes, {})):
        file.seek(0)
        state, optimizer_state = torch.load(file)
        other = TableBatchedEmbeddingBag(first, sparse=True, init=first_rows)
        others = make(params(other))
        if growth:
            other.load_state_dict(state)
        else:
            with torch.no_grad():
                for name in other:
                    other[name][: len(state[f"{name}.weight"])] = state[f"{name}.weight"]
        others.load_state_dict(optimizer_state)
        other.grow(growth)
        loaded.append((other, others))
    layer.grow({"user": 3, "item": 1})
    for one, its in ((layer, optimizer), *loaded):
        for seed in range(2):
            step(one, its, [10, 4, 5], seed)
    for other, others in loaded:
        assert_equal(layer, optimizer, other, others)
    # Saved after growing, for a layer of that size.
    again = TableBatchedEmbeddingBag(large_sizes, sparse=True)
    its = make(params(again))
    again.load_state_dict(layer.state_dict())
    its.load_state_dict(optimizer.state_dict())
    assert_equal(layer, optimizer, again, its)


@pytest.mark.parametrize("make", [DENSE["Adam"], DENSE["Adagrad"]], ids=["Adam", "Adagrad"])
@every_size
def test_loading_and_growing_is_growing_with_torchs_optimizers(make, sizes):
    layer = make_layer(sizes, False)
    optimizer = make(layer.parameters())
    step(layer, optimizer, [7, 3, 5], 0)
    other = TableBatchedEmbeddingBag(sizes, init=first_rows)
    others = make(other.parameters())
    other.load_state_dict(layer.state_dict())
    others.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, its in ((layer, optimizer), (other, others)):
        one.grow({"user": 3, "item": 1})
        step(one, its, [10, 4, 5], 1)
    assert_equal(layer, optimizer, other, others)


@every_size
def test_loading_taller_tables_says_to_grow(sizes):
    layer, small = make_layer(sizes, True), make_layer(sizes, True)
    optimizer, its = (optim.Adagrad(one.parameters()) for one in (layer, small))
    step(layer, optimizer, [7, 3, 5], 0)
    layer.grow({"user": 3, "item": 1})
    before = small["user"].detach().clone()
    with pytest.raises(
        RuntimeError,
        match=r"(?s)size mismatch for .*user.*call grow\(\{'user': 3, 'item': 1\}\) first",
    ):
        small.load_state_dict(layer.state_dict())
    assert torch.equal(small["user"], before)
    with pytest.raises(
        ValueError, match=r"table 'user' needs a state sum .* layer\.grow\(\) adds rows"
    ):
        its.load_state_dict(optimizer.state_dict())
    small.grow({"user": 3, "item": 1})
    small.load_state_dict(layer.state_dict())
    its.load_state_dict(optimizer.state_dict())
    assert_equal(layer, optimizer, small, its)


@every_size
@pytest.mark.parametrize("way", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_grow_on_their_own(sizes, way):
    layer = make_layer(sizes, True)
    layer.grow("user", 2)
    other = way(layer)
    assert other.layout == layer.layout
    assert torch.equal(other.weight, layer.weight)
    other.grow("shop", 1)
    assert layer.layout.num_embeddings == (9, 3, 5)
    assert torch.equal(other["shop"][5], 0.25 * torch.arange(sizes["shop"][1]))


@every_size
def test_copies_of_groups_follow_the_copied_layer(sizes):
    layer = make_layer(sizes, True)
    optimizer = optim.RowWiseAdagrad(layer.parameters_of("shop", "item"), lr=0.5)
    step(layer, optimizer, [7, 3, 5], 0)
    other, others = copy.deepcopy((layer, optimizer))
    for one, its in ((layer, optimizer), (other, others)):
        one.grow({"user": 1, "item": 2})
        step(one, its, [8, 5, 5], 1)
    assert_equal(layer, optimizer, other, others)


def test_files_of_safetensors_hold_grown_tables(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    layer = make_layer(MIXED, True)
    layer.grow("user", 2)
    safetensors.save_file(layer.state_dict(), tmp_path / "tables.safetensors")
    other = TableBatchedEmbeddingBag(MIXED)
    other.grow("user", 2)
    other.load_state_dict(safetensors.load_file(tmp_path / "tables.safetensors"))
    assert torch.equal(other.weight, layer.weight)


@every_size
def test_distributed_checkpoints_hold_grown_tables(sizes, tmp_path):
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    layer = make_layer(sizes, True)
    optimizer = optim.RowWiseAdagrad(layer.parameters(), lr=0.5)
    step(layer, optimizer, [7, 3, 5], 0)
    layer.grow("user", 2)
    step(layer, optimizer, [9, 3, 5], 1)
    checkpoint.save(
        dict(zip("ab", get_state_dict(layer, optimizer), strict=True)), checkpoint_id=tmp_path
    )
    other = make_layer(sizes, True)
    others = optim.RowWiseAdagrad(other.parameters(), lr=0.5)
    other.grow("user", 2)
    state = dict(zip("ab", get_state_dict(other, others), strict=True))
    checkpoint.load(state, checkpoint_id=tmp_path)
    set_state_dict(other, others, model_state_dict=state["a"], optim_state_dict=state["b"])
    for one, its in ((layer, optimizer), (other, others)):
        step(one, its, [9, 3, 5], 2)
    assert_equal(layer, optimizer, other, others)


# Initializers.


@every_size
def test_each_table_has_its_initializer(sizes):
    constant = functools.partial(nn.init.constant_, val=3.0)
    torch.manual_seed(0)
    layer = TableBatchedEmbeddingBag(
        sizes, padding_idx={"item": 0}, init={"item": constant, "shop": nn.init.zeros_}
    )
    torch.manual_seed(0)
    plain = TableBatchedEmbeddingBag(sizes)
    assert torch.equal(layer["user"], plain["user"])
    assert (layer["item"][1:] == 3).all()
    assert not layer["item"][0].any()
    assert not layer["shop"].any()
    layer.grow({"item": 2, "shop": 1})
    assert (layer["item"][1:] == 3).all()
    with torch.no_grad():
        layer.weight.fill_(7)
    for one in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        one.reset_parameters()
        assert (one["item"][1:] == 3).all()
        assert not one["item"][0].any()
        assert not one["shop"].any()
    modules = layer.to_modules()
    assert torch.equal(modules["item"].weight, layer["item"])


def test_one_initializer_of_all_or_one_each():
    for init in (nn.init.ones_, [nn.init.ones_] * 3):
        layer = TableBatchedEmbedding(UNIFORM, init=init)
        assert (layer.weight == 1).all()


WRONG_INITIALIZERS = {
    "no table": ({"nobody": nn.init.ones_}, ValueError, "init: no table is named 'nobody'"),
    "a number": ({"user": 0.5}, TypeError, r"init: table 'user' needs a function .* got 0\.5"),
    "too few": ([nn.init.ones_], ValueError, "init: 1 values for 3 tables"),
    "not in place": (torch.rand_like, TypeError, "of table 'user' returned another tensor"),
}


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_initializers_may_return_a_view_of_the_rows(device):
    layer = TableBatchedEmbedding(
        UNIFORM,
        init=[nn.init.ones_, lambda rows: rows.data.fill_(1), lambda rows: rows[:].fill_(1)],
        device=device,
    )
    layer.grow({"item": 1, "shop": 1})
    assert layer.weight.is_meta or (layer.weight == 1).all()


@pytest.mark.parametrize(
    ("init", "error", "message"), WRONG_INITIALIZERS.values(), ids=WRONG_INITIALIZERS
)
def test_wrong_initializers(init, error, message):
    for kind in (TableBatchedEmbedding, TableBatchedEmbeddingBag):
        with pytest.raises(error, match=message):
            kind(UNIFORM, init=init)
