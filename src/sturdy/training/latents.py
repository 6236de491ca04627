"""Training in the latents of a pretrained autoencoder: what a start of the run does for it.

A space whose ``cached`` is true encodes the images once, before training, and is then released.
"""

import time
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from exact_resume import distributed
from exact_resume.randomness import Draws
from sturdy.data.buckets import Size, size_text
from sturdy.diffusion.space import Space
from sturdy.errors import ConfigError, as_config_error
from sturdy.image_size import height_and_width
from sturdy.training.module import DiffusionModule

SAMPLE = 64  # images, of which the spread of the latents is measured


def fill_in_channels(cfg: DictConfig) -> None:
    """Set ``space.channels`` to what the space has, where the user leaves it to the space.

    Raises:
        ConfigError: the space cannot be built.
    """
    if "channels" in cfg.space and cfg.space.channels is None:
        with as_config_error():
            node = OmegaConf.to_container(cfg.space, resolve=True)
            built = instantiate({"space": node}, _convert_="all")
        cfg.space.channels = built["space"].channels


def check_encodable(cfg: DictConfig, module: DiffusionModule, data: Any) -> None:
    """Check that nothing needs the pixels of a batch, where batches hold cached latents.

    Raises:
        ConfigError: something does; the message says what to choose.
    """
    with as_config_error("data", cfg.data):
        module.space.shape_of(*height_and_width(data.image_size))  # refuses what it cannot encode
        for size in data.sizes():
            _check_size(module.space, size)
    if not module.space.cached:
        return
    if module.alignment:
        raise ConfigError(
            "alignment looks at pixels, and batches hold cached latents: choose alignment=none, or "
            "encode the images at every step with space.cached=false"
        )
    try:
        with as_config_error("data", [*cfg.data, "crop", "augment"]):
            data.check_encodable()
    except ConfigError as error:
        raise ConfigError(f"{error}. Or encode at every step: space.cached=false") from None


def _check_size(space: Space, size: Size) -> None:
    """Raise ValueError if the space cannot encode images of this bucket."""
    try:
        space.shape_of(*size)
    except ValueError as error:
        raise ValueError(f"the bucket {size_text(size)}: {error}") from None


def encode_images(module: DiffusionModule, data: Any, device: torch.device) -> str:
    """Make or open the cache of encoded images, and free the memory of the encoder.

    Args:
        module: its space encodes.
        data: is open.
        device: where the space encodes.

    Returns:
        A line for the user; empty if nothing was made.
    """
    space = module.space
    start = time.monotonic()
    with distributed.rank_zero_first(), as_config_error():
        was_made = data.encode_with(space, device)
    space.release()
    shapes = [" x ".join(map(str, space.shape_of(*size))) for size in data.sizes()]
    seconds = time.monotonic() - start
    if not was_made:
        return ""
    return f"latents of {len(data.cache):,} images ({', '.join(shapes)}) cached in {seconds:.0f} s"


def describe_scales(cfg: DictConfig, module: DiffusionModule, data: Any) -> list[str]:
    """Say which settings are those of pixels, though the run trains on cached latents.

    Args:
        cfg: of the run.
        module: of the run.
        data: its images are encoded.
    """
    lines = []
    _, *sides = module.space.shape_of(*height_and_width(data.image_size))
    positions = sides[0] if sides[0] == sides[1] else sides
    if cfg.schedule.get("image_size") == data.image_size != positions:
        lines.append(
            f"schedule.image_size={data.image_size} counts pixels, and latents have {positions} "
            f"positions a side: schedule.image_size={positions} counts those"
        )
    sigma_data = getattr(module.denoiser.target, "sigma_data", None)
    if sigma_data is not None:
        spread = measure_spread(module.space, data)
        if not 0.8 < sigma_data / spread < 1.25:
            lines.append(
                f"target.sigma_data={sigma_data} is not the standard deviation of the latents, "
                f"{spread:.2f}: target.sigma_data={spread:.2f} is"
            )
    return lines


def measure_spread(space: Space, data: Any) -> float:
    """Return the standard deviation of x_0 over the held-out images, of which some are enough."""
    dataset = data.val_dataloader().dataset
    numbers = []
    for position in torch.arange(min(SAMPLE, data.held_out)).split(1):  # they may differ in size
        image = dataset[position.numpy()].image
        numbers.append(space.encode(image, Draws(0, position.tolist())).flatten())
    return torch.cat(numbers).std().item()
