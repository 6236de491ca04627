"""A real signal, wherever it arrives: nothing is lost, the exit code says so, the same command goes
on bit for bit.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.utils.data import DataLoader, Dataset

from exact_resume.checkpoint.store import Store
from exact_resume.signals import (
    COPY_S,
    EXIT_INTERRUPTED,
    EXIT_RESUMABLE,
    SIGNALS,
    PreemptedError,
    Preemption,
    outlive_first_signal,
)
from runs import command, differences, fork, train

SIGNALLED = str(Path(__file__).with_name("signalled.py"))


def struck(tmp, name, place, number, *overrides, **options):
    """The run of ``command`` from its imports on, with a signal at ``place``."""
    python, _, *words = command(tmp, name, *overrides)
    words = [python, SIGNALLED, place, number, *words]
    return subprocess.run(words, capture_output=True, text=True, timeout=300, **options)


def struck_later(tmp, name, place, number, *overrides):
    """The same, forked from what has imported it all: its exit code, and all it said."""
    _, _, *words = command(tmp, name, *overrides)
    process, out, err = fork(tmp, name, [SIGNALLED, place, number, *words])
    process.join(300)
    return process.exitcode, out.read_text() + err.read_text()


def steps(tmp, name):
    return Store(tmp / "runs" / name / "checkpoints").steps()


def test_a_run_that_is_stopped_everywhere_is_the_undisturbed_one(tmp_path):
    """One run, stopped while its data are decoded, in a step, in a validation and in a grid, and
    twice at its end.

    At its end the last step is saved at once, and each of the next starts makes something of what
    is missing.
    """
    train(tmp_path, "whole")
    fresh = [f"paths.cache={tmp_path / 'another'}"]
    for place, number, step, overrides in (
        ("decoding", "SIGHUP", None, fresh),
        ("step", "SIGTERM", 2, []),
        ("validation", "SIGINT", 4, []),
        ("sampling", "SIGUSR1", 6, []),
        ("last grid", "SIGTERM", 12, []),
    ):
        code, said = struck_later(tmp_path, "stopped", place, number, *overrides)
        assert code == EXIT_RESUMABLE, said
        assert "Traceback" not in said
        assert f"{number}: {f'saved step {step}' if step else 'nothing was trained yet'}." in said
        assert "Run the same command to continue" in said
        assert steps(tmp_path, "stopped")[-1:] == ([step] if step else [])
    code, said = struck_later(
        tmp_path, "stopped", "last validation", "SIGHUP"
    )  # before training has begun
    assert (code, "nothing was trained yet" in said) == (EXIT_RESUMABLE, True)
    assert "resumed from step 12, to step 12 (bitwise" in train(tmp_path, "stopped").stdout
    assert "finished at step 12" in train(tmp_path, "stopped").stdout
    assert differences(tmp_path, "whole", "stopped") == []
    pictures = [
        sorted((tmp_path / "runs" / name / "samples").iterdir()) for name in ("whole", "stopped")
    ]
    assert (
        [p.name for p in pictures[0]]
        == [p.name for p in pictures[1]]
        == ["step-00000006.png", "step-00000012.png"]
    )
    for a, b in zip(*pictures, strict=True):
        assert a.read_bytes() == b.read_bytes()


@pytest.mark.parametrize("number", [s.name for s in SIGNALS])
def test_during_the_first_imports_nothing_was_trained_yet(number, tmp_path):
    """Seconds before the run listens; whoever starts runs sees the exit code that means "again"."""
    done = struck(tmp_path, "run", "import hydra", number)
    assert done.returncode == EXIT_RESUMABLE
    assert done.stdout == f"{number}: nothing was trained yet. Run the same command to continue.\n"
    assert done.stderr == ""
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [s.name for s in SIGNALS])
def test_during_the_last_imports_too(number, tmp_path):
    done = struck(tmp_path, "run", "import lightning", number)
    assert (done.returncode, done.stderr) == (EXIT_RESUMABLE, "")
    assert "nothing was trained yet" in done.stdout
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_ctrl_c_twice_stops_at_once_without_a_word(tmp_path):
    done = struck(tmp_path, "run", "step, twice", "SIGINT")
    assert done.returncode == EXIT_INTERRUPTED == 130, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert steps(tmp_path, "run") == []


@pytest.mark.slow
@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT"])
def test_a_signal_to_the_whole_group_does_not_kill_the_data_workers(number, tmp_path):
    """As a terminal's Ctrl-C, or a cluster's manager: the workers outlive the step that is to be
    finished.
    """
    done = struck(
        tmp_path, "run", "step, group", number, "data.num_workers=2", start_new_session=True
    )
    assert done.returncode == EXIT_RESUMABLE, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert steps(tmp_path, "run") == [2]


@pytest.mark.slow
def test_nohup_is_respected(tmp_path):
    done = struck(
        tmp_path,
        "run",
        "step",
        "SIGHUP",
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def preemption():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield Preemption()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_before_training_it_leaves_where_it_is(number, preemption):
    preemption.install(training=False)
    with pytest.raises(PreemptedError, match=number.name):
        signal.raise_signal(number)
    assert not issubclass(PreemptedError, Exception), (
        "an `except Exception` would take it for an error"
    )


@pytest.mark.parametrize("number", SIGNALS)
def test_while_training_it_is_remembered(number, preemption):
    preemption.install(training=True)
    signal.raise_signal(number)
    signal.raise_signal(signal.SIGTERM)  # a second one changes nothing
    assert preemption.signal is number


@pytest.mark.parametrize("first", SIGNALS)
def test_sigint_after_a_signal_stops_at_once(first, preemption):
    preemption.install(training=True)
    signal.raise_signal(first)
    with pytest.raises(SystemExit) as exit:
        signal.raise_signal(signal.SIGINT)
    assert exit.value.code == 130
    assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL, (
        "a third time it must not wait for anything"
    )


def test_the_copy_that_torchrun_sends_changes_nothing(preemption, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    preemption.install(training=True)
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)
    assert preemption.signal is signal.SIGINT
    time.sleep(COPY_S)
    with pytest.raises(SystemExit):
        signal.raise_signal(signal.SIGINT)


class Killed(Dataset):
    """Sends its process signals while it reads an item."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        for number in [(), (signal.SIGTERM, signal.SIGHUP), (), (signal.SIGTERM,)][index]:
            os.kill(os.getpid(), number)
        return index


