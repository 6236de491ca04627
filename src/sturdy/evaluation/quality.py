"""The first sections of a report: samples to look at, and their distance to real images."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from exact_resume.randomness import generator
from sturdy.encoders.images import ImageSet, scaled
from sturdy.evaluation.audit import share_by_class
from sturdy.evaluation.distances import frechet, kid, manifold
from sturdy.evaluation.report import Report, percent
from sturdy.sampling.grids import grid

MEANING = {
    "kid": "how different; 0 is not at all; ± its standard error",
    "{fd}": "how different, by mean and covariance; the fewer images, the larger",
    "precision": "share of samples that look real",
    "recall": "share of real images that samples come near to",
    "density": "as precision, outliers counting less; 1 is as good as real",
    "coverage": "as recall, outliers counting less",
}
COLUMNS = {
    "training_samples": "vs training",
    "training_floor": "floor",
    "held_out_samples": "vs held-out",
    "held_out_floor": "floor",
}
SHOWN = 64


def samples_section(report: Report, samples: ImageSet) -> None:
    """Add the first samples, class by class."""
    shown = samples[:SHOWN]
    if shown.labels is not None:
        shown = shown[shown.labels.argsort(stable=True)]
    caption = f"The first {len(shown)} samples, not chosen, class by class"
    report.image("samples.png", grid(scaled(shown.pixels), columns=16), caption)


def quality_section(
    report: Report,
    fd: str,
    samples: ImageSet,
    train: ImageSet,
    held_out: ImageSet,
    classes: Sequence[str],
) -> str:
    """Add distances and shares, against training and held-out images; return the table.

    The floor is the same measurement of real training images in the place of samples: as many of
    them, and not among those compared with.

    Args:
        report: gets the section.
        fd: the name of the Fréchet distance in these features.
        samples: the images that were drawn.
        train: the training images.
        held_out: the held-out images.
        classes: their names; empty for none.
    """
    n = min(len(samples), len(train) // 2)
    order = torch.randperm(len(train), generator=generator("stand-ins"))
    stand_ins = train[order[:n]]
    rest = train[order[n:]]
    samples = samples[:n]
    report.heading("Quality")
    report.text(
        f"{n:,} samples against {len(rest):,} training and {len(held_out):,} held-out images. The "
        f"*floor* is the same measurement with {n:,} other real training images in the place of "
        f"samples: nothing better can be expected. Numbers of another n, or in other features, "
        f"cannot be compared."
    )
    numbers: dict[str, dict[str, float]] = {}
    inside: dict[str, Tensor] = {}
    for name, fakes in (("samples", samples), ("floor", stand_ins)):
        for against, real in (("training", rest), ("held_out", held_out)):
            column = f"{against}_{name}"
            numbers[column], inside[column] = _measure(fd, real.features, fakes.features)
    sizes = {"n": n, "training": len(rest), "held_out": len(held_out)}
    report.numbers["quality"] = {**sizes, **numbers}
    rows = []
    for template, meaning in MEANING.items():
        measure = template.format(fd=fd)
        values = [_format(numbers[column], measure) for column in COLUMNS]
        rows.append([measure, *values, meaning])
    table = report.table([f"n = {n:,}", *COLUMNS.values(), "what it means"], rows)
    if classes and samples.labels is not None and stand_ins.labels is not None:
        precision = share_by_class(inside["training_samples"], samples.labels, len(classes))
        floor = share_by_class(inside["training_floor"], stand_ins.labels, len(classes))
        counts = torch.bincount(samples.labels, minlength=len(classes)).tolist()
        report.numbers["precision_by_class"] = dict(zip(classes, precision, strict=True))
        report.text("Precision of each class against the training images:")
        rows = []
        for name, count, share, limit in zip(classes, counts, precision, floor, strict=True):
            rows.append([name, str(count), percent(share), percent(limit)])
        report.table(["class", "n", "precision", "floor"], rows)
    return table


def _measure(fd: str, real: Tensor, fakes: Tensor) -> tuple[dict[str, float], Tensor]:
    """Return all measures by name, and which of ``fakes`` count for precision, ``(n,)``."""
    found = manifold(real, fakes)
    mmd, error = kid(real, fakes)
    numbers = {
        "kid": mmd,
        "kid_error": error,
        fd: frechet(real, fakes),
        "precision": found.precision,
        "recall": found.recall,
        "density": found.density,
        "coverage": found.coverage,
    }
    return numbers, found.inside


def _format(numbers: Mapping[str, float], name: str) -> str:
    if name == "kid":
        return f"{numbers['kid']:.4f} ± {numbers['kid_error']:.4f}"
    return f"{numbers[name]:.3f}"
