"""Draw images from the EMA weights of a run.

python sample.py run=cars sample.label=pickup
"""

from pathlib import Path

from sturdy.cli.main import run_script

if __name__ == "__main__":
    run_script(
        Path(__file__).resolve().parent / "conf" / "sample.yaml", "sturdy.sampling.sample:main"
    )
