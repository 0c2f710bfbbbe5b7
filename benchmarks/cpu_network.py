"""The network alone on a CPU: the same weights in torch, ONNX Runtime and OpenVINO, in every precision they have.

python benchmarks/cpu_network.py NETWORK FOLDER --build     random weights, exported in fp32 and int8, kept in FOLDER
python benchmarks/cpu_network.py NETWORK FOLDER [--rounds 10] [--each 5] [--only NAME,…] [-o FILE.json]

NETWORK: unet-64 (diffusers' UNet2DModel, 7.5 M parameters) or ddpm-256 (google/ddpm-celebahq-256, 114 M). Every
configuration lives in a process of its own and waits there for its turn, so that no library's idle threads run beside
another. A turn is a pause, one evaluation that is not counted, and `--each` that are; a round is one turn of each.
Ratios are taken within a round: torch eager over the configuration. Batch 1, all cores this process may use.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from peer_networks import CONFIGURATIONS, SIZES

import sdedit

NETWORKS = ("unet-64", "ddpm-256")
EAGER = "torch eager"
TORCH: dict[str, dict[str, bool]] = {
    EAGER: {},
    "torch channels-last": {"channels_last": True},
    "torch compile": {"channels_last": True, "compiled": True},
    "torch bf16": {"channels_last": True, "bf16": True},
    "torch bf16 compile": {"channels_last": True, "bf16": True, "compiled": True},
}
OURS: dict[str, dict[str, Any]] = {  # `file` and the keywords of sdedit.load
    "ort-cpu fp32": {"backend": "ort-cpu"},
    "ort-cpu int8": {"file": "int8", "backend": "ort-cpu"},
    "openvino fp32": {"backend": "openvino"},
    "openvino bf16": {"backend": "openvino", "precision": "bf16"},
    "openvino fp16": {"backend": "openvino", "precision": "fp16"},
    "openvino int8": {"file": "int8", "backend": "openvino"},
    "sdedit --fast": {"fast": True},
}
PACKAGES = ("numpy", "torch", "diffusers", "onnxruntime", "openvino", "sdedit-engine")
PAUSE_S = 0.2

Evaluate = Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(description="The network alone on a CPU, in torch, ONNX Runtime and OpenVINO.")
    parser.add_argument("network", choices=NETWORKS)
    parser.add_argument("folder", type=Path, help="where weights and artifacts lie")
    parser.add_argument("--build", action="store_true", help="make them")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--each", type=int, default=5, help="evaluations counted in a turn")
    parser.add_argument("--seconds", type=float, default=3600, help="no round is begun after as long")
    parser.add_argument("--only", type=lambda text: text.split(","), default=[*TORCH, *OURS], metavar="NAME,…")
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.build:
        build(arguments.network, arguments.folder)
    elif arguments.serve:
        serve(arguments.serve, arguments.network, arguments.folder, arguments.each)
    else:
        found = measure(arguments)
        print(table(found))
        if arguments.output:
            arguments.output.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


def build(network: str, folder: Path) -> None:
    import torch
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(sample_size=SIZES[network], **CONFIGURATIONS[network])
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(folder / network)
    fp32, int8 = artifact(network, folder, "fp32"), artifact(network, folder, "int8")
    for source, target, precision in ((folder / network, fp32, "fp32"), (fp32, int8, "int8")):
        command = ["export", source, "-o", target, "--precision", precision, "--force"]
        subprocess.run([sys.executable, "-m", "sdedit.cli.main", *map(str, command)], check=True)


def artifact(network: str, folder: Path, precision: str) -> Path:
    return folder / f"{network}-{precision}.onnx"


# --- a configuration's process ---------------------------------------------------------------------------------------


def serve(name: str, network: str, folder: Path, each: int) -> None:
    """Open a configuration; then one turn for every line on stdin, one line of JSON for each."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries may print
    size = SIZES[network]
    x = np.random.default_rng(0).standard_normal((1, 3, size, size)).astype(np.float32)
    try:
        if name in TORCH:
            evaluate, told = open_torch(folder / network, x, **TORCH[name]), {}
        else:
            evaluate, told = open_ours(network, folder, x, **OURS[name])
        evaluate()
    except Exception as error:  # torch.compile and the libraries raise many kinds
        print(json.dumps({"skipped": str(error).splitlines()[0]}), file=answers, flush=True)
        return
    print(json.dumps(told), file=answers, flush=True)
    for _ in sys.stdin:
        evaluate()
        samples = []
        for _ in range(each):
            began = time.perf_counter()
            evaluate()
            samples.append(1e3 * (time.perf_counter() - began))
        print(json.dumps({"ms": samples}), file=answers, flush=True)


