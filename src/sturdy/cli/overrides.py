"""What can be meant by the words of a command, found out before anything heavy is imported.

A mistyped key or option is answered with its near misses, a key that would break the promise with
the key to use instead, and a key that its class does not take with those it takes.
"""

import difflib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
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

from sturdy.cli.quoting import NAMES, PATHS, UsageError, among, expand_paths, readable
from sturdy.cli.signatures import in_words, unfit_arguments, unknown_arguments

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


# Keys that other projects have, and the key here.
ELSEWHERE = {
    "epochs": ("trainer.max_steps",),  # training counts steps
    "max_epochs": ("trainer.max_steps",),
    "num_epochs": ("trainer.max_steps",),
    "iterations": ("trainer.max_steps",),
    "steps": ("trainer.max_steps", "sampler.steps"),
    "num_steps": ("trainer.max_steps", "sampler.steps"),
    "gpus": ("trainer.devices",),
    "workers": ("data.num_workers",),
    "resolution": ("data.image_size",),
    "size": ("data.image_size",),
    "model": ("backbone",),
    "dataset": ("data",),
    "data_dir": ("data.root", "data_root"),
    "data_path": ("data.root", "data_root"),
    "output_dir": ("paths.runs", "sample.out", "evaluate.out"),
    "fp16": ("trainer.precision",),
    "bf16": ("trainer.precision",),
    "num_samples": ("sample.n", "evaluate.n"),
    "cfg_scale": ("guidance.scale",),
}

# Groups that can be left out, and the option that does it.
WITHOUT = {"logger": "csv", "alignment": "none"}
# Other groups, and what to do instead.
KEPT = {
    "callbacks": "switch them off one by one, such as callbacks.samples=null",
    "ema": "ema.decay=0 makes the average the weights themselves",
    "sampler": "callbacks.samples=null draws no samples in training",
    "guidance": "guidance.scale=1 is none",
    "learning_rate": "learning_rate=constant changes nothing",
    "strategy": "strategy=single is that of one process",
}
SWITCHES = re.compile(
    r"(callbacks|logger)\.[^.]+"
)  # parts that can be switched off: key=null, key=false or ~key


def compose_checked(config: Path, words: list[str]) -> DictConfig:
    """The config of ``words``; raises UsageError if they are no overrides of ``config`` that can be
    meant.
    """
    with hydra_as_usage_error(config):
        words = resolve_words(config, words)
        cfg = compose(config.stem, words, return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)  # for what reads ${hydra:...}
    with open_dict(cfg):
        del cfg["hydra"]
    expand_paths(cfg, flatten(cfg))
    return cfg


def resolve_words(config: Path, words: list[str]) -> list[str]:
    """The words that Hydra is to be given for ``words``; to be called inside ``meant(config)``.

    They differ where a group is chosen by one of its keys (``data.root``), a part is switched off
    (``key=false``), or a whole number is written as ``1e5``.

    Raises:
        UsageError: if they are no overrides of ``config`` that can be meant.
    """
    overrides = parse_overrides(words)
    for override in overrides:
        _check_refused(override.key_or_group)
        if override.is_sweep_override():
            if override.key_or_group == "trainer.devices":
                raise UsageError(
                    f"{override.input_line}: it is a number; choose among GPUs with "
                    f"CUDA_VISIBLE_DEVICES=0,1"
                )
            raise UsageError(
                f"{override.input_line}: for a run with each value add -m; for one list write [a,b]"
            )
        if override.key_or_group.startswith(LAUNCHER):
            raise UsageError(
                f"{override.input_line}: only the runs of a sweep are launched so; add -m"
            )
    groups = {
        o.key_or_group: _choice(o, config) for o in overrides if _is_group(o) and not o.is_delete()
    }
    groups |= _implied([o for o in overrides if o.key_or_group not in groups], groups, config)
    chosen = tuple(word for word in groups.values() if word)
    base = _base(config, chosen)
    keys = flatten(base)
    return [*chosen, *(_fitting(o, base, keys) for o in overrides if o.key_or_group not in groups)]


@cache
def _base(config: Path, groups: tuple[str, ...]) -> DictConfig:
    """Composed once for all jobs of a sweep that choose the same."""
    return compose(config.stem, list(groups))


def check_composed(cfg: DictConfig) -> None:
    """Raises UsageError if the composed config holds what is refused, missing, or taken by no
    class.
    """
    items = flatten(cfg)
    for key, value in items.items():
        _check_refused(key)
        if value == "???":
            raise UsageError(f"{key} must be given: {key}=...")
        if (value == "" and among(key, (*PATHS, *NAMES))) or (
            value is None and key.startswith("paths.")
        ):
            raise UsageError(f"{key} is empty: it must be given a value")
    with hydra_as_usage_error():
        plain = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(plain, dict)
    if "name" in plain:
        _check_name(plain["name"])
    for key, target, unknown, known in unknown_arguments(plain):
        raise UsageError(f"{key}: {target} takes no {unknown!r}.{suggest(unknown, known)}")
    for key, value, annotation in unfit_arguments(
        {k: v for k, v in plain.items() if k != "trainer"}
    ):
        if made_of := re.fullmatch(r"\$\{([\w.]+)\}", str(items.get(key))):
            key = made_of[1]  # the key that was given
        raise UsageError(
            f"{key}={'null' if value is None else value} must be {in_words(annotation)}"
        )


