"""Systems and file systems that lack something: what can go on goes on, and the rest is told in a
line.
"""

import os
import subprocess
import sys

import pytest

from exact_resume.files import LockUnsupportedError
from exact_resume.system import available_cpus
from examples.cars.source import Cars
from runs import ROOT, SMALL, command, differences, train
from sturdy.data.cache import open_cache

# What macOS lacks, how it starts processes, and its own way to empty a drive's memory.
MACOS = """
import fcntl, multiprocessing, os, select, signal
for module, names in {
    os: "sched_getaffinity sched_setaffinity posix_fallocate posix_fadvise copy_file_range "
    "memfd_create pidfd_open",
    signal: "sigtimedwait sigwaitinfo",
    select: "epoll",
    fcntl: "F_OFD_SETLK",
}.items():
    for name in names.split():
        if hasattr(module, name):
            delattr(module, name)
multiprocessing.set_start_method("spawn")
call = fcntl.fcntl

def full(descriptor, number, *args):
    if number != 51:
        return call(descriptor, number, *args)
    os.fsync(descriptor)
    name = os.readlink(f"/proc/self/fd/{descriptor}")
    with open(os.environ["FLUSHED"], "a") as file:
        file.write(f"{name}\\n")

fcntl.F_FULLFSYNC, fcntl.fcntl = 51, full
"""
WINDOWS = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name in ("fcntl", "resource"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
sys.modules.pop("fcntl", None)
"""


def on(system, tmp, words):
    """Run ``words`` where Python begins with the code ``system``."""
    there = tmp / "system"
    there.mkdir(exist_ok=True)
    (there / "sitecustomize.py").write_text(system)
    path = os.pathsep.join(filter(None, [str(there), os.environ.get("PYTHONPATH")]))
    env = os.environ | {"PYTHONPATH": path, "FLUSHED": str(tmp / "flushed")}
    return subprocess.run(words, capture_output=True, text=True, timeout=300, env=env)


def test_a_run_on_macos(tmp_path):
    base = [word for word in SMALL if not word.startswith("trainer.threads")]
    done = on(
        MACOS,
        tmp_path,
        command(tmp_path, "mac", "trainer.max_steps=4", "data.num_workers=1", base=base),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    flushed = {line.rpartition("/")[2] for line in (tmp_path / "flushed").read_text().splitlines()}
    assert {"state.ckpt", "manifest.json", "images.bin", ".lock"} <= flushed
    words = ["run=mac", "sample.n=2", "sampler.steps=2", f"paths.runs={tmp_path / 'runs'}"]
    done = on(MACOS, tmp_path, [sys.executable, str(ROOT / "sample.py"), *words])
    assert done.returncode == 0, done.stdout + done.stderr


def test_where_the_system_cannot_tell_all_cpus_are_counted(monkeypatch):
    assert available_cpus() == len(os.sched_getaffinity(0))
    monkeypatch.delattr(os, "sched_getaffinity")
    assert available_cpus() == os.cpu_count()


@pytest.mark.parametrize(
    "script", ["train.py", "sample.py", "evaluate.py", "export.py", "serve.py", "prove.py"]
)
def test_windows_is_told_what_to_use(script, tmp_path):
    done = on(WINDOWS, tmp_path, [sys.executable, str(ROOT / script), "run=x"])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: this project needs Linux or macOS; on Windows use WSL\n"


def test_runs_where_files_cannot_be_locked(tmp_path):
    done = train(tmp_path, "run", sabotage="without-locks", code=2)
    assert "error: paths.runs: " in done.stderr
    assert (
        "runs/run is on a file system that cannot lock files: use a local disk; "
        "docs/guides/storage.md" in done.stderr
    )
    assert done.stderr.count("\n") == 1


def test_a_cache_where_files_cannot_be_locked(tmp_path, monkeypatch):
    import sabotage

    for name in ("lockf", "flock"):
        monkeypatch.setattr(f"fcntl.{name}", None)  # to be put back
    sabotage.without_locks()
    with pytest.raises(
        LockUnsupportedError, match=r"^cache=.*/cache is on a file system that cannot lock"
    ):
        open_cache(Cars(n=4, size=8), root=tmp_path / "cache")


def test_a_directory_where_nothing_may_be_written_is_a_mistake(tmp_path):
    (tmp_path / "runs").mkdir(mode=0o500)
    if os.access(tmp_path / "runs", os.W_OK):
        pytest.skip("root may write everywhere")
    done = train(tmp_path, "run", code=2)
    assert (
        f"error: paths.runs: {tmp_path / 'runs' / 'run'} cannot be written, permission denied"
        in done.stderr
    )


def test_where_a_directory_cannot_be_synced_the_run_goes_on_and_says_so_once(tmp_path):
    weak = train(tmp_path, "weak", sabotage="without-directory-sync")
    assert (weak.stdout + weak.stderr).count(
        "is on a file system that cannot sync a directory: a power cut"
    ) == 1
    train(tmp_path, "whole")
    assert differences(tmp_path, "weak", "whole") == []
