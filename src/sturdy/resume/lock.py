"""One live run on a directory: a lock that dies with its process, SIGKILL included.

A POSIX record lock belongs to the process and not to its children, so that a killed trainer's data workers, which
may outlive it by seconds, do not hold it.
"""

import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from sturdy.resume.durable import make_directory

PATIENCE = 120.0  # seconds


class AlreadyRunning(Exception):
    """Another live process trains in this run directory."""


def lock(directory: Path, *, brief: bool = False) -> Any:
    """Hold ``directory`` for this process until it ends or the returned file is closed.

    Args:
        brief: for less than ``PATIENCE`` seconds; who wants it meanwhile waits for that and is not refused.

    Raises:
        AlreadyRunning: with the holder's host, pid and start time.
    """
    make_directory(directory)
    file, end = (directory / ".lock").open("a+"), time.monotonic() + PATIENCE
    while not _taken(file):
        file.seek(0)
        text = file.read()
        if '"brief": true' not in text or time.monotonic() > end:
            file.close()
            raise AlreadyRunning(
                f"{directory} is in use by {_describe(text)}. Wait for it, stop it, or give this run another "
                f"name (name=...)"
            )
        time.sleep(0.05)
    holder: dict[str, Any] = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "start": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    holder |= {"brief": True} if brief else {}
    file.truncate(0)
    file.write(json.dumps(holder))
    file.flush()
    return file


def _taken(file: Any) -> bool:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # POSIX allows either
        return False
    return True


def _describe(text: str) -> str:
    try:
        holder = json.loads(text)
        return f"process {holder['pid']} on {holder['host']}, started {holder['start']}"
    except (ValueError, KeyError):
        return "another process"
