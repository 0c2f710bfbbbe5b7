"""The folder job on Ray Data: actors hold editors and edit chunks of files; the driver finds them and keeps the books.

Guides and results lie where every machine of the cluster sees them, under one path or at a URL; the model under one
path. A worker that dies loses nothing: Ray starts its actor again and gives it the chunk anew, whose files come out as
the same bytes.
"""

import json
import logging
import os
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdedit import artifact as artifacts
from sdedit import errors, folder, manifest, output
from sdedit.backends import USUAL_BATCH
from sdedit.backends.ort import MOST_THREADS
from sdedit.checks import whole
from sdedit.cpu import usable_cores
from sdedit.editor import load, open_model
from sdedit.errors import ArtifactError, BackendUnavailable, DeviceError, ImageError, OptionError, SdeditError
from sdedit.file_edits import FileEdits
from sdedit.ledger import FolderProgress, FolderResult, Ledger
from sdedit.listing import GuideFile, guide_file, guide_files
from sdedit.options import EditOptions
from sdedit.places import Place
from sdedit.remote_place import place_of

BATCHES_A_CHUNK = 8  # what a worker that dies has to do again, and how often the manifest is written
ON_A_GPU = ("tensorrt", "tensorrt-rtx", "ort-cuda", "ort-tensorrt")
CLUSTER_HINT = "'ray status' shows a running cluster; --ray local starts one for this job"
WORKER_THREADS = 2  # of each worker, that read and write pictures


@dataclass(frozen=True)
class Order:
    """What every worker is told, once."""

    model: Path
    artifact_sha256: str
    backend: str
    precision: str | None
    threads: int
    provider_options: Mapping[str, str]
    place: Place
    options: EditOptions
    same: manifest.Entry

    @property
    def needs(self) -> tuple[str, int]:
        """What of a cluster a worker takes, in Ray's word, and how many."""
        return ("GPU", 1) if self.backend in ON_A_GPU else ("CPU", self.threads)


def edit_folder_on_ray(
    model: str | Path | None,
    guides: str | Path,
    output_folder: str | Path,
    *,
    address: str = "auto",
    backend: str = "auto",
    precision: str | None = None,
    threads: int | None = None,
    provider_options: Mapping[str, str] | None = None,
    masks: str | Path | None = None,
    workers: int | None = None,
    force: bool = False,
    on_file: Callable[[FolderProgress], None] | None = None,
    **options: Any,
) -> FolderResult:
    """`edit_folder` on a Ray cluster: the same files, byte for byte, and the same manifest in another order.

    address: of a running cluster; "auto" is the one that this machine belongs to, or else a new one on this machine;
    "local" is always that. guides, output_folder and masks are paths that mean the same on all its machines, or URLs
    that fsspec opens there (s3:// wants s3fs, and so on). With a URL among them, what an earlier run did is known by
    size and ETag or time, and by hash where these differ; nothing keeps two jobs from one folder. model: a path on all
    machines. backend: of every worker; "auto" is what is best here. threads: of each worker's network on a CPU, which
    it takes from the cluster (default 1); a GPU backend takes a GPU. workers: how many hold an editor (default: as many
    as fit). Raises as `load` and `edit_folder` do, and BackendUnavailable for Ray itself.
    """
    threads = 1 if threads is None else whole("threads", threads, 1, MOST_THREADS, hint="leave it out for 1")
    if workers is not None:
        workers = whole("workers", workers, 1, folder.MOST_WORKERS, hint="leave it out for as many as fit")
    if model is not None and "://" in os.fspath(model):
        raise OptionError(
            f"{model}: a model is not opened from a URL", hint="copy it to one path on all machines of the cluster"
        )
    opened = open_model(model)
    artifact = opened if isinstance(opened, artifacts.Artifact) else opened.artifact
    if backend == "auto":
        with load(model, threads=threads, precision=precision, provider_options=provider_options) as editor:
            backend = editor.backend.name
    usual = USUAL_BATCH if isinstance(opened, artifacts.Artifact) else opened.profile[1]
    chosen = folder.folder_options(options, usual, artifact.defaults)
    place = place_of(guides, masks, output_folder)
    running = backend, precision or artifact.precision
    ledger = Ledger(place, chosen, artifact, running, on_file, masked=masks is not None)
    files = guide_files(place.guides, place.pictures(), chosen.seed)
    with place.claimed():
        with ThreadPoolExecutor(min(usable_cores(), 4)) as pool:
            rest = ledger.left(files, pool, 64, force=force)
        if not rest:
            ledger.begin()
        else:
            order = Order(
                opened.path.absolute(), artifact.sha256, backend, precision, threads, dict(provider_options or {}),
                place, chosen, ledger.same,
            )  # fmt: skip
            with _cluster(address) as ray:
                fit = _fit(ray, order)
                ledger.begin()  # nothing is written where no cluster has room
                for entries in _entries(ray, [file.path for file in rest], order, min(fit, workers or fit)):
                    ledger.note(entries)
                    for entry in entries:
                        failed = entry["status"] == manifest.FAILED
                        error = ImageError(entry["error"], hint=entry["hint"]) if failed else None
                        ledger.count(entry["path"], error)
    return ledger.result()


