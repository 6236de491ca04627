"""A supervisor in a process of its own, whose workers follow a plan: a statement for each start and
rank.
"""

import json
import os
import sys
from pathlib import Path

from exact_resume.supervisor import supervise

WORKER = """
import json, os, signal, sys, time
from exact_resume.signals import Preemption
from exact_resume.supervisor import die_with_parent

rank, attempt = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])

def note(word):
    with open("log", "a") as log:
        log.write(f"{attempt} {rank} {word}\\n")

def die(name):
    os.kill(os.getpid(), signal.Signals[name])

def step(n):
    with open("step", "w") as file:
        file.write(str(n))

def save():
    preemption = Preemption()
    preemption.install(training=True)
    note("ready")
    while not preemption.signal:
        time.sleep(0.01)
    note(preemption.signal.name)
    time.sleep(0.5)  # until the step's end
    sys.exit(75)

def ignore_signals():
    for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"):
        signal.signal(signal.Signals[name], signal.SIG_IGN)
    note("ready")
    time.sleep(60)

def after(other):  # until process `other` of this start is gone, and the supervisor has noted it
    begin = f"{attempt} {other} "  # a process first notes its id
    while not (noted := [line for line in open("log") if line.startswith(begin)]):
        time.sleep(0.01)
    while os.path.exists(f"/proc/{noted[0].split()[2]}"):
        time.sleep(0.01)

note(os.getpid())
plan = json.loads(sys.argv[1])
exec(plan[min(attempt, len(plan) - 1)][rank])
"""


def progress() -> int:
    path = Path("step")
    return int(path.read_text()) if path.exists() else -1


def supervised(directory: str, plan: list[list[str]], settings: dict, stdout: str) -> None:
    """Supervise the ``plan`` in ``directory``, and exit with the code of the supervisor."""
    os.chdir(directory)
    os.environ["TMPDIR"] = "tmp"
    for descriptor, path in enumerate((stdout, "err"), start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOCTTY), descriptor)
    command = [sys.executable, "worker.py", json.dumps(plan), *settings.pop("words", [])]
    code = supervise(command, processes=len(plan[0]), progress=progress, **settings)
    try:
        os.waitpid(-1, os.WNOHANG)
        print("there is a child left")
    except ChildProcessError:
        sys.exit(code)
