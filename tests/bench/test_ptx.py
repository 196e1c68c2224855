"""The interpreter of PTX: each instruction on a table of cases, and each error that it finds."""

import math
import re
import struct

import numpy as np
import pytest

from gpu_embed.bench.ptx.counts import counting, longest_path
from gpu_embed.bench.ptx.machine import Program
from gpu_embed.bench.ptx.memory import GlobalMemory, Region
from gpu_embed.bench.ptx.parse import PtxError, UnsupportedError, parse

WARP = 32
REGISTERS = (
    ".reg .pred %p<9>;\n.reg .b16 %rs<9>;\n.reg .b32 %r<9>;\n.reg .b64 %rd<9>;\n"
    ".reg .f32 %f<9>;\n.reg .f64 %fd<9>;\n"
)


def entry(body, parameters=".param .u64 out", shared=""):
    return (
        f".version 8.0\n.target sm_90\n{shared}\n.visible .entry try({parameters})\n"
        f"{{\n{REGISTERS}{body}\nret;\n}}\n"
    )


def launch(body, *arrays, grid=(1,), block=(WARP,), shared="", written=None):
    """Run a kernel whose parameters p0, p1, ... point to the arrays; of the last, these bytes are written."""
    parameters = ", ".join(f".param .u64 p{number}" for number in range(len(arrays)))
    regions = [
        Region(f"p{n}", a.ctypes.data, a.nbytes, written if n == len(arrays) - 1 else None)
        for n, a in enumerate(arrays)
    ]
    arguments = [array.ctypes.data for array in arrays]
    Program(entry(body, parameters, shared)).run(grid, block, arguments, GlobalMemory(regions))


# Each lane's own word of p0 in %rd1, and its number in %r8.
OWN_WORD = """
ld.param.u64 %rd1, [p0];
mov.u32 %r8, %tid.x;
mul.wide.u32 %rd2, %r8, {size};
add.s64 %rd1, %rd1, %rd2;
"""


def own_word(size=4):
    return OWN_WORD.replace("{size}", str(size))


def lanes(body, size=4):
    """What 32 lanes leave in %r1 (4 bytes) or %rd3 (8 bytes): uint [32]."""
    out = np.zeros(WARP, f"u{size}")
    source = "%r1" if size == 4 else "%rd3"
    launch(f"{own_word(size)}{body}\nst.global.b{8 * size} [%rd1], {source};", out)
    return out


def bits32(number):
    return struct.unpack("<I", struct.pack("<f", number))[0]


def bits64(number):
    return struct.unpack("<Q", struct.pack("<d", number))[0]


def f(number):
    return f"0f{bits32(number):08X}"


def d(number):
    return f"0d{bits64(number):016X}"


def unsigned(number, bits=32):
    return number & (1 << bits) - 1


