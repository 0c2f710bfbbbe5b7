"""What a user gets: the wheel that this checkout builds, installed beside numpy and pillow and nothing else."""

import json
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from email import message_from_bytes
from email.message import Message
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdedit.cli.main import COMMANDS

ROOT = Path(__file__).parents[1]
HOMES = {"engine": "sdedit", "cli": "sdedit/cli", "export": "sdedit/export"}  # folder -> its place in the wheel
BASE = ("numpy", "pillow")
NEED_NEITHER_TORCH_NOR_ONNX = {
    f"sdedit.export.{name}" for name in ("eurosat", "networks", "schedules", "triton_plan", "triton_repository")
}
MOST_BYTES = 16e6

IMPORT_EACH = """
import importlib, json, sys
missing = {}
for module in sys.argv[1:]:
    try:
        importlib.import_module(module)
        missing[module] = None
    except ImportError as error:
        missing[module] = error.name
    for loaded in [name for name in sys.modules if name.partition(".")[0] == "sdedit"]:
        del sys.modules[loaded]  # so that the next one is imported first, too
print(json.dumps(missing))
"""


def shipped() -> set[str]:
    """The wheel's names for what lies under engine, cli and export, bytecode and hidden files aside."""
    files = {
        (home, path.relative_to(ROOT / folder))
        for folder, home in HOMES.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file()
    }
    return {
        f"{home}/{path.as_posix()}"
        for home, path in files
        if "__pycache__" not in path.parts and not any(part.startswith(".") for part in path.parts)
    }


def modules() -> list[str]:
    sources = (Path(name) for name in shipped() if name.endswith(".py"))
    return sorted(".".join(p.parent.parts if p.stem == "__init__" else p.with_suffix("").parts) for p in sources)


def checked(*command: str | Path, cwd: Path) -> str:
    """stdout of a command that must succeed."""
    done = subprocess.run(command, cwd=cwd, env=clean_environment(), capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    return done.stdout


def clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "SDEDIT"))}


def can_build_here() -> bool:
    """Whether this environment's setuptools knows licence expressions; else pip gets one for the build."""
    try:
        return int(version("setuptools").partition(".")[0]) >= 77
    except PackageNotFoundError:
        return False


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy, built = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("wheel")
    for folder in HOMES:
        shutil.copytree(ROOT / folder, copy / folder)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    isolation = ["--no-build-isolation"] if can_build_here() else []
    checked(sys.executable, "-m", "pip", "wheel", "--no-deps", *isolation, "-w", built, copy, cwd=copy)
    (only,) = built.iterdir()
    return only


@pytest.fixture(scope="session")
def wheel_names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as files:
        return set(files.namelist())


