"""How far two sets of pictures are apart, in features ``(n, d)``.

    fd    |mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2))      of Gaussians; the smaller n, the
    larger
    kid   E k(x, x') + E k(y, y') - 2 E k(x, y)                    k = (x.y / d + 1)^3; unbiased,
    for small sets
    precision, recall        share of one set inside the other's balls around its points, as far as
    their 3rd neighbour
    density, coverage        the same with real balls alone, to the 5th; outliers among the real
    count for less

Precision alone can be gamed: one good picture, repeated, has 1; its recall and coverage are 0.
"""

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from exact_resume.randomness import key


class _Given(nn.Identity):
    """Features that are there already, for metrics that would compute them."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


def frechet(real: Tensor, fake: Tensor) -> float:
    """The Fréchet distance of the Gaussians with the sets' moments (Heusel et al. 2017), in
    float64.
    """
    metric = FrechetInceptionDistance(feature=_Given(real.shape[1]), normalize=True)
    metric.update(real.double(), real=True)
    metric.update(fake.double(), real=False)
    return max(0.0, metric.compute().item())


def kid(real: Tensor, fake: Tensor, *, subsets: int = 20, seed: int = 0) -> tuple[float, float]:
    """The squared maximum mean discrepancy (Bińkowski et al. 2018) and its standard error.

    It is the mean over random subsets of half the smaller set. The spread of halves is a
    delete-half jackknife (Shao & Wu 1989): the standard error at the size of the whole, or more
    than it where the other set is larger.
    """
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # that it keeps all features
        torch.random.default_generator.manual_seed(key(seed, "kid"))
        size = max(1, min(len(real), len(fake)) // 2)
        metric = KernelInceptionDistance(
            feature=_Given(real.shape[1]), subsets=subsets, subset_size=size
        )
        metric.update(real.double(), real=True)
        metric.update(fake.double(), real=False)
        mean, std = metric.compute()
    return mean.item(), std.item()


@dataclass(frozen=True)
class Manifold:
    """Shares, but for ``density``, which can exceed 1; ``inside`` ``(n,)`` tells which fakes count
    for precision.
    """

    precision: float
    recall: float
    density: float
    coverage: float
    inside: Tensor


def manifold(
    real: Tensor, fake: Tensor, *, k: int = 3, dense: int = 5, chunk: int = 512
) -> Manifold:
    """Precision and recall (Kynkäänniemi et al. 2019, eq. 1 and 2), density and coverage (Naeem et
    al. 2020, eq. 3, 4).

    Args:
        k, dense: which neighbour the balls of the first and of the second pair reach to.
        chunk: fakes at a time; bounds the memory.
    """
    real, fake = real.double(), fake.double()
    reach, far = radii(real, k, dense, chunk=chunk)
    reach_fake, _ = radii(fake, k, dense, chunk=chunk)
    inside, near = (
        torch.empty(len(fake), dtype=torch.bool),
        torch.empty(len(fake), dtype=torch.float64),
    )
    found, covered = (
        torch.zeros(len(real), dtype=torch.bool),
        torch.zeros(len(real), dtype=torch.bool),
    )
    for first in range(0, len(fake), chunk):
        part = slice(first, first + chunk)
        distance = torch.cdist(real, fake[part])  # (n_real, b)
        inside[part] = (distance <= reach[:, None]).any(0)
        near[part] = (distance <= far[:, None]).sum(0) / dense
        found |= (distance <= reach_fake[part]).any(1)
        covered |= (distance <= far[:, None]).any(1)
    precision, recall, coverage = (hits.double().mean().item() for hits in (inside, found, covered))
    return Manifold(precision, recall, near.mean().item(), coverage, inside)


def radii(points: Tensor, *ks: int, chunk: int = 512) -> Tensor:
    """From each of ``points`` ``(n, d)`` to its k-th neighbour, ``(len(ks), n)``; at most to the
    last.
    """
    out = torch.empty(len(ks), len(points), dtype=points.dtype)
    for first in range(0, len(points), chunk):
        part = points[first : first + chunk]
        distance = torch.cdist(part, points)
        distance[
            torch.arange(len(part)), torch.arange(first, first + len(part))
        ] = -1.0  # itself, before all others
        distance = distance.topk(min(max(ks) + 1, len(points)), largest=False).values
        for row, k in zip(out, ks, strict=True):
            row[first : first + len(part)] = distance[:, min(k, distance.shape[1] - 1)].clamp(min=0)
    return out
