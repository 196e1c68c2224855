"""Instructions from registers to registers, each lane on its own: what they compute, and of which types."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .formats import (
    Array,
    dtype_of,
    fma64,
    fma_to_odd,
    from_bf16,
    to_bf16,
    unsigned,
)
from .parse import Instruction, UnsupportedError, inner

if TYPE_CHECKING:
    from .machine import Lanes, Machine, Step

HALVES = ("bf16", "bf16x2", "f16x2", "u16x2", "s16x2")
# Modifiers that change nothing here: rounding to nearest, and how much precision a card may leave out.
PLAIN = {"rn", "approx", "full", "to", "global", "shared", "NaN"}


class Meaning(NamedTuple):
    """An instruction as a function of arrays."""

    function: Callable[..., Any]
    sources: list[str]  # the PTX types of the operands after the first
    result: str


def make_step(instruction: Instruction) -> Step | None:
    if instruction.operation == "mov" and "{" in "".join(instruction.operands):
        return _pack(instruction) if instruction.operands[1][0] == "{" else _unpack(instruction)
    maker = MEANINGS.get(instruction.operation)
    if maker is None:
        return None
    flushes = "ftz" in instruction.parts
    if flushes:
        instruction = replace(instruction, name=instruction.name.replace(".ftz", ""))
    function, kinds, result = maker(instruction)
    target, *sources = instruction.operands
    dtype = dtype_of(result)
    if len(sources) < len(kinds):
        raise UnsupportedError(f"`{instruction.text}`")

    def step(machine: Machine, lanes: Lanes) -> None:
        values = [
            machine.read(source, kind, lanes) for source, kind in zip(sources, kinds, strict=False)
        ]
        if flushes:
            computed = _flush(np.asarray(function(*map(_flush, values))))
        else:
            computed = np.asarray(function(*values))
        first, _, second = target.partition("|")
        machine.write(first, computed.astype(dtype, copy=False), lanes)
        if second:
            machine.write(second, ~computed, lanes)

    return step


def _flush(numbers: Array) -> Array:
    """Subnormal fp32 become zeros of their sign."""
    if numbers.dtype != np.float32:
        return numbers
    return np.where(np.abs(numbers) < np.finfo(np.float32).tiny, numbers * np.float32(0), numbers)


def _pack(instruction: Instruction) -> Step:
    """`mov.b64 %rd1, {%r1, %r2}`: the first is the lowest."""
    dtype, sources = dtype_of(instruction.type), inner(instruction.operands[1])
    bits = 8 * dtype.itemsize // len(sources)

    def step(machine: Machine, lanes: Lanes) -> None:
        packed = np.zeros(machine.count(lanes), dtype)
        for place, source in enumerate(sources):
            part = machine.read(source, f"b{bits}", lanes).astype(dtype)
            packed |= part << dtype.type(bits * place)
        machine.write(instruction.operands[0], packed, lanes)

    return step


def _unpack(instruction: Instruction) -> Step:
    dtype, targets = dtype_of(instruction.type), inner(instruction.operands[0])
    bits = 8 * dtype.itemsize // len(targets)

    def step(machine: Machine, lanes: Lanes) -> None:
        packed = machine.read(instruction.operands[1], instruction.type, lanes)
        for place, target in enumerate(targets):
            part = packed >> dtype.type(bits * place)
            machine.write(target, part.astype(unsigned(bits // 8)), lanes)

    return step


def _same(function: Callable[..., Any], count: int) -> Callable[[Instruction], Meaning]:
    """Operands and result have the instruction's type."""

    def make(instruction: Instruction) -> Meaning:
        kind = instruction.type
        done = function
        if set(instruction.parts[1:-1]) - PLAIN:
            raise UnsupportedError(f"`{instruction.text}`")
        if kind in HALVES:
            done = _on_halves(kind, function)
        return Meaning(done, [kind] * count, kind)

    return make


def _on_halves(kind: str, function: Callable[..., Any]) -> Callable[..., Array]:
    """The function on 16-bit numbers, one or two a word. Floats are rounded once."""
    if kind in ("u16x2", "s16x2"):
        half: Any = np.uint16 if kind == "u16x2" else np.int16
        return lambda *words: function(*(np.ascontiguousarray(w).view(half) for w in words)).view(
            np.uint32
        )

    def on_floats(*words: Array) -> Array:
        halves = [np.ascontiguousarray(word).view(np.uint16) for word in words]
        if kind.startswith("bf16"):
            result = to_bf16(_wide(function, [from_bf16(half) for half in halves]))
        else:
            values = _wide(function, [half.view(np.float16) for half in halves])
            result = values.astype(np.float16).view(np.uint16)
        return result.view(words[0].dtype)

    return on_floats


