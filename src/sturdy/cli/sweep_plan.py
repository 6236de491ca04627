"""Plan a sweep: each combination of the values given is a run, named after what is swept."""

import itertools
import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from importlib.util import find_spec
from pathlib import Path

from hydra.core.override_parser.types import Override, QuotedString, Transformer
from omegaconf import OmegaConf

from sturdy.cli.overrides import (
    LAUNCHER,
    check_option,
    compose_checked,
    hydra_as_usage_error,
    parse_overrides,
)
from sturdy.cli.quoting import quote
from sturdy.cli.usage import UsageError

MAX_LABEL = 120  # characters; a file system takes 255 bytes
SUMMARY = "evaluate.summary"  # key: the file into which a job writes what it measured, flat JSON


@dataclass(frozen=True)
class Job:
    """One run of a sweep.

    Attributes:
        name: of the run, ``cars/optimizer.lr-0.001+seed-0``; of a script without names, the label.
        words: the overrides of its command.
        metrics: its ``metrics.csv``, once it is a run.
        swept: the values it was given of the keys that are swept.
        summary: the JSON file with what it measured, where its script writes one.
    """

    name: str
    words: list[str]
    metrics: Path | None = None
    swept: Mapping[str, str] = field(default_factory=dict)
    summary: Path | None = None


def plan_jobs(config: Path, words: list[str]) -> list[Job]:
    """Return the jobs of a sweep, whose configs were all checked.

    Raises:
        UsageError: if one of them is mistaken.
    """
    with hydra_as_usage_error(config):
        overrides = parse_overrides(words, multirun=True)
        for override in overrides:
            if override.key_or_group == LAUNCHER[0]:
                _check_launcher(override)
        combinations = combine(overrides)
    jobs = []
    summaries = f".sweep-{secrets.token_hex(4)}"
    for swept, job_words in combinations:
        label = make_label(swept)
        try:
            cfg = compose_checked(config, job_words)
        except UsageError as error:
            raise UsageError(f"{label}: {error}" if label else str(error)) from None
        if "name" in cfg:
            name = f"{cfg.name}/{label}".rstrip("/")
            metrics = Path(cfg.paths.runs) / name / "metrics.csv"
            jobs.append(Job(name, [*job_words, f"name={quote(name)}"], metrics, swept))
        elif OmegaConf.select(cfg, "evaluate", default={}).keys() >= {"summary"}:
            file = Path(cfg.paths.runs).absolute() / summaries / f"{len(jobs)}.json"
            words_with_summary = [*job_words, f"{SUMMARY}={quote(str(file))}"]
            jobs.append(Job(label, words_with_summary, swept=swept, summary=file))
        else:
            jobs.append(Job(label, job_words, swept=swept))
    if not jobs:
        raise UsageError(f"{' '.join(words)}: no values to sweep through")
    return jobs


def _check_launcher(override: Override) -> None:
    check_option(override)
    if not str(override.value()).startswith("basic") and not find_spec("submitit"):
        raise UsageError(
            f"{override.input_line} needs submitit: pip install 'sturdy-diffusion[slurm]'"
        )


def combine(overrides: Iterable[Override]) -> list[tuple[dict[str, str], list[str]]]:
    """Return each combination of values: what is swept in it, by key, and its words.

    Raises:
        ValueError: for an override without values to go through, such as an interval.
    """
    last = {override.get_key_element(): override for override in overrides}
    choices = []
    for key, override in last.items():
        if not key.startswith(LAUNCHER):
            choices.append([(key, text, word) for text, word in _values(key, override)])
    unique: dict[
        tuple[str, ...], tuple[dict[str, str], list[str]]
    ] = {}  # by the values, of which one may be given twice
    for combination in itertools.product(*choices):
        swept = {key: text for key, text, _ in combination if text is not None}
        words = [word for _, _, word in combination]
        unique.setdefault(tuple(swept.values()), (swept, words))
    return list(unique.values())


def _values(key: str, override: Override) -> list[tuple[str | None, str]]:
    """Return (text, word) for each value of ``override``; the text is None if it is not swept."""
    if not override.is_sweep_override():
        return [(None, override.input_line or "")]
    if not override.is_discrete_sweep():
        raise ValueError(
            f"{override.input_line}: a sweep goes through values; give them, as in {key}=1,2,3, or "
            f"let Optuna choose those of 20 runs: sweep.trials=20"
        )
    pairs: list[tuple[str | None, str]] = []
    for value in override.sweep_iterator():
        word = Transformer.str(value)
        pairs.append((value.text if isinstance(value, QuotedString) else word, f"{key}={word}"))
    return pairs


def make_label(swept: Mapping[str, str]) -> str:
    """Return a directory's name for the swept values, without their order and without ``name``.

    It needs quotes neither in a shell nor in Hydra. Where characters are lost, a digest tells
    apart what would be equal.
    """
    items = sorted((key.lstrip("+"), value) for key, value in swept.items() if key != "name")
    label = "+".join(f"{_plain(key)}-{_plain(value)}" for key, value in items)
    if len(label) <= MAX_LABEL and all(_plain(text) == text for item in items for text in item):
        return label
    return f"{label[:MAX_LABEL]}-{blake2b(repr(items).encode(), digest_size=4).hexdigest()}"


def _plain(text: str) -> str:
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", text)
    return text if plain == text else plain.strip("-")
