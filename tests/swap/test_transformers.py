"""replace_embeddings on models of transformers and accelerate, small and with random weights."""

import copy
import importlib
import os

import pytest
import targets
import torch
from model_runs import assert_same, gradient_bounds, run
from torch import nn

import gpu_embed
from gpu_embed import override_aten, replace_embeddings, restore_embeddings

# Before transformers is imported, which the first test does: other workers need not.
os.environ["HF_HUB_OFFLINE"] = "1"

SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}
LLAMA = {**SIZES, "intermediate_size": 16, "num_key_value_heads": 1, "pad_token_id": 0}
# The model, its config, and the names of what is replaced.
MODELS = {
    "Llama": ("LlamaForCausalLM", LLAMA, ["model.embed_tokens"]),
    "GPT-2": (
        "GPT2LMHeadModel",
        {"vocab_size": 50, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2},
        ["transformer.wte", "transformer.wpe"],
    ),
    "BERT": (
        "BertForMaskedLM",
        {**SIZES, "intermediate_size": 16},
        [f"bert.embeddings.{kind}_embeddings" for kind in ("word", "position", "token_type")],
    ),
    "T5": (
        "T5ForConditionalGeneration",
        {
            "vocab_size": 50,
            "d_model": 16,
            "d_kv": 8,
            "d_ff": 16,
            "num_layers": 2,
            "num_heads": 2,
            "decoder_start_token_id": 0,
        },
        [
            "shared",
            "encoder.embed_tokens",
            "encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
            "decoder.embed_tokens",
            "decoder.block.0.layer.0.SelfAttention.relative_attention_bias",
        ],
    ),
    "OPT": (
        "OPTForCausalLM",
        {**SIZES, "ffn_dim": 16, "word_embed_proj_dim": 16},
        ["model.decoder.embed_tokens"],
    ),
    "Gemma 3": ("Gemma3ForCausalLM", {**LLAMA, "head_dim": 8}, []),
}
# Where an id occurs more than twice, so that the order of a sum matters.
REPEATED = ("relative_attention_bias", "token_type_embeddings")
every_model = pytest.mark.parametrize("name", MODELS)


@pytest.fixture(autouse=True)
def _installed():
    transformers = pytest.importorskip("transformers", reason="the integration extra is missing")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.fixture(params=targets.params(*targets.MODELS))
def device(request):
    """Where the model lies; the backend is forced."""
    targets.require(request.param)
    with gpu_embed.use_backend(request.param.backend):
        yield request.param.device


def build(name):
    """The model, always with the same weights."""
    transformers = importlib.import_module("transformers")
    class_name, config, _ = MODELS[name]
    model_class = getattr(transformers, class_name)
    torch.manual_seed(0)
    # The fused attentions of CUDA add in an order that changes from run to run.
    return model_class(model_class.config_class(**config, attn_implementation="eager"))


def batch_for(device="cpu"):
    """No id twice, so that each row's gradient is one number, and exact in any order."""
    ids = torch.randperm(49, generator=torch.Generator().manual_seed(0))[:24].view(2, 12) + 1
    return {"input_ids": ids.to(device), "labels": ids.flip(1).to(device)}


def logits(model, batch):
    with torch.no_grad():
        return model.eval()(**batch).logits


@every_model
def test_loss_and_gradients_are_as_before(device, name):
    model, batch = build(name).to(device), batch_for(device)
    expected = run(model, batch)
    summed = [table for table in MODELS[name][2] if table.endswith(REPEATED)]
    bounds = gradient_bounds(model, batch, summed)
    assert len(bounds) == len(summed)
    report = replace_embeddings(model)
    assert [one.name for one in report.replaced] == MODELS[name][2]
    if report.replaced:
        assert report.verify(**batch), report.verify(**batch)
    assert_same(run(model, batch), expected, bounds)
    assert restore_embeddings(model) == MODELS[name][2]


@pytest.mark.parametrize(
    ("name", "reason"),
    [("OPT", "OPTLearnedPositionalEmbedding"), ("Gemma 3", "Gemma3TextScaledWordEmbedding")],
)
def test_subclasses_are_left_alone_and_override_aten_reaches_them(name, reason, monkeypatch):
    model, batch = build(name), batch_for()
    report = replace_embeddings(model)
    assert len(report.skipped) == 1
    assert f".{reason}; gpu_embed.override_aten() reaches" in report.skipped[0].reason
    triton = gpu_embed.backends.load("triton")
    if triton.unusable_reason(torch.device("cpu")) is not None:
        pytest.skip("the interpreter is off")
    tables, gather = [], triton.embedding
    monkeypatch.setattr(
        triton, "embedding", lambda weight, *rest: tables.append(weight) or gather(weight, *rest)
    )
    expected = run(model, batch)
    with gpu_embed.use_backend("triton"), override_aten():
        assert_same(run(model, batch), expected, {})
    skipped = model.get_submodule(report.skipped[0].name).weight
    assert [weight.data_ptr() for weight in tables].count(skipped.data_ptr()) == 1


@pytest.mark.parametrize("name", ["GPT-2", "BERT", "T5", "OPT"])
def test_tied_weights_stay_tied(name):
    model = build(name)
    head = model.get_output_embeddings().weight
    parameters = [id(parameter) for parameter in model.parameters()]
    replace_embeddings(model)
    assert model.get_input_embeddings().weight is head
    model.tie_weights()
    assert model.get_input_embeddings().weight is head
    assert [id(parameter) for parameter in model.parameters()] == parameters
    torch.optim.SGD(model.parameters(), lr=0.5).step(lambda: run(model, batch_for())[0])
    assert not torch.equal(head, build(name).get_output_embeddings().weight)


