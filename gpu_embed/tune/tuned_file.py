"""The tuned file that a run writes: whole after each kernel, so that a run may be stopped and taken up again."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gpu_embed

from ..backends._plan import tuned
from ..backends._plan.tuned import FORMAT, Card, kernels_hash
from ..env_report import cuda_versions, packages
from .search import Found


class TunedFile:
    """What was found so far on one card, as it lies in its file.

    Attributes:
        done: what was searched, as backend.part.path; empty once the run is complete.
    """

    def __init__(self, path: Path, card: Card, copy_gb_per_s: float) -> None:
        self.path = path
        self.content: dict[str, Any] = {
            "format": FORMAT,
            "card": card.name,
            "capability": card.capability,
            "multiprocessors": card.multiprocessors,
            "versions": {
                "gpu_embed": gpu_embed.__version__,
                **{name: found for name, found in packages().items() if found},
                **{name: found for name, found in cuda_versions().items() if found},
            },
            "commit": commit(),
            "measured": datetime.date.today().isoformat(),
            "copy_gb_per_s": round(copy_gb_per_s, 1),
        }

    @property
    def done(self) -> list[str]:
        found: list[str] = self.content.setdefault("done", [])
        return found

    def resume(self) -> str | None:
        """Take up what the file holds; returns why not, if so."""
        try:
            content = tuned.read(self.path)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            return f"{self.path} is no tuned file: {error}"
        own = {name: self.content[name] for name in ("card", "capability", "multiprocessors")}
        if any(content.get(name) != value for name, value in own.items()):
            return f"{self.path} is of {content['card']}, this is {own['card']}"
        for backend in tuned.SOURCES:
            if backend in content and not tuned.is_current(content, backend):
                return f"{self.path} was measured with other {backend} kernels"
        if "done" not in content:
            return f"{self.path} is complete: there is nothing to resume"
        self.content = content
        return None

    def keep(self) -> None:
        """Take over what the file holds, where it is of this card: each search replaces its own part alone.

        Launches of other kernels are left out.
        """
        try:
            content = tuned.read(self.path)
        except (OSError, ValueError):
            return
        if content["card"] != self.content["card"]:
            return
        for backend in tuned.SOURCES:
            for part in ("launches", "methods"):
                entries = tuned.entries(content, backend, part)
                if isinstance(entries, Mapping) and entries:
                    self._part(backend, part).update(entries)

    def _part(self, backend: str, part: str) -> dict[str, Any]:
        own = self.content.setdefault(
            backend, {"kernels": kernels_hash(backend), "launches": {}, "methods": {}}
        )
        found: dict[str, Any] = own.setdefault(part, {})
        return found

    def add(
        self, backend: str, part: str, name: str, searched: Iterable[str], found: dict[str, Found]
    ) -> None:
        """Keep what a search of some paths found, which may be nothing, and write the file."""
        own = self._part(backend, part)
        for path in searched:
            own.pop(path, None)
        for path, (settings, gain) in found.items():
            own[path] = {"set": asdict(settings), "gain": round(gain, 3)}
        self.done.append(f"{backend}.{part}.{name}")
        self.write()

    def complete(self) -> None:
        self.content.pop("done", None)
        self.write()

    def write(self) -> None:
        """At once, so that no reader sees half a file."""
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=self.path.parent, suffix=".part", delete=False
        ) as file:
            json.dump(self.content, file, indent=1)
            file.write("\n")
        os.replace(file.name, self.path)


def check_folder(folder: Path) -> str | None:
    """Why nothing can be written there; None: it can."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            return None
    except OSError as error:
        return f"cannot write in {folder}: {error.strerror}"


def commit() -> str | None:
    """Of the checkout that this package is; None: it is an installed copy."""
    source = Path(__file__).resolve()
    answers = []
    for command in (("ls-files", "--error-unmatch", source.name), ("rev-parse", "HEAD")):
        try:
            answer = subprocess.run(
                ("git", "-C", source.parent, *command), capture_output=True, text=True, check=True
            )
        except (OSError, subprocess.CalledProcessError):
            return None
        answers.append(answer.stdout.strip())
    return answers[1]
