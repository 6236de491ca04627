"""What each start of a run leaves in ``attempts/001/``: config, environment, banner and log."""

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
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml

from exact_resume.files import atomic_write
from exact_resume.fingerprint import Fingerprint
from exact_resume.resume import Guarantee

CONFIG = "config.yaml"
ENVIRONMENT = "environment.json"
START = "start.json"

# Warnings of libraries about settings that were chosen deliberately.
IGNORED_WARNINGS = (
    r".*does not have many workers.*",
    r".*`isinstance\(treespec, LeafSpec\)` is deprecated.*",
    r".*checkpoint directory .* exists and is not empty.*",
    r".*Checkpoint.*on_validation_end.*monitor.*",
    r".*resuming from a checkpoint that ended before the epoch ended.*",
    r".*The dirpath has changed from.*",
    r".*GPU available but not used.*",
    r".*`srun` command is available on your system but is not used.*",
    r".*sync_dist=True.*",
    r"Found .* module.* in eval mode at the start of training.*",
)


def configure_logging(
    directory: Path, rank: int, packages: Sequence[str] = ("exact_resume",)
) -> None:
    """Send the log of ``packages`` to the attempt's directory, and that of rank 0 to the console.

    Other ranks than 0 make a file only if they have something to say.
    """
    name = f"log-rank{rank}.txt" if rank else "log.txt"
    file = logging.FileHandler(directory / name, delay=rank > 0)
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    console = _console_handler()
    for package in packages:
        logger = logging.getLogger(package)
        logger.handlers = [file] if rank else [console, file]
        logger.setLevel(logging.DEBUG)
        logger.propagate = False
    logging.raiseExceptions = False  # a full disk costs lines of the log, not a traceback for each
    for library in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(library).setLevel(logging.WARNING)
        logging.getLogger(library).handlers = [file]
    profilers = logging.getLogger("lightning.pytorch.profilers")  # the user asked for their report
    profilers.setLevel(logging.INFO)
    profilers.handlers = [] if rank else [console]
    for message in IGNORED_WARNINGS:
        warnings.filterwarnings("ignore", message)


def describe_attempt(
    directory: Path, config: Mapping[str, Any], overrides: list[str], now: Fingerprint
) -> None:
    """Write the resolved config, and the overrides, environment, data digest and code hashes."""
    text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
    (directory / CONFIG).write_text(text)
    distributions = [distribution.metadata for distribution in metadata.distributions()]
    versions = sorted((entry["Name"], entry["Version"]) for entry in distributions)
    environment = {
        "start": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": sys.argv,
        "overrides": overrides,
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "git": _git_state(),
        "data": now.data,
        "code": now.code,
        "stack": now.stack,
        "hardware": _hardware(),
        "packages": dict(versions),
    }
    (directory / ENVIRONMENT).write_text(json.dumps(environment, indent=1) + "\n")


def record_start(
    directory: Path,
    banner: str,
    *,
    step: int,
    max_steps: int,
    guarantee: Guarantee | None,
    data: Sequence[str] = (),
) -> None:
    """Write what a start has said, for people who look at the run later.

    Args:
        directory: of the attempt.
        banner: as it was printed.
        step: at which the run was entered; 0 for a fresh start.
        max_steps: at which it is finished.
        guarantee: of the resume; None for a fresh start.
        data: lines about the data, such as what was left out.
    """
    start = {
        "banner": banner,
        "step": step,
        "max_steps": max_steps,
        "guarantee": guarantee.level if guarantee else "fresh",
        "reasons": guarantee.reasons if guarantee else [],
        "data": list(data),
        "time": time.time(),
    }
    with atomic_write(directory / START) as file:
        file.write(json.dumps(start, indent=1).encode() + b"\n")


def _console_handler() -> logging.Handler:
    if isinstance(sys.stdout, io.TextIOWrapper):
        # An ASCII terminal would lose lines with other letters.
        sys.stdout.reconfigure(errors="backslashreplace")
    console = logging.StreamHandler(sys.stdout)
    console.setFormatter(logging.Formatter("%(message)s"))
    console.setLevel(logging.INFO)  # tracebacks go to the file only
    return console


def _hardware() -> dict[str, Any]:
    """Return processor, memory in GiB, and the names of the GPUs."""
    cpuinfo = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": models[0] if models else platform.processor(),
        "cpus": os.cpu_count(),
        "memory": round(memory / 2**30, 1),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def _git_state() -> dict[str, Any]:
    """Return the commit of the code and its changed files; empty outside a git checkout."""
    try:
        commit = _git("rev-parse", "HEAD")
        return {"commit": commit, "dirty": _git("status", "--porcelain").splitlines()}
    except (OSError, subprocess.CalledProcessError):
        return {}


def _git(*args: str) -> str:
    here = Path(__file__).parent
    done = subprocess.run(["git", *args], cwd=here, capture_output=True, text=True, check=True)
    return done.stdout.strip()
