"""The batched layers as modules: state_dict, conversion, moves, initialisation, inputs, errors."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from table_cases import assert_same, by_layer, by_torch, integer_layer, random_input
from torch import nn

import gpu_embed
from gpu_embed import TableBatchedEmbedding, TableBatchedEmbeddingBag, batch_bags, batch_padded
from gpu_embed.nn import growing

NAMED = {"user": (7, 4), "item": (3, 12), "shop": (5, 8)}
UNIFORM = {"user": (7, 4), "item": (3, 4), "shop": (5, 4)}
both_shapes = pytest.mark.parametrize("sizes", [UNIFORM, NAMED], ids=["uniform", "mixed"])


def torch_modules(sizes, **arguments):
    return nn.ModuleDict(
        {name: nn.EmbeddingBag(*size, **arguments) for name, size in sizes.items()}
    )


def tables_equal(layer, modules):
    return all(torch.equal(rows, modules[name].weight) for name, rows in layer.items())


# Parameters.


@both_shapes
def test_tables_lie_in_one_parameter(sizes):
    layer = TableBatchedEmbeddingBag(sizes)
    assert [name for name, _ in layer.named_parameters()] == ["weight"]
    assert list(layer) == list(sizes)
    assert len(layer) == 3
    assert "user" in layer
    assert "nobody" not in layer
    for name, (rows, dim) in sizes.items():
        assert layer[name].shape == (rows, dim)
        assert layer[name].untyped_storage().data_ptr() == layer.weight.data_ptr()
        assert layer[name].data_ptr() % 16 == 0
    with torch.no_grad():
        layer["item"].fill_(5)
    assert (layer.weight == 5).sum() == layer["item"].numel()
    with pytest.raises(KeyError, match="nobody"):
        layer["nobody"]


def test_a_table_can_be_used_on_its_own():
    """Its view is part of the graph, as any other view of a parameter."""
    layer = TableBatchedEmbeddingBag(NAMED)
    layer["item"].sum().backward()
    assert layer.weight.grad.sum() == 36


@both_shapes
def test_parameters_begin_as_torchs(sizes):
    """N(0, 1), the same numbers as one layer after the other draws; the padding's row is zero."""
    torch.manual_seed(0)
    modules = torch_modules(sizes, padding_idx=1)
    torch.manual_seed(0)
    layer = TableBatchedEmbeddingBag(sizes, padding_idx=1)
    assert tables_equal(layer, modules)
    torch.manual_seed(1)
    layer.reset_parameters()
    assert not tables_equal(layer, modules)
    assert not layer["item"][1].any()
    # What lies between tables takes no part.
    assert layer.weight.count_nonzero() == sum((rows - 1) * dim for rows, dim in sizes.values())


def test_tables_grow_and_one_is_frozen(monkeypatch):
    """More of both, on every backend and with every optimizer: test_tables_growing.py, test_tables_frozen.py."""
    layer = TableBatchedEmbeddingBag(NAMED, sparse=True, init={"item": nn.init.ones_})
    optimizer = gpu_embed.optim.AdamW(layer.parameters())
    monkeypatch.setattr(growing, "_objects", lambda: [optimizer])
    ids, offsets = torch.tensor([6, 2, 4]), torch.arange(4)
    for _ in range(2):
        layer(ids, offsets).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        before = {name: rows.detach().clone() for name, rows in layer.items()}
        layer.grow("item", 2)
        assert torch.equal(layer["item"][:-2], before["item"])
        assert (layer["item"][-2:] == 1).all()
        layer["user"].requires_grad_(False)
    assert optimizer.state_dict()["state"][0]["exp_avg.item"].any(1).tolist() == [
        0,
        0,
        1,
        0,
        0,
        0,
        0,
    ]
    before = layer["user"].detach().clone()
    layer(ids, offsets).sum().backward()
    optimizer.step()
    assert torch.equal(layer["user"], before)


