"""`sdedit bench`: cases in, one row each out."""

import argparse
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from sdedit.bench.cases import AXES
from sdedit.cli.arguments import condition, positive
from sdedit.cli.bench_formats import FORMATS
from sdedit.cli.exits import OK
from sdedit.cli.terminal import ProgressBar, say
from sdedit.errors import OptionError, OutOfTolerance, SdeditError

if TYPE_CHECKING:
    from sdedit.bench import Bench, Row

HELP = "measure edits: lists expand to cases, one row each"
WIDE = 0.15  # a spread above this is warned of
BUSY = 0.5  # and so is a load average above this, for each core
CONVENTIONS = """\
An edit is `batch` pictures, uint8 arrays in memory in and out; files are neither read nor written. Its times (p50,
p90, p99: interpolated between samples, so p99 of 15 runs is nearly the slowest) are the host's clock around it, end to
end. On a GPU the copies to and from it are inside, and the wait for the result: trtexec's Latency and what the host
does before and after, launching included (its Enqueue Time, not shown by itself). device ms is trtexec's GPU Compute
Time for all steps of an edit, by CUDA events between the copies. network ms, on a CPU, is the host's clock around the
network's calls. other ms is the edit less its network or device ms; ms/step is the edit over its steps. load ms and
first edit ms are of new processes: imports and loading; then one edit, which no other came before. Before anything is
measured, every case runs one step: plans are built there. Then all take turns, each turn a new process.

Exit code 3: a case's p50 is above --fail-above-ms; the rows are printed all the same.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = CONVENTIONS
    parser.add_argument(
        "models", nargs="*", metavar="MODEL", help="artifacts (.onnx) or plans (default: the bundled model)"
    )
    lists = parser.add_argument_group("what varies: one value, or a list with commas")
    for axis in AXES:
        lists.add_argument(
            f"--{axis.name}", type=listed(axis.metadata["kind"]), metavar="LIST", help=axis.metadata["help"]
        )
    parser.add_argument(
        "--set", type=condition, action="append", metavar="NAME=VALUE", help="a further input, such as class_label=3"
    )
    parser.add_argument("--fast", action="store_true", help="every case on what edit --fast takes, which its row names")
    effort = parser.add_mutually_exclusive_group()
    effort.add_argument("--runs", type=positive, metavar="N", help="timed edits of each case (default 15)")
    effort.add_argument("--seconds", type=float, metavar="S", help="instead: as many as fit into S, of each case")
    parser.add_argument(
        "--rounds", type=positive, metavar="N", help="turns that each case takes, each a new process (default 3)"
    )
    parser.add_argument(
        "--warmup", type=int, metavar="N", help="untimed edits after the first of each turn (default 1)"
    )
    parser.add_argument(
        "-o", "--output", type=known_format, default="md", metavar="FORMAT",
        help="md (default), csv, json or jsonl, on stdout; json, jsonl and csv have all conditions and raw samples",
    )  # fmt: skip
    parser.add_argument("--fail-above-ms", type=float, metavar="B", help="exit code 3 if any case's p50 is above B")


def run(arguments: argparse.Namespace) -> int:
    from sdedit.bench import Bench, Effort, expand

    gate = arguments.fail_above_ms
    if gate is not None and not gate > 0:
        raise OptionError(f"fail-above-ms is {gate:g}; wanted a number above 0", hint="--fail-above-ms 500")
    lists = {axis.name: values for axis in AXES if (values := getattr(arguments, axis.name)) is not None}
    names = ("runs", "seconds", "rounds", "warmup")
    effort = Effort(**{name: value for name in names if (value := getattr(arguments, name)) is not None})
    bench = Bench(expand(arguments.models or [None], lists, dict(arguments.set or ()), fast=arguments.fast), effort)
    try:
        measure(bench)
    except (KeyboardInterrupt, SdeditError):
        show(bench.rows(), arguments.output)  # what has been measured is not lost
        raise
    rows = bench.rows()
    try:
        show(rows, arguments.output)
    finally:  # also where nobody reads them any more
        require_below(rows, gate)
    return OK


def measure(bench: "Bench") -> None:
    bar = ProgressBar("visits")
    try:
        for done in bench.visits():
            bar.update(done, bench.total)
    finally:
        bar.close()


def show(rows: "Sequence[Row]", output: str) -> None:
    """The rows on stdout, and on stderr what speaks against them."""
    if not rows:
        return
    print(FORMATS[output](rows), end="", flush=True)
    busy = rows[0].load_average
    if busy is not None and busy > BUSY * rows[0].cores:
        say(f"warning: the load average was {busy} before anything was measured: something else is running")
    for row in rows:
        if row.spread > WIDE:
            say(warning(row))


def warning(row: "Row") -> str:
    return (
        f"warning: {case_of(row)}: its middle 80 % of edits spread over {row.spread:.0%} of the median: something else "
        "is running, or the clock varies; measure again, or with more --runs and --rounds"
    )


def require_below(rows: "Sequence[Row]", gate: float | None) -> None:
    """Raise OutOfTolerance if a median is above the gate."""
    above = [row for row in rows if gate is not None and row.p50_ms > gate]
    if above:
        worst = max(above, key=lambda row: row.p50_ms)
        raise OutOfTolerance(
            f"{len(above)} of {len(rows)} cases have a p50 above {gate:g} ms, the slowest {worst.p50_ms:.1f} ms: "
            f"{case_of(worst)}",
            hint="the rows on stdout say where the time goes",
        )


def case_of(row: "Row") -> str:
    return (
        f"{row.file}, {row.backend}, {row.precision}, threads {row.threads}, batch {row.batch}, t0 {row.t0:g}, "
        f"{row.steps} steps of {row.sampler} ({row.spacing})"
        + ("" if row.eta is None else f", eta {row.eta:g}")
        + ("" if row.repeats == 1 else f", repeats {row.repeats}")
    )


def listed(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """A reader of VALUE,VALUE,… for argparse."""

    def read(text: str) -> list[Any]:
        words = text.split(",")
        if not all(word.strip() for word in words):
            raise argparse.ArgumentTypeError(f"{text!r} has an empty value; wanted a list such as 20,50")
        try:
            return [kind(word.strip()) for word in words]
        except ValueError:
            wanted = {int: "whole numbers", float: "numbers"}[kind]  # type: ignore[index]
            raise argparse.ArgumentTypeError(f"{text!r}: wanted {wanted}, with commas between") from None

    return read


def known_format(text: str) -> str:
    if text not in FORMATS:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not one of {', '.join(FORMATS)}: the format of stdout, which '>' sends to a file"
        )
    return text
