"""Write drawn cars with captions: a folder of PNGs and ``metadata.jsonl``."""

import argparse
import json
from pathlib import Path

from PIL import Image

from examples.cars.source import Attributes, Cars


def describe(car: Attributes) -> str:
    """Return a caption, such as ``a red pickup, city, night``."""
    return f"a {car.paint} {car.body}, {car.backdrop}, {car.light}"


def write_cars(out: Path, n: int = 40, size: int = 64) -> None:
    """Write ``n`` images of ``size`` pixels a side into ``out``, and their captions."""
    cars = Cars(n=n, size=size)
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for k in range(n):
        name = f"{k:04}.png"
        Image.fromarray(cars.decode(k).transpose(1, 2, 0)).save(out / name)
        rows.append(json.dumps({"file_name": name, "text": describe(cars.attributes(k))}) + "\n")
    (out / "metadata.jsonl").write_text("".join(rows))


def main() -> None:
    """Read the arguments and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to write")
    parser.add_argument("--n", type=int, default=40, help="number of images")
    parser.add_argument("--size", type=int, default=64, help="height and width in pixels")
    arguments = parser.parse_args()
    write_cars(arguments.out, arguments.n, arguments.size)
    print(f"{arguments.out}: {arguments.n} cars with captions")


if __name__ == "__main__":
    main()
