"""Which CPU this is (what is kept for a machine's CPU is kept under this), and how much of it this process may use."""

import math
import os
import platform
from collections.abc import Iterator
from itertools import product
from pathlib import Path, PurePosixPath

SIBLINGS = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"  # hardware threads of the same core
GROUPS = "/proc/self/cgroup"
GROUP_FOLDERS = "/sys/fs/cgroup"


def identity() -> list[str]:
    """Maker, model and features of the CPU; what little Python knows where the system has no file of it."""
    first = _read("/proc/cpuinfo").partition("\n\n")[0]  # all cores are alike
    if not first:
        return [platform.processor()]
    told = ("vendor_id", "cpu family", "model", "model name", "flags", "CPU implementer", "CPU part", "Features")
    return [line for line in first.splitlines() if line.partition(":")[0].strip() in told]


def usable_cores() -> int:
    """How many threads of computing are best: one a core that this process may use.

    A cpuset or taskset may have made them fewer than the machine's. On Linux, hardware threads that share a core count
    once, and a container's CPU quota counts, to the nearest core: more threads would wait for each other.
    """
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    cores = {_read(SIBLINGS.format(cpu)) or f"{cpu}" for cpu in os.sched_getaffinity(0)}
    return max(1, min([len(cores), *(math.floor(quota + 0.5) for quota in _quotas())]))


def _quotas() -> Iterator[float]:
    """CPUs' worth of time that each control group of this process, and those around it, may take."""
    for line in _read(GROUPS).split("\n"):
        match line.split(":", 2):
            case [_, "", path]:  # version 2, quota and period in one
                roots, names = [""], ["cpu.max"]
            case [_, controllers, path] if "cpu" in controllers.split(","):
                roots, names = [controllers, "cpu"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
            case _:
                continue
        inside = PurePosixPath(path.lstrip("/"))
        for root, group in product(roots, (inside, *inside.parents)):
            match _read(*(Path(GROUP_FOLDERS, root, group, name) for name in names)).split():
                case [quota, period] if quota.isdecimal() and period.isdecimal() and int(period):  # not "max", not -1
                    yield int(quota) / int(period)


def _read(*files: str | Path) -> str:
    """The beginning of small files of the system, one after the other; empty where there is none."""
    text = ""
    for name in files:
        try:
            with open(name, encoding="utf-8", errors="replace") as file:
                text += file.read(16384)
        except (OSError, ValueError):  # a name that none can have
            return ""
    return text
