"""Restore the config that a run began with, when a launcher and no person restarts it.

A supervisor, torchrun or SLURM repeats the command, but files under conf/ and the data may have
changed meanwhile. The folder ``attempts/NNN`` of the newest start has its config, its overrides and
the digest of its data.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict

from exact_resume.attempt import CONFIG, ENVIRONMENT
from exact_resume.fingerprint import flatten, matches

FROM_DATA = ("classes", "num_classes", "num_conditions", "prior")  # keys that the data fill in


@dataclass(frozen=True)
class PreviousStart:
    """The newest start of a run.

    Attributes:
        config: its resolved config.
        data: digest of its data; None where it was not recorded.
    """

    config: Mapping[str, Any]
    data: str | None


def find_previous_start(
    run: Path, overrides: Iterable[str], *, ignore: Iterable[str]
) -> PreviousStart | None:
    """Find the newest start in directory ``run``; return None if its command was another one.

    Args:
        run: the run's directory.
        overrides: the words of this command.
        ignore: keys whose overrides do not make another command.
    """
    ignore = [*ignore, "as_begun"]
    command = _without_keys(overrides, ignore)
    for attempt in sorted((run / "attempts").glob("[0-9]*"), reverse=True):
        try:
            environment = json.loads((attempt / ENVIRONMENT).read_bytes())
            config = OmegaConf.to_container(OmegaConf.load(attempt / CONFIG), resolve=True)
        except (OSError, ValueError):  # a kill left it half written
            continue
        same_command = _without_keys(environment.get("overrides", ()), ignore) == command
        if not isinstance(config, dict) or not same_command:
            return None
        return PreviousStart({str(k): v for k, v in config.items()}, environment.get("data"))
    return None


def restore_config(cfg: DictConfig, begun: PreviousStart, *, keep: Iterable[str]) -> list[str]:
    """Give ``cfg`` the values of ``begun`` where they differ, and describe each.

    Args:
        cfg: is changed.
        begun: the start to restore.
        keep: keys that stay as they are in ``cfg``.
    """
    for key in FROM_DATA:
        cfg[key] = begun.config.get(key, cfg[key])
    old = flatten(begun.config)
    new = flatten(OmegaConf.to_container(cfg, resolve=True))
    keep = [*keep, *FROM_DATA]
    changed = []
    for key in sorted(old.keys() | new.keys()):
        if old.get(key, ...) != new.get(key, ...) and not matches(key, keep):
            changed.append(key)
    for key in reversed(changed):  # the last entry of a list is removed first
        if key in old:
            OmegaConf.update(cfg, key, old[key], force_add=True)
        else:
            _remove(cfg, key)
    return [
        f"{key} is {_show(old, key)}, as it began with, and not {_show(new, key)}"
        for key in changed
    ]


def _without_keys(words: Iterable[str], keys: Iterable[str]) -> list[str]:
    kept = []
    for word in words:
        key = word.lstrip("+~").partition("=")[0]
        if not matches(key, keys):
            kept.append(word)
    return kept


def _remove(cfg: DictConfig, key: str) -> None:
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(cfg, parent) if parent else cfg
    with open_dict(cfg):
        del node[int(name) if isinstance(node, ListConfig) else name]


def _show(config: Mapping[str, Any], key: str) -> str:
    return repr(config[key]) if key in config else "left out"
