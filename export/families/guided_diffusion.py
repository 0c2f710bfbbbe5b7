"""Checkpoints of guided diffusion (Dhariwal and Nichol 2021) and, with the same names, of improved diffusion.

A file holds tensors only. Their names and shapes tell the architecture; the image size, the attention heads and
the schedule come from a preset or from --config, whose keys are the names of the original's flags.
"""

import re
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import Any

import torch

from sdedit.errors import OptionError
from sdedit.export import conditions, schedules
from sdedit.export.checkpoints import CheckpointError, find_network, flat, load_weights, parameter_count, shape_of
from sdedit.export.denoiser import Convention
from sdedit.export.networks.adm import ADM
from sdedit.export.source import Payload, Source, SourceOptions, Tensors
from sdedit.sde import VPDiscrete

NAME = "guided-diffusion"
DESCRIPTION = "PyTorch file with time_embed, input_blocks, middle_block, output_blocks and out: an ADM U-Net"
KIND = f"{NAME} is: {DESCRIPTION}"
STEM = "input_blocks.0.0.weight"
MARKERS = (
    r"(^|\.)input_blocks\.0\.0\.weight$",
    r"(^|\.)time_embed\.0\.weight$",
    r"(^|\.)middle_block\.1\.qkv\.weight$",
)
CLASSES = 1000  # of ImageNet
MULTIPLIERS = {  # image size -> channel_mult
    32: "1,2,2,2",
    64: "1,2,3,4",
    128: "1,1,2,3,4",
    256: "1,1,2,2,4,4",
    512: "0.5,1,1,2,2,4,4",
}

# Presets


def _published(image_size: int, **others: Any) -> dict[str, Any]:
    """The flags that the published models share, and those of one."""
    return {
        "image_size": image_size,
        "channel_mult": MULTIPLIERS[image_size],
        "num_channels": 256,
        "num_res_blocks": 2,
        "attention_resolutions": "32,16,8",
        "num_head_channels": 64,
        "use_new_attention_order": False,
        "use_scale_shift_norm": True,
        "resblock_updown": True,
        "class_cond": True,
        "learn_sigma": True,
        "noise_schedule": "linear",
        "diffusion_steps": 1000,
    } | others


PRESETS: dict[str, dict[str, Any]] = {
    "imagenet-64": _published(
        64, num_channels=192, num_res_blocks=3, use_new_attention_order=True, noise_schedule="cosine"
    ),
    "imagenet-128": _published(128, num_heads=4, num_head_channels=-1),
    "imagenet-256": _published(256),
    "imagenet-256-uncond": _published(256, class_cond=False),
    "imagenet-512": _published(512),
    "lsun-bedroom": _published(256, class_cond=False),
    "lsun-cat": _published(256, class_cond=False),
    "lsun-horse": _published(256, class_cond=False),
}

# What the user says


def _number(value: Any) -> int:
    if isinstance(value, bool) or int(value) < 1 or int(value) != float(value):
        raise ValueError(value)
    return int(value)


def _heads(value: Any) -> int | None:
    return None if str(value) == "-1" else _number(value)


def _switch(value: Any) -> bool:
    return {"true": True, "false": False, "1": True, "0": False}[str(value).lower()]


def _items(value: Any) -> list[str]:
    return [str(item) for item in (value if isinstance(value, list | tuple) else str(value).split(","))]


def _resolutions(value: Any) -> list[int]:
    return [_number(item) for item in _items(value)]


def _multipliers(value: Any) -> list[Fraction] | None:
    """Exact, so that a multiplier times num_channels is the width it came from. Empty: not said."""
    if value == "":
        return None
    multipliers = [Fraction(item) for item in _items(value)]
    if min(multipliers) <= 0:
        raise ValueError(value)
    return multipliers


def _named(value: Any) -> str:
    return {"linear": "linear", "cosine": "cosine"}[value]


_COUNTS = ("image_size", "num_channels", "num_res_blocks", "diffusion_steps")
_HEADS = ("num_heads", "num_head_channels", "num_heads_upsample")
_SWITCHES = (
    *("use_new_attention_order", "use_scale_shift_norm", "resblock_updown", "conv_resample"),
    *("class_cond", "learn_sigma", "predict_xstart", "rescale_timesteps"),
)
KEYS: dict[str, tuple[Callable[[Any], Any], str]] = {
    **dict.fromkeys(_COUNTS, (_number, "a whole number above 0")),
    "channel_mult": (_multipliers, "numbers such as 1,1,2,2,4,4"),
    "attention_resolutions": (_resolutions, "numbers such as 32,16,8"),
    **dict.fromkeys(_HEADS, (_heads, "a whole number above 0, or -1 for not used")),
    **dict.fromkeys(_SWITCHES, (_switch, "True or False")),
    "noise_schedule": (_named, "linear or cosine"),
}
IGNORED = (  # of training and sampling: D does not depend on them
    *("dropout", "rescale_learned_sigmas", "sigma_small", "timestep_respacing", "use_checkpoint"),
    *("use_fp16", "use_kl"),
)


