"""The queue of a service, and the thread that empties it: compatible requests share a batch."""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from sdedit.editor import Editor
from sdedit.errors import NetworkError
from sdedit.jobs import Job
from sdedit.options import EditOptions
from sdedit.results import Result
from sdedit.serve.metrics import Metrics
from sdedit.serve.refusal import Refusal

WARM_UP_STEPS = 2


@dataclass(frozen=True, eq=False)
class Waiting:
    """A request in the queue."""

    job: Job  # with a table of its own
    options: EditOptions
    future: Future[Result] = field(default_factory=Future)

    @cached_property
    def kind(self) -> tuple[str, bool]:
        """Requests of one kind may share a batch: seed, t0 and fit are each job's own, all else is equal."""
        return repr(replace(self.options, seed=0, t0=None, fit="")), self.job.omega is None

    @property
    def evaluations(self) -> int:
        """Network calls of its batch."""
        return (self.options.steps or 0) * self.options.repeats


class Batcher:
    """At most `capacity` requests wait; the first of them is edited next, with those of its kind behind it.

    Batches have one fixed size and are filled up, so a result does not depend on who shares its batch.
    """

    def __init__(self, editor: Editor, batch: int, capacity: int, metrics: Metrics) -> None:
        self._editor, self._batch, self._capacity, self._metrics = editor, batch, capacity, metrics
        self._changed = threading.Condition()
        self._waiting: list[Waiting] = []
        self._running: Waiting | None = None
        self._draining = False
        self._evaluation_s = 0.0  # measured, of one network call and what belongs to it
        self._thread = threading.Thread(target=self._work, name="sdedit-batcher", daemon=True)
        self.warm: Future[None] = Future()

    def start(self) -> None:
        """Warm up, then edit what comes."""
        self._thread.start()

    def join(self) -> None:
        """Wait until a batcher that drains has nothing left to do."""
        self._thread.join()

    @property
    def ready(self) -> bool:
        """Warm, and not told to stop."""
        return self.warm.done() and self.warm.exception() is None and not self._draining

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def __len__(self) -> int:
        with self._changed:
            return sum(not one.future.cancelled() for one in self._waiting)

    def admit(self) -> None:
        """Raises Refusal if a request would not be let into the queue now."""
        with self._changed:
            self._admit(None)

    def submit(self, job: Job, options: EditOptions, patience_s: float) -> Future[Result]:
        """Queue a job. Cancel its future to take it out again; that does not stop a batch that has begun.

        Raises Refusal if the queue is full, cannot come to it within patience_s, or drains.
        """
        one = Waiting(job, options)
        with self._changed:
            self._admit(patience_s)
            self._waiting.append(one)
            self._changed.notify()
        return one.future

    def drain(self) -> None:
        """Let nothing in any more; the thread ends when the queue is empty."""
        with self._changed:
            self._draining = True
            self._changed.notify()

    def give_up(self) -> None:
        """Refuse all that waits; a batch that has begun is finished."""
        with self._changed:
            waiting, self._waiting = self._waiting, []
        for one in waiting:
            if one.future.set_running_or_notify_cancel():
                one.future.set_exception(stopping())

    def _admit(self, patience_s: float | None) -> None:
        if self._draining:
            raise stopping()
        self._waiting = [one for one in self._waiting if not one.future.cancelled()]
        wait_s = self._wait_s()
        if len(self._waiting) >= self._capacity:
            raise Refusal(
                503, f"{self._capacity} requests wait already", hint="try again when Retry-After says", retry_s=wait_s
            )
        if patience_s is not None and wait_s > patience_s:
            raise Refusal(
                503,
                f"the queue takes about {wait_s:.0f} s; a request waits {patience_s:.0f} s at most",
                hint="try again when Retry-After says, or ask for fewer steps",
                retry_s=wait_s,
            )

    def _wait_s(self) -> float:
        """How long all that is here will take, by what a network call took lately."""
        evaluations = 0 if self._running is None else self._running.evaluations
        groups: dict[tuple[str, bool], int] = {}
        for one in self._waiting:
            place = groups.get(one.kind, 0)
            if place % self._batch == 0:
                evaluations += one.evaluations
            groups[one.kind] = place + 1
        return evaluations * self._evaluation_s

    def _work(self) -> None:
        try:
            self._warm_up()
        except BaseException as error:
            self.warm.set_exception(error)
            return
        self.warm.set_result(None)
        while group := self._next():
            self._edit(group)

    def _warm_up(self) -> None:
        """The editor's own, and then an edit that is timed."""
        artifact = self._editor.artifact
        conditions = dict.fromkeys(artifact.extra_inputs, 0.0)
        options = EditOptions(steps=WARM_UP_STEPS, batch=self._batch, conditions=conditions)
        self._editor.warmup(**vars(options))
        options = options.resolved(artifact.defaults)
        width, height = artifact.frame(None)
        grey = np.full((height, width, 3), 128, np.uint8)
        self._timed([Waiting(self._editor.prepare(grey, options), options)])

    def _next(self) -> list[Waiting]:
        """The requests of the next batch, once there are any; none when there will be no more."""
        with self._changed:
            self._running = None
            while True:
                self._waiting = [one for one in self._waiting if not one.future.cancelled()]
                if self._waiting:
                    first = self._waiting[0]
                    group = [one for one in self._waiting if one.kind == first.kind][: self._batch]
                    self._waiting = [one for one in self._waiting if one not in group]
                    if group := [one for one in group if one.future.set_running_or_notify_cancel()]:
                        self._running = first
                        return group
                elif self._draining:
                    return []
                else:
                    self._changed.wait()

    def _edit(self, group: Sequence[Waiting]) -> None:
        """Every future of the group gets its result, or why there is none: alone where they fail together."""
        try:
            results = self._timed(group)
        except BaseException as error:  # the thread has others to serve
            if isinstance(error, NetworkError) and len(group) > 1:
                for one in group:
                    self._edit([one])
                return
            for one in group:
                one.future.set_exception(error)
        else:
            for one, result in zip(group, results, strict=True):
                one.future.set_result(result)

    def _timed(self, group: Sequence[Waiting]) -> list[Result]:
        began = time.perf_counter()
        with self._editor.batches(group[0].options) as run:
            results = run([one.job for one in group])
        seconds, evaluations = time.perf_counter() - began, group[0].evaluations
        if self.warm.done():
            self._metrics.edit_seconds.observe(seconds)
            self._metrics.batch_size.observe(len(group))
            self._metrics.evaluations.inc(evaluations)
            self._evaluation_s += 0.3 * (seconds / evaluations - self._evaluation_s)
        else:
            self._evaluation_s = seconds / evaluations
        return results


def stopping() -> Refusal:
    """What requests are told while the service stops."""
    return Refusal(503, "the service is stopping", hint="try again when it is back", retry_s=5)
