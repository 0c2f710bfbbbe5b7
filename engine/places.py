"""Where the pictures of a folder job are, as the job sees it; and the usual place, folders of a file system."""

import hashlib
import os
import shutil
import sys
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from sdedit import manifest, record
from sdedit.errors import ImageError, OutputError, ReplayError
from sdedit.image import Source
from sdedit.listing import GuideFile, existing_mask, pictures_of
from sdedit.manifest import Entry
from sdedit.output import is_at, writing

SCRATCH = ".sdedit-batch"  # inside the output folder while a job runs


class Place(Protocol):
    """The folders of guides, masks and results, and the manifest among the results."""

    @property
    def guides(self) -> Path | str:
        """What messages call the folder of guides."""
        ...

    @property
    def manifest(self) -> Path | str:
        """Where the manifest is."""
        ...

    # whoever edits files, in many threads and processes

    def guide(self, file: GuideFile) -> Source:
        """What `Editor.prepare` takes. Raises ImageError."""
        ...

    def mask(self, file: GuideFile) -> Source | None:
        """Likewise; None for a job without masks. Raises ImageError where there should be a mask and is none."""
        ...

    def write(self, file: GuideFile, data: memoryview) -> Entry:
        """Write a result whole, under its name. What else to note of it, if anything. Raises OutputError."""
        ...

    # the one who keeps the books

    def pictures(self) -> list[str]:
        """Checks the folders. Every guide's path below its own, sorted. Raises ImageError, OutputError."""
        ...

    def claimed(self) -> AbstractContextManager[None]:
        """For a `with` block around the job. Raises OutputError."""
        ...

    def entries(self) -> dict[str, Entry] | None:
        """Those of the manifest, by guide; None where there is none yet. Raises OutputError."""
        ...

    def replace(self, entries: Iterable[Entry]) -> None:
        """Make them all that the manifest has, at once. Raises OutputError."""
        ...

    def append(self, entries: Sequence[Entry]) -> None:
        """Add these to the manifest. Raises OutputError."""
        ...

    def holds(self, file: GuideFile, entry: Entry) -> bool:
        """Whether guide, mask and result are still those that the manifest tells of."""
        ...

    def taken(self, file: GuideFile, *, begun: bool) -> Path | str | None:
        """The file where the result goes, if there is one and it is not ours. begun: there was a manifest already."""
        ...


def a_file(path: Path) -> Path:
    """`path`, unless reading it might never end. Raises ImageError for pipes and devices."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ImageError(f"{path}: is a pipe or a device", hint="take it out of the folder")
    return path


@dataclass(frozen=True)
class LocalPlace:
    """Folders under the same path for every process of the job."""

    guides: Path
    masks: Path | None
    results: Path

    @property
    def manifest(self) -> Path:
        """See Place."""
        return self.results / manifest.NAME

    def guide(self, file: GuideFile) -> Path:
        """See Place."""
        return a_file(self.guides / file.path)

    def mask(self, file: GuideFile) -> Path | None:
        """See Place."""
        return None if self.masks is None else a_file(existing_mask(self.masks, file.path))

    def write(self, file: GuideFile, data: memoryview) -> Entry:
        """See Place."""
        target = self.results / file.output
        scratch = self.results / SCRATCH / f"{uuid.uuid4().hex}.png"  # several processes may write beside each other
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            scratch.write_bytes(data)
            os.replace(scratch, target)
        return {}

    def pictures(self) -> list[str]:
        """See Place."""
        for folder in (self.guides, self.masks):
            if folder is not None and not folder.is_dir():
                raise ImageError(f"{folder}: no such folder", hint="name a folder of pictures")
        if not self.results.is_dir():
            raise OutputError(f"{self.results}: no such folder", hint="make the folder first")
        if not os.access(self.results, os.W_OK):
            raise OutputError(f"{self.results}: not writable", hint="choose a folder you may write to")
        source, target = self.guides.resolve(), self.results.resolve()
        masks = None if self.masks is None else self.masks.resolve()
        for folder, resolved in ((self.guides, source), (self.masks, masks)):
            if resolved is not None and (resolved.is_relative_to(target) or target.is_relative_to(resolved)):
                raise OutputError(f"{self.results}: would mix results with {folder}", hint="choose a folder beside it")
        if masks is not None and masks.is_relative_to(source):
            raise ImageError(
                f"{self.masks}: its masks would be edited with {self.guides}", hint="put the masks beside the guides"
            )
        return pictures_of(self.guides)

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """A folder for files that are not whole yet, on the disk of the results. One job at a time has it."""
        scratch = self.results / SCRATCH
        with ExitStack() as held:
            while not self._locked(scratch, held):
                held.close()  # its owner removed it meanwhile
            held.callback(shutil.rmtree, scratch, ignore_errors=True)
            yield

    def _locked(self, scratch: Path, held: ExitStack) -> bool:
        """Make the folder and lock it: whether that is still the folder at its name. Raises OutputError."""
        with writing(scratch):
            scratch.mkdir(exist_ok=True)
            if sys.platform == "win32":
                return True
            try:
                lock = os.open(scratch, os.O_RDONLY)
            except FileNotFoundError:
                return False
            held.callback(os.close, lock)
        import fcntl

        try:  # given up by the system when the process dies
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(
                f"{self.results}: another job is writing to it", hint="wait for it, or choose another folder"
            ) from None
        except OSError:  # a file system without locks
            return True
        return is_at(lock, scratch)

    def entries(self) -> dict[str, Entry] | None:
        """See Place."""
        return manifest.read(self.manifest) if os.path.lexists(self.manifest) else None

    def replace(self, entries: Iterable[Entry]) -> None:
        """See Place."""
        with writing(self.manifest):
            manifest.write(self.manifest, entries)

    def append(self, entries: Sequence[Entry]) -> None:
        """See Place. They are on the disk when this returns."""
        with writing(self.manifest):
            manifest.append(self.manifest, entries)

    def holds(self, file: GuideFile, entry: Entry) -> bool:
        """See Place: by their hashes."""
        try:
            found = tuple(map(_sha256, (self.results / file.output, self.guide(file), self.mask(file))))
        except (OSError, ImageError):
            return False
        return found == recorded_hashes(entry)

    def taken(self, file: GuideFile, *, begun: bool) -> Path | None:
        """See Place."""
        target = self.results / file.output
        return target if os.path.lexists(target) and not (begun and _carries_a_record(target)) else None


def recorded_hashes(entry: Entry) -> tuple[str | None, ...]:
    """SHA-256 of the result, the guide and the mask, as an entry has them."""
    return entry.get("output_sha256"), entry.get("guide_sha256"), entry.get("mask_sha256")


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
