"""The parts of one start, built from its config: data, gradient reduction, and the Trainer."""

from collections.abc import Mapping, Sequence
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

from exact_resume import distributed, lightning_internals
from exact_resume.callbacks.nan_guard import NanGuard
from exact_resume.callbacks.preemption import AgreeOnSignal, SaveOnSignal
from exact_resume.callbacks.record import Record
from exact_resume.callbacks.watchdog import Watchdog
from exact_resume.checkpoint.store import load_state
from exact_resume.checkpoint.writer import StoreCheckpointIO
from exact_resume.failures import tolerate_errors
from exact_resume.fingerprint import Fingerprint
from exact_resume.randomness import Draws
from exact_resume.reduction import (
    AllReduce,
    fsdp_reduce,
    is_tree,
    no_reduce,
    tree_all_reduce,
)
from exact_resume.resume import ResumePoint
from exact_resume.run import Run
from exact_resume.signals import Preemption
from exact_resume.strategy import trainer_devices
from exact_resume.supervisor import is_launched
from exact_resume.system import available_cpus
from sturdy.diffusion.space import Pixels, Space
from sturdy.encoders.images import unscaled
from sturdy.errors import ConfigError, as_config_error
from sturdy.image_size import ImageSize, height_and_width
from sturdy.keys import NON_TRAINER_KEYS
from sturdy.training.callbacks.compile import Compile
from sturdy.training.callbacks.progress import Progress
from sturdy.training.module import DiffusionModule
from sturdy.training.optimizer_state import check_optimizer
from sturdy.training.parts import steps_equally_in_parts
from sturdy.training.profilers import build_profiler

if TYPE_CHECKING:  # imported by those that are aligned
    from sturdy.encoders.encoder import Encoder


def check_accelerator(name: str) -> None:
    """Raise ValueError if PyTorch finds no such device on this machine."""
    has_cuda = torch.cuda.is_available()
    has_mps = torch.backends.mps.is_available()
    available = {"cuda": has_cuda, "mps": has_mps, "gpu": has_cuda or has_mps}
    if not available.get(name, True):
        raise ValueError(
            f"trainer.accelerator={name}: PyTorch {torch.__version__} finds none on this machine; "
            f"use auto or cpu"
        )


def training_device(accelerator: str) -> torch.device:
    """Return the device on which this process will train, as far as it can encode images there."""
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return torch.device("cuda", distributed.rank() % distributed.local_world_size())
    return torch.device("cpu")


def usable_processes(cfg: DictConfig) -> int:
    """Return the number of processes over which a batch can be cut, of those that are started."""
    batch_size = cfg.data.batch_size

    def divides(processes: int) -> bool:
        shards = cfg.data.shards or processes
        return shards % processes == 0 and batch_size % shards == 0

    return distributed.usable_processes(distributed.started_processes(), divides)


