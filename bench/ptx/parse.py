"""Reads the text of one PTX kernel: parameters, registers, shared memory, instructions and labels."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import PurePosixPath


class PtxError(Exception):
    """What the text asks for is wrong, or is not known here; the message says where."""


class UnsupportedError(PtxError):
    """An instruction that this interpreter does not have."""


@dataclass(frozen=True)
class Instruction:
    """One instruction, as `@!%p1 ld.global.v2.b32 {%r1, %r2}, [%rd1+8]`."""

    text: str
    name: str  # ld.global.v2.b32
    operands: tuple[str, ...]  # those in braces or brackets are one
    predicate: str = ""  # %p1; "": it has none
    negated: bool = False
    place: str = ""  # file and line of the source, where the text tells

    @property
    def parts(self) -> list[str]:
        return self.name.split(".")

    @property
    def operation(self) -> str:
        return self.parts[0]

    @property
    def type(self) -> str:
        """The last part, which is the result's or the operands' type for most instructions."""
        return self.parts[-1]


@dataclass(frozen=True)
class Parameter:
    name: str
    type: str  # as `u64`
    num_bytes: int


@dataclass
class Kernel:
    """One `.entry`."""

    name: str
    parameters: list[Parameter]
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # the instruction that comes next
    # By name, or by prefix for what was declared as `%r<9>`: the type, as `b32`.
    register_types: dict[str, str] = field(default_factory=dict)
    shared: dict[str, int] = field(default_factory=dict)  # where each array begins
    shared_bytes: int = 0  # of arrays whose size the text tells

    def register_type(self, name: str) -> str:
        known = self.register_types
        found = known.get(name) or known.get(name.rstrip("0123456789"))
        if found is None:
            raise PtxError(f"{self.name}: the register {name} is not declared")
        return found


def parse(text: str, entry: str = "") -> Kernel:
    """The kernel of this name, or the first one; functions that it calls become a part of it.

    Raises:
        PtxError: there is no such kernel, or a line is no instruction.
    """
    text = _prepared(text)
    name = re.escape(entry) or r"[\w$]+"
    head = re.search(rf"\.entry\s+({name})\s*\((.*?)\)[^{{]*\{{", text, re.DOTALL)
    if head is None:
        raise PtxError(f"no entry {entry}")
    parameters = [_parameter(words) for words in head[2].split(",") if words.strip()]
    kernel = Kernel(head[1], parameters)
    _read_shared(kernel, text)
    files = {
        number: PurePosixPath(name).name
        for number, name in re.findall(r'\.file\s+(\d+) .*"([^"\n]+)"', text)
    }
    place = ""
    # A scope's braces stand alone: within an instruction they come in pairs, on one line.
    for line in _body(text[head.end() :]).splitlines():
        line = line.strip()
        if location := re.match(r"\.loc\s+(\d+) (\d+)", line):
            place = f"{files.get(location[1], location[1])}:{location[2]}"
            continue
        if label := re.match(r"([\w$]+):", line):
            kernel.labels[label[1]] = len(kernel.instructions)
            line = line[label.end() :]
        for statement in line.split(";"):
            statement = statement.strip().removeprefix("{").strip()
            if statement.startswith((".reg", ".param")):
                _read_registers(kernel, statement)
            elif statement and statement[0] not in ".}":
                kernel.instructions.append(_instruction(statement, place))
    return kernel


# A module is read once for each of its kernels.
@lru_cache(maxsize=1)
def _prepared(text: str) -> str:
    """Without comments, and with calls in place."""
    text = re.sub(r"/\*.*?\*/|//[^\n\"]*$", "", text, flags=re.DOTALL | re.MULTILINE)
    return _with_calls_in_place(text)


CALL = re.compile(
    r"(@\S+\s+)?call(?:\.uni)?\s*(?:\(([^)]*)\),)?\s*([\w$]+)\s*(?:,\s*\(([^)]*)\))?\s*;"
)
FUNCTION = re.compile(r"\.func\s+(?:\(([^)]*)\)\s*)?([\w$]+)\s*\(([^)]*)\)\s*\{")


def _with_calls_in_place(text: str) -> str:
    """The body of each function in place of each call, with names of its own.

    A parameter of a call is a register, which the body knows by the caller's name.
    """
    functions = {
        head[2]: (_last_words(head[1]) + _last_words(head[3]), _body(text[head.end() :]))
        for head in FUNCTION.finditer(text)
    }
    numbers = itertools.count()

    def in_place(call: re.Match[str]) -> str:
        predicate, results, function, arguments = call.groups()
        if predicate or function not in functions:
            return " ".join(call[0].split())
        names, body = functions[function]
        passed = dict(zip(names, _last_words(results) + _last_words(arguments), strict=True))
        # `%r<9>` declares %r1.
        declared = re.findall(r"\.(?:reg|param)\s+\.\w+\s+([^;]*);", body)
        own = {name.split("<")[0] for names in declared for name in _last_words(names)}
        own.update(re.findall(r"^\s*([\w$]+):", body, re.MULTILINE))
        mark = f"_call{next(numbers)}_"

        def renamed(word: re.Match[str]) -> str:
            stem = word[0].rstrip("0123456789")
            if word[0] in own:
                return word[0] + mark
            if stem in own:
                return stem + mark + word[0][len(stem) :]
            return passed.get(word[0], word[0])

        body = re.sub(r"[%$\w]+", renamed, CALL.sub(in_place, body))
        body = re.sub(r"\bret\b", f"bra $end{mark}", body)
        return f"{body}\n$end{mark}:\n"

    return CALL.sub(in_place, text)


def _last_words(text: str | None) -> list[str]:
    """The names in `.param .b64 first, .param .b64 second`."""
    return [part.split()[-1] for part in (text or "").split(",") if part.strip()]


def _body(text: str) -> str:
    """Up to the brace that closes the one before the text."""
    depth = 1
    for brace in re.finditer(r"[{}]", text):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return text[: brace.start()]
    raise PtxError("a kernel has no end")


def _parameter(words: str) -> Parameter:
    kind = re.search(r"\.([usbf])(\d+)\b", words)
    name = re.search(r"([\w$]+)(?:\[(\d+)\])?\s*$", words)
    if kind is None or name is None:
        raise PtxError(f"not a parameter: {words.strip()}")
    return Parameter(name[1], kind[1] + kind[2], int(name[2] or 1) * int(kind[2]) // 8)


def _read_shared(kernel: Kernel, text: str) -> None:
    pattern = r"\.shared\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d*)\]"
    for alignment, name, size in re.findall(pattern, text):
        begin = -(-kernel.shared_bytes // int(alignment)) * int(alignment)
        kernel.shared[name] = begin
        kernel.shared_bytes = begin + int(size or 0)


def _read_registers(kernel: Kernel, statement: str) -> None:
    """`.reg .b32 %r<9>`, or `.reg .b16 low, high`, or a call's `.param .b64 param0`."""
    _, kind, names = statement.split(None, 2)
    for name in names.split(","):
        kernel.register_types[name.strip().split("<")[0]] = kind[1:]


def _instruction(statement: str, place: str) -> Instruction:
    found = re.match(r"(?:@(!?)([%\w.$]+)\s+)?([a-z][\w.:]*)\s*(.*)$", statement, re.DOTALL)
    if found is None:
        raise PtxError(f"not an instruction: {statement}")
    negated, predicate, name, operands = found.groups(default="")
    text = " ".join(statement.split())
    return Instruction(text, name, _operands(operands), predicate, negated == "!", place)


def _operands(text: str) -> tuple[str, ...]:
    """Parts between commas outside of braces and brackets."""
    parts = re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", text)
    return tuple(part.strip() for part in parts if part.strip())


def inner(operand: str) -> list[str]:
    """The registers of `{%r1, %r2}`, or the one that has no braces."""
    return [name.strip() for name in operand.strip("{} ").split(",")]
