"""Turn the words of a command into a checked config, before anything heavy is imported.

A mistyped key or option is answered with the nearest ones, a key that would break the promise with
the key to use instead, and an argument that a class does not take with the arguments it takes.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from sturdy.cli.quoting import NAMES, PATHS, expand_paths, matches, quote_text
from sturdy.cli.signatures import describe_annotation, misfit_values, unknown_arguments
from sturdy.cli.usage import (
    FOREIGN_KEYS,
    UsageError,
    check_not_refused,
    explain_stray_word,
    suggest,
)

LAUNCHER = ("hydra/launcher", "hydra.launcher")  # words that say where the jobs of a sweep run
SHORT_KEYS = {"base": "base.path"}
# Keys that experiment=finetune gives to the parts that a base decides, and what to do for others.
OF_BASE = ("backbone.base", "backbone.lora", "space.path", "condition.path")
OF_BASE_HINT = (
    "experiment=finetune takes backbone, space and condition from the base; leave them out. Other "
    "backbones are trained in latents with space=latents space.path=..., without that experiment"
)

# Groups that can be switched off, and the option that does it.
OFF_OPTION = {"logger": "csv", "alignment": "none"}
# Groups that cannot, and what to do instead.
REQUIRED_GROUPS = {
    "callbacks": "switch them off one by one, such as callbacks.samples=null",
    "ema": "ema.decay=0 makes the average the weights themselves",
    "sampler": "callbacks.samples=null draws no samples in training",
    "guidance": "guidance.scale=1 is none",
    "learning_rate": "learning_rate=constant changes nothing",
    "strategy": "strategy=single is that of one process",
}
# Parts that can be switched off: key=null, key=false or ~key.
SWITCHABLE = re.compile(r"(callbacks|logger)\.[^.]+")


def compose_checked(config: Path, words: list[str]) -> DictConfig:
    """Return the config of one run.

    Raises:
        UsageError: if ``words`` are no overrides of ``config``, or the result cannot be used.
    """
    with hydra_as_usage_error(config):
        words = resolve_words(config, words)
        cfg = compose(config.stem, words, return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)  # for interpolations of ${hydra:...}
    with open_dict(cfg):
        del cfg["hydra"]
    expand_paths(cfg, flatten(cfg))
    check_composed(cfg)
    return cfg


@contextmanager
def hydra_as_usage_error(config: Path | None = None) -> Iterator[None]:
    """Raise UsageError for the errors of Hydra and OmegaConf inside.

    Args:
        config: where given, Hydra is initialised on its folder inside.
    """
    try:
        folder = str(config.parent) if config else None
        with initialize_config_dir(folder, version_base="1.3") if folder else nullcontext():
            yield
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        text = str(error)
        first_line = text.strip().split("\n")[0]
        key = re.search(r"full_key: (\S+)", text)
        if key and key[1] not in first_line:
            first_line = f"{key[1]}: {first_line}"
        raise UsageError(first_line) from None


def parse_overrides(words: list[str], *, multirun: bool = False) -> list[Override]:
    """Parse ``words``, inside ``hydra_as_usage_error(config)``; free text is quoted first.

    Args:
        words: of the command.
        multirun: a comma separates the values of a sweep.

    Raises:
        UsageError: for a word that is not ``key=value``.
    """
    parser = OverridesParser.create(config_loader=_loader())
    words = [_spell_out(word) for word in words]
    for number, word in enumerate(words):
        if ("=" not in word or word.startswith("=")) and not word.startswith("~"):
            names = {*NAMES, *FOREIGN_KEYS, "seed", "lr", *_loader().get_group_options("")}
            raise UsageError(explain_stray_word(words, number, names))
    return parser.parse_overrides([quote_text(word, parser, multirun=multirun) for word in words])


def resolve_words(config: Path, words: list[str]) -> list[str]:
    """Return the words that Hydra is given for ``words``, inside ``hydra_as_usage_error(config)``.

    They differ where a group is chosen by one of its keys (``data.root``), a part is switched off
    (``key=false``), or a whole number is written as ``1e5``.

    Raises:
        UsageError: if ``words`` are no overrides of ``config``.
    """
    overrides = parse_overrides(words)
    for override in overrides:
        check_not_refused(override.key_or_group)
        _check_single_run(override)
    groups: dict[str, str] = {}
    for override in overrides:
        if _is_group(override) and not override.is_delete():
            groups[override.key_or_group] = _choose_option(override, config)
    keys_only = [override for override in overrides if override.key_or_group not in groups]
    groups |= _implied_options(keys_only, groups, config)
    options = tuple(word for word in groups.values() if word)
    base = _compose_options(config, options)
    keys = flatten(base)
    return [*options, *(_resolve_value(override, base, keys) for override in keys_only)]


def check_composed(cfg: DictConfig) -> None:
    """Raise UsageError if ``cfg`` has refused keys, missing values or arguments no class takes."""
    keys = flatten(cfg)
    for key, value in keys.items():
        check_not_refused(key)
        if value == "???":
            short = next((name for name, full in SHORT_KEYS.items() if full == key), key)
            raise UsageError(f"{short} must be given: {short}=...")
        is_empty_text = value == "" and matches(key, (*PATHS, *NAMES))
        if is_empty_text or (value is None and key.startswith("paths.")):
            raise UsageError(f"{key} is empty: it must be given a value")
    with hydra_as_usage_error():
        plain = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(plain, dict)
    if "name" in plain:
        _check_name(plain["name"])
    for key, target, argument, known in unknown_arguments(plain):
        if "base" in plain and key in OF_BASE:
            raise UsageError(f"{target.rpartition('.')[2]} is not of the base: {OF_BASE_HINT}")
        raise UsageError(f"{key}: {target} takes no {argument!r}.{suggest(argument, known)}")
    for key, value, annotation in misfit_values(plain):
        source = re.fullmatch(r"\$\{([\w.]+)\}", str(keys.get(key)))
        key = source[1] if source else key  # the key that was given
        text = "null" if value is None else value
        raise UsageError(f"{key}={text} must be {describe_annotation(annotation)}")


def check_option(override: Override) -> None:
    """Raise UsageError if ``override`` chooses an option that its group does not have."""
    group, value = override.key_or_group, override.value()
    options = _options(group)
    for name in value if isinstance(value, list) else [value]:
        if str(name) not in options:
            hint = " The rate itself is optimizer.lr." if group == "learning_rate" else ""
            raise UsageError(
                f"{group}={name}: there is no such {group}.{suggest(str(name), options)}{hint}"
            )


def flatten(cfg: DictConfig) -> dict[str, Any]:
    """Return every node and leaf by its dotted key, with interpolations as they are written."""

    def walk(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield f"{prefix}{key}", value
            if isinstance(value, dict | list):
                yield from walk(value, f"{prefix}{key}.")

    return dict(walk(OmegaConf.to_container(cfg), ""))


def _loader() -> ConfigLoader:
    return GlobalHydra.instance().config_loader()


def _options(group: str) -> list[str]:
    return _loader().get_group_options(group, results_filter=ObjectType.CONFIG)


def _is_group(override: Override) -> bool:
    group = override.key_or_group
    return "." not in group and bool(_loader().get_group_options(group))


@cache  # for all jobs of a sweep that choose the same
def _compose_options(config: Path, options: tuple[str, ...]) -> DictConfig:
    return compose(config.stem, list(options))


@cache
def _default_options(config: Path) -> dict[str, Any]:
    """Return the option of each group that the defaults list of ``config`` chooses."""
    defaults: dict[str, Any] = {}
    for item in OmegaConf.load(config).defaults:
        if item != "_self_":
            defaults |= {str(key): value for key, value in item.items()}
    return defaults


def _check_single_run(override: Override) -> None:
    """Raise UsageError for what only a sweep takes."""
    word, key = override.input_line, override.key_or_group
    if override.is_sweep_override() and key == "trainer.devices":
        raise UsageError(f"{word}: it is a number; choose among GPUs with CUDA_VISIBLE_DEVICES=0,1")
    if override.is_sweep_override():
        raise UsageError(f"{word}: for a run with each value add -m; for one list write [a,b]")
    if key.startswith(LAUNCHER):
        raise UsageError(f"{word}: only the runs of a sweep are launched so; add -m")


def _check_name(name: Any) -> None:
    """Raise UsageError if the run's directory would not be inside paths.runs."""
    parts = name.split("/") if isinstance(name, str) else [""]
    for part in parts:
        if part in ("", ".", "..") or not part.isprintable() or len(part.encode()) > 255:
            raise UsageError(
                f"name={name} must be a directory's name in paths.runs, such as cars or cars/first"
            )


