"""The suite itself: its tiers, where GPU tests are collected, and the faults that it must find."""

import itertools
import os
import re
import subprocess
import sys

import mutations
import pytest
import targets
import tiers
from commands import ROOT, check

PRODUCT = [
    dict(zip("abcd", case, strict=True))
    for case in itertools.product(range(4), range(5), range(2), range(3))
]


def pairs_of(cases):
    return {pair for case in cases for pair in itertools.combinations(case.items(), 2)}


@pytest.mark.parametrize(
    "exists",
    [lambda case: True, lambda case: case["a"] != 2 or case["b"] < 2 or case["d"] == 1],
    ids=["all cases", "some cases"],
)
def test_pairwise_cases_hold_every_pair_that_exists(exists):
    cases = [case for case in PRODUCT if exists(case)]
    chosen = tiers.pairwise(cases)
    assert pairs_of(cases[index] for index in chosen) == pairs_of(cases)
    # No fewer than the two longest parameters have pairs, and far fewer than the product.
    assert len(chosen) < len(cases) / 3
    assert chosen == sorted(set(chosen)) == tiers.pairwise(cases)


def test_two_parameters_and_those_set_together_keep_every_case():
    two = [{"a": a, "b": b, "with b": b, "one": 0} for a in range(4) for b in range(5)]
    assert tiers.pairwise(two) == list(range(20))
    assert tiers.pairwise([{}]) == [0]
    assert tiers.pairwise([]) == []


def test_a_case_exists_where_the_conditions_on_its_parameters_hold():
    conditions = [lambda a, b: a < b, lambda c: False]
    assert tiers.exists({"a": 1, "b": 2}, conditions)
    assert not tiers.exists({"a": 2, "b": 2}, conditions)
    assert not tiers.exists({"a": 1, "b": 2, "c": 3}, conditions)


def test_files_of_the_full_tier_exist():
    assert all((ROOT / name).is_file() for name in tiers.FULL_FILES)


def test_ci_runs_commands_that_exist():
    script = (ROOT / ".ci/run").read_text()
    commands = re.findall(r"^ *(?:tests )?(make .+)", script, re.MULTILINE)
    named = ["lint", "docs", "test", "test-all", "torchrec"]
    assert [command.split()[1] for command in commands] == named
    for command in commands:
        check(command)


@pytest.mark.skipif(targets.CUDA or targets.REQUIRE_GPU, reason="GPU tests are collected here")
def test_without_a_card_no_gpu_test_is_collected(request):
    header = request.config.hook.pytest_report_header(
        config=request.config, start_path=request.config.rootpath
    )
    lines = [line for part in header for line in ([part] if isinstance(part, str) else part)]
    for target in targets.ALL:
        if target.device == "cuda":
            assert f"{target}: no CUDA device" in lines
    for item in request.session.items:
        params = item.callspec.params.values() if hasattr(item, "callspec") else ()
        used = [value for value in params if isinstance(value, targets.Target)]
        assert all(target.device == "cpu" for target in used), item.name
    assert not any(item.get_closest_marker("gpu") for item in request.session.items)


@pytest.mark.full
def test_where_a_card_is_required_and_missing_gpu_tests_fail():
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider"]
        + ["tests/api/test_forward.py", "-k", "padding_row", "tests/gpu/test_gpu.py"],
        cwd=ROOT,
        env={**os.environ, "GPU_EMBED_REQUIRE_GPU": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 1, ran.stdout
    assert "GPU_EMBED_REQUIRE_GPU=1 and there is no CUDA device" in ran.stdout
    failed = re.findall(r"^ERROR .*?\[(\S+)\]", ran.stdout, re.MULTILINE)
    assert failed == [str(target) for target in targets.ALL if target.device == "cuda"]


def test_each_mutation_fits_the_code():
    """Its old text occurs once, so that the list cannot rot."""
    names = [mutation.name for mutation in mutations.MUTATIONS]
    assert len(names) == len(set(names)) == 16
    for mutation in mutations.MUTATIONS:
        assert (ROOT / mutation.file).read_text().count(mutation.old) == 1, mutation.name
        assert mutation.old != mutation.new
        assert not tiers.FULL_FILES & set(mutation.tests)


def test_a_mutation_that_is_not_there_is_refused():
    with pytest.raises(SystemExit):
        mutations.main(["no such fault"])
