"""What pictures are compared in: features, uint8 ``(b, 3, h, w)`` -> float32 ``(b, d)``.

``Embedded`` needs no download. The others need a file of weights, which they say how to get.
Distances in different features cannot be compared, and only those in Inception's are called FID.
"""

import hashlib
import warnings
from abc import ABC, abstractmethod
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from sturdy.encoders.cached import cached
from sturdy.encoders.network import VERSION, Network, Tell, embed, fit


class Features(ABC):
    """The contract: ``prepare`` once, then call.

    Attributes:
        name: the option, as chosen in the config.
        distance: what a Fréchet distance in them is called.
        key: primitives that they are a function of, beside the data they were prepared on.
    """

    name: str
    distance = "fd"
    key: tuple[object, ...]

    @abstractmethod
    def prepare(
        self,
        pictures: Tensor,
        labels: Tensor,
        classes: int,
        *,
        data: tuple[object, ...],
        folder: Path,
        tell: Tell,
    ) -> None:
        """Get ready for the data at hand.

        Args:
            pictures, labels: the training images, uint8 ``(n, 3, h, w)``, and their classes
                ``(n,)``.
            classes: how many there are; 0 for none.
            data: primitives that tell these images from all others.
            folder: for what takes time to make.
            tell: told ``(done, total)``.
        """

    @abstractmethod
    def __call__(self, pictures: Tensor) -> Tensor:
        """Features ``(b, d)`` of uint8 pictures ``(b, 3, h, w)``."""

    def of(self, pictures: Tensor) -> Tensor:
        """Features ``(n, d)`` of any number of pictures, on the CPU."""
        return embed(self, pictures)

    def kept(self, pictures: Tensor, *, data: tuple[object, ...], folder: Path) -> Tensor:
        """As ``of``, kept in ``folder`` for the next time; ``data`` tells these pictures from all
        others.
        """
        depends = (self.name, *self.key, *data)
        return cached(
            folder, f"{self.name}-features", depends, lambda: {"features": self.of(pictures)}
        )["features"]


class Embedded(Features):
    """Those of a network trained on the images at hand: to name the class, if there are classes,
    and to tell each
    image from the others. It is kept, and made again when the images or ``VERSION`` change.

    Args:
        seen: pictures to train on, repetitions counted.

    Raises:
        ValueError: if that is less than one.
    """

    name = "embedded"

    def __init__(self, *, seen: int = 20_000) -> None:
        if seen < 1:
            raise ValueError(
                f"features.seen={seen} must be 1 or more: pictures the network is trained on"
            )
        self.seen, self.key = seen, (VERSION, seen)

    def prepare(
        self,
        pictures: Tensor,
        labels: Tensor,
        classes: int,
        *,
        data: tuple[object, ...],
        folder: Path,
        tell: Tell,
    ) -> None:
        questions = {"class": (labels, classes)} if classes > 1 else {}

        def make() -> dict[str, Tensor]:
            return fit(pictures, questions, contrast=True, seen=self.seen, tell=tell).state_dict()

        self.network = Network(
            pictures.shape[-1], {name: n for name, (_, n) in questions.items()}
        ).eval()
        self.network.load_state_dict(cached(folder, "embedded-network", (*self.key, *data), make))

    def __call__(self, pictures: Tensor) -> Tensor:
        return self.network(pictures)


class Inception(Features):
    """Those of FID: the last pool of Inception v3 as in Heusel et al. 2017, ``(b, 2048)``.

    Args:
        path: the TorchScript file that StyleGAN 2 and 3, EDM and clean-fid use, in which also the
            resizing is as there.

    Raises:
        ValueError: if it is not there, with the ways out.
    """

    name, distance = "inception", "fid"
    source = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"

    def __init__(self, *, path: str | None = None) -> None:
        self.file = there(
            path,
            f"features={self.name}",
            "features.path",
            f"download it once, 91 MB, from {self.source}",
        )
        self.key = (digest(self.file),)

    def prepare(self, *args: object, **options: object) -> None:
        self.network = script(self.file, f"features={self.name}")

    def __call__(self, pictures: Tensor) -> Tensor:
        return self.network(pictures, return_features=True)


class DINOv2(Features):
    """Those of DINOv2's class token (Oquab et al. 2023), which judge photographs as people do
    (Stein et al. 2023).

    Args:
        path: a TorchScript file: normalised pictures ``(b, 3, size, size)`` -> ``(b, d)``.
        size: of the pictures it takes.

    Raises:
        ValueError: if the file is not there, with the ways out.
    """

    name = "dinov2"
    way = (
        'make it once, where there is a network, by python -c "import torch; net = torch.hub.load('
        "'facebookresearch/dinov2', 'dinov2_vits14').eval(); "
        "torch.jit.trace(net, torch.rand(2, 3, 224, 224)).save('dinov2.pt')\""
    )

    def __init__(self, *, path: str | None = None, size: int = 224) -> None:
        self.file, self.size = there(path, f"features={self.name}", "features.path", self.way), size
        self.key = (digest(self.file), size)

    def prepare(self, *args: object, **options: object) -> None:
        self.network = script(self.file, f"features={self.name}")

    def __call__(self, pictures: Tensor) -> Tensor:
        return self.network(for_imagenet(pictures.float() / 255, self.size))


def for_imagenet(x: Tensor, size: int) -> Tensor:
    """Pictures ``(b, 3, h, w)`` in [0, 1] as ``(b, 3, size, size)``, normalised as networks for
    ImageNet want them.
    """
    x = F.interpolate(x, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], device=x.device)[
        :, :, None, None
    ]
    return (x - mean) / std


def there(path: str | None, option: str, key: str, way: str) -> Path:
    """The file that ``key=path`` gives to ``option``, such as ``features=inception``; ``way`` says
    how to get one.

    Raises:
        ValueError: if it is not there, with the ways out.
    """
    file = Path(path or "").expanduser()
    if path and file.is_file():
        return file
    missing = f"{key}={path} is not there" if path else f"{key} is not given"
    raise ValueError(
        f"{option} needs a file of weights, and {missing}: {way}, and give {key}=FILE. "
        f"Or use {option.partition('=')[0]}=embedded, which needs no download"
    )


def digest(file: Path) -> str:
    """SHA-256 of its content."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def script(file: Path, option: str) -> torch.jit.ScriptModule:
    """The network in a TorchScript file, in eval mode, on the CPU; raises ValueError if it holds
    none.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # TorchScript is deprecated, but what these weights are handed round in
            return torch.jit.load(file, map_location="cpu").eval()
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{option}: {file} is not a TorchScript file that can be read ({reason})"
        ) from None