def _check_name(name: Any) -> None:
    """A run's directory must lie in paths.runs; ``sweep/label`` may."""
    parts = name.split("/") if isinstance(name, str) else [""]
    if not all(
        part not in ("", ".", "..") and part.isprintable() and len(part.encode()) < 256
        for part in parts
    ):
        raise UsageError(
            f"name={name} must be a directory's name in paths.runs, such as cars or cars/first"
        )


@contextmanager
def hydra_as_usage_error(config: Path | None = None) -> Iterator[None]:
    """Turn what Hydra says of the words into Mistake; with ``config``, inside there is a Hydra on
    its folder.
    """
    try:
        with (
            initialize_config_dir(str(config.parent), version_base="1.3")
            if config
            else nullcontext()
        ):
            yield
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise UsageError(_line(error)) from None


def _line(error: Exception) -> str:
    """The first line of what Hydra or OmegaConf says, after the key that it speaks of."""
    text = str(error)
    key, first = re.search(r"full_key: (\S+)", text), text.strip().split("\n")[0]
    return f"{key[1]}: {first}" if key and key[1] not in first else first


def parse_overrides(words: list[str], *, multirun: bool = False) -> list[Override]:
    """What Hydra reads in ``words``, text as it was typed; to be called inside ``meant(config)``.

    Args:
        multirun: a comma separates the values of a sweep.

    Raises:
        UsageError: for a word that is no ``key=value``.
    """
    loader = GlobalHydra.instance().config_loader()
    parser = OverridesParser.create(config_loader=loader)
    for number, word in enumerate(words):
        if ("=" not in word or word.startswith("=")) and not word.startswith("~"):
            raise UsageError(_stray(words, number))
    return parser.parse_overrides([readable(word, parser, multirun=multirun) for word in words])


def _stray(words: list[str], number: int) -> str:
    """What to type instead of the word at ``number``, which is no ``key=value``."""
    before, word, after, last = ["", *words, "", ""][number : number + 4]
    names = {
        *NAMES,
        *ELSEWHERE,
        "seed",
        "lr",
        *GlobalHydra.instance().config_loader().get_group_options(""),
    }
    is_value = "=" in before.strip("=") and not (
        word.startswith("-") or "." in word or (word in names and after)
    )
    if before.endswith("="):
        typed, right = f"{before} {word}", f"{before}{word}"
    elif after == "=":
        typed, right = f"{word} = {last}", f"{word.lstrip('-')}={last}"
    elif after.startswith("="):
        typed, right = f"{word} {after}", f"{word.lstrip('-')}{after}"
    elif after and "=" not in after and not is_value:
        typed, right = f"{word} {after}", f"{word.lstrip('-')}={after}"
    elif is_value:
        return f"{word}: write key=value; if it belongs to the word before it, quote both: '{before} {word}'"
    elif word in names or "." in word or word.startswith(("-", "=")):
        typed, right = word, f"{word.strip('-=')}=VALUE"
    else:
        return f"{word}: write key=value, such as name={word} or run={word}; --help lists the keys"
    return f"{typed}: write {right}"


def _is_group(override: Override) -> bool:
    loader = GlobalHydra.instance().config_loader()
    return "." not in override.key_or_group and bool(
        loader.get_group_options(override.key_or_group)
    )


def _choice(override: Override, config: Path) -> str:
    """The word that chooses what ``override`` means; empty where nothing is chosen."""
    group = override.key_or_group
    if override.value() not in (None, "none", "null", False) or override.package:
        check_option(override)
        return override.input_line or ""
    if _defaults(config).get(group, "") is None:
        return ""
    if group in WITHOUT:
        return f"{group}={WITHOUT[group]}"
    raise UsageError(
        f"{override.input_line}: there must be one" + (f"; {KEPT[group]}" if group in KEPT else "")
    )


@cache
def _defaults(config: Path) -> dict[str, Any]:
    """The option of each group where none is chosen."""
    return {
        str(key): value
        for item in OmegaConf.load(config).defaults
        if item != "_self_"
        for key, value in item.items()
    }


def _options(group: str) -> list[str]:
    return (
        GlobalHydra.instance()
        .config_loader()
        .get_group_options(group, results_filter=ObjectType.CONFIG)
    )


def check_option(override: Override) -> None:
    """Raises UsageError if it chooses what its group does not have."""
    group, option, options = (
        override.key_or_group,
        override.value(),
        _options(override.key_or_group),
    )
    for name in option if isinstance(option, list) else [option]:
        if str(name) not in options:
            rate = " The rate itself is optimizer.lr." if group == "learning_rate" else ""
            raise UsageError(
                f"{group}={name}: there is no such {group}.{suggest(str(name), options)}{rate}"
            )


