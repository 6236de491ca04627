"""The door of every script: Hydra's command line, with mistakes answered before anything heavy is
imported.
"""

import faulthandler
import importlib
import signal
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TypeVar

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from exact_resume.system import UnsupportedSystemError, check_system
from sturdy.cli.overrides import (
    LAUNCHER,
    UsageError,
    check_composed,
    compose_checked,
    hydra_as_usage_error,
    parse_overrides,
    resolve_words,
)
from sturdy.cli.search_path import is_place, open_folders

T = TypeVar("T")

# Flags of Hydra that take a config from elsewhere.
ELSEWHERE = ("config_path", "config_name", "config_dir", "package", "experimental_rerun")
USAGE = 2  # exit code of a mistake in the command, as of argparse


def run_script(config: Path, task: str) -> None:
    """Run ``task`` (``package.module:function``), imported only now, on the composed config; or a
    sweep of it.

    Args:
        config: the YAML file of the script; its folder holds the groups.
        task: called with the config and the list of overrides; returns the exit code.
    """
    _or_exit(check_system)
    from exact_resume.streams import make_streams_lossy
    from exact_resume.workers import (
        DUMP_STACKS_SIGNAL,  # only now, as other systems lack the signal
    )

    make_streams_lossy()
    if (
        signal.getsignal(DUMP_STACKS_SIGNAL) is signal.SIG_DFL
    ):  # a question to all scripts, and not the end of them
        faulthandler.register(DUMP_STACKS_SIGNAL, 2)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(
            signal.SIGINT, signal.SIG_DFL
        )  # Ctrl-C before anything of a run exists: no traceback of imports
    sys.argv[1:] = _or_exit(lambda: open_search_path(config, sys.argv[1:]))
    args = _or_exit(lambda: arguments(config))
    asks = args.help or args.hydra_help or args.info or args.cfg or args.shell_completion
    if asks:
        _or_exit(lambda: _prepare_answer(config, args))
        answer = hydra.main(
            version_base="1.3", config_path=str(config.parent), config_name=config.stem
        )
        return answer(lambda cfg: None)()
    _or_exit(lambda: _refuse_flags(config, args))
    if args.multirun:
        sys.exit(_or_exit(lambda: open_sweep(config, args.overrides)))
    cfg = _or_exit(lambda: compose_run(config, args.overrides))
    words = list(HydraConfig.get().overrides.task)
    given = [word.split("=")[0] for word in args.overrides]
    for group in (word.split("=")[0] for word in words):
        if group not in given and (
            key := next((key for key in given if key.startswith(f"{group}.")), None)
        ):
            print(
                f"{group}={HydraConfig.get().runtime.choices[group]}, as {key} is given", flush=True
            )
    module, function = task.split(":")
    words = [*filter(is_place, args.overrides), *words]
    sys.exit(getattr(importlib.import_module(module), function)(cfg, words))


def open_search_path(config: Path, words: list[str]) -> list[str]:
    """As of ``open_folders``; raises UsageError."""
    with hydra_as_usage_error():
        return open_folders(words, config)


def arguments(config: Path) -> Namespace:
    """The flags and the words of this command; -m may stand anywhere.

    Raises:
        UsageError: for a flag that Hydra does not have, such as ``--name=mine``.
    """
    parser = get_args_parser()
    parser.allow_abbrev = False  # else --experiment would be --experimental-rerun

    def error(message: str) -> NoReturn:
        raise UsageError(message)

    parser.error = error  # type: ignore[method-assign, assignment]
    args, odd = parser.parse_known_intermixed_args()
    if odd:
        following = sys.argv[sys.argv.index(odd[0]) + 1 :]
        value = (
            following[0] if following and "=" not in following[0] and "=" not in odd[0] else "VALUE"
        )
        name = odd[0].lstrip("-")
        word = name if "=" in name else f"{name}={value}"
        try:
            with hydra_as_usage_error(config):
                resolve_words(config, [word])
        except UsageError as mistake:
            raise UsageError(f"{odd[0]}: keys are written without dashes. {mistake}") from None
        raise UsageError(f"{odd[0]}: keys are written without dashes: {word}")
    return args


def _prepare_answer(config: Path, args: Namespace) -> None:
    """Leave in ``sys.argv`` what Hydra answers by itself: help, the composed config, or where it
    comes from.
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
    sys.argv[1:] = [*flags, *words]


def compose_run(config: Path, words: list[str]) -> DictConfig:
    """The checked config of one run. Hydra's own start is not used: it composes twice more, half a
    second in all.

    Raises:
        UsageError: if it cannot be meant.
    """
    cfg = compose_checked(config, words)
    check_composed(cfg)
    return cfg


def open_sweep(config: Path, words: list[str]) -> int:
    """Run every combination that ``words`` give values for; returns the worst exit code.

    Raises:
        UsageError: if one of them cannot be meant; none was started.
    """
    from sturdy.cli.sweep import plan, sweep

    jobs = plan(config, words)
    if not any(word.startswith(LAUNCHER) for word in words):
        return sweep(sys.argv[0], jobs)
    from sturdy.cli.slurm import launch

    with hydra_as_usage_error(config):
        swept = [o.is_sweep_override() for o in parse_overrides(words, multirun=True)]
        lasting = [word for word, is_swept in zip(words, swept, strict=True) if not is_swept]
        launcher = [word for word in lasting if word.startswith(LAUNCHER)]
        lasting = [
            *launcher,
            *resolve_words(config, [word for word in lasting if word not in launcher]),
        ]
    with hydra_as_usage_error():
        return launch(config, lasting, sys.argv[0], jobs)


def _refuse_flags(config: Path, args: Namespace) -> None:
    for flag in ELSEWHERE:
        if getattr(args, flag):
            raise UsageError(
                f"--{flag.replace('_', '-')} is refused: configs are in {config.parent}, put yours "
                f"there, or name "
                f"their folder: hydra.searchpath=[file:///path]"
            )


def _or_exit(action: Callable[[], T]) -> T:
    try:
        return action()
    except (UsageError, UnsupportedSystemError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(USAGE)
