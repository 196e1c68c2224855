"""Every cell of the table in docs/training.md: a loop with a kind of gradient ends where the plain loop ends.

All numbers are small integers times powers of two, which fp32 holds exactly: the weights are compared bit for bit. Only
a norm is a root, so after clipping they are compared to within its rounding.
"""

import os
import re

import pytest
import torch
from commands import ROOT
from process_groups import one_process
from torch.utils.checkpoint import checkpoint

import gpu_embed
from gpu_embed import optim

os.environ["HF_HUB_OFFLINE"] = "1"

pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled"),
    pytest.mark.filterwarnings("ignore:.*pin_memory"),
]

DENSE, STEP, IN_BACKWARD = "dense", "`sparse=True` and `step()`", "in backward"
KINDS = (DENSE, STEP, IN_BACKWARD)
NUM_ROWS, DIM, STEPS, LR = 10, 4, 3, 2.0**-3


def page_table():
    """The cells by loop and kind."""
    text = (ROOT / "docs/training.md").read_text()
    lines = re.findall(r"^\| (.*) \|$", text.partition("## What works")[2], re.M)
    header, *rows = (line.split(" | ") for line in lines)
    assert header == ["loop", *KINDS]
    return {row[0]: dict(zip(KINDS, row[1:], strict=True)) for row in rows}


class Model(torch.nn.Module):
    """Integers; the loss is a sum over the batch, so a part of it has a part of the gradient."""

    def __init__(self, kind, device="cpu"):
        super().__init__()
        self.table = gpu_embed.Embedding(NUM_ROWS, DIM, sparse=kind != DENSE)
        self.head = torch.nn.Linear(DIM, 2, bias=False)
        values = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for param in self.parameters():
                param.copy_(torch.randint(-2, 3, param.shape, generator=values))

    def forward(self, ids, labels):
        return {"loss": (self.head(self.table(ids).sum(1)) * labels).sum()}


def batch_of(step=0):
    values = torch.Generator().manual_seed(step)
    # Row 0 is in none, and others are in some.
    ids = torch.randint(1, NUM_ROWS, (4, 3), generator=values)
    return {"ids": ids, "labels": torch.randint(-1, 2, (4, 2), generator=values).float()}


def halves(batch):
    parts = zip(*(values.split(2) for values in batch.values()), strict=True)
    return [dict(zip(batch, part, strict=True)) for part in parts]


def optimizers_of(model, kind, **arguments):
    """That of the tables, and that of the rest."""
    if kind == DENSE:
        tables = torch.optim.SGD(model.table.parameters(), lr=LR)
    elif kind == STEP:
        tables = optim.SGD(model.table.parameters(), lr=LR)
    else:
        tables = optim.apply_in_backward(model, optim.SGD, lr=LR, **arguments).optimizer
    return tables, torch.optim.SGD(model.head.parameters(), lr=LR)


def stepped(optimizers):
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def plain(kind, steps=STEPS, lrs=(1.0,) * STEPS, same=False, clip=None):
    model = Model(kind)
    optimizers = optimizers_of(model, kind)
    for step, factor in zip(range(steps), lrs, strict=False):
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = LR * factor
        model(**batch_of(0 if same else step))["loss"].backward()
        if clip is not None:
            clip(model)
        stepped(optimizers)
    return model


def expected(**arguments):
    return plain(DENSE, **arguments)


def plain_loop(kind, tmp_path):
    return plain(kind), expected()


def accumulation(kind, tmp_path):
    model = Model(kind)
    arguments = {"micro_steps": 2} if kind == IN_BACKWARD else {}
    optimizers = optimizers_of(model, kind, **arguments)
    if kind == DENSE:
        gpu_embed.accumulate_in_place(model)
    for step in range(STEPS):
        for half in halves(batch_of(step)):
            model(**half)["loss"].backward()
        stepped(optimizers)
    return model, expected()


def amp(kind, tmp_path):
    """A power of two as scale; the step whose gradients overflow is skipped."""
    model = Model(kind)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    arguments = {"scaler": scaler} if kind == IN_BACKWARD else {}
    tables, rest = optimizers_of(model, kind, **arguments)
    stepping = (rest,) if kind == IN_BACKWARD else (tables, rest)
    for step in (0, 1, None, 2):
        loss = model(**batch_of(step or 0))["loss"] * (torch.inf if step is None else 1)
        scaler.scale(loss).backward()
        for optimizer in stepping:
            scaler.step(optimizer)
        scaler.update()
        for optimizer in (tables, rest):
            optimizer.zero_grad()
    assert scaler.get_scale() == 2.0**3
    return model, expected()


