"""Checkpoints of Karras et al. 2022 (EDM): their own networks, and the VP and VE baselines that they retrained.

Names and shapes tell the whole architecture. How the network is preconditioned they do not: that is the name of the
class in the original pickle, or the user says it.
"""

import math
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sdedit.errors import OptionError
from sdedit.export import conditions, pickles
from sdedit.export.checkpoints import CheckpointError, find_network, flat, load_weights, parameter_count, shape_of
from sdedit.export.denoiser import Convention
from sdedit.export.networks.dhariwal_unet import DhariwalUNet
from sdedit.export.networks.song_unet import SongUNet
from sdedit.export.source import Payload, Source, SourceOptions, Tensors
from sdedit.sde import EDM, VE, VP

NAME = "edm"
DESCRIPTION = "EDM's pickle, or its tensors: map_layer0, enc.32x32_conv, dec.8x8_in0, …"
KIND = f"{NAME} is: {DESCRIPTION}"
STEM = "map_layer0.weight"
MARKERS = (r"(^|\.)enc\.\d+x\d+_conv\.weight$", r"(^|\.)dec\.\d+x\d+_in0\.")
PRESETS: dict[str, dict[str, Any]] = {}
RHO = 7  # of the schedule: Karras et al. 2022, table 1

CLASSES = {"EDMPrecond": "edm", "VPPrecond": "vp", "VEPrecond": "ve"}
CONSTANTS: dict[str, dict[str, float]] = {  # of the preconditionings, by the original's names
    "edm": {"sigma_data": 0.5, "sigma_min": 0.002, "sigma_max": 80.0},
    "vp": {"beta_d": 19.9, "beta_min": 0.1, "M": 1000, "epsilon_t": 1e-5},
    "ve": {"sigma_min": 0.02, "sigma_max": 100.0},
}
LIMITS = {"sigma_min": max, "sigma_max": min}
IGNORED = ("augment_dim", "dropout", "label_dropout", "use_fp16")  # of training: D does not depend on them


class HalfLogLabel(nn.Module):
    """A VE network as one that takes σ and returns the unit noise. Karras et al. 2022, table 1."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, label: Tensor, *conditions: Tensor) -> Tensor:
        return -self.net(x, (label / 2).log(), *conditions)


# What the file holds


def _record_at(payload: Payload, path: str) -> pickles.Record | None:
    """The object at a path such as "ema.", if one is there."""
    for part in path.split(".")[:-1]:
        if isinstance(payload, pickles.Record):
            payload = payload.module(part)
        else:
            payload = payload.get(part) if isinstance(payload, Mapping) else None
    return payload if isinstance(payload, pickles.Record) else None


def _choose(payload: Payload, wanted: str | None) -> tuple[Tensors, str, pickles.Record | None]:
    """One network's tensors under their own names, "ema" or "model", and the object around it where that is known."""
    every = dict(flat(payload))
    if any(re.search(r"(^|\.)(emb_fourier\.freqs|emb_noise\.weight)$", name) for name in every):
        raise CheckpointError(
            "this is an EDM2 network (Karras et al. 2024), which is another architecture",
            hint="this family is that of 2022; --module package.module:factory takes any PyTorch network",
        )
    tensors, prefix, weights = find_network(every, STEM, wanted)
    around = prefix.removesuffix("model.")  # the preconditioner, whose attribute the network is
    owner = _record_at(payload, around)
    levels = prefix != around and f"{around}u" in every
    if (owner and owner.class_name == "iDDPMPrecond") or levels:
        raise _discrete()
    return tensors, weights, owner


def _discrete() -> CheckpointError:
    return CheckpointError(
        "this network has iDDPM preconditioning, a table of noise levels, which is not read from this layout",
        hint="the published one is a copy of guided diffusion's imagenet-64: export that file",
    )


# What the tensors tell


