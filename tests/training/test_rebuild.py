"""From a composed config to a module, and back from a checkpoint alone, which must not choose what
is executed.
"""

import copy

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from exact_resume.checkpoint.store import load_state
from runs import ROOT, SMALL_UNET
from sturdy.training.build import build_module, load_module
from tiny_module import fit, save


@pytest.fixture(scope="module")
def config():
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("train", [*SMALL_UNET, "data.shards=2"])
    cfg.num_classes = 3
    return OmegaConf.to_container(cfg, resolve=True)


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory):
    """A module after two steps, and its checkpoint."""
    module = build_module(config)
    t, _ = fit(module, tmp_path_factory.mktemp("run"))
    return module, save(t)


def test_weights_are_a_function_of_the_seed(config):
    a, b, c = build_module(config), build_module(config), build_module(config | {"seed": 1})
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())
    assert not all(torch.equal(v, c.state_dict()[k]) for k, v in a.state_dict().items())


def test_a_checkpoint_alone_gives_the_module_back(trained, tmp_path):
    module, path = trained
    alone = tmp_path / "alone.ckpt"
    alone.write_bytes(path.read_bytes())
    again = load_module(alone)
    state = module.state_dict()
    assert again.state_dict().keys() == state.keys()
    assert all(torch.equal(v, state[k]) for k, v in again.state_dict().items())
    assert again.config == module.config
    x, t, label = torch.randn(2, 3, 16, 16), torch.tensor([0.2, 0.9]), torch.tensor([0, 3])
    assert torch.equal(again.ema.model(x, t, label), module.ema.model(x, t, label))
    assert not torch.equal(
        again.ema.model(x, t, label), build_module(module.config).ema.model(x, t, label)
    )


def test_weights_of_another_network_are_refused_by_name(trained, tmp_path):
    state = load_state(trained[1])
    weight = state["state_dict"].pop("denoiser.backbone.out.2.weight")
    torch.save(
        state | {"state_dict": state["state_dict"] | {"denoiser.backbone.out.renamed": weight}},
        tmp_path / "a",
    )
    with pytest.raises(
        ValueError, match=r"another network.*: denoiser\.backbone\.out\.2\.weight, .*out\.renamed$"
    ):
        load_module(tmp_path / "a")


FOREIGN = [
    "os.system",
    "exact_resume.checkpoint.store.os.system",  # through a module of ours
    "sturdy.diffusion.target.torch.os.system",
    "torch.optim.optimizer.functools.partial",  # a class
    "torch.optim.adamw.torch.os.system",
    "sturdy.training.build.load_module",
    "sturdy.diffusion.target.config_name",  # a function of ours
    "sturdy.diffusion.target.Nothing",
    "sturdy_evil.run",
]


@pytest.mark.parametrize(
    ("foreign", "place"),
    [(f, "nested") for f in FOREIGN] + [("os.system", p) for p in ("itself", "a list", "a tuple")],
)
def test_foreign_code_in_the_config_is_refused_and_not_run(foreign, place, trained, tmp_path):
    _, path = trained
    file = tmp_path / "touched"
    node = {"_target_": foreign, "_args_": [f"touch {file}"]}
    state = load_state(path)
    schedule = copy.deepcopy(state["config"]["schedule"])
    extra = {"nested": {"a": node}, "a list": [[node]], "a tuple": (node,), "itself": None}[place]
    state["config"]["schedule"] = schedule | {"extra": extra} if extra else node
    evil = tmp_path / "evil.ckpt"
    torch.save(state, evil)
    with pytest.raises(ValueError, match="is not code of this project") as error:
        load_module(evil)
    assert f"asks for {foreign} as its schedule" in str(error.value)
    assert not file.exists()


def test_what_hydra_would_fill_in_is_refused_and_not_run(trained, tmp_path):
    """``oc.create`` makes a node of a string, and Hydra builds that, too."""
    state, file = load_state(trained[1]), tmp_path / "touched"
    told = "${oc.create:{_target_: os.system, _args_: ['touch " + str(file) + "']}}"
    state["config"]["schedule"] = copy.deepcopy(state["config"]["schedule"]) | {"extra": [told]}
    torch.save(state, tmp_path / "evil.ckpt")
    with pytest.raises(ValueError, match="is not code of this project"):
        load_module(tmp_path / "evil.ckpt")
    assert not file.exists()


def test_a_checkpoint_without_a_config_is_named(tmp_path):
    path = tmp_path / "other.ckpt"
    torch.save({"state_dict": {}}, path)
    with pytest.raises(ValueError, match=r"other\.ckpt holds no config"):
        load_module(path)
