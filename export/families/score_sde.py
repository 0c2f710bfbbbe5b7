"""Checkpoints of score_sde_pytorch: NCSN++ and DDPM++ (Song et al. 2021), and that code's DDPM.

A file is {optimizer, model, ema, step}. Its tensors tell the network's shape; what they cannot tell (the SDE, the data
range, how sums are scaled) comes from a preset or from the training's own configuration.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from sdedit import sde as schedules
from sdedit.errors import OptionError
from sdedit.export.checkpoints import CheckpointError, is_state_dict, load_weights, parameter_count, without_prefix
from sdedit.export.denoiser import Convention
from sdedit.export.networks.ncsnpp import NCSNpp
from sdedit.export.source import Payload, Source, SourceOptions

NAME = "score-sde"
DESCRIPTION = "score_sde_pytorch .pth: {optimizer, model, ema, step}, tensors named all_modules.N.*"
MARKERS = (r"(^|\.)all_modules\.\d+\.GroupNorm_0\.weight$", r"(^|\.)all_modules\.\d+\.NIN_3\.W$")

Config = dict[str, Any]

# --- the published models, in the words of their own configurations ------------------------------------------------

_VE = {"sde": "vesde", "continuous": True, "centered": False, "scale_by_sigma": True, "sigma_min": 0.01}
_VP = {"sde": "vpsde", "continuous": True, "centered": True, "scale_by_sigma": False, "beta_min": 0.1, "beta_max": 20.0}
_NCSNPP = {
    "name": "ncsnpp",
    "num_channels": 3,
    "nf": 128,
    "attn_resolutions": (16,),
    "conditional": True,
    "fir": True,
    "fir_kernel": (1, 3, 3, 1),
    "skip_rescale": True,
    "resblock_type": "biggan",
}
_CIFAR10 = {
    **_NCSNPP,
    "image_size": 32,
    "ch_mult": (1, 2, 2, 2),
    "num_res_blocks": 4,
    "progressive": "none",
    "progressive_input": "residual",
    "num_scales": 1000,
}
_CIFAR10_VE = {**_CIFAR10, **_VE, "embedding_type": "fourier", "sigma_max": 50.0}
_CIFAR10_VP = {**_CIFAR10, **_VP, "embedding_type": "positional"}
_CIFAR10_DDPMPP = {**_CIFAR10_VP, "fir": False, "progressive_input": "none"}
_CIFAR10_DDPM = {
    **_CIFAR10_DDPMPP,
    "name": "ddpm",
    "num_res_blocks": 2,
    "skip_rescale": False,
    "resblock_type": "ddpm",
}
_LARGE = {
    **_NCSNPP,
    **_VE,
    "embedding_type": "fourier",
    "progressive": "output_skip",
    "progressive_input": "input_skip",
    "progressive_combine": "sum",
    "num_scales": 2000,
}
_256 = {**_LARGE, "image_size": 256, "ch_mult": (1, 1, 2, 2, 2, 2, 2), "num_res_blocks": 2}
_1024 = {**_LARGE, "image_size": 1024, "nf": 16, "ch_mult": (1, 2, 4, 8, 16, 32, 32, 32), "num_res_blocks": 1}

PRESETS: dict[str, Config] = {
    "ffhq-256": {**_256, "sigma_max": 348.0},
    "ffhq-1024": {**_1024, "sigma_max": 1348.0},
    "celebahq-256": {**_256, "sigma_max": 348.0},
    "church-256": {**_256, "sigma_max": 380.0},
    "bedroom-256": {**_256, "sigma_max": 378.0},
    "cifar10-ncsnpp-ve": _CIFAR10_VE,
    "cifar10-ncsnpp-ve-deep": {**_CIFAR10_VE, "num_res_blocks": 8},
    "cifar10-ncsnpp-vp": _CIFAR10_VP,
    "cifar10-ncsnpp-vp-deep": {**_CIFAR10_VP, "num_res_blocks": 8},
    "cifar10-ddpmpp-vp": _CIFAR10_DDPMPP,
    "cifar10-ddpmpp-vp-deep": {**_CIFAR10_DDPMPP, "num_res_blocks": 8},
    "cifar10-ddpmpp-vp-discrete": {**_CIFAR10_DDPMPP, "continuous": False},
    "cifar10-ddpm-vp": _CIFAR10_DDPM,
    "cifar10-ddpm-vp-discrete": {**_CIFAR10_DDPM, "continuous": False},
}

# --- options of the original's configuration -----------------------------------------------------------------------

_WORDS = {
    "sde": ("vesde", "vpsde", "subvpsde"),
    "name": ("ncsnpp", "ddpm"),
    "embedding_type": ("fourier", "positional"),
    "resblock_type": ("biggan", "ddpm"),
    "progressive": ("none", "output_skip", "residual"),
    "progressive_input": ("none", "input_skip", "residual"),
    "progressive_combine": ("sum", "cat"),
    "nonlinearity": ("swish",),
    "normalization": ("groupnorm",),
    "attention_type": ("ddpm",),
}


def _is_count(v: object) -> bool:
    return type(v) is int and 0 < v < 1_000_000


def _is_counts(v: object) -> bool:
    return isinstance(v, tuple) and all(map(_is_count, v))


# what each option accepts, and that in words
_FLAG = (lambda v: type(v) is bool, "true or false")
_COUNT = (_is_count, "a whole number above 0")
_NUMBER = (lambda v: type(v) in (int, float) and math.isfinite(v), "a number")
_OPTIONS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("centered", "conditional", "continuous", "fir"), _FLAG),
    **dict.fromkeys(("resamp_with_conv", "scale_by_sigma", "skip_rescale"), _FLAG),
    **dict.fromkeys(("image_size", "nf", "num_channels", "num_res_blocks", "num_scales"), _COUNT),
    **dict.fromkeys(("beta_min", "beta_max", "sigma_min", "sigma_max"), _NUMBER),
    **dict.fromkeys(("attn_resolutions", "ch_mult"), (_is_counts, "a list of whole numbers above 0")),
    "fir_kernel": (
        lambda v: _is_counts(v) and len(v) > 0 and len(v) % 2 == 0 and v == v[::-1],
        "an even number of symmetric taps, as [1, 3, 3, 1]",
    ),
    **{key: (words.__contains__, " or ".join(words)) for key, words in _WORDS.items()},
}
_SECTIONS = ("model", "data", "training")
_IGNORED = """
    sampling eval optim batch_size category conv_size dataset device dropout ema_rate eval_freq fourier_scale init_scale
    likelihood_weighting log_freq n_iters n_jitted_steps num_classes random_flip reduce_mean seed sigma_begin
    snapshot_freq snapshot_freq_for_preemption snapshot_sampling tfrecords_path uniform_dequantization
