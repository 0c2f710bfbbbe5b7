"""Argument types and groups that commands share. Values are checked by the engine, once."""

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdedit.features import Convention

SCHEDULE = ("t0", "steps", "sampler", "eta", "spacing")  # what add_schedule adds


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-m", "--model", metavar="MODEL", help="the .onnx artifact or the .plan to run (default: the bundled model)"
    )


def add_schedule(parser: argparse._ActionsContainer) -> None:
    """Where the edit starts and how it steps back. Defaults are the artifact's own."""
    parser.add_argument(
        "--t0", type=float, help="start time in (0, 1]: 0.3 faithful … 0.6 realistic (default: the model's, else 0.5)"
    )
    add_steps(parser)


def add_steps(parser: argparse._ActionsContainer) -> None:
    """How an edit steps back from its t0."""
    parser.add_argument("--steps", type=int, metavar="N", help="denoising steps (default: the model's, else 50)")
    parser.add_argument(
        "--sampler",
        metavar="S",
        help="em, ancestral, ddim, dpmpp-2m-sde or er-sde (default: the model's, else ancestral)",
    )
    parser.add_argument(
        "--eta", type=float, metavar="E", help="fresh noise of ddim (default 0) and dpmpp-2m-sde (default 1)"
    )
    parser.add_argument(
        "--spacing",
        metavar="S",
        help="of the steps: uniform, log-sigma or karras (default: the model's for its sampler, else uniform)",
    )


def add_running(parser: argparse.ArgumentParser, set_type: Callable[[str], Any] | None = None) -> None:
    """How guides enter the model, its further inputs, and what executes it. set_type: where --set takes more."""
    parser.add_argument(
        "--repeats", type=int, metavar="K", help="passes, each starting from the last one's result (default 1)"
    )
    parser.add_argument(
        "--size",
        type=size,
        metavar="WxH",
        help="width and height, of a model exported with --dynamic (default: its own)",
    )
    parser.add_argument(
        "--fit",
        metavar="F",
        help="how a guide of another size enters the model's frame: crop (default), pad, stretch or exact",
    )
    parser.add_argument(
        "--set",
        type=set_type or condition,
        action="append",
        metavar="NAME=VALUE",
        help="a further input of the model, such as class_label=3",
    )
    parser.add_argument(
        "--backend",
        metavar="B",
        help="auto (default), ort-cpu, openvino, ort-cuda, ort-tensorrt, tensorrt or tensorrt-rtx",
    )
    parser.add_argument(
        "--ep-option",
        type=pair,
        action="append",
        metavar="KEY=VALUE",
        help="an option of the execution provider of ort-cuda or ort-tensorrt, in ONNX Runtime's own words",
    )
    parser.add_argument(
        "--precision",
        metavar="P",
        help="execute in P (fp32, tf32, fp16, bf16, int8): a model of that precision, or an fp32 one in what the "
        "machine has: fp16 or bf16 on ort-cpu and openvino, tf32 on ort-cuda (default: the model's own)",
    )
    parser.add_argument(
        "--fast",
        action="store_true",
        default=None,
        help="the fastest execution, in any precision, that passes verification on this machine; the first use looks "
        "for it among the backends and the model's other exports beside it",
    )
    parser.add_argument(
        "--threads", type=int, metavar="T", help="CPU threads of the network (default: every core this process may use)"
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def pair(text: str) -> tuple[str, str]:
    """NAME=VALUE"""
    name, separator, value = text.partition("=")
    if not separator or not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


def condition(text: str) -> tuple[str, float]:
    """NAME=NUMBER"""
    name, value = pair(text)
    try:
        return name, float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{value!r} is not a number") from None


def named(text: str) -> str:
    """A name that is not empty, as of a folder: "" would be the current one."""
    if not text:
        raise argparse.ArgumentTypeError("is empty")
    return text


def positive(text: str) -> int:
    """A whole number, at least 1."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def size(text: str) -> tuple[int, int]:
    """WIDTHxHEIGHT, or one number for a square."""
    width, _, height = text.lower().partition("x")
    try:
        return int(width), int(height or width)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT") from None


def convention(text: str) -> "Convention":
    """SIZE:LOW:HIGH, SIZE a number of pixels or own."""
    from sdedit.features import Convention

    try:
        side, low, high = text.split(":")
        return Convention(None if side == "own" else positive(side), float(low), float(high))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not SIZE:LOW:HIGH, such as own:-1:1") from None
