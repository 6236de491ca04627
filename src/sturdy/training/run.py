"""One start of a run: find where to enter it, say so, build it, train.

fresh or resumed or finished or refused  <-  (config, data, source, stack) against the store
"""

import gc
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig, OmegaConf

from sturdy.resume.entry import Entry, Refused, find_entry, judge
from sturdy.resume.fingerprint import Fingerprint, Guarantee, fingerprint
from sturdy.resume.lock import AlreadyRunning, lock
from sturdy.resume.preemption import RESUMABLE, Preempted, Preemption
from sturdy.resume.skips import Diverged, Skip, Skips
from sturdy.resume.store import NothingVerifies, Store, Unloadable
from sturdy.resume.writer import SaveFailed, StoreIO
from sturdy.training.attempt import CONSOLE, describe_attempt, start_attempt
from sturdy.training.branch import leave_branch
from sturdy.training.build import build, init_from
from sturdy.training.callbacks.guard import Guard
from sturdy.training.callbacks.preempt import Preempt
from sturdy.training.callbacks.record import Record
from sturdy.training.loggers.metrics_file import MetricsFile
from sturdy.training.module import DiffusionModule


def train(cfg: DictConfig, overrides: list[str]) -> int:
    """``run`` with what the user can mend told in a line instead of a traceback; returns the exit code."""
    try:
        return run(cfg, overrides)
    except (Refused, AlreadyRunning, NothingVerifies, Unloadable, Unfit) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (FloatingPointError, SaveFailed, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Preempted as stopped:
        again = "Run the same command" if cfg.ckpt_path in ("auto", "last") else "Use ckpt_path=auto"
        (CONSOLE.info if CONSOLE.handlers else print)(f"{stopped}. {again} to continue.")
        return RESUMABLE


class Unfit(Exception):
    """Data or parts that cannot be built as configured; nothing was trained."""


@contextmanager
def unfit() -> Iterator[None]:
    """Turn what building raises about its arguments into ``Unfit``, without Hydra's wrapping."""
    try:
        yield
    except (InstantiationException, ValueError, OSError) as error:
        raise Unfit(str(error.__cause__ or error)) from error


def run(cfg: DictConfig, overrides: list[str]) -> int:
    """Start, continue or recognise as finished the run ``cfg`` describes; returns the exit code.

    0: finished. 75: stopped by a signal and saved; the same command continues.

    Raises:
        Refused: if the run must not be entered like this; nothing was touched.
        AlreadyRunning: if another process trains in its directory.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA starts; else cuBLAS is not deterministic
    preemption = Preemption()
    preemption.listen(training=False)
    check_settings(cfg)
    home = Path(cfg.paths.runs) / cfg.name
    held = lock(home)
    with unfit():
        skips = Skips(home / "skips.jsonl")
    cfg = cfg.copy()  # the caller's still tells what was asked for
    while True:
        try:
            code = enter(cfg, overrides, home, skips, preemption)
            held.close()
            return code
        except Diverged as bad:
            skip = bad.skip
        gc.collect()  # the trainer that diverged goes now, with its workers and its memory on the device
        leave_out(skip, skips, cfg.callbacks.guard.max_skips)
        if preemption.signal:
            raise Preempted(f"{preemption.signal.name}: went back to the last checkpoint")
        preemption.listen(training=False)
        cfg.ckpt_path = "auto" if cfg.ckpt_path in ("auto", None) else "last"


def leave_out(skip: Skip, skips: Skips, max_skips: int) -> None:
    """Record ``skip``, for the run to be entered again before it; or give up.

    Raises:
        FloatingPointError: with the report, if ``max_skips`` batches were left out before.
        SaveFailed: if it cannot be recorded.
    """
    if (n := len(skips.entries)) >= max_skips:
        report = "\n".join(f"    {s}\n        images {', '.join(s.images)}" for s in (*skips.entries, skip))
        raise FloatingPointError(
            f"training diverged {n + 1} times, and callbacks.guard.max_skips={max_skips} batches may be left out:\n"
            f"{report}\nLook at these images. Or lower optimizer.lr or clip, and continue with ckpt_path=last and a "
            f"larger callbacks.guard.max_skips"
        )
    try:
        skips.add(skip)
    except OSError as error:
        raise SaveFailed(
            f"{skips.path} could not be written: {error}. Mend that and run the same command again"
        ) from None
    CONSOLE.warning(f"{skip}\nback to the last checkpoint; this batch is left out, {skips.path} names its images")


def enter(cfg: DictConfig, overrides: list[str], home: Path, skips: Skips, preemption: Preemption) -> int:
    """Find where the run is entered, say so, and train to its end; arguments and results as of ``run``."""
    store, metrics = Store(home / "checkpoints"), MetricsFile(home / "metrics.csv")
    monitor = cfg.callbacks.checkpoint
    with unfit():  # a disk that is away
        store.sweep()
        entry = find_entry(store, cfg.ckpt_path, metrics.column(monitor.monitor), monitor.mode)
    settle(cfg, entry)
    torch.set_num_threads(cfg.trainer.threads)
    with unfit():
        data = open_data(cfg)
    data.skips = [(skip.step - 1, skip.position, skip.size) for skip in skips.entries]
    config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    now = fingerprint(config, data.digest)
    guarantee = judge(entry, now, **config["resume"]) if entry else None
    attempt = start_attempt(home)
    describe_attempt(attempt, config, overrides, now.stack)
    if report := data.cache.report():
        CONSOLE.warning(report)
    CONSOLE.info(banner(cfg, data, entry, guarantee))
    if entry and entry.step >= cfg.trainer.max_steps:
        return 0
    with unfit():
        module = build(config)
        try_out(module, data.image_size)
        trainer = make_trainer(cfg, store, metrics, now, preemption)
        if cfg.init_from and not entry:
            init_from(module, cfg.init_from)
            CONSOLE.info(f"initialised from the EMA weights of {cfg.init_from}")
    leave_branch(home, store, metrics, entry)
    with trainer.strategy.checkpoint_io:  # type: ignore[attr-defined]  # left when the last save is durable
        trainer.fit(module, datamodule=data, ckpt_path=entry.state if entry else None, weights_only=True)
    CONSOLE.info(f"finished at step {trainer.global_step}; everything is in {home}")
    return 0


def check_settings(cfg: DictConfig) -> None:
    """Raises Unfit for values of Lightning's keys that would break the promise, or mean something else there."""
    for key in ("max_steps", "val_check_interval", "log_every_n_steps"):
        if not isinstance(cfg.trainer[key], int) or cfg.trainer[key] < 1:
            raise Unfit(f"trainer.{key}={cfg.trainer[key]} must be a whole number of steps, 1 or more")
    if str(cfg.trainer.precision) not in ("32-true", "32", "bf16-mixed"):
        raise Unfit(
            f"trainer.precision={cfg.trainer.precision}: use 32-true or bf16-mixed. 16-bit floats need a loss scale, "
            f"whose history a step is not a function of, and weights kept in 16 bits lose the small steps of the EMA"
        )
    if cfg.trainer.devices not in (1, "auto", "1"):
        raise Unfit(f"trainer.devices={cfg.trainer.devices}: this version trains in one process; use trainer.devices=1")


def settle(cfg: DictConfig, entry: Entry | None) -> None:
    """Fill in what is decided at the first start and then belongs to the run: shards and threads."""
    stored = entry.manifest.get("fingerprint", {}).get("config", {}) if entry else {}
    if cfg.data.shards is None:
        cfg.data.shards = stored.get("data.shards", 1)
    if cfg.trainer.threads is None:
        cfg.trainer.threads = stored.get("trainer.threads", len(os.sched_getaffinity(0)))


def open_data(cfg: DictConfig) -> Any:
    """The data module with its cache open; its classes go into the config, for the backbone to know."""
    data = instantiate(cfg.data)
    data.open()
    cfg.classes = list(data.classes)
    cfg.num_classes = len(data.classes)
    return data


def try_out(module: DiffusionModule, size: int) -> None:
    """One picture goes through before training, for its size may not fit the backbone; raises what that says."""
    with torch.no_grad():
        module.ema.model(torch.zeros(1, 3, size, size), torch.full((1,), 0.5), None)


def banner(cfg: DictConfig, data: Any, entry: Entry | None, guarantee: Guarantee | None) -> str:
    """The one thing said before training: fresh, resumed or finished."""
    title = f"{cfg.name}: {len(data.cache)} images, {len(data.classes) or 'no'} classes"
    if entry is None:
        return f"{title}; fresh, to step {cfg.trainer.max_steps}"
    if entry.step >= cfg.trainer.max_steps:
        return f"{title}; finished at step {entry.step} (trainer.max_steps={cfg.trainer.max_steps}), nothing to do"
    assert guarantee is not None
    promise = {
        "bitwise": "bitwise: same stack, same shards, deterministic kernels",
        "same samples": "same samples: order, noise and times are the same; rounding may differ",
        "refused": "no guarantee: the trajectory changed, and you asked to continue",
    }[guarantee.level]
    reasons = "".join(f"\n    {reason}" for reason in guarantee.reasons)
    return f"{title}; resumed from step {entry.step}, to step {cfg.trainer.max_steps} ({promise}){reasons}"


def make_trainer(
    cfg: DictConfig, store: Store, metrics: MetricsFile, now: Fingerprint, preemption: Preemption
) -> L.Trainer:
    """Lightning's Trainer, with what this project holds fixed about it."""

    def facts(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"position": checkpoint["ImageData"]["position"], "fingerprint": now.as_dict()}

    callbacks: list[Callback] = [
        Record(metrics),
        Preempt(preemption),  # before those that take their time after a step
        *instantiate(cfg.callbacks, _convert_="all").values(),
    ]
    callbacks.sort(key=lambda callback: not isinstance(callback, Guard))  # what is bad it sees before all others
    mirrors = [*instantiate(cfg.logger, _convert_="all").values()] if cfg.logger else []
    for mirror in mirrors:
        mirror.log_hyperparams(OmegaConf.to_container(cfg, resolve=True))
    settings = {k: v for k, v in cfg.trainer.items() if k != "threads"}
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    return instantiate(
        settings,
        callbacks=callbacks,
        logger=[metrics, *mirrors],
        plugins=[StoreIO(store, facts)],
        max_epochs=-1,
        check_val_every_n_epoch=None,  # validation is by step
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