def _told(tensors: Tensors) -> dict[str, Any]:
    """The constructor's arguments, by the original's names."""

    shape = partial(shape_of, tensors, hint=KIND)

    def multiple(name: str, channels: int) -> int:
        if channels % model_channels:
            raise CheckpointError(
                f"{name} has {channels} channels, not a multiple of the network's {model_channels}",
                hint=KIND,
            )
        return channels // model_channels

    found = {int(match[1]) for name in tensors if (match := re.match(r"enc\.(\d{1,6})x\1_", name))}
    resolutions = sorted(found, reverse=True)
    if not found or resolutions != [resolutions[0] >> level for level in range(len(found))] or 0 in found:
        raise CheckpointError(
            f"the layers' resolutions are {', '.join(map(str, resolutions)) or 'not in their names'}; "
            "wanted each half the one before",
            hint=KIND,
        )
    first = f"{resolutions[0]}x{resolutions[0]}"
    song = f"dec.{first}_aux_conv.weight" in tensors
    stem, noise = shape(f"enc.{first}_conv.weight", 4), shape(STEM, 2)
    model_channels = stem[0] if song else noise[1]
    if noise[1] % 2 or noise[1] < 4:
        raise CheckpointError(
            f"{STEM} takes {noise[1]} channels, which are not pairs of cosines and sines",
            hint=KIND,
        )
    blocks = [name for name in tensors if re.fullmatch(rf"enc\.{first}_block\d+\.conv0\.weight", name)]
    told: dict[str, Any] = {
        "img_resolution": resolutions[0],
        "in_channels": stem[1],
        "out_channels": shape(f"dec.{first}_aux_conv.weight" if song else "out_conv.weight", 4)[0],
        "label_dim": shape("map_label.weight", 2)[1] if "map_label.weight" in tensors else 0,
        "model_channels": model_channels,
        "channel_mult": tuple(
            multiple(name, shape(name, 4)[0]) for name in (f"enc.{r}x{r}_block0.conv0.weight" for r in resolutions)
        ),
        "channel_mult_emb": multiple(STEM, noise[0]),
        "num_blocks": len(blocks),
        "attn_resolutions": tuple(r for r in resolutions if f"enc.{r}x{r}_block0.qkv.weight" in tensors),
    }
    if told["out_channels"] == 2 * told["in_channels"]:  # a learned variance
        raise _discrete()
    if told["out_channels"] != told["in_channels"]:
        raise CheckpointError(
            f"the network takes {told['in_channels']} channels and returns {told['out_channels']}: not of images alone",
            hint="an upsampler, which also takes a small image, cannot be exported",
        )
    taps = _taps(tensors)
    if not song:
        if taps != (1, 1):
            raise CheckpointError(f"the filter is {list(taps)}; ADM's is [1, 1]", hint=KIND)
        return told
    names = " ".join(tensors)
    return told | {
        "embedding_type": "fourier" if "map_noise.freqs" in tensors else "positional",
        "channel_mult_noise": multiple(STEM, noise[1]),
        "encoder_type": "residual" if "_aux_residual." in names else "skip" if "_aux_skip." in names else "standard",
        "decoder_type": "skip" if "_aux_up." in names else "standard",
        "resample_filter": taps,
    }


def _taps(tensors: Tensors) -> tuple[float, ...]:
    """The one filter of all resampling layers, from its outer product with itself; its first tap is 1."""
    filters = [tensor.double() for name, tensor in tensors.items() if name.endswith(".resample_filter")]
    if not filters:
        return (1.0, 1.0)
    size = filters[0].shape
    if len(size) == 4 and size[:2] == (1, 1) and size[2] == size[3] and size[2] in range(2, 17, 2):
        rows = filters[0][0, 0].sum(dim=1)
        row = rows / rows.sum()
        kernel = torch.outer(row, row)
        if all(f.shape == size and torch.allclose(f[0, 0], kernel, atol=1e-3) for f in filters):
            return tuple(round(tap, 3) for tap in (row / row[0]).tolist())
    raise CheckpointError(
        "the resample_filter buffers are not one separable filter with an even number of taps",
        hint=KIND,
    )


# What the user says


def _preconditioning(owner: pickles.Record | None, options: SourceOptions) -> str:
    said = options.preconditioning or options.config.get("precond")
    told = CLASSES.get(owner.class_name) if owner else None
    if said is not None and said not in tuple(CONSTANTS):
        raise OptionError(f"preconditioning is {said!r}", hint=f"--preconditioning takes {', '.join(CONSTANTS)}")
    if said and told and said != told:
        assert owner is not None
        raise OptionError(
            f"preconditioning is {said!r}, and the file's class is {owner.class_name}",
            hint="leave --preconditioning out",
        )
    if not said and not told:
        raise CheckpointError(
            "the file does not tell how its network is preconditioned",
            hint="--preconditioning: published edm-* files: edm; baseline-*-vp: vp; baseline-*-ve: ve",
        )
    return str(said or told)


