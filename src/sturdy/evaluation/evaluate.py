"""A report on a run: images from its EMA weights, against its training and held-out images.

Image ``k`` of seed ``s`` and its label are functions of ``(s, k)``, so a larger ``evaluate.n`` only
adds images. They are cached as they are drawn, so an evaluation that was killed continues.
"""

from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from exact_resume.randomness import Draws, key
from sturdy.diffusion.sampler import Estimator, sample
from sturdy.encoders.cached import cached
from sturdy.encoders.efficientnet import HOW_TO_GET, find_weights
from sturdy.encoders.images import ImageSet
from sturdy.evaluation.attention import attention_section
from sturdy.evaluation.audit import audit_section, train_classifiers
from sturdy.evaluation.drift import write_drift
from sturdy.evaluation.features import EfficientNet, Features
from sturdy.evaluation.levels import Denoising, denoising_error_section
from sturdy.evaluation.memorisation import memorisation_section
from sturdy.evaluation.quality import quality_section, samples_section, second_quality_section
from sturdy.evaluation.record import record
from sturdy.evaluation.reference import ReferenceImages, load_reference_images, open_data
from sturdy.evaluation.report import Report, write_json
from sturdy.evaluation.summary import count_network_calls, summary_row
from sturdy.evaluation.walk import walk_section
from sturdy.image_size import describe_size, height_and_width
from sturdy.pretrained.captions import Captions
from sturdy.progress import ProgressPrinter
from sturdy.sampling.config import SamplingConfig, resolve_sampling
from sturdy.sampling.grids import to_uint8
from sturdy.sampling.labels import labels_for
from sturdy.sampling.loaded_run import LoadedRun, check_integers, open_run, run_job
from sturdy.sampling.output_folder import claim_folder, provenance
from sturdy.training.captions import caption_option

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
OUTPUT = "evaluation"  # in the run's directory
NOT_IN_REPORT = ("out", "batch_size", "summary", "also")  # options that change no other number
NO_SECOND_FEATURES = (
    f"For a second table, in features that see blur and faint noise, install the weights of "
    f"features=efficientnet, 17 MB: {HOW_TO_GET}"
)
WALKS = 4


def evaluate(cfg: DictConfig, overrides: list[str]) -> int:
    """Write ``report.md`` and ``report.json``; return the exit code.

    With ``drift=true`` it is a report on the new images of the run.
    """
    return run_job(write_drift if cfg.drift else write_report, cfg)


def write_report(cfg: DictConfig) -> None:
    """Write the report, and print its most important results.

    Raises:
        ValueError, OSError, ResumeRefusedError, NoValidCheckpointError, InstantiationException:
            with what to do; no report was written.
    """
    options = cfg.evaluate
    check_options(options)
    features: Features = instantiate({"features": cfg.features})["features"]
    second = _second_features(options, features)
    run = open_run(cfg)
    if run.config["data"].get("buckets"):
        raise ValueError(
            f"run={cfg.run} was trained with data.buckets: a report compares images of one size, "
            f"and its images have several. Look at samples instead: sample.size=..."
        )
    data = open_data(cfg, run)
    reference = load_reference_images(data, features, options.most, Path(cfg.paths.cache))
    option = caption_option(run.module)
    if option:
        option.prepare(data.captions, Path(cfg.paths.cache))
    labels = labels_for(options.labels, reference.train.labels, reference.conditions, options.n)
    sampling = resolve_sampling(
        cfg, run.config, options.ema, state=run.point.state, trust=run.trust
    )
    sampling.make_sampler()  # before anything is written, as the settings may make none
    network = sampling.load_network(run)
    guide = sampling.load_guide(run)
    denoiser = sampling.add_guidance(network, labels, guide)

    used = {str(name): value for name, value in options.items() if name not in NOT_IN_REPORT}
    how = provenance(run, sampling.sampler) | sampling.primitives(labels) | used
    how |= {"data": data.digest, "features": OmegaConf.to_container(cfg.features, resolve=True)}
    if second:
        how["also"] = second.name
    default = run.directory / OUTPUT
    out = claim_folder("evaluate.out", options.out, default, how, ["report.*"])
    print(sampling.describe(labels), flush=True)
    # Reports in the default folders share their images.
    images_folder = (default if options.out is None else out) / "drawn"
    pixels = draw_images(run, sampling, denoiser, labels, options, images_folder)
    samples = ImageSet(pixels, labels, features.extract(pixels), {})

    report = Report(out, f"{cfg.run} at step {run.point.step:,}")
    report.introduction = (
        f"{options.n:,} images of {describe_size(data.image_size)} pixels, "
        f"{_describe_labels(labels, options.labels, option)}, seed {options.seed}, "
        f"{sampling.describe(labels)}. Trained on {len(data.cache) - data.held_out:,} images. "
        f"Features: {features.name}."
    )
    if option and data.classes and reference.class_of is None:
        report.introduction += (
            " Figures by class are left out: a caption has images of several classes."
        )
    report.numbers = {
        "run": cfg.run,
        "step": run.point.step,
        "n": options.n,
        "seed": options.seed,
        "features": features.name,
        **sampling.primitives(labels),
        "network_calls": count_network_calls(
            sampling, network, labels, guided_by_network=guide is not None
        ),
    }
    tables = _compare_with_real_images(report, samples, reference, data, features, second, options)
    denoising = Denoising(network, run.module.space, device=run.device)
    few = min(options.levels, len(reference.train), len(reference.held_out))
    denoising_error_section(report, denoising, reference.train[:few], reference.held_out[:few])
    attention_section(report, denoising, reference.held_out[:few])
    walk_section(report, _walk(run, sampling, denoiser, labels, options), run.module.space.decode)

    path = report.write()
    print(*tables, *report.verdicts, f"the whole report is {path}", sep="\n")
    print(record(run.directory, run.point, report.numbers))
    if options.summary is not None:
        write_json(Path(options.summary), summary_row(report.numbers))


