"""Everything that only a GPU can show, in one table: python benchmarks/gpu_check.py [-o RESULT.json] [MODEL.onnx ...]

Correctness first: the kernels' normals against NumPy's, bit for bit; the device loop against the host loop; replayed
graphs against single launches; compute-sanitizer. Then time a step, of every model (the bundled one without any) on
every GPU backend that is installed, and of plain PyTorch networks where PyTorch sees the GPU: the network alone, the
fused kernel alone, and what lies between them. What is not installed is skipped by name. Exit code 1 if a check fails.

Times are CUDA events around graphs of many steps, batch 1, inputs and outputs on the GPU: copies to and from the host
are not in them. Host time is a clock around the launch.
"""

import argparse
import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from arguments import output_file, program

import sdedit
from sdedit.cuda.device_loop import DeviceLoop, DeviceNetwork
from sdedit.cuda.driver import Driver, open_driver
from sdedit.executor import Batch, HostExecutor

SDES = {"vp": sdedit.VP(0.1, 20.0), "ve": sdedit.VE(0.02, 60.0)}
SHAPES = [(1, 3, 64, 64), (4, 3, 256, 256), (2, 3, 5, 7)]
STEPS, RUNS = 50, 20
SMALL = [(2, 3, 5, 7), (1, 3, 24, 24)]  # enough for a tool that makes everything a hundred times slower
GPU_BACKENDS = ("tensorrt", "tensorrt-rtx", "ort-cuda", "ort-tensorrt")

Row = dict[str, Any]
Shape = tuple[int, int, int, int]


# --- correctness -------------------------------------------------------------------------------------------------


class Identity:
    """D = x, a copy: nothing but our own kernels computes."""

    capturable, replays = True, False
    stream: int | None = None

    def __init__(self, driver: Driver, shape: Shape) -> None:
        self._driver, self._nbytes = driver, 4 * int(np.prod(shape))

    def bind(self, x: int, sigma: int, denoised: int) -> None:
        self._x, self._denoised = x, denoised

    def set_conditions(self, values: Mapping[str, float], stream: int) -> None:
        pass

    def enqueue(self, stream: int) -> None:
        self._driver.copy(self._denoised, self._x, self._nbytes, stream)

    def close(self) -> None:
        pass


@contextmanager
def identity_loop(driver: Driver, shape: Shape) -> Iterator[DeviceLoop]:
    loop = DeviceLoop(driver, Identity(driver, shape), shape)
    try:
        yield loop
    finally:
        loop.close()


def check_normals(driver: Driver, shapes: list[Shape]) -> Row:
    """A table that makes x the noise itself, looked at through the identity network one step later."""
    compared = differing = 0
    for shape in shapes:
        table = sdedit.StepTable(np.array([[1, 0, 0, 1, 0, 1]] * 8, float))
        seeds = [2**64 - 1 - 5 * j for j in range(shape[0])]
        noise = sdedit.Noise(seeds, shape[1:])

        def look(step: sdedit.Step, noise: sdedit.Noise = noise) -> None:
            nonlocal compared, differing
            wanted = noise(step.number - 1, step.repeat, 0) + np.float32(0)  # as the update adds zeros: -0 is 0
            compared += wanted.size
            differing += int(np.count_nonzero(step.denoised.view(np.uint32) != wanted.view(np.uint32)))

        with identity_loop(driver, shape) as loop:
            loop.run(Batch(np.zeros(shape, np.float32), None, seeds, table), look)
    return {"check": "normals", "passed": differing == 0, "found": f"{differing} of {compared} differ from NumPy's"}


def edits(shape: Shape) -> Iterator[tuple[str, sdedit.StepTable, Any, Any, list[int]]]:
    rng = np.random.default_rng(0)
    guide = rng.uniform(-1, 1, shape).astype(np.float32)
    mask = rng.uniform(0, 1, (shape[0], 1, *shape[2:])).astype(np.float32)
    for kind, sde in SDES.items():
        for sampler in sdedit.SAMPLERS:
            table = sdedit.plan(sde, t0=0.5, steps=20, sampler=sampler)
            for omega in (None, mask):
                yield f"{kind} {sampler}", table, guide, omega, list(range(shape[0]))


