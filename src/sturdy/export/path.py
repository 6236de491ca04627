"""A short path from noise to x_0, as the run computes it; an export must compute the same.

    x_s = alpha_s D + sigma_s (x_t - alpha_t D) / sigma_t,    t = 1, 3/4, 1/2, 1/4

Each step is compared from the run's own state, so that rounding does not add up.
"""

import torch
from torch import Tensor

from exact_resume.randomness import Draws, key
from sturdy.diffusion.condition import Condition
from sturdy.diffusion.denoiser import Denoiser
from sturdy.diffusion.sampler import Range

STEPS = 4


@torch.no_grad()
def follow_path(
    denoiser: Denoiser, shape: tuple[int, ...], cond: Condition, clip: Range | None, seed: int
) -> dict[str, Tensor]:
    """Return the states, times and estimates, by the names that ``read_back`` lists.

    Args:
        denoiser: of the run, in float32 on the CPU.
        shape: of x_0, ``(c, h, w)``.
        cond: of ``b`` samples.
        clip: the range of the estimates of x_0.
        seed: of the run; the noise is a function of it.
    """
    times = [1 - i / STEPS for i in range(STEPS + 1)]
    alphas, sigmas = denoiser.schedule(torch.tensor(times, dtype=torch.float64))
    alpha, sigma = alphas.tolist(), sigmas.tolist()
    draws = Draws(key(seed, "export"), range(len(cond)))
    x = sigma[0] * draws.normal("start", shape)
    found: dict[str, list[Tensor]] = {
        name: [] for name in ("x", "t", "timestep", "prediction", "x0", "next")
    }
    for i, time in enumerate(times[:-1]):
        t = torch.full((len(cond),), time)
        prediction = denoiser.predict(x, t, cond)
        at = (coefficient[:, None, None, None] for coefficient in denoiser.schedule(t))
        x0 = denoiser.target.x0(prediction, x, *at)
        found["x"].append(x)
        clipped = x0 if clip is None else x0.clamp(*clip)
        x = alpha[i + 1] * clipped + sigma[i + 1] * (x - alpha[i] * clipped) / sigma[i]
        timestep = getattr(denoiser.backbone, "timestep", None)
        for name, tensor in (
            ("t", t),
            ("timestep", t if timestep is None else timestep(t)),
            ("prediction", prediction),
            ("x0", x0),
            ("next", x),
        ):
            found[name].append(tensor)
    return {name: torch.stack(tensors) for name, tensors in found.items()}


def sampling_times(denoiser: Denoiser, steps: int, spacing: str) -> dict[str, list[float]]:
    """Return times from 1 to 0, and alpha and sigma there, for the sampler of a card."""
    from sturdy.diffusion.spacing import SPACINGS

    t = torch.tensor(SPACINGS[spacing](denoiser.schedule, steps, 1.0), dtype=torch.float64)
    alpha, sigma = denoiser.schedule(t)
    return {"t": t.tolist(), "alpha": alpha.tolist(), "sigma": sigma.tolist()}
