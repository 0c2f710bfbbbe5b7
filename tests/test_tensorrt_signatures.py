"""Every TensorRT name that the engine uses exists, and takes what it is given, in TensorRT 10, 11 and RTX.

RTX is installed. Of the other two only the Python bindings are looked at, without libnvinfer and without a GPU: the
wheels are a megabyte each, taken from the folder SDEDIT_TENSORRT_WHEELS or from the package index, and the libraries
that they link are stand-ins which do nothing.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
STUB = ROOT / "tests" / "tensorrt_stub" / "nvinfer.c"
USERS = (*sorted((ROOT / "engine" / "tensorrt").glob("*.py")), ROOT / "engine" / "backends" / "tensorrt.py")
WHEELS = {  # oldest of 10 that is taken, last of 10, and 11
    "10.1": "tensorrt_cu12_bindings==10.1.0",
    "10.16": "tensorrt_cu12_bindings==10.16.1.11",
    "11.4": "tensorrt_cu13_bindings==11.4.0.106",
}
RTX = "rtx"

# class -> method -> how many arguments it is given, or None for an attribute
METHODS: dict[str, dict[str, int | None]] = {
    "Builder": {
        "__init__": 1,
        "create_network": 1,
        "create_builder_config": 0,
        "create_optimization_profile": 0,
        "build_serialized_network": 2,
    },
    "INetworkDefinition": {"num_inputs": None, "get_input": 1},
    "ITensor": {"name": None},
    "OnnxParser": {"__init__": 2, "parse_from_file": 1, "num_errors": None, "get_error": 1},
    "ParserError": {"desc": 0, "node_name": 0, "node_operator": 0},
    "IOptimizationProfile": {"set_shape": 4},
    "IBuilderConfig": {
        "clear_flag": 1,
        "profiling_verbosity": None,
        "progress_monitor": None,
        "set_memory_pool_limit": 2,
        "add_optimization_profile": 1,
        "create_timing_cache": 1,
        "set_timing_cache": 2,
        "get_timing_cache": 0,
    },
    "ITimingCache": {"serialize": 0},
    "IProgressMonitor": {"phase_start": 3, "step_complete": 2, "phase_finish": 1},
    "ILogger": {"log": 2},
    "Runtime": {"__init__": 1, "deserialize_cuda_engine": 1},
    "ICudaEngine": {
        "create_execution_context": 0,
        "create_engine_inspector": 0,
        "num_io_tensors": None,
        "device_memory_size_v2": None,
        "get_tensor_name": 1,
        "get_tensor_mode": 1,
        "get_tensor_dtype": 1,
        "get_tensor_shape": 1,
        "get_tensor_profile_shape": 2,
    },
    "IExecutionContext": {
        "set_input_shape": 2,
        "set_tensor_address": 2,
        "set_device_memory": 2,
        "set_optimization_profile_async": 2,
        "execute_async_v3": 1,
        "get_tensor_shape": 1,
    },
    "EngineInspector": {"get_engine_information": 1},
}
ONLY_RTX: dict[str, dict[str, int | None]] = {
    "IBuilderConfig": {"num_compute_capabilities": None, "set_compute_capability": 2, "set_flag": 1},
    "ICudaEngine": {"create_execution_context": 1, "create_runtime_config": 0},
    "IRuntimeConfig": {
        "dynamic_shapes_kernel_specialization_strategy": None,
        "create_runtime_cache": 0,
        "set_runtime_cache": 1,
    },
    "IRuntimeCache": {"serialize": 0, "deserialize": 1},
}
MEMBERS = {
    "NetworkDefinitionCreationFlag": {"STRONGLY_TYPED"},
    "BuilderFlag": {"TF32"},
    "ProfilingVerbosity": {"DETAILED"},
    "MemoryPoolType": {"WORKSPACE"},
    "LayerInformationFormat": {"ONELINE"},
    "TensorIOMode": {"INPUT", "OUTPUT"},
    "DataType": {"FLOAT", "INT32", "INT64"},
    "ExecutionContextAllocationStrategy": {"USER_MANAGED"},
}
ONLY_RTX_MEMBERS = {
    "BuilderFlag": {"REQUIRE_USER_ALLOCATION"},
    "DynamicShapesKernelSpecializationStrategy": {"EAGER"},
}
SETTABLE = ("profiling_verbosity", "progress_monitor")

# words of ours, or of Python's, that TensorRT's bindings have too
NOT_TENSORRTS = {"dtype", "logger", "shape"}

DESCRIBE = """
import importlib, json, sys
trt = importlib.import_module(sys.argv[1])
told = {"version": trt.__version__, "classes": {}, "members": {}}
for name in dir(trt):
    owner = getattr(trt, name)
    if isinstance(owner, type):
        members = dict(getattr(owner, "__members__", {}))
        told["members"][name] = {member: int(value) for member, value in members.items()}
        told["classes"][name] = {
            attribute: {
                "text": getattr(owner, attribute).__doc__ or "",
                "callable": callable(getattr(owner, attribute)),
                "settable": getattr(getattr(owner, attribute), "fset", None) is not None,
            }
            for attribute in dir(owner)
            if attribute == "__init__" or not attribute.startswith("_")
        }
