"""Images from a run's EMA weights, one PNG each and a grid; from noise, or from an image that is
given.

Image ``k`` of seed ``s`` starts from noise that is a function of ``(s, k)``, at every batch size.
So jobs can share the
numbers, and a job that was killed goes on where it was: an image that is there and whole is not
    drawn again.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor

from exact_resume.randomness import Draws, key
from sturdy.diffusion.editing import InpaintingDenoiser, image_to_image
from sturdy.diffusion.sampler import Estimator, Sampler, sample
from sturdy.encoders.pictures import scaled
from sturdy.progress import ProgressPrinter
from sturdy.sampling.config import labels_from_prior, resolve_sampling
from sturdy.sampling.grids import class_columns, grid, save_png, to_uint8
from sturdy.sampling.loaded_run import check_integers, open_run, own_folder, provenance, run_job
from sturdy.trust import Trust

STRENGTH = 0.6  # where nothing else is said, and all of the picture may change
MINIMUMS = {"n": 1, "first": 0, "batch_size": 1, "seed": None}
SHOWN = 64  # images in the grid


def main(cfg: DictConfig, overrides: list[str]) -> int:
    """Write ``sample.n`` images; returns the exit code."""
    return run_job(
        lambda cfg: sample_images(cfg, typed(overrides, "sample.label", cfg.sample.label)), cfg
    )


def sample_images(cfg: DictConfig, label: str | int | None) -> None:
    """Write the images ``sample.first`` to ``sample.first + sample.n - 1`` of ``label``, and a grid
    of the first 64.

    Raises:
        ValueError, OSError, ResumeRefusedError, NoValidCheckpointError: with what to do.
    """
    options = cfg.sample
    check_integers(options, MINIMUMS, "sample.")
    run, entry, module, device = open_run(cfg)
    config = cast(Mapping[str, Any], module.config)
    size, classes = config["data"]["image_size"], list(config["classes"])
    label = None if label == "null" and label not in classes else label
    numbers = range(options.first, options.first + options.n)
    labels = select_labels(label, classes, config.get("prior", []), numbers.stop)
    start = InitialState(options, size)
    trust = Trust(cfg.trust, cfg.paths.runs)
    recipe = resolve_sampling(cfg, config, run, options.ema, state=entry.state, trust=trust)
    denoiser = recipe.guided(recipe.network(module, entry), labels)
    how = provenance(entry, device, config, recipe.given) | recipe.primitives(labels)
    how |= {"seed": options.seed, "label": label} | start.given
    out = own_folder("sample.out", options.out, run / "pictures", how, ["*.png"])
    print(recipe.told(labels), flush=True)
    tell, drawn = ProgressPrinter("images"), 0
    for first in numbers[:: options.batch_size]:
        batch = range(first, min(first + options.batch_size, numbers.stop))
        missing = [k for k in batch if not is_whole(out / f"{k:06d}.png", size)]
        # all of them are drawn, for the kernels' rounding may depend on how many are drawn together
        if missing:
            draws = Draws(key(options.seed, "sample"), batch)
            noise = draws.normal("start", (3, size, size)).to(device)
            asked = None if labels is None else labels[batch.start : batch.stop].to(device)
            images = to_uint8(start.draw(recipe.sampler, denoiser, noise, asked, draws))
            for k in missing:
                save_png(Image.fromarray(images[k - first].numpy()), out / f"{k:06d}.png")
        drawn += len(missing)
        tell(batch.stop - numbers.start, len(numbers))
    name = show(out, numbers[:SHOWN], 0 if label is not None else len(classes))
    there = f" ({options.n - drawn} were there)" if drawn < options.n else ""
    all_or_some = "all" if options.n <= SHOWN else f"the first {SHOWN}"
    print(
        f"{options.n} images from step {entry.step} of {run} are in {out}{there}; {name} shows "
        f"{all_or_some}"
    )


def typed(overrides: list[str], name: str, value: Any) -> Any:
    """Return what the command gives as the option ``name``, as a word; ``value`` if it gives none.

    Hydra makes a number of ``1e3``, and no words of ``true`` and ``null``, which are names that a
    class can have.
    """
    given = [
        word.partition("=")[2] for word in overrides if word.lstrip("+").startswith(f"{name}=")
    ]
    return given[-1] if given and not isinstance(value, str) else value


def is_whole(path: Path, size: int) -> bool:
    """Whether ``path`` is a PNG of ``size`` x ``size`` whose checksums are right."""
    try:
        with Image.open(path) as image:
            image.verify()
            return image.format == "PNG" and image.size == (size, size)
    except (OSError, SyntaxError, ValueError):
        return False


def show(out: Path, numbers: range, classes: int) -> str:
    """Write a grid of the images ``numbers`` in ``out``; returns its name, which says where it
    begins if not at 0.
    """
    images = torch.stack(
        [torch.from_numpy(np.array(Image.open(out / f"{k:06d}.png"))) for k in numbers]
    )
    name = f"grid-{numbers.start:06d}.png" if numbers.start else "grid.png"
    save_png(
        grid(scaled(images.permute(0, 3, 1, 2)), columns=class_columns(len(numbers), classes)),
        out / name,
    )
    return name


class InitialState:
    """What pictures start from: noise; a picture, from some noise level on; or one of which a part
    is drawn anew.

    Attributes:
        given: primitives that tell this start from all others.

    Args:
        options: ``image``, ``mask`` and ``strength``, each of which may be None, and ``decode``,
            which reads the files.
        size: height and width of pictures, to which the files are resized and cropped.

    Raises:
        ValueError: naming the key.
    """

    def __init__(self, options: DictConfig, size: int) -> None:
        self.picture, self.mask, self.strength = None, None, options.strength
        self.given: dict[str, Any] = {"image": None, "mask": None}
        if options.strength is None:
            self.strength = STRENGTH if options.mask is None else 1.0
        elif not (type(self.strength) in (int, float) and 0 < self.strength <= 1):
            raise ValueError(
                f"sample.strength={self.strength} must be above 0, where nothing changes, and at "
                f"most 1"
            )
        if options.image is None:
            for name in ("mask", "strength"):
                if options[name] is not None:
                    raise ValueError(
                        f"sample.{name}={options[name]} needs a picture to change: "
                        f"sample.image=FILE"
                    )
            return
        picture = _read(options, "image", size)
        self.picture = scaled(_cropped(picture, size))
        self.given |= {"image": _sum(picture), "strength": self.strength}
        if options.mask is None:
            return
        mask = _read(options, "mask", size)
        if mask.shape != picture.shape:
            raise ValueError(
                f"sample.mask={options.mask} is {_proportions(mask)} where "
                f"sample.image={options.image} is "
                f"{_proportions(picture)}, its short side being {size}: make it as large as the "
                f"image"
            )
        self.given["mask"] = _sum(mask)
        self.mask = _cropped(mask, size).float().mean(0) > 127.5
        if not self.mask.any():
            raise ValueError(
                f"sample.mask={options.mask} has no white where the image is: nothing would be "
                f"drawn"
            )

    def draw(
        self,
        sampler: Sampler,
        denoiser: Estimator,
        noise: Tensor,
        label: Tensor | None,
        draws: Draws | None,
    ) -> Tensor:
        """A picture ``(b, c, h, w)`` for each start; arguments as of ``sample``."""
        if self.picture is None:
            return sample(sampler, denoiser, noise, label, draws)
        picture = self.picture.to(noise).expand_as(noise)
        if self.mask is not None:
            denoiser = InpaintingDenoiser(denoiser, picture, self.mask)
            if self.strength == 1:  # from noise alone
                return sample(sampler, denoiser, noise, label, draws)
        return image_to_image(sampler, denoiser, noise, picture, self.strength, label, draws)


def _read(options: DictConfig, name: str, size: int) -> Tensor:
    """The file upright and not cropped, its short side ``size``, uint8 ``(3, h, w)``."""
    file = Path(str(options[name])).expanduser()
    try:
        return torch.from_numpy(instantiate(options.decode)(file, size=size, crop="random"))
    except (
        Exception
    ) as error:  # ours say what is wrong with the file, and the others what is wrong with the disk
        raise ValueError(f"sample.{name}={file}: {error}") from None


def _sum(pixels: Tensor) -> str:
    return hashlib.sha256(pixels.contiguous().numpy().tobytes()).hexdigest()


def _cropped(pixels: Tensor, size: int) -> Tensor:
    top, left = ((side - size) // 2 for side in pixels.shape[1:])
    return pixels[:, top : top + size, left : left + size]


def _proportions(pixels: Tensor) -> str:
    return f"{pixels.shape[2]} x {pixels.shape[1]}"


def select_labels(
    label: str | int | None, classes: list[str], prior: list[float], n: int
) -> torch.Tensor | None:
    """The label of each picture ``(n,)``; without a choice all classes in turn, None where there
    are none.

    A word that names a class is that class. A number is the place of a class where no name of a
    class is a number. ``prior`` is how often each class is in the data, and as a ``label`` it asks
    for just that.

    Raises:
        ValueError: naming the classes there are.
    """
    word = str(label)
    if label is not None and word in classes:
        return torch.full((n,), classes.index(word))
    if label is None:
        return torch.arange(n) % len(classes) if classes else None
    if word == "prior" and prior:
        return labels_from_prior(torch.tensor(prior), n)
    if (
        word.isdecimal()
        and int(word) < len(classes)
        and not any(name.isdecimal() for name in classes)
    ):
        return torch.full((n,), int(word))
    there = (
        ", ".join([*classes, *(["prior"] if prior and "prior" not in classes else [])])
        if classes
        else "none"
    )
    raise ValueError(f"sample.label={label} is no class of this run; there are: {there}")
