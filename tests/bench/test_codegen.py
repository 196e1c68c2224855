"""The codegen command but for the compiler: what it reads, its table, its verdicts. All rows are synthetic."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("rich", reason="the benchmark's extra is not installed")

from compiled import compiled_from_json

from gpu_embed.bench import cli, occupancy
from gpu_embed.bench.codegen import cases as codegen_cases
from gpu_embed.bench.codegen import compile as codegen
from gpu_embed.bench.codegen import table as codegen_table
from gpu_embed.bench.codegen.compile import Compiled
from gpu_embed.bench.codegen.instructions import (
    Instruction,
    MachineCode,
    natural_loops,
    read_machine_code,
    read_ptx,
)
from gpu_embed.bench.codegen.table import Row, worse
from gpu_embed.bench.occupancy import MULTIPROCESSORS

BASE = Row(
    kernel="sum_kernel",
    config="sorted-D64-float32",
    sm=90,
    settings="D=64 BLOCK=256",
    num_warps=4,
    registers=64,
    spilled_bytes=0,
    shared_bytes=0,
    resident_warps=32,
    max_warps=64,
    limit="registers",
    load_bytes=16,
    store_bytes=16,
    atomic_bytes=8,
    bulk="load store",
    accesses="load ids 8, load weight 16",
    loop_instructions=100,
    loop_accesses=10,
    triton="3.7.1",
)

# Each is worse than BASE, and says so in these words.
WORSE = {
    "spills": ({"spilled_bytes": 24}, "spills 24 bytes a thread, was 0"),
    "few spills": ({"spilled_bytes": 8}, "spills 8 bytes a thread, was 0"),
    "load": ({"load_bytes": 8}, "the widest load is 8 bytes, was 16"),
    "store": ({"store_bytes": 0}, "the widest store is 0 bytes, was 16"),
    "atomic": ({"atomic_bytes": 4}, "the widest atomic is 4 bytes, was 8"),
    "pointer": (
        {"accesses": "load ids 8, load weight 4"},
        "load weight has an access of 4 bytes, had none under 16",
    ),
    "bulk": ({"bulk": "load"}, "no bulk store any more"),
    "occupancy": ({"resident_warps": 28, "registers": 72}, "28 warps fit on a multiprocessor"),
    "loop": ({"loop_instructions": 111}, "111 instructions in the innermost loop, were 100"),
}
# What a kernel promises with any version of Triton.
PROMISED = {"spills", "load", "store", "atomic", "pointer", "bulk"}


@pytest.mark.parametrize("name", WORSE)
def test_what_is_worse_is_said(name):
    changes, said = WORSE[name]
    (problem,) = worse([BASE], [replace(BASE, **changes)])
    assert problem.startswith(f"sum_kernel sorted-D64-float32 sm_90: {said}")
    # The other way round it is better.
    assert worse([replace(BASE, **changes)], [BASE]) == []


@pytest.mark.parametrize("name", WORSE)
def test_another_triton_is_held_to_spills_and_widths_alone(name):
    changes, _ = WORSE[name]
    found = worse([BASE], [replace(BASE, **changes, triton="3.6.0")])
    assert len(found) == (name in PROMISED)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"registers": 72},
        {"loop_instructions": 110},
        {"accesses": "load weight 16, store output 1"},
        {"settings": "D=64 BLOCK=512", "num_warps": 8},
        {"shared_bytes": 4096, "limit": "shared memory"},
    ],
    ids=str,
)
def test_what_costs_nothing_is_not_worse(changes):
    assert worse([BASE], [replace(BASE, **changes)]) == []


def test_rows_that_one_side_lacks_are_named():
    added, gone = replace(BASE, config="new"), replace(BASE, sm=80)
    assert worse([BASE, gone], [BASE, added, replace(added, sm=100)]) == [
        "sum_kernel: the table lacks new sm_90 and 1 more of its rows",
        "sum_kernel: nothing compiles to sorted-D64-float32 sm_80",
    ]
    assert worse([BASE, gone], [replace(BASE, triton="3.6.0")]) == []


def test_a_verdict_tells_the_versions_and_what_to_do():
    assert list(codegen_table.verdict([BASE], [BASE], [])) == [
        "none of 1 rows is worse than in the table"
    ]
    assert list(codegen_table.verdict([BASE], [replace(BASE, triton="3.6.0")], ["bad"])) == [
        "the table is of triton 3.7.1, this is 3.6.0: only spills and widths are compared",
        "bad",
        "if that is meant: python -m gpu_embed.bench codegen --out bench/codegen.csv",
    ]


def test_a_table_is_read_as_it_was_written(tmp_path):
    rows = [BASE, replace(BASE, sm=100, settings="")]
    codegen_table.write_table(tmp_path / "table.csv", rows)
    assert codegen_table.read_table(tmp_path / "table.csv") == rows


def test_the_committed_table_is_whole_and_of_the_pinned_triton():
    """Another version's table would compare little in CI."""
    root = Path(__file__).resolve().parents[2]
    rows = codegen_table.read_table(root / "bench" / "codegen.csv")
    pins = (root / "constraints.txt").read_text()
    assert {f"triton=={row.triton}" for row in rows} <= set(pins.split())
    assert {row.sm for row in rows} == set(occupancy.TARGETS)
    keys = [row.key for row in rows]
    assert keys == sorted(set(keys))


