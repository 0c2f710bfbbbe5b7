"""The networks that peers.py and cpu_network.py run: a diffusers folder with random weights, and the artifact exported
from it; or the bundled model, whose network is this project's own.

Random weights cost what trained ones do. Everything is made once and kept in a folder.
"""

import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import sdedit

VP, VE = "vp", "ve"
LEVELS = 1000  # that a VP network was trained at
BUNDLED = "bundled"
NETWORKS = Path(tempfile.gettempdir()) / "sdedit-peers"


@dataclass(frozen=True)
class Network:
    """One network in the two forms that are compared."""

    name: str
    kind: str  # VP: predicts eps at one of a thousand levels; VE: the score, from sigma
    folder: Path  # what diffusers loads; of the bundled model, the artifact
    artifact: Path  # what sdedit, ONNX Runtime and OpenVINO load
    int8: Path | None  # the same in int8, where it has been made

    @property
    def size(self) -> int:
        return SIZES[self.name]

    def file(self, *, int8: bool) -> Path:
        """The artifact. Raises FileNotFoundError where it has not been made in int8."""
        if not int8:
            return self.artifact
        if self.int8 is None:
            raise FileNotFoundError(f"{self.name} has no int8 artifact (--int8 makes it)")
        return self.int8

    def described(self) -> dict[str, str | None]:
        """For another process, as JSON."""
        return {name: value and str(value) for name, value in asdict(self).items()}

    @classmethod
    def of(cls, described: dict[str, Any]) -> "Network":
        paths = {name: described[name] and Path(described[name]) for name in ("folder", "artifact", "int8")}
        return cls(**described | paths)


SIZES = {BUNDLED: 64, "unet-64": 64, "ddpm-256": 256, "ncsnpp-256": 256, "tiny": 16}
NAMES = tuple(name for name in SIZES if name != "tiny")  # that one is for tests


def network(name: str, folder: Path, *, int8: bool = False) -> Network:
    """The network called `name`, made in `folder` where it is not there yet. int8: also quantised, for OpenVINO."""
    if name == BUNDLED:
        path = sdedit.load(backend="ort-cpu", threads=1).artifact.path
        return Network(name, VP, path, path, None)
    home = folder / f"{name}-{sdedit.__version__}"
    home.mkdir(parents=True, exist_ok=True)
    source, artifact, quantised = home / "diffusers", home / f"{name}.onnx", home / f"{name}-int8.onnx"
    if not (source / "model_index.json").exists():
        _make(name, source)
    if not artifact.exists():
        _export(source, artifact, "--name", name)
    if int8 and not quantised.exists():
        _export(artifact, quantised, "--precision", "int8")
    kind = VE if name == "ncsnpp-256" else VP
    return Network(name, kind, source, artifact, quantised if quantised.exists() else None)


def _export(source: Path, target: Path, *options: str) -> None:
    command = [sys.executable, "-m", "sdedit.cli.main", "export", str(source), "-o", str(target), *options]
    done = subprocess.run(command, stdout=sys.stderr, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    if done.returncode < 0:
        ended = f"error: the export of {source} was ended by signal {-done.returncode}"
        raise SystemExit(f"{ended}\nhint: if memory ran out, leave --int8 out, or take a smaller network")
    if done.returncode:
        raise SystemExit(done.returncode)  # it has said why


def _make(name: str, folder: Path) -> None:
    import diffusers
    import torch

    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(sample_size=SIZES[name], in_channels=3, out_channels=3, **CONFIGURATIONS[name])
    if name == "ncsnpp-256":
        scheduler: Any = diffusers.ScoreSdeVeScheduler(num_train_timesteps=2000, sigma_min=0.01, sigma_max=348)
        diffusers.ScoreSdeVePipeline(unet, scheduler).save_pretrained(folder)
        return
    # `trailing`: the last of 100 timesteps at t0 = 0.5 are the 50 that end at t = 0, where the others stop short
    scheduler = diffusers.DDPMScheduler(timestep_spacing="trailing", clip_sample=False)
    diffusers.DDPMPipeline(unet, scheduler).save_pretrained(folder)


def _blocks(kind: str, attention: set[int], count: int) -> dict[str, tuple[str, ...]]:
    down = [f"{'Attn' if level in attention else ''}{kind}DownBlock2D" for level in range(count)]
    up = [f"{'Attn' if level in attention else ''}{kind}UpBlock2D" for level in reversed(range(count))]
    return {"down_block_types": tuple(down), "up_block_types": tuple(up)}


CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "tiny": {
        "block_out_channels": (32, 32), "layers_per_block": 1, **_blocks("", set(), 2), "norm_num_groups": 8,
    },
    # 7.5 M parameters, 7.6 GFLOP
    "unet-64": {"block_out_channels": (64, 64, 128, 128), "layers_per_block": 2, **_blocks("", {2, 3}, 4)},
    # google/ddpm-celebahq-256: 114 M, 496 GFLOP
    "ddpm-256": {
        "block_out_channels": (128, 128, 256, 256, 512, 512), "layers_per_block": 2, **_blocks("", {4}, 6),
        "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1, "norm_eps": 1e-6,
        "attention_head_dim": None,
    },
    # google/ncsnpp-celebahq-256: 66 M, 533 GFLOP
    "ncsnpp-256": {
        "block_out_channels": (128, 128, 256, 256, 256, 256, 256), "layers_per_block": 2, **_blocks("Skip", {4}, 7),
        "time_embedding_type": "fourier", "mid_block_scale_factor": 2**0.5, "downsample_padding": 1,
        "attention_head_dim": None, "norm_num_groups": None, "norm_eps": 1e-6, "freq_shift": 0,
    },
}  # fmt: skip


def ddpm_alphas_cumprod() -> NDArray[np.float64]:
    """ᾱ of the levels that diffusers' VP networks are trained at."""
    return np.cumprod(1 - np.linspace(1e-4, 0.02, LEVELS))


def weights_of(path: Path, wanted: dict[str, Any], prefix: str) -> dict[str, Any]:
    """A module's weights out of the artifact that was exported from it: by their names where it kept them, else by
    the name of the node that uses them. Raises LookupError for one that is not found.
    """
    import onnx
    import torch

    graph = onnx.load(path).graph
    kept = {weight.name: weight for weight in graph.initializer}
    found: dict[str, Any] = {}
    for name, weight in kept.items():
        key = name.removesuffix(".half").removeprefix(prefix)
        if key in wanted:
            found[key] = onnx.numpy_helper.to_array(weight)
    for node in graph.node:
        if node.op_type == "Identity" and node.input[0] in kept:
            kept[node.output[0]] = kept[node.input[0]]  # equal weights are kept once
        end = {"Mul": "weight", "MatMul": "weight", "Add": "bias"}.get(node.op_type)
        used = [name for name in node.input if name in kept]
        if end is None or not used:
            continue
        key = node.name.rpartition("/")[0].strip("/").replace("/", ".").removeprefix(prefix) + "." + end
        if key in wanted and key not in found:
            value = onnx.numpy_helper.to_array(kept[used[0]])
            found[key] = value.T if node.op_type == "MatMul" else value
    if missing := set(wanted) - set(found):
        raise LookupError(f"{path.name} has no {', '.join(sorted(missing)[:3])} ({len(missing)} are missing)")
    return {
        key: torch.from_numpy(np.array(found[key], np.float32)).reshape(value.shape) for key, value in wanted.items()
    }
