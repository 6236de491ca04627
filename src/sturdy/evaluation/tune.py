"""A run's recipes, every EMA length x guidance x steps, and the best of them made its own.

All draw the same pictures: from the same noise, of the same classes. Those whose KID against
    held-out images is not
above the lowest by more than the error of that difference are level, and the best of them asks the
network least.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, cast

import torch
from omegaconf import DictConfig, ListConfig
from torch import Tensor

from exact_resume.randomness import Draws
from sturdy.diffusion.denoiser import Denoiser
from sturdy.diffusion.sampler import sample
from sturdy.encoders.network import answer
from sturdy.encoders.pictures import ImageSet
from sturdy.evaluation.audit import accuracy
from sturdy.evaluation.distances import kid, manifold
from sturdy.evaluation.evaluate import LoadedRun, check
from sturdy.evaluation.features import Embedded
from sturdy.evaluation.report import percent
from sturdy.sampling.config import SamplingConfig, labels_for
from sturdy.sampling.loaded_run import run_job
from sturdy.trust import Trust

SWEPT: dict[str, tuple[Any, str]] = {
    "scales": (int | float, "numbers, such as [1,1.5,2]"),
    "steps": (int, "whole numbers, such as [8,15]"),
    "ema": (int | float | None, "lengths, such as [0.05,0.1], or null for the run's own"),
}
COLUMNS = {
    "EMA": 6,
    "guidance": 9,
    "steps": 6,
    "calls": 6,
    "KID": 18,
    "recall": 8,
    "coverage": 9,
    "class accuracy": 15,
}


@dataclass(frozen=True)
class Figures:
    """Of samples against held-out images.

    Attributes:
        kids: in random halves of both ``(k,)``, the same halves for every recipe.
        accuracy: None where no network names their class.
    """

    kids: Tensor
    recall: float
    coverage: float
    accuracy: float | None

    @property
    def kid(self) -> float:
        return self.kids.mean().item()

    @property
    def error(self) -> float:
        """As of ``kid`` in ``distances``."""
        return self.kids.std(correction=0).item()

    def cells(self) -> list[str]:
        shares = [percent(share) for share in (self.recall, self.coverage)]
        return [
            f"{self.kid:.4f} ± {self.error:.4f}",
            *shares,
            "" if self.accuracy is None else percent(self.accuracy),
        ]


@dataclass(frozen=True)
class Trial:
    """A recipe, how often it asks the network for a picture, and what came of it."""

    recipe: SamplingConfig
    calls: int
    figures: Figures


def tune(cfg: DictConfig, overrides: list[str]) -> int:
    """Write the run's ``sampling.yaml``; returns the exit code."""
    return run_job(try_all, cfg)


