"""What is installed, under which names, and what importing it costs."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Where each folder of the repo lies once installed.
INSTALLED_AS = {
    "gpu_embed": "gpu_embed",
    "kernels": "gpu_embed/kernels",
    "bench": "gpu_embed/bench",
}
SOURCES = {".py", ".cu", ".cuh", ".h", ".j2"}


def run_python(code: str, *, cwd: Path, **environ: str) -> str:
    """Run code in a fresh interpreter that sees what is installed and none of our settings."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name != "PYTHONPATH" and not name.startswith(("GPU_EMBED_", "TRITON_"))
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**inherited, **environ},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def git(*arguments: str, cwd: Path) -> str:
    identity = ["-c", "user.name=test", "-c", "user.email=test"]
    command = ["git", *identity, *arguments]
    return subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True).stdout


def commit(folder: Path) -> None:
    git("add", "--all", cwd=folder)
    git("commit", "--quiet", "--message", "test", cwd=folder)


def release(folder: Path) -> subprocess.CompletedProcess[str]:
    """What make release runs, there."""
    identity = {
        f"GIT_{who}_{what}": "test" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")
    }
    return subprocess.run(
        [folder / ".ci/release", sys.executable],
        env={**os.environ, **identity},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository whose changelog has a date, ready for its release."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, folder)
    for name in (*INSTALLED_AS, ".ci", "tests"):
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "results")
        # A checkout may hold links to kernels/ and bench/ in gpu_embed/.
        links = [link.name for link in (ROOT / name).iterdir() if link.is_symlink()]
        shutil.copytree(
            ROOT / name,
            folder / name,
            ignore=lambda at, names, ignored=ignored, links=links: {*ignored(at, names), *links},
        )
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    dated = re.sub(r"^(## [\d.]+) - unreleased$", r"\1 - 2026-01-31", changelog, flags=re.M)
    (folder / "CHANGELOG.md").write_text(dated, encoding="utf-8")
    # A tuned file travels with the package.
    (folder / "gpu_embed/tuned").mkdir(exist_ok=True)
    (folder / "gpu_embed/tuned/a-card.json").write_text("{}")
    git("init", "--quiet", cwd=folder)
    commit(folder)
    return folder


