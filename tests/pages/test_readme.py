"""The README is true: its code runs, its tables hold, its links lead somewhere. Its commands: test_docs.py."""

import re
from pathlib import Path

import pytest
import torch
from cases import FORWARD_DTYPES, GRADIENT_DTYPES, table

import gpu_embed
from gpu_embed.functional import embedding, embedding_bag

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
DTYPES = {
    "any": FORWARD_DTYPES,
    "float": (*GRADIENT_DTYPES, torch.complex64, torch.complex128),
    "real": GRADIENT_DTYPES,
}


def rows_of(heading):
    """The cells of the first table under a heading, header first."""
    section = README.split(f"{heading}\n", 1)[1]
    lines = []
    for line in section.splitlines():
        if line.startswith("|"):
            lines.append([cell.strip() for cell in line.strip("|").split("|")])
        elif lines:
            break
    return [lines[0], *lines[2:]]


def test_the_example_runs_and_says_who_ran(capsys):
    section = README.split("## Use it\n", 1)[1]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]
    with gpu_embed.use_backend("auto"):
        exec(compile(code, "README.md", "exec"), {})
    assert re.match(r"\w+ serves (cpu|cuda)", capsys.readouterr().out)


def test_the_api_table_is_complete():
    named = {
        name
        for cells in rows_of("## The whole API")[1:]
        for name in re.findall(r"`([\w.]+)(?=[`(])", cells[0])
    }
    for name in named:
        owner = gpu_embed
        for part in name.split("."):
            owner = getattr(owner, part)
    assert {name.split(".")[0] for name in named} == set(gpu_embed.__all__)


def test_every_link_leads_to_a_file():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        file, _, place = target.partition("#")
        assert (ROOT / file).exists(), target
        if place:
            headings = re.findall(r"^#+ (.*)", (ROOT / file).read_text(encoding="utf-8"), re.M)
            places = [re.sub(r"[^\w -]", "", one).lower().replace(" ", "-") for one in headings]
            assert place in places, target


def test_every_picture_is_there():
    pictures = re.findall(r'(?:src|srcset)="([^"]+)"', README)
    assert pictures
    for picture in pictures:
        assert (ROOT / picture).is_file(), picture


def arguments_of(row):
    """How a row of the support table is used."""
    return {
        "lookup": {},
        "gradient": {},
        "`padding_idx`": {"padding_idx": 1},
        "`max_norm`, `norm_type`": {"max_norm": 0.5, "norm_type": 1.0},
        "`scale_grad_by_freq`": {"scale_grad_by_freq": True},
        "`sparse`": {"sparse": True},
        "deterministic algorithms": {},
    }[row]


SUPPORT = rows_of("## What is supported")
BAG_ROWS = [row for row in SUPPORT[1:] if "bags" in row[0]]


@pytest.mark.parametrize(
    "row", [row for row in SUPPORT[1:] if row not in BAG_ROWS], ids=lambda c: c[0]
)
def test_the_support_table_holds(target, row):
    """As torch: every argument works on every backend, for every dtype that the README lists."""
    arguments = arguments_of(row[0])
    listed = DTYPES[row[SUPPORT[0].index(target.backend)]]
    torch.use_deterministic_algorithms(row[0] == "deterministic algorithms")
    try:
        for dtype in listed:
            weight = table(4, 3, dtype, target.device)
            indices = torch.tensor([1, 2, 2], device=target.device)
            weight.requires_grad_(row[0] != "lookup")
            output = embedding(indices, weight, **arguments)
            assert torch.equal(output.detach(), weight.detach()[indices]), dtype
            if row[0] == "lookup":
                continue
            output.backward(torch.ones_like(output))
            grad = weight.grad.to_dense() if weight.grad.is_sparse else weight.grad
            padded = 0 if "padding_idx" in arguments else 1
            twice = 1 if "scale_grad_by_freq" in arguments else 2
            assert grad[:, 0].tolist() == [0, padded, twice, 0], dtype
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("row", BAG_ROWS, ids=lambda cells: cells[0])
def test_the_support_table_holds_of_bags(target, row):
    modes = re.findall('"(\\w+)"', row[0]) or ["sum"]
    weighted = "per_sample_weights" in row[0]
    for mode in modes:
        for dtype in DTYPES[row[SUPPORT[0].index(target.backend)]]:
            weight = torch.arange(8, device=target.device).view(4, 2).to(dtype).requires_grad_()
            indices = torch.tensor([[1, 2]], device=target.device)
            weights = torch.full_like(indices, 2, dtype=dtype) if weighted else None
            output = embedding_bag(indices, weight, mode=mode, per_sample_weights=weights)
            scale = {"sum": (1, 1), "mean": (0.5, 0.5), "max": (0, 1)}[mode]
            scale = [2 * s for s in scale] if weighted else scale
            assert output.tolist() == [[2 * scale[0] + 4 * scale[1], 3 * scale[0] + 5 * scale[1]]]
            output.backward(torch.ones_like(output))
            assert weight.grad[:, 0].tolist() == [0, *scale, 0], dtype
