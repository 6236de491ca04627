"""Supervisors in real processes, with real workers that exit, hang and are killed in every way."""

import itertools
import os
import pty
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
from supervised import WORKER, supervised

from exact_resume.signals import SIGNALS
from exact_resume.workers import reserve_port
from runs import SERVER

SETTINGS = {"restarts": 3, "kill_after": 0.5, "grace": 30}


class Supervised:
    """A supervisor in ``directory``, of workers that follow a plan: a statement for each start and
    rank.
    """

    def __init__(self, directory, *plan, stdout="out", **settings):
        self.directory = directory
        (directory / "tmp").mkdir(parents=True)
        (directory / "worker.py").write_text(WORKER)
        self.process = SERVER.Process(
            target=supervised, args=(str(directory), plan, SETTINGS | settings, stdout)
        )
        self.process.start()

    def log(self):
        path = self.directory / "log"
        return path.read_text().splitlines() if path.exists() else []

    def living(self):
        return [int(w) for line in self.log() if (w := line.split()[2]).isdigit() and alive(int(w))]

    def wait_for(self, word, n=2):
        """Until ``n`` workers have noted ``word``."""
        end = time.monotonic() + 60
        while sum(line.endswith(f" {word}") for line in self.log()) < n:
            assert time.monotonic() < end, self.log()
            time.sleep(0.01)

    def send(self, number):
        os.kill(self.process.pid, number)

    def end(self):
        """Wait for the end, and return the exit code and the output; nothing else may be left."""
        self.process.join(60)
        assert self.process.exitcode is not None, "it hangs"
        assert not self.living(), "workers were left behind"
        assert not list((self.directory / "tmp").iterdir())
        names = {path.name for path in self.directory.iterdir()}
        assert names <= {"worker.py", "tmp", "out", "err", "log", "step"}
        out, err = ((self.directory / n).read_text() if n in names else "" for n in ("out", "err"))
        attempts = 1 + max((int(line.split()[0]) for line in self.log()), default=-1)
        return SimpleNamespace(code=self.process.exitcode, attempts=attempts, out=out, err=err)


def alive(pid):
    try:
        os.kill(pid, 0)
        return (
            " Z " not in Path(f"/proc/{pid}/stat").read_text()
        )  # dead, but its new parent has not yet noticed
    except (ProcessLookupError, FileNotFoundError):
        return False


@pytest.fixture
def start(tmp_path):
    started, names = [], itertools.count()

    def start(*plan, **settings):
        started.append(Supervised(tmp_path / str(next(names)), *plan, **settings))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        for pid in one.living():
            os.kill(pid, signal.SIGKILL)


def test_finished(start):
    done = start(["exit(0)", "time.sleep(0.5); exit(0)"]).end()
    assert (done.code, done.attempts, done.out, done.err) == (0, 1, "", "")


def test_what_would_be_the_same_again_is_not_tried_again(start):
    at_once, refused, late = (
        start(["exit(130)", "time.sleep(60)"]),
        start(["exit(2)", "time.sleep(60)"]),
        start(["after(1); exit(2)", "exit(75)"]),  # the others leave quietly, and may do so first
    )
    for code, one in {130: at_once, 2: refused}.items():
        done = one.end()
        assert (done.code, done.attempts, done.out, done.err) == (code, 1, "", "")
    done = late.end()
    assert (done.code, done.attempts) == (2, 1)


ENDS = {
    ("exit(75)", "after(0); exit(75)"): "process 0 was told to stop",
    ("time.sleep(60)", "exit(75)"): "process 1 was told to stop",
    ("exit(0)", "exit(1)"): "process 1 exited with code 1",
    ("time.sleep(60)", "die('SIGKILL')"): "process 1 was killed by SIGKILL",
    ("exit(1)", "after(0); die('SIGABRT')"): "process 0 exited with code 1",
    ("after(1); exit(1)", "exit(75)"): "process 0 exited with code 1",
    ("die('SIGSTOP')", "exit(1)"): "process 1 exited with code 1",
    ("ignore_signals()", "time.sleep(0.3); exit(1)"): "process 1 exited with code 1",
}


