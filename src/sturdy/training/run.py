"""Train: the task of ``train.py``.

Nothing heavy is imported before it is clear that this process trains. With several processes or
restarts, this process becomes their supervisor, and each of them comes through here again.
"""

import os
import sys
from pathlib import Path

from omegaconf import DictConfig

from exact_resume.supervisor import is_launched, supervise
from sturdy.errors import EXIT_USAGE, ConfigError
from sturdy.training.settings import check_settings, local_world_size


def train(cfg: DictConfig, overrides: list[str]) -> int:
    """Start, continue or recognise as finished the run that ``cfg`` describes.

    Returns:
        The exit code: 0 finished, 1 failed, 2 cannot be run like this, 75 stopped by a signal and
        saved (the same command continues), 130 stopped at once.
    """
    try:
        check_settings(cfg)
        processes = local_world_size(cfg)
    except ConfigError as error:
        if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
            print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    if not is_launched() and (processes > 1 or cfg.restarts):
        return supervise_run(cfg, overrides, processes)

    from sturdy.training.outcome import report_errors  # torch and Lightning take seconds
    from sturdy.training.session import Session

    with report_errors(cfg) as outcome, Session(cfg, overrides) as session:
        while session.prepare():
            with session.roll_back_on_nan():
                session.trainer.fit(
                    session.module,
                    datamodule=session.data,
                    ckpt_path=session.resume_path,
                    weights_only=True,
                )
    return outcome.exit_code


def supervise_run(cfg: DictConfig, overrides: list[str], processes: int) -> int:
    """Run the command in several processes, and again after one of them dies."""
    from exact_resume.run import Run

    run = Run(Path(cfg.paths.runs) / cfg.name)
    return supervise(
        relaunch_command(overrides),
        processes=processes,
        restarts=cfg.restarts,
        progress=run.newest_step,
    )


def relaunch_command(overrides: list[str]) -> list[str]:
    """Return this process's command, with its interpreter's options, and with ``overrides``."""
    words = sys.orig_argv
    script = sys.argv[0]
    options = words[1 : words.index(script)] if script in words else []
    return [sys.executable, *options, script, *overrides]
