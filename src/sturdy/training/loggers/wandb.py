"""Weights & Biases, in ``runs/<name>/wandb``: offline unless a key is configured, and it never asks
for one.

A run keeps its id in its directory, and beside it where that directory is: a copy gets an id of its
    own. Online, a
resumed run goes on where the server's history ends, and what a report says of a step before is in
the run's summary, the newest step's. Offline, each start writes a segment that begins with all rows
so far and replaces the segments of the starts before; ``wandb sync`` uploads it. A branch that was
left (``abandoned/``) stays a run of its own.
"""

import logging
import os
import secrets
import shutil
import sys
from collections.abc import Mapping
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from exact_resume.replay import ReplayLogger

log = logging.getLogger(__name__)

CLOUD = (
    "api.wandb.ai",
    "api.forge.coreweave.com",
)  # the service's own hosts, by its older and its newer name


class Wandb(ReplayLogger):
    """Rows, sample grids and the resolved config as a run of Weights & Biases, with our step as its
    step.

    Args:
        directory: ``runs/<name>``.
        project, entity, run_name: where and as what the run is shown; ``entity`` None is the key's
            own.
    """

    def __init__(
        self,
        *,
        directory: str | Path,
        project: str = "sturdy",
        entity: str | None = None,
        run_name: str | None = None,
    ) -> None:
        super().__init__()
        self.directory, self.project, self.entity, self.run_name = (
            Path(directory).resolve(),
            project,
            entity,
            run_name,
        )
        self.run: Any = None
        self.older: list[Path] = []

    def start(self) -> None:
        os.environ.setdefault(
            "WANDB_ERROR_REPORTING", "false"
        )  # no telemetry; read when wandb is imported
        os.environ.setdefault(
            "WANDB_FINISH_TIMEOUT", "60"
        )  # seconds; a preempted run must not wait for a network
        import wandb

        silent = wandb.Settings(silent=True, console="off", init_timeout=30)
        mode = wandb.setup(silent).settings.mode
        if mode == "online" and "WANDB_MODE" not in os.environ and not has_key():
            mode = "offline"
        run_id = self._run_id()
        self.older = [*self.directory.glob(f"wandb/offline-run-*-{run_id}*")]

        def init(mode: Any) -> Any:
            return wandb.init(
                project=self.project,
                entity=self.entity,
                name=self.run_name,
                dir=self.directory,
                id=run_id,
                mode=mode,
                resume=None
                if mode in ("offline", "dryrun")
                else "allow",  # a segment replaces what was uploaded
                config=self.config,
                allow_val_change=True,
                settings=silent,
            )

        try:
            self.run = init(mode)
        except wandb.Error as error:
            log.warning(f"wandb is not reached, so this start is recorded offline: {error}")
            wandb.teardown()  # its service still holds the id
            wandb.setup(silent)
            self.run = init("offline")
        self.first = self.run.starting_step  # the server has the steps before it, and keeps them
        if not (
            self.live or self.run.offline
        ):  # its history is training's to write, which may have more to say
            self.first, self.older = sys.maxsize, []
        self.segment = Path(self.run.dir).parent
        where = (
            f"offline; to upload, wandb sync {self.segment}" if self.run.offline else self.run.url
        )
        log.info(f"wandb: {where or mode}")

    def write(
        self, step: int, values: Mapping[str, float], pictures: Mapping[str, list[str]]
    ) -> None:
        import wandb

        if step < self.first:
            if figures := {
                key: value for key, value in values.items() if key.startswith("evaluation/")
            }:
                self.run.summary.update(figures)
            return
        images = {key: [wandb.Image(path) for path in paths] for key, paths in pictures.items()}
        self.run.log({**values, **images}, step=step, commit=True)
        if self.older:
            length = _length(self.segment)
            self._remove([old for old in self.older if _length(old) <= length])

    def close(self, finished: bool) -> None:
        if self.run:
            import wandb

            self.run.finish(exit_code=0 if finished else 1)
            # when its service has left, the segment is whole; at finish it may not be
            wandb.teardown()
            self.run = None
            self._remove(self.older)

    def _run_id(self) -> str:
        """Made once for the run, and once more for each branch it left: what was uploaded cannot be
        rewound.

        A copied run gets another one, so that it does not write into the run of its original.
        """
        branch = sum(1 for _ in self.directory.glob("abandoned/*"))
        file, home = self.directory / "wandb" / f"id-{branch}", self.directory / "wandb" / "home"
        origin = self._origin(home, file)
        if origin:
            log.info(f"wandb: {self.directory} is a copy of {origin}, so it gets an id of its own")
        if origin or not file.exists():
            _write(file, secrets.token_hex(4))
        _write(home, str(self.directory))
        return file.read_text()

    def _origin(self, home: Path, file: Path) -> Path | None:
        """The directory that this one is a copy of, if that is still there with the same id; a
        moved one has none.
        """
        try:
            origin = Path(home.read_text())
            same = (origin / "wandb" / file.name).read_text() == file.read_text()
            return origin if same and not origin.samefile(self.directory) else None
        except (OSError, ValueError):
            return None

    def _remove(self, segments: list[Path]) -> None:
        self.older = [old for old in self.older if old not in segments]
        for segment in segments:
            shutil.rmtree(segment, ignore_errors=True)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}")
    aside.write_text(text)
    os.replace(aside, path)


def has_key() -> bool:
    """Whether a key is configured, in the environment or in netrc for wandb's host."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    base = os.environ.get("WANDB_BASE_URL")
    hosts = (urlsplit(base).netloc,) if base else CLOUD
    try:
        known = netrc(Path(os.environ.get("NETRC", "~/.netrc")).expanduser()).hosts
    except (OSError, NetrcParseError):
        return False
    return any(host in known for host in hosts)


def _length(segment: Path) -> int:
    """Bytes of a segment's rows on disk; wandb holds back up to 32 KiB."""
    return sum(file.stat().st_size for file in segment.glob("run-*.wandb"))
