"""Which modules of ours are the code of a run: a list to be changed knowingly."""

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from runs import ROOT
from sturdy.training.identity import run_fingerprint

ALWAYS = """
    backbone.dit backbone.embed backbone.whole data.augment data.images data.module data.order diffusion.denoiser
    diffusion.objective diffusion.schedule diffusion.target randomness resume.reduction training.build training.ema
    training.module training.optim training.parts training.profiles training.strategies
"""


def code(*words):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("train", ["experiment=cars", *words])
    config = OmegaConf.to_container(cfg, resolve=True)
    now = run_fingerprint(config, "digest", "tree", ignore=cfg.resume.ignore)
    return [name.removeprefix("sturdy.") for name in now.code]


def test_the_code_of_the_default_run():
    """What only tells, draws, reads images or saves is not in it; nor are samplers, other backbones and packages."""
    assert code() == ALWAYS.split()


def test_what_the_config_names_brings_its_code():
    assert {"backbone.unet"} == {*code("backbone=unet")} - {*ALWAYS.split()}
    aligned = {*code("alignment=embedded")} - {*ALWAYS.split()}
    assert {"training.alignment", "evaluation.encoders", "evaluation.network"} <= aligned
    assert not [name for name in aligned if "report" in name or "charts" in name]
    assert code("callbacks.samples._target_=sturdy.prove.main") == ALWAYS.split()  # it cannot change a weight
    assert "prove" in code("+callbacks.mine._target_=sturdy.prove.main")
