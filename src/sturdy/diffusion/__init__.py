"""The mathematics of diffusion, in torch alone: a schedule, a target, an objective, a denoiser, a sampler."""

from sturdy.diffusion.denoiser import Denoiser, Guided
from sturdy.diffusion.objective import Constant, LogitNormal, MinSNR, Objective, Time, Uniform, Weight
from sturdy.diffusion.sampler import DDIM, DDPM, Euler, Heun, Sampler, Step, sample
from sturdy.diffusion.schedule import Cosine, Discrete, Linear, RectifiedFlow, Schedule
from sturdy.diffusion.target import X0, Noise, Target, V, Velocity

__all__ = [
    "DDIM",
    "DDPM",
    "X0",
    "Constant",
    "Cosine",
    "Denoiser",
    "Discrete",
    "Euler",
    "Guided",
    "Heun",
    "Linear",
    "LogitNormal",
    "MinSNR",
    "Noise",
    "Objective",
    "RectifiedFlow",
    "Sampler",
    "Schedule",
    "Step",
    "Target",
    "Time",
    "Uniform",
    "V",
    "Velocity",
    "Weight",
    "sample",
]
