"""Where a resume is decided: ``ckpt_path`` -> a checkpoint to continue from, or a refusal.

    auto    the newest verified checkpoint of the same trajectory; a fresh start if there is none
    last    the newest verified checkpoint, even if the trajectory changed
    best    the checkpoint with the best score
    STEP    the checkpoint of that step: 500 or step-00000500
    PATH    the checkpoint at that path
    null    a fresh start, and only in a directory without checkpoints

Each resume gets one of three guarantees:

    bitwise        the same stack, the same shards, deterministic kernels: every bit is equal
    same samples   the same order, noise and times; rounding and dropout masks may differ
    refused        a part of the trajectory differs

The trajectory is the config without a short list of keys, the digest of the data, the content of
the files that the config names, and the code that runs (see ``fingerprint``).

``resolve_checkpoint`` is for the process that holds the run's lock. ``read_resume_point`` is for
all others: it changes nothing.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from exact_resume.checkpoint.retention import best_steps
from exact_resume.checkpoint.store import (
    MANIFEST,
    STATE,
    CorruptCheckpointError,
    NoValidCheckpointError,
    Store,
    load_state,
    read_checkpoint,
    step_dirname,
    verify_checkpoint,
)
from exact_resume.files import atomic_write
from exact_resume.fingerprint import MAX_NAMES, Fingerprint, matches
from exact_resume.metrics import read_column

LAST_START = ".entered"  # a file in the run's directory
MAX_REASONS = 20  # shown by a refusal
MAX_TRAJECTORIES = 50  # newest ones that a manifest keeps
DEFAULT_MONITOR = "val/loss"
DATA_CHANGED = "the data changed"
SEPARATOR = ";\n        "  # of the changes of the data
RESTART_COUNTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")


class ResumeRefusedError(Exception):
    """The run is not started and nothing was changed; the message says why and what to do."""


@dataclass(frozen=True)
class ResumePoint:
    """A verified checkpoint to continue from.

    Attributes:
        state: path of its ``state.ckpt``.
        step: number of optimizer steps done.
        manifest: its manifest; empty for a file from elsewhere without one.
        explicit: the user named it, so a changed trajectory is reported and not refused.
    """

    state: Path
    step: int
    manifest: Mapping[str, Any]
    explicit: bool


@dataclass(frozen=True)
class Guarantee:
    """What a resume promises.

    Attributes:
        level: ``bitwise``, ``same samples`` or ``refused``.
        reasons: why it is not ``bitwise``, one line each.
        afterwards: where a new trajectory begins, the level of its next resume if nothing changes.
    """

    level: str
    reasons: list[str] = field(default_factory=list)
    afterwards: str = ""


@dataclass(frozen=True)
class Rules:
    """Which changes of the config a resume accepts. A key stands for all keys below it.

    Attributes:
        ignore: keys that cannot change a weight; ``*`` matches any text.
        rounding: keys that change rounding or dropout masks, but no sample, noise or time.
        added: keys that older versions lacked, with the value that means what these did.
    """

    ignore: Iterable[str] = ()
    rounding: Iterable[str] = ()
    added: Mapping[str, Any] = field(default_factory=dict)


# --- From a word to a checkpoint


def resolve_checkpoint(
    store: Store, ckpt_path: str | None, scores: Mapping[int, float], mode: str
) -> ResumePoint | None:
    """Find the checkpoint that ``ckpt_path`` means, and verify it.

    Args:
        store: the checkpoints of the run; the caller holds the run's lock.
        ckpt_path: a word of the table above, a step or a path.
        scores: the monitored metric by step, for ``best``.
        mode: ``min`` or ``max``: whether small or large scores are good.

    Returns:
        The resume point, or None for a fresh start.

    Raises:
        ResumeRefusedError: there is no such checkpoint, or a fresh start would overwrite a run.
        NoValidCheckpointError: the run has checkpoints, and none of them verifies.
    """
    if ckpt_path is None:
        _refuse_fresh_start_over(store)
        return None
    if ckpt_path in ("auto", "last"):
        manifest = store.last(quarantine=True)
        if manifest is not None:
            step = manifest["step"]
            return ResumePoint(store.state(step), step, manifest, explicit=ckpt_path == "last")
        if ckpt_path == "last":
            raise ResumeRefusedError(
                f"{_describe_missing(store, 'last')}. Check the run's directory, "
                f"or start afresh with ckpt_path=auto"
            )
        return None
    if ckpt_path == "best":
        return _find_best(store, scores, mode)
    state = _find_named(store, str(ckpt_path), "auto, last, best, null")
    return _resume_point(state, _verified_manifest(state, ckpt_path))


def read_resume_point(run: Path, ckpt_path: str | int | None) -> tuple[ResumePoint, dict[str, Any]]:
    """Read a checkpoint of a run from bytes that were verified, and change nothing.

    Args:
        run: the run's directory.
        ckpt_path: ``last`` (or ``auto``), ``best``, a step or a path. With the first two, a
            checkpoint that does not verify is skipped with a warning, and one that a live run
            deletes meanwhile is skipped without.

    Returns:
        The resume point, and the content of its ``state.ckpt``.

    Raises:
        ResumeRefusedError: there is no such checkpoint, or it does not verify.
        NoValidCheckpointError: the run has checkpoints, and none of them verifies.
        CheckpointLoadError: it holds more than tensors and primitives.
        OSError: it cannot be read, for a reason that says nothing about the checkpoint.
    """
    store = Store(run / "checkpoints")
    if ckpt_path is None:
        available = _describe_steps(store)
        raise ResumeRefusedError(
            f"ckpt_path=null names no checkpoint; use last, best, a step or a path. {available}"
        )
    if ckpt_path in ("auto", "last", "best"):
        return _read_first(run, store, str(ckpt_path))
    state = _find_named(store, str(ckpt_path), "last, best")
    if not (state.parent / MANIFEST).exists():
        content = _load_unverified(state)
        return _resume_point(state, {}, content), content
    try:
        manifest, content = read_checkpoint(state.parent, state.name)
    except CorruptCheckpointError as error:
        raise _does_not_verify(ckpt_path, error) from None
    return ResumePoint(state, manifest["step"], manifest, explicit=True), content


def monitored_scores(run: Path, store: Store) -> tuple[str, str, dict[int, float]]:
    """Return the monitored metric of a run, ``min`` or ``max``, and the scores by step.

    The newest manifest says which metric is monitored. The scores lie beside the checkpoints;
    those of older versions are in ``metrics.csv``. A score may be NaN.
    """
    config = _newest_config(store)
    monitor = config.get("callbacks.checkpoint.monitor", DEFAULT_MONITOR)
    mode = config.get("callbacks.checkpoint.mode", "min")
    scores = read_column(run / "metrics.csv", monitor) | store.scores(monitor)
    return monitor, mode, scores


# --- What a resume promises


def check_compatibility(
    point: ResumePoint,
    now: Fingerprint,
    rules: Rules,
    *,
    other_changes: Iterable[str] = (),
    data_changes: Iterable[str] = (),
) -> Guarantee:
    """Judge what continuing from ``point`` promises.

    Args:
        point: where the run is continued.
        now: the fingerprint of this start.
        rules: which changes of the config are accepted.
        other_changes: further differences that refuse, one line each.
        data_changes: how the data differ, where more than their digest is known.

    Raises:
        ResumeRefusedError: the trajectory changed, and the user did not name the checkpoint.
    """
    then = point.manifest.get("fingerprint")
    if then is None:
        reason = f"{point.state} has no manifest with a fingerprint: its origin is unknown"
        guarantee = Guarantee("refused", [reason])
    else:
        guarantee = compare_fingerprints(
            then, now, rules, other_changes=other_changes, data_changes=data_changes
        )
    if guarantee.level == "refused" and not point.explicit:
        raise ResumeRefusedError(_describe_refusal(point, guarantee.reasons))
    if guarantee.level == "refused":
        afterwards = compare_fingerprints(now.as_dict(), now, rules).level
        return replace(guarantee, afterwards=afterwards)
    return guarantee


def compare_fingerprints(
    then: Mapping[str, Any],
    now: Fingerprint,
    rules: Rules,
    *,
    other_changes: Iterable[str] = (),
    data_changes: Iterable[str] = (),
) -> Guarantee:
    """Judge what continuing the run with the stored fingerprint ``then`` as ``now`` promises.

    The other arguments are those of ``check_compatibility``.
    """
    then = {"config": {}, "data": "nothing", "stack": {}, "files": {}} | dict(then)
    changes = config_changes(then, now, rules)
    refusals = list(other_changes)
    rounding: list[str] = []
    for key, line in changes.items():
        (rounding if matches(key, rules.rounding) else refusals).append(line)
    if then["data"] != now.data:
        digests = f"digest {then['data'][:12]} -> {now.data[:12]}"
        refusals.append(f"{DATA_CHANGED}: {SEPARATOR.join(data_changes) or digests}")
    if "code" in then:
        refusals += _code_changes(then["code"], now.code)
    if refusals:
        return Guarantee("refused", refusals)
    reasons = rounding + _stack_changes(then["stack"], now.stack)
    if "code" not in then:
        reasons.append(
            "an older version of this project wrote the checkpoint, and its code cannot be compared"
        )
    if now.config.get("trainer.deterministic") is not True:
        reasons.append("trainer.deterministic is off")
    return Guarantee("same samples", reasons) if reasons else Guarantee("bitwise")


def config_changes(then: Mapping[str, Any], now: Fingerprint, rules: Rules) -> dict[str, str]:
    """Describe each config key that differs from the stored fingerprint ``then``, in order.

    A key that names a file counts by the file's content and not by its path.
    """
    old = dict(rules.added) | then.get("config", {})
    files = then.get("files", {})
    changes = {}
    for key in sorted(old.keys() | now.config.keys()):
        was_added_later = key in rules.added and key not in now.config
        if matches(key, rules.ignore) or was_added_later:
            continue
        if key in files and key in now.files:
            if files[key] != now.files[key]:
                changes[key] = f"{key}: the content of {_show(now.config, key)} changed"
        elif old.get(key, ...) != now.config.get(key, ...):  # null differs from a missing key
            changes[key] = f"{key}: {_show(old, key)} -> {_show(now.config, key)}"
    return changes


def describe_guarantee(guarantee: Guarantee) -> str:
    """Return the guarantee as a sentence for the banner."""
    sentences = {
        "bitwise": "bitwise: same stack, same shards, deterministic kernels",
        "same samples": "same samples: order, noise and times are the same; rounding may differ",
        "refused": (
            f"a new trajectory begins at this step, as you asked; the next resume of it is "
            f"{guarantee.afterwards} again"
        ),
    }
    return sentences[guarantee.level]


def trajectories(point: ResumePoint | None, guarantee: Guarantee | None) -> list[dict[str, Any]]:
    """Return where the trajectories of a run began after its first, oldest first.

    Each entry has the ``step``, the digest of the ``data`` until there, and the ``reasons``. It is
    for the manifest of each checkpoint that is written from now on.
    """
    if point is None:
        return []
    entries = list(point.manifest.get("trajectories", ()))
    if guarantee and guarantee.level == "refused":
        data = point.manifest.get("fingerprint", {}).get("data")
        reasons = [" ".join(reason.split()) for reason in guarantee.reasons[:MAX_REASONS]]
        entries.append({"step": point.step, "data": data, "reasons": reasons})
    return entries[-MAX_TRAJECTORIES:]


# --- A command that is repeated by a queue, a supervisor or a person


def is_restart(as_begun: bool | None = None) -> bool:
    """Return whether a launcher, and no person, made this start.

    Args:
        as_begun: the answer, where the user has given it.
    """
    if as_begun is not None:
        return as_begun
    return any(int(os.environ.get(name) or 0) > 0 for name in RESTART_COUNTS)


@dataclass(frozen=True)
class LastStart:
    """Where the newest start entered a run: kept in the run's directory.

    So a repeated command with ``ckpt_path=PATH`` or ``best`` enters there once, and then continues
    what was trained from there.

    Attributes:
        ckpt_path: as the user gave it; a path is absolute.
        step: of the resume point; 0 for a fresh start.
        sha256: of its ``state.ckpt``; None where there is none, or where it has no manifest.
    """

    ckpt_path: str | None
    step: int = 0
    sha256: str | None = None

    @classmethod
    def at(cls, ckpt_path: str | None, point: ResumePoint | None) -> "LastStart":
        """Describe a start at ``point`` by the word ``ckpt_path``."""
        word = normalize_ckpt_path(ckpt_path)
        if point is None:
            return cls(word)
        files = point.manifest.get("files", {})
        return cls(word, point.step, files.get(STATE, {}).get("sha256"))

    @classmethod
    def read(cls, run: Path) -> "LastStart | None":
        """Read it from the run's directory; return None if there is none that can be read."""
        try:
            return cls(**json.loads((run / LAST_START).read_bytes()))
        except (OSError, ValueError, TypeError):
            return None

    def write(self, run: Path) -> None:
        """Write it atomically into the run's directory."""
        with atomic_write(run / LAST_START) as file:
            file.write(json.dumps(asdict(self)).encode())


