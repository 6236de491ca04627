"""Is what is generated copied? The nearest training image of each sample, against that of each
held-out image.

    d(x) = min over training images y of |x - y|

Held-out images are as new as a picture can be. Samples that are systematically nearer to the
training images than those are copied from them.
"""

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from exact_resume.randomness import generator
from sturdy.encoders.pictures import ImageSet, scaled
from sturdy.evaluation.report import Report, percent
from sturdy.sampling.grids import grid

EXPLANATION = (
    "The distance of each sample to its nearest training image, against that of held-out images, "
    "which cannot be "
    "copies. A *copy* is as near as only 1 of 100 held-out images is, so 1 % is chance. *Nearer* "
    "is the chance that a "
    "sample is nearer to the training images than a held-out image is: 50 % if nothing is copied, "
    "and z below -3 is no "
    "accident (but blurred pictures do that too). The *control* are training images with noise of "
    "4 grey levels: all "
    "must be called copies. Distances in pixels are RMS differences in grey levels."
)


@dataclass(frozen=True)
class CopyStats:
    """What the distances of samples say, held against those of held-out images.

    Attributes:
        median, usual: of the samples' and of the held-out images' distances.
        limit: what 99 of 100 held-out images keep; a sample below it is called a copy.
        copies, expected: share of such samples, and of such held-out images.
        nearer: chance that a sample is nearer than a held-out image.
        z: Mann-Whitney's of the same, the data-copying test of Meehan et al. 2020; negative is
            nearer.
    """

    median: float
    usual: float
    limit: float
    copies: float
    expected: float
    nearer: float
    z: float


def copying(samples: Tensor, held_out: Tensor) -> CopyStats:
    """Judge distances to the nearest training image, ``(n,)`` and ``(m,)``."""
    limit = held_out.quantile(0.01).item()
    ordered = held_out.sort().values
    ranks = [torch.searchsorted(ordered, samples, right=right).double() for right in (False, True)]
    n, m = len(samples), len(held_out)
    nearer = 1 - ((ranks[0] + ranks[1]) / 2 / m).mean().item()  # ties count half
    z = (0.5 - nearer) * math.sqrt(12 * n * m / (n + m + 1))
    copies, expected = (
        (distances < limit).double().mean().item() for distances in (samples, held_out)
    )
    return CopyStats(
        samples.median().item(), held_out.median().item(), limit, copies, expected, nearer, z
    )


def nearest(points: Tensor, others: Tensor, *, chunk: int = 250) -> tuple[Tensor, Tensor]:
    """Distance to the nearest of ``others`` ``(m, d)`` and which it is, ``(n,)`` each, of
    ``points`` ``(n, d)``.
    """
    centre = others.mean(0)
    others = others - centre
    squares, distances, indices = others.square().sum(1), [], []
    for part in (points - centre).split(chunk):
        index = torch.addmm(squares[None], part, others.T, alpha=-2).argmin(1)
        indices.append(index)
        distances.append(
            (part - others[index]).square().sum(1).sqrt()
        )  # again, for equal ones to be at exactly 0
    return torch.cat(distances), torch.cat(indices)


def levels(pixels: Tensor) -> Tensor:
    """uint8 ``(n, c, h, w)`` as ``(n, c h w)`` whose Euclidean distance is the RMS difference in
    grey levels.
    """
    flat = pixels.flatten(1).float()
    return flat / math.sqrt(flat.shape[1])


def memorisation(
    report: Report, samples: ImageSet, train: ImageSet, held_out: ImageSet, *, mirrored: bool
) -> str:
    """Nearest training images, in pixels and in features; returns the verdict.

    Args:
        mirrored: training images were also shown mirrored, so that a copy in pixels may be a mirror
            image.
    """
    report.heading("Is anything memorised?")
    report.text(EXPLANATION)
    some = train.pixels[:200].float()
    noisy = (
        (some + 4 * torch.randn(some.shape, generator=generator("control")))
        .round()
        .clamp(0, 255)
        .to(torch.uint8)
    )
    shown = torch.cat([train.pixels, train.pixels.flip(-1)]) if mirrored else train.pixels
    spaces = {
        "pixels": (levels(samples.pixels), levels(shown), levels(held_out.pixels)),
        "features": (samples.features, train.features, held_out.features),
    }
    rows, neighbours, found = [], [], {}
    for space, (points, others, new) in spaces.items():
        distances, indices = nearest(points, others)
        usual, _ = nearest(new, others)
        neighbours.append((distances, indices % len(train)))
        f = found[space] = copying(distances, usual)
        report.numbers[f"memorisation_{space}"] = asdict(f)
        shares = [percent(share) for share in (f.copies, f.expected, f.nearer)]
        rows.append([space, f"{f.median:.3g}", f"{f.usual:.3g}", *shares, f"{f.z:.1f}", "–"])
    control, _ = nearest(levels(noisy), levels(shown))
    caught = (control < found["pixels"].limit).double().mean().item()
    report.numbers["memorisation_pixels"]["control"] = caught
    rows[0][-1] = percent(caught)
    report.table(
        ["", "median distance", "held-out", "copies", "held-out", "nearer", "z", "control"], rows
    )
    closest = neighbours[0][0].argsort()[:12]
    strips = [
        samples.pixels[closest],
        *(train.pixels[indices[closest]] for _, indices in neighbours),
    ]
    report.picture(
        "closest.png",
        grid(scaled(torch.cat(strips)), columns=len(closest)),
        "The samples nearest to a training image in pixels; below each that image, and the one "
        "nearest in features",
    )
    shares = [
        f"{percent(f.copies)} in {space} (held-out images: {percent(f.expected)})"
        for space, f in found.items()
    ]
    return f"copies: {', '.join(shares)}"
