"""What a run began with. A restart that no person made goes on with it, whatever was edited in the
meantime.

A supervisor, torchrun or SLURM gives the same command again, but the files under conf/ and the
images may have changed. What the run's last start was made of is in its ``attempts/NNN``: config,
overrides, digest of the data.
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict

from exact_resume.fingerprint import flatten, matches

FROM_DATA = ("classes", "num_classes", "num_conditions", "prior")  # keys that the data fill in
COUNTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")


@dataclass(frozen=True)
class PreviousStart:
    """The newest start of a run: its resolved ``config``, and the digest of its ``data``, None
    where not recorded.
    """

    config: Mapping[str, Any]
    data: str | None


def is_restart(as_begun: bool | None) -> bool:
    """Whether no person made this start: a launcher says so, or the key ``as_begun`` does."""
    if as_begun is not None:
        return as_begun
    return any(int(os.environ.get(count) or 0) > 0 for count in COUNTS)


def find_previous_start(
    run: Path, overrides: Iterable[str], *, ignore: Iterable[str]
) -> PreviousStart | None:
    """Find what the newest start in directory ``run`` was made of; None if its command was another
    one.

    Args:
        ignore: keys whose overrides make no other command.
    """
    ignore = [*ignore, "as_begun"]

    def command(words: Iterable[str]) -> list[str]:
        return [word for word in words if not matches(word.lstrip("+~").partition("=")[0], ignore)]

    for attempt in sorted((run / "attempts").glob("[0-9]*"), reverse=True):
        try:
            environment = json.loads((attempt / "environment.json").read_bytes())
            config = OmegaConf.to_container(OmegaConf.load(attempt / "config.yaml"), resolve=True)
        except (OSError, ValueError):  # a kill left it half written
            continue
        if not isinstance(config, dict) or command(environment.get("overrides", ())) != command(
            overrides
        ):
            return None
        return PreviousStart({str(k): v for k, v in config.items()}, environment.get("data"))
    return None


def restore_config(cfg: DictConfig, begun: PreviousStart, *, keep: Iterable[str]) -> list[str]:
    """Give ``cfg`` the values of ``begun`` where they differ, and describe each.

    Args:
        cfg: is changed.
        keep: keys that stay as they are in ``cfg``.
    """
    for key in FROM_DATA:
        cfg[key] = begun.config.get(key, cfg[key])
    old, new = flatten(begun.config), flatten(OmegaConf.to_container(cfg, resolve=True))
    keep = [*keep, *FROM_DATA]
    odd = [
        k
        for k in old.keys() | new.keys()
        if old.get(k, ...) != new.get(k, ...) and not matches(k, keep)
    ]
    for key in sorted(odd, reverse=True):  # of a list the last entry goes first
        if key in old:
            OmegaConf.update(cfg, key, old[key], force_add=True)
            continue
        parent, _, name = key.rpartition(".")
        node = OmegaConf.select(cfg, parent) if parent else cfg
        with open_dict(cfg):
            del node[int(name) if isinstance(node, ListConfig) else name]
    return [
        f"{k} is {_show(old, k)}, as it began with, and not {_show(new, k)}" for k in sorted(odd)
    ]


def _show(config: Mapping[str, Any], key: str) -> str:
    return repr(config[key]) if key in config else "left out"
