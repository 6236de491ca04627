"""The figures of a report go into the run's ``evaluations.csv``, and from there to its loggers.

At once, if nobody trains; else the next start of training fills them up. Nothing in here can cost
the report.
"""

import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.utils import instantiate

from exact_resume.replay import ReplayLogger, recorded_rows
from exact_resume.resume import ResumePoint
from exact_resume.run import AlreadyRunningError, Run
from sturdy.training.loggers.evaluations import keep
from sturdy.trust import Trust

log = logging.getLogger(__name__)
TRUST_NONE = Trust()


def figures(numbers: Mapping[str, Any]) -> dict[str, float]:
    """The most important of a report's ``numbers``, as ``evaluation/kid`` and so on.

    Distances and shares are against the held-out images, ``worst_difference`` is in points of a
    hundred.
    """
    found = {k: numbers[k] for k in ("n", "seed") if k in numbers} | numbers["quality"][
        "held_out_samples"
    ]
    found |= {
        f"copies_{space}": numbers[f"memorisation_{space}"]["copies"]
        for space in ("pixels", "features")
    }
    if "class_accuracy" in numbers:
        found["class_accuracy"] = numbers["class_accuracy"]["all"]
    if "frequencies" in numbers:
        found["worst_difference"] = max(
            100 * abs(f["samples"] - f["truth"]) for f in numbers["frequencies"]
        )
    return {
        f"evaluation/{name}": float(value) for name, value in found.items() if math.isfinite(value)
    }


def record(
    run: Path,
    entry: ResumePoint,
    config: Mapping[str, Any],
    numbers: Mapping[str, Any],
    trust: Trust = TRUST_NONE,
) -> str:
    """Record what a report on ``entry``, a checkpoint of ``run`` with this ``config``, found; says
    where, in a line.
    """
    if entry.state.parent.parent.resolve() != (run / "checkpoints").resolve():
        return f"its figures are not recorded: {entry.state} is no checkpoint of {run}"
    try:
        said = f"its figures are in {keep(run, entry.step, figures(numbers))}"
        mirrors = mirrors_of(config, run, trust, entry.state)
        return said + shown(mirrors, run, config["trainer"]["max_steps"]) if mirrors else said
    except AlreadyRunningError:
        return (
            f"{said}; the run is being trained, so its loggers show them when training starts next"
        )
    except (OSError, ValueError) as error:
        log.warning(f"the report's figures could not be recorded in {run}: {error}")
        return "its figures are in report.json alone"


def shown(mirrors: list[ReplayLogger], run: Path, max_steps: int) -> str:
    """Fill up ``mirrors`` and say which show the run now.

    Raises:
        AlreadyRunningError: if the run is being trained.
    """
    with Run(run).lock(brief=True):
        rows, pictures = recorded_rows(run)
        finished = any(int(row["step"]) >= max_steps for row in rows)
        names = [
            mirror.name for mirror in mirrors if mirror.show(rows, pictures, finished=finished)
        ]
    return f", and in {' and '.join(names)}" if names else ""


def mirrors_of(
    config: Mapping[str, Any],
    run: Path,
    trust: Trust = TRUST_NONE,
    state: Path = Path("the checkpoint"),
) -> list[ReplayLogger]:
    """Those of the ``config`` of checkpoint ``state``, as far as they are trusted and lie in the
    run's directory.

    The run may have been copied or moved since; what lies elsewhere may belong to another one by
    now.
    """
    home, found = os.path.normpath(Path(config["paths"]["runs"]) / config["name"]), []
    for name, node in (config.get("logger") or {}).items():
        try:
            trust.check(state, config, [f"logger.{name}"])
            there = Path(os.path.normpath(node["directory"]))
            if not there.is_relative_to(home):
                raise ValueError(f"its directory {there} is not in that of the run")
            mirror = instantiate(
                {**node, "directory": str(run / there.relative_to(home))}, _convert_="all"
            )
        except Exception as error:  # a logger may raise whatever it likes
            log.warning(f"logger.{name} does not show the figures: {error.__cause__ or error}")
            continue
        if isinstance(mirror, ReplayLogger):
            mirror.log_hyperparams(config)
            found.append(mirror)
    return found