def test_printing():
    layer = TableBatchedEmbeddingBag([(2, 4), (3, 4)], sparse=True)
    assert repr(layer) == "TableBatchedEmbeddingBag(0: (2, 4), 1: (3, 4), sparse=True)"


# state_dict.


@both_shapes
def test_state_dict_goes_to_torchs_layers_and_back(sizes):
    layer = TableBatchedEmbeddingBag(sizes)
    modules = torch_modules(sizes)
    assert list(layer.state_dict()) == list(modules.state_dict())
    modules.load_state_dict(layer.state_dict())
    assert tables_equal(layer, modules)
    modules = torch_modules(sizes)
    assert str(layer.load_state_dict(modules.state_dict())) == "<All keys matched successfully>"
    assert tables_equal(layer, modules)


def test_state_dict_inside_a_model_and_in_a_file():
    model = nn.Sequential(TableBatchedEmbeddingBag(NAMED), nn.Linear(24, 1))
    assert list(model.state_dict())[:3] == ["0.user.weight", "0.item.weight", "0.shop.weight"]
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = nn.Sequential(TableBatchedEmbeddingBag(NAMED), nn.Linear(24, 1))
    other.load_state_dict(torch.load(file))
    assert torch.equal(other[0].weight, model[0].weight)


def test_state_dict_shares_memory_and_keeps_vars():
    layer = TableBatchedEmbeddingBag(NAMED)
    saved = layer.state_dict()["user.weight"]
    assert not saved.requires_grad
    assert saved.data_ptr() == layer["user"].data_ptr()
    assert layer.state_dict(keep_vars=True)["user.weight"].requires_grad


WRONG = {
    "missing": lambda state: state.pop("item.weight"),
    "unexpected table": lambda state: state.update({"nobody.weight": torch.zeros(1)}),
    "unexpected part": lambda state: state.update({"item.bias": torch.zeros(1)}),
    "the buffer's own name": lambda state: state.update({"weight": torch.zeros(1)}),
    "wrong shape": lambda state: state.update({"item.weight": torch.zeros(3, 5)}),
    "no tensor": lambda state: state.update({"item.weight": 3}),
}


