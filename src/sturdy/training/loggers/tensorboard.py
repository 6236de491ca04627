"""TensorBoard's event files, in ``runs/<name>/tensorboard``: one file, written anew from
``metrics.csv`` at each start.

Events are framed and appended here, without a thread between, so that a kill loses no row but the
last step's.
"""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from exact_resume.replay import ReplayLogger


class Tensorboard(ReplayLogger):
    """Scalars and sample grids in ``directory``; look at them with ``tensorboard --logdir runs``.

    Raises:
        ImportError: if the package ``tensorboard`` is not installed.
    """

    def __init__(self, *, directory: str | Path) -> None:
        super().__init__()
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer.record_writer import RecordWriter
        except ImportError as error:
            how = "pip install 'sturdy-diffusion[tensorboard]'"
            raise ImportError(
                f"logger=tensorboard needs the package tensorboard: {how} ({error})"
            ) from error
        self.event, self.summary, self.record_writer = (
            event_pb2.Event,
            summary_pb2.Summary,
            RecordWriter,
        )
        self.directory = Path(directory)
        self.writer: Any = None

    def start(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        self.older = [*self.directory.glob("events.out.tfevents.*")]
        self.aside = self.directory / "refill.tmp"
        self.writer = self.record_writer(self.aside.open("wb", buffering=0))
        self._append(file_version="brain.Event:2")

    def refilled(self) -> None:
        os.replace(self.aside, self.directory / f"events.out.tfevents.{time.time():.6f}")
        for file in self.older:
            file.unlink()

    def write(
        self, step: int, values: Mapping[str, float], pictures: Mapping[str, list[str]]
    ) -> None:
        summary = [self.summary.Value(tag=key, simple_value=value) for key, value in values.items()]
        for key, paths in pictures.items():
            for i, path in enumerate(paths):
                summary.append(self._picture(f"{key}/{i}" if len(paths) > 1 else key, Path(path)))
        self._append(step=step, summary=self.summary(value=summary))

    def close(self, finished: bool) -> None:
        if self.writer:
            self.writer.close()
            self.writer = None

    def _picture(self, tag: str, path: Path) -> Any:
        with Image.open(path) as image:
            width, height = image.size
        encoded = self.summary.Image(
            height=height, width=width, colorspace=3, encoded_image_string=path.read_bytes()
        )
        return self.summary.Value(tag=tag, image=encoded)

    def _append(self, **event: Any) -> None:
        self.writer.write(self.event(wall_time=time.time(), **event).SerializeToString())
