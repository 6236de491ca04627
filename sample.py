"""Draw pictures from a run's EMA weights: python sample.py run=cars sample.label=pickup"""

from pathlib import Path

from sturdy.door import open_door

if __name__ == "__main__":
    open_door(Path(__file__).resolve().parent / "conf" / "sample.yaml", "sturdy.training.draw:draw")
