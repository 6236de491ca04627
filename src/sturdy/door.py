"""The door of every script: Hydra's command line, with mistakes answered before anything heavy is imported.

A mistyped key or option is answered with its near misses, a key that would break the promise with the key to use
instead, and a key that its class does not take with those it takes.
"""

import difflib
import importlib
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import hydra
from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sturdy.signatures import unknown_arguments

USAGE = 2  # exit code of a mistake in the command, as of argparse

# Keys of Lightning that would break the promise, and what to use instead.
REFUSED = {
    "trainer.max_epochs": "training counts steps: use trainer.max_steps",
    "trainer.min_epochs": "training counts steps: use trainer.max_steps",
    "trainer.min_steps": "use trainer.max_steps",
    "trainer.max_time": "how long a step takes must not decide what is trained: use trainer.max_steps",
    "trainer.accumulate_grad_batches": "use data.shards: a batch is computed in that many equal parts",
    "trainer.fast_dev_run": "use debug=default",
    "trainer.overfit_batches": "use data.source.n=64, or a small folder",
    "trainer.limit_train_batches": "use trainer.max_steps",
    "trainer.gradient_clip_val": "use clip",
    "trainer.gradient_clip_algorithm": "use clip, the largest norm",
    "trainer.num_sanity_val_steps": "use debug=default",
    "trainer.check_val_every_n_epoch": "use trainer.val_check_interval, in steps",
    "trainer.use_distributed_sampler": "the order is by position; there is nothing to set",
    "trainer.reload_dataloaders_every_n_epochs": "there is one endless epoch",
    "trainer.enable_checkpointing": "use callbacks.checkpoint",
    "trainer.default_root_dir": "use paths.runs and name",
    "trainer.callbacks": "use callbacks",
    "trainer.logger": "use logger",
    "trainer.plugins": "the store is the plugin",
}


class Mistake(Exception):
    """The command cannot be meant like this; the message says what to do."""


def open_door(config: Path, task: str) -> None:
    """Run ``task`` (``package.module:function``), imported only now, on the composed config.

    Args:
        config: the YAML file of the script; its folder holds the groups.
        task: called with the config and the list of overrides; returns the exit code.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C before anything of a run exists: no traceback of imports
    args = get_args_parser().parse_args()
    asks = args.help or args.hydra_help or args.info or args.cfg or args.shell_completion
    if not asks and not args.multirun:
        _or_exit(lambda: check(config, args.overrides))

    def run(cfg: DictConfig) -> None:
        module, function = task.split(":")
        _or_exit(lambda: check_composed(cfg))
        overrides = list(HydraConfig.get().overrides.task)
        sys.exit(getattr(importlib.import_module(module), function)(cfg, overrides))

    hydra.main(version_base="1.3", config_path=str(config.parent), config_name=config.stem)(run)()


def check(config: Path, words: list[str]) -> None:
    """Raises Mistake if ``words`` are no overrides of ``config`` that can be meant."""
    with initialize_config_dir(str(config.parent), version_base="1.3"):
        try:
            overrides = OverridesParser.create().parse_overrides(words)
        except HydraException as error:
            raise Mistake(f"{error}\nWrite overrides as key=value; quote what the shell would split.") from None
        chosen = [o for o in overrides if _is_group(o)]
        for override in chosen:
            _check_option(override)
        base = compose(config.stem, [o.input_line or "" for o in chosen])
        for override in overrides:
            if override not in chosen:
                _check_key(override, base)
        try:
            compose(config.stem, words)
        except (HydraException, OmegaConfBaseException) as error:
            raise Mistake(str(error)) from None


def check_composed(cfg: DictConfig) -> None:
    """Raises Mistake if the composed config holds what is refused, missing, or taken by no class."""
    for key, value in _items(cfg).items():
        _check_refused(key)
        if value == "???":
            raise Mistake(f"{key} must be given: {key}=...")
    try:
        plain = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        raise Mistake(str(error)) from None
    for key, target, unknown, known in unknown_arguments(plain):
        raise Mistake(f"{key}: {target} takes no {unknown!r}.{_near(unknown, known)}")


def _or_exit(action: Callable[[], None]) -> None:
    try:
        action()
    except Mistake as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        sys.exit(USAGE)


def _is_group(override: Override) -> bool:
    loader = GlobalHydra.instance().config_loader()
    return "." not in override.key_or_group and bool(loader.get_group_options(override.key_or_group))


def _check_option(override: Override) -> None:
    group, option = override.key_or_group, override.value()
    options = GlobalHydra.instance().config_loader().get_group_options(group, results_filter=ObjectType.CONFIG)
    for name in option if isinstance(option, list) else [option]:
        if name is not None and str(name) not in options:
            raise Mistake(f"{group}={name}: there is no such {group}.{_near(str(name), options)}")


def _check_key(override: Override, base: DictConfig) -> None:
    key = override.key_or_group
    _check_refused(key)
    keys = _items(base)
    if key.startswith("hydra.") or override.is_add() or override.is_force_add():
        return
    if key not in keys:
        groups = [g for g in GlobalHydra.instance().config_loader().get_group_options("") if g != "hydra"]
        raise Mistake(f"{override.input_line}: there is no key {key!r}.{_near(key, [*keys, *groups])}")
    old = OmegaConf.select(base, key, throw_on_missing=False, throw_on_resolution_failure=False)
    if isinstance(override.value(), str) and isinstance(old, int | float) and key != "trainer.devices":
        if "${" not in str(override.value()):
            raise Mistake(f"{override.input_line}: {key} is a {type(old).__name__} like {old}, not a word")


def _check_refused(key: str) -> None:
    if key in REFUSED:
        raise Mistake(f"{key} is refused: {REFUSED[key]}")


def _near(word: str, known: Iterable[str]) -> str:
    """' Did you mean ...' or, where nothing is near, ' There are: ...'."""
    known = sorted(known)
    by_tail = {k.rsplit(".", 1)[-1]: k for k in known}
    near = difflib.get_close_matches(word, known, n=3, cutoff=0.6)
    near += [by_tail[t] for t in difflib.get_close_matches(word.rsplit(".", 1)[-1], by_tail, n=2, cutoff=0.75)]
    if near:
        return f" Did you mean {' or '.join(dict.fromkeys(near))}?"
    return f" There are: {', '.join(known)}." if len(known) <= 40 else " See --help, or --cfg job for all keys."


def _items(cfg: DictConfig) -> dict[str, Any]:
    """Every node and leaf by its dotted key, unresolved."""

    def walk(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield f"{prefix}{key}", value
            if isinstance(value, dict | list):
                yield from walk(value, f"{prefix}{key}.")

    return dict(walk(OmegaConf.to_container(cfg), ""))
