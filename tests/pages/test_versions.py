"""`make versions`: which sets of versions are tried, how, and that the page tells of these."""

import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import versions
from commands import ROOT
from versions import KNOWN_LAUNCH_TESTS, ROWS, TESTS, Row, install_commands, try_row

from gpu_embed.backends._triton import known_launch

PAGE = (ROOT / "docs/versions.md").read_text()


def rows_of_page() -> dict[str, list[str]]:
    lines = [line for line in PAGE.splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {re.match(r"`(\w+)`", name)[1]: rest for name, *rest in cells}


def lower_bound(name: str) -> str:
    """Of a dependency, from pyproject.toml."""
    return re.search(rf'"{name}>=([\d.]+)', (ROOT / "pyproject.toml").read_text())[1]


def test_the_page_holds_every_row_and_what_was_run():
    shown = rows_of_page()
    assert shown.keys() == ROWS.keys()
    for name, row in ROWS.items():
        *tried, kernels, modules, known = shown[name]
        # The newest of a day is a version all the same.
        assert all(re.fullmatch(r"[\d.]+", version) for version in tried)
        if row != Row("", "", "", ""):
            assert tuple(tried) == row[:4]
        assert (known == "off") == (not row.known_launch)
        for figures in (kernels, modules, known)[: 2 + row.known_launch]:
            passed, failed = re.fullmatch(r"([\d,]+) / (\d+)", figures).groups()
            assert int(passed.replace(",", "")) > 0
            assert int(failed) == 0, f"{name} does not work: exclude it in pyproject.toml"


def test_rows_reach_from_the_lowest_that_is_allowed_past_the_pinned():
    project = (ROOT / "pyproject.toml").read_text()
    lowest = ROWS["lowest"]
    assert lowest.python == re.search(r'requires-python = ">=([\d.]+)"', project)[1]
    assert lowest.torch.startswith(lower_bound("torch") + ".")
    assert lowest.triton.startswith(lower_bound("triton") + ".")
    pins = dict(re.findall(r"^(\w+)==([\d.]+)", (ROOT / "constraints.txt").read_text(), re.M))
    pinned = ROWS["pinned"]
    assert pinned[1:4] == (pins["torch"], pins["triton"], pins["numpy"])
    for workflow, row in (("ci", pinned.python), ("versions", rows_of_page()["newest"][0])):
        text = (ROOT / f".github/workflows/{workflow}.yml").read_text()
        assert f'python-version: "{row}"' in text


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_known_launches_are_tried_where_they_are_made(row):
    newest = not row.triton
    assert row.known_launch == (newest or row.triton in known_launch.CHECKED_VERSIONS)


def test_the_newest_are_tried_once_a_week():
    text = (ROOT / ".github/workflows/versions.yml").read_text()
    assert re.search(r"schedule:\n +- cron: ", text)
    assert "run: make versions ROW=newest" in text


def test_files_that_a_row_runs_exist():
    for part in [*TESTS, KNOWN_LAUNCH_TESTS]:
        assert part[0].startswith("tests/")
        for file in (word for word in part if word.startswith("tests/")):
            assert (ROOT / file).is_file(), file


def test_only_torch_brings_what_it_asks_for():
    """CUDA's libraries are gigabytes; torch's CUDA build alone does not load without them."""
    tools, torch, others, ours = install_commands(Row("3.12", "2.11.0", "3.6.0", ""), "python")
    assert "--no-deps" not in tools + torch
    assert torch[-1] == "torch==2.11.0"
    assert "--no-deps" in others
    # Without a version the newest is taken, which what is there may not be.
    assert others[-3:] == ["--upgrade", "triton==3.6.0", "numpy"]
    assert "--no-deps" in ours


@pytest.mark.parametrize("codes", [[0, 0, 0], [0, 1, 0], [1, 1, 2]], ids=str)
def test_every_part_runs_and_a_failure_is_reported(codes, tmp_path):
    left = iter(codes)
    ran = []

    def call(command, check=False, cwd=None, env=None):
        if check:
            return SimpleNamespace(returncode=0)
        assert cwd == ROOT
        assert env["TRITON_INTERPRET"] == "1"
        ran.append(command)
        return SimpleNamespace(returncode=next(left))

    assert try_row(ROWS["images"], tmp_path, call) == sum(code != 0 for code in codes)
    parts = [*TESTS, KNOWN_LAUNCH_TESTS]
    assert [command[-len(part) :] for command, part in zip(ran, parts, strict=True)] == parts
    assert all(command[0] == str(tmp_path / "bin/python3") for command in ran)


def test_nothing_is_tested_where_something_cannot_be_installed(tmp_path):
    def call(command, check=False, **_):
        assert check, "tests ran"
        if "torch==2.11.0" in command:
            raise subprocess.CalledProcessError(1, command)

    with pytest.raises(subprocess.CalledProcessError):
        try_row(ROWS["images"], tmp_path, call)


def test_another_python_is_asked_for(capsys, monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 14, 0))
    with pytest.raises(SystemExit):
        versions.main(["images"])
    assert "make versions ROW=images PYTHON=python3.12" in capsys.readouterr().err
