"""Run a script from its command line; mistakes are answered before anything heavy is imported."""

import faulthandler
import importlib
import signal
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from exact_resume.system import UnsupportedSystemError, check_system
from sturdy.cli.hydra_internals import make_flag_parser
from sturdy.cli.overrides import (
    LAUNCHER,
    compose_checked,
    hydra_as_usage_error,
    parse_overrides,
    resolve_words,
)
from sturdy.cli.search_path import add_config_folders, is_search_path
from sturdy.cli.usage import UsageError, rename_old_keys

# Flags of Hydra that take the config from elsewhere.
REFUSED_FLAGS = ("config_path", "config_name", "config_dir", "package", "experimental_rerun")
EXIT_USAGE = 2  # as of argparse


def run_script(config: Path, task: str) -> None:
    """Compose the config and run ``task`` with it; the process ends with the exit code of the task.

    With ``-m``, each combination of the values given is run.

    Args:
        config: YAML file of the script; its folder holds the config groups.
        task: ``package.module:function``, imported after the command was checked. It is called with
            the config and the list of overrides, and returns the exit code.
    """
    with exit_on_usage_error():
        check_system()
        prepare_process()
        sys.argv[1:] = prepare_words(config, sys.argv[1:])
        args = parse_flags(config)
        if args.asks:
            sys.argv[1:] = words_for_hydra(config, args)
        elif args.multirun:
            sys.exit(run_sweep(config, args.overrides))
        else:
            cfg = compose_checked(config, args.overrides)
    if args.asks:
        folder = str(config.parent)
        answer = hydra.main(version_base="1.3", config_path=folder, config_name=config.stem)
        return answer(lambda cfg: None)()
    words = list(HydraConfig.get().overrides.task)
    print_implied_options(args.overrides, words)
    module, function = task.split(":")
    words = [*filter(is_search_path, args.overrides), *words]
    sys.exit(getattr(importlib.import_module(module), function)(cfg, words))


@contextmanager
def exit_on_usage_error() -> Iterator[None]:
    """End the process with a line and exit code 2 when the command cannot be run."""
    try:
        yield
    except (UsageError, UnsupportedSystemError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_USAGE)


def prepare_process() -> None:
    """Survive the end of a pipe's reader, and prepare for signals before a run exists."""
    from exact_resume.streams import make_streams_lossy
    from exact_resume.workers import DUMP_STACKS_SIGNAL  # which some systems lack

    make_streams_lossy()
    if signal.getsignal(DUMP_STACKS_SIGNAL) is signal.SIG_DFL:
        faulthandler.register(DUMP_STACKS_SIGNAL, 2)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C: no traceback of imports


def prepare_words(config: Path, words: list[str]) -> list[str]:
    """Return ``words`` with today's keys and absolute config folders, which Hydra then knows.

    Raises:
        UsageError: if a folder is not there.
    """
    with hydra_as_usage_error():
        return add_config_folders(rename_old_keys(words), config)


def parse_flags(config: Path) -> Namespace:
    """Parse ``sys.argv`` into Hydra's flags and ``overrides``; -m may stand anywhere.

    ``asks`` is whether Hydra answers by itself: help, the config, or where it comes from.

    Raises:
        UsageError: for a flag that is refused, or that Hydra does not have, such as
            ``--name=mine``.
    """
    parser = make_flag_parser()

    def error(message: str) -> NoReturn:
        raise UsageError(message)

    parser.error = error  # type: ignore[method-assign, assignment]
    args, unknown = parser.parse_known_intermixed_args()
    if unknown:
        raise UsageError(_explain_unknown_flag(config, unknown[0]))
    asks = args.help or args.hydra_help or args.info or args.cfg or args.shell_completion
    args.asks = bool(asks)
    for flag in REFUSED_FLAGS:
        if getattr(args, flag) and not asks:
            raise UsageError(
                f"--{flag.replace('_', '-')} is refused: configs are in {config.parent}, put yours "
                f"there, or name their folder: hydra.searchpath=[file:///path]"
            )
    return args


def _explain_unknown_flag(config: Path, flag: str) -> str:
    """Return which word to type instead of ``--key=value`` or ``--key value``."""
    word = flag.lstrip("-")
    if "=" not in word:
        following = sys.argv[sys.argv.index(flag) + 1 :]
        has_value = following and "=" not in following[0]
        word = f"{word}={following[0] if has_value else 'VALUE'}"
    message = f"{flag}: keys are written without dashes"
    try:
        with hydra_as_usage_error(config):
            resolve_words(config, [word])
    except UsageError as error:
        return f"{message}. {error}"
    return f"{message}: {word}"


def words_for_hydra(config: Path, args: Namespace) -> list[str]:
    """Return the words with which Hydra itself prints help, the config or where it comes from.

    Raises:
        UsageError: if they are mistaken, or belong to a sweep.
    """
    words = args.overrides
    if args.cfg or args.info:
        if args.multirun:
            raise UsageError(
                "--cfg and --info show the config of one run: leave -m out, and give one value of "
                "each key"
            )
        with hydra_as_usage_error(config):
            words = resolve_words(config, words)
    flags = [word for word in sys.argv[1:] if word not in (*args.overrides, "-m", "--multirun")]
    return [*flags, *words]


def print_implied_options(given: list[str], words: list[str]) -> None:
    """Print which option of a group was chosen because one of its keys was given."""
    keys = [word.split("=")[0] for word in given]
    for group in (word.split("=")[0] for word in words):
        key = next((key for key in keys if key.startswith(f"{group}.")), None)
        if key and group not in keys:
            option = HydraConfig.get().runtime.choices[group]
            print(f"{group}={option}, as {key} is given", flush=True)


def compose_run(config: Path, words: list[str]) -> DictConfig:
    """Return the checked config of ``words``, as ``run_script`` would give it to its task.

    Raises:
        UsageError: if they are mistaken.
    """
    return compose_checked(config, prepare_words(config, words))


def run_sweep(config: Path, words: list[str]) -> int:
    """Run every combination that ``words`` give values for, and return the worst exit code.

    Raises:
        UsageError: if one of them is mistaken; none was started.
    """
    from sturdy.cli.search import is_search, run_search
    from sturdy.cli.sweep import run_jobs
    from sturdy.cli.sweep_plan import plan_jobs

    if is_search(words):
        return run_search(config, sys.argv[0], words)
    jobs = plan_jobs(config, words)
    if not any(word.startswith(LAUNCHER) for word in words):
        return run_jobs(sys.argv[0], jobs)
    from sturdy.cli.slurm import launch_jobs

    with hydra_as_usage_error(config):
        overrides = parse_overrides(words, multirun=True)
        fixed = [
            word
            for word, override in zip(words, overrides, strict=True)
            if not override.is_sweep_override()
        ]
        launcher = [word for word in fixed if word.startswith(LAUNCHER)]
        others = [word for word in fixed if word not in launcher]
        fixed = [*launcher, *resolve_words(config, others)]
    with hydra_as_usage_error():
        return launch_jobs(config, fixed, sys.argv[0], jobs)
