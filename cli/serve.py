"""`sdedit serve`: the editor stays loaded, pictures come and go over HTTP."""

import argparse
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sdedit.cli.arguments import add_json, add_model, pair
from sdedit.cli.exits import OK
from sdedit.cli.terminal import print_json, say
from sdedit.errors import OptionError

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from sdedit.serve.sockets import Listener

HELP = "serve edits over HTTP, to this machine or through a Unix socket"
LIMITS = {  # flag -> the field of Limits, its unit, what it says
    "queue": ("queue", int, "N", "requests that may wait; more get 503 and Retry-After (default 64)"),
    "timeout": ("timeout_s", float, "S", "seconds from a whole request to its picture, else 504 (default 60)"),
    "upload-timeout": ("upload_s", float, "S", "seconds for a request's head, and for its body, else 408 (default 30)"),
    "drain": ("drain_s", float, "S", "seconds for the queue once told to stop; what is left gets 503 (default 10)"),
    "max-body": ("max_body", int, "BYTES", "of a request, else 413 (default 33554432)"),
    "max-pixels": ("max_pixels", int, "N", "pixels of a guide, else 413 (default 16777216)"),
    "max-frame": ("max_frame", int, "N", "pixels of `size`, for a model that takes any (default 1048576)"),
    "max-steps": ("max_steps", int, "N", "steps times repeats of a request (default 1000)"),
    "memory": ("memory", int, "BYTES", "that all requests together hold, else 503 (default 1073741824)"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    where = parser.add_argument_group("where")
    where.add_argument("--socket", metavar="PATH", help="a Unix socket, for this user only, instead of a port")
    where.add_argument("--host", metavar="H", help="address to listen on (default 127.0.0.1, this machine only)")
    where.add_argument("--port", type=int, metavar="P", help="port to listen on; 0 is any free one (default 8000)")
    where.add_argument(
        "--allow-remote", action="store_true", help="listen on an address that other machines reach; there is no login"
    )
    running = parser.add_argument_group("what runs")
    running.add_argument(
        "--backend", default="auto", metavar="B", help="auto (default), ort-cpu, openvino, ort-cuda, tensorrt …"
    )
    running.add_argument("--ep-option", type=pair, action="append", metavar="KEY=VALUE", help="as for 'sdedit edit'")
    running.add_argument("--precision", metavar="P", help="as for 'sdedit edit'")
    running.add_argument("--fast", action="store_true", help="as for 'sdedit edit'")
    running.add_argument("--threads", type=int, metavar="T", help="CPU threads of the network (default: every core)")
    running.add_argument(
        "--batch", type=int, default=1, metavar="N",
        help="requests that share a network call, where their options but seed, t0 and fit are equal; faster on a GPU "
        "(default 1)",
    )  # fmt: skip
    limits = parser.add_argument_group("limits")
    for flag, (name, kind, unit, says) in LIMITS.items():
        limits.add_argument(f"--{flag}", dest=name, type=kind, metavar=unit, help=says)
    parser.add_argument("--quiet", action="store_true", help="no line for each request on stderr")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    import sdedit
    from sdedit import artifact
    from sdedit.cli.inspect import describe
    from sdedit.options import EditOptions
    from sdedit.serve import server
    from sdedit.serve.limits import Limits
    from sdedit.serve.service import Service

    server.require()
    given = {name: value for name, *_ in LIMITS.values() if (value := getattr(arguments, name)) is not None}
    limits = Limits(**given)
    batch = EditOptions(batch=arguments.batch).resolved({}).batch
    with listener(arguments) as listening:  # before the model is loaded: a port that is taken is said at once
        editor = sdedit.load(
            arguments.model,
            backend=arguments.backend,
            precision=arguments.precision,
            fast=arguments.fast,
            threads=arguments.threads,
            provider_options=dict(arguments.ep_option or ()),
        )
        path = artifact.BUNDLED if arguments.model is None else Path(arguments.model)
        path = editor.artifact.path if arguments.fast else path  # which may be that of another export
        model = describe(path)[1] | {"path": path.name}
        backend = editor.backend
        say(f"{editor.artifact.name} on {backend.name}, {backend.precision}, batch {batch}: warming up")
        logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # it would tell of every broken form
        if arguments.quiet:
            logging.getLogger("sdedit.serve").setLevel(logging.WARNING)

        def on_ready() -> None:
            if arguments.json:
                print_json({"address": listening.address, "backend": backend.name, "batch": batch})
            else:
                print(listening.address)
            if sys.stdout is not None:  # closed by the caller
                sys.stdout.flush()

        with editor:  # closed once the last edit is done
            server.run(Service(editor, batch, limits), model, listening, on_ready)
    return OK


def listener(arguments: argparse.Namespace) -> "AbstractContextManager[Listener]":
    """Where to listen. Raises OptionError, OutputError."""
    from sdedit.serve import sockets

    if arguments.socket is not None:
        if (arguments.host, arguments.port, arguments.allow_remote) != (None, None, False):
            raise OptionError("--socket goes without --host, --port and --allow-remote", hint="leave them out")
        return sockets.unix(Path(arguments.socket))
    host = "127.0.0.1" if arguments.host is None else arguments.host
    port = 8000 if arguments.port is None else arguments.port
    return sockets.tcp(host, port, allow_remote=arguments.allow_remote)