def _second_features(options: DictConfig, features: Features) -> EfficientNet | None:
    """Return features for a second table; None if they are not wanted or not installed."""
    wanted = options.also is not None and features.name != EfficientNet.name
    return EfficientNet() if wanted and find_weights() else None


def _describe_labels(labels: Tensor | None, how: str, option: Captions | None) -> str:
    if labels is None:
        return "no captions" if option else "no labels"
    return f"captions {how}" if option else f"labels {how}"


def check_options(options: DictConfig) -> None:
    """Check the options ``evaluate.*``.

    Raises:
        ValueError: naming the key.
    """
    check_integers(options, MINIMUMS, "evaluate.")
    if options.labels not in LABELS:
        raise ValueError(f"evaluate.labels={options.labels} must be one of {', '.join(LABELS)}")
    if options.also not in (None, EfficientNet.name):
        raise ValueError(f"evaluate.also={options.also} must be {EfficientNet.name} or null")


def draw_images(
    run: LoadedRun,
    sampling: SamplingConfig,
    denoiser: Estimator,
    labels: Tensor | None,
    options: DictConfig,
    folder: Path,
) -> Tensor:
    """Draw ``options.n`` images, uint8 ``(n, c, h, w)``, or read them from ``folder``.

    Args:
        run: the run and its checkpoint.
        sampling: the settings.
        denoiser: with guidance.
        labels: of all images.
        options: ``evaluate.*``.
        folder: for the images, a file for each batch.
    """
    sampler = sampling.make_sampler()
    space = run.module.space
    shape = space.shape_of(*height_and_width(run.config["data"]["image_size"]))
    how = (provenance(run, sampling.sampler), sampling.primitives(labels), options.seed)
    progress = ProgressPrinter("images")

    def draw(numbers: range, chosen: Tensor | None) -> dict[str, Tensor]:
        draws = Draws(key(options.seed, "sample"), numbers)
        noise = draws.normal("start", shape).to(run.device)
        label = None if chosen is None else chosen.to(run.device)
        x0 = sample(sampler, denoiser, noise, label, draws, clip=space.clip)
        return {"pixels": to_uint8(space.decode(x0)).permute(0, 3, 1, 2).contiguous()}

    parts = []
    for first in range(0, options.n, options.batch_size):
        numbers = range(first, min(first + options.batch_size, options.n))
        chosen = None if labels is None else labels[numbers.start : numbers.stop]
        depends = (*how, list(numbers), None if chosen is None else chosen.tolist())

        def compute(numbers: range = numbers, chosen: Tensor | None = chosen) -> dict[str, Tensor]:
            return draw(numbers, chosen)

        parts.append(cached(folder, f"{first:06d}", depends, compute)["pixels"])
        progress(numbers.stop, options.n)
    return torch.cat(parts)


def _compare_with_real_images(
    report: Report,
    samples: ImageSet,
    reference: ReferenceImages,
    data: Any,
    features: Features,
    second: EfficientNet | None,
    options: DictConfig,
) -> list[str]:
    """Add the sections on quality, memorisation and attributes; return the tables of quality."""
    samples = reference.with_classes(samples)
    train = reference.with_classes(reference.train)
    held_out = reference.with_classes(reference.held_out)
    samples_section(report, samples)
    tables = [quality_section(report, features, samples, train, held_out, data.classes)]
    if second:
        tables.append(second_quality_section(report, second, samples.pixels, reference))
    elif options.also and features.name != EfficientNet.name:
        report.text(NO_SECOND_FEATURES)
        tables.append(NO_SECOND_FEATURES)
    mirrored = data.flip or getattr(data, "augment", None) is not None
    memorisation_section(report, samples, train, held_out, mirrored=mirrored)
    if reference.options and options.audit_seen:
        _audit(report, samples, reference, options)
    return tables


def _audit(
    report: Report, samples: ImageSet, reference: ReferenceImages, options: DictConfig
) -> None:
    classifiers = train_classifiers(
        reference.train,
        reference.options,
        count=options.auditors,
        seen=options.audit_seen,
        data=reference.cache_key,
        folder=reference.cache_folder,
        tell=ProgressPrinter("the auditing classifiers"),
    )
    audit_section(
        report,
        classifiers,
        samples,
        reference.train,
        reference.held_out,
        reference.options,
        reference.class_attribute,
    )


def _walk(
    run: LoadedRun,
    sampling: SamplingConfig,
    denoiser: Estimator,
    labels: Tensor | None,
    options: DictConfig,
) -> list[Any]:
    """Return the steps of the sampler for the first images."""
    space = run.module.space
    draws = Draws(key(options.seed, "sample"), range(WALKS))
    shape = space.shape_of(*height_and_width(run.config["data"]["image_size"]))
    noise = draws.normal("start", shape).to(run.device)
    label = None if labels is None else labels[:WALKS].to(run.device)
    return list(sampling.make_sampler()(denoiser, noise, label, draws, clip=space.clip))
