"""The network alone on a CPU: the same weights in torch, ONNX Runtime and OpenVINO, in every precision they have.

python benchmarks/cpu_network.py [--network unet-64] [--rounds 10] [--each 5] [--only NAME,…] [-o FILE.json]

unet-64 (diffusers' UNet2DModel, 7.5 M parameters) or ddpm-256 (google/ddpm-celebahq-256, 114 M) with random weights, as
for peers.py, in the same folder: made where there is none yet, the int8 artifact in minutes. Every configuration lives
in a process of its own and waits there for its turn, so that no library's idle threads run beside another; one that
fails is named and left out. A turn is a pause, one evaluation that is not counted, and `--each` that are; a round is
one turn of each. Ratios are taken within a round: torch eager over the configuration. Batch 1, all cores this process
may use.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from arguments import names, output_file, positive, program
from conditions import conditions, cores
from kept import keep
from peer_networks import NETWORKS, Network, network
from processes import Process, Row, serve

import sdedit

EAGER = "torch eager"
TORCH: dict[str, dict[str, bool]] = {
    EAGER: {},
    "torch channels-last": {"channels_last": True},
    "torch compile": {"channels_last": True, "compiled": True},
    "torch bf16": {"channels_last": True, "bf16": True},
    "torch bf16 compile": {"channels_last": True, "bf16": True, "compiled": True},
}
OURS: dict[str, dict[str, Any]] = {  # int8, and the keywords of sdedit.load
    "ort-cpu fp32": {"backend": "ort-cpu"},
    "ort-cpu fp16": {"backend": "ort-cpu", "precision": "fp16"},
    "ort-cpu bf16": {"backend": "ort-cpu", "precision": "bf16"},
    "ort-cpu int8": {"int8": True, "backend": "ort-cpu"},
    "ort-cpu fp32, ONNX Runtime's operators": {"backend": "ort-cpu", "operators": "off"},
    "ort-cpu int8, ONNX Runtime's operators": {"int8": True, "backend": "ort-cpu", "operators": "off"},
    "openvino fp32": {"backend": "openvino"},
    "openvino bf16": {"backend": "openvino", "precision": "bf16"},
    "openvino fp16": {"backend": "openvino", "precision": "fp16"},
    "openvino int8": {"int8": True, "backend": "openvino"},
    "sdedit --fast": {"fast": True},
}
PACKAGES = ("torch", "diffusers", "onnxruntime", "openvino")
PAUSE_S = 0.2

Evaluate = Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(description="The network alone on a CPU, in torch, ONNX Runtime and OpenVINO.")
    parser.add_argument("--network", choices=("unet-64", "ddpm-256"), default="unet-64")
    parser.add_argument("--networks", type=Path, default=NETWORKS, metavar="DIR", help="where they are made and kept")
    parser.add_argument("--rounds", type=positive, default=10)
    parser.add_argument("--each", type=positive, default=5, help="evaluations counted in a turn")
    parser.add_argument("--seconds", type=float, default=3600, help="no round is begun after as long")
    parser.add_argument("--only", type=names, default=[*TORCH, *OURS], metavar="NAME,…")
    parser.add_argument("-o", "--output", type=output_file, help="write what there is here, after every round")
    parser.add_argument("--serve", metavar="NAME", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve is not None:
        return serve(partial(open_configuration, arguments.serve))
    if unknown := set(arguments.only) - {*TORCH, *OURS}:
        parser.error(f"nothing is called {', '.join(sorted(unknown))}; there are {', '.join([*TORCH, *OURS])}")
    used = network(arguments.network, arguments.networks, int8=True)
    about = conditions(*PACKAGES) | {"network": used.name, "batch": 1, "threads": cores(), "each": arguments.each}
    found: Row = {"conditions": about, "configurations": {}}
    for rows in measure(arguments.only, used, arguments.each, arguments.rounds, arguments.seconds):
        found["configurations"] = {name: row | summary(name, rows) for name, row in rows.items()}
        if arguments.output:
            keep(arguments.output, found)
    if not any("median_ms" in one for one in found["configurations"].values()):
        limit = f"--seconds {arguments.seconds:g}"
        raise SystemExit(f"error: there was no round: all were skipped, or opening them took longer than {limit}")
    return print(table(found))


# --- a configuration's process ---------------------------------------------------------------------------------------


def open_configuration(name: str, request: Row) -> Callable[[str], Row]:
    """What takes a turn for every line."""
    used = Network.of(request["network"])
    x = np.random.default_rng(0).standard_normal((1, 3, used.size, used.size)).astype(np.float32)
    evaluate, ran = open_torch(used, x, **TORCH[name]) if name in TORCH else open_ours(used, x, **OURS[name])
    evaluate()

    def turn(line: str) -> Row:
        evaluate()
        samples = []
        for _ in range(request["each"]):
            began = time.perf_counter()
            evaluate()
            samples.append(1e3 * (time.perf_counter() - began))
        return {"ms": samples, **ran}

    return turn


def open_torch(
    used: Network, x: np.ndarray, *, channels_last: bool = False, compiled: bool = False, bf16: bool = False
) -> tuple[Evaluate, Row]:
    import torch
    from diffusers import UNet2DModel

    torch.set_num_threads(cores())
    net: Any = UNet2DModel.from_pretrained(used.folder / "unet").eval()
    given, label = torch.from_numpy(x), torch.tensor([500])
    if bf16:
        net, given = net.to(torch.bfloat16), given.to(torch.bfloat16)
    if channels_last:
        net, given = net.to(memory_format=torch.channels_last), given.to(memory_format=torch.channels_last)
    if compiled:
        import torch._inductor.config

        torch._inductor.config.freezing = True
        net = torch.compile(net)

    def evaluate() -> object:
        with torch.no_grad():
            return net(given, label).sample

    return evaluate, {}


def open_ours(
    used: Network, x: np.ndarray, *, int8: bool = False, operators: str = "on", **options: Any
) -> tuple[Evaluate, Row]:
    os.environ["SDEDIT_OPERATORS"] = operators
    editor = sdedit.load(used.file(int8=int8), threads=cores(), **options)
    denoiser, sigma = editor.backend.bind(1, {}), np.ones(1, np.float32)
    ran = {"backend": editor.backend.name, "precision": editor.backend.precision, "versions": editor.backend.versions}
    return lambda: denoiser(x, sigma), {"ran": ran}


# --- rounds ----------------------------------------------------------------------------------------------------------


def measure(names: list[str], used: Network, each: int, rounds: int, seconds: float) -> Iterator[dict[str, Row]]:
    """Every configuration's rounds so far, after each; of one that failed, those before, and why."""
    began = time.monotonic()  # opening counts
    request = {"network": used.described(), "each": each}
    rows: dict[str, Row] = {name: {"rounds_ms": []} for name in names}
    with ExitStack() as held:
        processes = []
        for name in names:
            process = held.enter_context(closing(Process(name, [__file__, "--serve", name], request)))
            process.hear()
            processes.append(process)
        for _ in range(rounds):
            if time.monotonic() - began > seconds:
                return
            for process in processes:
                if not process.failed:
                    time.sleep(PAUSE_S)
                answer, row = process.ask("turn"), rows[process.name]
                if not process.failed:
                    row["rounds_ms"].append(answer.pop("ms"))
                row |= answer
            yield rows
            if all(process.failed for process in processes):
                return


