"""`sdedit`: one parser, one place where errors become exit codes."""

import argparse
import logging
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import NoReturn

import sdedit
from sdedit.cli.exits import FAILED, INTERRUPTED, OK, OUT_OF_TOLERANCE, USAGE
from sdedit.errors import OptionError, OutOfTolerance, SdeditError

# Each is a module of sdedit.cli.
COMMANDS = (
    "edit", "batch", "serve", "strokes", "compose", "tune", "evaluate", "export", "build", "verify", "bench", "inspect",
    "doctor",
)  # fmt: skip


class Parser(argparse.ArgumentParser):
    """argparse, with its errors as one `error:` and one `hint:` line."""

    def error(self, message: str) -> NoReturn:
        raise SystemExit(_fail(message, f"see '{self.prog} -h'", USAGE))


def build_parser(names: Sequence[str] = COMMANDS) -> Parser:
    """names: the commands it is to know; one alone is built sooner than all."""
    parser = Parser(prog="sdedit", description="Edit pictures with SDEdit: noise a guide up to t0, denoise it back.")
    parser.add_argument("--version", action="version", version=f"sdedit-engine {sdedit.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in names:
        module = import_module(f"sdedit.cli.{name}")
        command = commands.add_parser(name, help=module.HELP, description=module.HELP, allow_abbrev=False)
        module.add_arguments(command)
        command.set_defaults(parser=command, run=module.run)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, 1 failed, 2 usage, 3 out of tolerance, 130 interrupted.

    argparse leaves by SystemExit, for -h with 0 and for words it does not know with 2.
    """
    debug = os.environ.get("SDEDIT_DEBUG") == "1"
    try:
        with _process_of_our_own(debug):
            given = sys.argv[1:] if arguments is None else arguments
            named = given[:1] if given and given[0] in COMMANDS else COMMANDS
            options, unknown = build_parser(named).parse_known_args(given)
            if unknown:
                options.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
            code = int(options.run(options))
            if sys.stdout is not None:
                sys.stdout.flush()
            return code
    except KeyboardInterrupt:
        return _fail("interrupted", "run the command again", INTERRUPTED)
    except BrokenPipeError:  # who read our answers has left
        _drop_stdout()
        return OK
    except Exception as error:
        if debug:
            traceback.print_exc()
        if isinstance(error.__context__, BrokenPipeError):
            _drop_stdout()
        return _fail(*_explain(error))


def _explain(error: Exception) -> tuple[str, str, int]:
    """Message, hint and exit code."""
    match error:
        case SdeditError():
            codes = {OptionError: USAGE, OutOfTolerance: OUT_OF_TOLERANCE}
            return str(error), error.hint, codes.get(type(error), FAILED)
        case MemoryError():
            return "out of memory", "use fewer samples at once, or a smaller picture", FAILED
        case OSError():
            _drop_stdout()
            message = f"{error.filename or 'stdout'}: {error.strerror or error}"
            return message, "check the disk and the names", FAILED
    return f"unexpected {type(error).__name__}: {error}", "SDEDIT_DEBUG=1 shows where; please report it", FAILED


@contextmanager
def _process_of_our_own(debug: bool) -> Iterator[None]:
    """What a command may do and a library may not: silence other packages' warnings, show our log on stderr, print
    any name on any terminal, and clean up when told to terminate.
    """
    if sys.stderr is None:  # closed by the caller
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    told = logging.StreamHandler(sys.stderr)
    log = logging.getLogger("sdedit")
    log.addHandler(told)
    log.setLevel(logging.INFO)
    ends = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
    if threading.current_thread() is not threading.main_thread():
        ends = []
    before = {number: signal.getsignal(number) for number in ends}
    for number in ends:
        if before[number] != signal.SIG_IGN:  # as nohup has it
            signal.signal(number, _terminate)
    try:
        with warnings.catch_warnings():
            if not debug:
                warnings.simplefilter("ignore")
            yield
    finally:
        log.removeHandler(told)
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def _terminate(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)


def _drop_stdout() -> None:
    """Let what is still buffered go nowhere, so that leaving the process does not fail on it."""
    if sys.stdout is not None:
        with suppress(OSError):  # it may have no file behind it
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str, hint: str, code: int) -> int:
    print(f"error: {' '.join(message.split())}\nhint: {' '.join(hint.split())}", file=sys.stderr)
    return code


def command() -> NoReturn:
    """The process `sdedit`. After an edit it leaves without unloading its libraries, a tenth of a short edit's time."""
    code = main()
    if sys.argv[1:2] == ["edit"]:  # whose files are written and closed
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                with suppress(OSError):
                    stream.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    command()
