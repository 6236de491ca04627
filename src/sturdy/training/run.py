"""One start of a run: find where to enter it, say so, build it, train.

fresh or resumed or finished or refused  <-  (config, data, source, stack) against the store

Every process of the run does this; what is found, decided or written, rank 0 finds, decides and writes.
"""

import gc
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from sturdy.resume import world
from sturdy.resume.entry import Entry, Refused, find_entry, judge
from sturdy.resume.fingerprint import Guarantee, fingerprint
from sturdy.resume.lock import AlreadyRunning, lock
from sturdy.resume.preemption import RESUMABLE, Preempted, Preemption
from sturdy.resume.reduction import describe
from sturdy.resume.skips import Diverged, Skip, Skips
from sturdy.resume.store import NothingVerifies, Store, Unloadable
from sturdy.resume.supervisor import die_with_parent, launched
from sturdy.resume.writer import SaveFailed
from sturdy.training.attempt import CONSOLE, describe_attempt, log_to, next_attempt
from sturdy.training.branch import leave_branch
from sturdy.training.build import build
from sturdy.training.callbacks.watchdog import watch_start
from sturdy.training.initial import Source, find_source, init_from
from sturdy.training.launch import MISTAKE, Unfit
from sturdy.training.loggers.metrics_file import MetricsFile
from sturdy.training.parts import furnish, how_summed, make_trainer, open_data, settle, summing, try_out, unfit

ENTERED = ".entered"  # in the run's directory: an agent's next start goes on, wherever this one was told to begin


def train(cfg: DictConfig, overrides: list[str]) -> int:
    """``run`` with what the user can mend told in a line instead of a traceback; returns the exit code."""
    die_with_parent()
    try:
        return run(cfg, overrides)
    except (Refused, AlreadyRunning, NothingVerifies, Unloadable, Unfit) as error:
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE
    except (FloatingPointError, SaveFailed, OSError) as error:
        if world.rank() == 0 or not isinstance(error, FloatingPointError):  # all found that
            print(f"error: {error}", file=sys.stderr)
        return 1
    except world.PeerLost as error:
        CONSOLE.warning(f"process {world.rank()}: {error}")
        return 1
    except Preempted as stopped:
        again = "Run the same command" if cfg.ckpt_path in ("auto", "last") else "Use ckpt_path=auto"
        if world.rank() == 0:
            (CONSOLE.info if CONSOLE.handlers else print)(f"{stopped}. {again} to continue.")
        return RESUMABLE
    finally:
        world.leave()