def _said(options: SourceOptions) -> dict[str, Any]:
    """The preset under the user's own config, parsed; without what neither says."""
    preset = options.preset_of(NAME, PRESETS)
    if {"num_heads", "num_head_channels"} & set(options.config):  # one choice, made in two keys
        preset = {key: value for key, value in preset.items() if key not in ("num_heads", "num_head_channels")}
    said = {}
    for key, value in (preset | options.config).items():
        if key in IGNORED:
            continue
        if key not in KEYS:
            raise OptionError(f"{NAME} has no config key {key!r}", hint=f"--config takes {', '.join(KEYS)}")
        parse, wanted = KEYS[key]
        try:
            parsed = parse(value)
        except (ValueError, TypeError, KeyError, ArithmeticError):
            raise OptionError(
                f"config {key} is {value!r}; wanted {wanted}", hint=f"correct {key} in --config"
            ) from None
        if parsed is not None:
            said[key] = parsed
    return said


# What the tensors tell


def _choose_weights(payload: Payload, wanted: str | None) -> tuple[Tensors, str]:
    """One network's tensors under their own names, and "ema" or "model"."""
    every = dict(flat(payload))
    if any("first_stage_model." in name or "diffusion_model." in name for name in every):
        raise CheckpointError(
            "this is a latent diffusion model, whose network sees an autoencoder's codes",
            hint="SDEdit here works on pixels: choose a checkpoint that was trained on them",
        )
    tensors, _, weights = find_network(every, STEM, wanted)
    return tensors, weights


