"""The recommender example learns, says what is faster, goes on from its checkpoint, and refuses in words."""

import importlib
import importlib.util
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from argparse import ArgumentTypeError
from pathlib import Path
from typing import BinaryIO

import pytest
import torch

rich_progress = pytest.importorskip("rich.progress", reason="the demo's extra is not installed")
image = pytest.importorskip("matplotlib.image", reason="the demo's extra is not installed")

from gpu_embed.demo.options import out_file, writable_file  # noqa: E402
from gpu_embed.demo.running import CannotRunError  # noqa: E402

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PROGRAM = EXAMPLES / "recommender.py"
SYNTHETIC = ["--data", "synthetic", "--device", "cpu"]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONIOENCODING": "utf-8"}
needs_gloo = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="torch is built without gloo",
)


@pytest.fixture(scope="module")
def recommender():
    """The example as a module, and those of its folder as `two_tower.NAME`."""
    # What `python examples/recommender.py` has there.
    sys.path.insert(0, str(EXAMPLES))
    yield importlib.import_module("recommender")
    sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def clicks(recommender):
    return importlib.import_module("two_tower.clicks")


@pytest.fixture(scope="module")
def training(recommender):
    return importlib.import_module("two_tower.training")


def run(folder: Path, *options: str, processes: int = 1, code: int = 0) -> tuple[str, str]:
    """Run the example as a user does, its output in a pipe: what it says on stdout, and on stderr."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run(
        [sys.executable, *(launch if processes > 1 else ()), PROGRAM, *options],
        cwd=folder,
        env=ENVIRONMENT,
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout, done.stderr


def call(recommender, monkeypatch, *options: str) -> None:
    """Run the example in this process."""
    monkeypatch.setattr(sys, "argv", ["recommender.py", *options])
    recommender.end_on_ctrl_c(recommender.main)


def losses_of(output: str) -> list[float]:
    (losses,) = re.findall(r"^loss of each epoch: (.*)$", output, re.M)
    return [float(loss) for loss in losses.split()]


def results_of(output: str) -> list[str]:
    """The lines that depend on nothing but data, seed and epochs."""
    return re.findall(r"^(?:loss of each epoch|ranked by) .*$", output, re.M)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recommender")


@pytest.fixture(scope="module")
def output(folder: Path) -> str:
    said, errors = run(folder, "--quick", *SYNTHETIC)
    assert errors == ""
    return said


def test_it_learns(output: str):
    losses = losses_of(output)
    assert len(losses) == 5
    assert losses[-1] < losses[0] - 0.8


def test_it_beats_popularity(output: str):
    found = re.findall(r"ranked by .* recall@10 (0\.\d+)  NDCG@10 (0\.\d+)", output)
    popularity, model = ((float(recall), float(ndcg)) for recall, ndcg in found)
    assert model[0] > 2 * popularity[0] > 0
    assert model[1] > 2 * popularity[1] > 0


def test_it_times_every_setup_and_says_what_is_faster(output: str, training):
    times = re.findall(r"^(.+?) +([\d,]+\.\d) ms a step$", output, re.M)
    assert [name for name, _ in times] == list(training.SETUPS)
    assert all(float(ms.replace(",", "")) > 0 for _, ms in times)
    assert output.count(f"\nA step takes {times[0][1]} ms with gpu_embed and ") == 1


def test_it_leaves_a_picture_and_a_checkpoint_where_it_says(output: str, folder: Path):
    assert sorted(path.name for path in folder.iterdir()) == ["recommender.png", "recommender.pt"]
    assert f"picture: {folder / 'recommender.png'}" in output
    assert f"checkpoint: {folder / 'recommender.pt'}" in output
    height, width, _ = image.imread(folder / "recommender.png").shape
    assert (width, height) == (1200, 552)


@pytest.mark.parametrize(
    ("ms", "said"),
    [
        (
            (2.1, 26.0, 13.0, 90.0),
            "A step takes 2.1 ms with gpu_embed and 13.0 ms with torch's fastest of 3 "
            "(sparse, SparseAdam): gpu_embed is 6.2 times as fast.",
        ),
        (
            (26.0, 13.0, 20.0, 90.0),
            "A step takes 26.0 ms with gpu_embed and 13.0 ms with torch's fastest of 3 "
            "(sparse, Adagrad): gpu_embed is slower, and takes 2.0 times as long.",
        ),
        (
            (10.0, 30.0, 20.0, 10.3),
            "A step takes 10.0 ms with gpu_embed and 10.3 ms with torch's fastest of 3 "
            "(dense, Adagrad): neither is faster by 5 %.",
        ),
        ((10.0,), "A step takes 10.0 ms with gpu_embed"),
    ],
    ids=["faster", "slower", "alike", "alone"],
)
def test_what_is_faster_is_said_in_words(training, ms, said):
    assert training.compared(dict(zip(training.SETUPS, ms, strict=False))) == said


@pytest.mark.parametrize("alone", [False, True])
def test_both_axes_of_each_part_are_labelled(training, alone):
    picture = importlib.import_module("two_tower.picture")
    results = [training.Result(math.nan, 0.01, 0.005), training.Result(5.0, 0.2, 0.1)]
    ms = dict(zip(training.SETUPS, [1.0] if alone else [1.0, 2.0, 3.0, 4.0], strict=False))
    figure = picture.draw("any", results, (0.1, 0.05), ms, torch.device("cpu"))
    assert len(figure.axes) == 2 - alone
    for axes in figure.axes:
        assert axes.get_xlabel()
        assert axes.get_ylabel()
    curves = [line.get_xydata().tolist() for line in figure.axes[0].lines]
    assert curves[0] == [[0, 0.01], [1, 0.2]]
    assert curves[2] == [[0, 0.005], [1, 0.1]]
    assert [curve[0][1] for curve in curves[1::2]] == [0.1, 0.05]


def test_without_recbole_it_says_so(recommender, training, tmp_path, monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "recbole" else find_spec(name)
    )
    monkeypatch.setattr(training, "step_times", lambda trainers, *_: dict.fromkeys(trainers, 1.0))
    monkeypatch.chdir(tmp_path)
    call(recommender, monkeypatch, "--quick", "--epochs", "1", "--device", "cpu")
    shown = capsys.readouterr().out
    assert "recbole is not installed (pip install --no-deps recbole)" in shown
    assert "a synthetic click log" in shown


ITEMS = """item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq
1\tA "Film\t1990\tDrama
2\tAnother\t1991\tDrama Comedy
30\tA third\t1990\tDrama
"""
USERS = """user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token
1\t24\tM\twriter\t00000
2\t7\tF\tnone\t00000
"""
RATINGS = """user_id:token\titem_id:token\trating:float\ttimestamp:float
2\t1\t3\t50
1\t2\t5\t30
1\t30\t5\t25
1\t1\t1\t20
"""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    for kind, text in (("item", ITEMS), ("user", USERS), ("inter", RATINGS)):
        (folder / f"ml-100k.{kind}").write_text(text, encoding="utf-8")
    return folder


def test_movielens_is_read_in_the_order_of_time(clicks, data):
    found = clicks.movielens(data)
    # Item 30 is the third.
    assert found.train[:, :3].tolist() == [[1, 1, 0]]
    assert found.valid[:, :4].tolist() == [[1, 3, 1, 0]]
    assert found.test[:, :4].tolist() == [[1, 2, 3, 1], [2, 1, 0, 0]]
    # Numbered as they come, from 1: M, 20s, writer; F, 0s, none. 1990, Drama; 1991, Drama, Comedy.
    assert found.user_traits.tolist() == [[0, 0, 0], [1, 2, 3], [4, 5, 6]]
    assert found.item_traits.tolist() == [[0, 0, 0], [1, 2, 0], [3, 2, 4], [1, 2, 0]]


EXPECTED = "expected are ml-100k.inter, .item and .user"


@pytest.mark.parametrize(
    ("kind", "text", "said"),
    [
        ("item", None, f"cannot read ml-100k.item (No such file or directory); {EXPECTED}"),
        ("user", b"\xff\xfe", f"cannot read ml-100k.user (this is no UTF-8); {EXPECTED}"),
        ("inter", b"", "the first line of ml-100k.inter names no user_id"),
        ("item", ITEMS.replace("release_year", "year"), "ml-100k.item names no release_year"),
        ("user", USERS.replace("\tnone", ""), "ml-100k.user, line 3: 4 columns, expected 5"),
        ("inter", RATINGS[:-4], "ml-100k.inter, line 5: 3 columns, expected 4"),
        ("user", USERS.replace("24", "old"), "line 2: age is 'old', expected a number"),
        ("inter", RATINGS.replace("50", "now"), "line 2: timestamp is 'now', expected a number"),
        ("inter", RATINGS.replace("2\t5", "99\t5"), "line 3: item '99' is not in ml-100k.item"),
        ("user", USERS[: USERS.index("2\t7")], "line 2: user '2' is not in ml-100k.user"),
        ("inter", RATINGS[: RATINGS.index("1\t30")], "no user in ml-100k.inter has three items"),
        ("inter", RATINGS[: RATINGS.index("2\t1")], "no user in ml-100k.inter has three items"),
    ],
)
def test_damaged_data_is_named(recommender, data, monkeypatch, capsys, kind, text, said):
    file = data / f"ml-100k.{kind}"
    if text is None:
        file.unlink()
    else:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    monkeypatch.chdir(data.parent)
    with pytest.raises(SystemExit) as end:
        call(recommender, monkeypatch, "--data", str(data))
    assert end.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"error: --data {data}: ")
    assert said in shown.err
    assert shown.err.count("\n") == 1
    assert list(data.parent.iterdir()) == [data]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--epochs", "-1"], "argument --epochs: -1 is too few, choose 1 or more"),
        (["--epochs", "0"], "argument --epochs: 0 is too few, choose 1 or more"),
        (["--epochs", "x"], "argument --epochs: 'x' is no whole number"),
        (["--seed", "-1"], "argument --seed: -1: choose a number from 0 to 2**32 - 1"),
        (["--out", "a.pdf"], "argument --out: a.pdf: the picture is a PNG"),
        (["--out", "none/a.png"], "argument --out: none/a.png: there is no folder none"),
        (["--checkpoint", "none/a.pt"], "argument --checkpoint: none/a.pt: there is no folder"),
        (["--checkpoint", "."], "argument --checkpoint: .: this is a folder"),
        (
            ["--checkpoint", "a.png", "--out", "./a.png"],
            "--out and --checkpoint name one file, a.png",
        ),
        (["--device", "cuda:99"], "argument --device: cuda:99: "),
        (["--data", "/nonexist"], "error: --data /nonexist: cannot read ml-100k.user (No such"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_options_are_refused(recommender, tmp_path, monkeypatch, capsys, options, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        call(recommender, monkeypatch, *options)
    assert end.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert said in shown.err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="no named pipes in folders")
def test_what_is_no_file_is_not_replaced(tmp_path):
    """By root, /dev/null would be."""
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)
    for option in (writable_file, out_file):
        with pytest.raises(ArgumentTypeError, match=r"pipe\.png: this is no ordinary file"):
            option(str(pipe))
    assert pipe.is_fifo()
    with pytest.raises(ArgumentTypeError, match="File name too long"):
        out_file(f"{'a' * 300}.png")


def test_history_is_the_users_own_and_the_latest_first(clicks):
    events = torch.tensor([[1, 5], [1, 6], [1, 7], [1, 4], [2, 8], [2, 9], [3, 1]])
    found = clicks.split("any", events, torch.zeros(4, 1), torch.zeros(10, 1))
    assert found.train[:, :5].tolist() == [[1, 5, 0, 0, 0], [1, 6, 5, 0, 0]]
    assert found.valid[:, :5].tolist() == [[1, 7, 6, 5, 0], [2, 8, 0, 0, 0]]
    assert found.test[:, :6].tolist() == [
        [1, 4, 7, 6, 5, 0],
        [2, 9, 8, 0, 0, 0],
        [3, 1, 0, 0, 0, 0],
    ]
    assert found.counts.tolist() == [0, 0, 0, 0, 0, 1, 1, 0, 0, 0]
    nothing = [[user, 0] for user in range(4)]
    seen = found.seen((found.train,)).nonzero().tolist()
    assert seen == sorted([*nothing, [1, 5], [1, 6]])
    seen = found.seen((found.train, found.valid)).nonzero().tolist()
    assert seen == sorted([*nothing, [1, 5], [1, 6], [1, 7], [2, 8]])


def test_ranking_leaves_out_what_was_seen(clicks, training):
    events = torch.tensor([[1, 1], [1, 5], [1, 2], [2, 3], [2, 6], [2, 4]])
    found = clicks.split("any", events, torch.zeros(3, 1), torch.zeros(20, 1))
    # User 1 has item 2 behind items 1 and 5, both of which were seen, and 7; user 2 has item 4 behind eleven.
    scores = torch.zeros(2, 20)
    scores[0, [1, 5, 7, 2]] = torch.tensor([4.0, 3.0, 2.0, 1.0])
    scores[1, 7:18] = 1
    recall, ndcg = training.ranking(found, found.test, lambda examples: scores)
    assert recall == 1 / 2
    assert ndcg == pytest.approx(1 / math.log2(3) / 2)
    # Item 5 was not yet seen when it is to be found itself: it is the first.
    recall, ndcg = training.ranking(found, found.valid, lambda examples: scores)
    assert (recall, ndcg) == (1 / 2, 1 / 2)


def test_crosses_are_hashed_into_the_table_and_absent_traits_are_absent(recommender):
    model = importlib.import_module("two_tower.model")
    traits = torch.tensor([[0, 0, 0], [1, 2, 0], [2, 1, 3]])
    hashed = model.hashed(traits, buckets=50)
    assert hashed.shape == (3, 6)
    assert (hashed != 0).sum(1).tolist() == [0, 3, 6]
    assert 0 <= int(hashed.min()) <= int(hashed.max()) < 50
    many = torch.stack((torch.arange(1, 1001), torch.full((1000,), 7)), 1)
    # 1000 pairs in a million buckets: hardly two meet.
    assert len(model.hashed(many, 2**20)[:, 1].unique()) > 990


CPU = torch.device("cpu")


def test_tables_change_in_the_backward_pass_and_keep_no_gradient(clicks, training):
    found = clicks.synthetic(50, 100, 10, seed=0)
    trainers = [training.Trainer(found, 64, setup, CPU, seed=3) for setup in training.SETUPS]
    before = [weight.detach().clone() for weight in trainers[0].model.parameters()]
    for trainer in trainers:
        trainer.step(torch.arange(64))
    losses = [trainer.losses[0] for trainer in trainers]
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-5)
    after = list(trainers[0].model.parameters())
    assert not any(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert all(weight.grad is None for weight in trainers[0].model.tables())


# Checkpoints.


class Bar:
    """In place of a progress bar: sends Ctrl-C while a step is shown."""

    def __init__(self, interrupt_at: int = -1) -> None:
        self.left = interrupt_at

    def add_task(self, *_: object, **__: object) -> None: ...

    def update(self, *_: object, **__: object) -> None: ...

    def advance(self, _: object) -> None:
        self.left -= 1
        if self.left == 0:
            signal.raise_signal(signal.SIGINT)


def everything(trainer) -> dict[str, object]:
    """All numbers of a training, by their names."""
    state, named = trainer.state(), {}

    def walk(name: str, value: object) -> None:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            if isinstance(inner, dict | list | tuple):
                walk(f"{name}.{key}", inner)
            else:
                named[f"{name}.{key}"] = inner

    walk("state", state)
    return named


def assert_same(one: dict[str, object], other: dict[str, object]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, other[name]), name
        else:
            assert value == other[name] or (value != value and other[name] != other[name]), name


@pytest.fixture
def small(clicks, training, monkeypatch):
    """Three batches an epoch."""
    monkeypatch.setattr(training, "BATCH", 90)
    found = clicks.synthetic(50, 100, 10, seed=0)
    assert -(-len(found.train) // 90) == 3
    return found


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 12])
def test_resumed_is_as_not_resumed(training, small, tmp_path, steps):
    """Bit for bit, wherever Ctrl-C comes: between epochs, within the first one or a later one."""
    checkpoint = training.Checkpoint(tmp_path / "a.pt", small, seed=3)

    def trainer():
        return training.Trainer(small, 64, training.OURS, CPU, seed=3)

    whole = trainer()
    training.train(whole, 4, checkpoint, Bar())
    with pytest.raises(KeyboardInterrupt):
        training.train(trainer(), 4, checkpoint, Bar(interrupt_at=steps))
    resumed = trainer()
    # Whatever was drawn in between.
    torch.rand(17)
    resumed.load(checkpoint.read(4))
    # Ctrl-C is seen by the step after.
    assert resumed.steps == min(steps + 1, 12)
    torch.manual_seed(99)
    training.train(resumed, 4, checkpoint, Bar())
    assert_same(everything(resumed), everything(whole))
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_resumed_again_is_as_not_resumed(training, small, tmp_path):
    checkpoint = training.Checkpoint(tmp_path / "a.pt", small, seed=3)
    trainers = [training.Trainer(small, 64, training.OURS, CPU, seed=3) for _ in range(4)]
    training.train(trainers[0], 3, checkpoint, Bar())
    for epochs, trainer in enumerate(trainers[1:], start=1):
        if epochs > 1:
            trainer.load(checkpoint.read(epochs))
        training.train(trainer, epochs, checkpoint, Bar())
    assert_same(everything(trainers[3]), everything(trainers[0]))


def test_more_epochs_go_on_from_a_finished_training(training, small, tmp_path):
    checkpoint = training.Checkpoint(tmp_path / "a.pt", small, seed=3)
    trainers = [training.Trainer(small, 64, training.OURS, CPU, seed=3) for _ in range(3)]
    training.train(trainers[0], 3, checkpoint, Bar())
    training.train(trainers[1], 2, checkpoint, Bar())
    trainers[2].load(checkpoint.read(3))
    training.train(trainers[2], 3, checkpoint, Bar())
    assert_same(everything(trainers[2]), everything(trainers[0]))


def test_optimizers_state_and_place_are_in_the_checkpoint(training, small, tmp_path):
    """What a resumed training would not be the same without."""
    checkpoint = training.Checkpoint(tmp_path / "a.pt", small, seed=3)
    trainer = training.Trainer(small, 64, training.OURS, CPU, seed=3)
    training.train(trainer, 1, checkpoint, Bar())
    names = set(everything(trainer))
    for table in ("users", "latest", "history", "user_crosses", "items", "item_crosses"):
        assert f"state.model.{table}.weight" in names
        assert f"state.optimizers.state.{table}.weight.sum" in names
    assert "state.optimizers.state.user_tower.1.weight.exp_avg_sq" in names


@pytest.fixture
def made(training, small, tmp_path):
    """A checkpoint of one epoch."""
    checkpoint = training.Checkpoint(tmp_path / "a.pt", small, seed=3, buckets=64)
    trainer = training.Trainer(small, 64, training.OURS, CPU, seed=3)
    training.train(trainer, 1, checkpoint, Bar())
    return checkpoint


def test_checkpoint_that_is_not_there(training, small, tmp_path):
    checkpoint = training.Checkpoint(tmp_path / "a.pt", small)
    with pytest.raises(CannotRunError, match=r"there is no checkpoint .*a\.pt; start anew without"):
        checkpoint.read(1)


@pytest.mark.parametrize("part", [0, 0.3, 0.999, "text", "other", "folder of torch"])
def test_damaged_checkpoint(made, part):
    whole = made.path.read_bytes()
    if part == "text":
        made.path.write_text("no checkpoint\n")
    elif part == "other":
        torch.save({"weights": torch.ones(3)}, made.path)
    elif part == "folder of torch":
        torch.save(torch.ones(3), made.path)
    else:
        made.path.write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(CannotRunError, match=r"a\.pt is damaged, or no checkpoint of this program"):
        made.read(1)


@pytest.mark.parametrize(
    ("what", "theirs"),
    [("seed", 4), ("buckets", 128), ("torch", "1.0"), ("gpu_embed", "0.0"), ("data", "other")],
)
def test_checkpoint_of_another_training(made, what, theirs):
    ours = made.made_for[what]
    state = torch.load(made.path, weights_only=True)
    state["made_for"][what] = theirs
    torch.save(state, made.path)
    said = f"a.pt is of another training: {what} was {theirs}, and is {ours}; start anew"
    with pytest.raises(CannotRunError, match=re.escape(said)):
        made.read(1)


def test_other_clicks_have_another_fingerprint(clicks):
    prints = [clicks.synthetic(50, 100, 10, seed).fingerprint() for seed in (0, 0, 1)]
    assert prints[0] == prints[1] != prints[2]


def test_checkpoint_of_more_epochs(training, small, made):
    trainer = training.Trainer(small, 64, training.OURS, CPU, seed=3)
    with pytest.raises(KeyboardInterrupt):
        training.train(trainer, 4, made, Bar(interrupt_at=7))
    with pytest.raises(CannotRunError, match=r"has begun epoch 3, choose --epochs 3 or more"):
        made.read(2)
    assert made.read(3)["steps"] == 8


def test_checkpoint_of_a_finished_training_needs_no_further_epoch(training, small, tmp_path):
    checkpoint = training.Checkpoint(tmp_path / "a.pt", small, seed=3)
    training.train(training.Trainer(small, 64, training.OURS, CPU, seed=3), 2, checkpoint, Bar())
    with pytest.raises(CannotRunError, match=r"has begun epoch 2, choose --epochs 2 or more"):
        checkpoint.read(1)
    assert checkpoint.read(2)["steps"] == 6


@pytest.mark.parametrize("by_torch", [False, True])
def test_full_disk_leaves_the_former_checkpoint(training, small, made, monkeypatch, by_torch):
    before = made.path.read_bytes()

    def full(_: object, file: BinaryIO) -> None:
        file.write(before[:100])
        try:
            raise OSError(28, "No space left on device")
        finally:
            if by_torch:
                raise RuntimeError("[enforce fail at inline_container.cc:672]")

    monkeypatch.setattr(torch, "save", full)
    trainer = training.Trainer(small, 64, training.OURS, CPU, seed=3)
    with pytest.raises(CannotRunError, match=r"cannot write the checkpoint .*No space left"):
        training.train(trainer, 1, made, Bar())
    assert made.path.read_bytes() == before
    assert list(made.path.parent.iterdir()) == [made.path]


def test_ctrl_c_where_no_checkpoint_is_yet_names_none(
    recommender, training, tmp_path, monkeypatch, capsys
):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "train", interrupted)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="130"):
        call(recommender, monkeypatch, "--quick", *SYNTHETIC)
    assert capsys.readouterr().err == "\ninterrupted, no picture was written\n"
    assert list(tmp_path.iterdir()) == []


GOES_ON = r"^interrupted, no picture was written; this goes on: (.*)$"


def interrupt(folder: Path, *options: str, processes: int = 1, group: bool = False) -> str:
    """Start the example, send Ctrl-C after its first epoch, and return the command that goes on."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    with subprocess.Popen(
        [sys.executable, *(launch if processes > 1 else ()), PROGRAM, *options],
        cwd=folder,
        env={**ENVIRONMENT, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        until = time.monotonic() + 200
        while process.poll() is None and time.monotonic() < until:
            if (folder / "recommender.pt").exists():
                break
            time.sleep(0.01)
        if group:
            os.killpg(process.pid, signal.SIGINT)
        else:
            process.send_signal(signal.SIGINT)
        said, errors = process.communicate(timeout=60)
    assert process.returncode == 130 or (processes > 1 and process.returncode), said + errors
    # torchrun's own words are no concern of the example's.
    assert 'recommender.py", line' not in errors
    assert "loss of" not in said
    assert [path.name for path in folder.iterdir()] == ["recommender.pt"]
    (command,) = re.findall(GOES_ON, errors, re.M)
    return command


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
def test_the_command_that_ctrl_c_names_goes_on(tmp_path, folder, output):
    options = ["--quick", *SYNTHETIC]
    command = shlex.split(interrupt(tmp_path, *options))
    assert command == ["python", str(PROGRAM), *options, "--resume"]
    said, errors = run(tmp_path, *command[2:])
    assert errors == ""
    assert re.search(r"^goes on after \d+ steps, from recommender\.pt$", said, re.M)
    assert results_of(said) == results_of(output)
    said, _ = run(tmp_path, *options, "--epochs", "1")
    assert "the first epoch replaces recommender.pt; --resume would go on from it" in said


# Spread over processes.


@pytest.fixture(scope="module", params=[2, 3])
def processes(request) -> int:
    return request.param


@pytest.fixture(scope="module")
def spread_folder(processes: int, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp(f"on_{processes}")


@pytest.fixture(scope="module")
def spread(processes: int, spread_folder: Path) -> str:
    said, errors = run(spread_folder, "--quick", *SYNTHETIC, processes=processes)
    assert "Traceback" not in errors
    return said


@needs_gloo
def test_it_learns_on_several_processes(processes: int, spread_folder: Path, spread: str):
    """Its tables are spread: 500 users, 3 x 1,000 items, each with a row of nothing, and 2 x 2**14 crosses."""
    assert spread.count("backend: torch serves cpu") == 1
    lines = re.findall(r"^process (\d): ([\d,]+) of ([\d,]+) rows, \S+ MiB$", spread, re.M)
    assert [int(line[0]) for line in lines] == list(range(processes))
    held = [int(line[1].replace(",", "")) for line in lines]
    whole = 501 + 3 * 1001 + 2 * 2**14
    assert sum(held) == whole
    assert {line[2] for line in lines} == {f"{whole:,}"}
    # A table's rows differ by one at most.
    assert max(held) - min(held) <= 6
    test_it_learns(spread)
    test_it_beats_popularity(spread)
    assert spread.count("ms a step") == 1
    assert not re.search(r"torch's fastest|faster|slower|times as|as ours", spread)
    test_it_leaves_a_picture_and_a_checkpoint_where_it_says(spread, spread_folder)


@needs_gloo
@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
def test_processes_go_on_from_their_checkpoint(processes: int, spread: str, tmp_path: Path):
    """A terminal interrupts all of them, a scheduler torchrun alone; one process may go on, too."""
    options = ["--quick", *SYNTHETIC]
    command = shlex.split(interrupt(tmp_path, *options, processes=processes, group=processes == 2))
    launch = ["torchrun", "--nproc-per-node", f"{processes}", str(PROGRAM)]
    assert command == [*launch, *options, "--resume"]
    checkpoint = (tmp_path / "recommender.pt").read_bytes()
    said, errors = run(tmp_path, *command[4:], processes=processes)
    assert "Traceback" not in errors
    assert "goes on after" in said
    assert results_of(said) == results_of(spread)
    (tmp_path / "recommender.pt").write_bytes(checkpoint)
    said, errors = run(tmp_path, *command[4:])
    assert errors == ""
    # One process chooses among as many times the items, which is the logarithm more.
    expected = losses_of(spread)[-1] + math.log(processes)
    assert losses_of(said)[-1] == pytest.approx(expected, abs=0.15)
    test_it_beats_popularity(said)


@needs_gloo
def test_processes_refuse_in_words(tmp_path: Path):
    _, errors = run(tmp_path, "--data", "/nonexist", "--device", "cpu", processes=2, code=1)
    assert "error: --data /nonexist: cannot read ml-100k.user" in errors
    assert 'recommender.py", line' not in errors


@pytest.mark.gpu
def test_it_runs_on_the_gpu(tmp_path):
    said, errors = run(tmp_path, "--quick", "--data", "synthetic", "--device", "cuda")
    assert "serves cuda" in said
    assert errors == ""
