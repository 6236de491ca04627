"""Write networks as folders of diffusers: a pipeline, or one network alone."""

from pathlib import Path
from typing import Any

from sturdy.pretrained.base import open_autoencoder
from sturdy.pretrained.captions import Captions
from sturdy.pretrained.latents import Latents
from sturdy.pretrained.parts import Base
from sturdy.pretrained.text_encoders import TextEncoders


def write_stable_diffusion(
    folder: Path, unet: Any, scheduler: Any, space: Latents, captions: Captions
) -> str:
    """Write a pipeline of Stable Diffusion: the U-Net, and frozen parts of the files of the run.

    Args:
        folder: to write.
        unet: in float32, without an adapter.
        scheduler: of diffusers.
        space: names the autoencoder.
        captions: names the text encoders and their tokenizers.

    Returns:
        The class of the pipeline.
    """
    encoders = TextEncoders(captions.path)
    parts = build_text_parts(encoders)
    parts["vae"] = open_space(space).build("vae")
    parts |= {"unet": unet, "scheduler": scheduler}
    pipeline = make_pipeline(parts, is_xl=len(encoders.parts) > 1)
    pipeline.save_pretrained(folder)
    return type(pipeline).__name__


def silence() -> None:
    """Print neither progress bars nor warnings of the libraries that write."""
    import transformers.utils.logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def make_pipeline(parts: dict[str, Any], *, is_xl: bool) -> Any:
    """Return a pipeline of Stable Diffusion; parts that are not given are None."""
    names = ["vae", "text_encoder", "tokenizer", "unet", "scheduler"]
    options: dict[str, Any] = {"feature_extractor": None}
    if is_xl:
        from diffusers import StableDiffusionXLPipeline as Pipeline

        names += ["text_encoder_2", "tokenizer_2"]
        options["force_zeros_for_empty_prompt"] = True  # as the run's null caption is
    else:
        from diffusers import StableDiffusionPipeline as Pipeline  # type: ignore[assignment]

        options |= {"safety_checker": None, "requires_safety_checker": False}
    return Pipeline(**{name: parts.get(name) for name in names}, **options)


def build_text_parts(encoders: TextEncoders) -> dict[str, Any]:
    """Return text encoders and tokenizers by the names that a pipeline gives them."""
    parts: dict[str, Any] = {}
    for number, part in enumerate(encoders.parts):
        parts[part] = encoders.base.build(part)
        parts[part.replace("text_encoder", "tokenizer")] = encoders.base.tokenizer(number)
    return parts


def open_space(space: Latents) -> Base:
    """Open the autoencoder of a space."""
    return open_autoencoder(space.path, space.scaling_factor)


def write_unconditional(folder: Path, unet: Any, scheduler: Any) -> str:
    """Write a pipeline of a ``UNet2DModel``; return its class."""
    if type(scheduler).__name__ == "DDIMScheduler":
        from diffusers import DDIMPipeline as Pipeline
    else:
        from diffusers import DDPMPipeline as Pipeline  # type: ignore[assignment]
    pipeline: Any = Pipeline(unet=unet, scheduler=scheduler)
    pipeline.save_pretrained(folder)
    return type(pipeline).__name__


def write_autoencoder(folder: Path, space: Latents) -> None:
    """Write the autoencoder of a space, which diffusers reads as an ``AutoencoderKL``."""
    module: Any = open_space(space).build("vae")
    module.save_pretrained(folder)
