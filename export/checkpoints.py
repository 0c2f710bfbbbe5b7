"""Read a checkpoint without running any code in it, and put its tensors into a network.

Files: safetensors, PyTorch's own formats (weights only), and other pickles through `pickles.py`. Networks are
built on the meta device and compared with the file name by name and shape by shape before memory is spent.
"""

import hashlib
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from sdedit.errors import OptionError, SdeditError
from sdedit.export.source import Payload

MOST_VALUES = 1_000_000  # in a checkpoint, shared ones counted each time: real ones hold thousands
SHOWN = 5  # names listed in an error
AVERAGED = re.compile(r"(^|[._])(ema|shadow)([._]|$)|^[1-9]\d*\.")  # SDEdit's training writes [model, …, average]
TORCH_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how torch.save began before it wrote zip files


class CheckpointError(SdeditError):
    """A checkpoint cannot be read, is of an unknown kind, or does not fit the network it should fill."""


def read(path: Path) -> Payload:
    """A file's contents: nested containers of tensors and plain values. Raises CheckpointError; runs no code."""
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file", hint="check the path") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}", hint="name a checkpoint file") from error
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"{path}: is a Git LFS pointer, not the weights themselves", hint="git lfs pull in its repository"
        )
    if not start:
        raise CheckpointError(f"{path}: is empty (0 bytes)", hint="copy or download it again")
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size:
        return _read_safetensors(path)
    if start.startswith((b"PK\x03\x04", TORCH_LEGACY)):
        return _read_torch(path, mapped=start.startswith(b"PK"))
    if start.startswith(b"\x80"):
        from sdedit.export import pickles

        return pickles.load(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)  # which says what is wrong with it
    raise CheckpointError(
        f"{path}: neither safetensors nor a PyTorch file nor a pickle (it begins with {start[:8]!r})",
        hint="name the weights themselves; an archive must be unpacked first",
    )


def _read_safetensors(path: Path) -> Payload:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file: {error}", hint="download it again") from error


def _read_torch(path: Path, *, mapped: bool) -> Payload:
    if mapped and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise CheckpointError(
                    f"{path}: is compressed, which PyTorch's files never are", hint="save it with torch.save"
                )
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # pickle's, zip's and torch's own kinds
        text = " ".join(str(error).split())
        if "Unsupported global" in text or "Unsupported class" in text or "weights_only" in text.lower():
            asked = text.partition("GLOBAL ")[2].split(" ")[0] or "more than tensors"
            raise CheckpointError(
                f"{path}: asks for {asked}; only tensors and plain containers are read from a checkpoint",
                hint="if you trust it, load it in PyTorch and save its state dict as safetensors",
            ) from error
        raise CheckpointError(f"{path}: a damaged PyTorch file: {text[:200]}", hint="download it again") from error


def provenance(path: Path) -> dict[str, str]:
    """What the artifact's `source` says of a checkpoint: its name and the SHA-256 of its weight files."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in (".safetensors", ".bin"))
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            while part := opened.read(2**20):
                digest.update(part)
    return {"file": path.absolute().name, "sha256": digest.hexdigest()}


def flat(payload: Payload) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in it, with the way to it through containers as its name: 0.module.conv_in.weight."""
    from sdedit.export import pickles

    left = MOST_VALUES

    def walk(value: Payload, path: str) -> Iterator[tuple[str, Tensor]]:
        nonlocal left
        left -= 1
        if left < 0:  # a few lists that hold each other many times over are enough
            raise CheckpointError(f"the file spells out to more than {MOST_VALUES} values", hint="do not trust it")
        if isinstance(value, pickles.Record):
            value = pickles.tensors(value)
        if isinstance(value, Tensor):
            yield path, value
        elif isinstance(value, Mapping | list | tuple):
            for name, inner in value.items() if isinstance(value, Mapping) else enumerate(value):
                yield from walk(inner, f"{path}.{name}" if path else str(name))

    try:
        yield from walk(payload, "")
    except RecursionError:
        raise CheckpointError("the file's containers lie too deep, or in themselves", hint="do not trust it") from None


