"""Folders that the diffusers library wrote: a UNet2DModel beside the scheduler it was trained with.

The folder says everything (architecture, size, schedule, what is predicted), so nothing is guessed. Layouts: a
pipeline with unet/ and scheduler/, or config.json, weights and scheduler_config.json side by side. The network
itself is the library's; its weights are read strictly, since the library's own loader fills in what is missing.
"""

import inspect
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sdedit import sde
from sdedit.errors import ArtifactError, OptionError
from sdedit.export import checkpoints, conditions, schedules
from sdedit.export.checkpoints import CheckpointError, is_state_dict, load_weights, parameter_count
from sdedit.export.denoiser import Convention
from sdedit.export.networks.unet2d import CONFIG_HINT, PlainUNet, library, unet_on_meta
from sdedit.export.source import Payload, Source, SourceOptions

NAME = "diffusers"
DESCRIPTION = "a folder (or hub id) with model_index.json, unet/ and scheduler/, or the config.json of a UNet2DModel"
MARKERS = (  # a weight file without its folder
    r"(^|\.)time_embedding\.linear_1\.weight$",
    r"(^|\.)down_blocks\.0\.resnets\.0\.conv1\.weight$",
    r"(^|\.)conv_norm_out\.weight$",
)
PRESETS: dict[str, dict[str, Any]] = {}

