"""Reads what a kernel compiled to: its accesses to memory and its loops, in PTX and in machine code."""

from __future__ import annotations

import ast
import re
import struct
from collections.abc import Iterator, Sequence
from functools import cache, reduce
from operator import and_
from pathlib import Path
from typing import NamedTuple

# Operations of a thread on global memory; "atomic" is one that neither adds nor exchanges.
ATOMICS = ("add", "exchange", "atomic")
ACCESSES = ("load", "store", *ATOMICS)
# Of the bulk copy engine: one thread's instruction moves a block.
BULK = ("bulk load", "bulk store", "bulk add")
MEMORY = (*ACCESSES, *BULK, "shared", "local")


class Instruction(NamedTuple):
    """One instruction that leaves the thread's registers."""

    operation: str  # one of MEMORY, "shuffle" or "barrier"
    # An access's address, by its name in the source, as `weight_ptr`; "" in machine code.
    pointer: str
    num_bytes: int  # that a thread moves with one of ACCESSES; else 0
    in_loop: bool


# By the instruction's name; the first that matches counts.
PTX = (
    (r"(ld|st)\.param", ""),
    (r"(ld|st)matrix\.|(ld|st|atom|red)\.[\w.]*shared", "shared"),
    (r"ld\.|cp\.async\.c[ag]\.", "load"),
    (r"st\.", "store"),
    (r"(atom|red)\..*\.add\.", "add"),
    (r"(atom|red)\..*\.exch\.", "exchange"),
    (r"(atom|red)\.", "atomic"),
    (r"cp\.async\.bulk\.tensor\.\w+\.shared", "bulk load"),
    (r"cp\.async\.bulk\.tensor\.\w+\.global", "bulk store"),
    (r"cp\.reduce\.async\.bulk\..*\.add", "bulk add"),
    (r"bar(rier)?\.", "barrier"),
    (r"shfl\.", "shuffle"),
)
MACHINE_CODE = (
    (r"(LDG|LDGSTS)\b", "load"),
    (r"STG\b", "store"),
    (r"(REDG?|ATOMG)\..*\bADD\b", "add"),
    (r"(REDG?|ATOMG)\..*\bEXCH\b", "exchange"),
    (r"(REDG?|ATOMG)\b", "atomic"),
    (r"UTMALDG\b", "bulk load"),
    (r"UTMASTG\b", "bulk store"),
    (r"UTMAREDG\b.*\.ADD\b", "bulk add"),
    (r"(LDSM?|STSM?|ATOMS)\b", "shared"),
    (r"(LDL|STL)\b", "local"),
    (r"BAR\b", "barrier"),
    (r"SHFL\b", "shuffle"),
)


@cache
def _operation(name: str, table: Sequence[tuple[str, str]]) -> str:
    return next((operation for pattern, operation in table if re.match(pattern, name)), "")


def read_ptx(ptx: str) -> Iterator[Instruction]:
    """PTX alone tells lines of the source. Triton writes each access in it as it is to be."""
    files = {
        number: str(Path(folder, name))
        for number, folder, name in re.findall(r'\.file\s+(\d+) "([^"]*)"(?: "([^"]*)")?', ptx)
    }
    lines = ptx.splitlines()
    loops = _ptx_loops(lines)
    pointer = ""
    for number, line in enumerate(lines):
        if location := re.match(r"\s*\.loc\s+(\d+) (\d+)", line):
            pointer = _pointer(files[location[1]], int(location[2]))
            continue
        found = re.match(r"\s*(?:@!?%\w+\s+)?([a-z]\w*\.[\w.:]+)\s*(.*)", line)
        if found is None or not (operation := _operation(found[1], PTX)):
            continue
        in_loop = any(number in loop for loop in loops)
        named = pointer if operation in (*ACCESSES, *BULK) else ""
        num_bytes = _ptx_bytes(found[1], found[2]) if operation in ACCESSES else 0
        yield Instruction(operation, named, num_bytes, in_loop)


def _ptx_bytes(name: str, operands: str) -> int:
    if name.startswith("cp."):
        found = re.search(r"\], (0x\w+)", operands)
        assert found is not None, operands
        return int(found[1], 16)
    parts = name.split(".")
    items = next((int(p[1:]) for p in parts if re.fullmatch(r"v\d", p)), 1)
    bits = next(int(p[1:]) for p in reversed(parts) if re.fullmatch(r"[bfsu]\d+", p))
    return items * bits // 8


def _ptx_loops(lines: Sequence[str]) -> list[range]:
    """The lines between a label and each later jump back to it."""
    labels: dict[str, int] = {}
    loops = []
    for number, line in enumerate(lines):
        if found := re.match(r"(\$L\w+):", line):
            labels[found[1]] = number
        elif (found := re.search(r"\bbra(?:\.uni)?\s+(\$L\w+);", line)) and found[1] in labels:
            loops.append(range(labels[found[1]], number))
    return loops


