"""A report on a run: its pictures, drawn from the EMA weights, against its training and its held-out images.

Picture ``k`` of seed ``s`` and its label are functions of ``(s, k)``, so a larger ``evaluate.n`` only adds to those
there are; they are kept as they are drawn, and a killed evaluation goes on where it was.
"""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FunctionType
from typing import Any, cast

import numpy as np
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor

from sturdy.diffusion.denoiser import Denoiser
from sturdy.diffusion.sampler import sample
from sturdy.evaluation.attention import where_it_looks
from sturdy.evaluation.audit import audit, classifiers
from sturdy.evaluation.cached import cached
from sturdy.evaluation.features import Features
from sturdy.evaluation.grids import to_uint8
from sturdy.evaluation.levels import Denoising, by_level
from sturdy.evaluation.memorisation import memorisation
from sturdy.evaluation.pictures import Pictures
from sturdy.evaluation.quality import overview, quality
from sturdy.evaluation.report import Report
from sturdy.evaluation.walk import walk
from sturdy.randomness import Draws, key
from sturdy.resume.entry import Entry, Refused, find_entry
from sturdy.resume.fingerprint import source_hashes
from sturdy.resume.store import NothingVerifies, Store
from sturdy.training.build import rebuild
from sturdy.training.recipe import Recipe, asked, ours, recipe_of
from sturdy.training.record_evaluation import record
from sturdy.training.teller import Teller

LABELS = ("prior", "even", "none")
LEAST = {"n": 8, "batch_size": 1, "most": 8, "levels": 1, "audit_seen": 0, "auditors": 1}
OUT = "evaluation"  # in the run's directory


def evaluate(cfg: DictConfig, overrides: list[str]) -> int:
    """Write ``report.md`` and ``report.json``; returns the exit code."""
    return answered(report_on, cfg)


