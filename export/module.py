"""Any torch.nn.Module, from the callable that makes it and a file with its weights."""

import importlib
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sdedit.errors import OptionError
from sdedit.export import checkpoints
from sdedit.export.checkpoints import CheckpointError
from sdedit.export.denoiser import Convention
from sdedit.export.source import Source

CONTAINERS = {"ema": ("ema", "model_ema", "ema_model"), "model": ("model", "state_dict", "net", "params")}


def load(
    spelled: str,
    checkpoint: str | None,
    convention: Convention,
    *,
    channels: int,
    size: int,
    multiple: int,
    weights: str | None,
) -> Source:
    """spelled: package.module:factory, imported and called without arguments: the user's own code, which runs."""
    net = make(spelled)
    used, file = "model", {}
    if checkpoint is not None:
        payload = checkpoints.read(Path(checkpoint))
        tensors, used = state_dict(Path(checkpoint), payload, weights)
        file = checkpoints.provenance(Path(checkpoint))
        net = checkpoints.load_weights(net, tensors, hint="does --module build the network these weights belong to?")
    net = net.float().eval().requires_grad_(False)
    count = checkpoints.parameter_count(net)
    summary = f"{type(net).__name__}, {count / 1e6:.1f} M parameters, predicts {convention.predicts}, {used} weights"
    return Source(
        "module", summary, net, convention, channels, size, size, multiple, used,
        details={"class": f"{type(net).__module__}.{type(net).__qualname__}", **file},
    )  # fmt: skip


def make(spelled: str) -> nn.Module:
    """The network that package.module:factory returns. Raises OptionError."""
    hint = "--module package.module:factory, a callable without arguments that returns a torch.nn.Module"
    name, separator, factory = spelled.partition(":")
    if not separator or not name or not factory:
        raise OptionError(f"--module {spelled}: not of the form package.module:factory", hint=hint)
    sys.path.insert(0, os.getcwd())  # as `python -m` does
    try:
        made: Any = getattr(importlib.import_module(name), factory)
        net = made() if not isinstance(made, nn.Module) else made
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        raise OptionError(f"--module {spelled}: {type(error).__name__}: {error}", hint=hint) from error
    finally:
        sys.path.remove(os.getcwd())
    if not isinstance(net, nn.Module):
        raise OptionError(f"--module {spelled}: returned a {type(net).__name__}, not a torch.nn.Module", hint=hint)
    if isinstance(net, torch.jit.ScriptModule):
        raise OptionError(f"--module {spelled}: returned a ScriptModule", hint="return the module it was scripted from")
    return net


def state_dict(path: Path, payload: Any, weights: str | None) -> tuple[dict[str, Any], str]:
    """The state dict in a checkpoint, and which it is: EMA where there is one. Raises CheckpointError."""
    if checkpoints.is_state_dict(payload):
        return checkpoints.without_prefix(payload, "module."), "model"
    for kind in (weights,) if weights else ("ema", "model"):
        for name in CONTAINERS[kind]:
            if isinstance(payload, dict) and checkpoints.is_state_dict(payload.get(name)):
                return checkpoints.without_prefix(payload[name], "module."), kind
    found = ", ".join(map(str, payload)) if isinstance(payload, dict) else type(payload).__name__
    raise CheckpointError(f"{path}: no state dict in it (found: {found})", hint="save net.state_dict() as safetensors")
