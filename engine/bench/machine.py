"""The conditions that all rows of a benchmark share."""

import os
import platform
import subprocess
import sys
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sdedit
from sdedit.cpu import usable_cores


def conditions() -> dict[str, Any]:
    """What a time depends on beside the case, as Row names it. load_average: of the last minute, before measuring."""
    return {
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "commit": commit(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def cpu_name() -> str:
    """The CPU's name as its maker has it, as far as this system tells."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    if sys.platform == "darwin":
        told = _output("sysctl", "-n", "machdep.cpu.brand_string")
        if told:
            return told
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit this code was checked out from, "+" behind it if files differ; None if it was not."""
    folder = str(Path(sdedit.__file__).parent)
    if _output("git", "-C", folder, "ls-files", "__init__.py") is None:  # in no checkout, or not one of this code
        return None
    head = _output("git", "-C", folder, "rev-parse", "--short=12", "HEAD")
    changed = _output("git", "-C", folder, "status", "--porcelain", "--untracked-files=no")
    return None if head is None else head + ("+" if changed else "")


def _output(*command: str) -> str | None:
    """What a program prints; None if it is not there, fails or prints nothing."""
    with suppress(OSError):
        done = subprocess.run(command, capture_output=True, text=True)
        return done.stdout.strip() or None if done.returncode == 0 else None
    return None
