"""Exact resume for any Lightning project: kill a training at any instant, and lose nothing.

The public names are imported when they are first used, because PyTorch and Lightning take seconds.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from exact_resume.lazy_transformers import defer_transformers

if TYPE_CHECKING:
    from exact_resume.callbacks.checkpoint import Checkpoint
    from exact_resume.checkpoint.store import Store
    from exact_resume.data import PositionData
    from exact_resume.fingerprint import Fingerprint
    from exact_resume.randomness import Draws, generator, reseed
    from exact_resume.resume import Guarantee, ResumeRefusedError, Rules
    from exact_resume.run import Run
    from exact_resume.training import ExactTraining

__all__ = [
    "Checkpoint",
    "Draws",
    "ExactTraining",
    "Fingerprint",
    "Guarantee",
    "PositionData",
    "ResumeRefusedError",
    "Rules",
    "Run",
    "Store",
    "generator",
    "reseed",
]

_MODULES = {
    "Checkpoint": "callbacks.checkpoint",
    "Draws": "randomness",
    "ExactTraining": "training",
    "Fingerprint": "fingerprint",
    "Guarantee": "resume",
    "PositionData": "data",
    "ResumeRefusedError": "resume",
    "Rules": "resume",
    "Run": "run",
    "Store": "checkpoint.store",
    "generator": "randomness",
    "reseed": "randomness",
}

defer_transformers()


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