def run(cfg: DictConfig, overrides: list[str]) -> int:
    """Start, continue or recognise as finished the run ``cfg`` describes; returns the exit code.

    0: finished. 75: stopped by a signal and saved; the same command continues.

    Raises:
        Refused: if the run must not be entered like this; nothing was touched.
        AlreadyRunning: if another process trains in its directory.
        PeerLost: if another process of this run is gone.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA starts; else cuBLAS is not deterministic
    preemption = Preemption()
    preemption.listen(training=False)
    watch(cfg)
    world.join(cfg.trainer.accelerator)
    home = Path(cfg.paths.runs) / cfg.name
    with world.ahead():
        held = lock(home) if world.rank() == 0 else None
    with unfit():
        skips = Skips(home / "skips.jsonl")
    cfg = cfg.copy()  # the caller's still tells what was asked for
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) == 0:  # a person's start, and not an agent's
        (home / ENTERED).unlink(missing_ok=True)
    elif entered(home):
        cfg.ckpt_path = onwards(cfg.ckpt_path)
    while True:
        try:
            code = enter(cfg, overrides, home, skips, preemption)
            if held:
                held.close()
            return code
        except Diverged as bad:
            skip = bad.skip
        gc.collect()  # the trainer that diverged goes now, with its workers and its memory on the device
        with world.ahead():
            leave_out(skip, skips, cfg.callbacks.guard.max_skips)
        if number := world.heard(preemption.signal or 0):
            raise Preempted(f"{signal.Signals(number).name}: went back to the last checkpoint")
        preemption.listen(training=False)
        watch(cfg)
        cfg.ckpt_path = onwards(cfg.ckpt_path)


def watch(cfg: DictConfig) -> None:
    """Where somebody starts this process again, do not wait for the others for ever."""
    if launched() and cfg.callbacks.get("watchdog"):
        watch_start(cfg.callbacks.watchdog.start)


def onwards(ckpt_path: str | None) -> str:
    """What to enter at once the run was entered at ``ckpt_path`` and has gone on from there."""
    return "auto" if ckpt_path in ("auto", None) else "last"


def entered(home: Path) -> bool:
    """Whether a start since that of a person came so far that what there is to continue is its own."""
    return (home / ENTERED).exists() and bool(Store(home / "checkpoints").steps())


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
    if world.rank():
        skips.entries.append(skip)
        return
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

    def find() -> Entry | None:
        monitor = cfg.callbacks.checkpoint
        with unfit():  # a disk that is away
            store.sweep()
            return find_entry(store, cfg.ckpt_path, metrics.column(monitor.monitor), monitor.mode)

    entry = world.decide(find)
    with world.ahead():
        settle(cfg, entry)
    torch.set_num_threads(cfg.trainer.threads)
    with world.ahead(), unfit():
        data = open_data(cfg)
    data.skips = [(skip.step - 1, skip.position, skip.size) for skip in skips.entries]
    config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    now = fingerprint(config, data.digest, describe(cfg.data.shards, world.size(), how_summed(cfg)))
    guarantee = world.decide(lambda: judge(entry, now, **config["resume"]) if entry else None)
    attempt = world.decide(lambda: next_attempt(home))
    log_to(attempt, world.rank())
    if world.rank() == 0:
        describe_attempt(attempt, config, overrides, now.stack)
        if report := data.cache.report():
            CONSOLE.warning(report)
        CONSOLE.info(banner(cfg, data, entry, guarantee))
    if entry and entry.step >= cfg.trainer.max_steps:
        return 0

    def source() -> Source | None:
        with unfit():
            return find_source(str(cfg.init_from), Path(cfg.paths.runs)) if cfg.init_from and not entry else None

    initial = world.decide(source)  # once, as a run that is named may be training now
    with world.ahead(), unfit():
        module = build(config)
        try_out(module, data.image_size)
        trainer = make_trainer(cfg, store, metrics, now, preemption, attempt)
        if initial:
            told = init_from(module, initial)
            if world.rank() == 0:
                CONSOLE.info(told)
    furnish(module, data, entry, Path(cfg.paths.cache) / "evaluation")
    module.sum = summing(cfg, module)
    world.decide(lambda: leave_branch(home, store, metrics, entry))
    if world.rank() == 0:
        (home / ENTERED).touch()
    preemption.listen(training=world.size() > 1)  # several leave together or not at all
    try:
        with trainer.strategy.checkpoint_io:  # type: ignore[attr-defined]  # left when the last save is durable
            trainer.fit(module, datamodule=data, ckpt_path=entry.state if entry else None, weights_only=True)
    except Preempted:
        watch(cfg)
        world.heard(0)  # a launcher takes the first that leaves for dead, and rank 0 has just saved
        raise
    except RuntimeError as error:
        if world.lost(error):
            raise world.PeerLost("lost another process of this run") from error
        raise
    if world.rank() == 0:
        CONSOLE.info(f"finished at step {trainer.global_step}; everything is in {home}")
    return 0


def banner(cfg: DictConfig, data: Any, entry: Entry | None, guarantee: Guarantee | None) -> str:
    """The one thing said before training: fresh, resumed or finished."""
    title = f"{cfg.name}: {len(data.cache)} images, {len(data.classes) or 'no'} classes"
    if world.size() > 1:
        title += f", {world.size()} processes"
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