INF, NAN = math.inf, math.nan
# The instruction up to its target, its operands, and the bits that it leaves.
CASES_32 = [
    ("mov.b32", ["7"], 7),
    ("mov.b32", [f(1.5)], bits32(1.5)),
    ("mov.u32", ["%ntid.x"], 32),
    ("add.s32", ["0xFFFFFFFF", "2"], 1),
    ("sub.s32", ["1", "3"], unsigned(-2)),
    ("mul.lo.s32", ["-3", "5"], unsigned(-15)),
    ("mul.hi.s32", ["-3", "5"], unsigned(-1)),
    ("mul.hi.u32", ["0xFFFFFFFF", "0xFFFFFFFF"], 0xFFFFFFFE),
    ("mul.wide.s16", ["-3", "300"], unsigned(-900)),
    ("mul.wide.u16", ["65535", "2"], 131070),
    ("mad.lo.s32", ["-3", "5", "16"], 1),
    ("div.s32", ["-7", "2"], unsigned(-3)),
    ("rem.s32", ["-7", "2"], unsigned(-1)),
    ("div.u32", ["0xFFFFFFF9", "2"], 0x7FFFFFFC),
    ("div.u32", ["7", "0"], 0xFFFFFFFF),
    ("neg.s32", ["5"], unsigned(-5)),
    ("abs.s32", ["-5"], 5),
    ("min.s32", ["-1", "1"], unsigned(-1)),
    ("min.u32", ["-1", "1"], 1),
    ("max.s32", ["-1", "1"], 1),
    ("and.b32", ["12", "10"], 8),
    ("or.b32", ["12", "10"], 14),
    ("xor.b32", ["12", "10"], 6),
    ("not.b32", ["0"], 0xFFFFFFFF),
    ("shl.b32", ["3", "31"], 0x80000000),
    ("shl.b32", ["3", "32"], 0),
    ("shr.u32", ["0x80000000", "31"], 1),
    ("shr.u32", ["0x80000000", "40"], 0),
    ("shr.s32", ["0x80000000", "40"], 0xFFFFFFFF),
    ("shf.l.wrap.b32", ["0x80000000", "1", "1"], 3),
    ("shf.r.wrap.b32", ["0", "1", "33"], 0x80000000),
    ("shf.r.clamp.b32", ["5", "1", "40"], 1),
    ("lop3.b32", ["12", "10", "1", "0xEA"], 12 & 10 | 1),
    ("lop3.b32", ["12", "10", "1", "0x96"], 12 ^ 10 ^ 1),
    ("bfe.u32", ["0xABCD", "4", "8"], 0xBC),
    ("bfe.s32", ["0xABCD", "4", "8"], unsigned(0xBC - 256)),
    ("bfe.s32", ["0x80000000", "28", "8"], 0xFFFFFFF8),
    ("bfe.u32", ["5", "0", "0"], 0),
    ("bfi.b32", ["0xF", "0", "4", "2"], 0x30),
    ("bfi.b32", ["7", "9", "0", "32"], 7),
    ("prmt.b32", ["0x33221100", "0x77665544", "0x7250"], 0x77225500),
    ("prmt.b32", ["0x80", "0", "0x8888"], 0xFFFFFFFF),
    ("popc.b32", ["0xF0F0"], 8),
    ("clz.b32", ["1"], 31),
    ("clz.b32", ["0"], 32),
    ("brev.b32", ["1"], 0x80000000),
    ("bfind.u32", ["0x900"], 11),
    ("bfind.u32", ["0"], 0xFFFFFFFF),
    ("add.f32", [f(0.5), f(0.25)], bits32(0.75)),
    ("add.rn.f32", [f(16777216), f(1)], bits32(16777216)),
    ("sub.f32", [f(0.5), f(0.25)], bits32(0.25)),
    ("mul.f32", [f(3), f(-0.0)], bits32(-0.0)),
    ("div.rn.f32", [f(1), f(3)], bits32(np.float32(1) / np.float32(3))),
    ("div.full.f32", [f(1), f(4)], bits32(0.25)),
    ("neg.f32", [f(2)], bits32(-2)),
    ("abs.f32", [f(-2)], bits32(2)),
    ("sqrt.rn.f32", [f(2)], bits32(np.sqrt(np.float32(2)))),
    ("rcp.rn.f32", [f(3)], bits32(np.float32(1) / np.float32(3))),
    ("rcp.approx.ftz.f32", [f(-4)], bits32(-0.25)),
    ("rcp.approx.ftz.f32", ["0x80400000"], bits32(-INF)),
    ("rem.u32", ["0xFFFFFFF9", "16"], 9),
    ("and.b16", ["0xFF0F", "0x8888"], 0x8808),
    ("or.b16", ["12", "3"], 15),
    ("rsqrt.approx.f32", [f(4)], bits32(0.5)),
    ("ex2.approx.f32", [f(3)], bits32(8)),
    ("lg2.approx.f32", [f(8)], bits32(3)),
    ("min.f32", [f(NAN), f(2)], bits32(2)),
    ("max.f32", [f(NAN), f(2)], bits32(2)),
    ("max.relu.s32", ["-4", "-2"], 0),
    ("mul.ftz.f32", [f(-1), "0f00400000"], bits32(-0.0)),
    ("add.f32", [f(0), "0f00400000"], 0x00400000),
    ("max.NaN.f32", [f(NAN), f(2)], bits32(NAN)),
    # Rounded once: the product's last bits decide.
    ("fma.rn.f32", [f(1 + 2**-23), f(1 + 2**-23), f(-1 - 2**-22)], bits32(2**-46)),
    ("fma.rn.f32", [f(2**12 + 1), f(2**12 + 1), f(2**60)], bits32(2**60)),
    ("fma.rn.f32", [f(1 + 2**-12), f(1 + 2**-12), f(2**-60)], bits32(1 + 2**-11 + 2**-23)),
    # bf16 1.0 is 0x3F80, f16 1.0 is 0x3C00; the first of a pair is the lowest.
    ("add.rn.bf16x2", ["0x3F803F80", "0x40003F80"], 0x40404000),
    ("add.f16x2", ["0x3C003C00", "0x40003C00"], 0x42004000),
    ("fma.rn.bf16x2", ["0x40003F80", "0x40003F80", "0x3F803F80"], 0x40A04000),
    ("max.bf16x2", ["0x3F80BF80", "0x40003F80"], 0x40003F80),
    ("min.u16x2", ["0x0001FFFF", "0x00020001"], 0x00010001),
    ("min.s16x2", ["0x0001FFFF", "0x00020001"], 0x0001FFFF),
    ("cvt.u32.u64", ["0x100000005"], 5),
    ("cvt.rzi.s32.f32", [f(-2.7)], unsigned(-2)),
    ("cvt.rni.s32.f32", [f(2.5)], 2),
    ("cvt.rmi.s32.f32", [f(-2.5)], unsigned(-3)),
    ("cvt.rpi.s32.f32", [f(2.2)], 3),
    ("cvt.rzi.s32.f32", [f(3e9)], 0x7FFFFFFF),
    ("cvt.rzi.u32.f32", [f(-1)], 0),
    ("cvt.rzi.s32.f32", [f(NAN)], 0),
    ("cvt.rn.f32.s32", ["-16777217"], bits32(-16777216)),
    ("cvt.rn.f32.u64", ["0xFFFFFFFFFFFFFFFF"], bits32(2.0**64)),
    ("cvt.rn.f32.f64", [d(1 + 2**-24)], bits32(1)),
    ("cvt.rmi.f32.f32", [f(-2.5)], bits32(-3)),
    ("cvt.rni.f32.f32", [f(2.5)], bits32(2)),
    ("cvt.rzi.f32.f32", [f(-2.7)], bits32(-2)),
    ("cvt.rzi.u32.f32", [f(3e9)], 3_000_000_000),
    ("cvt.f32.f16", ["0x3C00"], bits32(1)),
    ("cvt.f32.bf16", ["0x3FC0"], bits32(1.5)),
    ("cvt.rn.bf16x2.f32", [f(1.5), f(2)], 0x3FC04000),
    ("cvt.rn.f16x2.f32", [f(1), f(2)], 0x3C004000),
    ("cvt.sat.u8.s32", ["300"], 255),
    ("cvt.s32.s8", ["0x1FF"], unsigned(-1)),
    ("cvt.u32.u8", ["0x1FF"], 255),
    ("mov.b32", ["{1, 2}"], 0x20001),
]
CASES_64 = [
    ("add.s64", ["-1", "3"], 2),
    ("mul.lo.u64", ["0x100000001", "3"], 0x300000003),
    ("mul.hi.u64", ["0xFFFFFFFFFFFFFFFF", "0xFFFFFFFFFFFFFFFF"], 0xFFFFFFFFFFFFFFFE),
    ("mul.hi.s64", ["-1", "5"], unsigned(-1, 64)),
    ("mul.wide.s32", ["-3", "5"], unsigned(-15, 64)),
    ("mul.wide.u32", ["0xFFFFFFFF", "0xFFFFFFFF"], 0xFFFFFFFE00000001),
    ("mad.wide.s32", ["-3", "5", "16"], 1),
    ("mad.lo.s64", ["-3", "5", "16"], 1),
    ("div.s64", ["-7", "2"], unsigned(-3, 64)),
    ("rem.s64", ["-7", "2"], unsigned(-1, 64)),
    ("neg.s64", ["5"], unsigned(-5, 64)),
    ("not.b64", ["5"], unsigned(-6, 64)),
    ("max.s64", ["-1", "1"], 1),
    ("max.u64", ["-1", "1"], unsigned(-1, 64)),
    ("min.s64", ["-1", "1"], unsigned(-1, 64)),
    ("bfi.b64", ["0xF", "0", "36", "2"], 0x3000000000),
    ("shr.u64", ["-8", "60"], 15),
    ("cvt.s64.s16", ["0x18000"], unsigned(-32768, 64)),
    ("cvt.u64.u16", ["0x18000"], 0x8000),
    ("cvt.rzi.s64.f32", [f(-3e9)], unsigned(-3_000_000_000, 64)),
    ("cvt.rzi.f64.f64", [d(-2.7)], bits64(-2)),
    ("div.rn.f64", [d(1), d(3)], bits64(1 / 3)),
    ("sqrt.rn.f64", [d(2)], bits64(math.sqrt(2))),
    ("rcp.approx.ftz.f64", [d(4)], bits64(0.25)),
    ("abs.f64", [d(-0.1)], bits64(0.1)),
    ("neg.f64", [d(0.1)], bits64(-0.1)),
    ("shl.b64", ["1", "40"], 1 << 40),
    ("shr.s64", ["-8", "1"], unsigned(-4, 64)),
    ("bfe.u64", ["0xABCD00000000", "32", "8"], 0xCD),
    ("cvt.s64.s32", ["-5"], unsigned(-5, 64)),
    ("cvt.u64.u32", ["-5"], unsigned(-5)),
    ("cvt.rn.f64.s64", ["-5"], bits64(-5)),
    ("cvt.f64.f32", [f(0.1)], bits64(float(np.float32(0.1)))),
    ("cvt.rzi.s64.f64", [d(1e30)], 2**63 - 1),
    ("cvt.rzi.s64.f64", [d(NAN)], 2**63),
    ("add.f64", [d(0.1), d(0.2)], bits64(0.1 + 0.2)),
    ("mul.rn.f64", [d(0.1), d(0.2)], bits64(0.1 * 0.2)),
    ("fma.rn.f64", [d(1 + 2**-52), d(1 + 2**-52), d(-1 - 2**-51)], bits64(2**-104)),
    ("fma.rn.f64", [d(INF), d(1), d(1)], bits64(INF)),
    ("mov.b64", ["{1, 2}"], 0x200000001),
    ("createpolicy.fractional.L2::evict_first.b64", ["1.0"], 0),
]


