"""What can be meant by the words of a command, found out before anything heavy is imported.

A mistyped key or option is answered with its near misses, a key that would break the promise with the key to use
instead, and a key that its class does not take with those it takes.
"""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from sturdy.signatures import unknown_arguments

LAUNCHER = ("hydra/launcher", "hydra.launcher")  # words that say where the jobs of a sweep run

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
    "trainer.barebones": "it leaves out checkpoints and the record; use trainer.profiler=simple",
    "hydra.run.dir": "the run's directory is paths.runs/name",
    "hydra.job.chdir": "start it where it should be, or give paths.runs and paths.cache",
    "hydra.mode": "a sweep is asked for with -m",
    "hydra/sweeper": "a sweep goes through every combination of the values given",
    "hydra.sweeper.params": "give the values on the command line: key=1,2,3",
    "hydra.sweep.dir": "the runs of a sweep lie in paths.runs, named after what is swept",
    "hydra.sweep.subdir": "the runs of a sweep lie in paths.runs, named after what is swept",
}


class Mistake(Exception):
    """The command cannot be meant like this; the message says what to do."""


def check(config: Path, words: list[str]) -> DictConfig:
    """The config of ``words``; raises Mistake if they are no overrides of ``config`` that can be meant."""
    with meant(config):
        overrides = parsed(words)
        for override in overrides:
            _check_refused(override.key_or_group)
            if override.is_sweep_override():
                raise Mistake(f"{override.input_line}: for a run with each value add -m; for one list write [a,b]")
            if override.key_or_group.startswith(LAUNCHER):
                raise Mistake(f"{override.input_line}: only the runs of a sweep are launched so; add -m")
        chosen = [o for o in overrides if _is_group(o)]
        for override in chosen:
            check_option(override)
        base = _base(config, tuple(o.input_line or "" for o in chosen))
        for override in overrides:
            if override not in chosen:
                _check_key(override, base)
        cfg = compose(config.stem, words, return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)  # for what reads ${hydra:...}
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg


@cache
def _base(config: Path, groups: tuple[str, ...]) -> DictConfig:
    """Composed once for all jobs of a sweep that choose the same."""
    return compose(config.stem, list(groups))


def check_composed(cfg: DictConfig) -> None:
    """Raises Mistake if the composed config holds what is refused, missing, or taken by no class."""
    for key, value in _items(cfg).items():
        _check_refused(key)
        if value == "???":
            raise Mistake(f"{key} must be given: {key}=...")
    with meant():
        plain = OmegaConf.to_container(cfg, resolve=True)
    for key, target, unknown, known in unknown_arguments(plain):
        raise Mistake(f"{key}: {target} takes no {unknown!r}.{_near(unknown, known)}")


@contextmanager
def meant(config: Path | None = None) -> Iterator[None]:
    """Turn what Hydra says of the words into Mistake; with ``config``, inside there is a Hydra on its folder."""
    try:
        with initialize_config_dir(str(config.parent), version_base="1.3") if config else nullcontext():
            yield
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise Mistake(str(error)) from None


def parsed(words: list[str]) -> list[Override]:
    """To be called inside ``meant(config)``; raises Mistake for what cannot be read."""
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    try:
        return parser.parse_overrides(words)
    except HydraException as error:
        raise Mistake(f"{error}\nWrite overrides as key=value; quote what the shell would split.") from None


def _is_group(override: Override) -> bool:
    loader = GlobalHydra.instance().config_loader()
    return "." not in override.key_or_group and bool(loader.get_group_options(override.key_or_group))


def check_option(override: Override) -> None:
    """Raises Mistake if it chooses what its group does not have."""
    group, option = override.key_or_group, override.value()
    options = GlobalHydra.instance().config_loader().get_group_options(group, results_filter=ObjectType.CONFIG)
    for name in option if isinstance(option, list) else [option]:
        if name is not None and str(name) not in options:
            raise Mistake(f"{group}={name}: there is no such {group}.{_near(str(name), options)}")


def _check_key(override: Override, base: DictConfig) -> None:
    key = override.key_or_group
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
