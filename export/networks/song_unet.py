"""DDPM++ and NCSN++ (Song et al. 2021) as Karras et al. 2022 (appendix F) train them.

Parameter names are those of the published files: enc and dec hold one entry for each layer, named for its resolution.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdedit.export.networks.edm_blocks import FusedDown, Resample, Style, Taps, UNetBlock, group_norm
from sdedit.export.networks.embedding import Sinusoidal, edm_rates

EPS = 1e-6  # of every GroupNorm
HALF = math.sqrt(0.5)  # keeps the variance of a sum of two


class Fourier(nn.Module):
    """Random Fourier features (Tancik et al. 2020): (B,) -> (B, channels). Never trained."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("freqs", torch.empty(channels // 2))

    def forward(self, label: Tensor) -> Tensor:
        phase = label[:, None] * (2 * math.pi * self.freqs)
        return torch.cat([phase.sin(), phase.cos()], dim=1)


class SongUNet(nn.Module):
    """net(x (B, in, H, W), label (B,), class_label (B,) int64 if label_dim) -> (B, out, H, W).

    H and W are multiples of 2**(levels - 1); img_resolution only names the layers. encoder_type: standard, skip (the
    shrunken image is added at every level) or residual (what came before is added, filtered); decoder_type: standard
    or skip (every level adds to the output). attn_resolutions: levels with attention, by the names of their layers.
    """

    def __init__(
        self,
        *,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int,
        model_channels: int,
        channel_mult: tuple[int, ...],
        channel_mult_emb: int,
        num_blocks: int,
        attn_resolutions: tuple[int, ...],
        embedding_type: str,
        channel_mult_noise: int,
        encoder_type: str,
        decoder_type: str,
        resample_filter: Taps,
    ) -> None:
        super().__init__()
        self.names = [f"{img_resolution >> level}x{img_resolution >> level}" for level in range(len(channel_mult))]
        self.num_blocks, self.label_dim = num_blocks, label_dim
        self.encoder_type, self.decoder_type = encoder_type, decoder_type
        noise, embedding = model_channels * channel_mult_noise, model_channels * channel_mult_emb
        style = Style(embedding, EPS, HALF, adaptive_scale=False, resample_proj=True, taps=resample_filter)
        widths = [model_channels * multiplier for multiplier in channel_mult]
        attention = [img_resolution >> level in attn_resolutions for level in range(len(widths))]

        positional = Sinusoidal(edm_rates(noise, shift=1), cosine_first=False)
        self.map_noise = Fourier(noise) if embedding_type == "fourier" else positional
        self.map_label = nn.Linear(label_dim, noise) if label_dim else None
        self.map_layer0 = nn.Linear(noise, embedding)
        self.map_layer1 = nn.Linear(embedding, embedding)

        self.enc = nn.ModuleDict()
        aux, width = in_channels, model_channels
        kept = []
        for level, (name, out) in enumerate(zip(self.names, widths, strict=True)):
            if level == 0:
                self.enc[f"{name}_conv"] = nn.Conv2d(in_channels, width, 3, padding=1)
            else:
                self.enc[f"{name}_down"] = UNetBlock(width, width, style, how="down")
                if encoder_type == "skip":
                    self.enc[f"{name}_aux_down"] = Resample(aux, "down", resample_filter)
                    self.enc[f"{name}_aux_skip"] = nn.Conv2d(aux, width, 1)
                if encoder_type == "residual":
                    self.enc[f"{name}_aux_residual"] = FusedDown(aux, width, resample_filter)
                    aux = width
            kept.append(width)
            for i in range(num_blocks):
                self.enc[f"{name}_block{i}"] = UNetBlock(width, out, style, heads=int(attention[level]))
                width = out
                kept.append(width)

        self.dec = nn.ModuleDict()
        last = len(widths) - 1
        for level, (name, out) in reversed(list(enumerate(zip(self.names, widths, strict=True)))):
            if level == last:
                self.dec[f"{name}_in0"] = UNetBlock(width, width, style, heads=1)
                self.dec[f"{name}_in1"] = UNetBlock(width, width, style)
            else:
                self.dec[f"{name}_up"] = UNetBlock(width, width, style, how="up")
            for i in range(num_blocks + 1):
                heads = int(attention[level] and i == num_blocks)
                self.dec[f"{name}_block{i}"] = UNetBlock(width + kept.pop(), out, style, heads=heads)
                width = out
            if decoder_type == "skip" or level == 0:
                if level < last and decoder_type == "skip":
                    self.dec[f"{name}_aux_up"] = Resample(out_channels, "up", resample_filter)
                self.dec[f"{name}_aux_norm"] = group_norm(width, EPS)
                self.dec[f"{name}_aux_conv"] = nn.Conv2d(width, out_channels, 3, padding=1)

    def embed(self, label: Tensor, class_label: Tensor | None) -> Tensor:
        e = self.map_noise(label)
        if self.map_label is not None:  # the product with a one-hot vector of length √label_dim
            e = e + F.embedding(class_label, self.map_label.weight.t()) * math.sqrt(self.label_dim)
            e = e + self.map_label.bias
        return F.silu(self.map_layer1(F.silu(self.map_layer0(e))))

    def forward(self, x: Tensor, label: Tensor, class_label: Tensor | None = None) -> Tensor:
        e = self.embed(label, class_label)
        h, aux, kept = x, x, []
        for level, name in enumerate(self.names):
            if level == 0:
                h = self.enc[f"{name}_conv"](h)
            else:
                h = self.enc[f"{name}_down"](h, e)
                if self.encoder_type == "skip":
                    aux = self.enc[f"{name}_aux_down"](aux)
                    h = h + self.enc[f"{name}_aux_skip"](aux)
                if self.encoder_type == "residual":
                    h = aux = (h + self.enc[f"{name}_aux_residual"](aux)) * HALF
            kept.append(h)
            for i in range(self.num_blocks):
                h = self.enc[f"{name}_block{i}"](h, e)
                kept.append(h)

        image = None
        for name in reversed(self.names):
            if name == self.names[-1]:
                h = self.dec[f"{name}_in1"](self.dec[f"{name}_in0"](h, e), e)
            else:
                h = self.dec[f"{name}_up"](h, e)
            for i in range(self.num_blocks + 1):
                h = self.dec[f"{name}_block{i}"](torch.cat([h, kept.pop()], dim=1), e)
            if f"{name}_aux_conv" in self.dec:
                part = self.dec[f"{name}_aux_conv"](F.silu(self.dec[f"{name}_aux_norm"](h)))
                image = part if image is None else self.dec[f"{name}_aux_up"](image) + part
        return image
