"""Which of two methods people prefer, asked pair by pair: who is shown where, and what the answers say."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sdedit.errors import OptionError

QUESTIONS = {"realism": "Which picture is more real?", "faithfulness": "Which picture follows the guide better?"}
SIDES = ("left", "right")
Z = 1.959964  # of a 95 % interval


@dataclass(frozen=True)
class Trial:
    """One question about one guide's two results."""

    question: str  # one of QUESTIONS
    name: str  # of the guide
    a_is_left: bool


@dataclass(frozen=True)
class Preference:
    """How often A was preferred."""

    question: str
    answers: int
    share_a: float  # in [0, 1]
    low: float  # of Wilson's 95 % interval, as if answers were independent
    high: float


def trials(names: Sequence[str], questions: Sequence[str], *, count: int, seed: int) -> list[Trial]:
    """At most `count` guides a question, in random order, sides drawn at random; all of it follows from the seed."""
    made = []
    chosen = np.random.default_rng(seed).permutation(len(names))[:count]
    for number, question in enumerate(questions):
        order = np.random.default_rng((seed, number)).permutation(chosen)
        made += [Trial(question, names[i], a_is_left(seed, question, names[i])) for i in order]
    return made


def a_is_left(seed: int, question: str, name: str) -> bool:
    """The key: no page has to carry it."""
    return hashlib.sha256(f"{seed}/{question}/{name}".encode(errors="surrogateescape")).digest()[0] % 2 == 0


def preferences(paths: Sequence[str | Path]) -> tuple[str, str, list[Preference]]:
    """The names of A and B, and a row for every question, from files of answers. Raises OptionError."""
    if len({Path(path).resolve() for path in paths}) < len(paths):
        raise OptionError("a file of answers is named twice", hint="name every file once: each answer counts once")
    methods: tuple[str, str] | None = None
    for_a: dict[str, list[bool]] = {}
    for path in paths:
        found, answers = _read(Path(path))
        if methods not in (None, found):
            raise OptionError(
                f"{path}: compares {' and '.join(found)}, not {' and '.join(methods or ())}",
                hint="read answers to one comparison at a time",
            )
        methods = found
        for question, prefers_a in answers:
            for_a.setdefault(question, []).append(prefers_a)
    if methods is None or not for_a:
        raise OptionError("there is no answer to read", hint="answer at least one pair on the page, then save")
    return *methods, [preference(question, for_a[question]) for question in QUESTIONS if question in for_a]


def preference(question: str, for_a: Sequence[bool]) -> Preference:
    """The share of answers for A with its interval (Wilson 1927)."""
    n, share = len(for_a), sum(for_a) / len(for_a)
    centre = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2)) / (1 + Z**2 / n)
    return Preference(question, n, share, max(0.0, centre - half), min(1.0, centre + half))


def _read(path: Path) -> tuple[tuple[str, str], list[tuple[str, bool]]]:
    """The methods, and every answer as its question and whether it is for A."""
    try:
        given = json.loads(path.read_text("utf-8"))
        study = given["study"]
        seed, methods = study["seed"], (study["a"], study["b"])
        if not isinstance(seed, int) or not all(isinstance(method, str) for method in methods):
            raise TypeError
        return methods, [_answer(seed, answer) for answer in given["answers"]]
    except OSError as error:
        raise OptionError(f"{path}: cannot be read: {error.strerror}", hint="check the path") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise OptionError(
            f"{path}: not answers of a page that --pairs wrote", hint="save them with the page's button"
        ) from error


def _answer(seed: int, answer: Mapping[str, Any]) -> tuple[str, bool]:
    question, name, chosen = answer["question"], answer["name"], answer["chosen"]
    if question not in QUESTIONS or chosen not in SIDES or not isinstance(name, str):
        raise ValueError
    return question, (chosen == "left") == a_is_left(seed, question, name)
