"""What each start of a run leaves behind: ``attempts/001/`` with config, overrides, environment and
log.
"""

import io
import json
import logging
import os
import platform
import re
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml

from exact_resume.fingerprint import Fingerprint

LOGGERS = [logging.getLogger(name) for name in ("exact_resume", "sturdy", "examples")]

# Said by libraries of things that are so on purpose here.
IGNORED_WARNINGS = (
    r".*does not have many workers.*",
    r".*`isinstance\(treespec, LeafSpec\)` is deprecated.*",
    r".*checkpoint directory .* exists and is not empty.*",
    r".*Checkpoint.*on_validation_end.*monitor.*",
    r".*resuming from a checkpoint that ended before the epoch ended.*",
    r".*The dirpath has changed from.*",
    r".*GPU available but not used.*",
    # a supervisor or torchrun, or one process
    r".*The `srun` command is available on your system but is not used.*",
    r".*sync_dist=True.*",  # the mean is over all processes already
    r"Found .* module.* in eval mode at the start of training.*",
    r"The `srun` command is available on your system but is not used.*",
)


def next_attempt(run: Path) -> Path:
    """Make the next ``attempts/NNN``."""
    numbers = [int(p.name) for p in (run / "attempts").glob("*") if p.name.isdigit()]
    directory = run / "attempts" / f"{max(numbers, default=0) + 1:03}"
    directory.mkdir(parents=True)
    return directory


def configure_logging(directory: Path, rank: int) -> None:
    """Send the log there, and to the console; other processes than rank 0 only there, if they have
    something to say.
    """
    file = logging.FileHandler(
        directory / (f"log-rank{rank}.txt" if rank else "log.txt"), delay=rank > 0
    )
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(
            errors="backslashreplace"
        )  # a terminal of ASCII would lose lines with other letters
    console = logging.StreamHandler(sys.stdout)
    console.setFormatter(logging.Formatter("%(message)s"))
    console.setLevel(logging.INFO)  # tracebacks of what is told in a line are for the file
    for logger in LOGGERS:
        logger.handlers = [file] if rank else [console, file]
        logger.setLevel(logging.DEBUG)
        logger.propagate = False
    logging.raiseExceptions = False  # a full disk costs lines of the log, not a traceback for each
    for library in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(library).setLevel(logging.WARNING)
        logging.getLogger(library).handlers = [file]
    profilers = logging.getLogger(
        "lightning.pytorch.profilers"
    )  # what they say at the end was asked for
    profilers.setLevel(logging.INFO)
    profilers.handlers = [] if rank else [console]
    for message in IGNORED_WARNINGS:
        warnings.filterwarnings("ignore", message)


def describe_attempt(
    directory: Path, config: Mapping[str, Any], overrides: list[str], now: Fingerprint
) -> None:
    """Write the resolved config, the overrides, the environment and what the fingerprint knows of
    data and code.
    """
    (directory / "config.yaml").write_text(
        yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
    )
    environment = {
        "start": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": sys.argv,
        "overrides": overrides,
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "git": _git(),
        "data": now.data,
        "code": now.code,
        "stack": now.stack,
        "hardware": _hardware(),
        "packages": dict(
            sorted(
                (m["Name"], m["Version"]) for m in (d.metadata for d in metadata.distributions())
            )
        ),
    }
    (directory / "environment.json").write_text(json.dumps(environment, indent=1) + "\n")


def _hardware() -> dict[str, Any]:
    """Processor, memory in GiB, and the GPUs by name."""
    cpuinfo = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return {
        "cpu": models[0] if models else platform.processor(),
        "cpus": os.cpu_count(),
        "memory": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def _git() -> dict[str, Any]:
    """Commit and dirty state of the code; empty outside a git checkout."""
    here = Path(__file__).parent

    def ask(*args: str) -> str:
        return subprocess.run(
            ["git", *args], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return {
            "commit": ask("rev-parse", "HEAD"),
            "dirty": ask("status", "--porcelain").splitlines(),
        }
    except (OSError, subprocess.CalledProcessError):
        return {}
