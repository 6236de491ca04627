"""Write one full ``state.ckpt`` from a sharded checkpoint; nothing that is there is changed.

    python -m exact_resume consolidate runs/NAME [--step N] [--out DIR]
    python -m exact_resume consolidate runs/NAME/checkpoints/step-00000500 [--out DIR]

The result is a checkpoint like any other, ``DIR/step-00000500/``, for tools that read one file. By
default DIR is the directory ``consolidated`` of the run. This project reads both kinds alike.
"""

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

from exact_resume.checkpoint.schema import PARTS
from exact_resume.checkpoint.store import (
    MANIFEST,
    SCORE,
    STATE,
    CheckpointLoadError,
    CorruptCheckpointError,
    NoValidCheckpointError,
    Store,
    load_state,
    read_checkpoint,
    verify_checkpoint,
)

WRITTEN_ANEW = ("format", "step", "files", "time")  # entries of the manifest


def consolidate_command(arguments: list[str]) -> int:
    """Run the command; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m exact_resume consolidate",
        description="Write one full state.ckpt from a sharded checkpoint.",
    )
    parser.add_argument("path", type=Path, metavar="RUN_OR_CHECKPOINT")
    parser.add_argument("--step", type=int, help="of a run; by default its newest that verifies")
    parser.add_argument("--out", type=Path, help="directory that gets step-...; never overwritten")
    chosen = parser.parse_args(arguments)
    try:
        source = find_checkpoint(chosen.path, chosen.step)
        if PARTS not in load_state(source / STATE, whole=False):
            print(f"{source / STATE} is whole already; nothing was written")
            return 0
        out = chosen.out or _run_of(source) / "consolidated"
        written = consolidate(source, out)
    except (FileNotFoundError, FileExistsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (CorruptCheckpointError, CheckpointLoadError, NoValidCheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{written / STATE}: {(written / STATE).stat().st_size / 1e6:,.1f} MB, verified")
    return 0


def find_checkpoint(path: Path, step: int | None) -> Path:
    """Return the directory of a checkpoint.

    Args:
        path: that directory, its ``state.ckpt``, or a run.
        step: of a run; None for its newest checkpoint that verifies.

    Raises:
        FileNotFoundError: there is none.
        NoValidCheckpointError: none verifies.
    """
    directory = path.parent if path.name == STATE else path
    if (directory / MANIFEST).is_file():
        return directory
    store = Store(path / "checkpoints")
    if step is not None:
        if step not in store.steps():
            raise FileNotFoundError(f"{store.directory} has no step {step}: {store.steps()}")
        return store.path(step)
    newest = store.last()
    if newest is None:
        raise FileNotFoundError(f"{path} is no checkpoint, and no run that has one")
    return store.path(newest["step"])


def consolidate(source: Path, out: Path) -> Path:
    """Write the checkpoint in ``source`` as a full one below ``out``; return its directory.

    Raises:
        FileExistsError: it is there already.
        CorruptCheckpointError: ``source`` does not verify.
    """
    manifest, state = read_checkpoint(source)
    metadata: dict[str, Any] = {k: v for k, v in manifest.items() if k not in WRITTEN_ANEW}
    written = Store(out).commit(manifest["step"], state, **metadata)
    if (source / SCORE).is_file():
        shutil.copyfile(source / SCORE, written / SCORE)
    verify_checkpoint(written)
    return written


def _run_of(checkpoint: Path) -> Path:
    """Return the run of a checkpoint; where there is none, the directory that it lies in."""
    above = checkpoint.resolve().parent
    return above.parent if above.name == "checkpoints" else above
