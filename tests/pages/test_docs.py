"""The pages are true: their code prints what they say, their commands exist, and no public name is left out."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from commands import ROOT, check, check_printed, commands_in, python_blocks

import gpu_embed
from gpu_embed.backends._cupy import device as cupy_device
from gpu_embed.backends._triton import device as triton_device
from gpu_embed.bench import occupancy
from gpu_embed.bench.cli import CannotRunError

yaml = pytest.importorskip("yaml")

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
WITH_COMMANDS = [
    page
    for page in (*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "bench/RESULTS.md")
    if commands_in(page.read_text())
]

# What a page speaks of without making it.
GIVEN = {
    "swap.md": """
import re, types, torch, gpu_embed

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.words = torch.nn.Embedding(9, 4)

    def forward(self, ids):
        return types.SimpleNamespace(loss=self.words(ids).sum())

model, inputs = Model(), {"ids": torch.tensor([1, 8])}
""",
    # What torchrun gives to each of its processes.
    "distributed.md": """
import torch.distributed
torch.distributed.init_process_group(store=torch.distributed.HashStore(), rank=0, world_size=1)
""",
}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize(
    "page",
    [
        # DTensor, FSDP and peft take long to import, and the default tier does without gensim.
        pytest.param(
            page,
            marks=pytest.mark.full
            if page.stem in ("distributed", "older_cards", "quantized", "vectors")
            else (),
        )
        for page in PAGES
        # tests/torchrec and tests/serving run their own.
        if python_blocks(page.read_text()) and page.stem not in ("torchrec", "serving")
    ],
    ids=name_of,
)
def test_code_runs_and_prints_what_the_page_says(page, tmp_path, monkeypatch, capsys):
    for extra in ("tokenizers", "matplotlib", "gensim"):
        if extra in page.read_text():
            pytest.importorskip(extra)
    if page.stem == "quantized":
        pytest.importorskip("peft", reason="the integration extra is missing")
    if page.stem == "distributed" and not torch.distributed.is_available():
        pytest.skip("torch is built without torch.distributed")
    # Not imported here: the page says to choose its backend before.
    if page.stem == "keras" and find_spec("keras") is None:
        pytest.skip("keras is not installed")
    monkeypatch.chdir(tmp_path)
    code = "\n".join([GIVEN.get(page.name, ""), *python_blocks(page.read_text())])
    try:
        with gpu_embed.use_backend("auto"):
            exec(compile(code, str(page), "exec"), {"__name__": "page"})
    finally:
        torch.use_deterministic_algorithms(False)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    check_printed(code, capsys.readouterr().out)


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=name_of)
def test_commands_exist(page):
    for command in commands_in(page.read_text()):
        check(command)


@pytest.mark.parametrize(
    "command",
    [
        "make nothing",
        "python -m gpu_embed.bench compare",
        "python -m gpu_embed.env_report --xml",
        "python -m gpu_embed.nothing",
        "python examples/nothing.py",
        "torchrun --nproc-per-node 2 examples/nothing.py",
        "torchrun --nothing 2 examples/sharded.py",
        "python examples/phrases.py --nothing",
        "pip install '.[demo]'",
        'pip install ".[nothing]"',
        'pip install ".[demo,nothing]"',
        "pip install -c nothing.txt .",
        "make test && make nothing",
        "nothing",
    ],
)
def test_a_wrong_command_is_noticed(command):
    with pytest.raises((AssertionError, OSError, SystemExit, CannotRunError)):
        check(command)


def test_every_public_name_is_in_the_reference():
    directives = re.findall(r"^::: ([\w.]+)$", "\n".join(p.read_text() for p in PAGES), re.M)
    assert len(directives) == len(set(directives))
    owners = {"backends", "distributed", "functional", "optim"}  # their names are listed one by one
    expected = {f"gpu_embed.{name}" for name in set(gpu_embed.__all__) - owners}
    for owner in (gpu_embed.distributed, gpu_embed.optim):
        expected |= {f"{owner.__name__}.{name}" for name in owner.__all__}
    expected |= {f"gpu_embed.functional.{name}" for name in ("embedding", "embedding_bag")}
    assert expected - set(directives) == set()


def test_every_page_is_in_the_navigation():
    pages = re.findall(r"[\w/]+\.md", yaml.dump(configuration()["nav"]))
    assert sorted(pages) == [page.name for page in PAGES]


def test_nothing_is_fetched_when_the_pages_are_built_or_read():
    settings = configuration()
    assert settings["theme"]["font"] is False
    assert [p if isinstance(p, str) else next(iter(p)) for p in settings["plugins"]] == [
        "search",
        "mkdocstrings",
    ]
    assert "extra_javascript" not in settings
    assert all((DOCS / sheet).is_file() for sheet in settings["extra_css"])


def configuration():
    return yaml.safe_load((ROOT / "mkdocs.yml").read_text())


def test_measured_numbers_are_those_of_the_notes():
    rows = [
        line
        for line in (DOCS / "large_tables.md").read_text().splitlines()
        if re.match(r"\| .*\| [\d.]+ \|", line)
    ]
    assert len(rows) == 9
    notes = (ROOT / "bench/NOTES.md").read_text().splitlines()
    assert set(rows) <= set(notes)


def test_measured_times_of_word_vectors_are_those_of_the_notes():
    rows = re.findall(r"^\| .* \| [\d.]+ \| .*$", (DOCS / "vectors.md").read_text(), re.M)
    assert len(rows) == 6
    assert set(rows) <= set((ROOT / "bench/NOTES.md").read_text().splitlines())


def test_the_support_table_is_that_of_the_readme():
    readme = (ROOT / "README.md").read_text()
    rows = re.findall(r"^\| .* \| (?:any|float|real) \|$", (DOCS / "backends.md").read_text(), re.M)
    assert len(rows) > 8
    listed = re.findall(r"^\| .* \| (?:any|float|real) \|$", readme, re.M)
    assert set(listed) <= set(rows)


# Compute capabilities, by NVIDIA's list of CUDA GPUs.
CARDS = {
    "P100": (6, 0),
    "GTX 10": (6, 1),
    "V100": (7, 0),
    "T4": (7, 5),
    "RTX 20": (7, 5),
    "A100": (8, 0),
    "L4": (8, 9),
    "RTX 30": (8, 6),
    "H100": (9, 0),
}


@pytest.mark.parametrize("page", [ROOT / "README.md", DOCS / "index.md"], ids=name_of)
def test_first_lines_say_which_card_goes_which_way(page):
    """And that none has run the code, which whoever runs it on a card changes here too."""
    lines = page.read_text().splitlines()[:40]
    assert "**No GPU has run this code yet.**" in "\n".join(lines)
    rows = [line.split("|") for line in lines if line.startswith("|")]
    for card, capability in CARDS.items():
        (row,) = [row for row in rows if re.search(rf"\b{card}\b", row[1])]
        on_triton = capability >= triton_device.MIN_CAPABILITY
        assert ("Triton" in row[3]) == on_triton, card
        assert ("CuPy" in row[3]) == (not on_triton), card
        # NVRTC 13 begins at 7.5.
        assert ("cupy13" in row[2]) == ((7, 5) <= capability < (8, 0)), card
        assert capability >= cupy_device.MIN_CAPABILITY


def test_first_lines_name_what_the_suite_compiles_for():
    said = re.search(
        r"Triton\s+kernels\s+for\s+compute\s+capability\s+(.*?),\s+and\s+the\s+CUDA\s+C\+\+\s+kernels\s+for\s+(.*?)\.\s+No",
        (ROOT / "README.md").read_text(),
        re.DOTALL,
    )
    numbers = [re.findall(r"\d+\.\d", part) for part in said.groups()]
    archs = re.search(
        r"^ARCHS = \((.*)\)", (ROOT / "tests/kernels/test_cuda_nvrtc.py").read_text(), re.M
    )[1]
    compiled = [occupancy.TARGETS, map(int, archs.split(","))]
    assert numbers == [[f"{arch / 10:.1f}" for arch in part] for part in compiled]


def test_messages_name_extras_that_exist():
    """Of what a program says or its docstring shows: a package index has no gpu_embed yet."""
    folders = ("gpu_embed", "bench", "examples")
    text = {
        str(file): file.read_text() for folder in folders for file in (ROOT / folder).rglob("*.py")
    }
    commands = {
        (file, command)
        for file, code in text.items()
        for command in re.findall(r"pip install [^)\n&]*\[[^)\n&]*", code)
    }
    assert len(commands) >= 8
    for file, command in commands:
        assert 'pip install ".[' in command, file
        check(command.strip().removesuffix("\"'"))
    for name in re.findall(r'the extra "(\w+)"', "\n".join(text.values())):
        check(f'pip install ".[{name}]"')


def test_pictures_are_small():
    for picture in (DOCS / "pictures").iterdir():
        limit = 300_000 if picture.is_symlink() else 150_000
        assert 5_000 < picture.stat().st_size < limit, picture
