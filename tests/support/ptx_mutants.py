"""Single changed instructions of a compiled kernel."""

import copy
import random
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from gpu_embed.bench.ptx.formats import dtype_of
from gpu_embed.bench.ptx.machine import Program, make_step
from gpu_embed.bench.ptx.parse import Instruction, PtxError, inner, parse

ROOT = Path(__file__).resolve().parents[2]

# The text's end, hints, and barriers: all lanes of a block run side by side here, so the loss of one shows nothing.
LEFT_ALONE = ("ret", "exit", "bra", "nop", "membar", "fence", "prefetch", "bar")
OFF_BY_ONE = {"lt": "le", "le": "lt", "gt": "ge", "ge": "gt", "lo": "ls", "hi": "hs"}
NEGATED = {"lt": "ge", "le": "gt", "gt": "le", "ge": "lt", "eq": "ne", "ne": "eq"}
OTHER_OPERATION = {
    "add": "sub",
    "sub": "add",
    "min": "max",
    "max": "min",
    "and": "or",
    "or": "and",
    "xor": "or",
    "shl": "shr",
    "shr": "shl",
    "mul": "add",
    "div": "mul",
    "not": "mov",
    "neg": "mov",
}
OTHER_ATOMIC = {"add": ("exch", "max"), "exch": ("add", "or")}
# Sources of these can be swapped, with another result.
ORDERED = ("sub", "setp", "selp", "div", "rem", "shl", "shr", "mad", "fma", "prmt", "bfe")
SIGNED = ("setp", "shr", "cvt", "mul", "mad", "div", "rem", "min", "max", "ld", "bfe")
NARROWER = {"64": "32", "32": "16", "16": "8"}


@dataclass(frozen=True)
class Mutant:
    """One instruction of a kernel, and what stands in its place."""

    kernel: str
    number: int  # of the instruction
    kind: str  # as "constant + 1"
    old: Instruction
    new: Instruction

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What stays the same where registers are numbered anew and lines move."""
        return self.kernel, source_line(self.old.place), shape(self.old), self.kind

    def of(self, program: Program) -> Program:
        """The program with this one change."""
        changed = copy.copy(program)
        changed.kernel, changed.steps = copy.copy(program.kernel), list(program.steps)
        changed.kernel.instructions = list(program.kernel.instructions)
        changed.kernel.instructions[self.number] = self.new
        changed.steps[self.number] = make_step(self.new)
        return changed


def shape(instruction: Instruction) -> str:
    """The text without the registers' numbers and the parameters' prefix."""
    text = re.sub(r"%([a-z]+)\d+", r"%\1", instruction.text)
    text = re.sub(r"\w+_param_(\d+)", r"param_\1", text)
    return re.sub(r"([\[{]) | ([\]}])", r"\1\2", " ".join(text.split()))


def source_line(place: str) -> str:
    """The text of `gather.py:15`; of a file that is not ours, its place."""
    name, _, line = place.partition(":")
    path = ROOT / "kernels" / name
    return path.read_text().splitlines()[int(line) - 1].strip() if path.is_file() else place


def sample(program: Program, count: int) -> list[Mutant]:
    """Some of the program's mutants; the same ones wherever it compiles to the same instructions."""
    every = list(mutants(program))
    text = "\n".join(instruction.text for instruction in program.kernel.instructions)
    draw = random.Random(zlib.crc32(text.encode()))
    return draw.sample(every, min(count, len(every)))


def mutants(program: Program) -> Iterator[Mutant]:
    """Every mutant that the interpreter can run."""
    for number, old in enumerate(program.kernel.instructions):
        if old.operation in LEFT_ALONE:
            continue
        for kind, text in _changes(old):
            new = replace(_read(text), place=old.place)
            try:
                make_step(new)
            except (PtxError, ValueError, KeyError):
                continue
            yield Mutant(program.kernel.name, number, kind, old, new)


