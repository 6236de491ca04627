"""The names that older versions of the template gave to weights, classes and config keys.

Importing this module lets ``exact_resume`` read the checkpoints of these versions.
"""

from exact_resume.checkpoint.renames import RENAMED, Renamed

RENAMED[1] = Renamed(
    targets={
        "sturdy.data.module": "sturdy.data.datamodule",
        "sturdy.data.cars": "examples.cars.source",
        "sturdy.evaluation.encoders": "sturdy.encoders.encoder",
        "sturdy.training.callbacks.checkpoint": "exact_resume.callbacks.checkpoint",
        "sturdy.training.callbacks.guard.Guard": "exact_resume.callbacks.nan_guard.NanGuard",
        "sturdy.training.callbacks.watchdog": "exact_resume.callbacks.watchdog",
        "sturdy.training.callbacks.samples.Samples": "sturdy.sampling.grid_callback.SampleGrids",
        "sturdy.training.callbacks.snapshots.Snapshots": "sturdy.training.callbacks.ema_snapshots.EMASnapshots",
        "sturdy.training.callbacks.waiting.Waiting": "sturdy.training.callbacks.thread_waiting.ThreadWaiting",
    }
)
