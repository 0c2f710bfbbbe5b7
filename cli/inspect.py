"""`sdedit inspect`: what an artifact or a plan says of itself, its step table, or the record in a picture."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdedit.cli.arguments import SCHEDULE, add_json, add_schedule, named
from sdedit.cli.exits import OK
from sdedit.cli.terminal import print_json
from sdedit.errors import OptionError

if TYPE_CHECKING:
    from sdedit.artifact import Artifact
    from sdedit.protobuf import Tensor

HELP = "show an artifact's or plan's metadata, inputs and outputs, its step table, or the record in a PNG"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file",
        type=named,
        nargs="?",
        metavar="FILE",
        help="an artifact, a plan, an edit of --loop, or a PNG that 'sdedit edit' wrote (default: the bundled model)",
    )
    add_schedule(parser)
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    from sdedit import artifact, record

    path = artifact.BUNDLED if arguments.file is None else Path(arguments.file)
    if path.suffix.lower() == ".png":
        refuse_table(path, arguments)
        fields = record.read_json(path)
        print_json({"path": str(path), "record": fields} if arguments.json else fields)
        return OK
    if path.suffix != ".plan" and (edit := artifact.loop_metadata(path)) is not None:
        refuse_table(path, arguments)
        print_json({"path": str(path), "edit": edit} if arguments.json else edit)
        return OK
    opened, described = describe(path)
    if asked_of_table(arguments):
        described["table"] = step_table(opened, arguments)
    if arguments.json:
        print_json(described)
    else:
        show(described)
    return OK


def asked_of_table(arguments: argparse.Namespace) -> list[str]:
    """The options of a step table that were given."""
    return [name for name in SCHEDULE if getattr(arguments, name) is not None]


def refuse_table(path: Path, arguments: argparse.Namespace) -> None:
    """Raise OptionError if a step table is asked for: only models have a schedule of their own."""
    if given := asked_of_table(arguments):
        raise OptionError(f"{path}: --{given[0]} asks for a step table, and this is no model", hint="leave it out")


def describe(path: Path) -> tuple["Artifact", dict[str, Any]]:
    """A model, and what --json says of it."""
    from sdedit import artifact

    if path.suffix == ".plan":
        return plan_and_sidecar(path)
    opened = artifact.read(path)
    return opened, {
        "path": str(path),
        "size_bytes": opened.size_bytes,
        "sha256": opened.sha256,
        "opset": opened.opset,
        "metadata": opened.metadata,
        "inputs": [tensor(t) for t in opened.inputs],
        "outputs": [tensor(t) for t in opened.outputs],
    }


def plan_and_sidecar(path: Path) -> tuple["Artifact", dict[str, Any]]:
    """The artifact that a plan was built from, and the plan's sidecar."""
    from sdedit.tensorrt import plan

    opened = plan.read(path)
    return opened.artifact, {"path": str(path), **opened.sidecar}


def tensor(t: "Tensor") -> dict[str, Any]:
    return {"name": t.name, "dtype": t.element, "shape": None if t.shape is None else list(t.shape)}


def step_table(opened: "Artifact", arguments: argparse.Namespace) -> dict[str, Any]:
    """The step table as JSON: one row a step, columns named."""
    from sdedit.options import EditOptions
    from sdedit.schedule import COLUMNS, plan

    chosen = EditOptions(**{name: getattr(arguments, name) for name in SCHEDULE}).resolved(opened.defaults)
    table = plan(opened.sde, **chosen.schedule())
    return {"version": table.version, **chosen.schedule(), "columns": list(COLUMNS), "rows": table.rows.tolist()}


def show(described: dict[str, Any]) -> None:
    metadata = described["metadata"]
    image, sde = metadata["image"], dict(metadata["sde"])
    if sde["kind"] == "vp-discrete":
        levels = sde["alphas_cumprod"]
        sde["alphas_cumprod"] = f"{len(levels)} levels, {levels[0]:.6g} … {levels[-1]:.3g}"
    kind = sde.pop("kind")
    plan = described.get("plan")
    size, sha256 = (plan["bytes"], plan["sha256"]) if plan else (described["size_bytes"], described["sha256"])
    print(f"{described['path']}  {size / 1e6:.1f} MB  sha256 {sha256[:16]}…")
    rows = {
        "name": metadata.get("name", "-"),
        **(plan_rows(described) if plan else {}),
        "image": f"{image['channels']} x {image['height']} x {image['width']} (channels, height, width)",
        "sde": f"{kind}  " + "  ".join(f"{name} {value}" for name, value in sde.items()),
        "defaults": "  ".join(f"{name} {value}" for name, value in (metadata.get("defaults") or {}).items()) or "-",
        "precision": metadata.get("precision", "fp32"),
        "license": metadata.get("license", "-"),
        "opset": described["artifact"]["opset"] if plan else described["opset"],
    }
    shown = {"format", "image", "sde", "defaults", *rows}
    rows |= {name: json.dumps(value, ensure_ascii=False) for name, value in metadata.items() if name not in shown}
    for side in ("inputs", "outputs"):
        rows[side] = "  ".join(f"{t['name']} {t['dtype']} {_shape(t['shape'])}" for t in described[side])
    for name, value in rows.items():
        print(f"  {name:<13}{value}")
    if table := described.get("table"):
        print(f"\n{'step':>6}" + "".join(f"{name:>13}" for name in table["columns"]))
        for number, row in enumerate(table["rows"], start=1):
            print(f"{number:>6}" + "".join(f"{value:>13.6g}" for value in row))


def plan_rows(sidecar: dict[str, Any]) -> dict[str, str]:
    """What a plan has to say beside its artifact."""
    origin, gpu, activation = sidecar["artifact"], sidecar["gpu"], sidecar.get("activation_bytes")
    on = f"on {gpu['name']}, driver {gpu['driver']}" if gpu else "ahead of time"
    return {
        "plan": f"{sidecar['library']['name']} {sidecar['library']['version']}  {', '.join(sidecar['targets'])}",
        "built": f"{sidecar.get('built', '-')}  {on}",
        "from": f"{origin['name']}  sha256 {origin['sha256'][:16]}…",
        "batch": ":".join(map(str, sidecar["profile"]["batch"])) + " (least, tuned for, most)",
        "activation": "  ".join(f"{size / 1e6:.1f} MB" for size in activation) if activation else "-",
    }


def _shape(shape: list[Any] | None) -> str:
    return "[?]" if shape is None else "[" + ", ".join("?" if size is None else str(size) for size in shape) + "]"
