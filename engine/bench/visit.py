"""One visit to one case: python -m sdedit.bench.visit, the request on stdin, the answer on stdout, both JSON.

In a process of its own, so that what is loaded, allocated and warm there is this case's and nothing else's.
"""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdedit.bench.cases import Case
from sdedit.bench.effort import Visit
from sdedit.errors import SdeditError

if TYPE_CHECKING:
    from sdedit.editor import Editor
    from sdedit.results import Timings


def open_case(case: Case) -> "Editor":
    """The case's model on its backend. Raises SdeditError."""
    import sdedit

    return sdedit.load(case.model, backend=case.backend, precision=case.precision, fast=case.fast, threads=case.threads)


def edit(editor: "Editor", case: Case, **changed: Any) -> "Timings":
    """One edit that fills the batch, of a picture of the model's own size: what it shows costs a network nothing."""
    import numpy as np

    artifact = editor.artifact
    guide = np.random.default_rng(0).integers(0, 256, (artifact.height, artifact.width, 3), np.uint8)
    return editor.edit(guide, samples=case.batch, **case.edit_options() | changed).timings


def examine(case: Case) -> dict[str, Any]:
    """What runs the case, for its row, and the case that runs it again, whatever is fastest by then.

    One step is run: what is wrong shows, and what is built once is built.
    """
    from sdedit import record
    from sdedit.capi.shipped import noise_maker
    from sdedit.options import make_options

    editor = open_case(case)
    options = make_options(case.edit_options()).resolved(editor.artifact.defaults)
    tried = edit(editor, case, steps=1)
    backend = editor.backend
    pinned = replace(
        case, model=str(editor.artifact.path), backend=backend.name, precision=backend.precision, fast=False
    )
    facts = {
        "model": editor.artifact.name,
        "file": (pinned if case.fast else case).model or "the bundled model",
        **{name: getattr(backend, name) for name in ("precision", "threads", "provider")},
        "backend": backend.name,
        **{name: getattr(options, name) for name in ("batch", "steps", "sampler", "t0", "spacing", "eta", "repeats")},
        "conditions": options.conditions,
        "gpu": gpu_name(editor),
        "noise": noise_maker() if tried.device_ms is None else None,
        "versions": record.versions(editor),
        "model_sha256": editor.artifact.sha256,
    }
    return {"facts": facts, "case": asdict(pinned if case.fast else case)}


def measure(case: Case, visit: Visit) -> dict[str, Any]:
    """Load, edit, warm up, then time."""
    began = time.perf_counter()
    editor = open_case(case)
    load_ms = 1e3 * (time.perf_counter() - began)
    first = edit(editor, case)
    for _ in range(visit.warmup):
        edit(editor, case)
    timed: list[Timings] = []
    began = time.perf_counter()
    while len(timed) < visit.runs or time.perf_counter() - began < visit.seconds:
        timed.append(edit(editor, case))
    return {
        "load_ms": load_ms,
        "first_edit_ms": first.total_ms,
        "edits": [asdict(timings) for timings in timed],
        "peak_bytes": peak_bytes(),
        "device_bytes": device_bytes() if gpu_name(editor) else None,
        "graph": graph(editor, case),
    }


def gpu_name(editor: "Editor") -> str | None:
    """The GPU's name; None for a backend that runs on the CPU."""
    gpu = editor.backend.on_gpu()
    return None if gpu is None else gpu.driver.gpu.name


def graph(editor: "Editor", case: Case) -> str | None:
    """How the case's edits were launched, by the loop that ran them. See DeviceLoop.graph."""
    gpu = editor.backend.on_gpu()
    if gpu is None:
        return None
    with gpu.driver.current(), gpu.device_loop(case.batch, dict(case.conditions)) as loop:
        return loop.graph


def peak_bytes() -> int | None:
    """The most memory that this process has held.

    Not from getrusage on Linux: there the peak of the process that started this one counts too.
    """
    status = Path("/proc/self/status")
    if status.exists() and (found := re.search(r"^VmHWM:\s+(\d+) kB$", status.read_text("ascii"), re.MULTILINE)):
        return 1024 * int(found[1])
    with suppress(ImportError):  # Windows has no such module
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return None


def device_bytes() -> int | None:
    """GPU memory of this process now, which it keeps until it ends; None where the driver does not say."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    lines = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    mine = [mib for pid, _, mib in (line.partition(",") for line in lines) if pid.strip() == str(os.getpid())]
    return 2**20 * sum(map(int, mine)) if mine and all(mib.strip().isdigit() for mib in mine) else None


def main() -> None:
    """Answer the request on stdin. An SdeditError is an answer too; anything else ends the process."""
    request = json.load(sys.stdin)
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries may print
    log = logging.getLogger("sdedit")
    log.addHandler(logging.StreamHandler())
    log.setLevel(logging.INFO)  # a plan that is built takes minutes: it is said
    case = Case.from_json(request["case"])
    try:
        found = examine(case) if request["visit"] is None else measure(case, Visit(**request["visit"]))
    except SdeditError as error:
        found = {"error": type(error).__name__, "message": str(error), "hint": error.hint}
    with answer:
        json.dump(found, answer)


if __name__ == "__main__":
    main()
