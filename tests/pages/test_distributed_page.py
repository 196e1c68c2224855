"""The numbers and messages of docs/distributed.md."""

import re
from pathlib import Path

import pytest
import torch
from commands import ROOT, python_blocks
from torchrun import run_page

PAGE = (ROOT / "docs/distributed.md").read_text()


@pytest.mark.full
@pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="torch is built without gloo",
)
def test_the_code_runs_on_two_ranks(tmp_path: Path):
    """As under torchrun; test_docs.py runs it on one, and compares what it prints."""
    start = "import torch.distributed as dist; dist.init_process_group('gloo')"
    code = "\n".join([start, *python_blocks(PAGE)])
    code = code.replace('"cuda" if torch.cuda.is_available() else "cpu"', '"cpu"')
    printed = run_page(code, 2, tmp_path)
    assert printed.count("(Shard(dim=0),)") == 4
    # All ranks have the id that is out of range, and each says so.
    assert printed.count("id 1001 at position (0, 1)") == 2


def sent(row: str, R: int, V: int, D: int, b: int, N: int, K: int) -> float:
    """Bytes that a rank sends in forward and backward: all-gathers of the tensors that move, and their like."""
    gathered = (R - 1) / R
    rows, table = N * D * b, V * D * b
    return {
        # An all-reduce of the output; nothing in backward.
        "`RowwiseParallel`, same ids": 2 * gathered * rows,
        "`ColwiseParallel`, same ids, output gathered": gathered * rows,
        # All ranks' ids; their rows are reduced and scattered, and the rows' gradients gathered.
        "`RowwiseParallel`, own ids": gathered * R * (N * 8 + 2 * rows),
        "FSDP2, or DDP with dense gradients": 2 * gathered * table,
        "DDP with `sparse=True`": gathered * R * K * (D * b + 8),
        # A rank's ids; rows and gradients, of which those of its own rows stay.
        "`ShardedEmbedding`, `distinct=False`": gathered * N * (4 + 2 * D * b),
        "`ShardedEmbedding`": gathered * K * (4 + 2 * D * b),
    }[row]


def tables() -> list[tuple[dict[str, int], list[list[str]]]]:
    """The sizes named before each table of costs, and its cells."""
    section = PAGE.partition("## What a step sends")[2].partition("## Beside")[0]
    sizes, found = {}, []
    for line in section.splitlines():
        if names := re.findall(r"\b([VDbNK]) = ([\d,]+\d|\d)", line):
            sizes |= {name: int(number.replace(",", "")) for name, number in names}
        if line.startswith("| engine"):
            found.append((dict(sizes), []))
        elif re.match(r"\| .*\d \|$", line):
            found[-1][1].append(line.strip("| ").split(" | "))
    return found


def test_the_costs_on_paper_are_those_of_the_formulas():
    assert len(tables()) == 2
    for sizes, rows in tables():
        assert sorted(sizes) == sorted("VDbNK")
        assert len(rows) == 7
        for name, formula, *numbers in rows:
            for ranks, number in zip((8, 64, 1024), numbers, strict=True):
                of_rule = sent(name, ranks, **sizes)
                assert number == f"{of_rule / 1e6:,.0f}", (name, ranks)
                # The formula as the page writes it: a space multiplies.
                code = re.sub(r"(?<=[\w)]) (?=[\w(])", " * ", formula)
                assert eval(code, {"R": ranks, **sizes}) == pytest.approx(of_rule), formula


def test_measured_numbers_are_those_of_the_notes():
    text = PAGE + (ROOT / "docs/torchrec.md").read_text()
    rows = re.findall(r"^\| \d ranks \|.*\|$", text, re.M)
    assert len(rows) == 6
    assert set(rows) <= set((ROOT / "bench/NOTES.md").read_text().splitlines())


def test_the_errors_are_those_of_the_code():
    code = "\n".join(path.read_text() for path in (ROOT / "gpu_embed").rglob("*.py"))
    section = PAGE.partition("| error | remedy |")[2].partition("\n## ")[0]
    messages = re.findall(r"^\| (?:the warning )?`([^`]+)` \|", section, re.M)
    assert len(messages) == 9
    for message in messages:
        # A class names itself.
        assert message.removeprefix("RowwiseBagParallel ") in code, message
