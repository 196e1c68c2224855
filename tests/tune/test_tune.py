"""The tuner from start to end with a stubbed card, compiler and clock: what it accepts, keeps, resumes and refuses."""

import json
import os
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("rich", reason="the benchmark's extra is not installed")
pytest.importorskip("triton", reason="the tuned backend")

from gpu_embed import _self_check, user_cache
from gpu_embed.backends import load
from gpu_embed.backends._plan import tuned
from gpu_embed.backends._plan.gradient_method import Limit, choose
from gpu_embed.backends._plan.tuned import Card
from gpu_embed.backends._triton.launch import (
    NARROWEST_ROWS,
    WIDEST_ROWS,
    FlatLaunch,
    GatherRule,
    TritonLaunches,
    next_power_of_2,
)
from gpu_embed.settings import TUNED
from gpu_embed.tune import cli, clock, search
from gpu_embed.tune.machine import Machine
from gpu_embed.tune.offline import Usage
from gpu_embed.tune.search import Gain, is_accepted
from gpu_embed.tune.subject import Subject
from gpu_embed.tune.trials import Input

CPU = torch.device("cpu")
H100, A100 = Card("NVIDIA H100 80GB HBM3", "9.0", 132), Card("NVIDIA A100-SXM4-40GB", "8.0", 108)
DEFAULT = TritonLaunches().counts
FAST = FlatLaunch(512, num_warps=8)
assert DEFAULT != FAST


class StubClock:
    """Calls nothing; the cost of a call is its time."""

    def __init__(self, cost):
        self.cost = cost

    def times(self, calls, cold, repeats):
        return [self.cost(call, cold, repeats) for call in calls]

    def copy_gb_per_s(self):
        return 1000.0


class StubMachine(Machine):
    """The CPU as a card, on which Triton's interpreter runs the kernels."""

    def __init__(self, cost, cards=(H100,), busy=()):
        self.cost, self.cards, self.busy = cost, cards, busy
        self.compiled = []
        self.usage = lambda job: Usage()

    def devices(self):
        # Two names of one device.
        return [CPU, torch.device("cpu", 0)][: len(self.cards)]

    def card(self, device):
        return self.cards[device.index is not None]

    def clock(self, device):
        return StubClock(self.cost)

    def backends(self, device):
        return [load("triton")]

    def others(self, device):
        return list(self.busy)

    def compile(self, jobs, architecture, processes):
        for job in jobs:
            self.compiled.append((job, architecture))
            yield job, self.usage(job)


@pytest.fixture(autouse=True)
def small(tmp_path, monkeypatch):
    """The user's folder of tuned files; what is timed is small, as Triton's interpreter makes the launches."""
    monkeypatch.setenv(user_cache.VARIABLE, str(tmp_path))
    monkeypatch.setattr(tuned, "card_of", lambda device: H100)
    inputs = (Input(16, 9, 4), Input(40, 9, 8))
    monkeypatch.setattr(search, "timed_inputs", lambda backend, path: inputs)
    # A second each.
    right = _self_check.Check("cpu", "triton", "right", "", 1.0)
    monkeypatch.setattr(cli, "check_backend", lambda name, device: right)
    with TUNED.set("auto", "test"):
        yield tmp_path / "tuned"


def launch_of(call):
    """What a call repeats, if it is a kernel's."""
    run = call.args[0] if call.args else None
    return run.launches[0] if hasattr(run, "launches") else None


def is_fast(call):
    launch = launch_of(call)
    if launch is None or launch.kernel != "counts_kernel":
        return False
    settings = launch.settings
    return (settings["BLOCK"], settings["num_warps"]) == (FAST.BLOCK, FAST.num_warps)


def counts_gain(call, cold, repeats):
    """One candidate of one kernel takes 0.8 of its time."""
    return 0.8 if is_fast(call) else 1.0


def content(folder, card=H100):
    return json.loads((folder / card.file_name).read_text())


