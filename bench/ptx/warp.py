"""Instructions through which the lanes of a warp see one another."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .formats import Array, dtype_of
from .parse import Instruction, UnsupportedError

if TYPE_CHECKING:
    from .machine import Lanes, Machine, Step

WARP = 32  # lanes
REDUCTIONS = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


def make_step(instruction: Instruction) -> Step | None:
    makers = {
        "shfl": _shuffle,
        "vote": _vote,
        "activemask": _active_mask,
        "redux": _reduce,
        "elect": _elect,
    }
    if instruction.name.startswith("bar.warp.sync"):
        return lambda machine, lanes: machine.require_whole_warps(lanes)
    maker = makers.get(instruction.operation)
    return maker(instruction) if maker else None


def _shuffle(instruction: Instruction) -> Step:
    target, source, place, bounds = instruction.operands[:4]
    mode = instruction.parts[2]

    def step(machine: Machine, lanes: Lanes) -> None:
        machine.require_whole_warps(lanes)
        numbers = machine.numbers(lanes)
        lane = numbers % WARP
        by = machine.read(place, "u32", lanes).astype(np.int64) % WARP
        limits = machine.read(bounds, "u32", lanes).astype(np.int64)
        segment, clamp = limits >> 8 & 31, limits & 31
        first = lane & segment
        last = first | clamp & ~segment
        if mode == "up":
            other = lane - by
            inside = other >= last
        else:
            other = {"idx": first | by & ~segment, "bfly": lane ^ by, "down": lane + by}[mode]
            inside = other <= last
        other = numbers - lane + np.where(inside, other, lane)
        value, _, within = target.partition("|")
        values = machine.read(source, "b32", slice(None))[other]
        machine.write(value, values, lanes)
        if within:
            machine.write(within, inside, lanes)

    return step


def _vote(instruction: Instruction) -> Step:
    target, predicate = instruction.operands[:2]
    mode = instruction.parts[2]

    def step(machine: Machine, lanes: Lanes) -> None:
        machine.require_whole_warps(lanes)
        holds = machine.read(predicate, "pred", lanes).reshape(-1, WARP)
        result = {"ballot": _bits, "any": _any, "all": _all}[mode](holds)
        machine.write(target, np.repeat(result, WARP), lanes)

    return step


def _bits(holds: Array) -> Array:
    return (holds.astype(np.uint64) << np.arange(WARP, dtype=np.uint64)).sum(1).astype(np.uint32)


def _any(holds: Array) -> Array:
    return np.logical_or.reduce(holds, axis=1)


def _all(holds: Array) -> Array:
    return np.logical_and.reduce(holds, axis=1)


def _active_mask(instruction: Instruction) -> Step:
    def step(machine: Machine, lanes: Lanes) -> None:
        active = np.zeros(machine.num_lanes, bool)
        active[lanes] = True
        masks = np.repeat(_bits(active.reshape(-1, WARP)), WARP)
        machine.write(instruction.operands[0], masks[lanes], lanes)

    return step


def _reduce(instruction: Instruction) -> Step:
    target, source = instruction.operands[:2]
    if instruction.parts[2] not in REDUCTIONS or instruction.type[0] == "f":
        raise UnsupportedError(f"`{instruction.text}`")
    function = REDUCTIONS[instruction.parts[2]]

    def step(machine: Machine, lanes: Lanes) -> None:
        machine.require_whole_warps(lanes)
        values = machine.read(source, instruction.type, lanes).reshape(-1, WARP)
        result = function.reduce(values, axis=1, dtype=dtype_of(instruction.type))
        machine.write(target, np.repeat(result, WARP), lanes)

    return step


def _elect(instruction: Instruction) -> Step:
    """The lowest lane of each warp; the first target gets its number."""
    leader, _, elected = instruction.operands[0].partition("|")

    def step(machine: Machine, lanes: Lanes) -> None:
        machine.require_whole_warps(lanes)
        machine.write(leader, np.zeros(machine.count(lanes), np.uint32), lanes)
        machine.write(elected, machine.numbers(lanes) % WARP == 0, lanes)

    return step