def resolve_run_defaults(cfg: DictConfig, point: ResumePoint | None) -> None:
    """Fill in what the first start decides and the run then keeps: shards, reduction, threads.

    Keys that older versions lacked get the value that means what these versions did.

    Raises:
        ConfigError: the batch cannot be cut into equal shards for the processes.
    """
    fingerprint = point.manifest.get("fingerprint", {}) if point else {}
    stored: Mapping[str, Any] = fingerprint.get("config", {})
    gradients: str = fingerprint.get("stack", {}).get("gradients", "")
    processes = distributed.world_size()
    shards = stored.get("data.shards", processes)
    if cfg.data.shards is None:
        cfg.data.shards = shards if shards % processes == 0 else processes
    if cfg.data.shards % processes or cfg.data.batch_size % cfg.data.shards:
        raise ConfigError(
            f"data.batch_size={cfg.data.batch_size} cannot be cut into "
            f"data.shards={cfg.data.shards} equal shards for {processes} processes: shards must "
            f"divide the batch, and the number of processes the shards"
        )
    if cfg.reduction is None:
        is_faster = cfg.data.shards == processes or _is_fsdp2(cfg)
        default = "allreduce" if is_faster and processes > 1 else "tree"
        kept = stored.get("reduction") if shards == cfg.data.shards else None
        if gradients.startswith("fsdp2 over"):  # whatever an older version noted
            kept = "allreduce"
        cfg.reduction = kept or default
    known = {name.removesuffix(".0") for name in stored}  # a list is stored by its items
    for key, older_value in cfg.resume.added.items():
        if stored and key not in known and OmegaConf.select(cfg, key) is not None:
            OmegaConf.update(cfg, key, older_value)
    if cfg.trainer.threads is None:
        share = max(1, available_cpus() // distributed.local_world_size())
        cfg.trainer.threads = stored.get("trainer.threads") or share


def reduction_mode(cfg: DictConfig, module: DiffusionModule) -> str:
    """Return how gradients are summed over processes, for ``exact_resume.reduction.reduction_id``.

    ``tree``        on the tree: the bits do not depend on the number of processes
    ``allreduce``   by the backend
    ``fsdp2``       by the backend, and each process steps on its part of the parameters
    ``fsdp2 tree``  on the tree, but the optimizer rounds parts otherwise than the whole
    """
    on_tree = cfg.reduction == "tree" and is_tree(cfg.data.shards, distributed.world_size())
    if not _is_fsdp2(cfg):
        return "tree" if on_tree else "allreduce"
    if not on_tree:
        return "fsdp2"
    device = training_device(cfg.trainer.accelerator)
    return "tree" if steps_equally_in_parts(module.make_optimizer, device) else "fsdp2 tree"


def set_reduction(cfg: DictConfig, module: DiffusionModule, data: Any) -> None:
    """Make ``module`` sum gradients over processes, and ``data`` deal shards to them, as asked.

    Raises:
        ConfigError: the parameters cannot be cut.
    """
    processes = distributed.world_size()
    on_tree = cfg.reduction == "tree" and is_tree(cfg.data.shards, processes)
    if processes == 1:
        module.reduce_gradients = no_reduce
    elif _is_fsdp2(cfg):
        if module.base_names:
            raise ConfigError(
                "strategy=fsdp2 cuts weights that are trained; the base of an adapter is not, and "
                "each process has it whole: use strategy=ddp"
            )
        module.tree_in_backward = data.interleaved = on_tree
        module.reduce_gradients = no_reduce if on_tree else fsdp_reduce
    elif on_tree:
        module.reduce_gradients = tree_all_reduce
    else:
        one_shard_each = cfg.data.shards == processes
        module.reduce_gradients = AllReduce(module.trained(), overlap=one_shard_each)


def _is_fsdp2(cfg: DictConfig) -> bool:
    return str(cfg.strategy._target_).endswith(".fsdp2")


def build_datamodule(cfg: DictConfig, begun: str | None = None) -> Any:
    """Build and open the data module, and write its classes into the config for the backbone.

    Args:
        cfg: is changed.
        begun: digest of the data that the run goes on with; None for the data that are there now.
    """
    data = instantiate(cfg.data)
    data.rank = distributed.rank()
    data.processes = distributed.world_size()
    data.limit_val = cfg.trainer.limit_val_batches
    with as_config_error("data", cfg.data):
        data.open(begun)
    cfg.classes = list(data.classes)
    cfg.num_classes = len(data.captions or data.classes)  # labels are rows of captions
    cfg.num_conditions = data.augmentation_size
    cfg.prior = data.prior
    return data


def dry_run_forward(
    module: DiffusionModule,
    size: ImageSize,
    channels: int = 3,
    sizes: Sequence[tuple[int, int]] = (),
) -> None:
    """Send one image of ``channels`` and ``size`` through everything, and build the optimizer.

    Args:
        module: of the run.
        size: height and width of the image.
        channels: of the image.
        sizes: other heights and widths that the backbone must take.

    Raises:
        ValueError: the parts do not go together, or the optimizer refuses.
    """
    check_space(module.space, module.space.smallest or size, channels)
    check_optimizer(module.make_optimizer, module)
    try:
        with torch.no_grad():
            for height, width in dict.fromkeys([height_and_width(size), *sizes]):
                x = torch.zeros(1, *module.space.shape_of(height, width))
                module.ema.model(x, torch.full((1,), 0.5), None)
    except (TypeError, RuntimeError, IndexError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(
            f"the backbone does not take what space and condition give: {reason}. Choose a "
            f"backbone, a space and a condition that go together"
        ) from error


def check_space(space: Space, size: ImageSize, channels: int) -> None:
    """Encode and decode an image of ``size`` once.

    Raises:
        ValueError: the members of the space contradict each other, or one is missing.
    """
    name = type(space).__name__
    if not hasattr(space, "clip"):
        raise ValueError(f"space: {name} has no clip: (low, high), or None")
    if isinstance(space, Pixels) and space.channels != channels:
        raise ValueError(f"space.channels={space.channels} must be {channels}, as the images have")
    image = torch.zeros(1, channels, *height_and_width(size))
    with torch.no_grad():
        x0 = space.encode(image, Draws(0, [0]))
        decoded = space.decode(x0)
    shape = (1, *space.shape_of(*image.shape[2:]))
    if tuple(x0.shape) != shape:
        raise ValueError(
            f"space: {name}.encode gives {tuple(x0.shape)} where its shape() says {shape}"
        )
    if decoded.shape != image.shape:
        raise ValueError(
            f"space: {name}.decode gives {tuple(decoded.shape)} for images {tuple(image.shape)}"
        )


def load_alignment_encoder(
    module: DiffusionModule, data: Any, point: ResumePoint | None, folder: Path
) -> None:
    """Load the frozen encoder of an aligned module: from the checkpoint, or made by rank 0.

    Args:
        module: without an alignment, nothing is done.
        data: open; an encoder can be made for its training images.
        point: where the run is resumed.
        folder: for encoders that take time to make.

    Raises:
        ConfigError: there is no encoder, or it does not fit the backbone.
    """
    alignment = module.alignment
    encoder = getattr(alignment, "encoder", None)  # another auxiliary loss may have none
    if alignment is None or encoder is None:
        return

    def state() -> dict[str, Tensor]:
        with as_config_error():
            if point:
                return stored_encoder(point)
            return make_encoder(encoder, data, folder)

    weights = distributed.run_on_rank_zero(state)
    with distributed.rank_zero_first(), as_config_error(), torch.no_grad():
        encoder.load_state_dict(weights)
        x0 = torch.zeros(1, *module.space.shape_of(*height_and_width(data.image_size)))
        with alignment.observe(module.denoiser.backbone) as features:
            module.denoiser(x0, torch.full((1,), 0.5), None)
        alignment(features, module.space.decode(x0))


def stored_encoder(point: ResumePoint) -> dict[str, Tensor]:
    """Return the encoder's state from a checkpoint; raise ValueError if it has none."""
    prefix = "alignment.encoder."
    weights = load_state(point.state)["state_dict"]
    state = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    if not state:
        raise ValueError(
            f"{point.state} is of a run that began without alignment, which cannot be added to it: "
            f"leave it out with alignment=none, or start another run from these weights with "
            f"name=... init_from={point.state.parent}"
        )
    return state


def make_encoder(encoder: "Encoder", data: Any, folder: Path) -> dict[str, Tensor]:
    """Return the state of ``encoder``, prepared for the training images of ``data``."""
    from sturdy.progress import ProgressPrinter

    images = data.val_dataloader().dataset  # the held-out images come first, then the others
    end = min(data.held_out + encoder.most, len(data.cache))
    positions = np.arange(data.held_out, end)
    pixels = unscaled(images[positions].image)
    classes = images.classes(positions)
    first = images.split.indices(np.arange(8)).tolist()  # tells folds apart
    key = (data.digest, data.image_size, len(positions), data.held_out, first)
    progress = ProgressPrinter("the encoder of alignment")
    encoder.prepare(pixels, classes, len(data.classes), data=key, folder=folder, tell=progress)
    return encoder.state_dict()


def build_trainer(
    cfg: DictConfig,
    run: Run,
    now: Fingerprint,
    preemption: Preemption,
    attempt: Path,
    trajectories: list[dict[str, Any]],
) -> L.Trainer:
    """Build Lightning's Trainer, with everything that this project fixes about it."""

    def metadata(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
        return checkpoint_metadata(checkpoint, now, trajectories)

    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    settings = {k: v for k, v in cfg.trainer.items() if f"trainer.{k}" not in NON_TRAINER_KEYS}
    settings |= trainer_devices()
    if isinstance(cfg.trainer.profiler, str):
        settings["profiler"] = build_profiler(cfg.trainer.profiler, attempt)
    settings["limit_val_batches"] = 1.0  # the data module applies the limit
    trainer: L.Trainer = instantiate(
        settings,
        strategy=instantiate(cfg.strategy),
        callbacks=build_callbacks(cfg, run, preemption, attempt),
        logger=[run.metrics, *build_loggers(cfg)],
        plugins=[
            StoreCheckpointIO(run.store, metadata),
            distributed.cluster_environment() or LightningEnvironment(),
        ],
        max_epochs=-1,
        check_val_every_n_epoch=None,  # validation is by step
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    lightning_internals.disable_signal_handling(trainer)
    lightning_internals.always_run_fit_loop(trainer)
    return trainer


def checkpoint_metadata(
    checkpoint: Mapping[str, Any], now: Fingerprint, trajectories: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return what goes into the manifest of ``checkpoint`` beside its step."""
    metadata = {
        "position": checkpoint["ImageData"]["position"],
        "fingerprint": now.as_dict(),
    }
    if trajectories:
        metadata["trajectories"] = trajectories
    if "init_from" in checkpoint:
        metadata["init_from"] = checkpoint["init_from"]
    return metadata


def build_callbacks(
    cfg: DictConfig, run: Run, preemption: Preemption, attempt: Path
) -> list[Callback]:
    """Build the callbacks, in the order in which they are called.

    Processes agree on a signal first, then the watchdog and the NaN guard look at the step, then
    everything that may take its time.
    """
    first: list[Callback] = [AgreeOnSignal(preemption)]
    others: list[Callback] = [Record(run.metrics), SaveOnSignal(preemption)]
    guards: dict[type, Callback] = {}
    for name, node in cfg.callbacks.items():
        if not node or (name == "progress" and distributed.rank() > 0):
            continue
        callback = instantiate(node, _convert_="all")
        if isinstance(callback, Watchdog | NanGuard):
            guards[type(callback)] = callback
        else:
            others.append(tolerate_errors(callback) if isinstance(callback, Progress) else callback)
    if cfg.trainer.compile:
        others.append(Compile())
    watchdog = guards.get(Watchdog)
    if isinstance(watchdog, Watchdog):
        watchdog.directory = attempt
        watchdog.armed = is_launched()
    first += [guards[kind] for kind in (Watchdog, NanGuard) if kind in guards]
    return first + others


def build_loggers(cfg: DictConfig) -> list[Any]:
    """Build the loggers beside ``metrics.csv``; only rank 0 has any."""
    if distributed.rank() > 0:
        return []
    loggers = []
    for node in (cfg.logger or {}).values():
        if node:
            logger = tolerate_errors(instantiate(node, _convert_="all"))
            logger.log_hyperparams(OmegaConf.to_container(cfg, resolve=True))
            loggers.append(logger)
    return loggers
