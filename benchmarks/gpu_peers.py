"""What a user would use instead on a GPU, beside sdedit: same weights, steps and GPU, interleaved rounds.

python benchmarks/gpu_peers.py -o RESULT.json --artifacts DIR [--networks unet-64,bundled] [--batches 1]
python benchmarks/gpu_peers.py --device cpu ...                       the script itself, where there is no GPU

DIR holds NAME.onnx and NAME-fp16.onnx of every network but the bundled one (`sdedit export`); PyTorch's weights are
read from NAME.onnx. ddpm-256 without artifacts has PyTorch's rows only, with random weights.

Every contestant lives in a process of its own. They open side by side; then, one at a time, each is compared with
ort-cpu and warmed up. A round is a few edits of each, in turn, every second round backwards, the first of a turn not
counted; an edit is timed by the host's clock, uint8 pixels on the host in and out. A contestant that fails is named
and left out. The result is written after every step.
"""

import argparse
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from arguments import output_file, positive, program
from conditions import conditions
from gpu_peer_loops import BUNDLED, CONTESTANTS, LEVELS, OURS, SCHEDULER, Setting, levels, network_input
from gpu_peers_table import table
from kept import keep
from processes import Process, Row, serve

import sdedit

PACKAGES = (
    *("torch", "diffusers", "triton", "nvidia-cudnn-cu13"),
    *("onnx", "onnxruntime", "onnxruntime-gpu", "cuda-bindings"),
)
COUNTED = 3  # edits of a turn
TOLERANCES = {"fp32": 1e-3, "TF32": 0.05, "fp16": 0.05, "bf16": 0.3}
LARGE = ("torch fp32 graph", "torch fp16", "torch fp16 graph", "sdedit fp16", "sdedit fp16 TensorRT")
SOME = (
    *("torch eager fp32", "torch fp16", "torch fp16 graph", "torch fp16 compile graph", OURS, "sdedit fp16"),
    "sdedit fp16 TensorRT",
)
CONTESTANTS_OF = {BUNDLED: SOME, "ddpm-256": LARGE}  # of the others, all


# --- a contestant's process ------------------------------------------------------------------------------------------


def open_contestant(name: str, told: Row) -> Callable[[str], Row]:
    """What answers `check FILE.npy` and `edit BATCH`."""
    setting = Setting(**told | {key: told[key] and Path(told[key]) for key in ("fp32", "fp16")})
    kind, options = CONTESTANTS[name]
    contestant, picture = kind(setting, **options), a_picture(setting)

    def respond(line: str) -> Row:
        word, _, rest = line.partition(" ")
        if word == "check":
            ((what, found),) = contestant.check(picture).items()
            np.save(rest, found)
            return {"compared": what, "said": contestant.said()}
        edit_ms = [timed(contestant, picture, int(rest)) for _ in range(COUNTED + 1)][1:]
        return {"edit_ms": edit_ms, "said": contestant.said()}

    return respond


def timed(contestant: Any, picture: Any, batch: int) -> float:
    began = time.perf_counter()
    made = contestant.edit(picture, batch)
    took = 1e3 * (time.perf_counter() - began)
    if made.shape != (batch, *picture.shape) or made.dtype != np.uint8:
        raise ValueError(f"made {made.dtype} {made.shape}")
    return round(took, 4)


def a_picture(setting: Setting) -> Any:
    return np.random.default_rng(0).integers(0, 256, (setting.size, setting.size, 3), np.uint8)


class Contestant(Process):
    """Opens beside the others: its first answer is for later."""

    def __init__(self, setting: Setting, contestant: str) -> None:
        self.network, self.contestant = setting.network, contestant
        told = asdict(setting)
        told |= {key: told[key] and str(told[key].resolve()) for key in ("fp32", "fp16")}
        super().__init__(
            f"{self.network}: {contestant}", [__file__, "--serve", contestant], told,
            TORCHINDUCTOR_COMPILE_THREADS="5", HF_HUB_OFFLINE="1",
        )  # fmt: skip


# --- measuring -------------------------------------------------------------------------------------------------------


