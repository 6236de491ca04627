"""Small pictures as files, and sources without files."""

import io
import os
import struct
import time
import zlib

import numpy as np
from PIL import Image

from sturdy.data.source import BadImageError

COLOURS = ((200, 40, 30), (20, 160, 60), (30, 60, 210), (230, 220, 90))


def quarters(height=40, width=60):
    """Four coloured quarters, so that every mirror and turn shows."""
    x = np.empty((height, width, 3), dtype=np.uint8)
    x[: height // 2, : width // 2], x[: height // 2, width // 2 :] = COLOURS[:2]
    x[height // 2 :, : width // 2], x[height // 2 :, width // 2 :] = COLOURS[2:]
    return Image.fromarray(x)


def encode(image, format, **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def corners(x):
    """The colours in the middle of the four quarters, ``(4, 3)``."""
    h, w = x.shape[1:]
    return np.array(
        [x[:, y, z] for y in (h // 4, 3 * h // 4) for z in (w // 4, 3 * w // 4)]
    ).astype(int)


def near(x, y, tolerance):
    return np.abs(np.asarray(x, dtype=int) - np.asarray(y, dtype=int)).max() <= tolerance


def png(width, height, bits, kind, rows=b""):
    def chunk(name, body):
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def tiff(pixels, *, photometric):
    """An uncompressed little-endian TIFF of unsigned 16 bits a channel, ``(h, w, c)``."""
    h, w, c = pixels.shape
    body = pixels.astype("<u2").tobytes()
    tags = [
        (256, w),
        (257, h),
        (259, 1),
        (262, photometric),
        (273, 200),
        (277, c),
        (278, h),
        (279, len(body)),
    ]
    entries = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags]
    bits = 180 if c == 3 else 16  # three values do not fit into the entry and lie at byte 180
    entries.insert(2, struct.pack("<HHII", 258, 3, c, bits))
    head = b"II*\0" + struct.pack("<IH", 8, len(entries)) + b"".join(entries) + bytes(4)
    return head.ljust(180, b"\0") + struct.pack("<3H", 16, 16, 16).ljust(20, b"\0") + body


class Noise:
    """A source without files; every ``broken``-th image is broken."""

    classes = ("even", "odd")

    def __init__(self, n=30, shape=(3, 8, 8), broken=0, key="noise"):
        self.n, self.shape, self.broken, self.key = n, shape, broken, key

    def __len__(self):
        return self.n

    def label(self, index):
        return index % 2

    def name(self, index):
        return f"noise {index}"

    def decode(self, index):
        if self.broken and index % self.broken == 0:
            raise BadImageError("on purpose")
        return np.random.default_rng(index).integers(0, 256, self.shape, dtype=np.uint8)


class Slow(Noise):
    """Tells of every decode by a byte in a file, and takes its time."""

    def __init__(self, path, **options):
        super().__init__(**options)
        self.path = path

    def decode(self, index):
        with open(self.path, "ab", buffering=0) as file:
            file.write(b".")
        time.sleep(0.01)
        return super().decode(index)


def only_the_cache(root):
    """What a finished build leaves: one folder and its lock."""
    found = sorted(os.listdir(root))
    return len(found) == 2 and found[1] == found[0] + ".lock"


def content(cache):
    return (
        [cache.image(i).tobytes() for i in range(len(cache))],
        cache.labels.tolist(),
        cache.digest,
    )
