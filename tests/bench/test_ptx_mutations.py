"""Faults in the compiled code: the target ptx-cpu notices them, and what it misses is listed."""

import subprocess
import sys
from importlib.metadata import version

import ptx_backend
import ptx_mutations
import pytest
import targets
import torch
from cases import same_bits, table
from commands import ROOT
from ptx_mutants import mutants, shape

from gpu_embed.bench.ptx import launch as ptx_launch
from gpu_embed.bench.ptx.machine import Program
from gpu_embed.bench.ptx.parse import PtxError

if reason := targets.unusable_reason(targets.PTX[0]):
    pytest.skip(reason, allow_module_level=True)
COMMITTED_TRITON = next(
    line.partition("==")[2]
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line.startswith("triton==")
)


@pytest.mark.parametrize(
    ("instruction", "changes"),
    [
        ("ret", {}),
        (
            "@%p1 st.global.b32 [ %rd1 + 8 ], { %r2 }",
            {
                "dropped": "nop",
                "predicate negated": "@!%p st.global.b32 [%rd + 8], {%r}",
                "predicate removed": "st.global.b32 [%rd + 8], {%r}",
                "32 bits -> 16": "@%p st.global.b16 [%rd + 8], {%r}",
                "address + 1 item": "@%p st.global.b32 [%rd+12], {%r}",
                "address - 1 item": "@%p st.global.b32 [%rd+4], {%r}",
            },
        ),
        (
            "setp.lt.s64 %p1, %rd1, 7",
            {
                "dropped": "nop",
                "off by one": "setp.le.s64 %p, %rd, 7",
                "negated": "setp.ge.s64 %p, %rd, 7",
                "64 bits -> 32": "setp.lt.s32 %p, %rd, 7",
                "sign": "setp.lt.u64 %p, %rd, 7",
                "constant + 1": "setp.lt.s64 %p, %rd, 8",
                "constant - 1": "setp.lt.s64 %p, %rd, 6",
                "operands swapped": "setp.lt.s64 %p, 7, %rd",
            },
        ),
        (
            "atom.global.gpu.relaxed.add.v2.f32 {%f1, %f2}, [%rd1], {%f3, %f4}",
            {
                "dropped": "nop",
                "add -> exch": "atom.global.gpu.relaxed.exch.v2.f32 {%f, %f}, [%rd], {%f, %f}",
                "add -> max": "atom.global.gpu.relaxed.max.v2.f32 {%f, %f}, [%rd], {%f, %f}",
                "address + 1 item": "atom.global.gpu.relaxed.add.v2.f32 {%f, %f}, [%rd+8], {%f, %f}",
                "address - 1 item": "atom.global.gpu.relaxed.add.v2.f32 {%f, %f}, [%rd+-8], {%f, %f}",
                "two items swapped": "atom.global.gpu.relaxed.add.v2.f32 {%f, %f}, [%rd], {%f, %f}",
            },
        ),
    ],
)
def test_the_changes_of_an_instruction(instruction, changes):
    program = Program(f".entry try() {{\n{instruction};\n}}")
    assert {mutant.kind: shape(mutant.new) for mutant in mutants(program)} == changes
    assert all(mutant.old.text == instruction for mutant in mutants(program))


def look_up():
    """What a test with two ids may do."""
    weight = table(9, 5, torch.float32, "cpu")
    output = ptx_backend.CheckedPtxBackend().embedding(weight, torch.tensor([0, 8]), -1, None)
    assert same_bits(output, weight[[0, 8]])


def passes():
    try:
        look_up()
    except (AssertionError, PtxError):
        return False
    return True


def test_a_test_fails_where_the_compiled_code_is_wrong_for_other_ids_than_its_own(monkeypatch):
    monkeypatch.setattr(ptx_backend, "seen", {})
    look_up()
    ((ptx, of),) = ptx_backend.seen.items()
    program, read = of.program, ptx_launch._program
    for mutant in mutants(program):
        changed = mutant.of(program)
        monkeypatch.setattr(
            ptx_launch,
            "_program",
            lambda text, changed=changed: changed if text == ptx else read(text),
        )
        if passes():
            ptx_backend.seen.clear()
            if not passes():
                return
            ptx_backend.seen[ptx] = of
    pytest.fail("the test sees as much as the check")


def test_a_list_that_is_not_exact_is_told_from_one_that_is():
    row = ptx_mutations.Row("k", "line", "add", "dropped", "few ids", "1", "why")
    key = row[:5]
    assert ptx_mutations.differences({key: row}, {key: row}) == []
    more = row._replace(count="2")
    unreasoned = row._replace(reason=ptx_mutations.NO_REASON)
    for old, new, problem in (
        ({}, {key: row}, "not listed: k, line"),
        ({key: row}, {}, "listed, but noticed: k, line"),
        ({key: row}, {key: more}, "1 listed, 2 survive"),
        ({key: unreasoned}, {key: row}, "no reason: k, line"),
    ):
        (found,) = ptx_mutations.differences(old, new)
        assert found.startswith(problem)


@pytest.mark.full
@pytest.mark.skipif(
    version("triton") != COMMITTED_TRITON, reason="another Triton compiles to other instructions"
)
def test_changed_instructions_are_noticed_or_listed():
    """At least ENOUGH of those that are live, and tests/support/ptx_survivors.csv has each of the others."""
    ran = subprocess.run(
        [sys.executable, "tests/support/ptx_mutations.py"], cwd=ROOT, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
