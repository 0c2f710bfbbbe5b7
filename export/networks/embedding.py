"""Sinusoidal embeddings of the time label: Vaswani et al. 2017, section 3.5; Ho et al. 2020, appendix B.

The rates fall from 1 to about 1/10000 in equal ratios, and every code rounds them in its own order of operations.
Networks were trained with the rounded ones, so they are float32's here whatever the label's precision.
"""

import math

import torch
from torch import Tensor, nn


class Sinusoidal(nn.Module):
    """label (B,) -> (B, 2 len(rates)), in the label's precision: sines, then cosines, or the other way round."""

    def __init__(self, rates: Tensor, *, cosine_first: bool) -> None:
        super().__init__()
        self.rates, self.cosine_first = tuple(rates.tolist()), cosine_first

    def forward(self, label: Tensor) -> Tensor:
        phase = label[:, None] * torch.tensor(self.rates, dtype=label.dtype, device=label.device)
        return torch.cat((phase.cos(), phase.sin()) if self.cosine_first else (phase.sin(), phase.cos()), dim=1)


def rates(channels: int, shift: float) -> Tensor:
    """10000^(-k / (channels/2 - shift)), as guided diffusion (shift 0) and diffusers round them."""
    return torch.exp(-math.log(10000) * _numbers(channels) / (channels // 2 - shift))


def ddpm_rates(channels: int) -> Tensor:
    """10000^(-k / (channels/2 - 1)), as the codes of Ho et al. 2020 and Song et al. 2021 round them."""
    return torch.exp(_numbers(channels) * (-math.log(10000) / (channels // 2 - 1)))


def edm_rates(channels: int, shift: int) -> Tensor:
    """10000^(-k / (channels/2 - shift)), as Karras et al. 2022 round them."""
    return (1 / 10000) ** (_numbers(channels) / (channels // 2 - shift))


def _numbers(channels: int) -> Tensor:
    return torch.arange(channels // 2, dtype=torch.float32, device="cpu")
