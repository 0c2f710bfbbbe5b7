"""The books of a folder job: which files are left, what was done of them, and what the caller is told."""

import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from sdedit import manifest
from sdedit.artifact import Artifact
from sdedit.errors import OutputError, SdeditError
from sdedit.listing import GuideFile
from sdedit.options import EditOptions
from sdedit.places import Place

Item = TypeVar("Item")
Value = TypeVar("Value")


@dataclass(frozen=True)
class FolderProgress:
    """What `on_file` is told: at the start, and after every file."""

    done: int  # files that are finished, of `total`, those of earlier runs among them
    total: int
    path: str | None = None  # of the file just finished, below the folder
    error: SdeditError | None = None  # why it failed


@dataclass(frozen=True)
class FolderResult:
    """What `edit_folder` did."""

    options: EditOptions
    manifest: Path | str  # a URL where the results are at one
    edited: int  # files now
    kept: int  # files that an earlier run had finished
    failed: dict[str, SdeditError]  # path below the folder -> why
    total_ms: float


OnFile = Callable[[FolderProgress], None]


class Ledger:
    """One job's manifest and progress. For one thread at a time. running: backend and precision."""

    def __init__(
        self, place: Place, options: EditOptions, artifact: Artifact, running: tuple[str, str],
        on_file: OnFile | None, *, masked: bool,
    ) -> None:  # fmt: skip
        self.same: manifest.Entry = {  # in every line, and the same for all files
            "options": json.loads(json.dumps(asdict(options))),
            "masked": masked,
            "artifact_sha256": artifact.sha256,
            "backend": running[0],
            "precision": running[1],
        }
        self._began, self._options = time.perf_counter(), options
        self._place, self._on_file = place, on_file
        self._finished: list[manifest.Entry] = []  # by earlier runs
        self._failed: dict[str, SdeditError] = {}
        self._kept = self._done = self._total = 0

    def left(self, files: Sequence[GuideFile], pool: ThreadPoolExecutor, ahead: int, *, force: bool) -> list[GuideFile]:
        """The files that are left to do, before `begin`. Raises OutputError."""
        entries = None if force else self._place.entries()
        done = {path: entry for path, entry in (entries or {}).items() if entry["status"] == manifest.DONE}
        for entry in done.values():
            self._require_same(entry)
        rest = []
        for file, kept in in_order(pool, lambda one: self._is_done(one, done.get(one.path)), files, ahead):
            if kept:
                continue
            rest.append(file)
            known = done.pop(file.path, None) is not None
            if not (force or known) and (taken := self._place.taken(file, begun=entries is not None)):
                raise OutputError(f"{taken}: exists already", hint="choose another folder, or --force")
        self._finished = list(done.values())
        self._total, self._kept = len(files), len(files) - len(rest)
        self._done = self._kept
        return rest

    def begin(self) -> None:
        """Write the manifest, of exactly the files that are not left to do. Raises OutputError."""
        self._place.replace(self._finished)
        self._tell(None, None)

    def note(self, entries: Sequence[manifest.Entry]) -> None:
        """Write what was done to the disk. From any one thread at a time. Raises OutputError."""
        self._place.append(entries)

    def count(self, path: str, error: SdeditError | None = None) -> None:
        """One more file is finished, and noted."""
        if error is not None:
            self._failed[path] = error
        self._done += 1
        self._tell(path, error)

    def result(self) -> FolderResult:
        """What was done so far."""
        edited = self._done - self._kept - len(self._failed)
        total_ms = 1e3 * (time.perf_counter() - self._began)
        return FolderResult(self._options, self._place.manifest, edited, self._kept, self._failed, total_ms)

    def _tell(self, path: str | None, error: SdeditError | None) -> None:
        if self._on_file is not None:
            self._on_file(FolderProgress(self._done, self._total, path, error))

    def _is_done(self, file: GuideFile, entry: manifest.Entry | None) -> bool:
        """Whether the manifest's entry still holds: the same guide and mask, and the output as it was written."""
        if entry is None or entry.get("seed") != file.seed or entry["output"] != file.output:
            return False
        return self._place.holds(file, entry)

    def _require_same(self, entry: manifest.Entry) -> None:
        for name, wanted in self.same.items():
            found = entry.get(name)
            if found == wanted:
                continue
            if isinstance(found, dict) and isinstance(wanted, dict):
                name = next(key for key in (*wanted, *found) if found.get(key) != wanted.get(key))
                found, wanted = found.get(name), wanted.get(name)
            raise OutputError(
                f"{self._place.manifest}: was begun with {name} {found}; now it is {wanted}",
                hint="the same options finish it; choose another folder, or --force to start over",
            )


def in_order(
    pool: ThreadPoolExecutor, function: Callable[[Item], Value], items: Iterable[Item], ahead: int
) -> Iterator[tuple[Item, Value]]:
    """Each item with its value, in order, computed in the pool; at most `ahead` of them before they are taken."""
    waiting: deque[tuple[Item, Future[Value]]] = deque()
    for item in items:
        waiting.append((item, pool.submit(function, item)))
        if len(waiting) == ahead:
            first, value = waiting.popleft()
            yield first, value.result()
    while waiting:
        first, value = waiting.popleft()
        yield first, value.result()
