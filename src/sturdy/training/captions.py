"""Captions in training: the data have them, and the condition reads them."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from sturdy.errors import ConfigError, as_config_error
from sturdy.pretrained.captions import Captions
from sturdy.training.module import DiffusionModule


def caption_option(module: DiffusionModule) -> Captions | None:
    """Return what makes the conditions of ``module``, if it reads captions."""
    option = module.denoiser.make_condition
    return option if isinstance(option, Captions) else None


def prepare_captions(module: DiffusionModule, data: Any, cfg: DictConfig) -> None:
    """Load or make the embeddings of the captions of ``data``, which is open.

    Raises:
        ConfigError: the data have captions and the condition reads none, or the other way round;
            or the text encoders cannot be used.
    """
    option = caption_option(module)
    captions = getattr(data, "captions", [])
    if option is None and captions:
        raise ConfigError(
            "the images have captions, which only condition=captions reads: choose it, or leave "
            "data.captions and data.caption out"
        )
    if option is None:
        return
    if not captions:
        raise ConfigError(
            'condition=captions needs captions: data.captions=true reads them, and data.caption="a '
            'photo of a {}" makes them of the names of the classes'
        )
    if data.augmentation_size:
        raise ConfigError(
            f"data.augment={cfg.data.augment}: a network that reads captions is not told how an "
            f"image was augmented; set data.augment=0"
        )
    with as_config_error("condition", cfg.condition):
        option.prepare(captions, Path(cfg.paths.cache))
