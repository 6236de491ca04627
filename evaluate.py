"""Compare the images of a run with real ones.

python evaluate.py run=cars evaluate.n=5000
"""

from pathlib import Path

from sturdy.cli.main import run_script

if __name__ == "__main__":
    run_script(
        Path(__file__).resolve().parent / "conf" / "evaluate.yaml",
        "sturdy.evaluation.evaluate:evaluate",
    )