WEIGHTS = "diffusion_pytorch_model"
NOT_PIXELS = ("vae", "vqvae", "movq", "text_encoder", "text_encoder_2", "bert", "prior", "transformer")
BLOCKS = ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D", "SkipDownBlock2D", "AttnSkipDownBlock2D")
VP_SCHEDULERS = (  # they differ in how they sample; what they say of the training is the same
    *("DDPMScheduler", "DDPMParallelScheduler", "DDIMScheduler", "DDIMParallelScheduler", "DDIMInverseScheduler"),
    *("PNDMScheduler", "LMSDiscreteScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"),
    *("HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "SASolverScheduler"),
    *("DPMSolverMultistepScheduler", "DPMSolverMultistepInverseScheduler", "DPMSolverSinglestepScheduler"),
    *("DPMSolverSDEScheduler", "DEISMultistepScheduler", "UniPCMultistepScheduler", "RePaintScheduler"),
)  # clip_sample and thresholding, which they may ask for, are left out: D is never clipped inside the loop
BETAS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
MOST_LEVELS = 100_000
PREDICTS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
SCHEDULER_HINT = """--config '{"scheduler": {"_class_name": "DDPMScheduler", "beta_schedule": "linear"}}' says it"""


# --- where things lie --------------------------------------------------------------------------------------------


def recognises(path: Path) -> bool:
    """Whether a folder is one of ours, be it supported or refused with a reason later."""
    if (path / "model_index.json").is_file() or (path / "unet" / "config.json").is_file():
        return True
    return (path / "config.json").is_file() and "_class_name" in _read_json(path / "config.json")


def build(payload: Payload, options: SourceOptions) -> Source:
    """A weight file alone: always an error, which says what else is needed."""
    if is_state_dict(payload) and any("attn2.to_k" in name for name in payload):
        raise _not_pixels("the file holds a text-conditional UNet2DConditionModel")
    raise CheckpointError(
        "these are the weights of a diffusers UNet2DModel without its configuration",
        hint="name the folder that holds it, with config.json and the scheduler, instead of the file",
    )


def build_folder(path: Path, options: SourceOptions) -> Source:
    """The network of a pipeline folder. Raises CheckpointError and OptionError."""
    options.preset_of(NAME, PRESETS)
    for key, value in options.config.items():
        if key not in ("unet", "scheduler") or not isinstance(value, dict):
            raise OptionError(f"config: family diffusers does not know {key!r}", hint=CONFIG_HINT)
    _check_pipeline(path)
    folder, weights = _choose_weights(path, options.weights)
    config = _unet_config(folder, options.config.get("unet", {}))
    scheduler = _scheduler_config(path, options.config.get("scheduler", {}))
    unet = unet_on_meta(config)
    _check_unet(config, folder / "config.json")
    height, width = _size(config, options.size)
    classes = config["num_class_embeds"] or 0
    convention = convention_of(scheduler, config)
    load_weights(unet, rename(_read_weights(folder)), hint=f"{folder / 'config.json'} describes another network")
    net = PlainUNet(unet)
    return Source(
        family=NAME,
        summary=f"UNet2DModel, {parameter_count(net) / 1e6:.1f} M parameters, {width}x{height}, "
        f"{scheduler['_class_name']} ({convention.sde.kind}, predicts {convention.predicts}), {weights} weights",
        net=net,
        convention=convention,
        channels=config["in_channels"],
        height=height,
        width=width,
        multiple=2 ** (len(config["block_out_channels"]) - 1),
        weights=weights,
        conditions=conditions.classes(classes),
        license=_license(path),
        name=_name(path),
        details={"scheduler": scheduler["_class_name"]},
    )


def download(name: str) -> Path:
    """A folder of the hub by its id, such as google/ddpm-church-256: its JSON first, weights if it is supported."""
    from huggingface_hub import snapshot_download

    def fetch(*patterns: str) -> Path:
        try:
            return Path(snapshot_download(name, allow_patterns=list(patterns)))
        except Exception as error:  # offline, unknown, private, or not an id at all: dozens of types, three libraries
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise CheckpointError(
                f"{name}: no such file or folder, and it could not be downloaded: {reason}",
                hint="check the spelling and the network; or download the folder elsewhere and name it",
            ) from error

    path = fetch("*.json", "README.md")
    if not recognises(path):
        raise CheckpointError(
            f"{name} holds no diffusers model", hint="name a repository with a UNet2DModel, or download its file"
        )
    _check_pipeline(path)
    for ending in ("safetensors", "bin"):  # the second only where the first is missing: it is as large again
        path = fetch(f"*{WEIGHTS}.{ending}", f"*{WEIGHTS}-*.{ending}")
        if any(path.rglob(f"{WEIGHTS}*.{ending}")):
            break
    return path


def _check_pipeline(path: Path) -> None:
    """Raise CheckpointError for a pipeline whose U-Net does not see pixels, or sees text."""
    index = path / "model_index.json"
    if not index.is_file():
        return
    parts = {name: part for name, part in _read_json(index).items() if isinstance(part, list) and any(part)}
    foreign = [name for name in NOT_PIXELS if name in parts]
    if foreign:
        raise _not_pixels(f"{index} lists {', '.join(foreign)}")


def _not_pixels(found: str) -> CheckpointError:
    return CheckpointError(
        f"{found}: a text- or latent-space model, and SDEdit here edits pixels",
        hint="export an unconditional or class-conditional UNet2DModel, such as google/ddpm-church-256",
    )


def _choose_weights(path: Path, wanted: str | None) -> tuple[Path, str]:
    """The folder of the weights, and whether they are "ema" (unet_ema/, as training scripts save them) or "model"."""
    ema = path / "unet_ema"
    held = ("ema", "model") if ema.is_dir() else ("model",)
    if wanted not in (None, *held):
        raise OptionError(f"{path} has no {wanted!r} weights", hint=f"--weights {' or '.join(held)}")
    if (wanted or held[0]) == "ema":
        return ema, "ema"
    return (path / "unet" if (path / "unet").is_dir() else path), "model"


def _license(path: Path) -> str | None:
    """What the front matter of the folder's README says."""
    readme = path / "README.md"
    text = readme.read_text("utf-8", errors="replace") if readme.is_file() else ""
    header = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    found = re.search(r"^license:\s*(\S+)\s*$", header[1], re.MULTILINE) if header else None
    return found[1] if found else None


def _name(path: Path) -> str:
    """The folder's name; in a hub's cache, where folders are named by commit, the repository's."""
    cached = [part for part in path.absolute().parts if part.startswith("models--")]
    return cached[-1].split("--")[-1] if cached else path.absolute().name


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}", hint="download or save the folder again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object", hint="download or save the folder again")
    return value


# --- the U-Net ---------------------------------------------------------------------------------------------------


def _unet_config(folder: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """Every field of the UNet2DModel: its defaults, config.json, then the user's."""
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no config.json, which describes the network", hint="name the folder that diffusers saved"
        )
    written = _read_json(path)
    kind = written.get("_class_name")
    if kind != "UNet2DModel":
        raise _not_pixels(f"{path} is of a {kind}")
    fields = _defaults(library().UNet2DModel)
    unknown = [name for name in given if name not in fields]
    if unknown:
        raise OptionError(
            f"config: UNet2DModel has no field {unknown[0]!r}", hint=f"--config: one of {', '.join(fields)}"
        )
    return fields | {name: value for name, value in (written | dict(given)).items() if name in fields}