def _check_config(config: Mapping[str, Any], told: Mapping[str, Any], constants: Mapping[str, float]) -> None:
    """Raise OptionError for a key that does not exist or says otherwise than the tensors."""
    for key, value in config.items():
        if key not in (*told, *constants, *IGNORED, "precond"):
            raise OptionError(
                f"{NAME} has no config key {key!r} for this network",
                hint=f"--config takes {', '.join((*told, *constants))}",
            )
        if key in told and _numbers(key, value) != _numbers(key, told[key]):
            have = list(told[key]) if isinstance(told[key], tuple) else told[key]
            raise OptionError(f"config {key} is {value!r}; the tensors say {have}", hint=f"leave --config {key} out")


def _numbers(key: str, value: Any) -> list[float] | str:
    """Numbers however they are spelled, in any order where that means nothing; other values as text."""
    items = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    try:
        return sorted(map(float, items)) if key == "attn_resolutions" else list(map(float, items))
    except (ValueError, TypeError):
        return str(value)


def _constants(kind: str, owner: pickles.Record | None, config: Mapping[str, Any]) -> dict[str, float]:
    """The preconditioning's numbers: the usual ones, under the file's, under the user's."""
    constants = dict(CONSTANTS[kind])
    for key, usual in CONSTANTS[kind].items():
        where, value = ("config", config[key]) if key in config else ("the file's", owner and owner.state.get(key))
        if value is None:
            continue
        try:
            constants[key] = float(value)
        except (ValueError, TypeError):
            constants[key] = math.nan
        if where != "config" and kind == "edm" and key in LIMITS:  # as a rule 0 and infinity: no limits
            constants[key] = LIMITS[key](usual, constants[key])
        if not 0 < constants[key] < math.inf:
            raise OptionError(f"{where} {key} is {value!r}; wanted a number above 0", hint=f"--config {key}=NUMBER")
    return constants


# Both together


def _convention(kind: str, c: Mapping[str, float]) -> tuple[Convention, tuple[float, float]]:
    """Table 1 of Karras et al. 2022, and the noise levels of training."""
    if kind == "vp":
        sde = VP(c["beta_min"], c["beta_min"] + c["beta_d"])
        trained = float(sde.sigma(c["epsilon_t"])), float(sde.sigma(1.0))
        return Convention(sde, predicts="eps", time="continuous", time_scale=c["M"] - 1), trained
    trained = c["sigma_min"], c["sigma_max"]
    if kind == "ve":
        return Convention(VE(*trained), predicts="eps", time="sigma"), trained
    sigma_data = c["sigma_data"]
    sde = EDM(*trained, RHO)
    return Convention(sde, predicts="edm", time="log-sigma", time_scale=0.25, sigma_data=sigma_data), trained


def _network(told: dict[str, Any]) -> nn.Module:
    """On the meta device."""
    try:
        with torch.device("meta"):
            return SongUNet(**told) if "encoder_type" in told else DhariwalUNet(**told)
    except (ValueError, ArithmeticError) as error:  # of GroupNorm and the heads
        raise CheckpointError(f"no network has these channels: {error}", hint=KIND) from error


def build(payload: Payload, options: SourceOptions) -> Source:
    """The network, its preconditioning and its size. Raises CheckpointError, OptionError."""
    options.preset_of(NAME, PRESETS)
    tensors, weights, owner = _choose(payload, options.weights)
    told = _told(tensors)
    kind = _preconditioning(owner, options)
    _check_config(options.config, told, CONSTANTS[kind])
    constants = _constants(kind, owner, options.config)
    convention, trained = _convention(kind, constants)

    used = {name: tensor for name, tensor in tensors.items() if name != "map_augment.weight"}  # a label of zeros
    net = load_weights(_network(told), used, hint=f"the layout is read from the names: {KIND}")
    parameters, classes = parameter_count(net), told["label_dim"]
    if kind == "ve":
        net = HalfLogLabel(net)
    size = told["img_resolution"] if options.size is None else options.size
    fourier = told.get("embedding_type") == "fourier"
    architecture = "ADM" if "encoder_type" not in told else "NCSN++" if fourier else "DDPM++"
    return Source(
        family=NAME,
        summary=f"{architecture}, {parameters / 1e6:.1f} M parameters, {size}x{size}, "
        f"{f'{classes} classes' if classes else 'no classes'}, {kind} preconditioning, {weights} weights",
        net=net,
        convention=convention,
        channels=told["in_channels"],
        height=size,
        width=size,
        multiple=2 ** (len(told["channel_mult"]) - 1),
        weights=weights,
        conditions=conditions.classes(classes),
        sigma_range=trained,
        details={"architecture": architecture, "precond": kind, "config": told | constants},
    )
