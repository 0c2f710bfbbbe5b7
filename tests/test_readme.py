"""The README does what it says: every block runs, in order, in a folder that holds only the examples."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
SHELL = ("sh", "bash")
NOT_RUN = re.compile(r"<!-- not run: \S.* -->")
MOST_NOT_RUN = 4


@dataclass(frozen=True)
class Block:
    """A fenced block: the line its text starts on, the language, the text, the section, and whether it is run."""

    line: int
    language: str
    text: str
    section: str
    runs: bool


def blocks(readme: str) -> list[Block]:
    found: list[Block] = []
    section, before, opened = "", "", None
    for number, line in enumerate(readme.splitlines(), start=1):
        if opened is not None and line.strip() == "```":
            start, language, lines, runs = opened
            found.append(Block(start, language, "\n".join(lines), section, runs))
            before, opened = "", None
        elif opened is not None:
            opened[2].append(line)
        elif line.startswith("```"):
            opened = (number + 1, line.removeprefix("```").strip(), [], not NOT_RUN.fullmatch(before))
        else:
            section = line.removeprefix("## ").strip() if line.startswith("## ") else section
            before = line.strip() or before
    assert opened is None, f"the block at line {opened and opened[0]} is never closed"
    return found


BLOCKS = blocks(README.read_text("utf-8"))


def first_block(section: str) -> Block:
    return next(block for block in BLOCKS if block.section == section)


def commands(block: Block) -> list[str]:
    """The command lines of a shell block that are run here; installing, cloning and changing folders are not."""
    if block == first_block("Quick start"):
        return [block.text.partition("&&")[2].strip()]
    lines = [line.strip() for line in block.text.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line and not line.startswith(("#", "pip ", "git ", "cd "))]


def run_all(folder: Path) -> None:
    """Run shell lines, each in a shell of its own, and Python blocks in one namespace, all in `folder`."""
    programs = folder / ".programs"
    programs.mkdir()
    python = shlex.quote(sys.executable)
    for name, command in {"sdedit": f"{python} -m sdedit.cli.main", "python": python}.items():
        (programs / name).write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        (programs / name).chmod(0o755)
    environment = os.environ | {"PATH": os.pathsep.join([str(programs), os.environ["PATH"]])}
    namespace: dict[str, object] = {"__name__": "readme"}
    for block in BLOCKS:
        if block.runs and block.language == "python":
            exec(compile("\n" * (block.line - 1) + block.text, README, "exec"), namespace)
        elif block.runs and block.language in SHELL:
            for line in commands(block):
                shell = ["sh", "-ec", line]
                done = subprocess.run(shell, cwd=folder, env=environment, capture_output=True, text=True)
                assert done.returncode == 0, f"README.md:{block.line}: {line}\n{done.stdout}{done.stderr}"


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which somebody has done everything that the README says."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(ROOT / "examples", folder / "examples")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_all(folder)
    return folder


def test_every_block_runs_and_the_quick_start_makes_a_picture(followed):
    assert (followed / "picture.png").is_file()


def test_every_output_that_a_command_names_is_made(followed):
    lines = [line for block in BLOCKS if block.runs and block.language in SHELL for line in commands(block)]
    outputs = [Path(name) for line in lines for name in re.findall(r" -o (\S+)", line)]
    assert outputs
    assert [name for name in outputs if not list(followed.glob(f"{name.stem}*{name.suffix}"))] == []


def test_the_replayed_picture_has_the_same_bytes(followed):
    assert (followed / "again.png").read_bytes() == (followed / "picture.png").read_bytes()


@pytest.mark.parametrize("section", ["Quick start", "Tests"])
def test_a_section_starts_with_one_command_line(section):
    block = first_block(section)
    assert block.language in SHELL
    assert block.text.startswith("pip install ")
    assert "\n" not in block.text
    assert block.text.count("&&") == 1


def test_every_block_says_its_language():
    assert {block.language for block in BLOCKS} <= {"python", "text", "json", *SHELL}


def test_few_blocks_are_not_run():
    assert len([block.line for block in BLOCKS if not block.runs]) <= MOST_NOT_RUN


def test_a_block_is_left_out_only_by_a_comment_with_a_reason():
    fence = "```sh\nfalse\n```\n"
    texts = (f"<!-- not run: needs a GPU -->\n\n{fence}", f"<!-- not run: -->\n{fence}", f"word\n{fence}", fence)
    assert [blocks(text)[0].runs for text in texts] == [False, True, True, True]


def test_every_link_leads_to_a_file():
    targets = re.findall(r"\]\(([^)#]+)", README.read_text("utf-8"))
    local = [target for target in targets if "://" not in target]
    assert local
    assert [target for target in local if not (ROOT / target).is_file()] == []
