"""The way of a folder's pictures: from the disk to the network, and their results to the disk."""

import hashlib
import io
from collections.abc import Callable, Iterator, Sequence

from sdedit import manifest, output, record
from sdedit.editor import Editor
from sdedit.errors import ImageError, NetworkError, SdeditError
from sdedit.jobs import Job
from sdedit.listing import GuideFile
from sdedit.options import EditOptions
from sdedit.places import Place
from sdedit.results import Result

RunBatch = Callable[[Sequence[Job]], list[Result]]


class FileEdits:
    """What is done with each file, wherever that is. same: what is in every line of the manifest."""

    def __init__(self, editor: Editor, options: EditOptions, place: Place, same: manifest.Entry) -> None:
        self._editor, self._options, self._place, self._same = editor, options, place, same

    def prepare(self, file: GuideFile) -> Job | SdeditError:
        """Read a guide and its mask, or say why not."""
        try:
            guide, mask = self._place.guide(file), self._place.mask(file)
            return self._editor.prepare(guide, self._options, seed=file.seed, mask=mask)
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
        output.png(result.pixels, record.describe(self._editor, self._options, result), result.guide.profile)(encoded)
        more = self._place.write(file, encoded.getbuffer())
        return self._entry(file, manifest.DONE) | {
            "guide_sha256": result.guide.sha256,
            "mask_sha256": None if result.mask is None else result.mask.sha256,
            "output_sha256": hashlib.sha256(encoded.getbuffer()).hexdigest(),
            **more,
        }

    def failed(self, file: GuideFile, error: SdeditError) -> manifest.Entry:
        """What to note of a file that could not be edited."""
        return self._entry(file, manifest.FAILED) | {"error": str(error), "hint": error.hint}

    def _entry(self, file: GuideFile, status: str) -> manifest.Entry:
        return {"path": file.path, "output": file.output, "status": status, "seed": file.seed, **self._same}
