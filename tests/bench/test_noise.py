"""Noisy times, from synthetic rows: marked wherever they are shown, and called neither faster nor slower."""

import os
from dataclasses import replace

import pytest

pytest.importorskip("rich", reason="the benchmark's extra is not installed")
pytest.importorskip("matplotlib", reason="the benchmark's extra is not installed")

from gpu_embed.bench import cli, compare, measure, plots, report, summary
from gpu_embed.bench.console import make_console
from gpu_embed.bench.results import Row, RowWriter, read_rows

OURS = Row(
    "A", "embedding", "forward", "float32", "int64", 1, 9, 4, 3, 1, "uniform", 3, 0.0,
    "gpu_embed", "ok", ms_p20=0.9, ms_p50=1.0, ms_p80=1.1, percent_of_copy=50.0, match="exact",
    device="synthetic", load=0.5,
)  # fmt: skip
RIVAL = replace(OURS, provider="torch", ms_p20=2.8, ms_p50=3.0, ms_p80=3.2)
NOISE = {"spread": {"ms_p20": 0.9, "ms_p80": 1.9}, "load": {"load": 1.3}}
by_noise = pytest.mark.parametrize("noise", NOISE.values(), ids=NOISE)
# Whose time is noisy; the other's is quiet.
by_side = pytest.mark.parametrize("side", ["ours", "theirs"])


def noisy_pair(noise: dict[str, float], side: str) -> list[Row]:
    if side == "ours":
        return [replace(OURS, **noise), RIVAL]
    wide = {name: 3 * value if name.startswith("ms") else value for name, value in noise.items()}
    return [OURS, replace(RIVAL, **wide)]


@pytest.mark.parametrize(
    ("change", "noise"),
    [
        ({}, ""),
        ({"ms_p20": 1.0, "ms_p80": 2.0, "load": 1.0}, ""),
        ({"ms_p20": 1.0, "ms_p80": 2.01}, "noisy: p80 is 2.0 times p20"),
        ({"load": 1.26}, "noisy: 1.3 processes wanted each core"),
        ({"ms_p20": None, "ms_p80": None, "load": None}, ""),
        ({"status": "wrong", "load": 9.0}, ""),
    ],
)
def test_what_is_noisy(change, noise):
    assert compare.noise_of(replace(OURS, **change)) == noise


@by_noise
@by_side
def test_a_noisy_time_has_no_ratio(noise, side):
    assert compare.ratio_of(RIVAL, OURS) == 3
    ours, theirs = noisy_pair(noise, side)
    assert compare.ratio_of(theirs, ours) is None


@pytest.mark.parametrize(("load", "found"), [([7.0, 1.0], 7.0), (None, None)])
def test_a_measured_row_holds_the_load_of_a_core(load, found, monkeypatch):
    monkeypatch.setattr(measure, "load", lambda: load)
    cores = os.cpu_count()
    assert measure._load_of_a_core() == (None if found is None else found / cores)


def test_the_load_survives_the_file_and_older_files_have_none(tmp_path):
    with RowWriter(tmp_path) as writer:
        writer.write(OURS)
    assert read_rows(tmp_path) == [OURS]
    path = tmp_path / "results.csv"
    lines = [line.split(",") for line in path.read_text().splitlines()]
    place = lines[0].index("load")
    path.write_text("\n".join(",".join(line[:place] + line[place + 1 :]) for line in lines) + "\n")
    assert read_rows(tmp_path) == [replace(OURS, load=None)]


def compared(tmp_path, capsys, old, new):
    for name, rows in (("old", old), ("new", new)):
        with RowWriter(tmp_path / name) as writer:
            for row in rows:
                writer.write(row)
    code = cli.main(["compare", str(tmp_path / "old"), str(tmp_path / "new")])
    return code, capsys.readouterr().out


@by_noise
@pytest.mark.parametrize("ms", [0.1, 20.0], ids=["much faster", "much slower"])
def test_compare_gives_no_verdict_on_noise(noise, ms, tmp_path, capsys):
    times = {
        name: ms * noise.get(name, getattr(OURS, name)) for name in ("ms_p20", "ms_p50", "ms_p80")
    }
    new = replace(OURS, **{**noise, **times})
    code, said = compared(tmp_path, capsys, [OURS], [new])
    assert code == compare.UNUSABLE
    assert "1 of 1 rows of gpu_embed are noisy" in said
    assert "SLOWER" not in said
    assert "OK: none" not in said