@pytest.mark.parametrize("rows", [57, 41])
@pytest.mark.parametrize("name", ["Llama", "T5"])
def test_resize_token_embeddings(name, rows):
    models = [build(name), build(name)]
    report = replace_embeddings(models[1])
    batch = {key: ids.clamp(max=rows - 1) for key, ids in batch_for().items()}
    batch["input_ids"][0, 0] = rows - 1
    for model in models:
        run(model, batch_for())
        torch.manual_seed(2)
        model.resize_token_embeddings(rows)
    words = models[1].get_input_embeddings()
    assert type(words) is gpu_embed.Embedding
    assert words.num_embeddings == len(words.weight) == rows
    assert report.verify(**batch)
    assert_same(run(models[1], batch), run(models[0], batch), {})


@every_model
def test_saved_and_loaded(name, tmp_path):
    """The file is as torch's layers write it; what is loaded has torch's classes, and can be swapped."""
    model = build(name)
    expected = logits(model, batch_for())
    replace_embeddings(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="eager")
    assert not any(isinstance(m, gpu_embed.Embedding) for m in loaded.modules())
    assert torch.equal(logits(loaded, batch_for()), expected)
    replace_embeddings(loaded)
    assert torch.equal(logits(loaded, batch_for()), expected)


@pytest.mark.parametrize("name", ["Llama", "GPT-2", "T5"])
def test_generate(device, name):
    model, ids = build(name).to(device).eval(), batch_for(device)["input_ids"]
    arguments = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": -1}
    expected = model.generate(ids, **arguments)
    replace_embeddings(model)
    assert torch.equal(model.generate(ids, **arguments), expected)
    assert expected.shape[1] >= 5


@pytest.mark.parametrize("name", ["Llama", "T5"])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
def test_gradient_checkpointing(name):
    model = build(name)
    model.gradient_checkpointing_enable()
    expected = run(model, batch_for())
    replace_embeddings(model)
    assert_same(run(model, batch_for()), expected, {})


# accelerate.


@pytest.fixture
def accelerate():
    return pytest.importorskip("accelerate", reason="the integration extra is missing")


def test_device_map(accelerate, tmp_path):
    build("Llama").save_pretrained(tmp_path)
    expected = run(build("Llama"), batch_for())
    model = type(build("Llama")).from_pretrained(
        tmp_path, device_map={"": "cpu"}, attn_implementation="eager"
    )
    assert replace_embeddings(model).verify(**batch_for())
    assert_same(run(model.train(), batch_for()), expected, {})


@pytest.mark.parametrize("swap_first", [True, False], ids=["swapped first", "offloaded first"])
@pytest.mark.parametrize("to", ["cpu", "disk"])
def test_offloaded_weights(accelerate, to, swap_first, tmp_path):
    """Weights on the meta device that a hook brings in for each call, through a forward it has kept."""
    model, batch = build("Llama"), batch_for()
    expected = logits(model, batch)
    report = replace_embeddings(model) if swap_first else None
    if to == "cpu":
        accelerate.cpu_offload(model, execution_device="cpu")
    else:
        accelerate.disk_offload(model, tmp_path, execution_device="cpu")
    assert model.model.embed_tokens.weight.is_meta
    if report is None:
        report = replace_embeddings(model)
        assert report.replaced[0].device == torch.device("cpu")
    assert torch.equal(logits(model, batch), expected)
    assert report.verify(**batch), report.verify(**batch)
    assert model.model.embed_tokens.weight.is_meta

    clone = copy.deepcopy(model)
    assert restore_embeddings(clone) == ["model.embed_tokens"]
    assert clone.model.embed_tokens._old_forward.__func__ is nn.Embedding.forward
    assert clone.model.embed_tokens._old_forward.__self__ is clone.model.embed_tokens

    accelerate.hooks.remove_hook_from_submodules(model)
    assert report.verify(**batch)
    restore_embeddings(model)
    assert model.model.embed_tokens.forward.__func__ is nn.Embedding.forward
    assert torch.equal(logits(model, batch), expected)


def test_dispatched_over_devices(accelerate, tmp_path):
    """Part of the model in memory, the table on disk."""
    model, batch = build("Llama"), batch_for()
    expected = logits(model, batch)
    places = {"model.embed_tokens": "disk", "model.rotary_emb": "cpu", "model.norm": "cpu"}
    places |= {"model.layers": "cpu", "lm_head": "cpu"}
    model = accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path)
    report = replace_embeddings(model)
    assert model.model.embed_tokens.weight.is_meta
    assert torch.equal(logits(model, batch), expected)
    assert report.verify(**batch), report.verify(**batch)


def test_a_forward_hooked_after_the_swap_is_not_mistaken(accelerate):
    """Restored under accelerate's hook, it is torch's forward that runs again."""
    model, batch = build("GPT-2"), batch_for()
    report = replace_embeddings(model)
    accelerate.hooks.add_hook_to_module(model.transformer.wte, accelerate.hooks.ModelHook())
    assert report.verify(**batch)
    restore_embeddings(model)
    assert model.transformer.wte._old_forward.__func__ is nn.Embedding.forward
    assert len(logits(model, batch)) == 2
