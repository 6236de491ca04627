"""Weights & Biases, in ``runs/<name>/wandb``: offline unless a key is configured.

It never asks for a key. A run keeps its wandb id in its directory, and beside the id the path of
that directory, so that a copied run gets an id of its own.

Online, a resumed run continues where the server's history ends. Reports about older steps go into
the summary of the wandb run. Offline, each start writes a segment that begins with all rows so far
and replaces the segments of earlier starts; ``wandb sync`` uploads it. An archived branch of the
run (``abandoned/``) stays a wandb run of its own.
"""

import logging
import os
import secrets
import shutil
from collections.abc import Mapping
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from typing_extensions import override

from exact_resume.files import atomic_write
from exact_resume.replay import ReplayLogger

log = logging.getLogger(__name__)

# The service's own hosts, by its older and its newer name.
CLOUD_HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")


class Wandb(ReplayLogger):
    """Rows, sample grids and the resolved config, with our step as wandb's step.

    Args:
        directory: ``runs/<name>``.
        project: of wandb.
        entity: of wandb; None for the default of the key.
        run_name: the name that wandb shows.
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
        self.directory = Path(directory).resolve()
        self.project = project
        self.entity = entity
        self.run_name = run_name
        self.run: Any = None
        self.older: list[Path] = []  # segments of earlier starts

    @override
    def start(self) -> None:
        # No telemetry; wandb reads this when it is imported.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        # Seconds: a preempted run must not wait for a network.
        os.environ.setdefault("WANDB_FINISH_TIMEOUT", "60")
        import wandb

        settings = wandb.Settings(silent=True, console="off", init_timeout=30)
        mode = wandb.setup(settings).settings.mode
        if mode == "online" and "WANDB_MODE" not in os.environ and not has_key():
            mode = "offline"
        run_id = self._run_id()
        self.older = [*self.directory.glob(f"wandb/offline-run-*-{run_id}*")]
        try:
            self.run = self._init(run_id, mode, settings)
        except wandb.Error as error:
            log.warning(f"wandb is not reached, so this start is recorded offline: {error}")
            wandb.teardown()  # its service still holds the id
            wandb.setup(settings)
            self.run = self._init(run_id, "offline", settings)
        self.first_step = self.run.starting_step  # the server already has earlier steps
        self.segment = Path(self.run.dir).parent
        if self.run.offline:
            log.info(f"wandb: offline; to upload, wandb sync {self.segment}")
        else:
            log.info(f"wandb: {self.run.url or mode}")

    @override
    def write(
        self, step: int, values: Mapping[str, float], images: Mapping[str, list[str]]
    ) -> None:
        import wandb

        if step < self.first_step:
            reported = {k: v for k, v in values.items() if k.startswith("evaluation/")}
            if reported:
                self.run.summary.update(reported)
            return
        shown = {name: [wandb.Image(path) for path in paths] for name, paths in images.items()}
        self.run.log({**values, **shown}, step=step, commit=True)
        if self.older:
            length = _length(self.segment)
            self._remove([old for old in self.older if _length(old) <= length])

    @override
    def close(self, finished: bool) -> None:
        if self.run:
            import wandb

            self.run.finish(exit_code=0 if finished else 1)
            # The segment is complete only when wandb's service has ended.
            wandb.teardown()
            self.run = None
            self._remove(self.older)

    def _init(self, run_id: str, mode: Any, settings: Any) -> Any:
        import wandb

        # Offline, a segment replaces the rows that were uploaded.
        resume = None if mode in ("offline", "dryrun") else "allow"
        return wandb.init(
            project=self.project,
            entity=self.entity,
            name=self.run_name,
            dir=self.directory,
            id=run_id,
            mode=mode,
            resume=resume,  # type: ignore[arg-type]
            config=self.config,
            allow_val_change=True,
            settings=settings,
        )

    def _run_id(self) -> str:
        """Return the id of the run's current branch; make one if it has none.

        Uploaded rows cannot be taken back, so each archived branch leads to a new id. A copied run
        gets a new one, too, so that it does not write into the wandb run of its original.
        """
        branch = sum(1 for _ in self.directory.glob("abandoned/*"))
        folder = self.directory / "wandb"
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"id-{branch}"
        home = folder / "home"
        original = self._original(home, file)
        if original:
            log.info(
                f"wandb: {self.directory} is a copy of {original}, so it gets an id of its own"
            )
        if original or not file.exists():
            _write(file, secrets.token_hex(4))
        _write(home, str(self.directory))
        return file.read_text()

    def _original(self, home: Path, file: Path) -> Path | None:
        """Return the directory that this one was copied from; None if it was moved.

        The original is still in its place, with the same id.
        """
        try:
            original = Path(home.read_text())
            same_id = (original / "wandb" / file.name).read_text() == file.read_text()
            return original if same_id and not original.samefile(self.directory) else None
        except (OSError, ValueError):
            return None

    def _remove(self, segments: list[Path]) -> None:
        self.older = [old for old in self.older if old not in segments]
        for segment in segments:
            shutil.rmtree(segment, ignore_errors=True)


def has_key() -> bool:
    """Return whether a key is configured, in the environment or in netrc for wandb's host."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    base = os.environ.get("WANDB_BASE_URL")
    hosts = (urlsplit(base).netloc,) if base else CLOUD_HOSTS
    try:
        known = netrc(Path(os.environ.get("NETRC", "~/.netrc")).expanduser()).hosts
    except (OSError, NetrcParseError):
        return False
    return any(host in known for host in hosts)


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as file:
        file.write(text.encode())


def _length(segment: Path) -> int:
    """Return the bytes of a segment's rows on disk; wandb holds back up to 32 KiB."""
    return sum(file.stat().st_size for file in segment.glob("run-*.wandb"))
