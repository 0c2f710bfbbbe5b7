"""ADM: the U-Net of Dhariwal and Nichol 2021 (section 3), which is also that of Nichol and Dhariwal 2021.

Parameter names are those of the published files: input_blocks, middle_block, output_blocks, each entry of the
outer two a residual block, then attention where the level has it, then a change of resolution where one is due.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdedit.export.networks.embedding import Sinusoidal, rates

GROUPS = 32  # of every GroupNorm


class ResidualBlock(nn.Module):
    """(B, in, H, W), embedding (B, E) -> (B, out, H, W); `resample` (up or down by 2) acts on both branches."""

    def __init__(
        self, width: int, out: int, embedding: int, *, scale_shift: bool, resample: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.resample = resample or nn.Identity()
        self.in_layers = nn.Sequential(nn.GroupNorm(GROUPS, width), nn.SiLU(), nn.Conv2d(width, out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, 2 * out if scale_shift else out))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(GROUPS, out), nn.SiLU(), nn.Identity(), nn.Conv2d(out, out, 3, padding=1)
        )  # the third is dropout in training
        self.skip_connection = nn.Conv2d(width, out, 1) if width != out else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        norm, silu, conv = self.in_layers
        h = conv(self.resample(silu(norm(x))))
        e = self.emb_layers(embedding)[:, :, None, None]
        norm, *rest = self.out_layers
        if self.scale_shift:  # adaptive group normalisation: section 3.1
            scale, shift = e.chunk(2, dim=1)
            h = norm(h) * (1 + scale) + shift
        else:
            h = norm(h + e)
        for layer in rest:
            h = layer(h)
        return self.skip_connection(self.resample(x)) + h


class Attention(nn.Module):
    """Multi-head self-attention over the H*W positions, with a residual connection.

    The 3*C channels of qkv are ordered heads, (q, k, v), C/heads; or with new_order (q, k, v), heads, C/heads.
    """

    def __init__(self, width: int, heads: int, *, new_order: bool) -> None:
        super().__init__()
        self.width, self.heads, self.new_order = width, heads, new_order
        self.norm = nn.GroupNorm(GROUPS, width)
        self.qkv = nn.Conv1d(width, 3 * width, 1)
        self.proj_out = nn.Conv1d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, part = x.shape[0], self.width // self.heads
        order = (3, self.heads) if self.new_order else (self.heads, 3)
        qkv = self.qkv(self.norm(x).flatten(2)).reshape(batch, *order, part, -1).transpose(-1, -2)
        q, k, v = qkv.unbind(1 if self.new_order else 2)  # each (B, heads, H*W, C/heads)
        h = F.scaled_dot_product_attention(q, k, v, scale=part**-0.5).transpose(-1, -2)
        return x + self.proj_out(h.reshape(batch, self.width, -1)).reshape(x.shape)


class Downsample(nn.Module):
    """Half the resolution: a convolution of stride 2, or without one the mean of 2x2."""

    def __init__(self, width: int, *, conv: bool) -> None:
        super().__init__()
        self.op = nn.Conv2d(width, width, 3, stride=2, padding=1) if conv else nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """Twice the resolution: every pixel repeated 2x2, then a convolution if `conv`."""

    def __init__(self, width: int, *, conv: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1) if conv else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Block(nn.ModuleList):
    """Layers in a row, of which the residual blocks see the embedding."""

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        for layer in self:
            h = layer(h, embedding) if isinstance(layer, ResidualBlock) else layer(h)
        return h


class ADM(nn.Module):
    """net(x (B, C, H, W), label (B,), class_label (B,) int64 if classes) -> (B, out_channels, H, W).

    H and W are multiples of 2**(levels - 1). Levels count from 0, the finest; `attention` names those that have it
    (the middle always has). Heads: num_head_channels channels each, or else num_heads of them, num_heads_upsample
    on the way up.
    """

    def __init__(
        self,
        *,
        channels: int,
        out_channels: int,
        model_channels: int,
        widths: tuple[int, ...],
        blocks: int,
        attention: set[int],
        num_heads: int,
        num_heads_upsample: int,
        num_head_channels: int | None,
        new_order: bool,
        classes: int,
        scale_shift: bool,
        updown: bool,
        conv_resample: bool,
    ) -> None:
        super().__init__()
        embedding = 4 * model_channels
        self.sinusoidal = Sinusoidal(rates(model_channels, shift=0), cosine_first=True)
        self.time_embed = nn.Sequential(
            nn.Linear(model_channels, embedding), nn.SiLU(), nn.Linear(embedding, embedding)
        )
        self.label_emb = nn.Embedding(classes, embedding) if classes else None

        def residual(width: int, out: int, resample: nn.Module | None = None) -> ResidualBlock:
            return ResidualBlock(width, out, embedding, scale_shift=scale_shift, resample=resample)

        def attend(width: int, heads: int) -> Attention:
            part = num_head_channels or heads
            if width % part:
                raise ValueError(f"an attention layer of {width} does not divide by {part}")
            return Attention(width, width // part if num_head_channels else heads, new_order=new_order)

        width = widths[0]
        kept = [width]  # the width of every input block, which an output block takes back
        self.input_blocks = nn.ModuleList([Block([nn.Conv2d(channels, width, 3, padding=1)])])
        for level, out in enumerate(widths):
            for _ in range(blocks):
                block = Block([residual(width, out)])
                if level in attention:
                    block.append(attend(out, num_heads))
                self.input_blocks.append(block)
                width = out
                kept.append(width)
            if level < len(widths) - 1:
                half = Downsample(width, conv=conv_resample and not updown)
                self.input_blocks.append(Block([residual(width, width, half) if updown else half]))
                kept.append(width)

        self.middle_block = Block([residual(width, width), attend(width, num_heads), residual(width, width)])

        self.output_blocks = nn.ModuleList()
        for level, out in reversed(list(enumerate(widths))):
            for _ in range(blocks + 1):
                block = Block([residual(width + kept.pop(), out)])
                if level in attention:
                    block.append(attend(out, num_heads_upsample))
                self.output_blocks.append(block)
                width = out
            if level:
                double = Upsample(width, conv=conv_resample and not updown)
                block.append(residual(width, width, double) if updown else double)

        self.out = nn.Sequential(nn.GroupNorm(GROUPS, width), nn.SiLU(), nn.Conv2d(width, out_channels, 3, padding=1))

    def forward(self, x: Tensor, label: Tensor, class_label: Tensor | None = None) -> Tensor:
        e = self.time_embed(self.sinusoidal(label))
        if self.label_emb is not None:
            e = e + self.label_emb(class_label)
        h, kept = x, []
        for block in self.input_blocks:
            h = block(h, e)
            kept.append(h)
        h = self.middle_block(h, e)
        for block in self.output_blocks:
            h = block(torch.cat([h, kept.pop()], dim=1), e)
        return self.out(h)