@pytest.mark.parametrize(("name", "operands", "expected"), CASES_32, ids=str)
def test_an_instruction_of_32_bits(name, operands, expected):
    assert set(lanes(f"{name} %r1, {', '.join(operands)};").tolist()) == {expected}


@pytest.mark.parametrize(("name", "operands", "expected"), CASES_64, ids=str)
def test_an_instruction_of_64_bits(name, operands, expected):
    assert set(lanes(f"{name} %rd3, {', '.join(operands)};", 8).tolist()) == {expected}


@pytest.mark.parametrize(
    ("comparison", "a", "b", "expected"),
    [
        ("eq.s32", "1", "1", 1),
        ("ne.s32", "1", "1", 0),
        ("lt.s32", "-1", "1", 1),
        ("lt.u32", "-1", "1", 0),
        ("le.s32", "1", "1", 1),
        ("gt.s32", "2", "1", 1),
        ("ge.s32", "1", "2", 0),
        ("lt.s16", "0x8000", "1", 1),
        ("gt.u16", "0x8000", "1", 1),
        ("ge.u64", "-1", "1", 1),
        ("lt.s64", "-1", "1", 1),
        ("lo.u32", "1", "2", 1),
        ("ls.u32", "2", "2", 1),
        ("hi.u32", "-1", "2", 1),
        ("hs.u32", "1", "2", 0),
        ("lt.f32", f(NAN), f(1), 0),
        ("ltu.f32", f(NAN), f(1), 1),
        ("ne.f32", f(NAN), f(1), 0),
        ("neu.f32", f(NAN), f(1), 1),
        ("eq.f32", f(0.0), f(-0.0), 1),
        ("leu.f64", d(NAN), d(1), 1),
        ("gtu.f32", f(2), f(1), 1),
        ("geu.f32", f(1), f(2), 0),
        ("nan.f32", f(NAN), f(1), 1),
        ("num.f32", f(NAN), f(1), 0),
        ("gt.bf16", "0x4000", "0x3F80", 1),
        ("gt.f16", "0x4000", "0x3C00", 1),
    ],
)
def test_a_comparison(comparison, a, b, expected):
    body = (
        f"setp.{comparison} %p1|%p2, {a}, {b};\nselp.b32 %r1, 1, 0, %p1;\n@%p2 add.s32 %r1, %r1, 2;"
    )
    assert set(lanes(body).tolist()) == {expected + 2 * (1 - expected)}


