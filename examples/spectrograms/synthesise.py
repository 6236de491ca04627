"""Write a folder of synthesised sounds, one folder a class: bells, engines, horns, plucked strings.

    python -m examples.spectrograms.synthesise sounds

Sound i of a class is a function of (seed, class, i). Files that are there are left as they are.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np

from examples.spectrograms.mel import RATE
from examples.spectrograms.wav import write_wav

SAMPLES = RATE  # of a sound: one second
TIME = np.arange(SAMPLES) / RATE
LOUDEST = 0.7  # of 1
BELL_RATIOS = (0.5, 1.0, 1.19, 1.5, 2.0, 2.74, 3.76, 4.07)  # of its partials to its note


def bell(draw: np.random.Generator) -> np.ndarray:
    """Return a struck bell: partials that are no harmonics, the higher the sooner silent."""
    note = draw.uniform(350, 900)
    since = TIME - draw.uniform(0, 0.3)
    sound = np.zeros(SAMPLES)
    for ratio in BELL_RATIOS:
        decay = np.exp(-since * ratio * draw.uniform(2, 5))
        phase = draw.uniform(0, 2 * np.pi)
        sound += draw.uniform(0.3, 1) * decay * np.sin(2 * np.pi * note * ratio * since + phase)
    return np.where(since > 0, sound * np.minimum(1, since * 500), 0)


def engine(draw: np.random.Generator) -> np.ndarray:
    """Return an engine: harmonics of 35 to 110 Hz that rise or fall, and hiss that pulses."""
    start, end = draw.uniform(35, 110, size=2)
    phase = 2 * np.pi * np.cumsum(np.linspace(start, end, SAMPLES)) / RATE
    sound = np.zeros(SAMPLES)
    for harmonic in range(1, 25):
        angle = harmonic * phase + draw.uniform(0, 2 * np.pi)
        sound += draw.uniform(0.3, 1) / harmonic**0.8 * np.sin(angle)
    hiss = draw.normal(size=SAMPLES) * (1 + np.sin(phase)) * draw.uniform(0.02, 0.15)
    return sound + hiss


def horn(draw: np.random.Generator) -> np.ndarray:
    """Return a car's horn: two notes a third apart with many harmonics, blown once or twice."""
    note = draw.uniform(280, 480)
    sound = np.zeros(SAMPLES)
    for base in (note, note * draw.choice([1.2, 1.25])):
        for harmonic in range(1, int(7000 / base)):
            strength = draw.uniform(0.6, 1) / harmonic**0.6
            angle = 2 * np.pi * base * harmonic * TIME + draw.uniform(0, 2 * np.pi)
            sound += strength * np.sin(angle)
    start = draw.uniform(0.02, 0.15)
    blows = [(start, start + draw.uniform(0.5, 0.75))]
    if draw.random() < 0.5:
        pause = draw.uniform(0.3, 0.4)
        blows = [(start, pause), (pause + 0.1, draw.uniform(0.75, 0.95))]
    return sound * sum(_between(first, last) for first, last in blows)


def pluck(draw: np.random.Generator) -> np.ndarray:
    """Return two or three plucked notes, one after the other (Karplus and Strong 1983)."""
    sound = np.zeros(SAMPLES)
    notes = draw.integers(2, 4)
    for k in range(notes):
        start = int((k / notes + draw.uniform(0, 0.05)) * SAMPLES)
        sound[start:] += _string(draw, draw.uniform(110, 440), SAMPLES - start)
    return sound


CLASSES: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    "bell": bell,
    "engine": engine,
    "horn": horn,
    "pluck": pluck,
}


def synthesise(name: str, index: int, seed: int = 0) -> np.ndarray:
    """Return sound ``index`` of class ``name``, float64 ``(SAMPLES,)`` in [-1, 1]."""
    draw = np.random.default_rng([seed, list(CLASSES).index(name), index])
    sound = CLASSES[name](draw)
    return LOUDEST * draw.uniform(0.5, 1) * sound / np.abs(sound).max()


def write_sounds(folder: Path, n: int, seed: int = 0) -> int:
    """Write ``n`` sounds of each class; return how many were not there yet."""
    written = 0
    for name in CLASSES:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index in range(n):
            path = folder / name / f"{index:04}.wav"
            if not path.exists():
                write_wav(path, synthesise(name, index, seed))
                written += 1
    return written


def _between(first: float, last: float) -> np.ndarray:
    """Return 1 between two times in seconds and 0 elsewhere, with slopes of 20 ms."""
    return np.clip(np.minimum(TIME - first, last - TIME) / 0.02, 0, 1)


def _string(draw: np.random.Generator, note: float, samples: int) -> np.ndarray:
    """Return a string: noise that goes round a loop, and is averaged on each round."""
    period = int(RATE / note)
    loop = draw.uniform(-1, 1, period)
    rounds = []
    for _ in range(-(-samples // period)):
        rounds.append(loop)
        loop = 0.996 * (loop + np.roll(loop, 1)) / 2
    return np.concatenate(rounds)[:samples]


def main() -> None:
    """Read the arguments and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path("sounds"), metavar="FOLDER")
    parser.add_argument("--n", type=int, default=400, help="sounds of each class")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    written = write_sounds(arguments.folder, arguments.n, arguments.seed)
    print(f"{arguments.folder}: {written} sounds written, of {', '.join(CLASSES)}")


if __name__ == "__main__":
    main()
