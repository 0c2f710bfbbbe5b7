"""The network of the bundled model: a small U-Net on 2x2 patches, with EDM preconditioning.

Blocks: GroupNorm, SiLU, 3x3 convolution, twice, with an adaptive scale and shift from the noise
level (Dhariwal and Nichol 2021, section 3) and self-attention at the coarsest resolution.
Preconditioning: Karras et al. 2022, table 1. Patches: space-to-depth, so that the finest convolution
runs at half resolution, which is what makes training on a CPU possible at all.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ResidualBlock(nn.Module):
    """(B, in, H, W) -> (B, out, H, W), modulated by the noise-level embedding (B, embedding)."""

    def __init__(self, in_channels: int, out_channels: int, embedding: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(in_channels // 8, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.modulation = nn.Linear(embedding, 2 * out_channels)
        self.norm2 = nn.GroupNorm(out_channels // 8, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.modulation(embedding)[:, :, None, None].chunk(2, dim=1)
        h = self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))
        return (self.skip(x) + h) * math.sqrt(0.5)


class SelfAttention(nn.Module):
    """Multi-head self-attention over the H*W positions, with a residual connection."""

    def __init__(self, channels: int, head_channels: int = 32) -> None:
        super().__init__()
        self.heads = channels // head_channels
        self.norm = nn.GroupNorm(channels // 8, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.project = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.project.weight)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        qkv = self.qkv(self.norm(x)).reshape(batch, 3, self.heads, -1, height * width)
        q, k, v = qkv.transpose(-1, -2).unbind(1)  # each (B, heads, H*W, head_channels)
        h = F.scaled_dot_product_attention(q, k, v)
        h = h.transpose(-1, -2).reshape(batch, channels, height, width)
        return (x + self.project(h)) * math.sqrt(0.5)


class PatchUNet(nn.Module):
    """D(x; sigma): the denoised image for x (B, 3, H, W) in the variance-exploding frame.

    H and W are multiples of 8 (patches of 2, halved twice); attention sees 8x8 positions at 64.
    sigma: (B,), the standard deviation of the noise in x; data in [-1, 1].
    """

    def __init__(
        self,
        channels: int = 3,
        widths: tuple[int, ...] = (48, 96, 192),
        blocks: int = 2,
        patch: int = 2,
        sigma_data: float = 0.5,
        sigma_range: tuple[float, float] = (0.002, 80.0),
    ) -> None:
        super().__init__()
        self.sigma_data, self.sigma_range = sigma_data, sigma_range
        embedding = 2 * widths[0]
        self.register_buffer("frequencies", torch.exp(torch.linspace(-1.0, 4.0, widths[0])))
        self.embed = nn.Sequential(
            nn.Linear(2 * widths[0], embedding), nn.SiLU(), nn.Linear(embedding, embedding), nn.SiLU()
        )
        self.patchify = nn.PixelUnshuffle(patch)
        self.stem = nn.Conv2d(channels * patch**2, widths[0], 3, padding=1)

        self.down = nn.ModuleList()
        self.shrink = nn.ModuleList()
        for width, wider in zip(widths, (*widths[1:], widths[-1]), strict=True):
            self.down.append(nn.ModuleList(ResidualBlock(width, width, embedding) for _ in range(blocks)))
            if len(self.down) < len(widths):
                self.shrink.append(nn.Conv2d(width, wider, 3, stride=2, padding=1))
        self.middle = ResidualBlock(widths[-1], widths[-1], embedding)
        self.attention = nn.ModuleList(SelfAttention(widths[-1]) for _ in range(2))
        self.up = nn.ModuleList()
        self.grow = nn.ModuleList()
        for width, narrower in zip(widths[::-1], (*widths[-2::-1], 0), strict=True):
            first = ResidualBlock(2 * width, width, embedding)
            rest = (ResidualBlock(width, width, embedding) for _ in range(blocks - 1))
            self.up.append(nn.ModuleList((first, *rest)))
            if narrower:
                self.grow.append(nn.Conv2d(width, narrower, 1))
        self.norm = nn.GroupNorm(widths[0] // 8, widths[0])
        self.head = nn.Conv2d(widths[0], channels * patch**2, 3, padding=1)
        nn.init.zeros_(self.head.weight)
        self.unpatchify = nn.PixelShuffle(patch)

    def raw(self, x: Tensor, noise_level: Tensor) -> Tensor:
        """F(x, c_noise): the network itself, between its preconditioners."""
        phase = noise_level[:, None] * self.frequencies
        e = self.embed(torch.cat([phase.cos(), phase.sin()], dim=1))
        h = self.stem(self.patchify(x))
        kept = []
        for level, stage in enumerate(self.down):
            for block in stage:
                h = block(h, e)
            kept.append(h)
            if level < len(self.shrink):
                h = self.shrink[level](h)
        h = self.attention[0](h)
        h = self.attention[1](self.middle(h, e))
        for level, stage in enumerate(self.up):
            h = torch.cat([h, kept.pop()], dim=1)
            for block in stage:
                h = block(h, e)
            if level < len(self.grow):
                h = F.interpolate(self.grow[level](h), scale_factor=2.0, mode="nearest")
        return self.unpatchify(self.head(F.silu(self.norm(h))))

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        variance = sigma[:, None, None, None] ** 2 + self.sigma_data**2
        c_skip = self.sigma_data**2 / variance
        c_out = sigma[:, None, None, None] * self.sigma_data / variance.sqrt()
        noise_level = torch.clamp(sigma, *self.sigma_range).log() / 4
        return c_skip * x + c_out * self.raw(x / variance.sqrt(), noise_level)