# Hand-computed. 64 registers are 2048 a warp: 8 warps in a partition's 16384, 32 on the multiprocessor.
# 33 registers are 1056 a warp, given out as 1280: 12 in a partition, 48 in all.
# 96 registers are 3072 a warp: 5 in a partition, so 20; blocks of 8 warps: 2 of them, so 16.
# 40000 bytes of shared memory, 41024 with CUDA's own, are given out as 41088: 4 blocks in 164 KiB,
# 5 in 228 KiB, 2 in 100 KiB.
# 1024 bytes with CUDA's own 1024 are 2048: 114 blocks in 228 KiB, so registers decide.
@pytest.mark.parametrize(
    ("architecture", "num_warps", "registers", "shared_bytes", "warps", "limit"),
    [
        (80, 4, 32, 0, 64, "warps"),
        (80, 4, 64, 0, 32, "registers"),
        (90, 4, 33, 0, 48, "registers"),
        (90, 1, 16, 0, 32, "blocks"),
        (90, 1, 96, 0, 20, "registers"),
        (90, 8, 96, 0, 16, "registers"),
        (80, 4, 32, 40_000, 16, "shared memory"),
        (90, 4, 32, 40_000, 20, "shared memory"),
        (100, 4, 32, 40_000, 20, "shared memory"),
        (86, 4, 32, 40_000, 8, "shared memory"),
        (90, 4, 40, 1024, 48, "registers"),
        (86, 4, 32, 0, 48, "warps"),
        (86, 1, 32, 0, 16, "blocks"),
        (89, 1, 32, 0, 24, "blocks"),
        (80, 32, 65, 0, 0, "registers"),
        (80, 4, 32, 200_000, 0, "shared memory"),
    ],
)
def test_occupancy(architecture, num_warps, registers, shared_bytes, warps, limit):
    found = occupancy.occupancy(architecture, num_warps, registers, shared_bytes)
    assert (found.warps, found.limit) == (warps, limit)


CALCULATOR = """
#include <cstdio>
#include "cuda_occupancy.h"

int main() {
  int capability, warps_max, warps, registers;
  size_t shared_max, shared;
  while (scanf("%d %d %zu %d %d %zu", &capability, &warps_max, &shared_max, &warps, &registers, &shared) == 6) {
    cudaOccDeviceProp device = {};
    device.computeMajor = capability / 10;
    device.computeMinor = capability % 10;
    device.maxThreadsPerBlock = 1024;
    device.maxThreadsPerMultiprocessor = 32 * warps_max;
    device.regsPerBlock = device.regsPerMultiprocessor = 65536;
    device.warpSize = 32;
    device.sharedMemPerBlock = 49152;
    device.sharedMemPerMultiprocessor = shared_max;
    device.sharedMemPerBlockOptin = shared_max - 1024;
    device.reservedSharedMemPerBlock = 1024;
    device.numSms = 1;
    cudaOccFuncAttributes kernel = {};
    kernel.maxThreadsPerBlock = 1024;
    kernel.numRegs = registers;
    kernel.maxDynamicSharedSizeBytes = shared_max;
    kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    cudaOccDeviceState state = {};
    state.carveoutConfig = SHAREDMEM_CARVEOUT_DEFAULT;
    cudaOccResult result;
    if (cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state, 32 * warps, shared))
      return 1;
    printf("%d\\n", result.activeBlocksPerMultiprocessor * warps);
  }
}
"""


