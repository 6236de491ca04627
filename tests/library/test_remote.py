"""The second copy of a run: what is there, is whole; and an empty machine continues from it.

The kills are SIGKILL of real processes; the place is a directory, through fsspec. The tests of a
store of objects are in test_remote_s3.py.
"""

import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from exact_resume.checkpoint.compare import diff_checkpoints, first_divergence
from exact_resume.checkpoint.remote import (
    LostOwnershipError,
    Remote,
    RemoteUnavailableError,
)
from exact_resume.checkpoint.remote_copier import Copier
from exact_resume.checkpoint.remote_fetch import fetch_step
from exact_resume.checkpoint.remote_record import fetch_record, is_record_name
from exact_resume.checkpoint.remote_url import check_url
from exact_resume.checkpoint.retention import kept_steps
from exact_resume.checkpoint.store import NoValidCheckpointError, Store, load_state
from exact_resume.metrics import MetricsCSV
from exact_resume.resume import ResumePoint
from exact_resume.run import Run
from exact_resume.second_copy import SecondCopy
from runs import ROOT, differences, fork, kill_at, train
from worlds import World
from worlds import finish as finish_world

SCRIPT = str(ROOT / "tests" / "copied_run.py")


def state(step: int) -> dict:
    return {"global_step": step, "state_dict": {"w": torch.full((1000,), float(step))}}


def make_run(home: Path, *steps: int) -> Run:
    """A run that has these checkpoints, each with its step as its score, and small files."""
    run = Run(home)
    (home / "attempts" / "001").mkdir(parents=True)
    (home / "attempts" / "001" / "log.txt").write_text("begun\n")
    for step in steps:
        run.metrics.log_metrics({"val/loss": float(step)}, step)
        run.store.commit(step, state(step))
        run.store.write_score(step, "val/loss", float(step))
    return run


def copier(run: Run, remote: Remote) -> Copier:
    return Copier(remote, run.home, run.store)


def copy_all(copier: Copier) -> None:
    while copier.copy_next():
        pass


def place(tmp: Path) -> Remote:
    (tmp / "disk").mkdir(exist_ok=True)
    return Remote(f"file://{tmp / 'disk'}", "run")


def fetched(remote: Remote, tmp: Path) -> dict[int, dict]:
    """Fetch every checkpoint that the place says to have; each must verify. Return their states."""
    store = Store(tmp / f"fetched-{time.monotonic_ns()}" / "checkpoints")
    for step in remote.steps():
        assert fetch_step(remote, step, store), f"step {step} is there, and does not verify"
    return {step: load_state(store.state(step)) for step in store.steps()}


def flip(path: Path, position: int = -100) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(bytes(content))


def test_what_is_copied_comes_back_equal_in_bits(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 10, 20, 30)
    remote = place(tmp_path)
    copy_all(copier(run, remote))
    assert remote.steps() == [10, 20, 30]
    for step, content in fetched(remote, tmp_path).items():
        assert diff_checkpoints(content, state(step)) == []
    fetch_record(remote, tmp_path / "new")
    for name in ("metrics.csv", "attempts/001/log.txt"):
        assert (tmp_path / "new" / name).read_bytes() == (run.home / name).read_bytes()
    assert remote.score(20, "val/loss") == 20
    assert remote.score(20, "val/accuracy") is None


def test_plain_files_that_any_tool_may_copy_back(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 10, 20)
    copy_all(copier(run, place(tmp_path)))
    shutil.copytree(tmp_path / "disk" / "run", tmp_path / "back")
    back = Run(tmp_path / "back")
    assert [back.store.verify(step)["step"] for step in back.store.steps()] == [10, 20]
    assert back.store.scores("val/loss") == {10: 10.0, 20: 20.0}
    assert back.metrics.rows() == run.metrics.rows()


# --- Kills


