"""Distances between two sets of images, in features ``(n, d)``.

    fd    |mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2))    of Gaussians; large for small n
    kid   E k(x, x') + E k(y, y') - 2 E k(x, y)                  k = (x.y / d + 1)^3; unbiased

Precision and recall are the fraction of one set inside the k-NN balls of the other (k = 3).
Density and coverage use the balls of the real images alone (k = 5), so outliers count less.

Precision alone can be gamed: one good image, repeated, has 1. Its recall and coverage are 0.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from exact_resume.randomness import generator, key


class _GivenFeatures(nn.Identity):
    """Stands for the network of a metric whose inputs are features already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


def frechet(real: Tensor, fake: Tensor) -> float:
    """Return the Fréchet distance of Gaussians (Heusel et al. 2017), computed in float64."""
    metric = FrechetInceptionDistance(feature=_GivenFeatures(real.shape[1]), normalize=True)
    metric.update(real.double(), real=True)
    metric.update(fake.double(), real=False)
    return max(0.0, metric.compute().item())


def kid(real: Tensor, fake: Tensor, *, subsets: int = 20, seed: int = 0) -> tuple[float, float]:
    """Return the squared maximum mean discrepancy (Bińkowski et al. 2018) and its standard error.

    It is the mean over random subsets of half the smaller set. The spread of halves is a
    delete-half jackknife (Shao & Wu 1989): the standard error for all of the set, or more than it
    if the other set is larger.
    """
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # torchmetrics warns that it keeps all features
        torch.random.default_generator.manual_seed(key(seed, "kid"))
        size = max(1, min(len(real), len(fake)) // 2)
        metric = KernelInceptionDistance(
            feature=_GivenFeatures(real.shape[1]), subsets=subsets, subset_size=size
        )
        metric.update(real.double(), real=True)
        metric.update(fake.double(), real=False)
        mean, std = metric.compute()
    return mean.item(), std.item()


def count_as_extreme(
    n: int, m: int, statistic: Callable[[Tensor], float], *, divisions: int = 1000, seed: int = 0
) -> int:
    """Count random divisions into ``n`` and ``m`` things with as large a value of ``statistic``.

    It is a permutation test: if all things are of one kind, any count is equally probable.

    Args:
        n: of the first part.
        m: of the second part; the given division has the first part first.
        statistic: called with a division: which things are in the first part, bool ``(n + m)``.
        divisions: how many to try.
        seed: of the draws.
    """
    draws = generator("divisions", seed)
    given = torch.arange(n + m) < n
    found = statistic(given)
    count = 0
    for _ in range(divisions):
        count += statistic(given[torch.randperm(n + m, generator=draws)]) >= found
    return count


def own_neighbours(points: Tensor, k: int = 5) -> Callable[[Tensor], float]:
    """Return a statistic: how many of all ``k`` nearest neighbours are in a point's own part.

    It is that of the two-sample test of Schilling 1986, for ``points`` ``(n, d)``.
    """
    distances = torch.cdist(points.double(), points.double())
    distances.fill_diagonal_(torch.inf)
    neighbours = distances.topk(min(k, len(points) - 1), largest=False).indices

    def count(part: Tensor) -> float:
        return (part[neighbours] == part[:, None]).sum().item()

    return count


@dataclass(frozen=True)
class Manifold:
    """Precision, recall, density and coverage.

    Attributes:
        precision: share of fakes, in [0, 1].
        recall: share of real images, in [0, 1].
        density: can exceed 1.
        coverage: share of real images, in [0, 1].
        inside: which fakes count for precision, bool ``(n,)``.
    """

    precision: float
    recall: float
    density: float
    coverage: float
    inside: Tensor


def manifold(
    real: Tensor, fake: Tensor, *, k: int = 3, dense: int = 5, chunk: int = 512
) -> Manifold:
    """Compute precision and recall (Kynkäänniemi et al. 2019, eq. 1, 2), density and coverage.

    Source of the latter: Naeem et al. 2020, eq. 3, 4.

    Args:
        real: features ``(m, d)``.
        fake: features ``(n, d)``.
        k: the neighbour that the balls of precision and recall reach to.
        dense: the neighbour that the balls of density and coverage reach to.
        chunk: fakes at a time; bounds the memory.
    """
    real = real.double()
    fake = fake.double()
    radius, dense_radius = neighbour_distances(real, k, dense, chunk=chunk)
    (fake_radius,) = neighbour_distances(fake, k, chunk=chunk)
    inside, density = [], []
    recalled = torch.zeros(len(real), dtype=torch.bool)
    covered = torch.zeros(len(real), dtype=torch.bool)
    for part, part_radius in zip(fake.split(chunk), fake_radius.split(chunk), strict=True):
        distance = torch.cdist(real, part)  # (m, chunk)
        in_dense_ball = distance <= dense_radius[:, None]
        inside.append((distance <= radius[:, None]).any(0))
        density.append(in_dense_ball.sum(0) / dense)
        recalled |= (distance <= part_radius).any(1)
        covered |= in_dense_ball.any(1)
    is_inside = torch.cat(inside)
    return Manifold(
        precision=is_inside.double().mean().item(),
        recall=recalled.double().mean().item(),
        density=torch.cat(density).double().mean().item(),
        coverage=covered.double().mean().item(),
        inside=is_inside,
    )


def neighbour_distances(points: Tensor, *ks: int, chunk: int = 512) -> Tensor:
    """Return the distance from each of ``points`` to its k-th neighbour.

    Args:
        points: ``(n, d)``.
        *ks: the neighbours; at most the last one.
        chunk: points at a time; bounds the memory.

    Returns:
        ``(len(ks), n)``.
    """
    out = []
    for first in range(0, len(points), chunk):
        part = points[first : first + chunk]
        distance = torch.cdist(part, points)
        rows = torch.arange(len(part))
        distance[rows, rows + first] = -1.0  # the point itself, before all others
        nearest = distance.topk(min(max(ks) + 1, len(points)), largest=False).values
        last = nearest.shape[1] - 1
        out.append(torch.stack([nearest[:, min(k, last)].clamp(min=0) for k in ks]))
    return torch.cat(out, dim=1)
