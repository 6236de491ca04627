"""Make the training of any LightningModule unlosable.

    training = ExactTraining("runs/digits", seed=0, config={"lr": 1e-3})
    trainer = L.Trainer(max_steps=400, **training.trainer_options())
    data = PositionData(train_set, val_set, batch_size=64)
    sys.exit(training.fit(trainer, module, data))

Kill it at any instant and run the same command again: the weights come out bit for bit the same, on
the same stack and with the same number of processes. ``ExactTraining(..., processes=2)`` starts two
processes, and adds up their gradients in an order that a resumed run repeats.
"""

import logging
import sys
from collections.abc import Mapping, Sequence
from importlib.util import spec_from_file_location
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from exact_resume import distributed
from exact_resume.attempt import configure_logging, describe_attempt, record_start
from exact_resume.callbacks.checkpoint import Checkpoint
from exact_resume.callbacks.page import Page, last_page
from exact_resume.callbacks.preemption import AgreeOnSignal, SaveOnSignal
from exact_resume.callbacks.record import Record
from exact_resume.callbacks.reduce_gradients import ReduceGradients
from exact_resume.checkpoint.remote import (
    LostOwnershipError,
    RemoteDeniedError,
    RemoteUnavailableError,
)
from exact_resume.checkpoint.store import NoValidCheckpointError
from exact_resume.checkpoint.writer import StoreCheckpointIO
from exact_resume.code_hash import code_hashes, file_hash, imports
from exact_resume.data import PositionData
from exact_resume.fingerprint import PACKAGES, Fingerprint, fingerprint
from exact_resume.randomness import reseed
from exact_resume.resume import (
    Guarantee,
    LastStart,
    ResumePoint,
    ResumeRefusedError,
    Rules,
    check_compatibility,
    describe_guarantee,
    is_restart,
    monitored_scores,
    resolve_checkpoint,
    resolve_repeated,
    trajectories,
)
from exact_resume.run import AlreadyRunningError, Run
from exact_resume.second_copy import SecondCopy
from exact_resume.signals import EXIT_RESUMABLE, PreemptedError, Preemption
from exact_resume.strategy import DDP, trainer_devices
from exact_resume.supervisor import (
    EXIT_FAILED,
    EXIT_REFUSED,
    die_with_parent,
    is_launched,
    supervise,
)


