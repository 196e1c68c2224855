"""Trainer, Lightning and accelerate as docs/training.md has them: runs resume exactly, and what fails without it."""

import os

import pytest
import torch
from cases import same_bits
from commands import ROOT, python_blocks

import gpu_embed
from gpu_embed import optim

os.environ["HF_HUB_OFFLINE"] = "1"

transformers = pytest.importorskip("transformers")
pl = pytest.importorskip("pytorch_lightning")
accelerate = pytest.importorskip("accelerate")

pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled"),
    pytest.mark.filterwarnings("ignore:.*pin_memory"),
]

NUM_ROWS, STEPS = 40, 6


@pytest.fixture(scope="module")
def page():
    """The classes of the page."""
    names = {"__name__": "page"}
    for block in python_blocks((ROOT / "docs/training.md").read_text()):
        if "\nclass " in block:
            exec(compile(block, "training.md", "exec"), names)
    return names


class Model(torch.nn.Module):
    def __init__(self, tables, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        if tables == "Embedding":
            self.table = gpu_embed.Embedding(NUM_ROWS, 4, sparse=True, dtype=dtype)
            columns = 4
        else:
            sizes = {"user": (NUM_ROWS, 4), "item": (NUM_ROWS, 4 if tables == "uniform" else 8)}
            self.table = gpu_embed.TableBatchedEmbeddingBag(sizes, sparse=True, dtype=dtype)
            columns = sum(dim for _, dim in sizes.values())
        self.head = torch.nn.Linear(columns, 1)

    def forward(self, ids, labels):
        if isinstance(self.table, gpu_embed.Embedding):
            means = self.table(ids).float().mean(1)
        else:
            means = self.table(*gpu_embed.batch_padded([ids, ids.flip(1)])).float()
        return {"loss": (self.head(means)[:, 0] - labels).square().mean()}


def examples():
    values = torch.Generator().manual_seed(0)
    ids = torch.randint(0, NUM_ROWS, (48, 5), generator=values)
    return [{"ids": row, "labels": float(number % 3)} for number, row in enumerate(ids)]


def loader():
    """Three batches an epoch."""
    return torch.utils.data.DataLoader(examples(), batch_size=16)


def assert_same_state(one, other):
    """The numbers of every table of two optimizers, and their settings."""
    for own, wanted in zip(one.param_groups, other.param_groups, strict=True):
        assert [own[name] for name in one.defaults] == [wanted[name] for name in one.defaults]
    states = [list(optimizer.state_dict()["state"].values()) for optimizer in (one, other)]
    assert len(states[0]) == len(states[1]) > 0
    for own, wanted in zip(*states, strict=True):
        assert own.keys() == wanted.keys()
        for name, value in own.items():
            equal = same_bits if isinstance(value, torch.Tensor) else int.__eq__
            assert equal(value, wanted[name]), name


def assert_same_weights(one, other):
    for (name, own), wanted in zip(one.named_parameters(), other.parameters(), strict=True):
        assert same_bits(own.detach(), wanted.detach()), name


# Hugging Face Trainer.


class StopAt(transformers.TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


class Lrs(transformers.TrainerCallback):
    """The Trainer's lr and the tables' at each step."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.seen = []

    def on_step_begin(self, args, state, control, lr_scheduler, **kwargs):
        tables = [group["lr"] for group in self.optimizer.param_groups]
        self.seen.append((lr_scheduler.get_last_lr()[0], *tables))


def trainer_of(model, folder, callback_class, optimizer_class, *callbacks, **arguments):
    updates = optim.apply_in_backward(model, optimizer_class, lr=0.5, **arguments)
    args = transformers.TrainingArguments(
        str(folder), max_steps=STEPS, save_steps=3, per_device_train_batch_size=8, learning_rate=0.01,
        warmup_steps=2, use_cpu=True, report_to="none", disable_tqdm=True,
    )  # fmt: skip
    seen = Lrs(updates.optimizer)
    every = [callback_class(updates.optimizer), seen, *callbacks]
    trainer = transformers.Trainer(model, args, train_dataset=examples(), callbacks=every)
    return trainer, updates.optimizer, seen


def resumed(folder, callback_class, tables="mixed", optimizer_class=optim.Adam, **arguments):
    """Six steps, and three steps and three more with a fresh model: model, tables' optimizer and lrs of both."""
    dtype = arguments.pop("dtype", torch.float32)

    def make(name, *callbacks):
        model = Model(tables, dtype)
        return model, *trainer_of(
            model, folder / name, callback_class, optimizer_class, *callbacks, **arguments
        )

    model, trainer, optimizer, seen = make("whole")
    trainer.train()
    _, first, _, _ = make("broken", StopAt(3))
    first.train()
    assert first.state.global_step == 3
    fresh_model, fresh, fresh_optimizer, fresh_seen = make("broken")
    with torch.no_grad():
        for param in fresh_model.parameters():
            param.add_(1)
    fresh.train(resume_from_checkpoint=True)
    assert fresh.state.global_step == STEPS
    return (model, optimizer, seen.seen), (fresh_model, fresh_optimizer, fresh_seen.seen)


@pytest.mark.parametrize("tables", ["Embedding", "uniform", "mixed"])
@pytest.mark.parametrize("optimizer_class", [optim.RowWiseAdagrad, optim.Adam])
def test_the_trainers_runs_resume_exactly(page, tables, optimizer_class, tmp_path):
    whole, broken = resumed(tmp_path, page["TablesCallback"], tables, optimizer_class)
    assert_same_weights(whole[0], broken[0])
    assert_same_state(whole[1], broken[1])
    assert whole[2][3:] == broken[2]


def test_the_trainers_runs_resume_exactly_where_16_bit_rows_are_rounded_at_random(page, tmp_path):
    whole, broken = resumed(
        tmp_path, page["TablesCallback"], dtype=torch.bfloat16, stochastic_rounding=True
    )
    assert_same_weights(whole[0], broken[0])
    assert_same_state(whole[1], broken[1])


def test_the_tables_lr_follows_the_trainers_schedule(page, tmp_path):
    (_, _, seen), _ = resumed(tmp_path, page["TablesCallback"])
    # Two steps of warmup, then four down.
    factors = [0.0, 0.5, 1.0, 0.75, 0.5, 0.25]
    assert [tables for _, tables in seen] == [0.5 * factor for factor in factors]
    assert [lr for lr, _ in seen] == pytest.approx([0.01 * factor for factor in factors])


@pytest.mark.parametrize("method", ["on_train_begin", "on_step_begin"])
def test_each_method_of_the_callback_is_needed(page, method, tmp_path):
    """The tests above can fail."""
    base = page["TablesCallback"]
    other = type("Other", (base,), {method: getattr(transformers.TrainerCallback, method)})
    whole, _ = resumed(tmp_path / "right", base)
    _, broken = resumed(tmp_path / "wrong", other)
    with pytest.raises(AssertionError):
        assert_same_weights(whole[0], broken[0])
    with pytest.raises(AssertionError):
        assert_same_state(whole[1], broken[1])


def test_a_checkpoint_without_the_tables_state_does_not_resume(page, tmp_path):
    base = page["TablesCallback"]
    other = type("Other", (base,), {"on_save": transformers.TrainerCallback.on_save})
    with pytest.raises(FileNotFoundError, match=r"tables.pt"):
        resumed(tmp_path, other)


# Sparse gradients in the libraries' own clipping.

NOT_SPARSE = "Could not run 'aten::linalg_vector_norm'|not supported|SparseCPU"


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_the_trainers_norm_does_not_take_sparse_gradients(max_grad_norm, tmp_path):
    """Also where it is not to clip, which is why its function is replaced."""

    def make(model):
        args = transformers.TrainingArguments(
            str(tmp_path), max_steps=2, max_grad_norm=max_grad_norm, save_strategy="no",
            use_cpu=True, report_to="none", disable_tqdm=True,
        )  # fmt: skip
        optimizer = torch.optim.Adagrad(model.parameters(), lr=0.5)
        return transformers.Trainer(
            model, args, train_dataset=examples(), optimizers=(optimizer, None)
        )

    with pytest.raises(NotImplementedError, match=NOT_SPARSE):
        make(Model("Embedding")).train()
    model = Model("Embedding")
    trainer = make(model)
    trainer.accelerator.clip_grad_norm_ = optim.clip_grad_norm_
    trainer.train()
    assert not torch.equal(model.table.weight, Model("Embedding").table.weight)


def test_the_trainers_default_optimizer_does_not_take_sparse_gradients(tmp_path):
    args = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, use_cpu=True, report_to="none", disable_tqdm=True
    )
    trainer = transformers.Trainer(Model("Embedding"), args, train_dataset=examples())
    trainer.accelerator.clip_grad_norm_ = optim.clip_grad_norm_
    with pytest.raises(RuntimeError, match="sparse"):
        trainer.train()


def test_accelerates_norm_does_not_take_sparse_gradients():
    accelerator = accelerate.Accelerator(cpu=True)
    model = Model("Embedding")
    prepared, tables = accelerator.prepare(
        model, optim.RowWiseAdagrad(model.table.parameters(), lr=0.5)
    )
    accelerator.backward(prepared(**next(iter(loader())))["loss"])
    with pytest.raises(NotImplementedError, match=NOT_SPARSE):
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
    accelerator.unscale_gradients()
    assert optim.clip_grad_norm_(model.parameters(), 1e-3) > 1e-3
    assert optim.clip_grad_norm_(model.parameters(), 1e-3) == pytest.approx(1e-3, rel=1e-2)
    tables.step()
    assert not torch.equal(model.table.weight, Model("Embedding").table.weight)


def fit(lit, folder, steps=STEPS, ckpt_path=None, **arguments):
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=steps, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder, **arguments,
    )  # fmt: skip
    trainer.fit(lit, loader(), ckpt_path=ckpt_path)
    return trainer