def test_a_data_worker_lives_through_the_first_and_dies_of_the_second(preemption):
    preemption.install(training=False)
    loader = DataLoader(
        Killed(),
        batch_size=None,
        num_workers=1,
        prefetch_factor=1,
        worker_init_fn=lambda worker: outlive_first_signal(),
    )
    read = []
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        read.extend(loader)
    assert read[:2] == [0, 1]
    assert preemption.signal is None


def test_a_child_is_ended_by_the_first(preemption):
    preemption.install(training=True)
    child = os.fork()
    if child == 0:
        os.kill(os.getpid(), signal.SIGTERM)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM


def test_a_pool_of_processes_ends_when_it_is_told(preemption):
    """Its processes inherit the handlers, and its end sends each of them one SIGTERM."""
    preemption.install(training=True)
    context = multiprocessing.get_context("fork")
    for _ in range(20):
        child = context.Process(target=time.sleep, args=(600,))
        child.start()
        child.terminate()
        child.join(60)
        assert child.exitcode == -signal.SIGTERM
        with context.Pool(2) as pool:
            assert pool.map(abs, [-1, -2]) == [1, 2]
    assert preemption.signal is None


def test_the_handlers_are_given_back(preemption):
    before = [signal.getsignal(number) for number in SIGNALS]
    preemption.install(training=False)
    preemption.install(training=True)
    assert [signal.getsignal(number) for number in SIGNALS] != before
    preemption.restore()
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_training_in_ones_own_process_gives_them_back(tmp_path):
    """As in a notebook: Ctrl-C interrupts the next cell, and a pool that it starts ends."""
    code = (
        "import signal, sys\n"
        f"sys.path.insert(0, {str(Path(SIGNALLED).parents[1])!r})\n"
        "import copied_run\n"
        "from exact_resume.signals import SIGNALS\n"
        "before = [signal.getsignal(number) for number in SIGNALS]\n"
        f"assert copied_run.main({str(tmp_path / 'run')!r}, 'none', '20') == 0\n"
        "assert before == [signal.getsignal(number) for number in SIGNALS]"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_what_was_ignored_stays_ignored():
    code = (
        "import signal; from exact_resume.signals import Preemption\n"
        "p = Preemption(); p.install(training=False); signal.raise_signal(signal.SIGHUP); "
        "print(p.signal)\n"
        "signal.raise_signal(signal.SIGTERM)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    assert done.stdout == "None\n"
    assert "PreemptedError: SIGTERM" in done.stderr
