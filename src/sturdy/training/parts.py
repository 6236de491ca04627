"""The parts of one start, made from its config: what is settled at the first start, data, the sum, the Trainer."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import numpy as np
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from sturdy.resume import world
from sturdy.resume.entry import Entry
from sturdy.resume.fingerprint import Fingerprint
from sturdy.resume.preemption import Preemption
from sturdy.resume.reduction import AllReduce, Sum, alone, is_tree, sharded, tree
from sturdy.resume.store import Store, load_state
from sturdy.resume.supervisor import launched
from sturdy.resume.writer import MAY_PASS, StoreIO
from sturdy.signatures import OURS
from sturdy.system import available_cpus
from sturdy.training import optim, strategies
from sturdy.training.callbacks.compile import Compile
from sturdy.training.callbacks.guard import Guard
from sturdy.training.callbacks.preempt import Agree, Preempt
from sturdy.training.callbacks.progress import Progress
from sturdy.training.callbacks.record import Record
from sturdy.training.callbacks.watchdog import Watchdog
from sturdy.training.failures import is_out_of_memory, spare
from sturdy.training.launch import Unfit
from sturdy.training.loggers.metrics_file import MetricsFile
from sturdy.training.module import DiffusionModule

if TYPE_CHECKING:  # imported by those that are aligned
    from sturdy.evaluation.encoders import Encoder


@contextmanager
def unfit() -> Iterator[None]:
    """Turn what building raises about its arguments into ``Unfit``, without Hydra's wrapping.

    Raises:
        Unfit: which nobody tries again.
        OSError: what may pass, such as a network disk that is away; a supervisor starts the run again.
    """
    try:
        yield
    except (InstantiationException, ValueError, OSError) as error:
        cause = error.__cause__ or error
        if (isinstance(cause, OSError) and cause.errno in MAY_PASS) or is_out_of_memory(cause):
            raise cause from None
        key = re.search(r"full_key: (\w+)", str(error))  # of Hydra's, where the class does not name it
        raise Unfit(f"{key[1]}: {cause}" if key and key[1] not in str(cause) else str(cause)) from error


def check_accelerator(name: str) -> None:
    """Raises ValueError if PyTorch finds no such device on this machine."""
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not {**here, "gpu": any(here.values())}.get(name, True):
        raise ValueError(
            f"trainer.accelerator={name}: PyTorch {torch.__version__} finds none on this machine; use auto or cpu"
        )


def settle(cfg: DictConfig, entry: Entry | None) -> None:
    """Fill in what is decided at the first start and then belongs to the run: shards, their sum, threads, the split.

    Raises:
        Unfit: if the processes cannot have equal parts of a batch.
    """
    stored, w = entry.manifest.get("fingerprint", {}).get("config", {}) if entry else {}, world.size()
    shards = stored.get("data.shards", w)
    if cfg.data.shards is None:
        cfg.data.shards = shards if shards % w == 0 else w
    if cfg.data.shards % w or cfg.data.batch_size % cfg.data.shards:
        raise Unfit(
            f"data.batch_size={cfg.data.batch_size} cannot be cut into data.shards={cfg.data.shards} equal shards for "
            f"{w} processes: shards must divide the batch, and the number of processes the shards"
        )
    if cfg.reduction is None:
        kept = stored.get("reduction") if shards == cfg.data.shards else None
        cfg.reduction = kept or ("allreduce" if cfg.data.shards == w > 1 else "tree")
    for key, older in cfg.resume.added.items():
        if stored and key not in stored and OmegaConf.select(cfg, key) is not None:
            OmegaConf.update(cfg, key, older)
    if cfg.trainer.threads is None:
        cfg.trainer.threads = stored.get("trainer.threads") or max(1, available_cpus() // world.local_size())


def how_summed(cfg: DictConfig) -> str:
    """Over processes: ``tree``, ``allreduce``, or as the strategy does it."""
    if cfg.strategy._target_.endswith(".fsdp2"):
        return "fsdp2"
    return "tree" if cfg.reduction == "tree" and is_tree(cfg.data.shards, world.size()) else "allreduce"


def summing(cfg: DictConfig, module: DiffusionModule) -> Sum:
    """What ``how_summed`` says, for ``module``."""
    if world.size() == 1:
        return alone

    def allreduce() -> Sum:
        return AllReduce(module.trained(), overlap=cfg.data.shards == world.size())

    return {"tree": lambda: tree, "fsdp2": lambda: sharded, "allreduce": allreduce}[how_summed(cfg)]()


def open_data(cfg: DictConfig, begun: str | None = None) -> Any:
    """Open the data module; its classes go into the config, for the backbone to know.

    Args:
        begun: the digest of the images that the run goes on with; None for those that are there now.
    """
    data = instantiate(cfg.data)
    data.rank, data.processes, data.limit_val = world.rank(), world.size(), cfg.trainer.limit_val_batches
    data.open(begun)
    cfg.classes = list(data.classes)
    cfg.num_classes, cfg.num_conditions, cfg.prior = len(data.classes), data.conditions, data.prior
    return data


def try_out(module: DiffusionModule, size: int) -> None:
    """Send one image through before training, as its size may not fit the backbone, and make the optimizer once.

    Raises:
        ValueError: what these say.
    """
    optim.try_out(module.make_optimizer, module)
    with torch.no_grad():
        module.ema.model(torch.zeros(1, 3, size, size), torch.full((1,), 0.5), None)


def furnish(module: DiffusionModule, data: Any, entry: Entry | None, folder: Path) -> None:
    """Give an aligned module its frozen encoder: that of the checkpoint, or else one that rank 0 makes for all.

    Args:
        data: open; its training images are what an encoder can be made for.
        folder: for what takes time to make.

    Raises:
        Unfit: if there is none, or it does not fit the backbone.
    """
    if (alignment := module.alignment) is None:
        return

    def state() -> dict[str, Tensor]:
        with unfit():
            return stored_encoder(entry) if entry else make_encoder(alignment.encoder, data, folder)

    encoder = world.decide(state)
    with world.ahead(), unfit(), torch.no_grad():
        alignment.encoder.load_state_dict(encoder)
        picture = torch.zeros(1, 3, data.image_size, data.image_size)
        with alignment.inside(module.denoiser.backbone) as inner:
            module.denoiser(picture, torch.full((1,), 0.5), None)
        alignment(*inner, picture)


def stored_encoder(entry: Entry) -> dict[str, Tensor]:
    """The state of the encoder in a checkpoint; raises ValueError if it has none."""
    prefix, stored = "alignment.encoder.", load_state(entry.state)["state_dict"]
    state = {k.removeprefix(prefix): v for k, v in stored.items() if k.startswith(prefix)}
    if not state:
        raise ValueError(
            f"{entry.state} is of a run that began without alignment, which cannot be added to it: leave it out with "
            f"alignment=none, or start another run from these weights with name=... init_from={entry.state.parent}"
        )
    return state


def make_encoder(encoder: "Encoder", data: Any, folder: Path) -> dict[str, Tensor]:
    """The state of ``encoder``, ready for the training images of ``data``."""
    from sturdy.training.teller import Teller

    images = data.val_dataloader().dataset  # the held-out images come first, then the others
    positions = np.arange(data.held_out, min(data.held_out + encoder.most, len(data.cache)))
    batch = images[positions]
    first = images.split(np.arange(8)).tolist()  # tells folds apart
    known = (data.digest, data.image_size, len(positions), data.held_out, first)
    tell = Teller("the encoder of alignment")
    encoder.prepare(batch.image, batch.label, len(data.classes), data=known, folder=folder, tell=tell)
    return encoder.state_dict()


def make_trainer(
    cfg: DictConfig, store: Store, metrics: MetricsFile, now: Fingerprint, preemption: Preemption, attempt: Path
) -> L.Trainer:
    """Lightning's Trainer, with what this project holds fixed about it."""

    def facts(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
        began = {"init_from": checkpoint["init_from"]} if "init_from" in checkpoint else {}
        return {"position": checkpoint["ImageData"]["position"], "fingerprint": now.as_dict()} | began

    wanted = [node for key, node in cfg.callbacks.items() if node and (world.rank() == 0 or key != "progress")]
    callbacks: list[Callback] = [
        Record(metrics),
        Preempt(preemption),  # before those that take their time after a step
        *(spare(c) if isinstance(c, Progress) else c for c in (instantiate(n, _convert_="all") for n in wanted)),
        *([Compile()] if cfg.trainer.compile else []),
    ]
    first = [callback for kind in (Watchdog, Guard) for callback in callbacks if isinstance(callback, kind)]
    others = [callback for callback in callbacks if callback not in first]
    callbacks = [Agree(preemption), *first, *others]  # the others are waited for, then time, then what is bad
    for callback in first:
        if isinstance(callback, Watchdog):
            callback.directory, callback.armed = attempt, launched()
    loggers = [node for node in (cfg.logger or {}).values() if node] if world.rank() == 0 else []
    mirrors = [instantiate(node, _convert_="all") for node in loggers]
    for mirror in mirrors:
        spare(mirror).log_hyperparams(OmegaConf.to_container(cfg, resolve=True))
    settings = {k: v for k, v in cfg.trainer.items() if f"trainer.{k}" not in OURS}
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    trainer: L.Trainer = instantiate(
        settings | strategies.processes() | {"limit_val_batches": 1.0},
        strategy=instantiate(cfg.strategy),
        callbacks=callbacks,
        logger=[metrics, *mirrors],
        plugins=[StoreIO(store, facts), world.environment() or LightningEnvironment()],
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
