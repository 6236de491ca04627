"""Prove on this machine that kills change nothing.

python prove.py experiment=cars kills=20 trainer.max_steps=300
"""

import sys
from pathlib import Path

from sturdy.prove import prove

if __name__ == "__main__":
    sys.exit(prove(Path(__file__).resolve().parent, sys.argv[1:]))
