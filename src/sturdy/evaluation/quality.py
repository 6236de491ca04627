"""The first sections of a report: samples to look at, and their distance to real images."""

from collections.abc import Mapping, Sequence, Sized

import torch
from torch import Tensor

from exact_resume.randomness import generator
from sturdy.encoders.images import ImageSet, scaled
from sturdy.evaluation.audit import share_by_class
from sturdy.evaluation.distances import frechet, kid, manifold
from sturdy.evaluation.features import EfficientNet, Features
from sturdy.evaluation.reference import ReferenceImages
from sturdy.evaluation.report import Report, percent
from sturdy.progress import ProgressPrinter
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
    features: Features,
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
        features: those that the images have.
        samples: the images that were drawn.
        train: the training images.
        held_out: the held-out images.
        classes: their names; empty for none.
    """
    stand_ins, rest = _stand_ins(samples, train)
    n = len(stand_ins)
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
            numbers[column], inside[column] = _measure(
                features.distance, real.features, fakes.features
            )
    sizes = {"n": n, "training": len(rest), "held_out": len(held_out)}
    report.numbers["quality"] = {**sizes, **numbers}
    table = _add_table(report, features, n, numbers)
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


def second_quality_section(
    report: Report, features: EfficientNet, samples: Tensor, reference: ReferenceImages
) -> str:
    """Add the distances to the held-out images in features of ImageNet; return the table.

    The other training images are not compared with: features of so many take minutes.

    Args:
        report: gets the table.
        features: are prepared here.
        samples: the images that were drawn, uint8 ``(n, 3, h, w)``.
        reference: the real images.
    """
    key = reference.cache_key
    folder = reference.cache_folder
    features.prepare()
    stand_ins, _ = _stand_ins(samples, reference.train)
    n = len(stand_ins)

    def extract_cached(images: ImageSet, which: str) -> Tensor:
        tell = ProgressPrinter(f"{features.name} features of {which} images")
        return features.extract_cached(images.pixels, data=(*key, which), folder=folder, tell=tell)

    real = extract_cached(reference.held_out, "held-out")
    floor = extract_cached(stand_ins, f"{n} stand-in")
    tell = ProgressPrinter(f"{features.name} features of samples")
    numbers = {
        "held_out_samples": _measure(
            features.distance, real, features.extract(samples[:n], tell=tell)
        )[0],
        "held_out_floor": _measure(features.distance, real, floor)[0],
    }
    report.numbers[f"quality_{features.name}"] = {"n": n, "held_out": len(real), **numbers}
    return _add_table(report, features, n, numbers)


def _stand_ins(samples: Sized, train: ImageSet) -> tuple[ImageSet, ImageSet]:
    """Split ``train`` into images in the place of samples, as many as these, and the others."""
    n = min(len(samples), len(train) // 2)
    order = torch.randperm(len(train), generator=generator("stand-ins"))
    return train[order[:n]], train[order[n:]]


def _add_table(
    report: Report, features: Features, n: int, numbers: Mapping[str, Mapping[str, float]]
) -> str:
    """Add what ``features`` see, and ``numbers`` by column; return both."""
    columns = {name: title for name, title in COLUMNS.items() if name in numbers}
    rows = []
    for template, meaning in MEANING.items():
        measure = template.format(fd=features.distance)
        values = [_format(numbers[name], measure) for name in columns]
        rows.append([measure, *values, meaning])
    sees = f"In the features `{features.name}`. {features.sees}".strip()
    report.text(sees)
    table = report.table([f"n = {n:,}", *columns.values(), "what it means"], rows)
    return f"{sees}\n{table}"


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
