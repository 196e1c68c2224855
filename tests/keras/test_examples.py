"""The examples in Keras run as their docstrings say, and what they show is true."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

image = pytest.importorskip("matplotlib.image", reason="the demo's extra is not installed")
pytestmark = [
    pytest.mark.skipif(find_spec(name) is None, reason=f"{name} is not installed")
    for name in ("keras", "rich", "tokenizers")
]

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run_quick(name: str, folder: Path) -> str:
    """Run an example as a user does, with its output in a pipe."""
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, "--quick"],
        cwd=folder,
        env={"OMP_NUM_THREADS": "1", **os.environ, "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    return done.stdout


def size_of_picture(output: str, folder: Path) -> tuple[int, int]:
    """Width and height of the only file that the example leaves, where it says that it is."""
    (picture,) = folder.iterdir()
    assert f"picture: {picture}" in output
    height, width, _ = image.imread(picture).shape
    return width, height


@pytest.mark.full
def test_phrases(tmp_path: Path) -> None:
    output = run_quick("keras_phrases.py", tmp_path)
    assert "'Hope to see you soon'    -> [0, 1, 2, 3, 4]" in output
    assert "'Nice to see you again'   -> [5, 1, 2, 3, 6]" in output
    distances = re.findall(r"have the same neighbours: (\d+\.\d+) apart", output)
    assert len(distances) == 2
    # Words that have other neighbours are units apart.
    assert all(float(distance) < 0.2 for distance in distances)
    losses = re.findall(r"^Embedding\(7, 2\): loss (\S+) -> (\S+)$", output, re.M)
    (first, last) = map(float, losses[0])
    # Seven words are all alike at first: ln 7.
    assert first == pytest.approx(1.946, abs=0.05)
    assert last < 0.8
    assert "counted from 1: [[1, 2, 3, 4, 5], [6, 2, 3, 4, 7], [3, 4, 0, 0, 0]]" in output
    assert "the table needs 8 rows, not 7: Embedding(8, ...)" in output
    assert "the third phrase's mask: [True, True, False, False, False]" in output
    assert size_of_picture(output, tmp_path) == (960, 840)


@pytest.mark.full
def test_text_classifier_beats_guessing(tmp_path: Path) -> None:
    output = run_quick("keras_text_classifier.py", tmp_path)
    (accuracies,) = re.findall(r"^accuracy of each epoch: (.*)$", output, re.M)
    (majority,) = re.findall(r"^guessing the largest part: (\S+)$", output, re.M)
    assert len(accuracies.split()) == 8
    assert float(accuracies.split()[-1]) > float(majority) + 0.25
    (sizes,) = re.findall(r"docstrings \((.*)\), of", output)
    parts = dict(part.split() for part in sizes.split(", "))
    assert len(parts) == 4
    assert all(int(size) > 50 for size in parts.values())
    for part in parts:
        assert re.search(rf"^{part} +[a-z]+( [a-z]+){{4}}$", output, re.M)
    assert size_of_picture(output, tmp_path) == (1540, 770)