@by_noise
def test_compare_judges_the_quiet_rows_beside_noisy_ones(noise, tmp_path, capsys):
    quiet = replace(OURS, vocab=10)
    code, said = compared(tmp_path, capsys, [OURS, quiet], [replace(OURS, **noise), quiet])
    assert code == 0
    assert "1 of 2 rows of gpu_embed are noisy" in said
    assert "OK: none of 1 rows" in said
    slow = replace(quiet, ms_p20=1.9, ms_p50=2.0, ms_p80=2.1)
    new = tmp_path / "again"
    code, said = compared(new, capsys, [OURS, quiet], [replace(OURS, **noise), slow])
    assert code == compare.REGRESSION
    assert "of 2 rows of gpu_embed, 1 below 0.95" in said


@by_noise
@by_side
def test_the_report_counts_noisy_cells_apart(noise, side, tmp_path):
    (quiet,) = report.standings([OURS, RIVAL])
    assert (quiet.ratios, quiet.noisy, quiet.unrivalled) == ([3.0], 0, 0)
    rows = noisy_pair(noise, side)
    (standing,) = report.standings(rows)
    assert (standing.ratios, standing.noisy, standing.unrivalled) == ([], 1, 0)
    with RowWriter(tmp_path) as writer:
        for row in rows:
            writer.write(row)
    page = report.write_report(tmp_path).read_text(encoding="utf-8")
    assert "2 rows, 2 ok (1 noisy)" in page
    assert '<td class="ahead">' not in page
    assert "exact; noisy: " in page
    report.write_results_markdown(tmp_path, tmp_path / "page.md")
    assert "noisy: " in (tmp_path / "page.md").read_text(encoding="utf-8")


@by_noise
@by_side
def test_the_summary_shows_no_ratio_over_noise(noise, side):
    def shown(*tables) -> str:
        console = make_console()
        with console.capture() as said:
            for table in tables:
                console.print(table)
        return said.get()

    assert "3.00x" in shown(summary.cpu_table([OURS, RIVAL]))
    rows = noisy_pair(noise, side)
    said = shown(summary.cpu_table(rows))
    assert "3.00x" not in said
    assert "exact; noisy: " in said
    assert "exact; noisy: " in shown(summary.rows_table("title", rows))


@by_noise
def test_a_run_says_which_rows_are_noisy(noise, tmp_path, capsys):
    rows = noisy_pair(noise, "ours")
    console = make_console()
    with cli.progress_bar(console) as progress:
        reporter = cli.Reporter(console, progress, 2)
        reporter._place = ("A", "forward")
        for row in rows:
            reporter.row(row)
        reporter.flush()
    cli.say_counts(rows, tmp_path, console)
    said = capsys.readouterr().out
    assert "gpu_embed 1 ms (50 %, noisy), torch 3 ms (50 %)" in said
    assert "1 of 2 rows are noisy" in said
    cli.say_counts([OURS, RIVAL], tmp_path, console)
    assert "noisy" not in capsys.readouterr().out


def drawn(rows: list[Row]) -> list[plots.Picture]:
    return [item for item in plots.pictures(rows, {}) if isinstance(item, plots.Picture)]


@by_noise
@by_side
def test_a_heat_map_of_noise_calls_nobody_faster(noise, side):
    (quiet,) = drawn([OURS, RIVAL])
    assert quiet.title.startswith("How many times faster gpu_embed is")
    assert "NOISY" not in quiet.figure.get_supxlabel()
    (picture,) = drawn(noisy_pair(noise, side))
    assert picture.title.startswith("gpu_embed and torch: too noisy to compare")
    assert "NOISY" in picture.figure.get_supxlabel()
    assert [text.get_text() for text in picture.figure.axes[0].texts] == ["noisy"]
    assert plots.png(picture.figure).startswith(b"\x89PNG")


@by_noise
def test_noisy_points_are_hollow_and_named(noise):
    rows = [replace(OURS, vocab=vocab) for vocab in (10, 100, 1000)]
    for case, count in ((rows, 0), ([replace(rows[0], **noise), *rows[1:]], 1)):
        (picture,) = (item for item in drawn(case) if "vocabulary" in item.title)
        hollow = [
            len(line.get_xdata())
            for line in picture.figure.axes[0].get_lines()
            if line.get_markerfacecolor() == "white"
        ]
        assert hollow == [1] * count
        assert ("gpu_embed at 1" in picture.figure.get_supxlabel()) == bool(count)
