"""Where a service listens: a TCP port, of this machine only unless told otherwise, or a Unix socket."""

import ipaddress
import os
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from sdedit.checks import whole
from sdedit.errors import OptionError, OutputError


@dataclass(frozen=True)
class Listener:
    """A bound socket and what a client calls it."""

    socket: socket.socket
    address: str
    remove: Callable[[], None] = lambda: None  # the socket's file, where it has one


@contextmanager
def tcp(host: str, port: int, *, allow_remote: bool) -> Iterator[Listener]:
    """A port of an address; 0 is any free one. Raises OptionError, OutputError (the port is taken)."""
    whole("port", port, 0, 65535, hint="8000, or 0 for any free one")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise OptionError(f"host {host!r} is not an address: {error}", hint="127.0.0.1 is this machine") from error
    family, kind, protocol, _, where = found[0]
    if not (ipaddress.ip_address(str(where[0]).partition("%")[0]).is_loopback or allow_remote):
        raise OptionError(
            f"{host} can be reached from other machines, and the service asks nobody who they are",
            hint="127.0.0.1 is this machine only; --allow-remote where something in front of it keeps strangers out",
        )
    with socket.socket(family, kind, protocol) as opened:
        if os.name == "posix":
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            opened.bind(where)
            opened.listen()  # who comes before the model is loaded waits
        except OSError as error:
            raise OutputError(
                f"{host} port {port} cannot be used: {error.strerror or error}",
                hint="another --port, or 0 for any free one",
            ) from error
        name = f"[{where[0]}]" if family == socket.AF_INET6 else where[0]
        yield Listener(opened, f"http://{name}:{opened.getsockname()[1]}")


@contextmanager
def unix(path: Path) -> Iterator[Listener]:
    """A socket file, for this user only, removed in the end. One that nobody listens on is replaced.

    Raises OptionError, OutputError (somebody listens on it, or it is another file).
    """
    if not hasattr(socket, "AF_UNIX"):
        raise OptionError("this system has no Unix sockets", hint="use --host and --port")
    if os.path.lexists(path):
        _remove_stale(path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as opened:
        try:
            opened.bind(str(path))
            os.chmod(path, 0o600)  # nobody can connect before it listens
            opened.listen()  # from here on a second service sees that it is in use
        except OSError as error:
            raise OutputError(
                f"{path}: no socket can be made there: {error.strerror or error}",
                hint="the folder must exist, and the whole path have at most about 100 bytes",
            ) from error
        ours = path.stat().st_ino

        def remove() -> None:
            with suppress(OSError):
                if path.stat().st_ino == ours:
                    path.unlink()

        try:
            yield Listener(opened, f"unix:{path}", remove)
        finally:
            remove()


def _remove_stale(path: Path) -> None:
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise OutputError(f"{path}: exists and is no socket", hint="choose another path")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(1)
            probe.connect(str(path))
    except (ConnectionRefusedError, FileNotFoundError):
        path.unlink(missing_ok=True)
    except OSError:  # busy, or somebody else's: not ours to remove
        raise OutputError(f"{path}: is in use", hint="choose another path") from None
    else:
        raise OutputError(f"{path}: another service listens on it", hint="stop that one, or choose another path")
