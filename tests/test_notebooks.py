"""The notebooks run as they are, on a small run."""

import json
import os
import subprocess
import sys

from runs import ROOT, train


def test_look_at_a_run(tmp_path):
    train(tmp_path, "run", "trainer.max_steps=4")
    cells = json.loads((ROOT / "notebooks" / "look_at_a_run.ipynb").read_text())["cells"]
    code = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    environment = os.environ | {"RUN": str(tmp_path / "runs" / "run"), "MPLBACKEND": "agg"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "step 4, 32 images seen; classes: hatchback" in done.stdout
