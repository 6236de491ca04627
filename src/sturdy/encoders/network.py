"""A small network trained on a set of images, for features and for answers to questions.

    features = linear(convolutions(image))        answer to q = linear_q(relu(features))

It is a function of the images, the questions and ``VERSION``: it is trained on one thread of the
CPU, with its own random numbers.
"""

import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from exact_resume.randomness import generator, key
from sturdy.encoders.images import as_rgb, scaled

VERSION = 1  # raise it whenever the training changes, so that no old result is read from a cache

Tell = Callable[[int, int], None]  # called with (done, total)


class Network(nn.Module):
    """Uint8 images ``(b, c, h, w)``, grey or RGB, to features ``(b, width)``.

    Over the training images the features have mean 0, and on average variance 1.

    Args:
        size: the shorter side; the layers after the first convolution cost the same at every size.
        questions: number of answers of each.
        width: number of features.
    """

    channels = 128

    def __init__(self, size: int, questions: Mapping[str, int], *, width: int = channels) -> None:
        super().__init__()
        stride = max(1, size // 16)
        side = min(4, math.ceil(size / 4))
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

    def forward(self, images: Tensor) -> Tensor:
        """Return the features ``(b, width)``."""
        return (self.trunk(scaled(as_rgb(images))) - self.mean) / self.std

    def answers(self, images: Tensor) -> dict[str, Tensor]:
        """Return the most likely answer to each question, ``(b,)`` int64."""
        hidden = F.relu(self.trunk(scaled(as_rgb(images))))
        return {name: head(hidden).argmax(1) for name, head in self.heads.items()}


def _layer(channels: int, out: int, kernel: int, stride: int) -> Iterator[nn.Module]:
    yield nn.Conv2d(channels, out, kernel, stride, kernel // 2, bias=False)
    yield nn.BatchNorm2d(out)
    yield nn.ReLU()


def fit(
    images: Tensor,
    questions: Mapping[str, tuple[Tensor, int]],
    *,
    contrast: bool,
    seen: int,
    seed: int = 0,
    batch: int = 128,
    rate: float = 3e-3,
    tell: Tell = lambda done, total: None,
) -> Network:
    """Train a network on images to answer questions.

    Args:
        images: uint8 ``(n, c, h, w)``, grey or RGB.
        questions: the right answers ``(n,)`` int64 to each, and the number of possible answers.
        contrast: also tell each image from the others of its batch, by two views of it (SimCLR,
            Chen et al. 2020, eq. 1). The views differ little: the network must not become blind to
            the errors of generated images.
        seen: number of images to train on, with repetitions.
        seed: of weights, order and views.
        batch: images a step.
        rate: the largest learning rate.
        tell: called with (done, total).
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # another number would round differently
    try:
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(key(seed, "network"))
            answers = {name: n for name, (_, n) in questions.items()}
            network = Network(min(images.shape[2:]), answers)
        _train(
            network,
            images,
            questions,
            contrast,
            seen,
            min(batch, len(images)),
            rate,
            seed,
            tell,
        )
        features = embed(network, images)
        network.mean = features.mean(0)
        network.std = (features - features.mean(0)).square().mean().sqrt()
    finally:
        torch.set_num_threads(threads)
    return network


def _train(
    network: Network,
    images: Tensor,
    questions: Mapping[str, tuple[Tensor, int]],
    contrast: bool,
    seen: int,
    batch: int,
    rate: float,
    seed: int,
    tell: Tell,
) -> None:
    rng = generator(seed, "views")
    steps = max(1, seen // batch)
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=0.02)
    total = max(6, steps + 1)  # with 5 it divides by zero
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=total, pct_start=0.2
    )
    order = torch.empty(0, dtype=torch.int64)
    network.train()
    for step in range(steps):
        if len(order) < batch:
            order = torch.cat([order, torch.randperm(len(images), generator=rng)])
        now = order[:batch]
        order = order[batch:]
        x = scaled(as_rgb(images[now]))
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
    """Return the images ``(b, c, h, w)`` a little moved, magnified and tinted."""
    b = len(x)
    part = 1 - 0.2 * torch.rand(b, generator=rng)  # share of the width that is visible
    theta = torch.zeros(b, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = part
    theta[:, :, 2] = (1 - part)[:, None] * (2 * torch.rand(b, 2, generator=rng) - 1)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    return x * (1 + 0.1 * torch.randn(b, 3, 1, 1, generator=rng))


def nt_xent(projected: Tensor, *, temperature: float = 0.2) -> Tensor:
    """Return the loss of finding row ``i + b`` of ``(2 b, d)`` for row ``i``, ``()``."""
    z = F.normalize(projected, dim=1)
    similarity = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
    return F.cross_entropy(similarity, torch.arange(len(z)).roll(len(z) // 2))


@torch.no_grad()
def embed(network: Callable[[Tensor], Tensor], images: Tensor, *, batch: int = 250) -> Tensor:
    """Return ``network`` of uint8 ``images`` ``(n, c, h, w)`` by batches, ``(n, d)`` on the CPU."""
    return torch.cat([network(part).float().cpu() for part in images.split(batch)])


@torch.no_grad()
def answer(network: Network, images: Tensor, *, batch: int = 250) -> dict[str, Tensor]:
    """Return the answers about all ``images``, ``(n,)`` a question."""
    parts = [network.answers(part) for part in images.split(batch)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
