"""The examples run as their docstrings say, and what they show is true."""

import importlib.util
import math
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich", reason="the demo's extra is not installed")
image = pytest.importorskip("matplotlib.image", reason="the demo's extra is not installed")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run_example(folder: Path, example: str, *options: str) -> str:
    """Run an example as a user does, with its output in a pipe."""
    done = subprocess.run(
        [sys.executable, EXAMPLES / example, *options],
        cwd=folder,
        env={"OMP_NUM_THREADS": "1", **os.environ, "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    return done.stdout


def test_phrases(tmp_path):
    pytest.importorskip("tokenizers", reason="the text extra is not installed")
    output = run_example(tmp_path, "phrases.py", "--quick", "--device", "cpu")
    assert "'Hope to see you soon'    -> [0, 1, 2, 3, 4]" in output
    assert "'Nice to see you again'   -> [5, 1, 2, 3, 6]" in output
    first, last = map(float, re.search(r"^loss (\S+) -> (\S+)$", output, re.M).groups())
    assert last < first - 1
    rows = re.findall(r"^(\w+) +(-?\d\.\d\d) +(-?\d\.\d\d)$", output, re.M)
    place = {word: torch.tensor([float(x), float(y)]) for word, x, y in rows}
    assert list(place) == ["hope", "to", "see", "you", "soon", "nice", "again"]
    # Words with the same neighbours are nearer to each other than to any other word.
    for word, twin in (("hope", "nice"), ("soon", "again")):
        others = [place[other] for other in place if other not in (word, twin)]
        nearest = min(torch.dist(place[word], other) for other in others)
        assert torch.dist(place[word], place[twin]) < nearest
    assert image.imread(tmp_path / "phrases.png").shape[:2] == (840, 960)


def test_word_vectors(tmp_path):
    for package in ("gensim", "tokenizers"):
        pytest.importorskip(package, reason="the extras text and vectors are not installed")
    options = ["--quick", "--device", "cpu", "--save", "trained.vec", "--nearest", "two"]
    output = run_example(tmp_path, "word_vectors.py", *options)
    assert "Vectors(20 words, 300 numbers each, float32)" in output
    assert "nearest to two: three 0.90, four 0.87, five 0.78, six 0.76" in output
    assert "20 of 20 words found (100.0 %; 100.0 % of the text)" in output
    right = {
        name: int(number)
        for name, number in re.findall(r"^(\w+) +loss .*, (\d+) of 10 words right", output, re.M)
    }
    assert right["pretrained"] == 10
    assert right["random"] < 7
    assert image.imread(tmp_path / "word_vectors.png").shape[:2] == (840, 960)
    output = run_example(tmp_path, "word_vectors.py", *options, "--vectors", "trained.vec")
    assert "Vectors(22 words, 300 numbers each, float32)" in output


def run_sharded(folder: Path, processes: int, example: str, *options: str) -> str:
    """An example under torchrun; one process is this one's child, without it."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run(
        [sys.executable, *(launch if processes > 1 else ()), EXAMPLES / example]
        + ["--quick", "--device", "cpu", *options],
        cwd=folder,
        env={"OMP_NUM_THREADS": "1", **os.environ, "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


needs_gloo = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="torch is built without gloo",
)


@needs_gloo
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_sharded_trains_and_keeps_its_checkpoint(processes: int, tmp_path: Path):
    """301 rows, which neither 2 nor 3 processes can share evenly; each holds its own and no more."""
    output = run_sharded(tmp_path, processes, "sharded.py")
    assert list(tmp_path.iterdir()) == []
    assert ("one process holds all rows" in output) == (processes == 1)
    assert output.count("backend: torch serves cpu") == 1
    first, last = map(float, re.search(r"^loss (\S+) -> (\S+)$", output, re.M).groups())
    assert first == pytest.approx(math.log(301), rel=0.01)
    guessing = float(re.search(r"^guessing by word frequency alone: (\S+)$", output, re.M)[1])
    assert last < guessing
    lines = re.findall(
        r"^process (\d): rows (\d+) to (\d+) of 301: table (\S+) KiB, gradient (\S+) KiB, Adam's state (\S+) KiB$",
        output,
        re.M,
    )
    assert [int(line[0]) for line in lines] == list(range(processes))
    rows = [row for line in lines for row in range(int(line[1]), int(line[2]) + 1)]
    assert rows == list(range(301))
    for _, begin, end, table, gradient, state in lines:
        held = (int(end) - int(begin) + 1) * 16 * 4 / 1024
        assert [float(table), float(gradient), float(state) / 2] == pytest.approx(
            [held] * 3, abs=0.06
        )
    before, after = re.search(r"read back: loss (\S+) and (\S+)$", output, re.M).groups()
    assert before == after


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
@pytest.mark.parametrize("whom", ["torchrun", "all"])
def test_ctrl_c_ends_all_processes_of_torchrun(whom: str, tmp_path: Path):
    """A terminal interrupts all of them, a scheduler torchrun alone."""
    name = "sharded.py"
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    with subprocess.Popen(
        [sys.executable, *launch, EXAMPLES / name, "--device", "cpu"],
        cwd=tmp_path,
        env={"OMP_NUM_THREADS": "1", **os.environ, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("backend: ")
        time.sleep(1.5)
        if whom == "torchrun":
            process.send_signal(signal.SIGINT)
        else:
            os.killpg(process.pid, signal.SIGINT)
        said, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert errors.count(f"interrupted, {PROGRAMS[name][1]}") == 1
    # torchrun's own words are no concern of the example's.
    assert name not in errors
    assert "loss" not in said
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    assert list(tmp_path.iterdir()) == []


def run_quick(name: str, device: str) -> str:
    """Run an example that needs the integration extra."""
    for package in ("transformers", "peft"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, "--quick", "--device", device],
        env={"OMP_NUM_THREADS": "1", **os.environ, "PYTHONIOENCODING": "utf-8"}
        | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.full
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_swap_transformers_trains_as_before(device: str):
    output = run_quick("swap_transformers.py", device)
    assert "replaced 3 of 3 embeddings" in output
    assert output.count("1 of 1 calls looked up with gpu_embed") == 3
    found = re.findall(r"^(\w+) +loss ([\d.]+) -> ([\d.]+) +([\d.]+) ms a step$", output, re.M)
    assert [name for name, *_ in found] == ["torch", "gpu_embed"]
    assert all(float(ms) > 0 for *_, ms in found)
    assert found[0][1] == found[1][1]
    # The gradients of a table may be summed in another order, or not on the CPU.
    assert float(found[1][2]) == pytest.approx(float(found[0][2]), abs=1e-3 * (device == "cuda"))


@pytest.mark.full
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_lora_learns_the_words(device: str):
    output = run_quick("lora.py", device)
    assert "replaced 3 of 3 embeddings" in output
    (losses,) = re.findall(r"^loss: (.*)$", output, re.M)
    losses = [float(loss) for loss in losses.split()]
    assert losses[-1] < losses[0] / 2
    assert "12 of 12 sentences are nearest to their meaning" in output


@pytest.mark.full
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_small_tables_answer_as_the_large_one(device: str):
    output = run_quick("small_tables.py", device)
    assert "quantized to 8 bits: 2,048,000 bytes -> 528,000" in output
    assert "quantized to 4 bits: 2,048,000 bytes -> 288,000" in output
    found = re.findall(
        r"(float32|int8|int4) +\S+ +([\d.]+)% +\S+ +([\d.]+)% +\S+ +([\d.]+) ", output
    )
    assert [name for name, *_ in found] == ["float32", "int8", "int4"]
    right, same, megabytes = ([float(row[column]) for row in found] for column in (1, 2, 3))
    assert min(right) > right[0] - 2 > 60
    assert same[1] > 99
    assert same[2] > 95
    assert megabytes[1] < 0.28 * megabytes[0]
    assert megabytes[2] < 0.16 * megabytes[0]


# The packages that each needs, and what it leaves when it is interrupted.
PROGRAMS = {
    "hashed_features.py": ((), "--resume goes on from the last checkpoint, if there is one"),
    "keras_phrases.py": (("keras", "tokenizers"), "no picture was written"),
    "keras_pretrained.py": (("keras", "gensim", "pyarrow", "tokenizers"), "no picture was written"),
    "keras_text_classifier.py": (("keras", "tokenizers"), "no picture was written"),
    "lora.py": (("transformers", "peft"), "nothing was written"),
    "phrases.py": (("tokenizers",), "no picture was written"),
    "sharded.py": ((), "nothing was written"),
    "recommender.py": ((), "no picture was written"),
    "serving.py": (
        ("onnx", "onnxruntime", "onnxscript"),
        "nothing was written but what --out names",
    ),
    "small_tables.py": ((), "nothing was written"),
    "swap_transformers.py": (("transformers",), "nothing was written"),
    "trainer_row_wise.py": (
        ("transformers", "accelerate"),
        "--resume goes on from the last checkpoint, if there is one",
    ),
    "word_vectors.py": (("gensim", "tokenizers"), "no picture was written"),
}


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_ctrl_c_in_training_is_one_line(name, tmp_path, monkeypatch, capsys):
    packages, left = PROGRAMS[name]
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")

    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # What `python examples/NAME` has there.
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(torch.Tensor, "backward", interrupted)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    options = ["--data", "synthetic"] if name == "recommender.py" else []
    monkeypatch.setattr(sys, "argv", [name, "--quick", *options])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert end.value.code == 130
    said = capsys.readouterr()
    assert said.err.splitlines()[-1] == f"interrupted, {left}"
    assert "Traceback" not in said.out + said.err
    assert said.out.startswith(
        "backend: torch serves cpu: the kernels are for CUDA devices\n"
        "On a CPU torch's own operators run: only a CUDA device shows gpu_embed's kernels"
    )
    # The Trainer makes its folder before it trains.
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


@pytest.mark.full
@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
def test_ctrl_c_in_a_real_process(tmp_path):
    name = "keras_text_classifier.py"
    for package in PROGRAMS[name][0]:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    with subprocess.Popen(
        [sys.executable, "-u", EXAMPLES / name, "--epochs", "1000"],
        cwd=tmp_path,
        env={"OMP_NUM_THREADS": "1", **os.environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("backend: ")
        time.sleep(3)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert said.strip() == "interrupted, no picture was written"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", sorted(PROGRAMS))
def test_options_are_refused_before_anything_starts(name, tmp_path, monkeypatch, capsys):
    """By what all examples share; the demo's tests have every case."""
    for package in PROGRAMS[name][0]:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    main = runpy.run_path(str(EXAMPLES / name))["main"]
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit):
        main()
    has = capsys.readouterr().out
    refused = {
        "--device": ("cuda:99", "cuda:99: "),
        "--seed": ("-1", "-1: choose a number from 0 to 2**32 - 1"),
        "--out": ("none/a.png", "none/a.png: there is no folder none"),
        "--epochs": ("0", "0 is too few, choose 1 or more"),
        "--steps": ("-3", "-3 is too few, choose 1 or more"),
        "--batch": ("many", "'many' is no whole number"),
        "--vectors": ("none.vec", "none.vec: there is no file of this name that can be read"),
        "--save": ("none/a.vec", "none/a.vec: there is no folder none"),
    }
    if name == "serving.py":
        refused["--out"] = (__file__, f"{__file__}: {__file__} is a file, choose another folder")
    for option, (value, why) in refused.items():
        if f"{option} " not in has:
            continue
        monkeypatch.setattr(sys, "argv", [name, option, value])
        with pytest.raises(SystemExit, match="2"):
            main()
        shown = capsys.readouterr()
        assert f"error: argument {option}: {why}" in shown.err.splitlines()[-1]
        assert shown.out == ""
    assert list(tmp_path.iterdir()) == []


def test_no_example_writes_half_a_picture():
    texts = {path.name: path.read_text(encoding="utf-8") for path in EXAMPLES.glob("*.py")}
    assert {name for name, text in texts.items() if "save_figure(" in text} == {
        name for name, (_, left) in PROGRAMS.items() if "picture" in left
    }
    assert not any("savefig" in text for text in texts.values())
