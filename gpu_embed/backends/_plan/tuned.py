"""Tuned files: what was measured on a card by `python -m gpu_embed.tune`, and which file is in force on a device.

A file is JSON. It holds only what differs from the defaults, for each backend:

    {"format": 1, "card": "NVIDIA H100 80GB HBM3", "capability": "9.0", "multiprocessors": 132, ...,
     "triton": {"kernels": "<hash of their sources>",
                "launches": {"gather_rows[256]": {"set": {"BLOCK_N": 4, "BLOCK_D": 256, "num_warps": 2}, "gain": 1.07}},
                "methods": {"gather": {"set": {"max_idle_share": 0.25}, "gain": 1.2}}}}
"""

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...settings import TUNED
from ...user_cache import folder as user_folder

logger = logging.getLogger("gpu_embed")
FORMAT = 1
# Of the kernels of each backend, in gpu_embed/kernels.
SOURCES = {"triton": (".py",), "cupy": (".cu", ".cuh")}
FIELDS = {
    *("format", "card", "capability", "multiprocessors", "versions", "commit", "measured"),
    *("copy_gb_per_s", "done"),
    *SOURCES,
}


class Card(NamedTuple):
    """What tells one kind of card from another."""

    name: str
    capability: str
    multiprocessors: int

    @property
    def file_name(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-") + ".json"


class Choice(NamedTuple):
    """The file in force for a card, and why this one, or why none."""

    path: Path | None
    reason: str
    content: Mapping[str, Any]


def card_of(device: torch.device) -> Card | None:
    """The card of a device; None: it is none."""
    if device.type != "cuda":
        return None
    found = torch.cuda.get_device_properties(device)
    return Card(found.name, f"{found.major}.{found.minor}", found.multi_processor_count)


def folders() -> list[Path]:
    """Where tuned files lie: what was measured here comes before what the package brings."""
    here = user_folder()
    shipped = Path(__file__).parents[2] / "tuned"
    return [shipped] if here is None else [here / "tuned", shipped]


def choose_file(device: torch.device) -> Choice:
    """The file in force on a device. Raises ValueError if GPU_EMBED_TUNED names a file that cannot be read."""
    card, value = card_of(device), TUNED.value
    if card is None:
        return Choice(None, f"{device.type} has no tuned settings", {})
    return Choice(None, f"{TUNED.variable}=off", {}) if value == "off" else _choose(card, value)


@cache
def _choose(card: Card, value: str) -> Choice:
    """The exact card's file, else one of the same compute capability and number of multiprocessors."""
    if value == "auto":
        files = [path for folder in folders() for path in sorted(folder.glob("*.json"))]
        found = {path: content for path in files if (content := _read_or_warn(path)) is not None}
    else:
        try:
            found = {Path(value): read(Path(value))}
        except (OSError, ValueError) as error:
            raise ValueError(f"{TUNED.variable}={value}: no tuned file: {error}") from error
    for path, content in found.items():
        if content["card"] == card.name:
            return _chosen(path, "measured on this card", content)
    for path, content in found.items():
        if _kind(content) == card[1:]:
            return _chosen(path, f"measured on {content['card']}, of the same kind", content)
    reason = f"no file for {card.name} ({card.capability}, {card.multiprocessors} multiprocessors)"
    if value != "auto":
        reason = f"{value} is for {found[Path(value)]['card']}, this is {card.name}"
        logger.warning("gpu_embed: %s", reason)
    return Choice(None, reason, {})


def _chosen(path: Path, reason: str, content: dict[str, Any]) -> Choice:
    unknown = sorted(content.keys() - FIELDS)
    if unknown:
        logger.warning("gpu_embed: %s: ignored: %s", path, ", ".join(unknown))
    return Choice(path, reason, content)


def _kind(content: Mapping[str, Any]) -> tuple[object, object]:
    return content.get("capability"), content.get("multiprocessors")


def read(path: Path) -> dict[str, Any]:
    """A tuned file. Raises OSError, or ValueError if it is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError(str(error)) from None
    if not isinstance(content, dict) or not isinstance(content.get("card"), str):
        raise ValueError("it names no card")
    if content.get("format") != FORMAT:
        raise ValueError(f"format {content.get('format')!r} is not {FORMAT}")
    return content


def _read_or_warn(path: Path) -> dict[str, Any] | None:
    try:
        return read(path)
    except (OSError, ValueError) as error:
        logger.warning("gpu_embed: %s is no tuned file and is ignored: %s", path, error)
        return None


def is_current(content: Mapping[str, Any], backend: str) -> bool:
    """Whether a file's launches were measured with the kernels that are here."""
    part = content.get(backend)
    return isinstance(part, Mapping) and part.get("kernels") == kernels_hash(backend)


def entries(content: Mapping[str, Any], backend: str, part: str) -> Any:
    """What a file holds of a backend's "launches" or "methods"; none of launches of other kernels."""
    given = content.get(backend)
    if not isinstance(given, Mapping) or (part == "launches" and not is_current(content, backend)):
        return {}
    return given.get(part, {})


@cache
def kernels_hash(backend: str) -> str:
    """Of the sources that the backend's kernels are compiled from."""
    digest = hashlib.sha256()
    for file in sorted(resources.files("gpu_embed.kernels").iterdir(), key=lambda file: file.name):
        if file.name.endswith(SOURCES[backend]):
            digest.update(f"{file.name}\0{file.read_text(encoding='utf-8')}\0".encode())
    return digest.hexdigest()[:16]


def settings_for(device: torch.device, backend: str, part: str, defaults: Any) -> Any:
    """`defaults` with what the file in force sets; says in one line what of it is ignored.

    Args:
        part: "launches" or "methods". Launches are ignored if the kernels have changed since.
    """
    choice = choose_file(device)
    changes, ignored = _decoded(defaults, entries(choice.content, backend, part))
    if ignored:
        names = ", ".join(ignored)
        logger.warning("gpu_embed: %s: ignored in %s.%s: %s", choice.path, backend, part, names)
    return with_leaves(defaults, changes)


def _decoded(defaults: Any, given: Any) -> tuple[dict[str, Any], list[str]]:
    """The leaves that a part of a file sets, by path, and what of it cannot be used."""
    if not isinstance(given, Mapping):
        return {}, ["all of it"]
    changes, ignored, known = {}, [], leaves(defaults)
    for path, entry in given.items():
        values = entry.get("set") if isinstance(entry, Mapping) else None
        if path not in known or not isinstance(values, Mapping):
            ignored.append(path)
            continue
        default = known[path]
        names = {field.name for field in fields(default)}
        usable = {}
        for name, value in values.items():
            value = _converted(default, name, value) if name in names else None
            if value is None:
                ignored.append(f"{path}.{name}")
            else:
                usable[name] = value
        # What was measured together is taken together.
        if len(usable) == len(values):
            changes[path] = replace(default, **usable)
    return changes, ignored


def _converted(leaf: Any, name: str, value: Any) -> Any:
    """A value as that field of a leaf; None: it cannot be one."""
    default = getattr(leaf, name)
    choices = getattr(leaf, "CHOICES", None)
    if choices is not None:
        value = tuple(value) if isinstance(value, list) else value
        is_legal = value in choices.get(name, (default,)) and not isinstance(value, (bool, float))
        return value if is_legal else None
    if isinstance(value, bool) or not isinstance(value, (int, type(default))) or not value >= 0:
        return None
    try:
        return type(default)(value)
    except OverflowError:  # too large for a float
        return None


def leaves(node: Any, path: str = "") -> dict[str, Any]:
    """The innermost dataclasses of settings by their path, as gather_rows[256]."""
    return {
        inner: leaf
        for name, child in _children(node, path).items()
        for inner, leaf in (
            leaves(child, name) if _children(child, name) else {name: child}
        ).items()
    }


def with_leaves(node: Any, changes: Mapping[str, Any], path: str = "") -> Any:
    """Settings with some of their leaves replaced."""
    if path in changes:
        return changes[path]
    children = _children(node, path)
    if not any(change.startswith(path) for change in changes) or not children:
        return node
    new = [with_leaves(child, changes, name) for name, child in children.items()]
    if isinstance(node, Mapping):
        return dict(zip(node, new, strict=True))
    return type(node)(*new)


def _children(node: Any, path: str) -> dict[str, Any]:
    """What settings hold that holds values itself, by path; none of a leaf."""
    if isinstance(node, Mapping):
        keys = (str(key).removeprefix("torch.") for key in node)
        return {f"{path}[{key}]": child for key, child in zip(keys, node.values(), strict=True)}
    if not is_dataclass(node):
        return {}
    inside = {field.name: getattr(node, field.name) for field in fields(node)}
    if not all(isinstance(child, Mapping) or is_dataclass(child) for child in inside.values()):
        return {}
    return {f"{path}.{name}".lstrip("."): child for name, child in inside.items()}


def forget() -> None:
    """Read the files anew."""
    _choose.cache_clear()
    for each in on_forget:
        each()


on_forget: list[Callable[[], Iterable[object] | None]] = []
TUNED.on_change = forget
