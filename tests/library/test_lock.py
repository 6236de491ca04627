"""Two real processes on one run directory: one of them trains."""

import multiprocessing
import os
import re
import signal
import socket
import threading
import time

import pytest

from exact_resume.run import AlreadyRunningError, LockLostError, Run

FORK = multiprocessing.get_context("fork")


def hold(directory, ready):
    held = Run(directory).lock()
    ready.send(os.getpid())
    time.sleep(60)
    held.close()


def hold_with_a_child(directory, ready):
    held = Run(directory).lock()
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    ready.send(child)
    time.sleep(60)
    held.close()


def start(target, directory):
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=target, args=(directory, theirs))
    process.start()
    return process, ours.recv()


def kill(process):
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def test_a_second_process_is_told_who_the_first_is_and_gets_in_when_it_is_killed(tmp_path):
    first, pid = start(hold, tmp_path / "run")
    try:
        for _ in range(2):  # to be refused must not take the lock away
            with pytest.raises(AlreadyRunningError) as error:
                Run(tmp_path / "run").lock()
        assert f"process {pid} on {socket.gethostname()}" in str(error.value)
        assert re.search(r"started \d{4}-\d\d-\d\d \d\d:\d\d:\d\d", str(error.value))
        assert "another directory" in str(error.value)
        Run(tmp_path / "another run").lock().close()
    finally:
        kill(first)
    Run(tmp_path / "run").lock().close()


def test_a_link_to_the_directory_is_the_directory(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "run")
    first, _ = start(hold, tmp_path / "run")
    try:
        with pytest.raises(AlreadyRunningError):
            Run(tmp_path / "link").lock()
    finally:
        kill(first)


def test_children_of_a_killed_process_do_not_hold_it(tmp_path):
    first, child = start(hold_with_a_child, tmp_path)
    try:
        with pytest.raises(AlreadyRunningError):
            Run(tmp_path).lock()
        kill(first)
        os.kill(child, 0)  # it is still alive
        Run(tmp_path).lock().close()
    finally:
        os.kill(child, signal.SIGKILL)


def hold_elsewhere(directory, ready):
    socket.gethostname = lambda: "elsewhere"
    hold(directory, ready)


def test_a_holder_on_another_machine_is_waited_for(tmp_path, capsys):
    """Over a network the lock of a machine that died is free only when the server has noticed
    that.
    """
    first, pid = start(hold_elsewhere, tmp_path)
    with pytest.raises(AlreadyRunningError, match=f"process {pid} on elsewhere"):
        Run(tmp_path).lock(timeout=0.2)
    threading.Timer(0.5, first.kill).start()
    Run(tmp_path).lock().close()
    first.join()
    assert capsys.readouterr().err.count(f"in use by process {pid} on elsewhere") == 2


def test_the_holder_is_durable_so_that_other_machines_see_it(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")))
    Run(tmp_path).lock().close()
    assert synced[-1] == str(tmp_path / ".lock")


def test_a_closed_lock_is_free(tmp_path):
    Run(tmp_path).lock().close()
    other, _ = start(hold, tmp_path)
    kill(other)


def lose_by_replacing(run):
    (run.home / ".lock").unlink()
    Run(run.home).lock().close()


def lose_to_another(run):
    """Write as another holder, as a file server lets it after it took the lock away."""
    (run.home / ".lock").write_text('{"host": "elsewhere", "pid": 7, "start": "2026-01-01"}')


def lose_the_descriptor(run):
    """Have every write into the file refused, as NFS does after it took the lock away."""
    reader = os.open(run.home / ".lock", os.O_RDONLY)
    os.dup2(reader, run._lock.fileno())


LOSSES = {
    lose_by_replacing: "its file was replaced",
    lose_to_another: "process 7 on elsewhere",
    lose_the_descriptor: "Bad file descriptor",
}


@pytest.mark.parametrize("lose", LOSSES, ids=lambda lose: lose.__name__)
def test_a_lock_that_is_lost_is_noticed(tmp_path, lose):
    run = Run(tmp_path)
    with run.lock():
        run.check_lock()
        run.check_lock()
        lose(run)
        with pytest.raises(LockLostError, match=LOSSES[lose]):
            run.check_lock()


def test_without_a_lock_there_is_nothing_to_lose(tmp_path):
    run = Run(tmp_path)
    run.check_lock()
    run.lock().close()
    run.check_lock()
