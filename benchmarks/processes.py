"""Contestants, each in a process of its own where it waits for its turn: both ends of what is said between them.

A request in JSON on stdin opens one; then it answers every line there with a line of JSON. After `failed` there are no
more answers.
"""

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

Row = dict[str, Any]


def serve(open_one: Callable[[Any], Callable[[str], Row]]) -> None:
    """The contestant's end. open_one is given the request; what it returns answers the lines."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries may print
    respond = None
    for line in sys.stdin:
        answer: Row = {}
        try:
            if respond is None:
                respond = open_one(json.loads(line))
            else:
                answer = respond(line.rstrip("\n"))
        except Exception as error:  # libraries raise many kinds, and none may cost the others' rounds
            answer = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        print(json.dumps(answer), file=answers, flush=True)


class Process:
    """The measuring program's end: starts `python *command`, whose main calls `serve`. Hear how opening went first.

    A failure, the process's death among them, is named on stderr and ends the process.
    """

    def __init__(self, name: str, command: Sequence[str], request: object, **environment: str) -> None:
        self.name, self.failed = name, ""  # or why
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  (a pipe could fill up)
        self._process = subprocess.Popen(
            [sys.executable, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr, text=True,
            encoding="utf-8", env=os.environ | environment,
        )  # fmt: skip
        self.pid = self._process.pid
        self._answers: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()  # an answer can be waited for with a limit
        self._say(json.dumps(request))

    def ask(self, line: str, seconds: float | None = None) -> Row:
        """The answer, or {"failed": why}: also if there is none within so many seconds."""
        if self.failed:
            return {"failed": self.failed}
        self._say(line)
        return self.hear(seconds)

    def hear(self, seconds: float | None = None) -> Row:
        answer: Row
        limit = None if seconds is None else max(0.1, seconds)
        try:
            line = self._answers.get(timeout=limit)
            answer = json.loads(line) if line else {"failed": self._how_it_died()}
        except queue.Empty:
            answer = {"failed": f"no answer in {limit:.3g} s"}
        if "failed" in answer:
            self.failed = answer["failed"]
            print(f"skipped: {self.name}: {self.failed}", file=sys.stderr, flush=True)
            self.close()
        return answer

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._stderr.close()
        with suppress(OSError):  # what it did not live to read
            self._process.stdin.close()  # type: ignore[union-attr]

    def _say(self, line: str) -> None:
        with suppress(OSError):  # it died: heard next
            print(line, file=self._process.stdin, flush=True)

    def _listen(self) -> None:
        with self._process.stdout as answers:  # type: ignore[union-attr]
            for line in answers:
                self._answers.put(line)
        self._answers.put("")

    def _how_it_died(self) -> str:
        code = self._process.wait()
        self._stderr.seek(0)
        said = self._stderr.read().decode(errors="replace").split("\n")
        last = [line.strip() for line in said if line.strip()][-1:]
        return ": ".join([f"died, exit code {code}", *last])
