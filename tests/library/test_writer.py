"""The background writer on a real store: what was asked for is written as it was, in time, or the
run is told.
"""

import errno
import json
import logging
import os
import subprocess
import sys
import threading
import time
from contextlib import nullcontext

import pytest
import torch
from torch.utils.data import DataLoader

from exact_resume.checkpoint.compare import diff_checkpoints
from exact_resume.checkpoint.host_buffers import HostBuffers
from exact_resume.checkpoint.store import Store, load_state
from exact_resume.checkpoint.writer import SaveError, StoreCheckpointIO
from exact_resume.signals import PreemptedError


class Gated(Store):
    """A slow disk: each commit waits until it is let through."""

    def __init__(self, directory):
        super().__init__(directory)
        self.begun, self.gate = threading.Semaphore(0), threading.Semaphore(0)

    def commit(self, step, state, **metadata):
        self.begun.release()
        self.gate.acquire()
        return super().commit(step, state, **metadata)


class Failing(Store):
    """A disk that answers its first commits with ``errors``."""

    def __init__(self, directory, *errors):
        super().__init__(directory)
        self.errors = list(errors)

    def commit(self, step, state, **metadata):
        if self.errors:
            raise self.errors.pop(0)
        return super().commit(step, state, **metadata)


class Unsynced(Store):
    """A disk whose first commit fails after the rename, in the sync of the directory."""

    def commit(self, step, state, **metadata):
        first = not self.steps()
        path = super().commit(step, state, **metadata)
        if first:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return path


def io(store, **settings):
    return StoreCheckpointIO(
        store, lambda checkpoint: {"position": 8 * checkpoint["global_step"]}, **settings
    )


def save(io, step, weights=None):
    weights = torch.full((1000,), float(step)) if weights is None else weights
    io.save_checkpoint(
        {"global_step": step, "state_dict": {"weights": weights}}, io.store.state(step)
    )


def saved(store, step):
    return load_state(store.state(step))["state_dict"]["weights"]


def test_a_save_is_the_state_when_it_was_asked_for(tmp_path):
    """Training changes the weights in place, at once, while the writer has not even begun."""
    store, weights, expected = Gated(tmp_path), torch.zeros(300, 300), []
    with io(store) as writer:
        for step in range(1, 9):
            weights += torch.rand_like(weights)
            expected.append(weights.clone())
            save(writer, step, weights)
            weights.fill_(torch.nan)
            weights.copy_(expected[-1])
            store.gate.release()
    assert store.steps() == [*range(1, 9)]
    for step, x in enumerate(expected, 1):
        assert store.verify(step)["position"] == 8 * step
        assert torch.equal(saved(store, step), x)


def test_control_without_the_copy_a_later_change_is_saved(tmp_path):
    store, weights = Gated(tmp_path), torch.zeros(10)
    writer = io(store)
    for buffers in writer.free_buffers.queue:
        buffers.copy = lambda state: state
    with writer:
        save(writer, 1, weights)
        weights += 1
        store.gate.release()
    assert saved(store, 1).sum() == 10


def test_every_kind_of_tensor_comes_back_with_bits_and_layout(tmp_path):
    base = torch.randn(6, 8)
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = {
        "global_step": 1,
        "optimizer_states": [optimizer.state_dict()],
        "state_dict": {
            **layer.state_dict(),
            "shared": [base, base, base[2], base.T, base[::2, 1:5], base.view(48)],
            "layouts": [
                torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
                torch.ones(3, 1).expand(3, 4),
            ],
            "scalars": [torch.tensor(3.5), torch.tensor(7), torch.tensor(True), torch.empty(0, 4)],
            "types": [
                base.bfloat16(),
                base.double(),
                base.to(torch.complex64),
                base.half(),
                torch.arange(9),
            ],
            "bits": torch.tensor([0x7FC00001, -0x80000000, 1], dtype=torch.int32).view(
                torch.float32
            ),  # NaN, -0, denormal
            "rest": {"names": ["a", None, (1, 2.5, True)], "set": {1, 2}, 3: b"bytes"},
        },
    }
    for _ in range(2):  # into new buffers, and into used ones
        store = Store(tmp_path / str(_))
        with io(store) as writer:
            writer.save_checkpoint(state, store.state(1))
        loaded = load_state(store.state(1))
        assert diff_checkpoints(state, loaded) == []
        weights = loaded["state_dict"]
        assert weights["rest"] == state["state_dict"]["rest"]
        assert weights["layouts"][0].stride() == state["state_dict"]["layouts"][0].stride()
        assert weights["shared"][3].stride() == base.T.stride()
    assert loaded["optimizer_states"][0]["state"][0]["step"] == torch.tensor(1.0)


