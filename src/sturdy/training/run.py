"""One start of a run: find where to enter it, say so, build it, train.

fresh or resumed or finished or refused  <-  (config, data, source, stack) against the store

Every process of the run does this; what is found, decided or written, rank 0 finds, decides and writes.
"""

import gc
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

from sturdy.resume import world
from sturdy.resume.entry import MOST_REASONS, Entered, Entry, Refused, find_entry, judge, once
from sturdy.resume.fingerprint import MOST_NAMES, Guarantee, config_changes, fingerprint
from sturdy.resume.lock import AlreadyRunning, lock
from sturdy.resume.preemption import RESUMABLE, Preempted, Preemption
from sturdy.resume.reduction import describe
from sturdy.resume.skips import Diverged, Skip, Skips
from sturdy.resume.store import Corrupt, NothingVerifies, Store, Unloadable
from sturdy.resume.supervisor import die_with_parent, launched
from sturdy.resume.writer import MAY_PASS, SaveFailed
from sturdy.training.attempt import CONSOLE, describe_attempt, log_to, next_attempt
from sturdy.training.begun import FROM_DATA, find_begun, is_restart, restore
from sturdy.training.branch import leave_branch
from sturdy.training.build import build
from sturdy.training.callbacks.watchdog import watch_start
from sturdy.training.failures import OutOfMemoryError, is_out_of_memory, out_of_memory
from sturdy.training.identity import run_fingerprint
from sturdy.training.initial import Source, find_source, init_from, other_weights
from sturdy.training.launch import MISTAKE, Unfit
from sturdy.training.loggers.metrics_file import MetricsFile
from sturdy.training.match import class_change
from sturdy.training.parts import (
    check_accelerator,
    furnish,
    how_summed,
    make_trainer,
    open_data,
    settle,
    summing,
    try_out,
    unfit,
)
from sturdy.training.snapshots import path_of

STOPPED = ".stopped"  # in the run's directory: the newest step when a signal came last


def train(cfg: DictConfig, overrides: list[str]) -> int:
    """``run`` with what the user can mend told in a line instead of a traceback; returns the exit code."""
    die_with_parent()
    try:
        return run(cfg, overrides)
    except (Refused, AlreadyRunning, NothingVerifies, Unloadable, Unfit) as error:
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE
    except (FloatingPointError, SaveFailed, OutOfMemoryError, Corrupt, OSError) as error:
        CONSOLE.debug("where it failed", exc_info=True)
        if world.rank() == 0 or not isinstance(error, FloatingPointError):  # all found that
            print(f"error: {error}", file=sys.stderr)
        return 1
    except world.PeerLost as error:
        CONSOLE.warning(f"process {world.rank()}: {error}")
        return 1
    except Preempted as stopped:
        again = "Use ckpt_path=auto" if cfg.ckpt_path is None else "Run the same command"
        if world.rank() == 0:
            tell = CONSOLE.info if CONSOLE.handlers else print
            tell(f"{stopped}. {again} to continue.")
            if stopped_here_before(Path(cfg.paths.runs) / cfg.name):
                tell("The start before this one was stopped at the same step: they need more time than they are given.")
        return RESUMABLE
    except Exception:
        CONSOLE.debug("where it failed", exc_info=True)
        raise
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
    with unfit():
        check_accelerator(cfg.trainer.accelerator)
    world.join(cfg.trainer.accelerator)
    home = Path(cfg.paths.runs) / cfg.name
    with world.ahead(), unfit():
        held = take(home) if world.rank() == 0 else None
    with unfit():
        skips = Skips(home / "skips.jsonl")
    cfg = cfg.copy()  # the caller's still tells what was asked for
    asked = cfg.ckpt_path
    restart = world.decide(lambda: is_restart(cfg.as_begun))
    cfg.ckpt_path = world.decide(lambda: once(asked, home, Store(home / "checkpoints"), restart=restart))
    start = Start(asked)
    if restart:
        beside = [*cfg.resume.ignore, *cfg.resume.rounding]
        begun = world.decide(lambda: find_begun(home, overrides, ignore=cfg.resume.ignore))
        start = Start(asked, True, begun.data if begun else None, restore(cfg, begun, keep=beside) if begun else [])
    while True:
        try:
            code = enter(cfg, overrides, home, skips, preemption, start)
            if held:
                held.close()
            return code
        except Diverged as bad:
            skip = bad.skip
        except Exception as error:
            if is_out_of_memory(error):
                raise out_of_memory(error, cfg) from error
            raise
        gc.collect()  # the trainer that diverged goes now, with its workers and its memory on the device
        with world.ahead():
            leave_out(skip, skips, cfg.callbacks.guard.max_skips)
        if number := world.heard(preemption.signal or 0):
            raise Preempted(f"{signal.Signals(number).name}: went back to the last checkpoint")
        preemption.listen(training=False)
        watch(cfg)
        cfg.ckpt_path = onwards(cfg.ckpt_path)