def try_all(cfg: DictConfig) -> None:
    """Try all recipes, print what comes of each, and write the best.

    Raises:
        ValueError, OSError, Refused, NothingVerifies, InstantiationException: with what to do;
            nothing was written.
    """
    options = check(cfg.tune, "tune")
    for name, (kind, such_as) in SWEPT.items():
        values = options[name]
        if (
            not isinstance(values, ListConfig)
            or not values
            or not all(isinstance(v, kind) for v in values)
        ):
            raise ValueError(f"tune.{name}={values} must be a list of {such_as}")
    subject = LoadedRun(cfg, options.most)
    labels = labels_for(options.labels, subject.train.labels, len(subject.data.classes), options.n)
    base = subject.recipe(
        cfg, None
    )  # not as an earlier tune found it: that would depend on the order
    scales = options.scales if base.guides(labels) else [None]
    recipes = [
        base.varied(steps=steps, scale=scale, ema=ema, origin="one of those that tune.* names")
        for ema, scale, steps in product(options.ema, scales, options.steps)
    ]
    networks = {
        ema: recipe.network(subject.module, subject.entry)
        for ema, recipe in {r.ema: r for r in recipes}.items()
    }
    costs = [calls(recipe, networks[recipe.ema], labels) for recipe in recipes]

    print(f"{len(recipes)} recipes like {base}, each in {options.n:,} pictures", flush=True)
    print(row(COLUMNS))
    real = figures(subject, subject.train[: options.n])
    print(row(["real", "images", "", "", *real.cells()]), flush=True)
    trials = []
    for recipe, cost in zip(recipes, costs, strict=True):
        trial = Trial(
            recipe,
            cost,
            figures(subject, subject.draw(recipe, networks[recipe.ema], labels, options)),
        )
        trials.append(trial)
        print(row([*_names(recipe, labels), str(cost), *trial.figures.cells()]), flush=True)

    won = best(trials)
    said = (
        f"tune.py: KID {won.figures.kid:.4f} ± {won.figures.error:.4f} with {won.calls} network "
        f"calls, best of "
        f"{len(trials)} recipes at step {subject.entry.step:,}, {options.n:,} pictures of seed "
        f"{options.seed} "
        f"against {len(subject.held_out):,} held-out images in {subject.features.name} features"
    )
    path = won.recipe.write(subject.run, said)
    print(
        f"best: {won.recipe.how(labels)}; it is in {path}, which sample.py and evaluate.py follow"
    )
    try:
        Trust(runs=cfg.paths.runs).check_recipe(path, {"sampler": won.recipe.given}, ["sampler"])
    except (
        ValueError
    ) as refusal:  # a sampler that was typed, and that the run's training has not named
        print(f"without a word they will say: {refusal}")


def best(trials: Sequence[Trial]) -> Trial:
    """The cheapest of those that are level with the lowest KID, and of equally cheap ones that of
    the lower KID.

    The halves being the same, what moves all alike drops out of the difference: its error is less
        than the figures'.
    """
    lowest = min((trial.figures for trial in trials), key=lambda found: found.kid)
    above = [trial.figures.kids - lowest.kids for trial in trials]
    level = [
        trial
        for trial, gap in zip(trials, above, strict=True)
        if gap.mean() <= gap.std(correction=0)
    ]
    return min(level, key=lambda trial: (trial.calls, trial.figures.kid))


def figures(subject: LoadedRun, samples: ImageSet) -> Figures:
    """How near ``samples`` are to the held-out images."""
    real, features = subject.held_out.features, subject.features
    kids = torch.tensor(
        [kid(real, samples.features, subsets=1, seed=half)[0] for half in range(20)]
    )
    found, right = manifold(real, samples.features), None
    if (
        samples.labels is not None
        and isinstance(features, Embedded)
        and len(subject.data.classes) > 1
    ):
        right = accuracy(answer(features.network, samples.pixels)["class"], samples.labels)
    return Figures(kids, found.recall, found.coverage, right)


class Counter:
    """In a denoiser's place, it counts the pictures it is asked about."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.schedule, self.num_classes, self.calls = denoiser.schedule, denoiser.num_classes, 0

    def __call__(self, x_t: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        self.calls += len(x_t)
        return x_t


def calls(recipe: SamplingConfig, denoiser: Denoiser, labels: Tensor | None) -> int:
    """How often ``recipe`` asks the network for one picture."""
    counter = Counter(denoiser)
    network, label = cast(Denoiser, counter), None if labels is None else labels[:1]
    guided = recipe.guided(network, labels, guide=network if recipe.guide else None)
    sample(recipe.sampler, guided, torch.ones(1, 3, 2, 2), label, Draws(0, range(1)))
    return counter.calls


def row(cells: Any) -> str:
    """A line of the table."""
    return " ".join(cell.rjust(width) for cell, width in zip(cells, COLUMNS.values(), strict=True))


def _names(recipe: SamplingConfig, labels: Tensor | None) -> list[str]:
    scale = f"{recipe.guidance['scale']:g}" if recipe.guides(labels) else "none"
    return ["own" if recipe.ema is None else f"{recipe.ema:g}", scale, str(recipe.sampler.steps)]
