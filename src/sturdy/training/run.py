"""One start of a run: find where to enter it, say so, build it, train.

fresh or resumed or finished or refused  <-  (config, data, source, stack) against the store

Every process of the run does this; what is found, decided or written, rank 0 finds, decides and
writes.
"""

import gc
import logging
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from exact_resume import distributed
from exact_resume.archive import archive_newer_checkpoints
from exact_resume.attempt import configure_logging, describe_attempt, next_attempt
from exact_resume.callbacks.watchdog import arm_start_watchdog
from exact_resume.checkpoint.store import (
    CheckpointLoadError,
    CorruptCheckpointError,
    NoValidCheckpointError,
    Store,
)
from exact_resume.checkpoint.writer import TRANSIENT_ERRNOS, SaveError
from exact_resume.failures import OutOfMemoryError, is_out_of_memory
from exact_resume.fingerprint import MAX_NAMES, Guarantee, config_changes, fingerprint
from exact_resume.lock import AlreadyRunningError, lock_run
from exact_resume.metrics import MetricsCSV
from exact_resume.reduction import reduction_id
from exact_resume.resume import (
    MAX_REASONS,
    LastStart,
    ResumePoint,
    ResumeRefusedError,
    check_compatibility,
    resolve_checkpoint,
    resolve_repeated,
)
from exact_resume.signals import EXIT_RESUMABLE, PreemptedError, Preemption
from exact_resume.skips import NonFiniteLossError, SkipLog, SkippedBatch
from exact_resume.supervisor import die_with_parent, is_launched
from sturdy.errors import ConfigError, as_config_error
from sturdy.training.build import build_module
from sturdy.training.ema_snapshots import path_of
from sturdy.training.fingerprint import run_fingerprint
from sturdy.training.init_from import Source, find_source, init_from, other_weights
from sturdy.training.launch import EXIT_USAGE
from sturdy.training.match_weights import class_change
from sturdy.training.memory import out_of_memory
from sturdy.training.parts import (
    build_datamodule,
    build_trainer,
    check_accelerator,
    dry_run_forward,
    load_alignment_encoder,
    make_gradient_reducer,
    reduction_mode,
    resolve_run_defaults,
)
from sturdy.training.restart_config import (
    FROM_DATA,
    find_previous_start,
    is_restart,
    restore_config,
)

log = logging.getLogger(__name__)

STOPPED = ".stopped"  # in the run's directory: the newest step when a signal came last


def train(cfg: DictConfig, overrides: list[str]) -> int:
    """``run`` with what the user can mend told in a line instead of a traceback; returns the exit
    code.
    """
    die_with_parent()
    try:
        return run(cfg, overrides)
    except (
        ResumeRefusedError,
        AlreadyRunningError,
        NoValidCheckpointError,
        CheckpointLoadError,
        ConfigError,
    ) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    except (
        FloatingPointError,
        SaveError,
        OutOfMemoryError,
        CorruptCheckpointError,
        OSError,
    ) as error:
        log.debug("where it failed", exc_info=True)
        if distributed.rank() == 0 or not isinstance(error, FloatingPointError):  # all found that
            print(f"error: {error}", file=sys.stderr)
        return 1
    except distributed.PeerLostError as error:
        log.warning(f"process {distributed.rank()}: {error}")
        return 1
    except PreemptedError as stopped:
        again = "Use ckpt_path=auto" if cfg.ckpt_path is None else "Run the same command"
        if distributed.rank() == 0:
            tell = log.info if log.hasHandlers() else print
            tell(f"{stopped}. {again} to continue.")
            if stopped_here_before(Path(cfg.paths.runs) / cfg.name):
                tell(
                    "The start before this one was stopped at the same step: they need more time "
                    "than they are given."
                )
        return EXIT_RESUMABLE
    except Exception:
        log.debug("where it failed", exc_info=True)
        raise
    finally:
        distributed.destroy_process_group()


