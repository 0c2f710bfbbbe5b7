"""What is measured: every combination of the values that were listed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import product
from pathlib import Path
from typing import Any

from sdedit.errors import OptionError


def axis(default: Any, kind: type, help: str, *, of_model: bool = False) -> Any:
    """A field of Case that may be listed: how a word of it is read, and whether it belongs to loading the model."""
    return field(default=default, metadata={"kind": kind, "help": help, "of_model": of_model})


@dataclass(frozen=True)
class Case:
    """One row to measure. None takes the default, as `sdedit.load` and `Editor.edit` do."""

    model: str | None = None  # the path of an artifact or plan; None is the bundled model
    backend: str = axis("auto", str, "auto (default), or names of backends", of_model=True)
    precision: str | None = axis(None, str, "precisions that the backend must run in", of_model=True)
    threads: int | None = axis(None, int, "CPU threads of the network (default: every core)", of_model=True)
    batch: int = axis(1, int, "pictures edited at once (default 1)")
    steps: int | None = axis(None, int, "denoising steps (default: the model's, else 50)")
    sampler: str | None = axis(None, str, "samplers (default: the model's, else ancestral)")
    t0: float | None = axis(None, float, "start times (default: the model's, else 0.5)")
    spacing: str | None = axis(None, str, "spacings of the steps (default: as for edit)")
    eta: float | None = axis(None, float, "fresh noise of ddim and dpmpp-2m-sde")
    repeats: int = axis(1, int, "passes, each from the last one's result (default 1)")
    conditions: tuple[tuple[str, float], ...] = ()  # values of the model's further inputs
    fast: bool = False  # whether backend and precision are the fastest that pass verification, of those named

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> "Case":
        """What `dataclasses.asdict` told, after JSON."""
        return cls(**{**told, "conditions": tuple((name, value) for name, value in told["conditions"])})

    @property
    def label(self) -> str:
        """The case in the words it was asked for."""
        asked = [f"--{f.name} {value}" for f in AXES if (value := getattr(self, f.name)) not in (None, f.default)]
        asked += [f"--set {name}={value:g}" for name, value in self.conditions]
        return " ".join([self.model or "the bundled model", *asked, *(["--fast"] if self.fast else [])])

    def edit_options(self) -> dict[str, Any]:
        """The keywords of `Editor.edit`, but for `samples`."""
        asked = {f.name: getattr(self, f.name) for f in AXES if not f.metadata["of_model"]}
        return asked | {"conditions": dict(self.conditions)}


AXES = tuple(f for f in fields(Case) if f.metadata)


def expand(
    models: Sequence[str | Path | None],
    lists: Mapping[str, Sequence[Any]],
    conditions: Mapping[str, float] | None = None,
    *,
    fast: bool = False,
) -> list[Case]:
    """The cases: every model with every combination of the listed values, the last name varying fastest.

    lists: name of one of AXES -> its values. fast: of every case. Raises OptionError for unknown names, empty lists and
    duplicates.
    """
    known = [f.name for f in AXES]
    if unknown := set(lists) - set(known):
        raise OptionError(f"nothing to vary is called {', '.join(sorted(unknown))}", hint=f"vary {', '.join(known)}")
    for name, values in {"model": models, **lists}.items():
        if not isinstance(values, Sequence) or isinstance(values, str):
            raise OptionError(f"{name} is {values!r}; wanted a list", hint=f"{name}: [{values!r}]")
        if not values:
            raise OptionError(f"{name} is an empty list", hint="give at least one value, or leave it out")
        if twice := [value for value in values if list(values).count(value) > 1]:
            raise OptionError(f"{name} lists {twice[0]} twice", hint="name every value once")
    names = [None if model is None else str(model) for model in models]
    ordered = [name for name in known if name in lists]
    given = tuple((conditions or {}).items())
    return [
        Case(model, conditions=given, fast=fast, **dict(zip(ordered, values, strict=True)))
        for model in names
        for values in product(*(lists[name] for name in ordered))
    ]
