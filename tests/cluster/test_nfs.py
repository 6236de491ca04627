"""Two machines and one run's directory on NFS 4.2: at most one of them saves into it.

The server's lease is 10 s where nothing else is said, and not the 90 s of Linux: what waits for its
end is then over sooner, and all else is the same.
"""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hosts import Cluster, why_impossible
from nfs import NFS, Job, Machine, why_no_nfs

from runs import command, differences, train

pytestmark = pytest.mark.cluster
HERE = Path(__file__).parent
LEASE = 10  # seconds
LATER = 1000  # the first step of the second machine: steps tell who saved them, too


@pytest.fixture(scope="module")
def nfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NFS]:
    """A server h1, and the clients h2 and h3."""
    folder = tmp_path_factory.mktemp("nfs")
    if reason := why_impossible(folder) or why_no_nfs():
        pytest.skip(reason)
    with Cluster(folder) as cluster:
        yield NFS(cluster, folder, LEASE)


def save(
    machine: Machine,
    home: Path,
    first: int = 1,
    *,
    check: bool = True,
    seconds: float = 0.0,
    timeout: float = 120.0,
) -> Job:
    """Start nfs_save.py on ``machine``."""
    words = [str(home), str(first), str(int(check)), str(seconds), str(timeout)]
    return machine.start(HERE / "nfs_save.py", *words)


def saved(nfs: NFS, home: Path) -> dict[str, list[int]]:
    """Return the steps on the server's disk by the machine that saved them."""
    job = nfs.server.start(HERE / "nfs_list.py", str(home))
    assert job.wait() == 0, job.describe()
    steps: dict[str, list[int]] = json.loads(job.output())
    return steps


def test_a_holder_on_another_machine_is_named_and_waited_for(nfs: NFS) -> None:
    home = nfs.share / "named"
    holder = save(nfs["h2"], home)
    holder.wait_for("saved 1\n")
    pid = holder.output().split()[2]
    refused = save(nfs["h3"], home, LATER, timeout=5)
    assert refused.wait() == 1
    assert f"AlreadyRunningError: {home} is in use by process {pid} on h2" in refused.output()
    waiting = save(nfs["h3"], home, LATER)
    waiting.wait_for("waiting up to 120 s")
    holder.kill()
    waiting.wait_for(f"saved {LATER}\n", LEASE)  # the lock of a killed process is free at once
    waiting.kill()


def cut_off(nfs: NFS, home: Path, when: str, **first: bool | float) -> tuple[Job, list[int]]:
    """Cut the holder off, give its run to another machine, and let the holder come back.

    Args:
        home: of the run.
        when: what the holder has said when it is cut off.
        first: what is special about the holder, for ``save``.

    Returns:
        the holder, and the steps that it saved after another machine had its lock.
    """
    h2, h3 = nfs["h2"], nfs["h3"]
    holder = save(h2, home, **first)
    holder.wait_for(when)
    h2.unplug()
    begun = time.monotonic()
    try:
        second = save(h3, home, LATER)
        second.wait_for(f"saved {LATER}\n", LEASE + 60)
        print(f"the other machine saved {time.monotonic() - begun:.0f} s after the cut")
        before = saved(nfs, home)["h2"]
    finally:
        h2.plug()
    second.wait_for(f"saved {LATER + 10}\n")
    assert second.code() is None  # it goes on
    after = saved(nfs, home)["h2"]
    second.kill()
    holder.kill()
    return holder, [step for step in after if step not in before]


def test_who_was_cut_off_is_stopped_at_its_next_save(nfs: NFS) -> None:
    holder, late = cut_off(nfs, nfs.share / "stopped", "saved 2\n")
    assert holder.wait() == 1
    assert "LockLostError: the lock of" in holder.output()
    assert late == []


def test_who_does_not_look_at_its_lock_goes_on(nfs: NFS) -> None:
    """The control."""
    holder, late = cut_off(nfs, nfs.share / "unchecked", "saved 2\n", check=False)
    assert holder.wait() == -9
    assert len(late) > 1


def test_a_save_that_was_in_work_at_the_cut_is_not_completed(nfs: NFS) -> None:
    """The store looks at the lock just before a checkpoint appears."""
    holder, late = cut_off(nfs, nfs.share / "in-work", "saving 2\n", seconds=3)
    assert holder.wait() == 1
    assert "LockLostError: the lock of" in holder.output()
    assert late == []


def test_a_crash_of_the_server_is_waited_for(nfs: NFS, tmp_path: Path) -> None:
    """The bits are those of a run on a local disk."""
    words = ["trainer.max_steps=50", "trainer.val_check_interval=25", "trainer.log_every_n_steps=1"]
    words += ["callbacks.checkpoint.every_n_train_steps=5"]
    _, script, *line = command(nfs.share, "crash", *words)
    run = nfs["h2"].start(Path(script), *line)
    home = nfs.share / "runs" / "crash"
    saved = nfs.server.start(HERE / "nfs_wait.py", str(home), "10")
    assert saved.wait() == 0, run.describe()
    nfs.server.power_off()
    time.sleep(20)
    assert run.code() is None
    nfs.server.boot()
    assert run.wait() == 0, run.describe()
    copy = nfs.server.start(HERE / "nfs_copy.py", str(home), str(tmp_path / "runs" / "crash"))
    assert copy.wait() == 0, copy.describe()
    train(tmp_path, "one", *words)
    assert differences(tmp_path, "one", "crash") == []
    assert len(list((tmp_path / "runs/crash/attempts").iterdir())) == 1


def test_the_lock_of_a_lost_machine_is_free_within_two_minutes(tmp_path: Path) -> None:
    """With the lease of 90 s that Linux has."""
    if reason := why_impossible(tmp_path) or why_no_nfs():
        pytest.skip(reason)
    with Cluster(tmp_path) as cluster:
        nfs = NFS(cluster, tmp_path)
        home = nfs.share / "lost"
        save(nfs["h2"], home).wait_for("saved 2\n")
        nfs["h2"].power_off()
        begun = time.monotonic()
        second = save(nfs["h3"], home, LATER)
        second.wait_for("locked by")
        print(f"locked {time.monotonic() - begun:.0f} s after the loss")
        assert "is in use by process" in second.output()
        second.wait_for(f"saved {LATER}\n")
