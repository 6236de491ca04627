"""Latents: what the autoencoder of diffusers says, one image at a time, scaled as pipelines do."""

import copy
import pickle

import pytest
import torch
from torch import nn

from exact_resume.randomness import Draws
from examples.tiny_sd.build import build
from sd_layouts import write_file
from sturdy.diffusion import Denoiser, Heun, RectifiedFlow, Velocity, sample
from tiny_vae import CHANNELS, FACTOR, write_vae

pytest.importorskip("diffusers")

from sturdy.pretrained.latents import Latents

IMAGES = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
DRAWS = Draws(7, range(3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("latents") / "vae"
    write_vae(path, scaling_factor=0.3, shift_factor=0.1)
    return path


@pytest.fixture(scope="module")
def autoencoder(folder):
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(folder)


@torch.no_grad()
def test_encodes_and_decodes_as_diffusers_does(folder, autoencoder):
    space = Latents(path=str(folder))
    noise = DRAWS.normal("latent", (CHANNELS, 4, 4))
    for i in range(3):
        latent = autoencoder.encode(IMAGES[i : i + 1]).latent_dist
        expected = (latent.mean + latent.std * noise[i] - 0.1) * 0.3
        assert torch.equal(space.encode(IMAGES, DRAWS)[i : i + 1], expected)
        mean = (latent.mode() - 0.1) * 0.3
        assert torch.equal(space.encode(IMAGES, None)[i : i + 1], mean)
    z = 5 * torch.randn(3, *space.shape(16))
    decoded = autoencoder.decode(z / torch.tensor(0.3) + torch.tensor(0.1)).sample
    assert torch.equal(space.decode(z), decoded.clamp(-1, 1))


def test_the_mean_and_deviation_of_channels_count_as_in_the_pipelines(tmp_path):
    mean, std = [0.1, -0.2, 0.3, 0.0], [0.5, 1.0, 2.0, 4.0]
    write_vae(tmp_path, latents_mean=mean, latents_std=std, scaling_factor=0.5)
    space = Latents(path=str(tmp_path))
    of_encoder = space.moments(IMAGES[:1])[:, :CHANNELS]
    rows = [(of_encoder[0, c] - mean[c]) * 0.5 / std[c] for c in range(CHANNELS)]
    z = space.encode(IMAGES[:1], None)
    assert torch.allclose(z[0], torch.stack(rows), atol=1e-6)
    plain = Latents(path=str(tmp_path))
    plain.config = plain.config | {"latents_mean": None, "scaling_factor": 1.0}
    assert torch.allclose(space.decode(z), plain.decode(of_encoder), atol=1e-5)


def test_moments_give_the_same_latents_as_pixels_bit_for_bit(folder):
    space = Latents(path=str(folder))
    moments = torch.cat([space.moments(image[None]) for image in IMAGES])
    assert moments.shape == (3, 2 * CHANNELS, 4, 4)
    assert moments.dtype == torch.float32
    assert torch.equal(space.encode(moments, DRAWS), space.encode(IMAGES, DRAWS))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(space.encode(IMAGES, DRAWS), space.encode(moments, DRAWS))


def test_draws_have_the_mean_and_the_deviation_of_the_moments(folder):
    space = Latents(path=str(folder))
    moments = space.moments(IMAGES[:1])
    n = 4096
    z = space.encode(moments.expand(n, -1, -1, -1), Draws(0, range(n))).double()
    mean, std = moments.double().chunk(2, 1)
    # Of standard normal numbers: mean and standard deviation have errors of n^-1/2 and (2n)^-1/2.
    errors = (z.mean(0) - (mean[0] - 0.1) * 0.3) / (0.3 * std[0]) * n**0.5
    assert errors.abs().max() < 5
    assert ((z.std(0) / (0.3 * std[0]) - 1) * (2 * n) ** 0.5).abs().max() < 5


def test_decoding_in_parts_and_in_tiles_equals_decoding_at_once(folder):
    z = torch.randn(5, CHANNELS, 8, 8)
    whole = Latents(path=str(folder), decode_batch=5).decode(z)
    parts = Latents(path=str(folder), decode_batch=2).decode(z)
    assert torch.allclose(whole, parts, atol=1e-5)
    tiled = Latents(path=str(folder), tile_above=16)
    images = tiled.decode(z)
    assert images.shape == whole.shape
    assert not torch.equal(images, whole), "tiles see no further than their edge"
    image = torch.rand(1, 3, 32, 32)
    assert torch.equal(tiled.moments(image), Latents(path=str(folder)).moments(image))


def test_samples_are_not_clipped(folder):
    class Large(nn.Module):
        """Says under rectified flow that x_0 is 3 everywhere."""

        def forward(self, x, t, label):
            return (x - 3) / t[:, None, None, None]

    denoiser = Denoiser(Large(), RectifiedFlow(), Velocity())
    space = Latents(path=str(folder))
    x0 = sample(Heun(4), denoiser, torch.randn(2, CHANNELS, 4, 4), clip=space.clip)
    assert torch.allclose(x0, torch.full_like(x0, 3), atol=1e-4)


def test_the_size_must_be_a_multiple(folder):
    space = Latents(path=str(folder), channels=4)
    assert space.shape(24) == (CHANNELS, 24 // FACTOR, 24 // FACTOR)
    with pytest.raises(ValueError, match=r"image_size=18 must be a multiple of 4.*image_size=16"):
        space.shape(18)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"channels": 8}, "channels=8 must be 4"),
        ({"dtype": "float64"}, "dtype=float64 must be one of float32, float16, bfloat16"),
        ({"decode_batch": 0}, "decode_batch=0 must be at least 1"),
        ({"path": "/nowhere/vae"}, "/nowhere/vae"),
    ],
)
def test_arguments_are_checked(folder, settings, message):
    with pytest.raises(ValueError, match=message):
        Latents(**({"path": str(folder)} | settings))