def resolve_repeated(
    ckpt_path: str | None, run: Path, store: Store, *, restart: bool
) -> str | None:
    """Return the word to resolve for a command that may be a repetition.

    Args:
        ckpt_path: as the user gave it.
        run: the run's directory.
        store: the run's checkpoints.
        restart: whether no person made this start; then ``null`` does not start afresh again.
    """
    before = LastStart.read(run)
    is_other_command = before is None or before.ckpt_path != normalize_ckpt_path(ckpt_path)
    if ckpt_path in ("auto", "last") or before is None or is_other_command:
        return ckpt_path
    if max(store.steps(), default=-1) < before.step:
        return ckpt_path  # killed before it had a checkpoint of its own to continue
    if ckpt_path is None:
        return "auto" if restart else None
    path = Path(str(ckpt_path)).expanduser()
    manifest = (path if path.is_dir() else path.parent) / MANIFEST
    if ckpt_path != "best" and before.sha256 and manifest.is_file():
        if before.sha256 not in manifest.read_text():
            return ckpt_path  # another checkpoint lies at this path now
    return "last"


def normalize_ckpt_path(ckpt_path: str | int | None) -> str | None:
    """Return a word or a step as text, and a path as an absolute one."""
    if ckpt_path is None:
        return None
    if re.fullmatch(r"auto|last|best|(step-)?\d+", str(ckpt_path)):
        return str(ckpt_path)
    return str(Path(str(ckpt_path)).expanduser().absolute())


