"""Every row of the table in docs/gradient_accumulation.md: where a gradient of the table's size is saved, where not."""

import contextlib
import re
import warnings
from functools import partial

import pytest
import torch
from commands import ROOT
from process_groups import one_process
from torch.utils.checkpoint import checkpoint

import gpu_embed
from gpu_embed.bench.memory import peak_of_step

NUM_ROWS, DIM = 5000, 8
SIZE = NUM_ROWS * DIM * torch.float32.itemsize
CPU = torch.device("cpu")
IDS = torch.tensor([[1, 2], [2, 3]])


def page_table():
    """What the page says by case."""
    text = (ROOT / "docs/gradient_accumulation.md").read_text()
    lines = re.findall(r"^\| (.*) \|$", text.partition("## When it gains")[2], re.M)
    return dict(line.split(" | ") for line in lines[1:])


def backward(table):
    table(IDS).sum().backward()


def first(table):
    table.zero_grad()
    backward(table)


def tied(table):
    (table(IDS) @ table.weight.t()).sum().backward()


def several(table):
    (table(IDS) + table(IDS + 1)).sum().backward()


def most(table):
    table(torch.arange(NUM_ROWS)).sum().backward()


def retained(table):
    loss = table(IDS).sum()
    loss.backward(retain_graph=True)
    loss.backward()


def checkpointed(use_reentrant, table):
    zero = torch.zeros((), requires_grad=True)
    loss = checkpoint(lambda zero: table(IDS).sum() + zero, zero, use_reentrant=use_reentrant)
    loss.backward()


def scaled(table):
    torch.amp.GradScaler("cpu").scale(table(IDS).sum()).backward()


def autocast(table):
    with torch.autocast("cpu", torch.bfloat16):
        backward(table)


def autograd_grad(table):
    torch.autograd.grad(table(IDS).sum(), table.weight)


def create_graph(table):
    table(IDS).pow(2).sum().backward(create_graph=True)
    table.weight.grad = table.weight.grad.detach()


def anomaly(table):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.autograd.detect_anomaly():
            backward(table)


def func_grad(table):
    def loss(weight):
        return torch.func.functional_call(table, {"weight": weight}, (IDS,)).sum()

    torch.func.grad(loss)(table.weight)


def computed(table):
    weights = {"weight": table.weight * 2}
    torch.func.functional_call(table, weights, (IDS,)).sum().backward()


def hooked(table):
    if not table.weight._backward_hooks:
        table.weight.register_hook(lambda grad: None)
    backward(table)


def post_hooked(table):
    if not table.weight._post_accumulate_grad_hooks:
        table.weight.register_post_accumulate_grad_hook(lambda weight: None)
    backward(table)


def node_hooked(table):
    seen = []
    output = table(IDS)
    node = torch.autograd.graph.get_gradient_edge(table.weight).node
    handle = node.register_prehook(lambda grads: seen.append(grads[0]))
    output.sum().backward()
    handle.remove()
    table.seen = seen


Plain = partial(gpu_embed.Embedding, NUM_ROWS, DIM)
Bag = partial(gpu_embed.EmbeddingBag, NUM_ROWS, DIM, mode="sum")


class Tables(gpu_embed.TableBatchedEmbeddingBag):
    def __init__(self):
        super().__init__([(NUM_ROWS // 2, DIM)] * 2)

    def forward(self, ids):
        return super().forward(*gpu_embed.batch_padded([ids, ids]))


# How the table is made and what is run; by rows of the page, of which some name several.
CASES = {
    "the first micro-step after `zero_grad()`": [(Plain, first)],
    "a table tied to the model's head": [(Plain, tied)],
    "several lookups of one table in a backward": [(Plain, several)],
    "`sparse=True`": [(partial(Plain, sparse=True), backward)],
    "`scale_grad_by_freq`, `padding_idx`, bags, batched tables": [
        (partial(Plain, scale_grad_by_freq=True), backward),
        (partial(Plain, padding_idx=2), backward),
        (Bag, backward),
        (Tables, backward),
    ],
    "`retain_graph=True`, `torch.utils.checkpoint` of both kinds": [
        (Plain, retained),
        (Plain, partial(checkpointed, False)),
        (Plain, partial(checkpointed, True)),
    ],
    "`GradScaler`, autocast": [(Plain, scaled), (Plain, autocast)],
    "DistributedDataParallel": [("ddp", backward)],
    "FSDP": [("fsdp", backward)],
    "`torch.compile`": [("compile", backward)],
    "`torch.autograd.grad`, `create_graph=True`, `torch.func`": [
        (Plain, autograd_grad),
        (Plain, create_graph),
        (Plain, func_grad),
    ],
    "`torch.autograd.detect_anomaly`": [(Plain, anomaly)],
    "a weight that is computed from the parameter, such as `weight * 2`": [(Plain, computed)],
    "`weight.register_hook`": [(Plain, hooked)],
    "`register_post_accumulate_grad_hook`": [(Plain, post_hooked)],
    "hooks on the `AccumulateGrad` node itself": [(Plain, node_hooked)],
    "a table of few rows, most of which the batch names": [(Plain, most)],
}
RUNS = [(row, number) for row, runs in CASES.items() for number in range(len(runs))]


def model_of(make, marked):
    """A table, or a table in a wrapper; its mark is made as a user would, before the model is wrapped."""
    table = Plain() if isinstance(make, str) else make()
    # Sparse gradients are added to as they are, and a mark on them is an error.
    if marked and not getattr(table, "sparse", False):
        gpu_embed.accumulate_in_place(table)
    if make == "ddp":
        return torch.nn.parallel.DistributedDataParallel(table)
    if make == "compile":
        torch.compiler.reset()
        return torch.compile(table, backend="aot_eager")
    if make == "fsdp":
        from torch.distributed.fsdp import fully_shard

        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        return fully_shard(torch.nn.Sequential(table), mesh=mesh)
    return table


def peak(make, run, marked):
    model = model_of(make, marked)
    # The first one makes the gradient. torch's profiler sees no end of what began before it was ever on.
    peak_of_step(lambda: partial(run, model), CPU)
    return peak_of_step(lambda: partial(run, model), CPU)


def test_every_row_of_the_page_is_run():
    assert list(page_table()) == list(CASES)


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")
@pytest.mark.parametrize(("row", "number"), RUNS, ids=[f"{row} {n}" for row, n in RUNS])
def test_a_row_of_the_page(row, number):
    make, run = CASES[row][number]
    group = one_process() if make in ("ddp", "fsdp") else contextlib.nullcontext()
    with group:
        saved = peak(make, run, marked=False) - peak(make, run, marked=True)
    if page_table()[row].startswith(("yes", "from the second")):
        assert saved > 0.9 * SIZE
    else:
        assert abs(saved) < 0.1 * SIZE


def test_a_hook_on_the_node_sees_none():
    table = Plain()
    gpu_embed.accumulate_in_place(table)
    backward(table)
    node_hooked(table)
    assert table.seen == [None]
