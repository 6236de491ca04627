"""What makes two runs the same trajectory.

A trajectory is the resolved config, the digest of the data, the content of the files that the
config names, and the code that runs (see ``code_hash``). The stack stands beside it: it may change
rounding although all of these are equal.
"""

import fnmatch
import hashlib
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "lightning", "numpy")
MAX_NAMES = 6  # of modules that are shown when the code changed
MAX_PATH = 4096  # characters


@dataclass(frozen=True)
class Fingerprint:
    """A run's identity as flat primitives; it is stored in every manifest.

    Attributes:
        config: the resolved config, flattened to dotted keys.
        data: digest of the data.
        code: hash of each module that training runs, by name; the version of an installed package.
        stack: versions, device, threads, and how gradients are summed.
        files: SHA-256 of each file that a key of the config names.
    """

    config: dict[str, Any]
    data: str
    code: dict[str, str]
    stack: dict[str, str]
    files: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return primitives for the manifest."""
        return asdict(self)


def fingerprint(
    config: Mapping[str, Any],
    data: str,
    gradients: str = "tree over 1 shards",
    *,
    code: Mapping[str, str] | None = None,
    files: Mapping[str, str] | None = None,
) -> Fingerprint:
    """Take the fingerprint of this process.

    Args:
        config: the resolved config, nested.
        data: digest of the data.
        gradients: how gradients are summed (``reduction.reduction_id``); by default in one process.
        code: as of ``Fingerprint``.
        files: as of ``Fingerprint``.
    """
    stack = describe_stack() | {"gradients": gradients}
    return Fingerprint(flatten(config), data, dict(code or {}), stack, dict(files or {}))


def describe_stack() -> dict[str, str]:
    """Return what may change rounding though the config is equal."""
    versions = {name: metadata.version(name) for name in PACKAGES}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return versions | {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "device": device,
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
    }


def file_hashes(
    config: Mapping[str, Any], *, leave_out: Iterable[str] = (), written: Iterable[Path] = ()
) -> dict[str, str]:
    """Hash each file or folder that a text value of the config names.

    Args:
        config: with dotted keys.
        leave_out: keys, with all keys below them, whose files are not read.
        written: folders in which training writes; files in them are results.
    """
    outputs = [folder.absolute() for folder in written]
    hashes = {}
    for key, value in config.items():
        if matches(key, leave_out) or not _may_be_path(value):
            continue
        path = Path(value).expanduser().absolute()
        if any(path.is_relative_to(output) for output in outputs):
            continue
        if digest := content_hash(path):
            hashes[key] = digest
    return hashes


def content_hash(path: Path) -> str | None:
    """Hash a file, or a folder's files with their names; return None where there is neither."""
    try:
        if path.is_file():
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.is_file())
            lines = [f"{file.relative_to(path)} {content_hash(file)}\n" for file in files]
            return hashlib.sha256("".join(lines).encode()).hexdigest()
    except OSError:  # the name is too long for a file, or it must not be read
        pass
    return None


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings and lists to ``{"a.b.0": leaf}``; an empty one is a leaf."""
    items = config.items() if isinstance(config, Mapping) else enumerate(config)
    flat: dict[str, Any] = {}
    for key, value in items:
        if isinstance(value, Mapping | list) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def matches(key: str, patterns: Iterable[str]) -> bool:
    """Return whether one of ``patterns`` matches ``key`` or a key above it."""
    for pattern in patterns:
        if fnmatch.fnmatchcase(key, pattern) or fnmatch.fnmatchcase(key, f"{pattern}.*"):
            return True
    return False


def _may_be_path(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) < MAX_PATH and "\0" not in value
