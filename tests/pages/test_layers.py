"""Imports go one way: the table of layers, and every import of gpu_embed/ held against it."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# For each package its units (modules and packages directly in it), from the lowest layer to the highest.
# "" is the package's own `__init__`. An import goes to a lower layer, or stays in its own without a circle.
LAYERS = {
    "gpu_embed": (
        {
            "forkable_lock",
            "own_thread",
            "user_cache",
            "dtypes",
            "exporting",
            "fused_rows",
            "hashing",
        },
        {"settings"},
        {"bags", "bounds", "row_update", "shard", "take"},
        {"tables"},
        {"reference"},
        {"backends"},
        {"ops"},
        {"functional"},
        {"nn"},
        {"accumulate", "distributed", "optim", "swap", "keras"},
        {"torchrec"},
        {"text", "plot", "_self_check"},
        {"vectors"},
        {""},
        {"demo", "env_report", "tune"},
    ),
    "gpu_embed.backends": (
        {"protocol"},
        {"_plan"},
        {"_triton", "_cupy", "_torch", "_reference"},
        {""},
    ),
}
# They install under gpu_embed and lie beside it: device code, and the benchmark that uses all of it.
ELSEWHERE = {"gpu_embed.kernels", "gpu_embed.bench"}


def modules() -> dict[str, Path]:
    """Every module of gpu_embed by its dotted name."""
    names = {}
    for path in sorted((ROOT / "gpu_embed").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if not any(name == other or name.startswith(f"{other}.") for other in ELSEWHERE):
            names[name] = path
    return names


MODULES = modules()


def imports(name: str) -> Iterator[tuple[str, int]]:
    """What a module imports from gpu_embed, wherever the statement stands, and its line."""
    path = MODULES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    yield from imports_of(path.read_text(), package)


def imports_of(source: str, package: str) -> Iterator[tuple[str, int]]:
    """The same for source text in a package; imports for type checkers alone do not count."""
    nodes: list[ast.AST] = [ast.parse(source)]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            nodes += node.orelse
            continue
        nodes += ast.iter_child_nodes(node)
        found = []
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*(above if node.level else []), *filter(None, [node.module])])
            # `from . import bounds` names a module, `from .bounds import record` what is in one.
            whole = (f"{base}.{alias.name}" for alias in node.names)
            found = [name if name in MODULES else base for name in whole]
        for target in found:
            if target in MODULES:
                yield target, node.lineno


def unit_of(name: str, package: str) -> str:
    return name.removeprefix(package).lstrip(".").partition(".")[0]


def edges(package: str) -> dict[tuple[str, str], list[str]]:
    """Which unit of a package imports which, and where."""
    inside = [name for name in MODULES if name == package or name.startswith(f"{package}.")]
    found: dict[tuple[str, str], list[str]] = {}
    for name in inside:
        for target, line in imports(name):
            edge = unit_of(name, package), unit_of(target, package)
            if target in inside and edge[0] != edge[1]:
                found.setdefault(edge, []).append(f"{MODULES[name].relative_to(ROOT)}:{line}")
    return found


def layer_of(unit: str, package: str) -> int:
    for number, units in enumerate(LAYERS[package]):
        if unit in units:
            return number
    raise AssertionError(f"{package} has a unit {unit!r} that LAYERS does not place")


@pytest.mark.parametrize("package", LAYERS)
def test_no_unit_imports_one_of_a_higher_layer(package):
    wrong = []
    for (unit, imported), places in edges(package).items():
        low, high = layer_of(unit, package), layer_of(imported, package)
        if high > low:
            wrong.append(
                f"{package}: {unit or '__init__'} (layer {low}) imports {imported or '__init__'} "
                f"(layer {high}): {', '.join(places)}"
            )
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", LAYERS)
def test_units_import_each_other_in_no_circle(package):
    graph = TopologicalSorter()
    for unit, imported in edges(package):
        graph.add(unit, imported)
    try:
        graph.prepare()
    except CycleError as error:
        raise AssertionError(f"{package}: {' -> '.join(error.args[1][::-1])}") from None


@pytest.mark.parametrize("package", LAYERS)
def test_every_unit_has_a_layer(package):
    units = {unit_of(name, package) for name in MODULES if name.startswith(f"{package}.")}
    assert units <= set().union(*LAYERS[package])


def test_imports_are_found_in_each_of_their_forms():
    source = (
        "import gpu_embed.bounds\n"
        "from .. import settings, nothing\n"
        "from ..tables.layout import MODES\n"
        "from .known import look_up\n"
        "from gpu_embed.ops import bag\n"
        "import torch.nn\n"
        "if TYPE_CHECKING:\n    from ..nn import Embedding\nelse:\n    from .. import bags\n"
        "def late():\n    from ..swap import replacement\n"
    )
    found = set(imports_of(source, "gpu_embed.ops"))
    assert found == {
        ("gpu_embed.bounds", 1),
        ("gpu_embed.settings", 2),
        ("gpu_embed", 2),
        ("gpu_embed.tables.layout", 3),
        ("gpu_embed.ops.known", 4),
        ("gpu_embed.ops.bag", 5),
        ("gpu_embed.bags", 10),
        ("gpu_embed.swap.replacement", 12),
    }
