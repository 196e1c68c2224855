"""Batched layers saved and loaded in every way that people do it: no table is lost, and none drags the others along."""

import copy
import io
import multiprocessing

import pytest
import torch
from table_cases import integer_layer
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.func import functional_call
from torch.nn.utils import prune

import gpu_embed
from gpu_embed import TableBatchedEmbedding, TableBatchedEmbeddingBag, batch_padded

SIZES = {
    "uniform": {"user": (7, 4), "item": (3, 4), "shop": (5, 4)},
    "mixed": {"user": (7, 4), "item": (3, 12), "shop": (5, 8)},
    "with an empty table": {"user": (7, 4), "item": (0, 4), "shop": (5, 4)},
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
every_size = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


class Model(nn.Module):
    """A batched layer among others, as people have it."""

    def __init__(self, sizes, dtype=None, sparse=False):
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        super().__init__()
        sizes = {name: tuple(size) for name, size in dict(sizes or {"none": (1, 1)}).items()}
        self.tables = TableBatchedEmbeddingBag(sizes, sparse=sparse, dtype=dtype)
        self.head = nn.Linear(sum(dim for _, dim in sizes.values()), 2, dtype=dtype)

    def forward(self, batch):
        return self.head(self.tables(*batch))


def sizes_of(model):
    layout = model.tables.layout
    sizes = zip(layout.num_embeddings, layout.embedding_dims, strict=True)
    return [list(pair) for pair in zip(layout.names, map(list, sizes), strict=True)]


def a_batch(sizes):
    return batch_padded(
        {
            name: torch.tensor([[rows - 1, 0], [0, rows // 2]])
            if rows
            else torch.zeros(2, 0).long()
            for name, (rows, _) in sizes.items()
        }
    )


def assert_equal(restored, model):
    theirs, ours = model.state_dict(), restored.state_dict()
    assert list(ours) == list(theirs)
    for key, value in theirs.items():
        assert torch.equal(ours[key], value), key
        assert ours[key].dtype == value.dtype
        assert ours[key].device.type == "cpu"


# The ways. Each gets a model, one of the same arguments with other values, and a folder.


def by_torch_save(model, other, folder):
    torch.save(model.state_dict(), folder / "model.pt")
    other.load_state_dict(torch.load(folder / "model.pt", mmap=True))
    return other


def by_pickled_model(model, other, folder):
    torch.save(model, folder / "model.pt")
    return torch.load(folder / "model.pt", weights_only=False)


def by_safetensors_file(model, other, folder):
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(model.state_dict(), folder / "model.safetensors")
    other.load_state_dict(safetensors.load_file(folder / "model.safetensors"))
    return other


def by_safetensors_model(model, other, folder):
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_model(model, str(folder / "model.safetensors"))
    assert safetensors.load_model(other, str(folder / "model.safetensors")) == (set(), [])
    return other


def by_accelerate_state(model, other, folder):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.prepare(model)
    accelerator.save_state(folder)
    accelerator = accelerate.Accelerator(cpu=True)
    prepared = accelerator.prepare(other)
    accelerator.load_state(folder)
    return accelerator.unwrap_model(prepared)


def by_accelerate_model(model, other, folder):
    accelerate = pytest.importorskip("accelerate")
    accelerate.Accelerator(cpu=True).save_model(model, folder)
    accelerate.load_checkpoint_in_model(other, folder, strict=True)
    return other


def by_accelerate_dispatch(model, other, folder):
    """Big-model loading: the model has no memory until its checkpoint is there."""
    accelerate = pytest.importorskip("accelerate")
    accelerate.Accelerator(cpu=True).save_model(model, folder)
    with accelerate.init_empty_weights(include_buffers=True):
        empty = Model(sizes_of(model), model.tables.weight.dtype)
    assert empty.tables.weight.is_meta
    return accelerate.load_checkpoint_and_dispatch(empty, folder, device_map={"": "cpu"})


def by_the_hub(model, other, folder):
    hub = pytest.importorskip("huggingface_hub")

    class OnTheHub(Model, hub.PyTorchModelHubMixin):
        pass

    # A list, as the configuration's file sorts a mapping.
    made = OnTheHub(sizes_of(model), str(model.tables.weight.dtype)[6:])
    made.load_state_dict(model.state_dict())
    made.save_pretrained(folder)
    return OnTheHub.from_pretrained(folder)


def by_save_torch_model(model, other, folder):
    hub = pytest.importorskip("huggingface_hub")
    hub.save_torch_model(model, folder)
    hub.load_torch_model(other, folder)
    return other


def a_config(transformers):
    """The configuration of a model whose tables have sizes."""

    class Config(transformers.PretrainedConfig):
        model_type = "tables"

        def __init__(self, sizes=None, **arguments):
            super().__init__(**arguments)
            self.sizes = sizes

    return Config


def by_transformers(model, other, folder):
    transformers = pytest.importorskip("transformers")

    config = a_config(transformers)

    class Pretrained(transformers.PreTrainedModel):
        config_class = config

        def __init__(self, config):
            super().__init__(config)
            inner = Model(config.sizes)
            self.tables, self.head = inner.tables, inner.head
            self.post_init()

        def forward(self, batch):
            return Model.forward(self, batch)

    made = Pretrained(config(sizes_of(model)))
    made.to(model.tables.weight.dtype).load_state_dict(model.state_dict())
    made.save_pretrained(folder)
    loaded = Pretrained.from_pretrained(folder, dtype=model.tables.weight.dtype)
    assert not any(parameter.is_meta for parameter in loaded.parameters())
    return loaded


def by_lightning(model, other, folder):
    lightning = pytest.importorskip("pytorch_lightning")

    class Module(lightning.LightningModule):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner
            self.batch = a_batch({"user": (7, 4), "item": (3, 4), "shop": (5, 4)})

        def training_step(self, batch, _):
            return sum(parameter.sum() for parameter in self.parameters()) * 0

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer = lightning.Trainer(
        max_steps=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(model), torch.utils.data.DataLoader([0]))
    trainer.save_checkpoint(folder / "model.ckpt")
    loaded = Module.load_from_checkpoint(folder / "model.ckpt", inner=other)
    return loaded.inner


def by_assignment(model, other, folder):
    other.load_state_dict(model.state_dict(), assign=True)
    return other


def by_assignment_to_meta(model, other, folder):
    other = other.to("meta")
    other.load_state_dict(model.state_dict(), assign=True)
    return other


def by_averaged_model(model, other, folder):
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    torch.save(averaged.state_dict(), folder / "averaged.pt")
    loaded = torch.optim.swa_utils.AveragedModel(other)
    loaded.load_state_dict(torch.load(folder / "averaged.pt"))
    return loaded.module


def by_deepcopy(model, other, folder):
    return copy.deepcopy(model)


def by_deepcopied_state(model, other, folder):
    """The best state so far, kept in memory."""
    best = copy.deepcopy(model.state_dict())
    kept = copy.deepcopy(model)
    with torch.no_grad():
        model.tables.weight.zero_()
    other.load_state_dict(best)
    model.load_state_dict(kept.state_dict())
    return other


def by_distributed_checkpoint(model, other, folder):
    import torch.distributed.checkpoint as dcp

    dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=folder, no_dist=True)
    state = {"model": get_model_state_dict(other)}
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    set_model_state_dict(other, state["model"])
    return other


def by_full_state(model, other, folder):
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    set_model_state_dict(other, get_model_state_dict(model, options=options), options=options)
    return other


WAYS = {
    way.__name__[3:].replace("_", " "): way
    for way in (
        by_torch_save,
        by_pickled_model,
        by_safetensors_file,
        by_safetensors_model,
        by_accelerate_state,
        by_accelerate_model,
        by_accelerate_dispatch,
        by_the_hub,
        by_save_torch_model,
        by_transformers,
        by_lightning,
        by_assignment,
        by_assignment_to_meta,
        by_averaged_model,
        by_deepcopy,
        by_deepcopied_state,
        by_distributed_checkpoint,
        by_full_state,
    )
}


# These import large libraries.
BY_LIBRARY = (
    by_accelerate_state,
    by_accelerate_model,
    by_accelerate_dispatch,
    by_the_hub,
    by_save_torch_model,
    by_transformers,
    by_lightning,
)


@every_size
@every_dtype
@pytest.mark.parametrize(
    "way",
    [
        pytest.param(way, id=name, marks=[pytest.mark.full] * (way in BY_LIBRARY))
        for name, way in WAYS.items()
    ],
)
def test_every_table_comes_back(way, sizes, dtype, tmp_path):
    model, other = Model(sizes, dtype), Model(sizes, dtype)
    restored = way(model, other, tmp_path)
    assert_equal(restored, model)
    batch = a_batch(sizes)
    output = restored(batch)
    assert torch.equal(output, model(batch))
    # It trains on from there: what its optimizer gets is what it looks up in.
    optimizer = torch.optim.SGD(restored.parameters(), lr=1.0)
    output.sum().backward()
    optimizer.step()
    assert not torch.equal(restored(batch), output)
    assert not torch.equal(restored.state_dict()["tables.user.weight"], model.tables["user"])


# The entries of a state_dict.


@every_size
@every_dtype
def test_an_entry_is_the_table_and_no_more(sizes, dtype):
    """The memory of the parameter, in a storage of its own, which is what a file gets."""
    layer = TableBatchedEmbeddingBag(sizes, dtype=dtype)
    for name, entry in (
        (key.removesuffix(".weight"), value) for key, value in layer.state_dict().items()
    ):
        rows = layer[name]
        assert type(entry) is torch.Tensor
        assert not entry.requires_grad
        assert entry.untyped_storage().nbytes() == rows.numel() * rows.element_size()
        assert entry.data_ptr() == rows.data_ptr() or not rows.numel()
    file = io.BytesIO()
    torch.save(layer.state_dict()["shop.weight"], file)
    assert len(file.getvalue()) < 2500


def test_a_large_layer_saves_a_small_table_small():
    layer = TableBatchedEmbeddingBag({"small": (10, 16), "large": (100_000, 16)})
    file = io.BytesIO()
    torch.save(layer.state_dict()["small.weight"], file)
    assert len(file.getvalue()) < 4000


@every_size
def test_writing_to_an_entry_writes_to_the_table(sizes):
    layer = TableBatchedEmbeddingBag(sizes)
    layer.state_dict()["shop.weight"].fill_(5)
    assert (layer["shop"] == 5).all()
    layer.state_dict(keep_vars=True)["shop.weight"].sum().backward()
    assert layer.weight.grad.sum() == layer["shop"].numel()


@every_size
@pytest.mark.parametrize("when", ["taken before", "taken after"])
def test_writing_to_an_entry_between_forward_and_backward_is_noticed(sizes, when):
    """The gradient of the weights reads the table as it was in forward."""
    layer = TableBatchedEmbeddingBag(sizes)
    state = layer.state_dict()
    batch = a_batch(sizes)
    weights = torch.ones(len(batch.input), requires_grad=True)
    output = layer(batch.input, batch.offsets, weights)
    if when == "taken after":
        state = layer.state_dict()
    output.sum().backward(retain_graph=True)  # taking it is no write
    state["shop.weight"].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("device", ["meta", "fake"])
def test_entries_without_memory(device):
    from torch._subclasses.fake_tensor import FakeTensorMode

    if device == "fake":
        with FakeTensorMode():
            state = TableBatchedEmbeddingBag(SIZES["mixed"]).state_dict()
    else:
        state = TableBatchedEmbeddingBag(SIZES["mixed"], device="meta").state_dict()
    assert [list(value.shape) for value in state.values()] == [[7, 4], [3, 12], [5, 8]]


def test_entries_in_inference_mode():
    with torch.inference_mode():
        layer = TableBatchedEmbeddingBag(SIZES["mixed"])
        entry = layer.state_dict()["item.weight"]
        assert entry.untyped_storage().nbytes() == 3 * 12 * 4
    assert layer.state_dict()["item.weight"].untyped_storage().nbytes() == 3 * 12 * 4


def _double(queue, back):
    back.put({key: (2 * value).tolist() for key, value in queue.get().items()})


@pytest.mark.full
def test_a_state_dict_goes_to_another_process():
    layer = integer_layer(SIZES["mixed"])
    before = layer.weight.detach().clone()
    context = torch.multiprocessing.get_context("fork")
    queue, back = context.Queue(), multiprocessing.get_context("fork").Queue()
    process = context.Process(target=_double, args=(queue, back))
    process.start()
    queue.put(layer.state_dict())
    doubled = back.get(timeout=60)
    process.join(60)
    assert doubled["item.weight"] == (2 * layer["item"]).tolist()
    assert torch.equal(layer.weight, before)
    with torch.no_grad():
        layer["item"].fill_(9)
    assert (layer(*a_batch(SIZES["mixed"]))[:, 4:16] == 18).all()


# Paths.


@every_size
def test_a_key_of_the_state_dict_is_a_path(sizes):
    layer = TableBatchedEmbeddingBag(sizes)
    model = nn.Sequential(layer)
    for name, rows in layer.items():
        place = model.get_submodule(f"0.{name}")
        assert torch.equal(place.weight, rows)
        assert torch.equal(
            model.get_parameter(f"0.{name}.weight") if rows.numel() == -1 else place.weight, rows
        )
    assert [name for name, _ in model.named_parameters()] == ["0.weight"]
    assert not list(layer.user.parameters())
    assert not list(model.buffers())


@every_size
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("spelling", ["keys of state_dict", "names of parameters", "some keys"])
def test_functional_call(sizes, sparse, spelling):
    """Both spellings, with gradients for what was given and none for what was not; nothing stays behind."""
    layer, batch = TableBatchedEmbeddingBag(sizes, sparse=sparse), a_batch(sizes)
    output = layer(*batch)
    other = TableBatchedEmbeddingBag(sizes)
    with torch.no_grad():
        other["shop"].copy_(layer["shop"])
    given = {key: value.clone() for key, value in other.state_dict().items()}
    if spelling == "names of parameters":
        given = {"weight": other.weight.detach().clone()}
    elif spelling == "some keys":
        del given["shop.weight"]
    for value in given.values():
        value.requires_grad_()
    result = functional_call(layer, given, tuple(batch))
    assert torch.equal(result, other(*batch))
    result.sum().backward()
    other(*batch).sum().backward()
    if spelling == "names of parameters":
        grad = given["weight"].grad
        assert torch.equal(grad.to_dense(), other.weight.grad)
    else:
        for key, value in given.items():
            number = list(layer).index(key.removesuffix(".weight"))
            assert torch.equal(value.grad, layer.layout.view(other.weight.grad, number))
    if spelling != "some keys":
        assert layer.weight.grad is None
    assert torch.equal(layer(*batch), output)


@every_size
def test_functional_call_with_both_spellings(sizes):
    """A table's own key comes last, and the layer is as before, in whichever order they are given."""
    layer, batch = TableBatchedEmbeddingBag(sizes), a_batch(sizes)
    output = layer(*batch)
    both = {"weight": torch.zeros_like(layer.weight), "user.weight": torch.ones(7, 4)}
    for given in (both, dict(reversed(both.items()))):
        result = functional_call(layer, given, tuple(batch))
        assert (result[:, :4] == 2).all()
        assert not result[:, 4:].any()
        assert torch.equal(layer(*batch), output)


def test_functional_call_with_the_layers_own_views():
    """They are tensors like others: of another table, and with gradients of their own."""
    layer, batch = (
        TableBatchedEmbeddingBag(SIZES["uniform"]),
        a_batch({"user": (3, 4), "item": (3, 4), "shop": (3, 4)}),
    )
    output = layer(*batch)
    rows = layer.user.weight
    result = functional_call(layer, {"user.weight": rows}, tuple(batch))
    (grad,) = torch.autograd.grad(result.sum(), rows)
    assert grad.any()
    other = TableBatchedEmbeddingBag([(3, 4), (3, 4)])
    pair = batch_padded([torch.tensor([[0]]), torch.tensor([[1]])])
    swapped = {
        "0.weight": other.get_submodule("1").weight,
        "1.weight": other.get_submodule("0").weight,
    }
    result = functional_call(other, swapped, tuple(pair))
    assert torch.equal(result[0], torch.cat([other["1"][0], other["0"][1]]))
    kept = layer.state_dict(keep_vars=True)
    layer.double()
    assert functional_call(layer, kept, tuple(batch)).dtype == torch.float32
    assert torch.equal(layer(*batch).float(), output)


def test_nested_functional_calls():
    layer, batch = TableBatchedEmbeddingBag(SIZES["mixed"]), a_batch(SIZES["mixed"])
    output = layer(*batch)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, *batch):
            inner = functional_call(self.layer, {"user.weight": torch.ones(7, 4)}, batch)
            return inner, self.layer(*batch)

    inner, outer = functional_call(Outer(), {"layer.user.weight": torch.zeros(7, 4)}, tuple(batch))
    assert (inner[:, :4] == 2).all()
    assert not outer[:, :4].any()
    assert torch.equal(layer(*batch), output)


def test_functional_call_that_fails_leaves_the_layer_as_it_was():
    layer, batch = TableBatchedEmbeddingBag(SIZES["mixed"]), a_batch(SIZES["mixed"])
    output = layer(*batch)
    with pytest.raises(ValueError, match=r"table 'user' has rows of shape \[7, 4\], got \[2, 4\]"):
        functional_call(
            layer, {"item.weight": torch.ones(3, 12), "user.weight": torch.ones(2, 4)}, tuple(batch)
        )
    assert torch.equal(layer(*batch), output)


def test_functional_transforms_over_the_keys():
    layer, batch = TableBatchedEmbeddingBag(SIZES["mixed"]), a_batch(SIZES["mixed"])
    state = layer.state_dict()
    grads = torch.func.grad(lambda p: functional_call(layer, p, tuple(batch)).pow(2).sum())(state)
    layer(*batch).pow(2).sum().backward()
    for number, name in enumerate(layer):
        rows = layer.layout.view(layer.weight.grad, number)
        torch.testing.assert_close(grads[f"{name}.weight"], rows)
    stacked = {key: torch.stack([value, 2 * value]) for key, value in state.items()}
    both = torch.func.vmap(lambda p: functional_call(layer, p, tuple(batch)))(stacked)
    torch.testing.assert_close(both[1], 2 * both[0])


def test_unpooled_rows_of_other_tables():
    layer, sizes = TableBatchedEmbedding(SIZES["uniform"]), SIZES["uniform"]
    batch = a_batch(sizes)
    rows = functional_call(layer, {"item.weight": torch.ones(3, 4)}, tuple(batch))
    assert (rows[4:8] == 1).all()
    assert torch.equal(rows[:4], layer(*batch)[:4])


# Giving a table other values by its path.


@every_size
@pytest.mark.parametrize("how", ["parameter", "tensor", "state_dict", "assigned state_dict"])
def test_values_given_to_a_table_are_the_parameters(sizes, how):
    layer = TableBatchedEmbeddingBag(sizes)
    weight, values = layer.weight, torch.full((7, 4), 3.0)
    if how == "parameter":
        layer.user.weight = nn.Parameter(values)
    elif how == "tensor":
        layer.user.weight = values
    else:
        layer.user.load_state_dict({"weight": values.double()}, assign=how.startswith("assigned"))
    assert layer.weight is weight
    assert (layer["user"] == 3).all()
    assert (layer(*a_batch(sizes))[:, :4] == 6).all()


@pytest.mark.parametrize("move", ["half", "double", "cuda", "share_memory"])
def test_a_table_is_not_moved_alone(move):
    layer = TableBatchedEmbeddingBag(SIZES["mixed"])
    with pytest.raises(RuntimeError, match=r"table 'user' lies in its layer's one parameter"):
        getattr(layer.user, move)()
    nn.Sequential(layer).double()
    assert layer.user.weight.dtype == torch.float64


def test_a_table_is_not_removed():
    layer = TableBatchedEmbeddingBag(SIZES["mixed"])
    with pytest.raises(TypeError, match="'user' is a table of this layer and cannot be removed"):
        del layer.user
    layer.other = nn.Linear(1, 1)
    del layer.other
    assert list(layer.state_dict()) == ["user.weight", "item.weight", "shop.weight"]


def test_reading_a_table_in_a_compiled_graph():
    torch._dynamo.reset()
    layer = TableBatchedEmbeddingBag(SIZES["mixed"])
    read = torch.compile(lambda: layer.user.weight * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(read(), layer["user"] * 2)
    torch._dynamo.reset()


def test_wrong_values_for_a_table():
    layer = TableBatchedEmbeddingBag(SIZES["mixed"])
    before = layer.weight.detach().clone()
    with pytest.raises(ValueError, match=r"table 'user' has rows of shape \[7, 4\], got \[8, 4\]"):
        layer.user.weight = torch.zeros(8, 4)
    with pytest.raises(TypeError, match="must be a tensor"):
        layer.user.weight = [1, 2]
    with pytest.raises(RuntimeError, match="size mismatch"):
        layer.user.load_state_dict({"weight": torch.zeros(8, 4)})
    with pytest.raises(RuntimeError, match="Missing key"):
        layer.user.load_state_dict({})
    assert torch.equal(layer.weight, before)


@every_size
def test_a_layer_without_memory_gets_it_table_by_table(sizes):
    """As transformers and accelerate load: one parameter after the other."""
    layer, source = TableBatchedEmbeddingBag(sizes, device="meta"), TableBatchedEmbeddingBag(sizes)
    for name, rows in source.items():
        assert layer.weight.is_meta
        layer.get_submodule(name).weight = nn.Parameter(rows.detach().clone())
    assert torch.equal(layer.weight, source.weight)
    assert [name for name, _ in layer.named_parameters()] == ["weight"]
    assert torch.equal(layer(*a_batch(sizes)), source(*a_batch(sizes)))


def test_a_layer_without_memory_gets_one_dtype():
    layer = TableBatchedEmbeddingBag({"a": (2, 4), "b": (2, 4)}, device="meta")
    layer.a.weight = torch.zeros(2, 4)
    with pytest.raises(RuntimeError, match="one dtype and device"):
        layer.b.weight = torch.zeros(2, 4).double()
    layer.b.weight = torch.zeros(2, 4)
    assert not layer.weight.is_meta


@pytest.mark.parametrize(
    "context",
    ["meta", pytest.param("include_buffers", marks=pytest.mark.full), "default device"],
)
def test_made_without_memory(context):
    sizes = SIZES["mixed"]
    if context == "meta":
        with torch.device("meta"):
            layer = TableBatchedEmbeddingBag(sizes, mode="mean", padding_idx=0)
    elif context == "include_buffers":
        accelerate = pytest.importorskip("accelerate")
        with accelerate.init_empty_weights(include_buffers=True):
            layer = TableBatchedEmbeddingBag(sizes, mode="mean", padding_idx=0)
    else:
        torch.set_default_device("meta")
        try:
            layer = TableBatchedEmbeddingBag(sizes, mode="mean", padding_idx=0)
        finally:
            torch.set_default_device(None)
    assert layer.weight.is_meta
    layer.to_empty(device="cpu").reset_parameters()
    batch = a_batch(sizes)
    expected = TableBatchedEmbeddingBag(sizes, mode="mean", padding_idx=0)
    expected.load_state_dict(layer.state_dict())
    assert torch.equal(layer(*batch), expected(*batch))


# Beside the tables.


class WithOwnState(TableBatchedEmbeddingBag):
    """A subclass with a parameter, a buffer and extra state of its own."""

    def __init__(self, sizes):
        super().__init__(sizes)
        self.gate = nn.Parameter(torch.rand(3))
        self.register_buffer("count", torch.rand(2))
        self.register_buffer("kept out", torch.rand(2), persistent=False)
        self.extra = "new"

    def get_extra_state(self):
        return {"extra": self.extra}

    def set_extra_state(self, state):
        self.extra = state["extra"]


@every_size
@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
def test_what_a_subclass_has_is_saved_too(sizes, assign):
    layer, other = WithOwnState(sizes), WithOwnState(sizes)
    layer.extra = "saved"
    state = layer.state_dict()
    tables = [f"{name}.weight" for name in sizes]
    assert sorted(state) == sorted(["gate", "count", "_extra_state", *tables])
    other.load_state_dict(state, assign=assign)
    assert torch.equal(other.gate, layer.gate)
    assert torch.equal(other.count, layer.count)
    assert other.extra == "saved"
    assert torch.equal(other.weight, layer.weight)
    del state["gate"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"gate"'):
        other.load_state_dict(state)
    keys = other.load_state_dict(state, strict=False)
    assert keys.missing_keys == ["gate"]
    assert keys.unexpected_keys == []


CHANGES = {
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5),
    "weight norm": torch.nn.utils.weight_norm,
    "parametrized": torch.nn.utils.parametrizations.weight_norm,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.filterwarnings("ignore:.*weight_norm")
def test_a_weight_made_of_other_parameters(change):
    """Those are saved and loaded, and not the tables that follow from them."""
    sizes = SIZES["uniform"]
    layer, other = TableBatchedEmbeddingBag(sizes), TableBatchedEmbeddingBag(sizes)
    for one in (layer, other):
        change(one)
    other.load_state_dict(layer.state_dict())
    assert not any(key.startswith("user") for key in layer.state_dict())
    batch = a_batch(sizes)
    assert torch.equal(other(*batch), layer(*batch))


def test_a_parametrized_layer_is_copied():
    layer, batch = TableBatchedEmbeddingBag(SIZES["uniform"]), a_batch(SIZES["uniform"])
    CHANGES["parametrized"](layer)
    copied = copy.deepcopy(layer)
    assert torch.equal(copied(*batch), layer(*batch))
    assert copied.user._parameters.layer is copied


# What a model does beside loading.


def _draws_the_weight(layer):
    nn.init.normal_(layer.weight)


def _draws_the_data(layer):
    layer.weight.data.normal_()


def _resets(layer):
    layer.reset_parameters()


@pytest.mark.full
@pytest.mark.parametrize("draw", [_draws_the_weight, _draws_the_data, _resets])
@pytest.mark.parametrize("what", ["complete", "missing", "mismatched"])
@every_size
def test_transformers_initializes_what_it_has_not_read(draw, what, sizes, tmp_path):
    """Tables that were read stay; one that the checkpoint lacks begins as in a new layer."""
    transformers = pytest.importorskip("transformers")
    safetensors = pytest.importorskip("safetensors.torch")

    config = a_config(transformers)

    class Pretrained(transformers.PreTrainedModel):
        config_class = config

        def __init__(self, config):
            super().__init__(config)
            self.tables = Model(config.sizes).tables
            self.post_init()

        def _init_weights(self, module):
            if isinstance(module, TableBatchedEmbeddingBag):
                draw(module)

    source = Model(sizes)
    made = Pretrained(config(sizes_of(source)))
    made.load_state_dict(
        {key: value for key, value in source.state_dict().items() if "head" not in key}
    )
    made.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = safetensors.load_file(file)
    if what == "missing":
        del state["tables.shop.weight"]
    elif what == "mismatched":
        state["tables.shop.weight"] = torch.zeros(2, 2)
    safetensors.save_file(state, file, {"format": "pt"})
    loaded = Pretrained.from_pretrained(tmp_path, ignore_mismatched_sizes=True)
    for name, rows in source.tables.items():
        if what == "complete" or name != "shop":
            assert torch.equal(loaded.tables[name], rows), name
    shop = loaded.tables["shop"]
    assert shop.isfinite().all()
    assert 0.1 < shop.std() < 3
    fresh = Pretrained(config(sizes_of(source)))
    assert 0.1 < fresh.tables["user"].std() < 3


def test_a_checkpoint_in_several_files_is_assigned_one_by_one():
    source, layer = (
        TableBatchedEmbeddingBag(SIZES["mixed"]),
        TableBatchedEmbeddingBag(SIZES["mixed"], device="meta"),
    )
    for key, value in source.state_dict().items():
        assert layer.weight.is_meta
        layer.load_state_dict({key: value}, strict=False, assign=True)
    assert torch.equal(layer.weight, source.weight)


def test_a_sharded_parameter_is_not_written_table_by_table(tmp_path):
    """Where a table's rows are no view of the parameter a write would be lost."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group(
        "gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        layer = TableBatchedEmbeddingBag(SIZES["uniform"])
        state = {key: value.clone() for key, value in layer.state_dict().items()}
        fully_shard(layer, mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))
        before = layer.weight.full_tensor().clone()

        def give():
            layer.user.weight = torch.zeros(7, 4)

        for write in (layer.reset_parameters, lambda: layer.load_state_dict(state), give):
            with pytest.raises(
                RuntimeError, match=r"the parameter is sharded, .* before fully_shard"
            ):
                write()
        assert torch.equal(layer.weight.full_tensor(), before)
    finally:
        dist.destroy_process_group()


# A table named as something that every module has.


def test_a_table_with_the_name_of_a_method():
    layer = TableBatchedEmbeddingBag({"type": (3, 4), "weight": (2, 4), "train": (2, 4)})
    assert list(layer.state_dict()) == ["type.weight", "weight.weight", "train.weight"]
    other = TableBatchedEmbeddingBag({"type": (3, 4), "weight": (2, 4), "train": (2, 4)})
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.weight, layer.weight)
    layer.train().eval()
    copied = copy.deepcopy(layer)
    assert torch.equal(copied["type"], layer["type"])


# The life of a table's place.


def test_the_places_do_not_keep_the_layer_alive():
    import gc
    import weakref

    gc.disable()
    try:
        layer = TableBatchedEmbeddingBag(SIZES["mixed"])
        layer.state_dict(), layer(*a_batch(SIZES["mixed"])).sum().backward()
        gone = weakref.ref(layer)
        place = layer.user
        del layer
        assert gone() is None
        with pytest.raises(RuntimeError, match="the layer of this table is gone"):
            _ = place.weight
    finally:
        gc.enable()


def test_a_place_is_not_copied_alone():
    layer = TableBatchedEmbeddingBag(SIZES["mixed"])
    for copied in (copy.deepcopy, lambda place: torch.save(place, io.BytesIO())):
        with pytest.raises(TypeError, match=r"cannot be copied or saved without its layer"):
            copied(layer.user)


def test_a_subclass_with_modules_of_its_own():
    class WithHead(gpu_embed.TableBatchedEmbeddingBag):
        def __init__(self, sizes):
            super().__init__(sizes)
            self.head = nn.Linear(24, 1)

    layer = WithHead(SIZES["mixed"])
    assert list(layer.state_dict())[-2:] == ["head.weight", "head.bias"]
    other = WithHead(SIZES["mixed"])
    other.load_state_dict(layer.state_dict())
    copied = copy.deepcopy(layer)
    for one in (other, copied):
        assert torch.equal(one.head.weight, layer.head.weight)
        assert torch.equal(one.weight, layer.weight)
