"""What a run is, for the fingerprint: the code that its training runs, and the files that its
config names.
"""

import fnmatch
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from exact_resume.code_hash import code_hashes, targets
from exact_resume.fingerprint import PACKAGES, Fingerprint, file_hashes, fingerprint

# The modules of ours that compute every run, whatever its config names.
ENGINE = (
    "sturdy.training.module",
    "sturdy.training.build",
    "sturdy.training.parts",
    "sturdy.training.strategies",
    "exact_resume.reduction",
)

# The modules of ours that these import and that cannot change a weight, unless the config names
# them as a part of the trajectory. What reads and decodes images is among them: the digest of the
# data says whether it changed anything.
LEAVE_OUT = (
    "exact_resume",
    "exact_resume.__main__",
    "exact_resume.archive",
    "exact_resume.attempt",
    "exact_resume.callbacks*",
    "exact_resume.checkpoint*",
    "exact_resume.code_hash",
    "exact_resume.distributed",
    "exact_resume.failures",
    "exact_resume.files",
    "exact_resume.fingerprint",
    "exact_resume.lock",
    "exact_resume.metrics",
    "exact_resume.replay",
    "exact_resume.resume",
    "exact_resume.scores",
    "exact_resume.signals",
    "exact_resume.skips",
    "exact_resume.streams",
    "exact_resume.supervisor",
    "exact_resume.system",
    "exact_resume.workers",
    "examples",
    "examples.cars",
    "sturdy",
    "sturdy.backbone",
    "sturdy.cli*",
    "sturdy.data",
    "sturdy.data.build",
    "sturdy.data.cache",
    "sturdy.data.changes",
    "sturdy.data.colour",
    "sturdy.data.decode",
    "sturdy.data.folder",
    "sturdy.data.formats",
    "sturdy.data.layout",
    "sturdy.data.listing",
    "sturdy.data.mend",
    "sturdy.data.options",
    "sturdy.data.remarks",
    "sturdy.data.source",
    "sturdy.diffusion",
    "sturdy.encoders",
    "sturdy.encoders.cached",
    "sturdy.errors",
    "sturdy.evaluation*",
    "sturdy.progress",
    "sturdy.renames",
    "sturdy.sampling*",
    "sturdy.training",
    "sturdy.training.callbacks*",
    "sturdy.training.fingerprint",
    "sturdy.training.init_from",
    "sturdy.training.launch",
    "sturdy.training.loggers*",
    "sturdy.training.match_weights",
    "sturdy.training.memory",
    "sturdy.training.run",
    "sturdy.trust",
)


def run_fingerprint(
    config: Mapping[str, Any], data: str, gradients: str, *, ignore: Iterable[str]
) -> Fingerprint:
    """Take the fingerprint of a run.

    Args:
        config: resolved.
        data: digest of the data. It speaks for the source of the images and for what lies in its
            files, too.
        gradients: as of ``exact_resume.reduction.reduction_id``.
        ignore: keys that cannot change a weight; the code and the files that they name are left
            out.
    """
    ignore = [*ignore, "data.source", "init_from"]
    now = fingerprint(config, data, gradients)
    roots = [*ENGINE, *targets(without(config, ignore))]
    code = code_hashes(roots, leave_out=LEAVE_OUT, known=PACKAGES)
    runs, cache = Path(now.config["paths.runs"]), Path(now.config["paths.cache"])
    read = [*ignore, "data", "callbacks", "logger"]  # the last two name what they write
    files = file_hashes(now.config, leave_out=read, written=[runs / str(config["name"]), cache])
    return Fingerprint(now.config, data, code, now.stack, files)


def sampling_code(config: Mapping[str, Any], sampler: Mapping[str, Any]) -> dict[str, str]:
    """Hash the code that draws images: the ``sampler``, a config, and the network of the run
    ``config``.
    """
    parts = [config.get(key) for key in ("backbone", "schedule", "target")]
    roots = ["sturdy.diffusion.denoiser", "sturdy.diffusion.sampler", *targets([*parts, sampler])]
    return code_hashes(roots, leave_out=LEAVE_OUT, known=PACKAGES)


def without(node: Any, patterns: Iterable[str], prefix: str = "") -> Any:
    """Copy ``node``, a config as primitives, without the keys that ``patterns`` match."""
    if isinstance(node, Mapping):
        kept = {
            k: v
            for k, v in node.items()
            if not any(fnmatch.fnmatchcase(f"{prefix}{k}", p) for p in patterns)
        }
        return {k: without(v, patterns, f"{prefix}{k}.") for k, v in kept.items()}
    return node
