"""Features that images are compared in: uint8 ``(b, c, h, w)`` -> float32 ``(b, d)``.

``Embedded`` needs no download. The others need a file of weights, and say how to get it:
``EfficientNet`` from a package, the others from a file.
Distances in different features cannot be compared. Only those in Inception's are called FID.
"""

from abc import ABC, abstractmethod
from pathlib import Path

import torch
from torch import Tensor
from typing_extensions import override

from sturdy.encoders import efficientnet
from sturdy.encoders.cached import cached
from sturdy.encoders.images import as_rgb
from sturdy.encoders.network import VERSION, Network, Tell, embed, fit
from sturdy.encoders.weights import file_digest, for_imagenet, load_torchscript, require_file


class Features(ABC):
    """The contract: ``prepare`` once, then call.

    Attributes:
        name: the option, as chosen in the config.
        distance: the name of a Fréchet distance in them.
        sees: sentences that a report has beside every table of distances in them.
        batch: images at a time.
        key: primitives that they are a function of, beside the data of ``prepare``.
    """

    name: str
    distance = "fd"
    sees = ""
    batch = 250
    key: tuple[object, ...]

    @abstractmethod
    def prepare(
        self,
        images: Tensor,
        labels: Tensor,
        classes: int,
        *,
        data: tuple[object, ...],
        folder: Path,
        tell: Tell,
    ) -> None:
        """Prepare for a set of training images.

        Args:
            images: uint8 ``(n, c, h, w)``.
            labels: their classes ``(n,)``.
            classes: how many there are; 0 for none.
            data: primitives that identify the images.
            folder: for results that take time to compute.
            tell: called with ``(done, total)``.
        """

    @abstractmethod
    def __call__(self, images: Tensor) -> Tensor:
        """Return the features ``(b, d)`` of uint8 images ``(b, 3, h, w)``."""

    def extract(self, images: Tensor, *, tell: Tell = lambda done, total: None) -> Tensor:
        """Return the features ``(n, d)`` of any number of images, grey or RGB, on the CPU."""
        parts = []
        done = 0
        for part in images.split(self.batch):
            parts.append(embed(self, as_rgb(part), batch=self.batch))
            done += len(part)
            tell(done, len(images))
        return torch.cat(parts)

    def extract_cached(
        self,
        images: Tensor,
        *,
        data: tuple[object, ...],
        folder: Path,
        tell: Tell = lambda done, total: None,
    ) -> Tensor:
        """Extract features, or read them from ``folder``; ``data`` identifies the images."""
        depends = (self.name, *self.key, *data)

        def compute() -> dict[str, Tensor]:
            return {"features": self.extract(images, tell=tell)}

        return cached(folder, f"{self.name}-features", depends, compute)["features"]


class Embedded(Features):
    """Features of a small network that is trained on the training images.

    It learns to name the class, if there are classes, and to tell each image from the others. It
    is cached, and trained again when the images or ``VERSION`` change.

    Args:
        seen: images to train on, repetitions counted.

    Raises:
        ValueError: ``seen`` below 1.
    """

    name = "embedded"
    sees = (
        "They are those of a small network that was trained on these training images. They see "
        "large structure: colours, light, place and shape. Faint noise and small textures go "
        "unnoticed."
    )

    def __init__(self, *, seen: int = 20_000) -> None:
        if seen < 1:
            raise ValueError(f"seen={seen} must be 1 or more: images the network is trained on")
        self.seen = seen
        self.key = (VERSION, seen)

    @override
    def prepare(
        self,
        images: Tensor,
        labels: Tensor,
        classes: int,
        *,
        data: tuple[object, ...],
        folder: Path,
        tell: Tell,
    ) -> None:
        questions = {"class": (labels, classes)} if classes > 1 else {}

        def compute() -> dict[str, Tensor]:
            network = fit(images, questions, contrast=True, seen=self.seen, tell=tell)
            return network.state_dict()

        counts = {name: count for name, (_, count) in questions.items()}
        self.network = Network(min(images.shape[2:]), counts).eval()
        state = cached(folder, "embedded-network", (*self.key, *data), compute)
        self.network.load_state_dict(state)

    def __call__(self, images: Tensor) -> Tensor:
        """Return the features ``(b, d)`` of uint8 images ``(b, 3, h, w)``."""
        return self.network(images)