class DyingRemote(Remote):
    """Is killed at its Nth boundary: before a file, in it, after it, at a deletion."""

    boundary = 0

    def reach(self) -> None:
        self.boundary -= 1
        if self.boundary == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def put(self, name, file):
        self.reach()
        return super().put(name, file)

    def _open_new(self, name):
        inner = super()._open_new(name)
        remote = self

        class Opened:
            def __enter__(self):
                self.file = inner.__enter__()
                return self

            def write(self, data):
                self.file.write(data[: len(data) // 2])
                self.file.flush()
                remote.reach()
                self.file.write(data[len(data) // 2 :])

            def __exit__(self, *error):
                inner.__exit__(*error)
                remote.reach()

        return Opened()

    def delete(self, step):
        self.reach()
        super().delete(step)
        self.reach()


class ManifestFirst(Copier):
    """The control: the manifest goes up before what it describes."""

    def _copy_step(self, step):
        path = self.store.path(step) / "manifest.json"
        with path.open("rb") as file:
            self.remote.put(f"checkpoints/{path.parent.name}/manifest.json", file)
        return super()._copy_step(step)


def killed_at(boundary: int, run: Run, url: str, cls: type[Copier], keep=None) -> bool:
    """Copy ``run`` in another process that is killed at a boundary; return whether it was."""
    pid = os.fork()
    if pid == 0:
        try:
            remote = DyingRemote(url, "run")
            remote.boundary = boundary
            copier = cls(remote, run.home, run.store)
            copier.keep = keep
            copy_all(copier)
        finally:
            os._exit(0)
    _, status = os.waitpid(pid, 0)
    return os.WIFSIGNALED(status)


def kill_everywhere(tmp_path: Path, cls: type[Copier]) -> int:
    """Kill at every boundary in turn, always from an empty place; what is there must verify."""
    run = make_run(tmp_path / "run", 10, 20)
    boundary = 1
    url = f"file://{tmp_path / 'disk'}"
    while True:
        shutil.rmtree(tmp_path / "disk", ignore_errors=True)
        remote = place(tmp_path)
        if not killed_at(boundary, run, url, cls):
            return boundary - 1
        fetched(remote, tmp_path)
        copy_all(copier(run, place(tmp_path)))  # the next start
        assert sorted(fetched(remote, tmp_path)) == [10, 20]
        boundary += 1


def test_a_kill_at_any_boundary_of_any_file_leaves_only_whole_checkpoints(tmp_path: Path) -> None:
    assert kill_everywhere(tmp_path, Copier) > 20


def test_control_with_the_manifest_first_a_kill_leaves_a_checkpoint_that_is_none(
    tmp_path: Path,
) -> None:
    with pytest.raises(AssertionError, match="does not verify"):
        kill_everywhere(tmp_path, ManifestFirst)


def test_a_kill_while_old_checkpoints_are_deleted(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 10, 20, 30)
    remote = place(tmp_path)
    copy_all(copier(run, remote))
    shutil.copytree(tmp_path / "disk", tmp_path / "full")
    run.store.commit(40, state(40))

    def keep(steps, scores):
        return {*sorted(steps)[-2:]}

    boundary = 1
    while True:
        shutil.rmtree(tmp_path / "disk")
        shutil.copytree(tmp_path / "full", tmp_path / "disk")
        if not killed_at(boundary, run, f"file://{tmp_path / 'disk'}", Copier, keep):
            break
        assert 30 in fetched(remote, tmp_path)
        again = copier(run, place(tmp_path))
        again.keep = keep
        copy_all(again)
        assert remote.steps() == [30, 40]
        assert {name.split("/")[1] for name in remote.files("checkpoints")} == {
            "step-00000030",
            "step-00000040",
        }
        boundary += 1
    assert boundary > 8


def test_a_kill_while_a_checkpoint_is_fetched(tmp_path: Path) -> None:
    """The new machine has the whole checkpoint after a kill, or none; the next start gets it."""
    copy_all(copier(make_run(tmp_path / "run", 10), place(tmp_path)))
    url = f"file://{tmp_path / 'disk'}"
    boundary = 1
    while True:
        new = Run(tmp_path / f"new-{boundary}")
        pid = os.fork()
        if pid == 0:
            try:
                copy = SecondCopy(new, url, "run")
                die_at_name(boundary)
                copy.fetch_newest(fresh=False)
            finally:
                os._exit(0)
        _, status = os.waitpid(pid, 0)
        if not os.WIFSIGNALED(status):
            break
        for step in new.store.steps():
            assert new.store.verify(step)
            assert (new.home / "metrics.csv").exists(), "the record comes before the checkpoint"
        new.store.remove_stale_temp()
        SecondCopy(new, url, "run").fetch_newest(fresh=False)
        assert new.store.verify(10)
        assert new.metrics.column("val/loss") == {10: 10.0}
        boundary += 1
    assert boundary > 8


def die_at_name(boundary: int) -> None:
    """Kill this process when it opens, renames or makes its Nth file or directory."""
    left = boundary

    def count(event: str, args: tuple) -> None:
        nonlocal left
        is_write = event == "open" and isinstance(args[1], str) and args[1].startswith("w")
        if is_write or event in ("os.rename", "os.mkdir"):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


# --- Damage


class LyingRemote(Remote):
    """Writes another byte than it was given."""

    lies = "state.ckpt"

    def _open_new(self, name):
        inner = super()._open_new(name)
        remote = self

        class Opened:
            def __enter__(self):
                self.file = inner.__enter__()
                return self

            def write(self, data):
                is_lie = remote.lies and name.endswith(remote.lies)
                self.file.write(bytes([data[0] ^ 1]) + data[1:] if is_lie else data)

            def __exit__(self, *error):
                inner.__exit__(*error)

        return Opened()


@pytest.mark.parametrize("name", ["state.ckpt", "manifest.json"])
def test_a_server_that_changes_a_byte_is_found(tmp_path: Path, name: str) -> None:
    run = make_run(tmp_path / "run", 10)
    place(tmp_path)
    remote = LyingRemote(f"file://{tmp_path / 'disk'}", "run")
    remote.lies = name
    copying = copier(run, remote)
    with pytest.raises(RemoteUnavailableError, match="other bytes came back"):
        copy_all(copying)
    assert remote.steps() == []
    remote.lies = ""
    copy_all(copying)
    assert sorted(fetched(remote, tmp_path)) == [10]


@pytest.mark.parametrize("name", ["state.ckpt", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_checkpoint_is_left_out_for_the_one_before_it(
    tmp_path: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    copy_all(copier(make_run(tmp_path / "run", 10, 20), place(tmp_path)))
    path = tmp_path / "disk" / "run" / "checkpoints" / "step-00000020" / name
    if damage == "flip":
        flip(path)
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.unlink()
    new = Run(tmp_path / "new")
    SecondCopy(new, f"file://{tmp_path / 'disk'}", "run").fetch_newest(fresh=False)
    assert new.store.steps() == [10]
    assert new.store.verify(10)
    assert not [*new.store.directory.glob(".*")]
    if (name, damage) != ("manifest.json", "gone"):  # without it, there is no checkpoint
        assert "step-00000020 of the second copy" in caplog.text


def test_where_no_checkpoint_verifies_nothing_is_started(tmp_path: Path) -> None:
    copy_all(copier(make_run(tmp_path / "run", 10), place(tmp_path)))
    flip(tmp_path / "disk" / "run" / "checkpoints" / "step-00000010" / "state.ckpt")
    copy = SecondCopy(Run(tmp_path / "new"), f"file://{tmp_path / 'disk'}", "run")
    with pytest.raises(NoValidCheckpointError, match="verifies"):
        copy.fetch_newest(fresh=False)


def test_a_damaged_checkpoint_there_is_replaced_by_the_next_one_of_its_step(tmp_path: Path) -> None:
    remote = place(tmp_path)
    run = make_run(tmp_path / "run", 10, 20)
    copy_all(copier(run, remote))
    flip(tmp_path / "disk" / "run" / "checkpoints" / "step-00000020" / "state.ckpt")
    new = Run(tmp_path / "new")
    copy = SecondCopy(new, f"file://{tmp_path / 'disk'}", "run")
    copy.fetch_newest(fresh=False)
    new.store.commit(20, state(20), note="trained again")
    copy_all(copy.copier)
    assert sorted(fetched(remote, tmp_path)) == [10, 20]


def test_a_checkpoint_that_is_damaged_here_is_not_copied(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 10, 20)
    flip(run.store.state(20))
    remote = place(tmp_path)
    copying = copier(run, remote)
    copy_all(copying)
    assert sorted(fetched(remote, tmp_path)) == [10]


def test_a_manifest_that_names_a_file_elsewhere_writes_nothing_there(tmp_path: Path) -> None:
    names = ["../evil", "attempts/../../evil", "/evil", "attempts", ".bashrc", "checkpoints/x"]
    assert not any(map(is_record_name, names))
    assert all(map(is_record_name, ["metrics.csv", "attempts/001/log.txt", "samples/a.png"]))


# --- What goes there


def test_a_checkpoint_that_training_deletes_while_it_is_copied_is_copied_whole(
    tmp_path: Path,
) -> None:
    run = make_run(tmp_path / "run", 10)

    class Pruning(Remote):
        def put(self, name, file):
            if name.endswith("10/state.ckpt"):
                run.store.commit(20, state(20))
                run.store.prune({20})
            return super().put(name, file)

    place(tmp_path)
    remote = Pruning(f"file://{tmp_path / 'disk'}", "run")
    copy_all(copier(run, remote))
    assert sorted(fetched(remote, tmp_path)) == [10, 20]


def test_the_newest_goes_first_and_what_will_be_deleted_does_not_go(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 10, 20, 30, 40)
    remote = place(tmp_path)
    copying = copier(run, remote)

    def keep(steps, scores):
        scores = {**scores, **run.store.scores("val/loss")}
        return kept_steps(steps, scores, mode="min", keep_last=2, keep_best=1, keep_every=None)

    copying.keep = keep
    order = []
    while copying.copy_next():
        order += set(remote.steps()) - set(order)
    assert order == [40, 30, 10]
    assert remote.steps() == [10, 30, 40]


def test_the_rule_of_retention() -> None:
    scores = {10: 3.0, 20: 1.0, 30: 2.0, 40: float("nan")}
    rule = {"mode": "min", "keep_last": 1, "keep_best": 1, "keep_every": None}
    steps = [10, 20, 30, 40]
    assert kept_steps(steps, scores, **rule) == {20, 40}
    assert kept_steps(steps, scores, **rule | {"mode": "max"}) == {10, 40}
    assert kept_steps(steps, scores, **rule | {"keep_every": 30, "keep_best": 0}) == {30, 40}
    assert kept_steps(steps, scores, **rule, lost_scores={10, 99}) == {10, 20, 40}
    assert kept_steps([], {}, **rule) == set()


def test_an_outage_is_said_once_and_everything_is_copied_after_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = make_run(tmp_path / "run", 10)
    remote = place(tmp_path)
    (tmp_path / "disk" / "run").write_text("no directory")
    copying = Copier(remote, run.home, run.store, delays=(0.01,))
    with caplog.at_level("INFO"):
        copying.start()
        wait_until(lambda: copying.failures > 5)
        run.store.commit(20, state(20))
        copying.wake()
        (tmp_path / "disk" / "run").unlink()
        assert copying.wait(30, patience=30, stop=lambda: False)
        copying.close()
    lines = [record.message for record in caplog.records if "second copy" in record.message]
    assert len(lines) == 2
    assert "is behind" in lines[0]
    assert "is up again" in lines[1]
    assert remote.steps() == [10, 20]


# --- Two machines


def test_the_newest_start_owns_the_place_and_the_other_one_is_told_by_name(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 10)
    first, second = place(tmp_path), place(tmp_path)
    older = copier(run, first)
    copy_all(older)
    second.claim()
    run.store.commit(20, state(20))
    with pytest.raises(LostOwnershipError, match=f"process {os.getpid()} on "):
        copy_all(older)
    assert first.steps() == [10]


def test_files_of_two_machines_in_one_checkpoint_do_not_verify(tmp_path: Path) -> None:
    """The worst of a race: one has sent its file between the other's check and its manifest."""
    one = make_run(tmp_path / "one", 10)
    other = make_run(tmp_path / "other", 10)
    remote = place(tmp_path)
    copy_all(copier(one, remote))
    changed = state(10) | {"note": "of the other"}
    shutil.rmtree(other.store.path(10))
    other.store.commit(10, changed)
    with other.store.state(10).open("rb") as file:
        remote.put("checkpoints/step-00000010/state.ckpt", file)
    assert not fetch_step(remote, 10, Store(tmp_path / "new"))
    copy_all(copier(other, place(tmp_path)))  # the winner goes on, and mends it
    assert load_state_of(remote, 10, tmp_path)["note"] == "of the other"


def load_state_of(remote: Remote, step: int, tmp_path: Path) -> dict:
    return fetched(remote, tmp_path)[step]


# --- The start


def second_copy(run: Run, tmp: Path) -> SecondCopy:
    return SecondCopy(run, f"file://{tmp / 'disk'}", "run")


def test_a_checkpoint_that_is_damaged_here_comes_from_there(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 10, 20)
    copy_all(copier(run, place(tmp_path)))
    flip(run.store.state(20))
    second_copy(run, tmp_path).fetch_newest(fresh=False)
    assert run.store.last(quarantine=True)["step"] == 20
    assert [*(run.store.directory / "quarantine").glob("step-00000020.*")]


@pytest.mark.parametrize(("word", "step"), [("10", 10), ("step-00000010", 10), ("best", 20)])
def test_a_word_finds_a_checkpoint_that_is_only_there(tmp_path: Path, word: str, step: int) -> None:
    run = make_run(tmp_path / "run", 10, 20, 30)
    run.store.write_score(20, "val/loss", 1.0)
    copy_all(copier(run, place(tmp_path)))
    new = Run(tmp_path / "new")
    copy = second_copy(new, tmp_path)
    copy.fetch_newest(fresh=False)
    assert new.store.steps() == [30]
    copy.fetch_named(word, {}, monitor="val/loss", mode="min")
    assert new.store.steps() == [step, 30]
    assert new.store.verify(step)


def test_a_place_that_cannot_be_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    place(tmp_path)
    (tmp_path / "disk" / "run").write_text("no directory")
    monkeypatch.setattr("exact_resume.checkpoint.remote_fetch.RETRY_DELAYS", ())
    with pytest.raises(RemoteUnavailableError, match="so none is started"):
        second_copy(Run(tmp_path / "new"), tmp_path).fetch_newest(fresh=False)
    assert not (tmp_path / "new").exists()
    run = make_run(tmp_path / "run", 10, 20)
    copy = second_copy(run, tmp_path)
    copy.fetch_newest(fresh=False)
    assert "goes on from its own checkpoints" in caplog.text
    copy.enter(ResumePoint(run.store.state(20), 20, {}, explicit=False))
    with pytest.raises(RemoteUnavailableError):  # that newer ones are abandoned must be seen there
        copy.enter(ResumePoint(run.store.state(10), 10, {}, explicit=True))


def test_an_older_disk_that_could_not_see_the_place_replaces_nothing_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = make_run(tmp_path / "run", 10, 20, 30)
    remote = place(tmp_path)
    copy_all(copier(run, remote))
    old = make_run(tmp_path / "old", 10)
    copying = copier(old, place(tmp_path))
    copying.keep = lambda steps, scores: {*sorted(steps)[-2:]}
    copy_all(copying)
    assert "has step 30, which could not be seen at the start" in caplog.text
    assert remote.steps() == [20, 30]
    fetch_record(remote, tmp_path / "new")
    assert MetricsCSV(tmp_path / "new" / "metrics.csv").column("val/loss")[30] == 30


def test_a_checkpoint_that_comes_during_a_start_is_put_aside(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 10)
    older = copier(run, place(tmp_path))
    copy_all(older)
    new = Run(tmp_path / "new")
    copy = second_copy(new, tmp_path)
    copy.fetch_newest(fresh=False)
    run.store.commit(20, state(20))
    copy_all(older)
    copy.enter(ResumePoint(new.store.state(10), 10, {}, explicit=False))
    assert older.remote.steps() == [10]
    assert "abandoned/001/step-00000020/manifest.json" in older.remote.files("abandoned")
    with pytest.raises(LostOwnershipError):
        copy_all(older)


# --- Real runs


def wait_until(happened, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


def finish(home: Path, url: str, steps: int = 200, *more: str, code: int = 0) -> str:
    process, out, err = fork(home.parent, home.name, [SCRIPT, str(home), url, str(steps), *more])
    process.join(300)
    said = out.read_text() + err.read_text()
    assert process.exitcode == code, said
    assert "Traceback" not in said
    return said


def start_slowly(home: Path, url: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("STEP_SECONDS", "0.02")
    started = fork(home.parent, home.name, [SCRIPT, str(home), url, "200"])
    monkeypatch.delenv("STEP_SECONDS")
    return started


def assert_same_bits(one: Path, two: Path, steps: int = 200) -> None:
    states = [load_state(Store(home / "checkpoints").state(steps)) for home in (one, two)]
    assert diff_checkpoints(*states) == []
    rows = [MetricsCSV(home / "metrics.csv").rows() for home in (one, two)]
    assert first_divergence(*rows) is None


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("undisturbed") / "run"
    finish(home, "none")
    return home


def test_the_same_command_on_an_empty_machine_ends_in_the_same_bits(
    tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "disk").mkdir()
    url = f"file://{tmp_path / 'disk'}/run"
    home = tmp_path / "machine"
    remote = Remote(url)
    for goal in (20, 80):
        process, _, _ = start_slowly(home, url, monkeypatch)
        wait_until(lambda goal=goal: max(remote.steps(), default=0) >= goal)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        shutil.rmtree(home)
    said = finish(home, url)
    assert "has no checkpoint; fetching step" in said
    assert "bitwise" in said
    assert "is complete: the newest there is step 200" in said
    assert_same_bits(undisturbed, home)
    assert len([*(home / "attempts").iterdir()]) == 3
    # Copied back by hand, it is the same run, and finished.
    shutil.copytree(tmp_path / "disk" / "run", tmp_path / "back")
    assert "finished at step 200" in finish(tmp_path / "back", "none")
    assert_same_bits(undisturbed, tmp_path / "back")


@pytest.mark.slow
def test_an_older_disk_catches_up_and_a_resume_at_an_older_step_is_mirrored(
    tmp_path: Path, undisturbed: Path
) -> None:
    (tmp_path / "disk").mkdir()
    url = f"file://{tmp_path / 'disk'}/run"
    home = tmp_path / "machine"
    finish(home, url, 60)
    shutil.copytree(home, tmp_path / "old")
    finish(home, url, 120)
    said = finish(tmp_path / "old", url, 200)
    assert "is at step 60; fetching step 120" in said
    assert_same_bits(undisturbed, tmp_path / "old")
    shutil.rmtree(home)
    said = finish(home, url, 200, "180")  # on an empty machine
    assert "resumed from step 180" in said
    assert "these were moved to abandoned/: [200]" in said
    assert "abandoned/001/step-00000200/manifest.json" in Remote(url).files("abandoned")
    assert Remote(url).steps()[-1] == 200
    assert_same_bits(undisturbed, home)


def test_what_a_finished_run_has_not_copied_goes_at_the_next_start(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    url = f"file://{tmp_path / 'disk'}/run"
    finish(tmp_path / "machine", "none", 60)
    said = finish(tmp_path / "machine", url, 60)
    assert "finished at step 60, nothing to do" in said
    assert "is complete: the newest there is step 60" in said
    assert sorted(fetched(Remote(url), tmp_path)) == [40, 50, 60]


@pytest.mark.slow
def test_of_two_processes_one_copies(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    key = f"callbacks.checkpoint.remote=file://{tmp_path / 'disk'}"
    finish_world(tmp_path, "whole", 2)
    remote = Remote(f"file://{tmp_path / 'disk'}", "lost")
    world = World(tmp_path, "lost", 2, key)
    wait_until(remote.steps)
    world.kill()
    world.wait()
    shutil.rmtree(tmp_path / "runs" / "lost")
    world = World(tmp_path, "lost", 2, key).until(8)
    world.kill(0, number=signal.SIGTERM)
    assert world.wait() == [75, 75], world.output()
    assert "the second copy in" in world.output(0)
    assert "second copy" not in world.output(1)
    shutil.rmtree(tmp_path / "runs" / "lost")
    finish_world(tmp_path, "lost", 2, key)
    assert differences(tmp_path, "whole", "lost") == []


def test_refusals_name_the_second_copy_and_change_nothing(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    url = f"file://{tmp_path / 'disk'}/run"
    finish(tmp_path / "machine", url, 60)
    said = finish(tmp_path / "new", url, 60, "null", code=2)
    assert "ckpt_path=null starts afresh, but the second copy in" in said
    assert not (tmp_path / "new" / "checkpoints").exists()
    said = finish(tmp_path / "new", f"file://{tmp_path}/not-mounted/run", 60, code=2)
    assert "which is not there; make it, or mount its" in said


@pytest.mark.parametrize(
    "url", ["s3://key:secret@b/run", "s3://key:sec/ret@b", "s3://b/x?key=secret"]
)
def test_a_secret_in_the_url_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(ValueError, match="in the environment") as refused:
        check_url(url)
    assert "secret" not in str(refused.value)
    with pytest.raises(ValueError, match="must be a URL"):
        check_url("/other/disk")


@pytest.mark.slow
def test_the_template_continues_on_an_empty_machine_too(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    key = f"callbacks.checkpoint.remote=file://{tmp_path / 'disk'}"
    train(tmp_path, "whole")
    kill_at(tmp_path, "lost", 7, key, saved=True)
    shutil.rmtree(tmp_path / "runs" / "lost")
    said = train(tmp_path, "lost", key).stdout
    assert f"a second copy goes to file://{tmp_path / 'disk'}/lost" in said
    assert differences(tmp_path, "whole", "lost") == []


def test_a_run_whose_place_was_taken_stops_and_names_the_other(
    tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "disk").mkdir()
    url = f"file://{tmp_path / 'disk'}/run"
    first, out, err = start_slowly(tmp_path / "one", url, monkeypatch)
    wait_until(lambda: Remote(url).steps())
    finish(tmp_path / "two", url)
    first.join(120)
    said = out.read_text() + err.read_text()
    assert first.exitcode == 2, said
    assert "belongs to a newer start of this run: process" in said
    assert_same_bits(undisturbed, tmp_path / "two")
    assert sorted(fetched(Remote(url), tmp_path))[-1] == 200