def _choose_option(override: Override, config: Path) -> str:
    """Return the word that chooses an option; empty where the group is left out."""
    group = override.key_or_group
    if override.value() not in (None, "none", "null", False) or override.package:
        check_option(override)
        return override.input_line or ""
    if _default_options(config).get(group, "") is None:
        return ""
    if group in OFF_OPTION:
        return f"{group}={OFF_OPTION[group]}"
    hint = f"; {REQUIRED_GROUPS[group]}" if group in REQUIRED_GROUPS else ""
    raise UsageError(f"{override.input_line}: there must be one{hint}")


def _implied_options(
    overrides: list[Override], groups: dict[str, str], config: Path
) -> dict[str, str]:
    """Choose the option that demands a given key, where none was chosen: folder for ``data.root``.

    Keys of no group may be those of an experiment.

    Raises:
        UsageError: if options have the key and none of them demands it.
    """
    implied: dict[str, str] = {}
    options = tuple(word for word in groups.values() if word)
    keys = flatten(_compose_options(config, options))
    for override in overrides:
        key = override.key_or_group
        group = key.split(".")[0]
        if group != key and not _options(group):
            group = "experiment"
        if override.is_add() or group in {**groups, **implied} or key == group or key in keys:
            continue
        values: dict[str, Any] = {}  # of the key, by the option that has it
        for name in _options(group):
            option = f"{group}={name}"
            with suppress(HydraException, OmegaConfBaseException):
                composed = flatten(_compose_options(config, (*options, option)))
                if key in composed:
                    values[option] = composed[key]
        demanding = [option for option, value in values.items() if value == "???"]
        if len(demanding) == 1:
            implied[group] = demanding[0]
        elif values:
            raise UsageError(f"{override.input_line}: {' or '.join(values)} has {key}; add it")
    return implied


