"""A power cut at any moment, whatever of the unsynced the disk kept: the store finds what it
promised.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from power import Recorder, lay_out, listening

from exact_resume.checkpoint.store import (
    CorruptCheckpointError,
    NoValidCheckpointError,
    Store,
    load_state,
    step_dirname,
    verify_checkpoint,
)
from exact_resume.files import make_directory

RUN = "runs/a"


def state(step):
    return {"global_step": step, "weights": torch.full((300,), float(step))}


def store_in(root):
    return Store(root / RUN / "checkpoints")


@dataclass(frozen=True)
class Scene:
    """Deeds, each with the steps between which ``last`` is to be when it has returned; 0 is no
    checkpoint.

    Attributes:
        steps: the checkpoints that are there, durably; ``before`` is done to them.
        promise: as for the deeds, before the first one.
        never_lost: steps whose checkpoint is somewhere, whole, at any time.
    """

    deeds: tuple[tuple[Callable[[Path], object], int, int], ...]
    steps: tuple[int, ...] = ()
    promise: tuple[int, int] = (0, 0)
    before: Callable[[Path], object] = lambda root: None
    never_lost: tuple[int, ...] = ()


def commit(step):
    return lambda root: store_in(root).commit(step, state(step))


def prune(*keep):
    return lambda root: store_in(root).prune(set(keep))


def abandon(after):
    return lambda root: store_in(root).move_newer(after, root / RUN / "abandoned" / "001")


def last(root):
    return store_in(root).last(quarantine=True)


def sweep(root):
    return store_in(root).remove_stale_temp()


def break_6(root):
    os.truncate(store_in(root).state(6), 500)


def die_having_made_the_directory(root):
    make_directory(root / RUN)
    (root / RUN / "checkpoints").mkdir()


def leave_a_killed_save(root):
    Store(root / RUN / "aside").commit(8, state(8))
    shutil.copytree(
        root / RUN / "aside" / "step-00000008", root / RUN / "checkpoints" / ".step-00000008.1"
    )
    shutil.copytree(
        root / RUN / "aside" / "step-00000008", root / RUN / "checkpoints" / ".pruned-step-00000002"
    )


def die_having_renamed(root):
    checkpoints = store_in(root).directory
    os.rename(checkpoints / ".step-00000008.1", checkpoints / "step-00000008")


SCENES = {
    "first saves": Scene(((commit(2), 2, 2), (commit(4), 4, 4))),
    "prune and save": Scene(((prune(4), 6, 6), (commit(8), 8, 8)), (2, 4, 6), (6, 6)),
    "abandon and save": Scene(
        ((abandon(4), 4, 4), (commit(6), 6, 6)), (2, 4, 6, 8), (8, 8), never_lost=(2, 4, 6, 8)
    ),
    "quarantine and save": Scene(((last, 4, 4), (commit(8), 8, 8)), (2, 4, 6), (4, 4), break_6),
    "killed before the first save, and again": Scene(
        ((die_having_made_the_directory, 0, 0), (commit(2), 2, 2))
    ),
    "killed at the end of a save, and again": Scene(
        ((die_having_renamed, 6, 8), (sweep, 8, 8)), (2, 4, 6), (6, 6), leave_a_killed_save
    ),
}


@pytest.fixture
def record(tmp_path, monkeypatch):
    """Record a scene on a disk where only the fsyncs that ``heed`` says are heeded."""

    def record(scene, heed=lambda n, directory: True):
        root = tmp_path / "disk"
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        monkeypatch.setattr(os, "fsync", lambda fd: None)  # nobody cuts the power of this machine
        for step in scene.steps:
            commit(step)(root)
        scene.before(root)
        recorder = Recorder(root, heed)
        monkeypatch.setattr(os, "fsync", recorder.fsync)
        (at_least, at_most) = scene.promise
        for deed, low, high in scene.deeds:
            recorder.promise = (min(at_least, low), max(at_most, high))
            with listening(recorder):
                deed(root)
            at_least, at_most = recorder.promise = (low, high)
            recorder.cut()
        return recorder

    return record


def faults(recorder: Recorder, scene: Scene, tmp: Path) -> Iterator[str | None]:
    """For each different disk after a power cut: what is wrong with it, or None."""
    seen = set()
    for moment in recorder.moments:
        for disk in recorder.disks(moment):
            if (key := (frozenset(disk.items()), moment.promise)) not in seen:
                seen.add(key)
                shutil.rmtree(tmp / "after", ignore_errors=True)
                lay_out(disk, tmp / "after")
                yield fault(tmp / "after", *moment.promise, scene.never_lost)


def fault(root: Path, at_least: int, at_most: int, never_lost: tuple[int, ...]) -> str | None:
    store = store_in(root)
    lost = [
        step
        for step in never_lost
        if not any(map(whole, root.glob(f"{RUN}/**/{step_dirname(step)}")))
    ]
    if lost:
        return f"steps {lost} are nowhere"
    try:
        manifest = store.last(quarantine=True)
    except NoValidCheckpointError as error:
        return str(error)
    step = manifest["step"] if manifest else 0
    if not at_least <= step <= at_most:
        return f"last is {step} and not in {at_least, at_most}"
    if step and not torch.equal(load_state(store.state(step))["weights"], state(step)["weights"]):
        return f"step {step} has other weights"
    store.remove_stale_temp()
    commit(step + 1)(root)
    return None if last(root)["step"] == step + 1 else "a later save is not found"


def whole(checkpoint: Path) -> bool:
    try:
        return bool(verify_checkpoint(checkpoint))
    except CorruptCheckpointError:
        return False


@pytest.mark.parametrize("scene", SCENES)
def test_after_a_power_cut_the_promised_checkpoint_is_found_and_the_run_goes_on(
    scene, record, tmp_path
):
    found = list(faults(record(SCENES[scene]), SCENES[scene], tmp_path))
    print(f"{scene}: {len(found)} different disks after a power cut")
    assert set(found) == {None}
    assert len(found) >= 10


ONCE = {
    "a first save": Scene(((commit(2), 2, 2),)),
    "abandon": Scene(((abandon(4), 4, 4),), (2, 4, 6), (6, 6), never_lost=(6,)),
}


@pytest.mark.parametrize("kind", ["file", "directory"])
@pytest.mark.parametrize("scene", ONCE)
def test_control_without_fsync_something_is_lost(kind, scene, record, tmp_path):
    recorder = record(ONCE[scene], lambda n, directory: directory == (kind == "file"))
    assert any(faults(recorder, ONCE[scene], tmp_path)) == (
        kind == "directory" or scene == "a first save"
    )


@pytest.mark.parametrize(
    ("scene", "needed"), [("a first save", range(7)), ("abandon", range(1, 5))]
)
def test_control_every_single_fsync_is_needed(scene, needed, record, tmp_path):
    """But the one of runs/, with which ``abandon`` begins: this run's directory was not made just
    now.
    """
    losing = []
    for left_out in range(record(ONCE[scene]).fsyncs):
        recorder = record(ONCE[scene], lambda n, directory, left_out=left_out: n != left_out)
        losing += [left_out] if any(faults(recorder, ONCE[scene], tmp_path)) else []
    assert losing == [*needed]