# --- Helpers


def _refuse_fresh_start_over(store: Store) -> None:
    if steps := store.steps():
        raise ResumeRefusedError(
            f"ckpt_path=null starts afresh, but {store.directory} has checkpoints up to step "
            f"{steps[-1]}. Continue with ckpt_path=auto, or give the new run a directory of its own"
        )


def _find_best(store: Store, scores: Mapping[int, float], mode: str) -> ResumePoint:
    for step in _steps_by_score(store, scores, mode):
        try:
            return ResumePoint(store.state(step), step, store.verify(step), explicit=True)
        except CorruptCheckpointError:
            continue  # take the next best; ``last`` puts corrupt ones into quarantine
    raise ResumeRefusedError(_describe_missing(store, "best"))


def _read_first(run: Path, store: Store, word: str) -> tuple[ResumePoint, dict[str, Any]]:
    """Read the first checkpoint that verifies, in the order that ``word`` means."""

    def preferred_steps() -> list[int]:
        if word == "best":
            _, mode, scores = monitored_scores(run, store)
            return _steps_by_score(store, scores, mode)
        return store.steps()[::-1]

    found = store.first_valid(preferred_steps, read_checkpoint)
    if found is None:
        raise ResumeRefusedError(_describe_missing(store, word))
    manifest, content = found
    step = manifest["step"]
    return ResumePoint(store.state(step), step, manifest, explicit=True), content


