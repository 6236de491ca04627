"""TensorBoard's event files, in ``runs/<name>/tensorboard``.

Each start writes one new file from ``metrics.csv``, which then replaces the older one. Events are
appended here and not in a thread, so that a kill loses no row but those of the last step.
"""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from typing_extensions import override

from exact_resume.replay import ReplayLogger


class Tensorboard(ReplayLogger):
    """Scalars and sample grids; look at them with ``tensorboard --logdir runs``.

    Args:
        directory: where the event file is written.

    Raises:
        ImportError: the package ``tensorboard`` is not installed.
    """

    def __init__(self, *, directory: str | Path) -> None:
        super().__init__()
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer.record_writer import RecordWriter
        except ImportError as error:
            command = "pip install 'sturdy-diffusion[tensorboard]'"
            raise ImportError(
                f"logger=tensorboard needs the package tensorboard: {command} ({error})"
            ) from error
        self.make_event = event_pb2.Event
        self.make_summary = summary_pb2.Summary
        self.make_writer = RecordWriter
        self.directory = Path(directory)
        self.writer: Any = None

    @override
    def start(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        self.older = [*self.directory.glob("events.out.tfevents.*")]
        self.unfinished = self.directory / "refill.tmp"
        self.writer = self.make_writer(self.unfinished.open("wb", buffering=0))
        self._append(file_version="brain.Event:2")

    @override
    def on_refilled(self) -> None:
        os.replace(self.unfinished, self.directory / f"events.out.tfevents.{time.time():.6f}")
        for file in self.older:
            file.unlink()

    @override
    def write(
        self, step: int, values: Mapping[str, float], images: Mapping[str, list[str]]
    ) -> None:
        parts = []
        for name, value in values.items():
            parts.append(self.make_summary.Value(tag=name, simple_value=value))
        for name, paths in images.items():
            for i, path in enumerate(paths):
                tag = f"{name}/{i}" if len(paths) > 1 else name
                parts.append(self._image(tag, Path(path)))
        self._append(step=step, summary=self.make_summary(value=parts))

    @override
    def close(self, finished: bool) -> None:
        if self.writer:
            self.writer.close()
            self.writer = None

    def _image(self, tag: str, path: Path) -> Any:
        with Image.open(path) as image:
            width, height = image.size
        encoded = self.make_summary.Image(
            height=height, width=width, colorspace=3, encoded_image_string=path.read_bytes()
        )
        return self.make_summary.Value(tag=tag, image=encoded)

    def _append(self, **fields: Any) -> None:
        event = self.make_event(wall_time=time.time(), **fields)
        self.writer.write(event.SerializeToString())