def lit_of(page, name):
    torch.manual_seed(0)
    return page[name]()


def test_lightnings_norm_does_not_take_sparse_gradients(page, tmp_path):
    plain_class = type("Plain", (page["Stepped"],), {})
    plain_class.configure_gradient_clipping = pl.LightningModule.configure_gradient_clipping
    with pytest.raises(NotImplementedError, match=NOT_SPARSE):
        fit(lit_of({"Plain": plain_class}, "Plain"), tmp_path, gradient_clip_val=1.0)
    lit, untrained = lit_of(page, "Stepped"), lit_of(page, "Stepped")
    fit(lit, tmp_path)
    for (name, param), before in zip(
        lit.named_parameters(), untrained.parameters(), strict=True
    ):  # fmt: skip
        assert not torch.equal(param, before), name


# Lightning and accelerate in backward.


def test_lightnings_checkpoints_hold_the_tables_state(page, tmp_path):
    first, fresh = (lit_of(page, "Lit") for _ in range(2))
    trainer = fit(first, tmp_path, steps=3, gradient_clip_val=1.0)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    # All steps are done, so it only loads.
    fit(fresh, tmp_path, steps=3, gradient_clip_val=1.0, ckpt_path=tmp_path / "half.ckpt")
    assert fresh.updates.optimizer.state[fresh.model.table.weight]["step"] == 3
    assert_same_weights(first, fresh)
    assert_same_state(first.updates.optimizer, fresh.updates.optimizer)


