"""A sweep whose jobs are SLURM's, through hydra-submitit-launcher: ``hydra/launcher=slurm``.

    SIGUSR1, some time before the limit    the run saves and leaves with 75; then, and not before,
    it is queued again
    SIGTERM, to make room for others       the same
    SIGTERM, of scancel                    the run saves and leaves, and is not queued again

submitit would queue it again as the signal comes, before anything is saved, and would not listen to
SIGTERM. So its handler is taken, and called when the run has ended with 75.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf

from exact_resume.signals import EXIT_RESUMABLE
from sturdy.cli.search_path import is_place
from sturdy.cli.sweep import Child, Job, report, say

# Hydra makes no directory and no log of its own.
NOWHERE = [
    "hydra.sweep.dir=.",
    "hydra.sweep.subdir=.",
    "hydra.output_subdir=null",
    "hydra/job_logging=none",
]


def launch(config: Path, words: list[str], script: str, jobs: Sequence[Job]) -> int:
    """Give ``jobs`` to the launcher that ``words`` choose, and wait for all; returns the worst exit
    code.

    Raises:
        HydraException: if there is no such launcher, or ``words`` do not fit it.
    """
    os.environ["SUBMITIT_PREEMPT_SIGNAL"] = (
        "USR1"  # the run does not hear submitit's own choice, USR2
    )
    with initialize_config_dir(str(config.parent), job_name=config.stem, version_base="1.3"):
        cfg = compose(config.stem, [*words, *NOWHERE], return_hydra_config=True)
        context = HydraContext(
            config_loader=GlobalHydra.instance().config_loader(), callbacks=Callbacks()
        )
        task = partial(on_node, str(Path(script).resolve()))
        launcher = Plugins.instance().instantiate_launcher(context, task, cfg)
        folder = OmegaConf.select(cfg, "hydra.launcher.submitit_folder", default="its own place")
        say(
            f"{len(jobs)} jobs for {type(launcher).__name__}, output goes to {folder}; they go on "
            f"if this process ends"
        )
        try:
            returns = launcher.launch([job.words for job in jobs], 0)
        except RuntimeError as error:  # submitit's: not submitted, or died without an answer
            print(
                f"error: {error}\nThe jobs beside it go on; the same command takes up the rest",
                file=sys.stderr,
            )
            return 1
    outcomes: dict[str, int | None] = {}
    for job, done in zip(jobs, returns, strict=True):
        try:
            outcomes[job.name] = done.return_value
        except Exception as error:  # such as submitit's, that it was queued again too often
            print(f"error: {job.name}: {error}", file=sys.stderr)
            outcomes[job.name] = 1
    return report(outcomes, jobs)


def on_node(script: str, cfg: DictConfig) -> int:
    """Run one job where the launcher put it; returns its exit code, unless it was queued again."""
    queue_again = signal.getsignal(signal.SIGUSR1)
    overrides = HydraConfig.get().overrides
    words = [
        *dict.fromkeys(filter(is_place, overrides.hydra)),
        *overrides.task,
    ]  # the sweep's and the job's, the same
    code = Child().run([sys.executable, script, *words])
    if code in (EXIT_RESUMABLE, None) and callable(queue_again) and not ending():
        queue_again(signal.SIGUSR1, None)  # submitit counts, asks SLURM, and leaves the process
    return EXIT_RESUMABLE if code is None else code


def ending() -> bool:
    """Whether SLURM is about to end this job for good: scancel, too, sends SIGTERM first."""
    if not (job := os.environ.get("SLURM_JOB_ID")):
        return False
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        # the last element's job id is that of the whole array
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    ask = ["squeue", "--noheader", "--format=%T", f"--jobs={job}"]
    return subprocess.run(ask, capture_output=True, text=True).stdout.strip() not in ("RUNNING", "")
