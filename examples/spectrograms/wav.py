"""WAV files of one channel and 16 bits, read and written by Python's own ``wave``."""

import wave
from pathlib import Path

import numpy as np

from exact_resume.files import atomic_write
from examples.spectrograms.mel import RATE
from sturdy.data.source import BadImageError


def read_wav(path: Path) -> np.ndarray:
    """Return the samples of a file, float32 ``(n,)`` in [-1, 1]; of several channels, their mean.

    Raises:
        BadImageError: it is no WAV file of ``RATE`` samples a second and 16 bits.
    """
    try:
        with wave.open(str(path), "rb") as file:
            rate, width, channels = file.getframerate(), file.getsampwidth(), file.getnchannels()
            content = file.readframes(file.getnframes())
    except (OSError, EOFError, wave.Error) as error:
        raise BadImageError(f"cannot be read as WAV: {error}") from error
    if rate != RATE or width != 2:
        raise BadImageError(
            f"has {rate} samples a second of {8 * width} bits, not {RATE} of 16: "
            f"sox FILE -r {RATE} -b 16 OUT.wav converts it"
        )
    samples = np.frombuffer(content[: len(content) // (2 * channels) * 2 * channels], "<i2")
    return samples.reshape(-1, channels).mean(axis=1, dtype=np.float32) / np.float32(32768)


def write_wav(path: Path, sound: np.ndarray) -> None:
    """Write ``sound`` ``(n,)`` in [-1, 1] to ``path``, completely or not at all."""
    samples = np.clip(np.round(np.asarray(sound, np.float64) * 32768), -32768, 32767)
    with atomic_write(path, durable=False, unique=True) as file, wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(RATE)
        out.writeframes(samples.astype("<i2").tobytes())
