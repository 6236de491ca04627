"""Write what a run has learned in a format that other programs read.

python export.py run=cars to=torch_export
"""

from pathlib import Path

from sturdy.cli.main import run_script

if __name__ == "__main__":
    run_script(Path(__file__).resolve().parent / "conf" / "export.yaml", "sturdy.export.main:main")
