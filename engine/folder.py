"""A folder of pictures: edited in full batches, noted in a manifest, finished where an earlier run was cut off."""

import hashlib
import io
import json
import os
import shutil
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from sdedit import manifest, output, record
from sdedit.backends.ort import usable_cores
from sdedit.checks import whole
from sdedit.editor import Editor, Job, Result
from sdedit.errors import ImageError, NetworkError, OptionError, OutputError, ReplayError, SdeditError
from sdedit.image import checked_fit
from sdedit.listing import GuideFile, find_guides
from sdedit.options import EditOptions, make_options

MOST_WORKERS = 256
SCRATCH = ".sdedit-batch"  # inside the output folder while a job runs

Item = TypeVar("Item")
Value = TypeVar("Value")
RunBatch = Callable[[Sequence[Job]], list[Result]]


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
    manifest: Path
    edited: int  # files now
    kept: int  # files that an earlier run had finished
    failed: dict[str, SdeditError]  # path below the folder -> why
    total_ms: float


def edit_folder(
    editor: Editor,
    guides: str | Path,
    output_folder: str | Path,
    *,
    masks: str | Path | None = None,
    workers: int | None = None,
    force: bool = False,
    on_file: Callable[[FolderProgress], None] | None = None,
    **options: Any,
) -> FolderResult:
    """Edit every picture below the folder `guides` into PNGs of the same names below `output_folder`.

    The seed of a file is (seed + the first 8 bytes, little-endian, of SHA-256(its relative path)) mod 2^64. The mask
    of a/b.jpg is a/b.png, or else a/b.jpg, below `masks`. workers: threads that read and write pictures while the
    network runs. options: the fields of EditOptions but `samples`; batches are filled across files. What is done is
    noted in output_folder/manifest.jsonl; called again after an interruption, with the same options, it does the rest;
    force starts over. A file that cannot be edited is noted and left out. Raises OptionError, ImageError (the folder
    of guides), OutputError (the output folder, or it was begun with other options), DeviceError.
    """
    began = time.perf_counter()
    chosen = make_options(options).resolved(editor.artifact.defaults)
    if chosen.samples != 1:
        raise OptionError("a folder has one result a guide", hint="leave samples out, or take another seed and folder")
    checked_fit(chosen.fit)  # once, not for every file
    if workers is None:
        workers = min(usable_cores(), 4)
    workers = whole("workers", workers, 1, MOST_WORKERS, hint="leave it out for one a core, four at most")
    source, target = Path(guides), Path(output_folder)
    files = find_guides(source, target, None if masks is None else Path(masks), chosen.seed)
    with editor.batches(chosen) as run_batch, _scratch(target) as scratch, ThreadPoolExecutor(workers) as pool:
        job = _FolderJob(editor, chosen, target, scratch, pool, workers, masked=masks is not None)
        rest = job.resume(files, force)
        return job.run(rest, len(files), run_batch, on_file, began)