def run(cfg: DictConfig, overrides: list[str]) -> int:
    """Start, continue or recognise as finished the run ``cfg`` describes; returns the exit code.

    0: finished. 75: stopped by a signal and saved; the same command continues.

    Raises:
        ResumeRefusedError: if the run must not be entered like this; nothing was touched.
        AlreadyRunningError: if another process trains in its directory.
        PeerLostError: if another process of this run is gone.
    """
    os.environ.setdefault(
        "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
    )  # before CUDA starts; else cuBLAS is not deterministic
    preemption = Preemption()
    preemption.listen(training=False)
    arm_watchdog(cfg)
    with as_config_error():
        check_accelerator(cfg.trainer.accelerator)
    distributed.init_process_group(cfg.trainer.accelerator)
    home = Path(cfg.paths.runs) / cfg.name
    with distributed.rank_zero_first(), as_config_error():
        held = lock_home(home) if distributed.rank() == 0 else None
    with as_config_error():
        skips = SkipLog(home / "skips.jsonl")
    cfg = cfg.copy()  # the caller's still tells what was asked for
    asked = cfg.ckpt_path
    restart = distributed.run_on_rank_zero(lambda: is_restart(cfg.as_begun))
    cfg.ckpt_path = distributed.run_on_rank_zero(
        lambda: resolve_repeated(asked, home, Store(home / "checkpoints"), restart=restart)
    )
    start = Start(asked)
    if restart:
        beside = [*cfg.resume.ignore, *cfg.resume.rounding]
        begun = distributed.run_on_rank_zero(
            lambda: find_previous_start(home, overrides, ignore=cfg.resume.ignore)
        )
        start = Start(
            asked,
            True,
            begun.data if begun else None,
            restore_config(cfg, begun, keep=beside) if begun else [],
        )
    while True:
        try:
            code = start_or_resume(cfg, overrides, home, skips, preemption, start)
            if held:
                held.close()
            return code
        except NonFiniteLossError as bad:
            skip = bad.skip
        except Exception as error:
            if is_out_of_memory(error):
                raise out_of_memory(error, cfg) from error
            raise
        # the trainer that diverged goes now, with its workers and its memory on the device
        gc.collect()
        with distributed.rank_zero_first():
            skip_batch(skip, skips, cfg.callbacks.guard.max_skips)
        if number := distributed.all_reduce_max(preemption.signal or 0):
            raise PreemptedError(f"{signal.Signals(number).name}: went back to the last checkpoint")
        preemption.listen(training=False)
        arm_watchdog(cfg)
        cfg.ckpt_path = ckpt_path_after_restart(cfg.ckpt_path)


def stopped_here_before(home: Path) -> bool:
    """Whether the last signal to the run in ``home`` came at the same newest step; remember this
    one.
    """
    mark = home / STOPPED
    with suppress(OSError):
        newest = str(max(Store(home / "checkpoints").steps(), default=0))
        before = mark.read_text() if mark.exists() else None
        if home.is_dir():
            mark.write_text(newest)
        return before == newest
    return False


def lock_home(home: Path) -> Any:
    """Lock the run's directory ``home``, and make it; returns what holds the lock.

    Raises:
        AlreadyRunningError: if another process has it.
        ConfigError: if nothing can be written there.
        OSError: if it may pass, such as a network disk that is away.
    """
    try:
        return lock_run(home)
    except OSError as error:
        if error.errno in TRANSIENT_ERRNOS:
            raise
        if error.errno is None:  # ``lock`` has said it
            raise ConfigError(str(error)) from error
        raise ConfigError(
            f"nothing can be written in paths.runs: {error}. Choose another place: paths.runs=..."
        ) from error


def arm_watchdog(cfg: DictConfig) -> None:
    """Where somebody starts this process again, do not wait for the others for ever."""
    if is_launched() and cfg.callbacks.get("watchdog"):
        arm_start_watchdog(cfg.callbacks.watchdog.start)


def ckpt_path_after_restart(ckpt_path: str | None) -> str:
    """What to enter at once the run was entered at ``ckpt_path`` and has gone on from there."""
    return "auto" if ckpt_path in ("auto", None) else "last"


def skip_batch(skip: SkippedBatch, skips: SkipLog, max_skips: int) -> None:
    """Record ``skip``, for the run to be entered again before it; or give up.

    Raises:
        FloatingPointError: with the report, if ``max_skips`` batches were left out before.
        SaveError: if it cannot be recorded.
    """
    if (n := len(skips.entries)) >= max_skips:
        report = "\n".join(
            f"    {s}\n        images {', '.join(s.images)}" for s in (*skips.entries, skip)
        )
        raise FloatingPointError(
            f"training diverged {n + 1} times, and callbacks.guard.max_skips={max_skips} batches "
            f"may be left out:\n"
            f"{report}\nLook at these images. Or lower optimizer.lr or clip, and continue with "
            f"ckpt_path=last and a "
            f"larger callbacks.guard.max_skips"
        )
    if distributed.rank():
        skips.entries.append(skip)
        return
    try:
        skips.add(skip)
    except OSError as error:
        raise SaveError(
            f"{skips.path} could not be written: {error}. Mend that and run the same command again"
        ) from None
    log.warning(
        f"{skip}\nback to the last checkpoint; this batch is left out, {skips.path} names its "
        f"images"
    )


@dataclass(frozen=True)
class Start:
    """Who made this start, and how.

    Attributes:
        asked: ``ckpt_path`` as the user gave it.
        restart: whether no person made it: the run goes on with what it began with.
        data: digest of the data that it began with; None where that is not known.
        edited: what of the config differs from what it began with, a line each.
    """

    asked: str | None
    restart: bool = False
    data: str | None = None
    edited: Sequence[str] = ()


