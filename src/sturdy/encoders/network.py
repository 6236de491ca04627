"""A small network trained on the images at hand: it answers questions about a picture, and its
insides are features.

    features = linear(convolutions(picture))        answer to q = linear_q(relu(features))

It is a function of the images, the questions and ``VERSION``: trained on one thread of the CPU,
    with draws of its own.
"""

import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from exact_resume.randomness import generator, key
from sturdy.encoders.images import scaled

VERSION = (
    1  # raise it whenever what is trained changes, so that nothing of the old is read from a cache
)

Tell = Callable[[int, int], None]  # told (done, total)


class Network(nn.Module):
    """uint8 pictures ``(b, 3, h, w)`` to features ``(b, width)``, which have mean 0 and variance 1
    over the training
    images, the variance on average over the features.

    Args:
        size: height and width; what follows the first convolution costs the same at every size.
        questions: how many answers each has.
    """

    channels = 128

    def __init__(self, size: int, questions: Mapping[str, int], *, width: int = channels) -> None:
        super().__init__()
        stride, side = max(1, size // 16), min(4, math.ceil(size / 4))
        self.trunk = nn.Sequential(
            *_layer(3, width // 4, max(3, 2 * stride - 1), stride),
            *_layer(width // 4, width // 2, 3, 2),
            *_layer(width // 2, width, 3, 2),
            nn.AdaptiveAvgPool2d(side),
            nn.Flatten(),
            nn.Linear(width * side**2, width),
        )
        self.heads = nn.ModuleDict({name: nn.Linear(width, n) for name, n in questions.items()})
        self.project = nn.Linear(width, width // 2)
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(()))

    def forward(self, pictures: Tensor) -> Tensor:
        return (self.trunk(scaled(pictures)) - self.mean) / self.std

    def answers(self, pictures: Tensor) -> dict[str, Tensor]:
        """The most likely answer to each question, ``(b,)`` int64."""
        hidden = F.relu(self.trunk(scaled(pictures)))
        return {name: head(hidden).argmax(1) for name, head in self.heads.items()}


def _layer(channels: int, out: int, kernel: int, stride: int) -> Iterator[nn.Module]:
    yield nn.Conv2d(channels, out, kernel, stride, kernel // 2, bias=False)
    yield nn.BatchNorm2d(out)
    yield nn.ReLU()


def fit(
    pictures: Tensor,
    questions: Mapping[str, tuple[Tensor, int]],
    *,
    contrast: bool,
    seen: int,
    seed: int = 0,
    batch: int = 128,
    rate: float = 3e-3,
    tell: Tell = lambda done, total: None,
) -> Network:
    """Train on ``pictures``, uint8 ``(n, 3, h, w)``, to answer ``questions``.

    Args:
        questions: the right answers ``(n,)`` int64 to each, and how many there are.
        contrast: also tell each picture from the others of its batch, by two views of it (SimCLR,
            Chen et al. 2020, eq. 1). Views differ little: what is to be noticed in a generated
            picture must not be learned away.
        seen: pictures to train on, repetitions counted.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # another number would round differently
    try:
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(key(seed, "network"))
            network = Network(pictures.shape[-1], {name: n for name, (_, n) in questions.items()})
        _train(
            network,
            pictures,
            questions,
            contrast,
            seen,
            min(batch, len(pictures)),
            rate,
            seed,
            tell,
        )
        features = embed(network, pictures)
        network.mean = features.mean(0)
        network.std = (features - features.mean(0)).square().mean().sqrt()
    finally:
        torch.set_num_threads(threads)
    return network


def _train(
    network: Network,
    pictures: Tensor,
    questions: Mapping[str, tuple[Tensor, int]],
    contrast: bool,
    seen: int,
    batch: int,
    rate: float,
    seed: int,
    tell: Tell,
) -> None:
    rng, steps = generator(seed, "views"), max(1, seen // batch)
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=max(6, steps + 1), pct_start=0.2
    )  # of 5 it divides by zero
    order = torch.empty(0, dtype=torch.int64)
    network.train()
    for step in range(steps):
        if len(order) < batch:
            order = torch.cat([order, torch.randperm(len(pictures), generator=rng)])
        now, order = order[:batch], order[batch:]
        x = scaled(pictures[now])
        views = torch.cat([view(x, rng), view(x, rng)]) if contrast else view(x, rng)
        hidden = network.trunk(views)
        loss = nt_xent(network.project(F.relu(hidden))) if contrast else hidden.new_zeros(())
        for name, (answer, _) in questions.items():
            right = answer[now].repeat(2 if contrast else 1)
            loss = loss + F.cross_entropy(network.heads[name](F.relu(hidden)), right)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        tell(step + 1, steps)
    network.eval()


def view(x: Tensor, rng: torch.Generator) -> Tensor:
    """The pictures ``(b, c, h, w)`` a little moved, magnified and tinted."""
    b = len(x)
    part = 1 - 0.2 * torch.rand(b, generator=rng)  # of the width that is seen
    theta = torch.zeros(b, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = part
    theta[:, :, 2] = (1 - part)[:, None] * (2 * torch.rand(b, 2, generator=rng) - 1)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    return x * (1 + 0.1 * torch.randn(b, 3, 1, 1, generator=rng))


def nt_xent(projected: Tensor, *, temperature: float = 0.2) -> Tensor:
    """How badly row ``i`` of ``(2 b, d)`` is told to go with row ``i + b``, among all others;
    ``()``.
    """
    z = F.normalize(projected, dim=1)
    similarity = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
    return F.cross_entropy(similarity, torch.arange(len(z)).roll(len(z) // 2))


@torch.no_grad()
def embed(network: Callable[[Tensor], Tensor], pictures: Tensor, *, batch: int = 250) -> Tensor:
    """``network`` of all uint8 ``pictures`` ``(n, 3, h, w)``, a batch at a time: ``(n, d)``, on the
    CPU.
    """
    return torch.cat([network(part).float().cpu() for part in pictures.split(batch)])


@torch.no_grad()
def answer(network: Network, pictures: Tensor, *, batch: int = 250) -> dict[str, Tensor]:
    """The answers about all ``pictures``, ``(n,)`` a question."""
    parts = [network.answers(part) for part in pictures.split(batch)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
