"""diffusers' UNet2DModel (the U-Nets of Ho et al. 2020 and Song et al. 2021) made exact and plain to trace."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sdedit.export.checkpoints import CheckpointError
from sdedit.export.networks.embedding import Sinusoidal, rates
from sdedit.export.networks.fir import Resample

TAPS = (1.0, 3.0, 3.0, 1.0)  # of the library's FIR layers
CONFIG_HINT = """--config '{"scheduler": {…}, "unet": {…}}' replaces fields of the folder's JSON files"""


def unet_on_meta(config: Mapping[str, Any]) -> nn.Module:
    """diffusers' UNet2DModel without weights, made exact and plain to trace. Raises CheckpointError."""
    kind = library().UNet2DModel
    try:
        with torch.device("meta"):
            unet = kind(**config)
    except (TypeError, ValueError, ZeroDivisionError, RuntimeError, AttributeError) as error:
        raise CheckpointError(f"no UNet2DModel has this configuration: {error}", hint=CONFIG_HINT) from error
    embedding = unet.time_proj
    if type(embedding).__name__ == "Timesteps" and embedding.num_channels % 2 == 0:
        shifted = rates(embedding.num_channels, embedding.downscale_freq_shift)
        unet.time_proj = Sinusoidal(shifted, cosine_first=embedding.flip_sin_to_cos)
    for block in (*unet.down_blocks, *unet.up_blocks):
        if getattr(block, "resnet_down", None) is not None:
            block.resnet_down.downsample = Resample(block.resnet_down.in_channels, up=False, taps=TAPS)
            block.downsamplers = nn.ModuleList([Resample(3, up=False, taps=TAPS)])
        if hasattr(block, "upsampler"):
            block.upsampler = Resample(3, up=True, taps=TAPS)
        if getattr(block, "resnet_up", None) is not None:
            block.resnet_up.upsample = Resample(block.resnet_up.in_channels, up=True, taps=TAPS)
    return unet


class PlainUNet(nn.Module):
    """net(x, label (B,), *conditions) -> a tensor, where diffusers' own returns an object."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet
        self.looks_up = isinstance(unet.time_proj, nn.Embedding)

    def forward(self, x: Tensor, label: Tensor, *conditions: Tensor) -> Tensor:
        return self.unet(x, label.long() if self.looks_up else label, *conditions, return_dict=False)[0]


def library() -> Any:
    """diffusers itself, whose import takes seconds. Raises CheckpointError where it is not installed."""
    try:
        import diffusers
    except ImportError as error:
        raise CheckpointError(
            f"this kind of checkpoint needs the diffusers library: {error}", hint="pip install 'sdedit-engine[export]'"
        ) from error
    return diffusers