def stopped_here_before(home: Path) -> bool:
    """Whether the last signal to the run in ``home`` came at the same newest step; remember this one."""
    mark = home / STOPPED
    with suppress(OSError):
        newest = str(max(Store(home / "checkpoints").steps(), default=0))
        before = mark.read_text() if mark.exists() else None
        if home.is_dir():
            mark.write_text(newest)
        return before == newest
    return False


def take(home: Path) -> Any:
    """Lock the run's directory ``home``, and make it; returns what holds the lock.

    Raises:
        AlreadyRunning: if another process has it.
        Unfit: if nothing can be written there.
        OSError: if it may pass, such as a network disk that is away.
    """
    try:
        return lock(home)
    except OSError as error:
        if error.errno in MAY_PASS:
            raise
        if error.errno is None:  # ``lock`` has said it
            raise Unfit(str(error)) from error
        raise Unfit(f"nothing can be written in paths.runs: {error}. Choose another place: paths.runs=...") from error


def watch(cfg: DictConfig) -> None:
    """Where somebody starts this process again, do not wait for the others for ever."""
    if launched() and cfg.callbacks.get("watchdog"):
        watch_start(cfg.callbacks.watchdog.start)


def onwards(ckpt_path: str | None) -> str:
    """What to enter at once the run was entered at ``ckpt_path`` and has gone on from there."""
    return "auto" if ckpt_path in ("auto", None) else "last"


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


def enter(cfg: DictConfig, overrides: list[str], home: Path, skips: Skips, preemption: Preemption, start: Start) -> int:
    """Find where the run is entered, say so, and train to its end; arguments and results as of ``run``."""
    store, metrics = Store(home / "checkpoints"), MetricsFile(home / "metrics.csv")

    def find() -> Entry | None:
        monitor = cfg.callbacks.checkpoint
        with unfit():  # a disk that is away
            store.sweep()
            scores = metrics.column(monitor.monitor) | store.scores(monitor.monitor)
            return find_entry(store, cfg.ckpt_path, scores, monitor.mode)

    entry = world.decide(find)
    stored = entry.manifest.get("fingerprint", {}) if entry else {}
    if entry and world.decide(lambda: is_finished(cfg, entry, metrics)):
        if world.rank() == 0:
            print("\n    ".join(describe_finished(cfg, entry)), flush=True)
        return 0
    with world.ahead():
        settle(cfg, entry)
    torch.set_num_threads(cfg.trainer.threads)
    begun = (start.data or stored.get("data")) if start.restart else None
    with world.ahead(), unfit():
        data: Any = open_data(cfg, begun) if world.rank() == 0 else None
    digest = world.decide(lambda: data.digest)
    if data is None:  # the images that rank 0 has, though one more may have come to the folder since
        with unfit():
            data = open_data(cfg, digest)
    data.skips = [(skip.step - 1, skip.position, skip.size) for skip in skips.entries]
    config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    gradients = describe(cfg.data.shards, world.size(), how_summed(cfg))
    now = run_fingerprint(config, data.digest, gradients, ignore=cfg.resume.ignore)
    everywhere = world.gather((now.code, data.digest))
    world.decide(lambda: check_all_alike(everywhere))

    def promise() -> Guarantee | None:
        changes = data.changes_since(stored["data"]) if stored.get("data", data.digest) != data.digest else []
        odd = others(cfg, entry) if entry else ()
        return judge(entry, now, **config["resume"], others=odd, data_changes=changes) if entry else None

    guarantee = world.decide(promise)
    with world.ahead(), unfit():  # what does not go together is refused before anything is promised
        module = build(config)
        try_out(module, data.image_size)
    attempt = world.decide(lambda: next_attempt(home))
    log_to(attempt, world.rank())
    if world.rank() == 0:
        describe_attempt(attempt, config, overrides, now)
        for line in data.understood():
            CONSOLE.info(line)
        if report := data.cache.report():
            CONSOLE.warning(report)
        CONSOLE.info(banner(cfg, data, entry, guarantee))
        for line in (*(f"the configuration was edited: {line}" for line in start.edited), *data.notes):
            CONSOLE.warning(line)

    def source() -> Source | None:
        with unfit():
            return find_source(str(cfg.init_from), Path(cfg.paths.runs)) if cfg.init_from and not entry else None

    initial = world.decide(source)  # once, as a run that is named may be training now
    with world.ahead(), unfit():
        trainer = make_trainer(cfg, store, metrics, now, preemption, attempt)
        if initial:
            told = init_from(module, initial)
            if world.rank() == 0:
                CONSOLE.info(told)
    furnish(module, data, entry, Path(cfg.paths.cache) / "evaluation")
    module.sum = summing(cfg, module)
    world.decide(lambda: leave_branch(home, store, metrics, entry))
    if world.rank() == 0 and cfg.ckpt_path == start.asked:  # else it was entered by that word before
        Entered.of(start.asked, entry).write(home)
    preemption.listen(training=world.size() > 1)  # several leave together or not at all
    try:
        with trainer.strategy.checkpoint_io:  # type: ignore[attr-defined]  # left when the last save is durable
            trainer.fit(module, datamodule=data, ckpt_path=entry.state if entry else None, weights_only=True)
    except Preempted:
        watch(cfg)
        world.heard(0)  # a launcher takes the first that leaves for dead, and rank 0 has just saved
        raise
    except SystemExit as left:  # Lightning's exit code for it is 1
        if isinstance(left.__context__, KeyboardInterrupt):
            raise Preempted(f"KeyboardInterrupt: stopped after step {trainer.global_step}") from None
        raise
    except RuntimeError as error:
        if world.lost(error):
            raise world.PeerLost("lost another process of this run") from error
        raise
    if world.rank() == 0:
        CONSOLE.info(f"finished at step {trainer.global_step}; everything is in {home}")
    return 0