def test_any_other_end_is_followed_by_another_start(start):
    started = [(start(first, ["exit(0)"] * 2, grace=5), cause) for first, cause in ENDS.items()]
    for one, cause in started:
        done = one.end()
        assert done.out == f"restart 1 of 3: {cause}; there is no checkpoint yet\n"
        assert (done.code, done.attempts, done.err) == (0, 2, "")


def test_restarts_come_to_an_end(start):
    done = start(["step(attempt); exit(7)"], restarts=2).end()
    assert (done.code, done.attempts) == (7, 3)
    assert (
        done.out.splitlines()[1]
        == "restart 2 of 2: process 0 exited with code 7; newest checkpoint is step 1"
    )
    assert (
        done.err
        == "error: process 0 exited with code 7 after 2 restarts; newest checkpoint is step 2\n"
    )


def test_starts_without_progress_come_to_an_end_sooner(start):
    stuck, moves = "die('SIGKILL')", "step(attempt); exit(1)"
    done = start([moves], [stuck], [stuck], [moves], [stuck], restarts=100, patience=3).end()
    assert (done.code, done.attempts) == (1, 7)
    assert done.err.startswith(
        "error: process 0 was killed by SIGKILL; 3 starts in a row ended without a new checkpoint; "
        "newest checkpoint "
        "is step 3. "
    )
    assert "attempts/" in done.err


def test_without_restarts_it_is_a_plain_launch(start):
    resumable, killed = (
        start([how, "time.sleep(60)"], restarts=0, grace=1)
        for how in ("exit(75)", "die('SIGKILL')")
    )
    done = resumable.end()
    assert (done.code, done.attempts, done.out, done.err) == (75, 1, "", "")
    done = killed.end()
    assert (done.code, done.attempts, done.out) == (1, 1, "")
    assert done.err == "error: process 0 was killed by SIGKILL; there is no checkpoint yet\n"


def test_what_cannot_be_started_is_told_in_a_line(start):
    done = start(
        ["exit(0)"] * 2, restarts=1, words=["x" * 3_000_000]
    ).end()  # longer than a system takes
    assert done.code == 1
    assert "could not be started" in done.out
    assert len(done.out.splitlines()) == len(done.err.splitlines()) == 1


def test_words_of_the_command_come_as_they_are(start):
    words = ["$$", "${local_rank}", "$local_rank", "${name}", "a=${paths.runs}/x", ""]
    told = repr(words).replace("$", r"\x24")  # itself a word of the command
    assert start([f"exit(sys.argv[2:] != {told})"], words=words).end().code == 0


def test_processes_are_told_who_they_are(start):
    names = ("WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    statements = (
        f"note([os.environ[n] for n in {names}])",
        "note(os.environ['MASTER_ADDR'])",
        "note(os.environ['MASTER_PORT'])",
    )
    one = start(["; ".join(statements)] * 2)
    assert one.end().code == 0
    words = {line.split(maxsplit=2)[2] for line in one.log()}
    assert {"['2', '0', '2']", "['2', '1', '2']", "localhost"} <= words
    assert len(words) == 6, "two pids, and one port for both"


def test_a_terminal_stays_one(start):
    master, slave = pty.openpty()
    assert start(["exit(not sys.stdout.isatty())"], stdout=os.ttyname(slave)).end().code == 0
    os.close(slave)
    os.close(master)


def test_a_signal_is_passed_on_and_nothing_started_again(start):
    started = {number: start(["save()", "save()"]) for number in SIGNALS}
    for number, one in started.items():
        one.wait_for("ready")
        one.send(number)
        done = one.end()
        assert (done.code, done.attempts, done.out, done.err) == (75, 1, "", "")
        assert [line.split()[2] for line in one.log()[-2:]] == [number.name] * 2


