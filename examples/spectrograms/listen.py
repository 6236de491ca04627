"""Turn the pictures that sample.py drew into sounds, and into one picture to look at.

    python -m examples.spectrograms.listen runs/spectrograms/pictures

Beside each picture comes a WAV file of its name, and ``spectrograms.png`` shows the first of them
with their frequencies. A sound is a function of its picture, so files that are there stay.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from exact_resume.files import atomic_write
from examples.spectrograms.mel import HOP, LOWEST, RATE, to_sound
from examples.spectrograms.wav import write_wav

SHOWN = 16  # sounds in the figure
COLUMNS = 4
FREQUENCIES = (100, 300, 1000, 3000)  # Hz, on the axis


def read_picture(path: Path) -> Tensor:
    """Return the spectrogram ``(bands, frames)`` in [-1, 1] of a grey PNG.

    Raises:
        ValueError: it is no grey image.
    """
    with Image.open(path) as image:
        if image.mode != "L":
            raise ValueError(f"{path} is no grey image, and so no spectrogram")
        return torch.from_numpy(np.array(image)).float() / 127.5 - 1


def make_sounds(folder: Path) -> list[Path]:
    """Write a WAV file for each picture in ``folder`` that has none; return all pictures.

    Raises:
        ValueError: there are no pictures, or one is no spectrogram.
    """
    pictures = sorted(folder.glob("[0-9]*.png"))
    if not pictures:
        raise ValueError(f"{folder} has no pictures. To draw some: python sample.py run=NAME")
    for picture in pictures:
        sound = picture.with_suffix(".wav")
        if not sound.exists():
            write_wav(sound, to_sound(read_picture(picture)[None])[0].numpy())
    return pictures


def draw_figure(pictures: list[Path], out: Path) -> None:
    """Draw spectrograms in colour, with seconds and hertz, as a PNG."""
    from matplotlib.figure import Figure

    rows = -(-len(pictures) // COLUMNS)
    figure = Figure(figsize=(2.2 * COLUMNS, 1.7 * rows), layout="constrained", dpi=80)
    grid = figure.subplots(rows, COLUMNS, sharex=True, sharey=True, squeeze=False)
    for axes in grid.flat[len(pictures) :]:
        axes.set_axis_off()
    low, high = _mel(LOWEST), _mel(RATE / 2)
    for axes, path in zip(grid.flat, pictures, strict=False):
        spectrogram = read_picture(path)
        extent = (0, spectrogram.shape[1] * HOP / RATE, low, high)
        levels = spectrogram.numpy()
        axes.imshow(levels, extent=extent, aspect="auto", cmap="magma", vmin=-1, vmax=1)
        axes.set_yticks([_mel(hertz) for hertz in FREQUENCIES], [f"{f} Hz" for f in FREQUENCIES])
        axes.set_title(path.stem, fontsize=8)
        axes.tick_params(labelsize=7)
    with atomic_write(out, durable=False, unique=True) as file:
        figure.savefig(file, format="png")


def _mel(hertz: float) -> float:
    return float(2595 * np.log10(1 + hertz / 700))


def main() -> int:
    """Read the arguments and write the files; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="with the pictures")
    folder = parser.parse_args().folder
    try:
        pictures = make_sounds(folder)
        draw_figure(pictures[:SHOWN], folder / "spectrograms.png")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{len(pictures)} sounds are in {folder}; spectrograms.png shows {SHOWN} at most")
    return 0


if __name__ == "__main__":
    sys.exit(main())