def make_setting(network: str, arguments: argparse.Namespace) -> Setting:
    """What the contestants are told. An fp16 artifact is made where there is none."""
    folder = arguments.artifacts or Path("there-is-none")
    fp32: Path | None = folder / f"{network}.onnx"
    fp16: Path | None = folder / f"{network}-fp16.onnx"
    if network == BUNDLED:
        fp32 = sdedit.load(backend="ort-cpu").artifact.path
    if fp32 is not None and fp32.exists() and not (fp16 is not None and fp16.exists()):
        fp16 = halved(fp32, arguments.scratch / f"{network}-fp16.onnx")
    fp32, fp16 = (path if path is not None and path.exists() else None for path in (fp32, fp16))
    if fp32 is None:  # DDPM's levels at t0, and as many as there are steps below it
        at = np.linspace(arguments.t0 * LEVELS - 1, 0, arguments.steps)
        sigmas = [*np.interp(at, np.arange(LEVELS), levels()).tolist(), 0.0]
        return Setting(network, arguments.device, None, None, arguments.steps, arguments.t0, sigmas, True)
    sde = sdedit.load(fp32, backend="ort-cpu").sde
    preserving = isinstance(sde, sdedit.VP) or network != BUNDLED
    table = sdedit.plan(sde, t0=arguments.t0, steps=arguments.steps, sampler="ancestral" if preserving else "em")
    sigmas = [*table.column("sigma").tolist(), 0.0]
    return Setting(network, arguments.device, fp32, fp16, arguments.steps, arguments.t0, sigmas, preserving)


def halved(source: Path, target: Path) -> Path | None:
    """The artifact in fp16, without the export's verification: it is compared with ort-cpu here."""
    if target.exists():
        return target
    try:
        import onnx

        from sdedit.export.precision import halve

        model = onnx.load(source)
        made = halve(model, "fp16")
        del made.metadata_props[:]
        for told in model.metadata_props:
            value = told.value
            if told.key == "sdedit":
                value = json.dumps(json.loads(value) | {"precision": "fp16"})
            made.metadata_props.add(key=told.key, value=value)
        onnx.save(made, target)
    except Exception as error:  # one row must not cost the others
        print(f"no fp16 artifact of {source.name}: {type(error).__name__}: {error}", flush=True)
        return None
    return target


def references(setting: Setting) -> dict[str, Any]:
    """What ort-cpu says: the network's D, and the edit of seed 0."""
    if setting.fp32 is None:
        return {}
    editor = sdedit.load(setting.fp32, backend="ort-cpu")
    x, sigma = network_input(setting)
    denoise = editor.backend.bind(1, {})
    sampler = "ancestral" if setting.variance_preserving else "em"
    made = editor.edit(a_picture(setting), t0=setting.t0, steps=setting.steps, sampler=sampler, seed=0)
    return {"network": denoise(x, np.full(1, sigma, np.float32)).copy(), "edit": made.x}


def compare(name: str, found: Any, wanted: Any) -> Row:
    kind = next((kind for kind in ("bf16", "fp16", "TF32") if kind in name and "no TF32" not in name), "fp32")
    if kind == "fp32" and name.startswith("torch") and "no TF32" not in name:
        kind = "TF32"  # PyTorch's default for convolutions
    error = float(np.abs(found - wanted).max())
    return {"largest_error": error, "tolerance": TOLERANCES[kind], "agrees": bool(error <= TOLERANCES[kind])}


