"""The names that older versions of the template gave to weights, classes and config keys.

Importing this module lets ``exact_resume`` read the checkpoints of these versions.
"""

from typing import Any

from exact_resume.checkpoint.renames import RENAMED, Renamed


def _global_mixer_into_example(config: dict[str, Any]) -> dict[str, Any]:
    """Turn ``whole`` of the DiT into the backbone of the example that has it now."""
    backbone = config.get("backbone")
    if not isinstance(backbone, dict) or backbone.get("_target_") != "sturdy.backbone.dit.DiT":
        return config
    units = backbone.pop("whole", 0)
    image_size = backbone.pop("image_size", None)
    if units:
        backbone["_target_"] = "examples.cars.backbone.AlignedDiT"
        backbone["global_units"] = units
        backbone["image_size"] = image_size
    return config


CALLBACKS = "sturdy.training.callbacks"

RENAMED[1] = Renamed(
    targets={
        "sturdy.data.module": "sturdy.data.datamodule",
        "sturdy.data.cars": "examples.cars.source",
        "sturdy.evaluation.encoders": "sturdy.encoders.encoder",
        "sturdy.training.callbacks.checkpoint": "exact_resume.callbacks.checkpoint",
        "sturdy.training.callbacks.guard.Guard": "exact_resume.callbacks.nan_guard.NanGuard",
        "sturdy.training.callbacks.watchdog": "exact_resume.callbacks.watchdog",
        "sturdy.training.callbacks.samples.Samples": "sturdy.sampling.grid_callback.SampleGrids",
        f"{CALLBACKS}.snapshots.Snapshots": f"{CALLBACKS}.ema_snapshots.EMASnapshots",
        f"{CALLBACKS}.waiting.Waiting": f"{CALLBACKS}.thread_waiting.ThreadWaiting",
    },
    weights={
        "ema.others": "ema.extra_averages",
        "backbone.place": "backbone.pos_embed",
        "backbone.whole.compare": "backbone.token_features.in_proj",
        "backbone.whole.think": "backbone.token_features.hidden",
        "backbone.whole.modulation": "backbone.token_features.modulation",
        "backbone.whole.tell": "backbone.token_features.out_proj",
        "backbone.whole.spread": "backbone.token_features.expand",
    },
    convert=_global_mixer_into_example,
)
