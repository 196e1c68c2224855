"""The picture of ratios: what it shows of rows, in both themes, and the command that measures for it."""

import itertools
from dataclasses import asdict, replace
from operator import attrgetter
from pathlib import Path

import numpy as np
import pytest
import torch

image = pytest.importorskip("matplotlib.image", reason="the benchmark's extra is not installed")

from pictured import BASE, HEADER, texts_of  # noqa: E402

from gpu_embed.bench import cli, figures, host_time, plots, ratios, row_csv, timing  # noqa: E402
from gpu_embed.bench.results import HOST_TIME, RowWriter, read_header, read_rows, write_header  # noqa: E402
from gpu_embed.bench.run import Choice  # noqa: E402
from gpu_embed.bench.shapes import MICRO_STEPS, SETS  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
FIGURES = [path.parent for path in (ROOT / "bench/results").glob(f"*/{HOST_TIME}")]
# The newest alone.
COMMITTED = sorted(FIGURES, key=lambda directory: str(read_header(directory)["date"]))[-1:]
TIMES = [
    host_time.HostTime("torch", "forward", 2.0, 1.0),
    host_time.HostTime(host_time.TORCH_BACKEND, "forward", 4.0, 2.0),
    host_time.HostTime("gpu_embed, triton backend up to the driver", "forward", 9.0, 4.5),
]


def row(cell, mode, provider, ms, set="L"):
    times = {"ms_p20": 0.9 * ms, "ms_p50": ms, "ms_p80": 1.1 * ms}
    return replace(BASE, set=set, mode=mode, provider=provider, **asdict(cell), **times)


ROWS = [
    row(cell, mode, provider, ms)
    for cell in (*MICRO_STEPS, SETS["L"].cells[-1])
    for mode in ("accumulate", "accumulate_fp32")
    if cell.has(mode)
    for provider, ms in {"gpu_embed-in-place": 1.0, "gpu_embed": 90.0, "torch": 100.0}.items()
] + [
    row(cell, mode, provider, ms, "J")
    for cell in SETS["J"].cells
    for mode in ("step_adam", "step")
    for provider, ms in {"gpu_embed-in-backward": 4.0, "torch-sparse": 2.0, "torch": 9.0}.items()
]


def test_bars_are_what_the_sections_show():
    step, accumulation = ratios.SECTIONS[1].title, ratios.SECTIONS[0].title
    bars = ratios.bars_of(ROWS, TIMES)
    assert [bar.ratio for bar in bars[accumulation]] == [100] * 7
    assert bars[accumulation][0].label == "128,256 x 512 fp32, 8 ids"
    assert bars[accumulation][-1].label == "32,000 x 4,096 bf16, fp32 gradient, 4,096 ids"
    # Losses too; of the ids on the same rows alone, and by optimizer.
    assert [bar.ratio for bar in bars[step]] == [0.5] * 8
    assert [bar.label for bar in bars[step]][3:5] == ["SGD, 50M rows", "Adam, 10k rows"]
    assert bars[ratios.HOST] == [
        ratios.Bar("torch backend, forward", 0.5),
        ratios.Bar("triton backend up to the driver, forward", 1 / 4.5),
    ]


def test_what_was_not_timed_has_no_bar_and_noise_shows():
    cell = MICRO_STEPS[0]
    ours, theirs = (row(cell, "accumulate", name, 1.0) for name in ("gpu_embed-in-place", "torch"))
    assert ratios.bars_of([ours], []) == {}
    assert ratios.bars_of([ours, replace(theirs, status="wrong")], []) == {}
    ((bar,),) = ratios.bars_of([ours, replace(theirs, ms_p80=9.0)], []).values()
    assert bar.noisy


@pytest.fixture
def directory(tmp_path):
    with RowWriter(tmp_path) as writer:
        for each in ROWS:
            writer.write(each)
    write_header(tmp_path, HEADER)
    row_csv.write(tmp_path / HOST_TIME, host_time.HostTime, TIMES)
    return tmp_path