def start_or_resume(
    cfg: DictConfig,
    overrides: list[str],
    home: Path,
    skips: SkipLog,
    preemption: Preemption,
    start: Start,
) -> int:
    """Find where the run is entered, say so, and train to its end; arguments and results as of
    ``run``.
    """
    store, metrics = Store(home / "checkpoints"), MetricsCSV(home / "metrics.csv")

    def find() -> ResumePoint | None:
        monitor = cfg.callbacks.checkpoint
        with as_config_error():  # a disk that is away
            store.sweep()
            scores = metrics.column(monitor.monitor) | store.scores(monitor.monitor)
            return resolve_checkpoint(store, cfg.ckpt_path, scores, monitor.mode)

    entry = distributed.run_on_rank_zero(find)
    stored = entry.manifest.get("fingerprint", {}) if entry else {}
    if entry and distributed.run_on_rank_zero(lambda: is_finished(cfg, entry, metrics)):
        if distributed.rank() == 0:
            print("\n    ".join(describe_finished(cfg, entry)), flush=True)
        return 0
    with distributed.rank_zero_first():
        resolve_run_defaults(cfg, entry)
    torch.set_num_threads(cfg.trainer.threads)
    begun = (start.data or stored.get("data")) if start.restart else None
    with distributed.rank_zero_first(), as_config_error():
        data: Any = build_datamodule(cfg, begun) if distributed.rank() == 0 else None
    digest = distributed.run_on_rank_zero(lambda: data.digest)
    if (
        data is None
    ):  # the images that rank 0 has, though one more may have come to the folder since
        with as_config_error():
            data = build_datamodule(cfg, digest)
    data.skips = [(skip.step - 1, skip.position, skip.size) for skip in skips.entries]
    config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    gradients = reduction_id(cfg.data.shards, distributed.world_size(), reduction_mode(cfg))
    now = run_fingerprint(config, data.digest, gradients, ignore=cfg.resume.ignore)
    everywhere = distributed.all_gather_object((now.code, data.digest))
    distributed.run_on_rank_zero(lambda: check_all_alike(everywhere))

    def promise() -> Guarantee | None:
        changes = (
            data.changes_since(stored["data"])
            if stored.get("data", data.digest) != data.digest
            else []
        )
        odd = others(cfg, entry) if entry else ()
        return (
            check_compatibility(entry, now, **config["resume"], others=odd, data_changes=changes)
            if entry
            else None
        )

    guarantee = distributed.run_on_rank_zero(promise)
    with (
        distributed.rank_zero_first(),
        as_config_error(),
    ):  # what does not go together is refused before anything is promised
        module = build_module(config)
        dry_run_forward(module, data.image_size)
    attempt = distributed.run_on_rank_zero(lambda: next_attempt(home))
    configure_logging(attempt, distributed.rank())
    if distributed.rank() == 0:
        describe_attempt(attempt, config, overrides, now)
        for line in data.understood():
            log.info(line)
        if report := data.cache.report():
            log.warning(report)
        log.info(banner(cfg, data, entry, guarantee))
        for line in (
            *(f"the configuration was edited: {line}" for line in start.edited),
            *data.notes,
        ):
            log.warning(line)

    def source() -> Source | None:
        with as_config_error():
            return (
                find_source(str(cfg.init_from), Path(cfg.paths.runs))
                if cfg.init_from and not entry
                else None
            )

    initial = distributed.run_on_rank_zero(
        source
    )  # once, as a run that is named may be training now
    with distributed.rank_zero_first(), as_config_error():
        trainer = build_trainer(cfg, store, metrics, now, preemption, attempt)
        if initial:
            told = init_from(module, initial)
            if distributed.rank() == 0:
                log.info(told)
    load_alignment_encoder(module, data, entry, Path(cfg.paths.cache) / "evaluation")
    module.reduce_gradients = make_gradient_reducer(cfg, module)
    distributed.run_on_rank_zero(lambda: archive_newer_checkpoints(home, store, metrics, entry))
    if (
        distributed.rank() == 0 and cfg.ckpt_path == start.asked
    ):  # else it was entered by that word before
        LastStart.of(start.asked, entry).write(home)
    preemption.listen(training=distributed.world_size() > 1)  # several leave together or not at all
    try:
        # left when the last save is durable
        with trainer.strategy.checkpoint_io:  # type: ignore[attr-defined]
            trainer.fit(
                module, datamodule=data, ckpt_path=entry.state if entry else None, weights_only=True
            )
    except PreemptedError:
        arm_watchdog(cfg)
        distributed.all_reduce_max(
            0
        )  # a launcher takes the first that leaves for dead, and rank 0 has just saved
        raise
    except SystemExit as left:  # Lightning's exit code for it is 1
        if isinstance(left.__context__, KeyboardInterrupt):
            raise PreemptedError(
                f"KeyboardInterrupt: stopped after step {trainer.global_step}"
            ) from None
        raise
    except RuntimeError as error:
        if distributed.is_peer_failure(error):
            raise distributed.PeerLostError("lost another process of this run") from error
        raise
    if distributed.rank() == 0:
        log.info(f"finished at step {trainer.global_step}; everything is in {home}")
    return 0


