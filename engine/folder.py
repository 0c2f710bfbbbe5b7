"""A folder of pictures: edited in full batches, noted in a manifest, finished where an earlier run was cut off."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from sdedit import manifest
from sdedit.checks import whole
from sdedit.cpu import usable_cores
from sdedit.editor import Editor
from sdedit.errors import OptionError, SdeditError
from sdedit.file_edits import FileEdits, RunBatch
from sdedit.jobs import Job
from sdedit.ledger import FolderProgress, FolderResult, Ledger, in_order
from sdedit.listing import GuideFile, guide_files
from sdedit.options import EditOptions, make_options
from sdedit.places import LocalPlace

MOST_WORKERS = 256


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
    network runs. options: the fields of EditOptions but `samples`; batches are filled across files, and hold
    `editor.backend.usual_batch` pictures where `batch` is not given. What is done is noted in
    output_folder/manifest.jsonl; called again after an interruption, with the same options, it does the rest; force
    starts over. A file that cannot be edited is noted and left out. Raises OptionError, ImageError (the folder of
    guides), OutputError (the output folder, or it was begun with other options), DeviceError.
    """
    chosen = folder_options(options, editor.backend.usual_batch, editor.artifact.defaults)
    if workers is None:
        workers = min(usable_cores(), 4)
    workers = whole("workers", workers, 1, MOST_WORKERS, hint="leave it out for one a core, four at most")
    place = LocalPlace(Path(guides), None if masks is None else Path(masks), Path(output_folder))
    running = editor.backend.name, editor.backend.precision
    ledger = Ledger(place, chosen, editor.artifact, running, on_file, masked=masks is not None)
    files = guide_files(place.guides, place.pictures(), chosen.seed)
    ahead = chosen.batch + workers
    with (
        editor.batches(chosen) as run_batch,
        place.claimed(),
        ThreadPoolExecutor(workers) as pool,
        ThreadPoolExecutor(1) as clerk,
    ):
        rest = ledger.left(files, pool, ahead, force=force)
        ledger.begin()
        edits = FileEdits(editor, chosen, place, ledger.same)
        run_files(rest, chosen.batch, ahead, edits, run_batch, ledger, pool, clerk)
    return ledger.result()


def folder_options(given: Mapping[str, Any], usual_batch: int, defaults: Mapping[str, Any]) -> EditOptions:
    """The options of a folder job, resolved. Raises OptionError."""
    chosen = make_options({"batch": usual_batch, **given}).resolved(defaults)
    if chosen.region != "full":
        raise OptionError("a folder's pictures are edited as whole frames", hint="leave region out")
    if chosen.samples != 1:
        raise OptionError("a folder has one result a guide", hint="leave samples out, or take another seed and folder")
    return chosen


class Books(Protocol):
    """Who is told what came of files."""

    def note(self, entries: Sequence[manifest.Entry]) -> None:
        """Keep these lines of the manifest. From any one thread at a time."""
        ...

    def count(self, path: str, error: SdeditError | None = None) -> None:
        """One more file is finished, and noted."""
        ...


def run_files(
    files: Sequence[GuideFile],
    batch: int,
    ahead: int,
    edits: FileEdits,
    run_batch: RunBatch,
    books: Books,
    pool: ThreadPoolExecutor,
    clerk: ThreadPoolExecutor,
) -> None:
    """Edit the files; the network waits for neither disk. Pictures are held of two batches on the way out, one in the
    network, and `ahead` on the way in, however many files there are.
    """
    writing: deque[tuple[Future[None], list[tuple[str, SdeditError | None]]]] = deque()
    group: list[tuple[GuideFile, Job]] = []

    def note(entries: Sequence[Future[manifest.Entry]]) -> None:
        books.note([entry.result() for entry in entries])

    def submit(entries: list[Future[manifest.Entry]], files: list[tuple[str, SdeditError | None]]) -> None:
        writing.append((clerk.submit(note, entries), files))
        if len(writing) > 1:
            settle()

    def settle() -> None:
        noted, files = writing.popleft()
        noted.result()
        for path, error in files:
            books.count(path, error)

    def edit_group() -> None:
        entries: list[Future[manifest.Entry]] = []
        finished: list[tuple[str, SdeditError | None]] = []
        for file, result in edits.edit(group, run_batch):
            if isinstance(result, SdeditError):
                entries.append(pool.submit(edits.failed, file, result))
                finished.append((file.path, result))
            else:
                entries.append(pool.submit(edits.write, file, result))
                finished.append((file.path, None))
        group.clear()
        submit(entries, finished)

    for file, job in in_order(pool, edits.prepare, files, ahead):
        if isinstance(job, SdeditError):
            submit([pool.submit(edits.failed, file, job)], [(file.path, job)])
            continue
        group.append((file, job))
        if len(group) == batch:
            edit_group()
    if group:
        edit_group()
    while writing:
        settle()