def test_predicates_join_and_turn():
    body = """
    setp.lt.u32 %p1, %r8, 16;
    setp.gt.and.u32 %p2, %r8, 3, %p1;
    not.pred %p3, %p2;
    xor.pred %p4, %p3, %p1;
    or.pred %p4, %p4, !%p1;
    selp.b32 %r1, 1, 0, %p4;
    """
    lane = np.arange(WARP)
    low = lane < 16
    assert lanes(body).tolist() == (~((lane > 3) & low) ^ low | ~low).tolist()


def test_a_function_is_called_from_two_places():
    """Each call has registers and labels of its own; the lanes are in both at once, and in a call within."""
    function = """
    .func (.param .b64 func_retval0) twice(.param .b64 twice_param_0);
    .func (.param .b64 func_retval0) add_one(.param .b64 add_one_param_0)
    {
    .reg .b64 %rd<3>;
    ld.param.u64 %rd1, [add_one_param_0];
    add.s64 %rd2, %rd1, 1;
    st.param.b64 [func_retval0+0], %rd2;
    ret;
    }
    .func (.param .b64 func_retval0) twice(
    .param .b64 twice_param_0
    )
    {
    .reg .pred %p<2>;
    .reg .b64 %rd<5>;
    ld.param.u64 %rd1, [twice_param_0];
    { // callseq 0, 0
    .param .b64 param0;
    st.param.b64 [param0+0], 0;
    .param .b64 retval0;
    call (retval0), add_one, (param0);
    ld.param.b64 %rd4, [retval0+0];
    } // callseq 0
    setp.lt.u64 %p1, %rd1, 20;
    @%p1 bra $small;
    st.param.b64 [func_retval0+0], %rd1;
    ret;
    $small:
    add.s64 %rd2, %rd1, %rd1;
    add.s64 %rd2, %rd2, %rd4;
    st.param.b64 [func_retval0+0], %rd2;
    ret;
    }
    """
    call = """
    {{
    .param .b64 param0;
    st.param.b64 [param0+0], {argument};
    .param .b64 retval0;
    call.uni (retval0),
    twice,
    (
    param0
    );
    ld.param.b64 {result}, [retval0+0];
    }}
    """
    body = f"""
    mov.u32 %r8, %laneid;
    ld.param.u64 %rd1, [p0];
    mul.wide.u32 %rd2, %r8, 8;
    add.s64 %rd1, %rd1, %rd2;
    cvt.u64.u32 %rd4, %r8;
    setp.lt.u32 %p1, %r8, 16;
    @%p1 bra $low;
    {call.format(argument="%rd4", result="%rd3")}
    bra $both;
    $low:
    {call.format(argument="%rd2", result="%rd3")}
    $both:
    add.s64 %rd3, %rd3, %rd4;
    st.global.b64 [%rd1], %rd3;
    """
    out = np.zeros(WARP, np.int64)
    launch(body, out, shared=function)
    argument = np.where(LANE < 16, 8 * LANE, LANE)
    assert out.tolist() == (np.where(argument < 20, 2 * argument + 1, argument) + LANE).tolist()


def test_words_are_packed_and_taken_apart():
    body = """
    mov.b32 {%rs1, %rs2}, 0x80017FFF;
    cvt.s32.s16 %r2, %rs2;
    cvt.u32.u16 %r3, %rs1;
    add.s32 %r1, %r2, %r3;
    """
    assert set(lanes(body).tolist()) == {unsigned(-32767 + 0x7FFF)}


def test_bf16_is_rounded_once():
    numbers = np.random.default_rng(0).standard_normal(WARP).astype(np.float32)
    numbers[:6] = [0, -0.0, INF, 1 + 2**-8, 1 + 2**-8 + 2**-20, 3.4e38]
    out = np.zeros(WARP, np.uint32)
    body = own_word() + "\n".join(
        [
            "ld.param.u64 %rd3, [p1];",
            "add.s64 %rd3, %rd3, %rd2;",
            "ld.global.f32 %f1, [%rd3];",
            "cvt.rn.bf16.f32 %rs1, %f1;",
            "cvt.u32.u16 %r1, %rs1;",
            "st.global.b32 [%rd1], %r1;",
        ]
    )
    launch(body, out, numbers)
    torch = pytest.importorskip("torch")
    expected = torch.from_numpy(numbers).bfloat16().view(torch.uint16).numpy()
    assert out.tolist() == expected.tolist()