def _read(text: str) -> Instruction:
    (instruction,) = parse(f".entry changed() {{\n{text};\n}}").instructions
    return instruction


def _text(old: Instruction, **changed: object) -> str:
    new = replace(old, **changed)
    predicate = f"@{'!' * new.negated}{new.predicate} " if new.predicate else ""
    return f"{predicate}{new.name} {', '.join(new.operands)}"


def _changes(old: Instruction) -> Iterator[tuple[str, str]]:
    """What was changed, and the text of the new instruction."""
    yield "dropped", "nop"
    if old.predicate:
        yield "predicate negated", _text(old, negated=not old.negated)
        yield "predicate removed", _text(old, predicate="", negated=False)
    yield from _other_names(old)
    yield from _other_operands(old)


def _other_names(old: Instruction) -> Iterator[tuple[str, str]]:
    operation, *parts = old.parts
    if operation == "setp":
        for kind, table in (("off by one", OFF_BY_ONE), ("negated", NEGATED)):
            if parts[0] in table:
                yield kind, _text(old, name=".".join([operation, table[parts[0]], *parts[1:]]))
    elif operation == "atom":
        for before, names in OTHER_ATOMIC.items():
            for name in names if before in parts else ():
                yield f"{before} -> {name}", _text(old, name=old.name.replace(before, name))
    elif other := OTHER_OPERATION.get(operation):
        name = f"{other}.{old.type}"
        if other == "mul" and old.type[0] != "f":
            name = f"mul.lo.{old.type}"
        yield f"{operation} -> {other}", _text(old, name=name)
    for place, part in enumerate(old.parts):
        for kind, changed in _other_types(operation, part):
            names = [*old.parts[:place], changed, *old.parts[place + 1 :]]
            yield kind, _text(old, name=".".join(names))


def _other_types(operation: str, part: str) -> Iterator[tuple[str, str]]:
    found = re.fullmatch(r"([usb])(8|16|32|64)", part)
    if found is None or operation in ("stmatrix", "ldmatrix", "bar"):
        return
    sign, bits = found.groups()
    if bits in NARROWER:
        yield f"{bits} bits -> {NARROWER[bits]}", sign + NARROWER[bits]
    if sign != "b" and operation in SIGNED:
        yield "sign", f"{'u' if sign == 's' else 's'}{bits}"


def _other_operands(old: Instruction) -> Iterator[tuple[str, str]]:
    def with_operand(place: int, operand: str) -> str:
        return _text(old, operands=(*old.operands[:place], operand, *old.operands[place + 1 :]))

    for place, operand in enumerate(old.operands):
        if operand[0] == "[" and "param" not in old.parts:
            size = dtype_of(old.type).itemsize * max(len(inner(o)) for o in old.operands)
            found = re.match(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+))?\s*\]$", operand)
            if found is not None:
                for sign, by in ((" + 1", size), (" - 1", -size)):
                    moved = int(found[2] or "0", 0) + by
                    yield f"address{sign} item", with_operand(place, f"[{found[1]}+{moved}]")
        elif operand[0] == "{" and len(names := inner(operand)) > 1 and old.operation != "mov":
            swapped = ", ".join([names[1], names[0], *names[2:]])
            yield "two items swapped", with_operand(place, f"{{{swapped}}}")
        elif re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)", operand):
            for sign, by in ((" + 1", 1), (" - 1", -1)):
                yield f"constant{sign}", with_operand(place, str(int(operand, 0) + by))
        elif found := re.fullmatch(r"0[fd]([0-9A-F]+)", operand):
            bits = f"{int(found[1], 16) + 1:0{len(found[1])}X}"
            yield "constant + 1", with_operand(place, operand[:2] + bits)
    if old.operation in ORDERED:
        first, second = (2, 3) if old.operation == "mad" else (1, 2)
        operands = list(old.operands)
        operands[first], operands[second] = operands[second], operands[first]
        yield "operands swapped", _text(old, operands=tuple(operands))