def test_accelerates_runs_resume_exactly(tmp_path):
    accelerator = accelerate.Accelerator(cpu=True)

    def make():
        model = Model("mixed")
        updates = optim.apply_in_backward(model, optim.Adam, lr=0.5)
        prepared, rest = accelerator.prepare(model, torch.optim.AdamW(model.head.parameters()))
        return model, updates.optimizer, prepared, rest

    def train(prepared, rest, batches):
        for batch in batches:
            accelerator.backward(prepared(**batch)["loss"])
            accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
            rest.step()
            rest.zero_grad()

    batches = list(loader()) * 2
    model, tables, prepared, rest = make()
    accelerator.register_for_checkpointing(tables)
    train(prepared, rest, batches[:3])
    accelerator.save_state(tmp_path)
    train(prepared, rest, batches[3:])
    wanted = {name: param.detach().clone() for name, param in model.named_parameters()}
    steps = optim.Adam(model.table.parameters(), lr=0.5)
    steps.load_state_dict(tables.state_dict())
    # Back to the third step, and on from there.
    accelerator.load_state(tmp_path)
    assert {state["step"] for state in tables.state.values()} == {3}
    train(prepared, rest, batches[3:])
    for name, param in model.named_parameters():
        assert same_bits(param.detach(), wanted[name]), name
    assert_same_state(tables, steps)
