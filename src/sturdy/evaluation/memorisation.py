"""Are samples copies? The nearest training image of each sample and of each held-out image.

    d(x) = min over training images y of |x - y|

Held-out images are as new as an image can be. Samples that are systematically nearer to the
training images than these are copied from them.
"""

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from exact_resume.randomness import generator
from sturdy.encoders.images import ImageSet, scaled
from sturdy.evaluation.figures import image_table
from sturdy.evaluation.report import Report, percent

EXPLANATION = (
    "The distance of each sample to its nearest training image, against that of held-out images, "
    "which cannot be copies. A *copy* is as near as only 1 of 100 held-out images is, so 1 % is "
    "chance. *Nearer* is the chance that a sample is nearer to the training images than a held-out "
    "image is: 50 % if nothing is copied, and z below -3 is no accident (but blurred images do "
    "that, too). The *control* are training images with noise of 4 grey levels: all of them must "
    "count as copies. Distances in pixels are RMS differences in grey levels."
)
CONTROL_IMAGES = 200
CONTROL_NOISE = 4  # grey levels
N_EXAMPLES = 12


@dataclass(frozen=True)
class CopyStats:
    """The distances of samples to their nearest training image, compared with held-out images.

    Attributes:
        median: of the samples' distances.
        baseline_median: of the held-out images' distances.
        limit: 99 of 100 held-out images are farther away; a sample below it counts as a copy.
        copies: share of such samples.
        expected: share of such held-out images.
        nearer: chance that a sample is nearer than a held-out image.
        z: of the Mann-Whitney test of the same, the data-copying test of Meehan et al. 2020;
            negative is nearer.
    """

    median: float
    baseline_median: float
    limit: float
    copies: float
    expected: float
    nearer: float
    z: float


def copy_stats(samples: Tensor, held_out: Tensor) -> CopyStats:
    """Compare distances to the nearest training image, ``(n,)`` and ``(m,)``."""
    n = len(samples)
    m = len(held_out)
    limit = held_out.quantile(0.01).item()
    ordered = held_out.sort().values
    below = torch.searchsorted(ordered, samples, right=False).double()
    up_to = torch.searchsorted(ordered, samples, right=True).double()
    nearer = 1 - ((below + up_to) / 2 / m).mean().item()  # ties count half
    return CopyStats(
        median=samples.median().item(),
        baseline_median=held_out.median().item(),
        limit=limit,
        copies=(samples < limit).double().mean().item(),
        expected=(held_out < limit).double().mean().item(),
        nearer=nearer,
        z=(0.5 - nearer) * math.sqrt(12 * n * m / (n + m + 1)),
    )


def nearest(points: Tensor, others: Tensor, *, chunk: int = 250) -> tuple[Tensor, Tensor]:
    """Find the nearest of ``others`` ``(m, d)`` to each of ``points`` ``(n, d)``.

    Returns:
        its distance and its index, ``(n,)`` each.
    """
    centre = others.mean(0)
    others = others - centre
    squares = others.square().sum(1)
    distances, indices = [], []
    for part in (points - centre).split(chunk):
        index = torch.addmm(squares[None], part, others.T, alpha=-2).argmin(1)
        indices.append(index)
        # Once more and directly, so that equal images are at exactly 0.
        distances.append((part - others[index]).square().sum(1).sqrt())
    return torch.cat(distances), torch.cat(indices)


def as_grey_levels(pixels: Tensor) -> Tensor:
    """Flatten uint8 ``(n, c, h, w)`` such that distances are RMS differences in grey levels."""
    flat = pixels.flatten(1).float()
    return flat / math.sqrt(flat.shape[1])


def memorisation_section(
    report: Report, samples: ImageSet, train: ImageSet, held_out: ImageSet, *, mirrored: bool
) -> None:
    """Add a section on the nearest training images, in pixels and in features.

    Args:
        report: gets the section.
        samples: the images that were drawn.
        train: the training images.
        held_out: the held-out images.
        mirrored: whether training images were also shown mirrored, so that a copy in pixels may be
            a mirror image.
    """
    report.heading("Is anything memorised?")
    report.text(EXPLANATION)
    shown = torch.cat([train.pixels, train.pixels.flip(-1)]) if mirrored else train.pixels
    shown_levels = as_grey_levels(shown)
    points = {
        "pixels": (as_grey_levels(samples.pixels), shown_levels, as_grey_levels(held_out.pixels)),
        "features": (samples.features, train.features, held_out.features),
    }
    stats: dict[str, CopyStats] = {}
    neighbours: dict[str, tuple[Tensor, Tensor]] = {}
    for kind, (of_samples, of_train, of_held_out) in points.items():
        distances, indices = nearest(of_samples, of_train)
        baseline, _ = nearest(of_held_out, of_train)
        stats[kind] = copy_stats(distances, baseline)
        neighbours[kind] = distances, indices % len(train)
        report.numbers[f"memorisation_{kind}"] = asdict(stats[kind])
    control, _ = nearest(as_grey_levels(_noisy(train.pixels[:CONTROL_IMAGES])), shown_levels)
    control_rate = (control < stats["pixels"].limit).double().mean().item()
    report.numbers["memorisation_pixels"]["control"] = control_rate
    head = ["", "median distance", "held-out", "copies", "held-out", "nearer", "z", "control"]
    rows = []
    for kind, s in stats.items():
        medians = [f"{s.median:.3g}", f"{s.baseline_median:.3g}"]
        shares = [percent(share) for share in (s.copies, s.expected, s.nearer)]
        last = percent(control_rate) if kind == "pixels" else "–"
        rows.append([kind, *medians, *shares, f"{s.z:.1f}", last])
    report.table(head, rows)
    _closest(report, samples, train, neighbours)
    shares = [
        f"{percent(s.copies)} in {kind} (held-out images: {percent(s.expected)})"
        for kind, s in stats.items()
    ]
    report.verdicts.append(f"copies: {', '.join(shares)}")


def _noisy(pixels: Tensor) -> Tensor:
    images = pixels.float()
    noise = torch.randn(images.shape, generator=generator("control"))
    return (images + CONTROL_NOISE * noise).round().clamp(0, 255).to(torch.uint8)


def _closest(
    report: Report,
    samples: ImageSet,
    train: ImageSet,
    neighbours: dict[str, tuple[Tensor, Tensor]],
) -> None:
    distances, _ = neighbours["pixels"]
    closest = distances.argsort()[:N_EXAMPLES]
    rows = [samples.pixels[closest]]
    names = ["sample"]
    for kind, (_, indices) in neighbours.items():
        rows.append(train.pixels[indices[closest]])
        names.append(f"in {kind}")
    figure = image_table(
        scaled(torch.stack(rows)),
        columns=[f"{distance:.1f}" for distance in distances[closest].tolist()],
        rows=names,
    )
    report.figure(
        "closest.png",
        figure,
        "The samples nearest to a training image in pixels, with that distance; below each that "
        "image, and the one nearest in features",
    )