def autocast(kind, tmp_path):
    """One step, whose numbers bfloat16 holds."""
    model = Model(kind)
    optimizers = optimizers_of(model, kind)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch_of())["loss"]
    loss.backward()
    stepped(optimizers)
    assert model.table.weight.dtype == torch.float32
    return model, expected(steps=1)


def clipping(kind, tmp_path):
    """In backward the head's gradient alone is clipped."""

    def params_of(model):
        return (model.head if kind == IN_BACKWARD else model).parameters()

    def clip(model):
        assert optim.clip_grad_norm_(params_of(model), max_norm=1.0) > 1

    def clip_dense(model):
        torch.nn.utils.clip_grad_norm_(params_of(model), max_norm=1.0)

    return plain(kind, clip=clip), expected(clip=clip_dense)


def scheduler(kind, tmp_path):
    model = Model(kind)
    optimizers = optimizers_of(model, kind)
    schedulers = [
        torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5) for optimizer in optimizers
    ]
    for step in range(STEPS):
        model(**batch_of(step))["loss"].backward()
        if kind == IN_BACKWARD:
            optimizers[1].step()
            optimizers[1].zero_grad()
        else:
            stepped(optimizers)
        for one in schedulers:
            one.step()
    return model, expected(lrs=(1.0, 0.5, 0.25))


def ddp(kind, tmp_path):
    model = Model(kind)
    optimizers = optimizers_of(model, kind)
    with one_process():
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        for step in range(STEPS):
            wrapped(**batch_of(step))["loss"].backward()
            stepped(optimizers)
    return model, expected()


def checkpointed(kind, use_reentrant):
    model = Model(kind)
    optimizers = optimizers_of(model, kind)
    # A reentrant checkpoint needs an input with a gradient.
    zero = torch.zeros((), requires_grad=True)

    def loss_of(ids, labels, zero):
        return model(ids, labels)["loss"] + zero

    for step in range(STEPS):
        checkpoint(loss_of, *batch_of(step).values(), zero, use_reentrant=use_reentrant).backward()
        stepped(optimizers)
    return model, expected()


def compiled(kind, tmp_path):
    torch.compiler.reset()
    model = Model(kind)
    optimizers = optimizers_of(model, kind)
    fast = torch.compile(model, backend="aot_eager")
    for step in range(STEPS):
        fast(**batch_of(step))["loss"].backward()
        stepped(optimizers)
    return model, expected()


def one_optimizer(model, kind):
    """As a library's loop takes it: for all parameters, of which those updated in backward have no gradient."""
    if kind == IN_BACKWARD:
        optim.apply_in_backward(model, optim.SGD, lr=LR)
    return torch.optim.SGD(model.parameters(), lr=LR)


def examples():
    """The batch, one by one; in any order it sums to the same."""
    batch = batch_of()
    return [
        {"ids": ids, "labels": labels} for ids, labels in zip(*batch.values(), strict=True)
    ]  # fmt: skip