"""  # they decide how it was trained, not what it computes

_FREE = ("sigma_min", "sigma_max", "num_scales")  # the file may tell them, the user may know better
_NEEDED = ("sde", "continuous", "centered", "scale_by_sigma", "skip_rescale", "fir", "image_size")
_DDPM = {  # of that network whatever its configuration says: it has no such options
    "embedding_type": "positional",
    "fir": False,
    "skip_rescale": False,
    "resblock_type": "ddpm",
    "progressive": "none",
    "progressive_input": "none",
}
_USUAL = {
    "name": "ncsnpp",
    "fir_kernel": (1, 3, 3, 1),
    "resamp_with_conv": True,
    "progressive": "none",
    "progressive_input": "none",
    "progressive_combine": "sum",
    "beta_min": 0.1,
    "beta_max": 20.0,
}
_CONFIG_HINT = "name the published model with --preset, or give the training's configuration with --config"


def build(payload: Payload, options: SourceOptions) -> Source:
    """The network and convention of a score_sde_pytorch checkpoint. Raises CheckpointError, OptionError."""
    weights = _weights(payload, options.weights)
    told, attention = _told(weights.tensors)
    config, preset = _config(told | _levels(weights.sigmas), options)
    _require_attention(config, attention)
    convention = _convention(config)
    net = load_weights(_network(config, attention), weights.tensors, hint=_CONFIG_HINT)

    size = options.size or config["image_size"]
    architecture = "DDPM" if config["name"] == "ddpm" else "NCSN++" if config["fir"] else "DDPM++"
    low, high = sigma_range = _sigma_range(convention.sde)
    step = payload.get("step")
    return Source(
        family=NAME,
        summary=f"{architecture} with {parameter_count(net) / 1e6:.1f} M parameters, {convention.sde.kind}, "
        f"σ from {low:.3g} to {high:.4g}, {weights.remark}",
        net=net,
        convention=convention,
        channels=config["num_channels"],
        height=size,
        width=size,
        multiple=2 ** (len(config["ch_mult"]) - 1),
        weights=weights.which,
        sigma_range=sigma_range,
        name=preset,
        details={"config": config, **({"step": step} if isinstance(step, int) else {})},
    )


# --- weights -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Weights:
    """The tensors to run, by name, and which of the file's they are."""

    tensors: dict[str, Tensor]
    which: str  # "ema" or "model"
    remark: str  # for the user
    sigmas: Tensor | None  # a buffer beside them: the training's noise levels, largest first


