"""replace_embeddings beside peft: LoRA on tables, modules to save, trainable tokens; before and after."""

import importlib
import os

import pytest
import torch
from targets import Target, unusable_reason

import gpu_embed
from gpu_embed import replace_embeddings, restore_embeddings

# Before transformers is imported, which the first test does: other workers need not.
os.environ["HF_HUB_OFFLINE"] = "1"

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

IDS = torch.randperm(49, generator=torch.Generator().manual_seed(0))[:24].view(2, 12) + 1
BATCH = {"input_ids": IDS, "labels": IDS.flip(1)}
ADAPTERS = {
    "LoRA on tables": {"target_modules": ["wte", "wpe", "c_attn"]},
    "modules to save": {"target_modules": ["c_attn"], "modules_to_save": ["wpe"]},
    "trainable tokens": {"target_modules": ["c_attn"], "trainable_token_indices": {"wte": [3, 7]}},
    "DoRA": {"target_modules": ["wpe"], "use_dora": True},
}
every_adapter = pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)


@pytest.fixture(scope="module")
def peft():
    """The package; with transformers, which it needs."""
    return pytest.importorskip("peft", reason="the integration extra is missing")


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    """Forced from where the test asks for it; triton is the interpreter."""
    reason = unusable_reason(Target(request.param, "cpu"))
    if reason is not None:
        pytest.skip(reason)
    return request.param


def build():
    transformers = importlib.import_module("transformers")
    config = transformers.GPT2Config(vocab_size=50, n_positions=32, n_embd=16, n_layer=1, n_head=2)
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config)


def adapted(peft, model, adapter):
    torch.manual_seed(1)
    # GPT-2's linear layers store their weights the other way round.
    config = peft.LoraConfig(r=2, fan_in_fan_out=True, task_type="CAUSAL_LM", **adapter)
    return peft.get_peft_model(model, config)


def train(model):
    """The losses of some steps of what is trainable, and what it is then."""
    torch.manual_seed(2)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=0.5)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(**BATCH).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, [parameter.detach().clone() for parameter in trainable]


@every_adapter
@pytest.mark.parametrize("order", ["swapped before", "swapped after"])
def test_adapters_train_as_before(peft, adapter, order, backend):
    expected = train(adapted(peft, build(), adapter))
    model = build()
    if order == "swapped before":
        report = replace_embeddings(model)
        model = adapted(peft, model, adapter)
    else:
        model = adapted(peft, model, adapter)
        report = replace_embeddings(model)
    # A copy that peft trains is one more.
    assert len(report.replaced) == 2 + ("modules_to_save" in adapter and order == "swapped after")
    ours = [module for module in model.modules() if isinstance(module, gpu_embed.Embedding)]
    assert len(ours) == 2 + ("modules_to_save" in adapter)
    with gpu_embed.use_backend(backend):
        assert report.verify(**BATCH), report.verify(**BATCH)
        losses, trained = train(model)
    assert losses == expected[0]
    assert losses[-1] < losses[0]
    assert all(map(torch.equal, trained, expected[1]))
    assert len(restore_embeddings(model)) == len(ours)
    assert not any(isinstance(module, gpu_embed.Embedding) for module in model.modules())


def test_verify_names_the_copy_that_is_not_in_use(peft):
    model = adapted(peft, build(), ADAPTERS["modules to save"])
    verification = replace_embeddings(model).verify(**BATCH)
    said = {one.name.removeprefix("base_model.model."): one.calls for one in verification.modules}
    assert said == {
        "transformer.wte": 1,
        "transformer.wpe.original_module": 0,
        "transformer.wpe.modules_to_save.default": 1,
    }
    assert str(verification).count("not reached by this input") == 1
    assert verification


@pytest.mark.parametrize("adapter", ["LoRA on tables", "trainable tokens"])
def test_override_aten_reaches_what_peft_looks_up_itself(peft, adapter, monkeypatch):
    model = adapted(peft, build(), ADAPTERS[adapter])
    replace_embeddings(model)
    triton, shapes = gpu_embed.backends.load("triton"), []
    if triton.unusable_reason(torch.device("cpu")) is not None:
        pytest.skip("the interpreter is off")
    look_up = triton.embedding

    def counted(weight, *rest):
        shapes.append(tuple(weight.shape))
        return look_up(weight, *rest)

    monkeypatch.setattr(triton, "embedding", counted)
    expected = model.eval()(**BATCH).loss
    with gpu_embed.use_backend("triton"), gpu_embed.override_aten():
        assert torch.equal(model(**BATCH).loss, expected)
    # LoRA's A of both tables; the table with the trained rows in it.
    own = {"LoRA on tables": {(50, 2), (32, 2)}, "trainable tokens": {(50, 16)}}
    assert own[adapter] <= set(shapes)


def test_merged_saved_and_loaded(peft, tmp_path):
    """The adapter's file does not know of the swap; merging leaves our class."""
    models = [build(), build()]
    replace_embeddings(models[1])
    models = [adapted(peft, model, ADAPTERS["LoRA on tables"]) for model in models]
    for model in models:
        train(model)
    models[1].save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(build(), tmp_path)
    merged = [model.merge_and_unload().eval() for model in (*models, loaded)]
    assert type(merged[1].transformer.wte) is gpu_embed.Embedding
    with torch.no_grad():
        logits = [model(IDS).logits for model in merged]
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])
