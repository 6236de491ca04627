"""Start serve.py on a free port, ask it, and end it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from runs import ROOT

START_S = 400


class Reply(NamedTuple):
    """What the server answered; ``step`` is -1 where no checkpoint was asked."""

    status: int
    body: bytes
    step: int

    @property
    def detail(self):
        return json.loads(self.body)["detail"]


class RunningServer:
    """A server of a run, in processes of its own, until ``stop``."""

    def __init__(self, tmp, run, *words):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        paths = [f"paths.runs={tmp / 'runs'}", f"paths.cache={tmp / 'cache'}", f"run={run}"]
        options = [*paths, "threads=1", "device=cpu", f"serve.port={self.port}", *words]
        self.out = tmp / f"serve-{self.port}.out"
        with self.out.open("wb") as out:
            command = [sys.executable, str(ROOT / "serve.py"), *options]
            self.process = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)
        deadline = time.monotonic() + START_S
        while self.get("/health").status != 200:
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.1)

    def said(self):
        return self.out.read_text()

    def url(self, path):
        return f"http://127.0.0.1:{self.port}{path}"

    def get(self, path):
        return ask(urllib.request.Request(self.url(path)))

    def post(self, content):
        headers = {"Content-Type": "application/json"}
        return ask(urllib.request.Request(self.url("/draw"), content, headers))

    def draw(self, **words):
        return self.post(json.dumps(words).encode())

    def draw_all(self, requests, at_a_time=8):
        with ThreadPoolExecutor(at_a_time) as pool:
            return list(pool.map(lambda words: self.draw(**words), requests))

    def metric(self, name):
        text = self.get("/metrics").body.decode()
        return next(float(line.split()[1]) for line in text.splitlines() if line.startswith(name))

    def workers(self):
        """Return the processes that draw."""
        found = []
        for child in children(self.process.pid):
            if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                found.append(child)
        return found

    def kill_worker(self):
        os.kill(self.workers()[0], signal.SIGKILL)

    def stop(self):
        """End it as an administrator would; return the exit code."""
        self.process.terminate()
        return self.process.wait(120)


def ask(request):
    try:
        with urllib.request.urlopen(request, timeout=300) as response:
            return Reply(response.status, response.read(), int(response.headers.get("X-Step", -1)))
    except urllib.error.HTTPError as error:
        return Reply(error.code, error.read(), int(error.headers.get("X-Step", -1)))
    except OSError:
        return Reply(0, b"", -1)  # no answer


def children(pid):
    """Return the children of all threads of ``pid``."""
    lists = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(word) for path in lists for word in path.read_text().split()]
