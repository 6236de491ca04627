"""Compile the network that trains, and compare its gradients with those without compilation.

Inductor has given wrong gradients without an error (docs/measurements/backbones.md).
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from typing_extensions import override

from exact_resume.distributed import rank
from exact_resume.randomness import reseed
from sturdy.errors import ConfigError
from sturdy.training.module import DiffusionModule

log = logging.getLogger(__name__)

REL_TOL = 0.1  # of a gradient's norm: bfloat16 is off by some hundredths, a wrong kernel by about 1


class Compile(Callback):
    """Compiles ``module.denoiser.backbone`` at the first batch, for that batch's shape.

    The averages are not compiled. It takes a minute or more. Masks of dropout stay the same, and no
    kernel is chosen by its measured speed.

    Raises:
        ConfigError: at the first batch, if gradients differ; it names some of them.
    """

    def __init__(self) -> None:
        self.is_compiled = False

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, DiffusionModule)
        backbone = pl_module.denoiser.backbone
        if self.is_compiled:
            return
        self.is_compiled = True
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
        name_of = {id(p): name for name, p in pl_module.denoiser.named_parameters()}
        names = [name_of.get(id(p), "of the auxiliary loss") for p in pl_module.trained()]
        pairs = zip(names, expected, found, strict=True)
        wrong = [name for name, a, b in pairs if gradients_differ(a, b)]
        if wrong:
            raise ConfigError(
                f"trainer.compile=true: compiled, {len(wrong)} of {len(names)} parameters get "
                f"other gradients, such as {', '.join(wrong[:3])}. Nothing was trained with them; "
                f"set trainer.compile=false"
            )


@contextmanager
def perturbed_parameters(network: nn.Module) -> Iterator[None]:
    """Add noise to all parameters, and restore them afterwards.

    A layer that starts at zero has a gradient of zero, which would hide an error.
    """
    reseed("awake")
    before = [p.detach().clone() for p in network.parameters()]
    for p in network.parameters():
        p.data.add_(torch.randn_like(p), alpha=0.02)
    yield
    for p, old in zip(network.parameters(), before, strict=True):
        p.data.copy_(old)


def gradients_differ(a: Tensor, b: Tensor) -> bool:
    """Return whether gradients differ by more than rounding; NaN differs from everything."""
    return not (a - b).norm() <= REL_TOL * a.norm()
