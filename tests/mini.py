"""A small script with the real command line and train.py's exit codes, which starts quickly."""

import json
import os
import shutil
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONFIG = """
name: mini
seed: 0
end: 0 # exit code
wait: null # heard: for a signal, once, then save; deaf: without a handler; slow: a save never ends
paths:
  runs: runs
"""


def project(tmp: Path) -> Path:
    """Write the script and its configuration under ``tmp``; returns the script."""
    shutil.copytree(
        ROOT / "conf" / "hydra", tmp / "conf" / "hydra", ignore=shutil.ignore_patterns("help")
    )
    (tmp / "conf" / "train.yaml").write_text(CONFIG)
    (tmp / "train.py").write_text(
        "from pathlib import Path\nfrom sturdy.cli.main import run_script\n"
        "run_script(Path(__file__).resolve().parent / 'conf' / 'train.yaml', 'mini:main')\n"
    )
    return tmp / "train.py"


def main(cfg, overrides):
    """Write each start, and the signal that came, into the run's directory."""
    from exact_resume.signals import EXIT_RESUMABLE, Preemption

    home = Path(cfg.paths.runs, cfg.get("name") or cfg.run)
    home.mkdir(parents=True, exist_ok=True)
    with (home / "starts").open("a") as file:
        file.write(" ".join(overrides) + "\n")
    if cfg.wait and not (home / "saved").exists():
        preemption = Preemption()
        if cfg.wait != "deaf":
            preemption.install(training=True)
        (home / "pid.new").write_text(f"{os.getpid()} {os.getppid()}")
        (home / "pid.new").rename(home / "pid")
        end = time.monotonic() + 100  # it outlives no test for long
        while not preemption.signal and time.monotonic() < end:
            time.sleep(0.01)
        assert preemption.signal
        (home / "saved").write_text(preemption.signal.name)
        while cfg.wait == "slow" and time.monotonic() < end:
            time.sleep(0.01)
        return EXIT_RESUMABLE
    if "x" in cfg:  # a score for a search: least at x = 0.3
        (home / "metrics.csv").write_text(f"step,train/loss,val/loss\n1,1,{(cfg.x - 0.3) ** 2}\n")
    if "evaluate" in cfg:
        measured = {"fid": 6 / cfg.steps} if cfg.end == 0 else {}
        Path(cfg.evaluate.summary).write_text(json.dumps(measured | {"note": cfg.run}))
    return cfg.end


def pids(home: Path) -> list[int]:
    """Of a run that waits, and of the process that started it."""
    return [int(pid) for pid in there(home / "pid").read_text().split()]


def there(path: Path, lines: int = 0, seconds: float = 60.0) -> Path:
    """``path``, as soon as it is there and has as many lines."""
    end = time.monotonic() + seconds
    while not path.exists() or len(path.read_text().splitlines()) < lines:
        assert time.monotonic() < end, f"{path} did not come"
        time.sleep(0.01)
    return path


def starts(home: Path) -> int:
    return len((home / "starts").read_text().splitlines()) if (home / "starts").exists() else 0


def environment(*before: Path) -> dict[str, str]:
    """With the tests' modules to import, and programs in ``before`` found first."""
    path = [str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    programs = [*map(str, before), os.environ["PATH"]]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path), "PATH": os.pathsep.join(programs)}


def command(script: Path, *words: str) -> list[str]:
    return [sys.executable, str(script), "-m", *words]