LANE = np.arange(WARP)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("shfl.sync.bfly.b32 %r1, %r8, 4, 0x1f, -1;", LANE ^ 4),
        ("shfl.sync.idx.b32 %r1, %r8, 5, 0x1f, -1;", LANE * 0 + 5),
        ("shfl.sync.up.b32 %r1, %r8, 2, 0, -1;", np.where(LANE < 2, LANE, LANE - 2)),
        ("shfl.sync.down.b32 %r1, %r8, 2, 0x1f, -1;", np.where(LANE > 29, LANE, LANE + 2)),
        # Segments of 8 lanes.
        ("shfl.sync.idx.b32 %r1, %r8, 1, 0x181f, -1;", LANE // 8 * 8 + 1),
        (
            "shfl.sync.down.b32 %r2|%p1, %r8, 2, 0x1f, -1;\nselp.b32 %r1, 1, 0, %p1;",
            LANE <= 29,
        ),
        ("setp.lt.u32 %p1, %r8, 3;\nvote.sync.ballot.b32 %r1, %p1, -1;", LANE * 0 + 7),
        (
            "setp.lt.u32 %p1, %r8, 3;\nvote.sync.any.pred %p2, %p1, -1;\nselp.b32 %r1, 1, 0, %p2;",
            LANE * 0 + 1,
        ),
        (
            "setp.lt.u32 %p1, %r8, 3;\nvote.sync.all.pred %p2, %p1, -1;\nselp.b32 %r1, 1, 0, %p2;",
            LANE * 0,
        ),
        ("activemask.b32 %r1;", LANE * 0 + 0xFFFFFFFF),
        ("redux.sync.add.s32 %r1, %r8, -1;", LANE * 0 + 496),
        ("redux.sync.max.u32 %r1, %r8, -1;", LANE * 0 + 31),
        ("elect.sync %r2|%p1, -1;\nselp.b32 %r1, 1, 0, %p1;", LANE == 0),
        ("mov.u32 %r1, %laneid;", LANE),
    ],
)
def test_lanes_of_a_warp_see_one_another(body, expected):
    assert lanes(body).tolist() == expected.astype(int).tolist()


