"""`bench/on_card.sh` from start to end without a card: python3 and what belongs to a card are stubs on the PATH."""

import os
import re
import shlex
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from commands import MODULES, ROOT

from gpu_embed.bench import cli, probes
from gpu_embed.bench.run import plan

pytestmark = pytest.mark.skipif(os.name == "nt", reason="bash and signals")

SCRIPT = ROOT / "bench/on_card.sh"
# What a machine with a card has on its PATH. The stubs keep what they were called with, and do as the test says.
STUB = """#!/usr/bin/env bash
printf '%q ' "${0##*/}" "$@" >>"$CALLS"; echo >>"$CALLS"
case "$*" in
  *"${HANG:-nothing}"*) trap "${ON_SIGINT:-exit 1}" INT; echo begun; sleep 60 & echo $! >"$CALLS.worker"; wait; wait ;;
  *"${FAIL:-nothing}"*) echo "FAILED tests/a.py::test_b - it broke"; echo more; exit 1 ;;
  *"${TALK:-nothing}"*) head -c 3000000 /dev/zero | tr '\\0' x; echo; echo the end ;;
esac
"""
TOOLS = ("python3", "ncu", "compute-sanitizer")
# So short a budget makes seconds of all limits.
SHORT = {"BUDGET": "54"}


@dataclass
class Run:
    """One run of the script that has ended, or that still goes on."""

    folder: Path
    process: subprocess.Popen
    said: str = ""

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def calls(self) -> list[list[str]]:
        path = self.folder / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        # bash quotes what has a line's end as $'...'; no argument of a test or a measurement has one.
        return [shlex.split(line) for line in lines if "$'" not in line]

    def end(self) -> "Run":
        self.said, _ = self.process.communicate(timeout=50)
        return self

    def worker_is_alive(self) -> bool:
        """Whether what a hanging step has started still runs; who was killed may wait to be buried."""
        status = Path("/proc", (self.folder / "calls.worker").read_text().strip(), "stat")
        return status.exists() and status.read_text().split()[2] != "Z"

    def logs(self) -> dict[str, str]:
        with tarfile.open(self.out / "results.tar.gz") as archive:
            names = [name for name in archive.getnames() if name.endswith(".log")]
            return {Path(name).stem: archive.extractfile(name).read().decode() for name in names}


