"""The rules of the house that a machine can check: lint, format, types, docstrings, small files with one owner each."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("engine", "cli", "export", "tests", "benchmarks", "examples")
MOST_LINES = 400
NOBODYS = {"common", "helper", "helpers", "manager", "misc", "util", "utils"}


def sources(*folders: str) -> list:
    """Every module of these folders, as test parameters."""
    paths = sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return [pytest.param(path, id=path.relative_to(ROOT).as_posix()) for path in paths]


def run(*command: str | Path, cwd: Path) -> str:
    """stdout of a tool that must find nothing wrong."""
    done = subprocess.run([sys.executable, "-m", *command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    return done.stdout


def test_ruff_finds_nothing():
    run("ruff", "check", "--no-cache", *FOLDERS, cwd=ROOT)


def test_every_file_is_formatted():
    run("ruff", "format", "--check", "--no-cache", *FOLDERS, cwd=ROOT)


def test_mypy_strict_finds_nothing_in_engine_and_cli(tmp_path):
    package = tmp_path / "sdedit"  # type checkers want the folders where the import names say they are
    package.mkdir()
    for entry in (*(ROOT / "engine").iterdir(), ROOT / "cli", ROOT / "export"):
        if entry.name != "__pycache__":
            (package / entry.name).symlink_to(entry)
    configuration = ("--config-file", ROOT / "pyproject.toml", "--cache-dir", tmp_path / "cache")
    printed = run("mypy", *configuration, "--strict", "-p", "sdedit", cwd=tmp_path)
    checked = re.fullmatch(r"Success: no issues found in (\d+) source files\n", printed)
    assert checked
    assert int(checked[1]) == len(sources("engine", "cli"))


@pytest.mark.parametrize("path", sources("engine"))
def test_every_public_function_and_class_has_a_docstring(path):
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    public = [node for node in ast.parse(path.read_text("utf-8")).body if isinstance(node, kinds)]
    bare = [node.name for node in public if not node.name.startswith("_") and not ast.get_docstring(node)]
    assert bare == []


@pytest.mark.parametrize("path", sources("engine", "cli"))
def test_a_file_has_at_most_400_lines(path):
    assert len(path.read_text("utf-8").splitlines()) <= MOST_LINES


@pytest.mark.parametrize("path", sources(*FOLDERS))
def test_a_file_is_named_for_what_it_owns(path):
    assert set(path.stem.lower().split("_")) & NOBODYS == set()
