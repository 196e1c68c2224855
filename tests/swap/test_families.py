"""`make families`: model types of each outcome go through it, and nothing that one does ends the run."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import ROOT

pytest.importorskip("transformers", reason="the integration extra is missing")
families = pytest.importorskip("families")

from families_page import (  # noqa: E402
    ALONE,
    NO_TABLE,
    NOT_BUILT,
    NOT_RUN,
    OVERRIDDEN,
    SWAPPED,
    Line,
    by_type,
    outcome,
    read_data,
)

SCRIPT = [sys.executable, str(ROOT / "tests/support/families.py")]
# Text, encoder and decoder, vision, speech, pictures and text, a part of others.
EXPECTED = {
    "bert": SWAPPED,
    "t5": SWAPPED,
    "clip": SWAPPED,
    "llava": SWAPPED,
    "gemma": OVERRIDDEN,
    "bart": OVERRIDDEN,
    "opt": OVERRIDDEN,
    "whisper": ALONE,
    "swin": NO_TABLE,
    "wav2vec2": NO_TABLE,
    "blip_text_model": NOT_BUILT,
}


@pytest.fixture
def kept():
    """Both files, which must be as they were."""
    files = families.DATA, families.PAGE
    before = [file.read_bytes() for file in files]
    yield
    assert [file.read_bytes() for file in files] == before
    assert not list(families.DATA.parent.glob(".families*"))


def run(*arguments):
    done = subprocess.run(
        [*SCRIPT, *arguments], capture_output=True, text=True, cwd=ROOT, timeout=600
    )
    return done.returncode, done.stdout, done.stderr


def test_types_of_every_outcome(kept):
    """What they do now is what stands on the page."""
    code, output, errors = run("--processes", "2", *EXPECTED)
    assert code == 0, errors
    *rows, last = output.splitlines()
    assert {row.split("  ")[0] for row in rows} == EXPECTED.keys()
    assert last.startswith(f"{len(EXPECTED)} model types: ")
    lines, of = read_data(families.DATA.read_text())
    if of != families.versions():
        pytest.skip(f"the page is of {of}")
    found = {name: outcome(own) for name, own in by_type(lines).items() if name in EXPECTED}
    assert found == EXPECTED
    assert rows == [
        "  ".join(filter(None, one)) for one in sorted(lines) if one.model_type in EXPECTED
    ]


def test_an_unknown_type(kept):
    for name in ("brt", "BERT"):
        code, output, errors = run(name)
        assert code == 2
        assert output == ""
        assert errors.startswith(f"families: transformers has no model type '{name}'; near it: ")
        assert "bert" in errors


def test_no_processes(kept):
    code, output, errors = run("--processes", "0", "bert")
    assert code == 2
    assert output == ""
    assert errors.endswith("error: --processes 0: at least 1 is needed\n")


def test_a_tree_that_cannot_be_written(monkeypatch, capsys):
    """It is said before the types are tried."""
    monkeypatch.setattr(families.os, "access", lambda path, _: path != families.PAGE.parent)
    monkeypatch.setattr(families, "examine_shown", lambda *_: pytest.fail("tried"))
    monkeypatch.setattr(families.os, "environ", dict(os.environ))
    assert families.main([]) == 1
    assert capsys.readouterr().err == f"families: cannot write in {families.PAGE.parent}\n"


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="it reads Linux's /proc")
def test_ctrl_c_leaves_nothing(kept):
    process = subprocess.Popen(
        SCRIPT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while process.poll() is None and not children.read_text():
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert output == ""
    assert errors.splitlines()[-1] == "families: stopped; nothing was written"


def outcomes(monkeypatch, examine, names, seconds=30):
    monkeypatch.setattr(families, "examine", examine)
    return dict(families.examine_all(names, 2, seconds))


def test_a_model_that_fails_dies_or_takes_long_is_a_line(monkeypatch):
    def examine(name):
        if name == "fails":
            raise ValueError("a size\n is wrong")
        if name == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if name == "exits":
            sys.exit(3)
        if name == "large":
            return len(bytearray(2**40))
        if name == "long":
            time.sleep(60)
        return [Line(name, "Model", SWAPPED)]

    names = ("fails", "dies", "long", "exits", "large", "fine", "well")
    found = outcomes(monkeypatch, examine, names, seconds=5)
    notes = {name: [line[2::3] for line in lines] for name, lines in found.items()}
    assert notes == {
        "fails": [(NOT_RUN, "ValueError: a size is wrong")],
        "dies": [(NOT_RUN, "its process ended with -9")],
        "exits": [(NOT_RUN, "its process ended with 3")],
        "large": [(NOT_RUN, "MemoryError: ")],
        "long": [(NOT_RUN, "took more than 5 s")],
        "fine": [(SWAPPED, "")],
        "well": [(SWAPPED, "")],
    }


def test_what_is_written_is_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "page.md"
    families.replace_file(file, "old")
    families.replace_file(file, "new")
    assert file.read_text() == "new"
    monkeypatch.setattr(type(file), "replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        families.replace_file(file, "half")
    assert [one.name for one in tmp_path.iterdir()] == ["page.md"]
    assert file.read_text() == "new"


def test_the_command_of_the_makefile():
    printed = subprocess.run(
        ["make", "-n", "VENV=/nowhere", "families", "FAMILIES=bert gemma"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    ).stdout
    words = re.search(r"tests/support/families\.py(.*)", printed)[1].split()
    options = families.parse_args(words)
    assert options.types == ["bert", "gemma"]
    assert not options.write


@pytest.mark.parametrize(
    ("error", "note"),
    [
        (ImportError("\nXModel requires the timm library but it was not found"), "needs timm"),
        (RuntimeError("a\n  b"), "RuntimeError: a b"),
        (KeyError("full_attention"), "KeyError: 'full_attention'"),
        (
            ValueError(
                "Class validation error for validator 'validate_architecture':\n    ValueError: 7 is odd"
            ),
            "ValueError: 7 is odd",
        ),
        (ValueError("x" * 200), "ValueError: " + "x" * 105 + "..."),
    ],
)
def test_errors_in_short(error, note):
    assert families.in_short(error) == note


def test_the_data_is_json():
    assert set(json.loads(families.DATA.read_text())) == {"versions", "lines"}
