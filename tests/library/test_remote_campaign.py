"""SIGKILL at random instants, lost machines and bad weather, against a real S3 server."""

import hashlib
import os
import random
import time

import pytest
from machines import Machine, assert_same_bits, check_copy, read_copy

from s3_proxy import Fault
from s3_server import BUCKET, s3_server

pytest.importorskip("moto")
pytest.importorskip("s3fs")
pytestmark = pytest.mark.slow

STEPS, KILLS = 2000, 50
SLOWLY = Fault("slow", ("GET", "PUT"), "state.ckpt", rate=200_000)
WEATHER = [
    Fault("refuse"),
    Fault("hang"),
    Fault("late", ("PUT", "DELETE")),
    Fault("slow", rate=5000),
    Fault("full", ("PUT", "POST")),
    Fault("flip", ("PUT",), "state.ckpt"),
    Fault("flip", ("GET",), "state.ckpt"),
    Fault("flip", ("PUT",), "manifest.json"),
    Fault("cut"),
    Fault("forget"),
]


@pytest.fixture(scope="module")
def server():
    with s3_server() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment().items():
            patch.setenv(name, value)
        patch.setenv("STEP_SECONDS", "0.004")
        yield server


def undisturbed(tmp_path, steps):
    """Return the directory of a run that nothing happened to, and that has no second copy."""
    machine = Machine(tmp_path, "undisturbed", steps=steps)
    machine.finish()
    return machine.home


def test_fifty_kills_and_five_lost_machines(server, tmp_path, capsys):
    rng = random.Random(0)
    machine = Machine(tmp_path, "run", f"s3://{BUCKET}/kills", steps=STEPS)
    hits = {"uploading": 0, "downloading": 0, "starting": 0}
    server.proxy.switch(SLOWLY)
    for kill in range(KILLS):
        wiped = kill % 10 == 9
        announced = machine.announced
        machine.start()
        if kill % 10 == 0 and kill:  # on an empty disk
            machine.wait(lambda: server.proxy.is_busy("GET", "state.ckpt"))
        elif kill % 3 == 0:
            machine.wait(lambda: server.proxy.is_busy("PUT", "state.ckpt"))
        elif kill % 3 == 1:
            machine.wait_for_step(machine.step() + rng.randrange(1, 60))
        time.sleep(rng.choice([0, 0.2, 2.0]) * rng.random())
        assert machine.process.is_alive(), machine.said()
        hits["uploading"] += server.proxy.is_busy("PUT")
        hits["downloading"] += server.proxy.is_busy("GET", "state.ckpt")
        (machine.wipe if wiped else machine.kill)()
        hits["starting"] += machine.entered() < 0
        assert machine.entered() < 0 or machine.entered() >= announced
        there = check_copy(server, "kills", tmp_path / "copy")
        assert max(there, default=-1) >= machine.announced
    server.proxy.switch(None)
    machine.finish()
    assert_same_bits(undisturbed(tmp_path, machine.steps), machine.home, machine.steps)
    assert check_copy(server, "kills", tmp_path / "copy")[-1] == machine.steps
    assert hits["uploading"] >= 10
    with capsys.disabled():
        print(f"\n{KILLS} kills: {hits}")


def test_bad_weather(server, tmp_path):
    """Faults at random; the process is killed in every sixth, and its disk lost in every other."""
    rng = random.Random(1)
    machine = Machine(tmp_path, "run", f"s3://{BUCKET}/weather", steps=1000)
    machine.start()
    machine.wait(lambda: machine.copied() >= 40)
    for event in range(24):
        with server.proxy.failing(rng.choice(WEATHER)):
            machine.wait_for_step(machine.step() + rng.randrange(1, 30))
            if event % 6 == 5:
                (machine.wipe if event % 12 == 11 else machine.kill)()
                steps, broken = read_copy(server, "weather", tmp_path / "copy")
                # A lie that was not yet read back lies there; it was not announced.
                assert min(broken, default=STEPS) > machine.announced
                assert max(set(steps) - broken.keys()) >= machine.announced
        if machine.process.exitcode is not None:
            machine.start()
            machine.wait(lambda: machine.entered() >= 0)
            assert machine.entered() >= machine.announced
        machine.wait_for_step(machine.step() + rng.randrange(1, 20))
    machine.end()
    assert_same_bits(undisturbed(tmp_path, machine.steps), machine.home, machine.steps)
    assert check_copy(server, "weather", tmp_path / "copy")[-1] == machine.steps


def test_a_signal_while_the_server_hangs(server, tmp_path):
    machine = Machine(tmp_path, "run", f"s3://{BUCKET}/signal", steps=STEPS)
    machine.start()
    machine.wait(lambda: machine.copied() >= 20)
    with server.proxy.failing(Fault("hang")):
        machine.wait_for_step(machine.step() + 50)
        machine.stop()
        assert "is behind, and is completed at the next start" in machine.end(code=75)
    left = machine.newest()
    machine.start()
    machine.wait(lambda: machine.copied() >= left)
    machine.kill()
    check_copy(server, "signal", tmp_path / "copy")


def test_an_empty_machine_waits_for_a_server_that_is_down(server, tmp_path):
    machine = Machine(tmp_path, "run", f"s3://{BUCKET}/empty", steps=STEPS)
    machine.start()
    machine.wait(lambda: machine.copied() >= 20)
    machine.wipe()
    with server.proxy.failing(Fault("refuse")):
        assert "Run the same command again" in machine.finish(code=75)
        assert machine.newest() == -1
    machine.start()
    machine.wait(lambda: machine.entered() >= machine.announced)
    machine.kill()


def test_a_large_file_goes_up_in_parts(server, tmp_path):
    from exact_resume.checkpoint.remote import Remote

    path = tmp_path / "large"
    path.write_bytes(os.urandom(70_000_000))
    with path.open("rb") as file:
        size, sha256 = Remote(f"s3://{BUCKET}/large").put("large", file)
    assert server.proxy.count("PUT", "partNumber=2")
    assert size == path.stat().st_size
    assert hashlib.sha256(server.read("large/large")).hexdigest() == sha256
