"""A request's options: names and texts become EditOptions, checked before anything is computed."""

import re
from collections.abc import Callable, Iterable
from typing import Any

from sdedit.backends import condition_values
from sdedit.editor import Editor
from sdedit.errors import OptionError
from sdedit.options import EditOptions, make_options
from sdedit.serve.limits import Limits
from sdedit.serve.refusal import Refusal

LONGEST = 100  # characters of an option: numbers and names are shorter


def read_options(fields: Iterable[tuple[str, str]], editor: Editor, batch: int, limits: Limits) -> EditOptions:
    """The options of one picture, resolved, for batches of this size.

    fields: names and texts as they came; `set` may come several times. Raises OptionError, and Refusal for more than
    the limits allow.
    """
    given: dict[str, Any] = {"batch": batch, "conditions": {}}
    for name, text in fields:
        if name not in _READERS:
            raise OptionError(f"unknown option {name[:LONGEST]!r}", hint=f"options are {', '.join(_READERS)}")
        if len(text) > LONGEST:
            raise OptionError(f"{name} has {len(text)} characters", hint=f"at most {LONGEST} make sense")
        value = _READERS[name](name, text)
        if name == "set":
            given["conditions"] |= value
        elif name in given:
            raise OptionError(f"{name} is given twice", hint="give it once")
        else:
            given[name] = value
    options = make_options(given).resolved(editor.artifact.defaults)
    condition_values(editor.artifact, options.conditions)
    width, height = editor.artifact.frame(options.size)
    if options.size is not None and width * height > limits.max_frame:
        raise Refusal(
            400, f"size is {width}x{height}; this service allows {limits.max_frame} pixels", hint="ask for fewer"
        )
    evaluations = (options.steps or 0) * options.repeats
    if evaluations > limits.max_steps:
        raise Refusal(
            400,
            f"{options.steps} steps, {options.repeats} times: {evaluations}; this service allows {limits.max_steps}",
            hint="20 steps are a good start",
        )
    return options


def _whole(name: str, text: str) -> int:
    if not re.fullmatch(r"-?[0-9]{1,20}", text):
        raise OptionError(f"{name} is {text!r}; wanted a whole number", hint=f"{name}=1, say")
    return int(text)


def _real(name: str, text: str) -> float:
    if not re.fullmatch(r"-?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?", text):
        raise OptionError(f"{name} is {text!r}; wanted a number", hint=f"{name}=0.5, say")
    return float(text)


def _word(name: str, text: str) -> str:
    return text


def _size(name: str, text: str) -> tuple[int, int]:
    width, _, height = text.lower().partition("x")
    return _whole(name, width), _whole(name, height or width)


def _condition(name: str, text: str) -> dict[str, float]:
    condition, separator, value = text.partition("=")
    if not separator or not condition:
        raise OptionError(f"set is {text!r}; wanted NAME=VALUE", hint="set=class_label=3, say")
    return {condition: _real(condition, value)}


_READERS: dict[str, Callable[[str, str], Any]] = {
    "t0": _real,
    "steps": _whole,
    "sampler": _word,
    "eta": _real,
    "spacing": _word,
    "seed": _whole,
    "repeats": _whole,
    "fit": _word,
    "size": _size,
    "set": _condition,
}