@contextmanager
def _cluster(address: str) -> Iterator[Any]:
    """The module ray, connected, and as quiet as it can be. Raises BackendUnavailable."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise BackendUnavailable(f"Ray cannot be imported: {error}", hint="pip install 'sdedit-engine[ray]'") from error
    loggers = [logging.getLogger(name) for name in ("ray", "ray.data")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    ours = not ray.is_initialized()
    try:
        if ours:
            _connect(ray, address)
        yield ray
    finally:
        if ours:
            ray.shutdown()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _connect(ray: Any, address: str) -> None:
    """Raises BackendUnavailable."""
    host, colon, port = address.rpartition(":")
    if colon and "/" not in host and port.isdigit():  # Ray itself would try for minutes
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:
            raise BackendUnavailable(f"Ray at {address}: {output.reason(error)}", hint=CLUSTER_HINT) from error
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)  # its C++ part says there which log level it was told
    try:
        ray.init(
            address=None if address == "auto" else address, include_dashboard=False, log_to_driver=False,
            logging_level=logging.CRITICAL,
        )  # fmt: skip
    except Exception as error:  # ConnectionError, ValueError, RuntimeError and its own
        raise BackendUnavailable(f"Ray at {address}: {' '.join(str(error).split())}", hint=CLUSTER_HINT) from error
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _fit(ray: Any, order: Order) -> int:
    """How many workers the cluster has room for. Raises BackendUnavailable for none."""
    there = ray.cluster_resources()
    resource, each = order.needs
    fit = int(there.get(resource, 0)) // each
    if fit < 1:
        raise BackendUnavailable(
            f"a worker on {order.backend} wants {each} {resource}; the cluster has {there.get(resource, 0):g}",
            hint="another --backend, fewer --threads, or a larger cluster",
        )
    return fit


def _entries(ray: Any, paths: Sequence[str], order: Order, workers: int) -> Iterator[list[manifest.Entry]]:
    """The manifest's entries for these files, as chunks of them are done."""
    resource, each = order.needs
    size = BATCHES_A_CHUNK * order.options.batch
    chunks = -(-len(paths) // size)
    rows = [{"path": path.encode("utf-8", "surrogateescape").hex()} for path in paths]
    work = ray.data.from_items(rows, override_num_blocks=chunks)
    work.context.enable_progress_bars = False
    work = work.map_batches(
        Worker,
        fn_constructor_args=(order,),
        batch_size=None,  # a block, which is a chunk
        compute=ray.data.ActorPoolStrategy(size=min(workers, chunks)),
        **{f"num_{resource.lower()}s": each},
    )
    try:
        for done in work.iter_batches(batch_size=None, prefetch_batches=0, batch_format="numpy"):
            entries = [json.loads(line) for line in done["line"]]
            for entry in entries:
                _reraise(entry)
            yield entries
    except ray.exceptions.RayError as error:
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise DeviceError(f"Ray gave up: {first}", hint="what is done is kept: run the same command again") from error


def _reraise(entry: dict[str, Any]) -> None:
    """Raise what a worker could not."""
    if "raised" in entry:
        kind, message, hint = entry["raised"]
        raise getattr(errors, kind)(message, hint=hint)


class Worker:
    """An actor: an editor, opened with the first chunk so that what is wrong with it is an answer."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._held = ExitStack()  # until the process ends
        self._run: Callable[[Sequence[GuideFile], Notes], None] | None = None

    def __call__(self, rows: Mapping[str, Any]) -> dict[str, list[str]]:
        """A chunk of paths -> the manifest's entries, as JSON."""
        order, notes = self._order, Notes()
        paths = [bytes.fromhex(path).decode("utf-8", "surrogateescape") for path in rows["path"]]
        try:
            if self._run is None:
                self._run = self._open()
            self._run([guide_file(path, order.options.seed) for path in paths], notes)
        except SdeditError as error:
            return {"line": [json.dumps({"raised": [type(error).__name__, str(error), error.hint]})]}
        return {"line": [json.dumps(entry) for entry in notes.entries]}

    def _open(self) -> Callable[[Sequence[GuideFile], "Notes"], None]:
        order = self._order
        try:
            editor = load(
                order.model,
                backend=order.backend,
                precision=order.precision,
                threads=order.threads,
                provider_options=order.provider_options,
            )
        except ArtifactError as error:
            raise ArtifactError(f"on a worker: {error}", hint="the model lies at one path on all machines") from error
        if editor.artifact.sha256 != order.artifact_sha256:
            raise ArtifactError(
                f"on a worker: {order.model}: is another model than here", hint="copy the same file to all machines"
            )
        run_batch = self._held.enter_context(editor.batches(order.options))
        pool, clerk = (self._held.enter_context(ThreadPoolExecutor(n)) for n in (WORKER_THREADS, 1))
        edits = FileEdits(editor, order.options, order.place, order.same)
        batch = order.options.batch

        def run(files: Sequence[GuideFile], notes: "Notes") -> None:
            folder.run_files(files, batch, batch + WORKER_THREADS, edits, run_batch, notes, pool, clerk)

        return run


class Notes:
    """What a chunk's files came to, for the driver to note."""

    def __init__(self) -> None:
        self.entries: list[manifest.Entry] = []

    def note(self, entries: Sequence[manifest.Entry]) -> None:
        """See folder.Books."""
        self.entries += entries

    def count(self, path: str, error: SdeditError | None = None) -> None:
        """See folder.Books: the driver counts."""
