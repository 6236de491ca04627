"""The operating system: whether it is one that the project runs on, and how many CPUs it gives to
this process.
"""

import os


class UnsupportedSystemError(Exception):
    """The operating system lacks what a run needs."""


def check_system() -> None:
    """Raise UnsupportedSystemError where there are neither locks nor signals of POSIX."""
    try:
        import fcntl  # noqa: F401
    except ImportError:
        raise UnsupportedSystemError(
            "Sturdy Diffusion needs Linux or macOS; on Windows use WSL"
        ) from None


def available_cpus() -> int:
    """Count the CPUs that this process may use; where the system cannot tell (macOS), all of
    them.
    """
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
