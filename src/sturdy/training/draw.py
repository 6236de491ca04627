"""Pictures from a run's EMA weights, one PNG each and a grid; from noise, or from a picture that is given.

Picture ``k`` of seed ``s`` starts from noise that is a function of ``(s, k)``, at every batch size.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor

from sturdy.diffusion.editing import Inpainted, image_to_image
from sturdy.diffusion.sampler import Estimator, Sampler, sample
from sturdy.evaluation.grids import class_columns, grid, save_png, to_uint8
from sturdy.evaluation.pictures import scaled
from sturdy.randomness import Draws, key
from sturdy.resume.entry import Refused, find_entry
from sturdy.resume.store import NothingVerifies, Store
from sturdy.training.build import rebuild
from sturdy.training.recipe import by_prior, recipe_of
from sturdy.training.trust import Trust

STRENGTH = 0.6  # where nothing else is said, and all of the picture may change


def draw(cfg: DictConfig, overrides: list[str]) -> int:
    """Write ``sample.n`` pictures; returns the exit code."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA starts; else cuBLAS is not deterministic
    torch.set_num_threads(cfg.threads)
    torch.use_deterministic_algorithms(True)
    run = Path(cfg.paths.runs) / cfg.run
    try:
        entry = find_entry(Store(run / "checkpoints"), cfg.ckpt_path, {}, "min")
        if entry is None:
            raise Refused(f"ckpt_path={cfg.ckpt_path} names no checkpoint to sample from; use last or a path")
        trust = Trust(cfg.trust, cfg.paths.runs)
        module = rebuild(entry.state, trust=trust, training=False).to(cfg.device).eval()
        config = cast(Mapping[str, Any], module.config)
        size = config["data"]["image_size"]
        labels = chosen(cfg.sample.label, list(config["classes"]), config.get("prior", []), cfg.sample.n)
        start = Start(cfg.sample, size)
        recipe = recipe_of(cfg, config, run, cfg.sample.ema, state=entry.state, trust=trust)
        denoiser = recipe.guided(recipe.network(module, entry), labels)
    except (ValueError, Refused, NothingVerifies) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(recipe.told(labels), flush=True)
    out, pictures = Path(cfg.sample.out or run / "pictures"), []
    for first in range(0, cfg.sample.n, cfg.sample.batch_size):
        numbers = range(first, min(first + cfg.sample.batch_size, cfg.sample.n))
        draws = Draws(key(cfg.sample.seed, "sample"), numbers)
        noise = draws.normal("start", (3, size, size)).to(cfg.device)
        label = None if labels is None else labels[numbers.start : numbers.stop].to(cfg.device)
        batch = start.draw(recipe.sampler, denoiser, noise, label, draws).cpu()
        for k, picture in zip(numbers, to_uint8(batch), strict=True):
            save_png(Image.fromarray(picture.numpy()), out / f"{k:06d}.png")
        pictures.append(batch)
    classes = 0 if cfg.sample.label is not None else len(config["classes"])
    save_png(grid(torch.cat(pictures), columns=class_columns(cfg.sample.n, classes)), out / "grid.png")
    print(f"{cfg.sample.n} pictures from step {entry.step} of {run} are in {out}; grid.png shows all")
    return 0


class Start:
    """What pictures start from: noise; a picture, from some noise level on; or one of which a part is drawn anew.

    Args:
        options: ``image``, ``mask`` and ``strength``, each of which may be None, and ``decode``, which reads the files.
        size: height and width of pictures, to which the files are resized and cropped.

    Raises:
        ValueError: naming the key.
    """

    def __init__(self, options: DictConfig, size: int) -> None:
        self.picture, self.mask, self.strength = None, None, options.strength
        if options.strength is None:
            self.strength = STRENGTH if options.mask is None else 1.0
        elif not (isinstance(self.strength, int | float) and 0 < self.strength <= 1):
            raise ValueError(f"sample.strength={self.strength} must be above 0, where nothing changes, and at most 1")
        if options.image is None:
            for name in ("mask", "strength"):
                if options[name] is not None:
                    raise ValueError(f"sample.{name}={options[name]} needs a picture to change: sample.image=FILE")
            return
        picture = _read(options, "image", size)
        self.picture = scaled(_cropped(picture, size))
        if options.mask is None:
            return
        mask = _read(options, "mask", size)
        if mask.shape != picture.shape:
            raise ValueError(
                f"sample.mask={options.mask} is {_proportions(mask)} where sample.image={options.image} is "
                f"{_proportions(picture)}, its short side being {size}: make it as large as the image"
            )
        self.mask = _cropped(mask, size).float().mean(0) > 127.5
        if not self.mask.any():
            raise ValueError(f"sample.mask={options.mask} has no white where the image is: nothing would be drawn")

    def draw(
        self, sampler: Sampler, denoiser: Estimator, noise: Tensor, label: Tensor | None, draws: Draws | None
    ) -> Tensor:
        """A picture ``(b, c, h, w)`` for each start; arguments as of ``sample``."""
        if self.picture is None:
            return sample(sampler, denoiser, noise, label, draws)
        picture = self.picture.to(noise).expand_as(noise)
        if self.mask is not None:
            denoiser = Inpainted(denoiser, picture, self.mask)
            if self.strength == 1:  # from noise alone
                return sample(sampler, denoiser, noise, label, draws)
        return image_to_image(sampler, denoiser, noise, picture, self.strength, label, draws)


def _read(options: DictConfig, name: str, size: int) -> Tensor:
    """The file upright and not cropped, its short side ``size``, uint8 ``(3, h, w)``."""
    file = Path(str(options[name])).expanduser()
    try:
        return torch.from_numpy(instantiate(options.decode)(file, size=size, crop="random"))
    except Exception as error:  # ours say what is wrong with the file, and the others what is wrong with the disk
        raise ValueError(f"sample.{name}={file}: {error}") from None


def _cropped(pixels: Tensor, size: int) -> Tensor:
    top, left = ((side - size) // 2 for side in pixels.shape[1:])
    return pixels[:, top : top + size, left : left + size]


def _proportions(pixels: Tensor) -> str:
    return f"{pixels.shape[2]} x {pixels.shape[1]}"


def chosen(label: str | int | None, classes: list[str], prior: list[float], n: int) -> torch.Tensor | None:
    """The label of each picture ``(n,)``; without a choice all classes in turn, None where there are none.

    ``prior`` is how often each class is in the data, and as a ``label`` it asks for just that.

    Raises:
        ValueError: naming the classes there are.
    """
    if label is None:
        return torch.arange(n) % len(classes) if classes else None
    if label == "prior" and prior and "prior" not in classes:
        return by_prior(torch.tensor(prior), n)
    if str(label) in classes:
        return torch.full((n,), classes.index(str(label)))
    if isinstance(label, int) and 0 <= label < len(classes):
        return torch.full((n,), label)
    there = ", ".join([*classes, "prior"]) if classes else "none"
    raise ValueError(f"sample.label={label} is no class of this run; there are: {there}")
