"""What identifies a run of the template: the code that it runs, and the files that it reads."""

from collections.abc import Iterable, Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from exact_resume.code_hash import code_hashes, targets
from exact_resume.fingerprint import PACKAGES, Fingerprint, file_hashes, fingerprint, matches

# Their versions are part of the stack of a run that uses them.
PRETRAINED_PACKAGES = ("diffusers", "transformers", "peft")
SPACE_KEY = "space.key"  # in the fingerprint's config: which weights encode and decode
CONDITION_KEY = "condition.key"  # likewise: which weights read the captions
CAPTIONS = "captions"  # in the fingerprint's stack: the digest of their embeddings
LATENTS = "latents"  # likewise: the digest of the cached moments, which depend on the device, too

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
    "sturdy.data.buckets",
    "sturdy.data.datamodule",
    "sturdy.data.encoded",
    "sturdy.data.images",
    "sturdy.data.split",
    "sturdy.diffusion.*",
    "sturdy.encoders.encoder",
    "sturdy.encoders.network",
    "sturdy.image_size",
    "sturdy.pretrained.borrowed",
    "sturdy.pretrained.captions",
    "sturdy.pretrained.latents",
    "sturdy.pretrained.lora",
    "sturdy.pretrained.unet2d",
    "sturdy.training.alignment",
    "sturdy.training.auxiliary",
    "sturdy.training.build",
    "sturdy.training.ema",
    "sturdy.training.ema_profiles",
    "sturdy.training.frozen",
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
    condition: str = "",
    captions: str = "",
) -> Fingerprint:
    """Take the fingerprint of a run.

    Args:
        config: the resolved config, nested.
        data: digest of the data. It stands for the source of the images and its files, too.
        gradients: how gradients are summed (``exact_resume.reduction.reduction_id``).
        ignore: keys that cannot change a weight; code and files that they name do not count.
        space: the key of the space (``Space.key``); empty if it has no weights.
        condition: the key of the condition's text encoders; empty if it has none.
        captions: the digest of the captions' embeddings. They are made anew where the cache is
            gone, and another machine rounds them differently.
    """
    ignore = [*ignore, "data.source", "init_from"]
    now = fingerprint(config, data, gradients)
    if any(is_pretrained(target) for target in targets(config)):
        now.stack.update({name: metadata.version(name) for name in PRETRAINED_PACKAGES})
    roots = [*ENGINE, *targets(without(config, ignore))]
    code = code_hashes(roots, leave_out=modules_beside(), known=PACKAGES)
    runs = Path(now.config["paths.runs"])
    cache_folder = Path(now.config["paths.cache"])
    files = file_hashes(
        now.config,
        leave_out=[*ignore, "data", "callbacks", "logger"],  # the last two name what they write
        written=[runs / str(config["name"]), cache_folder],
    )
    keys = {SPACE_KEY: space, CONDITION_KEY: condition}
    stated = now.config | {name: value for name, value in keys.items() if value}
    stack = now.stack | ({CAPTIONS: captions} if captions else {})
    return Fingerprint(stated, data, code, stack, files)


def is_pretrained(target: str) -> bool:
    """Return whether a ``_target_`` uses the packages of ``sturdy.pretrained``."""
    return target.startswith("sturdy.pretrained.")


def sampling_code(config: Mapping[str, Any], sampler: Mapping[str, Any]) -> dict[str, str]:
    """Hash the code that draws images: a sampler's config, and the network of a run's config."""
    parts = [config.get(key) for key in ("condition", "backbone", "schedule", "target")]
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
