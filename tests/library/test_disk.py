"""Disks that are full, broken, read-only, limited or slow: older checkpoints stay whole, and the
run says why.

The faults are real ones: a small file system of its own, a limit of the process, or errors that the
    kernel is made to
return to it by strace.
"""

import multiprocessing
import os
import re
import resource
import shutil
import subprocess
import tempfile
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from lightning.fabric.plugins import TorchCheckpointIO

from exact_resume.checkpoint.store import Store, load_state
from exact_resume.checkpoint.writer import SaveError, StoreCheckpointIO
from exact_resume.files import open_durable
from exact_resume.metrics import MetricsCSV
from runs import command, differences, train

FORK = multiprocessing.get_context("fork")
MB = 1 << 20


def save(writer, step):
    weights = torch.full((MB // 4,), float(step))  # a megabyte
    writer.save_checkpoint(
        {"global_step": step, "state_dict": {"w": weights}}, writer.store.state(step)
    )


def save_in_background(store, *steps, retry_delays=(), before_commit=lambda: None):
    with StoreCheckpointIO(store, lambda checkpoint: {}, retry_delays=retry_delays) as writer:
        writer.before_commit = before_commit
        for step in steps:
            save(writer, step)


def whole(store):
    """The steps of ``store``, each of which must verify and hold its own weights; nothing else may
    lie about.
    """
    for step in store.steps():
        store.verify(step)
        weights = load_state(store.state(step))["state_dict"]["w"]
        assert torch.equal(weights, torch.full((MB // 4,), float(step)))
    assert len([*store.directory.iterdir()]) == len(store.steps())
    return store.steps()


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "checkpoints")
    save(StoreCheckpointIO(store, lambda checkpoint: {}), 1)
    return store


@pytest.fixture
def disk(tmp_path):
    """A small file system of its own."""
    there = tmp_path / "disk"
    there.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", there], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"mounting is not permitted here: {mounted.stderr.strip()}")
    yield there
    subprocess.run(["umount", there], check=True)


def full(disk, leave=0):
    """A file that fills ``disk`` but for ``leave`` bytes."""
    filler = disk / "filler"
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize
    filler.write_bytes(bytes(free - leave))
    return filler


def test_a_full_disk(disk):
    store = Store(disk / "checkpoints")
    save_in_background(store, 1)
    filler = full(disk, leave=MB // 2)
    with pytest.raises(
        SaveError, match=r"No space left on device.*are whole; mend the cause and run"
    ):
        save_in_background(store, 2, 3, retry_delays=(0, 0))
    assert whole(store) == [1]
    filler.unlink()
    save_in_background(store, 2)
    assert whole(store) == [1, 2]


def test_a_full_disk_on_which_room_is_made(disk, caplog):
    store = Store(disk / "checkpoints")
    save_in_background(store, 1)
    filler = full(disk, leave=MB // 2)
    with StoreCheckpointIO(store, lambda checkpoint: {}, retry_delays=(0.05,) * 1000) as writer:
        save(writer, 2)
        while "trying again" not in caplog.text:
            time.sleep(0.001)
        filler.unlink()
    assert whole(store) == [1, 2]
    assert "saving step 2 failed: [Errno 28] No space left on device" in caplog.text


def test_a_read_only_file_system(disk):
    store = Store(disk / "checkpoints")
    save_in_background(store, 1)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    with pytest.raises(SaveError, match="Read-only file system"):
        save_in_background(store, 2, retry_delays=(3600,))
    assert whole(store) == [1]
    subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
    save_in_background(store, 2)
    assert whole(store) == [1, 2]


def test_a_full_directory_for_temporary_files_does_not_matter(disk, tmp_path, monkeypatch):
    full(disk)
    monkeypatch.setattr(tempfile, "tempdir", str(disk))
    monkeypatch.setenv("TMPDIR", str(disk))
    store = Store(tmp_path / "checkpoints")
    save_in_background(store, 1)
    assert whole(store) == [1]
    with pytest.raises(OSError, match="No space left"):  # control: Lightning's goes through it
        TorchCheckpointIO().save_checkpoint({"weights": torch.zeros(MB)}, tmp_path / "state.ckpt")


def test_a_device_that_is_always_full():
    with pytest.raises(OSError, match="No space left"), open_durable(Path("/dev/full")) as file:
        file.write(bytes(100))


def in_child(connection, limit, action):
    connection.recv()
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        connection.send((action(), None))
    except Exception as error:
        connection.send((None, f"{type(error).__name__}: {error}"))


@contextmanager
def traced(pid, options):
    """strace on the process ``pid``; gives a list that is filled with its lines when the process
    has ended.
    """
    with tempfile.NamedTemporaryFile("r") as log:
        words = [
            "strace",
            "-f",
            "-y",
            "-o",
            log.name,
            "-p",
            str(pid),
            *(option.format(pid=pid) for option in options),
        ]
        try:
            tracer = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
        except FileNotFoundError:
            pytest.skip("strace is not installed")
        with tracer:
            if "attached" not in (said := tracer.stderr.readline()):
                tracer.kill()
                pytest.skip(f"strace may not attach here: {said.strip()}")
            lines = []
            yield lines
            tracer.wait(60)
        lines += log.read().splitlines()


def child(action, *options, limit=0):
    """What ``action`` returns and raises in a child, under strace if there are ``options``; and
    strace's lines.
    """
    ours, its = FORK.Pipe()
    process = FORK.Process(target=in_child, args=(its, limit, action))
    process.start()
    its.close()
    try:
        with traced(process.pid, options) if options else nullcontext([]) as lines:
            ours.send("go")
            result, error = ours.recv()
            process.join()
    finally:
        process.kill()
    return result, error, lines


def test_a_limit_on_the_size_of_files(store):
    _, error, _ = child(lambda: save_in_background(store, 2, retry_delays=(3600,)), limit=MB // 2)
    assert "SaveError" in error
    assert "File too large" in error
    assert whole(store) == [1]


@pytest.mark.parametrize("when", range(1, 6))
def test_an_error_of_one_fsync_is_tried_again(when, store):
    """Of the run's directory, the state, the manifest, their directory, and, after the rename, that
    of all.
    """
    action = lambda: save_in_background(store, 2, retry_delays=(0,))  # noqa: E731
    _, error, lines = child(
        action, "-e", "trace=fsync", "-e", f"inject=fsync:error=EIO:when={when}"
    )
    assert error is None
    assert sum("INJECTED" in line for line in lines) == 1
    assert whole(store) == [1, 2]


@pytest.mark.parametrize(
    ("call", "number", "reason"),
    [
        ("fsync", "EIO", "Input/output error"),
        ("fsync", "EDQUOT", "Disk quota exceeded"),
        ("/^rename", "ENOSPC", "No space left on device"),
        ("/^mkdir", "ESTALE", "Stale file handle"),
        ("write", "EIO", "Input/output error"),
    ],
)
def test_an_error_that_stays_ends_the_run_with_its_name(call, number, reason, store):
    options = ["-e", f"trace={call}", "-e", f"inject={call}:error={number}:when=1+"]
    if call == "write":  # the child's answer is one, too
        options += ["-P", f"{store.directory}/.step-00000002.{{pid}}/state.ckpt"]
    _, error, lines = child(lambda: save_in_background(store, 2, 3, retry_delays=(0, 0)), *options)
    assert error.startswith("SaveError")
    assert reason in error
    assert sum("INJECTED" in line for line in lines) >= 3
    assert whole(store) == [1]


def test_a_slow_disk_does_not_hold_up_training_until_a_third_save(store):
    def action():
        with StoreCheckpointIO(store, lambda checkpoint: {}) as writer:
            seen = []
            for step in (2, 3, 4):
                save(writer, step)
                seen.append(store.steps())
            return seen

    seen, error, _ = child(
        action, "-e", "trace=fsync", "-e", "inject=fsync:delay_enter=3000000:when=2"
    )  # 3 s, once
    assert error is None
    assert seen[:2] == [[1], [1]]
    assert 2 in seen[2]
    assert whole(store) == [1, 2, 3, 4]


def test_the_order_of_operations(store):
    """The record, the state, the manifest, their directory, the rename, its directory; and all in
    one place.
    """
    home = store.directory.parent
    metrics = MetricsCSV(home / "metrics.csv")
    metrics.log_metrics({"train/loss": 1.0}, 2)
    action = lambda: save_in_background(store, 2, before_commit=metrics.sync)  # noqa: E731
    _, error, lines = child(action, "-e", "trace=fsync,/^rename,openat")
    assert error is None
    aside, final = rf"{store.directory}/\.step-00000002\.\d+", f"{store.directory}/step-00000002"
    expected = [
        rf"fsync\(\d+<{home}/metrics\.csv>",
        rf"fsync\(\d+<{aside}/state\.ckpt>",
        rf"fsync\(\d+<{aside}/manifest\.json>",
        rf"fsync\(\d+<{aside}>",
        rf'rename.*"{aside}",.*"{final}"',
        rf"fsync\(\d+<{store.directory}>",
    ]
    found = [
        line
        for line in lines
        if re.search(r"fsync\(|rename\w*\(", line) and f"<{home}>" not in line
    ]
    assert len(found) == len(expected)
    assert all(re.search(pattern, line) for pattern, line in zip(expected, found, strict=True)), (
        found
    )
    written = [line for line in lines if re.search("O_WRONLY|O_RDWR|O_CREAT", line)]
    assert written
    assert all(str(home) in line for line in written), written


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A directory with the undisturbed run ``whole``."""
    tmp = tmp_path_factory.mktemp("runs")
    train(tmp, "whole", "callbacks.checkpoint.keep_last=9")
    return tmp


@pytest.mark.slow
def test_a_run_that_cannot_save_stops_with_a_message_and_continues_to_the_same_bits(runs):
    """As ``whole`` was at step 6; from there on, files may be half as large as a checkpoint."""
    home = runs / "runs" / "limited"
    shutil.copytree(runs / "runs" / "whole", home)
    store = Store(home / "checkpoints")
    for step in store.steps():
        if step > 6:
            shutil.rmtree(store.path(step))
    before, limit = store.steps(), store.state(6).stat().st_size // 2
    stopped = subprocess.run(
        command(runs, "limited"),
        capture_output=True,
        text=True,
        timeout=300,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert stopped.returncode == 1, stopped.stdout + stopped.stderr
    assert "error: a checkpoint could not be written: [Errno 27] File too large" in stopped.stderr
    assert "Traceback" not in stopped.stdout + stopped.stderr
    assert store.steps() == before
    assert all(store.verify(step) for step in before)
    assert "resumed from step 6, to step 12 (bitwise" in train(runs, "limited").stdout
    assert differences(runs, "whole", "limited") == []


@pytest.mark.slow
def test_a_run_on_a_full_disk(disk, runs):
    """It tries for half a minute; then room is made, and it ends as if nothing had been."""
    size = Store(runs / "runs" / "whole" / "checkpoints").state(6).stat().st_size
    filler = full(disk, leave=int(2.5 * size))
    overrides = [f"paths.runs={disk / 'runs'}", f"paths.cache={runs / 'cache'}"]
    stopped = subprocess.run(
        command(disk, "full", *overrides), capture_output=True, text=True, timeout=300
    )
    assert stopped.returncode == 1, stopped.stdout + stopped.stderr
    assert "No space left on device" in stopped.stderr
    assert "trying again" in stopped.stdout
    store = Store(disk / "runs" / "full" / "checkpoints")
    assert len(store.steps()) == 2
    assert all(store.verify(step) for step in store.steps())
    filler.unlink()
    train(disk, "full", *overrides)
    shutil.copytree(disk / "runs" / "full", runs / "runs" / "full")
    assert differences(runs, "whole", "full") == []
