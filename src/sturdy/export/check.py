"""Read an export back in another process, which has only the library that others will use."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sturdy.pretrained.read_back
from sturdy.pretrained.write_weights import save_tensors

SCRIPT = Path(sturdy.pretrained.read_back.__file__)
TOLERANCE = 1e-4  # of the largest number, or of 1 if that is smaller
# The run keeps embeddings of texts in float16.
TOLERANCES = {"embeddings": 2e-3, "pooled": 2e-3, "differing_tensors": 0.0}


class ReadBackError(ValueError):
    """An export cannot be read, or does not compute what the run computes."""


def read_back(
    folder: Path, check: Path, ask: Mapping[str, Any], expected: Mapping[str, Tensor]
) -> tuple[str, dict[str, float]]:
    """Read an export in a process without this project, and compare it with the run.

    Args:
        folder: of the export.
        check: a folder for scratch; it may hold what the reader needs beside the export.
        ask: ``reader`` and its arguments (see ``sturdy.pretrained.read_back``).
        expected: what the run computed.

    Returns:
        The library with its version, and the largest difference by name, as a share of the
        largest number (of 1 if that is smaller).

    Raises:
        ReadBackError: it cannot be read, or differs by more than is tolerated.
    """
    save_tensors(check / "expected.safetensors", expected)
    question = {"threads": torch.get_num_threads(), **ask}
    (check / "ask.json").write_text(json.dumps(question))
    command = [sys.executable, "-I", str(SCRIPT), str(folder), str(check)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=check)
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    last = lines[-1] if lines else f"it ended with code {done.returncode}"
    if done.returncode:
        raise ReadBackError(f"the export could not be read back ({last}); nothing is left of it")
    answer = json.loads(last)
    shares = {}
    for name, (difference, largest) in answer["differences"].items():
        share = difference / max(1.0, largest)
        tolerance = TOLERANCES.get(name, TOLERANCE)
        if not share <= tolerance:
            raise ReadBackError(
                f"the export was read back by {answer['library']}, and its {name} differs from the "
                f"run's by {difference:.3g} of {largest:.3g}, more than {tolerance:g} of it; "
                f"nothing is left of it"
            )
        shares[name] = share
    return answer["library"], shares
