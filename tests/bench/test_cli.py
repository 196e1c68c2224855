"""The benchmark's command line, called as a user does."""

import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from gpu_embed.bench import cli, headline, host_time, providers, results, shapes, summary, timing
from gpu_embed.bench.console import make_console, progress_bar
from gpu_embed.bench.measure import Bench
from gpu_embed.bench.providers import PROVIDERS, Provider
from gpu_embed.bench.results import Row, read_header, read_rows
from gpu_embed.demo.running import describe_backend

SMALL = ("--vocab", "60", "--dim", "8", "--ids", "40", "--seconds", "0.002")


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(cli, "copy_gbps", lambda *arguments: 10.0)
    monkeypatch.setattr(timing, "flush", lambda device: None)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run_cli(*arguments):
    return cli.main(["run", "--device", "cpu", *SMALL, *map(str, arguments)])


def test_run_writes_rows_and_a_header(tmp_path, capsys):
    out = tmp_path / "results"
    code = run_cli(
        "--set", "A", "E", "--providers", "gpu_embed", "torch", "--out", out, "--seed", 3
    )
    assert code == 0
    rows = read_rows(out)
    # A: 2 dtypes in 3 modes; E: uniform, zipf and padded in 2; 2 providers.
    assert len(rows) == (2 * 3 + 3 * 2) * 2
    assert {row.status for row in rows} == {"ok"}
    assert {row.set for row in rows} == {"A", "E"}
    assert {row.padding for row in rows} == {0, 0.3}
    header = read_header(out)
    assert header["seed"] == 3
    assert header["copy_gbps"] == 10
    assert header["command"].startswith("python -m gpu_embed.bench run --device cpu")
    for name in [
        "device",
        "driver",
        "capability",
        "clocks",
        "torch",
        "triton",
        "python",
        "commit",
        "dirty",
        "date",
        "command",
    ]:
        assert name in header
    assert "24 ok" in capsys.readouterr().out


def test_run_resumes(tmp_path, capsys):
    torch_alone = ("--set", "A", "--mode", "forward", "--out", tmp_path, "--providers", "torch")
    assert run_cli(*torch_alone, "--limit", 1) == 0
    assert run_cli(*torch_alone) == 2
    assert "use --resume" in capsys.readouterr().err
    (tmp_path / "header.json").write_text(json.dumps({**read_header(tmp_path), "copy_gbps": 20.0}))
    assert run_cli(*torch_alone, "--resume") == 0
    rows = read_rows(tmp_path)
    assert [row.dtype for row in rows] == ["float32", "bfloat16"]
    # The second run's percentages are of the first one's copy.
    assert rows[1].percent_of_copy == pytest.approx(100 * rows[1].gbps_dram / 20, rel=1e-3)
    assert run_cli(*torch_alone, "--resume", "--seed", 1) == 2
    assert "holds results with seed 0, this run has 1" in capsys.readouterr().err


def test_an_interrupted_run_keeps_what_it_measured(tmp_path, capsys, monkeypatch):
    built = []

    def build(weight, padding_idx, mode):
        built.append(mode)
        if len(built) > 2:
            raise KeyboardInterrupt
        return PROVIDERS["torch"].build(weight, padding_idx, mode)

    monkeypatch.setitem(PROVIDERS, "torch.compile", Provider("torch.compile", "", build, cpu=True))
    command = ("--set", "A", "--out", tmp_path, "--mode", "forward", "--providers", "torch",
               "torch.compile")  # fmt: skip
    assert run_cli(*command) == 130
    # The second build was the host's time of the first.
    said = capsys.readouterr().err
    assert "interrupted; 3 of 4 measurements are in" in said
    assert "--resume measures the rest" in said
    assert len(read_rows(tmp_path)) == 3
    built.clear()
    assert run_cli(*command, "--resume") == 0
    assert len(read_rows(tmp_path)) == 4


