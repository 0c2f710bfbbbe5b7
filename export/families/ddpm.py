"""PyTorch ports of the DDPM U-Net (Ho et al. 2020, appendix B), SDEdit's published .ckpt files among them.

The shapes of the tensors tell the architecture. The picture's size follows from the level that has attention,
which in this family is the one of 16x16; the noise schedule is the paper's unless --config says otherwise. The
network is diffusers' UNet2DModel with the same layers under other names.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sdedit import sde
from sdedit.errors import ArtifactError, OptionError
from sdedit.export import schedules
from sdedit.export.checkpoints import CheckpointError, find_network, flat, load_weights, parameter_count, shape_of
from sdedit.export.denoiser import Convention
from sdedit.export.networks.embedding import Sinusoidal, ddpm_rates
from sdedit.export.networks.unet2d import PlainUNet, unet_on_meta
from sdedit.export.source import Payload, Source, SourceOptions

NAME = "ddpm"
DESCRIPTION = "PyTorch file with temb.dense, down.i.block.j, mid.attn_1 and up.i: SDEdit's .ckpt, a DDPM U-Net"
STEM = "temb.dense.0.weight"
MARKERS = (
    r"(^|\.)temb\.dense\.0\.weight$",
    r"(^|\.)down\.0\.block\.0\.conv1\.weight$",
    r"(^|\.)mid\.attn_1\.q\.weight$",
)
ATTENTION_AT = 16  # the resolution that has attention in every published model of this family
GROUPS = 32  # of every normalisation
LARGEST_STEPS = 100_000

NAMES = (  # of the file -> of UNet2DModel; up levels are counted from the other end
    (r"^temb\.dense\.0\.", "time_embedding.linear_1."),
    (r"^temb\.dense\.1\.", "time_embedding.linear_2."),
    (r"^norm_out\.", "conv_norm_out."),
    (r"^(down|up)\.(\d+)\.", r"\1_blocks.\2."),
    (r"^mid\.block_1\.", "mid_block.resnets.0."),
    (r"^mid\.block_2\.", "mid_block.resnets.1."),
    (r"^mid\.attn_1\.", "mid_block.attentions.0."),
    (r"\.block\.(\d+)\.", r".resnets.\1."),
    (r"\.attn\.(\d+)\.", r".attentions.\1."),
    (r"\.(down|up)sample\.conv\.", r".\1samplers.0.conv."),
    (r"(\.resnets\.\d+)\.temb_proj\.", r"\1.time_emb_proj."),
    (r"(\.resnets\.\d+)\.nin_shortcut\.", r"\1.conv_shortcut."),
    (r"(\.attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(\.attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(\.attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
)

# --- what the user says ------------------------------------------------------------------------------------------

SECTIONS = ("model", "data", "diffusion")  # of the original's configuration file
SCHEDULE = ("beta_schedule", "beta_start", "beta_end", "num_diffusion_timesteps")
OPTIONS = (
    *("in_channels", "out_ch", "ch", "ch_mult", "num_res_blocks", "attn_resolutions", "resamp_with_conv"),
    *("image_size", "channels", "rescaled", "logit_transform", *SCHEDULE),
)
PASSED_OVER = (  # of training and sampling: D does not depend on them
    *("sampling", "training", "optim", "type", "dropout", "var_type", "ema", "ema_rate", "dataset", "category"),
    *("num_workers", "uniform_dequantization", "gaussian_dequantization", "random_flip"),
)
SCHEDULES = ("linear", "quad")

_PUBLISHED = {  # what the published models share
    "ch": 128,
    "num_res_blocks": 2,
    "attn_resolutions": [ATTENTION_AT],
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "num_diffusion_timesteps": 1000,
}
_256 = {**_PUBLISHED, "image_size": 256, "ch_mult": [1, 1, 2, 2, 4, 4]}
PRESETS: dict[str, dict[str, Any]] = {
    "sdedit-church-256": _256,
    "sdedit-bedroom-256": _256,
    "sdedit-celebahq-256": _256,
    "ddpm-cifar10": {**_PUBLISHED, "image_size": 32, "ch_mult": [1, 2, 2, 2]},
}


def _settings(options: SourceOptions) -> dict[str, Any]:
    """The preset's options under the user's. Raises OptionError for what nobody knows."""
    settings = options.preset_of(NAME, PRESETS) | options.config_without(SECTIONS, PASSED_OVER)
    if unknown := [option for option in settings if option not in OPTIONS]:
        raise OptionError(
            f"config: family ddpm does not know {unknown[0]!r}", hint=f"--config takes {', '.join(OPTIONS)}"
        )
    at = settings.get("attn_resolutions", [])
    sizes = [settings.get("image_size", 1), *(at if isinstance(at, list | tuple) else [None])]
    if any(type(size) is not int or size < 1 for size in sizes):
        raise OptionError(
            "config: image_size and attn_resolutions must be whole numbers above 0",
            hint="""--config '{"image_size": 256, "attn_resolutions": [16]}'""",
        )
    return settings


def _levels(settings: Mapping[str, Any], betas: Tensor | None) -> sde.VPDiscrete:
    """ᾱ of the training: as the user says, as the file's own betas say, or as in Ho et al. 2020, section 4."""
    kind = settings.get("beta_schedule", "linear")
    try:
        if betas is not None and not any(name in settings for name in SCHEDULE):
            return schedules.from_betas(betas.double().numpy())
        start, end = (float(settings.get(name, value)) for name, value in (("beta_start", 1e-4), ("beta_end", 0.02)))
        steps = int(settings.get("num_diffusion_timesteps", 1000))
        if kind not in SCHEDULES or not 0 < start <= end < 1 or not 1 <= steps <= LARGEST_STEPS:
            raise ValueError
        return schedules.linear(start, end, steps) if kind == "linear" else schedules.scaled_linear(start, end, steps)
    except (ArtifactError, TypeError, ValueError) as error:
        given = {name: settings[name] for name in SCHEDULE if name in settings} or "the file's betas"
        raise OptionError(
            f"config: no noise schedule follows from {given}",
            hint=f"--config: beta_schedule {' or '.join(SCHEDULES)}, 0 < beta_start <= beta_end < 1",
        ) from error


