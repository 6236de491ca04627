"""Import torchmetrics, and so Lightning, without importing transformers.

Where transformers is installed, torchmetrics imports two names from it for its metrics of text.
That makes every start of a run about a fifth longer, and the run may never use them.
"""

import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from types import ModuleType
from typing import Any


def defer_transformers() -> None:
    """Let torchmetrics, when it is imported, have names that import transformers when used.

    Call it before the first import of Lightning. It changes nothing if torchmetrics or transformers
    has been imported by then. A thread that imports transformers at the same instant gets such
    names, too.
    """
    sys.meta_path.insert(0, _TorchmetricsFinder())


class _TorchmetricsFinder:
    """Find torchmetrics where Python does, and run it by ``_run``."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != "torchmetrics":
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is not None:
            loader: Any = spec.loader
            loader.exec_module = partial(_run, loader.exec_module)
        return spec


def _run(execute: Callable[[ModuleType], None], torchmetrics: ModuleType) -> None:
    """Execute the module ``torchmetrics`` with ``_Transformers`` in the place of transformers."""
    spec = None if "transformers" in sys.modules else find_spec("transformers")
    if spec is not None:
        sys.modules["transformers"] = _Transformers("transformers")
        sys.modules["transformers"].__spec__ = spec  # for whoever asks whether it is installed
        try:
            # Another version may want more than names: it gets the real one below.
            with suppress(ImportError):
                return execute(torchmetrics)
        finally:
            del sys.modules["transformers"]
    execute(torchmetrics)


class _Transformers(ModuleType):
    """In the place of the package: each of its names is a ``_Name``."""

    def __getattr__(self, name: str) -> "_Name":
        if name.startswith("__"):
            raise AttributeError(name)
        return _Name(name)


class _Name:
    """A class of transformers, which is imported when the class is used."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._load(), attribute)

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self._load()(*args, **options)

    def _load(self) -> Any:
        return getattr(import_module("transformers"), self._name)
