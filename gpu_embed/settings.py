"""The process-wide choices: which backend, what to do about out-of-range ids, which kernels.

Plain globals on purpose: autograd runs CUDA backwards on threads of its own, where a ContextVar is unset.
"""

import os
from collections.abc import Callable
from functools import cached_property
from types import TracebackType

from .forkable_lock import forkable_lock

# Counts the changes of all settings: what was derived from them is out of date once this has moved.
generation = 0


def changed() -> None:
    """Put what was derived from the settings out of date."""
    global generation
    with assigning:
        generation += 1


class Setting:
    """One choice out of a few names, taken from the environment until it is set.

    Args:
        variable: the environment variable, read at the first use, so that a typo there does not break
            `import gpu_embed`.
        choices: the accepted names; the first is the default.
        on_change: called after every change.
    """

    def __init__(
        self, variable: str, choices: tuple[str, ...], on_change: Callable[[], None] | None = None
    ) -> None:
        self.variable = variable
        self.choices = choices
        self.on_change = on_change

    @cached_property
    def value(self) -> str:
        """The name in force. Raises ValueError if the environment holds an unknown one."""
        return self._checked(os.environ.get(self.variable) or self.choices[0], self.variable)

    def set(self, value: str, source: str) -> "Restore":
        """Set the name from here on; as a context manager, until the block ends.

        Raises ValueError if the name is unknown, and then changes nothing.
        """
        former = vars(self).get("value")
        self._assign(self._checked(value, source))
        return Restore(self, former)

    def cannot_serve(self, what: str, reason: str) -> RuntimeError:
        """The error of a name that was forced on a call that it cannot serve.

        Args:
            what: the setting in words; with underscores, the end of its setter's name.
            reason: what of the call cannot be served.
        """
        return RuntimeError(
            f"gpu_embed: the {what} {self.value!r} is forced but cannot serve {reason}. Choose another "
            f"with gpu_embed.use_{what.replace(' ', '_')}() or {self.variable}; 'auto' picks one that can."
        )

    def _assign(self, value: str | None) -> None:
        with assigning:
            if value is None:
                vars(self).pop("value", None)
            else:
                self.value = value
            if self.on_change is not None:
                self.on_change()
            changed()

    def _checked(self, value: str, source: str) -> str:
        if value not in self.choices:
            names = ", ".join(repr(choice) for choice in self.choices)
            raise ValueError(f"{source}: expected one of {names}, got {value!r}")
        return value


class FileSetting(Setting):
    """A choice out of a few names, or a file."""

    def _checked(self, value: str, source: str) -> str:
        if os.path.isfile(value):
            return os.path.abspath(value)
        try:
            return super()._checked(value, source)
        except ValueError as error:
            raise ValueError(f"{error}, which is no file either") from None


class Restore:
    """What a setter returns: leave it alone, or use it in `with` to undo the setting at the block's end."""

    def __init__(self, setting: Setting, former: str | None) -> None:
        self._setting = setting
        self._former = former

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._setting._assign(self._former)


# Held while a setting changes: until what was derived from it is forgotten and `generation` has moved.
assigning = forkable_lock()
BACKEND = Setting("GPU_EMBED_BACKEND", ("auto", "triton", "cupy", "torch", "reference"))
BOUNDS_CHECK = Setting("GPU_EMBED_BOUNDS_CHECK", ("raise", "sync", "off"))
GATHER_METHOD = Setting("GPU_EMBED_GATHER_METHOD", ("auto", "rows", "flat"))
GRADIENT_METHOD = Setting(
    "GPU_EMBED_GRADIENT_METHOD",
    ("auto", "atomic", "sorted_atomic", "sorted"),
)
# Whether what was measured on the card takes the place of the defaults.
TUNED = FileSetting("GPU_EMBED_TUNED", ("auto", "off"))
# Whether a Triton kernel that was launched before may skip Triton's own launch path.
KNOWN_LAUNCH = Setting("GPU_EMBED_KNOWN_LAUNCH", ("1", "0"))
