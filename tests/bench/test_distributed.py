"""A table spread over ranks: what is made of the ranks' words, and real ranks on gloo."""

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

pytest.importorskip("rich", reason="the benchmark's extra is not installed")

from gpu_embed.bench import cli, distributed, loopback, row_csv
from gpu_embed.bench.distributed import Shape

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="torch is built without gloo",
)

SHAPE = Shape("rowwise", ranks=2, rows=1000, dim=8, ids=512, rounds=3, has_namespace=False)
ROUNDS = [
    {"seconds": {"torch": 4.0, "gpu_embed": 1.0}},
    {"seconds": {"torch": 2.0, "gpu_embed": 1.5}},
    {"seconds": {"torch": 3.0, "gpu_embed": 1.5}},
]
END = {
    "equal": True,
    "cpu_seconds": {"torch": 0.02, "gpu_embed": 0.005},
    "sent_bytes": {"torch": 1000, "gpu_embed": 990},
    "gradient_bytes": {"torch": 2048, "gpu_embed": 1024},
}
NETWORK = """\
Inter-|   Receive        |  Transmit
 face |bytes packets     |bytes packets
    lo: 11 12 0 0 0 0 0 0 {sent} 22 0 0 0 0 0 0
  eth0: 31 32 0 0 0 0 0 0 41 42 0 0 0 0 0 0
"""


def ranks_that_say(monkeypatch, *lines, then=""):
    code = f"print({chr(10).join(map(json.dumps, lines))!r}, flush=True)\n{then}"
    monkeypatch.setattr(distributed, "command", lambda shape: [sys.executable, "-c", code])
    monkeypatch.setattr(loopback, "has_namespaces", lambda: False)


def test_medians_are_of_times_and_of_the_quotients_of_each_round(monkeypatch):
    ranks_that_say(monkeypatch, *ROUNDS, END)
    advanced = []
    theirs, ours = distributed.measure_distributed(SHAPE, lambda: advanced.append(1))
    assert len(advanced) == 4
    assert (theirs.layer, theirs.ms_p50, theirs.times_theirs_p50) == ("torch", 3000, 1)
    assert (ours.layer, ours.ms_p50, ours.times_theirs_p50) == ("gpu_embed", 1500, 0.5)
    assert ours.times_theirs_p20 == pytest.approx(0.35)
    assert (theirs.cpu_ms, ours.cpu_ms) == (20, 5)
    assert (ours.sent_bytes, ours.sent_counted, ours.gradient_bytes) == (990, "collectives", 1024)