def test_a_run_from_start_to_end(small, capsys, monkeypatch):
    monkeypatch.setattr(cli, "check_backend", _self_check.check_backend)
    machine = StubMachine(counts_gain)
    assert cli.main(["--kernels", "counts", "scatter_add"], machine) == 0
    said = capsys.readouterr().out
    assert "BLOCK=512 num_warps=8" in said
    assert "self-check right" in said
    found = content(small)
    assert (found["format"], found["card"], found["copy_gb_per_s"]) == (1, H100.name, 1000.0)
    assert found["versions"]["torch"] == torch.__version__
    assert "done" not in found
    assert found["triton"] == {
        "kernels": tuned.kernels_hash("triton"),
        "launches": {"counts": {"set": asdict(FAST), "gain": 1.25}},
        "methods": {},
    }
    assert {architecture for _, architecture in machine.compiled} == {90}
    # It is in force from then on.
    tuned.forget()
    assert load("triton")._launches[CPU] == tuned.with_leaves(TritonLaunches(), {"counts": FAST})
    assert tuned.choose_file(CPU).reason == "measured on this card"
    assert not list(small.glob("*.part"))


def test_a_file_in_force_does_not_change_what_is_compared_with(small):
    arguments = ["--kernels", "counts"]
    assert cli.main(arguments, StubMachine(counts_gain)) == 0
    first = content(small)
    tuned.forget()
    assert cli.main(arguments, StubMachine(counts_gain)) == 0
    assert content(small) == first


def test_nothing_is_faster(small, capsys):
    assert cli.main(["--kernels", "counts"], StubMachine(lambda *call: 1.0)) == 0
    assert "the defaults stand" in capsys.readouterr().out
    assert content(small)["triton"]["launches"] == {}


@pytest.mark.parametrize(
    ("gains", "accepted"),
    [
        ([(1.03, 1.03), (1.2, 1.0609)], True),
        ([(1.029, 1.03), (2, 2)], False),
        ([(1.2, 0.98), (1.1, 1.1)], True),
        ([(1.5, 0.979), (1.1, 1.1)], False),
        ([(0.97, 1.5)], False),
    ],
)
def test_three_percent_everywhere_and_two_percent_slower_nowhere(gains, accepted):
    assert is_accepted([Gain(*gain) for gain in gains]) == accepted


@pytest.mark.parametrize(
    "slow",
    [
        lambda call, cold, repeats: repeats == search.ROUNDS[1],
        lambda call, cold, repeats: not cold,
        lambda call, cold, repeats: launch_of(call).args[5] == 40,
    ],
    ids=["round", "warm", "size"],
)
def test_what_is_slower_once_is_not_taken(small, slow):
    def cost(call, cold, repeats):
        return (1.05 if slow(call, cold, repeats) else 0.5) if is_fast(call) else 1.0

    launches = Subject(load("triton"), CPU).run("counts", Input(40, 9, 8)).launches
    assert launches[0].args[5] == 40
    assert cli.main(["--kernels", "counts"], StubMachine(cost)) == 0
    assert content(small)["triton"]["launches"] == {}


def test_wrong_settings_are_refused_before_they_are_timed(small, monkeypatch):
    backend = load("triton")
    launch = type(backend)._launch

    def wrong(self, kernel, grid, device, *args, **settings):
        if kernel.__name__ != "counts_kernel" or settings["num_warps"] != FAST.num_warps:
            launch(self, kernel, grid, device, *args, **settings)

    monkeypatch.setattr(type(backend), "_launch", wrong)
    assert cli.main(["--kernels", "counts"], StubMachine(counts_gain)) == 0
    assert content(small)["triton"]["launches"] == {}


def test_settings_that_cannot_be_launched_are_refused(small, monkeypatch):
    backend = load("triton")
    launch = type(backend)._launch

    def fails(self, kernel, grid, device, *args, **settings):
        if settings.get("num_warps") == FAST.num_warps:
            raise RuntimeError("out of resource: threads")
        launch(self, kernel, grid, device, *args, **settings)

    monkeypatch.setattr(type(backend), "_launch", fails)
    assert cli.main(["--kernels", "counts"], StubMachine(counts_gain)) == 0
    assert content(small)["triton"]["launches"] == {}