def _wide(function: Callable[..., Any], values: list[Array]) -> Array:
    """In fp64, from where one more rounding gives what rounding once would have."""
    doubles = [value.astype(np.float64) for value in values]
    if function is np.add:
        return fma_to_odd(doubles[0], np.ones_like(doubles[0]), doubles[1])
    if function is np.subtract:
        return fma_to_odd(doubles[0], np.ones_like(doubles[0]), -doubles[1])
    return np.asarray(function(*doubles))


def _fma(instruction: Instruction) -> Meaning:
    kind = instruction.type
    if instruction.parts[1:-1] != ["rn"]:
        raise UnsupportedError(f"`{instruction.text}`")
    if kind == "f64":
        return Meaning(fma64, [kind] * 3, kind)
    if kind in HALVES:
        return Meaning(_on_halves(kind, fma_to_odd), [kind] * 3, kind)

    def once(*values: Array) -> Array:
        return fma_to_odd(*(value.astype(np.float64) for value in values))

    return Meaning(once, [kind] * 3, kind)


def _extreme(which: str) -> Callable[[Instruction], Meaning]:
    """A NaN loses against a number, unless .NaN is in the name; .relu is never below zero."""

    def make(instruction: Instruction) -> Meaning:
        if instruction.parts[1] == "relu" and instruction.type == "s32":
            larger = getattr(np, f"{which}imum")
            return Meaning(lambda a, b: np.maximum(larger(a, b), 0), ["s32", "s32"], "s32")
        integers = instruction.type[0] in "su"
        propagates = integers or "NaN" in instruction.parts
        function = getattr(np, f"{which}imum" if propagates else f"f{which}")
        return _same(function, 2)(instruction)

    return make


def _multiply(instruction: Instruction) -> Meaning:
    kind = instruction.type
    if kind[0] == "f" or kind in HALVES:
        return _same(np.multiply, 2)(instruction)
    return _integer_product(instruction, 2)


def _integer_product(instruction: Instruction, count: int) -> Meaning:
    """The low half, the high half, or all of a product, and a third operand of that type added to it."""
    kind, mode = instruction.type, instruction.parts[1]
    bits = 8 * dtype_of(kind).itemsize
    result = f"{kind[0]}{2 * bits}" if mode == "wide" else kind
    exact: Any = object if mode == "hi" and bits == 64 else f"{dtype_of(kind).kind}8"

    def function(a: Array, b: Array, *c: Array) -> Array:
        product = a.astype(exact) * b.astype(exact)
        if mode == "hi":
            product = product >> bits
        product = product.astype(dtype_of(result))
        return product + c[0] if c else product

    return Meaning(function, [kind, kind, result][:count], result)


def _divide(instruction: Instruction) -> Meaning:
    """Integers are divided towards zero; by zero they give all ones."""
    kind, remainder = instruction.type, instruction.operation == "rem"
    if kind[0] == "f":
        return _same(np.divide, 2)(instruction)

    def function(a: Array, b: Array) -> Array:
        divisor = np.where(b == 0, b.dtype.type(1), b)
        rest = np.fmod(a, divisor)
        result = rest if remainder else (a - rest) // divisor
        return np.where(b == 0, np.invert(np.zeros_like(b)), result)

    return Meaning(function, [kind, kind], kind)


def _shift(instruction: Instruction) -> Meaning:
    kind, left = instruction.type, instruction.operation == "shl"
    dtype = dtype_of(kind)
    bits = 8 * dtype.itemsize

    def function(a: Array, by: Array) -> Array:
        within = np.minimum(by, bits - 1).astype(dtype)
        shifted = a << within if left else a >> within
        return shifted if dtype.kind == "i" else np.where(by < bits, shifted, 0)

    return Meaning(function, [kind, "u32"], kind)


def _funnel(instruction: Instruction) -> Meaning:
    """The high half of {high, low} shifted left, or the low half of it shifted right."""
    left, clamps = instruction.parts[1] == "l", "clamp" in instruction.parts

    def function(low: Array, high: Array, by: Array) -> Array:
        both = high.astype(np.uint64) << np.uint64(32) | low
        by = (np.minimum(by, 32) if clamps else by & np.uint32(31)).astype(np.uint64)
        return ((both << by) >> np.uint64(32) if left else both >> by).astype(np.uint32)

    return Meaning(function, ["b32"] * 3, "b32")