@pytest.fixture
def start(tmp_path):
    """Start the script with stubs; what it leaves behind is killed."""
    begun = []

    def started(*arguments: str, out: str | Path = tmp_path / "out", **environ: str) -> Run:
        folder = tmp_path / "bin"
        folder.mkdir()
        for name in TOOLS:
            (folder / name).write_text(STUB)
        (folder / "nvidia-smi").write_text("#!/bin/sh\necho 81559\n")
        for stub in folder.iterdir():
            stub.chmod(0o755)
        kernels = tmp_path / "triton"
        kernels.mkdir()
        (kernels / "kernel.cubin").write_bytes(b"compiled")
        environ = {
            "PATH": f"{folder}:/usr/bin:/bin",
            "CALLS": str(tmp_path / "calls"),
            "TMPDIR": str(tmp_path),
            "TRITON_CACHE_DIR": str(kernels),
            **environ,
        }
        process = subprocess.Popen(
            [SCRIPT, *arguments, out],
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        begun.append(process)
        return Run(tmp_path, process)

    yield started
    for process in begun:
        process.kill()
        process.wait()


def steps_of(said: str) -> list[str]:
    return re.findall(r"^== ([\w-]+)", said, re.MULTILINE)


@pytest.mark.parametrize("mode", [[], ["--whole"]], ids=["short", "whole"])
def test_every_step_starts(start, mode):
    run = start(*mode).end()
    assert run.process.returncode == 0, run.said
    steps = steps_of(run.said)
    assert steps[:2] == ["machine", "self-check"]
    assert len(steps) == len(set(steps)) > 18
    # A call of nvidia-smi's, and one that has several lines, are not in the list.
    assert len(run.calls) == len(steps) - 1
    assert sorted(run.logs()) == sorted(steps)
    assert run.said == (run.out / "summary.txt").read_text()
    assert run.said.splitlines()[-1].endswith("0 failed, 0 skipped: none")
    assert sorted(path.name for path in run.folder.iterdir()) == ["bin", "calls", "out", "triton"]


@pytest.mark.full
@pytest.mark.parametrize("mode", [[], ["--whole"]], ids=["short", "whole"])
def test_files_are_few_and_hold_the_compiled_kernels(start, mode):
    run = start(*mode, TALK="probes launches").end()
    files = sorted(run.out.iterdir())
    assert [path.name for path in files] == ["kernels.tar.gz.0", "results.tar.gz", "summary.txt"]
    with tarfile.open(files[0]) as archive:
        assert archive.extractfile("./kernel.cubin").read() == b"compiled"
    log = run.logs()["launches"]
    assert 10**6 < len(log) < 2**20
    assert "\n... cut here ...\n" in log
    assert log.endswith("x\nthe end\n")


def test_limits_fit_into_the_budget(start):
    run = start().end()
    limits = [int(limit) for limit in re.findall(r"at most (\d+) s", run.said)]
    assert len(limits) == len(steps_of(run.said))
    # The first steps have their time whatever each of them takes.
    assert sum(limits[:10]) <= 520
    assert max(limits) <= 120


@pytest.mark.full
@pytest.mark.parametrize("on_sigint", ["exit 1", ":"], ids=["ends", "goes on"])
def test_a_step_that_hangs_is_stopped_at_its_limit(start, on_sigint):
    begin = time.monotonic()
    run = start(HANG="probes no-compiler", ON_SIGINT=on_sigint, **SHORT).end()
    assert time.monotonic() - begin < 30
    assert run.process.returncode == 1
    assert re.search(r"no-compiler: stopped at its limit after [2-5] s", run.said)
    assert run.logs()["no-compiler"].startswith("begun")
    assert not run.worker_is_alive()
    assert steps_of(run.said)[-1] == "memcheck"
    assert "FAILED no-compiler: stopped at its limit" in run.said.splitlines()[-2]


@pytest.mark.full
def test_a_spent_budget_skips_the_rest_in_words(start):
    begin = time.monotonic()
    # Each measurement is stopped after a second, and killed after another.
    run = start(HANG="--providers", ON_SIGINT=":", BUDGET="10").end()
    assert time.monotonic() - begin < 11.5
    assert run.process.returncode == 1
    skipped = re.findall(r"^-- ([\w-]+): skipped, the budget of 10 s is spent$", run.said, re.M)
    assert len(skipped) > 3
    assert skipped[-1] == "memcheck"
    assert f"{len(skipped)} skipped: {' '.join(skipped)}\n" in run.said


def test_a_failed_self_check_stops_everything(start):
    run = start(FAIL="probes self-check").end()
    assert run.process.returncode == 1
    assert steps_of(run.said) == ["machine", "self-check"]
    assert "nothing else can be believed" in run.said
    assert run.said.splitlines()[-2] == "FAILED self-check: exit code 1"


@pytest.mark.full
def test_failures_come_last_and_stop_nothing(start):
    run = start(FAIL="-m pytest").end()
    assert run.process.returncode == 1
    assert steps_of(run.said)[-1] == "memcheck"
    last = run.said[run.said.index("FAILED gpu-tests:") :].splitlines()
    failed = ["gpu-tests", "triton-operations", "cupy-operations", "memcheck"]
    shown = "  FAILED tests/a.py::test_b - it broke"
    assert last == [line for name in failed for line in (f"FAILED {name}: exit code 1", shown)]


@pytest.mark.full
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=str)
def test_an_interrupted_run_packs_what_there_is(start, sent):
    run = start(HANG="gpu-tests")
    end = time.monotonic() + 30
    while not (run.folder / "calls.worker").exists() and time.monotonic() < end:
        time.sleep(0.02)
    ended = ["machine", "self-check", "first-lookup-in-a-graph", "no-compiler", "bad-ids"]
    # Whoever kills it without a warning finds these.
    assert sorted(run.logs()) == sorted(ended)
    run.process.send_signal(sent)
    run.end()
    assert run.process.returncode == 128 + sent
    assert run.logs()["gpu-tests"].startswith("begun")
    assert (run.out / "kernels.tar.gz.0").exists()
    assert "   stopped" in run.said.splitlines()
    assert not run.worker_is_alive()
    left = sorted(path.name for path in run.folder.iterdir())
    assert left == ["bin", "calls", "calls.worker", "out", "triton"]


