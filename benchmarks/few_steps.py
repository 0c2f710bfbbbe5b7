"""How many steps an edit needs: realism and faithfulness by sampler, spacing and steps, beside em at 500 steps.

python benchmarks/few_steps.py EuroSAT_RGB.zip --cache DIR --features INCEPTION.pt [--guides 1000] [--report]
python benchmarks/few_steps.py --redraw benchmarks/results/few_steps.json

INCEPTION.pt: FID's Inception as TorchScript, not part of this repository. Ten hours of two cores, or seven minutes of
an H100 beside 16 cores (--backend ort-cuda --batch 100 --workers 4), the settings of most interest first; stopped at
any time, the same command goes on. At the end, and with --report from what is there, it writes few_steps.json, .png and
_pictures.png.
"""

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import gram
import numpy as np
from arguments import positive, program
from conditions import cpu
from measured import Features, Rows
from numpy.typing import NDArray
from samples import Cache, Guides, Setting, add_arguments, finish, made, opened, results, until

import sdedit

T0 = 0.5
STEPS = (5, 10, 15, 20, 25, 35, 50)
SHOWN_STEPS = (10, 15, 20)
MOST_EVALUATIONS = 25  # of a default worth proposing
SUBSETS = 100
REFERENCE = Setting(T0, 500, "em")
AGAIN = replace(REFERENCE, run="b")  # the same with other noise: how far chance alone goes


def settings() -> list[Setting]:
    """All of the study, in the order of what is learnt from them."""
    grid = [
        Setting(T0, n, sampler, spacing) for n in STEPS for sampler in sdedit.SAMPLERS for spacing in sdedit.SPACINGS
    ]
    finalists = [one for one in grid if one.steps in (20, 25) and one.sampler != "em"]
    finalists += [one for one in grid if (one.steps, one.sampler, one.spacing) == (25, "em", "uniform")]
    return [REFERENCE, *finalists, AGAIN, *(one for one in grid if one not in finalists)]


