"""``python copied_run.py HOME URL STEPS [CKPT_PATH]``: a small stock training with a second copy.

It checkpoints every 20 steps and validates every 50. URL ``none`` makes none.
"""

import os
import sys
import time

import lightning as L
from lightning.pytorch.callbacks import Callback

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "examples", "plain_lightning"))

from exact_resume import Checkpoint, ExactTraining, PositionData
from train import Classifier, spirals


class Slow(Callback):
    """Gives the thread that copies its share of a step, and a test time to kill."""

    def on_train_batch_end(self, *args):
        time.sleep(float(os.environ.get("STEP_SECONDS", "0")))


def main(home: str, url: str, steps: str, ckpt_path: str = "auto") -> int:
    L.seed_everything(0, verbose=False)
    module = Classifier(200)
    checkpoint = Checkpoint(every_n_train_steps=20, remote=None if url == "none" else url)
    training = ExactTraining(home, config={"lr": module.lr}, checkpoint=checkpoint)
    data = PositionData(spirals(4000, 1), spirals(400, 2), batch_size=32)
    options = training.trainer_options()
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=int(steps),
        val_check_interval=50,
        enable_progress_bar=False,
        callbacks=[*options.pop("callbacks"), Slow()],
        **options,
    )
    return training.fit(trainer, module, data, None if ckpt_path == "null" else ckpt_path)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
