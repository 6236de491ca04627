"""Frozen encoders, whose maps a backbone is aligned with: ``(b, c, h, w) -> (b, d, h', w')``.

``prepare`` is called once in a run. Afterwards the state of the encoder is complete, and is in
every checkpoint.
"""

import math
from abc import ABC, abstractmethod
from pathlib import Path

import torch
from torch import Tensor, nn
from typing_extensions import override

from sturdy.encoders.cached import cached
from sturdy.encoders.images import as_rgb
from sturdy.encoders.network import VERSION, Network, Tell, fit
from sturdy.encoders.weights import (
    file_digest,
    for_imagenet,
    load_torchscript,
    require_file,
)
from sturdy.image_size import ImageSize, height_and_width


class Encoder(nn.Module, ABC):
    """The contract: ``prepare`` or ``load_state_dict``, then call. It is always in eval mode.

    Attributes:
        channels: d.
        most: number of training images for ``prepare``; it gets fewer if there are fewer.
    """

    channels: int
    most: int

    @abstractmethod
    def prepare(
        self,
        pixels: Tensor,
        labels: Tensor,
        classes: int,
        *,
        data: tuple[object, ...],
        folder: Path,
        tell: Tell,
    ) -> None:
        """Train or load the encoder for a data set.

        Args:
            pixels: training images, uint8 ``(n, c, h, w)``.
            labels: their classes, ``(n,)`` int64.
            classes: number of classes.
            data: primitives that identify these images, for names of cached files.
            folder: for cached files.
            tell: called with (done, total).
        """

    @abstractmethod
    def forward(self, x0: Tensor) -> Tensor:
        """Return the map ``(b, d, h', w')`` of images ``(b, c, h, w)`` in [-1, 1]."""

    @override
    def train(self, mode: bool = True) -> "Encoder":
        """Stay in eval mode, whatever the mode of the parent."""
        return super().train(False)


class Embedded(Encoder):
    """The last map, about 4 x 4, of a small network trained to tell images apart (SimCLR).

    The map is taken before its ReLU, where BatchNorm has about centred it: cosines of numbers that
    are never negative are all high.

    Args:
        image_size: height and width of the images; one number for squares.
        seen: number of images to train on, with repetitions.

    Raises:
        ValueError: ``seen`` is less than one.
    """

    def __init__(self, *, image_size: ImageSize, seen: int = 20_000) -> None:
        super().__init__()
        if seen < 1:
            raise ValueError(f"seen={seen} must be 1 or more: images the encoder is trained on")
        self.seen = seen
        self.most = seen
        self.trunk = _map(Network(min(height_and_width(image_size)), {}))
        self.channels = Network.channels

    @override
    def prepare(
        self,
        pixels: Tensor,
        labels: Tensor,
        classes: int,
        *,
        data: tuple[object, ...],
        folder: Path,
        tell: Tell,
    ) -> None:
        def train() -> dict[str, Tensor]:
            network = fit(pixels, {}, contrast=True, seen=self.seen, tell=tell)
            return _map(network).state_dict()

        key = (VERSION, self.seen, *data)
        self.trunk.load_state_dict(cached(folder, "alignment-encoder", key, train))

    @override
    def forward(self, x0: Tensor) -> Tensor:
        return self.trunk(as_rgb(x0))


class TorchScript(Encoder):
    """A network in a file, such as DINOv2 (Oquab et al. 2023), which REPA aligns with.

    Its weights are not copied into checkpoints, but their SHA-256 is: a run continues with the same
    file, wherever it is. Sampling needs no file.

    Args:
        path: a TorchScript file: images ``(b, 3, size, size)``, normalised like ImageNet, to a map
            ``(b, d, h', w')`` or to tokens ``(b, n, d)``, row by row and without a class token.
        channels: d.
        size: height and width of its input.
    """

    name = "alignment=torchscript"
    how_to_get = (
        'make it once, on a machine with a network, by python -c "import torch; '
        "net = torch.hub.load('facebookresearch/dinov2', 'dinov2_vits14').eval(); "
        "net.forward = lambda x: net.forward_features(x)['x_norm_patchtokens']; "
        "torch.jit.trace(net, torch.rand(2, 3, 224, 224)).save('dinov2.pt')\""
    )

    def __init__(self, *, path: str | None = None, channels: int = 384, size: int = 224) -> None:
        super().__init__()
        self.path = path
        self.channels = channels
        self.size = size
        self.most = 0
        self.digest: Tensor
        self.register_buffer("digest", torch.zeros(32, dtype=torch.uint8))
        # by device; no submodules, as they are not in the state
        self.opened: dict[torch.device, torch.jit.ScriptModule] = {}

    @override
    def prepare(self, *args: object, **options: object) -> None:
        self.digest.copy_(_as_bytes(file_digest(self._file())))

    @override
    def forward(self, x0: Tensor) -> Tensor:
        """Return the map ``(b, d, h', w')`` of images ``(b, c, h, w)`` in [-1, 1].

        Raises:
            ValueError: the file does not exist, is not the one prepared, or returns no map.
        """
        x = for_imagenet((as_rgb(x0) + 1) / 2, self.size)
        network = self.opened.get(x.device) or self._open(x.device)
        # With optimisation the first calls of a process may round unlike later ones.
        with torch.jit.optimized_execution(False):
            features = network(x)
        return as_map(features, x)

    def _open(self, device: torch.device) -> torch.jit.ScriptModule:
        file = self._file()
        if not torch.equal(_as_bytes(file_digest(file)), self.digest.cpu()):
            raise ValueError(
                f"path={file} is not the file that the run began with, whose SHA-256 is "
                f"{bytes(self.digest.tolist()).hex()}. Give that one, or start another run with "
                f"name=..."
            )
        self.opened[device] = load_torchscript(file, self.name).to(device)
        return self.opened[device]

    def _file(self) -> Path:
        return require_file(self.path, self.name, "alignment.encoder.path", self.how_to_get)


def as_map(features: Tensor, image: Tensor) -> Tensor:
    """Return tokens ``(b, n, d)`` as a map ``(b, d, h', w')`` with the proportions of the image.

    Tokens are row by row. A map is returned unchanged.

    Raises:
        ValueError: the number of tokens makes no such map.
    """
    if features.ndim == 4:
        return features
    height, width = image.shape[2:]
    n = features.shape[1] if features.ndim == 3 else 0
    rows = round(math.sqrt(n * height / width))
    columns = round(math.sqrt(n * width / height))
    if not n or rows * columns != n:
        raise ValueError(
            f"features of shape {tuple(features.shape)} make no map of an image of {height} x "
            f"{width}: they must be (b, d, h, w), or (b, tokens, d) with one token for each square "
            f"of the image and no other"
        )
    return features.transpose(1, 2).unflatten(2, (rows, columns))


def _map(network: Network) -> nn.Sequential:
    """Return the convolutions, frozen, without the last ReLU and the layers after it."""
    return nn.Sequential(*list(network.trunk)[:-4]).requires_grad_(False).eval()


def _as_bytes(digest: str) -> Tensor:
    return torch.tensor(list(bytes.fromhex(digest)), dtype=torch.uint8)
