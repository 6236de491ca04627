"""Train, or continue a run that was killed.

python train.py experiment=cars
"""

from pathlib import Path

from exact_resume.signals import exit_on_signal

if __name__ == "__main__":
    exit_on_signal()  # the next import takes a second, in which a signal may come
    from sturdy.cli.main import run_script

    config = Path(__file__).resolve().parent / "conf" / "train.yaml"
    run_script(config, "sturdy.training.run:train")
