"""`sdedit`: one parser, one place where errors become exit codes."""

import argparse
import json
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import sdedit
from sdedit.cli import doctor, edit, inspect
from sdedit.cli.exits import FAILED, INTERRUPTED, OK, USAGE
from sdedit.errors import OptionError, SdeditError

COMMANDS = {"edit": edit, "inspect": inspect, "doctor": doctor}


class Parser(argparse.ArgumentParser):
    """argparse, with its errors as one `error:` and one `hint:` line."""

    def error(self, message: str) -> NoReturn:
        raise SystemExit(_fail(message, f"see '{self.prog} -h'", USAGE))


def build_parser() -> Parser:
    parser = Parser(prog="sdedit", description="Edit pictures with SDEdit: noise a guide up to t0, denoise it back.")
    parser.add_argument("--version", action="version", version=f"sdedit-engine {sdedit.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, module in COMMANDS.items():
        command = commands.add_parser(name, help=module.HELP, description=module.HELP, allow_abbrev=False)
        module.add_arguments(command)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, 1 failed, 2 usage, 130 interrupted."""
    debug = os.environ.get("SDEDIT_DEBUG") == "1"
    try:
        with _process_of_our_own(debug):
            options = build_parser().parse_args(arguments)
            code = int(COMMANDS[options.command].run(options))
            if sys.stdout is not None:
                sys.stdout.flush()
            return code
    except SdeditError as error:
        if debug:
            raise
        return _fail(str(error), error.hint, USAGE if isinstance(error, OptionError) else FAILED)
    except KeyboardInterrupt:
        return _fail("interrupted, nothing was written", "run the command again", INTERRUPTED)
    except BrokenPipeError:  # who read our answers has left
        _drop_stdout()
        return OK
    except MemoryError:
        return _fail("out of memory", "use fewer samples at once, or a smaller picture", FAILED)
    except OSError as error:
        if debug:
            raise
        _drop_stdout()
        return _fail(f"{error.filename or 'stdout'}: {error.strerror or error}", "check the disk and the names", FAILED)
    except Exception as error:
        if debug:
            raise
        message = f"unexpected {type(error).__name__}: {error}"
        return _fail(message, "SDEDIT_DEBUG=1 shows where; please report it", FAILED)


@contextmanager
def _process_of_our_own(debug: bool) -> Iterator[None]:
    """What a command may do and a library may not: silence other packages' warnings, print any name on any
    terminal, and clean up when told to terminate.
    """
    if sys.stderr is None:  # closed by the caller
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    mine = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _terminate) if mine else None
    try:
        with warnings.catch_warnings():
            if not debug:
                warnings.simplefilter("ignore")
            yield
    finally:
        if mine:
            signal.signal(signal.SIGTERM, before)


def _terminate(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)


def _drop_stdout() -> None:
    """Let what is still buffered go nowhere, so that leaving the process does not fail on it."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str, hint: str, code: int) -> int:
    print(f"error: {' '.join(message.split())}\nhint: {' '.join(hint.split())}", file=sys.stderr)
    return code


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


if __name__ == "__main__":
    sys.exit(main())
