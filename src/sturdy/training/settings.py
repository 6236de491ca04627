"""Checks of the settings that would break the promise; nothing heavy is imported here."""

from typing import Any

from omegaconf import DictConfig, OmegaConf

from exact_resume.supervisor import is_launched
from sturdy.errors import ConfigError

# Keys that hold a whole number, and the smallest one allowed.
INTEGERS = {
    "seed": None,
    "restarts": 0,
    "data.batch_size": 1,
    "data.shards": 1,
    "trainer.max_steps": 1,
    "trainer.val_check_interval": 1,
    "trainer.log_every_n_steps": 1,
    "trainer.num_nodes": 1,
    "trainer.threads": 1,
}
INTEGERS_OR_NULL = ("data.shards", "trainer.threads")
ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps")
PROFILERS = (None, "simple", "advanced", "pytorch")
PRECISIONS = ("32-true", "32", "bf16-mixed")
LOSS_SCALE = (
    "16-bit floats need a loss scale, whose history a step is not a function of; use bf16-mixed, "
    "which needs none (NVIDIA cards from 2020 on, such as A100 and RTX 30; CPUs), or 32-true"
)
BF16_MIXED = "use bf16-mixed: the arithmetic in 16 bits, the weights in 32"
FLOAT32 = "use 32-true"
LOW_PRECISION_WEIGHTS = (
    "weights kept in 16 bits lose the small steps of the EMA: use bf16-mixed or 32-true"
)
FLOAT64 = (
    "images, noise and times are drawn in 32 bits, so that 64 would be slower and no more exact: "
    "use 32-true"
)
# Other words for a precision, and what to use instead.
PRECISION_ADVICE = {
    **dict.fromkeys(("16-mixed", "16", "fp16", "float16", "half"), LOSS_SCALE),
    **dict.fromkeys(("bf16", "bfloat16"), BF16_MIXED),
    **dict.fromkeys(("fp32", "float32", "full", "single", "tf32"), FLOAT32),
    **dict.fromkeys(("bf16-true", "16-true"), LOW_PRECISION_WEIGHTS),
    **dict.fromkeys(("64-true", "64", "fp64", "float64", "double"), FLOAT64),
}
# What torch.compile does not go with, and why.
NOT_COMPILED = {"alignment": "looks into the network", "strategy": "takes it apart"}


def check_settings(cfg: DictConfig) -> None:
    """Raise ConfigError for values that would break the promise, or mean something else here."""
    for key, minimum in INTEGERS.items():
        _check_integer(key, OmegaConf.select(cfg, key), minimum)
    if not cfg.callbacks.get("checkpoint"):
        raise ConfigError(
            "callbacks.checkpoint=null: without checkpoints a run would be lost. To have few of "
            "them, set callbacks.checkpoint.every_n_train_steps=null and "
            "callbacks.checkpoint.every_n_minutes=60"
        )
    if cfg.trainer.accelerator not in ACCELERATORS:
        choices = ", ".join(ACCELERATORS)
        raise ConfigError(f"trainer.accelerator={cfg.trainer.accelerator} must be one of {choices}")
    profiler = cfg.trainer.profiler
    if profiler not in PROFILERS and not OmegaConf.is_config(profiler):
        raise ConfigError(
            f"trainer.profiler={profiler} must be one of {', '.join(PROFILERS[1:])}, or null"
        )
    _check_validation(cfg.trainer.limit_val_batches)
    if cfg.reduction not in (None, "tree", "allreduce"):
        raise ConfigError(
            f"reduction={cfg.reduction} must be tree, allreduce or null, which chooses"
        )
    if cfg.trainer.compile:
        _check_compile(cfg)
    if cfg.data.get("buckets"):
        _check_buckets(cfg)
    precision = str(cfg.trainer.precision)
    if precision not in PRECISIONS:
        advice = PRECISION_ADVICE.get(precision, "use 32-true or bf16-mixed")
        raise ConfigError(f"trainer.precision={precision}: {advice}")


def local_world_size(cfg: DictConfig) -> int:
    """Return how many processes ``trainer.devices`` means on this machine.

    Raises:
        ConfigError: it means none, or something that only a launcher can do.
    """
    devices: Any = cfg.trainer.devices
    if str(devices) in ("auto", "-1"):
        if cfg.trainer.accelerator == "cpu":
            return 1
        import torch

        return max(1, torch.cuda.device_count())
    if isinstance(devices, bool) or not str(devices).isdecimal() or int(devices) < 1:
        raise ConfigError(
            f"trainer.devices={devices} must be a number, or auto. Choose among GPUs with "
            f"CUDA_VISIBLE_DEVICES"
        )
    if cfg.trainer.num_nodes > 1 and not is_launched():
        raise ConfigError(
            f"trainer.num_nodes={cfg.trainer.num_nodes}: start it on each machine with torchrun, "
            f"or with srun; docs/guides/slurm-and-clusters.md has the lines to copy"
        )
    return int(devices)


def _check_integer(key: str, value: Any, minimum: int | None) -> None:
    if value is None and key in INTEGERS_OR_NULL:
        return
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if is_integer and (minimum is None or value >= minimum):
        return
    bound = "" if minimum is None else f", {minimum} or more"
    or_null = ", or null" if key in INTEGERS_OR_NULL else ""
    raise ConfigError(f"{key}={value} must be a whole number{bound}{or_null}")


def _check_validation(limit: Any) -> None:
    """Check the number or fraction of validation batches: the best checkpoint depends on it."""
    is_number = isinstance(limit, int) and limit is not True and limit >= 1
    is_fraction = isinstance(limit, float) and 0 < limit <= 1
    if not (is_number or is_fraction):
        raise ConfigError(
            f"trainer.limit_val_batches={limit} must be a number of batches, 1 or more, or a "
            f"fraction up to 1.0: the best checkpoint is known by them. To validate less often, "
            f"raise trainer.val_check_interval"
        )


def _check_buckets(cfg: DictConfig) -> None:
    if cfg.alignment:
        raise ConfigError(
            "data.buckets does not go with alignment, whose encoder takes images of one size: "
            "choose alignment=none"
        )
    if cfg.trainer.compile:
        raise ConfigError(
            "data.buckets does not go with trainer.compile=true: only the first few sizes would be "
            "compiled, and which they are depends on where a run is resumed"
        )


def _check_compile(cfg: DictConfig) -> None:
    for key, reason in NOT_COMPILED.items():
        target = (cfg[key] or {}).get("_target_", "")
        if target.endswith((".Alignment", ".fsdp2")):
            name = target.rpartition(".")[2].lower()
            raise ConfigError(f"trainer.compile=true does not go with {name}, which {reason}")
