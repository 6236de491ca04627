"""The example backbone for aligned images: its formula, its sizes, and older checkpoints of it."""

import pytest
import torch
from tiny import awake, dit
from torch.nn import functional as F

import sturdy.renames  # noqa: F401  (fills in the names of older versions)
from exact_resume.checkpoint.renames import rename_state
from examples.cars.backbone import AlignedDiT, GlobalMixer, cosines, spectrum


def aligned(**changes):
    sizes = {"width": 16, "depth": 2, "heads": 2, "global_units": 4, "image_size": 8}
    return AlignedDiT(**(sizes | changes))


def test_every_patch_depends_on_every_pixel():
    """Without blocks, and so without attention, a pixel of a DiT changes its own patch alone."""
    torch.manual_seed(0)
    backbone = awake(aligned(patch=2, depth=0)).eval()
    x, t = torch.randn(1, 3, 8, 8), torch.rand(1)
    moved = x.clone()
    moved[0, :, 5, 6] += 1
    assert F.max_pool2d((backbone(x, t) != backbone(moved, t)).float(), 2).all()


def test_without_the_mixer_it_is_the_dit():
    """The mixer is zero at the start; apart from it the weights have the same names and shapes."""
    torch.manual_seed(0)
    backbone = aligned()
    plain = awake(dit())
    missing, unexpected = backbone.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert all(name.startswith("token_features.") for name in missing)
    x, t = torch.randn(2, 3, 8, 8), torch.rand(2)
    assert torch.equal(backbone(x, t), plain(x, t))


def test_spectrum_has_each_wave_in_one_number():
    i = torch.arange(8) + 0.5
    wave = torch.cos(torch.pi * 3 * i / 8)[:, None] * torch.cos(
        torch.pi * 4 * i / 8
    )  # frequency 5, norm 4
    found = spectrum((wave / 4).expand(1, 3, 8, 8))
    expected = torch.zeros(1, 3, 8, 8)
    expected[0, 0, 3, 4] = 3**0.5 * 8 / (2 + 5)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    for n in (1, 3, 8):
        torch.testing.assert_close(cosines(n, like=i) @ cosines(n, like=i).T, torch.eye(n))


def test_the_mixer_is_the_formula_and_starts_at_zero():
    torch.manual_seed(0)
    mixer = GlobalMixer((3, 2, 2), 5, 8, units=4)
    x, c = torch.randn(2, 3, 2, 2), torch.randn(2, 8)
    assert not mixer(x, c).any()
    awake(mixer)
    modulation = c @ mixer.modulation.weight.T + mixer.modulation.bias
    scale, shift, scale2, shift2 = modulation.split(4, dim=1)
    z = spectrum(x).reshape(2, 12) @ mixer.in_proj.weight.T + mixer.in_proj.bias
    u = F.silu(z * (1 + scale) + shift)
    v = u + F.silu((u @ mixer.hidden.weight.T + mixer.hidden.bias) * (1 + scale2) + shift2)
    parts = (v @ mixer.out_proj.weight.T + mixer.out_proj.bias).chunk(5, dim=1)
    for token, part in enumerate(parts):
        expected = part @ mixer.expand.weight.T + mixer.expand.bias
        torch.testing.assert_close(mixer(x, c)[:, token], expected)


def test_it_is_for_one_size():
    with pytest.raises(ValueError, match=r"image_size=9 must be a multiple of patch=2"):
        aligned(image_size=9)
    with pytest.raises(ValueError, match=r"images of shape \(3, 8, 12\) do not fit"):
        aligned()(torch.zeros(1, 3, 8, 12), torch.zeros(1))


OLD_NAMES = {
    "pos_embed": "place",
    "token_features.in_proj": "whole.compare",
    "token_features.hidden": "whole.think",
    "token_features.modulation": "whole.modulation",
    "token_features.out_proj": "whole.tell",
    "token_features.expand": "whole.spread",
}


def test_checkpoints_of_older_versions_have_todays_names():
    """There the DiT had the mixer itself, as ``whole``."""
    weights = {}
    for name, value in aligned().state_dict().items():
        for new, old in OLD_NAMES.items():
            name = name.replace(new, old) if name.startswith(new) else name
        weights[f"denoiser.backbone.{name}"] = value
    dit_config = {"_target_": "sturdy.backbone.dit.DiT", "width": 16, "image_size": 8}
    state = rename_state({"state_dict": weights, "config": {"backbone": dit_config | {"whole": 4}}})
    today = {f"denoiser.backbone.{name}" for name in aligned().state_dict()}
    assert set(state["state_dict"]) == today
    assert state["config"]["backbone"] == {
        "_target_": "examples.cars.backbone.AlignedDiT",
        "width": 16,
        "global_units": 4,
        "image_size": 8,
    }
    plain = rename_state({"config": {"backbone": dit_config | {"whole": 0}}})["config"]["backbone"]
    assert plain == {"_target_": "sturdy.backbone.dit.DiT", "width": 16}