@pytest.mark.parametrize("usage", [Usage(spilled_bytes=8), Usage(error="no")])
def test_what_spills_or_does_not_compile_is_dropped(small, usage):
    machine = StubMachine(counts_gain)
    machine.usage = lambda job: usage if job.settings == FAST else Usage()
    assert cli.main(["--kernels", "counts"], machine) == 0
    assert content(small)["triton"]["launches"] == {}


def method_cost(call, cold, repeats):
    """Atomics lose where ids meet, sorting has a fixed cost; rows win where few lanes idle."""
    if launch_of(call) is not None:
        return 1.0
    method, operation = call.args
    given = operation.args[1]
    if method in ("rows", "flat"):
        words = given.embedding_dim // 2
        tile = max(min(next_power_of_2(words), WIDEST_ROWS), NARROWEST_ROWS)
        idle = -words % tile / (words + -words % tile)
        return 1.0 if (method == "rows") == (idle <= 0.25) else 2.0
    per_row = given.num_indices / given.num_embeddings
    hot = {"uniform": 1, "zipf": 2, "hot": 4}[given.skew]
    return {"atomic": 1 + per_row * hot, "sorted": 3.0, "sorted_atomic": 9.0}[method]


def test_limits_of_methods(small):
    assert cli.main(["--methods"], StubMachine(method_cost)) == 0
    part = content(small)["triton"]
    assert part["launches"] == {}
    assert set(part["methods"]) == {
        "gradient[atomic][float32]",
        "gradient[atomic][float64]",
        "gather",
    }
    tuned.forget()
    found = load("triton")._methods[CPU]
    assert found.gradient["sorted_atomic"][torch.float32] == Limit()
    # At one id a row hot ids cost 5 to 3, and uniform ones 2 to 3.
    for per_row, expected in ((0.25, "atomic"), (2, "sorted"), (16, "sorted")):
        number = int(per_row * 65_536)
        chosen = choose(number, 65_536, torch.float32, False, False, found.gradient)
        assert chosen == expected
    assert found.gather == GatherRule(0.25)
    assert all(entry["gain"] >= 1.03 for entry in part["methods"].values())


def test_methods_alone_keep_the_launches(small):
    assert cli.main(["--kernels", "counts"], StubMachine(counts_gain)) == 0
    launches = content(small)["triton"]["launches"]
    assert launches
    tuned.forget()
    assert cli.main(["--methods"], StubMachine(method_cost)) == 0
    assert content(small)["triton"]["launches"] == launches
    assert content(small)["triton"]["methods"]


def test_a_run_of_some_settings_keeps_the_others(small):
    assert cli.main(["--kernels", "counts"], StubMachine(counts_gain)) == 0
    launches = content(small)["triton"]["launches"]
    assert launches
    assert cli.main(["--methods"], StubMachine(method_cost)) == 0
    methods = content(small)["triton"]["methods"]
    assert cli.main(["--kernels", "take_rows"], StubMachine(lambda *_: 1.0)) == 0
    assert content(small)["triton"]["launches"] == launches
    assert content(small)["triton"]["methods"] == methods
    # What is searched again is replaced, here by nothing.
    assert cli.main(["--kernels", "counts"], StubMachine(lambda *_: 1.0)) == 0
    assert content(small)["triton"]["launches"] == {}
    assert content(small)["triton"]["methods"] == methods


@pytest.mark.parametrize("options", [["--kernels", "count"], ["--methods", "--kernels", "gath"]])
def test_a_name_that_no_settings_have_changes_no_file(small, capsys, options):
    assert cli.main(["--kernels", "counts"], StubMachine(counts_gain)) == 0
    before = content(small)
    assert cli.main([*options, "bogus"], StubMachine(counts_gain)) == 2
    assert "--kernels bogus: no such settings; there are " in capsys.readouterr().err
    assert content(small) == before