def _check_unet(config: Mapping[str, Any], path: Path) -> None:
    """Raise CheckpointError for a network that SDEdit cannot use, or that has further inputs."""

    def refuse(why: str) -> None:
        raise CheckpointError(f"{path}: {why}", hint="export a UNet2DModel from pixels and a time step to pixels")

    strange = [kind for kind in config["down_block_types"] if kind not in BLOCKS]
    if strange:
        refuse(f"blocks of type {strange[0]} are not supported")
    if config["out_channels"] not in (config["in_channels"], 2 * config["in_channels"]):
        refuse(f"{config['in_channels']} channels in and {config['out_channels']} out: it is conditioned on an image")
    if config["class_embed_type"] is not None:
        refuse(f"class_embed_type {config['class_embed_type']!r}: only class numbers are supported")


def _size(config: Mapping[str, Any], wanted: int | None) -> tuple[int, int]:
    """Height and width."""
    size = wanted or config["sample_size"]
    if size is None:
        raise CheckpointError(
            "the configuration has no sample_size", hint="--size gives the picture's height and width"
        )
    sides = tuple(size) if isinstance(size, list | tuple) else (size, size)
    if len(sides) != 2 or any(type(side) is not int or side < 1 for side in sides):
        raise CheckpointError(
            f"sample_size is {_short(size)}; wanted a number of pixels, or two", hint="--size gives it"
        )
    return sides


