"""The mathematics of diffusion, in torch alone: schedule, target, objective, denoiser, sampler."""

from sturdy.diffusion.condition import ClassCondition, Condition
from sturdy.diffusion.denoiser import Denoiser, Guided
from sturdy.diffusion.editing import InpaintingDenoiser, image_to_image, inpaint
from sturdy.diffusion.objective import (
    Constant,
    LogitNormal,
    LogNormal,
    MinSNR,
    Objective,
    Sigmoid,
    Time,
    Uniform,
    Weight,
)
from sturdy.diffusion.sampler import DDIM, DDPM, Euler, Heun, Sampler, Step, sample
from sturdy.diffusion.schedule import (
    Cosine,
    Discrete,
    Linear,
    RectifiedFlow,
    ScaledLinear,
    Schedule,
    Shifted,
    VarianceExploding,
)
from sturdy.diffusion.solver import Churn, DPMSolver, UniPC
from sturdy.diffusion.space import Pixels, Space
from sturdy.diffusion.target import X0, Noise, Preconditioned, Target, V, Velocity

__all__ = [
    "DDIM",
    "DDPM",
    "X0",
    "Churn",
    "ClassCondition",
    "Condition",
    "Constant",
    "Cosine",
    "DPMSolver",
    "Denoiser",
    "Discrete",
    "Euler",
    "Guided",
    "Heun",
    "InpaintingDenoiser",
    "Linear",
    "LogNormal",
    "LogitNormal",
    "MinSNR",
    "Noise",
    "Objective",
    "Pixels",
    "Preconditioned",
    "RectifiedFlow",
    "Sampler",
    "ScaledLinear",
    "Schedule",
    "Shifted",
    "Sigmoid",
    "Space",
    "Step",
    "Target",
    "Time",
    "UniPC",
    "Uniform",
    "V",
    "VarianceExploding",
    "Velocity",
    "Weight",
    "image_to_image",
    "inpaint",
    "sample",
]
