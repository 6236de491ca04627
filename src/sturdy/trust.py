"""Which code a config that is read from a file may name: one rule, for every part of a run.

    typed on the command line, or in conf/    everything
    a run's own checkpoint                    what an attempts/*/config.yaml of that run says, to
    the letter
    any other file                            classes of this project and of torch.optim, and those
    that are defined
                                              in the packages of trust=[mypackage]

A checkpoint alone must not choose what is executed, and it may be anybody's. The YAML files of a
run were written by its own training, which has executed all that they name.
"""

import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hydra.utils import get_object
from omegaconf import OmegaConf

PROJECT = (
    "examples.cars",
    "sturdy.backbone",
    "sturdy.data",
    "sturdy.diffusion",
    "sturdy.encoders.encoder",
    "sturdy.training.alignment",
    "sturdy.training.ema",
    "sturdy.training.loggers",
    "sturdy.training.optim",
    "torch.optim",
)
FUNCTIONS = (
    "sturdy.data.datamodule.folder_data",
    "sturdy.data.decode.decode",
)  # all others are classes
CONFIG = "config.yaml"  # of an attempt
BROAD = (
    "torch",
    "lightning",
    "hydra",
    "numpy",
)  # of these one class is trusted at a time, as some run commands


class Trust:
    """What the user trusts.

    Args:
        packages: names of packages or modules, as in ``trust=[mypackage]``. Classes that are
            defined in them may be built; their functions, and what they import, may not be called.
        runs: the directory of the user's runs (``paths.runs``), where each may build what its own
            training has built; None for no run.

    Raises:
        ValueError: a name is none, or is of Python's own library.
    """

    def __init__(
        self, packages: Iterable[str] | str | None = (), runs: str | Path | None = None
    ) -> None:
        self.packages = (
            (packages,) if isinstance(packages, str | int | float) else tuple(packages or ())
        )
        self.runs = runs
        for package in self.packages:
            if not isinstance(package, str) or not all(
                part.isidentifier() for part in package.split(".")
            ):
                raise ValueError(
                    f"trust: {package!r} is no name of a package; write trust=[mypackage]"
                )
            if _first(package) in sys.stdlib_module_names:
                raise ValueError(
                    f"trust: {package} is of Python's own library, and has no part of a run in it"
                )

    def check(self, file: Path, config: Mapping[str, Any], names: Iterable[str]) -> None:
        """Return if the parts ``names`` of ``config``, as primitives, may be built.

        Args:
            file: where ``config`` was read.
            names: dotted, such as ``backbone`` or ``logger.wandb``.

        Raises:
            ValueError: they may not; the message says what to type if they should.
        """
        self._check(file, config, names, ())

    def check_recipe(self, file: Path, config: Mapping[str, Any], names: Iterable[str]) -> None:
        """As ``check``, for a file that was written after the training, beside its attempts.

        It may say other numbers than they do, but names no other classes.
        """
        if not any(
            True
            for name in names
            for _ in find_untrusted_targets(_part(config, name), self.packages)
        ):
            # of a run that was started hundreds of times, reading what its attempts say takes
            # seconds
            return
        own = {target for attempt in self._attempts(file) for target in _targets(attempt)}
        self._check(
            file,
            config,
            names,
            [target for target in own if _first(target) not in sys.stdlib_module_names],
        )

    def _check(
        self, file: Path, config: Mapping[str, Any], names: Iterable[str], own: Iterable[str]
    ) -> None:
        for name in names:
            for stranger in find_untrusted_targets(_part(config, name), (*self.packages, *own)):
                if self._is_own(file, config, names):
                    return
                raise ValueError(
                    f"{file} asks for {stranger} as its {name}, {_refusal(stranger, self.packages)}"
                )

    def _is_own(self, file: Path, config: Mapping[str, Any], names: Iterable[str]) -> bool:
        """Whether an attempt of the run that ``file`` lies in says the same of all ``names``."""
        said = [_part(config, name) for name in names]
        return any(
            said == [_part(attempt, name) for name in names] for attempt in self._attempts(file)
        )

    def _attempts(self, file: Path) -> Iterator[Mapping[str, Any]]:
        """The configs of the attempts of the run that ``file`` lies in, the newest first."""
        if self.runs is None:
            return
        for absolute in (
            os.path.abspath,
            os.path.realpath,
        ):  # either of them may lead through a link
            runs = Path(absolute(self.runs))
            inside = [folder for folder in Path(absolute(file)).parents if runs in folder.parents]
            home = next((folder for folder in inside if (folder / "attempts").is_dir()), None)
            for path in sorted(home.glob(f"attempts/*/{CONFIG}"), reverse=True) if home else ():
                try:
                    config = OmegaConf.to_container(OmegaConf.load(path))
                except Exception:  # a broken YAML raises whatever it likes, and says nothing
                    continue
                if isinstance(config, dict):
                    yield config  # type: ignore[misc]


def find_untrusted_targets(node: Any, packages: Iterable[str] = ()) -> Iterator[str]:
    """Yield what must not be handed to Hydra, anywhere in ``node``, a config as primitives.

    That is a ``_target_`` that is neither of the project nor a class of ``packages``, and any
    ``${...}``, which Hydra would fill in, and build what it was filled with.
    """
    if isinstance(node, str) and "${" in node:
        yield node
    if (
        isinstance(node, Mapping)
        and "_target_" in node
        and not _may_build(str(node["_target_"]), packages)
    ):
        yield str(node["_target_"])
    for value in (
        node.values()
        if isinstance(node, Mapping)
        else node
        if isinstance(node, list | tuple)
        else ()
    ):
        yield from find_untrusted_targets(value, packages)


def _may_build(target: str, packages: Iterable[str]) -> bool:
    if target in FUNCTIONS:
        return True
    rooms = [room for room in (*PROJECT, *packages) if _is_under(target, room)]
    if not rooms:
        return False
    try:
        found = get_object(target)
    except (ImportError, ValueError, AttributeError):
        return False
    where = f"{getattr(found, '__module__', '')}.{getattr(found, '__qualname__', '')}"
    return isinstance(found, type) and any(
        target == room or _is_under(where, room) for room in rooms
    )


def _part(config: Any, name: str) -> Any:
    for key in name.split("."):
        config = config.get(key) if isinstance(config, Mapping) else None
    return config


def _is_under(name: str, room: str) -> bool:
    return name == room or name.startswith(f"{room}.")


def _first(name: str) -> str:
    return name.partition(".")[0]


def _targets(node: Any) -> Iterator[str]:
    if isinstance(node, Mapping) and isinstance(node.get("_target_"), str):
        yield node["_target_"]
    for value in (
        node.values() if isinstance(node, Mapping) else node if isinstance(node, list) else ()
    ):
        yield from _targets(value)


def _refusal(stranger: str, packages: Iterable[str]) -> str:
    """Why ``stranger`` is not built, and what to type, if anything, for it to be."""
    package = _first(stranger)
    if any(_is_under(stranger, trusted) for trusted in packages):
        return f"which is no class that is defined in {package} and can be imported, and is not run"
    refusal = "which is not code of this project, and is not run"
    if package in (*sys.stdlib_module_names, "sturdy") or not package.isidentifier():
        return refusal
    word = stranger if package in BROAD else package
    return f"{refusal}. If you trust {word}, say so: trust=[{','.join((*packages, word))}]"