@pytest.mark.parametrize("option", ["--jobs", "--arch"])
@pytest.mark.parametrize("number", ["0", "-1", "9.0", "x"])
def test_a_number_that_is_none_is_refused(capsys, option, number):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["--dry-run", f"{option}={number}"], StubMachine(counts_gain))
    assert f"{number!r} is no whole number from 1" in capsys.readouterr().err


def test_a_device_by_its_kind_alone(small):
    assert cli.main(["--kernels", "counts", "--device", "cpu"], StubMachine(counts_gain)) == 0


def test_a_stopped_run_keeps_what_it_found_and_is_resumed(small, capsys):
    def stops_after_counts(call, cold, repeats):
        if launch_of(call).kernel != "counts_kernel":
            raise KeyboardInterrupt
        return counts_gain(call, cold, repeats)

    arguments = ["--kernels", "counts", "take_rows"]
    assert cli.main(arguments, StubMachine(stops_after_counts)) == 130
    assert "--resume" in capsys.readouterr().err
    half = content(small)
    assert half["done"] == ["triton.launches.counts"]
    assert half["triton"]["launches"]["counts"]["set"] == asdict(FAST)
    machine = StubMachine(counts_gain)
    assert cli.main([*arguments, "--resume"], machine) == 0
    assert {job.path for job, _ in machine.compiled} == {"take_rows"}
    half.pop("done")
    assert content(small) == half


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"card": A100.name}, "is of NVIDIA A100-SXM4-40GB, this is NVIDIA H100"),
        ({"multiprocessors": 114}, "is of NVIDIA H100"),
        ({"triton": {"kernels": "0"}}, "was measured with other triton kernels"),
        ({"done": None}, "is complete"),
        ({"format": 2}, "format 2 is not 1"),
    ],
)
def test_what_cannot_be_resumed(small, capsys, change, reason):
    assert cli.main(["--kernels", "counts"], StubMachine(counts_gain)) == 0
    changed = {"done": [], **content(small), **change}
    changed = {name: value for name, value in changed.items() if value is not None}
    (small / H100.file_name).write_text(json.dumps(changed))
    tuned.forget()
    assert cli.main(["--kernels", "counts", "--resume"], StubMachine(counts_gain)) == 2
    assert reason in capsys.readouterr().err
    assert content(small) == changed


@pytest.mark.parametrize("text", ["", "{", "[1]"])
def test_a_corrupted_file_is_not_resumed_but_replaced(small, capsys, text):
    small.mkdir()
    (small / H100.file_name).write_text(text)
    arguments = ["--kernels", "counts"]
    assert cli.main([*arguments, "--resume"], StubMachine(counts_gain)) == 2
    assert "is no tuned file" in capsys.readouterr().err
    assert cli.main(arguments, StubMachine(counts_gain)) == 0
    assert content(small)["triton"]["launches"]["counts"]["gain"] == 1.25


def test_a_folder_that_cannot_be_written_is_an_error_before_the_run(tmp_path, capsys):
    (tmp_path / "file").touch()
    machine = StubMachine(counts_gain)
    assert cli.main(["--out", str(tmp_path / "file" / "inside")], machine) == 2
    assert "cannot write in" in capsys.readouterr().err
    assert machine.compiled == []


def test_without_a_cache_folder_one_must_be_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv(user_cache.VARIABLE, "")
    assert cli.main(["--kernels", "counts"], StubMachine(counts_gain)) == 2
    assert "--out" in capsys.readouterr().err
    arguments = ["--kernels", "counts", "--out", str(tmp_path / "here")]
    assert cli.main(arguments, StubMachine(counts_gain)) == 0
    assert content(tmp_path / "here")["card"] == H100.name


def test_a_busy_card_is_refused(small, capsys):
    machine = StubMachine(counts_gain, busy=["python (pid 7)"])
    assert cli.main(["--kernels", "counts"], machine) == 2
    assert "cpu is busy: python (pid 7)" in capsys.readouterr().err
    assert cli.main(["--kernels", "counts", "--anyway"], machine) == 0


