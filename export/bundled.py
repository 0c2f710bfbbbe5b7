"""Make the bundled artifact from a training checkpoint.

python -m sdedit.export.bundled checkpoint.pt -o engine/models/eurosat-64.onnx
"""

import argparse
import math
from pathlib import Path
from typing import Any

import torch

from sdedit.export.networks.patch_unet import PatchUNet
from sdedit.export.to_onnx import write_artifact

LEVELS = 1000


def cosine_alphas_cumprod() -> list[float]:
    """ᾱ of the cosine schedule, s = 0.008, β at most 0.999: Nichol and Dhariwal 2021, eq. 17."""

    def f(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    levels, product = [], 1.0
    for i in range(LEVELS):
        product *= 1 - min(1 - f((i + 1) / LEVELS) / f(i / LEVELS), 0.999)
        levels.append(product)
    return levels


def metadata(checkpoint: dict[str, Any], net: PatchUNet) -> dict[str, Any]:
    return {
        "format": 1,
        "name": "eurosat-64",
        "image": {"channels": 3, "height": 64, "width": 64},
        "sde": {"kind": "vp-discrete", "alphas_cumprod": [float(f"{level:.9g}") for level in cosine_alphas_cumprod()]},
        "defaults": {"t0": 0.5, "steps": 50, "sampler": "ancestral"},
        "sigma_range": list(net.sigma_range),
        "precision": "fp32",
        "license": "MIT",
        "source": {
            "family": "patch-unet",
            "weights": "ema, stored as float16",
            "data": "EuroSAT RGB (Helber et al. 2019, MIT licence), stretched; files ending in 0 held out",
            "training_images": checkpoint["images"],
            "torch": torch.__version__,
        },
    }


def load_network(path: Path) -> tuple[PatchUNet, dict[str, Any]]:
    """The averaged weights of a checkpoint that sdedit.export.train wrote."""
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    net = PatchUNet(widths=tuple(checkpoint["widths"]))
    net.load_state_dict(checkpoint["ema"])
    return net, checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sdedit.export.bundled", description="Make the bundled artifact.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    net, checkpoint = load_network(arguments.checkpoint)
    write_artifact(net, arguments.output, metadata(checkpoint, net), half_weights=True)
    print(f"{arguments.output}: {arguments.output.stat().st_size / 1e6:.2f} MB, {checkpoint['images']} training images")


if __name__ == "__main__":
    main()
