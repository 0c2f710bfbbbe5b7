"""Realism against faithfulness on photographs that the bundled model never saw: the paper's figure 3 and table 4, and
what repeats, samplers and steps change.

python benchmarks/trade_off.py EuroSAT_RGB.zip --cache DIR --features INCEPTION.pt [-o benchmarks/results]
python benchmarks/trade_off.py --redraw benchmarks/results/trade_off.json

300 guides, one seed each: an hour and a half of two cores. Resumable: results and features are kept in DIR, which may
be that of few_steps.py. --minutes M stops making new ones after so long, --report makes none; what there is then is
reported.
"""

import argparse
import json
import sys
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import bound
import gram
import masked
import numpy as np
import samples
import trade_off_report
from arguments import program
from measured import Features, Rows
from samples import Cache, Guides, Setting

import sdedit

BASE = Setting(t0=0.5, steps=20, sampler="dpmpp-2m-sde", spacing="karras")  # the bundled model's own
T0S = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
COLORS = (3, 6, 16, 30, 50)  # the paper's table 4
REPEATS = (1, 2, 3)  # its K
SAMPLING = Setting(t0=1.0, steps=30, sampler="ancestral")  # from noise alone: what the model can do
STEPS = (20, 30, 50, 100, 200, 500)  # of em and ancestral, uniform in t
SUBSET_SIZE, SUBSETS = 100, 100


def beside(steps: int) -> tuple[Setting, Setting]:
    """The paper's `em` and `ancestral`, as many steps."""
    em = Setting(t0=BASE.t0, steps=steps, sampler="em")
    return em, replace(em, sampler="ancestral")


def parts() -> dict[str, list[Setting]]:
    """What is drawn, most telling first; settings that two parts share are made once."""
    return {
        "t0": [replace(BASE, t0=t0) for t0 in T0S],
        "colors": [replace(BASE, colors=colors) for colors in COLORS],
        "repeats": [replace(BASE, repeats=repeats) for repeats in REPEATS],
        "sampling": [SAMPLING],
        "samplers": [setting for steps in STEPS for setting in beside(steps)],
    }


class Study:
    """The measures of every setting, from what the cache holds and what is made now."""

    def __init__(self, cache: Cache, guides: Guides, features: Features) -> None:
        self.cache, self.guides, self.features = cache, guides, features

    def make(self, end: float | None) -> None:
        """What is not there yet, most telling first, until the end."""
        work = self.features.begin(self.guides.held_out)
        for colors in COLORS:
            work += self.features.begin(self.cache.painted(self.guides, colors))
        todo = list(dict.fromkeys(setting for settings in parts().values() for setting in settings))
        for number, setting in enumerate(samples.made(self.cache, todo, self.guides, until=end), start=1):
            work += self.features.begin(samples.results(self.cache, setting, self.guides))
            print(f"{number} of {len(todo)} settings: {setting.name}", file=sys.stderr, flush=True)
        samples.finish(work)

    def has(self, setting: Setting) -> bool:
        """Whether its results and their features are there."""
        if self.cache.missing(setting, self.guides):
            return False
        return self.features.has(samples.results(self.cache, setting, self.guides))

    @cached_property
    def beside_real(self) -> gram.Beside:
        """The kernels of results beside the photographs."""
        return gram.Beside(self.features(self.guides.held_out))

    def row(self, setting: Setting) -> dict[str, Any]:
        """KID to the real photographs, L2 to the guides."""
        made = samples.results(self.cache, setting, self.guides)
        l2 = _l2(self.cache.painted(self.guides, setting.colors), made)
        return asdict(setting) | self._kid(self.features(made)) | l2

    def guide_row(self, colors: int) -> dict[str, Any]:
        """The stroke paintings themselves: where t0 = 0 is."""
        return {"colors": colors} | self._kid(self.features(self.cache.painted(self.guides, colors)))

    def difference(self, one: Setting, other: Setting) -> dict[str, Any]:
        """KID of `one` less KID of `other`, over the same subsets."""
        rows = [self.features(samples.results(self.cache, setting, self.guides)) for setting in (one, other)]
        kid = gram.kid_difference(*map(self.beside_real, rows), subset_size=SUBSET_SIZE, subsets=SUBSETS)
        return {"one": asdict(one), "other": asdict(other), "kid": kid.value, "kid_se": kid.standard_error}

    def _kid(self, rows: Rows) -> dict[str, float]:
        kid = gram.kid(self.beside_real(rows), subset_size=SUBSET_SIZE, subsets=SUBSETS)
        return {"kid": kid.value, "kid_se": kid.standard_error}