@pytest.fixture(scope="module")
def released(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clone") / "gpu_embed"
    git("clone", "--quiet", str(source), str(folder), cwd=source)
    done = release(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Nothing was pushed or uploaded" in done.stdout
    return folder


@pytest.fixture(scope="module")
def wheel(released: Path) -> Path:
    """The wheel that a release builds, from its sdist."""
    (built,) = (released / "dist").glob("*.whl")
    return built


@pytest.mark.full
def test_release_builds_and_tags_and_leaves_the_tree_clean(source: Path, released: Path) -> None:
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.M)[1]
    names = {file.name for file in (released / "dist").iterdir()}
    assert names == {f"gpu_embed-{version}.tar.gz", f"gpu_embed-{version}-py3-none-any.whl"}
    assert git("cat-file", "-t", f"v{version}", cwd=released) == "tag\n"  # annotated
    assert git("status", "--porcelain", cwd=released) == ""
    assert git("tag", cwd=source) == ""
    again = release(released)
    assert again.returncode == 1
    assert f"the tag v{version} exists" in again.stderr


def test_sdist_holds_no_test_and_the_changelog(released: Path) -> None:
    (sdist,) = (released / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"CHANGELOG.md", "LICENSE", "kernels/gather.cu", "kernels/gather.py"} <= names
    assert not [name for name in names if name.startswith(("tests", "gpu_embed/kernels"))]


@pytest.mark.parametrize(
    ("file", "pattern", "text", "committed", "said"),
    [
        ("gpu_embed/__init__.py", r'__version__ = ".*"', '__version__ = "9"', True, "says 9"),
        ("CHANGELOG.md", r"2026-01-31", "unreleased", True, "- unreleased'; commit '## "),
        ("CHANGELOG.md", r"## [\d.]+ - ", "## 9.0.0 - ", True, "begins with '## 9.0.0 - "),
        ("README.md", r"\Z", "more", False, "not committed"),
    ],
    ids=["versions", "no date", "changelog of another", "dirty"],
)
def test_release_refuses(
    source: Path, tmp_path: Path, file: str, pattern: str, text: str, committed: bool, said: str
) -> None:
    git("clone", "--quiet", str(source), str(tmp_path), cwd=source)
    changed = re.sub(pattern, text, (tmp_path / file).read_text("utf-8"), count=1)
    (tmp_path / file).write_text(changed, encoding="utf-8")
    if committed:
        commit(tmp_path)
    done = release(tmp_path)
    assert done.returncode == 1
    assert said in done.stderr
    assert git("tag", cwd=tmp_path) == ""
    assert not (tmp_path / "dist").exists()


def test_changelog_begins_with_the_version() -> None:
    project = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text("utf-8"))
    version = project["project"]["version"]
    heading = re.search(r"^## .*$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.M)[0]
    assert re.fullmatch(rf"## {re.escape(version)} - (unreleased|\d{{4}}-\d\d-\d\d)", heading)
    assert f'__version__ = "{version}"' in (ROOT / "gpu_embed/__init__.py").read_text("utf-8")


@pytest.mark.full
def test_wheel_holds_every_source_file(wheel: Path) -> None:
    """Packaging: a new package or source file that pyproject.toml does not name fails here."""
    expected = {
        f"{installed}/{file.relative_to(ROOT / folder).as_posix()}"
        for folder, installed in INSTALLED_AS.items()
        for file in (ROOT / folder).rglob("*")
        if file.suffix in SOURCES and "__pycache__" not in file.parts
    }
    assert {"gpu_embed/kernels/__init__.py", "gpu_embed/bench/__init__.py"} <= expected
    names = set(zipfile.ZipFile(wheel).namelist())
    assert not expected - names
    assert {"gpu_embed/py.typed", "gpu_embed/tuned/a-card.json"} <= names


def test_wheel_claims_no_other_top_level_name(wheel: Path) -> None:
    """Packaging: `kernels` is another package's name on PyPI, so gpu_embed is our only one."""
    names = zipfile.ZipFile(wheel).namelist()
    top_level = {name.split("/")[0] for name in names}
    assert top_level == {"gpu_embed", f"gpu_embed-{wheel.name.split('-')[1]}.dist-info"}


def test_wheel_carries_the_license(wheel: Path) -> None:
    """Packaging: Apache-2.0 asks that a copy of the license goes with the code."""
    archive = zipfile.ZipFile(wheel)
    (metadata,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    assert "License-Expression: Apache-2.0" in archive.read(metadata).decode()
    assert metadata.replace("METADATA", "licenses/LICENSE") in archive.namelist()


@pytest.mark.full
def test_unpacked_wheel_imports_every_module_and_every_documented_name(
    wheel: Path, tmp_path: Path
) -> None:
    """Packaging: the three folders come together as one package away from the repo."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    documented = re.findall(r"^::: (\S+)", (ROOT / "docs/reference.md").read_text("utf-8"), re.M)
    assert "gpu_embed.functional.embedding" in documented
    code = f"""
import importlib.util, pkgutil
import gpu_embed
# They say what to install where that is not there, and then nobody walks through the package.
needs = {{"gpu_embed.torchrec": "torchrec", "gpu_embed.vectors": "gensim"}}
without = tuple(name for name in needs if importlib.util.find_spec(needs[name]) is None)
found = [module.name for module in pkgutil.walk_packages(gpu_embed.__path__, "gpu_embed.")]
for name in found:
    if not name.endswith("__main__") and not name.startswith(without):
        importlib.import_module(name)
for name in {documented}:
    if not name.startswith(without):
        pkgutil.resolve_name(name)
print(",".join(without), len(found), gpu_embed.kernels.__file__, gpu_embed.bench.__file__)
"""
    environment = {"PYTHONPATH": str(tmp_path), "KERAS_BACKEND": "torch", "TRITON_INTERPRET": "1"}
    without, number, *files = run_python(code, cwd=tmp_path, **environment).split(" ")
    modules = [
        file
        for file in tmp_path.rglob("*.py")
        if file.name != "__init__.py" or file.parent.name != "gpu_embed"
        if "gpu_embed.vectors" not in without
        or file.parent.name != "vectors"
        or file.name == "__init__.py"
    ]
    assert int(number) == len(modules)
    assert " ".join(files).split() == [
        str(tmp_path / "gpu_embed" / n / "__init__.py") for n in ("kernels", "bench")
    ]


def test_kernels_init_is_a_docstring_alone() -> None:
    """Packaging: an import or a __version__ there breaks `import transformers` in the repo root."""
    body = ast.parse((ROOT / "kernels" / "__init__.py").read_text(encoding="utf-8")).body
    assert len(body) == 1
    assert ast.get_docstring(ast.Module(body=body, type_ignores=[]))


@pytest.mark.parametrize("name", ["kernels", "bench"])
def test_folder_is_not_importable_by_its_own_name(name: str, tmp_path: Path) -> None:
    """Packaging: outside the repo root the name `kernels` finds another's package or none."""
    code = f"""
from importlib.util import find_spec
spec = find_spec({name!r})
print("" if spec is None else [spec.origin, *(spec.submodule_search_locations or [])])
"""
    assert str(ROOT) not in run_python(code, cwd=tmp_path)


# Modules, and packages with all in them, that neither the import nor a lookup on the CPU may load.
LATE = (
    *(
        "triton",
        "cupy",
        "cupy_backends",
        "keras",
        "numpy.typing",
        "torch._dynamo",
        "torch._inductor",
    ),
    *("gpu_embed.optim", "gpu_embed.swap", "gpu_embed.accumulate", "gpu_embed.reference"),
    *("gpu_embed.kernels", "gpu_embed.text", "gpu_embed.keras", "gpu_embed.plot"),
    *("gpu_embed._self_check", "gpu_embed.bench", "gpu_embed.tune", "gpu_embed.demo"),
    "gpu_embed.env_report",
    *("gpu_embed.backends._triton", "gpu_embed.backends._cupy", "gpu_embed.backends._reference"),
)


def test_import_brings_in_nothing_that_a_lookup_does_without(tmp_path: Path) -> None:
    """Free import: import costs little, and a first lookup too. Torch's own imports are not counted."""
    code = f"""
import sys
import torch

def late():
    names = set(sys.modules) - before
    return sorted(name for name in names for one in {LATE} if f"{{name}}.".startswith(f"{{one}}."))

before = set(sys.modules)
import gpu_embed
assert not late(), late()
assert not [name for name in sys.modules if name.startswith("gpu_embed.backends._torch")]
for layer in (gpu_embed.Embedding(7, 2), gpu_embed.EmbeddingBag(7, 2)):
    layer(torch.tensor([[5, 1]]))
assert not late(), late()
gpu_embed.optim
assert "gpu_embed.optim" in late()
print("ok")
"""
    assert run_python(code, cwd=tmp_path).strip() == "ok"


def test_works_where_neither_triton_nor_cupy_is_installed(tmp_path: Path) -> None:
    """Free import: import, a lookup and its gradient work where neither is installed."""
    code = '''
import sys

class Without:
    """A finder that does not find them, as where they are not installed."""

    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in ("triton", "cupy", "cupy_backends"):
            return self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
import torch
import gpu_embed

layer = gpu_embed.Embedding(7, 2)
ids = torch.tensor([5, 1, 2, 3, 6])
rows = layer(ids)
assert torch.equal(rows, layer.weight[ids])
rows.sum().backward()
assert torch.equal(layer.weight.grad[:, 0], torch.tensor([0.0, 1, 1, 1, 0, 1, 1]))
gpu_embed.available_backends()
import gpu_embed.bench.cli, gpu_embed.bench.codegen.table
assert not {"triton", "cupy"} & set(sys.modules)
print("ok")
'''
    assert run_python(code, cwd=tmp_path).strip() == "ok"


def test_public_names_exist(tmp_path: Path) -> None:
    """Packaging: every name in `__all__` is there, also those that are loaded when they are asked for."""
    code = """
import pickle
import sys
import gpu_embed
assert gpu_embed.__all__, "gpu_embed names its public API in __all__"
assert "gpu_embed.optim" not in sys.modules
assert {*gpu_embed.__all__, "swap", "__version__"} <= set(dir(gpu_embed))
assert dir(gpu_embed) == sorted(set(dir(gpu_embed)))
try:
    gpu_embed.optimizers
except AttributeError as error:
    assert str(error) == "module 'gpu_embed' has no attribute 'optimizers'"
else:
    raise AssertionError
assert not hasattr(gpu_embed, "optimizers")
assert pickle.loads(b"cgpu_embed.optim\\nSGD\\n.") is gpu_embed.optim.SGD
print([name for name in gpu_embed.__all__ if not hasattr(gpu_embed, name)])
for late in gpu_embed._LATE:
    assert vars(gpu_embed)[late] is getattr(gpu_embed, late)
names = {}
exec("from gpu_embed import *", names)
assert set(gpu_embed.__all__) <= set(names)
"""
    assert run_python(code, cwd=tmp_path).strip() == "[]"


@pytest.mark.full
@pytest.mark.parametrize(
    "first",
    [
        "import gpu_embed.optim as one",
        "import gpu_embed.swap.replacement as one",
        "import gpu_embed.reference.bag as one",
        "import gpu_embed.tables.inputs as one",
        "import gpu_embed.ops.known as one",
        "import gpu_embed.backends._torch as one",
        "from gpu_embed import optim as one",
        "from gpu_embed import replace_embeddings as one",
        "from gpu_embed.optim import in_backward as one",
    ],
)
def test_any_module_may_be_the_first(first: str, tmp_path: Path) -> None:
    code = f"""
{first}
import gpu_embed
print([name for name in gpu_embed.__all__ if not hasattr(gpu_embed, name)])
"""
    assert run_python(code, cwd=tmp_path).strip() == "[]"


@pytest.mark.full
def test_threads_may_ask_for_the_same_module_at_once(tmp_path: Path) -> None:
    code = """
import threading
import gpu_embed
found = []
start = threading.Barrier(8)

def ask(name):
    start.wait()
    found.append((name, getattr(gpu_embed, name)))

names = ["optim", "reference", "replace_embeddings", "override_aten"] * 2
threads = [threading.Thread(target=ask, args=(name,)) for name in names]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert len(found) == 8
assert all(one is getattr(gpu_embed, name) for name, one in found)
gpu_embed.optim.apply_in_backward, gpu_embed.reference.embedding
print("ok")
"""
    assert run_python(code, cwd=tmp_path).strip() == "ok"


def make_targets() -> set[str]:
    return set(
        re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    )


def make_commands(document: str) -> set[str]:
    """The targets that a page's code names, inline or in a block; its prose may say make sure."""
    text = (ROOT / document).read_text(encoding="utf-8")
    blocks = "\n".join(re.findall(r"^```.*?\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    in_blocks = re.findall(r"^\s*(?:\$ )?make ([a-z-]+)", blocks, re.MULTILINE)
    return {*in_blocks, *re.findall(r"`make ([a-z-]+)", text)}


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_documented_make_commands_exist(document: str) -> None:
    """Packaging: a command that a page tells the reader to type is there."""
    commands = make_commands(document)
    assert {"demo", "test"} <= commands
    assert not commands - make_targets()


def test_every_make_command_is_described() -> None:
    """Packaging: `make help` lists each command."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert set(re.findall(r"^([a-z-]+):.*## \S", text, re.MULTILINE)) == make_targets()


def canonical_name(requirement: str) -> str:
    """The name of a requirement such as `a_b[extra]>=1; marker`, spelled as PyPI does."""
    return re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", requirement)[0]).lower()


def test_constraints_pin_every_direct_dependency() -> None:
    """Packaging: a fresh machine gets exactly what was tested; extras that need a GPU aside."""
    # Not the installed metadata: an old egg-info in the repo root would answer for it.
    project = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text("utf-8"))
    project = project["project"]
    required = set(project["dependencies"]).union(*project["optional-dependencies"].values())
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {canonical_name(pin) for pin in pins if pin and not pin.startswith("#")}
    missing = {canonical_name(requirement) for requirement in required} - pinned
    rivals = {"liger-kernel", "flag-gems", "fbgemm-gpu"}
    assert missing == {"gpu-embed", "cupy-cuda13x", "nvidia-cuda-nvrtc", *rivals}