def test_the_command_prints_and_writes_its_rows(monkeypatch, tmp_path, capsys):
    ranks_that_say(monkeypatch, *ROUNDS, END)
    out = tmp_path / "a.csv"
    assert cli.main(["distributed", "--ranks", "2", "--rounds", "3", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "1,000,000 x 64 fp32" in said
    assert "as what collectives are given" in said
    assert re.search(
        r"2 │ gpu_embed │ +1500 │ +0\.50 \(0\.\d+ to 0\.\d+\) │ +5 \(0\.25\) │ .* 0\.99 │", said
    )
    assert re.search(r"1\.0 KiB │ +0\.5 │ yes", said)
    rows = row_csv.read(out, distributed.ShardedStep, "other columns")
    assert [row.layer for row in rows] == ["torch", "gpu_embed"]
    assert {(row.ranks, row.rows, row.dim, row.ids) for row in rows} == {(2, 1_000_000, 64, 4096)}


def test_a_result_that_is_not_equal_ends_with_1(monkeypatch, capsys):
    ranks_that_say(monkeypatch, *ROUNDS, {**END, "equal": False})
    assert cli.main(["distributed", "--ranks", "2", "--rounds", "3"]) == 1
    assert "│ NO " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--ranks", "0"], "--ranks 0: expected a whole number"),
        (["--rows", "1e12"], "--rows, --dim and --ranks need"),
        (["--pairs", "rowwise", "other"], "unknown pair 'other': choose from rowwise, distinct"),
        (["--out", "."], "is a folder: name a file in --out"),
        (["--ranks", "4", "--rows", "5"], "of 4 ranks one has none of 5 rows"),
    ],
)
def test_what_cannot_be_measured_is_said_in_one_sentence(options, said, monkeypatch, capsys):
    ranks_that_say(monkeypatch)
    assert cli.main(["distributed", *options]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_pair_without_its_package_says_what_installs_it(monkeypatch, capsys):
    ranks_that_say(monkeypatch)
    needs = distributed.Pair("any", "theirs", packages=("no_such_package",))
    monkeypatch.setitem(distributed.PAIRS, "exchange", needs)
    assert cli.main(["distributed", "--pairs", "rowwise", "exchange"]) == 2
    said = "--pairs exchange needs no_such_package: `make torchrec`, in a clone, installs it"
    assert said in capsys.readouterr().err


def test_bags_take_whole_bags_alone(monkeypatch, capsys):
    ranks_that_say(monkeypatch)
    pair = dataclasses.replace(distributed.PAIRS["bags-fused"], packages=())
    monkeypatch.setitem(distributed.PAIRS, "bags-fused", pair)
    assert cli.main(["distributed", "--pairs", "bags-fused", "--ids", "40"]) == 2
    assert "--pairs bags-fused takes a multiple of 16 --ids, got 40" in capsys.readouterr().err


def test_ranks_that_fail_end_it_with_their_last_words(monkeypatch, capsys):
    ranks_that_say(monkeypatch, *ROUNDS, then="raise RuntimeError('no such network')")
    assert cli.main(["distributed", "--ranks", "2", "--rounds", "3"]) == 2
    assert "2 ranks: RuntimeError: no such network\n" in capsys.readouterr().err


def test_the_counter_is_what_the_loopback_has_sent(monkeypatch, tmp_path):
    monkeypatch.setattr(loopback, "COUNTERS", tmp_path / "dev")
    loopback.COUNTERS.write_text(NETWORK.format(sent=12345))
    assert loopback.sent_bytes() == 12345


def test_a_machine_without_namespaces_is_noticed(monkeypatch):
    for command in ("false", "no-such-command"):
        monkeypatch.setattr(loopback, "UNSHARE", (command,))
        assert not loopback.has_namespaces()


@pytest.mark.full
@pytest.mark.parametrize("way", ["collectives", "loopback"])
def test_real_ranks(way):
    """What is sent is the output, once: each of two ranks sends half of it in each half of the all-reduce."""
    if way == "loopback" and not loopback.has_namespaces():
        pytest.skip("no network namespaces here")
    output = 4096 * 64 * 4
    shape = Shape("rowwise", 2, 5000, 64, 4096, 2, has_namespace=way == "loopback")
    theirs, ours = distributed.measure_distributed(shape)
    for step in (theirs, ours):
        assert step.equal
        assert output <= step.sent_bytes < 1.02 * output
        assert step.ms_p50 > 0
    assert theirs.sent_counted == ours.sent_counted == way
    # Torch's layer makes all of it on each rank.
    assert theirs.gradient_bytes == 5000 * 64 * 4
    assert ours.gradient_bytes == theirs.gradient_bytes // 2


@pytest.mark.full
@pytest.mark.parametrize("pair", [name for name in distributed.PAIRS if name != "rowwise"])
def test_real_ranks_with_ids_of_their_own(pair):
    for package in distributed.PAIRS[pair].packages:
        pytest.importorskip(package)
    theirs, ours = distributed.measure_distributed(Shape(pair, 2, 5000, 64, 1024, 2, False))
    assert theirs.equal
    assert ours.equal
    assert theirs.gradient_bytes >= ours.gradient_bytes or pair == "exchange"
    same, distinct = 1.02 * theirs.sent_bytes, theirs.sent_bytes / 2
    assert 0 < ours.sent_bytes <= (same if pair.startswith("bags") else distinct)


@pytest.mark.full
@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
def test_ctrl_c_ends_all_ranks():
    command = [sys.executable, "-m", "gpu_embed.bench", "distributed", "--rows", "5000"]
    with subprocess.Popen(
        [*command, "--rounds", "100_000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            wait_for(lambda: processes_of(process.pid) >= 4)
            time.sleep(1)
            os.killpg(process.pid, signal.SIGINT)
            _, said = process.communicate(timeout=30)
        finally:
            # Whatever happened: it would go on for an hour.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130, said
    assert said == "\npython -m gpu_embed.bench: interrupted\n"
    wait_for(lambda: processes_of(process.pid) == 0)


def processes_of(session: int) -> int:
    listed = subprocess.run(["ps", "-o", "pid=", "-s", str(session)], capture_output=True)
    return len(listed.stdout.split())


def wait_for(happened, seconds=60.0):
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.full
def test_collectives_alone_are_summed():
    """Not what wraps their outputs, nor what waits for them."""
    from process_groups import one_process
    from torch.distributed import _functional_collectives as collectives

    from gpu_embed.bench import sharded_step

    with one_process(), sharded_step.GivenBytes() as given:
        summed = collectives.all_reduce(torch.ones(8), "sum", torch.distributed.group.WORLD)
        assert summed.sum() == 8
    assert given.total == 32
