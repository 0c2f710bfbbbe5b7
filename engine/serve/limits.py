"""What a service gives to its clients at most: numbers that are checked once, and the memory that they share."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from sdedit.checks import real, whole
from sdedit.errors import OptionError
from sdedit.image import MAX_PIXELS
from sdedit.schedule import MOST_STEPS
from sdedit.serve.refusal import Refusal

BYTES_A_PIXEL = 8  # held of a picture while it waits: three of the guide, one of the mask, a float of Ω
MOST_BYTES = 2**50
MOST_SECONDS = 86_400.0


@dataclass(frozen=True)
class Limits:
    """Limits of one service. Raises OptionError for numbers that make no sense, alone or together."""

    queue: int = 64  # requests that wait, beside those being edited
    timeout_s: float = 60.0  # from the last byte of a request to the first of its answer
    upload_s: float = 30.0  # a request's head, its body, and each pause of a client that does not read its answer
    drain_s: float = 10.0  # for what waits when the service is told to stop
    max_body: int = 32 * 2**20  # bytes of a request
    max_pixels: int = 16 * 2**20  # of a guide
    max_frame: int = 2**20  # pixels of `size`, for models that take any
    max_steps: int = 1000  # network evaluations: steps times repeats
    memory: int = 2**30  # bytes that all requests together may hold: bodies, and pictures that wait

    def __post_init__(self) -> None:
        for name, high in (
            ("queue", 100_000),
            ("max_body", MOST_BYTES),
            ("max_pixels", MAX_PIXELS),
            ("max_frame", MAX_PIXELS),
            ("max_steps", MOST_STEPS),
            ("memory", MOST_BYTES),
        ):
            whole(name, getattr(self, name), 1, high, hint="leave it out for the default")
        for name in ("timeout_s", "upload_s", "drain_s"):
            real(name, getattr(self, name), 0, MOST_SECONDS, with_low=name == "drain_s", hint="seconds")
        largest = self.max_body + BYTES_A_PIXEL * self.max_pixels
        if self.memory < largest:
            raise OptionError(
                f"memory is {self.memory} bytes; one request within the other limits may hold {largest}",
                hint="allow more memory, or a smaller body and fewer pixels",
            )


class Memory:
    """The bytes that requests hold together. Used by one thread."""

    def __init__(self, most: int) -> None:
        self.most, self.held = most, 0

    @contextmanager
    def share(self) -> Iterator["Share"]:
        """What one request holds, given back at the end of the `with` block."""
        share = Share(self)
        try:
            yield share
        finally:
            self.held -= share.held


class Share:
    """One request's part of the memory."""

    def __init__(self, memory: Memory) -> None:
        self._memory, self.held = memory, 0

    def take(self, count: int) -> None:
        """Raises Refusal if all requests together would hold too much."""
        if self._memory.held + count > self._memory.most:
            raise Refusal(
                503,
                "the service holds as many pictures as it may",
                hint="try again later, with fewer at once",
                retry_s=1,
            )
        self._memory.held += count
        self.held += count
