"""ADM (Dhariwal and Nichol 2021, section 3) as Karras et al. 2022 (appendix F) train it.

Parameter names are those of the published files: enc and dec hold one entry for each layer, named for its resolution.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdedit.export.networks.edm_blocks import Style, UNetBlock, group_norm
from sdedit.export.networks.embedding import Sinusoidal, edm_rates

EPS = 1e-5  # of every GroupNorm
HEAD_CHANNELS = 64


class DhariwalUNet(nn.Module):
    """net(x (B, in, H, W), label (B,), class_label (B,) int64 if label_dim) -> (B, out, H, W).

    H and W are multiples of 2**(levels - 1); img_resolution only names the layers, and attn_resolutions the levels
    with attention by those names. Attention has one head for every 64 channels.
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
    ) -> None:
        super().__init__()
        self.names = [f"{img_resolution >> level}x{img_resolution >> level}" for level in range(len(channel_mult))]
        self.num_blocks = num_blocks
        embedding = model_channels * channel_mult_emb
        style = Style(embedding, EPS, skip_scale=1.0, adaptive_scale=True, resample_proj=False)
        widths = [model_channels * multiplier for multiplier in channel_mult]

        self.map_noise = Sinusoidal(edm_rates(model_channels, shift=0), cosine_first=True)
        self.map_layer0 = nn.Linear(model_channels, embedding)
        self.map_layer1 = nn.Linear(embedding, embedding)
        self.map_label = nn.Linear(label_dim, embedding, bias=False) if label_dim else None

        def block(width: int, out: int, level: int) -> UNetBlock:
            attention = img_resolution >> level in attn_resolutions
            return UNetBlock(width, out, style, heads=out // HEAD_CHANNELS if attention else 0)

        self.enc = nn.ModuleDict()
        width = widths[0]
        kept = []
        for level, (name, out) in enumerate(zip(self.names, widths, strict=True)):
            if level == 0:
                self.enc[f"{name}_conv"] = nn.Conv2d(in_channels, width, 3, padding=1)
            else:
                self.enc[f"{name}_down"] = UNetBlock(width, width, style, how="down")
            kept.append(width)
            for i in range(num_blocks):
                self.enc[f"{name}_block{i}"] = block(width, out, level)
                width = out
                kept.append(width)

        self.dec = nn.ModuleDict()
        for level, (name, out) in reversed(list(enumerate(zip(self.names, widths, strict=True)))):
            if level == len(widths) - 1:
                self.dec[f"{name}_in0"] = UNetBlock(width, width, style, heads=width // HEAD_CHANNELS)
                self.dec[f"{name}_in1"] = UNetBlock(width, width, style)
            else:
                self.dec[f"{name}_up"] = UNetBlock(width, width, style, how="up")
            for i in range(num_blocks + 1):
                self.dec[f"{name}_block{i}"] = block(width + kept.pop(), out, level)
                width = out
        self.out_norm = group_norm(width, EPS)
        self.out_conv = nn.Conv2d(width, out_channels, 3, padding=1)

    def embed(self, label: Tensor, class_label: Tensor | None) -> Tensor:
        e = self.map_layer1(F.silu(self.map_layer0(self.map_noise(label))))
        if self.map_label is not None:
            e = e + F.embedding(class_label, self.map_label.weight.t())
        return F.silu(e)

    def forward(self, x: Tensor, label: Tensor, class_label: Tensor | None = None) -> Tensor:
        e = self.embed(label, class_label)
        h, kept = x, []
        for name in self.names:
            h = self.enc[f"{name}_conv"](h) if name == self.names[0] else self.enc[f"{name}_down"](h, e)
            kept.append(h)
            for i in range(self.num_blocks):
                h = self.enc[f"{name}_block{i}"](h, e)
                kept.append(h)
        for name in reversed(self.names):
            if name == self.names[-1]:
                h = self.dec[f"{name}_in1"](self.dec[f"{name}_in0"](h, e), e)
            else:
                h = self.dec[f"{name}_up"](h, e)
            for i in range(self.num_blocks + 1):
                h = self.dec[f"{name}_block{i}"](torch.cat([h, kept.pop()], dim=1), e)
        return self.out_conv(F.silu(self.out_norm(h)))
