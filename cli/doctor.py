"""`sdedit doctor`: what is installed, which backends work, and what would make the others work."""

import argparse
import platform
from typing import Any

from sdedit.cli.arguments import add_json
from sdedit.cli.exits import OK
from sdedit.cli.terminal import print_json
from sdedit.errors import BackendUnavailable

HELP = "say what is installed, which backends work, and how to fix those that do not"
PACKAGES = ("numpy", "pillow", "onnxruntime", "onnxruntime-gpu", "torch", "onnx")


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
    for warning in findings["warnings"]:
        print(f"\nwarning: {warning}")


def examine() -> dict[str, Any]:
    """Everything doctor says, as JSON. A backend works when it has run the bundled model once."""
    import sdedit
    from sdedit.backends import BACKENDS
    from sdedit.backends.ort import usable_cores

    packages = {name: _version(name) for name in PACKAGES}
    warnings = []
    if packages["onnxruntime"] and packages["onnxruntime-gpu"]:
        warnings.append(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other; "
            "fix: pip uninstall both, then install the extra you want"
        )
    return {
        "version": sdedit.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "cores": usable_cores(),
        "packages": packages,
        "backends": [try_backend(name) for name in BACKENDS],
        "warnings": warnings,
    }


def try_backend(name: str) -> dict[str, Any]:
    """Load the bundled model on one backend and make one small edit."""
    import numpy as np

    import sdedit

    try:
        sdedit.load(backend=name).edit(np.full((64, 64, 3), 128, np.uint8), steps=1)
    except sdedit.SdeditError as error:
        return {"name": name, "works": False, "cause": str(error), "fix": error.hint}
    return {"name": name, "works": True, "cause": None, "fix": None}


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None
