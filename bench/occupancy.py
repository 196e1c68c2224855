"""How many warps of a kernel a multiprocessor holds at once, by CUDA's occupancy rules."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Multiprocessor:
    """What the blocks on one multiprocessor share."""

    warps: int
    blocks: int
    shared_bytes: int


# By compute capability times ten. Sources: "Technical Specifications per Compute Capability" in the CUDA C++
# Programming Guide, and for the granularities below NVIDIA's cuda_occupancy.h, which lies in Triton's wheel.
MULTIPROCESSORS = {
    80: Multiprocessor(warps=64, blocks=32, shared_bytes=164 * 1024),
    86: Multiprocessor(warps=48, blocks=16, shared_bytes=100 * 1024),
    89: Multiprocessor(warps=48, blocks=24, shared_bytes=100 * 1024),
    90: Multiprocessor(warps=64, blocks=32, shared_bytes=228 * 1024),
    100: Multiprocessor(warps=64, blocks=32, shared_bytes=228 * 1024),
    120: Multiprocessor(warps=48, blocks=24, shared_bytes=100 * 1024),
}
# The cards that the kernels are written for: A100, H100 and H200, B200.
TARGETS = (80, 90, 100)
# The same on all architectures above.
WARP = 32
PARTITIONS = 4  # each has a quarter of the registers, and a warp's lie in one
PARTITION_REGISTERS = 64 * 1024 // PARTITIONS
REGISTERS_UNIT = 256  # a warp's registers are given out in such steps
SHARED_UNIT = 128  # a block's shared memory in bytes, likewise
RESERVED_SHARED = 1024  # bytes of each block's that CUDA keeps for itself


@dataclass(frozen=True)
class Occupancy:
    """Warps resident on one multiprocessor, and the resource that allows no more."""

    warps: int
    limit: str  # "warps", "blocks", "registers" or "shared memory"; of several the first


def occupancy(
    architecture: int, num_warps: int, registers: int, shared_bytes: int = 0
) -> Occupancy:
    """Of blocks of `num_warps` warps, with so many registers a thread and bytes of shared memory a block.

    0 warps: a block needs more than a multiprocessor has.
    """
    machine = MULTIPROCESSORS[architecture]
    warp_registers = _round_up(WARP * registers, REGISTERS_UNIT)
    block_shared = _round_up(shared_bytes + RESERVED_SHARED, SHARED_UNIT)
    blocks = {
        "warps": machine.warps // num_warps,
        "blocks": machine.blocks,
        "registers": PARTITION_REGISTERS // warp_registers * PARTITIONS // num_warps,
        "shared memory": machine.shared_bytes // block_shared,
    }
    limit = min(blocks, key=lambda name: blocks[name])
    return Occupancy(blocks[limit] * num_warps, limit)


def _round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit
