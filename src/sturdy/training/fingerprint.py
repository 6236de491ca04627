"""What identifies a run of the template: the code that it runs, and the files that it reads."""

from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from exact_resume.code_hash import code_hashes, targets
from exact_resume.fingerprint import PACKAGES, Fingerprint, file_hashes, fingerprint, matches

SPACE_KEY = "space.key"  # in the fingerprint's config: which weights encode and decode

# The modules that compute every run, whatever its config names.
ENGINE = (
    "sturdy.training.module",
    "sturdy.training.build",
    "sturdy.training.trainer",
    "sturdy.training.strategies",
    "exact_resume.reduction",
)

# The modules of this project that can change a weight. They count where the engine or a part that
# the config names imports them. Modules that read and decode images are not among them: the digest
# of the data says whether they changed anything.
COMPUTES = (
    "exact_resume.permutation",
    "exact_resume.randomness",
    "exact_resume.reduction",
    "examples.cars.backbone",
    "sturdy.backbone.*",
    "sturdy.data.augment",
    "sturdy.data.datamodule",
    "sturdy.data.encoded",
    "sturdy.data.images",
    "sturdy.data.split",
    "sturdy.diffusion.*",
    "sturdy.encoders.encoder",
    "sturdy.encoders.network",
    "sturdy.pretrained.latents",
    "sturdy.training.alignment",
    "sturdy.training.auxiliary",
    "sturdy.training.build",
    "sturdy.training.ema",
    "sturdy.training.ema_profiles",
    "sturdy.training.module",
    "sturdy.training.optim",
    "sturdy.training.optimizer_state",
    "sturdy.training.strategies",
    "sturdy.training.trainer",
)


def run_fingerprint(
    config: Mapping[str, Any],
    data: str,
    gradients: str,
    *,
    ignore: Iterable[str],
    space: str = "",
) -> Fingerprint:
    """Take the fingerprint of a run.

    Args:
        config: the resolved config, nested.
        data: digest of the data. It stands for the source of the images and its files, too.
        gradients: how gradients are summed (``exact_resume.reduction.reduction_id``).
        ignore: keys that cannot change a weight; code and files that they name do not count.
        space: the key of the space (``Space.key``); empty if it has no weights.
    """
    ignore = [*ignore, "data.source", "init_from"]
    now = fingerprint(config, data, gradients)
    roots = [*ENGINE, *targets(without(config, ignore))]
    code = code_hashes(roots, leave_out=modules_beside(), known=PACKAGES)
    runs = Path(now.config["paths.runs"])
    cache_folder = Path(now.config["paths.cache"])
    files = file_hashes(
        now.config,
        leave_out=[*ignore, "data", "callbacks", "logger"],  # the last two name what they write
        written=[runs / str(config["name"]), cache_folder],
    )
    if space:
        config = now.config | {SPACE_KEY: space}
        return Fingerprint(config, data, code, now.stack, files)
    return Fingerprint(now.config, data, code, now.stack, files)


def sampling_code(config: Mapping[str, Any], sampler: Mapping[str, Any]) -> dict[str, str]:
    """Hash the code that draws images: a sampler's config, and the network of a run's config."""
    parts = [config.get(key) for key in ("backbone", "schedule", "target")]
    roots = ["sturdy.diffusion.denoiser", "sturdy.diffusion.sampler", *targets([*parts, sampler])]
    return code_hashes(roots, leave_out=modules_beside(), known=PACKAGES)


def without(node: Any, patterns: Iterable[str], prefix: str = "") -> Any:
    """Copy a config of primitives without the keys that ``patterns`` match."""
    if not isinstance(node, Mapping):
        return node
    kept = {}
    for key, value in node.items():
        path = f"{prefix}{key}"
        if not matches(path, patterns):
            kept[key] = without(value, patterns, f"{path}.")
    return kept


@cache
def modules_beside() -> tuple[str, ...]:
    """Return the modules of this project that cannot change a weight."""
    source = Path(__file__).parents[2]
    names = ["examples", "examples.cars"]  # __init__ runs nothing
    for package in ("exact_resume", "sturdy"):
        for file in (source / package).rglob("*.py"):
            parts = file.relative_to(source).with_suffix("").parts
            names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return tuple(name for name in names if not matches(name, COMPUTES))
