"""Pictures from a run's EMA weights, one PNG each and a grid.

Picture ``k`` of seed ``s`` starts from noise that is a function of ``(s, k)``, at every batch size.
"""

import sys
from pathlib import Path
from typing import cast

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from PIL import Image

from sturdy.diffusion.denoiser import Denoiser, Guided
from sturdy.diffusion.sampler import sample
from sturdy.evaluation.grids import class_columns, grid, save_png, to_uint8
from sturdy.randomness import Draws, key
from sturdy.resume.entry import Refused, find_entry
from sturdy.resume.store import NothingVerifies, Store
from sturdy.training.build import rebuild


def draw(cfg: DictConfig, overrides: list[str]) -> int:
    """Write ``sample.n`` pictures; returns the exit code."""
    torch.set_num_threads(cfg.threads)
    torch.use_deterministic_algorithms(True)
    run = Path(cfg.paths.runs) / cfg.run
    try:
        entry = find_entry(Store(run / "checkpoints"), cfg.ckpt_path, {}, "min")
        if entry is None:
            raise Refused(f"ckpt_path={cfg.ckpt_path} names no checkpoint to sample from; use last or a path")
        module = rebuild(entry.state).to(cfg.device).eval()
        labels = chosen(cfg.sample.label, list((module.config or {})["classes"]), cfg.sample.n)
        model = cast(Denoiser, module.ema.model)
        denoiser = model if labels is None else Guided(model, cfg.guidance.scale)
    except (ValueError, Refused, NothingVerifies) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    sampler, size = instantiate(cfg.sampler), (module.config or {})["data"]["image_size"]
    out, pictures = Path(cfg.sample.out or run / "pictures"), []
    for first in range(0, cfg.sample.n, cfg.sample.batch_size):
        numbers = range(first, min(first + cfg.sample.batch_size, cfg.sample.n))
        draws = Draws(key(cfg.sample.seed, "sample"), numbers)
        noise = draws.normal("start", (3, size, size)).to(cfg.device)
        label = None if labels is None else labels[numbers.start : numbers.stop].to(cfg.device)
        batch = sample(sampler, denoiser, noise, label, draws).cpu()
        for k, picture in zip(numbers, to_uint8(batch), strict=True):
            save_png(Image.fromarray(picture.numpy()), out / f"{k:06d}.png")
        pictures.append(batch)
    classes = 0 if cfg.sample.label is not None else len((module.config or {})["classes"])
    save_png(grid(torch.cat(pictures), columns=class_columns(cfg.sample.n, classes)), out / "grid.png")
    print(f"{cfg.sample.n} pictures from step {entry.step} of {run} are in {out}; grid.png shows all")
    return 0


def chosen(label: str | int | None, classes: list[str], n: int) -> torch.Tensor | None:
    """The label of each picture ``(n,)``; without a choice all classes in turn, None where there are none.

    Raises:
        ValueError: naming the classes there are.
    """
    if label is None:
        return torch.arange(n) % len(classes) if classes else None
    if str(label) in classes:
        return torch.full((n,), classes.index(str(label)))
    if isinstance(label, int) and 0 <= label < len(classes):
        return torch.full((n,), label)
    raise ValueError(f"sample.label={label} is no class of this run; there are: {', '.join(classes) or 'none'}")
