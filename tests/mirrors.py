"""Read a run's record and its other loggers from their files."""

import json
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from exact_resume.metrics import read_rows


def metrics(run: Path) -> Counter[tuple[int, str, float]]:
    """Count the values of ``metrics.csv``, as the float32 that TensorBoard keeps."""
    return Counter(
        (int(row["step"]), k, np.float32(v))
        for row in read_rows(run / "metrics.csv")
        for k, v in row.items()
        if v and k != "step"
    )


def wandb_metrics(run: Path) -> Counter[tuple[int, str, float]]:
    """Count the values in the one offline segment."""
    _, rows = segment(run)
    names = ("train/", "val/", "evaluation/")
    return Counter(
        (row["_step"], k, np.float32(v))
        for row in rows
        for k, v in row.items()
        if k.startswith(names)
    )


def tensorboard_metrics(run: Path) -> tuple[Counter[tuple[int, str, float]], set[int]]:
    """Count the scalars, and return the steps with an image."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    names, images = events.Tags()["scalars"], events.Tags()["images"]
    values = Counter(
        (event.step, name, np.float32(event.value))
        for name in names
        for event in events.Scalars(name)
    )
    return values, {event.step for name in images for event in events.Images(name)}


def segment_file(run: Path) -> Path:
    [file] = (run / "wandb").glob("offline-run-*/run-*.wandb")
    return file


def segment(run: Path):
    """Return the run record and the history rows of the one offline segment."""
    from wandb.proto.wandb_internal_pb2 import Record

    records = [Record.FromString(data) for data in frames(segment_file(run).read_bytes())]
    history = [r.history for r in records if r.WhichOneof("record_type") == "history"]
    rows = [
        {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in h.item} for h in history
    ]
    run_record = next((r.run for r in records if r.WhichOneof("record_type") == "run"), None)
    return run_record, rows


def summaries(run: Path) -> list[dict[str, float]]:
    """Return the updates of the summary in the one offline segment."""
    from wandb.proto.wandb_internal_pb2 import Record

    records = [Record.FromString(data) for data in frames(segment_file(run).read_bytes())]
    updates = [list(r.summary.update) for r in records if r.WhichOneof("record_type") == "summary"]
    return [
        {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in update}
        for update in updates
    ]


def frames(data: bytes, header: int = 7, block: int = 32768) -> Iterator[bytes]:
    """Records of a LevelDB log, which is what a ``.wandb`` file is: crc (4), length (2), kind (1),
    data, in blocks.
    """
    at, record = header, b""
    while at + 7 <= len(data):
        if block - at % block < 7:
            at += block - at % block
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""
