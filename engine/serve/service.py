"""One request from its head to its picture, within the limits."""

import asyncio
import io
from collections.abc import AsyncIterator, Awaitable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

from sdedit import output, record
from sdedit.cpu import usable_cores
from sdedit.editor import Editor
from sdedit.jobs import Job
from sdedit.options import EditOptions
from sdedit.schedule import plan
from sdedit.serve import upload
from sdedit.serve.batcher import Batcher, stopping
from sdedit.serve.limits import BYTES_A_PIXEL, Limits, Memory, Share
from sdedit.serve.metrics import Metrics
from sdedit.serve.query import read_options
from sdedit.serve.refusal import Refusal
from sdedit.serve.upload import ClientLeft, Upload

if TYPE_CHECKING:
    from starlette.requests import Request

MOST_WORKERS = 4
LAST_UPLOAD_S = 1.0  # what an upload has left when the service is told to stop

Value = TypeVar("Value")


@dataclass(frozen=True)
class Answer:
    """An edited picture as it leaves."""

    png: bytes
    seed: int


class Service:
    """An editor that serves requests. Lives in one event loop; edits run in the batcher's thread, pictures are read
    and written in a few others.
    """

    def __init__(self, editor: Editor, batch: int, limits: Limits) -> None:
        self.editor, self.limits = editor, limits
        self.metrics = Metrics(editor.backend.name, editor.artifact.name, batch, limits.queue)
        self.batcher = Batcher(editor, batch, limits.queue, self.metrics)
        self._batch, self._memory = batch, Memory(limits.memory)
        self._pool = ThreadPoolExecutor(min(usable_cores(), MOST_WORKERS), "sdedit-pictures")
        self._uploads: set[asyncio.Timeout] = set()
        self.draining = False
        self.metrics.watch(self.batcher.__len__, lambda: self.batcher.ready, lambda: self._memory.held)

    def drain(self) -> None:
        """Stop: let nothing in, finish what is queued within the limit, refuse the rest."""
        self.draining = True
        self.batcher.drain()
        loop = asyncio.get_running_loop()
        for timeout in self._uploads:
            with suppress(RuntimeError):  # its time is over in this very turn of the loop
                timeout.reschedule(loop.time() + LAST_UPLOAD_S)
        loop.call_later(self.limits.drain_s, self.batcher.give_up)

    async def edit(self, request: "Request") -> Answer:
        """Raises an SdeditError, Refusal among them, or ClientLeft."""
        kind = upload.media_type(request)
        self.batcher.admit()  # before a body is waited for
        upload.check_length(request, self.limits)
        with self._memory.share() as share:
            async with self._upload_time():
                body = await upload.read_body(request, self.limits, share)
            deadline = asyncio.get_running_loop().time() + self.limits.timeout_s
            return await self._while_wanted(request, self._made(request, kind, body, share, deadline), deadline)

    @asynccontextmanager
    async def _upload_time(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self.limits.upload_s) as timeout:
                self._uploads.add(timeout)
                try:
                    yield
                finally:
                    self._uploads.discard(timeout)
        except TimeoutError:
            if self.draining:
                raise stopping() from None
            raise Refusal(
                408, f"the body did not come within {self.limits.upload_s:g} s", hint="send it faster, or a smaller one"
            ) from None

    def _hold_pixels(self, sent: Upload, share: Share) -> None:
        for role, count in sent.pixels.items():
            if count > self.limits.max_pixels:
                raise Refusal(
                    413,
                    f"the {role} has more than {self.limits.max_pixels} pixels",
                    hint="scale the picture down first",
                )
            if role == "guide":
                share.take(BYTES_A_PIXEL * count)

    async def _made(self, request: "Request", kind: str, body: bytes, share: Share, deadline: float) -> Answer:
        loop = asyncio.get_running_loop()
        sent = await loop.run_in_executor(self._pool, upload.take_apart, request, kind, body)
        fields = (*request.query_params.multi_items(), *sent.fields)
        options = read_options(fields, self.editor, self._batch, self.limits)
        self._hold_pixels(sent, share)
        job = await loop.run_in_executor(self._pool, self._prepare, sent, options)
        sent.files.clear()
        patience_s = max(0.0, deadline - loop.time())
        result = await asyncio.wrap_future(self.batcher.submit(job, options, patience_s))

        def png() -> bytes:
            encoded = io.BytesIO()
            output.png(result.pixels, record.describe(self.editor, options, result), result.guide.profile)(encoded)
            return encoded.getvalue()

        return Answer(await loop.run_in_executor(self._pool, png), result.seed)

    def _prepare(self, sent: Upload, options: EditOptions) -> Job:
        table = plan(self.editor.sde, **options.schedule())
        job = self.editor.prepare(sent.files["guide"], options, seed=options.seed, mask=sent.files.get("mask"))
        return replace(job, table=table)

    async def _while_wanted(self, request: "Request", work: Awaitable[Value], deadline: float) -> Value:
        """What comes of `work`, unless its time is over or the client leaves first; then it is cancelled."""
        loop = asyncio.get_running_loop()
        working = asyncio.ensure_future(work)
        leaving = asyncio.ensure_future(_left(request))
        try:
            patience_s = max(0.0, deadline - loop.time())
            done, _ = await asyncio.wait({working, leaving}, timeout=patience_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()
            working.cancel()
            await asyncio.gather(working, leaving, return_exceptions=True)  # so that its place is free by now
        if working in done:
            return working.result()
        if leaving in done:
            raise ClientLeft
        raise Refusal(
            504,
            f"the edit was not done within {self.limits.timeout_s:g} s",
            hint="ask for fewer steps, or try when less is going on",
        )


async def _left(request: "Request") -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
