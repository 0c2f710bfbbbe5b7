"""A plan: a serialized TensorRT engine, PATH, and what it is, PATH.json. Both are needed to run it.

The sidecar is one JSON object, also meant for hosts that are not Python:

    format            1
    artifact          name, sha256, size (bytes), opset: the .onnx file that it was built from
    library           name ("tensorrt" or "tensorrt-rtx"), version: only this one runs it
    gpu               name, compute_capability [major, minor], driver of the machine it was built for;
                      null when it was built ahead of time
    targets           ["sm_86", …]: the GPU architectures that it runs on
    profile           batch [min, opt, max]; shapes {input: [min, opt, max]}, each a list of sizes
    precision         of the network inside; the interface stays float32
    metadata          the artifact's own `sdedit` object, whole
    inputs, outputs   [{name, dtype, shape}, …] as in the .onnx: a size is a number, a name, or null
    plan              bytes, sha256 of PATH
    flags             strongly_typed, tf32, user_allocation (TensorRT-RTX allocates nothing while it runs),
                      workspace_bytes (null: the library's choice), detailed (kernel names kept)
    activation_bytes  [device memory of each profile beside the weights], or null where TensorRT did not say
    built             UTC, ISO 8601
    build_seconds     how long that took

A reader ignores keys that it does not know and refuses a higher format.
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from sdedit import artifact as artifacts
from sdedit import output, protobuf
from sdedit.artifact import Artifact
from sdedit.cuda.driver import target_of
from sdedit.errors import ArtifactError, BackendUnavailable
from sdedit.tensorrt.installed import LIBRARIES, Library

FORMAT = 1

Sidecar = dict[str, Any]
Check = Callable[[Any], bool]


@dataclass(frozen=True)
class Plan:
    """A plan on disk whose sidecar was read and checked."""

    path: Path
    sidecar: Sidecar = field(repr=False)
    artifact: Artifact = field(repr=False)  # as in the .onnx it came from, which need not be here
    state: tuple[int, ...] = field(repr=False)  # of the file that was checked

    @property
    def profile(self) -> tuple[int, int, int]:
        """Batch sizes: least, the one it is tuned for, most."""
        least, tuned, most = self.sidecar["profile"]["batch"]
        return least, tuned, most

    @property
    def precision(self) -> str:
        return str(self.sidecar["precision"])

    def data(self) -> bytes:
        """The engine, serialized. Raises ArtifactError where the file is no longer the one that was checked."""
        try:
            data, same = self.path.read_bytes(), artifacts.state_of(self.path.stat()) == self.state
        except OSError:
            same = False
        if not same:
            raise ArtifactError(f"{self.path}: was changed since it was checked", hint="load it again")
        return data

    @property
    def built_by(self) -> str:
        return str(self.sidecar["library"]["name"])

    @property
    def version(self) -> str:
        return str(self.sidecar["library"]["version"])

    @property
    def targets(self) -> tuple[str, ...]:
        return tuple(self.sidecar["targets"])


def sidecar_path(path: Path) -> Path:
    """MODEL.plan -> MODEL.plan.json"""
    return path.with_name(f"{path.name}.json")


def write(path: Path, data: bytes, sidecar: Sidecar, *, force: bool = True) -> None:
    """Write a plan and its sidecar, both or neither. force: replaces what is there. Raises OutputError."""
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in sidecar.items())
    text = f"{{\n{lines}\n}}\n".encode()

    def writer(content: bytes) -> output.Writer:
        def put(file: IO[bytes]) -> None:
            file.write(content)

        return put

    output.write_all([(path, writer(data)), (sidecar_path(path), writer(text))], force=force)


def read(path: Path) -> Plan:
    """Open a plan and check that it is whole and what its sidecar says. Raises ArtifactError."""
    again = f"sdedit build MODEL.onnx -o {path} --force"
    beside = sidecar_path(path)
    try:
        if not path.is_file():
            raise ArtifactError(f"{path}: no such file", hint=f"check the path; a plan is made by: {again}")
        text = beside.read_text("utf-8")
        size = path.stat().st_size
    except FileNotFoundError:
        raise ArtifactError(
            f"{path}: its sidecar {beside.name} is not beside it", hint=f"copy both files, or: {again}"
        ) from None
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{beside}: not JSON: it is not text", hint=again) from error
    except OSError as error:
        raise ArtifactError(
            f"{path}: cannot be read: {output.reason(error)}", hint="check the permissions of both files"
        ) from error
    try:
        sidecar = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{beside}: not JSON: {error}", hint=again) from error
    try:
        _check_fields(sidecar)
        artifact = _artifact(path, sidecar)
    except ArtifactError as error:
        raise ArtifactError(f"{beside}: {error}", hint=error.hint if _newer(sidecar) else again) from None
    said = sidecar["plan"]
    if size != said["bytes"]:
        raise ArtifactError(f"{path}: has {size} bytes; its sidecar says {said['bytes']}: it is damaged", hint=again)
    with path.open("rb") as file:
        state, found = artifacts.state_of(os.fstat(file.fileno())), hashlib.file_digest(file, "sha256").hexdigest()
    if found != said["sha256"]:
        raise ArtifactError(
            f"{path}: has SHA-256 {found[:12]}…; its sidecar says {said['sha256'][:12]}…: it is damaged, or not the "
            "plan that the sidecar describes",
            hint=again,
        )
    return Plan(path, sidecar, artifact, state)


def require_runnable(plan: Plan, library: Library, compute_capability: tuple[int, int] | None = None) -> None:
    """Raise unless this library, on a GPU of this compute capability (None: not looked at), can run the plan.

    A plan runs on exactly the version that built it. BackendUnavailable: another library is needed. ArtifactError:
    the plan must be built again.
    """
    again = f"build it again here: sdedit build MODEL.onnx --backend {library.name} -o {plan.path} --force"
    if plan.built_by != library.name:
        raise BackendUnavailable(
            f"{plan.path}: was built by {plan.built_by} {plan.version}; {library.name} {library.version} cannot run it",
            hint=f"--backend {plan.built_by}, or {again}",
        )
    if plan.version != library.version:
        raise ArtifactError(
            f"{plan.path}: was built by {plan.built_by} {plan.version}; here is version {library.version}, and a plan "
            "runs only on the version that built it",
            hint=again,
        )
    if compute_capability is not None and (target := target_of(compute_capability)) not in plan.targets:
        raise ArtifactError(
            f"{plan.path}: was built for {', '.join(plan.targets)}; this GPU is {target}",
            hint=f"{again} --target {target}" if library.ahead_of_time else again,
        )


def _newer(sidecar: Any) -> bool:
    return isinstance(sidecar, dict) and artifacts.is_whole(sidecar.get("format")) and sidecar["format"] > FORMAT


def _texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, str) for one in value)


def _count(value: Any) -> bool:
    return artifacts.is_whole(value) and value > 0


def _batch(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(map(_count, value)) and sorted(value) == value


def _tensors(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(one, dict)
        and isinstance(one.get("name"), str)
        and isinstance(one.get("dtype"), str)
        and isinstance(one.get("shape"), list | None)
        and all(isinstance(size, int | str | None) for size in one["shape"] or ())
        for one in value
    )


def _gpu(value: Any) -> bool:
    if not isinstance(value, dict):
        return value is None
    capability = value.get("compute_capability")
    told = isinstance(value.get("name"), str) and isinstance(value.get("driver"), str)
    return told and isinstance(capability, list) and len(capability) == 2 and all(map(artifacts.is_whole, capability))


def _sha256(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")


FIELDS: dict[str, tuple[str, Check]] = {  # name -> what it must be, in words and as a check
    "artifact.name": ("text", lambda value: isinstance(value, str)),
    "artifact.sha256": ("a SHA-256", _sha256),
    "artifact.size": ("a number of bytes", _count),
    "artifact.opset": ("a whole number", _count),
    "library.name": (" or ".join(LIBRARIES), lambda value: value in LIBRARIES),
    "library.version": ("text", lambda value: isinstance(value, str)),
    "gpu": ("name, compute_capability and driver, or null", _gpu),
    "targets": ("a list such as ['sm_86']", _texts),
    "profile.batch": ("three whole numbers, rising", _batch),
    "profile.shapes": ("an object", lambda value: isinstance(value, dict)),
    "precision": ("text", lambda value: isinstance(value, str)),
    "metadata": ("an object", lambda value: isinstance(value, dict)),
    "inputs": ("a list of name, dtype, shape", _tensors),
    "outputs": ("a list of name, dtype, shape", _tensors),
    "plan.bytes": ("a number of bytes", _count),
    "plan.sha256": ("a SHA-256", _sha256),
    "flags": ("an object", lambda value: isinstance(value, dict)),
}


def _check_fields(sidecar: Any) -> None:
    if not isinstance(sidecar, dict):
        raise ArtifactError("is not a JSON object", hint="")
    if _newer(sidecar):
        raise ArtifactError(
            f"format {sidecar['format']} is newer than this engine reads ({FORMAT})",
            hint="pip install --upgrade sdedit-engine",
        )
    if sidecar.get("format") != FORMAT:
        raise ArtifactError(f"format is {sidecar.get('format')!r}; wanted {FORMAT}", hint="")
    for name, (wanted, fits) in FIELDS.items():
        value: Any = sidecar
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        missing = value is None and name.partition(".")[0] not in sidecar
        if missing or not fits(value):
            raise ArtifactError(f"{name} is {'missing' if missing else repr(value)}; wanted {wanted}", hint="")


def _artifact(path: Path, sidecar: Sidecar) -> Artifact:
    """The artifact that the plan was built from, from what the sidecar says of it."""
    origin = sidecar["artifact"]
    inputs, outputs = (
        tuple(
            protobuf.Tensor(t["name"], t["dtype"], None if t["shape"] is None else tuple(t["shape"]))
            for t in sidecar[side]
        )
        for side in ("inputs", "outputs")
    )
    model = protobuf.Model(origin["opset"], {}, inputs, outputs)
    artifact = artifacts.validate(path, model, origin["size"], sidecar["metadata"])
    vars(artifact)["_sha256"] = origin["sha256"]  # in its cache: of the .onnx, which records name, not of the plan
    return artifact