def test_buffers_are_allocated_once():
    buffers, layer = HostBuffers(), torch.nn.Linear(3, 2)
    first = buffers.copy({"a": layer.state_dict(), "b": [torch.ones(2, 3), torch.ones(3, 2).T]})
    pointers = [x.data_ptr() for x in (*first["a"].values(), *first["b"])]
    assert len(set(pointers)) == 4
    layer.weight.data += 1
    second = buffers.copy({"b": [torch.zeros(2, 3), torch.zeros(3, 2).T], "a": layer.state_dict()})
    assert sorted(x.data_ptr() for x in (*second["a"].values(), *second["b"])) == sorted(pointers)
    assert torch.equal(second["a"]["weight"], layer.weight)
    assert not second["a"]["weight"].requires_grad
    other = buffers.copy(torch.zeros(4, 3))
    assert other.data_ptr() not in pointers


def test_saves_that_do_not_overlap_need_one_copy(tmp_path):
    with io(Store(tmp_path)) as writer:
        for step in (1, 2, 3):
            save(writer, step)
            while writer.free_buffers.qsize() < 2:
                time.sleep(0.001)
    assert sorted(len(buffers.pool) for buffers in writer.free_buffers.queue) == [0, 1]


def pointers(writer):
    return {
        x.data_ptr()
        for buffers in writer.free_buffers.queue
        for pool in buffers.pool.values()
        for x in pool
    }


def test_memory_can_be_allocated_before_the_first_save(tmp_path):
    store = Store(tmp_path)
    with io(store) as writer:
        writer.preallocate([torch.zeros(1000), torch.zeros(5)])
        while writer.free_buffers.qsize() < 2:
            time.sleep(0.001)
        reserved = pointers(writer)
        save(writer, 1)
    assert torch.equal(saved(store, 1), torch.ones(1000))
    assert pointers(writer) == reserved
    assert len(reserved) == 2


def test_two_saves_do_not_wait_and_a_third_waits_for_the_first(tmp_path):
    store = Gated(tmp_path)
    with io(store) as writer:
        save(writer, 1)
        save(writer, 2)
        store.begun.acquire()
        assert store.steps() == [], "training went on before anything was written"
        threading.Timer(0.3, store.gate.release).start()
        save(writer, 3)
        assert store.steps() == [1]
        store.gate.release(2)
    assert store.steps() == [1, 2, 3]


def test_outside_with_a_save_is_durable_when_it_returns(tmp_path):
    store = Store(tmp_path)
    save(io(store), 1)
    assert store.last()["position"] == 8
    with pytest.raises(FileExistsError):
        save(io(store), 1)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE])
def test_what_may_pass_is_tried_again(number, tmp_path, caplog):
    disk = OSError(number, os.strerror(number))
    buried = RuntimeError("unexpected pos 64 vs 0")
    buried.__context__ = disk
    store = Failing(tmp_path, disk, buried)
    with io(store, retry_delays=(0, 0)) as writer:
        save(writer, 1)
    assert store.steps() == [1]
    assert [r.levelno for r in caplog.records] == [logging.WARNING] * 2
    assert all(f"saving step 1 failed: {disk}; trying again" in r.message for r in caplog.records)


def test_a_name_that_was_not_durable_is_synced_again(tmp_path, caplog):
    store = Unsynced(tmp_path)
    with io(store, retry_delays=(0,)) as writer:
        save(writer, 1)
    assert store.last()["step"] == 1
    assert "Input/output error; trying again" in caplog.text


