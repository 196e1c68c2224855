"""The counter of the host's own calls, and today's counts against the committed ones."""

import os
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich", reason="the benchmark's extra is not installed")

import gpu_embed
from gpu_embed.bench import cli, host_calls

TABLE = Path(__file__).resolve().parents[2] / "bench" / "host_calls.csv"
TOY = """
def inner():
    return [n for n in (1, 2)]

def outer():
    len(str(inner()))
    inner()
"""


def toy(path):
    names = {}
    exec(compile(TOY, path, "exec"), names)
    return names["outer"]


def test_nested_calls_of_the_package_are_counted():
    own = toy(host_calls.PACKAGE + "toy.py")
    assert host_calls.own_calls(own) == ["toy.py:5 outer", "toy.py:2 inner", "toy.py:2 inner"]
    assert host_calls.own_calls(own) == host_calls.own_calls(own)


@pytest.mark.parametrize("folder", ["bench", "kernels", ".."])
def test_other_files_are_not_counted(folder):
    path = os.path.normpath(os.path.join(host_calls.PACKAGE, folder, "toy.py"))
    assert host_calls.own_calls(toy(path)) == []


def test_a_backward_on_the_cpu_is_counted():
    table = gpu_embed.Embedding(5, 2, device="cpu")
    output = table(torch.tensor([1, 2], device="cpu"))
    assert any("backward" in name for name in host_calls.own_calls(output.sum().backward))


def test_no_operation_has_more_calls_than_committed():
    old = host_calls.read_table(TABLE)
    new = host_calls.measure_host_calls()
    assert host_calls.more_calls(old, new) == []
    assert {replace(row, calls=0, functions=()) for row in new} <= {
        replace(row, calls=0) for row in old
    }
    if find_spec("triton") is not None:
        assert {row.backend for row in new} == set(host_calls.BACKENDS)
    assert host_calls.more_calls([replace(row, calls=row.calls - 1) for row in new], new)


def test_the_command_prints_writes_and_compares(tmp_path, monkeypatch, capsys):
    rows = [host_calls.HostCalls("bag, forward", "torch", "8 ids", 2, ("a.py:1 f", "a.py:2 g"))]
    monkeypatch.setattr(host_calls, "PATH", tmp_path / "host_calls.csv")
    monkeypatch.setattr(host_calls, "measure_host_calls", lambda: rows)
    monkeypatch.setattr(cli, "check_extra", lambda *names: None)
    assert cli.main(["host-calls", "--write", "--functions"]) == 0
    assert "  a.py:2 g" in capsys.readouterr().out
    assert host_calls.PATH.read_text() == (
        'operation,backend,input,calls\n"bag, forward",torch,8 ids,2\n'
    )
    assert cli.main(["host-calls"]) == 0
    rows[0] = replace(rows[0], calls=3)
    assert cli.main(["host-calls"]) == 1
    assert "bag, forward, torch: 3 calls, was 2 (8 ids)" in capsys.readouterr().err
