"""Runs a kernel's instructions: all threads of the grid at once, one array a register.

Of all lanes those at the earliest basic block go first, so that what has parted meets again as early as it can, as a
compiler's own reconvergence points have it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import numpy as np

from . import access, arithmetic, counts, warp
from .formats import Array, dtype_of, unsigned
from .memory import FaultError, GlobalMemory, SharedMemory
from .parse import Instruction, Parameter, PtxError, UnsupportedError, parse
from .warp import WARP

# Lanes that run side by side; a larger grid takes several turns, one after another.
MOST_LANES = 2**17
# Executed basic blocks, far more than a kernel that ends.
MOST_STEPS = 1_000_000
DONE = 2**30  # the basic block of a lane that has returned
ENDS = ("bra", "ret", "exit", "trap")
# They order or hint at what is in order here.
IGNORED = ("membar", "fence", "griddepcontrol", "nop", "prefetch", "discard", "applypriority")
# All lanes, or the numbers of those that run.
Lanes = Any
# Runs one instruction in these lanes.
Step = Callable[["Machine", Lanes], None]


class Program:
    """A kernel, ready to be launched: the entry of this name, or the first one.

    Raises:
        UnsupportedError: it has an instruction that is not known here.
    """

    def __init__(self, text: str, entry: str = "") -> None:
        self.kernel = parse(text, entry)
        self.steps = [make_step(instruction) for instruction in self.kernel.instructions]
        # Only then must a launch know what it has written.
        self.reads_constants = any("nc" in one.parts for one in self.kernel.instructions)
        starts = {0, *self.kernel.labels.values()}
        for number, instruction in enumerate(self.kernel.instructions):
            if instruction.operation in ENDS or is_barrier(instruction):
                starts.add(number + 1)
        starts -= {len(self.kernel.instructions)}
        # Basic blocks: the first instruction of each, and the one past its last.
        self.starts = sorted(starts)
        self.ends = [*self.starts[1:], len(self.kernel.instructions)]

    def target(self, label: str) -> int:
        """The basic block at a label."""
        number = self.kernel.labels[label]
        return self.starts.index(number) if number < len(self.steps) else DONE

    def run(
        self,
        grid: Sequence[int],
        block: Sequence[int],
        arguments: Sequence[int | float | bytes],
        memory: GlobalMemory,
        shared_bytes: int = 0,
        blocks: Array | None = None,
    ) -> None:
        """Launch it, and return when all of its threads have.

        Args:
            grid: blocks, up to three numbers.
            block: threads of a block, up to three numbers.
            arguments: numbers in the order of the parameters; addresses for pointers.
            memory: what the kernel may touch.
            shared_bytes: of a block, where the text leaves it to the launch.
            blocks: the numbers of those that run; None: all of the grid.

        Raises:
            PtxError: an access or a barrier is wrong: kernel, line, instruction and address.
        """
        counter = counts.start(self.kernel, tuple(grid), prod(block))
        grid, block = ((*shape, 1, 1)[:3] for shape in (grid, block))
        wanted = self.kernel.parameters
        if len(arguments) != len(wanted):
            raise PtxError(
                f"{self.kernel.name} takes {len(wanted)} arguments, not {len(arguments)}"
            )
        packed = {p.name: _packed(p, value) for p, value in zip(wanted, arguments, strict=True)}
        at_once = max(1, MOST_LANES // prod(block))
        blocks = np.arange(prod(grid)) if blocks is None else blocks
        for first in range(0, len(blocks), at_once):
            some = blocks[first : first + at_once]
            with np.errstate(all="ignore"):
                Machine(self, grid, block, some, packed, memory, shared_bytes, counter).run()
        if counter is not None:
            counts.finish(counter)


class Machine:
    """Some blocks of one launch: registers, places in the program, shared memory."""

    def __init__(
        self,
        program: Program,
        grid: Sequence[int],
        block: Sequence[int],
        blocks: Array,
        parameters: dict[str, bytes],
        memory: GlobalMemory,
        shared_bytes: int,
        counter: counts.Counter | None,
    ) -> None:
        self.counter = counter
        self.program, self.kernel = program, program.kernel
        self.grid, self.block = grid, block
        self.parameters, self.memory = parameters, memory
        threads = prod(block)
        self.lanes_of_block = -(-threads // WARP) * WARP
        self.num_lanes = len(blocks) * self.lanes_of_block
        self.block_numbers = np.repeat(blocks, self.lanes_of_block)
        # Among those that run here.
        self.local_block = np.repeat(np.arange(len(blocks)), self.lanes_of_block)
        self.thread = np.tile(np.arange(self.lanes_of_block), len(blocks))
        self.shared = SharedMemory(len(blocks), max(shared_bytes, self.kernel.shared_bytes))
        self.registers: dict[str, Array] = {}
        self.at = np.where(self.thread < threads, 0, DONE)
        # The barrier that a lane waits at; -1: none.
        self.waits_at = np.full(self.num_lanes, -1)

    # Operands.

    def count(self, lanes: Lanes) -> int:
        return self.num_lanes if isinstance(lanes, slice) else len(lanes)

    def numbers(self, lanes: Lanes) -> Array:
        """The lanes by number, where an instruction needs to know them."""
        return np.arange(self.num_lanes)[lanes]

    def launch_numbers(self, lanes: Lanes) -> Array:
        """The lanes by number among those of the whole launch."""
        return (self.block_numbers * self.lanes_of_block + self.thread)[lanes]

    def read(self, operand: str, kind: str, lanes: Lanes) -> Array:
        """An operand's values as this PTX type: [lanes].

        Args:
            operand: a register, a special register, a number, or the name of a shared array.
        """
        dtype = dtype_of(kind)
        if operand[0] == "!":
            return ~self.read(operand[1:], kind, lanes)
        if operand in self.kernel.shared:
            return self._all(np.array(self.kernel.shared[operand], dtype), lanes)
        if operand[0] != "%" and operand not in self.kernel.register_types:
            return self._all(_number(operand, dtype), lanes)
        values = self._register(operand)[lanes]
        if values.dtype == dtype:
            return values
        if values.itemsize != dtype.itemsize:
            values = values.astype(unsigned(dtype.itemsize))
        return values.view(dtype)

    def write(self, operand: str, values: Array, lanes: Lanes) -> None:
        """Put values of any type into a register, extended by their sign where it is wider."""
        if operand == "_":
            return
        register = self._register(operand)
        if register.dtype == np.bool_:
            register[lanes] = values
            return
        if values.itemsize > register.itemsize:
            raise PtxError(f"{8 * values.itemsize} bits do not fit into {operand}")
        if values.dtype.kind == "f":
            values = np.ascontiguousarray(values).view(unsigned(values.itemsize))
        register[lanes] = values.astype(register.dtype)

    def _register(self, name: str) -> Array:
        values = self.registers.get(name)
        if values is None:
            values = self.registers[name] = self._special(name)
        return values

    def _special(self, name: str) -> Array:
        """A register before it is written: a place in the grid, or garbage."""
        of, _, axis = name.partition(".")
        if axis and axis in "xyz":
            shape, places = {
                "%tid": (self.block, self.thread),
                "%ctaid": (self.grid, self.block_numbers),
                "%ntid": (self.block, None),
                "%nctaid": (self.grid, None),
            }[of]
            which = "xyz".index(axis)
            if places is None:
                return np.full(self.num_lanes, shape[which], np.uint32)
            return (places // prod(shape[:which]) % shape[which]).astype(np.uint32)
        if name == "%laneid":
            return (self.thread % WARP).astype(np.uint32)
        if name == "%warpid":
            return (self.thread // WARP).astype(np.uint32)
        kind = self.kernel.register_type(name)
        dtype = dtype_of(kind) if kind == "pred" else unsigned(dtype_of(kind).itemsize)
        return np.full(self.num_lanes, 0xDEADBEEFDEADBEEF & (1 << 8 * dtype.itemsize) - 1, dtype)

    def _all(self, value: Array, lanes: Lanes) -> Array:
        return np.full(self.count(lanes), value)

    def require_whole_warps(self, lanes: Lanes) -> None:
        """What is named .sync waits for each lane of its mask, and Triton's masks name them all."""
        if not isinstance(lanes, slice):
            present = np.bincount(lanes // WARP, minlength=1)
            missing = (present > 0) & (present < WARP)
            if missing.any():
                warp_number = int(np.flatnonzero(missing)[0])
                raise FaultError(
                    f"only {present[warp_number]} of {WARP} lanes of warp {warp_number} are here"
                )

    # Control.

    def run(self) -> None:
        for _ in range(MOST_STEPS):
            at = np.where(self.waits_at < 0, self.at, DONE)
            block = int(at.min())
            if block < DONE:
                self._run_block(block, np.flatnonzero(at == block))
            elif (self.waits_at >= 0).any():
                self._release()
            else:
                return
        raise PtxError(f"{self.kernel.name} does not end")

    def _run_block(self, block: int, running: Array) -> None:
        program = self.program
        lanes: Lanes = slice(None) if len(running) == self.num_lanes else running
        following = block + 1 if block + 1 < len(program.starts) else DONE
        self.at[lanes] = following
        first, end = program.starts[block], program.ends[block]
        if self.counter is not None:
            instructions = self.kernel.instructions[first:end]
            self.counter.basic_block(
                self.launch_numbers(lanes) // WARP, instructions, is_barrier(instructions[-1])
            )
        for number in range(first, end):
            instruction = self.kernel.instructions[number]
            chosen = self._chosen(instruction, lanes)
            if not self.count(chosen):
                continue
            try:
                if instruction.operation == "bra":
                    self.at[chosen] = program.target(instruction.operands[-1])
                elif instruction.operation in ("ret", "exit"):
                    self.at[chosen] = DONE
                elif instruction.operation == "trap":
                    raise FaultError("a trap")
                elif is_barrier(instruction):
                    self.waits_at[chosen] = number
                else:
                    program.steps[number](self, chosen)
            except FaultError as fault:
                raise self._error(instruction, str(fault)) from None

    def _chosen(self, instruction: Instruction, lanes: Lanes) -> Lanes:
        if not instruction.predicate:
            return lanes
        holds = self.read(instruction.predicate, "pred", lanes) != instruction.negated
        return lanes if holds.all() else self.numbers(lanes)[holds]

    def _release(self) -> None:
        """Every lane waits or has returned. A block goes on where all of its threads wait at one barrier."""
        waits = self.waits_at.reshape(-1, self.lanes_of_block)[:, : prod(self.block)]
        for block, places in enumerate(waits):
            if (places != places.max()).any():
                instruction = self.kernel.instructions[places.max()]
                here = int((places == places.max()).sum())
                raise self._error(
                    instruction,
                    f"{here} of {len(places)} threads of block {block} reach this barrier",
                )
        self.waits_at[:] = -1

    def _error(self, instruction: Instruction, what: str) -> PtxError:
        place = f"{self.kernel.name}, {instruction.place or 'no line'}, `{instruction.text}`"
        return PtxError(f"{place}: {what}")


def make_step(instruction: Instruction) -> Step:
    """What one instruction does."""
    if instruction.operation in (*ENDS, *IGNORED) or is_barrier(instruction):
        return _do_nothing
    for maker in (access.make_step, warp.make_step, arithmetic.make_step):
        step = maker(instruction)
        if step is not None:
            return step
    raise UnsupportedError(f"`{instruction.text}` ({instruction.place})")


def is_barrier(instruction: Instruction) -> bool:
    """Of a whole block."""
    return re.match(r"bar\.sync|bar\.cta|barrier\.", instruction.name) is not None


def _do_nothing(machine: Machine, lanes: Lanes) -> None:
    pass


def _packed(parameter: Parameter, value: int | float | bytes) -> bytes:
    if isinstance(value, bytes):
        return value.ljust(parameter.num_bytes, b"\0")
    if parameter.type[0] == "f":
        return np.array(value, dtype_of(parameter.type)).tobytes()
    mask = (1 << 8 * parameter.num_bytes) - 1
    return (int(value) & mask).to_bytes(parameter.num_bytes, "little")


def _number(text: str, dtype: np.dtype[Any]) -> Array:
    """A number as it stands in the text: 0f and 0d are the bits of fp32 and fp64."""
    if text[:2] in ("0f", "0F", "0d", "0D"):
        bits = int(text[2:], 16)
        single = text[1] in "fF"
        number = np.array(bits, np.uint32 if single else np.uint64)
        if dtype.kind != "f":
            return number.astype(dtype)
        return number.view(np.float32 if single else np.float64).astype(dtype)
    if dtype == np.bool_:
        return np.array(int(text, 0) != 0)
    value = int(text.rstrip("U"), 0) & (1 << 8 * dtype.itemsize) - 1
    return np.array(value, unsigned(dtype.itemsize)).view(dtype)