# --- what the file says ------------------------------------------------------------------------------------------


def build(payload: Payload, options: SourceOptions) -> Source:
    """A network in whichever container its training left it. Raises CheckpointError, OptionError."""
    settings = _settings(options)
    everything = dict(flat(payload))
    tensors, _, weights = find_network(everything, STEM, options.weights)
    shape = Shape(tensors)
    _compare(shape, settings, options.preset)
    size = options.size or shape.size(settings)
    unet = unet_on_meta(shape.unet_config())
    unet.time_proj = Sinusoidal(ddpm_rates(shape.ch), cosine_first=False)
    load_weights(unet, rename(tensors, shape.levels), hint="a file of family ddpm has exactly these; is it whole?")
    betas = [tensor for name, tensor in everything.items() if re.search(r"(^|\.)betas$", name)]
    levels = _levels(settings, betas[0] if betas else None)
    return Source(
        family=NAME,
        summary=f"DDPM U-Net, {parameter_count(unet) / 1e6:.1f} M parameters, {size}x{size}, "
        f"{len(levels.alphas_cumprod)} levels, {weights} weights",
        net=PlainUNet(unet),
        convention=Convention(levels, predicts="eps", time="index"),
        channels=shape.in_channels,
        height=size,
        width=size,
        multiple=2 ** (shape.levels - 1),
        weights=weights,
        name=options.preset,
    )