def _weights(payload: Payload, wanted: str | None) -> _Weights:
    """The averaged parameters, an unnamed list, by the names of the file's own model; or the model's."""
    model = payload.get("model", payload) if isinstance(payload, Mapping) else None
    if not is_state_dict(model):
        raise CheckpointError(
            "the checkpoint has no `model` that maps names to tensors", hint="give the file as training wrote it"
        )
    model = without_prefix(model, "module.")
    sigmas = model.pop("sigmas", None)
    average = payload.get("ema")
    if wanted == "model" or (wanted is None and average is None):
        remark = "the model's own weights" + (" (the file holds no average)" if average is None else "")
        return _Weights(model, "model", remark, sigmas)
    shadow = average.get("shadow_params") if isinstance(average, Mapping) else None
    if not isinstance(shadow, list | tuple) or not all(isinstance(tensor, Tensor) for tensor in shadow):
        raise CheckpointError("the checkpoint has no list ema.shadow_params", hint="--weights model")
    trained = [name for name in model if name != "all_modules.0.W"]  # the Fourier frequencies are not trained
    if len(shadow) != len(trained):
        raise CheckpointError(
            f"ema.shadow_params has {len(shadow)} tensors, the model {len(trained)} trained ones",
            hint="--weights model",
        )
    for name, tensor in zip(trained, shadow, strict=True):
        if tensor.shape != model[name].shape:
            raise CheckpointError(
                f"ema.shadow_params is in another order than the model: {list(tensor.shape)} in the place of {name}, "
                f"{list(model[name].shape)}",
                hint="--weights model",
            )
    return _Weights(model | dict(zip(trained, shadow, strict=True)), "ema", "averaged weights (EMA)", sigmas)


# --- what the tensors tell -----------------------------------------------------------------------------------------


def _levels(sigmas: Tensor | None) -> Config:
    """The training's noise levels, from the file's own list of them."""
    if sigmas is None or sigmas.ndim != 1 or len(sigmas) < 2:
        return {}
    largest, smallest = (float(f"{sigmas[i].item():.6g}") for i in (0, -1))
    return {"sigma_max": largest, "sigma_min": smallest, "num_scales": len(sigmas)}


