"""A run has a second copy on a real S3 server: it survives its machine, and the server's faults."""

import pytest
from machines import Machine, assert_same_bits, check_copy, read_copy

from s3_proxy import Fault
from s3_server import BUCKET, s3_server

pytest.importorskip("moto")
pytest.importorskip("s3fs")

STEPS = 300


def slow(*values):
    """Return parameters that only ``make test-slow`` takes."""
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def server():
    with s3_server() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment().items():
            patch.setenv(name, value)
        patch.setenv("STEP_SECONDS", "0.004")
        yield server


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The directory of a run that nothing happened to, and that has no second copy."""
    machine = Machine(tmp_path_factory.mktemp("undisturbed"), "run")
    machine.finish()
    return machine.home


@pytest.fixture
def prefix(request):
    """A place of its own for each test."""
    return request.node.name.replace("[", "-").rstrip("]")


def test_lost_machines_cost_no_copied_step(server, undisturbed, prefix, tmp_path):
    machine = Machine(tmp_path, "run", f"s3://{BUCKET}/{prefix}")
    for goal in (60, 160):
        machine.start()
        machine.wait(lambda goal=goal: machine.copied() >= goal)
        machine.wipe()
        assert max(check_copy(server, prefix, tmp_path / "copy")) >= machine.announced
    machine.finish()
    assert machine.entered() >= 160
    assert_same_bits(undisturbed, machine.home, STEPS)
    assert max(check_copy(server, prefix, tmp_path / "copy")) == STEPS


def test_killed_in_an_upload_and_in_a_download(server, undisturbed, prefix, tmp_path):
    machine = Machine(tmp_path, "run", f"s3://{BUCKET}/{prefix}")
    machine.start()
    machine.wait(lambda: machine.copied() >= 60)
    with server.proxy.failing(Fault("slow", ("PUT",), "state.ckpt", rate=2000)):
        before = server.proxy.count("PUT", f"{prefix}/checkpoints")
        machine.wait(lambda: server.proxy.count("PUT", f"{prefix}/checkpoints") > before)
        machine.wipe()
    check_copy(server, prefix, tmp_path / "copy")
    with server.proxy.failing(Fault("slow", ("GET",), "state.ckpt", rate=2000)):
        before = server.proxy.count("GET", "state.ckpt")
        machine.start()
        machine.wait(lambda: server.proxy.count("GET", "state.ckpt") > before)
        machine.kill()
        assert not list((machine.home / "checkpoints").glob("step-*"))
    machine.finish()
    assert machine.entered() >= 60
    assert_same_bits(undisturbed, machine.home, STEPS)


@pytest.mark.slow
def test_the_record_is_never_older_than_a_checkpoint(server, prefix, tmp_path):
    machine = Machine(tmp_path, "run", f"s3://{BUCKET}/{prefix}")
    machine.start()
    with server.proxy.failing(Fault("slow", ("PUT",), "metrics.csv", rate=4000)):
        machine.wait(lambda: server.proxy.is_busy("PUT", "metrics.csv"))
        step = machine.step()
        machine.wait(lambda: machine.copied() >= step + 20)  # a checkpoint that was newer than it
        machine.kill()
    check_copy(server, prefix, tmp_path / "copy")


@pytest.mark.parametrize(
    "fault",
    [
        Fault("refuse"),
        Fault("hang"),
        Fault("full", ("PUT", "POST")),
        slow(Fault("slow", rate=1000)),
        slow(Fault("cut")),
        slow(Fault("forget", ("PUT",))),
        slow(Fault("flip", ("GET",), "owner.json")),
    ],
    ids=lambda fault: fault.kind,
)
def test_training_goes_on_while_the_server_fails(fault, server, undisturbed, prefix, tmp_path):
    machine = Machine(tmp_path, "run", f"s3://{BUCKET}/{prefix}")
    machine.start()
    machine.wait_for_step(45)
    with server.proxy.failing(fault):
        step = machine.step()
        machine.wait_for_step(step + 100)  # five more checkpoints
    machine.end()
    assert_same_bits(undisturbed, machine.home, STEPS)
    assert check_copy(server, prefix, tmp_path / "copy")[-1] == STEPS


@pytest.mark.slow
def test_a_late_request_of_a_lost_machine_harms_nothing(server, undisturbed, prefix, tmp_path):
    machine = Machine(tmp_path, "run", f"s3://{BUCKET}/{prefix}")
    machine.start()
    machine.wait(lambda: machine.copied() >= 40)
    with server.proxy.failing(Fault("late", ("PUT", "DELETE"))):
        before = len(server.proxy.requests)
        machine.wait(lambda: len(server.proxy.requests) > before + 3)
        machine.wipe()
    check_copy(server, prefix, tmp_path / "copy")
    machine.finish()
    assert_same_bits(undisturbed, machine.home, STEPS)
    check_copy(server, prefix, tmp_path / "copy")


@pytest.mark.parametrize("where", ["upload", slow("rest"), slow("download")])
def test_a_lie_is_never_entered(where, server, undisturbed, prefix, tmp_path):
    machine = Machine(tmp_path, "run", f"s3://{BUCKET}/{prefix}")
    machine.start()
    machine.wait(lambda: str(server.keys(prefix)).count("manifest.json") >= 2)
    if where == "upload":
        with server.proxy.failing(Fault("flip", ("PUT",), "state.ckpt")):
            step = machine.step()
            machine.wait_for_step(step + 60)
            machine.wipe()
            check_copy(server, prefix, tmp_path / "copy")
    else:
        machine.wipe()
    newest = check_copy(server, prefix, tmp_path / "copy")[-1]
    if where == "rest":
        server.flip(f"{prefix}/checkpoints/step-{newest:08d}/state.ckpt")
    if where == "download":
        with server.proxy.failing(Fault("flip", ("GET",), f"step-{newest:08d}/state.ckpt")):
            machine.start()
            machine.wait(lambda: machine.entered() >= 0)
            assert 0 < machine.entered() < newest
            machine.wipe()
    machine.finish()
    assert (machine.entered() < newest) == (where == "rest")
    assert machine.entered() > 0
    assert_same_bits(undisturbed, machine.home, STEPS)
    check_copy(server, prefix, tmp_path / "copy")


@pytest.mark.slow
def test_the_older_of_two_machines_stops(server, undisturbed, prefix, tmp_path, monkeypatch):
    monkeypatch.setenv("STEP_SECONDS", "0.03")
    older, newer = (Machine(tmp_path, name, f"s3://{BUCKET}/{prefix}") for name in "ab")
    older.start()
    older.wait(lambda: older.copied() >= 40)
    monkeypatch.undo()
    newer.start()
    assert "newer start of this run" in older.end(code=2)
    newer.end()
    assert newer.entered() >= 40
    assert_same_bits(undisturbed, newer.home, STEPS)
    assert check_copy(server, prefix, tmp_path / "copy")[-1] == STEPS


def test_control_a_manifest_that_is_sent_first_is_noticed(server, prefix, tmp_path):
    machine = Machine(tmp_path, "run", f"s3://{BUCKET}/{prefix}", fault="manifest-first")
    machine.start()
    machine.wait_for_step(60)
    with server.proxy.failing(Fault("slow", ("PUT",), "state.ckpt", rate=2000)):
        before = server.proxy.count("PUT", "state.ckpt")
        machine.wait(lambda: server.proxy.count("PUT", "state.ckpt") > before)
        machine.wipe()
    assert read_copy(server, prefix, tmp_path / "copy")[1]


def test_control_a_copy_that_is_not_read_back_is_noticed(server, prefix, tmp_path):
    machine = Machine(tmp_path, "run", f"s3://{BUCKET}/{prefix}", fault="not-read-back")
    with server.proxy.failing(Fault("flip", ("PUT",), "state.ckpt")):
        machine.start()
        machine.wait(lambda: machine.copied() >= 60)
        machine.wipe()
    assert read_copy(server, prefix, tmp_path / "copy")[1]
