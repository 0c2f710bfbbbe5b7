"""How these programs are told what to do: what is wrong is said before anything is measured, and in two lines."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import sdedit


def positive(text: str) -> int:
    """A whole number, at least 1."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def names(text: str) -> list[str]:
    """NAME,NAME…, each once."""
    return list(dict.fromkeys(text.split(",")))


def numbers(text: str) -> list[float]:
    """NUMBER,NUMBER…"""
    return [float(word) for word in text.split(",")]


def file_here(text: str) -> Path:
    """A file that is there."""
    if not (path := Path(text)).is_file():
        raise argparse.ArgumentTypeError(f"{text}: no such file")
    return path


def output_file(text: str) -> Path:
    """A file that can be written to later on: minutes of measuring would be lost."""
    if (path := Path(text)).is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: not a file's name in a folder that is there")
    return path


def program(main: Callable[[], int | None]) -> NoReturn:
    """Run a program; an SdeditError is an error and a hint."""
    try:
        sys.exit(main())
    except sdedit.SdeditError as error:
        sys.exit(f"error: {error}\nhint: {error.hint}")
