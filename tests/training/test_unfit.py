"""What may pass is tried again by who supervises; a mistake is not."""

import errno
import os
import shutil
import subprocess

import pytest
from hydra.utils import instantiate

from runs import command, train
from sturdy.errors import ConfigError, as_config_error


def failing(number):
    raise OSError(number, os.strerror(number), "images")


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ESTALE, OSError),
        (errno.EIO, OSError),
        (errno.ENOENT, ConfigError),
        (errno.EACCES, ConfigError),
    ],
)
def test_what_a_disk_says_is_a_mistake_or_may_pass(number, kind):
    with pytest.raises(kind, match="images"), as_config_error():
        failing(number)
    with pytest.raises(kind, match="images"), as_config_error():
        instantiate({"_target_": f"{__name__}.failing", "number": number})


@pytest.mark.slow
def test_a_run_is_started_again_where_a_network_disk_was_away(tmp_path):
    """strace counts calls by process, so that the disk is away in every life."""
    if not shutil.which("strace"):
        pytest.skip("strace is not installed")
    train(tmp_path, "one", "trainer.max_steps=3")
    (manifest,) = tmp_path.glob("cache/**/manifest.json")
    away = [
        "strace",
        "-f",
        "-qq",
        "-o",
        os.devnull,
        "-P",
        str(manifest),
        "-e",
        "inject=openat:error=ESTALE:when=1",
    ]
    words = command(tmp_path, "two", "trainer.max_steps=3", "restarts=1")
    done = subprocess.run([*away, *words], capture_output=True, text=True)
    if "ptrace" in done.stderr:
        pytest.skip(f"strace may not trace here: {done.stderr}")
    told = f"error: [Errno {errno.ESTALE}] {os.strerror(errno.ESTALE)}: '{manifest}'\n"
    assert (done.returncode, done.stderr.count(told)) == (1, 2)
    assert "restart 1 of 1: process 0 exited with code 1" in done.stdout