def test_occupancy_is_what_nvidias_calculator_says(tmp_path):
    """Its header lies in Triton's wheel, and knows an architecture's rules, though not its sizes."""
    triton = find_spec("triton")
    header = triton and Path(triton.origin).parent / "backends/nvidia/include/cuda_occupancy.h"
    if not header or not header.exists() or not shutil.which("g++"):
        pytest.skip("needs g++, and cuda_occupancy.h from Triton's wheel")
    (tmp_path / "calculator.cpp").write_text(CALCULATOR)
    program = tmp_path / "calculator"
    compiler = ["g++", f"-I{header.parent}", str(tmp_path / "calculator.cpp"), "-o", str(program)]
    subprocess.run(compiler, check=True)
    launches = [
        (architecture, num_warps, registers, shared_bytes)
        for architecture in MULTIPROCESSORS
        for num_warps in (1, 2, 3, 4, 8, 16, 32)
        for registers in (8, 16, 31, 32, 33, 40, 64, 72, 80, 96, 128, 168, 255)
        for shared_bytes in (0, 1, 1024, 4096, 40_000, 101_376, 102_400, 166_912, 232_448)
    ]
    asked = "".join(
        f"{a} {MULTIPROCESSORS[a].warps} {MULTIPROCESSORS[a].shared_bytes} {w} {r} {s}\n"
        for a, w, r, s in launches
    )
    answer = subprocess.run([program], input=asked, check=True, capture_output=True, text=True)
    ours = [occupancy.occupancy(*launch).warps for launch in launches]
    assert ours == [int(warps) for warps in answer.stdout.split()]


@pytest.mark.parametrize(
    ("successors", "loops"),
    [
        ([[1], [2], []], []),
        ([[1], [1, 2], []], [{1}]),
        ([[1], [2], [1, 3], []], [{1, 2}]),
        ([[1], [2], [2, 3], [1, 4], []], [{1, 2, 3}, {2}]),
        # A slow path that lies behind the end and jumps back is no loop.
        ([[1, 3], [2], [], [1]], []),
        # The same inside a loop: the loop holds it.
        ([[1], [2, 5], [3], [1, 4], [], [2]], [{1, 2, 3, 5}]),
        # What pads the end jumps to itself, and nothing gets there.
        ([[1], [], [2]], []),
        # Two jumps back to one place are one loop.
        ([[1], [2, 1], [1, 3], []], [{1, 2}]),
    ],
    ids=str,
)
def test_loops(successors, loops):
    assert sorted(natural_loops(successors), key=len) == sorted(loops, key=len)


def test_machine_code_is_read():
    """Addresses begin where the code lies in the file; instructions are 16 bytes apart."""
    lines = [
        "S2R R0, SR_TID.X",
        "@P0 LDG.E.128.CONSTANT R4, desc[UR4][R2.64]",
        "FADD R1, R1, R4",
        "LDG.E.U8 R5, [R6.64]",
        "@P1 BRA 0x110",
        "STS.64 [R0], R2",
        "BAR.SYNC.DEFER_BLOCKING 0x0",
        "STL [R1], R3",
        "@!P2 RED.E.ADD.F32x4.RN.STRONG.GPU desc[UR4][R2.64], R4",
        "@P3 ATOMG.E.EXCH.64.STRONG.GPU PT, R2, desc[UR4][R2.64], R4",
        "STG.E desc[UR4][R2.64], R4",
        "EXIT",
        "BRA 0x1c0",
        "NOP",
    ]
    assert read_machine_code(lines, address=0x100) == MachineCode(
        [
            Instruction("load", "", 16, True),
            Instruction("load", "", 1, True),
            Instruction("shared", "", 0, False),
            Instruction("barrier", "", 0, False),
            Instruction("local", "", 0, False),
            Instruction("add", "", 16, False),
            Instruction("exchange", "", 8, False),
            Instruction("store", "", 4, False),
        ],
        loop_instructions=4,
        loop_accesses=2,
    )


def test_bulk_and_asynchronous_copies_are_read():
    lines = [
        "@P0 LDGSTS.E.BYPASS.LTC128B.128 [R3], desc[UR6][R8.64]",
        "LDGDEPBAR",
        "@UP1 UTMALDG.2D [UR20], [UR6]",
        # Waiting for it is no loop.
        "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R7",
        "@!P0 BRA 0x30",
        "LDSM.16.M88.4 R4, [R3]",
        "UTMASTG.2D [UR12], [UR6]",
        "UTMAREDG.2D.ADD [UR4], [UR8]",
        "@P1 ATOMG.E.CAS.STRONG.GPU PT, R2, desc[UR4][R2.64], R4, R5",
        "EXIT",
    ]
    assert read_machine_code(lines, address=0) == MachineCode(
        [
            Instruction("load", "", 16, False),
            Instruction("bulk load", "", 0, False),
            Instruction("shared", "", 0, False),
            Instruction("bulk store", "", 0, False),
            Instruction("bulk add", "", 0, False),
            Instruction("atomic", "", 4, False),
        ],
        loop_instructions=0,
        loop_accesses=0,
    )


