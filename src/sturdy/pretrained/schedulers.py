"""The scheduler of diffusers that means the same as a schedule and a target.

alpha^2 + sigma^2 = 1    DDIMScheduler, by its betas: exact at the 1,000 times that it knows
alpha + sigma = 1        FlowMatchEulerDiscreteScheduler, shifted where the schedule is
"""

from typing import Any

import torch

from sturdy.diffusion.schedule import STEPS, Linear, RectifiedFlow, ScaledLinear, Schedule, Shifted
from sturdy.diffusion.target import X0, Noise, Target, V, Velocity, config_name

PREDICTIONS = {Noise: "epsilon", V: "v_prediction", X0: "sample"}
# The betas of these classes with their defaults.
NAMED: dict[type[Schedule], dict[str, Any]] = {
    Linear: {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    ScaledLinear: {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
}


class NoSchedulerError(ValueError):
    """Diffusers has no scheduler for a schedule and a target; the message says what to do."""


def make_scheduler(schedule: Schedule, target: Target, *, clip: bool) -> Any:
    """Return the scheduler.

    Args:
        schedule: of the run.
        target: of the run.
        clip: whether estimates of x_0 are clipped to [-1, 1]; a flow never clips.

    Raises:
        NoSchedulerError: there is none.
    """
    if type(target) is Velocity and (shift := _shift(schedule)) is not None:
        from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
            FlowMatchEulerDiscreteScheduler,
        )

        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=STEPS, shift=shift)
    t = torch.linspace(0, 1, STEPS + 1, dtype=torch.float64)
    alpha, sigma = schedule(t)
    preserves = torch.allclose(alpha**2 + sigma**2, torch.ones_like(t), atol=1e-6)
    if type(target) not in PREDICTIONS or not preserves:
        raise NoSchedulerError(
            f"diffusers has no scheduler for schedule={config_name(schedule)} with "
            f"target={config_name(target)}: use to=torch_export, to=onnx or to=safetensors"
        )
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    alpha_bar = alpha.square()
    betas = 1 - alpha_bar[1:] / alpha_bar[:-1]
    scheduler = DDIMScheduler(
        **NAMED.get(type(schedule), {"trained_betas": betas.tolist()}),
        num_train_timesteps=STEPS,
        prediction_type=PREDICTIONS[type(target)],
        clip_sample=clip,
        set_alpha_to_one=True,  # the last step ends at t = 0, where alpha is 1
        steps_offset=1,  # pipelines of Stable Diffusion insist on it; trailing steps ignore it
        timestep_spacing="trailing",  # the first step is at t = 1
    )
    if not torch.allclose(scheduler.alphas_cumprod.double(), alpha_bar[1:], atol=1e-6):
        scheduler.register_to_config(trained_betas=betas.tolist())
        scheduler = DDIMScheduler.from_config(scheduler.config)
    return scheduler


def _shift(schedule: Schedule) -> float | None:
    """Return the shift of a rectified flow; None for another schedule."""
    if isinstance(schedule, RectifiedFlow):
        return 1.0
    if isinstance(schedule, Shifted) and (inner := _shift(schedule.schedule)) is not None:
        return inner * schedule.factor
    return None
