"""A report on a run: its pictures, drawn from the EMA weights, against its training and its
held-out images.

Picture ``k`` of seed ``s`` and its label are functions of ``(s, k)``, so a larger ``evaluate.n``
only adds to those there are; they are kept as they are drawn, and a killed evaluation goes on where
it was.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from exact_resume.randomness import Draws, key
from exact_resume.resume import ResumePoint, ResumeRefusedError
from sturdy.diffusion.denoiser import Denoiser
from sturdy.diffusion.sampler import sample
from sturdy.encoders.cached import cached
from sturdy.encoders.pictures import ImageSet
from sturdy.evaluation.attention import attention_section
from sturdy.evaluation.audit import audit, classifiers
from sturdy.evaluation.features import Features
from sturdy.evaluation.levels import Denoising, denoising_error_section
from sturdy.evaluation.memorisation import memorisation
from sturdy.evaluation.quality import overview, quality
from sturdy.evaluation.record import record
from sturdy.evaluation.report import Report
from sturdy.evaluation.walk import walk
from sturdy.progress import ProgressPrinter
from sturdy.sampling.config import TRUST_NONE, SamplingConfig, labels_for, resolve_sampling
from sturdy.sampling.grids import to_uint8
from sturdy.sampling.loaded_run import check_integers, open_run, own_folder, provenance, run_job
from sturdy.trust import Trust

LABELS = ("prior", "even", "none")
MINIMUMS = {
    "n": 8,
    "batch_size": 1,
    "most": 8,
    "levels": 1,
    "audit_seen": 0,
    "auditors": 1,
    "seed": None,
}
OUT = "evaluation"  # in the run's directory


def evaluate(cfg: DictConfig, overrides: list[str]) -> int:
    """Write ``report.md`` and ``report.json``; returns the exit code."""
    return run_job(report_on, cfg)


class LoadedRun:
    """A run that is opened to be judged.

    Attributes:
        run, entry, module, config, data: its directory, its checkpoint, what is in that, and its
            data module.
        trust: what its files may name.
        train, held_out: its real images, with their features.
        answers, labelled: as of ``load_reference_images``.
        known, folder: primitives that tell the images from all others, and where what is made of
            them is kept.

    Raises:
        ValueError, OSError, Refused, NothingVerifies, InstantiationException: with what to do.
    """

    def __init__(self, cfg: DictConfig, most: int) -> None:
        self.features: Features = instantiate(cfg.features)
        self.trust = Trust(cfg.trust, cfg.paths.runs)
        self.run, self.entry, self.module, self.device = open_run(cfg)
        self.config = cast(Mapping[str, Any], self.module.config)
        self.data = data = open_data(cfg, self.config, self.entry, self.trust)
        self.folder = Path(cfg.paths.cache) / "evaluation"
        train, held_out, self.answers, self.labelled = load_reference_images(data, most)
        first = data.val_dataloader().dataset.split(np.arange(8)).tolist()  # tells folds apart
        self.known = (data.digest, data.image_size, len(train), data.held_out, first)
        images, labels = train.pixels, cast(Tensor, train.labels)
        self.features.prepare(
            images,
            labels,
            len(data.classes),
            data=self.known,
            folder=self.folder,
            tell=ProgressPrinter("features"),
        )
        self.train, self.held_out = (
            ImageSet(
                p.pixels,
                p.labels if data.classes else None,
                self.features.kept(p.pixels, data=(*self.known, which), folder=self.folder),
                p.answers,
            )
            for p, which in ((train, "training"), (held_out, "held-out"))
        )

    def recipe(self, cfg: DictConfig, run: Path | None, ema: float | None = None) -> SamplingConfig:
        """As of ``resolve_sampling``."""
        return resolve_sampling(
            cfg, self.config, run, ema, state=self.entry.state, trust=self.trust
        )

    def draw(
        self,
        recipe: SamplingConfig,
        network: Denoiser,
        labels: Tensor | None,
        options: DictConfig,
        out: Path | None = None,
    ) -> ImageSet:
        """``options.n`` samples, each batch kept in ``out``, by default with the run, as soon as it
        is drawn.
        """
        denoiser, size, tell = (
            recipe.guided(network, labels),
            self.data.image_size,
            ProgressPrinter("pictures"),
        )
        how = (
            provenance(self.entry, self.device, self.config, recipe.given),
            recipe.primitives(labels),
            options.seed,
        )
        parts = []
        for first in range(0, options.n, options.batch_size):
            numbers = range(first, min(first + options.batch_size, options.n))
            chosen = None if labels is None else labels[numbers.start : numbers.stop]

            def make(numbers: range = numbers, chosen: Tensor | None = chosen) -> dict[str, Tensor]:
                draws = Draws(key(options.seed, "sample"), numbers)
                label = None if chosen is None else chosen.to(self.device)
                noise = draws.normal("start", (3, size, size)).to(self.device)
                batch = sample(recipe.sampler, denoiser, noise, label, draws)
                return {"pixels": to_uint8(batch).permute(0, 3, 1, 2).contiguous()}

            given = (*how, list(numbers), None if chosen is None else chosen.tolist())
            parts.append(
                cached((out or self.run / OUT) / "drawn", f"{first:06d}", given, make)["pixels"]
            )
            tell(numbers.stop, options.n)
        pixels = torch.cat(parts)
        return ImageSet(pixels, labels, self.features.of(pixels), {})


def report_on(cfg: DictConfig) -> None:
    """Write the report, and print its most important figures.

    Raises:
        ValueError, OSError, Refused, NothingVerifies, InstantiationException: with what to do; no
            report was written.
    """
    options = check(cfg.evaluate, "evaluate")
    subject = LoadedRun(cfg, options.most)
    data, entry, train, held_out = subject.data, subject.entry, subject.train, subject.held_out
    labels = labels_for(options.labels, train.labels, len(data.classes), options.n)
    recipe = subject.recipe(cfg, subject.run, options.get("ema"))
    network = recipe.network(subject.module, entry)
    how = provenance(entry, subject.device, subject.config, recipe.given)
    how |= recipe.primitives(labels) | {"data": data.digest}
    how |= {str(k): v for k, v in options.items() if k not in ("out", "batch_size")}
    how |= {"features": OmegaConf.to_container(cfg.features, resolve=True)}
    out = own_folder("evaluate.out", options.out, subject.run / OUT, how, ["report.*"])
    print(recipe.told(labels), flush=True)
    samples = subject.draw(recipe, network, labels, options, None if options.out is None else out)

    report = Report(out, f"{cfg.run} at step {entry.step:,}")
    report.numbers |= {
        "run": cfg.run,
        "step": entry.step,
        "n": options.n,
        "features": subject.features.name,
    }
    report.numbers |= {**recipe.primitives(labels), "seed": options.seed}
    with_labels = "no labels" if labels is None else f"labels {options.labels}"
    report.text(
        f"{options.n:,} pictures of {data.image_size} x {data.image_size} pixels, "
        f"{with_labels}, seed {options.seed}, {recipe.told(labels)}. "
        f"Trained on {len(data.cache) - data.held_out:,} images. Features: {subject.features.name}."
    )
    overview(report, samples)
    mirrored = data.flip or getattr(data, "augment", None) is not None
    said = [quality(report, subject.features.distance, samples, train, held_out, data.classes)]
    said.append(memorisation(report, samples, train, held_out, mirrored=mirrored))
    if subject.answers and options.audit_seen:
        readers = classifiers(
            train,
            subject.answers,
            count=options.auditors,
            seen=options.audit_seen,
            data=subject.known,
            folder=subject.folder,
            tell=ProgressPrinter("the auditing classifiers"),
        )
        said.append(
            audit(report, readers, samples, train, held_out, subject.answers, subject.labelled)
        )
    report.blocks.insert(2, "\n".join(f"- {line}" for line in said[1:]))
    few = slice(0, min(options.levels, len(train), len(held_out)))
    denoising = Denoising(network, device=subject.device)
    denoising_error_section(report, denoising, train[few], held_out[few])
    attention_section(report, denoising, held_out[few])
    draws = Draws(key(options.seed, "sample"), range(4))
    start = draws.normal("start", (3, data.image_size, data.image_size)).to(subject.device)
    four = None if labels is None else labels[:4].to(subject.device)
    walk(report, list(recipe.sampler(recipe.guided(network, labels), start, four, draws)))
    print(*said, f"the whole report is {report.write()}", sep="\n")
    print(record(subject.run, entry, report.numbers))


def check(options: DictConfig, name: str) -> DictConfig:
    """Raises ValueError, naming the key after ``name``, for values that make no sense."""
    check_integers(options, MINIMUMS, f"{name}.")
    if options.labels not in LABELS:
        raise ValueError(f"{name}.labels={options.labels} must be one of {', '.join(LABELS)}")
    return options


def open_data(
    cfg: DictConfig, config: Mapping[str, Any], entry: ResumePoint, trust: Trust = TRUST_NONE
) -> Any:
    """The run's own data module, open on the images that it was trained on.

    Raises:
        ValueError: if it is code that is not trusted.
        ResumeRefusedError: if they are neither in the cache nor what the source has now.
    """
    settings = {**config["data"], "cache": cfg.paths.cache}
    if cfg.data_root is not None:
        settings["root"] = cfg.data_root
    if settings.get("labels") == "auto" and config.get("classes") is not None:
        settings["labels"] = bool(config["classes"])  # decided when it was trained
    trust.check(entry.state, config, ["data"])
    data = instantiate(settings)
    trained_on = entry.manifest.get("fingerprint", {}).get("data")
    data.open(begun=trained_on)
    for note in data.notes:
        print(note, flush=True)
    if trained_on not in (None, data.digest):
        raise ResumeRefusedError(
            f"the images are not those that {cfg.run} was trained on (digest {trained_on[:12]}, "
            f"now "
            f"{data.digest[:12]}): nothing could be said about memorisation. Give the folder of "
            f"those as data_root=..."
        )
    return data


def load_reference_images(
    data: Any, most: int
) -> tuple[ImageSet, ImageSet, dict[str, Sequence[str]], str | None]:
    """Training and held-out images, without features; what the answers to each question are called,
    and which
    question is the class.

    Raises:
        ValueError: if there are too few of either to be compared with.
    """
    if data.held_out < 2 or len(data.cache) - data.held_out < 4:
        raise ValueError(
            f"{data.held_out} of {len(data.cache)} images are held out; a report compares with at "
            f"least 2 "
            f"that are, and 4 that are not: train with another data.holdout, or with more images"
        )
    images = data.val_dataloader().dataset  # the held-out images come first, then the others
    counts = range(data.held_out), range(data.held_out, min(data.held_out + most, len(data.cache)))
    batches = [images[np.array(positions)] for positions in counts]
    classes = tuple(data.classes)
    options: dict[str, Sequence[str]] = {"class": classes} if classes else {}
    answers: list[dict[str, Tensor]] = [
        {"class": batch.label} if classes else {} for batch in batches
    ]
    labelled = "class" if classes else None
    if (
        hasattr(data.source, "attributes")
        and data.source.key == data.cache.key
        and not data.cache.quarantine
    ):
        known = [
            [vars(data.source.attributes(i)) for i in images.split(np.array(where))]
            for where in counts
        ]
        names = [name for name, value in known[0][0].items() if isinstance(value, str)]
        options = {name: sorted({one[name] for part in known for one in part}) for name in names}
        labelled = next((name for name in names if set(options[name]) <= set(classes)), None)
        if labelled:
            options[labelled] = classes
        answers = [
            {name: torch.tensor([options[name].index(one[name]) for one in part]) for name in names}
            for part in known
        ]
    held_out, train = (
        ImageSet(batch.image, batch.label, torch.empty(len(batch.image), 0), answer)
        for batch, answer in zip(batches, answers, strict=True)
    )
    return train, held_out, options, labelled
