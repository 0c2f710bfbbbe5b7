"""What executes the denoiser. A backend holds one loaded artifact and binds it for each edit."""

from collections.abc import Mapping
from typing import Protocol

from sdedit.artifact import Artifact
from sdedit.errors import BackendUnavailable, OptionError
from sdedit.loop import Denoiser

BACKENDS = ("ort-cpu", "ort-cuda", "ort-tensorrt")
AUTO_ORDER = ("ort-cuda", "ort-cpu")  # best first, of those that keep the artifact's own precision


class Backend(Protocol):
    """One artifact, loaded. Safe to share between threads: every edit binds buffers of its own."""

    name: str
    provider: str  # what executes, in its library's own words
    precision: str
    threads: int
    versions: Mapping[str, str]  # of the libraries that execute

    def bind(self, batch: int, conditions: Mapping[str, float], size: tuple[int, int] | None = None) -> Denoiser:
        """The network with its own buffers, for batches of this size. conditions: extra input -> value.

        size: width and height, where the model takes any; None is its own. Raises OptionError.
        """
        ...


def open_backend(name: str, artifact: Artifact, threads: int | None) -> Backend:
    """Open `artifact` on the backend called `name`, or the best that works for "auto".

    Raises BackendUnavailable, OptionError for a name it does not know; never falls back from a backend that was named.
    """
    from sdedit.backends.ort import OrtBackend

    if name != "auto":
        probe(name)
        return OrtBackend(artifact, name, threads)
    for candidate in AUTO_ORDER:
        try:
            probe(candidate)
            return OrtBackend(artifact, candidate, threads)
        except BackendUnavailable as error:
            last = error
    raise last


def probe(name: str) -> None:
    """Raise BackendUnavailable, with the cause and the fix, unless the backend can be tried here."""
    if name not in BACKENDS:
        raise OptionError(f"unknown backend {name!r}", hint=f"choose one of auto, {', '.join(BACKENDS)}")
    from sdedit.backends import ort

    ort.probe(name)