@pytest.fixture(scope="session")
def wheel_metadata(wheel: Path, wheel_names: set[str]) -> Message:
    (name,) = (name for name in wheel_names if name.endswith(".dist-info/METADATA"))
    with zipfile.ZipFile(wheel) as files:
        return message_from_bytes(files.read(name))


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts of an environment that has the wheel, numpy and pillow (linked from here), not even pip."""
    environment = tmp_path_factory.mktemp("environment")
    venv.EnvBuilder(symlinks=True).create(environment)
    (site,) = environment.glob("lib/python*/site-packages")
    for name in BASE:
        found = distribution(name)
        for entry in {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
            (site / entry).symlink_to(Path(str(found.locate_file(entry))).resolve())
    pip = (sys.executable, "-m", "pip", "--python", environment / "bin" / "python")
    checked(*pip, "install", "--no-deps", "--no-index", wheel, cwd=environment)
    checked(*pip, "check", cwd=environment)
    return environment / "bin"


@pytest.fixture(scope="session")
def missing(installed: Path) -> dict[str, str | None]:
    """Every module of the checkout -> what it lacks when it is the first one imported in that environment."""
    printed = checked(installed / "python", "-I", "-c", IMPORT_EACH, *modules(), cwd=installed)
    return dict(json.loads(printed))


# --- the wheel ---------------------------------------------------------------------------------------------------


def test_every_file_of_the_three_folders_is_in_the_wheel_and_nothing_else(wheel_names):
    assert {name for name in wheel_names if ".dist-info/" not in name} == shipped()


@pytest.mark.parametrize(
    "name",
    [
        "sdedit/__init__.py",
        "sdedit/backends/ort.py",
        "sdedit/cli/main.py",
        "sdedit/export/networks/patch_unet.py",
        "sdedit/models/LICENSE-EuroSAT",
        "sdedit/models/eurosat-64.md",
        "sdedit/models/eurosat-64.onnx",
        "sdedit/py.typed",
    ],
)
def test_the_wheel_holds(name, wheel_names):
    assert name in wheel_names


def test_the_wheel_is_under_16_megabytes(wheel):
    assert wheel.stat().st_size < MOST_BYTES


def test_the_wheel_runs_on_any_machine(wheel):
    assert wheel.name.endswith("-py3-none-any.whl")


def test_both_licences_travel_with_the_metadata(wheel_names):
    licences = {name.partition("/licenses/")[2] for name in wheel_names if ".dist-info/licenses/" in name}
    assert licences == {"LICENSE", "engine/models/LICENSE-EuroSAT"}


def test_the_base_dependencies_are_numpy_and_pillow(wheel_metadata):
    required = [line for line in wheel_metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert sorted(re.split(r"[^\w-]", line)[0] for line in required) == sorted(BASE)


def test_every_extra_that_a_message_names_exists(wheel_metadata):
    sources = [path.read_text("utf-8") for folder in HOMES for path in (ROOT / folder).rglob("*.py")]
    named = {extra for source in sources for extra in re.findall(r"sdedit-engine\[(\w[\w-]*)\]", source)}
    assert named
    assert named <= set(wheel_metadata.get_all("Provides-Extra", []))


# --- installed without any extra ---------------------------------------------------------------------------------


def test_the_engine_and_the_command_import_without_any_extra(missing):
    ours = {module: lacks for module, lacks in missing.items() if not module.startswith("sdedit.export")}
    assert ours == dict.fromkeys(ours)
    assert {"sdedit", "sdedit.editor", "sdedit.backends.ort", "sdedit.cli.main"} <= set(ours)


def test_the_export_modules_that_need_torch_or_onnx_lack_nothing_else(missing):
    failed = {module: lacks for module, lacks in missing.items() if lacks is not None}
    export = {module for module in missing if module.startswith("sdedit.export.")}
    assert set(failed) == export - NEED_NEITHER_TORCH_NOR_ONNX
    assert set(failed.values()) <= {"torch", "onnx"}


@pytest.mark.parametrize("name", ["engine", "cli", "export", "tests", "benchmarks", "examples"])
def test_no_folder_of_the_checkout_becomes_a_package_of_that_name(name, installed, tmp_path):
    code = f"import importlib.util; print(importlib.util.find_spec({name!r}))"
    assert checked(installed / "python", "-I", "-c", code, cwd=tmp_path) == "None\n"


@pytest.mark.parametrize("words", [(), *((name,) for name in COMMANDS)], ids=" ".join)
def test_help_needs_no_extra(words, installed, tmp_path):
    printed = checked(installed / "sdedit", *words, "-h", cwd=tmp_path)
    assert printed.startswith(" ".join(["usage: sdedit", *words]))


def test_the_entry_point_says_the_version_of_the_wheel(installed, wheel_metadata, tmp_path):
    printed = checked(installed / "sdedit", "--version", cwd=tmp_path)
    assert printed == f"sdedit-engine {wheel_metadata['Version']}\n"


def test_inspect_reads_the_bundled_model_without_onnxruntime(installed, tmp_path):
    described = json.loads(checked(installed / "sdedit", "inspect", "--json", cwd=tmp_path))
    assert described["metadata"]["name"] == "eurosat-64"


def test_doctor_says_what_is_missing_and_how_to_install_it(installed, tmp_path):
    command = [installed / "sdedit", "doctor"]
    done = subprocess.run(command, cwd=tmp_path, env=clean_environment(), capture_output=True, text=True)
    assert done.returncode == 1
    assert re.search(r"onnxruntime +not installed", done.stdout)
    assert "fix: pip install 'sdedit-engine[cpu]'" in done.stdout
    assert done.stderr.startswith("error: no backend works; ort-cpu: onnxruntime cannot be imported: ")


def test_edit_without_onnxruntime_names_the_extra_to_install(installed, tmp_path):
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "guide.png")
    command = [installed / "sdedit", "edit", "guide.png", "-o", "out.png"]
    done = subprocess.run(command, cwd=tmp_path, env=clean_environment(), capture_output=True, text=True)
    assert done.returncode == 1
    error, hint = done.stderr.splitlines()
    assert error.startswith("error: ort-cpu: onnxruntime cannot be imported: ")
    assert hint == "hint: pip install 'sdedit-engine[cpu]'"
    assert done.stdout == ""
    assert not (tmp_path / "out.png").exists()