def _implied(overrides: list[Override], groups: dict[str, str], config: Path) -> dict[str, str]:
    """Groups of which no option is chosen, but a key is given that one option demands:
    ``data.root``.

    Raises:
        UsageError: if options have the key and none of them demands it.
    """
    implied: dict[str, str] = {}
    chosen = tuple(word for word in groups.values() if word)
    keys = flatten(_base(config, chosen))
    for override in overrides:
        key, group = override.key_or_group, override.key_or_group.split(".")[0]
        if override.is_add() or group in {**groups, **implied} or key == group or key in keys:
            continue
        have: dict[str, Any] = {}
        for option in _options(group):
            with suppress(HydraException, OmegaConfBaseException):
                items = flatten(_base(config, (*chosen, f"{group}={option}")))
                have |= {f"{group}={option}": items[key]} if key in items else {}
        demand = [word for word, value in have.items() if value == "???"]
        if len(demand) == 1:
            implied[group] = demand[0]
        elif have:
            raise UsageError(f"{override.input_line}: {' or '.join(have)} has {key}; add it")
    return implied


def _fitting(override: Override, base: DictConfig, keys: dict[str, Any]) -> str:
    """The word that sets what ``override`` means in ``base``, whose ``flatten`` are ``keys``.

    Raises:
        UsageError: if there is no such key, or its value is of another kind.
    """
    key, word = override.key_or_group, override.input_line or ""
    if key.startswith("hydra."):
        return word
    if key not in keys:
        if override.is_add() or override.is_force_add():
            return word
        groups = [
            group
            for group in GlobalHydra.instance().config_loader().get_group_options("")
            if group != "hydra"
        ]
        raise UsageError(f"{word}: there is no key {key!r}.{suggest(key, [*keys, *groups])}")
    if override.is_delete():
        if SWITCHES.fullmatch(key):
            return f"{key}=null"
        raise UsageError(f"{word}: a key cannot be taken away; give it a value")
    if override.is_add():
        raise UsageError(f"{word}: the key is there already; leave the + out")
    value, old = override.value(), keys[key]
    if isinstance(old, dict) and SWITCHES.fullmatch(key) and value in (None, False):
        return f"{key}=null"
    if isinstance(old, str) and "${" in old:
        old = OmegaConf.select(base, key, throw_on_missing=False, throw_on_resolution_failure=False)
    if (
        isinstance(value, float)
        and isinstance(old, int)
        and not isinstance(old, bool)
        and value.is_integer()
    ):
        return f"{key}={int(value)}"
    if key != "trainer.devices" and (kind := _kind(old, value)):
        square = (
            "; images are square" if key.endswith("image_size") and isinstance(value, list) else ""
        )
        raise UsageError(f"{word}: {key} is {kind}, not {_described(value)}{square}")
    if isinstance(old, dict) and not isinstance(value, dict) and "${" not in str(value):
        raise UsageError(
            f"{word}: {key} is no value of its own; its keys are "
            f"{', '.join(f'{key}.{k}' for k in old)}"
        )
    return word


def _kind(old: Any, new: Any) -> str | None:
    """What ``old`` is, if ``new`` cannot stand in its place: ``a whole number like 64``."""
    if isinstance(new, str) and "${" in new:
        return None
    match old:
        case bool():
            return None if isinstance(new, bool) else "true or false"
        case int() | float():
            if isinstance(new, int | float) and not isinstance(new, bool) and new == new:
                return None
            return (
                f"a {'whole ' if isinstance(old, int) else ''}number like {old}"
                if new is not None
                else None
            )
        case list():
            return None if isinstance(new, list) else f"a list like [{','.join(map(str, old))}]"
        case str():
            return "a text" if isinstance(new, dict) else None
    return None


def _described(value: Any) -> str:
    kinds = {str: "a word", list: "a list", dict: "a list of keys", type(None): "null"}
    return kinds.get(type(value), str(value).lower())


def _check_refused(key: str) -> None:
    if key in REFUSED:
        raise UsageError(f"{key} is refused: {REFUSED[key]}")


def suggest(word: str, known: Iterable[str]) -> str:
    """' Did you mean ...' or, where nothing is near, ' There are: ...'."""
    known = sorted(known)
    by_tail = {k.rsplit(".", 1)[-1]: k for k in known}
    if same := [key for key in ELSEWHERE.get(word.rsplit(".", 1)[-1], ()) if key in known]:
        return f" Did you mean {' or '.join(same)}?"
    near = difflib.get_close_matches(word, known, n=3, cutoff=0.6)
    near += [
        by_tail[t]
        for t in difflib.get_close_matches(word.rsplit(".", 1)[-1], by_tail, n=2, cutoff=0.75)
    ]
    if near:
        return f" Did you mean {' or '.join(dict.fromkeys(near))}?"
    return (
        f" There are: {', '.join(known)}."
        if len(known) <= 40
        else " See --help, or --cfg job for all keys."
    )


def flatten(cfg: DictConfig) -> dict[str, Any]:
    """Every node and leaf by its dotted key, unresolved."""

    def walk(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield f"{prefix}{key}", value
            if isinstance(value, dict | list):
                yield from walk(value, f"{prefix}{key}.")

    return dict(walk(OmegaConf.to_container(cfg), ""))
