"""Realism against faithfulness on photographs that the bundled model never saw: the paper's figure 3 and table 4, and
what repeats, samplers and steps change.

python benchmarks/trade_off.py EuroSAT_RGB.zip --cache DIR --features INCEPTION.pt [-o benchmarks/results]

Resumable: results and features are kept in DIR, and the report is written anew after every part. --no-new reports
what is there already.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import bound
import masked
import numpy as np
import samples
import trade_off_report
from measured import Features
from samples import Cache, Guides, Setting

import sdedit

BASE = Setting(t0=0.5, steps=30, sampler="ancestral")
T0S = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
COLORS = (3, 6, 16, 30, 50)  # the paper's table 4
REPEATS = (1, 2, 3)  # its K
SAMPLERS, STEPS = ("em", "ancestral"), (20, 30, 50, 100, 200, 500)
SUBSET_SIZE, SUBSETS = 100, 100


def parts() -> dict[str, list[Setting]]:
    """What is drawn, most telling first; settings that two parts share are made once."""
    return {
        "t0": [replace(BASE, t0=t0) for t0 in T0S],
        "colors": [replace(BASE, colors=colors) for colors in COLORS],
        "repeats": [replace(BASE, repeats=repeats) for repeats in REPEATS],
        "samplers": [replace(BASE, sampler=sampler, steps=steps) for steps in STEPS for sampler in SAMPLERS],
    }


class Study:
    """The measures of every setting, from what the cache holds and what is made now."""

    def __init__(self, cache: Cache, guides: Guides, features: Features) -> None:
        self.cache, self.guides, self.features = cache, guides, features
        self.real = features.of_real(guides)

    def row(self, setting: Setting) -> dict[str, Any]:
        """KID to the real photographs, L2 to the guides."""
        found = self._kid(self.features.of_results(setting, self.guides))
        made = samples.results(self.cache, setting, self.guides)
        return asdict(setting) | found | _l2(self.guides.painted(setting.colors), made)

    def guide_row(self, colors: int) -> dict[str, Any]:
        """The stroke paintings themselves: where t0 = 0 is."""
        return {"colors": colors} | self._kid(self.features.of_guides(self.guides, colors))

    def difference(self, one: Setting, other: Setting) -> dict[str, Any]:
        """KID of `one` less KID of `other`, over the same subsets."""
        rows = [self.features.of_results(setting, self.guides) for setting in (one, other)]
        kid = sdedit.kid_difference(*rows, self.real, subset_size=SUBSET_SIZE, subsets=SUBSETS)
        return {"one": asdict(one), "other": asdict(other), "kid": kid.value, "kid_se": kid.standard_error}

    def _kid(self, rows: Any) -> dict[str, float]:
        kid = sdedit.kid(rows, self.real, subset_size=SUBSET_SIZE, subsets=SUBSETS)
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
        "real": len(study.real),
        "seeds": "guide's index, run a",
        "features": {"name": network.path.name, "sha256": network.sha256, "input": "299 pixels, (pixel - 128) / 128"},
        "kid": {"subset_size": SUBSET_SIZE, "subsets": SUBSETS, "standard_error": "see sdedit.kid"},
        "l2": "of pixels in [0, 1], mean over guides and its standard error",
    }


def measure(study: Study, *, only_kept: bool) -> Iterator[dict[str, Any]]:
    """The whole report, after every part that has come to it. only_kept: leave out what is not in the cache."""
    report: dict[str, Any] = {"conditions": conditions(study)}

    def at_hand(setting: Setting) -> bool:
        return not only_kept or not study.cache.missing(setting, study.guides)

    report["masked"] = masked.measure(study.cache, study.guides, BASE)
    report["bound"] = [bound.measure(study.cache, study.guides, setting) for setting in parts()["t0"]]
    report["guide"] = [study.guide_row(colors) for colors in COLORS]
    for name, settings in parts().items():
        report[name] = []
        for setting in settings:
            if at_hand(setting):
                report[name].append(study.row(setting))
                print(f"{name}: {setting.name}", file=sys.stderr, flush=True)
        yield report
    pairs = [(replace(BASE, sampler="em", steps=steps), replace(BASE, steps=steps)) for steps in STEPS]
    report["differences"] = [study.difference(*pair) for pair in pairs if all(map(at_hand, pair))]
    yield report


def main() -> None:
    parser = argparse.ArgumentParser(description="Realism against faithfulness.")
    samples.add_arguments(parser)
    parser.set_defaults(guides=500)
    parser.add_argument(
        "--features", type=Path, required=True, metavar="FILE", help="FID's Inception: TorchScript or ONNX"
    )
    parser.add_argument("--no-new", action="store_true", help="report what the cache has, make no edits")
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).with_name("results"), metavar="DIR")
    arguments = parser.parse_args()
    cache, guides = samples.opened(arguments)
    study = Study(cache, guides, Features(cache, arguments.features))
    for report in measure(study, only_kept=arguments.no_new):
        (arguments.output / "trade_off.json").write_text(json.dumps(report, indent=1) + "\n")
        trade_off_report.draw(report, arguments.output)
    shown = [replace(BASE, t0=t0) for t0 in trade_off_report.SHOWN_T0S]
    if not any(cache.missing(setting, guides) for setting in shown):
        made = {setting.t0: samples.results(cache, setting, guides) for setting in shown}
        trade_off_report.show(guides, made, arguments.output)


if __name__ == "__main__":
    main()