class Shape:
    """The architecture that the tensors' names and shapes tell."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        def channels(name: str, axis: int) -> int:
            return shape_of(tensors, name, 4, hint="is the file whole?")[axis]

        def count(pattern: str) -> int:
            return len({found[1] for name in tensors if (found := re.match(pattern, name))})

        self.levels = count(r"down\.(\d+)\.block\.")
        self.blocks = count(r"down\.0\.block\.(\d+)\.")
        self.ch = channels("conv_in.weight", 0)
        self.widths = [channels(f"down.{level}.block.0.conv1.weight", 0) for level in range(self.levels)]
        self.in_channels, self.out_channels = channels("conv_in.weight", 1), channels("conv_out.weight", 0)
        self.attention = [level for level in range(self.levels) if f"down.{level}.attn.0.q.weight" in tensors]
        if self.out_channels not in (self.in_channels, 2 * self.in_channels):
            raise CheckpointError(
                f"{self.in_channels} channels in and {self.out_channels} out: not an unconditional denoiser",
                hint="SDEdit needs a network from pixels to as many channels, or twice as many with a variance",
            )
        if self.levels > 1 and "down.0.downsample.conv.weight" not in tensors:
            raise CheckpointError("resamp_with_conv: false is not supported", hint="its resampling has no convolutions")
        if odd := [width for width in self.widths if width % GROUPS]:
            raise CheckpointError(
                f"{odd[0]} channels: networks of this family have multiples of {GROUPS}",
                hint="is it of another family?",
            )
        if self.widths[0] != self.ch:
            raise CheckpointError(
                f"ch_mult begins with {self.widths[0] / self.ch:g}; supported is 1", hint="is it of another family?"
            )

    def unet_config(self) -> dict[str, Any]:
        """The same network in diffusers' words."""
        down = ["AttnDownBlock2D" if level in self.attention else "DownBlock2D" for level in range(self.levels)]
        return {
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "block_out_channels": self.widths,
            "layers_per_block": self.blocks,
            "down_block_types": down,
            "up_block_types": [kind.replace("Down", "Up") for kind in reversed(down)],
            "flip_sin_to_cos": False,
            "freq_shift": 1,
            "downsample_padding": 0,
            "norm_num_groups": GROUPS,
            "norm_eps": 1e-6,
            "attention_head_dim": None,
        }

    def size(self, settings: Mapping[str, Any]) -> int:
        """Height and width in training. Raises CheckpointError where nothing tells them."""
        if "image_size" in settings:
            return settings["image_size"]
        at = settings.get("attn_resolutions", [ATTENTION_AT] if len(self.attention) == 1 else [])
        if not at or not self.attention:
            where = f"attention at levels {self.attention}" if self.attention else "no attention before the middle"
            raise CheckpointError(
                f"the picture's size does not follow from {where}", hint="--size gives the picture's height and width"
            )
        return max(at) << self.attention[0]


def _compare(shape: Shape, settings: Mapping[str, Any], preset: str | None) -> None:
    """Raise OptionError where preset or configuration contradict the tensors, or ask for what is not supported."""
    told: dict[str, Any] = {
        "ch": shape.ch,
        "out_ch": shape.out_channels,
        "in_channels": shape.in_channels,
        "channels": shape.in_channels,
        "ch_mult": [width // shape.ch for width in shape.widths],
        "num_res_blocks": shape.blocks,
        "resamp_with_conv": True,
    }
    hint = f"leave it out, or --preset {preset} is not this file's" if preset else "leave it out: the tensors tell"
    for name, value in told.items():
        said = settings.get(name, value)
        if (list(said) if isinstance(said, list | tuple) else said) != value:
            raise OptionError(f"config: {name} is {said}, and the file's tensors say {value}", hint=f"--config: {hint}")
    size, at = settings.get("image_size"), settings.get("attn_resolutions", [])
    if size and at and shape.attention != [level for level in range(shape.levels) if size >> level in at]:
        raise OptionError(
            f"config: attention at {list(at)} of {size} pixels, and the file has it at levels {shape.attention}",
            hint="--config with the image_size and attn_resolutions of the training",
        )
    if settings.get("rescaled", True) is not True or settings.get("logit_transform", False) is not False:
        raise OptionError(
            "config: only networks for pictures scaled to [-1, 1] are supported",
            hint="--config without them, if that is so",
        )


def rename(tensors: Mapping[str, Tensor], levels: int) -> dict[str, Tensor]:
    """The tensors under UNet2DModel's names; attention's 1x1 convolutions become matrices."""
    new = {}
    for name, tensor in tensors.items():
        for pattern, replacement in NAMES:
            name = re.sub(pattern, replacement, name)
        name = re.sub(r"^up_blocks\.(\d+)", lambda found: f"up_blocks.{levels - 1 - int(found[1])}", name)
        matrix = re.search(r"\.attentions\.\d+\.to_(q|k|v|out\.0)\.weight$", name) and tensor.shape[2:] == (1, 1)
        new[name] = tensor[:, :, 0, 0] if matrix else tensor
    return new
