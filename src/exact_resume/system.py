"""The operating system: whether it can run the project, and the CPUs that it gives to a process."""

import os


class UnsupportedSystemError(Exception):
    """The operating system lacks what a run needs."""


def check_system() -> None:
    """Check that the system has the locks and signals of POSIX.

    Raises:
        UnsupportedSystemError: if it has not.
    """
    try:
        import fcntl  # noqa: F401
    except ImportError:
        raise UnsupportedSystemError(
            "this project needs Linux or macOS; on Windows use WSL"
        ) from None


def available_cpus() -> int:
    """Return the number of CPUs that this process may use; all of them on macOS."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
