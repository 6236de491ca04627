"""Judge a run's pictures against its images: python evaluate.py run=cars evaluate.n=5000"""

from pathlib import Path

from sturdy.door import open_door

if __name__ == "__main__":
    open_door(Path(__file__).resolve().parent / "conf" / "evaluate.yaml", "sturdy.training.evaluate:evaluate")
