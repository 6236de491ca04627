"""Run the jobs of a sweep as jobs of SLURM, by hydra-submitit-launcher: ``hydra/launcher=slurm``.

    SIGUSR1, some time before the limit    the run saves and ends with 75; then, and not before, it
                                           is queued again
    SIGTERM, to make room for others       the same
    SIGTERM, of scancel                    the run saves and ends, and is not queued again

submitit itself would queue it again when the signal comes, before anything is saved, and ignores
SIGTERM. So its handler is taken, and called when the run has ended with 75.
"""

import os
import signal
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from omegaconf import DictConfig, OmegaConf

from exact_resume.again import cancelling_state
from exact_resume.signals import EXIT_RESUMABLE
from sturdy.cli.hydra_internals import make_launcher_context
from sturdy.cli.search_path import is_search_path
from sturdy.cli.sweep import Child, make_summary_folder, print_line, report
from sturdy.cli.sweep_plan import Job

# Hydra itself makes no directory and no log.
NO_HYDRA_FILES = [
    "hydra.sweep.dir=.",
    "hydra.sweep.subdir=.",
    "hydra.output_subdir=null",
    "hydra/job_logging=none",
]


def launch_jobs(config: Path, words: list[str], script: str, jobs: Sequence[Job]) -> int:
    """Hand ``jobs`` to a launcher and wait for all; return the worst exit code.

    Args:
        config: the YAML file of the script.
        words: the overrides that are not swept; they choose and set up the launcher.
        script: the path of the script.
        jobs: of the sweep.

    Raises:
        HydraException: if there is no such launcher, or ``words`` do not fit it.
    """
    os.environ["SUBMITIT_PREEMPT_SIGNAL"] = "USR1"  # submitit's own, USR2, asks a run for stacks
    make_summary_folder(jobs)
    with initialize_config_dir(str(config.parent), job_name=config.stem, version_base="1.3"):
        cfg = compose(config.stem, [*words, *NO_HYDRA_FILES], return_hydra_config=True)
        context = make_launcher_context(GlobalHydra.instance().config_loader())
        task = partial(run_on_node, str(Path(script).resolve()))
        launcher = Plugins.instance().instantiate_launcher(context, task, cfg)
        folder = OmegaConf.select(cfg, "hydra.launcher.submitit_folder", default="its own place")
        print_line(
            f"{len(jobs)} jobs for {type(launcher).__name__}, output goes to {folder}; they go on "
            f"if this process ends"
        )
        try:
            results = launcher.launch([job.words for job in jobs], 0)
        except RuntimeError as error:  # submitit's: not submitted, or died without an answer
            print(
                f"error: {error}\nThe other jobs go on; the same command takes up the rest",
                file=sys.stderr,
            )
            return 1
    outcomes: dict[str, int | None] = {}
    for job, result in zip(jobs, results, strict=True):
        try:
            outcomes[job.name] = result.return_value
        except Exception as error:  # such as submitit's, that it was queued again too often
            print(f"error: {job.name}: {error}", file=sys.stderr)
            outcomes[job.name] = 1
    return report(outcomes, jobs)


def run_on_node(script: str, cfg: DictConfig) -> int:
    """Run one job where the launcher put it; return its exit code, unless it is queued again."""
    queue_again = signal.getsignal(signal.SIGUSR1)
    overrides = HydraConfig.get().overrides
    search_path = dict.fromkeys(filter(is_search_path, overrides.hydra))
    code = Child().run([sys.executable, script, *search_path, *overrides.task])
    if code in (EXIT_RESUMABLE, None) and callable(queue_again) and not cancelling_state():
        queue_again(signal.SIGUSR1, None)  # submitit counts, asks SLURM, and ends the process
    return EXIT_RESUMABLE if code is None else code