def test_a_loop_ends_for_each_lane_on_its_own():
    body = """
    mov.b32 %r1, 0;
    mov.b32 %r2, 0;
    $again:
    setp.ge.u32 %p1, %r2, %r8;
    @%p1 bra $end;
    add.s32 %r2, %r2, 1;
    add.s32 %r1, %r1, %r2;
    bra.uni $again;
    $end:
    """
    assert lanes(body).tolist() == (LANE * (LANE + 1) // 2).tolist()


def test_vectors_are_loaded_and_stored():
    source = np.arange(4 * WARP, dtype=np.uint32)
    out = np.zeros(4 * WARP, np.uint32)
    body = own_word(16) + "\n".join(
        [
            "ld.param.u64 %rd3, [p1];",
            "add.s64 %rd3, %rd3, %rd2;",
            "ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd3+0];",
            "st.global.v2.b32 [%rd1+8], {%r1, %r2};",
            "st.global.v2.b32 [%rd1], {%r3, %r4};",
        ]
    )
    launch(body, out, source)
    assert out.tolist() == source.reshape(-1, 4)[:, [2, 3, 0, 1]].ravel().tolist()


@pytest.mark.parametrize(
    ("instruction", "dtype", "start", "expected"),
    [
        ("red.global.add.u32 [%rd4], %r8", "u4", 1, 1 + 496),
        ("atom.global.add.u32 %r1, [%rd4], %r8", "u4", 1, 1 + 496),
        ("atom.global.max.u32 %r1, [%rd4], %r8", "u4", 1, 31),
        ("atom.global.min.s32 %r1, [%rd4], -3", "i4", 1, -3),
        ("atom.global.or.b32 %r1, [%rd4], %r8", "u4", 32, 63),
        ("atom.global.and.b32 %r1, [%rd4], 6", "u4", 3, 2),
        ("atom.global.exch.b32 %r1, [%rd4], %r8", "u4", 99, 31),
        ("atom.global.cas.b32 %r1, [%rd4], 5, 8", "u4", 5, 8),
        ("atom.global.cas.b32 %r1, [%rd4], 6, 8", "u4", 5, 5),
        ("red.global.add.f32 [%rd4], 0f3F000000", "f4", 1, 17),
        ("red.global.add.noftz.f16 [%rd4], 0x3C00", "f2", 1, 33),
        ("red.global.add.f64 [%rd4], 0d3FE0000000000000", "f8", 1, 17),
    ],
)
def test_atomics_of_all_lanes_on_one_word(instruction, dtype, start, expected):
    out, word = np.zeros(WARP, np.uint32), np.full(4, start, dtype)
    launch(f"{own_word()}\nld.param.u64 %rd4, [p1];\n{instruction};", out, word)
    assert word.tolist() == [expected, start, start, start]


def test_an_atomic_returns_what_was_there():
    out, word = np.zeros(WARP, np.uint32), np.zeros(1, np.uint32)
    body = (
        f"{own_word()}\nld.param.u64 %rd4, [p1];\natom.global.add.u32 %r1, [%rd4], 1;\n"
        "st.global.b32 [%rd1], %r1;"
    )
    launch(body, out, word)
    assert sorted(out.tolist()) == LANE.tolist()


def test_a_vector_is_added_atomically():
    out, pairs = np.zeros(WARP, np.float32), np.zeros(2)
    numbers = pairs.view(np.float32)  # pairs of them are aligned
    numbers[:] = [0, 1, 2, 3]
    body = """
    ld.param.u64 %rd4, [p1];
    mov.f32 %f4, 0f3F000000;
    atom.global.add.v2.f32 {%f1, %f2}, [%rd4+8], {%f4, %f4};
    st.global.f32 [%rd1], %f1;
    """
    launch(own_word() + body, out, numbers)
    assert numbers.tolist() == [0, 1, 18, 19]
    assert sorted(out.tolist()) == [2 + n / 2 for n in range(WARP)]


def test_pairs_are_added_atomically():
    # bf16 1.0 and 2.0, to 32 lanes; 64 is 0x4280, 32 is 0x4200.
    out, word = np.zeros(WARP, np.uint32), np.zeros(1, np.uint32)
    body = (
        f"{own_word()}\nld.param.u64 %rd4, [p1];\nred.global.add.noftz.bf16x2 [%rd4], 0x40003F80;"
    )
    launch(body, out, word)
    assert hex(word[0]) == "0x42804200"


SHARED = ".extern .shared .align 16 .b8 none[];\n.shared .align 16 .b8 tile[512];"
EXCHANGE = """
shl.b32 %r2, %r8, 2;
mov.b32 %r3, tile;
add.s32 %r4, %r3, %r2;
st.shared.b32 [%r4], %r8;
bar.sync 0;
xor.b32 %r5, %r2, 0xFC;
add.s32 %r4, %r3, %r5;
ld.shared.b32 %r1, [%r4];
st.global.b32 [%rd1], %r1;
"""


def test_warps_exchange_words_behind_a_barrier():
    out = np.zeros(64, np.uint32)
    launch(own_word() + EXCHANGE, out, block=(64,), shared=SHARED)
    assert out.tolist() == list(range(63, -1, -1))


def test_matrices_and_copies_through_shared_memory():
    """Each lane copies 16 bytes; rows of 8 numbers come back as pairs, two to a lane and matrix."""
    source = np.arange(8 * WARP, dtype=np.uint16)
    out = np.zeros(WARP, np.uint32)
    body = own_word() + "\n".join(
        [
            "ld.param.u64 %rd3, [p1];",
            "mul.wide.u32 %rd4, %r8, 16;",
            "add.s64 %rd3, %rd3, %rd4;",
            "shl.b32 %r2, %r8, 4;",
            "mov.b32 %r3, tile;",
            "add.s32 %r2, %r2, %r3;",
            "cp.async.cg.shared.global [%r2], [%rd3], 16, 16;",
            "cp.async.commit_group;",
            "cp.async.wait_group 0;",
            "bar.warp.sync -1;",
            "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r4, %r5, %r6, %r7}, [%r2];",
            "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r2], {%r5, %r4, %r7, %r6};",
            "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r1}, [%r2];",
            "st.global.b32 [%rd1], %r1;",
        ]
    )
    launch(body, out, source, shared=SHARED)
    assert out.view(np.uint16).tolist() == list(range(64, 128))


def test_a_grid_counts_in_three_directions():
    out = np.zeros(24, np.uint32)
    body = """
    ld.param.u64 %rd1, [p0];
    mov.u32 %r1, %ctaid.z;
    mov.u32 %r2, %nctaid.y;
    mov.u32 %r3, %ctaid.y;
    mad.lo.s32 %r1, %r1, %r2, %r3;
    mov.u32 %r2, %nctaid.x;
    mov.u32 %r3, %ctaid.x;
    mad.lo.s32 %r1, %r1, %r2, %r3;
    mul.wide.u32 %rd2, %r1, 4;
    add.s64 %rd1, %rd1, %rd2;
    st.global.b32 [%rd1], %r1;
    """
    launch(body, out, grid=(4, 3, 2))
    assert out.tolist() == list(range(24))


# Errors.


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("st.global.b32 [%rd1+4], 1;", r"p0 of 128 bytes, at 128\) of 4 bytes is out of range"),
        ("ld.global.b32 %r1, [%rd1+-4];", r"p0 of 128 bytes, at -4\) of 4 bytes is out of range"),
        ("@%p1 ld.global.v2.b32 {%r1, %r2}, [%rd1];", "of 8 bytes is misaligned, in 8 lanes"),
        ("@%p1 bra $skip;\nshfl.sync.bfly.b32 %r1, %r8, 1, 31, -1;\n$skip:", "only 16 of 32 lanes"),
        ("@%p1 bra $skip;\nbar.sync 0;\n$skip:", "16 of 32 threads of block 0 reach this barrier"),
        ("@%p1 ret;\nbar.sync 0;", "16 of 32 threads of block 0 reach this barrier"),
        ("ld.shared.b32 %r1, [tile];", "shared bytes, 4 bytes, was read before it was written"),
        ("st.shared.b32 [tile+512], 1;", "address 512 of 512 shared bytes, 4 bytes, is out of"),
        ("st.shared.b32 [tile+2], 1;", "shared bytes, 4 bytes, is misaligned"),
        (
            "st.global.b8 [%rd1+3], 1;\nld.global.nc.b32 %r1, [%rd1];",
            r"\(p0 .*\) of 4 bytes was written by this launch, and read as constant, in 32 lanes",
        ),
        (
            "ld.global.nc.v2.b32 {%r1, %r2}, [%rd5];\nred.global.add.u32 [%rd5+4], 1;",
            r"\(p0 of 128 bytes, at 4\) of 4 bytes is written, and read as constant, in 32 lanes",
        ),
        ("trap;", "a trap"),
    ],
)
def test_an_error_says_where(body, message):
    head = own_word() + "ld.param.u64 %rd5, [p0];\nsetp.lt.u32 %p1, %r8, 16;\n.loc 1 42 0\n"
    # 16 bytes of alignment at least, so that it is the vector access that is misaligned.
    room = np.zeros(64, np.uint32)
    begin = -room.ctypes.data % 16 // 4
    with pytest.raises(PtxError, match=message) as caught:
        launch(head + body, room[begin : begin + WARP], shared=SHARED)
    assert str(caught.value).startswith("try, 1:42, `")