def test_sigint_a_second_time_stops_at_once(start):
    one = start(["save()", "ignore_signals()"])
    one.wait_for("ready")
    one.send(signal.SIGTERM)
    one.wait_for("SIGTERM", 1)
    one.send(signal.SIGINT)
    done = one.end()
    assert (done.code, done.attempts) == (130, 1)


def test_who_does_not_leave_is_killed(start):
    one = start(["save()", "step(5); ignore_signals()"], grace=2)
    one.wait_for("ready")
    one.send(signal.SIGTERM)
    done = one.end()
    assert (done.code, done.attempts, done.out) == (75, 1, "")
    assert (
        done.err
        == "error: did not leave after SIGTERM and was killed; newest checkpoint is step 5\n"
    )


def test_what_became_of_them_after_a_signal_is_not_hidden(start):
    until = "signal.signal(signal.SIGTERM, lambda *_: None); note('ready'); signal.pause(); "
    codes = {"exit(0)": 0, "exit(2)": 2, "exit(1)": 1, "die('SIGKILL')": 75}
    for one, code in [(start([until + how] * 2), code) for how, code in codes.items()]:
        one.wait_for("ready")
        one.send(signal.SIGTERM)
        done = one.end()
        assert (done.code, done.attempts, done.out, done.err) == (code, 1, "", "")


IGNORED = """
import signal
from exact_resume.supervisor import capture_signals
with capture_signals() as received:
    signal.raise_signal(signal.SIGHUP)
    print(received)
"""


def test_a_signal_that_is_ignored_stays_ignored():
    nohup = lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)  # noqa: E731
    done = subprocess.run(
        [sys.executable, "-c", IGNORED], capture_output=True, text=True, preexec_fn=nohup
    )
    assert done.stdout == "[]\n"


def test_children_of_a_dead_process_die_too(start):
    child = "if not os.fork(): note(os.getpid()); time.sleep(60)\n"
    noted = "while len(open('log').readlines()) < 3: time.sleep(0.01)\n"  # two, and the child
    one = start([child + noted + "die('SIGKILL')", "time.sleep(60)"], ["exit(0)"] * 2)
    assert one.end().code == 0
    assert len(one.log()) == 5, "two, a child, and two"


def test_nobody_outlives_a_killed_supervisor(start):
    one = start(["die_with_parent(); ignore_signals()"] * 2)
    control = start(["ignore_signals()"] * 2)
    for supervisor in (one, control):
        supervisor.wait_for("ready")
        supervisor.process.kill()
        supervisor.process.join()
    end = time.monotonic() + 10
    while one.living():
        assert time.monotonic() < end
        time.sleep(0.01)
    assert len(control.living()) == 2


def test_the_supervisor_needs_neither_torch_nor_lightning():
    code = (
        "import sys; import exact_resume.supervisor; print({'torch', 'lightning'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


def test_a_reserved_port_is_for_those_who_know_it():
    """Anybody who asks for a free port gets another one, and rank 0 can listen on it."""
    with reserve_port() as port, ExitStack() as open_sockets:
        for _ in range(200):
            other = open_sockets.enter_context(socket.socket())
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            other.bind(("", 0))
            assert other.getsockname()[1] != port
        for rank_zero in (socket.AF_INET6, socket.AF_INET):
            with socket.create_server(("", port), family=rank_zero) as server:
                socket.create_connection(server.getsockname()[:2]).close()


@pytest.mark.parametrize(
    ("variables", "code"), [({"TORCHELASTIC_RUN_ID": "1"}, -signal.SIGKILL), ({}, 0)]
)
def test_a_parent_that_died_before_is_noticed(variables, code):
    asks = "from exact_resume.supervisor import die_with_parent; die_with_parent()"
    environment = {k: v for k, v in os.environ.items() if k != "TORCHELASTIC_RUN_ID"}
    environment |= {"EXACT_RESUME_SUPERVISOR_PID": "1", **variables}
    assert subprocess.run([sys.executable, "-c", asks], env=environment).returncode == code
