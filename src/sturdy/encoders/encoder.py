"""Frozen encoders, with whose maps a backbone's insides are aligned: ``(b, 3, h, w)`` in [-1, 1] ->
``(b, d, h', w')``.

``prepare`` makes one, once in the life of a run; afterwards its state says all about it, and is in
every checkpoint.
"""

import math
from abc import ABC, abstractmethod
from pathlib import Path

import torch
from torch import Tensor, nn

from sturdy.encoders.cached import cached
from sturdy.encoders.network import VERSION, Network, Tell, fit
from sturdy.encoders.weights import file_digest as digest
from sturdy.encoders.weights import for_imagenet
from sturdy.encoders.weights import load_torchscript as script
from sturdy.encoders.weights import require_file as there


class Encoder(nn.Module, ABC):
    """The contract: ``prepare`` or ``load_state_dict``, then call. It is always in eval mode.

    Attributes:
        channels: d.
        most: training images that ``prepare`` is to be handed; it gets fewer where there are fewer.
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
        """Get ready for the data at hand; arguments as of
        ``sturdy.evaluation.features.Features.prepare``.
        """

    @abstractmethod
    def forward(self, x0: Tensor) -> Tensor:
        """The map ``(b, d, h', w')`` of pictures ``(b, 3, h, w)`` in [-1, 1]."""

    def train(self, mode: bool = True) -> "Encoder":
        """Stay in eval mode whatever the parent does."""
        return super().train(False)


class Embedded(Encoder):
    """The last map of a small network that has learned to tell each image from the others (SimCLR),
    about 4 x 4.

    It is taken before its ReLU, where BatchNorm has about centred it: cosines of what is never
        negative are all high.

    Args:
        image_size: height and width of the images.
        seen: pictures to train on, repetitions counted.

    Raises:
        ValueError: if that is less than one.
    """

    def __init__(self, *, image_size: int, seen: int = 20_000) -> None:
        super().__init__()
        if seen < 1:
            raise ValueError(
                f"alignment.encoder.seen={seen} must be 1 or more: pictures the encoder is trained "
                f"on"
            )
        self.seen = self.most = seen
        self.trunk = _map(Network(image_size, {}))
        self.channels = Network.channels

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
        def make() -> dict[str, Tensor]:
            return _map(fit(pixels, {}, contrast=True, seen=self.seen, tell=tell)).state_dict()

        self.trunk.load_state_dict(
            cached(folder, "alignment-encoder", (VERSION, self.seen, *data), make)
        )

    def forward(self, x0: Tensor) -> Tensor:
        return self.trunk(x0)


class TorchScript(Encoder):
    """A network in a file, such as DINOv2 (Oquab et al. 2023), which REPA aligns with.

    Its weights are not copied into checkpoints, but their SHA-256 is: a run goes on with the same
    file, wherever it lies. Sampling needs no file.

    Args:
        path: a TorchScript file: pictures ``(b, 3, size, size)``, normalised like ImageNet, to a
            map ``(b, d, h', w')`` or to tokens ``(b, n, d)``, row by row and without a class token.
        channels: d.
        size: of the pictures it takes.
    """

    name = "alignment=torchscript"
    way = (
        'make it once, where there is a network, by python -c "import torch; net = torch.hub.load('
        "'facebookresearch/dinov2', 'dinov2_vits14').eval(); "
        "net.forward = lambda x: net.forward_features(x)['x_norm_patchtokens']; "
        "torch.jit.trace(net, torch.rand(2, 3, 224, 224)).save('dinov2.pt')\""
    )

    def __init__(self, *, path: str | None = None, channels: int = 384, size: int = 224) -> None:
        super().__init__()
        self.path, self.channels, self.size, self.most = path, channels, size, 0
        self.digest: Tensor
        self.register_buffer("digest", torch.zeros(32, dtype=torch.uint8))
        self.opened: dict[
            torch.device, torch.jit.ScriptModule
        ] = {}  # no submodule: it is not in the state

    def prepare(self, *args: object, **options: object) -> None:
        self.digest.copy_(_bytes(digest(self._file())))

    def forward(self, x0: Tensor) -> Tensor:
        """Raises ValueError, naming the file, if it is not there, not the one prepared, or gives
        neither.
        """
        x = for_imagenet((x0 + 1) / 2, self.size)
        network = self.opened.get(x.device) or self._open(x.device)
        with torch.jit.optimized_execution(
            False
        ):  # else the first calls of a process may round unlike later ones
            features = network(x)
        return as_map(features, x)

    def _open(self, device: torch.device) -> torch.jit.ScriptModule:
        file = self._file()
        if not torch.equal(_bytes(digest(file)), self.digest.cpu()):
            raise ValueError(
                f"alignment.encoder.path={file} is not the file that the run began with, whose "
                f"SHA-256 is "
                f"{bytes(self.digest.tolist()).hex()}. Give that one, or start another run with "
                f"name=..."
            )
        self.opened[device] = script(file, self.name).to(device)
        return self.opened[device]

    def _file(self) -> Path:
        return there(self.path, self.name, "alignment.encoder.path", self.way)


def as_map(features: Tensor, picture: Tensor) -> Tensor:
    """Tokens ``(b, n, d)``, row by row, as the map ``(b, d, h', w')`` of the picture's proportions;
    a map as it is.

    Raises:
        ValueError: if there is no such map.
    """
    if features.ndim == 4:
        return features
    height, width = picture.shape[2:]
    n = features.shape[1] if features.ndim == 3 else 0
    rows = round(math.sqrt(n * height / width))
    columns = round(math.sqrt(n * width / height))
    if not n or rows * columns != n:
        raise ValueError(
            f"features of shape {tuple(features.shape)} make no map of a picture of {height} x "
            f"{width}: they must be "
            f"(b, d, h, w), or (b, tokens, d) with a token for each square of the picture and none "
            f"besides"
        )
    return features.transpose(1, 2).unflatten(2, (rows, columns))


def _map(network: Network) -> nn.Sequential:
    """The convolutions, without the last ReLU and what pools after it; frozen."""
    return nn.Sequential(*list(network.trunk)[:-4]).requires_grad_(False).eval()


def _bytes(digest: str) -> Tensor:
    return torch.tensor(list(bytes.fromhex(digest)), dtype=torch.uint8)
