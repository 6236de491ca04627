"""Power-function averages in closed form, and any length put together from snapshots of two."""

import math

import pytest
import torch
from torch import nn

import sturdy.renames  # noqa: F401  (fills in the names of older versions)
from exact_resume.checkpoint.store import CheckpointLoadError, assert_primitive
from sturdy.training.ema import EMA, PowerEMA
from sturdy.training.ema_profiles import FLATTEST, Profile, fit, gamma, length, profile_dot
from sturdy.training.ema_snapshots import load, posthoc_ema, reconstruct, snapshot, write


class Network(nn.Module):
    """Four weights, and a buffer that counts."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def go(self, step):
        """To where the trajectory is after ``step`` updates: a line, a curve, a swing and a
        constant.
        """
        x = step / 1000
        self.weight.data.copy_(torch.tensor([x, math.exp(-3 * x), math.sin(7 * x), 1.0]))
        self.count.fill_(step)
        return self


def averaged(end, every=0, start=None, **options):
    """The averages after ``end`` steps, and their snapshots."""
    network, taken = Network(), []
    ema = start or PowerEMA(network.go(0), **options)
    for step in range(1, end + 1):
        ema.update(network.go(step), step - 1)
        if every and step % every == 0:
            held = snapshot(ema, step)
            taken.append(
                held
                | {"averages": [{k: v.clone() for k, v in a.items()} for a in held["averages"]]}
            )
    return ema, taken


@pytest.mark.parametrize(
    ("std", "exponent"), [(0.05, 16.972199), (0.10, 6.937204), (FLATTEST, 0.0)]
)
def test_the_exponent_of_a_length(std, exponent):
    assert gamma(std) == pytest.approx(exponent, abs=1e-6)
    assert length(gamma(std)) == pytest.approx(std, rel=1e-12)


@pytest.mark.parametrize("std", [0.0, -0.1, 0.3])
def test_what_is_no_length(std):
    with pytest.raises(ValueError, match=r"an EMA of length .* at most 0\.2887"):
        gamma(std)


@pytest.mark.parametrize(("std", "share"), [(0.05, 0.947291), (0.10, 0.888108)])
def test_of_a_line_it_is_a_constant_share(std, share):
    """theta(t) = t: (gamma + 1) / (gamma + 2) t in the limit of small steps."""
    g = gamma(std)
    assert (g + 1) / (g + 2) == pytest.approx(share, abs=1e-6)
    model = nn.Linear(1, 1, bias=False).double()
    ema = PowerEMA(model, stds=[std], std=std)
    for step in range(4000):
        model.weight.data.fill_(step + 0.5)  # the middle of the update's bin
        ema.update(model, step)
    assert ema.model.weight.item() / 4000 == pytest.approx(share, abs=1e-6)


def test_each_average_is_the_weighted_sum_of_its_bins():
    """After T updates, weights of update t count (t^(gamma + 1) - (t - 1)^(gamma + 1)) / T^(gamma +
    1).
    """
    ema, _ = averaged(50, stds=[0.05, 0.1, 0.2], std=0.1)
    assert ema.stds == [0.1, 0.05, 0.2]
    trajectory = torch.stack([Network().go(step).weight.detach() for step in range(1, 51)]).double()
    for network, std in zip(ema.networks(), ema.stds, strict=True):
        bins = (torch.arange(51, dtype=torch.float64) / 50) ** (gamma(std) + 1)
        assert torch.allclose(network.weight.double(), bins.diff() @ trajectory, atol=1e-6)
        assert network.count == 50
    assert ema.model.weight is ema.networks()[0].weight


def test_entered_anywhere_it_is_the_same():
    """All there is to know is in the state and the step."""
    whole, _ = averaged(30)
    half, _ = averaged(13)
    other = PowerEMA(Network().go(999))
    other.load_state_dict(half.state_dict())
    for step in range(14, 31):
        other.update(Network().go(step), step - 1)
    assert all(
        torch.equal(a, b)
        for a, b in zip(whole.state_dict().values(), other.state_dict().values(), strict=True)
    )


def test_lengths_that_make_no_sense():
    with pytest.raises(ValueError, match=r"stds=\[0\.05, 0\.05\] must differ"):
        PowerEMA(Network(), stds=[0.05, 0.05], std=0.05)
    with pytest.raises(ValueError, match=r"contain std=0\.2"):
        PowerEMA(Network(), std=0.2)


def test_the_product_of_two_profiles_is_its_integral():
    a, b = Profile(gamma(0.1), 300), Profile(gamma(0.05), 200)
    tau = (
        torch.arange(200_000, dtype=torch.float64) + 0.5
    ) / 1000  # up to 200, where the second ends
    p, q = (
        (profile.gamma + 1) * (tau / profile.step) ** profile.gamma / profile.step
        for profile in (a, b)
    )
    assert (
        profile_dot(a, b)
        == profile_dot(b, a)
        == pytest.approx(float((p * q).sum() / 1000), rel=1e-6)
    )


@pytest.mark.parametrize("std", [0.04, 0.07, 0.15, 0.2])
@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.float32, 2e-3), (torch.float16, 2e-3), (torch.bfloat16, 6e-3)]
)
def test_any_length_from_snapshots_of_two(std, dtype, error):
    direct, _ = averaged(1000, stds=[std], std=std)
    _, taken = averaged(1000, every=50)
    taken = [
        t | {"averages": [{k: v.to(dtype) for k, v in a.items()} for a in t["averages"]]}
        for t in taken
    ]
    found = reconstruct(taken, std)
    assert (found["weight"] - direct.model.weight).abs().max() < error
    assert found["weight"].dtype == torch.float32
    assert found["count"] == 1000
    nearest, _ = averaged(1000, stds=[0.05, 0.1], std=min((0.05, 0.1), key=lambda s: abs(s - std)))
    assert (
        nearest.model.weight - direct.model.weight
    ).abs().max() > 2e-3  # the control: it is another average


def test_a_length_that_is_tracked_comes_back_exactly():
    ema, taken = averaged(200, every=50)
    for std, network in zip(ema.stds, ema.networks(), strict=True):
        assert torch.equal(reconstruct(taken, std)["weight"], network.weight)


def test_a_length_out_of_reach_is_refused():
    _, taken = averaged(100, every=100)
    with pytest.raises(
        ValueError, match=r"length 0\.25 at step 100 .* from 1 snapshots .* 104% off"
    ):
        reconstruct(taken, 0.25)


def test_the_fit_tells_how_far_off_it_is():
    profiles = [Profile(gamma(std), step) for std in (0.05, 0.1) for step in range(100, 1001, 100)]
    wanted = Profile(gamma(0.15), 1000)
    coefficients, error = fit(profiles, wanted)
    assert coefficients.sum() == pytest.approx(1)
    tau = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100

    def values(profile):
        inside = tau <= profile.step
        return inside * (profile.gamma + 1) * (tau / profile.step) ** profile.gamma / profile.step

    off = values(wanted) - sum(c * values(p) for c, p in zip(coefficients, profiles, strict=True))
    assert error == pytest.approx(float(off.norm() / values(wanted).norm()), rel=1e-2)
    assert 0 < error < 0.05


def test_a_file_holds_the_averages_and_nothing_that_runs(tmp_path):
    ema, _ = averaged(70)
    path = write(snapshot(ema, 70), tmp_path / "ema")
    assert [p.name for p in path.parent.iterdir()] == ["step-00000070.ckpt"]
    assert_primitive(torch.load(path, weights_only=True), "snapshot")
    found = load(path)
    assert (found["step"], found["stds"]) == (70, [0.1, 0.05])
    for average, network in zip(found["averages"], ema.networks(), strict=True):
        assert torch.equal(average["weight"], network.weight)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointLoadError, match=r"step-00000070\.ckpt is broken"):
        load(path)


def test_a_file_of_an_older_version_has_todays_names(tmp_path):
    old = {"backbone.place.0.weight": torch.ones(2)}
    path = tmp_path / "step-00000010.ckpt"
    torch.save({"step": 10, "stds": [0.1], "averages": [old], "buffers": {}}, path)
    assert list(load(path)["averages"][0]) == ["backbone.pos_embed.0.weight"]


def test_a_checkpoint_counts_as_the_last_snapshot_and_later_ones_do_not(tmp_path):
    ema, taken = averaged(230, every=50)
    for t in (*taken, taken[0] | {"step": 300}):
        write(t, tmp_path)
    expected = reconstruct([*taken, snapshot(ema, 230)], 0.15)
    assert torch.equal(posthoc_ema(0.15, ema, 230, tmp_path)["weight"], expected["weight"])
    assert torch.equal(
        posthoc_ema(0.05, ema, 230, tmp_path / "none")["weight"], ema.extra_averages[0].weight
    )
    with pytest.raises(ValueError, match="trained with ema=power"):
        posthoc_ema(0.15, EMA(Network()), 230, tmp_path)
