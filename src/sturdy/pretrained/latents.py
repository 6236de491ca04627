"""The space of a pretrained autoencoder: x_0 is a latent, eight times smaller than the image.

    z = (mean + std eps - shift) scale,    image = decode(z / scale + shift)

The encoder gives a mean and a standard deviation for each number of the latent: the moments. They
depend on the image alone and can be cached; eps is drawn anew at every position.
Source: Rombach et al. 2022, sec. 3.1; scale and shift are in the autoencoder's config.
"""

import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from exact_resume.randomness import Draws
from sturdy.diffusion.space import Space
from sturdy.pretrained.base import open_autoencoder
from sturdy.pretrained.parts import Base

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
NOT_IN_KEY = ("sample_size", "force_upcast")  # of a config: they change no number


class Latents(Space):
    """The latents of an ``AutoencoderKL`` of diffusers, as Stable Diffusion has one.

    The autoencoder is loaded when it is first needed. It is not trained and in no checkpoint.

    Args:
        path: a folder of the autoencoder, a folder of a pipeline, or a single file.
        channels: of the latents; None for those of the autoencoder. Backbones read it.
        scaling_factor: of the latents; only for the single file of an autoencoder alone, which does
            not say it.
        sha256: the SHA-256 that the weights must have; None accepts any. It hashes the tensors, not
            the file.
        cached: whether training encodes each image once, into a cache of moments.
        decode_batch: number of images that are decoded at a time; fewer take less memory.
        tile_above: images with more pixels a side are decoded in overlapping tiles of this side.
        dtype: in which the autoencoder computes: float32, float16 or bfloat16.

    Raises:
        ValueError: an argument is out of its range, or ``path`` holds no such autoencoder.
    """

    clip = None

    def __init__(
        self,
        *,
        path: str,
        channels: int | None = None,
        scaling_factor: float | None = None,
        sha256: str | None = None,
        cached: bool = True,
        decode_batch: int = 4,
        tile_above: int = 1024,
        dtype: str = "float32",
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype} must be one of {', '.join(DTYPES)}")
        for name, value in (("decode_batch", decode_batch), ("tile_above", tile_above)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        self.path = path
        self.scaling_factor = scaling_factor
        self.sha256 = sha256
        self.cached = cached
        self.decode_batch = decode_batch
        self.tile_above = tile_above
        self.dtype = dtype
        try:
            self.config = self._open().config("vae")
        except ModuleNotFoundError as error:
            raise ValueError(
                f"an autoencoder needs diffusers, which cannot be imported ({error}): "
                f"pip install 'sturdy-diffusion[latent]'"
            ) from error
        self.channels: int = self.config["latent_channels"]
        if channels not in (None, self.channels):
            raise ValueError(
                f"channels={channels} must be {self.channels}, as the autoencoder {path} has; "
                f"null takes its number"
            )
        self.factor = 2 ** (len(self.config["block_out_channels"]) - 1)
        self.smallest = 2 * self.factor  # group norms refuse a single position
        self._autoencoder: nn.Module | None = None
        self._sha256: str | None = None  # of the weights that were found first

    @override
    def shape(self, size: int) -> tuple[int, int, int]:
        """Return ``(c, size / factor, size / factor)``.

        Raises:
            ValueError: the factor does not divide ``size``.
        """
        side, rest = divmod(size, self.factor)
        if rest or not side:
            near = max(1, round(size / self.factor)) * self.factor
            raise ValueError(
                f"image_size={size} must be a multiple of {self.factor}, by which the autoencoder "
                f"makes images smaller: image_size={near}"
            )
        return self.channels, side, side

    @override
    def image_size(self, image: Tensor) -> tuple[int, int]:
        factor = self.factor if self._are_moments(image) else 1
        return factor * image.shape[2], factor * image.shape[3]

    @override
    def encode(self, image: Tensor, draws: Draws | None) -> Tensor:
        """Return latents ``(b, c, h / factor, w / factor)``, float32.

        Args:
            image: pixels ``(b, 3, h, w)`` in [-1, 1], or their ``moments`` ``(b, 2 c, ...)``.
            draws: of eps; None gives the mean.
        """
        if self._are_moments(image):
            moments = image
        else:
            # The bits depend on the number of images that are encoded together.
            moments = torch.cat([self.moments(one) for one in image.split(1)])
        mean, std = moments.chunk(2, dim=1)
        scale, shift = self._scale_and_shift(mean)
        if draws is not None:
            mean = mean + std * draws.normal("latent", mean.shape[1:]).to(mean)
        return (mean - shift) * scale

    @torch.no_grad()
    def moments(self, image: Tensor) -> Tensor:
        """Return mean and standard deviation of the latent, ``(1, 2 c, h, w)``, float32.

        Args:
            image: one image, ``(1, 3, h, w)`` in [-1, 1].

        Raises:
            ValueError: they are not finite.
        """
        with torch.autocast(image.device.type, enabled=False):
            autoencoder = self._load(image.device)
            autoencoder.disable_tiling()
            latent = autoencoder.encode(image.to(DTYPES[self.dtype])).latent_dist
            moments: Tensor = torch.cat([latent.mean, latent.std], dim=1).float()
        if not moments.isfinite().all():
            raise ValueError(
                f"the autoencoder {self.path} gives numbers that are not finite in "
                f"dtype={self.dtype}; float32 has room for all"
            )
        return moments

    @override
    @torch.no_grad()
    def decode(self, x0: Tensor) -> Tensor:
        scale, shift = self._scale_and_shift(x0)
        latents = (x0 / scale + shift).to(DTYPES[self.dtype])
        with torch.autocast(x0.device.type, enabled=False):
            autoencoder = self._load(x0.device)
            self._set_tiles(autoencoder, max(x0.shape[2:]))
            parts = [autoencoder.decode(part).sample for part in latents.split(self.decode_batch)]
        return torch.cat(parts).float().clamp(-1, 1)

    @override
    def key(self) -> str:
        """Return a hash of the autoencoder's weights, its config and ``dtype``.

        Raises:
            ValueError: the weights are not those of ``sha256``.
        """
        if self._sha256 is None:
            self._check(self._open().sha256("vae"))
        config = {k: v for k, v in self.config.items() if k not in NOT_IN_KEY}
        primitives = json.dumps([self._sha256, config, self.dtype], sort_keys=True)
        return hashlib.sha256(primitives.encode()).hexdigest()

    @override
    def release(self) -> None:
        if self._autoencoder is not None:
            self._autoencoder.to("cpu")  # not read anew for the next grid: the file may be away
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.empty_cache()

    def __getstate__(self) -> dict[str, Any]:
        """Copy and pickle without the autoencoder, which the copy loads for itself."""
        return self.__dict__ | {"_autoencoder": None}

    def _are_moments(self, image: Tensor) -> bool:
        return bool(image.shape[1] == 2 * self.channels)

    def _open(self) -> Base:
        return open_autoencoder(self.path, self.scaling_factor)

    def _load(self, device: torch.device) -> Any:
        """Return the autoencoder on ``device``."""
        if self._autoencoder is None:
            opened = self._open()
            self._check(opened.sha256("vae"))
            autoencoder = opened.build("vae", DTYPES[self.dtype])
            self._autoencoder = autoencoder.requires_grad_(False)
        return self._autoencoder.to(device)

    def _check(self, found: str) -> None:
        """Refuse weights that are not the expected ones, or not those that were loaded before."""
        expected = self._sha256 or self.sha256
        if expected not in (None, found):
            raise ValueError(
                f"path={self.path} holds other weights than expected: their sha256 is {found}, not "
                f"{expected}. Give the path of the autoencoder that the run began with"
            )
        self._sha256 = found

    def _scale_and_shift(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return scale and shift, ``(c or 1, 1, 1)``, as in the pipelines of diffusers."""
        config = self.config
        scale = like.new_tensor([config["scaling_factor"]])
        shift = like.new_tensor([config["shift_factor"] or 0.0])
        if config["latents_mean"] and config["latents_std"]:
            scale = scale / like.new_tensor(config["latents_std"])
            shift = like.new_tensor(config["latents_mean"])
        return scale[:, None, None], shift[:, None, None]

    def _set_tiles(self, autoencoder: Any, side: int) -> None:
        """Decode latents of ``side`` positions in tiles if they are large."""
        # Tiles overlap by a quarter, which must be a whole number of positions.
        tile = max(4, self.tile_above // self.factor // 4 * 4)
        autoencoder.use_tiling = side * self.factor > self.tile_above
        autoencoder.tile_latent_min_size = tile
        autoencoder.tile_sample_min_size = tile * self.factor
