"""Begin a run from the weights that one has: find them, see what fits, and say so.

What was taken counts by its content, and not by its path: its SHA-256 goes into every checkpoint of
    the run.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exact_resume.checkpoint.store import (
    MANIFEST,
    STATE,
    CorruptCheckpointError,
    Store,
    load_state,
    verify_checkpoint,
)
from exact_resume.fingerprint import flatten
from sturdy.training.match_weights import Config, backbone_changes, class_change, match, shorten
from sturdy.training.module import DiffusionModule

AVERAGE = "ema.model."  # the average that validates and draws, whichever kind of EMA it is
MEANING = {
    "target": "the output layer must be learned anew",
    "schedule": "the same time is another level of noise",
    "data.image_size": "the same shape has another size in pixels",
}


@dataclass(frozen=True)
class Source:
    """A verified checkpoint that another run begins from.

    Attributes:
        word: what the user called it.
        state: its ``state.ckpt``.
        sha256: of that file.
    """

    word: str
    state: Path
    sha256: str | None


def find_source(word: str, runs: Path) -> Source:
    """Find the checkpoint that ``init_from=word`` means, and verify it; nothing is changed.

    Args:
        word: a ``state.ckpt``, a checkpoint's directory, a run's directory or the name of a run in
            ``runs``. Of a run it is the newest checkpoint that verifies.

    Raises:
        ValueError: if there is none, with what there is, or if it does not verify.
    """
    place = _place(word, runs)
    if isinstance(place, Path):
        return Source(word, place, _verified(place, word))
    if place is None:
        there = sorted(
            path.parent.name for path in runs.glob("*/checkpoints") if Store(path).steps()
        )
        raise ValueError(
            f"init_from={word} is not there. Give a run, its directory, a checkpoint's directory "
            f"or its {STATE}; "
            f"runs in {runs}: {shorten(there, 20) or 'none'}"
        )
    for step in reversed(place.steps()):
        try:
            return Source(word, place.state(step), place.verify(step)["files"][STATE]["sha256"])
        except CorruptCheckpointError:
            continue  # the next older one; who only reads leaves the broken one where it is
    raise ValueError(
        f"init_from={word}: no checkpoint in {place.directory} verifies; choose another"
    )


def init_from(module: DiffusionModule, source: Source) -> str:
    """Start ``module`` and its averages from the averaged weights in ``source``; return what was
    taken, for people.

    Raises:
        ValueError: if they are of another network, naming the config keys that differ.
        CheckpointLoadError: if the file holds more than tensors and primitives.
    """
    state = load_state(source.state)
    given = {
        k.removeprefix(AVERAGE): v
        for k, v in state.get("state_dict", {}).items()
        if k.startswith(AVERAGE)
    }
    if not given:
        raise ValueError(
            f"init_from={source.word}: {source.state} holds no averaged weights ({AVERAGE}*)"
        )
    then, now = state.get("config") or {}, module.config or {}
    if (theirs := _class(then)) and (ours := _class(now)) and theirs != ours:
        raise ValueError(
            f"init_from={source.word} is of another backbone, {theirs}; this run's is {ours}"
        )
    found = match(module.denoiser, given, then, now)
    if found.odd:
        keys = backbone_changes(then, now)
        why = shorten(keys) if keys else f"its code builds other weights: {shorten(found.odd)}"
        raise ValueError(f"init_from={source.word} holds another network: {why}")
    for network in (module.denoiser, *module.ema.networks()):
        network.load_state_dict(found.weights)
    module.initial = {"path": str(source.state), "sha256": source.sha256}
    taken, total = len(found.weights) - len(found.new), len(found.weights)
    return "\n    ".join(
        [
            f"init_from={source.word} (step {state.get('global_step', '?')}, EMA weights): "
            f"{'all' if taken == total else f'{taken} of'} {total} tensors taken",
            *([change] if (change := class_change(then, now)) else []),
            *([f"new here: {shorten(found.new)}"] if found.new else []),
            *(
                [f"not taken: {shorten(left)}"]
                if (left := [k for k in found.left if k not in found.new])
                else []
            ),
            *_differences(then, now),
        ]
    )


def other_weights(
    began: Mapping[str, Any] | None, word: str | None, before: str | None, runs: Path
) -> str | None:
    """Return why a run that began from ``began`` is not one with ``init_from=word``; None if it is.

    That file may have been moved, and it may be gone or no longer asked for. A run that is asked
    for by its name may have gone on since.

    Args:
        began: ``init_from`` of the checkpoint that is continued; None if it has none.
        before: the config's ``init_from`` when that checkpoint was written.
    """
    if word is None or (
        began is None and word == before
    ):  # older versions did not write down what they took
        return None
    if began is None:
        return f"init_from={word}, but this run did not begin from it: give the new run a name of its own (name=...)"
    place = _place(word, runs)
    run = isinstance(place, Store)
    states = (
        [place.state(step) for step in place.steps()]
        if isinstance(place, Store)
        else [place]
        if place
        else []
    )
    if not states or began["sha256"] in map(_recorded, states) or (run and word == before):
        return None
    return (
        f"init_from={word} holds other weights than this run began from, which were those of "
        f"{began['path']} "
        f"(SHA-256 {began['sha256'][:12]})"
    )


def _place(word: str, runs: Path) -> Path | Store | None:
    """Return the ``state.ckpt`` or the store of the run that ``word`` names; None if there is
    neither.
    """
    for path in (Path(word).expanduser(), runs / word):
        if path.is_file():
            return path
        if (path / STATE).is_file():
            return path / STATE
        if (store := Store(path / "checkpoints")).steps():
            return store
    return None


def _verified(state: Path, word: str) -> str | None:
    """Return the SHA-256 of ``state`` after it was checked against the manifest beside it, if there
    is one.
    """
    if not (state.parent / MANIFEST).exists():
        return _recorded(state)
    try:
        return verify_checkpoint(state.parent)["files"][state.name]["sha256"]
    except CorruptCheckpointError as reason:
        raise ValueError(
            f"init_from={word} does not verify: {reason}. Choose another checkpoint"
        ) from None
    except KeyError:
        raise ValueError(f"init_from={word}: {state.name} is not in its {MANIFEST}") from None


def _recorded(state: Path) -> str | None:
    """Return the SHA-256 of ``state`` as its manifest has it, or else computed; None if it cannot
    be read.
    """
    try:
        return json.loads((state.parent / MANIFEST).read_bytes())["files"][state.name]["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    try:
        with state.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def _class(config: Config) -> str:
    return str(config.get("backbone", {}).get("_target_", "")).rpartition(".")[2]


def _differences(then: Config, now: Config) -> Iterator[str]:
    """Yield a line for each setting that gives the weights another meaning."""
    for key, meaning in MEANING.items():
        theirs, ours = (_select(config, key) for config in (then, now))
        if theirs is not None and ours is not None and theirs != ours:
            yield f"its {key} is {_words(theirs)}, here {_words(ours)}: {meaning}"


def _select(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = config.get(part) if isinstance(config, Mapping) else None
    return config


def _words(value: Any) -> str:
    """Return a config node as ``shifted(shift=3.0)``: its class in the words of the config groups,
    and its options.
    """
    if not isinstance(value, Mapping):
        return str(value)
    name = re.sub(
        r"(?<=[a-z])(?=[A-Z])", "_", str(value.get("_target_", "")).rpartition(".")[2]
    ).lower()
    options = ", ".join(f"{k}={v}" for k, v in flatten(value).items() if k != "_target_")
    return f"{name}({options})" if options else name
