"""What goes wrong, as one clear sentence and one hint that says what to do about it."""


class SdeditError(Exception):
    """Base of every error this package raises on purpose. `str(error)` is the message."""

    def __init__(self, message: str, *, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


class OptionError(SdeditError):
    """An option has a value that makes no sense, alone or beside the others."""


class ImageError(SdeditError):
    """A guide or mask cannot be read, or does not fit the model."""


class ArtifactError(SdeditError):
    """A model file is not what this engine runs."""


class BackendUnavailable(SdeditError):
    """A backend was asked for that does not work on this machine."""


class ClosedError(SdeditError):
    """An editor is used after it was closed, or closed by the thread that is using it."""


class DeviceError(SdeditError):
    """A CUDA call failed on a GPU that works: out of memory, say."""


class NetworkError(SdeditError):
    """The network returned something that is not a picture: NaN, Inf, a wrong shape."""


class OutputError(SdeditError):
    """A result cannot be written where it was asked for."""


class ReplayError(SdeditError):
    """A record cannot be repeated with the files at hand."""


class Cancelled(SdeditError):
    """The caller's `on_step` returned False."""


class OutOfTolerance(SdeditError):
    """Two denoisers that should be the same function are not."""