print(json.dumps(told))
"""

USE_OUR_CLASSES = """
from sdedit.tensorrt import build, installed
opened = installed.open_library("tensorrt")
log = opened.logger("INFO")
log.log(opened.module.ILogger.ERROR, "it (In a at /b.cpp:1)")
log.log(opened.module.ILogger.VERBOSE, "chatter")
monitor = build._monitor(opened.module, build._Progress())
monitor.phase_start("whole", None, 4)
assert monitor.step_complete("whole", 1) is True
monitor.phase_finish("whole")
print(opened.version, opened.major, opened.ahead_of_time_targets, log.last_error(), list(log.messages))
"""


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bindings")


def unpacked(version: str, folder: Path) -> Path:
    """The wheel's content, as `import tensorrt` would find it; skips where there is neither wheel nor network."""
    requirement = WHEELS[version]
    target = folder / version
    if target.is_dir():
        return target
    package, _, exact = requirement.partition("==")
    given = os.environ.get("SDEDIT_TENSORRT_WHEELS")
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    if given:
        found = sorted(Path(given).glob(f"{package}-{exact}-{tag}-*.whl"))
        if not found:
            pytest.skip(f"SDEDIT_TENSORRT_WHEELS has no {package}-{exact}-{tag}")
    else:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--retries", "1"]
        done = subprocess.run([*command, "-d", folder / "wheels", requirement], capture_output=True, text=True)
        found = sorted((folder / "wheels").glob(f"{package}-{exact}-*.whl"))
        if done.returncode or not found:
            pytest.skip(f"{requirement} cannot be downloaded: {done.stderr.strip().splitlines()[-1:]}")
    with zipfile.ZipFile(found[0]) as wheel:
        wheel.extractall(target)
    # what the vendor's own package `tensorrt` is: the bindings under another name
    (target / "tensorrt.py").write_text("from tensorrt_bindings import *\nfrom tensorrt_bindings import __version__\n")
    return target


def stand_ins(version: str, folder: Path) -> Path:
    """A folder with the libraries that the bindings of this version link."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("no C compiler for Linux libraries here")
    major = version.partition(".")[0]
    target = folder / f"libraries-{major}"
    target.mkdir(exist_ok=True)
    for name in ("libnvinfer", "libnvinfer_plugin", "libnvonnxparser"):
        file = f"{name}.so.{major}"
        subprocess.run([compiler, "-shared", "-fPIC", f"-Wl,-soname,{file}", "-o", target / file, STUB], check=True)
    return target


def python(code: str, *words: str, path: Path | None = None, libraries: Path | None = None) -> Any:
    """Run code in a process of its own: two versions of the bindings do not fit into one."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "LD_LIBRARY_PATH")}
    environment |= {"PYTHONPATH": str(path)} if path else {}
    environment |= {"LD_LIBRARY_PATH": str(libraries)} if libraries else {}
    return subprocess.run([sys.executable, "-c", code, *words], env=environment, capture_output=True, text=True)


@pytest.fixture(scope="session", params=[*WHEELS, RTX])
def bindings(request: pytest.FixtureRequest, folder: Path) -> dict[str, Any]:
    """Classes, members and docstrings of one TensorRT; pybind11 writes the signature into the docstring."""
    if request.param == RTX:
        pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
        done = python(DESCRIBE, "tensorrt_rtx")
    else:
        path, libraries = unpacked(request.param, folder), stand_ins(request.param, folder)
        done = python(DESCRIBE, "tensorrt_bindings", path=path, libraries=libraries)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout)) | {"rtx": request.param == RTX}


def takes(text: str, count: int) -> bool:
    """Whether one of the signatures in a pybind11 docstring takes so many arguments, self aside."""
    for parameters in re.findall(r"^(?:\d+\. )?\w+\((.*)\) -> ", text, re.MULTILINE):
        depth, split = 0, [""]
        for letter in parameters:
            depth += {"[": 1, "(": 1, "]": -1, ")": -1}.get(letter, 0)
            if letter == "," and depth == 0:
                split.append("")
            else:
                split[-1] += letter
        given = [one for one in (part.strip() for part in split) if one and not one.startswith("self")]
        variable = any(one.startswith("*") for one in given)
        needed = sum(" = " not in one and not one.startswith("*") for one in given)
        if not variable and needed <= count <= len(given):
            return True
    return False


def test_signatures_are_told_apart():
    text = "f(self: a.B, x: str, y: typing.Sequence[tuple[int, int]] = []) -> bool\n\nDoes (not) matter -> x"
    assert [count for count in range(4) if takes(text, count)] == [1, 2]
    overloaded = (
        "f(*args, **kwargs)\nOverloaded function.\n\n1. f(self: B) -> None\n\n2. f(self: B, a: int, b: int) -> None"
    )
    assert [count for count in range(4) if takes(overloaded, count)] == [0, 2]


