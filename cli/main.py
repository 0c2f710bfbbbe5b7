"""`sdedit`: one parser, one place where errors become exit codes."""

import argparse
import json
import os
import sys
from typing import Any, NoReturn

import sdedit
from sdedit.cli import doctor, edit, inspect
from sdedit.cli.exits import FAILED, INTERRUPTED, OK, USAGE
from sdedit.errors import OptionError, SdeditError

COMMANDS = {"edit": edit, "inspect": inspect, "doctor": doctor}


class Parser(argparse.ArgumentParser):
    """argparse, with its errors as one `error:` and one `hint:` line."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {message}\nhint: see '{self.prog} -h'", file=sys.stderr)
        raise SystemExit(USAGE)


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
    try:
        options = build_parser().parse_args(arguments)
        return int(COMMANDS[options.command].run(options))
    except SdeditError as error:
        if os.environ.get("SDEDIT_DEBUG") == "1":
            raise
        return _fail(str(error), error.hint, USAGE if isinstance(error, OptionError) else FAILED)
    except KeyboardInterrupt:
        return _fail("interrupted, nothing was written", "run the command again", INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except MemoryError:
        return _fail("out of memory", "use fewer samples at once, or a smaller picture", FAILED)
    except Exception as error:
        if os.environ.get("SDEDIT_DEBUG") == "1":
            raise
        return _fail(
            f"unexpected {type(error).__name__}: {error}", "SDEDIT_DEBUG=1 shows where; please report it", FAILED
        )


def _fail(message: str, hint: str, code: int) -> int:
    one_line = " ".join(message.split())
    print(f"error: {one_line}\nhint: {hint}", file=sys.stderr)
    return code


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


if __name__ == "__main__":
    sys.exit(main())
