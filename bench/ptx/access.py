"""Instructions that load, store, add atomically, and copy to shared memory."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from .formats import Array, dtype_of, fma_to_odd, from_bf16, to_bf16
from .memory import Space
from .parse import Instruction, UnsupportedError, inner

if TYPE_CHECKING:
    from .machine import Lanes, Machine, Step

FUNCTIONS = ("add", "exch", "cas", "min", "max", "and", "or", "xor")


def make_step(instruction: Instruction) -> Step | None:
    operation, parts = instruction.operation, instruction.parts
    if operation in ("ld", "st") and "param" in parts:
        return (_load_parameter if operation == "ld" else _pass)(instruction)
    if operation in ("ld", "st", "atom", "red"):
        return {"ld": _load, "st": _store}.get(operation, _atomic)(instruction)
    if operation in ("stmatrix", "ldmatrix"):
        return _matrices(instruction)
    if instruction.name.startswith("cp.async."):
        waits = ("commit_group", "wait_group", "wait_all")
        # A copy is made at once.
        return (lambda machine, lanes: None) if parts[2] in waits else _copy(instruction)
    return None


def _address(operand: str) -> tuple[str, int]:
    """`[%rd1+8]`: register or array, and bytes after it."""
    found = re.match(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+))?\s*\]$", operand)
    if found is None:
        raise UnsupportedError(f"the address {operand}")
    return found[1], int(found[2] or "0", 0)


def _addresses(machine: Machine, operand: str, lanes: Lanes) -> Array:
    """int64 [lanes]; addresses of shared memory may be in 32 bits."""
    base, offset = _address(operand)
    wide = base[0] == "%" and machine.kernel.register_type(base).endswith("64")
    return machine.read(base, "u64" if wide else "u32", lanes).astype(np.int64) + offset


def _space_name(instruction: Instruction) -> str:
    spaces = [part.split("::")[0] for part in instruction.parts]
    if "local" in spaces:
        raise UnsupportedError(f"`{instruction.text}`")
    return "shared" if "shared" in spaces else "global"


def _space(machine: Machine, name: str) -> Space:
    return machine.shared if name == "shared" else machine.memory


def _offsets(
    machine: Machine,
    space: str,
    kind: str,
    lanes: Lanes,
    addresses: Array,
    num_bytes: int,
    constant: bool = False,
) -> Array:
    """Where each lane's access begins in the space's data, checked and counted.

    Args:
        kind: "load", "store" or "atomic".
        constant: a load that takes what it reads for constant while the kernel runs.
    """
    blocks, reads = machine.local_block[lanes], kind != "store"
    offsets = _space(machine, space).offsets(addresses, blocks, num_bytes, reads)
    if machine.program.reads_constants and space == "global" and (constant or kind != "load"):
        machine.memory.note(addresses, num_bytes, constant)
    if machine.counter is not None:
        numbers = machine.launch_numbers(lanes)
        machine.counter.access(space, kind, numbers, addresses, num_bytes)
    return offsets


def _vector(instruction: Instruction) -> int:
    """Numbers that a lane moves."""
    return next((int(p[1]) for p in instruction.parts if re.fullmatch(r"v\d", p)), 1)


def _load_parameter(instruction: Instruction) -> Step:
    name, offset = _address(instruction.operands[1])
    dtype = dtype_of(instruction.type)
    targets = inner(instruction.operands[0])

    def step(machine: Machine, lanes: Lanes) -> None:
        if name in machine.kernel.register_types:  # of a call
            machine.write(targets[0], machine.read(name, instruction.type, lanes), lanes)
            return
        values = np.frombuffer(machine.parameters[name], dtype, len(targets), offset)
        for target, value in zip(targets, values, strict=True):
            machine.write(target, np.full(machine.count(lanes), value), lanes)

    return step


def _pass(instruction: Instruction) -> Step:
    """A number to or from a function, through a register."""
    name, offset = _address(instruction.operands[0])
    if offset:
        raise UnsupportedError(f"`{instruction.text}`")

    def step(machine: Machine, lanes: Lanes) -> None:
        machine.write(name, machine.read(instruction.operands[1], instruction.type, lanes), lanes)

    return step


def _load(instruction: Instruction) -> Step:
    dtype, space = dtype_of(instruction.type), _space_name(instruction)
    targets, constant = inner(instruction.operands[0]), "nc" in instruction.parts

    def step(machine: Machine, lanes: Lanes) -> None:
        memory = _space(machine, space)
        addresses = _addresses(machine, instruction.operands[1], lanes)
        num_bytes = len(targets) * dtype.itemsize
        offsets = _offsets(machine, space, "load", lanes, addresses, num_bytes, constant)
        words = memory.words(dtype.itemsize)
        first = offsets // dtype.itemsize
        values = [words[first + part].view(dtype) for part in range(len(targets))]
        for target, value in zip(targets, values, strict=True):
            machine.write(target, value, lanes)

    return step


def _store(instruction: Instruction) -> Step:
    dtype, space = dtype_of(instruction.type), _space_name(instruction)
    sources = inner(instruction.operands[1])

    def step(machine: Machine, lanes: Lanes) -> None:
        memory = _space(machine, space)
        addresses = _addresses(machine, instruction.operands[0], lanes)
        num_bytes = len(sources) * dtype.itemsize
        offsets = _offsets(machine, space, "store", lanes, addresses, num_bytes)
        words = memory.words(dtype.itemsize)
        for part, source in enumerate(sources):
            values = machine.read(source, instruction.type, lanes)
            words[offsets // dtype.itemsize + part] = values.view(words.dtype)

    return step


def _atomic(instruction: Instruction) -> Step:
    """One lane after another, in the order of their numbers, where several meet at one word."""
    kind, space, vector = instruction.type, _space_name(instruction), _vector(instruction)
    dtype = dtype_of(kind)
    function = next((part for part in instruction.parts if part in FUNCTIONS), "")
    operands = list(instruction.operands)
    targets = inner(operands.pop(0)) if instruction.operation == "atom" else ["_"] * vector
    address, *rest = operands
    # A cache hint comes last.
    sources = [inner(operand) for operand in rest[: 2 if function == "cas" else 1]]
    if not function:
        raise UnsupportedError(f"`{instruction.text}`")

    def step(machine: Machine, lanes: Lanes) -> None:
        memory = _space(machine, space)
        addresses = _addresses(machine, address, lanes)
        num_bytes = vector * dtype.itemsize
        offsets = _offsets(machine, space, "atomic", lanes, addresses, num_bytes)
        turns = _turns(offsets)
        words = memory.words(dtype.itemsize)
        for part, target in enumerate(targets):
            places = offsets // dtype.itemsize + part
            values = [machine.read(source[part], kind, lanes) for source in sources]
            before = np.empty(len(places), dtype)
            for turn in range(int(turns.max()) + 1):
                now = turns == turn
                before[now] = old = words[places[now]].view(dtype)
                new = _combine(function, kind, old, *(value[now] for value in values))
                words[places[now]] = new.astype(dtype).view(words.dtype)
            machine.write(target, before, lanes)

    return step


def _turns(offsets: Array) -> Array:
    """How many earlier lanes have the same offset."""
    order = np.argsort(offsets, kind="stable")
    positions = np.arange(len(offsets))
    new = np.r_[True, np.diff(offsets[order]) != 0]
    turns = np.empty_like(positions)
    turns[order] = positions - np.maximum.accumulate(np.where(new, positions, 0))
    return turns


def _combine(
    function: str, kind: str, old: Array, value: Array, swap: Array | None = None
) -> Array:
    if function == "exch":
        return value
    if function == "cas":
        assert swap is not None
        return np.where(old == value, swap, old)
    if function == "add" and kind in ("bf16", "bf16x2", "f16x2"):
        return add_halves(kind, old, value)
    return {
        "add": np.add,
        "min": np.minimum,
        "max": np.maximum,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
    }[function](old, value)


def add_halves(kind: str, a: Array, b: Array) -> Array:
    """Sums of 16-bit floats, one or two a word, rounded once."""
    x, y = (np.ascontiguousarray(bits).view(np.uint16) for bits in (a, b))
    if kind.startswith("bf16"):
        wide = [from_bf16(half).astype(np.float64) for half in (x, y)]
        total = to_bf16(fma_to_odd(wide[0], np.ones_like(wide[0]), wide[1]))
    else:
        total = (x.view(np.float16) + y.view(np.float16)).view(np.uint16)
    return total.view(a.dtype)


def _copy(instruction: Instruction) -> Step:
    """cp.async: from global to shared memory; bytes past those that it reads are zeros."""
    target, source, size = (*instruction.operands[:2], int(instruction.operands[2], 0))
    read = instruction.operands[3] if len(instruction.operands) > 3 else str(size)

    def step(machine: Machine, lanes: Lanes) -> None:
        to = _addresses(machine, target, lanes)
        start = _addresses(machine, source, lanes)
        num_read = machine.read(read, "u32", lanes)
        to = _offsets(machine, "shared", "store", lanes, to, size)
        some = num_read > 0
        copied = np.zeros((len(to), size), np.uint8)
        if some.any():
            reading = machine.numbers(lanes)[some]
            begin = _offsets(machine, "global", "load", reading, start[some], size)
            copied[some] = machine.memory.data[begin[:, None] + np.arange(size)]
        copied[np.arange(size) >= num_read[:, None]] = 0
        machine.shared.data[to[:, None] + np.arange(size)] = copied

    return step


def _matrices(instruction: Instruction) -> Step:
    """8 x 8 matrices of 16 bits: lane 8 m + r names row r of matrix m, and lane l holds two neighbours of each."""
    stores = instruction.operation == "stmatrix"
    address, registers = instruction.operands if stores else instruction.operands[::-1]
    names = inner(registers)
    transposed = "trans" in instruction.parts

    def step(machine: Machine, lanes: Lanes) -> None:
        machine.require_whole_warps(lanes)
        numbers = machine.numbers(lanes)
        lane = numbers % 32
        rows = _addresses(machine, address, lanes)
        naming = lane < 8 * len(names)
        begins = np.zeros(len(numbers), np.int64)
        kind = "store" if stores else "load"
        begins[naming] = _offsets(machine, "shared", kind, numbers[naming], rows[naming], 16)
        warp_first = np.arange(len(numbers)) - lane
        words = machine.shared.words(2)
        for matrix, name in enumerate(names):
            places = []
            for which in range(2):
                row, column = lane // 4, 2 * (lane % 4) + which
                if transposed:
                    row, column = column, row
                places.append(begins[warp_first + 8 * matrix + row] // 2 + column)
            if stores:
                pair = machine.read(name, "b32", lanes)
                words[places[0]] = (pair & np.uint32(0xFFFF)).astype(np.uint16)
                words[places[1]] = (pair >> np.uint32(16)).astype(np.uint16)
            else:
                low, high = (words[place].astype(np.uint32) for place in places)
                machine.write(name, low | high << np.uint32(16), lanes)

    return step
