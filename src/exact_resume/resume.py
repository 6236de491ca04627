"""Where a run is entered: ``ckpt_path`` -> the step to continue from, what that promises, or a
refusal.

auto    the newest verified checkpoint of the same trajectory; fresh if there is none
last    the newest verified checkpoint, changed config or not
best    the checkpoint with the best score
STEP    that of a step of the run: 500 or step-00000500
PATH    that one
null    fresh, and only into a directory without checkpoints

``resolve_checkpoint`` is for the run that holds the lock. ``read_resume_point`` is for all others:
    it changes nothing.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from exact_resume.checkpoint.store import (
    MANIFEST,
    STATE,
    CorruptCheckpointError,
    Store,
    load_state,
    read_checkpoint,
    step_dirname,
    verify_checkpoint,
)
from exact_resume.files import atomic_write
from exact_resume.fingerprint import DATA_CHANGED, Fingerprint, Guarantee, compare
from exact_resume.scores import scores_of

LAST_START = ".entered"  # in the run's directory
MAX_REASONS = 20  # that a refusal shows


class ResumeRefusedError(Exception):
    """The run is not started, nothing was touched; the message says why and what to do."""


@dataclass(frozen=True)
class ResumePoint:
    """A verified checkpoint to enter the run at.

    Attributes:
        state: its ``state.ckpt``.
        step: optimizer steps done.
        manifest: what was recorded with it; empty for a foreign file without one.
        on_purpose: the user named it, so a changed trajectory is reported and not refused.
    """

    state: Path
    step: int
    manifest: Mapping[str, Any]
    on_purpose: bool


def resolve_checkpoint(
    store: Store, ckpt_path: str | None, scores: Mapping[int, float], mode: str
) -> ResumePoint | None:
    """Resolve ``ckpt_path`` to a verified checkpoint; None starts afresh.

    Args:
        scores: the monitored metric by step, for ``best``; ``mode`` is ``min`` or ``max``.

    Raises:
        ResumeRefusedError: if what was asked for is not there, or would overwrite a run.
        NoValidCheckpointError: if the run has checkpoints and none is whole.
    """
    match ckpt_path:
        case None:
            if steps := store.steps():
                raise ResumeRefusedError(
                    f"ckpt_path=null starts afresh, but {store.directory} has checkpoints up to "
                    f"step {steps[-1]}. "
                    f"Continue with ckpt_path=auto, or give the new run a name of its own "
                    f"(name=...)"
                )
            return None
        case "auto" | "last":
            if manifest := store.last(quarantine=True):
                step = manifest["step"]
                return ResumePoint(
                    store.state(step), step, manifest, on_purpose=ckpt_path == "last"
                )
            if ckpt_path == "last":
                raise ResumeRefusedError(
                    f"{_nothing(store, 'last')}. Check name=... and paths.runs=..., or start "
                    f"afresh with ckpt_path=auto"
                )
            return None
        case "best":
            return _best(store, scores, mode)
        case _:
            state = _named(store, str(ckpt_path), "auto, last, best, null")
            return _entry(state, _vouched(state, ckpt_path))


def read_resume_point(run: Path, ckpt_path: str | int | None) -> tuple[ResumePoint, dict[str, Any]]:
    """Read a checkpoint of the run in the directory ``run``, from bytes that were verified; nothing
    is changed.

    Args:
        ckpt_path: ``last`` (or ``auto``), ``best``, a step or a path. Of the first two, a
            checkpoint that does not verify is passed over with a line, and one that a live run
            deletes meanwhile without.

    Returns:
        the entry and what its ``state.ckpt`` holds.

    Raises:
        ResumeRefusedError: if there is no such checkpoint, or it does not verify, with those there
            are.
        NoValidCheckpointError: if the run has checkpoints and none is whole.
        CheckpointLoadError: if it holds more than tensors and primitives.
        OSError: if it cannot be read for a reason that says nothing about the checkpoint.
    """
    store = Store(run / "checkpoints")
    if ckpt_path in ("last", "auto", "best"):
        found = store.first_valid(
            lambda: _ranked(run, store) if ckpt_path == "best" else store.steps()[::-1],
            read_checkpoint,
        )
        if found is None:
            raise ResumeRefusedError(_nothing(store, str(ckpt_path)))
        manifest, content = found
        return ResumePoint(
            store.state(manifest["step"]), manifest["step"], manifest, on_purpose=True
        ), content
    if ckpt_path is None:
        raise ResumeRefusedError(
            f"ckpt_path=null names no checkpoint; use last, best, a step or a path. {_there(store)}"
        )
    state = _named(store, str(ckpt_path), "last, best")
    if not (state.parent / MANIFEST).exists():
        content = _lone(state)
        return _entry(state, {}, content), content
    try:
        manifest, content = read_checkpoint(state.parent, state.name)
    except CorruptCheckpointError as reason:
        raise ResumeRefusedError(
            f"ckpt_path={ckpt_path} does not verify: {reason}. Choose another checkpoint"
        ) from None
    return ResumePoint(state, manifest["step"], manifest, on_purpose=True), content


def check_compatibility(entry: ResumePoint, now: Fingerprint, **how: Any) -> Guarantee:
    """Judge what entering at ``entry`` promises; ``how`` is as of ``fingerprint.compare``.

    Raises:
        ResumeRefusedError: with the difference, if the trajectory changed and the entry was not
            named on purpose.
    """
    if "fingerprint" in entry.manifest:
        guarantee = compare(entry.manifest["fingerprint"], now, **how)
    else:
        guarantee = Guarantee(
            "refused", [f"{entry.state} has no manifest with a fingerprint: its origin is unknown"]
        )
    if guarantee.level == "refused" and not entry.on_purpose:
        lines = "\n".join(f"    {reason}" for reason in guarantee.reasons[:MAX_REASONS])
        more = f"\n    ... and {len(guarantee.reasons) - MAX_REASONS} more" * (
            len(guarantee.reasons) > MAX_REASONS
        )
        ways = [
            "Undo the change",
            "continue on purpose with ckpt_path=last",
            "start another run with name=...",
        ]
        if any(reason.startswith(DATA_CHANGED) for reason in guarantee.reasons):
            ways.insert(1, "keep the images that it began with by as_begun=true")
        raise ResumeRefusedError(
            f"this is not the run that {entry.state.parent} belongs to; what "
            f"changed:\n{lines}{more}\n"
            f"{', or '.join(ways)}"
        )
    return guarantee


def _best(store: Store, scores: Mapping[int, float], mode: str) -> ResumePoint:
    for step in _by_score(store, scores, mode):
        try:
            return ResumePoint(store.state(step), step, store.verify(step), on_purpose=True)
        except CorruptCheckpointError:
            continue  # the next best; `last` quarantines what is broken
    raise ResumeRefusedError(_nothing(store, "best"))


def _ranked(run: Path, store: Store) -> list[int]:
    """The steps of the run that have a score, the best one first."""
    _, mode, scores = scores_of(run, store)
    return _by_score(store, scores, mode)


def _by_score(store: Store, scores: Mapping[int, float], mode: str) -> list[int]:
    sign = 1 if mode == "min" else -1
    scored = [step for step in store.steps() if math.isfinite(scores.get(step, math.nan))]
    return sorted(scored, key=lambda s: sign * scores[s])


def _nothing(store: Store, word: str) -> str:
    if not store.steps():
        return f"ckpt_path={word}, but {store.directory} has no checkpoint"
    return (
        f"ckpt_path={word}, but no checkpoint in {store.directory} has a score yet. "
        f"Use ckpt_path=last, or train until the first validation"
    )


def _named(store: Store, word: str, others: str) -> Path:
    """The ``state.ckpt`` that ``word`` names: a step of the run, by number or by its directory's
    name, or a path.

    ``others`` are the words that mean something else, for the message.
    """
    if (step := re.fullmatch(r"(?:step-)?(\d+)", word)) and int(step[1]) in store.steps():
        return store.state(int(step[1]))
    path = Path(word)
    state = path / STATE if path.is_dir() else path
    if word and state.is_file():
        return state
    raise ResumeRefusedError(
        f"ckpt_path={word} is not there. It may be {others}, a checkpoint's directory "
        f"({step_dirname(500)}), "
        f"its {STATE} or a step of the run. {_there(store)}"
    )


def _there(store: Store) -> str:
    steps = store.steps()
    few = ", ".join([*(["..."] if len(steps) > 10 else []), *map(str, steps[-10:])])
    return (
        f"{store.directory} has the steps {few}"
        if steps
        else f"{store.directory} has no checkpoint"
    )


def _vouched(state: Path, ckpt_path: object) -> dict[str, Any]:
    """The manifest beside ``state``, verified; empty where there is none."""
    if not (state.parent / MANIFEST).exists():
        return {}
    try:
        manifest = verify_checkpoint(state.parent)
        if state.name not in manifest["files"]:
            raise CorruptCheckpointError(f"{state.name} is not in its {MANIFEST}")
    except CorruptCheckpointError as reason:
        raise ResumeRefusedError(
            f"ckpt_path={ckpt_path} does not verify: {reason}. Choose another checkpoint"
        ) from None
    return manifest


def _entry(
    state: Path, manifest: Mapping[str, Any], content: Mapping[str, Any] | None = None
) -> ResumePoint:
    """The entry at ``state``; without a manifest its content says of which step it is."""
    step = manifest["step"] if manifest else _step_of(state, content or _lone(state))
    return ResumePoint(state, step, manifest, on_purpose=True)


def _lone(state: Path) -> dict[str, Any]:
    try:
        return load_state(state)
    except (ValueError, OSError) as error:
        raise ResumeRefusedError(
            f"ckpt_path={state} cannot be loaded: {error!s}. Choose another checkpoint"
        ) from None


def _step_of(state: Path, content: Mapping[str, Any]) -> int:
    try:
        return int(content["global_step"])
    except (ValueError, KeyError, TypeError) as error:
        raise ResumeRefusedError(
            f"ckpt_path={state} cannot be loaded: {error!s}. Choose another checkpoint"
        ) from None


@dataclass(frozen=True)
class LastStart:
    """Where the newest start entered a run: by which word, at which step of which file.

    It is kept in the run's directory, so that ``ckpt_path=PATH`` or ``best`` in a command that is
    repeated (by a queue, a supervisor, a person) is entered once, and what was trained from there
    is continued.

    Attributes:
        ckpt_path: as the user gave it; a path is absolute.
        step: of the entry, 0 for a fresh start.
        sha256: of its ``state.ckpt``; None where there is none, or it has no manifest.
    """

    ckpt_path: str | None
    step: int = 0
    sha256: str | None = None

    @classmethod
    def of(cls, ckpt_path: str | None, entry: ResumePoint | None) -> "LastStart":
        """Describe entering at ``entry`` by the word ``ckpt_path``."""
        files = entry.manifest.get("files", {}) if entry else {}
        return cls(
            normalize_ckpt_path(ckpt_path),
            entry.step if entry else 0,
            files.get(STATE, {}).get("sha256"),
        )

    @classmethod
    def read(cls, run: Path) -> "LastStart | None":
        """Read what the newest start left in directory ``run``; None where it left nothing that can
        be read.
        """
        try:
            return cls(**json.loads((run / LAST_START).read_bytes()))
        except (OSError, ValueError, TypeError):
            return None

    def write(self, run: Path) -> None:
        """Keep it in directory ``run``, whole or not at all."""
        with atomic_write(run / LAST_START) as file:
            file.write(json.dumps(asdict(self)).encode())


def resolve_repeated(
    ckpt_path: str | None, run: Path, store: Store, *, restart: bool
) -> str | None:
    """Turn the word of a command that is repeated into the one to resolve: an entry by PATH or
    ``best`` happens once.

    Args:
        run: the run's directory; ``store`` has its checkpoints.
        restart: whether no person made this start, so that ``null`` is no wish to start afresh
            again.
    """
    before = LastStart.read(run)
    if (
        ckpt_path in ("auto", "last")
        or before is None
        or before.ckpt_path != normalize_ckpt_path(ckpt_path)
    ):
        return ckpt_path
    if max(store.steps(), default=-1) < before.step:
        return ckpt_path  # it was killed before anything of its own was there to continue
    if ckpt_path is None:
        return "auto" if restart else None
    there = Path(str(ckpt_path)).expanduser()
    manifest = (there if there.is_dir() else there.parent) / MANIFEST
    if (
        ckpt_path != "best"
        and before.sha256
        and manifest.is_file()
        and before.sha256 not in manifest.read_text()
    ):
        return ckpt_path  # another checkpoint lies there now
    return "last"


def normalize_ckpt_path(ckpt_path: str | int | None) -> str | None:
    """Return the word or the step, or the absolute path that it is."""
    if ckpt_path is None or re.fullmatch(r"auto|last|best|(step-)?\d+", str(ckpt_path)):
        return None if ckpt_path is None else str(ckpt_path)
    return str(Path(str(ckpt_path)).expanduser().absolute())
