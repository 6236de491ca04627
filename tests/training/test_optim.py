"""Learning rates in closed form, and the optimizer's state by name and back."""

import copy
import logging
from functools import partial

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn

from runs import ROOT
from sturdy.training.optim import (
    Constant,
    Cosine,
    InverseSquareRoot,
    Linear,
    WarmupStableDecay,
    parameter_groups,
    rate_change,
)
from sturdy.training.optimizer_state import (
    check_optimizer,
    names_in_order,
    state_by_index,
    state_by_name,
)
from tiny_module import fit, make, save


def test_constant_warms_up_and_stays():
    rate = Constant(warmup=4)
    assert [rate(step) for step in (0, 1, 2, 3, 4, 1000)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert Constant(warmup=0)(0) == 1


def test_linear_warms_up_and_comes_down_to_its_end():
    rate = Linear(max_steps=10, warmup=2, end=0.2)
    assert [rate(step) for step in (0, 1, 2)] == [0.5, 1, 1]
    assert rate(6) == pytest.approx(0.6)
    assert rate(10) == rate(11) == pytest.approx(0.2)
    assert Linear(max_steps=5, warmup=5)(4) == 1


def test_cosine_is_half_a_wave_from_the_warm_up_to_its_end():
    rate = Cosine(max_steps=12, warmup=4, end=0.2)
    assert [rate(step) for step in (0, 1, 2, 3, 4)] == [0.25, 0.5, 0.75, 1, 1]
    assert [rate(step) for step in (6, 8, 10)] == pytest.approx(
        [0.2 + 0.4 * (1 + c) for c in (0.5**0.5, 0, -(0.5**0.5))]
    )
    assert rate(12) == rate(50) == pytest.approx(0.2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
        torch.optim.SGD(network().parameters(), lr=1.0), 30
    )
    for step in range(30):
        assert Cosine(max_steps=30, warmup=0)(step) == pytest.approx(
            schedule.get_last_lr()[0], abs=1e-9
        )
        schedule.optimizer.step()
        schedule.step()


def test_inverse_square_root_is_flat_and_then_falls_for_ever():
    rate = InverseSquareRoot(warmup=4, flat=100)
    assert [rate(step) for step in (0, 3, 50, 100)] == [0.25, 1, 1, 1]
    assert [rate(step) for step in (400, 900, 10_000)] == pytest.approx([1 / 2, 1 / 3, 1 / 10])
    with pytest.raises(ValueError, match=r"flat=0 must be"):
        InverseSquareRoot(flat=0)


def test_warmup_stable_decay_falls_only_at_the_end():
    rate = WarmupStableDecay(max_steps=1000, warmup=4, decay=0.2, end=0.1)
    assert [rate(step) for step in (0, 3, 4, 500, 800)] == [0.25, 1, 1, 1, 1]
    assert [rate(step) for step in (808, 850, 900, 1000)] == pytest.approx(
        [1 - 0.9 * x**0.5 for x in (0.04, 0.25, 0.5, 1)]
    )
    assert rate(2000) == pytest.approx(0.1)
    assert WarmupStableDecay(max_steps=10, warmup=0, decay=0.0)(9) == 1
    with pytest.raises(ValueError, match=r"decay=20 is a share"):
        WarmupStableDecay(max_steps=10, decay=20)


@pytest.mark.parametrize(
    "name", ["constant", "linear", "cosine", "inverse_sqrt", "warmup_stable_decay"]
)
def test_each_is_a_config_whose_end_is_that_of_the_run(name):
    file = OmegaConf.load(ROOT / "conf" / "learning_rate" / f"{name}.yaml")
    rate = instantiate(
        OmegaConf.create({"trainer": {"max_steps": 500}, "learning_rate": file}).learning_rate
    )
    assert rate(0) == 0.01
    assert rate(100) == 1
    assert rate(500) == (1 if name in ("constant", "inverse_sqrt") else pytest.approx(0, abs=1e-12))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(16, 2))