@pytest.mark.parametrize(
    ("errors", "reason"),
    [
        ([OSError(errno.ENOSPC, "full")] * 3, "full"),  # as often as it is tried
        ([OSError(errno.EROFS, "read-only")], "read-only"),
        ([OSError(errno.EFBIG, "too large")], "too large"),
        ([RuntimeError("a bug")], "a bug"),
    ],
)
def test_what_does_not_pass_stops_the_training(errors, reason, tmp_path, caplog):
    store = Failing(tmp_path)
    writer = io(store, retry_delays=(0, 0))
    message = rf"could not be written: .*{reason}.*older ones in .* are whole; mend the cause"
    with pytest.raises(SaveError, match=message), writer:  # noqa: PT012
        save(writer, 1)
        while not store.steps():
            writer.check()
        store.errors += errors
        save(writer, 2)
        for _ in range(3):  # the next steps
            writer.thread.join(0.1)
            writer.check()
        pytest.fail("training went on")
    for _ in range(3):  # nor is it forgotten, or waited for
        with pytest.raises(SaveError, match=reason):
            save_in_background(writer, 3)
    assert [store.verify(step)["step"] for step in store.steps()] == [1]
    assert f"saving step 2 failed: {errors[0]}" in caplog.text


def save_in_background(writer, step):
    with writer:
        save(writer, step)


def test_what_is_no_tensor_or_primitive_is_refused_when_asked(tmp_path):
    with io(Store(tmp_path)) as writer:
        with pytest.raises(TypeError, match="state_dict"):
            save(writer, 1, object())
        with pytest.raises(ValueError, match="belongs at"):
            writer.save_checkpoint({"global_step": 1}, tmp_path / "elsewhere.ckpt")
        save(writer, 1)
    assert Store(tmp_path).steps() == [1]


@pytest.mark.parametrize(
    ("left", "told"), [(PreemptedError("SIGTERM"), SaveError), (ArithmeticError("the loss"), None)]
)
def test_leaving_with_a_failed_save(left, told, tmp_path):
    """It is the news where all else was in order, and not where something else stopped the
    training.
    """
    with pytest.raises(told or type(left)), io(Failing(tmp_path, OSError("the disk"))) as writer:  # noqa: PT012
        save(writer, 1)
        raise left


@pytest.mark.parametrize(
    "left", [None, PreemptedError("SIGTERM"), ArithmeticError("the loss"), KeyboardInterrupt()]
)
def test_with_is_left_when_the_last_save_is_durable(left, tmp_path):
    store = Gated(tmp_path)
    with pytest.raises(type(left)) if left else nullcontext(), io(store) as writer:
        save(writer, 1)
        save(writer, 2)
        threading.Timer(0.2, store.gate.release, (2,)).start()
        if left:
            raise left
    assert store.steps() == [1, 2]
    assert writer.thread is None


def test_what_cannot_be_deleted_does_not_stop_the_run(tmp_path, caplog):
    store = Store(tmp_path)
    (tmp_path / ".pruned-step-00000001" / "in the way").mkdir(parents=True)
    writer = io(store)
    writer.after_commit = lambda: store.prune(set())
    with writer:
        for step in (1, 2, 3):
            save(writer, step)
    assert "step 2 is saved, but old files could not be deleted" in caplog.text
    assert store.steps()[-1] == 3
    assert all(store.verify(step) for step in store.steps())


def test_training_may_list_while_the_writer_deletes(tmp_path):
    store = Store(tmp_path)
    writer = io(store)
    writer.after_commit = lambda: store.prune(set())
    with writer:
        for step in range(1, 60):
            save(writer, step)
            for _ in range(5):  # a listing may miss what is renamed while it is read
                steps = store.steps()
                assert steps == sorted(steps)
    assert store.steps() == [59]


def test_data_workers_may_be_forked_at_any_instant(tmp_path):
    store = Store(tmp_path)
    with io(store) as writer:
        for step in range(1, 13):
            save(writer, step, torch.full((200_000,), float(step)))
            loader = DataLoader(
                range(8), batch_size=2, num_workers=2, multiprocessing_context="fork"
            )
            assert torch.cat([*loader]).tolist() == [*range(8)]
    assert [store.verify(step)["step"] for step in store.steps()] == [*range(1, 13)]


