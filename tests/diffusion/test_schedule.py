"""Schedules against published closed forms, a second library, and the traps of devices and
dtypes.
"""

import copy
import math
import pickle

import pytest
import torch
from gaussian import SCHEDULES, derivatives

from sturdy.diffusion import (
    Cosine,
    Discrete,
    Linear,
    RectifiedFlow,
    ScaledLinear,
    Schedule,
    Shifted,
    VarianceExploding,
)

KNOTS = torch.arange(1, 1001, dtype=torch.float64) / 1000


def alpha_bar(schedule, t=KNOTS):
    return schedule(t)[0].square()


def test_alpha_bar_of_the_papers():
    linear, scaled, cosine = alpha_bar(Linear()), alpha_bar(ScaledLinear()), alpha_bar(Cosine())
    assert linear[0].item() == pytest.approx(0.9999, rel=1e-12)
    assert linear[-1].item() == pytest.approx(4.035830e-5, rel=1e-6)
    assert scaled[0].item() == pytest.approx(0.99915, rel=1e-12)
    assert scaled[-1].item() == pytest.approx(4.660095e-3, rel=1e-6)
    assert cosine[499].item() == pytest.approx(0.493843, rel=1e-5)
    assert cosine[-1].item() == pytest.approx(2.428735e-9, rel=1e-6)


def test_knots_are_the_products_of_the_betas():
    expected, product = [], 1.0
    for i in range(1000):
        product *= 1 - (1e-4 + i / 999 * (0.02 - 1e-4))
        expected.append(product)
    assert torch.allclose(
        alpha_bar(Linear()), torch.tensor(expected, dtype=torch.float64), rtol=1e-11, atol=0
    )


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (Linear(), {"beta_schedule": "linear"}),
        (
            ScaledLinear(),
            {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        ),
        (Cosine(), {"beta_schedule": "squaredcos_cap_v2"}),
    ],
)
def test_knots_equal_diffusers(ours, theirs):
    diffusers = pytest.importorskip("diffusers")
    table = diffusers.DDPMScheduler(**theirs).alphas_cumprod.double()  # computed in float32
    assert torch.allclose(alpha_bar(ours), table, rtol=2e-4, atol=0)


@pytest.mark.parametrize(
    ("schedule", "last"), [(Linear(), 129), (ScaledLinear(), 146), (Cosine(), 260)]
)
def test_last_index_with_snr_above_5(schedule, last):
    alpha, sigma = schedule(KNOTS)
    assert ((alpha / sigma).square() > 5).nonzero().max().item() == last


def test_log_alpha_bar_is_linear_between_knots():
    schedule = Linear()
    left, middle, right = (
        alpha_bar(schedule, KNOTS[:-1] + shift).log() for shift in (0, 0.0005, 0.001)
    )
    assert torch.allclose(middle, (left + right) / 2, rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "cosine", "shifted_cosine"])
