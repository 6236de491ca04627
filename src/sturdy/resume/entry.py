"""Where a run is entered: ``ckpt_path`` -> the step to continue from, what that promises, or a refusal.

auto    the newest verified checkpoint of the same trajectory; fresh if there is none
last    the newest verified checkpoint, changed config or not
best    the checkpoint with the best score
PATH    that one
null    fresh, and only into a directory without checkpoints
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sturdy.files import atomic_write
from sturdy.resume.fingerprint import Fingerprint, Guarantee, compare
from sturdy.resume.store import MANIFEST, STATE, Corrupt, Store, load_state, read_manifest

ENTERED = ".entered"  # in the run's directory
MOST_REASONS = 20  # that a refusal shows


class Refused(Exception):
    """The run is not started, nothing was touched; the message says why and what to do."""


@dataclass(frozen=True)
class Entry:
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


def find_entry(store: Store, ckpt_path: str | None, scores: Mapping[int, float], mode: str) -> Entry | None:
    """Resolve ``ckpt_path`` to a verified checkpoint; None starts afresh.

    Args:
        scores: the monitored metric by step, for ``best``; ``mode`` is ``min`` or ``max``.

    Raises:
        Refused: if what was asked for is not there, or would overwrite a run.
        NothingVerifies: if the run has checkpoints and none is whole.
    """
    match ckpt_path:
        case None:
            if steps := store.steps():
                raise Refused(
                    f"ckpt_path=null starts afresh, but {store.directory} has checkpoints up to step {steps[-1]}. "
                    f"Continue with ckpt_path=auto, or give the new run a name of its own (name=...)"
                )
            return None
        case "auto" | "last":
            if manifest := store.last():
                step = manifest["step"]
                return Entry(store.state(step), step, manifest, on_purpose=ckpt_path == "last")
            if ckpt_path == "last":
                raise Refused(
                    f"ckpt_path=last, but {store.directory} has no checkpoint. Check name=... and paths.runs=..., "
                    f"or start afresh with ckpt_path=auto"
                )
            return None
        case "best":
            return _best(store, scores, mode)
        case _:
            return _at(Path(str(ckpt_path)))


def judge(entry: Entry, now: Fingerprint, **how: Any) -> Guarantee:
    """Judge what entering at ``entry`` promises; ``how`` is as of ``fingerprint.compare``.

    Raises:
        Refused: with the difference, if the trajectory changed and the entry was not named on purpose.
    """
    if "fingerprint" in entry.manifest:
        guarantee = compare(entry.manifest["fingerprint"], now, **how)
    else:
        guarantee = Guarantee("refused", [f"{entry.state} has no manifest with a fingerprint: its origin is unknown"])
    if guarantee.level == "refused" and not entry.on_purpose:
        lines = "\n".join(f"    {reason}" for reason in guarantee.reasons[:MOST_REASONS])
        more = f"\n    ... and {len(guarantee.reasons) - MOST_REASONS} more" * (len(guarantee.reasons) > MOST_REASONS)
        raise Refused(
            f"this is not the run that {entry.state.parent} belongs to; what changed:\n{lines}{more}\n"
            f"Undo the change, or continue on purpose with ckpt_path=last, or start another run with name=..."
        )
    return guarantee


def _best(store: Store, scores: Mapping[int, float], mode: str) -> Entry:
    sign = 1 if mode == "min" else -1
    scored = [step for step in store.steps() if math.isfinite(scores.get(step, math.nan))]
    for step in sorted(scored, key=lambda s: sign * scores[s]):
        try:
            return Entry(store.state(step), step, store.verify(step), on_purpose=True)
        except Corrupt:
            continue  # the next best; `last` quarantines what is broken
    raise Refused(
        f"ckpt_path=best, but no checkpoint in {store.directory} has a score yet. "
        f"Use ckpt_path=last, or train until the first validation"
    )


def _at(path: Path) -> Entry:
    state = path / STATE if path.is_dir() else path
    if not state.is_file():
        raise Refused(
            f"ckpt_path={path} is not there. It may be auto, last, best, null, a checkpoint's directory "
            f"(step-00000500) or its {STATE}"
        )
    if not (state.parent / MANIFEST).exists():
        return Entry(state, _step_of(state), {}, on_purpose=True)
    try:
        manifest = read_manifest(state.parent)
        if state.name not in manifest["files"]:
            raise Corrupt(f"{state.name} is not in its {MANIFEST}")
    except Corrupt as reason:
        raise Refused(f"ckpt_path={path} does not verify: {reason}. Choose another checkpoint") from None
    return Entry(state, manifest["step"], manifest, on_purpose=True)


def _step_of(state: Path) -> int:
    try:
        return int(load_state(state)["global_step"])
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise Refused(f"ckpt_path={state} cannot be loaded: {error!s}. Choose another checkpoint") from None


@dataclass(frozen=True)
class Entered:
    """Where the newest start entered a run: by which word, at which step of which file.

    It is kept in the run's directory, so that ``ckpt_path=PATH`` or ``best`` in a command that is repeated (by a queue,
    a supervisor, a person) is entered once, and what was trained from there is continued.

    Attributes:
        ckpt_path: as the user gave it; a path is absolute.
        step: of the entry, 0 for a fresh start.
        sha256: of its ``state.ckpt``; None where there is none, or it has no manifest.
    """

    ckpt_path: str | None
    step: int = 0
    sha256: str | None = None

    @classmethod
    def of(cls, ckpt_path: str | None, entry: Entry | None) -> "Entered":
        """Describe entering at ``entry`` by the word ``ckpt_path``."""
        files = entry.manifest.get("files", {}) if entry else {}
        return cls(absolute(ckpt_path), entry.step if entry else 0, files.get(STATE, {}).get("sha256"))

    @classmethod
    def read(cls, run: Path) -> "Entered | None":
        """Read what the newest start left in directory ``run``; None where it left nothing that can be read."""
        try:
            return cls(**json.loads((run / ENTERED).read_bytes()))
        except (OSError, ValueError, TypeError):
            return None

    def write(self, run: Path) -> None:
        """Keep it in directory ``run``, whole or not at all."""
        with atomic_write(run / ENTERED) as file:
            file.write(json.dumps(asdict(self)).encode())


def once(ckpt_path: str | None, run: Path, store: Store, *, restart: bool) -> str | None:
    """Turn the word of a command that is repeated into the one to resolve: an entry by PATH or ``best`` happens once.

    Args:
        run: the run's directory; ``store`` has its checkpoints.
        restart: whether no person made this start, so that ``null`` is no wish to start afresh again.
    """
    before = Entered.read(run)
    if ckpt_path in ("auto", "last") or before is None or before.ckpt_path != absolute(ckpt_path):
        return ckpt_path
    if max(store.steps(), default=-1) < before.step:
        return ckpt_path  # it was killed before anything of its own was there to continue
    if ckpt_path is None:
        return "auto" if restart else None
    there = Path(ckpt_path).expanduser()
    manifest = (there if there.is_dir() else there.parent) / MANIFEST
    if ckpt_path != "best" and before.sha256 and manifest.is_file() and before.sha256 not in manifest.read_text():
        return ckpt_path  # another checkpoint lies there now
    return "last"


def absolute(ckpt_path: str | None) -> str | None:
    """The word, or the absolute path that it is."""
    if ckpt_path in (None, "auto", "last", "best"):
        return ckpt_path
    return str(Path(str(ckpt_path)).expanduser().absolute())