def _logic3(instruction: Instruction) -> Meaning:
    """lop3: the table has one bit for each of the eight cases of three bits."""
    table = int(instruction.operands[4], 0)

    def function(a: Array, b: Array, c: Array) -> Array:
        result = np.zeros_like(a)
        for case in range(8):
            if table >> case & 1:
                bits = (a if case & 4 else ~a, b if case & 2 else ~b, c if case & 1 else ~c)
                result |= bits[0] & bits[1] & bits[2]
        return result

    return Meaning(function, ["b32"] * 3, "b32")


def _extract(instruction: Instruction) -> Meaning:
    """bfe: `length` bits from `place` on; signed ones extend the highest that they take."""
    kind = instruction.type
    bits = 8 * dtype_of(kind).itemsize

    def function(a: Array, place: Array, length: Array) -> Array:
        place, length = (np.minimum(n & np.uint32(255), bits).astype(int) for n in (place, length))
        exact = a.astype(object)
        taken = (exact >> place) & (1 << length.astype(object)) - 1
        if kind[0] == "s":
            highest = np.minimum(place + length - 1, bits - 1)
            negative = ((exact >> highest) & 1 == 1) & (length > 0)
            taken = np.where(negative, taken - (1 << length.astype(object)), taken)
        return (taken & (1 << bits) - 1).astype(unsigned(bits // 8)).view(dtype_of(kind))

    return Meaning(function, [kind, "u32", "u32"], kind)


def _insert(instruction: Instruction) -> Meaning:
    """bfi: `length` bits of the first, put into the second at `place`."""
    kind = instruction.type
    one = dtype_of(kind).type(1)

    def function(a: Array, b: Array, place: Array, length: Array) -> Array:
        place, length = place.astype(b.dtype), length.astype(b.dtype)
        whole = length >= 8 * b.itemsize
        mask = np.where(whole, ~(one ^ one), (one << length) - one) << place
        return (a << place) & mask | b & ~mask

    return Meaning(function, [kind, kind, "u32", "u32"], kind)


def _permute(instruction: Instruction) -> Meaning:
    """prmt: four bytes out of eight; the highest bit of a choice spreads the byte's sign."""
    if len(instruction.parts) > 2:
        raise UnsupportedError(f"`{instruction.text}`")

    def function(a: Array, b: Array, choices: Array) -> Array:
        both = np.stack([a, b], 1).view(np.uint8)  # [lanes, 8]
        picks = choices[:, None] >> np.arange(0, 16, 4, dtype=np.uint32) & np.uint32(15)
        taken = np.take_along_axis(both, (picks & 7).astype(int), 1)
        taken = np.where(picks & 8, np.where(taken & 128, 255, 0), taken).astype(np.uint8)
        return np.ascontiguousarray(taken).view(np.uint32)[:, 0]

    return Meaning(function, ["b32"] * 3, "b32")


def _bits(instruction: Instruction) -> Meaning:
    """Counts and places of bits; the lanes' bits in a row begin with the highest."""
    kind, operation = "b" + instruction.type[1:], instruction.operation
    width = int(kind[1:])
    if operation == "bfind" and instruction.type[0] == "s":
        raise UnsupportedError(f"`{instruction.text}`")

    def function(a: Array) -> Array:
        places = np.arange(width - 1, -1, -1, dtype=a.dtype)
        bits = (a[:, None] >> places & a.dtype.type(1)).astype(bool)  # [lanes, width]
        if operation == "popc":
            return bits.sum(1)
        if operation == "brev":
            return (bits.astype(a.dtype) << places[::-1]).sum(1, dtype=a.dtype)
        leading = np.where(bits.any(1), bits.argmax(1), width)
        return leading if operation == "clz" else np.where(leading < width, width - 1 - leading, -1)

    return Meaning(function, [kind], kind if operation == "brev" else "b32")


def _select(instruction: Instruction) -> Meaning:
    kind = instruction.type
    return Meaning(lambda a, b, which: np.where(which, a, b), [kind, kind, "pred"], kind)


def _compare(instruction: Instruction) -> Meaning:
    """A comparison with a NaN is false; of those with a u behind them, true."""
    kind, name = instruction.type, instruction.parts[1]
    joins = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
    join = next((joins[part] for part in instruction.parts[2:-1] if part in joins), None)
    floats = kind[0] == "f" or kind == "bf16"
    unordered = floats and name in ("equ", "neu", "ltu", "leu", "gtu", "geu")
    base = (
        name[:2] if unordered else {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.get(name, name)
    )
    compares: dict[str, Callable[..., Any]] = {
        "eq": np.equal,
        "ne": np.not_equal,
        "lt": np.less,
        "le": np.less_equal,
        "gt": np.greater,
        "ge": np.greater_equal,
        "num": lambda a, b: a == a,
        "nan": lambda a, b: a != a,
    }
    compare = compares.get(base)
    if compare is None or kind in ("bf16x2", "f16x2"):
        raise UnsupportedError(f"`{instruction.text}`")

    def function(a: Array, b: Array, *other: Array) -> Array:
        if kind == "bf16":
            a, b = from_bf16(a), from_bf16(b)
        result = compare(a, b)
        if floats:
            nan = np.isnan(a) | np.isnan(b)
            result = result | nan if unordered or name == "nan" else result & ~nan
        return join(result, other[0]) if join else result

    return Meaning(function, [kind, kind, *(["pred"] if join else [])], "pred")


def _convert(instruction: Instruction) -> Meaning:
    *modifiers, result, source = instruction.parts[1:]
    whole = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
    round_whole = next((whole[part] for part in modifiers if part in whole), None)
    if set(modifiers) - {*whole, "rn", "sat"}:
        raise UnsupportedError(f"`{instruction.text}`")
    if result in ("bf16x2", "f16x2") and source == "f32":
        narrow = to_bf16 if result == "bf16x2" else _to_f16
        return Meaning(
            lambda high, low: narrow(high).astype(np.uint32) << np.uint32(16) | narrow(low),
            ["f32", "f32"],
            result,
        )
    if "sat" in modifiers and result[0] not in "su":
        raise UnsupportedError(f"`{instruction.text}`")

    def function(a: Array) -> Array:
        if source == "bf16":
            a = from_bf16(a)
        if a.dtype.kind == "f" and round_whole is not None:
            a = round_whole(a)
        if result == "bf16":
            return to_bf16(a if a.dtype.kind == "f" and a.itemsize > 2 else a.astype(np.float64))
        dtype = dtype_of(result)
        if dtype.kind == "f":
            return a.astype(dtype)
        if a.dtype.kind == "f":
            return _to_integer(a, dtype)
        if "sat" in modifiers:
            limits = np.iinfo(dtype)
            return np.clip(a.astype(object), limits.min, limits.max).astype(dtype)
        return a.astype(dtype)

    return Meaning(function, [source], result)


def _to_f16(numbers: Array) -> Array:
    return numbers.astype(np.float16).view(np.uint16)


def _to_integer(whole: Array, dtype: np.dtype[Any]) -> Array:
    """The nearest number that the type has; of a NaN 0, or in 64 bits the highest bit alone."""
    limits = np.iinfo(dtype)
    nan = np.isnan(whole)
    exact = np.where(nan, 0, whole).astype(np.longdouble)
    clipped = np.clip(exact, limits.min, limits.max).astype(dtype)
    of_nan = 0 if dtype.itemsize < 8 else limits.min or 1 << 63
    return np.where(nan, np.array(of_nan, dtype), clipped)


def _policy(instruction: Instruction) -> Meaning:
    """A hint for a cache, which is nothing here."""
    return Meaning(lambda: np.uint64(0), [], "b64")


MEANINGS: dict[str, Callable[[Instruction], Meaning]] = {
    "mov": _same(lambda a: a, 1),
    "cvta": _same(lambda a: a, 1),
    "and": _same(np.bitwise_and, 2),
    "or": _same(np.bitwise_or, 2),
    "xor": _same(np.bitwise_xor, 2),
    "not": _same(np.invert, 1),
    "neg": _same(np.negative, 1),
    "abs": _same(np.abs, 1),
    "add": _same(np.add, 2),
    "sub": _same(np.subtract, 2),
    "min": _extreme("min"),
    "max": _extreme("max"),
    "mul": _multiply,
    "mad": lambda instruction: _integer_product(instruction, 3),
    "fma": _fma,
    "div": _divide,
    "rem": _divide,
    "sqrt": _same(np.sqrt, 1),
    "rsqrt": _same(lambda a: (1 / np.sqrt(a)).astype(a.dtype), 1),
    "rcp": _same(lambda a: (1 / a).astype(a.dtype), 1),
    "ex2": _same(np.exp2, 1),
    "lg2": _same(np.log2, 1),
    "shl": _shift,
    "shr": _shift,
    "shf": _funnel,
    "lop3": _logic3,
    "bfe": _extract,
    "bfi": _insert,
    "prmt": _permute,
    "popc": _bits,
    "clz": _bits,
    "brev": _bits,
    "bfind": _bits,
    "selp": _select,
    "setp": _compare,
    "cvt": _convert,
    "createpolicy": _policy,
}