def _resolve_value(override: Override, base: DictConfig, keys: dict[str, Any]) -> str:
    """Return the word that sets the value in ``base``, whose ``flatten`` is ``keys``.

    Raises:
        UsageError: if there is no such key, or its value is of another kind.
    """
    key, word = override.key_or_group, override.input_line or ""
    if key.startswith("hydra."):
        return word
    if key not in keys:
        if override.is_add() or override.is_force_add():
            return word
        groups = [group for group in _loader().get_group_options("") if group != "hydra"]
        raise UsageError(f"{word}: there is no key {key!r}.{suggest(key, [*keys, *groups])}")
    if override.is_delete():
        if SWITCHABLE.fullmatch(key):
            return f"{key}=null"
        raise UsageError(f"{word}: a key cannot be taken away; give it a value")
    if override.is_add():
        raise UsageError(f"{word}: the key is there already; leave the + out")
    value, old = override.value(), keys[key]
    is_part = isinstance(old, dict)
    if is_part and SWITCHABLE.fullmatch(key) and value in (None, False):
        return f"{key}=null"
    if isinstance(old, str) and "${" in old:
        old = OmegaConf.select(base, key, throw_on_missing=False, throw_on_resolution_failure=False)
    wants_whole = isinstance(old, int) and not isinstance(old, bool)
    if wants_whole and isinstance(value, float) and value.is_integer():
        return f"{key}={int(value)}"
    is_size = key.endswith("image_size") and isinstance(value, int | list)  # the data checks it
    if key != "trainer.devices" and not is_size and (kind := _expected_kind(old, value)):
        raise UsageError(f"{word}: {key} is {kind}, not {_describe_value(value)}")
    if is_part and not isinstance(value, dict) and "${" not in str(value):
        inner = ", ".join(f"{key}.{name}" for name in old)
        raise UsageError(f"{word}: {key} is no value of its own; its keys are {inner}")
    return word


def _spell_out(word: str) -> str:
    """Return ``word`` with the full name of its key."""
    key, equals, value = word.partition("=")
    return f"{SHORT_KEYS.get(key, key)}{equals}{value}"


def _expected_kind(old: Any, new: Any) -> str | None:
    """Return what kind of value ``old`` is if ``new`` is of another kind, else None."""
    if isinstance(new, str) and "${" in new:
        return None
    is_number = isinstance(new, int | float) and not isinstance(new, bool) and new == new
    match old:
        case bool():
            return None if isinstance(new, bool) else "true or false"
        case int() | float():
            kind = "a whole number" if isinstance(old, int) else "a number"
            return None if is_number or new is None else f"{kind} like {old}"
        case list():
            return None if isinstance(new, list) else f"a list like [{','.join(map(str, old))}]"
        case str():
            return "a text" if isinstance(new, dict) else None
    return None


def _describe_value(value: Any) -> str:
    kinds = {str: "a word", list: "a list", dict: "a list of keys", type(None): "null"}
    return kinds.get(type(value), str(value).lower())
