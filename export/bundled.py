"""Make the bundled artifact from a training checkpoint.

python -m sdedit.export.bundled checkpoint.pt -o engine/models/eurosat-64.onnx
"""

import argparse
from pathlib import Path
from typing import Any

import torch

from sdedit.export import schedules
from sdedit.export.networks.patch_unet import PatchUNet
from sdedit.export.to_onnx import write_artifact


def metadata(checkpoint: dict[str, Any], net: PatchUNet) -> dict[str, Any]:
    return {
        "format": 1,
        "name": "eurosat-64",
        "image": {"channels": 3, "height": 64, "width": 64},
        "sde": schedules.as_metadata(schedules.cosine()),
        "defaults": {"t0": 0.5, "steps": 20, "sampler": "dpmpp-2m-sde", "spacing": "karras"},
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