def trained(steps=3, **options):
    model = network()
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=1e-2, **options)
    for step in range(steps):
        model(torch.full((2, 3, 4, 4), float(step + 1))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def test_only_matrices_and_kernels_decay():
    model = network()
    decayed, plain = parameter_groups(model)
    assert [p.ndim for p in decayed["params"]] == [4, 2]
    assert {p.ndim for p in plain["params"]} == {1}
    assert plain["weight_decay"] == 0
    model[0].requires_grad_(False)
    assert sum(len(g["params"]) for g in parameter_groups(model)) == 4


def test_state_by_name_and_back_is_exact():
    model, optimizer = trained(amsgrad=True)
    names = names_in_order(model, optimizer.param_groups)
    assert names == ["0.weight", "3.weight", "0.bias", "1.weight", "1.bias", "3.bias"]
    state = optimizer.state_dict()
    named = state_by_name(copy.deepcopy(state), names)
    assert set(named["state"]) == set(names)
    assert named["param_groups"][0]["params"] == ["0.weight", "3.weight"]

    other = torch.optim.AdamW(parameter_groups(network()), lr=1e-2, amsgrad=True)
    other.load_state_dict(state_by_index(named, names))
    again = other.state_dict()
    assert again["param_groups"] == state["param_groups"]
    assert again["state"].keys() == state["state"].keys()
    assert all(
        torch.equal(again["state"][i][k], v)
        for i, values in state["state"].items()
        for k, v in values.items()
    )


def test_an_order_of_its_own_is_no_matter():
    """What the name is for: the same parameters, numbered otherwise."""
    model, optimizer = trained()
    named = state_by_name(optimizer.state_dict(), names_in_order(model, optimizer.param_groups))
    names = sorted(names_in_order(model, optimizer.param_groups))
    state = state_by_index(named, names)["state"]
    for i, name in enumerate(names):
        assert torch.equal(
            state[i]["exp_avg"], optimizer.state[dict(model.named_parameters())[name]]["exp_avg"]
        )


def test_the_state_of_another_network_is_refused_by_name():
    model, optimizer = trained()
    names = names_in_order(model, optimizer.param_groups)
    named = state_by_name(optimizer.state_dict(), names)
    with pytest.raises(ValueError, match=r"of another network.*: 3\.bias, 4\.bias"):
        state_by_index(named, [n.replace("3.bias", "4.bias") for n in names])


def test_the_rate_at_a_step_under_two_configs_is_told():
    def config(**rate):
        return {
            "optimizer": {"lr": 1e-3},
            "learning_rate": {"_target_": "sturdy.training.optim.Linear", **rate},
        }

    short, long = config(max_steps=20, warmup=0), config(max_steps=40, warmup=0)
    assert rate_change(short, long, 20) == "learning rate at this step: 0 -> 0.0005"
    assert rate_change(short, short, 20) is None
    foreign = {
        "optimizer": {"lr": 1e-3},
        "learning_rate": {"_target_": "os.system", "command": "true"},
    }
    assert rate_change(foreign, long, 20) is None, "no code that a checkpoint names is run"


OTHERS = ["NAdam", "Adagrad", "RMSprop", "Adamax", "RAdam", "SGD"]


def settings(name, **options):
    kind = getattr(torch.optim, name)
    config = {"optimizer": {"_target_": f"torch.optim.{name}", **options}}
    return {"optimizer": partial(kind, lr=1e-2, **options), "config": config}


@pytest.fixture(scope="module")
def adamw(tmp_path_factory):
    """The checkpoint after two steps with AdamW."""
    return save(fit(make(**settings("AdamW")), tmp_path_factory.mktemp("adamw"))[0])


@pytest.mark.parametrize("name", OTHERS)
def test_another_optimizer_on_purpose_begins_with_an_empty_state(name, adamw, caplog):
    caplog.set_level(logging.INFO, logger="sturdy")
    module = make(**settings(name))
    t, _ = fit(module, adamw.parents[1] / name, steps=4, entry=adamw)
    assert (
        f"optimizer torch.optim.AdamW -> torch.optim.{name}: it begins with an empty state"
        in caplog.text
    )
    state = t.optimizers[0].state_dict()["state"].values()
    assert all(values["step"] == 2 for values in state if "step" in values), "it counts from here"
    if name == "SGD":
        assert not any(state), "nothing of AdamW's was kept"


@pytest.mark.parametrize("name", ["AdamW", *OTHERS])
def test_the_same_optimizer_goes_on_bit_for_bit(name, tmp_path):
    whole, half, again = (make(**settings(name)) for _ in range(3))
    fit(whole, tmp_path / "whole", steps=4)
    path = save(fit(half, tmp_path / "half", steps=2)[0])
    fit(again, tmp_path / "half", steps=4, entry=path)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in whole.state_dict().items())


