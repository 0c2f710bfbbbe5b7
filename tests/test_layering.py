"""Which part imports which, and what is loaded when. Read from the sources; loading is watched in fresh processes."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import sdedit

ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "onnx", "onnxruntime", "tensorrt", "tensorrt_rtx", "pycuda", "openvino"}
EXPORT_MAY_USE = (
    "artifact", "backends.ort", "errors", "export", "features", "noise", "output", "schedule", "sde", "verify",
    "__version__",
)  # fmt: skip

LOADED_BY = """
import json, sys
before = set(sys.modules)
exec(sys.argv[1])
print(json.dumps(sorted({name.partition(".")[0] for name in set(sys.modules) - before})))
"""


def sources(*folders: str) -> list:
    """Every module of these folders, as test parameters."""
    paths = sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return [pytest.param(path, id=path.relative_to(ROOT).as_posix()) for path in paths]


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"), str(path))


def imports(tree: ast.AST, inside_functions: bool = True) -> Iterator[str]:
    """What is imported, spelled out: `from sdedit import image` is sdedit.image."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif inside_functions or not (
            isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
        ):
            yield from imports(node, inside_functions)


def of(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def loaded_by(code: str, cwd: Path) -> set[str]:
    """The top-level names that `code` adds to sys.modules of a fresh process."""
    command = [sys.executable, "-c", LOADED_BY, code]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))


# --- by source ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sources("engine"))
def test_the_engine_imports_neither_the_command_nor_export(path):
    assert [name for name in imports(parse(path)) if of(name, ("sdedit.cli", "sdedit.export"))] == []


@pytest.mark.parametrize("path", sources("engine"))
def test_the_engine_never_imports_torch_or_onnx(path):
    assert [name for name in imports(parse(path)) if of(name, ("torch", "onnx"))] == []


@pytest.mark.parametrize("path", sources("engine", "cli"))
def test_nothing_heavy_is_imported_at_module_level(path):
    top = imports(parse(path), inside_functions=False)
    assert [name for name in top if name.partition(".")[0] in HEAVY] == []


@pytest.mark.parametrize("path", sources("cli"))
def test_a_command_imports_export_only_inside_a_function(path):
    assert [name for name in imports(parse(path), inside_functions=False) if of(name, ("sdedit.export",))] == []


@pytest.mark.parametrize("path", sources("export"))
def test_export_uses_only_what_it_needs_of_the_engine(path):
    ours = [name for name in imports(parse(path)) if of(name, ("sdedit",))]
    assert [name for name in ours if not of(name, tuple(f"sdedit.{allowed}" for allowed in EXPORT_MAY_USE))] == []


@pytest.mark.parametrize("path", sources("engine", "cli", "export", "benchmarks", "examples"))
def test_imports_are_absolute_and_by_the_installed_name(path):
    tree = parse(path)
    assert [node.lineno for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level] == []
    assert [name for name in imports(tree) if of(name, ("engine", "cli", "export"))] == []


OUTSIDERS = [
    one for one in sources("benchmarks", "examples") if one.id != "benchmarks/gpu_check.py"
]  # that looks inside
MEASURES = ("export", "features", "metrics")  # beside the public names: data, guides and figures of studies


@pytest.mark.parametrize("path", OUTSIDERS)
def test_benchmarks_and_examples_use_only_public_names(path):
    tree = parse(path)
    imported = {name.removeprefix("sdedit.") for name in imports(tree) if of(name, ("sdedit",))} - {"sdedit"}
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "sdedit"
    }
    assert {name for name in imported | used if not of(name, MEASURES)} <= {*sdedit.__all__, "__version__"}


def test_what_type_checkers_see_is_what_is_loaded_lazily():
    (block,) = (
        node
        for node in parse(ROOT / "engine" / "__init__.py").body
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    )
    seen = [(node.module, alias) for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert len(seen) == len(block.body)
    assert all(alias.asname == alias.name for _, alias in seen)  # `as` itself: a re-export
    assert {alias.name: module for module, alias in seen} == {
        name: f"sdedit.{module}" for name, module in sdedit._HOME.items()
    }


# --- by loading --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sdedit.__all__)
def test_a_public_name_lives_where_the_table_says(name):
    found = getattr(sdedit, name)
    assert getattr(found, "__module__", f"sdedit.{sdedit._HOME[name]}") == f"sdedit.{sdedit._HOME[name]}"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'sdedit' has no attribute 'Painter'"):
        _ = sdedit.Painter


def test_the_public_names_are_listed():
    assert set(sdedit.__all__) <= set(dir(sdedit))


def test_import_sdedit_loads_no_library(tmp_path):
    loaded = loaded_by("import sdedit", tmp_path)
    assert "sdedit" in loaded
    assert loaded & {"numpy", "PIL", *HEAVY} == set()


def test_building_the_parser_loads_no_library(tmp_path):
    loaded = loaded_by("from sdedit.cli.main import build_parser; build_parser()", tmp_path)
    assert {"sdedit", "argparse"} <= loaded
    assert loaded & {"numpy", "PIL", *HEAVY} == set()


def test_reading_an_artifact_loads_no_runtime(tmp_path):
    loaded = loaded_by("from sdedit import artifact; artifact.read(artifact.BUNDLED)", tmp_path)
    assert "numpy" in loaded
    assert loaded & HEAVY == set()