def tensor_names(payload: Payload) -> list[str]:
    """The names of all tensors in it, containers spelled out with dots."""
    return [name for name, _ in flat(payload)]


def is_state_dict(value: object) -> bool:
    """A flat mapping of names to tensors, at least one."""
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(name, str) and isinstance(t, Tensor) for name, t in value.items())
    )


def without_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors with `prefix` cut off, where every name begins with it; else as they are."""
    cut = all(name.startswith(prefix) for name in tensors)
    return {name.removeprefix(prefix) if cut else name: tensor for name, tensor in tensors.items()}


def find_network(every: Mapping[str, Tensor], stem: str, wanted: str | None) -> tuple[dict[str, Tensor], str, str]:
    """The network in a checkpoint that has a tensor `stem`: its tensors, the prefix they had, and "ema" or "model".

    The averaged one where there are both, unless `wanted` says. Raises CheckpointError, OptionError.
    """
    prefixes = [name.removesuffix(stem) for name in every if f".{name}".endswith(f".{stem}")]
    if not prefixes:
        raise CheckpointError(f"no tensor is called {stem}", hint="leave --family out: content tells it")
    found = {"ema" if AVERAGED.search(prefix) else "model": prefix for prefix in prefixes}
    if len(found) < len(prefixes):
        raise CheckpointError(
            f"the file holds several networks: {', '.join(f'{prefix}*' for prefix in prefixes)}",
            hint="save the one to export in a file of its own",
        )
    weights = wanted or ("ema" if "ema" in found else "model")
    if weights not in found:
        raise OptionError(
            f"the file holds no {weights} weights", hint=f"--weights {next(iter(found))}, or leave it out"
        )
    prefix = found[weights]
    inner = tuple(other for other in prefixes if len(other) > len(prefix))  # another network, within this one's names
    tensors = {
        name.removeprefix(prefix): tensor
        for name, tensor in every.items()
        if name.startswith(prefix) and not name.startswith(inner)
    }
    return tensors, prefix, weights


def shape_of(tensors: Mapping[str, Tensor], name: str, rank: int, *, hint: str) -> torch.Size:
    """A tensor's shape. Raises CheckpointError where it is missing, empty or of another rank."""
    if name not in tensors:
        raise CheckpointError(f"the file has no {name}", hint=hint)
    shape = tensors[name].shape
    if len(shape) != rank or 0 in shape:
        raise CheckpointError(f"{name} has shape {list(shape)}; wanted {rank} dimensions", hint=hint)
    return shape


def load_weights(net: nn.Module, tensors: Mapping[str, Tensor], *, hint: str) -> nn.Module:
    """Give a network on the meta device the file's tensors, as float32, without copying those that are.

    Raises CheckpointError naming missing and unexpected tensors (five and the count) and the first whose shape
    disagrees; `hint` says which option describes another network.
    """
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized or tensor.is_complex():
            raise CheckpointError(f"{name} is a tensor of an unusual kind: {tensor.type()}", hint="save plain floats")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise CheckpointError(f"{name} is declared larger than what the file holds of it", hint="do not trust it")
    wanted = {name: tensor.shape for name, tensor in net.state_dict().items()}
    problems = []
    if wrong := [name for name in wanted if name in tensors and tensors[name].shape != wanted[name]]:
        name = wrong[0]
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        problems.append(f"{name} has shape {list(tensors[name].shape)}, expected {list(wanted[name])}{more}")
    for what, names in (
        ("missing", [name for name in wanted if name not in tensors]),
        ("unexpected", [name for name in tensors if name not in wanted]),
    ):
        if names:
            problems.append(f"{len(names)} {what} ({', '.join(names[:SHOWN])}{', …' if len(names) > SHOWN else ''})")
    if problems:
        raise CheckpointError(f"the checkpoint does not fit the network: {'; '.join(problems)}", hint=hint)
    floats = {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}
    if broken := [name for name, t in floats.items() if t.is_floating_point() and not bool(t.isfinite().all())]:
        raise CheckpointError(f"the checkpoint's {broken[0]} holds NaN or Inf", hint="download it again")
    net.load_state_dict(floats, assign=True)
    return net.eval().requires_grad_(False)


def parameter_count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())
