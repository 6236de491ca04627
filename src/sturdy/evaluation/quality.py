"""The first sections of a report: samples to look at, and how far they are from the real ones."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from exact_resume.randomness import generator
from sturdy.encoders.pictures import ImageSet, scaled
from sturdy.evaluation.audit import by_class
from sturdy.evaluation.distances import frechet, kid, manifold
from sturdy.evaluation.report import Report, percent
from sturdy.sampling.grids import grid

MEANING = {
    "kid": "how different; 0 is not at all; ± its standard error",
    "{fd}": "how different, by mean and covariance; the fewer pictures, the larger",
    "precision": "share of samples that look real",
    "recall": "share of real images that samples come near to",
    "density": "as precision, outliers counting less; 1 is as good as real",
    "coverage": "as recall, outliers counting less",
}


def overview(report: Report, samples: ImageSet) -> None:
    """The first samples, class by class."""
    shown = samples[:64]
    order = slice(None) if shown.labels is None else shown.labels.argsort(stable=True)
    picture = grid(scaled(shown[order].pixels), columns=16)
    report.picture(
        "samples.png", picture, f"The first {len(shown)} samples, not chosen, class by class"
    )


def quality(
    report: Report,
    fd: str,
    samples: ImageSet,
    train: ImageSet,
    held_out: ImageSet,
    classes: Sequence[str],
) -> str:
    """Distances and shares, against training and held-out images; returns the table.

    Real training images stand in for samples to give the floor: as many, and not among those
        compared with.

    Args:
        fd: what the Fréchet distance is called in these features.
        classes: their names; none where there are none.
    """
    n = min(len(samples), len(train) // 2)
    order = torch.randperm(len(train), generator=generator("stand-ins"))
    stand_ins, rest = train[order[:n]], train[order[n:]]
    report.heading("Quality")
    report.text(
        f"{n:,} samples against {len(rest):,} training and {len(held_out):,} held-out images. The "
        f"*floor* is the same "
        f"measurement with {n:,} other real training images in the place of samples: nothing "
        f"better can be expected. "
        f"Figures of another n, or in other features, cannot be compared."
    )
    numbers: dict[str, dict[str, float]] = {}
    inside: dict[str, Tensor] = {}
    for of, fakes in (("samples", samples[:n]), ("floor", stand_ins)):
        for against, real in (("training", rest), ("held_out", held_out)):
            found, (mmd, error) = (
                manifold(real.features, fakes.features),
                kid(real.features, fakes.features),
            )
            shares = {
                name: getattr(found, name)
                for name in ("precision", "recall", "density", "coverage")
            }
            distance = frechet(real.features, fakes.features)
            numbers[f"{against}_{of}"] = {"kid": mmd, "kid_error": error, fd: distance, **shares}
            inside[f"{against}_{of}"] = found.inside
    report.numbers["quality"] = {
        "n": n,
        "training": len(rest),
        "held_out": len(held_out),
        **numbers,
    }
    columns = ("training_samples", "training_floor", "held_out_samples", "held_out_floor")
    rows = []
    for template, meaning in MEANING.items():
        name = template.format(fd=fd)
        rows.append([name, *(_figure(numbers[column], name) for column in columns), meaning])
    table = report.table(
        [f"n = {n:,}", "vs training", "floor", "vs held-out", "floor", "what it means"], rows
    )
    if classes and samples.labels is not None and stand_ins.labels is not None:
        found_in = by_class(inside["training_samples"], samples.labels[:n], len(classes))
        floors = by_class(inside["training_floor"], stand_ins.labels, len(classes))
        counts = torch.bincount(samples.labels[:n], minlength=len(classes)).tolist()
        report.numbers["precision_by_class"] = dict(zip(classes, found_in, strict=True))
        report.text("Precision of each class against the training images:")
        each = zip(classes, counts, found_in, floors, strict=True)
        report.table(
            ["class", "n", "precision", "floor"],
            [[name, str(c), percent(p), percent(f)] for name, c, p, f in each],
        )
    return table


def _figure(numbers: Mapping[str, float], name: str) -> str:
    return (
        f"{numbers[name]:.4f} ± {numbers['kid_error']:.4f}"
        if name == "kid"
        else f"{numbers[name]:.3f}"
    )