def test_unwritten_memory_may_not_be_read():
    out, fresh = np.zeros(WARP, np.uint32), np.full(WARP, 7, np.uint32)
    written = np.zeros(fresh.nbytes, bool)
    body = f"{own_word()}\nld.param.u64 %rd3, [p1];\nadd.s64 %rd3, %rd3, %rd2;\n"
    load = "ld.global.b32 %r1, [%rd3];\nst.global.b32 [%rd1], %r1;\n"
    with pytest.raises(PtxError, match=r"p1 of .* was read before it was written, in 32 lanes"):
        launch(body + load, out, fresh, written=written)
    launch(body + "st.global.b16 [%rd3], 5;", out, fresh, written=written)
    assert written.reshape(-1, 4).tolist() == [[True, True, False, False]] * WARP
    with pytest.raises(PtxError, match=r"was read before it was written, in 32 lanes"):
        launch(body + load, out, fresh, written=written)
    launch(body + "st.global.b16 [%rd3+2], 0;", out, fresh, written=written)
    launch(body + load, out, fresh, written=written)
    assert out.tolist() == [5] * WARP


def test_an_unwritten_register_is_garbage():
    assert hex(lanes("mov.b32 %r1, %r2;")[0]) == "0xdeadbeef"


def test_what_is_read_as_constant_may_lie_beside_what_is_written():
    out, source = np.zeros(WARP, np.uint32), np.arange(WARP, dtype=np.uint32)
    body = own_word() + "\n".join(
        [
            "ld.param.u64 %rd3, [p1];",
            "add.s64 %rd3, %rd3, %rd2;",
            "ld.global.nc.b32 %r1, [%rd3];",
            "st.global.b32 [%rd1], %r1;",
            "ld.global.b32 %r2, [%rd1];",
            "st.global.b32 [%rd1], %r2;",
        ]
    )
    launch(body, out, source)
    assert out.tolist() == source.tolist()


@pytest.mark.parametrize(
    "instruction",
    [
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 %r1, %r2, %r3, %r4",
        "add.rz.f32 %f1, %f2, %f3",
        "ld.local.b32 %r1, [%rd1]",
        "call.uni (%r1), unknown, (%r2)",
        "@%p1 call unknown",
        "cvt.rz.f32.f64 %f1, %fd1",
    ],
)
def test_what_is_not_known_is_refused_before_the_launch(instruction):
    with pytest.raises(UnsupportedError, match=re.escape(instruction)):
        Program(entry(f"{instruction};"))


def test_the_text_is_read():
    text = """
    .visible .entry first( .param .u64 .ptr .global .align 1 first_param_0, .param .b8 pair[12] )
    .reqntid 128
    {
    .reg .b32 %r<3>; /* two
    lines */
    .file 1 "/src" "gather.py"
    .file 2 "/src/common.cuh"
    .file 3 "/src/gather.cu"
    .loc 1 7 3 // gather.py:7
    { .reg .b32 tmp; mov.b32 tmp, 1; mov.b32 {%r1, _}, %rd1; }
    .loc 2 9 3
    $L__BB0_1: @!%p1 bra $L__BB0_1;
    }
    .entry second() { ret; }
    """
    kernel = parse(text)
    assert [(p.name, p.type, p.num_bytes) for p in kernel.parameters] == [
        ("first_param_0", "u64", 8),
        ("pair", "b8", 12),
    ]
    first, unpack, branch = kernel.instructions
    assert (first.name, first.operands, first.place) == ("mov.b32", ("tmp", "1"), "gather.py:7")
    assert branch.place == "common.cuh:9"
    assert unpack.operands == ("{%r1, _}", "%rd1")
    assert (branch.predicate, branch.negated, branch.operands) == ("%p1", True, ("$L__BB0_1",))
    assert kernel.labels == {"$L__BB0_1": 2}
    assert kernel.register_type("%r2") == "b32"
    assert parse(text, "second").name == Program(text, "second").kernel.name == "second"
    with pytest.raises(PtxError, match="no entry third"):
        parse(text, "third")


def aligned(num_words):
    """Zeros that begin with a sector."""
    words = np.zeros(num_words + 8, np.uint32)
    first = -words.ctypes.data % 32 // 4
    return words[first : first + num_words]


def counted(body, *arrays, **launched):
    with counting() as launches:
        launch(body, *arrays, **launched)
    (counts,) = launches
    return counts


def accesses(found):
    return found.requests, found.sectors, found.distinct_sectors


# Word a * thread + b of p0 in %rd1.
STRIDED = """
ld.param.u64 %rd1, [p0];
mov.u32 %r8, %tid.x;
mad.lo.u32 %r1, %r8, {a}, {b};
mul.wide.u32 %rd2, %r1, 4;
add.s64 %rd1, %rd1, %rd2;
"""


