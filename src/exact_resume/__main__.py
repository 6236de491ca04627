"""What a run's store holds, without touching it: python -m exact_resume status runs/cars, or verify
runs/cars.
"""

import math
import sys
import textwrap
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from exact_resume.checkpoint.store import (
    CorruptCheckpointError,
    NoValidCheckpointError,
    Store,
    step_dirname,
)
from exact_resume.code_hash import code_hashes
from exact_resume.fingerprint import Fingerprint, describe_stack
from exact_resume.resume import Rules, compare_fingerprints, monitored_scores

USAGE = "usage: python -m exact_resume status|verify runs/NAME"
ROW = "{:>10}  {:>7}  {:>11}  {:8}  {:>10}  {}"


def main(words: list[str]) -> int:
    """0 if all is well, 1 if a checkpoint does not verify or there is none, 2 for a mistake in the
    command.
    """
    if len(words) != 2 or words[0] not in ("status", "verify"):
        print(USAGE, file=sys.stderr)
        return 2
    run = Path(words[1])
    if not run.is_dir():
        print(
            f"error: {run} is not there; give the directory of a run, such as runs/cars",
            file=sys.stderr,
        )
        return 2
    store = Store(run / "checkpoints")
    whole, broken = check(store)
    if words[0] == "verify":
        complain(broken)
        print(f"{len(whole)} of {len(whole) + len(broken)} checkpoints verify")
    else:
        table(run, store, whole, broken)
        complain(broken)
        outlook(run, whole)
    return 1 if broken or not whole else 0


def check(store: Store) -> tuple[dict[int, dict[str, Any]], dict[int, str]]:
    """By step, the manifests of the checkpoints that verify, and what is wrong with the others."""
    whole, broken = {}, {}
    for step in store.steps():
        try:
            whole[step] = store.verify(step)
        except (CorruptCheckpointError, NoValidCheckpointError, OSError) as reason:
            if store.path(step).exists():  # or a live run has pruned it meanwhile
                broken[step] = str(reason)
    return whole, broken


def complain(broken: Mapping[int, str]) -> None:
    """Say what is wrong with each checkpoint that does not verify."""
    for step, reason in broken.items():
        tell(f"{step_dirname(step)} does not verify: {reason}")


def table(
    run: Path, store: Store, whole: Mapping[int, dict[str, Any]], broken: Mapping[int, str]
) -> None:
    """A line a checkpoint: age, size, score, and whether it is the newest or the best."""
    last = max(whole, default=None)
    monitor, mode, found = monitored_scores(run, store)
    scores, sign = (
        {step: score for step, score in found.items() if math.isfinite(score)},
        1 if mode == "min" else -1,
    )
    best = min(whole.keys() & scores.keys(), key=lambda step: sign * scores[step], default=None)
    if whole or broken:
        print(ROW.format("step", "age", "size", "verified", monitor, "").rstrip())
    for step in sorted(whole.keys() | broken.keys()):
        age = _age(time.time() - whole[step]["time"]) if "time" in whole.get(step, {}) else ""
        size = _size(store.path(step))
        score = f"{scores[step]:.5g}" if step in scores else ""
        marks = ", ".join(mark for mark, at in (("last", last), ("best", best)) if step == at)
        print(
            ROW.format(
                step, age, f"{size / 1e6:,.1f} MB", "yes" if step in whole else "NO", score, marks
            ).rstrip()
        )


def outlook(run: Path, whole: Mapping[int, dict[str, Any]]) -> None:
    """What was put aside, and what the run's command would do, if its config and data are
    unchanged.
    """
    quarantine, abandoned = run / "checkpoints" / "quarantine", run / "abandoned"
    for place, what in ((quarantine, "did not verify"), (abandoned, "branches that were left")):
        if names := sorted(p.name for p in place.glob("*") if p.is_dir()):
            tell(f"{place} ({what}): {', '.join(names)}")
    if (skips := run / "skips.jsonl").is_file():
        tell(f"batches that are left out: {len(skips.read_bytes().splitlines())}, in {skips}")
    step = max(whole, default=None)
    if step is not None:
        finished = step >= (_config(whole[step]).get("trainer.max_steps") or math.inf)
        tell(f"finished at step {step}" if finished else _promise(step, whole[step]))
    elif any((run / "checkpoints").glob("step-*")) or any(quarantine.glob("step-*")):
        tell(
            "nothing verifies, so nothing would be resumed; to start over, give the run a new name "
            "(name=...)"
        )
    else:
        tell(f"{run} has no checkpoint; the same command would start afresh")


def tell(text: str) -> None:
    """Print ``text`` in lines of at most 80 characters, paths left whole."""
    print(
        textwrap.fill(
            text, 80, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
        )
    )


def _config(manifest: Mapping[str, Any]) -> Mapping[str, Any]:
    return manifest.get("fingerprint", {}).get("config", {})


def _promise(step: int, manifest: Mapping[str, Any]) -> str:
    """What resuming from ``step`` would promise, for the config that it was written with."""
    config = _config(manifest)
    torch.set_num_threads(
        config.get("trainer.threads") or torch.get_num_threads()
    )  # as the run would
    then = {"config": {}, "data": "", "stack": {}} | manifest.get("fingerprint", {})
    here = describe_stack() | {
        k: v for k, v in then["stack"].items() if k == "gradients"
    }  # that is of the processes to come
    code = code_hashes(
        then.get("code", ()), leave_out=["*"]
    )  # of the same modules, whatever imports them now
    now = Fingerprint(dict(config), then["data"], code, here)
    guarantee = compare_fingerprints(then, now, Rules())
    reasons = "; ".join(guarantee.reasons[:10]) + ("; ..." if len(guarantee.reasons) > 10 else "")
    if guarantee.level == "refused":
        return f"the same command would refuse to resume from step {step}, and ckpt_path=last would do it: {reasons}"
    return f"the same command would resume from step {step}, {guarantee.level}{': ' if reasons else ''}{reasons}"


def _size(directory: Path) -> int:
    """Bytes of the files in ``directory``; a live run may delete it meanwhile."""
    try:
        return sum(p.stat().st_size for p in directory.glob("*") if p.is_file())
    except FileNotFoundError:
        return 0


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0, seconds):.0f} s"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
