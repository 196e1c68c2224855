"""The first lookup of a process, timed in processes of its own."""

import pytest
import torch

pytest.importorskip("rich", reason="the benchmark's extra is not installed")

from gpu_embed.bench import cli, cold_start

CPU = torch.device("cpu")


def test_every_way_is_started_anew_and_medians_are_taken(monkeypatch):
    """In turns; the first of each is not counted, and only an empty cache is another one each time."""
    asked = []

    def start(who, device, cache):
        asked.append((who, cache.name))
        return [float(len(asked))] * len(cold_start.PHASES)

    monkeypatch.setattr(cold_start, "_start", start)
    advanced = []
    found = cold_start.measure_cold_start(CPU, 3, lambda: advanced.append(1))
    ways = cold_start.ways(CPU)
    assert [one.way for one in found] == ways
    assert len(asked) == len(advanced) == 4 * len(ways)
    assert [who for who, _ in asked] == [way.who for way in ways] * 4
    for number, one in enumerate(found):
        # Turns 1, 2 and 3 of 0 to 3.
        assert set(one.seconds.values()) == {2 * len(ways) + number + 1}
        caches = {cache for _, cache in asked[number :: len(ways)]}
        assert len(caches) == (1 if one.way.warm else 4)


@pytest.mark.full
def test_a_start_goes_up_to_the_driver(tmp_path):
    """Triton is imported and compiles within the first lookup; a second start finds the kernels."""
    pytest.importorskip("triton")
    for _ in range(2):
        laps = cold_start._start("triton", CPU, tmp_path)
        assert len(laps) == len(cold_start.PHASES)
        assert all(lap >= 0 for lap in laps)
        # The gather's kernel, and what a gradient launches.
        kernels = sorted(path.name for path in tmp_path.glob("*/*.cubin"))
        assert len(kernels) >= 2
        assert "gather" in kernels[0]


def test_the_table_of_a_cold_start(capsys, monkeypatch):
    laps = [1.0, 0.25, 0.0, 0.125, 2.0]
    monkeypatch.setattr(cold_start, "_start", lambda *arguments: laps)
    assert cli.main(["--device", "cpu", "cold-start", "--starts", "2"]) == 0
    said = capsys.readouterr().out
    assert "median of 2 starts" in said
    for way in cold_start.ways(CPU):
        line, *_ = (line for line in said.splitlines() if f"│ {way.name} " in line)
        assert [float(word) for word in line.split() if "." in word] == [*laps, sum(laps)]


def test_a_start_that_fails_is_an_error_in_one_sentence(capsys, monkeypatch):
    monkeypatch.setattr(cold_start, "CHILD", cold_start.CHILD.with_name("nothing.py"))
    assert cli.main(["--device", "cpu", "cold-start", "--starts", "1"]) == 2
    said = capsys.readouterr().err
    assert "No such file or directory" in said
    assert said.count("\n") == 1
    assert cli.main(["--device", "cpu", "cold-start", "--starts", "0"]) == 2
    assert "--starts 0: at least 1 is needed" in capsys.readouterr().err
