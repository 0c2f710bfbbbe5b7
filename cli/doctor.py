"""`sdedit doctor`: what is installed, which backends work, and what would make the others work."""

import argparse
import platform
from collections.abc import Callable, Mapping
from typing import Any

from sdedit.cli.arguments import add_json
from sdedit.cli.exits import OK
from sdedit.cli.terminal import print_json
from sdedit.errors import BackendUnavailable

HELP = "say what is installed, which backends work, and how to fix those that do not"
PACKAGES = (
    "numpy", "pillow", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "tensorrt-rtx",
    "cuda-bindings", "pycuda", "torch", "onnx",
)  # fmt: skip
OTHER_CACHES = {  # title -> kind of cache_folder
    "graph cache": "graphs", "what --fast found": "fastest", "engines of ort-tensorrt": "ort-tensorrt",
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    findings = examine()
    works = any(backend["works"] for backend in findings["backends"])
    if arguments.json:
        print_json(findings)
    else:
        show(findings)
    if not works:
        first = findings["backends"][0]
        raise BackendUnavailable(f"no backend works; {first['cause']}", hint=first["fix"])
    return OK


def show(findings: dict[str, Any]) -> None:
    about = f"Python {findings['python']}, {findings['platform']}, {findings['cores']} cores"
    print(f"sdedit-engine {findings['version']}, {about}")
    print("\npackages")
    for name, version in findings["packages"].items():
        print(f"  {name:<16}{version or 'not installed'}")
    print("\nbackends")
    for backend in findings["backends"]:
        print(f"  {backend['name']:<16}{'works' if backend['works'] else backend['cause']}")
        if not backend["works"]:
            print(f"  {'':<16}fix: {backend['fix']}")
    print(f"\nnoise\n  {findings['noise']}")
    print(f"\noperators of ort-cpu\n  {findings['operators']}")
    cuda, plans = findings["cuda"], findings["plan_cache"]
    print("\ncuda")
    if cuda["works"]:
        print(f"  {cuda['gpu']}, {cuda['target']}, driver {cuda['driver']}, called through {cuda['port']}")
    else:
        print(f"  {cuda['cause']}\n  fix: {cuda['fix']}")
    print("\nplan cache")
    print(f"  {plans['folder']}: {plans['plans']} plans, {plans['bytes'] / 1e6:.1f} MB")
    for title, kind in OTHER_CACHES.items():
        kept = findings[f"{kind}_cache"]
        holds = kept["cause"] or f"{kept['entries']} entries, {kept['bytes'] / 1e6:.1f} MB"
        print(f"\n{title}\n  {kept['folder']}: {holds}")
    for warning in findings["warnings"]:
        print(f"\nwarning: {warning}")


def examine() -> dict[str, Any]:
    """Everything doctor says, as JSON. A backend works when it has run the bundled model once."""
    import sdedit
    from sdedit.backends import BACKENDS
    from sdedit.capi.shipped import noise_maker
    from sdedit.cpu import usable_cores
    from sdedit.operators.shipped import vector_unit
    from sdedit.tensorrt import cache

    packages = {name: _version(name) for name in PACKAGES}
    plans = cache.status()
    return {
        "version": sdedit.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "cores": usable_cores(),
        "packages": packages,
        "noise": told(noise_maker),
        "operators": told(vector_unit),
        "cuda": try_cuda(),
        "backends": [try_backend(name) for name in BACKENDS],
        "plan_cache": {
            "folder": str(plans.folder), "plans": plans.plans, "bytes": plans.bytes, "damaged": list(plans.damaged),
        },
        **{f"{kind}_cache": cached(kind) for kind in OTHER_CACHES.values()},
        "warnings": [*misfits(packages), *(f"{damage}; it is built again when needed" for damage in plans.damaged)],
    }  # fmt: skip


def cached(kind: str) -> dict[str, Any]:
    """What one of the caches holds."""
    from sdedit.cache_folder import cache_folder

    folder = cache_folder(kind)
    sizes, entries, cause = [], [], None
    try:
        sizes = [file.stat().st_size for file in folder.rglob("*") if file.is_file()]
        entries = list(folder.glob("[!.]*"))
    except OSError as error:
        cause = error.strerror or str(error)
    return {"folder": str(folder), "entries": len(entries), "bytes": sum(sizes), "cause": cause}


def misfits(packages: Mapping[str, str | None]) -> list[str]:
    """Installed packages that do not go together, and what to do."""
    from sdedit.backends.ort_gpu import wanted_tensorrt

    found = []
    if packages["onnxruntime"] and packages["onnxruntime-gpu"]:
        found.append(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other; "
            "fix: pip uninstall both, then install the extra you want"
        )
    wanted, installed = wanted_tensorrt() if packages["onnxruntime-gpu"] else None, packages["tensorrt"]
    if wanted and installed and installed.partition(".")[0] != wanted:
        found.append(
            f"ort-tensorrt of onnxruntime-gpu {packages['onnxruntime-gpu']} needs TensorRT {wanted}, installed is "
            f"{installed}; fix: pip install 'tensorrt=={wanted}.*', or use --backend tensorrt, which takes both"
        )
    return found


def told(ask: Callable[[], str]) -> str:
    """What it says, or why it does not: a variable is wrong."""
    from sdedit.errors import SdeditError

    try:
        return ask()
    except SdeditError as error:
        return f"{error}; fix: {error.hint}"


def try_cuda() -> dict[str, Any]:
    """Open the CUDA driver the way a GPU backend does."""
    from sdedit.cuda.driver import open_driver
    from sdedit.errors import SdeditError

    try:
        driver = open_driver()
    except SdeditError as error:
        return {"works": False, "cause": str(error), "fix": error.hint}
    gpu = driver.gpu
    return {"works": True, "gpu": gpu.name, "target": gpu.target, "driver": gpu.driver, "port": driver.name}


def try_backend(name: str) -> dict[str, Any]:
    """Load the bundled model on one backend and make one small edit."""
    import numpy as np

    import sdedit

    try:
        with sdedit.load(backend=name) as editor:
            editor.edit(np.full((64, 64, 3), 128, np.uint8), steps=1)
    except sdedit.SdeditError as error:
        return {"name": name, "works": False, "cause": str(error), "fix": error.hint}
    return {"name": name, "works": True, "cause": None, "fix": None}


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None
