"""Judge the samples of a run against its images.

python evaluate.py run=cars evaluate.n=5000
"""

from pathlib import Path

from sturdy.cli.main import run_script

if __name__ == "__main__":
    config = Path(__file__).resolve().parent / "conf" / "evaluate.yaml"
    run_script(config, "sturdy.evaluation.evaluate:evaluate")