def is_finished(cfg: DictConfig, entry: ResumePoint, metrics: MetricsCSV) -> bool:
    """Whether nothing is left to do after ``entry``: neither a step, nor the validation or the
    images of the last.
    """
    last, callbacks = cfg.trainer.max_steps, cfg.callbacks
    if entry.step != last:
        return entry.step > last
    validated = last % cfg.trainer.val_check_interval or last in metrics.column("val/loss")
    drawn = [
        Path(node.directory) / f"step-{last:08d}.png"
        for node in [callbacks.get("samples")]
        if on(node)
    ]
    kept = [
        path_of(Path(node.directory), last) for node in [callbacks.get("snapshots")] if on(node)
    ]
    return bool(validated) and all(path.exists() for path in (*drawn, *kept))


def on(node: DictConfig | None) -> bool:
    """Whether a callback that does something every N steps is switched on."""
    return bool(node and node.every_n_steps)


def others(cfg: DictConfig, entry: ResumePoint) -> list[str]:
    """Say in words where classes or first weights are not those of the run of ``entry``, a line
    each.
    """
    then = entry.manifest.get("fingerprint", {}).get("config", {})
    classes = [value for key, value in then.items() if key.startswith("classes.")]
    change = class_change({"classes": classes}, {"classes": list(cfg.classes)}) if then else None
    began, before = entry.manifest.get("init_from"), then.get("init_from")
    weights = other_weights(began, cfg.init_from, before, Path(cfg.paths.runs))
    return [line for line in (change, weights) if line]


def check_all_alike(everywhere: Sequence[tuple[Mapping[str, str], str]]) -> None:
    """Raise ResumeRefusedError if processes, by rank, would train with other code or data than rank
    0.
    """
    code, data = everywhere[0]
    for rank, (its_code, its_data) in enumerate(everywhere):
        if odd := sorted(
            name for name in code.keys() | its_code.keys() if code.get(name) != its_code.get(name)
        ):
            raise ResumeRefusedError(
                f"process {rank} runs other code than process 0: {', '.join(odd[:MAX_NAMES])}; "
                f"update it there"
            )
        if data != its_data:
            raise ResumeRefusedError(
                f"process {rank} has other data than process 0; see data.root and paths.cache there"
            )


def describe_finished(cfg: DictConfig, entry: ResumePoint) -> list[str]:
    """Say that there is nothing to do, and where the config is not the one that the run was trained
    with.
    """
    told = [
        f"{cfg.name}: finished at step {entry.step} (trainer.max_steps={cfg.trainer.max_steps}), "
        f"nothing to do"
    ]
    stored = entry.manifest.get("fingerprint", {})
    cfg = cfg.copy()
    for key in FROM_DATA:
        cfg[key] = stored.get("config", {}).get(key, cfg[key])
    beside = [*cfg.resume.ignore, *cfg.resume.rounding, *FROM_DATA, "init_from"]
    now = fingerprint(OmegaConf.to_container(cfg, resolve=True), stored.get("data", ""))  # type: ignore[arg-type]
    odd = (
        [*config_changes(stored, now, ignore=beside, added=cfg.resume.added).values()]
        if stored
        else []
    )
    if odd:
        told.append(
            "it was trained with another configuration; to train this one, give it a name of its "
            "own: name=..."
        )
    return told + odd[:MAX_REASONS]


def banner(
    cfg: DictConfig, data: Any, entry: ResumePoint | None, guarantee: Guarantee | None
) -> str:
    """The one thing said before training: fresh or resumed."""
    title = f"{cfg.name}: {len(data.cache)} images, {len(data.classes) or 'no'} classes"
    if distributed.world_size() > 1:
        title += f", {distributed.world_size()} processes"
    if entry is None:
        return f"{title}; fresh, to step {cfg.trainer.max_steps}"
    assert guarantee is not None
    promise = {
        "bitwise": "bitwise: same stack, same shards, deterministic kernels",
        "same samples": "same samples: order, noise and times are the same; rounding may differ",
        "refused": "no guarantee: the trajectory changed, and you asked to continue",
    }[guarantee.level]
    reasons = "".join(f"\n    {reason}" for reason in guarantee.reasons)
    return f"{title}; resumed from step {entry.step}, to step {cfg.trainer.max_steps} ({promise}){reasons}"