@cache
def _pointer(file: str, line: int) -> str:
    """What the memory access at a line of the kernels' source names: its first `*_ptr`, or its `*_desc`.

    "" where there is none.
    """
    if not file.endswith(".py"):
        return ""
    for node in ast.walk(_module(file)):
        if isinstance(node, ast.Call) and node.lineno <= line <= (node.end_lineno or node.lineno):
            function = ast.unparse(node.func)
            if found := re.fullmatch(r"(\w+_desc)\.(?:load|store|atomic_\w+)", function):
                return found[1]
            if re.fullmatch(r"tl\.(load|store|atomic_\w+)", function):
                return next(iter(re.findall(r"\w+_ptr\b", ast.unparse(node.args[0]))), "")
    return ""


@cache
def _module(file: str) -> ast.Module:
    return ast.parse(Path(file).read_text())


def machine_code(cubin: bytes) -> bytes:
    """The kernel's instructions: the one section .text.* of an ELF file."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    # name, type, flags, address, offset, size, ...
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]
    found = []
    for name, _, _, _, offset, length in sections:
        start = sections[names][4] + name
        if cubin[start:].startswith(b".text."):
            found.append(cubin[offset : offset + length])
    (code,) = found
    return code


# A loop of these alone waits for a bulk copy.
WAITING = r"(SYNCS|BRA|NANOSLEEP|NOP)\b"
# Bytes of an instruction, since sm_70.
INSTRUCTION_BYTES = 16


class MachineCode(NamedTuple):
    """What a kernel's machine code says of it."""

    instructions: list[Instruction]
    # Of the longest innermost loop; 0 where there is none.
    loop_instructions: int
    loop_accesses: int  # those of them that access memory of any kind


def read_machine_code(lines: Sequence[str], address: int) -> MachineCode:
    """One kernel, disassembled to a line an instruction, whose first lies at that address."""
    loops = [
        loop
        for loop in natural_loops(_successors(lines, address))
        if not all(re.match(WAITING, _name(lines[number])) for number in loop)
    ]
    looped = set().union(*loops)
    read = [_machine_instruction(line, number in looped) for number, line in enumerate(lines)]
    innermost = [loop for loop in loops if not any(other < loop for other in loops)]
    longest = max(innermost, key=len, default=set())
    return MachineCode(
        instructions=[instruction for instruction in read if instruction],
        loop_instructions=len(longest),
        loop_accesses=sum(
            instruction is not None and instruction.operation in MEMORY
            for number, instruction in enumerate(read)
            if number in longest
        ),
    )


def _name(line: str) -> str:
    found = re.match(r"(?:@!?U?P\w+ )?([A-Z][\w.]+)", line)
    assert found is not None, line
    return found[1]


def _machine_instruction(line: str, in_loop: bool) -> Instruction | None:
    name = _name(line)
    if not (operation := _operation(name, MACHINE_CODE)):
        return None
    num_bytes = _machine_bytes(name) if operation in ACCESSES else 0
    return Instruction(operation, "", num_bytes, in_loop)


def _machine_bytes(name: str) -> int:
    """The width in an instruction's name; 4 bytes go without saying."""
    for part in name.split("."):
        if found := re.fullmatch(r"[US]?(8|16|64|128|256)|F(\d+)(?:x(\d))?", part):
            return int(found[1] or found[2]) * int(found[3] or 1) // 8
    return 4


def _successors(lines: Sequence[str], address: int) -> list[list[int]]:
    """For each instruction those that may run next. A call comes back, so it is one of them too."""
    successors = []
    for number, line in enumerate(lines):
        following = [number + 1] if number + 1 < len(lines) else []
        found = re.match(r"(@!?U?P\w+ )?(\w+)\S*(?: (.*))?", line)
        assert found is not None, line
        guard, name, operands = found.groups(default="")
        if name in ("BRA", "CALL"):
            target = (int(operands.split()[-1], 16) - address) // INSTRUCTION_BYTES
            # A jump has its condition before its name, among its operands, or in both places.
            always = name == "BRA" and not guard and operands.startswith("0x")
            successors.append([target] if always else [target, *following])
        elif name in ("EXIT", "RET") and not guard:
            successors.append([])
        else:
            successors.append(following)
    return successors


def natural_loops(successors: Sequence[Sequence[int]]) -> list[set[int]]:
    """The loops of a program that begins at node 0, each with all its nodes; inner ones are loops too.

    A loop is entered at its first node alone, so a jump back from code that merely lies further down is none.
    """
    reached = _reach(successors, 0, set())
    predecessors: list[list[int]] = [[] for _ in successors]
    for node in reached:
        for successor in successors[node]:
            predecessors[successor].append(node)
    order = sorted(reached - {0})
    # For each node, as the bits of a number, the nodes that every way to it passes.
    passed = {node: (1 << len(successors)) - 1 for node in order}
    passed[0] = 1
    changed = True
    while changed:
        changed = False
        for node in order:
            common = reduce(and_, (passed[before] for before in predecessors[node])) | 1 << node
            changed |= common != passed[node]
            passed[node] = common
    loops: dict[int, set[int]] = {}
    for node in reached:
        for first in successors[node]:
            if passed[node] >> first & 1:
                loop = _reach(predecessors, node, {first})
                loops[first] = loops.get(first, set()) | loop
    return list(loops.values())


def _reach(edges: Sequence[Sequence[int]], start: int, ends: set[int]) -> set[int]:
    """`ends`, and the nodes that are reached without passing them."""
    seen = set(ends)
    waiting = [start]
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            waiting += edges[node]
    return seen
