"""A folder at a URL, as fsspec reads and writes it: a file server's, or a prefix in a store of objects."""

import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from sdedit.errors import BackendUnavailable, ImageError, OptionError, OutputError, SdeditError
from sdedit.output import reason
from sdedit.places import SCRATCH

ADDRESS_HINT = "check the address, and your rights there on every machine of the cluster"
CHANGES = ("ETag", "etag", "md5Hash", "mtime", "LastModified", "last_modified", "updated", "modify")  # of fsspec's info

OTHERWISE_NAMED = {
    "smbclient": "smbprotocol",
    "libarchive": "libarchive-c",
}  # packages, by the module that fsspec wants


@dataclass(frozen=True)
class UrlFolder:
    """Where it is; every process opens it for itself. Paths below it have slashes."""

    url: str  # as messages have it
    given: str = field(repr=False)  # with a password, maybe
    root: str  # in the filesystem's words, "/" at its end unless it is empty

    @classmethod
    def at(cls, url: str) -> "UrlFolder":
        """Of a URL, or a path. Raises OptionError, BackendUnavailable (fsspec, or what it needs for the URL)."""
        fs, root = _opened(url)
        if "memory" in fs.protocol:
            raise OptionError(f"{_shown(url)}: each process has its own", hint="name a place that all workers see")
        return cls(_shown(url), url, f"{root.rstrip('/')}/" if root else "")

    @property
    def fs(self) -> Any:
        """fsspec's filesystem; it keeps one for each thread where threads cannot share a connection.

        Raises BackendUnavailable on another machine than the one that `at` was called on.
        """
        try:
            return _opened(self.given)[0]
        except SdeditError as error:
            raise BackendUnavailable(
                f"on a worker: {error}", hint="install on all machines of the cluster what it takes here"
            ) from error

    def name(self, path: str) -> str:
        """What messages call a file."""
        return f"{self.url}/{path}"

    def contains(self, other: "UrlFolder") -> bool:
        """Whether `other` is in this folder, or is it."""
        return bool(self.fs == other.fs) and other.root.startswith(self.root)

    def stamps(self, raised: type[SdeditError]) -> dict[str, str | None]:
        """All files below it by path, each with its stamp. Raises `raised`."""
        fs = self.fs
        try:
            fs.invalidate_cache()
            found = _files(fs, self.root)
        except FileNotFoundError:
            raise raised(f"{self.url}: no such folder", hint="check the address") from None
        except Exception as error:  # every filesystem has kinds of its own
            raise raised(f"{self.url}: cannot be listed: {_said(error)}", hint=ADDRESS_HINT) from error
        return {name.removeprefix(self.root): _stamp(info) for name, info in found.items()}

    def read(self, path: str) -> bytes:
        """A file's bytes. Raises FileNotFoundError, or else ImageError."""
        fs = self.fs
        try:
            return bytes(fs.cat_file(self.root + path))
        except FileNotFoundError:
            raise
        except Exception as error:
            raise ImageError(f"{self.name(path)}: cannot be read: {_said(error)}", hint=ADDRESS_HINT) from error

    def open_scratch(self) -> bool:
        """Make a folder for files that are not whole yet, below an existing one. False: there are no folders here."""
        fs, scratch = self.fs, self.root + SCRATCH
        try:
            fs.mkdir(scratch, create_parents=False)
        except FileNotFoundError:
            raise OutputError(f"{self.url}: no such folder", hint="make the folder, or the bucket, first") from None
        except Exception:  # it is there; or, if nothing can be written, the manifest is the next to say so
            pass
        try:
            fs.invalidate_cache()
            return bool(fs.isdir(scratch))  # a store of objects made nothing
        except Exception:
            return False

    def remove_scratch(self) -> None:
        """As far as that can be done."""
        with suppress(Exception):
            self.fs.rm(self.root + SCRATCH, recursive=True)

    def put(self, path: str, size: int, send: Callable[[Any, str], None], *, rename: bool) -> str | None:
        """Write a file whole, and return its stamp. Raises OutputError.

        send: writes its `size` bytes to a path of a filesystem. rename: from the scratch folder; a store of objects
        has a new object all at once.
        """
        fs, target = self.fs, self.root + path
        folder = target.rpartition("/")[0]
        with self._writing(path):
            if rename:
                part = f"{self.root}{SCRATCH}/{uuid.uuid4().hex}"
                send(fs, part)
                try:
                    fs.mv(part, target)
                except Exception:  # its folder is not there yet, say
                    fs.makedirs(folder, exist_ok=True)
                    fs.mv(part, target)
            else:
                send(fs, target)
            fs.invalidate_cache(folder)
            info = fs.info(target)
            if info.get("size") not in (None, size):
                raise OSError(f"{info['size']} bytes are there of {size}")
        return _stamp(info)

    @contextmanager
    def _writing(self, path: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise OutputError(f"{self.name(path)}: cannot be written: {_said(error)}", hint=ADDRESS_HINT) from error


def _opened(url: str) -> tuple[Any, str]:
    """The filesystem and the path in it. Raises OptionError, BackendUnavailable."""
    try:
        from fsspec.core import url_to_fs
    except ImportError as error:
        raise BackendUnavailable(f"{_shown(url)}: needs fsspec", hint="pip install 'sdedit-engine[ray]'") from error
    try:
        fs, root = url_to_fs(url)
    except ImportError as error:
        module = (getattr(error.__cause__, "name", None) or "fsspec[full]").partition(".")[0]
        package = OTHERWISE_NAMED.get(module, module)
        raise BackendUnavailable(
            f"{_shown(url)}: {_said(error)}", hint=f"pip install {package} (on every machine of the cluster)"
        ) from error
    except Exception as error:  # a protocol that is not known, or a filesystem's own
        raise OptionError(
            f"{_shown(url)}: {_said(error)}",
            hint="give a path, or a URL that fsspec can open, such as s3://bucket/folder",
        ) from error
    return fs, str(root)


def _shown(url: str) -> str:
    """Without a password."""
    return re.sub(r"^([^/]*//)[^/@]*@", r"\1", url).rstrip("/")


def _files(fs: Any, root: str) -> dict[str, dict[str, Any]]:
    """fsspec's info of every file below, by name. Links to folders are not followed."""
    from fsspec import AbstractFileSystem

    if getattr(fs.find, "__func__", None) is not AbstractFileSystem.find:
        return dict(fs.find(root, detail=True))  # a store of objects lists thousands at once
    found, folders = {}, [root.rstrip("/") or root]
    while folders:  # the usual find leaves out, without a word, the folders that it may not read
        folder = folders.pop()
        for info in fs.ls(folder, detail=True):
            if info["type"] != "directory":
                found[info["name"]] = info
            elif not info.get("islink") and info["name"].rstrip("/") != folder:
                folders.append(info["name"].rstrip("/"))
    return found


def _stamp(info: Mapping[str, Any]) -> str | None:
    """What changes when a file does: its size with its ETag, hash or time; None where none of them is known."""
    change = next((f"{key} {info[key]}" for key in CHANGES if info.get(key)), None)
    return None if change is None else f"{info.get('size')} bytes, {change}"


def _said(error: Exception) -> str:
    """In one line."""
    text = reason(error) if isinstance(error, OSError) else str(error)
    return " ".join(text.split()) or type(error).__name__
