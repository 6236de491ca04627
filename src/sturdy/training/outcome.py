"""How a start of a run ends: its exit code, and a line for what the user can mend."""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from exact_resume import distributed
from exact_resume.checkpoint.remote import RemoteDeniedError, RemoteUnavailableError
from exact_resume.checkpoint.schema import SchemaError
from exact_resume.checkpoint.store import (
    CheckpointLoadError,
    CorruptCheckpointError,
    NoValidCheckpointError,
)
from exact_resume.checkpoint.writer import SaveError
from exact_resume.failures import is_out_of_memory
from exact_resume.resume import DATA_CHANGED, ResumeRefusedError
from exact_resume.run import AlreadyRunningError, Run
from exact_resume.signals import EXIT_RESUMABLE, PreemptedError
from sturdy.errors import EXIT_USAGE, ConfigError
from sturdy.training.memory import describe_out_of_memory

STOPPED = ".stopped"  # in the run's directory: the newest step when the last signal came
HINT = "A run's directory is paths.runs/name: name=... gives a run another one."
DATA_HINT = "as_begun=true goes on with the images that it began with, where they are in the cache."

log = logging.getLogger(__name__)


@dataclass
class Outcome:
    """How a start ended.

    Attributes:
        exit_code: as of ``sturdy.training.run.train``.
    """

    exit_code: int = 0


@contextmanager
def report_errors(cfg: DictConfig) -> Iterator[Outcome]:
    """Say in one line what the user can mend, instead of a traceback; the outcome has the code."""
    outcome = Outcome()
    try:
        yield outcome
    except (ResumeRefusedError, AlreadyRunningError, NoValidCheckpointError) as error:
        print(f"error: {error}\n{HINT}", file=sys.stderr)
        if DATA_CHANGED in str(error):
            print(f"{DATA_HINT}\n{look_at_new_images(cfg)}", file=sys.stderr)
        outcome.exit_code = EXIT_USAGE
    except (CheckpointLoadError, ConfigError) as error:
        print(f"error: {error}", file=sys.stderr)
        outcome.exit_code = EXIT_USAGE
    except RemoteUnavailableError as error:
        print(f"error: {error}. Run the same command again", file=sys.stderr)
        is_denied = isinstance(error, RemoteDeniedError)
        outcome.exit_code = EXIT_USAGE if is_denied else EXIT_RESUMABLE
    except distributed.PeerLostError as error:
        log.warning(f"process {distributed.rank()}: {error}")
        outcome.exit_code = 1
    except PreemptedError as stop:
        if distributed.rank() == 0:
            _report_preemption(cfg, stop)
        outcome.exit_code = EXIT_RESUMABLE
    except Exception as error:
        outcome.exit_code = 1
        log.debug("where it failed", exc_info=True)
        if is_out_of_memory(error):
            print(f"error: {describe_out_of_memory(error, cfg)}", file=sys.stderr)
        elif not isinstance(
            error, FloatingPointError | SaveError | SchemaError | CorruptCheckpointError | OSError
        ):
            raise
        elif distributed.rank() == 0 or not isinstance(error, FloatingPointError):
            print(f"error: {error}", file=sys.stderr)  # all ranks find the same divergence
    finally:
        distributed.destroy_process_group(outcome.exit_code)


def look_at_new_images(cfg: DictConfig) -> str:
    """Say which command compares new images with those that the run had."""
    return f"Are the new images like the others? python evaluate.py run={cfg.name} drift=true"


def stopped_here_before(run: Run) -> bool:
    """Return whether the last signal came at the same newest step; remember this one."""
    mark = run.home / STOPPED
    with suppress(OSError):
        newest = str(max(run.newest_step(), 0))
        before = mark.read_text() if mark.exists() else None
        if run.home.is_dir():
            mark.write_text(newest)
        return before == newest
    return False


def _report_preemption(cfg: DictConfig, stop: PreemptedError) -> None:
    say: Callable[[str], None] = log.info if log.hasHandlers() else print
    way = "Use ckpt_path=auto" if cfg.ckpt_path is None else "Run the same command"
    say(f"{stop}. {way} to continue.")
    if stopped_here_before(Run(Path(cfg.paths.runs) / cfg.name)):
        say(
            "The start before this one was stopped at the same step: "
            "they need more time than they are given."
        )