TEAMS = """
import os, sys
import torch
from exact_resume.checkpoint.store import Store
from exact_resume.checkpoint.host_buffers import HostBuffers
from exact_resume.checkpoint.writer import StoreCheckpointIO

if sys.argv[2] == "copied":  # by torch, in the writer
    HostBuffers.preallocate = HostBuffers.copy
torch.set_num_threads(2)
weights = torch.zeros(4, 1_000_000) + 1  # opens the team of this thread
alone = len(os.listdir("/proc/self/task"))
with StoreCheckpointIO(Store(sys.argv[1]), lambda checkpoint: {}) as io:
    for step in (1, 2):
        io.preallocate({"weights": weights})
        state = {"global_step": step, "state_dict": {"weights": weights}}
        io.save_checkpoint(state, io.store.state(step))
        buffers = [io.free_buffers.get(), io.free_buffers.get()]  # so all work is done
        [io.free_buffers.put(b) for b in buffers]
    print(len(os.listdir("/proc/self/task")) - alone)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
@pytest.mark.parametrize(("how", "threads"), [("touched", 1), ("copied", 2)])
def test_the_writer_is_one_thread_beside_a_team_of_openmp(how, threads, tmp_path):
    """The control opens a second team, as any parallel loop of torch does there, and halves the
    speed of training.
    """
    done = subprocess.run(
        [sys.executable, "-c", TEAMS, tmp_path, how], capture_output=True, text=True, timeout=60
    )
    assert done.stdout == f"{threads}\n", done.stderr


LEAVE = """
import json, os, signal, sys, threading, time
import torch
from exact_resume.signals import PreemptedError, Preemption
from exact_resume.checkpoint.store import Store
from exact_resume.checkpoint.writer import StoreCheckpointIO

class Slow(Store):
    def commit(self, step, state, **metadata):
        time.sleep(seconds)
        return super().commit(step, state, **metadata)

for name, (how, seconds, size) in json.loads(sys.argv[2]).items():
    if not (child := os.fork()):
        break
    print(name, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), sep=": ", flush=True)
else:
    sys.exit()

store = Slow(sys.argv[1] + "/" + name)
preemption = Preemption()
preemption.install(training=True)
with StoreCheckpointIO(store, lambda checkpoint: {}) as io:
    for step in (1, 2):
        state = {"global_step": step, "state_dict": {"weights": torch.zeros(size)}}
        io.save_checkpoint(state, store.state(step))
    if how == "raise":
        raise ArithmeticError
    if how == "preempted":
        raise PreemptedError
    if "ctrl-c" in how:
        signal.raise_signal(signal.SIGINT)
        assert preemption.signal is signal.SIGINT
    if "twice" in how:
        threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
"""


@pytest.mark.slow
def test_a_process_ends_after_its_last_save_or_at_the_second_ctrl_c(tmp_path):
    cases = {
        "its end": ("", 0.2, 1000),
        "an error": ("raise", 0.2, 1000),
        "preempted": ("preempted", 0.2, 1000),
        "ctrl-c": ("ctrl-c", 0.2, 1000),
        "twice, the disk is dead": ("ctrl-c twice", 3600, 1000),
        "twice, in torch.save": ("ctrl-c twice", 0, 40_000_000),
    }
    done = subprocess.run(
        [sys.executable, "-c", LEAVE, tmp_path, json.dumps(cases)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    codes = dict(line.split(": ") for line in done.stdout.splitlines())
    stores = {name: Store(tmp_path / name) for name in cases}
    assert all(store.verify(step) for store in stores.values() for step in store.steps())
    assert codes.pop("twice, in torch.save") == "130", done.stderr
    assert {name: (code, stores[name].steps()) for name, code in codes.items()} == {
        "its end": ("0", [1, 2]),
        "an error": ("1", [1, 2]),
        "preempted": ("1", [1, 2]),
        "ctrl-c": ("0", [1, 2]),
        "twice, the disk is dead": ("130", []),
    }, done.stderr
    assert done.stderr.count("Traceback") == 2, done.stderr
