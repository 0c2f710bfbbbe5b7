"""Open until it is closed: closing waits for those who are inside, and nobody enters any more."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sdedit.errors import ClosedError


class Lifetime:
    """How long something may be used. Thread-safe."""

    def __init__(self, what: str, hint: str) -> None:
        self._what, self._hint = what, hint
        self._changed = threading.Condition()
        self._inside: list[int] = []  # threads, one entry for each use
        self._closing = self._closed = False

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Use it, for the length of a `with` block. Raises ClosedError once `close` was called, but inside another use
        of this thread.
        """
        me = threading.get_ident()
        with self._changed:
            if self._closing and me not in self._inside:
                raise ClosedError(f"{self._what} is closed", hint=self._hint)
            self._inside.append(me)
        try:
            yield
        finally:
            with self._changed:
                self._inside.remove(me)
                self._changed.notify_all()

    def close(self, free: Callable[[], None]) -> None:
        """Refuse who comes from now on, wait for who is inside, then free; whoever calls it again waits for that too.

        Raises ClosedError for a thread that is inside itself: it would wait for itself.
        """
        with self._changed:
            if threading.get_ident() in self._inside:
                raise ClosedError(f"{self._what} is in use by the thread that closes it", hint="close it afterwards")
            self._changed.wait_for(lambda: self._closed or not self._closing)  # for whoever else closes it
            if self._closed:
                return
            self._closing = True
            try:
                self._changed.wait_for(lambda: not self._inside)
            except BaseException:  # an interrupt: it stays open
                self._closing = False
                self._changed.notify_all()
                raise
        try:
            free()
        finally:
            with self._changed:
                self._closed = True
                self._changed.notify_all()