def _steps_by_score(store: Store, scores: Mapping[int, float], mode: str) -> list[int]:
    steps = store.steps()
    return best_steps(steps, scores, mode=mode, n=len(steps))


def _newest_config(store: Store) -> Mapping[str, Any]:
    for step in reversed(store.steps()):
        try:
            manifest = store.manifest(step)
        except (CorruptCheckpointError, NoValidCheckpointError, OSError):
            continue
        config: Mapping[str, Any] = manifest.get("fingerprint", {}).get("config", {})
        return config
    return {}


def _find_named(store: Store, word: str, other_words: str) -> Path:
    """Return the ``state.ckpt`` that a step, a directory's name or a path names."""
    step = re.fullmatch(r"(?:step-)?(\d+)", word)
    if step and int(step[1]) in store.steps():
        return store.state(int(step[1]))
    path = Path(word)
    state = path / STATE if path.is_dir() else path
    if word and state.is_file():
        return state
    raise ResumeRefusedError(
        f"ckpt_path={word} is not there. It may be {other_words}, a checkpoint's directory "
        f"({step_dirname(500)}), its {STATE} or a step of the run. {_describe_steps(store)}"
    )


def _verified_manifest(state: Path, ckpt_path: object) -> dict[str, Any]:
    """Return the manifest beside ``state``, verified; empty where there is none."""
    if not (state.parent / MANIFEST).exists():
        return {}
    try:
        manifest = verify_checkpoint(state.parent)
        if state.name not in manifest["files"]:
            raise CorruptCheckpointError(f"{state.name} is not in its {MANIFEST}")
    except CorruptCheckpointError as error:
        raise _does_not_verify(ckpt_path, error) from None
    return manifest