class _FolderJob:
    """The files of one call: which are left, and the way of each from the disk through the network to the disk."""

    def __init__(
        self,
        editor: Editor,
        options: EditOptions,
        target: Path,
        scratch: Path,
        pool: ThreadPoolExecutor,
        workers: int,
        *,
        masked: bool,
    ) -> None:
        self._editor, self._options, self._scratch, self._pool = editor, options, scratch, pool
        self._ahead = options.batch + workers
        self._manifest = target / manifest.NAME
        self._same = {  # in every line, and the same for all files
            "options": json.loads(json.dumps(asdict(options))),
            "masked": masked,
            "artifact_sha256": editor.artifact.sha256,
            "backend": editor.backend.name,
        }

    def resume(self, files: Sequence[GuideFile], force: bool) -> list[GuideFile]:
        """The files that are left to do; the manifest then lists exactly the others. Raises OutputError."""
        begun = os.path.lexists(self._manifest)
        entries = {} if force else manifest.read(self._manifest)
        done = {path: entry for path, entry in entries.items() if entry["status"] == manifest.DONE}
        for entry in done.values():
            self._require_same(entry)
        rest = []
        for file, kept in _in_order(self._pool, lambda one: _is_done(one, done.get(one.path)), files, self._ahead):
            if kept:
                continue
            rest.append(file)
            known = done.pop(file.path, None) is not None
            if os.path.lexists(file.target) and not (force or known or (begun and _carries_a_record(file.target))):
                raise OutputError(f"{file.target}: exists already", hint="choose another folder, or --force")
        with _writing(self._manifest):
            manifest.write(self._manifest, done.values())
        return rest

    def _require_same(self, entry: manifest.Entry) -> None:
        for name, wanted in self._same.items():
            found = entry.get(name)
            if found == wanted:
                continue
            if isinstance(found, dict) and isinstance(wanted, dict):
                name = next(key for key in (*wanted, *found) if found.get(key) != wanted.get(key))
                found, wanted = found.get(name), wanted.get(name)
            raise OutputError(
                f"{self._manifest}: was begun with {name} {found}; now it is {wanted}",
                hint="the same options finish it; choose another folder, or --force to start over",
            )

    def run(
        self,
        files: Sequence[GuideFile],
        total: int,
        run_batch: RunBatch,
        on_file: Callable[[FolderProgress], None] | None,
        began: float,
    ) -> FolderResult:
        """Edit the files. Pictures are held of two batches on the way out, one in the network, and `ahead` on the way
        in, however many files there are.
        """
        kept = done = total - len(files)
        failed: dict[str, SdeditError] = {}
        writing: deque[list[tuple[GuideFile, Future[manifest.Entry]]]] = deque()
        group: list[tuple[GuideFile, Job]] = []

        def tell(path: str | None, error: SdeditError | None = None) -> None:
            if on_file is not None:
                on_file(FolderProgress(done, total, path, error))

        def fail(file: GuideFile, error: SdeditError) -> None:
            nonlocal done
            failed[file.path] = error
            note = {"error": str(error), "hint": error.hint}
            self._note([self._entry(file, manifest.FAILED) | note])
            done += 1
            tell(file.path, error)

        def settle() -> None:
            nonlocal done
            written = writing.popleft()
            self._note([entry.result() for _, entry in written])
            for file, _ in written:
                done += 1
                tell(file.path)

        def edit_group() -> None:
            made = []
            for file, result in self._edit(group, run_batch):
                if isinstance(result, SdeditError):
                    fail(file, result)
                else:
                    made.append((file, self._pool.submit(self._write, file, result)))
            group.clear()
            writing.append(made)
            if len(writing) > 1:
                settle()

        tell(None)
        for file, job in _in_order(self._pool, self._prepare, files, self._ahead):
            if isinstance(job, SdeditError):
                fail(file, job)
                continue
            group.append((file, job))
            if len(group) == self._options.batch:
                edit_group()
        if group:
            edit_group()
        while writing:
            settle()
        edited, total_ms = total - kept - len(failed), 1e3 * (time.perf_counter() - began)
        return FolderResult(self._options, self._manifest, edited, kept, failed, total_ms)

    def _prepare(self, file: GuideFile) -> Job | SdeditError:
        try:
            return self._editor.prepare(file.guide, self._options, seed=file.seed, mask=file.mask())
        except ImageError as error:
            return error

    def _edit(
        self, group: Sequence[tuple[GuideFile, Job]], run_batch: RunBatch
    ) -> Iterator[tuple[GuideFile, Result | SdeditError]]:
        """The results of a batch; each file by itself where the network cannot do them together."""
        try:
            results = run_batch([job for _, job in group])
        except NetworkError as error:
            if len(group) == 1:
                yield group[0][0], error
                return
            for one in group:
                yield from self._edit([one], run_batch)
        else:
            yield from zip((file for file, _ in group), results, strict=True)

    def _write(self, file: GuideFile, result: Result) -> manifest.Entry:
        """Write a result whole, under its name, and say what to note of it. Raises OutputError."""
        encoded = io.BytesIO()
        output.png(result.pixels, record.describe(self._editor, self._options, result))(encoded)
        scratch = self._scratch / f"{threading.get_ident()}.png"
        with _writing(file.target):
            file.target.parent.mkdir(parents=True, exist_ok=True)
            scratch.write_bytes(encoded.getbuffer())
            os.replace(scratch, file.target)
        return self._entry(file, manifest.DONE) | {
            "guide_sha256": result.guide.sha256,
            "mask_sha256": None if result.mask is None else result.mask.sha256,
            "output_sha256": hashlib.sha256(encoded.getbuffer()).hexdigest(),
        }

    def _entry(self, file: GuideFile, status: str) -> manifest.Entry:
        return {"path": file.path, "output": file.output, "status": status, "seed": file.seed, **self._same}

    def _note(self, entries: Sequence[manifest.Entry]) -> None:
        with _writing(self._manifest):
            manifest.append(self._manifest, entries)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """What the system refuses inside is an OutputError about `path`."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written: {output.reason(error)}", hint="check the disk and the permissions"
        ) from error


@contextmanager
def _scratch(target: Path) -> Iterator[Path]:
    """A folder for files that are not whole yet, on the disk of `target`. One job at a time has it."""
    scratch = target / SCRATCH
    with _writing(scratch):
        scratch.mkdir(exist_ok=True)
        lock = os.open(scratch, os.O_RDONLY) if sys.platform != "win32" else None
    try:
        if sys.platform != "win32" and lock is not None:
            import fcntl

            try:  # given up by the system when the process dies
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise OutputError(
                    f"{target}: another job is writing to it", hint="wait for it, or choose another folder"
                ) from None
            except OSError:  # a file system without locks
                pass
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    finally:
        if lock is not None:
            os.close(lock)


def _in_order(
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


def _is_done(file: GuideFile, entry: manifest.Entry | None) -> bool:
    """Whether the manifest's entry still holds: the same guide and mask, and the output as it was written."""
    if entry is None or entry.get("seed") != file.seed or entry["output"] != file.output:
        return False
    try:
        wanted = (entry.get("output_sha256"), entry.get("guide_sha256"), entry.get("mask_sha256"))
        return wanted == tuple(map(_sha256, (file.target, file.guide, file.mask())))
    except (OSError, ImageError):
        return False


def _sha256(path: Path | None) -> str | None:
    if path is None:
        return None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _carries_a_record(path: Path) -> bool:
    """Whether it is a picture of ours: written, and then cut off before it was noted."""
    try:
        record.read_json(path)
    except ReplayError:
        return False
    return True