def check_against_host(driver: Driver, shapes: list[Shape]) -> Row:
    worst, where = 0.0, ""
    for shape in shapes:
        with identity_loop(driver, shape) as loop:
            for name, table, guide, mask, seeds in edits(shape):
                batch = Batch(guide, mask, seeds, table, repeats=2)
                found, _ = loop.run(batch)
                host = HostExecutor(lambda x, sigma: x.copy())
                wanted, _ = host.run(batch, None)
                error = float(np.abs(found - wanted).max() / max(1.0, np.abs(wanted).max()))
                if not error <= worst:
                    worst, where = error, f"{name} {shape}"
    return {"check": "device loop", "passed": worst <= 1e-6, "found": f"{worst:.1e} from the host loop {where}"}


def check_captured(driver: Driver, shapes: list[Shape]) -> Row:
    differing = 0
    for shape in shapes:
        for _, table, guide, mask, seeds in edits(shape):
            with identity_loop(driver, shape) as captured, identity_loop(driver, shape) as eager:
                eager._captures = False
                one, _ = captured.run(Batch(guide, mask, seeds, table))
                other, _ = eager.run(Batch(guide, mask, seeds, table))
                differing += int(not np.array_equal(one.view(np.uint32), other.view(np.uint32)))
                if captured.notes:
                    return {"check": "captured", "passed": False, "found": captured.notes[0]}
    return {"check": "captured", "passed": differing == 0, "found": f"{differing} edits differ from single launches"}


