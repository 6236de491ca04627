"""A sampler."""

from collections.abc import Iterator
from itertools import pairwise

from torch import Tensor
from typing_extensions import override

from exact_resume.randomness import Draws
from sturdy.diffusion.sampler import DenoiserCall, Sampler, Step, TimePoint


class Midpoint(Sampler):
    """A method of order 2: each step uses the estimate at its middle, in two network calls."""

    @override
    def integrate(
        self, estimate: DenoiserCall, x: Tensor, points: list[TimePoint], draws: Draws | None
    ) -> Iterator[Step]:
        """Yield one step for every pair of neighbouring times (t, s); ``x`` is ``(b, c, h, w)``."""
        for t, s in pairwise(points):
            [middle] = estimate.time_points([(t.t + s.t) / 2])
            x0, noise = estimate(x, t)
            halfway = x + (middle.alpha - t.alpha) * x0 + (middle.sigma - t.sigma) * noise
            x0, noise = estimate(halfway, middle)
            x = x + (s.alpha - t.alpha) * x0 + (s.sigma - t.sigma) * noise
            yield Step(s.t, x, x0)
