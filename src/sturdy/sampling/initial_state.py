"""What sampling starts from: noise, or an image that is drawn anew, all of it or a part."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor

from exact_resume.randomness import Draws
from sturdy.data.buckets import Size, size_text
from sturdy.diffusion.condition import Condition
from sturdy.diffusion.editing import InpaintingDenoiser, image_to_image
from sturdy.diffusion.sampler import Estimator, Sampler, sample
from sturdy.diffusion.space import Space
from sturdy.encoders.images import scaled

DEFAULT_STRENGTH = 0.6  # if all of the image may change


class InitialState:
    """Noise, or an image and a noise level, or an image and a mask.

    Args:
        options: ``image``, ``mask`` and ``strength``, each of which may be None, and ``decode``,
            which reads the files.
        size: height and width of the images, to which the files are resized and cropped.
        space: in which the diffusion happens.

    Attributes:
        primitives: what images from this state depend on.

    Raises:
        ValueError: naming the key.
    """

    def __init__(self, options: DictConfig, size: Size, space: Space) -> None:
        self.space = space
        self.image: Tensor | None = None
        self.mask: Tensor | None = None
        self.strength = _strength(options)
        self.primitives: dict[str, Any] = {"image": None, "mask": None}
        if options.image is None:
            for name in ("mask", "strength"):
                if options[name] is not None:
                    raise ValueError(
                        f"sample.{name}={options[name]} needs an image to change: sample.image=FILE"
                    )
            return
        pixels = _read_file(options, "image", size)
        self.image = _as_channels(scaled(_center_crop(pixels, size)), space.image_channels)
        self.primitives |= {"image": _digest(pixels), "strength": self.strength}
        if options.mask is not None:
            mask = _read_file(options, "mask", size)
            self.mask = _mask(mask, pixels, size, options)
            self.primitives["mask"] = _digest(mask)

    def draw(
        self,
        sampler: Sampler,
        denoiser: Estimator,
        noise: Tensor,
        cond: Condition | Tensor | None,
        draws: Draws,
    ) -> Tensor:
        """Draw images ``(b, c, h, w)`` in [-1, 1]; arguments are those of ``sample``."""
        clip = self.space.clip
        if self.image is None:
            x0 = sample(sampler, denoiser, noise, cond, draws, clip=clip)
            return self.space.decode(x0)
        images = self.image.to(noise.device).expand(len(noise), *self.image.shape)
        start = self.space.encode(images, None)
        if self.mask is not None:
            denoiser = InpaintingDenoiser(denoiser, start, self._latent_mask(start))
        if self.mask is not None and self.strength == 1:
            x0 = sample(sampler, denoiser, noise, cond, draws, clip=clip)
        else:
            x0 = image_to_image(
                sampler, denoiser, noise, start, self.strength, cond, draws, clip=clip
            )
        drawn = self.space.decode(x0)
        if self.mask is None:
            return drawn
        # A space may lose details: the pixels outside the mask are those of the image.
        return torch.where(self.mask.to(drawn.device), drawn, images)

    def _latent_mask(self, x0: Tensor) -> Tensor:
        """Return the mask at the resolution of ``x0``: a cell with any white is drawn anew."""
        assert self.mask is not None
        mask = self.mask.float()[None, None]
        return torch.nn.functional.adaptive_max_pool2d(mask, x0.shape[2:])[0, 0].bool()


def _strength(options: DictConfig) -> float:
    strength = options.strength
    if strength is None:
        return DEFAULT_STRENGTH if options.mask is None else 1.0
    is_number = isinstance(strength, int | float) and not isinstance(strength, bool)
    if not is_number or not 0 < strength <= 1:
        raise ValueError(
            f"sample.strength={strength} must be above 0, where nothing changes, and at most 1"
        )
    return float(strength)


def _read_file(options: DictConfig, name: str, size: Size) -> Tensor:
    """Read an image upright and not cropped, as it covers ``size``: uint8 ``(3, h, w)``."""
    file = Path(str(options[name])).expanduser()
    cover = {} if size[0] == size[1] else {"buckets": [size]}
    try:
        decode = instantiate(options.decode)
        return torch.from_numpy(decode(file, size=min(size), crop="random", **cover))
    except Exception as error:  # of our decoder, Pillow or the disk: all say what is wrong
        raise ValueError(f"sample.{name}={file}: {error}") from None


def _mask(mask: Tensor, pixels: Tensor, size: Size, options: DictConfig) -> Tensor:
    """Return where the mask is white, ``(h, w)`` bool; True is drawn anew."""
    if mask.shape != pixels.shape:
        raise ValueError(
            f"sample.mask={options.mask} is {_dimensions(mask)} where "
            f"sample.image={options.image} is {_dimensions(pixels)}, resized to cover "
            f"{size_text(size)}: make it as large as the image"
        )
    white = _center_crop(mask, size).float().mean(0) > 127.5
    if not white.any():
        raise ValueError(
            f"sample.mask={options.mask} has no white where the image is: nothing would be drawn"
        )
    return white


def _center_crop(pixels: Tensor, size: Size) -> Tensor:
    height, width = size
    top = (pixels.shape[1] - height) // 2
    left = (pixels.shape[2] - width) // 2
    return pixels[:, top : top + height, left : left + width]


def _as_channels(image: Tensor, channels: int) -> Tensor:
    """Return an RGB image with the channels of the run's images.

    Raises:
        ValueError: they are neither RGB nor grey.
    """
    if channels == 3:
        return image
    if channels != 1:
        raise ValueError(f"sample.image: the images of this run have {channels} channels")
    return image.mean(0, keepdim=True)


def _digest(pixels: Tensor) -> str:
    return hashlib.sha256(pixels.contiguous().numpy().tobytes()).hexdigest()


def _dimensions(pixels: Tensor) -> str:
    return f"{pixels.shape[2]} x {pixels.shape[1]}"
