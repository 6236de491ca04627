"""All that the project uses of Lightning although it is not public.

Each function says what it does and why there is no public way. Their tests
(tests/library/test_lightning_internals.py) say what a new version of Lightning has changed.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from torch.utils.data import DataLoader
from typing_extensions import override

from exact_resume.signals import outlive_first_signal


def disable_signal_handling(trainer: L.Trainer) -> None:
    """Have ``trainer`` neither handle signals nor send a tensor about them at every step.

    Lightning installs a handler for SIGTERM that communicates with the other processes wherever
    the signal arrives, which can hang. No argument of the Trainer turns it off.
    """
    trainer._signal_connector = _NoSignals(trainer)
    epoch_loop: Any = trainer.fit_loop.epoch_loop
    epoch_loop._broadcast_sigterm_tensor = lambda: None


def keep_data_workers(trainer: L.Trainer) -> None:
    """Have the workers of all data loaders of ``trainer`` outlive the signal of a process group.

    They set handlers of their own when they start, so this must come after. A strategy sees every
    loader before its workers start; a callback sees those for training only.
    """
    strategy: Any = trainer.strategy
    process = strategy.process_dataloader

    def process_dataloader(loader: Any) -> Any:
        loader = process(loader)
        if isinstance(loader, DataLoader):
            loader.worker_init_fn = partial(_start_worker, loader.worker_init_fn)
        return loader

    strategy.process_dataloader = process_dataloader


def _start_worker(init: Callable[[int], None] | None, worker: int) -> None:
    outlive_first_signal()
    if init:
        init(worker)


class _NoSignals(_SignalConnector):
    @override
    def register_signal_handlers(self) -> None:
        pass


def always_run_fit_loop(trainer: L.Trainer) -> None:
    """Have ``trainer.fit`` call ``on_train_start`` and ``on_train_end`` also at the last step.

    A run that was killed at its end makes up there what is missing. Lightning returns before these
    hooks if no step is left, and a hook that is called always (``setup``) comes too early.
    """
    old = trainer.fit_loop
    loop = _AlwaysRun(trainer, min_epochs=old.min_epochs, max_epochs=old.max_epochs)
    loop.epoch_loop = old.epoch_loop
    trainer.fit_loop = loop


class _AlwaysRun(_FitLoop):
    @property
    @override
    def skip(self) -> bool:
        return False


def run_validation(trainer: L.Trainer) -> None:
    """Validate now, inside ``trainer.fit`` and before its first step (in ``on_train_start``).

    ``trainer.validate`` ends the fit around it, and ``val_check_interval`` only counts steps.
    """
    loop: Any = trainer.fit_loop.epoch_loop.val_loop
    loop.restarting = False
    trainer.validating = True
    loop.run()
    trainer.training = True


def is_in_step(trainer: L.Trainer) -> bool:
    """Return whether a training step has begun and its weights are not final yet.

    Callbacks are called before and after a step, but none is told that its batch was fetched and
    the step itself has not begun.
    """
    batches: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return bool(batches.started != batches.processed)


def reset_batch_progress(trainer: L.Trainer) -> None:
    """Count neither a batch that was fetched and not computed, nor those of an open validation.

    Call it before a save in the middle of either: the resumed run will do them again. Lightning
    saves its counters as they are, and has no public way to set them.
    """
    loop: Any = trainer.fit_loop.epoch_loop
    for batches in (loop.batch_progress.total, loop.batch_progress.current):
        batches.ready = batches.started
    loop.val_loop.batch_progress.reset()
