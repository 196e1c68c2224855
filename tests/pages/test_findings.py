"""Each script of findings/ has the form that findings/README.md asks for. None is run: they download."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "findings"
SCRIPTS = sorted(FOLDER.glob("*.sh"))


def test_the_folder_holds_scripts_and_its_readme() -> None:
    assert SCRIPTS
    assert {path.name for path in FOLDER.iterdir()} == {"README.md", *(one.name for one in SCRIPTS)}


def test_the_readme_names_a_script_that_exists() -> None:
    (name,) = re.findall(r"^bash findings/(\S+)$", (FOLDER / "README.md").read_text(), re.M)
    assert FOLDER / name in SCRIPTS


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_script_has_the_form(script: Path) -> None:
    text = script.read_text(encoding="utf-8")
    first, rest = text.split("\n", 1)
    assert first == "#!/usr/bin/env bash"
    comment, code = rest.split("\nset -euo pipefail\n", 1)
    assert all(line.startswith("#") for line in comment.splitlines())
    said = comment.replace("\n#", "")
    assert re.match(r"# [\w.-]+ \d+\.\d+\.\d+", said), (
        "the comment begins with the library and its version"
    )
    order = [said.index(word) for word in ("Expected:", "Seen", "Exits 0 while that is so")]
    assert order == sorted(order)
    assert code.startswith("folder=$(mktemp -d)\ntrap 'rm -rf \"$folder\"' EXIT\n")
    assert "gpu_embed" not in text
    # Whatever pip installs has an exact version.
    for line in re.findall(r"pip install ((?:.*\\\n)*.*)", code):
        for word in line.replace("\\\n", " ").split():
            assert word.startswith("-") or re.fullmatch(r"[\w.-]+==[\w.]+", word), word


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_bash_can_read_the_script(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
