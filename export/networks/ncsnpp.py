"""NCSN++ and DDPM++, the score networks of Song et al. 2021 (appendix H), in their checkpoints' order and names.

A U-Net of residual blocks, with self-attention at some levels. What the paper varies is an argument: blocks as in
Ho et al. 2020 or Brock et al. 2019 (BigGAN: they also resample), resampling by a FIR filter (Zhang 2019), sums scaled
by 1/√2, and the image itself beside the features on the way down (progressive_input) and up (progressive).
"""

import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdedit.export.networks.embedding import Sinusoidal, ddpm_rates
from sdedit.export.networks.fir import Resample, Taps, smooth

HALF = math.sqrt(0.5)  # keeps the variance of a sum of two


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(channels // 4, 32), channels, eps=1e-6)


def conv3x3(c_in: int, c_out: int) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 3, padding=1)


class ConvDown(nn.Module):
    """(B, in, H, W) -> (B, out, H/2, W/2): a 3x3 convolution, after the FIR filter if there are taps."""

    def __init__(self, c_in: int, c_out: int, taps: Taps) -> None:
        super().__init__()
        self.channels, self.taps = c_in, taps
        conv = nn.Conv2d(c_in, c_out, 3, stride=2)
        if taps:
            self.Conv2d_0 = conv
        else:
            self.Conv_0 = conv

    def forward(self, x: Tensor) -> Tensor:
        if self.taps:
            return self.Conv2d_0(smooth(x, self.channels, self.taps, stride=1, padding=len(self.taps) // 2))
        return self.Conv_0(F.pad(x, (0, 1, 0, 1)))


class ConvUp(nn.Module):
    """(B, in, H, W) -> (B, out, 2H, 2W): nearest neighbour, and a 3x3 convolution."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.Conv_0 = conv3x3(c_in, c_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.Conv_0(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class NIN(nn.Module):
    """A 1x1 convolution whose weight is stored (in, out)."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.empty(c_in, c_out))
        self.b = nn.Parameter(torch.empty(c_out))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.W.t()[:, :, None, None], self.b)


class Attention(nn.Module):
    """Self-attention over the H*W positions with one head, and a residual connection."""

    def __init__(self, channels: int, *, rescale: bool) -> None:
        super().__init__()
        self.scale = HALF if rescale else 1.0
        self.GroupNorm_0 = group_norm(channels)
        self.NIN_0, self.NIN_1, self.NIN_2, self.NIN_3 = (NIN(channels, channels) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.GroupNorm_0(x)
        q, k, v = (nin(h).flatten(2).transpose(1, 2)[:, None] for nin in (self.NIN_0, self.NIN_1, self.NIN_2))
        h = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).reshape(x.shape)  # of (B, 1, H*W, C)
        return (x + self.NIN_3(h)) * self.scale


class Block(nn.Module):
    """(B, in, H, W), embedding (B, 4 nf) or None -> (B, out, H, W), or resampled by `resample`."""

    def __init__(
        self, c_in: int, c_out: int, *, embedding: int, biggan: bool, rescale: bool, resample: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.scale = HALF if rescale else 1.0
        self.resample = resample if resample is not None else nn.Identity()
        self.GroupNorm_0 = group_norm(c_in)
        self.Conv_0 = conv3x3(c_in, c_out)
        self.Dense_0 = nn.Linear(embedding, c_out)
        self.GroupNorm_1 = group_norm(c_out)
        self.Conv_1 = conv3x3(c_out, c_out)
        self.shortcut = "Conv_2" if biggan else "NIN_0"
        if c_in == c_out and resample is None:
            self.shortcut = ""
        elif biggan:
            self.Conv_2 = nn.Conv2d(c_in, c_out, 1)
        else:
            self.NIN_0 = NIN(c_in, c_out)

    def forward(self, x: Tensor, embedding: Tensor | None) -> Tensor:
        h = self.Conv_0(self.resample(F.silu(self.GroupNorm_0(x))))
        if embedding is not None:
            h = h + self.Dense_0(F.silu(embedding))[:, :, None, None]
        h = self.Conv_1(F.silu(self.GroupNorm_1(h)))
        x = self.resample(x)
        if self.shortcut:
            x = self.get_submodule(self.shortcut)(x)
        return (x + h) * self.scale


class Combine(nn.Module):
    """The image (B, image, H, W), through a 1x1 convolution, added to the features or put before them."""

    def __init__(self, image: int, channels: int, *, cat: bool) -> None:
        super().__init__()
        self.cat = cat
        self.Conv_0 = nn.Conv2d(image, channels, 1)

    def forward(self, image: Tensor, h: Tensor) -> Tensor:
        image = self.Conv_0(image)
        return torch.cat([image, h], dim=1) if self.cat else image + h


class Fourier(nn.Module):
    """Random Fourier features (Tancik et al. 2020): (B,) -> (B, 2 nf). W is drawn once and never trained."""

    def __init__(self, nf: int) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.empty(nf), requires_grad=False)

    def forward(self, v: Tensor) -> Tensor:
        phase = v[:, None] * self.W * (2 * math.pi)
        return torch.cat([phase.sin(), phase.cos()], dim=1)


class NCSNpp(nn.Module):
    """x (B, C, H, W), label (B,) -> (B, C, H, W). H and W are multiples of 2^(levels - 1).

    attention: the levels that have it, 0 the finest. fourier: the label is σ (> 0) and its logarithm is embedded; else
    the label itself is. centered: x is in [-1, 1], else in [0, 1]. scale_by_sigma: the output is divided by the label.
    taps: the FIR filter, symmetric and even in number; () without. conditional False: the label is not looked at.
    """

    def __init__(
        self,
        *,
        channels: int,
        nf: int,
        ch_mult: tuple[int, ...],
        num_res_blocks: int,
        attention: tuple[int, ...],
        fourier: bool,
        conditional: bool,
        biggan: bool,
        taps: Taps,
        resamp_with_conv: bool,
        skip_rescale: bool,
        progressive: str,
        progressive_input: str,
        progressive_combine: str,
        centered: bool,
        scale_by_sigma: bool,
    ) -> None:
        super().__init__()
        self.levels, self.blocks, self.attention = len(ch_mult), num_res_blocks, attention
        self.conditional, self.biggan = conditional, biggan
        self.positional = None if fourier else Sinusoidal(ddpm_rates(nf), cosine_first=False)
        self.progressive, self.progressive_input = progressive, progressive_input
        self.centered, self.scale_by_sigma, self.scale = centered, scale_by_sigma, HALF if skip_rescale else 1.0
        self.shrink = Resample(channels, up=False, taps=taps)
        self.enlarge = Resample(channels, up=True, taps=taps)

        block = partial(Block, embedding=4 * nf, biggan=biggan, rescale=skip_rescale)
        attend = partial(Attention, rescale=skip_rescale)

        def change_size(c: int, *, up: bool) -> nn.Module:
            if biggan:
                return block(c, c, resample=Resample(c, up=up, taps=taps))
            if resamp_with_conv:
                return ConvUp(c, c) if up else ConvDown(c, c, taps)
            return Resample(c, up=up, taps=taps)

        modules: list[nn.Module] = [Fourier(nf)] if fourier else []
        if conditional:
            modules += [nn.Linear(2 * nf if fourier else nf, 4 * nf), nn.Linear(4 * nf, 4 * nf)]

        modules.append(conv3x3(channels, nf))
        c, pyramid, kept = nf, channels, [nf]
        for level, multiplier in enumerate(ch_mult):
            for _ in range(num_res_blocks):
                modules.append(block(c, nf * multiplier))
                c = nf * multiplier
                if level in attention:
                    modules.append(attend(c))
                kept.append(c)
            if level < len(ch_mult) - 1:
                modules.append(change_size(c, up=False))
                if progressive_input == "input_skip":
                    modules.append(Combine(channels, c, cat=progressive_combine == "cat"))
                    c *= 2 if progressive_combine == "cat" else 1
                elif progressive_input == "residual":
                    modules.append(ConvDown(pyramid, c, taps))
                    pyramid = c
                kept.append(c)

        modules += [block(c, c), attend(c), block(c, c)]

        for level, multiplier in reversed(list(enumerate(ch_mult))):
            for _ in range(num_res_blocks + 1):
                modules.append(block(c + kept.pop(), nf * multiplier))
                c = nf * multiplier
            if level in attention:
                modules.append(attend(c))
            if progressive == "output_skip":
                modules += [group_norm(c), conv3x3(c, channels)]
            elif progressive == "residual" and level == len(ch_mult) - 1:
                modules += [group_norm(c), conv3x3(c, c)]
            elif progressive == "residual":
                modules.append(ConvUp(pyramid, c))
            pyramid = c
            if level:
                modules.append(change_size(c, up=True))
        if progressive != "output_skip":
            modules += [group_norm(c), conv3x3(c, channels)]
        self.all_modules = nn.ModuleList(modules)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        modules = iter(self.all_modules)

        def following(*inputs: Tensor | None) -> Tensor:  # the next module in the checkpoint's order
            return next(modules)(*inputs)

        e = self.positional(label) if self.positional else following(label.log())
        e = following(F.silu(following(e))) if self.conditional else None
        image = x if self.centered else 2 * x - 1

        h = following(image)
        kept = [h]
        for level in range(self.levels):
            for _ in range(self.blocks):
                h = following(h, e)
                if level in self.attention:
                    h = following(h)
                kept.append(h)
            if level < self.levels - 1:
                h = following(h, e) if self.biggan else following(h)
                if self.progressive_input == "input_skip":
                    image = self.shrink(image)
                    h = following(image, h)
                elif self.progressive_input == "residual":
                    h = image = (following(image) + h) * self.scale
                kept.append(h)

        h = following(h, e)
        h = following(h)
        h = following(h, e)

        for level in reversed(range(self.levels)):
            for _ in range(self.blocks + 1):
                h = following(torch.cat([h, kept.pop()], dim=1), e)
            if level in self.attention:
                h = following(h)
            if level == self.levels - 1 and self.progressive != "none":
                image = following(F.silu(following(h)))
            elif self.progressive == "output_skip":
                image = self.enlarge(image) + following(F.silu(following(h)))
            elif self.progressive == "residual":
                h = image = (following(image) + h) * self.scale
            if level:
                h = following(h, e) if self.biggan else following(h)

        h = image if self.progressive == "output_skip" else following(F.silu(following(h)))
        return h / label[:, None, None, None] if self.scale_by_sigma else h
