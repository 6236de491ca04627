"""Features by configuration: where the weights are not there one is told how to get them."""

import pytest
import torch

from exact_resume.randomness import generator
from sturdy.evaluation.features import DINOv2, Embedded, Inception


class Pool(torch.nn.Module):
    """Stands for Inception: resizes by itself, and gives features on request."""

    def forward(self, x: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        pooled = torch.nn.functional.adaptive_avg_pool2d(x.to(torch.float32), 2).flatten(1)
        return pooled if return_features else pooled[:, :1]


def silent(done, total):
    pass


def some(n=20):
    return torch.randint(256, (n, 3, 16, 16), generator=generator("some"), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("kind", "way"),
    [(Inception, "download it once, 91 MB, from https://"), (DINOv2, "torch.jit.trace(net")],
)
@pytest.mark.parametrize("path", [None, "nowhere.pt"])
def test_without_weights_one_is_told_the_ways_out(kind, way, path):
    with pytest.raises(ValueError, match="features=embedded") as told:
        kind(path=path)
    assert way in str(told.value)
    assert f"features={kind.name} needs a file of weights" in str(told.value)


def test_a_file_that_is_no_network_is_named(tmp_path):
    file = tmp_path / "weights.pt"
    file.write_bytes(b"<html>not found</html>")
    with pytest.raises(ValueError, match=r"weights.pt is not a TorchScript file"):
        Inception(path=str(file)).prepare()


@pytest.mark.filterwarnings("ignore")  # TorchScript is deprecated; the file of FID's weights is one
def test_a_network_in_a_file_gives_its_features(tmp_path):
    torch.jit.script(Pool()).save(str(tmp_path / "pool.pt"))
    features = Inception(path=str(tmp_path / "pool.pt"))
    features.prepare()
    assert features.distance == "fid"
    expected = torch.nn.functional.adaptive_avg_pool2d(some().float(), 2).flatten(1)
    assert torch.equal(features.extract(some()), expected)


@pytest.mark.filterwarnings("ignore")
def test_dinov2_gets_normalised_pictures_of_its_size(tmp_path):
    torch.jit.trace(torch.nn.Identity(), torch.rand(2, 3, 28, 28)).save(str(tmp_path / "same.pt"))
    features = DINOv2(path=str(tmp_path / "same.pt"), size=28)
    features.prepare()
    grey = features(torch.full((1, 3, 16, 16), 255, dtype=torch.uint8))
    assert grey.shape == (1, 3, 28, 28)
    assert grey[0, :, 14, 14].tolist() == pytest.approx(
        [0.515 / 0.229, 0.544 / 0.224, 0.594 / 0.225], rel=1e-4
    )


def test_embedded_is_made_once_for_the_data_and_for_its_options(tmp_path):
    labels, told = torch.arange(20) % 2, []

    def prepared(seen, *data):
        features = Embedded(seen=seen)
        told.clear()
        features.prepare(
            some(),
            labels,
            2,
            data=data,
            folder=tmp_path,
            tell=lambda done, total: told.append(done),
        )
        return features, bool(told)

    (first, made), (second, again) = prepared(100, "digest"), prepared(100, "digest")
    assert (made, again) == (True, False)
    assert torch.equal(first.extract(some()), second.extract(some()))
    assert prepared(200, "digest")[1]
    assert prepared(100, "other digest")[1]
    kept = first.extract_cached(some(), data=("digest", "training"), folder=tmp_path)
    assert torch.equal(kept, first.extract(some()))
    assert torch.equal(
        first.extract_cached(some()[:3], data=("digest", "training"), folder=tmp_path), kept
    )  # not computed
    with pytest.raises(ValueError, match=r"^seen=0 must be"):
        Embedded(seen=0)
