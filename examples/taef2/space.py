"""The latents of TAEF2, a pretrained autoencoder, as a space.

x_0 = (encoder((image + 1) / 2) - mean) / std,    image = 2 decoder(std x_0 + mean) - 1
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from typing_extensions import override

from exact_resume.randomness import Draws
from examples.taef2.network import LATENT_CHANNELS, make_decoder, make_encoder
from sturdy.diffusion.space import Space

FILES = ("encoder.safetensors", "decoder.safetensors")
FACTOR = 8  # by which latents are smaller than images
SOURCE = "the public repository madebyollin/taesd has the weights of TAEF2"


class TAEF2(Space):
    """The latents of TAEF2: 32 channels, an eighth of the side of the image.

    An image has one latent: nothing is sampled. The network computes in float32.

    Args:
        path: the folder with ``encoder.safetensors`` and ``decoder.safetensors``.
        mean: of the latents, one number a channel.
        std: of the latents, one number a channel; so that x_0 has a standard deviation of about 1.
        channels: of x_0, which are 32; the backbone's config reads it as ``${space.channels}``.
        cached: whether training encodes every image once, before it begins.

    Raises:
        ValueError: a file is missing or is not what it should be, or an argument is wrong.
    """

    clip = None
    smallest = FACTOR

    def __init__(
        self,
        *,
        path: str,
        mean: Sequence[float],
        std: Sequence[float],
        channels: int = LATENT_CHANNELS,
        cached: bool = True,
    ) -> None:
        if channels != LATENT_CHANNELS:
            raise ValueError(f"channels={channels} must be {LATENT_CHANNELS}, as TAEF2 has")
        for name, numbers in (("mean", mean), ("std", std)):
            if len(numbers) != channels:
                raise ValueError(f"{name}= must be {channels} numbers, not {len(numbers)}")
        if min(std) <= 0:
            raise ValueError(f"std= must be above 0, and the smallest is {min(std)}")
        self.channels = channels
        self.cached = cached
        self.mean = torch.tensor(mean)[:, None, None]
        self.std = torch.tensor(std)[:, None, None]
        with torch.device("meta"):  # without weights: no random numbers are drawn
            self.encoder = make_encoder()
            self.decoder = make_decoder()
        digest = hashlib.sha256()
        for network, name in zip((self.encoder, self.decoder), FILES, strict=True):
            digest.update(load_weights(network, Path(path).expanduser() / name))
        self.sha256 = digest.hexdigest()

    @override
    def shape(self, size: int) -> tuple[int, int, int]:
        if size % FACTOR:
            raise ValueError(f"image_size={size} must be a multiple of {FACTOR}")
        return self.channels, size // FACTOR, size // FACTOR

    @override
    def encode(self, image: Tensor, draws: Draws | None) -> Tensor:
        """Return x_0 of pixels ``(b, 3, h, w)``, or of cached moments ``(b, 64, h / 8, w / 8)``."""
        if image.shape[1] == 2 * self.channels:
            moments = image
        else:  # one at a time: the last bits depend on how many images are encoded together
            moments = torch.cat([self.moments(one) for one in image.split(1)])
        latent, _ = moments.chunk(2, dim=1)
        return (latent - self.mean.to(latent)) / self.std.to(latent)

    @torch.no_grad()
    def moments(self, image: Tensor) -> Tensor:
        """Return the latent of one image ``(1, 3, h, w)`` and its standard deviation, which is 0.

        The two are the channels of ``(1, 64, h / 8, w / 8)``; training keeps them in its cache.
        """
        with torch.autocast(image.device.type, enabled=False):
            latent = self.encoder.to(image.device)(image.float() / 2 + 0.5)
        return torch.cat([latent, torch.zeros_like(latent)], dim=1)

    @override
    @torch.no_grad()
    def decode(self, x0: Tensor) -> Tensor:
        latent = x0.float() * self.std.to(x0.device) + self.mean.to(x0.device)
        with torch.autocast(x0.device.type, enabled=False):
            image: Tensor = self.decoder.to(x0.device)(latent)
        return (2 * image - 1).clamp(-1, 1)

    @override
    def key(self) -> str:
        """Return the SHA-256 of the two files."""
        return self.sha256

    def release(self) -> None:
        """Do nothing: training calls this when all images are encoded, and TAEF2 is small."""


def load_weights(network: nn.Module, file: Path) -> bytes:
    """Fill ``network`` with the weights of ``file``; return the file's content.

    Raises:
        ValueError: the file is missing, incomplete, or holds another network.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        content = file.read_bytes()
        weights = load(content)
    except FileNotFoundError:
        raise ValueError(f"path={file.parent} has no {file.name}; {SOURCE}") from None
    except SafetensorError as error:
        raise ValueError(
            f"path={file.parent}: {file.name} is incomplete or no safetensors file ({error}); "
            f"{SOURCE}"
        ) from None
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    if found != expected:
        name = sorted(found.items() ^ expected.items())[0][0]
        raise ValueError(
            f"path={file.parent}: {file.name} is not TAEF2's: {name} is "
            f"{found.get(name, 'missing')} and must be {expected.get(name, 'left out')}; {SOURCE}"
        )
    network.load_state_dict({name: w.float() for name, w in weights.items()}, assign=True)
    network.eval().requires_grad_(False)
    return content
