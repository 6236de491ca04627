"""Two real processes on one run directory: one of them trains."""

import multiprocessing
import os
import re
import signal
import socket
import threading
import time

import pytest

from exact_resume.run import AlreadyRunningError, Run

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