class Measures:
    """Of one setting's results beside em-500's, of the same guides.

    Distances between distributions are of results of different guides, one half's against the other's: results of the
    same guide resemble each other, which would hide a difference.
    """

    def __init__(self, reference: Rows, real: Rows) -> None:
        """Features of em-500's results, and of photographs."""
        half, size = len(reference) // 2, len(reference) // 4
        self._half, self._real, self._others = half, gram.Beside(real), gram.Beside(reference[half:])
        self._theirs, self._their_half = self._real(reference), self._others(reference[:half])
        self._whole = {"subset_size": size, "subsets": SUBSETS}
        self._halves = {"subset_size": size // 2, "subsets": SUBSETS}

    def __call__(self, features: Rows, distances: NDArray[np.float64]) -> dict[str, Any]:
        """distances: L2 to the guides."""
        ours, our_half = self._real(features), self._others(features[: self._half])
        l2_error = distances.std(ddof=1) / len(distances) ** 0.5
        return {
            "kid": figures(gram.kid(ours, **self._whole)),
            "kid_minus_em500": figures(gram.kid_difference(ours, self._theirs, **self._whole)),
            "to_em500": figures(gram.kid(our_half, **self._halves)),
            "to_em500_minus_em500": figures(gram.kid_difference(our_half, self._their_half, **self._halves)),
            "l2": {"value": float(distances.mean()), "standard_error": float(l2_error)},
        }


def figures(measured: sdedit.Kid) -> dict[str, float]:
    return {"value": measured.value, "standard_error": measured.standard_error}


def make(cache: Cache, guides: Guides, features: Features, todo: list[Setting], end: float | None) -> None:
    """What is not there yet, in this order, until the end."""
    work = features.begin(guides.held_out)
    for number, setting in enumerate(made(cache, todo, guides, until=end), start=1):
        work += features.begin(results(cache, setting, guides))
        print(f"{number} of {len(todo)} settings: {setting.name}", file=sys.stderr, flush=True)
    finish(work)


def report(cache: Cache, guides: Guides, features: Features) -> dict[str, Any]:
    """The figures of every setting that is finished, and what they were made with."""
    whole = [one for one in settings() if not cache.missing(one, guides)]
    done = [one for one in whole if features.has(results(cache, one, guides))]
    if REFERENCE not in done:
        raise sdedit.OptionError(
            f"{REFERENCE.name} is not finished: there is nothing to compare with",
            hint="the same command again, without --report, goes on",
        )
    painted = cache.painted(guides)
    measure = Measures(features(results(cache, REFERENCE, guides)), features(guides.held_out))
    rows = []
    for setting in done:
        pictures = results(cache, setting, guides)
        distances = sdedit.l2(painted, pictures)
        rows.append(asdict(setting) | measure(features(pictures), distances))
        say(rows[-1])
    return {
        "conditions": {
            **cache.claim(guides),
            "cpu": cpu(),
            "guides": guides.count,
            "guides_from": "EuroSAT's held-out photographs as strokes: median filter, 6 colours",
            "real": f"all {len(guides.held_out)} held-out photographs, those of the guides among them",
            "features": {"sha256": features.sha256, "fed": "299 pixels, (pixel - 128)/128"},
            "kid": f"mean of {SUBSETS} subsets of {guides.count // 4} (between halves: {guides.count // 8}), kernel "
            "(x·y/2048 + 1)³; standard errors by delete-d jackknife",
        },
        "done": len(rows),
        "of": len(settings()),
        "settings": rows,
    }


def say(row: dict[str, Any]) -> None:
    """One line of the table on the terminal, KID in thousandths."""

    def shown(name: str, scale: float = 1e3) -> str:
        return f"{scale * row[name]['value']:7.3f} ±{scale * row[name]['standard_error']:6.3f}"

    difference = row["kid_minus_em500"]
    no_worse = row["steps"] <= MOST_EVALUATIONS and difference["value"] <= 2 * difference["standard_error"]
    further = row["to_em500_minus_em500"]
    mark = "" if not no_worse else "  *" if further["value"] > 2 * further["standard_error"] else "  **"
    print(
        f"{row['sampler']:<13}{row['spacing']:<10}{row['steps']:>4} {row['run']}  KID {shown('kid')}"
        f"  over em-500's {shown('kid_minus_em500')}  to em-500 {shown('to_em500')}"
        f"  over em-500's {shown('to_em500_minus_em500')}  L2 {shown('l2', 1)}{mark}"
    )


def draw(study: dict[str, Any], folder: Path) -> None:
    from few_steps_plot import draw  # here: the worker processes import this file, and need no matplotlib

    draw(study, folder / "few_steps.png")


def show(study: dict[str, Any], cache: Cache, guides: Guides, path: Path) -> None:
    """Pictures of em-500 beside those of the settings with few steps that come closest to it."""
    from few_steps_plot import closest, sheet

    columns = {
        "photograph": guides.photos,
        "guide": cache.painted(guides),
        "em 500": results(cache, REFERENCE, guides),
    }
    for row in closest(study["settings"], SHOWN_STEPS):
        setting = Setting(**{name: row[name] for name in asdict(REFERENCE)})
        columns[f"{setting.sampler}\n{setting.spacing}, {setting.steps}"] = results(cache, setting, guides)
    sheet(columns, path)


def main() -> None:
    parser = argparse.ArgumentParser(description="How many steps an edit needs.")
    add_arguments(parser)
    parser.set_defaults(draw=draw)
    parser.add_argument("--settings", type=positive, metavar="N", help="make only the first N, those of most interest")
    arguments = parser.parse_args()
    end = until(arguments)
    cache, guides = opened(arguments)
    features = Features(cache, arguments.features, arguments.feature_workers)
    if not arguments.report:
        make(cache, guides, features, settings()[: arguments.settings], end)
    study = report(cache, guides, features)
    (arguments.output / "few_steps.json").write_text(json.dumps(study, indent=1) + "\n")
    draw(study, arguments.output)
    show(study, cache, guides, arguments.output / "few_steps_pictures.png")
    print(
        f"{study['done']} of {study['of']} settings; *: at most {MOST_EVALUATIONS} evaluations, and KID at most two "
        "paired standard errors over em-500's; **: and its KID to em-500's results at most as much over em-500's own"
    )


if __name__ == "__main__":
    program(main)
