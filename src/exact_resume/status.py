"""Print the checkpoints of a run, and what its command would do now; nothing is changed."""

import math
import sys
import textwrap
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from exact_resume.checkpoint.store import (
    QUARANTINE,
    CorruptCheckpointError,
    NoValidCheckpointError,
    Store,
    step_dirname,
)
from exact_resume.checkpoint_interval import SAVE_COST, describe_stored_interval
from exact_resume.code_hash import code_hashes
from exact_resume.fingerprint import Fingerprint, describe_stack
from exact_resume.resume import Rules, compare_fingerprints, monitored_scores

ROW = "{:>10}  {:>7}  {:>11}  {:8}  {:>10}  {}"
MAX_REASONS = 10


def print_status(run: Path, *, table: bool = True) -> int:
    """Print the checkpoints of ``run`` and whether they verify; return the exit code.

    Args:
        run: its directory.
        table: print everything about them; else only how many verify.
    """
    if not run.is_dir():
        print(
            f"error: {run} is not there; give the directory of a run, such as runs/cars",
            file=sys.stderr,
        )
        return 2
    store = Store(run / "checkpoints")
    valid, corrupt = verify_all(store)
    if table:
        print_table(run, store, valid, corrupt)
        print_corrupt(corrupt)
        print_outlook(run, valid)
    else:
        print_corrupt(corrupt)
        print(f"{len(valid)} of {len(valid) + len(corrupt)} checkpoints verify")
    return 0 if valid and not corrupt else 1


def verify_all(store: Store) -> tuple[dict[int, dict[str, Any]], dict[int, str]]:
    """Return the manifests of the valid checkpoints, and what is wrong with the others, by step."""
    valid = {}
    corrupt = {}
    for step in store.steps():
        try:
            valid[step] = store.verify(step)
        except (CorruptCheckpointError, NoValidCheckpointError, OSError) as reason:
            if store.path(step).exists():  # else a live run has deleted it meanwhile
                corrupt[step] = str(reason)
    return valid, corrupt


def print_corrupt(corrupt: Mapping[int, str]) -> None:
    """Print what is wrong with each checkpoint that does not verify."""
    for step, reason in corrupt.items():
        print_wrapped(f"{step_dirname(step)} does not verify: {reason}")


def print_table(
    run: Path, store: Store, valid: Mapping[int, dict[str, Any]], corrupt: Mapping[int, str]
) -> None:
    """Print a line for each checkpoint: age, size, score, and which is the last or the best."""
    steps = sorted(valid.keys() | corrupt.keys())
    if not steps:
        return
    monitor, mode, all_scores = monitored_scores(run, store)
    scores = {step: score for step, score in all_scores.items() if math.isfinite(score)}
    sign = 1 if mode == "min" else -1
    best = min(valid.keys() & scores.keys(), key=lambda step: sign * scores[step], default=None)
    marks = {"last": max(valid, default=None), "best": best}
    print(ROW.format("step", "age", "size", "verified", monitor, "").rstrip())
    for step in steps:
        written = valid.get(step, {}).get("time")
        row = ROW.format(
            step,
            _format_age(time.time() - written) if written else "",
            f"{size_on_disk(store.path(step)) / 1e6:,.1f} MB",
            "yes" if step in valid else "NO",
            f"{scores[step]:.5g}" if step in scores else "",
            ", ".join(mark for mark, marked in marks.items() if marked == step),
        )
        print(row.rstrip())


def print_outlook(run: Path, valid: Mapping[int, dict[str, Any]]) -> None:
    """Print what was set aside, and what the run's command would do if nothing else changed."""
    quarantine = run / "checkpoints" / QUARANTINE
    for line in describe_set_aside(run):
        print_wrapped(line)
    skips = run / "skips.jsonl"
    if skips.is_file():
        print_wrapped(f"skipped batches: {len(skips.read_bytes().splitlines())}, in {skips}")
    if valid:
        step = max(valid)
        config = valid[step].get("fingerprint", {}).get("config", {})
        if config.get("callbacks.checkpoint.every", "auto") == "auto":
            if interval := describe_stored_interval(run / SAVE_COST):
                print_wrapped(interval)
        for entry in valid[step].get("trajectories", ()):
            reasons = "; ".join(entry.get("reasons", ()))
            print_wrapped(f"at step {entry.get('step')} a new trajectory began: {reasons}")
        print_wrapped(describe_resume(step, valid[step]))
    elif any((run / "checkpoints").glob("step-*")) or any(quarantine.glob("step-*")):
        print_wrapped(
            "no checkpoint verifies, so the run cannot continue; to start over, use a new directory"
        )
    else:
        print_wrapped(f"{run} has no checkpoint; the same command would start afresh")


def describe_set_aside(run: Path) -> list[str]:
    """Say which checkpoints were set aside, and why, a line for each directory."""
    quarantine = run / "checkpoints" / QUARANTINE
    set_aside = {quarantine: "did not verify", run / "abandoned": "replaced by another branch"}
    lines = []
    for directory, what in set_aside.items():
        names = sorted(path.name for path in directory.glob("*") if path.is_dir())
        if names:
            lines.append(f"{directory} ({what}): {', '.join(names)}")
    return lines


def print_wrapped(text: str) -> None:
    """Print ``text`` in lines of at most 80 characters, without breaking paths."""
    lines = textwrap.wrap(
        text, 80, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
    )
    print("\n".join(lines))


def describe_resume(step: int, manifest: Mapping[str, Any]) -> str:
    """Return what the same command would do with the checkpoint of ``step``.

    Config and data are taken as unchanged; code, versions and machine are compared.
    """
    then = {"config": {}, "data": "", "stack": {}} | manifest.get("fingerprint", {})
    config = then["config"]
    if 0 < (config.get("trainer.max_steps") or -1) <= step:
        return f"finished at step {step}"
    torch.set_num_threads(config.get("trainer.threads") or torch.get_num_threads())
    stack = describe_stack()
    if "gradients" in then["stack"]:  # it depends on the processes, which are not running here
        stack["gradients"] = then["stack"]["gradients"]
    # Hash the modules of the checkpoint again, and none that they import today. The script of the
    # run cannot be found from here, and is taken as unchanged, too.
    stored_code = then.get("code", {})
    modules = [name for name in stored_code if name != "__main__"]
    code = code_hashes(modules, leave_out=["*"])
    if "__main__" in stored_code:
        code["__main__"] = stored_code["__main__"]
    now = Fingerprint(dict(config), then["data"], code, stack)
    guarantee = compare_fingerprints(then, now, Rules())
    reasons = "; ".join(guarantee.reasons[:MAX_REASONS])
    if len(guarantee.reasons) > MAX_REASONS:
        reasons += "; ..."
    if guarantee.level == "refused":
        return (
            f"the same command would refuse to resume from step {step}, and ckpt_path=last would "
            f"do it: {reasons}"
        )
    return f"the same command would resume from step {step}, {guarantee.level}" + (
        f": {reasons}" if reasons else ""
    )


def size_on_disk(directory: Path) -> int:
    """Return the bytes of the files in ``directory``; 0 if a live run deletes it meanwhile."""
    try:
        return sum(path.stat().st_size for path in directory.glob("*") if path.is_file())
    except FileNotFoundError:
        return 0


def _format_age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0, seconds):.0f} s"