def is_finished(cfg: DictConfig, entry: Entry, metrics: MetricsFile) -> bool:
    """Whether nothing is left to do after ``entry``: neither a step, nor the validation or the images of the last."""
    last, callbacks = cfg.trainer.max_steps, cfg.callbacks
    if entry.step != last:
        return entry.step > last
    validated = last % cfg.trainer.val_check_interval or last in metrics.column("val/loss")
    drawn = [Path(node.directory) / f"step-{last:08d}.png" for node in [callbacks.get("samples")] if on(node)]
    kept = [path_of(Path(node.directory), last) for node in [callbacks.get("snapshots")] if on(node)]
    return bool(validated) and all(path.exists() for path in (*drawn, *kept))


def on(node: DictConfig | None) -> bool:
    """Whether a callback that does something every N steps is switched on."""
    return bool(node and node.every_n_steps)


def others(cfg: DictConfig, entry: Entry) -> list[str]:
    """Say in words where classes or first weights are not those of the run of ``entry``, a line each."""
    then = entry.manifest.get("fingerprint", {}).get("config", {})
    classes = [value for key, value in then.items() if key.startswith("classes.")]
    change = class_change({"classes": classes}, {"classes": list(cfg.classes)}) if then else None
    began, before = entry.manifest.get("init_from"), then.get("init_from")
    weights = other_weights(began, cfg.init_from, before, Path(cfg.paths.runs))
    return [line for line in (change, weights) if line]


def check_all_alike(everywhere: Sequence[tuple[Mapping[str, str], str]]) -> None:
    """Raise Refused if processes, by rank, would train with other code or data than rank 0."""
    code, data = everywhere[0]
    for rank, (its_code, its_data) in enumerate(everywhere):
        if odd := sorted(name for name in code.keys() | its_code.keys() if code.get(name) != its_code.get(name)):
            raise Refused(
                f"process {rank} runs other code than process 0: {', '.join(odd[:MOST_NAMES])}; update it there"
            )
        if data != its_data:
            raise Refused(f"process {rank} has other data than process 0; see data.root and paths.cache there")


def describe_finished(cfg: DictConfig, entry: Entry) -> list[str]:
    """Say that there is nothing to do, and where the config is not the one that the run was trained with."""
    told = [f"{cfg.name}: finished at step {entry.step} (trainer.max_steps={cfg.trainer.max_steps}), nothing to do"]
    stored = entry.manifest.get("fingerprint", {})
    cfg = cfg.copy()
    for key in FROM_DATA:
        cfg[key] = stored.get("config", {}).get(key, cfg[key])
    beside = [*cfg.resume.ignore, *cfg.resume.rounding, *FROM_DATA, "init_from"]
    now = fingerprint(OmegaConf.to_container(cfg, resolve=True), stored.get("data", ""))  # type: ignore[arg-type]
    odd = [*config_changes(stored, now, ignore=beside, added=cfg.resume.added).values()] if stored else []
    if odd:
        told.append("it was trained with another configuration; to train this one, give it a name of its own: name=...")
    return told + odd[:MOST_REASONS]


def banner(cfg: DictConfig, data: Any, entry: Entry | None, guarantee: Guarantee | None) -> str:
    """The one thing said before training: fresh or resumed."""
    title = f"{cfg.name}: {len(data.cache)} images, {len(data.classes) or 'no'} classes"
    if world.size() > 1:
        title += f", {world.size()} processes"
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
