"""The condition of an export's checks, and the images of its card."""

from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch import Tensor

from exact_resume.randomness import Draws, key
from sturdy.diffusion.condition import Condition
from sturdy.diffusion.denoiser import Denoiser
from sturdy.diffusion.sampler import sample
from sturdy.image_size import height_and_width
from sturdy.pretrained.text_table import find_table
from sturdy.sampling.config import resolve_sampling
from sturdy.sampling.grids import grid
from sturdy.sampling.labels import select_labels
from sturdy.sampling.loaded_run import LoadedRun
from sturdy.sampling.prompts import select_captions
from sturdy.training.captions import caption_option
from sturdy.training.fingerprint import CAPTIONS


def choose_condition(run: LoadedRun, cfg: DictConfig) -> Condition | Tensor | None:
    """Return the condition of the images in the card.

    The captions of training come from the cache; without them, the empty text is drawn.

    Raises:
        ValueError: a prompt makes no sense for the run.
    """
    n = max(1, cfg.preview)
    if caption_option(run.module) is None:
        if cfg.prompt is not None:
            raise ValueError(f"prompt={cfg.prompt}: this run was trained without captions")
        return select_labels(None, list(run.config["classes"]), [], n)
    options = {"label": None, "negative": None, "prompt": cfg.prompt}
    digest = run.point.manifest.get("fingerprint", {}).get("stack", {}).get(CAPTIONS, "")
    if cfg.prompt is None and find_table(Path(cfg.paths.cache), digest) is None:
        options["prompt"] = ""
    return select_captions(run, OmegaConf.create(options), n, Path(cfg.paths.cache))[0]


def draw_preview(
    run: LoadedRun, network: Denoiser, cfg: DictConfig, cond: Condition | Tensor | None
) -> Image.Image:
    """Draw images as ``sample.py`` does with the settings of the run, as a grid.

    Args:
        run: whose sampler and guidance are used.
        network: the average, or the weights themselves.
        cfg: of the command.
        cond: of ``preview`` samples.
    """
    settings = resolve_sampling(cfg, run.config, state=run.point.state, trust=run.trust)
    denoiser = settings.add_guidance(network, cond, settings.load_guide(run))
    shape = run.module.space.shape_of(*height_and_width(run.config["data"]["image_size"]))
    images = []
    for k in range(cfg.preview):  # one by one, in little memory
        draws = Draws(key(0, "sample"), [k])
        noise = draws.normal("start", shape).to(run.device)
        one = None if cond is None else cond[k : k + 1].to(run.device)
        x0 = sample(
            settings.make_sampler(), denoiser, noise, one, draws, clip=run.module.space.clip
        )
        images.append(run.module.space.decode(x0).cpu())
    return grid(torch.cat(images), columns=min(cfg.preview, 4))


def check_condition(run: LoadedRun, network: Denoiser) -> Condition:
    """Return the condition of the samples that are compared: two, and the null condition."""
    option = caption_option(run.module)
    if option is not None:
        assert option.table is not None
        rows = len(option.table)
        return option(torch.tensor([0, rows]), rows)
    classes = network.num_classes
    labels = [0, max(0, classes - 1), classes]
    return network.condition(torch.zeros(3, 1), torch.tensor(labels))
