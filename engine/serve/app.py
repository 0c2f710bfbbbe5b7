"""The service as an ASGI application: routes, answers, and one line in the log for each request."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from sdedit.serve.refusal import Refusal, refusal
from sdedit.serve.service import Service
from sdedit.serve.upload import ClientLeft

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

PATHS = ("/edit", "/healthz", "/readyz", "/metrics", "/model")
LINGER_S = 2.0  # for a client that still sends what was refused
SEED = "Sdedit-Seed"
_log = logging.getLogger("sdedit.serve")


def application(service: Service, model: dict[str, Any]) -> App:
    """The service's application. model: what GET /model answers."""
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    class Nothing(Response):
        async def __call__(self, *_: object) -> None:
            """Nobody is there to be answered."""

    def told(error: Refusal) -> Response:
        return JSONResponse({"error": str(error), "hint": error.hint}, error.status, error.headers)

    async def edit(request: "Request") -> "Response":
        with service.metrics.in_flight.track_inprogress():
            try:
                answer = await service.edit(request)
            except ClientLeft:
                return Nothing()
            except Exception as error:
                refused = refusal(error)
                if refused.status == 500:
                    _log.error("%s: %s", type(error).__name__, error, exc_info=_log.isEnabledFor(logging.DEBUG))
                return told(refused)
            return Response(answer.png, media_type="image/png", headers={SEED: str(answer.seed)})

    async def healthz(request: "Request") -> "Response":
        alive = service.batcher.alive
        return JSONResponse({"alive": alive}, 200 if alive else 503)

    async def readyz(request: "Request") -> "Response":
        ready = service.batcher.ready
        why = "ready" if ready else "stopping" if service.draining else "warming up"
        return JSONResponse({"ready": ready, "state": why}, 200 if ready else 503)

    async def metrics(request: "Request") -> "Response":
        text, media_type = service.metrics.text()
        return Response(text, headers={"Content-Type": media_type})

    async def describe(request: "Request") -> "Response":
        return JSONResponse(model)

    async def other(request: "Request", error: Exception) -> "Response":
        status = error.status_code if isinstance(error, HTTPException) else 500
        allowed = dict(error.headers or {}) if isinstance(error, HTTPException) else {}
        hints = {404: f"there is {', '.join(PATHS)}", 405: f"wanted {allowed.get('Allow', 'another method')}"}
        message = f"{request.method} {request.url.path[:100]}: {_PHRASES.get(status, 'cannot be done')}"
        hint = hints.get(status, "see the README")
        return JSONResponse({"error": message, "hint": hint}, status, allowed)

    handlers = (edit, healthz, readyz, metrics, describe)
    routes = [
        Route(path, handler, methods=["POST" if handler is edit else "GET"])
        for path, handler in zip(PATHS, handlers, strict=True)
    ]
    return _watched(Starlette(routes=routes, exception_handlers={HTTPException: other, Exception: other}), service)


_PHRASES = {404: "there is no such path", 405: "not with this method"}


def _watched(app: "Starlette", service: Service) -> App:
    """The application with its requests counted and logged, and refusals that a client can still read."""

    async def watched(scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        began = time.perf_counter()
        status, length, seed = "left", 0, ""
        body_is_read = not {b"content-length", b"transfer-encoding"} & {name for name, _ in scope["headers"]}

        async def received() -> Message:
            nonlocal body_is_read
            message = await receive()
            body_is_read |= message["type"] != "http.request" or not message.get("more_body")
            return message

        async def sent(message: Message) -> None:
            nonlocal status, length, seed
            if message["type"] == "http.response.start":
                status = str(message["status"])
                headers = dict(message["headers"])
                seed = headers.get(SEED.lower().encode(), b"").decode()
                if message["status"] >= 400 and not body_is_read:
                    message["headers"] = [*message["headers"], (b"connection", b"close")]
            elif message["type"] == "http.response.body":
                length += len(message.get("body", b""))
                if not message.get("more_body") and not body_is_read and int(status) >= 400:
                    await send({**message, "more_body": True})
                    await _linger(received)
                    message = {"type": "http.response.body", "body": b""}
            await send(message)

        try:
            await app(scope, received, sent)
        finally:
            path = scope["path"] if scope["path"] in PATHS else "other"
            seconds = time.perf_counter() - began
            service.metrics.requests.labels(path, status).inc()
            if path == "/edit":
                service.metrics.request_seconds.labels(status).observe(seconds)
            target = scope["raw_path"].decode("ascii", "backslashreplace")[:200]
            more = f" seed {seed}" if seed else ""
            _log.info("%s %s %s %d bytes %.0f ms%s", scope["method"], target, status, length, 1e3 * seconds, more)

    return watched


async def _linger(receive: Receive) -> None:
    """Throw away what still comes, so that the answer is not lost with a connection that is reset."""
    with suppress(TimeoutError):
        async with asyncio.timeout(LINGER_S):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect" or not message.get("more_body"):
                    return
