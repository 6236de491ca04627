"""A run reduced to its store: it lives in a process of its own, dies at a chosen point, and is told
to go on.

    sweep -> find the entry -> abandon what is newer -> (step, commit, prune) ... -> step 10

What the process did is in ``journal``, written after each call returned.
"""

import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from exact_resume.checkpoint.compare import diff_checkpoints
from exact_resume.checkpoint.store import STATE, CorruptCheckpointError, Store, load_state
from exact_resume.resume import resolve_checkpoint

EVERY, LAST = 2, 10


def advance(weights: Tensor, step: int) -> Tensor:
    """The weights at ``step`` from those before it, ``(n,) -> (n,)``."""
    return 0.9 * weights + torch.randn(weights.shape, generator=torch.Generator().manual_seed(step))


def state_at(step: int, start: float = 0.0) -> dict[str, Any]:
    """What an undisturbed run holds at ``step``; another ``start`` is another run."""
    weights = torch.full((5000,), start)
    for i in range(1, step + 1):
        weights = advance(weights, i)
    return {"global_step": step, "state_dict": {"weights": weights}}


def live(home: Path, ckpt_path: str = "auto") -> None:
    """Enter the run in ``home`` as train.py does, and train to the last step."""
    store, journal = (
        Store(home / "checkpoints"),
        os.open(home / "journal", os.O_WRONLY | os.O_APPEND | os.O_CREAT),
    )
    store.remove_stale_temp()
    entry = resolve_checkpoint(store, ckpt_path, {}, "min")
    state = load_state(entry.state) if entry else state_at(0)
    step, weights = state["global_step"], state["state_dict"]["weights"]
    os.write(journal, f"enter {step}\n".encode())
    if entry:
        store.move_newer(step, home / "abandoned" / f"{len(list(home.glob('abandoned/*'))):03}")
    for now in range(step + 1, LAST + 1):
        weights = advance(weights, now)
        if now % EVERY == 0:
            store.commit(now, {"global_step": now, "state_dict": {"weights": weights}})
            os.write(journal, f"commit {now}\n".encode())
            store.prune({*store.steps()[-2:], 4})
    os.close(journal)


@dataclass(frozen=True)
class Scene:
    """What the first process finds.

    Attributes:
        steps: the checkpoints that are there.
        spoil: what is done to them before.
        broken: steps of which the checkpoint is broken.
        enter: a step to be entered at on purpose, so that the newer ones are abandoned; None for
            ``auto``.
    """

    steps: tuple[int, ...] = ()
    spoil: Callable[[Store], None] = lambda store: None
    broken: frozenset[int] = frozenset()
    enter: int | None = None

    def prepare(self, home: Path) -> Path:
        """Make ``home`` what this scene says."""
        store = Store(home / "checkpoints")
        home.mkdir()
        for step in self.steps:
            store.commit(
                step, state_at(step, start=float(self.enter is not None and step > self.enter))
            )
        self.spoil(store)
        return home

    def ckpt_path(self, home: Path) -> str:
        return "auto" if self.enter is None else str(Store(home / "checkpoints").path(self.enter))


def _break_the_newest(store: Store) -> None:
    os.truncate(store.state(store.steps()[-1]), 1000)


def _leave_strays(store: Store) -> None:
    for stray in (".step-00000008.1", ".step-00000008.2", ".pruned-step-00000001"):
        shutil.copytree(store.path(6), store.directory / stray)
    (store.directory / ".step-00000008.2" / "manifest.json").unlink()


SCENES = {
    "saves from the start": Scene(),
    "strays of killed processes": Scene((2, 4, 6), _leave_strays),
    "a broken checkpoint": Scene((2, 4, 6), _break_the_newest, frozenset({6})),
    "a branch to abandon": Scene((2, 4, 6, 8), enter=4),
}


class Way(Protocol):
    """A way to die: all the points where one may, and a process that does at one."""

    def points(self, home: Path, ckpt_path: str) -> list[Any]: ...

    def start(self, home: Path, ckpt_path: str, point: Any) -> int:
        """The exit code of a process that was to die at ``point``."""
        ...


def check_after_a_kill(home: Path, scene: Scene) -> int:
    """What was committed is there, and nothing under a checkpoint's name is not whole; returns the
    newest step.
    """
    store = Store(home / "checkpoints")
    reasons = {step: _what_is_wrong(store, step) for step in store.steps()}
    unexpected = {
        step: reason for step, reason in reasons.items() if reason and step not in scene.broken
    }
    assert not unexpected, f"not whole: {unexpected}"
    whole = {0, *(step for step, reason in reasons.items() if not reason)}
    attempt = last_attempt(home)
    told = attempt[-1] if attempt else max({0, *scene.steps} - scene.broken)
    assert told in whole, f"step {told} was committed, and whole are {whole}"
    if scene.enter is None:
        assert max(whole) <= told + EVERY
    return max(whole)


def last_attempt(home: Path) -> list[int]:
    """The step that the last process entered at, and the steps it committed; empty if it did not
    come so far.
    """
    journal = (home / "journal").read_text() if (home / "journal").exists() else ""
    return [int(step) for step in re.findall(r"\d+", journal.rpartition("enter")[2])]


def _what_is_wrong(store: Store, step: int) -> str | None:
    try:
        store.verify(step)
        return None
    except CorruptCheckpointError as reason:
        return str(reason)


def check_end(home: Path, scene: Scene, entered: int) -> None:
    """After the last process: it entered at the newest checkpoint, its bits are right, and nothing
    lies about.
    """
    store = Store(home / "checkpoints")
    assert last_attempt(home)[0] == (entered if scene.enter is None else scene.enter)
    missing = {4, 8, 10}.difference(store.steps())
    assert not missing, f"not there: {missing}"
    for step in store.steps():
        store.verify(step)
        assert diff_checkpoints(load_state(store.state(step)), state_at(step)) == []
    others = {path.name for path in store.directory.iterdir() if not path.name.startswith("step-")}
    assert others == ({"quarantine"} if scene.broken else set())
    for step in scene.broken:
        assert list(store.directory.glob(f"quarantine/step-{step:08d}.*/{STATE}"))
    for step in scene.steps if scene.enter is not None else ():
        if step > scene.enter:
            kept = [load_state(path) for path in home.glob(f"abandoned/*/step-{step:08d}/{STATE}")]
            assert any(
                diff_checkpoints(state, state_at(step, start=1.0)) == [] for state in kept
            ), f"step {step} is lost"


def trials(
    tmp: Path, scene: Scene, way: Way, choose: Callable[[list[Any]], Iterator[list[Any]]]
) -> int:
    """Kill at the points that ``choose`` takes of all, one list for each trial; returns how many
    kills there were.
    """
    template = scene.prepare(tmp / "template")
    home, kills = tmp / "home", 0

    def afresh() -> str:
        shutil.rmtree(home, ignore_errors=True)
        shutil.copytree(template, home)
        return scene.ckpt_path(home)

    live(home, afresh())  # undisturbed; also, what is done only once in a process is done now
    for points in choose(way.points(home, afresh())):
        ckpt_path = afresh()
        newest = check_after_a_kill(home, scene)
        for i, point in enumerate(points):
            code = way.start(home, ckpt_path, point)
            assert code == -signal.SIGKILL or (code == 0 and i > 0), f"{point}: exit code {code}"
            kills += code == -signal.SIGKILL
            newest = check_after_a_kill(home, scene)
        live(home, ckpt_path)
        check_end(home, scene, newest)
    return kills
