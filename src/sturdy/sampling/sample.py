"""Images from a run's EMA weights, one PNG each and a grid; from noise, or from a given image.

Image ``k`` of seed ``s`` starts from noise that is a function of ``(s, k)``, at every batch size.
So several jobs can share the numbers, and a job that was killed continues: it does not draw an
image again whose file is complete.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor

from exact_resume.randomness import Draws, key
from sturdy.data.buckets import Size, parse_size, size_text
from sturdy.diffusion.condition import Condition
from sturdy.encoders.images import scaled
from sturdy.image_size import height_and_width
from sturdy.progress import ProgressPrinter
from sturdy.sampling.config import resolve_sampling
from sturdy.sampling.grids import as_image, class_columns, grid, save_png, to_uint8
from sturdy.sampling.initial_state import InitialState
from sturdy.sampling.labels import select_labels
from sturdy.sampling.loaded_run import LoadedRun, check_integers, open_run, run_job
from sturdy.sampling.output_folder import claim_folder, provenance
from sturdy.sampling.prompts import check_no_prompt, select_captions
from sturdy.training.captions import caption_option

MINIMUMS = {"n": 1, "first": 0, "batch_size": 1, "seed": None}
GRID_IMAGES = 64
OUTPUT = "pictures"  # in the run's directory


def main(cfg: DictConfig, overrides: list[str]) -> int:
    """Write ``sample.n`` images; return the exit code."""
    label = as_typed(overrides, "sample.label", cfg.sample.label)
    return run_job(lambda cfg: sample_images(cfg, label), cfg)


def sample_images(cfg: DictConfig, label: str | int | None) -> None:
    """Write the images ``sample.first`` to ``sample.first + sample.n - 1``, and a grid.

    Raises:
        ValueError, OSError, ResumeRefusedError, NoValidCheckpointError: with what to do.
    """
    options = cfg.sample
    check_integers(options, MINIMUMS, "sample.")
    run = open_run(cfg)
    run_size = height_and_width(run.config["data"]["image_size"])
    size = run_size
    if options.size is not None:
        size = parse_size("sample.size", options.size)
    classes = list(run.config["classes"])
    numbers = range(options.first, options.first + options.n)
    if label == "null" and label not in classes:
        label = None
    cond: Tensor | Condition | None
    if caption_option(run.module) is None:
        check_no_prompt(options)
        cond = select_labels(label, classes, run.config.get("prior", []), numbers.stop)
        chosen = {"label": label}
        turns = 0 if label is not None else len(classes)  # conditions that come in turn
    else:
        cond, chosen = select_captions(run, options, numbers.stop, Path(cfg.paths.cache))
        cond = cond.sized(*size)
        turns = min(len(cond.table), numbers.stop)
    sampling = resolve_sampling(
        cfg, run.config, options.ema, state=run.point.state, trust=run.trust
    )
    sampler = sampling.make_sampler()
    network = sampling.load_network(run)
    denoiser = sampling.add_guidance(network, cond, sampling.load_guide(run))
    start = InitialState(options, size, run.module.space)
    shape = run.module.space.shape_of(*size)

    how = provenance(run, sampling.sampler) | sampling.primitives(cond) | start.primitives
    how |= {"seed": options.seed, **chosen}
    if size != run_size:
        how["size"] = size_text(size)
    out = claim_folder("sample.out", options.out, run.directory / OUTPUT, how, ["*.png"])
    print(sampling.describe(cond), flush=True)

    def draw(batch: range) -> Tensor:
        draws = Draws(key(options.seed, "sample"), batch)
        noise = draws.normal("start", shape).to(run.device)
        batch_cond = None
        if cond is not None:
            batch_cond = cond[batch.start : batch.stop].to(run.device)
        return to_uint8(start.draw(sampler, denoiser, noise, batch_cond, draws))

    progress = ProgressPrinter("images")
    drawn = 0
    for first in numbers[:: options.batch_size]:
        batch = range(first, min(first + options.batch_size, numbers.stop))
        missing = [k for k in batch if not is_complete(image_path(out, k), size)]
        if missing:
            # All of the batch: the rounding of kernels may depend on the size of the batch.
            images = draw(batch)
            for k in missing:
                save_png(as_image(images[k - first]), image_path(out, k))
        drawn += len(missing)
        progress(batch.stop - numbers.start, len(numbers))

    name = save_grid(out, numbers[:GRID_IMAGES], turns)
    print(_summary(run, options, out, name, drawn))


def _summary(run: LoadedRun, options: Mapping[str, Any], out: Path, grid: str, drawn: int) -> str:
    n = options["n"]
    existing = f" ({n - drawn} were there)" if drawn < n else ""
    shown = "all" if n <= GRID_IMAGES else f"the first {GRID_IMAGES}"
    return (
        f"{n} images from step {run.point.step} of {run.directory} are in {out}{existing}; "
        f"{grid} shows {shown}"
    )


def as_typed(overrides: list[str], key: str, value: Any) -> Any:
    """Return the value of the override ``key=...`` as the user typed it; else ``value``.

    Hydra makes a number of ``1e3``, and no strings of ``true`` and ``null``, which can be names of
    classes.
    """
    if isinstance(value, str):
        return value
    prefix = f"{key}="
    typed = [word.lstrip("+") for word in overrides]
    values = [word.removeprefix(prefix) for word in typed if word.startswith(prefix)]
    return values[-1] if values else value


def image_path(folder: Path, number: int) -> Path:
    """Return where the image ``number`` is."""
    return folder / f"{number:06d}.png"


def is_complete(path: Path, size: Size) -> bool:
    """Whether ``path`` is a PNG of ``size``, as of ``as_image``, whose checksums are right."""
    height, width = size
    try:
        with Image.open(path) as image:
            image.verify()
            return image.format == "PNG" and image.height == height and not image.width % width
    except (OSError, SyntaxError, ValueError):
        return False


def save_grid(folder: Path, numbers: range, classes: int) -> str:
    """Write a grid of the images ``numbers`` in ``folder``; return its name."""
    images = []
    for k in numbers:
        with Image.open(image_path(folder, k)) as image:
            pixels = np.array(image)
        images.append(torch.from_numpy(np.atleast_3d(pixels)).permute(2, 0, 1))
    name = f"grid-{numbers.start:06d}.png" if numbers.start else "grid.png"
    columns = class_columns(len(numbers), classes)
    save_png(grid(scaled(torch.stack(images)), columns=columns), folder / name)
    return name
