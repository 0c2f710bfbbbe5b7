"""The way of a folder's pictures: from the disk to the network, and their results to the disk."""

import hashlib
import io
import os
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from sdedit import manifest, output, record
from sdedit.editor import Editor
from sdedit.errors import ImageError, NetworkError, OutputError, SdeditError
from sdedit.jobs import Job
from sdedit.listing import GuideFile
from sdedit.options import EditOptions
from sdedit.results import Result

RunBatch = Callable[[Sequence[Job]], list[Result]]


class FileEdits:
    """What is done with each file, wherever that is. scratch: a folder on the disk of the results.

    same: what is in every line of the manifest.
    """

    def __init__(self, editor: Editor, options: EditOptions, scratch: Path, same: manifest.Entry) -> None:
        self._editor, self._options, self._scratch, self._same = editor, options, scratch, same
        self._name = uuid.uuid4().hex  # several processes may write beside each other

    def prepare(self, file: GuideFile) -> Job | SdeditError:
        """Read a guide and its mask, or say why not."""
        try:
            return self._editor.prepare(file.guide, self._options, seed=file.seed, mask=file.mask())
        except ImageError as error:
            return error

    def edit(
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
                yield from self.edit([one], run_batch)
        else:
            yield from zip((file for file, _ in group), results, strict=True)

    def write(self, file: GuideFile, result: Result) -> manifest.Entry:
        """Write a result whole, under its name, and say what to note of it. Raises OutputError."""
        encoded = io.BytesIO()
        output.png(result.pixels, record.describe(self._editor, self._options, result))(encoded)
        scratch = self._scratch / f"{self._name}-{threading.get_ident()}.png"
        with writing(file.target):
            file.target.parent.mkdir(parents=True, exist_ok=True)
            scratch.write_bytes(encoded.getbuffer())
            os.replace(scratch, file.target)
        return self._entry(file, manifest.DONE) | {
            "guide_sha256": result.guide.sha256,
            "mask_sha256": None if result.mask is None else result.mask.sha256,
            "output_sha256": hashlib.sha256(encoded.getbuffer()).hexdigest(),
        }

    def failed(self, file: GuideFile, error: SdeditError) -> manifest.Entry:
        """What to note of a file that could not be edited."""
        return self._entry(file, manifest.FAILED) | {"error": str(error), "hint": error.hint}

    def _entry(self, file: GuideFile, status: str) -> manifest.Entry:
        return {"path": file.path, "output": file.output, "status": status, "seed": file.seed, **self._same}


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the system refuses inside is an OutputError about `path`."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written: {output.reason(error)}", hint="check the disk and the permissions"
        ) from error
