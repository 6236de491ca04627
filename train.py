"""Train, or continue what was killed: python train.py experiment=cars"""

from pathlib import Path

from sturdy.resume.preemption import leave_on_signal

if __name__ == "__main__":
    leave_on_signal()
    from sturdy.door import open_door  # only now: its imports take a second, in which a signal may come

    open_door(Path(__file__).resolve().parent / "conf" / "train.yaml", "sturdy.training.launch:train")
