"""What makes two runs the same trajectory, and what is promised when one continues the other.

    bitwise        the same stack, the same shards, deterministic kernels: every bit equal
    same samples   the same order, noise and times; rounding and dropout masks may differ
    refused        a field that is part of the trajectory differs

The trajectory is the whole resolved config but for a short named list, the data's digest and our own source.
"""

import fnmatch
import hashlib
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import sturdy

PACKAGES = ("torch", "lightning", "numpy")


@dataclass(frozen=True)
class Fingerprint:
    """A run's identity as flat primitives; it is stored in every manifest.

    Attributes:
        config: the resolved config, flattened to dotted keys.
        data: digest of images, labels and classes.
        source: SHA-256 of each of our own source files.
        stack: what may change rounding though the config is equal: versions, device, threads.
    """

    config: dict[str, Any]
    data: str
    source: dict[str, str]
    stack: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        """As primitives, for the manifest."""
        return asdict(self)


@dataclass(frozen=True)
class Guarantee:
    """What a resume promises: ``level`` is ``bitwise``, ``same samples`` or ``refused``, and why."""

    level: str
    reasons: list[str] = field(default_factory=list)


def fingerprint(config: Mapping[str, Any], data: str, gradients: str = "tree over 1 shards") -> Fingerprint:
    """The fingerprint of this process.

    Args:
        config: resolved.
        data: the data's digest.
        gradients: how they are summed, as of ``sturdy.resume.reduction.describe``; the default is one process.
    """
    return Fingerprint(flatten(config), data, source_hashes(), stack() | {"gradients": gradients})


def compare(then: Mapping[str, Any], now: Fingerprint, *, ignore: Iterable[str], rounding: Iterable[str]) -> Guarantee:
    """What continuing the run with fingerprint ``then`` as ``now`` promises.

    Args:
        then: a stored fingerprint, as of ``Fingerprint.as_dict``.
        ignore: config keys (with all below them; ``*`` matches) that cannot change a weight.
        rounding: config keys that change rounding or dropout masks, not samples, noise or times.
    """
    then = {"config": {}, "data": "nothing", "source": {}, "stack": {}} | dict(then)  # other versions may lack some
    changed = {
        k: f"{k}: {_show(then['config'], k)} -> {_show(now.config, k)}"
        for k in sorted(then["config"].keys() | now.config.keys())
        if then["config"].get(k, ...) != now.config.get(k, ...) and not _matches(k, ignore)  # null is not nothing
    }
    refusals = [line for k, line in changed.items() if not _matches(k, rounding)]
    if then["data"] != now.data:
        refusals.append(f"the data changed: digest {then['data'][:12]} -> {now.data[:12]}")
    refusals += [f"the source changed: {name}" for name in _differing(then["source"], now.source)]
    if refusals:
        return Guarantee("refused", refusals)
    reasons = [line for k, line in changed.items() if _matches(k, rounding)]
    reasons += [
        f"{k}: {then['stack'].get(k, 'nothing')} -> {now.stack.get(k, 'nothing')}"
        for k in _differing(then["stack"], now.stack)
    ]
    if now.config.get("trainer.deterministic") is not True:
        reasons.append("trainer.deterministic is off")
    return Guarantee("same samples", reasons) if reasons else Guarantee("bitwise")


def stack() -> dict[str, str]:
    """What may change rounding though the config is equal."""
    versions = {name: metadata.version(name) for name in PACKAGES}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return versions | {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "device": device,
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
    }


@cache
def source_hashes() -> dict[str, str]:
    """SHA-256 of each of our own source files, by name; as this process has found them when it first asked."""
    root = Path(sturdy.__file__).parent
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        for path in sorted(root.rglob("*.py"))
    }


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings and lists as ``{"a.b.0": leaf}``; an empty one is a leaf."""
    items = config.items() if isinstance(config, Mapping) else enumerate(config)
    flat: dict[str, Any] = {}
    for k, v in items:
        if isinstance(v, Mapping | list) and v:
            flat |= flatten(v, f"{prefix}{k}.")
        else:
            flat[f"{prefix}{k}"] = v
    return flat


def _matches(key: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(key, p) or fnmatch.fnmatchcase(key, p + ".*") for p in patterns)


def _differing(a: Mapping[str, str], b: Mapping[str, str]) -> list[str]:
    return sorted(k for k in a.keys() | b.keys() if a.get(k) != b.get(k))


def _show(config: Mapping[str, Any], key: str) -> str:
    return repr(config[key]) if key in config else "nothing"