def _does_not_verify(ckpt_path: object, error: Exception) -> ResumeRefusedError:
    return ResumeRefusedError(
        f"ckpt_path={ckpt_path} does not verify: {error}. Choose another checkpoint"
    )


def _resume_point(
    state: Path, manifest: Mapping[str, Any], content: Mapping[str, Any] | None = None
) -> ResumePoint:
    """Return the point at ``state``; without a manifest, the content says its step."""
    if manifest:
        return ResumePoint(state, manifest["step"], manifest, explicit=True)
    content = content or _load_unverified(state)
    try:
        step = int(content["global_step"])
    except (ValueError, KeyError, TypeError) as error:
        raise _cannot_be_loaded(state, error) from None
    return ResumePoint(state, step, manifest, explicit=True)


def _load_unverified(state: Path) -> dict[str, Any]:
    try:
        return load_state(state)
    except (ValueError, OSError) as error:
        raise _cannot_be_loaded(state, error) from None


def _cannot_be_loaded(state: Path, error: Exception) -> ResumeRefusedError:
    return ResumeRefusedError(
        f"ckpt_path={state} cannot be loaded: {error!s}. Choose another checkpoint"
    )


def _describe_missing(store: Store, word: str) -> str:
    if not store.steps():
        return f"ckpt_path={word}, but {store.directory} has no checkpoint"
    return (
        f"ckpt_path={word}, but no checkpoint in {store.directory} has a score yet. "
        f"Use ckpt_path=last, or train until the first validation"
    )


def _describe_steps(store: Store) -> str:
    steps = [str(step) for step in store.steps()]
    if not steps:
        return f"{store.directory} has no checkpoint"
    shown = ["...", *steps[-10:]] if len(steps) > 10 else steps
    return f"{store.directory} has the steps {', '.join(shown)}"


def _describe_refusal(point: ResumePoint, reasons: list[str]) -> str:
    lines = [f"    {reason}" for reason in reasons[:MAX_REASONS]]
    if len(reasons) > MAX_REASONS:
        lines.append(f"    ... and {len(reasons) - MAX_REASONS} more")
    ways = [
        "Undo the change",
        "continue on purpose with ckpt_path=last",
        "start another run in a directory of its own",
    ]
    if any(reason.startswith(DATA_CHANGED) for reason in reasons):
        ways.insert(1, "restore the data that it began with")
    changes = "\n".join(lines)
    return (
        f"this is not the run that {point.state.parent} belongs to; what changed:\n{changes}\n"
        f"{', or '.join(ways)}"
    )


def _code_changes(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    changed = _differing_keys(then, now)
    if not changed:
        return []
    total = len(then.keys() | now.keys())
    more = f", and {len(changed) - MAX_NAMES} more" if len(changed) > MAX_NAMES else ""
    names = ", ".join(changed[:MAX_NAMES])
    return [f"the code changed, {len(changed)} of {total} modules: {names}{more}"]


def _stack_changes(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    keys = _differing_keys(then, now)
    return [f"{key}: {then.get(key, 'nothing')} -> {now.get(key, 'nothing')}" for key in keys]


def _differing_keys(a: Mapping[str, str], b: Mapping[str, str]) -> list[str]:
    return sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key))


def _show(config: Mapping[str, Any], key: str) -> str:
    return repr(config[key]) if key in config else "nothing"
