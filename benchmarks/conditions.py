"""What every result says of where it was measured, in the same words."""

import os
import platform
import subprocess
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import sdedit

EXTENSIONS = (  # that decide which kernels run
    *("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_bf16", "amx_int8"),
)


def conditions(*packages: str, editor: sdedit.Editor | None = None) -> dict[str, Any]:
    """Of this machine and of those packages that are here; with an editor, also what it runs on. To be asked before
    anything is measured: the load average is the last minute's.
    """
    about = {
        "cpu": cpu(),
        "cores": cores(),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "versions": {"sdedit-engine": sdedit.__version__, **versions("numpy", *packages)},
        "commit": commit(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if editor is not None:
        backend = editor.backend
        about["versions"] |= backend.versions
        about |= {"model": editor.artifact.name, "backend": backend.name, "precision": backend.precision}
        about["threads"] = backend.threads
    return about


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu() -> str:
    """Its name, family and model (virtual machines have no more telling name), and extensions."""
    told: dict[str, str] = {}
    with suppress(OSError):
        first = Path("/proc/cpuinfo").read_text("utf-8").partition("\n\n")[0]
        told = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}
    if "model name" not in told:
        return platform.processor() or platform.machine()
    family = [f"{told['cpu family']}/{told['model']}"] if "cpu family" in told else []
    flags = told.get("flags", "").split()
    return " ".join([told["model name"], *family, *(one for one in EXTENSIONS if one in flags)])


def versions(*packages: str) -> dict[str, str]:
    found = {}
    for package in packages:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=12", "--dirty", "--exclude=*"]
    with suppress(OSError):  # there is no git
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    return None
