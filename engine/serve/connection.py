"""What uvicorn's connections lack: a time limit for heads and for readers, a limit to their number, JSON refusals."""

import asyncio
import json
from typing import TYPE_CHECKING, Any

from sdedit.serve.limits import Limits

if TYPE_CHECKING:
    from uvicorn.protocols.http.h11_impl import H11Protocol


def connection_class(limits: Limits, most: int) -> "type[H11Protocol]":
    """The protocol of one client's connection; `most` of them are open at a time."""
    import h11
    from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

    class Connection(H11Protocol):
        _head_timer: asyncio.TimerHandle | None = None
        _reader_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > most:
                self._refuse(
                    503, f"{most} connections are open already", "close some, or try again", [("Retry-After", "1")]
                )
            else:
                self._time_the_head()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._time_the_head()

        def connection_lost(self, exc: Exception | None) -> None:
            for timer in (self._head_timer, self._reader_timer):
                if timer is not None:
                    timer.cancel()
            super().connection_lost(exc)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._reader_timer = self.loop.call_later(limits.upload_s, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            if self._reader_timer is not None:
                self._reader_timer.cancel()

        def shutdown(self) -> None:
            if not self.transport.is_closing():
                super().shutdown()

        def send_400_response(self, msg: str) -> None:
            self._refuse(400, "this is not a valid HTTP request", "heads have at most 64 KiB; see RFC 9112")

        def _time_the_head(self) -> None:
            """From the first moment that a request could come to the end of its head. Between requests it is
            uvicorn's keep-alive timer that runs, until the first byte.
            """
            awaits_head = self.cycle is None or self.cycle.response_complete
            if awaits_head and self._head_timer is None:
                self._head_timer = self.loop.call_later(limits.upload_s, self._head_is_late)
            elif not awaits_head and self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None

        def _head_is_late(self) -> None:
            self._refuse(408, f"no request came within {limits.upload_s:g} s", "send the whole head at once")

        def _refuse(self, status: int, error: str, hint: str, headers: list[tuple[str, str]] | None = None) -> None:
            """Answer without a request to answer to, and close."""
            if self.transport.is_closing():
                return
            body = json.dumps({"error": error, "hint": hint}).encode()
            heads: list[Any] = [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
            heads += [*(headers or ()), ("Connection", "close")]
            try:
                for event in (
                    h11.Response(status_code=status, headers=heads, reason=STATUS_PHRASES[status]),
                    h11.Data(data=body),
                    h11.EndOfMessage(),
                ):
                    self.transport.write(self.conn.send(event) or b"")
            except h11.LocalProtocolError:  # in the middle of another answer
                self.transport.abort()
            else:
                self.transport.close()

    return Connection
