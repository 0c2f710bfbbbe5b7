"""The place of a Ray job with folders at URLs.

What is different there: a store of objects has no folders and renames nothing, but what it has is whole. No file
grows, so the manifest grows on the driver's disk, and the results get a copy of it twice a minute and at the end. A
hash costs a download, so the manifest also has a stamp of each file (its size, and its ETag or time), and hashes are
compared only where stamps differ. And nothing keeps two jobs from writing to one URL.
"""

import hashlib
import io
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from sdedit import manifest, record
from sdedit.errors import ImageError, OutputError, ReplayError
from sdedit.image import Encoded
from sdedit.listing import GuideFile, chosen_pictures, mask_names, no_mask
from sdedit.manifest import Entry
from sdedit.output import writing
from sdedit.places import LocalPlace, Place, recorded_hashes
from sdedit.url_folder import UrlFolder

SECONDS_A_COPY = 30  # of the manifest: what a driver that dies has to do again
MOST_TIME_COPYING = 0.1  # a long manifest is copied less often

Stamps = dict[str, str | None]  # of files, by path; None where the filesystem tells nothing that would change


def place_of(guides: str | Path, masks: str | Path | None, results: str | Path) -> Place:
    """Of folders that all machines see under one path, file:// URLs too; or with any other URL among them.

    Raises OptionError and BackendUnavailable as `UrlFolder.at`.
    """
    source, target = _path(guides), _path(results)
    masked = None if masks is None else _path(masks)
    if any("://" in given for given in (source, target, masked or "")):
        return RemotePlace(UrlFolder.at(source), None if masked is None else UrlFolder.at(masked), UrlFolder.at(target))
    return LocalPlace(Path(source), None if masked is None else Path(masked), Path(target))


def _path(given: str | Path) -> str:
    """An absolute path, or a URL that is not one of a path."""
    text = os.fspath(given)
    if text.startswith("file://"):
        text = url2pathname(urlsplit(text).path)
    return text if "://" in text else str(Path(text).absolute())


