"""Optimizers saved and resumed: by torch.distributed.checkpoint, and by the names of a batched layer's tables."""

import copy
import io
import math
import pickle
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from cases import same_bits
from table_cases import integer_layer, integers
from tiers import where
from torch.distributed.checkpoint import state_dict as dcp_state

import gpu_embed
from gpu_embed import optim

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        "Sparse invariant checks are implicitly disabled",
        "torch.distributed is disabled, unavailable or uninitialized",
        "TypedStorage is deprecated",
    )
]

UNIFORM = {"user": (7, 4), "item": (3, 4), "shop": (5, 4)}
# What lies between these tables is no part of any.
MIXED = {"user": (7, 3), "item": (3, 12), "shop": (5, 5)}
every_size = pytest.mark.parametrize("sizes", [UNIFORM, MIXED], ids=["uniform", "mixed"])
CLASSES = (optim.SGD, optim.Adagrad, optim.RowWiseAdagrad, optim.Adam, optim.AdamW)
every_class = pytest.mark.parametrize("optimizer_class", CLASSES, ids=lambda one: one.__name__)
with_state = pytest.mark.parametrize("optimizer_class", CLASSES[1:], ids=lambda one: one.__name__)
LAYERS = {
    "Embedding": lambda: gpu_embed.Embedding(15, 4, sparse=True),
    "EmbeddingBag": lambda: gpu_embed.EmbeddingBag(15, 4, mode="sum", sparse=True),
    "uniform": lambda: gpu_embed.TableBatchedEmbeddingBag(UNIFORM, sparse=True),
    "mixed": lambda: gpu_embed.TableBatchedEmbeddingBag(MIXED, sparse=True),
}
every_layer = pytest.mark.parametrize("make_layer", LAYERS.values(), ids=LAYERS)


def train(layer, optimizer, seeds):
    """One step a seed, with gradients that differ from row to row."""
    for seed in seeds:
        optimizer.zero_grad()
        if isinstance(layer, gpu_embed.TableBatchedEmbeddingBag):
            heights = layer.layout.num_embeddings
            ids = torch.cat([integers(4, seed=seed, low=0, high=rows) for rows in heights])
            output = layer(ids, torch.arange(0, len(ids) + 1, 2))
        else:
            output = layer(integers(4, 2, seed=seed, low=0, high=layer.num_embeddings))
        output.backward(integers(*output.shape, seed=seed, low=1).to(output))
        optimizer.step()
    optimizer.zero_grad()


def model_of(make_layer, dtype=torch.float32):
    """A model in which the layer has a name."""
    return torch.nn.Sequential(torch.nn.Identity(), make_layer().to(dtype))


def assert_same_state(one, other):
    """The live state of two optimizers."""
    (of_one,), (of_other,) = one.state.values(), other.state.values()
    assert of_one.keys() == of_other.keys()
    for name, value in of_one.items():
        equal = same_bits if isinstance(value, torch.Tensor) else int.__eq__
        assert equal(value, of_other[name]), name


# torch.distributed.checkpoint.

OPTIONS = {
    "default": {},
    "full": {"full_state_dict": True},
    "offloaded": {"cpu_offload": True},
    "full, offloaded": {"full_state_dict": True, "cpu_offload": True},
    "flat": {"flatten_optimizer_state_dict": True},
}


def resumed(make_layer, make_optimizer, options, path, dtype=torch.float32):
    """A layer and optimizer two steps old, and others that were made from what these saved."""
    options = dcp_state.StateDictOptions(**options)
    model = model_of(make_layer, dtype)
    optimizer = make_optimizer(model)
    train(model[1], optimizer, range(2))
    of_optimizer = dcp_state.get_optimizer_state_dict(model, optimizer, options=options)
    saved = {"model": model.state_dict(), "optimizer": of_optimizer}
    dcp.save(saved, checkpoint_id=path, no_dist=True)
    fresh_model = model_of(make_layer, dtype)
    fresh = make_optimizer(fresh_model)
    # Of the same type, or the checkpoint does not fit.
    fresh.param_groups[0]["lr"] *= 77
    before = fresh_model[1].weight.detach().clone()
    of_optimizer = dcp_state.get_optimizer_state_dict(fresh_model, fresh, options=options)
    assert same_bits(fresh_model[1].weight.detach(), before)
    loaded = {"model": fresh_model.state_dict(), "optimizer": of_optimizer}
    dcp.load(loaded, checkpoint_id=path, no_dist=True)
    fresh_model.load_state_dict(loaded["model"])
    dcp_state.set_optimizer_state_dict(fresh_model, fresh, loaded["optimizer"], options=options)
    return model[1], optimizer, fresh_model[1], fresh


def assert_goes_on(layer, optimizer, fresh_layer, fresh):
    assert fresh.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    train(layer, optimizer, range(2, 4))
    train(fresh_layer, fresh, range(2, 4))
    assert_same_state(optimizer, fresh)
    assert same_bits(layer.weight.detach(), fresh_layer.weight.detach())