def open_torch(
    folder: Path, x: np.ndarray, *, channels_last: bool = False, compiled: bool = False, bf16: bool = False
) -> Evaluate:
    import torch
    from diffusers import UNet2DModel

    torch.set_num_threads(cores())
    net: Any = UNet2DModel.from_pretrained(folder / "unet").eval()
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

    return evaluate


def open_ours(
    network: str, folder: Path, x: np.ndarray, *, file: str = "fp32", **options: Any
) -> tuple[Evaluate, dict[str, Any]]:
    editor = sdedit.load(artifact(network, folder, file), threads=cores(), **options)
    denoiser, sigma = editor.backend.bind(1, {}), np.ones(1, np.float32)
    ran = {"backend": editor.backend.name, "precision": editor.backend.precision}
    return lambda: denoiser(x, sigma), {"ran": ran}


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# --- rounds ----------------------------------------------------------------------------------------------------------


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    processes: dict[str, subprocess.Popen[str]] = {}
    found: dict[str, dict[str, Any]] = {}
    command = [sys.executable, __file__, arguments.network, str(arguments.folder), "--each", str(arguments.each)]
    began = time.monotonic()
    try:
        for name in arguments.only:
            pipe = subprocess.PIPE
            process = subprocess.Popen([*command, "--serve", name], stdin=pipe, stdout=pipe, text=True)
            told = json.loads(hear(process) or '{"skipped": "it died"}')
            if "skipped" in told:
                print(f"skipped: {name}: {told['skipped']}", file=sys.stderr)
            else:
                processes[name], found[name] = process, {**told, "rounds_ms": []}
        for _ in range(arguments.rounds):
            if time.monotonic() - began > arguments.seconds:
                break
            for name, process in processes.items():
                time.sleep(PAUSE_S)
                assert process.stdin is not None
                process.stdin.write("turn\n")
                process.stdin.flush()
                found[name]["rounds_ms"].append(json.loads(hear(process))["ms"])
    finally:
        for process in processes.values():
            process.kill()
    return {"conditions": conditions(arguments), "configurations": {n: f | summary(n, found) for n, f in found.items()}}


def hear(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def summary(name: str, found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    def medians(of: str) -> list[float]:
        return [statistics.median(samples) for samples in found[of]["rounds_ms"]]

    samples = [ms for turn in found[name]["rounds_ms"] for ms in turn]
    told = {"median_ms": statistics.median(samples), "min_ms": min(samples), "max_ms": max(samples)}
    if EAGER in found:
        ratios = [eager / own for eager, own in zip(medians(EAGER), medians(name), strict=True)]
        told["eager_over_it"] = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
    return told


def table(found: dict[str, Any]) -> str:
    lines = [f"{'':<22}{'ms: median':>12}{'min':>9}{'max':>9}   torch eager / it (spread of rounds)"]
    for name, one in found["configurations"].items():
        line = f"{name:<22}{one['median_ms']:>12.1f}{one['min_ms']:>9.1f}{one['max_ms']:>9.1f}"
        if ratio := one.get("eager_over_it"):
            line += f"   {ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"
        if name == "sdedit --fast":
            line += f"   took {one['ran']['backend']} {one['ran']['precision']}"
        lines.append(line)
    return "\n".join(lines)


def conditions(arguments: argparse.Namespace) -> dict[str, Any]:
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        text = ""
    lines = dict(line.partition(":")[::2] for line in text.partition("\n\n")[0].splitlines())
    told = {name.strip(): value.strip() for name, value in lines.items()}
    wanted = (
        "avx2",
        "avx512f",
        "avx_vnni",
        "avx512_vnni",
        "avx512_bf16",
        "avx512_fp16",
        "amx_tile",
        "amx_bf16",
        "amx_int8",
    )
    return {
        "network": arguments.network,
        "batch": 1,
        "threads": cores(),
        "each": arguments.each,
        "cpu": told.get("model name", platform.processor()),
        "cpu_family_model": f"{told.get('cpu family')}/{told.get('model')}",
        "cpu_features": [feature for feature in wanted if feature in told.get("flags", "").split()],
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **{package: installed(package) for package in PACKAGES},
    }


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
