"""Stored averages, ``runs/<name>/ema/step-00000500.ckpt``, and an EMA of any length from them.

Each file holds ``step``, ``stds``, the averaged parameters by name for each of these, the buffers
once, and the ``format`` of the names; tensors and primitives only.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exact_resume.checkpoint.renames import rename_state
from exact_resume.checkpoint.store import FORMAT, CheckpointLoadError
from exact_resume.files import atomic_write, make_directory
from sturdy.training.ema import PowerEMA
from sturdy.training.ema_profiles import Profile, fit, gamma
from sturdy.training.strategies import full

Snapshot = Mapping[str, Any]
MAX_ERROR = 0.1  # largest error of a profile that is still called an EMA of that length


def snapshot(ema: PowerEMA, step: int, dtype: torch.dtype | None = None) -> Snapshot:
    """Return the averages after ``step`` updates, the parameters in ``dtype``.

    It holds what a checkpoint holds of them. Tensors that stay as they are, are not copied.
    """
    saved = ema.model.state_dict().keys()
    averages = []
    for network in ema.networks():
        parameters = [(name, p) for name, p in network.named_parameters() if name in saved]
        averages.append(
            {name: full(p).detach().to(dtype=dtype, device="cpu") for name, p in parameters}
        )
    buffers = {
        name: full(b).detach().cpu() for name, b in ema.model.named_buffers() if name in saved
    }
    return {
        "step": step,
        "stds": ema.stds,
        "averages": averages,
        "buffers": buffers,
        "format": FORMAT,
    }


def write(taken: Snapshot, directory: Path) -> Path:
    """Write ``taken`` to a file in ``directory``, atomically; replace one of the same step."""
    make_directory(directory)
    final = path_of(directory, taken["step"])
    with atomic_write(final) as file:
        torch.save(dict(taken), file)
    return final


def path_of(directory: Path, step: int) -> Path:
    """Return the path of the snapshot of ``step``."""
    return directory / f"step-{step:08d}.ckpt"


def load(path: Path) -> Snapshot:
    """Load a snapshot; its tensors are read from the file when they are used.

    Raises:
        CheckpointLoadError: the file is broken, or holds more than tensors and primitives.
    """
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        found = {key: stored[key] for key in ("step", "stds", "averages", "buffers")}
        version = stored.get("format", 1)
    except OSError:
        raise
    except Exception:  # a broken pickle raises anything
        raise CheckpointLoadError(
            f"{path} is broken, or no snapshot of averages; delete it to do without"
        ) from None
    found["averages"] = [_todays_names(average, version) for average in found["averages"]]
    found["buffers"] = _todays_names(found["buffers"], version)
    return found


def reconstruct(snapshots: Sequence[Snapshot], std: float) -> dict[str, Tensor]:
    """Return the EMA of length ``std`` at the last of ``snapshots``, as a state dict in float32.

    If that length is among the stored ones, the result is exact up to their own rounding.

    Raises:
        ValueError: there is no such length, or it is too far from the stored ones.
    """
    last = max(snapshots, key=lambda taken: taken["step"])
    sources = [(taken, i) for taken in snapshots for i in range(len(taken["stds"]))]
    profiles = [Profile(gamma(taken["stds"][i]), taken["step"]) for taken, i in sources]
    coefficients, error = fit(profiles, Profile(gamma(std), last["step"]))
    if error > MAX_ERROR:
        raise ValueError(
            f"an EMA of length {std} at step {last['step']} cannot be put together from "
            f"{len(snapshots)} snapshots of lengths {last['stds']}: its profile would be "
            f"{error:.0%} off. Choose one nearer to these, or train with a smaller "
            f"callbacks.snapshots.every_n_steps"
        )
    first = last["averages"][0]
    sums = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in first.items()}
    for (taken, i), coefficient in zip(sources, coefficients.tolist(), strict=True):
        if coefficient:
            for name, p in taken["averages"][i].items():
                sums[name].add_(p.double(), alpha=coefficient)
    buffers = {name: buffer.clone() for name, buffer in last["buffers"].items()}
    return {name: p.float() for name, p in sums.items()} | buffers


def posthoc_ema(std: float, ema: object, step: int, directory: Path) -> dict[str, Tensor]:
    """Return the EMA of length ``std`` at a checkpoint's ``step``.

    It is computed from the checkpoint's ``ema`` and the earlier snapshots in ``directory``.

    Raises:
        ValueError: it cannot be computed.
        CheckpointLoadError: a snapshot is broken.
    """
    if not isinstance(ema, PowerEMA):
        raise ValueError(
            f"an EMA of another length ({std}) can only be put together for runs trained with "
            f"ema=power"
        )
    paths = sorted(directory.glob("step-*.ckpt"))
    before = [load(path) for path in paths if int(path.stem[5:]) < step]
    return reconstruct([*before, snapshot(ema, step)], std)


def _todays_names(weights: Mapping[str, Tensor], version: int) -> Mapping[str, Tensor]:
    """Return the weights of a file in format ``version`` under the names of today."""
    return rename_state({"format": version, "state_dict": weights})["state_dict"]