# torch loads a full state only where it holds a tensor, its own SGD's neither.
@where(
    lambda optimizer_class, options: (
        optimizer_class is not optim.SGD or not options.get("full_state_dict")
    )
)
@every_layer
@every_class
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_training_goes_on_from_a_distributed_checkpoint(
    make_layer, optimizer_class, options, tmp_path
):
    """Bit for bit what it would have been without a break, on one process and without a process group."""
    layer, optimizer, fresh_layer, fresh = resumed(
        make_layer,
        lambda model: optimizer_class(model.parameters(), lr=0.25),
        options,
        tmp_path,
    )
    assert_same_state(optimizer, fresh)
    assert_goes_on(layer, optimizer, fresh_layer, fresh)


@every_class
def test_loading_and_copying_add_no_setting(optimizer_class):
    """A full state that has one more cannot be loaded by torch.distributed.checkpoint."""
    layer = gpu_embed.Embedding(5, 2, sparse=True)
    optimizer, fresh = (optimizer_class(layer.parameters(), lr=0.25) for _ in range(2))
    saved = optimizer.state_dict()
    fresh.load_state_dict(saved)
    for other in (fresh, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(fresh))):
        assert other.state_dict()["param_groups"][0].keys() == saved["param_groups"][0].keys()


@every_layer
@every_class
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_setting_goes_on_from_a_distributed_checkpoint(
    make_layer, optimizer_class, options, tmp_path
):
    """The rows, and a seed that was drawn, are the saved ones again."""
    layer, optimizer, fresh_layer, fresh = resumed(
        make_layer,
        lambda model: optimizer_class(
            model.parameters(),
            lr=torch.tensor(0.01),
            rows=[0, 1, 2, 8, 9, 13],
            maximize=True,
            stochastic_rounding=True,
        ),
        options,
        tmp_path,
        torch.bfloat16,
    )
    assert torch.equal(*(one.param_groups[0]["rows"] for one in (optimizer, fresh)))
    assert fresh.param_groups[0]["seed"] == optimizer.param_groups[0]["seed"]
    assert_goes_on(layer, optimizer, fresh_layer, fresh)


class TwoLayers(torch.nn.Module):
    """With tables of the same names."""

    def __init__(self):
        super().__init__()
        self.first = gpu_embed.TableBatchedEmbeddingBag(MIXED, sparse=True)
        self.second = gpu_embed.TableBatchedEmbeddingBag(UNIFORM, sparse=True)
        self.alone = gpu_embed.Embedding(15, 4, sparse=True)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_layers_groups_and_optimizers_go_on_from_a_distributed_checkpoint(options, tmp_path):
    """The model's part included."""
    options = dcp_state.StateDictOptions(**options)
    models = TwoLayers(), TwoLayers()
    kept = []
    for model in models:
        groups = [
            {"params": [model.alone.weight], "lr": 0.5},
            {"params": [model.second.weight], "lr": 0.25},
        ]
        kept.append([optim.Adam(groups), optim.Adagrad([model.first.weight], lr=0.125)])
    (model, fresh_model), (optimizers, fresh) = models, kept
    layers = [("alone", 0), ("second", 0), ("first", 1)]
    for name, number in layers:
        train(getattr(model, name), optimizers[number], range(2))
    saved = dcp_state.get_state_dict(model, optimizers, options=options)
    dcp.save(dict(zip("mo", saved, strict=True)), checkpoint_id=tmp_path, no_dist=True)
    loaded = dcp_state.get_state_dict(fresh_model, fresh, options=options)
    dcp.load(dict(zip("mo", loaded, strict=True)), checkpoint_id=tmp_path, no_dist=True)
    dcp_state.set_state_dict(
        fresh_model,
        fresh,
        model_state_dict=loaded[0],
        optim_state_dict=loaded[1],
        options=options,
    )
    for name, number in layers:
        for one, stepped in ((model, optimizers), (fresh_model, fresh)):
            train(getattr(one, name), stepped[number], range(2, 4))
        assert torch.equal(getattr(model, name).weight, getattr(fresh_model, name).weight)


def test_a_new_table_of_a_distributed_checkpoint_begins_anew(tmp_path):
    """Where torch hands on what was saved and what is there."""
    options = dcp_state.StateDictOptions(full_state_dict=True)
    old, new = (
        model_of(lambda sizes=sizes: gpu_embed.TableBatchedEmbeddingBag(sizes, sparse=True))
        for sizes in ({"user": (7, 4)}, {"item": (3, 4), "user": (7, 4)})
    )
    optimizer, fresh = (
        optim.Adagrad(model.parameters(), initial_accumulator_value=0.5) for model in (old, new)
    )
    train(old[1], optimizer, range(2))
    saved = dcp_state.get_optimizer_state_dict(old, optimizer, options=options)
    dcp_state.set_optimizer_state_dict(new, fresh, saved, options=options)
    (of_old,), (of_new,) = optimizer.state.values(), fresh.state.values()
    assert torch.equal(of_new["sum"], torch.cat([torch.full((3, 4), 0.5), of_old["sum"]]))
    assert of_new["step"] == 2