@pytest.mark.parametrize("cards", [(H100, A100), (H100, H100)], ids=["two", "alike"])
def test_one_file_for_each_kind_of_card(small, cards):
    assert cli.main(["--kernels", "counts"], StubMachine(counts_gain, cards)) == 0
    assert {path.name for path in small.iterdir()} == {card.file_name for card in cards}
    for card in cards:
        assert content(small, card)["card"] == card.name


def test_no_card(capsys):
    assert cli.main([], StubMachine(counts_gain, cards=())) == 2
    assert "there is no CUDA device here; --dry-run" in capsys.readouterr().err
    assert cli.main(["--device", "cuda:3"], StubMachine(counts_gain)) == 2
    assert "there is no cuda:3 here" in capsys.readouterr().err


def test_a_file_that_fails_the_self_check_is_not_left_in_force(small, capsys, monkeypatch):
    wrong = _self_check.Check("cpu", "triton", "wrong", "differs from the reference", 1.0)
    monkeypatch.setattr(cli, "check_backend", lambda name, device: wrong)
    assert cli.main(["--kernels", "counts"], StubMachine(counts_gain)) == 1
    assert "triton is wrong: differs from the reference" in capsys.readouterr().err
    assert [path.suffix for path in small.iterdir()] == [".wrong"]


def test_a_dry_run_needs_no_card(capsys):
    machine = StubMachine(counts_gain, cards=())
    machine.usage = lambda job: Usage(30, 8 * (job.path == "counts" and job.settings == FAST))
    arguments = ["--dry-run", "--kernels", "counts", "sort_keys", "--backend", "triton"]
    assert cli.main([*arguments, "--arch", "80"], machine) == 0
    said = capsys.readouterr().out
    number = len(machine.compiled)
    assert f"{number} candidates compiled for sm_80: {number - 1} kept, 1 dropped" in said
    assert said.count("dropped: it spills") == 1
    assert said.count("default") == 2
    machine.usage = lambda job: Usage(error="CompilationError: no")
    assert cli.main(arguments, machine) == 1
    assert cli.main(["--dry-run", "--kernels", "nothing"], machine) == 2


@pytest.mark.full
def test_candidates_are_compiled_in_processes_of_their_own(capsys):
    """For real, with nothing stubbed."""
    arguments = ["--dry-run", "--kernels", "counts", "--backend", "triton", "--jobs", "2"]
    assert cli.main(arguments) == 0
    said = capsys.readouterr().out
    assert " 0 dropped" not in said
    assert "failed" not in said


def test_other_processes_on_the_card_are_found(tmp_path, monkeypatch):
    lines = (
        f"GPU-abc, {os.getpid()}, python",
        "GPU-abc, 7, python3, -m",
        "GPU-def, 8, other",
        "No running processes found",
    )
    script = tmp_path / "nvidia-smi"
    script.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines))
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    properties = SimpleNamespace(uuid="abc")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert Machine().others(CPU) == ["python3 (pid 7)"]
    script.unlink()
    assert Machine().others(CPU) == []


def test_the_clock_takes_turns_and_medians(monkeypatch):
    """Events that count calls in place of a card's."""
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = len(log)

        def elapsed_time(self, end):
            assert end.at == self.at + 1
            return {"a": 2.0, "b": 4.0}[log[self.at]]

    properties = SimpleNamespace(L2_cache_size=1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(clock, "FLUSH_BYTES", 16)
    monkeypatch.setattr(clock, "COPY_BYTES", 16)
    one = clock.CudaClock(CPU)
    calls = [partial(log.append, name) for name in "ab"]
    assert one.times(calls, cold=True, repeats=2) == [2e-3, 4e-3]
    # Once each beforehand, where a kernel may still be compiled.
    assert "".join(log) == "ab" + "abab"
    log.clear()
    assert one.times(calls, cold=False, repeats=1) == [2e-3, 4e-3]
    assert "".join(log) == "ab" + "aabb"