@pytest.mark.full
@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
def test_ctrl_c_in_a_real_process(tmp_path):
    command = [sys.executable, "-m", "gpu_embed.bench", "run", "--device", "cpu", "--set", "A"]
    command += ["--providers", "torch", "--vocab", "100", "--dim", "8", "--ids", "50"]
    with subprocess.Popen(
        [*command, "--seconds", "30", "--out", str(tmp_path)], stderr=subprocess.PIPE, text=True
    ) as process:
        header = tmp_path / "header.json"
        end = time.monotonic() + 50
        while not header.exists() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=50)
    # Python ends itself by the signal, which shells show as 130 too, if that came in the midst of an import.
    assert process.returncode in (130, -signal.SIGINT), said
    assert "interrupted; 0 of 6 measurements" in said
    assert read_rows(tmp_path) == []


def test_a_wrong_rival_is_reported_and_a_wrong_layer_of_ours_fails(tmp_path, capsys, monkeypatch):
    def build(weight, padding_idx, mode):
        return providers.Layer(lambda ids: weight[ids] + 1, weight)

    monkeypatch.setitem(PROVIDERS, "torch", Provider("torch", "", build, cpu=True))
    one = ("--set", "A", "--mode", "forward", "--limit", "1")
    assert run_cli(*one, "--providers", "torch", "--out", tmp_path / "rival") == 0
    assert "torch wrong (the row at position 0 is not weight[ids])" in capsys.readouterr().out
    (row,) = read_rows(tmp_path / "rival")
    assert (row.status, row.ms_p50) == ("wrong", None)
    monkeypatch.setitem(PROVIDERS, "gpu_embed", Provider("gpu_embed", "", build, cpu=True))
    assert run_cli(*one, "--providers", "gpu_embed", "--out", tmp_path / "own") == 1


def test_memory_and_files_of_ids(tmp_path):
    ids = tmp_path / "ids.txt"
    ids.write_text(" ".join(str(i % 7) for i in range(33)))
    command = ["run", "--set", "E", "--device", "cpu", "--dim", "8", "--vocab", "1k", "2**11"]
    command += ["--distribution", str(ids), "--mode", "forward", "--providers", "torch"]
    command += ["--seconds", "0.002", "--max-memory", "60K", "--out", str(tmp_path / "out")]
    assert cli.main([*command, "--dtype", "float32"]) == 0
    rows = read_rows(tmp_path / "out")
    assert {row.num_ids for row in rows} == {33}
    assert {(row.vocab, row.status) for row in rows} == {(1000, "ok"), (2048, "oom")}
    assert {row.unique_ids for row in rows if row.status == "ok"} <= {7, 8}


def test_a_table_that_does_not_fit_is_refused_before_it_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(cli.machine, "free_memory", lambda device: 22 * 2**30)

    def made(*arguments):
        raise AssertionError("a table was made")

    monkeypatch.setattr(cli.Bench, "problem", made)
    command = ["run", "--device", "cpu", "--set", "J", "--vocab", "5e7", "--ids", "65536"]
    command += ["--mode", "step_adam", "--distribution", "spread:8192"]
    command += ["--providers", "torch", "torch-sparse", "gpu_embed"]
    assert cli.main([*command, "--max-memory", "20G", "--out", str(tmp_path / "20")]) == 0
    said = {row.provider: (row.status, row.note) for row in read_rows(tmp_path / "20")}
    assert said == {
        "torch": ("oom", "needs 29.8 GiB, 20.0 GiB may be used"),
        "torch-sparse": ("oom", "needs 23.9 GiB, 20.0 GiB may be used"),
        "gpu_embed": ("oom", "needs 29.8 GiB, 20.0 GiB may be used"),
    }
    # No more than there is, whatever is asked for; and half of it where nothing is.
    for asked, used in ((["--max-memory", "99G"], 22), ([], 11)):
        assert cli.main([*command, *asked, "--out", str(tmp_path / str(used))]) == 0
        notes = {row.note for row in read_rows(tmp_path / str(used))}
        assert all(note.endswith(f"{used}.0 GiB may be used") for note in notes)


