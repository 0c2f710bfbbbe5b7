"""The artifact: one ordinary .onnx file, D(x; σ), with what the engine must know in its metadata.

Inputs `x` float32 [B, C, H, W] and `sigma` float32 [B]; output `denoised` float32 [B, C, H, W]; B is
dynamic. Metadata property `sdedit`: JSON, format 1. Everything is validated here, at open.
"""

import hashlib
import json
import math
import mmap
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath
from threading import Lock, Thread
from typing import Any

from sdedit import protobuf
from sdedit import sde as schedules
from sdedit.errors import ArtifactError, OptionError
from sdedit.schedule import SAMPLERS, SPACINGS, checked_steps, checked_t0

FORMAT = 1
OLDEST_OPSET = 17
MOST_PIXELS = 2**26
HASHED_AT_ONCE = 2**22  # bytes; between them a thread waits for its turn
EXPORT_HINT = "the README's section 'Models' says what an artifact must be; write it again"
State = tuple[tuple[int, ...], ...]
BUNDLED = Path(__file__).parent / "models" / "eurosat-64.onnx"


@dataclass(frozen=True)
class ExtraInput:
    """A further input of the network, one value an image, such as a class label."""

    dtype: str
    count: int | None  # values 0 … count-1, where the artifact says so

    def checked(self, name: str, value: float) -> float:
        """`value`, if the input can take it. Raises OptionError."""
        whole = self.dtype != "float32" or self.count is not None
        most = (self.count or 2**31) - 1 if whole else math.inf
        fits = math.isfinite(value) and (not whole or (0 <= value <= most and value == int(value)))
        if not fits:
            wanted = f"a whole number from 0 to {most}" if whole else "a finite number"
            raise OptionError(f"{name} is {value:g}; wanted {wanted}", hint=f"--set {name}=0")
        return value


@dataclass(frozen=True)
class Artifact:
    """A validated artifact: where it is, what it says of itself, what it takes and gives."""

    path: Path
    metadata: dict[str, Any]  # the JSON, whole
    opset: int
    inputs: tuple[protobuf.Tensor, ...]
    outputs: tuple[protobuf.Tensor, ...]
    size_bytes: int  # with external data
    sde: schedules.Sde = field(repr=False)
    extra_inputs: dict[str, ExtraInput] = field(default_factory=dict)
    external: tuple[Path, ...] = ()  # files beside it that hold weights (ONNX external data)
    state: State = ()  # of its files when it was read
    _hashing: Lock = field(default_factory=Lock, repr=False, compare=False)  # held while they are hashed: once

    @property
    def name(self) -> str:
        return str(self.metadata.get("name") or self.path.stem)

    @property
    def channels(self) -> int:
        return int(self.metadata["image"]["channels"])

    @property
    def height(self) -> int:
        return int(self.metadata["image"]["height"])

    @property
    def width(self) -> int:
        return int(self.metadata["image"]["width"])

    def frame(self, size: tuple[int, int] | None = None) -> tuple[int, int]:
        """(width, height) that an edit runs at: `size` if the network takes it, else its own. Raises OptionError."""
        if size is None or tuple(size) == (self.width, self.height):
            return self.width, self.height
        if not self.metadata["image"].get("dynamic"):
            raise OptionError(
                f"size is {size[0]}x{size[1]}; {self.name} is fixed to {self.width}x{self.height}",
                hint="leave the size out, or export the model with --dynamic",
            )
        multiple = int(self.metadata["image"].get("multiple", 1))
        if any(side % multiple for side in size) or size[0] * size[1] > MOST_PIXELS:
            shrink = min(1.0, math.sqrt(MOST_PIXELS / (size[0] * size[1])))
            fits = [side * shrink / multiple for side in size]
            width, height = (max(1, round(side)) * multiple for side in fits)
            if width * height > MOST_PIXELS:
                width, height = (max(1, math.floor(side)) * multiple for side in fits)
            raise OptionError(
                f"size is {size[0]}x{size[1]}; {self.name} takes multiples of {multiple}, {MOST_PIXELS} pixels at most",
                hint=f"--size {width}x{height}",
            )
        return size

    @property
    def precision(self) -> str:
        return str(self.metadata.get("precision", "fp32"))

    @property
    def defaults(self) -> Mapping[str, Any]:
        """t0, steps, sampler, spacing: those the artifact recommends."""
        return self.metadata.get("defaults") or {}

    @property
    def sha256(self) -> str:
        """Of the file's bytes, followed by those of its external data, in the order of their names.

        Raises ArtifactError where they are no longer those that were read.
        """
        with self._hashing:
            return self._sha256

    @cached_property
    def _sha256(self) -> str:
        digest, part = hashlib.sha256(), memoryview(bytearray(HASHED_AT_ONCE))
        try:
            for path in self._files:
                with path.open("rb", buffering=0) as file:
                    while count := file.readinto(part):
                        digest.update(part[:count])
        except OSError as error:
            raise self._changed() from error
        self.require_unchanged()
        return digest.hexdigest()

    def hash_ahead(self) -> None:
        """Begin with `sha256` in another thread, beside the imports of what shall run it."""

        def work() -> None:
            with suppress(ArtifactError):  # whoever asks for it is told
                _ = self.sha256

        Thread(target=work, daemon=True).start()

    def require_unchanged(self) -> None:
        """Raise ArtifactError where its files were replaced or written to since they were read."""
        try:
            same = not self.state or _state(self._files) == self.state
        except OSError:
            same = False
        if not same:
            raise self._changed()

    def seal(self) -> None:
        """Once it is opened: know the hash of what was opened. Raises ArtifactError where that was changed."""
        _ = self.sha256
        self.require_unchanged()

    @property
    def _files(self) -> tuple[Path, ...]:
        return self.path, *sorted(self.external)

    def _changed(self) -> ArtifactError:
        return ArtifactError(f"{self.path}: was changed since it was read", hint="load it again")