def test_options_that_need_more_state_begin_with_an_empty_one(adamw, caplog):
    caplog.set_level(logging.INFO, logger="sturdy")
    fit(make(**settings("AdamW", amsgrad=True)), adamw.parents[1] / "amsgrad", steps=3, entry=adamw)
    assert "kept no max_exp_avg_sq: it begins with an empty state" in caplog.text


class Own(torch.optim.SGD):
    """An optimizer as a user writes it: nested state of several types, and a count in its
    groups.
    """

    def __init__(self, params, lr=1e-2):
        super().__init__(params, lr=lr)
        for group in self.param_groups:
            group.setdefault("count", 0)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["count"] += 1
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    state |= {
                        "exact": torch.zeros_like(p, dtype=torch.float64),
                        "nested": [{"n": torch.tensor(0)}],
                    }
                    state["word"] = "cold"
                state["exact"].mul_(0.9).add_(p.grad.double() / 3)
                state["nested"][0]["n"] += 1
                rate = group["lr"] / group["count"] * (0.5 if state["word"] == "warm" else 1.0)
                state["word"] = "warm"
                p.sub_((state["exact"] * rate).to(p.dtype))


def own():
    return {"optimizer": Own, "config": {"optimizer": {"_target_": "mine.Own"}}}


def test_the_state_of_an_optimizer_of_ones_own_survives_bit_for_bit(tmp_path):
    whole, half, again = (make(**own()) for _ in range(3))
    fit(whole, tmp_path / "whole", steps=5)
    path = save(fit(half, tmp_path / "half", steps=2)[0])
    t, _ = fit(again, tmp_path / "half", steps=5, entry=path)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in whole.state_dict().items())
    state = t.optimizers[0].state[again.denoiser.backbone.out.weight]
    assert (state["exact"].dtype, state["nested"][0]["n"].item(), state["word"]) == (
        torch.float64,
        5,
        "warm",
    )
    assert state["nested"][0]["n"].dtype == torch.int64
    assert t.optimizers[0].param_groups[0]["count"] == 5


class Unsaveable(torch.optim.SGD):
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["made"] = object()


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (torch.optim.Muon, "Muon only supports 2D parameters"),
        (torch.optim.LBFGS, "LBFGS doesn't support per-parameter options"),
        (partial(torch.optim.AdamW, lr=-1.0), "Invalid learning rate: -1.0"),
        (partial(torch.optim.SGD, wrong=1), "unexpected keyword argument 'wrong'"),
        (Unsaveable, r"could not be saved: its state\['made'\] is a object"),
    ],
)
def test_an_optimizer_that_cannot_be_used_is_told_before_training(kind, told):
    with pytest.raises(ValueError, match=rf"^optimizer [\w.]+.*{told}"):
        check_optimizer(kind, network())


def test_a_trial_draws_nothing():
    module = network()
    before = torch.get_rng_state()
    check_optimizer(torch.optim.AdamW, module)
    assert torch.equal(torch.get_rng_state(), before)