def _letter(shapes: Mapping[str, torch.Size]) -> str:
    """What a module is, by the shapes of its tensors."""
    if "W" in shapes:
        return "F"  # Fourier features
    if "weight" in shapes:
        return {1: "N", 2: "L", 4: "C"}.get(len(shapes["weight"]), "?")  # norm, linear, convolution
    if "NIN_3.W" in shapes:
        return "A"  # attention
    conv = shapes.get("Conv_0.weight", ())
    if len(conv) == 4 and "GroupNorm_0.weight" in shapes:  # blocks: wider or narrower, resampling, or neither
        return "X" if conv[0] != conv[1] else "R" if "Conv_2.weight" in shapes else "B"
    return "M" if len(conv) == 4 and conv[3] == 1 else "S"  # mixes the image in; resamples, by a convolution or none


_DOWN = r"(?:[BX]A?)+(?:[RS][MS]?(?:[BX]A?)+)*"
_LAYOUT = re.compile(rf"(F?)(LL)?C({_DOWN})BABX[XARSNC]*NC")  # embedding, way down, middle, way up


def _told(tensors: Mapping[str, Tensor]) -> tuple[Config, tuple[int, ...]]:
    """The options that names and shapes decide, and the levels with attention, 0 the finest."""
    modules: list[dict[str, torch.Size]] = []
    for name, tensor in tensors.items():
        if found := re.fullmatch(r"all_modules\.(\d{1,4})\.(.+)", name):
            modules += [{} for _ in range(int(found[1]) + 1 - len(modules))]
            modules[int(found[1])][found[2]] = tensor.shape
    letters = "".join(map(_letter, modules))
    layout = _LAYOUT.fullmatch(letters)
    if layout is None or 0 in modules[layout.start(3) - 1]["weight"]:
        raise CheckpointError(
            "the modules all_modules.N are not in the order of NCSN++, DDPM++ or DDPM",
            hint="only these networks of score_sde_pytorch are supported",
        )

    stem, *heads = (shapes["weight"] for letter, shapes in zip(letters, modules, strict=True) if letter == "C")
    nf, channels = stem[:2]
    stages = re.split("[RS][MS]?", layout[3])
    starts = [layout.start(3) + found.start() for found in re.finditer("(?:[BX]A?)+", layout[3])]
    told: Config = {
        "embedding_type": "fourier" if layout[1] else "positional",
        "conditional": bool(layout[2]),
        "nf": nf,
        "num_channels": channels,
        "ch_mult": tuple(modules[start]["Conv_0.weight"][0] // nf for start in starts),
        "num_res_blocks": len(stages[0].replace("A", "")),
        "resblock_type": "biggan" if any("Conv_2.weight" in shapes for shapes in modules) else "ddpm",
    }
    if layout[1]:
        told["continuous"] = True
    if len(stages) > 1:
        change = starts[0] + len(stages[0])
        beside = letters[change + 1]
        told["progressive_input"] = {"M": "input_skip", "S": "residual"}.get(beside, "none")
        told["progressive"] = "none" if len(heads) == 1 else "output_skip" if heads[0][0] == channels else "residual"
        if told["resblock_type"] == "ddpm":
            told["resamp_with_conv"] = bool(modules[change])
        if beside == "M":
            mixed, after = modules[change + 1]["Conv_0.weight"][0], modules[change + 2]["Conv_0.weight"][1]
            told["progressive_combine"] = "sum" if mixed == after else "cat"
    resampling = [shapes for letter, shapes in zip(letters, modules, strict=True) if letter == "S" and shapes]
    if resampling:
        told["fir"] = any("Conv2d_0.weight" in shapes for shapes in resampling)
    return told, tuple(level for level, stage in enumerate(stages) if "A" in stage)


# --- configuration -------------------------------------------------------------------------------------------------


def _config(told: Config, options: SourceOptions) -> tuple[Config, str | None]:
    """All options, from the tensors, the preset and the user, the later ones winning; and the preset's name."""
    given, name, preset = _given(options), options.preset, options.preset_of(NAME, PRESETS)
    for key in told:
        if key in given and key not in _FREE and told[key] != given[key]:
            raise CheckpointError(
                f"{key} is {given[key]} in --config, and {told[key]} by the file's tensors",
                hint=f"leave {key} out, or give the configuration of this file",
            )
    for key in told:
        if key in preset and key not in given and not _alike(told[key], preset[key]):
            raise CheckpointError(
                f"{key} is {preset[key]} in the preset {name}, and {told[key]} in the file",
                hint="give the preset of this model, or none"
                + (f"; --config '{{\"{key}\": {preset[key]}}}' insists" if key in _FREE else ""),
            )
    size = {} if options.size is None else {"image_size": options.size}
    missing = [key for key in _NEEDED if key not in told | size | preset | given]
    if missing == ["image_size"]:
        raise OptionError("nothing tells the size of the images", hint="--size, as the network was trained")
    if missing and name is None:
        name, preset = _recognised(told | given, missing)
    return _USUAL | told | size | preset | given, name


def _given(options: SourceOptions) -> Config:
    """The user's options, flat and checked. Sections as in the original's files are opened."""
    flat = options.config_without(_SECTIONS, _IGNORED.split())
    given = {key: _checked(key, value) for key, value in flat.items()}
    return given | _DDPM if given.get("name") == "ddpm" else given


def _checked(key: str, value: Any) -> Any:
    """An option's value in one spelling. Raises OptionError naming what is wanted."""
    if key not in _OPTIONS:
        raise OptionError(f"{NAME} has no option {key!r}", hint=f"--config knows {', '.join(sorted(_OPTIONS))}")
    value = tuple(value) if isinstance(value, list) else value.lower() if isinstance(value, str) else value
    fits, wanted = _OPTIONS[key]
    if not fits(value):
        raise OptionError(f"{key} is {value!r}; wanted {wanted}", hint="correct it in --config")
    return value


def _recognised(known: Config, missing: list[str]) -> tuple[str | None, Config]:
    """The published model that looks like this file; without a name where two are alike in everything."""
    fits = {
        name: preset
        for name, preset in PRESETS.items()
        if all(_alike(preset[key], known[key]) for key in preset.keys() & known.keys())
    }
    text = f"the file does not tell {', '.join(missing)}"
    if not fits:
        raise CheckpointError(f"{text}, and it is not a published model", hint=_CONFIG_HINT)
    first, preset = next(iter(fits.items()))
    fourier = known["embedding_type"] == "fourier"  # positional networks of one shape were trained with several SDEs
    if fourier and all(other == preset for other in fits.values()):
        return (first if len(fits) == 1 else None), preset
    names = [name + (f" (sigma_max {fits[name]['sigma_max']:g})" if fourier else "") for name in fits]
    raise CheckpointError(
        f"{text}: it may be {', '.join(names)}" + ("" if fourier else " or a network trained with another SDE"),
        hint=f"say which, as --preset {first}, or give the training's configuration with --config",
    )


def _alike(a: Any, b: Any) -> bool:
    return math.isclose(a, b, rel_tol=1e-3) if float in (type(a), type(b)) else bool(a == b)


def _require_attention(config: Config, attention: tuple[int, ...]) -> None:
    """The tensors have attention at the levels that the configuration names by their resolution."""
    if "attn_resolutions" not in config:
        return
    sizes = [config["image_size"] // 2**level for level in range(len(config["ch_mult"]))]
    if tuple(level for level, size in enumerate(sizes) if size in config["attn_resolutions"]) != attention:
        raise CheckpointError(
            f"attn_resolutions is {list(config['attn_resolutions'])}, and the tensors have attention at "
            f"{[sizes[level] for level in attention]} if image_size is {config['image_size']}",
            hint="give the training's own image_size with --config; --size is what is exported",
        )


# --- network and convention ----------------------------------------------------------------------------------------


def _network(config: Config, attention: tuple[int, ...]) -> NCSNpp:
    """The network of a configuration, without memory. Raises CheckpointError."""
    if (
        config["name"] == "ddpm" and config["nf"] < 128
    ):  # it normalises in 32 groups, and NCSN++ in a quarter of its channels
        _refuse(f"name ddpm with nf {config['nf']}", "from nf 128 on it is")
    if config["fir"] and config["progressive"] == "residual":
        _refuse("fir with progressive residual", "the original cannot run it either: check --config")
    if config["fir"] and config["resblock_type"] == "ddpm" and config["resamp_with_conv"]:
        _refuse("fir with resblock_type ddpm and resamp_with_conv", "the original cannot run it either: check --config")
    try:
        with torch.device("meta"):
            return NCSNpp(
                channels=config["num_channels"],
                nf=config["nf"],
                ch_mult=config["ch_mult"],
                num_res_blocks=config["num_res_blocks"],
                attention=attention,
                fourier=config["embedding_type"] == "fourier",
                conditional=config["conditional"],
                biggan=config["resblock_type"] == "biggan",
                taps=config["fir_kernel"] if config["fir"] else (),
                resamp_with_conv=config["resamp_with_conv"],
                skip_rescale=config["skip_rescale"],
                progressive=config["progressive"],
                progressive_input=config["progressive_input"],
                progressive_combine=config["progressive_combine"],
                centered=config["centered"],
                scale_by_sigma=config["scale_by_sigma"],
            )
    except (ValueError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"the channels do not divide into groups: {error}", hint="the file is not a network of score_sde_pytorch"
        ) from error


def _convention(config: Config) -> Convention:
    """How to read the network: Song et al. 2021, appendices B and C. Raises CheckpointError for others."""
    if config["scale_by_sigma"] and config["embedding_type"] == "positional":
        _refuse("scale_by_sigma with embedding_type positional", "networks that take σ itself (fourier) are")
    match config["sde"], config["continuous"]:
        case "vesde", True:
            if "sigma_min" not in config or "sigma_max" not in config:
                raise CheckpointError("nothing tells sigma_min and sigma_max", hint=_CONFIG_HINT)
            double = 1 if config["centered"] else 2  # data in [0, 1], ours in [-1, 1]
            return Convention(
                sde=schedules.VE(double * config["sigma_min"], double * config["sigma_max"]),
                predicts="score",
                time="sigma",
                data_range=(-1.0, 1.0) if config["centered"] else (0.0, 1.0),
            )
        case "vesde", False:
            _refuse(
                "sde vesde with continuous false", "its label is a place in a table of levels; continuous networks are"
            )
        case "subvpsde", _:
            _refuse("sde subvpsde", "its mean and noise follow no σ(t) of this engine; vpsde and vesde are")
        case _ if not config["centered"]:
            _refuse("sde vpsde with centered false", "VP networks with data in [-1, 1] are")
        case _, True:
            sde = schedules.VP(config["beta_min"], config["beta_max"])
            return Convention(sde=sde, predicts="eps", time="continuous", time_scale=999.0)
    steps = config.get("num_scales")
    if steps is None:
        raise CheckpointError(
            "nothing tells num_scales, the number of levels", hint="--config '{\"num_scales\": 1000}' is usual"
        )
    betas = np.linspace(config["beta_min"] / steps, config["beta_max"] / steps, steps)
    return Convention(sde=schedules.VPDiscrete(tuple(np.cumprod(1 - betas).tolist())), predicts="eps", time="index")


def _refuse(what: str, hint: str) -> NoReturn:
    raise CheckpointError(f"{what} is not supported", hint=hint)


def _sigma_range(sde: schedules.Sde) -> tuple[float, float]:
    """The noise levels of the training, in our frame."""
    if isinstance(sde, schedules.VE):
        return sde.sigma_min, sde.sigma_max
    first = 1 / len(sde.alphas_cumprod) if isinstance(sde, schedules.VPDiscrete) else 1e-5  # the smallest t it drew
    return float(sde.sigma(first)), float(sde.sigma(1.0))