def read(path: Path) -> Artifact:
    """Open and validate an artifact. Raises ArtifactError that says which field is wrong, and how."""
    model, stat = _read_onnx(path)
    text = model.metadata.get("sdedit")
    if "sdedit_loop" in model.metadata and text is None:
        raise ArtifactError(
            f"{path}: is a whole edit ('sdedit export --loop'), not a network",
            hint="run it with ONNX Runtime alone, or name the artifact that it was made from",
        )
    if text is None:
        raise ArtifactError(f"{path}: an ONNX file without our metadata (property 'sdedit')", hint=EXPORT_HINT)
    try:
        metadata = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: metadata 'sdedit' is not JSON: {error}", hint=EXPORT_HINT) from error
    try:
        artifact = validate(path, model, stat.st_size, metadata)
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}", hint=error.hint) from None
    return replace(artifact, state=(state_of(stat), *_state(artifact._files[1:])))


def loop_metadata(path: Path) -> Any:
    """What an ONNX file that is a whole edit says of itself, its `sdedit_loop` object; None for any other file."""
    text = _read_onnx(path)[0].metadata.get("sdedit_loop")
    try:
        return None if text is None else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: metadata 'sdedit_loop' is not JSON: {error}", hint=EXPORT_HINT) from error


def is_artifact(path: Path) -> bool:
    """Whether this ONNX file carries our metadata. Raises ArtifactError for a file that is no ONNX model."""
    return "sdedit" in _read_onnx(path)[0].metadata


def _state(files: Sequence[Path]) -> State:
    """Raises OSError."""
    return tuple(state_of(file.stat()) for file in files)


def state_of(file: os.stat_result) -> tuple[int, ...]:
    """What is another after the file was replaced or written to."""
    return file.st_dev, file.st_ino, file.st_size, file.st_mtime_ns


