"""A folder of WAV files as a source of pictures of one channel that are not square.

picture k = the log-mel spectrogram of the k-th file        label = its folder
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from examples.spectrograms.mel import HOP, log_mel
from examples.spectrograms.wav import read_wav

VERSION = 1  # raise it whenever decode changes


class Sounds:
    """The WAV files below ``root``, one folder a class; uint8 spectrograms.

    A longer sound is cut at its end, and silence is appended to a shorter one.

    Args:
        root: the folder.
        size: number of bands and of frames: height and width of the pictures.

    Attributes:
        classes: names of the folders.
        channels: 1.
        key: a hash of the names and the content of all files.

    Raises:
        ValueError: there are no WAV files, or ``size`` is no pair.
    """

    channels = 1

    def __init__(self, *, root: str, size: Sequence[int]) -> None:
        self.root = Path(root).expanduser().absolute()
        if isinstance(size, int) or len(size) != 2 or min(size) < 1:
            raise ValueError(f"size={size} must be two whole numbers: [bands,frames]")
        self.bands, self.frames = size
        self.files = sorted(self.root.glob("*/*.wav"))
        if not self.files:
            raise ValueError(
                f"root={root} has no WAV files in folders. To write some: "
                f"python -m examples.spectrograms.synthesise {root}"
            )
        self.classes = tuple(sorted({file.parent.name for file in self.files}))
        digest = hashlib.sha256(repr((VERSION, self.bands, self.frames)).encode())
        for index, file in enumerate(self.files):
            digest.update(self.name(index).encode())
            digest.update(hashlib.sha256(file.read_bytes()).digest())
        self.key = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.files)

    def label(self, index: int) -> int:
        """Return the number of the class."""
        return self.classes.index(self.files[index].parent.name)

    def name(self, index: int) -> str:
        """Return the file's name below the root."""
        return self.files[index].relative_to(self.root).as_posix()

    def content(self, index: int) -> bytes:
        """Return the bytes of the file, which decide whether it is held out."""
        return self.files[index].read_bytes()

    def decode(self, index: int) -> np.ndarray:
        """Return the picture, uint8 ``(1, bands, frames)``.

        Raises:
            sturdy.data.source.BadImageError: the file cannot be used.
        """
        sound = read_wav(self.files[index])[: self.frames * HOP]
        sound = np.pad(sound, (0, self.frames * HOP - len(sound)))
        # In float64, so that other machines, which round otherwise, give the same 8 bits.
        picture = log_mel(torch.from_numpy(sound).double()[None], self.bands)
        return ((picture + 1) * 127.5).round().to(torch.uint8).numpy()