class EfficientNet(Features):
    """Features of EfficientNet-Lite0 (Tan & Le 2019), trained on ImageNet, ``(b, 1280)``.

    They are the layer before its classes. Images are scaled to 224 x 224 pixels.

    Raises:
        ValueError: if the package of weights is not installed, with how to get it.
    """

    name = "efficientnet"
    sees = (
        "They are those of a classifier of ImageNet's photographs (EfficientNet-Lite0), for which "
        "each image is scaled to 224 x 224 pixels. They see objects, textures, blur and faint "
        "noise. Images that are mirrored, a little shifted or tinted go almost unnoticed."
    )
    batch = 8  # a larger one is slower on a CPU: its maps do not fit the caches

    def __init__(self) -> None:
        file = efficientnet.find_weights()
        if file is None:
            raise ValueError(
                f"features={self.name} needs the weights of EfficientNet-Lite0, 17 MB: "
                f"{efficientnet.HOW_TO_GET}. Or use features=embedded, which needs no download"
            )
        self.file = file
        self.key = (efficientnet.VERSION, file_digest(file))

    @override
    def prepare(self, *args: object, **options: object) -> None:
        self.network = efficientnet.load_efficientnet(self.file)

    def __call__(self, images: Tensor) -> Tensor:
        """Return the features ``(b, 1280)`` of uint8 images ``(b, 3, h, w)``."""
        x = efficientnet.prepare_images(images)
        x = x.contiguous(memory_format=torch.channels_last)  # faster on a CPU
        return self.network.features(x)


class Inception(Features):
    """Features of FID: the last pool of Inception v3 as in Heusel et al. 2017, ``(b, 2048)``.

    Args:
        path: the TorchScript file that StyleGAN 2 and 3, EDM and clean-fid use; it also resizes as
            they do.

    Raises:
        ValueError: if it does not exist, with how to get it.
    """

    name = "inception"
    distance = "fid"
    sees = "They are those of FID: Inception v3, a classifier of ImageNet's photographs."
    source = (
        "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/"
        "inception-2015-12-05.pt"
    )

    def __init__(self, *, path: str | None = None) -> None:
        how_to_get = f"download it once, 91 MB, from {self.source}"
        self.file = require_file(path, f"features={self.name}", "features.path", how_to_get)
        self.key = (file_digest(self.file),)

    @override
    def prepare(self, *args: object, **options: object) -> None:
        self.network = load_torchscript(self.file, f"features={self.name}")

    def __call__(self, images: Tensor) -> Tensor:
        """Return the features ``(b, 2048)`` of uint8 images ``(b, 3, h, w)``."""
        return self.network(images, return_features=True)


class DINOv2(Features):
    """Features of DINOv2's class token (Oquab et al. 2023), for photographs.

    They agree with people's judgement of photographs (Stein et al. 2023).

    Args:
        path: a TorchScript file: normalised images ``(b, 3, size, size)`` -> ``(b, d)``.
        size: of the images that it takes.

    Raises:
        ValueError: if the file does not exist, with how to make it.
    """

    name = "dinov2"
    sees = "They are those of DINOv2, which was trained on photographs without labels."
    how_to_get = (
        'make it once, on a machine with a network, by python -c "import torch; net = '
        "torch.hub.load('facebookresearch/dinov2', 'dinov2_vits14').eval(); "
        "torch.jit.trace(net, torch.rand(2, 3, 224, 224)).save('dinov2.pt')\""
    )

    def __init__(self, *, path: str | None = None, size: int = 224) -> None:
        self.file = require_file(path, f"features={self.name}", "features.path", self.how_to_get)
        self.size = size
        self.key = (file_digest(self.file), size)

    @override
    def prepare(self, *args: object, **options: object) -> None:
        self.network = load_torchscript(self.file, f"features={self.name}")

    def __call__(self, images: Tensor) -> Tensor:
        """Return the features ``(b, d)`` of uint8 images ``(b, 3, h, w)``."""
        return self.network(for_imagenet(images.float() / 255, self.size))
