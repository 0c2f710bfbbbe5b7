"""How many steps an edit needs: realism and faithfulness by sampler, spacing and steps, beside em at 500 steps.

python benchmarks/few_steps.py EuroSAT_RGB.zip --cache DIR --features INCEPTION.pt [--guides 1000] [--report]

INCEPTION.pt: FID's Inception as TorchScript, not part of this repository. Hours of work, the settings of most interest
first; stopped at any time, the same command goes on. --report makes nothing new: it measures what is there and writes
results/few_steps.json and results/few_steps.png.
"""

import argparse
import hashlib
import json
import platform
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from samples import CHUNK, Cache, Guides, Pictures, Setting, add_arguments, opened, results, save, workers

import sdedit

T0 = 0.5
STEPS = (5, 10, 15, 20, 25, 35, 50)
MOST_EVALUATIONS = 25  # of a default worth proposing
SUBSETS = 100
REFERENCE = Setting(T0, 500, "em")
AGAIN = replace(REFERENCE, run="b")  # the same with other noise: how far chance alone goes

Features = NDArray[np.float32]  # (N, 2048)


def settings() -> list[Setting]:
    """All of the study, in the order of what is learnt from them."""
    grid = [
        Setting(T0, n, sampler, spacing) for n in STEPS for sampler in sdedit.SAMPLERS for spacing in sdedit.SPACINGS
    ]
    finalists = [one for one in grid if one.steps in (20, 25) and one.sampler != "em"]
    finalists += [one for one in grid if (one.steps, one.sampler, one.spacing) == (25, "em", "uniform")]
    return [REFERENCE, *finalists, *(one for one in grid if one not in finalists), AGAIN]


class FeatureCache:
    """Features of pictures by their content, a chunk a file: computed once, in the processes of a cache."""

    def __init__(self, cache: Cache, network: Path) -> None:
        self._folder, self._network, self._workers = cache.folder / "features", network, cache.workers
        self.sha256 = hashlib.sha256(network.read_bytes()).hexdigest()
        self._folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, pictures: Pictures) -> Features:
        chunks = self._chunks(pictures)
        if missing := [(path, part) for path, part in chunks if not path.exists()]:
            with workers(self._workers, _open, self._network) as pool:
                list(pool.map(_extract, *zip(*missing, strict=True)))
        return np.concatenate([np.load(path) for path, _ in chunks])

    def has(self, pictures: Pictures) -> bool:
        """Whether none is left to compute."""
        return all(path.exists() for path, _ in self._chunks(pictures))

    def _chunks(self, pictures: Pictures) -> list[tuple[Path, Pictures]]:
        parts = [pictures[at : at + CHUNK] for at in range(0, len(pictures), CHUNK)]
        names = [hashlib.sha256(self.sha256.encode() + part.tobytes()).hexdigest() for part in parts]
        return [(self._folder / f"{name}.npy", part) for name, part in zip(names, parts, strict=True)]


_network: sdedit.FeatureNetwork  # of a worker process


def _open(path: Path) -> None:
    global _network
    import torch

    from sdedit.export.features import open_features

    torch.set_num_threads(1)
    _network = open_features(path)


def _extract(path: Path, pictures: Pictures) -> None:
    save(path, _network(pictures))


def measure(features: Features, reference: Features, real: Features, distances: NDArray[np.float64]) -> dict[str, Any]:
    """One setting's figures. features, reference: of the results of the same guides, this setting's and em-500's.

    Distances between distributions are of results of different guides, one half's against the other's: results of the
    same guide resemble each other, which would hide a difference.
    """
    half, size = len(features) // 2, len(features) // 4
    whole: dict[str, int] = {"subset_size": size, "subsets": SUBSETS}
    halves: dict[str, int] = {"subset_size": size // 2, "subsets": SUBSETS}
    ours, theirs, others = features[:half], reference[:half], reference[half:]
    l2_error = distances.std(ddof=1) / len(distances) ** 0.5
    return {
        "kid": figures(sdedit.kid(features, real, **whole)),
        "kid_minus_em500": figures(sdedit.kid_difference(features, reference, real, **whole)),
        "to_em500": figures(sdedit.kid(ours, others, **halves)),
        "to_em500_minus_em500": figures(sdedit.kid_difference(ours, theirs, others, **halves)),
        "l2": {"value": float(distances.mean()), "standard_error": float(l2_error)},
    }


def figures(measured: sdedit.Kid) -> dict[str, float]:
    return {"value": measured.value, "standard_error": measured.standard_error}


def make(cache: Cache, guides: Guides, features: FeatureCache) -> None:
    """Everything that is not there yet."""
    features(guides.held_out)
    todo = settings()
    for number, setting in enumerate(todo):
        features(results(cache, setting, guides))
        print(f"{number + 1} of {len(todo)} settings: {setting.name}", file=sys.stderr, flush=True)


def report(cache: Cache, guides: Guides, features: FeatureCache) -> dict[str, Any]:
    """The figures of every setting that is finished, and what they were made with."""
    made = [one for one in settings() if not cache.missing(one, guides)]
    done = [one for one in made if features.has(results(cache, one, guides))]
    if REFERENCE not in done:
        raise sdedit.OptionError(
            f"{REFERENCE.name} is not finished: there is nothing to compare with", hint="leave --report out to make it"
        )
    real, painted = features(guides.held_out), guides.painted()
    reference = features(results(cache, REFERENCE, guides))
    rows = []
    for setting in done:
        pictures = results(cache, setting, guides)
        distances = sdedit.l2(painted, pictures)
        rows.append(asdict(setting) | measure(features(pictures), reference, real, distances))
        say(rows[-1])
    return {
        "conditions": {
            **cache.claim(guides),
            "machine": platform.machine(),
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
    proposed = row["steps"] <= MOST_EVALUATIONS and difference["value"] <= 2 * difference["standard_error"]
    print(
        f"{row['sampler']:<13}{row['spacing']:<10}{row['steps']:>4} {row['run']}  KID {shown('kid')}"
        f"  over em-500's {shown('kid_minus_em500')}  to em-500 {shown('to_em500')}"
        f"  over em-500's {shown('to_em500_minus_em500')}  L2 {shown('l2', 1)}{'  *' if proposed else ''}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="How many steps an edit needs.")
    add_arguments(parser)
    parser.add_argument("--features", type=Path, required=True, metavar="FILE", help="FID's Inception as TorchScript")
    parser.add_argument("--report", action="store_true", help="make nothing new: measure, write data and plot")
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).parent / "results", metavar="DIR")
    arguments = parser.parse_args()
    from few_steps_plot import draw  # here: the worker processes import this file, and need no matplotlib

    cache, guides = opened(arguments)
    features = FeatureCache(cache, arguments.features)
    if not arguments.report:
        make(cache, guides, features)
    study = report(cache, guides, features)
    (arguments.output / "few_steps.json").write_text(json.dumps(study, indent=1) + "\n")
    draw(study, arguments.output / "few_steps.png")
    print(
        f"{study['done']} of {study['of']} settings; *: at most {MOST_EVALUATIONS} evaluations, and KID at most two "
        "paired standard errors over em-500's"
    )


if __name__ == "__main__":
    try:
        main()
    except sdedit.SdeditError as error:
        sys.exit(f"error: {error}\nhint: {error.hint}")
