"""A network small enough to train inside a test, the module around it, and real fits of it."""

from functools import partial
from itertools import count

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from exact_resume.checkpoint.store import Store
from exact_resume.checkpoint.writer import StoreCheckpointIO
from exact_resume.randomness import reseed
from sturdy.diffusion import Denoiser, Objective, RectifiedFlow, Velocity
from sturdy.training.module import DiffusionModule

CLASSES = 3


class Backbone(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.label = nn.Embedding(CLASSES + 1, 8)
        self.into = nn.Conv2d(3, 8, 3, padding=1)
        self.drop = nn.Dropout(dropout)
        self.out = nn.Conv2d(8, 3, 3, padding=1)
        self.unused = nn.Parameter(torch.ones(5))  # never gets a gradient

    def forward(self, x, t, label):
        h = self.into(x) + self.label(label)[:, :, None, None] + t[:, None, None, None]
        return self.out(self.drop(torch.nn.functional.silu(h)))


def make(dropout=0.0, backbone=Backbone, **settings):
    """A module whose weights are always the same."""
    reseed("tiny")
    denoiser = Denoiser(backbone(dropout), RectifiedFlow(), Velocity(), CLASSES)
    return DiffusionModule(denoiser, Objective(), **settings)


def batch(step, size=8):
    """The same every time: ``(x (b, 3, 8, 8), label (b,), positions (b,))``."""
    rng = torch.Generator().manual_seed(step)
    x = torch.rand(size, 3, 8, 8, generator=rng) * 2 - 1
    return (
        x,
        torch.randint(CLASSES, (size,), generator=rng),
        torch.arange(step * size, (step + 1) * size),
    )


class Stream(IterableDataset):
    """The batches of all steps from ``start`` on, without an end."""

    def __init__(self, start):
        self.start = start

    def __iter__(self):
        return map(batch, count(self.start))


class Outputs(Callback):
    """Keeps what every step returned."""

    def __init__(self):
        self.steps = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.steps.append({k: v.clone() for k, v in outputs.items()})


def trainer(directory, steps, *callbacks, **settings):
    """Lightning's Trainer on a store in ``directory``."""
    return L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        deterministic=True,
        callbacks=list(callbacks),
        plugins=[StoreCheckpointIO(Store(directory), lambda checkpoint: {})],
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=directory,
        **({"logger": False, "enable_checkpointing": False} | settings),
    )


def fit(module, directory, steps=2, entry=None, callbacks=()):
    """Train from the checkpoint ``entry`` to ``steps``; returns the trainer and what each step
    returned.
    """
    outputs = Outputs()
    t = trainer(directory, steps, outputs, *callbacks)
    start = int(entry.parent.name.removeprefix("step-")) if entry else 0
    t.fit(module, DataLoader(Stream(start), batch_size=None), ckpt_path=entry, weights_only=True)
    return t, outputs.steps


def save(t):
    """Commit the trainer's state; returns the path."""
    path = t.strategy.checkpoint_io.store.state(t.global_step)
    t.save_checkpoint(path)
    return path


SGD = partial(torch.optim.SGD, lr=0.5)
