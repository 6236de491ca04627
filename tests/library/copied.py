"""``python copied.py HOME URL STEPS SECONDS``: a small run of stock Lightning with a second copy.

Without a URL (``-``) it has none. A step takes at least ``SECONDS``, so that a signal can strike
between any two. ``SABOTAGE`` in the environment takes a mechanism of the copy away.
"""

import hashlib
import os
import sys
import time
from pathlib import Path
from typing import IO

import lightning as L
from torch import Tensor

sys.path[:0] = [str(Path(__file__).parents[2])]

from exact_resume import Checkpoint, ExactTraining, PositionData  # noqa: E402
from examples.plain_lightning.train import Classifier, spirals  # noqa: E402

EVERY = 20  # steps between two checkpoints


class SlowClassifier(Classifier):
    """A classifier that takes its time."""

    seconds = 0.0

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        time.sleep(self.seconds)
        return super().training_step(batch, batch_idx)


def main(home: str, url: str, steps: str, seconds: str) -> int:
    """Train, or continue; return the exit code."""
    if fault := os.environ.get("SABOTAGE"):
        SABOTAGE[fault]()
    SlowClassifier.seconds = float(seconds)
    L.seed_everything(0, verbose=False)
    remote = {} if url == "-" else {"remote": url}
    saving = Checkpoint(every_n_train_steps=EVERY, keep_last=2, keep_best=0, **remote)
    training = ExactTraining(home, config={"steps": int(steps)}, checkpoint=saving)
    data = PositionData(spirals(1000, 1), batch_size=8)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=int(steps),
        log_every_n_steps=1,
        enable_progress_bar=False,
        **training.trainer_options(),
    )
    return training.fit(trainer, SlowClassifier(int(steps)), data)


def without_reading_back() -> None:
    """Take what was sent for what is there."""
    from exact_resume.checkpoint.remote import Remote

    def put(self: Remote, name: str, file: IO[bytes]) -> tuple[int, str]:
        content = file.read()
        with self._available(writing=True), self._open_new(name) as target:
            target.write(content)
        return len(content), hashlib.sha256(content).hexdigest()

    Remote.put = put  # type: ignore[method-assign]


def manifest_first() -> None:
    """Send the manifest before the file that it describes."""
    from exact_resume.checkpoint.remote import Remote

    put = Remote.put

    def hasty(self: Remote, name: str, file: IO[bytes]) -> tuple[int, str]:
        if name.endswith("state.ckpt"):
            with Path(file.name).with_name("manifest.json").open("rb") as manifest:
                put(self, name.replace("state.ckpt", "manifest.json"), manifest)
        return put(self, name, file)

    Remote.put = hasty  # type: ignore[method-assign]


SABOTAGE = {"not-read-back": without_reading_back, "manifest-first": manifest_first}

if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
