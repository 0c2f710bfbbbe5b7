"""The process of a service: start, signals, and a stop that loses nothing it has promised."""

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

from sdedit.errors import BackendUnavailable
from sdedit.serve.service import Service
from sdedit.serve.sockets import Listener

if TYPE_CHECKING:
    import uvicorn

    from sdedit.serve.app import App

MOST_CONNECTIONS = 16_384
SPARE_FILES = 64  # that are no connections
KEEP_ALIVE_S = 15
LONGEST_HEAD = 64 * 1024  # bytes
FLUSH_S = 5.0  # for the last answers, once there is nothing more to edit
_log = logging.getLogger("sdedit.serve")


def require() -> None:
    """Raise BackendUnavailable unless the packages of the extra are there."""
    try:
        import prometheus_client  # noqa: F401
        import python_multipart  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise BackendUnavailable(
            f"serve: {error.name} is not installed", hint="pip install 'sdedit-engine[serve]'"
        ) from error


def run(service: Service, model: dict[str, Any], listener: Listener, on_ready: Callable[[], None]) -> None:
    """Serve on a bound socket until SIGTERM or SIGINT, then drain. A second signal leaves at once.

    model: what GET /model answers. on_ready: called when the warm-up is done. Raises what these two raised.
    """
    asyncio.run(create(service, model, listener, on_ready).serve())


def create(
    service: Service, model: dict[str, Any], listener: Listener, on_ready: Callable[[], None]
) -> "uvicorn.Server":
    """The server that `run` runs; it stops when its `should_exit` is set."""
    import uvicorn

    from sdedit.serve.app import application
    from sdedit.serve.connection import connection_class

    class Server(uvicorn.Server):
        failure: BaseException | None = None

        async def serve(self, sockets: Any = None) -> None:
            await super().serve([listener.socket])
            if self.failure is not None:
                raise self.failure

        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            service.batcher.start()
            self._warming = asyncio.create_task(self._announce())

        async def _announce(self) -> None:
            try:
                await asyncio.wrap_future(service.batcher.warm)
                on_ready()
            except Exception as error:
                self.failure, self.should_exit = error, True

        async def shutdown(self, sockets: Any = None) -> None:
            service.drain()
            flushing = asyncio.create_task(self._flush())
            await super().shutdown(sockets)
            flushing.cancel()

        async def _flush(self) -> None:
            """Cut off who does not read the last answers."""
            await asyncio.to_thread(service.batcher.join)
            await asyncio.sleep(FLUSH_S)
            for connection in list(self.server_state.connections):
                connection.transport.abort()

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            if self.should_exit:
                listener.remove()
                os._exit(128 + sig)  # an edit may run in its thread, which an orderly exit would wait for
            self.should_exit = True
            _log.info("%s: finishing what is queued", signal.Signals(sig).name)

    app: App = application(service, model)
    config = uvicorn.Config(
        app,
        http=connection_class(service.limits, most_connections()),
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="critical",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        h11_max_incomplete_event_size=LONGEST_HEAD,
    )
    return Server(config)


def most_connections() -> int:
    """As many as this process may open files, which is raised as far as the system lets it."""
    if sys.platform == "win32":
        return 500
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_CONNECTIONS + SPARE_FILES
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return most - SPARE_FILES
