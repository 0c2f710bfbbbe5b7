"""The published kinds of checkpoint. Each module: NAME, DESCRIPTION, MARKERS, PRESETS and a loader."""

import re
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType

from sdedit.errors import OptionError
from sdedit.export import checkpoints
from sdedit.export.checkpoints import CheckpointError
from sdedit.export.conditions import with_class_label
from sdedit.export.source import Source, SourceOptions

SUFFIXES = (".pt", ".pth", ".ckpt", ".pkl", ".bin", ".safetensors", ".onnx")  # of files; other a/b are hub ids
MODULES = ("diffusers", "ddpm", "score_sde", "guided_diffusion", "edm")


def families() -> dict[str, ModuleType]:
    """The loaders by name, as --family takes them."""
    modules = (import_module(f"sdedit.export.families.{name}") for name in MODULES)
    return {module.NAME: module for module in modules}


def load(source: str, options: SourceOptions) -> Source:
    """Recognise a checkpoint by its content and load it. Raises CheckpointError, OptionError."""
    known = families()
    if options.family is not None and options.family not in known:
        raise OptionError(f"unknown family {options.family!r}", hint=f"choose one of {', '.join(known)}")
    if options.preset is not None and options.family is None:
        options = _family_of_preset(known, options)
    path = Path(source)
    diffusers = known["diffusers"]
    if not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", source) and path.suffix not in SUFFIXES:
        path = diffusers.download(source)
    if path.is_dir():
        if options.family not in (None, diffusers.NAME) or not diffusers.recognises(path):
            raise CheckpointError(
                f"{path}: a folder, and not a diffusers model (no model_index.json, no config.json of a UNet2DModel)",
                hint="name the checkpoint file in it",
            )
        loaded = diffusers.build_folder(path, options)
    else:
        payload = checkpoints.read(path)
        loaded = known[options.family or recognise(path, payload, known)].build(payload, options)
    return finish(replace(loaded, details=checkpoints.provenance(path) | loaded.details), options)


def finish(source: Source, options: SourceOptions) -> Source:
    """What all families have in common: the class label, and options of one family that another has not."""
    if options.preconditioning is not None and source.family != "edm":
        raise OptionError(f"networks of family {source.family} have no preconditioning", hint="leave it out")
    return with_class_label(source, options.class_label)


def recognise(path: Path, payload: object, known: dict[str, ModuleType]) -> str:
    """The family whose markers are all among the tensor names. Raises CheckpointError that lists them all."""
    names = checkpoints.tensor_names(payload)
    found = {
        family: sum(any(re.search(marker, name) for name in names) for marker in module.MARKERS)
        for family, module in known.items()
    }
    for family, module in known.items():
        if module.MARKERS and found[family] == len(module.MARKERS):
            return family
    nearest = max(known, key=lambda family: found[family] / max(1, len(known[family].MARKERS)))
    looked_for = "; ".join(f"{family}: {module.DESCRIPTION}" for family, module in known.items())
    likeness = (
        f"nearest is {nearest}, {found[nearest]} of {len(known[nearest].MARKERS)} marks"
        if found[nearest]
        else f"none is near; it holds {', '.join(names[:3]) or 'no tensors'}"
    )
    raise CheckpointError(
        f"{path}: of no known kind ({likeness}). Looked for: {looked_for}",
        hint="--family NAME forces one; --module package.module:factory takes any PyTorch network",
    )


def _family_of_preset(known: dict[str, ModuleType], options: SourceOptions) -> SourceOptions:
    for family, module in known.items():
        if options.preset in module.PRESETS:
            return replace(options, family=family)
    every = "; ".join(f"{family}: {', '.join(module.PRESETS)}" for family, module in known.items() if module.PRESETS)
    raise OptionError(f"unknown preset {options.preset!r}", hint=every)
