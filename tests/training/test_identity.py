"""Which modules of ours are the code of a run: a list to be changed knowingly."""

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from runs import ROOT
from sturdy.training.fingerprint import run_fingerprint

ALWAYS = """
    exact_resume.permutation exact_resume.randomness exact_resume.reduction
    examples.cars.backbone
    sturdy.backbone.dit sturdy.backbone.embed
    sturdy.data.augment sturdy.data.buckets sturdy.data.datamodule sturdy.data.encoded
    sturdy.data.images sturdy.data.split
    sturdy.diffusion.condition sturdy.diffusion.denoiser sturdy.diffusion.objective
    sturdy.diffusion.schedule sturdy.diffusion.space sturdy.diffusion.target
    sturdy.image_size
    sturdy.training.auxiliary sturdy.training.build sturdy.training.ema
    sturdy.training.ema_profiles sturdy.training.frozen sturdy.training.module
    sturdy.training.optim
    sturdy.training.optimizer_state sturdy.training.strategies sturdy.training.trainer
"""


def code(*words):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("train", ["experiment=cars", *words])
    config = OmegaConf.to_container(cfg, resolve=True)
    now = run_fingerprint(config, "digest", "tree", ignore=cfg.resume.ignore)
    return list(now.code)


def test_the_code_of_the_default_run():
    """What only tells, draws, reads images or saves is not in it; nor are samplers, other backbones
    and packages.
    """
    assert code() == sorted(ALWAYS.split())


def test_what_the_config_names_brings_its_code():
    assert {"sturdy.backbone.unet"} == {*code("backbone=unet")} - {*ALWAYS.split()}
    aligned = {*code("alignment=embedded")} - {*ALWAYS.split()}
    assert {
        "sturdy.training.alignment",
        "sturdy.encoders.encoder",
        "sturdy.encoders.network",
    } <= aligned
    assert not [name for name in aligned if "report" in name or "charts" in name]
    assert code("callbacks.samples._target_=sturdy.prove.main") == sorted(
        ALWAYS.split()
    )  # it cannot change a weight
    assert "sturdy.prove" in code("+callbacks.mine._target_=sturdy.prove.main")
