"""One process of one start of a run: find where to resume, build everything, say so.

Every process of the run does all of this. Rank 0 finds, decides and writes for all of them.
"""

import gc
import logging
import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self, TypeVar

import lightning as L
import torch
from omegaconf import DictConfig, OmegaConf

from exact_resume import distributed
from exact_resume.attempt import configure_logging, describe_attempt, record_start
from exact_resume.callbacks.checkpoint import Checkpoint
from exact_resume.callbacks.page import last_page
from exact_resume.callbacks.watchdog import arm_start_watchdog, disarm_start_watchdog
from exact_resume.checkpoint.remote import LostOwnershipError
from exact_resume.checkpoint.writer import TRANSIENT_ERRNOS, SaveError
from exact_resume.fingerprint import MAX_NAMES, Fingerprint
from exact_resume.reduction import reduction_id
from exact_resume.resume import (
    Guarantee,
    LastStart,
    ResumePoint,
    ResumeRefusedError,
    check_compatibility,
    describe_guarantee,
    is_restart,
    resolve_checkpoint,
    resolve_repeated,
    trajectories,
)
from exact_resume.run import Run
from exact_resume.second_copy import SecondCopy
from exact_resume.signals import PreemptedError, Preemption
from exact_resume.skips import NonFiniteLossError, SkippedBatch
from exact_resume.supervisor import die_with_parent, is_launched
from sturdy.data.changes import Change, list_changes
from sturdy.data.sides import SPLIT_KEYS, changes_since
from sturdy.errors import ConfigError, add_key, as_config_error
from sturdy.training.base import describe_trained, resolve_base
from sturdy.training.build import build_module
from sturdy.training.captions import caption_option, prepare_captions
from sturdy.training.fingerprint import (
    CAPTIONS,
    LATENTS,
    run_fingerprint,
)
from sturdy.training.finished import describe_finished, is_finished, resume_rules
from sturdy.training.init_from import differing_weights, find_source, init_from
from sturdy.training.latents import (
    check_encodable,
    describe_scales,
    encode_images,
    fill_in_channels,
)
from sturdy.training.match_weights import class_change
from sturdy.training.outcome import look_at_new_images
from sturdy.training.restart_config import find_previous_start, restore_config
from sturdy.training.trainer import (
    build_datamodule,
    build_trainer,
    check_accelerator,
    dry_run_forward,
    load_alignment_encoder,
    reduction_mode,
    resolve_run_defaults,
    set_reduction,
    training_device,
    usable_processes,
)

CHANGES = "changes.txt"  # in the directory of an attempt
OF_CLASSES = ("classes", "num_classes", "*.num_classes")  # keys
PACKAGES = ("exact_resume", "sturdy", "examples")  # whose log goes to the console

log = logging.getLogger(__name__)
T = TypeVar("T")


