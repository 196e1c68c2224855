"""A backend on a device, whose settings are changed and whose launches are seen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends._plan.tuned import leaves, with_leaves
from .trials import Input, forced, kernel_of, trial_of


class Launch(NamedTuple):
    """What a backend's `_launch` was called with."""

    args: tuple[Any, ...]
    settings: dict[str, Any]

    @property
    def kernel(self) -> str:
        """Its name: of a Triton function, or of an expression in C++."""
        kernel = self.args[0]
        name: str = getattr(kernel, "expression", None) or kernel.__name__
        return name.partition("<")[0]


class Run(NamedTuple):
    """What an operation computed, and launched; the launches can be repeated while this is kept."""

    results: tuple[Tensor, ...]
    launches: list[Launch]


class Subject:
    """One backend on one device, of its defaults until they are changed."""

    def __init__(self, backend: Any, device: torch.device) -> None:
        self.backend = backend
        self.name: str = backend.name
        self.device = device
        self.launches: Any = backend._launches.defaults
        self.methods: Any = backend._methods.defaults

    def leaves(self) -> dict[str, Any]:
        """The launch settings of each kernel, by path."""
        return leaves(self.launches)

    def method_leaves(self) -> dict[str, Any]:
        """The limits of methods, by path."""
        return leaves(self.methods)

    @contextmanager
    def with_launch(self, path: str, settings: Any) -> Iterator[None]:
        """A kernel's settings, and no others, differ from the defaults."""
        with self._in_force(with_leaves(self.launches, {path: settings}), self.methods):
            yield

    @contextmanager
    def with_methods(self, changes: Mapping[str, Any]) -> Iterator[None]:
        """Some limits of methods differ from the defaults."""
        with self._in_force(self.launches, with_leaves(self.methods, changes)):
            yield

    @contextmanager
    def _in_force(self, launches: Any, methods: Any) -> Iterator[None]:
        # Of this object, in place of its class's.
        self.backend._launches = {self.device: launches}
        self.backend._methods = {self.device: methods}
        try:
            yield
        finally:
            del self.backend._launches, self.backend._methods

    def run(self, path: str, given: Input, dry: bool = False) -> Run:
        """The operation of that path's kernel, and the launches of that kernel.

        Args:
            dry: launch nothing.
        """
        trial, kernel = trial_of(path), kernel_of(path)
        with forced(trial.method), self.seen(dry) as launches:
            results = trial.operation(self.backend, given, self.device)
        return Run(results, [launch for launch in launches if launch.kernel == kernel])

    @contextmanager
    def seen(self, dry: bool = False) -> Iterator[list[Launch]]:
        """The launches of what runs meanwhile."""
        found: list[Launch] = []
        launch = self.backend._launch

        def see(*args: Any, **settings: Any) -> None:
            # `launch` may add to them.
            found.append(Launch(args, dict(settings)))
            if not dry:
                launch(*args, **settings)

        self.backend._launch = see
        try:
            yield found
        finally:
            del self.backend._launch

    def repeat(self, run: Run) -> None:
        for launch in run.launches:
            self.backend._launch(*launch.args, **launch.settings)