def _l2(guides: samples.Pictures, made: samples.Pictures) -> dict[str, float]:
    each = sdedit.l2(guides, made)
    return {"l2": float(each.mean()), "l2_se": float(each.std(ddof=1) / np.sqrt(len(each)))}


def conditions(study: Study) -> dict[str, Any]:
    """What the numbers were made with."""
    network = study.features
    return {
        **study.cache.claim(study.guides),
        "guides": study.guides.count,
        "real": len(study.guides.held_out),
        "seeds": "guide's index, run a",
        "base": asdict(BASE),
        "features": {"name": network.path.name, "sha256": network.sha256, "input": "299 pixels, (pixel - 128) / 128"},
        "kid": {"subset_size": SUBSET_SIZE, "subsets": SUBSETS, "standard_error": "see sdedit.kid"},
        "l2": "of pixels in [0, 1], mean over guides and its standard error",
    }


def report(study: Study) -> dict[str, Any]:
    """What is measured of the settings that are finished."""
    rows = {
        setting: study.row(setting)
        for setting in dict.fromkeys(setting for settings in parts().values() for setting in settings)
        if study.has(setting)
    }
    pairs = [beside(steps) for steps in STEPS]
    return {
        "conditions": conditions(study),
        "guide": [study.guide_row(colors) for colors in COLORS],
        **{name: [rows[one] for one in settings if one in rows] for name, settings in parts().items()},
        "differences": [study.difference(*pair) for pair in pairs if set(pair) <= rows.keys()],
    }


def show(study: Study, folder: Path) -> None:
    """The sheets of pictures whose settings are finished."""

    def made(setting: Setting) -> samples.Pictures:
        return samples.results(study.cache, setting, study.guides)

    settings = {t0: replace(BASE, t0=t0) for t0 in trade_off_report.SHOWN_T0S}
    by_t0 = {t0: made(setting) for t0, setting in settings.items() if study.has(setting)}
    trade_off_report.show(study.guides.photos, study.cache.painted(study.guides), by_t0, folder)
    if study.has(SAMPLING):
        trade_off_report.show_samples(made(SAMPLING), folder)


def write(found: dict[str, Any], folder: Path) -> None:
    (folder / "trade_off.json").write_text(json.dumps(found, indent=1) + "\n")
    trade_off_report.draw(found, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description="Realism against faithfulness.")
    samples.add_arguments(parser)
    parser.set_defaults(guides=300, draw=trade_off_report.draw)
    arguments = parser.parse_args()
    end = samples.until(arguments)
    cache, guides = samples.opened(arguments)
    study = Study(cache, guides, Features(cache, arguments.features, arguments.feature_workers))
    if not arguments.report:
        study.make(end)
    found = report(study)
    write(found, arguments.output)
    show(study, arguments.output)
    if not arguments.report or masked.kept(cache, guides, BASE).exists():
        found["masked"] = masked.measure(cache, guides, BASE)
    t0s = [setting for setting in parts()["t0"] if not arguments.report or bound.kept(cache, setting).exists()]
    found["bound"] = [bound.measure(cache, guides, setting) for setting in t0s]
    write(found, arguments.output)


if __name__ == "__main__":
    program(main)
