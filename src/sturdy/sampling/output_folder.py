"""A folder for the files of one command, which no other command overwrites.

``how.json`` in the folder says what its files were made by.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import chain, count
from pathlib import Path
from typing import Any

from exact_resume.files import atomic_write
from exact_resume.fingerprint import flatten
from sturdy.sampling.loaded_run import LoadedRun
from sturdy.training.fingerprint import sampling_code

PROVENANCE = "how.json"
SHOWN_CHANGES = 5  # in an error message


def provenance(run: LoadedRun, sampler: Mapping[str, Any]) -> dict[str, Any]:
    """Return what all images from a checkpoint depend on, as primitives: the checkpoint and code.

    Args:
        run: the run and its checkpoint.
        sampler: the config of the sampler.
    """
    state = run.point.state
    if run.point.manifest:
        sha256 = run.point.manifest["files"][state.name]["sha256"]
    else:
        with state.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    code = repr(sampling_code(run.config, sampler))
    return {
        "checkpoint": {"step": run.point.step, "sha256": sha256},
        "device": run.device.partition(":")[0],
        "code": hashlib.sha256(code.encode()).hexdigest()[:16],
    }


def claim_folder(
    key: str, given: object, default: Path, how: Mapping[str, Any], patterns: Sequence[str]
) -> Path:
    """Find or make the folder for the files that a command makes.

    The same command gets the same folder again. Another command gets another one: if none is
    ``given``, the first of ``default``, ``default-2``, ... that is free or its own.

    Args:
        key: the option that gives a folder, for the messages.
        given: the folder that the user gave; None for ``default``.
        default: the folder otherwise.
        how: primitives that files of the same name depend on.
        patterns: of the files that the command writes. A folder with such files and without
            ``how.json`` is not free.

    Raises:
        ValueError: naming the key, if the folder cannot be written in, or belongs to another
            command.
    """
    numbered = (default.with_name(f"{default.name}-{i}") for i in count(2))
    folders: Iterable[Path] = chain([default], numbered) if given is None else [Path(str(given))]
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            other = _claim(folder, how, patterns)
            if not os.access(folder, os.W_OK):
                raise PermissionError(0, "Permission denied")
        except OSError as error:
            raise ValueError(
                f"{key}={folder} cannot be written in: {error.strerror}. Give another folder"
            ) from None
        if other is None:
            return folder
    raise ValueError(
        f"{key}={given} holds what another command made ({other}): give another folder, or delete "
        f"it"
    )


def _claim(folder: Path, how: Mapping[str, Any], patterns: Sequence[str]) -> str | None:
    """Write ``how.json`` if the folder is free; return why it belongs to another command, or None.

    Of two commands that come at the same time the first one gets the folder.
    """
    path = folder / PROVENANCE
    if not path.exists():
        if any(any(folder.glob(pattern)) for pattern in patterns):
            return f"there is no {PROVENANCE} beside it"
        with (
            suppress(FileExistsError),
            atomic_write(path, durable=False, unique=True, overwrite=False) as file,
        ):
            file.write(f"{json.dumps(how, indent=1)}\n".encode())
    try:
        then = flatten(json.loads(path.read_text()))
    except ValueError:
        return f"its {PROVENANCE} cannot be read"
    now = flatten(json.loads(json.dumps(how)))
    changes = [
        f"{key}: {then.get(key, 'nothing')} -> {now.get(key, 'nothing')}"
        for key in {**then, **now}
        if then.get(key, ...) != now.get(key, ...)
    ]
    return ", ".join(changes[:SHOWN_CHANGES]) or None
