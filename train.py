"""Train, or continue what was killed: python train.py experiment=cars"""

from pathlib import Path

from exact_resume.signals import exit_on_signal

if __name__ == "__main__":
    exit_on_signal()
    from sturdy.cli.main import (
        run_script,  # only now: its imports take a second, in which a signal may come
    )

    run_script(
        Path(__file__).resolve().parent / "conf" / "train.yaml", "sturdy.training.run:train"
    )