def _read_onnx(path: Path) -> tuple[protobuf.Model, os.stat_result]:
    """The model, and which file it was read from."""
    try:
        if path.is_dir():
            raise ArtifactError(f"{path}: is a folder, not an .onnx file", hint="name the .onnx file in it")
        with path.open("rb") as file:
            stat = os.fstat(file.fileno())
            if stat.st_size == 0:
                raise ArtifactError(f"{path}: is empty (0 bytes)", hint="copy or write it again")
            mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))  # the weights are never read
            return protobuf.read_model(mapped), stat
    except FileNotFoundError:
        raise ArtifactError(f"{path}: no such file", hint="check the path") from None
    except OSError as error:
        raise ArtifactError(
            f"{path}: cannot be read: {error.strerror or error}", hint="check the file's permissions"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: not an ONNX file, or a truncated one: {error}", hint=EXPORT_HINT) from error


def validate(path: Path, model: protobuf.Model, size: int, metadata: Any) -> Artifact:
    """The artifact, if its metadata and its tensors are what they must be. Raises ArtifactError, without the path."""
    if not isinstance(metadata, dict):
        raise ArtifactError("metadata 'sdedit' is not a JSON object", hint=EXPORT_HINT)
    version: Any = metadata.get("format")
    if not is_whole(version) or version < 1:
        raise ArtifactError(f"format is {version!r}; wanted {FORMAT}", hint=EXPORT_HINT)
    if version > FORMAT:
        raise ArtifactError(
            f"format {version} is newer than this engine reads ({FORMAT})", hint="pip install --upgrade sdedit-engine"
        )
    if model.opset < OLDEST_OPSET:
        raise ArtifactError(
            f"opset is {model.opset}; wanted at least {OLDEST_OPSET}", hint="write it again with opset 18"
        )
    image = metadata.get("image")
    if not isinstance(image, dict):
        raise ArtifactError("metadata has no 'image' object", hint=EXPORT_HINT)
    for name in ("channels", "height", "width", "multiple"):
        value: Any = image.get(name, 1 if name == "multiple" else None)
        if not is_whole(value) or value < 1:
            raise ArtifactError(f"image.{name} is {value!r}; wanted a whole number, at least 1", hint=EXPORT_HINT)
    for name in ("height", "width"):
        if image[name] % image.get("multiple", 1):
            raise ArtifactError(
                f"image.{name} is {image[name]}; must be a multiple of {image['multiple']}",
                hint=f"write it again with a size that is a multiple of {image['multiple']}",
            )
    if not isinstance(image.get("dynamic", False), bool):
        raise ArtifactError(f"image.dynamic is {image['dynamic']!r}; wanted true or false", hint=EXPORT_HINT)
    if image["height"] * image["width"] > MOST_PIXELS:
        raise ArtifactError(
            f"image is {image['height']} x {image['width']}; wanted at most {MOST_PIXELS} pixels", hint=EXPORT_HINT
        )
    if not isinstance(metadata.get("sde"), dict):
        raise ArtifactError("metadata has no 'sde' object", hint=EXPORT_HINT)
    _check_defaults(metadata)
    extra = _extra_inputs(metadata)
    _check_tensors(model, image, extra)
    sde = schedules.from_metadata(metadata["sde"])
    external = _external(path, model)
    size += sum(file.stat().st_size for file in external)
    return Artifact(path, metadata, model.opset, model.inputs, model.outputs, size, sde, extra, external)


def _external(path: Path, model: protobuf.Model) -> tuple[Path, ...]:
    """The files with the rest of the weights: in the artifact's folder or below it, never elsewhere."""
    files = []
    for location in model.external:
        outside = PureWindowsPath(location).drive or PureWindowsPath(location).root or location.startswith("/")
        if outside or not location or ".." in PurePosixPath(location.replace("\\", "/")).parts:
            raise ArtifactError(
                f"its weights are said to lie in {location!r}, outside its folder",
                hint="do not use this file unless you made it; export it again",
            )
        file = path.parent / location
        if not file.is_file():
            raise ArtifactError(
                f"its weights are in {location!r}, which is not beside it", hint="copy both files to one folder"
            )
        files.append(file)
    return tuple(files)


def _check_defaults(metadata: Mapping[str, Any]) -> None:
    """What the artifact recommends must be possible."""
    defaults = metadata.get("defaults") or {}
    if not isinstance(defaults, dict):
        raise ArtifactError("defaults is not a JSON object", hint=EXPORT_HINT)
    try:
        checked_t0(defaults.get("t0", 0.5), "defaults.t0")
        checked_steps(defaults.get("steps", 50), "defaults.steps")
    except OptionError as error:
        raise ArtifactError(str(error), hint=EXPORT_HINT) from None
    for name, known in (("sampler", SAMPLERS), ("spacing", SPACINGS)):
        if name in defaults and defaults[name] not in known:
            raise ArtifactError(
                f"defaults.{name} is {defaults[name]!r}; wanted one of {', '.join(known)}", hint=EXPORT_HINT
            )


def _extra_inputs(metadata: Mapping[str, Any]) -> dict[str, ExtraInput]:
    declared = metadata.get("inputs") or {}
    if not isinstance(declared, dict) or not all(isinstance(value, dict) for value in declared.values()):
        raise ArtifactError("inputs is not a JSON object of objects", hint=EXPORT_HINT)
    extra = {}
    for name, value in declared.items():
        if name in ("x", "sigma"):
            raise ArtifactError(f"inputs.{name} names an input that every artifact has", hint=EXPORT_HINT)
        dtype = value.get("dtype")
        if dtype not in ("int64", "int32", "float32"):
            raise ArtifactError(f"inputs.{name}.dtype is {dtype!r}; wanted int64, int32 or float32", hint=EXPORT_HINT)
        count: Any = value.get("count")
        if count is not None and (not is_whole(count) or count < 1):
            raise ArtifactError(
                f"inputs.{name}.count is {count!r}; wanted a whole number, at least 1", hint=EXPORT_HINT
            )
        extra[name] = ExtraInput(dtype, count)
    return extra


def _check_tensors(model: protobuf.Model, image: Mapping[str, Any], extra: Mapping[str, ExtraInput]) -> None:
    frame = (image["channels"], image["height"], image["width"])
    wanted_inputs = {"x": ("float32", 4), "sigma": ("float32", 1)} | {n: (e.dtype, 1) for n, e in extra.items()}
    for side, tensors, wanted in (
        ("input", model.inputs, wanted_inputs),
        ("output", model.outputs, {"denoised": ("float32", 4)}),
    ):
        found = {tensor.name: tensor for tensor in tensors}
        if set(found) != set(wanted):
            raise ArtifactError(
                f"{side}s are {', '.join(found) or 'none'}; wanted {', '.join(wanted)}", hint=EXPORT_HINT
            )
        for name, (element, rank) in wanted.items():
            tensor = found[name]
            if tensor.element != element:
                raise ArtifactError(f"{side} {name} is {tensor.element}; wanted {element}", hint=EXPORT_HINT)
            if tensor.shape is None and side == "output":
                continue
            shape = tensor.shape or ()
            if len(shape) != rank:
                raise ArtifactError(f"{side} {name} has rank {len(shape)}; wanted {rank}", hint=EXPORT_HINT)
            if isinstance(shape[0], int) and side == "input":
                raise ArtifactError(
                    f"{side} {name} has a fixed batch of {shape[0]}; wanted a dynamic one", hint=EXPORT_HINT
                )
            for size, meant, label in zip(shape[1:], frame, ("channels", "height", "width"), strict=False):
                if isinstance(size, int) and size != meant:
                    raise ArtifactError(f"{side} {name} has {label} {size}, image.{label} is {meant}", hint=EXPORT_HINT)


def is_whole(value: object) -> bool:
    """Whether JSON's `value` is a whole number."""
    return isinstance(value, int) and not isinstance(value, bool)