def _told(tensors: Tensors) -> dict[str, Any]:
    """Config keys that names and shapes decide; `attention` holds downsampling factors."""

    shape = partial(shape_of, tensors, hint=KIND)

    def matching(pattern: str) -> list[re.Match[str]]:
        return [match for name in tensors if (match := re.fullmatch(pattern, name))]

    if not matching(r"output_blocks\..*"):
        raise CheckpointError(
            "the file has no output_blocks: it is a classifier, not a diffusion network",
            hint="export the diffusion model that belongs to it",
        )
    channels, outputs = shape(STEM, 4)[1], shape("out.2.weight", 4)[0]
    if channels not in (1, 3) or outputs not in (channels, 2 * channels):
        raise CheckpointError(
            f"the network takes {channels} channels and returns {outputs}: not a model of images alone",
            hint="an upsampler, which also takes a small image, cannot be exported",
        )

    # Every level has as many input blocks, one of them (but at the start: the stem) for the change of resolution.
    present = {int(match[1]) for match in matching(r"input_blocks\.(\d{1,6})\..*")}
    count = max(present) + 1
    pooled = count - len(present)  # a mean of 2x2 has no tensors
    convolutions = len(matching(r"output_blocks\.\d+\.[12]\.conv\.weight"))
    residuals = len(matching(r"output_blocks\.\d+\.[12]\.in_layers\.0\.weight"))
    levels = 1 + max(pooled, convolutions, residuals)
    if count % levels or count < 2 * levels:
        raise CheckpointError(f"{count} input_blocks do not make {levels} levels of equal depth", hint=KIND)
    first = [1 + level * (count // levels) for level in range(levels)]
    base = shape("time_embed.0.weight", 2)[1]
    widths = [shape(f"input_blocks.{i}.0.in_layers.2.weight", 4)[0] for i in first]
    classes = shape("label_emb.weight", 2)[0] if "label_emb.weight" in tensors else 0
    return {
        "channels": channels,
        "classes": classes,
        "num_channels": base,
        "channel_mult": [Fraction(width, base) for width in widths],
        "num_res_blocks": count // levels - 1,
        "attention": {2**level for level, i in enumerate(first) if f"input_blocks.{i}.1.qkv.weight" in tensors},
        "use_scale_shift_norm": shape("input_blocks.1.0.emb_layers.1.weight", 2)[0] == 2 * widths[0],
        "resblock_updown": residuals > 0,
        "conv_resample": pooled == 0,
        "class_cond": classes > 0,
        "learn_sigma": outputs == 2 * channels,
    }


# Both together


def _trained_size(config: dict[str, Any], asked: int | None) -> int | None:
    """The image size of training: said, or from the levels with attention and their resolutions, or the usual one."""
    if "image_size" in config:
        return int(config["image_size"])
    resolutions = config.get("attention_resolutions", [])
    if resolutions and config["attention"]:
        size = max(config["attention"]) * min(resolutions)
        if {size // resolution for resolution in resolutions} == config["attention"]:
            return size
    usual = {tuple(_multipliers(text) or ()): size for size, text in MULTIPLIERS.items()}
    return usual.get(tuple(config["channel_mult"]), asked)


def _require_all(config: dict[str, Any], trained_size: int | None) -> None:
    """Raise CheckpointError naming the keys that neither the tensors nor the user told."""
    needed = ["noise_schedule", "diffusion_steps"]
    if config.get("diffusion_steps", 1000) != 1000:  # at 1000 it changes nothing
        needed.append("rescale_timesteps")
    missing = [key for key in needed if key not in config]
    if not {"num_heads", "num_head_channels"} & set(config):
        missing.append("num_heads or num_head_channels")
    one_head = config.get("num_heads") == config.get("num_heads_upsample", 1) == 1 and "num_head_channels" not in config
    if not one_head and "use_new_attention_order" not in config:  # one head has one order
        missing.append("use_new_attention_order")
    if trained_size is None:
        missing.append("image_size")
    if missing:
        raise CheckpointError(
            f"the tensors do not tell {', '.join(missing)}",
            hint="--config '{\"KEY\": VALUE, …}' with the flags of its training, or for a published model --preset: "
            + ", ".join(PRESETS),
        )


def _network(config: dict[str, Any]) -> ADM:
    """An ADM on the meta device. Raises CheckpointError."""
    widths = tuple(int(multiplier * config["num_channels"]) for multiplier in config["channel_mult"])
    num_heads = config.get("num_heads", 1)
    try:
        with torch.device("meta"):
            return ADM(
                channels=config["channels"],
                out_channels=config["channels"] * (2 if config["learn_sigma"] else 1),
                model_channels=config["num_channels"],
                widths=widths,
                blocks=config["num_res_blocks"],
                attention={level for level in range(len(widths)) if 2**level in config["attention"]},
                num_heads=num_heads,
                num_heads_upsample=config.get("num_heads_upsample", num_heads),
                num_head_channels=config.get("num_head_channels"),
                new_order=config.get("use_new_attention_order", False),
                classes=config["classes"],
                scale_shift=config["use_scale_shift_norm"],
                updown=config["resblock_updown"],
                conv_resample=config["conv_resample"],
            )
    except ValueError as error:  # of GroupNorm and the heads
        hint = "correct num_channels, channel_mult, num_heads or num_head_channels in --config"
        raise CheckpointError(f"no network has these channels: {error}", hint=hint) from error


def _schedule(noise_schedule: str, steps: int) -> VPDiscrete:
    """β of another number of levels than 1000 is scaled, so that noise at the end stays the same."""
    if steps < 2 or (noise_schedule == "linear" and steps <= 20):  # β would reach 1
        raise OptionError(
            f"config diffusion_steps is {steps}, too few for the {noise_schedule} schedule",
            hint="correct diffusion_steps in --config; the usual number is 1000",
        )
    return schedules.linear(0.1 / steps, 20 / steps, steps) if noise_schedule == "linear" else schedules.cosine(steps)


def _spelled(config: dict[str, Any], trained_size: int) -> dict[str, Any]:
    """The config as it was used, in the original's spelling, for the artifact's record."""
    spelled = {key: config[key] for key in KEYS if key in config}
    spelled["image_size"] = trained_size
    spelled["channel_mult"] = ",".join(f"{float(multiplier):g}" for multiplier in config["channel_mult"])
    spelled["attention_resolutions"] = ",".join(str(trained_size // factor) for factor in sorted(config["attention"]))
    return spelled


def build(payload: Payload, options: SourceOptions) -> Source:
    """The network, its schedule and its size. Raises CheckpointError, OptionError."""
    tensors, weights = _choose_weights(payload, options.weights)
    config = _told(tensors) | _said(options)
    trained_size = _trained_size(config, options.size)
    _require_all(config, trained_size)
    if "attention_resolutions" in config:
        config["attention"] = {trained_size // resolution for resolution in config["attention_resolutions"]}
    config["classes"] = classes = (config["classes"] or CLASSES) if config["class_cond"] else 0

    net: torch.nn.Module = load_weights(
        _network(config),
        tensors,
        hint="correct --preset or --config: what the tensors tell may be left out; another picture size is --size",
    )
    parameters = parameter_count(net)
    size = trained_size if options.size is None else options.size
    steps, predicts = config["diffusion_steps"], "x0" if config.get("predict_xstart") else "eps"
    sde = _schedule(config["noise_schedule"], steps)
    return Source(
        family=NAME,
        summary=f"ADM U-Net, {parameters / 1e6:.1f} M parameters, {size}x{size}, {classes or 'no'} classes, "
        f"{config['noise_schedule']} schedule of {steps} levels, predicts {predicts}, {weights} weights",
        net=net,
        convention=Convention(
            sde=sde,
            predicts=predicts,
            time="index",
            time_scale=1000 / steps if config.get("rescale_timesteps") else 1.0,
        ),
        channels=config["channels"],
        height=size,
        width=size,
        multiple=2 ** (len(config["channel_mult"]) - 1),
        weights=weights,
        conditions=conditions.classes(classes),
        sigma_range=(float(sde.sigma(1 / steps)), float(sde.sigma(1.0))),
        name=options.preset,
        details={"config": _spelled(config, trained_size)},
    )
