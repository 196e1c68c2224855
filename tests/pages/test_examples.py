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
RECOMMENDER = EXAMPLES / "recommender.py"


@pytest.fixture(scope="module")
def recommender():
    """The example as a module."""
    # What `python examples/recommender.py` has there.
    sys.path.insert(0, str(EXAMPLES))
    spec = importlib.util.spec_from_file_location("recommender", RECOMMENDER)
    module = importlib.util.module_from_spec(spec)
    # Its dataclass looks its module up by name.
    sys.modules["recommender"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["recommender"]
    sys.path.remove(str(EXAMPLES))


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


def run_short(folder: Path, device: str) -> str:
    return run_example(
        folder, RECOMMENDER.name, "--quick", "--data", "synthetic", "--device", device
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recommender")


@pytest.fixture(scope="module")
def output(folder: Path) -> str:
    return run_short(folder, "cpu")


def test_recommender_learns(output: str):
    (losses,) = re.findall(r"^loss of each epoch: (.*)$", output, re.M)
    losses = [float(loss) for loss in losses.split()]
    assert len(losses) == 5
    assert losses[-1] < losses[0] - 0.8


def test_recommender_beats_popularity(output: str):
    found = re.findall(r"ranked by .* recall@10 (0\.\d+)  NDCG@10 (0\.\d+)", output)
    popularity, model = ((float(recall), float(ndcg)) for recall, ndcg in found)
    assert model[0] > 2 * popularity[0] > 0
    assert model[1] > 2 * popularity[1] > 0


def test_recommender_times_every_setup(output: str, recommender):
    times = re.findall(
        r"^(.+?) +(\d+\.\d) ms a step, +(\d+\.\d\d) times as long as ours$", output, re.M
    )
    assert [name for name, _, _ in times] == list(recommender.SETUPS)
    assert all(float(ms) > 0 for _, ms, _ in times)
    assert times[0][2] == "1.00"


def test_recommender_draws_a_picture_where_it_says(output: str, folder: Path):
    picture = folder / "recommender.png"
    assert f"picture: {picture}" in output
    assert [path.name for path in folder.iterdir()] == [picture.name]
    height, width, _ = image.imread(picture).shape
    assert (width, height) == (1440, 576)


def test_recommender_without_recbole_says_so(recommender, tmp_path, monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "recbole" else find_spec(name)
    )
    monkeypatch.setattr(recommender, "step_ms", lambda trainer, steps, advance: 1.0)
    out = str(tmp_path / "a.png")
    arguments = ["--quick", "--epochs", "1", "--out", out, "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["recommender.py", *arguments])
    recommender.main()
    shown = capsys.readouterr().out
    assert "recbole is not installed (pip install --no-deps recbole)" in shown
    assert "a synthetic click log" in shown


ITEMS = """item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq
1\tA "Film\t1990\tDrama
2\tAnother\t1991\tDrama Comedy
"""
USERS = """user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token
1\t24\tM\twriter\t00000
2\t7\tF\tnone\t00000
"""
RATINGS = """user_id:token\titem_id:token\trating:float\ttimestamp:float
2\t1\t3\t50
1\t2\t5\t30
1\t1\t1\t20
"""


def test_movielens_is_read_in_the_order_of_time(recommender, tmp_path):
    for kind, text in (("item", ITEMS), ("user", USERS), ("inter", RATINGS)):
        (tmp_path / f"ml-100k.{kind}").write_text(text)
    clicks = recommender.movielens(tmp_path)
    assert clicks.train[:, :3].tolist() == [[1, 1, 0]]
    assert clicks.test[:, :3].tolist() == [[1, 2, 1], [2, 1, 0]]
    # Numbered as they come, from 1: M, 20s, writer; F, 0s, none. 1990, Drama; 1991, Drama, Comedy.
    assert clicks.user_traits.tolist() == [[0, 0, 0], [1, 2, 3], [4, 5, 6]]
    assert clicks.item_traits.tolist() == [[0, 0, 0], [1, 2, 0], [3, 2, 4]]


def test_history_is_the_users_own_and_the_latest_first(recommender):
    events = torch.tensor([[1, 5], [1, 6], [1, 7], [2, 8], [2, 9]])
    clicks = recommender.split("any", events, torch.zeros(3, 1), torch.zeros(10, 1))
    assert clicks.train[:, :5].tolist() == [[1, 5, 0, 0, 0], [1, 6, 5, 0, 0], [2, 8, 0, 0, 0]]
    assert clicks.test[:, :5].tolist() == [[1, 7, 6, 5, 0], [2, 9, 8, 0, 0]]
    assert clicks.counts.tolist() == [0, 0, 0, 0, 0, 1, 1, 0, 1, 0]
    assert clicks.seen.nonzero().tolist() == [[0, 0], [1, 0], [1, 5], [1, 6], [2, 0], [2, 8]]


def test_ranking_leaves_out_what_was_seen(recommender):
    events = torch.tensor([[1, 1], [1, 2], [2, 3], [2, 4]])
    clicks = recommender.split("any", events, torch.zeros(3, 1), torch.zeros(20, 1))
    # Of 19 items, user 1 has item 2 behind items 5 and 1, which was seen; user 2 has item 4 behind eleven.
    scores = torch.zeros(2, 20)
    scores[0, [1, 5, 2]] = torch.tensor([3.0, 2.0, 1.0])
    scores[1, 5:16] = 1
    recall, ndcg = recommender.ranking(clicks, lambda examples: scores)
    assert recall == 1 / 2
    assert ndcg == pytest.approx(1 / math.log2(3) / 2)


def test_crosses_are_hashed_into_the_table_and_absent_traits_are_absent(recommender):
    traits = torch.tensor([[0, 0, 0], [1, 2, 0], [2, 1, 3]])
    hashed = recommender.hashed(traits, buckets=50)
    assert hashed.shape == (3, 6)
    assert (hashed != 0).sum(1).tolist() == [0, 3, 6]
    assert 0 <= int(hashed.min()) <= int(hashed.max()) < 50
    many = torch.stack((torch.arange(1, 1001), torch.full((1000,), 7)), 1)
    # 1000 pairs in a million buckets: hardly two meet.
    assert len(recommender.hashed(many, 2**20)[:, 1].unique()) > 990


def test_tables_change_in_the_backward_pass_and_keep_no_gradient(recommender):
    clicks = recommender.synthetic(50, 100, 10, seed=0)
    trainers = [
        recommender.Trainer(clicks, 64, setup, "cpu", seed=3) for setup in recommender.SETUPS
    ]
    before = [weight.detach().clone() for weight in trainers[0].model.parameters()]
    losses = []
    for trainer in trainers:
        torch.manual_seed(5)
        losses.append(trainer.step(torch.arange(64)))
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-5)
    after = list(trainers[0].model.parameters())
    assert not any(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert all(weight.grad is None for weight in trainers[0].model.tables())


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


@needs_gloo
@pytest.mark.parametrize("processes", [2, 3])
def test_recommender_learns_on_several_processes(processes: int, tmp_path: Path):
    """Its tables are spread: 500 users, 3 x 1,000 items, each with a row of nothing, and 2 x 2**14 crosses."""
    output = run_sharded(tmp_path, processes, RECOMMENDER.name, "--data", "synthetic")
    assert output.count("backend: torch serves cpu") == 1
    lines = re.findall(r"^process (\d): ([\d,]+) of ([\d,]+) rows, \S+ MiB$", output, re.M)
    assert [int(line[0]) for line in lines] == list(range(processes))
    held = [int(line[1].replace(",", "")) for line in lines]
    whole = 501 + 3 * 1001 + 2 * 2**14
    assert sum(held) == whole
    assert {line[2] for line in lines} == {f"{whole:,}"}
    # A table's rows differ by one at most.
    assert max(held) - min(held) <= 6
    test_recommender_learns(output)
    test_recommender_beats_popularity(output)
    assert output.count("ms a step") == 1
    test_recommender_draws_a_picture_where_it_says(output, tmp_path)


def test_sharded_refuses_more_processes_than_cards(monkeypatch, capsys):
    example = runpy.run_path(str(EXAMPLES / "sharded.py"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(sys, "argv", ["sharded.py", "--device", "cuda"])
    with pytest.raises(SystemExit):
        example["main"]()
    said = "each of 4 processes needs a GPU of its own, and there are 2: choose --device cpu"
    assert said in capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
@pytest.mark.parametrize("whom", ["torchrun", "all"])
@pytest.mark.parametrize("name", ["sharded.py", "recommender.py"])
def test_ctrl_c_ends_all_processes_of_torchrun(name: str, whom: str, tmp_path: Path):
    """A terminal interrupts all of them, a scheduler torchrun alone."""
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


@pytest.mark.gpu
def test_recommender_runs_on_the_gpu(tmp_path):
    assert "serves cuda" in run_short(tmp_path, "cuda")


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


@pytest.mark.parametrize("option", ["--steps", "--batch"])
def test_swap_transformers_refuses_numbers_below_one(option: str, monkeypatch, capsys):
    pytest.importorskip("transformers", reason="the integration extra is missing")
    example = runpy.run_path(str(EXAMPLES / "swap_transformers.py"))
    for number in ("0", "-3", "many"):
        monkeypatch.setattr(sys, "argv", ["swap_transformers.py", "--quick", option, number])
        with pytest.raises(SystemExit):
            example["main"]()
        assert f"argument {option}: invalid positive value: '{number}'" in capsys.readouterr().err


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
    "hashed_features.py": ((), "--resume goes on from the last checkpoint"),
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
        "--resume goes on from the last checkpoint",
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
@pytest.mark.parametrize("name", ["recommender.py", "keras_text_classifier.py"])
def test_ctrl_c_in_a_real_process(name, tmp_path):
    for package in PROGRAMS[name][0]:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    options = ["--data", "synthetic"] if name == "recommender.py" else []
    with subprocess.Popen(
        [sys.executable, "-u", EXAMPLES / name, *options, "--epochs", "1000"],
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


def test_no_example_writes_half_a_picture():
    texts = {path.name: path.read_text(encoding="utf-8") for path in EXAMPLES.glob("*.py")}
    assert {name for name, text in texts.items() if "save_figure(" in text} == {
        name for name, (_, left) in PROGRAMS.items() if "picture" in left
    }
    assert not any("savefig" in text for text in texts.values())
