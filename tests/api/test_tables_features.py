"""Features: what looks up in the tables of a batched layer, by name, one or several in each table."""

import copy
import itertools

import pytest
import torch
from table_cases import integer_layer, integers
from torch import nn

import gpu_embed
from gpu_embed import TableBatchedEmbedding, TableBatchedEmbeddingBag, batch_bags, batch_padded
from gpu_embed.backends._triton import row_update
from gpu_embed.tables.inputs import TableInput

SIZES = {
    "uniform": {"item": (7, 4), "user": (3, 4), "shop": (5, 4)},
    "mixed": {"item": (7, 4), "user": (3, 12), "shop": (5, 8)},
}
# Neither side by side nor in the order of the tables.
FEATURES = {"history": "item", "user": "user", "shop": "shop", "item": "item", "last": "item"}
MODES = {"sum": "sum", "by table": {"item": "mean", "user": "sum", "shop": "mean"}, "max": "max"}
every_size = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
every_mode = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)


def a_batch(layer, num_bags=3, device="cpu", weights=False):
    """Bags of 0, 1, 2 or 4 ids for each feature, whose means are exact."""
    bags = {}
    for number, (name, table) in enumerate(
        zip(layer.layout.features, layer.layout.feature_tables, strict=True)
    ):
        lengths = torch.tensor([0, 1, 2, 4])[integers(num_bags, seed=number, low=0, high=4)]
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        rows = layer.layout.num_embeddings[table]
        ids = integers(int(offsets[-1]), seed=7 * number, low=0, high=rows)
        bags[name] = (ids.to(device), offsets[:-1].to(device))
        if weights:
            bags[name] += (integers(len(ids), seed=number).float().to(device),)
    return bags


def one_table_a_feature(layer):
    """The same lookups in tables of their own, copies of those that the features share."""
    layout = layer.layout
    names = {
        feature: layout.names[table]
        for feature, table in zip(layout.features, layout.feature_tables, strict=True)
    }
    numbers = {name: number for number, name in enumerate(layout.names)}
    dims = zip(layout.num_embeddings, layout.embedding_dims, strict=True)
    sizes = dict(zip(layout.names, dims, strict=True))
    apart = TableBatchedEmbeddingBag(
        {feature: sizes[table] for feature, table in names.items()},
        mode={feature: layout.modes[numbers[table]] for feature, table in names.items()},
        padding_idx={
            feature: None
            if layout.padding_idx[numbers[table]] < 0
            else layout.padding_idx[numbers[table]]
            for feature, table in names.items()
        },
        device=layer.weight.device,
        dtype=layer.weight.dtype,
    )
    with torch.no_grad():
        for feature, table in names.items():
            apart[feature].copy_(layer[table])
    return apart, names


def gradient_of(output):
    """What every number of ids up to four divides."""
    return 12 * integers(*output.shape).to(output)


@every_size
@every_mode
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("method", ["atomic", "sorted"])
def test_features_share_a_table(target, sizes, mode, sparse, method):
    """Outputs as from tables of their own, and the gradients of the features of a table added up."""
    layer = integer_layer(
        sizes, target.device, mode=mode, padding_idx={"item": 0}, sparse=sparse, features=FEATURES
    )
    apart, names = one_table_a_feature(layer)
    batch = batch_bags(a_batch(layer, device=target.device))
    with gpu_embed.use_gradient_method(method if target.backend in ("triton", "cupy") else "auto"):
        output, expected = layer(*batch), apart(*batch)
        assert torch.equal(output, expected)
        output.backward(gradient_of(output))
        expected.backward(gradient_of(output))
    total = {name: torch.zeros_like(rows) for name, rows in layer.items()}
    for number, feature in enumerate(apart):
        total[names[feature]] += apart.layout.view(apart.weight.grad, number)
    for number, name in enumerate(layer):
        grad = layer.layout.view(layer.weight.grad.to_dense(), number)
        assert torch.equal(grad, total[name]), name
    assert [part.shape[1] for part in layer.split(output)] == [
        rows.shape[1] for _, rows in apart.items()
    ]


@every_size
def test_weights_of_samples(target, sizes):
    layer = integer_layer(sizes, target.device, features=FEATURES)
    apart, _ = one_table_a_feature(layer)
    batch = batch_bags(a_batch(layer, device=target.device, weights=True))
    grads = []
    for one in (layer, apart):
        weights = batch.per_sample_weights.clone().requires_grad_()
        output = one(batch.input, batch.offsets, weights, batch.features)
        output.backward(gradient_of(output))
        grads.append(weights.grad)
    assert torch.equal(*grads)