class Reseed(Callback):
    """Seed the default generators before every batch, as a function of (seed, batch, rank).

    So dropout, and whatever else draws from them, has no state to save.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.batch = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin with the first batch after the resume point."""
        self.batch = trainer.global_step * trainer.accumulate_grad_batches

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        """Seed the forward pass of this batch."""
        reseed(self.seed, "batch", self.batch, trainer.global_rank)
        self.batch += 1

    def on_validation_batch_start(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Seed the validation of this batch, the same way at every validation."""
        reseed(self.seed, "validation", dataloader_idx, batch_idx, trainer.global_rank)


class ExactTraining:
    """One unlosable training in the directory ``home``.

    Args:
        home: the run's directory; it holds the checkpoints and the record.
        seed: of everything random in the forward pass.
        config: everything that makes the trajectory, as nested primitives: a change is refused.
        rules: changes of the config that are accepted nevertheless.
        checkpoint: when a checkpoint is written, and which are kept.
        packages: loggers whose messages go to the console and to the attempt's log.
        processes: how many ``fit`` starts, each of which runs the script from its beginning. It
            does not count under torchrun or srun, which start them.
        restarts: how often ``fit`` starts them again after one has died.
        page: whether to keep ``index.html`` in ``home`` up to date, a page to watch the training.
    """

    def __init__(
        self,
        home: str | Path,
        *,
        seed: int = 0,
        config: Mapping[str, Any] | None = None,
        rules: Rules | None = None,
        checkpoint: Checkpoint | None = None,
        packages: Sequence[str] = ("exact_resume",),
        processes: int = 1,
        restarts: int = 0,
        page: bool = True,
    ) -> None:
        self.run = Run(home)
        self.seed = seed
        self.config = dict(config or {})
        self.rules = rules or Rules()
        self.checkpoint = checkpoint or Checkpoint()
        self.packages = packages
        self.processes = processes
        self.restarts = restarts
        self.page = page
        self.preemption = Preemption()
        self.now: Fingerprint | None = None
        self.trajectories: list[dict[str, Any]] = []
        self.second_copy: SecondCopy | None = None  # on rank 0, if the checkpoint has a ``remote``

    def trainer_options(self) -> dict[str, Any]:
        """Meet the other processes; return the options of ``lightning.Trainer`` that are needed.

        The trainer's own ``max_steps``, ``val_check_interval`` (in steps), ``accelerator``,
        ``precision``, ``gradient_clip_val`` and so on are free. Further callbacks go after these:
        ``callbacks=[*options.pop("callbacks"), MyCallback()]``.
        """
        die_with_parent()
        distributed.init_process_group("auto")
        for library in ("lightning.pytorch", "lightning.fabric"):
            logging.getLogger(library).setLevel(logging.WARNING)
        several: dict[str, Any] = {}
        reduce: list[Callback] = []
        plugins: list[Any] = [StoreCheckpointIO(self.run.store, self._metadata)]
        if distributed.world_size() > 1:
            several = {"strategy": DDP(), **trainer_devices()}
            reduce = [ReduceGradients()]
            plugins.append(distributed.cluster_environment())
        return several | {
            "callbacks": [
                *reduce,
                AgreeOnSignal(self.preemption),
                Reseed(self.seed),
                Record(self.run.metrics),
                SaveOnSignal(self.preemption),
                *([Page()] if self.page else []),
                self.checkpoint,
            ],
            "logger": self.run.metrics,
            "plugins": plugins,
            "deterministic": True,
            "max_epochs": -1,
            "check_val_every_n_epoch": None,
            "use_distributed_sampler": False,
            "num_sanity_val_steps": 0,
            "enable_model_summary": False,
        }

    def fit(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        data: PositionData,
        ckpt_path: str | None = "auto",
    ) -> int:
        """Start the training, or continue it from the newest verified checkpoint.

        Args:
            trainer: made with ``trainer_options()``.
            module: its initial weights must be a function of a seed.
            data: the stream of samples.
            ckpt_path: ``auto``, ``last``, ``best``, a step, a path, or None to start afresh.

        Returns:
            The exit code: 0 finished, 1 a process is gone, 2 refused (the trajectory changed,
            another process trains in this directory, or no checkpoint verifies; nothing was
            changed), 75 stopped by a signal and saved, or the second copy cannot be reached: the
            same command continues it.
        """
        if not is_launched() and (self.processes > 1 or self.restarts):
            return supervise(
                [sys.executable, *sys.orig_argv[1:]],
                processes=self.processes,
                restarts=self.restarts,
                progress=self.run.newest_step,
            )
        try:
            with distributed.peer_errors():
                return self._fit(trainer, module, data, ckpt_path)
        except (ResumeRefusedError, AlreadyRunningError, NoValidCheckpointError) as error:
            print(f"error: {error}", file=sys.stderr)
            return EXIT_REFUSED
        except RemoteUnavailableError as error:
            print(f"error: {error}. Run the same command again", file=sys.stderr)
            return EXIT_REFUSED if isinstance(error, RemoteDeniedError) else EXIT_RESUMABLE
        except distributed.PeerLostError as error:
            print(f"process {distributed.rank()}: {error}", file=sys.stderr)
            return EXIT_FAILED
        finally:
            distributed.destroy_process_group()
            self.preemption.restore()

    def _fit(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        data: PositionData,
        ckpt_path: str | None,
    ) -> int:
        if trainer.world_size != distributed.world_size():
            raise ResumeRefusedError(
                f"the trainer would start {trainer.world_size} processes by itself. Say "
                f"ExactTraining(processes={trainer.world_size}) instead of devices= and strategy=, "
                f"or take one device with devices=1"
            )
        self.preemption.install(training=False)
        lock = None
        with distributed.rank_zero_first():
            if distributed.rank() == 0:
                lock = self.run.lock()
        distributed.run_on_rank_zero(lambda: self._fetch_second_copy(ckpt_path))
        word, point = distributed.run_on_rank_zero(lambda: self._resolve(ckpt_path))
        if point and point.step >= trainer.max_steps:
            self._say(f"finished at step {point.step}, nothing to do")
            if self.second_copy:
                self.second_copy.complete()
            return 0
        self.now = now = self._take_fingerprint(module, data)
        guarantee = distributed.run_on_rank_zero(lambda: self._judge(point, now))
        attempt = distributed.run_on_rank_zero(self.run.next_attempt)
        configure_logging(attempt, distributed.rank(), self.packages)
        if distributed.rank() == 0:
            describe_attempt(attempt, self.config, sys.argv[1:], now)
            banner = describe_entry(point, guarantee, trainer.max_steps)
            record_start(
                attempt,
                banner,
                step=point.step if point else 0,
                max_steps=trainer.max_steps,
                guarantee=guarantee,
            )
            self._say(banner)
        distributed.run_on_rank_zero(lambda: self._archive_newer(point))
        if word == ckpt_path and distributed.rank() == 0:
            LastStart.at(ckpt_path, point).write(self.run.home)
        # Several processes leave together or not at all.
        self.preemption.install(training=distributed.world_size() > 1)
        try:
            with last_page(trainer), trainer.strategy.checkpoint_io:  # type: ignore[attr-defined]
                path = point.state if point else None
                trainer.fit(module, datamodule=data, ckpt_path=path, weights_only=True)
        except PreemptedError as stop:
            if self.second_copy:
                self.second_copy.leave()
            distributed.all_reduce_max(0)  # a launcher takes the first that leaves for dead
            if distributed.rank() == 0:
                print(f"{stop}. Run the same command to continue.", flush=True)
            return EXIT_RESUMABLE
        except LostOwnershipError:
            raise
        except Exception:
            if self.second_copy:
                self.second_copy.leave()
            raise
        self._say(f"finished at step {trainer.global_step}")
        if self.second_copy:
            self.second_copy.finish(lambda: self.preemption.signal is not None)
        if lock:
            lock.close()
        return 0

    def _fetch_second_copy(self, ckpt_path: str | None) -> None:
        """Fetch what is newer in the second copy of the run, if it is to have one."""
        if self.checkpoint.remote:
            try:
                self.second_copy = SecondCopy(self.run, self.checkpoint.remote)
            except ValueError as error:
                raise ResumeRefusedError(str(error)) from None
            self.second_copy.fetch_newest(fresh=ckpt_path is None and not is_restart())

    def _archive_newer(self, point: ResumePoint | None) -> None:
        """Put aside what a resume goes back behind, elsewhere first, and begin to copy."""
        if self.second_copy:
            self.second_copy.enter(point)
        self.run.archive_newer(point)
        if self.second_copy:
            self.second_copy.start(self.checkpoint)

    def _say(self, text: str) -> None:
        if distributed.rank() == 0:
            print(f"{self.run.home}: {text}", flush=True)

    def _judge(self, point: ResumePoint | None, now: Fingerprint) -> Guarantee | None:
        """Return what a resume at ``point`` promises; None for a fresh start.

        Raises:
            ResumeRefusedError: the trajectory changed.
        """
        if point is None:
            return None
        guarantee = check_compatibility(point, now, self.rules)
        self.trajectories = trajectories(point, guarantee)
        return guarantee

    def _resolve(self, ckpt_path: str | None) -> tuple[str | None, ResumePoint | None]:
        """Return the word to resolve, which a repeated command changes, and what it means."""
        store = self.run.store
        word = resolve_repeated(ckpt_path, self.run.home, store, restart=is_restart())
        store.remove_stale_temp()
        monitor = self.checkpoint.monitor or ""
        _, _, older = monitored_scores(self.run.home, store)
        scores = older | self.run.metrics.column(monitor) | store.scores(monitor)
        if self.second_copy:
            self.second_copy.fetch_named(word, scores, monitor=monitor, mode=self.checkpoint.mode)
        return word, resolve_checkpoint(store, word, scores, self.checkpoint.mode)

    def _take_fingerprint(self, module: L.LightningModule, data: PositionData) -> Fingerprint:
        """Identify this training by its config, its data and the code that it runs."""
        config = {
            **self.config,
            "seed": self.seed,
            "data": {"batch_size": data.batch_size, "seed": data.seed},
            "trainer": {"deterministic": True},
        }
        classes = [type(module), type(data.train)]
        return fingerprint(
            config,
            data.digest,
            f"mean over {distributed.world_size()} processes",
            code=hash_code(classes),
        )

    def _metadata(self, checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
        assert self.now is not None
        position = checkpoint["PositionData"]["position"]
        entries: dict[str, Any] = {"position": position, "fingerprint": self.now.as_dict()}
        return entries | ({"trajectories": self.trajectories} if self.trajectories else {})


def describe_entry(point: ResumePoint | None, guarantee: Guarantee | None, last: int) -> str:
    """Return the banner of a training that goes from ``point`` to step ``last``."""
    if point is None or guarantee is None:
        return f"fresh, to step {last}"
    promise = describe_guarantee(guarantee)
    lines = [f"resumed from step {point.step}, to step {last} ({promise})"]
    return "\n    ".join(lines + guarantee.reasons)


def hash_code(classes: Sequence[type]) -> dict[str, str]:
    """Hash the modules that ``classes`` are defined in, and the modules that these import."""
    roots = ["exact_resume.data", "exact_resume.training"]
    hashes: dict[str, str] = {}
    for cls in classes:
        if cls.__module__ != "__main__":
            roots.append(f"{cls.__module__}.{cls.__qualname__}")
            continue
        script = Path(str(sys.modules["__main__"].__file__))
        spec = spec_from_file_location("__main__", script)
        if spec:
            hashes["__main__"] = file_hash(script)
            roots += imports(spec)
    return hashes | code_hashes(roots, leave_out=["exact_resume*"], known=PACKAGES)
