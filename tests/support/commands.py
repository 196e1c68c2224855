"""Commands that pages and workflows show: found in the text, and checked without being run."""

import ast
import importlib.util
import re
import shlex
from pathlib import Path

from gpu_embed import env_report
from gpu_embed.bench import cli
from gpu_embed.demo import __main__ as demo
from gpu_embed.tune import cli as tune

ROOT = Path(__file__).resolve().parents[2]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
COMMAND = r"(?:make|pip|python3?|torchrun) "
INLINE = re.compile(rf"`({COMMAND}[^`\n]+)`")
# What `example_parser` adds to an example's own options, and how an example asks for it.
SHARED = {
    "--quick": "example_parser(",
    "--device": "example_parser(",
    "--out": "picture=",
    "--seed": "seed=True",
}
TARGETS = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
# Ours, and how they take their arguments: what they do not understand raises.
MODULES = {
    "gpu_embed.bench": cli.parse_args,
    "gpu_embed.demo": demo.parse_args,
    "gpu_embed.env_report": env_report.parse_args,
    "gpu_embed.tune": tune.parse_args,
}


def python_blocks(text: str) -> list[str]:
    return [code for language, code in FENCED.findall(text) if language == "python"]


def said_to_print(code: str) -> list[str]:
    """The comment behind each print; ... stands for anything."""
    lines = code.splitlines()
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    ends = sorted(node.end_lineno for node in calls if getattr(node.func, "id", "") == "print")
    return [lines[end - 1].partition("  # ")[2] for end in ends if "  # " in lines[end - 1]]


def check_printed(code: str, output: str) -> None:
    """Raise AssertionError unless code printed what it says it does, in that order."""
    printed = iter(output.splitlines())
    for said in said_to_print(code):
        pattern = re.escape(said).replace(re.escape("..."), ".*")
        assert any(re.fullmatch(pattern, line) for line in printed), said


def commands_in(text: str) -> list[str]:
    """The lines of blocks that begin with a command, and commands within a sentence; each once."""
    blocks = [block for _, block in FENCED.findall(text) if re.match(COMMAND, block)]
    lines = [line.partition(" # ")[0].strip() for block in blocks for line in block.splitlines()]
    found = [line for line in lines + INLINE.findall(FENCED.sub("", text)) if line]
    # An option in brackets may be left out.
    return list(dict.fromkeys(re.sub(r" \[(--\w+)\]", r" \1", line) for line in found))


def check(command: str) -> None:
    """Raise AssertionError or SystemExit unless the command's parts exist."""
    for part in re.split(r"&&|;", command):
        # People on Windows install too, and cmd.exe knows no single quotes.
        assert not ("pip install" in part and "'" in part), part
        _check(shlex.split(part))


def _check(words: list[str]) -> None:
    if words[0] == "make":
        targets = [word for word in words[1:] if "=" not in word]
        assert all(target in TARGETS for target in targets), words
    elif words[0] == "torchrun":
        assert words[1] == "--nproc-per-node", words
        _check(["python", *words[3:]])
    elif words[:2] == ["pip", "install"]:
        _check_install(words[2:])
    elif words[0] in ("python", "python3") and words[1] == "-m":
        if words[2] in MODULES:
            MODULES[words[2]](words[3:])
        else:
            assert importlib.util.find_spec(words[2]) is not None, words
    elif words[0] in ("python", "python3"):
        script = (ROOT / words[1]).read_text()
        for option in (word for word in words[2:] if word.startswith("--")):
            assert f'"{option}"' in script or SHARED.get(option, option) in script, words
    else:
        assert (ROOT / words[0]).is_file(), words


def _check_install(words: list[str]) -> None:
    pyproject = (ROOT / "pyproject.toml").read_text()
    extras = re.findall(r"(?:^\.|gpu_embed)\[([\w,]+)\]", "\n".join(words), re.MULTILINE)
    for extra in ",".join(extras).split(",") if extras else []:
        assert re.search(rf"^{extra} = \[", pyproject, re.MULTILINE), words
    for option, value in zip(words, words[1:] + [""], strict=True):
        assert option != "-c" or (ROOT / value).is_file(), words