@pytest.mark.full
def test_without_tools_of_the_card_their_steps_are_left_out(start, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "TOOLS", ("python3",))
    run = start("--whole").end()
    assert run.process.returncode == 0
    assert "-- ncu: ncu is not on the PATH" in run.said
    assert "-- sanitizers: compute-sanitizer is not on the PATH" in run.said


@pytest.mark.parametrize("arguments", [[], ["--help"], ["a", "b"]], ids=str)
def test_wrong_arguments_are_refused(arguments, tmp_path):
    done = subprocess.run([SCRIPT, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "usage: bench/on_card.sh [--whole] OUT\n"


@pytest.mark.parametrize("budget", ["abc", "0", "-5", "1e3", "60.5", "09"])
def test_a_budget_that_is_no_number_is_refused(start, budget):
    run = start(BUDGET=budget).end()
    assert run.process.returncode == 2
    assert run.said == f"BUDGET={budget}: give whole seconds, from 1\n"
    assert not run.out.exists()


def test_a_folder_that_cannot_be_written_is_refused_before_the_first_step(start, tmp_path):
    # Root may write wherever there is no folder in the way.
    (tmp_path / "out/summary.txt").mkdir(parents=True)
    run = start().end()
    assert run.process.returncode == 2
    assert "summary.txt" in run.said
    assert steps_of(run.said) == []


def test_the_search_path_of_cd_leads_nowhere_else(start, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = start(out="out", CDPATH=str(tmp_path)).end()
    assert run.process.returncode == 0, run.said
    assert run.said == (run.out / "summary.txt").read_text()


@pytest.mark.parametrize("mode", [[], ["--whole"]], ids=["short", "whole"])
def test_what_it_runs_exists(start, mode):
    """Probes by their names, measurements by cells that there are and providers that measure them."""
    asked = []
    for call in start(*mode).end().calls:
        words = call[call.index("-m") + 2 :] if "-m" in call else []
        module = call[call.index("-m") + 1]
        if module == "gpu_embed.bench.probes":
            asked.append(words[0])
        elif module in MODULES:
            args = MODULES[module](words)
            if module == "gpu_embed.bench" and args.command == "run":
                jobs = plan(cli.read_choice(args), torch.device("cuda"))
                assert {job.provider.name for job in jobs} == set(args.providers)
                for provider in {job.provider for job in jobs}:
                    assert {job.mode for job in jobs} & set(provider.modes), words
        else:
            assert module == "pytest", call
    assert sorted(asked) == sorted(probes.PROBES)


@pytest.mark.full
@pytest.mark.parametrize("mode", [[], ["--whole"]], ids=["short", "whole"])
def test_each_selection_of_tests_selects_some(start, mode):
    calls = [
        call[call.index("pytest") + 1 :] for call in start(*mode).end().calls if "pytest" in call
    ]
    selections = []
    for words in calls:
        files = [word for word in words if word.startswith("tests/")]
        assert all((ROOT / file).exists() for file in files)
        for option in ("-n", "--dist", "--junitxml"):
            if option in words:
                del words[words.index(option) : words.index(option) + 2]
        # What selects from one folder selects from all, and it takes minutes to collect these.
        selections.append(words if files else [*words, "tests/gpu"])
    for words in (words for i, words in enumerate(selections) if words not in selections[:i]):
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "--collect-only", "-n0", *words],
            cwd=ROOT,
            env={**os.environ, "GPU_EMBED_REQUIRE_GPU": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, (words, done.stdout[-2000:])
        found = re.findall(r"^tests/.*::.*", done.stdout, re.MULTILINE)
        assert found, words
        # Whatever it is: it needs a card.
        assert not [name for name in found if "-cpu" in name], words