def wanted(bindings: dict[str, Any]) -> list[tuple[str, str, int | None]]:
    tables = (METHODS, ONLY_RTX) if bindings["rtx"] else (METHODS,)
    return [(owner, name, count) for table in tables for owner, names in table.items() for name, count in names.items()]


def test_every_call_exists_and_takes_what_it_is_given(bindings):
    wrong = []
    for owner, name, count in wanted(bindings):
        found = bindings["classes"].get(owner, {}).get(name)
        if found is None:
            wrong.append(f"{owner}.{name} is not there")
        elif count is None and found["callable"]:
            wrong.append(f"{owner}.{name} is a method")
        elif count is not None and not takes(found["text"], count):
            wrong.append(f"{owner}.{name} does not take {count}: {found['text'].splitlines()[:1]}")
    assert wrong == []


@pytest.mark.parametrize("name", SETTABLE)
def test_what_is_set_can_be_set(name, bindings):
    assert bindings["classes"]["IBuilderConfig"][name]["settable"]


def test_every_enumeration_member_exists(bindings):
    wanted = [*MEMBERS.items(), *(ONLY_RTX_MEMBERS.items() if bindings["rtx"] else ())]
    assert [(name, members - set(bindings["members"].get(name, {}))) for name, members in wanted] == [
        (name, set()) for name, _ in wanted
    ]


def test_rtx_can_be_told_to_compile_before_it_runs(bindings):
    config = bindings["classes"].get("IRuntimeConfig", {})
    settable = config.get("dynamic_shapes_kernel_specialization_strategy", {}).get("settable", False)
    assert settable == bindings["rtx"]


def test_only_rtx_builds_for_other_gpus(bindings):
    targets = {name for name in bindings["members"].get("ComputeCapability", {}) if re.fullmatch(r"SM\d+", name)}
    assert bool(targets) == bindings["rtx"]
    assert not bindings["rtx"] or {"SM75", "SM80", "SM86", "SM89", "SM120"} <= targets


def test_the_strongly_typed_flag_has_another_number_in_tensorrt_10(bindings):
    """Which is why the engine takes numbers of enumerations from the module."""
    number = bindings["members"]["NetworkDefinitionCreationFlag"]["STRONGLY_TYPED"]
    assert number == (1 if bindings["version"].startswith("10.") else 0)


def test_no_call_is_missing_from_these_tables(bindings):
    """Whatever the engine's TensorRT code reads that is a class, or an attribute of a listed one, is listed above."""
    theirs = {name for owner in METHODS for name in bindings["classes"][owner]} | set(bindings["classes"])
    theirs |= {name for owner in MEMBERS for name in bindings["members"][owner]}
    listed = {name for table in (METHODS, ONLY_RTX) for names in table.values() for name in names}
    listed |= {*METHODS, *ONLY_RTX, *MEMBERS, *ONLY_RTX_MEMBERS, "ComputeCapability"}
    for table in (MEMBERS, ONLY_RTX_MEMBERS):
        listed |= {name for members in table.values() for name in members}
    used: dict[str, str] = {}
    for path in (path for path in USERS if path.exists()):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr in theirs:
                used.setdefault(node.attr, f"{path.relative_to(ROOT)}:{node.lineno}")
    assert {name: at for name, at in used.items() if name not in listed | NOT_TENSORRTS} == {}
    assert {"build_serialized_network", "OnnxParser", "STRONGLY_TYPED"} <= set(used)


@pytest.mark.parametrize("version", WHEELS)
def test_our_logger_and_progress_monitor_work_on_these_bindings(version, folder):
    done = python(USE_OUR_CLASSES, path=unpacked(version, folder), libraries=stand_ins(version, folder))
    assert done.returncode == 0, done.stderr
    found, major, targets, *said = done.stdout.strip().split(" ", 3)
    assert found == WHEELS[version].partition("==")[2]
    assert (major, targets) == (version.partition(".")[0], "()")
    assert said == ["it () [('ERROR', 'it (In a at /b.cpp:1)')]"]


@pytest.mark.parametrize("version", WHEELS)
def test_bindings_without_libnvinfer_name_the_file_and_the_fix(version, folder):
    code = "from sdedit.tensorrt.installed import open_library\ntry: open_library('tensorrt')\n"
    code += "except Exception as error: print(type(error).__name__, error, error.hint, sep='|')"
    done = python(code, path=unpacked(version, folder))
    kind, message, hint = done.stdout.strip().split("|")
    assert kind == "BackendUnavailable"
    major = version.partition(".")[0]
    assert re.match(rf"tensorrt: libnv\w+\.so\.{major} was not found: libnv\w+\.so\.{major}: cannot open", message)
    assert hint.startswith("pip install 'sdedit-engine[tensorrt]'; for a TensorRT installed otherwise")