def hugging_face(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = Model(kind)
    optimizer = one_optimizer(model, kind)
    args = transformers.TrainingArguments(
        str(tmp_path), max_steps=STEPS, per_device_train_batch_size=4, use_cpu=True,
        report_to="none", disable_tqdm=True, lr_scheduler_type="constant", save_strategy="no",
        max_grad_norm=1e9,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model, args, train_dataset=examples(), optimizers=(optimizer, None)
    )
    if kind == STEP:
        trainer.accelerator.clip_grad_norm_ = optim.clip_grad_norm_
    trainer.train()
    return model, expected(same=True)


def lightning(kind, tmp_path):
    pl = pytest.importorskip("pytorch_lightning")

    class Lit(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = Model(kind)
            self.optimizer = one_optimizer(self.model, kind)

        def training_step(self, batch, batch_idx):
            return self.model(**batch)["loss"]

        def configure_optimizers(self):
            return self.optimizer

        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, **kwargs):
            optim.clip_grad_norm_(self.parameters(), max_norm=1e9)

    lit = Lit()
    loader = torch.utils.data.DataLoader(examples(), batch_size=4)
    pl.Trainer(
        accelerator="cpu", max_steps=STEPS, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    ).fit(lit, loader)  # fmt: skip
    return lit.model, expected(same=True)


def accelerated(kind, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model = Model(kind)
    tables, rest = optimizers_of(model, kind)
    prepared = [rest] if kind == IN_BACKWARD else [tables, rest]
    wrapped, *prepared = accelerator.prepare(model, *prepared)
    for step in range(STEPS):
        accelerator.backward(wrapped(**batch_of(step))["loss"])
        accelerator.unscale_gradients()
        optim.clip_grad_norm_(model.parameters(), 1e9)
        stepped(prepared)
    return model, expected()


def fsdp2(kind, tmp_path):
    from torch.distributed.fsdp import fully_shard

    model = Model(kind)
    ignored = set() if kind == DENSE else set(model.table.parameters())
    with one_process():
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        fully_shard(model, mesh=mesh, ignored_params=ignored)
        optimizers = optimizers_of(model, kind)
        for step in range(STEPS):
            model(**batch_of(step))["loss"].backward()
            stepped(optimizers)
        sharded = [
            name for name, param in model.named_parameters() if hasattr(param, "full_tensor")
        ]
        assert sharded == (["table.weight"] if kind == DENSE else []) + ["head.weight"]
        # Without the process group a sharded parameter cannot be read.
        whole = Model(kind)
        with torch.no_grad():
            for own, other in zip(whole.parameters(), model.parameters(), strict=True):
                own.copy_(other.full_tensor() if hasattr(other, "full_tensor") else other)
    return whole, expected()


LOOPS = {
    "plain loop": plain_loop,
    "gradient accumulation": accumulation,
    "AMP with GradScaler": amp,
    "autocast to bfloat16": autocast,
    "clipping by norm": clipping,
    "LR scheduler": scheduler,
    "DistributedDataParallel": ddp,
    "checkpoint, `use_reentrant=False`": lambda kind, _: checkpointed(kind, False),
    "checkpoint, `use_reentrant=True`": lambda kind, _: checkpointed(kind, True),
    "torch.compile": compiled,
    "Hugging Face Trainer": hugging_face,
    "Lightning": lightning,
    "accelerate": accelerated,
    "FSDP2": fsdp2,
}
# What a cell that raises says, of the cause and the cure.
RAISES = {
    ("DistributedDataParallel", IN_BACKWARD): r"(?s)DistributedDataParallel.*step\(\)",
    ("checkpoint, `use_reentrant=True`", IN_BACKWARD): "use_reentrant=False",
}
CELLS = [(loop, kind) for loop in page_table() for kind in KINDS]


def test_every_row_of_the_page_is_run():
    table = page_table()
    assert list(table) == list(LOOPS)
    raising = {cell for cell in CELLS if table[cell[0]][cell[1]].startswith("raises: take `")}
    assert raising == set(RAISES)
    assert all(
        table[loop][kind].startswith("works") for loop, kind in CELLS if (loop, kind) not in raising
    )


@pytest.mark.parametrize(("loop", "kind"), CELLS, ids=[f"{one} {two}" for one, two in CELLS])
def test_a_cell_of_the_page(loop, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if (loop, kind) in RAISES:
        with pytest.raises(RuntimeError, match=RAISES[loop, kind]):
            LOOPS[loop](kind, tmp_path)
        return
    model, plain_model = LOOPS[loop](kind, tmp_path)
    untrained = Model(kind)
    for name, param in model.named_parameters():
        assert not torch.equal(param, untrained.get_parameter(name)), name
        tolerance = 1e-5 if loop == "clipping by norm" else 0.0
        wanted = plain_model.get_parameter(name)
        torch.testing.assert_close(param, wanted, rtol=tolerance, atol=tolerance)


def refused_by_ddp(rank, sizes):
    layer = gpu_embed.TableBatchedEmbeddingBag(sizes, sparse=True)
    batch = gpu_embed.batch_padded([torch.ones(2, 2, dtype=torch.int64)] * len(sizes))
    with one_process():
        wrapped = torch.nn.parallel.DistributedDataParallel(layer)
        with pytest.raises(RuntimeError):
            wrapped(*batch)[0].sum().backward()
        # A backward that raised leaves gloo's threads at work, which may abort an ordinary exit.
        os._exit(0)


@pytest.mark.parametrize("sizes", [{"user": (9, 4)}, {"user": (9, 4), "item": (9, 8)}], ids=len)
def test_torch_refuses_sparse_gradients_of_batched_layers_under_ddp(sizes):
    torch.multiprocessing.spawn(refused_by_ddp, (sizes,), nprocs=1)
