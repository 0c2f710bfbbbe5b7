"""Answers on stdout; progress and notes on stderr."""

import json
import sys
import time
from contextlib import suppress
from typing import Any


def print_json(value: Any) -> None:
    """One JSON object, the whole answer."""
    print(json.dumps(value, indent=2))


def say(text: str) -> None:
    """A note for the user, on stderr, if anybody reads it."""
    with suppress(OSError):
        print(text, file=sys.stderr)


class ProgressBar:
    """One line, redrawn at most ten times a second; silent unless stderr is a terminal."""

    WIDTH = 30

    def __init__(self, unit: str = "steps") -> None:
        self._unit = unit
        self.shown = sys.stderr.isatty()
        self._began = self._drawn = 0.0

    def update(self, done: int, total: int) -> None:
        now = time.perf_counter()
        if not self._began:
            self._began, self._first = now, done
        if not self.shown or (now - self._drawn < 0.1 and done < total):
            return
        self._drawn = now
        filled = self.WIDTH * done // total
        rate = (done - self._first) / (now - self._began) if done > self._first else 0.0
        left = f"  {rate:.1f} {self._unit}/s  {(total - done) / rate:.0f} s left" if rate else ""
        bar = "█" * filled + "░" * (self.WIDTH - filled)
        sys.stderr.write(f"\r{bar} {done}/{total}{left}\x1b[K")
        sys.stderr.flush()

    def close(self) -> None:
        if self.shown and self._drawn:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