class RemotePlace:
    """See Place."""

    def __init__(self, guides: UrlFolder, masks: UrlFolder | None, results: UrlFolder, rename: bool = False) -> None:
        """rename: results are written beside their names first; `claimed` finds out."""
        self._guides, self._masks, self._results, self._rename = guides, masks, results, rename
        self._guide_stamps: Stamps = {}
        self._mask_stamps: Stamps = {}
        self._result_stamps: Stamps = {}
        self._grown, self._copied, self._next_copy = Path(), True, 0.0  # the manifest here; whether OUT has all of it

    def __reduce__(self) -> tuple[Any, ...]:
        """For a worker, who needs no stamps."""
        return RemotePlace, (self._guides, self._masks, self._results, self._rename)

    @property
    def guides(self) -> str:
        """See Place."""
        return self._guides.url

    @property
    def manifest(self) -> str:
        """See Place."""
        return self._results.name(manifest.NAME)

    def guide(self, file: GuideFile) -> Encoded:
        """See Place."""
        try:
            return Encoded(self._guides.read(file.path), self._guides.name(file.path))
        except FileNotFoundError:
            raise ImageError(f"{self._guides.name(file.path)}: no such file", hint="check the path") from None

    def mask(self, file: GuideFile) -> Encoded | None:
        """See Place."""
        if self._masks is None:
            return None
        names = mask_names(file.path)
        for name in names:
            try:
                return Encoded(self._masks.read(name), self._masks.name(name))
            except FileNotFoundError:
                continue
        raise no_mask(self._masks.name(names[0]))

    def write(self, file: GuideFile, data: memoryview) -> Entry:
        """See Place."""
        whole = bytes(data)
        stamp = self._results.put(
            file.output, len(whole), lambda fs, path: fs.pipe_file(path, whole), rename=self._rename
        )
        return {"stamps": {"output": stamp}}

    def pictures(self) -> list[str]:
        """See Place."""
        for folder in (self._guides, self._masks):
            if folder is not None and (folder.contains(self._results) or self._results.contains(folder)):
                raise OutputError(
                    f"{self._results.url}: would mix results with {folder.url}", hint="choose a folder beside it"
                )
        if self._masks is not None:
            if self._guides.contains(self._masks):
                raise ImageError(
                    f"{self._masks.url}: its masks would be edited with {self._guides.url}",
                    hint="put the masks beside the guides",
                )
            self._mask_stamps = self._masks.stamps(ImageError)
        self._guide_stamps = self._guides.stamps(ImageError)
        return chosen_pictures(self._guides.url, self._guide_stamps)

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """See Place. Nobody else is kept out."""
        self._rename = self._results.open_scratch()
        try:
            self._result_stamps = self._results.stamps(OutputError)
            with tempfile.TemporaryDirectory(prefix="sdedit-") as here:
                self._grown = Path(here) / manifest.NAME
                try:
                    yield
                finally:
                    if not self._copied:
                        self._copy_manifest()
        finally:
            if self._rename:
                self._results.remove_scratch()

    def entries(self) -> dict[str, Entry] | None:
        """See Place."""
        if manifest.NAME not in self._result_stamps:
            return None
        try:
            self._results.fs.get_file(self._results.root + manifest.NAME, str(self._grown))
        except Exception as error:
            raise OutputError(f"{self.manifest}: cannot be read: {error}", hint="choose another folder") from error
        return manifest.read(self._grown, shown=self.manifest)

    def replace(self, entries: Iterable[Entry]) -> None:
        """See Place."""
        with writing(self._grown):
            manifest.write(self._grown, entries)
        self._copy_manifest()

    def append(self, entries: Sequence[Entry]) -> None:
        """See Place: in the results a little later."""
        for entry in entries:
            if "stamps" in entry:
                entry["stamps"] |= self._input_stamps(entry["path"])
        with writing(self._grown):
            manifest.append(self._grown, entries)
        self._copied = False
        if time.monotonic() >= self._next_copy:
            self._copy_manifest()

    def holds(self, file: GuideFile, entry: Entry) -> bool:
        """See Place."""
        if file.output not in self._result_stamps:
            return False
        stamps = {"output": self._result_stamps[file.output], **self._input_stamps(file.path)}
        if None not in stamps.values() and stamps == entry.get("stamps"):
            return True
        try:
            result, guide, mask = self._results.read(file.output), self.guide(file), self.mask(file)
        except (FileNotFoundError, ImageError):
            return False
        found = _sha256(result), _sha256(guide.data), None if mask is None else _sha256(mask.data)
        return found == recorded_hashes(entry)

    def taken(self, file: GuideFile, *, begun: bool) -> str | None:
        """See Place."""
        if file.output not in self._result_stamps or (begun and self._carries_a_record(file)):
            return None
        return self._results.name(file.output)

    def _carries_a_record(self, file: GuideFile) -> bool:
        try:
            record.read_json(io.BytesIO(self._results.read(file.output)))
        except (FileNotFoundError, ImageError, ReplayError):
            return False
        return True

    def _input_stamps(self, path: str) -> Stamps:
        """Of a guide, and its mask if there are masks, as they were when they were listed: before they were read."""
        stamps = {"guide": self._guide_stamps.get(path)}
        if self._masks is not None:
            name = next((name for name in mask_names(path) if name in self._mask_stamps), "")
            stamps["mask"] = self._mask_stamps.get(name)
        return stamps

    def _copy_manifest(self) -> None:
        began = time.monotonic()
        size = self._grown.stat().st_size
        self._results.put(
            manifest.NAME, size, lambda fs, path: fs.put_file(str(self._grown), path), rename=self._rename
        )
        ended = time.monotonic()
        self._next_copy = ended + max(SECONDS_A_COPY, (ended - began) / MOST_TIME_COPYING)
        self._copied = True


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
