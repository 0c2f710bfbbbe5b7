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
    from starlette.requests import Request
    from starlette.responses import Response

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Scope = MutableMapping[str, Any]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

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
    app = Starlette(routes=routes, exception_handlers={HTTPException: other, Exception: other})
    return _counted(_lingering(app), service)


_PHRASES = {404: "there is no such path", 405: "not with this method"}


def _counted(app: App, service: Service) -> App:
    """The application with its requests counted, and logged."""

    async def counted(scope: Scope, receive: Receive, send: Send) -> None:
        began = time.perf_counter()
        status, length, seed = "left", 0, ""

        async def sent(message: Message) -> None:
            nonlocal status, length, seed
            if message["type"] == "http.response.start":
                status = str(message["status"])
                seed = dict(message["headers"]).get(SEED.lower().encode(), b"").decode()
            length += len(message.get("body", b""))
            await send(message)

        try:
            await app(scope, receive, sent)
        finally:
            path = scope["path"] if scope["path"] in PATHS else "other"
            seconds = time.perf_counter() - began
            service.metrics.requests.labels(path, status).inc()
            if path == "/edit":
                service.metrics.request_seconds.labels(status).observe(seconds)
            target = scope["raw_path"].decode("ascii", "backslashreplace")[:200]
            more = f" seed {seed}" if seed else ""
            _log.info("%s %s %s %d bytes %.0f ms%s", scope["method"], target, status, length, 1e3 * seconds, more)

    return counted


def _lingering(app: App) -> App:
    """The application, whose refusals reach also a client that is still sending: the connection is closed after them,
    but not at once, for a connection that is reset may lose the answer.
    """

    async def lingering(scope: Scope, receive: Receive, send: Send) -> None:
        more_comes = bool({b"content-length", b"transfer-encoding"} & {name for name, _ in scope["headers"]})
        refused = False

        async def received() -> Message:
            nonlocal more_comes
            message = await receive()
            more_comes = message["type"] == "http.request" and bool(message.get("more_body"))
            return message

        async def sent(message: Message) -> None:
            nonlocal refused
            if message["type"] == "http.response.start" and message["status"] >= 400 and more_comes:
                refused = True
                message["headers"] = [*message["headers"], (b"connection", b"close")]
            elif refused and not message.get("more_body"):
                await send({**message, "more_body": True})
                with suppress(TimeoutError):
                    async with asyncio.timeout(LINGER_S):
                        while more_comes:
                            await received()
                message = {"type": "http.response.body"}
            await send(message)

        await app(scope, received, sent)

    return lingering
