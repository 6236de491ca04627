"""Train, or continue what was killed: python train.py experiment=cars"""

from pathlib import Path

from sturdy.door import open_door

if __name__ == "__main__":
    open_door(Path(__file__).resolve().parent / "conf" / "train.yaml", "sturdy.training.launch:train")