def test_ptx_is_read(tmp_path):
    """Lines of the source name the pointers."""
    source = ["tl.load(", "    a_ptr + n,", ")", "b_desc.load([row, d])", "n = n + 1"]
    (tmp_path / "kernel.py").write_text("\n".join(source))
    ptx = [
        f'.file 1 "{tmp_path}" "kernel.py"',
        "ld.param.b64 %rd1, [kernel_param_0];",
        ".loc 1 1 5",
        "@%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];",
        "$L__BB0_1:",
        ".loc 1 4 1",
        "@%p4 cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [%r2], [%rd2];",
        "@%p4 bra $L__BB0_1;",
        ".loc 1 5 1",
        "cp.async.cg.shared.global [ %r3 + 0 ], [ %rd3 + 0 ], 0x10, %r4;",
        "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd3, {%r3, %r12}], [%r2];",
        "cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.bulk_group [%rd3], [%r2];",
        "cp.async.bulk.commit_group;",
        "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r5}, [%r6];",
        "st.shared.b16 [ %r7 + 0 ], %rs1;",
        "@%p1 atom.global.gpu.relaxed.exch.b64 %rd5, [ %rd6 + 0 ], %rd7;",
        "@%p1 red.global.gpu.relaxed.add.v2.f32 [ %rd8 + 0 ], { %r8, %r9 };",
        "atom.global.gpu.acq_rel.max.s32 %r1, [ %rd8 + 0 ], %r2;",
        "bar.sync 0;",
        "shfl.sync.bfly.b32 %r1, %r2, 16, 31, -1;",
    ]
    assert [tuple(each) for each in read_ptx("\n".join(ptx))] == [
        ("load", "a_ptr", 16, False),
        ("bulk load", "b_desc", 0, True),
        ("load", "", 16, False),
        ("bulk store", "", 0, False),
        ("bulk add", "", 0, False),
        ("shared", "", 0, False),
        ("shared", "", 0, False),
        ("exchange", "", 8, False),
        ("add", "", 8, False),
        ("atomic", "", 4, False),
        ("barrier", "", 0, False),
        ("shuffle", "", 0, False),
    ]


COMPILED = Compiled(
    kernel="gather_kernel",
    case="embedding-D64",
    architecture=90,
    binary="abc",
    settings={"D": 64},
    num_warps=4,
    registers=64,
    spilled_bytes=0,
    shared_bytes=0,
    instructions=[
        Instruction("load", "weight_ptr", 4, False),
        Instruction("load", "indices_ptr", 8, False),
        Instruction("load", "weight_ptr", 16, False),
        Instruction("barrier", "", 0, False),
    ],
    machine=MachineCode([Instruction("load", "", 16, False)], 0, 0),
)


def test_a_binary_has_one_row_named_by_the_first_case():
    other = replace(COMPILED, case="embedding-D65")
    again = replace(COMPILED, binary="def")
    rows = codegen_table.table_rows([COMPILED, again, other], "3.7.1")
    assert [row.config for row in rows] == ["embedding-D64", "embedding-D64:2"]
    assert (rows[0].load_bytes, rows[0].store_bytes) == (16, 0)
    assert rows[0].accesses == "load indices 8, load weight 4"
    assert (rows[0].resident_warps, rows[0].limit) == (32, "registers")


def test_launches_survive_json():
    text = codegen_table.to_json("3.7.1", [BASE], [COMPILED], {"x": "y"})
    read = json.loads(text)
    assert [compiled_from_json(launch) for launch in read["launches"]] == [COMPILED]
    assert (Row(**read["rows"][0]), read["failures"]) == (BASE, {"x": "y"})


@pytest.fixture
def compiler(monkeypatch):
    """In place of Triton: what it would have compiled, by the architecture that was asked for."""
    found = SimpleNamespace(compiled=[COMPILED], failures={})

    def compile_launches(architecture, launches, advance):
        for launch in launches:
            advance(launch)
        names = {launch.kernel.__name__ for launch in launches}
        done = [replace(c, architecture=architecture) for c in found.compiled if c.kernel in names]
        return done, found.failures

    kernels = [SimpleNamespace(__name__=name) for name in ("gather_kernel", "sum_kernel")]
    launches = [codegen.Launch("embedding-D64", kernel, (1,), (), {}) for kernel in kernels]
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(codegen, "record_launches", lambda cases: (launches, {}))
    monkeypatch.setattr(codegen, "compile_launches", compile_launches)
    return found


