"""A stock Lightning project, made unlosable in a few lines.

    python examples/plain_lightning/train.py

A small classifier of two spirals, with dropout, Adam and a learning-rate schedule. Kill it at any
instant and run it again: it ends in the same bits. The lines marked "exact_resume" make it so.
"""

import math
import sys

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from exact_resume import Checkpoint, ExactTraining, PositionData  # exact_resume


class Classifier(L.LightningModule):
    """A network of two hidden layers that tells two spirals apart."""

    def __init__(self, max_steps: int = 400, lr: float = 3e-3) -> None:
        super().__init__()
        self.max_steps = max_steps
        self.lr = lr
        self.network = nn.Sequential(
            nn.Linear(2, 64),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.Linear(64, 64),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.Linear(64, 2),
        )

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        points, labels = batch
        return F.cross_entropy(self.network(points), labels)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Log loss and accuracy."""
        points, labels = batch
        logits = self.network(points)
        self.log("val/loss", F.cross_entropy(logits, labels))
        self.log("val/accuracy", (logits.argmax(1) == labels).float().mean())

    def configure_optimizers(self) -> dict[str, object]:
        """Return Adam with a cosine schedule by step."""
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=self.max_steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


def spirals(n: int, seed: int) -> TensorDataset:
    """Return ``n`` points ``(n, 2)`` on two spirals with noise, and their labels ``(n,)``."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 2
    radius = torch.rand(n, generator=rng)
    angle = 3 * math.pi * radius + math.pi * labels
    points = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)
    return TensorDataset(points + 0.02 * torch.randn(n, 2, generator=rng), labels)


def main(home: str = "runs/spirals", max_steps: int = 400) -> int:
    """Train, or continue; return the exit code."""
    L.seed_everything(0, verbose=False)  # the first weights follow from a seed
    module = Classifier(max_steps)
    training = ExactTraining(  # exact_resume
        home,
        config={"lr": module.lr, "max_steps": max_steps},
        checkpoint=Checkpoint(every_n_train_steps=50),
    )
    data = PositionData(spirals(4000, 1), spirals(400, 2), batch_size=32)  # exact_resume
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        val_check_interval=100,
        enable_progress_bar=False,
        **training.trainer_options(),  # exact_resume
    )
    return training.fit(trainer, module, data)  # exact_resume


if __name__ == "__main__":
    home = sys.argv[1] if len(sys.argv) > 1 else "runs/spirals"
    sys.exit(main(home, int(sys.argv[2]) if len(sys.argv) > 2 else 400))