def test_rows_without_pooling(target):
    layer = TableBatchedEmbedding(SIZES["uniform"], features=FEATURES, device=target.device)
    bags = a_batch(layer, device=target.device)
    rows = layer(*batch_bags(bags))
    tables = dict(zip(layer.layout.features, layer.layout.feature_tables, strict=True))
    expected = [layer[list(layer)[tables[name]]][ids] for name, (ids, _) in bags.items()]
    assert torch.equal(rows, torch.cat(expected))


OPTIMIZERS = {
    "SGD": gpu_embed.optim.SGD,
    "Adagrad": gpu_embed.optim.Adagrad,
    "RowWiseAdagrad": gpu_embed.optim.RowWiseAdagrad,
    "Adam": gpu_embed.optim.Adam,
    "AdamW": gpu_embed.optim.AdamW,
}


@every_size
@pytest.mark.parametrize("optimizer_class", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("where", ["step", "backward", "rows too long for a program"])
def test_a_shared_table_is_updated_once(target, sizes, optimizer_class, where, monkeypatch):
    """Each row by the sum of what all features give it, as one table of its own is by the same gradient."""
    if where == "rows too long for a program":
        monkeypatch.setattr(row_update, "MAX_HELD_ROW", 4)
        monkeypatch.setattr(row_update, "ROWWISE_BLOCK", 4)
    layer = integer_layer(sizes, target.device, sparse=True, features=FEATURES)
    if where == "backward":
        gpu_embed.optim.apply_in_backward(layer, optimizer_class, lr=0.5)
    else:
        optimizer = optimizer_class(layer.parameters(), lr=0.5)
    alone = {name: nn.Parameter(rows.detach().clone()) for name, rows in layer.items()}
    others = optimizer_class(alone.values(), lr=0.5)
    batch = batch_bags(a_batch(layer, device=target.device))
    for _ in range(2):
        apart, names = one_table_a_feature(layer)
        expected = apart(*batch)
        expected.backward(gradient_of(expected))
        for name, parameter in alone.items():
            total = torch.zeros_like(parameter)
            used = torch.zeros(len(parameter), dtype=torch.bool, device=target.device)
            for number, (feature, (ids, _)) in enumerate(
                a_batch(layer, device=target.device).items()
            ):
                if names[feature] == name:
                    total += apart.layout.view(apart.weight.grad, number)
                    used[ids] = True
            rows = used.nonzero()[:, 0]
            parameter.grad = torch.sparse_coo_tensor(rows[None], total[rows], parameter.shape)
        others.step()
        output = layer(*batch)
        output.backward(gradient_of(output))
        if where != "backward":
            optimizer.step()
            optimizer.zero_grad()
        for name, rows in layer.items():
            # Of a row of several widths a mean of squares may be summed in another order.
            torch.testing.assert_close(rows.detach(), alone[name].detach(), rtol=1e-6, atol=1e-6)


# Names.


@every_size
@pytest.mark.parametrize(
    ("mode", "weights"), [("sum", False), ("mean", False), ("max", False), ("sum", True)], ids=str
)
def test_a_mapping_may_come_in_any_order(target, sizes, mode, weights):
    """The layer puts the features in its own order; the gradients are the same, dense and sparse."""
    for sparse in (False, True):
        layer = integer_layer(sizes, target.device, mode=mode, sparse=sparse, features=FEATURES)
        bags = a_batch(layer, device=target.device, weights=weights)
        expected = layer(*batch_bags(bags))
        expected.backward(gradient_of(expected))
        grad, layer.weight.grad = layer.weight.grad.to_dense(), None
        for order in (list(reversed(bags)), sorted(bags)):
            output = layer(*batch_bags({name: bags[name] for name in order}))
            assert torch.equal(output, expected)
            output.backward(gradient_of(output))
            assert torch.equal(layer.weight.grad.to_dense(), grad)
            layer.weight.grad = None


def test_rows_follow_their_ids_in_any_order(target):
    """Without pooling there is an output row for each id: where the id is."""
    layer = TableBatchedEmbedding(SIZES["uniform"], features=FEATURES, device=target.device)
    bags = a_batch(layer, device=target.device)
    parts = layer(*batch_bags(bags)).split([len(ids) for ids, _ in bags.values()])
    rows = dict(zip(bags, parts, strict=True))
    order = sorted(bags)
    batch = batch_bags({name: bags[name] for name in order})
    output = layer(*batch)
    assert torch.equal(output, torch.cat([rows[name] for name in order]))
    output.sum().backward()
    grad = layer.weight.grad.clone()
    layer.weight.grad = None
    layer(*batch_bags(bags)).sum().backward()
    assert torch.equal(layer.weight.grad, grad)


def test_ids_behind_the_last_offset_stay_behind_in_any_order():
    layer = integer_layer(SIZES["mixed"], features=FEATURES)
    padded = {name: torch.tensor([[0, 2, 2], [1, 2, 0]]) for name in layer.layout.features}
    expected = layer(*batch_padded(padded, padding_value=2))
    shuffled = {name: padded[name] for name in sorted(padded)}
    batch = batch_padded(shuffled, padding_value=2)
    assert torch.equal(layer(*batch), expected)
    assert layer(*batch).shape == (2, sum(layer.layout.feature_dims))


@pytest.mark.parametrize("layer_class", [TableBatchedEmbedding, TableBatchedEmbeddingBag])
def test_features_that_the_layer_does_not_have(layer_class):
    layer = layer_class(SIZES["uniform"])
    ids = torch.zeros(2, 1, dtype=torch.int64)
    wrong = {
        "it lacks 'shop'$": {"item": ids, "user": ids},
        "does not know 'word'$": {"item": ids, "user": ids, "shop": ids, "word": ids},
        "it lacks 'shop' and the layer does not know 'word'$": {
            "item": ids,
            "user": ids,
            "word": ids,
        },
    }
    for message, features in wrong.items():
        with pytest.raises(ValueError, match=message):
            layer(*batch_padded(features))
    # Six features of one example would else be three of two.
    for number in (1, 2, 6):
        with pytest.raises(
            ValueError, match=rf"the ids of {number} features, but the layer has 3: 'item', 'user'"
        ):
            layer(*batch_padded([ids] * number))
    with pytest.raises(ValueError, match="it names one twice"):
        layer(ids.flatten(), torch.zeros(1).long(), None, ("item", "user", "shop", "shop"))


@pytest.mark.parametrize("layer_class", [TableBatchedEmbedding, TableBatchedEmbeddingBag])
def test_a_batch_that_is_not_unpacked(layer_class):
    layer = layer_class(SIZES["uniform"])
    ids = {name: torch.zeros(2, 1, dtype=torch.int64) for name in layer}
    for given in (batch_padded(ids), ids):
        with pytest.raises(TypeError, match=r"must be Tensor, not .*; .* call layer\(\*batch\)"):
            layer(given)
    with pytest.raises(TypeError, match=r"'offsets' must be Tensor, not NoneType; .*batch_bags"):
        layer(torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize("ordered", [True, False], ids=["in order", "in another order"])
def test_wrong_weights_of_samples(ordered):
    """The check comes before anything is put in order."""
    layer = integer_layer(SIZES["mixed"])
    ids = {name: torch.zeros(2, 1, dtype=torch.int64) for name in layer}
    if not ordered:
        ids = {name: ids[name] for name in sorted(ids)[::-1]}
    batch = batch_padded(ids)
    for weights, error, message in (
        ([1.0] * 6, TypeError, "'per_sample_weights' must be Tensor, not list"),
        (torch.ones(5), ValueError, "same shape as the input"),
        (torch.ones(6).double(), RuntimeError, "of the tables' dtype"),
    ):
        with pytest.raises(error, match=message):
            layer(batch.input, batch.offsets, weights, batch.features)


def test_rows_have_no_weights_of_samples():
    layer = TableBatchedEmbedding(SIZES["uniform"])
    ids = {name: torch.zeros(2, 1, dtype=torch.int64) for name in layer}
    batch = batch_padded(ids, per_sample_weights={name: torch.ones(2, 1) for name in layer})
    with pytest.raises(NotImplementedError, match="use TableBatchedEmbeddingBag"):
        layer(*batch)


@pytest.mark.parametrize("ordered", [True, False], ids=["in order", "in another order"])
def test_an_id_out_of_range_names_the_feature(target, ordered):
    layer = integer_layer(SIZES["mixed"], target.device, features=FEATURES)
    bags = a_batch(layer, device=target.device)
    ids = torch.tensor([1, 0, 3, 7], device=target.device)
    bags["item"] = (ids, torch.tensor([0, 1, 2], device=target.device))
    if not ordered:
        bags = {name: bags[name] for name in sorted(bags)}

    def call():
        layer(*batch_bags(bags))
        gpu_embed.check_bounds()

    with pytest.raises(IndexError, match="idx to be 7, at position 1 of bag 2 of table 'item'"):
        call()
    bags["last"] = bags.pop("item")
    bags["item"] = (ids[:3], torch.tensor([0, 1, 2], device=target.device))
    with pytest.raises(IndexError, match=r"of feature 'last' \(table 'item'\)"):
        call()


# As torch's tools see them.


@pytest.mark.full
@every_size
@pytest.mark.parametrize("ordered", [True, False], ids=["in order", "in another order"])
@pytest.mark.parametrize("inside", [True, False], ids=["batched inside", "batched outside"])
def test_compiled(sizes, ordered, inside):
    torch._dynamo.reset()
    layer = integer_layer(sizes, features=FEATURES)

    def call(features):
        return layer(*(batch_bags(features) if inside else features))

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for num_bags in (2, 3):
        bags = a_batch(layer, num_bags)
        if not ordered:
            bags = {name: bags[name] for name in sorted(bags)}
        given = bags if inside else batch_bags(bags)
        output, expected = compiled(given), call(given)
        assert torch.equal(output, expected)
        grads = []
        for one in (output, expected):
            layer.weight.grad = None
            one.backward(gradient_of(one))
            grads.append(layer.weight.grad)
        assert torch.equal(*grads)
    torch._dynamo.reset()


@pytest.mark.full
@pytest.mark.parametrize("layer_class", [TableBatchedEmbedding, TableBatchedEmbeddingBag])
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
@pytest.mark.parametrize("ordered", [True, False], ids=["in order", "in another order"])
def test_exported(layer_class, strict, ordered, tmp_path):
    torch._dynamo.reset()
    layer = layer_class(SIZES["uniform"], features=FEATURES)
    ids = {name: torch.zeros(2, 3, dtype=torch.int64) for name in FEATURES}
    if not ordered:
        ids = {name: ids[name] for name in sorted(ids)}

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.tables = layer

        def forward(self, ids):
            return self.tables(*batch_padded(ids, padding_value=0))

    program = torch.export.export(Model(), (ids,), strict=strict)
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    other = {name: integers(2, 3, seed=i, low=0, high=3) for i, name in enumerate(ids)}
    assert torch.equal(loaded(other), Model()(other))
    torch._dynamo.reset()


def test_ids_in_no_bag_with_features_in_another_order():
    """No bag, and ids behind the last offset."""
    layer = integer_layer(SIZES["mixed"])
    none = torch.tensor([1, 2]), torch.tensor([0])
    batch = batch_bags(dict.fromkeys(reversed(list(layer)), none), include_last_offset=True)
    assert layer(*batch).shape == (0, sum(layer.layout.feature_dims))


def test_traced():
    layer = integer_layer(SIZES["mixed"], features=FEATURES)
    batch = batch_bags(a_batch(layer))
    traced = torch.jit.trace(layer, (batch.input, batch.offsets), check_trace=False)
    assert torch.equal(traced(batch.input, batch.offsets), layer(*batch))


def test_copies_and_saved_layers_keep_the_features(tmp_path):
    layer = integer_layer(SIZES["mixed"], features=FEATURES)
    batch = batch_bags(a_batch(layer))
    torch.save(layer, tmp_path / "layer.pt")
    for other in (copy.deepcopy(layer), torch.load(tmp_path / "layer.pt", weights_only=False)):
        assert other.layout == layer.layout
        assert torch.equal(other(*batch), layer(*batch))
    assert list(layer.state_dict()) == ["item.weight", "user.weight", "shop.weight"]


def test_a_batch_is_a_tuple_of_the_layers_arguments():
    layer = integer_layer(SIZES["mixed"])
    ids = {name: torch.zeros(2, 1, dtype=torch.int64) for name in layer}
    batch = batch_padded(ids)
    assert batch.features == ("item", "user", "shop")
    assert batch_padded(list(ids.values())).features == 3
    assert isinstance(batch, TableInput)
    input, offsets, *_ = batch
    assert torch.equal(layer(input, offsets), layer(*batch))
    moved = TableInput(*(one.to("cpu") if torch.is_tensor(one) else one for one in batch))
    assert torch.equal(layer(*moved), layer(*batch))


# What cannot be.

WRONG = {
    "no table": (
        {"a": "b"},
        ValueError,
        "feature 'a': no table is named 'b', the tables are 'item'",
    ),
    "no string": ({1: "item"}, ValueError, "a feature's name is a string that is not empty, got 1"),
    "unused": ({"a": "item"}, ValueError, "no feature looks up in 'user', 'shop'"),
    "a list": (["item", "user", "shop"], TypeError, "features must be a mapping"),
}


@pytest.mark.parametrize("layer_class", [TableBatchedEmbedding, TableBatchedEmbeddingBag])
@pytest.mark.parametrize(("features", "error", "message"), WRONG.values(), ids=WRONG)
def test_features_that_cannot_be(layer_class, features, error, message):
    with pytest.raises(error, match=message):
        layer_class(SIZES["uniform"], features=features)


NUMBERS = {
    "5.5 rows": (
        lambda make: make({"a": (5.5, 2)}),
        "table 'a': num_embeddings must be an int, got 5.5",
    ),
    "True rows": (lambda make: make({"a": (True, 2)}), "num_embeddings must be an int, got True"),
    "float columns": (lambda make: make({"a": (2, 2.0)}), "embedding_dim must be an int, got 2.0"),
    "one number": (
        lambda make: make({"a": 10}),
        r"table 'a': expected \(num_embeddings, embedding_dim\)",
    ),
    "three numbers": (lambda make: make([(1, 2, 3)]), "table '0': expected"),
    "a string": (lambda make: make({"a": "10"}), "table 'a': expected"),
    "no tables": (lambda make: make(3), "tables must be a mapping"),
    "True padding": (
        lambda make: make({"a": (5, 2)}, padding_idx=True),
        "padding_idx must be an int, got True",
    ),
    "float padding": (
        lambda make: make({"a": (5, 2)}, padding_idx={"a": 1.0}),
        "table 'a': padding_idx must be an int, got 1.0",
    ),
}


@pytest.mark.parametrize("layer_class", [TableBatchedEmbedding, TableBatchedEmbeddingBag])
@pytest.mark.parametrize(("make", "message"), NUMBERS.values(), ids=NUMBERS)
def test_numbers_that_are_none(layer_class, make, message):
    with pytest.raises(TypeError, match=message):
        make(layer_class)


def test_numpys_integers_are_integers():
    import numpy as np

    layer = TableBatchedEmbeddingBag({"a": (np.int64(5), np.int32(2))}, padding_idx=np.int64(-1))
    assert layer.layout.num_embeddings == (5,)
    assert layer.layout.padding_idx == (4,)
    assert all(
        type(one) is int for one in itertools.chain(layer.layout.padding_idx, layer.weight.shape)
    )


def test_rows_are_saved_as_a_plain_tensor(tmp_path):
    layer = TableBatchedEmbeddingBag(SIZES["mixed"])
    torch.save(layer["user"], tmp_path / "rows.pt")
    loaded = torch.load(tmp_path / "rows.pt")
    assert torch.equal(loaded, layer["user"])
    loaded.detach().requires_grad_(False)


def test_a_table_that_is_not_there():
    layer = TableBatchedEmbeddingBag(SIZES["mixed"])
    layer.sparse = True
    for call in (lambda: layer["c"], lambda: layer.parameters_of("c")):
        with pytest.raises(
            KeyError, match=r"no table is named 'c'\. The tables are 'item', 'user'"
        ):
            call()
    with pytest.raises(ValueError, match="name at least one table"):
        layer.parameters_of()
    with pytest.raises(TypeError, match=r"one by one, .* got \['item'\]"):
        layer.parameters_of(["item"])
    shared = TableBatchedEmbeddingBag(SIZES["mixed"], sparse=True, features=FEATURES)
    with pytest.raises(KeyError, match="a feature is, which looks up in table 'item'"):
        shared.parameters_of("history")


def test_a_tables_place_is_not_taken_by_another_module():
    layer = TableBatchedEmbeddingBag(SIZES["mixed"])
    with pytest.raises(TypeError, match="'user' is a table of this layer and is not replaced"):
        layer.user = nn.Embedding(3, 3)
    layer.other = nn.Linear(2, 2)
    assert list(layer.state_dict())[:3] == ["item.weight", "user.weight", "shop.weight"]


def test_an_output_of_another_width_is_not_split():
    layer = TableBatchedEmbeddingBag(SIZES["mixed"], features=FEATURES)
    with pytest.raises(ValueError, match=r"\[B, 32\], got \[2, 24\]"):
        layer.split(torch.zeros(2, 24))


def test_the_text_of_many_tables():
    layer = TableBatchedEmbeddingBag({f"feature_{n}": (100 + n, 8) for n in range(200)})
    text = repr(layer)
    assert len(text) < 600
    assert "200 tables, 39,900 rows" in text
    assert "feature_0: (100, 8)" in text
    assert "feature_199: (299, 8)" in text
    assert "188 more" in text
    shared = repr(TableBatchedEmbeddingBag(SIZES["mixed"], features=FEATURES))
    assert "features=(history: item, user, shop, item, last: item)" in shared
