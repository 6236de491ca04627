"""Which code a config that is read from a file may name: one rule, for every part of a run.

    typed on the command line, or in conf/    everything
    a run's own checkpoint                    what an attempts/*/config.yaml of that run says
    any other file                            classes of this project and of torch.optim, and those
                                              defined in the packages of trust=[mypackage]

A checkpoint alone must not choose what is executed, because it may be anybody's. The YAML files of
a run were written by its own training, which has already executed everything that they name.
"""

import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hydra.utils import get_object
from omegaconf import OmegaConf

from exact_resume.attempt import CONFIG
from exact_resume.checkpoint.renames import rename_config

PROJECT = (
    "examples.cars",
    "examples.spectrograms",
    "sturdy.backbone",
    "sturdy.data",
    "sturdy.diffusion",
    "sturdy.encoders.encoder",
    "sturdy.pretrained",
    "sturdy.training.alignment",
    "sturdy.training.ema",
    "sturdy.training.loggers",
    "sturdy.training.optim",
    "torch.optim",
)
FUNCTIONS = (  # others: classes
    "sturdy.data.datamodule.folder_data",
    "sturdy.data.decode.decode",
    "sturdy.data.huggingface.huggingface_data",
)
# Classes of these are trusted one by one, as some run commands.
BROAD_PACKAGES = ("torch", "lightning", "hydra", "numpy")


class Trust:
    """The code that the user trusts.

    Args:
        packages: names of packages or modules, as in ``trust=[mypackage]``. Classes that are
            defined in them may be built. Their functions, and what they import, may not be called.
        runs: the directory of the user's runs, where each may build what its own training has
            built; None for no run.

    Raises:
        ValueError: a name is not the name of a package, or belongs to Python's own library.
    """

    def __init__(
        self, packages: Iterable[str] | str | None = (), runs: str | Path | None = None
    ) -> None:
        is_single = isinstance(packages, str | int | float)
        self.packages: tuple[str, ...] = (packages,) if is_single else tuple(packages or ())  # type: ignore[assignment, arg-type]
        self.runs = runs
        for package in self.packages:
            parts = package.split(".") if isinstance(package, str) else [""]
            if not all(part.isidentifier() for part in parts):
                raise ValueError(
                    f"trust: {package!r} is no name of a package; write trust=[mypackage]"
                )
            if parts[0] in sys.stdlib_module_names:
                raise ValueError(
                    f"trust: {package} is of Python's own library, and has no part of a run in it"
                )

    def check(self, file: Path, config: Mapping[str, Any], names: Iterable[str]) -> None:
        """Return if the named parts of ``config`` may be built.

        Args:
            file: where ``config`` was read.
            config: nested primitives.
            names: dotted, such as ``backbone`` or ``logger.wandb``.

        Raises:
            ValueError: they may not be built; the message says what to type to trust them.
        """
        names = list(names)
        for name in names:
            for target in find_untrusted_targets(_select(config, name), self.packages):
                if self._was_trained_with(file, config, names):
                    return
                reason = _describe_refusal(target, self.packages)
                raise ValueError(f"{file} asks for {target} as its {name}, {reason}")

    def _was_trained_with(
        self, file: Path, config: Mapping[str, Any], names: Iterable[str]
    ) -> bool:
        """Return whether an attempt of the run that holds ``file`` has the same named parts."""
        parts = {name: _select(config, name) for name in names}
        for attempt in self._attempts(file):
            if all(_select(attempt, name) == part for name, part in parts.items()):
                return True
        return False

    def _attempts(self, file: Path) -> Iterator[Mapping[str, Any]]:
        """Yield the configs of the attempts of the run that holds ``file``, the newest first."""
        if self.runs is None:
            return
        for absolute in (os.path.abspath, os.path.realpath):  # either may lead through a link
            runs = Path(absolute(self.runs))
            home = _find_home(Path(absolute(file)), runs)
            if home is None:
                continue
            for path in sorted(home.glob(f"attempts/*/{CONFIG}"), reverse=True):
                try:
                    config = OmegaConf.to_container(OmegaConf.load(path))
                except Exception:  # a broken YAML raises whatever it likes, and says nothing
                    continue
                if isinstance(config, dict):
                    yield rename_config(config, 1)  # type: ignore[arg-type]


def find_untrusted_targets(node: Any, packages: Iterable[str] = ()) -> Iterator[str]:
    """Yield everything in ``node`` that must not be handed to Hydra.

    That is a ``_target_`` that is neither of the project nor a class of ``packages``, and any
    ``${...}``: Hydra would fill it in, and build the result.
    """
    if isinstance(node, str) and "${" in node:
        yield node
    if isinstance(node, Mapping):
        target = node.get("_target_")
        if "_target_" in node and not _may_build(str(target), packages):
            yield str(target)
        for value in node.values():
            yield from find_untrusted_targets(value, packages)
    elif isinstance(node, list | tuple):
        for value in node:
            yield from find_untrusted_targets(value, packages)


def is_defined_in(name: str, package: str) -> bool:
    """Return whether the dotted ``name`` is ``package`` or lies below it."""
    return name == package or name.startswith(f"{package}.")


def _may_build(target: str, packages: Iterable[str]) -> bool:
    if target in FUNCTIONS:
        return True
    rooms = [room for room in (*PROJECT, *packages) if is_defined_in(target, room)]
    if not rooms:
        return False
    try:
        found = get_object(target)
    except (ImportError, ValueError, AttributeError):
        return False
    if not isinstance(found, type):
        return False
    definition = f"{found.__module__}.{found.__qualname__}"
    return any(target == room or is_defined_in(definition, room) for room in rooms)


def _find_home(file: Path, runs: Path) -> Path | None:
    """Return the directory of the run that holds ``file``."""
    for folder in file.parents:
        if runs in folder.parents and (folder / "attempts").is_dir():
            return folder
    return None


def _select(config: Any, name: str) -> Any:
    for key in name.split("."):
        config = config.get(key) if isinstance(config, Mapping) else None
    return config


def _describe_refusal(target: str, packages: Iterable[str]) -> str:
    """Return why ``target`` is not built, and what to type to trust it."""
    package = target.partition(".")[0]
    if any(is_defined_in(target, trusted) for trusted in packages):
        return f"which is no class that is defined in {package} and can be imported, and is not run"
    refusal = "which is not code of this project, and is not run"
    if package in (*sys.stdlib_module_names, "sturdy") or not package.isidentifier():
        return refusal
    word = target if package in BROAD_PACKAGES else package
    return f"{refusal}. If you trust {word}, say so: trust=[{','.join((*packages, word))}]"