def smi() -> str:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "no nvidia-smi"
    asked = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu,compute_mode"
    command = [tool, f"--query-gpu={asked}", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()


class Measurement:
    """Everything that is found, as it is written."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments, self._began = arguments, time.monotonic()
        self.contestants: list[Contestant] = []
        self.rows: dict[tuple[str, str], Row] = {}
        self.result: Row = {
            "conditions": conditions(*PACKAGES) | {"nvidia_smi": [smi()]}, "device": arguments.device,
            "steps": arguments.steps, "t0": arguments.t0, "counted_of_a_turn": COUNTED,
            "timing": "host clock around an edit, uint8 pixels on the host in and out",
        }  # fmt: skip

    def left(self) -> float:
        return float(self._arguments.seconds - (time.monotonic() - self._began))

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self._began:6.1f} s  {text}", flush=True)

    def write(self) -> None:
        self.result["rows"] = list(self.rows.values())
        if self._arguments.output is not None:
            keep(self._arguments.output, self.result)

    def note(self, one: Contestant, **found: Any) -> None:
        row = self.rows.setdefault(
            (one.network, one.contestant), {"network": one.network, "name": one.contestant, "edit_ms": {}}
        )
        row.update(found)
        if one.failed:
            row["skipped"] = one.failed
        self.write()

    def open_all(self, settings: list[Setting], names: list[str] | None) -> None:
        for setting in settings:
            for name in names or CONTESTANTS_OF.get(setting.network, tuple(CONTESTANTS)):
                if setting.network == BUNDLED and name == SCHEDULER:
                    continue
                self.contestants.append(Contestant(setting, name))
        self.say(f"{len(self.contestants)} contestants are opening")

    def hear_opened(self) -> None:
        until = time.monotonic() + self._arguments.open_seconds
        for one in self.contestants:
            one.hear(until - time.monotonic())
            self.note(one)
        self.say("open")

    def check(self, wanted: dict[str, dict[str, Any]], batches: list[int]) -> None:
        for one in self.contestants:
            if one.failed:
                continue
            path = self._arguments.scratch / "checked.npy"
            answer = one.ask(f"check {path}", min(60, self.left()))
            found: Row = {}
            if not one.failed and (reference := wanted[one.network].get(answer["compared"])) is not None:
                found = {"compared": answer["compared"], **compare(one.contestant, np.load(path), reference)}
                self.say(
                    f"{one.name}: {found['compared']} {found['largest_error']:.1e} from ort-cpu"
                    f"{'' if found['agrees'] else ', which is TOO FAR'}  {json.dumps(answer['said'])}"
                )
            self.note(one, said=answer.get("said"), **found)
            for batch in batches:
                one.ask(f"edit {batch}", min(60, self.left()))
            self.note(one)

    def rounds(self, batches: list[int]) -> None:
        for number in range(self._arguments.rounds):
            if self.left() < 5:
                self.say("no time for further rounds")
                break
            for batch in batches:
                for one in self.contestants if number % 2 == 0 else reversed(self.contestants):
                    if one.failed:
                        continue
                    answer = one.ask(f"edit {batch}", min(30, self.left()))
                    if not one.failed:
                        row = self.rows[one.network, one.contestant]
                        row["edit_ms"].setdefault(str(batch), []).append(answer["edit_ms"])
                        row["said"] = answer["said"]
                    self.note(one)
            self.result["conditions"]["nvidia_smi"].append(smi())
            self.say(f"round {number + 1}")
            self.write()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default=f"unet-64,{BUNDLED}", metavar="NAME,NAME")
    parser.add_argument("--artifacts", type=Path, metavar="DIR", help="where NAME.onnx and NAME-fp16.onnx are")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--contestants", metavar="NAME;NAME", help="only these")
    parser.add_argument("--list", action="store_true", help="print the contestants' names")
    parser.add_argument("--steps", type=positive, default=50)
    parser.add_argument("--t0", type=float, default=0.5)
    parser.add_argument("--batches", default="1", metavar="N,N")
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--seconds", type=float, default=170, help="begin no further round when so many have passed")
    parser.add_argument("--open-seconds", type=float, default=75, help="for opening, which includes torch.compile")
    parser.add_argument("-o", "--output", type=output_file, help="write the whole result as JSON")
    parser.add_argument("--serve", metavar="NAME", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve is not None:
        return serve(partial(open_contestant, arguments.serve))
    if arguments.list:
        return print(*CONTESTANTS, sep="\n")
    batches = [int(word) for word in arguments.batches.split(",")]
    names = arguments.contestants and arguments.contestants.split(";")
    if unknown := set(names or ()) - set(CONTESTANTS):
        parser.error(f"no contestant is called {', '.join(sorted(unknown))} (--list)")
    with tempfile.TemporaryDirectory() as scratch:
        arguments.scratch = Path(scratch)
        measurement = Measurement(arguments)
        try:
            settings = [make_setting(network, arguments) for network in arguments.networks.split(",")]
            measurement.open_all(settings, names)
            wanted = {setting.network: references(setting) for setting in settings}
            measurement.hear_opened()
            measurement.check(wanted, batches)
            measurement.rounds(batches)
        finally:
            for one in measurement.contestants:
                one.close()
            measurement.write()
    return print(table(measurement.result))


if __name__ == "__main__":
    program(main)
