"""Find how a run's pictures are best drawn: python tune.py run=cars tune.scales=[1,1.5,2] tune.steps=[8,15]"""

from pathlib import Path

from sturdy.cli.main import run_script

if __name__ == "__main__":
    run_script(
        Path(__file__).resolve().parent / "conf" / "tune.yaml", "sturdy.evaluation.tune:tune"
    )
