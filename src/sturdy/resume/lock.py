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


class AlreadyRunning(Exception):
    """Another live process trains in this run directory."""


def lock(directory: Path) -> Any:
    """Hold ``directory`` for this process until it ends or the returned file is closed.

    Raises:
        AlreadyRunning: with the holder's host, pid and start time.
    """
    make_directory(directory)
    file = (directory / ".lock").open("a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # POSIX allows either
        file.seek(0)
        raise AlreadyRunning(
            f"{directory} is in use by {_describe(file.read())}. Wait for it, stop it, or give this run another "
            f"name (name=...)"
        ) from None
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "start": time.strftime("%Y-%m-%d %H:%M:%S")}
    file.truncate(0)
    file.write(json.dumps(holder))
    file.flush()
    return file


def _describe(text: str) -> str:
    try:
        holder = json.loads(text)
        return f"process {holder['pid']} on {holder['host']}, started {holder['start']}"
    except (ValueError, KeyError):
        return "another process"
