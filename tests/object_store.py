"""A store of objects for fsspec that processes share: bucket:///a/b is the file /a/b, but there are no folders."""

import hashlib
import os
import shutil
import uuid
from pathlib import Path

from fsspec import AbstractFileSystem


class ObjectStore(AbstractFileSystem):
    """What is written is whole or not there; nothing is moved, nothing grows. `reads` lists what this process read."""

    protocol = "bucket"
    root_marker = "/"
    reads: list[str] = []  # noqa: RUF012, one for all instances, of which every thread has its own

    def find(self, path, maxdepth=None, withdirs=False, detail=False, **kwargs):
        found = {str(file): self.info(str(file)) for file in sorted(Path(path).rglob("*")) if file.is_file()}
        return found if detail else list(found)

    def info(self, path, **kwargs):
        path = self._strip_protocol(path)
        if os.path.isfile(path):
            data = Path(path).read_bytes()
            return {"name": path, "size": len(data), "type": "file", "ETag": hashlib.md5(data).hexdigest()}
        if any(file.is_file() for file in Path(path).rglob("*")):
            return {"name": path, "size": 0, "type": "directory"}
        raise FileNotFoundError(path)

    def mkdir(self, path, create_parents=True, **kwargs):
        pass

    def cat_file(self, path, start=None, end=None, **kwargs):
        self.reads.append(path)
        return Path(path).read_bytes()

    def get_file(self, rpath, lpath, **kwargs):
        shutil.copyfile(rpath, lpath)

    def pipe_file(self, path, value, mode="overwrite", **kwargs):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        new = f"{path}.{uuid.uuid4().hex}"
        Path(new).write_bytes(value)
        os.replace(new, path)

    def put_file(self, lpath, rpath, **kwargs):
        self.pipe_file(rpath, Path(lpath).read_bytes())
