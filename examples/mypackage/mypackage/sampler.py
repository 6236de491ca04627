"""A sampler."""

from collections.abc import Iterator
from itertools import pairwise

from torch import Tensor

from exact_resume.randomness import Draws
from sturdy.diffusion.sampler import DenoiserCall, Sampler, Step, TimePoint


class Midpoint(Sampler):
    """Order 2: a step with the estimate at its middle; two calls of the network a step."""

    def walk(
        self, estimate: DenoiserCall, x: Tensor, knots: list[TimePoint], draws: Draws | None
    ) -> Iterator[Step]:
        """One step for every pair of neighbouring knots (t, s), from ``x`` ``(b, c, h, w)`` at the
        first knot.
        """
        for t, s in pairwise(knots):
            [middle] = estimate.knots([(t.t + s.t) / 2])
            x0, noise = estimate(x, t)
            halfway = x + (middle.alpha - t.alpha) * x0 + (middle.sigma - t.sigma) * noise
            x0, noise = estimate(halfway, middle)
            x = x + (s.alpha - t.alpha) * x0 + (s.sigma - t.sigma) * noise
            yield Step(s.t, x, x0)
