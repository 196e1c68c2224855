"""Comparing two results: the exit code that a CI runner sees, and what is printed. All rows are synthetic."""

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("rich", reason="the benchmark's extra is not installed")

from gpu_embed.bench import cli, compare
from gpu_embed.bench.results import Row, RowWriter, write_header

BASE = Row(
    set="A",
    operation="embedding",
    mode="forward",
    dtype="float32",
    id_dtype="int64",
    tables=1,
    vocab=1024,
    dim=768,
    num_ids=16384,
    hotness=1,
    distribution="uniform",
    unique_ids=1024,
    padding=0.0,
    provider="gpu_embed",
    status="ok",
    ms_p50=1.0,
    device="synthetic device, no measurement",
    torch="2.0",
    triton="3.0",
    commit="old",
)


def row(vocab: int = 1024, ms: float | None = 1.0, provider: str = "gpu_embed", **changes) -> Row:
    return replace(BASE, vocab=vocab, ms_p50=ms, provider=provider, **changes)


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Write both results, compare them, and return the exit code and what was printed."""

    def compared(old: list[Row], new: list[Row], fail_below: float = 0.95) -> tuple[int, str]:
        for name, rows in (("old", old), ("new", new)):
            with RowWriter(tmp_path / name) as writer:
                for one in rows:
                    writer.write(one)
        files = [str(tmp_path / "old" / "results.csv"), str(tmp_path / "new")]
        code = cli.main(["compare", *files, "--fail-below", str(fail_below)])
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return compared


def test_one_slower_row_of_three_fails(run):
    old = [row(1024), row(2048), row(4096)]
    new = [row(1024), row(2048, ms=1.25), row(4096, ms=0.5)]
    code, text = run(old, new)
    assert code == 1
    assert "REGRESSION: of 3 rows of gpu_embed, 1 below 0.95, 0 no longer ok and 0 missing" in text
    # Worst first, with the ratio old / new.
    places = [text.index(f"{ratio} ") for ratio in ("0.800", "1.000", "2.000")]
    assert places == sorted(places)
    (slow,) = (line for line in text.splitlines() if "0.800" in line and "V=2,048" in line)
    assert "SLOWER" in slow
    assert "gpu_embed" in slow


def test_the_same_results_pass(run):
    rows = [row(1024), row(2048, provider="torch")]
    code, text = run(rows, rows)
    assert code == 0
    assert "OK: none of 1 rows of gpu_embed is below 0.95" in text


@pytest.mark.parametrize(("ms", "code"), [(1.04, 0), (1.06, 1)])
def test_the_threshold_is_the_callers(run, ms, code):
    assert run([row()], [row(ms=ms)])[0] == code


def test_a_looser_threshold_lets_a_slower_row_pass(run):
    assert run([row()], [row(ms=1.9)], fail_below=0.5)[0] == 0


def test_a_forced_method_of_ours_decides_too(run):
    old = [row(), row(provider="gpu_embed-sorted")]
    new = [row(), row(provider="gpu_embed-sorted", ms=2.0)]
    assert run(old, new)[0] == 1


def test_a_slower_rival_is_shown_and_does_not_fail(run):
    old = [row(), row(provider="torch"), row(provider="liger-kernel")]
    new = [
        row(),
        row(provider="torch", ms=4.0),
        row(provider="liger-kernel", ms=None, status="wrong"),
    ]
    code, text = run(old, new)
    assert code == 0
    assert "0.250" in text
    (broken,) = (line for line in text.splitlines() if "BROKEN" in line)
    assert "liger-kernel" in broken
    assert "wrong" in broken
    assert "only gpu_embed's rows decide" in text


@pytest.mark.parametrize("status", ["wrong", "error", "missing", "oom"])
def test_a_row_that_stopped_working_is_a_regression(run, status):
    code, text = run([row(), row(2048)], [row(), row(2048, ms=None, status=status)])
    assert code == 1
    (broken,) = (line for line in text.splitlines() if "BROKEN" in line)
    assert status in broken
    assert "0 below 0.95, 1 no longer ok and 0 missing" in text


def test_a_time_beside_a_wrong_result_does_not_count(run):
    assert run([row()], [row(ms=0.1, status="wrong")])[0] == 1


def test_a_row_that_lost_its_time_is_a_regression(run):
    code, text = run([row()], [row(ms=None)])
    assert code == 1
    assert "not timed" in text


def test_a_row_that_began_to_work_is_no_regression(run):
    old = [row(), row(2048, ms=None, status="wrong"), row(4096, ms=None, status="oom")]
    new = [row(), row(2048), row(4096, ms=None, status="oom")]
    code, text = run(old, new)
    assert code == 0
    (mended,) = (line for line in text.splitlines() if "mended" in line)
    assert "wrong" in mended
    (still,) = (line for line in text.splitlines() if "V=4,096" in line)
    assert still.split()[:2] == ["oom", "oom"]


def test_the_geometric_mean_is_per_provider(run):
    old = [row(1024, 2.0), row(2048, 8.0), row(1024, 3.0, "torch")]
    new = [row(1024, 1.0), row(2048, 1.0), row(1024, 1.0, "torch")]
    _, text = run(old, new)
    summary = text[text.index("By provider") :].splitlines()
    (ours,) = (line for line in summary if "gpu_embed" in line and "yes" in line)
    (theirs,) = (line for line in summary if "torch" in line and " no " in line)
    assert "4.000" in ours
    assert "3.000" in theirs


def test_rows_in_one_file_alone_are_listed_and_counted(run):
    old = [row(), row(4096), row(8192, provider="torch")]
    new = [row(), row(2048)]
    code, text = run(old, new)
    # A run that ended early, or that left a set out, must not pass.
    assert code == 1
    assert "0 no longer ok and 1 missing in new" in text
    assert "2 rows only in old, 1 of them gpu_embed's" in text
    assert "1 rows only in new, 1 of them gpu_embed's" in text
    for vocab in ("V=4,096", "V=8,192", "V=2,048"):
        assert vocab in text


@pytest.mark.parametrize(
    "change",
    [
        {"set": "B"},
        {"operation": "embedding_graph"},
        {"mode": "backward"},
        {"dtype": "bfloat16"},
        {"id_dtype": "int32"},
        {"tables": 2},
        {"vocab": 1025},
        {"dim": 769},
        {"num_ids": 16385},
        {"hotness": 16},
        {"distribution": "zipf:1.05"},
        {"padding": 0.3},
        {"provider": "gpu_embed-atomic"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_everything_that_identifies_a_cell_has_to_match(run, change):
    code, text = run([row()], [replace(row(), **change)])
    assert code == 2
    assert "no row in common" in text


def test_what_the_measurement_says_is_no_part_of_the_cell(run):
    new = row(unique_ids=1000, commit="new", torch="2.1", note="noted", match="exact")
    assert run([row()], [new])[0] == 0


def test_two_machines_are_compared_with_a_warning_and_no_verdict(run):
    code, text = run([row()], [row(ms=2.0, device="another synthetic device")])
    assert code == 2
    assert "two machines" in text
    assert "another synthetic device" in text
    assert "0.500" in text


def test_rows_that_are_only_missing_are_no_slower_ones(run):
    code, text = run([row(), row(2048)], [row()])
    assert code == 1
    assert "INCOMPLETE: of 2 rows" in text
    assert "REGRESSION" not in text


def test_noise_alone_gives_no_verdict_where_others_are_missing_too(run):
    noisy = row(ms_p20=0.5, ms_p80=2.0)
    code, text = run([row(), row(2048)], [noisy])
    assert code == 2
    assert "1 of 1 rows of gpu_embed are noisy" in text
    assert "INCOMPLETE" in text


def test_rivals_that_are_gone_and_rows_that_had_no_time_are_no_regression(run):
    gone = [row(8192, provider="torch"), row(4096, ms=None, status="oom")]
    assert run([row(), *gone], [row()])[0] == 0


def test_rows_that_changed_places_between_two_machines_give_no_verdict(run):
    here, there = "synthetic device 1", "synthetic device 2"
    old = [row(1024, device=here), row(2048, device=there)]
    new = [row(1024, device=there), row(2048, device=here)]
    assert run(old, new)[0] == 2


def test_rivals_alone_give_no_verdict(run):
    code, text = run([row(provider="torch")], [row(provider="torch")])
    assert code == 2
    assert "nothing to judge" in text


def test_a_file_that_is_missing_or_no_results_is_unusable(tmp_path, capsys):
    missing, other = tmp_path / "none.csv", tmp_path / "other.csv"
    other.write_text("a,b\n1,2\n")
    for bad in (missing, other):
        assert cli.main(["compare", str(bad), str(bad)]) == 2
        assert bad.name in capsys.readouterr().err


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_a_threshold_that_is_no_ratio_is_unusable(run, bad):
    code, text = run([row()], [row()], fail_below=bad)
    assert code == 2
    assert "--fail-below" in text


def test_names_with_brackets_are_printed_as_they_are(run):
    odd = row(provider="gpu_embed[red]", distribution="[bold]ids.npy")
    _, text = run([odd], [odd])
    assert "gpu_embed[red]" in text
    assert "[bold]ids.npy" in text


def test_many_rows_are_cut_short_but_never_the_bad_ones(run):
    old = [row(vocab) for vocab in range(1, 201)]
    new = [row(vocab, ms=2.0 if vocab <= 60 else 1.0) for vocab in range(1, 201)]
    code, text = run(old, new)
    assert code == 1
    assert sum(" SLOWER" in line and "V=" in line for line in text.splitlines()) == 60
    assert "100 more rows, none of them slower or broken" in text


@pytest.mark.parametrize(
    ("times", "stands"),
    [
        ({"gpu_embed": 2.0, "gpu_embed-sorted": 1.0}, "gpu_embed"),
        ({"gpu_embed": 2.0, "gpu_embed-sparse": 1.0}, "gpu_embed-sparse"),
        ({"gpu_embed-in-backward": 1.0, "gpu_embed-sparse": 2.0}, "gpu_embed-in-backward"),
        ({"gpu_embed": None, "gpu_embed-sparse": 1.0}, "gpu_embed"),
        ({"gpu_embed-atomic": 2.0, "gpu_embed-sorted": 1.0, "torch": 0.5}, "gpu_embed-sorted"),
    ],
)
def test_which_row_stands_for_us(times, stands):
    """A forced method may be faster than our own choice; it does not stand for it."""
    rows = {name: row(ms=ms, provider=name) for name, ms in times.items()}
    assert compare.our_row(rows).provider == stands


def test_a_bag_is_named_in_its_line():
    cell = compare.cell_of(row(operation="embedding_bag", hotness=16))
    assert "embedding_bag" in compare.describe(cell)
    assert " bags of 16 " in compare.describe(cell)
    assert "bags" not in compare.describe(compare.cell_of(row()))


def test_the_best_rival_is_right_and_not_ours():
    rows = {
        "gpu_embed": row(ms=0.1),
        "torch": row(ms=2.0, provider="torch"),
        "torch.compile": row(ms=1.5, provider="torch.compile"),
        "liger-kernel": row(ms=0.2, provider="liger-kernel", status="wrong"),
    }
    assert compare.best_rival(rows).provider == "torch.compile"
    assert compare.best_rival({"gpu_embed": row()}) is None


DAYS = ("2026-01-05", "2026-02-01", "2026-03-01")


@pytest.fixture
def committed(tmp_path, monkeypatch):
    """Results of two devices, committed in a repository; returns what makes more, and compares them."""
    root = tmp_path / "results"
    monkeypatch.setattr(compare, "ROOT", root)

    def write(name: str, *rows: Row, date: str = "2026-04-01") -> Path:
        with RowWriter(root / name) as writer:
            for one in rows:
                writer.write(one)
        write_header(root / name, {"date": date})
        return root / name

    for day in DAYS:
        write(f"h100-{day}", row(ms=1.0), date=day)
    write("h100-step", row(mode="step"), date="2026-03-20")
    write("h200", row(ms=5.0, device="another synthetic device"), date="2026-03-21")
    git = ["git", "-c", "user.name=test", "-c", "user.email=test", "-C", tmp_path]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "old"]):
        subprocess.run([*git, *arguments], check=True)
    # Measured here and not committed: no reference.
    write("h100-again", row(ms=3.0), date="2026-03-22")
    return write


@pytest.mark.parametrize(("ms", "code"), [(1.0, 0), (2.0, 1)], ids=["same speed", "slower"])
def test_without_old_results_the_newest_committed_of_the_device_are_taken(
    committed, capsys, ms, code
):
    new = committed("new", row(ms=ms))
    assert cli.main(["compare", str(new)]) == code
    old = new.parent / f"h100-{DAYS[-1]}" / "results.csv"
    said = capsys.readouterr().out
    assert f"compared with {old}, the newest committed results of this device" in said


def test_committed_results_are_compared_with_others(committed, capsys):
    """Else those just committed would be their own reference."""
    root = committed("new", row()).parent
    assert cli.main(["compare", str(root / f"h100-{DAYS[-1]}/results.csv")]) == 0
    assert f"compared with {root}/h100-{DAYS[-2]}/results.csv" in capsys.readouterr().out


@pytest.mark.parametrize("changes", [{"device": "a new card"}, {"vocab": 9}], ids=str)
def test_where_nothing_is_committed_it_says_what_to_do(committed, capsys, changes):
    new = committed("new", row(**changes))
    assert cli.main(["compare", str(new)]) == 2
    said = capsys.readouterr().err
    assert f"holds no committed results of {changes.get('device', BASE.device)} with these" in said
    assert "name OLD before NEW, or commit the directory of NEW there" in said
    assert said.count("\n") == 1


def test_outside_of_a_checkout_nothing_is_committed(committed, capsys, monkeypatch, tmp_path):
    new = committed("new", row())
    shutil.rmtree(tmp_path / ".git")
    assert cli.main(["compare", str(new)]) == 2
    assert "holds no committed results" in capsys.readouterr().err
