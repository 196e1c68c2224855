"""Four scripts as users write them: short, right, resumed as if they had not stopped, and served by others alone."""

import ast
import importlib.util
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

import gpu_embed

pytest.importorskip("rich", reason="the demo's extra is not installed")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SCRIPTS = ("trainer_row_wise", "hashed_features", "keras_pretrained", "serving")


def need(*packages: str) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")


def start(folder: Path, script: str, *options: str) -> subprocess.Popen[str]:
    """A script as a user starts it, with its output in pipes."""
    return subprocess.Popen(
        [sys.executable, EXAMPLES / f"{script}.py", "--quick", *options],
        cwd=folder,
        env={"OMP_NUM_THREADS": "1", **os.environ, "PYTHONIOENCODING": "utf-8"}
        | {"HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )


def run(folder: Path, script: str, *options: str) -> str:
    with start(folder, script, *options) as process:
        output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, output + errors
    assert errors == ""
    return output


def interrupt(folder: Path, script: str, checkpoint: str) -> None:
    """Press Ctrl-C as soon as there is a checkpoint."""
    with start(folder, script) as process:
        until = time.monotonic() + 200
        while process.poll() is None and time.monotonic() < until:
            if (folder / checkpoint).exists():
                process.send_signal(signal.SIGINT)
                break
            time.sleep(0.01)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert errors.strip() == (
        "interrupted, --resume goes on from the last checkpoint, if there is one"
    )


def is_same(one: object, other: object) -> bool:
    """Of what torch.save takes, bit for bit; its files hold the order of creation too."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(is_same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(is_same, one, other))
    return one == other


def two_folders(folder: Path) -> tuple[Path, Path]:
    """For a run that is not interrupted, and one that is."""
    whole, parts = folder / "whole", folder / "parts"
    whole.mkdir()
    parts.mkdir()
    return whole, parts


posix = pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_has_20_to_40_lines_of_code(script: str) -> None:
    """Beside its imports, docstrings and comments."""
    text = (EXAMPLES / f"{script}.py").read_text(encoding="utf-8")
    left_out = {
        line
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Import | ast.ImportFrom)
        or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
        for line in range(node.lineno, node.end_lineno + 1)
    }
    code = [
        line
        for number, line in enumerate(text.splitlines(), 1)
        if number not in left_out and re.match(r"\s*[^#\s]", line)
    ]
    assert 20 <= len(code) <= 40


@pytest.mark.full
@posix
def test_the_trainer_resumes_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    """Weights, AdamW's state, the tables' state, and what it answers in the end, bit for bit."""
    need("transformers", "accelerate")
    whole, parts = two_folders(tmp_path)
    output = run(whole, "trainer_row_wise")
    assert "replaced 1 of 3 embeddings" in output
    (right,) = re.findall(r"^right about (\S+)% of the reviews it never saw$", output, re.M)
    assert float(right) > 90

    interrupt(parts, "trainer_row_wise", "runs/quick/checkpoint-50/tables.pt")
    assert not (parts / "runs/quick/checkpoint-200").exists()
    assert f"right about {right}%" in run(parts, "trainer_row_wise", "--resume")
    expected, resumed = (folder / "runs/quick/checkpoint-200" for folder in (whole, parts))
    name = "model.safetensors"
    assert (resumed / name).read_bytes() == (expected / name).read_bytes()
    for name in ("optimizer.pt", "scheduler.pt", "tables.pt"):
        assert is_same(torch.load(resumed / name), torch.load(expected / name)), name
    assert torch.load(expected / "tables.pt")["state"][0]["sum"].count_nonzero() > 0


@pytest.mark.full
def test_a_tied_table_is_refused_until_it_is_untied() -> None:
    """As docs/swap.md says; the words of the error name the cause."""
    transformers = pytest.importorskip("transformers")
    size = {"hidden_size": 48, "num_hidden_layers": 1}
    for is_tied in (True, False):
        config = transformers.BertConfig(vocab_size=100, tie_word_embeddings=is_tied, **size)
        model = transformers.BertForMaskedLM(config)
        gpu_embed.replace_embeddings(model)
        table = model.get_input_embeddings()
        table.sparse = True
        gpu_embed.optim.apply_in_backward(model, gpu_embed.optim.RowWiseAdagrad, lr=0.05)
        before = table.weight.detach().clone()
        ids = torch.tensor([[4, 7, 99]])
        loss = model(input_ids=ids, labels=ids).loss
        if is_tied:
            with pytest.raises(RuntimeError, match="does not support dense gradients"):
                loss.backward()
        else:
            loss.backward()
            changed = (table.weight != before).any(dim=1).nonzero().flatten()
            assert changed.tolist() == [4, 7, 99]


@pytest.mark.full
@posix
def test_hashed_features_resume_as_if_they_had_not_stopped(tmp_path: Path) -> None:
    """Tables, their optimizer's state, head and Adam's state, bit for bit."""
    whole, parts = two_folders(tmp_path)
    output = run(whole, "hashed_features")
    found = re.findall(r"^step (\d+): right about (\S+)% of the users$", output, re.M)
    assert [step for step, _ in found] == ["50", "100"]
    # A guess is right about half of them.
    assert 55 < float(found[0][1]) < float(found[1][1]) - 5

    interrupt(parts, "hashed_features", "hashed_features.pt")
    file = "hashed_features.pt"
    expected = torch.load(whole / file)
    assert not is_same(torch.load(parts / file), expected)
    resumed = run(parts, "hashed_features", "--resume")
    assert re.findall(r"^step .*$", resumed, re.M) == re.findall(r"^step 100.*$", output, re.M)
    assert [path.name for path in parts.iterdir()] == [file]
    assert is_same(torch.load(parts / file), expected)


@pytest.mark.parametrize(
    ("script", "missing"),
    [
        ("hashed_features", "no checkpoint hashed_features.pt"),
        pytest.param("trainer_row_wise", "no checkpoint in runs/quick", marks=pytest.mark.full),
    ],
)
def test_there_is_nothing_to_resume(
    script: str, missing: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    assert f"error: --resume: there is {missing}" in refusal(script, monkeypatch, capsys)
    assert list(tmp_path.iterdir()) == []


def refusal(script: str, monkeypatch, capsys, *options: str) -> str:
    """What a script says that does not start, by default with --resume."""
    need(*(["accelerate", "transformers"] if script == "trainer_row_wise" else []))
    monkeypatch.setattr(sys, "argv", [script, "--quick", *(options or ["--resume"])])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(EXAMPLES / f"{script}.py"), run_name="__main__")
    assert end.value.code == 2
    return capsys.readouterr().err


@pytest.mark.full
@pytest.mark.parametrize("kind", ["cut", "text", "tensor", "other"])
@pytest.mark.parametrize(
    ("script", "name"),
    [
        ("hashed_features", "hashed_features.pt"),
        ("trainer_row_wise", "runs/quick/checkpoint-50/tables.pt"),
    ],
)
def test_a_checkpoint_that_is_damaged_or_of_others(
    script: str, name: str, kind: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    file = Path(name)
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(torch.ones(9) if kind == "tensor" else {"weights": torch.ones(9)}, file)
    if kind == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif kind == "text":
        file.write_text("hi\n")
    assert refusal(script, monkeypatch, capsys) == (
        f"error: --resume: {file} is damaged, or no checkpoint of this program; "
        "start anew without --resume\n"
    )


@pytest.mark.full
def test_a_training_that_has_ended_is_not_resumed(tmp_path: Path, monkeypatch, capsys) -> None:
    """transformers' Trainer would make one step more."""
    monkeypatch.chdir(tmp_path)
    run(tmp_path, "hashed_features")
    said = refusal("hashed_features", monkeypatch, capsys)
    assert "hashed_features.pt has all 100 steps, leave out --resume" in said
    last = tmp_path / "runs/quick/checkpoint-200"
    last.mkdir(parents=True)
    (last / "tables.pt").touch()
    assert "or its training has ended" in refusal("trainer_row_wise", monkeypatch, capsys)


@pytest.mark.full
def test_a_folder_that_cannot_be_made(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs").touch()
    said = refusal("trainer_row_wise", monkeypatch, capsys, "--quick")
    assert re.fullmatch(r"error: runs\S*: (File exists|Not a directory)\n", said), said


@pytest.mark.full
@posix
def test_a_reader_that_leaves_ends_it_without_a_traceback(tmp_path: Path) -> None:
    """As head does, after one line."""
    with start(tmp_path, "hashed_features") as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("backend: ")
        process.stdout.close()
        _, errors = process.communicate(timeout=100)
    assert process.returncode == 1
    assert "Traceback" not in errors


@pytest.mark.full
def test_keras_knows_pretrained_words_that_it_never_saw(tmp_path: Path) -> None:
    need("keras", "gensim", "pyarrow", "tokenizers", "matplotlib")
    from matplotlib import image

    output = run(tmp_path, "keras_pretrained")
    assert output.count("20 of 20 words found (100.0 %)") == 2
    found = re.findall(
        r"^([a-z ]+): right about (\S+)% of the texts of unseen words$", output, re.M
    )
    right = {name: float(share) for name, share in found}
    assert list(right) == ["random", "pretrained", "pretrained and frozen"]
    assert right["random"] < 60
    assert right["pretrained"] > right["random"] + 10
    assert right["pretrained and frozen"] > 75
    (picture,) = tmp_path.iterdir()
    assert f"picture: {picture}" in output
    assert image.imread(picture).shape[:2] == (480, 640)


SERVED = """
import sys
sys.modules.update(dict.fromkeys({missing!r}))
{imports}
print(*(f"{{score:+.2f}}" for score in {scores}))
"""
BY_TORCH = {
    "missing": ["gpu_embed"],
    "imports": "import torch",
    "scores": "torch.export.load('served/model.pt2').module()(*torch.tensor([[4, 4], [14, 15]]))",
}
BY_ONNX = {
    "missing": ["gpu_embed", "torch"],
    "imports": "import numpy, onnxruntime",
    "scores": "onnxruntime.InferenceSession('served/model.onnx').run(None, "
    "{'user': numpy.array([4, 4]), 'item': numpy.array([14, 15])})[0]",
}


@pytest.mark.full
def test_what_is_served_answers_as_the_model_in_4_bits(tmp_path: Path) -> None:
    """By torch where gpu_embed is not, and by onnxruntime where torch is not either."""
    need("onnx", "onnxruntime", "onnxscript")
    output = run(tmp_path, "serving", "--out", "served")
    found = dict(
        re.findall(r"^(trained|in 4 bits|model\.pt2|model\.onnx): +(\S+ \S+)$", output, re.M)
    )
    assert len(found) == 4
    for answers in found.values():
        liked, other = map(float, answers.split())
        assert liked > 1 > -1 > other
    assert {path.name for path in (tmp_path / "served").iterdir()} >= {"model.pt2", "model.onnx"}
    for served in (BY_TORCH, BY_ONNX):
        done = subprocess.run(
            [sys.executable, "-c", SERVED.format(**served)],
            cwd=tmp_path, capture_output=True, text=True, check=True, timeout=100,
        )  # fmt: skip
        assert done.stdout.strip() == found["in 4 bits"]
    assert found["in 4 bits"] == found["model.pt2"] == found["model.onnx"]
    assert found["in 4 bits"] != found["trained"]
