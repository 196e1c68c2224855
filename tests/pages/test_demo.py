"""The demo: what it prints, what it draws, and how it refuses."""

import importlib.util
import io
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import gpu_embed
from gpu_embed import text
from gpu_embed.demo import __main__ as demo
from gpu_embed.demo import next_word, options, phrases, running

pytest.importorskip("rich", reason="the demo's extra is not installed")
image = pytest.importorskip("matplotlib.image", reason="the demo's extra is not installed")


def run_command(*options: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the demo as a user does, with its output in a pipe."""
    env = {name: value for name, value in os.environ.items() if name != "FORCE_COLOR"}
    env.setdefault("OMP_NUM_THREADS", "1")
    return subprocess.run(
        [sys.executable, "-m", "gpu_embed.demo", *options],
        cwd=folder,
        env={**env, "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def output(folder: Path) -> str:
    done = run_command("--quick", "--device", "cpu", folder=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("installed", [True, False], ids=["by tokenizers", "by hand"])
def test_phrases_become_ids_by_order_of_appearance(installed, monkeypatch):
    calls = []
    by_tokenizers = text.vocabulary
    monkeypatch.setattr(
        text,
        "vocabulary",
        lambda *args, **kwargs: calls.append(1) or by_tokenizers(*args, **kwargs),
    )
    if installed:
        pytest.importorskip("tokenizers")
    else:
        monkeypatch.setitem(sys.modules, "tokenizers", None)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    words, encoded = phrases.encode_phrases(phrases.PHRASES)
    assert len(calls) == installed
    assert words == ["hope", "to", "see", "you", "soon", "nice", "again"]
    assert encoded == [[0, 1, 2, 3, 4], [5, 1, 2, 3, 6]]


def test_neighbours_go_both_ways():
    assert phrases.neighbour_pairs([[7, 8, 9]]) == [(7, 8), (8, 9), (8, 7), (9, 8)]


def test_lowest_loss_is_the_entropy_of_the_neighbours():
    # 0 is always followed by 1; 1 has two equally frequent neighbours.
    assert phrases.lowest_loss([(0, 1), (1, 0), (1, 2), (2, 1)]) == pytest.approx(math.log(2) / 2)


def test_text_keeps_frequent_words_and_shares_id_0_among_the_rest():
    corpus = next_word.encode_text(["a", "b", "a", "c", "b", "a"], size=3)
    assert corpus.vocabulary == [next_word.UNKNOWN, "a", "b"]
    assert corpus.ids.tolist() == [1, 2, 1, 0, 2, 1]
    assert corpus.counts == [1, 3, 2]
    assert corpus.different == 3


def test_tokens_are_words_and_marks_without_underlines():
    tokens = next_word.read_tokens()
    assert len(tokens) > 50_000
    assert {"function", "__init__", "."} <= set(tokens)
    assert not any(len(token) > 1 and set(token) <= set("-=*~+^") for token in tokens)


def test_frequency_loss_is_the_entropy_of_the_words():
    corpus = next_word.encode_text(["a", "b", "c", "d"], size=5)
    assert next_word.frequency_loss(corpus) == pytest.approx(math.log(4))


def test_nearest_is_by_cosine_among_common_words():
    words = ["cat", "dog", "car", "bus", "x"]
    corpus = next_word.Corpus(torch.tensor([]), words, counts=[50, 50, 50, 50, 50], different=5)
    weight = torch.tensor([[3.0, 1], [9, 4], [-3, -1], [-9, -4], [3, 1]])
    assert next_word.nearest(corpus, weight, probe=0, count=1) == ["dog 1.00"]
    assert next_word.nearest(corpus, weight, probe=3, count=1) == ["car 1.00"]


def test_models_start_equal_and_see_equal_batches():
    size = next_word.Size(steps=3, vocabulary=20, embedding_dim=4, context=2, batch=8)
    ours, theirs = (
        next_word.new_run("any", layer, size, torch.device("cpu"), seed=5).model.state_dict()
        for layer in (gpu_embed.Embedding, torch.nn.Embedding)
    )
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)

    ids = torch.arange(100)
    batches = list(next_word.random_batches(ids, size, seed=5))
    assert len(batches) == 3
    for (context, target), (again, _) in zip(
        batches, next_word.random_batches(ids, size, seed=5), strict=True
    ):
        assert torch.equal(context, again)
        assert torch.equal(context, torch.stack([target - 2, target - 1], dim=1))


def test_output_names_backend_and_ids(output: str):
    assert re.search(r"^backend: \w+ serves cpu", output, re.M)
    by_tokenizers = "Words to ids by gpu_embed.text, each word as it first appears:"
    assert (by_tokenizers in output) == phrases.has_tokenizers()
    assert "'Hope to see you soon'    -> [0, 1, 2, 3, 4]" in output
    assert "'Nice to see you again'   -> [5, 1, 2, 3, 6]" in output


def test_on_a_cpu_the_first_lines_say_that_torchs_operators_run(output: str):
    assert output.splitlines()[1:3] == running.describe_backend("cpu").splitlines()


@pytest.mark.parametrize(
    ("said", "on_cpu"),
    [
        ("torch serves cpu: the kernels are for CUDA devices", True),
        ("torch serves cpu: forced by use_backend() or GPU_EMBED_BACKEND", True),
        ("triton serves cpu: forced by use_backend() or GPU_EMBED_BACKEND", False),
        ("triton serves cuda: the first choice", False),
        ("torch serves cuda as the last resort; triton: not installed", False),
    ],
)
def test_only_where_torch_serves_a_cpu_the_kernels_are_said_to_be_for_cuda(
    said, on_cpu, monkeypatch
):
    monkeypatch.setattr(gpu_embed.backends, "explain", lambda device: said)
    first, *more = running.describe_backend("any").splitlines()
    assert first == f"backend: {said}"
    assert [line.startswith("On a CPU torch's own operators run") for line in more] == [
        True
    ] * on_cpu


def test_output_has_the_learnt_table_with_words(output: str):
    for i, word in enumerate(("hope", "to", "see", "you", "soon", "nice", "again")):
        assert re.search(rf"\b{i} +\S {word} +\S \[ *-?\d+\.\d+, +-?\d+\.\d+\]", output)


def test_output_shows_that_all_checks_held(output: str):
    claims = re.findall(r"^ok +(.+)$", output, re.M)
    assert claims[0] == "the second phrase's rows are equal to weight[[5, 1, 2, 3, 6]]"
    assert claims[1] == "set by hand, the second phrase's rows come back:"
    assert "[[0.7, 1.7], [0.1, 4.2], [1.0, 3.1], [0.3, 2.1], [4.1, 2.0]]" in output
    assert re.fullmatch(r"the rows of all [\d,]+ tokens are equal to torch's lookup", claims[2])
    assert claims[3] == "both layers end at the same loss, within 2%"
    assert len(claims) == 4
    assert "FAILED" not in output


def test_both_trainings_learn(output: str):
    first, last = map(float, re.search(r"steps: (\S+) -> (\S+) \(the", output).groups())
    assert last < 0.75 < 1.5 < first
    for layer in ("torch.nn.Embedding", "gpu_embed.Embedding"):
        numbers = re.search(rf"{layer} +\S +([\d.]+) +\S +([\d.]+) +\S +([\d,]+)", output).groups()
        first, last, speed = (float(number.replace(",", "")) for number in numbers)
        assert last < first - 0.5
        assert speed > 0


def test_output_has_difference_and_neighbours(output: str):
    difference = re.search(r"between the two loss curves: (\S+) \(", output).group(1)
    assert 0 <= float(difference) < 0.01
    assert re.search(r"function +\S +\d+ +\S \w+ -?\d\.\d\d, ", output)


def test_pipe_gets_no_progress_bar(output: str):
    assert "\x1b" not in output
    assert "\r" not in output
    assert " left" not in output


def test_terminal_gets_a_progress_bar_with_losses():
    from rich.console import Console

    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100, color_system=None)
    size = next_word.Size(steps=12, vocabulary=20, embedding_dim=4, context=2, batch=8)
    corpus = next_word.encode_text(["a", "b", "c"] * 20, size.vocabulary)
    runs = [next_word.new_run("any", torch.nn.Embedding, size, torch.device("cpu"), seed=0)]
    with next_word.progress_bar(console) as progress:
        next_word.train(runs, corpus, size, seed=0, progress=progress)
    assert "12/12" in screen.getvalue()
    assert f"loss {runs[0].losses[-1]:.3f}" in screen.getvalue()
    assert "left" in screen.getvalue()


def test_picture_is_a_whole_png_and_alone(output: str, folder: Path):
    assert [path.name for path in folder.iterdir()] == ["gpu_embed_demo.png"]
    picture = folder / "gpu_embed_demo.png"
    pixels = image.imread(picture)
    height, width, _ = pixels.shape
    assert (width, height) == (1560, 780)
    # Text, curves and arrows: neither blank nor full.
    drawn = np.mean(np.any(pixels[..., :3] < 0.9, axis=-1))
    assert 0.01 < drawn < 0.5


@pytest.mark.parametrize("seed", range(5))
def test_labels_cover_neither_each_other_nor_a_row(seed: int):
    from gpu_embed.demo import picture as _demo_picture

    rows = torch.randn(2, 7, 2, generator=torch.Generator().manual_seed(seed))
    # Two words that end at the same place, as they do in the demo.
    rows[1, 5] = rows[1, 0] + 0.02
    words = phrases.encode_phrases(phrases.PHRASES)[0]
    losses = {"torch": [2.0, 1.0], "ours": [2.0, 1.001]}
    figure = _demo_picture.draw(words, *rows, losses, 1.5)
    axes = figure.axes[0]
    boxes = [t.get_window_extent() for t in axes.texts if t.get_text() in words]
    assert len(boxes) == 7
    points = axes.transData.transform(rows[1])
    for i, box in enumerate(boxes):
        assert box.count_overlaps(boxes[i + 1 :]) == 0
        assert box.count_contains(points) == 0
        assert axes.bbox.x0 <= box.x0 < box.x1 <= axes.bbox.x1


@pytest.fixture
def refuse_to_train(monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(*args: object) -> None:
        raise AssertionError("the training started")

    monkeypatch.setattr(demo, "run_phrases", trained)


def refusal(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """Run the demo, see it refuse, and return the line that says why."""
    with pytest.raises(SystemExit) as end:
        sys.exit(demo.main(options))
    assert end.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "Traceback" not in shown.err
    return shown.err.splitlines()[-1]


@pytest.mark.usefixtures("refuse_to_train")
class TestRefusals:
    @pytest.mark.parametrize(
        ("steps", "why"),
        [
            ("0", "0 is too few, choose 1 or more"),
            ("-3", "-3 is too few"),
            ("many", "'many' is no whole number"),
        ],
    )
    def test_steps_that_are_no_count(self, steps, why, capsys):
        assert f"argument --steps: {why}" in refusal(capsys, "--steps", steps)

    @pytest.mark.parametrize("seed", ["-1", str(2**32), "luck"])
    def test_seed_that_numpy_does_not_take(self, seed, capsys):
        assert f"argument --seed: {seed}: choose a number from 0" in refusal(capsys, "--seed", seed)

    def test_missing_folder(self, tmp_path, capsys):
        error = refusal(capsys, "--out", str(tmp_path / "none" / "a.png"))
        assert f"there is no folder {tmp_path / 'none'}" in error

    def test_other_format(self, tmp_path, capsys):
        assert "ends in .png" in refusal(capsys, "--out", str(tmp_path / "a.pdf"))

    def test_folder_instead_of_file(self, tmp_path, capsys):
        (tmp_path / "a.png").mkdir()
        assert "name a file in it" in refusal(capsys, "--out", str(tmp_path / "a.png"))

    def test_folder_that_cannot_be_written(self, tmp_path, capsys, monkeypatch):
        def denied(self: Path) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "touch", denied)
        error = refusal(capsys, "--out", str(tmp_path / "a.png"))
        assert "cannot write there (Permission denied), choose another folder" in error

    @pytest.mark.parametrize("name", ["rich", "matplotlib"])
    def test_missing_extra(self, name, capsys, monkeypatch):
        monkeypatch.setitem(sys.modules, name, None)
        assert f'needs {name}: install the extra "demo"' in refusal(capsys)

    @pytest.mark.parametrize("device", ["nonsense", "cuda:99"])
    def test_missing_device(self, device, tmp_path, capsys):
        error = refusal(capsys, "--out", str(tmp_path / "a.png"), "--device", device)
        assert f"argument --device: {device}: " in error
        assert "--device cpu always works" in error

    def test_more_processes_of_torchrun_than_cards(self, capsys, monkeypatch):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        said = "each of 4 processes needs a GPU of its own, and there are 2: choose --device cpu"
        assert said in refusal(capsys, "--device", "cuda")

    def test_forced_backend_that_cannot_run(self, tmp_path, capsys):
        with gpu_embed.use_backend("cupy"):
            error = refusal(capsys, "--out", str(tmp_path / "a.png"), "--device", "cpu")
        assert "'cupy' is forced but cannot serve cpu" in error

    def test_text_that_is_not_there(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
        with pytest.raises(running.CannotRunError, match="pydoc_data"):
            next_word.read_tokens()


@pytest.mark.parametrize(("rank", "card"), [(None, 0), ("0", 0), ("1", 1)])
def test_each_process_of_torchrun_takes_its_own_card(rank, card, monkeypatch):
    """A card with its number, which NCCL asks for."""
    asked = []
    monkeypatch.setattr(torch, "zeros", lambda _, device: asked.append(device) or torch.ones(1))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert options.usable_device("cuda") == asked[0] == torch.device("cuda", card)


def test_interrupted_training_leaves_nothing(tmp_path, capsys, monkeypatch):
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(next_word, "train", interrupted)
    out = str(tmp_path / "a.png")
    assert demo.main(["--quick", "--device", "cpu", "--out", out]) == 130
    assert capsys.readouterr().err.endswith("interrupted, no picture was written\n")
    assert list(tmp_path.iterdir()) == []


def test_interrupted_saving_leaves_the_former_picture(tmp_path, monkeypatch):
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    out = tmp_path / "a.png"
    out.write_bytes(b"former")
    options = ["--quick", "--steps", "1", "--device", "cpu", "--out", str(out)]
    assert demo.main(options) == 130
    assert list(tmp_path.iterdir()) == [out]
    assert out.read_bytes() == b"former"


def test_wrong_rows_fail_the_checks(tmp_path, capsys, monkeypatch):
    class Wrong(gpu_embed.Embedding):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) * 1.001

    monkeypatch.setattr(gpu_embed, "Embedding", Wrong)
    out = str(tmp_path / "a.png")
    assert demo.main(["--quick", "--steps", "2", "--device", "cpu", "--out", out]) == 1
    assert capsys.readouterr().out.count("FAILED") == 3


def test_help_explains(capsys):
    with pytest.raises(SystemExit, match="0"):
        demo.main(["--help"])
    shown = capsys.readouterr().out
    for option in ("--out", "--steps", "--seed", "--quick", "--device"):
        assert option in shown


@pytest.mark.gpu
def test_gpu_is_used_with_no_flag(tmp_path):
    done = run_command("--quick", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "gpu_embed demo on cuda" in done.stdout
    assert re.search(r"^backend: (triton|cupy) serves cuda", done.stdout, re.M)
