"""What the two networks of Karras et al. 2022 (appendix F) are made of: one residual block, with or without attention.

Parameter names are those of the published files. Resampling is by a FIR filter (Zhang 2019), whose taps the files
repeat in a buffer beside every layer that uses it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdedit.export.networks import fir
from sdedit.export.networks.fir import Taps, smooth


@dataclass(frozen=True)
class Style:
    """What the blocks of one network have in common."""

    embedding: int  # channels of the noise-level embedding
    eps: float  # of every GroupNorm
    skip_scale: float  # applied to each sum of a branch and its shortcut
    adaptive_scale: bool  # the embedding scales and shifts after the second norm; else it is added before
    resample_proj: bool  # a 1x1 convolution in the shortcut wherever the resolution changes
    taps: Taps = (1, 1)


def group_norm(channels: int, eps: float) -> nn.GroupNorm:
    return nn.GroupNorm(min(32, channels // 4), channels, eps=eps)


def filter_buffer(taps: Taps) -> Tensor:
    """As files hold it: (1, 1, taps, taps) with sum 1. Not read in forward, which has the taps themselves."""
    row = torch.tensor(taps, dtype=torch.float32) / sum(taps)
    return torch.outer(row, row)[None, None]


class Resample(fir.Resample):
    """Twice ("up") or half ("down") the size, without weights."""

    def __init__(self, channels: int, how: str, taps: Taps) -> None:
        super().__init__(channels, up=how == "up", taps=taps)
        self.register_buffer("resample_filter", filter_buffer(taps))


class ResampleConv(nn.Conv2d):
    """A resampling, then a convolution."""

    def __init__(self, width: int, out: int, kernel: int, how: str, taps: Taps) -> None:
        super().__init__(width, out, kernel, padding=kernel // 2)
        self.resample = fir.Resample(width, up=how == "up", taps=taps)
        self.register_buffer("resample_filter", filter_buffer(taps))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.resample(x))


class FusedDown(nn.Conv2d):
    """A 3x3 convolution, then the filter to half the size, on a border that both have left."""

    def __init__(self, width: int, out: int, taps: Taps) -> None:
        super().__init__(width, out, 3, padding=1 + (len(taps) - 1) // 2)
        self.taps = taps
        self.register_buffer("resample_filter", filter_buffer(taps))

    def forward(self, x: Tensor) -> Tensor:
        return smooth(super().forward(x), self.out_channels, self.taps, stride=2, padding=0)


class UNetBlock(nn.Module):
    """(B, in, H, W), embedding (B, E) -> (B, out, H', W'), H' = H, 2H ("up") or H/2 ("down").

    heads: of the self-attention over the H'*W' positions that follows the convolutions; 0 for none.
    """

    def __init__(self, width: int, out: int, style: Style, *, heads: int = 0, how: str | None = None) -> None:
        super().__init__()
        if heads and out % heads:
            raise ValueError(f"{heads} heads do not share {out} channels")
        self.style, self.heads = style, heads
        self.norm0 = group_norm(width, style.eps)
        self.conv0 = ResampleConv(width, out, 3, how, style.taps) if how else nn.Conv2d(width, out, 3, padding=1)
        self.affine = nn.Linear(style.embedding, 2 * out if style.adaptive_scale else out)
        self.norm1 = group_norm(out, style.eps)
        self.conv1 = nn.Conv2d(out, out, 3, padding=1)
        project = width != out or (how is not None and style.resample_proj)
        if how:
            self.skip = ResampleConv(width, out, 1, how, style.taps) if project else Resample(width, how, style.taps)
        else:
            self.skip = nn.Conv2d(width, out, 1) if project else nn.Identity()
        if heads:
            self.norm2 = group_norm(out, style.eps)
            self.qkv = nn.Conv2d(out, 3 * out, 1)
            self.proj = nn.Conv2d(out, out, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv0(F.silu(self.norm0(x)))
        e = self.affine(embedding)[:, :, None, None]
        if self.style.adaptive_scale:  # Dhariwal and Nichol 2021, section 3.1
            scale, shift = e.chunk(2, dim=1)
            h = F.silu(self.norm1(h) * (1 + scale) + shift)
        else:
            h = F.silu(self.norm1(h + e))
        x = (self.skip(x) + self.conv1(h)) * self.style.skip_scale
        return (x + self.proj(self.attend(x))) * self.style.skip_scale if self.heads else x

    def attend(self, x: Tensor) -> Tensor:
        """Multi-head self-attention. The channels of qkv are ordered heads, C/heads, (q, k, v)."""
        batch, channels, height, width = x.shape
        qkv = self.qkv(self.norm2(x)).reshape(batch, self.heads, -1, 3, height * width)
        q, k, v = qkv.transpose(2, 4).unbind(3)  # each (B, heads, H*W, C/heads)
        return F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(batch, channels, height, width)