BAD = {
    "run": "--set names what to measure: A, B, C",
    "run --set Z": "unknown set 'Z': choose from A, B, C",
    "run --set A --mode sideways": "unknown mode 'sideways': choose from forward, backward",
    "run --set A --dtype int8": "unknown dtype 'int8'",
    "run --set A --id-dtype int8": "unknown id dtype 'int8'",
    "run --set A --providers nobody": "unknown provider 'nobody': choose from gpu_embed",
    "run --set A --vocab 1.5": "--vocab 1.5: expected a whole number from 1",
    "run --set A --dim 0": "--dim 0: expected a whole number from 1",
    "run --set A --ids many": "--ids many: expected a whole number",
    "run --set A --distribution zip": "unknown distribution 'zip'",
    "run --set A --distribution no.npy": "there is no file no.npy",
    "run --set A --max-memory lots": "--max-memory lots: expected a size such as 8G",
    "run --set A --max-memory 0G": "--max-memory 0G: expected a size such as 8G",
    "run --set C --tables 0": "--tables 0: expected a whole number from 1",
    "run --set A --seconds nan": "--seconds nan: choose a number above 0",
    "run --set A --out FILE": "FILE: cannot write there (File exists); choose another --out",
    "plot FILE": "FILE is no directory of results",
    "report NOWHERE": "NOWHERE is no directory of results",
    "compare NOWHERE NOWHERE": "NOWHERE: No such file or directory",
    "run --set A --distribution DAMAGED.npy": "cannot be read as ids (the file is damaged)",
    "run --set A --distribution DAMAGED.pt": "cannot be read as ids (the file is damaged)",
    "run --set A --limit 0": "--limit 0: at least 1 cell",
    "run --set A --turns 0": "--turns 0: at least 1 is needed",
    "run --set A --seconds 0": "--seconds 0: choose a number above 0",
    "run --set A --seed x": "invalid int value: 'x'",
    "run --set A --seed -1 --out OUT": "--seed -1: choose a number from 0",
    "run --set A --threads 0 --out OUT": "--threads 0: at least 1",
    "run --set A --device tpu": "--device tpu: choose cpu, cuda",
    "run --set A --device cuda:99": "--device cuda:99:",
    "run --set A --mode forward --providers torch-sparse": "nothing to measure",
    "--card abacus": "unknown card 'abacus': choose from a10",
    "--threads 0": "--threads 0: at least 1",
    "dance": "invalid choice: 'dance'",
    "run --set A --bogus": "unrecognized arguments: --bogus",
    "compare": "required: NEW",
}


@pytest.mark.parametrize("command", BAD)
def test_bad_arguments_give_one_sentence(command, capsys, tmp_path):
    expected = BAD[command]
    for name in ("FILE", "DAMAGED.npy", "DAMAGED.pt"):
        (tmp_path / name).write_bytes(b"damaged")
    for name in ("OUT", "FILE", "NOWHERE", "DAMAGED"):
        command = re.sub(f" {name}", f" {tmp_path / name}", command)
    arguments = command.split()
    assert cli.main(arguments) == 2
    said = capsys.readouterr().err
    assert expected in said
    assert said.count("\n") == 1
    assert said.startswith("python -m gpu_embed.bench: ")


def test_list_names_sets_providers_and_what_is_missing(capsys):
    assert cli.main(["list"]) == 0
    said = capsys.readouterr().out
    for name in (*PROVIDERS, *(f"│ {name} " for name in shapes.SETS)):
        assert name in said
    assert "wordfreq" in said
    if not torch.cuda.is_available():
        assert "needs a CUDA device" in said