def test_the_command_prints_a_table_and_writes_it(compiler, capsys, tmp_path):
    assert cli.main(["codegen", "--out", str(tmp_path / "table.csv")]) == 0
    said = capsys.readouterr().out
    assert "embedding-D64" in said
    lines = [line.split() for line in said.splitlines()]
    assert ["embedding-D64", "80", "64", "0", "0", "32/64", "registers", "16/0/0", "0"] in lines
    assert [line[:2] for line in lines if line[1:2] == ["90"]] == [["D=64", "90"]]
    rows = codegen_table.read_table(tmp_path / "table.csv")
    assert [row.sm for row in rows] == [80, 90, 100]


def test_the_command_prints_json(compiler, capsys):
    assert cli.main(["codegen", "--json", "--arch", "90", "86", "90"]) == 0
    read = json.loads(capsys.readouterr().out)
    assert [row["sm"] for row in read["rows"]] == [86, 90]


def test_a_check_compares_what_was_compiled(compiler, capsys, tmp_path):
    table = str(tmp_path / "table.csv")
    assert cli.main(["codegen", "--out", table]) == 0
    assert cli.main(["codegen", "--check", table]) == 0
    assert "none of 3 rows is worse" in capsys.readouterr().err
    assert cli.main(["codegen", "--check", table, "--arch", "90"]) == 0
    assert cli.main(["codegen", "--check", table, "--kernel", "sum_kernel"]) == 0
    compiler.compiled = [replace(COMPILED, spilled_bytes=8)]
    capsys.readouterr()
    assert cli.main(["codegen", "--check", table, "--arch", "90"]) == 1
    said = capsys.readouterr().err
    assert "gather_kernel embedding-D64 sm_90: spills 8 bytes a thread, was 0" in said
    assert "sm_80" not in said


def test_a_case_that_does_not_compile_fails_and_writes_nothing(compiler, capsys, tmp_path):
    compiler.failures = {"embedding-D64": "sum_kernel: CompilationError: no"}
    assert cli.main(["codegen", "--arch", "90"]) == 1
    assert "embedding-D64 does not compile: sm_90, sum_kernel" in capsys.readouterr().err
    assert cli.main(["codegen", "--out", str(tmp_path / "table.csv")]) == 1
    assert not (tmp_path / "table.csv").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--kernel bogus", "unknown kernel 'bogus': choose from gather_kernel, sum_kernel"),
        ("--arch 75", "invalid choice: 75"),
        ("--out x.csv --arch 90", "--out writes the whole table: leave out --arch and --kernel"),
        ("--out x.csv --kernel sum_kernel", "--out writes the whole table"),
        ("--check missing.csv", "missing.csv"),
        ("--check README", "the columns are not codegen's"),
        ("--check BINARY", "can't decode"),
        ("--out FOLDER", "is a folder: name a file"),
    ],
)
def test_what_the_command_cannot_do_is_said_in_a_sentence(
    compiler, capsys, tmp_path, arguments, said
):
    (tmp_path / "README").write_text("a,b\n")
    (tmp_path / "BINARY").write_bytes(b"\xed\x00\n")
    (tmp_path / "FOLDER").mkdir()
    arguments = re.sub("[A-Z]{6}", lambda name: str(tmp_path / name[0]), arguments)
    assert cli.main(["codegen", *arguments.split()]) == 2
    printed = capsys.readouterr().err
    assert said in printed
    assert printed.count("\n") == 1


def test_no_triton_and_no_compiler_are_said(compiler, capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert cli.main(["codegen"]) == 2
    assert "TRITON_INTERPRET=1 replaces Triton's compiler: unset it" in capsys.readouterr().err
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: name == "rich" or None)
    assert cli.main(["codegen"]) == 2
    assert "pip install triton (Linux only)" in capsys.readouterr().err


def test_a_case_that_cannot_be_called_does_not_stop_the_others(monkeypatch):
    pytest.importorskip("triton")

    def refuse(case, backend):
        raise RuntimeError("no")

    monkeypatch.setitem(codegen_cases.OPERATIONS, "refuse", refuse)
    launches, failures = codegen.record_launches(
        [codegen_cases.Case("refuse"), codegen_cases.Case("counts")]
    )
    assert [launch.case for launch in launches] == ["counts-D1-float32"]
    assert failures == {"refuse-D1-float32": "RuntimeError: no"}
