"""Quantized tables beside each other: what is measured, and the table that is printed."""

import math

import pytest
import torch
from torch import nn

pytest.importorskip("rich", reason="the benchmark's extra is not installed")

from gpu_embed.bench import cli, quantized


def test_bytes_errors_and_times(monkeypatch):
    """Against what a layer of a known size and error, and of twice the time, must give."""

    class Half(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.register_buffer("weight", layer.weight.half())

        def forward(self, ids):
            return self.weight[ids].float() + 0.5

    monkeypatch.setattr(quantized, "ways", lambda: {"half": Half})
    monkeypatch.setattr(quantized, "_seconds", lambda layer, _: 2.0 if type(layer) is Half else 1.0)
    advanced = []
    (one,) = quantized.measure_quantized(1000, 64, 300, 5, lambda: advanced.append(1))
    assert (one.name, one.memory, one.ratio, one.quarter, one.three_quarters) == (
        "half",
        0.5,
        2,
        2,
        2,
    )
    assert one.file == pytest.approx(0.5, abs=0.01)
    assert one.mean_error == pytest.approx(0.5, abs=0.01)
    assert 0.5 <= one.largest_error < 0.51
    assert advanced == [1]


def test_what_cannot_be_saved_has_no_file(monkeypatch):
    class Kept(nn.Embedding):
        def state_dict(self):
            raise NotImplementedError

    monkeypatch.setattr(
        quantized, "ways", lambda: {"kept": lambda layer: Kept(*layer.weight.shape)}
    )
    (one,) = quantized.measure_quantized(10, 8, 3, 2, lambda: None)
    assert one.file is None
    assert math.isfinite(one.ratio)


def test_the_table(capsys):
    threads = torch.get_num_threads()
    try:
        arguments = ["--rows", "1000", "--dim", "256", "--ids", "64", "--rounds", "3"]
        assert cli.main(["quantized", *arguments]) == 0
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    rows = {
        line.split("│")[1].strip(): line.split("│")[2:-1]
        for line in printed.splitlines()
        if "│" in line
    }
    assert [
        float(rows[f"gpu_embed {name}"][0]) for name in ("int8, a scale a row", "int4, group 64")
    ] == [
        0.258,
        0.141,
    ]
    assert all(float(row[2]) < 0.4 for name, row in rows.items() if name.startswith("gpu_embed"))


@pytest.mark.parametrize(("option", "value"), [("--rounds", "1"), ("--rows", "0"), ("--ids", "x")])
def test_numbers_that_cannot_be(option, value, capsys):
    assert cli.main(["quantized", option, value]) == 2
    assert option in capsys.readouterr().err