def test_rows_alone_make_a_picture_for_each_theme(directory, tmp_path, capsys):
    out = tmp_path / "pictures"
    assert cli.main(["ratios", str(directory), "--out", str(out)]) == 0
    paths = [out / "ratios.png", out / "ratios_dark.png"]
    assert capsys.readouterr().out.split() == list(map(str, paths))
    corners = [image.imread(path)[0, 0, :3].sum() for path in paths]
    assert corners[0] > 2.9
    assert corners[1] < 0.3
    assert all(5_000 < path.stat().st_size < 150_000 for path in paths)


def test_machine_and_commit_stand_beneath(directory):
    bars = ratios.bars_of(ROWS, TIMES)
    figure = ratios.draw(bars, plots.describe_run(ROWS, HEADER), ratios.THEMES[0])
    caption = figure.get_supxlabel().replace("\n", " · ")
    assert "Synthetic Card 1" in caption
    assert "commit 0123456789ab" in caption
    (axes,) = figure.axes
    assert axes.get_xscale() == "log"
    assert "left of 1: slower" in axes.get_xlabel()
    edges = {patch.get_x() for patch in axes.patches}
    assert edges == {1}
    texts, frame = texts_of(figure)
    for text, box in texts:
        assert min(box.x0, box.y0, frame.x1 - box.x1, frame.y1 - box.y1) >= -1, text
    for (one, box), (other, other_box) in itertools.combinations(texts, 2):
        assert not box.padded(-2).overlaps(other_box.padded(-2)), (one, other)


def test_directories_without_a_ratio_are_an_error(tmp_path, capsys):
    with RowWriter(tmp_path) as writer:
        writer.write(BASE)
    assert cli.main(["ratios", str(tmp_path), "--out", str(tmp_path)]) == 2
    assert "no time there stands beside torch's" in capsys.readouterr().err


@pytest.mark.full
@pytest.mark.parametrize("directory", COMMITTED, ids=attrgetter("name"))
def test_the_pictures_of_the_docs_are_drawn_from_the_newest_committed_figures(directory, tmp_path):
    drawn = {path.name: path for path in ratios.draw_ratios([directory], tmp_path)}
    items = plots.pictures(read_rows(directory), read_header(directory))
    (grown,) = (item for item in items if getattr(item, "name", "").startswith("accumulation"))
    accumulation = "accumulation_as_the_table_grows.png"
    drawn[accumulation] = tmp_path / accumulation
    drawn[accumulation].write_bytes(plots.png(grown.figure))
    for name, path in drawn.items():
        now, shown = image.imread(path), image.imread(ROOT / "docs/pictures" / name)
        assert now.shape == shown.shape, name
        # Another matplotlib may set a letter elsewhere.
        assert np.abs(now - shown).mean() < 0.01, name


def test_figures_are_of_cells_that_their_providers_take():
    jobs = figures.figures_jobs(torch.device("cpu"))
    assert {job.set for job in jobs} == {"J", "L", "M"}
    for job in jobs:
        assert job.provider.needs_no_setting
        assert job.provider.missing_reason(torch.device("cpu")) is None
        assert job.provider.refuses(job.cell, job.mode) is None, job


@pytest.mark.full
def test_figures_measures_in_turns_what_ratios_draws(tmp_path, monkeypatch, capsys):
    small = {"vocab": [60], "dim": [8], "num_ids": [256], "distribution": ["uniform"]}
    choices = [
        Choice(each.sets, each.providers, each.modes, {**each.axes, **small}, 1)
        for each in figures.CHOICES
    ]
    monkeypatch.setattr(figures, "CHOICES", choices)
    monkeypatch.setattr(host_time, "measure_host_time", lambda: TIMES)
    monkeypatch.setattr(cli, "copy_gbps", lambda *arguments: 10.0)
    monkeypatch.setattr(timing, "flush", lambda device: None)
    monkeypatch.setattr(
        cli, "Effort", lambda **options: timing.Effort(0.002, 3, 4, host_seconds=0, cold=False)
    )
    assert cli.main(["figures", "--device", "cpu", "--out", str(tmp_path)]) == 0
    (directory,) = tmp_path.iterdir()
    rows = read_rows(directory)
    assert {row.status for row in rows} == {"ok"}, rows
    assert {section.ours for section in ratios.SECTIONS} <= {row.provider for row in rows}
    assert "figures --device cpu" in read_header(directory)["command"]
    assert row_csv.read(directory / HOST_TIME, host_time.HostTime, "") == TIMES