def test_the_summary_of_a_cpu(capsys, monkeypatch):
    monkeypatch.setattr(summary, "CPU_CELLS", (shapes.Cell(50, 8, 40),))
    monkeypatch.setattr(summary, "HEADLINE", (("F", shapes.Cell(2, 768, 64, "bfloat16")),))
    monkeypatch.setattr(summary, "CPU_SECONDS", 0.01)
    quick = partial(host_time.measure_host_time, 0.005)
    monkeypatch.setattr(host_time, "measure_host_time", quick)
    assert cli.main(["--device", "cpu", "--card", "a100"]) == 0
    said = capsys.readouterr().out
    assert said.splitlines()[2:4] == describe_backend(torch.device("cpu")).splitlines()
    assert "50 x 8 float32, 40 ids" in said
    assert "gpu_embed, torch backend" in said
    assert "A100 80GB SXM, predicted, not measured" in said
    assert "the launch counts" in said


def test_the_summary_of_a_gpu_shows_right_and_wrong():
    blank = Row(
        "A", "embedding", "forward", "float32", "int64", 1, 9, 4, 3, 1, "uniform", 3, 0, "x", "ok"
    )
    table = summary.rows_table("title", [blank])
    assert table.row_count == 1
    assert [summary.number(value) for value in (None, 1234.5, 0.01234)] == ["", "1,234", "0.0123"]


def test_the_summary_of_a_gpu_has_a_table_for_each_shape(capsys, monkeypatch):
    cells = shapes.Cell(9, 4, 3), shapes.Cell(9, 4, 3, "bfloat16")
    providers = {name: PROVIDERS[name] for name in ("gpu_embed", "torch")}
    monkeypatch.setattr(summary, "HEADLINE", tuple(("F", cell) for cell in cells))
    monkeypatch.setattr(summary, "PROVIDERS", providers)
    monkeypatch.setattr(summary, "Effort", lambda **_: timing.Effort(0.001, 3, 3, False, 0))
    facts = dict.fromkeys(("device", "torch", "triton", "commit"), "")
    bench, console = Bench(torch.device("cpu"), 10.0, facts, 2**30), make_console()
    with progress_bar(console) as progress:
        rows = summary.summarize_gpu(bench, console, progress)
    assert [(row.dtype, row.mode, row.provider) for row in rows] == list(
        itertools.product(("float32", "bfloat16"), ("forward", "backward"), providers)
    )
    said = capsys.readouterr().out
    assert [said.count(str(cell)) for cell in cells] == [1, 1]


def test_compare_plot_and_report_are_handed_over(tmp_path, monkeypatch, capsys):
    from gpu_embed.bench import compare, plots, report

    asked = []
    monkeypatch.setattr(compare, "main_compare", lambda *given: asked.append(given) or 1)
    monkeypatch.setattr(plots, "plot_directory", lambda given: [given / "a.png"])
    monkeypatch.setattr(report, "write_report", lambda given: given / "report.html")
    assert cli.main(["compare", "old.csv", "new.csv", "--fail-below", "0.9"]) == 1
    assert [str(part) for part in asked[0]] == ["old.csv", "new.csv", "0.9"]
    assert cli.main(["plot", str(tmp_path)]) == 0
    assert cli.main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out.split() == [
        str(tmp_path / "a.png"),
        str(tmp_path / "report.html"),
    ]


def test_a_full_disk_ends_the_run_and_keeps_its_rows(tmp_path, capsys, monkeypatch):
    write = results.RowWriter.write

    def full_after_two(writer, row):
        if len(writer.done) == 2:
            raise results.NotWrittenError("x.csv: No space left on device")
        write(writer, row)

    monkeypatch.setattr(results.RowWriter, "write", full_after_two)
    command = ("--set", "A", "--mode", "forward", "--providers", "torch", "gpu_embed")
    assert run_cli(*command, "--out", tmp_path) == 2
    said = capsys.readouterr().err
    assert "x.csv: No space left on device; 2 of 4 measurements are in" in said
    assert "--resume measures the rest" in said
    assert len(read_rows(tmp_path)) == 2


