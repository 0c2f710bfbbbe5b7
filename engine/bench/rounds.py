"""The order of a benchmark: everything is examined first, then every round visits every case once."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sdedit import errors
from sdedit.bench import machine
from sdedit.bench.cases import Case
from sdedit.bench.effort import Effort, Visit
from sdedit.bench.rows import Row, make_row
from sdedit.errors import SdeditError


class Bench:
    """Cases, measured in interleaved rounds, so that what drifts on this machine drifts for all of them."""

    def __init__(self, cases: Sequence[Case], effort: Effort) -> None:
        """Raises OptionError and ArtifactError for what cannot work, before any process is started."""
        for case in cases:
            _check(case)
        self._cases, self._effort = list(cases), effort
        self._conditions = machine.conditions() | {"warmup": effort.warmup}
        self._facts: list[dict[str, Any]] = []
        self._found: list[list[dict[str, Any]]] = [[] for _ in self._cases]

    @property
    def total(self) -> int:
        """How many visits there are, those that only examine included."""
        return len(self._cases) * (1 + len(self._effort.visits))

    def visits(self) -> Iterator[int]:
        """Examine and measure; yields how many visits are done, after each. Raises SdeditError of the first that fails.

        Every second round goes backwards: a steady drift then cancels out. Called again, it begins again.
        """
        self._facts, self._found = [], [[] for _ in self._cases]
        for index, case in enumerate(self._cases):
            found = _run(case, None)
            self._facts.append(found["facts"])
            self._cases[index] = Case.from_json(found["case"])
            yield len(self._facts)
        done = len(self._cases)
        for number, visit in enumerate(self._effort.visits):
            order = range(len(self._cases))
            for index in order if number % 2 == 0 else reversed(order):
                self._found[index].append(_run(self._cases[index], visit))
                done += 1
                yield done

    def rows(self) -> list[Row]:
        """What has been measured so far, in the order of the cases."""
        measured = zip(self._facts, self._found, strict=False)  # interrupted early, there are fewer facts
        return [make_row(facts, found, self._conditions) for facts, found in measured if found]


def _check(case: Case) -> None:
    """Raise OptionError or ArtifactError for what can be seen to be wrong without running the model."""
    from sdedit import artifact as artifacts
    from sdedit.backends import BACKENDS, probe
    from sdedit.options import make_options
    from sdedit.tensorrt import plan as plans

    path = artifacts.BUNDLED if case.model is None else Path(case.model)
    artifact = plans.read(path).artifact if path.suffix == ".plan" else artifacts.read(path)
    make_options(case.edit_options()).resolved(artifact.defaults)
    if case.backend not in ("auto", *BACKENDS):
        probe(case.backend)  # which knows no such name, and says so


def _run(case: Case, visit: Visit | None) -> dict[str, Any]:
    """The answer of a new process. It leaves Ctrl-C to this one, which ends it."""
    asked = {"case": asdict(case), "visit": None if visit is None else asdict(visit)}
    request = json.dumps(asked, default=lambda number: number.item())  # of NumPy
    command = [sys.executable, "-P", "-m", "sdedit.bench.visit"]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8", start_new_session=True
    )
    try:
        answer, _ = process.communicate(request)
    finally:
        process.kill()
        process.wait()
    if process.returncode != 0:
        raise SdeditError(
            f"{case.label}: its process {_end(process.returncode)}", hint=_HINTS.get(process.returncode, _LOOK)
        )
    found: dict[str, Any] = json.loads(answer)
    if "error" in found:
        kind: type[SdeditError] = getattr(errors, found["error"])
        raise kind(f"{case.label}: {found['message']}", hint=found["hint"])
    return found


_LOOK = "what it wrote is above; try the same with 'sdedit edit'"
_HINTS = {-getattr(signal, "SIGKILL", 9): "the system may have run out of memory: try a smaller --batch"}


def _end(code: int) -> str:
    return f"failed with exit code {code}" if code > 0 else f"was ended by {signal.Signals(-code).name}"
