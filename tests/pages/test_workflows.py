"""What CI and the issue template hold: well-formed, and of commands that exist."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from commands import INLINE, ROOT, check

yaml = pytest.importorskip("yaml")

WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
OURS = re.compile(r"(?:make|python3? -m|\.ci/)\S* ?[^\n|;)]*")


def steps_of(workflow: Path) -> list[dict]:
    (job,) = yaml.safe_load(workflow.read_text())["jobs"].values()
    return job["steps"]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_workflow_is_well_formed(workflow):
    parsed = yaml.safe_load(workflow.read_text())
    # YAML 1.1 reads the key `on` as true.
    assert parsed.keys() >= {"name", True, "permissions", "jobs"}
    for job in parsed["jobs"].values():
        assert job["runs-on"]
        assert job["timeout-minutes"] <= 120
        for step in job["steps"]:
            assert ("run" in step) != ("uses" in step)


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_commands_of_workflows_exist(workflow):
    scripts = [step["run"] for step in steps_of(workflow) if "run" in step]
    commands = [command for script in scripts for command in OURS.findall(script)]
    assert commands
    for command in commands:
        check(command)


def test_gpu_job_runs_on_a_card_and_keeps_what_it_measured():
    (job,) = yaml.safe_load((ROOT / ".github/workflows/gpu.yml").read_text())["jobs"].values()
    assert job["runs-on"] == ["self-hosted", "gpu"]
    (upload,) = [step for step in job["steps"] if "upload-artifact" in step.get("uses", "")]
    assert upload["with"]["path"].split() == [
        "bench/results",
        "bench/RESULTS.md",
        "build/on_card",
    ]


def test_gpu_job_can_collect_every_test():
    """pytest reads all files for the few tests of the job: none may need what its runner does not hold."""
    comment = re.match(r"(?:#.*\n)+", (ROOT / ".github/workflows/gpu.yml").read_text())[0]
    held = re.findall(r"\w+", comment.partition("holds")[2].partition(":")[0])
    assert {"torch", "triton", "pytest"} < set(held)
    # gpu_embed brings numpy, and torch brings filelock.
    known = {*held, "gpu_embed", "numpy", "filelock", *sys.stdlib_module_names}
    files = list((ROOT / "tests").rglob("*.py"))
    known |= {file.stem for file in files}
    # Not read where TorchRec, the extra "vectors", or transformers is not installed.
    names = ("torchrec", "vectors", "support/collections_of_tables.py", "support/small_models.py")
    others = {ROOT / f"tests/{name}" for name in names}
    files = [file for file in files if not {file, file.parent} & others]
    for file in files:
        # What is imported on its own, not from within another statement.
        for node in ast.parse(file.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert {name.partition(".")[0] for name in names} <= known, file.name


@pytest.mark.parametrize("code", [0, 1], ids=["same speed", "slower"])
@pytest.mark.parametrize("measured", [True, False], ids=["measured", "nothing measured"])
def test_gpu_job_compares_what_it_measured_with_what_is_committed(tmp_path, code, measured):
    (script,) = [
        step["run"]
        for step in steps_of(ROOT / ".github/workflows/gpu.yml")
        if "compare" in step.get("run", "")
    ]
    results = tmp_path / "bench/results"
    for name in ("nvidia-h100-2026-01-05-aaaa", "nvidia-h100-2026-02-01-bbbb"):
        (results / name).mkdir(parents=True)
        (results / name / "results.csv").touch()
    git = ["git", "-c", "user.name=test", "-c", "user.email=test", "-C", tmp_path]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "old"]):
        subprocess.run([*git, *arguments], check=True)
    new = "nvidia-h100-2026-04-01-dddd/results.csv" if measured else ""
    if measured:
        (results / new).parent.mkdir()
        (results / new).touch()
    (tmp_path / "python3").write_text(f'#!/bin/sh\nprintf "%s\n" "$@"\nexit {code}\n')
    (tmp_path / "python3").chmod(0o755)
    done = subprocess.run(
        ["bash", "-e", "-c", script],
        cwd=tmp_path,
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == (code if measured else 1), done.stderr
    asked = ["-m", "gpu_embed.bench", "compare", f"bench/results/{new}"]
    assert done.stdout.splitlines() == (asked if measured else [])


def test_bug_report_asks_for_the_environment_report():
    folder = ROOT / ".github/ISSUE_TEMPLATE"
    assert isinstance(yaml.safe_load((folder / "config.yml").read_text()), dict)
    form = yaml.safe_load((folder / "bug_report.yml").read_text())
    assert form.keys() >= {"name", "description", "body"}
    assert len({field["id"] for field in form["body"]}) == len(form["body"])
    for field in form["body"]:
        assert field["type"] in ("textarea", "dropdown")
        assert field["attributes"]["label"]
    (report,) = [field for field in form["body"] if field["id"] == "report"]
    assert report["validations"]["required"] is True
    commands = INLINE.findall(report["attributes"]["description"])
    assert commands == ["python -m gpu_embed.env_report"]
    check(commands[0])


def test_pre_commit_runs_make_lint_and_downloads_nothing():
    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    (hook,) = repo["hooks"]
    assert (repo["repo"], hook["language"], hook["entry"]) == ("local", "system", "make lint")
    assert not hook["pass_filenames"]
    check(hook["entry"])
    assert re.search(hook["files"], "gpu_embed/__init__.py")


def test_pull_request_template_is_short_and_names_what_exists():
    lines = (ROOT / ".github/pull_request_template.md").read_text().splitlines()
    assert len(lines) == 6
    for name in re.findall(r"`(make [^`]+)`", "\n".join(lines)):
        check(name)
    for name in ("CHANGELOG.md", "bench/codegen.csv"):
        assert name in "\n".join(lines)
        assert (ROOT / name).is_file()