def test_variance_is_preserved(name):
    alpha, sigma = SCHEDULES[name](torch.linspace(0, 1, 777, dtype=torch.float64))
    assert torch.allclose(
        alpha.square() + sigma.square(), torch.ones(777, dtype=torch.float64), atol=1e-14
    )


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_alpha_falls_and_sigma_rises(schedule):
    alpha, sigma = schedule(torch.linspace(0, 1, 3333, dtype=torch.float64))
    assert (alpha.diff() < 0).all() or (alpha == 1).all()
    assert (sigma.diff() > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_data_is_exact_and_the_dtype_stays(schedule, dtype):
    alpha, sigma = schedule(torch.zeros(2, dtype=dtype))
    assert alpha.tolist() == [1, 1]
    assert sigma.tolist() == [0, 0]
    assert alpha.dtype == sigma.dtype == dtype


def test_sigma_of_a_tiny_t_is_not_lost_to_rounding():
    """1 - alpha-bar would be 0 in float32 here; beta_0 t * 1000 is what is meant."""
    _, sigma = Linear()(torch.tensor([2.0**-24]))
    assert sigma.item() == pytest.approx(math.sqrt(1e-4 * 1000 * 2**-24), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_time_undoes_the_ratio(schedule, dtype):
    t = torch.tensor([2.0**-24, 1e-4, 0.02, 0.3, 0.77, 0.999, 1.0], dtype=dtype)
    alpha, sigma = schedule(t)
    back = schedule.time(sigma / alpha)  # infinite where alpha(1) is 0
    assert back.dtype == dtype
    assert torch.allclose(back, t, rtol=1e-4 if dtype == torch.float32 else 1e-6, atol=0)
    assert schedule.time(torch.tensor([1e30, float("inf")], dtype=dtype)).tolist() == [1, 1]
    assert schedule.time(torch.zeros(1, dtype=dtype)).item() < 1e-12


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_formulas_of_time_agree_with_the_bisection_they_replace(schedule):
    ratio = torch.logspace(-4, 4, 70, dtype=torch.float64)
    assert torch.allclose(schedule.time(ratio), Schedule.time(schedule, ratio), rtol=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_slope_is_the_derivative(schedule):
    """Against automatic differentiation, away from the knots of a table, where it jumps."""
    t = torch.tensor([0.0004, 0.02049, 0.5004, 0.9996], dtype=torch.float64)
    for ours, theirs in zip(schedule.slope(t), derivatives(schedule, t), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    assert all(slope.isfinite().all() for slope in schedule.slope(torch.tensor([2.0**-24, 1.0])))


def test_variance_exploding_is_nearly_even_in_the_papers_steps():
    schedule = VarianceExploding()
    sigma = schedule(torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64))[1].tolist()
    assert sigma[0] == 0
    assert sigma[-1] == pytest.approx(80, rel=1e-12)
    assert sigma[1:4] == pytest.approx([0.16975276, 2.515219, 17.527832], rel=0.02)


@pytest.mark.parametrize("factor", [0.5, 2, 4])
def test_shift_of_the_papers(factor):
    """Esser et al. 2024, eq. 23: t' = f t / (1 + (f - 1) t); Hoogeboom et al. 2023: log SNR - 2 log
    f.
    """
    t = torch.linspace(0.01, 1, 34, dtype=torch.float64)
    alpha, sigma = Shifted(RectifiedFlow(), image_size=32 * factor, base_size=32)(t)
    assert torch.allclose(sigma, factor * t / (1 + (factor - 1) * t))
    assert torch.allclose(alpha, 1 - sigma)
    for base in (Linear(), Cosine()):
        alpha, sigma = Shifted(base, image_size=32 * factor, base_size=32)(t)
        plain_alpha, plain_sigma = base(t)
        shift = 2 * (plain_alpha / plain_sigma).log() - 2 * (alpha / sigma).log()
        assert torch.allclose(shift, torch.full_like(t, 2 * math.log(factor)))


def test_shift_of_images_that_are_not_square():
    t = torch.linspace(0.01, 1, 34)
    square = Shifted(RectifiedFlow(), image_size=48)(t)
    for pair in ([48, 48], [32, 72]):  # as many pixels
        shifted = Shifted(RectifiedFlow(), image_size=pair)(t)
        assert all(torch.equal(a, b) for a, b in zip(square, shifted, strict=True))


def test_shift_equals_diffusers():
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    sigma = Shifted(RectifiedFlow(), image_size=96)(torch.arange(1000, 0, -1) / 1000)[1]
    assert torch.allclose(theirs.sigmas[:1000], sigma, atol=1e-6)


def test_no_shift_at_the_base_size():
    t = torch.rand(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for base in (RectifiedFlow(), Cosine()):
        for ours, plain in zip(Shifted(base, image_size=48, base_size=48)(t), base(t), strict=True):
            assert torch.allclose(ours, plain, atol=1e-14)


def test_what_cannot_be_shifted_is_refused():
    with pytest.raises(
        ValueError,
        match=r"for schedule=variance_exploding add log\(image_size / 32\) to objective.time",
    ):
        Shifted(VarianceExploding(), image_size=64)
    with pytest.raises(ValueError, match=r"image_size=0 and base_size=32 must be above 0"):
        Shifted(RectifiedFlow(), image_size=0)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_autocast_changes_no_bit(schedule):
    t = torch.rand(100, generator=torch.Generator().manual_seed(0))
    plain = schedule(t)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = schedule(t)
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


def test_tables_are_real_when_built_on_meta_or_with_another_default_dtype():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            built = Linear(), Cosine()
    finally:
        torch.set_default_dtype(before)
    for schedule, reference in zip(built, (Linear(), Cosine()), strict=True):
        assert torch.equal(alpha_bar(schedule), alpha_bar(reference))


def test_copies_and_pickles_are_the_same_schedule():
    for clone in (copy.deepcopy(Cosine()), pickle.loads(pickle.dumps(Cosine()))):
        assert torch.equal(alpha_bar(clone), alpha_bar(Cosine()))


def test_own_betas():
    alpha, _ = Discrete(torch.tensor([0.5, 0.5]))(torch.tensor([0.0, 0.5, 1.0]))
    assert alpha.square().tolist() == pytest.approx([1, 0.5, 0.25])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_gpu_agrees_and_its_table_serves_training_after_inference(schedule):
    t = torch.rand(100, generator=torch.Generator().manual_seed(0))
    schedule = copy.deepcopy(schedule)
    with torch.inference_mode():
        schedule(t.cuda())  # the table is copied to the device in here
    for ours, reference in zip(schedule(t.cuda()), schedule(t), strict=True):
        assert ours.device.type == "cuda"
        assert torch.allclose(ours.cpu(), reference, rtol=1e-6, atol=0)
        (ours * torch.ones(100, device="cuda", requires_grad=True)).sum().backward()
