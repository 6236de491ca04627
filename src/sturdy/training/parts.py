"""The parts of one start, made from its config: what is settled at the first start, data, the sum,
the Trainer.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import numpy as np
import torch
from hydra.utils import instantiate
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from exact_resume import distributed
from exact_resume.callbacks.nan_guard import NanGuard
from exact_resume.callbacks.preemption import AgreeOnSignal, SaveOnSignal
from exact_resume.callbacks.record import Record
from exact_resume.callbacks.watchdog import Watchdog
from exact_resume.checkpoint.store import Store, load_state
from exact_resume.checkpoint.writer import StoreCheckpointIO
from exact_resume.failures import tolerate_errors
from exact_resume.fingerprint import Fingerprint
from exact_resume.metrics import MetricsCSV
from exact_resume.reduction import (
    AllReduce,
    GradientReducer,
    fsdp_reduce,
    is_tree,
    no_reduce,
    tree_all_reduce,
)
from exact_resume.resume import ResumePoint
from exact_resume.signals import Preemption
from exact_resume.supervisor import is_launched
from exact_resume.system import available_cpus
from sturdy.cli.signatures import NON_TRAINER_KEYS
from sturdy.errors import ConfigError, as_config_error
from sturdy.training import strategies
from sturdy.training.callbacks.compile import Compile
from sturdy.training.callbacks.progress import Progress
from sturdy.training.module import DiffusionModule
from sturdy.training.optimizer_state import check_optimizer

if TYPE_CHECKING:  # imported by those that are aligned
    from sturdy.encoders.encoder import Encoder


def check_accelerator(name: str) -> None:
    """Raises ValueError if PyTorch finds no such device on this machine."""
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not {**here, "gpu": any(here.values())}.get(name, True):
        raise ValueError(
            f"trainer.accelerator={name}: PyTorch {torch.__version__} finds none on this machine; "
            f"use auto or cpu"
        )


def resolve_run_defaults(cfg: DictConfig, entry: ResumePoint | None) -> None:
    """Fill in what is decided at the first start and then belongs to the run: shards, their sum,
    threads, the split.

    Raises:
        ConfigError: if the processes cannot have equal parts of a batch.
    """
    stored, w = (
        entry.manifest.get("fingerprint", {}).get("config", {}) if entry else {},
        distributed.world_size(),
    )
    shards = stored.get("data.shards", w)
    if cfg.data.shards is None:
        cfg.data.shards = shards if shards % w == 0 else w
    if cfg.data.shards % w or cfg.data.batch_size % cfg.data.shards:
        raise ConfigError(
            f"data.batch_size={cfg.data.batch_size} cannot be cut into "
            f"data.shards={cfg.data.shards} equal shards for "
            f"{w} processes: shards must divide the batch, and the number of processes the shards"
        )
    if cfg.reduction is None:
        kept = stored.get("reduction") if shards == cfg.data.shards else None
        cfg.reduction = kept or ("allreduce" if cfg.data.shards == w > 1 else "tree")
    for key, older in cfg.resume.added.items():
        if stored and key not in stored and OmegaConf.select(cfg, key) is not None:
            OmegaConf.update(cfg, key, older)
    if cfg.trainer.threads is None:
        cfg.trainer.threads = stored.get("trainer.threads") or max(
            1, available_cpus() // distributed.local_world_size()
        )


def reduction_mode(cfg: DictConfig) -> str:
    """Over processes: ``tree``, ``allreduce``, or as the strategy does it."""
    if cfg.strategy._target_.endswith(".fsdp2"):
        return "fsdp2"
    return (
        "tree"
        if cfg.reduction == "tree" and is_tree(cfg.data.shards, distributed.world_size())
        else "allreduce"
    )


def make_gradient_reducer(cfg: DictConfig, module: DiffusionModule) -> GradientReducer:
    """What ``reduction_mode`` says, for ``module``."""
    if distributed.world_size() == 1:
        return no_reduce

    def allreduce() -> GradientReducer:
        return AllReduce(module.trained(), overlap=cfg.data.shards == distributed.world_size())

    return {"tree": lambda: tree_all_reduce, "fsdp2": lambda: fsdp_reduce, "allreduce": allreduce}[
        reduction_mode(cfg)
    ]()


def build_datamodule(cfg: DictConfig, begun: str | None = None) -> Any:
    """Open the data module; its classes go into the config, for the backbone to know.

    Args:
        begun: the digest of the images that the run goes on with; None for those that are there
            now.
    """
    data = instantiate(cfg.data)
    data.rank, data.processes, data.limit_val = (
        distributed.rank(),
        distributed.world_size(),
        cfg.trainer.limit_val_batches,
    )
    data.open(begun)
    cfg.classes = list(data.classes)
    cfg.num_classes, cfg.num_conditions, cfg.prior = len(data.classes), data.conditions, data.prior
    return data


def dry_run_forward(module: DiffusionModule, size: int) -> None:
    """Send one image through before training, as its size may not fit the backbone, and make the
    optimizer once.

    Raises:
        ValueError: what these say.
    """
    check_optimizer(module.make_optimizer, module)
    with torch.no_grad():
        module.ema.model(torch.zeros(1, *module.space.shape(size)), torch.full((1,), 0.5), None)


def load_alignment_encoder(
    module: DiffusionModule, data: Any, entry: ResumePoint | None, folder: Path
) -> None:
    """Give an aligned module its frozen encoder: that of the checkpoint, or else one that rank 0
    makes for all.

    Args:
        data: open; its training images are what an encoder can be made for.
        folder: for what takes time to make.

    Raises:
        ConfigError: if there is none, or it does not fit the backbone.
    """
    alignment = module.alignment
    encoder = getattr(alignment, "encoder", None)  # another auxiliary loss may have none
    if alignment is None or encoder is None:
        return

    def state() -> dict[str, Tensor]:
        with as_config_error():
            return stored_encoder(entry) if entry else make_encoder(encoder, data, folder)

    weights = distributed.run_on_rank_zero(state)
    with distributed.rank_zero_first(), as_config_error(), torch.no_grad():
        encoder.load_state_dict(weights)
        x0 = torch.zeros(1, *module.space.shape(data.image_size))
        with alignment.observe(module.denoiser.backbone) as features:
            module.denoiser(x0, torch.full((1,), 0.5), None)
        alignment(features, module.space.decode(x0))


def stored_encoder(entry: ResumePoint) -> dict[str, Tensor]:
    """The state of the encoder in a checkpoint; raises ValueError if it has none."""
    prefix, stored = "alignment.encoder.", load_state(entry.state)["state_dict"]
    state = {k.removeprefix(prefix): v for k, v in stored.items() if k.startswith(prefix)}
    if not state:
        raise ValueError(
            f"{entry.state} is of a run that began without alignment, which cannot be added to it: "
            f"leave it out with "
            f"alignment=none, or start another run from these weights with name=... "
            f"init_from={entry.state.parent}"
        )
    return state


def make_encoder(encoder: "Encoder", data: Any, folder: Path) -> dict[str, Tensor]:
    """The state of ``encoder``, ready for the training images of ``data``."""
    from sturdy.progress import ProgressPrinter

    images = data.val_dataloader().dataset  # the held-out images come first, then the others
    positions = np.arange(data.held_out, min(data.held_out + encoder.most, len(data.cache)))
    batch = images[positions]
    first = images.split(np.arange(8)).tolist()  # tells folds apart
    known = (data.digest, data.image_size, len(positions), data.held_out, first)
    tell = ProgressPrinter("the encoder of alignment")
    encoder.prepare(
        batch.image, batch.label, len(data.classes), data=known, folder=folder, tell=tell
    )
    return encoder.state_dict()


def build_trainer(
    cfg: DictConfig,
    store: Store,
    metrics: MetricsCSV,
    now: Fingerprint,
    preemption: Preemption,
    attempt: Path,
) -> L.Trainer:
    """Lightning's Trainer, with what this project holds fixed about it."""

    def facts(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
        began = {"init_from": checkpoint["init_from"]} if "init_from" in checkpoint else {}
        return {
            "position": checkpoint["ImageData"]["position"],
            "fingerprint": now.as_dict(),
        } | began

    wanted = [
        node
        for key, node in cfg.callbacks.items()
        if node and (distributed.rank() == 0 or key != "progress")
    ]
    callbacks: list[Callback] = [
        Record(metrics),
        SaveOnSignal(preemption),  # before those that take their time after a step
        *(
            tolerate_errors(c) if isinstance(c, Progress) else c
            for c in (instantiate(n, _convert_="all") for n in wanted)
        ),
        *([Compile()] if cfg.trainer.compile else []),
    ]
    first = [
        callback
        for kind in (Watchdog, NanGuard)
        for callback in callbacks
        if isinstance(callback, kind)
    ]
    others = [callback for callback in callbacks if callback not in first]
    callbacks = [
        AgreeOnSignal(preemption),
        *first,
        *others,
    ]  # the others are waited for, then time, then what is bad
    for callback in first:
        if isinstance(callback, Watchdog):
            callback.directory, callback.armed = attempt, is_launched()
    loggers = (
        [node for node in (cfg.logger or {}).values() if node] if distributed.rank() == 0 else []
    )
    mirrors = [instantiate(node, _convert_="all") for node in loggers]
    for mirror in mirrors:
        tolerate_errors(mirror).log_hyperparams(OmegaConf.to_container(cfg, resolve=True))
    settings = {k: v for k, v in cfg.trainer.items() if f"trainer.{k}" not in NON_TRAINER_KEYS}
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    trainer: L.Trainer = instantiate(
        settings | strategies.processes() | {"limit_val_batches": 1.0},
        strategy=instantiate(cfg.strategy),
        callbacks=callbacks,
        logger=[metrics, *mirrors],
        plugins=[
            StoreCheckpointIO(store, facts),
            distributed.cluster_environment() or LightningEnvironment(),
        ],
        max_epochs=-1,
        check_val_every_n_epoch=None,  # validation is by step
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    strategies.keep_quiet(trainer)
    strategies.end_always(trainer)
    return trainer
