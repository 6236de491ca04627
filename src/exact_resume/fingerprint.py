"""What makes two runs the same trajectory, and what is promised when one continues the other.

    bitwise        the same stack, the same shards, deterministic kernels: every bit equal
    same samples   the same order, noise and times; rounding and dropout masks may differ
    refused        a field that is part of the trajectory differs

The trajectory is the whole resolved config but for a short named list, the data's digest, the
content of files that the config names, and the code that runs (see ``exact_resume.code_hash``).
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
DATA_CHANGED = "the data changed"
MAX_NAMES = 6  # modules that are named when the code changed


@dataclass(frozen=True)
class Fingerprint:
    """A run's identity as flat primitives; it is stored in every manifest.

    Attributes:
        config: the resolved config, flattened to dotted keys.
        data: digest of images, labels and classes.
        code: hash of each module that training runs, by name; the version of a package that is
            installed.
        stack: what may change rounding though the config is equal: versions, device, threads.
        files: SHA-256 of each file that a key of the config names.
    """

    config: dict[str, Any]
    data: str
    code: dict[str, str]
    stack: dict[str, str]
    files: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """As primitives, for the manifest."""
        return asdict(self)


@dataclass(frozen=True)
class Guarantee:
    """What a resume promises: ``level`` is ``bitwise``, ``same samples`` or ``refused``, and
    why.
    """

    level: str
    reasons: list[str] = field(default_factory=list)


def fingerprint(
    config: Mapping[str, Any],
    data: str,
    gradients: str = "tree over 1 shards",
    *,
    code: Mapping[str, str] | None = None,
    files: Mapping[str, str] | None = None,
) -> Fingerprint:
    """Take the fingerprint of this process; the other arguments are as of ``Fingerprint``.

    Args:
        config: resolved.
        gradients: how they are summed, as of ``exact_resume.reduction.reduction_id``; the default
            is one process.
    """
    here = describe_stack() | {"gradients": gradients}
    return Fingerprint(flatten(config), data, dict(code or {}), here, dict(files or {}))


def compare(
    then: Mapping[str, Any],
    now: Fingerprint,
    *,
    ignore: Iterable[str],
    rounding: Iterable[str],
    added: Mapping[str, Any] | None = None,
    others: Iterable[str] = (),
    data_changes: Iterable[str] = (),
) -> Guarantee:
    """Judge what continuing the run with fingerprint ``then`` as ``now`` promises.

    Args:
        then: a stored fingerprint, as of ``Fingerprint.as_dict``.
        ignore: config keys (with all below them; ``*`` matches) that cannot change a weight.
        rounding: config keys that change rounding or dropout masks, not samples, noise or times.
        added: config keys that older versions lacked, with the value that means what those did.
        others: further differences that refuse, a line each.
        data_changes: what differs in the data, where more than the digest is known.
    """
    then = {"config": {}, "data": "nothing", "stack": {}, "files": {}} | dict(then)
    changed = config_changes(then, now, ignore=ignore, added=added)
    refusals = [*others, *(line for k, line in changed.items() if not matches(k, rounding))]
    if then["data"] != now.data:
        told = "; ".join(data_changes) or f"digest {then['data'][:12]} -> {now.data[:12]}"
        refusals.append(f"{DATA_CHANGED}: {told}")
    if odd := _differing(then.get("code", now.code), now.code):
        more = f", and {len(odd) - MAX_NAMES} more" if len(odd) > MAX_NAMES else ""
        refusals.append(
            f"the code changed, {len(odd)} of {len(then['code'].keys() | now.code.keys())} "
            f"modules: "
            f"{', '.join(odd[:MAX_NAMES])}{more}"
        )
    if refusals:
        return Guarantee("refused", refusals)
    reasons = [line for k, line in changed.items() if matches(k, rounding)]
    reasons += [
        f"{k}: {then['stack'].get(k, 'nothing')} -> {now.stack.get(k, 'nothing')}"
        for k in _differing(then["stack"], now.stack)
    ]
    if "code" not in then:
        reasons.append(
            "an older version of this project wrote the checkpoint, and its code cannot be compared"
        )
    if now.config.get("trainer.deterministic") is not True:
        reasons.append("trainer.deterministic is off")
    return Guarantee("same samples", reasons) if reasons else Guarantee("bitwise")


def config_changes(
    then: Mapping[str, Any],
    now: Fingerprint,
    *,
    ignore: Iterable[str],
    added: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """Describe each key that differs, in order; arguments as of ``compare``.

    A key that names a file counts by the file's content, never by its path.
    """
    old, files = dict(added or {}) | then.get("config", {}), then.get("files", {})
    told = {}
    for k in sorted(old.keys() | now.config.keys()):
        if matches(k, ignore) or (k not in now.config and k in (added or {})):
            continue
        if k in files and k in now.files:
            if files[k] != now.files[k]:
                told[k] = f"{k}: the content of {_show(now.config, k)} changed"
        elif old.get(k, ...) != now.config.get(k, ...):  # null is not nothing
            told[k] = f"{k}: {_show(old, k)} -> {_show(now.config, k)}"
    return told


def describe_stack() -> dict[str, str]:
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


def file_hashes(
    config: Mapping[str, Any], *, leave_out: Iterable[str] = (), written: Iterable[Path] = ()
) -> dict[str, str]:
    """Hash each file, or all files of each folder, that a text value of the flat ``config`` names.

    Args:
        config: flattened.
        leave_out: keys (with all below them) whose files are not read.
        written: folders in which training writes; what is in them is a result.
    """
    found = {
        k: Path(v).expanduser().absolute()
        for k, v in config.items()
        if isinstance(v, str) and _may_be_path(v)
    }
    own = [folder.absolute() for folder in written]
    read = {
        k: p
        for k, p in found.items()
        if not matches(k, leave_out) and not any(p.is_relative_to(o) for o in own)
    }
    return {k: digest for k, path in read.items() if (digest := content_hash(path))}


def _may_be_path(text: str) -> bool:
    return bool(text) and "\0" not in text and len(text) < 4096


def content_hash(path: Path) -> str | None:
    """Hash a file, or the files of a folder with their names; None where there is neither."""
    try:
        if path.is_file():
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.is_file())
            return hashlib.sha256(
                "".join(f"{f.relative_to(path)} {content_hash(f)}\n" for f in inside).encode()
            ).hexdigest()
    except OSError:  # a name too long for a file, or nothing that may be read
        pass
    return None


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


def matches(key: str, patterns: Iterable[str]) -> bool:
    """Whether one of ``patterns`` is ``key`` or above it."""
    return any(fnmatch.fnmatchcase(key, p) or fnmatch.fnmatchcase(key, p + ".*") for p in patterns)


def _differing(a: Mapping[str, str], b: Mapping[str, str]) -> list[str]:
    return sorted(k for k in a.keys() | b.keys() if a.get(k) != b.get(k))


def _show(config: Mapping[str, Any], key: str) -> str:
    return repr(config[key]) if key in config else "nothing"