@pytest.mark.parametrize("spoil", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
def test_errors_of_load_state_dict_are_torchs(spoil, strict):
    """As torch: the wording, and the keys that are reported."""
    modules, layer = torch_modules(NAMED), TableBatchedEmbeddingBag(NAMED)
    state = torch_modules(NAMED).state_dict()
    spoil(state)
    found = []
    for module in (modules, layer):
        try:
            keys = module.load_state_dict(state, strict=strict)
            found.append((sorted(keys.missing_keys), sorted(keys.unexpected_keys)))
        except RuntimeError as error:
            found.append(str(error).replace("TableBatchedEmbeddingBag", "ModuleDict"))
    theirs, ours = found
    assert ours == theirs
    if isinstance(ours, tuple) and ours[1]:
        assert tables_equal(layer, modules)


@both_shapes
def test_load_state_dict_assigns(sizes):
    """assign=True takes the checkpoint's dtype and device, and meta tables become real ones."""
    state = torch_modules(sizes).bfloat16().state_dict()
    for device in ("cpu", "meta"):
        layer = TableBatchedEmbeddingBag(sizes, device=device).requires_grad_(False)
        layer.load_state_dict(state, assign=True)
        assert layer.weight.dtype == torch.bfloat16
        assert layer.weight.device.type == layer.tables.fields.device.type == "cpu"
        assert not layer.weight.requires_grad
        assert all(torch.equal(rows, state[f"{name}.weight"]) for name, rows in layer.items())
        ids, offsets = random_input(layer, 2)
        assert layer(ids, offsets).shape == (2, sum(dim for _, dim in sizes.values()))


def test_load_state_dict_assigns_one_dtype():
    state = torch_modules(UNIFORM).state_dict()
    state["item.weight"] = state["item.weight"].bfloat16()
    layer = TableBatchedEmbeddingBag(UNIFORM)
    with pytest.raises(RuntimeError, match="tables in one buffer have one dtype and device"):
        layer.load_state_dict(state, assign=True)


def test_load_state_dict_by_swapping():
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        layer, modules = TableBatchedEmbeddingBag(UNIFORM), torch_modules(UNIFORM)
        layer.load_state_dict(modules.state_dict())
        assert tables_equal(layer, modules)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


# Conversion.


@pytest.mark.parametrize("named", [True, False], ids=["by name", "list"])
@pytest.mark.parametrize("kind", [gpu_embed.EmbeddingBag, nn.EmbeddingBag])
def test_bags_from_and_to_modules(named, kind):
    modules = {
        "user": kind(7, 4, mode="sum", padding_idx=2, dtype=torch.float64),
        "item": kind(3, 12, mode="mean", dtype=torch.float64),
        "shop": kind(5, 8, mode="max", padding_idx=0, dtype=torch.float64),
    }
    layer = TableBatchedEmbeddingBag.from_modules(modules if named else list(modules.values()))
    assert list(layer) == (["user", "item", "shop"] if named else ["0", "1", "2"])
    assert layer.layout.modes == ("sum", "mean", "max")
    assert layer.layout.padding_idx == (2, -1, 0)
    assert layer.weight.dtype == torch.float64
    back = layer.to_modules()
    for one, other in zip(back.values(), modules.values(), strict=True):
        assert type(one) is gpu_embed.EmbeddingBag
        assert torch.equal(one.weight, other.weight)
        assert one.weight.untyped_storage().data_ptr() != layer.weight.data_ptr()
        for name in ("mode", "padding_idx", "sparse", "num_embeddings", "embedding_dim"):
            assert getattr(one, name) == getattr(other, name)
    ids, offsets = random_input(layer, 3)
    assert_same(by_layer(layer, ids, offsets), by_torch(layer, ids, offsets))


def test_embeddings_from_and_to_modules():
    modules = nn.ModuleList(
        [nn.Embedding(4, 3, padding_idx=-1, sparse=True), nn.Embedding(2, 3, sparse=True)]
    )
    modules.requires_grad_(False)
    layer = TableBatchedEmbedding.from_modules(modules)
    assert layer.sparse
    assert not layer.weight.requires_grad
    rows = layer(torch.tensor([3, 0, 1]), torch.tensor([0, 2, 3]))
    assert torch.equal(rows, torch.cat([modules[0].weight[[3, 0]], modules[1].weight[[1]]]))
    for one, other in zip(layer.to_modules().values(), modules, strict=True):
        assert type(one) is gpu_embed.Embedding
        assert (one.padding_idx, one.sparse) == (other.padding_idx, other.sparse)
        assert not one.weight.requires_grad
        assert torch.equal(one.weight, other.weight)


BAG = nn.EmbeddingBag(2, 3)
REFUSED = {
    "no module": ([], ValueError, "at least one module is needed"),
    "another type": ([BAG, nn.Embedding(2, 3)], TypeError, "'1' is Embedding"),
    "max_norm": ([nn.EmbeddingBag(2, 3, max_norm=1.0)], ValueError, "'0' has max_norm"),
    "scaled": ([nn.EmbeddingBag(2, 3, scale_grad_by_freq=True)], ValueError, "scale_grad_by_freq"),
    "dtypes": ([BAG, nn.EmbeddingBag(2, 3).half()], ValueError, "one dtype, got torch.float32"),
    "sparse": (
        [BAG, nn.EmbeddingBag(2, 3, sparse=True)],
        ValueError,
        "one sparse, got False, True",
    ),
    "devices": ([BAG, nn.EmbeddingBag(2, 3, device="meta")], ValueError, "one device, got cpu"),
}


@pytest.mark.parametrize(("modules", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_modules_that_one_buffer_cannot_hold(modules, error, message):
    with pytest.raises(error, match=message):
        TableBatchedEmbeddingBag.from_modules(modules)


# Moves and copies.


def by_way_of_meta(layer):
    """`to_empty` leaves buffers undefined."""
    state = {name: rows.clone() for name, rows in layer.state_dict().items()}
    layer = layer.to("meta").to_empty(device="cpu")
    layer.load_state_dict(state)
    return layer


@both_shapes
@pytest.mark.parametrize(
    "move",
    [
        copy.deepcopy,
        lambda layer: pickle.loads(pickle.dumps(layer)),
        lambda layer: layer.double(),
        lambda layer: layer.half(),
        lambda layer: layer.to(torch.bfloat16),
        by_way_of_meta,
    ],
    ids=["deepcopy", "pickle", "double", "half", "bfloat16", "to_empty"],
)
def test_a_moved_layer_works(sizes, move):
    layer = integer_layer(sizes, mode="mean")
    ids, offsets = random_input(layer, 2)
    expected = layer(ids, offsets)
    moved = move(layer)
    assert moved.layout == layer.layout
    torch.testing.assert_close(moved(ids, offsets).float(), expected, rtol=2**-8, atol=0)


def test_another_process_knows_the_names(tmp_path):
    """Bounds: what a kernel writes of a name is a number of its process."""
    file = tmp_path / "layer.pt"
    gpu_embed.TableBatchedEmbeddingBag({"other": (1, 1)})
    torch.save(TableBatchedEmbeddingBag({"user": (2, 4), "item": (3, 4)}), file)
    code = (
        "import torch, gpu_embed\n"
        f"layer = torch.load({str(file)!r}, weights_only=False)\n"
        "try: layer(torch.tensor([0, 3]), torch.tensor([0, 1, 2]))\n"
        "except IndexError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "at position 0 of bag 0 of table 'item'" in done.stdout


@both_shapes
def test_an_optimizer_trains_it(sizes):
    """Dense gradients under torch's optimizers, as tables of their own are trained."""
    layer = integer_layer(sizes)
    modules = layer.to_modules()
    ids, offsets = random_input(layer, 3)
    for parameters, table in ((layer.parameters(), None), (modules.parameters(), 0)):
        optimizer = torch.optim.Adagrad(parameters, lr=0.5)
        for _ in range(2):
            optimizer.zero_grad()
            if table is None:
                output = layer(ids, offsets)
            else:
                output = torch.cat(
                    [
                        module(ids[begins[0] : begins[-1]], begins[:-1] - begins[0])
                        for module, begins in zip(
                            modules.values(),
                            [offsets[3 * i : 3 * i + 4] for i in range(3)],
                            strict=True,
                        )
                    ],
                    1,
                )
            output.pow(2).sum().backward()
            optimizer.step()
    for name, rows in layer.items():
        torch.testing.assert_close(rows, modules[name].weight)


def test_splitting_an_output_gives_views():
    layer = integer_layer(NAMED)
    output = layer(*random_input(layer, 2))
    parts = layer.split(output)
    assert [part.shape for part in parts] == [(2, 4), (2, 12), (2, 8)]
    assert all(part.data_ptr() != 0 and part._base is output for part in parts)
    assert torch.equal(torch.cat(parts, 1), output)


# Inputs.


def test_inputs_from_ids_and_offsets():
    layer = integer_layer(NAMED)
    ids, offsets = random_input(layer, 3)
    weights = torch.arange(len(ids)) * 1.0
    bags = []
    for table in range(3):
        begins = offsets[3 * table : 3 * table + 4]
        place = slice(begins[0], begins[-1])
        bags.append((ids[place], (begins - begins[0]).to(torch.int32), weights[place]))
    made = batch_bags(bags, include_last_offset=True)
    assert [tensor.tolist() for tensor in made[:3]] == [x.tolist() for x in (ids, offsets, weights)]
    assert made.features == 3
    made = batch_bags([(values, begins[:-1]) for values, begins, _ in bags])
    assert made.input.tolist() == ids.tolist()
    assert made.offsets.tolist() == offsets.tolist()
    assert made.per_sample_weights is None
    assert layer(*made).shape == (3, 24)


def test_ids_behind_the_last_offset_come_last():
    bags = [
        (torch.tensor([1, 2, 9]), torch.tensor([0, 1, 2]), torch.tensor([0.1, 0.2, 0.9])),
        (torch.tensor([8, 8, 8]), torch.tensor([0, 0, 0]), torch.tensor([0.8, 0.8, 0.8])),
        (torch.tensor([3, 9, 9]), torch.tensor([0, 0, 1]), torch.tensor([0.3, 0.9, 0.9])),
    ]
    made = batch_bags(bags, include_last_offset=True)
    assert made.input.tolist() == [1, 2, 3, 9, 8, 8, 8, 9, 9]
    assert made.offsets.tolist() == [0, 1, 2, 2, 2, 2, 3]
    assert [
        round(10 * weight) for weight in made.per_sample_weights.tolist()
    ] == made.input.tolist()


PADDED = [torch.tensor([[1, 0, 0], [2, 3, 0]]), torch.tensor([[4, 5], [0, 0]])]


@pytest.mark.parametrize(
    "how",
    [
        {"padding_value": 0},
        {"lengths": [torch.tensor([1, 2]), torch.tensor([2, 0])]},
        {"lengths": torch.tensor([[1, 2], [2, 0]])},
    ],
    ids=["padding", "lengths", "lengths in one tensor"],
)
def test_inputs_from_padded_ids(how):
    weights = [ids * 0.5 for ids in PADDED]
    made = batch_padded(PADDED, per_sample_weights=weights, **how)
    assert made.input.tolist() == [1, 2, 3, 4, 5] + [0] * 5
    assert made.offsets.tolist() == [0, 1, 3, 5, 5]
    assert made.per_sample_weights.tolist() == [0.5, 1, 1.5, 2, 2.5] + [0] * 5


def test_padding_is_dropped_wherever_it_stands():
    made = batch_padded(torch.tensor([[[7, 1, 7], [7, 7, 2]]]), padding_value=7)
    assert made.input.tolist()[:2] == [1, 2]
    assert made.offsets.tolist() == [0, 1, 2]
    assert batch_padded(torch.tensor([[[7, 1, 7]]])).offsets.tolist() == [0, 3]


ids = torch.tensor
BAD_INPUTS = {
    "no table": (lambda: batch_bags([]), "at least one table is needed"),
    "2-D ids": (lambda: batch_bags([(torch.zeros(1, 1), torch.zeros(1))]), "table 0: expected ids"),
    "bags": (
        lambda: batch_bags([(ids([0]), ids([0])), (ids([0]), ids([[0]]))]),
        r"table 1: expected ids \[n\] and offsets \[B\], got \[1\] and \[1, 1\]",
    ),
    "weights of some": (
        lambda: batch_bags([(torch.zeros(1),) * 2, (torch.zeros(1),) * 3]),
        "for all features or for none; they are given for table 1",
    ),
    "both": (
        lambda: batch_padded(PADDED, lengths=PADDED, padding_value=0),
        "lengths or padding_value, not both",
    ),
    "1-D padded": (lambda: batch_padded([torch.zeros(3)]), "table 0: expected ids"),
    "batch": (
        lambda: batch_padded([ids([[0] * 3] * 2), ids([0] * 3)]),
        r"table 1: expected ids \[B, L\], got \[3\]",
    ),
    "other lengths": (
        lambda: batch_padded(PADDED, lengths=[torch.zeros(2)]),
        "lengths are given for 1 features, the ids for 2",
    ),
}


@pytest.mark.parametrize(("make", "message"), BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_inputs_that_do_not_fit(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Errors.

CONSTRUCTED = {
    "no table": (lambda: TableBatchedEmbeddingBag([]), "at least one table is needed"),
    "dotted name": (lambda: TableBatchedEmbeddingBag({"a.b": (1, 1)}), "has no '.', got 'a.b'"),
    "no name": (lambda: TableBatchedEmbeddingBag({"": (1, 1)}), "not empty"),
    "no columns": (lambda: TableBatchedEmbeddingBag({"a": (1, 0)}), "table 'a': .* got 1 and 0"),
    "negative rows": (lambda: TableBatchedEmbeddingBag({"a": (-1, 2)}), "got -1 and 2"),
    "mode": (lambda: TableBatchedEmbeddingBag([(1, 1)], "median"), "one of sum, mean, max"),
    "modes": (lambda: TableBatchedEmbeddingBag([(1, 1)], ["sum", "sum"]), "2 values for 1 tables"),
    "mode of nobody": (lambda: TableBatchedEmbeddingBag([(1, 1)], {"x": "sum"}), "named 'x'"),
    "padding": (lambda: TableBatchedEmbeddingBag([(3, 1)], padding_idx=3), "within num_embeddings"),
    "rows": (lambda: TableBatchedEmbedding([(3, 1), (2, 2)]), "have no common shape"),
}


@pytest.mark.parametrize(("make", "message"), CONSTRUCTED.values(), ids=CONSTRUCTED)
def test_tables_that_cannot_be(make, message):
    with pytest.raises(ValueError, match=message):
        make()


IDS, OFFSETS = torch.tensor([0, 1]), torch.tensor([0, 1, 2])
CALLED = {
    "list": (lambda bags: bags([0, 1], OFFSETS), TypeError, "'input' must be Tensor, not list"),
    "no offsets": (
        lambda bags: bags(IDS, None),
        TypeError,
        "'offsets' must be Tensor, not NoneType",
    ),
    "2-D ids": (lambda bags: bags(IDS[None], OFFSETS), ValueError, "input has to be a 1D Tensor"),
    "2-D offsets": (lambda bags: bags(IDS, OFFSETS[None]), ValueError, "offsets has to be a 1D"),
    "float ids": (lambda bags: bags(IDS * 1.0, OFFSETS), RuntimeError, "input of dtype int64"),
    "bool offsets": (lambda bags: bags(IDS, OFFSETS > 0), RuntimeError, "offsets of dtype int64"),
    "other bags": (lambda bags: bags(IDS, OFFSETS[:2]), ValueError, r"num_features \* B \+ 1"),
    "no offset": (lambda bags: bags(IDS, OFFSETS[:0]), ValueError, r"num_features \* B \+ 1"),
    "device": (lambda bags: bags(IDS, OFFSETS.to("meta")), RuntimeError, "offsets is on meta"),
    "weights' shape": (
        lambda bags: bags(IDS, OFFSETS, torch.ones(3)),
        ValueError,
        "same shape as the input",
    ),
    "weights' dtype": (
        lambda bags: bags(IDS, OFFSETS, torch.ones(2).double()),
        RuntimeError,
        "per_sample_weights of the tables' dtype",
    ),
    "tables' dtype": (
        lambda bags: bags.to(torch.complex64)(IDS, OFFSETS),
        RuntimeError,
        "expected tables of float64",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), CALLED.values(), ids=CALLED)
@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
def test_arguments_that_do_not_fit(call, error, message):
    with pytest.raises(error, match=message):
        call(TableBatchedEmbeddingBag([(2, 1), (2, 2)]))


@pytest.mark.parametrize("mode", ["mean", "max"])
def test_weights_of_a_mean_or_a_maximum(mode):
    layer = TableBatchedEmbeddingBag({"a": (2, 1), "b": (2, 2)}, mode={"b": mode})
    with pytest.raises(NotImplementedError, match=f"table 'b' has mode='{mode}'"):
        layer(IDS, OFFSETS, torch.ones(2))