@pytest.mark.parametrize(
    ("a", "b", "words", "sectors"),
    [
        (1, 0, 1, 4),
        (1, 4, 1, 5),
        (2, 0, 1, 8),
        (8, 0, 1, 32),
        (100, 0, 1, 32),
        (0, 3, 1, 1),
        (4, 0, 4, 16),
        (4, 4, 4, 17),
        (8, 4, 4, 32),
    ],
)
def test_sectors_of_one_request(a, b, words, sectors):
    body, array = STRIDED.format(a=a, b=b), aligned(3200)
    of = {1: (".b32", "%r1"), 4: (".v4.b32", "{%r1, %r2, %r3, %r4}")}
    kind, registers = of[words]
    found = counted(f"{body}ld.global{kind} {registers}, [%rd1];", array)
    assert accesses(found.loads) == (1, sectors, sectors)
    assert accesses(found.stores) == accesses(found.atomics) == (0, 0, 0)
    found = counted(f"{body}st.global{kind} [%rd1], {registers};", array)
    assert accesses(found.stores) == (1, sectors, sectors)
    assert found.loads.requests == 0


def test_sectors_of_several_warps_are_summed_and_counted_once():
    body = STRIDED.format(a=1, b=0)
    found = counted(f"{body}ld.global.b32 %r1, [%rd1];", aligned(64), block=(64,), grid=(3,))
    assert (found.kernel, found.grid, found.num_warps) == ("try", (3,), 6)
    assert accesses(found.loads) == (6, 24, 8)


def test_a_request_has_a_lane_at_least():
    body = f"{STRIDED.format(a=1, b=0)}setp.lt.u32 %p1, %r8, 40;\n"
    found = counted(f"{body}@%p1 ld.global.b32 %r1, [%rd1];", aligned(96), block=(96,))
    assert accesses(found.loads) == (2, 5, 5)


@pytest.mark.parametrize(
    ("a", "b", "sectors", "hottest"), [(1, 0, 4, 2), (0, 3, 1, 64), (8, 0, 32, 2)]
)
def test_atomics_meet_in_a_sector(a, b, sectors, hottest):
    body = f"{STRIDED.format(a=a, b=b)}red.global.add.u32 [%rd1], 1;"
    found = counted(body, aligned(256), grid=(2,))
    assert accesses(found.atomics) == (2, 2 * sectors, sectors)
    assert found.hottest_sector == hottest
    assert found.loads.requests == found.stores.requests == 0


@pytest.mark.parametrize(
    ("num_bytes", "step", "wavefronts"),
    [(4, 4, 1), (4, 0, 1), (4, 8, 2), (4, 128, 32), (4, 132, 1), (2, 2, 1), (8, 8, 2), (16, 16, 4)],
)
def test_wavefronts_of_shared_memory(num_bytes, step, wavefronts):
    kind, registers = {
        2: (".b16", "%rs1"),
        4: (".b32", "%r1"),
        8: (".v2.b32", "{%r1, %r2}"),
        16: (".v4.b32", "{%r1, %r2, %r3, %r4}"),
    }[num_bytes]
    body = f"""
    mov.u32 %r8, %tid.x;
    mov.b32 %r3, tile;
    mad.lo.u32 %r4, %r8, {step}, %r3;
    st.shared{kind} [%r4], {registers};
    """
    found = counted(body, shared=".shared .align 16 .b8 tile[8192];", grid=(2,))
    assert (found.shared_requests, found.shared_wavefronts) == (2, 2 * wavefronts)
    assert found.stores.requests == 0


def test_copies_to_shared_memory_load_what_they_read():
    body = f"""{STRIDED.format(a=4, b=0)}
    shl.b32 %r2, %r8, 4;
    setp.lt.u32 %p1, %r8, 4;
    selp.b32 %r3, 16, 0, %p1;
    cp.async.cg.shared.global [%r2], [%rd1], 16, %r3;
    """
    found = counted(body, aligned(128), shared=".shared .align 16 .b8 tile[512];")
    assert accesses(found.loads) == (1, 2, 2)
    assert (found.shared_requests, found.shared_wavefronts) == (1, 4)


def test_instructions_barriers_and_divergence_are_counted():
    body = """
    ld.param.u64 %rd1, [p0];
    mov.u32 %r8, %warpid;
    mov.b32 %r2, 0;
    $again:
    add.s32 %r2, %r2, 1;
    setp.le.u32 %p1, %r2, %r8;
    @%p1 bra $again;
    bar.sync 0;
    mov.u32 %r8, %laneid;
    setp.lt.u32 %p2, %r8, 7;
    @%p2 bra $end;
    add.s32 %r2, %r2, 1;
    $end:
    """
    found = counted(body, aligned(8), block=(70,))
    # The move of %warpid, three in each turn, the barrier, three, the add, the return.
    warps = [1 + 3 * (number + 1) + 1 + 3 + 1 + 1 for number in range(3)]
    # All of the last warp's six lanes jump over the add.
    warps[2] -= 1
    assert (found.instructions, found.longest_warp) == (sum(warps), warps[2])
    assert found.barriers == 3
    # The head, the turns, the barrier, the branch, the add, the return.
    assert found.basic_blocks == 3 + 6 + 3 + 3 + 2 + 3
    assert found.divergent_blocks == 2
    assert longest_path([found, found]) == 2 * warps[2]


def test_nobody_counts_behind_the_block():
    with counting() as outer:
        launch("", aligned(8))
        with counting() as within:
            launch("", aligned(8))
    launch("", aligned(8))
    assert (len(outer), len(within)) == (2, 1)
    assert outer[0].instructions == outer[0].longest_warp == 1