ZERO_STEPS = {
    "alone": {},
    "tensor lr": {"lr": torch.tensor(0.0)},
    "maximize": {"maximize": True},
    "rows": {"rows": [0, 2]},
    "stochastic": {"stochastic_rounding": True},
}


PARAMETERS = {
    **{name: (make_layer, None) for name, make_layer in LAYERS.items()},
    "one of uniform": (LAYERS["uniform"], ("item", "shop")),
    "one of mixed": (LAYERS["mixed"], ("user", "item")),
    # rows= wants tables of one height.
    "two of mixed": (
        lambda: gpu_embed.TableBatchedEmbeddingBag([(7, 3), (3, 12), (7, 5)], sparse=True),
        ("0", "2"),
    ),
}


def parameters(layer, names):
    return layer.parameters_of(*names) if names else list(layer.parameters())


@pytest.mark.parametrize(("make_layer", "names"), PARAMETERS.values(), ids=PARAMETERS)
@every_class
@pytest.mark.parametrize("arguments", ZERO_STEPS.values(), ids=ZERO_STEPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dense_zeros_and_no_lr_make_the_state_alone(
    make_layer, names, optimizer_class, arguments, dtype
):
    """And the first step after it is the first one."""
    layer = make_layer().to(dtype)
    params = parameters(layer, names)
    before = layer.weight.detach().clone()
    optimizer = optimizer_class(params, **{"lr": 0.0, **arguments})
    random_state = torch.get_rng_state()
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    assert same_bits(layer.weight.detach(), before)
    assert torch.equal(torch.get_rng_state(), random_state)
    optimizer.zero_grad()
    assert layer.weight.grad is None
    optimizer.param_groups[0]["lr"] = 0.25
    twin = copy.deepcopy(layer)
    untouched = optimizer_class(parameters(twin, names), **{**arguments, "lr": 0.25})
    for param in params:
        assert optimizer.state[param]["step"] == 0
        assert param.grad is None
    for one, stepped in ((layer, optimizer), (twin, untouched)):
        torch.manual_seed(1)
        train(one, stepped, range(2))
    assert same_bits(layer.weight.detach(), twin.weight.detach())


@every_layer
@every_class
@pytest.mark.parametrize(
    ("lr", "value"), [(0.25, 0.0), (0.0, 1.0), (0.0, math.nan), (torch.tensor(0.25), 0.0)], ids=str
)
def test_other_dense_gradients_are_refused(make_layer, optimizer_class, lr, value):
    layer = make_layer()
    optimizer = optimizer_class(layer.parameters(), lr=lr)
    layer.weight.grad = torch.zeros_like(layer.weight)
    layer.weight.grad.view(-1)[-1] = value
    with pytest.raises(RuntimeError, match="does not support dense gradients"):
        optimizer.step()
    assert not optimizer.state


# By the names of tables.


def trained(sizes, optimizer_class=optim.Adagrad, by_table=(), **arguments):
    """A layer and its optimizer, two steps old."""
    layer = integer_layer(sizes, sparse=True)
    groups = [{"params": layer.parameters_of(*names)} for names in by_table]
    optimizer = optimizer_class(groups or layer.parameters(), **{"lr": 0.25, **arguments})
    train(layer, optimizer, range(2))
    return layer, optimizer


def kinds_of(optimizer):
    """Names of the state, without the step."""
    (state, *_) = optimizer.state.values()
    return [name for name, value in state.items() if isinstance(value, torch.Tensor)]


def parts_of(optimizer, kind):
    """One kind of state of each table."""
    parts = {
        key.partition(".")[2]: value
        for state in optimizer.state_dict()["state"].values()
        for key, value in state.items()
        if key.startswith(f"{kind}.")
    }
    assert parts
    return parts


@every_size
@with_state
@pytest.mark.parametrize("by_table", [(), [("user", "item"), ("shop",)]], ids=["whole", "by table"])
def test_state_is_saved_by_the_names_of_tables(sizes, optimizer_class, by_table):
    """That of a table is what its own layer's would be; a file gets its numbers alone."""
    _, optimizer = trained(sizes, optimizer_class, by_table)
    modules = integer_layer(sizes, sparse=True).to_modules()
    twins = {
        name: optimizer_class(module.parameters(), lr=0.25) for name, module in modules.items()
    }
    for seed in range(2):
        ids = [integers(4, seed=seed, low=0, high=rows) for rows, _ in sizes.values()]
        grads = integers(2, sum(dim for _, dim in sizes.values()), seed=seed, low=1).float()
        columns = grads.split([dim for _, dim in sizes.values()], 1)
        for (name, module), own, grad in zip(modules.items(), ids, columns, strict=True):
            twins[name].zero_grad()
            module(own.view(2, 2)).backward(grad)
            twins[name].step()
    for kind in kinds_of(optimizer):
        parts = parts_of(optimizer, kind)
        assert list(parts) == list(sizes)
        for name, part in parts.items():
            (state,) = twins[name].state.values()
            assert torch.equal(part, state[kind])
            assert part.untyped_storage().nbytes() == part.nbytes
    for state in optimizer.state_dict()["state"].values():
        assert state["step"] == 2
        assert not any(isinstance(value, dict) for value in state.values())


@every_size
@with_state
@pytest.mark.parametrize("by_table", [(), [("user", "item"), ("shop",)]], ids=["whole", "by table"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_saved_optimizer_goes_on_by_table(sizes, optimizer_class, by_table, dtype):
    """Bit for bit, through a file without code, a copy and a pickle."""

    def make(layer):
        groups = [{"params": layer.parameters_of(*names)} for names in by_table]
        return optimizer_class(
            groups or layer.parameters(), lr=0.25, stochastic_rounding=True, seed=3
        )

    layer = integer_layer(sizes, sparse=True).to(dtype)
    optimizer = make(layer)
    train(layer, optimizer, range(2))
    saved = copy.deepcopy((layer.state_dict(), optimizer.state_dict()))
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    read = torch.load(file, weights_only=True)
    pickled = pickle.loads(pickle.dumps(saved))
    train(layer, optimizer, range(2, 4))
    for of_layer, of_optimizer in (saved, read, pickled):
        twin = integer_layer(sizes, sparse=True).to(dtype)
        fresh = make(twin)
        twin.load_state_dict(of_layer)
        fresh.load_state_dict(of_optimizer)
        train(twin, fresh, range(2, 4))
        assert same_bits(twin.weight.detach(), layer.weight.detach())


@every_size
@with_state
@pytest.mark.parametrize(
    ("order", "by_table"),
    [
        (("shop", "user", "item"), []),
        (("item", "shop", "user"), []),
        # Two parameters, of which the first is that of "user", and then that of "shop".
        (("shop", "item", "user"), [("user", "shop")]),
        (("item", "user", "shop"), [("user", "item"), ("shop",)]),
    ],
    ids=str,
)
def test_tables_may_have_another_order(sizes, optimizer_class, order, by_table):
    _, optimizer = trained(sizes, optimizer_class, by_table)
    layer, fresh = trained({name: sizes[name] for name in order}, optimizer_class, by_table)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for kind in kinds_of(optimizer):
        saved, loaded = parts_of(optimizer, kind), parts_of(fresh, kind)
        assert saved.keys() == loaded.keys()
        assert all(torch.equal(saved[name], loaded[name]) for name in saved)
    train(layer, fresh, range(2, 3))


@every_size
@pytest.mark.parametrize(
    ("optimizer_class", "arguments", "initial"),
    [
        (optim.Adagrad, {}, 0.0),
        (optim.Adagrad, {"initial_accumulator_value": 0.5}, 0.5),
        (optim.RowWiseAdagrad, {"initial_accumulator_value": 0.5}, 0.5),
        (optim.Adam, {}, 0.0),
        (optim.AdamW, {}, 0.0),
    ],
)
def test_added_and_grown_tables_begin_with_the_initial_state(
    sizes, optimizer_class, arguments, initial
):
    """With the number that the state was saved with, which is loaded too."""
    _, optimizer = trained(sizes, optimizer_class, **arguments)
    height, dim = sizes["item"]
    grown = {"new": (2, dim), **sizes, "item": (height + 4, dim)}
    layer, fresh = trained(grown, optimizer_class)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for kind in kinds_of(optimizer):
        saved, loaded = parts_of(optimizer, kind), parts_of(fresh, kind)
        assert list(loaded) == list(grown)
        for name, part in saved.items():
            assert torch.equal(loaded[name][: len(part)], part)
        assert loaded["new"].eq(initial).all()
        assert loaded["item"][height:].eq(initial).all()
        assert len(loaded["item"]) == height + 4
    train(layer, fresh, range(2, 3))
    assert fresh.state[layer.weight]["step"] == 3


@every_size
@pytest.mark.parametrize("by_table", [False, True], ids=["whole", "by table"])
def test_a_table_that_is_gone_is_named(sizes, by_table):
    _, optimizer = trained(sizes, by_table=[("user", "item")] if by_table else ())
    rest = sizes if by_table else {name: sizes[name] for name in ("shop", "user")}
    _, fresh = trained(rest, by_table=[("user",)] if by_table else ())
    with pytest.warns(UserWarning, match="none of this optimizer's, and are left out: 'item'$"):
        fresh.load_state_dict(optimizer.state_dict())
    assert torch.equal(parts_of(fresh, "sum")["user"], parts_of(optimizer, "sum")["user"])


def test_nothing_is_warned_of_where_every_table_is_found():
    _, optimizer = trained(MIXED, by_table=[("user", "item"), ("shop",)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained(MIXED, by_table=[("user", "item"), ("shop",)])[1].load_state_dict(
            optimizer.state_dict()
        )


def without(state_dict, *names):
    saved = copy.deepcopy(state_dict)
    for name in names:
        del saved["state"][0][name]
    return saved


def of_group(optimizer, **settings):
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0].update(settings)
    return saved


def without_state(optimizer_class):
    """As before its first step."""
    return optimizer_class(integer_layer(MIXED, sparse=True).parameters()).state_dict()


# What is loaded into an Adam of MIXED, and what of it does not fit.
UNFIT = {
    "a shrunk table": (
        lambda: trained({**MIXED, "shop": (6, 5)}, optim.Adam)[1].state_dict(),
        r"table 'shop' needs a state exp_avg of shape \[5, 5\], with at most that many rows, but .* has \[6, 5\]",
    ),
    "another embedding_dim": (
        lambda: trained({**MIXED, "user": (7, 4)}, optim.Adam)[1].state_dict(),
        r"table 'user' needs a state exp_avg of shape \[7, 3\], .* has \[7, 4\]",
    ),
    "rows for elements": (
        lambda: {
            **(saved := trained(MIXED, optim.Adam)[1].state_dict()),
            "state": {0: {**saved["state"][0], "exp_avg.item": torch.zeros(3)}},
        },
        r"table 'item' needs a state exp_avg of shape \[3, 12\], .* has \[3\]",
    ),
    "half of a table's state": (
        lambda: without(trained(MIXED, optim.Adam)[1].state_dict(), "exp_avg_sq.item"),
        "table 'item' needs a state exp_avg_sq .* has none",
    ),
    "another formula's": (
        lambda: trained(MIXED)[1].state_dict(),
        "Adam has no state sum",
    ),
    "a formula without state": (
        lambda: trained(MIXED, optim.SGD)[1].state_dict(),
        "Adam needs a state exp_avg of shape .* has none",
    ),
    "a buffer of another size": (
        lambda: {
            "state": {0: {name: torch.zeros(5) for name in ("exp_avg", "exp_avg_sq")}},
            "param_groups": trained(MIXED, optim.Adam)[1].state_dict()["param_groups"],
        },
        r"Adam needs a state exp_avg of shape \[.*\], but .* has \[5\]",
    ),
    "a step that is no number": (
        lambda: {
            **(saved := trained(MIXED, optim.Adam)[1].state_dict()),
            "state": {0: {**saved["state"][0], "step": "three"}},
        },
        "a step that is no number: 'three'",
    ),
    "no step": (
        lambda: {
            **(saved := trained(MIXED, optim.Adam)[1].state_dict()),
            "state": {0: {**saved["state"][0], "step": None}},
        },
        "a step that is no number: None",
    ),
    "another optimizer's settings": (
        lambda: without_state(optim.SGD),
        r"Adam has the settings \['lr', 'betas', 'eps'\], but group 0 .* has \['lr'\]: another optimizer",
    ),
    "other settings": (
        lambda: without_state(optim.RowWiseAdagrad),
        r"Adam has the settings .* has \['lr', 'eps', 'initial_accumulator_value', 'lr_decay'\]",
    ),
    "torch's SGD": (
        lambda: torch.optim.SGD(integer_layer(MIXED).parameters()).state_dict(),
        r"Adam has the settings .* has \['lr'\]: another optimizer has saved it",
    ),
    "a beta out of range": (
        lambda: of_group(trained(MIXED, optim.Adam)[1], betas=(0.9, 1.0)),
        "Invalid beta parameter at index 1: 1.0",
    ),
    "rows of other tables": (
        lambda: trained({"new": (7, 3)}, optim.Adam, rows=[1])[1].state_dict(),
        "rows: the masks are for the tables 'new', and the group has none of these",
    ),
    "rows of a shrunk table": (
        lambda: trained({**MIXED, "user": (8, 3)}, optim.Adam, rows=[1])[1].state_dict(),
        r"rows: table 'user' needs a bool mask of shape \[7\], with at most that many rows, but .* \[8\]",
    ),
    "rows that are no mask": (
        lambda: of_group(trained(MIXED, optim.Adam)[1], rows={"user": torch.arange(7)}),
        r"rows: table 'user' needs a bool mask of shape \[7\], .* got torch.int64 of shape \[7\]",
    ),
    "two parameters": (
        lambda: trained(MIXED, optim.Adam, [("user", "shop")])[1].state_dict(),
        "doesn't match the size",
    ),
    "two groups": (
        lambda: trained(MIXED, optim.Adam, [("user",), ("shop",)])[1].state_dict(),
        "different number of parameter groups",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "message"), UNFIT.values(), ids=UNFIT)
def test_what_does_not_fit_is_refused_and_changes_nothing(make, message):
    _, optimizer = trained(MIXED, optim.Adam, lr=0.5)
    before = copy.deepcopy(optimizer.state_dict())
    saved = make()
    saved["param_groups"][0]["lr"] = 77.0
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert after["state"][0].keys() == before["state"][0].keys()
    for name, value in before["state"][0].items():
        assert torch.equal(torch.as_tensor(after["state"][0][name]), torch.as_tensor(value))


NO_STATES = {
    "None": (None, TypeError, "but got a NoneType$"),
    "a path": ("tables.pt", TypeError, "but got a str$"),
    "an optimizer": (optim.SGD([torch.zeros(2, 2)]), TypeError, "but got a SGD$"),
    "empty": ({}, ValueError, "but got an empty one$"),
    "a model's": (
        {"weight": torch.zeros(2), "bias": torch.zeros(2)},
        ValueError,
        "but got one with 'weight', 'bias'$",
    ),
    "no groups": ({"state": {}}, ValueError, "but got one with 'state'$"),
    "no state": ({"param_groups": []}, ValueError, "but got one with 'param_groups'$"),
    "no dict of states": (
        {"state": None, "param_groups": []},
        ValueError,
        "but got one with 'state', 'param_groups'$",
    ),
    "a group without params": (
        {"state": {}, "param_groups": [{"lr": 0.1}]},
        ValueError,
        "but got one whose group 0 has no list 'params'$",
    ),
    "a group that is none": (
        {"state": {}, "param_groups": [3]},
        ValueError,
        "but got one whose group 0 has no list 'params'$",
    ),
}  # fmt: skip


@every_class
@pytest.mark.parametrize(("saved", "kind", "message"), NO_STATES.values(), ids=NO_STATES)
def test_what_no_optimizer_has_saved_is_refused(optimizer_class, saved, kind, message):
    layer, optimizer = trained(UNIFORM, optimizer_class)
    before = copy.deepcopy(optimizer.state_dict())
    expected = r"load_state_dict takes what an optimizer's state_dict\(\) returns, .*" + message
    with pytest.raises(kind, match=f"^{optimizer_class.__name__}.{expected}"):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["params"] == [layer.weight]
    assert str(optimizer.state_dict()) == str(before)


# Whose state each takes before any step, where little tells them apart.
TAKES = {
    optim.SGD: (optim.SGD, torch.optim.SGD),
    optim.Adagrad: (optim.Adagrad, optim.RowWiseAdagrad, torch.optim.Adagrad),
    # torch's makes its state at once, of another shape.
    optim.RowWiseAdagrad: (optim.Adagrad, optim.RowWiseAdagrad),
    optim.Adam: (optim.Adam, torch.optim.SparseAdam),
    optim.AdamW: (optim.Adam, optim.AdamW, torch.optim.SparseAdam, torch.optim.AdamW),
}
SAVED_BY = list(dict.fromkeys(one for taken in TAKES.values() for one in taken))


@every_class
@pytest.mark.parametrize("saved_by", SAVED_BY, ids=lambda one: f"{one.__module__}.{one.__name__}")
def test_another_optimizers_state_is_refused_before_its_first_step_too(optimizer_class, saved_by):
    saved = saved_by([torch.nn.Parameter(torch.zeros(3, 2))], lr=0.25).state_dict()
    optimizer = optimizer_class([torch.nn.Parameter(torch.zeros(3, 2))], lr=0.5)
    if saved_by in TAKES[optimizer_class]:
        optimizer.load_state_dict(saved)
        assert optimizer.param_groups[0]["lr"] == 0.25
        return
    message = "(has the settings|has no weight_decay|has no state sum|needs a state sum)"
    with pytest.raises(ValueError, match=f"^{optimizer_class.__name__} {message}"):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.5


def stepped(sizes, optimizer_class, steps, **arguments):
    """A layer whose optimizer has a parameter for each of `steps`, named by its tables, so many steps old."""
    layer = integer_layer(sizes, sparse=True)
    groups = [{"params": layer.parameters_of(*names.split("+"))} for names in steps]
    optimizer = optimizer_class(groups, lr=0.25, **arguments)
    params = [group["params"][0] for group in optimizer.param_groups]
    for number, count in enumerate(steps.values()):
        for _ in range(count):
            train_alone(layer, optimizer, number)
    return layer, optimizer, params


def train_alone(layer, optimizer, number):
    """A step of one parameter alone."""
    others = optimizer.param_groups
    optimizer.param_groups = [others[number]]
    train(layer, optimizer, range(1))
    optimizer.param_groups = others


def steps_of(optimizer, params):
    return [optimizer.state[param].get("step") for param in params]


@every_size
@with_state
def test_steps_go_with_their_tables(sizes, optimizer_class):
    """Where the tables have become parameters in another order, and not with the place."""
    _, old, _ = stepped(sizes, optimizer_class, {"user": 3, "item+shop": 1})
    order = {name: sizes[name] for name in ("item", "shop", "user")}
    layer, fresh, params = stepped(order, optimizer_class, {"item+shop": 0, "user": 0})
    fresh.load_state_dict(copy.deepcopy(old.state_dict()))
    assert steps_of(fresh, params) == [1, 3]
    train(layer, fresh, range(1))
    assert steps_of(fresh, params) == [2, 4]


@every_size
@with_state
def test_tables_of_different_steps_do_not_become_one_parameter(sizes, optimizer_class):
    _, old, _ = stepped(sizes, optimizer_class, {"user": 3, "item+shop": 1})
    layer, fresh, params = stepped(sizes, optimizer_class, {"user+item": 0, "shop": 0})
    message = r"saved with different steps, {'user': 3, 'item': 1}: .* parameters_of\(name\)"
    with pytest.raises(ValueError, match=message):
        fresh.load_state_dict(old.state_dict())
    assert not fresh.state
    train(layer, fresh, range(1))
    assert steps_of(fresh, params) == [1, 1]


@every_size
@with_state
def test_a_parameter_of_new_tables_begins_with_its_first_step(sizes, optimizer_class):
    old_sizes = {name: sizes[name] for name in ("user", "item")}
    _, old, _ = stepped(old_sizes, optimizer_class, {"user": 3, "item": 1})
    layer, fresh, params = stepped(sizes, optimizer_class, {"user+item": 0, "shop": 0})
    with pytest.raises(ValueError, match="different steps"):
        fresh.load_state_dict(old.state_dict())
    same = stepped(old_sizes, optimizer_class, {"user": 2, "item": 2})[1]
    fresh.load_state_dict(same.state_dict())
    assert steps_of(fresh, params) == [2, 0]
    train(layer, fresh, range(1))
    assert steps_of(fresh, params) == [3, 1]


@every_size
@with_state
def test_the_state_of_the_whole_parameter_is_loaded(sizes, optimizer_class):
    """As it was saved before tables had names in it."""
    layer, optimizer = trained(sizes, optimizer_class)
    saved = optimizer.state_dict()
    saved["state"][0] = copy.deepcopy(optimizer.state[layer.weight])
    twin, fresh = trained(sizes, optimizer_class)
    twin.load_state_dict(layer.state_dict())
    fresh.load_state_dict(saved)
    assert_same_state(optimizer, fresh)


def test_torchs_optimizer_of_a_batched_layer_goes_on_in_ours():
    layer = integer_layer(UNIFORM, sparse=True)
    theirs = torch.optim.SparseAdam(layer.parameters(), lr=0.25)
    train(layer, theirs, range(2))
    ours = optim.Adam(layer.parameters())
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    for kind in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(ours.state[layer.weight][kind], theirs.state[layer.weight][kind])
    assert ours.state[layer.weight]["step"] == 2


@every_size
def test_loaded_state_is_a_copy_unless_it_is_the_optimizers_own(sizes):
    """Into its own memory a checkpoint is read in place; no second copy of tall tables is made for it."""
    layer, optimizer = trained(sizes)
    own = optimizer.state[layer.weight]["sum"]
    saved = optimizer.state_dict()
    for part in parts_of(optimizer, "sum").values():
        part.fill_(3.0)
    optimizer.load_state_dict(saved)
    assert optimizer.state[layer.weight]["sum"] is own
    assert all(part.eq(3.0).all() for part in parts_of(optimizer, "sum").values())
    twin, fresh = trained(sizes)
    fresh.load_state_dict(saved)
    train(twin, fresh, range(1))
    assert all(part.eq(3.0).all() for part in parts_of(optimizer, "sum").values())


@every_class
@every_layer
def test_updates_in_backward_follow_what_is_loaded(make_layer, optimizer_class):
    """The loaded numbers are those of the next update, and so are those that a schedule sets afterwards."""
    layers = [make_layer() for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    updates = optim.apply_in_backward(layers[0], optimizer_class, lr=77.0)
    optimizer = optimizer_class(layers[1].parameters(), lr=0.25)
    updates.optimizer.load_state_dict(optimizer.state_dict())
    for seed, lr in enumerate((0.25, 0.125)):
        for one in (updates.optimizer, optimizer):
            one.param_groups[0]["lr"] = lr
        train(layers[0], updates.optimizer, [seed])
        train(layers[1], optimizer, [seed])
        assert same_bits(layers[0].weight.detach(), layers[1].weight.detach())


@every_size
def test_chosen_rows_are_saved_by_table(sizes):
    """They stay the same rows of the same tables in another order."""
    _, optimizer = trained(sizes, rows=[1, 6, 7, 14])
    saved = copy.deepcopy(optimizer.state_dict())
    (packed,) = saved["param_groups"]
    chosen = {name: mask.nonzero()[:, 0].tolist() for name, mask in packed["rows"].items()}
    assert chosen == {"user": [1, 6], "item": [0], "shop": [4]}
    turned = {name: sizes[name] for name in reversed(sizes)}
    _, fresh = trained(turned)
    fresh.load_state_dict(saved)
    assert fresh.param_groups[0]["rows"].nonzero()[:, 0].tolist() == [4, 5, 9, 14]


@every_size
@every_class
def test_rows_of_added_and_grown_tables_may_all_change(sizes, optimizer_class):
    """And the masks of the tables that were saved are kept; that of a table that is gone is dropped."""
    _, optimizer = trained(sizes, optimizer_class, rows=[1, 6, 7, 14])
    height, dim = sizes["item"]
    changed = {"new": (2, 3), "item": (height + 2, dim), "user": sizes["user"]}
    layer, fresh = trained(changed, optimizer_class)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*: the state to be loaded has tables")
        fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    # Of "new" both; of "item" the first and those added; of "user" 1 and 6.
    mask = fresh.param_groups[0]["rows"]
    assert mask.nonzero()[:, 0].tolist() == [0, 1, 2, 5, 6, 8, 13]
    before = {name: rows.detach().clone() for name, rows in layer.items()}
    layer(*gpu_embed.batch_bags(all_rows_of(layer))).sum().backward()
    fresh.step()
    moved = [rows.detach().ne(before[name]).any(1) for name, rows in layer.items()]
    assert torch.equal(torch.cat(moved), mask)


def all_rows_of(layer):
    """Every row of every table, in one bag."""
    return [(torch.arange(len(rows)), torch.tensor([0])) for _, rows in layer.items()]


def test_the_mask_of_a_group_goes_with_the_table_that_it_was_saved_for():
    """Where the tables of a group have another order."""
    sizes = {"user": (7, 3), "item": (3, 12), "shop": (7, 5)}
    old = optim.Adam(integer_layer(sizes, sparse=True).parameters_of("user", "shop"), rows=[1, 6])
    turned = {name: sizes[name] for name in reversed(sizes)}
    fresh = optim.Adam(integer_layer(turned, sparse=True).parameters_of("shop", "user"))
    fresh.load_state_dict(copy.deepcopy(old.state_dict()))
    assert fresh.param_groups[0]["rows"].nonzero()[:, 0].tolist() == [1, 6]


def test_hooks_on_saving_see_what_is_saved():
    layer, optimizer = trained(MIXED)
    seen = []
    optimizer.register_state_dict_post_hook(lambda _, saved: seen.append(list(saved["state"][0])))
    optimizer.state_dict()
    assert seen == [["step", "sum.user", "sum.item", "sum.shop"]]
    assert "sum" in optimizer.state[layer.weight]
    # Its own hook is gone again.
    assert len(optimizer._optimizer_state_dict_post_hooks) == 1


def test_tables_without_rows_are_saved_too():
    sizes = {"none": (0, 3), **MIXED, "nothing": (0, 2)}
    layer = integer_layer(sizes, sparse=True)
    optimizer = optim.Adam(layer.parameters(), lr=0.0)
    layer.weight.grad = torch.zeros_like(layer.weight)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    assert saved["state"][0]["exp_avg.none"].shape == (0, 3)
    optimizer.load_state_dict(saved)
    assert list(parts_of(optimizer, "exp_avg_sq")) == list(sizes)


# Where the default device holds no data.


@every_layer
@every_class
def test_the_default_device_is_not_read(make_layer, optimizer_class):
    """Seeds are drawn from the CPU's generator there, too."""
    layer, expected = make_layer().bfloat16(), make_layer().bfloat16()
    expected.load_state_dict(layer.state_dict())
    arguments = {"lr": 0.01, "stochastic_rounding": True, "rows": [0, 1, 8]}
    torch.manual_seed(5)
    wanted = optimizer_class(expected.parameters(), **arguments)
    train(expected, wanted, range(1))
    torch.manual_seed(5)
    with torch.device("meta"):
        optimizer = optimizer_class(layer.parameters(), **arguments)
    step = optimizer.step
    optimizer.step = lambda: on_meta(step)
    train(layer, optimizer, range(1))
    with torch.device("meta"):
        optimizer.load_state_dict(copy.deepcopy(wanted.state_dict()))
    assert same_bits(layer.weight.detach(), expected.weight.detach())
    assert_same_state(optimizer, wanted)


def on_meta(step):
    with torch.device("meta"):
        return step()
