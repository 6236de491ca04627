"""How a run is started: in this process, or in several, which a supervisor starts again when one of
them dies.

train.py  ->  one process and restarts=0, or a launcher has started it     ->  sturdy.training.run
          ->  else                                                         ->  the supervisor, then
          train.py anew
"""

import os
import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from exact_resume.supervisor import is_launched, supervise
from sturdy.errors import ConfigError

EXIT_USAGE = 2
WHOLE = {  # keys that hold a whole number, and the least it may be
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
OR_NULL = ("data.shards", "trainer.threads")
ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps")
SCALED = "16-bit floats need a loss scale, whose history a step is not a function of"
BF16 = "use bf16-mixed, which needs none (NVIDIA cards from 2020 on, such as A100 and RTX 30; CPUs), or 32-true"
PRECISIONS = {  # other words for a precision, and what to do
    **dict.fromkeys(("16-mixed", "16", "fp16", "float16", "half"), f"{SCALED}; {BF16}"),
    **dict.fromkeys(
        ("bf16", "bfloat16"), "use bf16-mixed: the arithmetic in 16 bits, the weights in 32"
    ),
    **dict.fromkeys(("fp32", "float32", "full", "single", "tf32"), "use 32-true"),
    **dict.fromkeys(
        ("bf16-true", "16-true"),
        "weights kept in 16 bits lose the small steps of the EMA: use bf16-mixed or 32-true",
    ),
    **dict.fromkeys(
        ("64-true", "64", "fp64", "float64", "double"),
        "images, noise and times are drawn in 32 bits, so that 64 would be slower and no more "
        "exact: use 32-true",
    ),
}


def train(cfg: DictConfig, overrides: list[str]) -> int:
    """Train what ``cfg`` describes, in as many processes as it asks for; returns the exit code.

    0 finished, 1 failed, 2 cannot be run like this, 75 stopped by a signal and saved, 130 stopped
    at once.
    """
    try:
        check_settings(cfg)
        n = local_world_size(cfg)
    except ConfigError as error:
        if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
            print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    if is_launched() or (n == 1 and not cfg.restarts):
        from sturdy.training.run import train

        return train(cfg, overrides)
    from exact_resume.checkpoint.store import Store

    store = Store(Path(cfg.paths.runs) / cfg.name / "checkpoints")
    return supervise(
        relaunch_command(overrides),
        processes=n,
        restarts=cfg.restarts,
        progress=lambda: max(store.steps(), default=-1),
    )


def relaunch_command(overrides: list[str]) -> list[str]:
    """The command of this process, with the options of its interpreter and with ``overrides``."""
    words = sys.orig_argv
    before = words[1 : words.index(sys.argv[0])] if sys.argv[0] in words else []
    return [sys.executable, *before, sys.argv[0], *overrides]


def local_world_size(cfg: DictConfig) -> int:
    """How many processes ``trainer.devices`` means on this machine.

    Raises:
        ConfigError: if it means none, or something only a launcher can do.
    """
    n: Any = cfg.trainer.devices
    if str(n) in ("auto", "-1"):
        if cfg.trainer.accelerator == "cpu":
            return 1
        import torch

        return max(1, torch.cuda.device_count())
    if isinstance(n, bool) or not str(n).isdecimal() or int(n) < 1:
        raise ConfigError(
            f"trainer.devices={n} must be a number, or auto. Choose among GPUs with "
            f"CUDA_VISIBLE_DEVICES"
        )
    if cfg.trainer.num_nodes > 1 and not is_launched():
        raise ConfigError(
            f"trainer.num_nodes={cfg.trainer.num_nodes}: start it on each machine with torchrun, "
            f"or with srun; "
            f"docs/running.md has the lines to copy"
        )
    return int(n)


def check_settings(cfg: DictConfig) -> None:
    """Raises ConfigError for values of Lightning's keys that would break the promise, or mean
    something else there.
    """
    for key, least in WHOLE.items():
        value = OmegaConf.select(cfg, key)
        if (
            not isinstance(value, int)
            or isinstance(value, bool)
            or (least is not None and value < least)
        ):
            if value is not None or key not in OR_NULL:
                bounds = ("" if least is None else f", {least} or more") + (
                    ", or null" if key in OR_NULL else ""
                )
                raise ConfigError(f"{key}={value} must be a whole number{bounds}")
    if not cfg.callbacks.get("checkpoint"):
        raise ConfigError(
            "callbacks.checkpoint=null: without checkpoints a run would be lost. To have few of "
            "them, set "
            "callbacks.checkpoint.every_n_train_steps=null and "
            "callbacks.checkpoint.every_n_minutes=60"
        )
    if cfg.trainer.accelerator not in ACCELERATORS:
        raise ConfigError(
            f"trainer.accelerator={cfg.trainer.accelerator} must be one of "
            f"{', '.join(ACCELERATORS)}"
        )
    limit = cfg.trainer.limit_val_batches
    whole, share = isinstance(limit, int) and limit is not True, isinstance(limit, float)
    if not ((whole and limit >= 1) or (share and 0 < limit <= 1)):
        raise ConfigError(
            f"trainer.limit_val_batches={limit} must be a number of batches, 1 or more, or a share "
            f"up to 1.0: "
            f"the best checkpoint is known by them. To validate less often, raise "
            f"trainer.val_check_interval"
        )
    if cfg.reduction not in (None, "tree", "allreduce"):
        raise ConfigError(
            f"reduction={cfg.reduction} must be tree, allreduce or null, which chooses"
        )
    for key, why in {"alignment": "looks into the network", "strategy": "takes it apart"}.items():
        if cfg.trainer.compile and (target := (cfg[key] or {}).get("_target_", "")).endswith(
            (".Alignment", ".fsdp2")
        ):
            raise ConfigError(
                f"trainer.compile=true does not go with {target.rpartition('.')[2].lower()}, which "
                f"{why}"
            )
    if (precision := str(cfg.trainer.precision)) not in ("32-true", "32", "bf16-mixed"):
        raise ConfigError(
            f"trainer.precision={precision}: "
            f"{PRECISIONS.get(precision, 'use 32-true or bf16-mixed')}"
        )