class Session:
    """One start of the run that ``cfg`` describes.

    Use it as a context: it holds the run's lock inside.

    Args:
        cfg: the composed config; it is copied.
        overrides: the words of the command.

    Attributes:
        run: the run's directory.
        point: where the run is resumed; None for a fresh start.
        module, data, trainer: built by ``prepare``.

    Raises:
        ResumeRefusedError: the run must not be entered like this; nothing was changed.
        AlreadyRunningError: another process trains in its directory.
        PeerLostError: another process of this run is gone.
    """

    module: Any
    data: Any
    trainer: L.Trainer

    def __init__(self, cfg: DictConfig, overrides: list[str]) -> None:
        self.cfg = cfg.copy()
        self.overrides = overrides
        self.ckpt_path_given = cfg.ckpt_path
        self.run = Run(Path(cfg.paths.runs) / cfg.name)
        self.point: ResumePoint | None = None
        self.finished = False
        self.is_restart = False
        self.previous_data: str | None = None  # digest of the data that a restarted run began with
        self.restored: list[str] = []  # what the restart has restored in the config, for people
        self.encoding_lines: list[str] = []  # about latents, for people
        self.changes: list[Change] = []  # of the images, since the resume point
        self.lock: IO[str] | None = None
        self.second_copy: SecondCopy | None = None  # on rank 0, where one is configured
        self.preemption = Preemption()

    @property
    def resume_path(self) -> Path | None:
        """The ``state.ckpt`` to resume from."""
        return self.point.state if self.point else None

    def __enter__(self) -> Self:
        """Meet the other processes, lock the run, and restore the config of a restart."""
        # cuBLAS reads it when CUDA starts, and is not deterministic without it.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        die_with_parent()
        self.preemption.install(training=False)
        self._arm_watchdog()
        with as_config_error():
            check_accelerator(self.cfg.trainer.accelerator)
        distributed.init_process_group(
            self.cfg.trainer.accelerator, usable=usable_processes(self.cfg)
        )
        with distributed.rank_zero_first(), as_config_error():
            if distributed.rank() == 0:
                self.lock = lock_run(self.run)
        self._fetch_second_copy()
        with as_config_error():
            self.skips = self.run.skips()
        self.base_lines = resolve_base(self.cfg)
        with distributed.rank_zero_first():
            fill_in_channels(self.cfg)
        self._resolve_repetition()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Release the lock of a run that ended well; that of any other dies with the process."""
        if self.second_copy and isinstance(error, Exception | PreemptedError):
            with suppress(LostOwnershipError):  # the error that ended the training comes first
                self.second_copy.leave()
        if self.lock and error is None:
            self.lock.close()

    def prepare(self) -> bool:
        """Find where the run is resumed, build everything and say so.

        Returns:
            Whether there is something to train.
        """
        if self.finished:
            return False
        self.point = distributed.run_on_rank_zero(self._resolve)
        point = self.point
        if point and distributed.run_on_rank_zero(lambda: is_finished(self.cfg, self.run, point)):
            if distributed.rank() == 0:
                print("\n    ".join(describe_finished(self.cfg, point)), flush=True)
                if self.second_copy:
                    self.second_copy.complete()
            return False
        with distributed.rank_zero_first():
            resolve_run_defaults(self.cfg, self.point)
        torch.set_num_threads(self.cfg.trainer.threads)
        self._open_data()
        config: dict[str, Any] = OmegaConf.to_container(self.cfg, resolve=True)  # type: ignore[assignment]
        disarm_start_watchdog()  # many captions take their time, and all processes wait for rank 0
        # Parts that do not go together are refused before anything is promised.
        with distributed.rank_zero_first(), as_config_error():
            self.module = build_module(config, fresh=self.point is None)
            prepare_captions(self.module, self.data, self.cfg)
            check_encodable(self.cfg, self.module, self.data)
            # A base is checked by its config: its forward passes would take minutes on a CPU.
            sizes = [] if self.base_lines else self.data.sizes()
            dry_run_forward(self.module, self.data.image_size, self.data.cache.channels, sizes)
        self._arm_watchdog()
        now = self._take_fingerprint(config)
        guarantee = distributed.run_on_rank_zero(lambda: self._check_compatibility(now))
        if self.module.space.cached:  # after a refusal, which must not wait for it
            self._encode_images()
            now.stack[LATENTS] = self.data.moments.digest
            guarantee = distributed.run_on_rank_zero(lambda: self._check_compatibility(now))
        self._check_processes_agree(now)
        attempt = distributed.run_on_rank_zero(self.run.next_attempt)
        configure_logging(attempt, distributed.rank(), PACKAGES)
        if distributed.rank() == 0:
            describe_attempt(attempt, config, self.overrides, now)
            banner = self._banner(guarantee)
            self._announce(banner)
            self._announce_changes(attempt)
            record_start(
                attempt,
                banner,
                step=self.point.step if self.point else 0,
                max_steps=self.cfg.trainer.max_steps,
                guarantee=guarantee,
                data=self._describe_data(),
            )
        self.trajectories = trajectories(self.point, guarantee)
        self._build_trainer(now, attempt)
        distributed.run_on_rank_zero(self._archive_newer)
        # A resume by another word than the given one happened before, and is not recorded again.
        if distributed.rank() == 0 and self.cfg.ckpt_path == self.ckpt_path_given:
            LastStart.at(self.ckpt_path_given, self.point).write(self.run.home)
        # Several processes leave together or not at all.
        self.preemption.install(training=distributed.world_size() > 1)
        return True

    @contextmanager
    def roll_back_on_nan(self) -> Iterator[None]:
        """Train inside; after a loss that is not finite, skip its batch and prepare to go on.

        Raises:
            PreemptedError: a signal came; what was trained is saved.
            FloatingPointError: too many batches were skipped.
        """
        try:
            writer: Any = self.trainer.strategy.checkpoint_io
            with last_page(self.trainer), writer:
                yield  # left when the last save is durable
        except NonFiniteLossError as error:
            skip = error.skip
        except PreemptedError:
            self._arm_watchdog()
            if self.second_copy:
                self.second_copy.leave()
            # Leave together: a launcher takes the first process that leaves for dead.
            distributed.all_reduce_max(0)
            raise
        except SystemExit as error:
            if isinstance(error.__context__, KeyboardInterrupt):  # Lightning exits with 1 for it
                step = self.trainer.global_step
                raise PreemptedError(f"KeyboardInterrupt: stopped after step {step}") from None
            raise
        except RuntimeError as error:
            if distributed.is_peer_failure(error):
                message = "lost another process of this run"
                raise distributed.PeerLostError(message) from error
            raise
        else:
            self.finished = True
            if distributed.rank() == 0:
                step = self.trainer.global_step
                log.info(f"finished at step {step}; everything is in {self.run.home}")
            if self.second_copy:
                self.second_copy.finish(lambda: self.preemption.signal is not None)
            return
        self._skip(skip)

    def _skip(self, skip: SkippedBatch) -> None:
        """Record ``skip``, and prepare to resume before it."""
        del self.trainer, self.module, self.data
        gc.collect()  # frees workers and device memory before the next trainer is built
        with distributed.rank_zero_first():
            self._record_skip(skip)
        if number := distributed.all_reduce_max(self.preemption.signal or 0):
            name = signal.Signals(number).name
            raise PreemptedError(f"{name}: went back to the last checkpoint")
        self.preemption.install(training=False)
        self._arm_watchdog()
        self.cfg.ckpt_path = "auto" if self.cfg.ckpt_path in ("auto", None) else "last"

    def _record_skip(self, skip: SkippedBatch) -> None:
        """Record that ``skip`` is left out, or give up.

        Raises:
            FloatingPointError: ``callbacks.guard.max_skips`` batches were left out before.
            SaveError: it cannot be recorded.
        """
        max_skips = self.cfg.callbacks.guard.max_skips
        before = self.skips.entries
        if len(before) >= max_skips:
            lines = [f"    {s}\n        images {', '.join(s.images)}" for s in (*before, skip)]
            report = "\n".join(lines)
            raise FloatingPointError(
                f"training diverged {len(lines)} times, and callbacks.guard.max_skips={max_skips} "
                f"batches may be left out:\n{report}\nLook at these images. Or lower optimizer.lr "
                f"or clip, and continue with ckpt_path=last and a larger callbacks.guard.max_skips"
            )
        if distributed.rank():
            self.skips.entries.append(skip)
            return
        path = self.skips.path
        try:
            self.skips.add(skip)
        except OSError as error:
            raise SaveError(
                f"{path} could not be written: {error}. Mend that and run the same command again"
            ) from None
        log.warning(
            f"{skip}\nback to the last checkpoint; this batch is left out, {path} names its images"
        )

    def _arm_watchdog(self) -> None:
        """Limit the time of the start, where a launcher starts this process again."""
        if is_launched() and self.cfg.callbacks.get("watchdog"):
            arm_start_watchdog(self.cfg.callbacks.watchdog.start)

    def _fetch_second_copy(self) -> None:
        """Fetch what is newer in the second copy of the run, if it is to have one."""
        url = OmegaConf.select(self.cfg, "callbacks.checkpoint.remote")
        if not url:
            return

        def fetch() -> None:
            is_fresh = self.ckpt_path_given is None and not is_restart(self.cfg.as_begun)
            with as_config_error("callbacks.checkpoint", ["remote"]):
                self.second_copy = SecondCopy(self.run, str(url), self.cfg.name)
                self.second_copy.fetch_newest(fresh=is_fresh)

        disarm_start_watchdog()  # it may take hours, and the other processes wait for rank 0
        distributed.run_on_rank_zero(fetch)
        self._arm_watchdog()

    def _archive_newer(self) -> None:
        """Put aside what a resume goes back behind, elsewhere first, and begin to copy."""
        if self.second_copy:
            self.second_copy.enter(self.point)
        self.run.archive_newer(self.point)
        if self.second_copy:
            for callback in self.trainer.checkpoint_callbacks:
                if isinstance(callback, Checkpoint):
                    self.second_copy.start(callback)

    def _resolve_repetition(self) -> None:
        """Settle what a repeated command and a restart continue, before anything else is read."""
        run = self.run
        cfg = self.cfg
        given = self.ckpt_path_given
        self.is_restart = distributed.run_on_rank_zero(lambda: is_restart(cfg.as_begun))
        cfg.ckpt_path = distributed.run_on_rank_zero(
            lambda: resolve_repeated(given, run.home, run.store, restart=self.is_restart)
        )
        if not self.is_restart:
            return
        ignore = cfg.resume.ignore
        previous = distributed.run_on_rank_zero(
            lambda: find_previous_start(run.home, self.overrides, ignore=ignore)
        )
        if previous:
            keep = [*ignore, *cfg.resume.rounding]
            self.previous_data = previous.data
            self.restored = restore_config(cfg, previous, keep=keep)

    def _resolve(self) -> ResumePoint | None:
        """Find the checkpoint to resume from, and remove what killed writers left."""
        checkpoint = self.cfg.callbacks.checkpoint
        store = self.run.store
        with as_config_error():  # the disk may be away
            store.remove_stale_temp()
            scores = self.run.metrics.column(checkpoint.monitor) | store.scores(checkpoint.monitor)
            if self.second_copy:
                self.second_copy.fetch_named(
                    self.cfg.ckpt_path, scores, monitor=checkpoint.monitor, mode=checkpoint.mode
                )
            return resolve_checkpoint(store, self.cfg.ckpt_path, scores, checkpoint.mode)

    def _stored_fingerprint(self) -> Mapping[str, Any]:
        return self.point.manifest.get("fingerprint", {}) if self.point else {}

    def _open_data(self) -> None:
        """Open the data in every process, on the files that rank 0 listed."""
        begun = None
        if self.is_restart:
            begun = self.previous_data or self._stored_fingerprint().get("data")
        data: Any = None
        with distributed.rank_zero_first(), as_config_error():
            if distributed.rank() == 0:
                data = build_datamodule(self.cfg, begun)
        digest = distributed.run_on_rank_zero(lambda: data.digest)
        if data is None:  # a file may have come to the folder since rank 0 listed it
            with as_config_error():
                data = build_datamodule(self.cfg, digest)
        data.skips = [(skip.step - 1, skip.position, skip.size) for skip in self.skips.entries]
        self.data = data

    def _take_fingerprint(self, config: Mapping[str, Any]) -> Fingerprint:
        cfg = self.cfg
        mode = reduction_mode(cfg, self.module)
        gradients = reduction_id(cfg.data.shards, distributed.world_size(), mode)
        option = caption_option(self.module)
        return run_fingerprint(
            config,
            self.data.digest,
            gradients,
            ignore=cfg.resume.ignore,
            space=self.module.space.key(),
            condition=option.key() if option else "",
            captions=option.digest if option else "",
        )

    def _check_processes_agree(self, now: Fingerprint) -> None:
        """Check that all processes have the same code, data and caches.

        Raises:
            ResumeRefusedError: one has others than rank 0.
        """
        caches = "".join(now.stack.get(name, "") for name in (CAPTIONS, LATENTS))
        everywhere = distributed.all_gather_object((now.code, now.data + caches))
        distributed.run_on_rank_zero(lambda: check_processes_agree(everywhere))

    def _check_compatibility(self, now: Fingerprint) -> Guarantee | None:
        if self.point is None:
            return None
        rules = resume_rules(self.cfg)
        stored = self._stored_fingerprint()
        config = dict(rules.added) | stored.get("config", {})
        then = {key: config[f"data.{key}"] for key in SPLIT_KEYS if f"data.{key}" in config}
        other_changes = self._other_changes(self.point)
        data = stored.get("data", now.data)
        self.changes = []
        if data != now.data:
            self.changes = changes_since(self.data, data, then)
        elif any(value != now.config.get(f"data.{key}", value) for key, value in then.items()):
            other_changes += [str(change) for change in changes_since(self.data, data, then)]
        if other_changes:  # these refuse, and say by name what the keys say by number
            rules = replace(rules, ignore=[*rules.ignore, *OF_CLASSES])
        return check_compatibility(
            self.point,
            now,
            rules,
            other_changes=other_changes,
            data_changes=[str(change) for change in self.changes],
        )

    def _other_changes(self, point: ResumePoint) -> list[str]:
        """Describe how classes and first weights differ from those of the run, one line each."""
        config = self._stored_fingerprint().get("config", {})
        stored_classes = [value for key, value in config.items() if key.startswith("classes.")]
        classes = None
        if config:
            now = {"classes": list(self.cfg.classes)}
            classes = class_change({"classes": stored_classes}, now)
        weights = differing_weights(
            point.manifest.get("init_from"),
            self.cfg.init_from,
            config.get("init_from"),
            Path(self.cfg.paths.runs),
        )
        return [line for line in (classes, weights) if line]

    def _announce(self, banner: str) -> None:
        """Say what was understood of the data, and whether the run is fresh or resumed."""
        for line in self.base_lines:
            log.info(line)
        if self.base_lines:
            log.info(describe_trained(self.module))
        for line in self.data.summary_lines():
            log.info(add_key(line, "data", self.cfg.data))
        if report := self.data.cache.report():
            log.warning(report)
        for line in self.encoding_lines:
            log.info(line)
        log.info(banner)
        for line in self.restored:
            log.warning(f"the configuration was edited: {line}")
        for line in self.data.notes:
            log.warning(add_key(line, "data", self.cfg.data))
        if option := caption_option(self.module):
            for line in option.notes:
                log.warning(line)

    def _describe_data(self) -> list[str]:
        """Return what was understood of the data, and what was left out, as it was announced."""
        lines = [*self.data.summary_lines(), *self.data.notes]
        named = [add_key(line, "data", self.cfg.data) for line in lines]
        return [*named, self.data.cache.report() or "no image is left out"]

    def _announce_changes(self, attempt: Path) -> None:
        """Keep the names of all images that came or went, and say how to look at the new ones."""
        if not self.changes:
            return
        path = attempt / CHANGES
        path.write_text(list_changes(self.changes))
        log.info(f"all changes of the images, by name: {path}")
        if any(change.new for change in self.changes):
            log.info(look_at_new_images(self.cfg))

    def _banner(self, guarantee: Guarantee | None) -> str:
        cfg = self.cfg
        labels = f"{len(self.data.classes) or 'no'} classes"
        if self.data.captions:
            labels = f"{len(self.data.captions)} captions"
        title = f"{cfg.name}: {len(self.data.cache)} images, {labels}"
        if distributed.world_size() > 1:
            title += f", {distributed.world_size()} processes"
        if spares := distributed.standing_by():
            others = "1 stands by" if spares == 1 else f"{spares} stand by"
            title += f" ({others}: there is no equal part of data.shards={cfg.data.shards} for all)"
        end = f"to step {cfg.trainer.max_steps}"
        if self.point is None or guarantee is None:
            return f"{title}; fresh, {end}"
        promise = describe_guarantee(guarantee)
        lines = [f"{title}; resumed from step {self.point.step}, {end} ({promise})"]
        return "\n    ".join(lines + guarantee.reasons)

    def _build_trainer(self, now: Fingerprint, attempt: Path) -> None:
        """Build the trainer, and give the module the weights that it begins with."""
        cfg = self.cfg

        def initial_source() -> Any:
            with as_config_error():
                if cfg.init_from and not self.point:
                    return find_source(str(cfg.init_from), Path(cfg.paths.runs))
            return None

        # Once for all processes: a run that is named may be training now.
        source = distributed.run_on_rank_zero(initial_source)
        with distributed.rank_zero_first(), as_config_error():
            self.trainer = build_trainer(
                cfg, self.run, now, self.preemption, attempt, self.trajectories
            )
            if source:
                summary = init_from(self.module, source)
                if distributed.rank() == 0:
                    log.info(summary)
        cache = Path(cfg.paths.cache) / "evaluation"
        load_alignment_encoder(self.module, self.data, self.point, cache)
        set_reduction(cfg, self.module, self.data)

    def _encode_images(self) -> None:
        """Encode the images into their cache, and keep what there is to say."""
        disarm_start_watchdog()  # it may take hours, and the other processes wait for rank 0
        torch.use_deterministic_algorithms(bool(self.cfg.trainer.deterministic))  # as in training
        line = encode_images(self.module, self.data, training_device(self.cfg.trainer.accelerator))
        self._arm_watchdog()
        self.encoding_lines = [line] if line else []
        if self.point is None:
            self.encoding_lines += describe_scales(self.cfg, self.module, self.data)


def lock_run(run: Run) -> IO[str]:
    """Lock the run; return the file that holds the lock.

    Raises:
        AlreadyRunningError: another process has it.
        ConfigError: nothing can be written there.
        OSError: for a failure that may pass, such as a network disk that is away.
    """
    try:
        return run.lock()
    except OSError as error:
        if error.errno in TRANSIENT_ERRNOS:
            raise
        if error.errno is None:  # the message says everything
            raise ConfigError(f"paths.runs: {error}") from error
        raise ConfigError(
            f"nothing can be written in paths.runs: {error}. Choose another place: paths.runs=..."
        ) from error


def check_processes_agree(everywhere: list[tuple[dict[str, str], str]]) -> None:
    """Check that all processes, by rank, would train with the same code and data.

    Raises:
        ResumeRefusedError: one has other code or data than rank 0.
    """
    code, data = everywhere[0]
    for rank, (its_code, its_data) in enumerate(everywhere):
        names = code.keys() | its_code.keys()
        changed = sorted(name for name in names if code.get(name) != its_code.get(name))
        if changed:
            shown = ", ".join(changed[:MAX_NAMES])
            raise ResumeRefusedError(
                f"process {rank} runs other code than process 0: {shown}; update it there"
            )
        if data != its_data:
            raise ResumeRefusedError(
                f"process {rank} has other data than process 0; see data.root and paths.cache there"
            )