def check_sanitizer() -> Row:
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return {"check": "compute-sanitizer", "passed": None, "found": "skipped: not installed"}
    found = []
    for kind in ("memcheck", "racecheck", "initcheck"):
        command = [tool, "--tool", kind, "--error-exitcode", "9", sys.executable, __file__, "--only-kernels", "--small"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        except subprocess.TimeoutExpired:
            found.append(f"{kind}: more than 5 minutes")
            continue
        if done.returncode:
            found.append(f"{kind}: {done.stdout.strip().splitlines()[-1:]}")
    return {"check": "compute-sanitizer", "passed": not found, "found": "; ".join(found) or "clean"}


# --- time --------------------------------------------------------------------------------------------------------


class Silence(Identity):
    """No network at all: what is left of a step is the fused kernel. D is the guide, copied once."""

    def enqueue(self, stream: int) -> None:
        if self._nbytes:
            super().enqueue(stream)
        self._nbytes = 0


def timed_us(driver: Driver, stream: int, enqueue: Callable[[], Any], count: int) -> dict[str, float]:
    """Microseconds of one of the `count` things that `enqueue` enqueues, by events, over many runs."""
    start, end = driver.make_event(), driver.make_event()
    samples = []
    for _ in range(RUNS + 3):  # the first ones warm up and capture
        driver.record(start, stream)
        enqueue()
        driver.record(end, stream)
        driver.wait(end)
        samples.append(1e3 * driver.elapsed_ms(start, end) / count)
    driver.free_event(start)
    driver.free_event(end)
    return spread(samples[3:])


def loop_us(driver: Driver, network: DeviceNetwork, shape: Shape) -> Row:
    """A step of an edit: by events around all of them, and by the host's clock around the launch."""
    table, guide = sdedit.plan(SDES["vp"], t0=0.5, steps=STEPS), np.zeros(shape, np.float32)
    loop = DeviceLoop(driver, network, shape)
    begin, end, device, host = driver.make_event(), driver.make_event(), [], []
    try:
        for _ in range(RUNS + 3):  # the first ones warm up and capture
            loop.start(Batch(guide, None, [0] * shape[0], table, repeats=0))  # uploads only
            loop.begin()
            driver.synchronize(loop.stream)
            driver.record(begin, loop.stream)
            began = time.perf_counter()
            loop.advance(STEPS)
            host.append(1e6 * (time.perf_counter() - began) / STEPS)
            driver.record(end, loop.stream)
            driver.wait(end)
            device.append(1e3 * driver.elapsed_ms(begin, end) / STEPS)
        return {"step_us": spread(device[3:]), "host_us_per_step": spread(host[3:]), "notes": loop.notes}
    finally:
        loop.close()
        driver.free_event(begin)
        driver.free_event(end)


def network_us(driver: Driver, network: DeviceNetwork, shape: Shape) -> dict[str, float]:
    """The network alone: a graph of as many evaluations as an edit has, or single ones where it cannot be captured."""
    loop = DeviceLoop(driver, network, shape)  # whose buffers it is bound to
    stream, graphs = loop.stream, driver.graphs
    try:
        network.enqueue(stream)
        if not network.capturable or graphs is None:
            return timed_us(driver, stream, lambda: [network.enqueue(stream) for _ in range(STEPS)], STEPS)
        graphs.begin(stream)
        network.enqueue(stream)
        one = graphs.end(stream)
        executable = graphs.chain(one, STEPS)
        found = timed_us(driver, stream, lambda: graphs.launch(executable, stream), STEPS)
        graphs.free(executable)
        graphs.free_graph(one)
        return found
    finally:
        loop.close()


def row_of(driver: Driver, name: str, network: Callable[[], DeviceNetwork], shape: Shape) -> Row:
    alone = network_us(driver, network(), shape)
    whole = loop_us(driver, network(), shape)
    fused = loop_us(driver, Silence(driver, shape), shape)["step_us"]
    outside = whole["step_us"]["median"] - alone["median"]
    return {
        "network": name, "shape": shape, "process_mib": process_mib(), "network_us": alone,
        "fused_kernel_us": fused, **whole,
        "gaps_us": round(outside - fused["median"], 2), "outside_share": round(outside / alone["median"], 4),
    }  # fmt: skip


def process_mib() -> int | None:
    """GPU memory of this process so far, as the driver counts it; None where it does not say."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    told = subprocess.run(command, capture_output=True, text=True).stdout
    found = [line.split(",") for line in told.splitlines()]
    mine = [int(used) for pid, used in found if pid.strip() == str(os.getpid()) and used.strip().isdigit()]
    return sum(mine) if mine else None


def product_rows(driver: Driver, models: list[Path | None]) -> Iterator[Row]:
    for model in models:
        for name in GPU_BACKENDS:
            label = f"{model.name if model else 'bundled'} on {name}"
            try:
                editor = sdedit.load(model, backend=name)
                backend, artifact = editor.backend.on_gpu(), editor.artifact
                shape = (1, artifact.channels, artifact.height, artifact.width)
                row = row_of(driver, label, partial(backend.network, 1), shape)
            except Exception as error:  # one row must not cost the others
                row = {"network": label, "skipped": str(error) or type(error).__name__}
            yield row


def torch_rows(driver: Driver) -> Iterator[Row]:
    """PyTorch as the network of the same loop: shows the loop where TensorRT is not installed."""
    try:
        import torch

        from sdedit.export.networks.adm import ADM
        from sdedit.export.networks.patch_unet import PatchUNet
    except ImportError as error:
        yield {"network": "torch", "skipped": str(error)}
        return
    if not torch.cuda.is_available():
        yield {"network": "torch", "skipped": "PyTorch sees no GPU"}
        return

    class Torch:
        capturable, replays = True, False
        stream: int | None = None

        def __init__(self, net: Any, shape: Shape, kind: Any) -> None:
            self._net, self._shape, self._kind = net, shape, kind

        def bind(self, x: int, sigma: int, denoised: int) -> None:
            def view(pointer: int, shape: tuple[int, ...]) -> Any:
                found = {"shape": shape, "typestr": "<f4", "data": (pointer, False), "version": 3}
                return torch.as_tensor(type("View", (), {"__cuda_array_interface__": found})(), device="cuda")

            self._x, self._denoised = view(x, self._shape), view(denoised, self._shape)
            self._sigma = view(sigma, self._shape[:1])

        def set_conditions(self, values: Mapping[str, float], stream: int) -> None:
            pass

        @torch.inference_mode()
        def enqueue(self, stream: int) -> None:
            with torch.cuda.stream(torch.cuda.ExternalStream(stream)):
                self._denoised.copy_(self._net(self._x.to(self._kind), self._sigma.to(self._kind)))

        def close(self) -> None:
            pass

    ddpm = ADM(
        channels=3, out_channels=3, model_channels=128, widths=(128, 128, 256, 256, 512, 512), blocks=2, attention={4},
        num_heads=1, num_heads_upsample=1, num_head_channels=None, new_order=False, classes=0, scale_shift=False,
        updown=False, conv_resample=True,
    )  # fmt: skip
    for name, net, shape in (("64x64 U-Net", PatchUNet(), (1, 3, 64, 64)), ("256x256 DDPM", ddpm, (1, 3, 256, 256))):
        for kind in (torch.float32, torch.float16):
            net = net.to("cuda", kind).to(memory_format=torch.channels_last)
            label = f"{name}, torch {str(kind).removeprefix('torch.')}"
            try:
                yield row_of(driver, label, partial(Torch, net, shape, kind), shape)
            except Exception as error:  # one row must not cost the others
                yield {"network": label, "skipped": str(error)}


def spread(samples: list[float]) -> dict[str, float]:
    ordered = sorted(samples)
    named = {"median": statistics.median(ordered), "min": ordered[0], "max": ordered[-1]}
    return {name: round(float(value), 3) for name, value in named.items()}


# --- the table ---------------------------------------------------------------------------------------------------


def conditions(driver: Driver) -> Row:
    tool = shutil.which("nvidia-smi")
    asked = "--query-gpu=driver_version,clocks.sm,clocks.mem,power.limit,memory.used"
    smi = subprocess.run([tool, asked, "--format=csv,noheader"], capture_output=True, text=True).stdout if tool else ""
    return {
        "gpu": driver.gpu.name, "target": driver.gpu.target, "driver": driver.gpu.driver, "port": driver.name,
        **driver.versions, "nvidia_smi": smi.strip(), "python": platform.python_version(),
        "sdedit-engine": sdedit.__version__, "numpy": np.__version__, "batch": 1, "runs": RUNS,
    }  # fmt: skip


def show_check(check: Row) -> Row:
    word = {True: "passed", False: "FAILED", None: "skipped"}[check["passed"]]
    print(f"{check['check']:<20}{word:<9}{check['found']}", flush=True)
    return check


def show_row(row: Row) -> Row:
    if "skipped" in row:
        print(f"{row['network']:<42}  skipped: {row['skipped']}", flush=True)
        return row
    print(
        f"{row['network']:<42}{row['network_us']['median']:>14.1f}{row['fused_kernel_us']['median']:>14.2f}"
        f"{row['gaps_us']:>14.2f}{row['outside_share']:>14.2%}{row['host_us_per_step']['median']:>14.2f}"
        f"{row['process_mib'] or '-':>14}",
        flush=True,
    )
    for note in row["notes"]:
        print(f"    {note}", flush=True)
    return row


def write(result: Row, path: Path | None) -> None:
    if path is not None:
        path.write_text(json.dumps(result, indent=2) + "\n", "utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description="What only a GPU can show.")
    parser.add_argument("models", nargs="*", type=Path, metavar="MODEL.onnx", help="beside the bundled model")
    parser.add_argument("-o", "--output", type=output_file, help="write the whole result as JSON")
    parser.add_argument("--only-kernels", action="store_true", help="the checks of our own kernels, no timing")
    parser.add_argument("--small", action="store_true", help="check few and small shapes")
    parser.add_argument("--no-sanitizer", action="store_true", help="leave compute-sanitizer out: it takes minutes")
    arguments = parser.parse_args()
    try:
        driver = open_driver()
    except sdedit.BackendUnavailable as error:
        print(f"error: {error}\nhint: {error.hint}", file=sys.stderr)
        return 1
    with driver.current():
        shapes = SMALL if arguments.small else SHAPES
        checks = [show_check(check(driver, shapes)) for check in (check_normals, check_against_host, check_captured)]
        result: dict[str, Any] = {"conditions": conditions(driver), "checks": checks, "steps": []}
        write(result, arguments.output)
        if not arguments.only_kernels:
            if not arguments.no_sanitizer:
                checks.append(show_check(check_sanitizer()))
            columns = ("network µs", "fused µs", "gaps µs", "outside", "host µs/step", "MiB")
            print(f"\n{'network':<42}" + "".join(f"{name:>14}" for name in columns))
            for row in itertools.chain(product_rows(driver, [None, *arguments.models]), torch_rows(driver)):
                result["steps"].append(show_row(row))
                write(result, arguments.output)  # what is cut off keeps what it has
    return 1 if any(check["passed"] is False for check in checks) else 0


if __name__ == "__main__":
    program(main)