def summary(name: str, rows: dict[str, Row]) -> Row:
    def medians(of: str) -> list[float]:
        return [statistics.median(samples) for samples in rows[of]["rounds_ms"]]

    samples = [ms for turn in rows[name]["rounds_ms"] for ms in turn]
    if not samples:
        return {}
    told: Row = {"median_ms": statistics.median(samples), "min_ms": min(samples), "max_ms": max(samples)}
    # what died has no later rounds
    ratios = [eager / own for eager, own in zip(medians(EAGER), medians(name), strict=False)] if EAGER in rows else []
    if ratios:
        told["eager_over_it"] = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
    return told


def table(found: dict[str, Any]) -> str:
    lines = [f"{'':<22}{'ms: median':>12}{'min':>9}{'max':>9}   torch eager / it (spread of rounds)"]
    for name, one in found["configurations"].items():
        if "median_ms" not in one:
            lines.append(f"{name:<22}skipped: {one['failed']}")
            continue
        line = f"{name:<22}{one['median_ms']:>12.1f}{one['min_ms']:>9.1f}{one['max_ms']:>9.1f}"
        if ratio := one.get("eager_over_it"):
            line += f"   {ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"
        if name == "sdedit --fast":
            line += f"   took {one['ran']['backend']} {one['ran']['precision']}"
        if "failed" in one:
            line += f"   after round {len(one['rounds_ms'])}: {one['failed']}"
        lines.append(line)
    return "\n".join(lines)


if __name__ == "__main__":
    program(main)
