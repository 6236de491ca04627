"""torch.compile for the network that trains, believed once its gradients are those of the network
as it is written.

Inductor has been seen to give wrong gradients without a word (docs/measurements/backbones.md).
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from exact_resume.distributed import rank
from exact_resume.randomness import reseed
from sturdy.errors import ConfigError
from sturdy.training.module import DiffusionModule

log = logging.getLogger(__name__)

REL_TOL = 0.1  # of a gradient's norm: bfloat16 is off by some hundredths, a wrong kernel by about 1


class Compile(Callback):
    """Compiles ``module.denoiser.backbone`` at the first batch, with that batch's shape; the
    averages stay as they are.

    It takes a minute or more. Masks of dropout stay the same, and no kernel is chosen by how fast
    it was.

    Raises:
        ConfigError: at that batch, if gradients differ, with the names of the first that do.
    """

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, DiffusionModule)
        backbone = pl_module.denoiser.backbone
        # torch's own mark
        if backbone._compiled_call_impl is not None:  # type: ignore[attr-defined]
            return
        if rank() == 0:
            log.info("compiling the network, which takes a minute or more")
        from torch._inductor import config as inductor  # seconds of imports, for those who compile

        inductor.fallback_random = inductor.deterministic = True
        shard, part = next(pl_module.shards_of(batch))
        with (
            perturbed_parameters(pl_module.denoiser),
            trainer.precision_plugin.train_step_context(),
        ):
            expected, _ = pl_module.shard_gradients(shard, part)
            backbone.compile(dynamic=False)
            found, _ = pl_module.shard_gradients(shard, part)
        names = [name for name, _ in pl_module.denoiser.named_parameters()]
        if wrong := [
            name
            for name, a, b in zip(names, expected, found, strict=True)
            if gradients_differ(a, b)
        ]:
            raise ConfigError(
                f"trainer.compile=true: compiled, {len(wrong)} of {len(names)} parameters get "
                f"other gradients, such as "
                f"{', '.join(wrong[:3])}. Nothing was trained with them; set trainer.compile=false"
            )


@contextmanager
def perturbed_parameters(network: nn.Module) -> Iterator[None]:
    """Inside, no parameter is zero: what starts so has no gradient that could be wrong. Afterwards
    all is as before.
    """
    reseed("awake")
    before = [p.detach().clone() for p in network.parameters()]
    for p in network.parameters():
        p.data.add_(torch.randn_like(p), alpha=0.02)
    yield
    for p, old in zip(network.parameters(), before, strict=True):
        p.data.copy_(old)


def gradients_differ(a: Tensor, b: Tensor) -> bool:
    """By more than rounding; NaN differs from everything."""
    return not (a - b).norm() <= REL_TOL * a.norm()
