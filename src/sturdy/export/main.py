"""Write what a run has learned in a format that other programs read.

It is written aside, read back by the library that will read it, compared with the run on the run's
own noise and times, and renamed. So what is there is complete and right.
"""

import difflib
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import DictConfig
from torch import Tensor

from sturdy.diffusion.denoiser import Denoiser
from sturdy.export.card import write_card
from sturdy.export.check import read_back
from sturdy.export.folder import check_free, new_folder
from sturdy.export.formats import FORMATS, Subject, is_flow
from sturdy.export.path import follow_path
from sturdy.export.preview import check_condition, choose_condition, draw_preview
from sturdy.image_size import height_and_width
from sturdy.pretrained.borrowed import Borrowed
from sturdy.pretrained.latents import Latents
from sturdy.pretrained.merge import use_float32
from sturdy.sampling.grids import save_png
from sturdy.sampling.loaded_run import LoadedRun, check_integers, open_run, run_job
from sturdy.training.captions import caption_option

WEIGHTS = ("ema", "model")
FOLDER = "exports"  # in the run's directory
NAMES = ("label", "embeddings", "pooled", "sizes")  # of the condition, for the reader


def main(cfg: DictConfig, overrides: list[str]) -> int:
    """Export a run; return the exit code."""
    return run_job(export_run, cfg)


def export_run(cfg: DictConfig) -> None:
    """Write the folder ``out``.

    Raises:
        ValueError, OSError, ResumeRefusedError, NoValidCheckpointError: with what to do.
    """
    check_choice("to", cfg.to, FORMATS)
    check_choice("weights", cfg.weights, WEIGHTS)
    check_integers(cfg, {"preview": 0})
    if cfg.out is not None:
        check_free(Path(cfg.out))  # before the work
    run = open_run(cfg)
    out = choose_out(cfg, run)
    check_free(out)
    network = cast(
        Denoiser, run.module.denoiser if cfg.weights == "model" else run.module.ema.model
    )
    cond = choose_condition(run, cfg)
    with new_folder(out) as folder:
        if cfg.preview:
            save_png(draw_preview(run, network, cfg, cond), folder.export / "preview.png")
        run.module.to("cpu")
        subject, expected = prepare(run, network, cfg)
        written = FORMATS[cfg.to](subject, folder.export, folder.check, expected)
        expected = relevant(expected, written.ask, subject)
        library, shares = read_back(folder.export, folder.check, written.ask, expected)
        write_card(folder.export, subject, written, cfg, library, shares)
    compared = ", ".join(f"{name} {share:.1e}" for name, share in shares.items())
    print(
        f"step {run.point.step} of {run.directory} is in {out}\n"
        f"read back by {library}; largest differences: {compared}"
    )


def check_choice(key: str, word: Any, choices: Any) -> None:
    """Raise ValueError if ``word`` is none of ``choices``, with the nearest one."""
    if word in choices:
        return
    near = difflib.get_close_matches(str(word), choices, n=1)
    hint = f"Did you mean {near[0]}?" if near else f"There are: {', '.join(choices)}."
    raise ValueError(f"{key}={word}: there is no such choice. {hint}")


def choose_out(cfg: DictConfig, run: LoadedRun) -> Path:
    """Return the folder to make."""
    if cfg.out is not None:
        return Path(cfg.out)
    kind = cfg.to if cfg.weights == "ema" else f"{cfg.to}-{cfg.weights}"
    return run.directory / FOLDER / f"{kind}-step-{run.point.step:08d}"


def prepare(
    run: LoadedRun, network: Denoiser, cfg: DictConfig
) -> tuple[Subject, dict[str, Tensor]]:
    """Return what is exported, and what it computes."""
    network = network.eval().requires_grad_(False)
    if isinstance(network.backbone, Borrowed):
        use_float32(network.backbone)
    clip = run.module.space.clip
    if cfg.to == "diffusers" and is_flow(network):
        clip = None
    cond = check_condition(run, network)
    shape = run.module.space.shape_of(*height_and_width(run.config["data"]["image_size"]))
    expected = follow_path(network, shape, cond, clip, run.config["seed"])
    arguments = cond.arguments()
    option = caption_option(run.module)
    names = NAMES[:1] if option is None else NAMES[1:]
    for name, argument in zip(names, arguments, strict=False):
        if argument is not None:
            expected[name] = argument
    if isinstance(run.module.space, Latents):
        expected["latent"] = expected["next"][-1]
        expected["image"] = run.module.space.decode(expected["latent"])
    text = option.table.captions[0] if option is not None and option.table else None
    return Subject(run, network, arguments, text), expected


def relevant(
    expected: dict[str, Tensor], ask: dict[str, Any], subject: Subject
) -> dict[str, Tensor]:
    """Return what the reader compares."""
    if ask["reader"] == "tensors":
        return {"differing_tensors": torch.zeros(1)}
    return expected
