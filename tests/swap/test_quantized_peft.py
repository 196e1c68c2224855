"""LoRA of peft on quantized tables: it trains, is saved and loaded, and the codes stay."""

import importlib
import os

import pytest
import torch

from gpu_embed import QuantizedEmbedding, replace_embeddings, restore_embeddings

# Before transformers is imported.
os.environ["HF_HUB_OFFLINE"] = "1"

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    # What peft says of every layer that it is told about.
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),
]

IDS = torch.randperm(49, generator=torch.Generator().manual_seed(0))[:24].view(2, 12) + 1
BATCH = {"input_ids": IDS, "labels": IDS.flip(1)}


@pytest.fixture(scope="module")
def peft():
    """The package; with transformers, which it needs."""
    return pytest.importorskip("peft", reason="the integration extra is missing")


def build(quantize=None, tied=False):
    transformers = importlib.import_module("transformers")
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=32, n_embd=16, n_layer=1, n_head=2, tie_word_embeddings=tied
    )
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).eval()
    if quantize is not None:
        replace_embeddings(model, quantize=quantize)
    return model


def config_of(peft):
    config = peft.LoraConfig(r=2, target_modules=["wte", "wpe"], task_type="CAUSAL_LM")
    config._register_custom_module({QuantizedEmbedding: peft.tuners.lora.Embedding})
    return config


def adapted(peft, model):
    torch.manual_seed(1)
    return peft.get_peft_model(model, config_of(peft)).eval()


def train(model):
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=0.5)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(**BATCH).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_lora_trains_on_top(peft, quantize, tmp_path):
    """As on the floats that the codes stand for; saved and loaded, it is the same model."""
    model = adapted(peft, build(quantize))
    table = model.base_model.model.transformer.wte.base_layer
    assert type(table) is QuantizedEmbedding
    codes = table.weight.clone()
    floats = build(quantize)
    restore_embeddings(floats)
    losses, expected = train(model), train(adapted(peft, floats))
    assert losses == pytest.approx(expected, rel=1e-5)
    assert losses[-1] < losses[0] - 0.05
    assert torch.equal(table.weight, codes)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(build(quantize), tmp_path, config=config_of(peft))
    assert torch.equal(loaded.eval()(**BATCH).logits, model(**BATCH).logits)
    # Codes are not added to.
    with pytest.raises(RuntimeError):
        model.merge_and_unload()


def test_tied_heads_of_transformers_stay_tied():
    pytest.importorskip("transformers", reason="the integration extra is missing")
    model = build(tied=True)
    expected = model(IDS).logits
    report = replace_embeddings(model, "wte", quantize="int4")
    assert report.replaced == ()
    (reason,) = (one.reason for one in report.skipped if one.name == "transformer.wte")
    assert reason.startswith("tied: lm_head.weight is the same table")
    assert model.lm_head.weight is model.transformer.wte.weight
    assert torch.equal(model(IDS).logits, expected)


def test_a_transformer_is_saved_small_and_loaded(tmp_path):
    """By state_dict, into a model that was quantized alike."""
    pytest.importorskip("transformers", reason="the integration extra is missing")
    model, other = build("int4"), build("int4")
    with torch.no_grad():
        other.transformer.wte.weight.zero_()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert torch.equal(other(IDS).logits, model(IDS).logits)
    with pytest.raises(RuntimeError, match=r"a table of torch\.float32"):
        other.load_state_dict(build().state_dict())
