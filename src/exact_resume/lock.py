"""One live run on a directory: a lock that dies with its process, SIGKILL included."""

import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

from exact_resume.files import LockUnsupportedError, fsync, lock_file, make_directory

LOCK_TIMEOUT = 120.0  # seconds


class AlreadyRunningError(Exception):
    """Another live process trains in this run directory."""


def lock_run(directory: Path, *, brief: bool = False, patience: float = LOCK_TIMEOUT) -> Any:
    """Hold ``directory`` for this process until it ends or the returned file is closed.

    A holder on another machine is waited for: over a network, the lock of a machine that died is
        free only when the
    server has noticed that.

    Args:
        brief: for less than ``patience``; who wants it meanwhile waits, too, and is not refused.
        patience: seconds to wait at most.

    Raises:
        AlreadyRunningError: with the holder's host, pid and start time.
        OSError: if the directory cannot be made, written or locked; the message names
            ``paths.runs``.
    """
    try:
        make_directory(directory)
        file = (directory / ".lock").open("a+")
        _wait(file, directory, patience)
    except LockUnsupportedError as error:
        raise LockUnsupportedError(f"paths.runs: {error}") from None
    except PermissionError as error:
        raise PermissionError(
            f"paths.runs: {error.filename} cannot be written, permission denied"
        ) from None
    holder: dict[str, Any] = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "start": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    holder |= {"brief": True} if brief else {}
    file.truncate(0)
    file.write(json.dumps(holder))
    file.flush()
    fsync(file.fileno())  # else another machine would not see it
    return file


def _wait(file: Any, directory: Path, patience: float) -> None:
    """Return when ``file`` is locked; raise AlreadyRunningError, with the file closed, if it is not
    to be waited for.
    """
    end, told = time.monotonic() + patience, False
    while not lock_file(file):
        file.seek(0)
        holder = _read(file.read())
        elsewhere = holder.get("host", socket.gethostname()) != socket.gethostname()
        if not (holder.get("brief") or elsewhere) or time.monotonic() > end:
            file.close()
            raise AlreadyRunningError(
                f"{directory} is in use by {_describe(holder)}. Wait for it, stop it, or give this "
                f"run another "
                f"name (name=...)"
            )
        if elsewhere and not told:
            told = True
            line = f"{directory} is in use by {_describe(holder)}; waiting up to {patience:.0f} s, should it have died"
            print(line, file=sys.stderr, flush=True)
        time.sleep(0.05)


def _read(text: str) -> dict[str, Any]:
    """Parse what a holder wrote; empty if it was not written whole."""
    try:
        holder = json.loads(text)
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _describe(holder: dict[str, Any]) -> str:
    if not {"pid", "host", "start"} <= holder.keys():
        return "another process"
    return f"process {holder['pid']} on {holder['host']}, started {holder['start']}"
