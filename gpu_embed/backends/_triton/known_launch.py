"""Cache of compiled binaries, keyed by Triton's own specialization (dtype, == 1, % 16); skips `JITFunction.run`.

`kernel[grid](...)` derives the type of each argument, the options and the environment anew in every call, which takes
the host longer than the rest of a lookup. The key below is as fine as Triton's or finer, and the binary is the one
that Triton chose. Settings of the process are in the key too: profilers that instrument, `knobs.runtime.debug`.
"""

import threading
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch

from ...settings import KNOWN_LAUNCH

# Versions whose launch path was compared with this one; with any other, Triton launches.
CHECKED_VERSIONS = ("3.6.0", "3.7.1", "3.8.0", "3.9.0")
INT32 = 2**31
INT64 = 2**63
# Triton specializes on addresses and integers that are multiples of 16.
ALIGNMENT_MASK = 15

Key = tuple[Any, ...]


# A binary: run(*grid, stream, *head, *arguments, *constants), head, constants; and the kernel, whose id is in the key.
Known = tuple[Callable[..., None], Key, Key, Any]
# prepared(key, num_items, args); `key` and num_items tell the binary of these arguments from that of others.
PreparedLaunch = Callable[[Key, int, Key], None]
# Numbers of items, and what else differs, that a prepared launch keeps.
MAX_PREPARED = 1024


def launch(
    kernel: Any, grid: tuple[int, ...], device: int | None, args: Key, settings: dict[str, Any]
) -> Known | None:
    """`kernel[grid](*args, **settings)` on this device, which is the current one; what is known of it from here on.

    Args:
        settings: the kernel's constants, by name, and Triton's options.
    """
    key = _key(kernel, device, args, settings) if is_used() else None
    known = _launches.get(key)
    if known is not None:
        run, head, constants, _ = known
        stream = _driver().active.get_current_stream(device)
        run(*(*grid, 1, 1)[:3], stream, *head, *args, *constants)
        return known
    # A thread that meets another's half-loaded binary would launch nothing.
    with _first_launch:
        binary = kernel[grid](*args, **settings)
    # A cache hook may have kept Triton from compiling, and what compiles in the background is no binary yet.
    if key is not None and hasattr(type(binary), "__getitem__"):
        rest = kernel.params[len(args) :]
        constants = tuple(settings.get(param.name, param.default) for param in rest)
        # The last three: hooks before and after a launch, and what they are told. With a hook there is no key.
        head = binary.function, binary.packed_metadata, None, None, None
        known = _launches[key] = binary.run, head, constants, kernel
    return known


def prepare_launch(
    first: Callable[..., Known | None],
    kernel: Any,
    grid: Callable[[int], tuple[int, ...]],
    device: torch.device,
    settings: dict[str, Any],
) -> PreparedLaunch:
    """Launches of one kernel with these settings, which differ in little: their key is only what does.

    Args:
        first: `launch` as a backend makes it; what that returns is launched from then on.
        grid: of a number of items.
    """
    prepared: dict[Key, tuple[Known, Key]] = {}

    def launch(key: Key, num_items: int, args: Key) -> None:
        if prepared:
            current = _driver().active.get_current_device()
            found = prepared.get((_key(kernel, current, (), {}), num_items, key))
            if found is not None:
                (run, head, constants, _), places = found
                stream = _driver().active.get_current_stream(current)
                run(*places, stream, *head, *args, *constants)
                return
        places = grid(num_items)
        known = first(kernel, places, device, *args, **settings)
        if known is not None:
            if len(prepared) == MAX_PREPARED:
                prepared.clear()
            current = _driver().active.get_current_device()
            environment = _key(kernel, current, (), {})
            prepared[environment, num_items, key] = known, (*places, 1, 1)[:3]

    return launch


@cache
def is_used() -> bool:
    """Whether launches are remembered in this process: see `unused_reason`."""
    return unused_reason() is None


def unused_reason() -> str | None:
    """Why each launch goes Triton's own way; None: it does not."""
    import triton

    if KNOWN_LAUNCH.value == "0":
        return f"{KNOWN_LAUNCH.variable}=0"
    if triton.__version__ not in CHECKED_VERSIONS:
        return (
            f"triton {triton.__version__} is not a checked version ({', '.join(CHECKED_VERSIONS)})"
        )
    return None


def _key(kernel: Any, device: int | None, args: Key, settings: dict[str, Any]) -> Key | None:
    """What Triton specialises a binary for; None: an argument whose type is not known here, or a hook on the way."""
    try:
        runtime, compilation = _knobs()
        if (
            kernel.pre_run_hooks
            or runtime.launch_enter_hook.calls
            or runtime.launch_exit_hook.calls
            # Not every version has this, nor both options of the compilation.
            or getattr(runtime, "add_stages_inspection_hook", None) is not None
        ):
            return None
        kinds = [
            _number_kind(arg)
            if type(arg) is int
            else type(arg)
            if arg is None or type(arg) is float
            else (arg.dtype, arg.data_ptr() & ALIGNMENT_MASK)
            for arg in args
        ]
        return (
            # A kernel's own hash takes as long as two arguments.
            id(kernel),
            device,
            runtime.debug,
            getattr(compilation, "instrumentation_mode", None),
            getattr(compilation, "fpsan_homomorphic_casts", None),
            *settings,
            *settings.values(),
            *kinds,
        )
    except AttributeError:
        return None


@cache
def _knobs() -> tuple[Any, Any]:
    from triton import knobs

    return knobs.runtime, knobs.compilation


@cache
def _driver() -> Any:
    from triton.runtime import driver

    return driver


@lru_cache(maxsize=2**14)
def _number_kind(number: int) -> int:
    """Numbers of one kind are the same to Triton: 1, multiples of 16, and the others, each by its width."""
    width = 0 if -INT32 <= number < INT32 else 1 if -INT64 <= number < INT64 else 2
    return 4 * width + 2 * (number & ALIGNMENT_MASK == 0) + (number == 1)


_launches: dict[Key | None, Known] = {}
_first_launch = threading.RLock()