def rename(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of early versions as today's: attention's query, key, value, proj_attn, and a doubled Fourier weight."""
    new = {}
    for name, tensor in tensors.items():
        attention = re.fullmatch(r"(.*\.attentions\.\d+\.)(query|key|value|proj_attn)\.(weight|bias)", name)
        if attention:
            to = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}[attention[2]]
            new[f"{attention[1]}{to}.{attention[3]}"] = tensor.flatten(1) if tensor.ndim > 2 else tensor
        elif name == "time_proj.W":
            new.setdefault("time_proj.weight", tensor)
        else:
            new[name] = tensor
    return new


# --- its training ------------------------------------------------------------------------------------------------


def _scheduler_config(path: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """Every field of the scheduler: its defaults, scheduler_config.json, then the user's."""
    places = [folder / "scheduler_config.json" for folder in (path / "scheduler", path)]
    if path.name in ("unet", "unet_ema"):
        places.append(path.parent / "scheduler" / "scheduler_config.json")
    found = [place for place in places if place.is_file()]
    if not found and not given:
        raise CheckpointError(
            f"{path} has no scheduler_config.json, which says how the network was trained", hint=SCHEDULER_HINT
        )
    written = _read_json(found[0]) if found else {"_class_name": "DDPMScheduler"}
    kind = given.get("_class_name", written.get("_class_name"))
    if kind != "ScoreSdeVeScheduler" and kind not in VP_SCHEDULERS:
        raise CheckpointError(
            f"{kind}: not a scheduler of a variance-preserving or variance-exploding training by noise levels",
            hint="supported: ScoreSdeVeScheduler, DDPMScheduler, DDIMScheduler and others with a beta_schedule",
        )
    fields = _defaults(getattr(library(), kind))
    unknown = [name for name in given if name not in (*fields, *BETAS, "_class_name")]
    if unknown:
        raise OptionError(f"config: {kind} has no field {unknown[0]!r}", hint=f"--config: one of {', '.join(fields)}")
    return fields | written | dict(given) | {"_class_name": kind}


def convention_of(scheduler: Mapping[str, Any], unet: Mapping[str, Any]) -> Convention:
    """How to read a network trained under this scheduler. Raises CheckpointError."""
    fourier, learned = (unet["time_embedding_type"] == kind for kind in ("fourier", "learned"))
    exploding = scheduler["_class_name"] == "ScoreSdeVeScheduler"
    if learned if exploding else fourier or unet["center_input_sample"]:
        raise CheckpointError(
            f"a network with time_embedding_type {unet['time_embedding_type']!r}, center_input_sample "
            f"{unet['center_input_sample']}, and {scheduler['_class_name']} do not go together",
            hint="""--config '{"scheduler": {"_class_name": …}}' names the scheduler it was trained with""",
        )
    if exploding:
        # The label is σ, its logarithm is taken inside, and a Fourier network divides its own output by σ.
        low, high = (_number(scheduler, name) for name in ("sigma_min", "sigma_max"))
        schedule = _valid(lambda: sde.VE(2 * low, 2 * high))
        return Convention(schedule, predicts="score", time="sigma", data_range=(0.0, 1.0))
    if scheduler.get("use_flow_sigmas") or scheduler.get("timestep_type", "discrete") != "discrete":
        raise CheckpointError(
            f"{scheduler['_class_name']} with use_flow_sigmas or continuous time steps is not supported",
            hint="supported are networks whose time step is the number of a noise level",
        )
    predicted = scheduler.get("prediction_type", "epsilon")
    if predicted not in PREDICTS:
        raise CheckpointError(f"prediction_type {predicted!r} is not one of {', '.join(PREDICTS)}", hint=SCHEDULER_HINT)
    levels = _levels(scheduler)
    if learned and (unet["num_train_timesteps"] or 0) < len(levels.alphas_cumprod):
        raise CheckpointError(
            f"the network knows {unet['num_train_timesteps']} time steps, the scheduler {len(levels.alphas_cumprod)}",
            hint=SCHEDULER_HINT,
        )
    return Convention(levels, predicts=PREDICTS[predicted], time="index", round_time=learned)


def _levels(scheduler: Mapping[str, Any]) -> sde.VPDiscrete:
    """ᾱ of the training: β as diffusers makes it, float32, for those were trained with; their product in float64."""
    if scheduler.get("trained_betas") is None:
        _, _, levels = (_number(scheduler, name) for name in ("beta_start", "beta_end", "num_train_timesteps"))
        if not 1 <= levels <= MOST_LEVELS:
            raise CheckpointError(f"num_train_timesteps is beyond 1 … {MOST_LEVELS}", hint=SCHEDULER_HINT)
    fields = {name: scheduler[name] for name in BETAS if scheduler.get(name) is not None}
    try:
        betas = library().DDPMScheduler(**fields).betas.double().numpy()
    except (TypeError, ValueError, NotImplementedError, RuntimeError) as error:
        raise CheckpointError(
            f"no noise schedule follows from {_short(fields)}: {error}", hint=SCHEDULER_HINT
        ) from error
    return _valid(lambda: schedules.from_betas(betas))


def _valid(make: Callable[[], sde.Sde]) -> sde.Sde:
    """A schedule, its complaint as ours."""
    try:
        return make()
    except ArtifactError as error:
        raise CheckpointError(f"the scheduler's {error}", hint=SCHEDULER_HINT) from error


def _number(scheduler: Mapping[str, Any], name: str) -> float:
    value = scheduler.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise CheckpointError(f"the scheduler's {name} is {_short(value)}; wanted a number", hint=SCHEDULER_HINT)
    return value


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def _defaults(kind: type) -> dict[str, Any]:
    """The fields of a configurable class with their default values."""
    parameters = inspect.signature(kind.__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


# --- weights -----------------------------------------------------------------------------------------------------


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder: one file, or several listed in an index; safetensors before PyTorch's own format.

    A variant of them (`save_pretrained(variant="fp16")`) where there are no others.
    """
    for ending in ("safetensors", "bin"):
        whole, index = folder / f"{WEIGHTS}.{ending}", folder / f"{WEIGHTS}.{ending}.index.json"
        if whole.is_file():
            return _read(whole)
        if index.is_file():
            return _read_listed(index)
    variants = [file for file in sorted(folder.glob(f"{WEIGHTS}.*.safetensors")) if "-of-" not in file.name]
    variants += sorted(folder.glob(f"{WEIGHTS}.safetensors.index.*.json"))
    if len(variants) == 1:
        return _read_listed(variants[0]) if variants[0].suffix == ".json" else _read(variants[0])
    raise CheckpointError(
        f"{folder} has neither {WEIGHTS}.safetensors nor {WEIGHTS}.bin",
        hint=f"rename one of {', '.join(file.name for file in variants)}" if variants else "download or save them too",
    )


def _read_listed(index: Path) -> dict[str, Tensor]:
    """All tensors of the files that an index lists."""
    places = _read_json(index).get("weight_map")
    files = list(places.values()) if isinstance(places, dict) else []
    if not files or any(not isinstance(file, str) or Path(file).name != file for file in files):
        raise CheckpointError(f"{index} lists no files of its folder", hint="download the folder again")
    return {name: tensor for file in sorted(set(files)) for name, tensor in _read(index.with_name(file)).items()}


def _read(path: Path) -> dict[str, Tensor]:
    tensors = checkpoints.read(path)
    if not is_state_dict(tensors):
        raise CheckpointError(f"{path} holds more than named tensors", hint="download or save the weights again")
    return dict(tensors)