def test_a_header_without_a_bandwidth_is_no_run_to_go_on_with(tmp_path, capsys):
    one = ("--set", "A", "--mode", "forward", "--limit", 1, "--providers", "torch")
    assert run_cli(*one, "--out", tmp_path) == 0
    header = read_header(tmp_path)
    for wrong in (None, "fast", 0, float("nan")):
        (tmp_path / "header.json").write_text(json.dumps({**header, "copy_gbps": wrong}))
        assert run_cli(*one, "--out", tmp_path, "--resume") == 2
        assert "names no copy bandwidth" in capsys.readouterr().err


def test_ids_that_cannot_reach_a_table_are_no_failure_of_ours(tmp_path):
    command = ("--set", "A", "--mode", "forward", "--limit", 1, "--providers", "gpu_embed")
    code = run_cli(*command, "--vocab", "40k", "100", "--id-dtype", "int16", "--out", tmp_path)
    assert code == 0
    (row,) = read_rows(tmp_path)
    assert (row.status, row.note) == ("missing", "int16 ids cannot reach 40,000 rows")


@pytest.mark.parametrize("command", ["list", "compare"])
def test_a_narrow_terminal_without_unicode_shows_everything(tmp_path, command, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(stream, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdout", stream)
    for name, value in (("COLUMNS", "30"), ("LINES", "20"), ("TERM", "xterm"), ("NO_COLOR", "1")):
        monkeypatch.setenv(name, value)
    one = Row("A", "embedding", "forward", "float32", "int64", 1, 9, 4, 3, 1, "Gedränge.npy", 3, 0,
              "gpu_embed", "ok", ms_p50=1.0)  # fmt: skip
    with results.RowWriter(tmp_path) as writer:
        writer.write(one)
    arguments = {"list": [], "compare": [str(tmp_path)] * 2}[command]
    assert cli.main([command, *arguments]) == 0
    stream.flush()
    said = stream.buffer.getvalue().decode("ascii")
    expected = {
        "list": ["gpu_embed-in-backward", "TransformerEngine#2918"],
        "compare": ["1.000", "A forward float32 V=9 D=4 N=3 Gedr?nge.npy"],
    }
    for text in expected[command]:
        assert text in said
    # Colours alone are left out.
    assert not re.search(r"\x1b\[(\d+;)*3\dm", said)


def test_broken_results_end_in_a_sentence(tmp_path, capsys):
    (tmp_path / results.RESULTS).write_text("a,b\n")
    assert run_cli("--set", "A", "--providers", "torch", "--out", tmp_path) == 2
    assert "does not name the benchmark's columns" in capsys.readouterr().err


def test_a_missing_extra_says_how_to_get_it(capsys, monkeypatch):
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    assert cli.main([]) == 2
    assert 'this needs rich: install the extra "bench"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "value"),
    [("65536", 65536), ("65_536", 65536), ("2**16", 65536), ("1e6", 10**6), ("10M", 10**7),
     ("1.5k", 1500)],
)  # fmt: skip
def test_whole_numbers(text, value):
    assert cli.whole_number("--vocab", text) == value


def test_the_options_of_the_machine_may_stand_before_the_command():
    before = cli.parse_args(["--seed", "3", "run", "--set", "A"])
    after = cli.parse_args(["run", "--set", "A", "--seed", "3"])
    assert before.seed == after.seed == 3
    assert cli.parse_args(["run"]).threads == 1


@pytest.fixture
def _small_headline(monkeypatch):
    monkeypatch.setattr(headline, "CPU_CELLS", (shapes.Cell(60, 8, 40), shapes.Cell(30, 4, 20)))
    monkeypatch.setattr(
        headline, "PROVIDERS", {name: PROVIDERS[name] for name in ("gpu_embed", "torch")}
    )


@pytest.mark.usefixtures("_small_headline")
def test_headline_keeps_rows_pictures_and_page(tmp_path, capsys):
    page = tmp_path / "RESULTS.md"
    arguments = ["headline", "--device", "cpu", "--out", str(tmp_path), "--page", str(page)]
    assert cli.main(arguments) == 0
    (directory,) = tmp_path.glob("*-20*")
    rows = read_rows(directory)
    assert len(rows) == 2 * 2 * 2
    assert {row.status for row in rows} == {"ok"}
    assert (directory / "report.html").is_file()
    assert list(directory.glob("*.png"))
    header = read_header(directory)
    assert header["commit"] in page.read_text()
    assert "headline --device cpu" in page.read_text()
    assert str(page) in capsys.readouterr().out
    # The same commit on the same day gets a place of its own.
    assert cli.main(arguments) == 0
    assert len(list(tmp_path.glob("*-20*"))) == 2


@pytest.mark.usefixtures("_small_headline")
def test_headline_ends_in_time(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "LAST_START_SECONDS", -1.0)
    assert cli.main(["headline", "--device", "cpu", "--out", str(tmp_path)]) == 0
    assert "8 of 8 measurements left out" in capsys.readouterr().out


def test_headline_directory_names_device_date_and_commit(tmp_path):
    header = {
        "device": "NVIDIA H200",
        "date": "2026-01-31T10:00:00+00:00",
        "commit": "0123456789ab",
    }
    first = headline.results_directory(tmp_path, header)
    assert first == tmp_path / "nvidia-h200-2026-01-31-0123456789ab"
    first.mkdir()
    assert headline.results_directory(tmp_path, header).name.endswith("-0123456789ab-2")


def test_headline_covers_every_headline_shape_on_a_gpu(monkeypatch):
    # Importing every rival takes seconds.
    monkeypatch.setattr(providers, "_import_problem", lambda module, package: None)
    jobs = headline.headline_jobs(torch.device("cuda"))
    assert {(job.set, job.cell) for job in jobs} == set(shapes.HEADLINE)


ONE_CELL = ("--set", "A", "--mode", "forward", "--limit", "1", "--providers", "torch")


def write_commands(folder):
    """Each command that writes, by its name, with where it is to write."""
    return {
        "run": ["run", "--device", "cpu", *SMALL, *ONE_CELL, "--out", str(folder)],
        "headline": ["headline", "--device", "cpu", "--out", str(folder)],
        "page": ["headline", "--device", "cpu", "--page", str(folder / "page.md")],
        "codegen": ["codegen", "--out", str(folder / "table.csv")],
        "plot": ["plot", str(folder)],
        "report": ["report", str(folder)],
    }


@pytest.mark.parametrize("name", ["run", "headline", "page", "codegen", "plot", "report"])
@pytest.mark.parametrize(
    "error",
    [PermissionError(13, "Permission denied"), OSError(30, "Read-only file system")],
    ids=["no permission", "read-only"],
)
def test_where_nothing_can_be_written_nothing_is_measured(
    name, error, tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "results"
    assert run_cli(*ONE_CELL, "--out", folder) == 0
    before = {path: path.read_bytes() for path in folder.iterdir()}
    touch = Path.touch

    def refused(path, *arguments, **options):
        if path.parent == folder:
            raise error
        touch(path, *arguments, **options)

    def measured(*arguments):
        pytest.fail("measured before the folder was tried")

    if name == "codegen":
        pytest.importorskip("triton")
    # It makes codegen end earlier.
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Path, "touch", refused)
    monkeypatch.setattr(cli, "copy_gbps", measured)
    capsys.readouterr()
    assert cli.main(write_commands(folder)[name]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert f"{folder}: cannot write there ({error.strerror}); " in line
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_providers_that_are_all_missing_are_no_run(tmp_path, monkeypatch, capsys):
    where = {"module": "no_such_module", "package": "a-rival"}
    absent = Provider("absent", "", PROVIDERS["torch"].build, cpu=True, **where)
    monkeypatch.setitem(PROVIDERS, "absent", absent)
    on_cuda = next(name for name, one in PROVIDERS.items() if not one.cpu)
    command = ("--set", "A", "--mode", "forward", "--limit", 1, "--out", tmp_path / "out")
    assert run_cli(*command, "--providers", "absent", on_cuda) == 2
    said = capsys.readouterr().err
    assert "no chosen provider can run on cpu" in said
    assert "absent: not installed (pip install a-rival)" in said
    assert f"{on_cuda}: needs a CUDA device" in said
    assert not (tmp_path / "out").exists()
    # Beside one that can run, its row says why it has no time.
    assert run_cli(*command, "--providers", "absent", "torch") == 0
    assert [row.status for row in read_rows(tmp_path / "out")] == ["missing", "ok"]


@pytest.fixture
def measured(tmp_path, capsys):
    """Results of two rows."""
    command = ("--set", "A", "--mode", "forward", "--providers", "torch", "--out", tmp_path)
    assert run_cli(*command) == 0
    capsys.readouterr()
    return tmp_path


by_command = pytest.mark.parametrize("command", ["plot", "report"])


@by_command
def test_a_cut_last_row_is_left_out_with_a_warning(command, measured, capsys):
    path = measured / results.RESULTS
    assert cli.main([command, str(measured)]) == 0
    assert capsys.readouterr().err == ""
    path.write_bytes(path.read_bytes()[:-90])
    assert cli.main([command, str(measured)]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"WARNING: {path}: the last line is cut, so its row is left out; the run's command with --resume "
        "measures it again"
    )
    assert len(read_rows(measured)) == 1


@by_command
@pytest.mark.parametrize(
    ("cut", "expected"),
    [
        (lambda lines: [lines[0][:40]], "it is cut, or of another version; measure again"),
        (lambda lines: [b""], "does not name the benchmark's columns; measure again"),
        (lambda lines: lines[:1], "holds no row, as the run ended before its first: measure again"),
        (
            lambda lines: [lines[0], lines[1][:40] + b"\n", lines[2]],
            "line 2: 8 fields where 34 are expected; delete the line",
        ),
    ],
    ids=["in the columns", "empty", "behind the columns", "in a row"],
)
def test_cut_results_end_in_a_sentence(command, cut, expected, measured, capsys):
    path = measured / results.RESULTS
    path.write_bytes(b"".join(cut(path.read_bytes().splitlines(keepends=True))))
    before = set(measured.iterdir())
    assert cli.main([command, str(measured)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert expected in line
    assert set(measured.iterdir()) == before


@pytest.mark.parametrize("how", ["plot", "report"])
@pytest.mark.parametrize("cut", [True, False], ids=["cut", "missing"])
def test_without_its_header_a_run_is_drawn_with_a_warning(how, cut, measured, capsys):
    header = measured / results.HEADER
    if cut:
        header.write_bytes(header.read_bytes()[:50])
    else:
        header.unlink()
    assert cli.main([how, str(measured)]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"WARNING: {header}: ")
    assert "--resume writes it anew" in line
    header.unlink(missing_ok=True)
    rows = len(read_rows(measured))
    command = ("--set", "A", "--mode", "forward", "--providers", "torch", "--out", measured)
    assert run_cli(*command, "--resume") == 0
    assert len(read_rows(measured)) == rows
    assert read_header(measured)["copy_gbps"] == 10


@pytest.mark.usefixtures("_small_headline")
def test_an_interrupted_headline_says_what_it_kept(tmp_path, monkeypatch, capsys):
    execute = cli.execute

    def interrupted(bench, jobs, writer, *rest):
        execute(bench, jobs[:3], writer, *rest)
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "execute", interrupted)
    assert cli.main(["headline", "--device", "cpu", "--out", str(tmp_path)]) == 130
    (directory,) = tmp_path.iterdir()
    assert (
        f"interrupted; 3 of 8 measurements are in {directory / 'results.csv'}"
        in capsys.readouterr().err
    )
    assert {path.name for path in directory.iterdir()} == {"results.csv", "header.json"}
    assert len(read_rows(directory)) == 3
    assert cli.main(["report", str(directory)]) == 0
