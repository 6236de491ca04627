"""The denoiser as a program that needs no code of this project: torch.export or ONNX.

    x_0 = program(x_t, t[, label | embeddings[, pooled, sizes]])

The number of samples is free; the size of the images is that of the run.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sturdy.diffusion.denoiser import Denoiser
from sturdy.pretrained.borrowed import Borrowed
from sturdy.pretrained.latents import Latents
from sturdy.pretrained.write_pipeline import open_space

MOST = 4096  # samples in one call
MOST_OF_DIFFUSERS = 63  # its U-Nets take another way from 64 on


class ProgramError(ValueError):
    """A network cannot be written as a program."""


class Program(nn.Module):
    """The estimate of x_0. Labels are not checked: that would read their values.

    Args:
        denoiser: of the run.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.backbone = denoiser.backbone
        self.schedule = denoiser.schedule
        self.target = denoiser.target

    def forward(self, x: Tensor, t: Tensor, *condition: Tensor) -> Tensor:
        """Return the estimate ``(b, c, h, w)`` for ``x`` ``(b, c, h, w)`` and ``t`` ``(b,)``."""
        inputs = self.target.inputs(x, t, self.schedule)
        prediction = self.backbone(*inputs, *(condition or (None,)))
        alpha, sigma = (coefficient[:, None, None, None] for coefficient in self.schedule(t))
        return self.target.x0(prediction, x, alpha, sigma)


class Decoder(nn.Module):
    """From latents to images in [-1, 1].

    Args:
        space: of the run.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, space: Latents) -> None:
        super().__init__()
        self.autoencoder: Any = open_space(space).build("vae").requires_grad_(False)
        scale, shift = space._scale_and_shift(torch.zeros(()))
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, latent: Tensor) -> Tensor:
        """Return images ``(b, 3, h, w)``."""
        decoded: Tensor = self.autoencoder.decode(latent / self.scale + self.shift).sample
        return decoded.clamp(-1, 1)


def trace(denoiser: Denoiser, inputs: Sequence[Tensor]) -> torch.export.ExportedProgram:
    """Return the program of a denoiser.

    Args:
        denoiser: of the run, on the CPU.
        inputs: x, t and the condition of two or more samples.

    Raises:
        ProgramError: the network does something that is no program.
    """
    most = MOST_OF_DIFFUSERS if isinstance(denoiser.backbone, Borrowed) else MOST
    free = {0: torch.export.Dim("batch", min=1, max=most)}
    return _export(Program(denoiser), inputs, (free, free, tuple(free for _ in inputs[2:])))


def trace_decoder(space: Latents, latent: Tensor) -> torch.export.ExportedProgram:
    """Return the program of the decoder of latents."""
    free = {0: torch.export.Dim("batch", min=1, max=MOST_OF_DIFFUSERS)}
    return _export(Decoder(space), [latent], (free,))


def _export(
    module: nn.Module, inputs: Sequence[Tensor], shapes: Any
) -> torch.export.ExportedProgram:
    try:
        with torch.no_grad():
            return torch.export.export(module.eval(), tuple(inputs), dynamic_shapes=shapes)
    except Exception as error:  # whatever a network of the user's makes of it
        reason = str(error).strip().splitlines()[0]
        raise ProgramError(
            f"torch.export cannot make a program of {type(module).__name__} ({reason}): use "
            f"to=safetensors"
        ) from None


def write_program(program: torch.export.ExportedProgram, path: Path) -> None:
    """Write a program as ``.pt2`` or ``.onnx``, by the suffix of ``path``."""
    if path.suffix == ".pt2":
        torch.export.save(program, path)
    else:
        torch.onnx.export(program, (), path, dynamo=True, verbose=False)


def check_onnx() -> None:
    """Raise ValueError if a package that ONNX needs is not installed."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"to=onnx needs a package that is not installed ({error}): "
            f"pip install 'sturdy-diffusion[onnx]'"
        ) from None