def test_the_key_is_of_weights_config_and_dtype(folder, tmp_path):
    key = Latents(path=str(folder)).key()
    write_vae(tmp_path / "moved", scaling_factor=0.3, shift_factor=0.1)
    assert Latents(path=str(tmp_path / "moved")).key() == key
    write_vae(tmp_path / "scaled", scaling_factor=0.4, shift_factor=0.1)
    write_vae(tmp_path / "other", seed=1, scaling_factor=0.3, shift_factor=0.1)
    keys = {Latents(path=str(tmp_path / name)).key() for name in ("scaled", "other")}
    keys |= {key, Latents(path=str(folder), dtype="bfloat16").key()}
    assert len(keys) == 4
    assert Latents(path=str(folder), cached=False, decode_batch=1, tile_above=64).key() == key


def test_a_pipeline_its_autoencoder_and_a_single_file_are_the_same(tmp_path):
    build(tmp_path / "sd")
    file = write_file(tmp_path / "sd", tmp_path / "sd.safetensors")
    paths = (tmp_path / "sd", tmp_path / "sd" / "vae", file)
    folder, *others = (Latents(path=str(path)) for path in paths)
    assert folder.shape(64) == (4, 8, 8)
    for other in others:
        assert other.key() == folder.key()
        assert torch.equal(other.encode(IMAGES, DRAWS), folder.encode(IMAGES, DRAWS))


def test_other_weights_are_refused_by_name(tmp_path):
    write_vae(tmp_path)
    space = Latents(path=str(tmp_path), sha256="0" * 64)
    for use in (space.key, lambda: space.encode(IMAGES, None)):
        with pytest.raises(
            ValueError, match=rf"path={tmp_path}.*sha256 is [0-9a-f]{{64}}, not 000"
        ):
            use()
    found = Latents(path=str(tmp_path))
    found.key()
    Latents(path=str(tmp_path), sha256=found._sha256).key()
    write_vae(tmp_path, seed=1)  # while the run goes on
    with pytest.raises(ValueError, match="holds other weights than expected"):
        found.decode(torch.randn(1, CHANNELS, 4, 4))


def test_a_truncated_file_is_refused_by_name(tmp_path):
    write_vae(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=str(tmp_path)):
        Latents(path=str(tmp_path)).key()


def test_what_is_not_finite_is_refused(tmp_path):
    autoencoder = write_vae(tmp_path)
    autoencoder.encoder.conv_in.weight.data *= 1e6
    autoencoder.save_pretrained(tmp_path)
    assert Latents(path=str(tmp_path)).moments(IMAGES[:1]).isfinite().all()
    with pytest.raises(ValueError, match=r"not finite in dtype=float16"):
        Latents(path=str(tmp_path), dtype="float16").moments(IMAGES[:1])


def test_it_computes_in_its_dtype_and_gives_float32(folder):
    space = Latents(path=str(folder), dtype="bfloat16")
    z = space.encode(IMAGES, None)
    assert z.dtype == space.decode(z).dtype == torch.float32
    exact = Latents(path=str(folder)).encode(IMAGES, None)
    assert not torch.equal(z, exact)
    assert torch.allclose(z, exact, atol=0.05)


def test_copies_load_the_autoencoder_again_and_what_was_released_needs_no_file(folder):
    space = Latents(path=str(folder))
    z = space.encode(IMAGES, None)
    pickled = pickle.dumps(space)
    assert len(pickled) < 10_000, "without the weights"
    for other in (copy.deepcopy(space), pickle.loads(pickled)):
        assert other._autoencoder is None
        assert torch.equal(other.encode(IMAGES, None), z)
    space.release()
    away = folder.rename(folder.with_name("away"))
    try:
        assert torch.equal(space.encode(IMAGES, None), z)
    finally:
        away.rename(folder)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_it_follows_the_device_of_its_tensors(folder):
    space = Latents(path=str(folder))
    on_cpu = space.encode(IMAGES, DRAWS)
    on_gpu = space.encode(IMAGES.cuda(), DRAWS)
    assert on_gpu.is_cuda
    assert torch.allclose(on_gpu.cpu(), on_cpu, atol=1e-2)
    assert space.decode(on_cpu).device.type == "cpu"