def answered(job: Callable[[DictConfig], None], cfg: DictConfig) -> int:
    """Do ``job``, deterministically, with what the user can mend told in a line; returns the exit code."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA starts; else cuBLAS is not deterministic
    torch.set_num_threads(cfg.threads or len(os.sched_getaffinity(0)))
    torch.use_deterministic_algorithms(True)
    try:
        job(cfg)
    except (ValueError, OSError, Refused, NothingVerifies, InstantiationException) as error:
        print(f"error: {error.__cause__ or error}", file=sys.stderr)
        return 2
    return 0


class Subject:
    """A run that is opened to be judged.

    Attributes:
        run, entry, module, config, data: its directory, its checkpoint, what is in that, and its data module.
        train, held_out: its real images, with their features.
        answers, labelled: as of ``real_images``.
        known, folder: primitives that tell the images from all others, and where what is made of them is kept.

    Raises:
        ValueError, OSError, Refused, NothingVerifies, InstantiationException: with what to do.
    """

    def __init__(self, cfg: DictConfig, most: int) -> None:
        self.features: Features = instantiate(cfg.features)
        self.run, self.device = Path(cfg.paths.runs) / cfg.run, cfg.device
        entry = find_entry(Store(self.run / "checkpoints"), cfg.ckpt_path, {}, "min")
        if entry is None:
            raise Refused(f"ckpt_path={cfg.ckpt_path} names no checkpoint to judge; use last or a path")
        self.entry, self.module = entry, rebuild(entry.state).to(cfg.device).eval()
        self.config = cast(Mapping[str, Any], self.module.config)
        self.data = data = open_data(cfg, self.config, entry)
        self.folder = Path(cfg.paths.cache) / "evaluation"
        train, held_out, self.answers, self.labelled = real_images(data, most)
        first = data.val_dataloader().dataset.split(np.arange(8)).tolist()  # tells folds apart
        self.known = (data.digest, data.image_size, len(train), data.held_out, first)
        images, labels = train.pixels, cast(Tensor, train.labels)
        self.features.prepare(
            images, labels, len(data.classes), data=self.known, folder=self.folder, tell=Teller("features")
        )
        self.train, self.held_out = (
            Pictures(
                p.pixels,
                p.labels if data.classes else None,
                self.features.kept(p.pixels, data=(*self.known, which), folder=self.folder),
                p.answers,
            )
            for p, which in ((train, "training"), (held_out, "held-out"))
        )

    def draw(
        self, recipe: Recipe, network: Denoiser, labels: Tensor | None, options: DictConfig, out: Path | None = None
    ) -> Pictures:
        """``options.n`` samples, each batch kept in ``out``, by default with the run, as soon as it is drawn."""
        denoiser, size, tell = recipe.guided(network, labels), self.data.image_size, Teller("pictures")
        code = sorted(item for item in source_hashes().items() if item[0].startswith(("diffusion", "backbone")))
        checkpoint = str(
            self.entry.manifest.get("files") or (str(self.entry.state), self.entry.state.stat().st_mtime_ns)
        )
        how = (checkpoint, recipe.primitives(labels), options.seed, code)
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
            parts.append(cached((out or self.run / OUT) / "drawn", f"{first:06d}", given, make)["pixels"])
            tell(numbers.stop, options.n)
        pixels = torch.cat(parts)
        return Pictures(pixels, labels, self.features.of(pixels), {})


def report_on(cfg: DictConfig) -> None:
    """Write the report, and print its most important figures.

    Raises:
        ValueError, OSError, Refused, NothingVerifies, InstantiationException: with what to do; no report was written.
    """
    options = check(cfg.evaluate, "evaluate")
    subject = Subject(cfg, options.most)
    data, entry, train, held_out = subject.data, subject.entry, subject.train, subject.held_out
    labels = asked(options.labels, train.labels, len(data.classes), options.n)
    recipe = recipe_of(cfg, subject.config, subject.run, options.get("ema"))
    network, out = recipe.network(subject.module, entry), Path(options.out or subject.run / OUT)
    print(recipe.told(labels), flush=True)
    samples = subject.draw(recipe, network, labels, options, out)

    report = Report(out, f"{cfg.run} at step {entry.step:,}")
    report.numbers |= {"run": cfg.run, "step": entry.step, "n": options.n, "features": subject.features.name}
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
            tell=Teller("the auditing classifiers"),
        )
        said.append(audit(report, readers, samples, train, held_out, subject.answers, subject.labelled))
    report.blocks.insert(2, "\n".join(f"- {line}" for line in said[1:]))
    few = slice(0, min(options.levels, len(train), len(held_out)))
    denoising = Denoising(network, device=cfg.device)
    by_level(report, denoising, train[few], held_out[few])
    where_it_looks(report, denoising, held_out[few])
    draws = Draws(key(options.seed, "sample"), range(4))
    start = draws.normal("start", (3, data.image_size, data.image_size)).to(cfg.device)
    four = None if labels is None else labels[:4].to(cfg.device)
    walk(report, list(recipe.sampler(recipe.guided(network, labels), start, four, draws)))
    print(*said, f"the whole report is {report.write()}", sep="\n")
    print(record(subject.run, entry, subject.config, report.numbers))


def check(options: DictConfig, name: str) -> DictConfig:
    """Raises ValueError, naming the key after ``name``, for values that make no sense."""
    for k, least in LEAST.items():
        if k in options and not (isinstance(options[k], int) and options[k] >= least):
            raise ValueError(f"{name}.{k}={options[k]} must be at least {least}")
    if options.labels not in LABELS:
        raise ValueError(f"{name}.labels={options.labels} must be one of {', '.join(LABELS)}")
    return options


def open_data(cfg: DictConfig, config: Mapping[str, Any], entry: Entry) -> Any:
    """The run's own data module, with its cache open.

    Raises:
        Refused: if its images are not those that the run was trained on.
    """
    settings = {**config["data"], "cache": cfg.paths.cache}
    if cfg.data_root is not None:
        settings["root"] = cfg.data_root
    if settings.get("labels") == "auto" and config.get("classes") is not None:
        settings["labels"] = bool(config["classes"])  # decided when it was trained
    data = instantiate(ours(settings, "sturdy.data.", kinds=(type, FunctionType)))
    data.open()
    trained_on = entry.manifest.get("fingerprint", {}).get("data", data.digest)
    if data.digest != trained_on:
        raise Refused(
            f"the images are not those that {cfg.run} was trained on (digest {trained_on[:12]}, now "
            f"{data.digest[:12]}): nothing could be said about memorisation. Give the folder of those as data_root=..."
        )
    return data


def real_images(data: Any, most: int) -> tuple[Pictures, Pictures, dict[str, Sequence[str]], str | None]:
    """Training and held-out images, without features; what the answers to each question are called, and which
    question is the class."""
    images = data.val_dataloader().dataset  # the held-out images come first, then the others
    counts = range(data.held_out), range(data.held_out, min(data.held_out + most, len(data.cache)))
    batches = [images[np.array(positions)] for positions in counts]
    classes = tuple(data.classes)
    options: dict[str, Sequence[str]] = {"class": classes} if classes else {}
    answers: list[dict[str, Tensor]] = [{"class": batch.label} if classes else {} for batch in batches]
    labelled = "class" if classes else None
    if hasattr(data.source, "attributes") and not data.cache.quarantine:
        known = [[vars(data.source.attributes(i)) for i in images.split(np.array(where))] for where in counts]
        names = [name for name, value in known[0][0].items() if isinstance(value, str)]
        options = {name: sorted({one[name] for part in known for one in part}) for name in names}
        labelled = next((name for name in names if set(options[name]) <= set(classes)), None)
        if labelled:
            options[labelled] = classes
        answers = [
            {name: torch.tensor([options[name].index(one[name]) for one in part]) for name in names} for part in known
        ]
    held_out, train = (
        Pictures(batch.image, batch.label, torch.empty(len(batch.image), 0), answer)
        for batch, answer in zip(batches, answers, strict=True)
    )
    return train, held_out, options, labelled
