"""Stored snapshots of the averages, ``runs/<name>/ema/step-00000500.ckpt``, and an EMA of any
length from them.

Each file holds ``step``, ``stds``, and for each of them the averaged parameters by name, and the
buffers once; tensors and primitives only.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exact_resume.checkpoint.store import CheckpointLoadError
from exact_resume.files import atomic_write, make_directory
from sturdy.training.ema import PowerEMA
from sturdy.training.ema_profiles import Profile, fit, gamma

Snapshot = Mapping[str, Any]
WORST = 0.1  # largest error of a profile that is still called an EMA of that length


def snapshot(ema: PowerEMA, step: int, dtype: torch.dtype | None = None) -> Snapshot:
    """The averages after ``step`` updates, the parameters in ``dtype``; not copied where nothing
    changes.
    """

    def whole(tensor: Tensor) -> Tensor:
        tensor = (
            tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        )  # of a part a process has
        return tensor.detach()

    averages = [
        {name: whole(p).to(dtype=dtype, device="cpu") for name, p in network.named_parameters()}
        for network in ema.networks()
    ]
    buffers = {name: whole(b).cpu() for name, b in ema.model.named_buffers()}
    return {"step": step, "stds": ema.stds, "averages": averages, "buffers": buffers}


def write(taken: Snapshot, directory: Path) -> Path:
    """Make ``taken`` a file in ``directory``, durably and whole or not at all; one of the same step
    is replaced.
    """
    make_directory(directory)
    final = path_of(directory, taken["step"])
    with atomic_write(final) as file:
        torch.save(dict(taken), file)
    return final


def path_of(directory: Path, step: int) -> Path:
    """Where the snapshot of ``step`` is."""
    return directory / f"step-{step:08d}.ckpt"


def load(path: Path) -> Snapshot:
    """A snapshot whose tensors are read from the file as they are used.

    Raises:
        CheckpointLoadError: if the file is broken, or holds more than tensors and primitives.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return {key: found[key] for key in ("step", "stds", "averages", "buffers")}
    except OSError:
        raise
    except Exception:  # a broken pickle raises whatever it likes
        raise CheckpointLoadError(
            f"{path} is broken, or no snapshot of averages; delete it to do without"
        ) from None


def reconstruct(snapshots: Sequence[Snapshot], std: float) -> dict[str, Tensor]:
    """The EMA of length ``std`` at the last of ``snapshots``, as a state dict in float32.

    Exact, but for the snapshots' own rounding, where that length is among theirs.

    Raises:
        ValueError: if there is no such length, or the snapshots do not reach it.
    """
    last = max(snapshots, key=lambda taken: taken["step"])
    sources = [(taken, i) for taken in snapshots for i in range(len(taken["stds"]))]
    profiles = [Profile(gamma(taken["stds"][i]), taken["step"]) for taken, i in sources]
    coefficients, error = fit(profiles, Profile(gamma(std), last["step"]))
    if error > WORST:
        raise ValueError(
            f"an EMA of length {std} at step {last['step']} cannot be put together from "
            f"{len(snapshots)} snapshots of "
            f"lengths {last['stds']}: its profile would be {error:.0%} off. Choose one nearer to "
            f"these, or train with "
            f"a smaller callbacks.snapshots.every_n_steps"
        )
    out = {
        name: torch.zeros(p.shape, dtype=torch.float64) for name, p in last["averages"][0].items()
    }
    for (taken, i), coefficient in zip(sources, coefficients.tolist(), strict=True):
        if coefficient:
            for name, p in taken["averages"][i].items():
                out[name].add_(p.double(), alpha=coefficient)
    return {name: p.float() for name, p in out.items()} | {
        name: b.clone() for name, b in last["buffers"].items()
    }


def posthoc_ema(std: float, ema: object, step: int, directory: Path) -> dict[str, Tensor]:
    """The EMA of length ``std`` at a checkpoint's ``step``, from its ``ema`` and the snapshots
    before it.

    Raises:
        ValueError: if it cannot be put together.
        CheckpointLoadError: if a snapshot is broken.
    """
    if not isinstance(ema, PowerEMA):
        raise ValueError(
            f"an EMA of another length ({std}) can only be put together for runs trained with "
            f"ema=power"
        )
    before = [path for path in sorted(directory.glob("step-*.ckpt")) if int(path.stem[5:]) < step]
    return reconstruct([*map(load, before), snapshot(ema, step)], std)
